"""Reading an eStargz blob: bytes leave here only after their digest was checked.

blob (file | buffer | ranges) -> footer -> TOC member -> SHA-256 -> TOC -> entry -> chunk -> member -> verified bytes
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, Self

from estargz._inflate import InflateReader, detect, read_chunk
from estargz.errors import BlobError, SourceError, UsageError, VerificationError
from estargz.reading.source import Readable, Source, Window, open_source
from estargz.reading.toc import TOC_NAME, TOCEntry, check_layout, clean_name, parse_toc

__all__ = ["Blob", "Chunk", "Footer", "open", "open_tar", "parse_digest", "read_footer"]

MAX_TOC_SIZE = 1 << 30  # bytes of JSON: about three million entries
MAX_CHUNK_SIZE = 1 << 30  # bytes held in memory until their digest is known
_TAR_BLOCK = 512
_TOC_TAIL_MAX = 1 << 20  # zeros after the JSON; writers emit less than 2 KiB, tar(1) up to 10 KiB


class Tar(Protocol):
    """A tar stream to read from."""

    def read(self, size: int = -1, /) -> bytes: ...
    def readinto(self, buffer: Any, /) -> int | None: ...


class Footer(NamedTuple):
    """What the last bytes of a blob say. format: "estargz", "legacy" (47-byte footer) or "external" (no TOC inside)."""

    format: str
    size: int
    toc_offset: int


class Chunk(NamedTuple):
    """A part of a file. Offsets and sizes are in bytes; [offset, end) is compressed, the rest is not."""

    offset: int
    end: int
    inner_offset: int
    chunk_offset: int
    size: int
    digest: str


# --------------------------------------------------------------------------------------------------------------------
# footer


# format, total size, extra field around the TOC offset; each is a gzip header and an empty deflate stream
_FOOTERS = (
    ("estargz", 51, b"\x1a\x00SG\x16\x00", b"STARGZ"),
    ("legacy", 47, b"\x16\x00", b"STARGZ"),
    ("external", 46, b"\x15\x00SG\x11\x00", b"STARGZEXTERNALTOC"),
)
_GZIP_WITH_EXTRA = b"\x1f\x8b\x08\x04"


def read_footer(tail: bytes, size: int, *, name: str = "blob") -> Footer | None:
    """The footer in the last 51 bytes of a blob of ``size`` bytes; None when there is none.

    Raises BlobError for a footer whose TOC offset is not 16 hexadecimal digits or does not lie inside the blob.
    """
    for kind, length, before, after in _FOOTERS:
        footer = tail[-length:]
        start = 10 + len(before)
        digits = 0 if kind == "external" else 16
        if (
            len(footer) == length
            and footer.startswith(_GZIP_WITH_EXTRA)
            and footer[10:start] == before
            and footer[start + digits : start + digits + len(after)] == after
        ):
            return Footer(kind, length, _toc_offset(footer[start : start + digits], size - length, name))
    return None


def _toc_offset(digits: bytes, end: int, name: str) -> int:
    if not digits:
        return end
    if not re.fullmatch(rb"[0-9a-fA-F]{16}", digits):
        raise BlobError(
            f"{name}: the footer at byte {end} holds {digits!r} where 16 hexadecimal digits belong; "
            "the blob is damaged, fetch it again"
        )
    offset = int(digits, 16)
    if offset >= end:
        raise BlobError(
            f"{name}: the footer at byte {end} places the TOC at byte {offset}, outside the blob; "
            "the blob is truncated or damaged, fetch it again"
        )
    return offset


def footer_of(source: Source) -> Footer | None:
    tail = min(source.size, 51)
    return read_footer(source.exactly(source.size - tail, tail), source.size, name=source.name)


def _require_footer(source: Source) -> Footer:
    footer = footer_of(source)
    if footer is None:
        kind = detect(source.read_at(0, 4))
        what = "is no compressed layer" if kind == "plain" else f"is an ordinary {kind} stream"
        raise BlobError(
            f"{source.name}: {what}, it has no eStargz footer; build it with --compression estargz, "
            "or check an ordinary layer by its DiffID alone"
        )
    if footer.format == "external":
        raise BlobError(f"{source.name}: keeps its TOC in another image, which estargz does not read")
    return footer


# --------------------------------------------------------------------------------------------------------------------
# digests


_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")


def parse_digest(text: str, what: str = "digest") -> bytes:
    """The 32 bytes of "sha256:" and 64 lower-case hexadecimal digits. Raises UsageError for anything else."""
    match = _DIGEST.fullmatch(text)
    if match is None:
        raise UsageError(f"{what} {text!r} is not sha256: followed by 64 lower-case hexadecimal digits")
    return bytes.fromhex(match[1])


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


@contextmanager
def blob_errors(where: str = "") -> Iterator[None]:
    """What is a damaged source to a decoder is a damaged blob here."""
    try:
        yield
    except BlobError:
        raise
    except SourceError as error:
        raise BlobError(f"{where}{error}") from error


# --------------------------------------------------------------------------------------------------------------------
# blob


class Blob:
    """An eStargz blob that is open for reading; made by open(), to be closed, best by ``with``.

    toc_digest:  "sha256:..." of the TOC's JSON
    toc_offset:  where the TOC's member begins: compressed bytes of the tar
    size:        bytes of the blob
    footer:      its Footer
    entries:     the TOC, in the order of the tar, chunks after their file. This is the view that lazily pulling
                 runtimes serve; it equals the tar's only after verify()

    Names are cleaned to be relative to the root; of entries with the same name the last one counts. Methods may be used
    from several threads. Every method that returns file content raises BlobError when the blob's data is damaged, and
    VerificationError when it is not what the TOC promises.
    """

    def __init__(self, source: Source, toc_digest: str | None, max_toc_size: int) -> None:
        wanted = None if toc_digest is None else parse_digest(toc_digest, "TOC digest")
        self._source = source
        self.name = source.name
        self.size = source.size
        self.footer = _require_footer(source)
        self.toc_offset = self.footer.toc_offset
        data, self.toc_end = self._read_toc(max_toc_size)
        self.toc_digest = sha256(data)
        self.toc_size = len(data)
        if wanted is not None and self.toc_digest != toc_digest:
            raise VerificationError(
                f"{self.name}: TOC digest: expected {toc_digest}, found {self.toc_digest} at byte {self.toc_offset}; "
                "the blob is not the one that the digest was made for"
            )
        self.entries: list[TOCEntry] = parse_toc(data, name=f"{self.name}: TOC").entries
        del data
        self._ends = check_layout(self.entries, self.toc_offset, self.name)
        self._positions = {
            clean_name(entry.name): index for index, entry in enumerate(self.entries) if entry.type != "chunk"
        }

    def _read_toc(self, limit: int) -> tuple[bytes, int]:
        """The JSON bytes and where their member ends in the blob. Never inflates more than ``limit`` of JSON."""
        compressed = self.size - self.footer.size - self.toc_offset
        if compressed > limit:
            raise _too_large(self.name, compressed, limit)
        window = Window(self._source, self.toc_offset, self.toc_offset + compressed)
        with blob_errors():
            reader = InflateReader(window, "gzip", name=f"{self.name}: TOC", single=True)
            size = _toc_header(reader.read(_TAR_BLOCK), self.name)
            if size > limit:
                raise _too_large(self.name, size, limit)
            data = reader.read(size)
            tail = reader.read(_TOC_TAIL_MAX)
        if len(data) != size:
            raise BlobError(
                f"{self.name}: the first gzip member of the TOC ends after {len(data)} of {size} bytes; "
                "a TOC must be one member, build the blob again"
            )
        if tail.count(0) != len(tail) or len(tail) == _TOC_TAIL_MAX:
            raise BlobError(f"{self.name}: something follows the TOC in its member; build the blob again")
        return data, self.toc_offset + reader.offset

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the file back; closing twice does no harm."""
        self._source.close()

    def __contains__(self, path: str) -> bool:
        return clean_name(path) in self._positions

    def lookup(self, path: str) -> TOCEntry:
        """The entry of ``path``; links are not followed. Raises FileNotFoundError."""
        return self.entries[self._position(path)]

    def chunks(self, path: str) -> list[Chunk]:
        """The parts of a regular file in order, hard links followed; empty for an empty file.

        A chunk's digest is "" when the TOC states none for it. Raises FileNotFoundError, BlobError.
        """
        return self.chunks_at(self._file(path))

    def read(self, path: str) -> bytes:
        """The content of a regular file, hard links followed. Raises FileNotFoundError, BlobError."""
        return b"".join(self.stream(path))

    def stream(self, path: str) -> Iterator[bytes]:
        """The content of a regular file in parts, each checked before it is given out, hard links followed.

        A part is one chunk, except that a file of several chunks without digests of their own (made before they were
        introduced) comes as one. After the last part the digest of the whole file is checked too. Parts above 1 GiB
        are refused. Raises FileNotFoundError and BlobError, at once or while being consumed.
        """
        index = self._file(path)
        return self._verified(self.entries[index], self.chunks_at(index))

    def open_tar(self) -> Tar:
        """The original tar stream, as it was before the TOC was appended: has read() and readinto().

        It is checked by gzip's CRC-32 only. Raises BlobError while being read.
        """
        if self.toc_offset == 0:
            return io.BytesIO()
        window = Window(self._source, 0, self.toc_offset)
        return InflateReader(window, "gzip", name=self.name, strict=True)

    def raw(self, begin: int, end: int) -> Window:
        """The compressed bytes [begin, end), for stages that inflate them."""
        return Window(self._source, begin, end)

    @property
    def kernel_source(self) -> int | memoryview | None:
        """What check_chunks reads: a descriptor or a buffer; None for a RangeReader."""
        return self._source.kernel

    def _position(self, path: str) -> int:
        try:
            return self._positions[clean_name(path)]
        except KeyError:
            raise FileNotFoundError(2, "no such entry in the TOC", f"{self.name}: {path}") from None

    def _file(self, path: str) -> int:
        """Index of the regular file that a path means, through hard links."""
        index = self._position(path)
        seen = {index}
        while (entry := self.entries[index]).type == "hardlink":
            following = self._positions.get(clean_name(entry.link_name))
            if following is None:
                raise BlobError(f"{self.name}: {entry.name!r} links to {entry.link_name!r}, which is not there")
            if following in seen:
                raise BlobError(f"{self.name}: {path!r} is a hard link that leads back to itself")
            seen.add(following)
            index = following
        if entry.type != "reg":
            raise BlobError(f"{self.name}: {path!r} is of type {entry.type}, only regular files have content")
        return index

    def chunks_at(self, index: int) -> list[Chunk]:
        """The parts of the regular file that stands at ``index`` in entries, even if a later entry hides it."""
        file = self.entries[index]
        if file.size == 0:
            return []
        parts = []
        for i in range(index, len(self.entries)):
            entry = self.entries[i]
            if i > index and entry.type != "chunk":
                break
            size = entry.chunk_size or file.size - entry.chunk_offset
            digest = entry.chunk_digest or (file.digest if size == file.size else "")
            parts.append(Chunk(entry.offset, self._ends[i], entry.inner_offset, entry.chunk_offset, size, digest))
        return parts

    def _verified(self, file: TOCEntry, chunks: list[Chunk]) -> Iterator[bytes]:
        if not file.digest and file.size and not all(chunk.digest for chunk in chunks):
            raise BlobError(f"{self.name}: {file.name!r} has no digest in the TOC, so its content cannot be trusted")
        if not all(chunk.digest for chunk in chunks):
            yield self._whole(file, chunks)
            return
        whole = hashlib.sha256()
        for chunk in chunks:
            data = self._chunk(file, chunk)
            _expect(self.name, file, chunk, chunk.digest, sha256(data))
            if file.digest and len(chunks) > 1:
                whole.update(data)
            yield data
        if file.digest and len(chunks) > 1:
            _expect(self.name, file, chunks[0], file.digest, "sha256:" + whole.hexdigest())

    def _whole(self, file: TOCEntry, chunks: list[Chunk]) -> bytes:
        if file.size > MAX_CHUNK_SIZE:
            raise _chunk_too_large(self.name, file, file.size)
        data = b"".join(self._chunk(file, chunk) for chunk in chunks)
        _expect(self.name, file, chunks[0], file.digest, sha256(data))
        return data

    def _chunk(self, file: TOCEntry, chunk: Chunk) -> bytes:
        """The chunk's bytes, not verified yet."""
        if chunk.size > MAX_CHUNK_SIZE:
            raise _chunk_too_large(self.name, file, chunk.size)
        label = f"{self.name}: {file.name!r}, chunk at {chunk.chunk_offset}"
        with blob_errors():
            if self._source.kernel is not None:
                return read_chunk(
                    self._source.kernel, chunk.offset, chunk.end, chunk.inner_offset, chunk.size, name=label
                )
            window = Window(self._source, chunk.offset, chunk.end)
            reader = InflateReader(window, "gzip", name=label, strict=True)
            _skip(reader, chunk.inner_offset)
            data = reader.read(chunk.size)
        if len(data) != chunk.size:
            raise BlobError(f"{label}: its member ends after {len(data)} of {chunk.size} bytes; the blob is damaged")
        return data


