"""estargz cat: one file out of a blob."""

from __future__ import annotations

import sys

import click

from estargz.reading import blob as blobs


@click.command("cat")
@click.argument("blob", type=click.Path())
@click.argument("path")
@click.option("--toc-digest", metavar="SHA256", help="Digest that the table of contents must have.")
def command(blob: str, path: str, toc_digest: str | None) -> None:
    """Write the regular file PATH of BLOB to standard output; hard links are followed.

    Nothing is written before its digest was checked against the table of contents.
    """
    with blobs.open(blob, toc_digest=toc_digest) as opened:
        for data in opened.stream(path):
            sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
