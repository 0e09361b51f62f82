"""The table of contents against Go's for the same tar, byte by byte, and whole blobs against the readers in use."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from conftest import IS_ROOT, missing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference.blobs import tar_of
from reference.peer import run
from reference.tar_headers import GNU, V7, meta, plain_header
from tars import END, base256, entry, everything, field_width, go_toc, judge, sha256, unpacked
from trees import Tree

import estargz
from estargz import Layer, TarError

pytestmark = pytest.mark.timeout(120)

CHUNK = 4096
PLACES = re.compile(rb'("(?:offset|innerOffset)": )\d+')
RNG = random.Random(51)


def blanked(toc: bytes) -> bytes:
    """Without the numbers that depend on the compressor."""
    return PLACES.sub(rb"\1#", toc)


def made(folder: Path, tar: bytes, **options: Any) -> tuple[Layer, Path]:
    """Our blob, and a layer that agrees with its bytes."""
    blob = folder / "ours"
    layer = estargz.build(io.BytesIO(tar), blob, **options)
    assert (layer.size, layer.digest) == (blob.stat().st_size, sha256(blob.read_bytes()))
    return layer, blob


def compare(peer: Path, folder: Path, tar: bytes, *, chunk_size: int = 4 << 20, readable: bool = True) -> bytes:
    """Builds on both sides and returns the TOC. readable: Go's reader can open such a blob, whoever made it."""
    source, theirs = folder / "tar", folder / "theirs"
    source.write_bytes(tar)
    run(peer, "blob", "-how", "lossless", "-chunk-size", chunk_size, source, theirs)
    layer, ours = made(folder, tar, chunk_size=chunk_size)
    toc = go_toc(peer, ours)
    assert layer.toc_digest == sha256(toc)
    assert blanked(toc).decode("utf-8", "surrogateescape") == blanked(go_toc(peer, theirs)).decode(
        "utf-8", "surrogateescape"
    )
    assert unpacked(peer, ours) == tar
    assert toc_header(ours, tar, toc) == toc_header(theirs, tar, go_toc(peer, theirs))
    if readable:
        judge(peer, ours, layer)
    return toc


def toc_header(blob: Path, tar: bytes, toc: bytes) -> bytes:
    """The header in front of the table's text, whose size may differ; what follows the text is checked."""
    rest = gzip.decompress(blob.read_bytes())[len(tar) :]
    size, checksum = slice(124, 136), slice(148, 156)
    header = bytearray(rest[:512])
    header[size], header[checksum] = bytes(12), bytes(8)
    assert rest[512:].startswith(toc)
    end = rest[512 + len(toc) :]
    assert end == bytes(-len(toc) % 512 + 1024)
    return bytes(header)


def entries_of(toc: bytes) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(toc)["entries"]
    return found


# --- against Go


def test_every_type(peer: Path, tmp_path: Path) -> None:
    toc = compare(peer, tmp_path, everything() + END)
    kinds = ["dir", "reg", "reg", "hardlink", "symlink", "char", "block", "fifo", "reg", "reg", "reg"]
    assert [item["type"] for item in entries_of(toc)] == kinds


@pytest.mark.parametrize("chunk_size", [1, 512, CHUNK, CHUNK + 1, 4 << 20])
def test_chunks(peer: Path, tmp_path: Path, chunk_size: int) -> None:
    around = [0, 1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK] if chunk_size > 1 else [0, 1, 2, 511, 512, 513]
    compare(peer, tmp_path, tar_of(*((f"f{size}", RNG.randbytes(size)) for size in around)), chunk_size=chunk_size)


