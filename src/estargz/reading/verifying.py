"""Proving that a blob is what it claims to be, before anyone relies on either of its two views.

      +-> chunk jobs -> inflate -> SHA-256 = TOC's digests          (threads)
blob -+-> inflate -> tar scan -> rows = TOC entries, one by one     (one thread)
      |        `---> SHA-256 = DiffID                               (one thread, ahead of the scan)
      `-> TOC member, footer: nothing in between

and, when asked to be strict, what estargz.reading.strict makes of the same rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from base64 import b64encode
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from estargz._index import FLAG_CHUNK_DIGEST, FLAG_DIGEST
from estargz._inflate import (
    CHECK_CHUNK,
    FILE_LAST,
    FILE_PART,
    JOB_FIELDS,
    MISMATCH,
    InflateReader,
    check_chunks,
    detect,
)
from estargz.digest import parse_digest, sha256
from estargz.errors import BlobError, EstargzError, UsageError, VerificationError, brief, from_status
from estargz.reading import blob as blobs
from estargz.reading.blob import Blob, Tar
from estargz.reading.content import AHEAD_SIZE, Contents, RegularFile
from estargz.reading.findings import Finding, Findings, families
from estargz.reading.footer import footer_of
from estargz.reading.members import MemberReader
from estargz.reading.scan import Scan, scan_tar
from estargz.reading.source import Readable, Source, Window, blob_errors, open_source
from estargz.reading.strict import examine
from estargz.reading.toc import go_text, modtime_seconds, owners
from estargz.threads import Threads

__all__ = ["Report", "verify"]

_BLOCK = 1 << 20  # bytes inflated at a time
_AHEAD = 3  # blocks that wait for the tar scan
_JOB = np.dtype(JOB_FIELDS)
_TYPES = {48: "reg", 49: "hardlink", 50: "symlink", 51: "char", 52: "block", 53: "dir", 54: "fifo"}


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """What verify() proved. Sizes are in bytes.

    format:             "estargz", "legacy" (47-byte footer), or "gzip", "zstd", "plain" for an ordinary layer, of which
                        only the stream's own checksums and the DiffID were checked
    size:               of the blob
    diff_id:            SHA-256 of the inflated stream, a TOC included
    uncompressed_size:  of the same stream
    toc_digest:         SHA-256 of the TOC's JSON; None for an ordinary layer
    entries:            entries of the tar, each equal to the TOC's
    files:              regular files among them, each digest recomputed from its chunks and from the tar
    chunks:             parts read at the TOC's offsets, as a lazily pulling runtime does
    payload_size:       of the files
    findings:           of a strict verification: errors first, at most 100 of each code and severity
    finding_counts:     code -> how many there are
    accepted:           runtime (findings.RUNTIMES) -> whether it takes the layer and shows what a full pull shows; empty
                        unless verification was strict
    """

    format: str
    size: int
    diff_id: str
    uncompressed_size: int
    toc_digest: str | None = None
    entries: int = 0
    files: int = 0
    chunks: int = 0
    payload_size: int = 0
    findings: tuple[Finding, ...] = ()
    finding_counts: dict[str, int] = dataclasses.field(default_factory=dict)
    accepted: dict[str, bool] = dataclasses.field(default_factory=dict)

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Those findings that are wrong for everyone, or refused by a runtime that was required."""
        return tuple(finding for finding in self.findings if finding.severity == "error")


