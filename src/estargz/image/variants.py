"""The cache of layers in other compressions: a directory with the OCI layout, and an index of which blob holds which tar.

What is asked for is a variant of a tar: the tar's digest, and all else that shapes the blob's bytes (VariantKey). By that a
finished variant is found again, whatever image it belongs to.

    DIR/oci-layout, DIR/index.json    so that oci:DIR:NAME is a place for images too
    DIR/blobs/sha256/HEX              finished blobs, of variants and of such images
    DIR/index.sqlite                  variants, what blobs hold, and who uses which blob now
    DIR/locks/                        held by flock, so they end with their process, however that ends

One may die at any step: a blob is leased, then gets its name, then its row, and what has no row is swept some day. Rows are
believed no further than blobs are: a blob that is gone or was changed takes its rows with it.
"""

from __future__ import annotations

import io
import json
import os
import re
import sqlite3
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

import estargz
from estargz.descriptors import reading
from estargz.errors import CacheError, ImageError, SinkError, UploadBrokenError, VerificationError
from estargz.image.layout import LAYOUT_FILE, BlobFolder, Layout
from estargz.image.model import (
    MAX_MANIFEST_SIZE,
    OCI_INDEX,
    Descriptor,
    Index,
    Manifest,
    check_digest,
    digest_of,
    encode,
    is_index,
    is_manifest,
)
from estargz.image.reference import Reference
from estargz.image.store import BlobReader, BlobUpload, VerifyingReader
from estargz.image.variant_index import VariantIndex, locked_folder
from estargz.layer import Layer
from estargz.options import Options, resolve_level
from estargz.writing.sink import PathSink

__all__ = ["Removed", "Source", "Usage", "VariantKey", "VariantStore", "default_cache"]

GRACE = 24 * 3600.0
"""Seconds before a blob that nothing names is taken for left over: an image may be on its way into the layout."""

_HEX = re.compile(r"[0-9a-f]{64}|[0-9a-f]{128}")
_TEMPORARY = re.compile(r"\.estargz-[0-9a-f]+\.tmp")  # estargz.writing.sink


def default_cache() -> Path:
    """$ESTARGZ_CACHE, else $XDG_CACHE_HOME/estargz, else ~/.cache/estargz."""
    if chosen := os.environ.get("ESTARGZ_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME", "")
    # Relative paths are invalid there (XDG base directory specification).
    return (Path(base) if base.startswith("/") else Path("~/.cache").expanduser()) / "estargz"


@dataclass(frozen=True, slots=True)
class VariantKey:
    """What decides a blob's bytes. Two that are equal are served by the same blob."""

    tar_digest: str
    """Of the tar that is compressed, without any table of contents."""
    compression: str
    level: int
    chunk_size: int
    min_chunk_size: int
    encoder: str
    """Who compresses, with versions: another one gives other bytes."""
    extra: str
    """Digest of further options, ``""`` for none."""

    @classmethod
    def of(cls, tar_digest: str, options: Options, extra: Mapping[str, Any] | None = None) -> Self:
        """``extra``: what else shapes the bytes, such as a list of paths to prefetch; anything that JSON can hold.

        Options that the compression does not look at count as 0. Raises ImageError when ``tar_digest`` is none.
        """
        chunked = options.compression == "estargz"
        level = resolve_level(options.compression, options.level, portable=options.portable)
        return cls(
            check_digest(tar_digest),
            options.compression,
            0 if options.compression == "uncompressed" else level,
            options.chunk_size if chunked else 0,
            options.min_chunk_size if chunked else 0,
            f"estargz-{estargz.__version__} {options.encoder}",
            digest_of(json.dumps(extra, sort_keys=True).encode()) if extra else "",
        )

    @property
    def text(self) -> str:
        """The same for the same key, and for no other."""
        return json.dumps(astuple(self))


@dataclass(frozen=True, slots=True)
class Source:
    """What a blob holds, wherever the blob is."""

    tar_digest: str
    """Of the tar, without a table of contents."""
    compression: str | None = None
    """``estargz``, ``gzip``, ``zstd`` or ``uncompressed``; None where nobody has looked."""
    diff_id: str | None = None
    """Of all that the blob inflates to."""


@dataclass(frozen=True, slots=True)
class Usage:
    """A variant in the cache."""

    digest: str
    size: int
    """Bytes of the blob."""
    compression: str
    level: int
    tar_digest: str
    created: float
    """Seconds since 1970."""
    last_used: float
    in_use: bool
    """By a process that runs now."""
    in_image: bool
    """Part of an image that the cache's index.json names."""


