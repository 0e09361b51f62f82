"""The cache of blocks: right bytes, few ranges, each of them once, and never more memory or disk than allowed."""

from __future__ import annotations

import contextlib
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tars import in_thread, nothing_leaks

from estargz.errors import BlobError, UsageError
from estargz.reading.cache import CachedSource

pytestmark = pytest.mark.timeout(60)

SMALL = random.Random(1).randbytes(20_011)
BLOCK = 1000
KEY = "sha256:" + "ab" * 32


class Ranges:
    """A blob that is read by several ranges at once; keeps what it was asked for."""

    name = "the blob"

    def __init__(self, data: bytes = SMALL) -> None:
        self.data, self.size = data, len(data)
        self.asked: list[tuple[int, int]] = []
        self.closed = 0
        self.before: Callable[[], None] = lambda: None

    def read_at(self, offset: int, size: int, /) -> bytes:
        assert 0 <= offset <= offset + size <= self.size
        self.asked.append((offset, size))
        self.before()
        return self.data[offset : offset + size]

    def read_ranges(self, ranges: list[tuple[int, int]], /) -> list[bytes]:
        return [self.read_at(offset, size) for offset, size in ranges]

    def close(self) -> None:
        self.closed += 1


class OneByOne:
    """A blob that knows no more than it must, and gives less than is asked for."""

    def __init__(self, data: bytes = SMALL, most: int = 1 << 30) -> None:
        self.data, self.size, self.most = data, len(data), most
        self.asked: list[tuple[int, int]] = []

    def read_at(self, offset: int, size: int, /) -> bytes:
        self.asked.append((offset, size))
        return self.data[offset : offset + min(size, self.most)]


def cached(source: Ranges | OneByOne, **options: object) -> CachedSource:
    options = {"block_size": BLOCK, "max_range": 4 * BLOCK, "gap": 0} | options
    return CachedSource(source, **options)  # type: ignore[arg-type]


# --- the bytes


@settings(deadline=None, max_examples=150)
@given(
    data=st.data(),
    size=st.integers(0, len(SMALL)),
    block_size=st.integers(512, 4000),
    memory=st.integers(0, 10_000),
    gap=st.integers(0, 6000),
    runs=st.integers(1, 4),
    on_disk=st.booleans(),
    whole=st.booleans(),
)
def test_any_ranges(
    data: st.DataObject, size: int, block_size: int, memory: int, gap: int, runs: int, on_disk: bool, whole: bool
) -> None:
    blob = SMALL[:size]
    source = Ranges(blob) if whole else OneByOne(blob, 700)
    with tempfile.TemporaryDirectory() as folder:
        disk = {"directory": folder, "key": KEY, "disk": 30_000} if on_disk else {}
        cache = cached(source, block_size=block_size, memory=memory, gap=gap, max_range=runs * block_size, **disk)
        ranges = st.lists(st.tuples(st.integers(0, size + 10), st.integers(0, 9000)), max_size=5)
        for _ in range(4):
            wanted = data.draw(ranges)
            match data.draw(st.sampled_from(["read", "read_at", "prefetch", "forget"])):
                case "read":
                    assert cache.read_ranges(wanted) == [blob[at : at + count] for at, count in wanted]
                case "read_at":
                    assert [cache.read_at(*span) for span in wanted] == [blob[at : at + count] for at, count in wanted]
                case "prefetch":
                    cache.prefetch(wanted)
                case "forget":
                    for span in wanted:
                        cache.forget(*span)
    if whole:
        assert all(count <= runs * block_size for _, count in source.asked)
        assert cache.fetched == sum(count for _, count in source.asked)
        assert cache.requests == len(source.asked)


def test_a_read_larger_than_all_bounds() -> None:
    data = random.Random(2).randbytes(70 << 20)
    source = Ranges(data)
    cache = CachedSource(source, memory=1 << 20)
    assert cache.read_at(12_345, len(data)) == data[12_345:]
    assert max(count for _, count in source.asked) == 4 << 20


def test_sizes_and_names() -> None:
    cache = cached(Ranges())
    assert (cache.size, cache.name) == (len(SMALL), "the blob")
    assert cached(Ranges(b"")).read_at(0, 10) == b""
    for offset, size in ((-1, 1), (1, -1)):
        with pytest.raises(UsageError, match="the blob: there are no"):
            cache.read_at(offset, size)


# --- few ranges


