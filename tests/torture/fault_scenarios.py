"""What faults.py tries: everything that the package does, small; and careless functions, in which it must find what is wrong.

A scenario is given a place and a stack, prepares what the caller of the package would have, and returns what is to be run.
That returns a fact, such as a digest, which is the same each time, or what finds it out afterwards.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import random
import stat
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outcome import ROOT

sys.path.insert(0, str(ROOT / "tests"))

from registry import Registry, registry

import estargz
import estargz.http
from estargz.image.variants import VariantKey, VariantStore
from estargz.options import Options
from estargz.reading.cache import CachedSource
from estargz.reading.source import open_source

CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")
estargz.http._BACKOFF = 0.0  # pauses would take most of the time
UNSHARED: list[int] = []  # descriptors that no forked process keeps
Run = Callable[[], object]


@dataclass(frozen=True)
class Place:
    """Directories: what is given, by ``given``, to all; where results go; and $TMPDIR. Repositories that are pushed to."""

    given: Path
    out: Path
    tmp: Path
    repositories: list[str] = field(default_factory=list)

    @classmethod
    def made(cls, given: Path, folder: Path) -> Place:
        place = cls(given, folder / "out", folder / "tmp")
        place.out.mkdir(parents=True)
        place.tmp.mkdir()
        tempfile.tempdir = str(place.tmp)
        return place

    @property
    def blob(self) -> Path:
        """A destination where something older is."""
        path = self.out / "blob"
        if not path.exists():
            path.write_bytes(b"old")
        return path

    @property
    def registry(self) -> Registry:
        """It keeps to itself what goes wrong here: it is another process."""
        return Registry((self.given / "registry" / "host").read_text(), 0)

    def repository(self) -> str:
        """One of the registry that nobody else has."""
        name = "place-" + hashlib.sha256(bytes(self.out)).hexdigest()[:16]
        self.repositories.append(name)
        return name

    def pushed(self) -> dict[str, str]:
        """What the registry has under the tag of each."""
        return {key: value for name in self.repositories for key, value in self.registry.held(name, "1").items()}


# ------------------------------------------------------------------------------------------------------- what is given


def give(folder: Path, stack: ExitStack) -> None:
    """Makes all that scenarios begin with, and starts a registry that has an image."""
    rng = random.Random(17)
    grow(folder / "tree", rng)
    grow(folder / "lower", random.Random(17))
    (folder / "lower" / "gone").write_bytes(b"only below")
    (folder / "tree" / "a" / "b" / "changed").write_bytes(b"otherwise")
    (folder / "upper" / "a").mkdir(parents=True)
    (folder / "upper" / "a" / "new").write_bytes(b"new")
    if os.geteuid() == 0:
        os.mknod(folder / "upper" / "gone", stat.S_IFCHR, 0)
        os.setxattr(folder / "upper" / "a", "trusted.overlay.opaque", b"y")
    estargz.build(folder / "tree", folder / "tar", compression="uncompressed", landmark=False)
    tar = (folder / "tar").read_bytes()
    (folder / "tar.gz").write_bytes(gzip.compress(tar, 1, mtime=0))
    estargz.build(folder / "tar", folder / "zst", compression="zstd")
    estargz.build(folder / "tree", folder / "esgz")
    (folder / "registry").mkdir()
    host = stack.enter_context(registry(folder / "registry")).host
    (folder / "registry" / "host").write_text(host)
    small(folder).export(f"type=image,name={host}/given:1,push=true,compression=estargz")


def small(given: Path) -> estargz.Image:
    """An image of two layers."""
    return estargz.Image.new("linux/amd64").append(given / "tree" / "a" / "b").append(given / "tar.gz")


def grow(tree: Path, rng: random.Random) -> None:
    """Some of everything, and enough bytes for three batches."""
    (tree / "a" / "b" / "c").mkdir(parents=True)
    (tree / "empty").mkdir()
    (tree / "a" / "noise").write_bytes(rng.randbytes(1_300_000))
    (tree / "a" / "text").write_bytes(b"some text " * 140_000)
    for number in range(5):
        (tree / "a" / "b" / f"{number}").write_bytes(rng.randbytes(1000 * number))
    (tree / "a" / "b" / "changed").write_bytes(b"as it was")
    (tree / "a" / "b" / "c" / "able").write_bytes(b"program")
    (tree / "a" / "b" / "c" / "link").symlink_to("../" * 60 + "able")
    (tree / "hard").hardlink_to(tree / "a" / "b" / "1")
    os.mkfifo(tree / "fifo")
    if os.geteuid() == 0:
        os.setxattr(tree / "a" / "b" / "c" / "able", "security.capability", CAPABILITY)
        os.mknod(tree / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    for path in [*tree.rglob("*"), tree]:
        os.utime(path, ns=(0, 1_600_000_000_123_456_789), follow_symlinks=False)


def forked(work: Callable[[], object]) -> None:
    """Has another process do the work."""
    if os.fork() == 0:
        for handle in UNSHARED:
            os.close(handle)
        with suppress(BaseException):
            work()
        os._exit(0)


def fed(data: Path, stack: ExitStack) -> io.FileIO:
    """A pipe that a file's bytes come out of."""
    read, write = os.pipe()

    def feed() -> None:
        os.close(read)
        with open(write, "wb") as pipe:
            pipe.write(data.read_bytes())

    forked(feed)
    os.close(write)
    return stack.enter_context(io.FileIO(read, "rb"))


