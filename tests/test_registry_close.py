"""Repositories that are closed while something is under way: whoever waits gets an error, at once, and nothing is left."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from faulty_registry import (
    Exchange,
    FaultyRegistry,
    Pieces,
    descriptor_of,
    digest_of,
    faulty_registry,
    never,
    repository_of,
    stuck,
)
from tars import in_thread, nothing_leaks

from estargz.errors import EstargzError, RangeError, RegistryError, UsageError
from estargz.image.model import OCI_MANIFEST
from estargz.image.reference import Reference
from estargz.image.store import open_source, open_target
from estargz.registry.client import Registries
from estargz.registry.repository import Repository

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("home")]

AT_ONCE = 1.0  # seconds
CHUNK = 100_000
DATA = random.Random(7).randbytes(3 * CHUNK)
LAYER_OF_DATA = descriptor_of(DATA)
LARGE = bytes(30 << 20)  # more than sockets hold
LOGIN = ("me", "secret")


@pytest.fixture
def registry() -> Iterator[FaultyRegistry]:
    with faulty_registry() as made:
        made.put("app", DATA)
        yield made


class Waiting:
    """A thread that does something which has to fail, with the error of ours that it fails with."""

    def __init__(self, target: Callable[[], object]) -> None:
        self.error: BaseException | None = None
        self._target = target
        self._thread = in_thread(self._run)

    def _run(self) -> None:
        try:
            self._target()
        except BaseException as error:
            self.error = error

    def ends(self, seconds: float = AT_ONCE) -> bool:
        self._thread.join(seconds)
        return not self._thread.is_alive()


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def close_at_once(closed: Repository | Registries) -> None:
    began = time.monotonic()
    closed.close()
    assert time.monotonic() - began < AT_ONCE


def read(repository: Repository) -> None:
    with repository.open(LAYER_OF_DATA) as reader:
        while reader.read(1000):
            pass


def put(repository: Repository, data: bytes = DATA[1:]) -> None:
    repository.put(descriptor_of(data), lambda: Pieces(data))


def stream(repository: Repository, data: bytes = DATA) -> None:
    with repository.upload() as upload:
        for at in range(0, len(data), CHUNK):
            upload.write(data[at : at + CHUNK])
        upload.commit(digest_of(data), len(data))


def read_range(repository: Repository) -> None:
    with repository.range_source(LAYER_OF_DATA) as source:
        source.read_ranges([(0, 10), (100, 10), (200, 10)])


def half(exchange: Exchange) -> None:
    """A fault: the beginning of a blob."""
    exchange.handler.send_response(200)
    exchange.handler.send_header("Content-Length", str(len(DATA)))
    exchange.handler.end_headers()
    exchange.handler.wfile.write(DATA[:CHUNK])
    never(exchange, 20_000)


def busy(exchange: Exchange) -> None:
    list(exchange.body())
    exchange.refuse(503, Retry_After=60)


STALLS: list[tuple[str, Callable[[Exchange], None], Callable[[Repository], object]]] = [
    ("GET /v2/$", stuck, Repository.resolve),
    ("GET /v2/$", busy, Repository.resolve),
    ("GET .*/manifests/", stuck, Repository.resolve),
    ("GET .*/manifests/", busy, Repository.resolve),
    ("GET .*/blobs/", stuck, read),
    ("GET .*/blobs/", half, read),
    ("GET .*/blobs/", stuck, read_range),
    ("GET .*/blobs/", busy, read_range),
    ("HEAD ", stuck, put),
    ("POST ", stuck, put),
    ("POST ", stuck, stream),
    ("PUT ", stuck, put),
    ("PUT ", never, lambda repository: put(repository, LARGE)),
    ("PUT ", busy, put),
    ("PUT ", stuck, stream),
    ("PATCH ", stuck, stream),
    ("PATCH ", never, lambda repository: stream(repository, LARGE)),
    ("PATCH ", busy, stream),
    ("PUT ", stuck, lambda repository: repository.put_manifest(OCI_MANIFEST, b"{}")),
]


@pytest.mark.parametrize(("request_", "fault", "work"), STALLS)
def test_close(
    registry: FaultyRegistry,
    request_: str,
    fault: Callable[[Exchange], None],
    work: Callable[[Repository], object],
) -> None:
    """From another thread, and twice; also who waits for the others, as all places are taken."""
    registry.fault(request_, *[fault] * 9)
    with nothing_leaks(), Registries(chunk_size=CHUNK, parallel=2) as registries:
        repository = repository_of(registries, registry.host)
        threads = [Waiting(lambda: work(repository)) for _ in range(3)]
        until(lambda: registry.requests(request_))
        time.sleep(0.05)  # for them to wait
        assert [thread.error for thread in threads] == [None] * 3
        close_at_once(repository)
        assert all(thread.ends() for thread in threads)
        errors = [thread.error for thread in threads]
        assert all(isinstance(error, RangeError | RegistryError | UsageError) for error in errors), errors
        repository.close()
        with pytest.raises(UsageError, match="is closed"):
            repository.has(LAYER_OF_DATA)


def test_a_registry_that_takes_uploads_and_nothing_else(registry: FaultyRegistry) -> None:
    """Also what has to be said of several uploads is said in the same time, if it is heard."""
    for pattern in ("PATCH ", "PUT ", "DELETE "):
        registry.fault(pattern, *[stuck] * 20)
    with nothing_leaks(), Registries(chunk_size=CHUNK) as registries:
        repositories = [repository_of(registries, registry.host, f"app{number}:v1") for number in range(3)]
        threads = [Waiting(lambda place=place: stream(place)) for place in repositories for _ in range(2)]  # type: ignore[misc]
        until(lambda: len(registry.requests("PATCH ")) == 6)
        close_at_once(registries)
        assert all(thread.ends() for thread in threads)
    assert registry.requests("DELETE ")


def test_an_abort_that_nobody_hears(registry: FaultyRegistry) -> None:
    """Closing ends it, too."""
    registry.fault("DELETE ", stuck)
    with nothing_leaks(), Registries() as registries:
        repository = repository_of(registries, registry.host)
        upload = repository.upload()
        thread = Waiting(upload.abort)
        until(lambda: registry.requests("DELETE "))
        close_at_once(repository)
        assert thread.ends()
        assert thread.error is None


def test_a_connection_that_is_not_made() -> None:
    """The queue of who wants to connect is full."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
        with nothing_leaks(), Registries() as registries:
            repository = repository_of(registries, f"127.0.0.1:{listener.getsockname()[1]}")
            thread = Waiting(repository.resolve)
            assert not thread.ends(0.2)
            close_at_once(repository)
            assert thread.ends()
            assert isinstance(thread.error, RegistryError | UsageError)
        for one in waiting:
            one.close()


