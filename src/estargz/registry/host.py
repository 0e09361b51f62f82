"""Requests to one registry: its scheme, who one is to it, redirects, failures and how often they are tried again.

Requests.ask -> slot -> credentials -> connection -> redirects, 401 -> answer | Failure -> pause, again | RegistryError
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakSet

from urllib3 import BaseHTTPResponse, HTTPHeaderDict, Timeout
from urllib3.exceptions import HTTPError
from urllib3.util import Url, parse_url

from estargz.errors import RegistryError, UsageError
from estargz.http import (
    REDIRECTS,
    TRANSIENT,
    USER_AGENT,
    Deadline,
    Exchanges,
    Failure,
    Pools,
    broken,
    is_loopback,
    let_go,
    origin,
    overloaded,
    pause,
    printable,
    redacted,
    redirected,
    status_text,
)
from estargz.image.reference import DOCKER_HUB
from estargz.registry.auth import Authority
from estargz.registry.credentials import Credential, Credentials

__all__ = ["Answer", "Body", "Exchange", "Host", "Requests", "Settings", "SourceFailure", "Tries"]

MAX_FRUITLESS = 5
"""Failures in a row, none of which brought anything forward, after which nothing is tried again."""

MAX_TRIES = 50
"""Failures in all, after which nothing is tried again."""

SLOWEST = 1 << 14
"""Bytes a second, below which what is moved of a blob comes to its deadline."""

_MAX_RETRY_AFTER = 60.0  # seconds; a server that asks for more is asked again all the same
_GLANCE = 0.1  # seconds that a lock is waited for between two looks whether it is still wanted
_FAREWELL = 0.5  # seconds that what closes may go on to speak
_PIECE = 1 << 18  # bytes that are sent between two looks at the clock
_MAX_ANSWER = 1 << 20  # bytes of an answer that is no content
_MAX_ERROR = 1 << 16
_HUB_SERVER = "registry-1.docker.io"
_TLS_MISSING = {301, 302, 307, 308, 400}  # what is said to who speaks plain HTTP where TLS is meant

_REMEDIES = {
    401: "check the credentials, as docker login or podman login keeps them",
    403: "check the credentials and what they allow",
    404: "check the name",
    413: "the registry, or a proxy before it, takes nothing as large as that",
    429: "try again later",
}


@dataclass(frozen=True, slots=True)
class Settings:
    """How a run deals with all registries; Registries has the meanings."""

    timeout: float
    deadline: float
    parallel: int
    chunk_size: int
    insecure: bool | set[str]
    sleep: Callable[[float], object] | None

    def is_insecure(self, url: Url) -> bool:
        """Whether its certificate is not to be checked, and it may have none."""
        if isinstance(self.insecure, bool):
            return self.insecure
        return url.host in self.insecure or (url.netloc or "") in self.insecure

    def allows_plain(self, url: Url) -> bool:
        """Whether it may be spoken to, and given credentials, without TLS."""
        return is_loopback(url) or self.is_insecure(url)


class Body:
    """What is sent: pieces that are made anew for each attempt, and how many bytes they are; None: nobody knows."""

    def __init__(self, pieces: Callable[[], Generator[bytes | memoryview]], size: int | None) -> None:
        self.size = size
        self.sent = 0  # bytes, by the last attempt
        self._pieces = pieces

    @classmethod
    def of(cls, data: bytes | bytearray | memoryview) -> Body:
        """One that lies in memory."""
        view = memoryview(data)
        return cls(lambda: (view[at : at + _PIECE] for at in range(0, len(view), _PIECE)), len(view))

    def pieces(self, deadline: Deadline) -> Generator[bytes | memoryview]:
        """Raises SourceFailure for what making them raised, since errors of the system would be taken for the network's."""
        self.sent = 0
        pieces = self._pieces()
        try:
            while (piece := self._next(pieces)) is not None:
                if deadline.left() <= 0:
                    raise late(deadline, None)
                yield piece
                self.sent += len(piece)
        finally:
            pieces.close()

    def _next(self, pieces: Iterator[bytes | memoryview]) -> bytes | memoryview | None:
        try:
            return next(pieces, None)
        except Failure:
            raise
        except Exception as error:
            raise SourceFailure(error) from error


