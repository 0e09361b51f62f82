"""A blob as a tree of files: paths, links, metadata, open files, byte ranges, and the limits of a table."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import re
import stat
import tarfile
import threading
import time
from collections import deque
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import blobs as made
from reference.blobs import encode, estargz, link, tar_of
from tars import blob_of, entry

from estargz.errors import BlobError, RangeError, UsageError, VerificationError
from estargz.reading import blob as blobs
from estargz.reading.toc import Limits, Table, TOCEntry, load_table, parse_toc

RNG = random.Random(4)
BIG = RNG.randbytes(50_000)


def symlink(name: str, target: str) -> tarfile.TarInfo:
    return link(name, target, tarfile.SYMTYPE)


TREE = tar_of(
    ("usr/", b""),
    ("usr/bin/", b""),
    ("usr/bin/tool", b"#!tool"),
    ("usr/lib/deep/er/library", BIG),
    link("usr/bin/same", "usr/bin/tool"),
    link("usr/bin/again", "./usr/bin/same"),
    symlink("bin", "usr/bin"),
    symlink("absolute", "/usr/bin/tool"),
    symlink("up", "../../../usr/bin/tool"),
    symlink("usr/bin/relative", "../lib/deep"),
    symlink("loop", "pool"),
    symlink("pool", "loop"),
    symlink("dangling", "nowhere/at/all"),
    ("etc/.wh.gone", b""),
    ("etc/.wh..wh..opq", b""),
    ("etc/kept", b"kept"),
    (".wh.top", b""),
)


@pytest.fixture(params=[{}, {"chunk_size": 3000}, {"chunk_size": 3000, "min_chunk": 10_000}], ids=str)
def tree(request: pytest.FixtureRequest) -> Any:
    with blobs.open(estargz(TREE, **request.param)) as blob:
        yield blob


# --- paths


def test_listdir(tree: blobs.Blob) -> None:
    top = ["absolute", "bin", "dangling", "etc", "loop", "pool", "up", "usr"]
    for root in ("", ".", "/", "usr/.."):
        assert tree.listdir(root) == top
    assert tree.listdir("usr") == ["bin", "lib"]
    assert tree.listdir("bin/") == ["again", "relative", "same", "tool"]
    assert tree.listdir("bin/relative/er") == ["library"]
    assert tree.listdir("etc") == ["kept"]
    with pytest.raises(NotADirectoryError):
        tree.listdir("etc/kept")
    with pytest.raises(FileNotFoundError):
        tree.listdir("etc/gone")


def test_links_are_followed_inside_the_layer(tree: blobs.Blob) -> None:
    tools = ["usr/bin/tool", "bin/tool", "absolute", "up", "bin/same", "bin/again", "bin/relative/../../bin/tool"]
    for path in tools:
        assert tree.read(path) == b"#!tool"
        assert tree.stat(path).st_ino == tree.stat("usr/bin/tool").st_ino
    with pytest.raises(OSError, match="too many symbolic links") as caught:
        tree.read("loop")
    assert caught.value.errno == errno.ELOOP
    with pytest.raises(FileNotFoundError, match="leads to no entry of this layer"):
        tree.read("dangling")
    assert "dangling" in tree
    assert "bin/tool" not in tree  # no entry has this name


def test_metadata(tree: blobs.Blob) -> None:
    tool = tree.stat("usr/bin/tool")
    assert (stat.S_ISREG(tool.st_mode), tool.st_size, tool.st_nlink) == (True, 6, 3)
    assert stat.S_ISLNK(tree.stat("absolute", follow_symlinks=False).st_mode)
    assert tree.stat("absolute", follow_symlinks=False).st_size == len("/usr/bin/tool")
    assert tree.readlink("bin/relative") == "../lib/deep"
    with pytest.raises(OSError, match="no symbolic link") as caught:
        tree.readlink("usr/bin/tool")
    assert caught.value.errno == errno.EINVAL
    implied = tree.stat("usr/lib/deep")
    assert implied.st_mode == stat.S_IFDIR | 0o755
    assert tree.lookup("usr/lib") == TOCEntry("usr/lib/", "dir", mode=0o755)


def test_everything_a_tar_header_says() -> None:
    tar = b"".join(
        [
            entry(b"f", b"x", (b"SCHILY.xattr.user.k", b"\0v"), user_name=b"me", group_name=b"us", mode=b"0104755\0"),
            entry(b"char", type=b"3", dev_major=b"0000005\0", dev_minor=b"0000001\0", mtime=b"00000000017\0"),
            entry(b"fifo", type=b"6"),
            bytes(1024),
        ]
    )
    with blobs.open(blob_of(tar)[1]) as blob:
        found = blob.stat("f")
        assert found.st_mode == stat.S_IFREG | 0o4755
        assert blob.xattrs("f") == {"user.k": b"\0v"}
        assert blob.owner("f") == ("me", "us")
        device = blob.stat("char")
        assert (stat.S_ISCHR(device.st_mode), device.st_rdev) == (True, os.makedev(5, 1))
        assert (device.st_mtime, device.st_mtime_ns) == (15, 15 * 10**9)
        assert stat.S_ISFIFO(blob.stat("fifo").st_mode)
        with pytest.raises(BlobError, match="is of type fifo"):
            blob.open("fifo")


def test_whiteouts_are_reported(tree: blobs.Blob) -> None:
    assert tree.whiteouts() == ["etc/gone", "top"]
    assert tree.opaques() == ["etc"]
    assert tree.lookup("etc/.wh.gone").size == 0


def test_landmarks_are_hidden() -> None:
    tar = tar_of((".prefetch.landmark", b"\x0f"), ("d/.prefetch.landmark", b"\x0f"), ("z", b"z"))
    with blobs.open(estargz(tar)) as blob:
        assert blob.listdir() == ["d", "z"]
        assert blob.listdir("d") == [".prefetch.landmark"]
        assert blob.landmark == "prefetch"
        assert blob.prefetch_size == blob.lookup(".prefetch.landmark").offset > 0
    with blobs.open(estargz(tar_of((".no.prefetch.landmark", b"\x0f")))) as blob:
        assert (blob.landmark, blob.prefetch_size, blob.listdir()) == ("no-prefetch", 0, [])
    with blobs.open(estargz(tar_of(("a", b"")))) as blob:
        assert (blob.landmark, blob.prefetch_size) == (None, 0)


def test_empty_layer() -> None:
    with blobs.open(estargz(bytes(1024))) as blob:
        assert blob.listdir() == []
        assert len(blob.entries) == len(blob.toc) == 0
        assert blob.byte_ranges([]).shape == (0, 2)
        assert blob.prefetch() == 0
        for path in ("", "a"):
            with pytest.raises(FileNotFoundError):
                blob.read(path)


def test_threads_share_a_blob() -> None:
    names = [f"d{i % 7}/f{i}" for i in range(300)]
    with blobs.open(estargz(tar_of(*((name, name.encode()) for name in names)))) as blob:
        wrong: list[str] = []

        def read_all() -> None:
            wrong.extend(name for name in names if blob.read(name) != name.encode())

        threads = [threading.Thread(target=read_all) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


def test_dots_behind_links_are_those_of_the_links_target() -> None:
    tar = tar_of(("x/y/", b""), ("x/b", b"real"), ("a/b", b"lexical"), symlink("a/l", "/x/y"), ("file", b""))
    with blobs.open(estargz(tar)) as blob:
        assert blob.read("a/l/../b") == b"real"
        for path in ("file/", "file/.", "file/../a/b", "a/b/"):
            with pytest.raises(NotADirectoryError):
                blob.read(path)
        with pytest.raises(FileNotFoundError):
            blob.read("nope/../file")


def test_an_entry_below_a_link_does_not_hide_what_the_link_leads_to() -> None:
    with blobs.open(estargz(tar_of(("b/x", b"right"), symlink("a", "b"), ("a/x", b"hidden")))) as blob:
        assert blob.read("a/x") == b"right"


def test_thousands_of_links_in_a_chain() -> None:
    tar = tar_of(
        ("0", b"end"), *(link(str(i), str(i - 1)) for i in range(1, 5000)), link("lost", "x"), link("y", "lost")
    )
    with blobs.open(estargz(tar)) as blob:
        assert blob.stat("4999").st_nlink == 5000
        assert all(blob.stat(str(i)).st_ino == 1 for i in range(0, 5000, 7))
        for name in ("lost", "y", "y"):
            with pytest.raises(BlobError, match="'lost' links to 'x', which is not there"):
                blob.stat(name)


# --- open files


def test_open_file(tree: blobs.Blob) -> None:
    with tree.open("bin/relative/er/library") as file:
        assert isinstance(file, io.BufferedReader)
        assert file.read() == BIG
        assert file.seek(-10, io.SEEK_END) == len(BIG) - 10
        assert file.read() == BIG[-10:]
        assert file.seek(7) == 7
        assert file.read(5) == BIG[7:12]
        assert file.seek(1 << 40) == 1 << 40
        assert file.read(1) == b""
        with pytest.raises(ValueError, match="negative"):
            file.seek(-1)
    with pytest.raises(ValueError, match="closed"):
        file.read()
    with pytest.raises(IsADirectoryError):
        tree.open("usr")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60_000), st.integers(0, 9000)), max_size=12), st.integers(300, 20_000))
def test_random_access(steps: list[tuple[int, int]], chunk_size: int) -> None:
    with blobs.open(estargz(tar_of(("f", BIG)), chunk_size=chunk_size)) as blob, blob.open("f") as file:
        for at, size in steps:
            file.seek(at)
            assert file.read(size) == BIG[at : at + size]


class Counting:
    """A blob behind range requests that remembers what it was asked for."""

    def __init__(self, data: bytes) -> None:
        self.data, self.size = data, len(data)
        self.asked: list[tuple[int, int]] = []

    def read_at(self, offset: int, size: int) -> bytes:
        self.asked.append((offset, size))
        return self.data[offset : offset + size]


def test_only_what_is_touched_is_fetched() -> None:
    data = estargz(tar_of(("a", b"a" * 9000), ("f", BIG), ("z", b"z")), chunk_size=5000)
    source = Counting(data)
    with blobs.open(source) as blob:
        chunks = blob.chunks("f")
        assert min(offset for offset, _ in source.asked) >= blob.toc_offset
        source.asked.clear()
        with blob.open("f") as file:
            file.seek(12_000)
            assert file.read(10) == BIG[12_000:12_010]
            wanted = chunks[2]
            assert source.asked == [(wanted.offset, wanted.end - wanted.offset)]
            file.seek(14_000)
            file.read(500)
            assert len(source.asked) == 1  # the chunk was kept


def test_flipped_bits_are_never_returned_by_an_open_file() -> None:
    data = bytearray(estargz(tar_of(("f", BIG)), chunk_size=5000))
    with blobs.open(bytes(data)) as blob:
        chunk = blob.chunks("f")[3]
    data[chunk.offset + 600] ^= 4
    with blobs.open(bytes(data)) as blob, blob.open("f") as file:
        assert file.read(15_000) == BIG[:15_000]
        with pytest.raises(BlobError):
            file.read(1)
        file.seek(20_000)
        assert file.read() == BIG[20_000:]


def test_a_spoiled_cache_is_asked_to_forget() -> None:
    good = estargz(tar_of(("f", BIG)))

    class Spoiled(Counting):
        forgotten: tuple[int, int] | None = None

        def read_at(self, offset: int, size: int) -> bytes:
            data = super().read_at(offset, size)
            return data if self.forgotten or offset else b"\x1f" + bytes(len(data) - 1)

        def forget(self, offset: int, size: int) -> None:
            self.forgotten = (offset, size)

    with blobs.open(estargz(tar_of(("f", BIG)), min_chunk=1 << 20)) as blob:
        assert blob.chunks("f")[0].offset == 0
    source = Spoiled(estargz(tar_of(("f", BIG)), min_chunk=1 << 20))
    with blobs.open(source) as blob:
        assert blob.read("f") == BIG
        assert source.forgotten == (0, blob.chunks("f")[0].end)
    assert good


def test_chunks_without_digests_of_their_own() -> None:
    def edit(entries: list[dict[str, Any]]) -> None:
        for one in entries:
            one.pop("chunkDigest", None)

    with blobs.open(estargz(tar_of(("f", BIG)), edit=edit, chunk_size=9000)) as blob, blob.open("f") as file:
        file.seek(100)
        assert file.read(50) == BIG[100:150]

    def spoil(entries: list[dict[str, Any]]) -> None:
        edit(entries)
        entries[0]["digest"] = "sha256:" + "0" * 64

    with blobs.open(estargz(tar_of(("f", BIG)), edit=spoil, chunk_size=9000)) as blob, pytest.raises(VerificationError):
        blob.open("f").read(1)


def test_a_file_of_one_chunk_has_its_own_digest() -> None:
    def edit(entries: list[dict[str, Any]]) -> None:
        entries[0]["digest"] = "sha256:" + "0" * 64

    with blobs.open(estargz(tar_of(("f", b"x")), edit=edit)) as blob:
        with pytest.raises(VerificationError):
            blob.read("f")
        with pytest.raises(VerificationError):
            blob.open("f").read()


@pytest.mark.measured
def test_chunks_of_one_member_are_inflated_once() -> None:
    """Thousands of chunks in one member must not take the member's time each."""
    data = blob_of(tar_of(("f", bytes(16 << 20))), chunk_size=4096, min_chunk_size=1 << 29)[1]
    started = time.process_time()
    with blobs.open(data) as blob:
        assert blob.read("f") == bytes(16 << 20)
        with blob.open("f") as file:
            assert file.read() == bytes(16 << 20)
    assert time.process_time() - started < 5


