"""A Q-Former over windows: each window of encoder frames is read by its own queries, so the length falls by a fixed factor.

U-SAM (arXiv 2505.13880): windows of 17 frames that do not overlap, 1 query a window, 2 layers with cross-attention in each, width
768 over an encoder width of 2304. The layers are transformers' BLIP-2 Q-Former (arXiv 2301.12597), without dropout.

The tail that fills no window is dropped, as `unfold` drops it in the released code: 252 frames are 14 windows and not 15. A clip
that is shorter than one window is one window, with its missing frames masked out: it would be nothing at all.

Shapes: B clips, T frames, S encoder width, W windows, F frames of a window, Q queries, D width.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from effbench.modules.usam_forms import num_windows


class WindowQFormer(nn.Module):
    """(B, T, S) → (B, W·Q, D). Raises ValueError for no frames."""

    def __init__(
        self, encoder_width: int, width: int, *, layers: int = 2, window: int = 17, num_queries: int = 1, heads: int = 12
    ):
        super().__init__()
        config = Blip2QFormerConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            encoder_hidden_size=encoder_width,
            cross_attention_frequency=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.window = window
        self.query = nn.Parameter(torch.empty(1, num_queries, width))
        nn.init.normal_(self.query, std=config.initializer_range)
        self.former = Blip2QFormerModel(config)

    def forward(self, frames_BTS: torch.Tensor) -> torch.Tensor:
        """One row a query and window."""
        batch, frames, encoder_width = frames_BTS.shape
        windows = num_windows(frames, self.window)
        mask = None
        if frames < self.window:
            frames_BTS = F.pad(frames_BTS, (0, 0, 0, self.window - frames))
            mask = torch.arange(self.window, device=frames_BTS.device)[None].expand(batch, -1) < frames
        whole_BTS = frames_BTS[:, : windows * self.window]
        found = self.former(
            query_embeds=self.query.expand(batch * windows, -1, -1),
            encoder_hidden_states=whole_BTS.reshape(batch * windows, self.window, encoder_width),
            encoder_attention_mask=mask,
        )
        return found.last_hidden_state.reshape(batch, -1, self.query.shape[-1])
