"""Builds the compiled stages in ext/: the extension table and the library lookup. Everything else is in pyproject.toml.

ESTARGZ_SANITIZE builds them with sanitizers, named as -fsanitize names them: "address,undefined", "thread". Such a build
belongs in a directory of its own, and its interpreter must load the sanitizer's library first (tests/torture/sanitizers.py).
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("ext/estargz")
THREADS = os.cpu_count() or 1
SANITIZE = os.environ.get("ESTARGZ_SANITIZE", "")

# library, as pkg-config knows it -> Debian package that brings it
PACKAGES = {
    "libisal": "libisal-dev",
    "libdeflate": "libdeflate-dev",
    "libcrypto": "libssl-dev",
    "libzstd": "libzstd-dev",
}

# compiled stage -> (libraries, C sources beside it)
STAGES: dict[str, tuple[list[str], list[str]]] = {
    "_memory": ([], []),
    "_sha256": (["libcrypto"], ["sha256.c"]),
    "_files": ([], []),
    "_tar": ([], []),
    "_walk": ([], []),
    "_tar_order": ([], []),
    "_layer": (["libcrypto"], []),
    "_toc": ([], []),
    "_crew": ([], []),
    "_pipeline": (["libisal", "libcrypto"], []),
    "_codec": (["libisal", "libdeflate", "libzstd"], []),
    "_inflate": (["libisal", "libzstd", "libcrypto"], []),
    "_index": ([], []),
    "_record": ([], []),
    "_inflate_ahead": ([], []),
    "_place": ([], []),
    "_folders": ([], []),
    "_extract": ([], []),
}


# What stands in the way of whoever finds a way to write where he must not.
HARDENED = ["-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2", "-fstack-protector-strong", "-fstack-clash-protection"]
HARDENED += {"x86_64": ["-fcf-protection"], "aarch64": ["-mbranch-protection=standard"]}.get(platform.machine(), [])
HARDENED_LINK = ["-Wl,-z,relro,-z,now,-z,noexecstack"]
# No frame is optimized away that a report should show; what is found ends the process, so that no test can miss it.
SANITIZED = [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", "-g", "-O1"]


def pkg_config(option: str, libraries: list[str]) -> list[str]:
    if not libraries:
        return []
    command = ["pkg-config", option, *libraries]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def missing_packages() -> list[str]:
    """Debian's names of what is not there. Without pkg-config no library can be found, so all of them count."""
    missing = []
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
    if shutil.which(compiler) is None:
        missing += ["gcc", "libc6-dev"]
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing.append("python3-dev")
    if shutil.which("pkg-config") is None:
        return [*missing, "pkg-config", *PACKAGES.values()]
    for library, package in PACKAGES.items():
        if subprocess.run(["pkg-config", "--exists", library]).returncode:
            missing.append(package)
    return missing


def extension(stage: str, libraries: list[str], sources: list[str]) -> Extension:
    flags = SANITIZED if SANITIZE else ["-O3", *HARDENED]
    # The directory that this is built in shows neither in messages nor in what a debugger is told.
    flags = [*flags, "-std=gnu11", "-pthread", f"-ffile-prefix-map={Path.cwd()}=."]
    link_flags = [f"-fsanitize={SANITIZE}"] if SANITIZE else HARDENED_LINK
    return Extension(
        f"estargz.{stage}",
        [str(SOURCES / f"{stage}.pyx"), *(str(SOURCES / name) for name in sources)],
        include_dirs=[str(SOURCES)],
        extra_compile_args=[*flags, *pkg_config("--cflags", libraries)],
        extra_link_args=["-pthread", *link_flags, *pkg_config("--libs", libraries)],
        depends=[str(path) for path in SOURCES.glob("*.h")],
    )


def extensions() -> list[Extension]:
    from Cython.Build import cythonize

    missing = missing_packages()
    if missing:
        sys.exit(f"estargz: what it is compiled with is missing: apt-get install {' '.join(missing)}")
    return cythonize(
        [extension(stage, *needs) for stage, needs in STAGES.items()],
        include_path=["ext"],
        build_dir="build/cython",
        nthreads=THREADS,
        compiler_directives={
            "language_level": "3",
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
        },
    )


setup(ext_modules=extensions(), options={"build_ext": {"parallel": THREADS}})
