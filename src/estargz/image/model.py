"""What an image consists of: descriptors, manifests, indexes and configurations (OCI image-spec, Docker's schema 2).

Documents are kept as they were read, so that keys which are not known here survive; what is typed are views of them.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from estargz.errors import ImageError, UsageError

__all__ = [
    "MAX_MANIFEST_SIZE",
    "Descriptor",
    "ImageConfig",
    "Index",
    "Manifest",
    "Platform",
    "check_digest",
    "decode",
    "digest_of",
    "encode",
    "guess_media_type",
    "is_foreign_layer",
    "is_image_config",
    "is_index",
    "is_layer",
    "is_manifest",
    "layer_compression",
    "layer_media_type",
    "same_in",
]

MAX_MANIFEST_SIZE = 4 << 20
"""Bytes; what the distribution-spec asks registries to take, and no client needs more."""

MAX_LAYERS = 4096
MAX_MANIFESTS = 4096
_MAX_DEPTH = 64  # of nested JSON

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"

_OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
_OCI_FOREIGN = "application/vnd.oci.image.layer.nondistributable.v1.tar"
_DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
_DOCKER_FOREIGN = "application/vnd.docker.image.rootfs.foreign.diff.tar"

_SUFFIXES = {"uncompressed": "", "gzip": "+gzip", "estargz": "+gzip", "zstd": "+zstd"}
_LAYERS = {
    base + suffix.replace("+", joint): compression
    for base, joint in ((_OCI_LAYER, "+"), (_OCI_FOREIGN, "+"), (_DOCKER_LAYER, "."), (_DOCKER_FOREIGN, "."))
    for compression, suffix in (("uncompressed", ""), ("gzip", "+gzip"), ("zstd", "+zstd"))
}
# the same document in the other family
_COUNTERPARTS = {
    OCI_MANIFEST: DOCKER_MANIFEST,
    OCI_INDEX: DOCKER_LIST,
    OCI_CONFIG: DOCKER_CONFIG,
    _OCI_LAYER: _DOCKER_LAYER,
    f"{_OCI_LAYER}+gzip": f"{_DOCKER_LAYER}.gzip",
    f"{_OCI_LAYER}+zstd": f"{_DOCKER_LAYER}.zstd",
    _OCI_FOREIGN: _DOCKER_FOREIGN,
    f"{_OCI_FOREIGN}+gzip": f"{_DOCKER_FOREIGN}.gzip",
}

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")


def digest_of(data: bytes) -> str:
    """``sha256:<64 hex digits>`` of some bytes."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def check_digest(text: object) -> str:
    """A digest that may become part of a path or URL. Raises ImageError for everything else."""
    if not isinstance(text, str) or not _DIGEST.fullmatch(text):
        raise ImageError(f"{str(text)[:200]!r} is no digest; it reads sha256: and 64 small hexadecimal digits")
    return text


# --------------------------------------------------------------------------------------------------------------------
# media types


def is_manifest(media_type: str) -> bool:
    """Whether it is one image's (or artifact's) manifest."""
    return media_type in (OCI_MANIFEST, DOCKER_MANIFEST)


def is_index(media_type: str) -> bool:
    """Whether it is a list of manifests."""
    return media_type in (OCI_INDEX, DOCKER_LIST)


def is_image_config(media_type: str) -> bool:
    """Whether it is a container image's configuration."""
    return media_type in (OCI_CONFIG, DOCKER_CONFIG)


def is_layer(media_type: str) -> bool:
    """Whether it is a file system layer of a kind that can be read."""
    return media_type in _LAYERS


def is_foreign_layer(media_type: str) -> bool:
    """Whether it is a layer that registries do not keep, but the URLs in its descriptor."""
    return media_type.startswith((_OCI_FOREIGN, _DOCKER_FOREIGN))


def is_docker(media_type: str) -> bool:
    """Whether a type is one of Docker's own."""
    return media_type.startswith("application/vnd.docker.")


def layer_compression(media_type: str) -> str:
    """``uncompressed``, ``gzip`` or ``zstd``; an eStargz layer's type says gzip. Raises ImageError for other types."""
    try:
        return _LAYERS[media_type]
    except KeyError:
        raise ImageError(f"{media_type[:200]!r} is no type of layer") from None


