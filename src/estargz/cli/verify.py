"""estargz verify: the checks of estargz.reading.verifying, and what they proved."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from estargz.reading.findings import FAMILIES
from estargz.reading.verifying import Report, verify


@click.command("verify")
@click.argument("blob", type=click.Path())
@click.option("--toc-digest", metavar="SHA256", help="Digest that the table of contents must have.")
@click.option("--diff-id", metavar="SHA256", help="Digest that the inflated stream must have.")
@click.option("--threads", type=click.IntRange(1), help="Threads that inflate chunks; default: one per CPU.")
@click.option("--strict", is_flag=True, help="Also list what readers take differently, and what runtimes refuse.")
@click.option(
    "--for",
    "runtimes",
    type=click.Choice(FAMILIES),
    multiple=True,
    help="What this runtime refuses is an error; may be repeated, implies --strict.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def command(
    blob: str,
    toc_digest: str | None,
    diff_id: str | None,
    threads: int | None,
    strict: bool,
    runtimes: tuple[str, ...],
    as_json: bool,
) -> int:
    """Prove that every byte of BLOB is what its table of contents, its tar and the given digests say.

    An ordinary gzip, zstd or uncompressed layer is checked when --diff-id alone is given. The exit status is 1 when
    anything does not match, and when --strict finds an error.
    """
    report = verify(blob, toc_digest=toc_digest, diff_id=diff_id, threads=threads, strict=strict, runtimes=runtimes)
    if as_json:
        click.echo(json.dumps(asdict(report)))
    else:
        for text in [*_lines(report, toc_digest, diff_id), *_strict_lines(report)]:
            click.echo(text)
    return 1 if report.errors else 0


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


def _strict_lines(report: Report) -> list[str]:
    lines = []
    for runtime, accepts in report.accepted.items():
        codes = sorted({finding.code for finding in report.findings if runtime in finding.runtimes})
        lines.append(f"{runtime:26}{'accepted' if accepts else 'not accepted: ' + ', '.join(codes)}")
    for finding in report.findings:
        where = "" if finding.entry is None else f"{finding.entry!r}: "
        lines.append(f"{finding.severity:12}{finding.code}: {where}{finding.message}")
    listed = len(report.findings)
    total = sum(report.finding_counts.values())
    if total > listed:
        lines.append(f"and {total - listed} more; at most 100 of a kind are listed")
    return lines
