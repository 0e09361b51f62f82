"""What is to be prefetched comes first: in tars as Go's estargz.Build arranges them, in trees with nothing lost."""

from __future__ import annotations

import gzip
import io
import json
import os
import posixpath
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import zstandard
from conftest import IS_ROOT, missing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference.peer import report
from tars import END, blob_of, entry, everything, in_thread, judge, nothing_leaks
from trees import CAPABILITY, NAMES, TIME, WHOLE, RandomTree, Tree

import estargz
from estargz import ChangedError, Layer, SinkError, SourceError, TarError, UsageError
from estargz.writing import source as sources

pytestmark = pytest.mark.timeout(120)

LANDMARK = ".prefetch.landmark"
PROGRAM = [sys.executable, "-c", "import sys; from estargz.cli import main; sys.exit(main())", "build"]


@pytest.fixture
def tree(scratch: Path) -> Tree:
    return Tree(scratch / "upper")


def built(source: Any, *prefetch: str, **options: Any) -> tuple[Layer, list[str]]:
    """A layer that has been verified, and the names in its table of contents."""
    layer, blob = blob_of(source, prefetch=prefetch, **options)
    return layer, names_in(layer, blob)


def names_in(layer: Layer, blob: bytes) -> list[str]:
    estargz.verify(blob, toc_digest=layer.toc_digest, diff_id=layer.diff_id)
    return [entry["name"] for entry in toc_of(blob)]


def toc_of(blob: bytes) -> list[dict[str, Any]]:
    """The entries of a blob's table of contents, without those of further chunks."""
    text = gzip.decompress(blob[int(blob[-35:-19], 16) :])[512:].rstrip(b"\0")
    return [entry for entry in json.loads(text)["entries"] if entry["type"] != "chunk"]


def clean(path: str) -> str:
    return posixpath.normpath("/" + path.lstrip("/"))[1:]


def ahead(names: Sequence[str]) -> list[str]:
    """Those in front of the landmark."""
    return list(names[: names.index(LANDMARK)])


# ---------------------------------------------------------------------------------------------- tars, as Go arranges them


def go_entries(peer: Path, blob: Path) -> list[tuple[Any, ...]]:
    toc = json.loads(subprocess.run([peer, "toc", blob], capture_output=True, check=True).stdout)
    keys = ("name", "type", "size", "linkName", "digest")
    return [tuple(e.get(key) for key in keys) for e in toc["entries"] or () if e["type"] != "chunk"]


def as_go(peer: Path, folder: Path, tar: bytes, wanted: Sequence[str], *, allow_missing: bool = False) -> Layer:
    """The layer, once it is known to have Go's entries in Go's order, and to miss what Go misses.

    To Go a path is missing if a directory above it has no entry. So Go gets entries for such directories, in front of the
    tar, which are then left out of what it says.
    """
    added = parents_without_entry(tar)
    (folder / "in.tar").write_bytes(tar)
    (folder / "go.tar").write_bytes(b"".join(map(long_dir, added)) + tar)
    (folder / "list").write_text("".join(f"{path}\n" for path in wanted))
    layer = estargz.build(folder / "in.tar", folder / "ours", prefetch=wanted, allow_missing=allow_missing)
    flags = ["-allow-missing"] if allow_missing else []
    how = ["-how", "build", "-workers", "1", "-prioritized", folder / "list"]
    theirs = report(peer, "blob", *how, *flags, folder / "go.tar", folder / "theirs")
    all_theirs = go_entries(peer, folder / "theirs")
    assert go_entries(peer, folder / "ours") == [each for each in all_theirs if clean(each[0]) not in added]
    missed = {*map(clean, theirs.get("missed", []))}
    assert {*map(clean, layer.missing)} == missed | (added & {*map(clean, wanted)})
    return layer


def parents_without_entry(tar: bytes) -> set[str]:
    names = {clean(info.name) for info in members(tar)}
    return {parent for name in names for parent in parents(name)} - names


def long_dir(name: str) -> bytes:
    return entry(b"x", b"", (b"path", name.encode() + b"/"), type=b"5")


def dirs(*names: bytes) -> bytes:
    return b"".join(entry(name + b"/", type=b"5") for name in names)


def hard(name: bytes, target: bytes) -> bytes:
    return entry(name, type=b"1", link=target)


FEW = dirs(b"a", b"a/b", b"c") + entry(b"a/b/x", b"x") + entry(b"c/y", b"y" * 600) + entry(b"z", b"z")
LINKED = FEW + hard(b"a/l", b"c/y") + hard(b"m", b"./a/l") + entry(b"s", type=b"2", link=b"z")
DOTTED = entry(b"./", type=b"5") + entry(b"./d/", type=b"5") + entry(b"./d/f", b"f") + entry(b"./g", b"g")
LANDMARKS = entry(b".no.prefetch.landmark", b"\x0f") + entry(b"./.prefetch.landmark", b"\x0f")
LONG = b"long/" * 30 + b"name"


