"""What an image consists of: descriptors, manifests, indexes and configurations (OCI image-spec).

Documents are kept as they were read, so that keys which are not known here survive; what is typed are views of them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from estargz.errors import ImageError

__all__ = ["MAX_MANIFEST_SIZE", "Descriptor", "check_digest", "digest_of"]

MAX_MANIFEST_SIZE = 4 << 20
"""Bytes; what the distribution-spec asks registries to take, and no client needs more."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")


def digest_of(data: bytes) -> str:
    """``sha256:<64 hex digits>`` of some bytes."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def check_digest(text: object) -> str:
    """A digest that may become part of a path or URL. Raises ImageError for everything else."""
    if not isinstance(text, str) or not _DIGEST.fullmatch(text):
        raise ImageError(f"{str(text)[:200]!r} is no digest; it reads sha256: and 64 small hexadecimal digits")
    return text


@dataclass(frozen=True, slots=True)
class Descriptor:
    """Where content is named by a document: its type, digest and size (image-spec, descriptor.md)."""

    media_type: str
    digest: str
    """``sha256:<64 hex digits>`` or ``sha512:<128>``; checked."""
    size: int
    """Bytes, 0 or more."""
    annotations: Mapping[str, str] = field(default_factory=dict)
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The object as it was read, with keys such as platform, urls, data, artifactType; empty for one that is new."""

    def __post_init__(self) -> None:
        check_digest(self.digest)
        if not isinstance(self.size, int) or isinstance(self.size, bool) or self.size < 0:
            raise ImageError(f"{self.digest}: {self.size!r} is no size")

    def document(self) -> dict[str, Any]:
        """The descriptor as a document has it: keys that were read and are not known here are kept."""
        known = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        document = {**self.raw, **known, "annotations": dict(self.annotations)}
        if not self.annotations:
            del document["annotations"]
        return document
