"""The recipe behind `trained` weights: a small shape trained once on the base domain of real text, and kept.

Weights lie in $EFFBENCH_CACHE/trained/DIGEST (default ~/.cache/effbench), whole or absent: written beside it, then renamed.
The digest is of shape, architecture techniques, recipe and text; it is found without torch, so that a plan can name it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import TYPE_CHECKING

from effbench import modules, registry
from effbench.errors import ModelError
from effbench.models.context import architecture, stack
from effbench.models.shapes import shape
from effbench.models.text import Text, text_digest, text_of
from effbench.schema import Spec, digest
from effbench.technique import Technique

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedModel

MAX_PARAMETERS = 20_000_000


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How `trained` weights are made: AdamW in fp32, linear warm-up, linear decay, no dropout.

    On one core of a 2-core x86 machine: 9 s and 3.0 to 3.1 held-out bits per byte for the tiny shapes, 65 s and 2.9 for
    small-llama; single bytes by their frequency need 4.5.
    """

    steps: int = 200
    batch_size: int = 4
    seq_len: int = 128
    learning_rate: float = 4e-3
    final_share: float = 0.05  # of the learning rate, at the last step
    warm_up_steps: int = 20
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    seed: int = 0
    validation_tokens: int = 16384

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        decay = 1 - (1 - self.final_share) * step / max(1, self.steps - 1)
        return self.learning_rate * min(1.0, (step + 1) / self.warm_up_steps) * decay


RECIPE = Recipe()


def trained_digest(spec: Spec, recipe: Recipe = RECIPE) -> str:
    """Identity of trained weights: the shape as its architecture techniques configure it, recipe and text."""
    known = shape(spec.model.name)
    if known.num_parameters > MAX_PARAMETERS:
        raise ModelError(
            f"{known.name} has {known.num_parameters:,} parameters; weights are trained here up to {MAX_PARAMETERS:,}, "
            "since training takes time on every machine. Use random weights, or a checkpoint by path or hub."
        )
    values = SimpleNamespace(**known.config)
    changes = []
    for technique in architecture(stack(spec)):
        technique.configure(values)
        if type(technique).apply is not Technique.apply or type(technique).load is not Technique.load:
            identity = registry.find("technique", technique.name).identity
            params = technique.params.model_dump(mode="json")
            changes.append({"identity": identity, "params": params, "modules": _modules_digest()})
    shape_values = {"model_type": known.model_type, "config": vars(values), "techniques": changes}
    text = spec.text_digest or text_digest(spec.text)
    return digest({"shape": shape_values, "recipe": asdict(recipe), "text": text})


@cache
def _modules_digest() -> str:
    """Digest of the modules that techniques put into models: another formula would train other weights."""
    folder = Path(modules.__file__).parent
    return digest({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.py"))})


def trained_folder(spec: Spec, recipe: Recipe = RECIPE) -> Path:
    """Where the trained weights of a spec lie, or will."""
    root = Path(os.environ.get("EFFBENCH_CACHE") or Path.home() / ".cache" / "effbench")
    return root / "trained" / trained_digest(spec, recipe)


def train_once(spec: Spec, make: Callable[[], PreTrainedModel], recipe: Recipe = RECIPE) -> None:
    """Train the model that `make` builds unless its weights are there; two processes never train the same weights twice."""
    target = trained_folder(spec, recipe)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_suffix(".lock")):
            if not target.exists():
                _train_into(target, spec, make, recipe)
    except OSError as error:
        raise ModelError(
            f"Trained weights cannot be kept in {target.parent}: {error.strerror}. Set EFFBENCH_CACHE to a folder with room."
        ) from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """An exclusive lock among processes, gone with the process that holds it."""
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _train_into(target: Path, spec: Spec, make: Callable[[], PreTrainedModel], recipe: Recipe) -> None:
    import torch
    from safetensors.torch import save_model

    started, text = time.perf_counter(), text_of(spec)
    # The same weights on any number of cores; and at this size a second thread saves 30 % on idle cores but costs ten
    # times the time when another process has one of two cores (measured, 2026-11).
    torch.set_num_threads(1)
    torch.manual_seed(recipe.seed)
    model = _train(make(), text, recipe)
    facts = {"seconds": time.perf_counter() - started, "bits_per_byte": _bits_per_byte(model, text, recipe)}
    for left_over in target.parent.glob(f"training-{target.name}-*"):  # of a training that was killed: the lock is ours
        shutil.rmtree(left_over, ignore_errors=True)
    temporary = Path(mkdtemp(prefix=f"training-{target.name}-", dir=target.parent))
    try:
        model.config.save_pretrained(temporary)
        save_model(model, str(temporary / "model.safetensors"), metadata={"format": "pt"})
        record = {"recipe": asdict(recipe), "model": spec.model.name, **facts}
        (temporary / "recipe.json").write_text(json.dumps(record, indent=1))
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _train(model: PreTrainedModel, text: Text, recipe: Recipe) -> PreTrainedModel:
    import torch
    from torch.nn.functional import cross_entropy

    from effbench.modules.losses import auxiliary_loss, modules_with_losses

    model.train()
    with_losses = modules_with_losses(model)
    optimizer = torch.optim.AdamW(model.parameters(), betas=recipe.betas, weight_decay=recipe.weight_decay)
    batches = text.batches("train", batch_size=recipe.batch_size, seq_len=recipe.seq_len, seed=recipe.seed)
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        ids_BT = _on_device(next(batches), model)
        logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
        optimizer.zero_grad(set_to_none=True)
        loss = cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten())
        (loss + auxiliary_loss(with_losses)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
    return model.eval()


def _bits_per_byte(model: PreTrainedModel, text: Text, recipe: Recipe) -> float:
    """Bits per byte on the held-out part of the base domain."""
    import torch
    from torch.nn.functional import cross_entropy

    nats, count = 0.0, 0
    with torch.inference_mode():
        for ids in text.validation(batch_size=16, seq_len=recipe.seq_len, num_tokens=recipe.validation_tokens):
            ids_BT = _on_device(ids, model)
            logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
            nats += float(cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="sum"))
            count += ids_BT[:, 1:].numel()
    return nats / count / math.log(2)


def _on_device(ids_BT: np.ndarray, model: PreTrainedModel) -> torch.Tensor:
    import torch

    return torch.from_numpy(ids_BT).to(next(model.parameters()).device)
