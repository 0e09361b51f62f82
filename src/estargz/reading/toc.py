"""The table of contents of an eStargz blob: its tar wrapper, its JSON, and what it must satisfy to be read.

JSON -> batches of TOCEntry -> rows, strings, names (_index) -> checked layout -> Table

Rules are those of the eStargz specification (docs/estargz.md in the stargz-snapshotter repository) and of the readers
in use; where they differ, the stricter one holds.
"""

from __future__ import annotations

import binascii
import codecs
import json
import operator
import re
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, overload

import msgspec

from estargz._index import FLAG_CHUNK_DIGEST, FLAG_DIGEST, ROW_FIELDS, TocIndex
from estargz.errors import BlobError, UsageError, brief

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "TOC",
    "Limits",
    "TOCEntry",
    "Table",
    "clean_name",
    "go_text",
    "load_table",
    "modtime_seconds",
    "owners",
    "parse_toc",
]

TOC_NAME = "stargz.index.json"
LANDMARKS = {".prefetch.landmark": "prefetch", ".no.prefetch.landmark": "no-prefetch"}
_INT64 = range(-(2**63), 2**63)  # what Go's integers hold
Int64 = Annotated[int, msgspec.Meta(ge=_INT64[0], le=_INT64[-1])]


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
    size: Int64 = 0
    modtime: str = ""
    link_name: str = ""
    mode: Int64 = 0
    uid: Int64 = 0
    gid: Int64 = 0
    user_name: str = ""
    group_name: str = ""
    offset: Int64 = 0
    inner_offset: Int64 = 0
    dev_major: Int64 = 0
    dev_minor: Int64 = 0
    xattrs: dict[str, str] = {}
    digest: str = ""
    chunk_offset: Int64 = 0
    chunk_size: Int64 = 0
    chunk_digest: str = ""


class TOC(msgspec.Struct, gc=False, frozen=True, forbid_unknown_fields=True):
    """The whole table, entries in the order of the tar."""

    version: Int64
    entries: list[TOCEntry] = []


_decode = msgspec.json.Decoder(TOC).decode
_ZERO: dict[str, Any] = dict.fromkeys(
    ("name", "type", "modtime", "linkName", "userName", "groupName", "digest", "chunkDigest"), ""
) | dict.fromkeys(
    ("size", "mode", "uid", "gid", "offset", "innerOffset", "devMajor", "devMinor", "chunkOffset", "chunkSize"), 0
)
_FIELDS = {*_ZERO, "xattrs"}
_FOLDED = {key.lower(): key for key in (*_FIELDS, "version", "entries")}


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
    with _malformed(name):
        value = _loads(data, dict)
        _expect_valid(value, ("version", "entries"))
        return TOC(_typed(value, "version", 0), [_entry(item) for item in _typed(value, "entries", [])])


def _loads(data: bytes, kind: type) -> Any:
    value = json.loads(
        go_text(data), object_pairs_hook=_fold, parse_constant=_refuse_constant, parse_float=_Float, parse_int=_integer
    )
    if not isinstance(value, kind):
        raise ValueError("not an object" if kind is dict else "not a list of entries")
    return value


