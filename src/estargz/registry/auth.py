"""What a registry wants to see before it answers: Basic credentials, or a token of the server that its challenge names.

401 -> WWW-Authenticate -> challenges -> Basic header | token server -> token, kept by (realm, service, scopes) -> header
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from urllib3.util import Url

from estargz.http import Failure, parse, redacted
from estargz.registry.credentials import Credential

if TYPE_CHECKING:
    from estargz.registry.host import Requests

__all__ = ["Authority", "Challenge", "parse_challenges"]

_CLIENT = "estargz"
_USUAL_LIFE = 60.0  # seconds, of a token that does not say it
_USED_SHARE = 0.75  # of a token's life, after which a new one is fetched
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PART = re.compile(
    rf"""[\s,]*(?:
        (?P<name>{_TOKEN})\s*=\s*(?:"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<plain>[^\s,"]+))
        | (?P<scheme>{_TOKEN})(?:\s+(?P<token68>[A-Za-z0-9._~+/-]+=*)(?=\s*(?:,|$)))?
    )""",
    re.VERBOSE | re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way to prove who one is (RFC 9110, section 11.6.1); scheme and names of parameters in small letters."""

    scheme: str
    parameters: Mapping[str, str] = field(default_factory=dict)


def parse_challenges(header: str) -> list[Challenge]:
    """Those of a WWW-Authenticate header; of a malformed one, those before the fault."""
    found: list[tuple[str, dict[str, str]]] = []
    place = 0
    while match := _PART.match(header, place):
        place = match.end()
        if match["scheme"]:
            found.append((match["scheme"].lower(), {}))
        elif found:
            quoted = match["quoted"]
            value = match["plain"] if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
            found[-1][1].setdefault(match["name"].lower(), value)
        else:
            break
    return [Challenge(scheme, parameters) for scheme, parameters in found]


@dataclass(frozen=True, slots=True)
class _Token:
    header: str = field(repr=False)
    fresh_until: float


