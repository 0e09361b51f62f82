"""Layers applied to directories, compared with what GNU tar, umoci and a plain model make of them."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from applied import COMMAND, END, TIME, Found, command, hardlink, item, snapshot, symlink, tar, without_times
from conftest import IS_ROOT, missing
from reference.applied import Node, Tree, apply
from reference.blobs import footer, tar_of
from registry import registry
from tars import nothing_leaks
from trees import CAPABILITY, RandomTree
from trees import Tree as Folder

import estargz
from estargz import (
    BlobError,
    Extracted,
    SinkError,
    SourceError,
    TarError,
    UsageError,
    VerificationError,
    extract,
)

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def gnu_tar(*arguments: object, **options: Any) -> None:
    if shutil.which("tar") is None:
        missing("GNU tar is not installed")
    done = subprocess.run(["tar", "--numeric-owner", *map(str, arguments)], capture_output=True, check=False, **options)
    assert done.returncode == 0, done.stderr


def archived(folder: Path, archive: Path, form: str = "pax") -> Path:
    xattrs = ["--xattrs", "--xattrs-include=*"] if form == "pax" else []
    gnu_tar("-c", f"--format={form}", *xattrs, "-f", archive, "-C", folder, ".")
    return archive


def by_gnu_tar(archive: Path, folder: Path) -> dict[bytes, Found]:
    folder.mkdir()
    gnu_tar("-xp", "--xattrs", "--xattrs-include=*", "-f", archive, "-C", folder)
    return snapshot(folder)


def nasty(folder: Path) -> None:
    """Every type, and every kind of metadata that gets lost."""
    tree = Folder(folder)
    tree.file("plain", b"content\n" * 1000)
    tree.file("empty", b"")
    tree.file("large", random.Random(1).randbytes(3_000_001))
    tree.file("unreadable", mode=0)
    tree.file("old", time=-5_000_000_001)
    tree.file(os.fsdecode(b"raw \xff\xfe\n\\name"), b"raw")
    tree.file("l" * 255, b"long")
    tree.file("/".join(["d" * 60] * 8) + "/leaf", b"deep")
    tree.dir("sticky", mode=0o1777)
    tree.file("sticky/inside")
    tree.dir("closed", mode=0o700)
    tree.file("closed/inside")
    tree.symlink("dangling", "nowhere/at all")
    tree.symlink("absolute", "/etc/passwd", time=1_234_567_890_123_456_789)
    tree.symlink("folder", "sticky")
    tree.fifo("fifo")
    tree.link("sticky/other name", "plain")
    tree.link("closed/third name", "plain")
    tree.link("another link", "dangling")
    os.setxattr(folder / "plain", "user.note", b"\0\xff binary")
    os.setxattr(folder / "sticky", "user.folder", b"yes")
    if IS_ROOT:
        tree.file("setuid", mode=0o6755, owner=(1234, 2345))
        tree.file("owned", mode=0o664, owner=(3_000_000, 5))
        tree.file("capable", b"#!", mode=0o755, capability=CAPABILITY, owner=(1, 2))
        tree.dir("group", mode=0o2775, owner=(0, 42))
        tree.file("group/inside", owner=(7, 8))
        tree.symlink("owned link", "x", owner=(9, 10))
        tree.char("null", 1, 3, owner=(1, 1))
        tree.block("disk", 8, 1)
        os.setxattr(folder / "dangling", "trusted.on a link", b"1", follow_symlinks=False)
        os.setxattr(folder / "group", "trusted.one", b"2")
        tree.dir("none", mode=0)
    for name in ("group", "sticky", "closed", "."):
        if (folder / name).exists():
            os.utime(folder / name, ns=(1, 1_500_000_000_987_654_321))


# ---------------------------------------------------------------------------------------- as GNU tar does


@pytest.mark.parametrize("form", ["pax", "gnu"])
def test_a_nasty_tree(scratch: Path, form: str, threads: int) -> None:
    nasty(scratch / "tree")
    archive = archived(scratch / "tree", scratch / "a.tar", form)
    done = extract(archive, scratch / "ours", threads=threads)
    assert snapshot(scratch / "ours") == by_gnu_tar(archive, scratch / "theirs")
    assert done.skipped == ()
    assert done.bytes > 3_000_000
    if form == "pax":
        assert snapshot(scratch / "ours") == snapshot(scratch / "tree")


@pytest.mark.parametrize("seed", range(6))
def test_random_trees(scratch: Path, seed: int, threads: int) -> None:
    tree = RandomTree(scratch / "tree", random.Random(seed), as_root=IS_ROOT)
    for _ in range(120):
        tree.add()
    for name in tree.paths():
        if "/.wh." in f"/{name}" or stat.S_ISSOCK((scratch / "tree" / name).lstat().st_mode):
            with contextlib.suppress(FileNotFoundError):  # gone with what it was in
                tree.tree.remove(name)
    archive = archived(scratch / "tree", scratch / "a.tar")
    extract(archive, scratch / "ours", threads=threads)
    assert snapshot(scratch / "ours") == by_gnu_tar(archive, scratch / "theirs")


def pack_gzip(path: Path, to: Path) -> None:
    to.write_bytes(gzip.compress(path.read_bytes(), 1))


def pack_zstd(path: Path, to: Path) -> None:
    to.write_bytes(zstandard.ZstdCompressor(level=1).compress(path.read_bytes()))


def pack_estargz(path: Path, to: Path) -> None:
    estargz.build(path, to)


def pack_members(path: Path, to: Path) -> None:
    estargz.build(path, to, min_chunk_size=1 << 16, chunk_size=50_000)


@pytest.mark.parametrize("pack", [shutil.copyfile, pack_gzip, pack_zstd, pack_estargz, pack_members])
def test_every_kind_of_layer(scratch: Path, pack: Callable[[Path, Path], object]) -> None:
    nasty(scratch / "tree")
    pack(archived(scratch / "tree", scratch / "a.tar"), scratch / "layer")
    extract(scratch / "layer", scratch / "ours")
    assert snapshot(scratch / "ours") == snapshot(scratch / "tree")


@pytest.mark.parametrize("mask", [0, 0o022, 0o077, 0o777])
def test_the_umask_does_not_matter(scratch: Path, mask: int) -> None:
    nasty(scratch / "tree")
    archive = archived(scratch / "tree", scratch / "a.tar")
    before = os.umask(mask)
    try:
        extract(archive, scratch / "ours")
        extract(tar(item("a/b", b"x")), scratch / "implied")
    finally:
        os.umask(before)
    assert snapshot(scratch / "ours") == snapshot(scratch / "tree")
    modes = {name: entry.mode for name, entry in snapshot(scratch / "implied").items()}
    assert modes == {b"": 0o755, b"a": 0o755, b"a/b": 0o644}


@pytest.mark.parametrize("inherit", ["set-gid", "access list"])
def test_what_a_directory_hands_down_does_not_matter(root: None, scratch: Path, inherit: str) -> None:
    nasty(scratch / "tree")
    archive = archived(scratch / "tree", scratch / "a.tar")
    (scratch / "ours").mkdir()
    if inherit == "set-gid":
        os.chown(scratch / "ours", 0, 77)
        (scratch / "ours").chmod(0o2775)
    else:
        if shutil.which("setfacl") is None:
            missing("setfacl is not installed")
        subprocess.run(["setfacl", "-d", "-m", "u:77:rwx,m::rwx,o::rwx", scratch / "ours"], check=True)
    extract(archive, scratch / "ours")
    # GNU tar leaves a handed down access list in place; modes, owners and groups are the archive's in both.
    plain = {name: entry._replace(xattrs=()) for name, entry in snapshot(scratch / "ours").items()}
    assert plain == {name: entry._replace(xattrs=()) for name, entry in snapshot(scratch / "tree").items()}


def test_the_same_with_any_number_of_threads_and_any_reads(scratch: Path) -> None:
    chance = random.Random(5)
    items = [item(f"d{i % 40}/f{i}", chance.randbytes(chance.choice([0, 1, 511, 5000, 300_000]))) for i in range(400)]
    archive = tar(*items)
    seen = []
    for count, memory, size in ((1, None, 1 << 20), (2, 1, 1000), (8, None, 65537), (3, 1 << 30, 513)):
        target = scratch / f"t{count}"
        extract(Dribble(archive, size), target, threads=count, memory=memory)
        seen.append(snapshot(target))
    assert all(one == seen[0] for one in seen)
    assert seen[0][b"d3"].mtime_ns == 0  # no entry states it


class Dribble(io.RawIOBase):
    """A pipe that gives a few bytes at a time."""

    def __init__(self, data: bytes, size: int) -> None:
        self._left = io.BytesIO(data)
        self._size = size

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self._left.read(min(size, self._size) if size >= 0 else self._size)


# ---------------------------------------------------------------------------------------- layers


NAMES = ["a", "b", "c", "a/b", "a/b/c", "a/c", "b/a", "b/a/c", "b/a/c/a"]


def random_layer(tree: Tree, chance: random.Random) -> list[tuple[str, Node]]:
    """Entries that make sense over a tree, which they change."""
    layer: list[tuple[str, Node]] = []
    upper = dict(tree)
    for number in range(chance.randrange(1, 25)):
        path = chance.choice(NAMES)
        folder, _, name = path.rpartition("/")
        above = [upper.get(part) for part in _above(path)]
        if any(node is not None and node.kind != "dir" for node in above):
            continue
        kind = chance.choice(
            ["reg", "reg", "reg", "dir", "dir", "symlink", "hardlink", "fifo", "hide", "hide", "opaque"]
        )
        if kind == "hide":
            entry = (f"{folder}/.wh.{name}".lstrip("/"), Node("reg"))
        elif kind == "opaque":
            entry = (f"{path}/.wh..wh..opq", Node("reg"))
            if upper.get(path) is None or upper[path].kind != "dir":
                continue
        elif kind == "hardlink":
            targets = [name for name, node in upper.items() if node.kind in ("reg", "symlink", "fifo")]
            targets = [name for name in targets if not name.startswith(f"{path}/") and name != path]
            if not targets:
                continue
            entry = (path, Node("hardlink", link=chance.choice(targets)))
        else:
            data = b"%d " % number * chance.choice([1, 100, 100_000]) if kind == "reg" else b""
            entry = (
                path,
                Node(
                    kind,
                    mode=0o777 if kind == "symlink" else chance.choice([0o644, 0o755, 0o2711, 0o700]),
                    mtime_ns=(TIME + number) * 10**9 + chance.choice([0, 5]),
                    data=data,
                    link=f"to {number}" if kind == "symlink" else "",
                    xattrs={"user.n": b"%d" % number} if kind in ("reg", "dir") and chance.random() < 0.3 else {},
                ),
            )
        layer.append(entry)
        upper = dict(tree)
        apply(upper, layer)
    return layer


def _above(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def layer_tar(layer: list[tuple[str, Node]]) -> bytes:
    items = []
    for path, node in layer:
        seconds, nanoseconds = divmod(node.mtime_ns, 10**9)
        xattrs = {os.fsencode(key): value for key, value in node.xattrs.items()}
        meta = {"mode": node.mode, "mtime_s": seconds, "mtime_ns": nanoseconds, "xattrs": xattrs}
        items.append(item(path + "/" * (node.kind == "dir"), node.data, node.kind, node.link, **meta))
    return tar(*items)


def model_snapshot(tree: Tree) -> dict[bytes, tuple[Any, ...]]:
    kinds = {"reg": stat.S_IFREG, "dir": stat.S_IFDIR, "symlink": stat.S_IFLNK, "fifo": stat.S_IFIFO}
    firsts: dict[int, str] = {}
    seen = {}
    for path in sorted(tree, key=os.fsencode):
        node = tree[path]
        regular = node.kind == "reg"
        seen[os.fsencode(path)] = (
            kinds[node.kind],
            node.mode,
            node.mtime_ns,
            hashlib.sha256(node.data).hexdigest() if regular else "",
            os.fsencode(node.link) if node.kind == "symlink" else b"",
            tuple(sorted(node.xattrs.items())),
            firsts.setdefault(id(node), path),
        )
    return {name: (*entry[:-1], os.fsencode(entry[-1])) for name, entry in seen.items()}


def reduced(entries: dict[bytes, Found]) -> dict[bytes, tuple[Any, ...]]:
    """A snapshot as model_snapshot gives it. The first name of an inode is the first in order."""
    firsts: dict[bytes, bytes] = {}
    seen = {}
    for name in sorted(entries):
        if name:
            entry = entries[name]
            first = firsts.setdefault(entry.first, name)
            seen[name] = (entry.kind, entry.mode, entry.mtime_ns, entry.content, entry.link, entry.xattrs, first)
    return seen


@pytest.mark.parametrize("seed", range(60))
def test_random_layers_are_as_the_model(scratch: Path, seed: int) -> None:
    chance = random.Random(seed)
    tree: Tree = {}
    layers = []
    for _ in range(chance.randrange(2, 6)):
        layer = random_layer(tree, chance)
        apply(tree, layer)
        layers.append(layer_tar(layer))
    extract(layers, scratch / "at once", threads=chance.choice([1, 2, 4]))
    assert reduced(snapshot(scratch / "at once")) == model_snapshot(tree)
    for layer in layers:
        extract(layer, scratch / "one by one")
    # A later call does not know what earlier ones have stated of a directory's time.
    now = {name for name, entry in snapshot(scratch / "one by one").items() if entry.kind == stat.S_IFDIR}
    assert without_times(snapshot(scratch / "one by one"), *now) == without_times(snapshot(scratch / "at once"), *now)


def image_of(folder: Path, layers: list[bytes]) -> str:
    """An OCI layout whose one image has these layers."""
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def blob(data: bytes, kind: str) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": len(data)}

    tars = [blob(layer, "layer.v1.tar") for layer in layers]
    config = {
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [one["digest"] for one in tars]},
        "config": {},
    }
    described = blob(json.dumps(config).encode(), "config.v1+json")
    manifest = blob(json.dumps({"schemaVersion": 2, "config": described, "layers": tars}).encode(), "manifest.v1+json")
    manifest["annotations"] = {"org.opencontainers.image.ref.name": "it"}
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [manifest]}))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return f"{folder}:it"


def by_umoci(scratch: Path, layers: list[bytes]) -> dict[bytes, Found]:
    if shutil.which("umoci") is None:
        missing("umoci is not installed")
    image = image_of(scratch / "image", layers)
    unpack = ["umoci", "raw", "unpack", "--image", image, str(scratch / "umoci")]
    done = subprocess.run(unpack, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return snapshot(scratch / "umoci")


@pytest.mark.parametrize("seed", range(12))
def test_random_layers_are_as_umoci_makes_them(root: None, scratch: Path, seed: int) -> None:
    chance = random.Random(1000 + seed)
    tree: Tree = {}
    layers = []
    for _ in range(4):
        layer = random_layer(tree, chance)
        apply(tree, layer)
        layers.append(layer_tar(layer))
    extract(layers, scratch / "ours")
    theirs = by_umoci(scratch, layers)
    ours = snapshot(scratch / "ours")
    # umoci does not always restore the time of a directory that it removes something from.
    folders = [name for name, entry in ours.items() if entry.kind == stat.S_IFDIR]
    assert reduced(without_times(ours, *folders)) == reduced(without_times(theirs, *folders))


# ---------------------------------------------------------------------------------------- what replaces what


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_later_entries_replace_earlier_ones(scratch: Path, threads: int) -> None:
    """Thousands of times, while the earlier ones may still be under way."""
    made = {
        "file": item("x", b"file" * 1000),
        "large": item("x", b"large" * 200_000),
        "dir": item("x/") + item("x/inside", b"1") + item("x/deep/inside", b"2"),
        "symlink": symlink("x", "y"),
        "fifo": item("x", kind="fifo"),
        "hardlink": hardlink("x", "y"),
    }
    chance = random.Random(7)
    for last in made:
        order = [chance.choice(list(made)) for _ in range(60)] + [last]
        folder = scratch / last
        extract(tar(item("y", b"target"), *(made[kind] for kind in order)), folder, threads=threads)
        found = snapshot(folder)[b"x"]
        kind = {"dir": stat.S_IFDIR, "symlink": stat.S_IFLNK, "fifo": stat.S_IFIFO}.get(last, stat.S_IFREG)
        assert found.kind == kind
        if last == "dir":
            assert names(folder / "x") == ["deep", "deep/inside", "inside"]
        if last == "hardlink":
            assert found.first == b"x"
            assert snapshot(folder)[b"y"].first == b"x"
        if kind == stat.S_IFREG:
            wanted = {"file": b"file" * 1000, "large": b"large" * 200_000, "hardlink": b"target"}[last]
            assert (folder / "x").read_bytes() == wanted


def test_what_was_there_is_replaced_without_being_touched(scratch: Path) -> None:
    """Files are made anew, so other names of the old ones keep their content."""
    (scratch / "there").mkdir()
    (scratch / "other").write_text("old")
    os.link(scratch / "other", scratch / "there" / "file")
    (scratch / "there" / "tree" / "in" / "side").mkdir(parents=True)
    (scratch / "there" / "link").symlink_to(scratch / "other")
    (scratch / "there" / "kept").write_text("kept")
    extract(tar(item("file", b"new"), item("tree", b"now a file"), item("link", b"no link")), scratch / "there")
    assert (scratch / "other").read_text() == "old"
    assert names(scratch / "there") == ["file", "kept", "link", "tree"]
    assert (scratch / "there" / "link").read_text() == "no link"


def test_a_directory_takes_new_metadata_and_keeps_its_entries(scratch: Path) -> None:
    xattrs = {b"user.old": b"1"} if IS_ROOT else {}
    lower = tar(item("d/", mode=0o700, xattrs=xattrs), item("d/lower", b"1"))
    upper = tar(item("d/", mode=0o751, mtime_s=5, xattrs={b"user.new": b"2"}), item("d/upper", b"2"))
    extract([lower, upper], scratch / "both")
    extract(lower, scratch / "each")
    extract(upper, scratch / "each")
    for folder in ("both", "each"):
        found = snapshot(scratch / folder)[b"d"]
        assert (found.mode, found.mtime_ns, found.xattrs) == (0o751, 5 * 10**9, (("user.new", b"2"),))
        assert names(scratch / folder / "d") == ["lower", "upper"]


def test_whiteouts(scratch: Path, threads: int) -> None:
    lower = tar(
        *(item(f"{folder}/{name}", b"lower") for folder in "abcd" for name in ("one", "two", "deep/three")),
        item("file", b"lower"),
    )
    upper = tar(
        item("a/.wh.one"),
        item("a/.wh.deep"),
        item("a/.wh.not there"),
        item("b/new", b"upper"),
        item("b/deep/new", b"upper"),
        item("b/.wh..wh..opq"),  # behind what the same layer puts there
        item("c/deep/new", b"upper"),
        item(".wh.c"),
        item(".wh.file"),
        item("d/two", b"upper"),
        item("d/.wh.two"),
        item("d/.wh..wh.plnk"),  # reserved, and nothing to anybody
        item("nowhere/at/.wh.all"),
        item("file/.wh.below a file"),
    )
    done = extract([lower, upper], scratch / "out", threads=threads)
    assert names(scratch / "out") == sorted(
        "a a/two b b/deep b/deep/new b/new c c/deep c/deep/new d d/deep d/deep/three d/one d/two".split()
    )
    assert (scratch / "out" / "d" / "two").read_text() == "upper"
    assert done.whiteouts == 9
    assert done.entries == 13 + 4


@pytest.mark.measured
def test_many_opaque_markers_and_whiteouts(scratch: Path) -> None:
    """Each costs little, however much of its own layer the directory holds by then."""
    lower = tar(*(item(f"d/e{i}/old", b"old") for i in range(20)), *(item(f"d/f{i}") for i in range(20)))

    def seconds(count: int) -> float:
        upper = []
        for i in range(count):
            upper += [hardlink(f"d/new{i}", "x"), item("d/.wh..wh..opq"), item(f"d/.wh.f{i}"), item(".wh.d")]
        out = scratch / f"{count}"
        started = time.process_time()
        done = extract([lower, tar(item("x"), item("d/e1/new"), *upper)], out, threads=2)
        spent = time.process_time() - started
        assert done.whiteouts == 3 * count
        assert len(names(out)) == 4 + count
        return spent

    assert seconds(16_000) < 10 * seconds(4000)  # 16 times as much would be to list the directory each time


def test_an_opaque_root_hides_what_was_there(scratch: Path) -> None:
    (scratch / "out").mkdir()
    (scratch / "out" / "old").write_text("old")
    extract(tar(item("new", b"new"), item(".wh..wh..opq")), scratch / "out")
    assert names(scratch / "out") == ["new"]


@pytest.mark.parametrize("name", [".wh.", ".wh..", ".wh...", "d/.wh...", "d/.wh./"])
def test_whiteouts_of_nothing_are_refused(scratch: Path, name: str) -> None:
    for folder in ("out", "other"):
        extract(tar(item("d/file", b"1")), scratch / folder)
    with pytest.raises(TarError, match=r"whiteout of no file \(at byte 0\)"):
        extract(tar(item(name)), scratch / "out")
    assert snapshot(scratch / "out") == snapshot(scratch / "other")


# ---------------------------------------------------------------------------------------- hard links


def test_hard_links(scratch: Path, threads: int) -> None:
    big = random.Random(3).randbytes(2_500_000)
    lower = tar(item("lower", b"lower"), symlink("link", "nowhere"))
    upper = tar(
        item("big", big),
        hardlink("d/big", "big"),
        hardlink("big2", "./d/../d/big"),
        item("small", b"s"),
        hardlink("small2", "/small"),
        hardlink("small2", "small2"),  # itself
        hardlink("small", "small2"),  # the same inode already
        hardlink("from below", "lower"),
        hardlink("link2", "link"),
        symlink("folder", "d"),
        hardlink("folder/through", "folder/big"),
    )
    extract([lower, upper], scratch / "out", threads=threads)
    found = snapshot(scratch / "out")
    groups: dict[bytes, list[bytes]] = {}
    for name, entry in found.items():
        groups.setdefault(entry.first, []).append(name)
    assert sorted(sorted(group) for group in groups.values() if len(group) > 1) == [
        [b"big", b"big2", b"d/big", b"d/through"],
        [b"from below", b"lower"],
        [b"link", b"link2"],
        [b"small", b"small2"],
    ]
    assert (scratch / "out" / "d" / "through").read_bytes() == big


@pytest.mark.parametrize(
    "items",
    [
        [hardlink("a", "missing")],
        [hardlink("a", "d/missing"), item("d/x")],
        [hardlink("a", "a")],
        [hardlink("a", "/")],
        [item("b"), item(".wh.b"), hardlink("a", "c")],
    ],
)
def test_a_hard_link_to_nothing_names_both(scratch: Path, items: list[bytes]) -> None:
    with pytest.raises(TarError, match=r"blob: a -> .*the hard link's target is not there \(at byte \d+\)"):
        extract(tar(*items), scratch / "out")
    assert not (scratch / "out").exists()


def test_a_hard_link_in_the_place_of_its_targets_directory(scratch: Path) -> None:
    with pytest.raises(SinkError, match="d -> d/file: the hard link cannot be made"):
        extract(tar(item("d/file", b"1"), hardlink("d", "d/file")), scratch / "out")


def test_a_hard_link_to_a_directory(scratch: Path) -> None:
    with pytest.raises(SinkError, match="a -> d: the hard link cannot be made"):
        extract(tar(item("d/"), hardlink("a", "d")), scratch / "out")


# ---------------------------------------------------------------------------------------- what counts


LANDMARKS = [
    item(".no.prefetch.landmark", b"\x0f"),
    item(".prefetch.landmark", b"\x0f"),
    item("stargz.index.json", b"{}"),
]


def test_the_formats_own_files_are_left_out_of_a_blob_only(scratch: Path) -> None:
    inner = tar(*LANDMARKS[:2], item("d/.no.prefetch.landmark", b"kept"), item("file", b"1"))
    estargz.build(io.BytesIO(inner), scratch / "blob")
    extract(scratch / "blob", scratch / "of a blob")
    assert names(scratch / "of a blob") == ["d", "d/.no.prefetch.landmark", "file"]
    extract(inner, scratch / "of a tar")
    assert names(scratch / "of a tar") == sorted(
        [*names(scratch / "of a blob"), ".no.prefetch.landmark", ".prefetch.landmark"]
    )
    extract(tar(*LANDMARKS), scratch / "names")
    assert len(names(scratch / "names")) == 3
    with open(scratch / "blob", "rb") as blob:
        extract(Dribble(blob.read(), 1 << 16), scratch / "of a pipe")
    assert snapshot(scratch / "of a pipe") == snapshot(scratch / "of a blob")


def test_pipes(scratch: Path) -> None:
    nasty(scratch / "tree")
    estargz.build(archived(scratch / "tree", scratch / "a.tar"), scratch / "blob")
    wanted = snapshot(scratch / "tree")
    os.mkfifo(scratch / "pipe")
    feeder = subprocess.Popen(["sh", "-c", 'cat "$1" > "$2"', "-", scratch / "blob", scratch / "pipe"])
    extract(scratch / "pipe", scratch / "by name")
    assert feeder.wait() == 0
    assert snapshot(scratch / "by name") == wanted
    with open(scratch / "a.tar", "rb") as file:
        done = subprocess.run([*COMMAND, "extract", "-", str(scratch / "by stdin")], stdin=file, check=False)
    assert done.returncode == 0
    assert snapshot(scratch / "by stdin") == wanted
    with subprocess.Popen(["cat", scratch / "blob"], stdout=subprocess.PIPE) as cat:
        done = subprocess.run([*COMMAND, "extract", "-", str(scratch / "by pipe")], stdin=cat.stdout, check=False)
        assert done.returncode == 0
    assert snapshot(scratch / "by pipe") == wanted


def test_only_some_paths(scratch: Path) -> None:
    layers = [
        tar(
            item("a/", mode=0o751),
            item("a/b/", mode=0o711),
            item("a/b/c", b"1"),
            item("a/bc", b"2"),
            item("d/e/f", b"3"),
            item("d/e/g", b"4"),
            hardlink("a/b/h", "a/b/c"),
        ),
        tar(item("a/b/.wh.c"), item(".wh.d"), item("a/b/i", b"5")),
    ]
    done = extract(layers, scratch / "one", paths=["/a/./b/"])
    assert names(scratch / "one") == ["a", "a/b", "a/b/h", "a/b/i"]
    assert {name: entry.mode for name, entry in snapshot(scratch / "one").items()}[b"a"] == 0o751
    assert (done.entries, done.files, done.bytes, done.whiteouts) == (5, 2, 2, 1)
    extract(layers[0], scratch / "two", paths=[b"a/bc", "d/e/f"])
    assert names(scratch / "two") == ["a", "a/bc", "d", "d/e", "d/e/f"]
    extract(layers[0], scratch / "all", paths=["d", "."])
    assert len(names(scratch / "all")) == 9
    with pytest.raises(UsageError, match="'a/x' is in none of the layers"):
        extract(layers, scratch / "none", paths=["a/b", "a/x"])
    with pytest.raises(
        UsageError, match=r"a/b/h -> a/b/c: the hard link's target is not selected .*select that path too"
    ):
        extract(layers[0], scratch / "none", paths=["a/b/h"])
    assert not (scratch / "none").exists()


def test_limits(scratch: Path) -> None:
    archive = tar(item("a", b"12345"), item("d/b", b"678"), item("c", b"9"))
    assert extract(archive, scratch / "fits", max_size=9, max_entries=4).bytes == 9
    with pytest.raises(SourceError, match=r"c: goes beyond the size allowed \(at byte 2048\); raise --max-size"):
        extract(archive, scratch / "size", max_size=8)
    with pytest.raises(SourceError, match="c: goes beyond the number of entries allowed"):
        extract(archive, scratch / "entries", max_entries=3)
    # Not what a header states is written, but what is there.
    lying = item("a", b"", size=1 << 60) + bytes(5000)
    with pytest.raises(TarError, match="a: the tar stream ends too early"):
        extract(lying, scratch / "lying")
    with pytest.raises(SourceError, match="a: goes beyond the size allowed"):
        extract(lying, scratch / "lying", max_size=1 << 40)
    many = item("/".join(["d"] * 900) + "/x", b"1") + END
    with pytest.raises(SourceError, match="goes beyond the number of entries allowed"):
        extract(many, scratch / "parents", max_entries=800)
    assert names(scratch) == sorted(["fits", *(f"fits/{name}" for name in names(scratch / "fits"))])


def test_diff_ids(scratch: Path) -> None:
    archive = tar(item("a", b"1"))
    layer = estargz.build(io.BytesIO(archive), scratch / "blob")
    plain = "sha256:" + hashlib.sha256(archive).hexdigest()
    done = extract([archive, scratch / "blob"], scratch / "out", diff_ids=[plain, layer.diff_id])
    assert done.entries == 2
    extract(Dribble((scratch / "blob").read_bytes(), 999), scratch / "pipe", diff_ids=[layer.diff_id])
    with pytest.raises(VerificationError, match=f"blob: DiffID: expected {plain}, found {layer.diff_id}"):
        extract(scratch / "blob", scratch / "wrong", diff_ids=[plain])
    assert not (scratch / "wrong").exists()
    for wrong in ([], [plain, plain], plain, ["sha256:0"]):
        with pytest.raises(UsageError):
            extract(archive, scratch / "wrong", diff_ids=wrong)


@pytest.mark.parametrize("options", [{"threads": 0}, {"memory": 0}, {"max_size": -1}, {"paths": []}, {"paths": "a"}])
def test_options_that_make_no_sense(scratch: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        extract(tar(), scratch / "out", **options)
    assert not (scratch / "out").exists()


@pytest.mark.parametrize("source", [b"", b"neither", bytes(100), b"x" * 5000])
def test_what_is_no_layer(scratch: Path, source: bytes) -> None:
    for layer in (source, Dribble(source, 10)):
        with pytest.raises(BlobError, match="neither a compressed layer nor a tar"):
            extract(layer, scratch / "out")
    assert not (scratch / "out").exists()


def test_an_empty_layer(scratch: Path) -> None:
    assert extract(tar(), scratch / "out") == Extracted(0, 0, 0, 0)
    assert names(scratch / "out") == []


# ---------------------------------------------------------------------------------------- without rights


def as_nobody(*arguments: object) -> subprocess.CompletedProcess[str]:
    """A command by somebody who is not root."""
    if IS_ROOT and shutil.which("setpriv") is None:
        missing("setpriv is not installed")
    rights = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if IS_ROOT else []
    done = subprocess.run([*rights, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode == 126:
        missing(f"others may not run {arguments[0]}")
    return done


def test_without_rights(scratch: Path) -> None:
    uid = 65534 if IS_ROOT else os.getuid()
    gid = 65534 if IS_ROOT else os.getgid()
    attributes = {b"user.a": b"1", b"trusted.b": b"2", b"security.capability": CAPABILITY}
    (scratch / "layer").write_bytes(
        tar(
            item("closed/", mode=0o555),
            item("closed/none/", mode=0),
            item("closed/none/file", b"1", mode=0o400, uid=1, gid=2),
            item("closed/none/attributes", b"2", xattrs=attributes),
            item("setuid", b"3", mode=0o6755, uid=uid, gid=gid),
            item("not setuid", b"3", mode=0o6755, uid=0, gid=gid + 1),
            item("null", kind="char", dev_major=1, dev_minor=3),
            item("fifo", kind="fifo", mode=0o622),
            symlink("link", "x", uid=5),
            hardlink("fifo2", "fifo"),
        )
    )
    (scratch / "place").mkdir(mode=0o777)
    (scratch / "place").chmod(0o777)
    done = as_nobody(*COMMAND, "extract", scratch / "layer", scratch / "place" / "out")
    assert done.returncode == 0, done.stderr
    found = snapshot(scratch / "place" / "out")
    assert {entry.uid for entry in found.values()} == {uid}
    modes = {name: entry.mode for name, entry in found.items()}
    assert modes == {
        b"": 0o755,
        b"closed": 0o555,
        b"closed/none": 0,
        b"closed/none/attributes": 0o644,
        b"closed/none/file": 0o400,
        b"fifo": 0o622,
        b"fifo2": 0o622,
        b"link": 0o777,
        b"not setuid": 0o755,
        b"setuid": 0o6755,
    }
    assert {entry.mtime_ns for name, entry in found.items() if name} == {TIME * 10**9}
    assert found[b"closed/none/attributes"].xattrs == (("user.a", b"1"),)
    assert "null: left out: a device needs root" in done.stderr
    assert "closed/none/attributes: left out: the attribute trusted.b needs root" in done.stderr
    assert "closed/none/attributes: left out: the attribute security.capability needs root" in done.stderr
    # ... and the same once more over it, closed directories and all
    again = as_nobody(*COMMAND, "extract", scratch / "layer", scratch / "place" / "out")
    assert again.returncode == 0, again.stderr
    assert without_times(snapshot(scratch / "place" / "out"), b"") == without_times(found, b"")
    for name in (".wh.closed", "closed/.wh..wh..opq"):
        (scratch / "hide").write_bytes(tar(item("closed/", mode=0o555), item(name)))
        as_nobody(*COMMAND, "extract", scratch / "layer", scratch / "place" / "out")
        over = as_nobody(*COMMAND, "extract", scratch / "hide", scratch / "place" / "out")
        assert over.returncode == 0, over.stderr
        assert names(scratch / "place" / "out" / "closed") == []


def test_root_without_owners(root: None, scratch: Path) -> None:
    done = extract(
        tar(
            item("a", b"1", uid=7, gid=8, mode=0o6755),
            item("b", b"2", mode=0o4755),
            item("c", kind="block"),
            item("d", xattrs={b"trusted.x": b"1", b"user.y": b"2"}),
        ),
        scratch / "out",
        same_owner=False,
    )
    found = snapshot(scratch / "out")
    assert {name: (entry.mode, entry.uid, entry.gid) for name, entry in found.items() if name} == {
        b"a": (0o755, 0, 0),
        b"b": (0o4755, 0, 0),
        b"d": (0o644, 0, 0),
    }
    assert found[b"d"].xattrs == (("user.y", b"2"),)
    assert [path for path, _ in done.skipped] == ["c", "d"]


def test_attributes_that_a_symlink_cannot_have(scratch: Path) -> None:
    done = extract(tar(symlink("link", "x", xattrs={b"user.a": b"1"})), scratch / "out")
    assert done.skipped == (("link", "the attribute user.a is none that the file system keeps here"),)
    assert extract(tar(item("a", xattrs={b"user.a": b"1"})), scratch / "no", xattrs=False).skipped == ()
    assert snapshot(scratch / "no")[b"a"].xattrs == ()


@pytest.mark.parametrize("owner", [{"uid": -1}, {"gid": 1 << 32}, {"uid": (1 << 32) - 1}])
def test_owners_out_of_range(root: None, scratch: Path, owner: dict[str, int]) -> None:
    with pytest.raises(TarError, match="a: no system has the owner it states"):
        extract(tar(item("a", **owner)), scratch / "out")
    extract(tar(item("a", **owner)), scratch / "out", same_owner=False)


def test_devices_out_of_range(root: None, scratch: Path) -> None:
    with pytest.raises(TarError, match="a: no system has the device it states"):
        extract(tar(item("a", kind="char", dev_major=4096)), scratch / "out")


# ---------------------------------------------------------------------------------------- failures


CHANCE = random.Random(11)
GOOD = b"".join(item(f"d{i % 7}/f{i}", CHANCE.randbytes(CHANCE.choice([10, 40_000, 700_000]))) for i in range(60))


@pytest.mark.parametrize("cut", [512, 5000, 1_000_000, len(GOOD) - 1000])
def test_a_truncated_layer_leaves_nothing_half_made(scratch: Path, cut: int, threads: int) -> None:
    cut += 100  # never at the border of an entry
    messages = set()
    with nothing_leaks():
        for folder in ("new", "there"):
            if folder == "there":
                (scratch / folder).mkdir()
            with pytest.raises(TarError, match="ends too early") as raised:
                extract(GOOD[:cut], scratch / folder, threads=threads)
            messages.add(str(raised.value))
    assert len(messages) == 1
    assert not (scratch / "new").exists()
    extract(GOOD, scratch / "whole")
    whole, part = snapshot(scratch / "whole"), snapshot(scratch / "there")
    for name, entry in part.items():
        if entry.kind == stat.S_IFREG:
            assert entry == whole[name]
        elif name:
            assert (entry.mode, entry.mtime_ns) == (0o755, 0)


def checked_zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


@pytest.mark.parametrize("pack", [gzip.compress, checked_zstd])
def test_a_damaged_layer(scratch: Path, pack: Callable[[bytes], bytes]) -> None:
    blob = bytearray(pack(GOOD + END))
    blob[len(blob) // 2] ^= 0xFF
    with nothing_leaks(), pytest.raises(BlobError, match=r"layer: .* at byte \d+"):
        (scratch / "layer").write_bytes(blob)
        extract(scratch / "layer", scratch / "out")
    assert not (scratch / "out").exists()


def test_the_first_failure_counts(scratch: Path) -> None:
    """Whichever thread meets it."""
    long = "n" * 256
    items = [item(f"f{i}", b"x" * 1000) for i in range(300)]
    items[100] = item(f"d/{long}", b"first")
    items[200] = item(f"e/{long}", b"second")
    items[250] = hardlink("third", "missing")
    for threads in (1, 2, 4) * 3:
        with pytest.raises(SinkError, match=f"d/{long}: cannot be created .*File name too long"):
            extract(tar(*items), scratch / "out", threads=threads)


def test_a_file_where_a_directory_is_needed(scratch: Path) -> None:
    with pytest.raises(
        SinkError, match=r"a/b/c: the directory it belongs in cannot be reached \(at byte 1024\): Not a dir"
    ):
        extract(tar(item("a", b"file"), item("a/b/c", b"below it")), scratch / "out")


@pytest.fixture
def tiny_disk(root: None, tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB and few files."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m,nr_inodes=300", "tmpfs", disk]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_no_room(tiny_disk: Path, threads: int) -> None:
    (tiny_disk / "there").mkdir()
    for folder in ("new", "there"):
        with nothing_leaks(), pytest.raises(SinkError, match=r"blob: d\d/f\d+: .*No space left") as raised:
            extract(GOOD, tiny_disk / folder, threads=threads)
        assert raised.value.errno == 28
    assert not (tiny_disk / "new").exists()
    extract(GOOD, tiny_disk.parent / "whole")
    whole = snapshot(tiny_disk.parent / "whole")
    assert all(entry == whole[name] for name, entry in snapshot(tiny_disk / "there").items() if entry.content)
    shutil.rmtree(tiny_disk / "there")
    with pytest.raises(SinkError, match=r"f\d+: cannot be created .*No space left"):
        extract(tar(*(item(f"f{i}") for i in range(400))), tiny_disk / "new", threads=threads)
    assert not (tiny_disk / "new").exists()


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("there", [False, True])
def test_signals(scratch: Path, stop: signal.Signals, there: bool) -> None:
    out, reference = scratch / "out", scratch / "reference"
    extract(GOOD, reference)
    if there:
        out.mkdir()
    with subprocess.Popen(
        [*COMMAND, "extract", "-", out, "--quiet"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        process.stdin.write(GOOD + item("big", bytes(9_000_000))[:8_000_000])
        process.stdin.flush()
        until = time.monotonic() + 20
        while not (out / "big").exists() and time.monotonic() < until:
            time.sleep(0.01)
        assert (out / "big").exists()
        process.send_signal(stop)
        status = process.wait(timeout=20)
    assert status == (130 if stop == signal.SIGINT else 128 + stop)
    if there:
        assert not (out / "big").exists()
        whole = snapshot(reference)
        assert all(entry == whole[name] for name, entry in snapshot(out).items() if entry.content)
    else:
        assert not out.exists()


def test_a_progress_callback_that_fails(scratch: Path) -> None:
    def fail(done: int) -> None:
        raise RuntimeError("enough")

    class Slow(Dribble):
        def read(self, size: int = -1) -> bytes:
            time.sleep(0.05)
            return super().read(size)

    with nothing_leaks(), pytest.raises(RuntimeError, match="enough"):
        extract(Slow(GOOD + END, 1 << 20), scratch / "out", progress=fail)
    assert not (scratch / "out").exists()
    seen: list[int] = []
    extract(Slow(GOOD + END, 1 << 20), scratch / "out", progress=seen.append)
    assert seen == sorted(seen)
    assert 0 < seen[-1] <= len(GOOD + END)


def test_a_source_that_raises(scratch: Path) -> None:
    class Broken(Dribble):
        def read(self, size: int = -1) -> bytes:
            if self._left.tell() > 2_000_000:
                raise ConnectionError("gone")
            return super().read(size)

    with nothing_leaks(), pytest.raises(ConnectionError, match="gone"):
        extract(Broken(GOOD + END, 100_000), scratch / "out")
    assert not (scratch / "out").exists()


def test_a_target_that_cannot_be_made(scratch: Path) -> None:
    with pytest.raises(FileNotFoundError):
        extract(tar(), scratch / "no" / "parent")
    (scratch / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        extract(tar(), scratch / "file")


# ---------------------------------------------------------------------------------------- size


@pytest.fixture
def memory_disk() -> Iterator[Path]:
    """A directory that no disk slows down."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        pytest.skip("there is no file system in memory at /dev/shm")
    with tempfile.TemporaryDirectory(dir=shared) as made:
        yield Path(made)