def verify(
    source: Readable,
    *,
    toc_digest: str | None = None,
    diff_id: str | None = None,
    threads: int | None = None,
    strict: bool = False,
    runtimes: Iterable[str] = (),
) -> Report:
    """Check a whole blob, in memory that does not grow with the sizes it states.

    source:      path, file or bytes of the blob, or a RangeReader, which is asked for all of it twice: for the chunks and
                 for the stream; a chunk at a time is then in memory, of 1 GiB at most
    toc_digest:  "sha256:..." that the TOC must have, from the image's manifest; without it the TOC is taken as found
    diff_id:     "sha256:..." that the inflated stream must have, from the image's configuration
    threads:     for the chunks; default: one per CPU
    strict:      also look for what digests do not show: places, names, links and spellings that readers take differently,
                 bytes that only some of them see, and what each runtime would refuse. What is found is not raised but
                 reported, all of it: look at Report.errors
    runtimes:    of "stargz-snapshotter", "containers-storage" and "full-pull": what these refuse is an error; implies strict

    Proves for an eStargz blob: the footer and the TOC are well-formed, with nothing in between or around; every chunk,
    read at the TOC's offsets, has its digest, and every file the digest of its chunks in a row; the TOC's entries are
    the tar's, in number, order and all they state; every gzip checksum; and the two digests, as far as given.
    A blob without an eStargz footer is accepted only with a ``diff_id``, without ``toc_digest`` and not strictly: then the
    DiffID is checked, and the stream's own checksums.

    Raises UsageError for malformed digests, threads or runtimes, OSError, BlobError for a malformed blob, and
    VerificationError, which names the entry, what was expected and what was found, for anything that does not match.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be 1 or more, not {threads}")
    for text, what in ((toc_digest, "TOC digest"), (diff_id, "DiffID")):
        if text is not None:
            parse_digest(text, what)
    required = families(runtimes)
    strict = strict or bool(required)
    if diff_id is not None and toc_digest is None and not strict:
        opened = open_source(source)
        try:
            if footer_of(opened) is None:
                return _verify_plain(opened, diff_id)
        finally:
            opened.close()
    with blobs.open(source, toc_digest=toc_digest) as blob:
        return _verify_blob(blob, diff_id, threads or os.cpu_count() or 1, required if strict else None)


def _verify_plain(source: Source, diff_id: str) -> Report:
    kind = detect(source.read_at(0, 4))
    stream = hashlib.sha256()
    size = 0
    with blob_errors():
        for block in _blocks(InflateReader(Window(source, 0, source.size), kind, name=source.name)):
            stream.update(block)
            size += len(block)
    _expect_diff_id(source.name, diff_id, "sha256:" + stream.hexdigest())
    return Report(kind, source.size, diff_id, size)


def _verify_blob(blob: Blob, diff_id: str | None, threads: int, required: frozenset[str] | None) -> Report:
    """``required``: what to be strict about; None: not to be strict."""
    work = _plan(blob)
    members = MemberReader(blob) if required is not None else None
    stream = _Ahead(members or blob.open_tar())
    with Threads(1, "estargz-scan") as pool, stream:
        scanning = pool.submit(_scan, stream)
        if blob.kernel_source is None:
            _check_distant(blob, work)
        elif (failure := check_chunks(blob.kernel_source, work.jobs, threads)) is not None:
            stream.cancel()
            raise _chunk_error(blob, work, *failure)
        with blob_errors():
            scan = scanning.result()
        _compare(blob, scan)
        _finish_stream(blob, stream)
    found = "sha256:" + stream.digest.hexdigest()
    _expect_diff_id(blob.name, diff_id, found)
    findings = Findings() if members is None or required is None else examine(blob, scan, members, required)
    return Report(
        format=blob.footer.format,
        size=blob.size,
        diff_id=found,
        uncompressed_size=stream.size,
        toc_digest=blob.toc_digest,
        entries=len(scan.rows),
        files=int((blob.entries["type"] == b"reg").sum()),
        chunks=len(work.jobs),
        payload_size=int(work.jobs["size"].sum()),
        findings=findings.kept,
        finding_counts=dict(findings.counts),
        accepted=findings.accepted if members is not None else {},
    )


def _expect_diff_id(name: str, wanted: str | None, found: str) -> None:
    if wanted is not None and wanted != found:
        raise VerificationError(
            f"{name}: DiffID: expected {wanted}, found {found}; the blob is not the layer that the configuration names"
        )


# --------------------------------------------------------------------------------------------------------------------
# chunks against the digests in the TOC


class _Work(NamedTuple):
    """Chunk jobs for the kernel; for each of them its row in the table and the row of its file."""

    jobs: NDArray[np.void]
    rows: NDArray[np.int64]
    files: NDArray[np.int64]


def _plan(blob: Blob) -> _Work:
    rows = np.flatnonzero(blob.entries["end"] > 0)
    files = blob.files_of_rows[rows]
    part, file = blob.entries[rows], blob.entries[files]
    _expect_digests(blob, rows, files)
    only = np.bincount(files, minlength=len(blob.toc))[files] == 1
    stated = part["flags"] & FLAG_CHUNK_DIGEST != 0
    # A file of one chunk may leave either digest to stand for both.
    known = np.where((stated | ~only)[:, None], part["chunk_digest"], file["digest"])
    whole = only & (known == file["digest"]).all(axis=1)
    last = np.append(files[1:] != files[:-1], True) if len(files) else np.empty(0, bool)
    jobs = np.zeros(len(rows), _JOB)
    for field in ("offset", "end", "inner_offset"):
        jobs[field] = part[field]
    jobs["size"] = np.where(part["chunk_size"] > 0, part["chunk_size"], file["size"] - part["chunk_offset"])
    jobs["flags"] = np.where(stated | only, CHECK_CHUNK, 0)
    jobs["flags"] |= np.where(whole, 0, FILE_PART)
    jobs["flags"] |= np.where(~whole & last, FILE_LAST, 0)
    jobs["digest"] = known
    jobs["file_digest"] = file["digest"]
    return _Work(jobs, rows, files)


def _expect_digests(blob: Blob, rows: NDArray[np.int64], files: NDArray[np.int64]) -> None:
    """Every file with a payload states its digest, and all digests are well-formed."""
    asked = np.union1d(rows, files)
    odd = [row for row in blob.toc.tree.apart if row in asked]
    lacking = files[blob.entries["flags"][files] & FLAG_DIGEST == 0]
    for row in sorted([*odd, *lacking[:1].tolist()]):
        entry = blob.toc[row]
        for text in [entry.digest] * (entry.type == "reg") + [entry.chunk_digest] * (entry.chunk_digest != ""):
            try:
                parse_digest(text)
            except UsageError as error:
                raise BlobError(f"{blob.name}: {brief(entry.name)!r}: TOC: {error}; build the blob again") from None


def _check_distant(blob: Blob, work: _Work) -> None:
    """The chunks of a blob that is read by ranges, one in memory at a time."""
    source = blob.raw(0, 0).source
    contents = Contents(source)
    ahead = 0
    for row in np.unique(work.files).tolist():
        entry = blob.toc[row]
        file = RegularFile(entry.name, entry.size, entry.digest, blob.chunks_at(row))
        if file.chunks[-1].end > ahead:
            begin = file.chunks[0].offset
            ahead = min(begin + AHEAD_SIZE, blob.toc_offset)
            source.prefetch([(begin, ahead - begin)])
        _drain(contents.stream(file))
        if len(file.chunks) == 1 and file.chunks[0].digest != file.digest:
            # The same bytes cannot have both digests: this raises for the other one.
            _drain(contents.stream(file._replace(chunks=[file.chunks[0]._replace(digest=file.digest)])))


def _drain(parts: Iterator[bytes]) -> None:
    for _ in parts:
        pass


def _chunk_error(blob: Blob, work: _Work, index: int, status: int, errno: int, at: int, found: bytes) -> BaseException:
    file = blob.toc[int(work.files[index])]
    chunk = blob.chunks_at(int(work.files[index]))[int(work.rows[index] - work.files[index])]
    where = f"{blob.name}: {brief(file.name)!r}, chunk at {chunk.chunk_offset} (blob offset {chunk.offset})"
    if status < 0:
        cause = from_status(status, errno, where, at)
        return VerificationError(str(cause)) if isinstance(cause, EstargzError) else cause
    wanted = chunk.digest if status == MISMATCH else file.digest
    what = "" if status == MISMATCH else "digest of the whole file: "
    return VerificationError(f"{where}: {what}expected {wanted}, found sha256:{found.hex()}")


# --------------------------------------------------------------------------------------------------------------------
# the stream


def _blocks(reader: InflateReader) -> Iterator[memoryview]:
    block = memoryview(bytearray(_BLOCK))
    while count := reader.readinto(block):
        yield block[:count]


class _Ahead:
    """The tar stream of a blob, inflated and hashed by a thread of its own some blocks ahead of who reads it."""

    def __init__(self, reader: Tar | MemberReader) -> None:
        self.reader = reader
        self.digest = hashlib.sha256()
        self.size = 0
        self._pool = Threads(1, "estargz-inflate")
        self._coming: deque[Future[memoryview]] = deque()
        self._block = memoryview(b"")
        self._cancelled = False

    def __enter__(self) -> _Ahead:
        for _ in range(_AHEAD):
            self._coming.append(self._pool.submit(self._inflate))
        return self

    def __exit__(self, *exception: object) -> None:
        self.cancel()
        self._pool.shutdown(cancel_futures=True)

    def cancel(self) -> None:
        """Whoever reads gets an error instead of the next block."""
        self._cancelled = True

    def add(self, data: memoryview) -> None:
        """Count bytes that follow the tar in the inflated stream."""
        self.digest.update(data)
        self.size += len(data)

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes, as many as are at hand; empty at the end."""
        if not self._block:
            if self._cancelled:
                raise EstargzError("verification was cancelled")
            if not self._coming:
                return b""
            self._block = self._coming.popleft().result()
            if self._block:
                self._coming.append(self._pool.submit(self._inflate))
            else:
                self._coming.clear()
        part = bytes(self._block[:size])
        self._block = self._block[size:]
        return part

    def _inflate(self) -> memoryview:
        block = bytearray(_BLOCK)
        data = memoryview(block)[: self.reader.readinto(block) or 0]
        self.add(data)
        return data


