"""Held-out text through a checkpoint's own tokenizer: a model that reads words makes nothing of bytes taken for tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from effbench.models import builders, checkpoints, text
from effbench.schema import ModelRef

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PIECE_BYTES = 512


@torch.no_grad()
def held_out(model: PreTrainedModel, ref: ModelRef, source: text.Text, *, num_bytes: int) -> dict[str, Any]:
    """Loss (nat/token), bits per byte, perplexity and next-token accuracy on pieces of held-out text, one at a time.

    A piece is at most 512 bytes, tokenised by itself. What its first token stands for is predicted by nothing and counts on no side.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoints.folder(ref))
    device, room = next(model.parameters()).device, int(getattr(model.config, "max_position_embeddings", PIECE_BYTES))
    loss, right, tokens, size = 0.0, 0, 0, 0
    for piece in source.validation(num_tokens=num_bytes, batch_size=1, seq_len=min(PIECE_BYTES, room)):
        words = piece[0, :-1].astype(np.uint8).tobytes().decode(errors="ignore")
        ids_1T = tokenizer(words, return_tensors="pt")["input_ids"][:, :room].to(device)
        with builders.mixed_precision(model):
            logits_TV = model(input_ids=ids_1T[:, :-1], use_cache=False).logits[0].float()
        target_T = ids_1T[0, 1:]
        loss += float(F.cross_entropy(logits_TV, target_T, reduction="sum"))
        right += int((logits_TV.argmax(-1) == target_T).sum())
        tokens += target_T.numel()
        size += len(words.encode()) - len(tokenizer.decode(ids_1T[0, :1], skip_special_tokens=True).encode())
    return {
        "validation_loss": loss / tokens,
        "bits_per_byte": loss / math.log(2) / size,
        "perplexity": math.exp(min(loss / tokens, 700.0)),
        "next_token_accuracy": right / tokens,
        "validation_tokens": tokens,
        "validation_bytes": size,
    }
