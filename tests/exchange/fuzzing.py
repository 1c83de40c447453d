"""Hostile bundles read in processes of their own, since an input can end the process that reads it.

    through(command, count) ──▶ command(inputs left, seed) ──(a library aborts on an input)──▶ what `verify` says of that input
                                     └ a Journal: the input at work, and outcomes so far         and another process for the rest

pyarrow ends its process on some footers (an exception in C++ that nobody catches). To the verifier, which reads in a process of
its own, that is an outcome like any other: the bundle is refused. Any other end of the reading process is a fault.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from effbench.exchange.verify import verify

ABORTED = "aborted"
ROOT = Path(__file__).parents[2]
_HEAD_BYTES = 1024  # for the outcomes, before the input


class Journal:
    """A file that outlives the process: the outcomes so far, then the input that is being read."""

    def __init__(self, path: Path | str) -> None:
        self.descriptor, self.outcomes, self.size = os.open(path, os.O_RDWR | os.O_CREAT, 0o600), Counter[str](), 0

    def begins(self, data: bytes) -> None:
        """Note this input before it is read."""
        self.size = len(data)
        os.pwrite(self.descriptor, data, _HEAD_BYTES)
        self._write_head()

    def ended(self, outcome: str) -> None:
        """Note how the last input came out."""
        self.outcomes[outcome] += 1
        self._write_head()

    def _write_head(self) -> None:
        os.pwrite(self.descriptor, json.dumps([self.outcomes, self.size]).encode().ljust(_HEAD_BYTES), 0)


def read_journal(path: Path) -> tuple[Counter[str], bytes]:
    """The outcomes so far, and the last input."""
    written = path.read_bytes()
    outcomes, size = json.loads(written[:_HEAD_BYTES])
    return Counter(outcomes), written[_HEAD_BYTES : _HEAD_BYTES + size]


def through(command: Callable[[int, int, Path], Sequence[str]], count: int, folder: Path) -> Counter[str]:
    """Have `command` (inputs left, seed, journal) read at least `count` inputs; how often each outcome was seen.

    An input that aborts its process must be one that `verify` rejects; any other end but a good one is an AssertionError.
    """
    total, seed = Counter[str](), 1
    journal, bundle = folder / "journal", folder / "aborts.zip"
    while total.total() < count:
        journal.unlink(missing_ok=True)
        done = subprocess.run(
            command(count - total.total(), seed, journal), cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert journal.exists(), done.stderr[-2000:]
        outcomes, last = read_journal(journal)
        if done.returncode == -signal.SIGABRT:
            bundle.write_bytes(last)
            report = verify(bundle)
            assert report.verdict == "rejected", report
            outcomes[ABORTED] += 1
        else:
            assert done.returncode == 0, f"exit {done.returncode} on the input in {journal}: {done.stderr[-2000:]}"
        assert outcomes.total(), "no input was read"
        total, seed = total + outcomes, seed + 1
    return total


def drawn(good: Path) -> Callable[[int, int, Path], Sequence[str]]:
    """The command that draws mutations of the bundle in `good` at random."""
    return lambda left, seed, journal: [sys.executable, "-m", __name__, str(left), str(seed), str(journal), str(good)]


def main(count: int, number: int, journal: Path, good: Path) -> None:
    """Read `count` mutations of the bundle in the file `good`."""
    from hypothesis import given, seed, settings

    from tests.exchange.bundles import members_of
    from tests.exchange.test_fuzz import QUIET, hostile, outcome

    data, kept = good.read_bytes(), Journal(journal)

    @seed(number)
    @settings(max_examples=count, **QUIET)  # type: ignore[arg-type]
    @given(data=hostile(data, members_of(data)))
    def one(data: bytes) -> None:
        kept.begins(data)
        kept.ended(outcome(data))

    one()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
