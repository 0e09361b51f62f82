"""Options, sizes, and the share of the machine that is ours."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import missing

import estargz
from estargz import Pool, UsageError, options
from estargz.image.layers import LayerForm
from estargz.options import Options, encoder, parse_size, resolve_level, usable_threads


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1", 1),
        (" 42 ", 42),
        ("4096", 4096),
        ("1b", 1),
        ("1B", 1),
        ("1k", 1 << 10),
        ("1K", 1 << 10),
        ("1kb", 1 << 10),
        ("1KiB", 1 << 10),
        ("1 KiB", 1 << 10),
        ("3m", 3 << 20),
        ("3MB", 3 << 20),
        ("4MiB", 4 << 20),
        ("2g", 2 << 30),
        ("2GiB", 2 << 30),
        ("1tib", 1 << 40),
        ("007k", 7 << 10),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", " ", "k", "-1", "+1", "1.5M", "1e3", "0x10", "1 2", "1kk", "1ki", "1p", "MiB", "1_000", "٣", "9" * 5000],
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match=r"is no size: give bytes, or a number with KiB, MiB or GiB$"):
        parse_size(text)


RANGES: dict[str, tuple[list[Any], list[Any]]] = {
    "compression": (["estargz", "gzip", "zstd", "uncompressed"], ["zstd:chunked", "", "ESTARGZ", None]),
    "level": ([None, 0, 12], [-1, 13, 2.0, "2", True]),
    "chunk_size": ([1, 4096, 1 << 30], [0, -1, (1 << 30) + 1, 1.5, None]),
    "min_chunk_size": ([0, 1, 1 << 30], [-1, (1 << 30) + 1, None]),
    "threads": ([None, 1, 1024], [0, -1, 1025, 1.0, "4", True]),
    "memory": ([None, 1, 1 << 50], [0, -1, (1 << 50) + 1, "1g"]),
}


@pytest.mark.parametrize("name", RANGES)
def test_ranges(name: str) -> None:
    right, wrong = RANGES[name]
    for value in right:
        Options(**{name: value})
    for value in wrong:
        with pytest.raises(UsageError) as caught:
            Options(**{name: value})
        assert repr(value) in str(caught.value)


def test_wrong_options_are_value_errors() -> None:
    with pytest.raises(ValueError, match="from 0 to 12"):
        Options(level=99)


def test_levels_of_zstd() -> None:
    for level in range(1, 20):
        assert Options(compression="zstd", level=level).kernel_arguments()["level"] == level
    for level in (-1, 20, 3.0, True):
        with pytest.raises(UsageError, match="the level of compression zstd must be a whole number from 0 to 19, not"):
            Options(compression="zstd", level=level)  # type: ignore[arg-type]


@pytest.mark.parametrize(("compression", "default", "zero"), [("estargz", 2, 0), ("gzip", 2, 0), ("zstd", 3, 3)])
def test_levels_that_are_not_given(compression: str, default: int, zero: int) -> None:
    assert Options(compression=compression).kernel_arguments()["level"] == resolve_level(compression) == default
    assert Options(compression=compression, level=0).kernel_arguments()["level"] == zero


def pkg_config_version(library: str) -> str:
    if shutil.which("pkg-config") is None:
        missing("pkg-config is not installed")
    command = ["pkg-config", "--modversion", library]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_encoders() -> None:
    """Which library, and its version; test_reproducible.py has the digits behind it."""
    isal, libdeflate = f"isal-{pkg_config_version('libisal')}/", f"libdeflate-{pkg_config_version('libdeflate')}/"
    assert {encoder("zstd", level) for level in (1, 19, None)} == {f"libzstd-{pkg_config_version('libzstd')}"}
    assert encoder("uncompressed") == "none"
    for level in range(13):
        assert encoder("estargz", level) == encoder("gzip", level)
        assert encoder("gzip", level).startswith(isal if level <= 3 else libdeflate)
        assert level == 0 or encoder("gzip", level, portable=True).startswith(libdeflate)
    assert encoder("estargz") == encoder("estargz", 2)
    with pytest.raises(UsageError, match="portable gzip must be a whole number from 1 to 12"):
        encoder("gzip", 0, portable=True)
    with pytest.raises(UsageError, match="from 0 to 12"):
        encoder("gzip", 13)


@pytest.mark.parametrize("threads", [1, 2, 64, 1024])
@pytest.mark.parametrize("chunks", [(4 << 20, 0), (1, 0), (1 << 29, 0), (1 << 20, 1 << 29), (1, 1 << 30)])
def test_memory_by_default_is_enough(threads: int, chunks: tuple[int, int]) -> None:
    """Two batches per thread at least, as large as the chunks demand."""
    arguments = Options(threads=threads, chunk_size=chunks[0], min_chunk_size=chunks[1]).kernel_arguments()
    batch = sum(chunks) + (1 << 20) + (1 << 16) + (1 << 20)
    assert arguments["memory"] >= 2 * batch * max(2, threads)
    assert arguments["threads"] == threads


# --- threads


class Machine:
    """A folder that takes the place of /proc and /sys."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.patch = patch
        patch.setattr(options, "Path", lambda path: Path(f"{folder}{path}"))
        self.cpus(64)

    def cpus(self, count: int) -> None:
        self.patch.setattr(os, "sched_getaffinity", lambda pid: set(range(count)))

    def memory(self, limit: int, used: int) -> None:
        self.write("/proc/self/cgroup", "7:memory:/build\n")
        self.write("/sys/fs/cgroup/memory/build/memory.limit_in_bytes", f"{limit}\n")
        self.write("/proc/self/statm", f"9999999 {used // os.sysconf('SC_PAGE_SIZE') + 50} 50 0 0 0 0\n")

    def write(self, path: str, text: str) -> None:
        target = Path(f"{self.folder}{path}")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


