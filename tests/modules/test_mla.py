"""Multi-head latent attention against float64 loops, its cache, its two forms, and whole models with it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from effbench.costs import MLACost
from effbench.models import builders
from effbench.modules.mla import MLAAttention, softmax_visible
from effbench.modules.replace import initialise
from effbench.technique import Context
from effbench.techniques.mla import MLA, MLAParams
from effbench.workloads import _decode
from tests.factories import resolved
from tests.modules.mla_reference import latent_attention

BASE = 10000.0
COST = MLACost(hidden=24, heads=3, dim=6, value_dim=6, q_rank=10, kv_rank=8, rope_dim=4)
FAMILIES = ("tiny-llama", "tiny-qwen2", "tiny-mistral")


def layer(cost: MLACost = COST, backend: str = "sdpa") -> MLAAttention:
    torch.manual_seed(0)
    config = SimpleNamespace(rms_norm_eps=1e-5, _attn_implementation=backend)
    module = MLAAttention(config, 0, cost)
    initialise(module, 0.3)
    for part in module.modules():
        if isinstance(part, nn.RMSNorm):
            nn.init.uniform_(part.weight, 0.5, 1.5)  # a weight of one would hide a norm that is left out
    return module.double()


def positions(rope_dim: int, starts: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (1, T, R) in float64, from the definition."""
    inv = BASE ** (-torch.arange(0, rope_dim, 2, dtype=torch.float64) / rope_dim)
    angles = torch.arange(starts, starts + length, dtype=torch.float64)[:, None] * inv
    both = torch.cat([angles, angles], dim=-1)[None]
    return both.cos(), both.sin()


def hidden(batch: int, length: int) -> torch.Tensor:
    return torch.randn(batch, length, COST.hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def run(module: MLAAttention, x: torch.Tensor, cache: Any = None, start: int = 0, mask: Any = None) -> torch.Tensor:
    return module(x, positions(module.cost.rope_dim, start, x.shape[1]), mask, cache)[0]


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 7), (3, 2), (2, 13)])
def test_forward_and_gradients_are_those_of_the_formulas(backend: str, batch: int, length: int) -> None:
    module, x = layer(backend=backend), hidden(batch, length).requires_grad_()
    weight = torch.randn(batch, length, COST.hidden, dtype=torch.float64)
    mask = None if backend == "sdpa" else torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    out = run(module, x, mask=mask)
    expected = torch.stack([latent_attention(module, row, BASE) for row in x])
    exact = backend == "sdpa"  # the library's eager attention takes its softmax in fp32
    torch.testing.assert_close(out, expected, rtol=1e-10 if exact else 1e-4, atol=1e-12 if exact else 1e-5)
    wanted = [x, *module.parameters()]
    got, right = (torch.autograd.grad((o * weight).sum(), wanted) for o in (out, expected))
    for one, two in zip(got, right, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8 if exact else 1e-3, atol=1e-10 if exact else 1e-4)


