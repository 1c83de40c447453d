"""U-SAM's task-aware projector: a mixture of linear projectors whose router reads the prompt beside the sound.

    prompt ─ Linear(O, D) ─ cut or zero-padded to N ─┐
    audio (D) ───────────────────────────────────────┴─ concatenated ─ router Linear(2D, E), no bias ─ softmax ─ gates
    audio ─ experts Linear(D, O) ─ Σ_e gate_e · expert_e(audio)

U-SAM (arXiv 2505.13880) and its released code: all E = 3 experts run, no balance loss. The sum runs over the experts; the released
code sums over time, which yields 3 tokens for any duration and is not what the paper describes.

    soft      all experts, one grouped product of the expert kernels
    top       the k best experts of a token, weights as the softmax gives them, on the same kernels
    single    one Linear, no router
    aliased   the released `[proj] * 3`: one Linear behind a router, run as often as the list is long

Shapes: B clips, N audio tokens of each, P prompt tokens, T = B·N tokens, D width of the Q-Former, O of the language model, E experts.
"""

from __future__ import annotations

import torch
from effbench_kernels import Routing, dense_plan, grouped_linear, route, sort
from torch import nn
from torch.nn import functional as F

KINDS = ("soft", "top", "single", "aliased")


class Experts(nn.Module):
    """Linear layers of one shape, stacked: weight (E, O, D), bias (E, O)."""

    def __init__(self, num: int, out: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num, out, width))
        self.bias = nn.Parameter(torch.zeros(num, out))
        nn.init.normal_(self.weight, std=width**-0.5)


