"""Every way of making a layer that is measured: ours, BuildKit's and the Go library's, shell pipes, Python's own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from measure import REPOSITORY, Run, available, run_to_blob

DEFAULT_LEVEL = 2
BUILDKIT_LEVEL = 6  # what Go's gzip, and so BuildKit, takes for its default

DEFAULT = f"estargz, level {DEFAULT_LEVEL} (default)"
BUILDKIT = f"BuildKit's compressor, level {BUILDKIT_LEVEL}"
OURS_TWO = "estargz, two blobs"
GO_TWO = "Go, two blobs"
DAEMON = "buildkitd, exporting layers"

# A tree becomes the blob at the path.
Make = Callable[[Path, Path], Run]


@dataclass(frozen=True, slots=True)
class Way:
    """One way of making a layer.

    ``family``: who made it, for the pictures. ``lazy``: the blob is an eStargz layer. ``rounds``: at most so many; None
    for as many as all. ``skipped``: why it cannot be run here. ``slow``: a quick look runs it once. ``note``: what a
    reader has to know of its figures.
    """

    name: str
    family: str
    lazy: bool
    level: int | None
    make: Make
    rounds: int | None = None
    skipped: str | None = None
    slow: bool = False
    note: str = ""


def command_way(command: Callable[[Path, Path], Sequence[str]]) -> Make:
    return lambda tree, blob: run_to_blob(command(tree, blob), blob)


def shell_way(line: str) -> Make:
    """A line of bash with {tree}, {blob}, {gzip} and {tar}, the last two being files beside the blob."""

    def make(tree: Path, blob: Path) -> Run:
        beside = {"gzip": blob.with_name("first.gz"), "tar": blob.with_name("first.tar")}
        quoted = {name: shlex.quote(str(path)) for name, path in {"tree": tree, "blob": blob, **beside}.items()}
        # The pipe's first failure must not pass for success, which plain sh cannot tell.
        try:
            return run_to_blob(["bash", "-c", f"set -e -o pipefail; {line.format(**quoted)}"], blob)
        finally:
            for path in beside.values():
                path.unlink(missing_ok=True)

    return make


# ------------------------------------------------------------------------------------------------- ours


def estargz_command() -> list[str]:
    """The command of the package that this interpreter imports."""
    beside = Path(sys.executable).with_name("estargz")
    if beside.exists():
        return [str(beside)]
    return [sys.executable, "-c", "import sys; from estargz.cli import main; sys.exit(main())"]


def build(threads: int, *options: str) -> Make:
    def command(tree: Path, blob: Path) -> list[str]:
        return [*estargz_command(), "build", str(tree), "-o", str(blob), "--quiet", "--threads", str(threads), *options]

    return command_way(command)


def our_level(level: int, threads: int, *options: str) -> Way:
    name = DEFAULT if level == DEFAULT_LEVEL else f"estargz, level {level}"
    # The highest levels take as long as everything else together, and one point is enough for the picture.
    rounds = 1 if level > BUILDKIT_LEVEL else None
    return Way(name, "estargz", True, level, build(threads, "--level", str(level), *options), rounds)


def our_gzip(level: int, threads: int) -> Way:
    make = build(threads, "--compression", "gzip", "--level", str(level))
    return Way(f"estargz, plain gzip, level {level}", "estargz", False, level, make)


def our_two_blobs(threads: int) -> Way:
    """A differ that knows nothing of eStargz, then a conversion of its blob: the same kernels, twice."""
    ours = shlex.join(estargz_command())
    first = f"{ours} build {{tree}} -o {{gzip}} --compression gzip --quiet --threads {threads}"
    second = f"{ours} build {{gzip}} -o {{blob}} --quiet --threads {threads}"
    return Way(OURS_TWO, "estargz", True, DEFAULT_LEVEL, shell_way(f"{first}; {second}"), skipped=available("bash"))


# ------------------------------------------------------------------------------------------------- Go's


@cache
def find_peer() -> tuple[Path | None, str]:
    """The Go program of tests/peer, built if need be; or why there is none."""
    missing = available("go")
    if missing and not (REPOSITORY / "build" / "peer").exists():
        return None, missing
    made = subprocess.run([REPOSITORY / "scripts" / "peer"], capture_output=True, text=True, check=False)
    if made.returncode:
        return None, f"cannot be built: {made.stderr.strip()[-300:]}"
    return Path(made.stdout.strip()), ""


def peer_or_reason() -> tuple[str, str | None]:
    """The Go program, and why ways that need it are skipped; None when they are not."""
    found, why = find_peer()
    return str(found), None if found else f"no Go peer: {why}"


def buildkit(peer: str, level: int, missing: str | None, *options: str) -> Way:
    def command(tree: Path, blob: Path) -> list[str]:
        return [peer, "blob", "-how", "buildkit", "-level", str(level), *options, str(tree), str(blob)]

    name, slow = f"BuildKit's compressor, level {level}", level != BUILDKIT_LEVEL
    return Way(name, "buildkit", True, level, command_way(command), skipped=missing, slow=slow)


def go_two_blobs(peer: str, missing: str | None) -> Way:
    def command(tree: Path, blob: Path) -> list[str]:
        return [peer, "blob", "-how", "two-blobs", "-level", str(BUILDKIT_LEVEL), str(tree), str(blob)]

    return Way(GO_TWO, "go", True, BUILDKIT_LEVEL, command_way(command), skipped=missing)


def go_library(peer: str, missing: str | None) -> list[Way]:
    """The library's two entries. The writer takes a stream; Build wants a file that it can read in several places."""
    peer, level = shlex.quote(peer), BUILDKIT_LEVEL
    writer = f"tar cf - -C {{tree}} . | {peer} blob -how lossless -uncounted -level {level} /dev/stdin {{blob}}"
    whole = f"tar cf {{tar}} -C {{tree}} .; {peer} blob -how build -level {level} {{tar}} {{blob}}; rm {{tar}}"
    missing = missing or available("bash", "tar")
    return [
        Way(f"tar | estargz.Writer, level {level}", "go", True, level, shell_way(writer), skipped=missing, slow=True),
        Way(f"tar, then estargz.Build, level {level}", "go", True, level, shell_way(whole), skipped=missing),
    ]


