"""Running the Go program of tests/peer, which the ``peer`` fixture builds."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any


def run(program: Path, *arguments: object) -> bytes:
    """Run one of its commands and return what it prints."""
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def report(program: Path, *arguments: object) -> dict[str, Any]:
    """The same for commands that print one JSON object."""
    found: dict[str, Any] = json.loads(run(program, *arguments))
    return found
