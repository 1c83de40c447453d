"""Read a suite, check it, and say where each fault is: file, line, key, what was given, what would work.

A suite is data only (YAML 1.2). Its shape:

    name: quick
    protocol: quick                       # smoke, quick or publish
    seed: 1
    text: builtin                         # or a file or folder, or hub:DATASET
    cases:
      - workload: generate
        params: {batch_size: 2, prompt_tokens: 64, new_tokens: 32}
        model: tiny-llama                 # or a list: the sweep is models × techniques
        weights: random                   # random, trained, path or hub; the last two take `location`
        techniques:                       # a list of stacks; a stack is a name, {name: {parameters}} or a list of those
          - mha
          - gqa: {groups: 2}
          - [mqa, bf16]
        baseline: [mha]                   # optional: compare every stack here with this one

Names of models, and whether a technique fits them, are resolved by `planning.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from effbench import registry
from effbench.errors import EffbenchError, SuiteError, did_you_mean
from effbench.protocol import PROTOCOLS
from effbench.technique import AXES

MAX_SUITE_BYTES = 1 << 20
MAX_CASES = 10_000
MAX_VALUES, MAX_DEPTH = 200_000, 20


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _stack(value: Any) -> Any:
    """A stack as written (name, mapping or list of these) as a list of (name, parameters)."""
    items = value if isinstance(value, list) else [value]
    pairs: list[tuple[str, dict[str, Any]]] = []
    for item in items:
        if isinstance(item, str):
            pairs.append((str(item), {}))
        elif isinstance(item, Mapping) and len(item) == 1:
            (name, params) = next(iter(item.items()))
            if not isinstance(name, str) or not (params is None or isinstance(params, Mapping)):
                raise ValueError("parameters are a mapping, for example {gqa: {groups: 2}}")
            pairs.append((str(name), dict(params or {})))
        else:
            raise ValueError("a technique is a name or {name: {parameter: value}}")
    return tuple(pairs)


Stack = Annotated[tuple[tuple[str, dict[str, Any]], ...], BeforeValidator(_stack)]


def _names(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else (value,)


class Entry(_Strict):
    """One entry of `cases`: a sweep of models × stacks under one workload."""

    workload: str
    params: dict[str, Any] = Field(default_factory=dict)
    model: Annotated[tuple[str, ...], BeforeValidator(_names)]
    weights: Literal["random", "trained", "path", "hub"] = "random"
    location: str | None = None
    techniques: Annotated[tuple[Stack, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)] = ((),)
    baseline: Stack | None = None
    threads: Annotated[int, Field(ge=1, le=4096)] | None = None  # of each process
    nproc: Annotated[int, Field(ge=1, le=4096)] = 1
    time_limit_s: Annotated[float, Field(gt=0, le=7 * 86400, strict=False)] | None = None
    environment: dict[str, str] = Field(default_factory=dict)


class SuiteFile(_Strict):
    """A whole suite, checked."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    summary: str = ""
    protocol: str = "quick"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1
    text: str = "builtin"
    cases: Annotated[tuple[Entry, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v), Field(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A checked suite and where everything in it was written."""

    path: Path
    file: SuiteFile
    raw: Any

    def where(self, *keys: str | int) -> str:
        """'file:line: key' of the deepest of `keys` that was written."""
        return _where(self.path, self.raw, keys)

    def stacks(self) -> Iterator[tuple[int, Entry, str, Stack]]:
        """(index of the entry, entry, model, stack) for every case of the sweep."""
        for index, entry in enumerate(self.file.cases):
            for model in entry.model:
                for stack in entry.techniques:
                    yield index, entry, model, stack


def read_suite(path: Path | str) -> Suite:
    """Read and check a suite file. Raises SuiteError with one line per fault."""
    path = Path(path)
    raw = _parse(path)
    if not isinstance(raw, Mapping):
        raise SuiteError([f"{path}:1: a suite is a mapping with `name` and `cases`, not {_kind(raw)}."])
    try:
        file = SuiteFile.model_validate(_plain(path, raw))
    except ValidationError as error:
        raise SuiteError([_explain(path, raw, fault) for fault in error.errors()]) from None
    suite = Suite(path=path, file=file, raw=raw)
    problems = list(_check(suite))
    if problems:
        raise SuiteError(problems)
    return suite


def _parse(path: Path) -> Any:
    """The YAML document with positions, or SuiteError."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        data = path.read_bytes()
        text = data.decode("utf-8")
    except FileNotFoundError:
        raise SuiteError([f"{path}: there is no such suite.{_suites_nearby(path)}"]) from None
    except UnicodeDecodeError as error:
        raise SuiteError([f"{path}: byte {error.start} is not UTF-8 text; a suite is a YAML file."]) from None
    except OSError as error:
        raise SuiteError([f"{path}: cannot be read: {error.strerror}."]) from None
    if len(data) > MAX_SUITE_BYTES:
        raise SuiteError([f"{path}: {len(data):,} bytes; a suite holds at most {MAX_SUITE_BYTES:,}."])
    reader = YAML(typ="rt", pure=True)
    reader.version = (1, 2)
    reader.allow_duplicate_keys = False
    try:
        return reader.load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise SuiteError([f"{path}:{line}: not YAML 1.2: {_one_line(error.problem or error.context)}."]) from None
    except (YAMLError, ValueError, RecursionError, KeyError, TypeError, AttributeError, IndexError, AssertionError) as error:
        # The parser raises bare Python errors on some malformed documents (tags, merge keys, dates, deep nesting).
        raise SuiteError([f"{path}:1: not YAML 1.2: {_one_line(str(error)) or type(error).__name__}."]) from None


def _plain(path: Path, document: Any) -> Any:
    """The document as plain Python values, so that nothing of the parser's types reaches a record. Raises SuiteError."""
    left = MAX_VALUES

    def plain(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1  # aliases of aliases can make a short file enormous
        if depth > MAX_DEPTH or left < 0:
            raise SuiteError([f"{path}:1: a suite is at most {MAX_DEPTH} levels deep and holds at most {MAX_VALUES:,} values."])
        if isinstance(value, Mapping):
            return {str(k): plain(v, depth + 1) for k, v in value.items()}
        if isinstance(value, list):
            return [plain(v, depth + 1) for v in value]
        for kind in (bool, int, float, str):
            if isinstance(value, kind):
                return kind(value)
        return value if value is None else str(value)

    return plain(document, 0)


def _check(suite: Suite) -> Iterator[str]:
    """Faults that need the registry: unknown names, wrong parameters, two techniques on one axis."""
    if suite.file.protocol not in PROTOCOLS:
        yield f"{suite.where('protocol')}: unknown protocol {suite.file.protocol!r}.{_known(suite.file.protocol, PROTOCOLS)}"
    if sum(1 for _ in suite.stacks()) > MAX_CASES:
        yield f"{suite.where('cases')}: more than {MAX_CASES:,} cases; split the suite."
        return
    for index, entry in enumerate(suite.file.cases):
        place: tuple[str | int, ...] = ("cases", index)
        names = registry.entries("workload")
        if entry.workload not in names:
            yield f"{suite.where(*place, 'workload')}: unknown workload {entry.workload!r}.{_known(entry.workload, names)}"
        else:
            yield from _check_params(suite, (*place, "params"), registry.workload(entry.workload).Params, entry.params)
        if entry.weights in ("path", "hub") and not entry.location:
            yield f"{suite.where(*place, 'weights')}: weights {entry.weights!r} need `location` (a folder, or a repository)."
        for number, stack in enumerate(entry.techniques):
            yield from _check_stack(suite, (*place, "techniques", number), stack)
        if entry.baseline is not None:
            yield from _check_stack(suite, (*place, "baseline"), entry.baseline)


def _check_stack(suite: Suite, place: tuple[str | int, ...], stack: Stack) -> Iterator[str]:
    names = registry.entries("technique")
    axes: dict[str, str] = {}
    for name, params in stack:
        if name not in names:
            yield f"{suite.where(*place)}: unknown technique {name!r}.{_known(name, names)}"
            continue
        try:
            technique = registry.technique(name)
        except EffbenchError as error:
            yield f"{suite.where(*place)}: {error}"
            continue
        if technique.axis in axes:
            both = f"{axes[technique.axis]!r} and {name!r}"
            yield f"{suite.where(*place)}: {both} are both of axis {technique.axis}; a stack has one technique per axis."
        axes[technique.axis] = name
        yield from _check_params(suite, place, technique.Params, params, name)


def _check_params(
    suite: Suite, place: tuple[str | int, ...], model: type[BaseModel], params: Mapping[str, Any], name: str = ""
) -> Iterator[str]:
    try:
        model.model_validate(dict(params))
    except ValidationError as error:
        for fault in error.errors():
            key = str(fault["loc"][0]) if fault["loc"] else ""
            deeper = (*place, name, key) if name else (*place, key)
            yield f"{suite.where(*deeper)}: {_fault(fault, model)}"


def filled(name: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """A technique's parameters with every default filled in, as JSON values."""
    return registry.technique(name).Params.model_validate(dict(params)).model_dump(mode="json")


def axis_order(stack: Stack) -> Stack:
    """The stack in axis order."""
    return tuple(sorted(stack, key=lambda pair: AXES.index(registry.technique(pair[0]).axis)))


def _explain(path: Path, raw: Any, fault: Any) -> str:
    keys = tuple(k for k in fault["loc"] if isinstance(k, int | str) and not str(k).startswith("function-"))
    model: type[BaseModel] = Entry if keys[:1] == ("cases",) and len(keys) > 1 else SuiteFile
    return f"{_where(path, raw, keys)}: {_fault(fault, model)}"


def _fault(fault: Any, model: type[BaseModel]) -> str:
    """One pydantic fault in our words: what was given and what would work."""
    key = str(fault["loc"][-1]) if fault["loc"] else ""
    if fault["type"] == "extra_forbidden":
        return f"unknown key {key!r}.{_known(key, model.model_fields)}"
    if fault["type"] == "missing":
        return f"the key {key!r} is missing."
    return f"{_one_line(fault['msg'])}; given: {_one_line(repr(fault['input']))[:80]}."


def _where(path: Path, raw: Any, keys: tuple[str | int, ...]) -> str:
    """'file:line: key.key' of the deepest key that can be found in the document."""
    line, node, named = 0, raw, []
    for key in keys:
        if key == "":
            continue
        position = _position(node, key)
        if position is None:
            if isinstance(key, str):
                named.append(key)
            break
        line, node = position, node[key]
        named.append(f"[{key}]" if isinstance(key, int) else key)
    dotted = ".".join(named).replace(".[", "[")
    return f"{path}:{line + 1}: {dotted}" if dotted else f"{path}:{line + 1}"


def _position(node: Any, key: str | int) -> int | None:
    """Zero-based line of `key` in a parsed mapping or sequence, or None."""
    if not (isinstance(node, Mapping | list) and hasattr(node, "lc")):
        return None
    present = key in node if isinstance(node, Mapping) else isinstance(key, int) and key < len(node)
    if not present:
        return None
    data = node.lc.data or {}
    line: int = data[key][0] if key in data else node.lc.line
    return line


def _known(given: Any, known: Any) -> str:
    names = sorted(map(str, known))
    return f"{did_you_mean(str(given), names)} Known: {', '.join(names)}."


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__.lower().removeprefix('commented').replace('seq', 'list')}"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split()).rstrip(".")


def _suites_nearby(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("suites")
    found = sorted(p.name for p in folder.glob("*.yaml"))[:8] if folder.is_dir() else []
    return f"{did_you_mean(path.name, found)} In {folder}: {', '.join(found)}." if found else ""
