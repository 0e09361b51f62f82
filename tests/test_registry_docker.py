"""Images written to Docker's own registry and read from it, with skopeo as the judge."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import missing
from faulty_registry import LAYER, Pauses, Pieces, cutting_proxy, descriptor_of, repository_of
from registry import PROGRAM, Registry, registry
from tars import nothing_leaks

import estargz
from estargz.errors import ImageError, RegistryError, UploadBrokenError, VerificationError
from estargz.image.model import (
    OCI_CONFIG,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    ImageConfig,
    Platform,
    digest_of,
    encode,
)
from estargz.registry.client import Registries
from estargz.registry.repository import Repository

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("home")]

MIB = 1 << 20
DATA = random.Random(1).randbytes(5 * MIB + 7)
USERS = "me:$2b$04$WhGFGPh9nYc3nlxgi4Zmse97vVjllPs8eZXiM5eV6Zl1mdXQaQhza\n"  # htpasswd -nbB -C 4 me secret


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    if shutil.which(PROGRAM) is None:
        missing(f"{PROGRAM} is not installed")
    with registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    if shutil.which(PROGRAM) is None:
        missing(f"{PROGRAM} is not installed")
    users = tmp_path_factory.mktemp("users") / "users"
    users.write_text(USERS)
    with registry(tmp_path_factory.mktemp("guarded"), users) as running:
        yield running


def skopeo(*arguments: str | Path) -> str:
    if shutil.which("skopeo") is None:
        missing("skopeo is not installed")
    done = subprocess.run(["skopeo", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def content(repository: Repository, descriptor: Descriptor) -> bytes:
    with repository.open(descriptor) as reader:
        return b"".join(iter(lambda: reader.read(MIB), b""))


def push_image(repository: Repository, rootfs: Path) -> Descriptor:
    """An image of one layer, built straight into the upload."""
    with repository.upload() as upload:
        layer = estargz.build(rootfs, upload)
        upload.commit(layer.digest, layer.size)
    config = encode(
        ImageConfig.new(Platform.parse("linux/amd64")).document()
        | {"rootfs": {"type": "layers", "diff_ids": [layer.diff_id]}},
        indent=None,
    )
    repository.put(descriptor_of(config), lambda: Pieces(config))
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": Descriptor(OCI_CONFIG, digest_of(config), len(config)).document(),
        "layers": [layer.descriptor()],
    }
    inner = repository.put_manifest(OCI_MANIFEST, encode(manifest))
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [inner.document()]}
    return repository.put_manifest(OCI_INDEX, encode(index), ["also"])


def test_skopeo_takes_what_is_pushed(server: Registry, tmp_path: Path) -> None:
    (tmp_path / "rootfs").mkdir()
    (tmp_path / "rootfs/file").write_bytes(DATA)
    with nothing_leaks(), Registries(chunk_size=MIB) as registries:
        repository = repository_of(registries, server.host, "built/app:v1")
        root = push_image(repository, tmp_path / "rootfs")
        with pytest.raises(ImageError, match="there is no such image"):
            repository.resolve()
        repository.finish(root)
        assert repository.resolve() == root
    for tag in ("v1", "also"):
        name = f"docker://{server.host}/built/app:{tag}"
        skopeo("copy", "--src-tls-verify=false", "--all", name, f"dir:{tmp_path}/{tag}")  # checks all digests
        assert digest_of((tmp_path / tag / "manifest.json").read_bytes()) == root.digest


def test_what_skopeo_has_pushed(server: Registry, tmp_path: Path) -> None:
    with Registries() as registries:
        origin = repository_of(registries, server.host, "origin:v1")
        (tmp_path / "rootfs").mkdir()
        (tmp_path / "rootfs/file").write_bytes(DATA)
        origin.finish(push_image(origin, tmp_path / "rootfs"))
        name = f"docker://{server.host}/origin:v1"
        skopeo(
            *("copy", "--src-tls-verify=false", "--dest-tls-verify=false", "--format", "v2s2"),
            *(name, f"docker://{server.host}/docker/app:v2"),
        )
        copied = repository_of(registries, server.host, "docker/app:v2")
        root = copied.resolve()
        assert root.media_type == "application/vnd.docker.distribution.manifest.v2+json"
        manifest = json.loads(copied.read(root))
        assert json.loads(copied.read(Descriptor.parse(manifest["config"], "config")))["os"] == "linux"
        layer = Descriptor.parse(manifest["layers"][0], "layer")
        assert digest_of(content(copied, layer)) == layer.digest
        with copied.range_source(layer) as source, estargz.open(source) as blob:
            assert blob.read("file") == DATA


@pytest.mark.parametrize("size", [0, 1, len(DATA)])
def test_blobs(server: Registry, size: int) -> None:
    data = DATA[:size]
    descriptor = descriptor_of(data)
    with nothing_leaks(), Registries(chunk_size=MIB) as registries:
        repository = repository_of(registries, server.host, f"blobs{size}")
        assert not repository.has(descriptor)
        repository.put(descriptor, lambda: Pieces(data))
        assert repository.has(descriptor)
        assert content(repository, descriptor) == data
        assert repository.read_at(descriptor, max(size - 51, 0), 100) == data[-51:]
        other = repository_of(registries, server.host, f"mounted{size}")
        assert not other.has(descriptor)
        assert other.link(descriptor, repository)
        assert other.has(descriptor)
        assert not other.link(descriptor_of(b"nowhere"), repository)
        streamed = repository_of(registries, server.host, f"streamed{size}")
        with streamed.upload() as upload:
            for at in range(0, size, 10_000):
                upload.write(data[at : at + 10_000])
            upload.commit(descriptor.digest, size)
        assert content(streamed, descriptor) == data


def test_wrong_digests(server: Registry) -> None:
    with Registries(chunk_size=MIB) as registries:
        repository = repository_of(registries, server.host, "wrong")
        for data in (b"small", DATA):
            with pytest.raises(VerificationError, match="DIGEST_INVALID"), repository.upload() as upload:
                upload.write(data)
                upload.commit(digest_of(b"other"), len(data))
        assert not repository.has(descriptor_of(DATA))
        with pytest.raises(RegistryError, match="400 Bad Request, MANIFEST_BLOB_UNKNOWN"):
            config = Descriptor(OCI_CONFIG, digest_of(b""), 0).document()
            manifest = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": []}
            repository.put_manifest(OCI_MANIFEST, encode(manifest))


def test_uploads_that_are_dropped(server: Registry, tmp_path: Path) -> None:
    with Registries(chunk_size=MIB) as registries:
        repository = repository_of(registries, server.host, "dropped")
        with repository.upload() as upload:
            upload.write(DATA)
        forgotten = repository.upload()
        forgotten.write(DATA)
        repository.close()
        again = repository_of(registries, server.host, "dropped")
        assert not again.has(descriptor_of(DATA))


def test_side_by_side(server: Registry) -> None:
    """More uploads and downloads than requests are allowed at once."""
    blobs = [random.Random(number).randbytes(2 * MIB) for number in range(12)]
    wrong: list[object] = []
    with nothing_leaks(), Registries(parallel=2, chunk_size=MIB // 2) as registries:
        source = repository_of(registries, server.host, "many/source")
        target = repository_of(registries, server.host, "many/target")

        def move(data: bytes) -> None:
            try:
                descriptor = descriptor_of(data)
                source.put(descriptor, lambda: Pieces(data))
                with source.open(descriptor) as reader, target.upload() as upload:
                    while piece := reader.read(100_000):
                        upload.write(piece)
                    upload.commit(descriptor.digest, descriptor.size)
                target.put(descriptor_of(data[1:]), lambda: Pieces(data[1:]))
                if content(target, descriptor) != data:
                    wrong.append(descriptor)
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=move, args=(data,)) for data in blobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


# --- who is asked who they are


def test_basic_credentials(guarded: Registry, tmp_path: Path) -> None:
    with Registries(credentials={guarded.host: ("me", "secret")}, chunk_size=MIB) as registries:
        repository = repository_of(registries, guarded.host)
        repository.put(descriptor_of(DATA), lambda: Pieces(DATA))
        assert content(repository, descriptor_of(DATA)) == DATA
        with repository.range_source(descriptor_of(DATA)) as source:
            assert source.read_at(1000, 50) == DATA[1000:1050]
    for credentials in ({}, {guarded.host: ("me", "wr0ng")}):
        with Registries(credentials=credentials) as registries, pytest.raises(RegistryError) as caught:
            repository_of(registries, guarded.host).resolve()
        assert "401 Unauthorized, UNAUTHORIZED authentication required; check the credentials" in str(caught.value)
        assert "wr0ng" not in str(caught.value)


def test_a_login_of_skopeo(guarded: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "auth.json"
    login = ("login", "--tls-verify=false", "--username", "me", "--password", "secret", guarded.host)
    skopeo(*login, "--authfile", file)
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(file))
    with Registries() as registries:
        assert not repository_of(registries, guarded.host).has(descriptor_of(b"nothing like it"))


# --- connections that break


def sizes() -> int:
    """MiB of a blob."""
    return 1024 if os.environ.get("ESTARGZ_LONG_TESTS") else 64


def test_a_push_survives_twenty_drops(server: Registry) -> None:
    """This registry cannot go on with an upload that was cut; each begins anew."""
    piece, count = random.Random(2).randbytes(MIB), sizes()
    hashed = hashlib.sha256()
    for _ in range(count):
        hashed.update(piece)
    descriptor = Descriptor(LAYER, f"sha256:{hashed.hexdigest()}", count * MIB)
    rng = random.Random(7)
    with cutting_proxy(server.host) as proxy, Registries(sleep=Pauses()) as registries:
        repository = repository_of(registries, proxy.host, "drops")
        assert not repository.has(descriptor)
        proxy.up += [rng.randrange(count * MIB // 32, count * MIB // 8) for _ in range(20)]
        repository.put(descriptor, lambda: Pieces(piece, count))
        assert proxy.cut == 20
        assert repository.has(descriptor)


def test_a_pull_survives_twenty_drops(server: Registry) -> None:
    descriptor = descriptor_of(DATA)
    rng = random.Random(7)
    with cutting_proxy(server.host) as proxy, Registries(sleep=Pauses()) as registries:
        repository = repository_of(registries, proxy.host, "drops")
        repository.put(descriptor, lambda: Pieces(DATA))
        proxy.down += [rng.randrange(1000, MIB // 4) for _ in range(20)]
        assert content(repository, descriptor) == DATA
        assert proxy.cut == 20


def test_a_stream_that_is_cut_begins_anew(server: Registry) -> None:
    descriptor = descriptor_of(DATA)
    broken = 0
    with cutting_proxy(server.host) as proxy, Registries(sleep=Pauses(), chunk_size=MIB) as registries:
        repository = repository_of(registries, proxy.host, "streams")
        assert not repository.has(descriptor)
        proxy.up += [MIB // 2, 3 * MIB + 5000, MIB // 3]
        while not repository.has(descriptor):
            try:
                with repository.upload() as upload:
                    for at in range(0, len(DATA), 100_000):
                        upload.write(DATA[at : at + 100_000])
                    upload.commit(descriptor.digest, descriptor.size)
            except UploadBrokenError:
                broken += 1
        assert proxy.cut == 3
        assert 1 <= broken <= 3  # a cut before the registry had written anything of a chunk is mended unseen
        assert content(repository, descriptor) == DATA
