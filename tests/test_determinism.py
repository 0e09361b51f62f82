"""The same input gives the same bytes: whatever the threads, the memory, the pieces it comes in, and the process."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import random
import shutil
import struct
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import REPOSITORY, missing
from estargz._sha256 import digest_many, lanes
from hypothesis import given, settings
from hypothesis import strategies as st
from tars import END, blob_of, entry
from trees import Tree

import estargz
from estargz import Writer

pytestmark = pytest.mark.timeout(120)

LEVELS = range(13)
COMPRESSIONS = ["estargz", "gzip", "zstd", "uncompressed"]
MEMBERS = 8000


@functools.cache
def natural_text() -> bytes:
    """Some megabytes that people wrote."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return text[: 6 << 20]


@functools.cache
def snippets() -> list[bytes]:
    """Many small payloads, neighbours from three places far apart in the text."""
    chance = random.Random(8)
    text = natural_text()
    at = [0, len(text) // 3, 2 * len(text) // 3]
    found = []
    for i in range(MEMBERS):
        size = int(40 * 75 ** chance.random())  # 40 to 3,000 bytes, more of the short ones
        found.append(text[at[i % 3] : at[i % 3] + size])
        at[i % 3] = (at[i % 3] + size) % (len(text) - 3000)
    return found


@functools.cache
def small_members() -> bytes:
    return b"".join(entry(b"s/%05d" % i, data) for i, data in enumerate(snippets())) + END


@functools.cache
def mixed() -> bytes:
    """Noise, text, holes, large and small files, and entries without a payload."""
    chance = random.Random(3)
    text = natural_text()
    parts = [entry(b"large", text[:900_000] + chance.randbytes(500_000) + bytes(700_000))]
    for i in range(200):
        data = [b"", text[i * 999 :][: chance.randrange(9000)], chance.randbytes(chance.randrange(4000)), bytes(2000)][
            i % 4
        ]
        parts += [entry(b"f%d" % i, data), entry(b"d%d/" % i, type=b"5")]
    return b"".join(parts) + END


def digests(tar: bytes, ways: list[dict[str, int]], **options: object) -> set[tuple[str, str, str | None]]:
    layers = [estargz.build(io.BytesIO(tar), io.BytesIO(), **options, **way) for way in ways]  # type: ignore[arg-type]
    return {(layer.digest, layer.diff_id, layer.toc_digest) for layer in layers}


@pytest.mark.parametrize("level", LEVELS)
def test_threads_at_each_level(level: int) -> None:
    ways = [{"threads": threads} for threads in ((1, 2, 3, 8) if level < 10 else (1, 3))]
    assert len(digests(mixed(), ways, level=level, chunk_size=100_000)) == 1


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_threads_and_memory(compression: str) -> None:
    ways = [{"threads": threads} for threads in (1, 2, 3, 8)] + [{"memory": m << 20} for m in (30, 40, 500)]
    ways += [{"threads": 8, "memory": 30 << 20}, {"threads": 1, "memory": 30 << 20}]
    assert len(digests(mixed(), ways, compression=compression)) == 1


@functools.cache
def several_frames() -> bytes:
    """Some zstd frames of what the windows of one frame could find in another."""
    return b"".join(entry(b"text%d" % i, natural_text()[: 2 << 20]) + mixed()[:-1024] for i in range(5)) + END


@pytest.mark.parametrize("level", [1, 3, 5, 8, 13])
def test_threads_at_levels_of_zstd(level: int) -> None:
    """A worker's context is used again, after whatever it has compressed before."""
    ways = [{"threads": threads} for threads in (1, 2, 3, 8)]
    assert len(digests(several_frames(), ways, compression="zstd", level=level)) == 1


def test_threads_at_the_slowest_level_of_zstd() -> None:
    tar = entry(b"noise", random.Random(5).randbytes(19 << 20)) + mixed()
    assert len(digests(tar, [{"threads": threads} for threads in (1, 3)], compression="zstd", level=19)) == 1


@pytest.mark.parametrize("options", [{"chunk_size": 5000}, {"min_chunk_size": 20_000}, {"min_chunk_size": 3 << 20}])
def test_threads_and_members(options: dict[str, int]) -> None:
    assert len(digests(mixed(), [{"threads": threads} for threads in (1, 2, 3, 8)], **options)) == 1


@pytest.mark.parametrize("size", [977, 4093, 100_003, 1 << 22])
def test_pieces(size: int, tmp_path: Path) -> None:
    tar = mixed()
    with Writer(io.BytesIO(), chunk_size=100_000) as writer:
        for at in range(0, len(tar), size):
            writer.write(tar[at : at + size])
    (tmp_path / "tar").write_bytes(tar)
    (tmp_path / "tar.gz").write_bytes(gzip.compress(tar, 1))
    layers = [estargz.build(tmp_path / name, io.BytesIO(), chunk_size=100_000) for name in ("tar", "tar.gz")]
    assert layers == [writer.layer, writer.layer]


def test_trees(tmp_path: Path) -> None:
    tree = Tree(tmp_path / "tree")
    for i, data in enumerate(snippets()[:600]):
        tree.file(f"{i % 20}/{i}", data)
    tree.file("large", natural_text()[: 3 << 20])
    made = {
        estargz.build(tmp_path / "tree", io.BytesIO(), threads=threads, chunk_size=100_000)
        for threads in (1, 2, 3, 8)
        for _ in range(2)
    }
    assert len(made) == 1


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_many_small_members(level: int) -> None:
    """As many as it takes for an address to show, at ISA-L's levels."""
    assert len(digests(small_members(), [{"threads": threads} for threads in (1, 2, 3, 8)], level=level)) == 1


OTHER_PROCESS = """
import io, sys
import estargz
ballast = [bytearray(int(size)) for size in sys.argv[2:]]
for level in (1, 2, 3):
    print(estargz.build(sys.argv[1], io.BytesIO(), level=level, threads=2).digest)
"""


def test_processes(tmp_path: Path) -> None:
    """Each has its own layout of addresses."""
    (tmp_path / "tar").write_bytes(small_members())
    started = [
        subprocess.Popen(
            [sys.executable, "-c", OTHER_PROCESS, str(tmp_path / "tar"), *ballast], stdout=subprocess.PIPE, text=True
        )
        for ballast in ([], ["70000"], ["1000000", "9000000"])
    ]
    outputs = {process.communicate(timeout=60)[0] for process in started}
    assert [process.returncode for process in started] == [0, 0, 0]
    here = [blob_of(small_members(), level=level)[0].digest for level in (1, 2, 3)]
    assert outputs == {"".join(f"{digest}\n" for digest in here)}


# Members on standard input, each after its length, are deflated by streams at eight addresses; counts the members
# that do not come out the same at all of them: anywhere, and where isal_place.h puts a stream.
ADDRESSES = r"""
#include <isa-l.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "isal_place.h"

enum { PLACES = 8, ROOM = 1 << 16 };

static unsigned deflate_at(struct isal_zstream *s, int level, uint8_t *work, size_t work_size, uint8_t *in,
                           unsigned size, uint8_t *out) {
    isal_deflate_init(s);
    s->level = level, s->level_buf = work, s->level_buf_size = work_size;
    s->gzip_flag = IGZIP_GZIP, s->end_of_stream = 1;
    s->next_in = in, s->avail_in = size, s->next_out = out, s->avail_out = ROOM;
    if (isal_deflate(s) != COMP_OK || s->avail_in) exit(3);
    return s->total_out;
}

int main(int argc, char **argv) {
    static uint8_t in[ROOM], first[ROOM], out[ROOM];
    int level = atoi(argv[1]);
    size_t work_size = level == 1 ? ISAL_DEF_LVL1_LARGE : ISAL_DEF_LVL2_LARGE;
    uint8_t *work = malloc(work_size);
    struct isal_zstream *anywhere[PLACES], *placed[PLACES];
    unsigned size, differ[2] = {0, 0};
    if (argc != 2) return 2;
    for (int i = 0; i < PLACES; i++) {
        uintptr_t address = ((uintptr_t)0x31000000 + 7919u * i) << 16;
        anywhere[i] = mmap((void *)address, sizeof(struct isal_zstream), PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        placed[i] = est_place(sizeof(struct isal_zstream));
        if (anywhere[i] == MAP_FAILED || !placed[i]) return 4;
    }
    while (fread(&size, 4, 1, stdin) == 1 && size <= sizeof(in) && fread(in, size, 1, stdin) == 1)
        for (int kind = 0; kind < 2; kind++) {
            int same = 1;
            unsigned length = 0;
            for (int i = 0; i < PLACES && same; i++) {
                unsigned now = deflate_at((kind ? placed : anywhere)[i], level, work, work_size, in, size, out);
                if (i) same = now == length && !memcmp(first, out, now);
                else memcpy(first, out, length = now);
            }
            differ[kind] += !same;
        }
    printf("%u %u\n", differ[0], differ[1]);
    for (int i = 0; i < PLACES; i++) est_unplace(placed[i], sizeof(struct isal_zstream));
    return 0;
}
"""


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("cc") is None or shutil.which("pkg-config") is None:
        missing("there is no C compiler or no pkg-config")
    folder = tmp_path_factory.mktemp("addresses")
    found = subprocess.run(["pkg-config", "--cflags", "--libs", "libisal"], capture_output=True, text=True, check=False)
    if found.returncode:
        missing("pkg-config does not know libisal")
    (folder / "addresses.c").write_text(ADDRESSES)
    command = ["cc", "-O1", "-I", REPOSITORY / "ext" / "estargz", folder / "addresses.c", "-o", folder / "addresses"]
    done = subprocess.run([*command, *found.stdout.split()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "addresses"


@pytest.mark.parametrize("level", [1, 2])
def test_addresses_that_show_and_those_that_do_not(addresses: Path, level: int) -> None:
    """Why isal_place.h is needed, and that it helps. A chunk that follows another one is a member of payload alone."""
    members = b"".join(struct.pack("<I", len(data)) + data for data in snippets())
    done = subprocess.run([addresses, str(level)], input=members, capture_output=True, check=True, timeout=60)
    anywhere, placed = map(int, done.stdout.split())
    assert placed == 0
    if anywhere == 0:
        pytest.skip("this ISA-L, or its code for this CPU, does not let a stream's address show")


# --- SHA-256, on which every digest rests


def test_digests_of_every_small_size() -> None:
    data = random.Random(1).randbytes(300)
    buffers = [data[:size] for size in range(301)]
    wanted = [hashlib.sha256(buffer).digest() for buffer in buffers]
    assert digest_many(buffers) == wanted
    assert digest_many(buffers[::-1]) == wanted[::-1]
    assert [digest_many([buffer])[0] for buffer in buffers] == wanted
    for size in range(301):  # beside another stream, longer or shorter
        pair = [buffers[size], buffers[300 - size]]
        assert digest_many(pair) == [wanted[size], wanted[300 - size]]


def test_no_buffers() -> None:
    assert digest_many([]) == []
    assert lanes() in (1, 2)


def test_streams_that_are_continued() -> None:
    """Each run begins in the middle of a block."""
    data = random.Random(2).randbytes(1000)
    for repeat in (2, 3, 7):
        buffers = [data[:size] for size in (0, 1, 31, 55, 56, 63, 64, 65, 127, 128, 129, 500, 1000)]
        assert digest_many(buffers, repeat) == [hashlib.sha256(buffer * repeat).digest() for buffer in buffers]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 5000), max_size=70), st.integers(1, 5), st.integers(0, 2**32))
def test_many_streams(sizes: list[int], repeat: int, seed: int) -> None:
    chance = random.Random(seed)
    buffers = [chance.randbytes(size) for size in sizes]
    wanted = [hashlib.sha256(buffer * repeat).digest() for buffer in buffers]
    assert digest_many(buffers, repeat) == wanted


def test_unaligned_and_foreign_buffers() -> None:
    data = random.Random(4).randbytes(4000)
    buffers = [memoryview(data)[at : at + 1000 + at] for at in range(70)] + [
        bytearray(data),
        memoryview(data).cast("I"),
    ]
    assert digest_many(buffers) == [hashlib.sha256(bytes(buffer)).digest() for buffer in buffers]
    with pytest.raises(TypeError):
        digest_many([b"x", "text"])
    with pytest.raises(BufferError):
        digest_many([b"x", memoryview(data)[::2]])


def test_large_streams() -> None:
    data = random.Random(5).randbytes(3_000_001)
    assert digest_many([data, data[:1_000_000], data[1:]]) == [
        hashlib.sha256(part).digest() for part in (data, data[:1_000_000], data[1:])
    ]