def extracted_depth(folder: Path, depth: int) -> float:
    """Seconds of CPU for that many directories in each other, made and removed again."""
    deep = "/".join(["d"] * depth)
    started = time.process_time()
    extract(tar(item(f"{deep}/file", b"1"), item(f"{deep}/other", b"2")), folder, threads=2)
    spent = time.process_time() - started
    handle = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        inner = os.open("d", os.O_RDONLY, dir_fd=handle)
        os.close(handle)
        handle = inner
    assert sorted(os.listdir(handle)) == ["file", "other"]
    assert (os.fstat(handle).st_mtime_ns, stat.S_IMODE(os.fstat(handle).st_mode)) == (0, 0o755)
    os.close(handle)
    started = time.process_time()
    extract(tar(item("d", b"a file now")), folder)
    assert names(folder) == ["d"]
    return spent + time.process_time() - started


@pytest.mark.measured
def test_deep_trees(memory_disk: Path) -> None:
    """A hundred thousand directories in each other: no quadratic time, and few handles."""
    few = extracted_depth(memory_disk / "few", 20_000)
    many = extracted_depth(memory_disk / "many", 100_000)
    assert many < 12 * few  # 25 times as much would be quadratic


def test_many_directories_with_few_handles(scratch: Path, threads: int) -> None:
    chance = random.Random(2)
    places = [f"d{chance.randrange(30)}/d{chance.randrange(30)}/d{chance.randrange(30)}" for _ in range(2000)]
    large = [item(f"large{i}", b"x" * 300_000) for i in range(100)]
    archive = tar(*large, *(item(f"{place}/f{i}", b"%d" % i) for i, place in enumerate(places)))
    (scratch / "layer").write_bytes(archive)
    limited = ["prlimit", "--nofile=64", *COMMAND, "extract", scratch / "layer", scratch / "out", "--threads", threads]
    if shutil.which("prlimit") is None:
        missing("prlimit is not installed")
    done = subprocess.run(list(map(str, limited)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sum(path.stat().st_size for path in (scratch / "out").glob("large*")) == 30_000_000
    for i, place in enumerate(places):
        assert (scratch / "out" / place / f"f{i}").read_bytes() == b"%d" % i


# ---------------------------------------------------------------------------------------- the command


def test_the_command(scratch: Path) -> None:
    (scratch / "one").write_bytes(tar(item("a/b", b"12345"), item("c", b"6")))
    (scratch / "two").write_bytes(tar(item(".wh.c")))
    done = command(scratch / "one", scratch / "two", scratch / "out")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith("2 entries, 0.0 MB in ")
    assert names(scratch / "out") == ["a", "a/b"]
    assert command(scratch / "one", scratch / "part", "--path", "c", "--quiet").stderr == ""
    assert names(scratch / "part") == ["c"]
    refused = command(scratch / "one", scratch / "no", "--max-size", "5")
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"estargz: error: {scratch}/one: c: goes beyond the size allowed")
    assert not (scratch / "no").exists()
    digest = "sha256:" + hashlib.sha256((scratch / "one").read_bytes()).hexdigest()
    assert command(scratch / "one", scratch / "ok", "--diff-id", digest).returncode == 0
    assert command(scratch / "two", scratch / "no", "--diff-id", digest).returncode == 1
    assert command(scratch / "one", scratch / "no", "--path", "x").returncode == 2
    assert command(scratch / "one").returncode == 2
    assert command(scratch / "missing", scratch / "no").returncode == 1
    assert not (scratch / "no").exists()


# --- whatever way a layer comes


def test_a_footer_does_not_hide_what_follows(tmp_path: Path) -> None:
    """The same tree by path, by pipe and with a DiffID: the footer is anybody's word."""
    first, second = tar_of(("a", b"1"), end=False), tar_of(("b", b"2"))
    blob = gzip.compress(first) + gzip.compress(second)
    blob += footer(len(gzip.compress(first)))
    (tmp_path / "blob").write_bytes(blob)
    digest = "sha256:" + hashlib.sha256(first + second).hexdigest()
    estargz.extract(tmp_path / "blob", tmp_path / "path")
    estargz.extract(tmp_path / "blob", tmp_path / "digest", diff_ids=[digest])
    estargz.extract(io.BufferedReader(io.BytesIO(blob)), tmp_path / "pipe")
    for name in ("path", "digest", "pipe"):
        assert sorted(os.listdir(tmp_path / name)) == ["a", "b"]


def test_a_layer_behind_a_url(tmp_path: Path) -> None:
    if shutil.which("docker-registry") is None:
        missing("docker-registry is not installed")
    blob = io.BytesIO()
    layer = estargz.build(io.BytesIO(tar_of(("d/a", b"1" * 100_000))), blob)
    (tmp_path / "registry").mkdir()
    with registry(tmp_path / "registry") as server:
        server.push_blob("x", blob.getvalue(), layer.digest)
        url = f"http://{server.host}/v2/x/blobs/{layer.digest}"
        estargz.extract(url, tmp_path / "out", diff_ids=[layer.diff_id])
        code = "import sys; from estargz.cli import main; sys.exit(main())"
        subprocess.run([sys.executable, "-c", code, "extract", "--quiet", url, tmp_path / "cli"], check=True)
    for name in ("out", "cli"):
        assert (tmp_path / name / "d/a").read_bytes() == b"1" * 100_000


# --- only what was asked for


def placed_over(folder: Path, path: str | list[str], *layers: bytes) -> list[str]:
    """What a/keep and a/b/c, there before, become."""
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "keep").write_text("old")
    (folder / "a" / "b" / "c").write_text("old")
    extract([*layers, tar(item("x"))], folder, paths=[path, "x"] if isinstance(path, str) else [*path, "x"])
    (folder / "x").unlink()
    return names(folder)


