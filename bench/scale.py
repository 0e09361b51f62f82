"""How a build grows: with threads (measured, and by the model beyond this machine's), with bytes, with entries."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import limit
import model
from contest import made, run_report, tell
from measure import Tree, read_tree
from ways import build

MIB = 1 << 20
COUNTS = ("batches", "slot_bytes")
MODELLED = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)

Report = dict[str, Any]
FindTree = Callable[[str], Tree | None]


# ------------------------------------------------------------------------------------------------- points


def new_point(label: str, tree: Tree, threads: int) -> Report:
    return {"label": label, "threads": threads, "bytes": tree.size, "entries": tree.entries, "runs": []}


def add_run(point: Report, tree: Tree, blob: Path) -> None:
    tell(f"scale, {point['label']}, run {len(point['runs']) + 1}")
    read_tree(tree.name, tree.path)
    point["runs"].append(run_report(build(point["threads"])(tree.path, blob)))


def point(label: str, tree: Tree, threads: int, rounds: int, blob: Path) -> Report:
    new = new_point(label, tree, threads)
    for _ in range(rounds):
        add_run(new, tree, blob)
    return new


def by_threads(tree: Tree, rounds: int, blob: Path) -> list[Report]:
    """Up to the CPUs there are, and twice as many, where nothing is to be won and nothing may be lost."""
    cpus = len(os.sched_getaffinity(0))
    counts = sorted({*(count for count in MODELLED if count <= cpus), cpus, 2 * cpus})
    points = [new_point(f"{count} threads", tree, count) for count in counts]
    for _ in range(rounds):
        for each in points:  # in turns, because they are compared with each other
            add_run(each, tree, blob)
    return points


@contextmanager
def planted(kind: str, count: int, folder: Path) -> Iterator[Tree]:
    """A tree of seeded files in a directory that is removed, made by a process of its own: what is measured afterwards
    must not begin with the memory that this takes."""
    with tempfile.TemporaryDirectory(prefix=".estargz-bench-", dir=folder) as inner:
        tree = Path(inner) / "tree"
        subprocess.run([sys.executable, Path(__file__).with_name("corpus.py"), tree, kind, str(count)], check=True)
        yield read_tree("planted", tree)


def sizes_up_to(most: int) -> list[int]:
    """Powers of eight from 1 MB, and ``most`` itself."""
    sizes = [MIB]
    while sizes[-1] * 8 < most:
        sizes.append(sizes[-1] * 8)
    return [*sizes, most]


def by_size(most: int, threads: int, rounds: int, blob: Path, found: FindTree) -> list[Report]:
    points = []
    for size in sizes_up_to(min(most, 512 * MIB)):
        with planted("bytes", size, blob.parent) as tree:
            points.append(point(f"{size // MIB} MiB", tree, threads, rounds, blob))
    for name, label, size in (("big", "4 GiB, one file", 4 << 30), ("huge", "8 GiB", 8 << 30)):
        if size <= most and (tree := found(name)):
            points.append(point(label, tree, threads, rounds, blob))
    return points


def by_entries(most: int, threads: int, rounds: int, blob: Path, found: FindTree) -> list[Report]:
    points = []
    for count in [1, 100, 1_000, 10_000]:
        with planted("files", count, blob.parent) as tree:
            points.append(point(f"{count:,} files of 1 KiB", tree, threads, rounds, blob))
    for name, count in (("small", 100_000), ("million", 1_000_000)):
        if count <= most and (tree := found(name)):
            points.append(point(f"{count:,} files of 1 KiB", tree, threads, rounds, blob))
    return points


# ------------------------------------------------------------------------------------------------- the model


def costs(tree: Tree, rounds: int, blob: Path) -> model.Costs:
    """What the model wants to know, from runs of one thread on this machine."""
    each = [one_cost(tree, blob) for _ in range(rounds)]
    names = model.Costs.__dataclass_fields__
    middle = {name: median(getattr(cost, name) for cost in each) for name in names if name not in COUNTS}
    return model.Costs(**{name: getattr(each[0], name) for name in COUNTS}, **middle)


def one_cost(tree: Tree, blob: Path) -> model.Costs:
    found = limit.measure_round(tree.path, blob, 1)
    parts, digests = found.parts(), found.digests()
    batches = int(found.stages["batches"])
    rows = found.rows()
    # A plain gzip layer never takes the stream's digest along: its order stage has it beside the blob's.
    plain = limit.staged(tree.path, blob, 1, limit.EVERYTHING, "gzip")
    return model.Costs(
        source=parts[limit.WALK] / batches,
        read=parts[limit.READ] / batches,
        chunks=digests[limit.CHUNKS] / batches,
        both=digests[limit.BOTH] / batches,
        compress=parts[limit.COMPRESS] / batches,
        blob=(digests[limit.BLOB] + rows) / batches,
        stream_and_blob=(plain["order"] + rows) / batches,
        write=found.runs["write"]["write"] / batches,
        batches=batches,
        slot_bytes=int(found.stages["slot_bytes"]),
        start=parts[limit.START],
        tail=found.runs["nothing"]["toc"] + found.runs["write"]["commit"],
    )


def modelled(costs: model.Costs) -> list[Report]:
    return [{"threads": threads, "wall": model.seconds(costs, threads)} for threads in MODELLED]


def measure(
    tree: Tree, threads: int, rounds: int, most_bytes: int, most_entries: int, blob: Path, found: FindTree
) -> Report:
    """Everything of this module, as the report keeps it. ``found``: gives the large trees by name, or None."""
    measured = by_threads(tree, rounds, blob)
    tell("scale: what each part costs, for the model")
    return {
        "tree": tree.name,
        "made": made(rounds, threads),
        "threads": measured,
        "model": modelled(costs(tree, rounds, blob)),
        "sizes": by_size(most_bytes, threads, rounds, blob, found),
        "entries": by_entries(most_entries, threads, rounds, blob, found),
    }
