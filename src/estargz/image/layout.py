"""oci:DIR, a directory with the OCI layout (image-spec, image-layout.md)."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from estargz.errors import ImageError, SinkError, SourceError, VerificationError
from estargz.image.model import MAX_MANIFEST_SIZE, OCI_INDEX, Descriptor, Index, digest_of, encode
from estargz.image.reference import Reference
from estargz.image.store import BlobReader, ImageSource, VerifyingReader, read_small
from estargz.writing.sink import PathSink

__all__ = ["IMAGE_NAME", "LAYOUT_FILE", "REF_NAME", "BlobFolder", "FolderUpload", "Layout", "copy_blob", "pick"]

LAYOUT_FILE = b'{"imageLayoutVersion":"1.0.0"}'
REF_NAME = "org.opencontainers.image.ref.name"
IMAGE_NAME = "io.containerd.image.name"  # where containerd and BuildKit keep the whole name

_PIECE = 1 << 20


class BlobFolder:
    """Blobs in a directory, each in blobs/ALGORITHM/HEX."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self.name = name

    def path(self, digest: str) -> Path:
        algorithm, _, encoded = digest.partition(":")
        return self.directory / "blobs" / algorithm / encoded

    def has(self, descriptor: Descriptor) -> bool:
        try:
            status = os.lstat(self.path(descriptor.digest))
        except FileNotFoundError:
            return False
        return stat.S_ISREG(status.st_mode) and status.st_size == descriptor.size

    def open_file(self, descriptor: Descriptor) -> io.FileIO:
        """The blob's file; no link is followed, since layouts come from strangers."""
        path = self.path(descriptor.digest)
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            raise ImageError(f"{self.name}: blob {descriptor.digest} is missing; copy the image again") from None
        except OSError as error:
            raise SourceError(f"{path}: cannot be opened: {error.strerror}; check its rights") from error
        file = io.FileIO(handle, "rb")
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_size != descriptor.size:
            file.close()
            raise VerificationError(
                f"{self.name}: blob {descriptor.digest} is no file of {descriptor.size} bytes; copy the image again"
            )
        return file

    def open(self, descriptor: Descriptor) -> BlobReader:
        return VerifyingReader(self.open_file(descriptor), descriptor, self.name)

    def read_at(self, descriptor: Descriptor, offset: int, size: int) -> bytes:
        with self.open_file(descriptor) as file:
            return os.pread(file.fileno(), size, offset)

    def upload(self) -> FolderUpload:
        return FolderUpload(self)

    def link(self, descriptor: Descriptor, source: object) -> bool:
        """Takes a blob from another such directory by a hard link, its bytes checked first."""
        if self.has(descriptor):
            return True
        if not isinstance(source, BlobFolder):
            return False
        with source.open(descriptor) as reader:
            while reader.read(_PIECE):
                pass
        target = self.path(descriptor.digest)
        make_folder(target.parent)
        try:
            os.link(source.path(descriptor.digest), target, follow_symlinks=False)
        except FileExistsError:
            return self.has(descriptor)
        except OSError as error:
            if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EACCES, errno.ENOTSUP):
                return False
            raise SinkError(f"{target}: cannot be linked: {error.strerror}; check the directory") from error
        return True

    def put(self, descriptor: Descriptor, open: Callable[[], BlobReader]) -> None:
        if not self.has(descriptor):
            copy_blob(descriptor, open, self.upload)

    def write(self, data: bytes) -> str:
        """Stores some bytes; returns their digest."""
        digest = digest_of(data)
        if not self.has(Descriptor("", digest, len(data))):
            with self.upload() as upload:
                upload.write(data)
                upload.commit(digest, len(data))
        return digest


def copy_blob(descriptor: Descriptor, open: Callable[[], BlobReader], upload: Callable[[], Any]) -> None:
    """From a reader, which checks it, to an upload."""
    with open() as reader, upload() as writer:
        while data := reader.read(_PIECE):
            writer.write(data)
        writer.commit(descriptor.digest, descriptor.size)


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SinkError(f"{folder}: cannot be made: {error.strerror}; check the path and its rights") from error


