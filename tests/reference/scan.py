"""A tar read plainly: one dictionary per entry, and the same as the rows that the compiled scan gives."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from fractions import Fraction
from math import floor
from types import SimpleNamespace
from typing import Any

import numpy as np

from estargz.errors import TarError

BLOCK = 512
ROW = np.dtype(
    [
        ("strings_at", "<i8"),
        ("name_len", "<u4"),
        ("link_len", "<u4"),
        ("xattrs_len", "<u4"),
        ("user_name_len", "<u2"),
        ("group_name_len", "<u2"),
        ("mode", "<i8"),
        ("uid", "<i8"),
        ("gid", "<i8"),
        ("size", "<i8"),
        ("mtime_s", "<i8"),
        ("offset", "<i8"),
        ("inner_offset", "<i8"),
        ("first_chunk", "<i8"),
        ("chunk_count", "<u4"),
        ("type", "u1"),
        ("has_digest", "u1"),
        ("has_mtime", "u1"),
        ("reserved", "u1"),
        ("dev_major", "<u4"),
        ("dev_minor", "<u4"),
        ("digest", "u1", (32,)),
    ]
)


def number(field: bytes) -> int:
    if field[:1] and field[0] & 0x80:
        value = int.from_bytes(field, "big") & ~(1 << (8 * len(field) - 1))
        bits = 8 * len(field) - 1
        return value - (1 << bits) if value >> (bits - 1) else value
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        raise TarError(f"bad number {field!r}") from None


def text(field: bytes) -> bytes:
    return field.split(b"\0", 1)[0]


def records(payload: bytes) -> dict[bytes, bytes]:
    found = {}
    while payload:
        length = int(payload.split(b" ", 1)[0])
        key, value = payload[:length].split(b" ", 1)[1][:-1].split(b"=", 1)
        found[key] = value
        payload = payload[length:]
    return found


def entries(tar: bytes) -> Iterator[dict[str, Any]]:
    """Entries with extensions applied; data_at is where the payload begins."""
    at = 0
    pending: dict[bytes, bytes] = {}
    while at < len(tar) and tar[at : at + BLOCK].strip(b"\0"):
        header = tar[at : at + BLOCK]
        total = sum(header) - sum(header[148:156]) + 256
        if number(header[148:156]) != total:
            raise TarError(f"bad checksum at {at}")
        kind, size = header[156:157].replace(b"\0", b"0"), number(header[124:136])
        at += BLOCK
        payload = tar[at : at + size]
        if kind == b"x":
            pending |= records(payload)
        elif kind in b"LK":
            pending[b"path" if kind == b"L" else b"linkpath"] = payload.rstrip(b"\0")
        else:
            entry = _entry(header, kind, pending)
            if kind != b"0":
                entry["size"] = 0
            yield entry | {"data_at": at, "payload": tar[at : at + entry["size"]]}
            size, pending = entry["size"], {}
        at += size + -size % BLOCK


def _entry(header: bytes, kind: bytes, pax: dict[bytes, bytes]) -> dict[str, Any]:
    prefix = text(header[345:500]) if header[257:263] == b"ustar\0" else b""
    name = (prefix + b"/" if prefix else b"") + text(header[:100])
    named = header[257:262] == b"ustar"
    device = named and kind in b"34"
    return {
        "name": pax.get(b"path", name),
        "type": ord(kind),
        "link": pax.get(b"linkpath", text(header[157:257])) if kind in b"12" else b"",
        "mode": number(header[100:108]),
        "uid": int(pax.get(b"uid", number(header[108:116]))),
        "gid": int(pax.get(b"gid", number(header[116:124]))),
        "size": int(pax.get(b"size", number(header[124:136]))),
        "mtime": Fraction(pax[b"mtime"].decode()) if b"mtime" in pax else Fraction(number(header[136:148])),
        "user_name": pax.get(b"uname", text(header[265:297]) if named else b""),
        "group_name": pax.get(b"gname", text(header[297:329]) if named else b""),
        "dev_major": number(header[329:337]) if device else 0,
        "dev_minor": number(header[337:345]) if device else 0,
        "xattrs": {k[13:]: v for k, v in sorted(pax.items()) if k.startswith(b"SCHILY.xattr.")},
    }


def toc_time(mtime: Fraction) -> int:
    """Half a second and more rounds up; a time within the epoch's first second counts as none."""
    return 0 if floor(mtime) == 0 else floor(mtime + Fraction(1, 2))


def scan_tar(stream: Any) -> SimpleNamespace:
    """What the compiled scan of the same stream must give."""
    tar = b"".join(iter(lambda: stream.read(1 << 16), b""))
    rows, strings = [], b""
    users: dict[int, bytes] = {}
    groups: dict[int, bytes] = {}
    for entry in entries(tar):
        packed = b"".join(
            len(k).to_bytes(4, "little") + len(v).to_bytes(4, "little") + k + v for k, v in entry["xattrs"].items()
        )
        user = _news(users, entry["uid"], entry["user_name"])
        group = _news(groups, entry["gid"], entry["group_name"])
        row = np.zeros((), ROW)
        for key in ("type", "mode", "uid", "gid", "size", "dev_major", "dev_minor"):
            row[key] = entry[key]
        row["mtime_s"], row["has_mtime"] = toc_time(entry["mtime"]), floor(entry["mtime"]) != 0
        row["strings_at"] = len(strings)
        parts = {"name": entry["name"], "link": entry["link"], "user_name": user, "group_name": group, "xattrs": packed}
        for key, value in parts.items():
            row[f"{key}_len"] = len(value)
            strings += value
        if entry["size"]:
            row["offset"] = entry["data_at"]
        if entry["type"] == ord("0"):
            row["has_digest"] = 1
            row["digest"] = np.frombuffer(hashlib.sha256(entry["payload"]).digest(), np.uint8)
        rows.append(row)
    found = "sha256:" + hashlib.sha256(tar).hexdigest()
    return SimpleNamespace(rows=np.array(rows, ROW), strings=strings, diff_id=found, size=len(tar), ending=ending(tar))


def ending(tar: bytes) -> SimpleNamespace:
    """Where the archive ends, how many zero blocks say so (at most 2), and where anything else follows them."""
    last = list(entries(tar))[-1:]
    at = last[0]["data_at"] + last[0]["size"] + -last[0]["size"] % BLOCK if last else 0
    rest = tar[at:]
    zero_blocks = sum(1 for i in (0, BLOCK) if rest[: i + BLOCK] == bytes(i + BLOCK))
    hidden = len(rest) - len(rest.lstrip(b"\0"))
    hidden_at = at + hidden // BLOCK * BLOCK if hidden < len(rest) else -1
    return SimpleNamespace(at=at if zero_blocks else -1, zero_blocks=zero_blocks, hidden_at=hidden_at)


def _news(known: dict[int, bytes], number: int, name: bytes) -> bytes:
    """The name when it differs from the last one told for the number."""
    if not name or known.get(number) == name:
        return b""
    known[number] = name
    return name
