#!/usr/bin/env python3
"""A real BuildKit daemon, and what its step "exporting layers" takes: the part of a build that makes the layer's blob.

    python bench/buildkitd.py TREE [--level N] [--runs N] [--compression NAME] [--dir DIR]

The tree comes into the daemon by "COPY . /", outside the clock; then only the export is left to do. An export leaves its
blob in the daemon's cache and the next one would find it there, at any level, so everything is dropped and copied again
before each.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from measure import REPOSITORY, Failure, available, busy_seconds, watched_space

PROGRAMS = REPOSITORY / "build" / "buildkit"
STEP = "exporting layers"
CAP_SYS_ADMIN = 21
SOCKET_PATH_MAX = 107  # unix(7)
START_SECONDS = 60.0
END_SECONDS = 20.0

See = Callable[[dict[str, Any]], None]
"""Is told what a build's daemon tells, a line of progress each time."""

# Without history, as a record of a build keeps its blobs alive; without collection, as what it takes away is ours to drop.
CONFIG = """\
{config}
[history]
maxEntries = 0

[worker.oci]
enabled = true
gc = false
networkMode = "host"
snapshotter = "{snapshotter}"

[worker.containerd]
enabled = false

[cdi]
disabled = true
"""

# The second file comes before a .dockerignore of the tree; an empty one would not.
DOCKERFILES = {"Dockerfile": "FROM scratch\nCOPY . /\n", "Dockerfile.dockerignore": "# nothing is left out\n"}


@dataclass(frozen=True, slots=True)
class Export:
    """One export. All but ``total`` and ``space`` is of the step alone, and of the daemon alone. Seconds, bytes."""

    seconds: float
    """From the step's beginning to its end, by the daemon's own clock."""
    total: float
    """Of the whole call of buildctl: the daemon also looks whether the tree has changed, and hands the result over."""
    size: int
    """Of the layer's blob."""
    cpu: float
    """With the decompressor, igzip or unpigz, that it starts to read its own blob where one is on PATH."""
    written: int
    """Made dirty in files; nothing where the daemon's directory is in memory."""
    peak: int
    """Resident set; never less than what the daemon had when the step began, after it had copied the tree."""
    others: float
    """CPU seconds that everything else on this machine took meanwhile, and its host from it."""
    read: int
    """Asked of files and pipes."""
    disk_read: int
    """Of ``read``, what really came from the disk."""
    space: int
    """The most that the file system of the daemon's directory held more than before."""


# ------------------------------------------------------------------------------------------------- what it needs


def missing() -> str | None:
    """Why no daemon can be run here; None when one can."""
    if sys.platform != "linux":
        return "needs Linux"
    if os.geteuid() != 0:
        return "needs root"
    if not may_mount():
        return "the kernel does not let this process mount anything (CAP_SYS_ADMIN)"
    no_programs = None if built() else available("go")
    return no_programs or (None if shutil.which("buildkit-runc") else available("runc"))


