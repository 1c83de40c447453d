"""The claims and properties of Occult (arXiv 2505.13345), O1 to O8: collaborative communication in expert parallelism.

C_T is the mean number of devices among a token's experts. O1 to O5 are what the method must do exactly; O6 to O8 are what it
gains. Counts come from one draw of routing, the suite's, so a comparison of counts is exact for that draw.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from effbench.analysis.claims.shapes import Best, Ratio, Straight
from effbench.analysis.claims.types import Claim, Printed

_claim = partial(Claim, paper="Occult")
_here: Any = {"workload": "expert_parallel"}
_tuned: Any = {"workload": "finetune_pruned"}
_must: Any = {**_here, "exact": True}

CLAIMS = (
    _claim(
        id="O1",
        sentence="A token is sent once to each device among its experts, not once to each expert.",
        printed=(
            Printed(text="⌈k·N_d/N_e⌉ ≤ C_T ≤ min(k, N_d)", grade="S"),
            Printed(text="OLMoE on 4 devices, trivial placement: C_T 3.68", grade="S"),
            Printed(text="N_d·(1 − C(E − E/N_d, k)/C(E, k)) = 3.659 under uniform routing", grade="D"),
        ),
        remark="“Trivial placement” is random placement: the closed form gives the printed value.",
        parts=(
            Ratio(says="C_T is the count of distinct devices", metric="replicas_per_token", per="distinct_devices_per_token",
                  arm="ep_deduplicated", above=1.0, below=1.0, **_must),
            Ratio(says="C_T is at most min(k, N_d)", metric="replicas_per_token", per="replicas_upper_bound", arm="ep_deduplicated",
                  below=1.0, **_must),
            Ratio(says="C_T is at least ⌈k·N_d/N_e⌉", metric="replicas_per_token", per="replicas_lower_bound",
                  arm="ep_deduplicated", above=1.0, **_must),
            Ratio(says="within 1 % of the closed form under uniform routing", metric="uniform_replicas_per_token",
                  per="expected_uniform_replicas_per_token", arm="ep_deduplicated", above=0.99, below=1.01, **_must),
        ),
    ),
    _claim(
        id="O2",
        sentence="Placing experts anew changes where they are and nothing that they compute.",
        printed=(Printed(text="“exact”: results unchanged", grade="S"),),
        remark="Sums rounded in another order differ in the last bit, so it is judged on whole numbers in float64, where no sum is rounded.",
        parts=(
            Ratio(says="outputs equal those without placement", metric="output_error", arm="ep_placed", below=0.0, **_must),
            Ratio(says="experts per device differ by at most one", metric="experts_per_device_range", arm="ep_placed", below=1.0,
                  **_must),
        ),
    ),
    _claim(
        id="O3",
        sentence="The greedy placement sends fewer copies than experts in their order, about 20 % fewer.",
        printed=(
            Printed(text="C_T 3.68 → 3.02 (OLMoE, 4 devices)", grade="S"),
            Printed(text="about 20 % less C_T and time", grade="S"),
        ),
        remark="On structured routing; under uniform routing no placement can gain.",
        parts=(
            Ratio(says="C_T at least 10 % lower than in order", metric="replicas_per_token", arm="ep_placed", base="ep_deduplicated",
                  below=0.9, **_must),
            Ratio(says="exchanging experts never raises C_T on the calibration routing", metric="calibration_replicas_per_token",
                  arm="ep_refined", base="ep_placed", below=1.0, **_must),
        ),
    ),
    _claim(
        id="O4",
        sentence="Pruning to N devices sends no token to more than N.",
        printed=(Printed(text="C_T 1.98 for two devices and 1.0 for one (OLMoE, 4 devices)", grade="S"),),
        remark="Each token keeps k distinct experts, and pruning to all devices must change nothing.",
        parts=(
            Ratio(says="most devices of a token, over those allowed", metric="replicas_max", per="devices_allowed", arm="ep_pruned",
                  below=1.0, **_must),
            Ratio(says="k distinct experts each", metric="distinct_experts_min", per="experts_per_token", arm="ep_pruned", above=1.0,
                  below=1.0, **_must),
            Ratio(says="pruning to all devices changes no route", metric="routes_changed_by_full_pruning", arm="ep_pruned",
                  below=0.0, **_must),
        ),
    ),
    _claim(
        id="O5",
        sentence="One row crosses the network for each token and device, each way, instead of k rows a token.",
        printed=(Printed(text="libraries send k copies a token: 8 for OLMoE, against C_T 3.68", grade="S"),),
        remark="Local copies are counted. Summing before the return must equal summing after it, in float64 on whole numbers.",
        parts=(
            Ratio(says="rows sent are the sum of C_T", metric="rows_sent", per="expected_rows_sent", arm="ep_deduplicated", above=1.0,
                  below=1.0, **_must),
            Ratio(says="fewer bytes than k copies", metric="bytes_sent", arm="ep_deduplicated", base="ep_naive", below=1.0, **_here),
            Ratio(says="summing before the return changes nothing", metric="output_error", arm="ep_deduplicated", below=0.0, **_must),
        ),
    ),
    _claim(
        id="O6",
        sentence="Time grows on a straight line with C_T.",
        printed=(
            Printed(text="15.93, 12.53, 9.22 and 5.82 s at C_T 3.68, 3.02, 1.98 and 1.0 (4 × A6000)", grade="S"),
            Printed(text="1.99 + 3.67 · C_T seconds, R² 0.991", grade="D"),
        ),
        remark="The form is judged, not the constants. With one GPU the network's time cannot be measured.",
        parts=(
            Straight(says="step time over C_T", metric="al_s", arm="*", over="replicas_per_token",
                     ignoring=("techniques",), **_here),
            Straight(says="bytes sent over C_T", metric="bytes_sent", arm="*", over="replicas_per_token",
                     ignoring=("techniques",), beside=True, **_here),
        ),
    ),
    _claim(
        id="O7",
        sentence="Pruned to two devices by similarity, quality is kept.",
        needs="`expert_parallel` runs one layer, which has no quality. A workload that fine-tunes a pruned model is not built yet.",
        printed=(Printed(text="two devices keep or beat standard fine-tuning on most tasks; one device clearly loses", grade="S"),),
        remark="No task scores were found. Judged: at least 98 % of the quality without pruning.",
        parts=(
            Ratio(says="similarity keeps 98 % of the quality", metric="quality", arm="ep_pruned(devices=2,policy=similarity)",
                  base="ep_placed", above=0.98, **_tuned),
            Ratio(says="similarity is no worse than router score", metric="quality", arm="ep_pruned(policy=similarity)",
                  base="ep_pruned(policy=score)", above=0.98, beside=True, **_tuned),
        ),
    ),
    _claim(
        id="O8",
        sentence="On real routing the greedy placement beats experts in their order.",
        printed=(Printed(text="C_T 3.68 → 3.02 (OLMoE, 4 devices)", grade="S"),),
        remark="Greedy works on pairs, a proxy of C_T. Exchanges on C_T itself should do better: ours, not the paper's.",
        parts=(
            Ratio(says="lower C_T than in order, held-out routing", metric="held_out_replicas_per_token", arm="ep_placed",
                  base="ep_deduplicated", below=1.0, **_here),
            Best(says="exchanges on C_T are best", metric="held_out_replicas_per_token", arm="ep_refined",
                 rivals=("ep_placed", "ep_deduplicated"), beside=True, **_here),
        ),
    ),
)  # fmt: skip