def layer_media_type(compression: str, *, docker: bool = False) -> str:
    """The type of a layer: OCI's, or Docker's."""
    suffix = _SUFFIXES[compression]
    return _DOCKER_LAYER + suffix.replace("+", ".") if docker else _OCI_LAYER + suffix


def same_in(media_type: str, *, docker: bool) -> str:
    """The type of the same document in Docker's family, or in OCI's; itself where there is no other."""
    if docker:
        return _COUNTERPARTS.get(media_type, media_type)
    return {other: mine for mine, other in _COUNTERPARTS.items()}.get(media_type, media_type)


# --------------------------------------------------------------------------------------------------------------------
# JSON from strangers


def encode(document: Mapping[str, Any] | Sequence[Any], *, indent: int | None = 2) -> bytes:
    """A document as JSON, keys in their order. Manifests are indented by two spaces, as BuildKit's are; configurations, by
    ``indent=None``, are compact. Raises ImageError for one that nobody would take."""
    separators = (",", ":") if indent is None else (",", ": ")
    try:
        data = json.dumps(document, ensure_ascii=False, indent=indent, separators=separators).encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON may have and UTF-8 may not
        data = json.dumps(document, indent=indent, separators=separators).encode()
    if len(data) > MAX_MANIFEST_SIZE:
        raise ImageError(
            f"a document of {len(data)} bytes is over the limit of {MAX_MANIFEST_SIZE}; have fewer layers, or less to say"
        )
    return data


def decode(data: bytes, what: str, kind: type = dict) -> Any:
    """An object, or an array, that is a document. Raises ImageError, also for what decoders take for different documents."""
    if len(data) > MAX_MANIFEST_SIZE:
        raise ImageError(f"{what} has {len(data)} bytes, over the limit of {MAX_MANIFEST_SIZE}")
    try:
        document = json.loads(
            data.decode("utf-8"), parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_once
        )
    except (ValueError, RecursionError) as error:
        raise ImageError(f"{what} is no JSON: {error}") from None
    if not isinstance(document, kind):
        raise ImageError(f"{what} is no JSON {_KINDS[kind]}")
    _check_depth(document, what)
    return document


_KINDS = {str: "string", int: "number", list: "array", dict: "object"}


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    """What is beyond all floats could be read, and then not written."""
    number = float(text)
    return number if math.isfinite(number) else _no_constant(text[:100])


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, no key of which comes twice: others would take the first value, or, as Go does, make one of both."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"an object has {twice[:200]!r} twice")
    return found


def _check_spelling(document: Mapping[str, Any], known: Mapping[str, str], what: str) -> None:
    """Refuses keys that Go takes for a known one: it does not mind in which case they are written, nor two odd letters."""
    for key in document:
        if known.get(key.replace("\u017f", "s").replace("\u212a", "k").lower(), key) != key:
            raise ImageError(f"{what} is ambiguous: it must not have {key[:200]!r}; make the image again")


def _spellings(*keys: str) -> dict[str, str]:
    return {key.lower(): key for key in keys}


def _check_depth(document: Any, what: str) -> None:
    """What is nested deeper could be read, and then not written."""
    level = [document]
    for _ in range(_MAX_DEPTH):
        inner: list[Any] = []
        for value in level:
            inner += value.values() if isinstance(value, dict) else value
        level = [value for value in inner if isinstance(value, dict | list)]
        if not level:
            return
    raise ImageError(f"{what} is nested deeper than {_MAX_DEPTH} levels")


def _typed(document: Mapping[str, Any], key: str, kind: type, what: str, default: Any = None) -> Any:
    """A member of the stated type; the default where it is missing or null. Raises ImageError."""
    value = document.get(key)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ImageError(f"{what}: {key} is no JSON {_KINDS[kind]}")
    return value


def _strings(document: Mapping[str, Any], key: str, what: str) -> dict[str, str]:
    found: dict[str, str] = _typed(document, key, dict, what, {})
    if not all(isinstance(value, str) for value in found.values()):
        raise ImageError(f"{what}: {key} hold something that is no string")
    return found


