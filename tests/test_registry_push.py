"""Images written to a registry that fails in every way: what arrives is what was sent, or there is an error."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty_registry import (
    LAYER,
    Exchange,
    FaultyRegistry,
    Pauses,
    Pieces,
    cutting_proxy,
    descriptor_of,
    digest_of,
    faulty_registry,
    never,
    repository_of,
)
from tars import nothing_leaks

from estargz.errors import ImageError, RegistryError, UploadBrokenError, UsageError, VerificationError
from estargz.image.model import OCI_MANIFEST, Descriptor
from estargz.image.reference import Reference
from estargz.registry.client import Registries
from estargz.registry.repository import Repository

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("home")]

MIB = 1 << 20
CHUNK = 100_000
DATA = random.Random(6).randbytes(450_000)
LAYER_OF_DATA = descriptor_of(DATA)
MANIFEST = b'{"schemaVersion": 2}'


@pytest.fixture
def registry() -> Iterator[FaultyRegistry]:
    with faulty_registry() as made:
        yield made


@pytest.fixture
def pauses() -> Pauses:
    return Pauses()


@pytest.fixture
def app(registry: FaultyRegistry, pauses: Pauses) -> Iterator[Repository]:
    with Registries(sleep=pauses, timeout=5, chunk_size=CHUNK) as registries:
        yield repository_of(registries, registry.host)


def put(repository: Repository, data: bytes = DATA) -> None:
    repository.put(descriptor_of(data), lambda: Pieces(data))


def stream(repository: Repository, data: bytes = DATA, piece: int = 7001) -> None:
    with repository.upload() as upload:
        for at in range(0, len(data), piece):
            assert upload.write(memoryview(data)[at : at + piece]) == len(data[at : at + piece])  # type: ignore[arg-type]
        upload.commit(digest_of(data), len(data))


def status(code: int, name: str = "", message: str = "", **headers: object) -> Callable[[Exchange], None]:
    def answer(exchange: Exchange) -> None:
        for _ in exchange.body():
            pass
        exchange.refuse(code, name, message, **headers)

    return answer


def methods(registry: FaultyRegistry) -> list[str]:
    return [seen.method for seen in registry.requests() if seen.path != "/v2/"]


# --- blobs that can be read again


@pytest.mark.parametrize("size", [0, 1, len(DATA)])
def test_put(registry: FaultyRegistry, size: int) -> None:
    data = DATA[:size]
    with nothing_leaks(), Registries() as registries:
        repository = repository_of(registries, registry.host)
        put(repository, data)
        assert methods(registry) == ["HEAD", "POST", "PUT"]
        put(repository, data)
        assert methods(registry) == ["HEAD", "POST", "PUT", "HEAD"]
    assert registry.blobs[digest_of(data)] == data
    assert registry.requests("PUT")[0].headers["content-length"] == str(size)


def test_what_is_kept_is_not_sent_again(registry: FaultyRegistry, app: Repository) -> None:
    registry.fault("PUT ", registry.part_of(200_000))
    registry.fault("PATCH ", registry.part_of(100_000), status(502))
    put(app)
    assert registry.blobs[LAYER_OF_DATA.digest] == DATA
    ranges = [seen.headers["content-range"] for seen in registry.requests("PATCH")]
    assert ranges == ["200000-449999", "300000-449999", "300000-449999"]


def test_what_is_not_kept_is_sent_again(registry: FaultyRegistry, app: Repository) -> None:
    registry.resumes = False
    registry.fault("PUT ", *[registry.part_of(200_000)] * 4)
    put(app)
    assert registry.blobs[LAYER_OF_DATA.digest] == DATA
    assert methods(registry).count("POST") == 5


def test_an_answer_that_is_lost(registry: FaultyRegistry, app: Repository) -> None:
    def take(exchange: Exchange) -> None:
        registry.put("app", b"".join(exchange.body()))
        exchange.hang_up()

    registry.fault("PUT ", take)
    put(app)
    assert methods(registry) == ["HEAD", "POST", "PUT", "HEAD"]


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
def test_put_is_tried_again(registry: FaultyRegistry, app: Repository, pauses: Pauses, code: int) -> None:
    registry.fault("PUT ", status(code, Retry_After=3))
    registry.fault("POST ", status(code))
    put(app)
    assert registry.blobs[LAYER_OF_DATA.digest] == DATA
    assert pauses[1:] == [3]


def test_put_is_not_tried_for_ever(registry: FaultyRegistry, app: Repository) -> None:
    registry.fault("PUT ", *[status(503, "UNAVAILABLE", "see https://h/?token=secret")] * 9)
    with pytest.raises(RegistryError) as caught:
        put(app)
    what = f"{app.name}: PUT blob {LAYER_OF_DATA.digest}: 503 Service Unavailable, UNAVAILABLE see https://h/?REDACTED"
    assert str(caught.value) == f"{what}, after 5 attempts; try again later"
    assert caught.value.url.endswith("?REDACTED")
    assert methods(registry).count("PUT") == 5


def test_a_registry_that_takes_no_blob_at_once(registry: FaultyRegistry, app: Repository) -> None:
    registry.takes_whole = False
    put(app)
    put(app, b"small")
    assert registry.blobs[LAYER_OF_DATA.digest] == DATA
    assert registry.blobs[digest_of(b"small")] == b"small"
    assert [seen.headers["content-length"] for seen in registry.requests("PATCH")][:5] == ["100000"] * 4 + ["50000"]


def test_what_is_put_cannot_be_read(registry: FaultyRegistry, app: Repository) -> None:
    class Broken(Pieces):
        def read(self, size: int, /) -> bytes:
            if self._at > 100_000:
                raise ImageError("no more of it")
            return super().read(1000)

    with pytest.raises(ImageError, match="no more of it"):
        app.put(LAYER_OF_DATA, lambda: Broken(DATA))
    assert registry.blobs == {}
    assert registry.uploads == {}


def test_errors_of_the_source_are_not_the_networks(registry: FaultyRegistry, app: Repository) -> None:
    def broken() -> Any:
        raise RegistryError("the source is away")

    with pytest.raises(RegistryError, match="^the source is away"):
        app.put(LAYER_OF_DATA, broken)
    assert sorted(methods(registry)) == ["DELETE", "HEAD", "POST", "PUT"]


def test_an_answer_that_drips(registry: FaultyRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a deadline, also after what was sent had come by a request of its own."""

    def drip(exchange: Exchange) -> None:
        for _ in exchange.body():
            pass
        for byte in b"HTTP/1.1 201 Created\r\n" + b"X" * 100:
            exchange.handler.wfile.write(bytes([byte]))
            time.sleep(0.05)

    monkeypatch.setattr("estargz.registry.host.MAX_FRUITLESS", 1)
    monkeypatch.setattr("estargz.registry.upload._PATIENCE", 0.5)
    layer = descriptor_of(b"small")
    registry.put("other", b"small")
    registry.fault("PUT ", drip)
    with Registries(deadline=0.5) as registries:
        source = repository_of(registries, registry.host, "other:x")
        began = time.monotonic()
        with pytest.raises(RegistryError, match="PUT blob .*: not done in time"):
            repository_of(registries, registry.host).put(layer, lambda: source.open(layer))
        assert time.monotonic() - began < 3