class Drain:
    """A named pipe to write to, and the digest of what went through it."""

    def __init__(self, stack: ExitStack, path: Path) -> None:
        os.mkfifo(path)
        self._answer, answer = os.pipe()

        def drain() -> None:
            os.write(answer, hashlib.sha256(path.read_bytes()).hexdigest().encode())

        forked(drain)
        os.close(answer)
        stack.callback(os.close, self._answer)

    def seen(self) -> str:
        """Once the pipe was closed."""
        return "sha256:" + os.read(self._answer, 100).decode()


# ------------------------------------------------------------------------------------------------------------ scenarios


def built(source: object, dest: object, **options: Any) -> str:
    return estargz.build(source, dest, **options).digest  # type: ignore[arg-type]


def tree_alone(place: Place, stack: ExitStack) -> Run:
    dest = place.blob
    return lambda: built(place.given / "tree", dest, threads=1)


def tree_threads(place: Place, stack: ExitStack) -> Run:
    return lambda: built(place.given / "tree", place.out / "blob", threads=3)


def tree_lower(place: Place, stack: ExitStack) -> Run:
    dest = place.blob
    return lambda: built(place.given / "tree", dest, lower=place.given / "lower", threads=2, level=6)


def tree_overlay(place: Place, stack: ExitStack) -> Run:
    return lambda: built(place.given / "upper", place.out / "blob", overlay_lower=[place.given / "lower"])


def tree_prefetch(place: Place, stack: ExitStack) -> Run:
    wanted = ["a/b/[13]", "hard", "a/b/c/**"]
    return lambda: built(place.given / "tree", place.out / "blob", prefetch=wanted, threads=2)


def tar_path(place: Place, stack: ExitStack) -> Run:
    return lambda: built(place.given / "tar", place.out / "blob", threads=2, compression="zstd")


def tar_prefetch(place: Place, stack: ExitStack) -> Run:
    return lambda: built(place.given / "tar", place.out / "blob", threads=2, prefetch=["hard"])


def tar_pipe(place: Place, stack: ExitStack) -> Run:
    pipe = fed(place.given / "tar", stack)
    return lambda: built(pipe, place.out / "blob", threads=2, compression="gzip")


def gzip_to_pipe(place: Place, stack: ExitStack) -> Run:
    drain = Drain(stack, place.out / "pipe")

    def run() -> object:
        digest = built(place.given / "tar.gz", place.out / "pipe", threads=2)
        return lambda: (digest, drain.seen() == digest)

    return run


def gzip_pipe_prefetch(place: Place, stack: ExitStack) -> Run:
    pipe = fed(place.given / "tar.gz", stack)
    return lambda: built(pipe, place.out / "blob", threads=2, prefetch=["a/b/2"])


def zstd_to_object(place: Place, stack: ExitStack) -> Run:
    def run() -> object:
        sink = io.BytesIO()
        digest = built(place.given / "zst", sink, threads=3)
        return digest, hashlib.sha256(sink.getvalue()).hexdigest()

    return run


def writer(place: Place, stack: ExitStack) -> Run:
    tar = (place.given / "tar").read_bytes()

    def run() -> object:
        with estargz.Writer(place.out / "blob", threads=2) as made:
            for begin in range(0, len(tar), 700_000):
                made.write(tar[begin : begin + 700_000])
        return made.layer.digest

    return run


def pool(place: Place, stack: ExitStack) -> Run:
    """One of a compressed tar and one of a tree, at the same time."""
    other = stack.enter_context(ThreadPoolExecutor(1))
    other.submit(int).result()  # the thread is ours, and is there

    def run() -> object:
        shared = estargz.Pool(2, 64 << 20)
        second = other.submit(built, place.given / "tar.gz", place.out / "2", pool=shared)
        try:
            first = built(place.given / "tree", place.out / "1", pool=shared)
        finally:
            second.exception()  # waits
        return first, second.result()

    return run


