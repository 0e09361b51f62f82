"""Inside somebody else's process: threads, asyncio, forks, other interpreters, the end of all, and little memory."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import hashlib
import io
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from conftest import IS_ROOT, missing
from tars import END, blob_of, entry, in_thread, nothing_leaks
from trees import Tree

import estargz
from estargz import EstargzError, Pool, VariantStore, Writer
from estargz._inflate_ahead import InflateAhead
from estargz.errors import CacheError

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

MIB = 1 << 20
RNG = random.Random(7)
TEXT = b"".join(RNG.choices([RNG.randbytes(RNG.randrange(2, 12)) for _ in range(5000)], k=350_000))
TAR = b"".join(entry(b"f%d" % i, TEXT[i * 99 :][: 2_000_000 >> i % 6]) for i in range(12)) + END
DIGEST, BLOB = blob_of(TAR, threads=1)


def digest_of_build(pool: Pool | None = None, threads: int = 2) -> str:
    """What a build makes of TAR; a function that other processes can be asked for."""
    sink = io.BytesIO()
    layer = estargz.build(io.BytesIO(TAR), sink, pool=pool, threads=threads)
    assert layer.digest == "sha256:" + hashlib.sha256(sink.getvalue()).hexdigest()
    return layer.digest


class Endless:
    """A tar without an end, until it is told to stop."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.part = entry(b"again", TEXT[:100_000])
        self.rest = b""

    def read(self, size: int) -> bytes:
        if self.stop.is_set():
            raise InterruptedError("enough")
        if not self.rest:
            self.rest = self.part
        data, self.rest = self.rest[:size], self.rest[size:]
        return data


class Nothing:
    def write(self, data: bytes) -> None:
        pass


@contextlib.contextmanager
def building(pool: Pool | None = None) -> Iterator[None]:
    """Another thread builds meanwhile."""
    source = Endless()

    def build() -> None:
        with contextlib.suppress(InterruptedError):
            estargz.build(source, Nothing(), pool=pool, threads=2)

    thread = in_thread(build)
    try:
        time.sleep(0.05)
        yield
    finally:
        source.stop.set()
        thread.join(20)
    assert not thread.is_alive()


