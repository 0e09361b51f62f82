#!/usr/bin/env python3
"""Images side by side with BuildKit: built and pushed, converted from registry to registry, layers all at once.

    .venv/bin/python bench/images.py [--only PART ...] [--trees NAME ...] [--rounds N] [--scratch DIR] [--registries DIR]

Every round runs all ways in turn; ratios are taken round by round. The tables go to standard output and, as images.md, beside
the figures in build/bench/images.json, or FILE of --output.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import buildkitd
import machine
from buildkitd import usage
from measure import REPOSITORY, Failure, Run, Tree, available, find_tree, read_tree, run, watched_space
from reading import MB, Way, hold
from ways import estargz_command

sys.path.insert(0, str(REPOSITORY / "tests"))

import registry as registries
from registry import Registry

PARTS = ("build", "force", "parallel")
OUTPUT = REPOSITORY / "build" / "bench" / "images.json"
AIM = 15
"""As often as much time BuildKit is to take."""
BUSY = 0.2
"""CPUs that others may take before a reader is told."""
SMALL_LEVEL = 5
"""Ours whose layers are about as small as BuildKit's."""

BUILDKIT = "BuildKit, exporting and pushing"
BUILDKIT_CALL = "BuildKit, the whole call"
TOC_DIGEST = "containerd.io/snapshot/stargz/toc.digest"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
NEW = "image:new"
EXPORTING, PUSHING = "exporting ", "pushing "


@dataclass(slots=True)
class Moved(Run):
    """An image on its way into a registry. Of BuildKit all is the daemon's alone; ``size`` is that of all layers."""

    registry: float = 0.0
    """CPU seconds of the registries, which ``others`` leaves out."""
    steps: dict[str, float] = field(default_factory=dict)
    """BuildKit's: seconds by its own clock."""


@dataclass(frozen=True, slots=True)
class Table:
    """The ways of a part. ``reference``: the one that the others are compared with."""

    title: str
    ways: Sequence[Way]
    reference: str

    def text(self) -> str:
        return "\n".join(line for part in (self._costs(), self._steps(), self._notes()) for line in part)

    def document(self) -> dict[str, Any]:
        ways = [{"name": way.name, "skipped": way.skipped, "runs": list(map(asdict, way.runs))} for way in self.ways]
        return {"title": self.title, "reference": self.reference, "aim": AIM, "ways": ways}

    def _costs(self) -> Iterator[str]:
        yield f"\n## {self.title}\n"
        yield (
            f"| way | seconds | {self.reference} takes, times | CPU s | registries' CPU s | peak MB | written MB | space MB "
            "| layers MB |\n|---|---|---|---|---|---|---|---|---|"
        )
        walls = walls_of(self._way(self.reference))
        for way in self.ways:
            if not way.runs:
                yield f"| {way.name} | {one_line(way.skipped)} | | | | | | | |"
                continue
            wall, cpu, registry, written, space, size = (
                statistics.median(getattr(one, what) for one in way.runs)
                for what in ("wall", "cpu", "registry", "written", "space", "size")
            )
            peak = max(one.peak for one in way.runs)
            yield (
                f"| {way.name} | {wall:.2f} | {spread(walls, walls_of(way))} | {cpu:.2f} | {registry:.2f} | {peak / MB:.0f} "
                f"| {written / MB:.0f} | {space / MB:.0f} | {size / MB:.1f} |"
            )

    def _steps(self) -> Iterator[str]:
        """BuildKit's steps, against the first way as a whole."""
        ours = self.ways[0]
        for way in self.ways:
            told = [one.steps for one in way.runs if isinstance(one, Moved) and one.steps]
            if not told:
                continue
            yield f"\n| {way.name.partition(',')[0]}'s steps | seconds | times {ours.name} |\n|---|---|---|"
            for step in told[0]:
                lasted = [steps[step] for steps in told]
                yield f"| {step} | {statistics.median(lasted):.2f} | {spread(lasted, walls_of(ours))} |"

    def _notes(self) -> Iterator[str]:
        for way in self.ways:
            if way.runs and way.skipped:
                yield f"\n{way.name} ended after round {len(way.runs)}: {one_line(way.skipped)}."
        taken = {way.name: max((one.others / one.wall for one in way.runs), default=0) for way in self.ways}
        if busy := [name for name, cpus in taken.items() if cpus > BUSY]:
            yield f"\nOthers took up to {max(taken.values()):.1f} CPUs beside {'; '.join(busy)}: run again on an idle machine."

    def _way(self, name: str) -> Way:
        return next(way for way in self.ways if way.name == name)


def one_line(text: str | None) -> str:
    return " ".join((text or "").replace("|", "/").split())


def walls_of(way: Way) -> list[float]:
    return [one.wall for one in way.runs]


