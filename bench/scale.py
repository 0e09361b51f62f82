"""How a build grows: with threads (measured, and by the model beyond this machine's), with bytes, with entries."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import limit
import model
from contest import run_report, tell
from measure import Tree, find_tree, read_tree
from ways import build

MIB = 1 << 20
BATCH = 1 << 20
MODELLED = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)

Report = dict[str, Any]


# ------------------------------------------------------------------------------------------------- points


def point(label: str, tree: Tree, threads: int, rounds: int, blob: Path) -> Report:
    make = build(threads)
    runs = []
    for number in range(rounds):
        tell(f"scale, {label}, round {number + 1} of {rounds}")
        runs.append(run_report(make(tree.path, blob)))
    return {"label": label, "threads": threads, "bytes": tree.size, "entries": tree.entries, "runs": runs}


def by_threads(tree: Tree, rounds: int, blob: Path) -> list[Report]:
    """Up to the CPUs there are, and twice as many, where nothing is to be won and nothing may be lost."""
    cpus = len(os.sched_getaffinity(0))
    counts = sorted({*(count for count in MODELLED if count <= cpus), cpus, 2 * cpus})
    return [point(f"{count} threads", tree, count, rounds, blob) for count in counts]


@contextmanager
def planted(kind: str, count: int, folder: Path) -> Iterator[Tree]:
    """A tree of seeded files in a directory that is removed, made by a process of its own: what is measured afterwards
    must not begin with the memory that this takes."""
    with tempfile.TemporaryDirectory(prefix=".estargz-bench-", dir=folder) as made:
        tree = Path(made) / "tree"
        subprocess.run([sys.executable, Path(__file__).with_name("corpus.py"), tree, kind, str(count)], check=True)
        yield read_tree("planted", tree)


def sizes_up_to(most: int) -> list[int]:
    """Powers of eight from 1 MB, and ``most`` itself."""
    sizes = [MIB]
    while sizes[-1] * 8 < most:
        sizes.append(sizes[-1] * 8)
    return [*sizes, most]


def by_size(most: int, threads: int, rounds: int, blob: Path) -> list[Report]:
    points = []
    for size in sizes_up_to(most):
        if size > 1 << 30:
            continue  # too large to be made on the way: the tree "huge"
        with planted("bytes", size, blob.parent) as tree:
            points.append(point(f"{size // MIB} MiB", tree, threads, rounds, blob))
    huge = find_tree("huge") if most > 1 << 30 else None
    if huge:
        points.append(point("8 GiB", huge, threads, rounds, blob))
    return points


def by_entries(most: int, threads: int, rounds: int, blob: Path) -> list[Report]:
    points = []
    for count in [1, 100, 1_000, 10_000]:
        with planted("files", count, blob.parent) as tree:
            points.append(point(f"{count:,} files of 1 KiB", tree, threads, rounds, blob))
    for name, count in (("small", 100_000), ("million", 1_000_000)):
        tree = find_tree(name) if count <= most else None
        if tree:
            points.append(point(f"{count:,} files of 1 KiB", tree, threads, rounds, blob))
    return points


# ------------------------------------------------------------------------------------------------- the model


def costs(tree: Tree, rounds: int, blob: Path) -> model.Costs:
    """What the model wants to know, from runs of one thread on this machine."""
    each = [one_cost(tree, blob) for _ in range(rounds)]
    names = model.Costs.__dataclass_fields__
    middle = {name: median(getattr(cost, name) for cost in each) for name in names if name != "batches"}
    return model.Costs(batches=each[0].batches, **middle)


def one_cost(tree: Tree, blob: Path) -> model.Costs:
    found = limit.measure_round(tree.path, blob, 1)
    parts, digests = found.parts(), found.digests()
    batches = max(1, tree.size // BATCH)
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
        start=parts[limit.START],
        tail=found.runs["nothing"]["toc"] + found.runs["write"]["commit"],
    )


def modelled(costs: model.Costs) -> list[Report]:
    return [{"threads": threads, "wall": model.seconds(costs, threads)} for threads in MODELLED]


def measure(tree: Tree, threads: int, rounds: int, most_bytes: int, most_entries: int, blob: Path) -> Report:
    """Everything of this module over one tree, as the report keeps it."""
    measured = by_threads(tree, rounds, blob)
    tell("scale: what each part costs, for the model")
    return {
        "tree": tree.name,
        "threads": measured,
        "model": modelled(costs(tree, rounds, blob)),
        "sizes": by_size(most_bytes, threads, rounds, blob),
        "entries": by_entries(most_entries, threads, rounds, blob),
    }
