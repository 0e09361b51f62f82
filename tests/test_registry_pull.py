"""Images read from a registry that fails in every way: nothing but the right bytes is ever given out."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import missing
from faulty_registry import (
    LAYER,
    Exchange,
    FaultyRegistry,
    Pauses,
    cutting_proxy,
    descriptor_of,
    digest_of,
    faulty_registry,
    never,
    repository_of,
)
from tars import nothing_leaks

from estargz.errors import ImageError, RegistryError, UsageError, VerificationError
from estargz.image.model import DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST, Descriptor
from estargz.image.reference import Reference
from estargz.registry.client import Registries
from estargz.registry.repository import Repository

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("home")]

DATA = random.Random(5).randbytes(3_000_000)
LAYER_OF_DATA = descriptor_of(DATA)
MANIFEST = json.dumps({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": {}, "layers": []}).encode()


@pytest.fixture
def registry() -> Iterator[FaultyRegistry]:
    with faulty_registry() as made:
        made.put("app", DATA)
        made.manifests["app", "v1"] = made.manifests["app", digest_of(MANIFEST)] = OCI_MANIFEST, MANIFEST
        yield made


@pytest.fixture
def pauses() -> Pauses:
    return Pauses()


@pytest.fixture
def app(registry: FaultyRegistry, pauses: Pauses) -> Iterator[Repository]:
    with Registries(sleep=pauses, timeout=5) as registries:
        yield repository_of(registries, registry.host)


def content(repository: Repository, descriptor: Descriptor = LAYER_OF_DATA) -> bytes:
    with repository.open(descriptor) as reader:
        return b"".join(iter(lambda: reader.read(100_000), b""))


def status(code: int, name: str = "", **headers: object) -> Callable[[Exchange], None]:
    return lambda exchange: exchange.refuse(code, name, **headers)


# --- manifests


def test_resolve(registry: FaultyRegistry, app: Repository) -> None:
    root = app.resolve()
    assert root == Descriptor(OCI_MANIFEST, digest_of(MANIFEST), len(MANIFEST))
    assert app.read(root) == MANIFEST
    (asked,) = registry.requests("GET /v2/app/manifests/")  # what was resolved is not fetched again
    assert {OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST} <= set(asked.headers["accept"].split(", "))


def test_a_manifest_by_its_digest(registry: FaultyRegistry) -> None:
    wanted = digest_of(MANIFEST)
    longer = f"sha512:{hashlib.sha512(MANIFEST).hexdigest()}"
    registry.manifests["app", longer] = OCI_MANIFEST, MANIFEST
    with Registries() as registries:
        for digest in (wanted, longer):
            assert repository_of(registries, registry.host, f"app@{digest}").resolve().digest == digest
        assert (
            repository_of(registries, registry.host).read(Descriptor(OCI_MANIFEST, wanted, len(MANIFEST))) == MANIFEST
        )


def test_an_image_that_is_not_there(app: Repository, registry: FaultyRegistry) -> None:
    with (
        Registries() as registries,
        pytest.raises(ImageError, match="app:v9: MANIFEST_UNKNOWN: there is no such image"),
    ):
        repository_of(registries, registry.host, "app:v9").resolve()


def answer_with(data: bytes, kind: str = OCI_MANIFEST, **headers: object) -> Callable[[Exchange], None]:
    given = {"Content-Type": kind, **{name.replace("_", "-"): value for name, value in headers.items()}}
    return lambda exchange: exchange.send(200, given, data)


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (answer_with(MANIFEST, OCI_INDEX), ImageError, "says that it is .*manifest.v1.*, and was stored as .*index"),
        (answer_with(MANIFEST, Docker_Content_Digest=digest_of(b"")), VerificationError, "has the digest sha256:"),
        (answer_with(MANIFEST, Docker_Content_Digest="x\x1b"), VerificationError, r"not x\?"),
        (answer_with(b"{}", "text/html"), ImageError, "is of the type 'text/html', which is no image"),
        (answer_with(b"<html>", "text/html"), ImageError, "the manifest is no JSON"),
        (answer_with(b" " * (5 << 20)), RegistryError, "answers with more than 4194304 bytes"),
        (status(403, "DENIED"), RegistryError, "GET manifest v1: 403 Forbidden, DENIED; check the credentials"),
        (status(429), RegistryError, "429 Too Many Requests, after 5 attempts; try again later"),
        (Exchange.hang_up, RegistryError, "the connection broke(: [A-Z][a-z ]+)?, after 5 attempts; check the network"),
    ],
)
def test_manifests_that_are_refused(
    registry: FaultyRegistry, app: Repository, answer: Any, kind: type[Exception], message: str
) -> None:
    registry.fault("GET /v2/app/manifests/", *[answer] * 5)
    with pytest.raises(kind, match=message) as caught:
        app.resolve()
    assert str(caught.value).startswith(app.name)


def test_a_type_that_only_the_manifest_states(registry: FaultyRegistry, app: Repository) -> None:
    registry.fault("GET ", lambda exchange: exchange.send(200))  # the greeting
    registry.fault("GET /v2/app/manifests/", answer_with(MANIFEST, "application/json; charset=utf-8"))
    assert app.resolve().media_type == OCI_MANIFEST


def test_other_bytes_than_the_reference_says(registry: FaultyRegistry) -> None:
    registry.manifests["app", digest_of(MANIFEST)] = OCI_MANIFEST, MANIFEST + b" "
    with Registries() as registries:
        named = repository_of(registries, registry.host, f"app@{digest_of(MANIFEST)}")
        with pytest.raises(VerificationError, match="has the digest"):
            named.resolve()
        with pytest.raises(VerificationError, match="has the digest"):
            named.read(Descriptor(OCI_MANIFEST, digest_of(MANIFEST), len(MANIFEST)))


def test_a_configuration(registry: FaultyRegistry, app: Repository) -> None:
    config = Descriptor("application/vnd.oci.image.config.v1+json", registry.put("app", b"{}"), 2)
    assert app.read(config) == b"{}"
    registry.blobs[config.digest] = b"[]"
    with pytest.raises(VerificationError, match="has the digest"):
        app.read(config)


# --- blobs


@pytest.mark.parametrize("size", [0, 1, 70_000, len(DATA)])
def test_a_blob(registry: FaultyRegistry, size: int) -> None:
    registry.put("app", DATA[:size])
    with nothing_leaks(), Registries() as registries:
        repository = repository_of(registries, registry.host)
        assert content(repository, descriptor_of(DATA[:size])) == DATA[:size]


def test_a_cut_download_goes_on(registry: FaultyRegistry, app: Repository, pauses: Pauses) -> None:
    cuts = [lambda exchange, cut=cut: registry.give(exchange, DATA, cut) for cut in (0, 1, 100_000, 250_000, 0)]
    registry.fault("GET /v2/app/blobs/", *cuts)
    assert content(app) == DATA
    asked = [seen.headers.get("range") for seen in registry.requests("GET /v2/app/blobs/")]
    assert asked[:4] == [None, None, f"bytes=1-{len(DATA) - 1}", f"bytes=100001-{len(DATA) - 1}"]
    assert len(pauses) == 5


def test_twenty_drops(registry: FaultyRegistry, pauses: Pauses) -> None:
    rng = random.Random(1)
    with cutting_proxy(registry.host) as proxy, Registries(sleep=pauses) as registries:
        repository = repository_of(registries, proxy.host)
        with repository.open(LAYER_OF_DATA) as reader:
            proxy.down += [rng.randrange(1000, 200_000) for _ in range(20)]
            assert b"".join(iter(lambda: reader.read(100_000), b"")) == DATA
        assert proxy.cut == 20


@pytest.mark.parametrize("way", ["ignores", "416", "other range", "other size"])
def test_a_registry_that_cannot_go_on(registry: FaultyRegistry, app: Repository, way: str) -> None:
    """The blob is taken from its beginning, and what was had is passed over."""
    registry.fault("GET /v2/app/blobs/", lambda exchange: registry.give(exchange, DATA, 300_000))
    if way == "ignores":
        registry.ranges = False
    elif way == "416":
        registry.fault("GET /v2/app/blobs/", status(416))
    elif way == "other range":
        headers = {"Content-Range": f"bytes 299999-{len(DATA) - 1}/{len(DATA)}"}
        registry.fault("GET /v2/app/blobs/", lambda exchange: exchange.send(206, headers, DATA[299_999:]))
    else:
        headers = {"Content-Range": f"bytes 300000-{len(DATA) - 1}/{len(DATA) + 1}"}
        registry.fault("GET /v2/app/blobs/", lambda exchange: exchange.send(206, headers, DATA[300_000:]))
    assert content(app) == DATA


def changed(at: int) -> bytes:
    return DATA[:at] + bytes([DATA[at] ^ 1]) + DATA[at + 1 :]


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (lambda exchange: exchange.send(200, {}, changed(5)), VerificationError, "has the digest"),
        (lambda exchange: exchange.send(200, {}, DATA[:-1]), VerificationError, "has 2999999 bytes at the registry"),
        (lambda exchange: exchange.send(200, {}, DATA + b"x"), VerificationError, "has 3000001 bytes at the registry"),
        (
            lambda exchange: exchange.send(200, {"Content-Length": "", "Connection": "close"}, DATA + b"x"),
            VerificationError,
            "has more than the 3000000 bytes",
        ),
        (lambda exchange: exchange.send(206, {"Content-Range": "bytes 0-2/3"}, b"abc"), RegistryError, "206"),
        (lambda exchange: exchange.send(200, {"Content-Encoding": "gzip"}, DATA), RegistryError, "Content-Encoding"),
        (status(404, "BLOB_UNKNOWN"), RegistryError, f"GET blob {LAYER_OF_DATA.digest}: 404 Not Found, BLOB_UNKNOWN"),
        (status(500), RegistryError, "500 Internal Server Error, after 5 attempts"),
    ],
)
def test_blobs_that_are_refused(
    registry: FaultyRegistry, app: Repository, answer: Any, kind: type[Exception], message: str
) -> None:
    registry.fault("GET /v2/app/blobs/", *[answer] * 5)
    with pytest.raises(kind, match=message):
        content(app)


def test_the_rest_of_another_blob(registry: FaultyRegistry, app: Repository) -> None:
    registry.fault("GET /v2/app/blobs/", lambda exchange: registry.give(exchange, DATA, 300_000))
    registry.fault("GET /v2/app/blobs/", lambda exchange: registry.give(exchange, changed(len(DATA) - 1)))
    with pytest.raises(VerificationError, match="has the digest"):
        content(app)


def test_retry_after(registry: FaultyRegistry, app: Repository, pauses: Pauses) -> None:
    date = "Fri, 31 Dec 9999 23:59:59 GMT"
    registry.fault("GET /v2/app/blobs/", status(429, Retry_After=20), status(503, Retry_After=date), status(503))
    assert content(app) == DATA
    assert pauses[:2] == [20, 60]
    assert 0.5 <= pauses[2] <= 1  # what grows begins at a quarter of a second


def test_a_silent_registry(registry: FaultyRegistry) -> None:
    registry.fault("GET /v2/app/blobs/", *[never] * 5)
    registries = Registries(sleep=Pauses(), timeout=0.1)
    with registries, pytest.raises(RegistryError, match="no answer in time, after 5 attempts"):
        content(repository_of(registries, registry.host))


def test_close_wakes_who_waits(registry: FaultyRegistry) -> None:
    registry.fault("GET /v2/app/blobs/", never)
    with nothing_leaks(), Registries() as registries:
        repository = repository_of(registries, registry.host)
        threading.Timer(0.1, repository.close).start()
        with pytest.raises(RegistryError, match="was given up"):
            content(repository)
        with pytest.raises(UsageError, match="is closed"):
            repository.resolve()


# --- parts of blobs


def test_parts(app: Repository) -> None:
    for offset, size in ((0, 1), (1000, 50), (len(DATA) - 51, 100), (len(DATA), 1), (len(DATA) + 5, 5), (0, len(DATA))):
        assert app.read_at(LAYER_OF_DATA, offset, size) == DATA[offset : offset + size]
    with pytest.raises(UsageError, match="there are no -1 bytes"):
        app.read_at(LAYER_OF_DATA, 0, -1)


def test_parts_without_ranges(registry: FaultyRegistry, app: Repository) -> None:
    registry.ranges = False
    assert app.read_at(LAYER_OF_DATA, 1000, 50) == DATA[1000:1050]
    far = random.Random(2).randbytes(5 << 20)
    registry.put("app", far)
    with pytest.raises(
        RegistryError, match="the registry ignores ranges and sends the whole blob; copy the image first"
    ):
        app.read_at(descriptor_of(far), len(far) - 51, 51)


def test_a_lazy_source(registry: FaultyRegistry) -> None:
    registry.login, registry.bearer = ("me", "secret"), True
    registries = Registries(credentials={registry.host: registry.login})
    with registries, repository_of(registries, registry.host).range_source(LAYER_OF_DATA) as source:
        assert source.size == len(DATA)
        registry.token_uses = 1  # each token is refused at its second use, and replaced
        for offset in range(0, 600_000, 200_000):
            assert source.read_at(offset, 1000) == DATA[offset : offset + 1000]


# --- deadlines


def test_a_blob_that_trickles(registry: FaultyRegistry) -> None:
    """Bytes gain time, but few gain little; and a trickle is no progress that many attempts would be spent on."""

    def trickle(exchange: Exchange) -> None:
        exchange.handler.send_response(200)
        exchange.handler.send_header("Content-Length", str(len(DATA)))
        exchange.handler.end_headers()
        for at in range(1000):
            exchange.handler.wfile.write(DATA[at : at + 1])
            time.sleep(0.02)

    registry.fault("GET .*/blobs/", *[trickle] * 20)
    registry.ranges = False
    began = time.monotonic()
    with Registries(deadline=0.2, timeout=5, sleep=Pauses()) as registries:
        with pytest.raises(RegistryError, match="not done in time, after 5 attempts"):
            content(repository_of(registries, registry.host))
        registry.faults[4:] = []
        registry.fault("GET .*/blobs/", *[trickle] * 20)
        with pytest.raises(RegistryError, match="not done in time, after 5 attempts"):
            repository_of(registries, registry.host).read_at(LAYER_OF_DATA, 100_000, 10)  # while others are skipped
    assert time.monotonic() - began < 10


def test_a_blob_that_is_large(registry: FaultyRegistry) -> None:
    """It may take longer than the deadline by what it has, and by what whoever reads it does in between."""

    def steady(exchange: Exchange) -> None:
        exchange.send(200, {"Content-Length": len(DATA)})
        for at in range(0, len(DATA), 100_000):
            exchange.handler.wfile.write(DATA[at : at + 100_000])
            time.sleep(0.02)

    registry.fault("GET .*/blobs/", steady, registry.usual)
    with nothing_leaks(), Registries(deadline=0.2) as registries:
        repository = repository_of(registries, registry.host)
        assert content(repository) == DATA
        with repository.open(LAYER_OF_DATA) as reader:
            parts = []
            while part := reader.read(1_000_000):
                parts.append(part)
                if len(parts) < 3:
                    time.sleep(0.3)
        assert b"".join(parts) == DATA
    assert len(registry.requests("GET .*/blobs/")) == 2


# --- schemes and hosts


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("openssl") is None:
        missing("openssl is not installed")
    place = tmp_path_factory.mktemp("certificate")
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    files = ["-keyout", place / "both.pem", "-out", place / "ca.pem"]
    subprocess.run([*request, *names, *files], check=True, capture_output=True)
    with (place / "both.pem").open("ab") as both:
        both.write((place / "ca.pem").read_bytes())
    return place / "ca.pem"


@pytest.fixture
def secure(certificate: Path) -> Iterator[FaultyRegistry]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.parent / "both.pem")
    with faulty_registry(tls=context) as made:
        made.put("app", DATA)
        yield made


def test_loopback_with_tls(secure: FaultyRegistry, certificate: Path) -> None:
    for trusting in (
        {"ca_file": str(certificate)},
        {"insecure": True},
        {"insecure": {secure.host}},
        {"insecure": {"127.0.0.1"}},
    ):
        with Registries(sleep=Pauses(), timeout=5, **trusting) as registries:  # type: ignore[arg-type]
            assert content(repository_of(registries, secure.host)) == DATA
    strange: dict[str, Any]
    for strange in ({}, {"insecure": {"127.0.0.2"}}):
        with (
            Registries(sleep=Pauses(), timeout=5, **strange) as registries,
            pytest.raises(RegistryError, match="TLS failed"),
        ):
            content(repository_of(registries, secure.host))


def test_insecure_without_tls(registry: FaultyRegistry) -> None:
    with Registries(insecure=True, sleep=Pauses()) as registries:
        assert content(repository_of(registries, registry.host.replace("127.0.0.1", "localhost"))) == DATA


def test_others_need_tls(registry: FaultyRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their names lead to."""
    monkeypatch.setattr("estargz.registry.host.is_loopback", lambda host: False)
    registries = Registries(credentials={registry.host: ("me", "secret")}, sleep=Pauses(), timeout=0.5)
    with (
        registries,
        pytest.raises(RegistryError, match="TLS failed|the connection broke|no answer in time|not done in time"),
    ):
        content(repository_of(registries, registry.host))
    assert registry.requests() == []


