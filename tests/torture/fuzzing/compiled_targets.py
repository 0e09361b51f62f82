"""What is done with an input, and what must hold of it. A target that returns has found nothing.

Everywhere: of this package's calls only the classes of errors.py come out. What is taken must be taken by Go too, with the same
entries; what is refused though Go takes it must be refused for a reason that docs/format.md states (``stricter``).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import tarfile
import tempfile
import zlib
from base64 import b64decode
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, TypeVar

import msgspec
import zstandard

import estargz
from estargz import BlobError, EstargzError, TarError, UsageError, _sha256, _tar
from estargz._inflate import InflateReader, detect
from estargz._inflate_ahead import InflateAhead
from estargz.reading.scan import scan_tar
from estargz.reading.toc import Limits, go_text, load_table
from estargz.writing.timestamps import ClampedTar

from .python_target import NO_TIME, peer

__all__ = ["TARGETS", "Target"]

OUTPUT_MOST = 4 << 20  # bytes that are asked of what inflates
EPOCH = 1_500_000_000
MEMORY = 32 << 20
LIMITS = Limits(toc_size=1 << 22, entries=20_000, depth=1000, chunks=10_000)

Answer = TypeVar("Answer")
Refused = EstargzError | None


def go(kind: str, data: bytes) -> tuple[list[dict[str, Any]], str]:
    """What Go reads, and why it refuses; no error: all was well."""
    answer = peer(kind).answer(data)
    return answer.get("found") or [], answer.get("error", "")


def attempt(call: Callable[..., Answer], *arguments: Any, **options: Any) -> tuple[Answer | None, Refused]:
    """What a call gives, or why it refuses."""
    try:
        return call(*arguments, **options), None
    except EstargzError as error:
        return None, error


def same(one: Refused, other: Refused) -> bool:
    """But for places, and for what is wrong first where the stream is cut, too."""
    texts = [re.sub("at byte [0-9]+", "", str(error)) for error in (one, other)]
    return texts[0] == texts[1] or (
        one is not None and other is not None and any("too early" in text for text in texts)
    )


class Pieces:
    """A readable object that gives what it has in pieces of odd sizes."""

    def __init__(self, data: bytes, random: Random) -> None:
        self._data = io.BytesIO(data)
        self._random = random

    def read(self, size: int = -1) -> bytes:
        most = self._random.choice((1, 7, 511, 512, 513, 4096, 1 << 16))
        return self._data.read(most if size < 0 else min(size, most))


def choices(data: bytes) -> Random:
    """What else is to be decided, the same for the same input."""
    return Random(zlib.crc32(data))


@contextmanager
def folder() -> Iterator[Path]:
    """In memory where there is a place for it; deep trees are removed too."""
    place = Path(tempfile.mkdtemp(prefix="estargz-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        yield place
    finally:
        shutil.rmtree(place)


# --------------------------------------------------------------------------------------------------------------------
# the tar parser


def check_tar(data: bytes) -> None:
    """The parser, the scan, Go and tarfile agree on an input; clamped times change nothing else."""
    entries, refused = attempt(_tar.parse, data)
    theirs, error = go("tar", data)
    if refused is not None or entries is None:
        assert error or stricter(str(refused), data, theirs), f"Go takes what is refused: {refused}"
    else:
        assert not error, f"Go refuses what is taken: {error}"
        assert [ours(entry) for entry in entries] == [of_go(entry) for entry in theirs], "Go reads other entries"
        check_against_tarfile(data, entries)
    check_scan(data, entries, refused)
    if entries is not None:
        check_clamped(data, entries)


def ours(entry: _tar.Entry) -> dict[str, Any]:
    device = entry.type in (b"3", b"4")
    return {
        "name": entry.name,
        "type": entry.type,
        "link": entry.link,
        "numbers": (entry.mode, entry.uid, entry.gid, entry.size, entry.mtime_s, entry.mtime_ns),
        "device": (entry.dev_major, entry.dev_minor) if device else None,
        "owners": (go_text(entry.user_name), go_text(entry.group_name)),
        "xattrs": {go_text(key): value for key, value in entry.xattrs},
    }


def of_go(entry: dict[str, Any]) -> dict[str, Any]:
    kind = entry["type"].encode()
    return {
        "name": b64decode(entry["name"]),
        "type": kind,
        "link": b64decode(entry.get("linkname", "")),
        "numbers": (
            *(entry[key] for key in ("mode", "uid", "gid")),
            entry["size"] if kind == b"0" else 0,  # others have no payload, whatever they state
            entry["modtime"],
            entry.get("modtime_nanos", 0),
        ),
        "device": (entry.get("devmajor", 0), entry.get("devminor", 0)) if kind in (b"3", b"4") else None,
        "owners": (entry.get("uname", ""), entry.get("gname", "")),
        "xattrs": {key: b64decode(value) for key, value in entry.get("xattrs", {}).items()},
    }


def stricter(refusal: str, data: bytes, theirs: list[dict[str, Any]]) -> bool:
    """Whether docs/format.md says why this is refused though Go takes it."""
    types = {entry["type"] for entry in theirs}
    if "entry type" in refusal or "sparse entry" in refusal:
        return not types <= set("0123456") or b"GNU.sparse." in data
    cut = "the tar stream ends too early" in refusal or "extended header without an entry" in refusal
    return cut and ends_in_extended_header(data)


def ends_in_extended_header(data: bytes) -> bool:
    """Go passes over an extended header whose end or entry is missing, as the last thing in a tar."""
    last = next(at for at in range(len(data) // 512 * 512, -1, -512) if attempt(_tar.parse, data[:at])[0] is not None)
    return data[last + 156 : last + 157] in (b"x", b"L", b"K")


def check_scan(data: bytes, entries: list[_tar.Entry] | None, refused: Refused) -> None:
    """A builder that is fed in odd pieces takes the same, and finds payloads at the same places."""
    scan, scan_refused = attempt(scan_tar, Pieces(data, choices(data)), threads=1)
    if scan is None or entries is None:
        # A scan is refused what a table of contents cannot follow.
        assert same(scan_refused, refused) or "inside the padding" in str(scan_refused), (
            f"{scan_refused} is not {refused}"
        )
        return
    at = 0
    for row, entry in itertools.zip_longest(scan.rows, entries):
        name = scan.strings[row["strings_at"] :][: row["name_len"]]
        assert (name, row["type"], row["size"]) == (entry.name, ord(entry.type), entry.size)
        assert row["offset"] == (entry.payload_offset if entry.size else 0)
        at = entry.payload_offset + entry.size
        if entry.type == b"0":
            digest = hashlib.sha256(data[entry.payload_offset : at]).digest()
            assert bytes(row["digest"]) == digest, f"another digest of {entry.name!r}"
    assert scan.diff_id == f"sha256:{hashlib.sha256(data).hexdigest()}"


def check_clamped(data: bytes, entries: list[_tar.Entry]) -> None:
    tar = ClampedTar(Pieces(data, choices(data)), EPOCH)
    clamped = _tar.parse(b"".join(iter(lambda: tar.read(1 << 16), b"")))
    for before, after in itertools.zip_longest(entries, clamped):
        late = (before.mtime_s, before.mtime_ns) > (EPOCH, 0)
        time = (EPOCH, 0) if late else (before.mtime_s, before.mtime_ns)
        kept = before._replace(mtime_s=time[0], mtime_ns=time[1], header_offset=0, payload_offset=0)
        assert after._replace(header_offset=0, payload_offset=0) == kept, "a clamped time changed something else"


def check_against_tarfile(data: bytes, entries: list[_tar.Entry]) -> None:
    """tarfile ends silently where it cannot read on, and does not take all that Go takes; what it reads must be the same."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            theirs = tar.getmembers()
    except (tarfile.TarError, ValueError, OverflowError):
        return
    for entry, member in zip(entries, theirs, strict=False):
        if odd_for_tarfile(entry, member, data):
            continue
        names = (os.fsencode(member.name).rstrip(b"/"), os.fsencode(member.linkname))
        assert names == (entry.name.rstrip(b"/"), entry.link), "tarfile reads another name"
        assert (member.size if member.isreg() else 0, member.offset_data) == (entry.size, entry.payload_offset)


