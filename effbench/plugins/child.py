"""The fresh process of `plugin check`: limits, then every clause of the contract, a line of JSON on a pipe for each outcome.

    python -m effbench.plugins.child '{"channel": 5, "parent": 1234, "technique": "lora", "folder": null, …}'

First the technique alone is loaded, so that it shows whether it brings torch; then the heavy libraries; then the limit on memory
counts from there.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from effbench import registry
from effbench.errors import ContractError, EffbenchError
from effbench.executors.lifeline import die_with_parent, first_to_be_killed
from effbench.plugins import contract, source
from effbench.plugins.contract import NotAsked
from effbench.plugins.limits import Watch, limit_files, limit_memory
from effbench.plugins.on_technique import licence_of

MAX_REASON = 400  # characters
NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "bad_alloc")


def main() -> None:
    """Run the job that the one argument describes."""
    job = json.loads(sys.argv[1])
    die_with_parent(job["parent"])
    first_to_be_killed()
    with os.fdopen(job["channel"], "w", buffering=1, encoding="utf-8") as channel:
        Trial(job, channel).run()
        _tell(channel, {"done": True})


class Trial:
    """One technique under the limits of the job."""

    def __init__(self, job: dict[str, Any], channel: TextIO):
        self.job, self.channel = job, channel
        self.technique: str = job["technique"]
        self.watch = Watch(Path.cwd())

    def run(self) -> None:
        """Every clause; only the first where the technique cannot be loaded."""
        limit_files(self.job["file_bytes"])
        limit_memory(self.job["memory_bytes"])
        self.watch.begin()
        if not self._try("found", "", self._load):
            return
        _tell(self.channel, {"about": self._about()})
        limit_memory(None)
        self._prepare()
        limit_memory(self.job["memory_bytes"])
        for clause in contract.CLAUSES:
            for shape in self.job["shapes"] if clause.on_models else ("",):
                self._try(clause.name, shape, partial(clause.check, self.technique, shape))
        self._try("files", "", self._left_no_files)

    def _load(self) -> None:
        if self.job["folder"]:
            source.register(Path(self.job["folder"]))
        contract.loads_light([self.technique])

    def _prepare(self) -> None:
        """What costs seconds and memory once, and is not the plugin's: torch and the library's models."""
        import torch

        for shape in (*contract.SHAPES, contract.MIXTURE):
            family = shape.removeprefix("tiny-")
            importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        torch.set_num_threads(1)

    def _about(self) -> dict[str, str]:
        kind, entry = registry.technique(self.technique), registry.find("technique", self.technique)
        paper = f"{kind.paper.title} (arXiv {kind.paper.arxiv})" if kind.paper.arxiv else kind.paper.title
        licence = licence_of(entry.distribution)
        own = {"distribution": entry.distribution, "version": entry.version, "licence": licence, "identity": entry.identity}
        return {"axis": str(kind.axis), "paper": paper, **own}

    def _left_no_files(self) -> None:
        if self.watch.refused:
            places = ", ".join(dict.fromkeys(self.watch.refused[:3]))
            raise ContractError(f"it tried to write outside of its temporary folder: {places}")

    def _try(self, clause: str, shape: str, check: Callable[[], None]) -> bool:
        """Tell that a clause begins, and how it ended; whether it was kept. What it printed until then makes room."""
        with suppress(OSError, ValueError, AttributeError):  # a plugin may have closed or replaced it
            sys.stdout.flush()
            os.ftruncate(1, 0)
        _tell(self.channel, {"started": clause, "shape": shape})
        started_s = time.monotonic()
        status, reason = self._judged(check)
        took_s = round(time.monotonic() - started_s, 3)
        _tell(self.channel, {"clause": clause, "shape": shape, "status": status, "reason": reason, "took_s": took_s})
        return status == "kept"

    def _judged(self, check: Callable[[], None]) -> tuple[str, str]:
        try:
            check()
        except NotAsked as answer:
            return "not asked", _short(str(answer))
        except EffbenchError as error:
            cause = f" {self._explained(error.__cause__)}" if isinstance(error.__cause__, MemoryError) else ""
            return "broken", _short(f"{error}{cause}")
        except (Exception, SystemExit) as error:
            return "broken", _short(f"{type(error).__name__}: {self._explained(error)}{self._place(error)}")
        return "kept", ""

    def _explained(self, error: BaseException) -> str:
        text = str(error)
        if isinstance(error, MemoryError) or any(words in text for words in NO_MEMORY):
            return f"it asks for more memory than the {self.job['memory_bytes'] / 1e9:.1f} GB that the check allows"
        return text

    def _place(self, error: BaseException) -> str:
        """The last line of the technique's own file on the way to an error."""
        module = registry.find("technique", self.technique).target.partition(":")[0]
        own = getattr(sys.modules.get(module), "__file__", None)
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == own]
        return f" ({Path(own).name}, line {lines[-1]})" if own and lines else ""


def _tell(channel: TextIO, message: dict[str, Any]) -> None:
    channel.write(json.dumps(message) + "\n")


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_REASON else line[: MAX_REASON - 1] + "…"


if __name__ == "__main__":
    main()
