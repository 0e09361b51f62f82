"""The package built for aarch64, and an interpreter under qemu that runs it: in build/torture/aarch64, nothing is installed.

Debian's packages for that architecture are unpacked into a root of their own, the C that Cython has made is compiled across,
and the wheels that the package needs are taken for manylinux.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from outcome import RESULTS, ROOT

PLACE = RESULTS / "aarch64"
SYSTEM = PLACE / "root"
SITE = PLACE / "site"
UNPACKED = PLACE / "unpacked"

PACKAGES = ["python3-dev", "libisal-dev", "libdeflate-dev", "libssl-dev", "libzstd-dev", "libstdc++6"]
WHEELS = ["numpy", "msgspec", "click", "typing_extensions"]
LIBRARIES = ["-lisal", "-ldeflate", "-lzstd", "-lcrypto"]
COMPILER = "aarch64-linux-gnu-gcc"


class Unavailable(Exception):
    """Something that is needed cannot be had; says what."""


def run(*command: str | Path, environ: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        env={**os.environ, **(environ or {})},
        cwd=cwd,
    )
    if done.returncode:
        raise Unavailable(f"{' '.join(map(str, command))}: {(done.stderr or done.stdout).strip()[-800:]}")
    return done.stdout


def unpack_system() -> None:
    """The packages and all they depend on, by an apt whose state is empty and lies here."""
    state, debs = PLACE / "apt", PLACE / "debs"
    for folder in (state / "lists" / "partial", state / "cache" / "archives" / "partial", debs, SYSTEM):
        folder.mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    (state / "apt.conf").write_text(
        f'APT::Architecture "arm64";\nAPT::Architectures {{ "arm64"; }};\nAPT::Sandbox::User "root";\n'
        f'Dir::State "{state}";\nDir::State::status "{state}/status";\nDir::Cache "{state}/cache";\n'
    )
    environ = {"APT_CONFIG": str(state / "apt.conf")}
    run("apt-get", "update", environ=environ)
    asked = ("apt-get", "install", "-y", "--no-install-recommends", "--print-uris", *PACKAGES)
    lines = [line.split() for line in run(*asked, environ=environ).splitlines() if line.startswith("'")]
    run("apt-get", "download", *(line[1].split("_")[0] for line in lines), environ=environ, cwd=debs)
    for deb in debs.glob("*.deb"):
        run("dpkg", "-x", deb, SYSTEM)
    UNPACKED.write_text(" ".join(PACKAGES))


def interpreter() -> Path:
    return next(path for path in sorted((SYSTEM / "usr" / "bin").glob("python3.*")) if path.name[8:].isdigit())


def take_wheels(version: str) -> None:
    wheels = PLACE / "wheels"
    platforms = [f"manylinux{tag}_aarch64" for tag in ("2014", "_2_17", "_2_27", "_2_28")]
    options = ["--only-binary=:all:", "--python-version", version, "--implementation", "cp", "--dest", str(wheels)]
    options += [word for platform in platforms for word in ("--platform", platform)]
    run(ROOT / ".venv" / "bin" / "python", "-m", "pip", "--quiet", "download", *options, *WHEELS)
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(SITE)


def compile_package(include: str, suffix: str) -> None:
    """What is Python here is copied; what is compiled here is compiled across."""
    made = SITE / "estargz"
    shutil.copytree(
        ROOT / "src" / "estargz", made, ignore=shutil.ignore_patterns("*.so", "__pycache__"), dirs_exist_ok=True
    )
    flags = ["-shared", "-fPIC", "-O2", "-std=gnu11", "-pthread", "-w", f"--sysroot={SYSTEM}"]
    flags += [f"-I{ROOT / 'ext' / 'estargz'}", f"-I{SYSTEM / 'usr' / 'include' / include}"]

    def compile_one(source: Path) -> None:
        beside = [ROOT / "ext" / "estargz" / "sha256.c"] if source.stem == "_sha256" else []
        run(COMPILER, *flags, source, *beside, "-o", made / f"{source.stem}{suffix}", *LIBRARIES)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, (ROOT / "build" / "cython" / "ext" / "estargz").glob("_*.c")))


@functools.cache
def made() -> list[str]:
    """The interpreter, with the package built anew from the sources as they are; behind "-cpu MODEL"."""
    run(ROOT / "scripts" / "tools", f"{COMPILER}:gcc-aarch64-linux-gnu", "qemu-aarch64-static:qemu-user-static")
    if not UNPACKED.exists() or UNPACKED.read_text().split() != PACKAGES:
        unpack_system()
    python = interpreter()
    if not (SITE / "numpy").exists():
        take_wheels(python.name.removeprefix("python"))
    command = ["-L", str(SYSTEM), "-E", f"PYTHONPATH={SITE}", "-E", f"PYTHONHOME={SYSTEM}/usr", str(python)]
    suffix = "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))"
    compile_package(python.name, run("qemu-aarch64-static", *command, "-c", suffix).strip())
    return command


def emulated_python(model: str) -> list[str]:
    """How the package is run as a model of CPU; everything that needs is made first. Raises Unavailable."""
    return ["qemu-aarch64-static", "-cpu", model, *made()]