def test_keys_and_values_may_have_widths_of_their_own() -> None:
    module = layer(MLACost(hidden=24, heads=2, dim=5, value_dim=9, q_rank=7, kv_rank=11, rope_dim=2))
    x = hidden(1, 6)
    torch.testing.assert_close(run(module, x)[0], latent_attention(module, x[0], BASE), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunks", [(1,) * 9, (5, 1, 1, 2), (4, 3, 2)])
def test_cached_steps_equal_the_full_forward_and_absorb(chunks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, cache, start = layer(), hidden(2, 9), DynamicCache(), 0
    full = run(module, x)
    expansions: list[int] = []
    inner = module._expanded
    monkeypatch.setattr(module, "_expanded", lambda *a, **k: expansions.append(1) or inner(*a, **k))
    for size in chunks:
        out = run(module, x[:, start : start + size], cache, start)
        torch.testing.assert_close(out, full[:, start : start + size], rtol=1e-10, atol=1e-12)
        start += size
    assert len(expansions) == 1, "only the first chunk, which has no prefix, may expand"


def test_many_new_tokens_expand_the_prefix_where_that_is_cheaper() -> None:
    module = layer(MLACost(hidden=24, heads=3, dim=6, value_dim=6, q_rank=10, kv_rank=20, rope_dim=4))
    assert module._absorbs(1, 100, None)
    assert module._absorbs(8, 100, None)  # 8 × (40 − 12) < 20 × 12
    assert not module._absorbs(9, 100, None)
    assert not module._absorbs(100, 100, None), "nothing is cached"


def test_the_cache_holds_the_latents_and_nothing_else() -> None:
    module, cache = layer(), DynamicCache()
    with torch.inference_mode():
        run(module, hidden(2, 11), cache)
        run(module, hidden(2, 1), cache, 11)
    assert _decode.cache_bytes(cache) == 2 * 12 * (COST.kv_rank + COST.rope_dim) * 8
    assert COST.cache_elements(12) == 12 * (COST.kv_rank + COST.rope_dim)


def test_a_future_token_changes_nothing_before_it() -> None:
    module, x = layer(), hidden(1, 10)
    other = x.clone()
    other[:, 6] += 1.0
    one, two = run(module, x), run(module, other)
    assert torch.equal(one[:, :6], two[:, :6])
    assert not torch.allclose(one[:, 6], two[:, 6])


def test_every_form_of_mask_says_the_same() -> None:
    scores = torch.randn(2, 3, 2, 5, dtype=torch.float64)
    real = torch.tensor([[True] * 5, [False, False, True, True, True]])
    allowed = torch.tensor([[True, True, True, True, False], [True] * 5]) & real[:, None, None]
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    expected = torch.softmax(scores.masked_fill(~allowed, -torch.inf), dim=-1)
    for mask in (real, allowed, additive):
        torch.testing.assert_close(softmax_visible(scores, mask), expected)
    torch.testing.assert_close(softmax_visible(scores[:1], None), softmax_visible(scores[:1], real[:1]))


def test_an_adapter_on_the_expansion_takes_part_in_the_absorbed_form() -> None:
    """The absorbed weights are read from the layer's function, not from a weight that an adapter leaves behind."""

    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear):
            super().__init__()
            self.base, self.weight = base, base.weight
            self.change = nn.Parameter(torch.randn_like(base.weight))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + x @ self.change.T

    module, x, cache = layer(), hidden(1, 6), DynamicCache()
    module.kv_b_proj = Adapted(module.kv_b_proj)  # type: ignore[assignment]
    full = run(module, x)
    parts = [run(module, x[:, t : t + 1], cache, t) for t in range(6)]
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("absorbed", [False, True])
@torch.inference_mode()
def test_half_precision_stays_near_float64(absorbed: bool) -> None:
    """bf16 keeps 8 bits: outputs differ by about 1 % of their size (root mean square), in either form."""
    exact, x = layer(), hidden(2, 33)
    half = layer().to(torch.bfloat16)
    expected = run(exact, x)
    cos, sin = (p.to(torch.bfloat16) for p in positions(COST.rope_dim, 0, 33))
    if absorbed:
        cache = DynamicCache()
        parts = [half(x[:, t : t + 1].bfloat16(), (cos[:, t : t + 1], sin[:, t : t + 1]), None, cache)[0] for t in range(33)]
        out = torch.cat(parts, dim=1)
    else:
        out = half(x.bfloat16(), (cos, sin))[0]
    error = float((out.double() - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt())
    print(f"bf16 {'absorbed' if absorbed else 'expanded'}: {error:.4f}")
    assert error < 0.02


def built(model: str) -> Any:
    return builders.build(resolved(model, "mla"), trains=False, seed=1, device="cpu").model.eval()


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_left_padding_changes_nothing(family: str) -> None:
    model = built(family)
    ids_BT = torch.randint(0, 256, (2, 14), generator=torch.Generator().manual_seed(2))
    real_BT = torch.ones(2, 14, dtype=torch.long)
    real_BT[1, :5] = 0
    places_BT = (real_BT.cumsum(1) - 1).clamp(min=0)
    alone = model(input_ids=ids_BT[1:, 5:], use_cache=False).logits
    whole = model(input_ids=ids_BT, attention_mask=real_BT, position_ids=places_BT, use_cache=False).logits
    torch.testing.assert_close(whole[1:, 5:], alone, rtol=1e-4, atol=1e-4)
    out = model(input_ids=ids_BT[:, :10], attention_mask=real_BT[:, :10], position_ids=places_BT[:, :10], use_cache=True)
    for t in range(10, 14):
        out = model(
            input_ids=ids_BT[:, t : t + 1], attention_mask=real_BT[:, : t + 1], position_ids=places_BT[:, t : t + 1],
            past_key_values=out.past_key_values, use_cache=True,
        )  # fmt: skip
        torch.testing.assert_close(out.logits[1, 0], alone[0, t - 5], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_static_cache_holds_it_too(family: str) -> None:
    model = built(family)
    prompt = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(4))
    assert _decode.can_be_fixed(model, prompt)
    static = _decode.StaticEngine(model, 2, 12 + 5 - 1)
    tokens = static.generate(prompt, 5, lambda: None)
    assert torch.equal(tokens, _decode.EagerEngine(model).generate(prompt, 5, lambda: None))
    per_token = model.model.layers[0].self_attn.cost.cache_elements(1) * model.config.num_hidden_layers * 4
    assert _decode.cache_bytes(static.cache) == per_token * 2 * (12 + 5 - 1)


def test_the_rotary_module_has_the_width_of_the_decoupled_part() -> None:
    model = built("tiny-llama")
    assert isinstance(model.model.rotary_emb, LlamaRotaryEmbedding)
    assert model.model.rotary_emb.inv_freq.numel() == model.model.layers[0].self_attn.cost.rope_dim // 2
    assert model.config.head_dim == 16, "the model's own head dimension is untouched"


def test_a_checkpoint_saves_and_loads(tmp_path: Path) -> None:
    one, two = built("tiny-llama"), built("tiny-llama")
    with torch.no_grad():
        for p in one.parameters():
            p.add_(0.01)
    save_model(one, str(tmp_path / "model.safetensors"))
    load_model(two, tmp_path / "model.safetensors")
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(one(input_ids=ids).logits, two(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("changes", "params", "said"),
    [
        ({"model_type": "phi3"}, {}, "'phi3' has another form"),
        ({}, {"rope_dim": 3}, "rope_dim is 3"),
        ({}, {"kv_rank": 256}, "cache no less than multi-head attention, which keeps 256"),
        ({"config": {"sliding_window": 16}, "params": {"seq_len": 64}}, {}, "sliding window of 16 is shorter than the context of 64"),
    ],
)  # fmt: skip
def test_refusals_name_the_value_and_the_limit(changes: dict[str, Any], params: dict[str, Any], said: str) -> None:
    values = {"num_attention_heads": 8, "hidden_size": 128, "max_position_embeddings": 64, **changes.pop("config", {})}
    known = {"model_type": "llama", "device": "cpu", "trains": False, "weights": "random", **changes}
    answer = MLA(MLAParams(**params)).supports(Context(config=values, **known))
    assert not answer.ok
    assert said in answer.reason


def test_the_cost_is_that_of_the_worked_example() -> None:
    """DeepSeek-V2, Table 1: 34.6 thousand elements per token over 60 layers, 69,120 bytes in bf16."""
    values = {"num_attention_heads": 128, "hidden_size": 5120, "head_dim": 128}
    cost = MLA(MLAParams())._cost(values)
    assert (cost.q_rank, cost.kv_rank, cost.rope_dim) == (1536, 512, 64)
    assert cost.cache_elements(1) * 60 * 2 == 69_120
    assert cost.score_flops(1000, decode=True) == 2 * 1000 * 128 * (2 * 512 + 64)
