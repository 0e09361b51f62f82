"""Names of images: what they mean, judged by the table of distribution/reference's grammar, and by skopeo."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from conftest import missing

from estargz.errors import UsageError
from estargz.image.reference import Reference, familiar_name, full_name

DIGEST = "sha256:" + "0a" * 32
LONG = "sha512:" + "0a" * 64


@pytest.mark.parametrize(
    ("text", "host", "repository", "tag", "digest"),
    [
        ("alpine", "docker.io", "library/alpine", "latest", None),
        ("alpine:3", "docker.io", "library/alpine", "3", None),
        ("me/app", "docker.io", "me/app", "latest", None),
        ("docker.io/alpine", "docker.io", "library/alpine", "latest", None),
        ("index.docker.io/alpine", "docker.io", "library/alpine", "latest", None),
        ("localhost/app", "localhost", "app", "latest", None),
        ("localhost:5000/app:v1", "localhost:5000", "app", "v1", None),
        ("localhost:5000", "docker.io", "library/localhost", "5000", None),
        ("Host/app", "Host", "app", "latest", None),
        ("ghcr.io/a/b/c__d/e-f--g:v1.0_x-y", "ghcr.io", "a/b/c__d/e-f--g", "v1.0_x-y", None),
        ("[::1]:5000/app", "[::1]:5000", "app", "latest", None),
        ("[fe80::1]/app", "[fe80::1]", "app", "latest", None),
        (f"app@{DIGEST}", "docker.io", "library/app", None, DIGEST),
        (f"host:1/app:v1@{LONG}", "host:1", "app", "v1", LONG),
        ("app:" + "x" * 128, "docker.io", "library/app", "x" * 128, None),
        ("x/" + "a" * 253, "docker.io", "x/" + "a" * 253, "latest", None),
    ],
)
def test_repositories(text: str, host: str, repository: str, tag: str | None, digest: str | None) -> None:
    found = Reference.parse(f"docker://{text}")
    assert (found.host, found.repository, found.tag, found.digest) == (host, repository, tag, digest)
    assert Reference.parse(str(found)) == found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "app:",
        "app@",
        "App",
        "a//b",
        "a/",
        "/a",
        "-a",
        "a-",
        "a..b",
        "a___b",
        "a._b",
        "a b",
        "a\n",
        "a:v1\n",
        "ä",
        "app:ä",
        "app:.v1",
        "app:-v1",
        "app:" + "x" * 129,
        "a" * 256,
        "0a" * 32,
        "host:70000/app",
        "host:/app",
        "-host.io/app",
        "host_.io/app",
        "[::1/app",
        "../app",
        "host.io/../app",
        "user:secret@host.io/app",
        "app@sha256:12",
        f"app@{DIGEST.upper()}",
        f"app@{DIGEST}x",
        f"app@{DIGEST}@{DIGEST}",
        "app@md5:" + "0" * 32,
        "host.io/" + "a/" * 100_000 + "b",
    ],
)
def test_what_is_no_repository(text: str) -> None:
    with pytest.raises(UsageError, match="names no image"):
        Reference.parse(f"docker://{text}")


@pytest.mark.parametrize(
    ("text", "path", "tag", "digest"),
    [
        ("oci:dir", "dir", None, None),
        ("oci:dir:", "dir", None, None),
        ("oci:/a/b:v1", "/a/b", "v1", None),
        ("oci:dir:docker.io/library/alpine:3.18", "dir", "docker.io/library/alpine:3.18", None),
        ("oci:dir:a@b+c--d", "dir", "a@b+c--d", None),
        ("oci:me@host/dir", "me@host/dir", None, None),
        ("oci:me@host:v1", "me@host", "v1", None),
        (f"oci:dir@{DIGEST}", "dir", None, DIGEST),
        (f"oci:me@host@{LONG}", "me@host", None, LONG),
        ("oci-archive:file.tar:v1", "file.tar", "v1", None),
        ("oci-archive:-", "-", None, None),
        ("dir:/a:b@c", "/a:b@c", None, None),
        ("docker-archive:file", "file", None, None),
    ],
)
def test_places_on_disk(text: str, path: str, tag: str | None, digest: str | None) -> None:
    found = Reference.parse(text)
    assert (found.path, found.tag, found.digest) == (path, tag, digest)
    assert Reference.parse(str(found)) == found


@pytest.mark.parametrize(
    ("text", "repository", "tag"),
    [
        ("docker-archive:f:app", "app", "latest"),
        ("docker-archive:f:docker.io/library/app:v1", "app", "v1"),
        ("docker-archive:f:me/app:v1", "me/app", "v1"),
        ("docker-archive:f:localhost:5000/app:v1", "localhost:5000/app", "v1"),
    ],
)
def test_images_of_docker_archives(text: str, repository: str, tag: str) -> None:
    found = Reference.parse(text)
    assert (found.path, found.repository, found.tag) == ("f", repository, tag)
    assert Reference.parse(str(found)) == found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "alpine",
        "alpine:3",
        "docker:alpine",
        "docker:/alpine",
        "podman:alpine",
        "OCI:dir",
        "oci:",
        "oci::v1",
        "dir:",
        "dir:a\0b",
        "oci:dir:a\0",
        "oci:dir:..",
        "oci:dir:a//b",
        "oci:dir:-a",
        "oci:dir:" + "a" * 256,
        "oci:dir@sha256:" + "g" * 64,
        "oci:dir@sha256:" + "a" * 63,
        f"oci:dir:v1@{DIGEST}",
        f"oci:@{DIGEST}",
        "docker-archive:f:Bad",
        f"docker-archive:f:app@{DIGEST}",
    ],
)
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(UsageError, match="names no image"):
        Reference.parse(text)


def test_the_message_guesses_what_was_meant() -> None:
    with pytest.raises(UsageError, match="is docker://alpine:3 meant"):
        Reference.parse("alpine:3")


@pytest.mark.parametrize(
    ("name", "familiar"),
    [
        ("docker.io/library/app:v1", "app:v1"),
        ("docker.io/library/a/b:v1", "library/a/b:v1"),
        ("docker.io/me/app:v1", "me/app:v1"),
        ("ghcr.io/library/app:v1", "ghcr.io/library/app:v1"),
        ("docker.iox/library/app:v1", "docker.iox/library/app:v1"),
    ],
)
def test_familiar_names_mean_the_same(name: str, familiar: str) -> None:
    assert familiar_name(name) == familiar
    assert full_name(familiar) == name


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        ("127.0.0.1:9/app", True),
        ("127.0.0.1:9/a/b__c/d-e:v1", True),
        (f"127.0.0.1:9/app@{DIGEST}", True),
        ("127.0.0.1:9/App", False),
        ("127.0.0.1:9/a___b", False),
        ("127.0.0.1:9/a..b", False),
        ("127.0.0.1:9/app:.x", False),
        ("127.0.0.1:9/app:" + "x" * 129, False),
        ("127.0.0.1:9/app@sha256:12", False),
        ("-h.io/app", False),
        ("0a" * 32, False),
    ],
)
def test_skopeo_agrees(text: str, accepted: bool) -> None:
    """It says that a reference is invalid before it asks a registry, which does not exist here."""
    if shutil.which("skopeo") is None:
        missing("skopeo is not installed")
    asked = ["skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{text}"]
    said = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=60).stderr
    assert ("connection refused" in said) is accepted, said
    try:
        Reference.parse(f"docker://{text}")
    except UsageError:
        assert not accepted
    else:
        assert accepted
