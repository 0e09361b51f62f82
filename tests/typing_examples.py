"""What a type checker makes of the public names; read by tests/test_typing.py, never run."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, assert_type

import estargz


def builds() -> None:
    layer = estargz.build("tree", "layer.esgz", lower=Path("base"), level=4, progress=print)
    assert_type(layer, estargz.Layer)
    assert_type(layer.digest, str)
    assert_type(layer.size, int)
    assert_type(layer.toc_digest, str | None)
    assert_type(layer.annotations, dict[str, str])
    assert_type(layer.descriptor(), dict[str, Any])
    estargz.build(io.BytesIO(), io.BytesIO(), compression="gzip")
    estargz.build("tree", "layer.esgz", level="4")  # type: ignore[arg-type]
    estargz.build("tree")  # type: ignore[call-arg]


def writes() -> None:
    with estargz.Writer("layer.esgz", level=2) as writer:
        assert_type(writer.write(b"tar"), int)
        assert_type(writer.write(memoryview(b"tar")), int)
    assert_type(writer.close(), estargz.Layer)
    compressor = estargz.Compressor(level=2)
    assert_type(compressor(io.BytesIO(), "application/vnd.oci.image.layer.v1.tar+gzip"), estargz.Writer)
    assert_type(compressor.finalize(), estargz.Layer)


def reads() -> None:
    with estargz.open("layer.esgz", toc_digest=None) as blob:
        assert_type(blob, estargz.Blob)
        assert_type(blob.read("etc/passwd"), bytes)
        assert_type(blob.stream("etc/passwd"), Iterator[bytes])
        assert_type([entry.name for entry in blob.toc], list[str])
    assert_type(estargz.verify("layer.esgz", diff_id="sha256:"), estargz.Report)


def fails(error: estargz.EstargzError) -> int:
    if isinstance(error, estargz.SinkError):
        assert_type(error.errno, int | None)
    return error.exit_code
