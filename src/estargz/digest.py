"""SHA-256 digests in the form that container tools write them."""

from __future__ import annotations

import hashlib
import re

from estargz.errors import UsageError

__all__ = ["parse_digest", "sha256"]

_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")


def parse_digest(text: str, what: str = "digest") -> bytes:
    """The 32 bytes of "sha256:" and 64 lower-case hexadecimal digits. Raises UsageError for anything else."""
    match = _DIGEST.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise UsageError(f"{what} {text!r} is not sha256: followed by 64 lower-case hexadecimal digits")
    return bytes.fromhex(match[1])


def sha256(data: bytes) -> str:
    """The digest of ``data`` as text."""
    return "sha256:" + hashlib.sha256(data).hexdigest()
