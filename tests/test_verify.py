"""Proof of whole blobs: right ones by Go and by hand, and each way in which one can lie."""

from __future__ import annotations

import gzip
import io
import random
import subprocess
import tarfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import zstandard
from reference import scan as plain
from reference.blobs import (
    assemble,
    digest,
    encode,
    estargz,
    legacy_footer,
    link,
    member,
    payload_and_toc,
    tar_of,
)
from reference.peer import report

from estargz.errors import BlobError, UsageError, VerificationError
from estargz.reading.verifying import Report, verify

verify_module = import_module("estargz.reading.verifying")  # the package's attribute of this name is the function
RNG = random.Random(1889)
Entries = list[dict[str, Any]]


@pytest.fixture(autouse=True, params=["compiled scan", "plain scan"])
def scan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs with the package's reader of tars and with the plain one."""
    if request.param == "plain scan":
        monkeypatch.setattr(verify_module, "scan_tar", plain.scan_tar)


def special(name: str, kind: bytes, **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def rich_tar() -> bytes:
    """Every type, owners that come and go, times with fractions, attributes, long names."""
    capability = "\x01\x00\x00\x02"
    long = "long/" * 60 + "name"
    return tar_of(
        ("./", b""),
        ("d/", b""),
        ("d/first", b"first"),
        ("d/empty", b""),
        ("d/large", RNG.randbytes(30_000)),
        special("device", tarfile.CHRTYPE, devmajor=5, devminor=1, uid=7, uname="other"),
        special("disk", tarfile.BLKTYPE, devmajor=8, devminor=0, gid=3, gname="disk"),
        special("pipe", tarfile.FIFOTYPE, gid=3, mode=0o4755),
        link("hard", "d/first"),
        link("soft", "../d/first", tarfile.SYMTYPE),
        special("half", tarfile.REGTYPE, mtime=1_600_000_000.5),
        special("early", tarfile.REGTYPE, mtime=0.7),
        special("before", tarfile.REGTYPE, mtime=-1.25),
        special("ü" * 80, tarfile.REGTYPE, pax_headers={"SCHILY.xattr.security.capability": capability}),
        special(
            "a<b>&\u2028\\\x07\x7f", tarfile.REGTYPE, pax_headers={"SCHILY.xattr.user.é": "", "SCHILY.xattr.a": "b"}
        ),
        (long, b"at the end of a long path"),
        ("owner again", b"x" * 513),
    )


RICH = rich_tar()
OPTIONS: list[dict[str, Any]] = [
    {},
    {"chunk_size": 4096},
    {"chunk_size": 1000, "min_chunk": 3000},
    {"min_chunk": 1 << 20},
    {"make_footer": legacy_footer},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("threads", [None, 1, 5])
def test_right_blobs(options: dict[str, Any], threads: int | None) -> None:
    blob = estargz(RICH, **options)
    whole = gzip.decompress(blob)
    found = verify(blob, diff_id=digest(whole), threads=threads)
    assert found.format == ("legacy" if "make_footer" in options else "estargz")
    assert (found.size, found.uncompressed_size, found.diff_id) == (len(blob), len(whole), digest(whole))
    assert (found.entries, found.files) == (17, 10)
    assert found.payload_size == sum(entry["size"] for entry in plain.entries(RICH))


@pytest.mark.parametrize("how", ["lossless", "build", "build-from-gzip"])
@pytest.mark.parametrize("options", [[], ["-chunk-size", "4000"], ["-chunk-size", "1000", "-min-chunk-size", "9000"]])
def test_blobs_made_by_go(tmp_path: Path, peer: Path, how: str, options: list[str]) -> None:
    tar, out = tmp_path / "in.tar", tmp_path / "blob"
    tar.write_bytes(member(RICH) if how == "build-from-gzip" else RICH)
    made = report(peer, "blob", "-how", how, *options, tar, out)
    found = verify(out, toc_digest=made["toc_digest"], diff_id=made["diff_id"])
    judged = report(peer, "verify", out)
    for field, name in {
        "size": "size",
        "uncompressed_size": "uncompressed_size",
        "files": "files",
        "chunks": "chunks",
        "diff_id": "diff_id",
        "toc_digest": "toc_digest",
    }.items():
        assert getattr(found, field) == judged[name]


def test_a_tree_made_by_buildkit(tmp_path: Path, peer: Path) -> None:
    tree = tmp_path / "tree"
    for i in range(300):
        (tree / f"dir{i % 7}").mkdir(parents=True, exist_ok=True)
        (tree / f"dir{i % 7}" / f"file{i}").write_bytes(RNG.randbytes(i * 37))
    (tree / "link").symlink_to("dir1")
    (tree / "hard").hardlink_to(tree / "dir1" / "file1")
    made = report(peer, "blob", "-how", "buildkit", tree, tmp_path / "blob")
    found = verify(tmp_path / "blob", toc_digest=made["toc_digest"], diff_id=made["diff_id"])
    assert found.files == 300


@pytest.mark.parametrize("tar", [b"", bytes(1024), tar_of(("d/", b""), ("e", b"")), tar_of(("e", b""), end=False)])
def test_little_layers(tar: bytes) -> None:
    assert verify(estargz(tar)).payload_size == 0


def test_tar_by_the_tar_program(tmp_path: Path, peer: Path) -> None:
    subprocess.run(
        ["tar", "--format=gnu", "-cf", tmp_path / "in.tar", "-C", "/usr/share/misc", "."],
        check=True,
        capture_output=True,
    )
    made = report(peer, "blob", "-how", "lossless", tmp_path / "in.tar", tmp_path / "blob")
    verify(tmp_path / "blob", diff_id=made["diff_id"])


def test_large_file_over_many_chunks() -> None:
    data = RNG.randbytes(1 << 20) * 5
    assert verify(estargz(tar_of(("f", data)), chunk_size=65536), threads=4).chunks == 80


# --- the TOC says something else than the tar


def first(name: str, /, **changes: Any) -> Callable[[Entries], None]:
    def edit(entries: Entries) -> None:
        next(entry for entry in entries if entry["name"] == name).update(changes)

    return edit


def without(name: str, *keys: str) -> Callable[[Entries], None]:
    def edit(entries: Entries) -> None:
        entry = next(entry for entry in entries if entry["name"] == name)
        for key in keys:
            del entry[key]

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (first("d/first", name="d/other"), "name: the tar has 'd/first', the TOC 'd/other'"),
        (first("d/first", name="./d/first"), "name: the tar has 'd/first', the TOC './d/first'"),
        (first("d/", name="d"), "name: the tar has 'd/', the TOC 'd'"),
        (first("pipe", type="dir"), "'pipe': type: the tar has 'fifo', the TOC 'dir'"),
        (first("hard", type="symlink"), "type: the tar has 'hardlink', the TOC 'symlink'"),
        (first("d/first", mode=0o6755), "mode"),
        (without("d/first", "mode"), "mode: the tar has 420, the TOC 0"),
        (first("d/first", uid=0), "uid: the tar has 7, the TOC 0"),
        (first("d/first", gid=1), "gid"),
        (first("d/first", userName="root"), "user_name: the tar has 'seven', the TOC 'root'"),
        (first("disk", groupName="wheel"), "group_name"),
        (first("d/first", modtime="2020-09-13T12:26:41Z"), "modtime: the tar has 1600000000, the TOC 1600000001"),
        (without("d/first", "modtime"), "modtime"),
        (first("half", modtime="2020-09-13T12:26:40Z"), "'half': modtime: the tar has 1600000001"),
        (first("d/first", modtime="yesterday"), "'d/first': modtime 'yesterday' is no RFC 3339 time"),
        (first("hard", linkName="device"), "link_name: the tar has 'd/first', the TOC 'device'"),
        (first("soft", linkName="/etc/shadow"), "link_name"),
        (first("d/first", linkName="x"), "link_name"),
        (first("device", devMajor=6), "dev_major: the tar has 5"),
        (first("device", devMinor=2), "dev_minor"),
        (first("d/first", devMinor=2), "dev_minor"),
        (first("ü" * 80, xattrs={"security.capability": "AQAAAw=="}), "xattrs"),
        (without("ü" * 80, "xattrs"), "xattrs: the tar has {'security.capability': 'AQAAAg=='}, the TOC {}"),
        (first("d/first", xattrs={"user.x": ""}), "xattrs"),
        (first("pipe", size=4), "size: the tar has 0, the TOC 4"),
        (first("pipe", digest=digest(b"")), "digest"),
        (first("d/empty", digest=digest(b"x")), "digest: the tar has 'sha256:e3b0"),
    ],
)
def test_each_field(edit: Callable[[Entries], None], message: str) -> None:
    with pytest.raises(VerificationError) as caught:
        verify(estargz(RICH, edit=edit))
    assert message in str(caught.value)