def test_an_error_of_the_source_is_not_asked_for_twice() -> None:
    class Failing(Counting):
        broken = False

        def read_at(self, offset: int, size: int) -> bytes:
            if self.broken:
                self.asked.append((offset, size))
                raise RangeError("no")
            return super().read_at(offset, size)

        def forget(self, offset: int, size: int) -> None:
            raise AssertionError

    source = Failing(estargz(tar_of(("f", BIG))))
    with blobs.open(source) as blob:
        source.broken = True
        source.asked.clear()
        with pytest.raises(RangeError):
            blob.read("f")
    assert len(source.asked) == 1


# --- rows and ranges


def test_rows_say_what_entries_say(tree: blobs.Blob) -> None:
    rows = tree.entries
    assert rows.shape == (len(tree.toc),)
    assert not rows.flags.writeable
    for row, one in zip(rows, tree.toc, strict=True):
        assert row["type"].decode() == one.type
        for field in ("size", "mode", "uid", "gid", "offset", "inner_offset", "chunk_offset", "chunk_size"):
            assert row[field] == getattr(one, field)
        if one.digest:
            assert "sha256:" + row["digest"].tobytes().hex() == one.digest
    assert tree.toc[-1] == tree.toc[len(tree.toc) - 1]
    assert tree.toc[2:4] == [tree.toc[2], tree.toc[3]]
    with pytest.raises(IndexError):
        tree.toc[len(tree.toc)]


