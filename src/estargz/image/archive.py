"""oci-archive:FILE and docker-archive:FILE, images in a tar: the first an OCI layout, the second what docker save writes.

What is written for docker-archive is both: a layout, and the manifest.json that docker load reads.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from estargz.descriptors import naming, quietly, read_all_at
from estargz.errors import ImageError, SinkError, UsageError, VerificationError
from estargz.image.layout import LAYOUT_FILE, copy_blob, named_entries, pick
from estargz.image.model import (
    DOCKER_CONFIG,
    DOCKER_MANIFEST,
    OCI_INDEX,
    Descriptor,
    ImageConfig,
    Index,
    Manifest,
    check_digest,
    decode,
    digest_of,
    encode,
    is_index,
    is_manifest,
    layer_media_type,
)
from estargz.image.reference import Reference, familiar_name, full_name
from estargz.image.store import BlobReader, VerifyingReader, read_small
from estargz.image.tarball import Member, Span, Tarball, header, padding
from estargz.writing.sink import DescriptorSink, PathSink

__all__ = ["Archive", "ArchiveTarget", "DockerArchive", "open_archive"]

_PIECE = 1 << 20
_EXTENT = 4 << 20
_MAX_IMAGES = 4096


# --------------------------------------------------------------------------------------------------------------------
# reading


class Archive:
    """ImageSource of ``oci-archive:FILE[:TAG]``. Made by ``open_archive``."""

    def __init__(self, reference: Reference) -> None:
        self.name = str(reference)
        self._reference = reference
        self._tar = Tarball(reference.path)

    def resolve(self) -> Descriptor:
        return pick(self._index().manifests, self._reference.tag, self.name)

    def _index(self) -> Index:
        text = self._tar.read("index.json")
        if text is None:
            hint = "is it a docker-archive?" if self._tar.find("manifest.json") else "check the path"
            raise ImageError(f"{self.name}: there is no index.json, so it is no OCI layout; {hint}")
        return Index.parse(text, OCI_INDEX, f"{self.name}: index.json")

    def read(self, descriptor: Descriptor) -> bytes:
        return read_small(self.open(descriptor), descriptor)

    def open(self, descriptor: Descriptor) -> BlobReader:
        return VerifyingReader(Span(self._tar.fd, self._member(descriptor)), descriptor, self.name)

    def read_at(self, descriptor: Descriptor, offset: int, size: int) -> bytes:
        member = self._member(descriptor)
        return read_all_at(self._tar.fd, member.offset + offset, min(size, member.size - offset))

    def _member(self, descriptor: Descriptor) -> Member:
        member = self._find(descriptor.digest)
        if member is None:
            raise ImageError(f"{self.name}: blob {descriptor.digest} is missing; copy the image again")
        if member.size != descriptor.size:
            raise VerificationError(
                f"{self.name}: blob {descriptor.digest} has {member.size} bytes, not {descriptor.size}; copy the image again"
            )
        return member

    def _find(self, digest: str) -> Member | None:
        return self._tar.find(_blob_name(digest))

    def close(self) -> None:
        self._tar.close()


class DockerArchive(Archive):
    """ImageSource of ``docker-archive:FILE[:NAME:TAG]``. Made by ``open_archive``.

    Where the archive has the image's OCI manifest as well, that is the image, with its annotations. Where it has not, one of
    Docker's schema 2 is made, which is the same every time.
    """

    def __init__(self, reference: Reference) -> None:
        super().__init__(reference)
        self._made: dict[str, bytes] = {}
        self._layers: dict[str, Member] = {}

    def resolve(self) -> Descriptor:
        item = self._item()
        config, layers = item.get("Config"), item.get("Layers") or []
        if (
            not isinstance(config, str)
            or not isinstance(layers, list)
            or not all(isinstance(path, str) for path in layers)
        ):
            raise ImageError(f"{self.name}: manifest.json has an image without Config or Layers; save it again")
        return self._listed(config, layers) or self._make(config, layers)

    def read(self, descriptor: Descriptor) -> bytes:
        made = self._made.get(descriptor.digest)
        return super().read(descriptor) if made is None else made

    def _find(self, digest: str) -> Member | None:
        return self._layers.get(digest) or super()._find(digest)

    def _item(self) -> Mapping[str, Any]:
        """What manifest.json says of the wanted image."""
        text = self._tar.read("manifest.json")
        if text is None:
            hint = "is it an oci-archive?" if self._tar.find("index.json") else "check the path"
            raise ImageError(f"{self.name}: there is no manifest.json, so docker did not save it; {hint}")
        items = decode(text, f"{self.name}: manifest.json", list)
        if len(items) > _MAX_IMAGES or not all(isinstance(item, dict) for item in items):
            raise ImageError(f"{self.name}: manifest.json is no list of at most {_MAX_IMAGES} images; save them again")
        wanted = full_name(self._reference.name) if self._reference.repository else None
        found = [item for item in items if wanted is None or wanted in _tags_of(item)]
        if len(found) != 1:
            what = "has several images" if found else "has no such image"
            there = ", ".join(sorted({tag for item in items for tag in _tags_of(item)})) or "none with a name"
            raise ImageError(f"{self.name}: {what}; give the name of one (there are: {there:.500})")
        one: Mapping[str, Any] = found[0]
        return one

    def _listed(self, config: str, layers: Sequence[str]) -> Descriptor | None:
        """The manifest with this configuration and these layers that the archive's layout leads to."""
        if self._tar.find("index.json") is None:
            return None
        for descriptor in self._manifests(self._index(), 2, set()):
            manifest = Manifest.parse(self.read(descriptor), descriptor.media_type, f"{self.name}: {descriptor.digest}")
            if [_blob_name(blob.digest) for blob in (manifest.config, *manifest.layers)] == [config, *layers]:
                return Descriptor(descriptor.media_type, descriptor.digest, descriptor.size)
        return None

    def _manifests(self, index: Index, depth: int, seen: set[str]) -> Iterator[Descriptor]:
        """Those that are there, each once: of an image for many platforms often only one was saved."""
        for entry in index.manifests:
            if entry.digest in seen or super()._find(entry.digest) is None:
                continue
            seen.add(entry.digest)
            if is_manifest(entry.media_type):
                yield entry
            elif is_index(entry.media_type) and depth:
                inner = Index.parse(self.read(entry), entry.media_type, f"{self.name}: {entry.digest}")
                yield from self._manifests(inner, depth - 1, seen)

    def _make(self, config_path: str, paths: Sequence[str]) -> Descriptor:
        data = self._tar.read(config_path)
        if data is None:
            raise ImageError(f"{self.name}: {config_path!r} is missing; save the image again")
        config = ImageConfig.parse(data, f"{self.name}: {config_path}")
        if len(config.diff_ids) != len(paths):
            raise ImageError(
                f"{self.name}: the image has {len(paths)} layers, its configuration {len(config.diff_ids)}; save it again"
            )
        layers = [self._layer(path, diff_id) for path, diff_id in zip(paths, config.diff_ids, strict=True)]
        root = Manifest(DOCKER_MANIFEST, Descriptor(DOCKER_CONFIG, digest_of(data), len(data)), layers, {}, None, {})
        manifest = encode(root.document())
        self._made = {root.config.digest: data, digest_of(manifest): manifest}
        return Descriptor(DOCKER_MANIFEST, digest_of(manifest), len(manifest))

    def _layer(self, path: str, diff_id: str) -> Descriptor:
        member = self._tar.find(path)
        if member is None:
            raise ImageError(f"{self.name}: layer {path!r} is missing; save the image again")
        magic = read_all_at(self._tar.fd, member.offset, min(4, member.size))
        compression = "gzip" if magic[:2] == b"\x1f\x8b" else "zstd" if magic == b"\x28\xb5\x2f\xfd" else "uncompressed"
        digest = diff_id if compression == "uncompressed" else _digest_in(path) or self._digest(member)
        self._layers[digest] = member
        return Descriptor(layer_media_type(compression, docker=True), digest, member.size)

    def _digest(self, member: Member) -> str:
        hashed, span = hashlib.sha256(), Span(self._tar.fd, member)
        while data := span.read(_PIECE):
            hashed.update(data)
        return f"sha256:{hashed.hexdigest()}"


