"""What constructors that fail, and builds that do not end well, leave behind. Run by sanitizers.py, in ASan's build.

    leaks.py [STEP]

Every case, or every STEPth, is run four times some rounds. It leaks if each of the last three times left more bytes than one
small object a round, more descriptors, or more of the mappings that compressors lie in; or if LeakSanitizer finds memory in
the end that nothing points to. Prints the names of the cases, and on standard error what leaks.
"""

from __future__ import annotations

import ctypes
import gc
import gzip
import io
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import astuple, dataclass
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from reference.blobs import tar_of
from tars import END, everything

import estargz
from estargz import _crew, _extract, _index, _inflate, _inflate_ahead, _layer, _record, _tar, _tar_order, _walk

Case = Callable[[], object]
SMALL = everything() + END
NOISE = tar_of(*((f"f{number}", os.urandom(300_000)) for number in range(12)))
GZIP = gzip.compress(SMALL) + gzip.compress(NOISE)
SCRATCH = Path(tempfile.mkdtemp(prefix="estargz-leaks-"))
TREE = SCRATCH / "tree"
ROUNDS = (25, 200, 1000)
OBJECT = 24  # bytes: fewer than those of any object that the package makes
SLACK = 256  # bytes: of this program itself
SANITIZER = ctypes.CDLL(None)
ALLOCATED = SANITIZER["__sanitizer_get_current_allocated_bytes"]
ALLOCATED.restype = ctypes.c_size_t

BUILDER = {
    "compression": "estargz",
    "level": 6,
    "portable": False,
    "chunk_size": 1 << 22,
    "min_chunk_size": 0,
    "threads": 2,
    "memory": 128 << 20,
    "producer_helps": False,
    "write": None,
}
EXTRACTOR = {
    "ours": True,
    "owners": False,
    "xattrs": False,
    "uid": 0,
    "gid": 0,
    "umask": 0,
    "threads": 2,
    "memory": 8 << 20,
    "handles": 16,
    "max_size": None,
    "max_entries": None,
    "paths": None,
    "salt": bytes(8),
    "progress": None,
}
INDEX = {"max_name": 4096, "max_depth": 100, "max_nodes": 1000, "max_chunks": 1000}


class Broken(Exception):
    pass


class Sink:
    """Raises at its n-th write."""

    def __init__(self, at: int) -> None:
        self.left = at

    def write(self, data: bytes) -> int:
        self.left -= 1
        if self.left < 0:
            raise Broken
        return len(data)


class Source(io.RawIOBase):
    """Raises at its n-th read."""

    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.left = io.BytesIO(data), at

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.left -= 1
        if self.left < 0:
            raise Broken
        return self.data.readinto(memoryview(buffer)[:100_000])


def raising(done: int) -> None:
    raise Broken


# --- constructors


def constructors() -> Iterator[tuple[str, Case]]:
    """Each with each of its arguments wrong in each way: of another type, out of range, not there, one too many."""
    gzipped = np.frombuffer(GZIP, np.uint8)
    tables: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = [
        (_crew.Crew, (2, 1 << 20), {}),
        (_layer.LayerBuilder, (), {**BUILDER, "output": "x", "progress": None, "crew": None, "parts": ["read"]}),
        (_inflate.InflateReader, (io.BytesIO(GZIP), "gzip"), {"name": "x", "single": False}),
        (_inflate_ahead.InflateAhead, (gzipped, "gzip"), {"threads": 2, "members": np.zeros(2, np.int64), "begin": 0,
                                                          "end": len(GZIP), "segment": 1000, "crew": None, "name": "x"}),
        (_inflate_ahead.InflateAhead, (Source(GZIP, 5), "gzip"), {"threads": 2, "memory": 1 << 20, "crew": None}),
        (_index.TocIndex, (), INDEX),
        (_extract.Extractor, (os.open(SCRATCH, os.O_RDONLY),), EXTRACTOR),
        (_tar_order.TarOrder, (_layer.LayerBuilder(**BUILDER), 0, 0, 10), {}),
        (_walk.TreeWalk, (_layer.LayerBuilder(**BUILDER), 0, [0]), {"overlay": False, "epoch": None,
                                                                    "landmarks_reserved": True}),
        (estargz.Writer, (io.BytesIO(),), {"threads": 2, "memory": 1 << 30, "compression": "zstd", "level": 3}),
        (estargz.Compressor, (), {"threads": 2, "memory": 1 << 30, "compression": "gzip", "level": 3}),
        (estargz.Pool, (2, 1 << 30), {}),
        (estargz.open, (gzipped,), {}),
        (_tar.emit, (b"name",), {"size": 1, "mtime_s": 0, "xattrs": [(b"user.a", b"1")], "link": b"x", "type": b"0"}),
        (_tar.parse, (SMALL,), {}),
        (_inflate.read_chunk, (gzipped, 0, len(GZIP), 0, len(SMALL)), {"name": "x"}),
        (_inflate.check_chunks, (gzipped, np.zeros(3, _inflate.JOB_FIELDS)), {"threads": 2}),
    ]  # fmt: skip
    for made, positional, named in tables:
        name = made.__qualname__
        for at in range(len(positional)):
            swaps = [(*positional[:at], wrong, *positional[at + 1 :]) for wrong in WRONG]
            yield f"{name}: argument {at}", partial(each, [partial(made, *swap, **named) for swap in swaps])
        for key in named:
            if (name, key) != ("Extractor", "salt"):  # its size is a contract of the package with itself
                calls = [partial(made, *positional, **{**named, key: wrong}) for wrong in WRONG]
                yield f"{name}: {key}", partial(each, calls)
        yield f"{name}: too many and too few", partial(each, [partial(made, *positional, 1, 1, 1, 1, **named), made])
    arguments = ([b"/nowhere"], [b"x"], [], None, b"/")
    yield "run: no such program", partial(_record.run, *arguments, until_exit=True, adopt_orphans=False)


