"""What this machine can measure, what it cannot, why, and the pip line or step that would change it.

A report is a list of sections, a section a list of capabilities: the same data as a table for people and as JSON.
Libraries are looked up, not imported, except torch, which alone knows whether its CUDA works.

    effbench doctor --json
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effbench import __version__, hardware, registry
from effbench.errors import EffbenchError
from effbench.probe import Capability

if TYPE_CHECKING:
    from rich.console import RenderableType

RESULTS = Path("results/local")
NOISY_IQR = 0.1  # relative; repeats of a calibration that spread wider were disturbed
BUSY_LOAD = 0.5  # load average per core above which other work is disturbing
PURPOSES = {
    "app": "the leaderboard in the browser",
    "quant": "int8, nf4 and other quantised weights",
    "ray": "running suites on a Ray cluster",
    "eval": "task accuracies by lm-eval",
    "gpu": "Triton kernels",
    "vision": "the vision-language workload",
    "dev": "effbench's own tests and checks",
}
# Libraries that techniques can use and that no extra installs, because they build against the CUDA at hand.
UNBUNDLED = (
    ("flash-attn", "FlashAttention kernels", "pip install flash-attn --no-build-isolation"),
    ("flash-linear-attention", "linear attention kernels (fla)", "pip install flash-linear-attention"),
)


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what is found below it."""

    title: str
    items: tuple[Capability, ...]


def report(results: Path = RESULTS) -> list[Section]:
    """Examine this machine and installation; takes a few seconds, changes nothing and never raises for what is missing."""
    return [
        Section(title="Machine", items=tuple(_machine())),
        Section(title="Software", items=tuple(_software())),
        *(Section(title=f"Probe {name}", items=tuple(_probe(name))) for name in registry.entries("probe")),
        Section(title="Peaks for MFU and roofline", items=tuple(_peaks())),
        Section(title="Optional libraries", items=tuple(_extras())),
        Section(title="Plugins", items=tuple(_plugins())),
        Section(title="Text and places", items=(_text(), *_places(results))),
    ]


def to_json(sections: Sequence[Section]) -> dict[str, Any]:
    """The report as one JSON document."""
    items = [item for section in sections for item in section.items]
    available = sum(item.available for item in items)
    return {
        "effbench": __version__,
        "hardware": hardware.hardware_name(),
        "available": available,
        "missing": len(items) - available,
        "sections": [{"title": s.title, "items": [asdict(item) for item in s.items]} for s in sections],
    }


def render(sections: Sequence[Section]) -> RenderableType:
    """The report as tables for a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    tables: list[RenderableType] = []
    for section in sections:
        if not section.items:
            continue
        table = Table(
            title=section.title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False
        )
        table.add_column(width=3)
        table.add_column(min_width=28, max_width=40)
        table.add_column(overflow="fold")
        for item in _gathered(section.items):
            mark = Text("yes", style="green") if item.available else Text("no", style="yellow")
            said = Text(item.detail)
            if not item.available and item.remedy:
                said = Text("\n" if item.detail else "").join([said, Text(f"→ {item.remedy}", style="cyan")])
            table.add_row(mark, Text(item.what), said)
        tables += [table, Text("")]
    return Group(*tables)


def _gathered(items: Sequence[Capability]) -> list[Capability]:
    """The same items, with those that are missing for one reason in one line."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for item in items:
        key = (item.available, item.detail, item.remedy, item.what if item.available or not item.remedy else "")
        groups.setdefault(key, []).append(item.what)
    return [
        Capability(what=", ".join(names), available=bool(available), detail=str(detail), remedy=str(remedy))
        for (available, detail, remedy, _), names in groups.items()
    ]


def _machine() -> list[Capability]:
    load, cores = os.getloadavg()[0], hardware.num_cores()
    quiet = load <= BUSY_LOAD * cores
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    remedy = "" if quiet else "let other work end before measuring"
    return [
        Capability(what="processor", available=True, detail=f"{hardware.hardware_name()}, {memory:.0f} GB of memory"),
        Capability(what="system", available=True, detail=platform.platform()),
        Capability(what="quiet", available=quiet, detail=f"load average {load:.1f} on {cores} cores", remedy=remedy),
    ]


def _software() -> list[Capability]:
    import torch

    cuda = torch.cuda.is_available()
    if cuda:
        detail = f"CUDA {torch.version.cuda}: {', '.join(_gpu_names())}"
        remedy = ""
    elif torch.version.cuda is None:
        detail = "this torch is built without CUDA"
        remedy = "on a machine with an NVIDIA GPU: pip install --force-reinstall torch (from PyPI, not from the CPU index)"
    else:
        detail = f"torch is built for CUDA {torch.version.cuda}, but sees no device"
        remedy = "install an NVIDIA driver for that CUDA, and look at CUDA_VISIBLE_DEVICES"
    gcc = shutil.which("gcc")
    return [
        Capability(what="Python", available=True, detail=f"{platform.python_version()}, {sys.executable}"),
        Capability(what="effbench", available=True, detail=__version__),
        Capability(what="torch", available=True, detail=f"{torch.__version__}, {torch.get_num_threads()} threads"),
        Capability(what="measuring on a GPU", available=cuda, detail=detail, remedy=remedy),
        Capability(
            what="C compiler", available=gcc is not None, detail=gcc or "torch.compile and some tests need gcc",
            remedy="" if gcc else "apt-get install gcc, or your system's like",
        ),
        _expert_layers(),
    ]  # fmt: skip