@contextmanager
def _malformed(name: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise BlobError(f"{name}: malformed JSON: {error}; the blob is damaged, build it again") from error


def _integer(text: str) -> int:
    """One of thousands of digits is out of every range anyway, and takes its time."""
    return int(text) if len(text) <= 20 else 1 << 64


class _Float(float):
    """A number that is no integer: never wanted, told apart from int."""


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


class _Pairs(dict[str, Any]):
    """An object with its keys verbatim, beside its view with folded keys, the last of each, and those before."""

    verbatim: dict[str, Any]
    replaced: list[tuple[str, Any]]


def _fold(pairs: list[tuple[str, Any]]) -> _Pairs:
    folded = _Pairs()
    folded.replaced = []
    for key, value in pairs:
        known = _FOLDED.get(key.replace("\u017f", "s").replace("\u212a", "k").lower())
        if known is not None and value is not None:
            if known in folded:
                folded.replaced.append((known, folded[known]))
            folded[known] = value
    folded.verbatim = dict(pairs)
    return folded


def _expect_valid(value: _Pairs, known: Collection[str]) -> None:
    """Of those keys, what a later one replaces must be valid all the same, as Go has it; others mean nothing here."""
    for key, replaced in value.replaced:
        if key not in known:
            continue
        alone = {key: replaced}
        if key == "xattrs":
            _xattrs(alone)
        elif key == "entries":
            for item in _typed(alone, key, []):
                _entry(item)
        else:
            _typed(alone, key, _ZERO.get(key, 0))


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
    _expect_valid(value, _FIELDS)
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
        raise ValueError(f"{brief(text)!r} is no RFC 3339 time in whole seconds")
    year, month, day, hour, minute, second = map(int, match.group(1, 2, 3, 4, 5, 6))
    cycles, year = divmod(year, _CYCLE_YEARS)
    moment = datetime(year + _CYCLE_YEARS, month, day, hour, minute, second, tzinfo=UTC)
    if match[7]:
        east = timedelta(hours=int(match[8]), minutes=int(match[9]))
        moment -= east if match[7] == "+" else -east
    return (moment - _EPOCH) // timedelta(seconds=1) + (cycles - 1) * _CYCLE_SECONDS


def owners(entries: Iterable[TOCEntry]) -> Iterator[tuple[str, str]]:
    """User and group name of each entry: one that states none inherits the last one stated for its id."""
    users: dict[int, str] = {}
    groups: dict[int, str] = {}
    for entry in entries:
        if entry.user_name:
            users[entry.uid] = entry.user_name
        if entry.group_name:
            groups[entry.gid] = entry.group_name
        yield users.get(entry.uid, ""), groups.get(entry.gid, "")


# --------------------------------------------------------------------------------------------------------------------
# the table as rows


@dataclass(frozen=True, slots=True)
class Limits:
    """What a table may ask of its reader; whatever is larger is refused before memory is taken for it.

    toc_size:     bytes of the JSON, and of its compressed member
    entries:      entries with their chunks, and paths with the directories that are only implied
    name_length:  bytes of a name, of a link's target, of an owner's name
    depth:        components of a path
    chunks:       of one file
    """

    toc_size: int = 1 << 30
    entries: int = 10_000_000
    name_length: int = 1 << 16
    depth: int = 10_000
    chunks: int = 1 << 22

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            most = 2**62 if field.name == "toc_size" else 2**31 - 1  # nodes and rows are counted in 32 bits
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
                raise UsageError(f"the limit {field.name} is a whole number from 0 to {most}, not {value!r}")


class Table(Sequence[TOCEntry]):
    """The entries of a table of contents: a sequence of TOCEntry that are made when they are asked for.

    ``tree``: their rows, strings and names.
    """

    def __init__(self, tree: TocIndex) -> None:
        self.tree = tree

    @cached_property
    def rows(self) -> NDArray[np.void]:
        """The entries as a structured array of shape (entries,), read-only, in the order of the table.

        Fields are those of TOCEntry in the same units, ``type`` as bytes, digests as 32 bytes each, and

        end:       where the compressed bytes of the payload end: the next member that the table names, or the TOC; 0: none
        mtime:     seconds since the epoch
        flags:     FLAG_DIGEST, FLAG_CHUNK_DIGEST: the digest is there; FLAG_APART: the row does not say all that the entry
                   does
        strings_at, name_len, ...:  where the texts are; private
        """
        import numpy as np  # takes a tenth of a second, which reading a file need not pay

        return np.frombuffer(memoryview(self.tree), ROW_FIELDS) if len(self) else np.empty(0, ROW_FIELDS)

    def __len__(self) -> int:
        return len(self.tree)

    @overload
    def __getitem__(self, at: int) -> TOCEntry: ...
    @overload
    def __getitem__(self, at: slice) -> list[TOCEntry]: ...
    def __getitem__(self, at: int | slice) -> TOCEntry | list[TOCEntry]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        i = operator.index(at)
        if i < 0:
            i += len(self)
        if not 0 <= i < len(self):
            raise IndexError(at)
        return self.tree.apart.get(i) or self._made(i)

    def _made(self, i: int) -> TOCEntry:
        name, link_name, user_name, group_name, xattrs = self.tree.texts(i)
        facts = self.tree.facts(i)
        return TOCEntry(
            name=name,
            type=facts["type"],
            size=facts["size"],
            modtime=rfc3339(facts["mtime"]) if facts["mtime"] else "",
            link_name=link_name,
            mode=facts["mode"],
            uid=facts["uid"],
            gid=facts["gid"],
            user_name=user_name,
            group_name=group_name,
            offset=facts["offset"],
            inner_offset=facts["inner_offset"],
            dev_major=facts["dev_major"],
            dev_minor=facts["dev_minor"],
            xattrs=msgspec.json.decode(xattrs, type=dict[str, str]) if xattrs else {},
            digest="sha256:" + facts["digest"].hex() if facts["flags"] & FLAG_DIGEST else "",
            chunk_offset=facts["chunk_offset"],
            chunk_size=facts["chunk_size"],
            chunk_digest="sha256:" + facts["chunk_digest"].hex() if facts["flags"] & FLAG_CHUNK_DIGEST else "",
        )


def rfc3339(seconds: int) -> str:
    """A time between the years 1 and 9999 as the table states it."""
    return (_EPOCH + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ").rjust(20, "0")


def load_table(pieces: deque[bytes], toc_offset: int, limits: Limits, *, name: str = "TOC") -> Table:
    """The table that the JSON in ``pieces`` states; they are taken out of the deque as they are used up.

    Checks what must hold before anything is read by it: known types, no negative numbers, chunks that follow their file
    and cover it without gap or overlap, offsets that ascend inside the blob (entries in one member in order in it), and
    the limits. ``toc_offset``: where the payload ends in the blob. Raises BlobError.
    """
    index = TocIndex(
        max_name=limits.name_length, max_depth=limits.depth, max_nodes=limits.entries, max_chunks=limits.chunks
    )
    for entries in _batches(pieces, name):
        if len(index) + len(entries) > limits.entries:
            raise BlobError(f"{name}: more than {limits.entries} entries; raise the limit if you trust the blob")
        try:
            index.add(entries, _encoded)
        except ValueError as error:
            at, what = error.args[0]
            raise _bad(name, entries[at].name, what) from None
    fault = index.check(toc_offset)
    if fault is not None:
        raise _bad(name, index.texts(fault[0])[0], fault[1])
    return Table(index)


def _encoded(xattrs: dict[str, str]) -> bytes:
    """Raises ValueError for a value that is no base64: other decoders then refuse all of the table."""
    for key, value in xattrs.items():
        try:
            binascii.a2b_base64(value, strict_mode=True)
        except ValueError:
            raise ValueError(f"its extended attribute {key[:200]!r} is no base64") from None
    return msgspec.json.encode(xattrs)


# How Go's encoder begins a table, parts its entries and ends it. No string in JSON holds a raw line feed.
_HEAD = re.compile(rb'\{\n\t"version": (0|[1-9][0-9]{0,8}),\n\t"entries": \[\n\t\t\{')
_BORDER = b"\n\t\t},\n\t\t{"
_TAIL = b"\n\t\t}\n\t]\n}"
# Decoded at a time; a table in another form than Go's is decoded in one.
_OBJECTS_MOST = 1_000_000
_COMMAS_MOST = 10_000_000
_decode_entries = msgspec.json.Decoder(list[TOCEntry]).decode


def _batches(pieces: deque[bytes], name: str) -> Iterator[list[TOCEntry]]:
    """The entries, some thousands at a time where the text has the usual form: never all of them as objects at once.

    Each batch must be a whole JSON list by itself, so text that only looks as if it parted there is refused.
    """
    head = _HEAD.match(pieces[0]) if pieces else None
    if head is None or not b"".join(list(pieces)[-2:]).endswith(_TAIL):
        data = _take(pieces, len(pieces))
        _expect_few_objects(data, name)
        yield parse_toc(data, name=name).entries
        return
    text = pieces.popleft()[head.end() :]
    wanted = 1
    while pieces:
        cut = text.rfind(_BORDER)
        if cut >= 0:
            yield _entries(text[:cut], name)
            text = text[cut + len(_BORDER) :]
        # An entry longer than all that was taken: twice as much before the next look.
        wanted = 1 if cut >= 0 else 2 * wanted
        text += _take(pieces, wanted)
    yield _entries(text[: -len(_TAIL)], name)


def _take(pieces: deque[bytes], count: int) -> bytes:
    return b"".join(pieces.popleft() for _ in range(min(count, len(pieces))))


def _entries(text: bytes, name: str) -> list[TOCEntry]:
    """Entries that stand between the first one's and the last one's brace."""
    data = b"[{" + text + b"}]"
    _expect_few_objects(data, name)
    try:
        return _decode_entries(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    with _malformed(name):
        return [_entry(item) for item in _loads(data, list)]


def _expect_few_objects(data: bytes, name: str) -> None:
    """Two bytes of JSON can be an object of some hundred bytes. What stands in names counts too: that is little."""
    if data.count(b"{") + data.count(b"[") > _OBJECTS_MOST or data.count(b",") > _COMMAS_MOST:
        raise BlobError(
            f"{name}: over {_OBJECTS_MOST} objects without the line ends that part entries; build the blob again"
        )


def _bad(name: str, entry: str, what: str) -> BlobError:
    return BlobError(f"{name}: TOC entry {brief(entry)!r}: {what}; the blob is damaged or made by a faulty builder")
