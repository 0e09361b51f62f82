"""What a finished layer is: sizes, digests, and the OCI descriptor that carries them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["MEDIA_TYPES", "Layer"]

OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"

# compression type -> media type; eStargz is gzip to everybody who does not know better
MEDIA_TYPES = {
    "estargz": f"{OCI_LAYER}+gzip",
    "gzip": f"{OCI_LAYER}+gzip",
    "zstd": f"{OCI_LAYER}+zstd",
    "uncompressed": OCI_LAYER,
}

TOC_DIGEST = "containerd.io/snapshot/stargz/toc.digest"
UNCOMPRESSED_SIZE = "io.containers.estargz.uncompressed-size"
UNCOMPRESSED_DIGEST = "containerd.io/uncompressed"


@dataclass(frozen=True, slots=True)
class Layer:
    """A finished layer. Digests read ``sha256:<64 hex digits>``; sizes are bytes."""

    compression: str
    """``estargz``, ``gzip``, ``zstd`` or ``uncompressed``."""
    media_type: str
    digest: str
    """Of the blob as written."""
    size: int
    """Of the blob as written."""
    diff_id: str
    """Of the whole uncompressed stream, an eStargz layer's table of contents included."""
    tar_digest: str
    """Of the same stream without an eStargz layer's table of contents: the DiffID of the tar that ``estargz unpack`` gives
    back, whatever the compression."""
    uncompressed_size: int
    """Of the stream that ``diff_id`` covers."""
    toc_digest: str | None = None
    """Of the table of contents' JSON; only eStargz layers have one."""
    encoder: str | None = None
    """What compressed it, for a record of the build: as ``estargz.options.encoder`` names it."""
    prefetch_size: int | None = None
    """Bytes at the blob's start that a runtime fetches ahead: where the landmark behind prioritized entries lies."""
    missing: tuple[str, ...] = ()
    """What was to be prefetched and is not in the layer, as it was given; only where that was allowed."""
    stages: Mapping[str, float] = field(default_factory=dict, compare=False, repr=False)
    """Seconds of making it by stage, all threads together (docs/architecture.md): what a build's time went to."""

    @property
    def annotations(self) -> dict[str, str]:
        """The descriptor's annotations: what containerd, BuildKit and lazy-pulling snapshotters look for."""
        annotations = {UNCOMPRESSED_DIGEST: self.diff_id}
        if self.toc_digest is not None:
            annotations[TOC_DIGEST] = self.toc_digest
            annotations[UNCOMPRESSED_SIZE] = str(self.uncompressed_size)
        return annotations

    def descriptor(self) -> dict[str, Any]:
        """The OCI descriptor as a plain dict (image-spec, descriptor.md)."""
        return {
            "mediaType": self.media_type,
            "digest": self.digest,
            "size": self.size,
            "annotations": self.annotations,
        }
