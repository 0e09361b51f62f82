"""Blobs on their way to a registry (distribution-spec, pushing blobs).

put_blob:  POST -> one PUT with the whole body; cut -> GET how much is there -> the rest, or from the beginning
Upload:    POST -> write -> chunk -> PATCH, by a thread of its own while the next chunk fills -> PUT with the digest
"""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import suppress
from types import TracebackType
from typing import Self

from urllib3.util import Url

from estargz.errors import EstargzError, RegistryError, UploadBrokenError, UsageError, VerificationError
from estargz.http import Failure, parse, printable
from estargz.image.model import Descriptor
from estargz.image.store import BlobReader
from estargz.registry.host import Answer, Body, Requests, SourceFailure
from estargz.threads import Threads

__all__ = ["Session", "StreamedUpload", "Upload", "new_upload", "put_blob"]

CHUNK_SIZE = 16 << 20
"""Bytes of a PATCH: few enough to be kept for another attempt, and so many that its round trip does not count."""

_LEAST_CHUNK = 1 << 20  # below which round trips would take most of the time
_MAX_CHUNK = 128 << 20  # a registry that wants larger ones gets the blob as one stream
_PIECE = 1 << 20
_PROGRESS = 1 << 20  # bytes that have to be sent for a failure not to count as fruitless
_PATIENCE = 600.0  # seconds that a registry may take to put a blob in its place
_ABORT_SECONDS = 5.0

_LOST = {404, 410, 416}  # the upload is no longer there, or not as it should be
_REFUSED = {400, 405, 411, 413, 415, 501}  # blobs are not taken in this way
_LOST_CODES = {"BLOB_UPLOAD_UNKNOWN", "BLOB_UPLOAD_INVALID", "RANGE_INVALID"}
_WRONG_CODES = {"DIGEST_INVALID", "SIZE_INVALID"}
_OCTETS = "application/octet-stream"


