"""eStargz blobs made plainly with the standard library, with every part open to damage."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from reference.scan import entries, toc_time

TYPES = {"0": "reg", "1": "hardlink", "2": "symlink", "3": "char", "4": "block", "5": "dir", "6": "fifo"}


def tar_of(*members: tuple[str, bytes] | tarfile.TarInfo, end: bool = True) -> bytes:
    """A tar of (name, content) pairs and ready-made headers without content; a name ending in / is a directory."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, content = member
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uid, info.uname = len(content), 1_600_000_000, 7, "seven"
            if name.endswith("/"):
                info.type, info.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(info, io.BytesIO(content))
        at = out.tell()
    return out.getvalue() if end else out.getvalue()[:at]


def link(name: str, target: str, kind: bytes = tarfile.LNKTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def member(data: bytes) -> bytes:
    return gzip.compress(data, 6, mtime=0)


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def footer(offset: int, digits: bytes | None = None) -> bytes:
    digits = b"%016x" % offset if digits is None else digits
    return b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x1a\0SG\x16\0" + digits + b"STARGZ\x01\0\0\xff\xff" + bytes(8)


def legacy_footer(offset: int) -> bytes:
    return b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x16\0" + b"%016x" % offset + b"STARGZ\x01\0\0\xff\xff" + bytes(8)


EXTERNAL_FOOTER = b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x15\0SG\x11\0STARGZEXTERNALTOC\x01\0\0\xff\xff" + bytes(8)


def toc_tar(text: bytes, name: str = "stargz.index.json") -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(text)
    block = info.tobuf(tarfile.USTAR_FORMAT)
    return block + text + bytes(-len(text) % 512) + bytes(1024)


def payload_and_toc(tar: bytes, chunk_size: int = 1 << 22, min_chunk: int = 0) -> tuple[bytes, dict[str, Any]]:
    """The compressed tar, one member per chunk, and its TOC."""
    blob, begin, toc = b"", 0, []
    pending, member_at = b"", 0  # inflated bytes of the member that is open, and where it begins
    for entry in entries(tar):
        stated = _stated(entry)
        toc.append(stated)
        for chunk_at in range(0, entry["size"], chunk_size):
            data_at = entry["data_at"] + chunk_at
            pending += tar[begin:data_at]
            begin = data_at
            if not min_chunk or len(member(pending)) >= min_chunk:
                blob, pending = blob + (member(pending) if pending else b""), b""
                member_at = len(blob)
            data = entry["payload"][chunk_at : chunk_at + chunk_size]
            chunk = stated if chunk_at == 0 else {"name": stated["name"], "type": "chunk", "chunkOffset": chunk_at}
            chunk |= {"offset": member_at, "innerOffset": len(pending), "chunkDigest": digest(data)}
            if len(data) == chunk_size:
                chunk["chunkSize"] = chunk_size
            if chunk_at:
                toc.append(chunk)
    rest = pending + tar[begin:]
    kept = [{key: value for key, value in entry.items() if value or key == "name"} for entry in toc]
    return blob + (member(rest) if rest else b""), {"version": 1, "entries": kept or None}


def _stated(entry: dict[str, Any]) -> dict[str, Any]:
    seconds = toc_time(entry["mtime"])
    time = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
    kind = TYPES[chr(entry["type"])]
    return {
        "name": entry["name"].decode(errors="replace"),  # right for single bytes that are no UTF-8
        "type": kind,
        "size": entry["size"],
        "modtime": time.strftime("%Y-%m-%dT%H:%M:%SZ") if seconds else "",
        "linkName": entry["link"].decode(errors="replace"),
        "mode": entry["mode"],
        "uid": entry["uid"],
        "gid": entry["gid"],
        "userName": entry["user_name"].decode(),
        "groupName": entry["group_name"].decode(),
        "devMajor": entry["dev_major"],
        "devMinor": entry["dev_minor"],
        "xattrs": {key.decode(): base64.b64encode(value).decode() for key, value in entry["xattrs"].items()},
        "digest": digest(entry["payload"]) if kind == "reg" else "",
    }


def encode(toc: dict[str, Any]) -> bytes:
    return json.dumps(toc, indent="\t").encode()


def assemble(
    payload: bytes,
    text: bytes,
    *,
    name: str = "stargz.index.json",
    split: Iterable[int] = (),
    before: bytes = b"",
    between: bytes = b"",
    make_footer: Callable[[int], bytes] = footer,
) -> bytes:
    """A blob of ready parts. split: where to cut the TOC's tar into more members; before, between: bytes around it."""
    toc, at = toc_tar(text, name), 0
    offset = len(payload) + len(before)
    blob = payload + before
    for cut in (*split, len(toc)):
        blob += member(toc[at:cut])
        at = cut
    return blob + between + make_footer(offset)


def estargz(
    tar: bytes,
    *,
    edit: Callable[[list[dict[str, Any]]], object] = lambda entries: None,
    chunk_size: int = 1 << 22,
    min_chunk: int = 0,
    **parts: Any,
) -> bytes:
    """A blob of a tar; edit changes the TOC's entries in place."""
    payload, toc = payload_and_toc(tar, chunk_size, min_chunk)
    edit(toc["entries"])
    return assemble(payload, encode(toc), **parts)
