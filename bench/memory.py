#!/usr/bin/env python3
"""How much memory "estargz build" takes with its default budget, and what an entry costs.

    python bench/memory.py [--trees NAME ...] [--threads N] [--entries FEWER MORE] [--json [FILE]]

An entry's cost is the difference of two peaks over the difference of two entry counts: of two tars of empty files that
are made up on the way, and of the trees "small" and "million" when both were measured.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import machine
from empty_tar import pieces
from measure import (
    DEVICE_NULL,
    RESULTS,
    Failure,
    Tree,
    estargz_command,
    find_tree,
    megabytes,
    read_tree,
    run,
    save,
    wait,
)

TREES = ("venv", "debian", "node", "small", "million", "big")
ENTRIES = (100_000, 400_000)


@dataclass(frozen=True, slots=True)
class Peak:
    """The peak resident set of one build, in bytes."""

    name: str
    entries: int
    size: int
    peak: int


def build_command(source: str, threads: int | None) -> list[str]:
    chosen = ["--threads", str(threads)] if threads else []
    return [*estargz_command(), "build", source, "-o", str(DEVICE_NULL), "--quiet", *chosen]


def of_tree(tree: Tree, threads: int | None) -> Peak:
    done = run(build_command(str(tree.path), threads))
    return Peak(tree.name, tree.entries, tree.size, done.peak)


def of_empty_files(count: int, threads: int | None) -> Peak:
    """The peak of a build from a tar of ``count`` empty files on standard input."""
    command = build_command("-", threads)
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin as pipe:
        for piece in pieces(count):
            pipe.write(piece)
    status, usage = wait(process)
    if status:
        raise Failure(f"estargz build failed with status {status}")
    return Peak(f"{count:,} empty files in a tar", count, 0, usage.ru_maxrss * 1024)


def peaks(arguments: argparse.Namespace) -> Iterator[Peak]:
    for name in arguments.trees:
        path = find_tree(name)
        if path is not None:
            yield of_tree(read_tree(path.name, path), arguments.threads)
    for count in arguments.entries:
        yield of_empty_files(count, arguments.threads)


def entry_cost(fewer: Peak, more: Peak) -> float:
    """Bytes that each further entry takes."""
    return (more.peak - fewer.peak) / (more.entries - fewer.entries)


def entry_costs(measured: list[Peak], counts: list[int]) -> dict[str, float]:
    by_name = {peak.name: peak for peak in measured}
    pairs = [(by_name.get("small"), by_name.get("million")), (measured[-2], measured[-1])] if counts else []
    return {f"{more.name} - {fewer.name}": entry_cost(fewer, more) for fewer, more in pairs if fewer and more}


def row(peak: Peak) -> str:
    return f"{peak.name:<34}{peak.entries:>12,}{megabytes(peak.size):>12}{megabytes(peak.peak):>12}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the peak memory of estargz build.")
    parser.add_argument("--trees", nargs="*", default=TREES, metavar="TREE", help="names of scripts/corpora, or paths")
    parser.add_argument("--threads", type=int, metavar="N", help="estargz's threads (default: its own choice)")
    parser.add_argument(
        "--entries", type=int, nargs=2, default=ENTRIES, metavar=("FEWER", "MORE"), help="two counts to compare"
    )
    default = RESULTS / f"memory-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    parser.add_argument(
        "--json", type=Path, nargs="?", const=default, metavar="FILE", help="save (default: in bench/results)"
    )
    arguments = parser.parse_args()
    if not 0 < arguments.entries[0] < arguments.entries[1]:
        parser.error("--entries takes two numbers, the smaller one first")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    found = machine.facts(None)
    print(f"{machine.headline(found)}\n\n{'source':<34}{'entries':>12}{'payload MB':>12}{'peak MB':>12}", flush=True)
    measured = []
    for peak in peaks(arguments):
        measured.append(peak)
        print(row(peak), flush=True)
    costs = entry_costs(measured, arguments.entries)
    print()
    for name, cost in costs.items():
        print(f"{cost:,.0f} bytes an entry ({name})")
    if arguments.json:
        save(arguments.json, {"machine": found, "peaks": [asdict(peak) for peak in measured], "bytes_an_entry": costs})
    return 0


if __name__ == "__main__":
    sys.exit(main())