def test_whiteouts_remove_nothing_that_was_not_asked_for(scratch: Path) -> None:
    opaque = tar(item("a/.wh..wh..opq"), item("a/b/new", b"1"))
    assert placed_over(scratch / "1", "a/b", opaque) == ["a", "a/b", "a/b/new", "a/keep"]
    late = tar(item("a/b/new", b"1"), item("a/.wh..wh..opq"))
    assert placed_over(scratch / "2", "a/b", late) == ["a", "a/b", "a/b/new", "a/keep"]
    assert placed_over(scratch / "3", "a/b", tar(item("a/b"), item(".wh.a"))) == ["a", "a/b", "a/keep"]
    some = ["a/b/c", "a/b/new"]
    assert placed_over(scratch / "4", some, tar(item("a/b/c"), item("a/b/new")), tar(item(".wh.a"))) == [
        "a",
        "a/b",
        "a/keep",
    ]
    root = tar(item(".wh..wh..opq"), item("a/b/new"))
    assert placed_over(scratch / "5", "a/b", root) == ["a", "a/b", "a/b/new", "a/keep"]
    assert placed_over(scratch / "6", "a/b", tar(item("a/b/c")), tar(item("a/.wh.b"))) == ["a", "a/keep"]


@pytest.mark.parametrize("above", [item("a", b"1"), symlink("a", "x"), hardlink("a", "x"), item("a", kind="fifo")])
def test_what_replaces_a_directory_that_was_not_asked_for(scratch: Path, above: bytes) -> None:
    """Of what it hides only the path asked for goes, as if all had been extracted and that alone kept."""
    assert placed_over(scratch / "out", "a/b", tar(item("a/b/c"), item("a/b/d")), tar(above)) == ["a", "a/keep"]


