"""What stops an installation says everything at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytest.importorskip("Cython", reason="needs Cython, which scripts/bootstrap installs")
pytest.importorskip("setuptools", reason="needs setuptools, which scripts/bootstrap installs")


def install(path: str) -> subprocess.CompletedProcess[str]:
    """Asks setup.py for nothing but its metadata, as pip does first."""
    return subprocess.run(
        [sys.executable, ROOT / "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, "PATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def command(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_missing_libraries_are_named_together(tmp_path: Path) -> None:
    command(tmp_path, "pkg-config", 'case "$2" in libisal | libzstd) exit 1 ;; esac')
    done = install(f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "estargz: what it is compiled with is missing: apt-get install libisal-dev libzstd-dev\n"


def test_libraries_that_are_too_old_are_named_with_what_is_wanted(tmp_path: Path) -> None:
    script = 'case "$*" in *"libdeflate >= "* | *"libzstd >= "*) exit 1 ;; --modversion*) echo 0.9 ;; esac'
    command(tmp_path, "pkg-config", script)
    done = install(f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        "estargz: too old to be compiled with: libdeflate 0.9 (1.9 or newer is needed), libzstd 0.9 (1.4.0 or newer is"
        " needed); PKG_CONFIG_PATH tells where newer ones are\n"
    )


def test_without_tools_everything_that_may_be_missing_is_named(tmp_path: Path) -> None:
    done = install(str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    for package in ("gcc", "pkg-config", "libisal-dev", "libdeflate-dev", "libssl-dev", "libzstd-dev"):
        assert f" {package}" in done.stderr
