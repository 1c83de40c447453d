"""The mutations of `test_fuzz`, chosen by what they reach (atheris): `python -m tests.exchange.guided -runs=100000`.

`make fuzz` installs atheris where it has a wheel and runs this. It ends with the first input that is neither read nor refused,
and says which file holds it; an input that aborts its process is shown to the verifier (see `fuzzing`).
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from tests.exchange.bundles import make_good, members_of
from tests.exchange.fuzzing import Journal, through
from tests.records import make_metrics

LONGEST_BYTES = 8192  # of the choices that make one mutation
RUNS = "-runs="


def main() -> None:
    """Read as many inputs as asked, in processes of their own."""
    count = next(int(word.removeprefix(RUNS)) for word in sys.argv if word.startswith(RUNS))
    folder = Path(tempfile.mkdtemp(prefix="effbench-fuzz-"))
    (folder / "good.zip").write_bytes(make_good(folder / "rows", blocks=1, steps=8, metrics=make_metrics()[:6]))
    (folder / "corpus").mkdir()
    for number in range(20):
        (folder / "corpus" / str(number)).write_bytes(os.urandom(1024))

    def command(left: int, seed: int, journal: Path) -> list[str]:
        return [sys.executable, "-m", __spec__.name, "inside", str(folder), str(journal), f"{RUNS}{left}", f"-seed={seed}"]

    seen = through(command, count, folder)
    outcomes = ", ".join(f"{number:,} {name or 'read'}" for name, number in seen.most_common())
    print(f"{seen.total():,} inputs: {outcomes}")


def inside(folder: Path, journal: Path, options: list[str]) -> None:
    """One process: what is read, and what reads it."""
    import atheris
    from hypothesis import given, settings

    with atheris.instrument_imports(include=["effbench.exchange"]):
        from tests.exchange.test_fuzz import QUIET, hostile, outcome

    good, kept = (folder / "good.zip").read_bytes(), Journal(journal)

    @settings(**QUIET)  # type: ignore[arg-type]
    @given(data=hostile(good, members_of(good)))
    def one(data: bytes) -> None:
        kept.begins(data)
        kept.ended(outcome(data))

    arguments = [sys.argv[0], *options, "-handle_abrt=0", f"-max_len={LONGEST_BYTES}", str(folder / "corpus")]
    atheris.Setup(arguments, one.hypothesis.fuzz_one_input)
    kept.begins(b"")
    atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1] == "inside":
        inside(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
    else:
        main()
