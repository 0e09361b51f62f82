"""Applying layers to a directory, as a runtime does that unpacks them: by the tar, never by the table of contents.

layer (file | buffer | pipe) -> inflate -> tar -> jobs x threads -> directory
                                   `---> SHA-256 = DiffID
"""

from __future__ import annotations

import hashlib
import io
import os
import resource
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from estargz._extract import Extractor
from estargz._inflate import detect
from estargz._inflate_ahead import InflateAhead
from estargz.descriptors import naming, open_folder, quietly
from estargz.digest import parse_digest
from estargz.errors import BlobError, UsageError, VerificationError
from estargz.options import MAX_THREADS, Progress, affordable, memory_room, usable_threads
from estargz.reading.blob import begins_like_tar
from estargz.reading.footer import footer_of
from estargz.reading.source import RangeReader, Readable, Source, Window, blob_errors, is_url, open_source

__all__ = ["Extracted", "extract"]

_ENTRIES_MOST = 10_000_000  # as many as a table of contents may have (Limits.entries)
_HANDLES_MOST = 512  # directories kept open
_THREAD_MEMORY = 8 << 20
_PREFIX = 512  # bytes of a pipe to tell its kind by
_SKIPPED = {  # skip_reason in ext/estargz/_place.pxd
    1: "a device needs root and its owners",
    2: "the attribute {key} needs root and its owners",
    3: "the attribute {key} is none that the file system keeps here",
}


Layer = Readable | IO[bytes]


@dataclass(frozen=True, slots=True)
class Extracted:
    """What extract() did.

    entries:        entries applied, whiteouts not among them
    files:          regular files among them
    bytes:          of their payloads
    whiteouts:      markers that hide what lower layers have
    skipped:        (path, why) of devices and extended attributes that were left out, in the order of the layers: the
                    first 1000, or fewer where paths and attributes' keys take more than 1 MiB
    skipped_count:  how many were left out
    """

    entries: int
    files: int
    bytes: int
    whiteouts: int
    skipped: tuple[tuple[str, str], ...] = ()
    skipped_count: int = 0


def extract(
    layers: Layer | list[Layer] | tuple[Layer, ...],
    directory: str | os.PathLike[str],
    *,
    paths: Sequence[str | bytes] | None = None,
    same_owner: bool | None = None,
    xattrs: bool = True,
    threads: int | None = None,
    memory: int | None = None,
    max_size: int | None = None,
    max_entries: int | None = _ENTRIES_MOST,
    diff_ids: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Extracted:
    """Apply one layer, or several from the lowest to the topmost, to a directory.

    Args:
        layers: each a path, a URL, a file, bytes or a RangeReader; plain, gzip or zstd tar, or an eStargz blob. Its table of
            contents is not looked at. Of a pipe only the part up to the tar's end counts.
        directory: where to; made when it is missing, with mode 0755. What it holds counts as a layer below the others.
        paths: apply only these entries, what is below them, and the directories above them.
        same_owner: set owners, make devices, set attributes that need root. Default: whether this process is root's.
            Otherwise the process owns everything, set-id bits stay only where that is the stated owner, and ``skipped``
            names what was left out.
        xattrs: set extended attributes.
        threads: 1..1024, None for the CPUs this process may use. Never changes the result.
        memory: bytes that parts of the layers under way may take, None for a default by threads and the cgroup's memory.
        max_size: most bytes of all files.
        max_entries: most entries of all layers, and parent directories that none of them states; None for any number.
        diff_ids: for each layer "sha256:..." that the whole inflated stream must have, a table of contents included;
            known only when the layer's files are there. Without it, only the stream's own checksums are checked.
        progress: is given the bytes of tar read so far, about ten times a second.

    Times, modes and raw names are the tar's; a parent directory that no layer states gets mode 0755 and time 0.
    Nothing outside the directory is touched: links on the way to an entry are followed as if it were "/".

    After a failure, or an interrupt, a directory made by the call is removed again; in one that was there, what is
    complete stays.

    Raises:
        UsageError: options that cannot be honoured; a path that no layer has.
        OSError, BlobError, SourceError: a layer cannot be read.
        TarError: malformed, or an entry that no tree can hold.
        VerificationError: another DiffID.
        SinkError: something cannot be written. All name the layer, the entry and its offset in the layer's tar.
    """
    sources = _sources(layers)
    wanted = _digests(sources, diff_ids)
    selection = _selection(paths)
    for name, value, most in (("threads", threads, MAX_THREADS), ("memory", memory, 1 << 50)):
        _check(name, value, 1, most)
    for name, value in (("max_size", max_size), ("max_entries", max_entries)):
        _check(name, value, 0, (1 << 63) - 1)
    count = threads or usable_threads()
    fewer, less = affordable(memory_room(), count, (16 + 8 * count) << 20, _THREAD_MEMORY, 0)
    threads, memory = threads or fewer, memory or less
    with _open_directory(directory) as (root, made), ExitStack() as undone:
        extractor = Extractor(
            root,
            ours=made,
            owners=os.geteuid() == 0 if same_owner is None else same_owner,
            xattrs=xattrs,
            uid=os.geteuid(),
            gid=os.getegid(),
            umask=_umask(),
            threads=threads,
            memory=memory,
            handles=_handles(),
            max_size=max_size,
            max_entries=max_entries,
            paths=selection,
            salt=os.urandom(8),
            progress=progress,
        )
        undone.callback(extractor.close)
        if made:
            undone.callback(extractor.clear)
        undone.callback(extractor.abandon)
        for source, diff_id in zip(sources, wanted, strict=True):
            _extract_layer(extractor, source, diff_id, threads)
        missing = extractor.missing_paths()
        if missing:
            raise UsageError(f"{os.fsdecode(missing[0])!r} is in none of the layers; estargz ls shows what is")
        extractor.finish()
        undone.pop_all()
        extractor.close()
        return Extracted(
            extractor.entries,
            extractor.files,
            extractor.size,
            extractor.whiteouts,
            tuple(_skipped(extractor)),
            extractor.skipped_count,
        )


def _sources(layers: Layer | list[Layer] | tuple[Layer, ...]) -> list[Layer]:
    if isinstance(layers, list | tuple):
        return list(layers)
    return [layers]


def _check(name: str, value: int | None, least: int, most: int) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most):
        raise UsageError(f"{name} must be a whole number from {least} to {most}, not {value!r}")


