"""The products in C against float64 and against torch's own, and what happens where they cannot be had."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from effbench_kernels import compiled, experts, grouped_linear, native, sort

from tests.kernels.test_experts import ROUTINGS, agree
from tests.kernels.truth import error, gradients, layer, make

LIMIT = {torch.float32: 1e-6, torch.bfloat16: 3e-3}
OFFSETS = {
    "even": [0, 4, 8, 12],
    "one row": [0, 0, 1, 1],
    "empty ends": [0, 0, 9, 9],
    "long and short": [0, 201, 202, 209],
    "nothing": [0, 0, 0, 0],
}


@pytest.fixture(autouse=True)
def library():
    """Skip where there is no C compiler; under CI, where there has to be one, fail."""
    if native.why_not():
        if os.environ.get("CI"):
            pytest.fail(native.why_not())
        pytest.skip(native.why_not())


def rows(count, width, dtype, seed):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", OFFSETS)
@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize(("d", "o"), [(64, 64), (97, 47), (1, 1), (130, 259), (7, 300), (2101, 70)])
def test_rows_times_weights(d, o, dtype, name, threads):
    offsets = torch.tensor(OFFSETS[name])
    kept, count = int(offsets[-1]), int(offsets[-1]) + 2
    row = torch.randint(0, 11, (count,), generator=torch.Generator().manual_seed(1))
    x, bias = rows(11, d, dtype, 2), rows(3, o, dtype, 3)
    for transposed in (False, True):
        w = rows(3 * o, d, dtype, 4).view(3, o, d) if not transposed else rows(3 * d, o, dtype, 4).view(3, d, o).mT
        for index, shift in ((row, bias), (row, None), (None, bias)):
            source = x if index is not None else rows(count, d, dtype, 5)
            out = torch.full((count, o), torch.nan, dtype=dtype)
            torch.set_num_threads(threads)
            ran = native.product(source, index, w, shift, offsets, out)
            torch.set_num_threads(1)
            if not ran:  # these have no C form: a bias or few columns of a transposed weight, an odd depth in bfloat16
                assert transposed and (shift is not None or o < 64 or dtype == torch.bfloat16)
                assert out.isnan().all()
                continue
            assert out[kept:].isnan().all(), "rows that no expert has were written"
            for e in range(3):
                part = slice(int(offsets[e]), int(offsets[e + 1]))
                want = (source[index] if index is not None else source)[part].double() @ w[e].double().T
                want = want if shift is None else want + shift[e].double()
                assert error(out[part], want) <= LIMIT[dtype]


@pytest.mark.parametrize("name", OFFSETS)
@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize(("o", "d"), [(64, 64), (47, 97), (1, 130), (301, 67)])
def test_rows_times_rows(o, d, dtype, name):
    offsets = torch.tensor(OFFSETS[name])
    count = int(offsets[-1])
    row = torch.randint(0, 11, (count,), generator=torch.Generator().manual_seed(1))
    for left_row, right_row in ((None, row), (row, None), (row, row)):
        left, right = (
            rows(11 if left_row is not None else count, o, dtype, 2),
            rows(11 if right_row is not None else count, d, dtype, 3),
        )
        out = torch.full((3, o, d), torch.nan, dtype=dtype)
        if not native.outer(left, left_row, right, right_row, offsets, out):
            assert dtype == torch.bfloat16 and out.isnan().all()
            continue
        for e in range(3):
            part = slice(int(offsets[e]), int(offsets[e + 1]))
            a = (left if left_row is None else left[left_row])[part].double()
            b = (right if right_row is None else right[right_row])[part].double()
            assert error(out[e], a.T @ b) <= LIMIT[dtype]


SIZES = {"whole": {"d": 128, "f": 96, "out": 72}, "odd": {"d": 97, "f": 47, "out": 5}, "one": {"d": 1, "f": 1, "out": 1}}


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize(("size", "tokens"), [("whole", 70), ("odd", 70), ("one", 70), ("odd", 250)])  # 250: panels
@pytest.mark.parametrize(
    ("act", "bias", "add"),
    [("swiglu", False, False), ("swiglu", True, True), ("relu", True, False), ("silu", False, True), ("gelu", True, True)],
)
def test_the_layer_is_as_good_as_on_torch_alone(act, bias, add, size, tokens, dtype, monkeypatch):
    """At widths that the C products take; torch alone must take the same inputs, gradients included.

    The rounding of a single number is luck, which differs between processors, so the smallest layer is drawn 16 times."""
    ours, torchs = {}, {}  # part of the answer → mean square of its error over the draws
    draws = 16 if size == "one" else 1
    for seed in range(draws):
        case = make(tokens=tokens, k=3, experts=7, act=act, bias=bias, add=add, low=-1, high=8, seed=seed, **SIZES[size]).to(
            dtype
        )
        found = []
        for use in (True, False):
            with monkeypatch.context() as patch:
                if not use:
                    patch.setattr(native, "_load", lambda: (None, "left out"))
                own = case.fresh()
                plan = sort(own.index, 7)
                out = experts(own.x, own.w_in, own.w_out, plan, own.weight, act, own.b_in, own.b_out, own.add)
                found.append({"out": out, **gradients(own, out), "plan": plan})
        truth = case.to(torch.float64).fresh()
        want = layer(truth, act)
        for name, true in {"out": want, **gradients(truth, want)}.items():
            for errors, got in ((ours, found[0]), (torchs, found[1])):
                errors[name] = errors.get(name, 0.0) + float(error(got[name], true)) ** 2 / draws
        assert all(torch.equal(one, two) for one, two in zip(found[0]["plan"][:5], found[1]["plan"][:5], strict=True))
    for name in ours:
        print(f"{name}: {ours[name] ** 0.5:.1e}, torch alone {torchs[name] ** 0.5:.1e}")
        assert ours[name] ** 0.5 <= 1.5 * torchs[name] ** 0.5 + (1e-7 if dtype == torch.float32 else 1e-3), name


AGREE = {torch.float32: 4e-6, torch.bfloat16: 1e-2}  # as tests/kernels/test_experts.py states them
MATRIX = [
    {"tokens": 0, "k": 2, "experts": 7},
    {"tokens": 1, "k": 1, "experts": 1},
    {"tokens": 1, "k": 7, "experts": 7},
    {"tokens": 63, "k": 2, "experts": 7, "scale": 1e-3},
    {"tokens": 65, "k": 3, "experts": 7, "scale": 1e2},
    {"tokens": 65, "k": 1, "experts": 1},
    {"tokens": 9, "k": 4, "experts": 300, "low": -1, "high": 301},
]


@pytest.mark.parametrize("save", ["pre", "none"])
@pytest.mark.parametrize("dtype", AGREE)
@pytest.mark.parametrize("row", MATRIX, ids=str)
def test_the_matrix_in_the_types_that_c_knows(row, dtype, save):
    agree(make(d=97, f=47, out=31, **row).to(dtype), "swiglu", limit=AGREE[dtype], save=save)


@pytest.mark.parametrize("dtype", AGREE)
@pytest.mark.parametrize("name", ROUTINGS)
def test_memory_that_holds_nan_changes_no_bit(name, dtype):
    """Nothing that was not written is read, forward or backward, in one call and in single products."""
    index = ROUTINGS[name]
    for act, save in itertools.product(("swiglu", "gelu"), ("pre", "none")):
        case = make(tokens=index.size(0), index=index, act=act, d=70, f=66, out=65).to(dtype)
        clean, poisoned = _results(case, act, save), None
        torch.use_deterministic_algorithms(True)
        try:
            assert torch.empty(3).isnan().all()
            poisoned = _results(case, act, save)
        finally:
            torch.use_deterministic_algorithms(False)
        for part, want in clean.items():
            assert torch.isfinite(want).all() and torch.equal(poisoned[part], want), (act, save, part)


def _results(case, act, save):
    own = case.fresh()
    plan = sort(own.index, own.w_in.size(0))
    out = experts(own.x, own.w_in, own.w_out, plan, own.weight, act, own.b_in, own.b_out, own.add, save)
    return {"out": out, **gradients(own, out)}


@pytest.mark.parametrize("dtype", AGREE)
def test_threads_and_repeats_change_no_bit(dtype):
    case = make(tokens=300, k=2, experts=4, d=96, f=80, out=72, low=-1).to(dtype)
    found = []
    for run_number in range(20):
        torch.set_num_threads(1 + run_number % 2)
        found.append(list(_results(case, "swiglu", "pre").values()))
    torch.set_num_threads(1)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_the_whole_layer_runs_in_one_call(monkeypatch):
    monkeypatch.setattr(native, "product", None)  # would raise if it were asked
    case = make(tokens=9, bias=True).to(torch.float32)
    run = (case.x, case.w_in, case.w_out, sort(case.index, 5), case.weight, "swiglu", case.b_in, case.b_out, case.add)
    assert error(experts(*run), layer(case.to(torch.float64), "swiglu")) <= 1e-6


def test_extreme_activations():
    """silu at both ends of float32, infinities and NaN, as torch has them."""
    x = torch.tensor([[0.0], [88.0], [-88.0], [-104.0], [1e4], [-1e4], [torch.inf], [torch.nan], [-1e-30]])
    one, plan = torch.ones(1, 1, 1), sort(torch.zeros(9, 1, dtype=torch.int64), 1)
    for act, function in (("silu", torch.nn.functional.silu), ("relu", torch.relu)):
        got = experts(x, one, one, plan, torch.ones(9, 1), act)
        assert torch.allclose(got, function(x), rtol=1e-6, atol=1e-37, equal_nan=True), act


def test_unaligned_and_padded_rows():
    x, w = rows(12, 131, torch.float32, 1)[:, 1:], rows(3 * 66, 133, torch.float32, 2).view(3, 66, 133)[:, :, 2:132]
    out = torch.full((12, 70), torch.nan)[:, 3:69]
    assert native.product(x, None, w, None, torch.tensor(OFFSETS["even"]), out)
    want = torch.cat([x[4 * e : 4 * e + 4].double() @ w[e].double().T for e in range(3)])
    assert error(out, want) <= 1e-6


def test_a_row_does_not_depend_on_its_neighbours():
    """The same row gives the same bits alone and among others, and among many others."""
    x, w = rows(300, 96, torch.bfloat16, 1), rows(80, 96, torch.bfloat16, 2).view(1, 80, 96)

    def product(first, count):
        out = torch.empty(count, 80, dtype=torch.bfloat16)
        assert native.product(x[first : first + count], None, w, None, torch.tensor([0, count]), out)
        return out

    few, many = product(0, 23), product(0, 300)
    for i in range(23):
        assert torch.equal(product(i, 1)[0], few[i])
    for i in (0, 7, 200):
        assert torch.equal(product(i, 60), many[i : i + 60])


def test_infinity_and_nan_stay_what_they_are():
    x, w = torch.ones(2, 32, dtype=torch.bfloat16), torch.ones(1, 8, 32, dtype=torch.bfloat16)
    x[0, 3], x[1, 5] = torch.inf, torch.nan
    out = torch.empty(2, 8, dtype=torch.bfloat16)
    assert native.product(x, None, w, None, torch.tensor([0, 2]), out)
    assert (out[0] == torch.inf).all() and out[1].isnan().all()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"EFFBENCH_KERNELS_NATIVE": "0"}, "EFFBENCH_KERNELS_NATIVE is 0"),
        ({"PATH": "", "CC": ""}, "there is no C compiler"),
        ({"CC": "false"}, "could not compile"),
        ({"EFFBENCH_KERNELS_CACHE": "/dev/null"}, "Not a directory"),
    ],
)
def test_without_it_everything_runs_on_torch_and_the_reason_is_told(variables, words, tmp_path):
    program = (
        "import torch\nfrom effbench_kernels import grouped_linear, native, sort\n"
        "y = grouped_linear(torch.ones(2, 8), torch.ones(3, 5, 8), sort(torch.tensor([[0], [2]]), 3))\n"
        "assert (y == 8).all()\nprint(native.why_not())"
    )
    environment = {**os.environ, "EFFBENCH_KERNELS_CACHE": str(tmp_path), **variables}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert words in done.stdout


def test_a_library_that_computes_something_else_is_not_used(monkeypatch, tmp_path):
    """The check at load bites: the same sources with one product spoilt are refused."""
    spoilt = tmp_path / "csrc"
    shutil.copytree(compiled.SOURCES, spoilt)
    text = (spoilt / "dots.h").read_text()
    assert "value = sums + " in text
    (spoilt / "dots.h").write_text(text.replace("value = sums + ", "value = sums * 1.1f + "))
    monkeypatch.setattr(compiled, "SOURCES", spoilt)
    monkeypatch.setenv("EFFBENCH_KERNELS_CACHE", str(tmp_path))
    library, reason = native._load.__wrapped__()
    assert library is None
    assert "is wrong for" in reason
    assert list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize("dtype", LIMIT)
def test_gradients_of_experts_without_tokens_are_zero_and_take_no_memory(dtype):
    """Large stacks come zeroed from the system; they can be used and written like any other tensor."""
    index = torch.tensor([[5], [39], [5]])
    case = make(tokens=3, k=1, experts=160, d=256, f=64, out=256, bias=False, index=index).to(dtype).fresh()
    out = experts(case.x, case.w_in, case.w_out, sort(case.index, 160), case.weight, "swiglu")
    before = _resident_bytes()
    w_in, w_out = torch.autograd.grad(out.sum(), (case.w_in, case.w_out))
    assert w_in.numel() > 1 << 18 and w_in.is_contiguous()
    assert _resident_bytes() - before < (w_in.nbytes + w_out.nbytes) / 2  # where pages are large, some beside the touched ones
    touched = {e for e in range(160) if w_in[e].any() and w_out[e].any()}
    assert touched == {5, 39} and not any(w_in[e].any() or w_out[e].any() for e in set(range(160)) - touched)
    w_in += 1
    assert (w_in[7] == 1).all()


def _resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_it_is_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("EFFBENCH_KERNELS_CACHE", str(tmp_path))
    first = compiled.library_path()
    changed = first.stat().st_mtime_ns
    assert compiled.library_path() == first and first.stat().st_mtime_ns == changed
    assert [path.name for path in first.parent.iterdir()] == [first.name], "something half is left behind"


def test_the_primitive_uses_it(monkeypatch):
    used = []
    inner = native.product
    monkeypatch.setattr(native, "product", lambda *call: used.append(inner(*call)) or used[-1])
    case = make(tokens=5, d=64, f=64, bias=False).to(torch.float32)
    grouped_linear(case.x, case.w_in, sort(case.index, 5))
    assert used == [True]
