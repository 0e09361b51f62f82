"""The table of contents of an eStargz blob: its tar wrapper, its JSON, and what it must satisfy to be read.

JSON bytes -> parse_toc -> TOC -> check_layout -> where each chunk's member ends

Rules are those of the eStargz specification (docs/estargz.md in the stargz-snapshotter repository) and of the readers
in use; where they differ, the stricter one holds.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any, NoReturn

import msgspec

from estargz.errors import BlobError

__all__ = ["TOC", "TOCEntry", "check_layout", "clean_name", "go_text", "modtime_seconds", "owners", "parse_toc"]

TOC_NAME = "stargz.index.json"
LANDMARKS = {".prefetch.landmark": "prefetch", ".no.prefetch.landmark": "no-prefetch"}
TYPES = frozenset(("dir", "reg", "symlink", "hardlink", "char", "block", "fifo", "chunk"))
_INT64 = range(-(2**63), 2**63)  # what Go's integers hold


class TOCEntry(msgspec.Struct, gc=False, frozen=True, rename="camel", omit_defaults=True, forbid_unknown_fields=True):
    """One entry as the JSON states it; a key that is absent has its zero value here.

    name:         as in the tar header, bytes that are no UTF-8 replaced by U+FFFD one by one
    type:         dir, reg, symlink, hardlink, char, block, fifo, or chunk (a further part of the reg before it)
    size:         bytes of a regular file
    modtime:      RFC 3339, whole seconds, UTC; "" means the epoch
    link_name:    target of a symlink or hardlink, verbatim
    mode:         the header's number; may hold more than permission bits
    user_name, group_name:  only where they differ from the last one stated for the id; see owners()
    offset:       of the gzip member that holds the payload's first byte
    inner_offset: inflated bytes of that member in front of the payload
    xattrs:       key -> standard base64
    digest:       "sha256:..." of the whole file
    chunk_offset, chunk_size:  place of the chunk in the file, bytes; size 0 means up to the file's end
    chunk_digest: "sha256:..." of the chunk
    """

    name: str
    type: str
    size: int = 0
    modtime: str = ""
    link_name: str = ""
    mode: int = 0
    uid: int = 0
    gid: int = 0
    user_name: str = ""
    group_name: str = ""
    offset: int = 0
    inner_offset: int = 0
    dev_major: int = 0
    dev_minor: int = 0
    xattrs: dict[str, str] = {}
    digest: str = ""
    chunk_offset: int = 0
    chunk_size: int = 0
    chunk_digest: str = ""


class TOC(msgspec.Struct, gc=False, frozen=True, forbid_unknown_fields=True):
    """The whole table, entries in the order of the tar."""

    version: int
    entries: list[TOCEntry] = []


_decode = msgspec.json.Decoder(TOC).decode
_ZERO: dict[str, Any] = dict.fromkeys(
    ("name", "type", "modtime", "linkName", "userName", "groupName", "digest", "chunkDigest"), ""
) | dict.fromkeys(
    ("size", "mode", "uid", "gid", "offset", "innerOffset", "devMajor", "devMinor", "chunkOffset", "chunkSize"), 0
)
_FOLDED = {key.lower(): key for key in (*_ZERO, "xattrs", "version", "entries")}


def parse_toc(data: bytes, *, name: str = "TOC") -> TOC:
    """Decode the JSON; ``name`` is what messages call it.

    As Go's decoder does, keys in another case and ``null`` are accepted and unknown keys ignored. Raises BlobError.
    """
    try:
        return _decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _parse_leniently(data, name)


def _parse_leniently(data: bytes, name: str) -> TOC:
    """What msgspec refuses and Go accepts, through the standard library: several times slower."""
    try:
        value = json.loads(go_text(data), object_pairs_hook=_fold, parse_constant=_refuse_constant, parse_float=_Float)
        if not isinstance(value, dict):
            raise ValueError("not an object")
        return TOC(_typed(value, "version", 0), [_entry(item) for item in _typed(value, "entries", [])])
    except (ValueError, RecursionError) as error:
        raise BlobError(f"{name}: malformed JSON: {error}; the blob is damaged, build it again") from error


class _Float(float):
    """A number that is no integer: never wanted, told apart from int."""


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


class _Pairs(dict[str, Any]):
    """An object with its keys verbatim, beside its view with folded keys."""

    verbatim: dict[str, Any]


def _fold(pairs: list[tuple[str, Any]]) -> _Pairs:
    folded = _Pairs()
    for key, value in pairs:
        known = _FOLDED.get(key.replace("\u017f", "s").replace("\u212a", "k").lower())
        if known is not None and value is not None:
            folded[known] = value
    folded.verbatim = dict(pairs)
    return folded


def _typed(value: dict[str, Any], key: str, zero: Any) -> Any:
    found = value.get(key, zero)
    if type(found) is not type(zero):
        raise ValueError(f"{key} is no {type(zero).__name__}")
    if isinstance(found, str):
        return _scrub(found)
    if isinstance(found, int) and found not in _INT64:
        raise ValueError(f"{key} is out of range")
    return found


def _entry(value: Any) -> TOCEntry:
    if not isinstance(value, _Pairs):
        raise ValueError("an entry is no object")
    fields = {key: _typed(value, key, zero) for key, zero in _ZERO.items()}
    return msgspec.convert(fields | {"xattrs": _xattrs(value)}, TOCEntry)


def _xattrs(value: dict[str, Any]) -> dict[str, str]:
    found = value.get("xattrs")
    if found is None:
        return {}
    if not isinstance(found, _Pairs):
        raise ValueError("xattrs is no object")
    pairs = {_scrub(key): "" if item is None else item for key, item in found.verbatim.items()}
    if not all(isinstance(item, str) for item in pairs.values()):
        raise ValueError("an xattr is no string")
    return pairs


def _scrub(text: str) -> str:
    """Lone surrogates, which JSON can spell, become U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