def test_blocks_are_fetched_once() -> None:
    source = Ranges()
    cache = cached(source)
    for offset in range(2900, 0, -100):
        assert cache.read_at(offset, 100) == SMALL[offset : offset + 100]
    assert source.asked == [(2000, 1000), (1000, 1000), (0, 1000)]
    assert (cache.requests, cache.fetched, cache.hits) == (3, 3000, 26)


def test_neighbours_are_one_range_up_to_a_size() -> None:
    source = Ranges()
    cached(source).read_at(500, 5000)
    assert source.asked == [(0, 4000), (4000, 2000)]
    source = Ranges()
    cached(source).read_ranges([(3100, 1), (1100, 1), (2500, 1), (19_999, 100)])
    assert source.asked == [(1000, 3000), (19_000, 1011)]


def test_gaps_are_fetched_along_and_kept() -> None:
    source = Ranges()
    cache = cached(source, gap=2000, max_range=20_000)
    cache.read_ranges([(0, 1), (3000, 1), (7000, 1)])
    assert source.asked == [(0, 4000), (7000, 1000)]
    assert cache.read_at(1000, 2000) == SMALL[1000:3000]
    assert len(source.asked) == 2


def test_a_block_that_is_there_is_fetched_along_rather_than_asking_twice() -> None:
    source = Ranges()
    cache = cached(source, gap=1000)
    cache.read_at(1000, 1)
    assert cache.read_at(0, 3000) == SMALL[:3000]
    assert source.asked == [(1000, 1000), (0, 3000)]
    source = Ranges()
    cache = cached(source, gap=0)
    cache.read_at(1000, 1)
    assert cache.read_at(0, 3000) == SMALL[:3000]
    assert source.asked == [(1000, 1000), (0, 1000), (2000, 1000)]


def test_reading_on_fetches_ever_more_ahead() -> None:
    source = Ranges(random.Random(6).randbytes(40_500))
    cache = cached(source, max_range=8000)
    cache.read_at(20_000, 1000)
    found = b"".join(cache.read_at(offset, 300) for offset in range(0, 40_500, 300))
    assert found == source.data
    sizes = [(0, 1000), (1000, 2000), (3000, 4000), (7000, 8000), (15_000, 5000)]  # up to what is there already
    assert source.asked == [(20_000, 1000), *sizes, (21_000, 2000), (23_000, 4000), (27_000, 8000), (35_000, 5500)]


def test_several_readers_read_on() -> None:
    source = Ranges()
    cache = cached(source, max_range=8000)
    for offset in range(0, 7000, 1000):
        cache.read_ranges([(offset, 10)])
        cache.read_ranges([(offset + 10_000, 10)])
    spans = [(at + begin, size) for at in (0, 10_000) for begin, size in ((0, 1000), (1000, 2000), (3000, 4000))]
    assert sorted(source.asked) == spans


def test_prefetch() -> None:
    source = Ranges()
    cache = cached(source)
    cache.prefetch([(5000, 2000), (500, 1000)])
    assert source.asked == [(0, 2000), (5000, 2000)]
    cache.read_ranges([(5000, 2000), (500, 1000)])
    assert len(source.asked) == 2


def test_prefetch_takes_no_more_than_there_is_room_for() -> None:
    source = Ranges()
    cache = cached(source, memory=6000)
    cache.prefetch([(9000, 2000), (0, 20_000)])
    assert cache.fetched == 6000
    cache.read_ranges([(9000, 2000), (0, 4000)])
    assert cache.fetched == 6000


# --- bounds


def test_what_was_not_used_for_longest_goes_first() -> None:
    source = Ranges()
    cache = cached(source, memory=3999)  # three blocks
    for offset in (0, 2000, 4000, 0, 6000):
        cache.read_at(offset, 1)
    source.asked.clear()
    for offset in (0, 4000, 6000, 2000):
        cache.read_at(offset, 1)
    assert source.asked == [(2000, 1000)]


def test_memory_is_bounded() -> None:
    class Zeros(Ranges):
        def __init__(self) -> None:
            super().__init__(b"")
            self.size = 1 << 40

        def read_at(self, offset: int, size: int, /) -> bytes:
            return bytes(size)

    cache = CachedSource(Zeros(), block_size=1 << 16, memory=4 << 20)
    rng = random.Random(4)
    cache.prefetch([(0, 1 << 40)])
    tracemalloc.start()
    try:
        for _ in range(600):
            cache.read_at(rng.randrange(cache.size - 1), 200_000)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 3 << 20 < held < 5 << 20
    assert cache.fetched > 64 << 20


