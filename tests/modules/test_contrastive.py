"""U-SAM's semantic-aware contrastive loss against loops over clips, tokens and patches in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from effbench.modules.contrastive import SemanticContrastiveLoss
from effbench.modules.usam_forms import contrastive_flops, contrastive_weights

B, N, L, O, K = 3, 6, 4, 8, 5  # noqa: E741


def module() -> SemanticContrastiveLoss:
    torch.manual_seed(0)
    return SemanticContrastiveLoss(O, patches=K, narrow=3).double()


def inputs(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return torch.randn(B, N, O, dtype=torch.float64), torch.randn(B, L, O, dtype=torch.float64)


def cosine(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ y) / (x.norm() * y.norm())


def looped(model: SemanticContrastiveLoss, audio: torch.Tensor, text: torch.Tensor, other: list[int]) -> torch.Tensor:
    """The formulas of the reference, one number at a time."""
    first, _, second = model.importance
    importance = [
        [torch.sigmoid(second.weight[0] @ torch.relu(first.weight @ a + first.bias) + second.bias[0]) for a in audio[b]]
        for b in range(B)
    ]
    kinds = []
    for source in (text, audio):
        raw = [[cosine(a, sum(source[b]) / len(source[b])) for a in audio[b]] for b in range(B)]
        every = [value.item() for row in raw for value in row]
        low, high = (next(v for row in raw for v in row if v.item() == bound) for bound in (min(every), max(every)))
        kinds.append([[(value - low) / (high - low) for value in row] for row in raw])
    score = [[0.5 * importance[b][i] + 0.25 * (kinds[0][b][i] + kinds[1][b][i]) for i in range(N)] for b in range(B)]
    wide, _, spread = model.patches
    patches = []
    for b in range(B):
        kept = [a if score[b][i].item() > 0.5 else a * 0 for i, a in enumerate(audio[b])]
        sums = [torch.zeros(O, dtype=torch.float64) for _ in range(K)]
        for x in kept:
            centred = x - x.mean()
            normed = centred / torch.sqrt(centred.square().mean() + model.norm.eps) * model.norm.weight + model.norm.bias
            inner = wide.weight @ normed + wide.bias
            inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
            share = torch.softmax(spread.weight @ inner + spread.bias, 0)
            sums = [s + share[k] * x for k, s in enumerate(sums)]
        patches.append(sums)

    def agreement(b: int, t: int) -> torch.Tensor:
        table = [[patches[b][k] @ text[t][j] for j in range(L)] for k in range(K)]
        rows = sum(torch.stack(row).max() for row in table) / K
        columns = sum(torch.stack([table[k][j] for k in range(K)]).max() for j in range(L)) / L
        return 0.5 * (rows + columns)

    triplet = sum(torch.relu(0.2 + agreement(b, other[b]) - agreement(b, b)) for b in range(B)) / B
    mean = sum(value for row in score for value in row) / (B * N)
    found: torch.Tensor = triplet + (mean - 0.5) ** 2
    return found


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_loss_and_its_gradients_equal_the_loops(seed: int) -> None:
    model, (audio, text), other = module(), inputs(seed), [1, 2, 0]
    leaves = [audio.requires_grad_(), text.requires_grad_(), *model.parameters()]
    found, true = model(audio, text, torch.tensor(other)), looped(model, audio, text, other)
    torch.testing.assert_close(found, true, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(loss, leaves, allow_unused=True) for loss in (found, true)]
    for one, exact in zip(*grads, strict=True):
        assert one is not None
        torch.testing.assert_close(one, torch.zeros_like(one) if exact is None else exact, rtol=1e-9, atol=1e-11)


def test_every_weight_learns() -> None:
    model, (audio, text) = module(), inputs()
    model(audio, 0.1 * text, torch.tensor([1, 2, 0])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0, name


def test_scores_lie_between_0_and_1_and_move_with_the_importance() -> None:
    model, (audio, text) = module(), inputs()
    score = model.scores(audio, text)
    assert bool(((score >= 0) & (score <= 1)).all())
    with torch.no_grad():
        model.importance[2].bias.fill_(50.0)
    risen = model.scores(audio, text)
    assert bool((risen >= 0.5).all()) and bool((risen >= score).all())


def test_tokens_that_do_not_matter_change_nothing_but_the_share() -> None:
    model, (audio, text) = module(), inputs()
    score = model.scores(audio, text)
    dropped = (score <= 0.5).nonzero()[0]
    assert len(dropped)
    kept = audio * (score > 0.5)[..., None]
    assert float(kept[tuple(dropped)].abs().max()) == 0


def test_a_batch_of_equal_clips_has_the_margin_as_its_loss() -> None:
    model, (audio, text) = module(), inputs()
    audio, text = audio[:1].expand(B, -1, -1), text[:1].expand(B, -1, -1)
    share = (model.scores(audio, text).mean() - 0.5).square()
    torch.testing.assert_close(model(audio, text, torch.tensor([1, 2, 0])), 0.2 + share)


def test_one_clip_is_refused() -> None:
    audio, text = inputs()
    with pytest.raises(ValueError, match="one clip"):
        module()(audio[:1], text[:1], torch.tensor([0]))


def test_its_weights_are_those_of_the_released_module() -> None:
    with torch.device("meta"):
        model = SemanticContrastiveLoss(4096)
    assert sum(p.numel() for p in model.patches.parameters()) == 20_976_640  # "21.0M"
    assert model.importance[0].weight.shape == (1024, 4096)
    assert sum(p.numel() for p in model.parameters()) == sum(w.size for w in contrastive_weights(4096, 1024))


def test_flops_are_those_that_a_plan_knows() -> None:
    torch.manual_seed(0)
    model, (audio, text) = SemanticContrastiveLoss(O, patches=K).double(), inputs()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(audio, text, torch.tensor([1, 2, 0]))
    assert counter.get_total_flops() == contrastive_flops(O, K, B, N, L)