@pytest.mark.parametrize("count", [1, 3, 64])
def test_affinity_without_cgroups(machine: Machine, count: int) -> None:
    machine.cpus(count)
    assert usable_threads() == count


@pytest.mark.parametrize(
    ("limit", "threads"),
    [
        ("max 100000", 64),
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("50000 100000", 1),
        ("1000 100000", 1),
        ("9999999 100000", 64),
        ("25000 10000", 3),
        ("nonsense", 64),
        ("", 64),
    ],
)
def test_cgroup_v2(machine: Machine, limit: str, threads: int) -> None:
    machine.write("/proc/self/cgroup", "0::/user.slice/build\n")
    machine.write("/sys/fs/cgroup/user.slice/build/cpu.max", limit + "\n")
    assert usable_threads() == threads


def test_cgroup_v2_inherits_the_tightest_limit(machine: Machine) -> None:
    machine.write("/proc/self/cgroup", "0::/a/b/c\n")
    machine.write("/sys/fs/cgroup/a/b/c/cpu.max", "800000 100000\n")
    machine.write("/sys/fs/cgroup/a/b/cpu.max", "max 100000\n")
    machine.write("/sys/fs/cgroup/a/cpu.max", "300000 100000\n")
    assert usable_threads() == 3
    machine.cpus(2)
    assert usable_threads() == 2


def test_cgroup_v2_at_its_root(machine: Machine) -> None:
    """As a container sees its own."""
    machine.write("/proc/self/cgroup", "0::/\n")
    machine.write("/sys/fs/cgroup/cpu.max", "400000 100000\n")
    assert usable_threads() == 4


