"""Names of techniques, workloads and probes without importing them, and loading one by name.

Built-ins and plugins use the same hook: an entry point in the group `effbench.techniques`, `effbench.workloads` or
`effbench.probes`, "name = module:Class". A built-in name is reserved; when two packages provide one name both are named.
"""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from effbench.errors import EffbenchError, NameCollision, UnknownName

if TYPE_CHECKING:
    from effbench.probe import Probe
    from effbench.technique import Technique
    from effbench.workload import Workload

Kind = Literal["technique", "workload", "probe"]
KINDS: tuple[Kind, ...] = ("technique", "workload", "probe")
HOME = "effbench"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One registered name: where its class lives and which distribution brings it."""

    kind: Kind
    name: str
    target: str  # module:Class
    distribution: str
    version: str

    @property
    def identity(self) -> str:
        """distribution:name@version+source digest (12 hex digits of the module file's SHA-256)."""
        return f"{self.distribution}:{self.name}@{self.version}+{_source_digest(self.target.partition(':')[0])}"


@cache
def entries(kind: Kind) -> dict[str, Entry]:
    """Every registered name of a kind, sorted. Raises NameCollision."""
    found: dict[str, Entry] = {}
    for point in metadata.entry_points(group=f"effbench.{kind}s"):
        brought_by = point.dist
        distribution, version = (brought_by.name, brought_by.version) if brought_by else ("unknown", "0")
        entry = Entry(kind=kind, name=point.name, target=point.value, distribution=distribution, version=version)
        other = found.get(entry.name)
        if other and other.distribution != distribution:
            reserved = " The name is built in and reserved." if HOME in (other.distribution, distribution) else ""
            packages = " and ".join(sorted((other.distribution, distribution)))
            raise NameCollision(f"The {kind} {entry.name!r} is provided by {packages}.{reserved} Uninstall or rename one.")
        found[entry.name] = entry
    return dict(sorted(found.items()))


def find(kind: Kind, name: str) -> Entry:
    """The entry of a name. Raises UnknownName with near misses."""
    known = entries(kind)
    if name not in known:
        raise UnknownName(kind, name, known)
    return known[name]


@cache
def load(kind: Kind, name: str) -> Any:
    """Import the class behind a name. Raises UnknownName, or EffbenchError when the import fails or is not of the kind."""
    entry = find(kind, name)
    module, _, attribute = entry.target.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise EffbenchError(
            f"The {kind} {name!r} of {entry.distribution} cannot be imported ({entry.target}): {error}"
        ) from error
    base = getattr(importlib.import_module(f"effbench.{kind}"), kind.capitalize())
    if not (isinstance(found, type) and issubclass(found, base)):
        raise EffbenchError(f"The {kind} {name!r} of {entry.distribution} ({entry.target}) is no subclass of {base.__name__}.")
    own: Any = found
    if own.name != name:
        raise EffbenchError(
            f"The {kind} registered as {name!r} by {entry.distribution} calls itself {own.name!r}; use one name."
        )
    return own


def technique(name: str) -> type[Technique]:
    """The technique class of this name."""
    return cast("type[Technique]", load("technique", name))


def workload(name: str) -> type[Workload]:
    """The workload class of this name."""
    return cast("type[Workload]", load("workload", name))


def probe(name: str) -> type[Probe]:
    """The probe class of this name."""
    return cast("type[Probe]", load("probe", name))


@cache
def _source_digest(module: str) -> str:
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:
        return "missing"
    if spec is None or not spec.origin or not Path(spec.origin).is_file():
        return "missing"
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()[:12]
