#!/usr/bin/env python3
"""Everything in one report: peers, one blob against two, the limit, scale; figures, tables, pictures, one HTML page.

    scripts/bench [--quick] [--trees NAME ...] [--only PART ...] [--rounds N] [--threads N] [--output DIR]

README.md beside this file says what is counted.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import contest
import limit
import machine
import scale
import ways
from measure import REPOSITORY, Failure, Run, Tree, corpora, find_tree

PARTS = ("compare", "changes", "limit", "scale")
OUTPUT = REPOSITORY / "build" / "bench"


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is measured."""

    trees: tuple[str, ...]
    others: tuple[str, ...]
    """Trees that only a few ways are run over; NAME-changed is a changeset over NAME."""
    rounds: int
    levels: range
    most_bytes: int
    most_entries: int
    brief: bool = False
    """The slowest ways once only, and no daemon: building one takes minutes itself."""


FULL = Extent(
    trees=("venv", "debian", "node"),
    others=("venv-changed", "debian-changed", "node-changed", "small", "deep", "noise", "zeros"),
    rounds=5,
    levels=range(13),
    most_bytes=8 << 30,
    most_entries=1_000_000,
)
QUICK = Extent(
    trees=("quick",),
    others=("quick-changed",),
    rounds=3,
    levels=range(7),
    most_bytes=64 << 20,
    most_entries=10_000,
    brief=True,
)

Report = dict[str, Any]


# ------------------------------------------------------------------------------------------------- what is measured


def daemon_way(wanted: bool, held: ExitStack) -> tuple[ways.Make | None, str | None]:
    """Brings a real BuildKit daemon up, if it is wanted and can be had; else why not."""
    import buildkitd

    missing = buildkitd.missing()
    if not wanted:
        return None, "left out of a quick look, or by --ways"
    if missing:
        return None, missing
    try:
        daemon = held.enter_context(buildkitd.Daemon(corpora()))
    except (Failure, OSError) as error:
        return None, str(error)

    def export(source: Path, blob: Path) -> Run:
        done = daemon.export(source, level=ways.BUILDKIT_LEVEL)
        figures = {name: getattr(done, name) for name in ("cpu", "peak", "others", "read", "written", "disk_read")}
        return Run(wall=done.seconds, space=done.space, size=done.size, output="", **figures)

    return export, None


def compare(tree: Tree, extent: Extent, threads: int, blob: Path, chosen: list[str] | None) -> Report:
    """All ways over one tree, or the chosen ones."""
    with ExitStack() as held:
        wanted = not extent.brief and is_chosen(ways.DAEMON, chosen)
        entrants = ways.all_ways(threads, extent.levels, *daemon_way(wanted, held))
        if extent.brief:
            entrants = [replace(way, rounds=1) if way.slow else way for way in entrants]
        entrants = [way if is_chosen(way.name, chosen) else left_out(way) for way in entrants]
        return contest.hold(tree, entrants, extent.rounds, blob)


def is_chosen(name: str, chosen: list[str] | None) -> bool:
    return chosen is None or any(part in name for part in chosen)


def left_out(way: ways.Way) -> ways.Way:
    return replace(way, skipped=way.skipped or "left out by --ways")


def compare_few(tree: Tree, extent: Extent, threads: int, blob: Path) -> Report:
    """The ways that matter most over a tree that is made up, or over what a tree has that its base has not."""
    base = find_tree(tree.name.removesuffix("-changed")) if tree.name.endswith("-changed") else None
    if base:
        return contest.hold(
            replace(tree, name=f"{tree.name} over {base.name}"),
            ways.changes(threads, base.path),
            extent.rounds,
            blob,
        )
    return contest.hold(tree, ways.few_ways(threads), extent.rounds, blob)


def trees(names: tuple[str, ...]) -> Iterator[Tree]:
    for name in names:
        if "/" not in name:
            make_tree(name)
        tree = find_tree(name)
        if tree is not None:
            yield tree


def make_tree(name: str) -> None:
    """Has scripts/corpora make a tree unless it is there; what it says goes to the terminal."""
    contest.tell(f"{name}: making the tree, if it is not there")
    subprocess.run([sys.executable, REPOSITORY / "scripts" / "corpora", name], stdout=subprocess.DEVNULL, check=False)


