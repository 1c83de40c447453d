"""The session behind `smop`.

Shapes: B recordings, T tokens of audio and video, D width of the features, O hidden size of the language model.
"""

from __future__ import annotations

from typing import Any

import torch

from effbench.modules.projector_arms import ProjectorForm
from effbench.modules.projectors import make_projector
from effbench.workload import BuildContext, Step
from effbench.workloads._spoken import SpokenSession
from effbench.workloads._spoken_params import NUM_FEATURES

Streams = list[torch.Tensor]


class SmopSession(SpokenSession):
    """Features ~ N(0, 1), drawn at frame rate; one of NUM_FEATURES recordings after the other."""

    def __init__(self, context: BuildContext, params: Any):
        super().__init__(context, params)
        self.form = ProjectorForm.of(self.values, params.d_in, params.hidden)
        self.trains = params.mode == "train"
        torch.manual_seed(context.seed)
        with self.device:
            self.drawn = [self._draw() for _ in range(NUM_FEATURES)]  # first, so that all arms have the same
            grad_BTO = torch.randn(params.batch_size, self.feature_tokens(), self.hidden).to(self.dtype)
            self.added = self.projector = make_projector(self.form).cast(self.dtype)
        self.grad_BTO = grad_BTO if self.trains else None
        self.projector.requires_grad_(self.trains).train(self.trains)
        self.auxiliary_losses: list[float] = []
        self.load_FX = self._loads()
        self.step_work = self._work()

    def feature_tokens(self) -> int:
        return sum(self.params.tokens())

    def features(self, number: int) -> Streams:
        return self.drawn[number % NUM_FEATURES]

    def embed(self, features: Streams) -> torch.Tensor:
        with self.timed("pooling_s"):
            pooled = self._pool(features)
        with self.timed("projector_s"):
            out_BTO: torch.Tensor = self.projector(pooled)
        return out_BTO

    def embed_reference(self, features: Streams) -> torch.Tensor:
        return self.projector.reference(self._pool(features))

    def added_active(self) -> int:
        return self.form.active_weights()

    def step(self) -> None:
        if not self.trains:
            super().step()
            return
        pooled = self._pool(self.features(self.num_steps))
        with self.timed("train_step_s"):
            out_BTO = self.projector(pooled)
            loss = self.projector.auxiliary_loss
            roots = [out_BTO] if loss is None else [out_BTO, loss]
            torch.autograd.backward(roots, [self.grad_BTO, None][: len(roots)])
            self.projector.zero_grad(set_to_none=True)
        self.projector.auxiliary_loss = None
        self.require_finite(out_BTO)
        if loss is not None:
            self.auxiliary_losses.append(float(loss.detach()))
        self.num_steps += 1

    def begin(self) -> None:
        super().begin()
        self.auxiliary_losses = []

    def figures(self) -> dict[str, float | str]:
        tokens = self.params.batch_size * self.feature_tokens()
        share_F = self.load_FX.amax(1) / self.load_FX.sum(1)
        return {
            "projector_flops": float(self.form.flops_per_token() * tokens),
            "experts_touched": self._touched(),
            "expert_load_share_max": float(share_F.mean()),
            "output_error": "not_taken" if self.embed_error is None else self.embed_error,
            "moe_params": float(self.form.weights()),
        }

    def facts(self) -> dict[str, Any]:
        losses = self.auxiliary_losses
        return {
            **super().facts(),
            "projector_bytes": None if self.trains else self._touched_bytes(),
            "feature_tokens": self.feature_tokens(),
            "auxiliary_loss": sum(losses) / len(losses) if losses else None,
        }

    def _draw(self) -> Streams:
        batch = self.params.batch_size
        return [torch.randn(batch, frames, self.params.d_in).to(self.dtype) for frames in self.params.frames()]

    def _pool(self, features: Streams) -> Streams:
        """(B, frames, D) of each stream → (B, T of the stream, D): means of neighbouring frames; those that fill no token go."""
        return [
            x_BFD[:, : tokens * rate].unflatten(1, (tokens, rate)).mean(2)
            for x_BFD, tokens, rate in zip(
                features, self.params.tokens(), (self.params.audio_rate, self.params.video_rate), strict=True
            )
        ]

    @torch.no_grad()
    def _loads(self) -> torch.Tensor:
        """(sets of features, experts in all): how many pairs of token and expert each expert has."""
        return torch.stack([self.projector.load(self._pool(self.features(i))) for i in range(NUM_FEATURES)]).float()

    def _touched(self) -> float:
        return float((self.load_FX > 0).sum(1).float().mean())

    def _touched_bytes(self) -> float:
        """Bytes of the experts that have tokens: what a step must read of them at least."""
        return float(self._touched() * self.form.expert_weights * self.dtype.itemsize)

    def _work(self) -> Step:
        """Bytes that must move if every tensor moves once: frames, weights under even routing, embeddings; backward three times.

        What the drawn features really touch depends on the seed and stands in the figures.
        """
        params, times = self.params, 3 if self.trains else 1
        by_stream = [params.batch_size * n for n in params.tokens()]
        tokens = sum(by_stream)
        planes = params.batch_size * sum(params.frames()) * params.d_in + tokens * self.form.outputs
        moved = (self.form.read_weights(by_stream) + planes) * self.dtype.itemsize
        return self.work(times * self.form.flops_per_token() * tokens, times * moved)
