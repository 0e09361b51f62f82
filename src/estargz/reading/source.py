"""Where the bytes of a blob are: a file, memory, a URL, or anything that is read by ranges."""

from __future__ import annotations

import io
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, Protocol, runtime_checkable

from estargz.errors import BlobError, SourceError

__all__ = ["RangeReader", "Readable", "SeekReader", "Source", "Window", "blob_errors", "is_url", "open_source"]


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
    """A blob that is read by ranges, such as one in a registry. Its members must be safe to use from threads.

    It may also have ``read_ranges([(offset, size), ...]) -> list[bytes]``, which gives each range whole; ``prefetch`` of
    the same ranges, which will be read soon; and ``forget(offset, size)`` of bytes that were found to be wrong.
    """

    @property
    def size(self) -> int:
        """Bytes of the blob."""

    def read_at(self, offset: int, size: int, /) -> bytes:
        """At most ``size`` bytes at ``offset``; fewer only at the end."""


Readable = str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | RangeReader


class Source:
    """Random access to the bytes of a blob.

    ``owned``: close() closes ``ranges`` too.
    """

    def __init__(
        self,
        name: str,
        size: int,
        kernel: int | memoryview | None,
        ranges: RangeReader | None = None,
        *,
        owned: bool = False,
    ) -> None:
        self.name = name
        self.size = size
        self.kernel = kernel  # what the kernels read themselves; None: only through read_at
        self.ranges = ranges
        self._owned = owned

    def read_at(self, offset: int, size: int) -> bytes:
        if isinstance(self.kernel, int):
            return os.pread(self.kernel, size, offset)
        if self.kernel is not None:
            return bytes(self.kernel[offset : offset + size])
        assert self.ranges is not None
        data = self.ranges.read_at(offset, size)
        if len(data) > size:
            raise self._faulty(len(data), size)
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

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each (offset, size), all of them inside the blob; at once where the reader knows how."""
        together = getattr(self.ranges, "read_ranges", None)
        if together is None:
            return [self.exactly(offset, size) for offset, size in ranges]
        found: list[bytes] = together(ranges)
        for (_, size), data in zip(ranges, found, strict=True):
            if len(data) != size:
                raise self._faulty(len(data), size)
        return found

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """These (offset, size) will be read soon: fetches what its reader can keep, if it can keep anything."""
        ahead = getattr(self.ranges, "prefetch", None)
        if ahead is not None:
            ahead(ranges)

    def forget(self, offset: int, size: int) -> bool:
        """These bytes were wrong: have them fetched anew when they are next read. False when nothing keeps any."""
        drop = getattr(self.ranges, "forget", None)
        if drop is None:
            return False
        drop(offset, size)
        return True

    def close(self) -> None:
        if isinstance(self.kernel, int):
            os.close(self.kernel)
        if self._owned and self.ranges is not None:
            self.ranges.close()  # type: ignore[attr-defined]  # what is owned can be closed
        self.kernel = None
        self.ranges = None

    def _faulty(self, found: int, wanted: int) -> BlobError:
        return BlobError(f"{self.name}: {found} bytes came for a range of {wanted}; its reader is faulty")


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


class SeekReader:
    """A RangeReader over a binary file without a descriptor, one read at a time. The file's position moves with it."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self.name = name
        self._file = file
        self._lock = threading.Lock()
        self.size = file.seek(0, io.SEEK_END)

    def read_at(self, offset: int, size: int, /) -> bytes:
        with self._lock:
            self._file.seek(offset)
            data = self._file.read(size)
        if not isinstance(data, bytes):
            raise TypeError(f"{self.name}: reads {type(data).__name__}, not bytes; open it in binary mode")
        return data


def open_source(source: Readable) -> Source:
    """Take over a duplicate of a descriptor, borrow a buffer or a reader, or open a URL.

    A str that begins with http:// or https:// is a URL; it is read through a cache in memory. A file without a descriptor
    is read by its seek and read. What is borrowed must stay open, and is not closed.

    Raises OSError, BlobError (RangeError for a URL), UsageError for a URL that cannot be one, TypeError.
    """
    if isinstance(source, str) and is_url(source):
        return _from_url(source)
    if isinstance(source, (str, os.PathLike)):
        return _from_descriptor(os.open(source, os.O_RDONLY | os.O_CLOEXEC), os.fspath(source))
    if isinstance(source, io.BytesIO):
        source = source.getbuffer()
    if isinstance(source, (bytes, bytearray, memoryview)):
        view = memoryview(source).cast("B")
        return Source("blob", len(view), view)
    name = str(getattr(source, "name", "blob"))
    if isinstance(source, RangeReader):
        return Source(name, source.size, None, source)
    if hasattr(source, "read_at"):
        raise TypeError(f"{type(source).__name__} has read_at, but no size: give it the number of bytes of the blob")
    fd = _descriptor(source)
    if fd is not None:
        return _from_descriptor(os.dup(fd), name)
    if _can_seek(source, name):
        reader = SeekReader(source, name)
        return Source(name, reader.size, None, reader)
    raise TypeError(
        "a blob is a path, a URL, a file that has a descriptor or can seek, bytes or a RangeReader, "
        f"not {type(source).__name__}"
    )


def is_url(text: str) -> bool:
    return text.lower().startswith(("http://", "https://"))


def _descriptor(source: Any) -> int | None:
    """None for files that live in Python alone: those have no fileno, or one that raises."""
    try:
        fd: int = source.fileno()
    except (AttributeError, io.UnsupportedOperation):
        return None
    return fd


def _can_seek(source: Any, name: str) -> bool:
    if not all(hasattr(source, method) for method in ("read", "seek")):
        return False
    if hasattr(source, "seekable") and not source.seekable():
        raise BlobError(f"{name}: cannot seek; a blob is read from its end, so save it to a file first")
    return True


def _from_url(url: str) -> Source:
    # The modules take a tenth of a second, which local files need not pay.
    from estargz.reading.cache import CachedSource
    from estargz.reading.http import HttpSource

    cached = CachedSource(HttpSource(url))
    return Source(cached.name, cached.size, None, cached, owned=True)


def _from_descriptor(fd: int, name: str) -> Source:
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise BlobError(f"{name}: is no regular file; a blob is read from its end, so save it to a file first")
        return Source(name, status.st_size, fd)
    except BaseException:
        os.close(fd)
        raise
