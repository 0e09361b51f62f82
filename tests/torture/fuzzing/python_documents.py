"""Targets: JSON documents and tars of images, and files with credentials."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from urllib3.util import parse_url

from estargz.http import Failure
from estargz.image.archive import open_archive
from estargz.image.layout import open_layout
from estargz.image.model import (
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    ImageConfig,
    Index,
    Manifest,
    encode,
    guess_media_type,
)
from estargz.image.reference import Reference
from estargz.image.tarball import Tarball
from estargz.registry.auth import _parsed
from estargz.registry.credentials import Credential, Credentials, _of_helper
from estargz.registry.host import _stated_error

from .python_target import accepted, expect, peer, target

# --------------------------------------------------------------------------------------------------------------------
# manifests, indexes, configurations


@target("manifest", shape="json", most=8192, runs=3_000)
def manifest(data: bytes) -> None:
    media_type = accepted(guess_media_type, data, "it") or OCI_MANIFEST
    found = accepted(Manifest.parse, data, media_type)
    if found is None:
        return
    again = Manifest.parse(encode(found.document()), media_type)
    expect((again.config, again.layers) == (found.config, found.layers), "written, it reads otherwise")
    theirs = peer("manifest").ask(data)
    # What Go cannot read is no danger: nobody will see another image.
    if theirs is not None:
        expect(
            _seen([found.config, *found.layers]) == _viewed([theirs["config"], *(theirs["layers"] or [])]), f"{theirs}"
        )


@target("index", shape="json", most=8192, runs=3_000)
def index(data: bytes) -> None:
    found = accepted(Index.parse, data, OCI_INDEX)
    if found is None:
        return
    expect(Index.parse(encode(found.document()), OCI_INDEX).manifests == found.manifests, "written, it reads otherwise")
    for entry in found.manifests:
        accepted(lambda entry: (str(entry.platform), entry.is_attestation), entry)
    theirs = peer("index").ask(data)
    if theirs is not None:
        expect(_seen(found.manifests) == _viewed(theirs["manifests"] or []), f"Go sees {theirs}")


def _seen(descriptors: Sequence[Descriptor]) -> list[tuple[Any, ...]]:
    return [(_as_go(one.media_type), one.digest, one.size) for one in descriptors]


def _viewed(descriptors: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    return [(one["mediaType"], one["digest"], one["size"]) for one in descriptors]


def _as_go(text: str) -> str:
    """Halves of characters, which are kept as they are read here, are all the same to Go."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


@target("config", shape="json", most=8192, runs=3_000)
def config(data: bytes) -> None:
    found = accepted(ImageConfig.parse, data)
    if found is None:
        return
    accepted(lambda: found.settings)
    written = ImageConfig.parse(encode(found.document(), indent=None))
    expect((written.platform, written.diff_ids) == (found.platform, found.diff_ids), "written, it reads otherwise")
    theirs = peer("config").ask(data)
    if theirs is not None:
        platform = found.platform
        mine = (*map(_as_go, (platform.os, platform.architecture, platform.variant)), list(found.diff_ids))
        stated = [theirs.get(key, "") for key in ("os", "architecture", "variant")]
        expect(mine == (*stated, theirs["rootfs"]["diff_ids"] or []), f"Go sees {theirs}")


# --------------------------------------------------------------------------------------------------------------------
# layouts and archives: {"reference": ..., "files": {path: JSON or text}}


@cache
def _place() -> Path:
    return Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))


def _files(data: bytes) -> tuple[str, dict[str, bytes]] | None:
    try:
        case = json.loads(data)
        name, files = case["reference"], case["files"].items()
        return f"{name}", {path: _written(value) for path, value in files}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _written(value: Any) -> bytes:
    return (value if isinstance(value, str) else json.dumps(value)).encode("utf-8", "surrogatepass")