def odd_for_tarfile(entry: _tar.Entry, member: tarfile.TarInfo, data: bytes) -> bool:
    """Where tarfile is known to read otherwise than Go, and so than this package."""
    block = data[entry.payload_offset - 512 : entry.payload_offset]
    extended = entry.payload_offset - 512 > entry.header_offset
    return extended or entry.type != member.type or block[257:265] != b"ustar\x0000" or block[508:] == b"tar\0"


# --------------------------------------------------------------------------------------------------------------------
# layers


def check_layer(data: bytes) -> None:
    """Every compression keeps the tar to the byte; an eStargz layer is proven by verify and is built of itself again."""
    random = choices(data)
    options = {
        "chunk_size": random.choice((16, 100, 512, 4096, 1 << 22)),
        "min_chunk_size": random.choice((0, 0, 1, 600, 1 << 16)),
        "threads": random.choice((1, 1, 2)),
    }
    blob, refused = attempt(written, data, random, level=random.choice((0, 1, 4)), **options)
    if blob is not None:
        check_blob_of(data, *blob)
        check_built_again(*blob, random)
    kind = random.choice(("gzip", "zstd", "uncompressed"))
    other, other_refused = attempt(written, data, random, compression=kind, level=None, threads=options["threads"])
    if other is None:
        assert str(refused) == str(other_refused) or "reserved" in str(refused), f"{refused} is not {other_refused}"
        return
    assert blob is not None or "inside the padding" in str(refused) or "reserved" in str(refused), refused
    assert inflated(other[1], kind) == data
    assert other[0].diff_id == sha256(data)


