"""Routing recorded from models trained here (E = 64, k = 8): router logits of every mixture layer over real text.

    balanced   tiny-llama with the technique `moe` (64 experts, 8 a token), trained with its load-balance loss, as real models are
    free       tiny-olmoe-64, transformers' OLMoE, trained without that loss: loads are uneven, and experts that few tokens use exist

Calibration logits come from windows of the training text, held-out ones from windows of files that no training saw.
The logits are kept in $EFFBENCH_CACHE/recorded/DIGEST.safetensors. What makes them, a training of about 20 s included, runs in a
process of its own, so that the caller's threads, memory and random numbers are left alone:

    python -m effbench.workloads._recorded balanced 8192 8192 0

Shapes: T tokens, E experts, D hidden size, B sequences.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from effbench import registry
from effbench.errors import EffbenchError, ModelError, UnknownName
from effbench.models import weights
from effbench.models.context import architecture, stack
from effbench.models.shapes import shape
from effbench.models.text import BUILTIN, Part, Text, text_digest, text_of
from effbench.models.training import trained_digest, trained_folder
from effbench.schema import ModelRef, Spec, TechniqueRef, digest
from effbench.suite import filled

if TYPE_CHECKING:
    import torch
    from torch import nn

SOURCES: Mapping[str, tuple[str, Mapping[str, Any] | None]] = {  # the model, and the parameters of `moe` on it
    "balanced": ("tiny-llama", {"experts": 64, "top_k": 8}),
    "free": ("tiny-olmoe-64", None),
}
BATCH_SIZE, SEQ_LEN = 16, 128


@dataclass(frozen=True, kw_only=True, eq=False)
class Recorded:
    """Router logits (T, E) in float32, one tensor a mixture layer, and how this model's router makes a routing of them."""

    calibration: tuple[torch.Tensor, ...]
    held_out: tuple[torch.Tensor, ...]
    top_k: int
    score: str
    renorm: bool


