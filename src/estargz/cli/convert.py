"""estargz convert: an image with its layers in another compression, from any store to any store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from estargz.cli.build import Size, portable_option, show_result, terminated_cleanly
from estargz.cli.progress import MODES, layer_progress
from estargz.errors import UsageError
from estargz.image.convert import convert
from estargz.image.layers import LayerForm, MovedLayer
from estargz.image.output import COMPRESSIONS
from estargz.image.rewriting import ATTESTATIONS
from estargz.image.variants import VariantStore
from estargz.options import DEFAULT_CHUNK_SIZE
from estargz.registry.client import Registries

__all__ = ["command", "described", "open_cache", "registry_options", "shared_options"]


def shared_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What ``convert`` and ``image build`` both have: the cache, the pool, registries, and how to tell of it all."""
    options: list[Callable[[Callable[..., Any]], Callable[..., Any]]] = [
        click.option(
            "--reuse",
            is_flag=True,
            help="Take finished layers from the cache, $ESTARGZ_CACHE or ~/.cache/estargz, and keep new ones there.",
        ),
        click.option("--cache", metavar="DIR", help="The same with DIR as the cache."),
        click.option(
            "--threads", type=click.IntRange(1), metavar="N", help="For all layers together; default: one a CPU."
        ),
        click.option(
            "--memory",
            type=Size(),
            metavar="N",
            help="Bytes for layers in the making, all together; uploads take half as much again.",
        ),
        registry_options,
        click.option(
            "--progress",
            type=click.Choice(MODES),
            default="auto",
            help="On standard error: auto shows bars if that is a terminal; json writes one event a line.  [auto]",
        ),
        click.option("--json", "as_json", is_flag=True, help="The result in one line."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def registry_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How registries are spoken to."""
    command = click.option("--ca-file", metavar="PEM", help="Certificates to trust instead of the system's.")(command)
    return click.option("--insecure", is_flag=True, help="Registries may speak HTTP or show any certificate.")(command)


@click.command("convert")
@click.argument("source")
@click.argument("dest")
@click.option("--compression", type=click.Choice(COMPRESSIONS), help="For the layers; default: copy them as they are.")
@click.option("--level", type=int, metavar="N", help="0-12: gzip, estargz; 1-19: zstd.")
@click.option("--chunk-size", type=Size(), default=DEFAULT_CHUNK_SIZE, metavar="N", help="Bytes per chunk.  [4MiB]")
@click.option(
    "--min-chunk-size",
    type=Size(),
    default=0,
    metavar="N",
    help="Pack small files into members of at least N bytes; containers/storage cannot read such layers.",
)
@portable_option
@click.option(
    "--base", metavar="REF", help="Keep the layers of this image as they are, if they are the lowest of SOURCE."
)
@click.option("--force-compression", is_flag=True, help="Do not keep them, whatever --base says.")
@click.option(
    "--platform", "platforms", multiple=True, metavar="OS/ARCH", help="Only the image for this one; repeatable."
)
@click.option("--all-platforms", is_flag=True, help="The images for all, which is the default.")
@click.option(
    "--attestations",
    type=click.Choice(ATTESTATIONS),
    default="repoint",
    show_default=True,
    help="What is said about an image that changes (SBOM, provenance): follows it, names the old one, or is left out.",
)
@click.option(
    "--oci-mediatypes/--docker-mediatypes",
    "oci_types",
    default=None,
    help="Default: as they are; OCI's for estargz and zstd.",
)
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="A further tag in DEST's repository; repeatable.")
@shared_options
def command(
    source: str,
    dest: str,
    platforms: tuple[str, ...],
    all_platforms: bool,
    force_compression: bool,
    reuse: bool,
    cache: str | None,
    threads: int | None,
    memory: int | None,
    insecure: bool,
    ca_file: str | None,
    progress: str,
    as_json: bool,
    compression: str | None,
    level: int | None,
    portable: bool,
    **options: Any,
) -> None:
    """Copy the image SOURCE to DEST, its layers in another compression.

    Layers that have the wanted compression are kept; uncompressing a converted one gives the original's tar. Attestations
    are copied byte for byte. SOURCE and DEST are

    \b
    docker://HOST/NAME:TAG           in a registry
    oci:DIR:TAG                      in a directory with the OCI layout
    oci-archive:FILE:TAG             the same as a tar
    docker-archive:FILE:NAME:TAG     as docker save writes it
    dir:DIR                          the image alone, its blobs side by side
    """
    if platforms and all_platforms:
        raise UsageError("give either --platform or --all-platforms")
    pool = LayerForm(compression, level, portable=portable).pool(threads, memory)
    with (
        terminated_cleanly(),
        layer_progress(progress) as report,
        open_cache(reuse, cache) as store,
        Registries(insecure=insecure, ca_file=ca_file) as registries,
    ):
        done = convert(
            source,
            dest,
            compression=compression,
            level=level,
            portable=portable,
            platforms=platforms or None,
            force=force_compression,
            cache=store,
            pool=pool,
            registries=registries,
            report=report,
            **options,
        )
    images = [
        {"platform": str(image.platform), "digest": image.digest, "layers": described(image.layers)}
        for image in done.images
    ]
    show_result({**done.descriptor.document(), "images": images}, dest, in_one_line=as_json)


@contextmanager
def open_cache(reuse: bool, directory: str | None) -> Iterator[VariantStore | None]:
    """The cache, if one is wanted."""
    if not reuse and directory is None:
        yield None
        return
    with VariantStore(directory) as store:
        yield store


def described(layers: Sequence[MovedLayer]) -> list[dict[str, Any]]:
    """Layers for people and programs that read the result."""
    return [{**layer.descriptor.document(), "diffID": layer.diff_id, "action": layer.action} for layer in layers]
