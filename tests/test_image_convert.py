"""Images converted: the rules of BuildKit's cache tests for every pair of compressions, platforms, attestations, failures."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sample_images as images
import zstandard
from conftest import missing
from reference.peer import report, run
from sample_images import OCI_TYPES, described, image, index, several_platforms, sha256, write_layout
from tars import END, everything

from estargz.errors import ImageError, TarError, UploadBrokenError, UsageError, VerificationError
from estargz.image import moving
from estargz.image.convert import Converted, convert
from estargz.image.layout import FolderUpload, Layout, copy_blob
from estargz.image.progress import Event
from estargz.image.store import BlobUpload
from estargz.image.variants import VariantStore

COMPRESSIONS = ("uncompressed", "gzip", "estargz", "zstd")
TOC_DIGEST = "containerd.io/snapshot/stargz/toc.digest"
UNCOMPRESSED_SIZE = "io.containers.estargz.uncompressed-size"
LAYER_TYPES = {**OCI_TYPES, "zstd": f"{images.OCI}.layer.v1.tar+zstd"}


# --------------------------------------------------------------------------------------------------------------------
# every pair of compressions


def gnu_tar(scratch: Path) -> bytes:
    """A tar that none of this package's code has made."""
    tree = scratch / "tree"
    (tree / "usr/lib").mkdir(parents=True)
    (tree / "usr/lib/large").write_bytes(bytes(range(256)) * 20_000)
    (tree / "usr/lib/link").symlink_to("large")
    (tree / "empty").touch()
    for number in range(30):
        (tree / f"file-{number}").write_text(f"{number}\n" * number)
    command = ["tar", "-c", "--sort=name", "--mtime=@1600000000", "-C", tree, "."]
    return subprocess.run(command, capture_output=True, check=True).stdout


def compressed_elsewhere(tar: bytes, compression: str, peer: Path, scratch: Path) -> bytes:
    """A layer's blob as other programs make it."""
    (scratch / "layer.tar").write_bytes(tar)
    if compression == "gzip":
        return subprocess.run(["gzip", "-n"], input=tar, capture_output=True, check=True).stdout
    if compression == "zstd":
        return subprocess.run(["zstd", "-c"], input=tar, capture_output=True, check=True).stdout
    if compression == "estargz":
        run(peer, "blob", "-how", "lossless", scratch / "layer.tar", scratch / "layer.esgz")
        return (scratch / "layer.esgz").read_bytes()
    return tar


def inflated(blob: bytes, media_type: str) -> bytes:
    """All of a blob, by the standard library and python-zstandard."""
    if media_type.endswith("gzip"):
        return gzip.decompress(blob)
    if media_type.endswith("zstd"):
        return zstandard.ZstdDecompressor().stream_reader(io.BytesIO(blob), read_across_frames=True).read()
    return blob


def one_layer(blob: bytes, compression: str) -> images.Image:
    """An image of a blob."""
    descriptor = described(LAYER_TYPES[compression], blob)
    diff_id = sha256(inflated(blob, descriptor["mediaType"]))
    config = json.dumps(
        {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [diff_id]}}
    ).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_TYPES["manifest"],
        "config": described(OCI_TYPES["config"], config),
        "layers": [descriptor],
    }
    text = json.dumps(manifest).encode()
    blobs = {sha256(text): text, sha256(config): config, sha256(blob): blob}
    return images.Image(described(OCI_TYPES["manifest"], text), blobs)


def read_blob(layout: Path, digest: str) -> bytes:
    data = (layout / "blobs" / digest.replace(":", "/")).read_bytes()
    assert sha256(data) == digest
    return data


