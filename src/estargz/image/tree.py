"""What an image's root leads to: indexes, the manifests of its platforms, and what else is stored beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from estargz.errors import ImageError, UsageError
from estargz.image.layers import StoredLayer
from estargz.image.model import (
    MAX_MANIFESTS,
    Descriptor,
    ImageConfig,
    Index,
    Manifest,
    Platform,
    is_image_config,
    is_index,
    is_layer,
    is_manifest,
)
from estargz.image.store import ImageSource

__all__ = [
    "REFERENCE_DIGEST",
    "Document",
    "StoredArtifact",
    "StoredImage",
    "StoredIndex",
    "bare",
    "images_of",
    "manifests_of",
    "read_image",
    "read_tree",
]

REFERENCE_DIGEST = "vnd.docker.reference.digest"
"""Annotation of a BuildKit attestation in an index: the digest of the manifest that it is about."""

_MAX_DEPTH = 4  # indexes in indexes
_MAX_DOCUMENTS = 2 * MAX_MANIFESTS + 2  # of an index whose manifests are all images: a configuration belongs to each
_MAX_SIZE = 64 << 20  # bytes of all documents


@dataclass(frozen=True, slots=True)
class Document:
    """A manifest or index as it is stored; one of an unknown type is no more than this."""

    descriptor: Descriptor
    """As it is named, with what an index says of it."""
    data: bytes


@dataclass(frozen=True, slots=True)
class StoredArtifact(Document):
    """A manifest of anything: of an attestation, a signature, ..."""

    manifest: Manifest


@dataclass(frozen=True, slots=True)
class StoredImage(StoredArtifact):
    """A manifest of a container image."""

    config: ImageConfig
    config_data: bytes

    @property
    def platform(self) -> Platform:
        """What it is for: as an index says, else as it says itself."""
        return _stated(self.descriptor) or self.config.platform

    def layers(self, source: ImageSource, keep: int = 0) -> list[StoredLayer]:
        """Its layers in the source that it was read from, the lowest first; so many of them are to stay as they are."""
        pairs = zip(self.manifest.layers, self.config.diff_ids, strict=True)
        return [StoredLayer(source, layer, diff_id, number < keep) for number, (layer, diff_id) in enumerate(pairs)]


@dataclass(frozen=True, slots=True)
class StoredIndex(Document):
    """A list of manifests, and those of them that were read."""

    index: Index
    children: Sequence[Document]


def manifests_of(tree: Document) -> Iterator[StoredArtifact]:
    """All that have blobs, in order."""
    if isinstance(tree, StoredArtifact):
        yield tree
    elif isinstance(tree, StoredIndex):
        for child in tree.children:
            yield from manifests_of(child)


def images_of(tree: Document) -> list[StoredImage]:
    """The container images, in order."""
    return [document for document in manifests_of(tree) if isinstance(document, StoredImage)]


def read_tree(source: ImageSource, wanted: Sequence[Platform] | None = None) -> Document:
    """The documents that a source's reference leads to.

    wanted: take the images for these platforms only, and what is attested about them; others need not even be there. A
    single platform's only image comes without the index around it.

    Raises UsageError for a platform that there is no image for, ImageError for malformed documents, and what the source
    raises.
    """
    tree = _read(_Documents(source), source.resolve(), wanted, 0)
    for platform in wanted or ():
        if not any(_is_for(image.platform, [platform]) for image in images_of(tree)):
            there = ", ".join(sorted(_platforms(tree))) or "none"
            raise UsageError(f"{source.name}: has no image for {platform}; there are {there}")
    images = images_of(tree)
    if wanted is not None and len(wanted) == len(images) == 1:
        return images[0]
    return tree


def read_image(source: ImageSource, platform: Platform | None = None) -> StoredImage:
    """The image for a platform; None: the only one there is, else that for this machine. Raises as ``read_tree``."""
    tree = read_tree(source, None if platform is None else [platform])
    images = images_of(tree)
    if len(images) != 1 and platform is None:
        images = images_of(read_tree(source, [Platform.host()]))
    if not images:
        raise ImageError(f"{source.name}: is no container image")
    return images[0]


class _Documents:
    """Those of one tree, which are bounded in all: an index may name another one again and again, which does the same."""

    def __init__(self, source: ImageSource) -> None:
        self.name = source.name
        self._source = source
        self._count = self._size = 0

    def read(self, descriptor: Descriptor) -> bytes:
        self._count += 1
        self._size += descriptor.size
        if self._count > _MAX_DOCUMENTS or self._size > _MAX_SIZE:
            raise ImageError(
                f"{self.name}: has over {_MAX_DOCUMENTS} documents, or {_MAX_SIZE} bytes of them; choose a platform"
            )
        return self._source.read(descriptor)


def _read(source: _Documents, descriptor: Descriptor, wanted: Sequence[Platform] | None, depth: int) -> Document:
    if depth > _MAX_DEPTH:
        raise ImageError(f"{source.name}: indexes lie in indexes, more than {_MAX_DEPTH} deep; the image is malformed")
    what = f"{source.name}: {descriptor.digest}"
    data = source.read(descriptor)
    if is_index(descriptor.media_type):
        index = Index.parse(data, descriptor.media_type, what)
        chosen = [child for child in index.manifests if _is_for(_stated(child), wanted)]
        children = [_read(source, child, wanted, depth + 1) for child in chosen]
        return StoredIndex(descriptor, data, index, _only(children, wanted))
    if not is_manifest(descriptor.media_type):
        return Document(descriptor, data)
    manifest = Manifest.parse(data, descriptor.media_type, what)
    if descriptor.is_attestation or not _is_image(manifest):
        return StoredArtifact(descriptor, data, manifest)
    config_data = source.read(manifest.config)
    config = ImageConfig.parse(config_data, f"{what}: configuration")
    if len(config.diff_ids) != len(manifest.layers):
        raise ImageError(
            f"{what}: {len(manifest.layers)} layers, and {len(config.diff_ids)} DiffIDs in its configuration; "
            "the image is malformed, build it again"
        )
    return StoredImage(descriptor, data, manifest, config, config_data)


def _only(children: Sequence[Document], wanted: Sequence[Platform] | None) -> Sequence[Document]:
    """Without images for other platforms (of which the index said nothing), empty indexes, and attestations of neither."""
    if wanted is None:
        return children
    kept = [child for child in children if _is_wanted(child, wanted)]
    digests = {child.descriptor.digest for child in kept}
    return [one for one in kept if one.descriptor.annotations.get(REFERENCE_DIGEST, one.descriptor.digest) in digests]


def _is_wanted(document: Document, wanted: Sequence[Platform]) -> bool:
    if isinstance(document, StoredIndex):
        return bool(document.children)
    return not isinstance(document, StoredImage) or _is_for(document.platform, wanted)


def _is_image(manifest: Manifest) -> bool:
    """Whether it has a file system. Attestations state an image's configuration, and no layers."""
    layers = manifest.layers
    return is_image_config(manifest.config.media_type) and (
        not layers or any(is_layer(one.media_type) for one in layers)
    )


def _stated(descriptor: Descriptor) -> Platform | None:
    platform = descriptor.platform
    return None if platform is None or platform.os == "unknown" else platform


def _is_for(platform: Platform | None, wanted: Sequence[Platform] | None) -> bool:
    return wanted is None or platform is None or any(one.matches(platform) for one in wanted)


def _platforms(tree: Document) -> set[str]:
    """Of all images that the indexes name, also those that were not taken."""
    found = {str(image.platform) for image in images_of(tree)}
    if isinstance(tree, StoredIndex):
        found |= {str(platform) for child in tree.index.manifests if (platform := _stated(child)) is not None}
        found = found.union(*(_platforms(child) for child in tree.children))
    return found


def bare(descriptor: Descriptor) -> Descriptor:
    """Without what a document says of it besides."""
    return Descriptor(descriptor.media_type, descriptor.digest, descriptor.size)