def _digests(sources: Sequence[Layer], diff_ids: Sequence[str] | None) -> Sequence[str | None]:
    if not sources:
        raise UsageError("there is no layer to extract")
    if diff_ids is None:
        return [None] * len(sources)
    if isinstance(diff_ids, str) or len(diff_ids) != len(sources):
        raise UsageError(f"one DiffID for each of the {len(sources)} layers, or none at all")
    for text in diff_ids:
        parse_digest(text, "DiffID")
    return diff_ids


def _selection(paths: Sequence[str | bytes] | None) -> list[bytes] | None:
    """The paths as entries' names are cleaned. None: everything."""
    if paths is None:
        return None
    if isinstance(paths, (str, bytes)):
        raise UsageError("paths is a sequence of paths, not one path")
    cleaned = [os.path.normpath(b"/" + os.fsencode(path)).lstrip(b"/") for path in paths]
    if not cleaned:
        raise UsageError("paths is empty; leave it out to extract everything")
    return None if b"" in cleaned else cleaned


def _umask() -> int:
    """The process's umask, which cannot be asked for without setting it but here; all bits where /proc is missing."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o777


def _handles() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _HANDLES_MOST if soft == resource.RLIM_INFINITY else max(16, min(_HANDLES_MOST, soft // 4))


# --------------------------------------------------------------------------------------------------------------------
# the directory


@contextmanager
def _open_directory(path: str | os.PathLike[str]) -> Iterator[tuple[int, bool]]:
    """A handle of the directory, and whether it was made now; such a one is removed after a failure, once empty."""
    made = not os.path.lexists(path)  # asked before: as soon as it is there, a signal may come
    try:
        if made:
            made = _make_directory(path)
        with open_folder(Path(path)) as handle:
            yield handle, made
    except BaseException:
        if made:
            with suppress(OSError):  # somebody else has put something in it
                os.rmdir(path)
        raise


def _make_directory(path: str | os.PathLike[str]) -> bool:
    """Whether nobody else has made it meanwhile."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return False
    os.chmod(path, 0o700)  # whatever the umask
    return True


def _skipped(extractor: Extractor) -> Iterator[tuple[str, str]]:
    for path, reasons in extractor.skipped_notes():
        for reason, key in reasons:
            yield os.fsdecode(path), _SKIPPED[reason].format(key=os.fsdecode(key))


# --------------------------------------------------------------------------------------------------------------------
# layers


