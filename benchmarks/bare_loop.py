"""The reference for `truth`, `launchers` and `harness`: what a workload times, in a plain loop with nothing of effbench around it.

    python -m benchmarks.bare_loop FOLDER '[{"work": "generate", "threads": 2, "batch": 2, "prompt": 64, "new": 32, ...}]'

A quiet process that has imported the libraries and waits. For each line on its standard input, the number of an order, it forks a
fresh process, as the executor does for a launch: that one loads the checkpoint, warms up, does its work until the window is over,
prints one line of JSON (how long each call took), and ends. Between two lines nothing runs, so that others may be measured then.

generate   prefill and greedy decoding with transformers' own cache; how long the call took, and when its first token was there
finetune   peft's LoRA on every linear layer: batch, forward, backward, clipping, AdamW; on the batches that the workload draws
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.common import ROOT
from effbench.protocol import protocol
from effbench.schema import Spec

CALLS = {"generate_s": "generate", "forward_s": "forward"}  # what is timed of `generate`: figure → call
TEXT = "text.npy"  # the bytes that `finetune` draws its batches from, beside the checkpoint

Call = Callable[[int], dict[str, float]]  # does the work once, the n-th time, and says how long its parts took, in s


class BareLoop:
    """That process, seen from outside: the work of specs under their protocol's rules. A context manager."""

    def __init__(self, checkpoint: Path, *specs: Spec, beside: int = 0):
        """`beside`: so many rounds of windows of the runner and of the bare loop in turn (benchmarks/beside.py)."""
        more = [{"spec": spec.to_json(), "rounds": beside} if beside else {} for spec in specs]
        orders = json.dumps([order_of(spec, checkpoint) | own for spec, own in zip(specs, more, strict=True)])
        command = [sys.executable, "-m", "benchmarks.bare_loop", str(checkpoint), orders]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Self:
        self._read()  # it has imported
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._process.communicate()  # ends its input, on which it ends

    def medians(self, number: int = 0) -> dict[str, float | None]:
        """Medians over one window of a fresh process, in s, of the spec of this number. Raises RuntimeError when it has failed."""
        assert self._process.stdin is not None
        print(number, file=self._process.stdin, flush=True)
        times = self._read()
        return {key: statistics.median(values) for key, values in times.items()}

    def _read(self) -> dict[str, list[float]]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the bare loop ended with exit code {self._process.wait()}; its error is above")
        found: dict[str, list[float]] = json.loads(line)
        return found


def order_of(spec: Spec, checkpoint: Path) -> dict[str, Any]:
    """What a plain loop must know to do the steps of `spec` under its protocol's rules, JSON only."""
    rules = protocol(spec.protocol)
    return {
        "work": spec.workload,
        "threads": spec.threads,
        **(_generate_order(spec) if spec.workload == "generate" else _finetune_order(spec, checkpoint)),
        "warm_up_s": rules.warm_up_s,
        "warm_up_calls": rules.warm_up_steps,
        "window_s": rules.window_s,
        "window_calls": rules.window_steps,
    }


def _generate_order(spec: Spec) -> dict[str, Any]:
    params = spec.params
    return {"batch": params["batch_size"], "prompt": params["prompt_tokens"], "new": params["new_tokens"]}


def _finetune_order(spec: Spec, checkpoint: Path) -> dict[str, Any]:
    """What a plain loop needs to do the same steps; the text goes into a file, so that it draws its batches itself."""
    import numpy as np

    from effbench.models.text import text_of

    np.save(checkpoint / TEXT, text_of(spec).split("train", "adapt"))
    lora = next(dict(ref.params) for ref in spec.techniques if ref.name == "lora")
    keys = {"batch": "batch_size", "tokens": "seq_len", "learning_rate": "learning_rate", "weight_decay": "weight_decay"}
    return {"seed": spec.seed, "lora": lora, **{ours: spec.params[key] for ours, key in keys.items()}}


def main(folder: str, orders: list[dict[str, Any]]) -> None:
    """Import, say so, and answer each line by a process of its own."""
    import transformers.models.llama.modeling_llama  # noqa: F401  (what a child needs; no thread is started by it)
    from transformers.utils import logging

    if any(order["work"] == "finetune" for order in orders):
        import peft  # noqa: F401  (likewise)
    logging.disable_progress_bar()
    print("{}", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            print(json.dumps(_measure(folder, orders[int(line)])), flush=True)
            os._exit(0)
        os.waitpid(child, 0)


def _measure(folder: str, order: dict[str, Any]) -> dict[str, list[float]]:
    """Load, warm up, and time the calls of one window, in s."""
    import torch

    make = generating if order["work"] == "generate" else finetuning
    if "spec" in order:
        from benchmarks import beside

        return beside.measure(partial(make, folder, order), order, seed=os.getpid())
    torch.set_num_threads(order["threads"])
    call = make(folder, order)

    def window(least_s: float, least_calls: int) -> list[dict[str, float]]:
        found: list[dict[str, float]] = []
        over_s = time.perf_counter() + least_s
        while len(found) < least_calls or time.perf_counter() < over_s:
            found.append(call(len(found)))
        return found

    window(order["warm_up_s"], order["warm_up_calls"])
    times = window(order["window_s"], order["window_calls"])
    return {key: [each[key] for each in times] for key in times[0]}


def generating(folder: str, order: dict[str, Any]) -> Call:
    """One call is one batch of requests, prefilled and decoded greedily."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(1)
    prompts = [torch.randint(0, 256, (order["batch"], order["prompt"])) for _ in range(8)]

    @torch.inference_mode()
    def call(index: int) -> dict[str, float]:
        prompt, began_s = prompts[index % len(prompts)], time.perf_counter()
        out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        first_s = time.perf_counter()
        tokens = [token]
        for _ in range(order["new"] - 1):
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            tokens.append(token)
        torch.cat(tokens, dim=1)
        return {"generate_s": time.perf_counter() - began_s, "forward_s": first_s - began_s}

    return call


def finetuning(folder: str, order: dict[str, Any], losses: list[float] | None = None) -> Call:
    """One call is one step of training; `losses`, where given, gets the loss of each, which is that of the workload's step."""
    import numpy as np
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM

    losses = [] if losses is None else losses
    torch.manual_seed(order["seed"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **order["lora"])).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=order["learning_rate"], betas=(0.9, 0.95), weight_decay=order["weight_decay"])
    data, random = np.load(Path(folder) / TEXT), np.random.default_rng(order["seed"])
    window = np.arange(order["tokens"] + 1)

    def batch() -> torch.Tensor:
        starts = random.integers(0, len(data) - order["tokens"], size=order["batch"])
        return torch.from_numpy(data[starts[:, None] + window].astype(np.int64))

    batch()  # the workload's gate takes the first

    def call(index: int) -> dict[str, float]:
        began_s = time.perf_counter()
        ids = batch()
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        return {"step_s": time.perf_counter() - began_s}

    return call


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