def _scan(stream: _Ahead) -> Scan:
    scan = scan_tar(stream)
    if stream.read(1):
        raise BlobError("the tar scan stopped before the end of the stream")
    return scan


def _finish_stream(blob: Blob, stream: _Ahead) -> None:
    """Inflate what follows the tar: exactly the TOC's member and the footer's."""
    end = blob.size - blob.footer.size
    if blob.toc_end != end:
        raise VerificationError(
            f"{blob.name}: {end - blob.toc_end} bytes at byte {blob.toc_end}, between the TOC and the footer"
        )
    with blob_errors():
        for block in _blocks(InflateReader(blob.raw(blob.toc_offset, end), "gzip", name=blob.name, strict=True)):
            stream.add(block)
        footer = InflateReader(blob.raw(end, blob.size), "gzip", name=f"{blob.name}: footer", strict=True)
        if footer.read(1):
            raise VerificationError(f"{blob.name}: the footer at byte {end} holds data")


# --------------------------------------------------------------------------------------------------------------------
# TOC entries against tar entries


class _Facts(NamedTuple):
    """What the TOC states of a tar entry and the tar must confirm."""

    name: str
    type: str
    size: int
    modtime: int
    link_name: str
    mode: int
    uid: int
    gid: int
    user_name: str
    group_name: str
    dev_major: int
    dev_minor: int
    xattrs: dict[str, str]
    digest: str