def test_byte_ranges(tree: blobs.Blob) -> None:
    def spans(*paths: str) -> list[tuple[int, int]]:
        found = []
        for path in paths:
            for chunk in tree.chunks(path):
                if found and chunk.offset <= found[-1][1]:
                    found[-1] = (found[-1][0], max(chunk.end, found[-1][1]))
                else:
                    found.append((chunk.offset, chunk.end))
        return found

    assert tree.byte_ranges(["bin/again"]).tolist() == [list(span) for span in spans("usr/bin/tool")]
    assert tree.byte_ranges(["usr/lib"]).tolist() == [list(span) for span in spans("usr/lib/deep/er/library")]
    everything = tree.byte_ranges([""])
    assert everything.tolist() == [list(x) for x in spans("usr/bin/tool", "usr/lib/deep/er/library", "etc/kept")]
    assert (np.diff(everything.ravel()) > 0).all()
    with pytest.raises(FileNotFoundError):
        tree.byte_ranges(["usr", "nope"])


# --- tables


GO_FORM = {
    "version": 1,
    "entries": [{"name": f"d/{i}", "type": "reg", "digest": "sha256:" + "0" * 64} for i in range(1000)],
}


def table_of(text: bytes, piece: int = 1000, **limits: int) -> Table:
    pieces = deque(text[i : i + piece] for i in range(0, len(text), piece))
    return load_table(pieces, 1 << 40, Limits(**limits))


