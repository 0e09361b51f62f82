"""The worst inputs, each in a process of its own: what they take of memory and time, at one size and at four times that.

Each case states how many megabytes the larger of both may take beyond what the process had, and how it ends. Whatever it is,
four times the input may take MOST_GROWTH times the CPU time at most, and none may be ended by a signal or the clock.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import hostile_inputs as inputs
import outcome

import estargz
from estargz.errors import EstargzError
from estargz.image import archive, convert, layout, tree, variants  # noqa: F401  to be measured without their imports
from estargz.image.reference import Reference
from estargz.image.store import open_source
from estargz.reading import strict  # noqa: F401
from estargz.registry.auth import parse_challenges
from estargz.writing.access_log import match_all
from estargz.writing.timestamps import ClampedTar

MOST_GROWTH = 6.0
"""For four times the input; what is linear takes 4 to 5 times, by the caches of processors and the doubling of tables."""

_FLOOR = 0.25  # CPU seconds at the larger size, below which growth is noise
_LIMITS = {resource.RLIMIT_CPU: 300, resource.RLIMIT_AS: 8 << 30, resource.RLIMIT_FSIZE: 4 << 30}
_SECONDS = 600  # of wall time, of a step


@dataclass(frozen=True, slots=True)
class Case:
    """``make`` writes an input of size n, ``use`` is measured: it is given the input, and where it may write.

    full, quick: n of the smaller input
    megabytes:   most memory that the larger one takes
    expect:      a part of the error that the larger one ends with, and the smaller one may; "": both end well
    """

    name: str
    make: Callable[[Path, int], None]
    use: Callable[[Path, Path], object]
    full: int
    quick: int
    megabytes: int
    expect: str = ""


# --------------------------------------------------------------------------------------------------------------------
# what is done with an input


def build(path: Path, scratch: Path) -> None:
    estargz.build(path, "/dev/null", threads=2)


def build_ordered(path: Path, scratch: Path) -> None:
    estargz.build(path, "/dev/null", prefetch=["file1", "**/file9", "link9"], allow_missing=True, threads=2)


def build_bytewise(path: Path, scratch: Path) -> None:
    estargz.build(path, "/dev/null", chunk_size=1, threads=2)


def clamp(path: Path, scratch: Path) -> None:
    with path.open("rb") as file:
        stream = ClampedTar(file, 1)
        while stream.read(1 << 20):
            pass


def read(path: Path, scratch: Path) -> None:
    """Everything that is asked of a table of contents."""
    with estargz.open(path) as blob:
        for name in blob.listdir()[:100]:
            with suppress(OSError):
                blob.stat(name)
        last = blob.toc[len(blob.toc) - 1].name if len(blob.toc) else ""
        with suppress(OSError):
            blob.stat(last)
        blob.whiteouts(), blob.opaques(), blob.landmark, blob.owner("")
        with suppress(OSError):
            blob.byte_ranges([""])


def read_file(path: Path, scratch: Path) -> None:
    with estargz.open(path) as blob:
        for _ in blob.stream("file"):
            pass


def verify(path: Path, scratch: Path) -> None:
    estargz.verify(path, strict=True, threads=2)


def verify_plain(path: Path, scratch: Path) -> None:
    with suppress(estargz.VerificationError):
        estargz.verify(path, diff_id="sha256:" + "0" * 64)


def extract(path: Path, scratch: Path) -> None:
    estargz.extract(path, scratch / "tree", threads=2)


def extract_little(path: Path, scratch: Path) -> None:
    estargz.extract(path, scratch / "tree", threads=2, max_size=1 << 20)


def read_image(path: Path, scratch: Path) -> None:
    transport = "oci" if path.is_dir() else "docker-archive"
    source = open_source(Reference.parse(f"{transport}:{path}"))
    try:
        tree.read_tree(source)
    finally:
        source.close()


def convert_image(path: Path, scratch: Path) -> None:
    estargz.convert(f"oci:{path}", f"oci:{scratch / 'converted'}", compression="gzip")


def challenges(path: Path, scratch: Path) -> None:
    parse_challenges(path.read_text())


def access_log(path: Path, scratch: Path) -> None:
    log = estargz.read_access_log(path)
    match_all(log, [f"a/{'a' * 40}/{i}" for i in range(10)])


# --------------------------------------------------------------------------------------------------------------------
# the cases


def layer(name: str, pieces: inputs.Pieces, full: int, quick: int, megabytes: int, **expect: str) -> Iterator[Case]:
    """A tar, and the blob that is made of it, by all ways; ``expect``: by the name of the way."""
    plain, blob = inputs.plain(pieces), inputs.blob(pieces)
    for use in (build, build_ordered, clamp, extract, read, verify):
        make = blob if use in (read, verify) else plain
        less = 5 if use is extract else 1  # which takes its time for each file
        sizes = full // less, quick // less
        yield Case(f"{name}: {use.__name__}", make, use, *sizes, megabytes, expect.get(use.__name__, ""))


def stream(
    name: str, make: Callable[[Path, int], None], full: int, quick: int, megabytes: int, expect: str = ""
) -> Iterator[Case]:
    for use in (build, verify_plain, extract):
        yield Case(f"{name}: {use.__name__}", make, use, full, quick, megabytes, expect)


def toc(name: str, pieces: inputs.Pieces, full: int, quick: int, megabytes: int, expect: str = "") -> Case:
    return Case(name, inputs.table(pieces), read, full, quick, megabytes, expect)


CASES: list[Case] = [
    *layer("empty files", inputs.empty_files, 250_000, 5_000, 700),
    *layer("little files", inputs.little_files, 25_000, 2_500, 200),
    *layer("files at the end of deep paths", inputs.deep_files, 100, 25, 400),
    *layer("deep directories", inputs.deep_directories, 10_000, 2_500, 200),
    *layer("records of one header", inputs.records_of_one_header, 16_000, 16_000, 100),
    *layer("a record again and again", inputs.repeated_record, 24_000, 24_000, 100),
    *layer("attributes of one header", inputs.attributes_of_one_header, 2_500, 2_500, 100),
    *layer("records of many headers", inputs.records_of_many_headers, 250_000, 20_000, 600),
    *layer("headers of one entry", inputs.headers_of_one_entry, 100_000, 10_000, 64),
    *layer("long names of one entry", inputs.long_names_of_one_entry, 100_000, 10_000, 64),
    *layer("long names", inputs.long_names, 200, 20, 400),
    Case(
        "names that JSON makes six times as long: build",
        inputs.plain(inputs.names_of_no_text),
        build,
        45,
        45,
        600,
        "beyond 1 GiB",
    ),
    *layer("huge targets of links", inputs.huge_link_targets, 250, 25, 300, extract="File name too long"),
    *layer("duplicates", inputs.duplicates, 50_000, 2_500, 300),
    *layer("whiteouts of nothing", inputs.whiteouts_of_nothing, 100_000, 5_000, 400),
    *layer("opaque markers", inputs.opaque_markers, 100_000, 5_000, 400),
    *layer("whiteouts of directories", inputs.whiteouts_of_directories, 25_000, 5_000, 300),
    *layer("a chain of hard links", inputs.hard_link_chain, 15_000, 5_000, 300),
    *layer(
        "hard links in circles",
        inputs.hard_links_in_circles,
        25_000,
        5_000,
        300,
        read="leads back to itself",
        extract="target is not there",
    ),
    *layer("a chain of symlinks", inputs.symlink_chain, 25_000, 5_000, 300),
    *layer("entries below links", inputs.entries_below_links, 25_000, 5_000, 300),
    *layer("names that collide", inputs.colliding_names, 100_000, 5_000, 400),
    *layer("directories that are replaced", inputs.replaced_directories, 50_000, 5_000, 300),
    *layer("zeros", inputs.zeros, 512, 32, 200),
    *layer("zeros behind the end", inputs.zeros_behind_the_end, 512, 32, 200),
    Case("chunks of one byte: build", inputs.plain(inputs.one_file), build_bytewise, 250_000, 10_000, 800),
    Case("chunks of one byte: verify", inputs.blob(inputs.one_file, chunk_size=1), verify, 250_000, 5_000, 800),
    Case("chunks of one byte: read", inputs.blob(inputs.one_file, chunk_size=1), read_file, 250_000, 10_000, 800),
    *stream("empty members", inputs.empty_members, 250_000, 50_000, 64),
    *stream("members of one byte", inputs.members_of_one_byte, 250_000, 50_000, 64),
    *stream("empty blocks", inputs.empty_blocks, 10_000_000, 1_000_000, 64),
    *stream("extra fields", inputs.extra_fields, 1_000, 100, 64),
    *stream("false members", inputs.false_members, 10_000, 1_000, 100),
    *stream("zeros in gzip", inputs.zeros_in_gzip, 1024, 64, 100),
    *stream("zeros in zstd", inputs.zeros_in_zstd, 1024, 64, 100),
    *stream("empty frames", inputs.empty_frames, 250_000, 50_000, 64),
    *stream("skippable frames", inputs.skippable_frames, 250_000, 50_000, 64),
    *stream("a window of 2 GiB", inputs.frame_with(b"\x00\xa8"), 1, 1, 64, "zstd"),
    *stream("a content of 2^62 bytes", inputs.frame_with(b"\xe0" + (1 << 62).to_bytes(8, "little")), 1, 1, 64, "zstd"),
    Case("zeros up to a limit: extract", inputs.zeros_in_gzip, extract_little, 256, 16, 64, "beyond the size allowed"),
    toc("table: spaces", inputs.spaces, 64, 8, 600),
    Case("table: over a gibibyte", inputs.stated_size, read, 1, 1, 64, "over 1073741824"),
    toc("table: brackets", inputs.brackets, 50_000, 50_000, 64, "JSON"),
    toc("table: objects", inputs.objects, 240_000, 60_000, 600),
    toc("table: digits", inputs.numbers, 10_000_000, 1_000_000, 200),
    toc("table: unknown keys", inputs.unknown_keys, 250_000, 25_000, 600),
    toc("table: escapes", inputs.escapes, 2_000_000, 250_000, 300),
    toc("table: compact entries", inputs.compact_entries, 200_000, 25_000, 900),
    toc("table: least entries", inputs.go_table(inputs.least_entries), 1_000_000, 50_000, 1500),
    toc("table: odd entries", inputs.go_table(inputs.odd_entries), 100_000, 10_000, 600),
    toc("table: implied directories", inputs.go_table(inputs.implied_directories), 500, 25, 700),
    toc("table: attributes", inputs.go_table(inputs.attributes), 20_000, 20_000, 200),
    Case(
        "a file of one-byte chunks: read",
        inputs.shared_member(inputs.chunks_of_one_byte),
        read_file,
        250_000,
        10_000,
        700,
    ),
    Case("files of one member: read", inputs.shared_member(inputs.files_of_one_member), read, 250_000, 10_000, 700),
    Case("an image of many layers", inputs.image_of_layers, convert_image, 1_000, 250, 300),
    Case("an image of too many layers", inputs.image_of_layers, read_image, 5_000, 5_000, 300, "over the limit of"),
    Case("nested indexes", inputs.nested_indexes, read_image, 2_500, 500, 64, "more than 4 deep"),
    Case("branching indexes", inputs.branching_indexes, read_image, 16, 16, 200, "documents"),
    Case("large manifests", inputs.large_manifests, read_image, 50, 20, 500, "documents"),
    Case("a nested configuration", inputs.nested_configuration, read_image, 100_000, 100_000, 200, "JSON"),
    Case("archive: members", inputs.archive_of_members, read_image, 15_000, 4_000, 64, "no such image"),
    Case("archive: records", inputs.archive_of_records, read_image, 80, 20, 100, "no such image"),
    Case("archive: links", inputs.archive_of_links, read_image, 10_000, 2_500, 64, "more than 8 links"),
    Case("archive: tags", inputs.archive_of_tags, read_image, 100_000, 25_000, 300, "missing"),
    Case("archive: branching indexes", inputs.archive_of_indexes, read_image, 25, 16, 200),
    Case("archive: zeros", inputs.archive_of_zeros, read_image, 512, 64, 64, "no such image"),
    Case("a challenge", inputs.text(inputs.challenge), challenges, 1_000_000, 100_000, 200),
    Case("log: lines", inputs.text(inputs.log_lines), access_log, 250_000, 10_000, 400),
    Case("log: patterns", inputs.text(inputs.log_patterns), access_log, 5_000, 1_000, 200),
    Case("log: processes", inputs.text(inputs.strace_lines), access_log, 100_000, 10_000, 400),
]


# --------------------------------------------------------------------------------------------------------------------
# measuring


@dataclass(frozen=True, slots=True)
class Measured:
    seconds: float
    megabytes: float
    said: str


def forked(work: Callable[[], object]) -> Measured:
    """Does some work in a child of this process, which has no threads. Raises RuntimeError for a child that dies."""
    mine, its = os.pipe()
    child = os.fork()
    if not child:
        with os.fdopen(its, "w") as answer:
            json.dump(_measured(work), answer)
        os._exit(0)
    os.close(its)
    with os.fdopen(mine) as answer:
        text = answer.read()
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"ended by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "ended by itself")
    return Measured(*json.loads(text))


def _measured(work: Callable[[], object]) -> tuple[float, float, str]:
    for limit, most in _LIMITS.items():
        resource.setrlimit(limit, (most, most))
    signal.alarm(_SECONDS)
    before, said = _resident("VmRSS"), ""
    begun = time.process_time()
    try:
        work()
    except EstargzError as error:
        said = str(error)
    except BaseException as error:  # whatever it is, it is a defect, and to be told
        said = f"raises {type(error).__name__}: {error}"
    return time.process_time() - begun, (_resident("VmHWM") - before) / 1024, said[:2000]


def _resident(key: str) -> int:
    """KiB of memory: now (VmRSS), at its most (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1])


