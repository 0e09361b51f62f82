"""Where a layer comes from: trees of directories, or a tar stream, compressed or not, or an eStargz blob."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import IO, NamedTuple, Protocol, TypeGuard

from estargz import _tar_order, _walk
from estargz._crew import Crew
from estargz._inflate import detect
from estargz._inflate_ahead import InflateAhead
from estargz._layer import LayerBuilder
from estargz.descriptors import quietly, read_all_at
from estargz.errors import SinkError, SourceError, UsageError
from estargz.writing.priority import LANDMARK_PAYLOAD, NO_PREFETCH_LANDMARK, PREFETCH_LANDMARK, Priority

__all__ = ["Readable", "Source", "TarSource", "TreeSource", "open_source"]

PIECE_SIZE = 1 << 20
TAIL_SIZE = 64  # more than any footer


class Readable(Protocol):
    """An object that gives bytes: a file, a pipe, a response."""

    def read(self, size: int, /) -> bytes: ...


PathLike = str | os.PathLike[str]
Block = bytes | memoryview


class Source(Protocol):
    """What fills a builder."""

    def fill(self, builder: LayerBuilder) -> tuple[str, ...]:
        """Hands everything to the builder; returns what was to come first and is not in the layer. Raises SourceError."""

    def close(self) -> None:
        """Frees what the builder's workers read from; call it when the builder is finished."""


class TreeSource:
    """The changeset of a tree over lower trees, as containerd's walking differ sees it, or, with ``overlay``, of an
    overlayfs upperdir over its lower directories (topmost first), as BuildKit's overlay differ does.

    ``epoch``: upper bound of modification times in seconds. ``landmark``: write ``.no.prefetch.landmark`` first, or, with
    a ``priority``, ``.prefetch.landmark`` behind what comes first.
    """

    def __init__(
        self,
        upper: PathLike,
        lowers: Sequence[PathLike],
        *,
        overlay: bool,
        epoch: int | None,
        landmark: bool,
        priority: Priority | None,
    ) -> None:
        self._overlay = overlay
        self._epoch = epoch
        self._landmark = landmark
        self._priority = priority
        with ExitStack() as opened:
            self._upper = open_directory(upper, opened)
            self._lowers = [open_directory(lower, opened) for lower in lowers]
            self._handles = opened.pop_all()

    def fill(self, builder: LayerBuilder) -> tuple[str, ...]:
        walk = _walk.TreeWalk(
            builder,
            self._upper,
            self._lowers,
            overlay=self._overlay,
            epoch=self._epoch,
            landmarks_reserved=self._landmark,
        )
        if self._priority is not None:
            return fill_in_order(builder, walk, self._priority)
        if self._landmark:
            builder.add_small_file(NO_PREFETCH_LANDMARK, LANDMARK_PAYLOAD)
        walk.run()
        return ()

    def close(self) -> None:
        self._handles.close()


def fill_in_order(builder: LayerBuilder, walk: _walk.TreeWalk, priority: Priority) -> tuple[str, ...]:
    """Lets a walk write what comes first, the landmark, and the rest; returns what is missing of the first."""
    paths = priority.resolve(walk.names_below)
    if not priority.allow_missing:
        priority.missing(walk.look_up(paths))  # raises before anything is written
    states = walk.write_first(paths)
    builder.end_prefetch(PREFETCH_LANDMARK, LANDMARK_PAYLOAD)
    walk.run()
    walk.decide(paths, states)
    return priority.missing(states)


def open_directory(path: PathLike, opened: ExitStack) -> int:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise SourceError(
            f"{os.fspath(path)}: cannot be opened: {error.strerror}; check that the directory exists and is readable"
        ) from error
    opened.callback(quietly, os.close, handle)
    return handle


