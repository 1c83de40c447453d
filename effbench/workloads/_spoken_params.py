"""What workloads with a language model behind a projector share before anything is built. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from effbench import registry
from effbench.expert_forms import INDEX
from effbench.flow import Flow
from effbench.schema import Spec
from effbench.technique import Params

NUM_FEATURES = 4  # sets of features that the steps take one after the other


class SpokenParams(Params):
    """Sizes of a request; defaults suit the tiny shapes."""

    mode: Literal["pipeline", "projector", "train"] = Field(
        default="pipeline", description="with the language model; the projector alone; or its forward, losses and backward"
    )
    seconds: float = Field(default=4.0, ge=0, le=3600, description="length of the recording, s")
    batch_size: int = Field(default=1, ge=1, le=65536, description="recordings per step")
    prompt_tokens: int = Field(
        default=8, ge=1, le=1 << 20, description="tokens of text behind the features, delimiters among them"
    )
    new_tokens: int = Field(default=16, ge=2, le=1 << 20, description="tokens made for each recording")


def refusal(workload: str, spec: Spec, arm: str) -> str | None:
    """Why the stack does not suit a model behind a projector: no arm (techniques named `arm`…), weights, what has no effect."""
    arms = [name for name in registry.entries("technique") if name.startswith(arm)]
    if not any(ref.name in arms for ref in spec.techniques):
        return f"{workload}: the projector is one of its arms; add one of {', '.join(arms)}"
    if spec.model.weights != "random":
        return f"{workload}: the projector is drawn, so what {spec.model.weights!r} weights would say means nothing; use random"
    if spec.params["mode"] == "pipeline":
        return None
    for ref in spec.techniques:
        if ref.name not in arms and (ref.axis != "precision" or registry.technique(ref.name).quantised):
            return f"{workload}: mode {spec.params['mode']} has no language model, so {ref.name} would change nothing; use pipeline"
    return None


def rehearse_answer(flow: Flow, params: SpokenParams, feature_tokens: int) -> None:
    """Prefill of features and prompt, and greedy decode, on the tape of `flow`; ids of the prompt lie beside."""
    ids = flow.tape.hold(params.batch_size * params.prompt_tokens * INDEX)
    prompt = feature_tokens + params.prompt_tokens
    slots = prompt + params.new_tokens - 1 if flow.tape.device == "cuda" else 0
    flow.generate(params.batch_size, prompt, params.new_tokens, slots=slots)
    del ids
