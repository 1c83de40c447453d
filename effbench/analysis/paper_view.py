"""EfficientLLM's own way to show results, kept apart from ours: its normalisation, and its ranks per size band.

Normalised: 0.1 + 0.9 (x − worst) / (best − worst) over the techniques that are shown together, so the worst is 0.1 and the best 1
(Eqs 10 and 11; the floor of 0.1 is that of its figures). Ranks: of the unweighted mean over the models of a size band. There are
no intervals and no ties in it, and a number changes with what stands beside it: nothing here is a verdict of ours.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from effbench.metrics import metric as metric_row

FLOOR = 0.1
SOURCE = "the authors' spreadsheet behind their leaderboard (primary)"


@dataclass(frozen=True, kw_only=True)
class Band:
    """A range of model sizes as the paper groups them; `low` and `high` in weights. `axis` and `name` are its own."""

    axis: str
    name: str
    low: float
    high: float


# Models between the bands belong to none, as in the paper.
BANDS: Mapping[str, tuple[Band, ...]] = {
    "pretrain": (Band(axis="architecture", name="0.5B-3B", low=0.4e9, high=4e9),),
    "finetune": (
        Band(axis="training", name="1B-3B", low=0.9e9, high=4e9),
        Band(axis="training", name="7B-8B", low=6.5e9, high=9e9),
        Band(axis="training", name="14B-24B", low=13e9, high=26e9),
    ),
    "generate": (
        Band(axis="quantization", name="1.5B-3.8B", low=1.4e9, high=4.2e9),
        Band(axis="quantization", name="7B-8B", low=6.5e9, high=9e9),
        Band(axis="quantization", name="14B-34B", low=13e9, high=36e9),
    ),
}
OTHER = "sizes outside the paper's bands"
# Its metric names, and ours. Performance is perplexity, training loss or the mean score of tasks.
COLUMNS: Mapping[str, Mapping[str, str]] = {
    "pretrain": {"Performance": "perplexity", "AMU": "amu_gb", "PCU": "pcu", "AL": "al_s", "TT": "tt_tokens_per_param_s", "AEC": "aec_w"},
    "finetune": {"Performance": "train_loss", "AMU": "amu_gb", "PCU": "pcu", "AL": "al_s", "ST": "st_samples_per_param_s", "AEC": "aec_w"},
    "generate": {
        "Performance": "quality", "AMU": "amu_gb", "PCU": "pcu", "AL": "al_s", "IT": "it_tokens_per_s", "AEC": "aec_w", "MCR": "mcr",
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PaperTable:
    """Techniques by metric, the paper's way. `means` are in the metrics' units, over `models`; NaN is missing."""

    means: pd.DataFrame
    normalised: pd.DataFrame
    ranks: pd.DataFrame
    models: tuple[str, ...]


def metrics_needed(workload: str) -> tuple[str, ...]:
    """The metrics that a frame must have for `bands` and `paper_table`."""
    return ("params_total", *COLUMNS[workload].values())


def bands(frame: pd.DataFrame) -> pd.Series:
    """The name of the band of each row's model, by its number of weights; OTHER where there is none or it is not known."""
    found = pd.Series(OTHER, index=frame.index, dtype=object)
    for workload, known in BANDS.items():
        for band in known:
            found[(frame["workload"] == workload) & frame["params_total"].between(band.low, band.high)] = band.name
    return found


def paper_table(frame: pd.DataFrame) -> PaperTable:
    """Means, normalised values and ranks of the rows of one workload, hardware and band; measured and valid values only.

    A technique's value for a model is the mean of its rows, whatever their settings; then models count alike. Lower ranks are better;
    equal means share the smaller one. Raises ValueError for rows of several workloads or of one that the paper does not have.
    """
    workloads = set(frame["workload"])
    if len(workloads) > 1 or not workloads <= set(COLUMNS):
        raise ValueError(
            f"the paper's table is of one of {', '.join(COLUMNS)}, not of {', '.join(sorted(workloads)) or 'nothing'}"
        )
    names = COLUMNS[workloads.pop()] if workloads else {}
    ok = frame[frame["status"] == "ok"]
    columns = {title: ok[name].where(ok[f"{name}__why"] == "") for title, name in names.items()}
    values = pd.DataFrame(columns, index=ok.index)
    of_model = values.groupby([ok["label"], ok["model"]], sort=True).mean()
    means = of_model.groupby(level="label", sort=True).mean().dropna(how="all", axis="columns").dropna(how="all")
    lower = {title: metric_row(names[title]).better == "lower" for title in means}
    return PaperTable(
        means=means,
        normalised=means.apply(lambda column: normalised(column, lower=lower[str(column.name)])),
        ranks=means.apply(lambda column: column.rank(method="min", ascending=lower[str(column.name)])),
        models=tuple(sorted(set(ok["model"]))),
    )


