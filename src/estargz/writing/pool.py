"""What builds that run side by side share: threads and memory."""

from __future__ import annotations

import math
import os

from estargz._crew import Crew
from estargz.options import (
    MAX_MEMORY,
    MAX_THREADS,
    Options,
    affordable,
    check_range,
    compressor_room,
    memory_room,
    usable_threads,
)

__all__ = ["Pool"]

DEFAULT_MEMORY = 64 << 20
_BATCH = 15 << 20
"""What a batch takes with the default options of any compression."""


class Pool:
    """Threads and memory for builds that several threads of the caller run at once: ``build(..., pool=pool)``.

    However many builds there are, no more than ``threads`` of their threads walk, read, hash, compress or inflate at any time,
    and the data under way takes no more than ``memory`` bytes. Builds take turns of some batches, so that a small layer does
    not wait for a large one to end. A build begins when there is memory for two of its batches (10 MiB each with the options'
    defaults); until then it waits, unless its thread has another one unfinished, as a thread that fills two ``Writer``s may:
    that is a UsageError. It uses more while others do not need it.

    Not counted: who copies a plain tar into batches, who writes to a pipe or an object, the memory of what is inflated ahead
    (2 MiB a build, 8 MiB and more with more than four threads), and the compressors, of which there are as many as threads.

    Nothing needs to be closed: without builds a pool holds neither threads nor memory. In a child that was forked it is a pool
    of the child's own, whatever the parent is building.

    Args:
        threads: 1..1024, None for the CPUs this process may use, or fewer where a cgroup has no memory for them.
        memory: bytes, None for 64 MiB and 64 MiB more for each thread, or less in a cgroup that has less.
        compression, level: of the builds that need most. In a cgroup with little memory for so many threads, builds with
            larger compressors are a UsageError; zstd's take up to 82 MiB each, all others 9 MiB at most.

    Raises:
        UsageError: a value is out of its range.
    """

    def __init__(
        self,
        threads: int | None = None,
        memory: int | None = None,
        *,
        compression: str = "estargz",
        level: int | None = None,
    ) -> None:
        count = usable_threads() if threads is None else threads
        check_range("threads", count, 1, MAX_THREADS)
        most = Options(compression=compression, level=level)
        room = memory_room() if threads is None or memory is None else math.inf  # what is asked for is taken as it is
        batch = max(_BATCH, most.batch_size)
        fewer, less = affordable(room, count, DEFAULT_MEMORY * (count + 1), batch, most.compressor_size)
        threads = fewer if threads is None else threads
        memory = less if memory is None else memory
        check_range("memory", memory, 1, MAX_MEMORY)
        self._crews = {os.getpid(): Crew(threads, memory)}
        self._compressor_room = compressor_room(room, threads, memory)

    @property
    def compressor_room(self) -> float:
        """Bytes that the compressor of each thread may take: infinite without a cgroup's limit, and where both threads and
        memory were given."""
        return self._compressor_room

    @property
    def threads(self) -> int:
        """How many compute at once."""
        return self.crew.threads

    @property
    def memory(self) -> int:
        """Bytes of data under way, in all."""
        return self.crew.memory

    @property
    def crew(self) -> Crew:
        """The same for the kernels: of each process its own, for what a parent's threads have taken never comes back here."""
        process = os.getpid()
        crew = self._crews.get(process)
        if crew is None:
            parents = next(iter(self._crews.values()))
            crew = self._crews.setdefault(process, Crew(parents.threads, parents.memory))
        return crew