ODD_NAMES = [
    bytes(range(1, 32)),
    b'quote " backslash \\ slash / rubout \x7f',
    b"<script>&amp;",
    "line \u2028 paragraph \u2029 dot \u2027 \u202a".encode(),
    "é 日 \U0001f600 \ue000 \U0010ffff".encode(),
    b"\xff\xfe\x80",
    b"two \xc3 three \xe2\x82 and \xe2 four \xf0\x9f\x98 and \xf0\x9f and \xf0",
    b"cut at the end \xe2\x82",
    "genuine \ufffd stays".encode(),
    b"overlong \xc0\xaf \xc1\xbf \xe0\x80\xaf \xe0\x9f\xbf \xf0\x80\x80\xaf \xf0\x8f\xbf\xbf",
    b"surrogates \xed\xa0\x80 \xed\xbf\xbf and below \xed\x9f\xbf",
    b"beyond \xf4\x90\x80\x80 \xf5\x80\x80\x80 \xf8\x88\x80\x80\x80",
    b"one \xe2\x80\xa8\xa8 \xe2\x80\xaa",
]


@pytest.mark.parametrize("where", ["header", "pax"])
def test_odd_names(peer: Path, tmp_path: Path, where: str) -> None:
    parts = []
    for name in ODD_NAMES:
        if where == "header":
            parts += [entry(name, b"x"), entry(b"to", type=b"2", link=name)]
        else:
            parts += [entry(b"short", b"x", (b"path", name)), entry(b"to", b"", (b"linkpath", name), type=b"2")]
    compare(peer, tmp_path, b"".join(parts) + END)


def test_every_two_bytes(peer: Path, tmp_path: Path) -> None:
    """All pairs of bytes as names, which covers the decoder's states."""
    lead = [*range(0x0, 0x30, 5), 0x3C, 0x5C, 0x7F, 0x80, 0xA8, 0xBF, *range(0xC0, 0x100)]
    names = [
        bytes([a or 1, b or 1]) + b"\xa8z" for a in lead for b in (1, 0x22, 0x7F, 0x80, 0x9F, 0xA0, 0xBF, 0xC2, 0xFF)
    ]
    compare(peer, tmp_path, b"".join(plain_header(b"n/" + name) for name in names) + END)


def test_attributes(peer: Path, tmp_path: Path) -> None:
    keys = [b"user.b", b"user.a", b"", b"user.\xff", "user.é\u2028".encode(), b"user.<&>", b"user.a ", b"USER.a"]
    records = [(b"SCHILY.xattr." + key, bytes([i]) * i) for i, key in enumerate(keys)]
    values = [(b"SCHILY.xattr.v%d" % size, bytes(range(size))) for size in (0, 1, 2, 3, 4, 5, 6, 200)]
    other = [(b"LIBARCHIVE.xattr.user.c", b"YQ"), (b"SCHILY.acl.access", b"x"), (b"comment", b"none of these")]
    twice = [(b"SCHILY.xattr.user.twice", b"first"), (b"SCHILY.xattr.user.twice", b"second")]
    parts = [
        entry(b"keys", b"x", *records),
        entry(b"values", b"", *values),
        entry(b"others", b"", *other),
        entry(b"twice", b"", *twice),
    ]
    parts += [entry(b"on" + kind, b"", *values[:2], type=kind, link=b"keys") for kind in (b"1", b"2", b"3", b"5", b"6")]
    toc = compare(peer, tmp_path, b"".join(parts) + END)
    assert entries_of(toc)[1]["xattrs"]["v0"] == ""


TIMES = """0 0.1 0.5 0.7 0.999999999 -0.1 -0.5 -0.500000001 -0.7 -1 -1.5 -1.4 1 1.4 1.5 1.499999999 1.9999999999
    86399.5 68169599 951782400 951868799.5 4107542400 1600000000 1600000000.5 1600000000.49 253402300799 253402300799.5
    253402300800 1000000000000 100000000000000 -62135596800 -62135596800.5 -62135596799.5 -62135596799 -62135596801
    -62167219200 -62167219201 -62198755200 -1000000000000 -377705116800 9223371966579724799 4611686018427387904
    9223372036854775807 -9223372036854775807 -4611686018427387904 2147483648 4294967296 8589934592""".split()


