#!/usr/bin/env python3
"""Everything in one report: peers, one blob against two, the limit, scale; figures, tables, pictures, one HTML page.

    scripts/bench [--quick] [--trees NAME ...] [--only PART ...] [--rounds N] [--threads N] [--output DIR]

README.md beside this file says what is counted.
"""

from __future__ import annotations

import argparse
import compileall
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import buildkitd
import contest
import limit
import machine
import scale
import ways
from measure import REPOSITORY, Failure, Run, Tree, corpora, find_tree

from estargz.options import usable_threads

PARTS = ("compare", "changes", "limit", "scale")
OUTPUT = REPOSITORY / "build" / "bench"
LEFT_OUT = "left out by --ways"
LATER_RUN = "of a later run"


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


@contextmanager
def daemon(left_out: str | None, folder: Path) -> Iterator[tuple[ways.Make, str | None]]:
    """Has a real BuildKit daemon make layers, unless there is a reason to leave it out or it cannot be had."""
    with ExitStack() as held:
        running, missing = (None, left_out) if left_out else started_daemon(held, folder)
        yield lambda tree, blob: exported(running, tree), missing
        try:
            held.close()
        except (Failure, OSError) as error:  # what was measured is not lost because of it
            print(f"buildkitd: {error}", file=sys.stderr)


def started_daemon(held: ExitStack, folder: Path) -> tuple[buildkitd.Daemon | None, str | None]:
    missing = buildkitd.missing()
    if missing:
        return None, missing
    try:
        return held.enter_context(buildkitd.Daemon(folder)), None
    except (Failure, OSError) as error:
        return None, str(error)


def exported(running: buildkitd.Daemon | None, tree: Path) -> Run:
    """The step that makes the layer, as a run."""
    assert running is not None, "a way that is skipped is not run"
    try:
        done = running.export(tree, level=ways.BUILDKIT_LEVEL)
    except (LookupError, ValueError) as error:
        raise Failure(f"buildctl said what was not expected: {error!r}") from error
    figures = {name: getattr(done, name) for name in ("cpu", "peak", "others", "read", "written", "disk_read")}
    return Run(wall=done.seconds, space=done.space, size=done.size, output="", **figures)


def compare(tree: Tree, extent: Extent, threads: int, blob: Path, chosen: list[str] | None) -> Report:
    """All ways over one tree, or the chosen ones."""
    left_out_of = "left out of a quick look" if extent.brief else None if is_chosen(ways.DAEMON, chosen) else LEFT_OUT
    with daemon(left_out_of, blob.parent) as (export, no_daemon):
        entrants = ways.all_ways(threads, extent.levels, export, no_daemon)
        if extent.brief:
            entrants = [replace(way, rounds=1) if way.slow else way for way in entrants]
        entrants = [way if is_chosen(way.name, chosen) else left_out(way) for way in entrants]
        return contest.hold(tree, entrants, extent.rounds, blob)


def is_chosen(name: str, chosen: list[str] | None) -> bool:
    return chosen is None or any(part in name for part in chosen)


def left_out(way: ways.Way) -> ways.Way:
    return replace(way, skipped=way.skipped or LEFT_OUT)


def compare_few(tree: Tree, extent: Extent, threads: int, blob: Path) -> Report:
    """The ways that matter most over a tree that is made up, or over what a tree has that its base has not."""
    base = find_tree(tree.name.removesuffix("-changed")) if tree.name.endswith("-changed") else None
    if base:
        return contest.hold(
            replace(tree, name=f"{tree.name} over {base.name}"),
            ways.differs(threads, base.path),
            extent.rounds,
            blob,
        )
    return contest.hold(tree, ways.few_ways(threads), extent.rounds, blob)


def find(name: str, report: Report) -> Tree | None:
    """A tree, made first if it is one of scripts/corpora's; what cannot be had is noted in the report."""
    reason = None if "/" in name else make_tree(name)
    tree = None if reason else find_tree(name)
    if tree is None:
        report["missing"][name] = reason or "there is no such directory"
    else:
        report["missing"].pop(name, None)
    return tree


def trees(names: tuple[str, ...], report: Report) -> Iterator[Tree]:
    for name in names:
        tree = find(name, report)
        if tree is not None:
            yield tree