def test_a_whiteout_removes_nothing_behind_a_link_that_it_hides(scratch: Path) -> None:
    (scratch / "out" / "real" / "b").mkdir(parents=True)
    (scratch / "out" / "a").symlink_to("real")
    hidden = [tar(item("x"), item(".wh.a"))]
    with pytest.raises(UsageError, match="'a/b' is in none"):
        extract(hidden, scratch / "out", paths=["x", "a/b"])
    assert names(scratch / "out") == ["a", "real", "real/b", "x"]
    # ... but what is reached through a link in front of what is hidden goes
    (scratch / "out" / "real" / "b" / "c").write_text("old")
    with pytest.raises(UsageError, match="'a/b/c' is in none"):
        extract([tar(item("a/.wh.b"))], scratch / "out", paths=["a/b/c"])
    assert names(scratch / "out") == ["a", "real", "real/b", "x"]


# --- attributes, links, errors


def test_user_attributes_of_what_may_not_be_written(scratch: Path) -> None:
    attributes = {b"user.a": b"1", b"user.b": b"2"}
    (scratch / "layer").write_bytes(
        tar(
            item("file", b"1", mode=0o444, xattrs=attributes),
            item("none", b"2", mode=0, xattrs=attributes),
            item("large", bytes(3_000_000), mode=0o400, xattrs=attributes),
            item("folder/", mode=0o555, xattrs=attributes),
        )
    )
    (scratch / "place").mkdir()
    (scratch / "place").chmod(0o777)
    for mask in (0o022, 0o777):
        out = scratch / "place" / f"{mask:o}"
        before = os.umask(mask)
        try:
            done = as_nobody(*COMMAND, "extract", scratch / "layer", out)
        finally:
            os.umask(before)
        assert done.returncode == 0, done.stderr
        assert "left out" not in done.stderr
        entries = snapshot(out) if IS_ROOT else {}
        modes = {os.fsencode(entry.name): stat.S_IMODE(entry.lstat().st_mode) for entry in out.iterdir()}
        assert modes == {b"file": 0o444, b"none": 0, b"large": 0o400, b"folder": 0o555}
        for name in entries.keys() & modes.keys():
            assert entries[name].xattrs == (("user.a", b"1"), ("user.b", b"2"))


