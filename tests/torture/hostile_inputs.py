"""Makers of the worst inputs: each writes one to a path, of a size that grows in proportion with ``n``."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import zstandard

import estargz

END = bytes(1024)
_BLOCK = 512


# --------------------------------------------------------------------------------------------------------------------
# tars, as lists of pieces


def head(name: bytes, size: int = 0, kind: bytes = b"0", link: bytes = b"") -> bytes:
    """A ustar header; fields may be filled to their last byte."""
    parts = [
        name[:100].ljust(100, b"\0"),
        b"0000644\x000000000\x000000000\0",
        b"%011o\x0000000000000\0" % size,
        b" " * 8,
    ]
    block = b"".join([*parts, kind, link[:100].ljust(100, b"\0"), b"ustar\x0000"]).ljust(_BLOCK, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _BLOCK)


def record(key: bytes, value: bytes) -> bytes:
    """A PAX record, whose length counts itself."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    length = rest + len(str(length))
    return b"%d %b=%b\n" % (length, key, value)


def extended(data: bytes, kind: bytes = b"x") -> bytes:
    return head(b"extended", len(data), kind) + padded(data)


def named(name: bytes, data: bytes = b"", kind: bytes = b"0", link: bytes = b"") -> bytes:
    """An entry, with an extended header where its texts need one."""
    records = record(b"path", name) if len(name) > 100 else b""
    records += record(b"linkpath", link) if len(link) > 100 else b""
    front = extended(records) if records else b""
    return front + head(name[:100], len(data), kind, link[:100]) + padded(data)


Pieces = Callable[[int], Iterable[bytes]]


def plain(pieces: Pieces) -> Callable[[Path, int], None]:
    """The tar itself."""

    def make(path: Path, n: int) -> None:
        with path.open("wb") as file:
            file.writelines(pieces(n))
            file.write(END)

    return make


def blob(pieces: Pieces, **options: Any) -> Callable[[Path, int], None]:
    """An eStargz blob of it."""

    def make(path: Path, n: int) -> None:
        tar = path.with_suffix(".tar")
        plain(pieces)(tar, n)
        estargz.build(tar, path, **options)
        tar.unlink()

    return make


def empty_files(n: int) -> Iterator[bytes]:
    return (head(b"directory%d/file%d" % (i % 100, i)) for i in range(n))


def little_files(n: int) -> Iterator[bytes]:
    return (named(b"file%d" % i, b"%d" % i) for i in range(n))


def deep_files(n: int) -> Iterator[bytes]:
    """Files at the end of paths of 2,500 components, the last 500 of which are their own."""
    return (named(b"d/" * 2000 + b"%d/" % i + b"e/" * 499 + b"file", b"x") for i in range(n))


