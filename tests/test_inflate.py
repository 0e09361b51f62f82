"""Decompression held against gzip, zstd, zlib and zstandard, and against damage of every kind."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import random
import shutil
import struct
import subprocess
import tarfile
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from estargz._inflate import (
    CHECK_CHUNK,
    FILE_LAST,
    FILE_MISMATCH,
    FILE_PART,
    JOB_FIELDS,
    MISMATCH,
    InflateReader,
    check_chunks,
    detect,
    read_chunk,
)
from estargz.errors import SourceError

RNG = random.Random(1952)
TEXT = b"".join(b"line %d of a text that deflates well\n" % (i * i) for i in range(3000))
NOISE = RNG.randbytes(300_000)


def member(data: bytes, level: int = 6) -> bytes:
    return gzip.compress(data, level, mtime=0)


def inflate(data: bytes, kind: str = "gzip", block: int = 65536, **options: Any) -> bytes:
    reader = InflateReader(io.BytesIO(data), kind, **options)
    out = bytearray(block)
    parts = []
    while count := reader.readinto(out):
        parts.append(bytes(out[:count]))
    return b"".join(parts)


# --- kinds


@pytest.mark.parametrize(
    ("prefix", "kind"),
    [
        (b"", "plain"),
        (b"\x1f", "plain"),
        (b"\x1f\x8b", "plain"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"\x1f\x8b\x07", "plain"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"\x50\x2a\x4d\x18", "zstd"),
        (b"\x5f\x2a\x4d\x18", "zstd"),
        (b"\x60\x2a\x4d\x18", "plain"),
        (b"\x28\xb5\x2f", "plain"),
        (b"etc/\0", "plain"),
    ],
)
def test_detect(prefix: bytes, kind: str) -> None:
    assert detect(prefix) == kind


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind"):
        InflateReader(io.BytesIO(), "bzip2")


def test_plain_passes_through() -> None:
    assert inflate(NOISE, "plain", 1000) == NOISE
    assert inflate(b"", "plain") == b""


# --- good gzip


@pytest.mark.parametrize(
    "data", [b"", b"x", TEXT, NOISE, bytes(3_000_000)], ids=["empty", "one", "text", "noise", "zeros"]
)
@pytest.mark.parametrize("level", [0, 1, 9])
@pytest.mark.parametrize("block", [1 << 20, 4096, 4097, 333])
def test_one_member(data: bytes, level: int, block: int) -> None:
    assert inflate(member(data, level), block=block) == data


def test_one_byte_at_a_time_on_both_sides() -> None:
    class Drip(io.BytesIO):
        def readinto(self, buffer: Any) -> int:
            return super().readinto(memoryview(buffer)[:1])

    data = TEXT[:3000]
    reader = InflateReader(Drip(member(data) + member(data)), "gzip")
    out = bytearray(1)
    assert b"".join(bytes(out) for _ in iter(lambda: reader.readinto(out), 0)) == data * 2
    assert reader.members == 2


@given(
    parts=st.lists(st.binary(max_size=5000) | st.integers(0, 200_000).map(bytes), max_size=8),
    levels=st.lists(st.integers(0, 9), min_size=8, max_size=8),
    block=st.integers(1, 300_000),
    padding=st.integers(0, 3000),
)
@settings(max_examples=150, deadline=None)
def test_any_members_any_block(parts: list[bytes], levels: list[int], block: int, padding: int) -> None:
    stream = b"".join(member(part, level) for part, level in zip(parts, levels, strict=False))
    if not stream:
        return
    plain = b"".join(parts)
    if len(plain) // block > 50_000:
        block = 4096
    assert inflate(stream + bytes(padding), block=block) == plain == gzip.decompress(stream)


@pytest.mark.skipif(shutil.which("gzip") is None, reason="needs gzip")
@pytest.mark.parametrize("level", [1, 6, 9])
def test_the_gzip_program(tmp_path: Path, level: int) -> None:
    (tmp_path / "some name.txt").write_bytes(TEXT + NOISE)
    packed = subprocess.run(
        ["gzip", f"-{level}", "-c", "some name.txt"], cwd=tmp_path, check=True, capture_output=True
    ).stdout
    assert packed[3] == 8  # with a name in the header
    assert inflate(packed * 3) == (TEXT + NOISE) * 3


def header(flags: int, fields: bytes) -> bytes:
    return b"\x1f\x8b\x08" + bytes([flags]) + b"\1\2\3\4\5\6" + fields


def body(data: bytes) -> bytes:
    return member(data)[10:]


HEADERS = {
    "extra": header(4, b"\x05\0abcde"),
    "empty extra": header(4, b"\0\0"),
    "long extra": header(4, b"\xff\xff" + bytes(65535)),
    "name": header(8, b"a name\0"),
    "empty name": header(8, b"\0"),
    "comment": header(16, b"a comment\0"),
    "all": header(28, b"\x03\0xyzname\0comment\0"),
    "text flag": header(1, b""),
}


@pytest.mark.parametrize("head", HEADERS.values(), ids=HEADERS)
@pytest.mark.parametrize("step", [1, 1 << 18])
def test_headers(head: bytes, step: int) -> None:
    class Steps(io.BytesIO):
        def readinto(self, buffer: Any) -> int:
            return super().readinto(memoryview(buffer)[:step])

    with_crc = bytearray(head)
    with_crc[3] |= 2
    with_crc += (zlib.crc32(with_crc) & 0xFFFF).to_bytes(2, "little")
    for start in (head, bytes(with_crc)):
        stream = start + body(b"payload")
        assert gzip.decompress(stream + stream) == b"payload" * 2
        assert InflateReader(Steps(stream + stream), "gzip").read() == b"payload" * 2
    with_crc[-1] ^= 1
    with pytest.raises(SourceError, match="checksum mismatch"):
        inflate(bytes(with_crc) + body(b"payload"))


def test_single_stops_after_the_first_member() -> None:
    first = member(TEXT)
    reader = InflateReader(io.BytesIO(first + member(NOISE)), "gzip", single=True)
    assert reader.read() == TEXT
    assert (reader.offset, reader.members) == (len(first), 1)
    assert reader.read() == b""


def test_bufferedreader_and_tarfile_take_it(tmp_path: Path) -> None:
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as out:
        out.add(__file__, "file")
    reader = InflateReader(io.BytesIO(member(tar.getvalue())), "gzip")
    with tarfile.open(fileobj=io.BufferedReader(reader), mode="r|") as back:
        assert [info.name for info in back] == ["file"]


def test_reads_of_every_size() -> None:
    reader = InflateReader(io.BytesIO(member(TEXT)), "gzip")
    assert reader.read(0) == b""
    assert reader.read(10) == TEXT[:10]
    assert reader.readinto(bytearray()) == 0
    assert reader.read(1 << 40) == TEXT[10:]


# --- bad gzip


def test_truncated_at_every_position() -> None:
    data = TEXT[:500]
    stream = header(28, b"\x03\0xyzname\0comment\0") + body(data) + member(data)
    first = len(stream) - len(member(data))
    for cut in range(len(stream)):
        if cut == first:
            assert inflate(stream[:cut]) == data
            continue
        with pytest.raises(SourceError, match=f"the gzip stream ends too early, at byte {cut};"):
            inflate(stream[:cut], name="layer.tar.gz")


@pytest.mark.parametrize("tail", [b"x", b"\0" * 100 + b"x", b"\x1f\x8c" + bytes(30), bytes(5) + member(b"y")])
def test_trailing_garbage(tail: bytes) -> None:
    with pytest.raises(SourceError, match=r"in\.gz: garbage after the compressed data"):
        inflate(member(TEXT) + tail, name="in.gz")


def test_strict_refuses_padding() -> None:
    assert inflate(member(TEXT) + bytes(1 << 20)) == TEXT
    with pytest.raises(SourceError, match=f"garbage after the compressed data, at byte {len(member(TEXT))}"):
        inflate(member(TEXT) + bytes(1), strict=True)


@pytest.mark.parametrize("at", [-8, -5, -4, -1], ids=["crc", "crc end", "length", "length end"])
def test_trailer_is_checked(at: int) -> None:
    stream = bytearray(member(TEXT))
    stream[at] ^= 0x10
    with pytest.raises(SourceError, match=f"gzip checksum mismatch at byte {len(stream)}"):
        inflate(bytes(stream))


@pytest.mark.parametrize(
    "stream", [b"BZh91AY&SY" * 2, header(0x20, b"") + body(b"x"), b"\x1f\x8b\x07" + member(b"x")[3:], bytes(40)]
)
def test_no_gzip_header(stream: bytes) -> None:
    with pytest.raises(SourceError, match="bad gzip data"):
        inflate(stream)


def test_every_flipped_bit_is_noticed_or_harmless() -> None:
    data = TEXT[:300] + NOISE[:100]
    stream = member(data)
    for bit in range(8 * len(stream)):
        damaged = bytearray(stream)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            found = inflate(bytes(damaged))
        except SourceError:
            continue
        assert found == data


@pytest.mark.parametrize("code", [285, 286, 287])
@pytest.mark.parametrize("distance", [0, 29, 30, 31])
def test_codes_without_a_meaning_are_refused(code: int, distance: int) -> None:
    """The last two codes for lengths and for distances; not every decoder does so, but zlib does."""
    literals, extra = "10010001" * 32_000, "0" * 13 if distance else ""
    block = f"110{literals}{0b11000000 + code - 280:08b}{distance:05b}{extra}0000000"
    packed = bytes(int(block[at : at + 8][::-1], 2) for at in range(0, len(block), 8))
    data = b"a" * 32_258
    stream = header(0, b"") + packed + struct.pack("<II", zlib.crc32(data), len(data))
    if code == 285 and distance in (0, 29):
        assert inflate(stream) == zlib.decompress(stream, 31) == data
        return
    with pytest.raises(zlib.error, match="invalid"):
        zlib.decompress(stream, 31)
    with pytest.raises(SourceError, match="bad gzip data"):
        inflate(stream)


@pytest.mark.parametrize("seed", range(8))
def test_damage_is_judged_as_zlib_does(seed: int) -> None:
    """Random damage to random streams: the same verdict, and the same bytes where there are any."""
    rng = random.Random(seed)
    for _ in range(250):
        size = rng.randrange(1, 4000)
        data = rng.choice([TEXT[:size], NOISE[:size], bytes(size), TEXT[:size] + NOISE[:size]])
        packer = zlib.compressobj(rng.randrange(10), wbits=31, strategy=rng.choice([0, 2, 4]))
        damaged = bytearray(packer.compress(data) + packer.flush())
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(10, len(damaged))] = rng.randrange(256)
        unpacker = zlib.decompressobj(31)
        try:
            wanted: bytes | None = unpacker.decompress(bytes(damaged))
            if not unpacker.eof or unpacker.unused_data:
                wanted = None
        except zlib.error:
            wanted = None
        try:
            found: bytes | None = inflate(bytes(damaged), block=rng.choice([1, 100, 65536]))
        except SourceError:
            found = None
        assert found == wanted, f"seed {seed}: {bytes(damaged).hex()}"


def outcome(stream: bytes, kind: str, room: int, given: int) -> tuple[int, str]:
    """Bytes in whole buffers of ``room`` in front of the end or error, and which it is, when ``given`` come at a time."""

    class Drips(io.BytesIO):
        def readinto(self, buffer: Any) -> int:
            return super().readinto(memoryview(buffer)[:given])

    reader = InflateReader(Drips(stream), kind)
    out, count = bytearray(room), 0
    try:
        while reader.readinto(out) == room:
            count += room
    except SourceError as error:
        return count, str(error)
    return count, "no error"


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_an_error_does_not_depend_on_the_sizes_of_buffers(kind: str) -> None:
    rng = random.Random(1951)
    for _ in range(60):
        data = rng.choice([TEXT[: rng.randrange(1, 90_000)], NOISE[: rng.randrange(1, 200_000)], bytes(300_000)])
        stream = bytearray(member(data, rng.randrange(10)) if kind == "gzip" else frame(data, write_checksum=True))
        stream[rng.randrange(4, len(stream))] ^= 1 << rng.randrange(8)
        small = {outcome(bytes(stream), kind, 512, given) for given in (97, 4096, 1 << 20)}
        large = {outcome(bytes(stream), kind, 65536, given) for given in (97, 4096, 1 << 20)}
        assert len(small) == 1
        assert large == {(count // 65536 * 65536, error) for count, error in small}


# --- zstd


def frame(data: bytes, **options: Any) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)


SKIPPABLE = b"\x5a\x2a\x4d\x18" + (7).to_bytes(4, "little") + b"skip me"


@pytest.mark.parametrize("block", [1 << 20, 4096, 997])
def test_zstd_frames(block: int) -> None:
    stream = SKIPPABLE + frame(TEXT) + frame(b"") + SKIPPABLE + frame(NOISE, write_checksum=True) + SKIPPABLE
    assert inflate(stream, "zstd", block) == TEXT + NOISE


@pytest.mark.skipif(shutil.which("zstd") is None, reason="needs zstd")
@pytest.mark.parametrize("options", [["-1"], ["-19"], ["--long=27"], ["-3", "-T2", "--no-check"]])
def test_the_zstd_program(options: list[str]) -> None:
    data = (TEXT + NOISE) * 8
    packed = subprocess.run(["zstd", "-q", "-c", *options], input=data, check=True, capture_output=True).stdout
    assert inflate(packed, "zstd") == data


def test_zstd_truncated_at_every_position() -> None:
    data = TEXT[:500]
    stream = frame(data, write_checksum=True) + SKIPPABLE
    first = len(stream) - len(SKIPPABLE)
    for cut in range(len(stream)):
        if cut == first:
            assert inflate(stream[:cut], "zstd") == data
            continue
        with pytest.raises(SourceError, match=f"zstd stream ends too early, at byte {cut};|garbage after"):
            inflate(stream[:cut], "zstd")


@pytest.mark.parametrize("tail", [b"x", b"abcdefgh", bytes(4)])
def test_zstd_trailing_garbage(tail: bytes) -> None:
    with pytest.raises(SourceError, match="garbage after the compressed data"):
        inflate(frame(TEXT) + tail, "zstd")


def test_zstd_damage_and_checksum() -> None:
    stream = bytearray(frame(TEXT, write_checksum=True))
    stream[-1] ^= 1
    with pytest.raises(SourceError, match="bad zstd data"):
        inflate(bytes(stream), "zstd")
    with pytest.raises(SourceError, match="bad zstd data at byte 0"):
        inflate(b"no zstd at all", "zstd")


def test_zstd_window_is_bounded() -> None:
    """A frame that wants 1 GiB of history is refused before any of it is allocated."""
    descriptor, window = b"\0", bytes([(30 - 10) << 3])
    stream = b"\x28\xb5\x2f\xfd" + descriptor + window + b"\x01\0\0"
    with pytest.raises(SourceError, match="needs a window over 134217728 bytes"):
        inflate(stream, "zstd")


# --- what is read from


def test_object_with_read_only() -> None:
    class Reads:
        def __init__(self, data: bytes) -> None:
            self.data = io.BytesIO(data)

        def read(self, size: int) -> bytes:
            return self.data.read(min(size, 777))

    assert InflateReader(Reads(member(NOISE) * 2), "gzip").read() == NOISE * 2


@pytest.mark.parametrize("count", [-1, 1 << 30])
def test_readinto_that_lies(count: int) -> None:
    class Lies:
        def readinto(self, buffer: Any) -> int:
            return count

    with pytest.raises(ValueError, match="bytes when"):
        InflateReader(Lies(), "gzip").read()


def test_read_that_gives_too_much() -> None:
    class Much:
        def read(self, size: int) -> bytes:
            return bytes(size + 1)

    with pytest.raises(ValueError, match="bytes when"):
        InflateReader(Much(), "gzip").read()


def test_non_blocking_source() -> None:
    class Later:
        def readinto(self, buffer: Any) -> None:
            return None

    with pytest.raises(BlockingIOError):
        InflateReader(Later(), "gzip").read()


def test_error_of_the_source_comes_through() -> None:
    class Fails:
        def readinto(self, buffer: Any) -> int:
            raise OSError(5, "disk on fire")

    with pytest.raises(OSError, match="disk on fire"):
        InflateReader(Fails(), "gzip").read()


def test_no_resize_under_the_reader() -> None:
    """A source that keeps its window and grows what is behind it cannot move memory away."""

    class Keeps:
        def readinto(self, buffer: Any) -> int:
            view = memoryview(buffer)
            with pytest.raises(BufferError):
                view.obj.extend(bytes(1 << 20))
            data = member(TEXT)
            view[: len(data)] = data
            self.readinto = lambda buffer: 0  # type: ignore[method-assign]
            return len(data)

    assert InflateReader(Keeps(), "gzip", single=True).read() == TEXT


@pytest.mark.timeout(30)
def test_two_threads_at_once_are_told() -> None:
    inside, leave = threading.Event(), threading.Event()

    class Waits(io.BytesIO):
        def readinto(self, buffer: Any) -> int:
            inside.set()
            leave.wait()
            return super().readinto(buffer)

    reader = InflateReader(Waits(member(TEXT)), "gzip")
    results: list[bytes] = []
    worker = threading.Thread(target=lambda: results.append(reader.read()))
    worker.start()
    inside.wait()
    with pytest.raises(RuntimeError, match="two threads"):
        reader.read()
    leave.set()
    worker.join()
    assert results == [TEXT]


def test_read_only_target_is_refused() -> None:
    with pytest.raises((TypeError, BufferError, ValueError)):
        InflateReader(io.BytesIO(member(TEXT)), "gzip").readinto(bytes(10))  # type: ignore[arg-type]


# --- chunks


class Layer:
    """Members with known content, and the jobs that check them."""

    def __init__(self, contents: list[bytes], inner: int = 0) -> None:
        self.data = b""
        self.jobs = np.zeros(len(contents), np.dtype(JOB_FIELDS))
        for i, content in enumerate(contents):
            start = len(self.data)
            self.data += member(bytes(inner) + content + b"padding and the next header")
            self.jobs[i]["offset"], self.jobs[i]["end"] = start, len(self.data)
            self.jobs[i]["inner_offset"], self.jobs[i]["size"] = inner, len(content)
            self.jobs[i]["digest"] = np.frombuffer(hashlib.sha256(content).digest(), np.uint8)
            self.jobs[i]["flags"] = CHECK_CHUNK


CONTENTS = [NOISE[i * 1000 : i * 1500 + 1] * (1 + i % 7) for i in range(150)]


@pytest.fixture(params=["bytes", "file"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """How a blob is handed to the kernels."""
    if request.param == "bytes":
        yield lambda data: data
        return
    opened: list[int] = []

    def to_file(data: bytes) -> int:
        (tmp_path / "blob").write_bytes(data)
        opened.append(os.open(tmp_path / "blob", os.O_RDONLY))
        return opened[-1]

    yield to_file
    for fd in opened:
        os.close(fd)


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("inner", [0, 1, 700_000])
def test_chunks_that_are_right(source: Any, threads: int, inner: int) -> None:
    layer = Layer(CONTENTS[:40], inner)
    assert check_chunks(source(layer.data), layer.jobs, threads) is None


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_lowest_failure_wins(source: Any, threads: int) -> None:
    layer = Layer([NOISE * 4] * 40)
    held = source(layer.data)
    for bad in ([39], [3, 39], [17, 18], [0, 20]):
        jobs = layer.jobs.copy()
        jobs["digest"][bad, 5] ^= 1
        found = check_chunks(held, jobs, threads)
        assert found is not None
        index, status, errno, _, digest = found
        assert (index, status, errno) == (bad[0], MISMATCH, 0)
        assert digest == hashlib.sha256(NOISE * 4).digest()


def test_file_digest_runs_over_its_chunks(source: Any) -> None:
    layer = Layer(CONTENTS[:9])
    jobs = layer.jobs
    for first, last in ((0, 3), (3, 9)):
        whole = hashlib.sha256(b"".join(CONTENTS[first:last])).digest()
        jobs["flags"][first:last] |= FILE_PART
        jobs["flags"][last - 1] |= FILE_LAST
        jobs["file_digest"][last - 1] = np.frombuffer(whole, np.uint8)
    held = source(layer.data)
    assert check_chunks(held, jobs) is None
    jobs["flags"] &= ~CHECK_CHUNK
    assert check_chunks(held, jobs) is None
    jobs["file_digest"][8, 0] ^= 1
    found = check_chunks(held, jobs)
    assert found is not None
    assert found[:2] == (8, FILE_MISMATCH)
    assert found[4] == whole


def test_chunks_that_share_a_member(source: Any) -> None:
    """In order they are inflated once; out of order they are still right."""
    pieces = [NOISE[i * 997 : (i + 1) * 997] for i in range(200)]
    data = member(b"".join(pieces))
    jobs = np.zeros(len(pieces), np.dtype(JOB_FIELDS))
    jobs["end"], jobs["size"], jobs["flags"] = len(data), 997, CHECK_CHUNK
    jobs["inner_offset"] = np.arange(len(pieces)) * 997
    jobs["digest"] = [np.frombuffer(hashlib.sha256(piece).digest(), np.uint8) for piece in pieces]
    held = source(data)
    assert check_chunks(held, jobs) is None
    assert check_chunks(held, np.ascontiguousarray(jobs[::-1])) is None


@pytest.mark.parametrize(
    ("field", "value", "status"),
    [
        ("end", 30, -62),
        ("end", 1 << 62, 0),
        ("size", 1 << 62, None),
        ("inner_offset", 1 << 62, None),
        ("offset", 1, -60),
        ("offset", -1, -60),
        ("size", -1, -60),
        ("inner_offset", -1, -60),
        ("end", 0, None),
        ("end", -1, -60),
    ],
)
def test_hostile_numbers(source: Any, field: str, value: int, status: int | None) -> None:
    layer = Layer([NOISE])
    layer.jobs[field][0] = value
    found = check_chunks(source(layer.data), layer.jobs)
    if status == 0:
        assert found is None
    else:
        assert found is not None
        assert found[1] < 0
        assert status in (None, found[1])


def test_bomb_in_a_chunk_takes_no_memory() -> None:
    """A gigabyte of zeros promised and delivered passes through blocks of fixed size."""
    packer = zlib.compressobj(9, wbits=31)
    zeros = bytes(1 << 20)
    data = b"".join(packer.compress(zeros) for _ in range(256)) + packer.flush()
    whole = hashlib.sha256()
    for _ in range(256):
        whole.update(zeros)
    jobs = np.zeros(1, np.dtype(JOB_FIELDS))
    jobs["end"], jobs["size"], jobs["flags"] = len(data), 256 << 20, CHECK_CHUNK
    jobs["digest"] = np.frombuffer(whole.digest(), np.uint8)
    assert check_chunks(data, jobs) is None


def test_check_chunks_refuses_other_arrays() -> None:
    layer = Layer(CONTENTS[:4])
    for jobs in (layer.jobs[::2], np.zeros(4), layer.jobs.reshape(2, 2)):
        with pytest.raises(ValueError, match="jobs must be"):
            check_chunks(layer.data, jobs)
    with pytest.raises(ValueError, match="threads"):
        check_chunks(layer.data, layer.jobs, 0)
    with pytest.raises(ValueError, match="descriptor"):
        check_chunks(-1, layer.jobs)
    assert check_chunks(layer.data, layer.jobs[:0]) is None


def test_closed_descriptor_is_a_read_error(tmp_path: Path) -> None:
    layer = Layer(CONTENTS[:4])
    (tmp_path / "blob").write_bytes(layer.data)
    fd = os.open(tmp_path / "blob", os.O_RDONLY)
    os.close(fd)
    found = check_chunks(fd, layer.jobs)
    assert found is not None
    assert (found[0], found[1], found[2]) == (0, -11, 9)
    with pytest.raises(SourceError, match="cannot be read: Bad file descriptor"):
        read_chunk(fd, 0, 10, 0, 10)


def test_read_chunk(source: Any) -> None:
    data = member(TEXT) + member(NOISE)
    held, border = source(data), len(member(TEXT))
    assert read_chunk(held, 0, border, 0, len(TEXT)) == TEXT
    assert read_chunk(held, 0, border, 100, 7) == TEXT[100:107]
    assert read_chunk(held, 0, border, 0, 0) == b""
    assert read_chunk(held, border, len(data), 5, 10) == NOISE[5:15]
    assert read_chunk(held, 0, len(data), len(TEXT) - 1, 3) == TEXT[-1:] + NOISE[:2]
    with pytest.raises(SourceError, match="some file: the gzip stream ends too early"):
        read_chunk(held, 0, border, 0, len(TEXT) + 1, name="some file")
    with pytest.raises(SourceError, match="bad gzip data"):
        read_chunk(held, 3, border, 0, 1)
    for numbers in ((-1, 1, 0, 0), (2, 1, 0, 0), (0, 1, -1, 0), (0, 1, 0, -1)):
        with pytest.raises(ValueError, match="ascend"):
            read_chunk(held, *numbers)
