"""Layers in a runtime that pulls lazily: BuildKit with its stargz snapshotter, which mounts them by FUSE from a registry.

Images are made by hand around single layers, or whole by the package's commands. A proxy in front of the registry notes which
bytes of a layer's blob are fetched. The program that runs in the images, tests/show.c, tells what is to be seen in them.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from applied import COMMAND
from conftest import IS_ROOT, REPOSITORY, missing
from registry import PROGRAM, Fetch, Proxy, Registry, proxy, registry
from runtimes import RUN_SECONDS, by_path, compile_show, lines, listing, run_in_buildkit
from runtimes import run as output_of
from trees import CAPABILITY, SECOND, WHOLE, Tree, run

import estargz

sys.path.insert(0, str(REPOSITORY / "bench"))

import buildkitd

BLOCK = 50_000  # bytes that the snapshotter fetches and caches at once; its default
CONFIG = """\
[registry."{host}"]
http = true

[worker.oci.stargzSnapshotter]
no_background_fetch = true
prefetch_timeout_sec = 60

[worker.oci.stargzSnapshotter.blob]
chunk_size = {block}
"""
PREFETCH = ".prefetch.landmark"


# ------------------------------------------------------------------------------------------------- what it needs


def why_not() -> str | None:
    """Why this machine cannot mount layers; None when it can. What can be installed is looked for elsewhere."""
    if not IS_ROOT:
        return "needs root: mounts"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        return f"the kernel has no FUSE for us: {error}"
    if not buildkitd.may_mount():
        return "the kernel does not let this process mount anything"
    if not buildkitd.built():
        return "buildkitd is not built: scripts/buildkit does it, in some minutes"
    return None


# ------------------------------------------------------------------------------------------------- layers, and the runtime


@dataclass(frozen=True, slots=True)
class Pushed:
    """A layer as an image has it."""

    blob: Path
    descriptor: dict[str, Any]
    diff_id: str

    @property
    def digest(self) -> str:
        return str(self.descriptor["digest"])

    @property
    def size(self) -> int:
        return int(self.descriptor["size"])


def make_layer(source: Path, blob: Path, **options: Any) -> Pushed:
    layer = estargz.build(source, blob, **options)
    return Pushed(blob, layer.descriptor(), layer.diff_id)


@dataclass(frozen=True, slots=True)
class Pull:
    """What running a command in an image brought about."""

    seen: list[dict[str, Any]]
    """The command's lines."""
    mounts: int
    """Layers mounted from the registry."""
    fetches: dict[str, list[Fetch]]
    """By the digest of a layer's blob."""


class Runtime:
    """A daemon, the registry that it pulls from, and the proxy between them."""

    def __init__(self, folder: Path, pushes: Registry, pulls: Proxy, daemon: buildkitd.Daemon) -> None:
        self._folder, self._pushes, self._pulls, self._daemon = folder, pushes, pulls, daemon
        self._images = 0

    @property
    def registry(self) -> str:
        """Where to push; its host and port."""
        return self._pushes.host

    def run(self, layers: Sequence[Pushed], *command: str) -> Pull:
        """Runs a command in an image of its own of these layers, the lowest first."""
        self._images += 1
        name = f"image{self._images}"
        pushed = self._pushes.push_image(name, [(layer.blob, layer.descriptor, layer.diff_id) for layer in layers])
        return self.run_image(name, pushed, [layer.digest for layer in layers], *command)

    def run_image(self, repository: str, digest: str, layers: Iterable[str], *command: str) -> Pull:
        """Runs a command in an image that the registry has, of layers with these digests."""
        self._forget()
        before = self._mounts()
        printed = run_in_buildkit(self._daemon, self._folder, f"{self._pulls.host}/{repository}@{digest}", *command)
        return Pull(
            seen=lines(printed),
            mounts=len(self._mounts() - before),
            fetches={
                layer: [fetch for fetch in self._pulls.fetches_of(layer) if f"/{repository}/" in fetch.path]
                for layer in layers
            },
        )

    def _forget(self) -> None:
        """Drops what the daemon has, so that it would not take a layer from an earlier image."""
        dropped = self._daemon.buildctl("prune", "--all", timeout=RUN_SECONDS)
        assert dropped.returncode == 0, dropped.stderr

    def _mounts(self) -> set[str]:
        """The mount points of FUSE file systems below the daemon's directory."""
        found = set()
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            where, _, what = line.partition(" - ")
            if what.startswith("fuse.") and where.split()[4].startswith(str(self._folder)):
                found.add(where.split()[4])
        return found


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    for program in (PROGRAM, "runc"):
        if shutil.which(program) is None:
            missing(f"{program} is not installed")
    with ExitStack() as stack:
        folder = stack.enter_context(temporary_directory())
        for name in ("registry", "daemon"):
            (folder / name).mkdir()
        pushes = stack.enter_context(registry(folder / "registry"))
        pulls = stack.enter_context(proxy(pushes.host))
        config = CONFIG.format(host=pulls.host, block=BLOCK)
        daemon = stack.enter_context(buildkitd.Daemon(folder / "daemon", snapshotter="stargz", config=config))
        yield Runtime(folder, pushes, pulls, daemon)


