"""All ways over one tree, in turns: each round runs every way once, so that the ways of a round meet the same machine."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import machine
from measure import Failure, Run, Tree, read_tree
from ways import BUILDKIT, DEFAULT, GO_TWO, OURS_TWO, Way

AS_SMALL = "as small as BuildKit's"
FORGETTING_SECONDS = 5.0  # some systems take memory back from files that nobody has read for so long

# The names that a picture of one blob against two wants.
ONE_AND_TWO = {
    DEFAULT: "estargz: one blob",
    OURS_TWO: "estargz: two blobs",
    BUILDKIT: "Go: one blob",
    GO_TWO: "Go: two blobs",
}


@dataclass(slots=True)
class Entrant:
    """One way and its runs. ``skipped``: why it has none, or no more."""

    way: Way
    skipped: str | None
    runs: list[Run] = field(default_factory=list)

    def wants(self, number: int) -> bool:
        return self.skipped is None and (self.way.rounds is None or number < self.way.rounds)

    def run(self, tree: Tree, blob: Path) -> None:
        """One run; a way that fails is skipped from then on."""
        try:
            self.runs.append(self.way.make(tree.path, blob))
        except (Failure, OSError) as error:
            self.skipped = str(error)

    def report(self) -> dict[str, Any]:
        way = self.way
        return {
            "name": way.name,
            "family": way.family,
            "lazy": way.lazy,
            "level": way.level,
            "skipped": self.skipped,
            "note": way.note,
            "size": self.runs[-1].size if self.runs else 0,
            "runs": [run_report(run) for run in self.runs],
        }


def made(rounds: int, threads: int | None = None) -> dict[str, Any]:
    """What a part of the report is of: one report may hold parts of several runs."""
    moment = {"date": machine.now(), "commit": machine.commit(), "rounds": rounds}
    return moment if threads is None else {**moment, "threads": threads}


def run_report(run: Run) -> dict[str, Any]:
    figures = asdict(run)
    del figures["output"]
    return figures


def tree_report(tree: Tree) -> dict[str, Any]:
    figures = asdict(tree)
    del figures["path"]  # where this machine happens to keep it
    return figures


def hold(tree: Tree, ways: Sequence[Way], rounds: int, blob: Path) -> dict[str, Any]:
    """All rounds of one tree, as the report keeps them."""
    entrants = [Entrant(way, way.skipped) for way in ways]
    loads = []
    for number in range(rounds):
        loads.append(machine.load())
        for entrant in entrants:
            if entrant.wants(number):
                tell(f"{tree.name}, round {number + 1} of {rounds}: {entrant.way.name}")
                began = time.monotonic()
                entrant.run(tree, blob)
                if time.monotonic() - began > FORGETTING_SECONDS:
                    read_tree(tree.name, tree.path)  # so that the next one finds it in memory too
    tell("")
    contest = {
        "tree": tree_report(tree),
        "made": made(rounds),
        "ways": [entrant.report() for entrant in entrants],
        "load_averages": loads,
    }
    mark_small(contest)
    return contest


def mark_small(contest: dict[str, Any]) -> None:
    """Notes at our lowest level whose blob is not larger than BuildKit's that it is: the other comparison that is fair."""
    for way in contest["ways"]:
        way["note"] = way["note"].replace(AS_SMALL, "").strip("; ")
    limit = next((way["size"] for way in contest["ways"] if way["name"] == BUILDKIT), 0)
    small = [way for way in contest["ways"] if way["family"] == "estargz" and way["lazy"] and 0 < way["size"] <= limit]
    small = [way for way in small if way["name"] != OURS_TWO]
    if small:
        lowest = min(small, key=lambda way: way["level"])
        lowest["note"] = "; ".join(filter(None, [AS_SMALL, lowest["note"]]))


def one_and_two(contest: dict[str, Any]) -> dict[str, Any]:
    """The same rounds, seen as one blob against two."""
    ways = [{**way, "name": ONE_AND_TWO[way["name"]]} for way in contest["ways"] if way["name"] in ONE_AND_TWO]
    return {"tree": contest["tree"], "made": contest["made"], "ways": ways}


def tell(line: str) -> None:
    """What is going on, for somebody who watches; a line that the next one replaces."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
    elif line:
        print(line, file=sys.stderr, flush=True)
