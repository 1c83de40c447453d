"""Bundles that were made to hurt: each is refused by the rule it breaks, before it has cost anything."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from effbench.errors import BundleError
from effbench.exchange import limits
from effbench.exchange.bundle import contents_of_bytes
from effbench.exchange.verify import verify
from tests.exchange.bundles import OWNED, Members, entries_of, signed, zipped
from tests.exchange.hostile import COSTLY, HOSTILE


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_bundle_is_refused_by_its_rule(name: str, members: Members) -> None:
    check, message, make = HOSTILE[name]
    data = make(members)
    with pytest.raises(BundleError) as refusal:
        contents_of_bytes(data)
    assert refusal.value.check == check
    assert message in refusal.value.message
    assert not OWNED.exists()


def test_the_bundle_they_are_made_from_is_sound(members: Members, good: bytes) -> None:
    assert signed(members) == good
    assert len(contents_of_bytes(zipped(entries_of(members))).cases) == 2


def test_the_bytes_of_a_bundle_are_refused_wherever_it_is_cut(good: bytes) -> None:
    for length in range(0, len(good), 97):
        with pytest.raises(BundleError):
            contents_of_bytes(good[:length])


def test_no_code_of_a_bundle_runs(good: bytes, tmp_path: Path) -> None:
    """The plugin of the good bundle would end the process, its YAML would write a file."""
    (tmp_path / "bundle.zip").write_bytes(good)
    verify(tmp_path / "bundle.zip")
    contents_of_bytes(good)
    assert "some_plugin" not in sys.modules
    assert not OWNED.exists()


@pytest.mark.parametrize("name", COSTLY)
def test_what_would_cost_much_is_refused_within_the_limits(name: str, members: Members, tmp_path: Path) -> None:
    check, make = COSTLY[name]
    bundle = tmp_path / "bundle.zip"
    bundle.write_bytes(make(members))
    began_s = time.monotonic()
    report = verify(bundle)
    assert time.monotonic() - began_s < limits.WALL_S
    assert report.verdict == "rejected"
    assert len(report.findings) == 1
    assert report.findings[0].check == check or not check
    assert "did not expect" not in report.findings[0].message