class Session:
    """An upload that a registry has opened. It is used by one thread at a time.

    offset:  bytes that the registry has
    mended:  whether that is what it said after a failure; it may have taken more from a connection that broke, later
    """

    def __init__(self, requests: Requests, opened: Answer) -> None:
        self.offset = 0
        self.mended = False
        self._requests = requests
        self.least_chunk = _number(opened.headers.get("OCI-Chunk-Min-Length"))
        self._place: Url = self._next(opened, needed=True)

    @classmethod
    def open(cls, requests: Requests) -> Self:
        """Raises RegistryError."""
        answer = requests.ask("POST", "blobs/uploads/", "upload", ok={202}, scopes=requests.scopes("pull,push"))
        with requests.reported("POST", "upload"):
            return cls(requests, answer)

    def send(self, body: Body, *, streams: bool = False) -> None:
        """Appends a chunk, or all of the blob. Raises Failure."""
        headers = {"content-type": _OCTETS}
        if body.size is not None:
            headers["content-range"] = f"{self.offset}-{self.offset + body.size - 1}"
        answer = self._once("PATCH", self._place, {201, 202, 204}, headers, body, streams=streams)
        self._place = self._next(answer)
        end = self.offset + (body.sent if body.size is None else body.size)
        stated = answer.headers.get("Range")
        if stated is not None and _end_of(stated) != end and not (end == 1 and _end_of(stated) == 0):
            # 2.8 of Docker's registry takes no notice of Content-Range; what it has is all that counts.
            raise _transient(f"says that it has {printable(stated)!r} after {end} bytes were sent")
        self.offset = end

    def close(self, digest: str, body: Body | None = None) -> None:
        """Makes the blob be there, ``body`` being all of it that the registry does not have yet. Raises Failure."""
        place = self._place._replace(query="&".join(filter(None, (self._place.query, f"digest={digest}"))))
        headers = {"content-type": _OCTETS}
        answer = self._once("PUT", place, {201, 204}, headers, body or Body.of(b""), streams=body is not None)
        check_stated_digest(self._requests, answer, digest)

    def find_out(self) -> bool:
        """Asks how much the registry has; whether it knows. Raises RegistryError when it cannot be reached."""
        scopes = self._requests.scopes("pull,push")
        try:
            answer = self._requests.ask("GET", self._place, "upload", ok={200, 202, 204}, scopes=scopes)
        except RegistryError as error:
            if error.status is None:
                raise
            return False
        with self._requests.reported("GET", "upload"):
            self._place = self._next(answer)
        end = _end_of(answer.headers.get("Range", ""))
        self.offset = self.offset if end is None else end
        self.mended = True
        return end is not None

    def cancel(self) -> None:
        """Has the registry forget it, if it can be reached soon."""
        requests = self._requests.last(_ABORT_SECONDS)
        with suppress(Failure, EstargzError):
            requests.once("DELETE", self._place, ok={200, 202, 204, 404}, scopes=requests.scopes("pull,push"))

    def _once(
        self, method: str, place: Url, ok: set[int], headers: dict[str, str], body: Body, *, streams: bool
    ) -> Answer:
        scopes = self._requests.scopes("pull,push")
        patience = _PATIENCE if method == "PUT" else None
        return self._requests.once(
            method, place, ok=ok, scopes=scopes, headers=headers, body=body, patience=patience, streams=streams
        )

    def _next(self, answer: Answer, *, needed: bool = False) -> Url:
        """Where to go on. Raises Failure."""
        location = answer.headers.get("Location")
        if location is None and not needed:
            return self._place
        if not location:
            raise Failure("the answer has no Location", "the registry is faulty", answer.status)
        try:
            url, auth = parse(location, answer.place.url)
        except ValueError as error:
            raise Failure(f"has the upload go on at a URL that {error}", "the registry is faulty") from None
        if auth is not None:
            raise Failure("has the upload go on at a URL with credentials in it", "the registry is faulty")
        if answer.place.scheme == "https" and url.scheme == "http":
            remedy = "have the registry, or the proxy before it, know that it is reached by https"
            raise Failure("has the upload go on without TLS", remedy)
        return url


def check_stated_digest(requests: Requests, answer: Answer, digest: str) -> None:
    """Raises VerificationError when a registry says that something has another digest."""
    stated = answer.headers.get("Docker-Content-Digest", digest)
    if stated.partition(":")[0] == digest.partition(":")[0] and stated != digest:
        raise VerificationError(
            f"{requests.name}: the registry stored {digest} as {printable(stated)!r}; it or a proxy is faulty"
        )


def _number(text: str | None) -> int:
    return int(text) if text and re.fullmatch(r"[0-9]{1,18}", text) else 0


def _end_of(text: str) -> int | None:
    """How many bytes a Range header of ``0-last`` says are there. Of none it says 0-0 too, as there is no other way."""
    match = re.fullmatch(r"(?:bytes=)?0-([0-9]{1,18})", text.strip())
    return None if match is None else int(match[1]) + 1 if match[1] != "0" else 0


def _transient(what: str) -> Failure:
    return Failure(what, "the registry is faulty", transient=True)


def _code(failure: Failure) -> str:
    return getattr(failure, "code", "")


def _is_lost(failure: Failure) -> bool:
    return failure.status in _LOST or _code(failure) in _LOST_CODES


def _is_wrong(requests: Requests, session: Session, failure: Failure, digest: str) -> bool:
    """Whether the registry has other bytes than were sent, where that may be. Raises VerificationError where it may not."""
    if _code(failure) in _WRONG_CODES and not session.mended:
        raise VerificationError(
            f"{requests.name}: blob {digest}: {failure.what}; it was damaged on its way, push it again"
        )
    return _code(failure) in _WRONG_CODES


# --------------------------------------------------------------------------------------------------------------------
# blobs that can be read again