@pytest.mark.parametrize("text", [" ".join(TIMES[i : i + 12]) for i in range(0, len(TIMES), 12)])
def test_times(peer: Path, tmp_path: Path, text: str) -> None:
    parts = [entry(b"at" + time.encode(), b"", (b"mtime", time.encode())) for time in text.split()]
    compare(peer, tmp_path, b"".join(parts) + END)


def test_times_in_headers(peer: Path, tmp_path: Path) -> None:
    numbers = [0, 1, -1, 2**33, 2**40, -(2**33), -62135596800, 2**62, -(2**62), 253402300800]
    parts = [entry(b"t%d" % number, mtime=base256(number, field_width("mtime"))) for number in numbers]
    compare(peer, tmp_path, b"".join(parts) + END)


def test_owner_names(peer: Path, tmp_path: Path) -> None:
    """A name is stated when it is not the last one stated for its number."""
    owners = [
        (1, b"a"),
        (1, b"a"),
        (1, b"b"),
        (1, b""),
        (1, b"b"),
        (2, b"a"),
        (1, b"a"),
        (2, b"<\xff>"),
        (1, b"n" * 32),
    ]
    parts = [
        entry(b"%d" % i, uid=b"%07o\0" % number, user_name=name, group_name=name[::-1], gid=b"%07o\0" % (number // 2))
        for i, (number, name) in enumerate(owners)
    ]
    long = [(b"uname", b"u" * 5000), (b"gname", "größe".encode())]
    parts += [entry(b"long", b"", *long), entry(b"again", b"", *long), entry(b"other", b"", *long, uid=b"0000777\0")]
    compare(peer, tmp_path, b"".join(parts) + END)


def test_numbers(peer: Path, tmp_path: Path) -> None:
    numbers = [0, 1, 0o7777777, 0o10000000, 2**31, 2**32, 2**53, -1, -(2**53)]
    parts = [entry(b"u%d" % i, uid=base256(i, 8), gid=base256(-i, 8)) for i in numbers]
    parts += [entry(b"m%d" % i, mode=base256(i, 8)) for i in numbers if abs(i) < 2**40]
    parts += [
        entry(b"p%d" % i, b"", (b"uid", b"%d" % i), (b"gid", b"%d" % -i)) for i in [*numbers, 2**63 - 1, 1 - 2**63]
    ]
    parts += [entry(b"x", mode=b"0107777\0"), entry(b"y", mode=b"       \0"), entry(b"z", mode=b"777 ", uid=b" 1\0")]
    compare(peer, tmp_path, b"".join(parts) + END)


def test_devices(peer: Path, tmp_path: Path) -> None:
    numbers = [(0, 0), (1, 0), (0, 1), (8, 0o7777777), (0o7777777, 1)]
    parts = [
        entry(b"%b%d.%d" % (kind, *pair), type=kind, dev_major=b"%07o\0" % pair[0], dev_minor=b"%07o\0" % pair[1])
        for kind in (b"3", b"4", b"0", b"5", b"6")
        for pair in numbers
    ]
    parts += [entry(b"big", type=b"3", dev_major=base256(2**31, 8), dev_minor=base256(2**40, 8))]
    compare(peer, tmp_path, b"".join(parts) + END)


@pytest.mark.parametrize("magic", [GNU, V7])
def test_other_formats(peer: Path, tmp_path: Path, magic: bytes) -> None:
    long = b"somewhere/" * 30
    parts = [
        entry(b"plain", b"x", magic=magic, user_name=b"root"),
        meta(long + b"\0", b"L") + entry(b"cut", b"y", magic=magic),
        meta(long + b"\0", b"K") + entry(b"link", magic=magic, type=b"2", link=b"cut"),
        meta(b"both\0", b"L") + meta(b"target\0", b"K") + entry(b"z", magic=magic, type=b"2"),
        entry(b"old-directory/", magic=magic, type=b"\0"),
        entry(b"old-file", b"z", magic=magic, type=b"\0"),
        entry(b"device", magic=magic, type=b"3", dev_major=b"0000003\0"),
    ]
    compare(peer, tmp_path, b"".join(parts) + END)


def test_duplicates_and_repeated_paths(peer: Path, tmp_path: Path) -> None:
    parts = [(b"a", b"1"), (b"./a", b"2"), (b"a", b""), (b"/a", b"3"), (b"b/../a", b"4"), (b"a", b"5" * 9000)]
    toc = compare(peer, tmp_path, b"".join(entry(*part) for part in parts) + END, chunk_size=CHUNK)
    assert [item["name"] for item in entries_of(toc)][:6] == ["a", "./a", "a", "/a", "b/../a", "a"]


@pytest.mark.parametrize("tar", [bytes(1024), bytes(10240), bytes(512), bytes(1024) + b"garbage"])
def test_layers_without_entries(peer: Path, tmp_path: Path, tar: bytes) -> None:
    assert compare(peer, tmp_path, tar) == b'{\n\t"version": 1,\n\t"entries": null\n}'


def test_the_empty_layer_is_known() -> None:
    sink = io.BytesIO()
    layer = estargz.build(io.BytesIO(bytes(1024)), sink)
    assert layer.toc_digest == "sha256:34389139a1c1b35477be831e2253885fa98a9fc3906b16880a391631786dd194"
    assert layer.diff_id == "sha256:63780bb77499d981523cbe6ee5cb26d5bbefce35531f0a8f4837fa14fcae9cda"
    assert layer.uncompressed_size == 3072


def test_many_entries(peer: Path, tmp_path: Path) -> None:
    """A table of several pieces."""
    tar = b"".join(entry(b"directory/file-%05d" % i, b"%d" % i, user_name=b"u%d" % (i % 3)) for i in range(4000)) + END
    assert len(compare(peer, tmp_path, tar)) > 1 << 20


names = st.one_of(
    st.binary(min_size=1, max_size=40).map(lambda name: name.replace(b"\0", b"/")),
    st.text(min_size=1, max_size=40).map(lambda name: name.encode("utf-8", "replace").replace(b"\0", b"\1")),
)
numbers = st.integers(-(2**55), 2**55) | st.integers(0, 70000)
times = st.builds(
    lambda whole, rest: f"{whole}{rest}".encode(),
    st.integers(-(10**12), 10**12) | st.integers(-3, 3),
    st.from_regex(r"(\.[0-9]{1,12})?", fullmatch=True),
)
plain_keys = st.text("abc.<é\u2028", min_size=1, max_size=5).map(str.encode) | st.binary(min_size=1, max_size=4).filter(
    lambda key: not set(key) & set(b"\0=")
)


@st.composite
def tar_entries(draw: st.DrawFn) -> bytes:
    kind = draw(st.sampled_from([b"0", b"0", b"0", b"2", b"3", b"4", b"5", b"6"]))
    name = draw(names)
    if kind == b"0":
        name = name.rstrip(b"/") or b"f"
    data = RNG.randbytes(draw(st.sampled_from([0, 1, 511, 512, 513, 1000, 2048, 5000]))) if kind == b"0" else b""
    records = [(b"path", name)]
    for key, values in ((b"mtime", times), (b"uname", names), (b"gname", names)):
        if draw(st.booleans()):
            records.append((key, draw(values)))
    for key, value in draw(st.dictionaries(plain_keys, st.binary(max_size=12), max_size=3)).items():
        records.append((b"SCHILY.xattr." + key, value))
    fields = {"uid": base256(draw(numbers), 8), "gid": base256(draw(numbers), 8)}
    fields |= {"mode": b"%07o\0" % draw(st.integers(0, 0o107777)), "link": draw(names)[:100]}
    fields |= {"dev_major": b"%07o\0" % draw(st.integers(0, 9)), "dev_minor": b"%07o\0" % draw(st.integers(0, 9))}
    return entry(b"n", data, *records, type=kind, **fields)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.lists(tar_entries(), max_size=12), st.sampled_from([512, 1000, 1 << 20]), st.integers(0, 20))
def test_any_tar(
    peer: Path, tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], chunk_size: int, blocks: int
) -> None:
    folder = tmp_path_factory.mktemp("any")
    tar = b"".join(parts) + bytes(512 * (blocks + 2))
    try:
        compare(peer, folder, tar, chunk_size=chunk_size, readable=False)
    except TarError:
        pytest.fail("refused what Go accepts")
    finally:
        shutil.rmtree(folder)