@contextmanager
def temporary_directory() -> Iterator[Path]:
    """One that is removed at once, as it holds some hundred megabytes."""
    with tempfile.TemporaryDirectory(prefix="estargz-test-") as made:
        yield Path(made)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What runs in the images."""
    return compile_show(tmp_path_factory.mktemp("program"))


# ------------------------------------------------------------------------------------------------- what is fetched


@pytest.fixture(scope="module")
def large(program: Path) -> Iterator[Path]:
    """A tree of 100 MB that do not compress."""
    chance = random.Random(1)
    with temporary_directory() as folder:
        tree = Tree(folder / "tree")
        tree.file("bin/show", program.read_bytes(), 0o755)
        for name in ("a", "c", "e"):
            tree.file(f"data/{name}", chance.randbytes(30_000_000))
        tree.file("data/b-read", chance.randbytes(9_000_000))  # several chunks
        tree.file("data/d-unread", chance.randbytes(1_000_000))
        yield tree.root


def test_only_what_a_container_reads_is_fetched(runtime: Runtime, large: Path, scratch: Path) -> None:
    layer = make_layer(large, scratch / "blob")
    pull = runtime.run([layer], "/bin/show", "/data/b-read")
    assert [one["crc32"] for one in pull.seen] == [zlib.crc32((large / "data/b-read").read_bytes())]
    assert pull.mounts == 1
    with estargz.open(layer.blob) as blob:
        read = [span for path in ("bin/show", "data/b-read") for span in spans(blob, path)]
    fetched = blocks(asked(pull.fetches[layer.digest]))
    assert fetched == blocks([*read, table_of_contents(layer)])
    assert len(fetched) * BLOCK < layer.size // 8


def test_prioritized_files_are_fetched_first_and_at_once(runtime: Runtime, large: Path, scratch: Path) -> None:
    """And are then all that is fetched, when a container reads no others."""
    first = ["bin/show", "data/d-unread", "data/b-read"]
    layer = make_layer(large, scratch / "blob", prefetch=first)
    with estargz.open(layer.blob) as blob:
        landmark = blob.lookup(PREFETCH).offset
        assert all(end <= landmark for path in first for _, end in spans(blob, path))
        assert spans(blob, "data/a")[0][0] > landmark > 10_000_000
    pull = runtime.run([layer], "/bin/show", "/data/b-read")
    assert [one["crc32"] for one in pull.seen] == [zlib.crc32((large / "data/b-read").read_bytes())]
    assert pull.mounts == 1
    fetched = asked(pull.fetches[layer.digest])
    index = blocks([table_of_contents(layer)])
    assert [span for span in fetched if not blocks([span]) <= index] == [(0, -(-landmark // BLOCK) * BLOCK)]
    assert blocks(fetched[:1]) <= index  # which tells where the landmark is


def test_layer_without_table_of_contents_is_fetched_whole(runtime: Runtime, program: Path, tmp_path: Path) -> None:
    """What the other tests would see if nothing were lazy."""
    tree = Tree(tmp_path / "tree")
    tree.file("bin/show", program.read_bytes(), 0o755)
    tree.file("data", random.Random(2).randbytes(5_000_000))
    layer = make_layer(tree.root, tmp_path / "blob", compression="gzip")
    pull = runtime.run([layer], "/bin/show", "/bin/show")
    assert (len(pull.seen), pull.mounts) == (1, 0)
    assert any(fetch.sent == layer.size for fetch in pull.fetches[layer.digest])


def test_layer_of_another_table_of_contents_is_fetched_whole(runtime: Runtime, tree: Tree, tmp_path: Path) -> None:
    """The runtime holds the layer to the digest that its descriptor has."""
    layer = make_layer(tree.root, tmp_path / "blob")
    layer.descriptor["annotations"]["containerd.io/snapshot/stargz/toc.digest"] = "sha256:" + "0" * 64
    pull = runtime.run([layer], "/bin/show", "/bin/show")
    assert (len(pull.seen), pull.mounts) == (1, 0)
    assert pull.fetches[layer.digest][-1].sent == layer.size


def asked(fetches: Iterable[Fetch]) -> list[tuple[int, int]]:
    """The ranges of a blob that were fetched. Two bytes are asked for to learn whether there are ranges at all."""
    bodies = [fetch for fetch in fetches if fetch.method == "GET"]
    assert all(fetch.status == 206 for fetch in bodies)
    assert bodies[0].ranges == [(0, 2)]
    return [span for fetch in bodies[1:] for span in fetch.ranges]


def blocks(ranges: Iterable[tuple[int, int]]) -> set[int]:
    """The numbers of the blocks that the ranges touch."""
    return {number for begin, end in ranges for number in range(begin // BLOCK, (end - 1) // BLOCK + 1)}


def spans(blob: estargz.Blob, path: str) -> list[tuple[int, int]]:
    """Where a file's chunks lie in the blob."""
    return [(chunk.offset, chunk.end) for chunk in blob.chunks(path)]


