"""Images with their layers in another compression: all platforms at once, from any store to any store.

source -> tree of indexes and manifests -> their layers, each once -> configurations, manifests, indexes anew -> target
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from estargz.errors import UsageError
from estargz.image.layers import LayerForm
from estargz.image.model import Descriptor, Platform
from estargz.image.moving import LayerMover
from estargz.image.progress import Report
from estargz.image.reference import Reference
from estargz.image.rewriting import ATTESTATIONS, RewrittenImage, TreeWriter
from estargz.image.store import open_source, open_target
from estargz.image.tree import images_of, read_tree
from estargz.options import DEFAULT_CHUNK_SIZE
from estargz.writing.pool import Pool

if TYPE_CHECKING:
    from estargz.image.variants import VariantStore
    from estargz.registry.client import Registries

__all__ = ["Converted", "convert"]


@dataclass(frozen=True, slots=True)
class Converted:
    """What a conversion has written."""

    descriptor: Descriptor
    """Of the manifest or index that the target now names."""
    images: Sequence[RewrittenImage]


def convert(
    source: str | Reference,
    dest: str | Reference,
    *,
    compression: str | None = None,
    level: int | None = None,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    min_chunk_size: int = 0,
    portable: bool = False,
    force: bool = False,
    base: str | Reference | None = None,
    platforms: Iterable[str | Platform] | None = None,
    attestations: str = "repoint",
    oci_types: bool | None = None,
    tags: Sequence[str] = (),
    cache: VariantStore | None = None,
    pool: Pool | None = None,
    registries: Registries | None = None,
    report: Report | None = None,
) -> Converted:
    """Copies an image, its layers recompressed.

    Args:
        source, dest: references as skopeo writes them (``estargz.image.reference``).
        compression: ``uncompressed``, ``gzip``, ``estargz`` or ``zstd`` for layers that are of another type; None copies
            them as they are. A layer that has the wanted type is kept, whatever made it. Uncompressing a converted layer gives
            the tar that the original was made of, to the byte.
        level, chunk_size, min_chunk_size, portable: as for ``estargz.build``.
        base: an image whose layers, as far as they are the lowest of ``source``'s, are kept as they are,
        force: unless this is set.
        platforms: those to take, as ``linux/arm64``; None for all. A single one gives its manifest alone, without an index.
        attestations: one of ATTESTATIONS. Their contents are never changed.
        oci_types: True turns Docker's media types into OCI's, False the other way round; None turns them into OCI's where
            eStargz or zstd is wanted. Docker's drop the annotations that verification of a table of contents needs, so eStargz
            layers and False are an error.
        tags: what the result is called in a registry besides, in the same repository.
        cache: finds finished layers, and keeps them; None: nothing is kept on this machine.
        pool: threads and memory for all layers; None: a new one, for this compression and level.
        registries: connections and credentials; None: new ones for this call.
        report: is told how far each layer is.

    Nothing is named in the target before all of it is there.

    Raises:
        UsageError: options that cannot be honoured, a platform that the image does not have.
        ImageError: the image is missing or malformed.
        SourceError, BlobError, VerificationError: a layer cannot be read, or is not what it is said to be.
        RegistryError, SinkError: something cannot be fetched or written.
    """
    form = LayerForm(compression, level, chunk_size, min_chunk_size, portable)
    if compression is None and level is not None:
        raise UsageError("a level is of a compression; give --compression with --level")
    family = _family(compression, oci_types)
    if attestations not in ATTESTATIONS:
        raise UsageError(f"attestations are to {attestations!r}: choose {', '.join(ATTESTATIONS)}")
    wanted = None if platforms is None else [Platform.parse(platform) for platform in platforms]
    with ExitStack() as opened:
        if registries is None:
            registries = opened.enter_context(_fresh_registries())
        origin = open_source(_reference(source), registries)
        opened.callback(origin.close)
        tree = read_tree(origin, wanted)
        to = _reference(dest)
        if tags and to.transport != "docker":
            raise UsageError(f"{to}: only images of a registry have further tags")
        if to.transport == "docker-archive" and len(images_of(tree)) != 1:
            raise UsageError(f"{to}: an archive of docker's has no index, and one platform's image; choose a platform")
        kept = [] if base is None or force else _layers_of_base(_reference(base), registries)
        target = open_target(to, registries)
        opened.callback(target.close)
        mover = LayerMover(target, form, pool=pool or form.pool(), cache=cache, report=report)
        writer = TreeWriter(origin, target, oci=family, attestations=attestations)
        root = writer.write(tree, mover, kept)
        if tags:
            target.put_manifest(root.descriptor.media_type, root.data, tags)
        target.finish(root.descriptor)
        return Converted(root.descriptor, writer.images)


def _reference(given: str | Reference) -> Reference:
    return given if isinstance(given, Reference) else Reference.parse(given)


def _fresh_registries() -> Registries:
    from estargz.registry.client import Registries

    return Registries()


def _family(compression: str | None, oci_types: bool | None) -> bool | None:
    """Whether media types become OCI's; None: they stay of their family."""
    if compression == "estargz" and oci_types is False:
        raise UsageError(
            "estargz needs OCI media types: Docker's lose the annotations of layers, by which the table of contents is "
            "verified; leave Docker's out"
        )
    return True if oci_types is None and compression in ("estargz", "zstd") else oci_types


# --------------------------------------------------------------------------------------------------------------------
# layers that stay


def _layers_of_base(base: Reference, registries: Registries) -> list[Sequence[str]]:
    """The digests of the layers of each of an image's platforms."""
    source = open_source(base, registries)
    try:
        tree = read_tree(source)
    finally:
        source.close()
    return [[layer.digest for layer in image.manifest.layers] for image in images_of(tree)]
