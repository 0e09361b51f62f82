"""Layers on their way into an image: copied as they are, recompressed, built, or taken from the cache of variants.

source blob | directory | tar -> (cache of variants) -> one pass of the builder -> upload of the target -> descriptor

The builder writes straight into the target's upload. An upload that is lost begins anew: from the cached blob where there is
a cache, else by building again, which gives the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

from estargz.errors import EstargzError, UploadBrokenError, VerificationError
from estargz.image.lanes import Job, run
from estargz.image.layers import (
    LayerForm,
    LayerKind,
    MovedLayer,
    NewLayer,
    StoredLayer,
    descriptor_of,
    layer_kind,
)
from estargz.image.model import is_foreign_layer, is_layer
from estargz.image.store import BlobReader, BlobUpload, ImageTarget
from estargz.image.variants import VariantKey, VariantStore
from estargz.layer import TOC_DIGEST, Layer
from estargz.options import Options
from estargz.registry.upload import CHUNK_SIZE
from estargz.writing.building import build_from
from estargz.writing.pool import Pool
from estargz.writing.sink import DescriptorSink
from estargz.writing.source import TarSource

__all__ = ["LANES", "Event", "LayerMover", "Report", "share_memory"]

LANES = 8
"""Layers under way at once. Their computing is shared out by the pool, so more of them only wait better."""

MAX_RESTARTS = 30
"""How often a layer is built again whose upload was lost."""

_MAX_FRUITLESS = 4  # restarts in a row that got nowhere
_FRUITLESS_SIZE = 1 << 20
_PIECE = 1 << 20
_LEAST_CHUNK = 1 << 20  # of an upload; less makes more round trips than bytes
_EVENT_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Event:
    """How far a layer is. A layer's last event has ``finished`` set."""

    number: int
    """Of the layer, from 0; one that several images share is told of once."""
    name: str
    """The digest of a layer that exists, or the source of one that is built."""
    action: str
    """``copy``, ``convert`` or ``build``; a finished one may say ``reuse``."""
    done: int
    """Bytes so far: of the blob when it is copied, else of the tar."""
    total: int | None
    """Bytes in all, where that is known."""
    finished: bool = False


Report = Callable[[Event], object]
"""Is given events by several threads at once, at most ten a second and layer."""


