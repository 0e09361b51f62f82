"""Where the bytes of a blob are: a file, memory, or anything that is read by ranges."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Protocol, runtime_checkable

from estargz.errors import BlobError, SourceError

__all__ = ["RangeReader", "Readable", "Source", "Window", "blob_errors", "open_source"]


@contextmanager
def blob_errors(where: str = "") -> Iterator[None]:
    """What is a damaged source to a decoder is a damaged blob here."""
    try:
        yield
    except BlobError:
        raise
    except SourceError as error:
        raise BlobError(f"{where}{error}") from error


@runtime_checkable
class RangeReader(Protocol):
    """A blob that is read by ranges, such as one in a registry. Both members must be safe to use from threads."""

    @property
    def size(self) -> int:
        """Bytes of the blob."""

    def read_at(self, offset: int, size: int, /) -> bytes:
        """At most ``size`` bytes at ``offset``; fewer only at the end."""


Readable = str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | RangeReader


class Source:
    """Random access to the bytes of a blob."""

    def __init__(
        self, name: str, size: int, kernel: int | memoryview | None, ranges: RangeReader | None = None
    ) -> None:
        self.name = name
        self.size = size
        self.kernel = kernel  # what the kernels read themselves; None: only through read_at
        self.ranges = ranges

    def read_at(self, offset: int, size: int) -> bytes:
        if isinstance(self.kernel, int):
            return os.pread(self.kernel, size, offset)
        if self.kernel is not None:
            return bytes(self.kernel[offset : offset + size])
        assert self.ranges is not None
        data = self.ranges.read_at(offset, size)
        if len(data) > size:
            raise BlobError(f"{self.name}: {len(data)} bytes came for a range of {size}; its reader is faulty")
        return data

    def exactly(self, offset: int, size: int) -> bytes:
        parts = []
        while size:
            part = self.read_at(offset, size)
            if not part:
                raise BlobError(f"{self.name}: ends at byte {offset}, before its size; was it cut while being read?")
            parts.append(part)
            size, offset = size - len(part), offset + len(part)
        return b"".join(parts)

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        prefetch = getattr(self.ranges, "prefetch", None)
        if prefetch is not None:
            prefetch(ranges)

    def forget(self, offset: int, size: int) -> bool:
        """Have a cache drop these bytes; False when nothing keeps any."""
        forget = getattr(self.ranges, "forget", None)
        if forget is None:
            return False
        forget(offset, size)
        return True

    def close(self) -> None:
        if isinstance(self.kernel, int):
            os.close(self.kernel)
        self.kernel = None
        self.ranges = None


class Window:
    """The bytes [begin, end) of a source, for InflateReader."""

    def __init__(self, source: Source, begin: int, end: int) -> None:
        self.source, self.at, self.end = source, begin, end

    def readinto(self, buffer: memoryview) -> int:
        room = min(len(buffer), self.end - self.at)
        if room == 0:
            return 0
        if isinstance(self.source.kernel, int):
            count = os.preadv(self.source.kernel, [buffer[:room]], self.at)
        else:
            part = self.source.read_at(self.at, room)
            count = len(part)
            buffer[:count] = part
        self.at += count
        return count


def open_source(source: Readable) -> Source:
    """Take over a duplicate of a descriptor, or borrow a buffer. Raises OSError, BlobError, TypeError."""
    if isinstance(source, (str, os.PathLike)):
        return _from_descriptor(os.open(source, os.O_RDONLY | os.O_CLOEXEC), os.fspath(source))
    if isinstance(source, io.BytesIO):
        source = source.getbuffer()
    if isinstance(source, (bytes, bytearray, memoryview)):
        view = memoryview(source).cast("B")
        return Source("blob", len(view), view)
    if isinstance(source, RangeReader):
        return Source(str(getattr(source, "name", "blob")), source.size, None, source)
    if hasattr(source, "fileno"):
        return _from_descriptor(os.dup(source.fileno()), str(getattr(source, "name", "blob")))
    raise TypeError(f"a blob is a path, a file with a descriptor, bytes or a RangeReader, not {type(source).__name__}")


def _from_descriptor(fd: int, name: str) -> Source:
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise BlobError(f"{name}: is no regular file; a blob is read from its end, so save it to a file first")
        return Source(name, status.st_size, fd)
    except BaseException:
        os.close(fd)
        raise
