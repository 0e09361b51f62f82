"""Registries, shared by all that a run reads and writes: connections, tokens, credentials.

Reference -> Registries.repository -> Repository -> Requests -> Host -> connections
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self
from weakref import WeakSet

from urllib3.util import Url

from estargz.errors import UsageError
from estargz.http import Pools, Trust, check_certificates, is_loopback
from estargz.image.reference import Reference
from estargz.registry.credentials import Credentials
from estargz.registry.host import Host, Requests, Settings
from estargz.registry.repository import Repository
from estargz.registry.upload import CHUNK_SIZE

__all__ = ["Registries"]

_CERTIFICATES = ("/etc/containers/certs.d", "/etc/docker/certs.d")


class Registries:
    """Connections to registries; to be closed, best by ``with``. Its methods may be called from several threads.

    credentials:  (user, password) by host, as references have it: ``registry.example:5000``, ``docker.io``. For other hosts
                  those are taken that docker and podman keep ($REGISTRY_AUTH_FILE, $DOCKER_CONFIG or ~/.docker/config.json,
                  containers/auth.json), and their credential helpers are asked. None is no failure: many need none to read
    insecure:     True, or the hosts that may be spoken to without TLS, or with a certificate that nobody vouches for. TLS is
                  tried first. Loopback addresses may always be without TLS, and are asked without it first
    ca_file:      PEM file of the certificates to trust, instead of the system's. Those of /etc/docker/certs.d/HOST/*.crt and
                  /etc/containers/certs.d/HOST/*.crt are trusted besides, for that host, and it is shown the *.cert there,
                  whose key is the *.key of the same name
    timeout:      seconds that a registry may be silent
    deadline:     seconds that a request may take, without what it moves of a blob: that has a second more per 16 KiB
    parallel:     requests to one registry at once, at most. Blobs under way count only until the registry answers, or else
                  they might wait for each other: who asks for them decides how many there are
    chunk_size:   bytes of a blob that are sent by one request, and kept until the registry has them, while as many are
                  gathered for the next. A registry that wants larger ones gets them
    sleep:        what pauses, given seconds; for tests

    HTTP_PROXY, HTTPS_PROXY and NO_PROXY are heeded, but for loopback addresses. Requests are tried again after broken
    connections and the statuses 408, 429, 500, 502, 503 and 504, with pauses that grow, or as long as Retry-After says, a
    minute at most; five times in a row in vain are the end.

    Raises UsageError for arguments that cannot be honoured.
    """

    def __init__(
        self,
        *,
        credentials: Mapping[str, tuple[str, str]] | None = None,
        insecure: bool | Collection[str] = False,
        ca_file: str | None = None,
        timeout: float = 30.0,
        deadline: float = 300.0,
        parallel: int = 8,
        chunk_size: int = CHUNK_SIZE,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        if timeout <= 0 or deadline <= 0:
            raise UsageError("timeout and deadline must be more than 0 seconds")
        if parallel < 1 or chunk_size < 1:
            raise UsageError("parallel and chunk_size must be 1 or more")
        if ca_file is not None:
            check_certificates(ca_file)
        hosts = {insecure} if isinstance(insecure, str) else set() if isinstance(insecure, bool) else set(insecure)
        self._settings = Settings(timeout, deadline, parallel, chunk_size, insecure is True or hosts, sleep)
        self._ca_file = ca_file
        self._credentials = Credentials(credentials)
        self._pools = Pools(2 * parallel, self._trust, direct=is_loopback)
        self._hosts: dict[str, Host] = {}
        self._repositories: WeakSet[Repository] = WeakSet()
        self._closed = False
        self._lock = threading.Lock()

    def repository(self, reference: Reference, *, alone: bool = False) -> Repository:
        """That of a reference to a registry. Nothing is asked yet. Raises UsageError for other references.

        alone:  whether all connections end with it, as there is to be no other
        """
        if reference.transport != "docker":
            raise UsageError(f"{reference}: is in no registry")
        reference = Reference.parse(str(reference))  # one that was made by hand, too, is to lead nowhere else
        with self._lock:
            if self._closed:
                raise UsageError(f"{reference}: the registries are closed")
            if reference.host not in self._hosts:
                self._hosts[reference.host] = Host(reference.host, self._settings, self._pools, self._credentials)
            requests = Requests(self._hosts[reference.host], reference.repository, str(reference))
            repository = Repository(requests, reference, self._pools, alone)
            self._repositories.add(repository)
            return repository

    def allow_insecure(self, hosts: Iterable[str]) -> None:
        """Adds to the hosts that are ``insecure``; it has no effect on one that was asked already."""
        if not isinstance(self._settings.insecure, bool):
            self._settings.insecure.update(hosts)

    def _trust(self, url: Url) -> Trust:
        if url.scheme != "https":
            return Trust()
        if self._settings.is_insecure(url):
            return Trust(verify=False)
        host = url.netloc or ""
        own = [] if host.startswith(".") else [Path(place, host) for place in _CERTIFICATES]
        more = tuple(str(path) for place in own for path in sorted(place.glob("*.crt")))
        shown = tuple(
            (str(path), str(path.with_suffix(".key"))) for place in own for path in sorted(place.glob("*.cert"))
        )
        return Trust(self._ca_file, more, shown=shown)

    def close(self) -> None:
        """Ends all connections; what is under way ends with an error. Closing twice does no harm."""
        with self._lock:
            self._closed = True
            repositories = list(self._repositories)
        for repository in repositories:
            repository.stop()
        for repository in repositories:
            repository.close()
        self._pools.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