@pytest.mark.parametrize(
    ("tar", "wanted"),
    [
        (FEW, ["z"]),
        (FEW, ["c/y", "a/b/x", "c/y", "/c/./y/"]),
        (FEW, ["a/b"]),
        (FEW, ["x/../a//b/x", "./z"]),
        (LINKED, ["m"]),
        (LINKED, ["s", "a/l"]),
        (LINKED, ["a/l", "c/y"]),
        (DOTTED, ["d/f"]),
        (DOTTED, ["./g", "/"]),
        (entry(b"/", type=b"5") + entry(b"/x", b"1") + entry(b"//y", b"2"), ["y"]),
        (entry(b"a", b"1") + entry(b"b", b"2") + entry(b"./a", b"3"), ["a"]),
        (entry(b"a", b"1") + entry(b"b", b"2") + entry(b"./a", b"3"), ["b"]),
        (LANDMARKS + FEW + LANDMARKS, ["z"]),
        (FEW + entry(b"c/.wh.gone") + entry(b".wh.old") + entry(b"w", b"w"), ["c/.wh.gone", "w"]),
        (dirs(b"long") + entry(b"short", b"y", (b"path", b"long/" + b"n" * 200)) + FEW, ["long/" + "n" * 200, "z"]),
        (everything(), ["owned", "attributes", "hard", "fifo"]),
        (hard(b"early", b"late") + entry(b"late", b"x"), ["early"]),
        (entry(b"big", bytes(5 << 20)) + entry(b"small", b"x"), ["small", "big"]),
    ],
    ids=count(),  # or the name of a tar of 5 MB would be handed to the peer in its environment
)
@pytest.mark.parametrize("end", [END, b""], ids=["ended", "unended"])
def test_order_of_tars_equals_go(tar: bytes, wanted: list[str], end: bytes, peer: Path, tmp_path: Path) -> None:
    layer = as_go(peer, tmp_path, tar + end, wanted)
    judge(peer, tmp_path / "ours", layer)


@pytest.mark.parametrize(
    "wanted",
    [["nosuch"], ["nosuch", "z", "c/no", "z/below"], ["orphan"], ["dangling", "z"], ["deep/dangling", "z"]],
)
def test_missing_in_tars_equals_go(wanted: list[str], peer: Path, tmp_path: Path) -> None:
    tar = (
        FEW
        + entry(b"orphan/x", b"x")
        + hard(b"dangling", b"nowhere")
        + dirs(b"deep")
        + hard(b"deep/dangling", b"no/where")
    )
    layer = as_go(peer, tmp_path, tar + END, wanted, allow_missing=True)
    assert layer.missing == tuple(path for path in wanted if path != "z")
    with pytest.raises(UsageError, match="not in the layer: '" + layer.missing[0] + "'.*allow-missing"):
        estargz.build(tmp_path / "in.tar", tmp_path / "strict", prefetch=wanted)
    assert not (tmp_path / "strict").exists()


def test_tar_of_files_alone() -> None:
    """As many are: what is there is found, behind those of its parents that have entries."""
    tar = entry(b"first", b"1") + entry(b"a/b/c/x", b"x") + dirs(b"a/b") + hard(b"l/l", b"a/b/c/x") + END
    assert built(tar, "a/b/c/x")[1] == ["a/b/", "a/b/c/x", LANDMARK, "first", "l/l"]
    assert built(tar, "l/l")[1] == ["a/b/", "a/b/c/x", "l/l", LANDMARK, "first"]
    assert built(tar, "**/x")[1] == ["a/b/", "a/b/c/x", LANDMARK, "first", "l/l"]
    layer, names = built(tar, "a", "a/b/c", "first", allow_missing=True)
    assert (layer.missing, ahead(names)) == (("a", "a/b/c"), ["first"])


@pytest.mark.parametrize("path", ["\ud800", "a\0b", 7])
def test_what_is_no_path(path: Any) -> None:
    with pytest.raises(UsageError, match="is no path to prefetch"):
        built(FEW + END, path)
    assert built(entry(b"\xff", b"x") + END, "\udcff")[0].prefetch_size is not None  # a byte that is no UTF-8


PARTS = st.sampled_from(["a", "b", "c", "é"])
PATHS = st.lists(PARTS, min_size=1, max_size=3).map("/".join)
SPELLINGS = st.sampled_from(["", "./", "/", "x/../"])
KINDS = st.sampled_from(["dir", "file", "file", "empty", "symlink", "pax", "landmark", "whiteout", "link", "link"])


@st.composite
def tars(draw: st.DrawFn) -> bytes:
    """Entries with few names, so that they meet: directories, links to whatever, names twice."""
    out, files = b"", [""]
    for kind in draw(st.lists(KINDS, min_size=1, max_size=16)):
        path = draw(PATHS)
        name = (draw(SPELLINGS) + path).encode()
        if kind == "dir":
            out += entry(name + b"/", type=b"5")
        elif kind == "symlink":
            out += entry(name, type=b"2", link=b"a")
        elif kind == "link":
            out += hard(name, (draw(SPELLINGS) + draw(st.sampled_from(files) if files[1:] else PATHS)).encode())
        elif kind == "landmark":
            out += entry(draw(SPELLINGS).encode() + b".prefetch.landmark", b"\x0f")
        elif kind == "whiteout":
            out += entry(b".wh." + name.rpartition(b"/")[2])
        else:
            records = [(b"path", name), (b"mtime", b"12.5")] if kind == "pax" else []
            out += entry(name[:3], b"" if kind == "empty" else name * 100, *records) if records else entry(name, name)
        if kind in ("file", "pax", "link"):
            files.append(path)
    return out + draw(st.sampled_from([b"", END, END * 3]))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tars(), st.lists(st.builds(str.__add__, SPELLINGS, PATHS), min_size=1, max_size=5))
def test_any_tar_equals_go(peer: Path, tmp_path: Path, tar: bytes, wanted: list[str]) -> None:
    try:
        # With circles Go runs out of stack; and links to a directory without an entry lead nowhere only here.
        if not links_in_a_circle(tar) and not links_of(tar) & parents_without_entry(tar):
            as_go(peer, tmp_path, tar, wanted, allow_missing=True)
    except TarError as error:
        assert "is a hard link to" in str(error)
        assert has_a_name_twice(tar)


