"""Layers made from tar streams: through build, Writer and Compressor, from and to everything that they take."""

from __future__ import annotations

import array
import functools
import gc
import gzip
import hashlib
import io
import json
import os
import random
import shutil
import socket
import subprocess
import tarfile
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from conftest import missing
from reference.blobs import legacy_footer, member, tar_of, toc_tar
from reference.peer import report, run
from reference.tar_headers import meta, padded, pax, plain_header, raw_header, record
from tars import (
    END,
    base256,
    blob_of,
    check_layer,
    entry,
    everything,
    in_thread,
    judge,
    nothing_leaks,
    sha256,
    unpacked,
)

import estargz
from estargz import BlobError, Compressor, EstargzError, Layer, SinkError, SourceError, TarError, UsageError, Writer
from estargz.layer import MEDIA_TYPES

pytestmark = pytest.mark.timeout(60)

RNG = random.Random(7)
TAR = everything() + END
SMALL = entry(b"a", b"x" * 700) + entry(b"b/", type=b"5") + entry(b"b/c", b"y", (b"mtime", b"1.5")) + END
MIXED = tar_of(
    *(
        (f"f{i}", RNG.randbytes(RNG.randrange(9000)) if i % 3 else b"text %d\n" % i * RNG.randrange(900))
        for i in range(90)
    )
)


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def unzstd(data: bytes) -> bytes:
    return zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True).read()


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "plain": lambda tar: tar,
    "gzip": member,
    "gzip of two members": lambda tar: member(tar[:1000]) + member(tar[1000:]),
    "gzip with name": lambda tar: named_gzip(tar),
    "zstd": zstd,
    "zstd of two frames": lambda tar: zstd(tar[:1000]) + zstd(tar[1000:]),
    "estargz": lambda tar: blob_of(tar, level=5, chunk_size=700)[1],
    "legacy": lambda tar: member(tar) + member(toc_tar(b'{"version":1}')) + legacy_footer(len(member(tar))),
}


def named_gzip(data: bytes) -> bytes:
    out = io.BytesIO()
    with gzip.GzipFile("name.tar", "wb", fileobj=out) as packer:
        packer.write(data)
    return out.getvalue()


def through_pipe(data: bytes) -> io.FileIO:
    read, write = os.pipe()

    def send() -> None:
        with open(write, "wb", buffering=0) as out:
            for at in range(0, len(data), 1999):
                out.write(data[at : at + 1999])

    in_thread(send)
    return io.FileIO(read)


def through_socket(data: bytes) -> Any:
    ours, theirs = socket.socketpair()

    def send() -> None:
        with theirs:
            theirs.sendall(data)

    in_thread(send)
    with ours:
        return ours.makefile("rb", buffering=0)


class Trickle:
    """Gives what it likes, as long as it is not more than it is asked for."""

    def __init__(self, data: bytes, seed: int) -> None:
        self.stream, self.chance = io.BytesIO(data), random.Random(seed)

    def read(self, size: int) -> bytes:
        return self.stream.read(self.chance.randint(1, min(size, self.chance.choice([1, 3, 700, 5000]))))


# --- sources


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("way", ["path", "file", "object", "trickle", "pipe", "socket"])
def test_sources(tmp_path: Path, kind: str, way: str) -> None:
    wanted, _ = blob_of(MIXED)
    data = PACKED[kind](MIXED)
    path = tmp_path / "source"
    path.write_bytes(data)
    with nothing_leaks():
        if way == "path":
            layer, _ = blob_of(path)
        elif way == "file":
            with path.open("rb") as file:
                layer, _ = blob_of(file)
                assert not file.closed
        elif way == "object":
            layer, _ = blob_of(data)
        elif way == "trickle":
            layer, _ = blob_of(Trickle(data, 5))
        else:
            with through_pipe(data) if way == "pipe" else through_socket(data) as source:
                layer, _ = blob_of(source)
    assert layer == wanted


def test_file_is_read_from_where_it_stands(tmp_path: Path) -> None:
    (tmp_path / "tar").write_bytes(b"something else" + TAR)
    with (tmp_path / "tar").open("rb", buffering=0) as file:
        file.seek(14)
        assert blob_of(file)[0] == blob_of(TAR)[0]


def test_source_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="path or an object with read"):
        estargz.build(7, io.BytesIO())  # type: ignore[arg-type]
    with pytest.raises(SourceError, match=r"gone: cannot be opened: No such file or directory; check"):
        estargz.build(tmp_path / "gone", io.BytesIO())
    with pytest.raises(UsageError, match="goes with a directory"):
        estargz.build(io.BytesIO(TAR), io.BytesIO(), lower=tmp_path)


def test_source_that_fails() -> None:
    class Broken(Exception):
        pass

    class Source:
        def __init__(self) -> None:
            self.left = 3

        def read(self, size: int) -> bytes:
            self.left -= 1
            if not self.left:
                raise Broken("line lost")
            return TAR[:4]

    with nothing_leaks(), pytest.raises(Broken, match="^line lost$"):
        estargz.build(Source(), io.BytesIO())


def test_source_that_does_not_wait() -> None:
    read, write = os.pipe()
    with open(write, "wb", buffering=0) as out, open(read, "rb", buffering=0) as source:
        os.set_blocking(read, False)
        out.write(SMALL[:2048])
        with pytest.raises(SourceError, match="cannot be read: Resource temporarily unavailable"):
            estargz.build(source, io.BytesIO())

    class Hasty:
        def __init__(self) -> None:
            self.parts: list[bytes | None] = [SMALL[:2048], None]

        def read(self, size: int) -> bytes | None:
            return self.parts.pop(0)

    with pytest.raises(SourceError, match="does not wait"):
        estargz.build(Hasty(), io.BytesIO())  # type: ignore[arg-type]


