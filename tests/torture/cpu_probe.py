"""Compresses a tar at every level and prints whose bytes each level has and which they are; run on one CPU after another.

cpu_probe.py TAR COMPRESSION:LEVELS[:portable]...    such as estargz:1,2,3:portable zstd:19
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import zlib
from pathlib import Path
from typing import Any

import estargz
from estargz import _codec


def probe(tar: bytes, compression: str, level: int, portable: bool) -> dict[str, Any]:
    """The layer, and whether other code agrees with its digests and inflates it to the tar."""
    sink = io.BytesIO()
    how: dict[str, Any] = {"compression": compression, "level": level, "portable": portable}
    layer = estargz.build(io.BytesIO(tar), sink, threads=1, **how)
    blob, back = sink.getvalue(), io.BytesIO()
    estargz.build(io.BytesIO(blob), back, compression="uncompressed", threads=1)
    right = layer.digest == f"sha256:{hashlib.sha256(blob).hexdigest()}" and back.getvalue() == tar
    if compression in ("estargz", "gzip"):
        stream = inflated(blob)
        right = right and stream.startswith(tar) and layer.diff_id == f"sha256:{hashlib.sha256(stream).hexdigest()}"
    if compression == "estargz" and _codec.cpu_class() != "base":  # numpy, with which layers are read, needs SSE 4.2
        estargz.verify(blob, toc_digest=layer.toc_digest, diff_id=layer.diff_id)
    return {"encoder": layer.encoder, "digest": layer.digest, "right": right}


def inflated(blob: bytes) -> bytes:
    """All members, by zlib."""
    parts = []
    while blob:
        member = zlib.decompressobj(wbits=31)
        parts += [member.decompress(blob), member.flush()]
        blob = member.unused_data
    return b"".join(parts)


def main() -> None:
    tar = Path(sys.argv[1]).read_bytes()
    found = {}
    for asked in sys.argv[2:]:
        compression, levels, *portable = asked.split(":")
        for level in map(int, levels.split(",")):
            name = " ".join([compression, str(level), *portable])
            found[name] = probe(tar, compression, level, bool(portable))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