def test_from_https_to_http(secure: FaultyRegistry, registry: FaultyRegistry, certificate: Path) -> None:
    secure.elsewhere = registry.url
    with Registries(ca_file=str(certificate), sleep=Pauses()) as registries:
        with pytest.raises(RegistryError, match="redirects from https to http"):
            content(repository_of(registries, secure.host))
        begun = {"Location": f"{registry.url}/v2/app/blobs/uploads/x"}
        secure.fault("POST ", lambda exchange: exchange.send(202, begun))
        with pytest.raises(RegistryError, match="has the upload go on without TLS; have the registry"):
            repository_of(registries, secure.host).upload()
    assert registry.seen == []


def test_a_registry_that_is_not_there() -> None:
    pauses = Pauses()
    with (
        Registries(sleep=pauses) as registries,
        pytest.raises(RegistryError, match="cannot be connected to: Connection"),
    ):
        repository_of(registries, "127.0.0.1:1").resolve()
    assert len(pauses) >= 4


def test_the_hub_is_elsewhere(monkeypatch: pytest.MonkeyPatch, registry: FaultyRegistry) -> None:
    """A proxy is told where to connect to."""
    monkeypatch.setenv("https_proxy", registry.url)
    with Registries(sleep=Pauses(), timeout=2) as registries, pytest.raises(RegistryError, match="the proxy"):
        registries.repository(Reference.parse("docker://busybox")).resolve()
    assert {seen.path for seen in registry.requests("CONNECT")} == {"registry-1.docker.io:443"}