def test_no_memory_at_all() -> None:
    source = Ranges()
    cache = cached(source, memory=0)
    for _ in range(2):
        assert cache.read_at(10, 1500) == SMALL[10:1510]
    assert source.asked == [(0, 2000)] * 2


# --- threads


def test_many_threads_fetch_a_block_once() -> None:
    release = threading.Event()
    source = Ranges()
    source.before = lambda: (release.wait(20), None)[1]
    cache = cached(source)
    found: list[bytes] = []
    threads = [in_thread(lambda: found.append(cache.read_at(500, 3000))) for _ in range(8)]
    while cache.hits < 4 * 7:  # the seven others wait for what is being fetched
        time.sleep(0.001)
    release.set()
    for thread in threads:
        thread.join(20)
    assert found == [SMALL[500:3500]] * 8
    assert source.asked == [(0, 4000)]


def test_random_reads_of_many_threads() -> None:
    source = OneByOne(most=300)
    cache = cached(source, memory=1 << 20)
    wrong: list[int] = []

    def read(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(300):
            ranges = [(rng.randrange(len(SMALL)), rng.randrange(6000)) for _ in range(3)]
            if cache.read_ranges(ranges) != [SMALL[at : at + size] for at, size in ranges]:
                wrong.append(seed)

    with nothing_leaks():
        threads = [in_thread(lambda seed=seed: read(seed)) for seed in range(6)]  # type: ignore[misc]
        for thread in threads:
            thread.join(50)
    assert wrong == []
    assert cache.fetched == len(SMALL)


def test_ranges_of_a_plain_reader_are_read_side_by_side() -> None:
    together = threading.Barrier(3)

    class Slow(OneByOne):
        def read_at(self, offset: int, size: int, /) -> bytes:
            together.wait(20)
            return super().read_at(offset, size)

    cache = cached(Slow())
    assert cache.read_ranges([(0, 1), (5000, 1), (9000, 1)]) == [SMALL[:1], SMALL[5000:5001], SMALL[9000:9001]]


class Broken(Exception):
    pass


def test_an_error_reaches_everybody_who_waits_and_is_not_kept() -> None:
    source = Ranges()
    cache = cached(source)

    def fail() -> None:
        while cache.hits < 3:
            time.sleep(0.001)
        raise Broken

    source.before = fail
    caught: list[BaseException] = []

    def read() -> None:
        try:
            cache.read_at(0, 1)
        except Broken as error:
            caught.append(error)

    threads = [in_thread(read) for _ in range(4)]
    for thread in threads:
        thread.join(20)
    assert (len(caught), len(source.asked)) == (4, 1)
    source.before = lambda: None
    assert cache.read_at(0, 1) == SMALL[:1]


def test_a_reader_that_was_interrupted_leaves_the_work_to_others() -> None:
    source = Ranges()
    cache = cached(source)
    others: list[bytes] = []

    def interrupt() -> None:
        source.before = lambda: None
        thread.start()
        while cache.hits < 1:
            time.sleep(0.001)
        raise KeyboardInterrupt

    thread = threading.Thread(target=lambda: others.append(cache.read_at(0, 10)), daemon=True)
    source.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        cache.read_at(0, 10)
    thread.join(20)
    assert others == [SMALL[:10]]


# --- wrong bytes


def test_forget() -> None:
    source = Ranges()
    cache = cached(source)
    cache.read_at(0, 4000)
    source.data = bytes(len(SMALL))
    cache.forget(1999, 2)
    assert cache.read_at(0, 4000) == SMALL[:1000] + bytes(2000) + SMALL[3000:4000]
    cache.forget(10**9, 5)
    cache.forget(0, 0)
    assert cache.fetched == 6000


def test_what_is_forgotten_while_it_is_fetched_is_not_kept(tmp_path: Path) -> None:
    source = Ranges()
    for options in ({}, {"directory": tmp_path, "key": KEY}):
        cache = cached(source, **options)
        source.asked.clear()
        source.before = lambda cache=cache: cache.forget(500, 1)  # type: ignore[misc]
        assert cache.read_at(0, 2000) == SMALL[:2000]
        source.before = lambda: None
        cache.read_at(0, 2000)
        assert source.asked == [(0, 2000), (0, 1000)]


def test_forget_goes_on_to_the_source() -> None:
    class Keeping(Ranges):
        forgotten: tuple[int, int] | None = None

        def forget(self, offset: int, size: int, /) -> None:
            self.forgotten = offset, size

    source = Keeping()
    cached(source).forget(3, 4)
    assert source.forgotten == (3, 4)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_source_that_gives_another_length(change: int) -> None:
    class Wrong(Ranges):
        def read_at(self, offset: int, size: int, /) -> bytes:
            return bytes(size + change)

    class WrongAlone(OneByOne):
        def read_at(self, offset: int, size: int, /) -> bytes:
            return bytes(size + change) if offset % BLOCK == 0 else b""

    for source, name in ((Wrong(), "the blob"), (WrongAlone(), "blob")):
        cache = cached(source)
        for _ in range(2):
            with pytest.raises(BlobError, match=f"^{name}: {1000 + change} bytes came for 1000 at byte 0"):
                cache.read_at(0, 1)


# --- disk


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix == ".estargz")


