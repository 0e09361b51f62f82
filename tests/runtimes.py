"""What runs images: podman, containerd with ctr, BuildKit; and what a container prints of what it sees."""

from __future__ import annotations

import base64
import json
import os
import shutil
import stat
import subprocess
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import pytest
from conftest import IS_ROOT, REPOSITORY, missing
from trees import SECOND

sys.path.insert(0, str(REPOSITORY / "bench"))

import buildkitd

Input = IO[bytes] | None
RUN_SECONDS = 60.0
START_SECONDS = 30.0
END_SECONDS = 10.0
COMMANDS = ("unshare", "nsenter", "setpriv", "runc")

# These hold state of the whole machine: runtime directories, podman's locks, what was seen of blobs anywhere.
OWN_MOUNTS = """\
mkdir -p /var/lib/containers
for place in /run /dev/shm /var/lib/containers; do mount -t tmpfs tmpfs $place || exit; done
echo mounted
exec cat
"""

CONTAINERD_CONFIG = """\
version = 2
root = "{folder}/root"
state = "{folder}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
[grpc]
address = "{folder}/socket"
[ttrpc]
address = "{folder}/ttrpc"
"""


# ------------------------------------------------------------------------------------------------- a place for them


class Sandbox:
    """A mount namespace; everything that is mounted in it goes when its last process does."""

    def __init__(self, folder: Path, holder: subprocess.Popen[str]) -> None:
        self.folder = folder
        """Empty, and theirs."""
        self._holder = holder

    def command(self, *words: str | Path) -> list[str]:
        """A command line for outside that runs one inside. Its directory is the root."""
        return ["nsenter", f"--mount=/proc/{self._holder.pid}/ns/mnt", "--", *map(str, words)]

    def run(self, *words: str | Path, stdin: Input = None) -> str:
        """What a command prints that succeeds."""
        return run(*self.command(*words), stdin=stdin)


def run(*words: str | Path, stdin: Input = None) -> str:
    """What a command prints that succeeds."""
    given = subprocess.DEVNULL if stdin is None else stdin
    done = subprocess.run(words, stdin=given, capture_output=True, check=False, timeout=RUN_SECONDS)
    said = done.stderr.decode(errors="replace")
    assert done.returncode == 0, f"{' '.join(map(str, words))}: {said[-2000:]}"
    return done.stdout.decode()


@contextmanager
def sandbox(folder: Path) -> Iterator[Sandbox]:
    """One for the tests of a module; skips where the kernel does not let us."""
    if not IS_ROOT:
        pytest.skip("needs root: mounts")
    for program in COMMANDS:
        if shutil.which(program) is None:
            missing(f"{program} is not installed")
    holder = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "--", "unshare", "--mount", "sh", "-c", OWN_MOUNTS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdin is not None and holder.stdout is not None and holder.stderr is not None
        if holder.stdout.readline() != "mounted\n":
            pytest.skip(f"the kernel does not let this process have mounts of its own: {holder.stderr.read().strip()}")
        try:
            yield Sandbox(folder, holder)
        finally:
            holder.kill()


# ------------------------------------------------------------------------------------------------- podman


class Podman:
    """Its images lie in the sandbox's directory."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._group = f"estargz-test-{os.getpid()}"

    def __call__(self, *words: str | Path, stdin: Input = None) -> str:
        folder = self._sandbox.folder
        places = [f"--root={folder}/storage", "--runroot=/run/storage", "--tmpdir=/run/podman"]
        places.append(f"--network-config-dir={folder}/networks")
        ways = ["--runtime=runc", "--cgroup-manager=cgroupfs", "--events-backend=none", "--storage-driver=overlay"]
        return self._sandbox.run("podman", *places, *ways, *words, stdin=stdin)

    def pull(self, reference: str, *options: str) -> str:
        """Fetches an image whole; its ID. A registry needs no TLS."""
        insecure = ["--tls-verify=false"] if reference.startswith("docker://") else []
        return self("pull", "--quiet", *insecure, *options, reference).strip()

    def run(self, image: str, *command: str) -> str:
        """What the image's entry point prints. Limits stay below the machine's own, which may be fixed."""
        limits = ["--ulimit=nofile=1000:1000", "--ulimit=nproc=1000:1000"]
        return self("run", "--rm", "--network=none", f"--cgroup-parent=/{self._group}", *limits, image, *command)

    def close(self) -> None:
        """Removes the control groups, which it leaves empty."""
        for place in sorted(Path("/sys/fs/cgroup").glob(f"**/{self._group}/**/"), reverse=True):
            with suppress(OSError):
                place.rmdir()


@contextmanager
def podman(sandbox: Sandbox) -> Iterator[Podman]:
    if shutil.which("podman") is None:
        missing("podman is not installed")
    tool = Podman(sandbox)
    try:
        yield tool
    finally:
        tool.close()


# ------------------------------------------------------------------------------------------------- containerd


class Containerd:
    """A daemon, and ctr, its client."""

    def __init__(self, sandbox: Sandbox, process: subprocess.Popen[bytes]) -> None:
        self._sandbox = sandbox
        self._process = process
        self._containers = 0

    def __call__(self, *words: str | Path, stdin: Input = None) -> str:
        return self._sandbox.run("ctr", "--address", self._sandbox.folder / "socket", *words, stdin=stdin)

    def run(self, image: str, *command: str) -> str:
        """What a command in an image prints. Without one it is the image's own."""
        self._containers += 1
        ways = ["--rm", "--cgroup=", "--snapshotter=overlayfs", f"--fifo-dir={self._sandbox.folder / 'fifo'}"]
        return self("run", *ways, image, f"container{self._containers}", *command)

    def wait_until_ready(self, log: Path) -> None:
        deadline = time.monotonic() + START_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            with suppress(AssertionError):
                self("version")
                return
            time.sleep(0.05)
        raise RuntimeError(f"containerd does not start: {log.read_text(errors='replace')[-500:]}")


