"""The reference for `truth` and `launchers`: the calls that `generate` times, in a plain loop with nothing of effbench around them.

    python -m benchmarks.bare_loop FOLDER '{"threads": 2, "batch": 2, "prompt": 64, "new": 32, ...}'

A quiet process that has imported the library and waits. For each line on its standard input it forks a fresh process, as the
executor does for a launch: that one loads the checkpoint, warms up, prefills and decodes greedily with the library's own
cache until the window is over, prints one line of JSON (how long each call took and when its first token was there), and
ends. Between two lines nothing runs, so that others may be measured then.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.common import ROOT
from effbench.protocol import protocol
from effbench.schema import Spec

CALLS = {"generate_s": "generate", "forward_s": "forward"}  # what is timed: figure → call


class BareLoop:
    """That process, seen from outside: the calls of a `generate` spec under its protocol's rules. A context manager."""

    def __init__(self, checkpoint: Path, spec: Spec):
        rules, params = protocol(spec.protocol), spec.params
        order = {
            "threads": spec.threads,
            "batch": params["batch_size"],
            "prompt": params["prompt_tokens"],
            "new": params["new_tokens"],
            "warm_up_s": rules.warm_up_s,
            "warm_up_calls": rules.warm_up_steps,
            "window_s": rules.window_s,
            "window_calls": rules.window_steps,
        }
        command = [sys.executable, "-m", "benchmarks.bare_loop", str(checkpoint), json.dumps(order)]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Self:
        self._read()  # it has imported
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._process.communicate()  # ends its input, on which it ends

    def medians(self) -> dict[str, float | None]:
        """Medians over one window of a fresh process, in s. Raises RuntimeError when the process has failed."""
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)
        times = self._read()
        return {key: statistics.median(times[key]) for key in CALLS}

    def _read(self) -> dict[str, list[float]]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the bare loop ended with exit code {self._process.wait()}; its error is above")
        found: dict[str, list[float]] = json.loads(line)
        return found


def main(folder: str, order: dict[str, Any]) -> None:
    """Import, say so, and answer each line by a process of its own."""
    import transformers.models.llama.modeling_llama  # noqa: F401  (what a child needs; no thread is started by it)
    from transformers.utils import logging

    logging.disable_progress_bar()
    print("{}", flush=True)
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            print(json.dumps(_measure(folder, order)), flush=True)
            os._exit(0)
        os.waitpid(child, 0)


def _measure(folder: str, order: dict[str, Any]) -> dict[str, list[float]]:
    """Load, warm up, and time the calls of one window, in s."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(order["threads"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(1)
    prompts = [torch.randint(0, 256, (order["batch"], order["prompt"])) for _ in range(8)]

    def generate(prompt: torch.Tensor) -> float:
        out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        first_s = time.perf_counter()
        tokens = [token]
        for _ in range(order["new"] - 1):
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            tokens.append(token)
        torch.cat(tokens, dim=1)
        return first_s

    def window(least_s: float, least_calls: int) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {"generate_s": [], "forward_s": []}
        over_s = time.perf_counter() + least_s
        while len(found["generate_s"]) < least_calls or time.perf_counter() < over_s:
            began_s = time.perf_counter()
            first_s = generate(prompts[len(found["generate_s"]) % len(prompts)])
            found["generate_s"].append(time.perf_counter() - began_s)
            found["forward_s"].append(first_s - began_s)
        return found

    with torch.inference_mode():
        window(order["warm_up_s"], order["warm_up_calls"])
        return window(order["window_s"], order["window_calls"])


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
