"""Blobs read by ranges over HTTP, from a server on a real socket that answers by a script of faults."""

from __future__ import annotations

import array
import base64
import contextlib
import email.utils
import errno
import gc
import hashlib
import io
import itertools
import mmap
import os
import random
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import urllib3
from conftest import missing
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.blobs import estargz as reference_blob
from reference.blobs import tar_of
from tars import in_thread, nothing_leaks

import estargz
from estargz.errors import BlobError, RangeError, UsageError
from estargz.http import Deadline
from estargz.reading.cache import CachedSource
from estargz.reading.http import HttpSource
from estargz.reading.source import SeekReader, Window, open_source

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("home")]

DATA = random.Random(7).randbytes(100_000)
TAIL = 4096
AT = len(DATA) - TAIL  # where the kept tail begins


# --- the server


class Exchange:
    """A request and the ways to answer it."""

    def __init__(self, handler: BaseHTTPRequestHandler, data: bytes) -> None:
        self.handler, self.data = handler, data
        self.path = handler.path
        self.headers = {name.lower(): value for name, value in handler.headers.items()}

    def asked(self) -> tuple[int, int]:
        first, _, last = self.headers["range"].removeprefix("bytes=").partition("-")
        size = len(self.data)
        if not first:
            return max(size - int(last), 0), size
        return int(first), min(int(last) + 1, size) if last else size

    def send(self, status: int, headers: Mapping[str, object] | None = None, body: bytes = b"") -> None:
        """An answer with just these headers, and a length unless they say something about it."""
        given = dict(headers or {})
        if not {"Content-Length", "Transfer-Encoding", "Connection"} & given.keys():
            given["Content-Length"] = len(body)
        self.handler.send_response(status)
        for name, value in given.items():
            self.handler.send_header(name, str(value))
            if (name, value) == ("Connection", "close"):
                self.handler.close_connection = True
        self.handler.end_headers()
        with contextlib.suppress(OSError):
            self.handler.wfile.write(body)

    def good(self, **headers: object) -> None:
        """What a server should say; headers are added or replaced, ``_`` standing for ``-``."""
        begin, end = self.asked()
        if begin >= end:
            self.send(416, {"Content-Range": f"bytes */{len(self.data)}"})
            return
        usual: dict[str, object] = {"Content-Range": f"bytes {begin}-{end - 1}/{len(self.data)}"}
        changed = {name.replace("_", "-"): value for name, value in headers.items()}
        self.send(206, usual | changed, self.data[begin:end])

    def hang_up(self, sent: bytes = b"") -> None:
        with contextlib.suppress(OSError):
            self.handler.wfile.write(sent)
            self.handler.connection.shutdown(socket.SHUT_RDWR)
        self.handler.close_connection = True


Answer = Callable[[Exchange], object]


class Server:
    """Answers each request by the next of ``script``, and by ``usual`` when that is empty; keeps what it was sent."""

    def __init__(self, data: bytes = DATA, usual: Answer = Exchange.good, tls: ssl.SSLContext | None = None) -> None:
        self.data, self.usual = data, usual
        self.script: list[Answer] = []
        self.seen: list[Exchange] = []
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                exchange = Exchange(self, server.data)
                with server._lock:
                    server.seen.append(exchange)
                    answer = server.script.pop(0) if server.script else server.usual
                answer(exchange)

            def log_message(self, *_: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *_: object) -> None:
                pass  # a client that has hung up

        self._http = Quiet(("127.0.0.1", 0), Handler)
        if tls is not None:
            self._http.socket = tls.wrap_socket(self._http.socket, server_side=True, do_handshake_on_connect=False)
        self.port = self._http.server_address[1]
        self.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{self.port}/blob"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def ranges(self) -> list[str]:
        return [exchange.headers["range"] for exchange in self.seen]


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.stop()


@pytest.fixture
def other() -> Iterator[Server]:
    made = Server()
    yield made
    made.stop()


class Pauses(list[float]):
    def __call__(self, seconds: float) -> None:
        self.append(seconds)


def opened(server: Server, url: str = "", **options: Any) -> HttpSource:
    """Its size and tail known, so that the next request is the next read's."""
    options = {"tail": TAIL, "sleep": Pauses(), "timeout": 10.0} | options
    source = HttpSource(url or server.url, **options)
    server.seen.clear()
    return source


def status(code: int, **headers: object) -> Answer:
    return lambda exchange: exchange.send(code, {name.replace("_", "-"): value for name, value in headers.items()})


def redirect(url: str, code: int = 307) -> Answer:
    return status(code, Location=url)


def refused(source: HttpSource, offset: int = 1000, size: int = 2000) -> RangeError:
    with pytest.raises(RangeError) as caught:
        source.read_at(offset, size)
    assert isinstance(caught.value, BlobError)
    assert isinstance(caught.value, OSError)
    return caught.value


# --- ranges


@pytest.fixture(scope="module")
def whole() -> Iterator[HttpSource]:
    made = Server()
    with HttpSource(made.url, tail=TAIL) as source:
        yield source
    made.stop()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, len(DATA) + 10), st.integers(0, 2 * TAIL)), max_size=6))
def test_ranges_are_the_bytes(whole: HttpSource, ranges: list[tuple[int, int]]) -> None:
    assert whole.read_ranges(ranges) == [DATA[offset : offset + size] for offset, size in ranges]


def test_whole_blob(whole: HttpSource) -> None:
    assert whole.read_at(0, whole.size + 1) == DATA


def test_first_request_brings_size_and_tail(server: Server) -> None:
    with HttpSource(server.url, tail=TAIL) as source:
        assert source.size == len(DATA)
        assert source.name == server.url
        assert source.read_at(len(DATA) - 51, 51) == DATA[-51:]
        assert source.read_at(AT, TAIL) == DATA[AT:]
        assert server.ranges() == [f"bytes=-{TAIL}"]
        assert source.read_at(AT - 10, 20) == DATA[AT - 10 : AT + 10]
        assert server.ranges()[1:] == [f"bytes={AT - 10}-{AT - 1}"]


def test_a_size_that_is_known_needs_no_request(server: Server) -> None:
    with HttpSource(server.url, tail=TAIL, size=len(DATA)) as source:
        assert server.seen == []
        assert source.read_at(len(DATA) - 51, 51) == DATA[-51:]
        assert source.read_at(len(DATA) - 100, 10) == DATA[-100:-90]
        assert server.ranges() == [f"bytes={AT}-{len(DATA) - 1}"]
    with HttpSource(server.url, size=len(DATA) - 1) as source:
        assert f"has {len(DATA)} bytes instead of {len(DATA) - 1}" in str(refused(source))


def test_what_is_sent(server: Server) -> None:
    with HttpSource(server.url, headers={"X-Own": "yes"}, tail=TAIL) as source:
        source.read_at(0, 1)
    for exchange in server.seen:
        assert exchange.headers["accept-encoding"] == "identity"
        assert exchange.headers["user-agent"] == f"estargz/{estargz.__version__}"
        assert exchange.headers["x-own"] == "yes"
        assert "authorization" not in exchange.headers
        assert "if-range" not in exchange.headers


