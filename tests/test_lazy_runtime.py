"""The stargz snapshotter's own code reads a layer in a registry: which bytes it prefetches, and what it serves."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, missing
from reference.peer import report, run
from registry import PROGRAM, Registry, registry
from tars import go_toc, sha256
from trees import Tree

import estargz

LANDMARK = ".prefetch.landmark"
UNIT = 50_000  # the snapshotter fetches multiples of this unless it is told otherwise
FIRST = ["usr/bin/program", "etc/config", "usr/lib/library"]  # not in the order of their names
RANDOM = ["usr/bin/program", "usr/lib/library", "usr/share/behind", "usr/share/large"]


@dataclass(frozen=True, slots=True)
class Pushed:
    """A layer in the registry, and the files with content in its TOC: the offset of each, in the order of the tar."""

    host: str
    digest: str
    toc_digest: str
    size: int
    toc_offset: int
    offsets: dict[str, int]

    def lazily(self, program: Path, *options: object, reads: Sequence[str] = ()) -> dict[str, Any]:
        """What the snapshotter's code does with the layer."""
        names = [part for name in reads for part in ("-read", name)]
        where = ["-ref", f"{self.host}/layers:latest", "-layer", self.digest, "-toc-digest", self.toc_digest]
        return report(program, *where, *options, *names)


def make_layer(peer: Path, tree: Path, blob: Path, prioritized: Sequence[str], *, maker: str, **sizes: int) -> None:
    """A layer of a tree whose prioritized files come first. ``sizes``: chunk_size, min_chunk_size."""
    if maker == "estargz":
        layer = estargz.build(tree, blob, prefetch=prioritized, **sizes)
        with estargz.open(blob) as opened:
            assert layer.prefetch_size == opened.prefetch_size == opened.lookup(LANDMARK).offset
        return
    tar, names = blob.with_suffix(".tar"), blob.with_suffix(".list")
    run(peer, "diff", tree, tar)
    names.write_text("".join(f"{name}\n" for name in prioritized))
    options = [part for key, size in sizes.items() for part in (f"-{key.replace('_', '-')}", size)]
    run(peer, "blob", "-how", "build", "-prioritized", names, *options, tar, blob)


# ------------------------------------------------------------------------------------------------- fixtures


@pytest.fixture(scope="module")
def stargz() -> Path:
    """The Go program that tests/stargz holds."""
    if shutil.which("go") is None:
        missing("Go is not installed, so there is no snapshotter to read with")
    built = subprocess.run([REPOSITORY / "scripts" / "stargz"], capture_output=True, text=True, check=False)
    if built.returncode:
        missing(f"the snapshotter's layers cannot be built: {built.stderr.strip()[-500:]}")
    return Path(built.stdout.strip())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    if shutil.which(PROGRAM) is None:
        missing(f"{PROGRAM} is not installed, so there is nothing to pull from")
    with registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Files that do not compress, and some small ones; not many bytes, because they are also fetched one by one."""
    made = Tree(tmp_path / "tree")
    for name, size in zip(RANDOM, (9001, 5000, 8000, 60_000), strict=True):
        made.file(name, random.Random(name).randbytes(size))
    made.file("etc/config", b"setting\n" * 100)
    made.file("etc/other", b"another\n" * 100)
    made.link("usr/bin/the-same", "usr/bin/program")
    return made


def push(store: Registry, peer: Path, blob: Path) -> Pushed:
    """The TOC is read by Go, its offset from the footer."""
    toc, data = go_toc(peer, blob), blob.read_bytes()
    files = {e["name"]: e.get("offset", 0) for e in json.loads(toc)["entries"] if e["type"] == "reg" and "size" in e}
    digest = store.push_blob("layers", data)
    return Pushed(store.host, digest, sha256(toc), len(data), int(data[-35:-19], 16), files)


MAKERS = ["estargz", "Go"]


@pytest.fixture(params=MAKERS)
def layer(request: pytest.FixtureRequest, tree: Tree, tmp_path: Path, peer: Path, store: Registry) -> Pushed:
    tree.file("empty", b"")
    make_layer(peer, tree.root, tmp_path / "blob", FIRST, maker=request.param)
    pushed = push(store, peer, tmp_path / "blob")
    assert list(pushed.offsets)[: len(FIRST) + 1] == [*FIRST, LANDMARK]
    return pushed


# ------------------------------------------------------------------------------------------------- what is fetched


def test_prefetched_is_what_lies_before_the_landmark(layer: Pushed, stargz: Path) -> None:
    """By single bytes: the range ends exactly where the landmark's member begins."""
    found = layer.lazily(stargz, "-unit", 1)
    assert (found["size"], found["toc_digest"]) == (layer.size, layer.toc_digest)
    assert found["prefetch"] == [[0, layer.offsets[LANDMARK]]]
    assert found["prefetch_size"] == layer.offsets[LANDMARK]
    # To open it, its size is asked for by its first two bytes, then footer and TOC are read.
    assert found["resolve"] == [[0, 2], [layer.size - 51, layer.size], [layer.toc_offset, layer.size - 51]]