# --- minimum chunk size


@pytest.mark.parametrize("minimum", [1, 600, 3000, 40_000, 1 << 20])
@pytest.mark.parametrize("chunk_size", [1000, 4 << 20])
def test_minimum_chunk_size(peer: Path, tmp_path: Path, minimum: int, chunk_size: int) -> None:
    tar = b"".join(entry(b"f%d" % i, RNG.randbytes(RNG.randrange(3000))) for i in range(60)) + END
    layer, blob = made(tmp_path, tar, min_chunk_size=minimum, chunk_size=chunk_size)
    assert judge(peer, blob, layer)["files"] == 60
    assert unpacked(peer, blob) == tar
    data = blob.read_bytes()
    with estargz.open(blob) as opened:
        members = {item.offset for item in opened.toc if item.size}
        chunks = [(item.name, chunk) for item in opened.toc if item.type == "reg" for chunk in opened.chunks(item.name)]
        for name, chunk in chunks:
            inflated = gzip.GzipFile(fileobj=io.BytesIO(data[chunk.offset : chunk.end])).read()
            part = inflated[chunk.inner_offset : chunk.inner_offset + chunk.size]
            assert sha256(part) == chunk.digest, name
        begun = sorted({chunk.offset for _, chunk in chunks})
    for first, second in itertools.pairwise(begun):
        assert len(gzip.decompress(data[first:second])) >= minimum
    if minimum > 1 << 19:
        assert len(members) == 1