class Bench:
    """Keeps the inputs of the maker at hand, for the next case that has the same."""

    def __init__(self) -> None:
        self._make: Callable[[Path, int], None] | None = None
        self._places: dict[int, Path] = {}

    def run(self, case: Case, n: int) -> Measured:
        """Uses an input of that size. Raises RuntimeError."""
        path = self._input(case.make, n)
        scratch = _place()
        try:
            return forked(lambda: case.use(path, scratch))
        finally:
            _remove(scratch)

    def _input(self, make: Callable[[Path, int], None], n: int) -> Path:
        if make is not self._make:
            self.close()
            self._make = make
        if n not in self._places:
            self._places[n] = _place()
            made = forked(lambda: make(self._places[n] / "input", n))
            if made.said:
                raise RuntimeError(f"the input cannot be made: {made.said}")
        return self._places[n] / "input"

    def close(self) -> None:
        for place in self._places.values():
            _remove(place)
        self._places = {}


def _place() -> Path:
    """An empty directory; in memory if there is room, where no disk's journal adds to what is measured."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 2 * _LIMITS[resource.RLIMIT_FSIZE]
    return Path(tempfile.mkdtemp(prefix="estargz-hostile-", dir=memory if roomy else None))


def _remove(place: Path) -> None:
    """A tree may be deeper than Python's own way to remove it allows."""
    subprocess.run(["rm", "-rf", "--", place], check=True)


