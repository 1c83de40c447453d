"""Generation: prefill a prompt, then decode with a KV cache, greedily, a fixed number of new tokens.

The axis "inference" of EfficientLLM (section 5.5): IT, TTFT, TPOT, KV-cache bytes. One step is one batch of requests;
minimum and maximum of new tokens are equal, and throughput counts the tokens that were really made in the window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from effbench.expert_forms import INDEX
from effbench.flow import Flow
from effbench.schema import Spec
from effbench.technique import Params
from effbench.workload import BuildContext, Session, Workload

NUM_PROMPTS = 8  # that the requests take one after the other


class GenerateParams(Params):
    """Parameters of `generate`; defaults suit the tiny shapes."""

    batch_size: int = Field(default=2, ge=1, le=65536, description="requests per step")
    prompt_tokens: int = Field(default=64, ge=1, le=1 << 20, description="tokens of each prompt")
    new_tokens: int = Field(default=32, ge=2, le=1 << 20, description="tokens made for each request, neither more nor less")
    decode_engine: Literal["auto", "eager", "static", "cuda_graph", "compile"] = Field(
        default="auto", description="auto is eager on a CPU and cuda_graph on CUDA"
    )
    validation_tokens: int = Field(default=8192, ge=0, le=10**9, description="held-out tokens that quality stands on; 0: none")
    tasks: tuple[str, ...] = Field(default=(), description="tasks of lm-evaluation-harness that quality stands on instead")
    task_limit: int | None = Field(default=None, ge=1, description="documents of each task at most")
    task_folder: str | None = Field(default=None, description="a folder of task files beside the harness's own")
    task_digest: str = Field(default="", description="of the files in task_folder; filled in")
    chat_template: bool = Field(default=False, description="put tasks in the checkpoint's chat template")

    @model_validator(mode="before")
    @classmethod
    def _tasks_by_content(cls, given: Any) -> Any:
        """Other tasks are another case, also where their folder is the same."""
        from effbench.workloads import _tasks

        if not isinstance(given, dict) or not given.get("task_folder"):
            return given
        found, planned = _tasks.folder_digest(given["task_folder"]), given.get("task_digest")
        if planned and planned != found:
            raise ValueError(f"the tasks in {given['task_folder']} have changed since this was planned; plan and run again")
        return {**given, "task_digest": found}


class Generate(Workload):
    """Prefill and greedy decode."""

    name = "generate"
    summary = "prefill, then decode with a KV cache: IT, TTFT, TPOT, cache bytes"
    trains = False
    throughput = "it"
    Params = GenerateParams

    def rehearse(self, flow: Flow) -> None:
        params, engine = self.params, self.params.decode_engine
        eager = engine == "eager" or (engine == "auto" and flow.tape.device == "cpu")
        slots = 0 if eager else params.prompt_tokens + params.new_tokens - 1
        prompts = flow.tape.hold(NUM_PROMPTS * params.batch_size * params.prompt_tokens * INDEX)
        flow.generate(params.batch_size, params.prompt_tokens, params.new_tokens, slots=slots)
        del prompts

    def refusal(self, spec: Spec, config: Mapping[str, Any]) -> str | None:
        from effbench.workloads import _tasks

        return _tasks.refusal(self.params.tasks, spec.model)

    def build(self, context: BuildContext) -> Session:
        from effbench.workloads._generation import GenerateSession

        return GenerateSession(context, self.params)
