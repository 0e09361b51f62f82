"""Layers of an image: those that exist, those that are to be built, and the form that they shall have."""

from __future__ import annotations

import io
import math
import os
import select
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

from estargz.descriptors import naming
from estargz.errors import BlobError, RangeError, RegistryError, SourceError, UsageError
from estargz.image.model import Descriptor, layer_compression, layer_media_type
from estargz.image.output import Output
from estargz.image.store import ImageSource
from estargz.layer import TOC_DIGEST, UNCOMPRESSED_DIGEST, Layer
from estargz.options import DEFAULT_CHUNK_SIZE, Options
from estargz.reading.footer import FOOTER_MAX, read_footer
from estargz.writing.building import build, tar_digest
from estargz.writing.pool import Pool
from estargz.writing.source import PathLike, Readable

__all__ = [
    "LayerForm",
    "LayerKind",
    "MovedLayer",
    "NewLayer",
    "StoredLayer",
    "descriptor_of",
    "layer_kind",
    "public_annotations",
]

# what is not for manifests: containerd's and BuildKit's own notes about blobs
_PRIVATE = (UNCOMPRESSED_DIGEST, "buildkit/createdat")
_PRIVATE_PREFIX = "containerd.io/distribution.source."

_SMALL_TREE = 4096  # entries
_LISTEN_MS = 100


# --------------------------------------------------------------------------------------------------------------------
# what is asked for


@dataclass(frozen=True, slots=True)
class LayerForm:
    """How layers shall be compressed.

    Raises UsageError for values out of their range.
    """

    compression: str | None = None
    """``uncompressed``, ``gzip``, ``estargz`` or ``zstd``; None: as they are, and new ones as gzip."""
    level: int | None = None
    """0..12 (gzip, estargz) or 1..19 (zstd); None: the default."""
    chunk_size: int = DEFAULT_CHUNK_SIZE
    min_chunk_size: int = 0
    portable: bool = False

    def __post_init__(self) -> None:
        Options(**self.options())

    @classmethod
    def of(cls, output: Output, *, portable: bool) -> Self:
        """What an output line wants."""
        chunk_size = output.chunk_size or DEFAULT_CHUNK_SIZE
        return cls(output.compression, output.compression_level, chunk_size, output.min_chunk_size, portable)

    def options(self) -> dict[str, Any]:
        """As ``estargz.build`` takes them."""
        return {
            "compression": self.compression or "gzip",
            "level": self.level,
            "chunk_size": self.chunk_size,
            "min_chunk_size": self.min_chunk_size,
            "portable": self.portable,
        }

    def pool(self, threads: int | None = None, memory: int | None = None) -> Pool:
        """One with room for such layers' compressors."""
        return Pool(threads, memory, compression=self.options()["compression"], level=self.level)

    def changes(self, kind: LayerKind) -> bool:
        """Whether a layer of this kind becomes another one. As for BuildKit, an eStargz layer is none of plain gzip."""
        return self.compression is not None and self.compression != kind.compression


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """A blob of an image that exists."""

    source: ImageSource
    descriptor: Descriptor
    diff_id: str | None = None
    """As the image's configuration states it."""
    keep: bool = False
    """It is not to be recompressed, whatever the form."""


@dataclass(frozen=True, slots=True)
class NewLayer:
    """A layer that is built: the arguments of ``estargz.build``."""

    source: PathLike | Readable
    lower: PathLike | None = None
    overlay_lower: Sequence[PathLike] | None = None
    prefetch: Sequence[str] = ()
    allow_missing: bool = False
    landmark: bool = True
    epoch: int | None = None
    """Upper bound, in seconds, of a tree's modification times."""
    rewrite_timestamp: bool = False
    """The bound holds for the times in a tar, too."""

    @property
    def name(self) -> str:
        """For messages and progress."""
        named = self.source if isinstance(self.source, str | os.PathLike) else getattr(self.source, "name", "input")
        return str(named)

    @property
    def repeatable(self) -> bool:
        """Whether it can be read more than once."""
        return isinstance(self.source, str | os.PathLike) and not _is_stream(self.source)

    def size_hint(self) -> float:
        """Bytes of the source; infinite where that takes long to find out, or cannot be known."""
        if not isinstance(self.source, str | os.PathLike):
            return math.inf
        return os.path.getsize(self.source) if os.path.isfile(self.source) else _size_of_tree(self.source)

    def tar_digest(self, **options: Any) -> str:
        """The digest of the tar that ``build`` would compress. Raises what ``estargz.build`` raises."""
        return tar_digest(self.source, Options(**options), **self._arguments())

    @contextmanager
    def read_once(self, check: Callable[[], None]) -> Iterator[Self]:
        """The same layer, whose pipe is waited for only as long as ``check`` does not raise."""
        descriptor = self.source.fileno() if isinstance(self.source, io.FileIO) else None
        with ExitStack() as opened:
            if descriptor is None and isinstance(self.source, str | os.PathLike) and _is_stream(self.source):
                descriptor = _open_pipe(self.source)
                opened.callback(os.close, descriptor)
            if descriptor is None:
                yield self
                return
            with naming(self.name):
                regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
            yield self if regular else replace(self, source=_Pipe(descriptor, self.name, check))

    def build(self, dest: Any, **options: Any) -> Layer:
        """Builds it. Raises what ``estargz.build`` raises."""
        return build(self.source, dest, **self._arguments(), **options)

    def _arguments(self) -> dict[str, Any]:
        """What the tar is made of, for ``estargz.build``."""
        return {
            "lower": self.lower,
            "overlay_lower": self.overlay_lower,
            "prefetch": self.prefetch,
            "allow_missing": self.allow_missing,
            "landmark": self.landmark,
            "source_date_epoch": self.epoch,
            "rewrite_timestamp": self.rewrite_timestamp,
        }