def spread(theirs: Sequence[float], ours: Sequence[float]) -> str:
    """How many times as long theirs takes: the median of the rounds' ratios, and the outermost."""
    ratios = [one / other for one, other in zip(theirs, ours, strict=False)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})" if ratios else ""


@dataclass(frozen=True, slots=True)
class Bench:
    """What all parts share. ``no_daemon``: why ``daemon`` is None."""

    trees: Sequence[Tree]
    scratch: Path
    registries: Path
    rounds: int
    daemon: buildkitd.Daemon | None
    no_daemon: str | None

    def way(
        self, name: str, move: Callable[[str], Run], images: Sequence[str] = (NEW,), source: int | None = None
    ) -> Way:
        """A way that moves all layers to images of the registry with the address that it is given.

        The registry is started for each run, so that nothing is there already, and told apart from others by its CPU.
        ``source``: the process of another registry, to be told apart too.
        """

        def pushed() -> Run:
            for tree in self.trees:
                read_tree(tree.name, tree.path)
            with started_registry(self.registries) as server:
                pids = [server.pid] if source is None else [server.pid, source]
                os.sync()  # nobody pays for the writes of the one before
                before = sum(usage(pid).cpu for pid in pids)
                moved = Moved(**asdict(move(server.host)))
                moved.registry = sum(usage(pid).cpu for pid in pids) - before
                moved.others = max(0.0, moved.others - moved.registry)
                moved.size = weigh(server.host, images, len(self.trees))
                return moved

        return Way(name, pushed)

    def buildkit(self, name: str, move: Callable[[buildkitd.Daemon, str], Run], source: int | None = None) -> Way:
        def by_daemon(host: str) -> Run:
            if self.daemon is None:
                raise Failure(f"no daemon: {self.no_daemon}")
            return move(self.daemon, host)

        made = self.way(name, by_daemon, source=source)
        made.skipped = self.no_daemon
        return made

    def run(self, *command: str) -> Run:
        return run(command, self.scratch)


# ------------------------------------------------------------------------------------------------- registries


@contextmanager
def started_registry(folder: Path) -> Iterator[Registry]:
    made = tempfile.TemporaryDirectory(prefix="estargz-registry-", dir=folder)
    with made as place, registries.registry(Path(place)) as server:
        yield server


def weigh(host: str, images: Sequence[str], layers: int) -> int:
    """Bytes of the images' layers. Raises Failure where there are not as many, or not all of them are eStargz."""
    found = [layer for image in images for layer in manifest_of(host, image)["layers"]]
    if len(found) != layers or not all(TOC_DIGEST in layer.get("annotations", {}) for layer in found):
        raise Failure(f"{', '.join(images)}: not {layers} eStargz layers, but {json.dumps(found)[:300]}")
    return sum(layer["size"] for layer in found)


def manifest_of(host: str, image: str) -> dict[str, Any]:
    name, _, tag = image.partition(":")
    url = f"http://{host}/v2/{name}/manifests/{tag}"
    request = urllib.request.Request(url, headers={"Accept": registries.MANIFEST})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=registries.ANSWER_SECONDS) as answer:
            found: dict[str, Any] = json.load(answer)
    except OSError as error:
        raise Failure(f"{image} is not in the registry: {error}") from None
    return found


# ------------------------------------------------------------------------------------------------- BuildKit


def solve(daemon: buildkitd.Daemon, options: Sequence[str], output: str, scratch: Path, *, whole: bool) -> Moved:
    """One build with its result pushed; the costs are those of the export's steps, or of the ``whole`` call."""
    steps = buildkitd.Steps(daemon.pid, EXPORTING, PUSHING)
    with watched_space(scratch) as space:
        if whole:
            steps.begin()
        clock = time.perf_counter()
        daemon.solve(*options, "--output", output, see=steps.see)
        total = time.perf_counter() - clock
        if whole:
            steps.end()
    told = told_of(steps)
    wall = total if whole else told["both"]
    return Moved(wall=wall, space=space.most(), output="", steps={**told, "the whole call": total}, **steps.costs())


def told_of(steps: buildkitd.Steps) -> dict[str, float]:
    """Seconds by the daemon's clock. Raises Failure where it has not told of a step."""
    overlap = steps.span(EXPORTING)[1] - steps.span(PUSHING)[0]
    return {
        "exporting layers, manifest and configuration": steps.seconds(EXPORTING),
        "pushing layers and manifest": steps.seconds(PUSHING),
        "both": steps.seconds(EXPORTING, PUSHING),
        "both at once": max(0.0, overlap.total_seconds()),
    }


def pushed_by_buildkit(host: str, *options: str) -> str:
    return ",".join(
        ["type=image", f"name={host}/{NEW}", "push=true", "compression=estargz", "oci-mediatypes=true", *options]
    )


