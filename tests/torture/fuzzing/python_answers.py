"""Targets: what servers answer, header by header and as bytes on the wire."""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from urllib3 import HTTPResponse
from urllib3.util import parse_url

from estargz import http
from estargz.http import Failure
from estargz.image.model import Descriptor
from estargz.image.reference import Reference
from estargz.reading.http import HttpSource
from estargz.registry.auth import Challenge, parse_challenges
from estargz.registry.client import Registries
from estargz.registry.upload import _end_of, _number

from .python_target import accepted, expect, target

_DESCRIPTOR = Descriptor("application/octet-stream", "sha256:" + "0" * 64, 100)
_NEXT = b"\xff\xff"
"""Parts what is answered on one connection from what is on the next."""


# --------------------------------------------------------------------------------------------------------------------
# headers


@target(
    "challenge",
    *'Basic Bearer realm=" service= scope= error= , \\" https:// pull,push repository:a/b:pull Negotiate'.split(),
)
def challenge(data: bytes) -> None:
    found = parse_challenges(data.decode("latin-1"))
    for one in found:
        expect(re.fullmatch(r"[^\s,\"=]+", one.scheme), f"{one.scheme!r} is a scheme")
    expect(
        parse_challenges(_header(found)) == found, f"written, {_header(found)} reads {parse_challenges(_header(found))}"
    )


def _header(challenges: list[Challenge]) -> str:
    return ", ".join(" ".join((one.scheme, ", ".join(map(_parameter, one.parameters.items())))) for one in challenges)


def _parameter(pair: tuple[str, str]) -> str:
    return '{}="{}"'.format(pair[0], re.sub(r'(["\\])', r"\\\1", pair[1]))


@target(
    "headers",
    "bytes 0-99/100",
    "bytes */100",
    "bytes=0-99",
    "identity",
    "multipart/",
    "Wed, 21 Oct 2015 07:28:00 GMT",
    "-0000",
    "9" * 20,
)
def headers(data: bytes) -> None:
    """Content-Range, Range, Content-Encoding, Retry-After, and OCI-Chunk-Min-Length."""
    text = _value(data)
    names = ("Content-Range", "Content-Encoding", "Content-Type", "Retry-After")
    for name in names:
        answer = HTTPResponse(b"", {name: text}, 206)
        found = accepted(http.content_range, answer, refusal=Failure)
        if found is not None:
            begin, end, size = found
            expect(0 <= begin <= end and (size is None or end <= size), f"{text!r} is the range {found}")
    expect((http.size_in_416(HTTPResponse(b"", {"Content-Range": text}, 416)) or 0) >= 0, "a size is below zero")
    wait = http.retry_after(HTTPResponse(b"", {"Retry-After": text}, 429))
    expect(wait is None or wait >= 0, f"{text!r} is a wait of {wait}")
    expect(str(http.overloaded(HTTPResponse(b"", {"Retry-After": text}, 429))), "it does not say why")
    expect((_end_of(text) or 0) >= 0 and _number(text) >= 0, f"{text!r} is below zero")


@target(
    "url",
    "http://",
    "https://",
    "//h.example",
    "user:password@",
    "[::1]",
    ":80",
    "?a=b",
    "#c",
    "%2e",
    "..",
    "\\",
    "://",
    "xn--",
    most=300,
)
def url(data: bytes) -> None:
    """Location, and whatever else leads to a server: where a redirect leads is where urllib3 will go."""
    text = _value(data)
    for place in ("https://h.example/v2/a?b=c", "http://[::1]:5000/v2/"):
        answer = HTTPResponse(b"", {"Location": text}, 307)
        found = accepted(http.redirected, answer, parse_url(place), 1, refusal=Failure)
        if found is not None:
            again = parse_url(found.url)
            expect(
                (again.scheme, again.host, again.port) == (found.scheme, found.host, found.port),
                f"{again} is another place",
            )
            expect(found.scheme in ("http", "https") and found.host and found.auth is None, f"{found} is followed")
            expect(found.scheme == "https" or place.startswith("http:"), f"{found} has no TLS")
            expect(re.fullmatch(r"[\x21-\x7e]*", found.url), f"{found.url!r} goes into a request")
            expect("\n" not in http.redacted(found), "its name has lines")
            http.is_loopback(found)
            http.origin(found)


