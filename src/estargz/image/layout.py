"""oci:DIR, a directory with the OCI layout (image-spec, image-layout.md); and directories that hold blobs in general."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from estargz.descriptors import naming, quietly, read_all_at, reading, sync_folder
from estargz.errors import ImageError, SinkError, SourceError, VerificationError
from estargz.image.model import (
    MAX_MANIFEST_SIZE,
    OCI_INDEX,
    Descriptor,
    Index,
    decode,
    digest_of,
    encode,
    guess_media_type,
)
from estargz.image.reference import Reference
from estargz.image.store import BlobReader, VerifyingReader, read_small
from estargz.writing.sink import PathSink

__all__ = [
    "IMAGE_NAME",
    "LAYOUT_FILE",
    "REF_NAME",
    "BlobFolder",
    "FolderUpload",
    "Layout",
    "copy_blob",
    "create_layout",
    "make_folder",
    "named_entries",
    "open_layout",
    "pick",
    "read_document",
    "replace_document",
]

LAYOUT_FILE = b'{"imageLayoutVersion":"1.0.0"}'
REF_NAME = "org.opencontainers.image.ref.name"
IMAGE_NAME = "io.containerd.image.name"  # where containerd and BuildKit keep the whole name

_PIECE = 1 << 20


class BlobFolder:
    """Blobs in a directory, each in blobs/ALGORITHM/HEX. They appear whole and durable, or not at all."""

    follows_links = False
    """Whether a link may stand for a blob."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self.name = name

    def path(self, digest: str) -> Path:
        """Where a blob lies; ``digest`` was checked."""
        algorithm, _, encoded = digest.partition(":")
        return self.directory / "blobs" / algorithm / encoded

    def has(self, descriptor: Descriptor) -> bool:
        """Whether there is a file of that digest and size; what it holds is checked when it is read."""
        try:
            status = os.stat(self.path(descriptor.digest), follow_symlinks=self.follows_links)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise SourceError(f"{self.name}: cannot be examined: {error.strerror}; check its rights") from error
        return stat.S_ISREG(status.st_mode) and status.st_size == descriptor.size

    def open_file(self, descriptor: Descriptor) -> io.FileIO:
        """The blob's file, whose bytes are to be checked before they are believed."""
        path = self.path(descriptor.digest)
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if self.follows_links else os.O_NOFOLLOW)
        try:
            handle = os.open(path, flags)
        except (FileNotFoundError, NotADirectoryError):
            raise ImageError(f"{self.name}: blob {descriptor.digest} is missing; copy the image again") from None
        except OSError as error:
            raise SourceError(f"{path}: cannot be opened: {error.strerror}; check its rights") from error
        try:
            with naming(path):
                status = os.fstat(handle)
                if stat.S_ISREG(status.st_mode) and status.st_size == descriptor.size:
                    return io.FileIO(handle, "rb")
        except OSError:
            quietly(os.close, handle)
            raise
        quietly(os.close, handle)
        raise VerificationError(
            f"{self.name}: blob {descriptor.digest} is no file of {descriptor.size} bytes; copy the image again"
        )

    def open(self, descriptor: Descriptor) -> BlobReader:
        """The blob from its start, checked as it is read."""
        return VerifyingReader(self.open_file(descriptor), descriptor, self.name)

    def read_at(self, descriptor: Descriptor, offset: int, size: int) -> bytes:
        """Some bytes, not checked."""
        with self.open_file(descriptor) as file:
            return read_all_at(file.fileno(), offset, size)

    def upload(self, room: int | None = None) -> FolderUpload:
        """A blob whose digest is not known yet. Whatever the room, none of it is kept in memory."""
        return FolderUpload(self)

    def link(self, descriptor: Descriptor, source: object) -> bool:
        """Takes a blob from another such directory by a hard link, its bytes checked first; False where that cannot be."""
        if self.has(descriptor):
            return True
        if not isinstance(source, BlobFolder) or not source.has(descriptor):
            return False
        with source.open(descriptor) as reader:
            while reader.read(_PIECE):
                pass
        target = self.path(descriptor.digest)
        make_folder(target.parent)
        try:
            os.link(os.path.realpath(source.path(descriptor.digest)), target, follow_symlinks=False)
            sync_folder(target.parent)
        except FileExistsError:
            return self.has(descriptor)
        except OSError as error:
            if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EACCES, errno.ENOTSUP):
                return False
            raise SinkError(f"{target}: cannot be linked: {error.strerror}; check the directory") from error
        return True

    def put(self, descriptor: Descriptor, open: Callable[[], BlobReader]) -> None:
        """A blob that can be read again; nothing is read when it is there."""
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
    """Makes a directory and those above it, where they are not there. Raises SinkError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SinkError(f"{folder}: cannot be made: {error.strerror}; check the path and its rights") from error


def read_document(path: Path) -> bytes | None:
    """A small file beside blobs, None when it is not there. Raises ImageError for one that is larger than these are."""
    try:
        with reading(path, os.O_NONBLOCK) as file:  # a FIFO is not waited for
            regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            data = file.read(MAX_MANIFEST_SIZE + 1) if regular else b""
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}; check its rights") from error
    if not regular:
        raise ImageError(f"{path}: is no regular file; copy the image again")
    if len(data) > MAX_MANIFEST_SIZE:
        raise ImageError(f"{path}: has more than {MAX_MANIFEST_SIZE} bytes, the most that such a file may have")
    return data


def replace_document(path: Path, data: bytes) -> None:
    """A small file beside blobs, which is there whole at every moment. Raises SinkError."""
    with PathSink(path) as sink:
        sink.write(data)


class FolderUpload:
    """A blob of a BlobFolder on its way: a file without a name until it is committed."""

    def __init__(self, folder: BlobFolder) -> None:
        self._folder = folder
        parent = folder.path("sha256:0").parent
        make_folder(parent)
        # The name is a place holder, until the digest is known.
        self._sink: PathSink | None = PathSink(parent / f".{os.urandom(8).hex()}.tmp")

    def _open(self) -> PathSink:
        if self._sink is None:
            raise SinkError(f"{self._folder.name}: the upload is over; begin another")
        return self._sink

    @property
    def target(self) -> int:
        """The descriptor, for kernels to write to without Python in between."""
        return self._open().fd

    def write(self, data: bytes, /) -> int:
        return self._open().write(data)

    def commit(self, digest: str, size: int) -> None:
        """Gives the blob its name. The digest is the writer's word; the size is compared."""
        with naming(self._folder.name):
            found = os.fstat(self.target).st_size
        if found != size:
            raise VerificationError(f"{self._folder.name}: blob {digest} has {found} bytes, not {size}; write it again")
        path = self._folder.path(Descriptor("", digest, size).digest)
        if self._folder.has(Descriptor("", digest, size)):
            self.abort()
            return
        make_folder(path.parent)
        sink, self._sink = self._open(), None
        sink.path = path
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
    """ImageSource and ImageTarget of ``oci:DIR[:TAG]``. Several processes may add images at the same time.

    Made by ``open_layout`` or ``create_layout``.
    """

    remote = False
    follows_links = True  # build systems make layouts of links to blobs; wherever one leads, the digest decides

    def __init__(self, reference: Reference, names: Sequence[str] = ()) -> None:
        super().__init__(Path(reference.path), str(reference))
        self._reference = reference
        self._names = names

    def resolve(self) -> Descriptor:
        wanted = self._reference.digest
        entries = self._index().manifests
        if wanted is None:
            return pick(entries, self._reference.tag, self.name)
        return next((entry for entry in entries if entry.digest == wanted), None) or self._unlisted(wanted)

    def _unlisted(self, digest: str) -> Descriptor:
        """A manifest that an index of the layout leads to, not the layout's own."""
        try:
            size = os.stat(self.path(digest)).st_size
        except OSError:
            raise ImageError(f"{self.name}: there is no {digest}; look into index.json for what there is") from None
        data = self.read(Descriptor("", digest, size))
        return Descriptor(guess_media_type(data, f"{self.name}: {digest}"), digest, size)

    def read(self, descriptor: Descriptor) -> bytes:
        return read_small(self.open(descriptor), descriptor)

    def put_manifest(self, media_type: str, data: bytes, tags: Sequence[str] = ()) -> Descriptor:
        return Descriptor(media_type, self.write(data), len(data))

    def finish(self, root: Descriptor) -> None:
        """Adds the image to index.json. What had one of its names before is no longer listed."""
        with self._locked():
            index = self._index()
            entries = named_entries(root, self._reference.tag, self._names)
            others = [old for old in index.manifests if not any(_replaces(new, old) for new in entries)]
            known = {"schemaVersion": 2, "mediaType": OCI_INDEX}
            document = {**known, **index.raw, "manifests": [entry.document() for entry in (*others, *entries)]}
            if read_document(self.directory / "oci-layout") is None:
                replace_document(self.directory / "oci-layout", LAYOUT_FILE)
            replace_document(self.directory / "index.json", encode(document))

    def close(self) -> None:
        pass

    def _index(self) -> Index:
        text = read_document(self.directory / "index.json")
        if text is None:
            return Index(OCI_INDEX, [], {}, None, {})
        return Index.parse(text, OCI_INDEX, f"{self.directory}/index.json")

    def check_version(self) -> bool:
        """Whether this is a layout already. Raises ImageError for one that is not known here."""
        text = read_document(self.directory / "oci-layout")
        if text is None:
            return False
        version = decode(text, f"{self.directory}/oci-layout").get("imageLayoutVersion")
        if not str(version).startswith("1."):
            raise ImageError(f"{self.directory}: its OCI layout has version {version!r:.100}; only 1 is known here")
        return True

    @contextmanager
    def _locked(self) -> Iterator[None]:
        make_folder(self.directory)
        try:
            handle = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise SinkError(f"{self.directory}: cannot be opened: {error.strerror}; check its rights") from error
        try:
            with suppress(OSError):  # a file system without locks: then nobody else may write
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            quietly(os.close, handle)


