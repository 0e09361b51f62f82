"""A registry in the test's process that can be told to fail in every way, and a proxy that cuts connections.

It keeps to the distribution-spec where nothing else is asked of it, and notes all that it is sent.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import select
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, urlencode

from estargz.image.model import Descriptor
from estargz.image.reference import Reference
from estargz.registry.client import Registries
from estargz.registry.repository import Repository

_PIECE = 1 << 16
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"


class Pauses(list[float]):
    """What sleeps instead: it notes for how long."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


class Pieces:
    """A BlobReader of bytes, or of so many bytes that nobody keeps."""

    name = "test"

    def __init__(self, data: bytes, repeated: int = 1) -> None:
        self._data, self._repeated, self._at = data, repeated, 0

    def read(self, size: int, /) -> bytes:
        at = self._at % len(self._data) if self._data else 0
        left = len(self._data) * self._repeated - self._at
        piece = self._data[at : at + min(size, left)]
        self._at += len(piece)
        return piece

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def descriptor_of(data: bytes) -> Descriptor:
    return Descriptor(LAYER, digest_of(data), len(data))


def repository_of(registries: Registries, host: str, name: str = "app:v1") -> Repository:
    return registries.repository(Reference.parse(f"docker://{host}/{name}"))


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


@dataclass
class Upload:
    """A session: what came so far."""

    repository: str
    state: int = 0  # part of its location, another one after each request
    size: int = 0
    hash: Any = field(default_factory=hashlib.sha256)
    data: bytearray = field(default_factory=bytearray)
    busy: threading.Lock = field(default_factory=threading.Lock)  # one request after the other

    def add(self, piece: bytes, keep: bool) -> None:
        self.size += len(piece)
        self.hash.update(piece)
        if keep:
            self.data += piece


class Exchange:
    """A request and the ways to answer it."""

    def __init__(self, handler: BaseHTTPRequestHandler) -> None:
        self.handler = handler
        self.method = handler.command
        self.path, _, self.raw_query = handler.path.partition("?")
        self.query = {name: values[0] for name, values in parse_qs(self.raw_query).items()}
        self.headers = {name.lower(): value for name, value in handler.headers.items()}
        self.names: dict[str, str] = {}  # of the parts of the path
        self.read = 0  # bytes of the body
        self._left = int(self.headers.get("content-length", 0))
        self._chunked = self.headers.get("transfer-encoding") == "chunked"

    @property
    def authorization(self) -> str | None:
        return self.headers.get("authorization")

    def body(self, most: float = float("inf")) -> Iterator[bytes]:
        """The body's pieces, as far as they come."""
        while self.read < most and (piece := self._piece(int(min(_PIECE, most - self.read)))):
            self.read += len(piece)
            yield piece

    def _piece(self, size: int) -> bytes:
        file = self.handler.rfile
        if self._chunked and not self._left:
            self._left = int(file.readline() or b"0", 16)
            if not self._left:
                file.readline()
                self._chunked = False
        piece = file.read1(min(size, self._left)) if self._left else b""
        self._left -= len(piece)
        if self._chunked and not self._left:
            file.readline()
        return piece

    @property
    def complete(self) -> bool:
        return not self._left and not self._chunked

    def send(self, status: int, headers: dict[str, object] | None = None, body: bytes = b"") -> None:
        given = {"Content-Length": len(body), **(headers or {})}
        self.handler.send_response(status)
        for name, value in given.items():
            self.handler.send_header(name, str(value))
        if not self.complete:
            self.handler.close_connection = True
        self.handler.end_headers()
        if self.method != "HEAD":
            with contextlib.suppress(OSError):
                self.handler.wfile.write(body)

    def refuse(self, status: int, code: str = "", message: str = "", **headers: object) -> None:
        text = json.dumps({"errors": [{"code": code, "message": message}]}).encode() if code else b""
        self.send(status, {name.replace("_", "-"): value for name, value in headers.items()}, text)

    def hang_up(self) -> None:
        """The connection is reset."""
        self.handler.close_connection = True
        with contextlib.suppress(OSError):
            self.handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.handler.connection.close()


