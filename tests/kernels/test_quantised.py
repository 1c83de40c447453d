"""Experts in 4 and 8 bits: their size, their error against the step, exact products, gradients, and models of transformers."""

import copy
import math

import pytest
import torch
import transformers
from effbench_kernels import dense_plan, experts, native, quantised_torch, sort
from effbench_kernels.quantised import KINDS, QuantisedExperts, quantise, quantised_experts, quantised_linear
from effbench_kernels.transformers import quantise_experts
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.test_experts import ROUTINGS
from tests.kernels.test_transformers import LIMITS, MODELS, build, step, tokens
from tests.kernels.truth import error, gradients, layer, make

FORMS = [("int4", 32), ("int4", None), ("int4", "row"), ("int8", 64), ("int8", None)]


def weights(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def quantised(w, kind, group):
    return quantise(w, kind, w.size(2) if group == "row" else group)


def stack(q, dtype=torch.float64):
    return torch.stack([q.dequantise(e, dtype) for e in range(q.shape[0])])


def steps(w, kind, group):
    """The step of each weight, were scales stored exactly."""
    group = {"row": w.size(2), None: 64 if kind == "int4" else w.size(2)}.get(group, group)
    parts = w.double().unflatten(-1, (-1, group))
    wide = (parts.amax(-1) - parts.amin(-1)) / 15 if kind == "int4" else parts.abs().amax(-1) / 127
    return wide[..., None].expand_as(parts).flatten(-2)


@pytest.mark.parametrize(("kind", "most"), [("int4", 0.30), ("int8", 0.52)])
def test_bytes_really_stored(kind, most):
    w = weights(8, 128, 256, dtype=torch.bfloat16)
    q = quantise(w, kind, 64)
    saved = sum(tensor.nbytes for tensor in q.state_dict().values())
    print(f"{kind}: {q.nbytes / w.nbytes:.4f} of bfloat16")
    assert q.nbytes == saved <= most * w.nbytes
    assert (q.kind, q.shape, q.group) == (kind, w.shape, 64)


@pytest.mark.parametrize(("kind", "group"), FORMS)
def test_the_error_is_that_of_rounding_to_a_step(kind, group):
    """A uniform error within a step has an RMS of step / √12; scales of 8 bits make the step up to 1/128 wider."""
    w = weights(3, 70, 256)
    q = quantised(w, kind, group)
    off, step_of_w = stack(q) - w.double(), steps(w, kind, group)
    stored = q.scales.view(torch.bfloat16).float()
    stored = stored[..., 0] if kind == "int4" else stored
    assert (stored >= step_of_w[..., :: q.group].float() * (1 - 1e-6)).all()  # or the largest weights would be cut off
    ratio = (off.square().mean() / (step_of_w.square().mean() / 12)).sqrt().item()
    print(f"{kind} group {group}: error {error(off + w, w):.2e} of RMS, {ratio:.3f} of a uniform step")
    assert 0.95 <= ratio <= 1.02
    zero = w.double().abs().max() * 2**-8 if kind == "int4" else 0
    assert (off.abs() <= step_of_w * (0.5 * (1 + 2**-7)) + zero).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0, 1e-30, 1e-6, 1, 1e6])
def test_flat_and_tiny_and_huge_groups(kind, scale):
    w = weights(2, 5, 128) * scale
    w[0, :, :64] = 3 * scale
    off = (stack(quantise(w, kind, 64)) - w.double()).abs()
    assert (off <= steps(w, kind, 64) * 0.51 + w.double().abs() * 2**-8 + 1e-38).all()


def test_strides_and_types_of_the_weights_do_not_matter():
    w = weights(3, 70, 128, dtype=torch.bfloat16)
    want = quantise(w.float())
    for other in (w, w.double(), w.mT.contiguous().mT):
        assert torch.equal(quantise(other).codes, want.codes) and torch.equal(quantise(other).scales, want.scales)


