"""Decode engines: how the next token is computed, so that the technique is measured and not Python.

    eager       the library's growing cache, one forward call per token
    static      preallocated cache and one fixed decode step, called from Python
    cuda_graph  the static step captured once and replayed: one launch per token
    compile     the static step under torch.compile(mode="reduce-overhead")

All prefill the same way, with the library's own attention over the prompt. Shapes: B requests, P prompt tokens,
T new tokens, V vocabulary. A model whose cache cannot lie in fixed memory decodes eagerly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from effbench.errors import CorrectnessError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Stamp = Callable[[], None]
CHECK_PROMPT, CHECK_TOKENS = 16, 4
# How far below the best logit of a full forward a decoded token may lie, as a share of the logits' spread.
CHECK_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.06, torch.float16: 0.02}


class EagerEngine:
    """Prefill and decode with the library's growing cache."""

    name = "eager"

    def __init__(self, model: PreTrainedModel):
        self.model, self.cache = model, None

    def generate(self, prompt_BP: torch.Tensor, new_tokens: int, stamp: Stamp) -> torch.Tensor:
        """Greedy tokens (B, T); calls `stamp` when each is there (on CUDA: queued)."""
        self.cache = None  # the last request's: two at once would take twice the memory, and fresh pages for every prompt
        token_B1, self.cache = prefill(self.model, prompt_BP)
        stamp()
        tokens = [token_B1]
        for _ in range(new_tokens - 1):
            out = self.model(input_ids=token_B1, past_key_values=self.cache, use_cache=True)
            token_B1 = out.logits[:, -1:].argmax(-1)
            stamp()
            tokens.append(token_B1)
        return torch.cat(tokens, dim=1)


class StaticEngine:
    """One decode step on preallocated memory; subclasses run that step in their own way."""

    name = "static"

    def __init__(self, model: PreTrainedModel, batch_size: int, max_tokens: int):
        device = next(model.parameters()).device
        self.model, self.max_tokens = model, max_tokens
        self.cache: Any = None  # made for the first request, when the form of the model's own cache is known
        self.token_B1 = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        self.position_1 = torch.zeros(1, dtype=torch.long, device=device)
        self.slots_S = torch.arange(max_tokens, device=device)

    def generate(self, prompt_BP: torch.Tensor, new_tokens: int, stamp: Stamp) -> torch.Tensor:
        """Greedy tokens (B, T); calls `stamp` when each is there (on CUDA: queued)."""
        token_B1, grown = prefill(self.model, prompt_BP)
        stamp()
        self._start(token_B1, grown, prompt_BP.shape[1])
        tokens = [token_B1]
        for _ in range(new_tokens - 1):
            self._step()
            stamp()
            tokens.append(self.token_B1.clone())
        return torch.cat(tokens, dim=1)

    def _start(self, token_B1: torch.Tensor, grown: Any, prompt_tokens: int) -> None:
        """Copy the prompt's cache into the preallocated one and stand at its end."""
        if self.cache is None:
            self.cache = fixed_cache(self.model, grown, self.max_tokens)
        self.cache.reset()
        for index, layer in enumerate(grown.layers):
            if hasattr(layer, "fixed"):
                self.cache.layers[index].fill(layer)
            else:
                self.cache.update(layer.keys, layer.values, index)
        self.token_B1.copy_(token_B1)
        self.position_1.fill_(prompt_tokens)

    def _step(self) -> None:
        self._next_token()

    def _next_token(self) -> None:
        """Read token and position, write the next of both; touches no memory that moves and asks the device nothing."""
        visible = (self.slots_S <= self.position_1)[None, None, None]
        mask = visible.expand(self.token_B1.shape[0], 1, 1, self.max_tokens)
        if self.model.config.model_type == "bloom":  # which makes its positional biases of the mask, one row a sequence
            mask = mask[:, 0, 0]
        out = self.model(
            input_ids=self.token_B1,
            attention_mask=mask,
            position_ids=self.position_1[None],
            past_key_values=self.cache,
            use_cache=True,
        )
        self.token_B1.copy_(out.logits[:, -1:].argmax(-1))
        self.position_1.add_(1)


