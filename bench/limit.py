"""How close a build comes to what the machine can do: each part alone, their sum, and where the rest of a run goes."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from contest import made, tell, tree_report
from measure import Tree, read_tree, run_to_blob
from ways import DEFAULT_LEVEL, build

Stages = dict[str, float]
STAGED = str(Path(__file__).with_name("staged.py"))

EVERYTHING: tuple[str, ...] = ()

# Parts of the pipeline that run together -> the run's name. What a part costs is a difference of stages or one of them.
RUNS: dict[str, tuple[str, ...]] = {
    "nothing": ("nothing",),
    "read": ("read",),
    "chunk": ("read", "chunk hash"),
    "stream": ("read", "stream hash"),
    "both": ("read", "chunk hash", "stream hash"),
    "compress": ("read", "compress"),
    "blob": ("read", "compress", "blob hash"),
    "write": ("read", "compress", "write"),
}

# What a build is the sum of, as the pipeline's clocks can tell them apart while it runs.
START = "start and end"
WALK = "walk, headers"
READ = "read files"
DIGESTS = "digests"
COMPRESS = "compress"
TOC = "table of contents"
WRITE = "write, sync"
WAIT = "wait"

OF_PAYLOAD = (READ, DIGESTS, COMPRESS, WRITE)

# The digests one by one: a build has the first two interleaved.
CHUNKS = "chunk digests"
STREAM = "DiffID"
BOTH = "chunk digests and DiffID, interleaved"
BLOB = "blob digest"


@dataclass(frozen=True, slots=True)
class Round:
    """One round: each run's stages, the seconds of an empty tree and of the whole build, the stages of the latter."""

    runs: dict[str, Stages]
    start: float
    wall: float
    stages: Stages

    def rows(self) -> float:
        """What a table's rows cost in order: the order stage of a run that hashes nothing."""
        return self.runs["nothing"]["order"]

    def hashing(self, name: str) -> float:
        return self.runs[name]["hash"] + self.runs[name]["order"] - self.rows()

    def parts(self) -> Stages:
        """Seconds of each part alone."""
        runs, digests = self.runs, self.digests()
        return {
            START: self.start,
            WALK: runs["nothing"]["source"],
            READ: runs["read"]["read"],
            DIGESTS: digests[BOTH] + digests[BLOB],
            COMPRESS: runs["compress"]["compress"],
            TOC: runs["nothing"]["toc"] + self.rows(),
            WRITE: runs["write"]["write"] + runs["write"]["commit"],
        }

    def digests(self) -> Stages:
        return {
            CHUNKS: self.hashing("chunk"),
            STREAM: self.hashing("stream"),
            BOTH: self.hashing("both"),
            BLOB: self.runs["blob"]["order"] - self.rows(),
        }

    def spent(self, threads: int) -> Stages:
        """Thread seconds of the whole build by the same names; before and after it, all threads but one do nothing.

        The command's own process does not tell its stages, so they are those of the same build in a process that does,
        and what the command took beyond that build is its start and end.
        """
        stages = self.stages
        return {
            START: threads * (self.wall - stages["inside"]),
            WALK: stages["source"],
            READ: stages["read"],
            DIGESTS: stages["hash"] + stages["order"] - self.rows(),
            COMPRESS: stages["compress"],
            TOC: stages["toc"] + self.rows(),
            WRITE: stages["write"] + threads * stages["commit"],
            WAIT: stages["wait"],
        }


def staged(tree: Path, blob: Path, threads: int, parts: tuple[str, ...], compression: str = "estargz") -> Stages:
    """A build's stages in seconds; ``outside`` is what its process took around it."""
    command = [sys.executable, STAGED, str(tree), str(blob), str(threads), compression, str(DEFAULT_LEVEL), *parts]
    done = run_to_blob(command, blob)
    stages: Stages = json.loads(done.output)
    stages["outside"] = done.wall - stages["inside"]
    return stages


