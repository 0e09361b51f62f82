"""Walk and compare: a tree is listed, or two are compared, and nothing else is done.

The seconds are those of the source stage. It writes the headers too, which is part of listing: bench_tar.py has what they
cost. Files' bytes are read only where two trees are told apart by contents. Rates are of the upper tree.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import corpus
import pytest
from conftest import Planted, Staged

DAY_NS = 86_400 * 10**9
DEPTH = 40
SIZE = 1024


@pytest.fixture(scope="session")
def count(real: bool) -> int:
    return 10_000 if real else 400


def entries_of(folder: Path) -> int:
    return sum(1 for _ in folder.rglob("*"))


@pytest.fixture(scope="session", params=["flat", "wide", "deep"])
def tree(request: pytest.FixtureRequest, planted: Planted, mixed: bytes, count: int, scratch: Path) -> Path:
    """Files of 1 KiB: a hundred in each directory, all in one, or one in each of nested directories."""
    if request.param == "flat":
        return planted([SIZE] * count)[0]
    folder = scratch / request.param
    if request.param == "wide":
        corpus.make_tree(folder, [SIZE] * count, mixed, per_directory=count)
    else:
        make_deep(folder, corpus.cut(mixed[: count * SIZE], SIZE))
    return folder


def make_deep(folder: Path, payloads: list[bytes]) -> None:
    for number, payload in enumerate(payloads):
        if not number % DEPTH:
            inner = folder / f"chain{number:06d}"
        inner /= f"level{number % DEPTH:02d}"
        inner.mkdir(parents=True)
        (inner / "file").write_bytes(payload)


def test_tree(staged: Staged, tree: Path, count: int) -> None:
    layer = staged(("source",), tree, parts=[], size=count * SIZE, entries=entries_of(tree))
    assert layer.uncompressed_size > count * SIZE


@pytest.fixture(scope="session", params=["times", "contents"])
def pair(request: pytest.FixtureRequest, planted: Planted, count: int, scratch: Path) -> tuple[Path, Path]:
    """(lower, upper), 1 % of upper's files changed. Times in whole seconds oblige the walk to compare contents."""
    time = corpus.TIME_NS if request.param == "times" else corpus.WHOLE_TIME_NS
    source, _ = planted([SIZE] * count)
    lower, upper = (scratch / request.param / side for side in ("lower", "upper"))
    for side in (lower, upper):
        shutil.copytree(source, side)
        for path in side.rglob("*"):
            os.utime(path, ns=(time, time))
    for path in sorted(upper.rglob("f*"))[::100]:
        path.write_bytes(b"changed\n")
        os.utime(path, ns=(time + DAY_NS, time + DAY_NS))
    return lower, upper


def test_two_trees(staged: Staged, pair: tuple[Path, Path], count: int) -> None:
    lower, upper = pair
    layer = staged(("source",), upper, lower=lower, parts=[], size=count * SIZE, entries=entries_of(upper))
    assert 2 * 512 * (count // 100) <= layer.uncompressed_size < 512 * count
