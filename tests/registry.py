"""Debian's docker-registry on a port of its own, what is needed to push to it, and a proxy that notes what is fetched."""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO

PROGRAM = "docker-registry"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
IMAGE_CONFIG = "application/vnd.oci.image.config.v1+json"
START_SECONDS = 30.0
ANSWER_SECONDS = 60.0
END_SECONDS = 10.0

# Locations without a host, so that they stay what they are behind a proxy.
CONFIG = """\
version: 0.1
log: {{level: info, formatter: text, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {storage}}}}}
http: {{addr: "127.0.0.1:0", relativeurls: true}}
"""
GUARD = "auth: {{htpasswd: {{realm: test, path: {users}}}}}\n"


# ------------------------------------------------------------------------------------------------- the registry


class Registry:
    """A client of one registry. ``host`` is its address and port, as references and URLs have it; ``pid`` its process."""

    def __init__(self, host: str, pid: int) -> None:
        self.host = host
        self.pid = pid
        # Not by the environment's proxy, whatever that may be.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def push_blob(self, repository: str, blob: Path | bytes, digest: str | None = None) -> str:
        """Uploads one blob in one piece; its digest."""
        digest = digest or (sha256(blob) if isinstance(blob, bytes) else sha256_of_file(blob))
        begun = self._request("POST", f"/v2/{repository}/blobs/uploads/", data=b"")
        place = urllib.parse.urlsplit(begun.headers["Location"])
        query = urllib.parse.urlencode([*urllib.parse.parse_qsl(place.query), ("digest", digest)])
        headers = {"Content-Type": "application/octet-stream"}
        if isinstance(blob, bytes):
            self._request("PUT", f"{place.path}?{query}", data=blob, headers=headers)
        else:
            headers["Content-Length"] = str(blob.stat().st_size)
            with blob.open("rb") as file:
                self._request("PUT", f"{place.path}?{query}", data=file, headers=headers)
        return digest

    def push_manifest(self, repository: str, manifest: dict[str, Any]) -> str:
        """Stores a manifest whose blobs are there; its digest."""
        text = json.dumps(manifest).encode()
        headers = {"Content-Type": manifest["mediaType"]}
        self._request("PUT", f"/v2/{repository}/manifests/{sha256(text)}", data=text, headers=headers)
        return sha256(text)

    def push_image(self, repository: str, layers: list[tuple[Path, dict[str, Any], str]]) -> str:
        """Stores an image of blobs, each with its descriptor and its DiffID, the lowest first; the manifest's digest."""
        for blob, descriptor, _ in layers:
            self.push_blob(repository, blob, descriptor["digest"])
        config = json.dumps(
            {
                "architecture": "amd64",
                "os": "linux",
                "config": {},
                "rootfs": {"type": "layers", "diff_ids": [diff_id for _, _, diff_id in layers]},
            }
        ).encode()
        self.push_blob(repository, config)
        return self.push_manifest(
            repository,
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST,
                "config": {"mediaType": IMAGE_CONFIG, "digest": sha256(config), "size": len(config)},
                "layers": [descriptor for _, descriptor, _ in layers],
            },
        )

    def held(self, repository: str, tag: str) -> dict[str, str]:
        """The digests of what is served for a tag and for all that its manifest names, which are their names if all is well;
        of a tag that is not there, nothing."""
        try:
            manifest = self._fetch(f"/v2/{repository}/manifests/{tag}")
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise
            return {}
        document = json.loads(manifest)
        names = [one["digest"] for one in (document["config"], *document["layers"])]
        return {tag: sha256(manifest)} | {name: self._digest(f"/v2/{repository}/blobs/{name}") for name in names}

    def _digest(self, path: str) -> str:
        try:
            return sha256(self._fetch(path))
        except urllib.error.HTTPError as error:
            return f"status {error.code}"

    def _fetch(self, path: str) -> bytes:
        request = urllib.request.Request(f"http://{self.host}{path}", headers={"Accept": MANIFEST})
        with self._opener.open(request, timeout=ANSWER_SECONDS) as answer:
            return bytes(answer.read())

    def _request(
        self, method: str, path: str, data: bytes | BinaryIO | None = None, headers: dict[str, str] | None = None
    ) -> http.client.HTTPResponse:
        request = urllib.request.Request(f"http://{self.host}{path}", data=data, headers=headers or {}, method=method)
        answer: http.client.HTTPResponse = self._opener.open(request, timeout=ANSWER_SECONDS)
        with answer:
            answer.read()
        return answer