def test_damaged_on_the_way(registry: FaultyRegistry, app: Repository) -> None:
    def damaged(exchange: Exchange) -> None:
        exchange.query["digest"] = digest_of(b"")
        registry.usual(exchange)

    registry.fault("PUT ", damaged, damaged)
    with pytest.raises(VerificationError, match="DIGEST_INVALID provided digest did not match"):
        put(app)
    with pytest.raises(VerificationError, match="DIGEST_INVALID"):
        stream(app)
    lies = {"Docker-Content-Digest": digest_of(b"other")}
    registry.fault("PUT ", lambda exchange: (list(exchange.body()), exchange.send(201, lies)))
    with pytest.raises(VerificationError, match="the registry stored sha256:.* as 'sha256:"):
        put(app)


def late_bytes(registry: FaultyRegistry) -> Callable[[Exchange], None]:
    """A fault: says how much there is, and only then takes what had come before."""

    def answer(exchange: Exchange) -> None:
        upload = registry.uploads[exchange.path.rpartition("/")[2]]
        registry.usual(exchange)
        upload.add(b"late", True)

    return answer


@pytest.mark.parametrize("heeds_ranges", [True, False])
def test_a_registry_that_takes_more_than_it_says(registry: FaultyRegistry, app: Repository, heeds_ranges: bool) -> None:
    """The range that follows is refused, or the digest is wrong in the end."""
    registry.heeds_ranges = heeds_ranges
    registry.fault("PUT ", registry.part_of(200_000))
    registry.fault("GET ", late_bytes(registry))
    put(app)
    assert registry.blobs[LAYER_OF_DATA.digest] == DATA
    registry.fault("PATCH ", registry.usual, registry.part_of(50_000))
    registry.fault("GET ", late_bytes(registry))
    with pytest.raises(UploadBrokenError):
        stream(app, DATA[1:])
    stream(app, DATA[1:])
    assert registry.blobs[digest_of(DATA[1:])] == DATA[1:]