Answer = Callable[[Exchange], object]


class FaultyRegistry:
    """A registry on a port of 127.0.0.1, which is its ``host``.

    keep:         whether blobs are kept, or their digests and sizes alone
    resumes:      whether what came of a cut request is kept, and told
    takes_whole:  whether a blob may come with the closing PUT
    takes_chunks: whether a blob may come by more than one PATCH
    heeds_ranges: whether a chunk must begin where the one before ended
    ranges:       whether ranges of blobs are known
    least_chunk:  bytes that every PATCH but the last must have
    login:        user and password that are needed; the password is an identity token, too
    bearer:       whether they are to be shown to a token server (its own /token) rather than here
    token_uses:   how often a token is good
    token_life:   for how many seconds it is said to be good
    elsewhere:    the server that blobs are to be fetched from
    tls:          with whose certificates it speaks TLS
    """

    def __init__(self, **options: Any) -> None:
        self.keep = self.resumes = self.takes_whole = self.takes_chunks = self.ranges = True
        self.heeds_ranges = True
        self.bearer = False
        self.least_chunk = 0
        self.login: tuple[str, str] | None = None
        self.token_uses = 1_000_000
        self.token_life = 300.0
        self.realm = ""
        self.elsewhere: str | None = None
        self.tls: ssl.SSLContext | None = None
        for name, value in options.items():
            setattr(self, name, value)
        self.blobs: dict[str, bytes] = {}
        self.sizes: dict[tuple[str, str], int] = {}  # by repository and digest
        self.manifests: dict[tuple[str, str], tuple[str, bytes]] = {}  # by repository and tag or digest
        self.uploads: dict[str, Upload] = {}
        self.tokens: dict[str, tuple[list[str], int]] = {}  # scopes, uses that are left
        self.seen: list[Exchange] = []
        self.faults: list[tuple[re.Pattern[str], Answer]] = []
        self.lock = threading.Lock()
        self._serve()

    def _serve(self) -> None:
        registry = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def handle_one(self) -> None:
                exchange = Exchange(self)
                with contextlib.suppress(OSError):
                    registry._answer(exchange)
                if not exchange.complete:
                    self.close_connection = True

            do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_CONNECT = handle_one

            def log_message(self, *_: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *_: object) -> None:
                pass  # a client that has hung up

        self._http = Quiet(("127.0.0.1", 0), Handler)
        if self.tls is not None:
            self._http.socket = self.tls.wrap_socket(self._http.socket, server_side=True, do_handshake_on_connect=False)
        self.host = f"127.0.0.1:{self._http.server_address[1]}"
        self.url = f"{'http' if self.tls is None else 'https'}://{self.host}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    # what tests say and ask

    def fault(self, pattern: str, *answers: Answer) -> None:
        """The next requests whose ``METHOD /path`` matches get these answers instead."""
        self.faults += [(re.compile(pattern), answer) for answer in answers]

    def put(self, repository: str, data: bytes) -> str:
        self.blobs[digest_of(data)] = data
        self.sizes[repository, digest_of(data)] = len(data)
        return digest_of(data)

    def requests(self, pattern: str = "") -> list[Exchange]:
        return [seen for seen in self.seen if re.match(pattern, f"{seen.method} {seen.path}")]

    # how it answers

    def _answer(self, exchange: Exchange) -> None:
        with self.lock:
            self.seen.append(exchange)
            line = f"{exchange.method} {exchange.path}"
            number = next((at for at, (pattern, _) in enumerate(self.faults) if pattern.match(line)), None)
            answer = self.usual if number is None else self.faults.pop(number)[1]
        answer(exchange)

    def usual(self, exchange: Exchange) -> None:
        """What it answers where no fault was asked for."""
        routes: dict[str, Answer] = {
            r"/v2/": self._root,
            r"/token": self._token,
            r"/storage/(?P<digest>[^/]+)": self._blob,
            r"/v2/(?P<repository>.+)/blobs/uploads/": self._open,
            r"/v2/(?P<repository>.+)/blobs/uploads/(?P<upload>[^/]+)": self._upload,
            r"/v2/(?P<repository>.+)/blobs/(?P<digest>[^/]+)": self._blob,
            r"/v2/(?P<repository>.+)/manifests/(?P<reference>[^/]+)": self._manifest,
        }
        for pattern, answer in routes.items():
            if match := re.fullmatch(pattern, exchange.path):
                exchange.names = match.groupdict()
                if exchange.path.startswith("/v2/") and not self._allowed(exchange):
                    return
                answer(exchange)
                return
        exchange.refuse(404, "NOT_FOUND")

    def _allowed(self, exchange: Exchange) -> bool:
        if self.login is None:
            return True
        given = exchange.authorization or ""
        if not self.bearer:
            good = given == "Basic " + base64.b64encode(":".join(self.login).encode()).decode()
            if not good:
                exchange.refuse(401, "UNAUTHORIZED", WWW_Authenticate='Basic realm="fake"')
            return good
        needed = self._needed(exchange)
        with self.lock:
            scopes, uses = self.tokens.get(given.removeprefix("Bearer "), ([], 0))
            good = uses > 0 and all(any(_covers(scope, need) for scope in scopes) for need in needed)
            if good:
                self.tokens[given.removeprefix("Bearer ")] = scopes, uses - 1
        if not good:
            challenge = f'Bearer realm="{self.realm or self.url + "/token"}",service="fake"'
            if needed:
                challenge += f',scope="{" ".join(needed)}"'
            exchange.refuse(401, "UNAUTHORIZED", WWW_Authenticate=challenge)
        return good

    def _needed(self, exchange: Exchange) -> list[str]:
        repository = exchange.names.get("repository")
        if not repository:
            return []
        reads = exchange.method in ("GET", "HEAD") and "/uploads/" not in exchange.path
        needed = [f"repository:{repository}:{'pull' if reads else 'pull,push'}"]
        if origin := exchange.query.get("from"):
            needed.append(f"repository:{origin}:pull")
        return needed

    def _token(self, exchange: Exchange) -> None:
        form = {name: values for name, values in parse_qs(b"".join(exchange.body()).decode()).items()}
        scopes = parse_qs(exchange.raw_query).get("scope", []) + " ".join(form.get("scope", [])).split()
        assert self.login is not None
        basic = "Basic " + base64.b64encode(":".join(self.login).encode()).decode()
        if exchange.authorization != basic and form.get("refresh_token") != [self.login[1]]:
            exchange.refuse(401, "UNAUTHORIZED", "who are you?")
            return
        with self.lock:
            token = f"token-{len(self.tokens)}"
            self.tokens[token] = scopes, self.token_uses
        exchange.send(200, {}, json.dumps({"token": token, "expires_in": self.token_life}).encode())

    def _root(self, exchange: Exchange) -> None:
        exchange.send(200, {}, b"{}")

    def _blob(self, exchange: Exchange) -> None:
        names = exchange.names
        digest, repository = names["digest"], names.get("repository")
        if repository and (repository, digest) not in self.sizes:
            exchange.refuse(404, "BLOB_UNKNOWN")
        elif repository and self.elsewhere and exchange.method == "GET":
            exchange.send(307, {"Location": f"{self.elsewhere}/storage/{digest}?signature=secret"})
        elif exchange.method == "HEAD":
            exchange.send(200, {"Content-Length": self.sizes[repository, digest], "Docker-Content-Digest": digest})
        else:
            self.give(exchange, self.blobs[digest])

    def give(self, exchange: Exchange, data: bytes, cut: int | None = None) -> None:
        """A blob, or the range of it that was asked for; the connection ends after ``cut`` bytes."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", exchange.headers.get("range", ""))
        headers: dict[str, object] = {}
        status, begin, end = 200, 0, len(data)
        if asked and self.ranges:
            begin, end = int(asked[1]), min(int(asked[2] or len(data)) + 1, len(data))
            if begin >= end:
                exchange.refuse(416, "RANGE_INVALID")
                return
            status, headers = 206, {"Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"}
        part = data[begin:end]
        if cut is None or cut >= len(part):
            exchange.send(status, headers, part)
            return
        exchange.send(status, {**headers, "Content-Length": len(part)}, part[:cut])
        exchange.handler.wfile.flush()
        exchange.handler.close_connection = True

    def _manifest(self, exchange: Exchange) -> None:
        repository, reference = exchange.names["repository"], exchange.names["reference"]
        if exchange.method == "PUT":
            data = b"".join(exchange.body())
            for name in (reference, digest_of(data)):
                self.manifests[repository, name] = exchange.headers["content-type"], data
            exchange.send(201, {"Docker-Content-Digest": digest_of(data)})
        elif (repository, reference) not in self.manifests:
            exchange.refuse(404, "MANIFEST_UNKNOWN")
        else:
            media_type, data = self.manifests[repository, reference]
            exchange.send(200, {"Content-Type": media_type, "Docker-Content-Digest": digest_of(data)}, data)

    def _open(self, exchange: Exchange) -> None:
        repository, query = exchange.names["repository"], exchange.query
        mounted = self.sizes.get((query.get("from", ""), query.get("mount", "")))
        if mounted is not None:
            self.sizes[repository, query["mount"]] = mounted
            exchange.send(201, {"Docker-Content-Digest": query["mount"]})
            return
        with self.lock:
            name = f"upload{len(self.uploads)}"
            upload = self.uploads[name] = Upload(repository)
        least = {"OCI-Chunk-Min-Length": self.least_chunk} if self.least_chunk else {}
        exchange.send(202, {"Location": self.place(name, upload), "Range": "0-0", **least})

    def place(self, name: str, upload: Upload) -> str:
        # As awkward as it may be: relative, with characters that are easily encoded once more.
        query = urlencode({"_state": f"a+/={upload.state}", "up": "1"})
        return f"/v2/{upload.repository}/blobs/uploads/{name}?{query}"

    def _upload(self, exchange: Exchange) -> None:
        names = exchange.names
        upload = self.uploads.get(names["upload"])
        if upload is None:
            exchange.refuse(404, "BLOB_UPLOAD_UNKNOWN")
            return
        with upload.busy:
            self._go_on(exchange, names, upload)

    def _go_on(self, exchange: Exchange, names: dict[str, str], upload: Upload) -> None:
        if names["upload"] not in self.uploads:
            exchange.refuse(404, "BLOB_UPLOAD_UNKNOWN")
        elif exchange.query.get("_state") != f"a+/={upload.state}":
            exchange.refuse(404, "BLOB_UPLOAD_INVALID", "stale")
        elif exchange.method == "DELETE":
            del self.uploads[names["upload"]]
            exchange.send(204)
        elif exchange.method == "GET":
            self._sizes(exchange, 204, names["upload"], upload)
        elif exchange.method == "PATCH":
            self._patch(exchange, names["upload"], upload)
        else:
            self._close(exchange, names["upload"], upload)

    def _sizes(self, exchange: Exchange, status: int, name: str, upload: Upload) -> None:
        exchange.send(status, {"Location": self.place(name, upload), "Range": f"0-{max(upload.size - 1, 0)}"})

    def _patch(self, exchange: Exchange, name: str, upload: Upload) -> None:
        stated = exchange.headers.get("content-range")
        fits = stated is None or stated.startswith(f"{upload.size}-") or not self.heeds_ranges
        if not fits or (stated is not None and not self.takes_chunks):
            exchange.refuse(416, "RANGE_INVALID")
        elif self._take(exchange, name, upload):
            upload.state += 1
            self._sizes(exchange, 202, name, upload)

    def _take(self, exchange: Exchange, name: str, upload: Upload, most: float = float("inf")) -> bool:
        """Whether all of the body came."""
        with contextlib.suppress(OSError, ValueError):
            for piece in exchange.body(most):
                upload.add(piece, self.keep)
        if not exchange.complete and not self.resumes:
            self.uploads.pop(name, None)
        return exchange.complete

    def part_of(self, size: int) -> Answer:
        """A fault: takes so many bytes of a chunk or blob, and hangs up."""

        def answer(exchange: Exchange) -> None:
            name = exchange.path.rpartition("/")[2]
            self._take(exchange, name, self.uploads[name], size)
            exchange.hang_up()

        return answer

    def _close(self, exchange: Exchange, name: str, upload: Upload) -> None:
        if exchange.headers.get("content-length", "0") != "0" and not self.takes_whole:
            exchange.refuse(413)
            return
        if not self._take(exchange, name, upload):
            return
        digest = f"sha256:{upload.hash.hexdigest()}"
        del self.uploads[name]
        if exchange.query["digest"] != digest:
            exchange.refuse(400, "DIGEST_INVALID", "provided digest did not match uploaded content")
            return
        self.sizes[upload.repository, digest] = upload.size
        if self.keep:
            self.blobs[digest] = bytes(upload.data)
        exchange.send(201, {"Docker-Content-Digest": digest})


def _covers(scope: str, need: str) -> bool:
    name, _, actions = scope.rpartition(":")
    other, _, more = need.rpartition(":")
    return name == other and set(more.split(",")) <= set(actions.split(","))


@contextmanager
def faulty_registry(**options: Any) -> Iterator[FaultyRegistry]:
    """Runs one."""
    registry = FaultyRegistry(**options)
    try:
        yield registry
    finally:
        registry.stop()


class CuttingProxy:
    """Passes connections on to a server, ``host`` taking its place, and cuts them: each of ``up`` and ``down`` is how many
    bytes one connection may carry to the server, or from it, before it is reset."""

    def __init__(self, upstream: str) -> None:
        host, _, port = upstream.rpartition(":")
        self._upstream = host, int(port)
        self.up: list[int] = []
        self.down: list[int] = []
        self.cut = 0
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.host = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, socket.create_connection(self._upstream) as server:
            back = threading.Thread(target=self._pass, args=(server, client, self.down), daemon=True)
            back.start()
            self._pass(client, server, self.up)
            back.join()  # neither is closed while the other is in it

    def _pass(self, source: socket.socket, target: socket.socket, limits: list[int]) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(_PIECE):
                passed += len(data)
                with self._lock:
                    cuts = bool(limits) and passed > limits[0]
                    if cuts:
                        limits.pop(0)
                        self.cut += 1
                if cuts:
                    for one in (source, target):
                        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    break
                target.sendall(data)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


@contextmanager
def cutting_proxy(upstream: str) -> Iterator[CuttingProxy]:
    """Runs one."""
    proxy = CuttingProxy(upstream)
    try:
        yield proxy
    finally:
        proxy.close()


def never(exchange: Exchange, milliseconds: int = 1500) -> None:
    """A fault: no answer, for longer than anybody waits."""
    gone = select.poll()
    gone.register(exchange.handler.connection, select.POLLRDHUP)
    gone.poll(milliseconds)  # what a client has left unsent may hide that it has gone
    exchange.hang_up()


def stuck(exchange: Exchange) -> None:
    """A fault: takes all, and gives no answer before the client goes."""
    for _ in exchange.body():
        pass
    never(exchange, 20_000)
