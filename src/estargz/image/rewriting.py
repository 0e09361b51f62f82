"""The documents of an image written anew, after its layers have become others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from estargz.errors import UsageError
from estargz.image.layers import MovedLayer, StoredLayer
from estargz.image.model import Descriptor, Platform, encode, is_docker, same_in
from estargz.image.moving import LayerMover
from estargz.image.store import ImageSource, ImageTarget, put_bytes
from estargz.image.tree import (
    REFERENCE_DIGEST,
    Document,
    StoredArtifact,
    StoredImage,
    StoredIndex,
    bare,
    manifests_of,
)
from estargz.layer import TOC_DIGEST

__all__ = ["ATTESTATIONS", "RewrittenImage", "TreeWriter", "Written", "in_family"]

ATTESTATIONS = ("repoint", "keep", "drop")
"""What becomes of attestations and others that are about an image which changes: they follow it, they go on naming the
image as it was, or they are left out."""


@dataclass(frozen=True, slots=True)
class RewrittenImage:
    """One platform's image in its new form."""

    platform: Platform
    digest: str
    """Of the manifest."""
    layers: Sequence[MovedLayer]


@dataclass(frozen=True, slots=True)
class Written:
    """A document that the target has."""

    descriptor: Descriptor
    data: bytes


class TreeWriter:
    """Brings a tree of documents, and the blobs that they name, from a source to a target. It serves one tree.

    oci: True: media types become OCI's, False: Docker's, None: they stay of their family
    attestations: one of ATTESTATIONS
    """

    def __init__(
        self, source: ImageSource, target: ImageTarget, *, oci: bool | None = None, attestations: str = "repoint"
    ) -> None:
        self.images: list[RewrittenImage] = []
        """Of the tree, in the order in which they were written."""
        self._source = source
        self._target = target
        self._oci = oci
        self._attestations = attestations
        self._moved: dict[int, list[MovedLayer]] = {}  # by the id of the manifest's document
        self._successors: dict[str, Descriptor] = {}  # digest of a document -> what it became

    def write(self, tree: Document, mover: LayerMover, bases: Sequence[Sequence[str]] = ()) -> Written:
        """All blobs, then all documents; returns the root, which the target does not name yet.

        bases: digests of the layers of images; where they are the lowest of an image, they stay as they are.
        """
        documents = list(manifests_of(tree))
        blobs = [_blobs(self._source, document, bases) for document in documents]
        moved = iter(mover.move([blob for of_document in blobs for blob in of_document]))
        for document, of_document in zip(documents, blobs, strict=True):
            self._moved[id(document)] = [next(moved) for _ in of_document]
        root = self._document(tree)
        return Written(bare(root.descriptor), root.data)

    def _document(self, document: Document) -> Written:
        """One document, those that it leads to first."""
        if isinstance(document, StoredIndex):
            return self._index(document)
        if isinstance(document, StoredImage):
            return self._image(document)
        if isinstance(document, StoredArtifact):
            return self._artifact(document)
        return self._put(document, document.descriptor.media_type, document.data)

    def _put(self, document: Document, media_type: str, data: bytes) -> Written:
        stored = self._target.put_manifest(media_type, data)
        named = document.descriptor
        self._successors[named.digest] = named.leading_to(media_type, stored.digest, stored.size)
        return Written(self._successors[named.digest], data)

    def _type(self, media_type: str) -> str:
        return media_type if self._oci is None else same_in(media_type, docker=not self._oci)

    def _image(self, image: StoredImage) -> Written:
        manifest, config = image.manifest, image.config
        moved = self._moved[id(image)]
        media_type = self._type(manifest.media_type)
        docker = is_docker(media_type)
        moved = [replace(layer, descriptor=in_family(layer.descriptor, docker=docker)) for layer in moved]
        layers = [layer.descriptor for layer in moved]
        diff_ids = [layer.diff_id or stated for layer, stated in zip(moved, config.diff_ids, strict=True)]
        text = image.config_data
        if diff_ids != list(config.diff_ids):
            text = encode(replace(config, diff_ids=diff_ids).document(), indent=None)
        settings = put_bytes(self._target, manifest.config, self._type(manifest.config.media_type), text)
        data = image.data
        if (media_type, settings, layers) != (manifest.media_type, manifest.config, list(manifest.layers)):
            data = encode(replace(manifest, media_type=media_type, config=settings, layers=layers).document())
        written = self._put(image, media_type, data)
        self.images.append(RewrittenImage(image.platform, written.descriptor.digest, moved))
        return written

    def _artifact(self, artifact: StoredArtifact) -> Written:
        """Untouched, but for what it is about."""
        data, subject = artifact.data, artifact.manifest.subject
        if subject is not None and self._attestations == "repoint":
            about = self._successors.get(subject.digest, subject)
            if about.digest != subject.digest:
                data = encode(replace(artifact.manifest, subject=bare(about)).document())
        return self._put(artifact, artifact.manifest.media_type, data)

    def _index(self, document: StoredIndex) -> Written:
        index = document.index
        written: dict[int, Descriptor] = {}
        # Images first: what else there is may be about them.
        for number, child in sorted(enumerate(document.children), key=lambda pair: _may_be_about_others(pair[1])):
            if self._stays(child):
                written[number] = self._repointed(self._document(child).descriptor)
        manifests = [written[number] for number in sorted(written)]
        media_type = self._type(index.media_type)
        data = document.data
        if (media_type, manifests) != (index.media_type, list(index.manifests)):
            data = encode(replace(index, media_type=media_type, manifests=manifests).document())
        return self._put(document, media_type, data)

    def _stays(self, document: Document) -> bool:
        """Whether it is not left out, as what is about an image that has changed may be."""
        about = document.descriptor.annotations.get(REFERENCE_DIGEST)
        if about is None and isinstance(document, StoredArtifact) and document.manifest.subject is not None:
            about = document.manifest.subject.digest
        if self._attestations != "drop" or about is None or about not in self._successors:
            return True
        return self._successors[about].digest == about

    def _repointed(self, descriptor: Descriptor) -> Descriptor:
        about = self._successors.get(descriptor.annotations.get(REFERENCE_DIGEST, ""))
        if about is None or self._attestations != "repoint":
            return descriptor
        return replace(descriptor, annotations={**descriptor.annotations, REFERENCE_DIGEST: about.digest})