def test_first_member_with_a_minimum(peer: Path, tmp_path: Path) -> None:
    """No payload lies in it, because the entries of empty files state no offset, which reads as 0."""
    layer, blob = made(tmp_path, tar_of(("empty", b""), ("a", b"1"), ("b", b"2")), min_chunk_size=1 << 16)
    entries = entries_of(go_toc(peer, blob))
    assert [item.get("innerOffset") for item in entries] == [None, None, 1024]
    assert entries[1]["offset"] == entries[2]["offset"] > 0
    judge(peer, blob, layer)


# --- other readers


LEVELS = [0, 1, 2, 3, 4, 6, 9, 12]


@pytest.mark.parametrize("level", LEVELS)
def test_gzip_readers(tmp_path: Path, level: int) -> None:
    tar = everything() + END
    layer, blob = made(tmp_path, tar, level=level, chunk_size=1000)
    stream = gzip.decompress(blob.read_bytes())
    assert (len(stream), sha256(stream)) == (layer.uncompressed_size, layer.diff_id)
    assert stream.startswith(tar)
    if shutil.which("gzip") is None:
        missing("gzip is not installed")
    subprocess.run(["gzip", "-t"], stdin=blob.open("rb"), check=True)
    assert subprocess.run(["gzip", "-dc"], stdin=blob.open("rb"), capture_output=True, check=True).stdout == stream


@pytest.mark.parametrize("compression", ["estargz", "gzip", "uncompressed"])
def test_tar_readers(tmp_path: Path, compression: str) -> None:
    names = ["dir/", "dir/file", "dir/empty", "top"]
    tar = tar_of(("dir/", b""), ("dir/file", b"x" * 3000), ("dir/empty", b""), ("top", b"y"))
    _, blob = made(tmp_path, tar, compression=compression)
    with tarfile.open(blob) as archive:
        assert archive.getnames() == [name.rstrip("/") for name in names]
        taken = archive.extractfile("dir/file")
        assert taken is not None
        assert taken.read() == b"x" * 3000
    if shutil.which("tar") is None:
        missing("GNU tar is not installed")
    listed = subprocess.run(["tar", "-tf", blob], capture_output=True, text=True, check=True)
    assert (listed.stdout.splitlines(), listed.stderr) == (names, "")


