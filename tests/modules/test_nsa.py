"""Native sparse attention against plain loops, its cache against full forwards, its forms against each other."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ruamel.yaml import YAML
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

import effbench.models
from effbench.costs import NSACost
from effbench.modules import nsa, nsa_blocks, nsa_cache, nsa_paths
from effbench.modules.nsa import NSAAttention
from effbench.modules.replace import replace_attention
from effbench.technique import Context
from effbench.techniques.nsa import NSA, NSAParams
from tests.modules import nsa_reference
from tests.modules.nsa_reference import Sizes, reference

HIDDEN, HEADS, DIM = 12, 4, 4
SMALL = {"groups": 2, "block": 8, "stride": 4, "select_block": 8, "num_selected": 4, "window": 8}
# l < l', d = l, and a window that is longer than a block.
OTHER = {"groups": 1, "block": 4, "stride": 4, "select_block": 12, "num_selected": 3, "window": 13}
DENSE = {"groups": 4, "block": 6, "stride": 2, "select_block": 8, "num_selected": 3, "window": 1}
LENGTHS = (1, 7, 8, 9, 31, 53)  # one token, less than l, l, one more, and two that are no multiple of anything


def attention(dtype: torch.dtype = torch.float64, seed: int = 0, **params) -> NSAAttention:
    config = SimpleNamespace(
        num_attention_heads=HEADS, hidden_size=HIDDEN, head_dim=DIM, model_type="llama", attention_bias=True
    )
    module = NSAAttention(config, 0, NSAParams(**{**SMALL, **params})).to(torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.4)
    return module.to(dtype)


def sizes_of(module: NSAAttention) -> Sizes:
    c = module.cost
    return Sizes(c.heads, c.groups, c.key_dim, c.block, c.stride, c.select_block, c.num_selected, c.window, c.shared)


def some_input(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, length, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def angles(position_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (B, T, D) of positions."""
    angle = position_BT[..., None].double() * torch.tensor([1.0, 0.1], dtype=torch.float64)
    return torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()


def turn(length: int, begin: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return angles(torch.arange(begin, begin + length)[None])


def padded_mask(padding: list[int], begin: int, end: int) -> torch.Tensor:
    """The mask that transformers makes of left padding for the queries begin … end − 1."""
    query, column = torch.arange(begin, end)[:, None], torch.arange(end)
    return torch.stack([(column <= query) & (column >= p) for p in padding])[:, None]


@cache
def chosen_by_reference(length: int, seed: int = 1):
    module = attention()
    cos, sin = turn(length)
    return reference(some_input(1, length, seed)[0], cos[0], sin[0], dict(module.named_parameters()), sizes_of(module))


# Against the formulas


@pytest.mark.parametrize("backend", ["masked", "gather"])
@pytest.mark.parametrize(
    "params", [SMALL, OTHER, DENSE, {**SMALL, "shared_kv": True}], ids=["small", "other", "dense", "shared"]
)
def test_output_and_gradients_are_those_of_the_formulas(params, backend):
    for length in LENGTHS:
        batch = 3 if length == 31 else 1
        module = attention(**params, backend=backend)
        ours, theirs = (some_input(batch, length).requires_grad_() for _ in range(2))
        weight = some_input(batch, length, seed=2)
        cos, sin = turn(length)
        out = module(ours, (cos, sin))[0]
        (out * weight).sum().backward()
        grads = {name: p.grad.clone() for name, p in module.named_parameters()}
        module.zero_grad()
        state = dict(module.named_parameters())
        expected = torch.stack([reference(row, cos[0], sin[0], state, sizes_of(module))[0] for row in theirs])
        (expected * weight).sum().backward()
        assert module.backend_used == backend
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)
        for name, p in module.named_parameters():
            plain = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(
                grads[name], plain, rtol=1e-9, atol=1e-9, msg=lambda m, n=name, t=length: f"{n}, T {t}: {m}"
            )


