"""dir:DIR, one image as skopeo writes it: manifest.json, and the blobs beside it, called by their digest's hexadecimals."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from estargz.errors import ImageError, SinkError
from estargz.image.layout import BlobFolder, make_folder, read_document, replace_document
from estargz.image.model import Descriptor, Manifest, digest_of, guess_media_type, is_index, is_manifest
from estargz.image.reference import Reference
from estargz.image.store import read_small

__all__ = ["Directory", "create_directory", "open_directory"]

_VERSION = b"Directory Transport Version: 1.1\n"
_MANIFEST = ".manifest.json"  # behind the hexadecimals, for those that an index lists
_OF_AN_IMAGE = re.compile(r"(?:[0-9a-f]{64}|[0-9a-f]{128})(?:\.manifest\.json)?|(?:[0-9a-f]{64}-)?signature-[0-9]+")


class Directory(BlobFolder):
    """ImageSource and ImageTarget of ``dir:DIR``. Made by ``open_directory`` or ``create_directory``."""

    remote = False

    def __init__(self, reference: Reference) -> None:
        super().__init__(Path(reference.path), str(reference))
        self._manifests: dict[str, tuple[str, bytes]] = {}  # digest -> media type, bytes: those to be written

    def path(self, digest: str) -> Path:
        return self.directory / digest.partition(":")[2]

    def resolve(self) -> Descriptor:
        data = read_document(self.directory / "manifest.json")
        if data is None:
            raise ImageError(f"{self.name}: there is no manifest.json, so there is no image; check the path")
        return Descriptor(guess_media_type(data, f"{self.name}: manifest.json"), digest_of(data), len(data))

    def read(self, descriptor: Descriptor) -> bytes:
        if not _is_document(descriptor):
            return read_small(self.open(descriptor), descriptor)
        for name in (self.path(descriptor.digest).name + _MANIFEST, "manifest.json"):
            data = read_document(self.directory / name)
            if data is not None and digest_of(data) == descriptor.digest:
                return data
        raise ImageError(
            f"{self.name}: manifest {descriptor.digest} is missing; copy the image again, all its platforms"
        )

    def has(self, descriptor: Descriptor) -> bool:
        return descriptor.digest in self._manifests if _is_document(descriptor) else super().has(descriptor)

    def put_manifest(self, media_type: str, data: bytes, tags: Sequence[str] = ()) -> Descriptor:
        digest = digest_of(data)
        self._manifests[digest] = (media_type, data)
        return Descriptor(media_type, digest, len(data))

    def finish(self, root: Descriptor) -> None:
        """Makes this the image of the directory, and removes what was only the former one's."""
        make_folder(self.directory)
        keep = set()
        for digest, (media_type, data) in self._manifests.items():
            name = self.path(digest).name + _MANIFEST
            if digest != root.digest:
                keep.add(name)
                replace_document(self.directory / name, data)
            if is_manifest(media_type):
                manifest = Manifest.parse(data, media_type, f"{self.name}: {digest}")
                keep |= {self.path(blob.digest).name for blob in (manifest.config, *manifest.layers)}
        replace_document(self.directory / "version", _VERSION)
        replace_document(self.directory / "manifest.json", self._manifests[root.digest][1])
        for name in os.listdir(self.directory):
            if _OF_AN_IMAGE.fullmatch(name) and name not in keep:
                (self.directory / name).unlink(missing_ok=True)

    def close(self) -> None:
        pass


def _is_document(descriptor: Descriptor) -> bool:
    return is_manifest(descriptor.media_type) or is_index(descriptor.media_type)


def open_directory(reference: Reference) -> Directory:
    """A directory that holds an image. Raises ImageError."""
    directory = Directory(reference)
    directory.resolve()
    return directory


def create_directory(reference: Reference) -> Directory:
    """A directory to write an image to: one that is new, is empty, or holds an image. Raises ImageError for others."""
    directory = Directory(reference)
    try:
        foreign = any(not _OF_AN_IMAGE.fullmatch(name) for name in os.listdir(directory.directory))
        foreign = foreign and read_document(directory.directory / "version") is None
    except FileNotFoundError:
        foreign = False
    except OSError as error:
        raise SinkError(f"{directory.name}: cannot be listed: {error.strerror}; choose a directory") from error
    if foreign:
        raise ImageError(
            f"{directory.name}: holds something that is no image, which would be lost; choose another directory"
        )
    return directory
