"""The benchmarks' own honesty: a stage that is slowed down is the stage that is named, and what is counted adds up."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import REPOSITORY, missing

BENCH = REPOSITORY / "bench"
sys.path.insert(0, str(BENCH))

import limit  # noqa: E402
import measure  # noqa: E402
import model  # noqa: E402

FILES = 300
DELAY_NS = 1_000_000
STAGES = ("source", "toc", "read", "hash", "compress", "order", "write")

# Every call of one library function takes a millisecond longer.
SLOW = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <time.h>

typedef long (*function)(long, long, long, long);

long SYMBOL(long a, long b, long c, long d)
{
    static function real;
    struct timespec delay = {0, DELAY_NS};
    if (real == NULL) /* what an extension module links with is found by name only */
        real = (function)dlsym(LIBRARY[0] ? dlopen(LIBRARY, RTLD_LAZY) : RTLD_NEXT, NAME);
    nanosleep(&delay, NULL);
    return real(a, b, c, d);
}
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tree")
    for number in range(FILES):
        (folder / f"f{number:04d}").write_bytes(b"%d " % number * 2000)
    return folder


def staged(tree: Path, blob: Path, *parts: str, threads: int = 1, preload: Path | None = None) -> dict[str, float]:
    environment = {**os.environ, "LD_PRELOAD": str(preload)} if preload else None
    command = [sys.executable, BENCH / "staged.py", tree, blob, str(threads), "estargz", "2", *parts]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    stages: dict[str, float] = json.loads(done.stdout)
    return stages


def slowed(symbol: str, folder: Path) -> Path:
    """A library that slows one function down."""
    if shutil.which("gcc") is None:
        missing("gcc is not installed")
    source, library = folder / "slow.c", folder / "slow.so"
    source.write_text(SLOW)
    name = "libisal.so.2" if symbol.startswith("isal") else ""
    defines = [f"-DSYMBOL={symbol}", f'-DNAME="{symbol}"', f'-DLIBRARY="{name}"', f"-DDELAY_NS={DELAY_NS}"]
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", *defines, source, "-o", library, "-ldl"], check=True)
    return library


@pytest.mark.measured
@pytest.mark.parametrize(
    ("symbol", "stage", "calls"),
    [
        ("fstatat64", "source", FILES),
        ("pread64", "read", FILES),
        ("isal_deflate", "compress", FILES),
        ("write", "write", 2),
    ],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_slow_stage_is_named(tree: Path, tmp_path: Path, symbol: str, stage: str, calls: int, threads: int) -> None:
    before = staged(tree, tmp_path / "blob", threads=threads)
    after = staged(tree, tmp_path / "blob", threads=threads, preload=slowed(symbol, tmp_path))
    grown = {name: after[name] - before[name] for name in STAGES}
    assert grown[stage] >= 0.9 * calls * DELAY_NS / 1e9
    others = sum(seconds for name, seconds in grown.items() if name != stage)
    assert others < max(grown[stage] / 2, 0.02)


@pytest.mark.measured
def test_a_slow_stage_is_what_the_limit_blames(tree: Path, tmp_path: Path) -> None:
    """Parts alone as they are, the whole build slowed down: the rest has a name."""
    runs = {name: limit.staged(tree, tmp_path / "blob", 1, parts) for name, parts in limit.RUNS.items()}
    slow = staged(tree, tmp_path / "blob", preload=slowed("pread64", tmp_path))
    slow["outside"] = 0.1
    round_ = limit.Round(runs, 0.1, slow["inside"] + 0.1, slow)
    found = limit.limit_report(measure.Tree("t", tree, FILES, FILES, 1), 1, [round_])
    assert max(found["beyond"], key=found["beyond"].__getitem__) == limit.READ
    assert limit.READ in limit.one_line(found)


# ------------------------------------------------------------------------------------------------- parts alone


def test_parts_that_are_left_out_take_no_time(tree: Path, tmp_path: Path) -> None:
    nothing = staged(tree, tmp_path / "blob", "nothing")
    read = staged(tree, tmp_path / "blob", "read")
    whole = staged(tree, tmp_path / "blob")
    assert nothing["read"] < whole["read"] / 5
    assert nothing["hash"] < whole["hash"] / 5
    assert read["read"] > 5 * nothing["read"]
    assert read["compress"] < whole["compress"] * 0.7  # the compressor is opened all the same


def test_the_stages_of_one_thread_are_the_whole_build(tree: Path, tmp_path: Path) -> None:
    stages = staged(tree, tmp_path / "blob")
    accounted = sum(stages[name] for name in (*STAGES, "wait"))
    assert accounted <= stages["inside"]
    assert stages["inside"] - accounted - stages["commit"] < 0.05


def test_what_is_beyond_adds_up() -> None:
    stages = dict.fromkeys((*STAGES, "wait"), 0.0)
    whole = {**stages, "source": 1.0, "read": 2.0, "compress": 4.0, "wait": 0.5, "commit": 0.0, "outside": 0.25}
    alone = {name: {**stages, "commit": 0.0} for name in limit.RUNS}
    alone["nothing"]["source"], alone["read"]["read"], alone["compress"]["compress"] = 1.0, 1.5, 3.0
    round_ = limit.Round(alone, 0.25, 4.0, {**whole, "inside": 3.75})
    found = limit.limit_report(measure.Tree("t", Path(), 1, 1, 1), 2, [round_])
    assert found["sum"] == pytest.approx(0.25 + 1.0 + 1.5 + 3.0)
    assert found["parallel_fraction"] == pytest.approx(found["sum"] / 2 / 4.0)
    # Two threads for four seconds, less the parts, is where the rest is.
    assert sum(found["beyond"].values()) == pytest.approx(2 * 4.0 - found["sum"])


# ------------------------------------------------------------------------------------------------- the model

COSTS = model.Costs(
    source=0.1, read=0.1, chunks=0.2, both=0.3, compress=1.0, blob=0.1, stream_and_blob=0.3, write=0.1,
    batches=400, slot_bytes=1 << 20, start=1.0, tail=2.0,
)  # fmt: skip


def test_one_thread_takes_the_sum() -> None:
    each = COSTS.source + COSTS.read + COSTS.both + COSTS.compress + COSTS.blob + COSTS.write
    assert model.seconds(COSTS, 1) == pytest.approx(3.0 + 400 * each)


def test_two_threads_take_half() -> None:
    assert model.seconds(COSTS, 2) - 3 == pytest.approx((model.seconds(COSTS, 1) - 3) / 2, rel=0.05)


def test_many_threads_are_bound_by_what_is_serial() -> None:
    many = model.seconds(COSTS, 64) - 3
    assert 400 * max(COSTS.blob, COSTS.write) <= many < 400 * COSTS.stream_and_blob * 1.1
    assert model.seconds(replace(COSTS, write=1.0), 64) - 3 == pytest.approx(400 * 1.0, rel=0.1)


@pytest.mark.parametrize("threads", [1, 2, 3, 8, 64])
def test_more_threads_never_take_longer(threads: int) -> None:
    assert model.seconds(COSTS, threads + 1) <= model.seconds(COSTS, threads) * 1.01


# ------------------------------------------------------------------------------------------------- one process

WRITER = """
import os, time
first = os.open(".", os.O_TMPFILE | os.O_WRONLY)
os.write(first, bytes(8 << 20))
time.sleep(0.1)
os.close(first)
with open("blob", "wb") as blob:
    blob.write(bytes(4 << 20))
"""


def test_bytes_and_space_are_counted(tmp_path: Path) -> None:
    (tmp_path / "input").write_bytes(bytes(3 << 20))
    command = ["sh", "-c", f"cd {tmp_path}; cat input >/dev/null; {sys.executable} -c '{WRITER}'"]
    done = measure.run_to_blob(command, tmp_path / "blob")
    assert done.size == 4 << 20
    assert not (tmp_path / "blob").exists()
    assert 3 << 20 <= done.read < 40 << 20
    if done.written == 0:
        pytest.skip("this file system does not account for writes")
    assert 12 << 20 <= done.written < 14 << 20
    assert done.space >= 8 << 20
    assert done.wall >= 0.1 > done.cpu / 10


def test_a_command_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(measure.Failure, match=r"sh failed with status 3: no luck"):
        measure.run(["sh", "-c", "echo no luck >&2; exit 3"], tmp_path)
