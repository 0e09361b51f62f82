"""Go's reader judges this package's: what it serves of a blob, whoever made that, is what estargz.open gives."""

from __future__ import annotations

import json
import random
import re
import stat
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from reference.peer import report, run
from reference.tar_headers import header_blocks, padded
from tars import END, entry, sha256
from trees import CAPABILITY, Tree

import estargz
from estargz.cli.ls import command as ls

Line = dict[str, Any]

CHUNK_SIZES = (512, 4096, 64 << 10, 4 << 20)
MIN_CHUNK_SIZES = (0, 1000, 50_000, 1 << 20)
BOTH_SIZES = list(product(CHUNK_SIZES, MIN_CHUNK_SIZES))
LEVELS = (0, 1, 6, 9)
RANGES = 50  # of each blob


# ------------------------------------------------------------------------------------------------- the comparison


def compare(peer: Path, blob: Path) -> list[Line]:
    """Holds everything that this package says of a blob against what Go's reader serves; the latter's lines."""
    theirs = [json.loads(line) for line in run(peer, "read", blob).splitlines()]
    assert not [line for line in theirs if line.get("error")]
    stated = [line for line in theirs if not line.get("implicit")]
    contents: dict[str, bytes] = {}
    with estargz.open(blob) as ours:
        for line in stated:
            if not line.get("hidden"):
                compare_entry(ours, line)
                if line.get("digest"):
                    contents[line["name"]] = data = ours.read(line["name"])
                    assert (len(data), sha256(data)) == (line["size"], line["digest"]), line
    compare_listings(blob, stated)
    compare_tree(theirs)
    compare_ranges(peer, blob, contents)
    return theirs


def compare_entry(ours: estargz.Blob, line: Line) -> None:
    """One entry as it is found by its name, and what it is when hard links are followed."""
    found = ours.lookup(line["name"])
    assert (found.type, found.link_name) == (line["type"], line.get("link_name", "")), line
    served, name = found, line["name"]
    while served.type == "hardlink":
        name = served.link_name
        served = ours.lookup(name)
    assert clean(name) == line.get("target", line["name"]), line
    numbers = ("size", "mode", "uid", "gid", "dev_major", "dev_minor")
    assert {key: getattr(served, key) for key in numbers} == {key: line[key] for key in numbers}, line
    assert seconds(served.modtime) == line["modtime"], line
    assert dict(served.xattrs) == (line["xattrs"] or {}), line


def compare_listings(blob: Path, stated: Sequence[Line]) -> None:
    """Both listings: the same entries in the same order, where their chunks are, and whose they are."""
    entries = [json.loads(text) for text in listing(blob, "--json")]
    files = list(with_chunks(entries))
    assert [(clean(file[0]["name"]), file[0]["type"]) for file in files] == [(e["name"], e["type"]) for e in stated]
    for file, line in zip(files, stated, strict=True):
        if line["type"] == "reg" and not line.get("hidden"):
            assert [place(file[0], part) for part in file if file[0].get("size")] == list(map(go_place, chunks(line)))
    for text, line in zip(listing(blob), stated, strict=True):
        if not line.get("hidden") and line["type"] != "hardlink":  # Go shows only what that leads to
            mode, owner = text.split()[:2]
            assert mode[1:] == stat.filemode(line["mode"] & 0o7777)[1:], line
            assert owner == f"{line['user_name'] or line['uid']}/{line['group_name'] or line['gid']}", line


def compare_tree(theirs: Sequence[Line]) -> None:
    """The directories hold exactly the names of the lines: so none was overlooked."""
    lines = {line["name"]: line for line in theirs if not line.get("hidden")}
    inside = {f"{name}/{child}".lstrip("/") for name, line in lines.items() for child in line.get("children", ())}
    assert inside == lines.keys() - {""}