@contextmanager
def blob_in(folder: Path) -> Iterator[Path]:
    """A path for blobs in a new directory, which is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".estargz-bench-", dir=folder) as made:
        yield Path(made) / "blob"


def measure(arguments: argparse.Namespace, extent: Extent, path: Path) -> None:
    """Measures and saves after each tree: a run that is ended early keeps what it has."""
    report = arguments.report
    compile_package()
    report["machine"] = machine.facts(ways.find_peer()[0])
    report["settings"] = {"quick": arguments.quick, "rounds": extent.rounds, "threads": arguments.threads}
    print(machine.headline(report["machine"]), file=sys.stderr, flush=True)
    with blob_in(arguments.blobs or corpora()) as blob:
        for tree in trees(extent.trees):
            if "compare" in arguments.only:
                held = compare(tree, extent, arguments.threads, blob, arguments.ways)
                replace_tree(report["compare"], held)
                replace_tree(report["two_blobs"], contest.one_and_two(held))
                save(report, path)
            if "limit" in arguments.only:
                replace_tree(report["limit"], limit.measure(tree, extent.rounds, arguments.threads, blob))
                save(report, path)
        for tree in trees(extent.others if "changes" in arguments.only else ()):
            replace_tree(report["others"], compare_few(tree, extent, arguments.threads, blob))
            save(report, path)
        if "scale" in arguments.only:
            for tree in trees(extent.trees[:1]):
                report["scale"] = scale.measure(
                    tree, arguments.threads, extent.rounds, extent.most_bytes, extent.most_entries, blob
                )
                save(report, path)


def compile_package() -> None:
    """As an installer leaves it, so that no start of ours compiles Python first."""
    found = find_spec("estargz")
    if found and found.submodule_search_locations:
        compileall.compile_dir(found.submodule_search_locations[0], quiet=2)


def save(report: Report, path: Path) -> None:
    path.write_text(json.dumps(report, indent=1) + "\n")


def replace_tree(contests: list[Report], made: Report) -> None:
    """Takes the place of an earlier one over the same tree."""
    contests[:] = [held for held in contests if held["tree"]["name"] != made["tree"]["name"]]
    contests.append(made)


# ------------------------------------------------------------------------------------------------- the command


def empty_report() -> Report:
    return {"compare": [], "two_blobs": [], "others": [], "limit": [], "scale": {}}


def parse_arguments() -> argparse.Namespace:
    cpus = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Measure estargz and everything like it.")
    parser.add_argument("--quick", action="store_true", help="one smaller tree and 3 rounds: some minutes")
    parser.add_argument("--trees", nargs="+", metavar="TREE", help="names of scripts/corpora, or paths")
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS, help="what to measure (default: all)")
    parser.add_argument("--ways", nargs="+", metavar="TEXT", help="only the ways whose names contain one of these")
    parser.add_argument("--rounds", type=int, metavar="N", help="each of every way once (default: 5, quick 3)")
    parser.add_argument("--threads", type=int, default=cpus, metavar="N", help=f"estargz's threads (default: {cpus})")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="DIR", help="default: build/bench")
    parser.add_argument("--blobs", type=Path, metavar="DIR", help="where blobs are written (default: with the trees)")
    parser.add_argument("--add", action="store_true", help="keep what DIR has and replace what is measured")
    parser.add_argument("--draw", action="store_true", help="measure nothing: draw what DIR has")
    arguments = parser.parse_args()
    if arguments.threads < 1 or (arguments.rounds is not None and arguments.rounds < 1):
        parser.error("--rounds and --threads must be at least 1")
    return arguments


def chosen_extent(arguments: argparse.Namespace) -> Extent:
    extent = QUICK if arguments.quick else FULL
    if arguments.trees:
        extent = replace(extent, trees=tuple(arguments.trees), others=())
    return replace(extent, rounds=arguments.rounds or extent.rounds)


def present(report: Report, folder: Path) -> None:
    """Pictures, the page, and the tables on standard output."""
    # Only now, when nothing is measured any more: a process that is started begins with this one's resident set.
    import page
    import pictures

    drawn = pictures.draw(report, folder)
    page.write(report, drawn, folder / "report.html")
    tables = page.markdown(report)
    (folder / "tables.md").write_text(tables)
    for found in report["limit"]:
        print(limit.one_line(found))
    print(tables)
    print(f"written to {folder}: report.html, tables.md, report.json, {len(drawn)} pictures", file=sys.stderr)


def main() -> int:
    arguments = parse_arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "report.json"
    arguments.report = empty_report()
    if arguments.add or arguments.draw:
        arguments.report = {**arguments.report, **json.loads(path.read_text())}
    if not arguments.draw:
        measure(arguments, chosen_extent(arguments), path)
    present(arguments.report, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