@contextmanager
def registry(folder: Path, users: Path | None = None) -> Iterator[Registry]:
    """Runs a registry that keeps all it has, its log too, in an empty directory. It goes when the thread that asked does.

    users:  a file of htpasswd's, with bcrypt, of those who may do anything
    """
    config, log = folder / "config.yml", folder / "log"
    guarded = GUARD.format(users=json.dumps(str(users))) if users else ""
    config.write_text(CONFIG.format(storage=json.dumps(str(folder / "storage"))) + guarded)
    guard = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*guard, PROGRAM, "serve", str(config)], stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=folder
        )
    try:
        yield Registry(wait_for_host(process, log), process.pid)
    finally:
        process.terminate()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for_host(process: subprocess.Popen[bytes], log: Path) -> str:
    """The port is the kernel's choice; the registry's log tells it."""
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if found := re.search(r"listening on (127\.0\.0\.1:\d+)", log.read_text(errors="replace")):
            return found[1]
        time.sleep(0.02)
    raise RuntimeError(f"{PROGRAM} does not start: {log.read_text(errors='replace')[-500:]}")


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------- the proxy


@dataclass(slots=True)
class Fetch:
    """One request of a client. Ranges are half-open: the first byte, and the one behind the last."""

    method: str
    path: str
    ranges: list[tuple[int, int]]
    """What was asked for; empty for the whole."""
    status: int = 0
    """Of the answer; 0 until there is one."""
    sent: int = 0
    """Bytes of the answer's body that went to the client, several ranges' headers included."""


class Proxy(ThreadingHTTPServer):
    """Passes every GET and HEAD on to a registry and notes it. ``host`` takes the place of the registry's in references."""

    daemon_threads = True  # clients hold connections for longer than a test takes

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream = upstream
        self.host = f"127.0.0.1:{self.server_address[1]}"
        self._fetches: list[Fetch] = []

    def note(self, method: str, path: str, ranges: str | None) -> Fetch:
        pairs = re.findall(r"(\d+)-(\d+)", ranges or "")
        fetch = Fetch(method, path, [(int(first), int(last) + 1) for first, last in pairs])
        self._fetches.append(fetch)
        return fetch

    def fetches_of(self, digest: str) -> list[Fetch]:
        """What was fetched of one blob, in the order of the requests."""
        return [fetch for fetch in self._fetches if fetch.path.partition("?")[0].endswith(f"/blobs/{digest}")]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def do_GET(self) -> None:
        fetch = self.server.note(self.command, self.path, self.headers.get("Range"))
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=ANSWER_SECONDS)
        try:
            upstream.request(self.command, self.path, headers=dict(self.headers.items()))
            self._pass_on(upstream.getresponse(), fetch)
        except (OSError, http.client.HTTPException):  # one of the two has gone
            self.close_connection = True
        finally:
            upstream.close()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass

    def _pass_on(self, answer: http.client.HTTPResponse, fetch: Fetch) -> None:
        fetch.status = answer.status
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding"):
                self.send_header(name, value)
        if answer.getheader("Content-Length") is None:
            self.send_header("Connection", "close")  # the end of the body is that of the connection
        self.end_headers()
        while data := answer.read(1 << 16):
            self.wfile.write(data)
            fetch.sent += len(data)


@contextmanager
def proxy(upstream: str) -> Iterator[Proxy]:
    with Proxy(upstream) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
