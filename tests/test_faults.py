"""What goes wrong: full disks, failing callers, signals, unreadable files. The same error each time, and no traces."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import IS_ROOT
from reference.blobs import tar_of
from tars import END, blob_of, entry, everything, in_thread, nothing_leaks
from trees import Tree

import estargz
from estargz import ChangedError, EstargzError, SinkError, SourceError, TarError, UsageError, Writer, _pipeline
from estargz._tar_order import TarOrder
from estargz._walk import TreeWalk

pytestmark = pytest.mark.timeout(60)

RNG = random.Random(28)
NOISE = tar_of(*((f"f{i}", RNG.randbytes(500_000)) for i in range(16)))  # 8 MB that stay 8 MB
SMALL = everything() + END
WALK: dict[str, Any] = {"overlay": False, "epoch": None, "landmarks_reserved": True}
PROGRAM = [sys.executable, "-c", "import sys; from estargz.cli import main; sys.exit(main())"]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def started(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    """The command, its output kept."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen([*PROGRAM, *map(str, arguments)], **pipes)


def finished(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    """Exit status and messages."""
    _, messages = process.communicate(timeout=30)
    return process.returncode, messages.decode()


@contextlib.contextmanager
def without_rights() -> Iterator[None]:
    """Root reads everything, so somebody else builds."""
    if not IS_ROOT:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


# --- no room


@pytest.fixture
def tiny_disk(root: None, tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_full_disk(tiny_disk: Path, threads: int) -> None:
    with (
        nothing_leaks(),
        pytest.raises(SinkError, match="blob: cannot be written: No space left on device; free") as caught,
    ):
        estargz.build(io.BytesIO(NOISE), tiny_disk / "blob", threads=threads)
    assert caught.value.errno == errno.ENOSPC
    assert names_in(tiny_disk) == []
    assert shutil.disk_usage(tiny_disk).used == 0


def test_full_disk_keeps_what_was_there(tiny_disk: Path) -> None:
    (tiny_disk / "blob").write_bytes(b"old")
    with pytest.raises(SinkError):
        estargz.build(io.BytesIO(NOISE), tiny_disk / "blob")
    assert (tiny_disk / "blob").read_bytes() == b"old"


@pytest.mark.parametrize("compression", ["estargz", "gzip", "zstd", "uncompressed"])
def test_file_size_limit(tmp_path: Path, compression: str) -> None:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, old[1]))
    try:
        with nothing_leaks(), pytest.raises(SinkError, match="cannot be written: File too large"):
            estargz.build(io.BytesIO(NOISE), tmp_path / "blob", compression=compression)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("tar", [SMALL, NOISE], ids=["small", "large"])
def test_full_device(tar: bytes) -> None:
    with (
        nothing_leaks(),
        pytest.raises(SinkError, match="^/dev/full: cannot be written: No space left on device") as caught,
    ):
        estargz.build(io.BytesIO(tar), "/dev/full")
    assert caught.value.errno == errno.ENOSPC
    assert isinstance(caught.value, OSError)
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OSError, match="No space left") as raised:
        estargz.build(io.BytesIO(tar), full)
    assert not isinstance(raised.value, EstargzError)


# --- destinations that fail


class Spoiled(Exception):
    pass


class Failing:
    """Raises at its n-th write, counted from 0, and must not be called again."""

    def __init__(self, at: int) -> None:
        self.left = at
        self.raised = False

    def write(self, data: bytes) -> int:
        assert not self.raised, "called after it had failed"
        if not self.left:
            self.raised = True
            raise Spoiled(f"after {len(data)}")
        self.left -= 1
        return len(data)


def writes_of(tar: bytes, **options: Any) -> int:
    calls = []
    Counter = type("Counter", (), {"write": lambda self, data: calls.append(len(data))})
    estargz.build(io.BytesIO(tar), Counter(), **options)
    return len(calls)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("compression", ["estargz", "uncompressed"])
def test_destination_fails_at_each_write(threads: int, compression: str) -> None:
    """Batches, the table of contents, the footer: what the object raises arrives as it is."""
    options = {"threads": threads, "compression": compression}
    count = writes_of(NOISE, **options)
    assert count > 5
    with nothing_leaks():
        for at in range(count):
            dest = Failing(at)
            with pytest.raises(Spoiled, match="^after"):
                estargz.build(io.BytesIO(NOISE), dest, **options)  # type: ignore[arg-type]
            assert dest.raised
        estargz.build(io.BytesIO(NOISE), Failing(count), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("at", range(4))
def test_destination_fails_under_a_writer(at: int) -> None:
    with nothing_leaks():
        writer = Writer(Failing(at), threads=2)
        with pytest.raises(Spoiled):
            for start in range(0, len(NOISE), 100_000):
                writer.write(NOISE[start : start + 100_000])
            writer.close()
        with pytest.raises(EstargzError, match="the writer is closed"):
            writer.close()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, BrokenPipeError])