def end_in_time() -> None:
    """A child that hangs is ended by the system, wherever it hangs."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(20)


def in_child(work: Callable[[], object]) -> None:
    """Runs in a child that was forked, which must end by itself and say that all is well."""
    child = os.fork()
    if child == 0:
        try:
            end_in_time()
            work()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def run_python(code: str, *arguments: str, status: int = 0) -> str:
    """A program of its own that has TAR as a file; what it printed."""
    text = "import sys, threading, time, io, os, estargz\n" + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", text, *arguments],
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )
    assert (done.returncode, done.stderr) == (status, ""), done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("embedding") / "tar"
    path.write_bytes(TAR)
    return path


# --- threads, asyncio


def test_many_threads_at_once() -> None:
    pool = Pool(2)
    with nothing_leaks():
        with ThreadPoolExecutor(16) as executor:
            alone = list(executor.map(lambda number: digest_of_build(threads=1 + number % 3), range(16)))
            pooled = list(executor.map(lambda _: digest_of_build(pool), range(32)))
        assert set(alone + pooled) == {DIGEST.digest}
    assert not any(pool.crew.usage().values())


def test_asyncio() -> None:
    async def all_of_them() -> list[str]:
        loop = asyncio.get_running_loop()
        others = [loop.run_in_executor(None, digest_of_build) for _ in range(4)]
        return list(await asyncio.gather(*(asyncio.to_thread(digest_of_build) for _ in range(4)), *others))

    with nothing_leaks():
        assert set(asyncio.run(all_of_them())) == {DIGEST.digest}


def test_asyncio_that_gives_up() -> None:
    """A task is cancelled, not its thread: the progress callback is how the build comes to know."""
    given_up = threading.Event()
    source = Endless()

    def progress(done: int) -> None:
        if given_up.is_set():
            raise InterruptedError("given up")

    async def give_up() -> None:
        task = asyncio.create_task(asyncio.to_thread(estargz.build, source, Nothing(), progress=progress))
        await asyncio.sleep(0.1)
        task.cancel()
        given_up.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    with nothing_leaks():
        asyncio.run(give_up())


def test_build_within_a_build() -> None:
    """A destination that builds, a source that builds, and a callback that builds."""
    inner: list[str] = []

    class Dest(io.BytesIO):
        def write(self, data: Any) -> int:
            inner.append(digest_of_build())
            return super().write(data)

    class Source(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() == 0:
                inner.append(digest_of_build())
            return super().read(size)

    layer = estargz.build(Source(TAR), Dest(), threads=2, progress=lambda _: inner.append(digest_of_build()))
    assert layer.digest == DIGEST.digest
    assert set(inner) == {DIGEST.digest}


def test_garbage_collection_during_builds() -> None:
    """Of builds that others run, and of writers that nobody has finished."""
    threshold = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        with nothing_leaks(), ThreadPoolExecutor(4) as executor:
            futures = [executor.submit(digest_of_build) for _ in range(8)]
            for number in range(20):
                circle: list[object] = [Writer(io.BytesIO(), threads=1 + number % 3)]
                circle[0].write(TAR[:3_000_000])  # type: ignore[attr-defined]
                circle.append(circle)
                del circle
                gc.collect()
            assert {future.result() for future in futures} == {DIGEST.digest}
    finally:
        gc.set_threshold(*threshold)


def test_signals_that_the_embedder_handles() -> None:
    """A handler that returns does no harm, however often it is called."""
    calls: list[int] = []
    previous = signal.signal(signal.SIGALRM, lambda *_: calls.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
    try:
        until = time.monotonic() + 1
        while time.monotonic() < until:
            assert digest_of_build() == DIGEST.digest
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert len(calls) > 10


# --- processes


@pytest.mark.parametrize("pooled", [False, True])
def test_fork_while_another_thread_builds(pooled: bool) -> None:
    pool = Pool(2) if pooled else None
    with building(pool):
        for _ in range(10):
            in_child(lambda: digest_of_build(pool) == DIGEST.digest or os._exit(3))


def test_fork_while_another_thread_imports() -> None:
    """The first use of a name imports what is behind it."""
    run_python("""
        import importlib.abc, signal, warnings

        class Slow(importlib.abc.MetaPathFinder):
            def find_spec(self, name, *rest):
                if name == "estargz._layer":
                    begun.set()
                    time.sleep(0.3)

        warnings.simplefilter("ignore", DeprecationWarning)     # of forks beside threads
        begun = threading.Event()
        sys.meta_path.insert(0, Slow())
        thread = threading.Thread(target=lambda: estargz.build)
        thread.start()
        begun.wait()
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            estargz.build(io.BytesIO(bytes(1024)), io.BytesIO())
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        thread.join()
    """)


def test_pool_of_the_parent() -> None:
    """The child's pool is its own: the parent has all seats and all memory of this one."""
    pool = Pool(1, memory=21 * MIB)

    def build() -> None:
        usage = pool.crew.usage()
        assert not any(usage.values()), usage
        assert digest_of_build(pool) == DIGEST.digest
        assert (pool.threads, pool.memory) == (1, 21 * MIB)
        in_child(lambda: digest_of_build(pool))

    with building(pool):
        assert pool.crew.usage()["builds"] == 1
        in_child(build)


@pytest.mark.parametrize("pooled", [False, True])
def test_build_of_the_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pooled: bool) -> None:
    """What a parent has begun is refused in its child, dropping it there does no harm, and the parent's blob is whole."""
    monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY | os.O_WRONLY)  # so that the file has a name meanwhile
    writer = Writer(tmp_path / "blob", threads=3, pool=Pool(2) if pooled else None)
    writer.write(TAR[:6_000_000])

    def misuse() -> None:
        for step in (lambda: writer.write(TAR), writer.close):
            with pytest.raises(EstargzError, match="another process|closed"):
                step()
        writer.abort()
        gc.collect()

    for _ in range(5):
        in_child(misuse)
    in_child(lambda: globals().update(writer=None))
    writer.write(TAR[6_000_000:])
    assert writer.close().digest == DIGEST.digest
    assert (tmp_path / "blob").read_bytes() == BLOB
    assert [path.name for path in tmp_path.iterdir()] == ["blob"]


