"""Quality of a checkpoint by the tasks of EleutherAI's lm-evaluation-harness, on the model as the techniques built it.

The library's own Python API runs them: its tasks, prompts, metrics and standard errors. Torch-free until `evaluate`, so that a plan
can refuse what cannot run. The library is imported after the window, so that it stands in no figure of time or memory.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effbench.errors import MetricError, ModelError, did_you_mean
from effbench.models import checkpoints
from effbench.schema import ModelRef, digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ACCURACY = ("acc_norm", "acc", "exact_match", "prompt_level_strict_acc")  # a task's figure: the first that it has
BOOTSTRAP = 100  # resamples for the standard error of a figure that is no mean; a mean's has a formula


def refusal(tasks: Sequence[str], model: ModelRef) -> str | None:
    """Why these tasks cannot be run on this model, as a sentence; None when they can or when there are none."""
    if not tasks:
        return None
    if model.weights not in ("path", "hub"):
        return (
            f"generate: tasks are asked in words and {model.weights} weights of {model.name} know bytes and no tokenizer; use a "
            "checkpoint by path or hub, or leave tasks out for held-out text"
        )
    if find_spec("lm_eval") is None:
        return "generate: tasks need lm-eval, which is not installed; try: pip install 'effbench[eval]'"
    if not checkpoints.has_tokenizer(model):
        return (
            f"generate: tasks need a tokenizer and {model.location} holds none of {', '.join(checkpoints.TOKENIZER_FILES)}; save "
            "the tokenizer there with save_pretrained"
        )
    return None


def folder_digest(folder: str) -> str:
    """SHA-256 over every file of a folder of tasks, by name. Raises ValueError where there is no such folder."""
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise ValueError(f"there is no folder {root} of task files")
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return digest({path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files})


def evaluate(
    model: PreTrainedModel,
    ref: ModelRef,
    tasks: Sequence[str],
    *,
    limit: int | None,
    folder: str | None,
    batch_size: int,
    chat: bool,
) -> dict[str, Any]:
    """`tasks`: accuracy, standard error and documents of each; `task_accuracy`: their mean; `task_documents`: all documents.

    A name may be a group or a tag: its accuracy is that over all documents of its tasks. `folder` holds task files of the user's
    own. Raises ModelError for a task that is not known, MetricError for one that gives no accuracy.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    manager = _manager(None if folder is None else str(Path(folder).expanduser().resolve()))
    unknown = next((name for name in tasks if name not in manager.all_tasks), None)
    if unknown:
        raise ModelError(f"lm-evaluation-harness knows no task {unknown!r}.{did_you_mean(unknown, manager.all_tasks)}")
    tokenizer = AutoTokenizer.from_pretrained(checkpoints.folder(ref))
    length = getattr(model.config, "max_position_embeddings", None)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=length)
    found = {
        name: _figures(
            name,
            simple_evaluate(
                wrapped,
                tasks=[name],
                limit=limit,
                task_manager=manager,
                bootstrap_iters=BOOTSTRAP,
                log_samples=False,
                apply_chat_template=chat,
            ),
        )
        for name in tasks
    }
    mean = sum(task["accuracy"] for task in found.values()) / len(found)
    documents = sum(task["documents"] for task in found.values())
    return {"task_accuracy": mean, "task_documents": documents, "tasks": found}


@cache
def _manager(folder: str | None) -> Any:
    """The harness's index of tasks, which it takes seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder)


def _figures(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """One task, or all tasks of a group or tag, weighted by their documents (the standard errors of tasks are independent)."""
    parts = [_leaf(leaf, found["results"][leaf]) for leaf in found["n-samples"]]
    sizes = [int(found["n-samples"][leaf]["effective"]) for leaf in found["n-samples"]]
    shares = [size / sum(sizes) for size in sizes]
    errors = [error for _, _, error in parts if error is not None]
    return {
        "figure": " · ".join(sorted({figure for figure, _, _ in parts})),
        "accuracy": sum(share * accuracy for share, (_, accuracy, _) in zip(shares, parts, strict=True)),
        "standard_error": math.hypot(*(s * e for s, e in zip(shares, errors, strict=True)))
        if len(errors) == len(parts)
        else None,
        "documents": sum(sizes),
        "shots": sorted({found["n-shot"][leaf] for leaf in found["n-samples"]}),
        "versions": sorted({str(found["versions"][leaf]) for leaf in found["n-samples"]}),
    }


def _leaf(name: str, results: Mapping[str, Any]) -> tuple[str, float, float | None]:
    """(figure, accuracy, its standard error) of a task. Of several filters the first counts, as in the harness's own tables."""
    keys = [key for wanted in ACCURACY for key in results if key.partition(",")[0] == wanted]
    if not keys:
        there = sorted({key.partition(",")[0] for key, value in results.items() if isinstance(value, float)})
        raise MetricError(
            f"the task {name} gives {', '.join(there) or 'nothing'} and no accuracy; one of {', '.join(ACCURACY)} is needed"
        )
    figure, _, way = keys[0].partition(",")
    error = results.get(f"{figure}_stderr,{way}")
    return figure, float(results[keys[0]]), float(error) if isinstance(error, float) else None
