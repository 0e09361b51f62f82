"""Fixtures of the benchmarks: how large they are, what is measured, and a table of rates at the end."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import corpus
import pytest

MIB = 1 << 20
RATES = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.stash[RATES] = []


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.stash[RATES]:
        terminalreporter.section("rates, of the median")
        for line in config.stash[RATES]:
            terminalreporter.line(line)


@pytest.fixture(scope="session")
def real(pytestconfig: pytest.Config) -> bool:
    """Whether figures are wanted; if not, everything is as small as it can be and still runs the same code."""
    return not pytestconfig.getoption("benchmark_disable")


Measured = Callable[..., Any]


@pytest.fixture
def measured(benchmark: Any, request: pytest.FixtureRequest) -> Measured:
    """Measures ``work`` and reports its rate: of ``size`` bytes, of ``entries``, or of both.

    ``rounds``: runs of one call each; None lets the plugin choose, for what takes microseconds. Further arguments are
    reported as they are. Returns what ``work`` returned.
    """

    def measure(
        work: Callable[[], Any], *, size: int = 0, entries: int = 0, rounds: int | None = 5, **extra: Any
    ) -> Any:
        if rounds is None:
            result = benchmark(work)
        else:
            result = benchmark.pedantic(work, rounds=rounds, iterations=1, warmup_rounds=1)
        benchmark.extra_info.update(extra)
        if benchmark.stats is not None:
            report(benchmark, request.node, size, entries)
        return result

    return measure


def report(benchmark: Any, node: pytest.Item, size: int, entries: int) -> None:
    seconds = benchmark.stats.stats.median
    line = f"{node.name:<56}"
    if size:
        benchmark.extra_info["bytes_per_second"] = size / seconds
        line += f"{size / seconds / 1e6:>10,.0f} MB/s"
    if entries:
        benchmark.extra_info["entries_per_second"] = entries / seconds
        line += f"{entries / seconds:>12,.0f} entries/s"
    if "ratio" in benchmark.extra_info:
        line += f"{benchmark.extra_info['ratio']:>9.3f} ratio"
    node.config.stash[RATES].append(line)


@pytest.fixture(scope="session")
def content(real: bool) -> dict[str, bytes]:
    """A corpus like text and one like programs, of the same size."""
    size = 16 * MIB if real else MIB // 4
    return {"text": corpus.text(size), "binary": corpus.binary(size)}


@pytest.fixture(scope="session")
def mixed(content: dict[str, bytes]) -> bytes:
    return content["text"] + content["binary"]


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    """A directory that is gone afterwards: the trees are too many files to keep."""
    with tempfile.TemporaryDirectory(prefix="estargz-bench-") as made:
        yield Path(made)


Planted = Callable[[list[int]], tuple[Path, int]]


@pytest.fixture(scope="session")
def planted(mixed: bytes, scratch: Path) -> Planted:
    """Gives the tree with files of the given sizes, and their bytes; each is made once."""
    made: dict[tuple[int, ...], tuple[Path, int]] = {}

    def plant(sizes: list[int]) -> tuple[Path, int]:
        key = tuple(sizes)
        if key not in made:
            folder = scratch / f"tree-{len(made)}"
            made[key] = folder, corpus.make_tree(folder, sizes, mixed)
        return made[key]

    return plant