class TaskAwareProjector(nn.Module):
    """(B, N, D), (B, P, O) → (B, N, O). The router's product and its weights are in float32, or in float64 when all is."""

    def __init__(self, kind: str, width: int, out: int, *, experts: int = 3, top_k: int = 1):
        super().__init__()
        if kind not in KINDS or not 1 <= top_k <= experts:
            raise ValueError(f"a projector of kind {kind!r} with {experts} experts, of which {top_k} are used, is none")
        self.kind, self.num_experts, self.top_k = kind, 1 if kind == "single" else experts, top_k
        stored = experts if kind in ("soft", "top") else 1
        self.experts = Experts(stored, out, width)
        if kind != "single":
            self.down = nn.Linear(out, width)
            self.router = nn.Linear(2 * width, experts, bias=False)

    def forward(self, audio_BND: torch.Tensor, prompt_BPO: torch.Tensor) -> torch.Tensor:
        """Products run in the dtype of the audio, whatever that of the weights."""
        audio_TD = audio_BND.reshape(-1, audio_BND.shape[-1])
        if self.kind == "single":
            out_TO = F.linear(audio_TD, *self._cast(audio_TD, 0))
        else:
            out_TO = self.mix(audio_TD, self.logits(audio_BND, prompt_BPO))
        return out_TO.view(*audio_BND.shape[:-1], -1)

    def logits(self, audio_BND: torch.Tensor, prompt_BPO: torch.Tensor) -> torch.Tensor:
        """(T, E), in float32 or float64."""
        dtype = audio_BND.dtype
        prompt_BPD = F.linear(prompt_BPO.to(dtype), self.down.weight.to(dtype), self.down.bias.to(dtype))
        joint_BNJ = torch.cat([audio_BND, fitted(prompt_BPD, audio_BND.shape[1])], dim=-1)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        with torch.autocast(audio_BND.device.type, enabled=False):
            return F.linear(joint_BNJ.flatten(0, 1).to(wide), self.router.weight.to(wide))

    def mix(self, audio_TD: torch.Tensor, logits_TE: torch.Tensor) -> torch.Tensor:
        """(T, O): the experts' outputs weighted by the gates of these logits."""
        if self.kind == "top":
            routing = self.routing(logits_TE)
            plan = sort(routing.expert, self.num_experts)
            weight, bias = self._cast(audio_TD)
            return grouped_linear(audio_TD, weight, plan, bias, out="sum", weight=routing.weight.to(audio_TD.dtype))
        gate_TE = logits_TE.softmax(-1).to(audio_TD.dtype)
        return weighted(self.rows(audio_TD), gate_TE)

    def rows(self, audio_TD: torch.Tensor) -> torch.Tensor:
        """(E, T, O): what every expert says of every token; not for `top`."""
        if self.kind == "aliased":
            return torch.stack([F.linear(audio_TD, *self._cast(audio_TD, 0)) for _ in range(self.num_experts)])
        plan = dense_plan(len(audio_TD), self.num_experts, audio_TD.device)
        weight, bias = self._cast(audio_TD)
        return grouped_linear(audio_TD, weight, plan, bias).view(self.num_experts, len(audio_TD), -1)

    def routing(self, logits_TE: torch.Tensor) -> Routing:
        """The k best experts; with k = E their weights are the gates of `soft`."""
        return route(logits_TE, self.top_k)

    def _cast(self, like: torch.Tensor, expert: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias = self.experts.weight.to(like.dtype), self.experts.bias.to(like.dtype)
        return (weight, bias) if expert is None else (weight[expert], bias[expert])


def weighted(rows_ETO: torch.Tensor, gate_TE: torch.Tensor) -> torch.Tensor:
    """(T, O) = Σ_e gate · rows, one product of a row and a matrix for each token."""
    return torch.bmm(gate_TE[:, None, :], rows_ETO.transpose(0, 1)).squeeze(1)


def fitted(prompt_BPD: torch.Tensor, tokens: int) -> torch.Tensor:
    """(B, tokens, D): the prompt cut, or padded with zeros."""
    return F.pad(prompt_BPD[:, :tokens], (0, 0, 0, max(0, tokens - prompt_BPD.shape[1])))


def reference_logits(projector: TaskAwareProjector, audio_BND: torch.Tensor, prompt_BPO: torch.Tensor) -> torch.Tensor:
    """`projector.logits` in float64 and plain torch."""
    prompt_BPD = prompt_BPO.double() @ projector.down.weight.double().T + projector.down.bias.double()
    joint_BNJ = torch.cat([audio_BND.double(), fitted(prompt_BPD, audio_BND.shape[1])], dim=-1)
    return (joint_BNJ @ projector.router.weight.double().T).flatten(0, 1)


def reference(projector: TaskAwareProjector, audio_TD: torch.Tensor, logits_TE: torch.Tensor | None) -> torch.Tensor:
    """What an arm must give for these logits, in float64 by plain torch: one batched product over the experts, their weighted sum.

    For `single` and `aliased` it is the one projector, whatever the router says.
    """
    audio_TD, weight_EOD, bias_EO = audio_TD.double(), projector.experts.weight.double(), projector.experts.bias.double()
    rows_ETO = audio_TD @ weight_EOD.transpose(1, 2) + bias_EO[:, None]
    if projector.kind in ("single", "aliased"):
        return rows_ETO[0]
    assert logits_TE is not None
    gate_TE = logits_TE.double().softmax(-1)
    if projector.kind == "top":
        best_TK = logits_TE.topk(projector.top_k).indices
        gate_TE = gate_TE * torch.zeros_like(gate_TE).scatter(1, best_TK, 1)
    return torch.einsum("te,eto->to", gate_TE, rows_ETO)


def exact_gates(gate_TE: torch.Tensor) -> torch.Tensor:
    """(T, E) in float64: gates rounded to multiples of 2⁻²⁰ that sum to exactly 1.

    Times rows of 24 bits or fewer, their products and sums have no rounding in float64: equal experts then show as equality.
    """
    unit = 2.0**20
    whole_TE = (gate_TE.double() * unit).round()
    whole_TE[:, 0] += unit - whole_TE.sum(-1)
    return whole_TE / unit
