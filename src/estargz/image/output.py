"""Where a build's result goes, and how: BuildKit's ``--output`` line.

type=image|registry|oci|docker|tar|local and key=value, parted by commas. A field that has a comma in its value is wrapped in
double quotes as a whole, and a quote within is doubled: ``type=image,"name=a,b",push=true``. Keys and what they mean are
BuildKit's, with these differences: a key that is not known is an error, and so is one that is given twice;
``compression-level`` goes up to 12 for gzip and eStargz, to 19 for zstd; ``store`` is off by default where the image is pushed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Self

from estargz.errors import UsageError
from estargz.image.model import Platform
from estargz.image.reference import Reference
from estargz.options import MAX_CHUNK_SIZE, MAX_LEVEL, parse_size

__all__ = ["ANNOTATED", "COMPRESSIONS", "TYPES", "Annotation", "Output"]

TYPES = ("image", "registry", "oci", "docker", "tar", "local")
COMPRESSIONS = ("uncompressed", "gzip", "estargz", "zstd")
ANNOTATED = ("manifest", "manifest-descriptor", "index", "index-descriptor")
"""What an annotation may be of."""

_MAX_ZSTD_LEVEL = 19
_MAX_EPOCH = 253402300799  # the end of the year 9999, beyond which RFC 3339 has no dates

_FIELD = re.compile(r'"((?:[^"]|"")*)"|([^",]*)')
_ANNOTATION = re.compile(r"annotation(?:-([a-z-]+))?(?:\[([A-Za-z0-9_/-]+)\])?\.(\S+)")


@dataclass(frozen=True, slots=True)
class Annotation:
    """A key and value of a manifest, an index, or of the descriptor that leads to one."""

    of: str
    """One of ANNOTATED."""
    key: str
    value: str
    platform: Platform | None = None
    """Whose manifest; None: everyone's."""


@dataclass(frozen=True, slots=True)
class Output:
    """What an ``--output`` line asks for. Make it by ``parse``, which checks it."""

    type: str
    """``image``, ``oci``, ``docker``, ``tar`` or ``local``; ``registry`` has become ``image`` with ``push``."""
    dest: str | None = None
    """The file; the directory for ``local`` and without ``tar``; None: standard output, or there is none (``image``)."""
    tar: bool = True
    """oci, docker: a tar, and no directory with the OCI layout."""
    names: tuple[str, ...] = ()
    """HOST/REPOSITORY:TAG, as docker reads what was given; HOST/REPOSITORY where it is pushed by digest."""
    push: bool = False
    """To the registries of the names."""
    push_by_digest: bool = False
    """Without a tag."""
    insecure: bool = False
    """Registries may speak HTTP, or have certificates that nobody vouches for."""
    store: bool = True
    """image: whether it is kept on this machine; by default only when it is not pushed."""
    compression: str = "gzip"
    """One of COMPRESSIONS."""
    compression_level: int | None = None
    """0..12 for gzip and estargz, 1..19 for zstd; None: the compression's default, which 0 is for zstd."""
    force_compression: bool = False
    """Also of layers that come from elsewhere, in another compression."""
    oci_mediatypes: bool = True
    """OCI's media types; else Docker's."""
    annotations: tuple[Annotation, ...] = ()
    source_date_epoch: int | None = None
    """Seconds since 1970 that no time in the result is later than; None: no bound."""
    rewrite_timestamp: bool = False
    """Apply the bound to the entries of all layers."""
    chunk_size: int | None = None
    """estargz: bytes of a file per chunk; None: the default."""
    min_chunk_size: int = 0
    """estargz: bytes that a member holds at least; 0: every chunk begins one."""

    @classmethod
    def parse(cls, text: str, *, environ: Mapping[str, str] = os.environ) -> Self:
        """Reads one ``--output`` line; SOURCE_DATE_EPOCH of ``environ`` stands for the key that is not given.

        Raises:
            UsageError: it is malformed, has a key or value that is not known, or its parts contradict each other.
        """
        given = _fields(text)
        kind = given.pop("type", "")
        if kind not in TYPES:
            wrong = f"{kind!r} is no type of output" if kind else "--output lacks type="
            raise UsageError(f"{wrong}; choose type={', type='.join(TYPES)}")
        annotations = tuple(_annotation(key, given.pop(key)) for key in list(given) if _ANNOTATES.match(key))
        if annotations and kind not in _IMAGES:
            raise UsageError(f"type={kind} is no image and has no annotations; leave them out")
        for key in given:
            _check_key(key, kind, given[key])
        values: dict[str, Any] = {_KEYS[key].field: _KEYS[key].read(key, value) for key, value in given.items()}
        values = _DEFAULTS.get(kind, {}) | values | {"annotations": annotations}
        if "source_date_epoch" not in values:
            values["source_date_epoch"] = _epoch("SOURCE_DATE_EPOCH", environ.get("SOURCE_DATE_EPOCH", ""))
        values["names"] = _names(values.get("names", ()), by_digest=values.get("push_by_digest", False))
        values.setdefault("store", not values.get("push", False))
        if values.get("compression") == "zstd" and values.get("compression_level") == 0:
            del values["compression_level"]
        output = cls(type="image" if kind == "registry" else kind, **values)
        output._check()
        return output

    def _check(self) -> None:
        """Raises UsageError for what contradicts itself."""
        if not self.oci_mediatypes and self.compression == "estargz":
            raise UsageError(
                "compression=estargz needs OCI's media types: with Docker's a layer loses the annotation by which its table "
                "of contents is verified; leave oci-mediatypes=false out"
            )
        if not self.oci_mediatypes and self.annotations:
            raise UsageError("Docker's media types have no annotations; leave them or oci-mediatypes=false out")
        if self.rewrite_timestamp and self.source_date_epoch is None:
            raise UsageError("rewrite-timestamp=true needs a time: set SOURCE_DATE_EPOCH or source-date-epoch=SECONDS")
        if self.push_by_digest and not self.push:
            raise UsageError("push-by-digest=true needs push=true")
        if self.push and not self.names:
            raise UsageError("push=true needs name=HOST/REPOSITORY:TAG")
        self._check_level()
        self._check_dest()
        if self.compression != "estargz" and (self.chunk_size is not None or self.min_chunk_size):
            raise UsageError(f"compression={self.compression} has no chunks; leave chunk-size and min-chunk-size out")

    def _check_level(self) -> None:
        if self.compression_level is None:
            return
        if self.compression == "uncompressed":
            raise UsageError("compression=uncompressed has no level; leave compression-level out")
        most = _MAX_ZSTD_LEVEL if self.compression == "zstd" else MAX_LEVEL
        if self.compression_level > most:
            raise UsageError(f"compression-level={self.compression_level} is over {self.compression}'s highest, {most}")

    def _check_dest(self) -> None:
        if self.type == "image":
            return
        if self.type == "local" or not self.tar:
            if self.dest is None:
                raise UsageError(f"type={self.type} writes a directory here, and needs dest=DIRECTORY")
        elif self.dest is not None and os.path.isdir(self.dest):
            raise UsageError(f"dest={self.dest} is a directory, and type={self.type} writes a file; name a file in it")


