"""Tars that hold blobs: an index of an existing one, whose members are then read where they lie; and headers of a new one.

Nothing is extracted, and no number of a header is believed before the file was asked. What an archive of images never has
(sparse files, names longer than 1024 bytes, 65,536 members) is not read.
"""

from __future__ import annotations

import gzip
import os
import posixpath
import re
import stat
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from estargz.descriptors import quietly, read_all_at
from estargz.errors import ImageError, SinkError, SourceError
from estargz.image.model import MAX_MANIFEST_SIZE

__all__ = ["Member", "Span", "Tarball", "header", "padding"]

_BLOCK = 512
_PIECE = 1 << 20
_MAX_MEMBERS = 1 << 16
_MAX_NAME = 1024  # bytes
_MAX_EXTENSION = 1 << 16  # bytes of a PAX or GNU header
_MAX_EXTENSIONS = 16 << 20  # of all of them
_MAX_LINKS = 8
_RECORD = re.compile(rb"([0-9]{1,6}) ([^=]+)=")


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar, or a link to one."""

    name: str
    offset: int
    """Of its first byte in the tar."""
    size: int
    link: str | None = None
    """What it is a link to, by its name in the tar."""


class Span:
    """The bytes of a member from its start; every read has a place of its own, so many may read at once."""

    def __init__(self, fd: int, member: Member) -> None:
        self._fd = fd
        self._place = member.offset
        self._end = member.offset + member.size

    def read(self, size: int, /) -> bytes:
        data = read_all_at(self._fd, self._place, min(size, self._end - self._place))
        self._place += len(data)
        return data

    def close(self) -> None:
        """Nothing to do: the tar stays open."""


class Tarball:
    """A tar's files by their names. Of a name that stands twice the last counts.

    One that is compressed by gzip, or is no file that can be sought in, is kept uncompressed in $TMPDIR meanwhile.

    Raises:
        ImageError: it is no tar, or one that is damaged or strange.
        SourceError: it cannot be read.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self.fd = _open(path)
        except SinkError:
            raise
        except OSError as error:
            raise SourceError(f"{path}: cannot be read: {error.strerror}; check that it is there and a file") from error
        try:
            self._size = os.fstat(self.fd).st_size
            self._extensions = 0  # bytes so far
            self._members = {member.name: member for member in self._walk()}
        except BaseException:
            os.close(self.fd)
            raise

    def find(self, name: str) -> Member | None:
        """The file of that name, or that a link of that name leads to."""
        member = self._members.get(_normal(name))
        for _ in range(_MAX_LINKS):
            if member is None or member.link is None:
                return member
            member = self._members.get(member.link)
        raise ImageError(f"{self.path}: {name!r} leads over more than {_MAX_LINKS} links; make the archive again")

    def read(self, name: str) -> bytes | None:
        """A small file's bytes; None where there is none."""
        member = self.find(name)
        if member is None:
            return None
        if member.size > MAX_MANIFEST_SIZE:
            raise ImageError(f"{self.path}: {name!r} has {member.size} bytes, over the limit of {MAX_MANIFEST_SIZE}")
        return read_all_at(self.fd, member.offset, member.size)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    # ---------------------------------------------------------------------------------------------- headers

    def _walk(self) -> Iterator[Member]:
        place = 0
        special: dict[str, str] = {}
        for _ in range(_MAX_MEMBERS):
            block = self._block(place)
            if not block:
                return
            kind, size = block[156:157], self._number(block[124:136], place)
            place += _BLOCK
            if kind in b"xgLK":
                special |= self._special(kind, place, size)
            else:
                size = 0 if kind in b"123456" else int(special.get("size", size))
                if kind == b"S":
                    raise self._sparse(place)
                if place + size > self._size:
                    raise ImageError(f"{self.path}: ends too early, within the file at byte {place}; copy it again")
                member = _member(block, special, place, size)
                if member is not None:
                    yield member
                special = {}
            place += size + padding(size)
        raise ImageError(f"{self.path}: over {_MAX_MEMBERS} members; this is no archive of images")

    def _block(self, place: int) -> bytes:
        """The header there; nothing at the end of the tar."""
        block = read_all_at(self.fd, place, _BLOCK)
        if not block.strip(b"\0") and (block or place):
            return b""
        if len(block) < _BLOCK or sum(block) - sum(block[148:156]) + 8 * 0x20 != self._number(block[148:156], place):
            raise ImageError(f"{self.path}: there is no tar header at byte {place}; it is damaged, or no tar")
        return block

    def _number(self, field: bytes, place: int) -> int:
        if field[0] == 0x80:
            return int.from_bytes(field[1:], "big")
        digits = field.partition(b"\0")[0].strip(b" ")
        if not re.fullmatch(rb"[0-7]*", digits):
            raise ImageError(f"{self.path}: there is no tar header at byte {place}; it is damaged, or no tar")
        return int(digits or b"0", 8)

    def _special(self, kind: bytes, place: int, size: int) -> dict[str, str]:
        """What an extended header says of the next entry, as far as it matters here."""
        self._extensions += size
        if size > _MAX_EXTENSION or self._extensions > _MAX_EXTENSIONS or place + size > self._size:
            raise ImageError(f"{self.path}: has an extended header of {size} bytes at byte {place}; make it again")
        data = read_all_at(self.fd, place, size)
        if kind == b"x":
            return self._records(data, place)
        return {} if kind == b"g" else {"path" if kind == b"L" else "linkpath": _text(data)}

    def _records(self, data: bytes, place: int) -> dict[str, str]:
        found = {}
        at = 0
        while at < len(data):
            match = _RECORD.match(data, at)
            end = at + int(match[1]) if match else 0
            if match is None or not match.end() < end <= len(data) or data[end - 1 : end] != b"\n":
                raise ImageError(f"{self.path}: has a malformed PAX record at byte {place}; make the archive again")
            key, value = _text(match[2]), _text(data[match.end() : end - 1])
            if key.startswith("GNU.sparse"):
                raise self._sparse(place)
            if key == "size" and not re.fullmatch(r"[0-9]{1,18}", value):
                raise ImageError(f"{self.path}: has a malformed size at byte {place}; make the archive again")
            if key in ("path", "linkpath", "size"):
                found[key] = value
            at = end
        return found

    def _sparse(self, place: int) -> ImageError:
        return ImageError(f"{self.path}: has a sparse file at byte {place}; make the tar without --sparse")


