"""Inflating ahead, held against the reader that inflates in order, and against gzip: bytes, errors, bounds, threads."""

from __future__ import annotations

import contextlib
import gc
import gzip
import io
import os
import random
import re
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from tars import nothing_leaks

import estargz
from estargz._inflate import InflateReader
from estargz._inflate_ahead import InflateAhead
from estargz.errors import SourceError

RNG = random.Random(1952)
TEXT = b"".join(b"line %d of a text that deflates well\n" % (i * i) for i in range(3000))
NOISE = RNG.randbytes(300_000)
MIB = 1 << 20


def member(data: bytes, level: int = 6) -> bytes:
    return gzip.compress(data, level, mtime=0)


def outcome(reader: InflateReader | InflateAhead, room: int = 65536) -> tuple[bytes, str]:
    """What comes in whole buffers, and in what it ends; at its end also where, and behind how many members."""
    out = bytearray(room)
    parts = []
    try:
        while count := reader.readinto(out):
            parts.append(bytes(out[:count]))
    except SourceError as error:
        return b"".join(parts), f"{error} {reader.members}"
    return b"".join(parts), f"end at {reader.offset} behind {reader.members}"


class Drips(io.BytesIO):
    """Gives no more than some bytes at a time."""

    def __init__(self, data: bytes, most: int) -> None:
        super().__init__(data)
        self.most = most

    def readinto(self, buffer: Any) -> int:
        return super().readinto(memoryview(buffer)[: self.most])


def own_threads() -> set[str]:
    return set(os.listdir("/proc/self/task"))


@contextlib.contextmanager
def in_file(data: bytes) -> Iterator[int]:
    fd = os.memfd_create("stream")
    try:
        os.write(fd, data)
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def ways(data: bytes, drip: int = 1000) -> Iterator[dict[str, Callable[[], Any]]]:
    """Every way in which a stream may be handed over."""
    with in_file(data) as fd:
        yield {"memory": lambda: data, "file": lambda: fd, "object": lambda: Drips(data, drip)}


# --- streams of every kind


def header(flags: int, fields: bytes = b"", *, extra_flags: int = 0, system: int = 255) -> bytes:
    start = struct.pack("<BBBBIBB", 0x1F, 0x8B, 8, flags, 0, extra_flags, system) + fields
    return start + struct.pack("<H", zlib.crc32(start) & 0xFFFF) if flags & 2 else start


def body(data: bytes, level: int) -> bytes:
    packer = zlib.compressobj(level, wbits=-15)
    return packer.compress(data) + packer.flush() + struct.pack("<II", zlib.crc32(data), len(data) & 0xFFFFFFFF)


FIELDS = {
    0: b"",
    2: b"",
    4: b"\x04\0\x1f\x8b\x08\0",
    8: b"name\0",
    16: b"comment\0",
    30: b"\x02\0ab\x1f\x8b\x08\0\0c\0",
}
FAKES = [
    member(TEXT[:500]) * 3,
    b"\x1f\x8b\x08\0\0\0\0\0\0\xff" * 20,
    header(8, b"endless name") + b"n" * 300,
    member(b"") + member(b"x"),
    member(TEXT[:9000]) + b"\x1f\x8b\x08\0\0\0\0\0\0\x03\xff\xff",
]

contents = st.one_of(
    st.binary(max_size=600),
    st.integers(0, 3000).map(lambda size: TEXT[size : 3 * size]),
    st.integers(0, 400_000).map(bytes),
    st.sampled_from(FAKES),
    st.tuples(st.sampled_from(FAKES), st.binary(max_size=300)).map(lambda two: two[1] + two[0] + two[1]),
)
# Level 0 stores blocks, so that fake members stand in the stream as they are.
members_of = st.tuples(contents, st.sampled_from([0, 0, 1, 6, 9]), st.sampled_from(sorted(FIELDS))).map(
    lambda one: header(one[2], FIELDS[one[2]]) + body(one[0], one[1])
)
tails = st.sampled_from(
    [b"", b"", bytes(1), bytes(700), b"garbage", bytes(30) + b"x", b"\x1f", b"\x1f\x8b\x07", member(b"")[:12]]
)


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[int]]:
    """A stream, good or bad, and where its members begin, or do not."""
    made = draw(st.lists(members_of, max_size=12))
    starts = [sum(map(len, made[:i])) for i in range(len(made))]
    data = b"".join(made) + draw(tails)
    damage = draw(st.sampled_from(["none", "none", "cut", "flip", "hole"]))
    if damage == "cut":
        data = data[: draw(st.integers(0, len(data)))]
    elif damage != "none" and data:
        at = draw(st.integers(0, len(data) - 1))
        data = data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) * (damage == "flip") + data[at + 1 :]
    wrong = draw(st.lists(st.integers(-5, len(data) + 5), max_size=5))
    return data, draw(st.sampled_from([starts, sorted(starts + wrong), wrong, starts[::2]]))