def test_source_whose_descriptor_is_closed(tmp_path: Path) -> None:
    (tmp_path / "tar").write_bytes(TAR)
    with (tmp_path / "tar").open("rb") as file:
        file.close()
        with pytest.raises(ValueError, match="closed file"):
            estargz.build(file, io.BytesIO())


def test_directory_as_a_tar_stream(tmp_path: Path) -> None:
    """A descriptor of a directory gives no bytes."""
    handle = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises((OSError, SourceError)):
            estargz.build(io.FileIO(handle, closefd=False), io.BytesIO())
    finally:
        os.close(handle)


# --- lossless


@functools.cache
def endings() -> dict[str, bytes]:
    body = everything()
    return {
        "two blocks": body + END,
        "no end": body,
        "one zero block": body + bytes(512),
        "10 KiB blocking": body + bytes(10240 - len(body) % 10240),
        "many zero blocks": body + bytes(512 * 41),
        "blocks of garbage": body + END + b"garbage!" * 64 * 5,
        "odd garbage": body + END + b"garbage",
        "odd zeros": body + END + bytes(77),
        "entries behind the end": body + END + entry(b"hidden", b"x") + END,
        "nothing but the end": END,
        "only payload": entry(b"f", RNG.randbytes(1_500_000)),
        "much garbage": body + END + RNG.randbytes(512 * 5000),
        "many directories": b"".join(entry(b"d%d/" % i, type=b"5") for i in range(3000)) + END,
    }


@pytest.mark.parametrize("ending", endings())
def test_the_stream_comes_back(peer: Path, tmp_path: Path, ending: str) -> None:
    tar = endings()[ending]
    for number, options in enumerate([{}, {"chunk_size": 1000, "level": 6}, {"min_chunk_size": 5000}]):
        blob = tmp_path / str(number)
        layer = estargz.build(io.BytesIO(tar), blob, **options)  # type: ignore[arg-type]
        assert unpacked(peer, blob) == tar
        judge(peer, blob, layer)


@pytest.mark.parametrize("compression", ["gzip", "zstd", "uncompressed"])
@pytest.mark.parametrize("ending", endings())
def test_the_stream_is_all_there_is(ending: str, compression: str) -> None:
    tar = endings()[ending]
    layer, blob = blob_of(tar, compression=compression)
    assert {"gzip": gzip.decompress, "zstd": unzstd}.get(compression, bytes)(blob) == tar
    assert (layer.diff_id, layer.uncompressed_size, layer.toc_digest) == (sha256(tar), len(tar), None)
    assert layer.annotations == {"containerd.io/uncompressed": layer.diff_id}


@pytest.mark.parametrize("ending", [ending for ending in endings() if not ending.startswith("odd")])
def test_building_again_changes_nothing(tmp_path: Path, ending: str) -> None:
    layer, blob = blob_of(endings()[ending], chunk_size=1000)
    (tmp_path / "blob").write_bytes(blob)
    assert blob_of(tmp_path / "blob", chunk_size=1000)[0] == layer
    with through_pipe(blob) as pipe:
        assert blob_of(pipe, chunk_size=1000)[0] == layer
    assert blob_of(blob, compression="uncompressed")[1] == endings()[ending]


@pytest.mark.parametrize("ending", ["odd garbage", "odd zeros"])
def test_a_blob_whose_tar_ends_in_an_odd_place(tmp_path: Path, ending: str) -> None:
    """The table of contents then is not where a tar header can be: better no layer than one with two tables."""
    _, blob = blob_of(endings()[ending])
    with pytest.raises(SourceError, match="estargz unpack"):
        blob_of(blob)


@pytest.mark.parametrize("how", ["build", "buildkit"])
def test_blobs_made_by_go(peer: Path, tmp_path: Path, how: str) -> None:
    """Go's Build leaves no end of the archive; BuildKit's compressor keeps it."""
    source, theirs = tmp_path / "source", tmp_path / "theirs"
    if how == "build":
        source.write_bytes(SMALL)
    else:
        source.mkdir()
        (source / "file").write_bytes(b"content" * 999)
    subprocess.run([peer, "blob", "-how", how, source, theirs], check=True, capture_output=True)
    layer = estargz.build(theirs, tmp_path / "ours")
    assert unpacked(peer, tmp_path / "ours") == unpacked(peer, theirs)
    judge(peer, tmp_path / "ours", layer)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("compression", MEDIA_TYPES)
def test_the_digest_of_the_tar_alone(compression: str, threads: int) -> None:
    for tar in (MIXED, *endings().values()):
        layer, _ = blob_of(tar, compression=compression, threads=threads)
        assert layer.tar_digest == sha256(tar)
        assert (layer.tar_digest == layer.diff_id) == (compression != "estargz")