def taken(folder: Path) -> int:
    sizes = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # evicted by another process
            sizes.append(path.stat().st_size)
    return sum(-(-size // 4096) * 4096 for size in sizes)


def on_disk(folder: Path, source: Ranges, **options: object) -> CachedSource:
    return cached(source, **({"directory": folder, "key": KEY} | options))


def test_a_later_process_fetches_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "er"
    on_disk(folder, Ranges()).read_at(0, len(SMALL))
    assert len(files(folder)) == 21
    assert (folder.stat().st_mode & 0o777, files(folder)[0].stat().st_mode & 0o777) == (0o700, 0o600)
    source = Ranges()
    cache = on_disk(folder, source)
    assert cache.read_at(0, len(SMALL)) == SMALL
    assert (source.asked, cache.requests, cache.fetched, cache.hits) == ([], 0, 0, 21)


def test_blobs_and_block_sizes_do_not_meet(tmp_path: Path) -> None:
    on_disk(tmp_path, Ranges()).read_at(0, len(SMALL))
    other = bytes(reversed(SMALL))
    assert on_disk(tmp_path, Ranges(other), key=KEY[:-1] + "c").read_at(0, len(SMALL)) == other
    assert on_disk(tmp_path, Ranges(other), block_size=2000).read_at(0, len(SMALL)) == other


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit of the data": lambda path: rewrite(path, lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    "a bit of the sum": lambda path: rewrite(path, lambda data: bytes([data[0] ^ 1]) + data[1:]),
    "short": lambda path: os.truncate(path, 500),
    "one byte short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "long": lambda path: rewrite(path, lambda data: data + b"x"),
    "empty": lambda path: os.truncate(path, 0),
    "gone": lambda path: path.unlink(),
    "another block": lambda path: rewrite(path, lambda _: path.with_name(f"{KEY}.{BLOCK}.7.estargz").read_bytes()),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    "a link": lambda path: (path.rename(path.with_name("target")), path.symlink_to("target")),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_misses(tmp_path: Path, damage: str) -> None:
    on_disk(tmp_path, Ranges()).read_at(0, len(SMALL))
    DAMAGE[damage](tmp_path / f"{KEY}.{BLOCK}.3.estargz")
    source = Ranges()
    assert on_disk(tmp_path, source).read_at(0, len(SMALL)) == SMALL
    assert source.asked == [(3000, 1000)]
    source = Ranges()
    on_disk(tmp_path, source).read_at(0, len(SMALL))
    assert source.asked == ([(3000, 1000)] if damage == "a directory" else [])  # written anew


def test_forget_removes_files(tmp_path: Path) -> None:
    cache = on_disk(tmp_path, Ranges())
    cache.read_at(0, 3000)
    cache.forget(1000, 1000)
    assert [path.name.split(".")[2] for path in files(tmp_path)] == ["0", "2"]


def test_the_disk_is_bounded_and_the_oldest_go_first(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "libfoo.1.2").write_bytes(bytes(100_000))  # somebody else's
    data = random.Random(5).randbytes(300_000)
    source = Ranges(data)
    cache = on_disk(folder, source, disk=128 << 10, memory=0)
    theirs = taken(folder)
    for offset in range(0, len(data), BLOCK):
        assert cache.read_at(offset, BLOCK) == data[offset : offset + BLOCK]
        assert taken(folder) - theirs <= 128 << 10
    kept = {int(path.name.split(".")[2]) for path in files(folder)}
    assert len(kept) >= 20
    assert 299 in kept
    assert (folder / "libfoo.1.2").exists()


def test_what_is_read_stays(tmp_path: Path) -> None:
    cache = on_disk(tmp_path, Ranges(), disk=64 << 10, memory=0)
    cache.read_at(0, 14_000)
    for path in files(tmp_path):
        os.utime(path, (1000, 1000))
    for index in (5, 6):  # the oldest of all
        os.utime(tmp_path / f"{KEY}.{BLOCK}.{index}.estargz", (500, 500))
    cache.read_at(5000, 1000)
    cache.read_at(15_000, 5000)
    left = {path.name for path in files(tmp_path)}
    assert (f"{KEY}.{BLOCK}.5.estargz" in left, f"{KEY}.{BLOCK}.6.estargz" in left) == (True, False)
    assert taken(tmp_path) <= 64 << 10


def test_a_disk_too_small_for_a_block(tmp_path: Path) -> None:
    cache = on_disk(tmp_path, Ranges(), disk=4095)
    assert cache.read_at(0, len(SMALL)) == SMALL
    assert list(tmp_path.iterdir()) == []


def test_abandoned_temporary_files_go(tmp_path: Path) -> None:
    names = [f".{KEY}.{BLOCK}.{index}.estargz.{'0' * 16}.tmp" for index in range(2)]
    for name in names:
        (tmp_path / name).write_bytes(b"half")
    os.utime(tmp_path / names[0], (1000, 1000))
    on_disk(tmp_path, Ranges()).read_at(0, 1)
    assert {path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"} == {names[1]}


def test_a_directory_that_vanishes_or_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache"
    cache = on_disk(folder, Ranges(), memory=0)
    cache.read_at(0, 3000)
    for path in files(folder):
        path.unlink()
    folder.rmdir()
    assert cache.read_at(0, len(SMALL)) == SMALL
    folder.mkdir()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert cache.read_at(0, len(SMALL)) == SMALL
    assert list(folder.iterdir()) == []


WRITER = """
import random, sys
from estargz.reading.cache import CachedSource

class Ranges:
    data = random.Random(5).randbytes(400_000)
    size = len(data)
    def read_at(self, offset, size):
        return self.data[offset : offset + size]

rng = random.Random()
options = {"block_size": 1000, "memory": 5000, "directory": sys.argv[1], "key": sys.argv[2], "disk": 512 << 10}
cache = CachedSource(Ranges(), **options)
for _ in range(300):
    at = rng.randrange(400_000)
    assert cache.read_at(at, 3000) == Ranges.data[at : at + 3000]
"""


def test_several_processes_share_a_directory(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, tmp_path, KEY]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(3)]
    peak = 0
    while any(process.poll() is None for process in processes):
        for path in tmp_path.iterdir():
            assert re.fullmatch(rf"{KEY}\.{BLOCK}\.\d+\.estargz|\..*\.tmp", path.name)
        peak = max(peak, taken(tmp_path))
        time.sleep(0.02)
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()
    assert 256 << 10 < peak <= (512 << 10) * 18 // 16
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 511},
        {"max_range": 999},
        {"memory": -1},
        {"gap": -1},
        {"disk": -1},
        {"directory": "/tmp"},
        {"key": KEY},
        *({"directory": "/tmp", "key": key} for key in ("", "../x", "a/b", ".hidden", "x" * 151, "a\n", "a.b")),
    ],
)
def test_arguments_that_cannot_be(options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        cached(Ranges(), **options)


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        on_disk(tmp_path / "file" / "cache", Ranges())


@pytest.mark.parametrize("answer", [None, "text", 7])
def test_a_reader_that_gives_no_bytes(answer: object) -> None:
    class Faulty:
        size = 100

        def read_at(self, offset: int, size: int) -> bytes:
            return answer  # type: ignore[return-value]

    with (
        CachedSource(Faulty()) as source,
        pytest.raises(BlobError, match="blob: .* came for 100 .*its reader is faulty"),
    ):
        source.read_at(0, 10)


@pytest.mark.parametrize(("size", "kind"), [(-1, BlobError), (None, TypeError), ("7", TypeError), (1 << 63, BlobError)])
def test_a_size_that_cannot_be(size: Any, kind: type[Exception]) -> None:
    reader = Ranges(b"")
    reader.size = size
    with pytest.raises(kind, match="its reader's size is"):
        CachedSource(reader)


def test_closing() -> None:
    source = Ranges()
    with cached(source) as cache:
        cache.read_at(0, 10)
    cache.close()
    assert source.closed == 1
    with pytest.raises(UsageError, match="the blob: is closed"):
        cache.read_at(0, 10)
