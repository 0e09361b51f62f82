"""The benchmarks' JSON: what figures depend on, rates and shares, and that two files can be compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

SMALLEST = "bench/bench_tar.py"  # its content is made at once

Report = dict[str, Any]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    # What this run of pytest was asked for is not meant for another.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def benchmark(folder: Path, name: str) -> tuple[Path, str]:
    """The JSON of one run, and what it printed."""
    report = folder / f"{name}.json"
    options = ["--benchmark-only", f"--benchmark-json={report}", "-k", "plain", "-p", "no:cacheprovider"]
    return report, run("pytest", SMALLEST, *options).stdout


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, str]:
    folder = tmp_path_factory.mktemp("benchmarks")
    return dict(benchmark(folder, name) for name in ("before", "after"))


@pytest.fixture(scope="module")
def report(reports: dict[Path, str]) -> Report:
    found: Report = json.loads(next(iter(reports)).read_text())
    return found


def test_json_says_what_figures_depend_on(report: Report) -> None:
    machine = report["machine_info"]["facts"]
    assert machine["cpu"]
    assert machine["cpus"] == len(os.sched_getaffinity(0))
    assert machine["package"]["isal"]
    assert {"libisal", "libdeflate", "libcrypto", "libzstd"} == machine["libraries"].keys()
    assert {"date", "commit", "load_average"} == report["facts"].keys()


def test_json_names_the_commit(report: Report) -> None:
    """Files that are not those of the commit are marked; outside a repository there is none."""
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    named = report["facts"]["commit"] or ""
    assert named.removesuffix("-modified") == asked.stdout.strip()


def test_json_has_rates_and_shares(report: Report) -> None:
    assert {"test_emit[plain]", "test_parse[plain]"} == {each["name"] for each in report["benchmarks"]}
    for each in report["benchmarks"]:
        seconds, found = each["stats"]["median"], each["extra_info"]
        assert found["share"] == pytest.approx(seconds / found["whole_seconds"])
        # Headers of 20 000 empty files.
        assert found["entries_per_second"] == pytest.approx(20_000 / seconds)
        assert found["bytes_per_second"] == pytest.approx(512 * 20_000 / seconds, rel=0.001)


def test_stages_are_timed_by_their_own_clock(report: Report) -> None:
    emit, parse = sorted(report["benchmarks"], key=lambda each: each["name"])
    assert "stage_seconds" not in emit["extra_info"]
    assert emit["options"]["timer"] != "stages"
    assert parse["extra_info"]["stage_seconds"] == parse["stats"]["median"]
    assert parse["options"]["timer"] == "stages"
    assert parse["extra_info"]["share"] < 0.9  # a part of the build, and not all of it


def test_rates_are_printed(reports: dict[Path, str]) -> None:
    for printed in reports.values():
        heading, *rows = printed[printed.index("bench_tar.py  ") :].splitlines()[:3]
        assert heading.split() == ["bench_tar.py", "ms", "MB/s", "entries/s", "share", "ratio"]
        assert [row.split()[0] for row in rows] == ["test_emit[plain]", "test_parse[plain]"]
        assert all(row.split()[-1].endswith("%") for row in rows)


def test_two_files_can_be_compared(reports: dict[Path, str]) -> None:
    compared = run("pytest_benchmark", "compare", *reports).stdout
    assert compared.count("test_parse[plain]") == 2
    assert "before" in compared
    assert "after" in compared
