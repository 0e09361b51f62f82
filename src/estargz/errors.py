"""Every exception the package raises, and the one table from a kernel's status to its exception.

EstargzError                the base; ``exit_code`` is what the command line returns for it
|-- UsageError              an option or argument that cannot be honoured (also a ValueError)
|-- SourceError             the input tree or tar cannot become a layer
|   |-- ChangedError        a file grew, shrank or was replaced while it was read
|   `-- TarError            a malformed or unsupported tar stream
|-- SinkError               the output could not be written (also an OSError)
|-- ImageError              a reference, manifest, index or configuration that is missing or malformed
|-- RegistryError           a registry that refuses or fails (also an OSError)
|-- UploadBrokenError       an upload that has to begin again from its first byte
|-- CacheError              a cache of layers that cannot be used, though they can be made without it
`-- BlobError               a blob that is not what it claims to be
    |-- RangeError          a server that does not give the asked bytes of a blob (also an OSError)
    `-- VerificationError   a digest, size or entry that does not match
"""

from __future__ import annotations

import os

__all__ = [
    "BlobError",
    "CacheError",
    "ChangedError",
    "EstargzError",
    "ImageError",
    "RangeError",
    "RegistryError",
    "SinkError",
    "SourceError",
    "TarError",
    "UploadBrokenError",
    "UsageError",
    "VerificationError",
]


class EstargzError(Exception):
    """Base of all errors of this package."""

    exit_code = 1


class UsageError(EstargzError, ValueError):
    """An option or argument that cannot be honoured."""

    exit_code = 2


class SourceError(EstargzError):
    """The source cannot become a layer; the message names the file or entry, the cause and the remedy."""


class ChangedError(SourceError):
    """A source file grew, shrank or was replaced while it was read."""


class TarError(SourceError):
    """A tar stream that is malformed, truncated, or holds what a layer cannot."""


class SinkError(EstargzError, OSError):
    """The output could not be written. ``errno`` is the system's."""


class ImageError(EstargzError):
    """An image that is not there, or whose reference, manifest, index or configuration is malformed."""


class RegistryError(EstargzError, OSError):
    """A registry that refuses or fails.

    method:  of the request that failed last
    url:     what was asked, without credentials and query
    status:  the status of its answer; None when there was none
    code:    the distribution-spec's error code, such as MANIFEST_UNKNOWN; "" when there was none
    """

    method: str = ""
    url: str = ""
    status: int | None = None
    code: str = ""


class UploadBrokenError(EstargzError):
    """An upload that was lost on the way: the blob has to be written to a new one, from its first byte."""


class CacheError(EstargzError):
    """A cache of layers that cannot be opened or written to. Whatever it was to be asked for can be made without it."""


class BlobError(EstargzError):
    """A blob whose footer, table of contents or members are malformed."""


class RangeError(BlobError, OSError):
    """A server that does not give the bytes of a blob that it is asked for.

    status:  the status of its answer; None when there was none
    url:     what was asked, without credentials and query
    """

    status: int | None = None
    url: str = ""


class VerificationError(BlobError):
    """A digest, a size or an entry that does not match what the blob or the caller claims."""


_NAME_SHOWN = 500  # characters, of names that may have a million