def written(data: bytes, random: Random, **options: Any) -> tuple[estargz.Layer, bytes]:
    sink, pieces = io.BytesIO(), Pieces(data, random)
    with estargz.Writer(sink, memory=MEMORY, **options) as writer:
        while piece := pieces.read():
            writer.write(piece)
    return writer.layer, sink.getvalue()


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def inflated(blob: bytes, kind: str) -> bytes:
    if kind == "gzip":
        return gzip.decompress(blob)
    return (
        blob
        if kind == "uncompressed"
        else zstandard.ZstdDecompressor().stream_reader(blob, read_across_frames=True).read()
    )


def check_blob_of(data: bytes, layer: estargz.Layer, blob: bytes) -> None:
    stream = gzip.decompress(blob)
    assert stream.startswith(data)
    assert (layer.diff_id, layer.uncompressed_size) == (sha256(stream), len(stream))
    assert (layer.digest, layer.size, layer.tar_digest) == (sha256(blob), len(blob), sha256(data))
    report = estargz.verify(blob, toc_digest=layer.toc_digest, diff_id=layer.diff_id, threads=1)
    assert report.entries == len(_tar.parse(data))
    with estargz.open(blob) as opened:
        assert opened.open_tar().read() == data


def check_built_again(layer: estargz.Layer, blob: bytes, random: Random) -> None:
    """A blob is a source too: the table is left out and made anew."""
    again, refused = attempt(estargz.build, Pieces(blob, random), io.BytesIO(), threads=1, memory=MEMORY)
    assert again is not None or "hide where its table" in str(refused), refused
    assert again is None or again.tar_digest == layer.tar_digest