def daemon(export: Make, missing: str | None) -> Way:
    """A real buildkitd. ``export`` is not called when something is missing."""
    note = "seconds, CPU and traffic of that step alone, in a daemon that is up and has the files"
    return Way(DAEMON, "buildkit", True, BUILDKIT_LEVEL, export, skipped=missing, note=note)


# ------------------------------------------------------------------------------------------------- everybody's


def tar_pipes() -> list[Way]:
    """What a shell has: one stream without index or digests."""
    threads = len(os.sched_getaffinity(0))
    compressors = (("pigz", 6, "pigz -6"), ("igzip", 1, "igzip -1"), ("zstd", 3, f"zstd -3 -T{threads}"))
    return [
        Way(
            f"tar | {line}",
            "tar",
            False,
            level,
            shell_way(f"tar cf - -C {{tree}} . | {line} > {{blob}}"),
            skipped=available("bash", "tar", tool),
        )
        for tool, level, line in compressors
    ]


def python_ways(threads: int) -> list[Way]:
    """What a Python program would do without this package."""

    def make(how: str, level: int) -> Make:
        script = str(Path(__file__).with_name("tarfile_peer.py"))
        return command_way(
            lambda tree, blob: [sys.executable, script, how, str(level), str(threads), str(tree), str(blob)]
        )

    no_isal = None if find_spec("isal") else "not installed: the Python package isal"
    return [
        Way("Python tarfile + gzip, level 6", "python", False, 6, make("gzip", 6), slow=True),
        Way("Python tarfile + isal, level 1", "python", False, 1, make("igzip", 1), skipped=no_isal),
    ]


# ------------------------------------------------------------------------------------------------- all of them


def few_ways(threads: int) -> list[Way]:
    """The two that write the same kind of blob, and the fastest that does not."""
    igzip = next(way for way in tar_pipes() if "igzip" in way.name)
    return [*differs(threads), igzip]


def differs(threads: int, lower: Path | None = None) -> list[Way]:
    """Ours and BuildKit's, of a whole tree or of what it changes over a lower one, which only differs make."""
    peer, missing = peer_or_reason()
    ours, theirs = ((), ()) if lower is None else (("--lower", str(lower)), ("-lower", str(lower)))
    return [our_level(DEFAULT_LEVEL, threads, *ours), buildkit(peer, BUILDKIT_LEVEL, missing, *theirs)]


def all_ways(threads: int, levels: Sequence[int], export: Make, no_daemon: str | None) -> list[Way]:
    """In the order of a round: what is to be compared with each other runs close together."""
    peer, missing = peer_or_reason()
    return [
        our_level(DEFAULT_LEVEL, threads),
        our_two_blobs(threads),
        buildkit(peer, BUILDKIT_LEVEL, missing),
        go_two_blobs(peer, missing),
        *go_library(peer, missing),
        buildkit(peer, 1, missing),
        buildkit(peer, 9, missing),
        daemon(export, no_daemon),
        *tar_pipes(),
        *python_ways(threads),
        our_gzip(1, threads),
        *(our_level(level, threads) for level in levels if level != DEFAULT_LEVEL),
    ]