class SourceFailure(Exception):
    """What is sent could not be read; ``error`` says why."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


class Exchange(NamedTuple):
    """An answer whose body is not read yet, and until when it has to be."""

    response: BaseHTTPResponse
    deadline: Deadline
    place: Url
    """Where it came from, redirects followed."""


class Answer(NamedTuple):
    """An answer that has been read."""

    status: int
    headers: HTTPHeaderDict
    data: bytes
    place: Url
    """Where it came from, redirects followed."""


class _Refusal(Failure):
    """An answer that says no."""

    code = ""  # the distribution-spec's


class Tries:
    """When to try again: until MAX_FRUITLESS failures in a row or MAX_TRIES in all, with pauses that grow."""

    def __init__(self, sleep: Callable[[float], object]) -> None:
        self._sleep = sleep
        self._in_a_row = self.count = 0

    def again(self, failure: Failure, *, progress: bool = False) -> None:
        """Waits until the next attempt. Raises the failure when there is to be none.

        progress:  whether the attempt that failed brought something forward
        """
        self.count += 1
        self._in_a_row = 1 if progress else self._in_a_row + 1
        if not failure.transient or self._in_a_row >= MAX_FRUITLESS or self.count >= MAX_TRIES:
            raise failure
        self._sleep(max(pause(self._in_a_row), min(failure.retry_after or 0.0, _MAX_RETRY_AFTER)))


# --------------------------------------------------------------------------------------------------------------------


class Host:
    """A registry, for all who ask it."""

    def __init__(self, name: str, settings: Settings, pools: Pools, credentials: Credentials) -> None:
        self.name, self.settings = name, settings
        self.slots = threading.BoundedSemaphore(settings.parallel)
        self.takes_chunks: bool | None = None  # whether it takes a blob by several requests; None: not known yet
        self._pools, self._credentials = pools, credentials
        self._authority: Authority | None = None
        self._found: Url | None = None
        self._finding = threading.Lock()

    def home(self, requests: Requests) -> Url:
        """Its URL. At first it is asked whether it speaks TLS, and what it wants to see. Raises Failure, and UsageError for
        requests that are closed.

        A loopback address is asked without TLS first, and one that is marked as insecure last; others only with it.
        """
        with requests.holding(self._finding):
            requests.check_open()  # while others tried in vain, perhaps
            if self._found is None:
                server = parse_url(f"https://{_HUB_SERVER if self.name == DOCKER_HUB else self.name}")
                schemes = ["https"]
                if self.settings.is_insecure(server):
                    schemes = ["https", "http"]
                if is_loopback(server):
                    schemes = ["http", "https"]
                self._found = self._find([server._replace(scheme=scheme) for scheme in schemes], requests)
            return self._found

    def _find(self, homes: list[Url], requests: Requests) -> Url:
        tries = requests.tries()
        while True:
            failures = []
            for home in homes:
                try:
                    self._greet(home, requests)
                    return home
                except Failure as failure:
                    failures.append(failure)
                    if failure.status is not None and failure.status not in _TLS_MISSING:
                        break
                    if failure.transient and home.scheme == "http" and not tries.count:
                        break  # once more, rather than take a cut connection for a sign
            # A certificate that is not trusted tells more than that plain HTTP was not understood.
            tries.again(next((failure for failure in reversed(failures) if not failure.transient), failures[0]))

    def _greet(self, home: Url, requests: Requests) -> None:
        """Asks whether a registry is there, and what it wants to see. Raises Failure."""
        place = home._replace(path="/v2/")
        with requests.under_way(self.settings.timeout) as deadline:
            response = self._exchange("GET", place, {}, None, deadline, self.settings.timeout)
            try:
                if response.status in TRANSIENT:
                    raise overloaded(response)
                if home.scheme == "http" and response.status in _TLS_MISSING:
                    raise Failure(status_text(response.status), "check the address", response.status)
                self._authority = Authority(home, self._credential, self.settings.allows_plain, self._token_server)
                if response.status == 401:
                    self._authority.take(requests, response.headers.get("WWW-Authenticate", ""), ())
            except Failure as failure:
                failure.place = place
                raise
            finally:
                deadline.release()
                let_go(response)

    def is_away(self, place: Url) -> bool:
        """Whether a URL is not one of this registry."""
        return self._found is not None and origin(place) != origin(self._found)

    def _credential(self, repository: str) -> Credential | None:
        return self._credentials.of(self.name, repository)

    def authorize(self, requests: Requests, challenge: str, sent: str | None, scopes: tuple[str, ...]) -> str | None:
        """The Authorization header that answers a challenge to a request that had ``sent``. Raises Failure, UsageError."""
        assert self._authority is not None
        renewed = self._authority.challenged(requests, challenge, sent, scopes)
        return self._authority.header(requests, scopes) if renewed else None

    def send(
        self,
        requests: Requests,
        method: str,
        url: Url,
        *,
        scopes: tuple[str, ...],
        headers: Mapping[str, str],
        body: Body | None,
        deadline: Deadline,
        patience: float,
    ) -> Exchange:
        """The answer to a request: credentials and redirects are seen to. Raises Failure."""
        assert self._authority is not None and self._found is not None
        place, hops, renewed = url, 0, False
        while True:
            own = origin(place) == origin(self._found)
            sent = self._authority.header(requests, scopes) if own else None
            shown = {**headers, "authorization": sent} if sent else headers
            response = self._exchange(method, place, shown, body, deadline, patience)
            try:
                status = response.status
                if status in REDIRECTS and (method in ("GET", "HEAD") or status in (307, 308)):
                    hops += 1
                    place = redirected(response, place, hops)
                elif own and not renewed and self._renews(requests, response, sent, scopes):
                    renewed = True
                else:
                    return Exchange(response, deadline, place)
            except Failure as failure:
                failure.place = failure.place or place
                let_go(response)
                raise
            deadline.release()
            let_go(response)

    def _renews(
        self, requests: Requests, response: BaseHTTPResponse, sent: str | None, scopes: tuple[str, ...]
    ) -> bool:
        """Whether a request that was refused can show something else. Some say 403 of a token whose time has run out."""
        assert self._authority is not None
        if response.status == 401:
            challenge = response.headers.get("WWW-Authenticate", "")
            return self._authority.challenged(requests, challenge, sent, scopes)
        return response.status == 403 and self._authority.outlived(requests, sent, scopes)

    def _exchange(
        self,
        method: str,
        place: Url,
        headers: Mapping[str, str],
        body: Body | None,
        deadline: Deadline,
        patience: float,
    ) -> BaseHTTPResponse:
        left = deadline.left()
        if left <= 0:
            raise late(deadline, place)
        framing = {} if body is None or body.size is None else {"content-length": str(body.size)}
        pieces = None if body is None else body.pieces(deadline)
        try:
            with deadline.applies():
                return self._pools.of(place).urlopen(
                    method,
                    place.url,
                    body=pieces,
                    chunked=body is not None and body.size is None,
                    headers={"user-agent": USER_AGENT, "accept-encoding": "identity", **headers, **framing},
                    timeout=Timeout(connect=min(self.settings.timeout, left), read=min(patience, left)),
                    retries=False,
                    redirect=False,
                    preload_content=False,
                    decode_content=False,
                )
        except HTTPError as error:
            deadline.release()
            raise why_broken(error, deadline, place) from error
        except Failure as failure:
            failure.place = place
            raise
        finally:
            if pieces is not None:
                pieces.close()  # what they are read from, too

    def _token_server(
        self, requests: Requests, method: str, url: Url, headers: Mapping[str, str], form: bytes | None
    ) -> bytes:
        """What a token server answers. Credentials in the headers go to its own origin alone."""
        tries = requests.tries()
        while True:
            try:
                with requests.under_way(self.settings.timeout) as deadline:
                    return self._ask_token_server(method, url, headers, form, deadline)
            except Failure as failure:
                try:
                    tries.again(failure)
                except Failure:
                    failure.transient = False  # or else it would be tried as often for every try of the request
                    raise

    def _ask_token_server(
        self, method: str, url: Url, headers: Mapping[str, str], form: bytes | None, deadline: Deadline
    ) -> bytes:
        place, hops = url, 0
        while True:
            shown = headers if origin(place) == origin(url) else {}
            body = None if form is None else Body.of(form)
            response = self._exchange(method, place, shown, body, deadline, self.settings.timeout)
            try:
                if response.status == 200:
                    return read_answer(response, _MAX_ANSWER)
                if response.status not in REDIRECTS or method != "GET":
                    raise refusal(response)
                hops += 1
                place = redirected(response, place, hops)
            except HTTPError as error:
                raise why_broken(error, deadline, place) from error
            except Failure as failure:
                failure.place = place
                raise
            finally:
                deadline.release()
                let_go(response)


# --------------------------------------------------------------------------------------------------------------------


class Requests:
    """What is asked of a registry about one repository.

    name:     the reference, for messages
    until:    when they close by themselves, by the monotonic clock
    whole:    those of the repository, of which these are a part
    """

    def __init__(
        self, host: Host, repository: str, name: str, until: float = math.inf, whole: Requests | None = None
    ) -> None:
        self.host, self.repository, self.name = host, repository, name
        self.settings = host.settings
        self._until, self._whole = until, whole
        self._exchanges = Exchanges()
        self._apart: WeakSet[Requests] = WeakSet()
        self._farewell = math.inf  # until when something may be asked all the same
        self._lock = threading.Lock()
        self._pause = self._exchanges.closed.wait if self.settings.sleep is None else self.settings.sleep

    def apart(self, until: float = math.inf) -> Requests:
        """The same, to be closed before these, or with them."""
        requests = self._part(until)
        with self._lock:
            self._apart.add(requests)
            if self._exchanges.closed.is_set():
                requests.close()
        return requests

    def last(self, seconds: float) -> Requests:
        """The same for a last word, though these may be closed: for so many seconds, but once all of the repository's are
        closed, or if they are, only for a moment."""
        whole, until = self._whole or self, time.monotonic() + seconds
        if not whole._exchanges.closed.is_set():
            return whole.apart(until)
        return self._part(min(until, whole._farewell))

    def _part(self, until: float) -> Requests:
        return Requests(self.host, self.repository, self.name, until, self._whole or self)

    def scopes(self, actions: str) -> tuple[str, ...]:
        """Of a token that allows ``pull`` or ``pull,push``."""
        return (f"repository:{self.repository}:{actions}",)

    def check_open(self) -> None:
        """Raises UsageError once they are closed."""
        if self._exchanges.closed.is_set() or time.monotonic() >= self._until:
            raise UsageError(f"{self.name}: is closed")

    @contextmanager
    def holding(self, lock: threading.Lock | threading.Semaphore) -> Iterator[None]:
        """A lock or a slot. Whoever has it may have to wait for long: raises UsageError when these are closed sooner."""
        while not lock.acquire(timeout=_GLANCE):
            self.check_open()
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def under_way(self, seconds: float) -> Iterator[Deadline]:
        """Something that ends when these are closed. Raises UsageError when they are."""
        self.check_open()
        with self._exchanges.one(min(seconds, self._until - time.monotonic())) as deadline:
            yield deadline

    def tries(self) -> Tries:
        """For something that begins."""
        return Tries(lambda seconds: self._pause(max(min(seconds, self._until - time.monotonic()), 0.0)))

    def close(self) -> None:
        """What is under way ends with an error, wherever it waits; only names are still looked up to the end. Closing twice
        does no harm."""
        with self._lock:
            self._farewell = min(self._farewell, time.monotonic() + _FAREWELL)
            self._exchanges.close()
            apart = list(self._apart)
        for requests in apart:
            requests.close()

    def url(self, path: str) -> Url:
        """Of something in the repository, with its query. Raises Failure when the registry cannot be reached.

        path:  is made of what has been checked: digests, tags, and names of repositories
        """
        path, _, query = path.partition("?")
        home = self.host.home(self)
        return home._replace(path=f"/v2/{self.repository}/{path}", query=query or None)

    def ask(
        self,
        method: str,
        path: str | Url,
        what: str,
        *,
        ok: Collection[int],
        scopes: tuple[str, ...],
        headers: Mapping[str, str] | None = None,
        body: Body | None = None,
        limit: int = _MAX_ANSWER,
    ) -> Answer:
        """An answer with one of the statuses ``ok``; for requests that may be repeated.

        what:   is asked for, in messages
        limit:  of its body, in bytes

        Raises RegistryError.
        """
        tries = self.tries()
        while True:
            try:
                return self.once(method, path, ok=ok, scopes=scopes, headers=headers, body=body, limit=limit)
            except Failure as failure:
                with self.reported(method, what, tries):
                    tries.again(failure)

    @contextmanager
    def reported(self, method: str, what: str, tries: Tries | None = None) -> Iterator[None]:
        """Raises RegistryError for a Failure."""
        try:
            yield
        except Failure as failure:
            raise self._error(failure, method, what, tries.count if tries else 1) from failure.__cause__

    def _error(self, failure: Failure, method: str, what: str, attempts: int) -> RegistryError:
        tried = f", after {attempts} attempts" if attempts > 1 else ""
        remedy = failure.remedy or "check the network, then try again"
        place = failure.place
        away = place is not None and self.host.is_away(place)
        where = f" at {redacted(place._replace(path=None, query=None))}" if place is not None and away else ""
        error = RegistryError(f"{self.name}: {method} {what}{where}: {failure.what}{tried}; {remedy}")
        error.method, error.status = method, failure.status
        error.url = "" if place is None else redacted(place)
        error.code = failure.code if isinstance(failure, _Refusal) else ""
        return error

    def once(
        self,
        method: str,
        path: str | Url,
        *,
        ok: Collection[int],
        scopes: tuple[str, ...],
        headers: Mapping[str, str] | None = None,
        body: Body | None = None,
        limit: int = _MAX_ANSWER,
        patience: float | None = None,
        streams: bool = False,
    ) -> Answer:
        """The same by one attempt. Raises Failure, and SourceFailure.

        patience:  seconds that the registry may take until it answers, where it has much to do
        streams:   the body waits for others, so it must not take the place of requests that these wait for
        """
        with (
            nullcontext() if streams else self.holding(self.host.slots),
            self._exchange(method, path, scopes, headers, body, patience) as (response, _, place),
        ):
            if response.status not in ok:
                raise refusal(response)
            return Answer(response.status, response.headers, read_answer(response, limit), place)

    @contextmanager
    def _exchange(self, *request: Any) -> Iterator[Exchange]:
        exchange = self.begin(*request)
        try:
            yield exchange
        except HTTPError as error:
            raise why_broken(error, exchange.deadline, exchange.place) from error
        except Failure as failure:
            failure.place = failure.place or exchange.place
            raise
        finally:
            self.end(exchange)

    def begin(
        self,
        method: str,
        path: str | Url,
        scopes: tuple[str, ...],
        headers: Mapping[str, str] | None = None,
        body: Body | None = None,
        patience: float | None = None,
    ) -> Exchange:
        """An answer that goes to ``end`` when it is read. Raises Failure."""
        settings = self.settings
        size = 0 if body is None else math.inf if body.size is None else body.size
        seconds = max(settings.deadline, patience or 0.0) + size / SLOWEST
        self.check_open()
        deadline = self._exchanges.begin(min(seconds, self._until - time.monotonic()))
        try:
            return self.host.send(
                self,
                method,
                self.url(path) if isinstance(path, str) else path,
                scopes=scopes,
                headers=headers or {},
                body=body,
                deadline=deadline,
                patience=settings.timeout if patience is None else patience,
            )
        except BaseException:
            self._exchanges.end(deadline)
            raise

    def end(self, exchange: Exchange) -> None:
        """Keeps the connection if it can be used again."""
        self._exchanges.end(exchange.deadline)
        let_go(exchange.response)


# --------------------------------------------------------------------------------------------------------------------
# answers


def read_answer(response: BaseHTTPResponse, limit: int) -> bytes:
    """All of a body. Raises Failure when it is longer than ``limit`` bytes, HTTPError when it is cut."""
    parts, left = [], limit + 1
    while left and (part := response.read1(min(left, _PIECE))):
        parts.append(part)
        left -= len(part)
    if not left:
        raise Failure(f"answers with more than {limit} bytes", "the registry is faulty", response.status)
    return b"".join(parts)


def refusal(response: BaseHTTPResponse) -> Failure:
    """Why a registry says no: by its status, and by what it says besides (distribution-spec, error codes)."""
    status = response.status
    failure = _Refusal(status_text(status), _REMEDIES.get(status, "check the registry"), status)
    if status in TRANSIENT:
        known = overloaded(response)
        failure.transient, failure.retry_after, failure.remedy = True, known.retry_after, known.remedy
    try:
        failure.code, message = _stated_error(read_answer(response, _MAX_ERROR))
    except (HTTPError, Failure):
        return failure
    if said := f"{failure.code} {message}".strip():
        failure.what += f", {said}"
    return failure


def _stated_error(data: bytes) -> tuple[str, str]:
    try:
        first = json.loads(data)["errors"][0]
        code, message = first.get("code"), first.get("message")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return "", ""
    code = code if isinstance(code, str) and re.fullmatch(r"[A-Z0-9_]{1,64}", code) else ""
    message = message if isinstance(message, str) else ""
    # It is the registry's text: what looks like a URL may hold a signature.
    return code, printable(re.sub(r"\?[^\s\"']+", "?REDACTED", message)[:200])


def late(deadline: Deadline, place: Url | None) -> Failure:
    """Of what was not done by its deadline."""
    failure = Failure("was given up" if deadline.cancelled else "not done in time", "try again later")
    failure.transient = not deadline.cancelled
    failure.place = place
    return failure


def why_broken(error: HTTPError, deadline: Deadline, place: Url | None) -> Failure:
    """Of what urllib3 raised."""
    failure = late(deadline, place) if deadline.left() <= 0 else broken(error)
    failure.place = place
    return failure