def _fields(text: str) -> dict[str, str]:
    """The keys and values of a line of CSV, quoted as Go's encoding/csv wants it."""
    found: dict[str, str] = {}
    text = text.removesuffix("\n").removesuffix("\r")
    position = -1
    while position < len(text):
        match = _FIELD.match(text, position + 1)
        assert match is not None  # it matches an empty field
        position = match.end()
        if text[position : position + 1] not in ("", ","):
            raise UsageError(
                f'--output {text!r} has a wrong quote; a field with a comma is quoted as a whole: "key=a,b"'
            )
        field = match[2] if match[1] is None else match[1].replace('""', '"')
        key, equals, value = field.partition("=")
        key = key.lower()
        if not equals:
            raise UsageError(
                f'--output: {field!r} is no key=value; a value with a comma is quoted with its key: "key=a,b"'
            )
        if key in found:
            raise UsageError(f'--output has {key}= twice; give it once (several names: "name=a,b")')
        found[key] = value
    return found


# --------------------------------------------------------------------------------------------------------------------
# values


def _bool(key: str, value: str) -> bool:
    """As Go's strconv.ParseBool."""
    if value in ("1", "t", "T", "TRUE", "true", "True"):
        return True
    if value in ("0", "f", "F", "FALSE", "false", "False"):
        return False
    raise UsageError(f"{key}={value} is neither true nor false")


def _flag(key: str, value: str) -> bool:
    return _bool(key, value or "true")


def _level(key: str, value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,4}", value):
        raise UsageError(f"{key}={value} is no whole number")
    return int(value)


def _epoch(key: str, value: str) -> int | None:
    if not value:
        return None
    if not re.fullmatch(r"[0-9]{1,19}", value) or int(value) > _MAX_EPOCH:
        raise UsageError(f"{key}={value} is no number of seconds since 1970")
    return int(value)


def _size(key: str, value: str) -> int:
    size = parse_size(value)
    if not size <= MAX_CHUNK_SIZE:
        raise UsageError(f"{key}={value} is more than {MAX_CHUNK_SIZE} bytes")
    return size


def _chunk_size(key: str, value: str) -> int:
    size = _size(key, value)
    if size == 0:
        raise UsageError(f"{key}={value}: a chunk has a byte at least")
    return size


