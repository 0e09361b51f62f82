"""The content of regular files: chunk -> member -> inflated bytes -> digest -> out.

Nothing leaves this module whose digest was not checked.
"""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from threading import Lock
from typing import Any, NamedTuple

from estargz._inflate import InflateReader, read_chunk
from estargz.digest import sha256
from estargz.errors import BlobError, VerificationError
from estargz.reading.source import Source, Window, blob_errors

__all__ = ["Chunk", "ContentFile", "Contents", "RegularFile"]

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
        self._source = source
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
        ahead = 0
        for number, chunk in enumerate(file.chunks):
            if chunk.offset >= ahead:
                ahead = self.fetch_ahead(file, number)
            data = self._checked(file, chunk)
            if file.digest and len(file.chunks) > 1:
                running.update(data)
            yield data
        if file.digest and len(file.chunks) > 1:
            self._expect(file, file.chunks[0], file.digest, "sha256:" + running.hexdigest())

    def whole(self, file: RegularFile) -> bytes:
        """The content of a file whose chunks can only be checked together."""
        if file.size > MAX_CHUNK_SIZE:
            raise self._too_large(file, file.size)
        data = b"".join(self._inflated(file, chunk) for chunk in file.chunks)
        self._expect(file, file.chunks[0], file.digest, sha256(data))
        return data

    def chunk(self, file: RegularFile, number: int) -> bytes:
        """One chunk, which has a digest; kept for a while."""
        chunk = file.chunks[number]
        key = (chunk.offset, chunk.inner_offset, chunk.size)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        data = self._checked(file, chunk)
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
            self._source.prefetch([(first.offset, end - first.offset)])
        return end

    def require_digests(self, file: RegularFile) -> None:
        if not file.digest and file.size and not all(chunk.digest for chunk in file.chunks):
            raise BlobError(f"{self._name}: {file.name!r} has no digest in the TOC, so its content cannot be trusted")

    def _checked(self, file: RegularFile, chunk: Chunk) -> bytes:
        try:
            data = self._inflated(file, chunk)
            self._expect(file, chunk, chunk.digest, sha256(data))
        except BlobError:
            # A cache may have kept what a network or a disk has spoiled: ask the source itself, once.
            if not self._source.forget(chunk.offset, chunk.end - chunk.offset):
                raise
            data = self._inflated(file, chunk)
            self._expect(file, chunk, chunk.digest, sha256(data))
        return data

    def _inflated(self, file: RegularFile, chunk: Chunk) -> bytes:
        """The chunk's bytes, not verified yet."""
        if chunk.size > MAX_CHUNK_SIZE:
            raise self._too_large(file, chunk.size)
        label = f"{self._name}: {file.name!r}, chunk at {chunk.chunk_offset}"
        begin, end = chunk.offset, chunk.end
        with blob_errors():
            if self._source.kernel is not None:
                return read_chunk(self._source.kernel, begin, end, chunk.inner_offset, chunk.size, name=label)
            if end - begin <= _RANGE_MAX:
                data = self._source.exactly(begin, end - begin)
                return read_chunk(data, 0, end - begin, chunk.inner_offset, chunk.size, name=label)
            reader = InflateReader(Window(self._source, begin, end), "gzip", name=label, strict=True)
            _skip(reader, chunk.inner_offset)
            data = reader.read(chunk.size)
        if len(data) != chunk.size:
            raise BlobError(f"{label}: its member ends after {len(data)} of {chunk.size} bytes; the blob is damaged")
        return data

    def _expect(self, file: RegularFile, chunk: Chunk, wanted: str, found: str) -> None:
        if found != wanted:
            raise VerificationError(
                f"{self._name}: {file.name!r}, chunk at {chunk.chunk_offset} (blob offset {chunk.offset}): "
                f"expected {wanted}, found {found}; the blob was altered or damaged, fetch it again"
            )

    def _too_large(self, file: RegularFile, size: int) -> BlobError:
        return BlobError(
            f"{self._name}: {file.name!r} has a chunk of {size} bytes, over {MAX_CHUNK_SIZE}; unpack it instead"
        )


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
        self._whole = None if all(chunk.digest for chunk in file.chunks) else b""

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
        return memoryview(self._contents.chunk(self._file, number))[self._at - chunk.chunk_offset :]

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
