"""Documents of images: what survives being read and written, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import sample_images as images

from estargz.errors import ImageError, UsageError
from estargz.image import model
from estargz.image.model import Descriptor, ImageConfig, Index, Manifest, Platform, decode, encode, guess_media_type

DIGEST = "sha256:" + "0a" * 32
OCI, DOCKER = images.OCI_TYPES, images.DOCKER_TYPES


def descriptor(**changes: Any) -> dict[str, Any]:
    return {"mediaType": OCI["config"], "digest": DIGEST, "size": 2} | changes


def manifest(**changes: Any) -> dict[str, Any]:
    usual = {"schemaVersion": 2, "mediaType": OCI["manifest"], "config": descriptor(), "layers": [descriptor()]}
    return {key: value for key, value in (usual | changes).items() if value is not ...}


def index(**changes: Any) -> dict[str, Any]:
    usual = {"schemaVersion": 2, "mediaType": OCI["index"], "manifests": [descriptor()]}
    return {key: value for key, value in (usual | changes).items() if value is not ...}


def config(**changes: Any) -> dict[str, Any]:
    return {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [DIGEST]}} | changes


def parsed_manifest(document: Any, media_type: str = OCI["manifest"]) -> Manifest:
    return Manifest.parse(json.dumps(document).encode(), media_type)


def parsed_index(document: Any, media_type: str = OCI["index"]) -> Index:
    return Index.parse(json.dumps(document).encode(), media_type)


def parsed_config(document: Any) -> ImageConfig:
    return ImageConfig.parse(json.dumps(document).encode())


# ------------------------------------------------------------------------------------------------- what survives

STRANGE = {"unheard": {"of": [1, None, True, 1.5, "é\u2028"]}, "annotations": {"b": "2", "a": "1"}}


@pytest.mark.parametrize(
    ("parse", "document"),
    [
        (parsed_manifest, manifest(**STRANGE)),
        (parsed_manifest, manifest(config=descriptor(**STRANGE, urls=["x"], data="e30="), subject=descriptor())),
        (parsed_manifest, manifest(artifactType="application/x")),
        (parsed_index, index(**STRANGE)),
        (
            parsed_index,
            index(manifests=[descriptor(platform={"os": "linux", "architecture": "arm", "os.features": ["x"]})]),
        ),
        (parsed_config, config(unheard=1, history=[{"created_by": "x", "empty_layer": True}], config={"Cmd": None})),
        (parsed_config, config(**{"os.version": "10.0", "variant": "v8"})),
    ],
)
def test_keys_that_are_not_known_survive(parse: Callable[[Any], Any], document: dict[str, Any]) -> None:
    assert json.loads(encode(parse(document).document())) == document


def test_real_documents_are_read() -> None:
    for one in (images.image(), images.image(docker=True), images.image(compression="estargz")):
        found = Manifest.parse(one.blobs[one.root["digest"]], one.root["mediaType"])
        assert [layer.document() for layer in found.layers] == one.document["layers"]
        assert found.document() == one.document
        settings = ImageConfig.parse(one.blobs[found.config.digest])
        assert (str(settings.platform), settings.settings["Cmd"]) == ("linux/amd64", ["/usr/big"])
    several = images.several_platforms(attested=True)
    read = Index.parse(several.blobs[several.root["digest"]], several.root["mediaType"])
    assert [str(entry.platform) for entry in read.manifests] == ["linux/amd64", "linux/arm64"] + ["unknown/unknown"] * 2
    assert [entry.is_attestation for entry in read.manifests] == [False, False, True, True]
    assert read.document() == several.document


def test_a_type_that_is_not_stated_is_the_stored_one() -> None:
    assert parsed_manifest(manifest(mediaType=...)).media_type == OCI["manifest"]
    assert parsed_manifest(manifest(mediaType="")).document()["mediaType"] == OCI["manifest"]
    assert parsed_index(index(mediaType=None)).media_type == OCI["index"]


def test_text_that_utf8_cannot_hold_is_written_as_it_was_read() -> None:
    """Half a surrogate pair: encoders of other languages write it, and refuse it as bytes."""
    text = b'{"a":"\\ud800\xc3\xa9"}'
    assert json.loads(encode(decode(text, "it"))) == json.loads(text)
    encode(decode(text, "it")).decode("utf-8")


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "document",
    [
        manifest(config=...),
        manifest(config=[]),
        manifest(layers={}),
        manifest(layers=["x"]),
        manifest(layers=[descriptor()] * 5000),
        manifest(layers=[descriptor(digest="sha256:../../etc/passwd")]),
        manifest(layers=[descriptor(digest="sha256:" + "A" * 64)]),
        manifest(layers=[descriptor(digest="sha256:" + "0" * 64 + "\n")]),
        manifest(layers=[descriptor(digest="sha1:" + "0" * 40)]),
        manifest(layers=[descriptor(digest=5)]),
        manifest(layers=[descriptor(size=-1)]),
        manifest(layers=[descriptor(size=True)]),
        manifest(layers=[descriptor(size=1.0)]),
        manifest(layers=[descriptor(size=2**63)]),
        manifest(layers=[descriptor(size=None)]),
        manifest(layers=[descriptor(annotations={"a": 1})]),
        manifest(layers=[descriptor(mediaType=1)]),
        manifest(annotations="x"),
        manifest(subject=[]),
        manifest(schemaVersion=1),
        manifest(schemaVersion="2"),
        manifest(mediaType=OCI["index"]),
        manifest(mediaType=DOCKER["manifest"]),
        # What is also an index is another image to others (CVE-2021-41190).
        manifest(manifests=[descriptor()]),
        manifest(mediaType=..., manifests=[]),
        manifest(fsLayers=[]),
        manifest(Manifests=[descriptor()]),
        manifest(LAYERS=[descriptor()]),
        manifest(MediaType=OCI["index"]),
        [],
        "x",
        None,
    ],
)
def test_malformed_manifests_are_refused(document: Any) -> None:
    with pytest.raises(ImageError):
        parsed_manifest(document)


@pytest.mark.parametrize(
    "document",
    [
        index(manifests={}),
        index(manifests=[descriptor()] * 5000),
        index(manifests=[descriptor(digest="x")]),
        index(manifests=[None]),
        index(mediaType=OCI["manifest"]),
        index(layers=[]),
        index(config=descriptor()),
        index(Config=descriptor()),
        index(fsLayers=[{}]),
        index(schemaVersion=1),
    ],
)
def test_malformed_indexes_are_refused(document: Any) -> None:
    with pytest.raises(ImageError):
        parsed_index(document)


@pytest.mark.parametrize(
    "document",
    [
        config(rootfs=[]),
        config(rootfs={"diff_ids": ["x"]}),
        config(rootfs={"diff_ids": [1]}),
        config(rootfs={"diff_ids": [DIGEST] * 5000}),
        config(history=[1]),
        config(os=1),
        config(config=[]),
    ],
)
def test_malformed_configurations_are_refused(document: Any) -> None:
    with pytest.raises(ImageError):
        parsed_config(document)


def test_documents_of_another_kind_are_refused() -> None:
    with pytest.raises(ImageError, match="no manifest's"):
        parsed_manifest(index(), OCI["index"])
    with pytest.raises(ImageError, match="no index's"):
        parsed_index(manifest(), OCI["manifest"])
    with pytest.raises(ImageError, match="schema 1"):
        parsed_manifest({"schemaVersion": 1, "fsLayers": [], "history": []})


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff{}",
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":' + b"9" * 5000 + b"}",
        b'{"a":' * 100_000,
        b'{"a":' + b"[" * 100_000,
        b'{"a":' * 70 + b"1" + b"}" * 70,
        b"{}" + b" " * (4 << 20),
        b"{} {}",
    ],
)
def test_json_that_does_harm_is_refused(text: bytes) -> None:
    with pytest.raises(ImageError, match="it "):
        decode(text, "it")


def test_messages_stay_short() -> None:
    with pytest.raises(ImageError) as caught:
        parsed_manifest(manifest(config=descriptor(digest="x" * 100_000)))
    assert len(str(caught.value)) < 500


# ------------------------------------------------------------------------------------------------- types and platforms


@pytest.mark.parametrize(
    ("document", "kind"),
    [
        (manifest(), OCI["manifest"]),
        (manifest(mediaType=...), OCI["manifest"]),
        (manifest(mediaType=..., config=descriptor(mediaType=DOCKER["config"])), DOCKER["manifest"]),
        (index(mediaType=...), OCI["index"]),
        (index(mediaType=DOCKER["index"]), DOCKER["index"]),
    ],
)
def test_types_are_guessed(document: Any, kind: str) -> None:
    assert guess_media_type(json.dumps(document).encode(), "it") == kind


def test_types_have_counterparts() -> None:
    for key in ("manifest", "index", "config", "uncompressed", "gzip"):
        assert model.same_in(OCI[key], docker=True) == DOCKER[key]
        assert model.same_in(DOCKER[key], docker=False) == OCI[key]
        assert model.same_in(OCI[key], docker=False) == OCI[key]
    assert model.same_in("application/x", docker=True) == "application/x"
    for compression in ("uncompressed", "gzip", "estargz"):
        assert model.layer_media_type(compression) == OCI[compression]
        assert model.layer_media_type(compression, docker=True) == DOCKER[compression]
        assert model.layer_compression(OCI[compression]) == compression.replace("estargz", "gzip")
    with pytest.raises(ImageError):
        model.layer_compression(OCI["config"])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("linux/amd64", "linux/amd64"),
        ("Linux/x86_64", "linux/amd64"),
        ("linux/amd64/v1", "linux/amd64"),
        ("linux/amd64/v2", "linux/amd64/v2"),
        ("linux/aarch64", "linux/arm64"),
        ("linux/arm64/v8", "linux/arm64"),
        ("linux/arm", "linux/arm/v7"),
        ("linux/arm/6", "linux/arm/v6"),
        ("linux/armhf", "linux/arm/v7"),
        ("linux/armel", "linux/arm/v6"),
        ("linux/i386", "linux/386"),
    ],
)
def test_platforms(text: str, shown: str) -> None:
    """As containerd's platforms.Normalize has them."""
    assert str(Platform.parse(text)) == shown
    assert Platform.parse(text).matches(Platform.parse(shown))


@pytest.mark.parametrize("text", ("", "linux", "linux/", "a/b/c/d", "linux/a b", "linux/../x"))
def test_what_is_no_platform(text: str) -> None:
    with pytest.raises(UsageError, match="no platform"):
        Platform.parse(text)


def test_descriptors_are_checked_however_they_are_made() -> None:
    for digest, size in (("sha256:x", 0), ("", 0), (DIGEST, -1), (DIGEST, True)):
        with pytest.raises(ImageError):
            Descriptor("", digest, size)
