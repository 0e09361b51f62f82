"""What the measuring commands share: the trees, and one process with its seconds, its memory and its output."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "bench" / "results"
DEVICE_NULL = Path(os.devnull)


class Failure(Exception):
    """A command that was to be measured has failed."""


@dataclass(frozen=True, slots=True)
class Run:
    """One process and all that it started and waited for. Seconds, bytes."""

    wall: float
    cpu: float
    peak: int
    """Resident set of the largest process; never less than this interpreter's own when it started the process."""
    others: float
    """CPU seconds that everything else on this machine took meanwhile, and its host from it: zero where it is quiet."""
    output: str


@dataclass(frozen=True, slots=True)
class Tree:
    """A directory tree: ``entries`` with its directories, the root not counted; ``size`` bytes in ``files`` files."""

    name: str
    path: Path
    entries: int
    files: int
    size: int


def run(command: Sequence[str | os.PathLike[str]]) -> Run:
    """Runs a command to its end. Raises Failure with the end of what it said."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        busy, started = busy_seconds(), time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        status, usage = wait(process)
        wall, busy = time.perf_counter() - started, busy_seconds() - busy
        if status:
            raise Failure(f"{Path(command[0]).name} failed with status {status}: {text_of(err)[-500:].strip()}")
        cpu = usage.ru_utime + usage.ru_stime
        return Run(wall, cpu, usage.ru_maxrss * 1024, max(0.0, busy - cpu), text_of(out))


def wait(process: subprocess.Popen[bytes]) -> tuple[int, resource.struct_rusage]:
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.kill()
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage


def busy_seconds() -> float:
    """CPU seconds that all CPUs together have not idled since the start."""
    try:
        ticks = [int(field) for field in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
    except OSError:
        return 0.0
    idle, waiting = ticks[3:5]
    return (sum(ticks) - idle - waiting) / os.sysconf("SC_CLK_TCK")


def text_of(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")


def own_peak() -> int:
    """Bytes below which no peak can be told: a process begins with the resident set of the one that started it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def estargz_command() -> list[str]:
    """The command of the package that this interpreter imports."""
    beside = Path(sys.executable).with_name("estargz")
    if beside.exists():
        return [str(beside)]
    return [sys.executable, "-c", "import sys; from estargz.cli import main; sys.exit(main())"]


def corpora() -> Path:
    """Where scripts/corpora keeps its trees."""
    named = os.environ.get("ESTARGZ_CORPORA")
    return Path(named) if named else Path.home() / ".cache" / "estargz-corpora"


def find_tree(name: str) -> Path | None:
    """A tree of scripts/corpora by its name, or any directory by its path; None, and a word about it, if missing."""
    path = Path(name) if "/" in name else corpora() / name
    if path.is_dir():
        return path
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


def available(*tools: str) -> str | None:
    """What is missing of these tools, as a reason to skip; None when nothing is."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f}"


def save(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten to {path}", file=sys.stderr)
