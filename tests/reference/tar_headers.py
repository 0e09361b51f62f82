"""Tar headers written plainly, to hold the compiled emitter against, and raw blocks to feed the parser with."""

from __future__ import annotations

import posixpath

BLOCK = 512
NO_TIME = -62135596800  # the year 1, which Go takes for "no time"
FIELDS = {
    "name": (0, 100),
    "mode": (100, 8),
    "uid": (108, 8),
    "gid": (116, 8),
    "size": (124, 12),
    "mtime": (136, 12),
    "checksum": (148, 8),
    "type": (156, 1),
    "link": (157, 100),
    "magic": (257, 8),
    "user_name": (265, 32),
    "group_name": (297, 32),
    "dev_major": (329, 8),
    "dev_minor": (337, 8),
    "prefix": (345, 155),
    "star_atime": (476, 12),
    "star_ctime": (488, 12),
    "star_trailer": (508, 4),
    "gnu_atime": (345, 12),
    "gnu_ctime": (357, 12),
}
USTAR, GNU, V7 = b"ustar\x0000", b"ustar  \0", bytes(8)


def seal(block: bytes, signed: bool = False) -> bytes:
    """The block with a correct checksum."""
    block = block[:148] + b" " * 8 + block[156:]
    total = sum(byte - 256 if signed and byte > 127 else byte for byte in block)
    return block[:148] + b"%06o\0 " % total + block[156:]


def raw_header(*, signed: bool = False, **fields: bytes) -> bytes:
    """A sealed block with just these bytes at the start of its fields, in the order given."""
    block = bytearray(BLOCK)
    for name, value in fields.items():
        at, width = FIELDS[name]
        assert len(value) <= width, name
        block[at : at + len(value)] = value
    return seal(bytes(block), signed) if "checksum" not in fields else bytes(block)


def plain_header(name: bytes = b"file", **fields: bytes) -> bytes:
    """A well-formed USTAR header, some of its fields replaced."""
    usual = {"mode": b"0000644\0", "uid": b"0000001\0", "gid": b"0000002\0", "size": b"00000000000\0"}
    usual |= {
        "mtime": b"14524770400\0",
        "type": b"0",
        "magic": USTAR,
        "dev_major": b"0000000\0",
        "dev_minor": b"0000000\0",
    }
    return raw_header(**({"name": name} | usual | fields))


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def record(key: bytes, value: bytes) -> bytes:
    """One PAX record; the length counts itself, so grow it until it is right."""
    length = 0
    while length != len(text := b"%d %s=%s\n" % (length, key, value)):
        length = len(text)
    return text


def meta(payload: bytes, type: bytes = b"x") -> bytes:
    """An extended header of any type with its padded payload."""
    return plain_header(b"meta", type=type, size=b"%011o\0" % len(payload)) + padded(payload)


def pax(*records: tuple[bytes, bytes]) -> bytes:
    return meta(b"".join(record(*pair) for pair in records))


def octal(value: int, width: int) -> bytes | None:
    text = b"%0*o" % (width - 1, value) if value >= 0 else b""
    return text + b"\0" if len(text) == width - 1 else None


def split_name(name: bytes) -> tuple[bytes, bytes] | None:
    """USTAR's prefix and name: the longest prefix wins, and a directory's final slash never divides."""
    if len(name) <= 100:
        return b"", name
    window = name[: min(156, len(name) - name.endswith(b"/"))]
    prefix, slash, _ = window.rpartition(b"/")
    rest = name[len(prefix) + 1 :]
    return (prefix, rest) if slash and prefix and 1 <= len(rest) <= 100 else None


def filtered(text: bytes, width: int) -> bytes:
    """ASCII only and cut; the first of the slashes that a cut would leave at the end becomes NUL."""
    text = bytes(byte for byte in text if 0 < byte < 128)
    if len(text) > width and text[width - 1 : width] == b"/":
        kept = len(text[: width - 1].rstrip(b"/"))
        return text[:kept] + b"\0" + text[kept + 1 : width]
    return text[:width]


def meta_name(name: bytes) -> bytes:
    directory, slash, base = name.rpartition(b"/")
    path = directory + slash + b"PaxHeaders.0" + (b"/" + base if base else b"")
    cleaned = posixpath.normpath(path)
    if cleaned.startswith(b"//"):
        cleaned = cleaned[1:]
    return bytes(byte for byte in cleaned if 0 < byte < 128)[:100].rstrip(b"/")


def time_text(seconds: int, nanoseconds: int) -> bytes:
    total = seconds * 10**9 + nanoseconds
    text = f"{abs(total) // 10**9}.{abs(total) % 10**9:09}".rstrip("0").rstrip(".")
    return (b"-" if total < 0 else b"") + text.encode()


def header_blocks(
    name: bytes,
    *,
    type: bytes = b"0",
    link: bytes = b"",
    mode: int = 0,
    uid: int = 0,
    gid: int = 0,
    size: int = 0,
    mtime_s: int = 0,
    mtime_ns: int = 0,
    user_name: bytes = b"",
    group_name: bytes = b"",
    dev_major: int = 0,
    dev_minor: int = 0,
    xattrs: dict[bytes, bytes] | None = None,
) -> bytes:
    """What Go's archive/tar writes for an entry that asks for PAX."""
    if (mtime_s, mtime_ns) == (NO_TIME, 0):
        mtime_s = 0
    numbers = {"mode": (mode, 8), "uid": (uid, 8), "gid": (gid, 8), "size": (size, 12), "mtime": (mtime_s, 12)}
    numbers |= {"dev_major": (dev_major, 8), "dev_minor": (dev_minor, 8)}
    texts = {"path": (name, 100), "linkpath": (link, 100), "uname": (user_name, 32), "gname": (group_name, 32)}
    records = {b"SCHILY.xattr." + key: value for key, value in (xattrs or {}).items()}
    fields = {"type": type, "magic": USTAR}
    for key, (number, width) in numbers.items():
        fields[key] = octal(number, width) or bytes([48] * (width - 1)) + b"\0"
        if octal(number, width) is None and key != "mtime":
            records[key.encode()] = b"%d" % number
    if octal(mtime_s, 12) is None or mtime_ns:
        records[b"mtime"] = time_text(mtime_s, mtime_ns)
    for key, (text, width) in texts.items():
        if len(text) > width or not text.isascii():
            records[key.encode()] = text
    split = split_name(name)
    if set(records) <= {b"path"} and name.isascii() and split:
        fields |= {"prefix": split[0], "name": split[1], "link": link, "user_name": user_name, "group_name": group_name}
        return raw_header(**fields)
    fields |= {"name": filtered(name, 100), "link": filtered(link, 100)}
    fields |= {"user_name": filtered(user_name, 32), "group_name": filtered(group_name, 32)}
    payload = b"".join(record(*pair) for pair in sorted(records.items()))
    zero = {key: b"0000000\0" for key in ("mode", "uid", "gid")} | {"mtime": b"00000000000\0"}
    extended = raw_header(name=meta_name(name), type=b"x", magic=USTAR, size=b"%011o\0" % len(payload), **zero)
    return extended + padded(payload) + raw_header(**fields)
