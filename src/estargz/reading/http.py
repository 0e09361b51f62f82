"""A blob on an HTTP or HTTPS server, read by ranges.

read -> one GET a range -> redirects, credentials, retries -> 206 with just that Content-Range -> bytes
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from typing import NamedTuple, Self, TypeVar

from urllib3 import BaseHTTPResponse, PoolManager, Timeout
from urllib3.exceptions import HTTPError
from urllib3.util import Url

from estargz.errors import RangeError, UsageError
from estargz.http import (
    REDIRECTS,
    TRANSIENT,
    USER_AGENT,
    Deadline,
    Exchanges,
    Failure,
    Origin,
    Pools,
    Trust,
    basic,
    broken,
    check_certificates,
    check_identity,
    content_range,
    let_go,
    origin,
    overloaded,
    parse,
    pause,
    printable,
    redacted,
    redirected,
    size_in_416,
    status_text,
)
from estargz.threads import Threads

__all__ = ["HttpSource"]

_MAX_RETRY_AFTER = 60.0  # a server that asks for more is not waited for
_PIECE = 1 << 18  # bytes that are read between two looks at the clock

_NO_SUFFIX = {400, 405, 416, 501}  # how servers refuse "the last n bytes"

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_RESERVED_HEADERS = {"range", "if-range", "accept-encoding"}

_REMEDIES = {
    401: "check the credentials, which the URL, headers or authorize can give",
    403: "check the credentials, or whether the URL has expired",
    404: "check the URL",
    410: "check the URL",
    416: "the blob is shorter than it is said to be; check its size",
}

T = TypeVar("T")


class HttpSource:
    """A blob behind a URL; a RangeReader, to be closed, best by ``with``. Its methods may be used from several threads.

    url:        http:// or https://; a user and password in it become Basic credentials
    headers:    sent along, to the origin (scheme, host and port) of ``url`` alone
    authorize:  is given the WWW-Authenticate header of a 401 from that origin and returns headers to try again with; they
                are kept for later requests, and go to that origin alone
    size:       bytes that the blob must have; without it they are learnt, by the first request, which is made at once
    tail:       bytes at the blob's end that are fetched by one request and kept: its footer and, often, its TOC
    timeout:    seconds that a server may be silent
    deadline:   seconds that a range may take in all, with its redirects, retries and pauses
    retries:    how often a range is asked for again after a broken connection, a cut body or a status 408, 429, 500, 502,
                503 or 504, with pauses that grow, or as long as the server's Retry-After says, up to a minute
    parallel:   requests under way at once, at most
    ca_file:    PEM file of the certificates to trust, instead of the system's
    pool:       connections to use; it is not closed. Without it, HTTP_PROXY, HTTPS_PROXY and NO_PROXY are heeded
    sleep:      what pauses, given seconds; for tests

    The answer must be a 206 with exactly the asked Content-Range and as many bytes. A 200, which means the whole blob, is
    taken only when the whole blob was asked for. Redirects are followed, five at most, and never from https to http; where
    they led is asked directly from then on, until that fails.

    An origin that gives a strong ETag must not give another one later. (If-Range would have a server answer with the whole
    blob instead, which cannot be told from one that ignores ranges, and caches are known to get it wrong; a weak ETag or a
    Last-Modified says nothing about bytes.) Different hosts may have different ETags for the same blob.

    Raises UsageError for arguments that cannot be honoured; here and while reading RangeError, and what ``authorize``
    raises.
    """

    name: str  # the URL without credentials and query
    size: int  # bytes of the blob

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        authorize: Callable[[str], Mapping[str, str]] | None = None,
        size: int | None = None,
        tail: int = 1 << 18,
        timeout: float = 30.0,
        deadline: float = 300.0,
        retries: int = 4,
        parallel: int = 8,
        ca_file: str | None = None,
        pool: PoolManager | Pools | None = None,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        home, own = _own_url(url, headers)
        _at_least(size=(size, 0), tail=(tail, 1), retries=(retries, 0), parallel=(parallel, 1))
        if timeout <= 0 or deadline <= 0:
            raise UsageError("timeout and deadline must be more than 0 seconds")
        if pool is not None and ca_file is not None:
            raise UsageError("ca_file belongs to the connections; make the pool with it")
        if ca_file is not None:
            check_certificates(ca_file)
        self.name = redacted(home)
        self._home = _Place(home, True)
        self._moved: _Place | None = None  # where the last request ended
        self._version: tuple[Origin, str] | None = None  # the last origin to give a strong ETag, and that ETag
        self._headers = own
        self._granted: dict[str, str] = {}
        self._authorize = authorize
        self._granting = threading.Lock()
        self._timeout, self._deadline, self._retries = timeout, deadline, retries
        self._parallel = parallel
        self._slots = threading.BoundedSemaphore(parallel)
        self._executor: Threads | None = None
        self._starting = threading.Lock()
        self._exchanges = Exchanges()
        self._sleep = self._exchanges.closed.wait if sleep is None else sleep
        self._lent = isinstance(pool, Pools)
        self._pools = pool if isinstance(pool, Pools) else Pools(parallel, lambda _: Trust(ca_file), pool)
        self._tail = tail
        self._kept: bytes | None = None
        self._keeping = threading.Lock()
        try:
            self.size, self._kept = (size, None) if size is not None else self._learn()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connections; what is being read, by whichever thread, ends with an error. Closing twice does no harm."""
        self._exchanges.close()
        self._kept = None
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
        if not self._lent:
            self._pools.close()

    def read_at(self, offset: int, size: int, /) -> bytes:
        """The ``size`` bytes at ``offset``; fewer only where the blob ends. Raises RangeError."""
        if offset < 0 or size < 0:
            raise UsageError(f"{self.name}: there are no {size} bytes at byte {offset}")
        end = min(offset + size, self.size)
        tail_at = max(self.size - self._tail, 0)
        if offset >= end:
            return b""
        if end <= tail_at:
            return self._fetch(offset, end)
        tail = self._tail_bytes(tail_at)
        if offset >= tail_at:
            return tail[offset - tail_at : end - tail_at]
        return self._fetch(offset, tail_at) + tail[: end - tail_at]

    def read_ranges(self, ranges: Sequence[tuple[int, int]], /) -> list[bytes]:
        """What read_at gives for each (offset, size), in the same order, fetched side by side. Raises RangeError."""
        if len(ranges) < 2:
            return [self.read_at(offset, size) for offset, size in ranges]
        pending = [self._workers().submit(self.read_at, offset, size) for offset, size in ranges]
        try:
            return [future.result() for future in pending]
        except CancelledError:
            self._check_open()
            raise
        finally:
            for future in pending:
                future.cancel()

    def forget(self, offset: int, size: int, /) -> None:
        """Do not give out these bytes again without asking the server."""
        if offset + size > self.size - self._tail:
            with self._keeping:
                self._kept = None

    def _workers(self) -> Threads:
        with self._starting:
            self._check_open()
            if self._executor is None:
                self._executor = Threads(self._parallel, thread_name_prefix="estargz-http")
            return self._executor

    def _check_open(self) -> None:
        if self._exchanges.closed.is_set():
            raise UsageError(f"{self.name}: is closed")

    # ----------------------------------------------------------------------------------------------------------------
    # what is asked for

    def _fetch(self, begin: int, end: int) -> bytes:
        span = _Span(begin, end)
        return self._ask(span, lambda response, deadline: self._take(response, span, deadline))

    def _tail_bytes(self, begin: int) -> bytes:
        with self._keeping:
            if self._kept is None:
                self._kept = self._fetch(begin, self.size)
            return self._kept

    def _learn(self) -> tuple[int, bytes | None]:
        """The blob's size, and its last bytes if they came along."""
        size, data = self._ask(_Span(-self._tail, 0), self._take_tail)
        if size is None:
            # Rather than HEAD, which URLs signed for GET refuse.
            size = self._ask(_Span(0, 1), self._take_first)
        return size, data

    def _take(self, response: BaseHTTPResponse, span: _Span, deadline: Deadline) -> bytes:
        if response.status == 200 and span == (0, self.size):
            check_identity(response)
        elif response.status == 200:
            raise _ignores_ranges()
        else:
            begin, end, total = _asked_range(response)
            if total is not None and total != self.size:
                raise Failure(f"has {total} bytes instead of {self.size}", "it is another blob or was replaced", 206)
            if (begin, end) != span:
                raise _other_bytes(begin, end)
        return self._body(response, span.end - span.begin, deadline)

    def _take_tail(self, response: BaseHTTPResponse, deadline: Deadline) -> tuple[int | None, bytes | None]:
        """The size, if it can be told, and the last bytes, if the server knows how to be asked for them."""
        if response.status == 416:
            return size_in_416(response), None
        if response.status in _NO_SUFFIX:
            return None, None
        if response.status == 200:
            check_identity(response)
            size = response.length_remaining
            whole = size is not None and size <= self._tail
            return size, self._body(response, size, deadline) if size is not None and whole else None
        begin, end, total = _asked_range(response)
        if total is None:
            return None, None
        if (begin, end) != (max(total - self._tail, 0), total):
            raise _other_bytes(begin, end)
        return total, self._body(response, end - begin, deadline)

    def _take_first(self, response: BaseHTTPResponse, deadline: Deadline) -> int:
        if response.status == 416 and (size := size_in_416(response)) is not None:
            return size
        if response.status == 200:
            raise _ignores_ranges()
        begin, end, total = _asked_range(response)
        if total is None:
            raise Failure("does not say how large the blob is", "give its size", 206)
        if (begin, end) != (0, 1):
            raise _other_bytes(begin, end)
        self._body(response, 1, deadline)
        return total

    def _body(self, response: BaseHTTPResponse, size: int, deadline: Deadline) -> bytes:
        """Exactly ``size`` bytes; memory grows with what arrives, not with what was announced."""
        stated = response.length_remaining
        if stated is not None and stated != size:
            raise Failure(f"announces a body of {stated} bytes", "the server is faulty", response.status)
        parts = []
        left = size
        while left:
            part = response.read1(min(left, _PIECE))
            if not part:
                raise Failure(f"the body ends {left} bytes too early", status=response.status, transient=True)
            parts.append(part)
            left -= len(part)
            self._check_time(deadline)
        if stated is None and response.read1(1):
            raise Failure("sends more bytes than it says", "the server is faulty", response.status)
        return b"".join(parts)

    # ----------------------------------------------------------------------------------------------------------------
    # how it is asked for

    def _ask(self, span: _Span, take: Callable[[BaseHTTPResponse, Deadline], T]) -> T:
        """What ``take`` makes of the answer to a GET of ``span``. Raises RangeError."""
        with self._slots, self._exchanges.one(self._deadline) as deadline:
            attempt = 1
            while True:
                self._check_open()
                try:
                    return self._attempt(span, take, deadline)
                except Failure as failure:
                    self._moved = None
                    wait = self._wait(failure, attempt, deadline)
                    if wait is None:
                        self._check_open()  # which leaves no time to wait, either
                        raise self._error(failure, span, attempt) from failure.__cause__
                self._sleep(wait)
                attempt += 1

    def _wait(self, failure: Failure, attempt: int, deadline: Deadline) -> float | None:
        """Seconds before the next attempt; None when there shall be none."""
        if not failure.transient or attempt > self._retries:
            return None
        wait = max(pause(attempt), failure.retry_after or 0.0)
        return None if wait > _MAX_RETRY_AFTER or wait > deadline.left() else wait

    def _attempt(self, span: _Span, take: Callable[[BaseHTTPResponse, Deadline], T], deadline: Deadline) -> T:
        place = self._moved or self._home
        remembered = place is not self._home
        authorized = False
        hops = 0
        while True:
            granted = self._granted
            response = self._send(place, span, granted, deadline)
            try:
                status = response.status
                if status in REDIRECTS:
                    hops += 1
                    place = self._follow(place, response, hops)
                elif status in TRANSIENT:
                    raise overloaded(response)
                elif status == 401 and place.trusted and not authorized and self._renew(granted, response):
                    authorized = True
                elif status >= 400 and remembered:
                    place, remembered, hops = self._home, False, 0  # a signed URL has expired
                else:
                    self._check_version(response, place)
                    result = take(response, deadline)
                    self._moved = None if place is self._home else place
                    return result
            except HTTPError as error:
                raise self._broken(error, place, deadline) from error
            except Failure as failure:
                failure.place = place.url
                raise
            finally:
                deadline.release()
                let_go(response)

    def _send(self, place: _Place, span: _Span, granted: Mapping[str, str], deadline: Deadline) -> BaseHTTPResponse:
        own = {**self._headers, **granted} if place.trusted else {}
        headers = {"user-agent": USER_AGENT, **own, "accept-encoding": "identity", "range": span.header}
        try:
            silence = min(self._timeout, self._check_time(deadline))
            with deadline.applies():
                return self._pools.of(place.url).urlopen(
                    "GET",
                    place.url.url,
                    headers=headers,
                    timeout=Timeout(connect=silence, read=silence),
                    retries=False,
                    redirect=False,
                    preload_content=False,
                    decode_content=False,
                )
        except HTTPError as error:
            raise self._broken(error, place, deadline) from error

    def _check_time(self, deadline: Deadline) -> float:
        """Seconds that are left."""
        self._check_open()
        left = deadline.left()
        if left <= 0:
            raise self._late()
        return left

    def _late(self) -> Failure:
        return Failure(f"not done within {self._deadline:g} s", "raise the deadline, or ask for less at once")

    def _broken(self, error: HTTPError, place: _Place, deadline: Deadline) -> Failure:
        deadline.release()
        self._check_open()
        failure = self._late() if deadline.left() <= 0 else broken(error)
        failure.place = place.url
        return failure

    def _follow(self, place: _Place, response: BaseHTTPResponse, hops: int) -> _Place:
        url = redirected(response, place.url, hops)
        return _Place(url, place.trusted and origin(url) == origin(self._home.url))

    def _renew(self, granted: Mapping[str, str], response: BaseHTTPResponse) -> bool:
        """Whether there are other credentials now than those that were refused."""
        challenge = response.headers.get("WWW-Authenticate")
        if self._authorize is None or not challenge:
            return False
        with self._granting:
            if self._granted is granted:  # else another thread was refused too, and quicker
                self._granted = _checked_headers(self._authorize(challenge))
        return True

    def _check_version(self, response: BaseHTTPResponse, place: _Place) -> None:
        etag = response.headers.get("ETag", "")
        if response.status not in (200, 206) or not etag.startswith('"'):
            return
        where = origin(place.url)
        known = self._version
        if known is not None and known[0] == where and known[1] != etag:
            what = f"changed while it was read: its ETag was {known[1]} and is {etag}"
            raise Failure(printable(what), "open it again", response.status)
        self._version = where, etag

    def _error(self, failure: Failure, span: _Span, attempts: int) -> RangeError:
        place = failure.place or self._home.url
        where = self.name if place == self._home.url else f"{self.name}: redirected to {redacted(place)}"
        tried = f", after {attempts} attempts" if attempts > 1 else ""
        remedy = failure.remedy or "check the network, then try again"
        error = RangeError(f"{where}: {failure.what}, asked for {span}{tried}; {remedy}")
        error.status = failure.status
        error.url = redacted(place)
        return error