def without_offset(found: tuple[bytes, str]) -> tuple[bytes, str]:
    """Where a read cuts the damaged header of a deflate block in two, libisal may notice some bytes early."""
    return found[0], re.sub(r"(bad gzip data) at byte \d+", r"\1", found[1])


@given(
    stream=streams(),
    threads=st.sampled_from([1, 2, 3, 8]),
    segment=st.sampled_from([1, 17, 200, 5000, 1 << 18]),
    blocks=st.sampled_from([2, 3, 7, 60]),
    room=st.sampled_from([100, 4096, 65536, MIB]),
    hinted=st.booleans(),
    drip=st.sampled_from([1, 13, 1000, MIB]),
)
@settings(max_examples=400, deadline=None)
def test_like_the_reader_in_order(
    stream: tuple[bytes, list[int]], threads: int, segment: int, blocks: int, room: int, hinted: bool, drip: int
) -> None:
    data, starts = stream
    wanted = outcome(InflateReader(io.BytesIO(data), "gzip"), room)
    options: dict[str, Any] = {"members": np.array(starts, np.int64)} if hinted else {}
    with ways(data, max(drip, len(data) // 200)) as sources:
        for way, source in sources.items():
            with InflateAhead(
                source(), "gzip", threads=threads, segment=segment, memory=blocks << 18, **options
            ) as found:
                same = without_offset if way == "object" else tuple
                assert same(outcome(found, room)) == same(wanted), way


def test_like_gzip() -> None:
    """Thousands of members, in parallel: the bytes are what gzip itself gives."""
    rng = random.Random(1)
    made = [TEXT[rng.randrange(3000) :][: rng.randrange(9_000)] for _ in range(2000)]
    stream = b"".join(member(data, rng.choice([0, 1, 6])) for data in made)
    plain = gzip.decompress(stream)
    for threads in (1, 2, 3, 8):
        with InflateAhead(stream, "gzip", threads=threads, segment=40_000) as found:
            assert found.read() == plain
            assert (found.members, found.offset) == (2000, len(stream))


@pytest.mark.parametrize("threads", [1, 3])
def test_truncated_at_every_byte(threads: int) -> None:
    stream = member(TEXT[:300]) + header(30, FIELDS[30]) + body(TEXT[300:700], 6) + member(NOISE[:40], 0) + bytes(3)
    for cut in range(len(stream) + 1):
        part = stream[:cut]
        wanted = outcome(InflateReader(io.BytesIO(part), "gzip"), 64)
        with InflateAhead(part, "gzip", threads=threads, segment=20) as found:
            assert outcome(found, 64) == wanted


def test_every_flipped_bit() -> None:
    stream = member(TEXT[:200]) + member(NOISE[:60]) + member(TEXT[200:300])
    for bit in range(8 * len(stream)):
        damaged = bytearray(stream)
        damaged[bit // 8] ^= 1 << bit % 8
        wanted = outcome(InflateReader(io.BytesIO(damaged), "gzip"), 64)
        with InflateAhead(bytes(damaged), "gzip", threads=2, segment=30) as found:
            assert outcome(found, 64) == wanted


def test_a_member_within_a_member_stays_within() -> None:
    """A stored block holds whole members, back to back up to its very end and beyond a segment's."""
    inside = member(TEXT[:50_000]) * 40
    stream = member(TEXT) + member(inside, 0) + member(TEXT)
    for segment in (1000, 7001, 1 << 18):
        for hints in (None, np.array([len(member(TEXT)) + 15 + len(member(TEXT[:50_000])) * i for i in range(20)])):
            with InflateAhead(stream, "gzip", threads=3, segment=segment, members=hints) as found:
                assert found.read() == TEXT + inside + TEXT
                assert found.members == 3


@pytest.mark.parametrize("kind", ["zstd", "plain"])
@pytest.mark.parametrize("damage", [False, True])
def test_other_kinds(kind: str, damage: bool) -> None:
    packer = zstandard.ZstdCompressor(write_checksum=True)
    data = packer.compress(TEXT * 3) + packer.compress(NOISE) if kind == "zstd" else NOISE + TEXT
    if damage:
        data = data[:120_000] + b"damage" + data[120_006:]
    wanted = outcome(InflateReader(io.BytesIO(data), kind), 4096)
    with ways(data) as sources:
        for source in sources.values():
            for memory in (None, 1):
                with InflateAhead(source(), kind, threads=3, memory=memory) as found:
                    assert outcome(found, 4096) == wanted


def test_a_part_of_a_blob() -> None:
    front, back = NOISE[:777], member(TEXT)
    made = [member(NOISE[i * 1000 : i * 2000]) for i in range(60)]
    data = front + b"".join(made) + back
    starts = np.array([len(front) + sum(map(len, made[:i])) for i in range(60)])
    with ways(data) as sources:
        for way in ("memory", "file"):
            for hints in (None, starts):
                with InflateAhead(
                    sources[way](),
                    "gzip",
                    begin=len(front),
                    end=len(data) - len(back),
                    threads=3,
                    segment=5000,
                    members=hints,
                ) as found:
                    assert found.read() == b"".join(map(gzip.decompress, made))
                    assert found.offset == len(data) - len(front) - len(back)


def test_strict_refuses_padding() -> None:
    stream = member(TEXT) * 5 + bytes(1)
    with pytest.raises(SourceError, match=f"a.gz: garbage after the compressed data, at byte {len(stream) - 1}"):
        InflateAhead(stream, "gzip", threads=2, segment=100, strict=True, name="a.gz").read()


# --- the interface


def test_blocks_are_the_bytes_and_end_with_their_turn() -> None:
    stream = b"".join(member(NOISE[i * 100 :]) for i in range(20))
    kept = []
    parts = []
    with InflateAhead(stream, "gzip", threads=2) as found:
        assert found.read(10) == NOISE[:10]
        for view in found.blocks():
            assert 0 < len(view) <= 1 << 18
            assert view.readonly
            parts.append(bytes(view))
            kept.append(view)
    assert NOISE[:10] + b"".join(parts) == gzip.decompress(stream)
    for view in kept:
        with pytest.raises(ValueError, match="released"):
            view[0]


def test_as_a_file_object() -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for i in range(50):
            info = tarfile.TarInfo(f"file{i}")
            info.size = 9000 + i
            tar.addfile(info, io.BytesIO(NOISE[i : 9000 + 2 * i]))
    raw = packed.getvalue()
    stream = b"".join(member(raw[at : at + 10_000]) for at in range(0, len(raw), 10_000))
    with InflateAhead(stream, "gzip", threads=2) as found, tarfile.open(fileobj=found, mode="r|") as tar:  # type: ignore[call-overload]
        for i, entry in enumerate(tar):
            held = tar.extractfile(entry)
            assert held is not None
            assert held.read() == NOISE[i : 9000 + 2 * i]


def test_bad_arguments() -> None:
    for options in ({"threads": 0}, {"threads": 1025}, {"begin": -1}, {"begin": 5, "end": 4}, {"segment": 0}):
        with pytest.raises(ValueError):
            InflateAhead(b"", "gzip", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kind"):
        InflateAhead(b"", "bzip2")
    with pytest.raises(ValueError, match="descriptor"):
        InflateAhead(-1, "gzip")
    with pytest.raises(ValueError, match="int64"):
        InflateAhead(b"", "gzip", members=np.zeros(4, np.int32))
    with pytest.raises(ValueError, match="object"):
        InflateAhead(io.BytesIO(), "gzip", begin=1)
    with pytest.raises((TypeError, BufferError, ValueError)):
        InflateAhead(member(TEXT), "gzip").readinto(bytes(10))


def test_read_after_close() -> None:
    found = InflateAhead(member(TEXT), "gzip")
    assert found.read(3) == TEXT[:3]
    assert not found.closed
    found.close()
    found.close()
    assert found.closed
    with pytest.raises(ValueError, match="after close"):
        found.read(1)


# --- objects that are read from


def test_pipe_and_empty_file() -> None:
    stream = b"".join(member(NOISE[i * 100 :]) for i in range(20))
    reading, writing = os.pipe()
    writer = threading.Thread(target=lambda: os.write(writing, stream[:5000]) and os.close(writing))
    writer.start()
    with open(reading, "rb"), InflateAhead(reading, "gzip") as found, pytest.raises(SourceError, match="at byte 5000"):
        found.read()
    writer.join()
    with (
        in_file(b"") as fd,
        InflateAhead(fd, "gzip") as found,
        pytest.raises(SourceError, match="too early, at byte 0"),
    ):
        found.read()


def test_object_with_read_only() -> None:
    class Reads:
        def __init__(self, data: bytes) -> None:
            self.data = io.BytesIO(data)

        def read(self, size: int) -> bytes:
            return self.data.read(min(size, 777))

    with InflateAhead(Reads(member(NOISE) * 20), "gzip", threads=2) as found:
        assert found.read() == NOISE * 20


@pytest.mark.parametrize("count", [-1, 1 << 30])
def test_readinto_that_lies(count: int) -> None:
    class Lies:
        def readinto(self, buffer: Any) -> int:
            return count

    with InflateAhead(Lies(), "gzip") as found, pytest.raises(ValueError, match="bytes when"):
        found.read()


def test_non_blocking_source() -> None:
    class Later:
        def readinto(self, buffer: Any) -> None:
            return None

    with InflateAhead(Later(), "gzip") as found, pytest.raises(BlockingIOError):
        found.read()


@pytest.mark.parametrize("threads", [1, 3])
def test_error_of_the_source_comes_behind_what_it_gave(threads: int) -> None:
    stream = b"".join(member(NOISE[i * 1000 :]) for i in range(12))

    class Fails(Drips):
        failures = 0

        def readinto(self, buffer: Any) -> int:
            if self.failures < 2:
                self.most = min(50_000, 2 * MIB - self.tell())
            if self.most == 0:
                self.failures += 1
                raise OSError(5, "disk on fire")
            return super().readinto(buffer)

    wanted = []
    readers = (InflateReader(Fails(stream, 1), "gzip"), InflateAhead(Fails(stream, 1), "gzip", threads=threads))
    for reader in readers:
        out = bytearray(1000)
        parts = []
        for _ in range(2):
            with pytest.raises(OSError, match="disk on fire"):
                while count := reader.readinto(out):
                    parts.append(bytes(out[:count]))
        wanted.append(b"".join(parts))
        reader.close()
    assert wanted[0] == wanted[1]
    assert len(wanted[0]) > 1 * MIB


def test_the_object_is_read_by_the_reader_only_and_not_far_ahead() -> None:
    stream = b"".join(member(NOISE[i * 10 :]) for i in range(100))
    seen = []

    class Watched(Drips):
        def readinto(self, buffer: Any) -> int:
            seen.append(threading.get_ident())
            return super().readinto(buffer)

    source = Watched(stream, MIB)
    with InflateAhead(source, "gzip", threads=2) as found:
        found.read(1)
        assert source.tell() < 8 * MIB
        assert found.read()
    assert set(seen) == {threading.get_ident()}


def test_what_is_there_comes_before_more_is_asked_for() -> None:
    """A source that waits is not waited for while there are bytes to give."""

    class Stops(Drips):
        def readinto(self, buffer: Any) -> int:
            assert self.tell() < len(self.getvalue()), "asked for more"
            return super().readinto(buffer)

    with InflateAhead(Stops(member(TEXT[:5000]) + member(TEXT)[:50], 1 << 20), "gzip") as found:
        assert found.read(5000) == TEXT[:5000]


def test_read_error_of_a_descriptor(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(member(TEXT))
    fd = os.open(tmp_path / "file", os.O_WRONLY)
    with (
        InflateAhead(fd, "gzip", name="some.gz") as found,
        pytest.raises(SourceError, match="some.gz: cannot be read: Bad"),
    ):
        found.read()
    os.close(fd)


# --- bounds


def bomb(size: int, count: int) -> bytes:
    packer = zlib.compressobj(9, wbits=31)
    one = b"".join(packer.compress(bytes(MIB)) for _ in range(size // MIB)) + packer.flush()
    return one * count


MEMORY_SCRIPT = """
import os, resource, sys
from estargz._inflate_ahead import InflateAhead
path, threads, way = sys.argv[1], int(sys.argv[2]), sys.argv[3]
buffer = bytearray(1 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with open(path, "rb", buffering=0) as file:
    source = file.fileno() if way == "file" else file
    with InflateAhead(source, "gzip", threads=threads, segment=60_000, memory=8 << 20) as found:
        total = 0
        while count := found.readinto(buffer):
            total += count
print(total, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10)
"""


@pytest.mark.measured
@pytest.mark.parametrize("way", ["file", "object"])
@pytest.mark.parametrize("threads", [1, 4])
def test_bombs_take_no_memory(tmp_path: Path, threads: int, way: str) -> None:
    """Members of 64 MiB that were 64 KiB: every guess would fill memory if it were let."""
    stream = bomb(64 * MIB, 12)
    (tmp_path / "bomb.gz").write_bytes(stream)
    command = [sys.executable, "-c", MEMORY_SCRIPT, str(tmp_path / "bomb.gz"), str(threads), way]
    total, grown = map(int, subprocess.run(command, check=True, capture_output=True).stdout.split())
    assert total == 12 * 64 * MIB
    assert grown < (8 + 0.5 * (2 * threads + 2) + (0 if way == "file" else 4 + 0.5 * (2 * threads + 2)) + 2) * MIB


@pytest.mark.measured
def test_a_slow_reader_stops_the_threads() -> None:
    """Nobody reads on, so nothing is inflated beyond the budget: CPU time stands still."""
    found = InflateAhead(bomb(64 * MIB, 20), "gzip", threads=2, segment=60_000, memory=4 << 20)
    assert found.read(1) == b"\0"
    spent = -1.0
    for _ in range(200):  # until it has come to rest
        now = time.process_time()
        if now - spent < 0.001:
            break
        spent = now
        time.sleep(0.05)
    else:
        pytest.fail("the threads never came to rest")
    found.close()


# --- threads


def test_threads_begin_with_the_first_read_and_end_with_close() -> None:
    with nothing_leaks():
        before = own_threads()
        found = InflateAhead(bomb(64 * MIB, 4), "gzip", threads=5)
        assert own_threads() <= before
        found.read(1)
        assert len(own_threads() - before) == 5
        found.close()


def test_threads_end_with_the_object_wherever_it_is() -> None:
    stream = bomb(16 * MIB, 4) + member(NOISE) * 40
    for size in (0, 1, 70 * MIB):
        for threads in (1, 2, 3, 8):
            for source in (stream, Drips(stream, 10_000)):
                with nothing_leaks():
                    found = InflateAhead(source, "gzip", threads=threads, segment=10_000)
                    found.read(size)
                    del found


def test_threads_end_when_the_object_is_in_a_cycle() -> None:
    class Cycle(Drips):
        reader: Any

    with nothing_leaks():
        source = Cycle(member(NOISE) * 20, 10_000)
        source.reader = InflateAhead(source, "gzip", threads=2)
        source.reader.read(1)
        del source
        gc.collect()


def test_an_error_ends_nothing_but_the_stream() -> None:
    found = InflateAhead(member(TEXT) + b"garbage", "gzip", threads=2)
    for _ in range(3):
        with pytest.raises(SourceError, match="garbage"):
            found.read()
    found.close()


def test_two_readers_at_once_are_told() -> None:
    inside, leave = threading.Event(), threading.Event()

    class Waits(io.BytesIO):
        def readinto(self, buffer: Any) -> int:
            inside.set()
            leave.wait()
            return super().readinto(buffer)

    found = InflateAhead(Waits(member(TEXT)), "gzip")
    results: list[bytes] = []
    worker = threading.Thread(target=lambda: results.append(found.read()))
    worker.start()
    inside.wait()
    with pytest.raises(RuntimeError, match="two threads"):
        found.read()
    leave.set()
    worker.join()
    assert results == [TEXT]
    found.close()


INTERRUPT_SCRIPT = """
import os, signal, threading
from estargz._inflate_ahead import InflateAhead
reading, writing = os.pipe()
found = InflateAhead(reading, "gzip")
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    found.read()
except KeyboardInterrupt:
    found.close()
    print("interrupted")
"""


def test_a_signal_ends_waiting_for_a_pipe() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPT_SCRIPT], capture_output=True, text=True, timeout=20)
    assert done.stdout == "interrupted\n"


def test_a_forked_child_can_let_go() -> None:
    found = InflateAhead(bomb(64 * MIB, 4), "gzip", threads=2)
    found.read(1)
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            found.close()
            del found
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    found.close()


def seconds_of_threads(stream: bytes) -> list[float]:
    """CPU seconds of each of two threads."""
    before = own_threads()
    with InflateAhead(stream, "gzip", threads=2) as found:
        found.read(1)
        begun = own_threads() - before
        for _ in found.blocks():
            pass
        times = [Path(f"/proc/self/task/{task}/schedstat").read_text().split()[0] for task in begun]
    assert len(times) == 2
    return [int(time) / 1e9 for time in times]


def test_parallel_members_use_several_threads() -> None:
    """Both have inflated a good part, at least when nothing else runs."""
    stream = b"".join(member(NOISE[: 200_000 + i] + bytes(2 * MIB), 1) for i in range(150))
    shares = (min(seconds) / max(seconds) for seconds in (seconds_of_threads(stream) for _ in range(5)))
    assert any(share > 0.25 for share in shares)


# --- builds


def tar_of(sizes: list[int]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for i, size in enumerate(sizes):
            info = tarfile.TarInfo(f"file{i}")
            info.size = size
            tar.addfile(info, io.BytesIO(NOISE[i : size + i]))
    return made.getvalue()


def write_all(fd: int, data: bytes) -> None:
    with open(fd, "wb") as file:
        file.write(data)


def built(source: Any, **options: Any) -> tuple[str, bytes]:
    out = io.BytesIO()
    return estargz.build(source, out, **options).diff_id, out.getvalue()


@pytest.mark.parametrize("size", [2000, 100_000, 1 << 40])
def test_builds_are_the_same_from_everything_that_is_read(tmp_path: Path, size: int) -> None:
    raw = tar_of([9000, 250_000, 0, 77] * 6)
    packed = b"".join(member(raw[at : at + size], 1) for at in range(0, len(raw), min(size, len(raw))))
    (tmp_path / "layer.gz").write_bytes(b"front" + packed)
    wanted = built(io.BytesIO(raw))
    for threads in (1, 2, 16):
        with io.FileIO(tmp_path / "layer.gz") as file:
            file.seek(5)
            assert built(file, threads=threads) == wanted
            assert file.read() == b""
        assert built(Drips(packed, 3000), threads=threads) == wanted
        reading, writing = os.pipe()
        writer = threading.Thread(target=write_all, args=(writing, packed))
        writer.start()
        with io.FileIO(reading) as pipe:
            assert built(pipe, threads=threads) == wanted
        writer.join()


@pytest.mark.parametrize("damage", ["cut", "garbage", "flip"])
def test_builds_fail_alike(tmp_path: Path, damage: str) -> None:
    raw = tar_of([280_000] * 6)
    packed = b"".join(member(raw[at : at + 90_000], 1) for at in range(0, len(raw), 90_000))
    bad = {
        "cut": packed[:-100_000],
        "garbage": packed + b"garbage",
        "flip": packed[:700_000] + bytes([packed[700_000] ^ 1]) + packed[700_001:],
    }[damage]
    (tmp_path / "layer.gz").write_bytes(bad)
    told = set()
    for threads in (1, 2, 16):
        with pytest.raises(SourceError) as error:
            built(tmp_path / "layer.gz", threads=threads)
        told.add(str(error.value).replace(str(tmp_path / "layer.gz"), "input"))
        with pytest.raises(SourceError) as error:
            built(io.BytesIO(bad), threads=threads)
        told.add(str(error.value))
    assert len(told) == 1