@dataclass(frozen=True, slots=True)
class Removed:
    """What ``prune`` removed."""

    name: str
    """A blob's digest, or a temporary file's name."""
    freed: int
    """Bytes: 0 when something else links to the same file."""
    variant: bool
    """False for what was left over."""


class VariantStore(BlobFolder):
    """A cache of variants. Several processes may use it, and several threads one object; no object survives a fork.

    What ``find`` and ``add`` have named stays there until ``close``: nobody prunes it.

    Args:
        directory: made when missing, for nobody but its owner; None: ``default_cache()``.
        patience: seconds to wait for the index while other processes write to it.
        clock, sleep: as in the time module.

    Raises:
        CacheError: the directory or its index cannot be used; from methods, too.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        *,
        patience: float = 30.0,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        place = default_cache() if directory is None else Path(directory)
        super().__init__(place, f"cache {place}")
        self._clock = clock
        with _said(place):
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            with locked_folder(place):  # one process makes what is missing
                self._make_layout()
                self._index = VariantIndex(place, patience=patience, sleep=sleep)

    def _make_layout(self) -> None:
        """What makes an empty directory a layout. Raises CacheError for one that holds something else."""
        if not (self.directory / "oci-layout").exists():
            if not all(_TEMPORARY.fullmatch(name) for name in os.listdir(self.directory)):
                raise CacheError(
                    f"{self.directory}: is neither empty nor a cache; choose another directory (--cache, ESTARGZ_CACHE)"
                )
            with PathSink(self.directory / "oci-layout") as sink:
                sink.write(LAYOUT_FILE)
        elif not self._is_mine():
            raise CacheError(
                f"{self.directory}: is no cache, but an image layout, whose blobs would be pruned as left over; choose another "
                "directory (--cache, ESTARGZ_CACHE)"
            )
        if not (self.directory / "index.json").exists():
            with PathSink(self.directory / "index.json") as sink:
                sink.write(encode({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}))
        (self.directory / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)

    def _is_mine(self) -> bool:
        """Whether a layout became a cache, or holds nothing yet. One whose index was removed still has its locks."""
        if (self.directory / "locks").exists() or (self.directory / "index.sqlite").exists():
            return True
        return not any(path.is_file() for path in self.directory.glob("blobs/*/*"))

    # ------------------------------------------------------------------------------------------------------ variants

    def find(self, key: VariantKey) -> Layer | None:
        """The variant, if it is there."""
        with self._index.transaction() as database:
            row = database.execute("SELECT layer FROM variants WHERE key = ?", (key.text,)).fetchone()
            if row is None:
                return None
            layer = _decoded(row[0])
            if layer is None or not self.has(_descriptor(layer)):
                database.execute("DELETE FROM variants WHERE key = ?", (key.text,))
                return None
            self._index.lease(database, layer.digest)
            database.execute("UPDATE variants SET used = ? WHERE key = ?", (self._clock(), key.text))
            return layer

    @contextmanager
    def making(self, key: VariantKey, check: Callable[[], object] = lambda: None) -> Iterator[Layer | None]:
        """The variant; or None for one caller at a time, who is to make and ``add`` it while the others wait for that.

        ``check`` is called now and then while waiting, and may raise to give up.
        """
        with ExitStack() as held:
            layer = self.find(key)
            if layer is None:
                held.enter_context(self._index.alone(digest_of(key.text.encode()).partition(":")[2], check))
                layer = self.find(key)
                if layer is not None:
                    held.close()
            yield layer

    def add(self, key: VariantKey, layer: Layer, upload: BlobUpload) -> None:
        """Enters a finished layer that was written to an ``upload()`` of this store.

        Raises VerificationError when its size is another, UploadBrokenError when somebody removed the blob meanwhile,
        SinkError when the directory cannot take it.
        """
        check_digest(layer.tar_digest)
        with self._index.transaction() as database:
            self._index.lease(database, layer.digest)  # nobody prunes what is to be there in a moment
        upload.commit(layer.digest, layer.size)
        now = self._clock()
        with self._index.transaction() as database:
            if not self.has(_descriptor(layer)):
                raise UploadBrokenError(f"{self.name}: blob {layer.digest} was removed meanwhile; make it again")
            row = (key.text, key.tar_digest, layer.digest, layer.size, _encoded(layer), now, now)
            database.execute("INSERT OR REPLACE INTO variants VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            self._note(database, layer.digest, Source(layer.tar_digest, layer.compression, layer.diff_id))

    def open(self, blob: Descriptor | Layer) -> BlobReader:
        """A blob of the cache, checked while it is read.

        Raises VerificationError for one that is damaged or gone, also when that shows later. It is dropped with its rows,
        so that it is made anew next time.
        """
        descriptor = blob if isinstance(blob, Descriptor) else _descriptor(blob)
        try:
            file = self.open_file(descriptor)
        except (ImageError, VerificationError) as error:
            raise self._dropped(descriptor, None) from error
        return _DroppingReader(self, file, descriptor)

    def _dropped(self, descriptor: Descriptor, file: io.FileIO | None) -> VerificationError:
        """Drops a damaged blob, unless somebody has made it anew since ``file`` was opened; the error that says so."""
        path = self.path(descriptor.digest)
        with _said(self.directory), self._index.transaction() as database, suppress(FileNotFoundError):
            renewed = self.has(descriptor) and not (file and os.path.samestat(os.lstat(path), os.fstat(file.fileno())))
            if not renewed:
                database.execute("DELETE FROM variants WHERE digest = ?", (descriptor.digest,))
                _remove(path)
        return VerificationError(
            f"{self.name}: blob {descriptor.digest} is damaged or gone, and was dropped; run again to make it anew"
        )

    # ------------------------------------------------------------------------------------------------------- sources

    def source(self, digest: str) -> Source | None:
        """What the blob of this digest holds, as far as that is known."""
        with self._index.transaction() as database:
            query = "SELECT tar_digest, compression, diff_id FROM sources WHERE digest = ?"
            row = database.execute(query, (digest,)).fetchone()
        try:
            return None if row is None else Source(check_digest(row[0]), row[1], row[2] and check_digest(row[2]))
        except ImageError:
            return None

    def tar_of(self, digest: str) -> str | None:
        """The digest of the tar that the blob of a digest holds, as far as that is known."""
        source = self.source(digest)
        return None if source is None else source.tar_digest

    def note_source(
        self, digest: str, tar_digest: str, *, compression: str | None = None, diff_id: str | None = None
    ) -> None:
        """Remembers what a blob holds, whose bytes were checked against its digest. What is None stays as it is known.

        Raises ImageError for what is no digest.
        """
        for checked in (digest, tar_digest, diff_id or digest):
            check_digest(checked)
        with self._index.transaction() as database:
            self._note(database, digest, Source(tar_digest, compression, diff_id))

    def _note(self, database: sqlite3.Connection, digest: str, source: Source) -> None:
        database.execute(
            "INSERT INTO sources VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET tar_digest = excluded.tar_digest, "
            "compression = coalesce(excluded.compression, compression), diff_id = coalesce(excluded.diff_id, diff_id), "
            "noted = excluded.noted",
            (digest, *astuple(source), self._clock()),
        )

    # ---------------------------------------------------------------------------------------------------------- room

    def usage(self) -> list[Usage]:
        """The variants, the last used first. Raises ImageError when an image of the directory is malformed."""
        imaged = self._digests_of_images()
        with _said(self.directory), self._index.transaction() as database:
            leased = self._index.leased(database)
            query = "SELECT key, digest, size, created, used FROM variants ORDER BY used DESC, key"
            rows = database.execute(query).fetchall()
        found = []
        for text, digest, size, created, used in rows:
            with suppress(ValueError, TypeError):  # a key of another time is asked for by nobody, and pruned some day
                key = VariantKey(*json.loads(text))
                flags = (digest in leased, digest in imaged)
                found.append(Usage(digest, size, key.compression, key.level, key.tar_digest, created, used, *flags))
        return found

    def prune(
        self, *, keep_storage: int | None = None, older_than: float | None = None, grace: float = GRACE
    ) -> list[Removed]:
        """Removes variants: those not used for ``older_than`` seconds, then the longest unused, until all together have at
        most ``keep_storage`` bytes; with neither, none. What a running process uses and what belongs to an image of the
        directory stays. What is left over of interrupted work goes when it is older than ``grace`` seconds.

        Raises ImageError when an image is malformed, so that nobody knows what belongs to it.
        """
        now = self._clock()
        oldest = None if older_than is None else now - older_than
        with _said(self.directory), locked_folder(self.directory):  # no image is finished meanwhile
            kept = self._digests_of_images()
            with self._index.transaction() as database:
                kept |= self._index.leased(database)
                removed = self._prune_variants(database, kept, keep_storage, oldest)
                kept |= {digest for (digest,) in database.execute("SELECT digest FROM variants")}
                removed += self._sweep(kept, now - grace)
                database.execute(
                    "DELETE FROM sources WHERE noted < ? AND digest NOT IN (SELECT digest FROM variants) "
                    "AND tar_digest NOT IN (SELECT tar_digest FROM variants)",
                    (now - grace,),
                )
        return removed

    def _prune_variants(
        self, database: sqlite3.Connection, kept: set[str], keep_storage: int | None, oldest: float | None
    ) -> list[Removed]:
        query = "SELECT digest, max(size), max(used) FROM variants GROUP BY digest ORDER BY max(used), digest"
        blobs = database.execute(query).fetchall()
        total = sum(size for _, size, _ in blobs)
        removed = []
        for digest, size, used in blobs:
            unwanted = (oldest is not None and used < oldest) or (keep_storage is not None and total > keep_storage)
            if unwanted and digest not in kept:
                database.execute("DELETE FROM variants WHERE digest = ?", (digest,))
                total -= size
                with suppress(ImageError):  # a forged row is no path to anything
                    removed.append(Removed(digest, _remove(self.path(check_digest(digest))), True))
        return removed

    def _sweep(self, known: set[str], before: float) -> list[Removed]:
        """Removes the files that nothing knows, written before a time."""
        removed = []
        for name, path in self._files():
            status = os.lstat(path)
            if name not in known and status.st_mtime < before and not stat.S_ISDIR(status.st_mode):
                removed.append(Removed(name, _remove(path), False))
        return removed

    def _files(self) -> Iterator[tuple[str, Path]]:
        """Blobs, by their digests, and temporary files, by their names."""
        for folder in (self.directory, *(self.directory / "blobs").iterdir()):
            for path in folder.iterdir() if folder.is_dir() else ():
                if _TEMPORARY.fullmatch(path.name):
                    yield path.name, path
                elif folder != self.directory and _HEX.fullmatch(path.name):
                    yield f"{folder.name}:{path.name}", path

    def _digests_of_images(self) -> set[str]:
        """Of everything that index.json leads to."""
        path = self.directory / "index.json"
        with _said(self.directory), reading(path) as file:
            index = Index.parse(file.read(MAX_MANIFEST_SIZE + 1), OCI_INDEX, str(path))
        found: set[str] = set()
        layout = Layout(Reference("oci", path=os.fspath(self.directory)))
        waiting = list(index.manifests)
        while waiting:
            descriptor = waiting.pop()
            if descriptor.digest not in found:
                found.add(descriptor.digest)
                waiting += self._led_to(descriptor, layout)
        return found

    def _led_to(self, descriptor: Descriptor, layout: Layout) -> Iterable[Descriptor]:
        kind = descriptor.media_type
        if not (is_index(kind) or is_manifest(kind)) or not layout.has(descriptor):
            return ()  # of an image for many platforms, those that nobody wanted are missing
        data = layout.read(descriptor)
        what = f"{self.name}: {descriptor.digest}"
        if is_index(kind):
            return Index.parse(data, kind, what).manifests
        manifest = Manifest.parse(data, kind, what)
        return (manifest.config, *manifest.layers)

    def close(self) -> None:
        """Ends the use of what was found and added."""
        self._index.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _DroppingReader(VerifyingReader):
    """Drops a blob that turns out to be damaged."""

    def __init__(self, store: VariantStore, file: io.FileIO, descriptor: Descriptor) -> None:
        super().__init__(file, descriptor, store.name)
        self._drop: Callable[[], VerificationError] = lambda: store._dropped(descriptor, file)

    def read(self, size: int, /) -> bytes:
        try:
            return super().read(size)
        except VerificationError as error:
            raise self._drop() from error


def _descriptor(layer: Layer) -> Descriptor:
    return Descriptor(layer.media_type, layer.digest, layer.size, layer.annotations)


def _encoded(layer: Layer) -> str:
    return json.dumps(asdict(replace(layer, stages={})))  # names that are no UTF-8 pass, too


def _decoded(text: str) -> Layer | None:
    """None for a row that was forged, or written when layers were described otherwise."""
    try:
        layer = msgspec.convert(json.loads(text), Layer)
        for digest in (layer.digest, layer.diff_id, layer.tar_digest, layer.toc_digest or layer.digest):
            check_digest(digest)
        _descriptor(layer)
        return layer
    except (ValueError, msgspec.MsgspecError, ImageError):
        return None


def _remove(path: Path) -> int:
    """Removes a file that may be gone; returns the bytes that are free now."""
    with suppress(FileNotFoundError):
        status = os.lstat(path)
        path.unlink()
        return status.st_size if status.st_nlink == 1 else 0
    return 0


@contextmanager
def _said(directory: Path) -> Iterator[None]:
    """An error of the system becomes one that says what to do."""
    try:
        yield
    except OSError as error:
        cause = error if isinstance(error, SinkError) else f"{error.filename}: {error.strerror}"
        raise CacheError(
            f"{directory}: cannot be used as a cache: {cause}; check its rights, or choose another directory "
            "(--cache, ESTARGZ_CACHE)"
        ) from error
