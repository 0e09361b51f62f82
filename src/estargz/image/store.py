"""Where images are kept: what a registry's repository, a layout, an archive and a directory have in common."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from estargz.descriptors import quietly
from estargz.errors import EstargzError, ImageError, SourceError, UsageError, VerificationError
from estargz.image.model import MAX_MANIFEST_SIZE, Descriptor, digest_of
from estargz.image.reference import Reference

if TYPE_CHECKING:
    from estargz.registry.client import Registries
    from estargz.registry.repository import Repository

__all__ = [
    "BlobReader",
    "BlobUpload",
    "ImageSource",
    "ImageTarget",
    "VerifyingReader",
    "open_source",
    "open_target",
    "put_bytes",
    "read_small",
]


class BlobReader(Protocol):
    """A blob from its first byte to its last. At the end ``read`` raises VerificationError, instead of giving b"", when the
    bytes do not have the descriptor's digest and size; it never gives more bytes than that size."""

    name: str  # for messages

    def read(self, size: int, /) -> bytes: ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class BlobUpload(Protocol):
    """A blob whose digest is known at its end. Nothing of it is to be seen until ``commit``, nor after ``abort``.

    As a context manager it aborts what was not committed. ``write`` and ``commit`` raise UploadBrokenError when the blob has
    to be written again from its first byte, to a new upload.
    """

    def write(self, data: bytes, /) -> int: ...

    def commit(self, digest: str, size: int) -> None:
        """Makes the blob be there. Raises VerificationError when the store finds another digest or size."""

    def abort(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class ImageSource(Protocol):
    """A place that an image is read from; its methods may be called from several threads."""

    name: str  # the reference, for messages: without credentials

    def resolve(self) -> Descriptor:
        """The manifest or index that the reference names. Raises ImageError when there is none."""

    def read(self, descriptor: Descriptor) -> bytes:
        """A manifest, index or configuration, checked against digest and size; at most MAX_MANIFEST_SIZE bytes."""

    def open(self, descriptor: Descriptor) -> BlobReader:
        """A layer."""

    def read_at(self, descriptor: Descriptor, offset: int, size: int) -> bytes:
        """Bytes of a layer, not checked: to look at a footer. Fewer only where the blob ends."""

    def close(self) -> None: ...


class ImageTarget(Protocol):
    """A place that an image is written to; its methods may be called from several threads."""

    name: str  # the reference, for messages
    remote: bool  # whether bytes take their time to get there

    def has(self, descriptor: Descriptor) -> bool:
        """Whether the blob or manifest is there."""

    def link(self, descriptor: Descriptor, source: object) -> bool:
        """Takes a blob over from ``source``, an ImageSource or a cache, without moving its bytes, where that can be done (a
        registry's mount, a hard link); False where it cannot."""

    def upload(self, room: int | None = None) -> BlobUpload:
        """A blob whose digest is not known yet. ``room``: bytes of it that may be kept in memory meanwhile, if a target
        keeps any; None: as many as it likes."""

    def put(self, descriptor: Descriptor, open: Callable[[], BlobReader]) -> None:
        """A blob that can be read again; does nothing when it is there. Tries again as often as is sensible."""

    def put_manifest(self, media_type: str, data: bytes, tags: Sequence[str] = ()) -> Descriptor:
        """Stores a manifest or index, whose blobs and children are there, byte for byte, and points the tags at it."""

    def finish(self, root: Descriptor) -> None:
        """Makes the image be what the target's reference names (the tag of the reference, the index of a layout, an
        archive's file, which appears with this). Without it nothing that was there before has changed."""

    def close(self) -> None:
        """Frees what was used; drops what ``finish`` has not made."""


class VerifyingReader:
    """A BlobReader over any object with ``read``, which it closes."""

    def __init__(self, readable: Any, descriptor: Descriptor, name: str) -> None:
        self.name = name
        self._readable = readable
        self._descriptor = descriptor
        self._left = descriptor.size
        self._checked = False
        try:
            self._hash = hashlib.new(descriptor.digest.partition(":")[0])
        except BaseException:
            self.close()
            raise

    def read(self, size: int, /) -> bytes:
        if self._left == 0:
            self._check_end()
            return b""
        data = self._read(min(size, self._left) if size >= 0 else self._left)
        if not data and size:
            raise self._error(f"ends after {self._descriptor.size - self._left} of {self._descriptor.size} bytes")
        self._hash.update(data)
        self._left -= len(data)
        return data

    def _read(self, size: int) -> bytes:
        try:
            data: bytes = self._readable.read(size)
        except OSError as error:
            if isinstance(error, EstargzError):
                raise
            raise SourceError(f"{self.name}: cannot be read: {error.strerror}; check what holds it") from error
        return data

    def _check_end(self) -> None:
        if self._checked:
            return
        if self._read(1):
            raise self._error(f"has more than the {self._descriptor.size} bytes that its descriptor states")
        found = f"{self._hash.name}:{self._hash.hexdigest()}"
        if found != self._descriptor.digest:
            raise self._error(f"has the digest {found}")
        self._checked = True

    def _error(self, what: str) -> VerificationError:
        return VerificationError(f"{self.name}: blob {self._descriptor.digest} {what}; it is damaged, fetch it again")

    def close(self) -> None:
        quietly(self._readable.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_small(reader: BlobReader, descriptor: Descriptor) -> bytes:
    """A whole manifest, index or configuration, checked. Raises ImageError for one that is larger than these are."""
    with reader:
        if descriptor.size > MAX_MANIFEST_SIZE:
            raise ImageError(
                f"{reader.name}: {descriptor.digest} has {descriptor.size} bytes, over the limit of {MAX_MANIFEST_SIZE}"
            )
        parts = []
        while part := reader.read(1 << 20):
            parts.append(part)
        return b"".join(parts)


def put_bytes(target: ImageTarget, named: Descriptor, media_type: str, data: bytes) -> Descriptor:
    """Stores a small blob; returns ``named`` for it, which is how a document named what it replaces."""
    descriptor = named.leading_to(media_type, digest_of(data), len(data))
    target.put(descriptor, lambda: VerifyingReader(io.BytesIO(data), descriptor, target.name))
    return descriptor


def open_source(reference: Reference, registries: Registries | None = None) -> ImageSource:
    """The place that a reference names, to read from. ``registries``: connections and credentials to use.

    Raises ImageError when nothing is there.
    """
    if reference.transport == "docker":
        return _repository(reference, registries)
    if reference.transport == "oci":
        from estargz.image.layout import open_layout

        return open_layout(reference)
    if reference.transport == "dir":
        from estargz.image.directory import open_directory

        return open_directory(reference)
    from estargz.image.archive import open_archive

    return open_archive(reference)


def open_target(
    reference: Reference,
    registries: Registries | None = None,
    *,
    names: Sequence[str] = (),
    descriptor: int | None = None,
) -> ImageTarget:
    """The place that a reference names, to write to. ``names``: what a layout or archive is to call the image besides its
    reference, as HOST/REPOSITORY:TAG. ``descriptor``: an archive is written to this one instead of its path.

    Raises UsageError for a place that cannot be written to, SinkError when that fails.
    """
    if reference.digest is not None:
        raise UsageError(f"{reference}: a digest follows from the content; name a tag to write to")
    if reference.transport == "docker":
        return _repository(reference, registries)
    if reference.transport == "oci":
        from estargz.image.layout import create_layout

        return create_layout(reference, names)
    if reference.transport == "dir":
        from estargz.image.directory import create_directory

        return create_directory(reference)
    from estargz.image.archive import ArchiveTarget

    return ArchiveTarget(reference, names, descriptor)


def _repository(reference: Reference, registries: Registries | None) -> Repository:
    if registries is not None:
        return registries.repository(reference)
    from estargz.registry.client import Registries as Fresh

    return Fresh().repository(reference, alone=True)
