#!/usr/bin/env python3
"""The tests with compiled stages that sanitizers watch: memory that is not theirs, undefined behaviour, races, leaks.

    tests/torture/sanitizers.py [--quick] [--only NAME] [-- PYTEST ARGUMENTS]

Each build is a copy of the checkout in build/sanitizers/NAME with an environment of its own, made again when something that
is compiled has changed. Its interpreter is a script that loads the sanitizer first, so that every Python program that a test
starts is watched, too, and no other program is. What is found is a report in build/sanitizers/NAME/reports, whichever process
it was found in, and every report is a defect, as is every test that fails.

ISA-L, libdeflate, libzstd, libcrypto and Python itself are not built anew. Valgrind, which needs no build, watches them in
a program of its own (sanitizing/buffers.py). Left out are tests that judge seconds or bytes of memory, marked "measured", and
those of the benchmarks, test_bench_*.py, which time things for minutes here; and those of the injector of faults, which is
loaded in the sanitizer's place.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from outcome import ROOT, Outcome, parser

SANITIZING = Path("tests/torture/sanitizing")
SUPPRESSIONS = ROOT / "tests" / "torture" / "suppressions"
PROGRAMS = ("peer", "stargz", "buildkit")
SLOW_SWEEPS = (
    "truncation_anywhere",
    "like_gzip",
    "equals_the_reference_emitter",
    "like_the_reader_in_order",
    "damaged_tars",
    "little_memory",
)
"""Tests that do the same thing thousands of times; not in the quick selection."""
SUITE_SECONDS = 4 * 3600
# What is no finding: a forked child counts its parent's, and an allocation of petabytes is refused.
REMARKS = ("ThreadSanitizer: reported ", "WARNING: AddressSanitizer failed to allocate")


@dataclass(frozen=True, slots=True)
class Build:
    name: str
    sanitize: str
    """ESTARGZ_SANITIZE, for setup.py."""
    library: str
    patience: int
    """How many times slower a test may be."""
    careless: tuple[str, ...]
    """Functions of careless.c that must be reported."""
    quick: tuple[str, ...]
    """Files of tests that say most here."""
    left_out: tuple[str, ...] = ()
    """Tests that do not hold in such a build, or that the sanitizer does not survive."""

    @property
    def folder(self) -> Path:
        return ROOT / "build" / "sanitizers" / self.name

    @property
    def python(self) -> Path:
        return self.folder / ".venv" / "bin" / "python"

    @property
    def reports(self) -> Path:
        return self.folder / "reports"


# They compare all files that an interpreter opens, which this build's shell does, too; count memory; and start qemu.
OTHER_PROGRAMS = (
    "tests/test_record.py::test_the_same_as_strace",
    "tests/test_embedding.py::test_builds_with_little_memory",
    "tests/test_reproducible.py::test_another_cpu_makes_the_same_of_what_is_portable",
)
ASAN = Build(
    "asan",
    "address,undefined",
    "libasan.so",
    patience=5,
    careless=("reads_behind", "overflows"),
    quick=("tar", "writer", "extract"),
    left_out=OTHER_PROGRAMS,
)
# In a forked child whose last thread is not its first, that thread's end runs exit handlers, and OpenSSL's allocates: by then
# ThreadSanitizer has forgotten the thread, and looks for its memory at an address that is none.
LAST_THREADS = tuple(f"tests/test_embedding.py::test_fork_within_a_build[{pooled}-write]" for pooled in (False, True))
# pyarrow is compiled without the sanitizer, so that what guards its memory is not seen; and once it is loaded, a fork takes all
# locks of its allocator, which are more than ThreadSanitizer can count.
PYARROW = "tests/test_filesystem.py::test_pandas_and_pyarrow"
TSAN = Build(
    "tsan",
    "thread",
    "libtsan.so",
    patience=15,
    careless=("races",),
    quick=("pool", "inflate_parallel"),
    left_out=(*OTHER_PROGRAMS, *LAST_THREADS, PYARROW),
)
BUILDS = (ASAN, TSAN)


# --- builds


def made(build: Build) -> None:
    """The build as the checkout is now."""
    copy_checkout(build.folder)
    build.reports.mkdir(exist_ok=True)
    build.reports.chmod(0o1777)  # some tests are somebody else
    state = sha256(sys.version.encode() + build.sanitize.encode() + (ROOT / "setup.py").read_bytes())
    for path in sorted((ROOT / "ext").rglob("*.*")):
        state.update(path.read_bytes())
    stamp = build.folder / ".stamp"
    if not stamp.exists() or stamp.read_text() != state.hexdigest():
        print(f"sanitizers: building {build.sanitize}", flush=True)
        shutil.rmtree(build.folder / "build" / "cython", ignore_errors=True)  # times are those of the checkout
        environment = {**os.environ, "ESTARGZ_SANITIZE": build.sanitize}
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force"]
        subprocess.run(command, cwd=build.folder, env=environment, check=True, stdout=subprocess.DEVNULL)
        stamp.write_text(state.hexdigest())
    make_environment(build)


def copy_checkout(folder: Path) -> None:
    """Copies what git knows or would take, keeps what is built, and drops what has gone."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    wanted = {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}
    for name in wanted:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.stat().st_mtime_ns != (ROOT / name).stat().st_mtime_ns:
            shutil.copy2(ROOT / name, target)
    for top in {Path(name).parts[0] for name in wanted}:
        for path in folder.joinpath(top).rglob("*.*"):
            if path.suffix in (".py", ".pyx", ".pxd", ".h") and str(path.relative_to(folder)) not in wanted:
                path.unlink()
    (folder / "build").mkdir(exist_ok=True)
    for program in PROGRAMS:
        link = folder / "build" / program
        if (ROOT / "build" / program).exists() and not link.exists():
            link.symlink_to(ROOT / "build" / program)