def quantised_case(kind, group, dtype=torch.float64, act="swiglu", seed=0, **options):
    """A case whose weights are those that the quantised stacks stand for."""
    case = make(act=act, d=64, f=128, out=70, seed=seed, **options)
    q_in, q_out = quantised(case.w_in, kind, group), quantised(case.w_out, kind, group)
    case.w_in, case.w_out = stack(q_in), stack(q_out)
    return case.to(dtype), q_in, q_out


def run(case, q_in, q_out, act="swiglu", plan=None):
    plan = plan or sort(case.index, q_in.shape[0])
    return quantised_experts(case.x, q_in, q_out, plan, case.weight, act, case.b_in, case.b_out, case.add)


def agree(case, q_in, q_out, act="swiglu", limit=1e-13, plan=None):
    truth, own = case.to(torch.float64).fresh(), case.fresh()
    want, got = layer(truth, act), run(own, q_in, q_out, act, plan)
    assert got.dtype == case.x.dtype and got.shape == want.shape
    assert error(got, want) <= limit
    assert error(run(case, q_in, q_out, act, plan), want) <= limit  # without gradients it is another operator
    wanted, found = gradients(truth, want), gradients(own, got)
    for name in wanted.keys() - {"w_in", "w_out"}:
        assert error(found[name], wanted[name]) <= limit, name


@pytest.mark.parametrize("act", ["swiglu", "swiglu_clamped_interleaved", "relu"])
@pytest.mark.parametrize(("kind", "group"), FORMS)
def test_outputs_and_gradients_are_those_of_the_weights_it_stands_for(kind, group, act):
    agree(*quantised_case(kind, group, act=act), act)
    agree(*quantised_case(kind, group, torch.float32, act=act), act, limit=3e-6)


@pytest.mark.parametrize("name", ROUTINGS)
def test_awkward_routings(name):
    index = ROUTINGS[name]
    for kind in KINDS:
        agree(*quantised_case(kind, 64, tokens=index.size(0), index=index))


def test_dense_gating():
    agree(*quantised_case("int4", 64, tokens=6, experts=3, index=torch.arange(3).repeat(6, 1)), plan=dense_plan(6, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "group"), FORMS)
def test_half_types_are_as_near_the_truth_as_torch_on_the_same_weights(kind, group, dtype, monkeypatch):
    for count in (1, 4, 200):
        case, q_in, q_out = quantised_case(kind, group, tokens=count, bias=False, add=False)
        low = case.to(dtype)
        case.x, case.weight = low.x.double(), low.weight.double()
        want, got = layer(case, "swiglu"), run(low, q_in, q_out)
        with monkeypatch.context() as patch:  # in C it would round less often than torch alone does
            patch.setattr(native, "_load", lambda: (None, "left out"))
            plain = experts(low.x, low.w_in, low.w_out, sort(low.index, 5), low.weight, backend="torch")
        print(f"{kind} group {group}, {count} tokens: {error(got, want):.1e}, torch {error(plain, want):.1e}")
        assert error(got, want) <= 1.5 * error(plain, want)


@pytest.mark.parametrize("rows", [1, 4, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "group"), FORMS)
def test_products_that_read_the_codes_agree_with_those_of_one_expert_at_a_time(kind, group, dtype, rows, monkeypatch):
    q, bias = quantised(weights(3, 70, 256), kind, group), weights(3, 70, seed=2, dtype=dtype)
    x, plan = weights(rows, 256, seed=1, dtype=dtype), sort(torch.arange(rows)[:, None] % 4 - 1, 3)
    where = (q.codes, q.scales, q.group)
    found = torch.full((rows, 70), torch.nan, dtype=dtype)
    if not native.quantised(x, plan.token, *where, bias, plan.offsets, found):
        pytest.skip(native.why_not() or "the products that read the codes need a CPU with AVX-512 and bfloat16")
    got = quantised_linear(x, q, plan, bias)
    assert torch.equal(got[: plan.offsets[-1]], found[: plan.offsets[-1]]), "they are used where they can be had"
    monkeypatch.setattr(quantised_torch, "FEW_ROWS", 0)
    assert error(got, quantised_linear(x, q, plan, bias)) <= {torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]


