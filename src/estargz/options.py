"""Options that every way of building shares: their defaults, limits, and the machine's share of threads and memory."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from estargz.errors import UsageError
from estargz.layer import MEDIA_TYPES

if TYPE_CHECKING:
    from estargz.writing.pool import Pool

__all__ = [
    "DEFAULT_CHUNK_SIZE",
    "DEFAULT_LEVEL",
    "DEFAULT_PORTABLE_LEVEL",
    "DEFAULT_ZSTD_LEVEL",
    "MAX_LEVEL",
    "MAX_MEMORY",
    "MAX_THREADS",
    "MAX_ZSTD_LEVEL",
    "Options",
    "Progress",
    "affordable",
    "check_compressor",
    "check_range",
    "compressor_room",
    "encoder",
    "memory_room",
    "parse_size",
    "resolve_level",
    "usable_threads",
]

Progress = Callable[[int], Any]
"""Is given the uncompressed bytes done so far, about ten times a second, in the thread that builds."""

MAX_LEVEL = 12
DEFAULT_LEVEL = 2
"""The best ratio of those ISA-L levels that cost no more than level 1 (bench/bench_member.py)."""
DEFAULT_PORTABLE_LEVEL = 1
"""Of estargz and gzip, where it has to be portable: the fastest, and smaller than DEFAULT_LEVEL's all the same."""

MAX_ZSTD_LEVEL = 19
"""Higher ones only widen the window beyond what a frame here holds, and what decoders must accept."""
DEFAULT_ZSTD_LEVEL = 3
"""libzstd's own, also meant by level 0."""

DEFAULT_CHUNK_SIZE = 4 << 20
"""4 MiB: what the eStargz libraries use, so that readers' caches fit."""

MAX_CHUNK_SIZE = 1 << 30
MAX_THREADS = 1024
MAX_MEMORY = 1 << 50

_ISAL_STATE = 9 << 20
"""The most that a compressor of ISA-L's or libdeflate's takes, of any level."""
_ZSTD_STATES = {19: 82, 17: 50, 16: 33, 15: 65, 14: 49, 13: 33, 12: 49, 10: 25, 9: 13, 7: 7, 1: 4}
"""Level -> MiB of libzstd's, from that level on: what ``ZSTD_sizeof_CCtx`` says after a frame as they are written here."""

_BESIDES = 12 << 20
"""What builds take besides compressors and batches: what is inflated ahead, stacks, the entries of a small layer."""

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SIZE = re.compile(r"\s*([0-9]{1,20})\s*([kmgt]?)(?:ib|b)?\s*", re.IGNORECASE)
_CGROUP = re.compile(r"^[^:\n]*:([^:\n]*):(.*)$", re.MULTILINE)


def parse_size(text: str) -> int:
    """Bytes meant by ``text``: a whole number with an optional suffix K, M, G, T or KiB, MiB, ... (powers of 1024).

    Raises:
        UsageError: it is no such number.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is no size: give bytes, or a number with KiB, MiB or GiB")
    return int(match[1]) * _UNITS[match[2].lower()]


def _cgroup_folders(controller: str) -> list[Path]:
    """The cgroup folders that bound what this process has of something, innermost first; none without /proc and /sys."""
    try:
        text = os.fsdecode(Path("/proc/self/cgroup").read_bytes())  # names may be no UTF-8
    except OSError:
        return []
    folders: list[Path] = []
    for controllers, path in _CGROUP.findall(text):
        if controllers and controller not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup") / (controller if controllers else "")
        inner = root / path.lstrip("/")
        folders += [folder for folder in (inner, *inner.parents) if folder.is_relative_to(root)]
    return folders


def _quota(folder: Path) -> float:
    """CPUs that a cgroup may use; infinite when it says nothing."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_bytes().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_bytes()
            period = (folder / "cpu.cfs_period_us").read_bytes()
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError, ArithmeticError):
        return math.inf


def usable_threads() -> int:
    """Threads worth starting: the CPUs this process may run on, or its cgroup's quota, whichever is less; at least 1."""
    cpus: float = len(os.sched_getaffinity(0))
    for folder in _cgroup_folders("cpu"):
        cpus = min(cpus, _quota(folder))
    return max(1, math.ceil(cpus))