class TarSource:
    """A tar stream: plain, gzip or zstd, told apart by content. An eStargz blob gives the tar it was made from.

    ``owned``: the object is closed with the source. With a ``priority`` it is read twice, from a copy in ``$TMPDIR`` unless
    it is a plain file. ``threads`` and ``crew``: of the build that it is for. ``epoch``: no time in it comes out later than
    this. ``is_blob``: whether a gzip stream is an eStargz blob; None: its end tells, if that can be read beforehand.
    """

    def __init__(
        self,
        readable: Readable,
        name: str,
        *,
        owned: bool,
        priority: Priority | None,
        threads: int = 1,
        crew: Crew | None = None,
        epoch: int | None = None,
        is_blob: bool | None = None,
    ) -> None:
        self._readable = readable
        self._name = name
        self._owned = owned
        self._priority = priority
        self._ahead = Ahead(inflating_threads(threads), crew)
        self._epoch = epoch
        self._is_blob = is_blob

    def fill(self, builder: LayerBuilder) -> tuple[str, ...]:
        builder.input_name = self._name
        prefix = read_prefix(self._readable, self._name)
        if not prefix and self._is_blob is None:  # more likely nobody wrote it than that it is meant
            raise SourceError(f"{self._name}: is empty, and a tar is not; check what writes it")
        kind = detect(prefix)
        if self._priority is not None:
            return self._fill_in_order(builder, prefix, kind, self._priority)
        descriptor = raw_descriptor(self._readable) if self._epoch is None else None
        if kind == "plain" and descriptor is not None:
            builder.feed(prefix)
            builder.feed_fd(descriptor)
        elif kind == "plain":
            for piece in clamped(pieces(prefix, self._readable, self._name), self._epoch):
                builder.feed(piece)
        else:
            self._feed_compressed(builder, prefix, kind)
        builder.end_feed()
        return ()

    def _feed_compressed(self, builder: LayerBuilder, prefix: bytes, kind: str) -> None:
        """Inflates in threads of its own, ahead of the calling one, which splits, and of those that compress."""
        source = compressed(prefix, self._readable, self._name)
        is_blob = source.is_blob() if self._is_blob is None else self._is_blob
        stops = kind == "gzip" and is_blob is not False
        if stops:
            builder.stop_at_toc()
        with source.inflate(kind, self._ahead) as inflated:
            for block in clamped(inflated.blocks(), self._epoch):
                builder.feed(block)
            ended_in_footer = has_footer(source.tail(inflated.offset))
        if builder.toc_seen and not ended_in_footer:
            raise SourceError(
                f"{self._name}: holds stargz.index.json, a name reserved by the eStargz format; "
                "build from a file if that is behind the tar's end, or rename it"
            )
        if stops and ended_in_footer and not (builder.toc_seen and builder.toc_left == 0):
            raise hidden_table(self._name)

    def _fill_in_order(self, builder: LayerBuilder, prefix: bytes, kind: str, priority: Priority) -> tuple[str, ...]:
        """Scans a tar and then hands its entries over: what comes first, the landmark, and the rest; returns what is
        missing."""
        with ExitStack() as opened:
            descriptor = raw_descriptor(self._readable) if self._epoch is None else None
            whole_blob = False
            if kind == "plain" and descriptor is not None and is_regular(self._readable, self._name):
                with readable_errors(self._name):
                    begin, end = os.lseek(descriptor, 0, os.SEEK_CUR) - len(prefix), os.fstat(descriptor).st_size
            else:
                spool, end, tail = opened.enter_context(
                    self._spooled(compressed(prefix, self._readable, self._name), kind)
                )
                descriptor, begin = spool.fileno(), 0
                whole_blob = kind == "gzip" and has_footer(tail)
            order = _tar_order.TarOrder(builder, descriptor, begin, end)
            if whole_blob and not order.toc_cut:
                raise hidden_table(self._name)
            missing = priority.missing(order.pick(priority.resolve(order.names_below)))
            order.feed_picked()
            builder.end_prefetch(PREFETCH_LANDMARK, LANDMARK_PAYLOAD)
            order.feed_rest()
            builder.end_feed()
            return missing

    @contextmanager
    def _spooled(self, source: Compressed, kind: str) -> Iterator[tuple[IO[bytes], int, bytes]]:
        """A file without a name that holds a stream's tar, that tar's bytes, and the last ones of the stream itself.

        Raises SinkError when the tar finds no room.
        """
        size = 0
        with temporary_file() as (spool, folder):
            with source.inflate(kind, self._ahead) as inflated:
                for block in clamped(inflated.blocks(), self._epoch):
                    size += len(block)
                    keep(spool, block, folder)
                tail = source.tail(inflated.offset)
            yield spool, size, tail

    def close(self) -> None:
        if self._owned:
            close = getattr(self._readable, "close", None)
            if close is not None:
                quietly(close)


@contextmanager
def temporary_file() -> Iterator[tuple[IO[bytes], str]]:
    """A file without a name in a directory. Raises SinkError when there is no room for one."""
    import tempfile  # slow, and rarely wanted

    folder = "$TMPDIR"
    try:
        folder = tempfile.gettempdir()
        spool = tempfile.TemporaryFile(prefix="estargz-", buffering=0)  # noqa: SIM115 # closed below
    except OSError as error:
        raise no_spool(folder, error) from error
    try:
        yield spool, folder
    finally:
        quietly(spool.close)  # what it holds is not wanted any more


def no_spool(folder: str, error: OSError) -> SinkError:
    raised = SinkError(
        f"{folder}: the uncompressed tar cannot be kept there meanwhile: {error.strerror}; "
        "free some space, set TMPDIR, or build from a plain tar file"
    )
    raised.errno = error.errno
    return raised


