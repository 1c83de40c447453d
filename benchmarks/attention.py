"""What attention costs per decoded token on a CPU, module against module, so that the rest of a model hides nothing.

    grow     one decode step of NSA (the paper's block sizes) at 2k and at 8k tokens, beside full attention with the same
             grouped heads: sparse decode must not grow as the context does, in a run where full attention does
    absorb   one decode step of MLA at 4k tokens beside transformers' DeepSeek-V2 attention at the same shape
    same     one decode step of GQA and MQA as the techniques build them beside transformers' own attention

Every arm steps on a copy of one prepared cache, one thread, and gives its median step; each block runs all arms in random
order, and each kind of comparison has its A/A. Prefill fills the caches and is not timed.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

from benchmarks import common
from benchmarks.common import Figure, Options, Report, Samples, Target, against

SPARSE = Target(text="at most 1.5", upper=1.5)
FULL = Target(text="at least 3", lower=3.0)
TWICE = Target(text="at least 2", lower=2.0)
TOLERANCE = 0.03
HIDDEN, HEADS, GROUPS, DIM = 1024, 16, 4, 64
BATCH = 4
SHORT, LONG, LATENT = 2048, 8192, 4096
LEAST_STEPS, LEAST_S = 7, 0.15
TURNS = 40


@dataclass(frozen=True)
class Step:
    """A module with a filled cache: what one decode step needs."""

    module: Any
    cache: Any
    hidden: Any  # (B, 1, E)
    positions: Any

    def time_s(self) -> Mapping[str, float | None]:
        """Median of some steps on a copy of the cache; the first, which makes its memory grow, is not counted."""
        import torch

        cache, times = copy.deepcopy(self.cache), []
        with torch.inference_mode():
            while len(times) <= LEAST_STEPS or sum(times) < LEAST_S:
                began_s = time.perf_counter()
                self.module(self.hidden, position_embeddings=self.positions, attention_mask=None, past_key_values=cache)
                times.append(time.perf_counter() - began_s)
        return {"step_s": statistics.median(times[1:])}


def run(options: Options) -> Report:
    """Up to 60 blocks, as many as fit."""
    import torch

    common.stay_on_one_core()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    scale = 16 if options.tiny else 1
    steps = {**_growing(SHORT // scale, LONG // scale), **_latent(LATENT // scale)}
    arms: dict[str, Callable[[], Mapping[str, float | None]]] = {name: step.time_s for name, step in steps.items()}
    for name in ("nsa short", "full short", "mla library"):
        arms[f"{name} again"] = steps[name].time_s
    arms |= {name: partial(_alternated, *pair) for name, pair in _grouped(SHORT // scale).items()}
    samples = common.run_blocks(
        arms, blocks=options.plan(60, tiny=1), seed=options.seed, limit_s=options.limit_s, say=common.say
    )
    return Report(
        name="attention",
        compares=f"one decode step of one attention module, batch {BATCH}, one thread",
        pairs=len(samples.blocks),
        figures=[*_growth_figures(samples), *_latent_figures(samples), *_grouped_figures(samples)],
        notes=(
            f"grow and same: hidden {HIDDEN}, {HEADS} heads of {DIM}, {GROUPS} groups, {SHORT} and {LONG} tokens.",
            f"absorb: hidden 2048, 16 heads, d_h 128, d_R 64, d_c 512, d_q 1536, {LATENT} tokens, batch 1.",
        ),
    )


def _growth_figures(samples: Samples) -> list[Figure]:
    found = [_absolute(samples, name) for name in ("nsa short", "nsa long", "full short", "full long")]
    return [
        *found,
        Figure(key="aa_nsa_ratio", title="A/A, NSA at 2k", interval=samples.ratio("nsa short again", "nsa short", "step_s")),
        against("nsa_growth_ratio", "NSA: 8k / 2k", samples.ratio("nsa long", "nsa short", "step_s"), SPARSE),
        Figure(
            key="aa_full_ratio", title="A/A, full at 2k", interval=samples.ratio("full short again", "full short", "step_s")
        ),
        against("full_growth_ratio", "full attention: 8k / 2k", samples.ratio("full long", "full short", "step_s"), FULL),
    ]


def _latent_figures(samples: Samples) -> list[Figure]:
    control = samples.ratio("mla library again", "mla library", "step_s")
    return [
        _absolute(samples, "mla"),
        Figure(key="aa_mla_ratio", title="A/A, DeepSeek-V2 of transformers", interval=control),
        against("mla_speedup_ratio", "transformers' / ours, 4k", samples.ratio("mla library", "mla", "step_s"), TWICE),
    ]


def _grouped_figures(samples: Samples) -> list[Figure]:
    found = []
    for name in ("gqa", "mqa"):
        control, ratio = samples.interval(name, "again_ratio"), samples.interval(name, "ours_ratio")
        verdict = common.judge_agreement(ratio, control, TOLERANCE)
        said = "within 3 % beyond the A/A"
        found += [
            Figure(key=f"aa_{name}_ratio", title=f"A/A, {name} of transformers", interval=control),
            Figure(key=f"{name}_ratio", title=f"{name}: ours / transformers'", interval=ratio, target=said, verdict=verdict),
        ]
    return found


def _absolute(samples: Samples, name: str) -> Figure:
    key = f"{name.replace(' ', '_')}_s"
    return Figure(key=key, title=f"decode step, {name}", interval=samples.interval(name, "step_s"))


def _growing(short: int, long: int) -> dict[str, Step]:
    """NSA and full attention with equal groups, at both lengths."""
    from effbench.modules.nsa import NSAAttention
    from effbench.modules.replace import initialise
    from effbench.techniques.nsa import NSAParams

    config = _llama(GROUPS)
    sparse = NSAAttention(config, 0, NSAParams(groups=GROUPS)).eval()
    initialise(sparse, 0.02)
    full = _library_attention(config)
    return {
        f"{name} {size}": _filled(module, config, tokens, BATCH)
        for name, module in (("nsa", sparse), ("full", full))
        for size, tokens in (("short", short), ("long", long))
    }


def _grouped(tokens: int) -> dict[str, tuple[Step, Step]]:
    """The attention that the techniques build, and the library's own with as many key/value heads, the same weights and cache."""
    from effbench import registry

    found = {}
    for name, groups in (("gqa", GROUPS), ("mqa", 1)):
        kind = registry.technique(name)
        changed = SimpleNamespace(**_values(HEADS))
        kind(kind.Params(**({"groups": groups} if name == "gqa" else {}))).configure(changed)
        own, plain = _llama(changed.num_key_value_heads), _llama(groups)
        step = _filled(_library_attention(own), own, tokens, BATCH)
        library = _library_attention(plain)
        library.load_state_dict(step.module.state_dict(), assign=True)
        found[name] = step, replace(step, module=library)
    return found


