"""U-SAM's semantic-aware contrastive loss: which audio tokens matter, and that they match their own text better than another's.

U-SAM (arXiv 2505.13880) and its released code, training only, for audio tokens a (N) and text tokens T (L) of each of B clips:

    p = σ(W₂ relu(W₁ a))                                  importance, one number a token
    s = ½ p + ¼ (cos(a, mean T) + cos(a, mean a))         each cosine scaled to [0, 1] by its extremes over the batch
    x = a · 1[s > ½]
    C = softmax_K(MLP(LN x))ᵀ x                           K patches, each a sum of tokens
    A(C, T) = ½ (mean_i max_j C_i·T_j + mean_j max_i C_i·T_j)
    L = mean relu(0.2 + A(C, T of another clip) − A(C, T)) + (mean s − ½)²

Not known, and chosen here: the means of a and T are those of the own clip, and the mean of s is over the batch; the MLP is
Linear(O, O), GELU, Linear(O, K), which has the 21.0M weights that the released module has at O = 4096 and K = 1024. The step
1[s > ½] has no gradient: W₁ and W₂ learn by the last term alone.

Shapes: B clips, N audio tokens, L text tokens, O width of the language model, K patches.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

MARGIN, THRESHOLD, RATIO = 0.2, 0.5, 0.5
TINY = 1e-8


class SemanticContrastiveLoss(nn.Module):
    """(B, N, O), (B, L, O) → a scalar. Raises ValueError for one clip, which has no other's text."""

    def __init__(self, width: int, *, patches: int = 1024, narrow: int | None = None):
        super().__init__()
        narrow = narrow or max(1, width // 4)
        self.importance = nn.Sequential(nn.Linear(width, narrow), nn.ReLU(), nn.Linear(narrow, 1))
        self.norm = nn.LayerNorm(width)
        self.patches = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, patches))

    def forward(self, audio_BNO: torch.Tensor, text_BLO: torch.Tensor, other_B: torch.Tensor) -> torch.Tensor:
        """`other_B`: for each clip the clip whose text is its negative."""
        if len(audio_BNO) < 2:
            raise ValueError("one clip has no other's text to be told from; give two or more")
        score_BN = self.scores(audio_BNO, text_BLO)
        kept_BNO = audio_BNO * (score_BN > THRESHOLD)[..., None]
        share_BNK = self.patches(self.norm(kept_BNO)).softmax(-1)
        patch_BKO = share_BNK.transpose(1, 2) @ kept_BNO
        own_B, other = alignment(patch_BKO, text_BLO), alignment(patch_BKO, text_BLO[other_B])
        return F.relu(MARGIN + other - own_B).mean() + (score_BN.mean() - RATIO).square()

    def scores(self, audio_BNO: torch.Tensor, text_BLO: torch.Tensor) -> torch.Tensor:
        """s (B, N)."""
        importance_BN = self.importance(audio_BNO)[..., 0].sigmoid()
        by_text, by_audio = (
            _scaled(F.cosine_similarity(audio_BNO, other.mean(1, keepdim=True), dim=-1)) for other in (text_BLO, audio_BNO)
        )
        return 0.5 * importance_BN + 0.25 * (by_text + by_audio)


def alignment(patch_BKO: torch.Tensor, text_BLO: torch.Tensor) -> torch.Tensor:
    """A (B,): how well the best matches of patches and text tokens agree, both ways."""
    match_BKL = patch_BKO @ text_BLO.transpose(1, 2)
    return 0.5 * (match_BKL.amax(2).mean(1) + match_BKL.amax(1).mean(1))


def _scaled(values: torch.Tensor) -> torch.Tensor:
    low, high = values.amin(), values.amax()
    return (values - low) / (high - low).clamp_min(TINY)
