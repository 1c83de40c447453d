"""A language model behind a projector: recordings in, tokens out. What `smop` and `usam` share.

    features(i) ──▶ embed ──▶ (B, T, D) ─┬─ prompt's embeddings ─▶ prefill ─▶ greedy decode with the cache
                                         └─ mode "projector": the step ends here, no language model is built

A part of a step is timed by `with self.timed("projector_s")`, the device synchronised before and after.

Shapes: B recordings, T tokens of features, P tokens of the prompt, D hidden size of the language model.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from effbench.errors import CorrectnessError, LaunchError
from effbench.models import accounting, builders, storage, text
from effbench.models.context import configured
from effbench.schema import Series
from effbench.workload import BuildContext, Session, Step
from effbench.workloads import _decode

# Largest error of embeddings against float64, RMS over RMS.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.003}


class SpokenSession(Session):
    """Subclasses build what stands before the language model as `self.added`, and set `step_work` by `work`.

    `model` is None in the modes without a language model. `dtype` is the compute dtype, `hidden` D.
    """

    added: nn.Module

    def __init__(self, context: BuildContext, params: Any):
        spec = context.spec
        self.params, self.clock, self.spec, self.seed = params, context.clock, spec, context.seed
        self.device = torch.device(spec.device)
        self.values = configured(spec)
        self.hidden = int(self.values["hidden_size"])
        self.dtype: torch.dtype = getattr(torch, str(self.values.get("dtype") or "float32"))
        self.model: Any = None
        self.engine: Any = None
        self.engine_note = ""
        if params.mode == "pipeline":
            self._build_model()
        self.num_steps = 0
        self.parts: dict[str, list[tuple[float, float]]] = {}
        self.token_s: list[float] = []
        self.embed_error: float | None = None

    @abstractmethod
    def features(self, number: int) -> Any:
        """The input of step `number`, in memory on the device."""

    @abstractmethod
    def embed(self, features: Any) -> torch.Tensor:
        """(B, T, D) in the compute dtype; its parts are timed by `timed`."""

    @abstractmethod
    def embed_reference(self, features: Any) -> torch.Tensor:
        """The same in float64, by the plainest code there is."""

    @abstractmethod
    def feature_tokens(self) -> int:
        """T, tokens of features of one recording."""

    @abstractmethod
    def added_active(self) -> int:
        """Of the weights of `added`, those that one token uses."""

    @abstractmethod
    def figures(self) -> dict[str, float | str]:
        """The workload's own metrics by name; a text is the reason why one is missing."""

    @torch.inference_mode()
    def check(self) -> None:
        """Embeddings against float64; decoding with the cache against a full forward."""
        features = self.features(0)
        found_BTD, true_BTD = self.embed(features), self.embed_reference(features)
        self.embed_error = relative_error(found_BTD, true_BTD)
        if not self.embed_error <= TOLERANCE[self.dtype]:
            raise CorrectnessError(
                f"the embeddings are off by {self.embed_error:.3g} of their RMS; {TOLERANCE[self.dtype]:g} is allowed for {self.dtype}"
            )
        if self.model is not None:
            engine = self._engine(prompt_BPD := self._prompt(found_BTD))[0]
            _decode.check_decode(self.model, engine, prompt_BPD)

    @torch.inference_mode()
    def step(self) -> None:
        x_BTD = self.embed(self.features(self.num_steps))
        self.require_finite(x_BTD)
        if self.model is not None:
            self._answer(x_BTD)
        self.num_steps += 1

    def begin(self) -> None:
        self.parts, self.token_s = {}, []

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Time a part of a step, as the metric `name`; once a step for each name."""
        self.wait()
        start_s = self.clock()
        yield
        self.wait()
        end_s = self.clock()
        self.note(name, end_s, end_s - start_s)

    def note(self, name: str, end_s: float, duration_s: float) -> None:
        """Keep the time of a part that ended at `end_s` of the launch's clock."""
        self.parts.setdefault(name, []).append((end_s, duration_s))

    def wait(self) -> None:
        """Until the device has done what was asked."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def require_finite(self, x: torch.Tensor) -> None:
        """Raises LaunchError for infinities and what is no number; waits for the device."""
        total = float(x.detach().sum(dtype=torch.float32))
        if total != total or abs(total) == float("inf"):
            raise LaunchError("not_finite", f"the embeddings of step {self.num_steps} are not finite")

    def work(self, flops: float, moved_bytes: float) -> Step:
        """The work of a step, given FLOPs and bytes of what stands before the language model.

        Throughput counts tokens of features, and with a language model the new tokens.
        """
        params, tokens = self.params, self.feature_tokens()
        if self.model is None:
            made = params.batch_size * tokens
            return Step(tokens=made, samples=params.batch_size, model_flops=flops, model_bytes=moved_bytes)
        prompt = tokens + params.prompt_tokens
        more_flops, more_bytes = builders.generation_cost(self.model, params.batch_size, prompt, params.new_tokens)
        return Step(
            tokens=params.batch_size * params.new_tokens,
            samples=params.batch_size,
            model_flops=flops + more_flops,
            model_bytes=moved_bytes + more_bytes,
        )

    def facts(self) -> dict[str, Any]:
        return {
            **self._weights(),
            "compute_dtype": accounting.dtype_name(self.dtype),
            "params_trainable": sum(p.numel() for p in self.added.parameters() if p.requires_grad),
            "mode": self.params.mode,
            "figures": self.figures(),
            **(self._cache() if self.model is not None else {}),
        }

    def series(self) -> list[Series]:
        found = []
        for name, pairs in self.parts.items():
            times = np.asarray(pairs)
            found.append(Series(name=name, unit="s", scope="process", source="host clock", t_s=times[:, 0], values=times[:, 1]))
        if self.token_s:
            times = np.asarray(self.token_s)
            source = "CUDA events" if self.device.type == "cuda" else "host clock"
            count = np.full(len(times), self.params.batch_size, dtype=float)  # tokens that were there at once
            found.append(Series(name="token", unit="tokens", scope="process", source=source, t_s=times, values=count))
        return found

    def _build_model(self) -> None:
        built = builders.build(self.spec, trains=False, seed=self.seed, device=self.spec.device)
        self.model, self.nominal_bits = built.model, builders.nominal_bits(built.techniques)
        for technique in built.techniques:
            self.model = technique.finish(self.model)
        self.model.eval().requires_grad_(False)
        params = self.params
        sample = text.text_of(self.spec).batches(
            "validation", batch_size=params.batch_size, seq_len=params.prompt_tokens, seed=self.seed
        )
        self.prompt_BP = torch.from_numpy(next(sample)[:, :-1]).to(self.device)

    def _prompt(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """(B, T + P, D): features first, the prompt's text behind them."""
        embedded: torch.Tensor = self.model.get_input_embeddings()(self.prompt_BP)
        return torch.cat([x_BTD.to(embedded.dtype), embedded], dim=1)

    def _engine(self, prompt_BPD: torch.Tensor) -> tuple[Any, str]:
        return _decode.engine_of(self.model, "auto", prompt_BPD, self.params.new_tokens)

    def _answer(self, x_BTD: torch.Tensor) -> None:
        """Prefill and decode; the prefill is timed to its first token, tokens are stamped without waiting inside a request."""
        self.wait()
        start_s = self.clock()
        prompt_BPD = self._prompt(x_BTD)
        if self.engine is None:
            self.engine, self.engine_note = self._engine(prompt_BPD)
        if self.device.type == "cuda":
            token_s = self._answer_cuda(prompt_BPD, start_s)
        else:
            token_s = list[float]()
            self.engine.generate(prompt_BPD, self.params.new_tokens, lambda: token_s.append(self.clock()))
        self.note("prefill_s", token_s[0], token_s[0] - start_s)
        self.token_s += token_s

    def _answer_cuda(self, prompt_BPD: torch.Tensor, start_s: float) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True)]
        events[0].record()

        def stamp() -> None:
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()

        self.engine.generate(prompt_BPD, self.params.new_tokens, stamp)
        self.wait()
        return [start_s + events[0].elapsed_time(event) * 1e-3 for event in events[1:]]

    def _weights(self) -> dict[str, Any]:
        """Weights and stored bytes of all modules, the language model's among them."""
        kinds = Counter(storage.weight_bytes_by_kind(self.added))
        total, active = accounting.params_total(self.added), self.added_active()
        more: dict[str, Any] = {}
        if self.model is not None:
            more = builders.model_facts(self.model)
            kinds += Counter(more["weight_bytes_by_kind"])
            total, active = total + more["params_total"], active + more["params_active"]
            more["nominal_bits"] = self.nominal_bits
        nbytes = sum(kinds.values())
        found = {"params_total": total, "params_active": active, "weight_bytes": nbytes, "weight_bytes_by_kind": dict(kinds)}
        return {**more, **found, "bits_per_weight": 8 * nbytes / total}

    def _cache(self) -> dict[str, Any]:
        params, cache = self.params, getattr(self.engine, "cache", None)
        cached = params.batch_size * (self.feature_tokens() + params.prompt_tokens + params.new_tokens - 1)
        return {
            "kv_cache_bytes": _decode.cache_bytes(cache) if cache is not None else None,
            "kv_cached_tokens": cached,
            "decode_engine": self.engine.name if self.engine is not None else "",
            "decode_engine_note": self.engine_note,
            "requested_new_tokens": params.new_tokens,
        }


def relative_error(found: torch.Tensor, true: torch.Tensor) -> float:
    """RMS of the difference over RMS of `true`, in float64; 0 where both are zero."""
    true = true.double()
    return float((found.double() - true).square().mean().sqrt() / true.square().mean().sqrt().clamp_min(1e-30))
