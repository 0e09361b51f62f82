"""estargz extract: layers applied to a directory."""

from __future__ import annotations

import time

import click

from estargz.cli.build import Size, progress_bar, standard_input, terminated_cleanly
from estargz.cli.ls import escape
from estargz.errors import UsageError
from estargz.reading.extracting import Extracted, extract

_SHOWN = 20  # of what was left out


@click.command("extract")
@click.argument("blobs", nargs=-1, required=True, type=click.Path(), metavar="BLOB...")
@click.argument("directory", type=click.Path(), metavar="DIR")
@click.option("--path", "paths", multiple=True, metavar="PATH", help="Only this path and what is below it; repeatable.")
@click.option(
    "--diff-id",
    "diff_ids",
    multiple=True,
    metavar="SHA256",
    help="Digest that the inflated stream must have; one for each BLOB.",
)
@click.option("--threads", type=click.IntRange(1), metavar="N", help="Default: the CPUs this process may use.")
@click.option("--no-same-owner", is_flag=True, help="Own everything; leave out devices and what else needs root.")
@click.option("--no-xattrs", is_flag=True, help="Leave out extended attributes.")
@click.option("--max-size", type=Size(), metavar="N", help="Most bytes that all files may take.")
@click.option(
    "--max-entries",
    type=click.IntRange(0),
    default=10_000_000,
    metavar="N",
    help="Most entries, implied directories counted; by default 10 million.",
)
@click.option("--quiet", is_flag=True, help="No progress, no summary.")
def command(
    blobs: tuple[str, ...],
    directory: str,
    paths: tuple[str, ...],
    diff_ids: tuple[str, ...],
    threads: int | None,
    no_same_owner: bool,
    no_xattrs: bool,
    max_size: int | None,
    max_entries: int,
    quiet: bool,
) -> None:
    """Apply layers to DIR, the lowest BLOB first; - is standard input.

    A BLOB is an eStargz blob, or a gzip, zstd or uncompressed tar. DIR is made if it is missing. Whiteouts remove what
    the layers below, and DIR, have. Nothing outside DIR is touched, whatever the layers say.
    """
    if blobs.count("-") > 1:
        raise UsageError("standard input is one layer; give the others as files")
    started = time.perf_counter()
    with terminated_cleanly(), progress_bar(quiet) as progress:
        done = extract(
            [standard_input() if blob == "-" else blob for blob in blobs],
            directory,
            paths=paths or None,
            same_owner=False if no_same_owner else None,
            xattrs=not no_xattrs,
            threads=threads,
            max_size=max_size,
            max_entries=max_entries,
            diff_ids=diff_ids or None,
            progress=progress,
        )
    if not quiet:
        _summarise(done, time.perf_counter() - started)


def _summarise(done: Extracted, seconds: float) -> None:
    for path, why in done.skipped[:_SHOWN]:
        click.echo(f"{escape(path)}: left out: {escape(why)}", err=True)
    shown = min(len(done.skipped), _SHOWN)
    if done.skipped_count > shown:
        click.echo(f"... and {done.skipped_count - shown} more left out", err=True)
    click.echo(
        f"{done.entries} entries, {done.bytes / 1e6:.1f} MB in {seconds:.2f} s, {done.bytes / 1e6 / seconds:.0f} MB/s",
        err=True,
    )