@pytest.mark.parametrize(("quota", "threads"), [("250000", 3), ("-1", 64), ("100000", 1), ("x", 64)])
@pytest.mark.parametrize("controllers", ["cpu,cpuacct", "cpu"])
def test_cgroup_v1(machine: Machine, quota: str, threads: int, controllers: str) -> None:
    machine.write("/proc/self/cgroup", f"5:memory:/docker/7\n4:{controllers}:/docker/7\n3:cpuset:/docker/7\n")
    machine.write("/sys/fs/cgroup/cpu/docker/7/cpu.cfs_quota_us", quota + "\n")
    machine.write("/sys/fs/cgroup/cpu/docker/7/cpu.cfs_period_us", "100000\n")
    machine.write("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    machine.write("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert usable_threads() == threads


def test_cgroup_v1_in_a_container(machine: Machine) -> None:
    """The path is the host's, which the container does not see; its own limits stand at the root."""
    machine.write("/proc/self/cgroup", "4:cpu,cpuacct:/docker/0123\n1:name=systemd:/docker/0123\n0::/system.slice\n")
    machine.write("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "200000\n")
    machine.write("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert usable_threads() == 2


def test_other_controllers_do_not_count(machine: Machine) -> None:
    machine.write("/proc/self/cgroup", "4:cpuset:/x\n")
    machine.write("/sys/fs/cgroup/cpu/x/cpu.cfs_quota_us", "100000\n")
    machine.write("/sys/fs/cgroup/cpu/x/cpu.cfs_period_us", "100000\n")
    assert usable_threads() == 64


def test_this_machine() -> None:
    assert 1 <= usable_threads() <= len(os.sched_getaffinity(0))


# --- a cgroup's memory


@pytest.mark.parametrize(
    ("limit", "compression", "level", "threads", "memory"),
    [
        (1 << 40, "estargz", 2, 8, 288),  # more than enough for the usual
        (512, "estargz", 2, 8, 210),
        (128, "estargz", 2, 2, 45),
        (64, "estargz", 2, 1, 20),
        (64, "zstd", 8, 1, 28),
        (256, "zstd", 19, 1, 77),
        (10, "gzip", 12, 1, 16),  # less than the interpreter has: the least that a build needs
    ],
)
def test_share_of_a_cgroups_memory(
    machine: Machine, limit: int, compression: str, level: int, threads: int, memory: int
) -> None:
    machine.cpus(8)
    machine.memory(limit << 20, used=20 << 20)
    arguments = Options(compression=compression, level=level).kernel_arguments()
    assert (arguments["threads"], arguments["memory"] >> 20) == (threads, memory)
    chosen = Options(compression=compression, level=level, threads=5, memory=99 << 20).kernel_arguments()
    assert (chosen["threads"], chosen["memory"]) == (5, 99 << 20)


def test_pool_in_a_cgroup(machine: Machine) -> None:
    machine.cpus(8)
    assert (Pool().threads, Pool().memory >> 20) == (8, 576)
    machine.memory(256 << 20, used=20 << 20)
    assert (Pool().threads, Pool().memory >> 20) == (4, 100)
    assert (Pool(6).threads, Pool(memory=5).memory) == (6, 5)
    heavy = Pool(compression="zstd", level=19)
    assert (heavy.threads, heavy.memory >> 20) == (1, 77)


def zstd_arguments(pool: Pool, level: int, **options: int) -> dict[str, object]:
    return Options(compression="zstd", level=level, pool=pool, **options).kernel_arguments()


def test_compressors_that_a_pool_has_no_room_for(machine: Machine) -> None:
    machine.cpus(8)
    assert zstd_arguments(Pool(), 19)
    machine.memory(256 << 20, used=20 << 20)
    assert zstd_arguments(Pool(), 10)
    with pytest.raises(
        UsageError, match="takes 82 MiB, and the cgroup's memory leaves 31 MiB for .*, or make the pool for"
    ):
        zstd_arguments(Pool(), 19)
    for level in range(1, 20):
        assert zstd_arguments(Pool(compression="zstd", level=level), level)
    with pytest.raises(UsageError, match="fewer threads"):
        zstd_arguments(Pool(3, compression="zstd", level=19), 19)
    assert zstd_arguments(Pool(8, 100 << 20), 19)  # what is asked for is taken as it is
    machine.memory(4096 << 20, used=20 << 20)
    assert zstd_arguments(Pool(), 19)


@pytest.mark.parametrize("compression", ["uncompressed", "zstd", "estargz", "gzip"])
def test_small_compressors_are_never_refused(machine: Machine, compression: str) -> None:
    machine.cpus(8)
    machine.memory(32 << 20, used=20 << 20)
    pool = Pool(compression=compression)
    for other in ("uncompressed", "zstd", "estargz", "gzip"):
        assert Options(compression=other, pool=pool).kernel_arguments()
        assert Options(compression=other).kernel_arguments()


def test_pools_that_images_make(machine: Machine) -> None:
    machine.cpus(8)
    machine.memory(256 << 20, used=20 << 20)
    for form in (LayerForm("zstd", 19), LayerForm("estargz", 12), LayerForm("zstd"), LayerForm()):
        assert Options(**form.options(), pool=form.pool()).kernel_arguments()


def test_memory_by_cgroup_v2_and_without_a_limit(machine: Machine) -> None:
    machine.write("/proc/self/statm", "1 1024 0 0 0 0 0\n")
    machine.write("/proc/self/cgroup", "0::/a/b\n")
    assert options.memory_room() == math.inf
    machine.write("/sys/fs/cgroup/a/b/memory.max", "max\n")
    assert options.memory_room() == math.inf
    machine.write("/sys/fs/cgroup/a/memory.max", f"{100 << 20}\n")
    assert options.memory_room() == (100 << 20) - 1024 * os.sysconf("SC_PAGE_SIZE")


def test_images_make_room_for_their_compressors(machine: Machine, tmp_path: Path) -> None:
    machine.cpus(8)
    machine.memory(256 << 20, used=20 << 20)
    (tmp_path / "tree").mkdir()
    image = estargz.Image.new("linux/amd64").append(tmp_path / "tree")
    with pytest.raises(UsageError, match="make the pool for"):
        image.export(f"type=oci,dest={tmp_path}/a,compression=zstd,compression-level=19", pool=Pool())
    image.export(f"type=oci,dest={tmp_path}/a,compression=zstd,compression-level=19")
    image.export(f"type=oci,dest={tmp_path}/b,name=b:1")
    estargz.convert(f"oci-archive:{tmp_path}/b", f"oci:{tmp_path}/c:1", compression="zstd", level=19)


@pytest.mark.parametrize("level", [10, 12, 15, 19])
def test_room_for_a_compressor(machine: Machine, level: int) -> None:
    """It is enough with two batches and 12 MiB for all else, and no less."""
    asked = Options(compression="zstd", level=level)
    needed = asked.compressor_size + 2 * asked.batch_size + (12 << 20)
    machine.memory(needed + (20 << 20), used=20 << 20)
    arguments = asked.kernel_arguments()
    assert (arguments["threads"], arguments["memory"]) == (1, 2 * asked.batch_size)
    machine.memory(needed + (19 << 20), used=20 << 20)
    with pytest.raises(
        UsageError, match=r"compressor takes \d+ MiB, and the cgroup's memory leaves \d+ MiB .*; choose a lower"
    ):
        asked.kernel_arguments()
    assert replace(asked, threads=1, memory=100 << 20).kernel_arguments()
