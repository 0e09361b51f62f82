"""The fault injector finds what careless code does wrong, and what it has found in the package stays mended."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import missing

PROGRAM = Path(__file__).parent / "torture" / "faults.py"

pytestmark = pytest.mark.timeout(120)


def injected(*arguments: str) -> str:
    if platform.machine() != "x86_64":
        pytest.skip("the fault injector knows x86-64's system calls")
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        missing("there is no C compiler, so no fault injector")
    done = subprocess.run([sys.executable, PROGRAM, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_careless_functions_are_found_out() -> None:
    assert "12 careless functions found out; 0 defects" in injected("--check-itself")


@pytest.mark.parametrize(
    "faults",
    [
        ["tree_alone:allocation"],  # a table of contents that was cut short
        ["tree_alone:close", "tree_alone:openat", "tree_alone:linkat"],  # names left behind, descriptors closed twice
        ["tree_alone:openat2", "extract_new:close"],  # interrupted calls
        ["tree_lower:getxattrat", "tree_overlay:getxattr"],  # the wrong cause
        [
            "tree_threads:thread start",
            "zstd_to_object:thread start",
            "verify:thread start",
            "image_layout:thread start",
        ],
        ["tree_threads:mmap", "zstd_to_object:mmap", "extract_new:mmap"],  # threads that never began
        ["unpack:pread64", "read:pread64"],  # a footer read in part
        [
            "gzip_to_pipe:pread64",
            "tar_prefetch:read",
            "tar_prefetch:lseek",
            "gzip_pipe_prefetch:close",
        ],  # nameless errors
        ["extract_new:openat:0", "extract_two:getdents64"],  # a directory left behind, a wrong error
    ],
    ids=lambda faults: faults[0],
)
def test_faults_that_were_found(faults: list[str]) -> None:
    """Each kind of call has been the way to a defect."""
    options = [option for fault in faults for option in ("--only", fault)]
    assert "0 defects" in injected(*options)
