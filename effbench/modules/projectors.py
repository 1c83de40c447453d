"""The projectors of Llama-SMoP: a sparse mixture of MLPs from features of two encoders to embeddings, or one MLP for each.

    expert    Linear(D, H) → ReLU → Linear(H, O) → LayerNorm(O), biases on
    router    Linear(D, E) without bias, softmax in fp32, the k best, their weights divided by their sum
    output    Σ_k weight · expert(x)

All but the loop compute every token's experts, of both streams, in one call of the expert kernels; with disjoint banks the
experts of video come behind those of audio. A forward in training mode leaves the sum of the two losses in `auxiliary_loss`:

    balance   E · Σ_slot Σ_e mean_t 1[slot sends t to e] · mean_t p_e       z   mean_t (log Σ_e exp logit_e)²

The first is k times the kernels' `load_balance_loss`. With two routers each has its own, and they are added.

Shapes: B recordings, T tokens of both streams, N = B·T, D, H, O, E, K as in `projector_arms`, X experts in all.
Source: Llama-SMoP (arXiv 2505.14336) and its released code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from effbench_kernels import Norm, Routing, experts, load_balance_loss, route, sort, z_loss
from torch import nn
from torch.nn import functional as F

from effbench.modules.projector_arms import STREAMS, ProjectorForm

Streams = Sequence[torch.Tensor]  # (B, T of the stream, D) each
NEAR_TIE = 1e-4  # of the spread of the logits: fp32 and float64 may choose either


def make_projector(form: ProjectorForm) -> DenseProjector | MixtureProjector:
    """A projector with new weights: uniform up to 1/√fan-in as `nn.Linear` draws them. Move it with `cast`."""
    return DenseProjector(form) if form.kind == "dense" else MixtureProjector(form)


class DenseProjector(nn.Module):
    """One MLP for each stream: two experts, of which a token's stream names one."""

    auxiliary_loss: torch.Tensor | None = None

    def __init__(self, form: ProjectorForm):
        super().__init__()
        self.form = form
        self.experts = nn.ModuleList(
            nn.Sequential(
                nn.Linear(form.inputs, form.hidden),
                nn.ReLU(),
                nn.Linear(form.hidden, form.outputs),
                nn.LayerNorm(form.outputs),
            )
            for _ in range(STREAMS)
        )

    def forward(self, streams: Streams) -> torch.Tensor:
        """(B, T, O): the streams one after the other."""
        return torch.cat([mlp(x_BTD) for mlp, x_BTD in zip(self.experts, streams, strict=True)], dim=1)

    def load(self, streams: Streams) -> torch.Tensor:
        """(X,) tokens of each expert."""
        return torch.tensor([x_BTD.shape[0] * x_BTD.shape[1] for x_BTD in streams])

    def reference(self, streams: Streams) -> torch.Tensor:
        """(B, T, O) in float64."""
        return torch.cat([_mlp_float64(x, *_dense_weights(mlp)) for mlp, x in zip(self.experts, streams, strict=True)], dim=1)

    def cast(self, dtype: torch.dtype) -> DenseProjector:
        """All weights in this dtype."""
        self.to(dtype)
        return self


class Router(nn.Module):
    """One matrix for each router, stacked: weight (routers, E, D), kept in fp32 whatever the experts' dtype."""

    def __init__(self, form: ProjectorForm):
        super().__init__()
        self.weight = nn.Parameter(_uniform(form.routers, form.experts, form.inputs, fan_in=form.inputs))

    def forward(self, streams: Streams) -> list[torch.Tensor]:
        """Logits (B, T of what it is asked about, E) of each router: of all streams together, or of one each."""
        asked = [torch.cat(list(streams), dim=1)] if len(self.weight) == 1 else streams
        return [F.linear(_wide(x_BTD), weight_ED) for x_BTD, weight_ED in zip(asked, self.weight, strict=True)]


