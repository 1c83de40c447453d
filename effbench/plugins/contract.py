"""What a technique promises (effbench/technique.py), tried on tiny models: one list for the built-in ones and for plugins.

    for clause in CLAUSES: clause.check(technique, shape)      # shape "" for a clause that asks about no model

A check raises ContractError with what is wrong, and NotAsked with the reason where there is nothing to try: the technique
refuses. Torch-free at import.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from effbench import registry
from effbench.errors import ContractError
from effbench.plugins import on_models, on_technique
from effbench.plugins.small import MIXTURE, SHAPES, NotAsked, logits_of, some_bytes, tiny_model

__all__ = ["CLAUSES", "MIXTURE", "SHAPES", "Clause", "NotAsked", "loads_light", "logits_of", "some_bytes", "tiny_model"]

HEAVY = ("torch", "transformers", "peft")


@dataclass(frozen=True, kw_only=True)
class Clause:
    """One promise. `check(technique, shape)`; a clause about the technique itself is given no shape."""

    name: str
    promise: str
    check: Callable[[str, str], None]
    on_models: bool


def loads_light(names: Iterable[str]) -> None:
    """Load techniques by name in a process that has loaded nothing heavy. Raises ContractError where one loads torch."""
    for name in names:
        registry.technique(name)
        if heavy := sorted(set(HEAVY) & set(sys.modules)):
            raise ContractError(f"loading {name} imports {', '.join(heavy)}; import them inside the hooks")


CLAUSES = (
    Clause(
        name="documented",
        promise="its file says paper, changes, gains and costs",
        check=on_technique.documented,
        on_models=False,
    ),
    Clause(name="licence", promise="its package declares a licence", check=on_technique.licensed, on_models=False),
    Clause(name="independent", promise="it imports no other technique", check=on_technique.independent, on_models=False),
    Clause(
        name="every shape",
        promise="it answers for every shape of the catalogue",
        check=on_technique.asked_of_every_shape,
        on_models=False,
    ),
    Clause(
        name="baseline", promise="its baseline is of its axis and can be built", check=on_technique.baseline, on_models=False
    ),
    Clause(name="baselines end", promise="following baselines ends", check=on_technique.baselines_end, on_models=False),
    Clause(name="cost", promise="a cost that it gives is positive and sourced", check=on_technique.cost, on_models=False),
    Clause(
        name="refusal", promise="it is supported or says why not", check=on_models.supported_or_says_why_not, on_models=True
    ),
    Clause(name="forward", promise="logits are finite and of the right shape", check=on_models.forward, on_models=True),
    Clause(name="decode", promise="decoding with a cache equals a full forward", check=on_models.cached_decode, on_models=True),
    Clause(name="training", promise="training lowers the loss, the same way twice", check=on_models.training, on_models=True),
    Clause(name="seed", promise="one seed gives one model, another seed another", check=on_models.seeded, on_models=True),
    Clause(name="parameters", promise="weights, bytes and FLOPs are counted", check=on_models.parameters, on_models=True),
    Clause(name="plan", promise="the planned tensors are those of the model", check=on_models.planned, on_models=True),
)