@pytest.mark.parametrize("where", ["progress", "write"])
@pytest.mark.parametrize("pooled", [False, True])
def test_fork_within_a_build(where: str, pooled: bool) -> None:
    """A callback that forks, and a child that leaves by an exception instead of os._exit."""
    parent, children = os.getpid(), []

    def fork(*_: object) -> None:
        if len(children) < 3:
            children.append(os.fork())
            if children[-1] == 0:
                end_in_time()
                raise SystemExit(7)

    class Dest(io.BytesIO):
        def write(self, data: Any) -> int:
            if where == "write":
                fork()
            return super().write(data)

    sink = Dest()
    try:
        source = gzip.compress(TAR * 4, 1) if where == "progress" else TAR
        pool = Pool(2) if pooled else None
        slow = Slow(source) if where == "progress" else io.BytesIO(source)
        layer = estargz.build(slow, sink, threads=2, pool=pool, progress=fork if where == "progress" else None)
    except BaseException as error:
        if os.getpid() == parent:
            raise
        os._exit(7 if isinstance(error, SystemExit) else 1)
    assert os.getpid() == parent, "the child went on with its parent's build"
    assert children
    for child in children:
        # A child that was forked by a thread of the pipeline ends with that thread.
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in ((7,) if where == "progress" else (7, 0))
    assert layer.digest == "sha256:" + hashlib.sha256(sink.getvalue()).hexdigest()


class Slow(io.BytesIO):
    """Takes long enough for the progress callback to be called."""

    def readinto(self, buffer: Any) -> int:
        time.sleep(0.05)
        return super().readinto(memoryview(buffer)[:200_000])


def test_compressed_tar_that_the_parent_reads() -> None:
    """Its threads are the parent's: the child is told so, and does not wait for them."""
    with InflateAhead(gzip.compress(TAR, 1), "gzip", threads=2) as stream:
        first = stream.read(100)

        def read_on() -> None:
            with pytest.raises(EstargzError, match="another process"):
                stream.read(1 << 24)
            stream.close()

        in_child(read_on)
        assert first + stream.read() == TAR


def test_cache_of_the_parent(tmp_path: Path) -> None:
    """Its locks and its tables' connection are the parent's, also when the child lets go of it."""
    estargz.Image.new("linux/amd64").append(io.BytesIO(TAR)).export(
        f"type=oci,tar=false,dest={tmp_path}/image,name=a:1"
    )

    def misuse() -> None:
        with pytest.raises(CacheError, match=r"opened by another process; open the cache after fork"):
            cache.usage()
        cache.close()

    with VariantStore(tmp_path / "cache") as cache:
        estargz.convert(f"oci:{tmp_path}/image", f"oci:{tmp_path}/out:1", compression="zstd", cache=cache)
        in_child(misuse)
        assert [usage.in_use for usage in cache.usage()] == [True]
        assert cache.prune(keep_storage=0) == []


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_process_pools(method: str) -> None:
    """Workers of every kind, while the parent builds with a pool of its own."""
    with building(Pool(2)), ProcessPoolExecutor(2, multiprocessing.get_context(method)) as executor:
        assert set(executor.map(digest_of_build, [None] * 4)) == {DIGEST.digest}


# --- the interpreter


ENDS = {
    "sys.exit": ("sys.exit(0)", 0),
    "exception": ("os.close(2); raise ZeroDivisionError", 1),
    "os._exit": ("os._exit(5)", 5),
    "end": ("pass", 0),
}


@pytest.mark.parametrize("end", ENDS)
def test_end_while_threads_build(tar: Path, end: str) -> None:
    """Daemon threads are left where they are; nothing crashes, nothing hangs."""
    statement, status = ENDS[end]
    run_python(
        f"""
        class Slow(io.FileIO):
            def read(self, size=-1):
                time.sleep(0.001)
                return super().read(size)
        class Nothing:
            def write(self, data): pass
        def build(number):
            while True:
                source = Slow(sys.argv[1]) if number % 2 else sys.argv[1]
                estargz.build(source, Nothing(), threads=2, pool=pool if number > 2 else None)
        pool = estargz.Pool(2)
        for number in range(6):
            threading.Thread(target=build, args=(number,), daemon=True).start()
        time.sleep(0.3)
        {statement}
        """,
        str(tar),
        status=status,
    )