def _list(document: Mapping[str, Any], key: str, kind: type, most: int, what: str) -> list[Any]:
    found: list[Any] = _typed(document, key, list, what, [])
    if len(found) > most:
        raise ImageError(f"{what}: {len(found)} {key}, over the limit of {most}")
    if not all(isinstance(item, kind) for item in found):
        raise ImageError(f"{what}: {key} hold something of another type")
    return found


# --------------------------------------------------------------------------------------------------------------------
# descriptors and platforms

_ARCHITECTURES = {
    "x86_64": ("amd64", ""),
    "x86-64": ("amd64", ""),
    "i386": ("386", ""),
    "i686": ("386", ""),
    "aarch64": ("arm64", ""),
    "armhf": ("arm", "v7"),
    "armv7l": ("arm", "v7"),
    "armel": ("arm", "v6"),
    "armv6l": ("arm", "v6"),
    "loongarch64": ("loong64", ""),
}


_PLATFORM_KEYS = ("os", "architecture", "variant", "os.version")
_DESCRIBING = _spellings("mediaType", "digest", "size", "annotations", "platform", "urls", "data", "artifactType")
_CONFIGURING = _spellings(*_PLATFORM_KEYS, "os.features", "config", "rootfs", "history", "created", "author")


@dataclass(frozen=True, slots=True)
class Platform:
    """What an image runs on: names as Go has them (GOOS, GOARCH)."""

    os: str
    architecture: str
    variant: str = ""
    os_version: str = ""

    @classmethod
    def parse(cls, text: str | Platform) -> Platform:
        """``linux/arm64``, ``linux/arm/v7``; names of other systems (aarch64, x86_64) are translated. A platform is itself.

        Raises UsageError.
        """
        if isinstance(text, Platform):
            return text
        parts = text.strip(" \t\r\n").lower().split("/")
        if not 2 <= len(parts) <= 3 or not all(re.fullmatch(r"[a-z0-9_-]+", part) for part in parts):
            raise UsageError(
                f"{text!r} is no platform: write OS/ARCHITECTURE or OS/ARCHITECTURE/VARIANT, as linux/arm64"
            )
        return cls(*parts).normal()

    @classmethod
    def host(cls) -> Self:
        """Of this machine."""
        import platform

        return cls("linux", platform.machine().lower()).normal()

    @classmethod
    def of(cls, document: Mapping[str, Any], what: str) -> Self:
        """From an object with os, architecture, variant and os.version. Raises ImageError."""
        _check_spelling(document, _CONFIGURING, what)
        return cls(*(_typed(document, key, str, what, "") for key in _PLATFORM_KEYS))

    def normal(self) -> Self:
        """With the names that Go has, and without a variant that goes without saying."""
        architecture, variant = _ARCHITECTURES.get(self.architecture, (self.architecture, ""))
        variant = self.variant or variant
        if (architecture, variant) in (("arm64", "v8"), ("arm64", "8"), ("amd64", "v1")):
            variant = ""
        if architecture == "arm":
            variant = f"v{variant}" if variant.isdigit() else variant or "v7"
        return replace(self, architecture=architecture, variant=variant)

    def matches(self, other: Platform) -> bool:
        """Whether an image for ``other`` is one for this platform."""
        mine, theirs = self.normal(), other.normal()
        same = (mine.os, mine.architecture, mine.variant) == (theirs.os, theirs.architecture, theirs.variant)
        return same and (not mine.os_version or mine.os_version == theirs.os_version)

    def document(self) -> dict[str, str]:
        """As an index has it."""
        keys = ("architecture", "os", "os.version", "variant")
        values = (self.architecture, self.os, self.os_version, self.variant)
        return {key: value for key, value in zip(keys, values, strict=True) if value}

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


