"""What `pretrain` and `finetune` share: a training session on real text.

The quality steps are a fixed number of steps from a fixed start, taken before the window, so quality is compared at
equal tokens whatever the speed; they also warm the model up. The window then goes on training.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from effbench.errors import CorrectnessError, LaunchError
from effbench.metrics import check_quality_figure, quality_figure
from effbench.models import builders, text
from effbench.modules.losses import auxiliary_loss, modules_with_losses
from effbench.technique import OptimizerArgs
from effbench.workload import BuildContext, Session, Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CLIP_NORM = 1.0


class TrainingSession(Session):
    """A model in training: mixed precision at the model's dtype, trainable weights in fp32, AdamW unless a technique brings its own."""

    quality_first = True

    def __init__(self, context: BuildContext, params: Any, domain: text.Domain):
        spec = context.spec
        self.params, self.device = params, torch.device(spec.device)
        built = builders.build(spec, trains=True, seed=context.seed, device=spec.device)
        self.model: PreTrainedModel = built.model
        for technique in built.techniques:
            technique.trainable(self.model)
        builders.to_master_weights(self.model)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        args = OptimizerArgs(learning_rate=params.learning_rate, weight_decay=params.weight_decay)
        own = (technique.optimizer(self.model, args) for technique in built.techniques)
        self.optimizer = next((o for o in own if o is not None), None) or _adamw(self.trained, args, self.device)
        for technique in built.techniques:
            self.model = technique.finish(self.model)
        if params.activation_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.model.train()
        self.with_losses = modules_with_losses(self.model)
        self.scaler = torch.amp.GradScaler(spec.device, enabled=self.model.config.dtype == torch.float16)
        self.source = text.text_of(spec)
        self.domain, self.nominal_bits = domain, builders.nominal_bits(built.techniques)
        self.new_weights = builders.new_weights(spec)
        self.batches = self._batches(context.seed)
        tokens = params.batch_size * params.seq_len
        self.num_steps, self.losses = 0, list[float]()
        flops = builders.model_flops_per_token(self.model, context_len=params.seq_len, training=True)
        self.step_work = Step(tokens=tokens, samples=params.batch_size, model_flops=flops * tokens)
        self.figures: dict[str, Any] = {}

    def check(self) -> None:
        """Every trainable parameter receives a finite gradient from a finite loss; the weights are left as they were."""
        loss = self._loss(next(self.batches))
        self.scaler.scale(loss + auxiliary_loss(self.with_losses)).backward()
        bad = [
            name
            for name, p in self.model.named_parameters()
            if p.requires_grad and (p.grad is None or not bool(torch.isfinite(p.grad).all()))
        ]
        self.optimizer.zero_grad(set_to_none=True)
        if not math.isfinite(loss.item()):
            raise CorrectnessError(f"the loss of the first batch is {loss.item()}")
        if bad and not self.scaler.is_enabled():  # a scaler's first steps may overflow; it then skips them by design
            raise CorrectnessError(f"no finite gradient for {', '.join(bad[:3])} ({len(bad)} parameters)")

    def step(self) -> None:
        loss = self._loss(next(self.batches))
        self.scaler.scale(loss + auxiliary_loss(self.with_losses)).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.trained, CLIP_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        value = loss.item()  # waits for the device
        if not math.isfinite(value):
            raise LaunchError("nan_loss", f"the loss of step {self.num_steps} is {value}")
        self.num_steps += 1
        self.losses.append(value)
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def quality(self) -> None:
        """Train the fixed number of steps, then take loss and accuracy on held-out text."""
        if not self.params.quality_steps:
            return
        adapts = self.domain != "base"  # then the base is trained, and what it knew before and forgot is worth saying
        before = [self._held_out(domain)["validation_loss"] for domain in (self.domain, "base")] if adapts else [None, None]
        for _ in range(self.params.quality_steps):
            self.step()
        last = self.losses[-min(5, len(self.losses)) :]
        found = {
            "train_loss": sum(last) / len(last),
            "quality_steps": self.params.quality_steps,
            "validation_loss_before": before[0],
            "base_loss_before": before[1],
            "base_loss_after": self._held_out("base")["validation_loss"] if adapts else None,
            **self._held_out(self.domain),
        }
        self.figures = with_quality(found, f"on {found['validation_tokens']} held-out bytes")

    def _held_out(self, domain: text.Domain) -> dict[str, Any]:
        params = self.params
        found: dict[str, Any] = held_out(
            self.model, self.source, domain, num_tokens=params.validation_tokens, batch_size=params.batch_size,
            seq_len=params.seq_len,
        )  # fmt: skip
        self.model.train()
        return found

    def facts(self) -> dict[str, Any]:
        trained = sum(p.numel() for p in self.trained)
        return {
            **builders.model_facts(self.model),
            "params_trainable": trained,
            "trained_layers": trained_layers(self.model),
            "decomposition_s": getattr(self.model, "decomposition_s", None),
            "nominal_bits": self.nominal_bits,
            "new_weights": self.new_weights,
            "quality": self.figures,
            "losses": self.losses[:1000],
            "text_domain": self.domain,
        }

    def _batches(self, seed: int) -> Iterator[torch.Tensor]:
        params = self.params
        sample = self.source.batches(
            "train", batch_size=params.batch_size, seq_len=params.seq_len, seed=seed, domain=self.domain
        )
        return (torch.from_numpy(ids).to(self.device) for ids in sample)

    def _loss(self, ids_BT: torch.Tensor) -> torch.Tensor:
        with builders.mixed_precision(self.model):
            logits_BTV = self.model(input_ids=ids_BT[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), ids_BT[:, 1:].flatten())


