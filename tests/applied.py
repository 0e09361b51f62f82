"""Layers for the tests of extraction, entry by entry, and what lies in a directory, to be compared."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from reference.tar_headers import header_blocks, padded

END = bytes(1024)
TIME = 1_600_000_000
COMMAND = [sys.executable, "-c", "import sys; from estargz.cli import main; sys.exit(main())"]
TYPES = {"reg": b"0", "hardlink": b"1", "symlink": b"2", "char": b"3", "block": b"4", "dir": b"5", "fifo": b"6"}


def item(name: str | bytes, data: bytes = b"", kind: str = "reg", link: str | bytes = b"", **meta: Any) -> bytes:
    """One entry of a tar; a name that ends in / is a directory's."""
    name, link = os.fsencode(name), os.fsencode(link)
    if name.endswith(b"/") and kind == "reg":
        kind = "dir"
    fields = {"mode": 0o755 if kind == "dir" else 0o644, "mtime_s": TIME, "size": len(data)} | meta
    return header_blocks(name, type=TYPES[kind], link=link, **fields) + padded(data)


def symlink(name: str | bytes, target: str | bytes, **meta: Any) -> bytes:
    return item(name, kind="symlink", link=target, **meta)


def hardlink(name: str | bytes, target: str | bytes) -> bytes:
    return item(name, kind="hardlink", link=target)


def tar(*items: bytes) -> bytes:
    return b"".join(items) + END


class Found(NamedTuple):
    """Everything of an entry of a directory that an archive can state. ``first``: the first name of its inode."""

    kind: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    content: str
    link: bytes
    device: int
    xattrs: tuple[tuple[str, bytes], ...]
    first: bytes


def found(path: bytes, firsts: dict[tuple[int, int], bytes], name: bytes) -> Found:
    status = os.lstat(path)
    regular, linked = stat.S_ISREG(status.st_mode), stat.S_ISLNK(status.st_mode)
    node = stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode)
    keys = sorted(os.listxattr(path, follow_symlinks=False))
    return Found(
        stat.S_IFMT(status.st_mode),
        stat.S_IMODE(status.st_mode),
        status.st_uid,
        status.st_gid,
        status.st_mtime_ns,
        status.st_size if regular else 0,
        hashlib.sha256(Path(os.fsdecode(path)).read_bytes()).hexdigest() if regular else "",
        os.readlink(path) if linked else b"",
        status.st_rdev if node else 0,
        tuple((key, os.getxattr(path, key, follow_symlinks=False)) for key in keys),
        firsts.setdefault((status.st_dev, status.st_ino), name),
    )


def snapshot(root: str | os.PathLike[str]) -> dict[bytes, Found]:
    """What lies below a directory; the directory itself is b""."""
    top = os.fsencode(root)
    firsts: dict[tuple[int, int], bytes] = {}
    entries = {b"": found(top, firsts, b"")}
    for folder, directories, files in os.walk(top):
        directories.sort()
        for name in sorted([*directories, *files]):
            path = os.path.join(folder, name)
            inner = path[len(top) + 1 :]
            entries[inner] = found(path, firsts, inner)
    return entries


def without_times(entries: dict[bytes, Found], *names: bytes) -> dict[bytes, Found]:
    """A snapshot that ignores the times of some directories: those that no archive states."""
    return {name: entry._replace(mtime_ns=0) if name in names else entry for name, entry in entries.items()}


def command(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """estargz extract ..., as a process."""
    return subprocess.run(
        [*COMMAND, "extract", *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False, **options
    )