@dataclass(frozen=True, slots=True)
class Descriptor:
    """Where content is named by a document: its type, digest and size (image-spec, descriptor.md)."""

    media_type: str
    digest: str
    """``sha256:<64 hex digits>`` or ``sha512:<128>``; checked."""
    size: int
    """Bytes, 0 or more."""
    annotations: Mapping[str, str] = field(default_factory=dict)
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The object as it was read, with keys such as platform, urls, data, artifactType; empty for one that is new."""

    def __post_init__(self) -> None:
        check_digest(self.digest)
        if not isinstance(self.size, int) or isinstance(self.size, bool) or not 0 <= self.size < 2**63:
            raise ImageError(f"{self.digest}: {self.size!r} is no size")

    @classmethod
    def parse(cls, document: Mapping[str, Any], what: str) -> Self:
        """From an object of a document, ``what`` it is for messages. Raises ImageError."""
        _check_spelling(document, _DESCRIBING, what)
        media_type = _typed(document, "mediaType", str, what, "")
        digest = _typed(document, "digest", str, what, "")
        size = _typed(document, "size", int, what, -1)
        try:
            return cls(media_type, digest, size, _strings(document, "annotations", what), document)
        except ImageError as error:
            raise ImageError(f"{what}: {error}") from None

    @property
    def platform(self) -> Platform | None:
        """What the image is for that it leads to, where an index says so."""
        stated = _typed(self.raw, "platform", dict, self.digest)
        return None if stated is None else Platform.of(stated, self.digest)

    @property
    def is_attestation(self) -> bool:
        """Whether it leads to what BuildKit attests about an image beside it."""
        return self.annotations.get("vnd.docker.reference.type") == "attestation-manifest"

    def leading_to(self, media_type: str, digest: str, size: int) -> Self:
        """The same entry of a document for other content: with its annotations and platform, without embedded data."""
        raw = {key: value for key, value in self.raw.items() if key != "data" or digest == self.digest}
        return replace(self, media_type=media_type, digest=digest, size=size, raw=raw)

    def document(self) -> dict[str, Any]:
        """The descriptor as a document has it: keys that were read and are not known here are kept."""
        known = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        document = {**self.raw, **known, "annotations": dict(self.annotations)}
        if not self.annotations:
            del document["annotations"]
        return document


# --------------------------------------------------------------------------------------------------------------------
# documents


@dataclass(frozen=True, slots=True)
class Manifest:
    """One image: its configuration and its layers, the lowest first."""

    media_type: str
    config: Descriptor
    layers: Sequence[Descriptor]
    annotations: Mapping[str, str]
    subject: Descriptor | None
    """What this manifest is about, where it is no image of its own."""
    raw: Mapping[str, Any] = field(repr=False)

    @classmethod
    def parse(cls, data: bytes, media_type: str, what: str = "the manifest") -> Self:
        """Raises ImageError for what is no manifest of OCI's or Docker's schema 2."""
        document = decode(data, what)
        if not is_manifest(media_type):
            raise ImageError(f"{what} is of type {media_type[:200]!r}, which is no manifest's")
        _check_kind(document, media_type, what, foreign=("manifests", "fsLayers"))
        subject = _typed(document, "subject", dict, what)
        layers = _list(document, "layers", dict, MAX_LAYERS, what)
        return cls(
            media_type,
            Descriptor.parse(_typed(document, "config", dict, what, {}), f"{what}: config"),
            [Descriptor.parse(layer, f"{what}: layer {number}") for number, layer in enumerate(layers)],
            _strings(document, "annotations", what),
            None if subject is None else Descriptor.parse(subject, f"{what}: subject"),
            document,
        )

    def document(self) -> dict[str, Any]:
        """As JSON has it, with the keys that were read."""
        known: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": self.media_type,
            "config": self.config.document(),
            "layers": [layer.document() for layer in self.layers],
        }
        return _with_optional({**self.raw, **known}, annotations=dict(self.annotations), subject=self.subject)


@dataclass(frozen=True, slots=True)
class Index:
    """A list of manifests, for several platforms."""

    media_type: str
    manifests: Sequence[Descriptor]
    annotations: Mapping[str, str]
    subject: Descriptor | None
    raw: Mapping[str, Any] = field(repr=False)

    @classmethod
    def parse(cls, data: bytes, media_type: str, what: str = "the index") -> Self:
        """Raises ImageError for what is no index of OCI's, and no list of Docker's."""
        document = decode(data, what)
        if not is_index(media_type):
            raise ImageError(f"{what} is of type {media_type[:200]!r}, which is no index's")
        _check_kind(document, media_type, what, foreign=("config", "layers", "fsLayers"))
        subject = _typed(document, "subject", dict, what)
        manifests = _list(document, "manifests", dict, MAX_MANIFESTS, what)
        return cls(
            media_type,
            [Descriptor.parse(item, f"{what}: manifest {number}") for number, item in enumerate(manifests)],
            _strings(document, "annotations", what),
            None if subject is None else Descriptor.parse(subject, f"{what}: subject"),
            document,
        )

    def document(self) -> dict[str, Any]:
        """As JSON has it, with the keys that were read."""
        known: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": self.media_type,
            "manifests": [manifest.document() for manifest in self.manifests],
        }
        return _with_optional({**self.raw, **known}, annotations=dict(self.annotations), subject=self.subject)


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """An image's configuration: platform, DiffIDs, history, and what is run."""

    platform: Platform
    diff_ids: Sequence[str]
    history: Sequence[Mapping[str, Any]]
    raw: Mapping[str, Any] = field(repr=False)

    @classmethod
    def parse(cls, data: bytes, what: str = "the configuration") -> Self:
        """Raises ImageError for what is no configuration of a container image."""
        document = decode(data, what)
        rootfs = _typed(document, "rootfs", dict, what, {})
        _check_spelling(rootfs, _spellings("type", "diff_ids"), what)
        diff_ids = _list(rootfs, "diff_ids", str, MAX_LAYERS, what)
        try:
            checked = [check_digest(diff_id) for diff_id in diff_ids]
        except ImageError as error:
            raise ImageError(f"{what}: diff_ids: {error}") from None
        _typed(document, "config", dict, what)
        return cls(
            Platform.of(document, what), checked, _list(document, "history", dict, 2 * MAX_LAYERS, what), document
        )

    @classmethod
    def new(cls, platform: Platform) -> Self:
        """Of an image that has nothing yet."""
        return cls(platform, [], [], platform.document())

    @property
    def settings(self) -> Mapping[str, Any]:
        """What is run and how: Entrypoint, Cmd, Env, ..."""
        settings: Mapping[str, Any] = _typed(self.raw, "config", dict, "the configuration", {})
        return settings

    def document(self) -> dict[str, Any]:
        """As JSON has it, with the keys that were read."""
        rootfs = {"type": "layers", "diff_ids": list(self.diff_ids)}
        raw = {
            key: value for key, value in self.raw.items() if key not in _PLATFORM_KEYS or key in ("os", "architecture")
        }
        document = {
            **raw,
            **self.platform.document(),
            "rootfs": rootfs,
            "history": [dict(step) for step in self.history],
        }
        if not self.history and "history" not in self.raw:
            del document["history"]
        return document