def normalised(values: pd.Series, *, lower: bool) -> pd.Series:
    """0.1 for the worst and 1 for the best; 1 for all where they are equal, and NaN stays NaN."""
    worst, best = (values.max(), values.min()) if lower else (values.min(), values.max())
    if worst == best:
        return values.where(values.isna(), 1.0)
    return FLOOR + (1 - FLOOR) * (values - worst) / (best - worst)


def published_ranks(axis: str, group: str | None = None) -> pd.DataFrame:
    """The ranks that the paper's authors published for one axis (and size band or mechanism), by method; NaN where a cell is empty.

    Its own ties are kept, such as 1, 1, 3. Raises KeyError where there are none.
    """
    rows = pd.DataFrame(list(csv.DictReader(io.StringIO(_PUBLISHED))))
    rows = rows[(rows["axis"] == axis) & (rows["group"].eq(group) if group else True)]
    if rows.empty:
        raise KeyError(f"no published ranks of {axis} {group or ''}".strip())
    numbers = rows.drop(columns=["axis", "group", "method"]).apply(pd.to_numeric, errors="coerce")
    return numbers.set_index(pd.MultiIndex.from_frame(rows[["group", "method"]])).dropna(how="all", axis="columns")


_PUBLISHED = """\
axis,group,method,Performance,AMU,PCU,AL,TT,ST,IT,AEC,MCR
architecture,Attention Mechanism,MQA,4,1,,1,1,,,3,
architecture,Attention Mechanism,GQA,3,3,,2,2,,,4,
architecture,Attention Mechanism,MLA,1,4,,3,3,,,2,
architecture,Attention Mechanism,NSA,2,2,,4,4,,,1,
architecture,Efficient Positional Encoding,RoPE,1,2,,2,2,,,2,
architecture,Efficient Positional Encoding,Absolute,4,4,,4,4,,,4,
architecture,Efficient Positional Encoding,Learnable Absolute,2,3,,3,3,,,3,
architecture,Efficient Positional Encoding,Relate,3,1,,1,1,,,1,
architecture,MoE Mechanism,Dense Model 1.5B,4,2,,2,3,,,2,
architecture,MoE Mechanism,Dense Model 3B,3,1,,1,4,,,1,
architecture,MoE Mechanism,MoE Model 1.5Bx8,1,4,,4,1,,,4,
architecture,MoE Mechanism,MoE Model 0.5Bx8,2,3,,3,2,,,3,
architecture,Attention-free Mechanism,Transformer,1,4,,4,1,,,4,
architecture,Attention-free Mechanism,Mamba,2,1,,1,4,,,1,
architecture,Attention-free Mechanism,Pythia,4,3,,3,3,,,3,
architecture,Attention-free Mechanism,RWKV,3,2,,2,2,,,2,
training,1B-3B,LoRA,7,2,2,3,,2,,3,
training,1B-3B,LoRA-Plus,4,5,6,4,,3,,2,
training,1B-3B,RSLoRA,5,4,5,5,,4,,5,
training,1B-3B,DoRA,6,7,3,7,,6,,6,
training,1B-3B,PiSSA,3,6,4,6,,5,,4,
training,1B-3B,Freeze,1,3,7,1,,7,,1,
training,1B-3B,Full*,2,1,1,2,,1,,7,
training,7B-8B,LoRA,2,1,5,5,,4,,3,
training,7B-8B,LoRA-Plus,5,2,7,6,,5,,2,
training,7B-8B,RSLoRA,3,4,6,3,,3,,5,
training,7B-8B,DoRA,4,6,3,7,,7,,6,
training,7B-8B,PiSSA,6,3,4,4,,5,,4,
training,7B-8B,Freeze,1,7,2,1,,1,,1,
training,7B-8B,Full*,7,5,1,2,,2,,7,
training,14B-24B,LoRA,3,1,6,2,,3,,6,
training,14B-24B,LoRA-Plus,4,3,7,6,,7,,1,
training,14B-24B,RSLoRA,1,2,5,4,,4,,5,
training,14B-24B,DoRA,6,7,3,7,,2,,4,
training,14B-24B,PiSSA,2,4,4,3,,4,,3,
training,14B-24B,Freeze,5,6,2,1,,1,,2,
training,14B-24B,Full*,7,5,1,5,,6,,7,
quantization,1.5B-3.8B,bfloat16,1,2,,2,,,2,2,3
quantization,1.5B-3.8B,float16,1,3,,1,,,3,3,2
quantization,1.5B-3.8B,int4,3,1,,3,,,1,1,1
quantization,7B-8B,bfloat16,1,2,,2,,,2,2,2
quantization,7B-8B,float16,2,3,,1,,,3,3,3
quantization,7B-8B,int4,3,1,,3,,,1,1,1
quantization,14B-34B,bfloat16,1,2,,2,,,2,2,2
quantization,14B-34B,float16,2,3,,1,,,3,1,3
quantization,14B-34B,int4,3,1,,3,,,1,3,1
"""
