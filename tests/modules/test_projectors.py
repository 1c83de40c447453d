"""The projectors of Llama-SMoP: routing and losses against plain loops, arms that must agree, costs as torch counts them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from effbench.modules.projector_arms import ProjectorForm
from effbench.modules.projector_flow import layout_of
from effbench.modules.projectors import DenseProjector, MixtureProjector, make_projector

FORM = ProjectorForm(kind="jejr", inputs=12, hidden=20, outputs=16, experts=5, top_k=2, balance=0.01, z=0.001)
MIXTURES = ("jejr", "jedr", "dedr", "loop")


def streams(batch: int = 2, audio: int = 7, video: int = 5, seed: int = 0, width: int = 12) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, n, width, generator=generator, dtype=torch.float64) for n in (audio, video)]


def projector(kind: str, seed: int = 1, **changes: Any) -> Any:
    torch.manual_seed(seed)
    made = make_projector(replace(FORM, kind=kind, **changes)).cast(torch.float64)
    for name, parameter in made.named_parameters():  # gains of 1 and shifts of 0 would hide which expert they belong to
        if name.endswith(("gain", "shift")):
            torch.nn.init.normal_(parameter)
    return made


def mlp(x: torch.Tensor, weights: Any) -> torch.Tensor:
    w_in, b_in, w_out, b_out, gain, shift = weights
    rows = F.linear(F.relu(F.linear(x, w_in, b_in)), w_out, b_out)
    return F.layer_norm(rows, rows.shape[-1:], gain, shift)


@torch.no_grad()
def plain(made: MixtureProjector, parts: list[torch.Tensor]) -> tuple[torch.Tensor, float, float]:
    """Output and the two losses, token by token."""
    form, outputs, balance, z = made.form, [], 0.0, 0.0
    heard: dict[int, list[tuple[torch.Tensor, list[int]]]] = {}
    for batch in range(parts[0].shape[0]):
        row = []
        for stream, x_BTD in enumerate(parts):
            router = stream if form.routers == 2 else 0
            first = stream * form.experts if form.kind == "dedr" else 0
            for x in x_BTD[batch]:
                logits = made.router.weight[router].detach() @ x
                share = torch.exp(logits) / torch.exp(logits).sum()
                best = sorted(range(form.experts), key=lambda e: -float(share[e]))[: form.top_k]
                total = sum(share[e] for e in best)
                row.append(sum(share[e] / total * mlp(x, made.experts.one(first + e)) for e in best))
                heard.setdefault(router, []).append((logits, best))
        outputs.append(torch.stack(row))
    for tokens in heard.values():
        for slot in range(form.top_k):
            for expert in range(form.experts):
                sent = sum(best[slot] == expert for _, best in tokens) / len(tokens)
                mean = sum(float(logits.softmax(0)[expert]) for logits, _ in tokens) / len(tokens)
                balance += form.experts * sent * mean
        z += sum(float(torch.log(torch.exp(logits).sum())) ** 2 for logits, _ in tokens) / len(tokens)
    return torch.stack(outputs), balance, z


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_output_and_losses_are_those_of_plain_loops(kind: str, top_k: int) -> None:
    made, parts = projector(kind, top_k=top_k, balance=0.7, z=0.3).train(), streams()
    out, (expected, balance, z) = made(parts), plain(made, parts)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(made.reference(parts), expected, rtol=1e-12, atol=1e-12)
    assert float(made.auxiliary_loss.detach()) == pytest.approx(0.7 * balance + 0.3 * z, rel=1e-12)


@settings(deadline=None, max_examples=25)
@given(
    batch=st.integers(1, 3), audio=st.integers(1, 6), video=st.integers(1, 6), experts=st.integers(1, 6),
    top_k=st.sampled_from([1, 2, 4]), kind=st.sampled_from(MIXTURES), seed=st.integers(0, 99),
)  # fmt: skip
def test_every_arm_is_the_float64_loop_for_any_sizes(
    batch: int, audio: int, video: int, experts: int, top_k: int, kind: str, seed: int
) -> None:
    made = projector(kind, seed, experts=experts, top_k=min(top_k, experts))
    parts = streams(batch, audio, video, seed)
    torch.testing.assert_close(made(parts), made.reference(parts), rtol=1e-11, atol=1e-11)
    assert int(made.load(parts).sum()) == batch * (audio + video) * made.form.top_k


def dyadic(made: Any, parts: list[torch.Tensor]) -> tuple[Any, list[torch.Tensor]]:
    """Eighths for all numbers: products and their sums are then exact in float64, in whichever order they are added."""
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_((parameter * 8).round() / 8)
    return made, [(x * 8).round() / 8 for x in parts]


def copied(joint: MixtureProjector, kind: str) -> MixtureProjector:
    """Another form whose banks and routers are copies of the joint one's."""
    other = projector(kind, seed=9)
    with torch.no_grad():
        for (_, new), (_, old) in zip(other.named_parameters(), joint.named_parameters(), strict=True):
            new.copy_(torch.cat([old] * (new.shape[0] // old.shape[0])))
    return other


@pytest.mark.parametrize("kind", ["jedr", "dedr"])
def test_forms_whose_banks_and_routers_are_copies_of_one_equal_the_joint_one_exactly(kind: str) -> None:
    joint, parts = dyadic(projector("jejr"), streams(audio=9))
    other = copied(joint, kind)
    assert torch.equal(other(parts), joint(parts))
    with torch.no_grad():
        (other.experts.w_out[FORM.experts :] if kind == "dedr" else other.router.weight[1]).neg_()  # of video alone
    changed = other(parts)
    assert torch.equal(changed[:, :9], joint(parts)[:, :9])
    assert not torch.equal(changed[:, 9:], joint(parts)[:, 9:])


def test_disjoint_mixtures_in_one_call_are_two_joint_ones() -> None:
    both, parts = dyadic(projector("dedr"), streams())
    num, outputs = FORM.experts, []
    for stream, x_BTD in enumerate(parts):
        one = projector("jejr", seed=7)
        with torch.no_grad():
            for (name, new), (_, old) in zip(one.named_parameters(), both.named_parameters(), strict=True):
                new.copy_(old[stream : stream + 1] if name == "router.weight" else old[stream * num : (stream + 1) * num])
        outputs.append(one([x_BTD, x_BTD[:, :0]]))
    assert torch.equal(both(parts), torch.cat(outputs, dim=1))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_released_loop_and_the_kernels_agree_in_output_losses_and_gradients(top_k: int) -> None:
    loop, kernels = (projector(kind, top_k=top_k).train() for kind in ("loop", "jejr"))
    kernels.load_state_dict(loop.state_dict())
    parts, found = streams(seed=3), []
    grad = torch.randn(2, 12, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for made in (loop, kernels):
        out = made(parts)
        ((out * grad).sum() + made.auxiliary_loss).backward()
        found.append([out, made.auxiliary_loss, *(p.grad for p in made.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_one_expert_is_the_dense_mlp_with_the_same_weights() -> None:
    one, dense, parts = projector("jejr", experts=1, top_k=1), projector("dense", experts=1, top_k=1), streams()
    for part in dense.experts:
        with torch.no_grad():
            for new, old in zip(part.parameters(), one.experts.one(0), strict=True):
                new.copy_(old)
    torch.testing.assert_close(one(parts), dense(parts), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dense.reference(parts), dense(parts), rtol=1e-12, atol=1e-12)
    assert dense.load(parts).tolist() == [14, 10]


def test_the_router_stays_in_fp32_and_the_reference_takes_its_side_in_a_near_tie() -> None:
    made = make_projector(FORM).cast(torch.bfloat16)
    assert (made.router.weight.dtype, made.experts.w_in.dtype) == (torch.float32, torch.bfloat16)
    parts = [x.bfloat16() for x in streams()]
    with torch.no_grad():
        made.router.weight[0, 1] = made.router.weight[0, 0] * (1 + 2e-7)  # two experts that no precision tells apart
    out, true = made(parts).detach(), made.reference(parts).detach()
    assert float((out - true).square().mean().sqrt() / true.square().mean().sqrt()) < 0.02


def test_the_reference_does_not_follow_a_wrong_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    made, parts = projector("jejr"), streams()
    true, chosen = made.reference(parts), made.route(parts)
    wrong = chosen._replace(expert=(chosen.expert + 1) % FORM.experts)
    monkeypatch.setattr(MixtureProjector, "_routed", lambda *_: wrong)
    assert torch.equal(made.reference(parts), true)
    assert not torch.allclose(made(parts), true, atol=0.1)


@pytest.mark.parametrize("kind", ["dense", *MIXTURES])
def test_weights_and_tensors_are_as_planned(kind: str) -> None:
    form = replace(FORM, kind=kind, experts=1 if kind == "dense" else 5, top_k=1 if kind == "dense" else 2)
    made = make_projector(form)
    assert sum(p.numel() for p in made.parameters()) == form.weights() == sum(w.size for w in layout_of(form))


@pytest.mark.parametrize("kind", ["dense", "loop"])
def test_flops_are_those_that_torch_counts(kind: str) -> None:
    """Of the kernels' operators it counts none, and they do the loop's products."""
    form = replace(FORM, kind=kind, top_k=1 if kind == "dense" else 2)
    made, parts = make_projector(form).cast(torch.float64), streams()
    with FlopCounterMode(display=False) as counter:
        made(parts)
    assert counter.get_total_flops() == 2 * 12 * form.flops_per_token()


def test_active_weights_are_k_experts_and_one_router_and_the_published_size() -> None:
    published = replace(FORM, inputs=1024, hidden=2048, outputs=2048, experts=4)
    assert published.expert_weights == 6_299_648
    assert published.flops_per_token() == 2 * 2 * (1024 * 2048 + 2048 * 2048) + 2 * 4 * 1024
    joint, disjoint = published, replace(published, kind="dedr")
    assert joint.active_weights() == disjoint.active_weights() == 2 * 6_299_648 + 4 * 1024
    assert disjoint.weights() == 2 * joint.weights()
    assert isinstance(make_projector(replace(FORM, kind="dense")), DenseProjector)


def test_the_weights_that_a_step_is_expected_to_read_grow_to_all_of_them() -> None:
    joint, disjoint, dense = FORM, replace(FORM, kind="dedr"), replace(FORM, kind="dense", experts=1, top_k=1)
    router = 12 * 5
    assert joint.read_weights([1, 0]) == pytest.approx(2 * joint.expert_weights + router)
    assert disjoint.read_weights([1, 1]) == pytest.approx(4 * joint.expert_weights + 2 * router)
    assert joint.read_weights([1, 1]) == pytest.approx((1 - (3 / 5) ** 2) * 5 * joint.expert_weights + router)
    for form in (joint, disjoint, dense):
        assert form.read_weights([10_000, 10_000]) == pytest.approx(form.weights())