class _Stream:
    """A layer's tar, and what follows it. own_names: it is an eStargz blob, whose own files are none of the tree's."""

    def __init__(self, name: str, inflated: InflateAhead, own_names: bool, hashed: bool) -> None:
        self.name = name
        self.own_names = own_names
        self._inflated = inflated
        self._digest = hashlib.sha256() if hashed else None

    def readinto(self, buffer: memoryview) -> int:
        with blob_errors():
            count = self._inflated.readinto(buffer)
        if self._digest is not None:
            self._digest.update(buffer[:count])
        return count

    def check(self, diff_id: str | None) -> None:
        """Raises VerificationError when all that was read has another digest."""
        found = None if self._digest is None else f"sha256:{self._digest.hexdigest()}"
        if found != diff_id:
            raise VerificationError(
                f"{self.name}: DiffID: expected {diff_id}, found {found}; the layer is not the one that the digest was "
                "made for, do not use what was extracted"
            )


def _extract_layer(extractor: Extractor, source: Layer, diff_id: str | None, threads: int) -> None:
    with ExitStack() as opened:
        stream = _open_layer(source, diff_id is not None, _inflating_threads(threads), opened)
        extractor.extract(stream.readinto, stream.name, stream.own_names)
        stream.check(diff_id)


def _inflating_threads(threads: int) -> int:
    """Threads that inflate beside as many that write files: each is about half of the work, and waits for the other."""
    return min(threads, 8)


def _open_layer(source: Layer, hashed: bool, threads: int, opened: ExitStack) -> _Stream:
    """The tar of a layer. What follows the tar of an eStargz blob is part of its DiffID, and read only for that."""
    pipe = _pipe(source, opened)
    if pipe is not None:
        return _piped(pipe, hashed, threads, opened)
    file = open_source(source)
    opened.callback(file.close)
    footer = footer_of(file)
    kind = detect(file.read_at(0, 4))
    _require_layer(kind, file.read_at(0, _PREFIX), file.name)
    # All of it, as who pulls it whole: a footer may say what it likes of where the tar ends.
    inflated = opened.enter_context(_inflated(file, file.size, kind, threads))
    return _Stream(file.name, inflated, footer is not None, hashed)


def _inflated(file: Source, end: int, kind: str, threads: int) -> InflateAhead:
    if file.kernel is None:
        return InflateAhead(Window(file, 0, end), kind, name=file.name, threads=threads)
    return InflateAhead(file.kernel, kind, end=end, name=file.name, threads=threads)


def _pipe(source: Layer, opened: ExitStack) -> Any:
    """The source as an object that is read from front to back, if nothing else can be done with it."""
    if isinstance(source, str) and is_url(source):
        return None
    if isinstance(source, (str, os.PathLike)):
        with naming(source):
            file = io.FileIO(source, "rb")
            opened.callback(quietly, file.close)
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return None
        file.name = os.fspath(source)
        return file
    if isinstance(source, (bytes, bytearray, memoryview, io.BytesIO, RangeReader)):
        return None
    if not callable(getattr(source, "read", None)):
        raise UsageError(f"a layer is a path, a file, bytes or a RangeReader, not {type(source).__name__}")
    try:
        regular = stat.S_ISREG(os.fstat(source.fileno()).st_mode)
    except (AttributeError, OSError):
        return source
    return None if regular else source


class _Rejoined:
    """A readable object with the bytes that were read from it to look at them put back in front."""

    def __init__(self, prefix: bytes, readable: Any) -> None:
        self._prefix = prefix
        self._readable = readable

    def read(self, size: int) -> bytes:
        if self._prefix:
            data, self._prefix = self._prefix[:size], self._prefix[size:]
            return data
        return _read(self._readable, size)


def _read(readable: Any, size: int) -> bytes:
    data = readable.read(size)
    if not isinstance(data, bytes):
        raise UsageError("a layer's read() waits and gives bytes; open it in binary and blocking mode")
    return data


def _piped(pipe: Any, hashed: bool, threads: int, opened: ExitStack) -> _Stream:
    """The end cannot be looked at first: in any gzip stream, the eStargz format's names are taken for its files."""
    name = str(getattr(pipe, "name", "input"))
    prefix = b""
    while len(prefix) < _PREFIX and (piece := _read(pipe, _PREFIX - len(prefix))):
        prefix += piece
    kind = detect(prefix)
    _require_layer(kind, prefix, name)
    inflated = opened.enter_context(InflateAhead(_Rejoined(prefix, pipe), kind, name=name, threads=threads))
    return _Stream(name, inflated, kind == "gzip", hashed)


def _require_layer(kind: str, prefix: bytes, name: str) -> None:
    if kind == "plain" and not begins_like_tar(prefix):
        raise BlobError(f"{name}: is neither a compressed layer nor a tar; check that it is the right file")
