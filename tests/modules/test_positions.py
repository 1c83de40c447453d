"""The position axis: against the papers' formulas, causal, cached, padded, trained and saved."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch.nn import functional as F
from transformers import PreTrainedModel, StaticCache

from effbench.errors import ModelError
from effbench.models.shapes import shape
from effbench.models.weights import configuration, new_model
from effbench.modules.positions import add_relative_bias, bucket, sinusoids
from effbench.schema import ModelRef
from effbench.technique import Context, Technique
from effbench.techniques.learned_positions import LearnedPositions, LearnedPositionsParams
from effbench.techniques.nope import NoPE
from effbench.techniques.relative_bias import RelativeBias, RelativeBiasParams
from effbench.techniques.rope import RoPE
from effbench.techniques.sinusoidal import Sinusoidal
from effbench.workloads._decode import EagerEngine, StaticEngine

SHAPES = ("tiny-llama", "tiny-qwen2", "tiny-mistral")
WAYS: tuple[type[Technique], ...] = (LearnedPositions, Sinusoidal, RelativeBias, NoPE)
BOTH = [pytest.param(way, name, id=f"{way.name}-{name}") for way in WAYS for name in SHAPES]
WITH_WEIGHTS = [pytest.param(way, id=way.name) for way in (LearnedPositions, RelativeBias)]


def built(
    way: type[Technique] | Technique, name: str = "tiny-llama", *, seed: int = 1, dtype: str = "float32"
) -> PreTrainedModel:
    """A model with new weights; biases of the tables are large enough to matter."""
    torch.manual_seed(seed)
    config = configuration(ModelRef(name=name, digest="x"))
    config.dtype = dtype
    technique = way if isinstance(way, Technique) else way()
    return technique.apply(new_model(config, "cpu")).eval()


def some_bytes(num_rows: int = 2, length: int = 24, seed: int = 7) -> torch.Tensor:
    return torch.randint(0, 256, (num_rows, length), generator=torch.Generator().manual_seed(seed))


def context(name: str = "tiny-llama", **changes: Any) -> Context:
    found = shape(name)
    plain = Context(config=found.config, model_type=found.model_type, device="cpu", trains=True, weights="random")
    return replace(plain, **changes)


def first_layer(model: PreTrainedModel, ids_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    """Hidden states that enter the first layer, and what goes into and comes out of its attention."""
    seen: dict[str, torch.Tensor] = {}
    layer = model.model.layers[0]
    handles = [
        layer.input_layernorm.register_forward_pre_hook(lambda m, args: seen.update(hidden=args[0])),
        layer.self_attn.register_forward_hook(
            lambda m, args, kwargs, out: seen.update(into=kwargs["hidden_states"], out=out[0]), with_kwargs=True
        ),
    ]
    with torch.no_grad():
        model(input_ids=ids_BT, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def attention_by_hand(model: PreTrainedModel, into_BTE: torch.Tensor, bias_H: dict[int, torch.Tensor] | None) -> torch.Tensor:
    """The first layer's attention in float64, query by query, without rotation; `bias_H` by distance."""
    attention, config = copy.deepcopy(model.model.layers[0].self_attn).double(), model.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    D = config.hidden_size // heads
    B, T, _ = into_BTE.shape
    q, k, v = (p(into_BTE.double()).view(B, T, -1, D) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    out = torch.zeros(B, T, heads, D, dtype=torch.float64)
    for b in range(B):
        for h in range(heads):
            g = h * groups // heads
            for t in range(T):
                scores = k[b, : t + 1, g] @ q[b, t, h] / math.sqrt(D)
                if bias_H is not None:
                    scores = scores + torch.stack([bias_H[t - s][h] for s in range(t + 1)])
                out[b, t, h] = scores.softmax(-1) @ v[b, : t + 1, g]
    return attention.o_proj(out.flatten(2))


def test_sinusoids_are_those_of_the_formula() -> None:
    width, positions = 12, torch.tensor([[0, 1, 2, 7, 500]])
    found = sinusoids(positions, width)
    for row, p in zip(found[0].tolist(), positions[0].tolist(), strict=True):
        for i in range(width // 2):
            angle = p / 10000 ** (2 * i / width)
            assert row[2 * i] == pytest.approx(math.sin(angle), abs=2e-5)
            assert row[2 * i + 1] == pytest.approx(math.cos(angle), abs=2e-5)


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (7, 33), (2, 5)])
def test_buckets_are_those_of_a_search_over_their_bounds(num_buckets: int, max_distance: int) -> None:
    """Half the buckets hold one distance; bucket e + i starts at e · (max / e)^(i / (n − e)); the last is open."""
    exact = num_buckets // 2
    starts = [exact * (max_distance / exact) ** (i / (num_buckets - exact)) for i in range(num_buckets - exact)]
    for distance in range(max_distance * 3):
        if distance < exact:
            expected = distance
        else:
            expected = exact + max(i for i, start in enumerate(starts) if distance >= start - 1e-9)
        assert bucket(distance, num_buckets, max_distance) == expected, distance