@pytest.mark.parametrize(
    ("block", "stride", "select_block"), [(8, 4, 8), (4, 4, 12), (32, 16, 64), (6, 2, 8), (8, 8, 8), (6, 3, 12)]
)
def test_importance_is_overlap_and_the_papers_double_sum(block, stride, select_block):
    cost = NSACost(
        hidden=1, heads=1, groups=1, key_dim=1, value_dim=1, block=block, stride=stride, select_block=select_block,
        num_selected=3, window=1,
    )  # fmt: skip
    sizes = Sizes(1, 1, 1, block, stride, select_block, 3, 1)
    for length in range(1, 4 * select_block + 2):
        num_blocks, num_select = nsa_blocks.num_compressed(length, block, stride), -(-length // select_block)
        assert num_blocks == sum(1 for i in range(length) if i * stride + block <= length)
        p = torch.rand(num_blocks, dtype=torch.float64)
        found = nsa_blocks.importance(p, cost, num_select).tolist()
        assert found == pytest.approx([nsa_reference.importance_of(p.tolist(), sizes, j) for j in range(num_select)])
        assert found == pytest.approx([nsa_reference.paper_double_sum(p.tolist(), sizes, j) for j in range(num_select)])


def test_selection_is_that_of_brute_force_with_first_and_local_blocks_always_in():
    cost, sizes = attention().cost, sizes_of(attention())
    length, groups = 96, 3
    p = torch.rand(2, groups, 2, length, nsa_blocks.num_compressed(length, 8, 4), dtype=torch.float64) ** 8
    position = torch.arange(length)[None]
    p = p * nsa_blocks.visible_compressed(position, p.shape[-1], 8, 4)[:, None, None]
    found = nsa_blocks.select(p, position, cost, length // 8)
    used = 0
    for b in range(2):
        for g in range(groups):
            for t in range(length):
                chosen = sorted(found.index[b, g, t][found.valid[b, g, t]].tolist())
                summed = p[b, g, :, t].sum(0).tolist()
                importance = [nsa_reference.importance_of(summed, sizes, j) for j in range(t // 8 + 1)]
                assert chosen == nsa_reference.chosen_blocks(importance, t, sizes)
                assert {0, t // 8, max(0, t // 8 - 1)} <= set(chosen)
                used += len(chosen) < t // 8 + 1
    assert used > 100, "most queries should have had to choose"


def test_a_query_that_sees_no_compressed_block_gets_nothing_from_that_branch():
    module = attention(window=1)
    q = torch.randn(1, 2, 2, 12, DIM, dtype=torch.float64)
    key = torch.randn(1, 2, 2, DIM, dtype=torch.float64)
    visible = nsa_blocks.visible_compressed(torch.arange(12)[None], 2, module.cost.block, module.cost.stride)
    out, p = nsa_paths.compressed_attention(q, key, key, visible, 0.5)
    assert torch.equal(out[..., :7, :], torch.zeros_like(out[..., :7, :]))
    assert torch.equal(p[..., :7, :], torch.zeros_like(p[..., :7, :]))
    assert bool((out[..., 7:, :] != 0).all())
    assert torch.equal(visible[0, :, 0].nonzero()[0], torch.tensor([7]))
    assert torch.equal(visible[0, :, 1].nonzero()[0], torch.tensor([11]))


@pytest.mark.parametrize("backend", ["masked", "gather"])
@torch.no_grad()
def test_no_token_sees_a_later_one(backend):
    module, length = attention(backend=backend), 53
    x = some_input(1, length)
    before = module(x, turn(length))[0]
    for changed in (0, 8, 20, 31, 32, 52):
        other = x.clone()
        other[0, changed] += 1.0
        difference = (module(other, turn(length))[0] - before).abs().amax(-1)[0]
        assert float(difference[:changed].sum()) == 0.0
        assert float(difference[changed]) > 1e-3


# Forms


def forward_with(
    module: NSAAttention, backend: str, x: torch.Tensor, padding: list[int]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    module.backend = backend
    module.zero_grad()
    length = x.shape[1]
    position = (torch.arange(length) - torch.tensor(padding)[:, None]).clamp(min=0)
    out = module(x, angles(position), padded_mask(padding, 0, length))[0]
    real = torch.arange(length) >= torch.tensor(padding)[:, None]
    out[real].square().sum().backward()
    return out[real], [p.grad.clone() for p in module.parameters()]


@pytest.mark.parametrize("padding", [[0, 0], [3, 26]])
def test_masked_and_gather_are_one_function_whatever_is_taken_at_once(padding, monkeypatch):
    module, x = attention(), some_input(2, 53)
    masked, masked_grads = forward_with(module, "masked", x, padding)
    monkeypatch.setattr(nsa_paths, "GATHER_ELEMENTS", 5 * 2 * 2 * 4 * 8 * DIM)
    for elements in (1 << 24, 16):
        monkeypatch.setattr(nsa, "SCORE_ELEMENTS", elements)
        for backend in ("masked", "gather"):
            out, grads = forward_with(module, backend, x, padding)
            torch.testing.assert_close(out, masked, rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(grads, masked_grads, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("padding", [[0, 0], [3, 140]])
@torch.no_grad()
def test_flex_attention_gets_the_mask_of_the_selected_blocks(padding, monkeypatch):
    """The block-sparse form runs on CUDA; here the library's unfused form shows that its mask is right, tiles included."""
    from torch.nn.attention import flex_attention as library

    length, groups = 301, 2
    at = nsa_paths.Queries(0, length, torch.tensor(padding) if any(padding) else None)
    q = torch.randn(2, groups, 2, length, DIM)
    key, value = torch.randn(2, 2, groups, length, DIM).unbind()
    position = at.positions(q.device).clamp(min=0).expand(2, -1)
    cost = attention(select_block=16).cost
    p = torch.rand(2, groups, 2, length, 75) * nsa_blocks.visible_compressed(position, 75, 8, 4)[:, None, None]
    selection = nsa_blocks.select(p, position, cost, 19)
    expected = nsa_paths.masked_attention(q, key, value, selection, at, 16, 0.5)

    def unfused(*args, block_mask, **kwargs):
        dense = block_mask.to_dense()[:, :, : -(-length // 128), : -(-length // 128)]
        assert int(dense.sum()) < dense.numel(), "no tile is skipped"
        tiles = dense.bool().repeat_interleave(128, 2).repeat_interleave(128, 3)[:, :, :length, :length]
        inner = block_mask.mask_mod
        within = library.create_mask(inner, 2, 4, length, length, device="cpu")
        assert not bool((within & ~tiles).any()), "a tile that is needed is skipped"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return library.flex_attention(*args, block_mask=block_mask, **kwargs)

    found = nsa_paths.flex_attention(q, key, value, selection, at, 16, 0.5, attend=unfused)
    real = (torch.arange(length) >= torch.tensor(padding)[:, None])[:, None, None].expand(2, groups, 2, -1)
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)


def test_selections_of_parts_are_joined_without_losing_a_block():
    cost, length = attention().cost, 64
    position = torch.arange(length)[None]
    p = torch.rand(2, 2, 2, length, 15, dtype=torch.float64) * nsa_blocks.visible_compressed(position, 15, 8, 4)[:, None, None]
    whole = nsa_blocks.selected_blocks(nsa_blocks.select(p, position, cost, 8), 8)
    parts = [
        nsa_blocks.select(p[..., a:b, : max(0, (b - 8) // 4 + 1)], position[:, a:b], cost, -(-b // 8))
        for a, b in ((0, 16), (16, 50), (50, 64))
    ]
    assert torch.equal(nsa_blocks.selected_blocks(nsa_blocks.joined(parts, 2, 2), 8), whole)


def test_the_cheaper_form_is_chosen():
    module, q = attention(), torch.zeros(1, 2, 2, 1, DIM)
    most = 4 * 8
    assert module._backend(nsa_paths.Queries(0, 16, None), q) == "masked"
    assert module._backend(nsa_paths.Queries(most - 1, most, None), q) == "masked"
    assert module._backend(nsa_paths.Queries(most, most + 1, None), q) == "gather"
    assert module._backend(nsa_paths.Queries(0, nsa.MASKED_FACTOR * most, None), q) == "masked"
    assert module._backend(nsa_paths.Queries(0, nsa.MASKED_FACTOR * most + 1, None), q) == "gather"
    module.backend = "flex"
    with pytest.raises(ValueError, match=r"CUDA .* not on cpu"):
        module._backend(nsa_paths.Queries(0, 16, None), q)


# Precision


def test_bf16_is_near_float64_given_the_same_blocks(monkeypatch):
    """Largest error 5 % of the output's standard deviation, of which rounding weights and input to bf16 is no part."""
    length = 53
    exact = attention().to(torch.bfloat16).double()
    x = some_input(1, length).to(torch.bfloat16)
    cos, sin = (c.to(torch.bfloat16) for c in turn(length))
    state = dict(exact.named_parameters())
    expected, chosen = reference(x[0].double(), cos[0].double(), sin[0].double(), state, sizes_of(exact))
    module = attention(torch.bfloat16)
    index = torch.zeros(1, 2, length, 4, dtype=torch.long)
    valid = torch.zeros(1, 2, length, 4, dtype=torch.bool)
    for (t, g), blocks in chosen.items():
        index[0, g, t] = torch.tensor(blocks + [b for b in range(7) if b not in blocks][: 4 - len(blocks)])
        valid[0, g, t, : len(blocks)] = True
    for backend in ("masked", "gather"):
        module.backend = backend
        with monkeypatch.context() as patch:
            patch.setattr(nsa, "select", lambda *args: nsa_blocks.Selection(index, valid))
            out = module(x, (cos, sin))[0]
        assert out.dtype == torch.bfloat16
        assert float((out[0].double() - expected).detach().abs().max() / expected.std().detach()) < 0.05


@torch.no_grad()
def test_bf16_selects_nearly_the_blocks_of_float64(monkeypatch):
    """At least 97 % of the blocks chosen in float64 are chosen in bf16."""
    length, seen = 160, {}
    original = nsa.select
    for dtype in (torch.float64, torch.bfloat16):
        module = attention(torch.bfloat16).to(dtype)
        monkeypatch.setattr(nsa, "select", lambda *args, d=dtype: seen.setdefault(d, original(*args)))
        module(some_input(1, length).to(torch.bfloat16).to(dtype), tuple(c.to(dtype) for c in turn(length)))
    exact, rounded = (nsa_blocks.selected_blocks(seen[d], 20) for d in (torch.float64, torch.bfloat16))
    assert int(exact.sum()) == int(rounded.sum())
    agreement = float((exact & rounded).sum() / exact.sum())
    print(f"agreement {agreement:.4f}")
    assert agreement > 0.97


# Cache


def decoded(
    module: NSAAttention, x: torch.Tensor, parts: list[int], padding: list[int] | None = None
) -> tuple[torch.Tensor, DynamicCache]:
    """Outputs of consecutive parts of a sequence through a cache."""
    past, outs, begin = DynamicCache(), [], 0
    with torch.no_grad():
        for part in parts:
            end = begin + part
            position = torch.arange(begin, end)[None] - (torch.tensor(padding)[:, None] if padding else 0)
            mask = padded_mask(padding, begin, end) if padding else None
            outs.append(module(x[:, begin:end], angles(position.clamp(min=0)), mask, past)[0])
            begin = end
            assert past.get_seq_length(0) == end
            assert past.get_mask_sizes(3, 0) == (end + 3, 0)
    return torch.cat(outs, dim=1), past


PARTS = {
    "prompt 1": [1] * 53,
    "prompt 5": [5] + [1] * 48,
    "prompt 8": [8] + [1] * 45,
    "prompt 27": [27] + [1] * 26,
    "chunks": [11, 9, 1, 17, 2, 13],
}


@pytest.mark.parametrize("params", [SMALL, OTHER, {**SMALL, "shared_kv": True}], ids=["small", "other", "shared"])
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("backend", ["auto", "masked", "gather"])
def test_cached_parts_give_the_full_forward(parts, params, backend):
    module, x = attention(**params, backend=backend), some_input(2, 53)
    with torch.no_grad():
        full = module(x, turn(53))[0]
    torch.testing.assert_close(decoded(module, x, parts)[0], full, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("params", [SMALL, OTHER, {**SMALL, "shared_kv": True}], ids=["small", "other", "shared"])
@pytest.mark.parametrize(
    "parts", [[53], [29] + [1] * 24, [11, 9, 1, 17, 2, 13], [1] * 53], ids=["full", "decode", "chunks", "one"]
)
@pytest.mark.parametrize("backend", ["auto", "masked", "gather"])
def test_padded_rows_are_as_if_they_were_alone(parts, params, backend):
    """Also where a row's first real token comes in the second part or later."""
    module, padding = attention(**params, backend=backend), [0, 3, 18, 27]
    x = some_input(4, 53)
    if parts == [53]:
        with torch.no_grad():
            position = (torch.arange(53)[None] - torch.tensor(padding)[:, None]).clamp(min=0)
            out = module(x, angles(position), padded_mask(padding, 0, 53))[0]
        torch.testing.assert_close(decoded(module, x, parts, padding)[0], out)
    else:
        out = decoded(module, x, parts, padding)[0]
    assert bool(torch.isfinite(out).all())
    for row, pad in enumerate(padding):
        with torch.no_grad():
            alone = module(x[row : row + 1, pad:], turn(53 - pad))[0]
        torch.testing.assert_close(out[row, pad:], alone[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("params", [SMALL, OTHER, {**SMALL, "shared_kv": True}], ids=["small", "other", "shared"])
def test_cache_keeps_the_elements_of_the_formula_and_little_room_beside_them(params):
    module, x = attention(**params), some_input(2, 90)
    for parts in ([1] * 90, [40] + [1] * 50, [90]):
        past, begin = DynamicCache(), 0
        for part in parts:
            with torch.no_grad():
                module(x[:, begin : begin + part], turn(part, begin), None, past)
            begin += part
            layer = past.layers[0]
            assert layer.used_bytes() == 2 * 8 * module.cost.cache_elements(begin)
            room = 2 * 2 * 8 * module.cost.groups * DIM * 4 * (nsa_cache.LEAST_ROOM + begin // nsa_cache.ROOM_SHARE)
            assert layer.used_bytes() <= layer.allocated_bytes() <= layer.used_bytes() * 1.25 + room


def test_a_token_is_written_in_place_and_memory_grows_seldom():
    module, x = attention(), some_input(1, 700)
    _, past = decoded(module, x[:, :100], [100])
    layer, moved, before = past.layers[0], 0, None
    with torch.no_grad():
        for begin in range(100, 700):
            module(x[:, begin : begin + 1], turn(1, begin), None, past)
            place = layer.selected.keys.data_ptr()
            moved, before = moved + (place != before), place
    assert moved < 600 / nsa_cache.LEAST_ROOM + 2, "memory moves no more often than once per room"


@torch.no_grad()
def test_a_decoded_token_computes_what_the_formula_says():
    """Matrix products of a token that completes no block: projections and N entries per head, whatever the context."""
    module, length = attention(backend="gather"), 301
    past = decoded(module, some_input(1, length - 1), [length - 1])[1]
    cost = module.cost
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        module(some_input(1, 1), turn(1, length - 1), None, past)
    compression = 2 * cost.compression_weights() * cost.groups / cost.stride
    mapping = 2 * cost.groups * -(-length // cost.select_block) * 3
    expected = cost.projection_flops() - compression + cost.score_flops(length, decode=True) + mapping
    assert counter.get_total_flops() == pytest.approx(expected, abs=mapping)


@torch.no_grad()
def test_rows_of_a_cache_are_reordered_repeated_and_dropped():
    module, padding, x = attention(), [0, 3, 18], some_input(3, 41)
    rows = [2, 0, 2, 1]

    def go_on(change, order: list[int]) -> None:
        _, past = decoded(module, x[:, :40], [40], padding)
        change(past)
        chosen = [padding[r] for r in order]
        position = 40 - torch.tensor(chosen)[:, None]
        out = module(x[order, 40:], angles(position), padded_mask(chosen, 40, 41), past)[0]
        expected = decoded(module, x, [40, 1], padding)[0][order, 40:]
        torch.testing.assert_close(out, expected)

    go_on(lambda past: past.reorder_cache(torch.tensor(rows)), rows)
    go_on(lambda past: past.batch_select_indices(torch.tensor([1, 2])), [1, 2])
    go_on(lambda past: past.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2])


@torch.no_grad()
def test_a_cache_that_was_reset_starts_anew():
    module, x = attention(), some_input(1, 30)
    first, past = decoded(module, x, [30])
    past.reset()
    assert past.get_seq_length() == 0
    torch.testing.assert_close(module(x, turn(30), None, past)[0], first)
    with pytest.raises(NotImplementedError, match="taken back"):
        past.crop(-1)


def test_a_cache_of_another_form_is_refused():
    config = AutoConfig.for_model("llama", hidden_size=HIDDEN, num_attention_heads=HEADS, num_hidden_layers=1)
    with pytest.raises(TypeError, match="empty DynamicLayer"):
        attention()(some_input(1, 3), turn(3), None, StaticCache(config=config, max_cache_len=8))


def test_training_with_a_cache_in_place_keeps_its_gradients():
    module = attention()
    plain, cached = (some_input(1, 31).requires_grad_() for _ in range(2))
    module(plain, turn(31))[0].square().sum().backward()
    module(cached, turn(31), None, DynamicCache())[0].square().sum().backward()
    torch.testing.assert_close(cached.grad, plain.grad)


# Masks


def test_padding_is_read_from_every_form_of_mask():
    causal = padded_mask([0, 2, 6], 0, 6)
    assert nsa_blocks.left_padding(None, 3, 6, 0) is None
    assert nsa_blocks.left_padding(causal, 3, 6, 0) == (0, 2, 6)
    assert nsa_blocks.left_padding(torch.where(causal, 0.0, torch.finfo(torch.float32).min), 3, 6, 0) == (0, 2, 6)
    assert nsa_blocks.left_padding(torch.arange(6) >= torch.tensor([0, 2, 6])[:, None], 3, 6, 0) == (0, 2, 6)
    assert nsa_blocks.left_padding(padded_mask([1, 4], 3, 8), 2, 5, 3) == (1, 4)
    assert nsa_blocks.left_padding(padded_mask([0], 0, 6), 4, 6, 0) is None
    at_the_end = padded_mask([0, 0], 0, 6) & (torch.arange(6) < torch.tensor([6, 3])[:, None, None, None])
    assert nsa_blocks.left_padding(at_the_end, 2, 6, 0) is None


def test_masks_of_packed_sequences_are_refused():
    packed = padded_mask([0], 0, 8)
    packed[:, :, 4:, :4] = False
    with pytest.raises(ValueError, match="packed"):
        attention()(some_input(1, 8), turn(8), packed)
    with pytest.raises(ValueError, match="not one of shape"):
        nsa_blocks.left_padding(torch.ones(1, 1, 8, 4), 1, 8, 0)


# Whole models


def tiny(name: str):
    """A tiny model of the catalogue with NSA in the place of its attention."""
    folder = Path(effbench.models.__file__).parent / "catalogue"
    shape = YAML(typ="safe").load(folder / f"{name}.yaml")
    config = AutoConfig.for_model(shape["model_type"], **shape["config"])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    technique = NSA(NSAParams(**NSA.small_params))
    return technique.apply(model)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2", "tiny-mistral"])
@torch.no_grad()
def test_greedy_tokens_of_a_model_are_those_of_full_forwards(name):
    model = tiny(name)
    modules = [m for m in model.modules() if isinstance(m, NSAAttention)]
    assert [m.layer_idx for m in modules] == [0, 1]
    assert (modules[0].q_proj.bias is not None) == (name == "tiny-qwen2")
    assert modules[0].o_proj.bias is None
    prompt, padding, new = 45, 13, 20
    ids = torch.randint(0, 256, (2, prompt), generator=torch.Generator().manual_seed(5))
    real = torch.ones_like(ids)
    real[1, :padding] = 0
    position = (real.cumsum(-1) - 1).clamp(min=0)
    out = model(input_ids=ids, attention_mask=real, position_ids=position, use_cache=True)
    tokens, logits = ids, [out.logits[:, -1]]
    for _ in range(new - 1):
        token = logits[-1].argmax(-1, keepdim=True)
        tokens, real = torch.cat([tokens, token], dim=1), torch.cat([real, torch.ones_like(token)], dim=1)
        out = model(
            input_ids=token, attention_mask=real, position_ids=real.sum(-1, keepdim=True) - 1,
            past_key_values=out.past_key_values, use_cache=True,
        )  # fmt: skip
        logits.append(out.logits[:, -1])
    assert {m.backend_used for m in modules} == {"gather"}
    for row, pad in ((0, 0), (1, padding)):
        full = model(input_ids=tokens[row : row + 1, pad:], use_cache=False).logits[0, prompt - pad - 1 :]
        found = torch.stack(logits, dim=1)[row]
        torch.testing.assert_close(found, full, rtol=1e-4, atol=1e-4)
        assert torch.equal(found.argmax(-1), full.argmax(-1))
    alone = torch.cat([tokens[:1, prompt:], logits[-1][:1].argmax(-1, keepdim=True)], dim=1)
    generated = model.generate(ids[:1], max_new_tokens=new, do_sample=False)
    assert torch.equal(generated[:, prompt:], alone)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2"])
def test_weights_in_fp32_train_and_decode_under_bf16_autocast(name):
    model, ids = tiny(name), torch.randint(0, 256, (2, 70), generator=torch.Generator().manual_seed(6))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    assert all(bool(p.grad.any()) for n, p in model.named_parameters() if "self_attn" in n and n.endswith("weight"))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        full = model(input_ids=ids[:, :24], use_cache=False).logits.float()
        out = model(input_ids=ids[:, :20], use_cache=True)
        for at in range(20, 24):
            out = model(input_ids=ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
            assert float((out.logits[:, 0].float() - full[:, at]).abs().max() / full.std()) < 0.05


def test_weights_are_saved_and_loaded():
    one, other = attention(seed=1), attention(seed=2)
    x = some_input(1, 20)
    assert not torch.equal(one(x, turn(20))[0], other(x, turn(20))[0])
    other.load_state_dict(one.state_dict(), strict=True)
    assert torch.equal(one(x, turn(20))[0], other(x, turn(20))[0])


def test_new_weights_are_drawn_for_every_part():
    model = tiny("tiny-llama")
    for name, p in model.named_parameters():
        if "self_attn" in name:
            assert bool(p.any()) == (not name.endswith("bias")), name
    assert replace_attention(model, lambda config, layer: NSAAttention(config, layer, NSAParams(**SMALL)))


# The declaration


def context(model_type: str = "llama", device: str = "cpu", params: dict | None = None, **config) -> Context:
    shape = {"hidden_size": 128, "num_attention_heads": 8, "max_position_embeddings": 1024, **config}
    return Context(
        config=shape, model_type=model_type, device=device, trains=True, weights="random",
        params={"seq_len": 600} if params is None else params,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("params", "changes", "said"),
    [
        ({}, {"model_type": "phi3"}, ["'phi3'", "llama"]),
        ({"groups": 3}, {}, ["8 query heads", "3", "1, 2, 4, 8"]),
        ({"stride": 12}, {}, ["stride 12", "block 32"]),
        ({"block": 16, "stride": 16, "select_block": 40}, {}, ["stride 16", "select_block 40"]),
        ({"block": 128}, {}, ["block 128", "select_block 64"]),
        ({"num_selected": 2}, {}, ["num_selected 2", "3"]),
        ({"window": 601}, {}, ["window 601", "600"]),
        ({"window": 21}, {"params": {"prompt_tokens": 15, "new_tokens": 5}}, ["window 21", "20"]),
        ({"window": 1025}, {"params": {}}, ["window 1025", "1024"]),
        ({}, {"model_type": "mistral", "sliding_window": 599}, ["599", "600"]),
        ({"backend": "flex"}, {}, ["flex", "CUDA", "cpu"]),
    ],
)
def test_what_cannot_be_done_is_refused_with_value_and_limit(params, changes, said):
    answer = NSA(NSAParams(**params)).supports(context(**changes))
    assert not answer.ok
    assert all(part in answer.reason for part in said), answer.reason
    assert not answer.reason.endswith(".")


def test_what_can_be_done_is_supported():
    assert NSA().supports(context()).ok
    assert NSA().supports(context("mistral", sliding_window=600)).ok
    assert NSA().supports(context("qwen2", sliding_window=131072, use_sliding_window=False)).ok
    assert NSA(NSAParams(backend="flex")).supports(context(device="cuda")).ok


def test_cost_counts_the_matrices_and_blocks_there_are():
    module = attention()
    cost = module.cost
    linears = [module.q_proj, module.k_proj, module.v_proj, module.o_proj, module.gate_proj[0], module.gate_proj[2]]
    per_block = sum(
        m.weight.numel() for part in (module.compress_keys, module.compress_values) for m in (part.up_proj, part.down_proj)
    )
    expected = 2 * (sum(m.weight.numel() for m in linears) + per_block * cost.groups / cost.stride)
    assert cost.projection_flops() == expected
    # The paper's values at 64K: N = 4095 + 1024 + 512.
    paper = NSACost(
        hidden=2560, heads=64, groups=4, key_dim=192, value_dim=128, block=32, stride=16, select_block=64, num_selected=16,
        window=512,
    )  # fmt: skip
    assert paper.attended(65536) == 4095 + 1024 + 512
    assert 65536 / paper.attended(65536) == pytest.approx(11.6, abs=0.05)
    declared = NSA().cost(context())
    assert declared.flops_per_token > 0
    assert declared.cache_elements_per_token > 2 * 4 * 16
