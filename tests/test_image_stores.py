"""Images on disk: skopeo, umoci, podman, containerd and tarfile judge what is written, and have written what is read."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import random
import shutil
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sample_images as images
from conftest import IS_ROOT, missing
from reference.tar_headers import pax
from sample_images import Image
from tars import END, base256, entry, nothing_leaks, sha256

from estargz.errors import EstargzError, ImageError, SinkError, SourceError, UsageError, VerificationError
from estargz.image.archive import ArchiveTarget
from estargz.image.model import Descriptor, Index, Manifest, is_index
from estargz.image.reference import Reference
from estargz.image.store import ImageSource, ImageTarget, open_source, open_target

TRANSPORTS = ("oci", "oci-archive", "docker-archive", "dir")
KINDS: dict[str, Callable[[], Image]] = {
    "gzip": images.image,
    "uncompressed": lambda: images.image(compression="uncompressed"),
    "estargz": lambda: images.image(compression="estargz"),
    "docker": lambda: images.image(docker=True),
    "annotated": lambda: images.image(annotations={"org.example": "é"}),
}
SEVERAL: dict[str, Callable[[], Image]] = {
    "index": images.several_platforms,
    "list": lambda: images.several_platforms(docker=True),
    "attested": lambda: images.several_platforms(attested=True, compression="estargz"),
}


def command(*arguments: str | Path, **environment: str) -> bytes:
    if shutil.which(str(arguments[0])) is None:
        missing(f"{arguments[0]} is not installed")
    done = subprocess.run(arguments, capture_output=True, check=False, env={**os.environ, **environment}, timeout=60)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-1000:]
    return done.stdout


def skopeo(*arguments: str | Path) -> bytes:
    return command("skopeo", "--insecure-policy", *arguments)


def source(text: str | Reference) -> ImageSource:
    return open_source(Reference.parse(text) if isinstance(text, str) else text)


def target(text: str, *names: str, descriptor: int | None = None) -> ImageTarget:
    return open_target(Reference.parse(text), names=names, descriptor=descriptor)


def transfer(origin: ImageSource, destination: ImageTarget, *, link: bool = False) -> Descriptor:
    """Copies an image with all that it leads to."""
    root = origin.resolve()

    def move(descriptor: Descriptor) -> None:
        data = origin.read(descriptor)
        if is_index(descriptor.media_type):
            for child in Index.parse(data, descriptor.media_type).manifests:
                move(child)
        else:
            manifest = Manifest.parse(data, descriptor.media_type)
            for blob in (manifest.config, *manifest.layers):
                if not link or not destination.link(blob, origin):
                    destination.put(blob, lambda blob=blob: origin.open(blob))  # type: ignore[misc]
                assert destination.has(blob)
        made = destination.put_manifest(descriptor.media_type, data)
        assert (made.digest, made.size) == (descriptor.digest, descriptor.size)

    move(root)
    destination.finish(root)
    origin.close()
    destination.close()
    return root


def written(folder: Path, transport: str, one: Image, *names: str) -> str:
    """Stores a hand-made image by way of the package; its reference."""
    images.write_layout(folder / "made", one)
    place = reference_in(folder, transport)
    with nothing_leaks():
        transfer(source(f"oci:{folder}/made:v1"), target(place, *names))
    return place


def reference_in(folder: Path, transport: str, name: str = "out") -> str:
    tail = {"oci": ":v1", "oci-archive": ":v1", "docker-archive": ":example.org/app:v1", "dir": ""}[transport]
    return f"{transport}:{folder}/{name}{tail}"


def blobs_in(folder: Path) -> dict[str, bytes]:
    """Those of a directory that skopeo wrote, by their digests."""
    files = [path for path in folder.iterdir() if path.name != "version"]
    return {sha256(path.read_bytes()): path.read_bytes() for path in files}


def contents_of(place: str) -> dict[str, bytes]:
    """All that the package reads of an image, by digest."""
    origin = source(place)
    found: dict[str, bytes] = {}

    def look(descriptor: Descriptor) -> None:
        data = found[descriptor.digest] = origin.read(descriptor)
        if is_index(descriptor.media_type):
            for child in Index.parse(data, descriptor.media_type).manifests:
                look(child)
            return
        manifest = Manifest.parse(data, descriptor.media_type)
        found[manifest.config.digest] = origin.read(manifest.config)
        for layer in manifest.layers:
            with origin.open(layer) as reader:
                found[layer.digest] = b"".join(iter(lambda: reader.read(1000), b""))
            assert origin.read_at(layer, 3, 10) == found[layer.digest][3:13]
            assert origin.read_at(layer, layer.size - 3, 10) == found[layer.digest][-3:]

    look(origin.resolve())
    origin.close()
    assert all(sha256(data) == digest for digest, data in found.items())
    return found


def tars_of(one: Image) -> list[bytes]:
    layers = [one.blobs[layer["digest"]] for layer in one.document["layers"]]
    return [gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data for data in layers]


# ------------------------------------------------------------------------------------------------- written here


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transport", ("oci", "oci-archive", "dir"))
def test_skopeo_copies_what_is_written(tmp_path: Path, transport: str, kind: str) -> None:
    one = KINDS[kind]()
    place = written(tmp_path, transport, one)
    if kind == "docker":  # skopeo finds OCI's types only by name
        place = place.removesuffix(":v1")
    assert sha256(skopeo("inspect", "--raw", place)) == one.root["digest"]
    skopeo("copy", place, f"dir:{tmp_path}/copied")
    assert blobs_in(tmp_path / "copied") == one.blobs


@pytest.mark.parametrize("kind", KINDS)
def test_skopeo_reads_a_written_docker_archive(tmp_path: Path, kind: str) -> None:
    one = KINDS[kind]()
    place = written(tmp_path, "docker-archive", one)
    skopeo("copy", place, f"dir:{tmp_path}/copied")
    copied = blobs_in(tmp_path / "copied")
    assert set(tars_of(one)) | {one.blobs[one.document["config"]["digest"]]} <= set(copied.values())
    assert json.loads(skopeo("inspect", "--config", place))["config"]["Cmd"] == ["/usr/big"]
    tags = json.loads(skopeo("list-tags", f"docker-archive:{tmp_path}/out"))["Tags"]
    assert tags == ["example.org/app:v1"]


@pytest.mark.parametrize("kind", SEVERAL)
@pytest.mark.parametrize("transport", ("oci", "oci-archive", "dir"))
def test_skopeo_copies_all_platforms(tmp_path: Path, transport: str, kind: str) -> None:
    several = SEVERAL[kind]()
    place = written(tmp_path, transport, several)
    if kind == "list":
        place = place.removesuffix(":v1")
    assert sha256(skopeo("inspect", "--raw", place)) == several.root["digest"]
    skopeo("copy", "--all", place, f"dir:{tmp_path}/copied")
    assert blobs_in(tmp_path / "copied") == several.blobs


def test_umoci_unpacks_a_written_layout(tmp_path: Path, root: None) -> None:
    written(tmp_path, "oci", images.image(compression="estargz"))
    command("umoci", "unpack", "--image", f"{tmp_path}/out:v1", tmp_path / "bundle")
    found = tmp_path / "bundle" / "rootfs"
    assert (found / "etc/changed").read_bytes() == b"new\n"
    assert (found / "etc/base").read_bytes() == b"below\n"
    assert (found / "usr/big").stat().st_size == 200_000


def test_what_umoci_wrote_is_read(tmp_path: Path, root: None) -> None:
    (tmp_path / "file").write_bytes(b"inserted\n")
    command("umoci", "init", "--layout", tmp_path / "made")
    command("umoci", "new", "--image", f"{tmp_path}/made:v1")
    command("umoci", "insert", "--image", f"{tmp_path}/made:v1", tmp_path / "file", "/file")
    found = list(contents_of(f"oci:{tmp_path}/made:v1").values())
    assert found[0] == skopeo("inspect", "--raw", f"oci:{tmp_path}/made:v1")
    with tarfile.open(fileobj=io.BytesIO(found[2])) as tar:  # umoci leaves the end of this one out
        assert (tar.next() or tarfile.TarInfo()).name == "file"


@pytest.fixture
def podman(scratch: Path) -> Callable[..., str]:
    if not IS_ROOT:
        pytest.skip("needs root: podman's storage")
    settings = ["--storage-driver=vfs", "--cgroup-manager=cgroupfs", "--events-backend=none"]
    folders = [f"--root={scratch}/root", f"--runroot={scratch}/run", f"--tmpdir={scratch}/tmp"]
    return lambda *arguments: command("podman", *settings, *folders, *arguments).decode().strip()


@pytest.mark.parametrize("kind", ("gzip", "estargz"))
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_podman_takes_what_is_written(tmp_path: Path, podman: Callable[..., str], transport: str, kind: str) -> None:
    one = images.image(compression=kind)
    place = written(tmp_path, transport, one, "example.org/app:v1")
    if "archive" in transport:
        assert "example.org/app:v1" in podman("load", "-i", tmp_path / "out")
    else:
        podman("pull", "-q", place)
    shown = json.loads(podman("image", "inspect", podman("images", "-q", "--no-trunc")))[0]
    config = json.loads(one.blobs[one.document["config"]["digest"]])
    assert shown["RootFS"]["Layers"] == config["rootfs"]["diff_ids"]
    assert shown["Config"]["Cmd"] == ["/usr/big"]


@pytest.fixture(scope="module")
def containerd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., bytes]]:
    """A private one, and the client that speaks to it."""
    if shutil.which("containerd") is None or shutil.which("ctr") is None:
        missing("containerd is not installed")
    if not IS_ROOT:
        pytest.skip("needs root: containerd")
    folder = tmp_path_factory.mktemp("containerd")
    disabled = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
    (folder / "config.toml").write_text(
        f'version = 2\nroot = "{folder}/root"\nstate = "{folder}/state"\ndisabled_plugins = {json.dumps(disabled)}\n'
        f'[grpc]\naddress = "{folder}/socket"\n'
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(["containerd", "--config", folder / "config.toml"], stdout=log, stderr=log)
    try:
        until = time.monotonic() + 30
        while not (folder / "socket").exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        yield lambda *arguments: command("ctr", "--address", folder / "socket", *arguments)
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.parametrize("transport", ("oci-archive", "docker-archive"))
@pytest.mark.parametrize("kind", ("gzip", "estargz", "docker"))
def test_containerd_imports_what_is_written(
    tmp_path: Path, containerd: Callable[..., bytes], transport: str, kind: str
) -> None:
    one = KINDS[kind]()
    name = f"example.org/{transport}/{kind}:v1"
    images.write_layout(tmp_path / "made", one)
    place = f"{transport}:{tmp_path}/out" + (f":{name}" if transport == "docker-archive" else "")
    transfer(source(f"oci:{tmp_path}/made"), target(place, name))
    containerd("images", "import", "--snapshotter", "native", tmp_path / "out")
    listed = containerd("images", "ls").decode().splitlines()
    assert any(line.startswith(name) and one.root["digest"] in line for line in listed)
    assert {digest: containerd("content", "get", digest) for digest in one.blobs} == one.blobs


# ------------------------------------------------------------------------------------------------- read here


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transport", ("oci", "oci-archive", "dir"))
def test_what_skopeo_wrote_is_read(tmp_path: Path, transport: str, kind: str) -> None:
    images.write_layout(tmp_path / "made", KINDS[kind](), None)
    place = reference_in(tmp_path, transport)
    skopeo("copy", f"oci:{tmp_path}/made", place)
    found = contents_of(place)
    assert sha256(skopeo("inspect", "--raw", place)) == next(iter(found))
    skopeo("copy", place, f"dir:{tmp_path}/copied")
    assert blobs_in(tmp_path / "copied") == found


@pytest.mark.parametrize("transport", ("oci", "oci-archive", "dir"))
def test_what_skopeo_wrote_for_all_platforms_is_read(tmp_path: Path, transport: str) -> None:
    several = images.several_platforms()
    images.write_layout(tmp_path / "made", several)
    place = reference_in(tmp_path, transport)
    skopeo("copy", "--all", f"oci:{tmp_path}/made:v1", place)
    assert contents_of(place) == several.blobs


@pytest.mark.parametrize("kind", KINDS)
def test_a_docker_archive_of_skopeo_is_read(tmp_path: Path, kind: str) -> None:
    one = KINDS[kind]()
    images.write_layout(tmp_path / "made", one, None)
    place = reference_in(tmp_path, "docker-archive")
    skopeo("copy", f"oci:{tmp_path}/made", place)
    found = list(contents_of(place).values())
    assert found[1:] == [one.blobs[one.document["config"]["digest"]], *tars_of(one)]
    types = [layer["mediaType"] for layer in json.loads(found[0])["layers"]]
    assert types == [images.DOCKER_TYPES["uncompressed"]] * 2


def test_what_podman_saved_is_read(tmp_path: Path, podman: Callable[..., str]) -> None:
    one = images.image()
    images.write_layout(tmp_path / "made", one)
    podman("pull", "-q", f"oci:{tmp_path}/made:v1")
    identity = podman("images", "-q", "--no-trunc").removeprefix("sha256:")
    podman("save", "--format", "docker-archive", "-o", tmp_path / "docker", identity)
    podman("save", "--format", "oci-archive", "-o", tmp_path / "oci", identity)
    assert list(contents_of(f"docker-archive:{tmp_path}/docker").values())[2:] == tars_of(one)
    oci = contents_of(f"oci-archive:{tmp_path}/oci")
    assert [gzip.decompress(data) for data in list(oci.values())[2:]] == tars_of(one)


@pytest.mark.parametrize("packed", (False, True))
def test_what_docker_saved_is_read(tmp_path: Path, packed: bool) -> None:
    one = images.image(compression="uncompressed")
    data = images.tar_of_files(images.docker_save_files(one, "app:v1", "other:v2"))
    (tmp_path / "saved").write_bytes(gzip.compress(data) if packed else data)
    for name in ("", ":app:v1", ":docker.io/library/other:v2"):
        found = contents_of(f"docker-archive:{tmp_path}/saved{name}")
        assert list(found.values())[1:] == [one.blobs[one.document["config"]["digest"]], *tars_of(one)]
    if not packed:  # it is an archive to others too
        skopeo("copy", f"docker-archive:{tmp_path}/saved", f"dir:{tmp_path}/copied")
    with pytest.raises(ImageError, match=r"no such image.*docker.io/library/app:v1"):
        contents_of(f"docker-archive:{tmp_path}/saved:app:v3")


def test_compressed_layers_of_a_docker_archive_keep_their_bytes(tmp_path: Path) -> None:
    one = images.image(compression="gzip")
    (tmp_path / "saved").write_bytes(images.tar_of_files(images.docker_save_files(one)))
    found = contents_of(f"docker-archive:{tmp_path}/saved")
    assert {layer["digest"] for layer in one.document["layers"]} <= set(found)


def test_layers_that_are_links_to_others_are_read(tmp_path: Path) -> None:
    """docker save wrote a layer that an image has twice as a symbolic link; GNU tar writes hard links."""
    files = ({"same": b"1"}, {"same": b"1"}, {"same": b"1"})
    one = images.image(files, compression="uncompressed")
    saved = images.docker_save_files(one)
    first, second, third = (f"{number:064x}/layer.tar" for number in range(3))
    data = saved.pop(first)
    del saved[second], saved[third]
    links = [
        entry(second.encode(), type=b"2", link=f"../{first}".encode()),
        entry(third.encode(), type=b"1", link=f"./{first}".encode()),
    ]
    (tmp_path / "saved").write_bytes(b"".join(links) + images.tar_of_files({first: data, **saved}))
    assert list(contents_of(f"docker-archive:{tmp_path}/saved").values())[2] == data


def test_the_manifest_that_an_archive_of_docker_25_has_is_taken(tmp_path: Path) -> None:
    """With the annotations that lazy pulling needs; of an index, the platform that was saved."""
    several = images.several_platforms(compression="estargz")
    one = several.children[1]
    for made in (one, several):
        files = images.layout_files(("v1", made))
        for digest in several.children[0].blobs.keys() - one.blobs.keys():
            files.pop(f"blobs/{digest.replace(':', '/')}", None)
        names = [one.document["config"]["digest"], *(layer["digest"] for layer in one.document["layers"])]
        config, *layers = [f"blobs/{digest.replace(':', '/')}" for digest in names]
        item = {"Config": config, "RepoTags": ["app:v1"], "Layers": layers}
        (tmp_path / "saved").write_bytes(images.tar_of_files(files | {"manifest.json": json.dumps([item]).encode()}))
        assert contents_of(f"docker-archive:{tmp_path}/saved:app:v1") == one.blobs


def test_a_layout_in_a_tar_of_a_directory_is_read(tmp_path: Path) -> None:
    one = images.image()
    images.write_layout(tmp_path / "made", one)
    for options in ((), ("--format=pax",), ("--format=gnu", "-z")):
        command("tar", "-c", *options, "-f", tmp_path / "packed", "-C", tmp_path / "made", ".")
        assert contents_of(f"oci-archive:{tmp_path}/packed:v1") == one.blobs


def test_an_archive_without_room_for_what_is_on_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with nothing_leaks(), pytest.raises(SinkError, match="cannot be written: No space left on device; check") as caught:
        ArchiveTarget(Reference.parse(f"oci-archive:{tmp_path}/image.tar"))
    del caught
    assert os.listdir(tmp_path) == []


def test_an_archive_may_come_through_a_pipe(tmp_path: Path) -> None:
    one = images.image()
    data = images.tar_of_files(images.layout_files(("v1", one)))
    reading, writing = os.pipe()
    feeding = threading.Thread(target=lambda: os.fdopen(writing, "wb").write(data))
    feeding.start()
    assert contents_of(f"oci-archive:/dev/fd/{reading}:v1") == one.blobs
    feeding.join()
    os.close(reading)


def test_a_manifest_below_an_index_is_found_by_its_digest(tmp_path: Path) -> None:
    several = images.several_platforms()
    images.write_layout(tmp_path / "made", several)
    child = several.children[0]
    found = source(f"oci:{tmp_path}/made@{child.root['digest']}").resolve()
    assert (found.digest, found.size, found.media_type) == tuple(
        child.root[key] for key in ("digest", "size", "mediaType")
    )
    with pytest.raises(ImageError, match="there is no sha256:"):
        source(f"oci:{tmp_path}/made@sha256:{'0' * 64}").resolve()


# ------------------------------------------------------------------------------------------------- names and several images


def test_a_layout_with_several_images_wants_a_name(tmp_path: Path) -> None:
    first, second = images.image(), images.image(({"other": b""},))
    images.write_files(images.layout_files(("v1", first), ("v2", second)), tmp_path)
    assert source(f"oci:{tmp_path}:v2").resolve().digest == second.root["digest"]
    with pytest.raises(ImageError, match=r"several images.*v1, v2"):
        source(f"oci:{tmp_path}").resolve()
    with pytest.raises(ImageError, match=r"no such image.*v1, v2"):
        source(f"oci:{tmp_path}:v3").resolve()


def test_what_is_attested_beside_an_image_is_no_image_of_its_own(tmp_path: Path) -> None:
    one = images.image()
    images.write_files(images.layout_files((None, one), (None, images.attestation(one))), tmp_path)
    assert source(f"oci:{tmp_path}").resolve().digest == one.root["digest"]


def test_names_are_written_as_buildkit_does(tmp_path: Path) -> None:
    one = images.image()
    written(tmp_path, "oci", one, "docker.io/library/app:v1", "ghcr.io/a/b:v2")
    entries = json.loads((tmp_path / "out" / "index.json").read_bytes())["manifests"]
    assert [entry["annotations"] for entry in entries] == [
        {"io.containerd.image.name": "docker.io/library/app:v1", images.REF_NAME: "v1"},
        {"io.containerd.image.name": "ghcr.io/a/b:v2", images.REF_NAME: "v2"},
    ]
    for name in ("v1", "v2", "ghcr.io/a/b:v2"):
        assert source(f"oci:{tmp_path}/out:{name}").resolve().digest == one.root["digest"]


def test_a_name_moves_to_the_newer_image(tmp_path: Path) -> None:
    first, second, third = images.image(), images.image(({"two": b""},)), images.image(({"three": b""},))
    for name, one in (("v1", first), ("v2", second), ("v1", third)):
        images.write_layout(tmp_path / name / one.root["digest"][-5:], one)
        transfer(source(f"oci:{tmp_path}/{name}/{one.root['digest'][-5:]}"), target(f"oci:{tmp_path}/out:{name}"))
    entries = json.loads((tmp_path / "out" / "index.json").read_bytes())["manifests"]
    assert {entry["annotations"][images.REF_NAME]: entry["digest"] for entry in entries} == {
        "v2": second.root["digest"],
        "v1": third.root["digest"],
    }
    assert len(entries) == 2
    assert sha256(skopeo("inspect", "--raw", f"oci:{tmp_path}/out:v1")) == third.root["digest"]


def test_the_same_tag_of_two_repositories_is_two_images(tmp_path: Path) -> None:
    first, second = images.image(), images.image(({"two": b""},))
    for number, one in enumerate((first, second)):
        images.write_layout(tmp_path / str(number), one)
        transfer(source(f"oci:{tmp_path}/{number}"), target(f"oci:{tmp_path}/out", f"example.org/{number}:v1"))
    assert source(f"oci:{tmp_path}/out:example.org/0:v1").resolve().digest == first.root["digest"]
    with pytest.raises(ImageError, match="several images"):
        source(f"oci:{tmp_path}/out:v1").resolve()


def test_what_others_put_into_an_index_stays(tmp_path: Path) -> None:
    images.write_layout(tmp_path / "made", images.image())
    files = images.layout_files(("old", images.image(({"old": b""},))))
    index = json.loads(files["index.json"])
    index |= {"annotations": {"a": "b"}, "unheard": [1]}
    images.write_files(files | {"index.json": json.dumps(index).encode()}, tmp_path / "out")
    transfer(source(f"oci:{tmp_path}/made"), target(f"oci:{tmp_path}/out:new"))
    found = json.loads((tmp_path / "out" / "index.json").read_bytes())
    assert (found["annotations"], found["unheard"], found["manifests"][0]) == ({"a": "b"}, [1], index["manifests"][0])


def test_images_are_added_at_the_same_time(tmp_path: Path) -> None:
    """The index names all of them, and was whole whenever somebody looked."""
    made = [images.image(({"shared": b"x" * 1000}, {"own": str(number).encode()})) for number in range(8)]
    for number, one in enumerate(made):
        images.write_layout(tmp_path / str(number), one)
    over, seen = threading.Event(), []

    def look() -> None:
        while not over.is_set():
            if (tmp_path / "out" / "index.json").exists():
                seen.append(len(json.loads((tmp_path / "out" / "index.json").read_bytes())["manifests"]))

    def add(number: int) -> None:
        transfer(source(f"oci:{tmp_path}/{number}"), target(f"oci:{tmp_path}/out:v{number}"))

    threads = [threading.Thread(target=add, args=(number,)) for number in range(len(made))]
    looking = threading.Thread(target=look)
    for thread in (looking, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    over.set()
    looking.join()
    assert seen == sorted(seen)
    for number, one in enumerate(made):
        assert contents_of(f"oci:{tmp_path}/out:v{number}") == one.blobs


# ------------------------------------------------------------------------------------------------- not before finish


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_nothing_is_there_before_the_end(tmp_path: Path, transport: str) -> None:
    one = images.image()
    images.write_layout(tmp_path / "made", one)
    (tmp_path / "place").mkdir()
    place = reference_in(tmp_path / "place", transport)
    before = set((tmp_path / "place").rglob("*"))
    with nothing_leaks():
        destination = target(place)
        with destination.upload() as upload:
            upload.write(b"not committed")
        origin = source(f"oci:{tmp_path}/made")
        layer = Manifest.parse(one.blobs[one.root["digest"]], one.root["mediaType"]).layers[0]
        destination.put(layer, lambda: origin.open(layer))
        destination.put_manifest(one.root["mediaType"], one.blobs[one.root["digest"]])
        with pytest.raises(EstargzError):
            source(place).resolve()
        destination.close()
        destination.close()
        origin.close()
    if "archive" in transport:
        assert set((tmp_path / "place").rglob("*")) == before
    with nothing_leaks():
        transfer(source(f"oci:{tmp_path}/made"), target(place))
    assert one.root["digest"] in contents_of(place)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_older_image_stays_until_the_end(tmp_path: Path, transport: str) -> None:
    older, newer = images.image(), images.image(({"new": b""},))
    place = written(tmp_path, transport, older)
    before = contents_of(place)
    images.write_layout(tmp_path / "newer", newer)
    origin, destination = source(f"oci:{tmp_path}/newer"), target(place)
    layer = Manifest.parse(newer.blobs[newer.root["digest"]], newer.root["mediaType"]).layers[0]
    destination.put(layer, lambda: origin.open(layer))
    destination.close()
    assert contents_of(place) == before
    transfer(origin, target(place))
    assert set(contents_of(place)) == set(newer.blobs)


def test_a_directory_holds_one_image(tmp_path: Path) -> None:
    written(tmp_path, "dir", images.several_platforms())
    (tmp_path / "out" / "signature-1").write_bytes(b"of the former")
    newer = images.image()
    images.write_layout(tmp_path / "newer", newer)
    transfer(source(f"oci:{tmp_path}/newer"), target(f"dir:{tmp_path}/out"))
    assert blobs_in(tmp_path / "out") == newer.blobs


def test_a_directory_with_other_things_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "thesis").write_bytes(b"")
    with pytest.raises(ImageError, match="would be lost"):
        target(f"dir:{tmp_path}")
    (tmp_path / "index.json").write_bytes(b"{}")
    with pytest.raises(ImageError, match="no OCI layout, but has an index.json"):
        target(f"oci:{tmp_path}:v1")


def test_an_upload_of_another_size_is_refused(tmp_path: Path) -> None:
    for transport in TRANSPORTS:
        destination = target(reference_in(tmp_path, transport, f"{transport}.out"))
        with pytest.raises(VerificationError, match="has 3 bytes, not 4"), destination.upload() as upload:
            upload.write(b"abc")
            upload.commit(sha256(b"abc"), 4)
        assert not destination.has(Descriptor("", sha256(b"abc"), 3))
        destination.close()


# ------------------------------------------------------------------------------------------------- archives


def test_an_archive_is_the_same_whoever_writes_it(tmp_path: Path) -> None:
    """Blobs of several extents that come in pieces and side by side, and out of order; as tarfile sees them."""
    blobs = [bytes([number]) * (5_000_000 * (number % 2) + 1000 * number) for number in range(1, 7)]

    def write(name: str, order: list[bytes], piece: int) -> bytes:
        destination = ArchiveTarget(Reference.parse(f"oci-archive:{tmp_path}/{name}:v1"))
        uploads = [(data, destination.upload()) for data in order]
        with destination.upload() as dropped:
            dropped.write(bytes(9_000_000))
        for start in range(0, max(map(len, order)), piece):
            for data, upload in uploads:
                upload.write(data[start : start + piece])
        for data, upload in uploads:
            upload.commit(sha256(data), len(data))
        destination.finish(destination.put_manifest("application/vnd.oci.image.manifest.v1+json", b"{}"))
        destination.close()
        return (tmp_path / name).read_bytes()

    first = write("one", blobs, 1 << 20)
    assert first == write("two", blobs[::-1], 777_777)
    with tarfile.open(fileobj=io.BytesIO(first)) as tar:
        names = [member.name + "/" * member.isdir() for member in tar]
        assert names == sorted(names)
        assert {(member.mtime, member.uid, member.uname) for member in tar} == {(0, 0, "")}
        found = {tar.extractfile(member).read() for member in tar if member.isfile()}  # type: ignore[union-attr]
        assert set(blobs) <= found


def test_an_archive_goes_through_a_pipe(tmp_path: Path) -> None:
    one = images.image()
    images.write_layout(tmp_path / "made", one)
    expected = (tmp_path / "out", written(tmp_path, "docker-archive", one))[0].read_bytes()
    reading, writing = os.pipe()
    parts: list[bytes] = []
    taking = threading.Thread(target=lambda: parts.append(os.fdopen(reading, "rb").read()))
    taking.start()
    place = "docker-archive:-:example.org/app:v1"
    transfer(source(f"oci:{tmp_path}/made"), target(place, descriptor=writing))
    os.close(writing)
    taking.join()
    assert parts == [expected]


def test_a_reader_that_goes_away_is_an_error(tmp_path: Path) -> None:
    images.write_layout(tmp_path / "made", images.image())
    reading, writing = os.pipe()
    os.close(reading)
    with pytest.raises(SinkError, match="Broken pipe"):
        transfer(source(f"oci:{tmp_path}/made"), target("oci-archive:-", descriptor=writing))
    os.close(writing)


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    images.write_layout(tmp_path / "made", images.image())
    with open("/dev/full", "wb") as full, pytest.raises(SinkError, match="No space left"):
        transfer(source(f"oci:{tmp_path}/made"), target("oci-archive:-", descriptor=full.fileno()))
    with pytest.raises(SinkError, match="No space left"):
        transfer(source(f"oci:{tmp_path}/made"), target("docker-archive:/dev/full"))


def test_an_archive_may_be_appended_to_a_file(tmp_path: Path) -> None:
    """Where the kernel does not move bytes from file to file by itself."""
    one = images.image()
    images.write_layout(tmp_path / "made", one)
    with (tmp_path / "appended").open("ab") as file:
        transfer(source(f"oci:{tmp_path}/made"), target("oci-archive:-:v1", descriptor=file.fileno()))
    assert contents_of(f"oci-archive:{tmp_path}/appended:v1") == one.blobs


def test_docker_archives_hold_one_platform(tmp_path: Path) -> None:
    attested = images.index(one := images.image(), images.attestation(one))
    place = written(tmp_path, "docker-archive", attested)
    assert set(contents_of(place)) == set(one.blobs)
    images.write_layout(tmp_path / "several", images.several_platforms())
    with pytest.raises(UsageError, match="one platform, not 2"):
        transfer(source(f"oci:{tmp_path}/several"), target(f"docker-archive:{tmp_path}/none"))
    assert not (tmp_path / "none").exists()


# ------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("transport", ("oci", "dir"))
def test_blobs_of_layouts_are_linked(tmp_path: Path, transport: str) -> None:
    one = images.image()
    images.write_layout(tmp_path / "made", one)
    transfer(source(f"oci:{tmp_path}/made"), target(f"{transport}:{tmp_path}/out"), link=True)
    digest = one.document["layers"][0]["digest"][7:]
    linked = tmp_path / "out" / ("blobs/sha256" if transport == "oci" else "") / digest
    assert linked.samefile(tmp_path / "made" / "blobs/sha256" / digest)


def test_a_layout_may_be_made_of_links(tmp_path: Path) -> None:
    """As build systems make them; what is linked from one is the file."""
    one = images.image()
    images.write_layout(tmp_path / "made", one)
    for path in (tmp_path / "made" / "blobs/sha256").iterdir():
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    assert contents_of(f"oci:{tmp_path}/made") == one.blobs
    transfer(source(f"oci:{tmp_path}/made"), target(f"oci:{tmp_path}/out:v1"), link=True)
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert contents_of(f"oci:{tmp_path}/out") == one.blobs


def test_damaged_blobs_are_not_linked(tmp_path: Path) -> None:
    one = images.image()
    images.write_layout(tmp_path / "made", one)
    layer = Manifest.parse(one.blobs[one.root["digest"]], one.root["mediaType"]).layers[0]
    path = tmp_path / "made" / "blobs/sha256" / layer.digest[7:]
    path.write_bytes(bytes(layer.size))
    with pytest.raises(VerificationError, match="has the digest"):
        target(f"oci:{tmp_path}/out").link(layer, source(f"oci:{tmp_path}/made"))
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------- hostile


@pytest.mark.parametrize("how", ("link", "circle", "pipe", "folder", "shorter", "other", "missing"))
def test_blobs_that_are_not_what_they_claim(tmp_path: Path, how: str) -> None:
    one = images.image()
    images.write_layout(tmp_path / "made", one)
    layer = Manifest.parse(one.blobs[one.root["digest"]], one.root["mediaType"]).layers[1]
    path = tmp_path / "made" / "blobs/sha256" / layer.digest[7:]
    data = path.read_bytes()
    path.unlink()
    if how == "link":
        (tmp_path / "secret").write_bytes(bytes(len(data)))
        path.symlink_to(tmp_path / "secret")
    elif how == "circle":
        path.symlink_to(path)
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how != "missing":
        path.write_bytes(data[:-1] if how == "shorter" else data[:-1] + b"?")
    origin = source(f"oci:{tmp_path}/made")
    with pytest.raises((ImageError, SourceError, VerificationError)), origin.open(layer) as reader:
        while reader.read(1 << 16):
            pass


def index_with(**changes: Any) -> bytes:
    entry = {**images.image().root, **changes}
    return json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{" * 100_000,
        b'{"manifests":' + b"[" * 500 + b"]" * 500 + b"}",
        b'{"manifests":[1]}',
        b'{"manifests":{}}',
        index_with(digest="sha256:../../../../etc/passwd"),
        index_with(digest="sha256:" + "0" * 63 + "/"),
        index_with(digest=None),
        index_with(size=-1),
        index_with(size="1"),
        index_with(size=2**70),
        index_with(annotations=[]),
        b'{"schemaVersion":2,"manifests":[],"layers":[]}',
        b" " * (5 << 20),
    ],
)
def test_malformed_indexes_are_refused(tmp_path: Path, text: bytes) -> None:
    files = {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": text}
    images.write_files(files, tmp_path / "made")
    (tmp_path / "packed").write_bytes(images.tar_of_files(files))
    for place in (f"oci:{tmp_path}/made", f"oci-archive:{tmp_path}/packed"):
        with pytest.raises(ImageError):
            source(place).resolve()
    with pytest.raises(ImageError):
        target(f"oci:{tmp_path}/made:v1").finish(Descriptor("", sha256(b""), 0))
    assert (tmp_path / "made" / "index.json").read_bytes() == text


@pytest.mark.parametrize("version", (b"", b"{}", b'{"imageLayoutVersion":"2.0.0"}', b'{"imageLayoutVersion":1}'))
def test_layouts_of_another_version_are_refused(tmp_path: Path, version: bytes) -> None:
    images.write_files({"oci-layout": version}, tmp_path)
    for opened in (source, target):
        with pytest.raises(ImageError):
            opened(f"oci:{tmp_path}")


GOOD = entry(b"index.json", b"{}")
ODD_TARS = {
    "nothing": b"",
    "no tar": b"x" * 2048,
    "truncated": entry(b"index.json", b"x" * 2000)[:1024],
    "lying size": entry(b"index.json", b"", size=base256(1 << 62, 12)),
    "negative size": entry(b"index.json", b"", size=base256(-512, 12)),
    "lying PAX size": entry(b"index.json", b"{}", (b"size", b"99999999999999")),
    "no PAX size": entry(b"index.json", b"{}", (b"size", b"-1")),
    "huge PAX header": entry(b"x", b"a" * 70_000, type=b"x"),
    "lying PAX header": entry(b"x", b"", type=b"x", size=b"77777777777\0"),
    "PAX record": entry(b"x", b"9999 path=a\n", type=b"x") + GOOD,
    "sparse": entry(b"index.json", b"{}", type=b"S"),
    "sparse by PAX": entry(b"index.json", b"{}", (b"GNU.sparse.major", b"1")),
    "checksum": GOOD[:10] + b"?" + GOOD[11:],
    "links in a circle": entry(b"index.json", type=b"2", link=b"b") + entry(b"b", type=b"2", link=b"index.json"),
    "link outside": entry(b"index.json", type=b"2", link=b"../../../../../../etc/passwd"),
    "zstd": b"\x28\xb5\x2f\xfd" + bytes(100),
    "bad gzip": b"\x1f\x8b" + bytes(100),
    "cut gzip": gzip.compress(GOOD + END)[:-20],
    "directory": entry(b"index.json", type=b"5"),
}


@pytest.mark.parametrize("kind", ODD_TARS)
def test_odd_tars_are_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "odd").write_bytes(ODD_TARS[kind] if kind in ("nothing", "no tar") else ODD_TARS[kind] + END)
    with nothing_leaks(), pytest.raises(ImageError), closing(source(f"oci-archive:{tmp_path}/odd")) as origin:
        origin.resolve()


def test_tars_of_countless_members_are_refused(tmp_path: Path) -> None:
    (tmp_path / "odd").write_bytes(entry(b"x") * 70_000 + END)
    with pytest.raises(ImageError, match="over 65536 members"):
        source(f"oci-archive:{tmp_path}/odd")


@pytest.mark.parametrize("seed", range(4))
def test_damaged_archives_are_errors_of_the_package(tmp_path: Path, seed: int) -> None:
    """A few bytes changed, or the end lost: what is read is the image, or an error that can be caught."""
    chance = random.Random(seed)
    one = images.image(compression="uncompressed")
    docker = images.tar_of_files(images.docker_save_files(one))
    layout = images.tar_of_files(images.layout_files(("v1", one)))
    failed = 0
    for number in range(150):
        data = bytearray(chance.choice((docker, layout)))
        transport = "docker-archive" if len(data) == len(docker) else "oci-archive"
        for _ in range(chance.randrange(1, 4)):
            data[chance.choice((chance.randrange(512), chance.randrange(len(data))))] = chance.choice(
                b"\0 07\x80\xffLxS"
            )
        if number % 5 == 0:
            del data[chance.randrange(len(data)) :]
        (tmp_path / "odd").write_bytes(data)
        try:
            contents_of(f"{transport}:{tmp_path}/odd")
        except EstargzError as error:
            failed += 1
            assert f"{tmp_path}/odd" in str(error)
    assert failed > 50


def test_long_names_and_old_headers_are_read(tmp_path: Path) -> None:
    one = images.image()
    files = images.layout_files(("v1", one))
    parts = [entry(b"prefix", b"", (b"path", b"deep/" * 50 + b"file"))]
    for number, (name, data) in enumerate(files.items()):
        if number % 2:
            parts.append(pax((b"path", f"./{name}".encode())) + entry(b"short", data))
        else:
            parts.append(entry(b"@", name.encode() + b"\0", type=b"L") + entry(b"short", data))
    (tmp_path / "packed").write_bytes(b"".join(parts) + END)
    assert contents_of(f"oci-archive:{tmp_path}/packed:v1") == one.blobs


@pytest.mark.parametrize(
    "item",
    [
        "",
        {},
        {"Config": 1, "Layers": []},
        {"Config": "config", "Layers": "layer"},
        {"Config": "config", "Layers": [1]},
        {"Config": "../../etc/passwd", "Layers": []},
        {"Config": "config", "Layers": []},
        {"Config": "config", "Layers": ["missing"]},
        {"Config": "bad", "Layers": []},
    ],
)
def test_odd_manifests_of_docker_are_refused(tmp_path: Path, item: Any) -> None:
    config = json.dumps({"os": "linux", "rootfs": {"type": "layers", "diff_ids": [sha256(b"")]}}).encode()
    files = {"manifest.json": json.dumps([item]).encode(), "config": config, "bad": b"{"}
    (tmp_path / "odd").write_bytes(images.tar_of_files(files))
    with pytest.raises(ImageError):
        source(f"docker-archive:{tmp_path}/odd").resolve()


def test_a_layer_that_is_not_its_diff_id_is_noticed(tmp_path: Path) -> None:
    files = images.docker_save_files(images.image(compression="uncompressed"))
    name = next(name for name in files if name.endswith("layer.tar"))
    (tmp_path / "saved").write_bytes(images.tar_of_files(files | {name: entry(b"other", b"") + END}))
    with pytest.raises(VerificationError, match="has the digest"):
        contents_of(f"docker-archive:{tmp_path}/saved")


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_what_is_not_there(tmp_path: Path, transport: str) -> None:
    with pytest.raises((ImageError, SourceError), match="check"):
        source(reference_in(tmp_path, transport))
    (tmp_path / "out").write_bytes(b"")
    with pytest.raises((ImageError, SourceError)):
        source(reference_in(tmp_path, transport))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_where_nothing_can_be_written(tmp_path: Path, transport: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises((SinkError, SourceError)):
        target(reference_in(tmp_path / "file", transport)).upload()


def test_a_digest_cannot_be_written_to(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a digest follows from the content"):
        target(f"oci:{tmp_path}@sha256:{'0' * 64}")
