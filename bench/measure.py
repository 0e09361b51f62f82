"""One process with what it took: seconds, memory, bytes read and written, disk space; and the trees it works on."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import IO

REPOSITORY = Path(__file__).resolve().parent.parent
SAMPLE_EVERY = 0.005


class Failure(Exception):
    """A command that was to be measured has failed."""


@dataclass(slots=True)
class Run:
    """One process and all that it started and waited for. Seconds, bytes."""

    wall: float
    cpu: float
    peak: int
    """Resident set of the largest process; never less than this interpreter's own when it started the process."""
    others: float
    """CPU seconds that everything else on this machine took meanwhile, and its host from it: zero where it is quiet."""
    read: int
    """Asked of files and pipes, the tree included, wherever it came from."""
    written: int
    """Made dirty in files, so that the disk has to take it sooner or later; pipes do not count."""
    disk_read: int
    """What really came from the disk, programs included: nothing where the page cache had it."""
    space: int
    """The most that the output's file system held more than before."""
    output: str
    floor: int = 0
    """Resident set of this interpreter at the start: a peak that is not above it is not known any better."""
    size: int = 0
    """Of the blob."""
    sync: float = 0.0
    """Seconds that making the finished file durable took afterwards, outside ``wall``."""


@dataclass(frozen=True, slots=True)
class Tree:
    """A directory tree: ``entries`` with its directories, the root not counted; ``size`` bytes in ``files`` files."""

    name: str
    path: Path
    entries: int
    files: int
    size: int


# ------------------------------------------------------------------------------------------------- one process


def run(command: Sequence[str | os.PathLike[str]], folder: Path | None = None) -> Run:
    """Runs a command to its end. ``folder``: where it writes. Raises Failure with the end of what it said."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, watched_space(folder) as space:
        floor, busy, moved, started = own_peak(), busy_seconds(), moved_bytes(), time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, process_group=0)
        status, usage = wait(process)
        wall = time.perf_counter() - started
        busy, moved = busy_seconds() - busy, {name: size - moved[name] for name, size in moved_bytes().items()}
        if status:
            raise Failure(f"{Path(command[0]).name} failed with status {status}: {text_of(err)[-500:].strip()}")
        cpu = usage.ru_utime + usage.ru_stime
        return Run(
            wall=wall,
            cpu=cpu,
            peak=usage.ru_maxrss * 1024,
            others=max(0.0, busy - cpu),
            read=moved["rchar"],
            written=moved["write_bytes"],
            disk_read=moved["read_bytes"],
            space=space.most(),
            output=text_of(out),
            floor=floor,
        )


def wait(process: subprocess.Popen[bytes]) -> tuple[int, resource.struct_rusage]:
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)  # a shell's children too
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage


def run_to_blob(command: Sequence[str | os.PathLike[str]], blob: Path) -> Run:
    """Runs a command that writes ``blob``, which is made durable, weighed and removed; a device is left alone."""
    try:
        done = run(command, blob.parent)
        if blob.is_file():
            done.sync = make_durable(blob)
            done.size = blob.stat().st_size
        return done
    finally:
        if blob.is_file():
            blob.unlink()


def make_durable(blob: Path) -> float:
    """Writes the file out, so that no way pays for another's; the seconds that took."""
    started = time.perf_counter()
    handle = os.open(blob, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    return time.perf_counter() - started


def busy_seconds() -> float:
    """CPU seconds that all CPUs together have not idled since the start."""
    try:
        ticks = [int(field) for field in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
    except OSError:
        return 0.0
    idle, waiting = ticks[3:5]
    return (sum(ticks) - idle - waiting) / os.sysconf("SC_CLK_TCK")


def moved_bytes() -> dict[str, int]:
    """What this process and the children it has waited for have read and written (proc(5), /proc/pid/io)."""
    fields = dict.fromkeys(("rchar", "write_bytes", "read_bytes"), 0)
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return fields
    for line in lines:
        name, _, value = line.partition(": ")
        if name in fields:
            fields[name] = int(value)
    return fields


class Space:
    """The most space that a file system has given away since the start, sampled: nameless files have no other trace."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._before = self._most = self._used()
        self._ended = Event()
        self._thread = Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _used(self) -> int:
        if self._folder is None:
            return 0
        status = os.statvfs(self._folder)
        return (status.f_blocks - status.f_bfree) * status.f_frsize

    def _watch(self) -> None:
        while self._folder is not None and not self._ended.wait(SAMPLE_EVERY):
            self._most = max(self._most, self._used())

    def most(self) -> int:
        return max(self._most, self._used()) - self._before

    def end(self) -> None:
        self._ended.set()
        self._thread.join()


@contextmanager
def watched_space(folder: Path | None) -> Iterator[Space]:
    space = Space(folder)
    try:
        yield space
    finally:
        space.end()


def text_of(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")


def own_peak() -> int:
    """Bytes below which no peak can be told: a process begins with the resident set of the one that started it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def available(*tools: str) -> str | None:
    """What is missing of these tools, as a reason to skip; None when nothing is."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


# ------------------------------------------------------------------------------------------------- trees


def corpora() -> Path:
    """Where scripts/corpora keeps its trees."""
    named = os.environ.get("ESTARGZ_CORPORA")
    return Path(named) if named else Path.home() / ".cache" / "estargz-corpora"


def find_tree(name: str) -> Tree | None:
    """A tree of scripts/corpora by its name, or any directory by its path; None, and a word about it, if missing."""
    path = Path(name) if "/" in name else corpora() / name
    if path.is_dir():
        return read_tree(path.resolve().name, path)
    remedy = "" if "/" in name else f"; make it with: scripts/corpora {name}"
    print(f"{name}: skipped, there is no such tree{remedy}", file=sys.stderr)
    return None


def read_tree(name: str, path: Path) -> Tree:
    """Reads every file once, so that what follows finds the tree in memory, and counts."""
    entries = files = size = 0
    piece = bytearray(1 << 20)
    for folder, folders, names in os.walk(path):
        entries += len(folders) + len(names)
        for file in names:
            full = Path(folder, file)
            if full.is_file() and not full.is_symlink():
                files += 1
                size += read_file(full, piece)
    return Tree(name, path, entries, files, size)


def read_file(path: Path, piece: bytearray) -> int:
    total = 0
    with path.open("rb", buffering=0) as file:
        while got := file.readinto(piece):
            total += got
    return total
