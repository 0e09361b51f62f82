"""A tar of empty files: what an entry costs, and what of that is the table of contents ("gzip" has none)."""

from __future__ import annotations

import io
import os

import empty_tar
import pytest
from conftest import Measured

import estargz


@pytest.fixture(scope="session")
def count(real: bool) -> int:
    return 50_000 if real else 500


@pytest.fixture(scope="session")
def tar(count: int) -> bytes:
    return b"".join(empty_tar.pieces(count))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("compression", ["estargz", "gzip"])
def test_entries(measured: Measured, tar: bytes, count: int, compression: str, threads: int) -> None:
    def build() -> estargz.Layer:
        return estargz.build(io.BytesIO(tar), os.devnull, compression=compression, threads=threads)

    layer = measured(build, entries=count, size=len(tar))
    assert layer.uncompressed_size >= len(tar)
