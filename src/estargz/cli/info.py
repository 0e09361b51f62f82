"""estargz info: what a blob is, in a few lines; or what this installation writes blobs with."""

from __future__ import annotations

import hashlib
import json
import platform
from typing import Any

import click

import estargz
from estargz.errors import UsageError
from estargz.options import DEFAULT_LEVEL, DEFAULT_PORTABLE_LEVEL, MAX_LEVEL, encoder
from estargz.reading import blob as blobs
from estargz.reading.blob import Blob


@click.command("info")
@click.argument("blob", type=click.Path(), required=False)
@click.option("--digest", is_flag=True, help="Read the whole blob for its own digest too.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def command(blob: str | None, digest: bool, as_json: bool) -> None:
    """Show BLOB's format, sizes in bytes, digests, and how many entries of each type it has.

    Only the footer and the table of contents are read, and nothing but the latter's own checksum is proved.

    Without BLOB: what this installation compresses with, level by level. Where two machines show the same, they write the same
    bytes (docs/reproducible.md).
    """
    if blob is None:
        if digest:
            raise UsageError("a digest is of a blob; name one, or leave --digest out")
        installation = describe_installation()
        click.echo(json.dumps(installation) if as_json else table_of(installation))
        return
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


def describe_installation() -> dict[str, Any]:
    """The libraries that are loaded, and whose bytes each level has."""
    from estargz import _codec

    levels = [
        {
            "level": level,
            "encoder": encoder("estargz", level),
            "portable_encoder": encoder("estargz", level, portable=True) if level else None,
            "depends_on_cpu": encoder("estargz", level).startswith("isal"),
        }
        for level in range(MAX_LEVEL + 1)
    ]
    return {
        "version": estargz.__version__,
        "machine": platform.machine(),
        "cpu": _codec.cpu_class(),
        "libraries": {name: {"version": version, "file": file} for name, (version, file) in _codec.libraries().items()},
        "levels": levels,
        "zstd_encoder": encoder("zstd"),
    }


def table_of(installation: dict[str, Any]) -> str:
    lines = [f"estargz {installation['version']} on {installation['machine']}, CPU of class {installation['cpu']}", ""]
    lines += [f"{name:<12} {of['version']:<9} {of['file']}" for name, of in installation["libraries"].items()]
    rows = [("level", "estargz, gzip", "", "with --portable")]
    for row in installation["levels"]:
        shown = row["encoder"] + (" *" if row["level"] == DEFAULT_LEVEL else "")
        note = "depends on the CPU" if row["depends_on_cpu"] else ""
        portable = (row["portable_encoder"] or "none") + (" *" if row["level"] == DEFAULT_PORTABLE_LEVEL else "")
        rows.append((row["level"], shown, note, portable))
    rows.append(("zstd", installation["zstd_encoder"], "", "the same"))
    return "\n".join(
        [*lines, "", *(f"{level:<12} {shown:<27} {note:<19} {portable}" for level, shown, note, portable in rows)]
    )


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