def members(tar: bytes) -> list[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        return archive.getmembers()


def has_a_name_twice(tar: bytes) -> bool:
    names = [clean(info.name) for info in members(tar)]
    return len(set(names)) < len(names)


def links_of(tar: bytes) -> set[str]:
    return {clean(info.linkname) for info in members(tar) if info.islnk()}


def links_in_a_circle(tar: bytes) -> bool:
    links = {clean(info.name): clean(info.linkname) if info.islnk() else None for info in members(tar)}
    for name in links:
        seen: set[str] = set()
        at: str | None = name
        while at is not None and at not in seen:
            seen.add(at)
            at = next((links[part] for part in [at, *parents(at)] if links.get(part)), None)
        if at is not None:
            return True
    return False


def parents(name: str) -> Iterator[str]:
    while name := name.rpartition("/")[0]:
        yield name


def test_hard_links_in_a_circle_are_missing() -> None:
    tar = hard(b"a", b"b") + hard(b"b", b"c") + hard(b"c", b"a") + hard(b"self", b"self") + entry(b"f", b"f") + END
    layer, names = built(tar, "a", "self", "f", allow_missing=True)
    assert layer.missing == ("a", "self")
    assert ahead(names) == ["f"]


def test_long_chain_of_hard_links() -> None:
    count = 900
    chain = [entry(b"0", b"content")] + [hard(b"%d" % i, b"%d" % (i - 1)) for i in range(1, count)]
    _, names = built(b"".join(chain) + END, str(count - 1))
    assert ahead(names) == [str(i) for i in range(count)]


def test_chain_of_hard_links_without_end() -> None:
    chain = [hard(b"%d" % i, b"%d" % (i + 1)) for i in range(5000)]
    layer, _ = built(b"".join(chain) + entry(b"5000", b"content") + END, "0", allow_missing=True)
    assert layer.missing == ("0",)


def test_link_to_what_a_later_entry_replaces() -> None:
    """Dropping the first "a" would make "l" mean the second one."""
    tar = entry(b"a", b"1") + hard(b"./l", b"a") + entry(b"./a", b"2") + entry(b"z", b"z") + END
    with pytest.raises(TarError, match=r"l: is a hard link to a as it was.*\(at byte 1024\).*make the tar without"):
        built(tar, "z")
    again = entry(b"a", b"1") + hard(b"l", b"a") + entry(b"a", b"2") + hard(b"l", b"a") + END
    assert built(again, "l")[1] == ["a", "l", LANDMARK]


ZERO = b"0000000\0"
LANDMARK_BYTES = entry(LANDMARK.encode(), b"\x0f", mode=ZERO, uid=ZERO, gid=ZERO, mtime=b"0000" + ZERO)


def test_nothing_is_encoded_anew(peer: Path, tmp_path: Path) -> None:
    """Go would write these headers in its own way; here the entries' bytes are the input's."""
    odd = entry(b"odd", b"12345", mode=b"   644 \0", user_name=b"u", mtime=b"00000000017 ")
    first, last = entry(b"first", b"1" * 700, (b"comment", b"kept")), entry(b"last", b"9")
    layer = estargz.build(io.BytesIO(first + odd + last + END * 5), tmp_path / "blob", prefetch=["odd"])
    with estargz.open(tmp_path / "blob") as blob:
        assert blob.open_tar().read() == odd + LANDMARK_BYTES + first + last + END * 5
    judge(peer, tmp_path / "blob", layer)


# ---------------------------------------------------------------------------------------------- tars from everywhere

MIXED = LINKED + entry(b"big", random.Random(5).randbytes(300_000)) + END


@pytest.fixture(scope="module")
def expected() -> str:
    return blob_of(MIXED, prefetch=["big", "m"])[0].digest


def test_any_kind_of_tar_gives_the_same(expected: str, tmp_path: Path) -> None:
    (tmp_path / "plain.tar").write_bytes(MIXED)
    (tmp_path / "tar.gz").write_bytes(gzip.compress(MIXED))
    (tmp_path / "tar.zst").write_bytes(zstandard.compress(MIXED))
    estargz.build(tmp_path / "plain.tar", tmp_path / "lossless.esgz")
    for path in sorted(tmp_path.iterdir()):
        with nothing_leaks():
            assert blob_of(path, prefetch=["big", "m"])[0].digest == expected, path
        with open(path, "rb") as opened:
            assert blob_of(opened, prefetch=["big", "m"])[0].digest == expected, path
        with open(path, "rb", buffering=0) as opened:
            assert blob_of(opened, prefetch=["big", "m"])[0].digest == expected, path
        with open(path, "rb") as opened:
            assert blob_of(through_pipe(opened.read()), prefetch=["big", "m"])[0].digest == expected, path


def through_pipe(data: bytes) -> io.FileIO:
    reading, writing = os.pipe()

    def send() -> None:
        with open(writing, "wb") as pipe:
            pipe.write(data)

    in_thread(send)
    return io.FileIO(reading, "rb")


def test_file_that_is_read_from_its_middle(expected: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"something else" + MIXED)
    with open(tmp_path / "file", "rb", buffering=0) as file:
        file.seek(14)
        assert blob_of(file, prefetch=["big", "m"])[0].digest == expected


def test_blob_with_a_landmark_gets_another(peer: Path, tmp_path: Path) -> None:
    (tmp_path / "in.tar").write_bytes(FEW + END)
    (tmp_path / "list").write_text("c/y\n")
    report(peer, "blob", "-how", "build", "-prioritized", tmp_path / "list", tmp_path / "in.tar", tmp_path / "go.esgz")
    ours, _ = built(FEW + END, "c/y")
    for source, wanted in [(tmp_path / "go.esgz", ["z"]), (blob_of(FEW + END, prefetch=["c/y"])[1], ["z"])]:
        layer, names = built(source, *wanted)
        assert [name for name in names if "landmark" in name] == [LANDMARK]
        assert ahead(names) == ["z"]
        assert layer.prefetch_size is not None and ours.prefetch_size is not None


def test_tables_of_contents_are_left_out() -> None:
    """As Go's Build does; without an order of prefetching such a tar is refused."""
    table = entry(b"./stargz.index.json", b"{}")
    assert built(table + FEW + END, "z")[1][0:2] == ["z", LANDMARK]
    assert "stargz.index.json" not in built(FEW + table + END, "z")[1][-1]
    assert (
        built(FEW + table + entry(b"y") + END[:512], "z")[1][-1] == "y"
    )  # as many bytes behind the table as the end has
    inflated = gzip.decompress(blob_of(FEW + END)[1])  # ends in a table
    assert built(inflated, "z") == built(FEW + END, "z")


def test_blob_that_hides_its_table(tmp_path: Path) -> None:
    blob = blob_of(FEW + END)[1]
    broken = blob[: -51 - len(table_of(blob))] + gzip.compress(b"x" * 512) + blob[-51:]
    with pytest.raises(SourceError, match="is an eStargz blob whose tar ends in bytes that hide"):
        built(broken, "z")


def table_of(blob: bytes) -> bytes:
    return blob[int(blob[-35:-19], 16) : -51]


@pytest.mark.parametrize("change", range(300))
def test_damaged_tars_have_the_same_error(change: int) -> None:
    """The scan says what the builder would have said, with the offset in the input."""
    chance = random.Random(change)
    tar = bytearray(everything() + END)
    if change % 3 == 0:
        del tar[chance.randrange(len(tar)) :]
    else:
        at = chance.randrange(len(tar))
        tar[at] = chance.randrange(256)
        if change % 3 == 1:
            mend_checksum(tar, at // 512 * 512)
    assert outcome(bytes(tar), prefetch=["nosuch"], allow_missing=True) == outcome(bytes(tar))


def mend_checksum(tar: bytearray, at: int) -> None:
    tar[at + 148 : at + 156] = b" " * 8
    tar[at + 148 : at + 156] = b"%06o\0 " % sum(tar[at : at + 512])


def outcome(tar: bytes, **options: Any) -> str:
    try:
        return "fine" if estargz.build(io.BytesIO(tar), io.BytesIO(), threads=1, **options) else ""
    except SourceError as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    "tail",
    [b"", bytes(512), bytes(512) + b"x" * 512, bytes(700), END + b"garbage", bytes(10240), END + b"x" * 512 + END],
    ids=["none", "one", "lone", "part", "garbage", "blocked", "behind"],
)
def test_ends_of_archives(tail: bytes) -> None:
    tar = FEW + tail
    assert outcome(tar, prefetch=["z"]) == outcome(tar)
    if outcome(tar) == "fine":
        with estargz.open(blob_of(tar, prefetch=["z"])[1]) as blob:
            unpacked = blob.open_tar().read()
        assert unpacked[len(unpacked) - len(tail) :] == tail
        assert len(unpacked) == len(tar) + 1024  # the landmark


def test_tar_that_ends_with_what_comes_first() -> None:
    assert built(entry(b"a", b"a") + entry(b"b", b""), "a", "b")[1] == ["a", "b", LANDMARK]
    assert built(LANDMARKS, "/")[1] == [LANDMARK]


def test_tar_that_is_cut_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "in.tar"
    path.write_bytes(MIXED)
    scan = sources._tar_order.TarOrder

    def cut(*arguments: Any) -> Any:
        order = scan(*arguments)
        os.truncate(path, 100_000)
        return order

    monkeypatch.setattr(sources._tar_order, "TarOrder", cut)
    with nothing_leaks(), pytest.raises(ChangedError, match=r"in\.tar: shrank while it was read \(at byte 100000\)"):
        estargz.build(path, tmp_path / "blob", prefetch=["z"])
    assert not (tmp_path / "blob").exists()


def test_no_room_for_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with (
            nothing_leaks(),
            pytest.raises(
                SinkError, match=f"{tmp_path}: the uncompressed tar cannot be kept .*File too large; .*TMPDIR"
            ),
        ):
            blob_of(gzip.compress(MIXED), prefetch=["z"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []
    assert blob_of(gzip.compress(MIXED), prefetch=["z"])[0].prefetch_size
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------- trees

Facts = dict[str, tuple[Any, ...]]


def facts_of(tar: bytes) -> tuple[Facts, set[frozenset[str]]]:
    """What a stream says of each name, whichever name of an inode has the content; and the names of each inode."""
    facts: Facts = {}
    first: dict[str, str] = {}
    with tarfile.open(fileobj=io.BytesIO(tar), encoding="utf-8", errors="surrogateescape") as archive:
        for info in archive:
            attributes = tuple(sorted(item for item in info.pax_headers.items() if item[0].startswith("SCHILY")))
            meta = (info.mode, info.uid, info.gid, info.mtime, attributes)
            assert info.name not in facts
            if info.islnk():
                assert facts[info.linkname][0] == meta  # the target is there already
                facts[info.name], first[info.name] = facts[info.linkname], first[info.linkname]
                continue
            opened = archive.extractfile(info) if info.isreg() else None
            content = opened.read() if opened else None
            facts[info.name] = (meta, info.type, info.linkname, info.devmajor, info.devminor, content)
            first[info.name] = info.name
    inodes: dict[str, set[str]] = {}
    for name, one in first.items():
        inodes.setdefault(one, set()).add(name)
    return facts, {frozenset(names) for names in inodes.values()}


def same_but_for_order(upper: Path, wanted: Sequence[str], **options: Any) -> tuple[Layer, list[str], Facts]:
    """The layer, once it is known to hold what it would hold without an order, with parents in front of children."""
    plain = io.BytesIO()
    estargz.build(upper, plain, compression="uncompressed", landmark=False, **options)
    layer, blob = blob_of(upper, prefetch=wanted, allow_missing=True, threads=1, **options)
    again, _ = blob_of(upper, prefetch=[*wanted, *reversed(wanted)], allow_missing=True, threads=3, **options)
    assert again.digest == layer.digest
    names = names_in(layer, blob)
    with estargz.open(blob) as opened:
        facts, inodes = facts_of(opened.open_tar().read())
    assert facts.pop(LANDMARK)[-1] == b"\x0f"
    inodes.remove(frozenset([LANDMARK]))
    assert (facts, inodes) == facts_of(plain.getvalue())
    early = [name.rstrip("/") for name in ahead(names)]
    for number, name in enumerate(early):
        assert "/" not in name or name.rpartition("/")[0] in early[:number]
    return layer, names, facts


def some_of(upper: Path, chance: random.Random) -> list[str]:
    names = RandomTree(upper, chance, as_root=IS_ROOT).paths()
    wanted = [chance.choice(names) for _ in range(chance.randrange(1, 12)) if names]
    wanted += chance.choices(["nosuch", "a/b/c", "a", "b", "c/d", "/", "a*/**", "**/b", "*"], k=chance.randrange(1, 4))
    chance.shuffle(wanted)
    return wanted


@pytest.fixture
def no_whiteout_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is called as another one's whiteout would be a name twice."""
    monkeypatch.setattr("trees.NAMES", [name for name in NAMES if not name.startswith(".wh.")])


@pytest.mark.parametrize("seed", range(30))
def test_random_trees(seed: int, no_whiteout_names: None, scratch: Path) -> None:
    chance = random.Random(f"prefetch {seed}")
    for name in ("lower", "upper"):
        RandomTree(scratch / name, random.Random(seed), as_root=IS_ROOT).grow(40)
    RandomTree(scratch / "upper", chance, as_root=IS_ROOT).disturb(chance.randrange(1, 30))
    options: dict[str, Any] = {
        "source_date_epoch": chance.choice([None, 0]),
        "min_chunk_size": chance.choice([0, 2000]),
    }
    for lower in (None, scratch / "lower"):
        wanted = some_of(scratch / "upper", chance)
        layer, names, facts = same_but_for_order(scratch / "upper", wanted, lower=lower, **options)
        check_missing(layer, wanted, scratch / "upper", facts)
        if lower is None:
            early = {clean(name) for name in ahead(names)}
            present = {clean(path) for path in wanted if path not in layer.missing and "*" not in path} - {""}
            assert len(early) >= len(present)  # names that are no UTF-8 are others in the table


def check_missing(layer: Layer, wanted: Sequence[str], upper: Path, facts: Facts) -> None:
    for path in wanted:
        if "*" not in path:
            there = clean(path) in facts and os.path.lexists(upper / clean(path))
            assert (path in layer.missing) == (not there and clean(path) != ""), path


@pytest.mark.parametrize("seed", range(25))
def test_random_overlays(seed: int, root: None, no_whiteout_names: None, scratch: Path) -> None:
    chance = random.Random(f"overlay {seed}")
    lowers = [scratch / f"lower{i}" for i in range(chance.choice([1, 1, 2]))]
    for number, lower in enumerate(lowers):
        RandomTree(lower, random.Random(f"{seed} {number}"), as_root=True, meddle=chance.random() < 0.5).grow(25)
    if chance.random() < 0.5:
        subprocess.run(["cp", "-a", lowers[0], scratch / "upper"], check=True)
        RandomTree(scratch / "upper", chance, as_root=True, meddle=True).disturb(chance.randrange(1, 30))
    else:
        RandomTree(scratch / "upper", chance, as_root=True, meddle=True).grow(25)
    wanted = some_of(scratch / "upper", chance)
    layer, _, facts = same_but_for_order(scratch / "upper", wanted, overlay_lower=lowers)
    check_missing(layer, wanted, scratch / "upper", facts)


def test_order_in_a_tree(tree: Tree) -> None:
    for name in ("b/c/one", "b/two", "a/three", "d/four"):
        tree.file(name, name.encode())
    tree.symlink("link", "d/four")
    layer, names = built(tree.root, "d", "/b/c/one", "./a//three", "link", "b/c/one")
    assert ahead(names) == ["d/", "b/", "b/c/", "b/c/one", "a/", "a/three", "link"]
    assert names[names.index(LANDMARK) :] == [LANDMARK, "b/two", "d/four"]
    assert layer.missing == ()


def test_hard_links_in_a_tree(tree: Tree) -> None:
    """The first name that is written has the content."""
    tree.file("a/first", b"content")
    tree.link("b/second", "a/first")
    tree.link("c", "a/first")
    blob = blob_of(tree.root, prefetch=["c"])[1]
    found = {entry["name"]: (entry["type"], entry.get("linkName", "")) for entry in toc_of(blob)}
    assert list(found) == ["c", LANDMARK, "a/", "a/first", "b/", "b/second"]
    assert found["c"] == ("reg", "")
    assert found["a/first"] == found["b/second"] == ("hardlink", "c")


def test_whiteouts_stay_where_they_are(scratch: Path, tree: Tree) -> None:
    lower = Tree(scratch / "lower")
    for name in ("a/gone", "b/gone", "gone", "z/kept"):
        lower.file(name)
    tree.file("a/new")
    tree.file("b/new")
    tree.file("z/kept")
    layer, names = built(tree.root, "b/new", "z/kept", lower=lower.root, allow_missing=True)
    assert names == ["b/", "b/new", LANDMARK, "a/", "a/.wh.gone", "a/new", "b/.wh.gone", ".wh.gone"]
    assert layer.missing == ("z/kept",)  # which has not changed
    with pytest.raises(UsageError, match="not in the layer: 'a/gone'"):
        built(tree.root, "a/gone", lower=lower.root)


def test_unchanged_directories(scratch: Path, tree: Tree) -> None:
    """They are in the layer if something below them is, and come first if that does."""
    lower = Tree(scratch / "lower")
    for made in (lower, tree):
        for name in ("changed", "same"):
            made.file(f"{name}/file")
    tree.file("changed/new", b"new")
    layer, names = built(tree.root, "same", "changed", lower=lower.root, allow_missing=True)
    assert (layer.missing, ahead(names)) == (("same",), [])
    layer, names = built(tree.root, "changed", "changed/new", lower=lower.root)
    assert ahead(names) == ["changed/", "changed/new"]
    with pytest.raises(UsageError, match="not in the layer: 'same'"):
        built(tree.root, "changed", "same", lower=lower.root)


@pytest.mark.parametrize(("old", "new"), [("a-old", "z-new"), ("z-old", "a-new")])
def test_new_name_of_an_unchanged_file(old: str, new: str, scratch: Path, tree: Tree) -> None:
    """The old one is in the layer as a link to the new one, however they are asked for."""
    lower = Tree(scratch / "lower")
    for made in (lower, tree):
        made.file(old)
        made.file("other")
    tree.link(new, old)
    tree.link("other-link", "other")
    for wanted in ([old], [new], [old, new], [new, old], [old, "other-link"], ["other"]):
        layer, names, facts = same_but_for_order(tree.root, wanted, lower=lower.root)
        assert layer.missing == ()
        assert {old, new} <= facts.keys()
        if {old, new} <= {*wanted}:
            assert set(ahead(names)) == {old, new}


def test_paths_through_links_and_files_are_missing(tree: Tree) -> None:
    tree.file("d/file")
    tree.symlink("link", "d")
    tree.socket("socket")
    wanted = ["link/file", "d/file/x", "socket", "x" * 300, "d/" * 3000 + "y"]
    assert built(tree.root, *wanted, allow_missing=True)[0].missing == tuple(wanted)


def test_deep_paths(scratch: Path) -> None:
    """Handles of directories far up are closed and opened again on the way."""
    upper = Tree(scratch / "upper")
    deep = "/".join(["d"] * 400)
    for level in (10, 200, 399):
        upper.file("/".join(["d"] * level) + "/file", b"%d" % level)
    wanted = [deep[: 2 * level] + "file" for level in (399, 10, 200)]
    _, names, _ = same_but_for_order(upper.root, [*wanted, "**/file"])
    assert [name for name in ahead(names) if name.endswith("file")] == wanted


def test_capabilities_and_devices_come_first_too(root: None, tree: Tree) -> None:
    tree.file("d/able", b"x", capability=CAPABILITY, owner=(3_000_000, 5), mode=0o4755)
    tree.char("d/null", 1, 3)
    tree.fifo("é/fifo")
    _, names, _ = same_but_for_order(tree.root, ["é/fifo", "d/null", "d/able"])
    assert ahead(names) == ["é/", "é/fifo", "d/", "d/null", "d/able"]


def test_overlay_with_redirect_is_refused(root: None, scratch: Path, tree: Tree) -> None:
    Tree(scratch / "lower").file("d/x")
    tree.file("d/y")
    os.setxattr(tree.root / "d", "trusted.overlay.redirect", b"elsewhere")
    with pytest.raises(SourceError, match="d: is an overlayfs redirect"):
        built(tree.root, "d/y", overlay_lower=[scratch / "lower"])


def test_reserved_names_are_refused(tree: Tree) -> None:
    tree.file(LANDMARK)
    tree.file("x")
    for wanted in (LANDMARK, "x"):
        with pytest.raises(SourceError, match="landmark: is a name reserved"):
            built(tree.root, wanted)


# ---------------------------------------------------------------------------------------------- what is fetched ahead


@pytest.mark.parametrize("options", [{}, {"min_chunk_size": 100_000}, {"chunk_size": 1000}, {"level": 6}], ids=str)
def test_range_holds_all_that_came_first(options: dict[str, Any], tree: Tree, peer: Path, scratch: Path) -> None:
    """What a runtime fetches inflates to everything in front of the landmark's payload, and to nothing behind it."""
    chance = random.Random(9)
    for number in range(30):
        tree.file(f"d/{number:02}", chance.randbytes(chance.choice([0, 10, 5000, 40_000])))
    wanted = ["d/29", "d/03", "d/1*"]
    layer = estargz.build(tree.root, scratch / "blob", prefetch=wanted, **options)
    assert layer.prefetch_size is not None
    blob = (scratch / "blob").read_bytes()
    landmark = next(entry for entry in toc_of(blob) if entry["name"] == LANDMARK)
    assert (landmark["offset"], landmark.get("innerOffset"), landmark["size"]) == (layer.prefetch_size, None, 1)
    stream = gzip.decompress(blob)
    inflated = inflate(blob[: layer.prefetch_size])
    assert stream.startswith(inflated)
    assert stream[len(inflated)] == 0x0F
    with tarfile.open(fileobj=io.BytesIO(inflated + END)) as archive:
        assert archive.getnames() == ["d", "d/29", "d/03", *(f"d/1{i}" for i in range(10)), LANDMARK]
    if "min_chunk_size" not in options:  # with which Go's checker finds an offset twice
        judge(peer, scratch / "blob", layer)


def inflate(members: bytes) -> bytes:
    out = b""
    while members:
        member = zlib.decompressobj(31)
        out += member.decompress(members)
        assert member.eof
        members = member.unused_data
    return out


def test_nothing_asked_for_is_as_before(tree: Tree) -> None:
    tree.file("x")
    plain, _ = blob_of(tree.root)
    for nothing in (None, [], (), iter([])):
        assert blob_of(tree.root, prefetch=nothing)[0] == plain
    assert (plain.prefetch_size, plain.missing) == (None, ())
    tar, _ = blob_of(FEW + END)
    assert blob_of(FEW + END, prefetch=[])[0] == tar


def test_nothing_found_leaves_the_landmark_first(tree: Tree) -> None:
    """As Go does: that something was asked for is what counts."""
    tree.file("x")
    for source in (tree.root, FEW + END):
        layer, names = built(source, "nosuch", allow_missing=True)
        assert names[0] == LANDMARK
        assert layer.missing == ("nosuch",)


def test_layer_says_what_is_missing(tree: Tree) -> None:
    tree.file("x")
    layer, _ = built(tree.root, "x", "./b", "/a/", "b", "c*", allow_missing=True)
    assert layer.missing == ("./b", "/a/", "c*")
    assert not {"missing", "prefetch_size"} & {*layer.descriptor(), *layer.descriptor()["annotations"]}


def test_missing_paths_stop_a_build_before_it_writes(tree: Tree, tmp_path: Path) -> None:
    tree.file("x", bytes(100_000))
    wanted = ["x", *(f"no/{number}" for number in range(60))]
    for source in (tree.root, io.BytesIO(FEW + END)):
        sink = io.BytesIO()
        with nothing_leaks(), pytest.raises(UsageError) as caught:
            estargz.build(source, sink, prefetch=wanted)
        assert sink.getvalue() == b""
        assert "'no/0', 'no/1', " in str(caught.value)
        assert "and 1" in str(caught.value) and " more; leave them out" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefetch": "x"}, "a sequence of paths, not one path"),
        ({"prefetch": b"x"}, "a sequence of paths, not one path"),
        ({"prefetch": [b"x"]}, "is no path to prefetch"),
        ({"prefetch": ["x", "a\0b"]}, "is no path to prefetch"),
        ({"prefetch": ["x"], "compression": "gzip"}, "only eStargz layers"),
        ({"prefetch": ["x"], "compression": "uncompressed", "landmark": False}, "only eStargz layers"),
        ({"prefetch": ["x"], "landmark": False}, "needs the landmark"),
    ],
)
def test_options_that_cannot_be_honoured(options: dict[str, Any], message: str, tree: Tree) -> None:
    tree.file("x")
    with pytest.raises(UsageError, match=message):
        blob_of(tree.root, **options)


# ---------------------------------------------------------------------------------------------- patterns


def pattern_tree(tree: Tree) -> None:
    for name in (
        "lib/b.so",
        "lib/a.so",
        "lib/sub/c.so",
        "lib/a.py",
        "pages/[slug].js",
        "pages/s.js",
        "top.so",
        ".hidden",
    ):
        tree.file(name)


@pytest.mark.parametrize(
    ("pattern", "files"),
    [
        ("lib/*.so", ["lib/a.so", "lib/b.so"]),
        ("lib/**", ["lib/a.py", "lib/a.so", "lib/b.so", "lib/sub/c.so"]),
        ("**/*.so", ["lib/a.so", "lib/b.so", "lib/sub/c.so", "top.so"]),
        ("lib/?.so", ["lib/a.so", "lib/b.so"]),
        ("/lib/[ac].*", ["lib/a.py", "lib/a.so"]),
        ("./lib/[!a].so", ["lib/b.so"]),
        ("*", [".hidden", "top.so"]),
        ("pages/[slug].js", ["pages/[slug].js"]),  # a file of just that name
        (r"pages/\[slug\].js", ["pages/[slug].js"]),
        ("page[s]/[s].js", ["pages/s.js"]),
    ],
)
def test_patterns(pattern: str, files: list[str], tree: Tree) -> None:
    pattern_tree(tree)
    tar = io.BytesIO()
    estargz.build(tree.root, tar, compression="uncompressed")
    for source in (tree.root, tar.getvalue()):
        _, names = built(source, pattern)
        assert [name for name in ahead(names) if not name.endswith("/")] == files


def test_patterns_keep_their_place(tree: Tree) -> None:
    pattern_tree(tree)
    layer, names = built(tree.root, "top.so", "lib/b*", "lib/*.so", "nothing/**", "lib/a.so", allow_missing=True)
    assert ahead(names) == ["top.so", "lib/", "lib/b.so", "lib/a.so"]
    assert layer.missing == ("nothing/**",)


def test_patterns_are_missing_where_nothing_of_theirs_has_changed(scratch: Path, tree: Tree) -> None:
    lower = Tree(scratch / "lower")
    for made in (lower, tree):
        pattern_tree(made)
    tree.file("lib/new.so")
    layer, names = built(tree.root, "lib/**", "*.so", lower=lower.root, allow_missing=True)
    assert ahead(names) == ["lib/", "lib/new.so"]
    assert layer.missing == ("*.so",)


def test_names_that_are_no_text(tree: Tree) -> None:
    name = "\udcff\udcfe-é"
    tree.file(f"d/{name}", b"found")
    for wanted in (f"d/{name}", "d/*-é", "**"):
        _, names, _ = same_but_for_order(tree.root, [wanted])
        assert len(ahead(names)) == 2


# ---------------------------------------------------------------------------------------------- sizes


def test_million_paths(tree: Tree) -> None:
    tree.file("usr/lib/found")
    wanted = [f"usr/lib/{number}" for number in range(1_000_000)]
    wanted[500_000] = "usr/lib/found"
    layer, _ = blob_of(tree.root, prefetch=wanted, allow_missing=True)
    assert len(layer.missing) == 999_999


@pytest.mark.measured
def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    """A tar of 600 MB whose last entry comes first, plain and compressed: both in the memory of a small one."""
    block = random.Random(3).randbytes(1 << 20)
    with open(tmp_path / "in.tar", "wb") as tar:
        tar.write(entry(b"big", size=b"%011o\0" % (600 << 20)))
        for _ in range(600):
            tar.write(block)
        tar.write(entry(b"last", b"last") + END)
    code = (
        "import estargz, sys\n"
        "layer = estargz.build(sys.argv[1], '/dev/null', prefetch=['last'], threads=2)\n"
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(layer.prefetch_size, int(peak.split()[1]) // 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "in.tar"], capture_output=True, text=True, check=True)
    size, peak = map(int, done.stdout.split())
    assert 0 < size < 2000
    assert peak < 180, "MiB"


# ---------------------------------------------------------------------------------------------- command line


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [*PROGRAM, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)


def test_command(tree: Tree, tmp_path: Path) -> None:
    pattern_tree(tree)
    done = run(
        tree.root, "-o", tmp_path / "blob", "--prefetch", "top.so", "--prefetch", "lib/*.so", "--json", "--quiet"
    )
    assert (done.returncode, done.stderr) == (0, "")
    layer = estargz.build(tree.root, tmp_path / "same", prefetch=["top.so", "lib/*.so"])
    assert json.loads(done.stdout) == layer.descriptor() | {"prefetchSize": layer.prefetch_size, "missing": []}
    info = subprocess.run([*PROGRAM[:-1], "info", "--json", tmp_path / "blob"], capture_output=True, check=True)
    assert json.loads(info.stdout)["landmark"] == "prefetch"


def test_command_with_missing_paths(tree: Tree, tmp_path: Path) -> None:
    tree.file("x")
    arguments = [tree.root, "-o", tmp_path / "blob", "--prefetch", "x", "--prefetch", "no/1", "--prefetch", "no/2*"]
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "estargz: error: paths to prefetch that are not in the layer: 'no/1', 'no/2*'; " in done.stderr
    assert not (tmp_path / "blob").exists()
    done = run(*arguments, "--allow-missing", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["missing"] == ["no/1", "no/2*"]
    assert done.stderr.splitlines()[:2] == [
        "estargz: warning: no/1: is to be prefetched and not in the layer",
        "estargz: warning: no/2*: is to be prefetched and not in the layer",
    ]
    assert "to be prefetched in" in done.stderr.splitlines()[-1]


def test_command_lists_a_hundred_missing_paths(tree: Tree, tmp_path: Path) -> None:
    tree.file("x")
    wanted = [part for number in range(150) for part in ("--prefetch", f"no/{number}")]
    done = run(tree.root, "-o", tmp_path / "blob", *wanted, "--allow-missing", "--quiet", "--json")
    assert len(done.stderr.splitlines()) == 101
    assert done.stderr.splitlines()[-1] == "estargz: warning: and 50 more; --json lists them all"
    assert len(json.loads(done.stdout)["missing"]) == 150


def test_command_with_records(tree: Tree, tmp_path: Path) -> None:
    pattern_tree(tree)
    (tmp_path / "record").write_text('{"path": "/pages/[slug].js"}\n{"path": "lib/a.py"}\n')
    (tmp_path / "list").write_text("# libraries\n/lib/*.so\nlib/gone\n")
    records = ["--record-in", tmp_path / "record", "--record-in", tmp_path / "list"]
    done = run(
        tree.root, "-o", tmp_path / "blob", *records, "--prefetch", "top.so", "--allow-missing", "--quiet", "--json"
    )
    assert (done.returncode, json.loads(done.stdout)["missing"]) == (0, ["lib/gone"])
    names = [entry["name"] for entry in toc_of((tmp_path / "blob").read_bytes())]
    assert [name for name in ahead(names) if not name.endswith("/")] == [
        "top.so",
        "pages/[slug].js",
        "lib/a.py",
        "lib/a.so",
        "lib/b.so",
    ]
    done = run(tree.root, "-o", tmp_path / "blob", "--record-in", tmp_path / "nowhere")
    assert (done.returncode, done.stderr) == (1, f"estargz: error: {tmp_path}/nowhere: No such file or directory\n")


def test_command_from_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    done = subprocess.run(
        [*PROGRAM, "-", "-o", tmp_path / "blob", "--prefetch", "big", "--prefetch", "m"],
        input=gzip.compress(MIXED),
        capture_output=True,
        check=True,
        env=os.environ | {"TMPDIR": str(tmp_path / "tmp")},
    )
    assert json.loads(done.stdout)["digest"] == blob_of(MIXED, prefetch=["big", "m"])[0].digest
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_while_the_copy_is_made(number: signal.Signals, tmp_path: Path) -> None:
    """Input that has begun and does not end; the process ends at once and leaves nothing."""
    command = [*PROGRAM, "-", "-o", tmp_path / "blob", "--prefetch", "x"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdin is not None
        process.stdin.write(FEW * 400)
        process.stdin.flush()
        until = time.monotonic() + 20
        while time.monotonic() < until and not copies_into(process.pid, tmp_path):
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(20) in (130, 143)
    assert list(tmp_path.iterdir()) == []


def copies_into(pid: int, folder: Path) -> bool:
    """Whether the process has a file without a name there that holds something."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if os.readlink(link).startswith(f"{folder}/") and link.stat().st_size:
                return True
        except OSError:
            continue
    return False


def test_extracted_by_gnu_tar(scratch: Path, tree: Tree) -> None:
    """What comes out of a layer with an order is the tree."""
    if shutil.which("tar") is None:
        missing("GNU tar is not installed")
    pattern_tree(tree)
    tree.link("lib/link", "lib/a.so")
    tree.symlink("symlink", "lib")
    tree.dir("lib/sub", mode=0o700)
    estargz.build(tree.root, scratch / "blob", prefetch=["symlink", "lib/sub/*", "lib/link"])
    (scratch / "out").mkdir()
    subprocess.run(["tar", "-xzf", scratch / "blob", "-C", scratch / "out"], check=True, capture_output=True)
    (scratch / "out" / LANDMARK).unlink()
    assert census(scratch / "out") == census(tree.root)


def census(root: Path) -> dict[str, tuple[Any, ...]]:
    found: dict[str, tuple[Any, ...]] = {}
    for path in sorted(root.rglob("*")):
        facts = path.lstat()
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(root))] = (facts.st_mode, facts.st_nlink, facts.st_mtime_ns // 10**9, content)
    return found


def test_threads_leave_no_trace(tree: Tree) -> None:
    chance = random.Random(1)
    for number in range(200):
        tree.file(
            f"d{number % 7}/{number}",
            chance.randbytes(chance.choice([0, 100, 30_000])),
            time=chance.choice([TIME, WHOLE]),
        )
    wanted = [f"d{number % 7}/{number}" for number in range(150, 50, -3)]
    digests = {blob_of(tree.root, prefetch=wanted, threads=threads)[0].digest for threads in (1, 2, 3, 8)}
    assert len(digests) == 1
    assert threading.active_count() == 1
