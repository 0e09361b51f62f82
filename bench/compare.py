#!/usr/bin/env python3
"""Layers of real trees: BuildKit's compressor, tar | igzip, and estargz, in turns on one machine.

    python bench/compare.py [--trees NAME ...] [--runs N] [--threads N] [--json [FILE]] [--output-dir DIR]

Each round runs every way once, so that the ways of one round meet the same machine; ratios are taken within a round and
their median is printed. README.md beside this file says what is counted.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import machine
from measure import (
    DEVICE_NULL,
    REPOSITORY,
    RESULTS,
    Failure,
    Tree,
    available,
    corpora,
    estargz_command,
    find_tree,
    megabytes,
    read_tree,
    run,
    save,
)

TREES = ("venv", "debian", "node", "small")
LEVELS = range(13)

BUILDKIT = "BuildKit, level 6"
DEFAULT = "estargz, default level"
SMALL = "estargz, as small as BuildKit"
IGZIP = "tar | igzip -1"
GZIP = "estargz, gzip, level 1"

# How often longer the first takes than the second.
RATIOS = ((BUILDKIT, DEFAULT), (BUILDKIT, SMALL), (BUILDKIT, GZIP), (IGZIP, DEFAULT), (IGZIP, GZIP))

# A command from the tree and the blob that it is to write; None when there is nothing to run.
Command = Callable[[Path, Path], "list[str] | None"]


@dataclass(slots=True)
class Way:
    """One way of making a layer and its runs. ``skipped``: why it has none."""

    name: str
    command: Command
    skipped: str | None = None
    note: str = ""
    size: int = 0
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)
    sync: list[float] = field(default_factory=list)
    """Seconds that making the finished file durable took afterwards, outside ``wall``."""
    others: list[float] = field(default_factory=list)
    """CPU seconds that the rest of the machine took meanwhile."""

    def report(self) -> dict[str, Any]:
        figures = asdict(self)
        del figures["command"]
        return figures


@dataclass(slots=True)
class Contest:
    """All ways over one tree. ``sizes``: blob size by level, of the levels that were tried."""

    tree: Tree
    ways: list[Way]
    sizes: dict[int, int] = field(default_factory=dict)
    loads: list[list[float]] = field(default_factory=list)

    def way(self, name: str) -> Way:
        return next(way for way in self.ways if way.name == name)

    def ratios(self, slow: str, fast: str) -> list[float]:
        pairs = zip(self.way(slow).wall, self.way(fast).wall, strict=False)
        return [above / below for above, below in pairs]


# --------------------------------------------------------------------------------------------------- the ways


def ours(threads: int, *options: str) -> Command:
    def command(tree: Path, blob: Path) -> list[str]:
        return [*estargz_command(), "build", str(tree), "-o", str(blob), "--quiet", "--threads", str(threads), *options]

    return command


def buildkit(peer: Path | None) -> Command:
    return lambda tree, blob: [str(peer), "blob", "-how", "buildkit", "-level", "6", str(tree), str(blob)]


def igzip(tree: Path, blob: Path) -> list[str]:
    # The pipe's first failure must not pass for success, which plain sh cannot tell.
    line = f"set -o pipefail; tar cf - -C {shlex.quote(str(tree))} . | igzip -1 > {shlex.quote(str(blob))}"
    return ["bash", "-c", line]


def ways(peer: Path | None, why_no_peer: str, threads: int) -> list[Way]:
    no_peer = None if peer else why_no_peer
    return [
        Way(BUILDKIT, buildkit(peer), no_peer),
        Way(DEFAULT, ours(threads)),
        Way(SMALL, lambda tree, blob: None, no_peer and "no blob of BuildKit's to compare with"),
        Way(IGZIP, igzip, available("bash", "tar", "igzip")),
        Way(GZIP, ours(threads, "--compression", "gzip", "--level", "1")),
    ]


def find_peer() -> tuple[Path | None, str]:
    """The Go program of tests/peer, built if need be; or why there is none."""
    missing = available("go")
    if missing and not (REPOSITORY / "build" / "peer").exists():
        return None, missing
    made = subprocess.run([REPOSITORY / "scripts" / "peer"], capture_output=True, text=True, check=False)
    if made.returncode:
        return None, f"cannot be built: {made.stderr.strip()[-300:]}"
    return Path(made.stdout.strip()), ""


# --------------------------------------------------------------------------------------------------- one tree


def compete(contest: Contest, rounds: int, threads: int, blob: Path) -> None:
    for number in range(rounds):
        contest.loads.append(machine.load())
        for way in contest.ways:
            if way.skipped:
                continue
            if way.name == SMALL and not number:
                choose_level(contest, threads)
            measure(way, contest.tree.path, blob)


def measure(way: Way, tree: Path, blob: Path) -> None:
    """One run; a way that fails is skipped from then on."""
    command = way.command(tree, blob)
    if command is None:
        return
    tell(f"{tree.name}: {way.name}")
    try:
        done = run(command)
        way.sync.append(make_durable(blob))
    except (Failure, OSError) as error:
        way.skipped = str(error)
        return
    finally:
        tell("")
    way.size = blob.stat().st_size
    blob.unlink()
    way.wall.append(done.wall)
    way.cpu.append(done.cpu)
    way.peak.append(done.peak)
    way.others.append(done.others)


def make_durable(blob: Path) -> float:
    """Writes the file out, so that no way pays for another's; the seconds that took."""
    started = time.perf_counter()
    handle = os.open(blob, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    return time.perf_counter() - started


def choose_level(contest: Contest, threads: int) -> None:
    """Sets the lowest level whose blob is not larger than BuildKit's: each is tried once, outside the clock."""
    way, limit = contest.way(SMALL), contest.way(BUILDKIT).size
    for level in LEVELS if limit else ():
        tell(f"{contest.tree.name}: trying level {level}")
        contest.sizes[level] = size_at(level, contest.tree.path, threads)
        if contest.sizes[level] <= limit:
            way.command = ours(threads, "--level", str(level))
            way.note = f"level {level}"
            return
    way.skipped = "no level makes a blob as small as BuildKit's" if limit else "no blob of BuildKit's to compare with"


def size_at(level: int, tree: Path, threads: int) -> int:
    command = ours(threads, "--level", str(level), "--json")(tree, DEVICE_NULL)
    return int(json.loads(run(command or []).output)["size"])


def tell(line: str) -> None:
    """What is going on, for somebody who watches; a line that the next one replaces."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------- tables


def print_contest(contest: Contest) -> None:
    tree = contest.tree
    print(f"\n{tree.name}: {tree.entries:,} entries, {megabytes(tree.size)} MB in {tree.files:,} files\n")
    print(
        f"{'way':<40}{'seconds':>9}{'min-max':>17}{'CPU s':>8}{'others s':>9}{'peak MB':>9}{'sync s':>7}{'bytes':>13}"
    )
    for way in contest.ways:
        print(row(way))
    print(f"\n{'times as long, round by round':<66}{'median':>9}{'min-max':>17}")
    for slow, fast in RATIOS:
        ratios = contest.ratios(slow, fast)
        if ratios:
            print(f"{slow + ' / ' + fast:<66}{median(ratios):>9.2f}{spread(ratios):>17}")


def row(way: Way) -> str:
    name = f"{way.name} ({way.note})" if way.note else way.name
    if not way.wall:
        return f"{name:<40}skipped: {way.skipped or 'nothing was run'}"
    broken = f"  then skipped: {way.skipped}" if way.skipped else ""
    return (
        f"{name:<40}{median(way.wall):>9.2f}{spread(way.wall):>17}{median(way.cpu):>8.2f}"
        f"{median(way.others):>9.2f}{megabytes(max(way.peak)):>9}{median(way.sync):>7.2f}{way.size:>13,}{broken}"
    )


def spread(values: list[float]) -> str:
    return f"{min(values):.2f}-{max(values):.2f}"


def as_json(contest: Contest) -> dict[str, Any]:
    tree = asdict(contest.tree)
    del tree["path"]  # where this machine happens to keep it
    ratios = {f"{slow} / {fast}": contest.ratios(slow, fast) for slow, fast in RATIOS}
    return {
        "tree": tree,
        "ways": [way.report() for way in contest.ways],
        "ratios": {name: {"median": median(values), "each": values} for name, values in ratios.items() if values},
        "sizes_by_level": contest.sizes,
        "load_averages": contest.loads,
    }


# --------------------------------------------------------------------------------------------------- the command


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare estargz with BuildKit's compressor and with tar | igzip.")
    parser.add_argument("--trees", nargs="+", default=TREES, metavar="TREE", help="names of scripts/corpora, or paths")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="rounds, each of every way once (default: 5)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="estargz's threads (default: 2)")
    default = RESULTS / f"compare-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    parser.add_argument(
        "--json", type=Path, nargs="?", const=default, metavar="FILE", help="save (default: in bench/results)"
    )
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="where blobs go (default: beside the trees)")
    arguments = parser.parse_args()
    if arguments.runs < 1 or arguments.threads < 1:
        parser.error("--runs and --threads must be at least 1")
    return arguments


@contextmanager
def blob_in(folder: Path | None) -> Iterator[Path]:
    """A path for blobs in a new directory, which is removed."""
    beside = folder or (corpora() if corpora().is_dir() else None)
    with tempfile.TemporaryDirectory(prefix=".estargz-bench-", dir=beside) as made:
        yield Path(made) / "blob"


def contests(arguments: argparse.Namespace, peer: Path | None, why_no_peer: str, blob: Path) -> Iterator[Contest]:
    for name in arguments.trees:
        path = find_tree(name)
        if path is None:
            continue
        tell(f"{name}: reading it once")
        contest = Contest(read_tree(path.name, path), ways(peer, why_no_peer, arguments.threads))
        compete(contest, arguments.runs, arguments.threads, blob)
        print_contest(contest)
        yield contest


def main() -> int:
    arguments = parse_arguments()
    peer, why_no_peer = find_peer()
    found = machine.facts(peer)
    print(f"{machine.headline(found)}\n{arguments.runs} rounds, {arguments.threads} threads", flush=True)
    report: dict[str, Any] = {"machine": found, "runs": arguments.runs, "threads": arguments.threads, "trees": []}
    with blob_in(arguments.output_dir) as blob:
        for contest in contests(arguments, peer, why_no_peer, blob):
            report["trees"].append(as_json(contest))
            if arguments.json:
                save(arguments.json, report)
    return 0 if report["trees"] else 1


if __name__ == "__main__":
    sys.exit(main())