def each(calls: list[Case]) -> None:
    for call in calls:
        with suppress(Exception):
            call()


WRONG: list[Any] = [None, -1, 1 << 62, 1 << 70, "\ud800", b"\0" * 7, [object()], {"a": 1}, 1.5, object()]


# --- layers


def builds() -> Iterator[tuple[str, Case]]:
    """Each way of making a layer, with each way in which it may end early."""
    pool = estargz.Pool(2)
    for compression, threads, shared in product(["estargz", "gzip", "zstd", "uncompressed"], [1, 3], [None, pool]):
        options = {"compression": compression, "threads": threads, "pool": shared}
        how = f"{compression}, {threads} threads{', in a pool' if shared else ''}"
        build = partial(estargz.build, **options)
        for at in (0, 1, 3):
            yield f"{how}: sink fails at {at}", lambda at=at, build=build: build(io.BytesIO(NOISE), Sink(at))
            yield f"{how}: tree, sink fails at {at}", lambda at=at, build=build: build(TREE, Sink(at))
        for at in (0, 1, 2, 9):
            yield f"{how}: source fails at {at}", lambda at=at, build=build: build(Source(NOISE, at), io.BytesIO())
            yield f"{how}: gzip source fails at {at}", lambda at=at, build=build: build(Source(GZIP, at), io.BytesIO())
        for name, data in (("cut", NOISE[:-5000]), ("broken", NOISE[: 1 << 20] + b"x" * 4096), ("cut gzip", GZIP[:-9])):
            yield f"{how}: {name}", lambda data=data, build=build: build(io.BytesIO(data), io.BytesIO())
        yield f"{how}: path", lambda build=build: build(TREE, SCRATCH / "nowhere" / "blob")
        yield f"{how}: writer aborted", lambda options=options: writer(options).abort()
        yield f"{how}: writer dropped", lambda options=options: writer(options)
        yield f"{how}: writer cut", lambda options=options: writer(options).close()
        yield f"{how}: writer's sink fails", lambda options=options: writer(options, Sink(1)).close()
        if compression == "estargz":
            yield f"{how}: progress raises", lambda build=build: build(Slow(), io.BytesIO(), progress=raising)
            yield f"{how}: nothing to prefetch", lambda build=build: build(TREE, io.BytesIO(), prefetch=["no"])
            yield (
                f"{how}: the same of a tar",
                lambda build=build: build(io.BytesIO(GZIP), io.BytesIO(), prefetch=["no"]),
            )


class Slow(Source):
    """So slow that progress is told."""

    def __init__(self) -> None:
        super().__init__(NOISE, sys.maxsize)

    def readinto(self, buffer: Any) -> int:
        time.sleep(0.02)
        return super().readinto(buffer)


