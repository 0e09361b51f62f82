"""What requests to HTTP servers have in common: URLs, proxies, connections, deadlines, and why a request failed.

Ranges of a blob (reading/http.py) and registries (registry/) are read and written through it.
"""

from __future__ import annotations

import base64
import builtins
import io
import ipaddress
import os
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from http.client import HTTPResponse
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote_to_bytes, urljoin
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3 import BaseHTTPResponse, PoolManager, ProxyManager
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    InsecureRequestWarning,
    NameResolutionError,
    NewConnectionError,
    ProtocolError,
    ProxyError,
    SSLError,
    TimeoutError,
)
from urllib3.util import Url, create_urllib3_context, parse_url

from estargz import __version__
from estargz.errors import UsageError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = [
    "MAX_REDIRECTS",
    "REDIRECTS",
    "TRANSIENT",
    "USER_AGENT",
    "Deadline",
    "Exchanges",
    "Failure",
    "Origin",
    "Pools",
    "Trust",
    "basic",
    "broken",
    "check_certificates",
    "check_identity",
    "content_range",
    "let_go",
    "origin",
    "overloaded",
    "parse",
    "pause",
    "printable",
    "redacted",
    "redirected",
    "retry_after",
    "size_in_416",
    "status_text",
]

MAX_REDIRECTS = 5
REDIRECTS = {301, 302, 303, 307, 308}
TRANSIENT = {408, 429, 500, 502, 503, 504}
USER_AGENT = f"estargz/{__version__}"

_BACKOFF = 0.25  # seconds before the first retry, twice as long before each further one
_MAX_BACKOFF = 8.0
_SMALL_BODY = 1 << 14  # bytes that are read and dropped to keep a connection
_BRIEF = REDIRECTS | {401}  # what may come before an answer, often with a few words
_BROKEN = (NewConnectionError, ProtocolError, ProxyError, SSLError, TimeoutError)

_CONTENT_RANGE = re.compile(r"bytes +(?:(\d{1,18})-(\d{1,18})|\*)/(\d{1,18}|\*)", re.IGNORECASE | re.ASCII)
_UNPRINTABLE = re.compile(r"[\x00-\x20\x7f]")


# --------------------------------------------------------------------------------------------------------------------
# failures


class Failure(Exception):
    """Why an attempt gave nothing; ``transient`` when another one may. ``place``: the URL that was asked."""

    def __init__(
        self,
        what: str,
        remedy: str = "",
        status: int | None = None,
        transient: bool = False,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(what)
        self.what, self.remedy, self.status = what, remedy, status
        self.transient, self.retry_after = transient, retry_after
        self.place: Url | None = None


def pause(failures: int) -> float:
    """Seconds to wait after so many failures in a row, 1 or more; spread, lest all who failed come back at once."""
    return min(_BACKOFF * 2.0 ** (failures - 1), _MAX_BACKOFF) * random.uniform(0.5, 1)


def overloaded(response: BaseHTTPResponse) -> Failure:
    """Of an answer whose status says that another attempt may be better."""
    wait = retry_after(response)
    remedy = "try again later" if wait is None else f"try again in {wait:.0f} s"
    return Failure(status_text(response.status), remedy, response.status, True, wait)


def broken(error: HTTPError) -> Failure:
    """Of what urllib3 raised instead of an answer, or in the middle of one."""
    if isinstance(error, SSLError) and isinstance(error.args[0], ssl.SSLCertVerificationError):
        return Failure(_cause(error), "trust its certificate by ca_file if you know it")
    return Failure(_cause(error), transient=isinstance(error, _BROKEN))


def _cause(error: HTTPError) -> str:
    """What happened, in words that hold no URL."""
    if isinstance(error, ProxyError):
        return "the proxy cannot be reached or refuses"
    if isinstance(error, NameResolutionError):
        return "its host name cannot be resolved"
    if isinstance(error, NewConnectionError):
        return f"cannot be connected to{_because(error.__cause__)}"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, SSLError):
        return printable(f"TLS failed: {getattr(error.args[0], 'verify_message', '') or error.args[0]}")
    if isinstance(error, ProtocolError):
        return f"the connection broke{_because(error.args[-1])}"
    return f"the answer is malformed ({type(error).__name__})"


