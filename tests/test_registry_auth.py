"""Who one is to registries: files and helpers of docker and podman, challenges, tokens, and who gets to see them."""

from __future__ import annotations

import base64
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty_registry import FaultyRegistry, Pauses, Pieces, descriptor_of, digest_of, faulty_registry, repository_of

from estargz.errors import RegistryError, UsageError
from estargz.registry.auth import Challenge, parse_challenges
from estargz.registry.client import Registries
from estargz.registry.credentials import Credential, Credentials

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("home")]

DATA = b"some layer" * 1000
LOGIN = ("me", "my:secret")


def encoded(user: str, password: str) -> str:
    return base64.b64encode(f"{user}:{password}".encode()).decode()


def write(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document if isinstance(document, str) else json.dumps(document))


# --- files


@pytest.mark.parametrize(
    "key", ["reg.example:5000", "https://reg.example:5000", "http://reg.example:5000/v1/", "reg.example:5000/v2/"]
)
def test_keys_of_docker(home: Path, key: str) -> None:
    write(home / ".docker/config.json", {"auths": {key: {"auth": encoded("u", "p:q")}}})
    assert Credentials().of("reg.example:5000", "a/b") == Credential("u", "p:q")
    assert Credentials().of("reg.example", "a/b") is None


def test_the_hub_has_names_of_its_own(home: Path) -> None:
    write(home / ".docker/config.json", {"auths": {"https://index.docker.io/v1/": {"auth": encoded("u", "p")}}})
    assert Credentials().of("docker.io", "library/busybox") == Credential("u", "p")
    assert Credentials({"index.docker.io": ("x", "y")}).of("docker.io", "library/busybox") == Credential("x", "y")


def test_forms_of_an_entry(home: Path) -> None:
    entries = {
        "a": {"username": "u", "password": "p"},
        "b": {"auth": base64.b64encode(b"u:p\0\0").decode()},
        "c": {"auth": encoded("0000", ""), "identitytoken": "id"},
        "d": {},
        "e": {"auth": encoded("u", "pä")},
    }
    write(home / ".docker/config.json", {"auths": entries})
    found = {host: Credentials().of(host, "x") for host in entries}
    assert found == {
        "a": Credential("u", "p"),
        "b": Credential("u", "p"),
        "c": Credential("0000", identity_token="id"),
        "d": None,
        "e": Credential("u", "pä"),
    }


def test_podmans_keys_have_a_part_of_the_name(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auths = {name: {"auth": encoded("u", name)} for name in ("reg.example", "reg.example/team", "reg.example/team/app")}
    write(home / "run/containers/auth.json", {"auths": auths})
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(home / "run"))
    for repository, entry in (
        ("team/app", "reg.example/team/app"),
        ("team/app2", "reg.example/team"),
        ("teams", "reg.example"),
    ):
        assert Credentials().of("reg.example", repository) == Credential("u", entry)


def test_order_of_files(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = [home / ".config/containers/auth.json", home / "docker/config.json", home / "own.json"]
    monkeypatch.setenv("DOCKER_CONFIG", str(home / "docker"))
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(home / "own.json"))
    for number, place in enumerate(places):
        write(place, {"auths": {"reg": {"auth": encoded("u", str(number))}}})
        assert Credentials().of("reg", "x") == Credential("u", str(number))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{sec:ret", "is no JSON object"),
        ([], "is no JSON object"),
        ({"auths": ["secret"]}, "auths is no JSON object"),
        ({"auths": {"reg": {"auth": "sec:ret"}}}, "is no base64 of USER:PASSWORD"),
        ({"auths": {"reg": {"auth": encoded("secret", "")[:-4]}}}, "is no base64 of USER:PASSWORD"),
        ({"auths": {"reg": {"auth": 7}}}, "holds something that is no string"),
        ({"credHelpers": {"reg": "../secret"}}, "is no name of a credential helper"),
        ({"credsStore": "none-of-this-name"}, "docker-credential-none-of-this-name, which .* cannot be run"),
    ],
)
def test_files_that_are_wrong(home: Path, document: Any, message: str) -> None:
    write(home / ".docker/config.json", document)
    with pytest.raises(UsageError, match=message) as caught:
        Credentials().of("reg", "x")
    assert "sec:ret" not in str(caught.value)


