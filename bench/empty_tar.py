"""Tar streams of empty files, made fast enough that making them is not what is measured."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator

CHECKSUM = slice(148, 156)
AT_ONCE = 4096
FILES_PER_DIRECTORY = 1000


def template() -> bytes:
    """The header of an empty file without a name, its checksum not yet stated."""
    info = tarfile.TarInfo()
    info.mtime = 1_700_000_000
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    header[CHECKSUM] = b" " * 8
    return bytes(header)


def pieces(count: int) -> Iterator[bytes]:
    """The stream, some thousand headers at a time."""
    blank = template()
    rest, blank_sum = blank[156:], sum(blank)
    for first in range(0, count, AT_ONCE):
        headers = []
        for number in range(first, min(first + AT_ONCE, count)):
            name = b"usr/share/d%04d/f%07d.txt" % (number // FILES_PER_DIRECTORY, number)
            headers += [name, blank[len(name) : 148], b"%06o\0 " % (blank_sum + sum(name)), rest]
        yield b"".join(headers)
    yield bytes(1024)
