"""Routers against rows worked out by hand, sets found by brute force, and the formulas of the papers."""

import math

import pytest
import torch
from effbench_kernels import Groups, load_balance_loss, route, z_loss

LOGITS = torch.log(torch.tensor([[1.0, 4.0, 3.0, 2.0], [8.0, 1.0, 0.5, 0.5]], dtype=torch.float64))  # rows sum to 10


def random_logits(tokens=40, experts=12, seed=0):
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def test_softmax_by_hand():
    routing = route(LOGITS, 2)
    assert routing.expert.tolist() == [[1, 2], [0, 1]]
    assert torch.allclose(routing.weight, torch.tensor([[0.4, 0.3], [0.8, 0.1]], dtype=torch.float64), atol=1e-12)


def test_renormalised_softmax_is_a_softmax_over_the_best():
    logits = random_logits()
    best, index = logits.topk(3)
    routing = route(logits, 3, renorm=True, scale=2.5)
    assert torch.equal(routing.expert, index)
    assert torch.allclose(routing.weight, 2.5 * torch.softmax(best, -1), atol=1e-12)


def test_sigmoid_by_hand():
    routing = route(LOGITS, 2, score="sigmoid")  # sigmoid(log a) = a / (1 + a)
    assert torch.allclose(routing.weight[0], torch.tensor([4 / 5, 3 / 4], dtype=torch.float64), atol=1e-12)
    renormed = route(LOGITS, 2, score="sigmoid", renorm=True).weight
    assert torch.allclose(renormed.sum(-1), torch.ones(2, dtype=torch.float64), atol=1e-12)


def test_the_bias_moves_the_choice_and_never_the_weights():
    bias = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64, requires_grad=True)
    logits = LOGITS.clone().requires_grad_()
    routing = route(logits, 2, bias=bias)
    assert routing.expert.tolist() == [[0, 1], [0, 1]]
    assert torch.allclose(routing.weight[0], torch.tensor([0.1, 0.4], dtype=torch.float64), atol=1e-12)
    routing.weight.sum().backward()
    assert bias.grad is None and logits.grad is not None


def brute_groups(choice_E, count, keep, by, k):
    """The experts of one token by the words of the papers."""
    size = len(choice_E) // count
    groups = [list(range(g * size, (g + 1) * size)) for g in range(count)]
    taken = 1 if by == "max" else 2
    ranks = [sum(sorted((choice_E[e] for e in group), reverse=True)[:taken]) for group in groups]
    kept = sorted(range(count), key=lambda g: -ranks[g])[:keep]
    return sorted((e for g in kept for e in groups[g]), key=lambda e: -choice_E[e])[:k]


@pytest.mark.parametrize(("score", "by"), [("softmax", "max"), ("sigmoid", "top2")])
@pytest.mark.parametrize("keep", [1, 2, 4])
def test_group_limited_routing_against_brute_force(keep, score, by):
    logits = random_logits()
    bias = random_logits(1, seed=9)[0] * 0.1
    scores = torch.softmax(logits, -1) if score == "softmax" else torch.sigmoid(logits)
    routing = route(logits, 3, score=score, bias=bias, groups=Groups(4, keep, by), renorm=True, scale=2.5)
    for t in range(40):
        want = brute_groups((scores[t] + bias).tolist(), 4, keep, by, 3)
        assert routing.expert[t].tolist() == want
        weight = scores[t, want]
        assert torch.allclose(routing.weight[t], 2.5 * weight / weight.sum(), atol=1e-12)


def test_masks_by_expert_and_by_device():
    logits = random_logits()
    allow = torch.rand(40, 12, generator=torch.Generator().manual_seed(2)) < 0.6
    allow[:, :3] = True
    routing = route(logits, 3, allow=allow)
    scores = torch.softmax(logits, -1)
    for t in range(40):
        want = sorted((e for e in range(12) if allow[t, e]), key=lambda e: -logits[t, e])[:3]
        assert routing.expert[t].tolist() == want
        assert torch.allclose(routing.weight[t], scores[t, want], atol=1e-12)
    devices = torch.zeros(40, 4, dtype=torch.bool)
    devices[:, 2] = True
    routing = route(logits, 2, allow=devices)
    assert set(routing.expert.unique().tolist()) <= {6, 7, 8}


