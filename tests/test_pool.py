"""Builds side by side under one pool: bytes, threads, memory, turns, and what happens when one of them fails."""

from __future__ import annotations

import contextlib
import gc
import gzip
import io
import os
import random
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import zstandard
from reference.tar_headers import plain_header
from tars import END, base256, entry, in_thread, nothing_leaks
from trees import Tree

import estargz
from estargz import Compressor, Pool, SinkError, TarError, UsageError, Writer

pytestmark = pytest.mark.timeout(60)

MIB = 1 << 20
RNG = random.Random(11)
WORDS = [RNG.randbytes(RNG.randrange(2, 12)) for _ in range(5000)]
TEXT = b"".join(RNG.choices(WORDS, k=700_000))[: 4 * MIB]
TAR = b"".join(entry(b"f%d" % i, TEXT[i * 99 :][: 1_500_000 >> i % 8]) for i in range(24)) + END
HELD = ("seated", "builds", "promised", "allocated", "compressors")


def at_rest(pool: Pool) -> bool:
    """Whether nothing is taken of it."""
    return pool.crew.usage() == dict.fromkeys(HELD, 0)


def side_by_side(*works: Callable[[], Any]) -> list[Any]:
    """What each returns, or raises, all run at once by threads of their own."""
    results: list[Any] = [None] * len(works)

    def run(number: int) -> None:
        try:
            results[number] = works[number]()
        except BaseException as error:
            results[number] = error

    threads = [in_thread(partial(run, number)) for number in range(len(works))]
    for thread in threads:
        thread.join(50)
        assert not thread.is_alive(), "a build hangs"
    return results


@contextlib.contextmanager
def watched(pool: Pool) -> Iterator[dict[str, int]]:
    """The most that was in use at once, looked at all the time."""
    most = dict.fromkeys(HELD, 0)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.0005):
            for name, value in pool.crew.usage().items():
                most[name] = max(most[name], value)

    watcher = in_thread(watch)
    try:
        yield most
    finally:
        done.set()
        watcher.join()


class Nothing:
    """A destination that keeps nothing."""

    def write(self, data: bytes) -> None:
        pass


class Endless:
    """A tar of one file without an end; ``given`` bytes so far. Fails once it is told to stop."""

    def __init__(self) -> None:
        self.given = 0
        self.stop = False
        self._front = plain_header(b"endless", size=base256(1 << 50, 12))
        self._piece = TEXT[:MIB]

    def read(self, size: int) -> bytes:
        if self.stop:
            raise InterruptedError
        data, self._front = self._front[:size] or self._piece[:size], self._front[size:]
        self.given += len(data)
        return data


def sources(folder: Path) -> dict[str, Callable[[], Any]]:
    """A tar in every form, and a tree."""
    (folder / "tar").write_bytes(TAR)
    packed = b"".join(gzip.compress(TAR[at : at + 3 * MIB], 1, mtime=0) for at in range(0, len(TAR), 3 * MIB))
    (folder / "tar.gz").write_bytes(packed)
    tree = Tree(folder / "tree")
    for i in range(60):
        tree.file(f"{i % 7}/{i}", TEXT[i * 999 :][: 3_000_000 >> i % 14])
    return {
        "tar": lambda: folder / "tar",
        "tar.gz": lambda: folder / "tar.gz",
        "tar.zst": lambda: io.BytesIO(zstandard.compress(TAR, 1)),
        "object": lambda: io.BytesIO(TAR),
        "tree": lambda: folder / "tree",
    }


# --- bytes


@pytest.mark.parametrize("compression", ["estargz", "gzip", "zstd", "uncompressed"])
def test_bytes(tmp_path: Path, compression: str) -> None:
    found = sources(tmp_path)
    alone = {name: estargz.build(source(), Nothing(), compression=compression) for name, source in found.items()}
    for threads in (1, 2, 3):
        pool = Pool(threads)
        build = partial(estargz.build, dest=Nothing(), compression=compression, pool=pool)
        with nothing_leaks():
            made = side_by_side(*(partial(build, source()) for source in found.values()))
        assert made == list(alone.values())
        assert at_rest(pool)


