"""U-SAM: three encoders, a window Q-Former and a task-aware projector before a language model that answers.

    sound ── CED, Whisper, MERT ── (B, T, 3D) ── windows of 17 ── Q-Former ── (B, W, D) ─┬─ projector (an arm, usam_*) ── (B, W, O)
                                                     prompt's embeddings (B, P, O) ──────┘       ── prefill ── greedy decode

    pipeline    all of it
    projector   the Q-Former's output is drawn and the projector runs alone
    train       one step of Q-Former and projector (and the contrastive loss) against drawn features, loss through the frozen model

Source: arXiv 2505.13880 and its released code; docs/papers/u-sam.md says what is reconstructed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field

from effbench import registry
from effbench.expert_forms import INDEX
from effbench.flow import Flow
from effbench.forms import Call
from effbench.layout import Weight
from effbench.ledger import Value
from effbench.modules import usam_flow, usam_forms
from effbench.modules.usam_arms import ProjectorForm
from effbench.schema import Spec
from effbench.tape import Tape
from effbench.workload import BuildContext, Session, Workload
from effbench.workloads import _spoken_params
from effbench.workloads._spoken_params import NUM_FEATURES, SpokenParams

LEAST_SECONDS, MOST_SECONDS = 0.5, 30.0  # Whisper always hears 30 s
PAPER_WIDTH = 768


class UsamParams(SpokenParams):
    """Parameters of `usam`; the widths are those of the paper."""

    seconds: float = Field(default=10.0, ge=0, le=3600, description="length of the sound, s; 0.5 to 30")
    encoders: Literal["paper", "tiny", "none"] = Field(
        default="paper",
        description="the paper's sizes; the same modules with 2 layers; or none, and drawn features in their place",
    )
    width: int = Field(
        default=PAPER_WIDTH, ge=64, le=8192, multiple_of=64, description="D, of each encoder and of the Q-Former"
    )
    patches: int = Field(default=1024, ge=1, le=65536, description="K, patches of the contrastive loss")

    @property
    def encodes(self) -> bool:
        """Whether a step runs the encoders."""
        return self.mode == "pipeline" and self.encoders != "none"

    def windows(self) -> int:
        """W, audio tokens of one clip."""
        return usam_forms.num_windows(usam_forms.num_frames(self.seconds))


class Usam(Workload):
    """Encode, query, project, prefill, decode."""

    name = "usam"
    summary = "U-SAM: encoders, window Q-Former and task-aware projector before a language model; each part timed apart"
    trains = False
    throughput = ""
    axes = ("attention", "ffn", "kernel", "precision")
    Params = UsamParams

    def refusal(self, spec: Spec, config: Mapping[str, Any]) -> str | None:
        params: UsamParams = self.params
        frames = usam_forms.num_frames(params.seconds)
        if not LEAST_SECONDS <= params.seconds <= MOST_SECONDS:
            return (
                f"usam: {params.seconds:g} s of sound are {frames} frames of the encoders; "
                f"choose seconds from {LEAST_SECONDS:g} to {MOST_SECONDS:g}, which is what Whisper hears"
            )
        if params.encoders == "paper" and params.width != PAPER_WIDTH:
            return f"usam: the paper's encoders are {PAPER_WIDTH} wide, not {params.width}; choose width {PAPER_WIDTH}, or encoders tiny or none"
        trains = params.mode == "train"
        as_asked = replace(spec, params={**spec.params, "mode": "pipeline"}) if trains else spec
        reason = _spoken_params.refusal("usam", as_asked, "usam_")
        return reason or (self._untrainable(spec, config) if trains else None)

    def _untrainable(self, spec: Spec, config: Mapping[str, Any]) -> str | None:
        packed = next((ref.name for ref in spec.techniques if registry.technique(ref.name).quantised), None)
        if packed:
            return f"usam: {packed} packs the language model, which mode train sends gradients through; choose fp32 or bf16"
        if str(config.get("dtype")) == "float16":
            return "usam: gradients in fp16 need a scaled loss, which mode train has not; choose bf16 or fp32"
        if ProjectorForm.of(config).contrastive and self.params.batch_size < 2:
            return "usam: the contrastive loss tells a clip's text from another's, and batch_size is 1; choose 2 or more"
        return None

    def rehearse(self, flow: Flow) -> None:
        params: UsamParams = self.params
        form = ProjectorForm.of(flow.layout.config)
        out = int(flow.layout.config["hidden_size"])
        if params.mode == "train":
            _rehearse_training(flow, params, form, out)
            return
        if params.mode == "projector":
            flow.layout.remove(lambda w: True)
        flow.layout.weights += added(params, form, out)
        weights = {w.path: w for w in flow.layout.weights}
        tape, batch, windows = flow.tape, params.batch_size, params.windows()
        prompts = float(batch * params.prompt_tokens)
        if params.mode == "projector":
            drawn = tape.hold(((NUM_FEATURES - 1) * batch * windows * params.width + NUM_FEATURES * prompts * out) * tape.item)
            audio = tape.new(batch * windows * params.width)
            usam_flow.project(tape, weights, form, audio, prompts, params.width, out)
            del drawn
            return
        sizes = usam_forms.encoder_sizes(params.encoders, params.width)
        frames = batch * usam_forms.num_frames(params.seconds) * usam_forms.STREAMS * params.width
        if params.encodes:
            drawn = tape.hold(NUM_FEATURES * usam_flow.sound_elements(batch, params.seconds) * tape.item)
            joined = usam_flow.encode(tape, sizes, batch, params.seconds)
        else:
            drawn = tape.hold((NUM_FEATURES - 1) * frames * tape.item)
            joined = tape.new(frames)
        audio = usam_flow.qformer(tape, weights, joined, batch, windows, params.width)
        if params.encodes:
            del joined
        embeddings = usam_flow.project(tape, weights, form, audio, prompts, params.width, out)
        del audio
        _spoken_params.rehearse_answer(flow, params, windows)
        del drawn, embeddings

    def build(self, context: BuildContext) -> Session:
        from effbench.workloads._usam import UsamSession

        return UsamSession(context, self.params)


def added(params: UsamParams, form: ProjectorForm, out: int) -> list[Weight]:
    """The tensors before the language model."""
    found = form.weights(params.width, out)
    if params.mode != "projector":
        found += usam_forms.qformer_weights(params.width)
    if params.encodes:
        encoders = usam_forms.encoder_weights(usam_forms.encoder_sizes(params.encoders, params.width), params.seconds)
        found.append(Weight(path="encoders.weight", kind="other", shape=(encoders,), trained=False))
    if params.mode == "train" and form.contrastive:
        found += usam_forms.contrastive_weights(out, params.patches)
    return found


def _rehearse_training(flow: Flow, params: UsamParams, form: ProjectorForm, out: int) -> None:
    """One step of what stands before the frozen language model; trained weights in fp32, with two moments."""
    batch, windows, item = params.batch_size, params.windows(), float(flow.layout.item_bytes)
    new = [replace(w, bits=32) for w in added(params, form, out)]
    flow.layout.change(lambda w: True, trained=False)
    flow.layout.weights += new
    weights = {w.path: w for w in new}
    tape = flow.tape = Tape(flow.layout, device=flow.tape.device)
    moments = tape.hold(flow.layout.state_bytes * sum(w.size for w in new), "optimizer")
    frames = batch * usam_forms.num_frames(params.seconds) * usam_forms.STREAMS * params.width
    text = batch * (params.prompt_tokens + params.new_tokens)
    drawn = tape.hold((NUM_FEATURES - 1) * frames * item + NUM_FEATURES * text * INDEX)
    joined = tape.new(frames)
    tape.grad = True
    audio = usam_flow.qformer(tape, weights, joined, batch, windows, params.width)
    embeddings = usam_flow.project(tape, weights, form, audio, batch * params.prompt_tokens, params.width, out)
    del audio
    beside = (
        usam_flow.contrast(tape, weights, embeddings, batch, params.new_tokens, out, params.patches)
        if form.contrastive
        else None
    )
    loss = _answered(flow, params, embeddings, windows)
    del embeddings
    loss = loss if beside is None else tape.op(1, 4, (loss, beside))
    del beside
    tape.backward(loss)
    del loss, moments, drawn, joined


def _answered(flow: Flow, params: UsamParams, embeddings: Value, windows: int) -> Value:
    """The cross-entropy of the answer's tokens behind audio and prompt, in fp32; logits of all tokens are made."""
    tape, batch, tokens = flow.tape, params.batch_size, windows + params.prompt_tokens + params.new_tokens - 1
    flow.added = lambda tape, call: embeddings
    logits = flow.logits(Call(batch, tokens))
    kept = tape.cast(tape.slice(logits, logits.elements / tokens * params.new_tokens), 4)
    logs = tape.op(kept.elements, 4, (kept,), keeps_result=True, kind="logits")
    return tape.op(1, 4, (logs,))
