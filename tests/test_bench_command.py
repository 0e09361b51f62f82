"""The whole report over a tree of a few files: every part runs, what is left out is named, nothing stays behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

pytest.importorskip("matplotlib", reason="matplotlib is not installed, so there are no pictures")
pytestmark = pytest.mark.timeout(180)


def measured(tree: Path, output: Path, *arguments: str, path: str | None = None) -> dict[str, Any]:
    environment = {**os.environ, "ESTARGZ_CORPORA": str(output / "corpora"), "PATH": path or os.environ["PATH"]}
    command = [sys.executable, REPOSITORY / "bench" / "report.py", "--trees", tree, "--rounds", "2", "--output", output]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads((output / "report.json").read_text())
    assert "## All ways and levels" in done.stdout
    return report


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "tree"
    folder.mkdir()
    for number in range(30):
        (folder / f"f{number}").write_bytes(b"%d\n" % number * 5000)
    return folder


def by_name(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    (contest,) = report["compare"]
    return {way["name"]: way for way in contest["ways"]}


def test_report_of_some_ways(tree: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    report = measured(tree, output, "--only", "compare", "limit", "--ways", "default", "two blobs", "tarfile + gzip")
    ways = by_name(report)
    for name in ("estargz, level 2 (default)", "estargz, two blobs", "Python tarfile + gzip, level 6"):
        assert ways[name]["skipped"] is None
        assert len(ways[name]["runs"]) == 2
        assert all(run["wall"] > 0 for run in ways[name]["runs"])
        assert 100 < ways[name]["size"] < 100_000
    assert ways[f"tar | zstd -3 -T{len(os.sched_getaffinity(0))}"]["skipped"]
    assert [way["name"] for way in report["two_blobs"][0]["ways"]][:2] == ["estargz: one blob", "estargz: two blobs"]
    (limit,) = report["limit"]
    assert 0 < limit["parallel_fraction"] < 1.5
    assert {"report.html", "report.json", "tables.md", "one-blob.png", "stages.png"} <= {
        p.name for p in output.iterdir()
    }
    assert list((output / "corpora").iterdir()) == []


def test_what_is_not_there_is_named(tree: Path, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "git", "uname", "tar"):
        if found := shutil.which(tool):
            (tools / tool).symlink_to(found)
    report = measured(tree, tmp_path / "out", "--only", "compare", "--ways", "default", "tar |", path=str(tools))
    ways = by_name(report)
    for tool in ("pigz", "igzip", "zstd"):
        (skipped,) = [way["skipped"] for name, way in ways.items() if name.startswith(f"tar | {tool}")]
        assert skipped == f"not installed: {tool}"
        assert f"not installed: {tool}" in (tmp_path / "out" / "report.html").read_text()