def test_no_right_to_push(registry: FaultyRegistry, app: Repository) -> None:
    registry.fault("POST ", status(403, "DENIED", "requested access to the resource is denied"))
    with pytest.raises(
        RegistryError, match="POST upload: 403 Forbidden, DENIED requested access .* is denied; check the"
    ):
        put(app)
    with Registries() as registries:
        registry.fault("POST ", status(403, "DENIED"))
        with pytest.raises(RegistryError, match="403"):
            repository_of(registries, registry.host).upload()  # before anything is compressed


# --- mounts


def test_link(registry: FaultyRegistry, app: Repository) -> None:
    registry.put("other/app", DATA)
    with Registries() as registries:
        other = repository_of(registries, registry.host, "other/app:x")
        target = repository_of(registries, registry.host)
        assert target.link(LAYER_OF_DATA, other)
        assert ("app", LAYER_OF_DATA.digest) in registry.sizes
        assert not target.link(descriptor_of(b"missing"), other)
        assert registry.uploads == {}  # what was opened instead is closed
        for code in (401, 403, 404, 405):
            registry.fault("POST ", status(code))
            assert not target.link(descriptor_of(b"missing"), other)
        assert not target.link(LAYER_OF_DATA, app)  # of other Registries
        assert target.link(LAYER_OF_DATA, repository_of(registries, registry.host, "app:v2"))
        registry.fault("POST ", lambda exchange: exchange.send(201, {"Docker-Content-Digest": digest_of(b"")}))
        with pytest.raises(VerificationError, match="the registry stored"):
            target.link(LAYER_OF_DATA, other)


# --- blobs whose digest is known at their end


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK])
def test_a_small_blob_goes_at_once(registry: FaultyRegistry, app: Repository, size: int) -> None:
    stream(app, DATA[:size])
    assert methods(registry) == ["POST", "PUT"]
    assert registry.blobs[digest_of(DATA[:size])] == DATA[:size]


@pytest.mark.parametrize("size", [CHUNK + 1, 2 * CHUNK, len(DATA)])
@pytest.mark.parametrize("piece", [999, CHUNK, 1 << 20])
def test_chunks(registry: FaultyRegistry, size: int, piece: int) -> None:
    with nothing_leaks(), Registries(chunk_size=CHUNK) as registries:
        stream(repository_of(registries, registry.host), DATA[:size], piece)
    assert registry.blobs[digest_of(DATA[:size])] == DATA[:size]
    chunks = [(at, min(at + CHUNK, size)) for at in range(0, size, CHUNK)]
    ranges = [seen.headers["content-range"] for seen in registry.requests("PATCH")]
    assert ranges == [f"{begin}-{end - 1}" for begin, end in chunks]
    assert methods(registry) == ["POST", *["PATCH"] * len(chunks), "PUT"]


