"""estargz unpack: the tar inside a layer."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import click

from .. import blob as blobs


@click.command("unpack")
@click.argument("blob", type=click.Path())
@click.option("-o", "--output", required=True, metavar="TAR", help="File to write; - is standard output.")
def command(blob: str, output: str) -> None:
    """Write the original tar of BLOB, without the table of contents.

    An ordinary gzip, zstd or uncompressed layer is written inflated. A file appears under its name only when complete.
    """
    block = memoryview(bytearray(1 << 20))
    with blobs.open_tar(blob) as tar, _open_output(output) as sink:
        while count := tar.readinto(block):
            sink.write(block[:count])


@contextmanager
def _open_output(destination: str) -> Iterator[BinaryIO]:
    """Standard output, or a temporary sibling that takes the destination's name once all is on disk."""
    if destination == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    target = Path(destination)
    fd, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(fd, "wb") as sink:
            yield sink
            sink.flush()
            os.fsync(fd)
        _publish(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _publish(temporary: str, target: Path) -> None:
    """Give the file the permissions that a newly created one gets, and its name."""
    umask = os.umask(0)
    os.umask(umask)
    Path(temporary).chmod(0o666 & ~umask)
    Path(temporary).replace(target)