def open_archive(reference: Reference) -> Archive:
    """An archive that exists, to read from. Raises ImageError for what is none, SourceError for what cannot be read."""
    return DockerArchive(reference) if reference.transport == "docker-archive" else Archive(reference)


def _blob_name(digest: str) -> str:
    return f"blobs/{digest.replace(':', '/')}"


def _digest_in(path: str) -> str | None:
    """The digest that a blob's path has; it is checked when the blob is read."""
    folder, _, rest = path.partition("/")
    try:
        return check_digest(rest.replace("/", ":")) if folder == "blobs" else None
    except ImageError:
        return None


def _tags_of(item: Mapping[str, Any]) -> list[str]:
    """The full names of an image, whichever form they were written in."""
    tags = item.get("RepoTags")
    names = []
    for tag in tags if isinstance(tags, list) else []:
        try:
            names.append(full_name(str(tag)))
        except UsageError:
            names.append(str(tag))
    return names


# --------------------------------------------------------------------------------------------------------------------
# writing


class ArchiveTarget:
    """ImageTarget of an archive, which appears whole with ``finish``, its bytes the same whoever writes it.

    Blobs lie in one nameless file meanwhile, beside the archive; in $TMPDIR when it goes to a descriptor or a device.
    """

    remote = False

    def __init__(self, reference: Reference, names: Sequence[str] = (), descriptor: int | None = None) -> None:
        self.name = str(reference)
        self._docker = reference.transport == "docker-archive"
        self._tag = None if self._docker else reference.tag
        own = [full_name(reference.name)] if self._docker and reference.repository else []
        self._names = [*own, *names]
        self._sink: PathSink | DescriptorSink
        self._sink = PathSink(reference.path) if descriptor is None else DescriptorSink(descriptor, self.name)
        try:
            with naming(self.name):
                beside = descriptor is None and stat.S_ISREG(os.fstat(self._sink.target).st_mode)
            self._spool = _Spool(Path(os.path.realpath(reference.path)).parent if beside else None)
        except BaseException:
            self._sink.discard()
            raise
        self._manifests: dict[str, bytes] = {}
        self._blobs: dict[str, _SpooledUpload] = {}
        self._finished = False

    def has(self, descriptor: Descriptor) -> bool:
        return descriptor.digest in self._blobs or descriptor.digest in self._manifests

    def link(self, descriptor: Descriptor, source: object) -> bool:
        return self.has(descriptor)

    def upload(self, room: int | None = None) -> _SpooledUpload:
        return _SpooledUpload(self._spool, self._blobs)

    def put(self, descriptor: Descriptor, open: Callable[[], BlobReader]) -> None:
        if not self.has(descriptor):
            copy_blob(descriptor, open, self.upload)

    def put_manifest(self, media_type: str, data: bytes, tags: Sequence[str] = ()) -> Descriptor:
        digest = digest_of(data)
        self._manifests[digest] = data
        return Descriptor(media_type, digest, len(data))

    def finish(self, root: Descriptor) -> None:
        contents: dict[str, bytes | _SpooledUpload] = {"oci-layout": LAYOUT_FILE}
        entries = [entry.document() for entry in named_entries(root, self._tag, self._names)]
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
        contents["index.json"] = encode(index, indent=None)
        if self._docker:
            contents["manifest.json"] = self._docker_manifest(root)
        contents |= {_blob_name(digest): data for digest, data in self._manifests.items()}
        contents |= {_blob_name(digest): blob for digest, blob in self._blobs.items()}
        for name in list(contents):
            while (name := name.rpartition("/")[0]) != "":
                contents[f"{name}/"] = b""
        try:
            for name in sorted(contents):
                self._write(name, contents[name])
            self._sink.write(bytes(1024))
        except SinkError:
            raise
        except OSError as error:
            raise SinkError(f"{self._sink.name}: cannot be written: {error.strerror}; check the destination") from error
        self._finished = True
        self._sink.commit()

    def _write(self, name: str, content: bytes | _SpooledUpload) -> None:
        size = len(content) if isinstance(content, bytes) else content.size
        self._sink.write(header(name, size, directory=name.endswith("/")))
        if isinstance(content, bytes):
            self._sink.write(content)
        else:
            for offset, length in content.extents():
                _pour(self._spool.fd, offset, length, self._sink)
        self._sink.write(bytes(padding(size)))

    def _docker_manifest(self, root: Descriptor) -> bytes:
        manifest = self._one_image(root)
        item = {
            "Config": _blob_name(manifest.config.digest),
            "RepoTags": [familiar_name(name) for name in dict.fromkeys(self._names)] or None,
            "Layers": [_blob_name(layer.digest) for layer in manifest.layers],
        }
        return encode([item], indent=None)

    def _one_image(self, root: Descriptor) -> Manifest:
        data = self._manifests[root.digest]
        if is_manifest(root.media_type):
            return Manifest.parse(data, root.media_type, f"{self.name}: {root.digest}")
        index = Index.parse(data, root.media_type, f"{self.name}: {root.digest}")
        images = [entry for entry in index.manifests if is_manifest(entry.media_type) and not entry.is_attestation]
        if len(images) != 1:
            raise UsageError(f"{self.name}: docker's archives hold one platform, not {len(images)}; choose one of them")
        return self._one_image(images[0])

    def close(self) -> None:
        self._spool.close()
        if not self._finished:
            self._sink.discard()