def faults(case: Case, n: int, small: Measured, large: Measured) -> Iterator[str]:
    """What is not as the case states."""
    for measured, size in ((small, n), (large, 4 * n)):
        wanted = "" if measured is small and not measured.said else case.expect
        if (wanted not in measured.said) if wanted else measured.said:
            yield f"n={size}: expected {wanted or 'no error'!r}, found {measured.said[:300]!r}"
    if large.megabytes > case.megabytes:
        yield f"n={4 * n}: {large.megabytes:.0f} MB, over {case.megabytes}"
    growth = large.seconds / max(small.seconds, _FLOOR / MOST_GROWTH)
    if large.seconds > _FLOOR and growth > MOST_GROWTH:
        yield f"n={4 * n}: {large.seconds:.2f} s, {growth:.1f} times those of n={n}"


def less(one: Measured, other: Measured) -> Measured:
    """What is sure to be needed of what two runs took."""
    return Measured(min(one.seconds, other.seconds), min(one.megabytes, other.megabytes), other.said)


def judge(bench: Bench, case: Case, quick: bool) -> tuple[list[str], str]:
    """Its faults, and a line of what it took."""
    n = case.quick if quick else case.full
    try:
        small, large = bench.run(case, n), bench.run(case, 4 * n)
        found = list(faults(case, n, small, large))
        if found:  # other programs may have had the caches, and the kernel's locks
            small, large = less(small, bench.run(case, n)), less(large, bench.run(case, 4 * n))
            found = list(faults(case, n, small, large))
    except RuntimeError as error:
        return [str(error)], case.name
    took = f"n={4 * n}: {large.seconds:.2f} s ({small.seconds:.2f} s), {large.megabytes:.0f} MB {large.said[-70:]}"
    return found, f"{case.name}: {took}"


