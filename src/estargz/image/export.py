"""An image written where an output line says: registries, the local store, a layout, an archive, or its files alone."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from estargz.errors import ImageError, UsageError
from estargz.image.layers import LayerForm, MovedLayer, NewLayer, StoredLayer
from estargz.image.model import (
    DOCKER_CONFIG,
    DOCKER_MANIFEST,
    OCI_CONFIG,
    OCI_MANIFEST,
    Descriptor,
    ImageConfig,
    encode,
    is_foreign_layer,
)
from estargz.image.moving import LayerMover
from estargz.image.output import Output
from estargz.image.progress import Report
from estargz.image.reference import Reference
from estargz.image.rewriting import TreeWriter, in_family
from estargz.image.store import ImageTarget, open_source, open_target, put_bytes
from estargz.image.tree import read_tree
from estargz.image.variants import VariantStore, default_cache
from estargz.reading.extracting import extract
from estargz.writing.building import build
from estargz.writing.pool import Pool
from estargz.writing.sink import DescriptorSink, Destination

if TYPE_CHECKING:
    from estargz.image.image import Image

__all__ = ["Exported", "export"]


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export has written."""

    descriptor: Descriptor | None
    """Of the manifest; None where only files were written (type=local, type=tar)."""
    names: Sequence[str]
    """References that lead to it now; empty where it has no name."""
    layers: Sequence[MovedLayer]
    missing: Sequence[str] = ()
    """What was to be prefetched and is in no layer, where that was allowed."""


def export(
    image: Image,
    output: Output,
    *,
    portable: bool = False,
    cache: VariantStore | None = None,
    pool: Pool | None = None,
    report: Report | None = None,
) -> Exported:
    """See ``estargz.image.image.Image.export``."""
    if output.insecure:
        image.registries.allow_insecure(Reference.parse(f"docker://{name}").host for name in output.names)
    if any(one.of.startswith("index") for one in output.annotations):
        raise UsageError("an image for one platform has no index to annotate; leave annotation-index out")
    form = LayerForm.of(output, portable=portable)
    work = _Work(image, output, form, cache, pool or form.pool(), report)
    if output.type == "local":
        return work.files(output.dest or ".")
    if output.type == "tar":
        return work.tar(output.dest or _standard_output())
    return work.images()


def _standard_output() -> DescriptorSink:
    if sys.stdout is None or os.isatty(sys.stdout.fileno()):
        raise UsageError("an image is not written to a terminal; redirect standard output, or give dest=FILE")
    return DescriptorSink(sys.stdout.fileno(), "standard output")


