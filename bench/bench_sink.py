"""The sink: a layer of several MiB goes to where users have it go.

The seconds are those of the write stage, and of syncing and naming the file where it is one. Rates are of the blob.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from threading import Thread

import pytest
from conftest import MIB, Staged, build
from corpus import cut, make_tar

from estargz.writing.sink import DescriptorSink, Destination

# Chunk digests are part of the blob, by way of the table of contents.
PARTS = ["chunk hash", "compress", "write"]


class Nothing:
    """An object that takes bytes and forgets them: what is left is what handing them over costs."""

    def write(self, data: bytes) -> int:
        return len(data)


@contextmanager
def drained_pipe(scratch: Path) -> Iterator[Destination]:
    """A pipe whose reader does nothing else."""
    reading, writing = os.pipe()
    reader = Thread(target=drain, args=(reading,))
    reader.start()
    try:
        yield DescriptorSink(writing, "pipe")
    finally:
        os.close(writing)
        reader.join()
        os.close(reading)


def drain(reading: int) -> None:
    while os.read(reading, MIB):
        pass


DESTINATIONS: dict[str, Callable[[Path], AbstractContextManager[Destination]]] = {
    "file": lambda scratch: nullcontext(scratch / "blob"),
    "null": lambda scratch: nullcontext(os.devnull),
    "pipe": drained_pipe,
    "object": lambda scratch: nullcontext(Nothing()),
}


@pytest.mark.parametrize("kind", DESTINATIONS)
def test_destination(staged: Staged, mixed: bytes, scratch: Path, kind: str) -> None:
    tar = make_tar(cut(mixed, MIB))
    size = build(tar).size
    with DESTINATIONS[kind](scratch) as dest:
        layer = staged(("write", "commit"), tar, dest=dest, parts=PARTS, size=size)
    assert layer.size == size
