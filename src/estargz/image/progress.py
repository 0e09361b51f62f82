"""How far layers are, for whoever wants to know."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from estargz.image.layers import MovedLayer
from estargz.image.store import BlobReader

__all__ = ["Event", "Report", "Watch", "WatchedReader"]

_EVENT_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Event:
    """How far a layer is. A layer's last event has ``finished`` set."""

    number: int
    """Of the layer, from 0; one that several images share is told of once."""
    name: str
    """The digest of a layer that exists, or the source of one that is built."""
    action: str
    """``copy``, ``convert``, ``hash`` (to look it up in the cache) or ``build``; a finished one may say ``reuse``."""
    done: int
    """Bytes so far: of the blob when it is copied, else of the tar."""
    total: int | None
    """Bytes in all, where that is known."""
    finished: bool = False


Report = Callable[[Event], object]
"""Is given events by several threads at once, at most ten a second and layer."""


class Watch:
    """Tells how far one layer is, and whether to go on."""

    def __init__(self, number: int, name: str, check: Callable[[], None], report: Report | None) -> None:
        self.check = check
        self._report = report
        self._event = Event(number, name, "copy", 0, None)
        self._due = 0.0

    def begin(self, action: str, total: int | None) -> None:
        self._event = replace(self._event, action=action, total=total)

    def progress(self, done: int) -> None:
        self.check()
        now = time.monotonic()
        if self._report is not None and now >= self._due:
            self._due = now + _EVENT_SECONDS
            self._event = replace(self._event, done=done)
            self._report(self._event)

    def finish(self, moved: MovedLayer) -> None:
        if self._report is None:
            return
        size = moved.layer.uncompressed_size if moved.layer is not None else moved.descriptor.size
        action = "reuse" if moved.action == "reused" else self._event.action
        self._report(replace(self._event, action=action, done=size, total=size, finished=True))


class WatchedReader:
    """A BlobReader that tells how far it is."""

    def __init__(self, reader: BlobReader, watch: Watch) -> None:
        self.name = reader.name
        self._reader = reader
        self._watch = watch
        self._done = 0

    def read(self, size: int, /) -> bytes:
        data = self._reader.read(size)
        self._done += len(data)
        self._watch.progress(self._done)
        return data

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