def open_layout(reference: Reference) -> Layout:
    """A layout that exists, to read from. Raises ImageError."""
    layout = Layout(reference)
    if not layout.check_version():
        raise ImageError(f"{reference.path} is no OCI layout: it has no file oci-layout; check the path")
    return layout


def create_layout(reference: Reference, names: Sequence[str] = ()) -> Layout:
    """A layout to add an image to, which is made where there is none. ``names``: HOST/REPOSITORY:TAG, besides the tag.

    Raises ImageError for a directory that is something else.
    """
    layout = Layout(reference, names)
    if not layout.check_version() and os.path.lexists(layout.directory / "index.json"):
        raise ImageError(f"{reference.path} is no OCI layout, but has an index.json; choose another directory")
    return layout


def pick(entries: Sequence[Descriptor], tag: str | None, name: str) -> Descriptor:
    """The image that a layout's index has under a name, or its only one. ``name``: of the layout, for messages.

    Raises ImageError when there is none, or more than one.
    """
    found = [entry for entry in entries if (not entry.is_attestation if tag is None else tag in _names_of(entry))]
    if len({entry.digest for entry in found}) == 1:
        return found[0]
    there = ", ".join(sorted({called for entry in entries for called in _names_of(entry)})) or "none with a name"
    what = "has no such image" if not found else "has several images"
    raise ImageError(f"{name}: {what}; give the name of one, or @ and its digest (there are: {there:.500})")


def _names_of(entry: Descriptor) -> list[str]:
    return [entry.annotations[key] for key in (REF_NAME, IMAGE_NAME) if entry.annotations.get(key)]


def _replaces(new: Descriptor, old: Descriptor) -> bool:
    """Whether a new entry of an index takes the old one's place: they are called the same, or are the same without name."""
    if not _names_of(old):
        return new.digest == old.digest
    key = IMAGE_NAME if IMAGE_NAME in new.annotations and IMAGE_NAME in old.annotations else REF_NAME
    return key in new.annotations and new.annotations[key] == old.annotations.get(key)


def named_entries(root: Descriptor, tag: str | None, names: Sequence[str]) -> list[Descriptor]:
    """An image's entries in the index of a layout: one for each of its names (HOST/REPOSITORY:TAG) and for its tag there."""
    called = [{IMAGE_NAME: name, REF_NAME: name.rpartition("/")[2].rpartition(":")[2]} for name in dict.fromkeys(names)]
    if tag is not None and all(tag not in annotations.values() for annotations in called):
        called.insert(0, {REF_NAME: tag})
    return [
        Descriptor(root.media_type, root.digest, root.size, {**root.annotations, **annotations}, root.raw)
        for annotations in called or [{}]
    ]
