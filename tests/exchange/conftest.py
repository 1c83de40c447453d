"""What tests of bundles share."""

from __future__ import annotations

import pytest

from tests.exchange.bundles import Members, make_good, members_of


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A bundle that is sound in form."""
    return make_good(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="session")
def members(good: bytes) -> Members:
    """Its members; copy before you change any."""
    return members_of(good)
