"""Pruning against a plain loop over tokens, and its limits: devices, distinct experts, identity, dropped pairs, gradients."""

import pytest
import torch
from effbench_kernels import POLICIES, in_order, prune, replicas, route, router_similarity
from hypothesis import given, settings
from hypothesis import strategies as st


def logits_of(tokens, num_experts, seed=0):
    return torch.randn(tokens, num_experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(scores, expert, place, limit, policy, similarity):
    """One token at a time, by the words of the paper."""
    chosen = []
    for t, row in enumerate(expert.tolist()):
        devices = []
        for e in row:
            if e >= 0 and place[e] not in devices and len(devices) < limit:
                devices.append(int(place[e]))
        used, out = set(row), []
        for e in row:
            if e >= 0 and place[e] not in devices:
                liking = scores[t] if policy == "score" else similarity[e]
                free = [other for other in range(len(place)) if place[other] in devices and other not in used]
                e = max(free, key=lambda other: (float(liking[other]), -other))
                used.add(e)
            out.append(e)
        chosen.append(out)
    return torch.tensor(chosen).view(expert.shape)


@st.composite
def cases(draw):
    num_experts = draw(st.integers(2, 12))
    num_devices = draw(st.integers(1, num_experts))
    limit = draw(st.integers(1, num_devices))
    k = draw(st.integers(1, limit * (num_experts // num_devices)))
    logits = logits_of(draw(st.integers(0, 12)), num_experts, draw(st.integers(0, 99)))
    order = torch.randperm(num_experts, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return logits, in_order(num_experts, num_devices)[order], num_devices, limit, k, draw(st.sampled_from([0.0, 0.25]))


@settings(max_examples=100, deadline=None)
@given(cases(), st.sampled_from(POLICIES), st.booleans())
def test_against_a_plain_loop_and_within_the_limits(case, policy, renorm):
    logits, place, num_devices, limit, k, drop = case
    scores, routing = torch.softmax(logits, -1), route(logits, k, renorm=renorm)
    dropped = torch.rand(routing.expert.shape, generator=torch.Generator().manual_seed(k)) < drop
    expert, weight = routing.expert.masked_fill(dropped, -1), 3 * routing.weight.masked_fill(dropped, 0)  # no scores
    similarity = router_similarity(logits_of(50, len(place), 1))
    found = prune(scores, expert, weight, place, limit, policy, similarity, renorm)
    assert torch.equal(found.expert, plain(scores, expert, place, limit, policy, similarity))
    assert torch.equal(found.expert == -1, dropped)
    assert (replicas(found.expert, place, num_devices) <= limit).all()
    for row, before in zip(found.expert.tolist(), expert.tolist(), strict=True):
        kept = [e for e in row if e >= 0]
        assert len(set(kept)) == len(kept) == sum(e >= 0 for e in before)
    same = (found.expert == expert).all(1)
    assert torch.equal(found.weight[same], weight[same]), "tokens that fit keep their weights bit for bit"
    assert not found.weight[found.expert == -1].any()


@pytest.mark.parametrize("policy", POLICIES)
def test_with_all_devices_allowed_nothing_changes(policy):
    logits = logits_of(40, 12)
    routing, similarity = route(logits, 4), router_similarity(logits)
    for allowed in (4, 9):
        found = prune(torch.softmax(logits, -1), *routing, in_order(12, 4), allowed, policy, similarity)
        assert torch.equal(found.expert, routing.expert) and torch.equal(found.weight, routing.weight)


def test_new_weights_are_scores_and_renormalised_where_the_router_does():
    logits = logits_of(60, 12)
    scores, place = torch.softmax(logits, -1), in_order(12, 4)
    plain_weight = prune(scores, *route(logits, 4), place, 2)
    assert torch.equal(plain_weight.weight, scores.gather(1, plain_weight.expert))
    renormed = prune(scores, *route(logits, 4, renorm=True, scale=2.5), place, 2, renorm=True, scale=2.5)
    assert torch.allclose(renormed.weight.sum(1), torch.full((60,), 2.5, dtype=torch.float64), atol=1e-12)
    without = prune(scores, route(logits, 4).expert, None, place, 2)
    assert torch.equal(without.weight, plain_weight.weight)
    assert (prune(scores, route(logits, 4).expert, None, place, 4).weight == route(logits, 4).weight).all()


def test_by_score_the_best_experts_on_the_fixed_devices_are_left():
    logits, place = logits_of(200, 16), in_order(16, 4)
    scores, routing = torch.softmax(logits, -1), route(logits, 4)
    found = prune(scores, *routing, place, 2)
    for t in range(200):
        fixed = list(dict.fromkeys(place[routing.expert[t]].tolist()))[:2]
        inside = [e for e in range(16) if int(place[e]) in fixed]
        assert set(found.expert[t].tolist()) == set(sorted(inside, key=lambda e: -scores[t, e])[:4])


def test_by_similarity_the_likest_expert_stands_in():
    place = torch.tensor([0, 0, 1, 1])
    scores = torch.tensor([[0.5, 0.02, 0.4, 0.08]])
    expert = torch.tensor([[0, 2]])
    similarity = torch.eye(4)
    similarity[2, 1] = 0.1
    assert prune(scores, expert, None, place, 1, "similarity", similarity).expert.tolist() == [[0, 1]]
    similarity[2, 3] = 0.9  # more alike, on the device that is out
    assert prune(scores, expert, None, place, 1, "similarity", similarity).expert.tolist() == [[0, 1]]


def test_a_dropped_pair_fixes_no_device():
    scores = torch.softmax(logits_of(1, 9), -1)
    found = prune(scores, torch.tensor([[-1, 3, 6]]), None, in_order(9, 3), 1)
    assert found.expert.tolist() in ([[-1, 3, 4]], [[-1, 3, 5]])
    assert found.weight[0, 0] == 0


def test_equal_scores_give_the_lowest_expert():
    scores = torch.full((3, 6), 1 / 6)
    expert = torch.tensor([[5, 0], [0, 5], [3, 1]])
    found = prune(scores, expert, None, torch.tensor([0, 0, 0, 1, 1, 1]), 1)
    assert found.expert.tolist() == [[5, 3], [0, 1], [3, 4]]


def test_gradients_reach_the_router_through_kept_and_new_weights():
    logits = logits_of(30, 12).requires_grad_()
    routing = route(logits, 4)
    found = prune(torch.softmax(logits, -1), *routing, in_order(12, 4), 1 + 1)
    (found.weight * torch.arange(1, 5)).sum().backward()
    plain_logits = logits.detach().clone().requires_grad_()
    (torch.softmax(plain_logits, -1).gather(1, found.expert) * torch.arange(1, 5)).sum().backward()
    assert torch.allclose(logits.grad, plain_logits.grad, atol=1e-15)


def test_similarity_by_hand_and_over_batches():
    logits = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 3.0], [1.0, -1.0, 1.0], [1.0, -1.0, 0.0]])
    found = router_similarity(logits)
    assert found.dtype == torch.float64
    assert found[0, 1] == pytest.approx(0.0, abs=1e-12)
    assert found[0, 2] == pytest.approx((1 / (3**0.5 * 10**0.5)) ** 2)
    by_batch = router_similarity(logits, batch_tokens=2)
    assert torch.allclose(by_batch, (router_similarity(logits[:2]) + router_similarity(logits[2:])) / 2)
    assert torch.equal(found, found.T) and float(found.max()) <= 1 + 1e-12
    assert not router_similarity(torch.zeros(4, 3)).isnan().any(), "an expert without logits is like none"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"devices_allowed": 1}, "1 allowed devices hold 3 experts, and a token needs 4; allow more devices"),
        ({"devices_allowed": 0}, "devices_allowed must be at least 1, got 0"),
        ({"policy": "best"}, "policy must be one of score, similarity, got 'best'"),
        ({"policy": "similarity"}, "needs a similarity"),
        ({"policy": "similarity", "similarity": torch.zeros(3, 3)}, r"similarity must have shape \(12, 12\)"),
        ({"scores": torch.zeros(5, 11)}, r"scores must have shape \(5, 12\), got \(5, 11\)"),
        ({"weight": torch.zeros(5, 3)}, r"weight must have shape \(5, 4\), got \(5, 3\)"),
        ({"place": torch.zeros(12, dtype=torch.int64).index_fill(0, torch.tensor([0]), 1)}, "may differ by one"),
    ],
)
def test_bad_input_is_refused(change, sentence):
    routing = route(logits_of(5, 12), 4)
    given_ = {"scores": torch.softmax(logits_of(5, 12), -1), "expert": routing.expert, "weight": routing.weight}
    with pytest.raises(ValueError, match=sentence):
        prune(**{**given_, "place": in_order(12, 4), "devices_allowed": 2, **change})


def test_similarity_needs_tokens():
    with pytest.raises(ValueError, match="needs tokens"):
        router_similarity(torch.zeros(0, 4))
