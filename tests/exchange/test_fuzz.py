"""Mutations of a good bundle, from its bytes to its records: each is refused with a reason, or reads as records. Nothing else.

bytes of the file ┬ members, signed again ┬ bytes of a table ┬ values of a table ┬ JSON of manifest, spec, windows, facts
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from effbench.errors import BundleError
from effbench.exchange.bundle import contents_of_bytes, packed
from effbench.exchange.contents import Contents
from effbench.exchange.verify import verify
from tests.exchange import fuzzing
from tests.exchange.bundles import Members, make_good, members_of, parquet, signed, table_of, with_rows
from tests.records import make_metrics

IN_CI, AT_NIGHT = 2_000, 100_000
QUIET = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
TEXTS = st.text(max_size=30) | st.sampled_from(
    [
        "",
        "<script>",
        "../../x",
        "\0",
        "!!python/object:os.system",
        "{}",
        "[",
        "null",
        "1e999",
        "a" * 5000,
        "\u202e",
        "🦀",
        "%s%n",
    ]
)
NUMBERS = st.integers(-(2**63), 2**63 - 1) | st.floats() | st.booleans() | st.none()
JSONS = st.recursive(
    NUMBERS | TEXTS, lambda inside: st.lists(inside, max_size=4) | st.dictionaries(TEXTS, inside, max_size=4), max_leaves=8
)

Outcome = Contents | BundleError


def outcome(data: bytes) -> str:
    """The rule that refuses these bytes, '' where they are read."""
    found = read(data)
    return found.check if isinstance(found, BundleError) else ""


def read(data: bytes) -> Outcome:
    """What must hold for any bytes."""
    found: Outcome
    try:
        found = contents_of_bytes(data)
    except BundleError as refusal:
        found = refusal
    if isinstance(found, BundleError):
        assert found.check
        assert found.message
    else:
        assert found.cases
        assert found.launches.keys() == found.traces.keys()
    return found


@st.composite
def edits(draw: st.DrawFn, data: bytes) -> bytes:
    """A few places overwritten, cut out, doubled or filled in."""
    found = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(found) - 1, 0)))
        length = draw(st.integers(1, 12))
        kind = draw(st.sampled_from(["flip", "write", "cut", "double", "insert", "end"]))
        if kind == "flip" and found:
            found[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "write":
            found[at : at + length] = draw(st.binary(min_size=length, max_size=length))
        elif kind == "cut":
            del found[at : at + length]
        elif kind == "double":
            found[at:at] = found[at : at + length]
        elif kind == "insert":
            found[at:at] = draw(st.binary(max_size=12))
        else:
            del found[at:]
    return bytes(found)


@st.composite
def other_values(draw: st.DrawFn, members: Members) -> bytes:
    """A table of the same columns with a value of another hand in it."""
    name = draw(st.sampled_from(["runs.parquet", "launches.parquet", "traces/launch-0-0.parquet"]))

    def change(rows: list[dict[str, Any]]) -> None:
        row = draw(st.sampled_from(rows))
        column = draw(st.sampled_from(sorted(row)))
        row[column] = other(draw, row[column])

    try:
        return signed(with_rows(members, name, change))
    except (pa.ArrowException, TypeError, ValueError, OverflowError):  # a value that the column cannot hold
        return signed(members)


def other(draw: st.DrawFn, value: Any) -> Any:
    """A value of the same type, so that the table can hold it, or none."""
    if value is None or draw(st.integers(0, 9)) == 0:
        return None
    if isinstance(value, str):
        return draw(TEXTS | JSONS.map(as_json))
    if isinstance(value, list):
        changed = [other(draw, inside) for inside in value[:3]]
        return draw(st.sampled_from([[], value * 2, changed, [*value, None]]))
    if isinstance(value, dict):
        keys = draw(st.lists(st.sampled_from(sorted(value)), max_size=3))
        return {**value, **{key: other(draw, value[key]) for key in keys}}
    return draw(st.floats()) if isinstance(value, float) else draw(st.integers(-(2**63), 2**63 - 1))


def as_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


@st.composite
def other_json(draw: st.DrawFn, members: Members) -> bytes:
    """JSON of a record with another value somewhere inside, canonical again where that can be."""
    name, column = draw(
        st.sampled_from([("runs.parquet", "spec"), *[("launches.parquet", c) for c in ("spec", "windows", "facts")]])
    )

    def change(rows: list[dict[str, Any]]) -> None:
        value = json.loads(rows[0][column])
        rows[0][column] = as_json(inside(draw, value))

    try:
        return signed(with_rows(members, name, change))
    except (UnicodeEncodeError, pa.ArrowException):
        return signed(members)


def inside(draw: st.DrawFn, value: Any) -> Any:
    """`value` with one part of it replaced, added or gone."""
    if isinstance(value, dict) and value and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(value)))
        if draw(st.integers(0, 5)) == 0:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: inside(draw, value[key])}
    if isinstance(value, list) and value and draw(st.integers(0, 3)):
        return [*value[:-1], inside(draw, value[-1])]
    return draw(JSONS)


@st.composite
def other_members(draw: st.DrawFn, members: Members) -> bytes:
    """Members gone, exchanged or added, the manifest right about them or not."""
    found = dict(members)
    names = sorted(found)
    for _ in range(draw(st.integers(1, 3))):
        one, two = draw(st.sampled_from(names)), draw(st.sampled_from(names))
        kind = draw(st.sampled_from(["gone", "exchanged", "copied", "added", "edited"]))
        if kind == "gone":
            found.pop(one, None)
        elif kind == "exchanged" and one in found and two in found:
            found[one], found[two] = found[two], found[one]
        elif kind == "copied" and one in found:
            found[two] = found[one]
        elif kind == "added":
            found["plugin/" + draw(st.from_regex(r"[a-z./~_A-Z-]{1,20}", fullmatch=True))] = draw(st.binary(max_size=20))
        elif kind == "edited" and one in found:
            found[one] = draw(edits(found[one]))
    try:
        return signed(found) if draw(st.booleans()) else packed(found)
    except (KeyError, ValueError, TypeError, AttributeError):  # no manifest is left to sign
        return packed(found)


@st.composite
def other_manifest(draw: st.DrawFn, members: Members) -> bytes:
    value = inside(draw, json.loads(members["manifest.json"]))
    text = as_json(value) if draw(st.booleans()) else json.dumps(value)
    return packed({**members, "manifest.json": text.encode("utf-8", "surrogatepass")})


@st.composite
def edited_table(draw: st.DrawFn, members: Members) -> bytes:
    """Bytes of a table changed and signed again, with page checksums and without."""
    name = draw(st.sampled_from(["runs.parquet", "launches.parquet", "traces/launch-0-0.parquet"]))
    data = (
        members[name]
        if draw(st.booleans())
        else parquet(table_of(members[name]), compression=draw(st.sampled_from(["none", "zstd"])))
    )
    length = int.from_bytes(data[-8:-4], "little")
    if draw(st.booleans()):  # the footer, where claims are
        return signed({**members, name: data[: -8 - length] + draw(edits(data[-8 - length :]))})
    return signed({**members, name: draw(edits(data))})


def hostile(good: bytes, members: Members) -> st.SearchStrategy[bytes]:
    return st.one_of(
        edits(good),
        other_members(members),
        other_manifest(members),
        edited_table(members),
        other_values(members),
        other_json(members),
    )


def with_wrong_histogram(table: bytes) -> bytes:
    """A parquet file whose first histogram of levels has another length than the column's levels (one bit of the footer)."""
    footer_at = len(table) - 8 - int.from_bytes(table[-8:-4], "little")
    of_levels = table.index(b"\x19\x06\x19\x36", footer_at)  # an empty list of i64, and one of three
    return table[:of_levels] + b"\x09" + table[of_levels + 1 :]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small bundle: what takes time is read 2,000 times."""
    return make_good(tmp_path_factory.mktemp("small"), blocks=1, steps=8, metrics=make_metrics()[:6])


@pytest.fixture(scope="module")
def members(good: bytes) -> Members:
    return members_of(good)


def fuzz(count: int, good: bytes, folder: Path) -> Counter[str]:
    """Outcomes of `count` inputs: the rule that refused, '' where none did."""
    (folder / "good.zip").write_bytes(good)
    return fuzzing.through(fuzzing.drawn(folder / "good.zip"), count, folder)


def test_two_thousand_mutations(good: bytes, tmp_path: Path) -> None:
    seen = fuzz(IN_CI, good, tmp_path)
    assert seen.total() >= IN_CI
    assert seen.keys() >= {"", "form", "hash", "manifest", "member", "schema", "trace"}, "the mutations reach every layer"


@pytest.mark.long
def test_a_hundred_thousand_mutations(good: bytes, tmp_path: Path) -> None:
    assert fuzz(AT_NIGHT, good, tmp_path).total() >= AT_NIGHT


def test_a_footer_that_ends_the_library_s_process_is_one_more_refusal(good: bytes, members: Members, tmp_path: Path) -> None:
    """Its row groups carry statistics of levels that do not fit the columns: pyarrow aborts."""
    bundle, journal = tmp_path / "hostile.zip", tmp_path / "journal"
    bundle.write_bytes(signed({**members, "runs.parquet": with_wrong_histogram(members["runs.parquet"])}))
    report = verify(bundle)
    assert report.verdict == "rejected"
    assert "aborted" in report.findings[0].message
    program = (
        "import sys; from pathlib import Path; from tests.exchange import fuzzing, test_fuzz\n"
        "kept, data = fuzzing.Journal(sys.argv[1]), Path(sys.argv[2]).read_bytes()\n"
        "kept.begins(data); kept.ended(test_fuzz.outcome(data))"
    )
    found = fuzzing.through(lambda left, seed, at: [sys.executable, "-c", program, str(at), str(bundle)], 1, tmp_path)
    assert found == {fuzzing.ABORTED: 1}
    assert fuzzing.read_journal(journal)[1] == bundle.read_bytes()


def test_a_bundle_signed_again_without_a_change_is_sound(members: Members) -> None:
    assert isinstance(read(signed(members)), Contents)


@pytest.mark.parametrize("column", ["suite", "hardware", "reason"])
@settings(max_examples=25, **QUIET)  # type: ignore[arg-type]
@given(text=st.text(st.characters(codec="utf-8"), max_size=200))
def test_any_text_is_carried_as_text(column: str, text: str, members: Members) -> None:
    found = read(signed(with_rows(members, "runs.parquet", lambda rows: rows[0].update({column: text}))))
    assert isinstance(found, Contents)
    assert getattr(found.cases[0], column) == text