def test_what_a_registry_wants_of_chunks(registry: FaultyRegistry, app: Repository) -> None:
    registry.least_chunk = 150_000
    stream(app)
    assert registry.blobs[LAYER_OF_DATA.digest] == DATA
    assert [seen.headers["content-length"] for seen in registry.requests("PATCH")] == ["150000"] * 3


@pytest.mark.parametrize(("room", "chunk"), [(0, 1 << 20), (3 << 20, 3 << 19), (1 << 30, 2 << 20), (None, 2 << 20)])
def test_room_for_chunks(registry: FaultyRegistry, room: int | None, chunk: int) -> None:
    """What is filled and what is sent have to find room; what the registry wants has it in any case."""
    with Registries(chunk_size=2 << 20) as registries:
        repository = repository_of(registries, registry.host)
        for least in (0, 2_500_000):
            registry.least_chunk = least
            registry.seen.clear()
            with repository.upload(room) as upload:
                upload.write(bytes(3 << 20))
                upload.commit(digest_of(bytes(3 << 20)), 3 << 20)
            assert registry.requests("PATCH")[0].headers["content-length"] == str(max(chunk, least))


def test_the_newest_location_is_used_as_it_is(registry: FaultyRegistry, app: Repository) -> None:
    stream(app)
    states = [seen.raw_query for seen in registry.requests("PATCH|PUT")]
    assert states[:2] == ["_state=a%2B%2F%3D0&up=1", "_state=a%2B%2F%3D1&up=1"]
    assert states[-1] == f"_state=a%2B%2F%3D5&up=1&digest={LAYER_OF_DATA.digest}"
    registry.place = lambda name, upload: f"/v2/app/blobs/uploads/{name}"  # type: ignore[method-assign]
    registry.fault("PUT ", lambda exchange: exchange.send(201))
    stream(app, b"x")
    assert registry.requests("PUT")[-1].raw_query == f"digest={digest_of(b'x')}"


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("", "has no Location"),
        ("ftp://host/", "is neither http:// nor https://"),
        ("http://u:p@127.0.0.1/", "with credentials in it"),
        ("/a b", "holds spaces"),
    ],
)
def test_locations_that_are_refused(registry: FaultyRegistry, app: Repository, location: str, message: str) -> None:
    registry.fault("POST ", lambda exchange: exchange.send(202, {"Location": location}))
    with pytest.raises(RegistryError, match=message):
        app.upload()


def test_a_chunk_is_sent_again(registry: FaultyRegistry, app: Repository) -> None:
    """As a whole, or what of it did not arrive; and when its answer is lost, not at all."""

    def lost(exchange: Exchange) -> None:
        name = exchange.path.rpartition("/")[2]
        upload = registry.uploads[name]
        registry._take(exchange, name, upload)
        exchange.hang_up()

    registry.fault("PATCH ", registry.part_of(0), registry.part_of(60_000), status(503), lost, Exchange.hang_up)
    stream(app)
    assert registry.blobs[LAYER_OF_DATA.digest] == DATA
    ranges = [seen.headers.get("content-range") for seen in registry.requests("PATCH")]
    assert ranges[:4] == ["0-99999", "0-99999", "60000-99999", "60000-99999"]
    assert ranges[4:6] == ["100000-199999", "100000-199999"]


def test_an_upload_that_is_lost(registry: FaultyRegistry, app: Repository) -> None:
    registry.resumes = False
    registry.fault("PATCH ", registry.part_of(50_000))
    with pytest.raises(UploadBrokenError, match="PATCH blob: the connection broke.*; the upload has to begin again"):
        stream(app)
    stream(app)
    assert registry.blobs[LAYER_OF_DATA.digest] == DATA