def test_all_attributes_of_a_directory_are_replaced(memory_disk: Path) -> None:
    folder = memory_disk / "out" / "a"
    folder.mkdir(parents=True)
    try:
        for number in range(60):
            os.setxattr(folder, f"user.{number:0240}", b"")
    except OSError as error:
        pytest.skip(f"the file system holds too few attributes: {error}")
    extract(tar(item("a/", xattrs={b"user.new": b"1"})), memory_disk / "out")
    assert os.listxattr(folder) == ["user.new"]


def test_links_on_the_way_are_bounded(scratch: Path) -> None:
    """The steps of all links together, so that no entry takes long."""
    winding = "d/../" * 800
    layer = [item("d/"), symlink("l0", "d")]
    layer += [symlink(f"l{number}", f"{winding}l{number - 1}") for number in range(1, 6)]
    extract(tar(*layer, item("l4/x", b"1")), scratch / "one")
    assert (scratch / "one" / "d" / "x").read_bytes() == b"1"
    with pytest.raises(SinkError, match=r"l5/x: .*(?i:too many levels of symbolic links)"):
        extract(tar(*layer, item("l5/x", b"1")), scratch / "two")


def test_a_directory_that_cannot_be_opened_is_not_removed(scratch: Path) -> None:
    if shutil.which("strace") is None:
        missing("strace is not installed")
    (scratch / "layer").write_bytes(tar(item("there/", mode=0o700)))
    run = [*COMMAND, "extract", "--threads", "1", scratch / "layer", scratch / "out"]
    (scratch / "out" / "there" / "keep").mkdir(parents=True)
    tracing = ["strace", "-e", "trace=openat", "-o", str(scratch / "trace")]
    subprocess.run([*tracing, *map(str, run)], check=True, capture_output=True)
    calls = [line for line in (scratch / "trace").read_text().splitlines() if line.startswith("openat(")]
    at = next(number for number, line in enumerate(calls, 1) if '"there"' in line)
    failing = [*tracing, "-e", f"inject=openat:error=EIO:when={at}"]
    done = subprocess.run([*failing, *map(str, run)], check=False, capture_output=True, text=True)
    assert '"there"' in next(line for line in (scratch / "trace").read_text().splitlines() if "INJECTED" in line)
    assert done.returncode == 1
    assert "there: " in done.stderr
    assert "Input/output error" in done.stderr
    assert names(scratch / "out") == ["there", "there/keep"]


