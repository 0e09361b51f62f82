"""Chunk splitting: where chunks, members and batches begin.

The seconds are those of the source stage with nothing else done. Of a tree's files no byte is touched, so that is listing
and splitting alone; a tar stream is copied into the batches on the way. Entries are chunks. The whole is a build with
chunks of the default size.
"""

from __future__ import annotations

import corpus
import pytest
from conftest import MIB, Planted, Source, Staged

KIB = 1 << 10


@pytest.fixture(scope="session", params=["tree", "tar"])
def large(request: pytest.FixtureRequest, planted: Planted, mixed: bytes) -> Source:
    """Two files."""
    size = len(mixed) // 2
    return planted([size] * 2)[0] if request.param == "tree" else corpus.make_tar(corpus.cut(mixed, size))


@pytest.fixture(scope="session", params=["tree", "tar"])
def small(request: pytest.FixtureRequest, planted: Planted, mixed: bytes) -> Source:
    """Files of 4 KiB."""
    size = 4 * KIB
    if request.param == "tree":
        return planted([size] * (len(mixed) // size))[0]
    return corpus.make_tar(corpus.cut(mixed, size))


def check(staged: Staged, source: Source, size: int, chunk_size: int, min_chunk_size: int = 0) -> None:
    layer = staged(
        ("source",),
        source,
        parts=[],
        size=size,
        entries=-(-size // chunk_size),
        chunk_size=chunk_size,
        min_chunk_size=min_chunk_size,
    )
    assert layer.uncompressed_size > size


@pytest.mark.parametrize("chunk_size", [4 * KIB, 64 * KIB, MIB, 4 * MIB])
def test_large_files(staged: Staged, large: Source, mixed: bytes, chunk_size: int) -> None:
    check(staged, large, len(mixed), chunk_size)


@pytest.mark.parametrize("min_chunk_size", [64 * KIB, MIB])
def test_large_files_joined(staged: Staged, large: Source, mixed: bytes, min_chunk_size: int) -> None:
    """Chunks of 4 KiB, many in a member."""
    check(staged, large, len(mixed), 4 * KIB, min_chunk_size)


@pytest.mark.parametrize("min_chunk_size", [0, 64 * KIB, MIB])
def test_small_files(staged: Staged, small: Source, mixed: bytes, min_chunk_size: int) -> None:
    """A file a member, or many."""
    check(staged, small, len(mixed), 4 * KIB, min_chunk_size)