def test_usual_unit(layer: Pushed, stargz: Path) -> None:
    found = layer.lazily(stargz)
    landmark = layer.offsets[LANDMARK]
    assert landmark % UNIT
    assert found["prefetch"] == [[0, landmark + UNIT - landmark % UNIT]]
    assert found["prefetch_size"] == landmark


def test_prioritized_files_are_read_without_another_fetch(layer: Pushed, tree: Tree, stargz: Path) -> None:
    found = layer.lazily(stargz, "-unit", 1, reads=[*FIRST, "usr/bin/the-same", "empty", "usr/share/behind", *FIRST])
    for file in found["files"]:
        data = (tree.root / file["path"]).read_bytes()
        assert (file["size"], file["digest"]) == (len(data), sha256(data)), file
    ranges = [file["ranges"] for file in found["files"]]
    behind = ranges.pop(len(FIRST) + 2)
    assert not any(ranges)
    first, last = behind[0][0], behind[-1][1]
    assert layer.offsets[LANDMARK] < first == layer.offsets["usr/share/behind"]
    assert last <= layer.offsets["usr/share/large"]


def test_without_prefetching_they_are_fetched_when_read(layer: Pushed, stargz: Path) -> None:
    """So it is the prefetching that the test above proves."""
    found = layer.lazily(stargz, "-unit", 1, "-no-prefetch", reads=FIRST)
    assert found["prefetch"] == []
    assert [file["ranges"][0][0] for file in found["files"]] == [layer.offsets[name] for name in FIRST]


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("sizes", [{"min_chunk_size": 12_000}, {"chunk_size": 4096}], ids=str)
def test_shared_and_small_members(
    sizes: dict[str, int], maker: str, tree: Tree, tmp_path: Path, peer: Path, store: Registry, stargz: Path
) -> None:
    """The landmark begins a member whatever shares one, so the range is exact here too."""
    make_layer(peer, tree.root, tmp_path / "blob", FIRST, maker=maker, **sizes)
    layer = push(store, peer, tmp_path / "blob")
    found = layer.lazily(stargz, "-unit", 1, reads=FIRST)
    assert found["prefetch"] == [[0, layer.offsets[LANDMARK]]]
    assert not any(file["ranges"] for file in found["files"])
    assert [file["digest"] for file in found["files"]] == [sha256((tree.root / name).read_bytes()) for name in FIRST]


# ------------------------------------------------------------------------------------------------- other layers


def test_landmark_of_this_package_forbids_prefetching(
    tree: Tree, tmp_path: Path, peer: Path, store: Registry, stargz: Path
) -> None:
    """Whatever size is configured."""
    estargz.build(tree.root, tmp_path / "blob")
    found = push(store, peer, tmp_path / "blob").lazily(stargz, "-prefetch-size", 20_000, reads=RANDOM)
    assert (found["prefetch"], found["prefetch_size"]) == ([], 0)
    assert [file["digest"] for file in found["files"]] == [sha256((tree.root / name).read_bytes()) for name in RANDOM]


@pytest.mark.parametrize("shared", [0, 12_000])
@pytest.mark.parametrize("size", [1, 20_000, 10**9])
def test_without_a_landmark_the_configured_size_is_prefetched(
    size: int, shared: int, tree: Tree, tmp_path: Path, peer: Path, store: Registry, stargz: Path
) -> None:
    estargz.build(tree.root, tmp_path / "blob", landmark=False, min_chunk_size=shared)
    layer = push(store, peer, tmp_path / "blob")
    found = layer.lazily(stargz, "-prefetch-size", size, "-unit", 512, reads=RANDOM)
    assert found["prefetch_size"] == min(size, layer.size)
    end = min(-(-size // 512), layer.toc_offset // 512) * 512  # the units from there on were fetched with the TOC
    assert found["prefetch"][:1] == [[0, end]]
    assert [file["digest"] for file in found["files"]] == [sha256((tree.root / name).read_bytes()) for name in RANDOM]


@pytest.mark.parametrize("landmark", [False, True])
def test_empty_file_in_the_first_shared_member(
    landmark: bool, tree: Tree, tmp_path: Path, peer: Path, store: Registry, stargz: Path
) -> None:
    """An empty file has no offset, which reads as 0; so no payload that shares a member may have that offset."""
    tree.file("etc/empty", b"")
    estargz.build(tree.root, tmp_path / "blob", landmark=landmark, min_chunk_size=12_000)
    found = push(store, peer, tmp_path / "blob").lazily(stargz, reads=["etc/other"])
    assert found["files"][0]["digest"] == sha256((tree.root / "etc/other").read_bytes())


def test_another_toc_digest_is_refused(layer: Pushed, stargz: Path) -> None:
    wrong = Pushed(layer.host, layer.digest, sha256(b""), layer.size, layer.toc_offset, layer.offsets)
    with pytest.raises(AssertionError, match="invalid TOC JSON"):
        wrong.lazily(stargz)
