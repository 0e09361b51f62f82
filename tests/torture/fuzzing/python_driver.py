"""Fuzzes targets, each in a process of its own and so many at a time: python -m fuzzing.python_driver JOB...

JOB is NAME:RUNS:SECONDS, either number 0 for no limit. The package is loaded, and instrumented, but once. For each job a line
of JSON is printed: {"target", "executions", "fault"}, the fault null or the end of what was said of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import resource
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris

with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # a line for each module
    warnings.simplefilter("ignore")
    with atheris.instrument_imports(include=["estargz"], enable_loader_override=False):
        from . import python_answers, python_blobs, python_documents, python_texts
        from .python_mutation import change_json, mend_tar
        from .python_target import CORPUS, ROOT, TARGETS, Target

WORK = ROOT / "build" / "torture" / "fuzz"
AT_A_TIME = 2
SECONDS_FOR_ONE = 10
MEMORY = 3 << 30
"""Bytes of address space: who wants more gets MemoryError, which is a fault."""
RESIDENT = 1024
"""MiB that a process may come to hold, the instrumented package and all that it has found included."""
STATUS_FAULT = 77

assert python_answers and python_blobs and python_documents and python_texts  # what defines the targets


def mutated(wanted: Target, data: bytes, room: int, seed: int) -> bytes:
    if wanted.shape == "json" and seed % 8:
        changed = change_json(data, seed)
        if changed is not None:
            return changed[:room]
    changed = bytes(atheris.Mutate(data, room))
    return mend_tar(changed) if wanted.shape == "tar" else changed


def fuzz(wanted: Target, runs: int, seconds: int) -> None:
    """Does not come back: the process ends with the last execution."""
    place = WORK / wanted.name
    found = place / ("corpus" if seconds else "new")
    if not seconds:
        shutil.rmtree(found, ignore_errors=True)  # the same run each time begins with the same inputs
    found.mkdir(parents=True, exist_ok=True)
    for old in place.glob("*-*"):  # inputs that something was wrong with, once
        old.unlink()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    limits = [f"-runs={runs or -1}", f"-max_total_time={seconds}", f"-timeout={SECONDS_FOR_ONE}"]
    options = [
        f"-max_len={wanted.most}",
        f"-rss_limit_mb={RESIDENT}",
        f"-artifact_prefix={place}/",
        "-print_final_stats=1",
    ]
    folders = [str(found), str(CORPUS / wanted.name)]  # what is new goes into the first one
    if not seconds:
        options += ["-seed=1"]
    if wanted.words:
        words = place / "words"
        words.write_text("".join(f'"{escaped(word)}"\n' for word in wanted.words))
        options += [f"-dict={words}"]
    settings = {}
    if wanted.shape != "bytes":
        settings["custom_mutator"] = lambda data, room, seed: kept(
            lambda: mutated(wanted, data, room, seed), data, place
        )
    check = wanted.check
    atheris.Setup(
        ["fuzz", *limits, *options, *folders], lambda data: kept(lambda: check(data), data, place), **settings
    )
    atheris.Fuzz()


def kept(do: Callable[[], Any], data: bytes, place: Path) -> Any:
    """What is done; when it fails, the input is left in a file, and the process ends. libFuzzer itself sees to hangs."""
    try:
        return do()
    except BaseException:
        (place / f"crash-{hashlib.sha256(data).hexdigest()[:16]}").write_bytes(data)
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(STATUS_FAULT)


def escaped(word: str) -> str:
    """As libFuzzer's dictionaries have it; words are bytes of the same numbers."""
    return "".join(char if char.isascii() and char.isalnum() else f"\\x{ord(char):02x}" for char in word)


def begun(wanted: Target, runs: int, seconds: int) -> int:
    child = os.fork()
    if not child:
        log = os.open(log_of(wanted.name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            fuzz(wanted, runs, seconds)
        finally:
            os._exit(STATUS_FAULT)
    return child


def log_of(name: str) -> Path:
    (WORK / name).mkdir(parents=True, exist_ok=True)
    return WORK / name / "log"


def report(name: str, status: int) -> None:
    said = log_of(name).read_text(errors="replace")
    counted = re.findall(r"^(?:stat::number_of_executed_units: |#)(\d+)", said, re.MULTILINE)
    facts = {
        "target": name,
        "executions": int(counted[-1]) if counted else 0,
        "fault": f"status {status}: {said[-3000:]}" if status else None,
    }
    print(json.dumps(facts), flush=True)


def main(jobs: list[str]) -> None:
    running: dict[int, str] = {}
    waiting = [job.split(":") for job in reversed(jobs)]
    while waiting or running:
        while waiting and len(running) < AT_A_TIME:
            name, runs, seconds = waiting.pop()
            running[begun(TARGETS[name], int(runs), int(seconds))] = name
        child, status = os.wait()
        report(running.pop(child), status)


if __name__ == "__main__":
    main(sys.argv[1:])
