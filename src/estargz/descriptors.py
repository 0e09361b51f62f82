"""Open files of the system: what only read is closed without a fuss, and errors name what was read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

__all__ = ["naming", "open_folder", "quietly", "read_all_at", "reading", "sync_folder"]


def quietly(close: Callable[..., object], *arguments: object) -> None:
    """Closes what nothing was written to: that this fails, or is interrupted, means nothing then."""
    with suppress(OSError):
        close(*arguments)


@contextmanager
def naming(name: str | os.PathLike[str]) -> Iterator[None]:
    """An error of the system says what it is about, where a descriptor's calls do not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(name)
        raise


def read_all_at(descriptor: int, offset: int, size: int) -> bytes:
    """As many bytes as a file has there, at most ``size``: one call may give fewer, for no reason."""
    parts = []
    while size > 0 and (part := os.pread(descriptor, size, offset)):
        parts.append(part)
        size, offset = size - len(part), offset + len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


@contextmanager
def reading(path: Path, flags: int = 0) -> Iterator[BinaryIO]:
    """A file that is only read. flags: of open(2), beside O_RDONLY."""
    file = open(path, "rb", opener=lambda name, others: os.open(name, others | flags))  # noqa: SIM115
    try:
        yield file
    finally:
        quietly(file.close)


@contextmanager
def open_folder(folder: Path) -> Iterator[int]:
    """A handle of a directory."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield handle
    finally:
        quietly(os.close, handle)


def sync_folder(folder: Path) -> None:
    """Makes a directory's names durable."""
    with open_folder(folder) as handle, naming(folder):
        os.fsync(handle)