def table_of_contents(layer: Pushed) -> tuple[int, int]:
    """Where it lies in the blob, with the footer behind it."""
    with layer.blob.open("rb") as file:
        file.seek(-51, os.SEEK_END)
        return int(file.read()[16:32], 16), layer.size


# ------------------------------------------------------------------------------------------------- images


def test_built_image_is_fetched_in_part(runtime: Runtime, large: Path, scratch: Path) -> None:
    """One that the command puts together of a tree and a change, and pushes."""
    run(["cp", "-al", large, scratch / "changed"])  # the same files, so that they are equal
    Tree(scratch / "changed").file("data/added", b"added", 0o600)
    layers = [f"{large},prefetch=bin/show,prefetch=data/b-read", f"{scratch / 'changed'},lower={large}"]
    image = image_build(layers, runtime.registry, "built", "estargz")
    pull = run_in(runtime, "built", image, "/data/b-read", "/data/added")
    assert [one["crc32"] for one in pull.seen] == [crc32_of(large / "data/b-read"), zlib.crc32(b"added")]
    assert pull.mounts == 2
    assert 0.09 < share_fetched(image, pull) < 0.1  # 9 of 100 MB are what it reads


def test_converted_image_is_fetched_in_part(runtime: Runtime, large: Path) -> None:
    """The same image before and after, from a registry to the same registry."""
    before = image_build([str(large)], runtime.registry, "before", "gzip")
    names = [f"docker://{runtime.registry}/{name}:1" for name in ("before", "after")]
    converted = json.loads(output_of(*COMMAND, "convert", *names, "--compression", "estargz", "--json"))
    (after,) = converted["images"]
    pulls = [run_in(runtime, name, image, "/data/d-unread") for name, image in (("before", before), ("after", after))]
    for pull in pulls:
        assert [one["crc32"] for one in pull.seen] == [crc32_of(large / "data/d-unread")]
    assert [pull.mounts for pull in pulls] == [0, 1]
    assert share_fetched(before, pulls[0]) > 1  # its end was looked at before
    assert 0.01 < share_fetched(after, pulls[1]) < 0.02  # 1 of 100 MB, and the program


def image_build(layers: Sequence[str], host: str, name: str, compression: str) -> dict[str, Any]:
    """Pushes an image by the command; what that prints."""
    options = [part for layer in layers for part in ("--layer", layer)]
    output = f"type=image,name={host}/{name}:1,push=true,compression={compression}"
    made: dict[str, Any] = json.loads(output_of(*COMMAND, "image", "build", *options, "--output", output, "--json"))
    assert made["names"] == [f"docker://{host}/{name}:1"]
    return made


def run_in(runtime: Runtime, repository: str, image: dict[str, Any], *paths: str) -> Pull:
    digests = [layer["digest"] for layer in image["layers"]]
    return runtime.run_image(repository, image["digest"], digests, "/bin/show", *paths)