class ExpertBank(nn.Module):
    """The stacked weights of X experts."""

    def __init__(self, form: ProjectorForm):
        super().__init__()
        num, inputs, hidden, outputs = form.banked, form.inputs, form.hidden, form.outputs
        self.w_in = nn.Parameter(_uniform(num, hidden, inputs, fan_in=inputs))
        self.b_in = nn.Parameter(_uniform(num, hidden, fan_in=inputs))
        self.w_out = nn.Parameter(_uniform(num, outputs, hidden, fan_in=hidden))
        self.b_out = nn.Parameter(_uniform(num, outputs, fan_in=hidden))
        self.gain, self.shift = nn.Parameter(torch.ones(num, outputs)), nn.Parameter(torch.zeros(num, outputs))

    def forward(self, x_ND: torch.Tensor, routing: Routing) -> torch.Tensor:
        """(N, O) by the expert kernels."""
        plan = sort(routing.expert, len(self.w_in))
        return experts(
            x_ND, self.w_in, self.w_out, plan, routing.weight, act="relu", b_in=self.b_in, b_out=self.b_out,
            norm=Norm(self.gain, self.shift),
        )  # fmt: skip

    def one(self, number: int) -> tuple[torch.Tensor, ...]:
        """The weights of one expert."""
        return tuple(w[number] for w in (self.w_in, self.b_in, self.w_out, self.b_out, self.gain, self.shift))

    def looped(self, x_ND: torch.Tensor, routing: Routing) -> torch.Tensor:
        """(N, O) as the released code has it: one expert after the other, all of them, whether they have tokens or not."""
        out_NO = x_ND.new_zeros(x_ND.shape[0], self.w_out.shape[1])
        stacks = (self.w_in, self.b_in, self.w_out, self.b_out, self.gain, self.shift)
        every = zip(*(stack.unbind(0) for stack in stacks), strict=True)  # one gradient for each stack, not one for each expert
        for number, (w_in, b_in, w_out, b_out, gain, shift) in enumerate(every):
            token, slot = torch.where(routing.expert == number)
            rows = F.linear(F.relu(F.linear(x_ND[token], w_in, b_in)), w_out, b_out)
            rows = F.layer_norm(rows, gain.shape, gain, shift)
            out_NO.index_add_(0, token, rows * routing.weight[token, slot, None].to(rows.dtype))
        return out_NO


