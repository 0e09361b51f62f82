"""The changeset of two trees, byte for byte as containerd's walking differ writes it, and the walk's failures."""

from __future__ import annotations

import hashlib
import io
import os
import random
import resource
import subprocess
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import IS_ROOT
from pairs import PAIRS
from trees import (
    SECOND,
    TIME,
    WHOLE,
    RandomTree,
    Tree,
    deep_directory,
    difference,
    entries,
    go_tar,
    our_tar,
)

import estargz
from estargz import ChangedError, SourceError

SEEDS = range(40)
MIB = 1 << 20
SMALL_MEMORY = 12 * MIB  # little more than the least that a build takes


@pytest.fixture
def trees(scratch: Path) -> tuple[Tree, Tree]:
    return Tree(scratch / "lower"), Tree(scratch / "upper")


def check(peer: Path, upper: Path, lower: Path | None, *, epoch: int | None = None) -> bytes:
    """The stream, once it is known to be Go's."""
    ours = our_tar(upper, lower, source_date_epoch=epoch)
    assert not difference(ours, go_tar(peer, upper, lower, epoch=epoch))
    return ours


# ---------------------------------------------------------------------------------------------- the pairs


@pytest.mark.parametrize("name", PAIRS)
def test_pair_equals_containerd(name: str, peer: Path, trees: tuple[Tree, Tree]) -> None:
    wanted = PAIRS[name]
    if wanted.needs_root and not IS_ROOT:
        pytest.skip("needs root: devices, owners, capabilities")
    wanted.make(*trees)
    stream = check(peer, trees[1].root, trees[0].root)
    if wanted.entries is not None:
        assert entries(stream) == list(wanted.entries)