def _may_be_about_others(document: Document) -> bool:
    return not isinstance(document, StoredImage | StoredIndex)


def _blobs(source: ImageSource, document: StoredArtifact, bases: Sequence[Sequence[str]]) -> list[StoredLayer]:
    """An image's layers, or all that an artifact has."""
    manifest = document.manifest
    if not isinstance(document, StoredImage):
        return [StoredLayer(source, blob, keep=True) for blob in (*manifest.layers, manifest.config)]
    digests = [layer.digest for layer in manifest.layers]
    keep = max((len(base) for base in bases if digests[: len(base)] == list(base)), default=0)
    return document.layers(source, keep)


def in_family(descriptor: Descriptor, *, docker: bool) -> Descriptor:
    """A layer as a manifest of Docker's, or of OCI's, names it: Docker's know no annotations.

    Raises UsageError for an eStargz layer in Docker's, where nobody could verify its table of contents.
    """
    media_type = same_in(descriptor.media_type, docker=docker)
    if media_type == descriptor.media_type:
        return descriptor
    if docker and TOC_DIGEST in descriptor.annotations:
        raise UsageError(
            f"layer {descriptor.digest} is an eStargz layer, which Docker's media types have no annotations for; choose OCI's, "
            "or another compression for all layers"
        )
    return replace(descriptor, media_type=media_type, annotations={} if docker else descriptor.annotations)
