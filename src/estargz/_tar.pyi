from collections.abc import Iterable, Mapping
from typing import NamedTuple

class Entry(NamedTuple):
    name: bytes
    type: bytes
    link: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime_s: int
    mtime_ns: int
    user_name: bytes
    group_name: bytes
    dev_major: int
    dev_minor: int
    xattrs: list[tuple[bytes, bytes]]
    header_offset: int
    payload_offset: int

def emit(
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
    xattrs: Mapping[bytes, bytes] | Iterable[tuple[bytes, bytes]] = (),
    capacity: int | None = None,
) -> bytes: ...
def pack(xattrs: Mapping[bytes, bytes] | Iterable[tuple[bytes, bytes]]) -> bytes: ...
def parse(data: bytes) -> list[Entry]: ...
