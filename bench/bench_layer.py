"""A tree becomes a layer, end to end: types, threads, and what decides how many batches there are and how full."""

from __future__ import annotations

import os
from typing import Any

import corpus
import pytest
from conftest import MIB, Measured, Planted

import estargz


def build(folder: Any, **options: Any) -> estargz.Layer:
    return estargz.build(folder, os.devnull, **options)


def check(measured: Measured, planted: Planted, sizes: list[int], **options: Any) -> None:
    folder, size = planted(sizes)
    layer = measured(lambda: build(folder, **options), size=size, entries=len(sizes))
    assert layer.uncompressed_size > size


@pytest.fixture(scope="session")
def total(real: bool) -> int:
    return 64 * MIB if real else MIB


@pytest.fixture(scope="session")
def sizes(total: int) -> list[int]:
    return corpus.sizes_of(total)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("compression", ["estargz", "gzip", "uncompressed"])
def test_compression(measured: Measured, planted: Planted, sizes: list[int], compression: str, threads: int) -> None:
    check(measured, planted, sizes, compression=compression, threads=threads)


@pytest.mark.parametrize("level", [0, 1, 2, 3, 4, 6])
def test_level(measured: Measured, planted: Planted, sizes: list[int], level: int) -> None:
    check(measured, planted, sizes, level=level, threads=2)


@pytest.mark.parametrize("file_size", [1 << 10, 16 << 10, 256 << 10, 4 << 20, 8 << 20])
def test_file_size(measured: Measured, planted: Planted, total: int, file_size: int) -> None:
    """Equal files: a batch holds many members, or one."""
    check(measured, planted, [file_size] * max(1, total // file_size), threads=2)


@pytest.mark.parametrize("chunk_size", [64 << 10, 1 << 20, 4 << 20, 16 << 20])
def test_chunk_size(measured: Measured, planted: Planted, sizes: list[int], chunk_size: int) -> None:
    check(measured, planted, sizes, chunk_size=chunk_size, threads=2)


@pytest.mark.parametrize("min_chunk_size", [0, 64 << 10, 1 << 20])
def test_min_chunk_size(measured: Measured, planted: Planted, sizes: list[int], min_chunk_size: int) -> None:
    check(measured, planted, sizes, min_chunk_size=min_chunk_size, threads=2)


@pytest.mark.parametrize("memory", [21 * MIB, 41 * MIB, None], ids=["2-slots", "4-slots", "default"])
def test_memory(measured: Measured, planted: Planted, sizes: list[int], memory: int | None) -> None:
    """Batches under way: the fewest there can be, twice as many, and the default."""
    check(measured, planted, sizes, memory=memory, threads=2)