@pytest.mark.parametrize("piece", [1, 2, 7, 100, 5000, 10**9])
def test_pieces_do_not_show(piece: int) -> None:
    text = encode(GO_FORM)
    if piece < 7:
        text = encode(GO_FORM | {"entries": GO_FORM["entries"][:50]})  # type: ignore[index]
    assert list(table_of(text, piece)) == parse_toc(text).entries


@pytest.mark.parametrize("form", [{"indent": 1}, {"separators": (",", ":")}, {"indent": "\t"}])
def test_other_forms_of_json(form: dict[str, Any]) -> None:
    text = json.dumps(GO_FORM, **form).encode()
    assert list(table_of(text)) == parse_toc(text).entries


def test_one_odd_entry_among_many() -> None:
    entries: list[dict[str, Any]] = [dict(one) for one in GO_FORM["entries"]]  # type: ignore[union-attr]
    entries[500] |= {"NumLink": 3, "uid": None}
    text = encode({"version": 1, "entries": entries})
    assert list(table_of(text)) == parse_toc(text).entries


@pytest.mark.parametrize(
    "middle",
    [
        '\n\t\t}\n\t],\n\t"other": [\n\t\t{\n\t\t\t"name": "evil",\n\t\t\t"type": "dir"',
        '\n\t\t}\n\t],\n\t"entries": [\n\t\t{\n\t\t\t"name": "evil",\n\t\t\t"type": "dir"',
        ',\n\t\t\t"more": [\n\t\t{\n\t\t},\n\t\t{\n\t\t}\n\t\t\t]',
    ],
)
def test_text_that_looks_parted_is_not_taken_for_parted(middle: str) -> None:
    """Whatever JSON means is what is read, or nothing."""
    entries = ('\n\t\t},\n\t\t{\n\t\t\t"name": "good",\n\t\t\t"type": "dir"' * 30)[len("\n\t\t},\n\t\t{") :]
    text = f'{{\n\t"version": 1,\n\t"entries": [\n\t\t{{{entries}{middle}\n\t\t}},\n\t\t{{{entries}\n\t\t}}\n\t]\n}}'.encode()
    json.loads(text)
    for piece in (64, 300, 1 << 20):
        try:
            found = [one.name for one in table_of(text, piece)]
        except BlobError:
            continue
        assert found == [one.name for one in parse_toc(text).entries]


