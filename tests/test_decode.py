"""Decode engines and caches on a CPU: same tokens, right bytes, one stamp per token."""

from __future__ import annotations

import pytest
import torch

from effbench.models import builders
from effbench.workloads import _decode
from tests.factories import resolved

FAMILIES = ["tiny-llama", "tiny-qwen2", "tiny-mistral"]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return builders.build(resolved(request.param), trains=False, seed=1, device="cpu").model.eval()


def prompt(seed: int, tokens: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (2, tokens), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def test_the_static_step_makes_the_tokens_of_eager_decoding_request_after_request(model):
    engine = _decode.StaticEngine(model, 2, 48)
    for seed in (1, 2):
        expected = _decode.EagerEngine(model).generate(prompt(seed), 16, lambda: None)
        assert torch.equal(engine.generate(prompt(seed), 16, lambda: None), expected)


@torch.inference_mode()
def test_every_token_is_stamped_once(model):
    for engine in (_decode.EagerEngine(model), _decode.StaticEngine(model, 2, 48)):
        stamps: list[int] = []
        tokens = engine.generate(prompt(1), 7, lambda stamps=stamps: stamps.append(1))
        assert tokens.shape == (2, 7)
        assert len(stamps) == 7


@torch.inference_mode()
def test_cache_bytes_are_those_of_keys_and_values(model):
    engine = _decode.EagerEngine(model)
    engine.generate(prompt(1), 5, lambda: None)
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * 4
    assert _decode.cache_bytes(engine.cache) == per_token * 2 * (24 + 5 - 1)
    static = _decode.StaticEngine(model, 2, 24 + 5 - 1)
    static.generate(prompt(1), 5, lambda: None)
    assert _decode.cache_bytes(static.cache) == per_token * 2 * (24 + 5 - 1)