def _value(data: bytes) -> str:
    """A header's value, as http.client has it."""
    return re.sub(r"[\r\n]", " ", data.decode("latin-1"))


# --------------------------------------------------------------------------------------------------------------------
# the wire


@contextmanager
def _server(data: bytes) -> Iterator[None]:
    """All connections lead to who says the next part of the data, the last one again and again, whatever is asked."""
    parts = data.split(_NEXT)
    ends: list[socket.socket] = []

    def connected(self: Any, connection: socket.socket, address: Any, deadline: http.Deadline) -> socket.socket:
        connection.close()
        mine, theirs = socket.socketpair()
        ends.append(mine)
        mine.sendall(parts[min(len(ends), len(parts)) - 1])
        mine.shutdown(socket.SHUT_WR)
        deadline.hold(theirs)
        theirs.settimeout(self.timeout)
        return theirs

    def resolved(host: str, port: int, *rest: Any, **options: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    with (
        mock.patch.object(http._Abortable, "_connected", connected),
        mock.patch.object(socket, "getaddrinfo", resolved),
        mock.patch.object(ssl.SSLContext, "load_default_certs"),  # takes its time, and nobody here has a certificate
    ):
        try:
            yield
        finally:
            for end in ends:
                end.close()


_WIRE = (
    "HTTP/1.1 200 OK\r\n", "HTTP/1.1 206 Partial\r\n", "HTTP/1.1 416 No\r\n", "HTTP/1.1 401 No\r\n", "HTTP/1.1 307 Go\r\n",
    "HTTP/1.1 202 Yes\r\n", "HTTP/1.1 201 Yes\r\n", "HTTP/1.1 100 Go on\r\n", "HTTP/1.1 429 Wait\r\n", "Retry-After: 1\r\n",
    "Content-Length: 100\r\n", "Content-Range: bytes 0-99/100\r\n", "Location: http://h.example/b\r\n", "ETag: \"a\"\r\n",
    "Transfer-Encoding: chunked\r\n", "Connection: close\r\n", "Content-Encoding: gzip\r\n", "Range: 0-99\r\n",
    'WWW-Authenticate: Bearer realm="http://127.0.0.1:5000/token"\r\n', "Content-Type: application/json\r\n", "\r\n\r\n",
    "Docker-Content-Digest: sha256:", '{"token":"a"}', "\r\n0\r\n\r\n", "OCI-Chunk-Min-Length: 1\r\n",
)  # fmt: skip


@target("ranges", *_WIRE, most=2048, runs=500)
def ranges(data: bytes) -> None:
    """The bytes that come back when parts of a blob are asked for."""
    with _server(data):
        source = accepted(HttpSource, "http://127.0.0.1:5000/b", retries=1, sleep=lambda seconds: None, tail=50)
        if source is None:
            return
        size = accepted(lambda: source.size)
        found = accepted(source.read_ranges, [(0, 10), (40, 30)])
        expect(found is None or [len(part) for part in found] == _asked(size, (0, 10), (40, 30)), f"{found} are read")
        source.close()


def _asked(size: int | None, *spans: tuple[int, int]) -> list[int]:
    return [max(min(length, (size or 0) - begin), 0) for begin, length in spans]


@target("registry", *_WIRE, most=2048, runs=300)
def registry(data: bytes) -> None:
    """The bytes that come back from a registry: a manifest is asked for, a blob, and an upload is begun."""
    given = {"127.0.0.1:5000": ("user", "password")}
    with Registries(credentials=given, sleep=lambda seconds: None) as registries, _server(data):
        repository = registries.repository(Reference.parse("docker://127.0.0.1:5000/a/b:c"))
        root = accepted(repository.resolve)
        if root is not None:
            expect(len(repository.read(root)) == root.size, "a manifest is longer or shorter than it says")
        accepted(repository.has, _DESCRIPTOR)
        part = accepted(repository.read_at, _DESCRIPTOR, 10, 20)
        expect(part is None or len(part) <= 20, "more is read than was asked for")
        accepted(_pushed, repository)


def _pushed(repository: Any) -> None:
    with repository.upload() as upload:
        upload.write(bytes(100))
        upload.commit(_DESCRIPTOR.digest, 100)