def test_process_that_outlives_its_interpreter(tar: Path) -> None:
    """Threads that come back from a build's work then stay where they are, as those do that come back from a read."""
    run_python(
        """
        import ctypes
        class Nothing:
            def write(self, data): pass
        def build():
            while True:
                estargz.build(sys.argv[1], Nothing(), threads=2)
        library = ctypes.CDLL(None)
        library.on_exit(library.sleep, None)    # is called with the exit status
        for number in range(4):
            threading.Thread(target=build, daemon=True).start()
        time.sleep(0.2)
        sys.exit(1)
        """,
        str(tar),
        status=1,
    )


def test_end_waits_for_threads_that_are_no_daemons(tar: Path) -> None:
    shown = run_python(
        """
        def build():
            time.sleep(0.3)
            print(estargz.build(sys.argv[1], io.BytesIO(), threads=3).digest)
        estargz.build
        threading.Thread(target=build).start()
        sys.exit(0)
        """,
        str(tar),
    )
    assert shown.strip() == DIGEST.digest


def test_build_at_exit(tar: Path) -> None:
    """With threads where the interpreter still starts some, and with one thread in any case."""
    shown = run_python(
        """
        import atexit
        def build():
            print(estargz.build(sys.argv[1], io.BytesIO(), threads=1).digest)
        atexit.register(build)
        """,
        str(tar),
    )
    assert shown.strip() == DIGEST.digest


def interpreters() -> Any:
    for name in ("_interpreters", "_xxsubinterpreters"):
        with contextlib.suppress(ImportError):
            return import_module(name)
    missing("this interpreter has no module for subinterpreters")
    return None


@pytest.mark.parametrize("isolated", [True, False])
def test_subinterpreters_are_refused(isolated: bool) -> None:
    module = interpreters()
    new: Any = {True: "isolated", False: "legacy"}[isolated]
    other = module.create(new) if sys.version_info >= (3, 13) else module.create(isolated=isolated)
    code = f"import sys; sys.path[:0] = {sys.path!r}\nimport estargz\nestargz.build"
    try:
        failure = module.run_string(other, code)
        message = str(failure and failure.msg)
    except Exception as error:
        message = str(error)
    finally:
        module.destroy(other)
    assert "estargz runs in a process's main interpreter only, and this is a subinterpreter; use threads" in message
    assert digest_of_build() == DIGEST.digest


# --- a cgroup's memory


@pytest.fixture
def small_memory(root: None) -> Iterator[Callable[[int], Path]]:
    """Makes cgroups of so many MiB."""
    v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    made: list[Path] = []

    def make(mebibytes: int) -> Path:
        is_v1 = (v1 / "memory.limit_in_bytes").exists()
        folder = (v1 if is_v1 else v2) / f"estargz-test-{os.getpid()}-{len(made)}"
        try:
            folder.mkdir()
            made.append(folder)
            (folder / ("memory.limit_in_bytes" if is_v1 else "memory.max")).write_text(str(mebibytes << 20))
        except OSError as error:
            pytest.skip(f"the kernel gives no cgroup with a memory limit here: {error}")
        return folder

    yield make
    for folder in made:
        folder.rmdir()


@pytest.fixture(scope="module")
def big_tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """210 MB, a half of it noise, one file of 60 MB."""
    folder = tmp_path_factory.mktemp("big")
    tree = Tree(folder / "tree")
    for number in range(100):
        tree.file(f"{number % 7}/{number}", TEXT[number * 99 :][:1_500_000] if number % 2 else RNG.randbytes(1_500_000))
    tree.file("big", RNG.randbytes(60_000_000))
    yield folder / "tree"
    shutil.rmtree(folder)


