#!/usr/bin/env python3
"""The reading side against others: extracting, converting, opening a large table, reading lazily from a registry.

    .venv/bin/python bench/reading.py [--only PART ...] [--trees NAME ...] [--rounds N] [--scratch DIR] [--output FILE]

Every round runs all ways in turn; ratios are taken round by round. Figures go to build/bench/reading.json, or FILE, and as
tables to standard output.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine
from measure import REPOSITORY, Failure, Run, available, find_tree, run
from ways import estargz_command

sys.path.insert(0, str(REPOSITORY / "tests"))

PARTS = ("extract", "convert", "index", "lazy")
OUTPUT = REPOSITORY / "build" / "bench" / "reading.json"
READ_SIZE = 10_000
MB = 1e6


@dataclass(slots=True)
class Way:
    """One command, and what it took each time. ``skipped``: why it is not run."""

    name: str
    run: Callable[[], Run]
    skipped: str | None = None
    runs: list[Run] = field(default_factory=list)


def peer() -> Path | None:
    """The Go judge, built if Go is there."""
    built = subprocess.run([REPOSITORY / "scripts" / "peer"], capture_output=True, text=True, check=False)
    return Path(built.stdout.strip()) if built.returncode == 0 else None


def hold(ways: Sequence[Way], rounds: int) -> None:
    for _ in range(rounds):
        for way in ways:
            if way.skipped:
                continue
            try:
                way.runs.append(way.run())
            except Failure as error:
                way.skipped = str(error)


def table(title: str, ways: Sequence[Way]) -> dict[str, Any]:
    """Prints the ways of a part against its first one, and returns the figures."""
    print(f"\n{title}\n\n| way | seconds | times ours | CPU s | peak MB |\n|---|---|---|---|---|")
    ours = ways[0]
    for way in ways:
        if not way.runs:
            print(f"| {way.name} | {way.skipped} | | | |")
            continue
        ratios = [theirs.wall / own.wall for theirs, own in zip(way.runs, ours.runs, strict=False)]
        wall, cpu = (statistics.median(getattr(one, what) for one in way.runs) for what in ("wall", "cpu"))
        peak = max(one.peak for one in way.runs) / MB
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})" if ratios else ""
        print(f"| {way.name} | {wall:.2f} | {spread} | {cpu:.2f} | {peak:.0f} |")
    return {
        "title": title,
        "ways": [
            {"name": way.name, "skipped": way.skipped, "wall": [one.wall for one in way.runs],
             "cpu": [one.cpu for one in way.runs], "peak": [one.peak for one in way.runs]}
            for way in ways
        ],
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------- layers of trees


@contextmanager
def layers(name: str, scratch: Path) -> Iterator[tuple[Path, Path] | None]:
    """An eStargz layer of a tree, and its tar compressed by gzip, both read once; None when there is no such tree."""
    tree = find_tree(name)
    if tree is None:
        yield None
        return
    blob, packed = scratch / "layer.esgz", scratch / "layer.tar.gz"
    run([*estargz_command(), "build", "--quiet", str(tree.path), "-o", str(blob)])
    run(
        [
            *estargz_command(),
            "build",
            "--quiet",
            "--compression",
            "uncompressed",
            str(tree.path),
            "-o",
            str(scratch / "tar"),
        ]
    )
    with packed.open("wb") as out:
        subprocess.run(["gzip", "-6", "-c", scratch / "tar"], stdout=out, check=True)
    (scratch / "tar").unlink()
    yield blob, packed
    blob.unlink()
    packed.unlink()


def into(scratch: Path, command: Callable[[Path], Sequence[str]]) -> Callable[[], Run]:
    """Runs a command that fills an empty directory. It stays until the end: ext4 makes files slowly behind mass deletions."""
    return lambda: run(command(Path(tempfile.mkdtemp(dir=scratch))), scratch)


def extract(name: str, scratch: Path, rounds: int) -> Iterator[dict[str, Any]]:
    go = peer()
    with layers(name, scratch) as made:
        for layer in made or ():
            source = str(layer)

            def ways_of(source: str = source) -> list[Way]:
                tar = ["tar", "-xzpf", source, "--numeric-owner", "--xattrs", "--xattrs-include=*"]
                bsdtar = ["bsdtar", "-xpf", source]
                return [
                    Way("estargz extract", into(scratch, lambda d: [*estargz_command(), "extract", "--quiet", source, str(d)])),
                    Way("GNU tar and gzip", into(scratch, lambda d: [*tar, "-C", str(d)])),
                    Way("bsdtar", into(scratch, lambda d: [*bsdtar, "-C", str(d)]), available("bsdtar")),
                    Way("containerd's archive.Apply", into(scratch, lambda d: [str(go), "apply", source, str(d)]),
                        None if go else "Go is not installed"),
                ]  # fmt: skip

            ways = ways_of()
            hold(ways, rounds)
            kind = "its eStargz layer" if layer.suffix == ".esgz" else "its tar.gz (gzip -6)"
            yield table(f"Extracting {name}, {kind}", ways)


def convert(name: str, scratch: Path, rounds: int) -> Iterator[dict[str, Any]]:
    go = peer()
    with layers(name, scratch) as made:
        if made is None:
            return
        source, out = str(made[1]), str(scratch / "out")
        ways = [
            Way("estargz build", lambda: run([*estargz_command(), "build", "--quiet", source, "-o", out], scratch)),
            Way(
                "estargz.Build, level 6",
                lambda: run([str(go), "blob", "-how", "build-from-gzip", "-level", "6", source, out], scratch),
                None if go else "Go is not installed",
            ),
        ]
        hold(ways, rounds)
        yield table(f"Converting {name}.tar.gz", ways)


# ------------------------------------------------------------------------------------------------- a large table


OPEN = "import sys, estargz; blob = estargz.open(sys.argv[1]); print(len(blob.toc)); blob.lookup(sys.argv[2])"


def index(name: str, scratch: Path, rounds: int) -> Iterator[dict[str, Any]]:
    """Opening a layer of a million files and looking one up."""
    go = peer()
    tree = find_tree("million")
    if tree is None:
        return
    blob = scratch / "million"
    run([*estargz_command(), "build", "--quiet", str(tree.path), "-o", str(blob)])
    first = next(str(path.relative_to(tree.path)) for path in tree.path.rglob("*") if path.is_file())
    ways = [
        Way("estargz.open and lookup", lambda: run([sys.executable, "-c", OPEN, str(blob), first])),
        Way(
            "Go's estargz.Open",
            lambda: run([str(go), "ranges", str(blob)]),  # no ranges: it opens, and that is all
            None if go else "Go is not installed",
        ),
    ]
    hold(ways, rounds)
    yield table("Opening a layer of 1,000,000 files", ways)


# ------------------------------------------------------------------------------------------------- from a registry


def lazy(name: str, scratch: Path, rounds: int) -> Iterator[dict[str, Any]]:
    """What is fetched from a registry to list a layer, read a small file of it, and fetch what its landmark says."""
    import registry as registries

    import estargz
    from estargz.reading.cache import CachedSource
    from estargz.reading.http import HttpSource

    if why := available("docker-registry"):
        print(f"reading lazily: {why}", file=sys.stderr)
        return
    tree = find_tree(name)
    if tree is None:
        return
    names = sorted(path for path in tree.path.rglob("*") if path.is_file() and not path.is_symlink())
    small = next(path for path in names if 9_000 <= path.stat().st_size <= 11_000)
    hot = [str(path.relative_to(tree.path)) for path in names[:: max(len(names) // 200, 1)]]
    blob = scratch / "layer"
    layer = estargz.build(tree.path, blob, prefetch=hot)
    with tempfile.TemporaryDirectory(dir=scratch) as folder, registries.registry(Path(folder)) as server:
        server.push_blob("layer", blob, layer.digest)
        url = f"http://{server.host}/v2/layer/blobs/{layer.digest}"
        rows: list[dict[str, Any]] = []
        for what in ("list every entry", "read a 10 KB file", "prefetch", "read every prefetched file"):
            found = []
            for _ in range(rounds):
                started = time.perf_counter()
                with (
                    CachedSource(HttpSource(url)) as source,
                    estargz.open(source, toc_digest=layer.toc_digest) as opened,
                ):
                    if what == "list every entry":
                        assert len(list(opened.toc)) > 0
                    elif what == "read a 10 KB file":
                        assert opened.read(str(small.relative_to(tree.path))) == small.read_bytes()
                    else:
                        opened.prefetch()
                        if what != "prefetch":
                            assert all(opened.read(path) == (tree.path / path).read_bytes() for path in hot)
                    found.append((time.perf_counter() - started, source.fetched, source.requests))
            rows.append(row(what, found))
        found = []
        for _ in range(rounds):
            started = time.perf_counter()
            with urllib.request.urlopen(url) as answer, (scratch / "copy").open("wb") as out:
                shutil.copyfileobj(answer, out, 1 << 20)
            found.append((time.perf_counter() - started, layer.size, 1))
        rows.append(row("download the blob", found))
    print(
        f"\nA layer of {name} ({layer.size / MB:.0f} MB) in docker-registry, {layer.prefetch_size} bytes prioritised\n"
    )
    print("| to | seconds | bytes fetched | of the blob | requests |\n|---|---|---|---|---|")
    for one in rows:
        part = one["fetched"] / layer.size
        print(f"| {one['what']} | {one['seconds']:.3f} | {one['fetched']:,} | {part:.2%} | {one['requests']} |")
    yield {"title": f"lazily: {name}", "size": layer.size, "prefetch_size": layer.prefetch_size, "rows": rows}


def row(what: str, found: Sequence[tuple[float, int, int]]) -> dict[str, Any]:
    seconds, fetched, requests = zip(*found, strict=True)
    return {"what": what, "seconds": statistics.median(seconds), "fetched": max(fetched), "requests": max(requests)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--trees", nargs="+", default=["venv", "debian", "node"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scratch", default="/var/tmp", help="where layers and what is extracted go")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    found: dict[str, Any] = {
        "machine": machine.facts(peer()),
        "commit": machine.commit(),
        "rounds": options.rounds,
        "scratch": options.scratch,
    }
    for part in options.only:
        # One tree is enough where the figure depends on a size alone.
        for name in options.trees if part in ("extract", "convert") else options.trees[:1]:
            with tempfile.TemporaryDirectory(prefix="estargz-bench-", dir=options.scratch) as scratch:
                found.setdefault(part, []).extend(globals()[part](name, Path(scratch), options.rounds))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
