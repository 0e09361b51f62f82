"""Layers on their way into an image: copied as they are, recompressed, built, or taken from the cache of variants.

source blob | directory | tar -> (cache of variants) -> one pass of the builder -> upload of the target -> descriptor

The builder writes straight into the target's upload. An upload that is lost begins anew: from the cached blob where there is
a cache, else by building again, which gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from estargz.errors import ChangedError, EstargzError, UploadBrokenError, VerificationError
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
from estargz.image.progress import Report, Watch, WatchedReader
from estargz.image.store import BlobReader, BlobUpload, ImageTarget
from estargz.image.variants import VariantKey, VariantStore
from estargz.layer import TOC_DIGEST, Layer
from estargz.options import Options
from estargz.writing.building import build_from
from estargz.writing.pool import Pool
from estargz.writing.sink import DescriptorSink
from estargz.writing.source import TarSource

__all__ = ["LANES", "LayerMover"]

LANES = 8
"""Layers under way at once. Their computing is shared out by the pool, so more of them only wait better."""

MAX_RESTARTS = 30
"""How often a layer is built again whose upload was lost."""

_MAX_FRUITLESS = 4  # restarts in a row that got nowhere
_FRUITLESS_SIZE = 1 << 20
_PIECE = 1 << 20


class LayerMover:
    """Brings layers to a target, several at a time, the smallest first.

    form:   what those become that are new or not to be kept
    pool:   threads and memory that all of them share; uploads may keep half as much memory again
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
        self._room = pool.memory // 2 // LANES  # of an upload

    def move(self, layers: Sequence[StoredLayer | NewLayer]) -> list[MovedLayer]:
        """What became of each layer, in order; of equal ones, each is moved once.

        Raises what reading, building and writing raise, of several failures that of the first layer.
        """
        keys = [_identity(layer) for layer in layers]
        unique = dict(zip(reversed(keys), reversed(layers), strict=True))  # the first of equals
        ordered = {key: unique[key] for key in keys}
        jobs = [self._job(number, layer) for number, layer in enumerate(ordered.values())]
        moved = dict(zip(ordered, run(jobs, LANES, abandon=lambda: self._leave(layers)), strict=True))
        return [moved[key] for key in keys]

    def _leave(self, layers: Sequence[StoredLayer | NewLayer]) -> None:
        """Closes what is far away and may keep others waiting."""
        places: set[Any] = {self._target, *(layer.source for layer in layers if isinstance(layer, StoredLayer))}
        for place in places:
            if getattr(place, "remote", False):
                place.close()

    def _job(self, number: int, layer: StoredLayer | NewLayer) -> Job[MovedLayer]:
        size = layer.descriptor.size if isinstance(layer, StoredLayer) else layer.size_hint()

        def work(check: Callable[[], None]) -> MovedLayer:
            watch = Watch(number, _name(layer), check, self._report)
            if isinstance(layer, NewLayer):
                moved = self._new(layer, watch)
            else:
                moved = self._stored(layer, watch)
            watch.finish(moved)
            return moved

        return Job(size, work)

    # ----------------------------------------------------------------------------------------------------------------
    # layers that exist

    def _stored(self, layer: StoredLayer, watch: Watch) -> MovedLayer:
        media_type = layer.descriptor.media_type
        if layer.keep or not is_layer(media_type) or is_foreign_layer(media_type) or self._form.compression is None:
            return self._copied(layer, watch)
        kind = layer_kind(layer)
        if self._form.changes(kind):
            return self._converted(layer, kind, watch)
        return self._copied(layer, watch, kind.toc_digest)

    def _copied(self, layer: StoredLayer, watch: Watch, toc_digest: str | None = None) -> MovedLayer:
        descriptor = layer.descriptor
        watch.begin("copy", descriptor.size)
        known = {} if toc_digest is None else {TOC_DIGEST: toc_digest}
        moved = MovedLayer(
            replace(descriptor, annotations={**descriptor.annotations, **known}), layer.diff_id, "copied"
        )
        if descriptor.raw.get("urls") and is_foreign_layer(descriptor.media_type):
            return moved  # registries do not keep these
        if not self._target.link(descriptor, layer.source):
            self._target.put(descriptor, lambda: WatchedReader(layer.source.open(descriptor), watch))
        return moved

    def _converted(self, layer: StoredLayer, kind: LayerKind, watch: Watch) -> MovedLayer:
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
            tar = _known_tar(layer, kind, self._cache)
            key = None if tar is None else self._key(tar)
        made, reused = self._make(make, key, watch)
        if self._cache is not None and not reused:  # else nobody has seen what the blob really holds
            self._cache.note_source(layer.descriptor.digest, made.tar_digest)
        return MovedLayer(descriptor_of(made), made.diff_id, "reused" if reused else "converted", made)

    # ----------------------------------------------------------------------------------------------------------------
    # layers that are built

    def _new(self, layer: NewLayer, watch: Watch) -> MovedLayer:
        key = None
        if self._cache is not None and layer.repeatable:
            # Reading and hashing alone costs a third of compressing (bench/), and tells whether that is needed.
            watch.begin("hash", None)
            key = self._key(layer.tar_digest(**self._options(watch)), layer)
        watch.begin("build", None)

        def make(dest: Any) -> Layer:
            with layer.read_once(watch.check) as readable:
                made = readable.build(dest, **self._options(watch))
            if key is not None and made.tar_digest != key.tar_digest:
                raise ChangedError(f"{layer.name}: was changed while it was read; build from what nothing writes to")
            return made

        made, reused = self._make(make, key, watch, repeatable=layer.repeatable)
        return MovedLayer(descriptor_of(made), made.diff_id, "reused" if reused else "built", made)

    def _options(self, watch: Watch) -> dict[str, Any]:
        return {**self._form.options(), "pool": self._pool, "progress": watch.progress}

    def _key(self, tar_digest: str, layer: NewLayer | None = None) -> VariantKey:
        """``layer``: one whose tar is not all that decides its bytes: a member begins at a landmark that was put in."""
        more = {"prefetch": list(layer.prefetch)} if layer is not None and layer.prefetch else None
        return VariantKey.of(tar_digest, Options(**self._form.options()), more)

    # ----------------------------------------------------------------------------------------------------------------
    # from the builder to the target

    def _make(
        self, make: Callable[[Any], Layer], key: VariantKey | None, watch: Watch, *, repeatable: bool = True
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
                with self._target.upload(self._room) as upload:
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
                with self._target.upload(self._room) as upload:
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
    """Equal for layers of which the same is said, so that one is moved for all of them."""
    if isinstance(layer, NewLayer):
        return id(layer)
    said = tuple(sorted(layer.descriptor.annotations.items()))
    return layer.descriptor.digest, layer.descriptor.media_type, said, layer.diff_id, layer.keep


def _name(layer: StoredLayer | NewLayer) -> str:
    return layer.descriptor.digest if isinstance(layer, StoredLayer) else layer.name


def _stated_tar(layer: StoredLayer, kind: LayerKind) -> str | None:
    """The digest of a layer's tar as the image's configuration states it: its DiffID, unless that is of more than the tar."""
    return None if kind.compression == "estargz" else layer.diff_id


def _known_tar(layer: StoredLayer, kind: LayerKind, cache: VariantStore) -> str | None:
    """The digest of a layer's tar, if it was inflated once, or as it is stated; None where these two differ."""
    seen, stated = cache.tar_of(layer.descriptor.digest), _stated_tar(layer, kind)
    return seen or stated if stated in (None, seen) or seen is None else None


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