def put_blob(
    requests: Requests, descriptor: Descriptor, open: Callable[[], BlobReader], session: Session | None = None
) -> None:
    """Uploads a blob, by one request where the registry takes that, else by chunks.

    session:  to begin with; else one is opened

    A connection that breaks is no end: what the registry kept of the blob is not sent again, if it can say how much that
    is; otherwise the upload begins anew. Five failures in a row are the end that come before a MiB was sent, or anything was
    kept, and fifty in all. Raises RegistryError, VerificationError, and what ``open`` and reading raise.
    """
    if not _put_whole(requests, descriptor, open, session):
        _put_chunks(requests, descriptor, open)


def _put_whole(
    requests: Requests, descriptor: Descriptor, open: Callable[[], BlobReader], session: Session | None
) -> bool:
    """Whether the registry takes blobs by one request."""
    tries, reached = requests.tries(), 0
    while True:
        session = session or Session.open(requests)
        begin = session.offset
        body = _rest(open, descriptor, begin)
        try:
            if 0 < begin < descriptor.size:
                session.send(body, streams=True)
            session.close(descriptor.digest, None if begin else body)
            return True
        except SourceFailure as failure:
            session.cancel()
            raise failure.error from None
        except Failure as failure:
            wrong = _is_wrong(requests, session, failure, descriptor.digest)
            if failure.status in _REFUSED and not wrong and not _is_lost(failure):
                session.cancel()
                return False
            failure.transient |= wrong or _is_lost(failure)
            with requests.reported("PUT", f"blob {descriptor.digest}", tries):
                tries.again(failure, progress=body.sent >= _PROGRESS or begin > reached)
            reached = begin
        if has_blob(requests, descriptor):
            return True  # the answer was all that was lost
        if wrong or not session.find_out() or session.offset > descriptor.size:
            session.cancel()
            session = None


def _rest(open: Callable[[], BlobReader], descriptor: Descriptor, offset: int) -> Body:
    def pieces() -> Generator[bytes]:
        with open() as reader:
            at = 0
            while piece := reader.read(_PIECE):
                at += len(piece)
                if at > offset:
                    yield piece[-(at - offset) :] if at - offset < len(piece) else piece

    return Body(pieces, descriptor.size - offset)


def _put_chunks(requests: Requests, descriptor: Descriptor, open: Callable[[], BlobReader]) -> None:
    tries = requests.tries()
    while True:
        with new_upload(requests, whole=False) as upload:
            try:
                with open() as reader:
                    while piece := reader.read(_PIECE):
                        upload.write(piece)
                upload.commit(descriptor.digest, descriptor.size)
                return
            except UploadBrokenError as error:
                with requests.reported("PATCH", f"blob {descriptor.digest}", tries):
                    tries.again(_transient(str(error)), progress=upload.sent >= _PROGRESS)


def has_blob(requests: Requests, descriptor: Descriptor) -> bool:
    """Whether a registry has a blob. Raises RegistryError."""
    path = f"blobs/{descriptor.digest}"
    # Storage that a HEAD is redirected to may refuse it, as its URL was signed for a GET.
    ok = {200, 403, 404, 405}
    answer = requests.ask("HEAD", path, f"blob {descriptor.digest}", ok=ok, scopes=requests.scopes("pull,push"))
    size = answer.headers.get("Content-Length", "")
    digest = answer.headers.get("Docker-Content-Digest", descriptor.digest)
    return answer.status == 200 and size in ("", str(descriptor.size)) and digest == descriptor.digest


# --------------------------------------------------------------------------------------------------------------------
# blobs whose digest is known at their end