def make_environment(build: Build) -> None:
    """An environment that has the packages of this one, the build's own estargz, and an interpreter with the sanitizer."""
    command = [sys.executable, "-m", "venv", "--without-pip", "--clear", build.folder / ".venv"]
    subprocess.run(command, check=True)
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    lines = [build.folder / "src", sysconfig.get_path("purelib"), build.folder / SANITIZING, "import preloaded"]
    site = build.folder / ".venv" / "lib" / name / "site-packages"
    (site / "sanitized.pth").write_text("".join(f"{line}\n" for line in lines))
    settings = " ".join(f'{key}="{value}"' for key, value in settings_of(build).items())
    interpreter = getattr(sys, "_base_executable", sys.executable)
    build.python.unlink()
    build.python.write_text(f'#!/bin/bash\nexport {settings}\nexec -a "$0" {shlex.quote(interpreter)} "$@"\n')
    build.python.chmod(0o755)


def settings_of(build: Build) -> dict[str, str]:
    found = subprocess.run(
        ["gcc", f"-print-file-name={build.library}"], check=True, capture_output=True, text=True
    ).stdout.strip()
    path = str(build.reports / "report")
    if build is ASAN:
        leaks = "detect_leaks=${ESTARGZ_LEAKS:-0}:leak_check_at_exit=0"
        options = f"{leaks}:abort_on_error=1:quarantine_size_mb=64:allocator_may_return_null=1"
        return {
            "LD_PRELOAD": found,
            "PYTHONMALLOC": "malloc",
            "ASAN_OPTIONS": f"{options}:log_path={path}",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "ESTARGZ_UBSAN_REPORTS": path,
        }
    clock = build.folder / "build" / "clock.so"
    source = build.folder / SANITIZING / "clock.c"
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", clock, source], check=True)
    options = "exitcode=0:die_after_fork=0:history_size=4:report_signal_unsafe=0:allocator_may_return_null=1"
    return {
        "LD_PRELOAD": f"{found} {clock}",
        "TSAN_OPTIONS": f"{options}:log_path={path}",
    }


# --- what runs in them


def check_itself(build: Build, outcome: Outcome) -> None:
    """Careless functions must be found out."""
    library = build.folder / "build" / "careless.so"
    flags = [f"-fsanitize={build.sanitize}", "-g", "-shared", "-fPIC"]
    subprocess.run(["gcc", *flags, "-o", library, build.folder / SANITIZING / "careless.c"], check=True)
    for name in build.careless:
        clear_reports(build)
        code = f"import ctypes; ctypes.CDLL({str(library)!r}).{name}()"
        subprocess.run(unmoved([str(build.python), "-c", code]), stderr=subprocess.DEVNULL, check=False)
        if not any(name in report.read_text(errors="replace") for report in build.reports.iterdir()):
            outcome.defect(f"{build.name}: {name}() in careless.c was not found out")
        outcome.count("careless functions found out")