def measure_round(tree: Path, blob: Path, threads: int) -> Round:
    whole = build(threads)
    with tempfile.TemporaryDirectory(dir=blob.parent) as empty:
        # Without the sync of its blob: that is a part of its own.
        start = whole(Path(empty), blob).wall - staged(Path(empty), blob, 1, EVERYTHING)["commit"]
    runs = {name: staged(tree, blob, 1, parts) for name, parts in RUNS.items()}
    stages = staged(tree, blob, threads, EVERYTHING)
    return Round(runs, start, whole(tree, blob).wall, stages)


def measure(tree: Tree, rounds: int, threads: int, blob: Path) -> dict[str, Any]:
    """The limit of one tree, as the report keeps it."""
    measured = []
    for number in range(rounds):
        tell(f"{tree.name}, round {number + 1} of {rounds}: each part alone")
        read_tree(tree.name, tree.path)  # so that every round finds it in memory
        measured.append(measure_round(tree.path, blob, threads))
    return limit_report(tree, threads, measured)


def limit_report(tree: Tree, threads: int, measured: list[Round]) -> dict[str, Any]:
    parts, each = middle([round.parts() for round in measured])
    digests, _ = middle([round.digests() for round in measured])
    spent, _ = middle([round.spent(threads) for round in measured])
    total, wall = sum(parts.values()), median(round.wall for round in measured)
    inside = median(round.stages["inside"] for round in measured)
    cores = min(threads, len(os.sched_getaffinity(0)))
    called = (total - parts[START]) / cores
    serial = {WALK: parts[WALK], STREAM: digests[STREAM], BLOB: digests[BLOB], WRITE: parts[WRITE]}
    slowest = max(serial, key=lambda name: serial[name])
    serial_bound = parts[START] + serial[slowest] + parts[TOC]
    report = {
        "tree": tree_report(tree),
        "level": DEFAULT_LEVEL,
        "threads": threads,
        "made": made(len(measured)),
        "parts": [
            {"stage": name, "seconds": parts[name], "each": each[name], "bytes": tree.size * (name in OF_PAYLOAD)}
            for name in parts
        ],
        "digests": digests,
        "sum": total,
        "parallel_bound": total / cores,
        "serial_bound": serial_bound,
        "serial_stage": slowest,
        "wall": wall,
        "parallel_fraction": total / cores / wall,
        "serial_fraction": serial_bound / wall,
        # Of the call alone, in a process that is up: what a build system that embeds the package sees.
        "call": inside,
        "call_bound": called,
        "call_fraction": called / inside,
        "spent": spent,
    }
    return {**report, "beyond": beyond(report)}


def beyond(limit: dict[str, Any]) -> Stages:
    """By stage: the thread seconds of the whole run beyond those that the stage took alone."""
    spent = limit.get("spent") or {}
    alone = {part["stage"]: part["seconds"] for part in limit.get("parts") or []}
    return {stage: seconds - alone.get(stage, 0) for stage, seconds in spent.items()}


def middle(each: list[Stages]) -> tuple[Stages, dict[str, list[float]]]:
    """The medians by name, and what they are the medians of."""
    columns = {name: [stages[name] for stages in each] for name in each[0]}
    return {name: median(column) for name, column in columns.items()}, columns


def one_line(limit: dict[str, Any]) -> str:
    where = max(limit["beyond"], key=lambda name: limit["beyond"][name])
    return (
        f"{limit['tree']['name']}: {limit['wall']:.2f} s; the parts' sum over {limit['threads']} threads is "
        f"{limit['parallel_bound']:.2f} s ({limit['parallel_fraction']:.0%}), of the call alone "
        f"{limit['call_bound']:.2f} of {limit['call']:.2f} s ({limit['call_fraction']:.0%}); the serial bound "
        f"{limit['serial_bound']:.2f} s ({limit['serial_stage']}); most of the rest: {where} "
        f"({limit['beyond'][where]:.2f} thread seconds)"
    )
