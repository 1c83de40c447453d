"""U-SAM's projectors against plain loops in float64, and against each other where they must agree."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from effbench.modules import tapm
from effbench.modules.usam_arms import ProjectorForm

B, N, P, D, O = 2, 5, 3, 8, 12  # noqa: E741
CASES = [("soft", 3, 1), ("soft", 8, 1), ("top", 3, 1), ("top", 3, 2), ("top", 16, 2), ("single", 1, 1), ("aliased", 3, 1)]


def projector(kind: str, experts: int = 3, top_k: int = 1, seed: int = 0) -> tapm.TaskAwareProjector:
    torch.manual_seed(seed)
    made = tapm.TaskAwareProjector(kind, D, O, experts=experts, top_k=top_k).double()
    with torch.no_grad():
        made.experts.bias.normal_()
        if kind != "single":
            made.router.weight.normal_()
    return made


def inputs(prompts: int = P) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(B, N, D, dtype=torch.float64), torch.randn(B, prompts, O, dtype=torch.float64)


def looped(model: tapm.TaskAwareProjector, audio_BND: torch.Tensor, prompt_BPO: torch.Tensor) -> torch.Tensor:
    """The projector, one clip, token and expert at a time."""
    clips = []
    for audio_ND, prompt_PO in zip(audio_BND, prompt_BPO, strict=True):
        rows = []
        for n, x_D in enumerate(audio_ND):
            each = [w @ x_D + b for w, b in zip(model.experts.weight, model.experts.bias, strict=True)]
            if model.kind in ("single", "aliased"):
                rows.append(each[0])
                continue
            seen_D = model.down.weight @ prompt_PO[n] + model.down.bias if n < len(prompt_PO) else torch.zeros_like(x_D)
            gate = torch.softmax(model.router.weight @ torch.cat([x_D, seen_D]), 0)
            order = sorted(range(len(each)), key=[-g for g in gate.tolist()].__getitem__)
            used = order[: model.top_k] if model.kind == "top" else order
            rows.append(torch.stack([gate[e] * each[e] for e in used]).sum(0))
        clips.append(torch.stack(rows))
    return torch.stack(clips)


@pytest.mark.parametrize(("kind", "experts", "top_k"), CASES)
@pytest.mark.parametrize("prompts", [1, N, N + 4])
def test_every_arm_equals_the_loop_in_output_and_gradients(kind: str, experts: int, top_k: int, prompts: int) -> None:
    model, given_ = projector(kind, experts, top_k), inputs(prompts)
    wanted = [p for p in model.parameters() if kind != "aliased" or p is model.experts.weight or p is model.experts.bias]
    audio_BND = given_[0].requires_grad_()
    found, true = model(audio_BND, given_[1]), looped(model, audio_BND, given_[1])
    torch.testing.assert_close(found, true, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(true)
    grads = [torch.autograd.grad(out, [audio_BND, *wanted], weight, allow_unused=True) for out in (found, true)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("kind", "experts", "top_k"), CASES)
def test_the_reference_of_the_gate_equals_the_loop(kind: str, experts: int, top_k: int) -> None:
    model, (audio_BND, prompt_BPO) = projector(kind, experts, top_k), inputs()
    logits_TE = tapm.reference_logits(model, audio_BND, prompt_BPO) if kind != "single" else None
    found = tapm.reference(model, audio_BND.flatten(0, 1), logits_TE).view(B, N, O)
    torch.testing.assert_close(found, looped(model, audio_BND, prompt_BPO), rtol=1e-12, atol=1e-12)


def test_the_three_best_of_three_are_the_soft_mixture() -> None:
    soft, top = projector("soft"), projector("top", top_k=3)
    top.load_state_dict(soft.state_dict())
    torch.testing.assert_close(soft(*inputs()), top(*inputs()), rtol=1e-13, atol=1e-13)


def test_one_expert_is_the_single_projector() -> None:
    soft, single = projector("soft", experts=1), projector("single")
    single.load_state_dict({name: soft.state_dict()[name] for name in single.state_dict()})
    torch.testing.assert_close(soft(*inputs()), single(*inputs()), rtol=1e-13, atol=1e-13)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), experts=st.integers(1, 9), scale=st.sampled_from([0.01, 1.0, 30.0]))
def test_aliased_experts_are_a_single_projector_exactly(seed: int, experts: int, scale: float) -> None:
    model = projector("aliased", experts=experts, seed=seed)
    single = tapm.TaskAwareProjector("single", D, O).double()
    single.load_state_dict({name: model.state_dict()[name] for name in single.state_dict()})
    audio_BND, prompt_BPO = inputs()
    gate_TE = tapm.exact_gates((scale * model.logits(audio_BND, prompt_BPO)).softmax(-1))
    assert bool((gate_TE.sum(-1) == 1).all())
    rows_ETO = model.rows(audio_BND.flatten(0, 1)).float().double()
    assert torch.equal(tapm.weighted(rows_ETO, gate_TE), single(audio_BND, prompt_BPO).flatten(0, 1).float().double())
    torch.testing.assert_close(model(audio_BND, prompt_BPO), single(audio_BND, prompt_BPO), rtol=1e-12, atol=1e-12)


def test_distinct_experts_are_no_single_projector_under_the_same_gates() -> None:
    """What shows aliased experts to be equal shows distinct ones not to be."""
    model, (audio_BND, prompt_BPO) = projector("soft"), inputs()
    gate_TE = tapm.exact_gates(model.logits(audio_BND, prompt_BPO).softmax(-1))
    rows_ETO = model.rows(audio_BND.flatten(0, 1)).float().double()
    assert (tapm.weighted(rows_ETO, gate_TE) - rows_ETO[0]).abs().max() > 0.1


def test_the_router_reads_the_prompt_and_the_single_projector_does_not() -> None:
    audio_BND, prompt_BPO = inputs()
    for kind, reads in (("soft", True), ("single", False), ("aliased", False)):
        model = projector(kind)
        change = (model(audio_BND, prompt_BPO) - model(audio_BND, 5 * prompt_BPO)).abs().amax((0, 2))
        assert bool((change[:P] > 1e-6).all()) == reads, kind
        assert bool((change[P:] < 1e-12).all()), "what lies behind the prompt's end is zeros"


def test_a_prompt_is_cut_or_padded() -> None:
    long_BPD = torch.arange(12.0).view(1, 6, 2)
    assert torch.equal(tapm.fitted(long_BPD, 4), long_BPD[:, :4])
    assert tapm.fitted(long_BPD, 8)[0, :, 0].tolist() == [0, 2, 4, 6, 8, 10, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "experts", "top_k"), CASES)
def test_other_types_agree_with_float64_to_their_rounding(kind: str, experts: int, top_k: int, dtype: torch.dtype) -> None:
    model, (audio_BND, prompt_BPO) = projector(kind, experts, top_k).to(dtype), inputs()
    audio_BND, prompt_BPO = audio_BND.to(dtype), prompt_BPO.to(dtype)
    found = model(audio_BND, prompt_BPO)
    assert found.dtype == dtype
    logits_TE = model.logits(audio_BND, prompt_BPO) if kind != "single" else None
    true = tapm.reference(model, audio_BND.flatten(0, 1), logits_TE).view(B, N, O)
    error = (found.double() - true).square().mean().sqrt() / true.square().mean().sqrt()
    assert error < (1e-6 if dtype == torch.float32 else 0.02)


def form(kind: Any, experts: int, top_k: int) -> ProjectorForm:
    return ProjectorForm(kind=kind, experts=experts, top_k=top_k if kind == "top" else 1)


@pytest.mark.parametrize(("kind", "experts", "top_k"), CASES)
def test_flops_and_weights_are_those_that_a_plan_knows(kind: str, experts: int, top_k: int) -> None:
    model, (audio_BND, prompt_BPO) = projector(kind, experts, top_k), inputs()
    known = form(kind, experts, top_k)
    assert sum(p.numel() for p in model.parameters()) == sum(w.size for w in known.weights(D, O))
    shapes = {tuple(p.shape) for p in model.parameters()}
    assert shapes == {w.shape for w in known.weights(D, O)}
    with FlopCounterMode(display=False) as counter:
        if kind == "single":
            model(audio_BND, prompt_BPO)
        else:
            model.logits(audio_BND, prompt_BPO)
    experts_flops = 0 if kind == "single" else 2 * B * N * D * O * known.run
    assert known.flops(B * N, B * P, D, O) == counter.get_total_flops() + experts_flops


def test_soft_costs_grow_with_the_experts_and_sparse_ones_with_the_router_alone() -> None:
    def flops(kind: str, experts: int, top_k: int = 1) -> int:
        return form(kind, experts, top_k).flops(14, 32, 768, 4096)

    one = 2 * 14 * 768 * 4096
    assert flops("soft", 16) - flops("soft", 3) == 13 * (one + 2 * 14 * 1536)
    assert flops("top", 16) - flops("top", 3) == 13 * 2 * 14 * 1536
    assert flops("top", 3, 2) - flops("top", 3) == one
    assert flops("aliased", 3) == flops("soft", 3)
    assert flops("single", 1) == one


def test_the_paper_s_projector_has_the_published_numbers_of_weights() -> None:
    assert sum(w.size for w in form("single", 1, 1).weights(768, 4096)) == 3_149_824
    stack = sum(w.size for w in form("soft", 3, 1).weights(768, 4096) if w.kind == "experts")
    assert stack == 3 * 3_149_824
    idle = [form(kind, 3, 1).idle_weights(768, 4096) for kind in ("top", "soft", "aliased")]
    assert idle == [2 * 3_149_824, 0, 0]


@pytest.mark.parametrize(("kind", "experts", "top_k"), [("other", 3, 1), ("top", 3, 4), ("top", 3, 0)])
def test_what_is_no_projector_is_refused(kind: str, experts: int, top_k: int) -> None:
    with pytest.raises(ValueError, match=kind):
        tapm.TaskAwareProjector(kind, D, O, experts=experts, top_k=top_k)


def test_exact_gates_stay_close_to_the_gates() -> None:
    torch.manual_seed(0)
    for experts, scale in itertools.product((2, 3, 32), (0.1, 10.0)):
        gate_TE = (scale * torch.randn(50, experts, dtype=torch.float64)).softmax(-1)
        exact_TE = tapm.exact_gates(gate_TE)
        assert bool((exact_TE.sum(-1) == 1).all())
        assert (exact_TE - gate_TE).abs().max() <= experts * 2.0**-20
        assert bool((exact_TE * 2.0**20 == (exact_TE * 2.0**20).round()).all())
