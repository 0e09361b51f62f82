"""Who one is to a registry: what docker and podman keep in their files, and the helpers that these name.

$REGISTRY_AUTH_FILE, $DOCKER_CONFIG or ~/.docker, podman's auth.json -> credHelpers, auths, credsStore -> Credential
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from estargz.descriptors import reading
from estargz.errors import UsageError
from estargz.http import printable
from estargz.image.reference import DOCKER_HUB

__all__ = ["Credential", "Credentials"]

_HUB_KEY = "https://index.docker.io/v1/"  # what docker calls its own registry there
_HUB_HOSTS = {"index.docker.io", "registry-1.docker.io"}
_HELPER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_HELPER_SECONDS = 60.0
_MAX_FILE = 16 << 20
_NOT_FOUND = "credentials not found"  # what helpers say of a registry that they do not know
_TOKEN_USER = "<token>"  # what helpers give as the user of an identity token


@dataclass(frozen=True, slots=True)
class Credential:
    """A user and password, or an identity token, which a token server takes for access tokens."""

    user: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)

    @property
    def basic(self) -> str:
        """The value of an Authorization header."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


class Credentials:
    """Credentials by registry, looked for once each.

    given:  user and password by host (``registry.example:5000``, ``docker.io``); they come before all files
    """

    def __init__(self, given: Mapping[str, tuple[str, str]] | None = None) -> None:
        self._given = {_hub(host): Credential(*pair) for host, pair in (given or {}).items()}
        self._found: dict[tuple[str, str], Credential | None] = {}
        self._lock = threading.Lock()

    def of(self, host: str, repository: str) -> Credential | None:
        """Those for a repository; None where there are none. Raises UsageError for files and helpers that do not work."""
        if host in self._given:
            return self._given[host]
        with self._lock:
            key = host, repository
            if key not in self._found:
                self._found[key] = next(filter(None, (_in_file(path, *key) for path in _files())), None)
            return self._found[key]


def _files() -> Iterator[Path]:
    """Where credentials may be, the first place first."""
    if own := os.environ.get("REGISTRY_AUTH_FILE"):
        yield Path(own)
    home = Path(os.path.expanduser("~"))
    yield Path(os.environ.get("DOCKER_CONFIG") or home / ".docker") / "config.json"
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        yield Path(runtime) / "containers" / "auth.json"
    yield Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "containers" / "auth.json"


def _in_file(path: Path, host: str, repository: str) -> Credential | None:
    config = _read(path)
    helpers = _object(config, "credHelpers", path)
    for key, name in helpers.items():
        if _hub(_host_of(key)) == host:
            return _ask_helper(name, host, path)
    auths = {_hub(_host_of(key)): value for key, value in _object(config, "auths", path).items()}
    for key in _names(host, repository):
        if found := _decode(auths.get(key), key, path):
            return found
    store = config.get("credsStore")
    return _ask_helper(store, host, path) if store else None


def _read(path: Path) -> dict[str, Any]:
    try:
        with reading(path) as file:
            data = file.read(_MAX_FILE)
        config = json.loads(data)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}; check its owner and mode") from error
    except (ValueError, RecursionError):
        config = None  # the cause may show a part of it
    if not isinstance(config, dict):
        raise UsageError(f"{path}: is no JSON object; mend it, or log in again")
    return config


def _object(config: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise UsageError(f"{path}: {key} is no JSON object; mend it, or log in again")
    return found


def _host_of(key: str) -> str:
    """The host that a key of docker's means; podman's may have a part of a repository behind it."""
    _, split, rest = key.rpartition("://")
    host, _, path = rest.partition("/")
    if split or path.strip("/") in ("", "v1", "v2"):
        return host
    return rest.rstrip("/")


def _hub(host: str) -> str:
    return DOCKER_HUB if host in _HUB_HOSTS else host


def _names(host: str, repository: str) -> Iterator[str]:
    """What may stand for a repository, from all of its name to its host alone."""
    parts = [host, *repository.split("/")]
    for count in range(len(parts), 0, -1):
        yield "/".join(parts[:count])


def _decode(entry: Any, key: str, path: Path) -> Credential | None:
    if not isinstance(entry, dict):
        return None
    texts = {name: entry.get(name) or "" for name in ("auth", "username", "password", "identitytoken")}
    if not all(map(_is_text, texts.values())):
        raise UsageError(f"{path}: the entry of {printable(key)} holds something that is no string; log in again")
    user, password = texts["username"], texts["password"]
    if texts["auth"]:
        try:
            user, colon, password = base64.b64decode(texts["auth"], validate=True).decode().partition(":")
        except ValueError:
            colon = ""
        if not colon:
            raise UsageError(f"{path}: auth of {printable(key)} is no base64 of USER:PASSWORD; log in again") from None
        password = password.rstrip("\0")
    if texts["identitytoken"]:
        return Credential(user, identity_token=texts["identitytoken"])
    return Credential(user, password) if user or password else None


def _is_text(value: Any) -> bool:
    """Whether it can be sent: JSON can spell halves of characters, which UTF-8 has not."""
    return isinstance(value, str) and re.search("[\ud800-\udfff]", value) is None


def _ask_helper(name: Any, host: str, path: Path) -> Credential | None:
    if not isinstance(name, str) or not _HELPER.fullmatch(name):
        raise UsageError(f"{path}: {printable(str(name))!r} is no name of a credential helper")
    program = f"docker-credential-{name}"
    server = _HUB_KEY if host == DOCKER_HUB else host
    try:
        done = subprocess.run([program, "get"], input=server.encode(), capture_output=True, timeout=_HELPER_SECONDS)
    except OSError as error:
        raise UsageError(f"{program}, which {path} names, cannot be run: {error.strerror}; install it") from error
    except subprocess.TimeoutExpired:
        raise UsageError(f"{program}: no answer within {_HELPER_SECONDS:g} s; check it") from None
    if done.returncode:
        said = printable((done.stdout or done.stderr).decode(errors="replace").strip())
        if _NOT_FOUND in said:
            return None
        raise UsageError(f"{program}: fails for {host}: {said or done.returncode}; check it, or log in again")
    return _of_helper(done.stdout, program)


def _of_helper(output: bytes, program: str) -> Credential | None:
    try:
        answer = json.loads(output)
        user, secret = answer["Username"], answer["Secret"]
    except (ValueError, KeyError, TypeError, RecursionError):
        user = secret = None
    if not _is_text(user) or not _is_text(secret):
        raise UsageError(f"{program}: its answer has no Username and Secret; check it") from None
    if user == _TOKEN_USER:
        return Credential(identity_token=secret)
    return Credential(user, secret) if user or secret else None