def test_widths_that_blocks_do_not_divide():
    for depth, group in ((97, 97), (30, 15), (2, 1), (1, 1)):
        for kind in KINDS:
            w = weights(2, 5, depth)
            q = quantise(w, kind, group)
            assert q.shape == w.shape
            assert ((stack(q) - w.double()).abs() <= steps(w, kind, group) * 0.51 + w.double().abs().max() * 2**-8).all()


def test_low_precision_weights_are_rounded_once():
    for kind, group in FORMS:
        q = quantised(weights(1, 70, 128), kind, group)
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(q.dequantise(0, dtype), q.dequantise(0).to(dtype))


class Largest(TorchDispatchMode):
    """The bytes of the largest memory that an operator returns."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        own = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in own:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_stack_is_never_expanded(kind, dtype):
    q = quantise(weights(16, 128, 256), kind)
    plan = sort(torch.arange(16)[:, None].repeat(4, 1), 16)
    x = weights(64, 256, seed=1, dtype=dtype)
    with Largest() as forward:
        out = quantised_torch.linear_forward(x, q.codes, q.scales, None, plan.offsets, q.group)
    other = quantise(weights(16, 256, 128), kind)
    stacks = (q.codes, q.scales, q.group), (other.codes, other.scales, other.group)
    route = (plan.offsets, plan.token, plan.inverse, "relu")
    with Largest() as whole:
        quantised_torch.experts_forward(x, *stacks, None, None, torch.ones(64, 1, dtype=dtype), None, *route)
    with Largest() as backward:
        quantised_torch.linear_backward(out, q.codes, q.scales, plan.offsets, q.group, [True, True])
    one = 128 * 256 * x.element_size()
    assert 0 < forward.bytes <= one and 0 < backward.bytes <= one and 0 < whole.bytes <= one
    with Largest() as both:
        stack(q, dtype)
    assert both.bytes == 16 * one  # the measure sees it when it happens


def test_backward_keeps_no_weights_but_the_codes():
    case, q_in, q_out = quantised_case("int4", 64)
    case = case.fresh()
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t) if t.numel() else t, lambda t: t):
        run(case, q_in, q_out)
    most = max(t.numel() for t in kept.values() if t.is_floating_point())
    assert most <= 26 * 256  # the pre-activations
    assert {q_in.codes.data_ptr(), q_out.codes.data_ptr()} <= kept.keys()


def test_opcheck_and_one_graph():
    case, q_in, q_out = quantised_case("int4", 64, tokens=10)
    own = case.fresh()
    plan = sort(case.index, 5)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    rows = weights(20, 64, dtype=torch.float64).requires_grad_()
    call = (rows, q_in.codes, q_in.scales, own.b_in, plan.offsets, q_in.group)
    torch.library.opcheck(torch.ops.effbench_kernels.quantised_linear.default, call, test_utils=checks)

    stacks = [part for q in (q_in, q_out) for part in (q.codes, q.scales, q.group)]
    call = (case.x, *stacks, case.b_in, case.b_out, case.weight, case.add, plan.offsets, plan.token, plan.inverse, "swiglu")
    torch.library.opcheck(torch.ops.effbench_kernels.quantised_experts.default, call, test_utils=checks)

    def moe(x, weight, b_in, b_out, add):
        return quantised_experts(x, q_in, q_out, sort(case.index, 5), weight, "swiglu", b_in, b_out, add)

    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    results = []
    for call in (moe, compiled):
        own = case.fresh()
        out = call(own.x, own.weight, own.b_in, own.b_out, own.add)
        results.append([out, *gradients(own, out).values()])
    for one, two in zip(*results, strict=True):
        assert error(two, one) <= 1e-13
    with torch.no_grad():
        assert error(compiled(case.x, case.weight, case.b_in, case.b_out, case.add), results[0][0]) <= 1e-13


def test_a_cast_of_the_model_leaves_the_weights_alone_and_a_saved_one_comes_back():
    q = quantise(weights(3, 70, 128))
    want = stack(q)
    model = torch.nn.ModuleDict({"experts": copy.deepcopy(q)})
    for dtype in (torch.float16, torch.float64, torch.bfloat16):
        model.to(dtype)
    assert torch.equal(stack(model["experts"]), want)
    other = quantise(weights(3, 70, 128, seed=1))
    other.load_state_dict(model["experts"].state_dict())
    assert torch.equal(stack(other), want)
    assert "int4, group=64" in repr(q)


def expand(model):
    """Floating weights in place of quantised ones."""
    for module in list(model.modules()):
        for name, q in list(module.named_children()):
            if isinstance(q, QuantisedExperts):
                w = stack(q, torch.float32)
                delattr(module, name)
                setattr(module, name, torch.nn.Parameter(w.mT.contiguous() if module.is_transposed else w))
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_models_run_on_quantised_experts(name, kind):
    model = build(name)
    plain = model(tokens()).logits
    layers = sum(hasattr(module, "has_gate") for module in model.modules())
    done = quantise_experts(model, kind, group=4)
    assert done.stacks == 2 * layers and done.bytes_after < done.bytes_before
    assert not any(parameter.dim() == 3 for parameter in model.parameters())
    got, found = step(model)
    like = expand(copy.deepcopy(model))
    like.set_experts_implementation("eager")
    want, wanted = step(like)
    assert error(got, want) <= LIMITS[torch.float32]
    assert all(error(found[key], wanted[key]) <= LIMITS[torch.float32] for key in found)
    drift = error(got, plain)
    print(f"{name} {kind}: {drift:.1e} from the model before")
    assert 1e-5 < drift < {"int4": 1.0, "int8": 0.1}[kind]
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert error(compiled(tokens(), use_cache=False).logits, want) <= LIMITS[torch.float32]


def test_nothing_is_left_at_16_bits_in_silence():
    model = build("Mixtral")
    with pytest.raises(
        ValueError, match=r"layers.0.mlp.experts.gate_up_proj: group must divide the input width 32, got 64; 32 would"
    ):
        quantise_experts(model)
    assert sum(parameter.dim() == 3 for parameter in model.parameters()) == 4
    model.model.layers[1].extra = torch.nn.Module()
    model.model.layers[1].extra.w = torch.nn.Parameter(torch.zeros(4, 8, 8))
    with pytest.raises(ValueError, match=r"model.layers.1.extra.w would stay as they are"):
        quantise_experts(model, group=4)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 17}
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small))
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be quantised: it has no stacked expert weights"):
        quantise_experts(dense)
    done = build("Mixtral")
    quantise_experts(done, group=8)
    done.set_experts_implementation("eager")
    with pytest.raises(TypeError, match="not subscriptable"):
        done(tokens())


@pytest.mark.parametrize(
    ("w", "options", "words"),
    [
        (torch.zeros(2, 3, 64), {"kind": "nf4"}, "kind must be one of int4, int8, got 'nf4'"),
        (torch.zeros(3, 64), {}, r"w must hold floating weights \(experts, out, in\)"),
        (torch.zeros(2, 3, 64).long(), {}, "w must hold floating weights"),
        (torch.zeros(2, 3, 96), {}, "group must divide the input width 96, got 64; 32 would"),
        (torch.zeros(2, 3, 64), {"group": 0}, "group must divide the input width 64, got 0"),
        (torch.full((2, 3, 64), math.inf), {}, "the weights of expert 0 hold NaN or infinity"),
    ],
)
def test_bad_input_is_refused(w, options, words):
    with pytest.raises(ValueError, match=words):
        quantise(w, **options)


def test_bad_layers_are_refused_in_the_words_of_the_other_backends():
    case, q_in, q_out = quantised_case("int4", 64)
    with pytest.raises(ValueError, match=r"w_out must have shape \(5, O, 128\)"):
        run(case, q_in, quantise(weights(5, 70, 64)))
    case.x = case.x.to("meta")
    with pytest.raises(ValueError, match="w_in is on cpu, x on meta"):
        run(case, q_in, q_out)