def check_order(data: bytes) -> None:
    """What is asked for comes first, and the rest is all there: bytes of entries move, none are changed."""
    entries, _ = attempt(_tar.parse, data)
    if entries is None or detect(data[:4]) != "plain" or not data:
        return
    random, sink = choices(data), io.BytesIO()
    paths = [entry.name.decode("utf-8", "surrogateescape") for entry in random.sample(entries, min(len(entries), 3))]
    paths = [path for path in paths if "\0" not in path] + random.choice((["*"], ["**/a"], ["nothing"]))
    try:
        layer = estargz.build(io.BytesIO(data), sink, threads=1, memory=MEMORY, prefetch=paths, allow_missing=True)
    except (TarError, UsageError) as error:
        assert any(why in str(error) for why in ("is a hard link to", "inside the padding", "is no pattern")), error
        return
    estargz.verify(sink.getvalue(), toc_digest=layer.toc_digest, diff_id=layer.diff_id, threads=1)
    with estargz.open(sink.getvalue()) as blob:
        made = blob.open_tar().read()
    moved = Counter(raw for entry, raw in raw_entries(made) if cleaned(entry.name) != ".prefetch.landmark")
    last = {cleaned(entry.name): raw for entry, raw in raw_entries(data)}
    for name in (".prefetch.landmark", ".no.prefetch.landmark", "stargz.index.json"):
        last.pop(name, None)
    assert moved == Counter(last.values()), "entries were lost or changed"


def raw_entries(data: bytes) -> Iterator[tuple[_tar.Entry, bytes]]:
    for entry in _tar.parse(data):
        end = entry.payload_offset + entry.size
        yield entry, data[entry.header_offset : end + -end % 512].ljust(1)


def cleaned(name: bytes) -> str:
    return os.path.normpath(b"/" + name).lstrip(b"/").decode("utf-8", "surrogateescape")


# --------------------------------------------------------------------------------------------------------------------
# compressed streams


def check_inflate(data: bytes) -> None:
    """One thread or several, file or object, any segment: the same bytes and the same end, and those of zlib and libzstd."""
    kind = detect(data[:4])
    random = choices(data)
    wanted = drained(InflateReader, Pieces(data, random), kind)
    for threads in (1, 4):
        source = random.choice((data, Pieces(data, random), io.BytesIO(data)))
        segment = random.choice((64, 512, 262144))
        found = drained(InflateAhead, source, kind, threads=threads, segment=segment)
        assert found[1] == wanted[1] and (found[0] == wanted[0] or wanted[1]), (
            f"{threads} threads: {found[1]}, not {wanted[1]}"
        )
    if kind != "plain":
        plain, complete = by_libraries(data, kind)
        assert wanted[1] == "" or not complete, f"a library takes what is refused: {wanted[1]}"
        assert wanted[1] != "" or complete, "no library takes this"
        assert wanted[1] != "" or plain[:OUTPUT_MOST] == wanted[0], "a library inflates other bytes"