def test_buckets_are_those_of_the_library_for_t5s_values() -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(1000)
    theirs = T5Attention._relative_position_bucket(-distance, bidirectional=False, num_buckets=32, max_distance=128)
    assert theirs.tolist() == [bucket(d, 32, 128) for d in distance.tolist()]


@pytest.mark.parametrize("name", SHAPES)
def test_attention_without_positions_is_attention_without_rotation(name: str) -> None:
    model = built(NoPE, name)
    seen = first_layer(model, some_bytes(2, 9))
    torch.testing.assert_close(seen["out"].double(), attention_by_hand(model, seen["into"], None), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_relative_bias_is_added_to_the_scores_of_every_layer(name: str) -> None:
    """Distances of 11 and more fall into the open bucket, and every layer sees the same mask."""
    model = built(RelativeBias(RelativeBiasParams(num_buckets=8, max_distance=11)), name)
    with torch.no_grad():
        model.model.positions.weight.mul_(20)
    masks: list[int] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda m, a, kwargs: masks.append(id(kwargs["attention_mask"])), with_kwargs=True)
    seen = first_layer(model, some_bytes(2, 17))
    table = model.model.positions.weight.detach().double()
    bias = {d: table[bucket(d, 8, 11)] for d in range(17)}
    by_hand = attention_by_hand(model, seen["into"], bias)
    torch.testing.assert_close(seen["out"].double(), by_hand, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(by_hand, attention_by_hand(model, seen["into"], None), atol=1e-3), "the bias must matter"
    assert len(masks) == len(model.model.layers) and len(set(masks)) == 1


@pytest.mark.parametrize("name", SHAPES)
def test_absolute_positions_are_added_to_the_embeddings(name: str) -> None:
    ids_BT = some_bytes(2, 9)
    for way in (LearnedPositions, Sinusoidal):
        model = built(way, name)
        width = model.config.hidden_size
        rows = model.model.positions.weight[:9] if way is LearnedPositions else sinusoids(torch.arange(9), width) / width**0.5
        torch.testing.assert_close(first_layer(model, ids_BT)["hidden"], model.model.embed_tokens(ids_BT) + rows)


def test_rope_leaves_the_model_alone() -> None:
    torch.testing.assert_close(
        built(RoPE)(input_ids=some_bytes()).logits, _plain()(input_ids=some_bytes()).logits, rtol=0, atol=0
    )


def _plain() -> PreTrainedModel:
    torch.manual_seed(1)
    return new_model(configuration(ModelRef(name="tiny-llama", digest="x")), "cpu").eval()


@pytest.mark.parametrize(("way", "name"), BOTH)
def test_a_future_token_changes_nothing_before_it(way: type[Technique], name: str) -> None:
    model, ids_BT = built(way, name), some_bytes()
    other_BT = ids_BT.clone()
    other_BT[:, 15] = (other_BT[:, 15] + 1) % 256
    with torch.inference_mode():
        one, two = (model(input_ids=ids, use_cache=False).logits for ids in (ids_BT, other_BT))
    torch.testing.assert_close(one[:, :15], two[:, :15], rtol=0, atol=1e-6)
    assert not torch.allclose(one[:, 15:], two[:, 15:], atol=1e-3)


@pytest.mark.parametrize(("way", "name"), BOTH)
def test_decode_with_a_growing_cache_is_the_full_forward(way: type[Technique], name: str) -> None:
    """Tokens come one by one, three at once, and one by one again."""
    model, ids_BT = built(way, name), some_bytes()
    with torch.inference_mode():
        full_BTV = model(input_ids=ids_BT, use_cache=False).logits
        out = model(input_ids=ids_BT[:, :16], use_cache=True)
        parts, start = [out.logits], 16
        for length in (1, 3, 1, 3):
            out = model(input_ids=ids_BT[:, start : start + length], past_key_values=out.past_key_values, use_cache=True)
            parts.append(out.logits)
            start += length
    torch.testing.assert_close(torch.cat(parts, dim=1), full_BTV, rtol=0, atol=2e-5 * float(full_BTV.std()) + 1e-5)


@pytest.mark.parametrize(("way", "name"), BOTH)
def test_decode_on_preallocated_memory_is_the_full_forward(way: type[Technique], name: str) -> None:
    """As the decode engines call it: a boolean mask (B, 1, 1, S) and the position as a tensor."""
    model, ids_BT, prompt = built(way, name), some_bytes(), 16
    cache, slots_S = StaticCache(config=model.config, max_cache_len=30), torch.arange(30)
    with torch.inference_mode():
        full_BTV = model(input_ids=ids_BT, use_cache=False).logits
        parts = [model(input_ids=ids_BT[:, :prompt], past_key_values=cache, use_cache=True).logits]
        for position in range(prompt, ids_BT.shape[1]):
            mask_B11S = (slots_S <= position)[None, None, None].expand(2, 1, 1, 30)
            out = model(
                input_ids=ids_BT[:, position : position + 1],
                attention_mask=mask_B11S,
                position_ids=torch.tensor([[position]]),
                past_key_values=cache,
                use_cache=True,
            )
            parts.append(out.logits)
        engines = (EagerEngine(model), StaticEngine(model, 2, 30))
        eager, static = (engine.generate(ids_BT[:, :prompt], 8, lambda: None) for engine in engines)
    torch.testing.assert_close(torch.cat(parts, dim=1), full_BTV, rtol=0, atol=2e-5 * float(full_BTV.std()) + 1e-5)
    assert torch.equal(eager, static)


@pytest.mark.parametrize(("way", "name"), BOTH)
def test_a_left_padded_row_is_the_row_alone(way: type[Technique], name: str) -> None:
    model, ids_BT, pad = built(way, name), some_bytes(), 5
    short_1T = ids_BT[:1, pad:]
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :pad] = 0
    position_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        full = model(input_ids=ids_BT, attention_mask=mask_BT, position_ids=position_BT, use_cache=False).logits
        alone, other = (model(input_ids=ids, use_cache=False).logits for ids in (short_1T, ids_BT[1:]))
        out = model(input_ids=ids_BT[:, :18], attention_mask=mask_BT[:, :18], position_ids=position_BT[:, :18], use_cache=True)
        steps = []
        for t in range(18, ids_BT.shape[1]):
            out = model(
                input_ids=ids_BT[:, t : t + 1],
                attention_mask=mask_BT[:, : t + 1],
                position_ids=position_BT[:, t : t + 1],
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            steps.append(out.logits)
    assert bool(torch.isfinite(full).all())
    for found in (full[:, 18:], torch.cat(steps, dim=1)):
        torch.testing.assert_close(found[0], alone[0, 18 - pad :], rtol=0, atol=5e-5)
        torch.testing.assert_close(found[1], other[0, 18:], rtol=0, atol=5e-5)


@pytest.mark.parametrize("way", WITH_WEIGHTS)
@pytest.mark.parametrize("name", SHAPES)
def test_gradients_reach_the_table(way: type[Technique], name: str) -> None:
    model, ids_BT = built(way, name).train(), some_bytes(2, 21)
    table = model.model.positions.weight
    assert any(p is table for p in model.parameters())
    F.cross_entropy(model(input_ids=ids_BT[:, :-1], use_cache=False).logits.flatten(0, 1), ids_BT[:, 1:].flatten()).backward()
    used = 20 if way is LearnedPositions else bucket(19, 32, 128) + 1
    assert bool((table.grad[:used].abs().sum(-1) > 0).all())
    assert not bool(table.grad[used:].any()), "rows that nothing used"


@pytest.mark.parametrize("way", WITH_WEIGHTS)
def test_gradient_is_the_slope(way: type[Technique]) -> None:
    model, ids_BT = built(way).double(), some_bytes(2, 12)
    table = model.model.positions.weight

    def loss() -> torch.Tensor:
        logits = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), ids_BT[:, 1:].flatten())

    (gradient,) = torch.autograd.grad(loss(), [table])
    direction = torch.randn(table.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        table.add_(1e-3 * direction)
        above = loss()
        table.sub_(2e-3 * direction)
        slope = (above - loss()) / 2e-3
    assert float(slope) == pytest.approx(float((gradient * direction).sum()), rel=2e-3)  # the norms compute in fp32


@pytest.mark.parametrize("way", WITH_WEIGHTS)
def test_mixed_precision_and_recomputation_give_the_gradients_too(way: type[Technique]) -> None:
    ids_BT, found = some_bytes(2, 17), []
    for recompute, dtype in ((False, None), (True, None), (False, torch.bfloat16)):
        model = built(way).train()
        if recompute:
            model.activation_checkpointing_enable()
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            logits = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
        F.cross_entropy(logits.float().flatten(0, 1), ids_BT[:, 1:].flatten()).backward()
        found.append(model.model.positions.weight.grad)
    plain, recomputed, half = found
    torch.testing.assert_close(recomputed, plain)
    assert float((half - plain).norm() / plain.norm()) < 0.05


@pytest.mark.parametrize("way", WITH_WEIGHTS)
def test_table_is_made_like_the_other_weights(way: type[Technique]) -> None:
    model = built(way, "tiny-qwen2", dtype="bfloat16")
    table = model.model.positions.weight
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert table.float().std().item() == pytest.approx(model.config.initializer_range, rel=0.1)
    assert bool(torch.isfinite(model(input_ids=some_bytes()).logits).all())
    one, same, other = (built(way, seed=seed).model.positions.weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(("way", "name"), BOTH)
def test_weights_are_saved_loaded_and_copied(way: type[Technique], name: str, tmp_path: Path) -> None:
    model, ids_BT = built(way, name), some_bytes()
    save_model(model, str(tmp_path / "model.safetensors"))
    loaded = built(way, name, seed=2)
    load_model(loaded, str(tmp_path / "model.safetensors"))
    copied = copy.deepcopy(model)
    with torch.inference_mode():
        expected = model(input_ids=ids_BT).logits
        assert torch.equal(loaded(input_ids=ids_BT).logits, expected)
        assert torch.equal(copied(input_ids=ids_BT).logits, expected)
    if hasattr(getattr(copied.model, "positions", None), "weight"):
        with torch.no_grad():
            copied.model.positions.weight.normal_(generator=torch.Generator().manual_seed(3))
        with torch.inference_mode():
            assert not torch.allclose(copied(input_ids=ids_BT).logits, expected, atol=1e-3), "a copy uses its own table"
            assert torch.equal(model(input_ids=ids_BT).logits, expected), "and leaves the original's alone"


@pytest.mark.parametrize("way", [pytest.param(w, id=w.name) for w in WAYS])
def test_dynamo_traces_it_without_a_break(way: type[Technique]) -> None:
    model, ids_BT = built(way), some_bytes(2, 8)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(input_ids=ids_BT, use_cache=False).logits, model(input_ids=ids_BT).logits)


def test_arguments_by_position_and_single_tokens_work() -> None:
    model, ids_BT = built(RelativeBias), some_bytes(1, 1)
    with torch.inference_mode():
        one, two = model.model(ids_BT), model.model(input_ids=ids_BT)
        embedded = model.model(inputs_embeds=model.model.embed_tokens(ids_BT))
    assert torch.equal(one.last_hidden_state, two.last_hidden_state)
    assert torch.equal(embedded.last_hidden_state, two.last_hidden_state)


def test_eager_attention_takes_the_bias_as_well() -> None:
    model, ids_BT = built(RelativeBias), some_bytes()
    with torch.inference_mode():
        expected = model(input_ids=ids_BT).logits
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(input_ids=ids_BT).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_backend_without_a_mask_is_refused() -> None:
    model = _plain()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ModelError, match="flex_attention"):
        add_relative_bias(model, 32, 128)