def _compression(key: str, value: str) -> str:
    if value not in COMPRESSIONS:
        raise UsageError(f"{key}={value} is not known; choose {', '.join(COMPRESSIONS)}")
    return value


def _dest(key: str, value: str) -> str | None:
    if "\0" in value:
        raise UsageError(f"{key}={value!r} is no path")
    return None if value in ("", "-") else value


def _list(key: str, value: str) -> tuple[str, ...]:
    return tuple(name for name in value.split(",") if name)


def _names(names: tuple[str, ...], *, by_digest: bool) -> tuple[str, ...]:
    full = []
    for name in names:
        try:
            reference = Reference.parse(f"docker://{name}")
        except UsageError as error:
            raise UsageError(f"name={name}: {error}") from None
        if reference.digest is not None:
            raise UsageError(f"name={name}: a digest follows from the content; leave it out")
        place = f"{reference.host}/{reference.repository}"
        tagged = ":" in name.rpartition("/")[2]
        if by_digest and tagged:
            raise UsageError(
                f"name={name}: what is pushed by its digest has no tag; leave the tag or push-by-digest out"
            )
        full.append(place if by_digest else f"{place}:{reference.tag}")
    return tuple(dict.fromkeys(full))


def _annotation(key: str, value: str) -> Annotation:
    match = _ANNOTATION.fullmatch(key)
    of = "manifest" if match is None or match[1] is None else match[1]
    if match is None or of not in ANNOTATED:
        raise UsageError(
            f"{key}= is no annotation: write annotation.KEY=VALUE, or annotation-{', annotation-'.join(ANNOTATED)}, "
            "with [OS/ARCHITECTURE] before the dot for one platform's manifest"
        )
    if match[2] is None:
        return Annotation(of, match[3], value)
    if of.startswith("index"):
        raise UsageError(f"{key}=: an index is for all platforms; leave [{match[2]}] out")
    try:
        return Annotation(of, match[3], value, Platform.parse(match[2]))
    except UsageError as error:
        raise UsageError(f"{key}=: {error}") from None


# --------------------------------------------------------------------------------------------------------------------
# keys

_IMAGES = ("image", "registry", "oci", "docker")
_ANNOTATES = re.compile(r"annotation[-.\[]")


@dataclass(frozen=True, slots=True)
class _Key:
    field: str
    read: Callable[[str, str], Any]
    types: tuple[str, ...]


_KEYS = {
    "name": _Key("names", _list, _IMAGES),
    "push": _Key("push", _flag, ("image", "registry")),
    "push-by-digest": _Key("push_by_digest", _flag, ("image", "registry")),
    "registry.insecure": _Key("insecure", _flag, ("image", "registry")),
    "store": _Key("store", _flag, ("image", "registry")),
    "dest": _Key("dest", _dest, ("oci", "docker", "tar", "local")),
    "tar": _Key("tar", _flag, ("oci", "docker")),
    "compression": _Key("compression", _compression, _IMAGES),
    "compression-level": _Key("compression_level", _level, _IMAGES),
    "force-compression": _Key("force_compression", _flag, _IMAGES),
    "chunk-size": _Key("chunk_size", _chunk_size, _IMAGES),
    "min-chunk-size": _Key("min_chunk_size", _size, _IMAGES),
    "oci-mediatypes": _Key("oci_mediatypes", _bool, _IMAGES),
    "source-date-epoch": _Key("source_date_epoch", _epoch, TYPES),
    "rewrite-timestamp": _Key("rewrite_timestamp", _bool, _IMAGES),
}
_DEFAULTS: dict[str, dict[str, Any]] = {"registry": {"push": True}}

# BuildKit's own, for what does not exist here
_FOREIGN = {
    "attestation-inline",
    "attestation-prefix",
    "danging-name-empty-only",
    "dangling-name-prefix",
    "mode",
    "name-canonical",
    "oci-artifact",
    "platform-split",
    "prefer-nondist-layers",
    "unpack",
}


def _check_key(key: str, kind: str, value: str) -> None:
    """Raises UsageError for a key that is not known, or not to this type."""
    if key in _KEYS and kind in _KEYS[key].types:
        return
    if key in _KEYS:
        raise UsageError(f"type={kind} has no {key}=; it is of type={', type='.join(_KEYS[key].types)}")
    mine = [known for known, row in _KEYS.items() if kind in row.types]
    if key == "output":
        hint = f"is dest={value} meant?"
    elif key in _FOREIGN:
        hint = "it is BuildKit's, for what does not exist here: leave it out"
    elif close := get_close_matches(key, mine, 1):
        hint = f"is {close[0]}= meant?"
    else:
        hint = "leave it out"
    annotations = ", annotation.KEY" if kind in _IMAGES else ""
    raise UsageError(f"type={kind} has no key {key!r}: {hint} (there are {', '.join(mine)}{annotations})")
