"""The same bytes on every CPU? Every level of every compression on the machine's own CPU, on models that qemu plays, and, in
the full run, with the package built for aarch64.

A defect is: two CPUs for which ``estargz.options.encoder`` says the same, and whose bytes differ; a level that is said to
depend on no CPU, and differs; a blob that does not inflate to its tar, or whose digest other code does not confirm. What is
printed says which CPUs give the same bytes, level by level (docs/reproducible.md).
"""

from __future__ import annotations

import json
import os
import platform
import random
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

from aarch64 import Unavailable, emulated_python
from outcome import RESULTS, ROOT, Outcome, parser

QUICK = ["Haswell", "Nehalem", "core2duo"]
MODELS = ["max", *QUICK[:1], "SandyBridge", *QUICK[1:], "qemu64"]
AARCH64 = ["aarch64-max", "aarch64-cortex-a57"]
DEPENDS = {f"{compression} {level}" for compression in ("estargz", "gzip") for level in range(4)}

TESTED = {"Haswell", "Nehalem"}

LEVELS = "0,1,2,3,4,5,6,7,8,9,10,11,12"
QUICK_LEVELS = "0,1,2,3,4,6,9,12"
ZSTD = ",".join(map(str, range(1, 20)))
TESTS = [f"tests/test_{name}.py" for name in ("determinism", "tar", "inflate", "inflate_parallel", "toc")]
SLOW_OR_NATIVE = "not processes and not address and not slowest and not levels_of_zstd and not go and not peer"

Found = Mapping[str, Mapping[str, Any]]


def corpus(large: int) -> bytes:
    """A tar of files of 0 bytes to ``large`` and more, what they hold of different kinds."""
    chance = random.Random(40)
    stdlib = Path(sysconfig.get_path("stdlib"))
    text = b"".join(path.read_bytes() for path in sorted(stdlib.glob("*.py")))
    program = Path(os.path.realpath(sys.executable)).read_bytes()
    files = {
        "text": text[:250_000],
        "program": program[-250_000:],
        "noise": chance.randbytes(60_000),
        "zeros": bytes(100_000),
        "large": text[: large // 8] + bytes(large - large // 4) + program[: large // 8],
        "empty": b"",
    }
    for number in range(400):
        at = chance.randrange(len(text) - 4000)
        files[f"{number % 7}/{chance.randbytes(30).hex()}"] = text[at : at + int(40 * 75 ** chance.random())]
    made = BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, BytesIO(data))
    return made.getvalue()


def asked(quick: bool) -> list[str]:
    levels = QUICK_LEVELS if quick else LEVELS
    portable = [f"{compression}:1,2,3:portable" for compression in ("estargz", "gzip")]
    return [f"estargz:{levels}", f"gzip:{levels}", *portable, f"zstd:{'1,3,7,13' if quick else ZSTD}", "uncompressed:0"]


def measured(name: str, python: list[str], tar: Path, quick: bool, outcome: Outcome) -> Found:
    command = [*python, str(ROOT / "tests" / "torture" / "cpu_probe.py"), str(tar), *asked(quick)]
    done = subprocess.run(["nice", *command], capture_output=True, text=True, check=False, timeout=3600)
    if done.returncode:
        outcome.defect(f"{name}: {' '.join(command)} ends with {done.returncode}: {done.stderr.strip()[-500:]}")
        return {}
    found: Found = json.loads(done.stdout)
    outcome.count("CPUs")
    outcome.count("blobs", len(found))
    for level, made in found.items():
        if not made["right"]:
            outcome.defect(f"{name}: {level}: does not inflate to its tar, or has another digest than it says")
    return found


def compare(of_cpus: Mapping[str, Found], outcome: Outcome) -> list[str]:
    """One line a level: which CPUs give the same bytes. Notes what contradicts what is said of the encoders."""
    lines = []
    for level in next(iter(of_cpus.values()), {}):
        groups: dict[str, list[str]] = {}
        said: dict[str, str] = {}
        for cpu, found in of_cpus.items():
            made = found[level]
            groups.setdefault(made["digest"], []).append(cpu)
            if said.setdefault(made["encoder"], made["digest"]) != made["digest"]:
                outcome.defect(f"{level}: {cpu} makes other bytes than another CPU, and both call it {made['encoder']}")
            outcome.count("comparisons")
        if level not in DEPENDS and len(groups) > 1:
            outcome.defect(f"{level}: is to be the same on every CPU, and is not: {list(groups.values())}")
        lines.append(f"{level:<20} {' | '.join(', '.join(names) for names in groups.values())}")
    return lines


def tested(model: str, python: list[str], outcome: Outcome) -> None:
    """The tests of kernels that choose their code by the CPU: hashes, inflating, headers, tables."""
    command = [
        *python,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-o",
        "timeout=0",
        *TESTS,
        "-k",
        SLOW_OR_NATIVE,
    ]
    done = subprocess.run(["nice", *command], cwd=ROOT, capture_output=True, text=True, check=False, timeout=3600)
    outcome.count("suites of tests")
    if done.returncode:
        outcome.defect(f"{model}: {' '.join(command)}: {done.stdout[-1500:]}")


def chosen(quick: bool) -> list[str]:
    """What is emulated: models of x86-64, and of aarch64 behind that word."""
    models = QUICK if quick else MODELS
    return (models if platform.machine() == "x86_64" else []) + ([] if quick else AARCH64)


def python_of(cpu: str) -> list[str]:
    """How the package is run on a CPU."""
    if cpu in AARCH64:
        return emulated_python(cpu.removeprefix("aarch64-"))
    return ["qemu-x86_64-static", "-cpu", cpu, sys.executable]


def all_measured(ways: Iterable[tuple[str, list[str]]], tar: Path, quick: bool, outcome: Outcome) -> dict[str, Found]:
    with ThreadPoolExecutor(2) as pool:
        begun = {name: pool.submit(measured, name, python, tar, quick, outcome) for name, python in ways}
        return {name: found for name, future in begun.items() if (found := future.result())}


def main() -> int:
    arguments = parser("cpus", __doc__)
    arguments.add_argument(
        "cpus", nargs="*", help=f"these alone beside this machine's own: {', '.join(MODELS + AARCH64)}"
    )
    given = arguments.parse_args()
    quick = given.quick
    outcome = Outcome("cpus", quick)
    subprocess.run([ROOT / "scripts" / "tools", "qemu-x86_64-static:qemu-user-static"], check=True)
    try:
        ways = {"this machine": [sys.executable]}
        ways |= {cpu: python_of(cpu) for cpu in given.cpus or chosen(quick)}
    except Unavailable as error:
        outcome.defect(f"aarch64 cannot be had: {error}")
        return outcome.close()
    RESULTS.mkdir(parents=True, exist_ok=True)
    tar = RESULTS / "cpus.tar"
    tar.write_bytes(corpus(1 << 20 if quick else 4 << 20))
    of_cpus = all_measured(ways.items(), tar, quick, outcome)
    lines = compare(of_cpus, outcome)
    print(*lines, sep="\n")
    (RESULTS / "cpus.txt").write_text("".join(f"{line}\n" for line in lines))
    if not quick:
        for model in sorted(TESTED & ways.keys()):
            tested(model, ways[model], outcome)
    return outcome.close()


if __name__ == "__main__":
    sys.exit(main())
