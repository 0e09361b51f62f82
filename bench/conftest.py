"""Fixtures of the benchmarks: how large they are, what is measured and of what it is a share, a table of rates at the end.

Two fixtures measure. ``measured`` takes the seconds of a call. ``staged`` builds a layer with some parts of the pipeline
left out and takes the seconds of some of its stages, by the clocks inside the pipeline (docs/architecture.md): they are
the benchmark's own seconds in every table and file, so that two commits are compared by the stage and not by what had to
run around it. One thread does everything, so those seconds are nobody's waiting and add up to a build.

Either way a share is the seconds over those of the whole: a build of the same content by default options in one thread,
into the null device, measured in the same session.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

import corpus
import pytest
from machine import facts

from estargz import Layer
from estargz._layer import LayerBuilder
from estargz.options import Options
from estargz.writing.sink import Destination, open_sink
from estargz.writing.source import open_source, opened
from estargz.writing.writer import finish_layer

MIB = 1 << 20
WHOLE_ROUNDS = 3
Source = Path | bytes
"""A tree, or a tar stream in memory."""

COLUMNS = (("ms", ",.3f"), ("MB/s", ",.0f"), ("entries/s", ",.0f"), ("share", ".1%"), ("ratio", ".3f"))
RATES = pytest.StashKey[dict[str, list[tuple[str, list[float | None]]]]]()

# What figures depend on, of machine.py's facts. pytest-benchmark warns where those of the machine are not the same in two
# files, so what is of the moment is kept apart.
OF_THE_MACHINE = ("cpu", "cpus", "memory_bytes", "kernel", "python", "package", "libraries")
OF_THE_MOMENT = ("date", "commit", "load_average")


# ------------------------------------------------------------------------------------------------- the plugin


class StageClock:
    """A timer that goes on only while the stages in question do."""

    __name__ = "stages"  # what the JSON calls it

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


STAGE_CLOCK = StageClock()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.stash[RATES] = {}


def pytest_itemcollected(item: pytest.Item) -> None:
    if "staged" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.benchmark(timer=STAGE_CLOCK))


@cache
def found_facts() -> dict[str, Any]:
    return facts(None)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["facts"] = {name: found_facts()[name] for name in OF_THE_MACHINE}


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    output_json["facts"] = {name: found_facts()[name] for name in OF_THE_MOMENT}


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not config.stash[RATES]:
        return
    terminalreporter.section("of the median; share: of a one-thread build of the same content")
    for file, rows in config.stash[RATES].items():
        terminalreporter.line(f"{file:<44}" + "".join(f"{name:>13}" for name, _ in COLUMNS))
        for name, values in rows:
            cells = (
                "" if value is None else f"{value:{form}}" for value, (_, form) in zip(values, COLUMNS, strict=True)
            )
            terminalreporter.line(f"  {name:<42}" + "".join(f"{cell:>13}" for cell in cells))


# ------------------------------------------------------------------------------------------------- measuring


def build(
    source: Source,
    dest: Destination = os.devnull,
    *,
    lower: Path | None = None,
    parts: Iterable[str] | None = None,
    **options: Any,
) -> Layer:
    """A build in one thread, which takes in a tar stream as well: otherwise that would be another thread's.

    ``parts``: those of the pipeline that are done, of PARTS in _pipeline.pyx; None: all. Among the layer's stages is then
    "commit", what it took to sync and name the output.
    """
    chosen = Options(threads=1, **options)
    with open_sink(dest) as sink:
        builder = LayerBuilder(
            **chosen.kernel_arguments(), producer_helps=True, write=sink.target, output=sink.name, parts=parts
        )
        if isinstance(source, bytes):
            builder.feed(source)
            builder.end_feed()
            layer = finish_layer(builder, chosen)
        else:
            indexed = chosen.compression == "estargz"
            with opened(open_source(source, lower=lower, overlay_lower=None, epoch=None, landmark=indexed)) as stream:
                stream.fill(builder)
                layer = finish_layer(builder, chosen)
        finished = time.perf_counter()
    return replace(layer, stages={**layer.stages, "commit": time.perf_counter() - finished})


Whole = Callable[[Source, Path | None], float]


@pytest.fixture(scope="session")
def whole(real: bool) -> Whole:
    """Gives the seconds of the whole for some content: the median of some builds of it, all done once."""
    known: dict[tuple[Path | bytes, Path | None], float] = {}

    def measure(source: Source, lower: Path | None) -> float:
        rounds = []
        for _ in range(1 + WHOLE_ROUNDS if real else 1):  # the first finds nothing in memory
            started = time.perf_counter()
            build(source, lower=lower)
            rounds.append(time.perf_counter() - started)
        return median(rounds[-WHOLE_ROUNDS:])

    def seconds(source: Source, lower: Path | None) -> float:
        # A stream is known by its digest: keeping all of them would take much memory.
        key = (sha256(source).digest() if isinstance(source, bytes) else source, lower)
        if key not in known:
            known[key] = measure(source, lower)
        return known[key]

    return seconds


Measured = Callable[..., Any]
Staged = Callable[..., Layer]


@pytest.fixture
def measured(benchmark: Any, request: pytest.FixtureRequest, whole: Whole) -> Measured:
    """Measures calls of ``work``, each a round, and returns what it returned.

    ``content``: what the whole is a build of, as a changeset over ``lower`` if given. ``size``, ``entries``: what rates are
    rates of. ``weigh``: ``work`` gives a layer, and how much smaller than ``size`` it is gets reported. Further arguments
    are reported as they are. Fewer ``rounds`` than three are of calls so long that nothing has to be warm.
    """

    def measure(
        work: Callable[[], Any],
        content: Source,
        *,
        size: int,
        entries: int = 0,
        lower: Path | None = None,
        rounds: int = 5,
        weigh: bool = False,
        **extra: Any,
    ) -> Any:
        result = benchmark.pedantic(work, rounds=rounds, iterations=1, warmup_rounds=int(rounds > 2))
        if weigh:
            extra["ratio"] = size / result.size
        benchmark.extra_info.update(extra, whole_seconds=whole(content, lower))
        if benchmark.stats is not None:
            report(benchmark, request.node, size, entries)
        return result

    return measure


def report(benchmark: Any, node: pytest.Item, size: int, entries: int) -> None:
    info, seconds = benchmark.extra_info, benchmark.stats.stats.median
    info["bytes_per_second"] = size / seconds
    if entries:
        info["entries_per_second"] = entries / seconds
    info["share"] = seconds / info["whole_seconds"]
    if "stages" in info:
        info["stage_seconds"] = seconds
    row = [1e3 * seconds, size / seconds / 1e6, info.get("entries_per_second"), info["share"], info.get("ratio")]
    node.config.stash[RATES].setdefault(node.path.name, []).append((node.name, row))


@pytest.fixture
def staged(measured: Measured) -> Staged:
    """Builds a layer of ``content`` in one thread with ``parts`` only, measures its ``stages``, and returns it.

    A layer with parts left out is none, but its sizes and its stages' seconds are those of what was done. The other
    arguments are those of ``measured``, and options.
    """

    def measure(
        stages: tuple[str, ...],
        content: Source,
        *,
        parts: Iterable[str],
        size: int,
        dest: Destination = os.devnull,
        lower: Path | None = None,
        entries: int = 0,
        rounds: int = 5,
        weigh: bool = False,
        **options: Any,
    ) -> Layer:
        def work() -> Layer:
            layer = build(content, dest, lower=lower, parts=parts, **options)
            STAGE_CLOCK.seconds += sum(layer.stages[stage] for stage in stages)
            return layer

        layer: Layer = measured(
            work, content, size=size, entries=entries, lower=lower, rounds=rounds, weigh=weigh, stages=stages
        )
        return layer

    return measure


# ------------------------------------------------------------------------------------------------- content


@pytest.fixture(scope="session")
def real(pytestconfig: pytest.Config) -> bool:
    """Whether figures are wanted; if not, everything is as small as it can be and still runs the same code."""
    return not pytestconfig.getoption("benchmark_disable")


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