def test_what_is_shown_of_credentials() -> None:
    assert "secret" not in repr(Credential("u", "secret", "secret"))


# --- helpers


@pytest.fixture
def helper(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A helper that notes what it is asked, and says what the file beside it says."""
    program = home / "bin/docker-credential-test"
    write(
        program,
        f'#!/bin/sh\ncat > {home}/asked; echo "$@" >> {home}/asked; cat {home}/says; exit $(cat {home}/status)\n',
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    (home / "status").write_text("0")
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    yield home / "says"


def test_helpers(home: Path, helper: Path) -> None:
    write(home / ".docker/config.json", {"credHelpers": {"reg.example": "test"}})
    write(helper, {"ServerURL": "reg.example", "Username": "u", "Secret": "p"})
    credentials = Credentials()
    assert credentials.of("reg.example", "x") == Credential("u", "p")
    assert (home / "asked").read_text() == "reg.exampleget\n"
    (home / "asked").unlink()
    assert credentials.of("reg.example", "x") == Credential("u", "p")
    assert not (home / "asked").exists()  # once is enough
    assert credentials.of("other.example", "x") is None


def test_a_store(home: Path, helper: Path) -> None:
    auths = {"https://index.docker.io/v1/": {}, "has.own": {"auth": encoded("a", "b")}}
    write(home / ".docker/config.json", {"credsStore": "test", "auths": auths})
    write(helper, {"Username": "<token>", "Secret": "id"})
    assert Credentials().of("docker.io", "x") == Credential(identity_token="id")
    assert (home / "asked").read_text() == "https://index.docker.io/v1/get\n"
    assert Credentials().of("has.own", "x") == Credential("a", "b")


def test_helpers_that_fail(home: Path, helper: Path) -> None:
    write(home / ".docker/config.json", {"credsStore": "test"})
    (home / "status").write_text("1")
    helper.write_text("credentials not found in native keychain\n")
    assert Credentials().of("reg", "x") is None
    helper.write_text("the keychain is locked\x1b[2J\n")
    with pytest.raises(UsageError, match=r"docker-credential-test: fails for reg: the keychain is locked\?\[2J; check"):
        Credentials().of("reg", "x")
    (home / "status").write_text("0")
    helper.write_text('{"Username": 7}')
    with pytest.raises(UsageError, match="has no Username and Secret"):
        Credentials().of("reg", "x")


# --- challenges


@pytest.mark.parametrize(
    ("header", "challenges"),
    [
        ('Basic realm="a b"', [Challenge("basic", {"realm": "a b"})]),
        (
            'Bearer realm="https://x/t",service="s",scope="repository:a:pull,push"',
            [Challenge("bearer", {"realm": "https://x/t", "service": "s", "scope": "repository:a:pull,push"})],
        ),
        (
            'Negotiate, NTLM abc==, BASIC Realm = "a\\"b, c=d" , bearer realm=x , error = invalid_token',
            [
                Challenge("negotiate"),
                Challenge("ntlm"),
                Challenge("basic", {"realm": 'a"b, c=d'}),
                Challenge("bearer", {"realm": "x", "error": "invalid_token"}),
            ],
        ),
        ('Bearer realm="x", realm="y"', [Challenge("bearer", {"realm": "x"})]),
        ("", []),
        ('realm="x"', []),
        ('Basic realm="unfinished', [Challenge("basic")]),
    ],
)
def test_challenges(header: str, challenges: list[Challenge]) -> None:
    assert parse_challenges(header)[: len(challenges)] == challenges


# --- registries that want to know


@pytest.fixture
def guarded() -> Iterator[FaultyRegistry]:
    with faulty_registry(login=LOGIN, bearer=True) as registry:
        yield registry


def push(registries: Registries, host: str, name: str = "app:v1", data: bytes = DATA) -> None:
    repository_of(registries, host, name).put(descriptor_of(data), lambda: Pieces(data))


def pull(registries: Registries, host: str, name: str = "app:v1", data: bytes = DATA) -> bytes:
    with repository_of(registries, host, name).open(descriptor_of(data)) as reader:
        return b"".join(iter(lambda: reader.read(1 << 16), b""))


@pytest.mark.parametrize("bearer", [False, True])
def test_push_and_pull(bearer: bool) -> None:
    with faulty_registry(login=LOGIN, bearer=bearer) as registry:
        with Registries(credentials={registry.host: LOGIN}) as registries:
            push(registries, registry.host)
            assert pull(registries, registry.host) == DATA
        refused = [seen for seen in registry.requests() if not seen.authorization and seen.path != "/v2/"]
        assert refused == []  # all of them had what was needed, so that no body was sent in vain


def test_tokens_are_kept_by_their_scopes(guarded: FaultyRegistry) -> None:
    with Registries(credentials={guarded.host: LOGIN}) as registries:
        for _ in range(3):
            push(registries, guarded.host, "a")
            pull(registries, guarded.host, "a")
        push(registries, guarded.host, "b")
    scopes = [seen.query["scope"] for seen in guarded.requests("GET /token")]
    assert scopes == ["repository:a:pull,push", "repository:a:pull", "repository:b:pull,push"]
    assert {seen.query["service"] for seen in guarded.requests("GET /token")} == {"fake"}


def test_tokens_do_not_live_for_ever(guarded: FaultyRegistry) -> None:
    guarded.put("app", DATA)
    guarded.token_life = 0.001
    with Registries(credentials={guarded.host: LOGIN}) as registries:
        for count in (1, 2, 3):
            assert pull(registries, guarded.host) == DATA
            assert len(guarded.requests("GET /token")) == count
    assert all(seen.authorization for seen in guarded.requests("GET /v2/app/"))


def test_an_identity_token(guarded: FaultyRegistry, home: Path) -> None:
    write(
        home / ".docker/config.json", {"auths": {guarded.host: {"auth": encoded("x", ""), "identitytoken": LOGIN[1]}}}
    )
    with Registries() as registries:
        push(registries, guarded.host)
    assert guarded.requests("GET /token") == []
    assert len(guarded.requests("POST /token")) == 1


def test_wrong_credentials(guarded: FaultyRegistry) -> None:
    registries = Registries(credentials={guarded.host: ("me", "wr0ng")}, sleep=Pauses())
    with registries, pytest.raises(RegistryError) as caught:
        pull(registries, guarded.host)
    assert str(caught.value).startswith(f"docker://{guarded.host}/app:v1: GET blob {digest_of(DATA)}: 401 Unauthorized")
    assert "UNAUTHORIZED who are you?; check the credentials" in str(caught.value)
    assert "wr0ng" not in str(caught.value)
    assert (caught.value.status, caught.value.code) == (401, "UNAUTHORIZED")


def test_a_token_that_dies_is_replaced(guarded: FaultyRegistry) -> None:
    """Also in the middle of an upload, whose chunk is sent again."""
    guarded.token_uses = 2
    data = os.urandom(40_000)
    registries = Registries(credentials={guarded.host: LOGIN}, chunk_size=10_000, sleep=Pauses())
    with registries, repository_of(registries, guarded.host).upload() as upload:
        for at in range(0, len(data), 1000):
            upload.write(data[at : at + 1000])
        upload.commit(digest_of(data), len(data))
    assert guarded.blobs[digest_of(data)] == data
    assert len(guarded.requests("GET /token")) > 2


def test_an_expired_token_may_be_called_forbidden(guarded: FaultyRegistry) -> None:
    guarded.put("app", DATA)
    with Registries(credentials={guarded.host: LOGIN}) as registries:
        assert pull(registries, guarded.host) == DATA
        guarded.fault("GET /v2/app/blobs/", lambda exchange: exchange.refuse(403, "DENIED"))
        assert pull(registries, guarded.host) == DATA
        guarded.fault("GET /v2/app/blobs/", *[lambda exchange: exchange.refuse(403, "DENIED", "no\nno")] * 2)
        with pytest.raises(RegistryError, match=r"403 Forbidden, DENIED no\?no; check the credentials and what they"):
            pull(registries, guarded.host)


def test_mounts_need_two_scopes(guarded: FaultyRegistry) -> None:
    guarded.put("other", DATA)
    with Registries(credentials={guarded.host: LOGIN}) as registries:
        target, source = repository_of(registries, guarded.host), repository_of(registries, guarded.host, "other:x")
        assert target.link(descriptor_of(DATA), source)
    assert guarded.tokens["token-0"][0] == ["repository:app:pull,push", "repository:other:pull"]


def test_anonymous_tokens() -> None:
    with faulty_registry() as registry:
        registry.put("app", DATA)
        challenge = f'Bearer realm="{registry.url}/token",service="fake"'
        registry.fault("GET /v2/$", lambda exchange: exchange.refuse(401, WWW_Authenticate=challenge))
        registry.fault("GET /token", lambda exchange: exchange.send(200, {}, b'{"access_token": "for-all"}'))
        with Registries() as registries:
            assert pull(registries, registry.host) == DATA
        assert registry.requests("GET /token")[0].authorization is None
        assert registry.requests("GET /v2/app/")[0].authorization == "Bearer for-all"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"[]", "gave no token"),
        (b'{"token": ""}', "gave no token"),
        (b'{"token": "a\\r\\nX-Evil: 1"}', "gave no token"),
        (b'{"token": "x", "expires_in": "soon"}', "gave no token"),
        (b"x" * (2 << 20), "answers with more than"),
    ],
)
def test_token_servers_that_are_faulty(guarded: FaultyRegistry, answer: bytes, message: str) -> None:
    guarded.fault("GET /token", lambda exchange: exchange.send(200, {}, answer))
    registries = Registries(credentials={guarded.host: LOGIN}, sleep=Pauses())
    with registries, pytest.raises(RegistryError, match=message):
        pull(registries, guarded.host)


def test_a_token_server_that_is_busy(guarded: FaultyRegistry) -> None:
    guarded.put("app", DATA)
    pauses = Pauses()
    guarded.fault("GET /token", *[lambda exchange: exchange.refuse(503, Retry_After=7)] * 2)
    with Registries(credentials={guarded.host: LOGIN}, sleep=pauses) as registries:
        assert pull(registries, guarded.host) == DATA
    assert pauses == [7, 7]


@pytest.mark.parametrize("realm", ["ftp://x/", "http://u:p@127.0.0.1/t", "http://tokens.invalid/t", "", "http://x y/"])
def test_token_servers_that_are_not_to_be_trusted(guarded: FaultyRegistry, realm: str) -> None:
    guarded.realm = realm or "none"
    registries = Registries(credentials={guarded.host: LOGIN})
    with registries, pytest.raises(RegistryError, match="names a token server"):
        pull(registries, guarded.host)


def test_a_token_server_sends_elsewhere(guarded: FaultyRegistry) -> None:
    """Where another host does not get the password, nor the registry's."""
    with faulty_registry() as other:
        other.fault("GET /moved", lambda exchange: exchange.send(200, {}, b'{"token": "x"}'))
        guarded.fault("GET /token", lambda exchange: exchange.send(302, {"Location": f"{other.url}/moved"}))
        guarded.put("app", DATA)
        with Registries(credentials={guarded.host: LOGIN}) as registries:
            assert pull(registries, guarded.host) == DATA  # with another token, since that one was refused
        assert [seen.authorization for seen in other.seen] == [None]


def test_credentials_stay_at_home(guarded: FaultyRegistry) -> None:
    """Blobs are fetched, and uploads go on, at another host, which sees no credentials; and may ask for none."""
    with faulty_registry() as other:
        guarded.elsewhere = other.url
        other.blobs[guarded.put("app", DATA)] = DATA
        with Registries(credentials={guarded.host: LOGIN, other.host: LOGIN}, sleep=Pauses()) as registries:
            assert pull(registries, guarded.host) == DATA
            challenge = f'Bearer realm="{other.url}/token"'
            other.fault("GET /storage", lambda exchange: exchange.refuse(401, WWW_Authenticate=challenge))
            with pytest.raises(RegistryError, match="401") as caught:
                pull(registries, guarded.host)
            begun = f"{other.url}/v2/app/blobs/uploads/"
            guarded.fault("POST ", lambda exchange: exchange.send(202, {"Location": begun + "x?signature=secret"}))
            other.fault("PUT ", lambda exchange: (list(exchange.body()), exchange.send(201)))
            push(registries, guarded.host, data=b"new")
        assert len(other.seen) == 3
        assert [seen.authorization for seen in other.seen] == [None] * 3
        assert "signature" not in str(caught.value) + caught.value.url.replace("REDACTED", "")