# --- what is said of what was left out


def test_what_was_left_out_is_counted_and_the_first_of_it_named(scratch: Path) -> None:
    attributes = {b"trusted.%d" % number: b"" for number in range(30)}
    layer = tar(
        item("d/", xattrs=attributes),
        *(item(f"d/{number}", xattrs=attributes) for number in range(3000)),
        item("null", kind="char"),
    )
    wanted = None
    for threads in (1, 2, 5):
        done = extract(layer, scratch / f"{threads}", same_owner=False, threads=threads)
        assert done.skipped_count == 3001 * 30 + 1
        assert len(done.skipped) == 1000
        # Directories get theirs in the end, and come first all the same.
        assert [path for path, _ in done.skipped[::30]] == ["d", *(f"d/{number}" for number in range(33))]
        assert wanted in (None, done.skipped)
        wanted = done.skipped
    (scratch / "layer").write_bytes(layer)
    said = command(scratch / "layer", scratch / "cli", "--no-same-owner").stderr
    assert f"... and {3001 * 30 + 1 - 20} more left out" in said


def test_what_was_left_out_takes_little_memory(scratch: Path) -> None:
    """Long names of devices, and one entry with more attributes than are kept."""
    devices = [item(f"{number}/" + "/".join(["n" * 250] * 2000), kind="char") for number in range(5)]
    done = extract(tar(*devices), scratch / "devices", same_owner=False, max_entries=20_000)
    assert done.skipped_count == 5
    assert [path[:2] for path, _ in done.skipped] == ["0/", "1/"]
    many = {b"trusted.%d" % number: b"" for number in range(25_000)}
    done = extract(tar(item("a", xattrs=many)), scratch / "many", same_owner=False)
    assert (done.skipped_count, len(done.skipped)) == (25_000, 1000)


def test_devices_that_are_left_out_are_entries_all_the_same(scratch: Path) -> None:
    layer = tar(*(item(f"{number}", kind="block") for number in range(5)))
    assert extract(layer, scratch / "out", same_owner=False, max_entries=5).skipped_count == 5
    with pytest.raises(SourceError, match="4: goes beyond the number of entries allowed"):
        extract(layer, scratch / "no", same_owner=False, max_entries=4)


# --- interrupted where no entry is read


def interrupted(*layers: bytes, out: Path) -> None:
    def stop(done: int) -> None:
        raise RuntimeError("enough")

    with nothing_leaks(), pytest.raises(RuntimeError, match="enough"):
        extract(list(layers), out, progress=stop, threads=1)


@pytest.mark.parametrize("way", ["whiteout", "replaced"])
def test_a_removal_is_interrupted(memory_disk: Path, way: str) -> None:
    out = memory_disk / "out"
    for number in range(40_000):
        (out / "big" / f"{number}").mkdir(parents=True)
    if way == "whiteout":
        interrupted(tar(item(".wh.big")), out=out)
    else:
        interrupted(tar(item("big/", mode=0o700), item("big", kind="fifo")), out=out)
    assert 0 < len(os.listdir(out / "big")) < 40_000
