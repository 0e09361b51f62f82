"""Tar headers: entries become blocks, and blocks become entries. All files are empty, so rates are those of headers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from conftest import Measured, Staged

from estargz import _tar

Fields = dict[str, Any]

OWNED: Fields = {"mode": 0o644, "uid": 1000, "gid": 1000, "mtime_s": 1_700_000_000}
LONG = b"a-directory/" * 12
LONGER = LONG * 3
XATTRS = {b"security.capability": bytes(20), b"user.comment": b"anything"}

# What an entry needs to be written -> its fields.
KINDS: dict[str, Callable[[bytes], Fields]] = {
    "plain": lambda name: {"name": b"usr/share/doc/" + name, **OWNED},
    "prefix": lambda name: {"name": LONG + name, **OWNED},
    "pax-name": lambda name: {"name": LONGER + name, **OWNED},
    "pax-xattrs": lambda name: {"name": b"usr/bin/" + name, "xattrs": XATTRS, **OWNED},
}


@pytest.fixture(scope="session")
def count(real: bool) -> int:
    return 20_000 if real else 200


@pytest.fixture(scope="session", params=KINDS)
def fields(request: pytest.FixtureRequest, count: int) -> list[Fields]:
    return [KINDS[request.param](b"file%06d" % number) for number in range(count)]


def emitted(fields: list[Fields]) -> bytes:
    return b"".join([_tar.emit(**each) for each in fields])


def test_emit(measured: Measured, fields: list[Fields]) -> None:
    """The seconds are those of calls from Python, which are much of them: nothing else reaches the emitter alone."""
    headers = emitted(fields)
    made = measured(lambda: emitted(fields), headers + bytes(1024), size=len(headers), entries=len(fields))
    assert [entry.name for entry in _tar.parse(made + bytes(1024))] == [each["name"] for each in fields]


def test_parse(staged: Staged, fields: list[Fields]) -> None:
    """The seconds are those of the source stage: bytes are taken in, parsed, and become rows of the table of contents."""
    tar = emitted(fields) + bytes(1024)
    layer = staged(("source",), tar, parts=[], size=len(tar), entries=len(fields))
    assert layer.uncompressed_size > len(tar)
