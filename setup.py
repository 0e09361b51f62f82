"""Builds the compiled stages in ext/: the extension table and the library lookup. Everything else is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("ext/estargz")

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
    "_layer": (["libcrypto"], []),
    "_toc": ([], []),
    "_pipeline": (["libisal", "libcrypto"], []),
    "_codec": (["libisal", "libdeflate"], []),
    "_inflate": (["libisal", "libzstd", "libcrypto"], []),
}


def pkg_config(*arguments: str) -> list[str]:
    return subprocess.run(
        ["pkg-config", *arguments], check=True, capture_output=True, text=True
    ).stdout.split()


def require_libraries() -> None:
    """Stop with one message that names every package that is missing."""
    if shutil.which("pkg-config") is None:
        sys.exit("estargz needs pkg-config to find its libraries: apt-get install pkg-config " + " ".join(PACKAGES.values()))
    missing = [
        package
        for library, package in PACKAGES.items()
        if subprocess.run(["pkg-config", "--exists", library]).returncode
    ]
    if missing:
        sys.exit("estargz needs system libraries that are missing: apt-get install " + " ".join(missing))


def extension(stage: str, libraries: list[str], sources: list[str]) -> Extension:
    return Extension(
        f"estargz.{stage}",
        [str(SOURCES / f"{stage}.pyx"), *(str(SOURCES / name) for name in sources)],
        include_dirs=[str(SOURCES)],
        extra_compile_args=["-O3", "-std=gnu11", "-pthread", *(pkg_config("--cflags", *libraries) if libraries else [])],
        extra_link_args=["-pthread", *(pkg_config("--libs", *libraries) if libraries else [])],
        depends=[str(path) for path in SOURCES.glob("*.h")],
    )


def extensions() -> list[Extension]:
    from Cython.Build import cythonize

    require_libraries()
    return cythonize(
        [extension(stage, *needs) for stage, needs in STAGES.items()],
        include_path=["ext"],
        build_dir="build/cython",
        nthreads=0 if sys.platform != "linux" else (os.cpu_count() or 1),
        compiler_directives={
            "language_level": "3",
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
            "freethreading_compatible": True,
        },
    )


setup(ext_modules=extensions())