@target("layout", "oci-layout", "index.json", shape="json", most=8192, runs=1_500)
def layout(data: bytes) -> None:
    """A directory with the OCI layout."""
    case = _files(data)
    if case is None:
        return
    for name in ("oci-layout", "index.json"):
        (_place() / name).write_bytes(case[1].get(name, b""))
    reference = accepted(Reference.parse, f"oci:{_place()}{case[0]}")
    if reference is not None and reference.path == str(_place()):
        root = accepted(lambda: open_layout(reference).resolve())
        expect(root is None or reference.digest in (None, root.digest), "another image is found than was asked for")


@target("archive", "manifest.json", "index.json", "RepoTags", shape="json", most=8192, runs=1_500)
def archive(data: bytes) -> None:
    """A docker-archive or an oci-archive: what is in it, and what manifest.json says."""
    case = _files(data)
    if case is None:
        return
    path = _place() / "archive.tar"
    path.write_bytes(_tar(case[1]))
    for transport in ("docker-archive", "oci-archive"):
        reference = accepted(Reference.parse, f"{transport}:{path}{case[0]}")
        if reference is not None and reference.path == str(path):
            accepted(list, _resolved(reference))


def _tar(files: Mapping[str, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.GNU_FORMAT, errors="surrogatepass") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name.replace("\0", ""))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return made.getvalue()


def _resolved(reference: Reference) -> Iterator[Any]:
    source = open_archive(reference)
    try:
        root = source.resolve()
        if root.media_type in (OCI_MANIFEST, DOCKER_MANIFEST):
            read = Manifest.parse(source.read(root), root.media_type)
            yield source.read(read.config)
            for layer in read.layers:
                with source.open(layer) as blob:
                    yield blob.read(1 << 16)
    finally:
        source.close()


@target("tarball", "ustar", "index.json", "path=", "size=", shape="tar", most=8192, runs=3_000)
def tarball(data: bytes) -> None:
    """The bytes of an archive."""
    path = _place() / "tarball.tar"
    path.write_bytes(data)
    opened = accepted(Tarball, str(path))
    if opened is not None:
        for name in ("index.json", "manifest.json", "a"):
            found = accepted(opened.read, name)
            expect(found is None or len(found) <= len(data), f"{name} is longer than the archive")
        opened.close()


# --------------------------------------------------------------------------------------------------------------------
# credentials and tokens


@target("credentials", "auths", "credHelpers", "credsStore", "identitytoken", shape="json", most=4096, runs=3_000)
def credentials(data: bytes) -> None:
    """The file that docker and podman keep; what a helper says stands in it, too, as it would be said."""
    path = _place() / "auth.json"
    path.write_bytes(data)

    def helper(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
        expect(command[0].startswith("docker-credential-") and "/" not in command[0], f"{command[0]!r} is run")
        return subprocess.CompletedProcess(command, len(data) % 2, data, b"")

    places = mock.patch.dict(os.environ, REGISTRY_AUTH_FILE=str(path), DOCKER_CONFIG=str(path), HOME=str(path))
    with places, mock.patch.object(subprocess, "run", helper):
        for host, repository in (("h.example:5000", "a/b"), ("docker.io", "library/alpine")):
            _expect_header(accepted(Credentials().of, host, repository))
    _expect_header(accepted(_of_helper, data, "docker-credential-x"))


def _expect_header(found: Credential | None) -> None:
    if found is not None:
        expect(found.basic.isascii() and found.basic.isprintable(), "it makes no header")


@target("token", "token", "access_token", "expires_in", "errors", "code", "message", shape="json", most=1024)
def token(data: bytes) -> None:
    """What token servers answer, and registries that refuse."""
    found = accepted(_parsed, data, parse_url("https://auth.example/token"), refusal=Failure)
    expect(found is None or (found[0].isascii() and found[0].isprintable() and found[1] >= 0), f"{found} is a token")
    code, message = _stated_error(data)
    expect(code.isascii() and message.isprintable() and len(message) <= 200, f"{code!r}, {message!r} are printed")