class FolderUpload:
    """A blob of a BlobFolder on its way: a file without a name until it is committed."""

    def __init__(self, folder: BlobFolder) -> None:
        self._folder = folder
        parent = folder.path("sha256:0").parent
        make_folder(parent)
        self._sink: PathSink | None = PathSink(parent / "upload")
        self._size = 0

    @property
    def target(self) -> int:
        """The descriptor, for kernels to write to without Python."""
        assert self._sink is not None
        return self._sink.fd

    def write(self, data: bytes, /) -> int:
        assert self._sink is not None
        self._size += len(data)
        return self._sink.write(data)

    def commit(self, digest: str, size: int) -> None:
        assert self._sink is not None
        if os.fstat(self._sink.fd).st_size != size:
            raise VerificationError(f"{self._folder.name}: blob {digest} was to have {size} bytes, and {self._size} came")
        if self._folder.has(Descriptor("", digest, size)):
            self.abort()
            return
        self._sink.path = self._folder.path(digest)
        sink, self._sink = self._sink, None
        sink.commit()

    def abort(self) -> None:
        if self._sink is not None:
            self._sink.discard()
            self._sink = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()


class Layout(BlobFolder):
    """ImageSource and ImageTarget of ``oci:DIR[:TAG]``. Several processes may add images at the same time."""

    remote = False

    def __init__(self, reference: Reference, names: Sequence[str] = ()) -> None:
        super().__init__(Path(reference.path), str(reference))
        self._reference = reference
        self._names = names

    @classmethod
    def open(cls, reference: Reference) -> Layout:  # type: ignore[override]
        """A layout that exists. Raises ImageError."""
        layout = _Opened(reference)
        text = layout._document("oci-layout")
        if text is None:
            raise ImageError(f"{reference.path} is no OCI layout: it has no file oci-layout; check the path")
        if not str(_object(text, f"{reference.path}/oci-layout").get("imageLayoutVersion", "")).startswith("1."):
            raise ImageError(f"{reference.path}: its OCI layout is not of version 1, which is all that is known here")
        return layout

    @classmethod
    def create(cls, reference: Reference, names: Sequence[str] = ()) -> Layout:
        """A layout that may exist already. Raises SinkError."""
        return _Opened(reference, names)

    def resolve(self) -> Descriptor:
        entries = self._index().manifests
        return pick(entries, self._reference, self.name)

    def read(self, descriptor: Descriptor) -> bytes:
        return read_small(BlobFolder.open(self, descriptor), descriptor)

    def put_manifest(self, media_type: str, data: bytes, tags: Sequence[str] = ()) -> Descriptor:
        return Descriptor(media_type, self.write(data), len(data))

    def finish(self, root: Descriptor) -> None:
        make_folder(self.directory)
        with self._locked():
            index = self._index()
            entries = named_entries(root, self._reference.tag, self._names)
            named = {entry["annotations"].get(REF_NAME) for entry in entries if "annotations" in entry}
            others = [
                entry.document()
                for entry in index.manifests
                if entry.annotations.get(REF_NAME) not in named
                and not (entry.digest == root.digest and REF_NAME not in entry.annotations)
            ]
            document = {**index.raw, "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [*others, *entries]}
            self._replace("index.json", encode(document))
            self._replace("oci-layout", LAYOUT_FILE)

    def close(self) -> None:
        pass

    def _index(self) -> Index:
        text = self._document("index.json")
        if text is None:
            return Index(OCI_INDEX, [], {}, None, {})
        return Index.parse(text, OCI_INDEX, f"{self.directory}/index.json")

    def _document(self, name: str) -> bytes | None:
        path = self.directory / name
        try:
            with path.open("rb") as file:
                text = file.read(MAX_MANIFEST_SIZE + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise SourceError(f"{path}: cannot be read: {error.strerror}; check its rights") from error
        return text

    def _replace(self, name: str, text: bytes) -> None:
        with PathSink(self.directory / name) as sink:
            sink.write(text)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        handle = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


class _Opened(Layout):
    """A Layout whose ``open`` is of blobs."""

    def open(self, descriptor: Descriptor) -> BlobReader:  # type: ignore[override]
        return BlobFolder.open(self, descriptor)
