"""The compiled stages under libFuzzer, AddressSanitizer and UBSan: a build of its own, and a process for each target.

    ext/, src/ -> build/fuzz/STATE (clang, coverage, sanitizers) -> driver TARGET corpus -> counts, defects

Inputs that reach something new are kept in build/fuzz/corpus/TARGET; ``keep`` puts the smallest set of them that reaches as
much into tests/torture/fuzzing/corpus. What is found is in build/fuzz/found: put it into the corpus, too, when it is mended.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from outcome import ROOT, Outcome

from .compiled_targets import TARGETS

__all__ = ["keep", "run"]

HERE = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "fuzz"
COMPILER = "clang-14"
RUNTIME = "/usr/lib/llvm-14/lib/clang/14.0.6/lib/linux/libclang_rt.fuzzer-x86_64.a"
SANITIZERS = "address,undefined"
SEED = 28
PARALLEL = 2

LIMITS = [
    "-timeout=60",
    "-rss_limit_mb=3000",
    "-malloc_limit_mb=2000",
    "-max_len=20000",
    "-len_control=0",
    "-print_final_stats=1",
]
# Leaks of the interpreter at its end are not looked for: memory that grows ends at the limit.
SETTINGS = {
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:handle_abort=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "PYTHONMALLOC": "malloc",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
}
EXECUTED = re.compile(r"stat::number_of_executed_units: (\d+)")
NUMBERED = re.compile("[0-9a-f]{40}")  # libFuzzer's names
FOUND = re.compile(
    r"^(?:[\w.]*(?:Error|Exception)\b.*|SUMMARY: (?!libFuzzer: deadly).*|.*runtime error: .*)$", re.MULTILINE
)


def run(outcome: Outcome, *, quick: bool, seconds: float) -> None:
    """Replays the corpora and goes on from there: so many executions, or so many seconds for all targets together."""
    driver = build()
    share = seconds * PARALLEL / len(TARGETS)
    with ThreadPoolExecutor(PARALLEL) as pool:
        for done in [pool.submit(_fuzz, outcome, driver, name, None if quick else share) for name in TARGETS]:
            done.result()


def build() -> Path:
    """The driver, and beside it a package that is compiled for it; made again when a source has changed."""
    subprocess.run(
        [ROOT / "scripts" / "tools", f"{COMPILER}:{COMPILER}", f"{RUNTIME}:libclang-rt-14-dev", "go"], check=True
    )
    subprocess.run([ROOT / "scripts" / "peer"], check=True, stdout=subprocess.DEVNULL)
    place = BUILD / _state()
    if not (place / "driver").exists():
        shutil.rmtree(place, ignore_errors=True)
        _compile_package(place)
        _compile_driver(place)
    _copy_python(place)
    return place / "driver"


def _state() -> str:
    digest = hashlib.sha256(sys.version.encode())
    paths = [ROOT / "setup.py", HERE / "compiled_driver.c", *sorted((ROOT / "ext").rglob("*.*")), Path(__file__)]
    for path in paths:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _compile_package(place: Path) -> None:
    _copy_python(place)
    shutil.copytree(ROOT / "ext", place / "ext")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, place)
    translated = ROOT / "build" / "cython"  # what the ordinary build has made of the same sources
    if translated.is_dir():
        shutil.copytree(translated, place / "build" / "cython")
    environment = os.environ | {"CC": COMPILER, "ESTARGZ_SANITIZE": f"{SANITIZERS},fuzzer-no-link"}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=place, env=environment, check=True, stdout=subprocess.DEVNULL)


def _copy_python(place: Path) -> None:
    """All of the package but its stages."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", place / "src", ignore=ignored, dirs_exist_ok=True)


def _compile_driver(place: Path) -> None:
    paths = sysconfig.get_config_vars()
    command = [
        COMPILER,
        "-g",
        "-O1",
        f"-fsanitize=fuzzer,{SANITIZERS}",
        "-rdynamic",
        f"-I{sysconfig.get_path('include')}",
    ]
    command += [str(HERE / "compiled_driver.c"), "-o", str(place / "driver.part")]
    command += [f"-L{paths['LIBDIR']}", f"-Wl,-rpath,{paths['LIBDIR']}", f"-lpython{paths['LDVERSION']}"]
    subprocess.run(command, check=True)
    (place / "driver.part").rename(place / "driver")


def _fuzz(outcome: Outcome, driver: Path, name: str, seconds: float | None) -> None:
    """``seconds``: how long to go on, beyond what is found, each time with another seed; None: the target's ``runs``."""
    corpus, work, found = HERE / "corpus" / name, BUILD / "corpus" / name, BUILD / "found"
    if seconds is None:
        work = BUILD / "quick" / name  # begins empty, so that each time is the same
        shutil.rmtree(work, ignore_errors=True)
    for directory in (work, found):
        directory.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + (seconds or 0)
    for seed in itertools.count(SEED):
        share = f"-runs={TARGETS[name].runs + len(list(corpus.iterdir()))}"
        if seconds is not None:
            share = f"-max_total_time={max(1, round(end - time.monotonic()))}"
        status, log = _driven(
            driver, name, [f"-seed={seed}", share, f"-artifact_prefix={found}/{name}-", str(work), str(corpus)]
        )
        executed = EXECUTED.search(log)
        for what in ("executions", f"executions of {name}"):
            outcome.count(what, int(executed[1]) if executed else 0)
        if status:
            outcome.defect(f"{name}: {_what(log)}")
        elif not executed or not int(executed[1]):
            outcome.defect(f"{name}: nothing was executed")
        if time.monotonic() >= end:
            return


def _driven(driver: Path, name: str, options: list[str]) -> tuple[int, str]:
    """The status of a process for a target, and what it told; the latter is kept as a file, too."""
    path = os.pathsep.join(map(str, (driver.parent / "src", ROOT / "tests", HERE.parent)))
    settings = {"PYTHONPATH": path, "FUZZ_TARGET": name, "FUZZ_PYTHON": sys.executable}
    with (BUILD / f"{name}.log").open("w+", errors="replace") as log:
        command = [driver, *LIMITS, *options]
        status = subprocess.run(
            command, env=os.environ | SETTINGS | settings, stdout=log, stderr=log, check=False
        ).returncode
        log.seek(0)
        return status, log.read()


def _what(log: str) -> str:
    """What was found, and with which input."""
    what = next(iter(FOUND.findall(log)), log.strip().rpartition("\n")[2])
    kept = re.search(r"Test unit written to (\S+)", log)
    return f"{what[:300]}; its input is {kept[1] if kept else 'lost'}"


def keep() -> None:
    """Puts what was worth keeping into the corpora, as few inputs as reach all of it; those that were given names stay."""
    driver = build()
    for name in TARGETS:
        corpus, small = HERE / "corpus" / name, BUILD / "merged" / name
        shutil.rmtree(small, ignore_errors=True)
        small.mkdir(parents=True)
        directories = [str(small), str(corpus), str(BUILD / "corpus" / name)]
        status, log = _driven(driver, name, ["-merge=1", *directories])
        if status:
            sys.exit(f"fuzz: {name}: {_what(log)}")
        named = {path.read_bytes() for path in corpus.iterdir() if not NUMBERED.fullmatch(path.name)}
        for path in corpus.iterdir():
            if NUMBERED.fullmatch(path.name):
                path.unlink()
        for path in small.iterdir():
            if path.read_bytes() not in named:
                shutil.copy2(path, corpus)
