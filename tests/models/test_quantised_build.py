"""A packed model is made block by block: it never needs much more than its own bytes and one block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn
from transformers import AutoConfig

from effbench import registry
from effbench.models import weights
from effbench.models.storage import weight_bytes
from effbench.probes.tensors import TensorTracker

HIDDEN, WIDE, LAYERS = 256, 1024, 40  # so many that what a library needs for one matrix is small beside them


def config_of(dtype: str = "bfloat16") -> Any:
    config = AutoConfig.for_model(
        "llama", vocab_size=256, hidden_size=HIDDEN, intermediate_size=WIDE, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    config.dtype = dtype
    return config


def format_of(name: str) -> Callable[[nn.Module], None]:
    kind: Any = registry.technique(name)
    quantise: Callable[[nn.Module], None] = kind().quantise
    return quantise


def block_bytes() -> int:
    return 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * WIDE + 2 * HIDDEN)


@pytest.mark.parametrize("name", ["int4", "nf4", "int8"])
def test_the_peak_is_the_packed_size_and_one_block(name: str) -> None:
    with TensorTracker() as tracker:
        model = weights._drawn_block_by_block(config_of(), "cpu", [format_of(name)])
    final, peak = weight_bytes(model), tracker.peak_bytes
    print(f"{name}: final {final / 1e6:.2f} MB, peak {peak / 1e6:.2f} MB, one block in bf16 {block_bytes() / 1e6:.2f} MB")
    assert final < 0.62 * LAYERS * block_bytes()
    assert peak <= 1.15 * final + block_bytes()


def test_a_model_built_whole_first_needs_more_than_that() -> None:
    """The control: the same measurement on the way that was not taken."""
    with TensorTracker() as tracker:
        model = weights.new_model(config_of(), "cpu")
        for block in weights.blocks(model):
            format_of("nf4")(block)
    assert tracker.peak_bytes > 1.15 * weight_bytes(model) + block_bytes()
