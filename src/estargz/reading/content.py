"""The content of regular files: chunk -> member -> inflated bytes -> digest -> out.

Nothing leaves this module whose digest was not checked.
"""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from threading import Lock
from typing import Any, NamedTuple

from estargz._inflate import InflateReader, read_chunk
from estargz.digest import sha256
from estargz.errors import BlobError, RangeError, VerificationError, brief
from estargz.reading.source import Source, Window, blob_errors

__all__ = ["BufferedContent", "Chunk", "ContentFile", "Contents", "RegularFile"]

MAX_CHUNK_SIZE = 1 << 30  # bytes held in memory until their digest is known
CACHE_SIZE = 32 << 20  # bytes of verified chunks that a blob keeps for who reads in small steps
AHEAD_SIZE = 16 << 20  # compressed bytes that are asked for at once when a file is read from end to end
_RANGE_MAX = 8 << 20  # compressed bytes that are held in memory for a chunk; more is inflated while it comes


class Chunk(NamedTuple):
    """A part of a file. Offsets and sizes are in bytes; [offset, end) is compressed, the rest is not."""

    offset: int
    end: int
    inner_offset: int
    chunk_offset: int
    size: int
    digest: str


class RegularFile(NamedTuple):
    """What the table says of a file's content. digest: "" when it states none."""

    name: str
    size: int
    digest: str
    chunks: Sequence[Chunk]


class Contents:
    """Verified chunks of one blob; safe to use from several threads."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._name = source.name
        self._kept: OrderedDict[tuple[int, int, int], bytes] = OrderedDict()
        self._kept_size = 0
        self._lock = Lock()

    def stream(self, file: RegularFile) -> Iterator[bytes]:
        """The content in parts, one chunk each, or all at once where chunks have no digests of their own."""
        self.require_digests(file)
        if not all(chunk.digest for chunk in file.chunks):
            yield self.whole(file)
            return
        running = hashlib.sha256()
        members = Members(self.source)
        ahead = 0
        for number, chunk in enumerate(file.chunks):
            if chunk.offset >= ahead:
                ahead = self.fetch_ahead(file, number)
            data = self._checked(file, chunk, members)
            if file.digest and len(file.chunks) > 1:
                running.update(data)
            yield data
        if file.digest and len(file.chunks) > 1:
            self._expect(file, file.chunks[0], file.digest, "sha256:" + running.hexdigest())

    def whole(self, file: RegularFile) -> bytes:
        """The content of a file whose chunks can only be checked together."""
        if file.size > MAX_CHUNK_SIZE:
            raise self._too_large(file, file.size)
        first, last = file.chunks[0], file.chunks[-1]

        def read() -> bytes:
            members = Members(self.source)
            data = b"".join(self._inflated(file, chunk, members) for chunk in file.chunks)
            self._expect(file, first, file.digest, sha256(data))
            return data

        return self._again_if_spoiled(read, first.offset, last.end)

    def chunk(self, file: RegularFile, number: int, members: Members) -> bytes:
        """One chunk, which has a digest; kept for a while."""
        chunk = file.chunks[number]
        key = (chunk.offset, chunk.inner_offset, chunk.size)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        data = self._checked(file, chunk, members)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = data
                self._kept_size += len(data)
            while self._kept_size > CACHE_SIZE and len(self._kept) > 1:
                self._kept_size -= len(self._kept.popitem(last=False)[1])
        return data

    def fetch_ahead(self, file: RegularFile, number: int) -> int:
        """Ask a distant source for the next chunks together. Returns up to where, as a blob offset."""
        first = file.chunks[number]
        end = first.end
        for chunk in file.chunks[number + 1 :]:
            if chunk.end - first.offset > AHEAD_SIZE:
                break
            end = chunk.end
        if len(file.chunks) > 1:
            self.source.prefetch([(first.offset, end - first.offset)])
        return end

    def require_digests(self, file: RegularFile) -> None:
        if not file.digest and file.size and not all(chunk.digest for chunk in file.chunks):
            raise BlobError(
                f"{self._name}: {brief(file.name)!r} has no digest in the TOC, so its content cannot be trusted"
            )

    def _checked(self, file: RegularFile, chunk: Chunk, members: Members) -> bytes:
        def read() -> bytes:
            data = self._inflated(file, chunk, members)
            self._expect(file, chunk, chunk.digest, sha256(data))
            if len(file.chunks) == 1 and file.digest not in ("", chunk.digest):
                self._expect(file, chunk, file.digest, chunk.digest)
            return data

        return self._again_if_spoiled(read, chunk.offset, chunk.end)

    def _again_if_spoiled(self, read: Callable[[], bytes], begin: int, end: int) -> bytes:
        """A cache may have kept what a network or a disk has spoiled: then the source itself is asked, once."""
        try:
            return read()
        except RangeError:
            raise  # the source has been asked
        except BlobError:
            if not self.source.forget(begin, end - begin):
                raise
        return read()

    def _inflated(self, file: RegularFile, chunk: Chunk, members: Members) -> bytes:
        """The chunk's bytes, not verified yet."""
        if max(chunk.size, chunk.inner_offset) > MAX_CHUNK_SIZE:
            raise self._too_large(file, max(chunk.size, chunk.inner_offset))
        label = f"{self._name}: {brief(file.name)!r}, chunk at {chunk.chunk_offset}"
        begin, end = chunk.offset, chunk.end
        with blob_errors():
            if chunk.inner_offset == 0 and self.source.kernel is not None:
                return read_chunk(self.source.kernel, begin, end, 0, chunk.size, name=label)
            if chunk.inner_offset == 0 and end - begin <= _RANGE_MAX:
                return read_chunk(self.source.exactly(begin, end - begin), 0, end - begin, 0, chunk.size, name=label)
            data = members.read(chunk, label)
        if len(data) != chunk.size:
            raise BlobError(f"{label}: its member ends after {len(data)} of {chunk.size} bytes; the blob is damaged")
        return data

    def _expect(self, file: RegularFile, chunk: Chunk, wanted: str, found: str) -> None:
        if found != wanted:
            raise VerificationError(
                f"{self._name}: {brief(file.name)!r}, chunk at {chunk.chunk_offset} (blob offset {chunk.offset}): "
                f"expected {wanted}, found {found}; the blob was altered or damaged, fetch it again"
            )

    def _too_large(self, file: RegularFile, size: int) -> BlobError:
        return BlobError(
            f"{self._name}: {brief(file.name)!r} has a chunk of {size} bytes, over {MAX_CHUNK_SIZE}; unpack it instead"
        )


