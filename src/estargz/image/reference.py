"""Names of images, as skopeo writes them: a transport, a place, and which of the images there.

docker://HOST[:PORT]/REPOSITORY[:TAG][@DIGEST]    a registry; without a host, docker.io; without tag and digest, latest
oci:DIR[:TAG]  oci:DIR[@DIGEST]                   a directory with the OCI layout
oci-archive:FILE[:TAG]                            the same as a tar
docker-archive:FILE[:NAME:TAG]                    what "docker save" writes
dir:DIR                                           one image, its blobs beside its manifest
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Self

from estargz.errors import ImageError, UsageError
from estargz.image.model import check_digest

__all__ = ["TRANSPORTS", "Reference", "check_tag", "familiar_name", "full_name", "parse_repository"]

TRANSPORTS = ("docker", "oci", "oci-archive", "docker-archive", "dir")

# distribution/reference's grammar, and its limits
_COMPONENT = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_LABEL = r"(?:[A-Za-z0-9]|[A-Za-z0-9][A-Za-z0-9-]*[A-Za-z0-9])"
_HOST = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{{1,5}})?")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_IDENTIFIER = re.compile(r"[0-9a-f]{64}")  # what docker takes for an image's ID
_MAX_NAME = 255
_MAX_TEXT = 4096

# image-spec, annotations.md: org.opencontainers.image.ref.name may be more than a tag
_PART = r"[A-Za-z0-9]+(?:(?:[-._:@+]|--)[A-Za-z0-9]+)*"
_LAYOUT_NAME = re.compile(rf"{_PART}(?:/{_PART})*")
_BY_DIGEST = re.compile(r"(.*)@([a-z0-9+._-]+:[0-9A-Za-z]{32,})", re.DOTALL)

DOCKER_HUB = "docker.io"
_HUB_ALIASES = {"index.docker.io", "registry-1.docker.io"}


@dataclass(frozen=True, slots=True)
class Reference:
    """One image, or the place for one. Make it by ``parse``, which checks it."""

    transport: str
    """One of TRANSPORTS."""
    path: str = ""
    """Of the directory or file; empty for a registry."""
    host: str = ""
    """Of the registry, with its port; empty elsewhere."""
    repository: str = ""
    """Of the registry; or the name in a docker-archive."""
    tag: str | None = None
    """What the image is called there. A registry's is ``latest`` where neither tag nor digest were given."""
    digest: str | None = None
    """Of the manifest or index; it decides where both are given."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """The reference that a text means. Raises UsageError, which says what is wrong with it."""
        transport, colon, rest = text.partition(":")
        if not colon or transport not in TRANSPORTS:
            hint = f"; is docker://{text} meant?" if _looks_like_repository(text) else ""
            forms = "docker://HOST/NAME:TAG, oci:DIR:TAG, oci-archive:FILE:TAG, docker-archive:FILE:NAME:TAG, dir:DIR"
            raise UsageError(f"{text!r} names no image: write {forms}{hint}")
        try:
            return cls._of(transport, rest)
        except (ValueError, ImageError) as error:
            raise UsageError(f"{text!r} names no image: {error}") from None

    @classmethod
    def _of(cls, transport: str, rest: str) -> Self:
        if transport == "docker":
            if not rest.startswith("//"):
                raise ValueError("a registry is written docker://HOST/NAME:TAG")
            return cls(transport, **parse_repository(rest[2:]))
        by_digest = _BY_DIGEST.fullmatch(rest) if transport == "oci" else None
        if transport == "dir":
            path, name = rest, ""
        elif by_digest is not None:
            path, name = by_digest[1], ""
            if ":" in path:
                raise ValueError("it has both a name and a digest, of which one is enough")
        else:
            path, _, name = rest.partition(":")  # as skopeo: paths with a colon cannot be named
        if not path or "\0" in path:
            raise ValueError("a path is missing")
        if by_digest is not None:
            return cls(transport, path=path, digest=check_digest(by_digest[2]))
        if transport == "docker-archive":
            return cls(transport, path=path, **(_archive_name(name) if name else {}))
        return cls(transport, path=path, tag=_layout_name(name) if name else None)

    @property
    def name(self) -> str:
        """What a registry or an archive calls the image: HOST/REPOSITORY:TAG@DIGEST."""
        place = f"{self.host}/{self.repository}" if self.host else self.repository
        return place + (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")

    def __str__(self) -> str:
        if self.transport == "docker":
            return f"docker://{self.name}"
        if self.transport == "docker-archive":
            return f"{self.transport}:{self.path}" + (f":{self.name}" if self.repository else "")
        suffix = f"@{self.digest}" if self.digest else f":{self.tag}" if self.tag else ""
        return f"{self.transport}:{self.path}{suffix}"


def parse_repository(text: str) -> dict[str, Any]:
    """Host, repository, tag and digest of ``[HOST/]NAME[:TAG][@DIGEST]`` as docker reads it. Raises ValueError, ImageError."""
    if len(text) > _MAX_TEXT:
        raise ValueError(f"it is longer than {_MAX_TEXT} characters")
    if _IDENTIFIER.fullmatch(text):
        raise ValueError("it is an image's ID, which registries do not know; give its name")
    rest, at, digest = text.partition("@")
    first, slash, behind = rest.partition("/")
    if slash and (first == "localhost" or "." in first or ":" in first or first != first.lower()):
        host, rest = first, behind
    else:
        host = DOCKER_HUB
    # A colon behind the last slash begins a tag.
    tag = None
    if ":" in rest.rpartition("/")[2]:
        rest, _, tag = rest.rpartition(":")
    if host in _HUB_ALIASES:
        host = DOCKER_HUB
    if host == DOCKER_HUB and "/" not in rest:
        rest = f"library/{rest}"
    _check_parts(host, rest, tag)
    if at:
        check_digest(digest)
    elif tag is None:
        tag = "latest"
    return {"host": host, "repository": rest, "tag": tag, "digest": digest if at else None}


def _check_parts(host: str, repository: str, tag: str | None) -> None:
    if not _HOST.fullmatch(host) or _port(host) > 65535:
        raise ValueError(f"{host!r} is no host")
    if not _REPOSITORY.fullmatch(repository):
        raise ValueError(
            f"{repository!r} is no repository: small letters, digits, and . _ - between them, components parted by /"
        )
    if len(repository) > _MAX_NAME:
        raise ValueError(f"the repository is longer than {_MAX_NAME} characters")
    if tag is not None:
        check_tag(tag)


def check_tag(text: str) -> str:
    """A tag that may become part of a URL. Raises UsageError for everything else."""
    if not _TAG.fullmatch(text):
        raise UsageError(f"{text[:200]!r} is no tag: at most 128 letters, digits and . _ -, the first no . or -")
    return text


def _port(host: str) -> int:
    match = re.search(r":([0-9]+)$", host)
    return int(match[1]) if match else 0


def full_name(text: str) -> str:
    """``HOST/REPOSITORY:TAG`` for what docker would understand by a name, such as ``alpine``. Raises UsageError."""
    return Reference.parse(f"docker://{text}").name


def familiar_name(name: str) -> str:
    """The shortest name that docker understands as this full one: what ``docker save`` calls an image."""
    short = name.removeprefix(f"{DOCKER_HUB}/")
    last = short.removeprefix("library/")
    return last if short != name and "/" not in last else short


def _archive_name(text: str) -> dict[str, Any]:
    parsed = parse_repository(text)
    if parsed["digest"] is not None:
        raise ValueError("images of an archive have no digests to be named by")
    return {"repository": familiar_name(f"{parsed['host']}/{parsed['repository']}"), "tag": parsed["tag"]}


def _layout_name(text: str) -> str:
    if len(text) > _MAX_NAME or not _LAYOUT_NAME.fullmatch(text):
        raise ValueError(
            f"{text!r} is no name for an image of a layout: letters and digits, and - . _ : @ + / between them"
        )
    return text


def _looks_like_repository(text: str) -> bool:
    try:
        parse_repository(text.removeprefix("//"))
    except (ValueError, ImageError):
        return False
    return True
