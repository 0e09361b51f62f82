"""An eStargz blob as a tree of files, without downloading it: bytes leave here only after their digest was checked.

source -> footer -> TOC member -> SHA-256 -> Table -> path -> chunks -> verified bytes
"""

from __future__ import annotations

import base64
import errno
import io
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, Self

from estargz._inflate import InflateReader, detect
from estargz.digest import parse_digest
from estargz.errors import BlobError, UsageError, brief
from estargz.reading.content import BufferedContent, Chunk, ContentFile, Contents, RegularFile
from estargz.reading.footer import footer_of, read_toc, require_footer
from estargz.reading.source import Readable, Source, Window, blob_errors, open_source
from estargz.reading.toc import LANDMARKS, Limits, TOCEntry, load_table, modtime_seconds, owners

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Blob", "Chunk", "open", "open_tar"]

WHITEOUT = ".wh."
OPAQUE = ".wh..wh..opq"
_LINKS_MAX = 40  # Linux's own limit of symbolic links on a way
_IMPLIED_MODE = 0o755  # of a directory that no entry describes
_TYPE_BITS = {
    "dir": stat.S_IFDIR,
    "reg": stat.S_IFREG,
    "hardlink": stat.S_IFREG,
    "symlink": stat.S_IFLNK,
    "char": stat.S_IFCHR,
    "block": stat.S_IFBLK,
    "fifo": stat.S_IFIFO,
}


class Tar(Protocol):
    """A tar stream to read from."""

    def read(self, size: int = -1, /) -> bytes: ...
    def readinto(self, buffer: Any, /) -> int | None: ...


