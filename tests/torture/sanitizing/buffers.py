"""What assembly does with buffers that are exactly as large as they must be, for Valgrind to watch. Run by sanitizers.py.

Layers at each level, and members inflated from memory that ends where they end, whole and cut anywhere. Valgrind has no
AVX-512, so ISA-L and libcrypto take the code that they have for older processors. Prints a line for each case.
"""

from __future__ import annotations

import gzip
import io
import random
import sys
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import zstandard
from reference.blobs import tar_of

import estargz
from estargz import _inflate, _inflate_ahead
from estargz.errors import EstargzError
from estargz.options import MAX_LEVEL

RNG = random.Random(4)
PAYLOADS = [
    b"",
    b"x",
    bytes(70_000),
    RNG.randbytes(40_000),
    b"".join(RNG.choices([b"ab", b"cde", b"\0" * 9], k=30_000)),
]
CUTS = 24
LEVELS = {"estargz": range(MAX_LEVEL + 1), "zstd": (1, 3, 10)}


def exact(data: bytes) -> np.ndarray:
    """A copy behind which memory ends; bytes have one more."""
    made = np.empty(len(data), np.uint8)
    made[:] = np.frombuffer(data, np.uint8)
    return made


def inflate(data: bytes, kind: str) -> bytes:
    return _inflate_ahead.InflateAhead(exact(data), kind, threads=1).read()


def main() -> None:
    tar = tar_of(*((f"f{number}", payload) for number, payload in enumerate(PAYLOADS)))
    for compression, levels in LEVELS.items():
        for level in levels:
            print(f"layer: {compression} at {level}", flush=True)
            writer = estargz.Writer(io.BytesIO(), compression=compression, level=level, threads=1)
            writer.write(tar)
            writer.close()
    for number, payload in enumerate(PAYLOADS):
        packed = {"gzip": gzip.compress(payload), "zstd": zstandard.compress(payload), "plain": payload}
        for kind, data in packed.items():
            print(f"inflate: {kind}, payload {number}", flush=True)
            assert inflate(data, kind) == payload
            for cut in RNG.choices(range(len(data) + 1), k=CUTS):
                with suppress(EstargzError, ValueError):
                    inflate(data[:cut], kind)
        print(f"chunk: payload {number}", flush=True)
        assert _inflate.read_chunk(exact(packed["gzip"]), 0, len(packed["gzip"]), 0, len(payload)) == payload


if __name__ == "__main__":
    main()