def new_upload(requests: Requests, room: int | None = None, *, whole: bool = True) -> Upload:
    """A BlobUpload in chunks; in one stream, where the registry has refused chunks. Raises RegistryError.

    room:   bytes for the chunk that is filled and the one that is sent, which are as large as the settings say without it
    whole:  whether a blob that is no larger than a chunk is to go with the closing request
    """
    requests = requests.apart()
    session = Session.open(requests)
    chunk_size = requests.settings.chunk_size
    if room is not None:
        chunk_size = min(chunk_size, max(room // 2, _LEAST_CHUNK))
    chunk_size = max(chunk_size, session.least_chunk)
    if requests.host.takes_chunks is False or chunk_size > _MAX_CHUNK:
        return StreamedUpload(requests, session, chunk_size, whole)
    return Upload(requests, session, chunk_size, whole)


class Upload:
    """A BlobUpload: chunks of the blob, each of them kept until the registry has it.

    What ``write`` is given fills one chunk while a thread sends the one before. A chunk whose request fails is sent again,
    or what the registry has not got of it. When the registry does not say, or has lost the upload, UploadBrokenError is
    raised: begin anew with another upload, and write the blob from its first byte, from a copy or by building it again.

    A registry that refuses the first chunk gets later uploads as one stream (StreamedUpload), this one is broken. A blob
    that is no larger than a chunk goes with the closing request, which is tried as often as that of put_blob.
    """

    def __init__(self, requests: Requests, session: Session, chunk_size: int, whole: bool) -> None:
        self.sent = 0  # bytes that have left
        self._requests, self._session, self._chunk_size, self._whole = requests, session, chunk_size, whole
        self._filling = bytearray()
        self._written = 0
        self._thread: Threads | None = None
        self._sending: Future[None] | None = None
        self._ended = False
        self._ending = threading.Lock()

    def write(self, data: bytes, /) -> int:
        """Raises UploadBrokenError and RegistryError, as soon as the thread that sends has met one."""
        self._check_open()
        if self._sending is not None and self._sending.done():
            self._sending.result()
        view = memoryview(data).cast("B")
        at = 0
        while at < len(view):
            if len(self._filling) == self._chunk_size:
                self._hand_over()
            part = view[at : at + self._chunk_size - len(self._filling)]
            self._filling += part
            at += len(part)
        self._written += len(view)
        return len(view)

    def commit(self, digest: str, size: int) -> None:
        """Raises UploadBrokenError, RegistryError, VerificationError."""
        self._check_open()
        descriptor = Descriptor(_OCTETS, digest, size)  # which checks the digest
        if size != self._written:
            raise VerificationError(f"{self._requests.name}: {self._written} bytes were written of a blob of {size}")
        if self._sending is None and self._whole:
            put_blob(self._requests, descriptor, lambda: _InMemory(self._filling), self._session)
        else:
            self._finish()
            self._close(descriptor)
        self._end()

    def _check_open(self) -> None:
        if self._ended:
            raise UsageError(f"{self._requests.name}: the upload has ended")

    def _hand_over(self) -> None:
        """Gives the chunk to the thread, when that is done with the one before."""
        if self._sending is not None:
            self._sending.result()
        self._sending = self._begin(self._send, self._filling)
        self._filling = bytearray()

    def _begin(self, send: Callable[..., None], *given: bytearray) -> Future[None]:
        with self._ending:  # another thread may abort meanwhile
            self._check_open()
            if self._thread is None:
                self._thread = Threads(1, thread_name_prefix="estargz-upload")
            return self._thread.submit(send, *given)

    def _finish(self) -> None:
        """Sends what is left, and waits until all is sent."""
        if self._filling:
            self._hand_over()
        if self._sending is not None:
            self._sending.result()

    def _send(self, chunk: bytearray) -> None:
        session, begin = self._session, self._session.offset
        end = begin + len(chunk)
        tries, reached = self._requests.tries(), begin
        while session.offset < end:
            before = session.offset
            body = Body.of(memoryview(chunk)[before - begin :])
            try:
                session.send(body)
                if before > 0:
                    self._requests.host.takes_chunks = True
            except Failure as failure:
                if self._is_refused(failure):
                    self._requests.host.takes_chunks = False
                moved = failure.status == 416  # the registry went on with a connection that had broken, perhaps
                if self._requests.host.takes_chunks is False or (_is_lost(failure) and not moved):
                    raise self._broken(failure) from failure
                failure.transient |= moved
                with self._requests.reported("PATCH", "blob", tries):
                    tries.again(failure, progress=body.sent >= _PROGRESS or before > reached)
                reached = before
                if not session.find_out() or not begin <= session.offset <= end:
                    raise self._broken(failure) from failure
            self.sent = session.offset

    def _is_refused(self, failure: Failure) -> bool:
        """Whether it seems that the registry takes no chunks: it never has, and does not say that the upload is gone."""
        if self._requests.host.takes_chunks is not None or _code(failure) in _LOST_CODES - {"RANGE_INVALID"}:
            return False
        return failure.status in _REFUSED or (failure.status == 416 and not self._session.mended)

    def _broken(self, failure: Failure) -> UploadBrokenError:
        return UploadBrokenError(f"{self._requests.name}: PATCH blob: {failure.what}; the upload has to begin again")

    def _close(self, descriptor: Descriptor) -> None:
        tries = self._requests.tries()
        while True:
            try:
                return self._session.close(descriptor.digest)
            except Failure as failure:
                wrong = _is_wrong(self._requests, self._session, failure, descriptor.digest)
                lost = wrong or _is_lost(failure)
                if not lost:
                    with self._requests.reported("PUT", f"blob {descriptor.digest}", tries):
                        tries.again(failure)
                if has_blob(self._requests, descriptor):
                    return None
                if lost or not self._session.find_out() or self._session.offset != descriptor.size:
                    raise self._broken(failure) from failure

    def abort(self) -> None:
        """Drops what was sent; what is under way ends. Any thread may say so."""
        if self._end():
            self._session.cancel()

    def _end(self) -> bool:
        """Whether it had not ended before."""
        with self._ending:
            ended, self._ended = self._ended, True
        if not ended:
            self._requests.close()
            if self._thread is not None:
                self._thread.shutdown()
        return not ended

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()


class StreamedUpload(Upload):
    """The same by a single PATCH, which ends when the blob does. All registries take that; none goes on after a failure."""

    def __init__(self, requests: Requests, session: Session, chunk_size: int, whole: bool) -> None:
        super().__init__(requests, session, min(chunk_size, _PIECE), whole)
        self._pieces: queue.Queue[bytearray | None] = queue.Queue(2)
        self._begun = False

    def _hand_over(self) -> None:
        if self._sending is None:
            self._sending = self._begin(self._stream)
        self._pass_on(self._filling)
        self._filling = bytearray()

    def _pass_on(self, piece: bytearray | None) -> None:
        assert self._sending is not None
        while not self._sending.done():
            with suppress(queue.Full):
                return self._pieces.put(piece, timeout=0.1)
        self._sending.result()

    def _finish(self) -> None:
        if self._filling:
            self._hand_over()
        self._pass_on(None)
        super()._finish()

    def _stream(self) -> None:
        body = Body(self._taken, None)
        try:
            self._session.send(body, streams=True)
        except Failure as failure:
            if failure.transient or _is_lost(failure):
                raise self._broken(failure) from failure
            with self._requests.reported("PATCH", "blob"):
                raise
        finally:
            self.sent = body.sent

    def _taken(self) -> Generator[memoryview]:
        if self._begun:
            raise _transient("asks for the whole blob again")
        self._begun = True
        while (piece := self._pieces.get()) is not None:
            yield memoryview(piece)

    def abort(self) -> None:
        with suppress(queue.Full):
            self._pieces.put_nowait(None)  # who sends may wait for the next piece
        super().abort()


class _InMemory:
    """A BlobReader of what is at hand."""

    name = "blob"

    def __init__(self, data: bytearray) -> None:
        self._data, self._at = memoryview(data), 0

    def read(self, size: int, /) -> bytes:
        piece = bytes(self._data[self._at : self._at + size])
        self._at += len(piece)
        return piece

    def close(self) -> None:
        self._data.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