# --------------------------------------------------------------------------------------------------------------------
# ranges and answers


class _Span(NamedTuple):
    """The bytes [begin, end); a negative begin counts from the end of a blob whose size is not known."""

    begin: int
    end: int

    @property
    def header(self) -> str:
        return f"bytes={self.begin}" if self.begin < 0 else f"bytes={self.begin}-{self.end - 1}"

    def __str__(self) -> str:
        if self.begin < 0:
            return f"the last {-self.begin} bytes"
        return f"{self.end - self.begin} bytes at byte {self.begin}"


def _asked_range(response: BaseHTTPResponse) -> tuple[int, int, int | None]:
    """Begin, end and the blob's size (None for ``*``) of a 206. Raises Failure for any other answer."""
    status = response.status
    if status != 206:
        raise Failure(status_text(status), _REMEDIES.get(status, "check the URL and the server"), status)
    return content_range(response)


def _other_bytes(begin: int, end: int) -> Failure:
    return Failure(f"answered with bytes {begin}-{end - 1}", "the server or a cache on the way is faulty", 206)


def _ignores_ranges() -> Failure:
    return Failure("the server ignores ranges and sends the whole blob", "download it and open the file", 200)


# --------------------------------------------------------------------------------------------------------------------
# URLs and headers


class _Place(NamedTuple):
    """A URL without userinfo and fragment, and whether it may see the caller's headers."""

    url: Url
    trusted: bool