def writer(options: dict[str, Any], dest: Any = None) -> estargz.Writer:
    made = estargz.Writer(dest or io.BytesIO(), **options)
    made.write(NOISE[:-70_000])
    return made


def readings() -> Iterator[tuple[str, Case]]:
    """Blobs that are not whole, opened, read, verified, extracted."""
    sink = io.BytesIO()
    estargz.build(io.BytesIO(SMALL[:-1024] + NOISE), sink, chunk_size=1 << 16)
    blob = sink.getvalue()
    damaged = bytearray(blob)
    damaged[5000:5010] = b"damaged!!!"
    blobs = {"whole": blob, "cut": blob[:-100], "damaged": bytes(damaged), "gzip": GZIP, "cut gzip": GZIP[:-9]}
    for name, data in {**blobs, "tar": NOISE, "cut tar": NOISE[:-5000], "empty": b"", "footer": blob[-51:]}.items():
        yield f"{name}: opened", partial(estargz.open, data)
        yield f"{name}: read", partial(read_all, data)
        yield f"{name}: verified", partial(estargz.verify, data)
        for threads in (1, 3):
            extract = partial(estargz.extract, data, SCRATCH / "out", threads=threads, same_owner=False)
            yield f"{name}: extracted, {threads} threads", partial(extracted, extract)
            yield f"{name}: too large, {threads} threads", partial(extracted, partial(extract, max_size=1_000_000))
        yield f"{name}: extracted to nowhere", partial(estargz.extract, data, "/dev/null/x")
        for kind in ("gzip", "zstd", "plain"):
            yield f"{name}: inflated as {kind}", partial(inflate, data, kind)


def read_all(data: bytes) -> None:
    with estargz.open(data) as blob:
        blob.read("f3")


def extracted(extract: Case) -> None:
    try:
        extract()
    finally:
        shutil.rmtree(SCRATCH / "out", ignore_errors=True)


def inflate(data: bytes, kind: str) -> None:
    with suppress(Exception):
        _inflate.InflateReader(io.BytesIO(data), kind).read()
    with suppress(Exception):
        _inflate_ahead.InflateAhead(data, kind, threads=3, segment=1000).read(100_000)  # and dropped
    with _inflate_ahead.InflateAhead(Source(data, 3), kind, threads=2) as ahead:
        ahead.read()


# --- what is left


@dataclass(frozen=True, slots=True)
class Held:
    """What the process has."""

    memory: int
    descriptors: int
    placed: int

    @classmethod
    def now(cls) -> Held:
        gc.collect()
        maps = Path("/proc/self/maps").read_text().splitlines()
        placed = sum(0x2 << 44 <= int(line.partition("-")[0], 16) < 0x7 << 44 for line in maps)
        return cls(ALLOCATED(), len(os.listdir("/proc/self/fd")), placed)


def leak_of(case: Case) -> str:
    """What a case leaves behind each time; nothing: "". Python's own tables grow now and then, which more rounds show."""
    for rounds in ROUNDS:
        memory, descriptors, placed = growth(case, rounds)
        if memory < SLACK + OBJECT * rounds and descriptors < 1 and placed < 1:
            return ""
    return f"{memory} bytes, {descriptors} descriptors, {placed} mappings in {rounds} rounds"


def growth(case: Case, rounds: int) -> list[int]:
    """The least that any of three times so many rounds have added."""
    held = []
    for _ in range(4):
        for _ in range(rounds):
            with suppress(Exception):
                case()
        held.append(astuple(Held.now()))
    return [min(after - before for before, after in pairwise(values)) for values in zip(*held, strict=True)]


def main(step: int) -> int:
    prepare()
    status = 0
    for name, case in [*constructors(), *builds(), *readings()][::step]:
        print(name, flush=True)
        if leak := leak_of(case):
            print(f"{name}: leaks {leak}", file=sys.stderr, flush=True)
            status = 1
    shutil.rmtree(SCRATCH)
    if SANITIZER.__lsan_do_recoverable_leak_check():
        print("LeakSanitizer found memory that nothing points to", file=sys.stderr)
        status = 1
    return status


def prepare() -> None:
    TREE.mkdir()
    for number in range(12):
        (TREE / f"f{number}").write_bytes(os.urandom(300_000))
    gc.freeze()  # what is there will stay, and need not be looked through each time


if __name__ == "__main__":
    sys.exit(main(int("".join(sys.argv[1:2]) or "1")))