def remove(name: str) -> Callable[[Entries], None]:
    return lambda entries: entries.remove(next(entry for entry in entries if entry["name"] == name))


EXTRA = {"name": "extra", "type": "dir", "mode": 493}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (remove("owner again"), "entry 16: 'owner again' is in the tar and not in the TOC"),
        (remove("d/large"), "entry 4 'd/large': name"),
        (lambda entries: entries.append(EXTRA), "entry 17: 'extra' is in the TOC and not in the tar"),
        (lambda entries: entries.insert(1, EXTRA), "entry 1 'd/': name"),
        (lambda entries: entries.insert(9, entries.pop(8)), "entry 8 'hard': name"),
        (lambda entries: entries.append(dict(entries[3])), "entry 17: 'd/empty' is in the TOC and not in the tar"),
    ],
)
def test_entries_missing_and_surplus(edit: Callable[[Entries], None], message: str) -> None:
    with pytest.raises(VerificationError) as caught:
        verify(estargz(RICH, edit=edit))
    assert message in str(caught.value)


def test_two_contents_behind_one_name() -> None:
    """TOC and tar are each consistent, but show different bytes: the TOC's file is in the tar under another name."""
    good, evil = b"harmless", b"malware!"
    payload, toc = payload_and_toc(tar_of(("bin/sh", good), ("x", evil)))
    entries = toc["entries"]
    for key in ("offset", "digest", "chunkDigest", "innerOffset"):
        if key in entries[1]:
            entries[0][key] = entries[1][key]
    del entries[1]
    with pytest.raises(VerificationError, match="'bin/sh': digest"):
        verify(assemble(payload, encode(toc)))