def _alternated(ours: Step, library: Step) -> Mapping[str, float | None]:
    """Median ratios of single steps taken in turn: equal code must not differ, so they have to lie as close as can be."""
    import random

    import torch

    caches = {name: copy.deepcopy(ours.cache) for name in ("ours", "library", "again")}
    modules = {"ours": ours.module, "library": library.module, "again": library.module}
    rounds: list[dict[str, float]] = []
    with torch.inference_mode():
        for _ in range(TURNS):
            taken = {}
            for name in random.sample(list(caches), len(caches)):
                began_s = time.perf_counter()
                modules[name](
                    ours.hidden, position_embeddings=ours.positions, attention_mask=None, past_key_values=caches[name]
                )
                taken[name] = time.perf_counter() - began_s
            rounds.append(taken)
    return {
        "ours_ratio": statistics.median(r["ours"] / (r["library"] * r["again"]) ** 0.5 for r in rounds[1:]),
        "again_ratio": statistics.median(r["again"] / r["library"] for r in rounds[1:]),
    }


def _latent(tokens: int) -> dict[str, Step]:
    """Ours and transformers' DeepSeek-V2 attention with the shape of DeepSeek-V2-Lite and a query latent."""
    import torch
    from transformers import DeepseekV2Config, DynamicCache
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention

    from effbench.costs import MLACost
    from effbench.modules.mla import MLAAttention
    from effbench.modules.replace import initialise

    cost = MLACost(hidden=2048, heads=16, dim=128, value_dim=128, q_rank=1536, kv_rank=512, rope_dim=64)
    ours = MLAAttention(SimpleNamespace(rms_norm_eps=1e-6, _attn_implementation="sdpa"), 0, cost).eval()
    config = DeepseekV2Config(
        hidden_size=2048, num_attention_heads=16, num_key_value_heads=16, q_lora_rank=1536, kv_lora_rank=512,
        qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, attn_implementation="sdpa",
    )  # fmt: skip
    library = DeepseekV2Attention(config, 0).eval()
    for module in (ours, library):
        initialise(module, 0.02)
    hidden = torch.randn(1, 1, 2048)
    ours_cache, library_cache = DynamicCache(), DynamicCache()
    ours_cache.update(torch.randn(1, 1, tokens, 576), torch.randn(1, 1, tokens, 0), 0)
    library_cache.update(torch.randn(1, 1, tokens, 512), torch.randn(1, 1, tokens, 64), 0)
    turned = torch.polar(torch.ones(1, 1, 32), torch.full((1, 1, 32), 0.5))  # this library module takes complex rotations
    return {
        "mla": Step(ours, ours_cache, hidden, (torch.ones(1, 1, 64), torch.zeros(1, 1, 64))),
        "mla library": Step(library, library_cache, hidden, turned),
    }


def _values(groups: int) -> dict[str, Any]:
    return {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": groups, "head_dim": DIM}


def _llama(groups: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**_values(groups), num_hidden_layers=1, max_position_embeddings=65536, attn_implementation="sdpa")


def _library_attention(config: Any) -> Any:
    from transformers.models.llama.modeling_llama import LlamaAttention

    from effbench.modules.replace import initialise

    module = LlamaAttention(config, 0).eval()
    initialise(module, 0.02)
    return module


def _filled(module: Any, config: Any, tokens: int, batch: int) -> Step:
    """A step of this module after a prefill of `tokens`."""
    import torch
    from transformers import DynamicCache
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary, cache = LlamaRotaryEmbedding(config), DynamicCache()
    hidden = torch.randn(batch, tokens + 1, HIDDEN)
    turned = rotary(hidden, torch.arange(tokens + 1)[None])
    with torch.inference_mode():
        prompt = (turned[0][:, :tokens], turned[1][:, :tokens])
        module(hidden[:, :tokens], position_embeddings=prompt, attention_mask=None, past_key_values=cache)
    return Step(module, cache, hidden[:, tokens:], (turned[0][:, tokens:], turned[1][:, tokens:]))