def _expert_layers() -> Capability:
    """Whether mixture-of-experts layers run on the C of `effbench_kernels` here; the first look compiles it."""
    from effbench_kernels import native

    why_not = native.why_not()
    detail = f"they run on torch alone, slower: {why_not}" if why_not else "compiled for this processor"
    remedy = "install gcc and run this again; effbench_kernels/native.py says what else it needs" if why_not else ""
    return Capability(what="expert layers in C", available=not why_not, detail=detail, remedy=remedy)


def _probe(name: str) -> list[Capability]:
    try:
        return registry.probe(name).capabilities()
    except EffbenchError as error:
        return [Capability(what=f"probe {name}", available=False, detail=str(error), remedy="reinstall: pip install -e .")]


def _peaks() -> list[Capability]:
    """Measured and datasheet peaks of the CPU, and of the GPUs torch can use."""
    found = [_calibrated(hardware.hardware_name(), hardware.num_cores())]
    for name in dict.fromkeys(_gpu_names()):
        row = hardware.device(name)
        detail = f"{row.name}: {row.source}" if row else "not in hardware.py, and a peak is never guessed"
        remedy = "" if row else "add a row to effbench/hardware.py with its source"
        found.append(_calibrated(name, None))
        found.append(Capability(what=f"datasheet of {name}", available=row is not None, detail=detail, remedy=remedy))
    return found


def _calibrated(name: str, threads: int | None) -> Capability:
    what, remedy = f"calibration of {name}", "effbench doctor --calibrate, on a quiet machine"
    saved = hardware.calibration(hardware.calibration_key(name, threads))
    if saved is None:
        return Capability(what=what, available=False, detail="MFU and share of bandwidth stay empty", remedy=remedy)
    rates = " · ".join(f"{dtype} {rate / 1e12:.3g} TFLOP/s" for dtype, rate in saved.matrix_flops_per_s.items())
    detail = f"copy {saved.copy_bytes_per_s / 1e9:.3g} GB/s · {rates} · {saved.measured_at}"
    spread = max((about.get("relative_iqr", 0.0) for about in saved.details.values() if isinstance(about, dict)), default=0.0)
    if spread > NOISY_IQR:
        return Capability(
            what=what, available=False, detail=f"{detail} · disturbed: repeats spread by {spread:.0%}", remedy=remedy
        )
    return Capability(what=what, available=True, detail=detail)


def _extras() -> list[Capability]:
    """What the extras of pyproject.toml would install, read from our own metadata; and what no extra can install."""
    from packaging.requirements import Requirement

    found = []
    for line in metadata.requires(registry.HOME) or ():
        wanted = Requirement(line)
        extra = next((e for e in PURPOSES if wanted.marker and wanted.marker.evaluate({"extra": e})), None)
        if extra is None or wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
            continue
        version, remedy = _version(wanted.name), f"pip install 'effbench[{extra}]'"
        fits = version is not None and wanted.specifier.contains(version, prereleases=True)
        detail = PURPOSES[extra] if fits or version is None else f"{PURPOSES[extra]}; needs {wanted.specifier}"
        what = f"{wanted.name} {version or ''}".strip()
        found.append(Capability(what=what, available=fits, detail=detail, remedy="" if fits else remedy))
    for name, purpose, remedy in UNBUNDLED:
        version = _version(name)
        what = f"{name} {version or ''}".strip()
        found.append(Capability(what=what, available=version is not None, detail=purpose, remedy="" if version else remedy))
    return found


def _plugins() -> list[Capability]:
    """Names that other packages provide, and whether they can be loaded."""
    found = []
    for kind in registry.KINDS:
        try:
            foreign = [entry for entry in registry.entries(kind).values() if entry.distribution != registry.HOME]
        except EffbenchError as error:  # two packages provide one name
            found.append(Capability(what=f"{kind}s", available=False, detail=str(error), remedy="uninstall one of them"))
            continue
        for entry in foreign:
            what, remedy = f"{kind} {entry.name}", f"pip install --upgrade {entry.distribution}"
            try:
                registry.load(kind, entry.name)
            except EffbenchError as error:
                found.append(Capability(what=what, available=False, detail=str(error), remedy=remedy))
            else:
                found.append(Capability(what=what, available=True, detail=f"{entry.distribution} {entry.version}"))
    return found


def _text() -> Capability:
    try:
        from effbench.models import text

        content = text.read_text(text.BUILTIN)
    except (EffbenchError, ImportError) as error:
        return Capability(what="built-in text", available=False, detail=str(error), remedy="see the message")
    total = sum(len(part) for part in content.parts.values())
    return Capability(
        what="built-in text",
        available=True,
        detail=f"sympy {_version('sympy')}, {total / 1e6:.1f} MB, digest {content.digest[:12]}",
    )


def _places(results: Path) -> list[Capability]:
    found = []
    for what, place in (("results can be written", results), ("cache can be written", hardware.cache_dir())):
        nearest = next((p for p in (place.absolute(), *place.absolute().parents) if p.exists()), Path("/"))
        good = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
        free = shutil.disk_usage(nearest).free / 1e9
        remedy = f"allow writing to {nearest}, or choose another place" if not good else ""
        found.append(Capability(what=what, available=good, detail=f"{place}, {free:.0f} GB free", remedy=remedy))
    return found


def _gpu_names() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        module = distribution.replace("-", "_")
        return "" if util.find_spec(module) else None
