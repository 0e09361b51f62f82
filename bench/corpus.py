"""Seeded content: the same bytes on every machine.

    python bench/corpus.py DIR bytes|files COUNT

fills a new directory with COUNT bytes in files of all sizes, or with COUNT files of 1 KiB.
"""

from __future__ import annotations

import os
import struct
import sys
import tarfile
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from random import Random

SEED = 20240229
SECTION = 4096
LETTERS = "etaoinshrdlucmfwypvbgkjqxz"
# A day after another day, and no whole second: two trees are told apart by times, as a layer's and its parent's are.
TIME_NS = 1_700_000_000_123_456_789
WHOLE_TIME_NS = 1_700_000_000_000_000_000


def text(size: int, seed: int = SEED) -> bytes:
    """Like source code and prose: words of a vocabulary, the frequent ones far more often, in indented lines."""
    chance = Random(seed)
    words = ["".join(chance.choices(LETTERS, range(26, 0, -1), k=chance.randint(2, 11))) for _ in range(4000)]
    ends = [" "] * 9 + ["\n", "\n    ", "(", ") ", ", ", "_", ".", " = "]
    weights = list(accumulate(1 / rank for rank in range(1, len(words) + 1)))
    count = size // 4 + 64
    chosen = chance.choices(words, cum_weights=weights, k=count)
    return "".join(map(str.__add__, chosen, chance.choices(ends, k=count))).encode()[:size]


def binary(size: int, seed: int = SEED) -> bytes:
    """Like a shared library: instructions and their operands, tables of offsets, zeros, noise."""
    chance = Random(seed)
    opcodes = [chance.randbytes(chance.choice((1, 2, 2, 3, 3, 4, 5))) for _ in range(400)]
    weights = list(accumulate(1 / rank for rank in range(1, len(opcodes) + 1)))
    sections: list[bytes] = []
    for kind in chance.choices(("code", "table", "zeros", "noise"), (55, 27, 10, 8), k=size // SECTION + 1):
        if kind == "code":
            sections.append(b"".join(chance.choices(opcodes, cum_weights=weights, k=SECTION // 2))[:SECTION])
        elif kind == "table":
            sections.append(table(chance))
        else:
            sections.append(chance.randbytes(SECTION) if kind == "noise" else bytes(SECTION))
    return b"".join(section.ljust(SECTION, b"\0") for section in sections)[:size]


def table(chance: Random) -> bytes:
    """Growing offsets and small flags."""
    steps = accumulate(chance.choices(range(8, 136, 8), k=SECTION // 8), initial=chance.randrange(1 << 24))
    flags = chance.choices((0, 1, 2, 18, 255), (60, 20, 10, 5, 5), k=SECTION // 8)
    return b"".join(struct.pack("<II", step, flag) for step, flag in zip(steps, flags, strict=False))


def sizes_of(total: int, seed: int = SEED) -> list[int]:
    """File sizes as trees have them: most are a few KiB, most bytes are in the large ones."""
    chance = Random(seed)
    sizes: list[int] = []
    while sum(sizes) < total:
        sizes.append(min(int(chance.lognormvariate(8.3, 2.0)), total // 4 + 1))
    return sizes


def make_tree(folder: Path, sizes: Iterable[int], content: bytes, per_directory: int = 100) -> int:
    """Fills a new directory with files cut out of ``content``; their bytes in all."""
    chance = Random(SEED)
    total = 0
    for number, size in enumerate(sizes):
        inner = folder / f"d{number // per_directory:04d}"
        if not number % per_directory:
            inner.mkdir(parents=True)
        at = chance.randrange(max(1, len(content) - size))
        path = inner / f"f{number:06d}"
        path.write_bytes(content[at : at + size])
        os.utime(path, ns=(TIME_NS, TIME_NS))
        total += min(size, len(content))
    return total


def cut(data: bytes, size: int) -> list[bytes]:
    """``data`` in pieces of ``size`` bytes; the last may be shorter."""
    return [data[at : at + size] for at in range(0, len(data), size)]


def make_tar(payloads: Iterable[bytes], per_directory: int = 100) -> bytes:
    """A tar stream of files that hold the payloads."""
    blocks: list[bytes] = []
    for number, payload in enumerate(payloads):
        info = tarfile.TarInfo(f"d{number // per_directory:04d}/f{number:06d}")
        info.size = len(payload)
        info.mtime = TIME_NS // 10**9
        blocks += [info.tobuf(tarfile.USTAR_FORMAT), payload, bytes(-len(payload) % tarfile.BLOCKSIZE)]
    return b"".join([*blocks, bytes(2 * tarfile.BLOCKSIZE)])


def main() -> None:
    folder, kind, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    sizes = sizes_of(count) if kind == "bytes" else [1024] * count
    make_tree(folder, sizes, text(8 << 20) + binary(8 << 20))


if __name__ == "__main__":
    main()