def test_destination_raises_anything(error: type[BaseException]) -> None:
    class Dest:
        def write(self, data: bytes) -> int:
            raise error

    with nothing_leaks(), pytest.raises(error):
        estargz.build(io.BytesIO(SMALL), Dest())


@pytest.mark.parametrize("call", ["write", "close", "abort"])
def test_destination_that_calls_its_writer(call: str) -> None:
    """It runs in a thread that the writer would wait for."""

    class Caller:
        def write(self, data: bytes) -> None:
            getattr(writer, call)(*[SMALL][: call == "write"])

    with nothing_leaks():
        writer = Writer(Caller(), threads=2)
        with pytest.raises(estargz.EstargzError, match="not to be closed by its own destination; raise"):
            writer.write(SMALL)
            writer.close()


def test_destination_takes_nothing() -> None:
    class Lazy:
        def write(self, data: bytes) -> int:
            return 0

    with nothing_leaks(), pytest.raises(SinkError, match="took nothing"):
        estargz.build(io.BytesIO(SMALL), Lazy())


def test_fault_in_the_source_comes_before_one_in_the_destination_behind_it() -> None:
    """Whichever comes first in the stream is told."""
    for threads in (1, 2, 4):
        with pytest.raises(TarError, match="checksum"):
            estargz.build(io.BytesIO(SMALL[:-1024] + b"x" * 512), Failing(1), threads=threads)


# --- paths