def judged(share: list[Case], quick: bool) -> int:
    """A descriptor to read what a process of its own says of some cases: a line of JSON for each."""
    mine, its = os.pipe()
    if not os.fork():
        bench = Bench()
        with os.fdopen(its, "w") as answers:
            for case in share:
                print(json.dumps([case.name, *judge(bench, case, quick)]), file=answers, flush=True)
        bench.close()
        os._exit(0)
    os.close(its)
    return mine


def by_maker(cases: list[Case]) -> list[list[Case]]:
    """Two shares, of about as many; those that have one maker stay together."""
    shares: list[list[Case]] = [[], []]
    for _, group in groupby(cases, lambda case: case.make):
        min(shares, key=len).extend(group)
    return shares


def main() -> int:
    arguments = outcome.parser("hostile", __doc__)
    arguments.add_argument("--only", default="", help="cases whose name holds this")
    options = arguments.parse_args()
    result = outcome.Outcome("hostile", options.quick)
    cases = [case for case in CASES if options.only in case.name]
    answers = [judged(share, options.quick) for share in by_maker(cases)]
    missing = {case.name for case in cases}
    for answer in answers:
        with os.fdopen(answer) as lines:
            for line in lines:
                name, found, took = json.loads(line)
                print(took, flush=True)
                missing.discard(name)
                result.count("worst inputs", 2)
                for fault in found:
                    result.defect(f"{name}: {fault}")
        os.wait()
    for name in sorted(missing):
        result.defect(f"{name}: was not measured")
    return result.close()


if __name__ == "__main__":
    sys.exit(main())