def test_bytes_of_different_layers(tmp_path: Path) -> None:
    """Compressors pass from one build to another, of another kind; memory of one size makes room for another's."""
    (tmp_path / "tar").write_bytes(TAR)
    (tmp_path / "tar.gz").write_bytes(gzip.compress(TAR, 1))
    ways: list[dict[str, Any]] = [
        {"level": 1},
        {"level": 6, "chunk_size": 100_000},
        {"compression": "gzip", "level": 3},
        {"compression": "zstd", "level": 1},
        {"compression": "zstd", "level": 5},
        {"compression": "uncompressed"},
        {"prefetch": ["f20", "f3"]},
    ]
    for source in (tmp_path / "tar", tmp_path / "tar.gz"):
        alone = [estargz.build(source, Nothing(), **way) for way in ways]
        pool = Pool(2, 90 * MIB)
        with watched(pool) as most:
            made = side_by_side(*(partial(estargz.build, source, Nothing(), pool=pool, **way) for way in ways))
        assert made == alone
        assert most["compressors"] <= 2
        assert most["allocated"] <= 90 * MIB
        assert most["promised"] <= 90 * MIB
        assert at_rest(pool)


def test_writers_and_compressors() -> None:
    alone = estargz.build(io.BytesIO(TAR), Nothing())
    pool = Pool(2)
    compressor = Compressor(pool=pool)

    def write() -> estargz.Layer:
        with compressor(io.BytesIO(), "application/vnd.oci.image.layer.v1.tar+gzip") as writer:
            for at in range(0, len(TAR), 77_777):
                writer.write(TAR[at : at + 77_777])
        return writer.layer

    assert side_by_side(*[write] * 5) == [alone] * 5
    assert at_rest(pool)


def test_one_after_the_other() -> None:
    pool = Pool(3)
    made = {estargz.build(io.BytesIO(TAR), Nothing(), pool=pool) for _ in range(3)}
    assert made == {estargz.build(io.BytesIO(TAR), Nothing())}
    assert at_rest(pool)


# --- threads


