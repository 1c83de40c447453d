"""The session behind `generate`: prompts of real text, one engine, a stamp per token."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from effbench.models import builders, checkpoints, text
from effbench.schema import Series
from effbench.workload import BuildContext, Session, Step
from effbench.workloads import _decode, _tasks, _words
from effbench.workloads._training import held_out, with_quality
from effbench.workloads.generate import NUM_PROMPTS


class GenerateSession(Session):
    """A model that answers one batch of requests per step."""

    def __init__(self, context: BuildContext, params: Any):
        spec = context.spec
        self.params, self.clock, self.spec = params, context.clock, spec
        self.device = torch.device(spec.device)
        built = builders.build(spec, trains=False, seed=context.seed, device=spec.device)
        self.model, self.nominal_bits = built.model, builders.nominal_bits(built.techniques)
        for technique in built.techniques:
            self.model = technique.finish(self.model)
        self.model.eval()
        self.source = text.text_of(spec)
        self.prompts = self._prompts(context.seed)
        self.engine, self.engine_note = self._engine()
        self.num_requests = 0
        self.token_s: list[float] = []
        self.figures: dict[str, Any] = {}
        self.decode_flops: int | None = None
        new_tokens = params.batch_size * params.new_tokens
        flops, moved = builders.generation_cost(self.model, params.batch_size, params.prompt_tokens, params.new_tokens)
        self.step_work = Step(tokens=new_tokens, samples=params.batch_size, model_flops=flops, model_bytes=moved)

    @torch.inference_mode()
    def check(self) -> None:
        """Decoding with the cache picks what a full forward over the same tokens would pick."""
        _decode.check_decode(self.model, self._engine()[0], self.prompts[0])

    @torch.inference_mode()
    def step(self) -> None:
        prompt_BP = self.prompts[self.num_requests % NUM_PROMPTS]
        if self.device.type == "cuda":
            self._step_cuda(prompt_BP)
        else:
            self.engine.generate(prompt_BP, self.params.new_tokens, lambda: self.token_s.append(self.clock()))
        self.num_requests += 1

    def _step_cuda(self, prompt_BP: torch.Tensor) -> None:
        """Tokens are stamped by events on the stream, so that nothing waits inside a request."""
        events = [torch.cuda.Event(enable_timing=True)]
        start_s = self.clock()
        events[0].record()

        def stamp() -> None:
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()

        self.engine.generate(prompt_BP, self.params.new_tokens, stamp)
        torch.cuda.synchronize()
        self.token_s.extend(start_s + events[0].elapsed_time(event) * 1e-3 for event in events[1:])

    def begin(self) -> None:
        self.token_s = []

    @torch.inference_mode()
    def quality(self) -> None:
        """Held-out loss and accuracy of the weights as they are served; random weights have none worth taking."""
        cached = self.params.prompt_tokens + self.params.new_tokens - 1
        self.decode_flops = _decode.counted_flops(self.model, self.prompts[0][:1], cached)
        params, ref, found = self.params, self.spec.model, dict[str, Any]()
        what = ""
        if ref.weights in ("path", "hub") and params.validation_tokens and checkpoints.holds_tokenizer(checkpoints.folder(ref)):
            found = _words.held_out(self.model, ref, self.source, num_bytes=params.validation_tokens)
            what = f"on {found['validation_tokens']} held-out tokens of its tokenizer"
        elif ref.weights != "random" and params.validation_tokens:
            found = held_out(self.model, self.source, "base", num_tokens=params.validation_tokens, batch_size=8, seq_len=128)
            what = f"on {found['validation_tokens']} held-out bytes"
        if params.tasks:
            found |= _tasks.evaluate(
                self.model, ref, params.tasks, limit=params.task_limit, folder=params.task_folder,
                batch_size=params.batch_size, chat=params.chat_template,
            )  # fmt: skip
            what = f"of {', '.join(params.tasks)} on {found['task_documents']} documents"
        self.figures = with_quality(found, what)

    def facts(self) -> dict[str, Any]:
        params = self.params
        cached = params.batch_size * (params.prompt_tokens + params.new_tokens - 1)
        return {
            **builders.model_facts(self.model),
            "params_trainable": 0,
            "nominal_bits": self.nominal_bits,
            "kv_cache_bytes": _decode.cache_bytes(self.engine.cache),
            "kv_cached_tokens": cached,
            "decode_engine": self.engine.name,
            "decode_engine_note": self.engine_note,
            "requested_new_tokens": params.new_tokens,
            "decode_flops": self.decode_flops,
            "expected": self._expected(cached // params.batch_size),
            "new_weights": builders.new_weights(self.spec),
            "quality": self.figures,
        }

    def _expected(self, positions: int) -> dict[str, float]:
        """Analytic cost of the last decode step, per sequence."""
        found = builders.expected_decode(self.model, positions, self.params.batch_size)
        return {**found, "decode_bytes": found["weight_read_bytes"] + found["cache_read_bytes"]}

    def series(self) -> list[Series]:
        times = np.asarray(self.token_s)
        source = "CUDA events" if self.device.type == "cuda" else "host clock"
        count = np.full(len(times), self.params.batch_size, dtype=float)  # tokens that were there at once
        return [Series(name="token", unit="tokens", scope="process", source=source, t_s=times, values=count)]

    def _prompts(self, seed: int) -> list[torch.Tensor]:
        """(B, P) each; the requests take one after the other."""
        params = self.params
        sample = self.source.batches("validation", batch_size=params.batch_size, seq_len=params.prompt_tokens, seed=seed)
        return [torch.from_numpy(next(sample)[:, :-1]).to(self.device) for _ in range(NUM_PROMPTS)]

    @torch.inference_mode()
    def _engine(self) -> tuple[Any, str]:
        return _decode.engine_of(self.model, self.params.decode_engine, self.prompts[0], self.params.new_tokens)