def keep(spool: IO[bytes], data: Block, folder: str) -> None:
    try:
        while data:
            data = data[spool.write(data) :]
    except OSError as error:
        raise no_spool(folder, error) from error


def read_prefix(readable: Readable, name: str) -> bytes:
    """Enough bytes to tell the type by: fewer only at the end of the stream."""
    prefix = b""
    while len(prefix) < 4:
        piece = read_piece(readable, 4 - len(prefix), name)
        if not piece:
            break
        prefix += piece
    return prefix


def read_piece(readable: Readable, size: int, name: str) -> bytes:
    """At most ``size`` bytes, none at the end. Raises SourceError for an object that does not wait for data."""
    with readable_errors(name) if isinstance(readable, io.FileIO) else nullcontext():
        piece = readable.read(size)
    if piece is None:
        raise SourceError("input: its read() has nothing yet and does not wait; make it a blocking one")
    if isinstance(piece, str):
        raise UsageError("a source's read() gives bytes; open it in binary mode")
    return piece


@contextmanager
def readable_errors(name: str) -> Iterator[None]:
    """An error of the system, from a file that is read, becomes one that names it."""
    try:
        yield
    except OSError as error:
        raise SourceError(f"{name}: cannot be read: {error.strerror}; check the file system that holds it") from error


def raw_descriptor(readable: Readable) -> int | None:
    """The descriptor of an unbuffered file, from which a kernel can read on; None for every other object."""
    return readable.fileno() if isinstance(readable, io.FileIO) else None


def is_regular(readable: Readable, name: str) -> TypeGuard[io.FileIO]:
    """Whether it can be read at any place; files whose size the kernel does not tell cannot."""
    descriptor = raw_descriptor(readable)
    if descriptor is None:
        return False
    with readable_errors(name):
        status = os.fstat(descriptor)
    return stat.S_ISREG(status.st_mode) and status.st_size > 0


def pieces(prefix: bytes, readable: Readable, name: str) -> Iterator[bytes]:
    """All of an object, with the bytes that were read from it to look at them put back in front."""
    piece = prefix
    while piece:
        yield piece
        piece = read_piece(readable, PIECE_SIZE, name)


def clamped(blocks: Iterable[Block], epoch: int | None) -> Iterator[Block]:
    """A tar's bytes with no time in them later than the epoch; each block is used before the next is asked for."""
    if epoch is None:
        yield from blocks
        return
    from estargz.writing.timestamps import ClampedTar  # which reads as this module does

    tar = ClampedTar(Blocks(blocks), epoch)
    while piece := tar.read(PIECE_SIZE):
        yield piece