class _Pipe:
    """What comes through a descriptor, as it comes."""

    def __init__(self, descriptor: int, name: str, check: Callable[[], None]) -> None:
        self.name = name
        self._descriptor = descriptor
        self._check = check
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)

    def read(self, size: int, /) -> bytes:
        while not self._poll.poll(_LISTEN_MS):
            self._check()
        return os.read(self._descriptor, size)


def _open_pipe(path: PathLike) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # which does not wait for who writes
    except OSError as error:
        raise SourceError(
            f"{os.fspath(path)}: cannot be opened: {error.strerror}; check that it is readable"
        ) from error


def _size_of_tree(path: PathLike) -> float:
    """Bytes of a small tree's files; infinite for others, which are not worth walking twice."""
    size, left = 0, _SMALL_TREE
    for folder, folders, names in os.walk(path):
        left -= len(folders) + len(names)
        if left < 0:
            return math.inf
        size += sum(os.lstat(os.path.join(folder, name)).st_size for name in names)
    return size


@dataclass(frozen=True, slots=True)
class MovedLayer:
    """What became of a layer."""

    descriptor: Descriptor
    """As OCI manifests have it."""
    diff_id: str | None
    action: str
    """``copied``, ``converted``, ``built``, or ``reused`` from the cache."""
    layer: Layer | None = None
    """What is known of one that was made."""


# --------------------------------------------------------------------------------------------------------------------
# what a layer is


class _Ranges:
    """A stored blob, for those who read by ranges."""

    def __init__(self, layer: StoredLayer) -> None:
        self.name = f"{layer.source.name}: {layer.descriptor.digest}"
        self.size = layer.descriptor.size
        self._layer = layer

    def read_at(self, offset: int, size: int, /) -> bytes:
        return self._layer.source.read_at(self._layer.descriptor, offset, size)


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What a stored layer is."""

    compression: str
    """``uncompressed``, ``gzip``, ``zstd`` or ``estargz``."""
    toc_digest: str | None = None
    """Of an eStargz layer's table of contents."""
    toc_offset: int | None = None
    """Where that begins in the blob, in bytes; None: nobody has looked, as the source has no ranges."""


def layer_kind(layer: StoredLayer) -> LayerKind:
    """What a layer is, by its type and, if that is gzip, by its end, which alone is fetched.

    It is an eStargz layer when the end leads to a table of contents that can be read, and that has the digest its descriptor
    states, if it states one.
    """
    compression = layer_compression(layer.descriptor.media_type)
    if compression != "gzip":
        return LayerKind(compression)
    stated = layer.descriptor.annotations.get(TOC_DIGEST)
    try:
        if not _has_footer(layer):
            return LayerKind("gzip")
        from estargz.reading import blob as blobs

        with blobs.open(_Ranges(layer), toc_digest=stated) as opened:
            return LayerKind("estargz", opened.toc_digest, opened.toc_offset)
    except (RangeError, RegistryError) as error:
        if error.status != 200:
            raise
        return LayerKind("estargz", stated) if stated else LayerKind("gzip")  # its word must do
    except (BlobError, UsageError):  # a footer by chance, or an annotation of something else
        return LayerKind("gzip")


def _has_footer(layer: StoredLayer) -> bool:
    size = layer.descriptor.size
    tail = layer.source.read_at(layer.descriptor, max(size - FOOTER_MAX, 0), min(size, FOOTER_MAX))
    footer = read_footer(tail, size)
    return footer is not None and footer.format == "estargz"


def _is_stream(path: PathLike) -> bool:
    """Whether it is a pipe or the like, which is read once. Of what cannot be examined the builder says why."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return not stat.S_ISDIR(mode) and not stat.S_ISREG(mode)


def public_annotations(annotations: Mapping[str, str]) -> dict[str, str]:
    """What of a layer's annotations belongs into a manifest (BuildKit's exporter leaves out the same)."""
    return {
        key: value for key, value in annotations.items() if key not in _PRIVATE and not key.startswith(_PRIVATE_PREFIX)
    }


def descriptor_of(layer: Layer) -> Descriptor:
    """Of a finished layer, as OCI manifests have it."""
    return Descriptor(
        layer_media_type(layer.compression), layer.digest, layer.size, public_annotations(layer.annotations)
    )
