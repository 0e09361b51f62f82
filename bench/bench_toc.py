"""The table of contents: rows become text.

The seconds are those of the toc stage, in which the text is formatted twice, once to measure it. Rates are of the text.
The last test says what a table costs a build in all, compressing and hashing it included: "gzip" has none.
"""

from __future__ import annotations

from typing import Any

import empty_tar
import pytest
from conftest import MIB, Measured, Staged, build
from corpus import make_tar

from estargz import _tar

KIB = 1 << 10
STATED = ["chunk hash", "compress", "write"]  # what there has to be for the text to be that of a build
XATTRS = {b"security.capability": bytes(20), b"user.comment": b"anything"}


@pytest.fixture(scope="session")
def count(real: bool) -> int:
    return 50_000 if real else 500


@pytest.fixture(scope="session")
def plain(count: int) -> bytes:
    return b"".join(empty_tar.pieces(count))


@pytest.fixture(scope="session")
def attributes(count: int) -> bytes:
    headers = [_tar.emit(b"usr/bin/file%06d" % number, xattrs=XATTRS) for number in range(count)]
    return b"".join([*headers, bytes(1024)])


def check(staged: Staged, tar: bytes, entries: int, **options: Any) -> None:
    expected = build(tar, **options)
    size = expected.uncompressed_size - len(tar)
    layer = staged(("toc",), tar, parts=STATED, size=size, entries=entries, **options)
    assert layer.size == expected.size


def test_plain(staged: Staged, plain: bytes, count: int) -> None:
    """Empty files: an entry is a name, a mode, owners, a time, and the digest of nothing."""
    check(staged, plain, count)


def test_attributes(staged: Staged, attributes: bytes, count: int) -> None:
    """Empty files with extended attributes, which the table holds in Base64."""
    check(staged, attributes, count)


def test_chunks(staged: Staged, mixed: bytes) -> None:
    """A file of many chunks: an entry each."""
    check(staged, make_tar([mixed[: 8 * MIB]]), min(len(mixed), 8 * MIB) // KIB, chunk_size=KIB)


@pytest.mark.parametrize("compression", ["estargz", "gzip"])
def test_build(measured: Measured, plain: bytes, count: int, compression: str) -> None:
    layer = measured(lambda: build(plain, compression=compression), plain, size=len(plain), entries=count)
    assert (layer.toc_digest is not None) == (compression == "estargz")