class Blocks:
    """A readable object of blocks."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        self._blocks = iter(blocks)
        self._left = b""

    def read(self, size: int, /) -> bytes:
        data = self._left or bytes(next(self._blocks, b""))
        self._left = data[size:]
        return data[:size]


class Ahead(NamedTuple):
    """Who inflates ahead of a builder."""

    threads: int
    crew: Crew | None


class CompressedFile:
    """A compressed regular file whose first bytes were read already, for threads that read it themselves."""

    def __init__(self, prefix: bytes, file: io.FileIO, name: str) -> None:
        self._file = file
        self._name = name
        with readable_errors(name):
            self._begin = file.tell() - len(prefix)

    def inflate(self, kind: str, ahead: Ahead) -> InflateAhead:
        handle = self._file.fileno()
        with readable_errors(self._name):
            return InflateAhead(
                handle, kind, begin=self._begin, name=self._name, threads=ahead.threads, crew=ahead.crew
            )

    def is_blob(self) -> bool:
        """Whether it ends as an eStargz blob does."""
        with readable_errors(self._name):
            size = os.fstat(self._file.fileno()).st_size
            return has_footer(read_all_at(self._file.fileno(), max(size - TAIL_SIZE, self._begin), TAIL_SIZE))

    def tail(self, size: int) -> bytes:
        """The last bytes, of which there are ``size`` altogether; leaves the file read to its end, as others are."""
        with readable_errors(self._name):
            end = self._file.seek(self._begin + size)
            return read_all_at(self._file.fileno(), end - min(TAIL_SIZE, size), min(TAIL_SIZE, size))


class CompressedObject:
    """A readable object with the bytes that were read from it to look at them put back in front."""

    def __init__(self, prefix: bytes, readable: Readable, name: str) -> None:
        self._prefix = prefix
        self._readable = readable
        self._name = name
        self._tail = b""

    def inflate(self, kind: str, ahead: Ahead) -> InflateAhead:
        return InflateAhead(self, kind, name=self._name, threads=ahead.threads, crew=ahead.crew)

    def read(self, size: int) -> bytes:
        if self._prefix:
            data, self._prefix = self._prefix[:size], self._prefix[size:]
        else:
            data = read_piece(self._readable, size, self._name)
        self._tail = (self._tail + data[-TAIL_SIZE:])[-TAIL_SIZE:]
        return data

    def is_blob(self) -> None:
        """Nobody knows before its end."""

    def tail(self, size: int) -> bytes:
        return self._tail


Compressed = CompressedFile | CompressedObject


def compressed(prefix: bytes, readable: Readable, name: str) -> Compressed:
    if is_regular(readable, name):
        return CompressedFile(prefix, readable, name)
    return CompressedObject(prefix, readable, name)


def inflating_threads(threads: int) -> int:
    """Threads that inflate beside as many that compress: it is a quarter of the work (bench/bench_inflate.py), and what four
    inflate is more than the one hash over the whole stream takes."""
    return min((threads + 3) // 4, 4)


def hidden_table(name: str) -> SourceError:
    return SourceError(
        f"{name}: is an eStargz blob whose tar ends in bytes that hide where its table of contents begins; "
        "build from what estargz unpack writes"
    )


def has_footer(tail: bytes) -> bool:
    """Whether a blob that ends so is an eStargz blob (51-byte footer) or a legacy stargz one (47 bytes)."""
    return tail[-51:-35] == b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x1a\0SG\x16\0" or (
        tail[-47:-35] == b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x16\0"
    )


def open_source(
    source: PathLike | Readable,
    *,
    lower: PathLike | None,
    overlay_lower: Sequence[PathLike] | None,
    epoch: int | None,
    landmark: bool,
    priority: Priority | None = None,
    threads: int = 1,
    crew: Crew | None = None,
    rewrite: bool = False,
) -> Source:
    """The source that ``source`` is: a directory, a tar file, or a readable object, for a build with so many threads, of which
    those that inflate need a seat of its ``crew``. ``rewrite``: the epoch bounds the times of a tar, too.

    Raises:
        UsageError: lower directories are given with a tar, or both kinds of them at once.
        SourceError: it cannot be opened.
    """
    if isinstance(overlay_lower, str | os.PathLike):
        raise UsageError("an overlay's lower directories are a sequence of paths, topmost first, not one path")
    for path in (source, lower, *(overlay_lower or ())):
        if isinstance(path, str | os.PathLike) and (not os.fspath(path) or "\0" in str(path)):
            raise UsageError(f"{os.fspath(path)!r} is no path to read from")
    if lower is not None and overlay_lower is not None:
        raise UsageError("give either a lower directory or an overlay's lower directories, not both")
    if epoch is not None and not -(2**63) <= epoch < 2**63:
        raise UsageError(f"{epoch} is no time: the upper bound of modification times is a number of seconds")
    if isinstance(source, str | os.PathLike):
        if is_directory(source) or ((lower is not None or overlay_lower is not None) and not os.path.exists(source)):
            lowers = list(overlay_lower) if overlay_lower is not None else [lower] if lower is not None else []
            return TreeSource(
                source, lowers, overlay=overlay_lower is not None, epoch=epoch, landmark=landmark, priority=priority
            )
        no_lowers(lower, overlay_lower)
        readable: Readable = open_tar(source)
        name = os.fspath(source)
    else:
        if not callable(getattr(source, "read", None)):
            raise UsageError(f"a source is a path or an object with read(), not {type(source).__name__}")
        no_lowers(lower, overlay_lower)
        readable, name = source, str(getattr(source, "name", "input"))
    return TarSource(
        readable,
        name,
        owned=readable is not source,
        priority=priority,
        threads=threads,
        crew=crew,
        epoch=epoch if rewrite else None,
    )


def is_directory(path: PathLike) -> bool:
    """Whether a path leads to a directory; False where nothing is. Raises SourceError when nobody can tell."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise cannot_be_opened(path, error) from error


def cannot_be_opened(path: PathLike, error: OSError) -> SourceError:
    return SourceError(f"{os.fspath(path)}: cannot be opened: {error.strerror}; check that it exists and is readable")


def no_lowers(lower: PathLike | None, overlay_lower: Sequence[PathLike] | None) -> None:
    if lower is not None or overlay_lower is not None:
        raise UsageError("a lower directory goes with a directory, not with a tar stream")


def open_tar(path: PathLike) -> io.FileIO:
    try:
        return io.FileIO(path, "rb")
    except OSError as error:
        raise cannot_be_opened(path, error) from error


@contextmanager
def opened(source: Source) -> Iterator[Source]:
    """Closes a source at the end, whatever happened."""
    try:
        yield source
    finally:
        source.close()
