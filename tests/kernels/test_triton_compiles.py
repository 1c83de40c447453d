"""Every Triton kernel compiles for an H100, though there is none: types, layouts and sizes that the interpreter does not check."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec("triton.backends.nvidia") is None:
        pytest.skip("triton with its NVIDIA compiler is not installed")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-m", "tests.kernels.ahead_of_time"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def kernels(records):
    return [record for record in records if "kernel" in record]


def test_each_kernel_is_among_them_and_fits_the_shared_memory(kernels):
    names = {record["kernel"] for record in kernels}
    assert names == {
        "combine", "few_hidden", "few_out", "group_sum", "hidden", "hidden_gradient", "linear", "map_tiles", "outer",
        "weight_gradient",
    }  # fmt: skip
    assert max(record["shared_bytes"] for record in kernels) <= 227 * 1024
    assert all(record["cubin_bytes"] > 0 for record in kernels)


def test_no_kernel_has_an_atomic(kernels):
    assert not [record["kernel"] for record in kernels if record["atomics"]]


def test_large_tiles_use_the_matrix_and_memory_units_of_the_device(kernels):
    large = [
        r for r in kernels if r["constants"].get("BM") == "128" and r["types"][0] == "*bf16" and r["kernel"] != "map_tiles"
    ]
    assert {record["kernel"] for record in large} == {"hidden", "hidden_gradient", "linear", "outer"}
    assert all(record["wgmma"] for record in large)
    assert all(record["tma"] for record in large if record["kernel"] != "outer")


def test_a_token_count_compiles_nothing_new(records):
    """The script runs one layer with several token counts of one step of the table; only the first may compile."""
    assert [record["again"] for record in records if "again" in record] == [0]