_KEYS = _spellings(
    "schemaVersion", "mediaType", "config", "layers", "manifests", "fsLayers", "subject", "annotations", "artifactType"
)


def guess_media_type(data: bytes, what: str) -> str:
    """Of a manifest or index that nothing says the type of: what it states itself, or is by its keys. Raises ImageError."""
    document = decode(data, what)
    stated: str = _typed(document, "mediaType", str, what, "")
    if stated:
        return stated
    if "manifests" in document:
        return OCI_INDEX
    config = _typed(document, "config", dict, what, {})
    return DOCKER_MANIFEST if config.get("mediaType") == DOCKER_CONFIG else OCI_MANIFEST


def _check_kind(document: Mapping[str, Any], media_type: str, what: str, *, foreign: Sequence[str]) -> None:
    """Refuses what others may take for a document of another kind, and so see another image behind the same digest."""
    if _typed(document, "schemaVersion", int, what, 2) == 1:
        raise ImageError(f"{what} is of Docker's schema 1; have its registry or skopeo convert it to OCI")
    _check_spelling(document, _KEYS, what)
    for key in foreign:
        if document.get(key) is not None:
            raise ImageError(f"{what} is ambiguous: for {media_type} it must not have {key!r}; make the image again")
    stated = _typed(document, "mediaType", str, what, "")
    if stated and stated != media_type:
        raise ImageError(f"{what} says that it is {stated[:200]!r}, and was stored as {media_type!r}")


def _with_optional(
    document: dict[str, Any], *, annotations: dict[str, str], subject: Descriptor | None
) -> dict[str, Any]:
    if annotations:
        document["annotations"] = annotations
    else:
        document.pop("annotations", None)
    if subject is not None:
        document["subject"] = subject.document()
    return document
