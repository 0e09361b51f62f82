"""The pipeline on paper: its rules (docs/architecture.md) played with measured costs, for more threads than there are.

What it leaves out is what threads do to each other outside the pipeline: memory bandwidth, clock rates, the kernel's locks
on directories and on the output file.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from heapq import heappop, heappush


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds per batch, each measured with one thread, and of the whole build: ``start``, ``tail``."""

    source: float
    read: float
    chunks: float
    both: float
    """Chunk digests and the stream's, interleaved."""
    compress: float
    blob: float
    """In order: blob digest and rows, when the stream's digest was taken along."""
    stream_and_blob: float
    """In order: the same together with the stream's digest."""
    write: float
    batches: int
    slot_bytes: int
    """Memory that a batch under way takes."""
    start: float
    tail: float


MEMORY_PER_THREAD = 32 << 20  # of the default budget, and as much once more (options.py)

# A thread's life: it yields seconds that it is busy for, or None when there is nothing to do.
Life = Generator[float | None, None, None]


@dataclass(slots=True)
class Pipeline:
    """The state that threads share; batches are numbers."""

    costs: Costs
    threads: int
    produced: int = 0
    taken: int = 0
    ordered: int = 0
    written: int = 0
    ordering: bool = False
    writing: bool = False
    stream_next: int = 0
    stream_taken: bool = False
    done: set[int] = field(default_factory=set)
    stream_hashed: set[int] = field(default_factory=set)

    @property
    def slots(self) -> int:
        """Batches under way: as many as the default budget allows, at most four a thread and four more."""
        return min(MEMORY_PER_THREAD * (self.threads + 1) // self.costs.slot_bytes, 4 * self.threads + 4)

    def room(self) -> bool:
        alone = self.threads == 1 and self.produced > self.written
        return self.produced < self.costs.batches and self.produced - self.written < self.slots and not alone

    def producer(self) -> Life:
        while self.written < self.costs.batches:
            if self.room():
                yield self.costs.source
                self.produced += 1
            else:
                yield from self.step()

    def worker(self) -> Life:
        while self.written < self.costs.batches:
            yield from self.step()

    def step(self) -> Life:
        if not self.writing and self.written < self.ordered:
            yield from self.write()
        elif not self.ordering and self.ordered in self.done:
            yield from self.order(self.ordered)
        elif self.taken < self.produced:
            self.taken += 1
            yield from self.work(self.taken - 1)
        else:
            yield None

    def work(self, batch: int) -> Life:
        yield self.costs.read
        hashed = self.take_stream(batch)
        if hashed:
            yield from self.hash_both(batch)
        yield self.costs.compress
        if not hashed and self.take_stream(batch):
            yield from self.hash_both(batch)
        elif not hashed:
            yield self.costs.chunks
        self.done.add(batch)

    def take_stream(self, batch: int) -> bool:
        taken = not self.stream_taken and self.stream_next == batch
        self.stream_taken = self.stream_taken or taken
        return taken

    def hash_both(self, batch: int) -> Life:
        yield self.costs.both
        self.return_stream(batch)

    def return_stream(self, batch: int) -> None:
        self.stream_hashed.add(batch)
        self.stream_taken, self.stream_next = False, batch + 1

    def order(self, batch: int) -> Life:
        self.ordering = True
        if batch in self.stream_hashed:
            yield self.costs.blob
        else:
            yield self.costs.stream_and_blob
            self.return_stream(batch)
        self.ordered += 1
        self.ordering = False

    def write(self) -> Life:
        self.writing = True
        yield self.costs.write
        self.written += 1
        self.writing = False


def seconds(costs: Costs, threads: int) -> float:
    """Wall seconds of a build."""
    pipeline = Pipeline(costs, threads)
    lives: list[Life] = [pipeline.producer(), *(pipeline.worker() for _ in range(threads - 1))]
    queue = [(0.0, index) for index in range(threads)]
    idle: list[int] = []
    now = 0.0
    while queue:
        now, index = heappop(queue)
        busy = next(lives[index], -1.0)
        if busy is None:
            idle.append(index)
        elif busy >= 0:
            heappush(queue, (now + busy, index))
        # Something may have changed for those who wait.
        if busy is not None:
            for waiting in idle:
                heappush(queue, (now, waiting))
            idle.clear()
    return costs.start + now + costs.tail