def test_bytes_that_only_lazy_readers_see() -> None:
    """A chunk's member and the tar differ though each agrees with its own digest: the file digest exposes it."""

    def edit(entries: Entries) -> None:
        entries[0]["digest"] = entries[0]["chunkDigest"] = digest(b"other")

    with pytest.raises(
        VerificationError, match=f"'f', chunk at 0 .*expected {digest(b'other')}, found {digest(b'bytes')}"
    ):
        verify(estargz(tar_of(("f", b"bytes")), edit=edit))


@pytest.mark.parametrize("which", ["digest", "chunkDigest"])
@pytest.mark.parametrize("chunk_size", [1 << 22, 1000])
def test_each_digest(which: str, chunk_size: int) -> None:
    with pytest.raises(VerificationError, match=f"'d/large', chunk at .*expected {digest(b'')}, found sha256:"):
        verify(estargz(RICH, edit=first("d/large", **{which: digest(b"")}), chunk_size=chunk_size))


@pytest.mark.parametrize("text", ["sha256:", "md5:" + "0" * 32, "sha256:" + "0" * 63, "sha256:" + "G" * 64])
def test_malformed_digests_in_the_toc(text: str) -> None:
    for key in ("digest", "chunkDigest"):
        with pytest.raises(BlobError, match="'d/first': TOC: digest"):
            verify(estargz(RICH, edit=first("d/first", **{key: text})))


def test_missing_file_digest() -> None:
    with pytest.raises(BlobError, match="'d/first': TOC: digest ''"):
        verify(estargz(RICH, edit=without("d/first", "digest")))


