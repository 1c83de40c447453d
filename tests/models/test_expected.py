"""The formulas of costs.py against what runs: cache bytes by storages, FLOPs as torch counts them, plan against built model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from effbench.costs import NSACost, SoftmaxCost
from effbench.models import builders
from effbench.models.context import expected_cost
from effbench.schema import Spec
from effbench.workloads import _decode
from tests.factories import resolved

SHAPES = ("tiny-llama", "tiny-qwen2", "tiny-mistral")
ATTENTION = ("mha", "gqa", "mqa", "mla", "nsa")
PROMPT, NEW = 90, 11
POSITIONS = PROMPT + NEW - 1


def spec_of(shape: str, *stack: str) -> Spec:
    spec = resolved(shape, *stack)
    return replace(spec, params={**spec.params, "prompt_tokens": PROMPT, "new_tokens": NEW})


def build(shape: str, *stack: str) -> Any:
    return builders.build(spec_of(shape, *stack), trains=False, seed=1, device="cpu").model.eval()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("technique", ATTENTION)
def test_counted_flops_of_a_decode_step_are_the_expected_ones(technique: str, shape: str) -> None:
    model = build(shape, technique)
    prompt = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(1))
    counted = _decode.counted_flops(model, prompt, POSITIONS)
    expected = builders.expected_decode(model, POSITIONS)["decode_flops"]
    print(f"{technique} {shape}: counted {counted}, expected {expected:.0f}")
    # NSA's products are over whole blocks and padded shapes, and a block is compressed at once and not a share a token.
    assert counted == pytest.approx(expected, rel=0.05 if technique == "nsa" else 0.005)


@pytest.mark.parametrize("technique", ATTENTION)
def test_a_cache_holds_the_expected_bytes(technique: str) -> None:
    model = build("tiny-llama", technique, "bf16")
    engine = _decode.EagerEngine(model)
    with torch.inference_mode():
        engine.generate(torch.zeros(2, PROMPT, dtype=torch.long), NEW, lambda: None)
    expected = 2 * POSITIONS * builders.expected_decode(model, POSITIONS)["kv_cache_bytes_per_token"]
    held = _decode.cache_bytes(engine.cache)
    if technique == "nsa":  # its memory grows in chunks: never less than what is kept, and bounded
        used = sum(layer.used_bytes() for layer in engine.cache.layers)
        assert used == pytest.approx(expected, rel=1e-9)
        assert expected <= held <= 1.5 * expected
    else:
        assert held == expected


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stack", [(t,) for t in ATTENTION] + [("mla", "bf16"), ("mamba",), ("rwkv", "bf16")], ids="+".join)
def test_the_plan_says_what_the_built_model_says(stack: tuple[str, ...], shape: str) -> None:
    planned, built = expected_cost(spec_of(shape, *stack)), builders.expected_decode(build(shape, *stack), POSITIONS)
    if stack[0] not in ("mamba", "rwkv"):  # a state in fp32 has more bytes than elements of the compute dtype
        assert planned["kv_cache_bytes_per_token"] == pytest.approx(built["kv_cache_bytes_per_token"])
    assert planned["cache_read_bytes_per_token"] == pytest.approx(built["cache_read_bytes"])
    assert planned["source"]


@pytest.mark.parametrize("tokens", [1, 7, 8, 40, 301])
def test_the_mean_over_a_sequence_is_the_mean_of_its_positions(tokens: int) -> None:
    sparse = NSACost(
        hidden=64, heads=4, groups=2, key_dim=16, value_dim=16, block=8, stride=4, select_block=16, num_selected=4, window=32
    )
    windowed = SoftmaxCost(hidden=64, heads=4, groups=4, dim=16, window=20)
    for cost in (sparse, windowed, replace(windowed, window=None)):
        mean = sum(cost.score_flops(s) for s in range(1, tokens + 1)) / tokens
        assert cost.mean_score_flops(tokens) == pytest.approx(mean)


def test_training_reads_no_cache() -> None:
    planned = expected_cost(resolved("tiny-llama", "mla", workload="pretrain"))
    assert planned["kv_cache_bytes_per_token"] is None
    assert planned["mixer_flops_per_token"] > 0
