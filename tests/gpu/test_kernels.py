"""The Triton kernels of effbench_kernels on a GPU: right against float64, fixed to the bit, and never waiting for the host.

The truth of small cases is the loops of tests/kernels/truth.py on the CPU; of large ones, the torch backend in float64 on the GPU.
"""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from effbench_kernels import ACTIVATIONS, Norm, backends, dense_plan, experts, grouped_linear, route, sort

from tests.kernels.test_experts import ROUTINGS
from tests.kernels.truth import error, layer, make

pytestmark = pytest.mark.gpu

# D, F, E, K of published layers: the config.json of each model
SHAPES = {
    "Mixtral-8x7B": (4096, 14336, 8, 2),
    "OLMoE-1B-7B": (2048, 1024, 64, 8),
    "Qwen1.5-MoE-A2.7B": (2048, 1408, 60, 4),
    "Qwen3-30B-A3B": (2048, 768, 128, 8),
    "DeepSeek-V2-Lite": (2048, 1408, 64, 6),
    "gpt-oss-20b": (2880, 2880, 32, 4),
}
FORWARD = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}  # RMS; twice that in gradients


@pytest.fixture
def poisoned():
    """Memory that is allocated without being written holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3, device="cuda").isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["few", "many"])
def way(request, monkeypatch):
    """The kernels for a few pairs or those for many, whatever the number."""
    from effbench_kernels import triton_sizes

    monkeypatch.setattr(triton_sizes, "few", lambda *_: request.param == "few")
    return request.param


def on_gpu(case):
    moved = {name: tensor.detach().cuda().requires_grad_() for name, tensor in case.leaves().items()}
    return replace(case, index=case.index.cuda(), **moved)


def run(case, act="swiglu", plan=None, **options):
    plan = plan or sort(case.index, case.w_in.size(0))
    norm = None if case.gain is None else Norm(case.gain, case.shift)
    return experts(case.x, case.w_in, case.w_out, plan, case.weight, act, case.b_in, case.b_out, case.add, norm=norm, **options)


def gradients(case, out):
    """By name, for one fixed output gradient."""
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(99), dtype=torch.float64).to(out.device, out.dtype)
    leaves = case.leaves()
    if not out.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(out, list(leaves.values()), grad, allow_unused=True)
    pairs = zip(leaves.items(), found, strict=True)
    return {name: torch.zeros_like(leaf) if got is None else got for (name, leaf), got in pairs}


def agree(case, act="swiglu", limit=None, plan=None, **options):
    limit = limit or FORWARD[case.x.dtype]
    truth, own = case.to(torch.float64).fresh(), on_gpu(case)
    want, got = layer(truth, act), run(own, act, plan, **options)
    assert got.dtype == case.x.dtype and error(got.cpu(), want) <= limit
    wanted, found = gradients(truth, want), gradients(own, got)
    for name in wanted:
        assert error(found[name].cpu(), wanted[name]) <= 2 * limit, name


def big(tokens, d, f, count, k, dtype=torch.bfloat16, act="swiglu", bias=False, seed=0):
    """A layer made on the GPU, with a skewed routing."""
    g = torch.Generator("cuda").manual_seed(seed)
    wide = 2 * f if act in ("swiglu", "geglu", "swiglu_clamped_interleaved") else f

    def normal(*shape):
        return torch.randn(shape, generator=g, device="cuda", dtype=dtype)

    popularity = torch.arange(1, count + 1, device="cuda").float() ** -0.5
    scores = torch.rand(tokens, count, generator=g, device="cuda").log() / popularity
    index = scores.topk(k, -1).indices
    weight = torch.rand(tokens, k, generator=g, device="cuda") + 0.1
    leaves = [normal(tokens, d), normal(count, wide, d) / math.sqrt(d), normal(count, d, f) / math.sqrt(f), weight]
    if bias:
        leaves += [normal(count, wide), normal(count, d)]
    return index, [leaf.requires_grad_() for leaf in leaves]


def call(index, leaves, act="swiglu", backend="triton", plan=None):
    x, w_in, w_out, weight, *biases = leaves
    b_in, b_out = biases or (None, None)
    return experts(x, w_in, w_out, plan or sort(index, w_in.size(0)), weight, act, b_in, b_out, backend=backend)


def test_triton_is_the_default_here():
    assert backends.resolve(None, torch.zeros(1, device="cuda")) == "triton"


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation_both_ways(act, way):
    agree(make(act=act, f=19, scale=4.0), act)
    agree(make(act=act, bias=False, add=False, d=48, f=40, out=56).to(torch.bfloat16), act)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", ROUTINGS)
def test_awkward_routings_in_poisoned_memory(name, way):
    index = ROUTINGS[name]
    for norm, save in itertools.product((False, True), ("pre", "none")):
        agree(make(tokens=index.size(0), index=index, norm=norm), limit=1e-11, save=save)
    case = on_gpu(make(tokens=index.size(0), index=index))
    assert torch.isfinite(grouped_linear(case.x, case.w_in, sort(case.index, 5), case.b_in, backend="triton")).all()


@pytest.mark.parametrize("tokens", [0, 1, 7, 63, 64, 65, 200])
@pytest.mark.parametrize(("count", "k"), [(1, 1), (7, 1), (7, 3), (7, 7), (64, 2), (300, 4)])
def test_token_counts_and_expert_counts(tokens, count, k):
    agree(make(tokens=tokens, experts=count, k=k, d=24, f=16, out=40))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_odd_sizes_and_sentinels(dtype, way):
    agree(make(tokens=30, experts=7, k=2, d=97, f=47, out=31, low=-1, high=9).to(dtype))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_and_no_worse_than_the_torch_backend(scale, dtype):
    case = make(tokens=200, k=4, experts=8, d=128, f=96, out=64, bias=False, add=False, scale=scale).to(dtype)
    agree(case)
    want = layer(case.to(torch.float64), "swiglu")
    own, other = run(on_gpu(case), backend="triton"), run(on_gpu(case), backend="torch")
    assert error(own.cpu(), want) <= 1.5 * error(other.cpu(), want)


@pytest.mark.parametrize("tokens", [1, 6, 100])
def test_a_dense_plan(tokens, way):
    case = make(tokens=tokens, experts=3, index=torch.arange(3).repeat(tokens, 1), norm=True)
    agree(case, limit=1e-11, plan=dense_plan(tokens, 3, "cuda"))


def test_strides_do_not_matter(way):
    case = on_gpu(make(bias=False))
    want = run(case, backend="triton")
    with torch.no_grad():
        case.x = case.x.t().contiguous().t()
        case.w_in = case.w_in.mT.contiguous().mT
        case.w_out = torch.cat([case.w_out, case.w_out], 2)[:, :, : case.w_out.size(2)]
        case.weight = torch.stack([case.weight, case.weight], -1)[..., 0]
        assert error(run(case, backend="triton"), want) <= 1e-14


@pytest.mark.parametrize("tokens", [1, 4, 32, 257, 1024])
@pytest.mark.parametrize("name", SHAPES)
def test_published_shapes(name, tokens):
    d, f, count, k = SHAPES[name]
    act, bias = ("swiglu_clamped_interleaved", True) if name == "gpt-oss-20b" else ("swiglu", False)
    index, leaves = big(tokens, d, f, count, k, act=act, bias=bias)
    wide_leaves = [leaf.detach().double() for leaf in leaves]
    with torch.no_grad():
        got, other = call(index, leaves, act), call(index, leaves, act, "torch")
        want = call(index, wide_leaves, act, "torch")
    assert error(got, want) <= min(FORWARD[torch.bfloat16], 1.5 * error(other, want))
    del wide_leaves, want
    grad = torch.randn_like(got)
    found = torch.autograd.grad(call(index, leaves, act), leaves, grad)
    expected = torch.autograd.grad(call(index, leaves, act, "torch"), leaves, grad)
    for one, two in zip(found, expected, strict=True):  # both in bfloat16: each within 1 % of the truth
        assert error(one, two) <= 2e-2


def test_more_than_two_to_the_31_values():
    """512 experts of 4096 x 1024, and 655 360 rows of 4096: both sides pass 2^31 elements."""
    if torch.cuda.mem_get_info()[1] < 70e9:
        pytest.skip("needs 70 GB of GPU memory")
    with torch.no_grad():
        index, leaves = big(256, 4096, 512, 1024, 2, act="relu")
        index = torch.where(index < 8, index, index % 8 + 1016)  # the last experts, past 2^31
        assert leaves[1].numel() >= 2**31
        assert error(call(index, leaves, "relu"), call(index, leaves, "relu", "torch")) <= 1e-2
        del leaves
        index, leaves = big(65536, 4096, 64, 16, 10, act="relu")
        assert index.numel() * 4096 > 2**31
        got = call(index, leaves, "relu")
        for part in (slice(0, 64), slice(65472, 65536)):
            x, w_in, w_out, weight = leaves
            want = call(index[part], [x[part], w_in, w_out, weight[part]], "relu", "torch")
            assert error(got[part], want) <= 1e-2


@pytest.mark.parametrize("tokens", [2, 300])
def test_the_host_never_waits(tokens):
    index, leaves = big(tokens, 256, 128, 16, 4, bias=True)
    call(index, leaves).sum().backward()  # compiled before
    plan = sort(index, 16)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(index, leaves, plan=plan).sum().backward()
        call(index, leaves, plan=sort(index, 16))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("tokens", [2, 300])
def test_a_captured_layer_replays_with_another_routing(tokens):
    index, leaves = big(tokens, 256, 128, 16, 4)
    leaves = [leaf.detach() for leaf in leaves]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(index, leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(index, leaves)
    for seed in (1, 2):
        other = torch.randint(-1, 16, index.shape, generator=torch.Generator().manual_seed(seed)).cuda()
        other[:, 0] = 0 if seed == 2 else other[:, 0]
        index.copy_(other)
        graph.replay()
        assert torch.equal(out, call(other, leaves))


@pytest.mark.parametrize("tokens", [2, 300])
def test_twenty_runs_give_the_same_bits(tokens):
    index, leaves = big(tokens, 256, 192, 16, 4, bias=True)
    grad = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)

    def once():
        out = call(index, leaves)
        return [out, *torch.autograd.grad(out, leaves, grad)]

    first = once()
    for _ in range(19):
        assert all(torch.equal(one, two) for one, two in zip(first, once(), strict=True))


def test_a_routed_layer_compiles_to_one_graph():
    _, (x, w_in, w_out, _) = big(100, 128, 96, 16, 4)
    router = torch.randn(16, 128, device="cuda", dtype=torch.bfloat16)

    def moe(x, w_in, w_out):
        routing = route(x @ router.t(), 4, renorm=True)
        return experts(x, w_in, w_out, sort(routing.expert, 16), routing.weight)

    results = []
    for function in (moe, torch.compile(moe, fullgraph=True)):
        out = function(x, w_in, w_out)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), (x, w_in, w_out))])
    for one, two in zip(*results, strict=True):
        assert error(two, one) <= 2e-2


def test_token_counts_compile_nothing_new():
    """The four steps of the table are compiled once; after that a changing batch never waits for the compiler."""
    from effbench_kernels import triton_products, triton_small, triton_sums, triton_tiles

    def programs():
        modules = (triton_products, triton_small, triton_sums, triton_tiles)
        kernels = {value for module in modules for value in vars(module).values() if hasattr(value, "device_caches")}
        assert kernels
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    def forward_and_backward(tokens):
        index, leaves = big(tokens, 128, 64, 8, 2)
        call(index, leaves).sum().backward()

    for tokens in (1, 100, 50, 300, 1000):
        forward_and_backward(tokens)
    before = programs()
    for tokens in (2, 3, 17, 33, 64, 65, 99, 128, 129, 255, 511, 513, 1023, 2048):
        forward_and_backward(tokens)
    assert programs() == before