def make_tree(name: str) -> str | None:
    """Has scripts/corpora make a tree unless it is there; why it cannot, if so."""
    contest.tell(f"{name}: making the tree, if it is not there")
    command = [sys.executable, REPOSITORY / "scripts" / "corpora", name]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    return (done.stderr.strip() or "scripts/corpora failed")[-300:] if done.returncode else None


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
        for tree in trees(extent.trees, report):
            if "compare" in arguments.only:
                held = compare(tree, extent, arguments.threads, blob, arguments.ways)
                keep_ways(held, report["compare"])
                replace_tree(report["compare"], held)
                replace_tree(report["two_blobs"], contest.one_and_two(held))
                save(report, path)
            if "limit" in arguments.only:
                replace_tree(report["limit"], limit.measure(tree, extent.rounds, arguments.threads, blob))
                save(report, path)
        for tree in trees(extent.others if "changes" in arguments.only else (), report):
            replace_tree(report["others"], compare_few(tree, extent, arguments.threads, blob))
            save(report, path)
        if "scale" in arguments.only:
            measure_scale(arguments, extent, blob)
            save(report, path)


def measure_scale(arguments: argparse.Namespace, extent: Extent, blob: Path) -> None:
    report = arguments.report
    for tree in trees(extent.trees[:1], report):
        report["scale"] = scale.measure(
            tree,
            arguments.threads,
            extent.rounds,
            extent.most_bytes,
            extent.most_entries,
            blob,
            lambda name: find(name, report),
        )


def compile_package() -> None:
    """As an installer leaves it, so that no start of ours compiles Python first."""
    found = find_spec("estargz")
    if found and found.submodule_search_locations:
        compileall.compile_dir(found.submodule_search_locations[0], quiet=2)


def save(report: Report, path: Path) -> None:
    path.write_text(json.dumps(report, indent=1) + "\n")


def keep_ways(held: Report, earlier: list[Report]) -> None:
    """What was left out stays as an earlier run had it. The rest is marked then: its rounds met another machine."""
    before = {way["name"]: way for old in earlier if old["tree"] == held["tree"] for way in old["ways"]}
    mixed = any(way["skipped"] == LEFT_OUT and way["name"] in before for way in held["ways"])
    for number, way in enumerate(held["ways"]):
        if way["skipped"] == LEFT_OUT and way["name"] in before:
            held["ways"][number] = before[way["name"]]
        elif mixed and way["runs"]:
            way["note"] = "; ".join(filter(None, [way["note"], LATER_RUN]))
    contest.mark_small(held)


def replace_tree(contests: list[Report], made: Report) -> None:
    """Takes the place of an earlier one over the same tree."""
    contests[:] = [held for held in contests if held["tree"]["name"] != made["tree"]["name"]]
    contests.append(made)


# ------------------------------------------------------------------------------------------------- the command


def empty_report() -> Report:
    return {"compare": [], "two_blobs": [], "others": [], "limit": [], "scale": {}, "missing": {}}


def parse_arguments() -> argparse.Namespace:
    cpus = usable_threads()
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
    names = [Path(tree).name for tree in arguments.trees or ()]
    if len(names) != len(set(names)):
        parser.error("the trees must have names of their own")
    if arguments.trees and set(arguments.only) == {"changes"}:
        parser.error("changes are of the trees of scripts/corpora only")
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


def end_on(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def run(arguments: argparse.Namespace) -> int:
    path = arguments.output / "report.json"
    arguments.report = empty_report()
    if arguments.add or arguments.draw:
        arguments.report |= json.loads(path.read_text())
    if not arguments.draw:
        arguments.output.mkdir(parents=True, exist_ok=True)
        measure(arguments, chosen_extent(arguments), path)
    if not any(arguments.report[name] for name in ("compare", "others", "limit", "scale")):
        print("nothing was measured:", "; ".join(arguments.report["missing"].values()), file=sys.stderr)
        return 1
    save(arguments.report, path)
    present(arguments.report, arguments.output)
    return 0


def main() -> int:
    arguments = parse_arguments()
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that nothing is left behind
        signal.signal(number, end_on)
    try:
        return run(arguments)
    except (Failure, OSError) as error:
        print(f"bench: {error}; what was measured before is in {arguments.output}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