def test_the_digest_of_a_tree_alone(peer: Path, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    for i in range(3000):
        (tmp_path / "tree" / f"f{i}").write_bytes(RNG.randbytes(i % 1500))
    for source in (tmp_path / "tree", tmp_path / "nothing"):
        source.mkdir(exist_ok=True)
        made = [estargz.build(source, tmp_path / "blob", threads=threads) for threads in (1, 2, 5)]
        assert {layer.tar_digest for layer in made} == {sha256(unpacked(peer, tmp_path / "blob"))}
        plain, blob = blob_of(source, compression="uncompressed", landmark=False)
        assert plain.tar_digest == plain.diff_id == sha256(blob)
        assert blob_of(source, landmark=False)[0].tar_digest == plain.diff_id


# --- zstd


def frames(blob: bytes) -> list[tuple[int, bytes]]:
    """Of each frame the size that its header states, and what is in it. Every frame must have a checksum."""
    found = []
    while blob:
        header = zstandard.get_frame_parameters(blob)
        assert header.has_checksum
        inflating = zstandard.ZstdDecompressor().decompressobj()
        found.append((header.content_size, inflating.decompress(blob)))
        assert inflating.eof
        blob = inflating.unused_data
    return found


def large_tar() -> bytes:
    return b"".join(entry(b"f%d" % i, RNG.randbytes(40_000) * 40) for i in range(16)) + END


@pytest.mark.parametrize("level", [None, 1, 19])
def test_frames(level: int | None) -> None:
    tar = large_tar()
    made = frames(blob_of(tar, compression="zstd", level=level)[1])
    assert b"".join(data for _, data in made) == tar
    assert [size for size, _ in made] == [len(data) for _, data in made]
    least = (8 if level == 19 else 4) << 20
    assert all(least <= size < least + (3 << 20) for size, _ in made[:-1])
    assert len(made) == {None: 6, 1: 6, 19: 3}[level]


@pytest.mark.parametrize("level", [*range(20), None])
def test_levels_of_zstd(level: int | None) -> None:
    for tar in (END, TAR, MIXED):
        layer, blob = blob_of(tar, compression="zstd", level=level)
        assert unzstd(blob) == tar
        assert layer.media_type == "application/vnd.oci.image.layer.v1.tar+zstd"
        assert blob == blob_of(tar, compression="zstd", level=level or 3)[1]


def test_zstd_as_others_read_it(peer: Path, tmp_path: Path) -> None:
    tar = large_tar()
    layer = estargz.build(io.BytesIO(tar), tmp_path / "blob", compression="zstd")
    if shutil.which("zstd") is None:
        missing("zstd is not installed")
    subprocess.run(["zstd", "--test", "--quiet", tmp_path / "blob"], check=True)
    assert subprocess.run(["zstd", "-dc", tmp_path / "blob"], check=True, capture_output=True).stdout == tar
    (tmp_path / "go").mkdir()
    found = report(peer, "apply", "-no-same-owner", tmp_path / "blob", tmp_path / "go")
    assert found["diff_ids"] == [layer.diff_id] == [sha256(tar)]
    assert len(list((tmp_path / "go").iterdir())) == 16


def test_zstd_as_this_package_reads_it(tmp_path: Path) -> None:
    tar = large_tar()
    layer = estargz.build(io.BytesIO(tar), tmp_path / "blob", compression="zstd", threads=3)
    assert estargz.verify(tmp_path / "blob", diff_id=layer.diff_id).uncompressed_size == len(tar)
    estargz.extract(tmp_path / "blob", tmp_path / "tree")
    assert len(list((tmp_path / "tree").iterdir())) == 16
    assert estargz.build(tmp_path / "blob", io.BytesIO(), compression="zstd") == layer
    assert estargz.build(tmp_path / "blob", io.BytesIO()).tar_digest == layer.tar_digest


def test_memory_for_zstd() -> None:
    for level, least in ((16, 14 << 20), (17, 22 << 20)):
        with pytest.raises(
            UsageError, match=rf"too small for compression zstd at level {level}: give at least \d+ bytes"
        ):
            blob_of(TAR, compression="zstd", level=level, memory=least)
        blob_of(TAR, compression="zstd", level=level, memory=least * 21 // 10)


# --- what is refused


def refused(data: bytes, message: str, kind: type[EstargzError] = TarError, **options: Any) -> None:
    """By build and Writer alike; nothing is left running."""
    with nothing_leaks():
        with pytest.raises(kind, match=message) as built:
            estargz.build(io.BytesIO(data), io.BytesIO(), **options)
        with pytest.raises(kind, match=message) as written:
            write_all(data, len(data) or 1, **options)
    assert str(built.value) == str(written.value)


def write_all(data: bytes, size: int, **options: Any) -> Layer:
    with Writer(io.BytesIO(), **options) as writer:
        for at in range(0, len(data), size):
            writer.write(data[at : at + size])
    return writer.layer


FRONT = entry(b"front", b"f" * 600)


@pytest.mark.parametrize("typeflag", [b"7", b"V", b"D", b"S", b"M", b"N", b"A", b"8", b"\xff"])
@pytest.mark.parametrize("compression", MEDIA_TYPES)
def test_types_that_no_layer_holds(typeflag: bytes, compression: str) -> None:
    what = "sparse entry" if typeflag == b"S" else "entry type"
    bad = entry(b"some/thing", type=typeflag)
    refused(FRONT + bad + END, f"^some/thing: {what} at byte {len(FRONT)}", compression=compression)


def test_global_pax_headers() -> None:
    bad = meta(record(b"comment", b"x"), b"g")
    refused(FRONT + bad + entry(b"x") + END, f"^meta: entry type at byte {len(FRONT)} cannot be part of a layer")


@pytest.mark.parametrize("options", [["--format=gnu"], *(["--sparse-version=" + v] for v in ("0.0", "0.1", "1.0"))])
def test_sparse_files_of_gnu_tar(tmp_path: Path, options: list[str]) -> None:
    if shutil.which("tar") is None:
        missing("GNU tar is not installed")
    with (tmp_path / "holes").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"end")
        file.truncate(1 << 21)
    command = ["tar", "-C", tmp_path, "--sparse", *(options if "gnu" in options[0] else ["--format=pax", *options])]
    made = subprocess.run([*command, "-cf", "-", "holes"], check=True, capture_output=True).stdout
    refused(made, r"^\S*holes\S*: sparse entry at byte \d+; make the tar without --sparse")


@pytest.mark.parametrize("name", [b"", b"./", b"/", b".//", b"x/../", b"../", b"/.././"])
def test_the_reserved_name(name: bytes) -> None:
    name += b"stargz.index.json"
    bad = FRONT + entry(name, b"{}") + END
    message = rf"^{name.decode()}: is a name reserved by the eStargz format \(at byte {len(FRONT)}\)"
    refused(bad, message, SourceError)
    layer, _ = blob_of(bad, compression="gzip")
    assert layer.diff_id == sha256(bad)


@pytest.mark.parametrize(
    "name", [b"dir/stargz.index.json", b"stargz.index.jso", b"stargz.index.json.", b"x/../y/stargz.index.json"]
)
def test_names_that_look_like_the_reserved_one(name: bytes) -> None:
    blob_of(FRONT + entry(name, b"{}") + END)


def test_the_reserved_name_in_a_compressed_tar() -> None:
    """It must not be taken for the table of contents of a blob."""
    bad = FRONT + entry(b"stargz.index.json", b"{}") + END
    for data in (member(bad), member(FRONT) + member(bad)):
        with pytest.raises(SourceError, match=r"stargz\.index\.json, a name reserved"):
            blob_of(data)
    with pytest.raises(SourceError, match="is a name reserved"):
        blob_of(zstd(bad))


def test_bad_checksum() -> None:
    good = entry(b"second", b"x")
    for at in (0, 5, 100, 150, 257, 300):
        bad = bytearray(good)
        bad[at] ^= 0x10
        refused(FRONT + bytes(bad) + END, f"bad header checksum at byte {len(FRONT)}")
    refused(b"this is no tar, " * 100, "bad header checksum at byte 0")


@pytest.mark.parametrize(
    "size",
    [b"-0000000001\0", base256(-1, 12), base256(2**62 + 1, 12), base256(2**63 - 1, 12), b"\xff" * 12, b"0000000009x\0"],
)
def test_sizes_that_are_none(size: bytes) -> None:
    refused(FRONT + plain_header(b"huge", size=size) + END, f"^huge: bad number in the header at byte {len(FRONT)}")


@pytest.mark.parametrize("size", [b"-1", b"9223372036854775807", b"99999999999999999999", b"1x", b"0x10"])
def test_pax_sizes_that_are_none(size: bytes) -> None:
    bad = pax((b"path", b"long name"), (b"size", size)) + plain_header(b"short")
    refused(FRONT + bad + END, rf"bad number in the header at byte {len(FRONT) + 1024}|malformed PAX record")


def test_a_size_beyond_the_input() -> None:
    bad = FRONT + plain_header(b"big", size=base256(1 << 50, 12)) + b"x" * 5000
    refused(bad, f"^big: the tar stream ends too early, at byte {len(bad)}")


def test_extended_header_without_an_entry() -> None:
    refused(FRONT + pax((b"path", b"x")) + END, "extended header without an entry, at byte")
    refused(FRONT + pax((b"path", b"x")), "extended header without an entry, at byte")


def test_extended_header_that_is_too_large() -> None:
    refused(meta(b"n" * ((1 << 20) + 1), b"L") + entry(b"x") + END, "extended header over 1 MiB at byte 0")


def test_one_zero_block_followed_by_data() -> None:
    refused(FRONT + bytes(512) + entry(b"x") + END, f"a single zero block followed by data, at byte {len(FRONT) + 512}")
    refused(bytes(512) + b"x" * 512, "a single zero block followed by data, at byte 512")


# --- streams that end early


LAYER_OF: dict[str, Callable[[bytes], bytes]] = {
    "uncompressed": lambda blob: blob,
    "gzip": lambda blob: subprocess.run(["gzip", "-dc"], input=blob, capture_output=True, check=True).stdout,
    "zstd": lambda blob: subprocess.run(["zstd", "-dc"], input=blob, capture_output=True, check=True).stdout,
}
EMPTY = {"gzip": member(b""), "zstd": zstd(b"")}


def test_no_input(tmp_path: Path) -> None:
    """What writes a tar has failed before its first byte: that is no layer."""
    (tmp_path / "empty").touch()
    for source in (tmp_path / "empty", b""):
        with nothing_leaks(), pytest.raises(SourceError, match="is empty, and a tar is not; check what writes it"):
            blob_of(source)


@pytest.mark.parametrize("compression", LAYER_OF)
@pytest.mark.parametrize("kind", EMPTY)
def test_empty_input(tmp_path: Path, kind: str, compression: str) -> None:
    (tmp_path / "empty").write_bytes(EMPTY[kind])
    with nothing_leaks():
        layer, blob = blob_of(tmp_path / "empty", compression=compression)
    assert blob_of(EMPTY[kind], compression=compression, threads=3) == (layer, blob)
    assert LAYER_OF[compression](blob) == b""
    assert (layer.uncompressed_size, layer.diff_id, layer.tar_digest) == (0, sha256(b""), sha256(b""))


@pytest.mark.parametrize("kind", EMPTY)
def test_empty_input_as_estargz(tmp_path: Path, peer: Path, kind: str) -> None:
    """All of it is as Go makes it; but only this package's reader can unpack a blob that begins with its table."""
    (tmp_path / "empty").touch()
    theirs = report(peer, "blob", "-how", "lossless", tmp_path / "empty", tmp_path / "theirs")
    with nothing_leaks():
        layer, blob = blob_of(EMPTY[kind])
    assert (layer.diff_id, layer.toc_digest) == (theirs["diff_id"], theirs["toc_digest"])
    assert (layer.uncompressed_size, layer.tar_digest) == (theirs["uncompressed_size"], sha256(b""))
    (tmp_path / "ours").write_bytes(blob)
    assert judge(peer, tmp_path / "ours", layer)["entries"] == 0
    assert gzip.decompress(blob) == gzip.decompress((tmp_path / "theirs").read_bytes())
    for name in ("ours", "theirs"):
        with estargz.open(tmp_path / name) as opened:
            assert (opened.toc_offset, len(opened.toc), opened.open_tar().read()) == (0, 0, b"")
        assert estargz.verify(tmp_path / name, diff_id=layer.diff_id, strict=True).errors == ()
        assert blob_of(tmp_path / name) == (layer, blob)
        assert blob_of(tmp_path / name, compression="gzip") == blob_of(member(b""), compression="gzip")


def test_empty_input_with_a_prefetch_list(tmp_path: Path, peer: Path) -> None:
    layer, blob = blob_of(member(b""), prefetch=["gone"], allow_missing=True)
    (tmp_path / "blob").write_bytes(blob)
    assert (layer.missing, judge(peer, tmp_path / "blob", layer)["files"]) == (("gone",), 1)
    assert unpacked(peer, tmp_path / "blob").startswith(b".prefetch.landmark\0")


@pytest.mark.parametrize("compression", [*LAYER_OF, "estargz"])
def test_writer_without_input(compression: str) -> None:
    wanted = blob_of(member(b""), compression=compression)
    for parts in ([], [b""], [b"", b""]):
        sink = io.BytesIO()
        with nothing_leaks(), Writer(sink, compression=compression) as writer:
            for part in parts:
                writer.write(part)
        assert (writer.layer, sink.getvalue()) == wanted


def places(tar: bytes) -> tuple[set[int], set[int]]:
    """Where a stream may end: between entries and anywhere behind the second zero block; and in a payload's padding."""
    borders, paddings, at, pending = {0}, set(), 0, False
    while at < len(tar):
        header = tar[at : at + 512]
        if not header.strip(b"\0"):
            return borders | {at + 512} | set(range(at + 1024, len(tar) + 1)), paddings
        pending = header[156:157] in b"xLK"
        payload_end = at + 512 + int(header[124:135], 8)
        at = payload_end + -payload_end % 512
        if not pending:
            borders.add(at)
            paddings |= set(range(payload_end, at))
    return borders, paddings


@pytest.mark.parametrize("kind", ["plain", "gzip"])
def test_truncation_anywhere(kind: str) -> None:
    """A tar may end between two entries; in a payload's padding only where no table of contents is to follow."""
    tar = SMALL + b"tail"
    borders, paddings = places(tar)
    for cut in range(kind == "plain", len(tar)):  # a file without a byte is refused as such
        data = tar[:cut] if kind == "plain" else member(tar[:cut])
        if cut in borders | paddings:
            assert blob_of(data, threads=1, compression="uncompressed")[1] == tar[:cut]
        if cut in borders:
            continue
        for compression in ("estargz", "uncompressed"):
            if cut in paddings and compression != "estargz":
                continue
            with pytest.raises(TarError) as caught:
                estargz.build(io.BytesIO(data), io.BytesIO(), threads=1, compression=compression)
            message = str(caught.value)
            assert ("inside the padding of its last file, at byte" in message) == (cut in paddings)
            assert cut in paddings or "ends too early, at byte" in message or "without an entry, at byte" in message


def test_truncation_as_go_sees_it(tmp_path: Path, peer: Path) -> None:
    """Go passes over extended headers that lack their entry or their end, so there is none here."""
    tar = entry(b"a", b"x" * 700) + entry(b"b/", type=b"5") + entry(b"b/c", b"y") + END
    borders, paddings = places(tar)
    edges = {cut + by for cut in borders | {min(paddings), max(paddings)} for by in (-1, 0, 1)}
    for cut in sorted((edges | set(range(0, len(tar), 201))) & set(range(len(tar)))):
        (tmp_path / "tar").write_bytes(tar[:cut])
        theirs = subprocess.run([peer, "tarlist", tmp_path / "tar"], capture_output=True, check=False)
        assert (theirs.returncode == 0) == (cut in borders | paddings), (cut, theirs.stderr)


HALF = entry(b"first", b"x" * 3000) + entry(b"last", RNG.randbytes(2_500_001))
PADDING = -2_500_001 % 512


@pytest.mark.parametrize("left", [0, 1, PADDING - 1])
@pytest.mark.parametrize("compression", LAYER_OF)
def test_half_a_padding(compression: str, left: int) -> None:
    tar = HALF[: len(HALF) - PADDING + left]
    layer, blob = blob_of(tar, compression=compression, threads=1)
    assert LAYER_OF[compression](blob) == tar
    assert (layer.uncompressed_size, layer.diff_id, layer.tar_digest) == (len(tar), sha256(tar), sha256(tar))
    for source in (member(tar), zstd(tar), Trickle(tar, 1)):
        assert blob_of(source, compression=compression, threads=3) == (layer, blob)
    sink = io.BytesIO()
    with Writer(sink, compression=compression) as writer:
        for at in range(0, len(tar), 70_001):
            writer.write(tar[at : at + 70_001])
    assert (writer.layer, sink.getvalue()) == (layer, blob)


@pytest.mark.parametrize("left", [0, PADDING - 1])
def test_half_a_padding_takes_no_table(tmp_path: Path, left: int) -> None:
    tar = HALF[: len(HALF) - PADDING + left]
    message = (
        f"^last: .* inside the padding of its last file, at byte {len(tar)}, so that .* cannot follow; make it a whole"
    )
    (tmp_path / "tar").write_bytes(tar)
    for source in (tmp_path / "tar", io.BytesIO(tar), io.BytesIO(member(tar))):
        for options in ({}, {"prefetch": ["last"]}):
            with nothing_leaks(), pytest.raises(TarError, match=message):
                estargz.build(source, tmp_path / "blob", **options)
            if not isinstance(source, Path):
                source.seek(0)
    writer = Writer(tmp_path / "blob")
    writer.write(tar)
    with pytest.raises(TarError, match=message):
        writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["tar"]
    assert blob_of(tar + bytes(PADDING - left))[0].tar_digest == sha256(HALF)


def test_half_a_padding_in_front_of_a_table(tmp_path: Path, peer: Path) -> None:
    """Go's writer drops such a padding and lets its table follow at once, where no reader of tars finds it."""
    (tmp_path / "tar").write_bytes(HALF[:-1])
    run(peer, "blob", "-how", "lossless", tmp_path / "tar", tmp_path / "blob")
    with pytest.raises(BlobError, match="last: the tar stream ends inside the padding of its last file"):
        estargz.verify(tmp_path / "blob")


def test_truncation_names_the_entry() -> None:
    refused(
        entry(b"first", b"x") + entry(b"second", b"y" * 5000)[:3000], "^second: .* at byte 4024; the input is truncated"
    )


@pytest.mark.parametrize("kind", ["gzip", "gzip of two members", "zstd", "zstd of two frames", "estargz"])
def test_compressed_input_that_is_cut(kind: str) -> None:
    data = PACKED[kind](SMALL)
    with nothing_leaks():
        for cut in range(4, len(data), 1 if len(data) < 1000 else 7):
            if kind == "estargz" and cut >= len(data) - 51:
                continue
            try:
                layer, _ = blob_of(data[:cut], threads=1)
            except SourceError as error:
                assert any(word in str(error) for word in ("early", "reserved", "garbage")), error
            else:  # cut between two members or frames, and there the tar could end
                assert "two" in kind or kind == "estargz"
                assert layer.uncompressed_size >= 512


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_damaged_compressed_input(kind: str) -> None:
    """No flipped bit ever goes unnoticed into a layer. A zstd frame may do without a checksum, so give it one."""
    data = PACKED[kind](SMALL) if kind == "gzip" else zstandard.ZstdCompressor(write_checksum=True).compress(SMALL)
    intact = sha256(SMALL)
    for at in range(len(data)):
        bad = bytearray(data)
        bad[at] ^= 1 << at % 8
        try:
            layer, _ = blob_of(bytes(bad), threads=1, compression="uncompressed")
        except (SourceError, EstargzError):
            continue
        assert layer.diff_id == intact, at


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_garbage_behind_compressed_input(kind: str) -> None:
    data = PACKED[kind](SMALL) + b"garbage"
    with pytest.raises(SourceError, match=rf"garbage after the compressed data, at byte {len(data) - 7}"):
        blob_of(data)


def test_checksum_of_gzip_is_checked(tmp_path: Path) -> None:
    data = bytearray(member(SMALL))
    data[-8] ^= 1
    (tmp_path / "bad.tar.gz").write_bytes(data)
    with pytest.raises(SourceError, match=r"bad\.tar\.gz: gzip checksum mismatch"):
        blob_of(tmp_path / "bad.tar.gz")
    raw = zlib.compressobj(wbits=-15)
    with pytest.raises(EstargzError):
        blob_of(raw.compress(SMALL) + raw.flush())


# --- Writer


@pytest.mark.parametrize("size", [*range(1, 24), 511, 512, 513, 1024, 4096, 65536])
def test_every_size_of_writes(size: int) -> None:
    data = TAR if size > 3 else SMALL
    wanted = blob_of(data, chunk_size=700)[0]
    assert write_all(data, size, chunk_size=700) == wanted


def test_random_sizes_of_writes() -> None:
    wanted = blob_of(MIXED)[0]
    for seed in range(10):
        chance = random.Random(seed)
        sink = io.BytesIO()
        with Writer(sink) as writer:
            at = 0
            while at < len(MIXED):
                size = chance.choice([0, 1, 100, 512, 5000, 200_000])
                assert writer.write(MIXED[at : at + size]) == len(MIXED[at : at + size])
                at += size
        assert writer.layer == wanted
        check_layer(writer.layer, sink.getvalue())


def test_buffers_of_every_kind() -> None:
    wanted = blob_of(TAR)[0]
    kinds: list[Callable[[bytes], Any]] = [
        bytes,
        bytearray,
        memoryview,
        lambda data: memoryview(bytearray(data)),
        lambda data: memoryview(b"##" + data)[2:],
        lambda data: memoryview(data).cast("Q"),
        lambda data: array.array("I", data),
    ]
    for kind in kinds:
        with Writer(io.BytesIO()) as writer:
            assert writer.write(kind(TAR)) == len(TAR)
        assert writer.layer == wanted


def test_buffer_may_change_after_write() -> None:
    buffer = bytearray(4096)
    with Writer(io.BytesIO()) as writer:
        for at in range(0, len(TAR), 4096):
            part = TAR[at : at + 4096]
            buffer[: len(part)] = part
            writer.write(memoryview(buffer)[: len(part)])
            buffer[:] = b"\xaa" * 4096
    assert writer.layer == blob_of(TAR)[0]


@pytest.mark.parametrize("thing", ["text", None, 7, memoryview(bytes(64))[::2]])
def test_what_cannot_be_written(thing: Any) -> None:
    with nothing_leaks():
        writer = Writer(io.BytesIO())
        writer.write(TAR[:5000])
        with pytest.raises((TypeError, BufferError)):
            writer.write(thing)
        with pytest.raises(EstargzError, match="closed"):
            writer.write(TAR[5000:])


def test_closing_twice_and_use_afterwards(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "blob")
    with pytest.raises(EstargzError, match="not finished"):
        _ = writer.layer
    writer.write(TAR)
    layer = writer.close()
    assert writer.close() is layer
    assert writer.layer is layer
    writer.abort()
    assert (tmp_path / "blob").stat().st_size == layer.size
    with pytest.raises(EstargzError, match="the writer is closed"):
        writer.write(b"more")


def test_context_manager_may_be_closed_inside(tmp_path: Path) -> None:
    with Writer(tmp_path / "blob") as writer:
        writer.write(TAR)
        layer = writer.close()
    assert writer.layer is layer


@pytest.mark.parametrize("how", ["abort", "exception", "delete", "nothing written"])
def test_giving_up_leaves_nothing(tmp_path: Path, how: str) -> None:
    with nothing_leaks():
        if how == "exception":
            with pytest.raises(ZeroDivisionError), Writer(tmp_path / "blob") as writer:
                writer.write(MIXED)
                raise ZeroDivisionError
        else:
            writer = Writer(tmp_path / "blob", threads=3)
            if how != "nothing written":
                writer.write(MIXED)
            if how == "delete":
                del writer
                gc.collect()
            else:
                writer.abort()
                writer.abort()
                with pytest.raises(EstargzError, match="closed"):
                    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_closes(tmp_path: Path) -> None:
    with nothing_leaks():
        writer = Writer(tmp_path / "blob")
        with pytest.raises(TarError, match="checksum"):
            writer.write(b"x" * 512)
        for use in (writer.close, lambda: writer.write(b"x")):
            with pytest.raises(EstargzError, match="the writer is closed"):
                use()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_close_leaves_nothing(tmp_path: Path) -> None:
    with nothing_leaks(), pytest.raises(TarError, match="too early"), Writer(tmp_path / "blob") as writer:
        writer.write(TAR[:700])
    assert list(tmp_path.iterdir()) == []
    writer.abort()


def test_options_are_checked_before_the_destination(tmp_path: Path) -> None:
    for options in (
        {"level": 13},
        {"compression": "zst"},
        {"compression": "zstd", "level": 20},
        {"chunk_size": 0},
        {"threads": 0},
        {"memory": 1},
    ):
        with nothing_leaks(), pytest.raises(UsageError):
            Writer(tmp_path / "blob", **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Writer(tmp_path / "blob", colour="red")
    assert list(tmp_path.iterdir()) == []


def test_media_type_is_the_callers() -> None:
    with Writer(io.BytesIO(), media_type="application/x-mine") as writer:
        writer.write(TAR)
    assert writer.layer.descriptor()["mediaType"] == "application/x-mine"


def test_many_writers_at_once() -> None:
    wanted = blob_of(MIXED)[0]
    writers = [Writer(io.BytesIO(), threads=2) for _ in range(6)]
    for at in range(0, len(MIXED), 10_000):
        for writer in writers:
            writer.write(MIXED[at : at + 10_000])
    assert [writer.close() for writer in writers] == [wanted] * 6


# --- Compressor

GZIP_TYPES = [
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
]
PLAIN_TYPES = ["application/vnd.oci.image.layer.v1.tar", "application/vnd.docker.image.rootfs.diff.tar"]
ZSTD_TYPES = [
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
]


@pytest.mark.parametrize("compression", MEDIA_TYPES)
def test_compressor_media_types(compression: str) -> None:
    right = {"uncompressed": PLAIN_TYPES, "zstd": ZSTD_TYPES}.get(compression, GZIP_TYPES)
    compressor = Compressor(compression=compression)
    for media_type in right:
        sink = io.BytesIO()
        with compressor(sink, media_type) as writer:
            writer.write(TAR)
        layer = compressor.finalize()
        assert layer.media_type == layer.descriptor()["mediaType"] == media_type
        check_layer(layer, sink.getvalue())
    for media_type in {*PLAIN_TYPES, *GZIP_TYPES, *ZSTD_TYPES} - set(right):
        with pytest.raises(UsageError, match="media type"):
            compressor(io.BytesIO(), media_type)


def test_compressor_annotations() -> None:
    compressor = Compressor()
    with compressor(io.BytesIO(), GZIP_TYPES[0]) as writer:
        writer.write(TAR)
    layer = compressor.finalize(writer)
    assert layer.descriptor()["annotations"] == {
        "containerd.io/snapshot/stargz/toc.digest": layer.toc_digest,
        "io.containers.estargz.uncompressed-size": str(layer.uncompressed_size),
        "containerd.io/uncompressed": layer.diff_id,
    }
    json.dumps(layer.descriptor())


def test_compressor_before_its_time() -> None:
    compressor = Compressor()
    with pytest.raises(EstargzError, match="no layer was written"):
        compressor.finalize()
    writer = compressor(io.BytesIO(), GZIP_TYPES[0])
    writer.write(TAR)
    with pytest.raises(EstargzError, match="not finished"):
        compressor.finalize()
    writer.abort()
    with pytest.raises(EstargzError, match="not finished"):
        compressor.finalize()
    with pytest.raises(UsageError):
        Compressor(level=99)


def test_compressor_serves_several_at_once() -> None:
    compressor = Compressor(threads=2)
    tars = [TAR, SMALL, MIXED, END]
    writers = [compressor(io.BytesIO(), GZIP_TYPES[0]) for _ in tars]
    failures: list[BaseException] = []

    def fill(writer: Writer, tar: bytes) -> None:
        try:
            for at in range(0, len(tar), 777):
                writer.write(tar[at : at + 777])
            writer.close()
        except BaseException as error:
            failures.append(error)

    running = [threading.Thread(target=fill, args=pair) for pair in zip(writers, tars, strict=True)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(30)
    assert not failures
    assert [compressor.finalize(writer) for writer in writers] == [blob_of(tar)[0] for tar in tars]
    assert compressor.finalize() == compressor.finalize(writers[-1])


# --- destinations


class Partial(io.RawIOBase):
    """A raw file that takes a little at a time."""

    def __init__(self, most: int) -> None:
        self.most, self.data = most, bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        part = bytes(data[: self.most])
        self.data += part
        return len(part)


class Keeper:
    """Keeps every object that it was given, and says nothing of how much it took."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def write(self, data: bytes) -> None:
        assert type(data) is bytes
        self.parts.append(data)


def test_destination_objects() -> None:
    wanted, blob = blob_of(MIXED)
    for most in (1000, 65536):
        partial = Partial(most)
        assert estargz.build(io.BytesIO(MIXED), partial) == wanted
        assert bytes(partial.data) == blob
        assert not partial.closed
    keeper = Keeper()
    estargz.build(io.BytesIO(MIXED), keeper, threads=3, memory=24 << 20)
    assert b"".join(keeper.parts) == blob


@pytest.mark.parametrize("kind", ["path", "str", "file", "raw file", "relative"])
def test_destination_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    wanted, blob = blob_of(MIXED)
    path = tmp_path / "blob"
    if kind in ("file", "raw file"):
        with path.open("wb", buffering=0 if kind == "raw file" else -1) as file:  # type: ignore[call-overload]
            file.write(b"front")
            assert estargz.build(io.BytesIO(MIXED), file) == wanted
            assert not file.closed
        blob = b"front" + blob
    else:
        dest = {"path": path, "str": str(path), "relative": "blob"}[kind]
        assert estargz.build(io.BytesIO(MIXED), dest) == wanted
    assert path.read_bytes() == blob
    assert [found.name for found in tmp_path.iterdir()] == ["blob"]


def test_destination_is_replaced_in_one_go(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    path.write_bytes(b"old")
    with path.open("rb") as old:
        with Writer(path) as writer:
            writer.write(TAR)
            assert path.read_bytes() == b"old"
        assert old.read() == b"old"
    assert path.read_bytes() == blob_of(TAR)[1]


@pytest.mark.parametrize("name", ["日" * 85, "n" * 255, "new\nline", "-", "\udcff"])
def test_names_of_destinations(tmp_path: Path, name: str) -> None:
    """The longest name leaves no room for anything beside it."""
    estargz.build(io.BytesIO(TAR), tmp_path / name)
    assert [found.name for found in tmp_path.iterdir()] == [name]


def test_destination_follows_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        estargz.build(io.BytesIO(TAR), tmp_path / "blob")
    finally:
        os.umask(old)
    assert (tmp_path / "blob").stat().st_mode & 0o777 == 0o640


def test_without_nameless_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system has none, a temporary name is used and is gone afterwards."""
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(95, "Operation not supported")
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    assert estargz.build(io.BytesIO(TAR), tmp_path / "blob") == blob_of(TAR)[0]
    assert [found.name for found in tmp_path.iterdir()] == ["blob"]
    with pytest.raises(TarError):
        estargz.build(io.BytesIO(TAR[:700]), tmp_path / "other")
    assert [found.name for found in tmp_path.iterdir()] == ["blob"]


@pytest.mark.parametrize("raw", [True, False])
def test_destination_socket(raw: bool) -> None:
    ours, theirs = socket.socketpair()
    received = hashlib.sha256()

    def take() -> None:
        with theirs:
            while part := theirs.recv(3000):
                received.update(part)

    taker = in_thread(take)
    with ours, ours.makefile("wb", buffering=0 if raw else 8192) as dest:  # type: ignore[call-overload]
        layer = estargz.build(io.BytesIO(MIXED), dest)
        if not raw:
            dest.flush()
        ours.shutdown(socket.SHUT_WR)
        taker.join(20)
    assert layer.digest == f"sha256:{received.hexdigest()}"


def test_destination_that_does_not_wait() -> None:
    read, write = os.pipe()
    with open(read, "rb"), open(write, "wb", buffering=0) as dest:
        os.set_blocking(write, False)
        with nothing_leaks(), pytest.raises(SinkError, match="took nothing"):
            estargz.build(io.BytesIO(MIXED), dest)


@pytest.mark.parametrize("dest", [None, 7, io.StringIO(), b"path"])
def test_destination_that_is_none(dest: Any) -> None:
    with pytest.raises(UsageError, match="a destination is a path or an object whose"):
        estargz.build(io.BytesIO(TAR), dest)


def test_destination_is_never_asked_for_more() -> None:
    """Only write() is used: no seek, flush, close or fileno."""

    class Strict:
        def __init__(self) -> None:
            self.out = io.BytesIO()

        def __getattr__(self, name: str) -> Any:
            if name == "write":
                return self.out.write
            raise AssertionError(f"asked for {name}")

    strict = Strict()
    assert estargz.build(io.BytesIO(TAR), strict) == blob_of(TAR)[0]


# --- tars of other programs


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_python(peer: Path, tmp_path: Path, format: int) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        for name in ("a", "d/" * 40 + "leaf", "é", "x" * 99):
            info = tarfile.TarInfo(name)
            info.size = 700
            archive.addfile(info, io.BytesIO(b"z" * 700))
    layer = estargz.build(io.BytesIO(out.getvalue()), tmp_path / "blob")
    judge(peer, tmp_path / "blob", layer)
    assert unpacked(peer, tmp_path / "blob") == out.getvalue()


def test_header_without_magic_or_numbers() -> None:
    tar = raw_header(name=b"old", type=b"0") + END
    assert blob_of(tar)[0].diff_id


def test_padding_need_not_be_zero() -> None:
    tar = plain_header(b"f", size=b"00000000005\0") + b"12345" + b"\xee" * 507 + padded(b"") + END
    assert gzip.decompress(blob_of(tar)[1]).startswith(tar)
