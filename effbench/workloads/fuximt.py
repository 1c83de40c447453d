"""FuxiMT: a Bloom decoder that translates between many languages, with experts in some layers or without.

    train       a step on a batch of pairs: source and target behind one language tag, loss on the target, AdamW
    translate   prefill of the sources, then greedy decoding of as many tokens for each

Paper: FuxiMT (arXiv 2505.14256); which languages, sizes and schedule it has is not known, so the data are made here. A language is
one of 65 tags at the end of the vocabulary, and its text the built-in one with every id shifted by a number of its own; the target
is the text itself. Languages come with probability ∝ 1 / rank^skew. A row of a batch holds one long pair, two of half the length or
four of a quarter, so that every step has the same tokens and shapes whatever the order of the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from effbench.flow import Flow
from effbench.schema import Spec
from effbench.technique import Params
from effbench.workload import BuildContext, Session, Workload
from effbench.workloads.generate import NUM_PROMPTS

LANGUAGES, NUM_BYTES, INDEX = 65, 256, 8
LONGEST_PACK = 4  # pairs in a row of the shortest ones


class FuxiMTWorkParams(Params):
    """Parameters of the workload `fuximt`; defaults suit the tiny shape."""

    mode: Literal["train", "translate"] = Field(default="train", description="a training step, or prefill and decode")
    batch_size: int = Field(default=8, ge=1, le=65536, description="rows of a batch, or requests")
    prompt_tokens: int = Field(
        default=64, ge=8, le=1 << 18, multiple_of=4, description="tokens of a long source, its tag the first"
    )
    new_tokens: int = Field(default=64, ge=8, le=1 << 18, multiple_of=4, description="tokens of a long target")
    skew: float = Field(default=1.0, ge=0, le=10, description="a, where language r comes with probability ∝ 1 / r^a")
    ids: Literal["text", "drawn"] = Field(default="text", description="bytes of the text, or drawn from the whole vocabulary")
    pass_steps: int = Field(default=32, ge=1, le=100_000, description="steps of a pass over the data, which is then repeated")
    learning_rate: float = Field(default=1e-3, gt=0, le=10, description="constant learning rate")
    weight_decay: float = Field(default=0.0, ge=0, le=10, description="AdamW weight decay")
    decode_engine: Literal["auto", "eager", "static", "cuda_graph", "compile"] = Field(
        default="auto", description="auto is eager on a CPU and cuda_graph on CUDA"
    )

    # What the sessions of `finetune` and `generate` ask for besides: no held-out figures, since a made language says nothing of them.
    quality_steps: ClassVar[int] = 0
    validation_tokens: ClassVar[int] = 0
    tasks: ClassVar[tuple[str, ...]] = ()
    activation_checkpointing: ClassVar[bool] = False

    @property
    def seq_len(self) -> int:
        """Tokens of a row: source and target."""
        return self.prompt_tokens + self.new_tokens


class FuxiMTWork(Workload):
    """Train on pairs of languages, or translate."""

    name = "fuximt"
    summary = "translation by a Bloom decoder with experts or without: a training step, or prefill and decode"
    trains = True
    throughput = ""
    axes = ("ffn", "peft", "precision")
    Params = FuxiMTWorkParams

    @classmethod
    def trains_on(cls, params: Mapping[str, Any]) -> bool:
        return bool(params.get("mode", "train") == "train")

    def refusal(self, spec: Spec, config: Mapping[str, Any]) -> str | None:
        vocabulary = int(config["vocab_size"])
        if vocabulary < NUM_BYTES + LANGUAGES:
            return (
                f"fuximt: {spec.model.name} has {vocabulary} ids, and {NUM_BYTES} bytes and {LANGUAGES} language tags need "
                f"{NUM_BYTES + LANGUAGES}; choose tiny-bloom, or a BLOOMZ"
            )
        loops = any(ref.params.get("experts_by") == "loop" for ref in spec.techniques)
        engine = self.params.decode_engine
        captured = engine in ("cuda_graph", "compile") or (engine == "auto" and spec.device == "cuda")
        if loops and captured and self.params.mode == "translate":
            return "fuximt: a loop over the experts asks which of them have tokens, which cannot be captured; choose decode_engine eager"
        return None

    def rehearse(self, flow: Flow) -> None:
        params, tape = self.params, flow.tape
        if params.mode == "train":
            targets = tape.hold(params.batch_size * params.seq_len * INDEX)
            flow.train(params.batch_size, params.seq_len)
            del targets
            return
        eager = params.decode_engine == "eager" or (params.decode_engine == "auto" and tape.device == "cpu")
        prompts = tape.hold(NUM_PROMPTS * params.batch_size * params.prompt_tokens * INDEX)
        slots = 0 if eager else params.seq_len - 1
        flow.generate(params.batch_size, params.prompt_tokens, params.new_tokens, slots=slots)
        del prompts

    def build(self, context: BuildContext) -> Session:
        from effbench.workloads import _fuximt

        kind = _fuximt.TrainSession if self.params.mode == "train" else _fuximt.TranslateSession
        return kind(context, self.params)