@pytest.mark.parametrize(
    "answer",
    [
        status(404, "BLOB_UPLOAD_UNKNOWN"),
        status(400, "BLOB_UPLOAD_INVALID"),
        lambda exchange: (list(exchange.body()), exchange.send(202, {"Range": "0-5"})),
    ],
)
def test_a_registry_that_forgets(registry: FaultyRegistry, app: Repository, answer: Any) -> None:
    """Nothing is sent to an upload of which nobody knows how much it has."""
    with app.upload() as upload:
        upload.write(DATA[: 2 * CHUNK + 1])
        registry.fault("PATCH ", answer)
        registry.fault("GET ", status(404, "BLOB_UPLOAD_UNKNOWN"))
        with pytest.raises(UploadBrokenError):
            upload.write(DATA[2 * CHUNK + 1 :])
            upload.commit(LAYER_OF_DATA.digest, len(DATA))
    assert registry.blobs == {}


def test_a_registry_that_takes_one_stream(registry: FaultyRegistry, app: Repository) -> None:
    registry.takes_chunks = False
    with pytest.raises(UploadBrokenError):
        stream(app)
    stream(app)
    assert registry.blobs[LAYER_OF_DATA.digest] == DATA
    (sent,) = [seen for seen in registry.requests("PATCH") if "content-range" not in seen.headers]
    assert sent.headers["transfer-encoding"] == "chunked"
    registry.fault("PATCH ", registry.part_of(100_000))
    with pytest.raises(UploadBrokenError):
        stream(app)
    with nothing_leaks(), app.upload() as upload:
        upload.write(DATA)


def test_closing_is_tried_again(registry: FaultyRegistry, app: Repository) -> None:
    registry.fault("PUT ", status(504), Exchange.hang_up)
    stream(app)
    assert registry.blobs[LAYER_OF_DATA.digest] == DATA
    registry.fault("PUT ", status(404, "BLOB_UPLOAD_UNKNOWN"))
    with pytest.raises(UploadBrokenError):
        stream(app, DATA[1:])


def test_a_real_refusal(registry: FaultyRegistry, app: Repository) -> None:
    registry.fault("PATCH ", registry.usual, registry.usual, status(413))
    with pytest.raises(RegistryError, match="PATCH blob: 413 .*; the registry, or a proxy before it, takes nothing"):
        stream(app)


def test_the_size_has_to_be_right(registry: FaultyRegistry, app: Repository) -> None:
    with app.upload() as upload, pytest.raises(VerificationError, match="3 bytes were written of a blob of 4"):
        upload.write(b"abc")
        upload.commit(digest_of(b"abc"), 4)
    with pytest.raises(VerificationError, match="DIGEST_INVALID"), app.upload() as upload:
        upload.write(b"abc")
        upload.commit(digest_of(b"abd"), 3)


def test_write_says_soon_what_went_wrong(registry: FaultyRegistry, app: Repository) -> None:
    registry.fault("PATCH ", status(403, "DENIED"), status(403, "DENIED"))
    with app.upload() as upload, pytest.raises(RegistryError, match="PATCH blob: 403 Forbidden, DENIED"):
        upload.write(DATA[: CHUNK + 1])
        for _ in range(1000):
            upload.write(b"x")
            time.sleep(0.005)
    assert methods(registry)[-1] == "DELETE"


def test_abort(registry: FaultyRegistry) -> None:
    with nothing_leaks(), Registries(chunk_size=CHUNK) as registries:
        with repository_of(registries, registry.host).upload() as upload:
            upload.write(DATA)
            until = time.monotonic() + 5
            while registry.uploads["upload0"].state < 4 and time.monotonic() < until:
                time.sleep(0.01)
            time.sleep(0.05)  # for the answer to arrive
        assert registry.uploads == {}
        with pytest.raises(UsageError, match="has ended"):
            upload.write(DATA)