def _memory_limit(folder: Path) -> float:
    """Bytes that a cgroup may use; infinite when it says nothing."""
    try:
        file = folder / "memory.max"
        text = (file if file.exists() else folder / "memory.limit_in_bytes").read_text().strip()
        return int(text)
    except (OSError, ValueError):  # "max"
        return math.inf


def memory_room() -> float:
    """Bytes that this process may take beside what it has: by its cgroups, infinite without a limit. Page cache counts in a
    cgroup too, but gives way."""
    limit = min(map(_memory_limit, _cgroup_folders("memory")), default=math.inf)
    if limit >= MAX_MEMORY:
        return math.inf
    resident, of_files = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    return max(0, limit - (resident - of_files) * os.sysconf("SC_PAGE_SIZE"))


def affordable(room: float, threads: int, memory: int, batch: int, compressor: int) -> tuple[int, int]:
    """As many of ``threads`` and as much of ``memory`` as ``room`` has a place for, but no less than one thread and two
    batches: half of it for the threads' compressors and a batch each, then half of the rest for all batches."""
    if room == math.inf:
        return threads, memory
    threads = max(1, min(threads, int(room) // 2 // (compressor + batch)))
    return threads, max(2 * batch, min(memory, (int(room) - threads * compressor) // 2))


def compressor_room(room: float, threads: int, memory: int) -> float:
    """Bytes that the compressor of each thread may take."""
    return (room - memory - _BESIDES) / threads


def check_compressor(size: int, room: float, remedy: str) -> None:
    """Raises UsageError for a compressor that is larger than the room for each thread's. A small one is always let go."""
    if size > max(room, _ISAL_STATE):
        raise UsageError(
            f"this level's compressor takes {size >> 20} MiB, and the cgroup's memory leaves {max(0, int(room)) >> 20} MiB "
            f"for that of each thread; choose a lower level or fewer threads, raise the limit{remedy}"
        )


def resolve_level(compression: str, level: int | None = None, *, portable: bool = False) -> int:
    """The level that ``level`` means to ``compression``: None, and 0 for zstd, mean its default. Portable gzip begins at 1.

    Raises:
        UsageError: the compression has no such level.
    """
    most, default = (MAX_ZSTD_LEVEL, DEFAULT_ZSTD_LEVEL) if compression == "zstd" else (MAX_LEVEL, DEFAULT_LEVEL)
    portable = portable and compression in ("estargz", "gzip")
    if level is None:
        return DEFAULT_PORTABLE_LEVEL if portable else default
    check_range(f"the level of {'portable' if portable else 'compression'} {compression}", level, int(portable), most)
    return level or (default if compression == "zstd" else 0)


def encoder(compression: str, level: int | None = None, *, portable: bool = False) -> str:
    """What a layer's compressed bytes come from: ``libzstd-1.5.4``, ``isal-2.30.0/3f9c2a1e``; or ``none``.

    While it stays the same, the same version of this package writes the same bytes, on any machine. libzstd's version is that
    of the library at run time. The others' are those they were compiled with, since they do not tell; behind them stand eight
    digits of the digest of what they make of a sample at run time: they change with the version, and ISA-L's with the CPU.

    Raises:
        UsageError: the compression has no such level.
    """
    from estargz import _codec  # only when asked: the compiled stages are slow to load

    return _codec.encoder(compression, resolve_level(compression, level, portable=portable), portable)


def check_range(name: str, value: int, least: int, most: int) -> None:
    """Raises UsageError unless ``value`` is a whole number in the range."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise UsageError(f"{name} must be a whole number from {least} to {most}, not {value!r}")


@dataclass(frozen=True, slots=True)
class Options:
    """How a layer is written. Everything but ``threads``, ``memory``, ``progress`` and ``pool`` shapes its bytes.

    Raises:
        UsageError: a value is out of its range.
    """

    compression: str = "estargz"
    """``estargz``, ``gzip``, ``zstd`` or ``uncompressed``."""
    level: int | None = None
    """0..3: ISA-L's levels, 4..12: libdeflate's; of zstd 1..19. Higher is slower and, on ordinary trees, smaller. None: 2, of
    zstd 3."""
    chunk_size: int = DEFAULT_CHUNK_SIZE
    """Bytes of a file's payload per member, 1..2**30; eStargz only."""
    min_chunk_size: int = 0
    """Uncompressed bytes that a member holds before a chunk begins another, 0..2**30; 0: every chunk begins one."""
    portable: bool = False
    """The same bytes on every CPU: levels 1..3 of estargz and gzip are libdeflate's, too, 1 is the default, and there is no 0.
    All others are portable anyway (docs/reproducible.md)."""
    threads: int | None = None
    """1..1024; None: ``usable_threads()``, fewer where the cgroup's memory does not suffice for their compressors."""
    memory: int | None = None
    """Bytes that batches under way may take; None: 32 MiB and 32 MiB for each thread, more for large chunks, less in a cgroup
    that has less."""
    progress: Progress | None = None
    pool: Pool | None = None
    """What is shared with builds that run at the same time: ``threads`` and ``memory`` are then the most that this one takes of
    it, None for all."""

    def __post_init__(self) -> None:
        if self.compression not in MEDIA_TYPES:
            raise UsageError(f"unknown compression {self.compression!r}: choose {', '.join(MEDIA_TYPES)}")
        resolve_level(self.compression, self.level, portable=self.portable)
        check_range("chunk_size", self.chunk_size, 1, MAX_CHUNK_SIZE)
        check_range("min_chunk_size", self.min_chunk_size, 0, MAX_CHUNK_SIZE)
        if self.threads is not None:
            check_range("threads", self.threads, 1, MAX_THREADS)
        if self.memory is not None:
            check_range("memory", self.memory, 1, MAX_MEMORY)
        if self.pool is not None and not hasattr(self.pool, "crew"):
            raise UsageError(f"a pool is an estargz.Pool, not {type(self.pool).__name__}")

    @property
    def encoder(self) -> str:
        """``encoder`` of these options."""
        return encoder(self.compression, self.level, portable=self.portable)

    @property
    def compressor_size(self) -> int:
        """Bytes that a thread's compressor takes, at most."""
        if self.compression != "zstd":
            return 0 if self.compression == "uncompressed" else _ISAL_STATE
        level = resolve_level("zstd", self.level)
        return next(size for least, size in _ZSTD_STATES.items() if level >= least) << 20

    @property
    def batch_size(self) -> int:
        """Bytes that a batch takes."""
        from estargz._layer import batch_memory  # only when asked: the compiled stages are slow to load

        return batch_memory(**self._shape())

    def kernel_arguments(self) -> dict[str, Any]:
        """The keyword arguments of the builder kernel."""
        threads, memory = self._share()
        return {
            **self._shape(),
            "portable": self.portable,
            "threads": threads,
            "memory": memory,
            "progress": self.progress,
            "crew": self.pool.crew if self.pool is not None else None,
        }

    def _shape(self) -> dict[str, Any]:
        return {
            "compression": self.compression,
            "level": resolve_level(self.compression, self.level, portable=self.portable),
            "chunk_size": self.chunk_size,
            "min_chunk_size": self.min_chunk_size,
        }

    def _share(self) -> tuple[int, int]:
        """Threads and memory: as they were asked for, the most of the pool, or what this machine has for a build alone."""
        if self.pool is not None:
            remedy = ", or make the pool for this compression and level"
            check_compressor(self.compressor_size, self.pool.compressor_room, remedy)
            threads = min(self.threads or self.pool.threads, self.pool.threads)
            return threads, min(self.memory or self.pool.memory, self.pool.memory)
        threads = self.threads or usable_threads()
        slot = 2 * (self.chunk_size + self.min_chunk_size + (4 << 20))
        memory = self.memory or max(32 << 20, slot) * (threads + 1)
        if self.threads and self.memory:
            return threads, memory
        room = memory_room()
        fewer, less = affordable(room, threads, memory, self.batch_size, self.compressor_size)
        threads, memory = self.threads or fewer, self.memory or less
        check_compressor(
            self.compressor_size, compressor_room(room, threads, memory), ", or give both threads and memory"
        )
        return threads, memory
