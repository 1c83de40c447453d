"""Who else was using the machine while a benchmark ran, and what that does to its verdicts."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.common import Figure

OTHERS_SHARE = 0.10  # of the cores, taken by processes that are not ours: more, and the machine was not quiet


def on_a_busy_machine(figure: Figure, others_share: float) -> Figure:
    """The figure with the verdict that it deserves when others took this share of the cores.

    Company makes us slow and never fast, so a time that misses its target is then undecided and one that meets it has met
    it. A ratio can be moved either way, since it hits the two sides differently. Counts and shares of our own CPU time stand.
    """
    doubtful = figure.key.endswith("_ratio") or (figure.key.endswith("_s") and figure.verdict == "missed")
    if figure.verdict is None or others_share <= OTHERS_SHARE or not doubtful:
        return figure
    note = f"{figure.note}; {figure.verdict}, but the machine was busy".removeprefix("; ")
    return replace(figure, verdict="undecided here", note=note)


class Company:
    """Measures what processes that are not ours take of the cores, the hypervisor's other guests included."""

    def __init__(self) -> None:
        self._began = self._point()

    def share(self) -> float:
        """Their share of all cores since this was made. Of our own processes only those that have ended count as ours."""
        (then_s, busy_s, own_s), now = self._began, self._point()
        return max(0.0, (now[1] - busy_s) - (now[2] - own_s)) / max((now[0] - then_s) * (os.cpu_count() or 1), 1e-9)

    @staticmethod
    def _point() -> tuple[float, float, float]:
        """Time, busy and stolen time of all cores (proc(5), /proc/stat), and our own CPU time, in s."""
        user, nice, system, _, _, *rest = (int(ticks) for ticks in Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
        busy_s = (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return time.monotonic(), busy_s, sum(u.ru_utime + u.ru_stime for u in used)