class Members:
    """Inflates chunks that lie somewhere inside a member, which is not begun anew for the next chunk behind them."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._reader: InflateReader | None = None
        self._span = (0, 0)
        self._at = 0  # bytes of the member that were inflated

    def read(self, chunk: Chunk, label: str) -> bytes:
        """At most the chunk's bytes; fewer where the member ends."""
        reader, self._reader = self._reader, None  # to be given back if all goes well
        if reader is None or self._span != chunk[:2] or chunk.inner_offset < self._at:
            reader = InflateReader(Window(self.source, chunk.offset, chunk.end), "gzip", name=label, strict=True)
            self._span, self._at = chunk[:2], 0
        _skip(reader, chunk.inner_offset - self._at)
        data = reader.read(chunk.size)
        self._at = chunk.inner_offset + len(data)
        self._reader = reader
        return data


def _skip(reader: InflateReader, size: int) -> None:
    scratch = bytearray(1 << 18)
    while size:
        count = reader.readinto(memoryview(scratch)[:size])
        if count == 0:
            return
        size -= count


class ContentFile(io.RawIOBase):
    """A regular file of a blob, for reading and seeking. Only the chunks that are touched are fetched and checked.

    Where chunks have no digests of their own (made before they were introduced), the first read fetches the whole file.
    """

    def __init__(self, contents: Contents, file: RegularFile) -> None:
        contents.require_digests(file)
        self.name = file.name
        self._contents = contents
        self._file = file
        self._at = 0
        self._ahead = 0  # blob offset up to which chunks have been asked for
        self._members = Members(contents.source)
        self._whole = None if all(chunk.digest for chunk in file.chunks) else b""

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._file.size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        self._expect_open()
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._expect_open()
        if whence not in (io.SEEK_SET, io.SEEK_CUR, io.SEEK_END):
            raise ValueError(f"invalid whence ({whence}, should be 0, 1 or 2)")
        target = offset + (0, self._at, self._file.size)[whence]
        if target < 0:
            raise ValueError(f"negative seek position {target}")
        self._at = target
        return target

    def readinto(self, buffer: Any) -> int:
        self._expect_open()
        if self._at >= self._file.size:
            return 0
        view = memoryview(buffer).cast("B")
        # No more than the chunk at hand: whoever buffers would otherwise fetch chunks that nobody asked for.
        part = self._part()[: len(view)]
        view[: len(part)] = part
        self._at += len(part)
        return len(part)

    def readall(self) -> bytes:
        self._expect_open()
        parts = []
        while self._at < self._file.size:
            parts.append(self._part())
            self._at += len(parts[-1])
        return b"".join(parts)

    def _part(self) -> memoryview:
        """What follows the position in its chunk."""
        if self._whole is not None:
            self._whole = self._whole or self._contents.whole(self._file)
            return memoryview(self._whole)[self._at :]
        number = self._number()
        chunk = self._file.chunks[number]
        if number and chunk.offset >= self._ahead and self._at == chunk.chunk_offset:
            self._ahead = self._contents.fetch_ahead(self._file, number)  # whoever comes here from the front goes on
        return memoryview(self._contents.chunk(self._file, number, self._members))[self._at - chunk.chunk_offset :]

    def _number(self) -> int:
        """Which chunk holds the position."""
        low, high = 0, len(self._file.chunks) - 1
        while low < high:
            middle = (low + high + 1) // 2
            if self._file.chunks[middle].chunk_offset <= self._at:
                low = middle
            else:
                high = middle - 1
        return low

    def _expect_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")


class BufferedContent(io.BufferedReader):
    """A ContentFile with a buffer. ``size``: bytes of the file."""

    @property
    def size(self) -> int:
        raw = self.raw
        assert isinstance(raw, ContentFile)
        return raw.size
