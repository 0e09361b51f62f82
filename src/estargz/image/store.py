"""Where images are kept: what a registry's repository, a layout, an archive and a directory have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol, Self

from estargz.image.model import Descriptor

__all__ = ["BlobReader", "BlobUpload", "ImageSource", "ImageTarget"]


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

    def has(self, descriptor: Descriptor) -> bool:
        """Whether the blob or manifest is there."""

    def link(self, descriptor: Descriptor, source: ImageSource) -> bool:
        """Takes a blob over from ``source`` without moving its bytes, where that can be done (a registry's mount, a hard
        link); False where it cannot."""

    def upload(self) -> BlobUpload:
        """A blob whose digest is not known yet."""

    def put(self, descriptor: Descriptor, open: Callable[[], BlobReader]) -> None:
        """A blob that can be read again; does nothing when it is there. Tries again as often as is sensible."""

    def put_manifest(self, media_type: str, data: bytes, tags: Sequence[str] = ()) -> Descriptor:
        """Stores a manifest or index, whose blobs and children are there, byte for byte, and points the tags at it."""

    def finish(self, root: Descriptor) -> None:
        """Makes the image be what the target's reference names (the tag of the reference, the index of a layout, an
        archive's file, which appears with this). Without it nothing that was there before has changed."""

    def close(self) -> None:
        """Frees what was used; drops what ``finish`` has not made."""