def trained_layers(model: PreTrainedModel) -> list[int]:
    """Numbers of the decoder layers that hold a trained weight."""
    names = (name for name, p in model.named_parameters() if p.requires_grad)
    found = (re.search(r"\.(?:layers|blocks|h)\.(\d+)\.", name) for name in names)
    return sorted({int(match.group(1)) for match in found if match})


@torch.no_grad()
def held_out(
    model: PreTrainedModel, source: text.Text, domain: text.Domain, *, num_tokens: int, batch_size: int, seq_len: int
) -> dict[str, Any]:
    """Validation loss (nat/token), bits per byte, perplexity and next-token accuracy on held-out text, byte tokens."""
    model.eval()
    device = next(model.parameters()).device
    loss, right, total = 0.0, 0, 0
    for ids in source.validation(num_tokens=num_tokens, batch_size=batch_size, seq_len=seq_len, domain=domain):
        ids_BT = torch.from_numpy(ids).to(device)
        with builders.mixed_precision(model):
            logits_NV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits.flatten(0, 1).float()
        target_N = ids_BT[:, 1:].flatten()
        loss += float(F.cross_entropy(logits_NV, target_N, reduction="sum"))
        right += int((logits_NV.argmax(-1) == target_N).sum())
        total += target_N.numel()
    mean = loss / total
    return {
        "validation_loss": mean,
        "bits_per_byte": mean / math.log(2),  # one token is one byte
        "perplexity": math.exp(min(mean, 700.0)),
        "next_token_accuracy": right / total,
        "validation_tokens": total,
    }


def with_quality(found: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The figures of a workload with the one that stands for quality, and what it was taken on. Raises MetricError."""
    best = quality_figure(found)
    if best is None:
        return dict(found)
    figure = f"{best[0]} {what}"
    check_quality_figure(figure)
    return {**found, "quality": best[1], "figure": figure}


def _adamw(parameters: list[torch.nn.Parameter], args: OptimizerArgs, device: torch.device) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters, lr=args.learning_rate, betas=args.betas, weight_decay=args.weight_decay, fused=device.type == "cuda"
    )
