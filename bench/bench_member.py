"""Compression levels: speed and ratio on one thread, hashing included; "copy" is the same without a compressor."""

from __future__ import annotations

import io
import os
import tarfile
from typing import Any

import pytest
from conftest import Measured

from estargz import Layer, Writer

LEVELS = ["copy", *range(13)]
SLOW = 9  # libdeflate's levels from here on take seconds


def tar_of(data: bytes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        info = tarfile.TarInfo("file")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def written(tar: bytes, options: dict[str, Any]) -> Layer:
    with Writer(os.devnull, threads=1, **options) as writer:
        writer.write(tar)
    return writer.layer


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["text", "binary"])
def test_level(measured: Measured, content: dict[str, bytes], kind: str, level: str | int) -> None:
    data = content[kind]
    tar = tar_of(data)
    options: dict[str, Any] = {"compression": "uncompressed"} if level == "copy" else {"level": level}
    size = written(tar, options).size
    rounds = 2 if isinstance(level, int) and level >= SLOW else 5
    layer = measured(
        lambda: written(tar, options), size=len(data), rounds=rounds, ratio=len(data) / size, blob_bytes=size
    )
    assert layer.size == size
