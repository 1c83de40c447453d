"""The mutations of `test_fuzz`, chosen by what they reach (atheris): `python -m tests.exchange.guided -runs=100000`.

`make fuzz` installs atheris where it has a wheel and runs this; the options are libFuzzer's. It ends with the first input that is
neither read nor refused, which libFuzzer then writes to a file.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import atheris
from hypothesis import given, settings

with atheris.instrument_imports(include=["effbench.exchange"]):
    from tests.exchange.bundles import make_good, members_of
    from tests.exchange.test_fuzz import QUIET, hostile, read
    from tests.records import make_metrics

LONGEST_BYTES = 8192  # of the choices that make one mutation


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="effbench-fuzz-") as folder:
        good = make_good(Path(folder), blocks=1, steps=8, metrics=make_metrics()[:6])

    @settings(**QUIET)  # type: ignore[arg-type]
    @given(data=hostile(good, members_of(good)))
    def one(data: bytes) -> None:
        read(data)

    with tempfile.TemporaryDirectory(prefix="effbench-corpus-") as corpus:
        for seed in range(20):
            (Path(corpus) / str(seed)).write_bytes(os.urandom(1024))
        atheris.Setup([*sys.argv, f"-max_len={LONGEST_BYTES}", corpus], one.hypothesis.fuzz_one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