@dataclass(frozen=True, slots=True)
class _Work:
    image: Image
    output: Output
    form: LayerForm
    cache: VariantStore | None
    pool: Pool
    report: Report | None

    # ----------------------------------------------------------------------------------------------------------------
    # images

    def images(self) -> Exported:
        """To the first place from the layers, to the others from there."""
        with ExitStack() as opened:
            places = [(opened.enter_context(_closing(place.target)), place) for place in self._places()]
            (first, place), *others = places
            docker = not self.output.oci_mediatypes
            moved = [
                replace(layer, descriptor=in_family(layer.descriptor, docker=docker))
                for layer in self._mover(first, self.form).move(self._layers())
            ]
            root, data = self._documents(first, moved)
            self._name(first, place, root, data)
            for target, place in others:
                self._name(target, place, *self._copy(place, target, places[0][1], root))
        names = [name for _, place in places for name in place.names(root)]
        return Exported(root, names, moved, _missing(moved))

    def _places(self) -> Iterator[_Place]:
        output = self.output
        if output.type != "image":
            yield self._file()
            return
        if not (output.push or output.store):
            raise UsageError("type=image with store=false needs push=true, or else nothing is kept of it")
        if output.push:
            yield from self._repositories()
        if output.store:
            yield from self._local_names()

    def _repositories(self) -> Iterator[_Place]:
        """One for each repository: its further tags cost a request each."""
        by_repository: dict[tuple[str, str], list[Reference]] = {}
        for name in self.output.names:
            reference = Reference.parse(f"docker://{name}")
            by_repository.setdefault((reference.host, reference.repository), []).append(reference)
        for references in by_repository.values():
            target = open_target(references[0], self.image.registries)
            tags = [] if self.output.push_by_digest else [str(reference.tag) for reference in references]
            yield _Place(target, references[0], tags)

    def _local_names(self) -> Iterator[_Place]:
        directory = self.cache.directory if self.cache is not None else default_cache()
        if not self.output.names:
            raise UsageError(
                "type=image keeps the image on this machine by its name; give name=, or type=oci,dest=FILE"
            )
        with VariantStore(directory):  # makes it
            for name in self.output.names:
                reference = replace(Reference.parse(f"oci:{directory}"), tag=name)
                yield _Place(open_target(reference), reference)

    def _file(self) -> _Place:
        output = self.output
        transport = "oci" if not output.tar else "oci-archive" if output.type == "oci" else "docker-archive"
        reference = Reference(transport, path=output.dest or _STDOUT)
        stdout = None if output.dest is not None else _standard_output().target
        target = open_target(reference, names=output.names, descriptor=stdout)
        return _Place(target, reference)

    def _name(self, target: ImageTarget, place: _Place, root: Descriptor, data: bytes) -> None:
        if place.tags is None:
            target.finish(root)
        elif place.tags:
            target.put_manifest(root.media_type, data, place.tags)

    def _copy(self, place: _Place, target: ImageTarget, origin: _Place, root: Descriptor) -> tuple[Descriptor, bytes]:
        named = replace(origin.reference, digest=root.digest)
        with _closing(open_source(named, self.image.registries)) as source:
            mover = self._mover(target, LayerForm())
            written = TreeWriter(source, target).write(read_tree(source), mover)
            return replace(root, digest=written.descriptor.digest), written.data

    # ----------------------------------------------------------------------------------------------------------------
    # layers

    def _mover(self, target: ImageTarget, form: LayerForm) -> LayerMover:
        return LayerMover(target, form, pool=self.pool, cache=self.cache, report=self.report)

    def _layers(self) -> list[StoredLayer | NewLayer]:
        epoch, rewrite = self.output.source_date_epoch, self.output.rewrite_timestamp
        added = [replace(layer, epoch=epoch, rewrite_timestamp=rewrite) for layer in self.image.added]
        return [*(replace(layer, keep=not self.output.force_compression) for layer in self.image.base), *added]

    # ----------------------------------------------------------------------------------------------------------------
    # documents

    def _documents(self, target: ImageTarget, moved: Sequence[MovedLayer]) -> tuple[Descriptor, bytes]:
        """The configuration and the manifest, stored; the manifest's descriptor and text."""
        docker = not self.output.oci_mediatypes
        config_type, manifest_type = (DOCKER_CONFIG, DOCKER_MANIFEST) if docker else (OCI_CONFIG, OCI_MANIFEST)
        text = encode(self._config(moved).document(), indent=None)
        config = put_bytes(target, Descriptor(config_type, _ANY_DIGEST, 0), config_type, text)
        manifest: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": manifest_type,
            "config": config.document(),
            "layers": [layer.descriptor.document() for layer in moved],
        }
        if annotations := self._annotations("manifest"):
            manifest["annotations"] = annotations
        data = encode(manifest)
        root = target.put_manifest(manifest_type, data)
        return replace(root, annotations=self._annotations("manifest-descriptor")), data

    def _config(self, moved: Sequence[MovedLayer]) -> ImageConfig:
        settings = self.image.settings
        created = _time(self.output.source_date_epoch)
        old = len(settings.history) - len(self.image.added)
        history = [
            step if number < old else {"created": created, **step} for number, step in enumerate(settings.history)
        ]
        diff_ids = [str(layer.diff_id) for layer in moved]
        raw = {**settings.raw, "created": created}
        return replace(settings, diff_ids=diff_ids, history=history, raw=raw)

    def _annotations(self, of: str) -> dict[str, str]:
        """What the output line wants said of this image's manifest, or of the descriptor that leads to it."""
        mine = self.image.settings.platform
        return {
            one.key: one.value
            for one in self.output.annotations
            if one.of == of and (one.platform is None or one.platform.matches(mine))
        }

    # ----------------------------------------------------------------------------------------------------------------
    # files

    def files(self, directory: str) -> Exported:
        """The layers applied to a directory."""
        with self._unpacked() as (moved, blobs):
            extract(blobs, directory)
            return Exported(None, [], moved, _missing(moved))

    def tar(self, dest: Destination) -> Exported:
        """The layers applied, as one tar."""
        with self._unpacked() as (moved, blobs), _scratch() as directory:
            extract(blobs, directory)
            build(directory, dest, compression="uncompressed", pool=self.pool)
            return Exported(None, [], moved, _missing(moved))

    @contextmanager
    def _unpacked(self) -> Iterator[tuple[list[MovedLayer], tuple[str, ...]]]:
        """The layers as files that are gone afterwards; new ones are not compressed."""
        with _scratch() as directory, _closing(open_target(Reference("oci", path=directory))) as target:
            form = LayerForm("uncompressed")
            layers = [_for_files(layer) for layer in self._layers()]
            moved = LayerMover(target, form, pool=self.pool, report=self.report).move(layers)
            yield moved, tuple(_path_of_blob(directory, layer.descriptor) for layer in moved)


@dataclass(frozen=True, slots=True)
class _Place:
    target: ImageTarget
    reference: Reference
    tags: Sequence[str] | None = None
    """Of a registry; empty: by digest only. None where the target knows the name."""

    def names(self, root: Descriptor) -> list[str]:
        """References to what was written."""
        if self.tags is None:
            return [] if self.reference.path == _STDOUT else [str(self.reference)]
        if not self.tags:
            return [str(replace(self.reference, tag=None, digest=root.digest))]
        return [str(replace(self.reference, tag=tag)) for tag in self.tags]


_STDOUT = "-"
_ANY_DIGEST = "sha256:" + 64 * "0"


def _for_files(layer: StoredLayer | NewLayer) -> StoredLayer | NewLayer:
    """A layer of which the files alone are wanted: their order in it does not matter."""
    if isinstance(layer, NewLayer):
        return replace(layer, prefetch=())
    if is_foreign_layer(layer.descriptor.media_type):
        raise ImageError(
            f"{layer.source.name}: layer {layer.descriptor.digest} is kept elsewhere; copy the image with it"
        )
    return replace(layer, keep=True)


def _missing(moved: Sequence[MovedLayer]) -> list[str]:
    return [path for layer in moved if layer.layer is not None for path in layer.layer.missing]


def _time(epoch: int | None) -> str:
    """RFC 3339. Without a time that was given it is 1970: a clock's would make each build another image."""
    return datetime.fromtimestamp(epoch or 0, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _path_of_blob(directory: str, descriptor: Descriptor) -> str:
    return os.path.join(directory, "blobs", *descriptor.digest.split(":"))


@contextmanager
def _scratch() -> Iterator[str]:
    """A directory in $TMPDIR that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="estargz-") as directory:
        yield directory


@contextmanager
def _closing(place: Any) -> Iterator[Any]:
    try:
        yield place
    finally:
        place.close()
