"""How far the layers of an image are: bars on a terminal, or JSON, one event a line."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from estargz.cli import tell
from estargz.image.progress import Event, Report

__all__ = ["MODES", "layer_progress"]

MODES = ("auto", "json", "none")

_DONE = {"copy": "copied", "convert": "converted", "build": "built", "reuse": "reused"}
_NAME_WIDTH = 24
_BAR_WIDTH = 20
_LINES = 24  # of a terminal that does not say
_UP, _CLEAR, _NO_WRAP, _WRAP = "\x1b[{}A", "\r\x1b[J", "\x1b[?7l", "\x1b[?7h"


@contextmanager
def layer_progress(mode: str) -> Iterator[Report | None]:
    """What tells of layers on standard error, if that is wanted and somebody watches: for ``auto``, a terminal."""
    if sys.stderr is None or mode == "none":
        yield None
    elif mode == "json":
        yield _json_lines
    elif sys.stderr.isatty():
        with _Bars() as bars:
            yield bars.update
    else:
        yield None


def _json_lines(event: Event) -> None:
    tell(json.dumps(asdict(event)))


class _Bars:
    """The layers under way, a line for each below all else; above them a line stays of each that is finished."""

    def __init__(self) -> None:
        self._under_way: dict[int, Event] = {}
        self._height = 0  # lines drawn
        self._lock = threading.Lock()

    def update(self, event: Event) -> None:
        with self._lock:
            if event.finished:
                self._under_way.pop(event.number, None)
                self._draw(f"{_short(event.name)} {_DONE[event.action]:<9} {event.done / 1e6:.1f} MB\n")
            else:
                self._under_way[event.number] = event
                self._draw()

    def _draw(self, above: str = "") -> None:
        bars = [f"{_bar(event)}\n" for event in self._under_way.values()][: _lines_of_terminal() - 1]
        up = _UP.format(self._height) if self._height else ""
        self._height = len(bars)
        tell("".join((up, _CLEAR, above, _NO_WRAP, *bars, _WRAP)), end="")

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *_: object) -> None:
        if self._under_way:
            self._under_way.clear()
            self._draw()


def _lines_of_terminal() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).lines or _LINES
    except OSError:
        return _LINES


def _bar(event: Event) -> str:
    start = f"{_short(event.name)} {event.action:<9}"
    if not event.total:
        return f"{start} {event.done / 1e6:.1f} MB"
    part = min(event.done / event.total, 1)
    return f"{start} {part:4.0%} of {event.total / 1e6:.1f} MB [{'#' * int(part * _BAR_WIDTH):<{_BAR_WIDTH}}]"


def _short(name: str) -> str:
    """A digest's first digits, or the end of a path."""
    name = name.removeprefix("sha256:")[:12] if name.startswith("sha256:") else name[-_NAME_WIDTH:]
    return f"{name:{_NAME_WIDTH}}" if name.isprintable() else f"{name!r:{_NAME_WIDTH}}"
