"""Small models with a mixture of experts, and parameters of the technique `moe`, for the tests of several folders."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from effbench.models import builders
from effbench.modules.moe import MoEFeedForward
from effbench.planning import techniques
from effbench.schema import Spec
from tests.factories import resolved

SHAPES = ("tiny-llama", "tiny-qwen2", "tiny-mistral")
HIDDEN, WIDE = 128, 512  # of tiny-llama
GRIDS: list[dict[str, Any]] = [
    {},
    {"granularity": 1},
    {"experts": 16, "top_k": 4, "shared": 1, "granularity": 4},
    {"top_k": 8, "renorm": False, "score": "sigmoid"},
    {"every": 2},
]


def spec_of(shape: str, params: dict[str, Any], *others: str, workload: str = "generate", **model: Any) -> Spec:
    spec = resolved(shape, workload=workload, **model)
    stack = (("moe", params), *((name, {}) for name in others))
    return replace(spec, techniques=techniques(stack, "cpu"))


def build(spec: Spec, trains: bool = False) -> Any:
    found = builders.build(spec, trains=trains, seed=1, device="cpu")
    for technique in found.techniques:
        technique.trainable(found.model)
    return found.model


def layers_of(model: nn.Module) -> list[MoEFeedForward]:
    return [m for m in model.modules() if isinstance(m, MoEFeedForward)]


def some_ids(rows: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(7))
