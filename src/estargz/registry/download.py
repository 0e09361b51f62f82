"""Blobs on their way from a registry; what a cut connection leaves out is asked for by a range."""

from __future__ import annotations

from urllib3 import BaseHTTPResponse
from urllib3.exceptions import HTTPError

from estargz.errors import UsageError, VerificationError
from estargz.http import Failure, check_identity, content_range
from estargz.image.model import Descriptor
from estargz.registry.host import SLOWEST, Exchange, Requests, refusal, why_broken

__all__ = ["Download", "read_part"]

_PIECE = 1 << 18
_NO_RANGES = {400, 416, 501}  # how the rest of a blob is refused by who cannot give it
_CHEAP = 4 << 20  # bytes that are read and dropped, at most, to come to a part


class Download:
    """The bytes [begin, end) of a blob as they come, not checked. ``read`` raises RegistryError, VerificationError.

    most_skipped:  bytes that may be read and dropped, should the registry not know ranges
    """

    def __init__(
        self,
        requests: Requests,
        descriptor: Descriptor,
        begin: int = 0,
        end: int | None = None,
        most_skipped: float = float("inf"),
    ) -> None:
        self._requests, self._descriptor = requests, descriptor
        self._at = self._reached = begin
        self._end = descriptor.size if end is None else end
        self._most_skipped = most_skipped
        self._asks_ranges = True
        self._tries = requests.tries()
        self._open: Exchange | None = None
        self._left = 0.0  # seconds of its deadline, which stands still while nothing is read

    def read(self, size: int, /) -> bytes:
        """At most ``size`` bytes; b"" at the end, where the registry sends no more than it should."""
        while True:
            try:
                with self._requests.reported("GET", f"blob {self._descriptor.digest}", self._tries):
                    try:
                        return self._read(size)
                    except Failure as failure:
                        in_time = self._open is None or self._open.deadline.left() > 0
                        self.close()
                        progress, self._reached = in_time and self._at > self._reached, self._at
                        self._tries.again(failure, progress=progress)
            except BaseException:
                self.close()
                raise

    def _read(self, size: int) -> bytes:
        left = self._end - self._at
        if not left and self._at and self._open is None:
            return b""
        exchange = self._open or self._begin()
        try:
            data = self._piece(exchange, min(size, _PIECE, left or 1))
        except HTTPError as error:
            if not left:
                return b""
            raise why_broken(error, exchange.deadline, exchange.place) from error
        if left and not data:
            raise Failure(f"the body ends {left} bytes too early", transient=True)
        self._at += len(data)
        return data

    def _piece(self, exchange: Exchange, size: int) -> bytes:
        exchange.deadline.extend(self._left)
        data = exchange.response.read1(size)
        self._left = exchange.deadline.left() + len(data) / SLOWEST
        return data

    def _begin(self) -> Exchange:
        whole = self._at == 0 and self._end == self._descriptor.size
        headers = {} if whole or not self._asks_ranges else {"range": f"bytes={self._at}-{self._end - 1}"}
        path = f"blobs/{self._descriptor.digest}"
        with self._requests.holding(self._requests.host.slots):
            exchange = self._open = self._requests.begin("GET", path, self._requests.scopes("pull"), headers)
        self._left = exchange.deadline.left()
        try:
            self._check(exchange.response, bool(headers))
            if exchange.response.status == 200:
                self._skip(exchange)
        except HTTPError as error:
            raise why_broken(error, exchange.deadline, exchange.place) from error
        return exchange

    def _check(self, response: BaseHTTPResponse, ranged: bool) -> None:
        """Raises Failure unless the answer has the bytes from where they are wanted, or all of them."""
        if response.status == 206 and ranged:
            begin, end, total = content_range(response)
            if (begin, end) == (self._at, self._end) and total in (None, self._descriptor.size):
                return
            self._asks_ranges = False
            raise Failure(f"answers with bytes {begin}-{end - 1} of {total}", "the registry is faulty", 206, True)
        if response.status in _NO_RANGES and ranged:
            self._asks_ranges = False
            failure = refusal(response)
            failure.transient = True
            raise failure
        if response.status != 200:
            raise refusal(response)
        check_identity(response)
        size = response.length_remaining
        if size is not None and size != self._descriptor.size:
            raise VerificationError(
                f"{self._requests.name}: blob {self._descriptor.digest} has {size} bytes at the registry, and "
                f"{self._descriptor.size} by its descriptor; the image is damaged"
            )

    def _skip(self, exchange: Exchange) -> None:
        left = self._at
        if left > self._most_skipped:
            raise Failure("the registry ignores ranges and sends the whole blob", "copy the image first", 200)
        while left:
            data = self._piece(exchange, min(left, _PIECE))
            if not data:
                raise Failure("the body ends too early", transient=True)
            left -= len(data)

    def close(self) -> None:
        """Ends the connection, unless all was read."""
        if self._open is not None:
            self._requests.end(self._open)
            self._open = None


def read_part(requests: Requests, descriptor: Descriptor, offset: int, size: int) -> bytes:
    """Bytes of a blob, not checked; fewer only where it ends. Raises RegistryError, also when the registry does not know
    ranges and the bytes do not lie near the blob's beginning."""
    if offset < 0 or size < 0:
        raise UsageError(f"{requests.name}: there are no {size} bytes at byte {offset}")
    end = min(offset + size, descriptor.size)
    download = Download(requests, descriptor, offset, end, _CHEAP)
    parts = []
    while offset < end:
        part = download.read(end - offset)
        parts.append(part)
        offset += len(part)
    download.close()
    return b"".join(parts)
