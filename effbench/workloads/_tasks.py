"""Quality of a checkpoint by the tasks of EleutherAI's lm-evaluation-harness, on the model as the techniques built it.

The library's own Python API runs them: its tasks, prompts, metrics and standard errors. Torch-free until `evaluate`, so that a plan
can refuse what cannot run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effbench.errors import LaunchError
from effbench.models import checkpoints
from effbench.schema import ModelRef

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ACCURACY = ("acc_norm", "acc", "exact_match")  # a task's figure: the first that it has
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")


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
    if model.weights == "path":
        folder = checkpoints.folder(model)
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            return f"generate: tasks need a tokenizer and {folder} holds none of {', '.join(TOKENIZER_FILES)}"
    return None


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
    """Accuracy and standard error of each task, their mean as `task_accuracy`, and the number of documents.

    `folder` holds task files of the user's own. Raises LaunchError for a task that is not known or gives no accuracy.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    manager = TaskManager(include_path=folder)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise LaunchError("unknown_task", f"lm-evaluation-harness knows no task {', '.join(unknown)}")
    tokenizer = AutoTokenizer.from_pretrained(checkpoints.folder(ref))
    length = int(model.config.max_position_embeddings)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=length)
    found = simple_evaluate(
        wrapped,
        tasks=list(tasks),
        limit=limit,
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=False,
        apply_chat_template=chat,
    )
    return _figures(found, tasks)


def _figures(found: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """The harness's results in our words; the accuracy of a task is the first of `ACCURACY` that it has."""
    per_task: dict[str, dict[str, Any]] = {}
    for name in tasks:
        results = {key.partition(",")[0]: value for key, value in found["results"][name].items()}
        figure = next((key for key in ACCURACY if key in results), None)
        if figure is None:
            raise LaunchError("task_without_accuracy", f"the task {name} gives none of {', '.join(ACCURACY)}")
        error = results.get(f"{figure}_stderr")
        samples = found.get("n-samples", {}).get(name, {})
        per_task[name] = {
            "figure": figure,
            "accuracy": float(results[figure]),
            "standard_error": error if isinstance(error, float) else None,
            "documents": samples.get("effective"),
        }
    accuracies = [task["accuracy"] for task in per_task.values()]
    return {"task_accuracy": sum(accuracies) / len(accuracies), "tasks": per_task}


def folder_of(given: str | None) -> str | None:
    """The folder of the user's own tasks, in full."""
    return None if given is None else str(Path(given).expanduser().resolve())