def test_entry_larger_than_all_pieces() -> None:
    text = encode({"version": 1, "entries": [{"name": "x" * 60_000, "type": "dir"}, {"name": "y", "type": "dir"}]})
    assert [len(one.name) for one in table_of(text, 100)] == [60_000, 1]


ODD = [
    {"modtime": "2020-01-01T00:00:00+01:00"},
    {"modtime": "nonsense"},
    {"modtime": "0000-01-01T00:00:00Z"},
    {"modtime": "2021-02-29T00:00:00Z"},
    {"modtime": "9999-12-31T23:59:59Z"},
    {"modtime": "0001-01-01T00:00:00Z"},
    {"modtime": "1969-12-31T23:59:59Z"},
    {"modtime": "1970-01-01T00:00:00Z"},
    {"digest": "sha512:" + "0" * 128},
    {"digest": "sha256:" + "A" * 64},
    {"chunkDigest": "md5:00"},
    {"xattrs": {"a": "YQ==", "\x00": ""}},
    {"uid": -5, "gid": 1 << 40},
    {"name": "\u2028\ufffd \U0001f600"},
]


@pytest.mark.parametrize("odd", ODD, ids=str)
def test_entries_come_back_as_they_were_stated(odd: dict[str, Any]) -> None:
    text = json.dumps({"version": 1, "entries": [{"name": "a", "type": "dir"} | odd]}).encode()
    if odd.get("modtime") == "1970-01-01T00:00:00Z":
        assert table_of(text)[0].modtime == ""  # the table leaves the epoch out
    else:
        assert list(table_of(text)) == parse_toc(text).entries


