"""Fuzzes the parsers that are written in Python, guided by the lines they reach, and compares them with Go's (judge.go)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import python_answers, python_blobs, python_documents, python_texts
from .python_target import ROOT, TARGETS

if TYPE_CHECKING:
    from outcome import Outcome

__all__ = ["TARGETS", "run"]

assert python_answers and python_blobs and python_documents and python_texts  # what defines the targets

_AT_A_TIME = 2


def run(outcome: Outcome, *, quick: bool, seconds: float) -> None:
    """Every target: from its corpus so many executions that are the same each time, or for its share of ``seconds``."""
    subprocess.run([ROOT / "scripts" / "bootstrap", "torture"], check=True)
    subprocess.run([ROOT / "scripts" / "peer"], check=True, stdout=subprocess.DEVNULL)
    share = max(1, round(seconds * _AT_A_TIME / len(TARGETS)))
    for facts in _driven([f"{name}:{one.runs}:0" if quick else f"{name}:0:{share}" for name, one in TARGETS.items()]):
        outcome.count("executions", facts["executions"])
        outcome.count(f"executions of {facts['target']}", facts["executions"])
        if facts["fault"] is not None:
            outcome.defect(f"{facts['target']}: {facts['fault']}\nits input is in build/torture/fuzz/{facts['target']}")
        elif not facts["executions"]:
            outcome.defect(f"{facts['target']}: nothing was executed")


def _driven(jobs: list[str]) -> Iterator[dict[str, Any]]:
    command = [sys.executable, "-m", "fuzzing.python_driver", *jobs]
    folder = Path(__file__).resolve().parents[1]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        yield from map(json.loads, driver.stdout)
    if driver.returncode:
        raise RuntimeError(f"the driver ended with status {driver.returncode}")
