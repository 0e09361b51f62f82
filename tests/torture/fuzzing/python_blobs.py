"""Targets: tables of contents, footers, and whole blobs that are small."""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
import tarfile
from collections import deque
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import msgspec

import estargz
from estargz.reading.blob import Blob
from estargz.reading.filesystem import EstargzFileSystem
from estargz.reading.footer import FOOTER_MAX, Footer, read_footer
from estargz.reading.toc import TOC_NAME, Limits, TOCEntry, load_table, modtime_seconds, parse_toc
from estargz.reading.toc_text import read_text

from .python_target import NO_TIME, accepted, expect, peer, target

_DEPTH = 400  # levels; Go reads ten thousand
_WALKED = 100  # names of a blob
_READ = 1 << 16  # bytes of a file
_TYPES = {
    "reg": tarfile.REGTYPE, "dir": tarfile.DIRTYPE, "symlink": tarfile.SYMTYPE, "hardlink": tarfile.LNKTYPE,
    "char": tarfile.CHRTYPE, "block": tarfile.BLKTYPE, "fifo": tarfile.FIFOTYPE,
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# the table


@target("toc", "chunkDigest", "xattrs", "version", '"entries":', "modtime", shape="json", most=8192, runs=3_000)
def toc(data: bytes) -> None:
    found = accepted(parse_toc, data)
    table = accepted(lambda: list(load_table(deque([data]), 1 << 40, Limits())))
    theirs = peer("toc").ask(data)
    if found is None:
        expect(table is None, "the table is read from what is no table")
        expect(theirs is None or _is_refused_by_choice(data, theirs), f"Go reads {theirs}")
        return
    text = accepted(read_text, iter([data]))
    pieces = accepted(read_text, (data[at : at + 7] for at in range(0, len(data), 7)))
    expect(text == pieces, f"in pieces it is spelled {pieces}, not {text}")
    if table is None:
        return
    expect(
        [_stated(entry) for entry in table] == [_stated(entry) for entry in found.entries],
        "its rows say something else",
    )
    # A key that comes twice is taken otherwise by each decoder: that is what the spelling is looked at for.
    if text is not None and not text.twice and not (text.folded and _has_twice(data)):
        _expect_same(found.entries, theirs)


def _expect_same(mine: list[TOCEntry], theirs: Any) -> None:
    expect(theirs is not None, "Go refuses it")
    seen = [_said(entry) for entry in theirs["entries"] or []]
    for entry in seen:
        if "xattrs" in entry:  # no value is an empty one
            entry["xattrs"] = {key: value or "" for key, value in entry["xattrs"].items()}
    expect([_stated(entry) for entry in mine] == seen, f"Go reads {seen}")


def _stated(entry: TOCEntry) -> dict[str, Any]:
    facts: dict[str, Any] = msgspec.to_builtins(entry)
    if facts.get("xattrs"):
        facts["xattrs"] = {
            key: base64.b64encode(base64.b64decode(value)).decode() for key, value in entry.xattrs.items()
        }
    return _said(facts)


def _said(entry: dict[str, Any]) -> dict[str, Any]:
    """What says more than its absence: a time of the epoch is that of an entry without one."""
    return {key: value for key, value in entry.items() if value not in ("", 0) and (key, value) != NO_TIME}


def _is_refused_by_choice(data: bytes, theirs: Mapping[str, Any]) -> bool:
    """No entry, or no table, in place of one; attributes as lists of numbers; what is nested deeper than any table."""
    depth = deepest = 0
    for byte in data:
        depth += (byte in b"[{") - (byte in b"]}")
        deepest = max(deepest, depth)
    if data.strip() == b"null" or None in (theirs["entries"] or []) or deepest > _DEPTH:
        return True
    tables = [value for pairs in _objects(data) for key, value in pairs if key == "entries" and isinstance(value, list)]
    if any(None in table for table in tables):  # also in one that a later one replaces
        return True
    attributes = [
        value for pairs in _objects(data) for key, value in pairs if key == "xattrs" and isinstance(value, dict)
    ]
    return any(isinstance(value, list) for one in attributes for value in one.values())


def _has_twice(data: bytes) -> bool:
    """Whether a key comes twice in an object, be it in small letters and in capitals."""
    return any(len({key for key, _ in pairs}) < len(pairs) for pairs in _objects(data))


def _objects(data: bytes) -> list[list[tuple[str, Any]]]:
    """All of the JSON, with its keys as Go compares them."""
    found: list[list[tuple[str, Any]]] = []

    def keep(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found.append([(key.replace("\u017f", "s").replace("\u212a", "k").lower(), value) for key, value in pairs])
        return dict(pairs)

    json.loads(data.decode(errors="replace"), object_pairs_hook=keep, parse_int=str)
    return found


# --------------------------------------------------------------------------------------------------------------------
# the footer


@target("footer", "STARGZ", "STARGZEXTERNALTOC", "\x1a\0SG\x16\0", "\x16\0", "\x15\0SG\x11\0", most=80)
def footer(data: bytes) -> None:
    size = len(data) + (1 << 50)
    found = accepted(lambda: (read_footer(data[-FOOTER_MAX:], size),))
    mine = found and found[0]
    theirs = peer("footer").ask(data)
    if mine is not None:
        offset = -1 if mine.format == "external" else mine.toc_offset
        expect(theirs == {"size": mine.size, "toc_offset": offset}, f"Go reads {theirs}, not {mine}")
    elif theirs is not None:
        expect(_is_refused_footer(data[-theirs["size"] :], theirs["toc_offset"], size), f"Go reads {theirs}")


def _is_refused_footer(tail: bytes, offset: int, size: int) -> bool:
    """Names or comments in its header, digits with a sign, and places outside the blob."""
    return tail[3] != 4 or re.search(rb"[+-][0-9a-fA-F]{15}STARGZ", tail) is not None or offset >= size - len(tail)


# --------------------------------------------------------------------------------------------------------------------
# blobs


@target("table", ".wh.", ".wh..wh..opq", ".prefetch.landmark", "hardlink", shape="json", most=8192, runs=700)
def table(data: bytes) -> None:
    """A blob whose table of contents says what it likes: all that can be asked of it is asked."""
    payload = _small()[0]
    blob = accepted(estargz.open, payload + _end(data, len(payload)))
    if blob is not None:
        with blob:
            _walk(blob)


@target("strict", ".wh.", ".wh..wh..opq", ".prefetch.landmark", "hardlink", shape="json", most=4096, runs=150)
def strict(data: bytes) -> None:
    """A layer of {"entries": [...]}, and {"replaced": [before, after]} in the spelling of its table."""
    try:
        case = json.loads(data)
        tar = _tar(case["entries"])
        before, after = (str(text).encode() for text in case.get("replaced", ("", "")))
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError, tarfile.TarError):
        return
    made = io.BytesIO()
    layer = accepted(estargz.build, io.BytesIO(tar), made, threads=1, prefetch=(), chunk_size=512)
    if layer is None:
        return
    blob = made.getvalue()
    if before:
        payload, text = _parts(blob)
        blob = payload + _end(text.replace(before, after, 1), len(payload))
    report = accepted(estargz.verify, blob, strict=True, threads=1)
    expect(report is not None or before, "a layer that was built here is refused")
    if report is not None:
        with estargz.open(blob) as opened:
            _walk(opened)


@target("blob", "\x1f\x8b\x08", "STARGZ", most=4096, runs=700)
def blob(data: bytes) -> None:
    """The bytes of a blob."""
    accepted(estargz.verify, data, strict=True, threads=1)
    opened = accepted(estargz.open, data)
    if opened is not None:
        with opened:
            _walk(opened)


@target(
    "filesystem",
    "estargz://",
    "::",
    "..",
    "/",
    "dir",
    "file",
    "soft",
    "hard",
    ".prefetch.landmark",
    most=200,
    runs=3_000,
)
def filesystem(data: bytes) -> None:
    """Paths that are given to fsspec."""
    path = data.decode("utf-8", "surrogateescape")
    files = _filesystem()
    clean = files._strip_protocol(path)
    expect(files._strip_protocol(f"estargz://{clean}") == clean, f"{clean!r} is cleaned once more")
    found = accepted(files.info, path, refusal=OSError)
    names = accepted(files.ls, path, detail=False, refusal=OSError)
    content = accepted(files.cat_file, path, refusal=OSError)
    expect(files.exists(path) == (found is not None), "it exists, or does not")
    if content is not None:
        expect(found is not None and len(content) == files.size(path), "it is longer or shorter than it says")
    if names is not None and files.isdir(path):
        expect(all(files.exists(name) for name in names), f"{names} are not all there")


def _walk(blob: Blob) -> None:
    for read in (lambda: blob.landmark, lambda: blob.whiteouts, lambda: blob.opaques, lambda: blob.prefetch_size):
        accepted(read)
    for path in _paths(blob):
        for ask in (blob.lookup, blob.stat, blob.xattrs, blob.owner, blob.readlink, blob.type_of, blob.chunks):
            accepted(ask, path, refusal=OSError)
        accepted(blob.byte_ranges, [path], refusal=OSError)
        content = accepted(_content, blob, path, refusal=OSError)
        if content is not None:
            expect(len(content) == min(blob.stat(path).st_size, _READ), f"{path!r} is longer or shorter than it says")
    for entry in blob.toc[:_WALKED]:
        accepted(modtime_seconds, entry.modtime, refusal=ValueError)


def _content(blob: Blob, path: str) -> bytes:
    with blob.open(path) as file:
        return file.read(_READ)


def _paths(blob: Blob) -> Iterator[str]:
    waiting = deque([""])
    for _ in range(_WALKED):
        if not waiting:
            return
        path = waiting.popleft()
        yield path
        if accepted(blob.type_of, path, follow_symlinks=False) == "dir":
            names = accepted(blob.listdir, path, refusal=OSError) or []  # none below a hard link to a directory
            waiting.extend(f"{path}/{name}" if path else name for name in names[:_WALKED])


@cache
def _small() -> tuple[bytes, bytes]:
    """The members of a small layer, and its table of contents."""
    made = io.BytesIO()
    estargz.build(io.BytesIO(_tar(SMALL)), made, threads=1, chunk_size=512)
    return _parts(made.getvalue())


SMALL: list[dict[str, Any]] = [
    {"name": "dir/", "type": "dir", "mode": 0o755},
    {"name": "dir/file", "type": "reg", "data": "content " * 100, "user": "root"},
    {"name": "dir/.wh.gone", "type": "reg"},
    {"name": "hard", "type": "hardlink", "link": "dir/file"},
    {"name": "soft", "type": "symlink", "link": "dir"},
    {"name": "null", "type": "char", "major": 1, "minor": 3},
]


@cache
def _filesystem() -> EstargzFileSystem:
    payload, text = _small()
    return EstargzFileSystem(payload + _end(text, len(payload)), skip_instance_cache=True)


def _parts(blob: bytes) -> tuple[bytes, bytes]:
    """What is in front of the table of contents, and its JSON."""
    found = read_footer(blob[-FOOTER_MAX:], len(blob))
    assert isinstance(found, Footer)
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(blob[found.toc_offset : -found.size]))) as tar:
        member = tar.extractfile(TOC_NAME)
        assert member is not None
        return blob[: found.toc_offset], member.read()


def _end(text: bytes, offset: int) -> bytes:
    """The member of a table of contents, and the footer that leads to it."""
    info = tarfile.TarInfo(TOC_NAME)
    info.size = len(text)
    tar = info.tobuf(tarfile.USTAR_FORMAT) + text + bytes(-len(text) % 512 + 1024)
    leads = b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x1a\0SG\x16\0%016xSTARGZ\x01\0\0\xff\xff" % offset + bytes(8)
    return gzip.compress(tar, 1, mtime=0) + leads


def _tar(entries: list[dict[str, Any]]) -> bytes:
    """Raises what Python has for entries that are none."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT, errors="surrogateescape") as tar:
        for entry in entries:
            info = tarfile.TarInfo(entry["name"])
            info.type, info.linkname = _TYPES[entry.get("type", "reg")], entry.get("link", "")
            info.mode, info.uid, info.mtime = entry.get("mode", 0o644), entry.get("uid", 0), entry.get("mtime", 0)
            info.devmajor, info.devminor = entry.get("major", 0), entry.get("minor", 0)
            info.uname, info.pax_headers = entry.get("user", ""), entry.get("pax", {})
            data = entry.get("data", "").encode()
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return made.getvalue()
