"""NSA on memory that does not move decodes what the growing cache decodes, request after request."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from effbench.models import builders
from effbench.modules.nsa_cache import NSALayer
from effbench.modules.nsa_fixed import NSAFixedLayer
from effbench.schema import TechniqueRef
from effbench.workloads import _decode
from tests.factories import resolved

SMALL = {"groups": 2, "block": 8, "stride": 4, "select_block": 8, "num_selected": 4, "window": 8}
OTHER = {"groups": 4, "block": 6, "stride": 2, "select_block": 12, "num_selected": 3, "window": 13}
FAMILIES = ("tiny-llama", "tiny-qwen2", "tiny-mistral")


def build(family: str = "tiny-llama", **params: Any) -> Any:
    spec = resolved(family)
    ref = TechniqueRef(name="nsa", axis="attention", params=params)
    return builders.build(replace(spec, techniques=(ref, *spec.techniques)), trains=False, seed=1, device="cpu").model.eval()


def prompt(tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (2, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("params", [SMALL, OTHER, {**SMALL, "shared_kv": True}], ids=["small", "other", "shared"])
@pytest.mark.parametrize("length", [1, 5, 8, 31, 64])
@torch.inference_mode()
def test_every_step_gives_the_logits_of_the_growing_cache(params: dict[str, Any], length: int) -> None:
    model = build(**params).double()
    steps, ids = 40, prompt(length + 40)
    engine = _decode.StaticEngine(model, 2, length + steps)
    out = model(input_ids=ids[:, :length], use_cache=True)
    grown: DynamicCache = out.past_key_values
    engine._start(ids[:, length : length + 1], grown, length)
    for t in range(length, length + steps):
        place = torch.tensor([t])
        fixed = model(
            input_ids=ids[:, t : t + 1], position_ids=place[None], past_key_values=engine.cache, use_cache=True
        ).logits
        out = model(input_ids=ids[:, t : t + 1], past_key_values=grown, use_cache=True)
        torch.testing.assert_close(fixed, out.logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_the_static_engine_makes_the_tokens_of_the_eager_one_request_after_request(family: str) -> None:
    model = build(family, **SMALL)
    assert _decode.can_be_fixed(model, prompt(4))
    engine = _decode.StaticEngine(model, 2, 64)
    places = None
    for length, seed in ((40, 1), (12, 2), (45, 3)):  # a shorter request after a longer one must not see what is left of it
        expected = _decode.EagerEngine(model).generate(prompt(length, seed), 18, lambda: None)
        assert torch.equal(engine.generate(prompt(length, seed), 18, lambda: None), expected)
        now = [x.data_ptr() for layer in engine.cache.layers for x in (*layer.selected, *layer.compressed, *layer.raw)]
        assert places in (None, now), "a captured graph reads and writes the same memory for every request"
        places = now


@torch.inference_mode()
def test_its_bytes_are_those_of_its_room() -> None:
    model = build(**SMALL)
    engine = _decode.StaticEngine(model, 2, 50)
    engine.generate(prompt(30), 20, lambda: None)
    layer: NSAFixedLayer = engine.cache.layers[0]
    slots = 50 + layer.compressed[0].shape[2] + SMALL["window"] + SMALL["block"]  # type: ignore[index]
    assert _decode.cache_bytes(engine.cache) == model.config.num_hidden_layers * 2 * slots * layer.cost.groups * 2 * 16 * 4


def test_what_it_cannot_hold_is_refused() -> None:
    model = build(**SMALL)
    grown: list[NSALayer] = model(input_ids=prompt(20), use_cache=True).past_key_values.layers
    with pytest.raises(ValueError, match="20 tokens and the cache room for 19"):
        grown[0].fixed(19).fill(grown[0])
    real = torch.ones(2, 20, dtype=torch.long)
    real[0, :3] = 0
    padded = model(input_ids=prompt(20), attention_mask=real, use_cache=True).past_key_values.layers
    with pytest.raises(ValueError, match="use the eager engine"):
        padded[0].fixed(30).fill(padded[0])
