"""estargz image: images put together and looked at."""

from __future__ import annotations

import csv
import json
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import click

from estargz.cli.build import (
    descriptor_of,
    portable_option,
    recorded,
    show_result,
    standard_input,
    terminated_cleanly,
    warn_of,
)
from estargz.cli.convert import described, open_cache, shared_options
from estargz.cli.inspect import command as inspect
from estargz.cli.progress import layer_progress
from estargz.errors import UsageError
from estargz.image.image import Image
from estargz.image.layers import LayerForm
from estargz.image.output import Output
from estargz.registry.client import Registries

_LAYER_KEYS = ("lower", "overlay-lower", "prefetch", "record-in", "created-by")
_LAYER_FLAGS = ("allow-missing", "no-landmark")


@click.group("image", no_args_is_help=False)
def command() -> None:
    """Build an image from layers, or show what one is."""


command.add_command(inspect)


@command.command("build", short_help="Put an image together, and push or write it.")
@click.option(
    "--from",
    "base",
    metavar="REF",
    help="Begin with this image, docker://HOST/NAME:TAG for example; else with nothing.",
)
@click.option(
    "--layer",
    "layers",
    multiple=True,
    metavar="SOURCE[,KEY=VALUE...]",
    help="Add a layer on top: a directory or tar; - is a tar on standard input. KEYs are options of `estargz build` "
    "(lower, overlay-lower, prefetch, record-in, allow-missing, no-landmark), and created-by=TEXT. Repeatable.",
)
@click.option(
    "--entrypoint", metavar="WORDS", help='What is run: words as for a shell, or a JSON array, ["/app", "-v"].'
)
@click.option("--cmd", metavar="WORDS", help="Its arguments, which who runs the image may replace.")
@click.option("--env", multiple=True, metavar="NAME=VALUE", help="Set a variable; repeatable.")
@click.option("--workdir", metavar="PATH", help="Where it is run.")
@click.option("--user", metavar="USER[:GROUP]", help="Who runs it.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Label the image; repeatable.")
@click.option("--expose", multiple=True, metavar="PORT[/PROTOCOL]", help="Where it listens; repeatable.")
@click.option("--volume", "volumes", multiple=True, metavar="PATH", help="A place for data from outside; repeatable.")
@click.option("--stop-signal", metavar="SIGNAL", help="How it is asked to end.")
@click.option(
    "--platform", metavar="OS/ARCH", help="Which image of --from, or what a new one is for; default: this machine's."
)
@click.option(
    "--output",
    required=True,
    metavar="SPEC",
    help="As for BuildKit, type=oci,dest=FILE or type=image,name=HOST/NAME:TAG,push=true,compression=estargz.",
)
@portable_option
@shared_options
def build(
    base: str | None,
    layers: tuple[str, ...],
    entrypoint: str | None,
    cmd: str | None,
    env: tuple[str, ...],
    labels: tuple[str, ...],
    expose: tuple[str, ...],
    volumes: tuple[str, ...],
    platform: str | None,
    output: str,
    portable: bool,
    reuse: bool,
    cache: str | None,
    threads: int | None,
    memory: int | None,
    insecure: bool,
    ca_file: str | None,
    progress: str,
    as_json: bool,
    **settings: Any,
) -> None:
    """Put an image together and write it where --output says.

    Layers are built in one pass, all at once, and go straight to a registry when they are pushed. Those of --from stay as
    they are, unless --output has force-compression=true. SOURCE_DATE_EPOCH in the environment bounds all times.

    Prints the image's OCI descriptor, names and layers on standard output; on standard error where the image goes there.
    """
    wanted = Output.parse(output)
    to_stdout = wanted.type not in ("image", "local") and wanted.dest is None
    if to_stdout:
        descriptor_of(sys.stdout, "output")
    if sum(_split(layer)[0] == "-" for layer in layers) > 1:
        raise UsageError("standard input is one layer; give the others as files")
    pool = LayerForm.of(wanted, portable=portable).pool(threads, memory)
    with (
        terminated_cleanly(),
        layer_progress(progress) as report,
        open_cache(reuse, cache) as store,
        Registries(insecure=insecure, ca_file=ca_file) as registries,
        _begin(base, platform, registries) as image,
    ):
        for layer in layers:
            image = _with_layer(image, layer)
        image = image.config(
            entrypoint=_words("--entrypoint", entrypoint),
            cmd=_words("--cmd", cmd),
            env=_pairs("--env", env),
            labels=_pairs("--label", labels),
            exposed_ports=expose or None,
            volumes=volumes or None,
            **settings,
        )
        done = image.export(wanted, portable=portable, cache=store, pool=pool, report=report)
    warn_of(done.missing)
    document = {} if done.descriptor is None else done.descriptor.document()
    result = {**document, "names": list(done.names), "layers": described(done.layers)}
    made = " and ".join(done.names) or wanted.dest or "the image"
    show_result(result, made, in_one_line=as_json, to_stderr=to_stdout)


def _begin(base: str | None, platform: str | None, registries: Registries) -> Image:
    if base is None:
        return Image.new(platform, registries=registries)
    return Image.open(base, platform=platform, registries=registries)


def _with_layer(image: Image, text: str) -> Image:
    source, fields = _split(text)
    values: dict[str, list[str]] = {key: [] for key in _LAYER_KEYS}
    flags = set()
    for field in fields:
        key, _, value = field.partition("=")
        if key in _LAYER_FLAGS and value in ("", "true"):
            flags.add(key)
        elif key in _LAYER_KEYS and value:
            values[key].append(value)
        else:
            raise UsageError(
                f"--layer {text}: {field!r} is not known; there are {'=, '.join(_LAYER_KEYS)}=, with a value, and "
                f"{', '.join(_LAYER_FLAGS)}"
            )
    for key in ("lower", "created-by"):
        if len(values[key]) > 1:
            raise UsageError(f"--layer {text}: {key} is given twice")
    return image.append(
        standard_input() if source == "-" else source,
        lower=values["lower"][0] if values["lower"] else None,
        overlay_lower=values["overlay-lower"] or None,
        prefetch=[*values["prefetch"], *(path for log in values["record-in"] for path in recorded(log))],
        allow_missing="allow-missing" in flags,
        landmark="no-landmark" not in flags,
        **({"created_by": values["created-by"][0]} if values["created-by"] else {}),
    )


def _split(text: str) -> tuple[str, list[str]]:
    """SOURCE[,KEY=VALUE...]: one line of CSV, so that a path may have a comma."""
    try:
        source, *fields = next(csv.reader([text], strict=True)) or [""]
    except csv.Error as error:
        raise UsageError(
            f'--layer {text!r}: {error}; quote a field that has a comma as a whole: "a,b",lower=c'
        ) from None
    if not source:
        raise UsageError(f"--layer {text!r}: begin with a directory, a tar, or - for standard input")
    return source, fields


def _words(option: str, text: str | None) -> Sequence[str] | None:
    if text is None:
        return None
    try:
        words = json.loads(text) if text.lstrip().startswith("[") else shlex.split(text)
    except ValueError as error:
        raise UsageError(f"{option} {text}: {error}; write words as for a shell, or a JSON array") from None
    if not all(isinstance(word, str) for word in words):
        raise UsageError(f"{option} {text}: is no array of texts")
    return list(words)


def _pairs(option: str, given: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"{option} {text}: write {option} KEY=VALUE")
        pairs[key] = value
    return pairs