def test_connections_are_kept(server: Server) -> None:
    with opened(server) as source:
        for offset in range(0, 20_000, 1000):
            source.read_at(offset, 1000)
        ports = {exchange.handler.client_address for exchange in server.seen}
        assert (len(server.seen), len(ports)) == (20, 1)


def test_a_connection_that_cannot_be_asked_is_replaced(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, and it is closed: else it would be open until the collector comes."""

    def fails(*_: object, **__: object) -> bool:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    pauses = Pauses()
    with opened(server, sleep=pauses) as source:
        source.read_at(0, 1000)
        with nothing_leaks():
            monkeypatch.setattr(urllib3.connection, "wait_for_read", fails)
            assert source.read_at(1000, 1000) == DATA[1000:2000]
        assert pauses == []
        assert len({exchange.handler.client_address for exchange in server.seen}) == 2


def test_a_connection_that_cannot_be_held_is_left_alone() -> None:
    """The descriptor of a pipe is none that a socket can be made of."""
    reading, writing = os.pipe()
    with open(reading, "rb") as pipe, open(writing, "wb"), nothing_leaks(), pytest.raises(OSError, match="non-socket"):
        Deadline(1.0).hold(cast("Any", pipe))


def test_range_that_cannot_be(whole: HttpSource) -> None:
    for offset, size in ((-1, 5), (5, -1)):
        with pytest.raises(UsageError, match="there are no"):
            whole.read_at(offset, size)


# --- servers that do not know how to be asked for the last bytes


def only_from_the_start(answer: Answer) -> Answer:
    return lambda exchange: answer(exchange) if exchange.headers["range"].startswith("bytes=-") else exchange.good()


def whole_instead(exchange: Exchange) -> None:
    exchange.send(200, {}, exchange.data)


@pytest.mark.parametrize(
    ("answer", "learning"),
    [
        (status(416, Content_Range=f"bytes */{len(DATA)}"), 1),
        (status(416), 2),
        (status(400), 2),
        (status(501), 2),
        (whole_instead, 1),
        (lambda exchange: exchange.good(Content_Range=f"bytes {AT}-{len(DATA) - 1}/*"), 2),
        (lambda exchange: exchange.send(200, {"Connection": "close"}, DATA), 2),
    ],
    ids=["416 with the size", "416", "400", "501", "200", "no total", "200 without a length"],
)
def test_size_without_suffix_ranges(server: Server, answer: Answer, learning: int) -> None:
    server.usual = only_from_the_start(answer)
    with HttpSource(server.url, tail=TAIL, retries=0) as source:
        assert source.size == len(DATA)
        assert server.ranges() == [f"bytes=-{TAIL}", "bytes=0-0"][:learning]
        assert source.read_at(0, source.size) == DATA


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda exchange: exchange.good(Content_Range="bytes 0-0/*"), "does not say how large the blob is"),
        (lambda exchange: exchange.send(200, {"Connection": "close"}, DATA), "the server ignores ranges"),
        (lambda exchange: exchange.good(Content_Range="bytes 1-1/9"), "answered with bytes 1-1"),
        (status(404), "404 Not Found"),
    ],
)
def test_size_that_cannot_be_learnt(server: Server, answer: Answer, message: str) -> None:
    server.script = [status(400), answer]
    with pytest.raises(RangeError, match=message):
        HttpSource(server.url, tail=TAIL)


def test_wrong_tail(server: Server) -> None:
    server.script = [lambda exchange: exchange.good(Content_Range=f"bytes 5-{TAIL + 4}/{len(DATA)}")]
    with pytest.raises(RangeError, match=f"answered with bytes 5-{TAIL + 4}, asked for the last {TAIL} bytes"):
        HttpSource(server.url, tail=TAIL)


@pytest.mark.parametrize("answer", [Exchange.good, whole_instead, only_from_the_start(status(400))])
@pytest.mark.parametrize("size", [0, 1, 100, TAIL])
def test_small_blobs(server: Server, answer: Answer, size: int) -> None:
    server.data, server.usual = DATA[:size], answer
    with HttpSource(server.url, tail=TAIL) as source:
        assert source.size == size
        assert source.read_at(0, size + 1) == DATA[:size]
        assert source.read_at(size, 1) == b""


# --- wrong answers


def endless(exchange: Exchange) -> None:
    """The whole of a very large blob."""
    exchange.handler.send_response(200)
    exchange.handler.send_header("Content-Length", str(1 << 40))
    exchange.handler.end_headers()
    with contextlib.suppress(OSError):
        while True:
            exchange.handler.wfile.write(bytes(1 << 16))


def chunked(body: bytes, end: bytes = b"0\r\n\r\n") -> Answer:
    def answer(exchange: Exchange) -> None:
        begin, last = exchange.asked()
        span = f"bytes {begin}-{last - 1}/{len(DATA)}"
        framed = b"%x\r\n%b\r\n" % (len(body), body) + end
        exchange.send(206, {"Content-Range": span, "Transfer-Encoding": "chunked"}, framed)

    return answer


def changed(**headers: object) -> Answer:
    return lambda exchange: exchange.good(**headers)


WRONG: dict[str, tuple[Answer, str, int | None]] = {
    "200 for a part": (endless, "the server ignores ranges and sends the whole blob", 200),
    "other begin": (changed(Content_Range=f"bytes 999-2998/{len(DATA)}"), "answered with bytes 999-2998", 206),
    "other end": (changed(Content_Range=f"bytes 1000-3000/{len(DATA)}"), "answered with bytes 1000-3000", 206),
    "other total": (changed(Content_Range="bytes 1000-2999/100001"), "has 100001 bytes instead of 100000", 206),
    "total below the end": (changed(Content_Range="bytes 1000-2999/2999"), "the Content-Range 'bytes 1000-2999/2999'", 206),
    "backwards": (changed(Content_Range="bytes 2999-1000/100000"), "the Content-Range 'bytes 2999-1000/100000'", 206),
    "huge number": (changed(Content_Range=f"bytes 1000-{'9' * 4000}/*"), "the Content-Range", 206),
    "other unit": (changed(Content_Range="items 1000-2999/100000"), "the Content-Range 'items", 206),
    "unsatisfied in a 206": (changed(Content_Range="bytes */100000"), "the Content-Range 'bytes", 206),
    "no Content-Range": (changed(Content_Range=""), "the Content-Range ''", 206),
    "multipart": (changed(Content_Type="multipart/byteranges; boundary=x"), "answered in several parts", 206),
    "gzip": (changed(Content_Encoding="gzip"), "Content-Encoding 'gzip'", 206),
    "length too large": (changed(Content_Length=2001), "announces a body of 2001 bytes", 206),
    "length too small": (changed(Content_Length=1999), "announces a body of 1999 bytes", 206),
    "body too long": (chunked(DATA[1000:3001]), "sends more bytes than it says", 206),
    "416": (status(416), "416 .*the blob is shorter than it is said to be", 416),
    "401": (status(401), "401 Unauthorized.*check the credentials", 401),
    "403": (status(403), "403 Forbidden.*whether the URL has expired", 403),
    "404": (status(404), "404 Not Found.*check the URL", 404),
    "410": (status(410), "410 Gone", 410),
    "204": (status(204), "204 No Content", 204),
    "304": (status(304), "304 Not Modified", 304),
    "unknown status": (status(599), "status 599", 599),
    "redirect to nowhere": (status(302), "302 Found without a Location", 302),
    "redirect to another scheme": (redirect("ftp://host/x"), "is neither http:// nor https://", 307),
    "redirect with credentials": (redirect("http://u:secret@host/x"), "a URL with credentials in it", 307),
    "redirect to nonsense": (redirect("http://[x"), "redirects to a URL that is malformed", 307),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_answers_are_errors_at_once(server: Server, fault: str) -> None:
    answer, message, code = WRONG[fault]
    pauses = Pauses()
    with opened(server, sleep=pauses) as source:
        server.script = [answer]
        error = refused(source)
        assert error.status == code
        assert error.url == server.url
        text = str(error)
        assert text.startswith(f"{server.url}: ")
        assert "asked for 2000 bytes at byte 1000; " in text
        with pytest.raises(RangeError, match=message):
            raise error
        assert (len(server.seen), pauses) == (1, [])
        assert "secret" not in text
        assert source.read_at(1000, 2000) == DATA[1000:3000]  # nothing is left on the connection


def test_a_200_is_taken_for_the_whole_blob(server: Server) -> None:
    server.usual = whole_instead
    with HttpSource(server.url, tail=len(DATA)) as source:
        assert source.read_at(0, len(DATA)) == DATA
    with HttpSource(server.url, tail=len(DATA), size=len(DATA)) as source:
        assert source.read_at(0, len(DATA)) == DATA
    server.usual = lambda exchange: exchange.send(200, {"Content-Encoding": "br"}, exchange.data)
    for size in (None, len(DATA)):
        with pytest.raises(RangeError, match="Content-Encoding 'br'"), HttpSource(server.url, size=size) as source:
            source.read_at(0, len(DATA))


def test_a_total_that_is_not_told_is_taken(server: Server) -> None:
    with opened(server) as source:
        server.usual = changed(Content_Range="bytes 1000-2999/*")
        assert source.read_at(1000, 2000) == DATA[1000:3000]


def test_bodies_without_a_length(server: Server) -> None:
    with opened(server) as source:
        server.script = [chunked(DATA[1000:3000]), changed(Connection="close")]
        for _ in range(2):
            assert source.read_at(1000, 2000) == DATA[1000:3000]


def test_an_announced_size_takes_no_memory(server: Server) -> None:
    """A server may claim a blob of any size; what it does not send is not allocated."""
    huge = 1 << 50
    answers: list[Answer] = [
        lambda exchange: exchange.send(206, {"Content-Range": f"bytes {huge - 9}-{huge - 1}/{huge}"}, bytes(9)),
        lambda exchange: exchange.send(
            206, {"Content-Range": f"bytes 0-{huge - 10}/{huge}", "Connection": "close"}, b"x"
        ),
    ]
    server.script = answers
    with HttpSource(server.url, tail=9, retries=0) as source:
        assert source.size == huge
        assert "too early" in str(refused(source, 0, huge))


# --- what is tried again


def cut_body(exchange: Exchange) -> None:
    exchange.handler.send_response(206)
    begin, end = exchange.asked()
    exchange.handler.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(DATA)}")
    exchange.handler.send_header("Content-Length", str(end - begin))
    exchange.handler.end_headers()
    exchange.hang_up(DATA[begin : end - 700])


TRANSIENT: dict[str, Answer] = {
    "cut body": cut_body,
    "hung up": Exchange.hang_up,
    "no HTTP": lambda exchange: exchange.hang_up(b"\0\0\0\0\r\n\r\n"),
    "cut chunks": chunked(DATA[1000:2000], end=b""),
    "short chunks": chunked(DATA[1000:2000]),
    **{str(code): status(code) for code in (408, 429, 500, 502, 503, 504)},
}


@pytest.mark.parametrize("fault", TRANSIENT)
def test_tried_again(server: Server, fault: str) -> None:
    pauses = Pauses()
    answer = TRANSIENT[fault]
    if fault == "cut chunks":
        answer = lambda exchange: (TRANSIENT[fault](exchange), exchange.hang_up())  # noqa: E731
    with opened(server, sleep=pauses, retries=2) as source:
        server.script = [answer, answer]
        assert source.read_at(1000, 2000) == DATA[1000:3000]
        assert (len(server.seen), len(pauses)) == (3, 2)
        server.script = [answer] * 3
        error = refused(source)
        assert "asked for 2000 bytes at byte 1000, after 3 attempts; " in str(error)
        assert error.status == (int(fault) if fault.isdigit() else 206 if "short" in fault else None)
        assert (len(server.seen), len(pauses)) == (6, 4)


def test_pauses_grow_and_differ(server: Server) -> None:
    pauses = Pauses()
    with opened(server, sleep=pauses, retries=9) as source:
        server.script = [status(503)] * 9
        source.read_at(0, 1)
    for nth, pause in enumerate(pauses):
        most = min(0.25 * 2**nth, 8)
        assert most / 2 <= pause <= most
    assert len(set(pauses)) == 9


def test_retry_after(server: Server) -> None:
    pauses = Pauses()
    soon = email.utils.formatdate(time.time() + 30, usegmt=True)
    with opened(server, sleep=pauses) as source:
        server.script = [status(429, Retry_After=17), status(503, Retry_After=soon), status(503, Retry_After="soon")]
        source.read_at(0, 1)
        assert pauses[0] == 17
        assert 20 < pauses[1] <= 30
        assert pauses[2] < 1.1
        pauses.clear()
        server.script = [status(429, Retry_After=3600)]
        error = refused(source)
        assert "429 Too Many Requests" in str(error)
        assert "try again in 3600 s" in str(error)
        assert pauses == []


def test_no_retry_beyond_the_deadline(server: Server) -> None:
    with opened(server, deadline=5.0) as source:
        server.script = [status(503, Retry_After=20)]
        assert "503" in str(refused(source))
        assert len(server.seen) == 1


def test_silent_server(server: Server) -> None:
    release = threading.Event()
    server.usual = lambda exchange: release.wait(20)
    try:
        begun = time.monotonic()
        with pytest.raises(RangeError, match="no answer in time, asked for the last"):
            HttpSource(server.url, timeout=0.2, retries=0)
        assert time.monotonic() - begun < 10
    finally:
        release.set()


def test_body_that_drips(server: Server) -> None:
    def drip(exchange: Exchange) -> None:
        begin, end = exchange.asked()
        span = f"bytes {begin}-{end - 1}/{len(DATA)}"
        exchange.send(206, {"Content-Range": span, "Content-Length": end - begin})
        with contextlib.suppress(OSError):
            for at in range(begin, end):
                exchange.handler.wfile.write(DATA[at : at + 1])
                time.sleep(0.02)

    with opened(server, deadline=0.4) as source:
        server.usual = drip
        begun = time.monotonic()
        assert "not done within 0.4 s" in str(refused(source))  # the whole body takes 40 s
        assert time.monotonic() - begun < 10
        assert len(server.seen) == 1


def dripping(*pieces: bytes, pause: float = 0.05) -> Answer:
    """These bytes one by one, the last piece for ever."""

    def answer(exchange: Exchange) -> None:
        exchange.handler.close_connection = True
        end = time.monotonic() + 20
        with contextlib.suppress(OSError):
            for piece in itertools.chain(pieces, itertools.repeat(pieces[-1])):
                for at in range(len(piece)) if pause else [slice(None)]:
                    exchange.handler.wfile.write(piece[at : at + 1] if isinstance(at, int) else piece)
                    time.sleep(pause)
                if time.monotonic() > end:
                    return

    return answer


PARTIAL = b"HTTP/1.1 206 Partial Content\r\n"
CHUNKED = PARTIAL + b"Content-Range: bytes 1000-2999/100000\r\nTransfer-Encoding: chunked\r\n\r\n"
DRIPS = {
    "status line": dripping(b"HTTP/1.1 206 ", b"P"),
    "headers": dripping(PARTIAL + b"X: ", b"x"),
    "interim answers, slow": dripping(b"HTTP/1.1 100 Continue\r\n\r\n"),
    "interim answers, fast": dripping(b"HTTP/1.1 100 Continue\r\n\r\n" * 100, pause=0),
    "size of a chunk": lambda exchange: (exchange.handler.wfile.write(CHUNKED), dripping(b"0")(exchange)),
    "extension of a chunk": lambda exchange: (exchange.handler.wfile.write(CHUNKED), dripping(b"7d0;", b"x")(exchange)),
}


@pytest.mark.parametrize("drip", DRIPS)
@pytest.mark.parametrize("given", [False, True], ids=["own pool", "caller's pool"])
def test_answers_that_drip(server: Server, drip: str, given: bool) -> None:
    pool = urllib3.PoolManager() if given else None
    with nothing_leaks(), opened(server, deadline=0.5, timeout=5.0, pool=pool) as source:
        server.usual = DRIPS[drip]
        begun = time.monotonic()
        assert "not done within 0.5 s" in str(refused(source))
        assert 0.4 < time.monotonic() - begun < 5
        assert len(server.seen) == 1
        if pool is not None:
            pool.clear()


def test_a_proxy_that_drips(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:

        def drip() -> None:
            connection, _ = proxy.accept()
            with connection, contextlib.suppress(OSError):
                connection.recv(1000)
                for _ in range(400):
                    connection.send(b"H")
                    time.sleep(0.05)

        thread = in_thread(drip)
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        begun = time.monotonic()
        with pytest.raises(RangeError, match="not done within 0.5 s"):
            HttpSource("https://host.invalid/blob", deadline=0.5)
        assert time.monotonic() - begun < 5
        thread.join(10)


def test_the_caller_may_use_a_pool_otherwise(server: Server) -> None:
    """What goes through it without a source has no deadline."""
    pool = urllib3.PoolManager()
    with HttpSource(server.url, pool=pool, tail=TAIL, deadline=0.2) as source:
        time.sleep(0.3)
        answer = pool.request("GET", server.url, headers={"range": "bytes=0-9"}, retries=False)
        assert (answer.status, answer.data) == (206, DATA[:10])
        assert source.read_at(5, 5) == DATA[5:10]
    pool.clear()


def test_nobody_listens() -> None:
    with socket.socket() as bound:  # a port that is taken, but not listened on
        bound.bind(("127.0.0.1", 0))
        pauses = Pauses()
        with pytest.raises(RangeError, match="cannot be connected to: Connection refused.*after 3 attempts"):
            HttpSource(f"http://127.0.0.1:{bound.getsockname()[1]}/", retries=2, sleep=pauses)
        assert len(pauses) == 2


def test_host_without_an_address() -> None:
    with pytest.raises(RangeError, match="its host name cannot be resolved"):
        HttpSource("http://no-such-host.invalid/x", retries=0)


# --- redirects


def test_a_redirect_is_followed_once(server: Server, other: Server) -> None:
    server.usual = redirect(f"{other.url}?sig=SECRET")
    with HttpSource(server.url, tail=TAIL) as source:
        for offset in (0, 5000, 10_000):
            assert source.read_at(offset, 10) == DATA[offset : offset + 10]
        assert len(server.seen) == 1
        assert other.ranges() == [f"bytes=-{TAIL}", "bytes=0-9", "bytes=5000-5009", "bytes=10000-10009"]
        assert {exchange.path for exchange in other.seen} == {"/blob?sig=SECRET"}


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("relative", ["/elsewhere", "elsewhere", "//127.0.0.1:{}/elsewhere"])
def test_kinds_of_redirect(server: Server, code: int, relative: str) -> None:
    server.script = [redirect(relative.format(server.port), code)]
    with HttpSource(server.url, tail=TAIL) as source:
        assert source.size == len(DATA)
        assert [exchange.path for exchange in server.seen] == ["/blob", "/elsewhere"]


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410])
def test_an_expired_url_is_resolved_again(server: Server, other: Server, code: int) -> None:
    server.script = [redirect(f"{other.url}?sig=1"), redirect(f"{other.url}?sig=2")]
    with HttpSource(server.url, tail=TAIL, retries=0) as source:
        other.script = [status(code)]
        assert source.read_at(0, 10) == DATA[:10]
        assert [exchange.path for exchange in other.seen] == ["/blob?sig=1", "/blob?sig=1", "/blob?sig=2"]
        source.read_at(20, 10)
        assert len(server.seen) == 2


def test_a_fresh_url_that_fails_is_an_error(server: Server, other: Server) -> None:
    server.usual = redirect(f"{other.url}?sig=SECRET")
    with HttpSource(server.url, tail=TAIL) as source:
        other.usual = status(403)
        error = refused(source)
        assert (len(server.seen), len(other.seen)) == (2, 3)
        assert f"{server.url}: redirected to {other.url}?REDACTED: 403 Forbidden" in str(error)
        assert error.url == f"{other.url}?REDACTED"


def test_a_host_that_is_gone_is_resolved_again(server: Server) -> None:
    first, second = Server(), Server()
    pauses = Pauses()
    try:
        server.script = [redirect(first.url), redirect(second.url)]
        with HttpSource(server.url, tail=TAIL, sleep=pauses) as source:
            first.script = [lambda exchange: exchange.send(503)]
            first.usual = Exchange.hang_up
            assert source.read_at(0, 10) == DATA[:10]
            assert (len(first.seen), len(second.seen), len(pauses)) == (2, 1, 1)
    finally:
        first.stop()
        second.stop()


def test_redirects_in_circles(server: Server) -> None:
    server.usual = redirect(server.url)
    with pytest.raises(RangeError, match="more than 5 redirects") as caught:
        HttpSource(server.url)
    assert len(server.seen) == 6
    assert caught.value.status == 307


# --- credentials


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


def sent_credentials(server: Server) -> list[str | None]:
    return [exchange.headers.get("authorization") for exchange in server.seen]


def test_userinfo_becomes_basic_credentials(server: Server) -> None:
    with HttpSource(server.url.replace("//", "//us%C3%A9r:p%40ss:w%2Frd@"), tail=TAIL) as source:
        source.read_at(0, 10)
        assert sent_credentials(server) == [basic("usér:p@ss:w/rd")] * 2
        assert source.name == server.url
        assert {exchange.path for exchange in server.seen} == {"/blob"}


def test_credentials_stay_with_their_origin(server: Server, other: Server) -> None:
    server.usual = redirect(other.url)
    with HttpSource(server.url, headers={"Authorization": "Bearer SECRET", "X-Key": "SECRET"}, tail=TAIL) as source:
        source.read_at(0, 10)
    assert sent_credentials(server) == ["Bearer SECRET"]
    assert len(other.seen) == 2
    for exchange in other.seen:
        assert "SECRET" not in str(exchange.headers)


def test_credentials_on_the_same_origin(server: Server) -> None:
    server.script = [redirect("/moved")]
    with HttpSource(server.url, headers={"Authorization": "Bearer x"}, tail=TAIL) as source:
        source.read_at(0, 10)
        assert sent_credentials(server) == ["Bearer x"] * 3


def test_credentials_do_not_come_back(server: Server, other: Server) -> None:
    """A foreign host must not choose what is asked for with them."""
    server.script = [redirect(other.url)]
    other.script = [redirect(f"{server.url}/chosen")]
    with HttpSource(server.url, headers={"Authorization": "Bearer SECRET"}, tail=TAIL) as source:
        source.read_at(0, 10)
        assert [exchange.path for exchange in server.seen] == ["/blob", "/blob/chosen", "/blob/chosen"]
        assert sent_credentials(server) == ["Bearer SECRET", None, None]


class Tokens:
    """A client of a token server: another token for every challenge."""

    def __init__(self) -> None:
        self.challenges: list[str] = []

    def __call__(self, challenge: str) -> Mapping[str, str]:
        self.challenges.append(challenge)
        return {"Authorization": f"Bearer {len(self.challenges)}"}

    def wanted(self, token: str) -> Answer:
        challenge = 'Bearer realm="http://auth/",scope="pull"'

        def answer(exchange: Exchange) -> None:
            if exchange.headers.get("authorization") == f"Bearer {token}":
                exchange.good()
            else:
                exchange.send(401, {"WWW-Authenticate": challenge}, b'{"errors":[]}')

        return answer


def test_authorize(server: Server) -> None:
    tokens = Tokens()
    server.usual = tokens.wanted("1")
    with HttpSource(server.url, authorize=tokens, tail=TAIL, headers={"authorization": "Bearer old"}) as source:
        source.read_at(0, 10)
        assert sent_credentials(server) == ["Bearer old", "Bearer 1", "Bearer 1"]
        server.usual = tokens.wanted("2")  # the first has expired
        source.read_at(0, 10)
        assert tokens.challenges == ['Bearer realm="http://auth/",scope="pull"'] * 2
        server.usual = tokens.wanted("never")
        server.seen.clear()
        assert refused(source).status == 401
        assert sent_credentials(server) == ["Bearer 2", "Bearer 3"]
        assert len({exchange.handler.client_address for exchange in server.seen}) == 1  # a 401 costs no connection


def test_authorize_is_for_the_origin_alone(server: Server, other: Server) -> None:
    tokens = Tokens()
    server.script = [status(401, WWW_Authenticate="Bearer"), redirect(other.url), redirect(other.url)]
    with HttpSource(server.url, authorize=tokens, tail=TAIL) as source:
        other.script = [status(401, WWW_Authenticate="Basic"), status(401, WWW_Authenticate="Basic")]
        assert refused(source).status == 401
    assert tokens.challenges == ["Bearer"]
    assert sent_credentials(server) == [None, "Bearer 1", "Bearer 1"]
    assert sent_credentials(other) == [None, None, None]


def test_authorize_needs_a_challenge(server: Server) -> None:
    tokens = Tokens()
    server.usual = status(401)
    with pytest.raises(RangeError, match="401 Unauthorized"):
        HttpSource(server.url, authorize=tokens)
    assert tokens.challenges == []


def test_authorize_that_fails(server: Server) -> None:
    class NoToken(Exception):
        pass

    def fail(challenge: str) -> Mapping[str, str]:
        raise NoToken(challenge)

    server.usual = status(401, WWW_Authenticate="Bearer")
    with pytest.raises(NoToken), nothing_leaks():
        HttpSource(server.url, authorize=fail)


def test_many_threads_ask_for_one_token(server: Server) -> None:
    tokens = Tokens()
    with opened(server, authorize=tokens, parallel=8) as source:
        together = threading.Barrier(8)
        wanted = tokens.wanted("1")

        def expired(exchange: Exchange) -> None:
            together.wait(10)
            exchange.send(401, {"WWW-Authenticate": "Bearer"})

        server.script, server.usual = [expired] * 8, wanted
        assert source.read_ranges([(offset, 10) for offset in range(0, 800, 100)]) == [
            DATA[offset : offset + 10] for offset in range(0, 800, 100)
        ]
        assert len(tokens.challenges) == 1


def test_no_secret_is_shown(server: Server, other: Server) -> None:
    """Neither in the name nor in any message, nor in what a traceback prints below it."""
    url = server.url.replace("//", "//user:SECRET@") + "?token=SECRET#SECRET"
    moved = f"{other.url}?X-Signature=SECRET"
    server.script = [redirect(moved)]
    with HttpSource(url, tail=TAIL, retries=1, sleep=Pauses()) as source:
        assert source.name == f"{server.url}?REDACTED"
        assert "SECRET" not in repr(source) + repr(vars(CachedSource(source))["name"])
        messages = []
        for fault in (*TRANSIENT.values(), *(answer for answer, _, _ in WRONG.values())):
            if fault is TRANSIENT["cut chunks"]:
                continue  # hangs by itself
            server.usual = redirect(moved)
            other.script = [fault] * 3
            try:
                source.read_at(1000, 2000)
            except RangeError as error:
                messages.append("".join(traceback.format_exception(error)) + error.url)
        server.usual = status(404)
        other.usual = status(404)
        messages.append("".join(traceback.format_exception(refused(source))))
    other.stop()
    server.usual = redirect(moved)
    with pytest.raises(RangeError) as caught:
        HttpSource(url, retries=0)
    messages.append("".join(traceback.format_exception(caught.value)))
    assert len(messages) > 30
    assert not [message for message in messages if "SECRET" in message]


# --- arguments


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("ftp://host/SECRET", {}, "is neither http:// nor https://"),
        ("http://u:SECRET@/x", {}, "a blob's URL"),
        ("http://u:SECRET@host:99999/x", {}, "a blob's URL"),
        ("http://u:SECRET@ho st/x", {}, "holds spaces or control characters"),
        ("http://host/SECRET\r\nX: y", {}, "holds spaces or control characters"),
        ("http://u:SECRET@host/x", {"headers": {"Authorization": "SECRET"}}, "credentials are in its URL and in the h"),
        ("http://host/x", {"headers": {"Range": "bytes=0-"}}, "the header Range is not to be given"),
        ("http://host/x", {"headers": {"a b": "SECRET"}}, "'a b' is no name of a header"),
        ("http://host/x", {"headers": {"A": "SECRET\r\nX: y"}}, "the value of the header A holds"),
        ("http://host/x", {"headers": {"A": "SECRET\u20ac"}}, "the value of the header A holds"),
        ("http://host/x", {"size": -1}, "size must be 0 or more, not -1"),
        ("http://host/x", {"tail": 0}, "tail must be 1 or more"),
        ("http://host/x", {"retries": -1}, "retries must be"),
        ("http://host/x", {"parallel": 0}, "parallel must be"),
        ("http://host/x", {"timeout": 0}, "timeout and deadline"),
        ("http://host/x", {"ca_file": "/no/such/file"}, "ca_file /no/such/file: No such file"),
        ("http://host/x", {"ca_file": "x", "pool": urllib3.PoolManager()}, "ca_file belongs to the connections"),
    ],
)
def test_arguments_that_cannot_be(url: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        HttpSource(url, **options)
    assert "SECRET" not in "".join(traceback.format_exception(caught.value))


# --- a blob that changes


def test_another_etag_is_another_blob(server: Server) -> None:
    with opened(server) as source:
        server.script = [changed(ETag='"one"'), changed(ETag='"one"'), changed(), changed(ETag='"two"')]
        for _ in range(3):
            source.read_at(0, 10)
        assert """its ETag was "one" and is "two", asked for""" in str(refused(source))


def test_weak_etags_and_other_hosts_say_nothing(server: Server, other: Server) -> None:
    with opened(server) as source:
        server.script = [
            changed(ETag='"one"'),
            changed(ETag='W/"two"', Last_Modified="Thu, 01 Jan 1970 00:00:00 GMT"),
            redirect(other.url),
        ]
        other.usual = changed(ETag='"three"')
        for _ in range(3):
            source.read_at(0, 10)


# --- proxies


def test_proxy_from_the_environment(server: Server, other: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = other  # gets whole URLs, and serves the same blob
    monkeypatch.setenv("HTTP_PROXY", f"http://us%20er:SECRET@127.0.0.1:{proxy.port}")
    with HttpSource("http://user:pw@blobs.invalid/blob?x=y", tail=TAIL) as source:
        assert source.read_at(0, 10) == DATA[:10]
    assert {exchange.path for exchange in proxy.seen} == {"http://blobs.invalid/blob?x=y"}
    assert proxy.seen[0].headers["proxy-authorization"] == basic("us er:SECRET")
    assert sent_credentials(proxy) == [basic("user:pw")] * 2
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with HttpSource(server.url) as source:
        assert source.read_at(0, 10) == DATA[:10]
    assert len(proxy.seen) == 2
    monkeypatch.setenv("HTTP_PROXY", "socks5://u:SECRET@host")
    with pytest.raises(UsageError, match="the proxy in the environment for http is neither") as caught:
        HttpSource("http://blobs.invalid/")
    assert "SECRET" not in str(caught.value)


def test_proxy_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        monkeypatch.setenv("https_proxy", f"127.0.0.1:{bound.getsockname()[1]}")
        with pytest.raises(RangeError, match="the proxy cannot be reached or refuses"):
            HttpSource("https://blobs.invalid/", retries=0)


# --- threads, closing


def test_no_more_requests_at_once_than_allowed(server: Server) -> None:
    running = most = 0
    lock = threading.Lock()

    def count(exchange: Exchange) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1
        exchange.good()

    with opened(server, parallel=3) as source:
        server.usual = count
        ranges = [(offset, 100) for offset in range(0, 6000, 200)]
        done: list[list[bytes]] = []
        threads = [in_thread(lambda: done.append(source.read_ranges(ranges))) for _ in range(2)]
        threads += [in_thread(lambda: done.append([source.read_at(*span) for span in ranges])) for _ in range(4)]
        for thread in threads:
            thread.join(30)
    assert done == [[DATA[offset : offset + size] for offset, size in ranges]] * 6
    assert most == 3


def test_an_error_among_ranges(server: Server) -> None:
    def bad(exchange: Exchange) -> None:
        if exchange.asked()[0] == 500:
            exchange.send(404)
        else:
            exchange.good()

    with opened(server) as source:
        server.usual = bad
        with pytest.raises(RangeError, match="404 Not Found, asked for 10 bytes at byte 500"):
            source.read_ranges([(offset, 10) for offset in range(0, 1000, 100)])
        assert source.read_at(0, 10) == DATA[:10]


def test_closing(server: Server) -> None:
    with nothing_leaks():
        source = HttpSource(server.url, tail=TAIL)
        source.read_ranges([(offset, 10) for offset in range(0, 1000, 100)])
        source.close()
        source.close()
        for read in (
            lambda: source.read_at(0, 1),
            lambda: source.read_at(AT, 1),
            lambda: source.read_ranges([(0, 1)] * 2),
        ):
            with pytest.raises(UsageError, match="is closed"):
                read()


def test_closing_ends_a_pause(server: Server) -> None:
    source = HttpSource(server.url, tail=TAIL)
    server.usual = status(503, Retry_After=50)
    caught: list[BaseException] = []

    def read() -> None:
        try:
            source.read_at(0, 10)
        except UsageError as error:
            caught.append(error)

    server.seen.clear()
    thread = in_thread(read)
    while not server.seen:
        time.sleep(0.001)
    source.close()
    thread.join(20)
    assert "is closed" in str(caught[0])


def test_closing_just_before_a_pause(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    source = HttpSource(server.url, tail=TAIL)
    server.usual = status(503)
    monkeypatch.setattr("estargz.reading.http.pause", lambda _: source.close() or 0.1)
    with pytest.raises(UsageError, match="is closed"):
        source.read_at(0, 10)


def test_a_failed_open_leaves_nothing(server: Server) -> None:
    server.usual = status(404)
    with nothing_leaks(), pytest.raises(RangeError):
        HttpSource(server.url)


def test_a_pool_of_the_callers(server: Server) -> None:
    pool = urllib3.PoolManager(maxsize=2, block=True)
    for _ in range(3):
        with HttpSource(server.url, pool=pool, tail=TAIL) as source:
            server.script = [status(503), cut_body]
            source.read_ranges([(offset, 10) for offset in range(0, 1000, 100)])
    assert len(pool.pools) == 1
    pool.clear()


def test_forget_asks_for_the_tail_again(server: Server) -> None:
    with opened(server) as source:
        source.forget(0, AT)
        source.read_at(AT, 10)
        assert server.seen == []
        source.forget(AT, 1)
        assert source.read_at(AT, 10) == DATA[AT : AT + 10]
        assert len(server.seen) == 1


# --- TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        missing("openssl is not installed")
    place = tmp_path_factory.mktemp("tls")
    names = ["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names]
    subprocess.run([*command, "-keyout", place / "key", "-out", place / "pem"], check=True, capture_output=True)
    return place / "pem", place / "key"


@pytest.fixture
def secure(certificate: tuple[Path, Path]) -> Iterator[Server]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    made = Server(tls=context)
    yield made
    made.stop()


def test_tls(secure: Server, certificate: tuple[Path, Path]) -> None:
    with HttpSource(secure.url, ca_file=str(certificate[0]), tail=TAIL) as source:
        assert source.read_at(0, len(DATA)) == DATA


def test_a_certificate_that_is_not_trusted(secure: Server) -> None:
    pauses = Pauses()
    with pytest.raises(RangeError, match="TLS failed: self.signed certificate.*ca_file"):
        HttpSource(secure.url, sleep=pauses)
    assert (pauses, secure.seen) == ([], [])


def test_never_from_https_to_http(secure: Server, server: Server, certificate: tuple[Path, Path]) -> None:
    secure.usual = redirect(server.url)
    with pytest.raises(RangeError, match="redirects from https to http"):
        HttpSource(secure.url, ca_file=str(certificate[0]))
    assert server.seen == []


def test_from_http_to_https(secure: Server, server: Server, certificate: tuple[Path, Path]) -> None:
    server.usual = redirect(secure.url)
    with HttpSource(server.url.replace("//", "//u:p@"), ca_file=str(certificate[0])) as source:
        assert source.size == len(DATA)
    assert sent_credentials(secure) == [None]  # another origin, though the same host


# --- what can be opened

FILES = {"etc/os-release": b"ID=test\n", "big": random.Random(3).randbytes(300_000), "empty": b""}
BLOB = reference_blob(tar_of(*FILES.items()), chunk_size=50_000)


def test_open_a_url(server: Server) -> None:
    server.data = BLOB
    with nothing_leaks():
        with estargz.open(server.url) as blob:
            assert {path: blob.read(path) for path in FILES} == FILES
            assert blob.name == server.url
        with estargz.open(server.url.replace("http:", "HTTP:")) as blob:
            assert "big" in blob
    with nothing_leaks(), pytest.raises(BlobError, match="has no eStargz footer"):
        server.data = DATA
        estargz.open(server.url)


def test_a_source_of_a_url(server: Server) -> None:
    source = open_source(server.url)
    assert isinstance(source.ranges, CachedSource)
    assert source.read_ranges([(5, 10), (0, 3)]) == [DATA[5:15], DATA[:3]]
    seen = len(server.seen)
    source.prefetch([(0, 50_000)])
    source.read_at(0, 50_000)
    source.forget(0, 10)
    assert source.exactly(0, 10) == DATA[:10]
    assert len(server.seen) >= seen
    source.close()


def test_local_blobs_do_not_import_urllib3(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(BLOB)
    code = "import sys, estargz; estargz.open(sys.argv[1]).close(); print('urllib3' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "blob"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_path_that_looks_like_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("http:").mkdir()
    Path("http://x").write_bytes(BLOB)
    with estargz.open(Path("http://x")) as blob:
        assert blob.read("big") == FILES["big"]


class NoDescriptor(io.RawIOBase):
    """A file that lives in Python alone, as fsspec's do."""

    def __init__(self, data: bytes) -> None:
        self._bytes = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._bytes.seek(offset, whence)

    def tell(self) -> int:
        return self._bytes.tell()

    def readinto(self, buffer: Any) -> int:
        return self._bytes.readinto(memoryview(buffer)[:700])


class Plain:
    """The least that a file can have."""

    def __init__(self, data: bytes) -> None:
        file = io.BytesIO(data)
        self.read, self.seek = file.read, file.seek


def stored() -> Any:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as written:
        written.writestr("blob", BLOB)
    return zipfile.ZipFile(archive).open("blob")


@pytest.mark.parametrize(
    "made",
    [lambda: NoDescriptor(BLOB), lambda: io.BufferedReader(NoDescriptor(BLOB)), lambda: Plain(BLOB), stored],
    ids=["raw", "buffered", "plain", "in a zip"],
)
def test_files_without_a_descriptor(made: Callable[[], Any]) -> None:
    file = made()
    with estargz.open(file) as blob:
        assert {path: blob.read(path) for path in FILES} == FILES
    file.read(1)  # still open


def test_such_files_are_read_by_one_thread_at_a_time() -> None:
    reader = SeekReader(Plain(DATA), "x")  # type: ignore[arg-type]
    wrong: list[int] = []

    def read(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(2000):
            offset = rng.randrange(len(DATA))
            if reader.read_at(offset, 50) != DATA[offset : offset + 50]:
                wrong.append(offset)

    threads = [in_thread(lambda seed=seed: read(seed)) for seed in range(8)]  # type: ignore[misc]
    for thread in threads:
        thread.join(30)
    assert wrong == []


class NoSize:
    def read_at(self, offset: int, size: int) -> bytes:
        return b""


class OneWay(Plain):
    def seekable(self) -> bool:
        return False


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        (NoSize(), TypeError, "NoSize has read_at, but no size"),
        (OneWay(BLOB), BlobError, "cannot seek; a blob is read from its end"),
        (io.StringIO("text"), TypeError, "reads str, not bytes; open it in binary mode"),
        (object(), TypeError, "a blob is a path, a URL, a file that has a descriptor or can seek"),
        ("http://", UsageError, "a blob's URL"),
        (
            "ftp://host/x",
            UsageError,
            "ftp://host/x: there is no such file, and of URLs only http:// and https:// are read",
        ),
        ("a\0b", UsageError, "is no path: it has a NUL byte"),
        ("\ud800", UsageError, "is no path"),
        ("/tmp", BlobError, "/tmp: is no regular file but a directory; give the path of a blob"),
        (memoryview(bytes(10))[::2], TypeError, "of this memoryview do not lie in one piece"),
    ],
)
def test_what_cannot_be_opened(source: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        estargz.open(source)


def test_what_is_not_open_for_reading(tmp_path: Path) -> None:
    class WriteOnly(NoDescriptor):
        def readable(self) -> bool:
            return False

    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(BlobError, match="fifo: is no regular file"):  # not waited for
        estargz.open(tmp_path / "fifo")
    with open(tmp_path / "x", "wb") as file, pytest.raises(UsageError, match="x: is open for writing only; open it"):
        estargz.open(file)
    with pytest.raises(UsageError, match="blob: is open for writing only"):
        estargz.open(WriteOnly(BLOB))


def test_a_scheme_may_be_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ftp:").mkdir()
    Path("ftp://x").write_bytes(BLOB)
    with estargz.open("ftp://x") as blob:
        assert blob.read("big") == FILES["big"]


def test_anything_with_the_buffer_protocol(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(BLOB)
    with open(tmp_path / "x", "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        for memory in (mapped, array.array("B", BLOB), np.frombuffer(BLOB, np.uint8)):
            with estargz.open(memory) as blob:  # type: ignore[arg-type]
                assert blob.read("big") == FILES["big"]
            del blob
    assert open_source(array.array("I")).size == 0  # type: ignore[arg-type]


class Answers:
    """A RangeReader that gives whatever it is told to."""

    def __init__(self, size: Any, answer: Any) -> None:
        self.size, self.answer = size, answer

    def read_at(self, offset: int, size: int) -> bytes:
        return self.answer(offset, size)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("size", "kind"), [(None, TypeError), ("7", TypeError), (1.0, TypeError), (-1, BlobError), (1 << 63, BlobError)]
)
def test_a_readers_size(size: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="blob: its reader's size is"):
        estargz.open(Answers(size, lambda offset, size: b""))


@pytest.mark.parametrize("answer", [None, "text", 7, [1]])
def test_a_reader_that_gives_no_bytes(answer: object) -> None:
    with pytest.raises(BlobError, match="came for a range of .* bytes; its reader is faulty"):
        estargz.open(Answers(len(BLOB), lambda offset, size: answer))
    lists = Recording()
    lists.read_ranges = lambda ranges: answer  # type: ignore[method-assign,assignment,return-value]
    with pytest.raises(BlobError, match="its reader is faulty"):
        open_source(lists).read_ranges([(0, 1), (1, 2)])


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_reader_may_give_any_bytes(kind: Callable[[bytes], Any]) -> None:
    with estargz.open(Answers(len(BLOB), lambda offset, size: kind(BLOB[offset : offset + size]))) as blob:
        assert {path: blob.read(path) for path in FILES} == FILES


def test_nothing_is_read_after_closing(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(BLOB)
    for made in (lambda: tmp_path / "x", lambda: BLOB, lambda: Plain(BLOB), Recording):
        source = open_source(made())  # type: ignore[arg-type,no-untyped-call]
        window = Window(source, 0, source.size)
        source.close()
        source.close()
        reads = [
            partial(source.read_at, 0, 1),
            partial(source.exactly, 0, 1),
            partial(source.read_ranges, [(0, 1)]),
            partial(window.readinto, memoryview(bytearray(9))),
        ]
        for read in reads:
            with pytest.raises(UsageError, match=f"{source.name}: is closed"):
                read()
    for opened in (tmp_path / "x", BLOB, Plain(BLOB)):
        blob = estargz.open(opened)  # type: ignore[arg-type]
        blob.close()
        with pytest.raises(UsageError, match="is closed"):
            blob.read("big")


def test_a_descriptor_ends_with_its_source(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(BLOB)
    with nothing_leaks():
        for _ in range(3):
            estargz.open(tmp_path / "x")  # nobody closes it
        gc.collect()


def test_a_descriptor_is_closed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice would close another file that has got the number in between."""
    closed: list[int] = []
    close = os.close

    def slow(number: int) -> None:
        closed.append(number)
        time.sleep(0.05)
        close(number)

    (tmp_path / "x").write_bytes(BLOB)
    monkeypatch.setattr(os, "close", slow)
    source = open_source(tmp_path / "x")
    for thread in [in_thread(source.close) for _ in range(3)]:
        thread.join()
    source.close()
    assert len(closed) == 1


def test_a_digest_that_is_no_text() -> None:
    with pytest.raises(UsageError, match="b'x' is not sha256:"):
        estargz.open(BLOB, toc_digest=b"x")  # type: ignore[arg-type]


class Recording:
    """A RangeReader with everything that one may have."""

    size = len(DATA)

    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []
        self.excess = 0

    def read_at(self, offset: int, size: int) -> bytes:
        return DATA[offset : offset + size]

    def read_ranges(self, ranges: list[tuple[int, int]]) -> list[bytes]:
        self.calls.append(("read_ranges", ranges))
        return [DATA[offset : offset + size + self.excess] for offset, size in ranges]

    def prefetch(self, ranges: list[tuple[int, int]]) -> None:
        self.calls.append(("prefetch", ranges))

    def forget(self, offset: int, size: int) -> None:
        self.calls.append(("forget", (offset, size)))

    def close(self) -> None:
        self.calls.append(("close", None))


def test_a_source_passes_on_what_its_reader_knows() -> None:
    reader = Recording()
    source = open_source(reader)
    assert source.read_ranges([(1, 2)]) == [DATA[1:3]]
    source.prefetch([(3, 4)])
    assert source.forget(5, 6)
    reader.excess = 1
    with pytest.raises(BlobError, match="3 bytes came for a range of 2 bytes; its reader is faulty"):
        source.read_ranges([(1, 2)])
    source.close()
    calls = [("read_ranges", [(1, 2)]), ("prefetch", [(3, 4)]), ("forget", (5, 6)), ("read_ranges", [(1, 2)])]
    assert reader.calls == calls  # what was lent is not closed


def test_a_source_does_without(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(DATA)
    for plain in (tmp_path / "x", DATA, io.BytesIO(DATA), Plain(DATA)):
        source = open_source(plain)  # type: ignore[arg-type]
        source.prefetch([(0, 10)])
        assert not source.forget(0, 10)
        assert source.read_ranges([(5, 10), (0, 3), (7, 0)]) == [DATA[5:15], DATA[:3], b""]
        with pytest.raises(BlobError, match="before its size"):
            source.read_ranges([(len(DATA) - 1, 2)])
        source.close()


# --- a real registry


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if shutil.which("docker-registry") is None:
        missing("docker-registry is not installed")
    place = tmp_path_factory.mktemp("registry")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    (place / "config.yml").write_text(
        "version: 0.1\n"
        "log: {level: error, accesslog: {disabled: true}}\n"
        f"storage: {{filesystem: {{rootdirectory: {place}}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}'}}\n"
    )
    log = (place / "log").open("wb")
    process = subprocess.Popen(["docker-registry", "serve", place / "config.yml"], stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        urllib3.request("GET", f"{url}/v2/", retries=urllib3.Retry(connect=9, backoff_factor=0.05)).close()
        yield url
    finally:
        process.terminate()
        process.wait(10)
        log.close()


def pushed(registry: str, data: bytes) -> str:
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    location = urllib3.request("POST", f"{registry}/v2/test/blobs/uploads/").headers["Location"]
    answer = urllib3.request("PUT", f"{location}&digest={digest}", body=data)
    assert answer.status == 201
    return f"{registry}/v2/test/blobs/{digest}"


def test_a_registrys_blob(registry: str) -> None:
    url = pushed(registry, BLOB)
    with HttpSource(url, tail=1000) as source:
        rng = random.Random(1)
        ranges = [(rng.randrange(len(BLOB)), rng.randrange(1, 5000)) for _ in range(200)]
        assert source.read_ranges(ranges) == [BLOB[offset : offset + size] for offset, size in ranges]
    with estargz.open(url) as blob:
        assert {path: blob.read(path) for path in FILES} == FILES
        assert blob.toc_digest == estargz.open(BLOB).toc_digest


def test_a_registrys_refusals(registry: str) -> None:
    url = pushed(registry, DATA)
    with HttpSource(url, size=len(DATA) + 10, tail=5) as source:
        with pytest.raises(RangeError, match="416"):  # it announces all of the blob and sends 33 bytes
            source.read_at(len(DATA), 3)
        with pytest.raises(RangeError, match=f"has {len(DATA)} bytes instead of {len(DATA) + 10}"):
            source.read_at(0, 10)
    with pytest.raises(RangeError, match="404 Not Found"):
        HttpSource(url[:-64] + "0" * 64)
    assert HttpSource(pushed(registry, b"")).size == 0
