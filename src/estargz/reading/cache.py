"""A blob's bytes kept in blocks, in memory and on disk, so that few ranges are fetched and each of them once.

read -> blocks -> memory | being fetched | disk | missing -> runs of neighbours -> the source's ranges, side by side
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self

from estargz.descriptors import reading
from estargz.errors import BlobError, UsageError
from estargz.reading.source import RangeReader, stated_size
from estargz.threads import Threads

__all__ = ["CachedSource"]

# Of docker-registry, 150 files of a layer of 14,797 entries, at random: 141 requests and 6.6 MB with 32 KiB, 135 and 10.8 MB
# with 64 KiB, 123 and 17.4 MB with 128 KiB, 111 and 30.3 MB with 256 KiB, in equal times.
_BLOCK_SIZE = 1 << 16
_WAVE = 1 << 25  # bytes that are fetched before what was read is put together
_STREAMS = 16  # ends of runs that are remembered, to see that a reader goes on from one
_PARALLEL = 8  # threads for a source that cannot read several ranges at once itself


class CachedSource:
    """A RangeReader that reads another one in blocks and keeps them. Its methods may be used from several threads.

    source:      what is read; ``close`` closes it, if it can be closed
    block_size:  bytes of a block; blocks begin at multiples of it
    memory:      bytes of blocks to keep in memory, at most; those that were not used for longest go first
    directory:   where blocks are kept on disk as well, for later processes and for others that run now; made if missing
    key:         what tells this blob from others in ``directory``, such as its digest
    disk:        bytes that the files in ``directory`` may take; the oldest go first. Each further process that writes there
                 at the same time may add a sixteenth
    gap:         bytes between two missing blocks that are fetched along rather than asking twice
    max_range:   bytes of one range, at most; longer runs are fetched as several, side by side

    A block that several threads want is fetched once. Where a read goes on from an earlier one, ever more is fetched ahead,
    up to ``max_range``. A file in ``directory`` that is damaged, cut or of another blob is as
    good as none, and so is a directory that cannot be read or written later on. Its content is as trustworthy as whoever may
    write there: check what is read by its digest, and ``forget`` it if that is wrong.

    requests:  ranges that the source was asked for
    fetched:   bytes that it gave
    hits:      blocks that were there already, or being fetched, when they were wanted

    Raises UsageError for arguments that cannot be honoured, OSError when ``directory`` cannot be made, and while reading
    whatever the source raises, and BlobError when it gives too few or too many bytes.
    """

    def __init__(
        self,
        source: RangeReader,
        *,
        block_size: int = _BLOCK_SIZE,
        memory: int = 64 << 20,
        directory: str | os.PathLike[str] | None = None,
        key: str | None = None,
        disk: int = 1 << 30,
        gap: int = 1 << 18,
        max_range: int = 4 << 20,
    ) -> None:
        if block_size < 512 or max_range < block_size:
            raise UsageError("block_size must be 512 or more, and max_range at least as much")
        if min(memory, disk, gap) < 0:
            raise UsageError("memory, disk and gap must be 0 or more")
        if (directory is None) != (key is None):
            raise UsageError("directory and key belong together: give the blob's digest as key")
        self.name = str(getattr(source, "name", "blob"))
        self.size = stated_size(source, self.name)
        self.requests = self.fetched = self.hits = 0
        self._source: RangeReader | None = source
        self._block_size, self._memory = block_size, memory
        self._gap_blocks, self._run_blocks = gap // block_size, max_range // block_size
        self._disk = None if directory is None or key is None else _DiskBlocks(directory, key, block_size, disk)
        self._room = memory if self._disk is None else max(memory, disk)
        self._lock = threading.Lock()  # guards all below
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._held = 0
        self._flights: dict[int, Future[bytes]] = {}  # blocks that somebody fetches now
        self._streams: OrderedDict[int, int] = OrderedDict()  # where a run ended: the number of its blocks

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the memory and close the source; what is on disk stays. Closing twice does no harm."""
        with self._lock:
            source, self._source = self._source, None
            self._blocks.clear()
            self._held = 0
        close = getattr(source, "close", None)
        if close is not None:
            close()

    def read_at(self, offset: int, size: int, /) -> bytes:
        """The ``size`` bytes at ``offset``; fewer only where the blob ends."""
        return self.read_ranges([(offset, size)])[0]

    def read_ranges(self, ranges: Sequence[tuple[int, int]], /) -> list[bytes]:
        """What read_at gives for each (offset, size), in the same order; what is missing is fetched side by side."""
        found: list[list[bytes]] = [[] for _ in ranges]
        for wave in self._waves(ranges):
            blocks = self._load({index for piece in wave for index in self._indexes(piece.begin, piece.end)})
            for piece in wave:
                found[piece.which].append(self._cut(blocks, piece.begin, piece.end))
        return [parts[0] if len(parts) == 1 else b"".join(parts) for parts in found]

    def prefetch(self, ranges: Sequence[tuple[int, int]], /) -> None:
        """Fetch these (offset, size), which will be read soon, in the order given, as far as there is room for them."""
        room = self._room
        for wave in self._waves(ranges):
            wanted = list(dict.fromkeys(index for piece in wave for index in self._indexes(piece.begin, piece.end)))
            self._load(wanted[: room // self._block_size])
            room -= len(wanted) * self._block_size
            if room <= 0:
                return

    def forget(self, offset: int, size: int, /) -> None:
        """These bytes were wrong: fetch them anew when they are next read. What is being fetched now is not kept."""
        indexes = self._indexes(*self._inside(offset, size))
        with self._lock:
            for index in indexes:
                self._flights.pop(index, None)
                self._held -= len(self._blocks.pop(index, b""))
            source = self._source
        if self._disk is not None:
            for index in indexes:
                self._disk.remove(index)
        drop = getattr(source, "forget", None)
        if drop is not None:
            drop(offset, size)

    # ----------------------------------------------------------------------------------------------------------------
    # ranges and blocks

    def _inside(self, offset: int, size: int) -> tuple[int, int]:
        """Where the range begins and ends in the blob."""
        if offset < 0 or size < 0:
            raise UsageError(f"{self.name}: there are no {size} bytes at byte {offset}")
        begin = min(offset, self.size)
        return begin, min(begin + size, self.size)

    def _indexes(self, begin: int, end: int) -> range:
        return range(
            begin // self._block_size, -(-end // self._block_size) if end > begin else begin // self._block_size
        )

    def _length(self, index: int) -> int:
        return min(self._block_size, self.size - index * self._block_size)

    def _waves(self, ranges: Sequence[tuple[int, int]]) -> Iterator[list[_Piece]]:
        """The ranges in pieces, as many at a time as lie in blocks of _WAVE bytes or a little more."""
        wave: list[_Piece] = []
        blocks = 0
        most = max(_WAVE // self._block_size, 1)
        for which, (offset, size) in enumerate(ranges):
            begin, end = self._inside(offset, size)
            while begin < end:
                cut = min(end, (begin // self._block_size + most - blocks) * self._block_size)
                wave.append(_Piece(which, begin, cut))
                blocks += len(self._indexes(begin, cut))
                begin = cut
                if blocks >= most:
                    yield wave
                    wave, blocks = [], 0
        if wave:
            yield wave

    def _cut(self, blocks: dict[int, bytes], begin: int, end: int) -> bytes:
        parts = []
        for index in self._indexes(begin, end):
            at = index * self._block_size
            parts.append(blocks[index][max(begin - at, 0) : end - at])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _load(self, wanted: Iterable[int]) -> dict[int, bytes]:
        """These blocks, from wherever they are."""
        found: dict[int, bytes] = {}
        while missing := [index for index in sorted(wanted) if index not in found]:
            mine: dict[int, Future[bytes]] = {}
            others: dict[int, Future[bytes]] = {}
            try:
                source = self._claim(missing, found, mine, others)
                # First what others may wait for, so that nobody waits in a circle.
                found |= self._bring(source, mine)
            except BaseException as error:
                _fail(mine, error)
                raise
            finally:
                self._land(mine)
            for index, flight in others.items():
                with suppress(CancelledError):  # whoever fetched it was interrupted: do it here
                    found[index] = flight.result()
        return found

    def _claim(
        self,
        missing: Sequence[int],
        found: dict[int, bytes],
        mine: dict[int, Future[bytes]],
        others: dict[int, Future[bytes]],
    ) -> RangeReader:
        """Divides blocks into those in memory, those that others fetch, and those that nobody else fetches from now on."""
        with self._lock:
            if self._source is None:
                raise UsageError(f"{self.name}: is closed")
            for index in missing:
                if index in self._blocks:
                    self._blocks.move_to_end(index)
                    found[index] = self._blocks[index]
                elif index in self._flights:
                    others[index] = self._flights[index]
                else:
                    mine[index] = self._flights[index] = Future()
            self.hits += len(missing) - len(mine)
            return self._source

    def _bring(self, source: RangeReader, mine: dict[int, Future[bytes]]) -> dict[int, bytes]:
        """The blocks of these flights, given to all who wait for them."""
        found: dict[int, bytes] = {}
        if self._disk is not None:
            self._from_disk(self._disk, mine, found)
        fresh = self._fetch(source, mine, [index for index in mine if index not in found])
        found |= fresh
        for index, flight in mine.items():
            flight.set_result(found[index])
        if self._disk is not None:
            for index, data in fresh.items():
                self._disk.write(index, data)
        return found

    def _from_disk(self, disk: _DiskBlocks, mine: dict[int, Future[bytes]], found: dict[int, bytes]) -> None:
        for index in mine:
            data = disk.read(index, self._length(index))
            if data is not None:
                found[index] = data
        with self._lock:
            self.hits += len(found)

    def _fetch(self, source: RangeReader, mine: dict[int, Future[bytes]], missing: Sequence[int]) -> dict[int, bytes]:
        if not missing:
            return {}
        runs = self._runs(missing)
        with self._lock:
            if len(runs) == 1:
                runs = [self._ahead(runs[0])]
            # What lies in the gaps between them comes along, and is kept unless it is here already.
            for run in runs:
                for index in run:
                    if index not in mine and index not in self._blocks and index not in self._flights:
                        mine[index] = self._flights[index] = Future()
            self.requests += len(runs)
        spans = [(run.start * self._block_size, min(run.stop * self._block_size, self.size)) for run in runs]
        parts = _read_all(source, [(begin, end - begin) for begin, end in spans])
        with self._lock:
            self.fetched += sum(len(part) for part in parts)
        fresh = {}
        for run, part in zip(runs, parts, strict=True):
            for at, index in enumerate(run):
                if index in mine:
                    fresh[index] = part[at * self._block_size : (at + 1) * self._block_size]
        return fresh

    def _runs(self, missing: Sequence[int]) -> list[range]:
        """Ascending blocks as runs that are fetched by one request each."""
        runs: list[range] = []
        for index in missing:
            if runs and index - runs[-1].stop <= self._gap_blocks and index - runs[-1].start < self._run_blocks:
                runs[-1] = range(runs[-1].start, index + 1)
            else:
                runs.append(range(index, index + 1))
        return runs

    def _ahead(self, run: range) -> range:
        """A run that goes on where one ended before, made twice as long as that: somebody reads from front to back."""
        wanted = min(2 * self._streams.pop(run.start, 0), self._run_blocks, self._memory // self._block_size // 2)
        last = min(run.start + wanted, -(-self.size // self._block_size))
        stop = run.stop
        while stop < last and stop not in self._blocks and stop not in self._flights:
            stop += 1
        self._streams[stop] = stop - run.start
        if len(self._streams) > _STREAMS:
            self._streams.popitem(last=False)
        return range(run.start, stop)

    def _land(self, mine: dict[int, Future[bytes]]) -> None:
        """Keeps what has come, but for what was forgotten meanwhile."""
        forgotten = []
        with self._lock:
            for index, flight in mine.items():
                if self._flights.get(index) is not flight:
                    forgotten.append(index)
                    continue
                del self._flights[index]
                if not flight.cancelled() and flight.exception() is None and self._source is not None:
                    self._blocks[index] = flight.result()
                    self._held += len(self._blocks[index])
            while self._held > self._memory:
                _, oldest = self._blocks.popitem(last=False)
                self._held -= len(oldest)
        if self._disk is not None:
            for index in forgotten:
                self._disk.remove(index)


def _fail(flights: dict[int, Future[bytes]], error: BaseException) -> None:
    """Ends what has not ended yet. An error is everybody's; to be interrupted is nobody else's affair."""
    for flight in flights.values():
        if flight.done():
            continue
        if isinstance(error, Exception):
            flight.set_exception(error)
        else:
            flight.cancel()


class _Piece(NamedTuple):
    """Bytes [begin, end) of the blob, which belong to the range at ``which``."""

    which: int
    begin: int
    end: int


def _read_all(source: RangeReader, ranges: list[tuple[int, int]]) -> list[bytes]:
    """Each range whole, side by side where there are several. Raises BlobError for any other length."""
    together = getattr(source, "read_ranges", None)
    if together is not None:
        parts: list[bytes] = together(ranges)
    elif len(ranges) == 1:
        parts = [_exactly(source, ranges[0])]
    else:
        with Threads(min(_PARALLEL, len(ranges))) as threads:
            parts = list(threads.map(lambda span: _exactly(source, span), ranges))
    for (offset, size), part in zip(ranges, parts, strict=True):
        name = getattr(source, "name", "blob")
        if not isinstance(part, bytes):
            raise BlobError(
                f"{name}: {type(part).__name__} came for {size} bytes at byte {offset}; its reader is faulty"
            )
        if len(part) != size:
            raise BlobError(f"{name}: {len(part)} bytes came for {size} at byte {offset}; was it cut while being read?")
    return parts


def _exactly(source: RangeReader, span: tuple[int, int]) -> bytes:
    offset, size = span
    data = source.read_at(offset, size)
    while isinstance(data, bytes) and 0 < len(data) < size:
        more = source.read_at(offset + len(data), size - len(data))
        if not more:
            break
        data += more
    return data


class _DiskBlocks:
    """Blocks of one blob as files ``KEY.BLOCKSIZE.INDEX.estargz``: a SHA-256 over that name and the data, then the data.

    A file appears whole, under its name, or not at all. Nothing is synced: what a crash leaves fails its checksum. Errors of
    the file system are misses, since a cache that is full or gone must not stop a read that would do without it.
    """

    def __init__(self, directory: str | os.PathLike[str], key: str, block_size: int, limit: int) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9:_+=-]{0,149}", key):
            raise UsageError(f"the cache key {key!r} is no digest: letters, digits and any of : _ + = -, at most 150")
        self._directory = Path(directory)
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._prefix = f"{key}.{block_size}"
        self._limit = limit
        self._lock = threading.Lock()
        self._room = 0  # bytes that may be written before the directory is looked at again

    def _name(self, index: int) -> str:
        return f"{self._prefix}.{index}.estargz"

    def read(self, index: int, size: int) -> bytes | None:
        name = self._name(index)
        path = self._directory / name
        try:
            with reading(path, os.O_NOFOLLOW | os.O_NONBLOCK) as file:
                content = file.read(_SUM + size + 1)
        except OSError:
            return None
        data = content[_SUM:]
        if len(data) != size or content[:_SUM] != _sum(name, data):
            self.remove(index)
            return None
        with suppress(OSError):
            os.utime(path)  # it is in use: let others go first
        return data

    def write(self, index: int, data: bytes) -> None:
        name = self._name(index)
        size = _on_disk(_SUM + len(data))
        with self._lock:
            if size > self._room:
                self._room = _make_room(self._directory, self._limit, size)
            if size > self._room:
                return
            self._room -= size
        temporary = self._directory / f".{name}.{os.urandom(8).hex()}.tmp"
        try:
            with open(temporary, "xb", opener=_open_privately) as file:
                file.write(_sum(name, data))
                file.write(data)
            os.replace(temporary, self._directory / name)
        except OSError:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def remove(self, index: int) -> None:
        with suppress(OSError):
            (self._directory / self._name(index)).unlink(missing_ok=True)


_SUM = 32  # bytes of a SHA-256
_OURS = re.compile(r"[A-Za-z0-9:_+=-]+\.\d+\.\d+\.estargz|(?P<temporary>\..+\.estargz\.[0-9a-f]{16}\.tmp)")
_ABANDONED = 3600.0  # seconds after which nobody writes a temporary file any more


def _sum(name: str, data: bytes) -> bytes:
    digest = hashlib.sha256(name.encode())
    digest.update(data)
    return digest.digest()


def _open_privately(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def _on_disk(size: int) -> int:
    """Bytes that a file takes, in the blocks that file systems have."""
    return -(-size // 4096) * 4096


def _make_room(directory: Path, limit: int, size: int) -> int:
    """Evicts the oldest files of all blobs until ``size`` bytes fit; how much may be written until the next look."""
    if size > limit:
        return 0
    files = []
    now = time.time()
    with suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            match = _OURS.fullmatch(entry.name)
            if match is None:
                continue
            with suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                if match["temporary"] and now - status.st_mtime > _ABANDONED:
                    os.unlink(entry.path)
                else:
                    files.append((status.st_mtime, _on_disk(status.st_size), entry.path))
    share = max(limit // 16, size)
    used = sum(taken for _, taken, _ in files)
    for _, taken, path in sorted(files):
        if used + share <= limit:
            break
        with suppress(OSError):
            os.unlink(path)
            used -= taken
    return min(share, limit - used)