def _because(reason: object) -> str:
    """The system's words, if it was the system."""
    said = getattr(reason, "strerror", None)
    return f": {said}" if said else ""


def status_text(status: int) -> str:
    """``404 Not Found``."""
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return f"status {status}"


def printable(text: str) -> str:
    """The beginning of what a stranger said, fit for a terminal."""
    return "".join(char if char.isprintable() else "?" for char in text[:500])


# --------------------------------------------------------------------------------------------------------------------
# answers


def content_range(response: BaseHTTPResponse) -> tuple[int, int, int | None]:
    """Begin, end and the blob's size (None for ``*``) of a 206. Raises Failure for a malformed one."""
    status = response.status
    check_identity(response)
    if response.headers.get("Content-Type", "").lower().startswith("multipart/"):
        raise Failure("answered in several parts, though one range was asked", "the server is faulty", status)
    text = response.headers.get("Content-Range", "")
    if text == "bytes 0--1/0":  # what Go's servers say of a blob without bytes
        return 0, 0, 0
    match = _CONTENT_RANGE.fullmatch(text.strip())
    if match is None or match[1] is None:
        raise Failure(printable(f"answered with the Content-Range {text!r}"), "the server is faulty", status)
    begin, end = int(match[1]), int(match[2]) + 1
    total = None if match[3] == "*" else int(match[3])
    if begin >= end or (total is not None and end > total):
        raise Failure(f"answered with the Content-Range {text!r}", "the server is faulty", status)
    return begin, end, total


def size_in_416(response: BaseHTTPResponse) -> int | None:
    """The blob's size, where a refusal of a range states it."""
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
    return None if match is None or match[1] is not None or match[3] == "*" else int(match[3])


def check_identity(response: BaseHTTPResponse) -> None:
    """Raises Failure for an answer that was recoded on its way."""
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        what = printable(f"answered in Content-Encoding {encoding!r}, though none was allowed")
        raise Failure(what, "a server or proxy recodes the blob; have it serve blobs as they are", response.status)


def retry_after(response: BaseHTTPResponse) -> float | None:
    """Seconds, from either form that the header may have."""
    text = response.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def redirected(response: BaseHTTPResponse, place: Url, hops: int) -> Url:
    """Where the answer to a request for ``place``, the ``hops``-th redirect, leads. Raises Failure for where nobody should
    be sent."""
    status = response.status
    location = response.headers.get("Location")
    if not location:
        raise Failure(f"{status_text(status)} without a Location", "the server is faulty", status)
    if hops > MAX_REDIRECTS:
        raise Failure(f"more than {MAX_REDIRECTS} redirects", "the server sends around in circles", status)
    try:
        url, auth = parse(location, place.url)
    except ValueError as error:
        raise Failure(f"redirects to a URL that {error}", "the server is faulty", status) from None
    if auth is not None:
        raise Failure("redirects to a URL with credentials in it", "open that URL itself if you trust it", status)
    if place.scheme == "https" and url.scheme == "http":
        raise Failure("redirects from https to http", "open that URL itself if you trust it", status)
    return url


def let_go(response: BaseHTTPResponse) -> None:
    """Keeps the connection when nothing is left on it, or so little that one read takes it; else closes it."""
    left = response.length_remaining
    with suppress(HTTPError):
        if response.status in _BRIEF and left is not None and left <= _SMALL_BODY:
            response.read1(_SMALL_BODY)
    if not response.closed:
        response.close()
        response.release_conn()


# --------------------------------------------------------------------------------------------------------------------
# URLs and credentials


Origin = tuple[str | None, str | None, int]


