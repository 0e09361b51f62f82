"""Inflating: in order, ahead of the reader, and several members at once. The content is a tar stream of mixed files.

Rates are those of the inflated bytes, taken by the reader in blocks and not looked at.
"""

from __future__ import annotations

import io
import zlib

import corpus
import pytest
from conftest import MIB, Measured

from estargz._inflate import InflateReader
from estargz._inflate_ahead import InflateAhead

# What a stream is -> bytes that each of its gzip members holds.
MEMBERS = {"one-member": 1 << 40, "members-1MiB": MIB, "members-16KiB": 16 << 10}


@pytest.fixture(scope="session")
def tar(mixed: bytes) -> bytes:
    return corpus.make_tar(corpus.cut(mixed, 64 << 10))


@pytest.fixture(scope="session", params=MEMBERS)
def stream(request: pytest.FixtureRequest, tar: bytes) -> bytes:
    packed = []
    for piece in corpus.cut(tar, min(MEMBERS[request.param], len(tar))):
        packer = zlib.compressobj(6, wbits=31)
        packed.append(packer.compress(piece) + packer.flush())
    return b"".join(packed)


def test_in_order(measured: Measured, tar: bytes, stream: bytes) -> None:
    block = bytearray(MIB)

    def inflate() -> int:
        reader = InflateReader(io.BytesIO(stream), "gzip")
        return sum(iter(lambda: reader.readinto(block), 0))

    assert measured(inflate, tar, size=len(tar)) == len(tar)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_ahead(measured: Measured, tar: bytes, stream: bytes, threads: int) -> None:
    def inflate() -> int:
        with InflateAhead(stream, "gzip", threads=threads) as inflated:
            return sum(len(block) for block in inflated.blocks())

    assert measured(inflate, tar, size=len(tar)) == len(tar)
