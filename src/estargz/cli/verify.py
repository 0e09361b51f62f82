"""estargz verify: the checks of estargz.reading.verifying, and what they proved."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from estargz.reading.verifying import Report, verify


@click.command("verify")
@click.argument("blob", type=click.Path())
@click.option("--toc-digest", metavar="SHA256", help="Digest that the table of contents must have.")
@click.option("--diff-id", metavar="SHA256", help="Digest that the inflated stream must have.")
@click.option("--threads", type=click.IntRange(1), help="Threads that inflate chunks; default: one per CPU.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def command(blob: str, toc_digest: str | None, diff_id: str | None, threads: int | None, as_json: bool) -> None:
    """Prove that every byte of BLOB is what its table of contents, its tar and the given digests say.

    An ordinary gzip, zstd or uncompressed layer is checked when --diff-id alone is given. The exit status is 1 when
    anything does not match.
    """
    report = verify(blob, toc_digest=toc_digest, diff_id=diff_id, threads=threads)
    if as_json:
        click.echo(json.dumps(asdict(report)))
        return
    for text in _lines(report, toc_digest, diff_id):
        click.echo(text)


def _lines(report: Report, toc_digest: str | None, diff_id: str | None) -> list[str]:
    stream = f"DiffID      {report.diff_id} of {report.uncompressed_size} bytes{_given(diff_id)}"
    if report.toc_digest is None:
        return [f"format      {report.format}, no eStargz: nothing but the stream was checked", stream]
    return [
        f"format      {report.format}, {report.size} bytes, nothing between its parts",
        f"TOC         {report.toc_digest}{_given(toc_digest)}",
        f"entries     {report.entries} in the TOC, each equal to the tar's",
        f"content     {report.payload_size} bytes, {report.files} files, {report.chunks} chunks: every digest right",
        stream,
    ]


def _given(digest: str | None) -> str:
    return ", as given" if digest else ", none given to compare with"
