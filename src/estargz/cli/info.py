"""estargz info: what a blob is, in a few lines."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import click

from estargz.reading import blob as blobs
from estargz.reading.blob import Blob


@click.command("info")
@click.argument("blob", type=click.Path())
@click.option("--digest", is_flag=True, help="Read the whole blob for its own digest too.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def command(blob: str, digest: bool, as_json: bool) -> None:
    """Show BLOB's format, sizes in bytes, digests, and how many entries of each type it has.

    Only the footer and the table of contents are read, and nothing but the latter's own checksum is proved.
    """
    with blobs.open(blob) as opened:
        facts = describe(opened)
        if digest:
            facts["digest"] = _digest(opened)
    if as_json:
        click.echo(json.dumps(facts))
        return
    for key, value in facts.items():
        shown = ", ".join(f"{count} {kind}" for kind, count in value.items()) if isinstance(value, dict) else value
        click.echo(f"{key.replace('_', ' ') + ':':<16} {'none' if shown is None or shown == '' else shown}")


def describe(blob: Blob) -> dict[str, Any]:
    """What the footer and the TOC tell."""
    import numpy as np

    kinds, numbers = np.unique(blob.entries["type"], return_counts=True)
    counts = {kind.decode(): int(number) for kind, number in zip(kinds, numbers, strict=True) if kind != b"chunk"}
    return {
        "format": blob.footer.format,
        "size": blob.size,
        "toc_digest": blob.toc_digest,
        "toc_offset": blob.toc_offset,
        "toc_size": blob.toc_size,
        "overhead": blob.size - blob.toc_offset,  # compressed TOC and footer
        "entries": counts,
        "chunks": int((blob.entries["end"] > 0).sum()),
        "payload_size": int(blob.entries["size"][blob.entries["type"] == b"reg"].sum()),
        "landmark": blob.landmark,
        "prefetch_size": blob.prefetch_size,
    }


def _digest(blob: Blob) -> str:
    whole = hashlib.sha256()
    window = blob.raw(0, blob.size)
    block = memoryview(bytearray(1 << 20))
    while count := window.readinto(block):
        whole.update(block[:count])
    return "sha256:" + whole.hexdigest()