_EMPTY_DIGEST = sha256(b"")


def _compare(blob: Blob, scan: Scan) -> None:
    """Both views, entry by entry, in both directions."""
    pairs = zip_longest(_tar_facts(scan), _toc_facts(blob))
    for index, (tar, toc) in enumerate(pairs):
        if tar == toc:
            continue
        where = f"{blob.name}: entry {index}"
        if toc is None:
            raise VerificationError(f"{where}: {brief(repr(tar.name))} is in the tar and not in the TOC")
        if tar is None:
            raise VerificationError(f"{where}: {brief(repr(toc.name))} is in the TOC and not in the tar")
        for field, is_, says in zip(_Facts._fields, tar, toc, strict=True):
            if is_ != says:
                raise VerificationError(
                    f"{where} {brief(repr(tar.name))}: {field}: the tar has {brief(repr(is_))}, the TOC {brief(repr(says))}"
                )


def _toc_facts(blob: Blob) -> Iterator[_Facts]:
    times: dict[str, int] = {}
    for entry, (user, group) in zip(blob.toc, owners(blob.toc), strict=True):
        if entry.type == "chunk":
            continue
        if entry.modtime not in times:
            try:
                times[entry.modtime] = modtime_seconds(entry.modtime)
            except ValueError as error:
                raise VerificationError(
                    f"{blob.name}: {brief(entry.name)!r}: modtime {error}; build the blob again"
                ) from None
        digest = entry.digest or (_EMPTY_DIGEST if entry.type == "reg" and entry.size == 0 else "")
        yield _Facts(
            entry.name,
            entry.type,
            entry.size,
            times[entry.modtime],
            entry.link_name,
            entry.mode,
            entry.uid,
            entry.gid,
            user,
            group,
            entry.dev_major,
            entry.dev_minor,
            entry.xattrs,
            digest,
        )