def drained(make: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[bytes, str]:
    """The bytes, as many as are asked for, and why no more came."""
    found = b""
    try:
        reader = make(*arguments, **options)
        try:
            while len(found) < OUTPUT_MOST and (piece := reader.read(1 << 16)):
                found += piece
        finally:
            reader.close()
    except EstargzError as error:
        return found, str(error)
    return found[:OUTPUT_MOST], ""


def by_libraries(data: bytes, kind: str) -> tuple[bytes, bool]:
    """What zlib or libzstd inflate, and whether they are content to the end, or to as much as was asked for."""
    found = b""
    while data and len(found) < OUTPUT_MOST:
        inflater: Any
        try:
            if kind == "gzip":
                inflater = zlib.decompressobj(31)
                found += inflater.decompress(data, OUTPUT_MOST)
                if inflater.unconsumed_tail:
                    return found, True
            else:
                inflater = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
                found += inflater.decompress(data)
        except (zlib.error, zstandard.ZstdError):
            return found, False
        if not inflater.eof:
            return found, False
        data = inflater.unused_data
        if kind == "gzip" and not data.strip(b"\0"):
            break  # padding, as of a tape
    return found, True


# --------------------------------------------------------------------------------------------------------------------
# reading blobs


def check_entries(data: bytes) -> None:
    """A table is taken or refused as by Go's decoder, with the same entries."""
    table, refused = attempt(load_table, deque([data]), 1 << 40, LIMITS)
    if table is None:
        assert isinstance(refused, BlobError)
        return
    theirs, error = go("entries", data)
    same_keys = not has_keys_twice(data)
    assert not (error and same_keys), f"Go refuses what is taken: {error}"
    for i, entry in enumerate(table):
        node = table.tree.find(entry.name)
        assert entry.type == "chunk" or (node >= 0 and table.tree.describe(node) is not None)
        if node >= 0:
            table.tree.children(node), table.tree.below(node)
        if same_keys:
            assert stated(entry) == of_go_table(theirs[i]), f"Go reads another entry {i}"
    assert len(theirs) == len(table) or not same_keys


def has_keys_twice(text: bytes) -> bool:
    """In any spelling: decoders differ in what they make of it (docs/format.md, ``key-twice`` and ``key-case``)."""
    twice = []

    def look(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice.append(len({key.casefold() for key, _ in pairs}) < len(pairs))
        return dict(pairs)

    json.loads(go_text(text), object_pairs_hook=look, parse_int=str)
    return any(twice)


def stated(entry: Any) -> dict[str, Any]:
    return facts_of(msgspec.to_builtins(entry))


def facts_of(entry: dict[str, Any]) -> dict[str, Any]:
    """What says more than its absence: a time of the epoch is that of an entry without one."""
    return {key: value for key, value in entry.items() if value and (key, value) != NO_TIME}


def of_go_table(entry: dict[str, Any]) -> dict[str, Any]:
    """An attribute that is null has no bytes."""
    attributes = {key: value or "" for key, value in (entry.get("xattrs") or {}).items()}
    return facts_of(entry | {"xattrs": attributes})


def check_reading(data: bytes) -> None:
    """Every way of reading a blob; what verify proves must be what Go reads of it."""
    blob, refused = attempt(estargz.open, data, limits=LIMITS)
    if blob is None:
        assert isinstance(refused, BlobError)
        return
    with blob:
        read_all(blob)
        attempt(lambda: blob.open_tar().read(OUTPUT_MOST))
        report, _ = attempt(estargz.verify, data, threads=1)
        attempt(estargz.verify, data, threads=2, strict=True)
        if report is not None:
            theirs, error = go("shelf", data)
            assert not error, f"Go refuses what is verified: {error}"
            # Of a path with several entries readers show different ones (docs/format.md, ``name-again``).
            again = {entry["name"] for entry in theirs if entry.get("hidden")}
            for entry in theirs:
                if entry["name"] not in again:
                    compare_served(blob, entry)


def compare_served(blob: estargz.Blob, theirs: dict[str, Any]) -> None:
    """A path as Go's reader serves it."""
    found = blob.lookup(theirs["name"])
    assert found.type == theirs["type"], f"{theirs['name']!r} is {found.type}"
    if found.type == "reg":
        digest = found.digest if found.size else sha256(b"")  # which a table may leave out
        assert (found.size, digest) == (theirs["size"], theirs.get("digest")), f"{found.name!r}: {theirs.get('error')}"


def read_all(blob: estargz.Blob) -> None:
    """Every question is asked of every path; those that do not lead to what is asked for are errors of the system."""
    for question in (blob.whiteouts, blob.opaques, lambda: blob.landmark, lambda: blob.prefetch_size, blob.listdir):
        with suppress(OSError):
            attempt(question)
    names = dict.fromkeys(entry.name for entry in blob.toc if entry.type != "chunk")
    for name in itertools.islice(names, 50):
        for ask in (blob.stat, blob.xattrs, blob.owner, blob.readlink, blob.listdir, blob.chunks, blob.read):
            with suppress(OSError):
                attempt(ask, name)
        with suppress(OSError):
            attempt(blob.byte_ranges, [name])


# --------------------------------------------------------------------------------------------------------------------
# extracting and comparing trees


def check_extract(data: bytes) -> None:
    """Nothing outside of the directory is touched, whatever the layer is."""
    random = choices(data)
    with folder() as place:
        (place / "outside").write_text("untouched")
        (place / "root").mkdir()
        (place / "root" / "out").symlink_to("../..")
        attempt(
            estargz.extract,
            data,
            place / "root",
            same_owner=random.choice((None, False)),
            threads=random.choice((1, 2)),
            max_size=1 << 20,
            max_entries=300,
        )
        assert sorted(os.listdir(place)) == ["outside", "root"]
        assert (place / "outside").read_text() == "untouched"


def check_changeset(data: bytes) -> None:
    """The changes between two trees, applied to the one, make the other; the input is what is in them."""
    with folder() as place:
        for tree in ("lower", "upper", "made"):
            (place / tree).mkdir()
        lines = data.split(b"\n")
        fill(place / "lower", lines[::2])
        fill(place / "made", lines[::2])
        fill(place / "upper", lines[1::2])
        sink = io.BytesIO()
        try:
            layer = estargz.build(place / "upper", sink, lower=place / "lower", threads=1, memory=MEMORY)
        except estargz.SourceError as error:
            assert "reserved" in str(error) or "exceed 1 MiB" in str(error), error
            return
        estargz.verify(sink.getvalue(), toc_digest=layer.toc_digest, diff_id=layer.diff_id, threads=1)
        estargz.extract(sink.getvalue(), place / "made", threads=1)
        assert listing(place / "made") == listing(place / "upper")


def fill(tree: Path, lines: list[bytes]) -> None:
    """A line is a kind and a path; what the file system does not take is left out."""
    for line in lines[:64]:
        path = os.path.join(os.fsencode(tree), line[1:].strip(b"/"))
        if b".." in line.split(b"/") or os.path.basename(path).startswith(b".wh."):
            continue
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            if line[:1] == b"d":
                os.mkdir(path)
            elif line[:1] == b"l":
                os.symlink(line[1:200], path)
            elif line[:1] == b"p":
                os.mkfifo(path)
            else:
                with open(path, "xb") as file:
                    file.write(line)
            os.utime(path, (1, 1), follow_symlinks=False)
        except (OSError, ValueError):
            continue


def listing(tree: Path) -> list[Any]:
    found = []
    for path in sorted(tree.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        target = os.readlink(path) if path.is_symlink() else ""
        found.append((os.fsencode(path.relative_to(tree)), status.st_mode, content, target))
    return found


# --------------------------------------------------------------------------------------------------------------------
# kernels below all of it


def check_sha256(data: bytes) -> None:
    random = choices(data)
    cuts = sorted(random.randrange(len(data) + 1) for _ in range(random.randrange(6)))
    parts = [data[a:b] for a, b in itertools.pairwise([0, *cuts, len(data)])]
    times = random.choice((1, 2, 5))
    wanted = [hashlib.sha256(part * times).digest() for part in parts]
    assert _sha256.digest_many(parts, times) == wanted


# --------------------------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """``runs``: executions of a quick run, beyond the corpus."""

    check: Callable[[bytes], None]
    mutator: str
    runs: int

    @property
    def mutate(self) -> Callable[[bytes, int, int], bytes]:
        """Only where libFuzzer is."""
        from . import compiled_mutation

        found: Callable[[bytes, int, int], bytes] = getattr(compiled_mutation, self.mutator)
        return found


TARGETS = {
    "tar": Target(check_tar, "tar", 2000),
    "layer": Target(check_layer, "tar", 300),
    "order": Target(check_order, "tar", 500),
    "inflate": Target(check_inflate, "compressed", 1000),
    "entries": Target(check_entries, "toc", 2000),
    "reading": Target(check_reading, "blob", 300),
    "extract": Target(check_extract, "tar", 300),
    "changeset": Target(check_changeset, "any_bytes", 200),
    "sha256": Target(check_sha256, "any_bytes", 2000),
}