def compare_ranges(peer: Path, blob: Path, contents: dict[str, bytes]) -> None:
    """Random access by Go's reader, within chunks and across them, against slices of what was read here."""
    chance = random.Random(blob.stat().st_size)
    wanted = [range_of(chance, name, len(contents[name])) for name in sorted(contents) if contents[name]]
    wanted += [range_of(chance, line["path"], len(contents[line["path"]])) for line in wanted * RANGES][:RANGES]
    if wanted:
        asked = "\n".join(map(json.dumps, wanted)).encode()
        done = subprocess.run([peer, "ranges", blob], input=asked, capture_output=True, check=True)
        for text, want in zip(done.stdout.splitlines(), wanted, strict=True):
            part = contents[want["path"]][want["offset"] : want["offset"] + want["size"]]
            assert json.loads(text)["digest"] == sha256(part), want


def range_of(chance: random.Random, path: str, length: int) -> Line:
    offset = chance.randrange(length)
    return {"path": path, "offset": offset, "size": chance.randint(1, length - offset)}


def listing(blob: Path, *options: str) -> list[str]:
    done = CliRunner().invoke(ls, [*options, str(blob)], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout_bytes.decode().split("\n")[:-1]  # names may hold other separators


def with_chunks(entries: Iterable[Line]) -> Iterator[list[Line]]:
    """Every entry with the chunks that belong to it."""
    file: list[Line] = []
    for item in entries:
        if item["type"] != "chunk" and file:
            yield file
            file = []
        file.append(item)
    if file:
        yield file


def place(file: Line, chunk: Line) -> tuple[int, ...]:
    begin = chunk.get("chunkOffset", 0)
    return chunk.get("offset", 0), chunk.get("innerOffset", 0), begin, chunk.get("chunkSize", 0) or file["size"] - begin


def go_place(chunk: Line) -> tuple[int, ...]:
    return chunk["offset"], chunk["inner_offset"], chunk["chunk_offset"], chunk["size"]


def chunks(line: Line) -> list[Line]:
    found: list[Line] = line.get("chunks") or []
    return found


def clean(name: str) -> str:
    parts: list[str] = []
    for part in name.split("/"):
        parts = parts[:-1] if part == ".." else [*parts, part] if part not in ("", ".") else parts
    return "/".join(parts)


def seconds(modtime: str) -> int:
    return int(datetime.fromisoformat(modtime).timestamp()) if modtime else 0


# ------------------------------------------------------------------------------------------------- what is in the blobs


def content(size: int) -> bytes:
    """Half of it does not compress."""
    noise = random.Random(size).randbytes(min(size, 30_000) // 2)
    return (noise + b"text that repeats " * (size // 18 + 1))[:size]


def sizes(chunk_size: int) -> set[int]:
    """What a file may have around the borders of chunks, few of them where chunks are large."""
    around = {chunk_size, chunk_size + 1}
    if chunk_size < 1 << 20:
        around |= {chunk_size - 1, 2 * chunk_size, 3 * chunk_size - 1}
    return {1, 511, 512, 513, 20_000} | around


def file(name: bytes, data: bytes = b"", **fields: Any) -> bytes:
    usual = {"mode": 0o644, "mtime_s": 1_600_000_000}
    return header_blocks(name, size=len(data), **usual | fields) + padded(data)


def other(name: bytes, type: bytes, **fields: Any) -> bytes:
    return header_blocks(name, type=type, **{"mode": 0o755, "mtime_s": 1_600_000_001} | fields)


@cache
def rich_tar(chunk_size: int) -> bytes:
    """Every kind of entry, and names, numbers and links of every kind that a tar can hold."""
    long = b"directory-of-some-length/" * 12
    return b"".join(
        [
            other(b"early", b"1", link=b"d/file"),
            other(b"./", b"5", mode=0o711),
            other(b"d/", b"5", mode=0o1777, uid=7, user_name=b"first", group_name=b"group"),
            file(b"d/file", content(20_000), uid=7),
            file(b"d/empty", uid=7, user_name=b"second", mode=0o4755),
            *(file(b"sizes/%d" % size, content(size)) for size in sorted(sizes(chunk_size))),
            other(b"hard", b"1", link=b"d/file"),
            other(b"harder", b"1", link=b"./d/../hard"),
            other(b"hardest", b"1", link=b"/harder"),
            other(b"to-empty", b"1", link=b"d/empty"),
            other(b"soft", b"2", link=b"../anywhere", mode=0o777),
            other(b"hard-soft", b"1", link=b"soft"),
            other(b"long-soft", b"2", link=long, mode=0o777),
            other(b"char", b"3", dev_major=5, dev_minor=1, mode=0o620),
            other(b"block", b"4", dev_major=259, dev_minor=70_000),
            other(b"hard-block", b"1", link=b"block", dev_major=259, dev_minor=70_000),
            other(b"fifo", b"6", mode=0),
            file(b".wh.gone"),
            file(b"d/.wh..wh..opq", mode=0, mtime_s=0),
            file(b"./dotted/../d//double/slash", b"cleaned"),
            file(b"/absolute", b"rooted"),
            file(b"h\xc3\xa9/\xe2\x98\x83", b"snow"),
            file(b"bad/\xff\xe2\x98", b"no UTF-8"),
            entry(b"bad/raw\xfe", b"no PAX record"),
            entry(b"bad/twin\xfe", b"hidden"),
            entry(b"bad/twin\xff", b"not hidden"),
            file(b'json/<>&"\\\t\x01\x7f\xe2\x80\xa8\xef\xbf\xbd', b"escaped"),
            file(long + b"leaf", b"long"),
            file(b"n" * 255, b"one long part"),
            file(b"attributes", b"x", xattrs={b"user.b": b"\0\xff=\n", b"user.a": b"1", b"user.\xc3\xa9": b"y"}),
            other(b"d/attributes/", b"5", xattrs={b"security.capability": CAPABILITY, b"user.empty": b"-"}),
            file(b"numbers", b"x", uid=3_000_000_000, gid=2_097_152, mtime_s=9_000_000_000),
            file(b"before-1970", b"x", mtime_s=-1000),
            file(b"fraction", b"x", mtime_s=1_500_000_000, mtime_ns=500_000_000),
            file(b"no-time", b"x", mtime_s=0),
            file(b"mode-with-type", b"x", mode=0o100_640),
            # Go's reader would give the hidden file's chunks to the one that hides it.
            file(b"twice", b"first", mode=0o600),
            file(b"kept", b"between", uid=7, group_name=b"other"),
            file(b"twice", content(700), mode=0o640),
            file(b"replaced", b"by a directory"),
            other(b"replaced/", b"5"),
            file(b"replaced/inside", content(600)),
        ]
    )


def check_is_rich(lines: Sequence[Line]) -> None:
    """That the tar's entries are there at all, as Go has them."""
    found = {line["name"]: line for line in lines if not line.get("hidden")}
    assert {"reg", "dir", "symlink", "hardlink", "char", "block", "fifo"} == {line["type"] for line in found.values()}
    assert found["hardest"]["target"] == found["early"]["target"] == "d/file"
    assert found["hardest"]["digest"] == sha256(content(20_000))
    assert found["twice"]["digest"] == sha256(content(700))
    assert found["bad/twin\ufffd"]["digest"] == sha256(b"not hidden")
    assert found["d/file"]["user_name"] == "first"
    assert found["kept"]["user_name"] == "second"
    assert found["block"]["dev_minor"] == 70_000
    assert found["before-1970"]["modtime"] == -1000
    assert len(found["attributes"]["xattrs"]) == 3
    assert {"sizes", "bad"} <= {line["name"] for line in lines if line.get("implicit")}


def check_sharing(lines: Sequence[Line], min_chunk_size: int) -> None:
    """Some chunks share a member where that is asked for; at 1000 bytes headers alone may suffice for one each."""
    shared = any(chunk["inner_offset"] for line in lines for chunk in chunks(line))
    assert shared == (min_chunk_size > 0) or min_chunk_size == 1000


@pytest.fixture
def blob(tmp_path: Path) -> Path:
    return tmp_path / "blob"


def options_of(chunk_size: int, min_chunk_size: int) -> list[str]:
    """Go's; the level changes with them."""
    level = LEVELS[(CHUNK_SIZES.index(chunk_size) + MIN_CHUNK_SIZES.index(min_chunk_size)) % len(LEVELS)]
    return ["-level", str(level), "-chunk-size", str(chunk_size), "-min-chunk-size", str(min_chunk_size)]


def go_blob(peer: Path, tar: bytes, blob: Path, how: str, *options: object) -> Line:
    blob.with_suffix(".tar").write_bytes(tar)
    return report(peer, "blob", "-how", how, *options, blob.with_suffix(".tar"), blob)


# ------------------------------------------------------------------------------------------------- made by Go


@pytest.mark.parametrize(("chunk_size", "min_chunk_size"), BOTH_SIZES)
@pytest.mark.parametrize("how", ["lossless", "build"])
def test_blobs_by_go(how: str, chunk_size: int, min_chunk_size: int, peer: Path, blob: Path) -> None:
    go_blob(peer, rich_tar(chunk_size) + END, blob, how, *options_of(chunk_size, min_chunk_size))
    lines = compare(peer, blob)
    check_is_rich(lines)
    check_sharing(lines, min_chunk_size)
    assert sum(line.get("hidden", False) for line in lines) == (3 if how == "lossless" else 1)  # build drops duplicates


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_blobs_by_go_in_parallel_parts(workers: int, level: int, peer: Path, blob: Path) -> None:
    go_blob(peer, rich_tar(4096) + END, blob, "build", "-workers", workers, "-level", level)
    check_is_rich(compare(peer, blob))


PRIORITIZED = ["hardest", "/sizes/20000", "./d/empty", "h\u00e9/\u2603", "soft", "char"]


@pytest.mark.parametrize("min_chunk_size", [0, 50_000])
@pytest.mark.parametrize("missing", [[], ["not/there"]])
def test_prioritized_blobs_by_go(min_chunk_size: int, missing: list[str], peer: Path, blob: Path) -> None:
    wanted = blob.with_suffix(".list")
    wanted.write_text("".join(f"{name}\n" for name in PRIORITIZED + missing))
    # Parents of what is prioritized must have entries of their own.
    tar = other(b"sizes/", b"5") + other(b"h\xc3\xa9/", b"5") + rich_tar(4096) + END
    options = ["-prioritized", wanted, "-min-chunk-size", min_chunk_size, *(["-allow-missing"] if missing else [])]
    made = go_blob(peer, tar, blob, "build", *options)
    assert made.get("missed", []) == missing
    lines = compare(peer, blob)
    names = [line["name"] for line in lines]
    landmark = names.index(".prefetch.landmark")
    parents_and_targets = {"", "d", "d/file", "hard", "harder", "sizes", "h\u00e9"}
    assert set(names[:landmark]) == {*map(clean, PRIORITIZED), *parents_and_targets}
    assert chunks(lines[landmark])[0]["inner_offset"] == 0  # it begins a member, whatever shares members


def test_a_prioritized_path_that_is_missing(peer: Path, blob: Path) -> None:
    (blob.with_suffix(".list")).write_text("not/there\n")
    (blob.with_suffix(".tar")).write_bytes(rich_tar(4096) + END)
    command = [peer, "blob", "-how", "build", "-prioritized", blob.with_suffix(".list"), blob.with_suffix(".tar"), blob]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "not/there" in done.stderr


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_legacy_blobs(chunk_size: int, peer: Path, blob: Path) -> None:
    """The 47-byte footer of CRFS, whose chunks have no digests of their own."""
    go_blob(peer, rich_tar(chunk_size) + END, blob, "legacy", "-chunk-size", chunk_size)
    lines = compare(peer, blob)
    check_is_rich(lines)
    assert not any(chunk["stated"] for line in lines for chunk in chunks(line))
    with estargz.open(blob) as ours:
        assert (ours.footer.format, ours.footer.size) == ("legacy", 47)


def test_external_tables_are_refused(peer: Path, blob: Path) -> None:
    toc = blob.with_suffix(".toc")
    go_blob(peer, rich_tar(4096) + END, blob, "external", "-toc", toc)
    check_is_rich([json.loads(line) for line in run(peer, "read", "-toc", toc, blob).splitlines()])
    with pytest.raises(estargz.BlobError, match="keeps its TOC in another image"):
        estargz.open(blob)


def test_zstd_chunked_is_refused(peer: Path, blob: Path) -> None:
    go_blob(peer, rich_tar(4096) + END, blob, "zstd")
    check_is_rich([json.loads(line) for line in run(peer, "read", blob).splitlines()])
    with pytest.raises(estargz.BlobError, match=re.escape(str(blob)) + ".*zstd"):
        estargz.open(blob)


# ------------------------------------------------------------------------------------------------- made here


@pytest.mark.parametrize(("chunk_size", "min_chunk_size"), BOTH_SIZES)
def test_blobs_by_this_package(chunk_size: int, min_chunk_size: int, peer: Path, blob: Path) -> None:
    tar = blob.with_suffix(".tar")
    tar.write_bytes(rich_tar(chunk_size) + END)
    level = (0, 1, 6, 9, 12)[(CHUNK_SIZES.index(chunk_size) + MIN_CHUNK_SIZES.index(min_chunk_size)) % 5]
    estargz.build(tar, blob, level=level, chunk_size=chunk_size, min_chunk_size=min_chunk_size)
    lines = compare(peer, blob)
    check_is_rich(lines)
    check_sharing(lines, min_chunk_size)


# ------------------------------------------------------------------------------------------------- of trees


def fill(tree: Tree, chunk_size: int) -> None:
    """What a directory can hold of the above; all of it needs root."""
    tree.dir("d", mode=0o1777, owner=(7, 8))
    tree.file("d/file", content(chunk_size + 1), owner=(7, 8))
    tree.file("d/empty", b"", mode=0o4755)
    tree.file("d/capable", content(600), capability=CAPABILITY)
    tree.link("d/z-link", "d/file")
    tree.link("hard", "d/file")
    tree.symlink("soft", "../anywhere")
    tree.link("hard-soft", "soft")
    tree.char("char", 5, 1)
    tree.block("block", 259, 70_000)
    tree.link("hard-block", "block")
    tree.fifo("fifo")
    tree.file("h\u00e9/\u2603", b"snow")
    tree.file("bad/\udcff", b"no UTF-8")
    tree.file("/".join(["directory-of-some-length"] * 12) + "/leaf", b"long")
    tree.file("n" * 255, content(chunk_size), owner=(3_000_000_000, 2_097_152))
    tree.file("before-1970", b"x", time=-1000 * 10**9)


@pytest.fixture
def pair(scratch: Path) -> tuple[Path, Path]:
    """A full tree, and one to compare it with that has been changed."""
    lower, upper = Tree(scratch / "lower"), Tree(scratch / "upper")
    for tree in (lower, upper):
        fill(tree, 4 << 20)
    lower.file("d/gone", b"whiteout")
    lower.file("replaced", b"by a directory")
    upper.file("replaced/inside", content(600))
    lower.file("gone/with/all", b"of it")
    for name in ("d/file", "char"):
        upper.meta(name, mode=0o600)
    upper.meta("fifo", mode=0o777)
    return lower.root, upper.root


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("compared", [False, True])
@pytest.mark.parametrize("maker", ["buildkit", "ours", "ours with shared members"])
def test_blobs_of_trees(maker: str, compared: bool, pair: tuple[Path, Path], peer: Path, blob: Path) -> None:
    lower, upper = pair
    if maker == "buildkit":
        report(peer, "blob", "-how", "buildkit", *(["-lower", lower] if compared else []), upper, blob)
    else:
        shared = {"min_chunk_size": 50_000} if maker != "ours" else {}
        estargz.build(upper, blob, lower=lower if compared else None, **shared)
    lines = {line["name"]: line for line in compare(peer, blob)}
    if compared:
        assert {".wh.gone", "d/.wh.gone", "replaced/inside"} <= lines.keys()
        assert "n" * 255 not in lines
    else:
        assert {"reg", "dir", "symlink", "hardlink", "char", "block", "fifo"} == {e["type"] for e in lines.values()}
        assert lines["d/capable"]["xattrs"].keys() == {"security.capability"}
        assert lines["bad/\ufffd"]["digest"] == sha256(b"no UTF-8")
    assert lines["hard"]["target"] == "d/file"
    assert len(chunks(lines["d/file"])) == 2
