"""The cases of the board's generated rows: which questions there are, which stacks answer them, and their real identities.

    question k ── workload × hardware × model × batch × length × seed ┐
    stack s    ── three axes of techniques, 60 stacks a workload      ├─▶ spec, case id, case id of its baseline
    protocol p ── quick, publish                                      ┘

A case is measured on several machines, so of 100,000 rows every third has a spec of its own. Specs are put together as text,
from pieces that the questions and stacks share: a million of them through the dataclasses would take minutes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from typing import Any

from effbench.schema import ModelRef, Spec, TechniqueRef, canonical_json

HARDWARE = {"AMD EPYC · 2 cores": 0.02, "NVIDIA L4": 1.0, "NVIDIA A100-SXM4-80GB": 4.0, "NVIDIA GeForce RTX 4090": 3.0,
            "NVIDIA H100 80GB HBM3": 8.0, "NVIDIA H200": 10.0}  # fmt: skip  # and how fast it is
MODELS = {"SmolLM2-135M": 0.135, "SmolLM2-360M": 0.36, "Qwen2.5-0.5B": 0.49, "Llama-3.2-1B": 1.24, "Qwen2.5-1.5B": 1.54,
          "Llama-3.2-3B": 3.2, "Qwen2.5-7B": 7.6, "Llama-3.1-8B": 8.0}  # fmt: skip  # and its size, in 1e9 parameters
WORKLOADS, PROTOCOL_NAMES = ("generate", "pretrain", "finetune"), ("quick", "publish")
BATCHES, LENGTHS, SEEDS = (1, 4, 8, 32), (128, 512, 2048, 8192), (1, 2, 3, 4, 5)
ATTENTION = (("mha", {}), ("gqa", {"groups": 2}), ("gqa", {"groups": 4}), ("mqa", {}), ("mla", {"rank": 64}))
PEFT = (("full", {}), ("lora", {"r": 8}), ("lora", {"r": 64}), ("dora", {"r": 8}), ("pissa", {"r": 8}))
PRECISION = (("fp32", {}), ("bf16", {}), ("int8", {}), ("nf4", {}))
KERNEL = (("sdpa", {}), ("flash_attention", {}), ("eager_attention", {}))
FFN = (("dense", {}), ("moe", {"experts": 8, "top_k": 2}), ("moe", {"experts": 64, "top_k": 8}))
AXES = {"generate": (("attention", ATTENTION), ("precision", PRECISION), ("kernel", KERNEL)),
        "pretrain": (("attention", ATTENTION), ("precision", PRECISION), ("ffn", FFN)),
        "finetune": (("peft", PEFT), ("precision", PRECISION), ("kernel", KERNEL))}  # fmt: skip
STACKS = 60
ROWS_A_QUESTION = STACKS * len(PROTOCOL_NAMES)


@dataclass(frozen=True)
class Place:
    """A question: everything that rows must have in common to be compared."""

    workload: str
    hardware: str
    model: str
    batch: int
    length: int
    seed: int


def place(k: int) -> Place:
    """The k-th of 11,520 distinct questions; the first few already differ in workload, hardware and model."""
    assert k < len(WORKLOADS) * len(HARDWARE) * len(MODELS) * len(BATCHES) * len(LENGTHS) * len(SEEDS)
    k, workload = divmod(k, len(WORKLOADS))
    k, hardware = divmod(k, len(HARDWARE))
    k, model = divmod(k, len(MODELS))
    k, batch = divmod(k, len(BATCHES))
    seed, length = divmod(k, len(LENGTHS))
    model = (model + hardware) % len(MODELS)
    names = WORKLOADS[workload], list(HARDWARE)[hardware], list(MODELS)[model]
    return Place(*names, BATCHES[batch], LENGTHS[length], SEEDS[seed])


def spec(place: Place, techniques: Sequence[TechniqueRef], protocol: str) -> Spec:
    """The spec of a row, as the planner would have resolved it."""
    training = {"activation_checkpointing": False, "batch_size": place.batch, "learning_rate": 0.001, "quality_steps": 20,
                "seq_len": place.length, "validation_tokens": 8192, "weight_decay": 0.1}  # fmt: skip
    decoding = {"batch_size": place.batch, "decode_engine": "auto", "new_tokens": 24, "prompt_tokens": place.length,
                "validation_tokens": 8192}  # fmt: skip
    return Spec(
        workload=place.workload,
        params=decoding if place.workload == "generate" else training,
        model=ModelRef(name=place.model, weights="hub", location=f"hub/{place.model}@main", digest=sha256(place.model)),
        techniques=tuple(techniques),
        text="builtin",
        text_digest=sha256("text"),
        seed=place.seed,
        device="cuda" if place.hardware.startswith("NVIDIA") else "cpu",
        threads=2,
        protocol=protocol,
        time_limit_s=300.0,
        workload_identity=f"effbench:{place.workload}@0.1.0+{sha256(place.workload)[:12]}",
    )


@cache
def stacks(workload: str) -> tuple[tuple[TechniqueRef, ...], ...]:
    """The stacks of a workload; the first is the baseline of the others."""
    axes, choices = zip(*AXES[workload], strict=True)
    return tuple(tuple(_technique(axis, *one) for axis, one in zip(axes, row, strict=True)) for row in product(*choices))


def _technique(axis: str, name: str, params: Mapping[str, Any]) -> TechniqueRef:
    identity = f"effbench:{name}@0.1.0+{sha256(name)[:12]}"
    return TechniqueRef(name=name, axis=axis, params=params, given=tuple(params), identity=identity, filled_in=name == "fp32")


def identities(
    cases: Iterable[tuple[int, int, str]], places: Mapping[int, Place]
) -> tuple[list[str], list[str], list[str | None]]:
    """Spec text, case id and baseline's case id of each (question, stack, protocol)."""
    specs, case_ids, baselines = [], [], []
    pieces = {q: (_pieces(found), _pieces(found, of_identity=True)) for q, found in places.items()}

    def spec_id(q: int, s: int, protocol: str) -> str:
        head, middle, tail = pieces[q][1]
        return sha256(f"{head}{protocol}{middle}{_texts(places[q].workload)[s][1]}{tail}")

    base_ids = {(q, protocol): spec_id(q, 0, protocol) for q in places for protocol in PROTOCOL_NAMES}
    for q, s, protocol in cases:
        head, middle, tail = pieces[q][0]
        specs.append(f"{head}{protocol}{middle}{_texts(places[q].workload)[s][0]}{tail}")
        base = base_ids[q, protocol]
        own = f'"{base}"' if s else "null"
        case_ids.append(sha256(f'{{"baseline":{own},"spec":"{spec_id(q, s, protocol) if s else base}"}}'))
        baselines.append(sha256(f'{{"baseline":null,"spec":"{base}"}}') if s else None)
    return specs, case_ids, baselines


def _pieces(found: Place, *, of_identity: bool = False) -> tuple[str, str, str]:
    """The canonical JSON of a question's specs before, between and after protocol and techniques; see Spec.spec_id."""
    plain = spec(found, (), "@").to_json()
    if of_identity:
        del plain["text"], plain["model"]["location"], plain["nproc"]  # one process
    head, rest = canonical_json(plain).split('"protocol":"@"')
    middle, tail = rest.split('"techniques":[]')
    return f'{head}"protocol":"', f'"{middle}"techniques":[', f"]{tail}"


@cache
def _texts(workload: str) -> list[tuple[str, str]]:
    """Each stack's techniques as JSON, whole and as the identity sees them."""
    found = []
    for stack in stacks(workload):
        whole = [asdict(technique) for technique in stack]
        bare = [{k: v for k, v in technique.items() if k not in ("filled_in", "given")} for technique in whole]
        found.append((canonical_json(whole)[1:-1], canonical_json(bare)[1:-1]))
    return found


def sha256(text: str) -> str:
    """In hex."""
    return hashlib.sha256(text.encode()).hexdigest()
