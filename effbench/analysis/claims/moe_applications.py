"""The claims of Llama-SMoP (arXiv 2505.14336), FuxiMT (2505.14256) and U-SAM (2505.13880), numbered by paper.

No figure of latency, FLOPs or energy was found for any of them. The workloads `smop`, `fuximt` and `usam` measure them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from effbench.analysis.claims.shapes import Ratio, Trend
from effbench.analysis.claims.types import Claim, Printed

_smop = partial(Claim, paper="Llama-SMoP")  # suites/smop.yaml, and scaled down suites/cpu/smop.yaml
_fuximt = partial(Claim, paper="FuxiMT")  # suites/fuximt.yaml, and scaled down suites/cpu/fuximt.yaml
_usam = partial(Claim, paper="U-SAM")  # suites/usam.yaml, and scaled down suites/cpu/usam.yaml
_s: Any = {"workload": "smop"}
_f: Any = {"workload": "fuximt"}
_u: Any = {"workload": "usam"}

CLAIMS = (
    _smop(
        id="S1",
        sentence="Cost does not grow with the number of experts when each token uses as many as before.",
        printed=(Printed(text="E = 4, k = 2 in the released command; no figure of cost", grade="P"),),
        remark="True of FLOPs by construction. Memory grows by one expert each, and the released loop over experts grows with E.",
        parts=(
            Trend(says="FLOPs, from few experts to many", metric="projector_flops", arm="smop_jejr", over="techniques.smop_jejr.experts",
                  above=0.95, below=1.05, exact=True, **_s),
            Trend(says="latency of the projector, from few experts to many", metric="projector_s", arm="smop_jejr",
                  over="techniques.smop_jejr.experts", above=0.8, below=1.25, **_s),
            Trend(says="stored weights grow with the experts", metric="weight_bytes", arm="smop_jejr",
                  over="techniques.smop_jejr.experts", above=1.0, beside=True, **_s),
            Trend(says="latency of the released loop grows with the experts", metric="projector_s", arm="smop_loop",
                  over="techniques.smop_loop.experts", above=1.0, beside=True, **_s),
        ),
    ),
    _smop(
        id="S2",
        sentence="The sparse projector costs nothing more in inference than the dense one.",
        printed=(Printed(text="“without increasing inference cost”, no figure", grade="P"),),
        remark="Two experts of full width are twice the FLOPs at the projector (D) and about 1 % end to end (D). Both are reported.",
        parts=(
            Ratio(says="the projector, to 5 %", metric="projector_s", arm="smop_jejr", base="smop_dense", below=1.05, **_s),
            Ratio(says="end to end, to 5 %", metric="ttft_s", arm="smop_jejr", base="smop_dense", below=1.05, **_s),
            Ratio(says="FLOPs of the projector", metric="projector_flops", arm="smop_jejr", base="smop_dense", below=1.05,
                  beside=True, exact=True, **_s),
        ),
    ),
    _smop(
        id="S3",
        sentence="Disjoint experts and routers use as many weights a token as joint ones.",
        printed=(Printed(text="one full mixture for each modality (DEDR) beside a joint one (JEJR)", grade="P"),),
        remark="Whether DEDR has 4 experts for each modality or in all was not found; total weights are 2 times in the first case.",
        parts=(
            Ratio(says="active weights are equal", metric="params_active", arm="smop_dedr", base="smop_jejr", above=0.99, below=1.01,
                  alike=True, exact=True, **_s),
            Ratio(says="the projector has about 2 times the weights", metric="moe_params", arm="smop_dedr", base="smop_jejr", above=1.8,
                  below=2.2, alike=True, beside=True, exact=True, **_s),
        ),
    ),
    _fuximt(
        id="F1",
        sentence="Only the experts train: the frozen backbone has no gradients and no optimizer states.",
        printed=(Printed(text="BLOOMz-7B frozen, 8 experts every 8th layer", grade="S"),),
        remark="Partly reconstructed: k, losses, width of the experts and initialisation were not found.",
        parts=(
            Ratio(says="every trainable weight has states, and no other", metric="params_trainable", per="optimizer_params",
                  arm="fuximt", above=1.0, below=1.0, exact=True, **_f),
            Ratio(says="weights with states are those of experts, routers and gates", metric="optimizer_params", per="moe_params", arm="fuximt", above=1.0,
                  below=1.0, exact=True, **_f),
        ),
    ),
    _fuximt(
        id="F2",
        sentence="FLOPs grow with the experts that a token uses, not with the number of experts.",
        printed=(Printed(text="8 experts; no figure of cost", grade="S"),),
        remark="About +5.7 % FLOPs a token for k = 1 and +11.4 % for k = 2 (D). In training the dense model trains all of its weights.",
        parts=(
            Trend(says="FLOPs per token, from few experts to many", metric="flops_per_token", arm="fuximt",
                  over="techniques.fuximt.experts", above=0.99, below=1.01, exact=True, **_f),
            Trend(says="FLOPs per token grow with k", metric="flops_per_token", arm="fuximt", over="techniques.fuximt.top_k",
                  above=1.0 + 1e-6, exact=True, **_f),
            Ratio(says="throughput against the dense model, to 20 %", metric="tokens_per_s", arm="fuximt", base="dense()", above=0.8,
                  beside=True, **_f),
        ),
    ),
    _fuximt(
        id="F3",
        sentence="The curriculum is an order of the data: it costs no speed.",
        printed=(Printed(text="languages and difficulty widen step by step; schedule not found", grade="?"),),
        remark="What it does for quality needs real parallel data and is not judged here.",
        parts=(
            Ratio(says="the same throughput to 5 %", metric="tokens_per_s", arm="fuximt(order=curriculum)",
                  base="fuximt(order=shuffled)", above=0.95, below=1.05, **_f),
        ),
    ),
    _usam(
        id="U1",
        sentence="Soft routing is not sparse: its cost grows with the number of experts.",
        printed=(Printed(text="all 3 experts run, a softmax weights them", grade="P"),),
        remark="No result tables were found.",
        parts=(
            Trend(says="FLOPs of the projector grow with the experts", metric="projector_flops", arm="usam_soft",
                  over="techniques.usam_soft.experts", above=1.2, exact=True, **_u),
            Trend(says="latency of the projector grows with the experts", metric="projector_s", arm="usam_soft",
                  over="techniques.usam_soft.experts", above=1.0, **_u),
        ),
    ),
    _usam(
        id="U2",
        sentence="At 1.4 tokens a second of sound the language model's prefill is small, so the encoders dominate.",
        printed=(Printed(text="window of 17 frames, 1 query; 10 s are 14 windows", grade="P"),),
        remark="Judged: encoders take more of the time than the language model's prefill.",
        parts=(
            Ratio(says="encoder time over prefill time", metric="encoder_s", per="prefill_s", arm="usam_soft", above=1.0, **_u),
        ),
    ),
    _usam(
        id="U3",
        sentence="The contrastive module costs time in training only.",
        printed=(Printed(text="used in training only", grade="P"),),
        remark="Its 21.0M weights are more than the projector's 9.4M (D).",
        parts=(
            Ratio(says="a training step is slower with it", metric="train_step_s", arm="usam_soft(contrastive=True)",
                  base="usam_soft()", above=1.0, **_u),
            Ratio(says="inference is the same to 5 %", metric="ttft_s", arm="usam_soft(contrastive=True)",
                  base="usam_soft()", above=0.95, below=1.05, **_u),
        ),
    ),
    _usam(
        id="U4",
        sentence="The released experts are one module three times, which equals a single projector.",
        printed=(Printed(text="`moe = [proj] * 3` in the released code", grade="P"),),
        remark="A defect of the code: 3,149,824 distinct weights. Three distinct experts must equal a batched product.",
        parts=(
            Ratio(says="aliased experts equal a single projector", metric="output_error", arm="usam_aliased", below=0.0, exact=True,
                  **_u),
            Ratio(says="distinct experts equal a batched product, to 10⁻⁵", metric="output_error", arm="usam_soft", below=1e-5,
                  exact=True, **_u),
        ),
    ),
)  # fmt: skip