class Blob:
    """An eStargz blob that is open for reading; made by open(), to be closed, best by ``with``.

    toc_digest:  "sha256:..." of the TOC's JSON
    toc_offset:  where the TOC's member begins: compressed bytes of the tar
    toc_size:    bytes of the JSON
    size:        bytes of the blob
    footer:      its Footer
    toc:         the table: a sequence of TOCEntry in the order of the tar, chunks after their file
    entries:     the same as a structured array, one row an entry; its fields are told at Table.rows

    This is the view that lazily pulling runtimes serve; it equals the tar's only after verify(). Names are cleaned to be
    relative to the root; of entries with the same name the last one counts. Methods that take a path follow symbolic
    links inside the layer as if its root were "/", unless they say otherwise. A link whose target is in another layer
    leads to FileNotFoundError. Methods may be used from several threads.

    Every method that returns content raises BlobError when the blob's data is damaged, and VerificationError when it is
    not what the TOC promises.
    """

    def __init__(self, source: Source, toc_digest: str | None, limits: Limits) -> None:
        if toc_digest is not None:
            parse_digest(toc_digest, "TOC digest")
        self._source = source
        self.name = source.name
        self.size = source.size
        self.footer = require_footer(source)
        self.toc_offset = self.footer.toc_offset
        stored = read_toc(source, self.footer, limits.toc_size, toc_digest)
        self.toc_end, self.toc_digest, self.toc_size = stored.end, stored.digest, stored.size
        self.toc = load_table(stored.pieces, self.toc_offset, limits, name=f"{self.name}: TOC")
        self._contents = Contents(source)
        self._targets: dict[int, int | str] = {}  # row of a hard link -> what it leads to, or why it does not

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the source back; closing twice does no harm."""
        self._source.close()

    @property
    def entries(self) -> NDArray[np.void]:
        return self.toc.rows

    # ----------------------------------------------------------------------------------------------- names

    def __contains__(self, path: str) -> bool:
        return self._find(path) >= 0

    def lookup(self, path: str) -> TOCEntry:
        """The entry whose name is ``path``; links are not followed, not even on the way.

        A directory that has no entry of its own, but something in it, comes as one with mode 0755, as runtimes serve it.
        Raises FileNotFoundError.
        """
        return self._entry(self._require(path))

    def listdir(self, path: str = "") -> list[str]:
        """The names in a directory, sorted; landmarks and whiteouts, which no runtime shows, are left out.

        Raises FileNotFoundError, NotADirectoryError.
        """
        node = self._resolve(path)
        if self._entry(node).type != "dir":
            raise NotADirectoryError(errno.ENOTDIR, "is no directory", f"{self.name}: {path}")
        names = (self.toc.tree.describe(child)[0] for child in self.toc.tree.children(node))
        return sorted(name for name in names if not self._is_marker(node, name))

    def stat(self, path: str, *, follow_symlinks: bool = True) -> os.stat_result:
        """What ``os.stat`` would tell of the path; st_ino is the entry's number, the same for all hard links of a file.

        Times are whole seconds; all three are the modification time. Raises FileNotFoundError.
        """
        node = self._resolve(path, follow_last=follow_symlinks)
        row, entry = self._link_target(node)
        try:
            mtime = modtime_seconds(entry.modtime)
        except ValueError as error:
            raise BlobError(f"{self.name}: {brief(entry.name)!r}: modtime {error}; build the blob again") from None
        mode = _TYPE_BITS[entry.type] | entry.mode & 0o7777
        links = 1 + self._hard_links.get(row, 0)
        size = len(entry.link_name.encode()) if entry.type == "symlink" else entry.size
        numbers = (mode, row + 1, 0, links, entry.uid, entry.gid, size, mtime, mtime, mtime)
        device = self._device(entry) if entry.type in ("char", "block") else 0
        nanoseconds = mtime * 10**9
        more = {"st_atime_ns": nanoseconds, "st_mtime_ns": nanoseconds, "st_ctime_ns": nanoseconds, "st_rdev": device}
        return os.stat_result(numbers, more)

    def _device(self, entry: TOCEntry) -> int:
        if not (0 <= entry.dev_major < 2**31 and 0 <= entry.dev_minor < 2**31):  # more than Linux has, and Python takes
            raise BlobError(
                f"{self.name}: {brief(entry.name)!r}: no device has the numbers {entry.dev_major}, {entry.dev_minor}"
            )
        return os.makedev(entry.dev_major, entry.dev_minor)

    def type_of(self, path: str, *, follow_symlinks: bool = True) -> str:
        """dir, reg, symlink, char, block or fifo; a hard link is what it leads to. Raises FileNotFoundError."""
        return self._link_target(self._resolve(path, follow_last=follow_symlinks))[1].type

    def readlink(self, path: str) -> str:
        """The target of a symbolic link, verbatim. Raises FileNotFoundError, OSError when it is none."""
        entry = self._entry(self._resolve(path, follow_last=False))
        if entry.type != "symlink":
            raise OSError(errno.EINVAL, "is no symbolic link", f"{self.name}: {path}")
        return entry.link_name

    def xattrs(self, path: str, *, follow_symlinks: bool = True) -> dict[str, bytes]:
        """The extended attributes of a path. Raises FileNotFoundError, BlobError for values that are no base64."""
        _, entry = self._link_target(self._resolve(path, follow_last=follow_symlinks))
        try:
            return {key: base64.b64decode(value, validate=True) for key, value in entry.xattrs.items()}
        except ValueError as error:
            raise BlobError(f"{self.name}: {brief(entry.name)!r}: attribute: {error}; build the blob again") from None

    def owner(self, path: str, *, follow_symlinks: bool = True) -> tuple[str, str]:
        """User and group name of a path, "" for none; the table states a name where it first belongs to an id."""
        row, _ = self._link_target(self._resolve(path, follow_last=follow_symlinks))
        return self._owners[row] if row >= 0 else ("", "")

    @cached_property
    def landmark(self) -> str | None:
        """ "prefetch", "no-prefetch", or None when the layer has no landmark. With both nothing is prefetched."""
        found = {kind for name, kind in LANDMARKS.items() if self._is_file(name)}
        return next((kind for kind in ("no-prefetch", "prefetch") if kind in found), None)

    @cached_property
    def prefetch_size(self) -> int:
        """Bytes at the beginning of the blob that a runtime fetches ahead: up to the prefetch landmark; 0 without one."""
        name = next(name for name, kind in LANDMARKS.items() if kind == "prefetch")
        return min(self.lookup(name).offset, self.toc_offset) if self.landmark == "prefetch" else 0

    def whiteouts(self) -> list[str]:
        """Paths that the layer removes from those below it, in the order of the table."""
        return [os.path.join(parent, name[len(WHITEOUT) :]) for parent, name in self._markers if name != OPAQUE]

    def opaques(self) -> list[str]:
        """Directories whose content in lower layers the layer hides, in the order of the table; "" is the root."""
        return [parent for parent, name in self._markers if name == OPAQUE]

    # ----------------------------------------------------------------------------------------------- content

    def open(self, path: str) -> io.BufferedReader:
        """A regular file, for reading and seeking. It fetches and checks only the chunks that it touches.

        Raises FileNotFoundError, IsADirectoryError, BlobError; while being read, BlobError and what the source raises.
        """
        return BufferedContent(ContentFile(self._contents, self._file(path)), 64 << 10)

    def read(self, path: str) -> bytes:
        """The content of a regular file. Raises FileNotFoundError, IsADirectoryError, BlobError."""
        return b"".join(self.stream(path))

    def stream(self, path: str) -> Iterator[bytes]:
        """The content of a regular file in parts, each checked before it is given out.

        A part is one chunk, except that a file of several chunks without digests of their own (made before they were
        introduced) comes as one. After the last part the digest of the whole file is checked too. Parts above 1 GiB
        are refused. Raises FileNotFoundError, IsADirectoryError and BlobError, at once or while being consumed.
        """
        return self._contents.stream(self._file(path))

    def chunks(self, path: str) -> list[Chunk]:
        """The parts of a regular file in order; empty for an empty file.

        A chunk's digest is "" when the TOC states none for it. Raises FileNotFoundError, IsADirectoryError, BlobError.
        """
        return list(self._file(path).chunks)

    def byte_ranges(self, paths: Iterable[str]) -> NDArray[np.int64]:
        """The parts of the blob that hold the content of these paths and of all that is below them.

        Returns [begin, end) offsets, shape (ranges, 2), ascending, neighbours merged. Symbolic links are followed for the
        paths themselves, not for what is below them; hard links always. Raises FileNotFoundError.
        """
        import numpy as np

        chosen = np.zeros(len(self.toc), bool)
        for path in paths:
            chosen[self.toc.tree.below(self._resolve(path))] = True
        for link in np.flatnonzero(chosen & (self.entries["type"] == b"hardlink")).tolist():
            chosen[self._follow_hard_links(link)] = True
        with_payload = self.entries["end"] > 0
        rows = self.entries[chosen[self.files_of_rows] & with_payload]
        return _merged(rows["offset"], rows["end"])

    def prefetch(self, paths: Iterable[str] | None = None) -> int:
        """Have a distant source fetch the content of these paths, or, without any, what the landmark prioritises.

        Returns the bytes of the blob that are meant. Sources without a cache do nothing.
        """
        if paths is None:
            wanted = [(0, self.prefetch_size)] if self.prefetch_size else []
        else:
            wanted = [(begin, end - begin) for begin, end in self.byte_ranges(paths).tolist()]
        self._source.prefetch(wanted)
        return sum(size for _, size in wanted)

    def open_tar(self) -> Tar:
        """The original tar stream, as it was before the TOC was appended: has read() and readinto().

        It is checked by gzip's CRC-32 only. Raises BlobError while being read.
        """
        if self.toc_offset == 0:
            return io.BytesIO()
        return InflateReader(self.raw(0, self.toc_offset), "gzip", name=self.name, strict=True)

    def raw(self, begin: int, end: int) -> Window:
        """The compressed bytes [begin, end), for stages that inflate them."""
        return Window(self._source, begin, end)

    @property
    def kernel_source(self) -> int | memoryview | None:
        """What the kernels read themselves: a descriptor or a buffer; None for a RangeReader."""
        return self._source.kernel

    # ----------------------------------------------------------------------------------------------- paths

    def _find(self, path: str) -> int:
        """The node of this very name, or -1."""
        try:
            return self.toc.tree.find(path)
        except ValueError as error:
            raise BlobError(f"{self.name}: TOC: {error}") from None

    def _require(self, path: str) -> int:
        node = self._find(path)
        if node < 0 or (node == 0 and not len(self.toc)):
            raise self._missing(path)
        return node

    def _missing(self, path: str, why: str = "no such entry in the TOC") -> FileNotFoundError:
        return FileNotFoundError(errno.ENOENT, why, f"{self.name}: {path}")

    def _row(self, node: int) -> int:
        return self.toc.tree.describe(node)[2]

    def _entry(self, node: int) -> TOCEntry:
        row = self._row(node)
        return self.toc[row] if row >= 0 else TOCEntry(self._path(node) + "/", "dir", mode=_IMPLIED_MODE)

    def _path(self, node: int) -> str:
        parts = []
        while node > 0:
            name, node, _ = self.toc.tree.describe(node)
            parts.append(name)
        return "/".join(reversed(parts))

    def _is_file(self, path: str) -> bool:
        node = self._find(path)
        return node >= 0 and self._entry(node).type == "reg"

    def _is_marker(self, parent: int, name: str) -> bool:
        return name.startswith(WHITEOUT) or (parent == 0 and name in LANDMARKS)

    def _resolve(self, path: str, *, follow_last: bool = True) -> int:
        """The node that a path leads to, through symbolic links inside the layer."""
        node = self._find(path)
        if node >= 0 and self._is_plain(path, node) and not (follow_last and self._is_link(node)):
            return node
        left = [part for part in reversed(path.split("/")) if part not in ("", ".")]
        node = links = 0
        while left:
            part = left.pop()
            if part == "..":
                self._expect_directory(node, path)
                node = max(self.toc.tree.describe(node)[1], 0)
                continue
            below = self.toc.tree.find_below(node, part)
            if below < 0:
                self._expect_directory(node, path)
                raise self._missing(
                    path, "no such entry in the TOC" if not links else "leads to no entry of this layer"
                )
            entry = self._entry(below)
            if entry.type != "symlink" or not (left or follow_last):
                node = below
                continue
            links += 1
            if links > _LINKS_MAX:
                raise OSError(errno.ELOOP, "too many symbolic links", f"{self.name}: {path}")
            left += [part for part in reversed(entry.link_name.split("/")) if part not in ("", ".")]
            node = 0 if entry.link_name.startswith("/") else node
        if path.endswith(("/", "/.")):
            self._expect_directory(node, path)
        return node

    def _is_link(self, node: int) -> bool:
        row = self._row(node)
        return row >= 0 and self.toc.tree.facts(row)["type"] == "symlink"

    def _is_plain(self, path: str, node: int) -> bool:
        """Whether a path spells the entry that it finds: nothing on the way is a link, or needs to be a directory."""
        if ".." in path or path.endswith(("/", "/.")):
            return False
        while (node := self.toc.tree.describe(node)[1]) > 0:
            if self._is_link(node):
                return False
        return True

    def _expect_directory(self, node: int, path: str) -> None:
        if self._entry(node).type != "dir":
            raise NotADirectoryError(errno.ENOTDIR, "is no directory", f"{self.name}: {path}")

    def _follow_hard_links(self, row: int) -> int:
        """The row that holds what a hard link stands for. What was found once is kept for all links on the way."""
        way: dict[int, None] = {}
        while row not in self._targets and (entry := self.toc[row]).type == "hardlink":
            way[row] = None
            node = self._find(entry.link_name)
            row = self._row(node) if node >= 0 else -1
            wrong = ""
            if row < 0:
                wrong = f"{self.name}: {brief(entry.name)!r} links to {brief(entry.link_name)!r}, which is not there"
            elif row in way:
                wrong = f"{self.name}: {brief(self.toc[row].name)!r} is a hard link that leads back to itself"
            if wrong:
                self._targets.update(dict.fromkeys(way, wrong))
                raise BlobError(wrong)
        target = self._targets.get(row, row)
        self._targets.update(dict.fromkeys(way, target))
        if isinstance(target, str):
            raise BlobError(target)
        return target

    def _link_target(self, node: int) -> tuple[int, TOCEntry]:
        row = self._row(node)
        if row < 0:
            return row, self._entry(node)
        row = self._follow_hard_links(row)
        return row, self.toc[row]

    def _file(self, path: str) -> RegularFile:
        if not len(self.toc):
            raise self._missing(path)
        row, entry = self._link_target(self._resolve(path))
        if entry.type == "dir":
            raise IsADirectoryError(errno.EISDIR, "is a directory", f"{self.name}: {path}")
        if entry.type != "reg":
            raise BlobError(f"{self.name}: {path!r} is of type {entry.type}, only regular files have content")
        return RegularFile(entry.name, entry.size, entry.digest, self.chunks_at(row))

    def chunks_at(self, row: int) -> list[Chunk]:
        """The parts of the regular file that stands at ``row`` of the table, even if a later entry hides it."""
        file = self.toc[row]
        if file.size == 0:
            return []
        parts: list[Chunk] = []
        covered = 0
        while covered < file.size:  # the table was checked: its chunks cover the file
            entry = self.toc[row + len(parts)]
            size = entry.chunk_size or file.size - entry.chunk_offset
            digest = entry.chunk_digest or (file.digest if size == file.size else "")
            end = self.toc.tree.facts(row + len(parts))["end"]
            parts.append(Chunk(entry.offset, end, entry.inner_offset, entry.chunk_offset, size, digest))
            covered += size
        return parts

    # ----------------------------------------------------------------------------------------------- what all rows say

    @cached_property
    def files_of_rows(self) -> NDArray[np.int64]:
        """For each row the row of its file: its own, or for a chunk that of the file before it."""
        import numpy as np

        numbers = np.arange(len(self.toc), dtype=np.int64)
        return np.maximum.accumulate(np.where(self.entries["type"] == b"chunk", 0, numbers))

    @cached_property
    def _owners(self) -> list[tuple[str, str]]:
        return list(owners(self.toc))

    @cached_property
    def _hard_links(self) -> dict[int, int]:
        """Row of a file -> how many hard links lead to it."""
        counts: dict[int, int] = {}
        for row in self.toc.tree.hard_links():
            try:
                target = self._follow_hard_links(row)
            except BlobError:
                continue  # it will be raised for who asks for that link
            counts[target] = counts.get(target, 0) + 1
        return counts

    @cached_property
    def _markers(self) -> list[tuple[str, str]]:
        """Parent and name of every whiteout."""
        found = []
        for row in self.toc.tree.with_prefix(WHITEOUT):
            node = self._find(self.toc[row].name)
            name, parent, last = self.toc.tree.describe(node)
            if last == row and name.startswith(WHITEOUT):
                found.append((self._path(parent), name))
        return found


def _merged(begins: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ascending ranges, those that touch or overlap joined; shape (ranges, 2)."""
    import numpy as np

    if not len(begins):
        return np.empty((0, 2), np.int64)
    order = np.argsort(begins, kind="stable")
    begins, ends = begins[order], np.maximum.accumulate(ends[order])
    first = np.concatenate(([True], begins[1:] > ends[:-1]))
    last = np.concatenate((first[1:], [True]))
    return np.column_stack((begins[first], ends[last]))