def parse(text: str, base: str = "") -> tuple[Url, str | None]:
    """A URL, which may be relative to ``base``, and its userinfo. Raises ValueError.

    It is taken apart by what will connect to it, lest the two disagree on the host.
    """
    if _UNPRINTABLE.search(text):
        raise ValueError("holds spaces or control characters")
    try:
        url = parse_url(urljoin(base, text) if base else text)
    except ValueError:
        raise ValueError("is malformed") from None
    if url.scheme not in ("http", "https"):
        raise ValueError("is neither http:// nor https://")
    if not url.host:
        raise ValueError("names no host")
    return url._replace(auth=None, fragment=None), url.auth


def origin(url: Url) -> Origin:
    """Scheme, host and port: those who share them are the same server."""
    return url.scheme, url.host, url.port or (443 if url.scheme == "https" else 80)


def redacted(url: Url) -> str:
    """Queries hold signatures."""
    return url._replace(query="REDACTED" if url.query else None).url


def basic(userinfo: str) -> str:
    """An Authorization header of the ``user:password`` of a URL."""
    user, _, password = userinfo.partition(":")
    plain = unquote_to_bytes(user) + b":" + unquote_to_bytes(password)
    return "Basic " + base64.b64encode(plain).decode()


# --------------------------------------------------------------------------------------------------------------------
# deadlines

# A socket's timeout begins anew with every byte. What comes before and between the parts of a body (status lines, headers,
# interim answers, sizes of chunks, a proxy's answer) is read inside http.client, so there the deadline has to be the file's.


class Deadline:
    """When an exchange has to be done; its answers, read by whichever thread, end then. Another thread may end it at once."""

    def __init__(self, seconds: float) -> None:
        self.cancelled = False
        self._connection: socket.socket | None = None
        self._holding = threading.Lock()
        self.extend(seconds)

    def extend(self, seconds: float) -> None:
        """From now on, it is so far away."""
        self._at = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds; 0 or less when it is over."""
        return 0.0 if self.cancelled else self._at - time.monotonic()

    def cancel(self) -> None:
        """It is over. Who waits for the other side is woken."""
        with self._holding:
            self.cancelled = True
            self._shut_down()

    def _shut_down(self) -> None:
        if self._connection is not None:
            with suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        """The connection is somebody else's from now on."""
        with self._holding:
            if self._connection is not None:
                self._connection.close()
            self._connection = None

    @contextmanager
    def applies(self) -> Iterator[None]:
        """The answers that this thread begins to read are to be read by then."""
        outer, _current.deadline = _current.deadline, self  # what a request sends may come by another one
        try:
            yield
        finally:
            _current.deadline = outer

    def hold(self, connection: socket.socket) -> None:
        """Something is sent or read through it, until ``release``."""
        # A descriptor of its own: TLS takes the connection's away from it, and its number may come to mean something else.
        handle = os.dup(connection.fileno())
        try:
            own = socket.socket(fileno=handle)  # asks the system for its kind, which may fail
        except BaseException:
            os.close(handle)
            raise
        self.release()
        with self._holding:
            self._connection = own
            if self.cancelled:
                self._shut_down()


class Exchanges:
    """What is under way for somebody; another thread may end all of it."""

    def __init__(self) -> None:
        self.closed = threading.Event()
        self._deadlines: set[Deadline] = set()
        self._lock = threading.Lock()

    def begin(self, seconds: float) -> Deadline:
        """Of a new one, for ``end``; it is over at once when they are closed."""
        deadline = Deadline(seconds)
        with self._lock:
            self._deadlines.add(deadline)
            if self.closed.is_set():
                deadline.cancel()
        return deadline

    def end(self, deadline: Deadline) -> None:
        """Its connection may be used by others."""
        deadline.release()
        with self._lock:
            self._deadlines.discard(deadline)

    @contextmanager
    def one(self, seconds: float) -> Iterator[Deadline]:
        """From ``begin`` to ``end``."""
        deadline = self.begin(seconds)
        try:
            yield deadline
        finally:
            self.end(deadline)

    def close(self) -> None:
        """They are over, and so is each that begins later. Closing twice does no harm."""
        with self._lock:
            self.closed.set()
            deadlines = list(self._deadlines)
        for deadline in deadlines:
            deadline.cancel()