def share_memory(threads: int | None = None, memory: int | None = None) -> tuple[Pool, int]:
    """A pool, and how many bytes of a layer a registry is to be sent at once, so that both together keep to a budget.

    threads: as of Pool; memory: bytes, None for a default by threads. Half of it is for layers in the making; the other half is
    what all lanes together may keep of their uploads, two chunks each. Raises UsageError.
    """
    whole = Pool(threads, memory)
    chunk_size = whole.memory // 2 // (2 * LANES)
    return Pool(whole.threads, max(whole.memory // 2, 1)), min(max(chunk_size, _LEAST_CHUNK), CHUNK_SIZE)


class LayerMover:
    """Brings layers to a target, several at a time, the smallest first.

    form:   what those become that are new or not to be kept
    pool:   threads and memory that all of them share
    cache:  where finished layers are looked for and kept; None: nothing is kept
    """

    def __init__(
        self,
        target: ImageTarget,
        form: LayerForm,
        *,
        pool: Pool,
        cache: VariantStore | None = None,
        report: Report | None = None,
    ) -> None:
        self._target = target
        self._form = form
        self._pool = pool
        self._cache = cache
        self._report = report

    def move(self, layers: Sequence[StoredLayer | NewLayer]) -> list[MovedLayer]:
        """What became of each layer, in order; of equal ones, each is moved once.

        Raises what reading, building and writing raise, of several failures that of the first layer.
        """
        keys = [_identity(layer) for layer in layers]
        unique = dict(zip(reversed(keys), reversed(layers), strict=True))  # the first of equals
        ordered = {key: unique[key] for key in keys}
        jobs = [self._job(number, layer) for number, layer in enumerate(ordered.values())]
        moved = dict(zip(ordered, run(jobs, LANES), strict=True))
        return [moved[key] for key in keys]

    def _job(self, number: int, layer: StoredLayer | NewLayer) -> Job[MovedLayer]:
        size = layer.descriptor.size if isinstance(layer, StoredLayer) else layer.size_hint()

        def work(check: Callable[[], None]) -> MovedLayer:
            watch = _Watch(number, _name(layer), check, self._report)
            if isinstance(layer, NewLayer):
                moved = self._new(layer, watch)
            else:
                moved = self._stored(layer, watch)
            watch.finish(moved)
            return moved

        return Job(size, work)

    # ----------------------------------------------------------------------------------------------------------------
    # layers that exist

    def _stored(self, layer: StoredLayer, watch: _Watch) -> MovedLayer:
        media_type = layer.descriptor.media_type
        if layer.keep or not is_layer(media_type) or is_foreign_layer(media_type) or self._form.compression is None:
            return self._copied(layer, watch)
        kind = layer_kind(layer)
        if self._form.changes(kind):
            return self._converted(layer, kind, watch)
        return self._copied(layer, watch, kind.toc_digest)

    def _copied(self, layer: StoredLayer, watch: _Watch, toc_digest: str | None = None) -> MovedLayer:
        descriptor = layer.descriptor
        watch.begin("copy", descriptor.size)
        known = {} if toc_digest is None else {TOC_DIGEST: toc_digest}
        moved = MovedLayer(
            replace(descriptor, annotations={**descriptor.annotations, **known}), layer.diff_id, "copied"
        )
        if descriptor.raw.get("urls") and is_foreign_layer(descriptor.media_type):
            return moved  # registries do not keep these
        if not self._target.link(descriptor, layer.source):
            self._target.put(descriptor, lambda: _WatchedReader(layer.source.open(descriptor), watch))
        return moved

    def _converted(self, layer: StoredLayer, kind: LayerKind, watch: _Watch) -> MovedLayer:
        watch.begin("convert", None)

        def make(dest: Any) -> Layer:
            with layer.source.open(layer.descriptor) as reader:
                options = Options(**self._options(watch))
                made = build_from(_tar_in(reader, layer, kind, self._pool), dest, options)
                while reader.read(_PIECE):  # the digest is checked at the end
                    pass
            _check_diff_id(layer, kind, made)
            return made

        key = None
        if self._cache is not None:
            # What a gzip layer with a table of contents was made from is known only when it was inflated once.
            tar = self._cache.tar_of(layer.descriptor.digest) or _stated_tar(layer, kind)
            key = None if tar is None else self._key(tar)
        made, reused = self._make(make, key, watch)
        if self._cache is not None:
            self._cache.note_source(layer.descriptor.digest, made.tar_digest)
        return MovedLayer(descriptor_of(made), made.diff_id, "reused" if reused else "converted", made)

    # ----------------------------------------------------------------------------------------------------------------
    # layers that are built

    def _new(self, layer: NewLayer, watch: _Watch) -> MovedLayer:
        watch.begin("build", None)

        def make(dest: Any) -> Layer:
            return layer.build(dest, **self._options(watch))

        key = None
        if self._cache is not None and layer.repeatable:
            # Reading and hashing alone costs a third of compressing (bench/), and tells whether that is needed.
            plain = layer.build(_Nowhere(), **{**self._options(watch), "compression": "uncompressed", "level": None})
            key = self._key(plain.tar_digest, layer)
        made, reused = self._make(make, key, watch, repeatable=layer.repeatable)
        return MovedLayer(descriptor_of(made), made.diff_id, "reused" if reused else "built", made)

    def _options(self, watch: _Watch) -> dict[str, Any]:
        return {**self._form.options(), "pool": self._pool, "progress": watch.progress}

    def _key(self, tar_digest: str, layer: NewLayer | None = None) -> VariantKey:
        """``layer``: one whose tar is not all that decides its bytes, but also the order of its entries and the landmark."""
        more = None
        if layer is not None and self._form.compression == "estargz" and (layer.is_tree or layer.prefetch):
            more = {"landmark": layer.landmark, "prefetch": list(layer.prefetch)}
        return VariantKey.of(tar_digest, Options(**self._form.options()), more)

    # ----------------------------------------------------------------------------------------------------------------
    # from the builder to the target

    def _make(
        self, make: Callable[[Any], Layer], key: VariantKey | None, watch: _Watch, *, repeatable: bool = True
    ) -> tuple[Layer, bool]:
        """The layer, which the target then has, and whether it was there already."""
        if self._cache is None:
            return self._upload(make, repeatable), False
        if key is None:
            return self._upload_and_keep(make, self._cache, None), False
        for last in (False, True):
            with self._cache.making(key, watch.check) as found:
                if found is None:
                    return self._upload_and_keep(make, self._cache, key), False
            try:
                self._put_cached(found, self._cache)
                return found, True
            except VerificationError:  # a damaged blob, which the cache has dropped
                if last:
                    raise
        raise AssertionError("unreachable")

    def _upload(self, make: Callable[[Any], Layer], repeatable: bool) -> Layer:
        fruitless = 0
        for restart in range(MAX_RESTARTS + 1):
            sent = 0
            try:
                with self._target.upload() as upload:
                    counted = _Counted(upload)
                    try:
                        layer = make(_destination(upload, counted))
                        upload.commit(layer.digest, layer.size)
                        return layer
                    finally:
                        sent = counted.size
            except UploadBrokenError as error:
                fruitless = fruitless + 1 if sent < _FRUITLESS_SIZE else 0
                if restart == MAX_RESTARTS or fruitless > _MAX_FRUITLESS:
                    raise
                if not repeatable:
                    raise UploadBrokenError(
                        f"{error}, and its source can be read once only; use a cache or a file"
                    ) from error
        raise AssertionError("unreachable")

    def _upload_and_keep(self, make: Callable[[Any], Layer], cache: VariantStore, key: VariantKey | None) -> Layer:
        with cache.upload() as kept:
            if self._target.remote:
                with self._target.upload() as upload:
                    both = _Both(kept, upload)
                    layer = make(both)
                    cache.add(key or self._key(layer.tar_digest), layer, kept)
                    both.commit(layer)
            else:
                layer = make(_destination(kept, kept))
                cache.add(key or self._key(layer.tar_digest), layer, kept)
        self._put_cached(layer, cache)
        return layer

    def _put_cached(self, layer: Layer, cache: VariantStore) -> None:
        descriptor = descriptor_of(layer)
        if not self._target.link(descriptor, cache):
            self._target.put(descriptor, lambda: cache.open(descriptor))


def _tar_in(reader: BlobReader, layer: StoredLayer, kind: LayerKind, pool: Pool) -> TarSource:
    """What a builder reads a layer's tar from: of an eStargz layer, what comes before its table of contents."""
    name = f"{reader.name}: {layer.descriptor.digest}"
    knows_end = kind.toc_offset is not None
    return TarSource(
        reader if kind.toc_offset is None else _Beginning(reader, kind.toc_offset),
        name,
        owned=False,
        priority=None,
        threads=pool.threads,
        crew=pool.crew,
        is_blob=kind.compression == "estargz" and not knows_end,
    )


class _Beginning:
    """The first bytes of a reader."""

    def __init__(self, reader: BlobReader, size: int) -> None:
        self._reader, self._left = reader, size

    def read(self, size: int, /) -> bytes:
        data = self._reader.read(min(size, self._left)) if self._left else b""
        self._left -= len(data)
        return data


def _identity(layer: StoredLayer | NewLayer) -> object:
    """Equal for layers that are moved once."""
    return (layer.descriptor.digest, layer.keep) if isinstance(layer, StoredLayer) else id(layer)


def _name(layer: StoredLayer | NewLayer) -> str:
    return layer.descriptor.digest if isinstance(layer, StoredLayer) else layer.name


def _stated_tar(layer: StoredLayer, kind: LayerKind) -> str | None:
    """The digest of a layer's tar as the image's configuration states it: its DiffID, unless that is of more than the tar."""
    return None if kind.compression == "estargz" else layer.diff_id


def _check_diff_id(layer: StoredLayer, kind: LayerKind, made: Layer) -> None:
    if _stated_tar(layer, kind) not in (None, made.tar_digest):
        raise VerificationError(
            f"{layer.source.name}: layer {layer.descriptor.digest} has the DiffID {made.tar_digest}, and its configuration "
            f"says {layer.diff_id}; the image is damaged, build it again"
        )


def _destination(upload: BlobUpload, otherwise: Any) -> Any:
    """What a builder writes to: an upload's descriptor, where it has one, without Python in between."""
    descriptor = getattr(upload, "target", None)
    return otherwise if descriptor is None else DescriptorSink(descriptor, "upload")


class _Nowhere:
    def write(self, data: bytes, /) -> int:
        return len(data)


class _Counted:
    """An upload, and how many bytes it took."""

    def __init__(self, upload: BlobUpload) -> None:
        self._upload = upload
        self.size = 0

    def write(self, data: bytes, /) -> int:
        written = self._upload.write(data)
        self.size += len(data)
        return written


class _Both:
    """Writes to the cache and to the target's upload; losing the latter is no loss, since the former is read again."""

    def __init__(self, kept: BlobUpload, upload: BlobUpload) -> None:
        self._kept = kept
        self._upload: BlobUpload | None = upload

    def write(self, data: bytes, /) -> int:
        self._sending(lambda upload: upload.write(data))
        return self._kept.write(data)

    def commit(self, layer: Layer) -> None:
        self._sending(lambda upload: upload.commit(layer.digest, layer.size))

    def _sending(self, step: Callable[[BlobUpload], object]) -> None:
        if self._upload is not None:
            try:
                step(self._upload)
            except (EstargzError, OSError):  # whatever it is, the cached blob's own way to the target tells it again
                self._upload.abort()
                self._upload = None


class _Watch:
    """Tells how far one layer is, and whether to go on."""

    def __init__(self, number: int, name: str, check: Callable[[], None], report: Report | None) -> None:
        self.check = check
        self._report = report
        self._event = Event(number, name, "copy", 0, None)
        self._due = 0.0

    def begin(self, action: str, total: int | None) -> None:
        self._event = replace(self._event, action=action, total=total)

    def progress(self, done: int) -> None:
        self.check()
        now = time.monotonic()
        if self._report is not None and now >= self._due:
            self._due = now + _EVENT_SECONDS
            self._event = replace(self._event, done=done)
            self._report(self._event)

    def finish(self, moved: MovedLayer) -> None:
        if self._report is None:
            return
        size = moved.layer.uncompressed_size if moved.layer is not None else moved.descriptor.size
        action = "reuse" if moved.action == "reused" else self._event.action
        self._report(replace(self._event, action=action, done=size, total=size, finished=True))


class _WatchedReader:
    """A BlobReader that tells how far it is."""

    def __init__(self, reader: BlobReader, watch: _Watch) -> None:
        self.name = reader.name
        self._reader = reader
        self._watch = watch
        self._done = 0

    def read(self, size: int, /) -> bytes:
        data = self._reader.read(size)
        self._done += len(data)
        self._watch.progress(self._done)
        return data

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