def test_blobs_without_chunk_digests() -> None:
    def edit(entries: Entries) -> None:
        for entry in entries:
            entry.pop("chunkDigest", None)

    verify(estargz(RICH, edit=edit, chunk_size=1000, make_footer=legacy_footer))
    with pytest.raises(VerificationError, match="digest of the whole file: expected"):
        verify(
            estargz(
                RICH,
                edit=lambda entries: (edit(entries), first("d/large", digest=digest(b""))(entries)),
                chunk_size=1000,
            )
        )


# --- the stream


def test_toc_digest_and_diff_id() -> None:
    blob = estargz(RICH)
    right = verify(blob)
    assert right.toc_digest is not None
    verify(blob, toc_digest=right.toc_digest, diff_id=right.diff_id)
    with pytest.raises(VerificationError, match="TOC digest: expected"):
        verify(blob, toc_digest=digest(b""), diff_id=right.diff_id)
    with pytest.raises(VerificationError, match=f"DiffID: expected {digest(RICH)}, found {right.diff_id}"):
        verify(blob, diff_id=digest(RICH))


@pytest.mark.parametrize("option", ["toc_digest", "diff_id"])
@pytest.mark.parametrize("text", ["", "x", "sha256:x", "SHA256:" + "0" * 64, "sha256:" + "A" * 64])
def test_malformed_arguments(option: str, text: str) -> None:
    with pytest.raises(UsageError, match="64 lower-case hexadecimal digits"):
        verify(estargz(RICH), **{option: text})  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_argument(threads: int) -> None:
    with pytest.raises(UsageError, match="threads"):
        verify(estargz(RICH), threads=threads)


@pytest.mark.parametrize("extra", [b"\0", bytes(512), b"garbage", member(b""), member(b"data")])
def test_nothing_between_toc_and_footer(extra: bytes) -> None:
    with pytest.raises(VerificationError, match=f"{len(extra)} bytes at byte .*, between the TOC and the footer"):
        verify(estargz(RICH, between=extra))


@pytest.mark.parametrize("extra", [b"\0", bytes(512), b"garbage"])
def test_nothing_between_tar_and_toc(extra: bytes) -> None:
    with pytest.raises(BlobError, match="garbage after the compressed data"):
        verify(estargz(RICH, before=extra))


def test_hidden_tar_entries_behind_the_end() -> None:
    """What follows the end blocks is no entry for any reader, but the DiffID covers it."""
    behind = bytes(512) + tar_of(("hidden", b"x"))
    found = verify(estargz(RICH, before=member(behind)))
    assert found.entries == 17
    assert found.uncompressed_size == verify(estargz(RICH)).uncompressed_size + len(behind)


def test_footer_that_carries_data() -> None:
    """A footer's deflate stream is fixed; one with content would put bytes behind the TOC."""
    payload, toc = payload_and_toc(RICH)
    blob = bytearray(assemble(payload, encode(toc)))
    blob[-13:] = b"\x4b\x04\0" + (0xE8B7BE43).to_bytes(4, "little") + (1).to_bytes(4, "little") + bytes(2)
    with pytest.raises(BlobError):
        verify(bytes(blob))


@pytest.mark.parametrize("options", [{}, {"chunk_size": 700, "min_chunk": 2000}], ids=str)
def test_flipped_bits_are_noticed(options: dict[str, Any]) -> None:
    """Any damaged bit makes verify() fail, but for gzip header fields without meaning: then all digests still hold."""
    blob = estargz(tar_of(("a", b"first"), ("b", RNG.randbytes(900)), ("c", b"text " * 200)), **options)
    right = verify(blob)
    survived = 0
    for position in range(len(blob)):
        damaged = bytearray(blob)
        damaged[position] ^= 1 << position % 8
        try:
            found = verify(bytes(damaged), toc_digest=right.toc_digest, diff_id=right.diff_id, threads=1)
        except BlobError:
            continue
        assert found == right
        survived += 1
    assert survived < 10 * blob.count(b"\x1f\x8b\x08")


@pytest.mark.parametrize("cut", [1, 51, 60, 500, 2000])
def test_truncated(cut: int) -> None:
    with pytest.raises(BlobError):
        verify(estargz(RICH)[:-cut])


