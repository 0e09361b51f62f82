"""Where the bytes of a blob are: a file, memory, a URL, or anything that is read by ranges."""

from __future__ import annotations

import fcntl
import io
import operator
import os
import re
import stat
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, Protocol, cast, runtime_checkable

from estargz.descriptors import naming, quietly, read_all_at
from estargz.errors import BlobError, SourceError, UsageError

__all__ = [
    "RangeReader",
    "Readable",
    "SeekReader",
    "Source",
    "Window",
    "blob_errors",
    "is_url",
    "open_source",
    "stated_size",
]

_MAX_SIZE = (1 << 63) - 1  # bytes; what an offset can say
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


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
    """Random access to the bytes of a blob. Reading after close() raises UsageError.

    ``kernel``: a descriptor is closed with the source, at the latest when nobody refers to it any more.
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
        # Runs once, whoever is first of two threads that close and the collector: the number may be another file's by then.
        self._release = weakref.finalize(self, quietly, os.close, kernel) if isinstance(kernel, int) else None

    def read_at(self, offset: int, size: int) -> bytes:
        kernel, ranges = self.kernel, self.ranges  # another thread may close
        if isinstance(kernel, int):
            with naming(self.name):
                return read_all_at(kernel, offset, size)
        if kernel is not None:
            return bytes(kernel[offset : offset + size])
        if ranges is None:
            raise self._closed()
        return self._checked(ranges.read_at(offset, size), size)

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
        if self.kernel is None and self.ranges is None:
            raise self._closed()
        together = getattr(self.ranges, "read_ranges", None)
        if together is None:
            return [self.exactly(offset, size) for offset, size in ranges]
        answer = together(ranges)
        if not isinstance(answer, list | tuple) or len(answer) != len(ranges):
            raise BlobError(f"{self.name}: read_ranges gave no list of {len(ranges)} ranges; its reader is faulty")
        found = [self._checked(data, size) for (_, size), data in zip(ranges, answer, strict=True)]
        for (_, size), data in zip(ranges, found, strict=True):
            if len(data) != size:
                raise self._faulty(f"{len(data)} bytes", size)
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
        ranges = self.ranges
        self.kernel = None
        self.ranges = None
        if self._release is not None:
            self._release()
        if self._owned and ranges is not None:
            ranges.close()  # type: ignore[attr-defined]  # what is owned can be closed

    def _checked(self, data: Any, size: int) -> bytes:
        """What a reader gave for at most ``size`` bytes."""
        if not isinstance(data, bytes | bytearray | memoryview):
            raise self._faulty(type(data).__name__, size)
        part = bytes(data)
        if len(part) > size:
            raise self._faulty(f"{len(part)} bytes", size)
        return part

    def _faulty(self, found: str, wanted: int) -> BlobError:
        return BlobError(f"{self.name}: {found} came for a range of {wanted} bytes; its reader is faulty")

    def _closed(self) -> UsageError:
        return UsageError(f"{self.name}: is closed")


class Window:
    """The bytes [begin, end) of a source, for InflateReader."""

    def __init__(self, source: Source, begin: int, end: int) -> None:
        self.source, self.at, self.end = source, begin, end

    def readinto(self, buffer: memoryview) -> int:
        room = min(len(buffer), self.end - self.at)
        if room == 0:
            return 0
        kernel = self.source.kernel
        if isinstance(kernel, int):
            with naming(self.source.name):
                count = os.preadv(kernel, [buffer[:room]], self.at)
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

    Raises OSError, BlobError (RangeError for a URL), UsageError for what can be no path or URL or is not open for reading,
    TypeError.
    """
    if isinstance(source, str) and is_url(source):
        return _from_url(source)
    if isinstance(source, (str, os.PathLike)):
        return _from_path(os.fspath(source))
    view = _memory(source)
    if view is not None:
        return Source("blob", len(view), view)
    name = str(getattr(source, "name", "blob"))
    if isinstance(source, RangeReader):
        return Source(name, stated_size(source, name), None, source)
    if hasattr(source, "read_at"):
        raise TypeError(f"{type(source).__name__} has read_at, but no size: give it the number of bytes of the blob")
    if hasattr(source, "readable") and not source.readable():
        raise _write_only(name)
    fd = _descriptor(source)
    if fd is not None:
        with naming(name):
            fd = os.dup(fd)
        return _from_descriptor(fd, name)
    if _can_seek(source, name):
        reader = SeekReader(cast("IO[bytes]", source), name)
        return Source(name, reader.size, None, reader)
    raise TypeError(
        "a blob is a path, a URL, a file that has a descriptor or can seek, bytes or a RangeReader, "
        f"not {type(source).__name__}"
    )


def is_url(text: str) -> bool:
    return text.lower().startswith(("http://", "https://"))


def _memory(source: Any) -> memoryview | None:
    """The bytes of anything that has the buffer protocol; None for what has not."""
    try:
        view = memoryview(source.getbuffer() if isinstance(source, io.BytesIO) else source)
    except TypeError:
        return None
    if not view.contiguous:
        raise TypeError(f"the bytes of this {type(source).__name__} do not lie in one piece; give a copy of them")
    return view.cast("B") if view.nbytes else memoryview(b"")


def stated_size(reader: RangeReader, name: str) -> int:
    """Bytes of the blob, 0 to 2^63 - 1. Raises TypeError, BlobError."""
    try:
        size = operator.index(reader.size)
    except TypeError:
        kind = type(reader.size).__name__
        raise TypeError(f"{name}: its reader's size is a {kind}; it must be the number of bytes of the blob") from None
    if not 0 <= size <= _MAX_SIZE:
        raise BlobError(f"{name}: its reader's size is {size}, which no blob can have; its reader is faulty")
    return size


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


def _from_path(path: str) -> Source:
    try:
        # Without O_NONBLOCK a FIFO would be waited for; it changes nothing for regular files, the only ones that are taken.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        if not (isinstance(path, str) and _SCHEME.match(path)):
            raise
        raise UsageError(f"{path}: there is no such file, and of URLs only http:// and https:// are read") from None
    except ValueError:
        raise UsageError(f"{path!r} is no path: it has a NUL byte or a lone surrogate") from None
    return _from_descriptor(fd, path)


def _write_only(name: str) -> UsageError:
    return UsageError(f"{name}: is open for writing only; open it for reading")


def _from_descriptor(fd: int, name: str) -> Source:
    try:
        with naming(name):
            status = os.fstat(fd)
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        if flags & os.O_ACCMODE == os.O_WRONLY:
            raise _write_only(name)
        if stat.S_ISDIR(status.st_mode):
            raise BlobError(f"{name}: is no regular file but a directory; give the path of a blob")
        if not stat.S_ISREG(status.st_mode):
            raise BlobError(f"{name}: is no regular file; a blob is read from its end, so save it to a file first")
        return Source(name, status.st_size, fd)
    except BaseException:
        quietly(os.close, fd)
        raise