@contextmanager
def containerd(sandbox: Sandbox) -> Iterator[Containerd]:
    for program in ("containerd", "ctr"):
        if shutil.which(program) is None:
            missing(f"{program} is not installed")
    config, log = sandbox.folder / "config.toml", sandbox.folder / "log"
    config.write_text(CONTAINERD_CONFIG.format(folder=sandbox.folder))
    guard = ["setpriv", "--pdeathsig", "KILL", "--"]
    with log.open("wb") as out:
        command = [*guard, *sandbox.command("containerd", "--config", config)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        daemon = Containerd(sandbox, process)
        daemon.wait_until_ready(log)
        yield daemon
    finally:
        process.terminate()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# ------------------------------------------------------------------------------------------------- BuildKit


def run_in_buildkit(daemon: buildkitd.Daemon, folder: Path, image: str, *command: str) -> str:
    """What a command in an image prints, as a step of a build from it. The Dockerfile comes into the folder."""
    (folder / "Dockerfile").write_text(f"FROM {image}\nRUN {json.dumps(command)}\n")
    local = [f"{name}={folder}" for name in ("context", "dockerfile")]
    options = ["--frontend", "dockerfile.v0", "--no-cache", "--progress", "rawjson"]
    done = daemon.buildctl("build", *options, "--local", local[0], "--local", local[1], timeout=RUN_SECONDS)
    progress = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    printed = b"".join(base64.b64decode(log["data"]) for step in progress for log in step.get("logs", ()))
    words = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert done.returncode == 0, (words, printed, daemon.log.read_text()[-2000:])
    return printed.decode()


# ------------------------------------------------------------------------------------------------- what runs, and tells


def compile_show(folder: Path) -> Path:
    """tests/show.c, which needs nothing else in an image to be run, and prints what it sees there."""
    made = folder / "show"
    command: list[str | Path] = ["gcc", "-static", "-O1", "-o", made, Path(__file__).parent / "show.c"]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    if compiled.returncode:
        missing(f"no program without libraries can be made: {compiled.stderr.strip()[-500:]}")
    return made


def by_path(seen: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {bytes.fromhex(one["path"]).decode(): {**one, "path": None} for one in seen}


def lines(printed: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in printed.splitlines()]


def listing(image: Path) -> Iterator[dict[str, Any]]:
    """What tests/show.c prints of the image's ``/tree``, seen from here."""
    yield shown(image, image / "tree")
    for folder, directories, files in os.walk(image / "tree"):
        yield from (shown(image, Path(folder, name)) for name in [*directories, *files])


def shown(image: Path, path: Path) -> dict[str, Any]:
    found = path.lstat()
    kind = stat.S_IFMT(found.st_mode)
    line: dict[str, Any] = {
        "mode": found.st_mode,
        "owner": [found.st_uid, found.st_gid],
        "mtime": found.st_mtime_ns // SECOND,
        "path": (b"/" + os.fsencode(path.relative_to(image))).hex(),
    }
    if kind != stat.S_IFDIR:
        line["links"] = found.st_nlink
    if kind in (stat.S_IFCHR, stat.S_IFBLK):
        line["device"] = [os.major(found.st_rdev), os.minor(found.st_rdev)]
    if kind == stat.S_IFLNK:
        line["target"] = os.fsencode(os.readlink(path)).hex()
    if kind == stat.S_IFREG:
        line |= {"size": found.st_size, "crc32": zlib.crc32(path.read_bytes())}
    if "security.capability" in os.listxattr(path, follow_symlinks=False):
        line["capability"] = os.getxattr(path, "security.capability", follow_symlinks=False).hex()
    return line
