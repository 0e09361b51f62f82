"""estargz image inspect: what an image is, without its layers being fetched."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click

from estargz.cli.convert import registry_options
from estargz.cli.ls import escape
from estargz.image.layers import LayerKind, StoredLayer, layer_kind
from estargz.image.model import Platform, is_foreign_layer, is_layer, layer_compression
from estargz.image.reference import Reference
from estargz.image.store import ImageSource, open_source
from estargz.image.tree import Document, StoredImage, StoredIndex, images_of, read_tree
from estargz.registry.client import Registries
from estargz.threads import Threads

_AT_ONCE = 8  # layers looked at; a registry answers each in a round trip or three


@click.command("inspect", short_help="Show what an image is, and its layers.")
@click.argument("ref")
@click.option("--platform", metavar="OS/ARCH", help="Only the image for this one.")
@registry_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object, with whole digests.")
def command(ref: str, platform: str | None, insecure: bool, ca_file: str | None, as_json: bool) -> None:
    """Show what REF, docker://HOST/NAME:TAG for example, leads to: its images, what they run, and their layers.

    A layer's kind is uncompressed, gzip, estargz or zstd. Of a gzip layer the end is fetched, to tell whether it is an
    eStargz blob; the digest of its table of contents is that of the one that was found there. No layer is fetched whole.
    """
    wanted = None if platform is None else [Platform.parse(platform)]
    with Registries(insecure=insecure, ca_file=ca_file) as registries:
        source = open_source(Reference.parse(ref), registries)
        try:
            facts = {"name": source.name, **_describe(read_tree(source, wanted), source)}
        finally:
            source.close()
    if as_json:
        click.echo(json.dumps(facts))
        return
    for line in _lines(facts):
        click.echo(line)


# --------------------------------------------------------------------------------------------------------------------
# facts


def _describe(tree: Document, source: ImageSource) -> dict[str, Any]:
    images = images_of(tree)
    layers = {layer.descriptor.digest: layer for image in images for layer in image.layers(source)}
    with Threads(_AT_ONCE) as executor:
        kinds = dict(zip(layers, executor.map(_kind, layers.values()), strict=True))
    return {
        **_root(tree),
        "platforms": [str(image.platform) for image in images],
        "images": [_image(image, image.layers(source), kinds) for image in images],
        "others": [_root(other) for other in _others(tree)],
    }


def _root(document: Document) -> dict[str, Any]:
    descriptor = document.descriptor
    return {"mediaType": descriptor.media_type, "digest": descriptor.digest, "size": descriptor.size}


def _others(tree: Document) -> list[Document]:
    """Attestations, signatures and what else is no container image."""
    if isinstance(tree, StoredIndex):
        return [other for child in tree.children for other in _others(child)]
    return [] if isinstance(tree, StoredImage) else [tree]


def _kind(layer: StoredLayer) -> LayerKind:
    media_type = layer.descriptor.media_type
    if not is_layer(media_type):
        return LayerKind("unknown")
    return LayerKind(layer_compression(media_type)) if is_foreign_layer(media_type) else layer_kind(layer)


def _image(image: StoredImage, layers: Sequence[StoredLayer], kinds: dict[str, LayerKind]) -> dict[str, Any]:
    settings = image.config.settings
    environment = settings.get("Env")
    return {
        "platform": str(image.platform),
        **_root(image),
        "config": {
            "digest": image.manifest.config.digest,
            "entrypoint": settings.get("Entrypoint"),
            "cmd": settings.get("Cmd"),
            "env": len(environment) if isinstance(environment, list) else 0,
            "created": image.config.raw.get("created"),
        },
        "layers": [_layer(layer, kinds[layer.descriptor.digest]) for layer in layers],
    }


def _layer(layer: StoredLayer, kind: LayerKind) -> dict[str, Any]:
    return {
        "digest": layer.descriptor.digest,
        "size": layer.descriptor.size,
        "mediaType": layer.descriptor.media_type,
        "kind": kind.compression,
        "diffID": layer.diff_id,
        "tocDigest": kind.toc_digest,
    }


# --------------------------------------------------------------------------------------------------------------------
# for people


def _lines(facts: dict[str, Any]) -> list[str]:
    lines = [
        *_table(name=facts["name"], type=facts["mediaType"], digest=facts["digest"]),
        *_table(platforms=", ".join(facts["platforms"]) or "none"),
    ]
    if facts["others"]:
        lines += _table(others=f"{len(facts['others'])} that are no images, such as attestations")
    for image in facts["images"]:
        lines += ["", *_lines_of_image(image)]
    return lines


def _lines_of_image(image: dict[str, Any]) -> list[str]:
    config = image["config"]
    heads = f"{'layer':<13} {'bytes':>12}  {'kind':<12}  {'DiffID':<12}  TOC"
    return [
        *_table(platform=image["platform"], manifest=image["digest"], config=config["digest"]),
        *_table(entrypoint=_words(config["entrypoint"]), cmd=_words(config["cmd"])),
        *_table(env=f"{config['env']} variables", created=config["created"] or "not said"),
        *([heads] if image["layers"] else []),
        *(_line_of_layer(layer) for layer in image["layers"]),
    ]


def _line_of_layer(layer: dict[str, Any]) -> str:
    digest, diff_id, toc = (_short(layer[key]) for key in ("digest", "diffID", "tocDigest"))
    return f"{digest:<13} {layer['size']:>12}  {layer['kind']:<12}  {diff_id:<12}  {toc}".rstrip()


def _table(**rows: str) -> list[str]:
    return [f"{f'{key}:':<13} {escape(str(value))}" for key, value in rows.items()]


def _words(words: Any) -> str:
    return "none" if not words else json.dumps(words)


def _short(digest: str | None) -> str:
    """The first digits."""
    return "" if digest is None else digest.partition(":")[2][:12]