def _open(path: str) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(21, os.strerror(21))
        magic = read_all_at(fd, 0, 4) if stat.S_ISREG(mode) else b""
        if magic == b"\x28\xb5\x2f\xfd":
            raise ImageError(f"{path}: is compressed by zstd; decompress it first: zstd -d")
        if stat.S_ISREG(mode) and magic[:2] != b"\x1f\x8b":
            return os.dup(fd)
        return _spooled(fd, path)
    finally:
        quietly(os.close, fd)


def _spooled(fd: int, path: str) -> int:
    """A nameless file with what is read from ``fd``, uncompressed."""
    with open(fd, "rb", closefd=False) as source, tempfile.TemporaryFile() as spool:
        readable = gzip.GzipFile(fileobj=source) if source.peek(2)[:2] == b"\x1f\x8b" else source
        try:
            while data := readable.read(_PIECE):
                _spool(data, spool)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ImageError(f"{path}: bad gzip data ({error}); it is damaged, copy it again") from None
        _spool(b"", spool)
        return os.dup(spool.fileno())


def _spool(data: bytes, spool: IO[bytes]) -> None:
    try:
        spool.write(data)
        if not data:
            spool.flush()
    except OSError as error:
        place = tempfile.gettempdir()
        raise SinkError(f"{place}: cannot be written: {error.strerror}; free some space or set TMPDIR") from error


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode("utf-8", "surrogateescape")


def _normal(name: str) -> str:
    return posixpath.normpath("/" + name).lstrip("/")


def _member(block: bytes, special: dict[str, str], place: int, size: int) -> Member | None:
    """A file or link; None for everything else."""
    kind = block[156:157]
    name, link = _field(block, 0, 100), _field(block, 157, 100)
    if block[257:263] == b"ustar\0" and block[345]:
        name = f"{_field(block, 345, 155)}/{name}"
    name, link = special.get("path", name), special.get("linkpath", link)
    if kind not in b"0\0" + b"712" or max(len(name), len(link)) > _MAX_NAME:
        return None
    if kind == b"2":  # from the directory that the link is in
        link = posixpath.join(posixpath.dirname(_normal(name)), link)
    return Member(_normal(name), place, size, _normal(link) if kind in b"12" else None)


def _field(block: bytes, start: int, size: int) -> str:
    return _text(block[start : start + size].partition(b"\0")[0])


# --------------------------------------------------------------------------------------------------------------------
# writing


def header(name: str, size: int, *, directory: bool = False) -> bytes:
    """A header that is the same whoever writes it, and when."""
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o755 if directory else 0o644
    info.type = tarfile.DIRTYPE if directory else tarfile.REGTYPE
    return info.tobuf(tarfile.PAX_FORMAT)


def padding(size: int) -> int:
    """Zero bytes behind a member of that size."""
    return -size % _BLOCK
