"""Mutations that know the format: what plain bytes cannot get past (checksums, lengths, compression) is put right again.

Each takes an input, the room for its successor, and a seed. ``libfuzzer.mutate`` changes a part as libFuzzer does a whole.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

import zstandard
from libfuzzer import mutate as plain
from reference import blobs
from reference.tar_headers import BLOCK, FIELDS, GNU, USTAR, V7, meta, padded, plain_header, record, seal

from .python_mutation import change_json

__all__ = ["any_bytes", "blob", "compressed", "tar", "toc"]

Mutator = Callable[[bytes, int, int], bytes]

INFLATED_MOST = 1 << 16
KEYS = b"path linkpath mtime size uid gid uname gname atime ctime comment hdrcharset SCHILY.xattr.user.a SCHILY.xattr.".split()
KEYS += (
    b"GNU.sparse.major GNU.sparse.minor GNU.sparse.map GNU.sparse.offset GNU.sparse.numbytes GNU.sparse.name".split()
)
KEYS += b"GNU.sparse.size GNU.sparse.realsize GNU.sparse.numblocks SCHILY.xattr.security.capability charset".split()
VALUES = b"0 1 -1 +1 00 0.5 -0.5 1. .5 1e3 512 513 1048576 8589934592 9223372036854775807 9223372036854775808".split()
VALUES += [
    b"",
    b"a",
    b"a/",
    b"/",
    b"..",
    b"../../a",
    b"./a",
    b"a\0b",
    b"\xff\xfe",
    "é".encode(),
    b" 1",
    b"1 ",
    b"a=b",
    b"\n",
]
VALUES += [
    b"stargz.index.json",
    b"./stargz.index.json",
    b".wh.a",
    b"a/.wh..wh..opq",
    b".prefetch.landmark",
    b"d/" * 60 + b"f",
]
NUMBERS = [
    b"",
    b"\0" * 12,
    b" " * 12,
    b"7" * 12,
    b"0000001\0",
    b"00000000001\0",
    b"00000001000",
    b" 1 0 ",
    b"-1",
    b"8",
    b"+1",
]
NUMBERS += [
    b"\x80" + bytes(11),
    b"\xff" * 12,
    b"\x80\0\0\0\x7f" + b"\xff" * 7,
    b"\x80\0\0\0\xff" + b"\xff" * 7,
    b"0o7",
    b"1_0",
]
TYPES = b"\x000123456xgLKSVDMNX7A"
MAGICS = [USTAR, GNU, V7, b"ustar\x00\x00\x00", b"ustar \0", b"ustar  \x01"]


def any_bytes(data: bytes, room: int, seed: int) -> bytes:
    return plain(data, room)


# --------------------------------------------------------------------------------------------------------------------
# tar


def tar(data: bytes, room: int, seed: int) -> bytes:
    """Blocks and records of a tar; headers are sealed again, but for a few."""
    random = Random(seed)
    if random.random() < 0.1:
        return plain(data, room)
    parts = _parts(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        random.choice(TAR_CHANGES)(parts, random)
    made = b"".join(header + payload for header, payload in parts)
    if random.random() < 0.1:
        made = made[: random.randrange(len(made) + 1)]
    return made[:room]


def _parts(data: bytes) -> list[tuple[bytes, bytes]]:
    """Headers with what follows each of them, as far as sizes can be believed."""
    parts, at = [], 0
    while at < len(data):
        header = data[at : at + BLOCK]
        at += len(header)
        size = _size(header)
        end = at + (size + -size % BLOCK if size <= len(data) - at and header[156:157] not in b"123456" else 0)
        parts.append((header, data[at:end]))
        at = end
    return parts


def _size(header: bytes) -> int:
    """As the header states it; 0 where it states no number."""
    text = header[124:136].strip(b"\0 ")
    return int(text, 8) if text and not text.strip(b"01234567") else 0


def _sized(header: bytes, payload: bytes) -> tuple[bytes, bytes]:
    """The part with the size that its payload has."""
    return seal(header[:124] + b"%011o\0" % len(payload) + header[136:]), padded(payload)


def _change_field(parts: list[tuple[bytes, bytes]], random: Random) -> None:
    at = random.randrange(len(parts)) if parts else 0
    if not parts or len(parts[at][0]) < BLOCK:
        return
    header, payload = parts[at]
    name = random.choice(list(FIELDS))
    begin, width = FIELDS[name]
    if name == "type":
        value = bytes([random.choice(TYPES)])
    elif name == "magic":
        value = random.choice(MAGICS)
    elif width in (8, 12) and random.random() < 0.7:
        value = random.choice(NUMBERS)
    elif random.random() < 0.5:
        value = random.choice(VALUES)
    else:
        value = plain(header[begin : begin + width], width)
    value = (
        value[:width].ljust(width, b"\0") if random.random() < 0.8 else (value + header[begin + len(value) :])[:width]
    )
    header = header[:begin] + value + header[begin + width :]
    parts[at] = (header if name == "checksum" else seal(header, random.random() < 0.1), payload)


def _change_payload(parts: list[tuple[bytes, bytes]], random: Random) -> None:
    candidates = [i for i, (header, payload) in enumerate(parts) if payload and len(header) == BLOCK]
    if not candidates:
        return
    at = random.choice(candidates)
    header, payload = parts[at]
    payload = payload[: _size(header)] or payload
    if header[156:157] == b"x" and random.random() < 0.7:
        payload = _changed_records(payload, random)
    else:
        payload = plain(payload, len(payload) + 64)
    parts[at] = _sized(header, payload)


def _changed_records(payload: bytes, random: Random) -> bytes:
    lines = payload.splitlines(keepends=True)
    at = random.randrange(len(lines) + 1)
    kind = random.randrange(4)
    if kind == 0 and at < len(lines):
        del lines[at]
    elif kind == 1 and at < len(lines):
        body = plain(lines[at].partition(b" ")[2][:-1], len(lines[at]) + 32)
        key, _, value = body.partition(b"=")
        lines[at] = record(key, value)
    else:
        lines.insert(at, record(random.choice(KEYS), random.choice(VALUES)))
    return b"".join(lines)


def _insert(parts: list[tuple[bytes, bytes]], random: Random) -> None:
    kind = random.randrange(5)
    if kind == 0:
        made = meta(b"".join(record(random.choice(KEYS), random.choice(VALUES)) for _ in range(random.randrange(1, 4))))
    elif kind == 1:
        made = meta(random.choice(VALUES) + random.choice((b"", b"\0", b"\0a")), bytes([random.choice(b"LKgx")]))
    elif kind == 2:
        made = bytes(BLOCK * random.randrange(1, 4))
    else:
        data = random.randbytes(random.choice((0, 0, 1, 511, 512, 513, 1500)))
        name, kinds = random.choice(VALUES)[:100], bytes([random.choice(TYPES)])
        made = plain_header(name, type=kinds, size=b"%011o\0" % len(data), link=random.choice(VALUES)[:100]) + padded(
            data
        )
    parts.insert(random.randrange(len(parts) + 1), (made[:BLOCK], made[BLOCK:]))


def _remove(parts: list[tuple[bytes, bytes]], random: Random) -> None:
    if parts:
        del parts[random.randrange(len(parts))]


def _double(parts: list[tuple[bytes, bytes]], random: Random) -> None:
    if parts:
        parts.insert(random.randrange(len(parts) + 1), random.choice(parts))


def _swap(parts: list[tuple[bytes, bytes]], random: Random) -> None:
    if parts:
        parts.insert(random.randrange(len(parts)), parts.pop(random.randrange(len(parts))))


TAR_CHANGES = [_change_field, _change_field, _change_payload, _change_payload, _insert, _remove, _double, _swap]


# --------------------------------------------------------------------------------------------------------------------
# compressed streams


def compressed(data: bytes, room: int, seed: int) -> bytes:
    """Members and frames: what is in them, their headers, their number and their order."""
    random = Random(seed)
    kind = random.randrange(6)
    if kind == 0:
        return plain(data, room)
    members = _members(data)
    at = random.randrange(len(members)) if members else 0
    if kind == 1 or not members:
        members.insert(at, _pack(random.randbytes(random.randrange(64)) * random.randrange(1, 64), random))
    elif kind == 2:
        members[at] = plain(members[at], len(members[at]) + 16)
    elif kind == 3:
        members.insert(random.randrange(len(members) + 1), members.pop(at))
    elif kind == 4:
        members.insert(random.randrange(len(members) + 1), members[at])
    else:
        inflated = _inflated(members[at])
        members[at] = _pack(plain(inflated, len(inflated) + 64), random)
    return b"".join(members)[:room]


def _members(data: bytes) -> list[bytes]:
    """Members and frames as they follow each other, and a rest that is neither."""
    members = []
    while data:
        inflater: Any = (
            zlib.decompressobj(31) if data[:2] == b"\x1f\x8b" else zstandard.ZstdDecompressor().decompressobj()
        )
        try:
            inflater.decompress(data, INFLATED_MOST) if data[:2] == b"\x1f\x8b" else inflater.decompress(data)
        except (zlib.error, zstandard.ZstdError):
            break
        if not inflater.eof:
            break
        members.append(data[: len(data) - len(inflater.unused_data)])
        data = inflater.unused_data
    return members + [data] * (data != b"")


def _inflated(member: bytes) -> bytes:
    try:
        if member[:2] == b"\x1f\x8b":
            return zlib.decompressobj(31).decompress(member, INFLATED_MOST)
        return zstandard.ZstdDecompressor().decompressobj().decompress(member)[:INFLATED_MOST]
    except (zlib.error, zstandard.ZstdError):
        return member


def _pack(data: bytes, random: Random) -> bytes:
    kind = random.randrange(6)
    if kind == 0:
        return zstandard.ZstdCompressor(random.randrange(1, 4), write_checksum=random.random() < 0.5).compress(data)
    if kind == 1:
        return struct.pack("<II", 0x184D2A50 + random.randrange(16), len(data)) + data
    deflate = zlib.compressobj(random.choice((0, 1, 9)), zlib.DEFLATED, -15, 9, random.randrange(5))
    middle = random.randrange(len(data) + 1)
    body = deflate.compress(data[:middle]) + deflate.flush(random.choice((zlib.Z_NO_FLUSH, zlib.Z_FULL_FLUSH)))
    body += deflate.compress(data[middle:]) + deflate.flush()
    flags = random.choice((0, 0, 0, 1, 2, 4, 8, 16, 31))
    header = b"\x1f\x8b\x08" + bytes([flags]) + bytes(4) + b"\0\xff"
    header += b"\x03\0abc" * bool(flags & 4) + b"name\0" * bool(flags & 8) + b"comment\0" * bool(flags & 16)
    header += struct.pack("<H", zlib.crc32(header) & 0xFFFF) * bool(flags & 2)
    return header + body + struct.pack("<II", zlib.crc32(data), len(data))


# --------------------------------------------------------------------------------------------------------------------
# tables of contents and whole blobs


def toc(data: bytes, room: int, seed: int) -> bytes:
    made = change_json(data, seed) if seed % 8 else None
    return plain(data, room) if made is None or len(made) > room else made


def blob(data: bytes, room: int, seed: int) -> bytes:
    """A blob anew from a changed tar, with a changed table, or with changed members between its parts."""
    random = Random(seed)
    kind = random.randrange(5)
    offset = _footer_offset(data)
    if kind == 0 or offset is None:
        return plain(data, room)
    payload, rest = data[:offset], data[offset:-51]
    text = _table(rest)
    if kind == 1:
        made = _rebuilt(b"".join(map(_inflated, _members(payload))), room, random)
        return made if made is not None and len(made) <= room else plain(data, room)
    if kind == 2:
        payload = compressed(payload, room, random.randrange(1 << 30))
    else:
        text = toc(text, room, random.randrange(1 << 30))
    footer = blobs.footer if random.random() < 0.9 else blobs.legacy_footer
    return blobs.assemble(payload, text, make_footer=footer)[:room]


def _footer_offset(data: bytes) -> int | None:
    digits = data[-35:-19]
    offset = int(digits, 16) if len(digits) == 16 and not digits.lower().strip(b"0123456789abcdef") else len(data)
    return offset if offset < len(data) - 51 else None


def _table(member: bytes) -> bytes:
    inflated = _inflated(member)
    size = inflated[124:135]
    return inflated[BLOCK : BLOCK + int(size, 8)] if size and not size.strip(b"01234567") else b""


def _rebuilt(stream: bytes, room: int, random: Random) -> bytes | None:
    """None where the plain writer cannot make one of it."""
    try:
        changed = tar(stream, room, random.randrange(1 << 30))
        return blobs.estargz(
            changed, chunk_size=random.choice((1, 7, 512, 1 << 22)), min_chunk=random.choice((0, 0, 40, 4000))
        )
    except Exception:
        return None