codecs.register_error("estargz-replace", lambda error: ("\ufffd" * (error.end - error.start), error.end))  # type: ignore[attr-defined]


def go_text(data: bytes) -> str:
    """Bytes as Go's JSON encoder states them: each byte that is no UTF-8 becomes one U+FFFD."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode(errors="estargz-replace")


def clean_name(name: str) -> str:
    """A tar name relative to the root: no empty, "." or ".." parts; "" is the root itself.

    The same as Go's path.Clean("/" + name) without the leading slash.
    """
    parts: list[str] = []
    for part in name.split("/"):
        if part == "..":
            del parts[-1:]
        elif part and part != ".":
            parts.append(part)
    return "/".join(parts)


_MODTIME = re.compile(r"(-?\d{4,})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)(?:\.0+)?(?:Z|([+-])(\d\d):(\d\d))")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_CYCLE_YEARS, _CYCLE_SECONDS = 400, 146_097 * 86_400  # the Gregorian calendar repeats


def modtime_seconds(text: str) -> int:
    """Seconds since the epoch of an RFC 3339 time in whole seconds; "" is 0. Raises ValueError."""
    if not text:
        return 0
    match = _MODTIME.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no RFC 3339 time in whole seconds")
    year, month, day, hour, minute, second = map(int, match.group(1, 2, 3, 4, 5, 6))
    cycles, year = divmod(year, _CYCLE_YEARS)
    moment = datetime(year + _CYCLE_YEARS, month, day, hour, minute, second, tzinfo=UTC)
    if match[7]:
        east = timedelta(hours=int(match[8]), minutes=int(match[9]))
        moment -= east if match[7] == "+" else -east
    return (moment - _EPOCH) // timedelta(seconds=1) + (cycles - 1) * _CYCLE_SECONDS


def owners(entries: list[TOCEntry]) -> Iterator[tuple[str, str]]:
    """User and group name of each entry: one that states none inherits the last one stated for its id."""
    users: dict[int, str] = {}
    groups: dict[int, str] = {}
    for entry in entries:
        if entry.user_name:
            users[entry.uid] = entry.user_name
        if entry.group_name:
            groups[entry.gid] = entry.group_name
        yield users.get(entry.uid, ""), groups.get(entry.gid, "")


def check_layout(entries: list[TOCEntry], toc_offset: int, name: str) -> list[int]:
    """Check that every payload can be found, and say where its compressed bytes end.

    Returns one offset per entry: where the next member that the table names begins, or the TOC; 0 for entries without
    payload. Raises BlobError unless types are known, numbers are not negative, chunks follow their file and cover it
    without gap or overlap, and offsets ascend inside the blob; entries in one member must stand in order in it.
    """
    ends = [0] * len(entries)
    payloads = list(_payloads(entries, name))
    for (_, entry, size), (_, after, _) in pairwise(payloads):
        if after.offset < entry.offset or (
            after.offset == entry.offset and after.inner_offset < entry.inner_offset + size
        ):
            raise _bad(name, after, f"its offset {after.offset} lies before the end of the payload in front of it")
    end = following = toc_offset
    for index, entry, _ in reversed(payloads):
        if entry.offset >= toc_offset:
            raise _bad(name, entry, f"its offset {entry.offset} lies outside the payload, which ends at {toc_offset}")
        if entry.offset < following:
            end, following = following, entry.offset
        ends[index] = end
    return ends


def _payloads(entries: list[TOCEntry], name: str) -> Iterator[tuple[int, TOCEntry, int]]:
    """Index, entry and payload size of each entry that has a payload."""
    file: TOCEntry | None = None
    at = 0
    for index, entry in enumerate(entries):
        numbers = (entry.size, entry.offset, entry.inner_offset, entry.chunk_offset, entry.chunk_size)
        if min(numbers) < 0 or max(numbers) >= 2**63:
            raise _bad(name, entry, "it states a size or offset that is negative or too large")
        if entry.type == "chunk":
            if file is None or clean_name(entry.name) != clean_name(file.name):
                raise _bad(name, entry, "a chunk that does not follow its file")
        else:
            _expect_complete(name, file, at)
            file, at = (entry if entry.type == "reg" else None), 0
            if entry.type not in TYPES:
                raise _bad(name, entry, f"unknown type {entry.type!r}")
            if file is None or (entry.size == 0 and not entry.chunk_offset and not entry.chunk_size):
                continue
        size = entry.chunk_size or file.size - entry.chunk_offset
        if entry.chunk_offset != at or not 0 < size <= file.size - at:
            raise _bad(name, entry, f"its chunk at {entry.chunk_offset} does not fit {file.size} bytes of the file")
        at += size
        yield index, entry, size
    _expect_complete(name, file, at)


def _expect_complete(name: str, file: TOCEntry | None, at: int) -> None:
    if file is not None and at != file.size:
        raise _bad(name, file, f"its chunks hold {at} of {file.size} bytes")


def _bad(name: str, entry: TOCEntry, what: str) -> BlobError:
    return BlobError(f"{name}: TOC entry {entry.name!r}: {what}; the blob is damaged or made by a faulty builder")
