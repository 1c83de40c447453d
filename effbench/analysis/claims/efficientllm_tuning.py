"""EfficientLLM (arXiv 2505.13840), C10 to C17, on fine-tuning, transfer and the whole: what was printed, and what would show it.

Sources and grades as in `efficientllm.py`. The paper's losses are of training; here they are of held-out text.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from effbench.analysis.claims.efficientllm import PAPER
from effbench.analysis.claims.shapes import Best, Ratio, Trend
from effbench.analysis.claims.standing import NoSingleBest
from effbench.analysis.claims.types import Claim, Printed

_claim = partial(Claim, paper=PAPER)
_pretrain: Any = {"workload": "pretrain"}
_finetune: Any = {"workload": "finetune"}
_generate: Any = {"workload": "generate"}
LORA_FAMILY = ("lora", "rslora", "dora", "pissa")
SMALL, FROM_14B, BELOW_14B = (0.9e9, 4e9), (13e9, 40e9), (0.0, 13e9)  # weights
VISION = "The vision workloads `diffuse` and `vlm` are not built yet; they would measure this."

CLAIMS = (
    _claim(
        id="C10",
        sentence="LoRA+ is the best fine-tuning method for models of 1B to 3B.",
        printed=(
            Printed(text="training loss 0.7442 (1B) and 0.5791 (3B)", grade="S"),
            Printed(text="PiSSA 0.5137 at 3B, Freeze 0.6425 at 1B", grade="S"),
        ),
        remark="Best only inside the LoRA family and only at 1B, by its own table, and in training loss.",
        parts=(
            Best(says="lowest validation loss, 1B to 3B", metric="validation_loss", arm="lora_plus",
                 rivals=(*LORA_FAMILY, "freeze", "full"), size=SMALL, **_finetune),
            Best(says="lowest validation loss of the LoRA family, any size", metric="validation_loss", arm="lora_plus",
                 rivals=LORA_FAMILY, alike=True, beside=True, **_finetune),
        ),
    ),
    _claim(
        id="C11",
        sentence="RSLoRA is more efficient than LoRA only beyond 14B.",
        printed=(
            Printed(text="training loss 0.4126 against 0.4795 (14B)", grade="S"),
            Printed(text="in 14B–24B LoRA ranks better in memory (1, 2), latency (2, 4) and throughput (3, 4)", grade="P"),
        ),
        remark="Graph, weights and FLOPs are the same, so speed and memory must be equal: this is a negative control.",
        parts=(
            Ratio(says="at least 5 % faster from 14B on", metric="al_s", arm="rslora", base="lora", below=0.95, alike=True,
                  size=FROM_14B, **_finetune),
            Ratio(says="lower validation loss from 14B on", metric="validation_loss", arm="rslora", base="lora", below=1.0,
                  alike=True, size=FROM_14B, **_finetune),
            Ratio(says="not faster below 14B, to 5 %", metric="al_s", arm="rslora", base="lora", above=0.95, alike=True,
                  size=BELOW_14B, **_finetune),
            Ratio(says="control: the same speed to 5 %, any size", metric="al_s", arm="rslora", base="lora", above=0.95, below=1.05,
                  alike=True, beside=True, **_finetune),
        ),
    ),
    _claim(
        id="C12",
        sentence="Freezing layers has the lowest latency of all fine-tuning methods, by about 3 times.",
        printed=(
            Printed(text="about 3×; 0.2542 s a step (1B)", grade="S"),
            Printed(text="4.6 to 8.5 times at 1B; its 14B was faster than its 8B", grade="D"),
        ),
        remark="The batch was not held fixed. Judged at a fixed batch, against LoRA: at least 2 times as fast.",
        parts=(
            Best(says="lowest latency", metric="al_s", arm="freeze", rivals=("full", "lora_plus", *LORA_FAMILY), **_finetune),
            Ratio(says="at least 2 times as fast as LoRA", metric="al_s", arm="freeze", base="lora", below=0.5, **_finetune),
        ),
    ),
    _claim(
        id="C13",
        sentence="DoRA is slow.",
        printed=(Printed(text="up to 8.93 s a step", grade="S"),),
        remark="Its extra work does not depend on the number of tokens, so the price falls as a step gets larger.",
        parts=(
            Ratio(says="slower than LoRA", metric="al_s", arm="dora", base="lora", above=1.0, alike=True, **_finetune),
            Trend(says="the price falls as tokens per step rise", metric="al_s", arm="dora", base="lora", alike=True, below=1.0,
                  over="params.batch_size*params.seq_len", ignoring=("params.activation_checkpointing",), beside=True, **_finetune),
        ),
    ),
    _claim(
        id="C14",
        sentence="Full fine-tuning pays less and less as models grow.",
        printed=(Printed(text="24B: loss 1.2805 against 0.3757 to 0.3975 of the LoRA family", grade="S"),),
        remark="Half the batch, training loss, and DoRA nearly as bad there: it looks like divergence, not scale.",
        parts=(
            Trend(says="its validation loss over LoRA's rises with the weights", metric="validation_loss", arm="full", base="lora",
                  over="params_total", ignoring=("model", "params.learning_rate"), above=1.0, **_finetune),
        ),
    ),
    _claim(
        id="C15",
        sentence="What attention variants and mixtures of experts gain carries over to diffusion transformers.",
        printed=(
            Printed(text="DiT-XL/2 FID 19.47 (MHA), 8.93 (MQA), 8.71 (GQA); DiT-B/4 with MoE 68.38 → 45.62", grade="S"),
        ),
        remark="Most cells of those tables were not found.",
        needs=VISION,
        parts=(
            Ratio(says="GQA: better quality than MHA", workload="diffuse", metric="quality", arm="gqa", base="mha", above=1.0),
            Ratio(says="MoE: better quality than dense", workload="diffuse", metric="quality", arm="moe", base="dense()", above=1.0),
        ),
    ),
    _claim(
        id="C16",
        sentence="The order of fine-tuning methods carries over to vision-language models: PiSSA first at 7B to 38B.",
        printed=(
            Printed(text="Qwen2.5-VL PiSSA 0.3156, InternVL-3-38B PiSSA 0.3635, QvQ-72B RSLoRA 0.1434", grade="S"),
            Printed(text="LLaVA-1.5 LoRA-plus 0.9716", grade="S"),
        ),
        remark="Single losses without spread, and LLaVA-1.5-7B already differs.",
        needs=VISION,
        parts=(
            Best(says="PiSSA: lowest validation loss, 7B to 38B", workload="vlm", metric="validation_loss", arm="pissa",
                 rivals=("lora", "lora_plus", "rslora", "dora"), size=(6e9, 40e9)),
        ),
    ),
    _claim(
        id="C17",
        sentence="No technique is the best in every metric.",
        printed=(Printed(text="no method is Pareto-optimal on all metrics", grade="S"),),
        remark="True almost by construction with six metrics, so it needs intervals.",
        parts=(
            NoSingleBest(says="training: every row is behind another somewhere", metric="al_s", **_pretrain,
                         names=("al_s", "amu_gb", "energy_j_per_token", "perplexity")),
            NoSingleBest(says="fine-tuning: every row is behind another somewhere", metric="al_s", **_finetune,
                         names=("al_s", "amu_gb", "energy_j_per_token", "validation_loss")),
            NoSingleBest(says="generation: every row is behind another somewhere", metric="al_s", **_generate,
                         names=("al_s", "amu_gb", "energy_j_per_token", "kv_cache_bytes_per_token", "quality")),
        ),
    ),
)  # fmt: skip
