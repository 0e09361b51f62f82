"""Hashing: SHA-256 of streams alone and side by side, and what a build's digests cost each and together."""

from __future__ import annotations

import hashlib

import corpus
import pytest
from conftest import MIB, Measured, Staged, build
from estargz._sha256 import digest_many

SIZES = [1 << power for power in range(10, 24, 2)]  # 1 KiB .. 4 MiB

# Digests -> the parts that compute them. Side by side, two cost little more than one.
DIGESTS = {"chunks": ["chunk hash"], "stream": ["stream hash"], "both": ["chunk hash", "stream hash"]}


@pytest.fixture(scope="session", params=SIZES)
def pieces(request: pytest.FixtureRequest, content: dict[str, bytes]) -> list[bytes]:
    return corpus.cut(content["binary"][: 8 * MIB], request.param)


def by_hashlib(pieces: list[bytes]) -> list[bytes]:
    return [hashlib.sha256(piece, usedforsecurity=False).digest() for piece in pieces]


def alone(pieces: list[bytes]) -> list[bytes]:
    return [digest for piece in pieces for digest in digest_many([piece])]


WAYS = {"alone": alone, "side-by-side": digest_many, "hashlib": by_hashlib}


@pytest.mark.parametrize("way", WAYS)
def test_digests(measured: Measured, pieces: list[bytes], way: str) -> None:
    """The seconds are those of calls from Python. The whole is a build of files that hold the pieces."""
    size = sum(map(len, pieces))
    tar = corpus.make_tar(pieces)
    made = measured(lambda: WAYS[way](pieces), tar, size=size, entries=len(pieces))
    assert made == by_hashlib(pieces)


@pytest.mark.parametrize("digests", DIGESTS)
@pytest.mark.parametrize("size", [64 << 10, 8 * MIB])
def test_layer(staged: Staged, mixed: bytes, size: int, digests: str) -> None:
    """In a build, of files of one chunk and of several: then the chunks' digests are two, each chunk's and the file's.

    The seconds are those of the hash stage and of what has to be done in order, that is a file's digest over its chunks and
    little else.
    """
    tar = corpus.make_tar(corpus.cut(mixed, size))
    staged(("hash", "order"), tar, parts=DIGESTS[digests], size=len(mixed))


def test_blob(staged: Staged, mixed: bytes) -> None:
    """The blob's digest. The seconds are those of what has to be done in order; rates are of the blob."""
    tar = corpus.make_tar(corpus.cut(mixed, MIB))
    expected = build(tar)
    parts = ["chunk hash", "compress", "blob hash", "write"]
    layer = staged(("order",), tar, parts=parts, size=expected.size)
    assert layer.digest == expected.digest
