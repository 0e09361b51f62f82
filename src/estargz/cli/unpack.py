"""estargz unpack: the tar inside a layer."""

from __future__ import annotations

import sys

import click

from estargz.cli.build import terminated_cleanly
from estargz.reading import blob as blobs
from estargz.writing.sink import open_sink


@click.command("unpack")
@click.argument("blob", type=click.Path())
@click.option("-o", "--output", required=True, metavar="TAR", help="File to write; - is standard output.")
def command(blob: str, output: str) -> None:
    """Write the original tar of BLOB, without the table of contents.

    An ordinary gzip, zstd or uncompressed layer is written inflated. A file appears under its name only when complete.
    """
    block = memoryview(bytearray(1 << 20))
    dest = sys.stdout.buffer if output == "-" else output
    with terminated_cleanly(), blobs.open_tar(blob) as tar, open_sink(dest) as sink:
        while count := tar.readinto(block):
            sink.write(bytes(block[:count]))
    sys.stdout.flush()