class Authority:
    """What is known of how a registry wants to be asked.

    home:         the registry; a server of tokens may be asked without TLS only where it is
    credential:   who one is, given a repository
    allows_plain: whether credentials may go to a URL without TLS
    fetch:        an answer's body, given who waits for it, method, URL, headers and form; raises Failure

    Its methods are given who asks. One waits while another fetches a token; when that one is closed meanwhile, it fetches it
    itself. They raise UsageError when it is closed, too.
    """

    def __init__(
        self,
        home: Url,
        credential: Callable[[str], Credential | None],
        allows_plain: Callable[[Url], bool],
        fetch: Callable[[Requests, str, Url, Mapping[str, str], bytes | None], bytes],
    ) -> None:
        self._home, self._credential, self._allows_plain, self._fetch = home, credential, allows_plain, fetch
        self._challenge: Challenge | None = None
        self._asked: dict[tuple[str, ...], tuple[str, ...]] = {}  # scopes that registries asked for besides
        self._tokens: dict[tuple[str, str, tuple[str, ...], str], _Token] = {}
        self._lock = threading.Lock()

    def header(self, requests: Requests, scopes: tuple[str, ...]) -> str | None:
        """The Authorization header of a request; None as long as nobody asked for one. Raises Failure, UsageError."""
        with requests.holding(self._lock):
            challenge = self._challenge
            if challenge is None:
                return None
            credential = self._credential(requests.repository)
            if challenge.scheme == "basic":
                return credential.basic if credential else None
            return self._token(challenge, requests, credential, scopes).header

    def take(self, requests: Requests, header: str, scopes: tuple[str, ...]) -> bool:
        """Takes note of a challenge; whether it is one that can be met."""
        challenges = {challenge.scheme: challenge for challenge in reversed(parse_challenges(header))}
        challenge = challenges.get("bearer") or challenges.get("basic")
        if challenge is None:
            return False
        asked = challenge.parameters.get("scope", "").split()
        more = tuple(scope for scope in asked if not any(_covers(own, scope) for own in scopes))
        with requests.holding(self._lock):
            self._challenge = challenge
            if more and scopes:
                self._asked[scopes] = more
        return True

    def challenged(self, requests: Requests, header: str, sent: str | None, scopes: tuple[str, ...]) -> bool:
        """Takes note of a 401 to a request that had ``sent``; whether the next one has something else to show."""
        return self.take(requests, header, scopes) and self._differs(requests, sent, scopes)

    def outlived(self, requests: Requests, sent: str | None, scopes: tuple[str, ...]) -> bool:
        """Takes note of a 403 to a request; whether it had a token, and there is another one now."""
        return sent is not None and sent.startswith("Bearer ") and self._differs(requests, sent, scopes)

    def _differs(self, requests: Requests, sent: str | None, scopes: tuple[str, ...]) -> bool:
        with requests.holding(self._lock):
            self._tokens = {key: token for key, token in self._tokens.items() if token.header != sent}
        return self.header(requests, scopes) not in (sent, None)

    def _token(
        self, challenge: Challenge, requests: Requests, credential: Credential | None, scopes: tuple[str, ...]
    ) -> _Token:
        realm, service = challenge.parameters.get("realm", ""), challenge.parameters.get("service", "")
        wanted = tuple(sorted({*scopes, *self._asked.get(scopes, ())}))
        key = realm, service, wanted, requests.repository if credential else ""
        token = self._tokens.get(key)
        if token is None or time.monotonic() >= token.fresh_until:
            began = time.monotonic()
            text, life = self._fetched(requests, self._realm(realm, credential), service, wanted, credential)
            token = self._tokens[key] = _Token(f"Bearer {text}", began + _USED_SHARE * life)
        return token

    def _realm(self, text: str, credential: Credential | None) -> Url:
        """The token server. The registry names it, so it gets the credentials; but only where nobody listens."""
        try:
            url, auth = parse(text)
        except ValueError as error:
            raise Failure(f"names a token server whose URL {error}", "the registry is faulty") from None
        plain_ok = self._home.scheme == "http" and (credential is None or self._allows_plain(url))
        if auth is not None or (url.scheme == "http" and not plain_ok):
            raise Failure(f"names a token server that is not to be trusted, {redacted(url)}", "the registry is faulty")
        return url

    def _fetched(
        self, requests: Requests, realm: Url, service: str, scopes: tuple[str, ...], credential: Credential | None
    ) -> tuple[str, float]:
        """A token and its life in seconds (distribution's docs: spec/auth/token.md, oauth.md)."""
        query = [("service", service)] if service else []
        if credential and credential.identity_token:
            grant = [("grant_type", "refresh_token"), ("refresh_token", credential.identity_token)]
            form = [*grant, *query, ("client_id", _CLIENT), ("scope", " ".join(scopes))]
            headers = {"content-type": "application/x-www-form-urlencoded"}
            return _parsed(self._fetch(requests, "POST", realm, headers, urlencode(form).encode()), realm)
        query += [("scope", scope) for scope in scopes]
        headers = {}
        if credential:
            query.append(("account", credential.user))
            headers["authorization"] = credential.basic
        joined = "&".join(filter(None, (realm.query, urlencode(query))))
        return _parsed(self._fetch(requests, "GET", realm._replace(query=joined or None), headers, None), realm)


def _covers(own: str, asked: str) -> bool:
    """Whether a scope, ``type:name:action,action``, allows all that another one does."""
    (name, _, actions), (other, _, more) = own.rpartition(":"), asked.rpartition(":")
    return name == other and set(more.split(",")) <= set(actions.split(","))


def _parsed(answer: bytes, realm: Url) -> tuple[str, float]:
    try:
        document: Any = json.loads(answer)
        token = document.get("token") or document.get("access_token")
        life = float(document.get("expires_in") or _USUAL_LIFE)
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        token = None
    if not isinstance(token, str) or not re.fullmatch(r"[\x21-\x7e]+", token):
        raise Failure(f"the token server {redacted(realm)} gave no token", "the token server is faulty")
    return token, max(life, 0.0) if life == life else 0.0
