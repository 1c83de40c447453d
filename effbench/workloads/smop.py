"""Llama-SMoP: features of an audio and a video encoder, pooled, projected, and read by a language model that answers.

    audio (B, 50 s, D) ── mean of 4 ──┐
                                      ├─ projector (an arm, smop_*) ── (B, T, D_llm) ── prefill ── greedy decode
    video (B, 25 s, D) ── mean of 2 ──┘

The features are drawn: the encoders (Whisper, AV-HuBERT) are frozen, the same for every arm, and not run.
Source: arXiv 2505.14336 and its released code; docs/papers/llama-smop.md says what is reconstructed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from effbench.flow import Flow
from effbench.modules.projector_arms import ProjectorForm
from effbench.modules.projector_flow import layout_of, project
from effbench.schema import Spec
from effbench.workload import BuildContext, Session, Workload
from effbench.workloads import _spoken_params
from effbench.workloads._spoken_params import NUM_FEATURES, SpokenParams

AUDIO_HZ, VIDEO_HZ = 50, 25  # frames a second: Whisper's encoder, and the video


class SmopParams(SpokenParams):
    """Parameters of `smop`; the widths are those of Whisper-medium and AV-HuBERT-Large and of the released projector."""

    d_in: int = Field(default=1024, ge=1, le=65536, description="D, width of the encoders' features")
    hidden: int = Field(default=2048, ge=1, le=1 << 20, description="H, hidden width of an expert")
    audio_rate: int = Field(default=4, ge=1, le=1000, description="audio frames that become one token, by their mean")
    video_rate: int = Field(default=2, ge=1, le=1000, description="video frames that become one token")

    def frames(self) -> tuple[int, int]:
        """Frames of audio and of video of one recording."""
        return int(AUDIO_HZ * self.seconds), int(VIDEO_HZ * self.seconds)

    def tokens(self) -> tuple[int, int]:
        """Tokens of audio and of video of one recording; frames that fill no token are left out."""
        audio, video = self.frames()
        return audio // self.audio_rate, video // self.video_rate


class Smop(Workload):
    """Pool, project, prefill, decode."""

    name = "smop"
    summary = "Llama-SMoP: a sparse mixture of projectors before a language model; projector, prefill and decode timed apart"
    trains = False
    throughput = ""
    axes = ("attention", "ffn", "kernel", "precision")
    Params = SmopParams

    def refusal(self, spec: Spec, config: Mapping[str, Any]) -> str | None:
        reason = _spoken_params.refusal("smop", spec, "smop_")
        if reason is not None:
            return reason
        params: SmopParams = self.params
        for stream, frames, tokens in zip(("audio", "video"), params.frames(), params.tokens(), strict=True):
            if not tokens:
                return (
                    f"smop: {params.seconds:g} s are {frames} frames of {stream}, and {getattr(params, f'{stream}_rate')} of them "
                    "are one token, so the projector would get none; choose more seconds or a smaller rate"
                )
        return None

    def rehearse(self, flow: Flow) -> None:
        params: SmopParams = self.params
        form = ProjectorForm.of(flow.layout.config, params.d_in, params.hidden)
        if params.mode != "pipeline":
            flow.layout.remove(lambda w: True)
        flow.layout.weights += layout_of(form)
        tape, batch = flow.tape, params.batch_size
        frames, tokens = sum(params.frames()), params.tokens()
        drawn = tape.hold(NUM_FEATURES * batch * frames * params.d_in * tape.item)
        tape.grad = params.mode == "train"
        grad = tape.new(batch * sum(tokens) * form.outputs) if tape.grad else None
        out = project(tape, form, [batch * t for t in tokens])
        if tape.grad:
            tape.backward(out)
        tape.grad = False
        if params.mode == "pipeline":
            _spoken_params.rehearse_answer(flow, params, sum(tokens))
        del grad, out, drawn

    def build(self, context: BuildContext) -> Session:
        from effbench.workloads._smop import SmopSession

        return SmopSession(context, self.params)