def extract_new(place: Place, stack: ExitStack) -> Run:
    return lambda: estargz.extract(place.given / "esgz", place.out / "tree", threads=3).entries


def extract_two(place: Place, stack: ExitStack) -> Run:
    """Over each other, into a directory that is there."""
    layers = [place.given / "tar.gz", place.given / "zst"]
    return lambda: estargz.extract(layers, place.out, threads=1).entries


def verify(place: Place, stack: ExitStack) -> Run:
    def run() -> object:
        report = estargz.verify(place.given / "esgz")
        return report.entries, report.chunks

    return run


def unpack(place: Place, stack: ExitStack) -> Run:
    return lambda: command("unpack", place.given / "esgz", "-o", place.out / "tar")


def command_build(place: Place, stack: ExitStack) -> Run:
    return lambda: command("build", place.given / "tree", "-o", place.out / "blob", "--threads", "2")


class CommandError(estargz.EstargzError):
    """What the command line said, and no descriptor of a layer."""


def command(*arguments: object) -> object:
    from contextlib import redirect_stderr, redirect_stdout

    from estargz.cli import main

    said, warned = io.TextIOWrapper(io.BytesIO()), io.TextIOWrapper(io.BytesIO())
    with redirect_stdout(said), redirect_stderr(warned):
        status = main([str(argument) for argument in arguments])
    said.flush()
    warned.flush()
    message = warned.buffer.getvalue().decode()
    if status:
        raise CommandError(message) if "Traceback" not in message else AssertionError(message)
    return said.buffer.getvalue().decode()


def read(place: Place, stack: ExitStack) -> Run:
    def run() -> object:
        with estargz.open(place.given / "esgz") as blob, blob.open("a/text") as file:
            file.seek(123)
            return blob.listdir("a"), hashlib.sha256(file.read()).hexdigest(), blob.read("hard").hex()

    return run


def read_cached(place: Place, stack: ExitStack) -> Run:
    """The cache's files may be there or not; nothing else may be left."""

    def run() -> object:
        with (
            closing(open_source(place.given / "esgz")) as source,
            CachedSource(source, directory=place.tmp, key="sha256:" + "ab" * 32) as cached,
            estargz.open(cached) as blob,
        ):
            return hashlib.sha256(blob.read("a/text")).hexdigest()

    return run


def variants(place: Place, stack: ExitStack) -> Run:
    """A cache is made, filled, asked, and emptied."""

    def run() -> object:
        folder = place.out / "cache"
        with VariantStore(folder, patience=1) as store:
            upload = store.upload()
            try:
                layer = estargz.build(place.given / "tree", upload, threads=1)
                key = VariantKey.of(layer.tar_digest, Options())
                store.add(key, layer, upload)
            except BaseException:
                upload.abort()
                raise
            found = store.find(key)
            assert found is not None
            with store.open(found) as blob:
                digest = hashlib.sha256()
                while piece := blob.read(1 << 20):
                    digest.update(piece)
        with VariantStore(folder, patience=1) as store:
            removed = store.prune(keep_storage=0, grace=0)
            return digest.hexdigest(), [(what.name, what.freed) for what in removed], store.usage()

    return run


def image_layout(place: Place, stack: ExitStack) -> Run:
    return exported(place, "type=oci,tar=false,compression=estargz", place.out / "layout")


def image_archive(place: Place, stack: ExitStack) -> Run:
    return exported(place, "type=oci,compression=zstd", place.out / "image.tar")


def exported(place: Place, line: str, dest: Path) -> Run:
    def run() -> object:
        image = estargz.Image.new("linux/amd64").append(place.given / "lower").append(place.given / "tar.gz")
        return image.export(f"{line},dest={dest}", pool=estargz.Pool(2)).descriptor.digest

    return run


def push(place: Place, stack: ExitStack) -> Run:
    name = f"{place.registry.host}/{place.repository()}:1"

    def run() -> object:
        with small(place.given) as image:
            line = f"type=image,name={name},push=true,compression=estargz"
            return image.export(line, pool=estargz.Pool(2)).descriptor.digest

    return run


def pull(place: Place, stack: ExitStack) -> Run:
    source, dest = f"docker://{place.registry.host}/given:1", f"oci:{place.out}/layout:1"
    return lambda: estargz.convert(source, dest, compression="zstd", pool=estargz.Pool(2)).descriptor.digest


def read_url(place: Place, stack: ExitStack) -> Run:
    found = place.registry.held("given", "1")
    url = f"http://{place.registry.host}/v2/given/blobs/{list(found)[-1]}"

    def run() -> object:
        with estargz.open(url) as blob:
            return blob.listdir("a"), hashlib.sha256(blob.read("a/text")).hexdigest(), blob.read("hard").hex()

    return run