class CudaGraphEngine(StaticEngine):
    """The static step as one CUDA graph, captured at the first decode of a request."""

    name = "cuda_graph"

    def __init__(self, model: PreTrainedModel, batch_size: int, max_tokens: int):
        super().__init__(model, batch_size, max_tokens)
        self.graph: torch.cuda.CUDAGraph | None = None

    def _start(self, token_B1: torch.Tensor, grown: Any, prompt_tokens: int) -> None:
        super()._start(token_B1, grown, prompt_tokens)
        if self.graph is None:
            self._capture()
            super()._start(token_B1, grown, prompt_tokens)  # the rehearsal moved token, position and cache

    def _step(self) -> None:
        assert self.graph is not None
        self.graph.replay()

    def _capture(self) -> None:
        """Rehearse on a side stream, as capture asks for, then record one step."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._next_token()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._next_token()


class CompiledEngine(StaticEngine):
    """The static step under torch.compile."""

    name = "compile"

    def __init__(self, model: PreTrainedModel, batch_size: int, max_tokens: int):
        super().__init__(model, batch_size, max_tokens)
        self._compiled = torch.compile(self._next_token, mode="reduce-overhead" if self.token_B1.is_cuda else "default")

    def _step(self) -> None:
        self._compiled()


STATIC_ENGINES: dict[str, type[StaticEngine]] = {e.name: e for e in (StaticEngine, CudaGraphEngine, CompiledEngine)}


def prefill(model: PreTrainedModel, prompt: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """First token (B, 1) and the grown cache of a prompt: token ids (B, P), or embeddings (B, P, D)."""
    name = "inputs_embeds" if prompt.is_floating_point() else "input_ids"
    out = model(**{name: prompt}, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1:].argmax(-1), out.past_key_values


def check_decode(model: PreTrainedModel, engine: EagerEngine | StaticEngine, prompt: torch.Tensor) -> None:
    """Decoding with the cache picks what a full forward over the same tokens would pick. Raises CorrectnessError.

    The prompt, ids (B, P) or embeddings (B, P, D), is cut to its first CHECK_PROMPT tokens.
    """
    prompt = prompt[:, :CHECK_PROMPT]
    tokens_BT = engine.generate(prompt, CHECK_TOKENS, lambda: None)
    if prompt.is_floating_point():
        whole = {"inputs_embeds": torch.cat([prompt, model.get_input_embeddings()(tokens_BT)], dim=1)}
    else:
        whole = {"input_ids": torch.cat([prompt, tokens_BT], dim=1)}
    logits_BTV = model(**whole, use_cache=False).logits.float()[:, prompt.shape[1] - 1 : -1]
    if not bool(torch.isfinite(logits_BTV).all()):
        raise CorrectnessError("the logits of the first prompt are not finite")
    short_BT = logits_BTV.amax(-1) - logits_BTV.gather(-1, tokens_BT[..., None])[..., 0]
    spread = float(logits_BTV.std())
    worst = float(short_BT.max()) / max(spread, 1e-12)
    tolerance = CHECK_TOLERANCE.get(model.dtype, 0.06)
    if worst > tolerance:
        raise CorrectnessError(
            f"cached decode ({engine.name}) differs from a full forward: a decoded token lies {worst:.3g} standard "
            f"deviations of the logits below the best one; {tolerance:g} is allowed for {model.dtype}"
        )


def fixed_cache(model: PreTrainedModel, grown: Any, max_tokens: int) -> Any:
    """An empty cache on memory that does not move; layers of a form of their own say how (`fixed`)."""
    from transformers import Cache, StaticCache

    if all(hasattr(layer, "fixed") for layer in grown.layers):
        return Cache(layers=[layer.fixed(max_tokens) for layer in grown.layers])
    return StaticCache(config=model.config, max_cache_len=max_tokens)


def engine_of(
    model: PreTrainedModel, wanted: str, prompt: torch.Tensor, new_tokens: int
) -> tuple[EagerEngine | StaticEngine, str]:
    """The engine of this name for requests like `prompt`, and a note where the model cannot have it; "auto" is by device."""
    if wanted == "auto":
        wanted = "cuda_graph" if prompt.is_cuda else "eager"
    if wanted == "eager":
        return EagerEngine(model), ""
    if not can_be_fixed(model, prompt):
        return EagerEngine(model), f"{wanted} needs a cache whose memory does not move, which this model has not"
    capacity = max(prompt.shape[1] + new_tokens - 1, CHECK_PROMPT + CHECK_TOKENS)
    return STATIC_ENGINES[wanted](model, prompt.shape[0], capacity), ""


def can_be_fixed(model: PreTrainedModel, prompt: torch.Tensor) -> bool:
    """Whether the model's cache can lie in memory that does not move: plain unbounded keys and values, or a form that says how."""
    from transformers.cache_utils import DynamicLayer

    cache = prefill(model, prompt[:, :2])[1]
    return all(type(layer) is DynamicLayer or hasattr(layer, "fixed") for layer in getattr(cache, "layers", [None]))


def cache_bytes(cache: Any) -> int:
    """Bytes of all distinct tensor storages inside a cache object, whatever its layout."""
    seen: dict[int, int] = {}
    stack, visited = [cache], set[int]()
    while stack:
        item = stack.pop()
        if id(item) in visited:
            continue
        visited.add(id(item))
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            if item.numel() > 1:  # a counter is not cache
                seen[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, list | tuple):
            stack.extend(item)
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif type(item).__module__.startswith(("transformers", "effbench")) and hasattr(item, "__dict__"):
            stack.extend(vars(item).values())
    return sum(seen.values())


@torch.inference_mode()
def counted_flops(model: PreTrainedModel, prompt_BP: torch.Tensor, positions: int) -> int:
    """FLOPs of the matrix products of one decode step that sees `positions` tokens, all B sequences, as torch counts them.

    The prompt is repeated to that length; fused attention is taken apart, since torch does not count it on every device.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    repeats = -(-positions // prompt_BP.shape[1])
    token_B1, cache = prefill(model, prompt_BP.repeat(1, repeats)[:, : positions - 1])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids=token_B1, past_key_values=cache, use_cache=True)
    return int(counter.get_total_flops())
