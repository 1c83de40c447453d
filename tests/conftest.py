"""What tests of several folders share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

WITH_MODELS = ("kernels", "models", "modules", "techniques", "workloads")


@pytest.fixture(autouse=True, scope="module")
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Models this small are fastest on one thread, above all when another process has the other core."""
    if request.path.parent.name not in WITH_MODELS:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