def oci_layout(folder: Path, layer: Layer, blob: bytes) -> str:
    """An image of one layer, "latest" in an OCI layout; returns the layout's path."""
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes, media_type: str, **more: Any) -> dict[str, Any]:
        digest = sha256(data)
        (blobs / digest.removeprefix("sha256:")).write_bytes(data)
        return {"mediaType": media_type, "digest": digest, "size": len(data)} | more

    put(blob, layer.media_type)
    rootfs = {"type": "layers", "diff_ids": [layer.diff_id]}
    image = {
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": rootfs,
        "history": [{"created_by": "test"}],
    }
    config = put(json.dumps(image).encode(), "application/vnd.oci.image.config.v1+json")
    manifest = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json"}
    manifest |= {"config": config, "layers": [layer.descriptor()]}
    tagged = {"annotations": {"org.opencontainers.image.ref.name": "latest"}}
    described = put(json.dumps(manifest).encode(), manifest["mediaType"], **tagged)  # type: ignore[arg-type]
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [described]}))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return str(folder)


@pytest.fixture(params=["estargz", "gzip", "zstd", "uncompressed"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Layer]:
    tree = Tree(tmp_path / "tree")
    tree.dir("usr/bin")
    tree.file("usr/bin/tool", b"#!/bin/sh\n" * 900, mode=0o755)
    tree.file("etc/empty", b"")
    tree.symlink("bin", "usr/bin")
    tree.link("usr/bin/same", "usr/bin/tool")
    sink = io.BytesIO()
    layer = estargz.build(tmp_path / "tree", sink, compression=request.param, chunk_size=CHUNK)
    return oci_layout(tmp_path / "layout", layer, sink.getvalue()), layer


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        missing(f"{name} is not installed")
    return str(found)


@pytest.mark.parametrize("image", ["estargz", "gzip", "uncompressed"], indirect=True)  # umoci 0.4 has no zstd
def test_umoci_unpacks(image: tuple[str, Layer], scratch: Path) -> None:
    rootless = [] if IS_ROOT else ["--rootless"]
    command = [program("umoci"), "unpack", *rootless, "--image", f"{image[0]}:latest", scratch / "bundle"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    root = scratch / "bundle" / "rootfs"
    assert (root / "usr/bin/tool").read_bytes() == b"#!/bin/sh\n" * 900
    assert (root / "usr/bin/same").stat().st_ino == (root / "usr/bin/tool").stat().st_ino
    assert (root / "etc/empty").stat().st_size == 0
    assert os.readlink(root / "bin") == "usr/bin"
    assert not (root / "stargz.index.json").exists()


def test_skopeo_reads_and_copies(image: tuple[str, Layer], scratch: Path) -> None:
    skopeo = program("skopeo")
    shown = subprocess.run([skopeo, "inspect", f"oci:{image[0]}:latest"], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["Layers"] == [image[1].digest]
    (scratch / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    copy = [skopeo, "--policy", scratch / "policy.json", "copy", f"oci:{image[0]}:latest"]
    for target in (f"oci:{scratch}/copy:latest", f"dir:{scratch}/plain"):
        decompress = ["--dest-decompress"] if target.startswith("dir:") else []
        done = subprocess.run([*copy, *decompress, target], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    if image[1].compression != "uncompressed":  # which skopeo compresses for a layout
        copied = scratch / "copy/blobs/sha256" / image[1].digest.removeprefix("sha256:")
        assert copied.stat().st_size == image[1].size
    # Decompressed, a layer's digest is its DiffID.
    plain = scratch / "plain" / image[1].diff_id.removeprefix("sha256:")
    assert plain.stat().st_size == image[1].uncompressed_size
