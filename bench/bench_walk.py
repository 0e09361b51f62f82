"""Walking: what an entry costs when there is nothing to compress, and comparing two trees of which 1 % differs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import corpus
import pytest
from conftest import Measured, Planted

import estargz

DAY_NS = 86_400 * 10**9


@pytest.fixture(scope="session")
def count(real: bool) -> int:
    return 10_000 if real else 500


def build(upper: Path, lower: Path | None = None, threads: int = 1) -> estargz.Layer:
    return estargz.build(upper, os.devnull, lower=lower, compression="uncompressed", threads=threads)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [0, 64, 1024])
def test_tree(measured: Measured, planted: Planted, count: int, size: int, threads: int) -> None:
    folder, total = planted([size] * count)
    layer = measured(lambda: build(folder, threads=threads), entries=count, size=total)
    assert layer.uncompressed_size >= 512 * count


@pytest.fixture(scope="session", params=["times", "contents"])
def pair(request: pytest.FixtureRequest, planted: Planted, count: int, scratch: Path) -> tuple[Path, Path]:
    """(lower, upper), 1 % of upper's files changed. Times in whole seconds oblige the walk to compare contents."""
    time = corpus.TIME_NS if request.param == "times" else corpus.WHOLE_TIME_NS
    source, _ = planted([1024] * count)
    lower, upper = (scratch / request.param / side for side in ("lower", "upper"))
    for side in (lower, upper):
        shutil.copytree(source, side)
        for path in side.rglob("*"):
            os.utime(path, ns=(time, time))
    for path in sorted(upper.rglob("f*"))[::100]:
        path.write_bytes(b"changed\n")
        os.utime(path, ns=(time + DAY_NS, time + DAY_NS))
    return lower, upper


@pytest.mark.parametrize("threads", [1, 2])
def test_two_trees(measured: Measured, pair: tuple[Path, Path], count: int, threads: int) -> None:
    lower, upper = pair
    layer = measured(lambda: build(upper, lower, threads), entries=count)
    assert 2 * 512 * (count // 100) <= layer.uncompressed_size < 512 * count
