"""How the end of a blob is read: footer -> TOC member -> tar header -> JSON bytes, none of them trusted with a size."""

from __future__ import annotations

import hashlib
import re
from collections import deque
from typing import NamedTuple

from estargz._inflate import InflateReader, detect
from estargz.errors import BlobError, VerificationError
from estargz.reading.source import Source, Window, blob_errors
from estargz.reading.toc import TOC_NAME

__all__ = ["FOOTER_MAX", "Footer", "StoredTOC", "footer_of", "read_footer", "read_toc", "require_footer"]

FOOTER_MAX = 51
_PIECE = 1 << 20  # bytes of JSON that are decoded at a time
_TAR_BLOCK = 512
_TOC_TAIL_MAX = 1 << 20  # zeros after the JSON; writers emit less than 2 KiB, tar(1) up to 10 KiB


class Footer(NamedTuple):
    """What the last bytes of a blob say. format: "estargz", "legacy" (47-byte footer) or "external" (no TOC inside)."""

    format: str
    size: int
    toc_offset: int


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
    tail = min(source.size, FOOTER_MAX)
    return read_footer(source.exactly(source.size - tail, tail), source.size, name=source.name)


def require_footer(source: Source) -> Footer:
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


class StoredTOC(NamedTuple):
    """The JSON of a table of contents as the blob holds it: in pieces, their total size and digest, and where the member
    ends in the blob."""

    pieces: deque[bytes]
    size: int
    digest: str
    end: int


def read_toc(source: Source, footer: Footer, limit: int, wanted: str | None) -> StoredTOC:
    """Read the table's bytes, never more than ``limit`` of them, compressed or inflated.

    Raises BlobError for a malformed member, VerificationError when ``wanted`` is given and is not its digest: then nobody
    needs to decode it.
    """
    name = source.name
    compressed = source.size - footer.size - footer.toc_offset
    if compressed > limit:
        raise _too_large(name, compressed, limit)
    source.prefetch([(footer.toc_offset, compressed)])
    window = Window(source, footer.toc_offset, footer.toc_offset + compressed)
    pieces: deque[bytes] = deque()
    whole = hashlib.sha256()
    with blob_errors():
        reader = InflateReader(window, "gzip", name=f"{name}: TOC", single=True)
        size = _toc_header(reader.read(_TAR_BLOCK), name)
        if size > limit:
            raise _too_large(name, size, limit)
        left = size
        while left and (piece := reader.read(min(left, _PIECE))):
            pieces.append(piece)
            whole.update(piece)
            left -= len(piece)
        tail = reader.read(_TOC_TAIL_MAX)
    if left:
        raise BlobError(
            f"{name}: the first gzip member of the TOC ends after {size - left} of {size} bytes; "
            "a TOC must be one member, build the blob again"
        )
    if tail.count(0) != len(tail) or len(tail) == _TOC_TAIL_MAX:
        raise BlobError(f"{name}: something follows the TOC in its member; build the blob again")
    digest = "sha256:" + whole.hexdigest()
    if wanted is not None and digest != wanted:
        raise VerificationError(
            f"{name}: TOC digest: expected {wanted}, found {digest} at byte {footer.toc_offset}; "
            "the blob is not the one that the digest was made for"
        )
    return StoredTOC(pieces, size, digest, footer.toc_offset + reader.offset)


def _too_large(name: str, size: int, limit: int) -> BlobError:
    return BlobError(f"{name}: the TOC takes {size} bytes, over {limit}; raise the limit if you trust the blob")


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
