"""The session behind `usam`.

Shapes: B clips, W windows (audio tokens), P prompt tokens, A answer tokens, D width of the Q-Former, O of the language model, E
experts, T = B·W.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from effbench.errors import CorrectnessError, LaunchError
from effbench.models import builders, text
from effbench.modules import tapm, usam_forms
from effbench.modules.audio_encoders import AudioEncoders
from effbench.modules.contrastive import SemanticContrastiveLoss
from effbench.modules.qformer import WindowQFormer
from effbench.modules.usam_arms import ProjectorForm
from effbench.workload import BuildContext, Step
from effbench.workloads._spoken import SpokenSession, relative_error
from effbench.workloads._spoken_params import NUM_FEATURES

LEARNING_RATE = 5e-5
CHECK_TOKENS = 16  # audio tokens on which the arm is held against its formula in float64


class UsamSession(SpokenSession):
    """Inputs ~ N(0, 1): sound for the encoders, or what stands in their or the Q-Former's place."""

    def __init__(self, context: BuildContext, params: Any):
        super().__init__(context, params)
        self.form = ProjectorForm.of(self.values)
        self.trains = params.mode == "train"
        if self.trains:
            self._build_model()
            self.answers = self._answers()
        torch.manual_seed(context.seed)
        with self.device:
            self.added = self._modules()
            self.added.float() if self.trains else self.added.to(self.dtype)
            self.drawn = [self._draw() for _ in range(NUM_FEATURES)]
        self.added.requires_grad_(self.trains).train(self.trains)
        self.output_error: float | None = None
        self.losses: list[float] = []
        self.touched, self.largest_share = self._load()
        self.step_work = self._work()
        if self.trains:
            fused = self.device.type == "cuda"
            self.optimizer = torch.optim.AdamW(self.added.parameters(), lr=LEARNING_RATE, fused=fused)

    def feature_tokens(self) -> int:
        return int(self.params.windows())

    def features(self, number: int) -> Any:
        return self.drawn[number % NUM_FEATURES]

    def embed(self, features: Any) -> torch.Tensor:
        audio_BWD, prompt_BPO = self._joint(features)
        with self.timed("projector_s"):
            out_BWO: torch.Tensor = self.added["projector"](audio_BWD, prompt_BPO)
        return out_BWO

    def embed_reference(self, features: Any) -> torch.Tensor:
        """The projector alone, for the logits that it has: what stands before it is the library's."""
        projector, (audio_BWD, prompt_BPO) = self.added["projector"], self._joint(features)
        logits_TE = projector.logits(audio_BWD, prompt_BPO) if self.form.routed else None
        return tapm.reference(projector, audio_BWD.flatten(0, 1), logits_TE).view(*audio_BWD.shape[:2], -1)

    def added_active(self) -> int:
        total = sum(int(p.numel()) for p in self.added.parameters())
        return total - self.form.idle_weights(self.params.width, self.hidden)

    def check(self) -> None:
        """Beside the base's gate: the arm's own code in float64 against its formula, and in training that every weight learns."""
        if self.trains:
            self._check_gradients()
        else:
            super().check()
        self.output_error = self._exact_error()
        if not self.output_error <= 1e-10:
            raise CorrectnessError(f"usam_{self.form.kind}: in float64 the output is off by {self.output_error:.3g} of its RMS")

    def step(self) -> None:
        if not self.trains:
            super().step()
            return
        with self.timed("train_step_s"):
            loss = self._loss(self.num_steps)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise LaunchError("nan_loss", f"the loss of step {self.num_steps} is {value}")
        self.losses.append(value)
        self.num_steps += 1

    def figures(self) -> dict[str, float | str]:
        return {
            "projector_flops": float(self._projector_flops()),
            "experts_touched": self.touched,
            "expert_load_share_max": self.largest_share,
            "output_error": "not_taken" if self.output_error is None else self.output_error,
        }

    def facts(self) -> dict[str, Any]:
        params, width = self.params, self.params.width
        stack = (width + 1) * self.hidden * self.dtype.itemsize
        return {
            **super().facts(),
            "projector_bytes": None if self.trains else min(self.touched, self.form.stored) * stack,
            "feature_tokens": self.feature_tokens(),
            "feature_frames": usam_forms.num_frames(params.seconds),
            "encoders": params.encoders if params.encodes else "none: the features are drawn",
            "encoder_params": self._size("encoders"),
            "qformer_params": self._size("qformer"),
            "projector_params": self._size("projector"),
            "contrastive_params": self._size("contrastive"),
            "losses": self.losses[:1000],
        }

    def _modules(self) -> nn.ModuleDict:
        """The projector, and of the rest what this mode runs."""
        params, form, width = self.params, self.form, self.params.width
        found: dict[str, nn.Module] = {
            "projector": tapm.TaskAwareProjector(form.kind, width, self.hidden, experts=form.experts, top_k=form.top_k)
        }
        if params.mode != "projector":
            found["qformer"] = WindowQFormer(usam_forms.STREAMS * width, width, heads=usam_forms.num_heads(width))
        if params.encodes:
            found["encoders"] = AudioEncoders(usam_forms.encoder_sizes(params.encoders, width), params.seconds)
        if self.trains and form.contrastive:
            found["contrastive"] = SemanticContrastiveLoss(self.hidden, patches=params.patches)
        return nn.ModuleDict(found)

    def _draw(self) -> Any:
        """Sound; without encoders their joined frames; in mode projector audio tokens and an embedded prompt."""
        params, batch, like = self.params, self.params.batch_size, torch.empty(0, dtype=self.dtype)
        if params.encodes:
            return self.added["encoders"].draw(batch, like)
        if params.mode == "projector":
            sizes = ((batch, params.windows(), params.width), (batch, params.prompt_tokens, self.hidden))
            return tuple(torch.randn(size).to(self.dtype) for size in sizes)
        return torch.randn(batch, usam_forms.num_frames(params.seconds), usam_forms.STREAMS * params.width).to(self.dtype)

    def _joint(self, features: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """What the projector reads: audio tokens (B, W, D) and the prompt's embeddings (B, P, O), in the compute dtype."""
        if self.params.mode == "projector":
            audio_BWD, prompt_BPO = features
            return audio_BWD, prompt_BPO
        frames_BTS = features
        if self.params.encodes:
            with self.timed("encoder_s"):
                frames_BTS = self.added["encoders"](features)
        with self.timed("qformer_s"):
            audio_BWD = self.added["qformer"](frames_BTS)
        return audio_BWD.to(self.dtype), self._embedded(self.prompt_BP)

    def _embedded(self, ids_BL: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model.get_input_embeddings()(ids_BL)
        return found

    # Training.

    def _answers(self) -> list[torch.Tensor]:
        """Text (B, A) that the model is to answer, one for each set of features."""
        params = self.params
        sample = text.text_of(self.spec).batches(
            "train", batch_size=params.batch_size, seq_len=params.new_tokens, seed=self.seed
        )
        return [torch.from_numpy(next(sample)[:, :-1]).to(self.device) for _ in range(NUM_FEATURES)]

    def _loss(self, number: int) -> torch.Tensor:
        """Cross-entropy of the answer behind audio and prompt, and the contrastive loss where the arm has it."""
        frames_BTS, answer_BA = self.features(number), self.answers[number % NUM_FEATURES]
        prompt_BPO, answer_BAO = self._embedded(self.prompt_BP), self._embedded(answer_BA)
        with builders.mixed_precision(self.model):
            audio_BWD = self.added["qformer"](frames_BTS).to(self.dtype)
            sound_BWO = self.added["projector"](audio_BWD, prompt_BPO)
            inputs = torch.cat([sound_BWO, prompt_BPO, answer_BAO[:, :-1]], dim=1)
            logits_BTV = self.model(inputs_embeds=inputs, use_cache=False).logits
            loss = F.cross_entropy(logits_BTV[:, -answer_BA.shape[1] :].flatten(0, 1).float(), answer_BA.flatten())
            if "contrastive" in self.added:
                other_B = torch.arange(len(answer_BA), device=self.device).roll(1 + number % (len(answer_BA) - 1))
                loss = loss + self.added["contrastive"](sound_BWO, answer_BAO, other_B)
        return loss

    def _check_gradients(self) -> None:
        """Every weight has a finite gradient from a finite loss, but where none can reach it; weights are left as they were."""
        loss = self._loss(0)
        loss.backward()
        bad = [name for name, p in self.added.named_parameters() if p.grad is None or not bool(torch.isfinite(p.grad).all())]
        self.optimizer.zero_grad(set_to_none=True)
        if bad or not math.isfinite(loss.item()):
            raise CorrectnessError(
                f"the loss is {loss.item():.3g}, without a finite gradient for {', '.join(bad[:3]) or 'nothing'}"
            )

    # Figures.

    @torch.no_grad()
    def _exact_error(self) -> float:
        """RMS error of the arm in float64 on some tokens, on the CPU, relative to the formula that its file names.

        `aliased` is mixed from rows of 24 bits by gates without rounding, so that equality with one projector is exact or not there.
        """
        projector = copy.deepcopy(self.added["projector"]).cpu().double()
        generator = torch.Generator().manual_seed(self.seed)
        audio_1TD, prompt_1PO = (
            torch.randn(1, CHECK_TOKENS, size, generator=generator, dtype=torch.float64)
            for size in (self.params.width, self.hidden)
        )
        audio_TD = audio_1TD[0]
        if self.form.kind == "aliased":
            gate_TE = tapm.exact_gates(projector.logits(audio_1TD, prompt_1PO).softmax(-1))
            rows_ETO = projector.rows(audio_TD).float().double()
            return relative_error(tapm.weighted(rows_ETO, gate_TE), rows_ETO[0])
        found_TO = projector(audio_1TD, prompt_1PO)[0]
        logits_TE = tapm.reference_logits(projector, audio_1TD, prompt_1PO) if self.form.routed else None
        return relative_error(found_TO, tapm.reference(projector, audio_TD, logits_TE))

    @torch.no_grad()
    def _load(self) -> tuple[float, float]:
        """Experts with a token, and the largest share of the pairs that one has: means over the sets of features."""
        if self.form.kind != "top":
            return float(self.form.experts), 1.0 / self.form.experts
        projector, touched, share = self.added["projector"], list[int](), list[float]()
        for number in range(NUM_FEATURES):
            expert_TK = projector.routing(projector.logits(*self._joint(self.features(number)))).expert
            count_E = torch.bincount(expert_TK.flatten(), minlength=self.form.experts)
            touched.append(int((count_E > 0).sum()))
            share.append(float(count_E.max() / count_E.sum()))
        self.begin()
        return sum(touched) / len(touched), sum(share) / len(share)

    def _size(self, part: str) -> int:
        return sum(p.numel() for p in self.added[part].parameters()) if part in self.added else 0

    def _projector_flops(self) -> int:
        params = self.params
        tokens, prompts = params.batch_size * params.windows(), params.batch_size * params.prompt_tokens
        return self.form.flops(tokens, prompts, params.width, self.hidden)

    def _work(self) -> Step:
        """FLOPs of all parts; bytes if every weight and every input moves once (not told for training)."""
        params, batch = self.params, self.params.batch_size
        flops = self._projector_flops()
        if params.mode != "projector":
            flops += usam_forms.qformer_flops(params.width, batch * params.windows())
        if params.encodes:
            flops += batch * usam_forms.encoder_flops(usam_forms.encoder_sizes(params.encoders, params.width), params.seconds)
        if not self.trains:
            weights = self.added_active() * self.dtype.itemsize
            drawn = self.drawn[0] if isinstance(self.drawn[0], tuple) else (self.drawn[0],)
            return self.work(flops, weights + sum(part.nbytes for part in drawn))
        if self.form.contrastive:
            flops += usam_forms.contrastive_flops(self.hidden, params.patches, batch, params.windows(), params.new_tokens)
        tokens = params.windows() + params.prompt_tokens + params.new_tokens - 1
        model = tokens * builders.model_flops_per_token(self.model, context_len=tokens, training=True)
        return Step(tokens=batch * params.new_tokens, samples=batch, model_flops=3 * flops + batch * model)