def _skip(reader: InflateReader, size: int) -> None:
    scratch = bytearray(1 << 18)
    while size:
        count = reader.readinto(memoryview(scratch)[:size])
        if count == 0:
            return
        size -= count


def _expect(name: str, file: TOCEntry, chunk: Chunk, wanted: str, found: str) -> None:
    if found != wanted:
        raise VerificationError(
            f"{name}: {file.name!r}, chunk at {chunk.chunk_offset} (blob offset {chunk.offset}): "
            f"expected {wanted}, found {found}; the blob was altered or damaged, fetch it again"
        )


def _too_large(name: str, size: int, limit: int) -> BlobError:
    return BlobError(f"{name}: the TOC takes {size} bytes, over {limit}; raise max_toc_size if you trust the blob")


def _chunk_too_large(name: str, file: TOCEntry, size: int) -> BlobError:
    return BlobError(f"{name}: {file.name!r} has a chunk of {size} bytes, over {MAX_CHUNK_SIZE}; unpack it instead")


def _toc_header(header: bytes, name: str) -> int:
    """The size of the JSON, from its tar header (512 bytes)."""
    if len(header) != _TAR_BLOCK or header[:100].rstrip(b"\0") != TOC_NAME.encode() or header[345:500].strip(b"\0"):
        raise BlobError(f"{name}: the footer leads to no {TOC_NAME}; the blob is damaged or made by a faulty builder")
    total = sum(header) - sum(header[148:156]) + 8 * 0x20
    size = header[124:136].strip(b" \0")
    if _octal(header[148:156].strip(b" \0")) != total or _octal(size) is None or header[156:157] not in (b"0", b"\0"):
        raise BlobError(f"{name}: the tar header of {TOC_NAME} is malformed; the blob is damaged, fetch it again")
    return int(size, 8)


