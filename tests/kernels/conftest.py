"""The Triton kernels run under Triton's interpreter here; that has to be chosen before triton is imported, and not on a GPU."""

import importlib.util
import os
import sys

import pytest
import torch

if "triton" not in sys.modules and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _missing():
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "needs TRITON_INTERPRET=1 from the start; on a GPU tests/gpu has the same tests without the interpreter"
    return None


@pytest.fixture
def interpreter():
    """Skips where the Triton kernels cannot run on the CPU."""
    if why := _missing():
        pytest.skip(why)


@pytest.fixture(autouse=True)
def _backend_runs(request):
    call = getattr(request.node, "callspec", None)
    if call is not None and call.params.get("backend") == "triton" and (why := _missing()):
        pytest.skip(why)