def may_mount() -> bool:
    """Root in a container may not. Where it cannot be told, the daemon will."""
    try:
        found = re.search(r"^CapEff:\s*([0-9a-f]+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return True
    return found is None or bool(int(found[1], 16) >> CAP_SYS_ADMIN & 1)


def built() -> bool:
    return all((PROGRAMS / name).exists() for name in ("buildkitd", "buildctl"))


def programs() -> Path:
    """The directory of buildkitd and buildctl, which are built if need be. Raises Failure."""
    if built() and available("go") is not None:  # then they are taken as they are, however old
        return PROGRAMS
    made = subprocess.run([REPOSITORY / "scripts" / "buildkit"], capture_output=True, text=True, check=False)
    if made.returncode:
        raise Failure(f"buildkitd cannot be built: {made.stderr.strip()[-500:]}")
    return Path(made.stdout.strip())


# ------------------------------------------------------------------------------------------------- the daemon


class Daemon:
    """A daemon with nothing of its own outside a temporary directory, which goes with it.

    ``parent``: where that directory is made; room for three copies of a tree is needed there. ``snapshotter``: "auto" is
    BuildKit's own choice, overlayfs wherever it works; the attribute tells which that was. ``config``: more of its
    configuration, TOML. To be entered in a thread that stays: where we are killed, the daemon is too, and the kernel takes
    the end of that thread for ours.
    """

    def __init__(self, parent: Path | None = None, snapshotter: str = "auto", config: str = "") -> None:
        self.snapshotter = snapshotter
        self._config = config
        self.version = ""
        self._parent = parent
        self._fresh: Path | None = None  # the tree that was copied and not exported since

    def __enter__(self) -> Daemon:
        self._programs = programs()
        with ExitStack() as stack:
            self._folder = Path(tempfile.mkdtemp(prefix=".buildkitd-", dir=self._parent)).resolve()
            stack.callback(remove, self._folder)
            self.log = self._folder / "log"
            self._furnish()
            self._process = self._start()
            stack.callback(end, self._process)
            self._wait_until_ready()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def build(self, tree: Path) -> None:
        """Copies the tree into a snapshot of the daemon's that has no blob yet; everything else is dropped."""
        self.drop()
        self._solve(tree)
        os.sync()  # what the copying left to be written must not be written while the step is timed
        self._fresh = tree.resolve()

    def export(
        self, tree: Path, dest: Path | None = None, compression: str = "estargz", level: int | None = None
    ) -> Export:
        """Makes the tree's layer anew. ``dest``: also gets the image, as a tar of an OCI layout.

        Both kinds of output go through the same step. An image that is neither named nor pushed ends with it, while
        "oci" goes on to send the blob to buildctl; so it is chosen only where somebody wants to have the blob.
        """
        if self._fresh != tree.resolve():
            self.build(tree)
        self._fresh = None
        metadata, steps = self._folder / "metadata.json", Steps(self.pid, STEP)
        output = output_options(dest, compression, level)
        with watched_space(self._folder) as space:
            started, clock = time.time_ns(), time.perf_counter()
            self._solve(tree, "--metadata-file", str(metadata), "--output", output, see=steps.see)
            total = time.perf_counter() - clock
        layer = self._layer(json.loads(metadata.read_text()))
        if layer.stat().st_ctime_ns < started:
            raise Failure("buildkitd took the blob from its cache")
        size = layer.stat().st_size
        return Export(seconds=steps.seconds(STEP), total=total, size=size, space=space.most(), **steps.costs())

    def _furnish(self) -> None:
        """Everything that the daemon is started with. Raises Failure."""
        socket = self._folder / "socket"
        if len(os.fsencode(socket)) > SOCKET_PATH_MAX:
            raise Failure(f"{self._folder}: too long a path for a socket")
        self._address = f"unix://{socket}"
        for name in ("dockerfile", "tmp"):
            (self._folder / name).mkdir()
        for name, text in DOCKERFILES.items():
            (self._folder / "dockerfile" / name).write_text(text)
        (self._folder / "config.toml").write_text(CONFIG.format(config=self._config, snapshotter=self.snapshotter))

    def _start(self) -> subprocess.Popen[bytes]:
        command = [str(self._programs / "buildkitd"), "--config", "config.toml", "--root", str(self._folder / "root")]
        command += ["--addr", self._address, "--otel-socket-path", str(self._folder / "traces")]
        # The terminal's signals do not reach it: it is to end when we end it, and, with setpriv, where we no longer can.
        guard = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
        with self.log.open("wb") as log:
            return subprocess.Popen(
                [*guard, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                env=self._environment(),
                start_new_session=True,
            )

    def _environment(self) -> dict[str, str]:
        """Ours without what changes BuildKit's ways, and its temporary files where they are removed."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("BUILDKIT_", "OTEL_"))}
        return {**ours, "TMPDIR": str(self._folder / "tmp")}

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
            asked = self.buildctl("debug", "workers", "--format", "{{json .}}")
            if asked.returncode == 0:
                worker = json.loads(asked.stdout)[0]
                self.snapshotter = worker["labels"]["org.mobyproject.buildkit.worker.snapshotter"]
                self.version = worker["buildkitVersion"]["version"]
                return
        said = self.log.read_text(errors="replace")
        found = re.search(r"^buildkitd: .*", said, re.MULTILINE)  # followed by a long stack
        raise Failure(f"buildkitd does not start: {found[0] if found else said[-500:].strip()}")

    def _command(self, *arguments: str) -> list[str]:
        return [str(self._programs / "buildctl"), "--addr", self._address, *arguments]

    def buildctl(self, *arguments: str, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
        """Runs the client. Raises TimeoutExpired when it takes more seconds than ``timeout``."""
        command = self._command(*arguments)
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=timeout, env=self._environment()
        )

    @property
    def pid(self) -> int:
        """Of the daemon, which is one process."""
        return self._process.pid

    def _solve(self, tree: Path, *options: str, see: See | None = None) -> None:
        """Runs the build of the tree, as far as it is not cached."""
        local = ["--local", f"context={tree.resolve()}", "--local", f"dockerfile={self._folder / 'dockerfile'}"]
        self.solve(*options, *local, see=see)

    def solve(self, *options: str, see: See | None = None) -> None:
        """Runs the build of a Dockerfile, as far as it is not cached. ``see`` is told of all that happens, when it happens."""
        command = self._command("build", "--frontend", "dockerfile.v0", "--progress", "rawjson", *options)
        words: deque[str] = deque(maxlen=10)
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=self._environment()
        ) as process:
            assert process.stderr is not None
            try:
                for line in process.stderr:
                    if not line.startswith("{"):
                        words.append(line)
                    elif see is not None:
                        see(json.loads(line))
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            raise Failure(f"buildctl failed with status {process.returncode}: {''.join(words).strip()[-500:]}")

    def drop(self) -> None:
        """Empties the cache. What the last build has not let go of yet is tried again."""
        self._fresh = None
        deadline = time.monotonic() + END_SECONDS
        while True:
            pruned = self.buildctl("prune", "--all")
            if pruned.returncode:
                raise Failure(f"buildctl prune failed: {pruned.stderr.strip()[-500:]}")
            if not any(self._blobs().glob("*")):
                return
            if time.monotonic() > deadline:
                raise Failure("buildkitd does not let go of its blobs")
            time.sleep(0.1)

    def _blobs(self) -> Path:
        return self._folder / "root" / f"runc-{self.snapshotter}" / "content" / "blobs" / "sha256"

    def _layer(self, metadata: dict[str, Any]) -> Path:
        """The file of the only layer, in the daemon's own store."""
        manifest = self._blob(metadata["containerimage.digest"])
        layers = json.loads(manifest.read_text())["layers"]
        if len(layers) != 1:
            raise Failure(f"the image has {len(layers)} layers, not 1")
        return self._blob(layers[0]["digest"])

    def _blob(self, digest: str) -> Path:
        return self._blobs() / digest.removeprefix("sha256:")


def output_options(dest: Path | None, compression: str, level: int | None) -> str:
    kind = ["type=image", "push=false"] if dest is None else ["type=oci", f'"dest={dest.resolve()}"']
    chosen = [] if level is None else [f"compression-level={level}"]
    return ",".join([*kind, f"compression={compression}", "force-compression=true", "oci-mediatypes=true", *chosen])


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends the daemon, by force if it does not care to, or if we are in a hurry ourselves."""
    process.terminate()
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        process.kill()
        process.wait()


def remove(folder: Path) -> None:
    """Removes the directory, but never through a mount that a daemon ended by force has left."""
    for point in mounts_below(folder):
        subprocess.run(["umount", "--lazy", point], capture_output=True, check=False)
    if left := mounts_below(folder):
        raise Failure(f"still mounted, so not removed: {left[0]}")
    shutil.rmtree(folder)


def mounts_below(folder: Path) -> list[str]:
    """The mount points, the deepest first."""
    lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    points = [re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), line.split()[4]) for line in lines]
    return sorted((point for point in points if Path(point).is_relative_to(folder)), reverse=True)


# ------------------------------------------------------------------------------------------------- the step


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process has taken since it was started, and the machine since it was."""

    cpu: float
    busy: float
    moved: dict[str, int]


def usage(pid: int) -> Usage:
    """All threads of the process, and the children it has waited for (proc(5), /proc/pid/stat and io)."""
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return Usage(
        cpu=sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"),
        busy=busy_seconds(),
        moved={name: int(value) for name, value in (line.split(": ") for line in lines)},
    )


class Steps:
    """Reads the daemon's counters when the first of some steps begins and when the last ends, and its clock.

    That is known some 15 ms late, alike for both. It keeps out what else an export does: at every call the daemon
    compares the tree with its copy, which takes seconds where there are many files. ``kinds``: how the steps' names begin.
    """

    def __init__(self, pid: int, *kinds: str) -> None:
        self._pid = pid
        self._kinds = kinds
        self._spans: dict[str, tuple[datetime, datetime]] = {}
        self._before: Usage | None = None
        self._after: Usage | None = None
        self._peak = 0

    def see(self, progress: dict[str, Any]) -> None:
        for status in progress.get("statuses", ()):
            if not status["id"].startswith(self._kinds):
                continue
            self.begin()
            if "completed" in status:
                started, completed = (datetime.fromisoformat(status[name]) for name in ("started", "completed"))
                self._spans[status["id"]] = started, completed
                self.end()

    def begin(self) -> None:
        """Counts from here, unless a step has begun already."""
        if self._before is None:
            Path(f"/proc/{self._pid}/clear_refs").write_text("5")  # the peak starts from here
            self._before = usage(self._pid)

    def end(self) -> None:
        """Counts up to here, unless a step ends later."""
        self._after, self._peak = usage(self._pid), peak(self._pid)

    def span(self, *kinds: str) -> tuple[datetime, datetime]:
        """When the first of these steps began and the last ended. Raises Failure where there was none."""
        spans = [span for name, span in self._spans.items() if name.startswith(kinds)]
        if not spans:
            raise Failure(f"buildkitd has not told of a step {' or '.join(map(repr, kinds))}")
        return min(started for started, _ in spans), max(completed for _, completed in spans)

    def seconds(self, *kinds: str) -> float:
        started, completed = self.span(*kinds)
        return (completed - started).total_seconds()

    def costs(self) -> dict[str, Any]:
        """What was taken in between, by the names that Export and Run have for it."""
        before, after = self._before, self._after
        if before is None or after is None:
            raise Failure("buildkitd has not told of any step")
        cpu, moved = after.cpu - before.cpu, {name: after.moved[name] - before.moved[name] for name in after.moved}
        return {
            "cpu": cpu,
            "peak": self._peak,
            "others": max(0.0, after.busy - before.busy - cpu),
            "read": moved["rchar"],
            "written": moved["write_bytes"],
            "disk_read": moved["read_bytes"],
        }


def peak(pid: int) -> int:
    found = re.search(r"^VmHWM:\s*(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


# ------------------------------------------------------------------------------------------------- the command


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Measure the step "exporting layers" of a BuildKit daemon.')
    parser.add_argument("tree", type=Path, metavar="TREE", help="the directory that becomes the layer")
    parser.add_argument("--level", type=int, metavar="N", help="compression level (default: BuildKit's choice)")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="how often (default: 3)")
    parser.add_argument("--compression", default="estargz", metavar="NAME", help="default: estargz")
    parser.add_argument("--dir", type=Path, metavar="DIR", help="where the daemon keeps its files while it runs")
    arguments = parser.parse_args()
    if not arguments.tree.is_dir():
        parser.error(f"{arguments.tree}: no such directory")
    return arguments


def row(number: int, export: Export) -> str:
    written, highest = export.written / 1e6, export.peak / 1e6
    return (
        f"{number:>3}{export.seconds:>9.2f}{export.total:>9.2f}{export.cpu:>9.2f}{export.others:>10.2f}"
        f"{written:>12,.1f}{highest:>10,.1f}{export.size:>15,}"
    )


def main() -> int:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the daemon is ended and removed
    if why := missing():
        print(f"buildkitd cannot be run: {why}", file=sys.stderr)
        return 1
    try:
        with Daemon(arguments.dir) as daemon:
            print(f"buildkitd {daemon.version}, {daemon.snapshotter}\n")
            print("run  seconds    total    CPU s  others s  written MB   peak MB          bytes", flush=True)
            for number in range(1, arguments.runs + 1):
                print(
                    row(number, daemon.export(arguments.tree, None, arguments.compression, arguments.level)), flush=True
                )
    except (Failure, OSError) as error:
        print(f"buildkitd: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