def _octal(digits: bytes) -> int | None:
    return int(digits, 8) if re.fullmatch(rb"[0-7]{1,11}", digits) else None


def open(source: Readable, *, toc_digest: str | None = None, max_toc_size: int = MAX_TOC_SIZE) -> Blob:
    """Open an eStargz blob.

    source:        a path, a file with a descriptor (duplicated, its position is left alone), bytes, or a RangeReader
    toc_digest:    "sha256:..." that the TOC must have; without it a TOC is believed as it stands in the blob
    max_toc_size:  most bytes that the TOC may take, compressed and inflated; it is hashed before it is parsed

    Raises UsageError for a malformed digest, OSError, BlobError for a blob that is no eStargz or is malformed, and
    VerificationError for another TOC digest.
    """
    opened = open_source(source)
    try:
        return Blob(opened, toc_digest, max_toc_size)
    except BaseException:
        opened.close()
        raise


def begins_like_tar(block: bytes) -> bool:
    """Whether 512 bytes are a zero block or a header whose checksum is right (POSIX ustar, unsigned or signed)."""
    if len(block) < 512:
        return False
    stated = block[148:156].strip(b" \0")
    rest = block[:148] + b" " * 8 + block[156:]
    sums = {sum(rest), sum(byte - 256 if byte > 127 else byte for byte in rest)}
    return not any(block) or (stated.isdigit() and int(stated, 8) in sums if set(stated) <= set(b"01234567") else False)


@contextmanager
def open_tar(source: Readable) -> Iterator[Tar]:
    """The tar inside a layer of any kind: an eStargz blob's original tar, or a gzip, zstd or plain stream's content.

    The TOC of an eStargz blob is neither read nor included. Raises OSError, and BlobError or SourceError while being
    read.
    """
    opened = open_source(source)
    try:
        footer = footer_of(opened)
        end = opened.size if footer is None else footer.toc_offset
        kind = detect(opened.read_at(0, 4))
        window = Window(opened, 0, end)
        if kind == "plain" and footer is None and not begins_like_tar(opened.read_at(0, 512)):
            raise BlobError(f"{opened.name}: is neither a compressed layer nor a tar; check that it is the right file")
        with blob_errors():
            yield io.BytesIO() if end == 0 else InflateReader(window, kind, name=opened.name, strict=footer is not None)
    finally:
        opened.close()
