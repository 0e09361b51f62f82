"""SHA-256: one stream, two streams interleaved, and the standard library's."""

from __future__ import annotations

import hashlib
from random import Random

import pytest
from conftest import Measured
from estargz._sha256 import digest_many, lanes

SIZES = [1 << power for power in range(10, 24, 2)]  # 1 KiB .. 4 MiB


def buffers(count: int, size: int) -> list[bytes]:
    chance = Random(size)
    return [chance.randbytes(size) for _ in range(count)]


def digests(data: list[bytes]) -> list[bytes]:
    return [hashlib.sha256(each, usedforsecurity=False).digest() for each in data]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 2], ids=["one", "pair"])
def test_digest_many(measured: Measured, size: int, count: int) -> None:
    data = buffers(count, size)
    made = measured(lambda: digest_many(data), size=count * size, rounds=None, lanes=lanes())
    assert made == digests(data)


@pytest.mark.parametrize("size", SIZES)
def test_hashlib(measured: Measured, size: int) -> None:
    data = buffers(1, size)
    assert measured(lambda: digests(data), size=size, rounds=None) == digest_many(data)
