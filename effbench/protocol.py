"""Protocols: named presets of how long, how often and how strictly to measure. The numbers stand in docs/methodology.md.

A window ends when it is at least `window_s` long and holds at least `window_steps` steps, or at `window_limit_s`.
"""

from __future__ import annotations

from dataclasses import dataclass

from effbench.errors import UnknownName


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One preset. Times in s."""

    name: str
    summary: str
    blocks: int
    warm_up_s: float
    warm_up_steps: int
    window_s: float
    window_steps: int
    window_limit_s: float
    idle_s: float  # idle power before and after, where a probe can see it
    counter_updates: int  # fewest updates of the energy counter that a window may hold
    sampling_gap_s: float  # largest hole in a sensor's samples
    temperature_band_c: float | None  # largest drift of the device's temperature over the window
    fresh_server: bool  # a new fork server for every block
    time_limit_s: float  # a launch that takes longer is killed
    claims: bool  # whether its rows may claim a difference at all


PROTOCOLS = {
    p.name: p
    for p in (
        Protocol(
            name="smoke",
            summary="does it run at all: two short windows, no difference is ever claimed",
            blocks=2,
            warm_up_s=0.0,
            warm_up_steps=3,
            window_s=0.2,
            window_steps=2,
            window_limit_s=10.0,
            idle_s=0.1,
            counter_updates=1,
            sampling_gap_s=3.0,
            temperature_band_c=None,
            fresh_server=False,
            time_limit_s=60.0,
            claims=False,
        ),
        Protocol(
            name="quick",
            summary="screening: three blocks, windows of about 1.5 s, no difference below 10 % is claimed",
            blocks=3,
            warm_up_s=0.3,
            warm_up_steps=3,
            window_s=1.5,
            window_steps=5,
            window_limit_s=30.0,
            idle_s=0.5,
            counter_updates=10,
            sampling_gap_s=1.0,
            temperature_band_c=None,
            fresh_server=False,
            time_limit_s=300.0,
            claims=True,
        ),
        Protocol(
            name="publish",
            summary="for publication: five blocks, windows of at least 10 s and 50 updates of the energy counter",
            blocks=5,
            warm_up_s=3.0,
            warm_up_steps=10,
            window_s=10.0,
            window_steps=20,
            window_limit_s=180.0,
            idle_s=5.0,
            counter_updates=50,
            sampling_gap_s=1.0,
            temperature_band_c=15.0,
            fresh_server=True,
            time_limit_s=1800.0,
            claims=True,
        ),
    )
}


def protocol(name: str) -> Protocol:
    """The preset of this name. Raises UnknownName."""
    if name not in PROTOCOLS:
        raise UnknownName("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]
