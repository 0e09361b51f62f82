"""How far the layers of an image are: bars on a terminal, or JSON, one event a line."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import click

from estargz.image.progress import Event, Report

__all__ = ["MODES", "layer_progress"]

MODES = ("auto", "json", "none")

_DONE = {"copy": "copied", "convert": "converted", "build": "built", "reuse": "reused"}
_NAME_WIDTH = 24


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
    click.echo(json.dumps(asdict(event)), err=True)


class _Bars:
    """A bar for each layer under way; a line stays of each that is finished."""

    def __init__(self) -> None:
        self._bars: dict[int, Any] = {}
        self._lock = threading.Lock()

    def update(self, event: Event) -> None:
        with self._lock:
            bar = self._bars.get(event.number) or self._begin(event)
            bar.total = event.total
            bar.update(event.done - bar.n)
            if event.finished:
                self._bars.pop(event.number).close()
                bar.write(f"{_short(event.name)} {_DONE[event.action]}, {event.done / 1e6:.1f} MB", file=sys.stderr)

    def _begin(self, event: Event) -> Any:
        from tqdm import tqdm

        self._bars[event.number] = tqdm(
            desc=f"{_short(event.name)} {event.action}",
            total=event.total,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            leave=False,
            file=sys.stderr,
        )
        return self._bars[event.number]

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *_: object) -> None:
        for bar in self._bars.values():
            bar.close()


def _short(name: str) -> str:
    """A digest's first digits, or the end of a path."""
    name = name.removeprefix("sha256:")[:12] if name.startswith("sha256:") else name[-_NAME_WIDTH:]
    return f"{name:{_NAME_WIDTH}}" if name.isprintable() else f"{name!r:{_NAME_WIDTH}}"
