"""A tree becomes a layer, end to end: types, threads, levels, what decides how many batches there are and how full.

The seconds are those of the whole call. Their share says how they compare with default options and one thread.
"""

from __future__ import annotations

import io
import os
import zlib
from pathlib import Path
from typing import Any

import corpus
import pytest
from conftest import MIB, Measured, Planted

import estargz

FILES_MOST = 10_000  # making more of them takes longer than all of this
FILE_SIZE = 16 << 10


def check(measured: Measured, folder: Path, size: int, entries: int, **options: Any) -> None:
    def build() -> estargz.Layer:
        return estargz.build(folder, os.devnull, **options)

    layer = measured(build, folder, size=size, entries=entries, weigh=True)
    assert layer.uncompressed_size > size


@pytest.fixture(scope="session")
def total(real: bool) -> int:
    return 64 * MIB if real else MIB


@pytest.fixture(scope="session")
def tree(total: int, planted: Planted) -> tuple[Path, int, int]:
    """A tree with sizes as they are found, its bytes, and its files."""
    sizes = corpus.sizes_of(total)
    return *planted(sizes), len(sizes)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("compression", ["estargz", "gzip", "uncompressed"])
def test_compression(measured: Measured, tree: tuple[Path, int, int], compression: str, threads: int) -> None:
    check(measured, *tree, compression=compression, threads=threads)


@pytest.mark.parametrize("level", [0, 1, 2, 3, 4, 6])
def test_level(measured: Measured, tree: tuple[Path, int, int], level: int) -> None:
    check(measured, *tree, level=level, threads=2)


@pytest.mark.parametrize("file_size", [1 << 10, 16 << 10, 256 << 10, 4 << 20, 8 << 20])
def test_file_size(measured: Measured, planted: Planted, total: int, file_size: int) -> None:
    """Equal files: a batch holds many members, or one."""
    count = min(max(1, total // file_size), FILES_MOST)
    check(measured, *planted([file_size] * count), count, threads=2)


@pytest.mark.parametrize("chunk_size", [64 << 10, 1 << 20, 16 << 20])
def test_chunk_size(measured: Measured, tree: tuple[Path, int, int], chunk_size: int) -> None:
    check(measured, *tree, chunk_size=chunk_size, threads=2)


@pytest.mark.parametrize("min_chunk_size", [64 << 10, 1 << 20])
def test_min_chunk_size(measured: Measured, tree: tuple[Path, int, int], min_chunk_size: int) -> None:
    check(measured, *tree, min_chunk_size=min_chunk_size, threads=2)


@pytest.mark.parametrize("memory", [21 * MIB, 41 * MIB], ids=["2-slots", "4-slots"])
def test_memory(measured: Measured, tree: tuple[Path, int, int], memory: int) -> None:
    """Batches under way: the fewest there can be, and twice as many."""
    check(measured, *tree, memory=memory, threads=2)


@pytest.mark.parametrize("form", ["plain", "gzip"])
def test_tar(measured: Measured, mixed: bytes, form: str) -> None:
    """A tar stream, which a thread of its own takes in and inflates."""
    tar = corpus.make_tar(corpus.cut(mixed, FILE_SIZE))
    source = tar if form == "plain" else zlib.compress(tar, 1, wbits=31)

    def build() -> estargz.Layer:
        return estargz.build(io.BytesIO(source), os.devnull, threads=2)

    layer = measured(build, tar, size=len(mixed), entries=len(mixed) // FILE_SIZE, weigh=True)
    assert layer.uncompressed_size > len(tar)