@pytest.mark.parametrize("name", [name for name in PAIRS if not name.startswith("directory_of")])
def test_upper_tree_alone_equals_containerd(name: str, peer: Path, trees: tuple[Tree, Tree]) -> None:
    if PAIRS[name].needs_root and not IS_ROOT:
        pytest.skip("needs root: devices, owners, capabilities")
    PAIRS[name].make(*trees)
    check(peer, trees[1].root, None)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_trees_equal_containerd(seed: int, peer: Path, scratch: Path) -> None:
    for name in ("lower", "upper"):
        RandomTree(scratch / name, random.Random(seed), as_root=IS_ROOT).grow(40)
    chance = random.Random(f"changes {seed}")
    RandomTree(scratch / "upper", chance, as_root=IS_ROOT).disturb(chance.randrange(1, 30))
    check(peer, scratch / "upper", scratch / "lower", epoch=chance.choice([None, None, WHOLE // SECOND, 0, -6]))


# ---------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("epoch", [-3, 0, 1, 1_599_999_999, 1_600_000_000, 1_600_000_001, 9_000_000_000])
def test_epoch_bounds_times(epoch: int, peer: Path, trees: tuple[Tree, Tree]) -> None:
    lower, upper = trees
    for tree in trees:
        tree.file("d/kept")
    lower.file("gone")
    for offset in (-5, -1, 0, 1, 1_599_999_999, 1_600_000_000, 1_600_000_001, 10_000_000_000):
        for fraction in (0, 1, 999_999_999):
            upper.file(f"d/{offset}.{fraction}", time=offset * SECOND + fraction)
    upper.link("d/link", "d/kept")
    upper.symlink("d/symlink", "kept")
    upper.meta("d", time=1_600_000_000 * SECOND + 5)
    stream = check(peer, upper.root, lower.root, epoch=epoch)
    with tarfile.open(fileobj=io.BytesIO(stream)) as archive:
        times = {info.name: info.mtime for info in archive}
    assert times.pop(".wh.gone") == 0
    assert max(times.values()) <= epoch


def mixed_tree(tree: Tree) -> None:
    """Enough for many batches: large and small payloads, runs without any, links."""
    chance = random.Random(7)
    for folder in range(20):
        for number in range(40):
            tree.file(f"d{folder}/f{number}", chance.randbytes(chance.choice([0, 10, 600, 9000, 70_000])))
        tree.link(f"d{folder}/link", f"d{folder}/f0")
    tree.file("d7/big", chance.randbytes(9 * MIB + 5))
    for number in range(3000):
        tree.dir(f"empty/{number:x}")


def test_threads_and_memory_do_not_show(peer: Path, trees: tuple[Tree, Tree]) -> None:
    upper = trees[1]
    mixed_tree(upper)
    stream = check(peer, upper.root, None)
    for threads in (1, 2, 3, 8):
        assert our_tar(upper.root, threads=threads) == stream
        assert our_tar(upper.root, threads=threads, chunk_size=65536, memory=SMALL_MEMORY) == stream


def test_threads_do_not_show_in_compressed_layers(trees: tuple[Tree, Tree]) -> None:
    mixed_tree(trees[1])
    for compression in ("estargz", "gzip"):
        digests = set()
        for threads in (1, 2, 3, 8):
            sink = io.BytesIO()
            layer = estargz.build(trees[1].root, sink, compression=compression, threads=threads)
            assert layer.digest == f"sha256:{hashlib.sha256(sink.getvalue()).hexdigest()}"
            digests.add(layer.digest)
        assert len(digests) == 1


def test_path_beyond_the_systems_limit(scratch: Path) -> None:
    """Longer than any path the system takes; there the judge gives up, so tarfile must do."""
    names = ["n" * 200] * 40
    handle = deep_directory(scratch, names)
    try:
        with os.fdopen(os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=handle), "wb") as file:
            file.write(b"payload")
        os.symlink("target", "symlink", dir_fd=handle)
    finally:
        os.close(handle)
    with tarfile.open(fileobj=io.BytesIO(our_tar(scratch))) as archive:
        member = archive.extractfile("/".join([*names, "file"]))
        assert member is not None and member.read() == b"payload"
        assert archive.getmember("/".join([*names, "symlink"])).linkname == "target"
        assert len(archive.getnames()) == 42


# ---------------------------------------------------------------------------------------------- what cannot be read


@contextmanager
def as_nobody() -> Iterator[None]:
    """Drops root's privileges for a while; threads started meanwhile have none either."""
    if not IS_ROOT:
        yield
        return
    os.setegid(65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def refused(upper: Path, lower: Path | None = None, **options: Any) -> str:
    """The message of the SourceError that building ends with; nothing is left at the destination."""
    folder = upper.parent / "out"
    folder.mkdir(exist_ok=True)
    folder.chmod(0o777)
    with as_nobody(), pytest.raises(SourceError) as caught:
        estargz.build(upper, folder / "layer", lower=lower, **options)
    assert not list(folder.iterdir())
    return str(caught.value)


@pytest.mark.parametrize("threads", [1, 3])
def test_unreadable_file(threads: int, trees: tuple[Tree, Tree]) -> None:
    upper = trees[1]
    upper.file("a")
    upper.file("d/secret", b"secret", mode=0)
    upper.file("z")
    assert refused(upper.root, threads=threads) == (
        "d/secret: cannot be opened: Permission denied; check that it exists and is readable"
    )


def test_first_unreadable_file_is_named(trees: tuple[Tree, Tree]) -> None:
    """Whatever the threads do, the first failure in the stream's order is the one reported."""
    upper = trees[1]
    upper.file("big", bytes(9 * MIB))
    for number in range(50):
        upper.file(f"f{number:02}", b"secret", mode=0)
    for threads in (1, 2, 8):
        assert refused(upper.root, threads=threads).startswith("f00: cannot be opened: Permission denied")


def test_many_names_of_one_inode(peer: Path, trees: tuple[Tree, Tree]) -> None:
    """As many as the file system allows; they all wait for the name that is written last."""
    lower, upper = trees
    for tree in trees:
        tree.file("a")
        for number in range(20_000):
            os.link(tree.root / "a", tree.root / f"a{number:05}")
    upper.link("z", "a")
    stream = entries(check(peer, upper.root, lower.root))
    assert stream[:3] == ["z", "a => z", "a00000 => z"] and stream[-1] == "a19999 => z" and len(stream) == 20_002


def test_file_systems_that_number_inodes_alike(root: None, trees: tuple[Tree, Tree]) -> None:
    """containerd's differ makes the second one's files links to the first one's."""
    tree = trees[1].root
    with ExitStack() as stack:
        for name in ("one", "other"):
            (tree / name).mkdir()
            mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tree / name], capture_output=True, check=False)
            if mounted.returncode:
                pytest.skip("the file system of this machine does not let another one be mounted")
            stack.callback(subprocess.run, ["umount", tree / name], check=True)
            (tree / name / "file").write_text(name)
            os.link(tree / name / "file", tree / name / "link")
        assert (tree / "one/file").stat().st_ino == (tree / "other/file").stat().st_ino
        with tarfile.open(fileobj=io.BytesIO(our_tar(tree))) as archive:
            for name in ("one", "other"):
                assert archive.getmember(f"{name}/link").linkname == f"{name}/file"
                member = archive.extractfile(f"{name}/file")
                assert member is not None and member.read() == name.encode()


def test_unreadable_empty_file_is_no_failure(trees: tuple[Tree, Tree]) -> None:
    trees[1].file("empty", b"", mode=0)
    with as_nobody():
        assert entries(our_tar(trees[1].root)) == ["empty"]


@pytest.mark.parametrize("mode", [0, 0o311])
def test_unlistable_directory(mode: int, trees: tuple[Tree, Tree]) -> None:
    upper = trees[1]
    upper.file("a/d/x")
    upper.dir("a/d", mode)
    try:
        message = refused(upper.root)
        assert message.startswith("a/d: cannot be ") and "Permission denied; check that" in message
    finally:
        upper.dir("a/d", 0o755)


def test_unsearchable_directory(trees: tuple[Tree, Tree]) -> None:
    upper = trees[1]
    upper.file("a/d/x")
    upper.dir("a/d", 0o644)
    try:
        assert refused(upper.root).startswith("a/d/x: cannot be examined: Permission denied")
    finally:
        upper.dir("a/d", 0o755)


def test_unreadable_lower_content(trees: tuple[Tree, Tree]) -> None:
    lower, upper = trees
    lower.file("f", b"old!", mode=0, time=WHOLE)
    upper.file("f", b"new!", mode=0, time=WHOLE)
    assert refused(upper.root, lower.root).startswith("f: cannot be opened: Permission denied")


def test_unlistable_lower_directory(trees: tuple[Tree, Tree]) -> None:
    lower, upper = trees
    for tree in trees:
        tree.file("d/x")
    lower.dir("d", 0)
    try:
        assert refused(upper.root, lower.root).startswith("d: cannot be ")
    finally:
        lower.dir("d", 0o755)


@pytest.mark.parametrize("which", ["upper", "lower"])
def test_missing_tree(which: str, scratch: Path) -> None:
    (scratch / "there").mkdir()
    trees = {"upper": scratch / "there", "lower": scratch / "there", which: scratch / "missing"}
    with pytest.raises(SourceError, match="missing: cannot be opened: No such file or directory; check that"):
        estargz.build(trees["upper"], io.BytesIO(), lower=trees["lower"])


def test_name_reserved_by_the_format(trees: tuple[Tree, Tree]) -> None:
    trees[1].file("stargz.index.json")
    with pytest.raises(SourceError, match=r"stargz\.index\.json: is a name reserved by the eStargz format; rename it"):
        estargz.build(trees[1].root, io.BytesIO())
    assert entries(our_tar(trees[1].root)) == ["stargz.index.json"]


def test_reserved_name_further_down_is_free(trees: tuple[Tree, Tree]) -> None:
    trees[1].file("d/stargz.index.json")
    trees[1].file("d/.prefetch.landmark")
    assert estargz.build(trees[1].root, io.BytesIO()).size > 0


# ---------------------------------------------------------------------------------------------- trees that change


class MeddlingSink(io.BytesIO):
    """Does something to the tree when the first bytes are written; the rest is yet to be read."""

    def __init__(self, meddle: Callable[[], None]) -> None:
        super().__init__()
        self._meddle: Callable[[], None] | None = meddle

    def write(self, data: Any) -> int:
        if self._meddle is not None:
            meddle, self._meddle = self._meddle, None
            meddle()
        return super().write(data)


def build_while(meddle: Callable[[], None], upper: Path, *, threads: int = 1) -> bytes:
    """Builds with so little memory that only a small part is read before ``meddle`` runs."""
    sink = MeddlingSink(meddle)
    build_into(sink, upper, threads=threads)
    return sink.getvalue()


def build_into(sink: MeddlingSink, upper: Path, threads: int = 1) -> None:
    estargz.build(
        upper,
        sink,
        compression="uncompressed",
        threads=threads,
        chunk_size=1 << 16,
        memory=SMALL_MEMORY,
        landmark=False,
    )


BIG = 24 * MIB


@pytest.fixture
def growing(trees: tuple[Tree, Tree]) -> Tree:
    """A tree whose file d/big takes many batches to read."""
    trees[1].file("d/big", bytes(BIG))
    trees[1].file("outside", b"TOP-SECRET" * (BIG // 10))
    return trees[1]


def truncate(path: Path) -> None:
    os.truncate(path, BIG - 5)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"!")


def replace_by_file(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"other" + bytes(BIG - 5))
    os.utime(other, ns=(TIME, TIME))
    other.replace(path)


def replace_by_symlink(path: Path) -> None:
    path.with_name("symlink").symlink_to("../outside")
    path.with_name("symlink").replace(path)


def replace_by_fifo(path: Path) -> None:
    os.mkfifo(path.with_name("fifo"))
    path.with_name("fifo").replace(path)


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("meddle", "cause"),
    [
        (truncate, "shrank while it was read"),
        (append, "grew while it was read"),
        (overwrite, "was changed or replaced while it was read"),
        (replace_by_file, "was changed or replaced while it was read"),
        (replace_by_symlink, "was changed or replaced while it was read"),
        (replace_by_fifo, "was changed or replaced while it was read"),
        (replace_by_directory, "was changed or replaced while it was read"),
        (Path.unlink, "was changed or replaced while it was read"),
    ],
)
def test_file_that_changes_while_it_is_read(
    meddle: Callable[[Path], None], cause: str, threads: int, growing: Tree
) -> None:
    with pytest.raises(ChangedError) as caught:
        build_while(lambda: meddle(growing.root / "d/big"), growing.root, threads=threads)
    assert str(caught.value).startswith(f"d/big: {cause}")
    assert str(caught.value).endswith("; build from a tree that nothing writes to")


def test_directory_swapped_for_a_symlink_is_never_followed(scratch: Path) -> None:
    """The walk is inside d when d becomes a link to elsewhere: it stops there, with nothing from elsewhere read."""
    upper, outside = Tree(scratch / "upper"), Tree(scratch / "outside")
    upper.file("d/one", bytes(BIG))
    upper.file("d/sub/two", bytes(BIG))
    outside.file("one", b"TOP-SECRET" * (BIG // 10))
    outside.file("sub/two", b"TOP-SECRET" * (BIG // 10))

    def swap() -> None:
        (upper.root / "d").rename(scratch / "aside")
        (upper.root / "d").symlink_to(outside.root)

    sink = MeddlingSink(swap)
    with pytest.raises(ChangedError, match=r"^d/(one|sub|sub/two): was changed or replaced while it was read; build"):
        build_into(sink, upper.root)
    assert b"SECRET" not in sink.getvalue()
    assert len(sink.getvalue()) > BIG // 2


@pytest.mark.parametrize("name", ["directory", "fifo", "file", "symlink"])
def test_name_that_is_gone_when_its_turn_comes(name: str, growing: Tree) -> None:
    """All names of a directory are listed before the first of them is looked at."""
    growing.file("d/directory/x")
    growing.fifo("d/fifo")
    growing.file("d/file")
    growing.symlink("d/symlink", "file")
    gone = growing.root / "d" / name
    with pytest.raises(ChangedError, match=f"^d/{name}: was changed or replaced while it was read; build from"):
        build_while(lambda: gone.rename(growing.root.parent / "gone"), growing.root)


def test_lower_component_that_is_a_symlink_is_not_followed(trees: tuple[Tree, Tree], peer: Path) -> None:
    """A lower name that is a symbolic link has no children, wherever it leads."""
    lower, upper = trees
    lower.file("real/x")
    upper.file("real/x")
    lower.symlink("d", "real")
    upper.file("d/x")
    assert entries(check(peer, upper.root, lower.root)) == ["d/", "d/x"]


def test_tree_that_is_a_symlink_itself_is_entered(trees: tuple[Tree, Tree]) -> None:
    trees[1].file("x")
    link = trees[1].root.with_name("link")
    link.symlink_to(trees[1].root)
    assert entries(our_tar(link)) == ["x"]


def open_handles() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_nothing_is_left_after_a_change(growing: Tree) -> None:
    """Neither a file at the destination nor an open handle, nor a thread."""
    growing.file("d/big", random.Random(1).randbytes(BIG))
    folder = growing.root.parent / "out"
    folder.mkdir()
    handles, threads = open_handles(), threading.active_count()
    options: dict[str, Any] = {"level": 12, "threads": 2, "chunk_size": 1 << 16, "memory": SMALL_MEMORY}
    with pytest.raises(ChangedError, match=r"^d/big: shrank while it was read"):
        estargz.build(growing.root, folder / "layer", progress=lambda _: truncate(growing.root / "d/big"), **options)
    assert open_handles() == handles
    assert threading.active_count() == threads
    assert not list(folder.iterdir())


def test_deep_trees_do_not_use_up_handles(scratch: Path) -> None:
    """The walk keeps some handles open over all levels, not one for each."""
    os.close(deep_directory(scratch, ["d"] * 600))
    kept = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_handles() + 150, kept[1]))
    try:
        assert len(entries(our_tar(scratch))) == 600
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, kept)