def test_certificates_of_a_host(
    secure: FaultyRegistry, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("estargz.registry.client._CERTIFICATES", (str(tmp_path / "none"), str(tmp_path)))
    (tmp_path / secure.host).mkdir()
    shutil.copy(certificate, tmp_path / secure.host / "ca.crt")
    with Registries(sleep=Pauses(), timeout=5) as registries:
        assert content(repository_of(registries, secure.host)) == DATA


def test_certificates_that_are_shown(certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.parent / "both.pem")
    context.load_verify_locations(certificate)
    context.verify_mode = ssl.CERT_REQUIRED
    monkeypatch.setattr("estargz.registry.client._CERTIFICATES", (str(tmp_path),))
    with faulty_registry(tls=context) as registry:
        registry.put("app", DATA)
        (tmp_path / registry.host).mkdir()

        def pull() -> bytes:
            with Registries(ca_file=str(certificate), sleep=Pauses(), timeout=5) as registries:
                return content(repository_of(registries, registry.host))

        with pytest.raises(RegistryError, match="the connection broke|TLS failed"):
            pull()
        shutil.copy(certificate, tmp_path / registry.host / "me.cert")
        with pytest.raises(UsageError, match=r"me\.cert: cannot be shown .*me\.key beside it"):
            pull()
        shutil.copy(certificate.parent / "both.pem", tmp_path / registry.host / "me.key")
        assert pull() == DATA


def test_other_references() -> None:
    with Registries() as registries, pytest.raises(UsageError, match="is in no registry"):
        registries.repository(Reference.parse("oci:dir"))
    with pytest.raises(UsageError, match="are closed"):
        repository_of(registries, "127.0.0.1:1")
    for wrong in ({"timeout": 0}, {"parallel": 0}, {"chunk_size": 0}, {"ca_file": "/none"}):
        with pytest.raises(UsageError):
            Registries(**wrong)  # type: ignore[arg-type]


def test_requests_at_once(registry: FaultyRegistry) -> None:
    """No more than allowed; and open blobs, however many, stop nobody."""
    lock, now, most = threading.Lock(), [0], [0]
    meet = threading.Event()

    def slow(exchange: Exchange) -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        meet.wait(0.05)
        with lock:
            now[0] -= 1
        registry.usual(exchange)

    registry.fault("HEAD ", *[slow] * 12)
    with Registries(parallel=2) as registries:
        repository = repository_of(registries, registry.host)
        readers = [repository.open(LAYER_OF_DATA) for _ in range(6)]
        for reader in readers:
            assert reader.read(1000)
        threads = [threading.Thread(target=repository.has, args=(LAYER_OF_DATA,)) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for reader in readers:
            reader.close()
    assert most[0] == 2


def test_has(registry: FaultyRegistry, app: Repository) -> None:
    assert app.has(LAYER_OF_DATA)
    assert not app.has(Descriptor(LAYER, digest_of(b""), 0))
    assert not app.has(Descriptor(LAYER, LAYER_OF_DATA.digest, 7))
    assert app.has(Descriptor(OCI_MANIFEST, digest_of(MANIFEST), len(MANIFEST)))
    assert not app.has(Descriptor(OCI_MANIFEST, digest_of(b""), 0))
    registry.fault("HEAD ", status(403), lambda exchange: exchange.send(200, {"Docker-Content-Digest": digest_of(b"")}))
    assert not app.has(LAYER_OF_DATA)
    assert not app.has(LAYER_OF_DATA)


def test_hosts_become_insecure_later(registry: FaultyRegistry) -> None:
    with Registries(insecure={"elsewhere.example"}) as registries:
        registries.allow_insecure([registry.host])
        assert registries.repository(Reference.parse(f"docker://{registry.host}/a:1")) is not None
        assert registries._settings.insecure == {"elsewhere.example", registry.host}


def test_loopback_needs_no_proxy(registry: FaultyRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    with Registries(sleep=Pauses()) as registries:
        descriptor = Descriptor("application/octet-stream", "sha256:" + 64 * "0", 1)
        assert not registries.repository(Reference.parse(f"docker://{registry.host}/a:1")).has(descriptor)
