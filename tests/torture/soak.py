"""Thousands of builds in one process, of every kind and every outcome: what it holds at the end is what it held long before.

At rest between builds, resident memory, Python's memory and objects, descriptors, threads and mappings are noted; over the last
three quarters of the run, none of them may grow.
"""

from __future__ import annotations

import contextlib
import gc
import gzip
import io
import os
import random
import shutil
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from outcome import ROOT, Outcome, parser

sys.path.insert(0, str(ROOT / "tests"))

import zstandard
from reference.blobs import tar_of

import estargz
from estargz import EstargzError, Pool, Writer

BUILDS = 10_000
QUICK_BUILDS = 600
LOOKS = 40
# what is noted -> how much more it may be at the end of the last three quarters than at their beginning
ALLOWED: dict[str, float] = {
    "bytes resident": 3 << 20,
    "bytes of Python": 1 << 20,  # the interpreter's table of interned names takes another 970 kB once
    "objects": 300,
    "descriptors": 0.5,
    "threads": 0.5,
    "mappings": 8,
}


THREADS = len(os.listdir("/proc/self/task"))  # with those of numpy
# Has the allocator give back what is freed, so that what is resident is what is held. On its own it keeps some for every thread
# that there was at once, which comes to an end, but late.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class Spoiled(Exception):
    """What callers' own objects raise."""