@pytest.mark.measured
@pytest.mark.parametrize("kind", ["tree", "tar", "tar.gz"])
def test_no_more_threads_compute(tmp_path: Path, kind: str) -> None:
    """With one seat, builds take no more CPU time than time goes by; what need not be seated costs little here."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("this machine has one CPU")
    source = sources(tmp_path)[kind]
    pool = Pool(1)
    with watched(pool) as most, (tmp_path / "null").open("wb", buffering=0) as null:
        wall, cpu = time.perf_counter(), time.process_time()
        made = side_by_side(*[lambda: estargz.build(source(), null, level=6, pool=pool).size] * 5)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert len(set(made)) == 1
    assert most["seated"] == 1
    assert cpu <= 1.15 * wall


def test_waiting_is_no_work() -> None:
    """The stages of a build say what it computed, not how long it waited for its turn."""
    alone = estargz.build(io.BytesIO(TAR), Nothing(), level=6, threads=1)
    pool = Pool(1)
    made = side_by_side(*[lambda: estargz.build(io.BytesIO(TAR), Nothing(), level=6, pool=pool)] * 6)
    works = [sum(layer.stages[name] for name in ("read", "hash", "compress", "order")) for layer in made]
    assert all(layer == alone for layer in made)
    assert sum(layer.stages["wait"] for layer in made) > sum(works)


def test_without_descriptors() -> None:
    """Threads in the queue for a seat wait for a byte from a pipe, or do without one."""
    alone = estargz.build(io.BytesIO(TAR), Nothing())
    pool = Pool(1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        made = side_by_side(*[lambda: estargz.build(io.BytesIO(TAR), Nothing(), pool=pool)] * 4)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert made == [alone] * 4
    assert at_rest(pool)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_small_layer_does_not_wait_for_a_large_one(threads: int) -> None:
    """Measured by what the large one takes in meanwhile: about as much in turns, and what fits into its memory."""
    pool = Pool(threads)
    large = Endless()
    failures: list[BaseException] = []

    def build_large() -> None:
        try:
            estargz.build(large, Nothing(), level=6, pool=pool)
        except InterruptedError as error:
            failures.append(error)

    running = in_thread(build_large)
    while large.given < 40 * MIB:
        time.sleep(0.001)
    before = large.given
    layer = estargz.build(io.BytesIO(TAR), Nothing(), level=6, pool=pool)
    meanwhile = large.given - before
    assert running.is_alive()
    assert layer == estargz.build(io.BytesIO(TAR), Nothing(), level=6)
    assert meanwhile < 6 * len(TAR)
    large.stop = True
    running.join(20)
    assert len(failures) == 1
    assert at_rest(pool)


@pytest.mark.parametrize("where", ["source", "destination", "progress"])
def test_who_waits_does_not_keep_others_waiting(where: str) -> None:
    pool = Pool(1)
    go_on, stuck = threading.Event(), threading.Event()

    def hold(*_: object) -> None:
        stuck.set()
        assert go_on.wait(50)

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > len(TAR) // 2:
                hold()
            return super().read(size)

    class Full:
        write = hold

    source = Slow(TAR) if where == "source" else Endless() if where == "progress" else io.BytesIO(TAR)
    failed: list[BaseException] = []

    def build_slow() -> None:
        try:
            estargz.build(
                source,
                Full() if where == "destination" else Nothing(),
                pool=pool,
                progress=hold if where == "progress" else None,
            )
        except InterruptedError as error:
            failed.append(error)

    running = in_thread(build_slow)
    assert stuck.wait(20)
    assert estargz.build(io.BytesIO(TAR), Nothing(), pool=pool) == estargz.build(io.BytesIO(TAR), Nothing())
    assert running.is_alive()
    if isinstance(source, Endless):
        source.stop = True
    go_on.set()
    running.join(20)
    assert not running.is_alive()
    assert len(failed) == (where == "progress")
    assert at_rest(pool)


# --- memory

PEAK = """
import re, sys, threading
import estargz
class Nothing:
    def write(self, data): pass
pool = estargz.Pool(2, 64 << 20)
builds = [threading.Thread(target=estargz.build, args=(sys.argv[1], Nothing()), kwargs={"pool": pool, "level": 1})
          for _ in range(int(sys.argv[2]))]
