"""Viewers of the board without a browser: what a browser says to the server over its WebSocket, and what it hears.

    open ──▶ rerun_script ──▶ new_session, delta …, script_finished ──(think)──▶ rerun_script with one changed widget ──▶ …

The messages are the installed streamlit's own (ForwardMsg, BackMsg). A viewer finds its widgets in what it is sent. The
time of a change is from sending it to the end of the script, everything in between received: what a browser would wait
before it can paint the last element. A viewer keeps no messages for the server to refer to, so it is always sent the whole.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import websockets
from streamlit.proto.BackMsg_pb2 import BackMsg  # noqa: TID251  # the messages, not the framework
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg  # noqa: TID251  # the messages, not the framework

TIMEOUT_S = 60.0
FILTERS = ("workload", "by", "technique", "hardware", "model", "protocol", "status")  # keys of the board's main filters


@dataclass
class Page:
    """What the last run of the script has sent."""

    widgets: dict[str, Any] = field(default_factory=dict)  # key → protobuf of a selectbox or multiselect
    points: list[int] = field(default_factory=list)  # of each Plotly figure
    tables: int = 0
    errors: list[str] = field(default_factory=list)


class Viewer:
    """One browser tab on a page of the app, named as in its URL. Use `async with`."""

    def __init__(self, port: int, *, page: str = "", timeout_s: float = TIMEOUT_S) -> None:
        self.url, self.name, self.timeout_s = f"ws://localhost:{port}/_stcore/stream", page, timeout_s
        self.page = Page()
        self._chosen: dict[str, str | list[str]] = {}  # widget id → value
        self._script = ""

    async def __aenter__(self) -> Viewer:
        self._socket = await websockets.connect(self.url, subprotocols=[websockets.Subprotocol("streamlit")], max_size=None)
        return self

    async def __aexit__(self, *fault: object) -> None:
        await self._socket.close()

    async def rerun(self) -> float:
        """Run the script with what is chosen. Returns the time until it has finished, in s. Raises TimeoutError."""
        message = BackMsg()
        message.rerun_script.page_name = self.name
        message.rerun_script.page_script_hash = self._script
        for name, value in self._chosen.items():
            state = message.rerun_script.widget_states.widgets.add(id=name)
            if isinstance(value, str):
                state.string_value = value
            else:
                state.string_array_value.data[:] = value
        began_s = time.perf_counter()
        await self._socket.send(message.SerializeToString())
        await asyncio.wait_for(self._until_finished(), self.timeout_s)
        return time.perf_counter() - began_s

    async def choose(self, key: str, value: str | list[str]) -> float:
        """Set one widget, named by its key, and rerun. Returns the time in s. Raises KeyError where there is no such widget."""
        self._chosen[self.page.widgets[key].id] = value
        return await self.rerun()

    async def change(self, draw: random.Random) -> tuple[str, float]:
        """Change one filter, drawn at random from those with something to choose. Returns its key and the time in s."""
        key = draw.choice([name for name, widget in self.page.widgets.items() if len(widget.options) > 1])
        widget = self.page.widgets[key]
        several = widget.DESCRIPTOR.name == "MultiSelect"
        now = self._chosen.get(widget.id, [] if several else widget.options[widget.default])
        one = draw.choice([option for option in widget.options if option != now and [option] != now])
        return key, await self.choose(key, [one] if several else one)

    async def _until_finished(self) -> None:
        while True:
            message = ForwardMsg.FromString(await self._socket.recv(decode=False))
            kind = message.WhichOneof("type")
            if kind == "new_session":
                self._script = message.new_session.page_script_hash
                self.page = Page()
            elif kind == "delta" and message.delta.WhichOneof("type") == "new_element":
                look(message.delta.new_element, self.page)
            elif kind == "script_finished" and message.script_finished != ForwardMsg.FINISHED_EARLY_FOR_RERUN:
                if message.script_finished == ForwardMsg.FINISHED_WITH_COMPILE_ERROR:
                    self.page.errors.append("the script does not compile")
                return


def look(element: Any, page: Page) -> None:
    """Note what this element is."""
    kind = element.WhichOneof("type")
    if kind in ("selectbox", "multiselect"):
        widget = getattr(element, kind)
        key = key_of(widget.id)
        if key in FILTERS:
            page.widgets[key] = widget
    elif kind == "plotly_chart":
        page.points.append(points(json.loads(element.plotly_chart.spec)))
    elif kind == "dataframe":
        page.tables += 1
    elif kind == "exception":
        page.errors.append(f"{element.exception.type}: {element.exception.message}")


def key_of(widget_id: str) -> str:
    """The key that the page gave a widget; its id is $$ID-<digest>-<key>."""
    return widget_id.split("-", 2)[-1]


def points(figure: Mapping[str, Any]) -> int:
    """Points of a Plotly figure: of each trace the longest of its columns; a dimension of parallel coordinates is a column."""
    return sum(_longest(trace) for trace in figure.get("data", ()))


def _longest(trace: Mapping[str, Any]) -> int:
    columns = [trace.get(name) for name in ("x", "y", "z", "r", "theta", "values", "base")]
    columns += [dimension.get("values") for dimension in trace.get("dimensions", ())]
    return max((_length(column) for column in columns if column is not None), default=0)


def _length(column: Any) -> int:
    """Of a list, or of an array that Plotly has packed as base64."""
    if isinstance(column, Mapping):
        return len(base64.b64decode(column["bdata"])) // np.dtype(column["dtype"]).itemsize
    return len(column) if isinstance(column, list) else 1


@dataclass(frozen=True, kw_only=True)
class Load:
    """What some viewers at once have met."""

    times_s: tuple[float, ...]  # one a change
    errors: tuple[str, ...]
    points: int  # of the largest figure


async def load(
    port: int, *, viewers: int, changes: int, think_s: float, seed: int, at_end: Callable[[], None] = lambda: None
) -> Load:
    """`viewers` open the first page within `think_s`; each then changes one filter after a think time of `think_s` on average,
    `changes` times. All is drawn from the seed.

    Nobody leaves before the last has finished and `at_end` was called, so it sees a server with all of them."""
    times_s: list[float] = []
    errors: list[str] = []
    most = [0]

    async def one(number: int, viewer: Viewer) -> None:
        draw = random.Random(f"{seed}:{number}")
        try:
            await asyncio.sleep(draw.uniform(0.0, think_s))
            await viewer.rerun()
            for _ in range(changes):
                await asyncio.sleep(draw.uniform(0.0, 2.0 * think_s))
                key, took_s = await viewer.change(draw)
                times_s.append(took_s)
                errors.extend(f"after a change of {key}: {fault}" for fault in viewer.page.errors)
                most.append(max(viewer.page.points, default=0))
        except (OSError, TimeoutError, IndexError, websockets.WebSocketException) as fault:
            errors.append(f"viewer {number}: {type(fault).__name__} {fault}")

    async with contextlib.AsyncExitStack() as stack:
        all_of_them = [await stack.enter_async_context(Viewer(port)) for _ in range(viewers)]
        await asyncio.gather(*(one(number, viewer) for number, viewer in enumerate(all_of_them)))
        at_end()
    return Load(times_s=tuple(times_s), errors=tuple(errors), points=max(most))