def test_tls_that_is_not_agreed_upon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("estargz.registry.host.is_loopback", lambda host: False)
    with socket.create_server(("127.0.0.1", 0)) as listener, nothing_leaks(), Registries() as registries:
        repository = repository_of(registries, f"127.0.0.1:{listener.getsockname()[1]}")
        thread = Waiting(repository.resolve)
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.recv(1) == b"\x16"  # what a TLS client begins with
            assert not thread.ends(0.05)
            close_at_once(repository)
            assert thread.ends()
            assert isinstance(thread.error, RegistryError | UsageError)


@pytest.mark.parametrize("fault", [stuck, busy])
@pytest.mark.parametrize("closed", [0, 1])
def test_a_token_that_two_wait_for(fault: Callable[[Exchange], None], closed: int) -> None:
    """The one that is closed gets an error, whichever it is; the other one a token."""
    with faulty_registry(login=LOGIN, bearer=True) as registry:
        registry.put("app", DATA)
        heard = threading.Event()

        def answer(exchange: Exchange) -> None:
            heard.set()
            fault(exchange)

        registry.fault("GET /token", answer)
        with nothing_leaks(), Registries(credentials={registry.host: LOGIN}, timeout=3) as registries:
            repositories = [repository_of(registries, registry.host) for _ in range(2)]
            first = Waiting(lambda: read(repositories[0]))
            assert heard.wait(10)
            second = Waiting(lambda: read(repositories[1]))
            time.sleep(0.05)
            threads = [first, second]
            close_at_once(repositories[closed])
            assert threads[closed].ends()
            assert isinstance(threads[closed].error, EstargzError)
            if closed == 0:
                assert second.ends(5)
                assert second.error is None
            else:
                assert first.error is None  # it has its time


def test_others_go_on(registry: FaultyRegistry) -> None:
    """Connections that were used by what is closed may be somebody else's now."""
    with nothing_leaks(), Registries() as registries:
        closing = repository_of(registries, registry.host)
        reading = repository_of(registries, registry.host)
        with reading.open(LAYER_OF_DATA) as reader:
            first = reader.read(1000)
            read(closing)
            closing.close()
            rest = b"".join(iter(lambda: reader.read(100_000), b""))
        assert first + rest == DATA
        stream(reading)
        assert registry.blobs[LAYER_OF_DATA.digest] == DATA


def test_registries_of_its_own(registry: FaultyRegistry) -> None:
    """Nobody else would close its connections."""
    reference = Reference.parse(f"docker://{registry.host}/app:v1")
    with nothing_leaks():
        target = open_target(reference)
        target.put(LAYER_OF_DATA, lambda: Pieces(DATA))
        root = target.put_manifest(OCI_MANIFEST, b'{"schemaVersion":2}')
        target.finish(root)
        target.close()
        source = open_source(reference)
        assert source.resolve() == root
        source.close()
        source.close()