@contextmanager
def dockerfile(bench: Bench, *lines: str) -> Iterator[list[str]]:
    """buildctl's options for a Dockerfile of these lines."""
    with tempfile.TemporaryDirectory(dir=bench.scratch) as folder:
        Path(folder, "Dockerfile").write_text("".join(f"{line}\n" for line in lines))
        yield ["--local", f"dockerfile={folder}", "--local", f"context={folder}"]


def named(trees: Sequence[Tree]) -> dict[str, Path]:
    return {f"layer{number}": tree.path for number, tree in enumerate(trees)}


def build_by_buildkit(bench: Bench, daemon: buildkitd.Daemon, host: str) -> Moved:
    """The trees come into the daemon's snapshots outside the clock; then only the export is left to do."""
    trees = named(bench.trees)
    copies = [f"COPY --from={name} . /{name}" for name in trees]
    with dockerfile(bench, "FROM scratch", *copies) as options:
        for name, path in trees.items():
            options += ["--local", f"{name}={path}", "--opt", f"context:{name}=local:{name}"]
        daemon.drop()
        daemon.solve(*options)
        os.sync()
        return solve(daemon, options, pushed_by_buildkit(host), bench.scratch, whole=False)


def force_by_buildkit(bench: Bench, image: str, daemon: buildkitd.Daemon, host: str) -> Moved:
    with dockerfile(bench, f"FROM {image}") as options:
        daemon.drop()
        os.sync()
        return solve(daemon, options, pushed_by_buildkit(host, "force-compression=true"), bench.scratch, whole=True)


# ------------------------------------------------------------------------------------------------- ours


def image_build(trees: Sequence[Tree], name: str, *options: str, level: int | None = None) -> list[str]:
    layers = [word for tree in trees for word in ("--layer", '"{}"'.format(str(tree.path).replace('"', '""')))]
    chosen = "" if level is None else f",compression-level={level}"
    output = f"type=image,name={name},push=true,compression=estargz{chosen}"
    return [*estargz_command(), "image", "build", *layers, "--output", output, "--progress", "none", *options]


def build(bench: Bench) -> Table:
    """The trees become the layers of an image that is pushed."""

    def ours(*options: str, level: int | None = None) -> Callable[[str], Run]:
        return lambda host: bench.run(*image_build(bench.trees, f"{host}/{NEW}", *options, level=level))

    def keeping(host: str) -> Run:
        with tempfile.TemporaryDirectory(dir=bench.scratch) as cache:
            return ours("--cache", cache)(host)

    ways = [
        bench.way("estargz image build", ours()),
        bench.way(f"the same, level {SMALL_LEVEL}", ours(level=SMALL_LEVEL)),
        bench.way("the same, blobs kept in a cache that was empty", keeping),
        bench.buildkit(BUILDKIT, lambda daemon, host: build_by_buildkit(bench, daemon, host)),
    ]
    hold(ways, bench.rounds)
    return Table(f"{layers_of(bench)} built and pushed", ways, BUILDKIT)


def force(bench: Bench) -> Table:
    """An image of plain gzip layers in one registry becomes one of eStargz layers in another."""
    with gzip_image(bench) as (image, pid):

        def ours(*options: str) -> Callable[[str], Run]:
            command = [*estargz_command(), "convert", "--compression", "estargz", "--progress", "none", *options]
            return lambda host: bench.run(*command, f"docker://{image}", f"docker://{host}/{NEW}")

        ways = [
            bench.way("estargz convert", ours(), source=pid),
            bench.way(f"the same, level {SMALL_LEVEL}", ours("--level", str(SMALL_LEVEL)), source=pid),
            bench.buildkit(
                BUILDKIT_CALL, lambda daemon, host: force_by_buildkit(bench, image, daemon, host), source=pid
            ),
        ]
        hold(ways, bench.rounds)
    return Table(f"{layers_of(bench)}, compressed by gzip -6, converted from registry to registry", ways, BUILDKIT_CALL)


@contextmanager
def gzip_image(bench: Bench) -> Iterator[tuple[str, int]]:
    """An image of the trees in a registry, each layer one gzip stream: its name there, and the registry's process."""
    with tempfile.TemporaryDirectory(dir=bench.scratch) as folder, started_registry(bench.registries) as server:
        layers = [gzip_layer(tree, Path(folder, f"{number}")) for number, tree in enumerate(bench.trees)]
        digest = server.push_image("image", layers)
        yield f"{server.host}/image@{digest}", server.pid


def gzip_layer(tree: Tree, blob: Path) -> tuple[Path, dict[str, Any], str]:
    """The layer's blob, descriptor and DiffID."""
    tar = blob.with_suffix(".tar")
    run([*estargz_command(), "build", "--quiet", "--compression", "uncompressed", tree.path, "-o", tar])
    diff_id = registries.sha256_of_file(tar)
    with blob.open("wb") as out:
        subprocess.run(["gzip", "-6", "-c", tar], stdout=out, check=True)
    tar.unlink()
    digest = registries.sha256_of_file(blob)
    return blob, {"mediaType": LAYER, "digest": digest, "size": blob.stat().st_size}, diff_id