def _own_url(url: str, headers: Mapping[str, str] | None) -> tuple[Url, dict[str, str]]:
    """The caller's URL and headers, userinfo turned into one of them. Raises UsageError, which shows no secret."""
    try:
        parsed, auth = parse(url)
    except ValueError as error:
        raise UsageError(f"a blob's URL {error}; check it") from None
    own = _checked_headers(headers or {})
    if auth is not None:
        if "authorization" in own:
            raise UsageError(f"{redacted(parsed)}: credentials are in its URL and in the headers; give one of them")
        own["authorization"] = basic(auth)
    return parsed, own


def _checked_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Names in lower case. Raises UsageError, which shows no value: it may be a secret."""
    checked = {}
    for name, value in headers.items():
        if not _HEADER_NAME.fullmatch(name):
            raise UsageError(f"{name!r} is no name of a header")
        if name.lower() in _RESERVED_HEADERS:
            raise UsageError(f"the header {name} is not to be given: ranges are asked for by estargz")
        if re.search(r"[\x00-\x08\x0a-\x1f\x7f\u0100-\U0010ffff]", value):
            raise UsageError(f"the value of the header {name} holds characters that cannot be sent")
        checked[name.lower()] = value
    return checked


def _at_least(**values: tuple[int | None, int]) -> None:
    for name, (value, least) in values.items():
        if value is not None and value < least:
            raise UsageError(f"{name} must be {least} or more, not {value}")