@pytest.mark.parametrize(
    ("technique", "known", "says"),
    [
        pytest.param(NoPE(), context(model_type="phi3"), "phi3", id="family"),
        pytest.param(Sinusoidal(), context(weights="hub"), "hub", id="hub"),
        pytest.param(LearnedPositions(), context(weights="path"), "random or trained", id="path"),
        pytest.param(NoPE(), context(stack=("mla", "nope")), "rope with mla", id="mla"),
        pytest.param(RelativeBias(), context(stack=("nsa", "relative_bias")), "nsa", id="nsa"),
        pytest.param(RelativeBias(), context(stack=("flash_attention", "relative_bias")), "flash_attention", id="flash"),
        pytest.param(RelativeBias(), context(stack=("flex_attention", "relative_bias")), "sdpa", id="flex"),
        pytest.param(RelativeBias(RelativeBiasParams(max_distance=16)), context(), "16", id="distance"),
        pytest.param(LearnedPositions(), context(params={"seq_len": 1025}), "1025", id="length"),
        pytest.param(LearnedPositions(), context(params={"prompt_tokens": 1000, "new_tokens": 100}), "1100", id="generation"),
        pytest.param(RoPE(), context(model_type="gpt2"), "gpt2", id="rope"),
    ],
)
def test_what_cannot_work_is_refused_with_the_value(technique: Technique, known: Context, says: str) -> None:
    answer = technique.supports(known)
    assert not answer.ok
    assert says in answer.reason


def test_a_sliding_window_is_refused_where_it_is_switched_on() -> None:
    config = {**shape("tiny-mistral").config, "sliding_window": 64}
    assert "64" in RelativeBias().supports(context(config=config)).reason
    assert RelativeBias().supports(context(config={**config, "use_sliding_window": False})).ok


def test_what_works_is_supported() -> None:
    longer = LearnedPositions(LearnedPositionsParams(max_positions=2048))
    assert longer.supports(context(params={"seq_len": 2048})).ok
    assert built(longer).model.positions.weight.shape == (2048, 128)
    for way in WAYS:
        for weights in ("random", "trained"):
            assert way().supports(context(weights=weights)).ok
    assert RoPE().supports(context(weights="hub", stack=("mla", "rope"))).ok


def test_rope_is_the_reference_of_the_axis() -> None:
    assert RoPE().is_reference
    for way in WAYS:
        assert way().baseline(None) == ("rope", {})  # type: ignore[arg-type]
        assert not way().is_reference


def test_declarations_load_no_torch() -> None:
    program = (
        "import sys\n"
        "from effbench.techniques import learned_positions, nope, relative_bias, rope, sinusoidal\n"
        "heavy = {'torch', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