def test_abort_of_what_hangs(registry: FaultyRegistry) -> None:
    """Whether the registry does not read or does not answer, abort and close wait for nobody."""
    large = bytes(30 * MIB)
    for chunk_size in (CHUNK, 25 * MIB):
        registry.fault("PATCH ", never, never)
        with nothing_leaks(), Registries(chunk_size=chunk_size, timeout=30) as registries:
            repository = repository_of(registries, registry.host)
            upload = repository.upload()
            upload.write(large[: chunk_size + 1])
            began = time.monotonic()
            repository.close()
            assert time.monotonic() - began < 1


def test_a_registry_that_hangs(registry: FaultyRegistry) -> None:
    registry.fault("PATCH ", *[never] * 9)
    registries = Registries(chunk_size=CHUNK, timeout=0.1, sleep=Pauses())
    with registries, pytest.raises(RegistryError, match="no answer in time, after 5 attempts"):
        stream(repository_of(registries, registry.host))


# --- manifests


def test_put_manifest(registry: FaultyRegistry, app: Repository) -> None:
    root = app.put_manifest(OCI_MANIFEST, MANIFEST, ["v2", "v3"])
    assert root == Descriptor(OCI_MANIFEST, digest_of(MANIFEST), len(MANIFEST))
    assert set(registry.manifests) == {("app", name) for name in (root.digest, "v2", "v3")}
    app.finish(root)
    assert registry.manifests["app", "v1"] == (OCI_MANIFEST, MANIFEST)
    assert [seen.path.rpartition("/")[2] for seen in registry.requests("PUT")] == [root.digest, "v2", "v3", "v1"]


def test_finish_what_another_has_put(registry: FaultyRegistry, app: Repository) -> None:
    root = app.put_manifest(OCI_MANIFEST, MANIFEST)
    app.put_manifest(OCI_MANIFEST, MANIFEST + b" ")
    app.finish(root)
    assert registry.manifests["app", "v1"] == (OCI_MANIFEST, MANIFEST)


def test_manifests_that_fail(registry: FaultyRegistry, app: Repository) -> None:
    registry.fault("PUT ", status(503), Exchange.hang_up)
    app.put_manifest(OCI_MANIFEST, MANIFEST)
    registry.fault("PUT ", status(400, "MANIFEST_BLOB_UNKNOWN", "blob unknown to registry"))
    with pytest.raises(
        RegistryError, match="PUT manifest sha256:.*: 400 Bad Request, MANIFEST_BLOB_UNKNOWN blob unknown"
    ):
        app.put_manifest(OCI_MANIFEST, MANIFEST)
    lies = {"Docker-Content-Digest": digest_of(b"other")}
    registry.fault("PUT ", lambda exchange: (list(exchange.body()), exchange.send(201, lies)))
    with pytest.raises(VerificationError, match="the registry stored"):
        app.put_manifest(OCI_MANIFEST, MANIFEST)


@pytest.mark.parametrize(
    "tag", ["../../victim/manifests/x", "..", "a/b", "a?b", "a#b", "a%2fb", ".a", "", "a b", 129 * "a"]
)
def test_tags_that_are_none(registry: FaultyRegistry, app: Repository, tag: str) -> None:
    """They would lead to something else, of another repository even."""
    with pytest.raises(UsageError, match="is no tag"):
        app.put_manifest(OCI_MANIFEST, MANIFEST, ["good", tag])
    assert registry.seen == []


@pytest.mark.parametrize(
    "wrong",
    [{"repository": "app/../x"}, {"repository": "a?b"}, {"repository": "app", "tag": "../x"}, {"digest": "../x"}],
)
def test_references_made_by_hand(registry: FaultyRegistry, wrong: dict[str, str]) -> None:
    reference = Reference("docker", **{"host": registry.host, "repository": "app", **wrong})
    with Registries() as registries, pytest.raises(UsageError, match="names no image"):
        registries.repository(reference)