class Failing(io.RawIOBase):
    """A source and a destination that fails after so many bytes."""

    def __init__(self, data: bytes, left: int) -> None:
        self.stream, self.left = io.BytesIO(data), left

    def readable(self) -> bool:
        return True

    def _spend(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise Spoiled

    def read(self, size: int = -1) -> bytes:
        self._spend(size)
        return self.stream.read(size)

    def write(self, data: object) -> int:
        size = memoryview(data).nbytes  # type: ignore[arg-type]
        self._spend(size)
        return size


class Soak:
    """A folder with what is built from, and one method for each kind of build."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng = folder, rng
        files = {f"d{number % 5}/f{number}": rng.randbytes(rng.randrange(20_000)) + bytes(9000) for number in range(40)}
        for name, data in files.items():
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "tree" / name).write_bytes(data)
        (folder / "lower").mkdir()
        self.big = rng.randbytes(3_000_000)
        self.tar = tar_of(*files.items(), ("big", self.big))
        self.forms = {"tar": self.tar, "gz": gzip.compress(self.tar, 1), "zst": zstandard.compress(self.tar)}
        self.blob = io.BytesIO()
        self.layer = estargz.build(io.BytesIO(self.tar), self.blob)
        self.pool = Pool(2)
        image = estargz.Image.new("linux/amd64").append(folder / "tree")
        image.export(f"type=oci,tar=false,dest={folder}/image,name=a:1,compression=gzip")
        self.kinds: dict[str, tuple[int, Callable[[], object]]] = {
            "trees": (8, self.tree),
            "changes": (2, lambda: self.build(self.folder / "tree", lower=self.folder / "lower")),
            "tars": (8, lambda: self.build(io.BytesIO(self.rng.choice(list(self.forms.values()))))),
            "with a pool": (2, self.side_by_side),
            "writers": (3, self.writer),
            "writers given up": (2, self.writer_given_up),
            "failing": (6, self.failing),
            "cancelled": (1, self.cancelled),
            "read": (4, self.read),
            "extracted": (1, self.extract),
            "converted": (1, self.convert),
            "in a child": (1, self.in_child),
        }

    def options(self) -> dict[str, object]:
        compression = self.rng.choice(["estargz", "gzip", "zstd", "uncompressed"])
        return {"compression": compression, "threads": self.rng.randrange(1, 4)}

    def build(self, source: object, **more: object) -> estargz.Layer:
        return estargz.build(source, io.BytesIO(), **self.options(), **more)  # type: ignore[arg-type]

    def tree(self) -> None:
        prefetch = {"prefetch": ["d1/**"], "compression": "estargz"} if self.rng.random() < 0.3 else {}
        options = {**self.options(), **prefetch}
        estargz.build(self.folder / "tree", self.folder / "out", **options)  # type: ignore[arg-type]

    def side_by_side(self) -> None:
        with ThreadPoolExecutor(4) as executor:
            list(executor.map(lambda form: self.build(io.BytesIO(form), pool=self.pool), self.forms.values()))

    def writer(self) -> None:
        with Writer(self.folder / "out", **self.options()) as writer:
            for at in range(0, len(self.tar), 500_000):
                writer.write(self.tar[at : at + 500_000])

    def writer_given_up(self) -> None:
        """By its owner, or by nobody but the garbage collector."""
        writer = Writer(self.folder / "out", **self.options())
        writer.write(self.tar[: self.rng.randrange(len(self.tar))])
        if self.rng.random() < 0.5:
            writer.abort()

    def failing(self) -> None:
        """Sources that are cut, damaged or raise, and destinations that raise or are not there."""
        left = self.rng.randrange(len(self.tar))
        form = self.rng.choice(["gz", "zst"])
        damaged = bytearray(self.forms[form])
        damaged[left % len(damaged)] ^= 255
        source, dest = self.rng.choice(
            [
                (io.BytesIO(self.tar[:left]), self.folder / "out"),
                (io.BytesIO(damaged), io.BytesIO()),
                (Failing(self.tar, left), self.folder / "out"),
                (io.BytesIO(self.tar), Failing(b"", left // 2)),
                (self.folder / "tree", self.folder / "gone" / "out"),
                (self.folder / "nothing", io.BytesIO()),
            ]
        )
        with contextlib.suppress(EstargzError, Spoiled):
            estargz.build(source, dest, **self.options())  # type: ignore[arg-type]

    def cancelled(self) -> None:
        class Slow(io.BytesIO):
            def read(self, size: int | None = -1) -> bytes:
                time.sleep(0.03)
                return super().read(min(size or 1, 100_000))

        def stop(done: int) -> None:
            raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            self.build(Slow(self.tar), progress=stop)
            raise AssertionError("a build that was to be cancelled has ended")

    def read(self) -> None:
        with estargz.open(self.blob.getvalue(), toc_digest=self.layer.toc_digest) as blob:
            assert blob.read("big") == self.big
            with blob.open("d1/f1") as file:
                file.read(100)
        if self.rng.random() < 0.3:
            estargz.verify(self.blob.getvalue(), toc_digest=self.layer.toc_digest, diff_id=self.layer.diff_id)

    def extract(self) -> None:
        estargz.extract(self.blob.getvalue(), self.folder / "extracted")
        shutil.rmtree(self.folder / "extracted")

    def convert(self) -> None:
        kind = self.rng.choice(["estargz", "zstd", "uncompressed"])
        with estargz.VariantStore(self.folder / "cache") as cache:
            store = cache if self.rng.random() < 0.5 else None
            target = f"oci:{self.folder}/converted:1"
            estargz.convert(f"oci:{self.folder}/image", target, compression=kind, cache=store, pool=self.pool)
        shutil.rmtree(self.folder / "converted")

    def in_child(self) -> None:
        """Forked while other threads build with the pool that it builds with, too."""
        others = [threading.Thread(target=self.side_by_side) for _ in range(2)]
        for other in others:
            other.start()
        child = os.fork()
        if child == 0:
            status = 1
            with contextlib.suppress(BaseException):
                layer = estargz.build(io.BytesIO(self.tar), io.BytesIO(), pool=self.pool)
                status = int(layer.digest != self.layer.digest)
            os._exit(status)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            raise AssertionError("a child's build failed")
        for other in others:
            other.join()


def held() -> dict[str, float]:
    """What this process holds at rest."""
    until = time.monotonic() + 5
    while len(os.listdir("/proc/self/task")) > THREADS and time.monotonic() < until:
        time.sleep(0.005)  # a thread that has ended may take a moment to let go of its build
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {
        "bytes resident": resident,
        "bytes of Python": tracemalloc.get_traced_memory()[0],
        "objects": len(gc.get_objects()),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "mappings": Path("/proc/self/maps").read_text().count("\n"),
    }


def rise(values: list[float]) -> float:
    """How much more the last third of values has than the first, but for a few that stick out."""
    third = len(values) // 3
    return median(values[-third:]) - median(values[:third])


def main() -> int:
    arguments = parser("soak", __doc__)
    arguments.add_argument("--builds", type=int, help=f"how many; default: {BUILDS}, with --quick {QUICK_BUILDS}")
    arguments.add_argument("--seed", type=int, default=1, help="of the choice of builds")
    arguments.add_argument("--kind", help="only the kinds whose name has this in it")
    arguments.add_argument("--allocator", action="store_true", help="leave the allocator as it is")
    options = arguments.parse_args()
    if not options.allocator and os.environ.get("MALLOC_ARENA_MAX") != "1":
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})
    outcome = Outcome("soak", options.quick)
    builds = options.builds or (QUICK_BUILDS if options.quick else BUILDS)
    tracemalloc.start(1)
    folder = Path(tempfile.mkdtemp(prefix="estargz-soak-"))
    looks: list[dict[str, float]] = []
    try:
        soak = Soak(folder, random.Random(options.seed))
        kinds = [kind for kind in soak.kinds if (options.kind or "") in kind]
        weights = [soak.kinds[kind][0] for kind in kinds]
        chosen = soak.rng.choices(kinds, weights, k=builds)
        for number, kind in enumerate(chosen):
            if number * LOOKS // builds == len(looks):
                looks.append(held())
            try:
                soak.kinds[kind][1]()
            except (EstargzError, OSError, AssertionError) as error:
                outcome.defect(f"build {number}, {kind}: {type(error).__name__}: {error}")
            outcome.count("builds")
            outcome.count(kind)
        looks.append(held())
        if any(soak.pool.crew.usage().values()):
            outcome.defect(f"the pool is not at rest: {soak.pool.crew.usage()}")
    finally:
        shutil.rmtree(folder)
    for what, allowed in ALLOWED.items():
        values = [look[what] for look in looks[len(looks) // 4 :]]
        print(f"soak: {what}: {values[0]:,.0f} -> {values[-1]:,.0f}, a rise of {rise(values):,.1f}")
        if rise(values) > allowed:
            outcome.defect(f"{what} rise by {rise(values):,.0f}, and {allowed:,.0f} are allowed: {values}")
    return outcome.close()


if __name__ == "__main__":
    sys.exit(main())