def run_tests(build: Build, outcome: Outcome, arguments: Sequence[str]) -> None:
    """The tests that pytest's arguments name; every failure and every report is a defect."""
    check_itself(build, outcome)
    clear_reports(build)
    results = build.folder / "build" / "results.xml"
    results.unlink(missing_ok=True)
    command = [str(build.python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not measured"]
    command += [
        "--ignore-glob=tests/test_bench_*",
        "--ignore=tests/test_torture_faults.py",
        f"--junitxml={results}",
        *arguments,
    ]
    command += [f"--deselect={test}" for test in build.left_out]
    search = f"{build.python.parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
    environment = {**os.environ, "PATH": search, "ESTARGZ_TEST_PATIENCE": str(build.patience)}
    environment.pop("CI", None)  # the ordinary run of the tests sees to it that nothing is skipped
    log = build.folder / "build" / "tests.log"
    with log.open("wb") as output:
        done = subprocess.run(
            unmoved(command),
            cwd=build.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=SUITE_SECONDS,
            check=False,
        )
    if results.exists():
        count_results(build, outcome, results)
    if done.returncode not in (0, 1) or not results.exists():
        outcome.defect(f"{build.name}: pytest ended too early with {done.returncode}, see {log.relative_to(ROOT)}")
    count_reports(build, outcome)


def unmoved(command: list[str]) -> list[str]:
    """ThreadSanitizer wants addresses that are not random; ASan does not mind."""
    return ["setarch", "-R", *command]


def count_results(build: Build, outcome: Outcome, results: Path) -> None:
    for case in ElementTree.parse(results).iter("testcase"):
        kinds = {found.tag for found in case}
        if kinds & {"failure", "error"}:
            outcome.defect(f"{build.name}: {case.get('classname')}::{case.get('name')} fails")
        outcome.count(f"{build.name} tests skipped" if "skipped" in kinds else f"{build.name} tests")


def clear_reports(build: Build) -> None:
    for report in build.reports.iterdir():
        report.unlink()


def count_reports(build: Build, outcome: Outcome) -> None:
    """Each thing that was found is one defect, however often."""
    found: Counter[str] = Counter()
    for report in build.reports.iterdir():
        lines = report.read_text(errors="replace").splitlines()
        if all(any(remark in line for remark in REMARKS) for line in lines):
            continue
        signs = (": runtime error: ", ": CHECK failed: ")  # the latter of the sanitizer itself, which then ends
        findings = [line for line in lines if line.startswith("SUMMARY: ") or any(sign in line for sign in signs)]
        found.update(findings or [f"a report without a summary: {report.name}"])
    for line, times in found.items():
        outcome.defect(f"{build.name}: {line} ({times} times), see {build.reports.relative_to(ROOT)}")


def run_leaks(outcome: Outcome) -> None:
    """Failing constructors and builds that do not end well."""
    clear_reports(ASAN)
    run_program(
        outcome,
        "leaks",
        [*unmoved([str(ASAN.python)]), str(ASAN.folder / SANITIZING / "leaks.py")],
        {"ESTARGZ_LEAKS": "1", "LSAN_OPTIONS": f"suppressions={SUPPRESSIONS / 'lsan.txt'}:print_suppressions=0"},
    )
    count_reports(ASAN, outcome)


def run_valgrind(outcome: Outcome) -> None:
    command = ["valgrind", "-q", "--error-exitcode=9", "--num-callers=20"]
    command += [f"--suppressions={path}" for path in sorted(SUPPRESSIONS.glob("valgrind*"))]
    run_program(
        outcome,
        "valgrind",
        [*command, sys.executable, str(ROOT / SANITIZING / "buffers.py")],
        {"PYTHONMALLOC": "malloc"},
    )


def run_program(outcome: Outcome, name: str, command: list[str], settings: dict[str, str]) -> None:
    """A program that prints a line for each thing that it did, and on standard error what was wrong."""
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True, timeout=3600, check=False
    )
    outcome.count(f"{name} cases", len(done.stdout.splitlines()))
    if done.returncode:
        outcome.defect(f"{name}: status {done.returncode}: {done.stderr.strip()[-3000:]}")


def tests_of(build: Build, quick: bool) -> list[str]:
    """What pytest is told to run: all, or the share of --quick."""
    if not quick:
        return []
    return [
        *(f"tests/test_{name}.py" for name in build.quick),
        "-k",
        " and ".join(f"not {name}" for name in SLOW_SWEEPS),
    ]


def main() -> int:
    arguments = parser("sanitizers", __doc__)
    arguments.add_argument("--only", choices=["asan", "tsan", "leaks", "valgrind"], help="this alone")
    arguments.add_argument("tests", nargs="*", help="arguments of pytest, after --")
    chosen = arguments.parse_args()
    outcome = Outcome("sanitizers", chosen.quick)
    # Every leak is looked for over hundreds of rounds, which takes longer than all the rest.
    wanted = [chosen.only] if chosen.only else ["asan", "tsan", "valgrind", *([] if chosen.quick else ["leaks"])]
    builds = [build for build in BUILDS if build.name in wanted or (build is ASAN and "leaks" in wanted)]
    tested = [build for build in builds if build.name in wanted]
    with ThreadPoolExecutor(2) as both:
        list(both.map(made, builds))
        list(both.map(lambda build: run_tests(build, outcome, chosen.tests or tests_of(build, chosen.quick)), tested))
        if "leaks" in wanted:
            run_leaks(outcome)
        if "valgrind" in wanted:
            run_valgrind(outcome)
    return outcome.close()


if __name__ == "__main__":
    sys.exit(main())
