"""Drive optimum-benchmark from inside its own environment: orders as JSON lines on stdin, answers as JSON lines.

    .venv-peer/bin/python benchmarks/peers/optimum_driver.py MODEL_FOLDER

An order is {"mode": "process" | "inline" | "bare", "warmup_runs": n, "iterations": n, "duration_s": s}. `process` and
`inline` are its launchers with its PyTorch backend and text generation, latency only: its memory and energy passes are
left out, which is in its favour. `bare` is the reference for both: the same `generate` calls on the same inputs in a
plain loop, in this process, with nothing of the harness around them. Shapes: batch 2, 64 tokens in, 32 out.

One driver process takes many orders, so that the imports of the parent are paid once and are in no answer.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
import time
from typing import Any

BATCH, PROMPT, NEW = 2, 64, 32


def main() -> None:
    """Answer orders until stdin ends. The libraries print freely, so answers go to a copy of stdout of our own."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    folder = sys.argv[1]
    import optimum_benchmark  # noqa: F401  (paid before the first order)
    import torch
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads()}
    print(json.dumps({"ready": versions}), file=answers)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = _bare(folder, order) if order["mode"] == "bare" else _launch(folder, order)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(answer), file=answers)


def _config(folder: str, order: dict[str, Any]) -> Any:
    from optimum_benchmark import BenchmarkConfig, InferenceConfig, InlineConfig, ProcessConfig, PyTorchConfig

    scenario = InferenceConfig(
        memory=False,
        latency=True,
        energy=False,
        warmup_runs=order["warmup_runs"],
        iterations=order["iterations"],
        duration=order["duration_s"],
        input_shapes={"batch_size": BATCH, "sequence_length": PROMPT},
        generate_kwargs={"max_new_tokens": NEW, "min_new_tokens": NEW},
    )
    backend = PyTorchConfig(device="cpu", model=folder, library="transformers", task="text-generation", no_weights=False)
    launcher = ProcessConfig(start_method="spawn") if order["mode"] == "process" else InlineConfig()
    return BenchmarkConfig(name="tiny", scenario=scenario, backend=backend, launcher=launcher)


def _launch(folder: str, order: dict[str, Any]) -> dict[str, Any]:
    """One launch by the peer: its wall time, the parent's CPU time meanwhile, and what its report says."""
    from optimum_benchmark import Benchmark

    config = _config(folder, order)
    began_s, began_cpu_s = time.perf_counter(), _own_cpu_s()
    report = Benchmark.launch(config).to_dict()
    wall_s, cpu_s = time.perf_counter() - began_s, _own_cpu_s() - began_cpu_s
    for child in multiprocessing.active_children():
        child.join()  # it has sent its report and is ending: outside the wall time, and out of the next launch's way
    calls = {name: report[key]["latency"]["values"] for name, key in (("generate_s", "generate"), ("prefill_s", "prefill"))}
    return {"wall_s": wall_s, "parent_cpu_s": cpu_s, **calls}


def _bare(folder: str, order: dict[str, Any]) -> dict[str, Any]:
    """The peer's own calls in a plain loop: how long each took, and when its first token was there."""
    import torch
    from optimum_benchmark.generators.input_generator import InputGenerator
    from transformers import AutoModelForCausalLM, LogitsProcessorList

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    shapes = {"vocab_size": model.config.vocab_size, "type_vocab_size": 2, "max_position_embeddings": 2048}
    inputs = InputGenerator(
        task="text-generation",
        model_shapes=shapes,
        model_type="llama",
        input_shapes={"batch_size": BATCH, "sequence_length": PROMPT},
    )()
    stamps: list[float] = []

    def stamp(ids: Any, scores: Any) -> Any:
        stamps.append(time.perf_counter())
        return scores

    choices = {"do_sample": False, "use_cache": True, "num_beams": 1, "num_return_sequences": 1}
    choices |= {"max_new_tokens": NEW, "min_new_tokens": NEW, "logits_processor": LogitsProcessorList([stamp])}
    generate_s: list[float] = []
    prefill_s: list[float] = []
    with torch.inference_mode():
        for _ in range(2 + order["warmup_runs"]):
            model.generate(**inputs, **choices)
        while len(generate_s) < order["iterations"] or sum(generate_s) < order["duration_s"]:
            stamps.clear()
            began_s = time.perf_counter()
            model.generate(**inputs, **choices)
            generate_s.append(time.perf_counter() - began_s)
            prefill_s.append(stamps[0] - began_s)
    return {"generate_s": generate_s, "prefill_s": prefill_s}


def _own_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