# status code (ext/estargz/status.h) -> (exception, message, remedy)
# {name} is the entry or path, {offset} the byte offset in the input, {at} the same in brackets if there is one,
# {cause} the system's text for errno.
_STATUS: dict[int, tuple[type[EstargzError], str, str]] = {
    -2: (EstargzError, "the build was cancelled", ""),
    -10: (SourceError, "{name}: cannot be opened: {cause}", "check that it exists and is readable"),
    -11: (SourceError, "{name}: cannot be read: {cause}", "check the file system that holds it"),
    -12: (SourceError, "{name}: cannot be examined: {cause}", "check that it exists and is readable"),
    -13: (SourceError, "{name}: cannot be listed: {cause}", "check that the directory exists and is readable"),
    -14: (SourceError, "{name}: its link target cannot be read: {cause}", "check the file system that holds it"),
    -15: (SourceError, "{name}: its extended attributes cannot be read: {cause}", "check the file system that holds it"),
    -16: (ChangedError, "{name}: grew while it was read", "build from a tree that nothing writes to"),
    -17: (ChangedError, "{name}: shrank while it was read (at byte {offset})", "build from a tree that nothing writes to"),
    -18: (ChangedError, "{name}: was changed or replaced while it was read", "build from a tree that nothing writes to"),
    -19: (
        SourceError,
        "{name}: is an overlayfs redirect, its content lies in another directory",
        "mount the overlay with redirect_dir=off, or build from the merged tree with --lower",
    ),
    -20: (SourceError, "{name}: its device number does not fit a tar header", "leave the device out of the tree"),
    -21: (SourceError, "{name}: name, link target and attributes exceed 1 MiB", "shorten the name or drop attributes"),
    -22: (SourceError, "{name}: is a name reserved by the eStargz format{at}", "rename it, or use --compression gzip"),
    -23: (
        SourceError,
        "{name}: the table of contents would go beyond 1 GiB, more than readers take",
        "make several layers, or use --compression gzip",
    ),
    -30: (TarError, "{name}: bad header checksum at byte {offset}", "the input is damaged or is no tar stream"),
    -31: (TarError, "{name}: bad number in the header at byte {offset}", "the input is damaged; make the tar again"),
    -32: (TarError, "{name}: sparse entry at byte {offset}", "make the tar without --sparse"),
    -33: (TarError, "{name}: entry type at byte {offset} cannot be part of a layer", "make the tar without such entries"),
    -34: (TarError, "{name}: malformed PAX record at byte {offset}", "the input is damaged; make the tar again"),
    -35: (TarError, "{name}: extended header over 1 MiB at byte {offset}", "shorten names or drop attributes"),
    -36: (TarError, "{name}: the tar stream ends too early, at byte {offset}", "the input is truncated; fetch it again"),
    -37: (TarError, "a single zero block followed by data, at byte {offset}", "the input is damaged; make the tar again"),
    -38: (TarError, "{name}: extended header without an entry, at byte {offset}", "the input is damaged; make the tar again"),
    -39: (
        TarError,
        "{name}: the tar stream ends inside the padding of its last file, at byte {offset}, so that a table of contents "
        "cannot follow",
        "make it a whole tar first, or use --compression gzip",
    ),
    -50: (SinkError, "{name}: cannot be written: {cause}", "free some space or check the destination"),
    -52: (EstargzError, "the compressor failed at byte {offset}", "this is a defect of estargz or its libraries"),
    -53: (EstargzError, "no further thread can be started: {cause}", "lower --threads, or raise the limit of processes"),
    -54: (
        EstargzError,
        "the build was begun by another process, whose threads are not here",
        "begin it after fork(), or leave it to the process that began it",
    ),
    -55: (
        UsageError,
        "the pool's memory is used up, and the thread that would wait for it has another layer unfinished",
        "give the pool more memory, or begin a layer when the one before is finished",
    ),
    -60: (SourceError, "{name}: bad gzip data at byte {offset}", "the input is damaged; fetch it again"),
    -61: (SourceError, "{name}: gzip checksum mismatch at byte {offset}", "the input is damaged; fetch it again"),
    -62: (SourceError, "{name}: the gzip stream ends too early, at byte {offset}", "the input is truncated; fetch it again"),
    -63: (SourceError, "{name}: bad zstd data at byte {offset}", "the input is damaged; fetch it again"),
    -64: (SourceError, "{name}: the zstd stream ends too early, at byte {offset}", "the input is truncated; fetch it again"),
    -65: (SourceError, "{name}: garbage after the compressed data, at byte {offset}", "the input is damaged; fetch it again"),
    -66: (BlobError, "{name}: inflates beyond the limit of {offset} bytes", "raise the limit if the blob is trusted"),
    -70: (SinkError, "{name}: cannot be created{at}: {cause}", "check the rights and the space of the directory"),
    -71: (SinkError, "{name}: cannot be written{at}: {cause}", "free some space or check the directory"),
    -72: (
        SinkError,
        "{name}: its owner, mode or time cannot be set{at}: {cause}",
        "extract as root, or without owners (--no-same-owner)",
    ),
    -73: (
        SinkError,
        "{name}: its extended attributes cannot be set{at}: {cause}",
        "choose a file system that keeps them, or leave them out (--no-xattrs)",
    ),
    -74: (SinkError, "{name}: what stands there cannot be removed{at}: {cause}", "check the rights of the directory"),
    -75: (
        SinkError,
        "{name}: the directory it belongs in cannot be reached{at}: {cause}",
        "the layers contradict each other or the directory; extract into an empty one",
    ),
    -76: (TarError, "{name}: stands for the root and is no directory{at}", "make the tar without it"),
    -77: (SinkError, "{name}: the hard link cannot be made{at}: {cause}", "the tar is damaged or the file system has none"),
    -78: (TarError, "{name}: the hard link's target is not there{at}: {cause}", "extract the layers below it first"),
    -79: (UsageError, "{name}: the hard link's target is not selected{at}", "select that path too"),
    -80: (TarError, "{name}: a whiteout of no file{at}", "the layer was made to do harm or by a faulty builder"),
    -81: (TarError, "{name}: no system has the owner it states{at}", "leave owners out (--no-same-owner)"),
    -82: (TarError, "{name}: no system has the device it states{at}", "make the tar without it"),
    -83: (SourceError, "{name}: goes beyond the size allowed{at}", "raise --max-size if the layer is trusted"),
    -84: (SourceError, "{name}: goes beyond the number of entries allowed{at}", "raise max_entries if the layer is trusted"),
    -85: (SourceError, "{name}: attributes of directories exceed 256 MiB{at}", "leave them out (--no-xattrs)"),
}  # fmt: skip


def brief(name: str) -> str:
    """A stranger's name as messages have it: of a long one its beginning and its end."""
    return name if len(name) <= _NAME_SHOWN else f"{name[: _NAME_SHOWN - 50]}...{name[-50:]}"


def from_status(code: int, errno: int = 0, name: str = "", offset: int = -1) -> BaseException:
    """The exception for a kernel's status; ``name`` is the entry or path, ``offset`` a byte offset or -1."""
    if code == -1:
        return MemoryError("estargz: out of memory; lower --threads or --memory")
    kind, text, remedy = _STATUS.get(code, (EstargzError, f"unknown status {code} for {{name}}", ""))
    cause = os.strerror(errno) if errno else "unknown cause"
    at = f" (at byte {offset})" if offset >= 0 else ""
    message = text.format(name=brief(name or "input"), offset=offset, cause=cause, at=at)
    if remedy:
        message += f"; {remedy}"
    error = kind(message)
    if errno and isinstance(error, OSError):
        error.errno = errno
    return error
