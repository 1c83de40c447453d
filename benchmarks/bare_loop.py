"""The reference for `truth`: the calls that `generate` times, in a plain loop with nothing of effbench around them.

    python -m benchmarks.bare_loop FOLDER '{"threads": 2, "batch": 2, "prompt": 64, "new": 32, ...}'

A fresh, quiet process: it loads the checkpoint, warms up, and then prefills and decodes greedily with the library's own
cache until the window is over. It prints one line of JSON: how long each call took and when its first token was there.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def main(folder: str, order: dict[str, Any]) -> dict[str, list[float]]:
    """Run the loop; times in s."""
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
    print(json.dumps(main(sys.argv[1], json.loads(sys.argv[2]))))