@pytest.mark.parametrize("digest", ["sha256:../../x", "", "sha256:" + 64 * "0" + "&x=y"])
def test_digests_that_are_none(registry: FaultyRegistry, app: Repository, digest: str) -> None:
    with app.upload() as upload, pytest.raises(ImageError, match="is no digest"):
        upload.write(b"x")
        upload.commit(digest, 1)
    assert methods(registry) == ["POST", "DELETE"]


# --- many drops


@pytest.mark.parametrize("resumes", [True, False])
def test_twenty_drops(resumes: bool) -> None:
    size = 64 if not os.environ.get("ESTARGZ_LONG_TESTS") else 1024
    piece = random.Random(9).randbytes(MIB)
    descriptor = Descriptor(LAYER, _digest_of_many(piece, size), size * MIB)
    rng = random.Random(3)
    with faulty_registry(resumes=resumes, keep=False) as registry, cutting_proxy(registry.host) as proxy:
        with Registries(sleep=Pauses()) as registries:
            repository = repository_of(registries, proxy.host)
            assert not repository.has(descriptor)
            proxy.up += [
                rng.randrange(size * MIB // 20) if resumes else rng.randrange(2 * MIB, 12 * MIB) for _ in range(20)
            ]
            repository.put(descriptor, lambda: Pieces(piece, size))
        assert proxy.cut == 20
        assert registry.sizes["app", descriptor.digest] == size * MIB
        if resumes:
            assert sum(seen.read for seen in registry.requests("PUT|PATCH")) <= 1.02 * size * MIB + 20 * MIB


def _digest_of_many(piece: bytes, count: int) -> str:
    import hashlib

    hashed = hashlib.sha256()
    for _ in range(count):
        hashed.update(piece)
    return f"sha256:{hashed.hexdigest()}"


def test_a_stream_survives_drops(registry: FaultyRegistry) -> None:
    data = random.Random(4).randbytes(8 * MIB)
    with cutting_proxy(registry.host) as proxy, Registries(sleep=Pauses(), chunk_size=MIB) as registries:
        repository = repository_of(registries, proxy.host)
        repository.has(LAYER_OF_DATA)
        rng = random.Random(8)
        proxy.up += [rng.randrange(MIB // 8, MIB) for _ in range(10)]
        stream(repository, data, 100_000)
        assert proxy.cut == 10
    assert registry.blobs[digest_of(data)] == data


# --- memory

GROWTH = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from faulty_registry import *
piece = bytes(range(256)) * 4096
def peak(count, host, name):
    import hashlib
    hashed = hashlib.sha256()
    for _ in range(count):
        hashed.update(piece)
    descriptor = Descriptor(LAYER, "sha256:" + hashed.hexdigest(), count << 20)
    with Registries() as registries:
        repository = repository_of(registries, host, name)
        if name.startswith("get"):
            with repository.open(descriptor) as reader:
                while reader.read(1 << 20):
                    pass
        elif name.startswith("put"):
            repository.put(descriptor, lambda: Pieces(piece, count))
        else:
            with repository.upload() as upload:
                for _ in range(count):
                    upload.write(piece)
                upload.commit(descriptor.digest, descriptor.size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
first = [peak(64, sys.argv[1], name) for name in ("put", "get64", "upload")][-1]
second = [peak(400, sys.argv[1], name) for name in ("put2", "get400", "upload2")][-1]
print(second - first)
"""


@pytest.mark.measured
def test_memory_does_not_grow_with_the_blob() -> None:
    def give(exchange: Exchange) -> None:
        count = int(exchange.path.split("/")[2].removeprefix("get"))
        exchange.send(200, {"Content-Length": count * MIB})
        for _ in range(count):
            exchange.handler.wfile.write(bytes(range(256)) * 4096)

    with faulty_registry(keep=False) as registry:
        registry.fault("GET /v2/get", give, give)
        command = [sys.executable, "-c", GROWTH, registry.host, str(Path(__file__).parent)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 12 << 10  # KiB