[build.start() for build in builds]
[build.join() for build in builds]
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) >> 10)
"""


@pytest.mark.measured
def test_memory_stays_flat(tmp_path: Path) -> None:
    (tmp_path / "tar").write_bytes(entry(b"noise", RNG.randbytes(40 * MIB)) + END)
    peaks = []
    for builds in (3, 16):
        command = [sys.executable, "-c", PEAK, str(tmp_path / "tar"), str(builds)]
        env = os.environ | {"MALLOC_ARENA_MAX": "1"}  # else each thread's keeps one object that was written
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout))
    assert peaks[1] < peaks[0] + 16
    assert peaks[1] < 64 + 48


@pytest.mark.parametrize("memory", [21 * MIB, 64 * MIB])
def test_the_budget_is_kept(tmp_path: Path, memory: int) -> None:
    (tmp_path / "tar").write_bytes(TAR)
    pool = Pool(2, memory)
    with watched(pool) as most:
        made = side_by_side(*[lambda: estargz.build(tmp_path / "tar", Nothing(), pool=pool)] * 6)
    assert made == [estargz.build(tmp_path / "tar", Nothing())] * 6
    assert 1 <= most["builds"] <= memory // (20 * MIB)
    assert 0 < most["allocated"] <= memory
    assert 0 < most["promised"] <= memory
    assert at_rest(pool)


def test_a_build_alone_uses_what_there_is() -> None:
    pool = Pool(3, 200 * MIB)
    with watched(pool) as most:
        estargz.build(io.BytesIO(TAR * 1), Nothing(), level=9, pool=pool)
    assert most["promised"] > 30 * MIB


def test_a_budget_that_is_too_small() -> None:
    pool = Pool(2, 20 * MIB)
    with (
        nothing_leaks(),
        pytest.raises(UsageError, match=r"memory budget of \d+ bytes is too small for chunks of 4194304"),
    ):
        estargz.build(io.BytesIO(TAR), Nothing(), pool=pool)
    with pytest.raises(UsageError, match="too small for compression zstd at level 19"):
        Writer(Nothing(), compression="zstd", level=19, pool=pool)
    assert estargz.build(io.BytesIO(TAR), Nothing(), chunk_size=MIB, pool=pool).toc_digest is not None
    assert at_rest(pool)


def test_one_thread_that_fills_several_layers() -> None:
    """It would wait for itself, and so is refused; the first layer goes on."""
    pool = Pool(2, 50 * MIB)
    writers = [Writer(Nothing(), pool=pool) for _ in range(3)]
    for writer in writers[:2]:
        writer.write(TAR[:2000])
    with pytest.raises(UsageError, match="the pool's memory is used up, and the thread that would wait"):
        writers[2].write(TAR[:2000])
    for writer in writers[:2]:
        writer.write(TAR[2000:])
    assert [writer.close() for writer in writers[:2]] == [estargz.build(io.BytesIO(TAR), Nothing())] * 2
    assert at_rest(pool)


def test_one_thread_that_fills_as_many_layers_as_there_is_memory_for() -> None:
    """What the first of them has beyond its share comes back by itself."""
    pool = Pool(2, 64 * MIB)
    wanted = estargz.build(io.BytesIO(TAR), Nothing(), level=9)
    for _ in range(3):
        writers = [Writer(Nothing(), pool=pool, level=9) for _ in range(3)]
        for writer in writers:
            for at in range(0, len(TAR), MIB):
                writer.write(TAR[at : at + MIB])
        assert [writer.close() for writer in writers] == [wanted] * 3
        assert at_rest(pool)


def test_a_build_that_waits_for_memory_can_be_given_up() -> None:
    pool = Pool(1, 25 * MIB)
    first = Writer(Nothing(), pool=pool)
    first.write(TAR[:2000])
    calls: list[int] = []

    def give_up(done: int) -> None:
        calls.append(done)
        raise KeyboardInterrupt

    second = Writer(Nothing(), pool=pool)

    def abort() -> None:
        while not calls:
            time.sleep(0.01)
        second.abort()

    results = side_by_side(
        lambda: estargz.build(io.BytesIO(TAR), Nothing(), pool=pool, progress=give_up),
        lambda: second.write(TAR),
        abort,
    )
    assert [type(result) for result in results] == [KeyboardInterrupt, estargz.EstargzError, type(None)]
    assert calls == [0]
    first.write(TAR[2000:])
    assert first.close() == estargz.build(io.BytesIO(TAR), Nothing())
    assert at_rest(pool)


# --- failures


def truncated(pool: Pool) -> None:
    estargz.build(io.BytesIO(TAR[:-99999]), Nothing(), pool=pool)


def unreadable(pool: Pool) -> None:
    large = Endless()
    threading.Timer(0.2, lambda: setattr(large, "stop", True)).start()
    estargz.build(large, Nothing(), pool=pool)


def full(pool: Pool) -> None:
    estargz.build(io.BytesIO(TAR), "/dev/full", pool=pool)


def refusing(pool: Pool) -> None:
    class Refusing:
        def write(self, data: bytes) -> None:
            raise BlockingIOError

    estargz.build(io.BytesIO(TAR), Refusing(), pool=pool)


def interrupted(pool: Pool) -> None:
    def stop(done: int) -> None:
        raise KeyboardInterrupt

    estargz.build(Endless(), Nothing(), pool=pool, progress=stop)


def abandoned(pool: Pool) -> None:
    with Writer(Nothing(), pool=pool) as writer:
        writer.write(TAR[: len(TAR) // 2])
        raise ZeroDivisionError


FAILURES: dict[Callable[[Pool], None], type[BaseException]] = {
    truncated: TarError,
    unreadable: InterruptedError,
    full: SinkError,
    refusing: BlockingIOError,
    interrupted: KeyboardInterrupt,
    abandoned: ZeroDivisionError,
}


@pytest.mark.parametrize("threads", [1, 2])
def test_failures_are_of_no_concern_to_others(threads: int) -> None:
    pool = Pool(threads, 64 * MIB)
    right = estargz.build(io.BytesIO(TAR), Nothing())
    with nothing_leaks():
        works = [partial(fail, pool) for fail in FAILURES]
        results = side_by_side(*works, *[lambda: estargz.build(io.BytesIO(TAR), Nothing(), pool=pool)] * 3)
        assert [type(result) for result in results[: len(works)]] == list(FAILURES.values())
        assert results[len(works) :] == [right] * 3
        # While the tracebacks are still there: what failed keeps nothing.
        assert at_rest(pool)


def test_a_writer_that_is_forgotten() -> None:
    pool = Pool(1, 25 * MIB)
    writer = Writer(Nothing(), pool=pool)
    writer.write(TAR[: len(TAR) // 2])
    assert pool.crew.usage()["builds"] == 1
    del writer
    gc.collect()
    assert at_rest(pool)


def test_a_writer_that_is_aborted_while_it_is_written_to() -> None:
    """The other thread may still be filling a batch, which nobody else must get meanwhile."""
    pool = Pool(2, 64 * MIB)
    right = estargz.build(io.BytesIO(TAR), Nothing())
    for pause in (0.0, 0.001, 0.01, 0.03):
        writer = Writer(Nothing(), pool=pool)

        def fill(writer: Writer = writer) -> None:
            while True:
                writer.write(TAR[:-1024])

        def abort(writer: Writer = writer, pause: float = pause) -> None:
            time.sleep(pause)
            writer.abort()

        results = side_by_side(fill, abort, lambda: estargz.build(io.BytesIO(TAR), Nothing(), pool=pool))
        assert isinstance(results[0], estargz.EstargzError)
        assert results[1:] == [None, right]
        assert at_rest(pool)


# --- options


def test_what_a_pool_is_given() -> None:
    assert Pool(5, 7 * MIB).threads == 5
    assert Pool(5, 7 * MIB).memory == 7 * MIB
    assert Pool(3).memory == 256 * MIB
    assert 1 <= Pool().threads <= len(os.sched_getaffinity(0))
    for threads in (0, -1, 1025, 1.0, True):
        with pytest.raises(UsageError, match="threads must be a whole number from 1 to 1024"):
            Pool(threads)  # type: ignore[arg-type]
    for memory in (0, -1, (1 << 50) + 1, "1g"):
        with pytest.raises(UsageError, match="memory must be a whole number"):
            Pool(1, memory)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"a pool is an estargz\.Pool, not int"):
        estargz.build(io.BytesIO(TAR), Nothing(), pool=3)  # type: ignore[arg-type]


def test_a_build_may_take_less() -> None:
    pool = Pool(4, 300 * MIB)
    with watched(pool) as most:
        estargz.build(io.BytesIO(TAR), Nothing(), threads=1, memory=21 * MIB, pool=pool)
    assert most["seated"] == 1
    assert most["promised"] <= 21 * MIB
