"""estargz info: what a blob is, in a few lines."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import Any

import click

from estargz.reading import blob as blobs
from estargz.reading.blob import Blob
from estargz.reading.toc import LANDMARKS, clean_name


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
    counts = Counter(entry.type for entry in blob.entries)
    files = [entry for entry in blob.entries if entry.type == "reg"]
    chunks = counts.pop("chunk", 0) + sum(entry.size > 0 for entry in files)
    marks = [LANDMARKS[name] for entry in files if (name := clean_name(entry.name)) in LANDMARKS]
    return {
        "format": blob.footer.format,
        "size": blob.size,
        "toc_digest": blob.toc_digest,
        "toc_offset": blob.toc_offset,
        "toc_size": blob.toc_size,
        "overhead": blob.size - blob.toc_offset,  # compressed TOC and footer
        "entries": dict(counts),
        "chunks": chunks,
        "payload_size": sum(entry.size for entry in files),
        "landmark": marks[0] if marks else None,
    }


def _digest(blob: Blob) -> str:
    whole = hashlib.sha256()
    window = blob.raw(0, blob.size)
    block = memoryview(bytearray(1 << 20))
    while count := window.readinto(block):
        whole.update(block[:count])
    return "sha256:" + whole.hexdigest()
