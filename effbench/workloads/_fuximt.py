"""The sessions behind `fuximt`: those of `finetune` and `generate` on made languages, with the mixtures' gate and counts.

Shapes: B rows, L tokens of a row, T tokens, E experts, K experts of a token; n tokens of the check.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from effbench_kernels import Routing, route
from torch.nn import functional as F

from effbench.errors import CorrectnessError
from effbench.models import builders
from effbench.modules.inserted_experts import SparseFeedForward, by_loop, mixtures, own_parameters
from effbench.schema import Spec
from effbench.workload import BuildContext
from effbench.workloads import _decode, _language_pairs
from effbench.workloads._generation import GenerateSession
from effbench.workloads._training import TrainingSession
from effbench.workloads.generate import NUM_PROMPTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHECK_TOKENS = 16  # of each mixture that are computed again in float64
CHECK_WEIGHTS = 50_000_000  # largest bank of experts whose weights' gradients are checked too
# Largest error of the output and of gradients against float64, RMS over RMS.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.003}


class TrainSession(TrainingSession):
    """Batches of pairs in the order that the technique asks for; the loss is that of the targets."""

    quality_first = False

    def __init__(self, context: BuildContext, params: Any):
        self.order = order_of(context.spec)
        super().__init__(context, params, domain="base")
        self.mixtures, self.errors = mixtures(self.model), dict[str, float]()
        self.counted: dict[str, Any] = {}

    def check(self) -> None:
        """As any training session; and every mixture's experts, output and gradients, against float64 loops."""
        super().check()
        ids_BL, _ = next(self.batches)
        self.errors = check_mixtures(self.model, self.mixtures, ids_BL, gradients=True)

    def quality(self) -> None:
        """Counts of one forward pass; a made language says nothing of quality."""
        ids_BL, _ = next(self.batches)
        self.counted = counts(self.model, self.mixtures, ids_BL)
        self.model.train()

    def facts(self) -> dict[str, Any]:
        states = (
            p.numel()
            for p, state in self.optimizer.state.items()
            if any(torch.is_tensor(v) and v.shape == p.shape for v in state.values())
        )
        figures = {**self.counted, "optimizer_params": sum(states)}
        return {**super().facts(), "figures": figures, "data_order": self.order, "check_errors": self.errors}

    def _batches(self, seed: int) -> Iterator[Any]:
        found = _language_pairs.rows(self.source, self.params, self.model.config.vocab_size, seed)
        made = _language_pairs.batches(found, self.params.batch_size, self.order, seed)
        return ((self._on_device(ids), self._on_device(targets)) for ids, targets in made)

    def _on_device(self, ids: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(ids).to(self.device)

    def _loss(self, batch: Any) -> torch.Tensor:
        ids_BL, targets_BL = batch
        with builders.mixed_precision(self.model):
            logits_BLV = self.model(input_ids=ids_BL, use_cache=False).logits
        return F.cross_entropy(logits_BLV.flatten(0, 1).float(), targets_BL.flatten(), ignore_index=_language_pairs.IGNORED)


class TranslateSession(GenerateSession):
    """Requests in many languages; one step is one batch of them."""

    def __init__(self, context: BuildContext, params: Any):
        super().__init__(context, params)
        self.mixtures, self.errors = mixtures(self.model), dict[str, float]()
        self.counted: dict[str, Any] = {}

    @torch.inference_mode()
    def check(self) -> None:
        """Cached decoding equals a full forward; and every mixture's experts equal float64 loops."""
        super().check()
        self.errors = check_mixtures(self.model, self.mixtures, self.prompts[0], gradients=False)

    @torch.inference_mode()
    def quality(self) -> None:
        """Counts of a decode step and of one prefill; a made language says nothing of quality."""
        self.decode_flops = _decode.counted_flops(self.model, self.prompts[0][:1], self.params.seq_len - 1)
        self.counted = counts(self.model, self.mixtures, self.prompts[0])

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "figures": self.counted, "check_errors": self.errors}

    def _prompts(self, seed: int) -> list[torch.Tensor]:
        params = self.params
        number = NUM_PROMPTS * params.batch_size
        language = _language_pairs.languages(number, params.skew, np.random.default_rng(seed))
        vocabulary = self.model.config.vocab_size
        ids = _language_pairs.sources(self.source, params, vocabulary, language, seed, "validation")
        return list(torch.from_numpy(ids).to(self.device).split(params.batch_size))


def order_of(spec: Spec) -> str:
    """The data order that the stack asks for; a model without experts takes the rows shuffled."""
    return next((str(t.params.order) for t in builders.stack(spec) if t.name == "fuximt"), "shuffled")