def _tar_facts(scan: Scan) -> Iterator[_Facts]:
    """The rows of a scan; names are filled in as a reader of the TOC does."""
    users: dict[int, str] = {}
    groups: dict[int, str] = {}
    for row in _records(scan.rows):
        strings = _strings(scan.strings, row)
        uid, gid, kind = row["uid"], row["gid"], _TYPES.get(row["type"], "unknown")
        if strings.user_name:
            users[uid] = go_text(strings.user_name)
        if strings.group_name:
            groups[gid] = go_text(strings.group_name)
        device = kind in ("char", "block")
        yield _Facts(
            go_text(strings.name),
            kind,
            row["size"] if kind == "reg" else 0,
            row["mtime_s"] if row["has_mtime"] else 0,
            go_text(strings.link) if kind in ("symlink", "hardlink") else "",
            row["mode"],
            uid,
            gid,
            users.get(uid, ""),
            groups.get(gid, ""),
            row["dev_major"] if device else 0,
            row["dev_minor"] if device else 0,
            _xattrs(strings.xattrs),
            "sha256:" + bytes(row["digest"]).hex() if row["has_digest"] else "",
        )


def _records(rows: NDArray[np.void]) -> Iterator[dict[str, Any]]:
    """Rows as dictionaries of Python numbers, some thousands converted at a time."""
    fields = rows.dtype.names or ()
    for first in range(0, len(rows), 4096):
        part = rows[first : first + 4096]
        for values in zip(*(part[field].tolist() for field in fields), strict=True):
            yield dict(zip(fields, values, strict=True))


class _Strings(NamedTuple):
    name: bytes
    link: bytes
    user_name: bytes
    group_name: bytes
    xattrs: bytes


def _strings(arena: bytes, row: dict[str, Any]) -> _Strings:
    """The strings of a row stand back to back in this order (rows.h)."""
    at = row["strings_at"]
    parts = []
    for field in _Strings._fields:
        parts.append(bytes(arena[at : at + row[f"{field}_len"]]))
        at += row[f"{field}_len"]
    return _Strings(*parts)


def _xattrs(packed: bytes) -> dict[str, str]:
    """Packed attributes (rows.h) as the TOC states them."""
    if not packed:
        return {}
    found = {}
    at = 0
    while at < len(packed):
        key_end = at + 8 + int.from_bytes(packed[at : at + 4], "little")
        value_end = key_end + int.from_bytes(packed[at + 4 : at + 8], "little")
        found[go_text(packed[at + 8 : key_end])] = b64encode(packed[key_end:value_end]).decode()
        at = value_end
    return found
