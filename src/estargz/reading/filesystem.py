"""Layers as a file system of fsspec: ``estargz://usr/lib/data.parquet::https://host/layer``.

fsspec finds this class by the entry point that the package registers; it is imported by nothing else here, because fsspec
is an optional dependency.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, BinaryIO

from fsspec.archive import AbstractArchiveFileSystem
from fsspec.core import url_to_fs

from estargz.errors import BlobError
from estargz.reading.blob import Blob
from estargz.reading.blob import open as open_blob
from estargz.reading.source import Readable
from estargz.reading.toc import Limits

__all__ = ["EstargzFileSystem"]

_KINDS = {"dir": "directory", "reg": "file", "hardlink": "file", "symlink": "link"}


class FsspecRanges:
    """A file of another file system as a RangeReader."""

    def __init__(self, filesystem: Any, path: str) -> None:
        self.name = str(filesystem.unstrip_protocol(path))
        size = filesystem.size(path)
        if size is None:
            raise BlobError(f"{self.name}: its file system does not know its size; save the layer to a file first")
        self.size = int(size)
        self._filesystem = filesystem
        self._path = path

    def read_at(self, offset: int, size: int, /) -> bytes:
        return bytes(self._filesystem.cat_file(self._path, start=offset, end=min(offset + size, self.size)))

    def read_ranges(self, ranges: Sequence[tuple[int, int]], /) -> list[bytes]:
        starts = [offset for offset, _ in ranges]
        ends = [min(offset + size, self.size) for offset, size in ranges]
        found = self._filesystem.cat_ranges([self._path] * len(ranges), starts, ends, on_error="raise")
        return [bytes(data) for data in found]


class EstargzFileSystem(AbstractArchiveFileSystem):  # type: ignore[misc]
    """The files of one layer, read-only; every byte that is read was checked against the table of contents.

    fo:              the layer: a path, a URL, or whatever estargz.open() takes
    target_protocol, target_options:  how fsspec opens ``fo``, as it passes them for chained URLs; local paths and HTTP
                     without options are opened by this package itself
    toc_digest:      "sha256:..." that the table of contents must have
    limits:          what the table of contents may ask for, estargz.reading.toc.Limits

    Symbolic links are followed inside the layer. Whiteouts and landmarks are not listed; layers are not stacked. Raises
    what estargz.open() and the methods of Blob raise.
    """

    root_marker = ""
    protocol = "estargz"
    cachable = True

    def __init__(
        self,
        fo: Any = "",
        target_protocol: str | None = None,
        target_options: dict[str, Any] | None = None,
        toc_digest: str | None = None,
        limits: Limits | None = None,
        **storage_options: Any,
    ) -> None:
        super().__init__(self, **storage_options)
        self.fo = fo
        self.blob: Blob = open_blob(
            _layer(fo, target_protocol, target_options or {}), toc_digest=toc_digest, limits=limits
        )

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path)).strip("/")

    def close(self) -> None:
        """Give the layer back."""
        self.blob.close()

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        """Name, size in bytes, type, and what the entry says besides: mode, uid, gid, mtime, ino, nlink.

        A symbolic link to a file is of type "file", any other is a "link": who walks the tree must not go through those.
        """
        path = self._strip_protocol(path)
        try:
            found = self.blob.stat(path, follow_symlinks=False)
        except BlobError:  # a hard link to nothing; its neighbours can be listed all the same
            return {"name": path, "size": 0, "type": "other"}
        kind = self._kind(path, follow=False)
        more: dict[str, Any] = {}
        if kind == "link":
            more = {"islink": True, "destination": self.blob.readlink(path)}
            if self._leads_to_file(path):
                found, kind = self.blob.stat(path), "file"
        return {
            "name": path,
            "size": 0 if kind == "directory" else found.st_size,
            "type": kind,
            "mode": found.st_mode,
            "uid": found.st_uid,
            "gid": found.st_gid,
            "mtime": found.st_mtime,
            "ino": found.st_ino,
            "nlink": found.st_nlink,
            **more,
        }

    def _leads_to_file(self, path: str) -> bool:
        try:
            return self._kind(path, follow=True) == "file"
        except (FileNotFoundError, NotADirectoryError, BlobError):
            return False  # it dangles, or leads to another layer
        except OSError as error:
            if error.errno == errno.ELOOP:
                return False
            raise

    def _kind(self, path: str, *, follow: bool) -> str:
        return _KINDS.get(self.blob.type_of(path, follow_symlinks=follow), "other")

    def isdir(self, path: str) -> bool:
        """Whether the path is a directory, or a link to one."""
        try:
            return self._kind(self._strip_protocol(path), follow=True) == "directory"
        except (OSError, BlobError):
            return False

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        """What is in a directory, sorted by name; of anything else, itself."""
        path = self._strip_protocol(path)
        if self._kind(path, follow=True) != "directory":
            names = [path]
        else:
            names = [f"{path}/{name}" if path else name for name in self.blob.listdir(path)]
        return [self.info(name) for name in names] if detail else names

    def modified(self, path: str) -> datetime:
        """The time of the last modification, UTC."""
        seconds = self.blob.stat(self._strip_protocol(path)).st_mtime
        try:
            return datetime.fromtimestamp(seconds, UTC)
        except (ValueError, OverflowError) as error:
            raise BlobError(f"{self.blob.name}: {path!r}: modification time {seconds}: {error}") from None

    def _open(self, path: str, mode: str = "rb", **options: Any) -> BinaryIO:
        if mode != "rb":
            raise NotImplementedError("a layer is read-only: open its files with mode 'rb'")
        return self.blob.open(self._strip_protocol(path))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        """The bytes [start, end) of a file; negative numbers count from its end."""
        with self.blob.open(self._strip_protocol(path)) as file:
            size = file.seek(0, 2)
            begin, stop, _ = slice(start, end).indices(size)
            file.seek(begin)
            return file.read(max(stop - begin, 0))


def _layer(fo: Any, protocol: str | None, options: dict[str, Any]) -> Readable:
    if not isinstance(fo, str):
        return fo  # type: ignore[no-any-return]
    if not options and protocol in (None, "file", "local", "http", "https") and (protocol or "::" not in fo):
        scheme, separator, rest = fo.partition("://")
        if not separator or scheme in ("http", "https"):
            return fo
        if scheme in ("file", "local"):
            return rest
    filesystem, path = url_to_fs(fo, **({"protocol": protocol} if protocol else {}), **options)
    return FsspecRanges(filesystem, path)
