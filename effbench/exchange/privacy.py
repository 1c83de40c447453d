"""What is taken out of records before they leave a machine: names of user and host, paths, and identifiers of devices.

What identifies a case is never changed, because the row would then be that of another case: of its spec only the places of
weights and text are taken out, which no identity counts. Where a path or such stands in the rest of the spec, the bundle is
not written unless private parts are kept on purpose. Numbers and traces stay as they are.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import effbench
from effbench.schema import CaseRecord, Launch, Spec, Trace, canonical_json

PATH, USER, HOST, DEVICE = "path", "user name", "host name", "device identifier"
REMOVED = "removed"  # what stands for the place of weights or text
# Names that say nothing of a person or a machine, and stand in texts that mean something else.
COMMON_NAMES = frozenset(
    {"root", "user", "admin", "ubuntu", "debian", "runner", "nobody", "localhost", "python", "linux", "cuda", "gpu", "cpu"}
    | {
        "host",
        "server",
        "node",
        "worker",
        "compute",
        "desktop",
        "laptop",
        "workstation",
        "box",
        "home",
        "test",
        "build",
        "model",
    }
    | {"memory", "process", "bytes", "tokens", "text", "training", "quality"}
)
MACHINE = ("source_digest", "python", "packages", "device_name", "driver", "power_limit_w", "cpu", "cores")  # make env_id
DEVICE_KEYS = re.compile(r"(.*_)?(uuid|guid|serial|serial_number|serial_no|pci_bus_id|bus_id|mac|mac_address|inforom)")
PERSON_KEYS = re.compile(r"(.*_)?(user|username|user_name|login|host|hostname|host_name|fqdn|node_name)")
_UUID = r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}"
_DEVICE = re.compile(rf"\b(?:(?:GPU|MIG)-)?{_UUID}\b|\b[0-9a-fA-F]{{4,8}}:[0-9a-fA-F]{{2}}:[0-9a-fA-F]{{2}}\.[0-7]\b")
_SYSTEM = ("/proc/", "/sys/", "/dev/")  # sensors: part of what a number means, the same on every machine
_QUOTED = re.compile(r"""(?P<mark>["'])(?P<path>(?:~|file://|/|[A-Za-z]:[\\/]|\\\\)[^"'\n]*)(?P=mark)""")
_BARE = re.compile(
    r"""(?<![\w.)\]}>/~\\])(?:file://|~[\w-]*/|/(?=[^\s/])|[A-Za-z]:[\\/](?=\w)|\\\\(?=\w))[^\s"'`<>|,;()\[\]{}]*"""
)
_INSTALLED = re.compile(r".*/(?:site-packages|dist-packages|python3\.\d+)/(?P<rest>.+)", re.DOTALL)


@dataclass
class Scrubber:
    """Takes private parts out of texts, and counts them by kind with an example of each."""

    names: Mapping[str, str]  # name → its kind
    folders: tuple[str, ...] = ()  # whose paths are taken out first, since they may have spaces
    kept: frozenset[str] = frozenset()  # texts that say which hardware this is, whatever they share with a name
    removed: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    _clean: set[str] = field(default_factory=set)  # texts that have nothing: most texts come a thousand times

    @classmethod
    def of_this_machine(cls, *folders: Path) -> Scrubber:
        """What is private here; `folders` are the results and the like."""
        names: dict[str, str] = {}
        for user in (_user(), Path.home().name, os.environ.get("USER", ""), os.environ.get("LOGNAME", "")):
            names[user] = USER
        for host in (socket.gethostname(), os.uname().nodename):
            names |= {host: HOST, host.partition(".")[0]: HOST}
        own = Path(effbench.__file__).parent.parent
        places = (own, Path.home(), Path.cwd(), Path(tempfile.gettempdir()), *(folder.absolute() for folder in folders))
        known = {str(form) for place in places for form in (place, place.resolve()) if len(form.parts) > 1}
        wanted = {name: kind for name, kind in names.items() if len(name) > 2 and name.lower() not in COMMON_NAMES}
        return cls(names=wanted, folders=tuple(sorted(known, key=len, reverse=True)))

    def text(self, text: str) -> str:
        """`text` without paths, names and device identifiers."""
        if text in self._clean or text in self.kept:
            return text
        found = self._scrubbed(text)
        if found == text:
            self._clean.add(text)
        return found

    def _scrubbed(self, text: str) -> str:
        for folder in self.folders:
            text = re.sub(rf"{re.escape(folder)}(?![\w.-])(?:/[^\s\"'<>|,;()\[\]{{}}]*)?", self._path, text)
        text = _QUOTED.sub(lambda found: f"{found['mark']}{self._shortened(found['path'])}{found['mark']}", text)
        text = _BARE.sub(self._path, text)
        text = _DEVICE.sub(lambda found: self.count(DEVICE, found[0]), text)
        for name, kind in self.names.items():
            text = _whole_word(name).sub(lambda found, kind=kind: self.count(kind, found[0]), text)  # type: ignore[misc]
        return text

    def value(self, value: Any) -> Any:
        """The same for every text of a JSON value, and nothing for a key that names a device, a user or a host."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.text(str(key)): self.member(str(key), inside) for key, inside in value.items()}
        return [self.value(inside) for inside in value] if isinstance(value, list | tuple) else value

    def found_in(self, text: str) -> list[str]:
        """The kinds of private parts that `text` has; counts nothing."""
        probe = Scrubber(names=self.names, folders=self.folders)
        probe.text(text)
        return sorted(probe.removed)

    def member(self, key: str, value: Any) -> Any:
        kinds = ((DEVICE, DEVICE_KEYS), (HOST, PERSON_KEYS))
        for kind, keys in kinds:
            if keys.fullmatch(key.lower()) and isinstance(value, str) and value:
                return self.count(kind, value)
        return self.value(value)

    def _path(self, found: re.Match[str]) -> str:
        return self._shortened(found[0])

    def _shortened(self, path: str) -> str:
        """Of an installed file the part inside the library, which is the same everywhere; of another nothing."""
        if path.startswith(_SYSTEM) or path == "/proc":
            return path
        installed = _INSTALLED.fullmatch(path)
        return f"{self.count(PATH, path)}/{installed['rest']}" if installed else self.count(PATH, path)

    def count(self, kind: str, what: str) -> str:
        self.removed[kind] += 1
        self.examples.setdefault(kind, what)
        return f"<{kind}>"


def case(record: CaseRecord, scrub: Scrubber) -> CaseRecord:
    """The row as it may leave the machine; its identity is the same."""
    metrics = tuple(replace(m, source=scrub.text(m.source), reasons=_texts(m.reasons, scrub)) for m in record.metrics)
    spec = spec_text(record.spec, scrub)
    return replace(record, reason=scrub.text(record.reason), provenance=_provenance(record, scrub), metrics=metrics, spec=spec)


def launch(record: Launch, scrub: Scrubber) -> Launch:
    """The launch as it may leave the machine; its spec_id is the same."""
    return replace(
        record,
        reason=scrub.text(record.reason),
        detail=scrub.text(record.detail),
        provenance=_provenance(record, scrub),
        spec=spec(record.spec, scrub),
        facts=scrub.value(record.facts),
        reasons=_texts(record.reasons, scrub),
        metrics=tuple(replace(m, source=scrub.text(m.source), reasons=_texts(m.reasons, scrub)) for m in record.metrics),
    )


def trace(record: Trace, scrub: Scrubber) -> Trace:
    """The raw series; only the names of their sources are looked at."""
    return Trace(series=tuple(replace(series, source=scrub.text(series.source)) for series in record.series))


def spec(found: Spec, scrub: Scrubber) -> Spec:
    """The spec without the places of weights and text. A repository or a data set of a hub is public and stays."""
    place, text = found.model.location, found.text
    if found.model.weights == "path" and place not in (None, REMOVED):
        scrub.count(PATH, str(place))
        found = replace(found, model=replace(found.model, location=REMOVED))
    if text not in ("builtin", REMOVED) and not text.startswith("hub:"):
        scrub.count(PATH, text)
        found = replace(found, text=REMOVED)
    return found


def spec_text(text: str, scrub: Scrubber) -> str:
    """The same for a spec that is JSON text; text that is none is left for the check of the bundle to refuse."""
    try:
        return canonical_json(spec(Spec.from_json(json.loads(text)), scrub).to_json())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return text


def kept_in_spec(found: Spec, scrub: Scrubber) -> list[tuple[str, str]]:
    """The private parts that cannot be taken out without making it another case: the kind of each, and a sentence."""
    plain = spec(found, Scrubber(names={})).to_json()
    return [(kind, f"{place} = {text[:100]!r} has a {kind}") for place, text in _leaves(plain) for kind in scrub.found_in(text)]


def machine_texts(records: Iterable[CaseRecord | Launch]) -> set[str]:
    """What records say of the hardware, in words that other parts repeat and that identify the environment."""
    return {str(text) for one in records for text in (one.hardware, *map(one.provenance.get, MACHINE)) if text}


def _leaves(value: Any, place: str = "spec") -> Iterable[tuple[str, str]]:
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping):
        for key, inside in value.items():
            yield from _leaves(inside, f"{place}.{key}")
    elif isinstance(value, list | tuple):
        for index, inside in enumerate(value):
            yield from _leaves(inside, f"{place}[{index}]")


def _provenance(record: CaseRecord | Launch, scrub: Scrubber) -> dict[str, Any]:
    """Each text but those that env_id is made of; those that hold JSON are looked at inside."""
    found = {}
    for key, value in record.provenance.items():
        if key in MACHINE:
            found[key] = value
            continue
        try:
            inside = json.loads(value) if isinstance(value, str) and value[:1] in "[{" else None
        except (ValueError, RecursionError):
            inside = None
        clean = scrub.value(inside)
        found[key] = (
            scrub.member(key, value) if inside is None else value if clean == inside else json.dumps(clean, sort_keys=True)
        )
    return found


def _texts(texts: Iterable[str], scrub: Scrubber) -> tuple[str, ...]:
    return tuple(scrub.text(text) for text in texts)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name
        return ""


def _whole_word(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(name)}(?!\w)", re.IGNORECASE)