@torch.no_grad()
def counts(model: PreTrainedModel, found: list[SparseFeedForward], ids_BL: torch.Tensor) -> dict[str, Any]:
    """Figures of one forward pass: FLOPs as torch counts them, and the load of the experts; a text is why there is none."""
    from torch.utils.flop_counter import FlopCounterMode

    logits: list[torch.Tensor] = []
    hooks = [m.router.register_forward_hook(lambda _, __, out: logits.append(out)) for m in found]
    model.eval()
    with FlopCounterMode(display=False) as counter, builders.mixed_precision(model):
        model(input_ids=ids_BL, use_cache=False)
    for hook in hooks:
        hook.remove()
    figures: dict[str, Any] = {
        "flops_per_token": counter.get_total_flops() / ids_BL.numel(),
        "moe_params": sum(p.numel() for mixture in found for p in own_parameters(mixture)),
    }
    if not found:
        return {**figures, **dict.fromkeys(("expert_load_share_max", "experts_touched"), "no_such_part")}
    loads = [torch.bincount(route(out, m.choices.top_k).expert.flatten(), minlength=m.choices.experts)
             for m, out in zip(found, logits, strict=True)]  # fmt: skip
    return {
        **figures,
        "expert_load_share_max": max(float(load.max() / load.sum()) for load in loads),
        "experts_touched": sum(int((load > 0).sum()) for load in loads) / len(loads),
    }


def check_mixtures(
    model: PreTrainedModel, found: list[SparseFeedForward], ids_BL: torch.Tensor, *, gradients: bool
) -> dict[str, float]:
    """Errors of the experts on some tokens that reach them, RMS over RMS, the worst of all layers. Raises CorrectnessError.

    Their weights are those of the router without the gate, which may be zero.
    """
    inputs: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = [m.experts.register_forward_pre_hook(lambda _, given: inputs.append((given[0], given[1].expert))) for m in found]
    with torch.no_grad(), builders.mixed_precision(model):
        model(input_ids=ids_BL[:1], use_cache=False)
    for hook in hooks:
        hook.remove()
    errors: dict[str, float] = {}
    for mixture, (x_TD, expert_TK) in zip(found, inputs, strict=True):
        x_nD, expert_nK = x_TD[:CHECK_TOKENS].detach(), expert_TK[:CHECK_TOKENS]
        for what, error in _errors(model, mixture, x_nD, expert_nK, gradients=gradients).items():
            errors[what] = max(error, errors.get(what, 0.0))
    allowed = TOLERANCE.get(builders.compute_dtype(model), 0.02)
    for what, error in errors.items():
        if not error <= allowed:
            raise CorrectnessError(
                f"fuximt: the {what} of the experts is off by {error:.3g} of its RMS; {allowed:g} is allowed"
            )
    return errors


def _errors(
    model: PreTrainedModel, mixture: SparseFeedForward, x_nD: torch.Tensor, expert_nK: torch.Tensor, *, gradients: bool
) -> dict[str, float]:
    bank = mixture.experts
    names = ("w_in", "b_in", "w_out", "b_out")
    weight_nK = torch.linspace(0.2, 1.0, expert_nK.numel(), device=x_nD.device).view(expert_nK.shape)
    with torch.enable_grad() if gradients else torch.no_grad():
        x_nD = x_nD.requires_grad_(gradients)
        with builders.mixed_precision(model):
            one_nD = bank(x_nD, Routing(expert_nK, weight_nK))
        true_nD = by_loop(x_nD.double(), [getattr(bank, name) for name in names], Routing(expert_nK, weight_nK.double()))
        errors = {"output": _error(one_nD, true_nD)}
        if gradients:
            light = bank.w_in.numel() + bank.w_out.numel() <= CHECK_WEIGHTS
            wanted = {"x": x_nD, **({name: getattr(bank, name) for name in names} if light else {})}
            grad_nD = torch.linspace(-1.0, 1.0, one_nD.numel(), device=x_nD.device).view(one_nD.shape)
            ours = torch.autograd.grad(one_nD, tuple(wanted.values()), grad_nD.to(one_nD.dtype))
            true = torch.autograd.grad(true_nD, tuple(wanted.values()), grad_nD.double())
            errors |= {f"gradient of {name}": _error(a, b) for name, a, b in zip(wanted, ours, true, strict=True)}
    return errors


def _error(found: torch.Tensor, true: torch.Tensor) -> float:
    found, true = found.detach().double(), true.detach().double()
    scale = math.sqrt(float(true.square().mean())) or 1.0
    return math.sqrt(float((found - true).square().mean())) / scale
