"""The gzip members of a blob, one by one: where each begins, compressed and inflated."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np

from estargz._inflate import InflateReader
from estargz.reading.blob import Blob
from estargz.reading.source import Window, blob_errors

__all__ = ["MemberReader"]

_FIRST_READ = 4096  # bytes


class MemberReader:
    """The tar stream of a blob, as Blob.open_tar() gives it, noting on the way where its members begin.

    offsets:         where members begin in the blob, ascending: the first one, and those that the TOC names
    positions:       where their first bytes stand in the inflated stream
    adorned:         members whose header has optional fields (a name, a comment, extra fields), of all that there are
    first_adorned:   where the first of them begins in the blob; -1: none

    Members are found by inflating what lies in front of them, never by looking for their magic number: what looks like
    one in the header or in the data of another is none.
    """

    def __init__(self, blob: Blob) -> None:
        self.offsets = array("q")
        self.positions = array("q")
        self.adorned = 0
        self.first_adorned = -1
        self._blob = blob
        self._borders = np.append(np.unique(blob.entries["offset"]), blob.toc_offset)
        self._next = 0  # the first border behind the member
        self._at = self._position = 0
        self._open: tuple[InflateReader, _Bytes] | None = None

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer; less than its length only at the end. Raises BlobError for damaged members."""
        view = memoryview(buffer)
        done = 0
        with blob_errors():
            while done < len(view):
                if self._open is None:
                    if self._at == self._blob.toc_offset:
                        break
                    self._open = self._begin(self._position + done)
                member, source = self._open
                count = member.readinto(view[done:])
                if count < len(view) - done:
                    self._end(member, source)
                done += count
        self._position += done
        return done

    def _begin(self, position: int) -> tuple[InflateReader, _Bytes]:
        while self._borders[self._next] <= self._at:
            self._next += 1
        if self._at == 0 or (self._next and self._borders[self._next - 1] == self._at):
            self.offsets.append(self._at)
            self.positions.append(position)
        border = int(self._borders[self._next])
        source = _Bytes(self._blob.raw(self._at, self._blob.toc_offset), border)
        name = f"{self._blob.name}: member at byte {self._at}"
        return InflateReader(source, "gzip", name=name, single=True, strict=True), source

    def _end(self, member: InflateReader, source: _Bytes) -> None:
        if source.header_flags:
            self.first_adorned = self._at if not self.adorned else self.first_adorned
            self.adorned += 1
        self._at += member.offset
        self._open = None


class _Bytes:
    """The compressed bytes from a member's first one on.

    Little more is read than the member is long, since what lies behind it will be read again: not beyond where the TOC says
    that the next one begins, and first little, then more.
    """

    def __init__(self, window: Window, border: int) -> None:
        self.header_flags = 0
        self._window, self._border = window, border
        self._begin = window.at
        self._most = _FIRST_READ

    def readinto(self, buffer: memoryview) -> int:
        at = self._window.at
        room = min(self._border - at, self._most) if at < self._border else self._most
        self._most *= 2
        count = self._window.readinto(buffer[:room])
        if at == self._begin and count > 3:
            self.header_flags = buffer[3]
        return count