def open(source: Readable, *, toc_digest: str | None = None, limits: Limits | None = None) -> Blob:
    """Open an eStargz blob, on disk, in memory or far away, without reading more than its end.

    source:      a path, a URL, a file with a descriptor (duplicated, its position is left alone), bytes, or a RangeReader
    toc_digest:  "sha256:..." that the TOC must have; without it a TOC is believed as it stands in the blob
    limits:      what the TOC may ask for; it is hashed before it is decoded

    Raises UsageError for a malformed digest, OSError, BlobError for a blob that is no eStargz or is malformed, and
    VerificationError for another TOC digest.
    """
    if not isinstance(limits or Limits(), Limits):
        raise UsageError(f"limits are Limits(...), not {limits!r}")
    opened = open_source(source)
    try:
        return Blob(opened, toc_digest, limits or Limits())
    except BaseException:
        opened.close()
        raise


def begins_like_tar(block: bytes) -> bool:
    """Whether 512 bytes are a zero block or a header whose checksum is right (POSIX ustar, unsigned or signed)."""
    if len(block) < 512:
        return False
    stated = block[148:156].strip(b" \0")
    rest = block[:148] + b" " * 8 + block[156:]
    sums = {sum(rest), sum(byte - 256 if byte > 127 else byte for byte in rest)}
    return not any(block) or (stated.isdigit() and int(stated, 8) in sums if set(stated) <= set(b"01234567") else False)


@contextmanager
def open_tar(source: Readable) -> Iterator[Tar]:
    """The tar inside a layer of any kind: an eStargz blob's original tar, or a gzip, zstd or plain stream's content.

    The TOC of an eStargz blob is neither read nor included. Raises OSError, and BlobError or SourceError while being
    read.
    """
    opened = open_source(source)
    try:
        footer = footer_of(opened)
        end = opened.size if footer is None else footer.toc_offset
        kind = detect(opened.read_at(0, 4))
        window = Window(opened, 0, end)
        if kind == "plain" and footer is None and not begins_like_tar(opened.read_at(0, 512)):
            raise BlobError(f"{opened.name}: is neither a compressed layer nor a tar; check that it is the right file")
        with blob_errors():
            yield io.BytesIO() if end == 0 else InflateReader(window, kind, name=opened.name, strict=footer is not None)
    finally:
        opened.close()