def run_in(group: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A command in a cgroup, whose OOM killer would end it."""
    program = "import sys; from estargz.cli import main; sys.exit(main())"
    enter = f'echo $$ > "{group}/cgroup.procs"; exec "$@"'
    command = ["sh", "-c", enter, "sh", sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.timeout(400)  # where little memory is, much is read again
@pytest.mark.skipif(not IS_ROOT, reason="needs root: cgroups")
def test_builds_with_little_memory(small_memory: Callable[[int], Path], big_tree: Path, tmp_path: Path) -> None:
    small = small_memory(64)
    tar, blob, layout = tmp_path / "tar", tmp_path / "blob", tmp_path / "layout"
    subprocess.run(["tar", "-C", big_tree, "-cf", tar, "."], check=True)
    commands: list[tuple[object, ...]] = [
        *(
            ("build", big_tree, "-o", blob, "--compression", kind)
            for kind in ("gzip", "zstd", "uncompressed", "estargz")
        ),
        ("build", big_tree, "-o", blob, "--compression", "zstd", "--level", "8"),
        ("build", tar, "-o", blob),
        ("extract", blob, tmp_path / "extracted"),
        (
            "image",
            "build",
            "--layer",
            big_tree,
            "--layer",
            tar,
            "--output",
            f"type=oci,tar=false,dest={layout},name=a:1",
        ),
        (
            "convert",
            f"oci:{layout}",
            f"oci:{tmp_path}/other:1",
            "--compression",
            "estargz",
            "--cache",
            tmp_path / "cache",
        ),
    ]
    for command in commands:
        done = run_in(small, *command)
        assert done.returncode == 0, (command, done)


@pytest.mark.timeout(300)
@pytest.mark.skipif(not IS_ROOT, reason="needs root: cgroups")
def test_large_compressors_with_little_memory(small_memory: Callable[[int], Path], tmp_path: Path) -> None:
    """They succeed where there is room for them and are refused where there is none, and nobody is killed."""
    noise = Tree(tmp_path / "tree")
    for number in range(20):
        noise.file(str(number), RNG.randbytes(1_000_000))
    tar, layout, blob = tmp_path / "tar.gz", tmp_path / "layout", tmp_path / "blob"
    subprocess.run(["tar", "-C", tmp_path / "tree", "-czf", tar, "."], check=True)
    image = estargz.Image.new("linux/amd64").append(tmp_path / "tree").append(tar)
    image.export(f"type=oci,tar=false,dest={layout},name=a:1")
    output = f"type=oci,dest={tmp_path}/image.tar,compression=zstd,compression-level=10"
    commands: list[tuple[object, ...]] = [
        ("build", tar, "-o", blob, "--compression", "zstd", "--level", "10"),
        ("build", tmp_path / "tree", "-o", blob, "--compression", "zstd", "--level", "10"),
        ("convert", f"oci:{layout}", f"oci:{tmp_path}/out:1", "--compression", "zstd", "--level", "10"),
        ("image", "build", "--layer", tar, "--layer", tmp_path / "tree", "--output", output),
    ]
    for command in commands:
        statuses = []
        for mebibytes in range(72, 100, 4):
            done = run_in(small_memory(mebibytes), *command)
            assert done.returncode == 0 or "this level's compressor takes 25 MiB" in done.stderr, (
                mebibytes,
                command,
                done,
            )
            statuses.append(done.returncode)
        assert statuses == sorted(statuses, reverse=True) and set(statuses) == {0, 2}


@pytest.mark.skipif(not IS_ROOT, reason="needs root: cgroups")
def test_images_whose_layers_are_kept_need_no_compressor(small_memory: Callable[[int], Path], tmp_path: Path) -> None:
    Tree(tmp_path / "tree").file("a", b"text")
    image = estargz.Image.new("linux/amd64").append(tmp_path / "tree")
    image.export(f"type=oci,tar=false,dest={tmp_path}/layout,name=a:1,compression=zstd")
    zstd = ("--compression", "zstd", "--level", "19")
    done = run_in(small_memory(64), "convert", f"oci:{tmp_path}/layout", f"oci:{tmp_path}/out:1", *zstd)
    assert done.returncode == 0, done.stderr
