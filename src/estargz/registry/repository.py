"""A repository of a registry, to read images from and to write them to."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from weakref import WeakSet

from estargz.errors import ImageError, RegistryError, VerificationError
from estargz.http import Pools, printable
from estargz.image.model import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    MAX_MANIFEST_SIZE,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    decode,
    digest_of,
    is_index,
    is_manifest,
)
from estargz.image.reference import Reference, check_tag
from estargz.image.store import BlobReader, BlobUpload, VerifyingReader, read_small
from estargz.reading.http import HttpSource
from estargz.registry.download import Download, read_part
from estargz.registry.host import Answer, Body, Requests
from estargz.registry.upload import Session, Upload, check_stated_digest, has_blob, new_upload, put_blob

__all__ = ["Repository"]

_NO_MOUNT = {400, 401, 403, 404, 405}  # how registries, and their token servers, refuse it
_ACCEPT = ", ".join((OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST))


class Repository:
    """An ImageSource and an ImageTarget. Get it from Registries; its methods may be called from several threads.

    All of them raise RegistryError when the registry refuses or cannot be reached, and UsageError once it is closed.
    """

    remote = True

    def __init__(self, requests: Requests, reference: Reference, pools: Pools, alone: bool = False) -> None:
        self.name = str(reference)
        self._requests, self._reference, self._pools = requests, reference, pools
        self._alone = alone  # nobody else has these connections
        self._seen: tuple[Descriptor, bytes] | None = None  # the manifest or index that was resolved or stored last
        self._uploads: WeakSet[Upload] = WeakSet()
        self._sources: WeakSet[HttpSource] = WeakSet()
        self._lock = threading.Lock()

    def stop(self) -> None:
        """What is under way ends with an error, at once and whichever thread waits for it; nothing can be begun."""
        self._requests.close()
        with self._lock:
            sources = list(self._sources)
        for source in sources:
            source.close()

    def close(self) -> None:
        """The same, and uploads are dropped, of which the registry is told if it listens. It takes less than a second, and
        doing it twice does no harm."""
        self.stop()
        with self._lock:
            uploads = list(self._uploads)
        for upload in uploads:
            upload.abort()
        if self._alone:
            self._pools.close()

    # ----------------------------------------------------------------------------------------------------------------
    # source

    def resolve(self) -> Descriptor:
        """The manifest or index that the reference names. Raises ImageError when there is none, or the registry says two
        things about it; VerificationError when its digest is not that of the reference."""
        wanted = self._reference.digest
        name = wanted or self._reference.tag or ""
        try:
            answer = self._manifest(name, {"accept": _ACCEPT}, MAX_MANIFEST_SIZE)
        except RegistryError as error:
            if error.status != 404:
                raise
            raise ImageError(
                f"{self.name}: {error.code or '404 Not Found'}: there is no such image; check the name"
            ) from error
        stated = answer.headers.get("Docker-Content-Digest")
        for digest in filter(None, (wanted, stated)):
            self._check_digest(answer.data, digest)
        descriptor = Descriptor(self._media_type(answer), wanted or digest_of(answer.data), len(answer.data))
        self._seen = descriptor, answer.data
        return descriptor

    def _manifest(self, name: str, headers: Mapping[str, str], limit: int) -> Answer:
        return self._requests.ask(
            "GET",
            f"manifests/{name}",
            f"manifest {name}",
            ok={200},
            scopes=self._requests.scopes("pull"),
            headers=headers,
            limit=limit,
        )

    def _check_digest(self, data: bytes, digest: str) -> None:
        algorithm = "sha512" if digest.startswith("sha512:") else "sha256"
        found = f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"
        if found != digest:
            raise VerificationError(
                f"{self.name}: the manifest has the digest {found}, not {printable(digest)}; the registry or a proxy is faulty"
            )

    def _media_type(self, answer: Answer) -> str:
        """What a manifest is, by what it says and by how it was stored, which must not differ. Raises ImageError."""
        stored = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        stated = decode(answer.data, f"{self.name}: the manifest").get("mediaType")
        if stated is None:
            stated = stored
        if not isinstance(stated, str) or not (is_manifest(stated) or is_index(stated)):
            raise ImageError(
                f"{self.name}: is of the type {str(stated)[:200]!r}, which is no image; have it converted to OCI"
            )
        if stored != stated and (is_manifest(stored) or is_index(stored)):
            raise ImageError(f"{self.name}: the manifest says that it is {stated!r}, and was stored as {stored!r}")
        return stated

    def read(self, descriptor: Descriptor) -> bytes:
        """A manifest, index or configuration. Raises VerificationError for other bytes, ImageError for too many."""
        seen = self._seen
        if seen is not None and seen[0].digest == descriptor.digest:
            data = seen[1]
        elif not is_manifest(descriptor.media_type) and not is_index(descriptor.media_type):
            return read_small(self.open(descriptor), descriptor)
        else:
            headers = {"accept": descriptor.media_type}
            data = self._manifest(descriptor.digest, headers, MAX_MANIFEST_SIZE).data
            self._check_digest(data, descriptor.digest)
        if len(data) != descriptor.size:
            raise VerificationError(
                f"{self.name}: {descriptor.digest} has {len(data)} bytes, and {descriptor.size} by its descriptor"
            )
        return data

    def open(self, descriptor: Descriptor) -> BlobReader:
        """A layer or another blob. A connection that breaks is made anew, and goes on where the other ended."""
        return VerifyingReader(Download(self._requests, descriptor), descriptor, self.name)

    def read_at(self, descriptor: Descriptor, offset: int, size: int) -> bytes:
        """Bytes of a blob, not checked. A registry that does not know ranges gives those of its first 4 MiB only."""
        return read_part(self._requests, descriptor, offset, size)

    def range_source(self, descriptor: Descriptor) -> HttpSource:
        """A layer to be read lazily, with the credentials of this repository; it is closed with it at the latest."""
        requests = self._requests
        with requests.reported("GET", f"blob {descriptor.digest}"):
            url = requests.url(f"blobs/{descriptor.digest}")
        granted: list[str] = []

        def authorize(challenge: str) -> Mapping[str, str]:
            sent = granted[-1] if granted else None
            with requests.reported("GET", f"blob {descriptor.digest}"):
                header = requests.host.authorize(requests, challenge, sent, requests.scopes("pull"))
            granted[:] = [header] if header else []
            return {"authorization": header} if header else {}

        settings = requests.settings
        source = HttpSource(
            url.url,
            authorize=authorize,
            size=descriptor.size,
            timeout=settings.timeout,
            deadline=settings.deadline,
            parallel=settings.parallel,
            pool=self._pools,
            sleep=settings.sleep,
        )
        with self._lock:
            self._sources.add(source)
        return source

    # ----------------------------------------------------------------------------------------------------------------
    # target

    def has(self, descriptor: Descriptor) -> bool:
        """Whether the blob or manifest is there."""
        if not is_manifest(descriptor.media_type) and not is_index(descriptor.media_type):
            return has_blob(self._requests, descriptor)
        answer = self._requests.ask(
            "HEAD",
            f"manifests/{descriptor.digest}",
            f"manifest {descriptor.digest}",
            ok={200, 404},
            scopes=self._requests.scopes("pull,push"),
            headers={"accept": descriptor.media_type},
        )
        stated = answer.headers.get("Docker-Content-Digest", descriptor.digest)
        return answer.status == 200 and stated == descriptor.digest

    def link(self, descriptor: Descriptor, source: object) -> bool:
        """Mounts a blob of another repository of the same registry, if it allows that."""
        if not isinstance(source, Repository) or source._requests.host is not self._requests.host:
            return False
        if source._requests.repository == self._requests.repository:
            return has_blob(self._requests, descriptor)
        requests, origin = self._requests, source._requests
        try:
            answer = requests.ask(
                "POST",
                f"blobs/uploads/?mount={descriptor.digest}&from={origin.repository}",
                f"mount {descriptor.digest}",
                ok={201, 202},
                scopes=(*requests.scopes("pull,push"), *origin.scopes("pull")),
            )
        except RegistryError as error:
            if error.status in _NO_MOUNT:
                return False
            raise
        with requests.reported("POST", f"mount {descriptor.digest}"):
            if answer.status == 202:  # not known there: the registry has opened an upload instead
                Session(requests, answer).cancel()
            if answer.status == 201:
                check_stated_digest(requests, answer, descriptor.digest)
        return answer.status == 201

    def upload(self, room: int | None = None) -> BlobUpload:
        """A blob whose digest is known at its end: see estargz.registry.upload.Upload, also for when to begin again.

        room:  bytes that its chunks may take in memory; a chunk has a MiB at least, and what the registry wants of one
        """
        upload = new_upload(self._requests, room)
        with self._lock:
            self._uploads.add(upload)
        return upload

    def put(self, descriptor: Descriptor, open: Callable[[], BlobReader]) -> None:
        """A blob that can be read again: see estargz.registry.upload.put_blob for how often that may happen."""
        if not has_blob(self._requests, descriptor):
            put_blob(self._requests, descriptor, open)

    def put_manifest(self, media_type: str, data: bytes, tags: Sequence[str] = ()) -> Descriptor:
        """Stores a manifest or index by its digest, and under each of the tags. Raises UsageError for what is no tag, before
        anything is sent; VerificationError when the registry says that it has another digest."""
        descriptor = Descriptor(media_type, digest_of(data), len(data))
        for name in (descriptor.digest, *[check_tag(tag) for tag in tags]):
            self._put_manifest(name, descriptor, data)
        self._seen = descriptor, data
        return descriptor

    def _put_manifest(self, name: str, descriptor: Descriptor, data: bytes) -> None:
        answer = self._requests.ask(
            "PUT",
            f"manifests/{name}",
            f"manifest {name}",
            ok={201},
            scopes=self._requests.scopes("pull,push"),
            headers={"content-type": descriptor.media_type},
            body=Body.of(data),
        )
        check_stated_digest(self._requests, answer, descriptor.digest)

    def finish(self, root: Descriptor) -> None:
        """Points the tag of the reference at the image."""
        if self._reference.tag is not None:
            self._put_manifest(self._reference.tag, root, self.read(root))