# ------------------------------------------------------------------------------------------------------------- careless


def leaks_a_descriptor(place: Place, stack: ExitStack) -> Run:
    def run() -> object:
        handle = os.open(place.given / "tar", os.O_RDONLY)
        data = os.read(handle, 100)
        os.close(handle)
        return data.hex()

    return run


def ignores_an_error(place: Place, stack: ExitStack) -> Run:
    def run() -> object:
        with suppress(OSError):
            (place.out / "file").write_bytes(b"content")
        return "done"

    return run


def leaves_a_temporary_file(place: Place, stack: ExitStack) -> Run:
    def run() -> object:
        part = place.out / "file.part"
        part.write_bytes(b"content")
        part.rename(place.out / "file")
        return "done"

    return run


def trusts_a_count(place: Place, stack: ExitStack) -> Run:
    def run() -> object:
        with io.FileIO(place.given / "tar") as file:
            return hashlib.sha256(file.read(1 << 20)).hexdigest()

    return run


def look(place: Place) -> str:
    """What most careless functions do first."""
    os.close(os.open(place.given / "tar.gz", os.O_RDONLY))
    return "done"


def hopes_for_the_disk(place: Place, stack: ExitStack) -> Run:
    def run() -> object:
        with (place.out / "file").open("wb") as file, suppress(OSError):
            file.write(b"content")
            file.flush()
            os.fsync(file.fileno())
        return "done"

    return run


def tries_for_ever(place: Place, stack: ExitStack) -> Run:
    def run() -> object:
        while True:
            with suppress(OSError):
                return look(place)

    return run


def dies(place: Place, stack: ExitStack) -> Run:
    def run() -> object:
        try:
            return look(place)
        except OSError:
            os.abort()

    return run


def closes_twice(place: Place, stack: ExitStack) -> Run:
    def run() -> object:
        handle = os.open(place.given / "tar", os.O_RDONLY)
        try:
            os.close(handle)
        except OSError as error:
            with suppress(OSError):
                os.close(handle)
            raise estargz.SourceError(f"{place.given}: cannot be closed: {error.strerror}") from error
        return "done"

    return run


def says_too_little(place: Place, stack: ExitStack) -> Run:
    def run() -> object:
        try:
            return look(place)
        except OSError:
            raise estargz.SourceError("something went wrong") from None

    return run


def says_nothing(place: Place, stack: ExitStack) -> Run:
    def run() -> object:
        try:
            return look(place)
        except OSError:
            raise RuntimeError from None

    return run


def leaves_a_thread(place: Place, stack: ExitStack) -> Run:
    def run() -> object:
        waiting = threading.Event()
        threading.Thread(target=waiting.wait, args=(30,), daemon=True).start()
        look(place)
        waiting.set()
        return "done"

    return run


def spoils_the_next(place: Place, stack: ExitStack) -> Run:
    def run() -> object:
        if SPOILED:
            raise estargz.SourceError("still broken")
        try:
            return look(place)
        except OSError:
            SPOILED.append(True)
            raise

    return run


SPOILED: list[bool] = []


SCENARIOS = (
    tree_alone,
    tree_threads,
    tree_lower,
    tree_overlay,
    tree_prefetch,
    tar_path,
    tar_prefetch,
    tar_pipe,
    gzip_to_pipe,
    gzip_pipe_prefetch,
    zstd_to_object,
    writer,
    pool,
    extract_new,
    extract_two,
    verify,
    unpack,
    command_build,
    read,
    read_cached,
    variants,
    image_layout,
    image_archive,
    push,
    pull,
    read_url,
)

# Careless function, the fault that shows it, and what must be found.
CARELESS = (
    (leaks_a_descriptor, "read:0:EIO", "descriptor left"),
    (ignores_an_error, "openat:0:ENOSPC", "incomplete"),
    (leaves_a_temporary_file, "rename:0:EIO", "left behind"),
    (trusts_a_count, "read:0:half", "wrong result"),
    (hopes_for_the_disk, "fsync:0:EIO", "not noticed"),
    (tries_for_ever, "openat:0:EIO+", "hangs"),
    (dies, "openat:0:EMFILE", "died"),
    (closes_twice, "close:0:EIO", "was not open"),
    (says_too_little, "openat:0:EIO", "without its cause"),
    (says_nothing, "openat:0:EIO", "unclear error"),
    (leaves_a_thread, "openat:0:EIO", "threads left"),
    (spoils_the_next, "openat:0:EIO", "does not work again"),
)
