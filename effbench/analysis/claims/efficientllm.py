"""EfficientLLM (arXiv 2505.13840), C1 to C9, on architecture and bit width: what was printed, and what would show it.

Its body text was not at hand: S are numbers that third parties quote from its tables. What is derived from them is marked D and
was not published. Where the paper gives a factor, the region is the printed factor with the margin that is stated in the part.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from effbench.analysis.claims.shapes import Best, Ratio
from effbench.analysis.claims.types import Claim, Printed

PAPER = "EfficientLLM"
_claim = partial(Claim, paper=PAPER)
_pretrain: Any = {"workload": "pretrain"}
_generate: Any = {"workload": "generate"}

CLAIMS = (
    _claim(
        id="C1",
        sentence="A mixture of experts is better than the dense model of its shape, for about 40 % more memory.",
        printed=(
            Printed(text="up to 3.5 points better; perplexity 7.10 (1.5B×8, top-2) against 8.09 (dense 1.5B)", grade="S"),
            Printed(text="+40 % memory", grade="S"),
            Printed(text="its own cells, 76.53 GB and 44.82 GB, are +71 %", grade="D"),
        ),
        remark="The dense models have neither equal active nor equal total weights, and which FLOPs are fewer is not said.",
        parts=(
            Ratio(says="lower perplexity than the dense model", metric="perplexity", arm="moe", base="dense()", below=1.0,
                  **_pretrain),
            Ratio(says="30 to 50 % more memory, experts of full width", metric="amu_gb", arm="moe(granularity=1)", base="dense()",
                  above=1.3, below=1.5, **_pretrain),
            Ratio(says="lower perplexity at equal active weights", metric="perplexity", arm="moe", base="dense(width=2.0)",
                  below=1.0, beside=True, **_pretrain),
            Ratio(says="stored weights, experts of full width", metric="weight_bytes", arm="moe(granularity=1)", base="dense()",
                  above=1.3, below=1.5, beside=True, **_pretrain),
        ),
    ),
    _claim(
        id="C2",
        sentence="int4 cuts memory and energy by up to 3.9 times.",
        printed=(
            Printed(text="up to 3.9×", grade="S"),
            Printed(text="3.9 is MCR with a nominal size ratio of 4: 4 × 0.3950 / 0.4035 = 3.916", grade="D"),
            Printed(text="memory 51.83 → 34.21 GB and 71.33 → 48.30 GB; power 212 → 191 W and 279 → 215 W", grade="S"),
        ),
        remark="The factor is of nominal sizes. Its own cells give 1.5 times in memory and 1.2 to 1.4 times in joules per token.",
        parts=(
            Ratio(says="memory falls to 1/3.5 or less somewhere", metric="amu_gb", arm="int4", base="bf16", below=1 / 3.5,
                  somewhere=True, **_generate),
            Ratio(says="energy per token falls to 1/3.5 or less somewhere", metric="energy_j_per_token", arm="int4", base="bf16",
                  below=1 / 3.5, somewhere=True, **_generate),
            Ratio(says="less memory at all", metric="amu_gb", arm="int4", base="bf16", below=1.0, beside=True, **_generate),
            Ratio(says="less energy per token at all", metric="energy_j_per_token", arm="int4", base="bf16", below=1.0, beside=True,
                  **_generate),
            Ratio(says="stored weights fall to 1/3.5 or less somewhere", metric="weight_bytes", arm="int4", base="bf16",
                  below=1 / 3.5, somewhere=True, beside=True, **_generate),
        ),
    ),
    _claim(
        id="C3",
        sentence="int4 costs only 3 to 5 % of quality.",
        printed=(
            Printed(text="0.4719 → 0.4361 (14B) and 0.5523 → 0.5095 (32B), called −3 to −5 %", grade="S"),
            Printed(text="percentage points; relative to bf16 −7.6 % and −7.7 %, and −69 % on MATH", grade="D"),
        ),
        remark="Points and per cent are mixed. Judged: at most 5 % of the bf16 model's quality is lost.",
        parts=(
            Ratio(says="keeps 95 % of the quality", metric="quality", arm="int4", base="bf16", above=0.95, **_generate),
            Ratio(says="loses at most 0.05 in absolute quality", metric="quality_change", arm="int4", above=-0.05, beside=True,
                  **_generate),
        ),
    ),
    _claim(
        id="C4",
        sentence="bf16 has about 6 % lower latency and 9 % lower energy than fp16.",
        printed=(
            Printed(text="144.39 W (bf16) against 158.96 W (fp16), one model of 1.5B", grade="S"),
            Printed(text="39.68 against 37.70 tokens/s", grade="S"),
            Printed(text="the authors' board ranks fp16 first in latency in all three size bands", grade="P"),
        ),
        remark="One model without repeats, against its own board. Judged: at least 3 % lower latency and 4.5 % less energy.",
        parts=(
            Ratio(says="at least 3 % lower latency", metric="al_s", arm="bf16", base="fp16", below=0.97, **_generate),
            Ratio(says="at least 4.5 % less energy per token", metric="energy_j_per_token", arm="bf16", base="fp16", below=0.955,
                  **_generate),
        ),
    ),
    _claim(
        id="C5",
        sentence="MQA has the lowest memory and the lowest latency of the attention variants.",
        printed=(
            Printed(text="42.24 GB and 0.1298 s a step (1.5B), called the best trade-off", grade="S"),
            Printed(text="GQA at the same size: 44.87 GB and 0.1283 s", grade="S"),
        ),
        remark="At 1.5B GQA is the faster one in its own table; 1 % needs repeats. Where a cache counts is decoding.",
        parts=(
            Best(says="least memory in training", metric="amu_gb", arm="mqa", rivals=("gqa", "mla", "nsa"), **_pretrain),
            Best(says="lowest latency in training", metric="al_s", arm="mqa", rivals=("gqa", "mla", "nsa"), **_pretrain),
            Best(says="smallest cache per token in decoding", metric="kv_cache_bytes_per_token", arm="mqa",
                 rivals=("gqa", "mla", "nsa"), beside=True, **_generate),
            Best(says="shortest time per output token", metric="tpot_s", arm="mqa", rivals=("gqa", "mla", "nsa"), beside=True,
                 **_generate),
        ),
    ),
    _claim(
        id="C6",
        sentence="MLA gives the lowest perplexity.",
        printed=(Printed(text="7.79 (1.5B) and 7.29 (3B); GQA 8.09, MQA 8.23", grade="S"),),
        remark="It was also worst in memory at all sizes: training cannot show what its small cache saves in decoding.",
        parts=(
            Best(says="lowest perplexity", metric="perplexity", arm="mla", rivals=("gqa", "mqa", "nsa"), **_pretrain),
            Ratio(says="smaller cache per token than GQA", metric="kv_cache_bytes_per_token", arm="mla", base="gqa", below=1.0,
                  beside=True, **_generate),
        ),
    ),
    _claim(
        id="C7",
        sentence="NSA uses the least energy of the attention variants.",
        printed=(
            Printed(text="598 W (1.5B) and 594 W (0.5B); GQA 652.7 W", grade="S"),
            Printed(text="at 0.5962 s a step that is 356.5 J a step, GQA 83.7 J", grade="D"),
        ),
        remark="Watts are a mean power: a slow step looks frugal. In joules its own order is exactly the reverse.",
        parts=(
            Best(says="least energy per token", metric="energy_j_per_token", arm="nsa", rivals=("gqa", "mqa", "mla"), **_pretrain),
            Best(says="least mean power", metric="aec_w", arm="nsa", rivals=("gqa", "mqa", "mla"), beside=True, **_pretrain),
        ),
    ),
    _claim(
        id="C8",
        sentence="RoPE has the best perplexity, a relative position bias the best efficiency.",
        printed=(
            Printed(text="RoPE 8.09; “Relate” 8.29 with 43.94 GB, 0.1246 s and 646 W", grade="S"),
        ),
        remark="Differences of 1 to 3 % without repeats. “Relate” is not defined; T5's relative bias stands for it here.",
        parts=(
            Best(says="RoPE: lowest perplexity", metric="perplexity", arm="rope",
                 rivals=("learned_positions", "sinusoidal", "relative_bias", "nope"), **_pretrain),
            Best(says="relative bias: lowest latency", metric="al_s", arm="relative_bias",
                 rivals=("rope", "learned_positions", "sinusoidal"), **_pretrain),
            Best(says="relative bias: least memory", metric="amu_gb", arm="relative_bias",
                 rivals=("rope", "learned_positions", "sinusoidal"), **_pretrain),
        ),
    ),
    _claim(
        id="C9",
        sentence="Mamba needs about 25 % less power and memory than a Transformer.",
        printed=(
            Printed(text="about 25 % less; 30.25 against 44.82 GB, 510.64 against 653 W, perplexity 9.48 against 8.09", grade="S"),
            Printed(text="the cells are −33 % and −22 %", grade="D"),
        ),
        remark="Its “1.5B” Mamba had fewer weights. Judged at equal weights and tokens: at least 15 % less of both.",
        parts=(
            Ratio(says="at least 15 % less memory", metric="amu_gb", arm="mamba", base="dense()", below=0.85, **_pretrain),
            Ratio(says="at least 15 % less mean power", metric="aec_w", arm="mamba", base="dense()", below=0.85, **_pretrain),
            Ratio(says="less energy per token", metric="energy_j_per_token", arm="mamba", base="dense()", below=1.0, beside=True,
                  **_pretrain),
            Ratio(says="perplexity no more than 5 % higher", metric="perplexity", arm="mamba", base="dense()", below=1.05,
                  beside=True, **_pretrain),
        ),
    ),
)  # fmt: skip