def parallel(bench: Bench) -> Table:
    """The layers all at once, and each built and pushed before the next, by one thread and by one per CPU."""
    single = [f"layer{number}:new" for number in range(len(bench.trees))]

    def at_once(threads: int) -> Callable[[str], Run]:
        return lambda host: bench.run(*image_build(bench.trees, f"{host}/{NEW}", "--threads", str(threads)))

    def in_turn(threads: int) -> Callable[[str], Run]:
        def move(host: str) -> Run:
            commands = [
                image_build([tree], f"{host}/{name}", "--threads", str(threads))
                for tree, name in zip(bench.trees, single, strict=True)
            ]
            return bench.run("bash", "-c", " && ".join(map(shlex.join, commands)))

        return move

    many = len(os.sched_getaffinity(0))
    ways = []
    for threads in sorted({1, many}, reverse=True):
        ways.append(bench.way(f"all at once, threads: {threads}", at_once(threads)))
        ways.append(bench.way(f"one after the other, threads: {threads}", in_turn(threads), single))
    hold(ways, bench.rounds)
    return Table(
        f"{layers_of(bench)}, all at once and one after the other", ways, f"one after the other, threads: {many}"
    )


def layers_of(bench: Bench) -> str:
    tars = sum(tree.size for tree in bench.trees)
    return f"{' + '.join(tree.name for tree in bench.trees)} ({tars / MB:,.0f} MB of files)"


# ------------------------------------------------------------------------------------------------- the command


@contextmanager
def started_daemon(scratch: Path, parts: Sequence[str]) -> Iterator[tuple[buildkitd.Daemon | None, str | None]]:
    """A daemon where a part needs one; else, or where none can be run, the reason."""
    why = buildkitd.missing() if {"build", "force"} & set(parts) else "is not needed"
    if why:
        yield None, f"buildkitd cannot be run: {why}"
        return
    with buildkitd.Daemon(scratch) as daemon:
        yield daemon, None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--trees", nargs="+", default=["venv", "debian", "node"], help="each is a layer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scratch", type=Path, default=Path("/var/tmp"), help="where BuildKit, and we, keep files")
    parser.add_argument("--registries", type=Path, default=Path("/dev/shm"), help="where registries keep blobs")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    return parser.parse_args()


def measure(options: argparse.Namespace, trees: Sequence[Tree], scratch: Path) -> None:
    with started_daemon(scratch, options.only) as (daemon, no_daemon):
        bench = Bench(trees, scratch, options.registries, options.rounds, daemon, no_daemon)
        found: dict[str, Any] = {
            "machine": machine.facts(None),
            "buildkitd": daemon and {"version": daemon.version, "snapshotter": daemon.snapshotter},
            "registry": machine.said(registries.PROGRAM, "--version"),
            "rounds": options.rounds,
            "scratch": str(options.scratch),
            "registries": str(options.registries),
            "trees": [{"name": tree.name, "entries": tree.entries, "size": tree.size} for tree in trees],
        }
        texts = [heading(found)]
        print(texts[0], flush=True)
        for part in options.only:
            table: Table = globals()[part](bench)
            found[part] = table.document()
            texts.append(table.text())
            print(texts[-1], flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=1))
    options.output.with_suffix(".md").write_text("\n".join([*texts, ""]))


def heading(found: dict[str, Any]) -> str:
    daemon = found["buildkitd"]
    facts = found["machine"]
    return "\n".join(
        [
            "# Images\n",
            f"{facts['cpu']}, {facts['cpus']} CPUs, Linux {facts['kernel']}, load {facts['load_average'][0]};",
            f"estargz at {facts['commit'] or 'no commit'}, Python {facts['python']};",
            f"{'buildkitd {version}, {snapshotter}'.format(**daemon) if daemon else 'no buildkitd'};",
            f"{found['registry']}, its blobs in {found['registries']}, all else in {found['scratch']}.",
            f"Rounds: {found['rounds']}. The aim is that BuildKit takes {AIM} times as long.",
        ]
    )


def main() -> int:
    options = parse_arguments()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that what was started is ended
    if why := available(registries.PROGRAM, "gzip", "bash"):
        print(f"images: {why}", file=sys.stderr)
        return 1
    trees = [tree for name in options.trees if (tree := find_tree(name))]
    if len(trees) < len(options.trees):
        return 1
    with tempfile.TemporaryDirectory(prefix="estargz-bench-", dir=options.scratch) as scratch:
        os.environ["TMPDIR"] = scratch  # where space is watched
        measure(options, trees, Path(scratch))
    return 0


if __name__ == "__main__":
    sys.exit(main())
