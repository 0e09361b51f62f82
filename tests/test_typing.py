"""The package's types, as somebody else's type checker sees them."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from conftest import missing

HERE = Path(__file__).parent


def test_typing_examples(tmp_path: Path) -> None:
    if find_spec("mypy") is None:
        missing("needs mypy, which scripts/bootstrap lint installs")
    options = ["--strict", "--config-file=", f"--cache-dir={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, HERE / "typing_examples.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(HERE.parent / "src")},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