class _Current(threading.local):
    deadline: Deadline | None = None  # None: a request of somebody else, in the same pool


_current = _Current()


class _TimedFile(io.RawIOBase):
    """What a socket sends; reading raises the built-in TimeoutError after a silence as long as the socket's timeout, and
    at the deadline."""

    def __init__(self, file: io.RawIOBase, connection: socket.socket, deadline: Deadline) -> None:
        self._file, self._connection, self._deadline = file, connection, deadline
        self._silence = connection.gettimeout()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int | None:
        left = self._deadline.left()
        if left <= 0:
            raise builtins.TimeoutError("timed out")
        self._connection.settimeout(left if self._silence is None else min(self._silence, left))
        return self._file.readinto(buffer)

    def close(self) -> None:
        self._file.close()
        super().close()


class _TimedResponse(HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        if _current.deadline is not None:
            self.fp = io.BufferedReader(_TimedFile(self.fp.detach(), sock, _current.deadline))


class _Timed:
    """What makes a class of connections heed the deadline."""

    response_class = _TimedResponse
    sock: socket.socket | None

    @property
    def is_connected(self) -> bool:
        """Whether it can be used again. One that cannot be asked is not: urllib3 would leave it to the collector."""
        with suppress(OSError):
            return bool(super().is_connected)  # type: ignore[misc]
        return False

    def endheaders(self, *args: Any, **options: Any) -> None:
        super().endheaders(*args, **options)  # type: ignore[misc]
        if _current.deadline is not None and self.sock is not None:
            _current.deadline.hold(self.sock)


class _Abortable(_Timed):
    """The same, which may also be given up while it is made."""

    host: str
    _dns_host: str  # with the dot at its end, if there is one
    port: int
    timeout: float
    socket_options: Any

    def _new_conn(self) -> socket.socket:
        if (deadline := _current.deadline) is None:
            return super()._new_conn()  # type: ignore[misc, no-any-return]
        failure: OSError | None = None
        try:
            addresses = socket.getaddrinfo(self._dns_host.strip("[]"), self.port, type=socket.SOCK_STREAM)
        except (socket.gaierror, UnicodeError) as error:
            raise NameResolutionError(self.host, self, error) from error  # type: ignore[arg-type]
        for family, kind, protocol, _, address in addresses:
            try:
                return self._connected(socket.socket(family, kind, protocol), address, deadline)
            except OSError as error:
                failure = error
        try:
            if isinstance(failure, builtins.TimeoutError):
                raise ConnectTimeoutError(self, "no connection in time") from failure
            raise NewConnectionError(self, "no connection") from failure  # type: ignore[arg-type]
        finally:
            del failure  # it refers to this frame

    def _connected(self, connection: socket.socket, address: Any, deadline: Deadline) -> socket.socket:
        try:
            for option in self.socket_options or ():
                connection.setsockopt(*option)
            deadline.hold(connection)
            left = deadline.left()
            if left <= 0:
                raise builtins.TimeoutError("timed out")
            connection.settimeout(min(self.timeout, left))
            connection.connect(address)
        except BaseException:
            connection.close()
            raise
        return connection


# --------------------------------------------------------------------------------------------------------------------
# connections


class Trust(NamedTuple):
    """Whose certificates a server may have, and which ones it is shown."""

    ca_file: str | None = None
    """PEM; instead of the system's."""
    more: tuple[str, ...] = ()
    """Further PEM files."""
    verify: bool = True
    """False: anybody's."""
    shown: tuple[tuple[str, str], ...] = ()
    """PEM files of a client's certificate and its key."""


def check_certificates(path: str) -> None:
    """Raises UsageError for what is no PEM file of certificates."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except OSError as error:
        raise UsageError(f"ca_file {path}: {error.strerror or error}; give a PEM file of certificates") from error


def is_loopback(url: Url) -> bool:
    """Whether a URL's host is this machine."""
    host = (url.host or "").strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Pools:
    """Connections, kept for the next request, through the environment's proxies (urllib3 does not look for them).

    parallel:  connections to a server that are kept, at most
    trust:     whose certificates are taken for a URL
    given:     all connections, instead; they are not closed
    direct:    tells the URLs that no proxy is asked for, whatever the environment says
    """

    def __init__(
        self,
        parallel: int,
        trust: Callable[[Url], Trust],
        given: PoolManager | None = None,
        direct: Callable[[Url], bool] = lambda _: False,
    ) -> None:
        self._parallel, self._trust, self._given, self._direct = parallel, trust, given, direct
        self._proxies = getproxies() if given is None else {}
        self._managers: dict[tuple[str | None, Trust], PoolManager] = {}
        self._lock = threading.Lock()

    def of(self, url: Url) -> PoolManager:
        """Those to use for a URL. Raises UsageError for a proxy that is none, and for what is no file of certificates."""
        manager = self._manager(url)
        pool = manager.connection_from_url(url.url)
        if not issubclass(pool.ConnectionCls, _Timed):
            timed = _Abortable if self._given is None else _Timed  # others may connect in ways of their own
            pool.ConnectionCls = type("TimedConnection", (timed, pool.ConnectionCls), {})
        return manager

    def _manager(self, url: Url) -> PoolManager:
        if self._given is not None:
            return self._given
        proxy = self._proxies.get(url.scheme or "")
        if proxy is not None and (self._direct(url) or proxy_bypass(url.netloc or "", self._proxies)):
            proxy = None
        trust = self._trust(url)
        with self._lock:
            if (proxy, trust) not in self._managers:
                self._managers[proxy, trust] = self._made(proxy, url.scheme, trust)
            return self._managers[proxy, trust]

    def _made(self, proxy: str | None, scheme: str | None, trust: Trust) -> PoolManager:
        options: dict[str, Any] = {"maxsize": self._parallel, **_tls(trust)}
        if proxy is None:
            return PoolManager(**options)
        try:
            url, auth = parse(proxy if "://" in proxy else f"http://{proxy}")
        except ValueError as error:
            raise UsageError(f"the proxy in the environment for {scheme} {error}") from None
        headers = None if auth is None else {"proxy-authorization": basic(auth)}
        return ProxyManager(url.url, proxy_headers=headers, **options)

    def close(self) -> None:
        """Ends the connections that nobody uses; the others end when they are let go."""
        with self._lock:
            for manager in self._managers.values():
                # clear() leaves closing to the collector, and the frames of an error may hold a pool for long.
                for key in list(manager.pools.keys()):
                    if (pool := manager.pools.get(key)) is not None:
                        pool.close()
                manager.clear()
            self._managers.clear()


def _tls(trust: Trust) -> dict[str, Any]:
    if not trust.verify:
        urllib3.disable_warnings(InsecureRequestWarning)  # it was asked for
        return {"cert_reqs": "CERT_NONE"}
    if not trust.more and not trust.shown:
        return {"ca_certs": trust.ca_file}
    for path in trust.more:
        check_certificates(path)
    context = create_urllib3_context()
    if trust.ca_file is None:
        context.load_default_certs()
    for path in filter(None, (trust.ca_file, *trust.more)):
        context.load_verify_locations(path)
    for certificate, key in trust.shown:
        try:
            context.load_cert_chain(certificate, key, password="")  # one that needs a password is not asked for it
        except OSError as error:
            what = f"{certificate}: cannot be shown to the server: {error.strerror or error}"
            raise UsageError(f"{what}; it needs {key} beside it, both PEM, without a password") from error
    return {"ssl_context": context}
