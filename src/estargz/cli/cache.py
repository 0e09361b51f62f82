"""estargz cache: what the cache of finished layers holds, and making room in it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from estargz.cli.build import Size
from estargz.errors import UsageError
from estargz.image.variants import Removed, Usage, VariantStore, default_cache

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


class Duration(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.5 only
    """A number with s, m, h, d or w; in seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"\s*([0-9]{1,9})\s*([smhdw])\s*", value)
        if match is None:
            self.fail(f"{value!r} is no duration: give a number with s, m, h, d or w, such as 12h or 30d", param, ctx)
        return float(match[1]) * _SECONDS[match[2]]


_cache_option = click.option(
    "--cache",
    "directory",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Default: $ESTARGZ_CACHE, $XDG_CACHE_HOME/estargz or ~/.cache/estargz.",
)
_json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")


@click.group("cache", no_args_is_help=False)
def command() -> None:
    """Show and prune the cache of finished layers, which `image build` and `convert` fill with --reuse or --cache.

    It has the OCI layout: images that `image build` keeps on this machine are in it, too, as oci:DIR:NAME.
    """


@command.command("ls", short_help="List what there is.")
@_cache_option
@_json_option
def ls(directory: Path | None, as_json: bool) -> None:
    """List the layers, the last used first: digest, bytes, compression and level, last use, and what keeps them.

    With --json, times are seconds since 1970.
    """
    rows = _in(directory, VariantStore.usage)
    if as_json:
        _echo_json(rows)
        return
    for row in rows:
        click.echo(line(row))
    blobs = {row.digest: row.size for row in rows}
    click.echo(f"{len(rows)} layers, {_megabytes(sum(blobs.values()))}")


@command.command("prune", short_help="Remove what is not in use.")
@click.option("--keep-storage", type=Size(), metavar="SIZE", help="Remove the longest unused until SIZE is left.")
@click.option("--older-than", type=Duration(), metavar="DURATION", help="Remove what was not used for 12h, 30d, ...")
@click.option("--all", "everything", is_flag=True, help="Remove all layers.")
@_cache_option
@_json_option
def prune(
    keep_storage: int | None, older_than: float | None, everything: bool, directory: Path | None, as_json: bool
) -> None:
    """Remove layers that are not in use, and what interrupted runs left a day ago or longer.

    Layers that a process uses now, and those of images in the cache's directory, stay. Prints what was removed. Without
    an option only what was left goes.
    """
    if everything and (keep_storage is not None or older_than is not None):
        raise UsageError("--all leaves nothing to choose: give it, or --keep-storage and --older-than")
    keep = 0 if everything else keep_storage
    removed = _in(directory, lambda store: store.prune(keep_storage=keep, older_than=older_than))
    if as_json:
        _echo_json(removed)
        return
    for item in removed:
        click.echo(f"{item.name}{'' if item.variant else '  (left over)'}")
    click.echo(f"{len(removed)} removed, {_megabytes(sum(item.freed for item in removed))} freed")


def line(row: Usage) -> str:
    """A layer of the listing."""
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(row.last_used))
    kind = row.compression if row.compression == "uncompressed" else f"{row.compression}-{row.level}"
    kept = ", ".join(text for flag, text in ((row.in_use, "in use"), (row.in_image, "in an image")) if flag)
    return f"{row.digest.partition(':')[2][:12]} {row.size:>12} {kind:<12} {used}  {kept}".rstrip()


def _in(directory: Path | None, work: Callable[[VariantStore], list[Any]]) -> list[Any]:
    """What a cache answers. One that is not there holds nothing, and is not made for that."""
    place = directory or default_cache()
    if not place.exists():
        return []
    with VariantStore(place) as store:
        return work(store)


def _echo_json(rows: Iterable[Usage | Removed]) -> None:
    for row in rows:
        click.echo(json.dumps(asdict(row)))


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