def test_too_few_allowed_experts_drop_the_rest():
    allow = torch.tensor([[False, False, True, False], [False] * 4])
    routing = route(LOGITS.clone().requires_grad_(), 2, allow=allow, renorm=True)
    assert routing.expert.tolist() == [[2, -1], [-1, -1]]
    assert torch.allclose(routing.weight, torch.tensor([[1.0, 0], [0, 0]], dtype=torch.float64), atol=1e-12)
    routing.weight.sum().backward()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renorm", [False, True])
def test_routing_gradcheck(renorm, score):
    logits = random_logits(5, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: route(z, 3, score=score, renorm=renorm, scale=1.5).weight, logits)


def test_all_experts_and_low_precision():
    logits = random_logits().to(torch.bfloat16)
    routing = route(logits, 12)
    assert routing.weight.dtype == torch.float32
    assert torch.equal(routing.expert.sort().values, torch.arange(12).expand(40, 12))
    assert torch.allclose(routing.weight.sum(-1), torch.ones(40))
    assert route(torch.zeros(0, 4), 2).expert.shape == (0, 2)


def test_load_balance_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]], dtype=torch.float64))
    index = torch.tensor([[0, 1], [1, -1]])  # f = 1/4, 2/4, 0; P = 3/8, 3/8, 1/4
    assert load_balance_loss(logits, index).item() == pytest.approx(3 * (1 / 4 * 3 / 8 + 1 / 2 * 3 / 8), rel=1e-12)
    even = torch.zeros(6, 3, dtype=torch.float64)
    assert load_balance_loss(even, torch.arange(6)[:, None] % 3).item() == pytest.approx(1, rel=1e-12)
    collapsed = torch.tensor([[60.0, 0, 0, 0]] * 5, dtype=torch.float64)
    assert load_balance_loss(collapsed, torch.zeros(5, 1, dtype=torch.int64)).item() == pytest.approx(4, rel=1e-12)
    share = torch.sigmoid(logits)
    share = (share / share.sum(-1, keepdim=True)).mean(0)
    want = 3 * (share[0] / 4 + share[1] / 2).item()
    assert load_balance_loss(logits, index, score="sigmoid").item() == pytest.approx(want, rel=1e-12)


def test_z_loss_by_hand():
    assert z_loss(LOGITS).item() == pytest.approx(math.log(10) ** 2, rel=1e-12)
    assert z_loss(torch.tensor([[1e4, 1e4]])).item() == pytest.approx((1e4 + math.log(2)) ** 2, rel=1e-5)


def test_losses_are_differentiable_and_zero_without_tokens():
    logits = random_logits(4, 3).requires_grad_()
    index = torch.tensor([[0, 1]] * 4)
    assert torch.autograd.gradcheck(z_loss, logits)
    assert torch.autograd.gradcheck(lambda z: load_balance_loss(z, index), logits)
    none = torch.zeros(0, 3)
    assert z_loss(none) == 0 and load_balance_loss(none, torch.zeros(0, 2, dtype=torch.int64)) == 0


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"k": 0}, ValueError, "k must lie between 1 and the 4 experts, got 0"),
        ({"k": 5}, ValueError, "k must lie between 1 and the 4 experts, got 5"),
        ({"score": "relu"}, ValueError, "score must be one of softmax, sigmoid"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias must have shape \(4,\)"),
        ({"groups": (3, 1)}, ValueError, "1 of 3 groups cannot give 2 of 4 experts"),
        ({"groups": (4, 1)}, ValueError, "1 of 4 groups cannot give 2 of 4 experts"),
        ({"groups": (2, 1, "mean")}, ValueError, "groups are ranked by"),
        ({"allow": torch.ones(2, 3, dtype=torch.bool)}, ValueError, "allow must have shape"),
        ({"allow": torch.ones(2, 4)}, TypeError, "allow must be bool"),
    ],
)
def test_bad_options_are_refused(options, kind, words):
    with pytest.raises(kind, match=words):
        route(LOGITS, **({"k": 2} | options))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(value):
    logits = LOGITS.clone()
    logits[1, 2] = value
    for call in (lambda: route(logits, 2), lambda: z_loss(logits), lambda: load_balance_loss(logits, torch.zeros(2, 1).long())):
        with pytest.raises(ValueError, match="hold NaN or infinity"):
            call()


def test_logits_of_another_shape_or_type_are_refused():
    with pytest.raises(ValueError, match=r"logits must have shape \(tokens, experts\)"):
        route(LOGITS[0], 2)
    with pytest.raises(TypeError, match="logits must be floating"):
        route(torch.zeros(2, 4, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match="index has 1 tokens, logits have 2"):
        load_balance_loss(LOGITS, torch.zeros(1, 1, dtype=torch.int64))