def test_unwritable_folder(scratch: Path) -> None:
    folder = scratch / "folder"
    folder.mkdir(mode=0o555)
    with nothing_leaks(), without_rights(), pytest.raises(SinkError) as caught:
        estargz.build(io.BytesIO(SMALL), folder / "blob")
    assert caught.value.errno == errno.EACCES
    assert str(caught.value).startswith(f"{folder}/blob: cannot be written: Permission denied; ")
    assert names_in(folder) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder", "folder: cannot be written: Is a directory"),
        ("gone/blob", "gone/blob: cannot be written: No such file or directory"),
        ("file/blob", "file/blob: cannot be written: Not a directory"),
        ("loop", "cannot be written: Too many levels of symbolic links"),
        ("n" * 256, "cannot be written: File name too long"),
    ],
)
def test_paths_that_cannot_be_written(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    before = names_in(tmp_path)
    with nothing_leaks():
        with pytest.raises(SinkError, match=message):
            estargz.build(io.BytesIO(SMALL), tmp_path / name)
        with pytest.raises(SinkError, match=message):
            Writer(tmp_path / name)
    assert names_in(tmp_path) == before


def test_symbolic_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to("other/blob")  # which is not there yet
    for _ in range(2):
        layer = estargz.build(io.BytesIO(SMALL), tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "other" / "blob").stat().st_size == layer.size
    assert names_in(tmp_path / "other") == ["blob"]


def test_way_up_behind_a_link(tmp_path: Path) -> None:
    """As the kernel goes it: ".." is where the link leads to, not where it lies."""
    (tmp_path / "other" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("other/deep")
    estargz.build(io.BytesIO(SMALL), f"{tmp_path}/link/../blob")
    with Writer(f"{tmp_path}/link/../written") as writer:
        writer.write(SMALL)
    assert names_in(tmp_path) == ["link", "other"]
    assert names_in(tmp_path / "other") == ["blob", "deep", "written"]


def test_pipe_in_the_file_system(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    received = []
    reader = in_thread(lambda: received.append((tmp_path / "pipe").read_bytes()))
    layer = estargz.build(io.BytesIO(NOISE), tmp_path / "pipe")
    reader.join(20)
    assert len(received[0]) == layer.size
    assert (tmp_path / "pipe").is_fifo()


def test_pipe_whose_reader_goes_away(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    def glance() -> None:
        with (tmp_path / "pipe").open("rb") as pipe:
            pipe.read(10)

    in_thread(glance)
    with pytest.raises(SinkError, match="Broken pipe") as caught:
        estargz.build(io.BytesIO(NOISE), tmp_path / "pipe")
    assert caught.value.errno == errno.EPIPE
    assert (tmp_path / "pipe").is_fifo()


def test_null_device() -> None:
    assert estargz.build(io.BytesIO(SMALL), "/dev/null") == blob_of(SMALL)[0]
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("call", ["fsync", "link", "replace"])
def test_commit_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, nothing_leaks():
        patch.setattr(os, call, refuse)
        with pytest.raises(SinkError, match="blob: cannot be written: Input/output error"):
            estargz.build(io.BytesIO(SMALL), tmp_path / "blob")
        writer = Writer(tmp_path / "blob")
        writer.write(SMALL)
        with pytest.raises(SinkError):
            writer.close()
        with pytest.raises(EstargzError):
            writer.close()
    assert names_in(tmp_path) == []


def test_commit_that_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the temporary name and the last one."""

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, nothing_leaks():
        patch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            estargz.build(io.BytesIO(SMALL), tmp_path / "blob")
    assert names_in(tmp_path) == []


def test_pipe_that_has_no_path(tmp_path: Path) -> None:
    """As /dev/stdout is one."""
    (tmp_path / "tar").write_bytes(SMALL)
    process = started("build", tmp_path / "tar", "-o", "/dev/stdout")
    assert process.stdout is not None
    assert blob_of(SMALL)[1] in process.communicate(timeout=30)[0]
    assert process.returncode == 0


# --- the caller


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, SystemExit])
@pytest.mark.parametrize("threads", [1, 3])
def test_progress_that_raises(tmp_path: Path, error: type[BaseException], threads: int) -> None:
    """The callback is called about ten times a second, so the build must take a while."""
    seen = []

    def progress(done: int) -> None:
        seen.append(done)
        raise error("enough")

    with nothing_leaks(), pytest.raises(error, match="enough"):
        estargz.build(Endless(), tmp_path / "blob", threads=threads, progress=progress)
    assert len(seen) == 1
    assert names_in(tmp_path) == []


class Endless:
    """A tar without an end."""

    def __init__(self) -> None:
        self.part = entry(b"again", RNG.randbytes(100_000)) * 3

    def read(self, size: int) -> bytes:
        return self.part[:4] if size == 4 else self.rest()

    def rest(self) -> bytes:
        part, self.part = self.part[4:] + self.part[:4], self.part[4:] + self.part[:4]
        self.read = lambda size: part  # type: ignore[method-assign]
        return part


def test_progress_counts_up() -> None:
    seen: list[int] = []

    class Slow(io.BytesIO):
        def write(self, data: Any) -> int:
            time.sleep(0.04)
            return len(data)

    layer = estargz.build(io.BytesIO(NOISE), Slow(), progress=seen.append, threads=2, memory=24 << 20)
    assert seen
    assert seen == sorted(seen)
    assert seen[-1] <= layer.uncompressed_size


@pytest.mark.parametrize("memory", [1, 1 << 20, 20 << 20])
def test_memory_that_is_not_enough(tmp_path: Path, memory: int) -> None:
    with (
        nothing_leaks(),
        pytest.raises(UsageError, match=r"too small for chunks of 4194304 bytes: give at least (\d+)") as caught,
    ):
        estargz.build(io.BytesIO(SMALL), tmp_path / "blob", memory=memory)
    assert names_in(tmp_path) == []
    least = int(str(caught.value).split("at least ")[1].split()[0])
    estargz.build(io.BytesIO(NOISE), tmp_path / "blob", memory=least)
    with pytest.raises(UsageError):
        estargz.build(io.BytesIO(SMALL), tmp_path / "blob", memory=least - 1)


def test_chunks_that_are_too_large_together() -> None:
    with pytest.raises(UsageError, match="exceed 2 GiB"):
        estargz.build(io.BytesIO(SMALL), io.BytesIO(), chunk_size=1 << 30, min_chunk_size=1 << 30)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_threads_that_cannot_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    real, count = _pipeline.start_new_thread, []

    def start(*arguments: Any) -> int:
        count.append(arguments)
        if len(count) > at:
            raise RuntimeError("can't start new thread")
        return real(*arguments)

    with nothing_leaks():
        with monkeypatch.context() as patch:
            patch.setattr(_pipeline, "start_new_thread", start)
            with pytest.raises(EstargzError, match="no further thread can be started: .*; lower --threads"):
                estargz.build(io.BytesIO(NOISE), tmp_path / "blob", threads=4)
        assert names_in(tmp_path) == []
    estargz.build(io.BytesIO(NOISE), tmp_path / "blob", threads=4)


@pytest.mark.parametrize("kernel", [partial(TarOrder, None, 0, 0, 10), partial(TreeWalk, None, 0, [0], **WALK)])
def test_kernels_without_a_builder(kernel: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match="builder"):
        kernel()


# --- files that cannot be read


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_the_first_unreadable_file_is_told(scratch: Path, threads: int) -> None:
    """Whichever thread finds whichever file first."""
    tree = Tree(scratch / "tree")
    for number in range(60):
        tree.file(f"{number:03}", RNG.randbytes(300_000), mode=0 if number > 16 and number % 2 else 0o644)
    found = set()
    for _ in range(10):
        with nothing_leaks(), without_rights(), pytest.raises(SourceError) as caught:
            estargz.build(scratch / "tree", io.BytesIO(), threads=threads)
        found.add(str(caught.value))
    assert found == {"017: cannot be opened: Permission denied; check that it exists and is readable"}


@pytest.mark.parametrize("threads", [1, 3])
def test_unreadable_directory(scratch: Path, threads: int) -> None:
    """Nothing stays open, although somebody keeps the exception and all that its traceback holds."""
    tree = Tree(scratch / "tree")
    for number in range(20):
        tree.file(f"a/b/c/{number:03}", RNG.randbytes(300_000))
    tree.dir("a/b/d/e", mode=0)
    with nothing_leaks(), without_rights(), pytest.raises(SourceError) as caught:
        estargz.build(scratch / "tree", io.BytesIO(), threads=threads)
    assert str(caught.value) == "a/b/d/e: cannot be opened: Permission denied; check that it exists and is readable"


def test_leaks_after_many_errors(tmp_path: Path) -> None:
    with nothing_leaks():
        for number in range(40):
            with pytest.raises(TarError):
                estargz.build(io.BytesIO(NOISE[: 4_000_000 + number]), tmp_path / "blob", threads=1 + number % 4)
            with pytest.raises(Spoiled):
                estargz.build(io.BytesIO(NOISE), Failing(number % 5), threads=1 + number % 4)
    assert names_in(tmp_path) == []


# --- signals


class Feeder:
    """Gives a process a tar that never ends, through a pipe."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.sent = 0
        part = entry(b"again", RNG.randbytes(100_000))

        def send() -> None:
            try:
                while True:
                    self.sent += self.pipe.write(part)
            except (BrokenPipeError, ValueError):
                pass

        in_thread(send)

    def wait_for(self, size: int) -> None:
        until = time.monotonic() + 20
        while self.sent < size:
            assert time.monotonic() < until
            time.sleep(0.005)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGKILL, -9)]
)
def test_signals_in_the_middle(tmp_path: Path, number: signal.Signals, status: int) -> None:
    process = started("build", "-", "-o", tmp_path / "blob", stdin=subprocess.PIPE, bufsize=0)
    feeder = Feeder(process.stdin)
    feeder.wait_for(20_000_000)
    process.send_signal(number)
    process.wait(20)
    assert process.returncode == status
    assert process.stderr is not None
    assert b"Traceback" not in process.stderr.read()
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("words", ["build tar -o dest/file", "unpack tar -o dest/file", "record -o dest/file true"])
def test_signals_while_a_file_gets_its_name(tmp_path: Path, words: str, number: signal.Signals) -> None:
    """Between the two calls that replace the target there is a name beside it."""
    (tmp_path / "tar").write_bytes(SMALL)
    (tmp_path / "dest").mkdir()
    (tmp_path / "dest" / "file").write_bytes(b"old")
    code = f"import os; os.replace = lambda *_: os.kill(os.getpid(), {int(number)}); {PROGRAM[-1]}"
    command = [sys.executable, "-c", code, *words.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=20, check=False)
    assert done.returncode == 128 + number, done.stderr
    assert names_in(tmp_path / "dest") == ["file"]
    assert (tmp_path / "dest" / "file").read_bytes() == b"old"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("begun", [b"", SMALL[:700]])
def test_signals_while_input_is_awaited(tmp_path: Path, number: signal.Signals, status: int, begun: bytes) -> None:
    process = started("build", "-", "-o", tmp_path / "blob", stdin=subprocess.PIPE, bufsize=0)
    assert process.stdin is not None
    process.stdin.write(begun)
    until = time.monotonic() + 10
    while "poll" not in Path(f"/proc/{process.pid}/wchan").read_text():
        if time.monotonic() > until:
            break
        time.sleep(0.01)
    time.sleep(0.3)  # without wchan: until it surely reads
    process.send_signal(number)
    assert process.wait(10) == status
    process.stdin.close()
    assert names_in(tmp_path) == []


# --- the command's output


def test_closed_standard_output(tmp_path: Path) -> None:
    (tmp_path / "tar").write_bytes(NOISE)
    read, write = os.pipe()
    os.close(read)
    process = started("build", tmp_path / "tar", "-o", "-", stdout=write)
    os.close(write)
    status, messages = finished(process)
    assert status == 1
    assert "Traceback" not in messages


def ends_of(kind: str) -> tuple[int, int]:
    """(to read from, to write to)"""
    if kind == "pipe":
        return os.pipe()
    ours, theirs = socket.socketpair()
    return ours.detach(), theirs.detach()


@pytest.mark.parametrize("kind", ["pipe", "socket"])
@pytest.mark.parametrize("piece", [1, 4095, 1 << 20])
def test_blob_through_a_slow_reader(tmp_path: Path, kind: str, piece: int) -> None:
    """Pages of a pipe that are used in part, and sockets that take less than they are offered."""
    (tmp_path / "tar").write_bytes(NOISE)
    read, write = ends_of(kind)
    process = started("build", tmp_path / "tar", "-o", "-", stdout=write)
    os.close(write)
    with open(read, "rb", buffering=0) as stream:
        beginning = b"".join(stream.read(piece) for _ in range(100))
        blob = beginning + b"".join(iter(lambda: stream.read(1 << 20), b""))
    assert finished(process)[0] == 0
    assert blob == blob_of(NOISE)[1]


def uneven() -> bytes:
    """Batches that become little leave the pages of a pipe half empty; the last ones are more than is left."""
    return tar_of(*((f"z{i}", bytes(1 << 20)) for i in range(120)), ("noise", RNG.randbytes(3_000_000)))


@pytest.mark.parametrize("kind", ["pipe", "socket"])
@pytest.mark.parametrize("tar", [lambda: NOISE, uneven], ids=["noise", "uneven"])
def test_signal_while_the_reader_has_stopped(tmp_path: Path, kind: str, tar: Callable[[], bytes]) -> None:
    (tmp_path / "tar").write_bytes(tar())
    read, write = ends_of(kind)
    process = started("build", tmp_path / "tar", "-o", "-", stdout=write)
    os.close(write)
    try:
        os.read(read, 1)
        time.sleep(1)  # until it surely waits for us
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 143
    finally:
        os.close(read)


def test_an_error_behind_a_reader_that_pauses(tmp_path: Path) -> None:
    """The error comes late, but it is that error."""
    tree = Tree(tmp_path / "tree")
    tree.file("a", RNG.randbytes(6_000_000))  # more than the pipe holds
    tree.file("b", b"")
    os.truncate(tmp_path / "tree" / "b", 200_000_000)  # more than is under way at once
    os.mkfifo(tmp_path / "pipe")
    cut = threading.Event()

    def cut_short(done: int) -> None:
        os.truncate(tmp_path / "tree" / "b", 10)
        cut.set()

    def pause() -> None:
        with (tmp_path / "pipe").open("rb") as stream:
            cut.wait(20)
            time.sleep(0.5)
            while stream.read(1 << 20):
                pass

    reader = in_thread(pause)
    with pytest.raises(ChangedError):
        estargz.build(tmp_path / "tree", tmp_path / "pipe", threads=2, progress=cut_short)
    reader.join(20)


def test_command_on_a_full_device(tmp_path: Path) -> None:
    (tmp_path / "tar").write_bytes(NOISE)
    with open("/dev/full", "wb") as full:
        for output, stdout in (("/dev/full", subprocess.PIPE), ("-", full)):
            status, messages = finished(started("build", tmp_path / "tar", "-o", output, stdout=stdout))
            assert status == 1
            assert "No space left on device" in messages
            assert "Traceback" not in messages


def test_descriptor_that_cannot_be_printed(tmp_path: Path) -> None:
    """The blob is whole by then, and is kept; the status tells."""
    (tmp_path / "tar").write_bytes(SMALL)
    with open("/dev/full", "wb") as full:
        status, messages = finished(started("build", tmp_path / "tar", "-o", tmp_path / "blob", stdout=full))
    assert status == 1
    assert "No space left on device" in messages
    assert (tmp_path / "blob").exists()


def test_source_that_changes(tmp_path: Path) -> None:
    """A file that is cut after it was listed, and while it is read."""
    tree = Tree(tmp_path / "tree")
    tree.file("file", RNG.randbytes(24_000_000))

    class Dest:
        def write(self, data: bytes) -> int:
            os.truncate(tmp_path / "tree" / "file", 10)
            return len(data)

    for threads in (1, 2):
        tree.file("file", RNG.randbytes(24_000_000))
        with nothing_leaks(), pytest.raises(ChangedError, match=r"^file: shrank while it was read"):
            estargz.build(tmp_path / "tree", Dest(), threads=threads, chunk_size=1 << 20, memory=20 << 20)