@settings(max_examples=200, deadline=None)
@given(st.datetimes())
def test_times(moment: Any) -> None:
    text = moment.replace(microsecond=0).strftime("%Y-%m-%dT%H:%M:%SZ").rjust(20, "0")
    data = json.dumps({"version": 1, "entries": [{"name": "a", "type": "dir", "modtime": text}]}).encode()
    table = table_of(data)
    assert table.tree.apart == {}
    seconds = (moment.replace(microsecond=0) - type(moment)(1970, 1, 1)).total_seconds()
    assert table.rows["mtime"][0] == seconds
    assert table[0].modtime == (text if seconds else "")


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"entries": 999}, "more than 999 entries"),
        ({"name_length": 2}, "its name takes 3 bytes, over 2"),
        ({"depth": 1}, "its path has 2 components, over 1"),
    ],
)
def test_limits(limits: dict[str, int], message: str) -> None:
    table_of(encode(GO_FORM), **{key: value + 998 for key, value in limits.items()})
    with pytest.raises(BlobError, match=message):
        table_of(encode(GO_FORM), **limits)


def test_limits_of_a_blob() -> None:
    data = estargz(tar_of(("f", BIG)), chunk_size=1000)
    blobs.open(data, limits=Limits(chunks=50)).close()
    with pytest.raises(BlobError, match="more than 49 chunks"):
        blobs.open(data, limits=Limits(chunks=49))
    with pytest.raises(BlobError, match="the TOC takes"):
        blobs.open(data, limits=Limits(toc_size=1000))
    for wrong in (-1, 1 << 63, True, "5", 1.5):
        with pytest.raises(UsageError, match="the limit depth is a whole number"):
            Limits(depth=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"name": "l", "type": "symlink", "linkName": "../" * 30_000}], "a link or owner of more than 65536 bytes"),
        ([{"name": "l", "type": "dir", "xattrs": {"user.k": "A" * (3 << 20)}}], "attributes take more than 2 MiB"),
        ([{"name": "l", "type": "dir", "xattrs": {"user.k": "no base64"}}], "attribute 'user.k' is no base64"),
    ],
)
def test_other_texts_are_limited(entries: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(BlobError, match=message):
        table_of(encode({"version": 1, "entries": entries}))


@pytest.mark.parametrize("form", ["compact", "one border"])
def test_small_objects_are_not_decoded_by_the_million(form: str) -> None:
    many = ",".join(["{}"] * 1_000_001)
    head, tail = '{\n\t"version": 1,\n\t"entries": [\n\t\t', "\n\t\t}\n\t]\n}"
    text = f'{{"version":1,"entries":[{many}]}}' if form == "compact" else f"{head}{{}},{many},{{{tail}"
    with pytest.raises(BlobError, match="over 1000000 objects"):
        table_of(text.encode(), 1 << 20)


def test_sizes_that_add_up_to_too_much() -> None:
    one = {"type": "reg", "size": 1 << 62, "chunkDigest": "sha256:" + "0" * 64}
    entries = [one | {"name": f"{i}", "offset": i + 1} for i in range(3)]
    with pytest.raises(BlobError, match="too large"):
        table_of(encode({"version": 1, "entries": entries}))


@pytest.mark.measured
def test_long_spellings_of_a_name_in_chunks() -> None:
    file = {"name": "x" + "/" * 65_000, "type": "reg", "size": 5000, "offset": 1, "chunkSize": 1}
    chunks = [{"name": "x", "type": "chunk", "offset": i + 1, "chunkOffset": i, "chunkSize": 1} for i in range(1, 5000)]
    started = time.process_time()
    table_of(encode({"version": 1, "entries": [file, *chunks]}))
    assert time.process_time() - started < 0.3


def test_numbers_of_no_device_and_landmarks_of_no_payload() -> None:
    entries = [
        {"name": "d", "type": "char", "devMajor": 1 << 40},
        {"name": ".prefetch.landmark", "type": "reg", "offset": 1 << 61},
    ]
    with blobs.open(made.assemble(b"", encode({"version": 1, "entries": entries}))) as blob:
        with pytest.raises(BlobError, match="no device has the numbers"):
            blob.stat("d")
        assert blob.prefetch_size == 0
    with pytest.raises(UsageError, match="limits are Limits"):
        blobs.open(b"", limits={"entries": 3})  # type: ignore[arg-type]


def test_implied_paths_are_limited() -> None:
    """A name of 10,000 components takes 20 kB in the table and 10,000 directories."""
    text = encode({"version": 1, "entries": [{"name": f"{i}/" * 5000, "type": "dir"} for i in range(10)]})
    table = table_of(text, entries=100_000)
    assert table.tree.find("3/" * 5000) > 0
    with pytest.raises(ValueError, match="imply more than 20000 paths"):
        table_of(text, entries=20_000).tree.find("3")
    stored = made.assemble(b"", encode({"version": 1, "entries": [{"name": "a/" * 50, "type": "dir"}]}))
    with (
        blobs.open(stored, limits=Limits(entries=20)) as blob,
        pytest.raises(BlobError, match="imply more than 20 paths"),
    ):
        blob.listdir()


NAMES = st.text(st.sampled_from(list("ab./\u00e9")), max_size=12)


@settings(max_examples=200, deadline=None)
@given(st.lists(NAMES, max_size=15), NAMES)
def test_names_find_what_a_dictionary_finds(names: list[str], wanted: str) -> None:
    text = json.dumps({"version": 1, "entries": [{"name": name, "type": "dir"} for name in names]}).encode()
    tree = table_of(text).tree
    model: dict[tuple[str, ...], int] = {}
    implied = {()}
    for row, name in enumerate(names):
        parts = tuple(part for part in clean(name).split("/") if part)
        model[parts] = row
        implied |= {parts[:i] for i in range(len(parts) + 1)}
    for name in [*names, wanted]:
        parts = tuple(part for part in clean(name).split("/") if part)
        node = tree.find(name)
        assert (node >= 0) == (parts in implied)
        if node >= 0:
            assert tree.describe(node)[2] == model.get(parts, -1)
            children = {tree.describe(child)[0] for child in tree.children(node)}
            assert children == {path[-1] for path in implied if path[:-1] == parts and path}
            assert sorted(tree.below(node)) == sorted(row for path, row in model.items() if path[: len(parts)] == parts)


def clean(name: str) -> str:
    """What Python's own path library makes of it, with the root as the top."""
    return re.sub("^/+", "", os.path.normpath("/" + name))


# --- damage


@pytest.mark.parametrize("options", [{}, {"chunk_size": 8192}, {"chunk_size": 8192, "min_chunk_size": 30_000}], ids=str)
def test_ten_thousand_flipped_bits(options: dict[str, Any]) -> None:
    """A bit is flipped anywhere in the blob: what is read is right, or an error."""
    rng = random.Random(17)
    files = {f"d/{i}": rng.randbytes(rng.randrange(40_000)) + b"text" * rng.randrange(4000) for i in range(60)}
    layer, data = blob_of(tar_of(*files.items()), **options)
    blob = bytearray(data)
    caught = harmless = 0
    with blobs.open(blob, toc_digest=layer.toc_digest) as opened:
        rows = opened.entries[opened.entries["end"] > 0]
        owners = [opened.toc[i].name for i in opened.files_of_rows[opened.entries["end"] > 0].tolist()]
        for at in rng.sample(range(len(blob)), 10_000 // 3 + 1):
            bit = 1 << rng.randrange(8)
            blob[at] ^= bit
            try:
                if at >= opened.toc_offset:
                    touched = rng.sample(sorted(files), 1)
                    with blobs.open(blob, toc_digest=layer.toc_digest) as again:
                        found = [again.read(name) for name in touched]
                else:
                    hit = np.flatnonzero((rows["offset"] <= at) & (at < rows["end"]))
                    touched = sorted({owners[i] for i in hit.tolist()})
                    found = [opened.read(name) for name in touched]
                assert found == [files[name] for name in touched]
                harmless += 1
            except BlobError:
                caught += 1
            finally:
                blob[at] ^= bit
    assert caught > 3000
    assert harmless < 300
