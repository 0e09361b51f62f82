"""Members: what each compression level costs, and how much smaller it makes what.

The seconds are the compressor's own, those of the compress stage. Chunks are hashed as well, outside that clock: the table
of contents states their digests, so that without them the ratio would not be a layer's.
"""

from __future__ import annotations

import corpus
import pytest
from conftest import MIB, Staged

SLOW = 8  # libdeflate's levels from here on take about a second
KIB = 1 << 10


def check(staged: Staged, tar: bytes, size: int, level: int) -> None:
    rounds = 2 if level >= SLOW else 5
    parts = ["chunk hash", "compress", "write"]
    layer = staged(("compress",), tar, parts=parts, size=size, rounds=rounds, weigh=True, level=level)
    assert 0 < layer.size < layer.uncompressed_size


@pytest.mark.parametrize("level", range(13))
@pytest.mark.parametrize("kind", ["text", "binary"])
def test_level(staged: Staged, content: dict[str, bytes], kind: str, level: int) -> None:
    data = content[kind][: 8 * MIB]
    check(staged, corpus.make_tar([data]), len(data), level)


@pytest.mark.parametrize("level", [0, 2, 6])
@pytest.mark.parametrize("size", [KIB, 16 * KIB, 256 * KIB])
def test_size(staged: Staged, content: dict[str, bytes], size: int, level: int) -> None:
    """What beginning a member costs: files of equal size, each a member of its own."""
    data = content["text"][: 4 * MIB]
    check(staged, corpus.make_tar(corpus.cut(data, size)), len(data), level)