def read_json(layout: Path, digest: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(read_blob(layout, digest))
    return found


def check_layer(layout: Path, manifest: dict[str, Any], compression: str, peer: Path) -> None:
    """What BuildKit's manager tests demand of a descriptor, and the digest of the table of contents besides."""
    (layer,) = manifest["layers"]
    config = read_json(layout, manifest["config"]["digest"])
    stream = inflated(read_blob(layout, layer["digest"]), layer["mediaType"])
    assert layer["mediaType"] == LAYER_TYPES[compression]
    assert config["rootfs"]["diff_ids"] == [sha256(stream)]
    annotations = layer.get("annotations", {})
    if compression != "estargz":
        assert annotations == {}
        return
    # A blob that was kept has the one annotation that its end tells.
    assert annotations.keys() in ({TOC_DIGEST, UNCOMPRESSED_SIZE}, {TOC_DIGEST})
    assert int(annotations.get(UNCOMPRESSED_SIZE, len(stream))) == len(stream)
    blob = layout / "blobs" / layer["digest"].replace(":", "/")
    report(peer, "verify", "-toc-digest", annotations[TOC_DIGEST], blob)


def stored_digests(layout: Path) -> set[str]:
    return {f"sha256:{path.name}" for path in (layout / "blobs/sha256").iterdir()}


@pytest.mark.parametrize("made_by", ["GNU tar", "by hand"])
@pytest.mark.parametrize("first", COMPRESSIONS)
def test_every_pair(first: str, made_by: str, peer: Path, scratch: Path) -> None:
    """From any compression to any other and back: the tar is what it was, and the store has what the image names."""
    tar = gnu_tar(scratch) if made_by == "GNU tar" else everything() + END
    write_layout(scratch / "source", one_layer(compressed_elsewhere(tar, first, peer, scratch), first), "v1")
    for second in COMPRESSIONS:
        there = scratch / f"to-{second}"
        done = convert(f"oci:{scratch}/source:v1", f"oci:{there}:v2", compression=second)
        manifest = read_json(there, done.descriptor.digest)
        check_layer(there, manifest, second, peer)
        named = {done.descriptor.digest, manifest["config"]["digest"], manifest["layers"][0]["digest"]}
        assert stored_digests(there) == named
        back = convert(f"oci:{there}:v2", f"oci:{scratch}/back-{second}:v3", compression="uncompressed")
        assert read_json(scratch / f"back-{second}", back.descriptor.digest)["layers"][0]["digest"] == sha256(tar)


def test_a_layer_without_a_whole_last_block(peer: Path, scratch: Path, root: None) -> None:
    """What umoci inserts ends where the file does: every compression holds it but the one that has more to append."""
    if shutil.which("umoci") is None:
        missing("umoci is not installed")
    (scratch / "file").write_bytes(b"inserted\n")
    made = f"{scratch}/made:v1"
    for arguments in (["init", "--layout", scratch / "made"], ["new", "--image", made]):
        subprocess.run(["umoci", *arguments], check=True)
    subprocess.run(["umoci", "insert", "--image", made, scratch / "file", "/file"], check=True)
    for compression in ("uncompressed", "gzip", "zstd"):
        done = convert(f"oci:{made}", f"oci:{scratch}/{compression}:v1", compression=compression)
        manifest = read_json(scratch / compression, done.descriptor.digest)
        check_layer(scratch / compression, manifest, compression, peer)
        (layer,) = manifest["layers"]
        stream = inflated(read_blob(scratch / compression, layer["digest"]), layer["mediaType"])
        assert (len(stream) % 512, stream[-9:]) == (9, b"inserted\n")
    with pytest.raises(TarError, match="^file: .* inside the padding of its last file, at byte 521, so that"):
        convert(f"oci:{made}", f"oci:{scratch}/estargz:v1", compression="estargz")


@pytest.mark.parametrize("second", COMPRESSIONS)
@pytest.mark.parametrize("first", COMPRESSIONS)
def test_a_layer_of_no_bytes(first: str, second: str, peer: Path, scratch: Path) -> None:
    write_layout(scratch / "source", one_layer(compressed_elsewhere(b"", first, peer, scratch), first), "v1")
    done = convert(f"oci:{scratch}/source:v1", f"oci:{scratch}/there:v2", compression=second)
    check_layer(scratch / "there", read_json(scratch / "there", done.descriptor.digest), second, peer)
    back = convert(f"oci:{scratch}/there:v2", f"oci:{scratch}/back:v3", compression="uncompressed")
    assert read_json(scratch / "back", back.descriptor.digest)["layers"][0]["digest"] == sha256(b"")


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_the_wanted_compression_is_kept(compression: str, peer: Path, scratch: Path) -> None:
    blob = compressed_elsewhere(everything() + END, compression, peer, scratch)
    write_layout(scratch / "source", one_layer(blob, compression), "v1")
    done = convert(f"oci:{scratch}/source:v1", f"oci:{scratch}/there:v1", compression=compression)
    (layer,) = done.images[0].layers
    assert (layer.action, layer.descriptor.digest) == ("copied", sha256(blob))


def test_without_a_compression_it_is_a_copy(scratch: Path) -> None:
    original = several_platforms(attested=True)
    write_layout(scratch / "source", original, "v1")
    done = convert(f"oci:{scratch}/source:v1", f"oci:{scratch}/there:v1")
    assert done.descriptor.digest == original.root["digest"]
    assert stored_digests(scratch / "there") == set(original.blobs)


@pytest.mark.parametrize("compression", ["uncompressed", "estargz", "zstd"])
def test_an_estargz_layer_that_others_have_recompressed(compression: str, peer: Path, scratch: Path) -> None:
    """Podman and docker inflate a layer and compress all of it: a table of contents without a footer is any other bytes."""
    stream = gzip.decompress(compressed_elsewhere(everything() + END, "estargz", peer, scratch))
    write_layout(scratch / "source", one_layer(gzip.compress(stream), "gzip"), "v1")
    done = convert(f"oci:{scratch}/source:v1", f"oci:{scratch}/there:v1", compression=compression)
    check_layer(scratch / "there", read_json(scratch / "there", done.descriptor.digest), compression, peer)
    back = convert(f"oci:{scratch}/there:v1", f"oci:{scratch}/back:v1", compression="uncompressed")
    assert back.images[0].layers[0].descriptor.digest == sha256(stream)


def test_threads_and_memory_do_not_show(scratch: Path) -> None:
    from estargz.writing.pool import Pool

    write_layout(scratch / "source", several_platforms(), "v1")
    digests = set()
    for number, pool in enumerate([Pool(1), Pool(2), Pool(5, 256 << 20)]):
        done = convert(f"oci:{scratch}/source:v1", f"oci:{scratch}/there{number}:v1", compression="estargz", pool=pool)
        digests.add(done.descriptor.digest)
    assert len(digests) == 1


# --------------------------------------------------------------------------------------------------------------------
# platforms, families, attestations


def converted(source: images.Image, scratch: Path, **options: Any) -> tuple[Converted, dict[str, Any], Path]:
    """What came of an image, its root document, and the layout it is in."""
    write_layout(scratch / "source", source, "v1")
    done = convert(f"oci:{scratch}/source:v1", f"oci:{scratch}/there:v1", **options)
    return done, read_json(scratch / "there", done.descriptor.digest), scratch / "there"


def test_all_platforms_and_shared_layers_once(scratch: Path) -> None:
    events: list[Event] = []
    done, document, there = converted(several_platforms(), scratch, compression="estargz", report=events.append)
    assert [str(one.platform) for one in done.images] == ["linux/amd64", "linux/arm64"]
    assert [entry["platform"]["architecture"] for entry in document["manifests"]] == ["amd64", "arm64"]
    assert [event.action for event in events if event.finished] == ["convert"] * 3  # of four, two of which are one
    first, second = (read_json(there, entry["digest"]) for entry in document["manifests"])
    assert first["layers"][0] == second["layers"][0] != first["layers"][1]


def test_docker_types_become_oci_for_estargz(scratch: Path) -> None:
    done, document, there = converted(several_platforms(docker=True), scratch, compression="estargz")
    assert done.descriptor.media_type == document["mediaType"] == OCI_TYPES["index"]
    manifest = read_json(there, document["manifests"][0]["digest"])
    assert (manifest["mediaType"], manifest["config"]["mediaType"]) == (OCI_TYPES["manifest"], OCI_TYPES["config"])
    assert all(
        layer["mediaType"] == OCI_TYPES["estargz"] and TOC_DIGEST in layer["annotations"]
        for layer in manifest["layers"]
    )


def test_docker_types_stay_where_they_can(scratch: Path) -> None:
    done, document, _ = converted(image(docker=True), scratch, compression="uncompressed")
    assert done.descriptor.media_type == images.DOCKER_TYPES["manifest"]
    assert {layer["mediaType"] for layer in document["layers"]} == {images.DOCKER_TYPES["uncompressed"]}


def test_docker_types_are_refused_with_a_reason(scratch: Path) -> None:
    with pytest.raises(UsageError, match="OCI media types: Docker's lose the annotations"):
        converted(image(docker=True), scratch, compression="estargz", oci_types=False)
    assert not (scratch / "there").exists()
    with pytest.raises(UsageError, match="is an eStargz layer, which Docker's media types have no annotations for"):
        converted(image(compression="estargz"), scratch, oci_types=False)
    assert not (scratch / "there/index.json").exists()
    _, document, _ = converted(image(docker=True), scratch, compression="zstd", oci_types=False)
    assert {layer["mediaType"] for layer in document["layers"]} == {f"{images.DOCKER}.image.rootfs.diff.tar.zstd"}


@pytest.mark.parametrize("treatment", ["repoint", "keep", "drop"])
def test_attestations(treatment: str, scratch: Path) -> None:
    original = several_platforms(attested=True)
    _, document, there = converted(original, scratch, compression="estargz", attestations=treatment)
    entries = document["manifests"]
    if treatment == "drop":
        assert [entry["platform"]["architecture"] for entry in entries] == ["amd64", "arm64"]
        return
    about = [entry["annotations"]["vnd.docker.reference.digest"] for entry in entries[2:]]
    pointed_at = entries if treatment == "repoint" else original.document["manifests"]
    assert about == [entry["digest"] for entry in pointed_at[:2]]
    for entry, before in zip(entries[2:], original.document["manifests"][2:], strict=True):
        assert entry["digest"] == before["digest"]
        assert read_blob(there, read_json(there, entry["digest"])["layers"][0]["digest"]).startswith(b'{"_type"')


def with_root(one: images.Image, document: dict[str, Any], *blobs: bytes) -> images.Image:
    """Another root document in front of an image's blobs."""
    text = json.dumps(document).encode()
    more = {sha256(blob): blob for blob in (text, *blobs)}
    return images.Image(described(document["mediaType"], text), one.blobs | more)


def test_the_subject_of_an_artifact_is_repointed(scratch: Path) -> None:
    subject = image()
    payload, empty = b"signature", b"{}"
    signature = {
        "schemaVersion": 2,
        "mediaType": OCI_TYPES["manifest"],
        "artifactType": "application/vnd.example.signature",
        "config": described("application/vnd.oci.empty.v1+json", empty),
        "layers": [described("application/octet-stream", payload)],
        "subject": subject.root,
    }
    artifact = with_root(subject, signature, payload, empty)
    both = {"schemaVersion": 2, "mediaType": OCI_TYPES["index"], "manifests": [artifact.root, subject.root]}
    _, document, there = converted(with_root(artifact, both), scratch, compression="estargz")
    rewritten = read_json(there, document["manifests"][0]["digest"])
    assert rewritten == {**signature, "subject": {key: document["manifests"][1][key] for key in subject.root}}


def test_what_is_about_an_image_by_its_subject_is_dropped_too(scratch: Path) -> None:
    subject = image()
    empty = b"{}"
    about = {
        "schemaVersion": 2,
        "mediaType": OCI_TYPES["manifest"],
        "config": described("application/vnd.oci.empty.v1+json", empty),
        "layers": [],
        "subject": subject.root,
    }
    artifact = with_root(subject, about, empty)
    both = {"schemaVersion": 2, "mediaType": OCI_TYPES["index"], "manifests": [subject.root, artifact.root]}
    _, document, _ = converted(with_root(artifact, both), scratch, compression="zstd", attestations="drop")
    assert len(document["manifests"]) == 1


def test_a_blob_that_is_listed_twice_is_described_twice(scratch: Path) -> None:
    source = image((images.FILES[0],))
    manifest = source.document
    (layer,) = manifest["layers"]
    manifest["layers"] = [{**layer, "annotations": {"number": str(number)}} for number in range(2)]
    config = json.loads(source.blobs[manifest["config"]["digest"]])
    config["rootfs"]["diff_ids"] *= 2
    text = json.dumps(config).encode()
    manifest["config"] = described(OCI_TYPES["config"], text)
    twice = with_root(source, manifest, text)
    done, _, _ = converted(twice, scratch)
    assert done.descriptor.digest == twice.root["digest"]


@pytest.mark.parametrize("compression", ["estargz", "zstd"])
def test_no_layer_is_of_two_lazy_formats(compression: str, scratch: Path) -> None:
    """A descriptor that states an eStargz table and zstd:chunked's, too, is an error to containers/storage."""
    source = image((images.FILES[0],))
    manifest = source.document
    prefixes = ("io.github.containers.zstd-chunked", "io.containers.zstd-chunked")
    chunked = {f"{prefix}.manifest-checksum": sha256(b"") for prefix in prefixes}
    manifest["layers"][0]["annotations"] = chunked | {f"{prefixes[0]}.manifest-position": "1:2:3:1"}
    _, document, _ = converted(with_root(source, manifest), scratch, compression=compression)
    (layer,) = document["layers"]
    assert set(layer.get("annotations", {})) == ({TOC_DIGEST, UNCOMPRESSED_SIZE} if compression == "estargz" else set())


@pytest.mark.parametrize(
    ("options", "text"),
    [({"level": 3}, "a level is of a compression"), ({"tags": ["x"]}, "only images of a registry have further tags")],
)
def test_options_that_cannot_be_honoured(options: dict[str, Any], text: str, scratch: Path) -> None:
    with pytest.raises(UsageError, match=text):
        converted(image(), scratch, **options)


def test_layers_of_unknown_types_stay_as_they_are(scratch: Path) -> None:
    known = image()
    secret = b"encrypted"
    manifest = known.document
    manifest["layers"].append(described(f"{images.OCI}.layer.v1.tar+gzip+encrypted", secret))
    config = json.loads(known.blobs[manifest["config"]["digest"]])
    config["rootfs"]["diff_ids"].append(sha256(b"whatever"))
    text = json.dumps(config).encode()
    manifest["config"] = described(OCI_TYPES["config"], text)
    done, document, _ = converted(with_root(known, manifest, secret, text), scratch, compression="zstd")
    assert [layer.action for layer in done.images[0].layers] == ["converted", "converted", "copied"]
    assert document["layers"][2] == manifest["layers"][2]


def test_one_platform_comes_without_an_index(scratch: Path) -> None:
    _, document, there = converted(
        several_platforms(attested=True), scratch, compression="gzip", platforms=["linux/aarch64"]
    )
    assert document["mediaType"] == OCI_TYPES["manifest"]
    assert read_json(there, document["config"]["digest"])["architecture"] == "arm64"
    assert len(stored_digests(there)) == 4


def test_several_platforms_with_what_is_attested_of_them(scratch: Path) -> None:
    names = ("amd64", "arm64", "s390x")
    platforms = [image(({"arch": name.encode()},), architecture=name) for name in names]
    source = index(*platforms, *map(images.attestation, platforms))
    _, document, _ = converted(source, scratch, compression="estargz", platforms=["linux/s390x", "linux/amd64"])
    digests = [entry["digest"] for entry in document["manifests"]]
    assert [entry["platform"]["architecture"] for entry in document["manifests"]] == [
        "amd64",
        "s390x",
        "unknown",
        "unknown",
    ]
    assert [e["annotations"]["vnd.docker.reference.digest"] for e in document["manifests"][2:]] == digests[:2]


def test_platforms_that_are_not_wanted_need_not_be_there(scratch: Path) -> None:
    source = several_platforms()
    for digest in {source.document["manifests"][1]["digest"]}:
        del source.blobs[digest]
    done, _, _ = converted(source, scratch, compression="gzip", platforms=["linux/amd64"])
    assert [str(one.platform) for one in done.images] == ["linux/amd64"]


def test_a_platform_that_is_missing_is_named(scratch: Path) -> None:
    with pytest.raises(UsageError, match="no image for linux/riscv64; there are linux/amd64, linux/arm64"):
        converted(several_platforms(), scratch, platforms=["linux/amd64", "linux/riscv64"])


def test_an_archive_of_dockers_is_for_one_platform(scratch: Path) -> None:
    write_layout(scratch / "source", several_platforms(), "v1")
    with pytest.raises(UsageError, match="choose a platform"):
        convert(f"oci:{scratch}/source:v1", f"docker-archive:{scratch}/image.tar:app:1")
    convert(f"oci:{scratch}/source:v1", f"docker-archive:{scratch}/image.tar:app:1", platforms=["linux/arm64"])


def test_the_base_stays_unless_forced(scratch: Path) -> None:
    base = image((images.FILES[0],))
    write_layout(scratch / "base", base, "v1")
    options = {"compression": "estargz", "base": f"oci:{scratch}/base:v1"}
    done, _, _ = converted(image(), scratch, **options)
    assert [layer.action for layer in done.images[0].layers] == ["copied", "converted"]
    done = convert(f"oci:{scratch}/source:v1", f"oci:{scratch}/forced:v1", force=True, **options)
    assert [layer.action for layer in done.images[0].layers] == ["converted", "converted"]


def test_embedded_data_is_not_kept_for_other_content(scratch: Path) -> None:
    source = image()
    manifest = source.document
    manifest["config"]["data"] = "e30="
    _, document, _ = converted(with_root(source, manifest), scratch, compression="estargz")
    assert "data" not in document["config"]


# --------------------------------------------------------------------------------------------------------------------
# what is wrong with an image


def test_a_wrong_diff_id_is_found(scratch: Path) -> None:
    source = restated(image(), 1, sha256(b"another"))
    with pytest.raises(VerificationError, match=f"its configuration says {sha256(b'another')}"):
        converted(source, scratch, compression="estargz")


@pytest.mark.parametrize("compression", [None, "estargz", "uncompressed"])
def test_a_damaged_layer_ends_nowhere(compression: str | None, scratch: Path) -> None:
    source = image()
    digest = source.document["layers"][1]["digest"]
    write_layout(scratch / "source", source, "v1")
    path = scratch / "source/blobs" / digest.replace(":", "/")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(Exception, match="damaged|bad gzip|digest|truncated"):
        convert(f"oci:{scratch}/source:v1", f"oci:{scratch}/there:v1", compression=compression)
    assert not (scratch / "there/index.json").exists()


def test_diff_ids_and_layers_must_be_as_many(scratch: Path) -> None:
    source = image()
    manifest = source.document
    del manifest["layers"][1]
    with pytest.raises(ImageError, match="1 layers, and 2 DiffIDs"):
        converted(with_root(source, manifest), scratch)


# --------------------------------------------------------------------------------------------------------------------
# the cache, and uploads that are lost


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The digests of the layers that are opened from now on."""
    opened: list[str] = []
    original = Layout.open

    def noted(self: Layout, descriptor: Any) -> Any:
        opened.append(descriptor.digest)
        return original(self, descriptor)

    monkeypatch.setattr(Layout, "open", noted)
    return opened


def test_a_variant_is_made_once(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = several_platforms()
    layers = {blob["digest"] for child in source.children for blob in child.document["layers"]}
    write_layout(scratch / "source", source, "v1")
    with VariantStore(scratch / "cache") as cache:
        first = convert(f"oci:{scratch}/source:v1", f"oci:{scratch}/one:v1", compression="estargz", cache=cache)
        opened = count_reads(monkeypatch)
        second = convert(f"oci:{scratch}/source:v1", f"oci:{scratch}/two:v1", compression="estargz", cache=cache)
        assert not set(opened) & layers
        assert first.descriptor == second.descriptor
        assert {layer.action for one in second.images for layer in one.layers} == {"reused"}
        # Back from a blob that the cache has made: it knows which tar that holds.
        plain = convert(f"oci:{scratch}/two:v1", f"oci:{scratch}/plain:v1", compression="uncompressed", cache=cache)
        again = convert(f"oci:{scratch}/two:v1", f"oci:{scratch}/again:v1", compression="uncompressed", cache=cache)
    assert {layer.action for one in plain.images for layer in one.layers} == {"converted"}
    assert {layer.action for one in again.images for layer in one.layers} == {"reused"}
    blobs = {layer.descriptor.digest for done in (first, plain) for one in done.images for layer in one.layers}
    assert stored_digests(scratch / "cache") == blobs


def restated(source: images.Image, number: int, diff_id: str) -> images.Image:
    """An image whose configuration says something else of one of its layers."""
    manifest = source.document
    config = json.loads(source.blobs[manifest["config"]["digest"]])
    config["rootfs"]["diff_ids"][number] = diff_id
    text = json.dumps(config).encode()
    manifest["config"] = described(OCI_TYPES["config"], text)
    return with_root(source, manifest, text)


def test_what_an_image_says_of_a_blob_is_not_remembered(scratch: Path) -> None:
    """An image that says that another's layer holds what its own does gets what it asks for, and the other does not."""
    evil, victim = image(({"bin/sh": b"evil"},)), image(({"bin/sh": b"good"},))
    stated = json.loads(evil.blobs[evil.document["config"]["digest"]])["rootfs"]["diff_ids"][0]
    for name, one in (("evil", evil), ("liar", restated(victim, 0, stated)), ("victim", victim)):
        write_layout(scratch / name, one, "v1")
    with VariantStore(scratch / "cache") as cache:
        for name in ("evil", "liar"):
            convert(f"oci:{scratch}/{name}:v1", f"oci:{scratch}/{name}-zstd:v1", compression="zstd", cache=cache)
        done = convert(f"oci:{scratch}/victim:v1", f"oci:{scratch}/there:v1", compression="zstd", cache=cache)
        (layer,) = done.images[0].layers
        assert layer.action == "converted"
        blob = read_blob(scratch / "there", layer.descriptor.digest)
        assert b"good" in inflated(blob, layer.descriptor.media_type)
        # And once the blob was seen, nobody is believed who says something else of it.
        with pytest.raises(VerificationError, match="its configuration says"):
            convert(f"oci:{scratch}/liar:v1", f"oci:{scratch}/lie:v1", compression="zstd", cache=cache)


def test_a_damaged_variant_is_made_anew(scratch: Path) -> None:
    write_layout(scratch / "source", image(), "v1")
    with VariantStore(scratch / "cache") as cache:
        first = convert(f"oci:{scratch}/source:v1", f"oci:{scratch}/one:v1", compression="zstd", cache=cache)
        digest = first.images[0].layers[1].descriptor.digest
        path = scratch / "cache/blobs" / digest.replace(":", "/")
        data = bytearray(path.read_bytes())
        data[10] ^= 1
        path.unlink()
        path.write_bytes(data)
        second = convert(f"oci:{scratch}/source:v1", f"oci:{scratch}/two:v1", compression="zstd", cache=cache)
    assert second.descriptor == first.descriptor
    assert [layer.action for layer in second.images[0].layers] == ["reused", "converted"]
    read_blob(scratch / "two", digest)


class Losing:
    """An upload to a target far away that is lost after some bytes, as often as is wished."""

    losses = 0

    def __init__(self, upload: BlobUpload) -> None:
        self._upload = upload
        self.commit, self.abort = upload.commit, upload.abort

    def write(self, data: bytes, /) -> int:
        if Losing.losses > 0:
            Losing.losses -= 1
            raise UploadBrokenError("the connection was lost")
        return self._upload.write(data)

    def __enter__(self) -> Losing:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()


@pytest.fixture
def losing(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes layouts lose so many uploads."""
    monkeypatch.setattr(Layout, "upload", lambda self, room=None: Losing(FolderUpload(self)))
    monkeypatch.setattr(Layout, "put", lambda self, descriptor, open: copy_blob(descriptor, open, self.upload))
    monkeypatch.setattr(Layout, "remote", True)

    def lose(times: int) -> None:
        Losing.losses = times

    return lose


def test_a_lost_upload_is_made_again(losing: Callable[[int], None], scratch: Path) -> None:
    write_layout(scratch / "source", image(), "v1")
    losing(moving._MAX_FRUITLESS)
    done = convert(f"oci:{scratch}/source:v1", f"oci:{scratch}/there:v1", compression="estargz")
    plain = convert(f"oci:{scratch}/source:v1", f"oci:{scratch}/plain:v1", compression="estargz")
    assert done.descriptor == plain.descriptor


def test_an_upload_that_is_lost_over_and_over_gives_up(losing: Callable[[int], None], scratch: Path) -> None:
    write_layout(scratch / "source", image(), "v1")
    losing(1000)
    with pytest.raises(UploadBrokenError):
        convert(f"oci:{scratch}/source:v1", f"oci:{scratch}/there:v1", compression="estargz")
    assert not (scratch / "there/index.json").exists()


def test_with_a_cache_a_lost_upload_is_read_again(
    losing: Callable[[int], None], scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_layout(scratch / "source", image(), "v1")
    builds: list[object] = []
    original = moving.build_from
    monkeypatch.setattr(moving, "build_from", lambda stream, *a: builds.append(stream) or original(stream, *a))
    with VariantStore(scratch / "cache") as cache:
        losing(1)
        convert(f"oci:{scratch}/source:v1", f"oci:{scratch}/there:v1", compression="estargz", cache=cache)
        assert len(builds) == 2  # one for each layer
        losing(1000)
        with pytest.raises(UploadBrokenError):
            convert(f"oci:{scratch}/source:v1", f"oci:{scratch}/lost:v1", compression="gzip", level=9, cache=cache)
        losing(0)
        made = len(builds)
        convert(f"oci:{scratch}/source:v1", f"oci:{scratch}/found:v1", compression="gzip", level=9, cache=cache)
        assert len(builds) - made <= 1  # what was finished before the failure is found