class MixtureProjector(nn.Module):
    """A mixture for both streams, or one for each."""

    def __init__(self, form: ProjectorForm):
        super().__init__()
        self.form = form
        self.router, self.experts = Router(form), ExpertBank(form)
        self.auxiliary_loss: torch.Tensor | None = None

    def forward(self, streams: Streams) -> torch.Tensor:
        """(B, T, O): the streams one after the other."""
        logits = self.router(streams)
        routing = self._routed(logits, streams)
        x_BTD = torch.cat(list(streams), dim=1)
        run = self.experts.looped if self.form.kind == "loop" else self.experts
        out_NO = run(x_BTD.flatten(0, 1), routing)
        if self.training:
            self.auxiliary_loss = self._auxiliary(logits, routing.expert - self._bank(streams))
        return out_NO.unflatten(0, x_BTD.shape[:2])

    def route(self, streams: Streams) -> Routing:
        """Of N tokens, recording after recording, audio before video; disjoint banks have ids of their own."""
        return self._routed(self.router(streams), streams)

    def load(self, streams: Streams) -> torch.Tensor:
        """(X,) tokens of each expert."""
        return torch.bincount(self.route(streams).expert.flatten(), minlength=self.form.banked).cpu()

    def reference(self, streams: Streams) -> torch.Tensor:
        """(B, T, O) in float64, by loops over experts. Where fp32 chose another expert in a near tie, that choice is kept."""
        form, top_k = self.form, self.form.top_k
        x_BTD, routing = torch.cat(list(streams), dim=1).double(), self.route(streams)
        weights = self.router.weight.double()
        of_stream = [weights[m] if form.routers > 1 else weights[0] for m in range(STREAMS)]
        logits_NE = torch.cat([x.double() @ w.T for x, w in zip(streams, of_stream, strict=True)], dim=1).flatten(0, 1)
        bank_N1 = self._bank(streams)
        best_NK, index_NK = logits_NE.topk(top_k, dim=-1)
        chosen_NK = routing.expert - bank_N1
        close_N1 = (logits_NE.gather(1, chosen_NK) >= best_NK[:, -1:] - NEAR_TIE * logits_NE.std(correction=0)).all(1, True)
        expert_NK = torch.where(close_N1, chosen_NK, index_NK)
        score_NE = logits_NE.softmax(-1)
        weight_NK = score_NE.gather(1, expert_NK)
        weight_NK = weight_NK / weight_NK.sum(-1, keepdim=True)
        x_ND = x_BTD.flatten(0, 1)
        out_NO = x_ND.new_zeros(len(x_ND), form.outputs)
        for number in range(form.banked):
            for slot in range(top_k):
                token = torch.where((expert_NK + bank_N1)[:, slot] == number)[0]
                rows = _mlp_float64(x_ND[token], *self.experts.one(number))
                out_NO[token] += weight_NK[token, slot, None] * rows
        return out_NO.unflatten(0, x_BTD.shape[:2])

    def cast(self, dtype: torch.dtype) -> MixtureProjector:
        """The experts in this dtype; the router stays in fp32, or goes to float64 with them."""
        self.experts.to(dtype)
        self.router.to(torch.float64 if dtype == torch.float64 else torch.float32)
        return self

    def _routed(self, logits: list[torch.Tensor], streams: Streams) -> Routing:
        routing = route(torch.cat(logits, dim=1).flatten(0, 1), self.form.top_k, renorm=True)
        if self.form.kind != "dedr":
            return routing
        return Routing(routing.expert + self._bank(streams), routing.weight)

    def _bank(self, streams: Streams) -> torch.Tensor:
        """(N, 1): what is added to the ids of a token's experts."""
        audio, video = (x_BTD.shape[1] for x_BTD in streams)
        place_T = torch.arange(audio + video, device=streams[0].device)
        first = self.form.experts if self.form.kind == "dedr" else 0
        return ((place_T >= audio) * first).repeat(streams[0].shape[0])[:, None]

    def _auxiliary(self, logits: list[torch.Tensor], expert_NK: torch.Tensor) -> torch.Tensor:
        """Both losses of each router, over the tokens that it was asked about."""
        form, terms = self.form, list[torch.Tensor]()
        expert_BTK = expert_NK.unflatten(0, (logits[0].shape[0], -1))
        asked = expert_BTK.split([part.shape[1] for part in logits], dim=1)
        for logits_BTE, chosen_BTK in zip(logits, asked, strict=True):
            logits_NE, chosen_NK = logits_BTE.flatten(0, 1), chosen_BTK.flatten(0, 1)
            balance = form.top_k * load_balance_loss(logits_NE, chosen_NK)
            terms.append(form.balance * balance + form.z * z_loss(logits_NE))
        return sum(terms[1:], terms[0])


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _uniform(*shape: int, fan_in: int) -> torch.Tensor:
    return torch.empty(shape).uniform_(-(fan_in**-0.5), fan_in**-0.5)


def _dense_weights(mlp: nn.Module) -> tuple[torch.Tensor, ...]:
    up, _, down, norm = mlp.children()
    return up.weight, up.bias, down.weight, down.bias, norm.weight, norm.bias


def _mlp_float64(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    """LayerNorm(W₂ · max(W₁ x + b₁, 0) + b₂), written out."""
    w_in, b_in, w_out, b_out, gain, shift = (w.double() for w in weights)
    rows = (x.double() @ w_in.T + b_in).clamp_min(0) @ w_out.T + b_out
    rows = rows - rows.mean(-1, keepdim=True)
    return rows / (rows.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain + shift