def test_payload_that_is_no_tar() -> None:
    with pytest.raises(BlobError, match=r"checksum|bad number"):
        verify(assemble(member(b"no tar at all" * 100), b'{"version":1,"entries":null}'))


@pytest.mark.timeout(60)
def test_failure_stops_the_scan() -> None:
    """A wrong chunk at the start ends the work on a large blob at once, without a thread left behind."""
    import threading

    data = estargz(tar_of(("a", b"x"), ("z", bytes(300 << 20))), edit=first("a", chunkDigest=digest(b"")))
    before = threading.active_count()
    with pytest.raises(VerificationError):
        verify(data, threads=1)
    assert threading.active_count() == before


# --- ordinary layers


PACKERS = [("gzip", member), ("zstd", zstandard.compress), ("plain", bytes)]


@pytest.mark.parametrize(("kind", "pack"), PACKERS, ids=[kind for kind, _ in PACKERS])
def test_ordinary_layers(kind: str, pack: Callable[[bytes], bytes]) -> None:
    blob = pack(RICH)
    assert verify(blob, diff_id=digest(RICH)) == Report(kind, len(blob), digest(RICH), len(RICH))
    with pytest.raises(VerificationError, match="DiffID: expected"):
        verify(blob, diff_id=digest(b""))
    with pytest.raises(BlobError, match="no eStargz footer"):
        verify(blob)
    with pytest.raises(BlobError, match="no eStargz footer"):
        verify(blob, toc_digest=digest(b""), diff_id=digest(RICH))


def test_ordinary_layer_that_is_damaged() -> None:
    with pytest.raises(BlobError, match="ends too early"):
        verify(member(RICH)[:-1], diff_id=digest(RICH))


class Ranges:
    """A blob that is far away: it comes in small parts, and what was asked for is known."""

    name = "distant"

    def __init__(self, blob: bytes) -> None:
        self.blob, self.size = blob, len(blob)
        self.prefetched: list[tuple[int, int]] = []

    def read_at(self, offset: int, size: int) -> bytes:
        return self.blob[offset : offset + min(size, 777)]

    def prefetch(self, ranges: list[tuple[int, int]]) -> None:
        self.prefetched += ranges


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("strict", [False, True])
def test_ranges(options: dict[str, Any], strict: bool) -> None:
    blob = estargz(RICH, **options)
    distant = Ranges(blob)
    assert verify(distant, strict=strict) == verify(blob, strict=strict)
    begin, size = distant.prefetched[0]
    assert 0 <= begin < begin + size < len(blob)


@pytest.mark.parametrize("key", ["digest", "chunkDigest"])
@pytest.mark.parametrize("chunk_size", [1 << 22, 1000])
def test_ranges_with_wrong_digests(key: str, chunk_size: int) -> None:
    blob = estargz(RICH, edit=first("d/large", **{key: digest(b"")}), chunk_size=chunk_size)
    with pytest.raises(
        VerificationError, match=f"distant: 'd/large', chunk at .*expected {digest(b'')}, found sha256:"
    ):
        verify(Ranges(blob))


@pytest.mark.parametrize("source", [Ranges, bytes])
def test_content_that_only_its_chunk_digest_covers(source: Callable[[bytes], Any]) -> None:
    """The file's digest is right for the tar, the chunk's for what lazy readers would get."""
    payload, toc = payload_and_toc(tar_of(("a", b"good")))
    toc["entries"][0] |= {"offset": len(payload), "chunkDigest": digest(b"evil")}
    with pytest.raises(
        VerificationError, match=f"'a', chunk at 0 .*expected {digest(b'good')}, found {digest(b'evil')}"
    ):
        verify(source(assemble(payload, encode(toc), before=member(b"evil" + bytes(508)))))


def test_ranges_that_end_too_early() -> None:
    distant = Ranges(estargz(RICH))
    distant.blob = distant.blob[:300] + bytes(len(distant.blob) - 300 - 5000) + distant.blob[-5000:]
    with pytest.raises(BlobError):
        verify(distant)


def test_file_objects(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(estargz(RICH))
    with (tmp_path / "blob").open("rb") as file:
        assert verify(file) == verify(io.BytesIO(file.read()))