def deep_directories(n: int) -> Iterator[bytes]:
    """Chains of directories that are all stated, 100 deep."""
    return (named(b"%d/" % (i // 100) + b"d/" * (i % 100), kind=b"5") for i in range(n))


def records_of_one_header(n: int) -> Iterator[bytes]:
    """As many as its MiB holds, at the largest n."""
    yield extended(b"".join(record(b"k%d" % i, b"") for i in range(n))) + head(b"file")


def repeated_record(n: int) -> Iterator[bytes]:
    yield extended(record(b"path", b"") * (n - 1) + record(b"path", b"file")) + head(b"file")


def attributes_of_one_header(n: int) -> Iterator[bytes]:
    # In descending order: the worst one for who inserts them sorted. No file system keeps such ones.
    keys = (b"SCHILY.xattr.other.%06d" % i for i in range(n, 0, -1))
    yield extended(b"".join(record(key, b"v") for key in keys)) + head(b"file")


def records_of_many_headers(n: int) -> Iterator[bytes]:
    """A hundred for each entry."""
    text = extended(b"".join(record(b"SCHILY.xattr.other.%d" % i, b"v") for i in range(100)))
    return (text + head(b"file%d" % i) for i in range(n // 100))


def headers_of_one_entry(n: int) -> Iterator[bytes]:
    yield from itertools.repeat(extended(record(b"comment", b"")), n)
    yield head(b"file")


def long_names_of_one_entry(n: int) -> Iterator[bytes]:
    yield from itertools.repeat(extended(b"name" * 25 + b"\0", b"L"), n)
    yield head(b"file")


def long_names(n: int) -> Iterator[bytes]:
    """Of 60,000 bytes each, 200 to a component."""
    return (named(b"%d/" % i + (b"n" * 199 + b"/") * 300) for i in range(n))


def names_of_no_text(n: int) -> Iterator[bytes]:
    """Of nearly a MiB each."""
    return (named(b"%d/" % i + b"\xff" * ((1 << 20) - 100)) for i in range(n))


def huge_link_targets(n: int) -> Iterator[bytes]:
    return (named(b"link%d" % i, kind=b"2", link=b"target/" * 8_000) for i in range(n))


def duplicates(n: int) -> Iterator[bytes]:
    return (named(b"file", b"%d" % i) for i in range(n))


def whiteouts_of_nothing(n: int) -> Iterator[bytes]:
    return (head(b"directory%d/.wh.file%d" % (i % 100, i)) for i in range(n))


def opaque_markers(n: int) -> Iterator[bytes]:
    """Half of them in one directory."""
    for i in range(n // 2):
        yield head(b"one/.wh..wh..opq")
        yield head(b"directory%d/.wh..wh..opq" % i)


def whiteouts_of_directories(n: int) -> Iterator[bytes]:
    """Each beside a directory of its name, which it must spare."""
    for i in range(n // 2):
        yield head(b"%d/" % i, kind=b"5")
        yield head(b".wh.%d" % i)


def hard_link_chain(n: int) -> Iterator[bytes]:
    yield named(b"link0", b"x")
    for i in range(1, n):
        yield head(b"link%d" % i, kind=b"1", link=b"link%d" % (i - 1))


def hard_links_in_circles(n: int) -> Iterator[bytes]:
    for i in range(n // 2):
        yield head(b"%d/a" % i, kind=b"1", link=b"%d/b" % i)
        yield head(b"%d/b" % i, kind=b"1", link=b"%d/a" % i)


def symlink_chain(n: int) -> Iterator[bytes]:
    yield head(b"link0/", kind=b"5")
    for i in range(1, n):
        yield head(b"link%d" % i, kind=b"2", link=b"link%d" % (i - 1))


def entries_below_links(n: int) -> Iterator[bytes]:
    """Each of 30 links doubles the way of the one before."""
    yield head(b"0/", kind=b"5")
    for i in range(1, 31):
        yield head(b"%d" % i, kind=b"2", link=b"%d/../%d" % (i - 1, i - 1))
    for i in range(n):
        yield head(b"5/file%d" % i)


def colliding_names(n: int) -> Iterator[bytes]:
    """One half has one hash where hashes multiply by 31 and add, the other where they multiply by 33: common ones."""
    for pair in ((b"Aa", b"BB"), (b"Ez", b"FY")):
        yield from (head(b"".join(name)) for name in itertools.islice(itertools.product(pair, repeat=20), n // 2))


def replaced_directories(n: int) -> Iterator[bytes]:
    """A directory with something in it, a file in its place, and again."""
    for i in range(n // 3):
        yield head(b"d/", kind=b"5")
        yield head(b"d/%d" % i)
        yield head(b"d")


def zeros(n: int) -> Iterator[bytes]:
    """One file of n MiB."""
    yield head(b"zeros", n << 20)
    yield from itertools.repeat(bytes(1 << 20), n)


def zeros_behind_the_end(n: int) -> Iterator[bytes]:
    yield head(b"file") + END
    yield from itertools.repeat(bytes(1 << 20), n)


def one_file(n: int) -> Iterator[bytes]:
    yield named(b"file", bytes(i * 7 & 255 for i in range(n)))


# --------------------------------------------------------------------------------------------------------------------
# compressed streams

FILE = named(b"file", b"x" * 1000) + END


def _writes(pieces: Pieces) -> Callable[[Path, int], None]:
    def make(path: Path, n: int) -> None:
        with path.open("wb") as file:
            file.writelines(pieces(n))

    return make


@_writes
def empty_members(n: int) -> Iterator[bytes]:
    yield from itertools.repeat(gzip.compress(b""), n)
    yield gzip.compress(FILE)


@_writes
def members_of_one_byte(n: int) -> Iterator[bytes]:
    tar = b"".join([*little_files(n // 1024), END])
    return (gzip.compress(tar[i : i + 1]) for i in range(len(tar)))


@_writes
def empty_blocks(n: int) -> Iterator[bytes]:
    """A member of stored blocks without a byte."""
    tail = gzip.compress(FILE)
    yield tail[:10]
    yield from itertools.repeat(b"\0\0\0\xff\xff" * 1000, n // 1000)
    yield tail[10:]


@_writes
def extra_fields(n: int) -> Iterator[bytes]:
    """n members whose headers say 64 KiB of nothing each, and one with a name that is as long as all of these."""
    tail = gzip.compress(FILE)
    empty = gzip.compress(b"")
    yield from itertools.repeat(b"\x1f\x8b\x08\4" + tail[4:10] + b"\xff\xff" + bytes(65535) + empty[10:], n)
    yield b"\x1f\x8b\x08\x18" + tail[4:10] + b"n" * (n << 16) + b"\0" + b"c" * (n << 16) + b"\0" + tail[10:]


@_writes
def false_members(n: int) -> Iterator[bytes]:
    """A member that holds what looks like the beginnings of n others, each of which inflates to much."""
    bait = gzip.compress(bytes(1 << 20), 9)
    yield gzip.compress(b"".join([head(b"bait", n * len(bait)), bait * n, bytes(-n * len(bait) % 512), END]), 0)


@_writes
def zeros_in_gzip(n: int) -> Iterator[bytes]:
    return _deflated(zeros(n))


def _deflated(pieces: Iterable[bytes]) -> Iterator[bytes]:
    stream = zlib.compressobj(6, wbits=31)
    for piece in itertools.chain(pieces, [END]):
        yield stream.compress(piece)
    yield stream.flush()


@_writes
def zeros_in_zstd(n: int) -> Iterator[bytes]:
    stream = zstandard.ZstdCompressor(3).compressobj()
    for piece in itertools.chain(zeros(n), [END]):
        yield stream.compress(piece)
    yield stream.flush()


@_writes
def empty_frames(n: int) -> Iterator[bytes]:
    yield zstandard.compress(FILE)
    yield from itertools.repeat(zstandard.compress(b""), n)


@_writes
def skippable_frames(n: int) -> Iterator[bytes]:
    yield zstandard.compress(FILE)
    yield from itertools.repeat(b"\x50\x2a\x4d\x18\0\0\0\0", n)


def frame_with(descriptor: bytes) -> Callable[[Path, int], None]:
    """A frame whose header states what it does not hold."""

    @_writes
    def make(n: int) -> Iterator[bytes]:
        yield b"\x28\xb5\x2f\xfd" + descriptor + b"\1\0\0" + bytes(n)

    return make


# --------------------------------------------------------------------------------------------------------------------
# tables of contents


def footer(offset: int) -> bytes:
    return b"\x1f\x8b\x08\4\0\0\0\0\0\xff\x1a\0SG\x16\0%016xSTARGZ\1\0\0\xff\xff" % offset + bytes(8)


def table(pieces: Pieces, payload: bytes = b"") -> Callable[[Path, int], None]:
    """A blob with this text as its table of contents; ``payload`` is compressed already."""

    def make(path: Path, n: int) -> None:
        size = sum(map(len, pieces(n)))
        text = itertools.chain([head(b"stargz.index.json", size)], pieces(n), [bytes(-size % 512)])
        with path.open("wb") as file:
            file.write(payload)
            file.writelines(_deflated(text))
            file.write(footer(len(payload)))

    return make


def stated_size(path: Path, n: int) -> None:
    """A table that claims to have more than n GiB."""
    path.write_bytes(gzip.compress(head(b"stargz.index.json", (n << 30) + 1)) + footer(0))


def go_table(entries: Callable[[int], Iterable[str]]) -> Pieces:
    """Entries, given as JSON objects without their braces, spelled as Go does."""

    def pieces(n: int) -> Iterator[bytes]:
        border = b'{\n\t"version": 1,\n\t"entries": [\n\t\t{\n\t\t\t'
        for entry in entries(n):
            yield border + entry.encode()
            border = b"\n\t\t},\n\t\t{\n\t\t\t"
        yield b"\n\t\t}\n\t]\n}"

    return pieces


def spaces(n: int) -> Iterator[bytes]:
    yield b'{"version": 1, '
    yield from itertools.repeat(b" " * (1 << 20), n)
    yield b'"entries": []}'


def brackets(n: int) -> Iterator[bytes]:
    yield b'{"version": 1, "x": ' + b"[" * n + b"]" * n + b', "entries": []}'


def objects(n: int) -> Iterator[bytes]:
    yield b'{"version": 1, "x": [' + b",".join([b"{}"] * n) + b'], "entries": []}'


def numbers(n: int) -> Iterator[bytes]:
    yield b'{"version": 1, "x": ' + b"1" * n + b', "entries": []}'


def unknown_keys(n: int) -> Iterator[bytes]:
    yield b'{"version": 1, ' + b"".join(b'"k%d": "", ' % i for i in range(n)) + b'"entries": []}'


def escapes(n: int) -> Iterator[bytes]:
    yield b'{"version": 1, "x": "' + b"\\u0000" * n + b'", "entries": []}'


def compact_entries(n: int) -> Iterator[bytes]:
    yield b'{"version":1,"entries":[' + b",".join([b'{"name":"a","type":"dir"}'] * n) + b"]}"


def least_entries(n: int) -> Iterator[str]:
    return itertools.repeat('"name": "a",\n\t\t\t"type": "dir"', n)


def odd_entries(n: int) -> Iterator[str]:
    """Which only the lenient decoder takes."""
    return itertools.repeat('"NAME": "a",\n\t\t\t"type": "dir",\n\t\t\t"other": [{}]', n)


def implied_directories(n: int) -> Iterator[str]:
    """Of names of 2,000 components that nothing states."""
    return (f'"name": "{i}{"/d" * 2000}",\n\t\t\t"type": "fifo"' for i in range(n))


def attributes(n: int) -> Iterator[str]:
    """n of one entry."""
    yield '"name": "a",\n\t\t\t"type": "dir",\n\t\t\t"xattrs": {' + ",".join(f'"user.{i}": ""' for i in range(n)) + "}"


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


ONE, ZERO = named(b"file", b"0"), bytes(1)
_SHARED = gzip.compress(bytes(1 << 21))


def chunks_of_one_byte(n: int) -> Iterator[str]:
    """All of one file, in one member."""
    at = f'"chunkSize": 1,\n\t\t\t"chunkDigest": "{digest(ZERO)}"'
    yield f'"name": "file",\n\t\t\t"type": "reg",\n\t\t\t"size": {n},\n\t\t\t"digest": "{digest(bytes(n))}",\n\t\t\t{at}'
    for i in range(1, n):
        place = f'"innerOffset": {i},\n\t\t\t"chunkOffset": {i}'
        yield f'"name": "file",\n\t\t\t"type": "chunk",\n\t\t\t{place},\n\t\t\t{at}'


def files_of_one_member(n: int) -> Iterator[str]:
    at = f'"size": 1,\n\t\t\t"digest": "{digest(ZERO)}",\n\t\t\t"chunkDigest": "{digest(ZERO)}"'
    return (f'"name": "{i}",\n\t\t\t"type": "reg",\n\t\t\t"innerOffset": {i},\n\t\t\t{at}' for i in range(n))


def shared_member(entries: Callable[[int], Iterable[str]]) -> Callable[[Path, int], None]:
    return table(go_table(entries), _SHARED)


# --------------------------------------------------------------------------------------------------------------------
# images


class Store:
    """An OCI layout in the making."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "blobs" / "sha256").mkdir(parents=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def put(self, kind: str, data: bytes) -> dict[str, Any]:
        (self.path / "blobs" / "sha256" / digest(data)[7:]).write_bytes(data)
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": digest(data), "size": len(data)}

    def document(self, kind: str, document: Any) -> dict[str, Any]:
        return self.put(f"{kind}.v1+json", json.dumps({"schemaVersion": 2, **document}).encode())

    def image(self, layers: list[dict[str, Any]], diff_ids: list[str]) -> dict[str, Any]:
        """A manifest, and its configuration."""
        rootfs = {"type": "layers", "diff_ids": diff_ids}
        config = self.document("config", {"os": "linux", "architecture": "amd64", "rootfs": rootfs})
        return self.document("manifest", {"config": config, "layers": layers})

    def index(self, *manifests: dict[str, Any]) -> dict[str, Any]:
        return self.document("index", {"manifests": manifests})

    def close(self, *manifests: dict[str, Any]) -> None:
        (self.path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": manifests}))


def image_of_layers(path: Path, n: int) -> None:
    """One layer, n times."""
    store = Store(path)
    layer = store.put("layer.v1.tar", FILE)
    store.close(store.image([layer] * n, [digest(FILE)] * n))


def nested_indexes(path: Path, n: int) -> None:
    store = Store(path)
    inner = store.image([], [])
    for _ in range(n):
        inner = store.index(inner)
    store.close(inner)


def branching_indexes(path: Path, n: int) -> None:
    """Four levels, each of which names the next n times: n to the fourth documents."""
    store = Store(path)
    inner = store.image([], [])
    for _ in range(4):
        inner = store.index(*[inner] * n)
    store.close(inner)


def large_manifests(path: Path, n: int) -> None:
    """n manifests of 4 MB each, that say nothing."""
    store = Store(path)
    rest = {"x": "y" * 4_000_000}
    images = [
        store.document("manifest", {"config": store.put("config.v1+json", b"{}"), "n": i, **rest}) for i in range(n)
    ]
    store.close(store.index(*images))


def nested_configuration(path: Path, n: int) -> None:
    store = Store(path)
    config = store.put("config.v1+json", b'{"os": "linux", "x": ' + b"[" * n + b"]" * n + b"}")
    store.close(store.document("manifest", {"config": config, "layers": []}))


def archive_of_members(path: Path, n: int) -> None:
    path.write_bytes(b"".join([head(b"file%d" % i) for i in range(n)]) + _saved(b"[]") + END)


def archive_of_records(path: Path, n: int) -> None:
    """n extended headers of 64 KiB, compressed."""
    text = extended(record(b"k", b"") * 10_000)
    path.write_bytes(b"".join(_deflated(itertools.chain(itertools.repeat(text, n), [head(b"file"), _saved(b"[]")]))))


def archive_of_links(path: Path, n: int) -> None:
    links = [head(b"link%d" % i, kind=b"2", link=b"link%d" % (i - 1)) for i in range(1, n)]
    manifest = json.dumps([{"Config": f"link{n - 1}", "RepoTags": None, "Layers": []}]).encode()
    path.write_bytes(b"".join([*links, _saved(manifest), END]))


def archive_of_tags(path: Path, n: int) -> None:
    path.write_bytes(_saved(json.dumps([{"Config": "c", "RepoTags": ["a:b"] * n, "Layers": []}]).encode()) + END)


def archive_of_indexes(path: Path, n: int) -> None:
    """A layout beside manifest.json whose indexes branch."""
    store = Store(path.with_suffix(".layout"))
    branching: dict[str, Any] = store.image([], [])
    for _ in range(2):
        branching = store.index(*[branching] * n)
    store.close(*[branching] * n)
    config = store.put("config.v1+json", b'{"rootfs": {}}')["digest"]
    manifest = [{"Config": f"blobs/{config.replace(':', '/')}", "RepoTags": None, "Layers": []}]
    (store.path / "manifest.json").write_text(json.dumps(manifest))
    with tarfile.open(path, "w") as tar:
        tar.add(store.path, arcname="")


def archive_of_zeros(path: Path, n: int) -> None:
    path.write_bytes(b"".join(_deflated(itertools.chain(zeros(n), [_saved(b"[]")]))))


def _saved(manifest: bytes) -> bytes:
    return named(b"manifest.json", manifest)


# --------------------------------------------------------------------------------------------------------------------
# texts


def text(pieces: Pieces) -> Callable[[Path, int], None]:
    return _writes(pieces)


def challenge(n: int) -> Iterator[bytes]:
    yield b"Bearer " + b'a="\\' * (n // 8) + b" " * (n // 4) + b"b" * (n // 4) + b", ,c d" * (n // 24)


def log_lines(n: int) -> Iterator[bytes]:
    return (b"usr/lib/%d\n" % i for i in range(n))


def log_patterns(n: int) -> Iterator[bytes]:
    return (b"**/*a*a*a*a*%d\n" % i for i in range(n))


def strace_lines(n: int) -> Iterator[bytes]:
    """Processes that begin, and leave a call unfinished."""
    for i in range(n):
        yield b'%d clone(flags=CLONE_FS) = %d\n%d openat(AT_FDCWD, "x", O_RDONLY <unfinished ...>\n' % (
            i + 1,
            i + 2,
            i + 1,
        )