class _Spool:
    """Blobs on their way, in one nameless file, each in extents of its own: so several may grow at the same time."""

    def __init__(self, folder: Path | None) -> None:
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            place = folder or tempfile.gettempdir()
            raise SinkError(f"{place}: cannot be written: {error.strerror}; check the directory") from error
        self.fd = self._file.fileno()
        self._lock = threading.Lock()
        self._free: list[int] = []
        self._end = 0

    def take(self) -> int:
        """The place of an extent that nobody has."""
        with self._lock:
            if self._free:
                return self._free.pop()
            self._end += _EXTENT
            return self._end - _EXTENT

    def give_back(self, places: Sequence[int]) -> None:
        with self._lock:
            self._free += places

    def write(self, data: bytes | memoryview, place: int) -> int:
        try:
            return os.pwrite(self.fd, data, place)
        except OSError as error:
            raise SinkError(
                f"blobs cannot be kept meanwhile: {error.strerror}; free some space or set TMPDIR"
            ) from error

    def close(self) -> None:
        quietly(self._file.close)  # nobody wants its content any more


class _SpooledUpload:
    """BlobUpload of an archive, and then the blob in its spool."""

    def __init__(self, spool: _Spool, blobs: dict[str, _SpooledUpload]) -> None:
        self.size = 0
        self._spool = spool
        self._blobs = blobs
        self._places: list[int] = []
        self._committed = False

    def write(self, data: bytes, /) -> int:
        view = memoryview(data)
        while view:
            used = self.size % _EXTENT
            if used == 0 and self.size == len(self._places) * _EXTENT:
                self._places.append(self._spool.take())
            written = self._spool.write(view[: _EXTENT - used], self._places[-1] + used)
            self.size += written
            view = view[written:]
        return len(data)

    def commit(self, digest: str, size: int) -> None:
        if size != self.size:
            raise VerificationError(f"blob {digest} has {self.size} bytes, not {size}; write it again")
        self._committed = self._blobs.setdefault(check_digest(digest), self) is self
        if not self._committed:
            self.abort()

    def abort(self) -> None:
        if not self._committed:
            self._spool.give_back(self._places)
            self._places, self.size = [], 0

    def extents(self) -> Iterator[tuple[int, int]]:
        """Offset and size of each of its parts."""
        left = self.size
        for place in self._places:
            yield place, min(left, _EXTENT)
            left -= _EXTENT

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()


def _pour(fd: int, offset: int, size: int, sink: PathSink | DescriptorSink) -> None:
    """Some bytes of a file, moved by the kernel where it can."""
    while size:
        try:
            count = os.sendfile(sink.target, fd, offset, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            count = sink.write(os.pread(fd, min(size, _PIECE), offset))
        if count == 0:
            raise SinkError(f"{sink.name}: a blob was cut short while it was kept; try again")
        offset, size = offset + count, size - count