def recorded(
    source: str = "balanced", *, calibration_tokens: int = 8192, held_out_tokens: int = 8192, seed: int = 0
) -> Recorded:
    """The logits of one of `SOURCES`; the windows of text are drawn from the seed. Made on first use, then read.

    Raises UnknownName for another source, ModelError for no tokens and where the model cannot be trained or the logits not be kept.
    """
    spec = spec_of(source)
    asked = (source, calibration_tokens, held_out_tokens, seed)
    file = _file(spec, *asked)
    if not file.is_file():
        done = subprocess.run(
            [sys.executable, "-m", "effbench.workloads._recorded", *map(str, asked)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ModelError(f"Routing could not be recorded from {spec.model.name}: {last}")
    from safetensors.torch import load_file

    found = load_file(file)
    parts = [
        tuple(found[key] for key in sorted(found, key=lambda key: int(key.rpartition(".")[2])) if key.startswith(f"{part}."))
        for part in ("calibration", "held_out")
    ]
    return Recorded(calibration=parts[0], held_out=parts[1], **_router(spec))


def spec_of(source: str) -> Spec:
    """The spec of a source: model, technique, precision and text. Raises UnknownName."""
    if source not in SOURCES:
        raise UnknownName("recorded routing", source, tuple(SOURCES))
    model, params = SOURCES[source]
    refs = [] if params is None else [_ref("moe", params)]
    return Spec(
        workload="generate", params=registry.workload("generate").Params().model_dump(mode="json"),
        model=ModelRef(name=model, weights="trained"), techniques=(*refs, _ref("fp32", {})), text=BUILTIN,
        text_digest=text_digest(BUILTIN), seed=0, device="cpu", threads=1, protocol="quick", time_limit_s=600.0,
    )  # fmt: skip


def record(model: nn.Module, text: Text, part: Part, *, num_tokens: int, seed: int) -> tuple[torch.Tensor, ...]:
    """(T, E) float32 router logits of every mixture layer of `model` over T = `num_tokens` tokens of one part of the text.

    Known are the routers of transformers' OLMoE and those of the technique `moe`. Raises ModelError for no token and no router.
    """
    import torch

    if num_tokens < 1:
        raise ModelError(f"Routing is recorded over at least one token, not {num_tokens}.")
    routers = list(_routers(model))
    if not routers:
        raise ModelError(f"{type(model).__name__} has no router that routing can be recorded from.")
    with _watched(routers) as seen, torch.inference_mode():
        batches = text.batches(part, batch_size=BATCH_SIZE, seq_len=SEQ_LEN, seed=seed)
        for _ in range(-(-num_tokens // (BATCH_SIZE * SEQ_LEN))):
            model(input_ids=torch.from_numpy(next(batches)[:, :-1]), use_cache=False)
    return tuple(torch.cat(logits)[:num_tokens].clone() for logits in seen)


def _ref(name: str, params: Mapping[str, Any]) -> TechniqueRef:
    identity = registry.find("technique", name).identity
    return TechniqueRef(name=name, axis=registry.technique(name).axis, params=filled(name, params), identity=identity)


def _routers(model: nn.Module) -> Iterator[nn.Module]:
    from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter

    from effbench.modules.moe import MoEFeedForward

    for module in model.modules():
        if isinstance(module, OlmoeTopKRouter):
            yield module
        elif isinstance(module, MoEFeedForward):
            yield module.router


@contextmanager
def _watched(routers: list[nn.Module]) -> Iterator[list[list[torch.Tensor]]]:
    """What each router gives while the context lasts; OLMoE's gives its logits first."""
    seen: list[list[torch.Tensor]] = [[] for _ in routers]

    def keep(into: list[torch.Tensor]) -> Any:
        return lambda module, inputs, output: into.append((output[0] if isinstance(output, tuple) else output).float())

    handles = [router.register_forward_hook(keep(into)) for router, into in zip(routers, seen, strict=True)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _router(spec: Spec) -> dict[str, Any]:
    """k, score and renormalisation of a source's routers."""
    moe = next((ref.params for ref in spec.techniques if ref.name == "moe"), None)
    if moe is not None:
        return {"top_k": moe["top_k"], "score": moe["score"], "renorm": moe["renorm"]}
    values = shape(spec.model.name).config
    return {"top_k": values["num_experts_per_tok"], "score": "softmax", "renorm": values["norm_topk_prob"]}


def _file(spec: Spec, source: str, calibration_tokens: int, held_out_tokens: int, seed: int) -> Path:
    asked = {"weights": trained_digest(spec), "tokens": [calibration_tokens, held_out_tokens], "seed": seed}
    name = digest({**asked, "windows": [BATCH_SIZE, SEQ_LEN]})
    return trained_folder(spec).parent.parent / "recorded" / f"{name}.safetensors"


def _make(source: str, calibration_tokens: int, held_out_tokens: int, seed: int) -> None:
    """Train unless that is done, record, and keep; the file is whole or absent."""
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)  # as in training: the same logits on any number of cores
    spec = spec_of(source)
    weights.prepare(spec)
    techniques, config = architecture(stack(spec)), weights.configuration(spec.model)
    for technique in techniques:
        technique.configure(config)
    config.dtype = "float32"
    model, text = weights.load(spec, config, "cpu", techniques).eval(), text_of(spec)
    asked: tuple[tuple[str, Part, int], ...] = (
        ("calibration", "train", calibration_tokens),
        ("held_out", "validation", held_out_tokens),
    )
    found = {
        f"{name}.{layer}": logits
        for name, part, tokens in asked
        for layer, logits in enumerate(record(model, text, part, num_tokens=tokens, seed=seed))
    }
    target = _file(spec, source, calibration_tokens, held_out_tokens, seed)
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent) as folder:
        save_file(found, Path(folder) / "logits.safetensors")
        (Path(folder) / "logits.safetensors").rename(target)


if __name__ == "__main__":
    try:
        _make(sys.argv[1], *map(int, sys.argv[2:5]))
    except (EffbenchError, OSError) as error:
        sys.exit(str(error))