def share_fetched(image: dict[str, Any], pull: Pull) -> float:
    """Of the bytes that the layers have."""
    sent = sum(fetch.sent for fetches in pull.fetches.values() for fetch in fetches if fetch.method == "GET")
    return sent / sum(int(layer["size"]) for layer in image["layers"])


def crc32_of(path: Path) -> int:
    return zlib.crc32(path.read_bytes())


# ------------------------------------------------------------------------------------------------- what is seen


@pytest.mark.parametrize(
    "options",
    [{}, {"level": 12}, {"chunk_size": 300_000}, {"min_chunk_size": 100_000}, {"landmark": False}],
    ids=str,
)
def test_everything_is_seen(runtime: Runtime, tree: Tree, tmp_path: Path, options: dict[str, Any]) -> None:
    layer = make_layer(tree.root, tmp_path / "blob", **options)
    pull = runtime.run([layer], "/bin/show", "/tree")
    assert pull.mounts == 1
    assert by_path(pull.seen) == by_path(listing(tree.root))


def test_everything_of_a_tar_is_seen(runtime: Runtime, tree: Tree, tmp_path: Path) -> None:
    """As GNU tar makes it, with every name below "./"."""
    tar = tmp_path / "tar"
    attributes = ["--xattrs", "--xattrs-include=security.capability"]
    run(["tar", "--format=posix", *attributes, "--numeric-owner", "-cf", tar, "-C", tree.root, "."])
    pull = runtime.run([make_layer(tar, tmp_path / "blob")], "/bin/show", "/tree")
    assert pull.mounts == 1
    assert by_path(pull.seen) == by_path(listing(tree.root))


def test_changes_are_seen(runtime: Runtime, tree: Tree, tmp_path: Path) -> None:
    """A second layer on the first, both mounted: whiteouts, and paths that have become something else."""
    lower = tmp_path / "lower"
    run(["cp", "-a", tree.root, lower])
    tree.remove("tree/empty")
    tree.remove("tree/" + "é" * 60)
    tree.file("tree/chunks", b"less")  # and so its other link
    tree.remove("tree/symlink")
    tree.dir("tree/symlink")
    tree.file("tree/symlink/inside")
    tree.remove("tree/empty-directory")
    tree.file("tree/empty-directory", b"no more")
    tree.remove("tree/fifo")
    tree.symlink("tree/fifo", "char")
    tree.meta("tree/sticky", mode=0o700, time=WHOLE + SECOND)
    tree.file("tree/new/file", b"new")
    tree.link("tree/new/link", "tree/new/file")
    layers = [make_layer(lower, tmp_path / "first"), make_layer(tree.root, tmp_path / "second", lower=lower)]
    assert layers[1].size < layers[0].size // 10
    pull = runtime.run(layers, "/bin/show", "/tree")
    assert pull.mounts == 2
    assert by_path(pull.seen) == by_path(listing(tree.root))


@pytest.fixture
def tree(tmp_path: Path, program: Path) -> Tree:
    """An image that can be run, and below ``tree`` something of every kind."""
    made = Tree(tmp_path / "image")
    made.file("bin/show", program.read_bytes(), 0o755)
    made.file("tree/empty", b"", 0o600, time=WHOLE)
    made.file("tree/set-user", b"#!", 0o4755, owner=(3_000_000, 5), time=WHOLE + SECOND)
    made.file("tree/capable", b"able", 0o755, capability=CAPABILITY)
    made.file("tree/chunks", random.Random(3).randbytes(500_000) * 10, time=-5 * SECOND)
    made.file("tree/unreadable", b"by others", 0)
    made.file("tree/" + "é" * 60 + "/" + "l" * 200, b"long")
    made.file('tree/quo"te\\\n<&>', b"escaped")
    made.link("tree/link", "tree/chunks")
    made.symlink("tree/symlink", "t/" * 150)
    made.symlink("tree/dangling", "../../nowhere")
    made.fifo("tree/fifo")
    made.char("tree/char", 1, 3, owner=(1, 2))
    made.block("tree/block", 7, 300)
    made.dir("tree/sticky", 0o1777, time=WHOLE)
    made.dir("tree/empty-directory", 0o2750, owner=(0, 5))
    for name in ("tree/" + "é" * 60, "tree"):
        made.dir(name)  # from half a second on a tar's time is rounded up
    return made
