"""Tar streams for the tests of the writing side, and what the Go peer says of the blobs made from them."""

from __future__ import annotations

import hashlib
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reference.peer import report, run
from reference.tar_headers import FIELDS, padded, pax, plain_header

import estargz
from estargz import Layer

END = bytes(1024)


def entry(name: bytes, data: bytes = b"", *records: tuple[bytes, bytes], **fields: bytes) -> bytes:
    """A header, its PAX records in front, and its payload."""
    fields = {"size": b"%011o\0" % len(data)} | fields
    return (pax(*records) if records else b"") + plain_header(name, **fields) + padded(data)


def base256(value: int, width: int) -> bytes:
    """A number as GNU tar writes those that are too large for octal digits, or negative."""
    return (value & (1 << (8 * width - 1)) - 1 | 1 << (8 * width - 1)).to_bytes(width, "big")


def field_width(name: str) -> int:
    return FIELDS[name][1]


def everything() -> bytes:
    """Every type of entry, long names, attributes and owners; without the end."""
    long = b"directory/" * 12 + b"leaf"
    return b"".join(
        [
            entry(b"dir/", type=b"5", mode=b"0000755\0"),
            entry(b"dir/file", b"content\n" * 300),
            entry(b"dir/empty"),
            entry(b"hard", type=b"1", link=b"dir/file"),
            entry(b"soft", type=b"2", link=b"../anywhere"),
            entry(b"char", type=b"3", dev_major=b"0000005\0", dev_minor=b"0000001\0"),
            entry(b"block", type=b"4", dev_major=b"0000010\0"),
            entry(b"fifo", type=b"6"),
            entry(long[:99], b"long", (b"path", long), (b"mtime", b"1600000000.5")),
            entry(b"attributes", b"x", (b"SCHILY.xattr.user.b", b"\0\xff"), (b"SCHILY.xattr.user.a", b"1")),
            entry(b"owned", b"y" * 513, user_name=b"root", group_name=b"wheel"),
        ]
    )


def blob_of(source: Any, **options: Any) -> tuple[Layer, bytes]:
    """What build makes of a tar, or of anything else that it takes."""
    sink = io.BytesIO()
    layer = estargz.build(io.BytesIO(source) if isinstance(source, bytes) else source, sink, **options)
    check_layer(layer, sink.getvalue())
    return layer, sink.getvalue()


def check_layer(layer: Layer, blob: bytes) -> None:
    assert (layer.size, layer.digest) == (len(blob), sha256(blob))


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def judge(peer: Path, blob: Path, layer: Layer) -> dict[str, Any]:
    """Has Go read every file of a blob, and compares what it measured with the layer."""
    assert layer.toc_digest is not None
    found = report(peer, "verify", "-toc-digest", layer.toc_digest, blob)
    assert (found["digest"], found["size"]) == (layer.digest, layer.size)
    assert (found["diff_id"], found["uncompressed_size"]) == (layer.diff_id, layer.uncompressed_size)
    assert found["toc_digest"] == layer.toc_digest
    return found


def go_toc(peer: Path, blob: Path) -> bytes:
    return run(peer, "toc", blob)


def unpacked(peer: Path, blob: Path) -> bytes:
    """The tar inside a blob, as Go and as this package see it."""
    theirs = run(peer, "unpack", blob, "-")
    with estargz.open(blob) as opened:
        assert opened.open_tar().read() == theirs
    return theirs


def threads_and_files() -> tuple[int, int]:
    """How many this process has."""
    return len(list(Path("/proc/self/task").iterdir())), len(list(Path("/proc/self/fd").iterdir()))


@contextmanager
def nothing_leaks() -> Iterator[None]:
    """Fails when threads or descriptors are left; a thread that was joined may take a moment to vanish."""
    before = threads_and_files()
    yield
    until = time.monotonic() + 5
    while (more := threads_and_files())[0] > before[0] or more[1] > before[1]:
        assert time.monotonic() < until, (before, more, threading.enumerate())
        time.sleep(0.01)


def in_thread(target: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread
