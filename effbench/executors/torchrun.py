"""The launches of a suite over several machines, one process a rank, each started by torchrun:

    torchrun --nnodes 2 --nproc-per-node 4 --node-rank N --master-addr HOST --master-port 29500 \\
        -m effbench.executors.torchrun SUITE --only GLOB --out RECORDS.jsonl [--protocol quick] [--device cpu|cuda]

Every rank runs the same cases whose `nproc` is the number of ranks, once each, and rank 0 writes one record a line: the launch with
its facts and metrics as JSON. Blocks, pairs and the store are `effbench run`'s, on one machine.
A rank that fails ends the others (torchrun's task), and so does the time limit of a case; the record says why, where rank 0 lives.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from effbench import ranks, runner
from effbench.errors import EffbenchError, LaunchError, UsageError
from effbench.planning import Options, case_name, plan
from effbench.ranks import Place
from effbench.runner import Request
from effbench.schema import Launch, Spec
from effbench.suite import read_suite


def main() -> int:
    """Entry point of one rank. The exit code says whether any launch failed."""
    parser = argparse.ArgumentParser(prog="effbench.executors.torchrun", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("suite", type=Path)
    parser.add_argument("--only", default="*", help="cases whose name matches this pattern")
    parser.add_argument("--out", type=Path, required=True, help="file that rank 0 writes, one record a line")
    parser.add_argument("--protocol", help="instead of the suite's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    asked = parser.parse_args()
    try:
        place = place_of(os.environ)
        specs = _specs(asked.suite, asked.only, Options(device=asked.device, protocol=asked.protocol), place)
    except EffbenchError as error:
        print(error, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _told_to_end)
    failed = False
    for number, spec in enumerate(specs):
        request = Request(
            launch_id=f"rank-{place.size}-{number}", spec=spec, seed=spec.seed, suite=asked.suite.stem, env_id="", block_id="",
            block=0, position=number, hardware="", time_limit_s=spec.time_limit_s,
        )  # fmt: skip
        failed |= not _launch(request, place, asked.out)
    return int(failed)


def place_of(environment: Mapping[str, str]) -> Place:
    """The place that torchrun's variables give. Raises UsageError where they are not there."""
    try:
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local = int(environment.get("LOCAL_RANK", rank)), int(environment.get("LOCAL_WORLD_SIZE", size))
        _ = environment["MASTER_ADDR"], environment["MASTER_PORT"]
    except (KeyError, ValueError) as error:
        raise UsageError(f"{error} is not set as torchrun sets it; start this with torchrun --nproc-per-node …") from error
    return Place(rank=rank, size=size, local_rank=local[0], local_size=local[1], meeting="env://")


def _specs(path: Path, only: str, options: Options, place: Place) -> list[Spec]:
    cases = [case for case in plan(read_suite(path), options) if fnmatch.fnmatch(case_name(case.spec), only)]
    found = [case.spec for case in cases if case.skip_reason is None and case.spec.nproc == place.size]
    if not found:
        refused = next((f": {case.skip_reason}" for case in cases if case.skip_reason), "")
        raise UsageError(f"{path}: no case of {place.size} ranks matches {only!r}{refused}")
    return found


def _launch(request: Request, place: Place, out: Path) -> bool:
    """Whether it went well, as this rank sees it. Does not return where the time is over."""
    limit = threading.Timer(request.time_limit_s, _time_is_over, (request, place, out))
    limit.daemon = True
    limit.start()
    try:
        if place.rank:
            runner.follow(request, place)
            return True
        launch, _ = runner.run(request, None, place)
        _write(launch, out)
        if launch.status != "failed":
            ranks.leave()
            return True
        os._exit(1)  # the others wait for this rank, and torchrun ends them when it is gone
    except Exception as error:
        print(f"rank {place.rank}: {runner.reason_of(error)}", file=sys.stderr, flush=True)
        os._exit(1)
    finally:
        limit.cancel()


def _time_is_over(request: Request, place: Place, out: Path) -> NoReturn:
    if not place.rank:
        _write(runner.record(request, "failed", f"time_limit: no result after {request.time_limit_s:g} s"), out)
    os._exit(1)


def _told_to_end(*_: Any) -> NoReturn:
    raise LaunchError("another rank ended", "another rank ended, so torchrun ended this one")


def _write(launch: Launch, out: Path) -> None:
    plain = {**asdict(launch), "spec": launch.spec.to_json()}
    with out.open("a") as file:
        file.write(json.dumps(plain, default=str) + "\n")


if __name__ == "__main__":
    sys.exit(main())
