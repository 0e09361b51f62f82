"""Builds the compiled stages in ext/: the extension table, the library lookup, and archives that are the same wherever they are
made (docs/supply-chain.md). Everything else is in pyproject.toml.

ESTARGZ_SANITIZE builds them with sanitizers, named as -fsanitize names them: "address,undefined", "thread". Such a build
belongs in a directory of its own, and its interpreter must load the sanitizer's library first (tests/torture/sanitizers.py).
"""

from __future__ import annotations

import gzip
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

SOURCES = Path("ext/estargz")
THREADS = os.cpu_count() or 1
SANITIZE = os.environ.get("ESTARGZ_SANITIZE", "")

# library, as pkg-config knows it -> (oldest version that will do, Debian package that brings it); docs/supply-chain.md says why
LIBRARIES = {
    "libisal": ("2.30", "libisal-dev"),
    "libdeflate": ("1.9", "libdeflate-dev"),
    "libcrypto": ("3.0", "libssl-dev"),
    "libzstd": ("1.4.0", "libzstd-dev"),
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


# What stands in the way of whoever finds a way to write where he must not. Nobody but Python calls into a stage, by one name.
HARDENED = ["-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=3", "-fstack-protector-strong", "-fstack-clash-protection"]
HARDENED += {"x86_64": ["-fcf-protection"], "aarch64": ["-mbranch-protection=standard"]}.get(platform.machine(), [])
HARDENED += ["-fvisibility=hidden"]
HARDENED_LINK = ["-Wl,-z,relro,-z,now,-z,noexecstack,--as-needed"]
# Returns are all protected. Jumps are not where the C library's start files are not, so only the linker may claim that.
HARDENED_LINK += {"x86_64": ["-Wl,-z,shstk"]}.get(platform.machine(), [])
# No frame is optimized away that a report should show. UBSAN_OPTIONS=halt_on_error=1 ends the process at the first one.
SANITIZED = [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-g", "-O1"]


def pkg_config(option: str, libraries: list[str]) -> list[str]:
    if not libraries:
        return []
    command = ["pkg-config", option, *libraries]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def found(library: str) -> bool:
    return subprocess.run(["pkg-config", "--exists", library]).returncode == 0


def missing_packages() -> list[str]:
    """Debian's names of what is not there. Without pkg-config no library can be found, so all of them count."""
    missing = []
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
    if shutil.which(compiler) is None:
        missing += ["gcc", "libc6-dev"]
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing.append("python3-dev")
    if shutil.which("pkg-config") is None:
        return [*missing, "pkg-config", *(package for _, package in LIBRARIES.values())]
    return missing + [package for library, (_, package) in LIBRARIES.items() if not found(library)]


def outdated_libraries() -> list[str]:
    return [
        f"{library} {pkg_config('--modversion', [library])[0]} ({oldest} or newer is needed)"
        for library, (oldest, _) in LIBRARIES.items()
        if not found(f"{library} >= {oldest}")
    ]


def extension(stage: str, libraries: list[str], sources: list[str]) -> Extension:
    # Without -g0, which Python may have been built with, the files would be three times as large and name its directories.
    flags = SANITIZED if SANITIZE else ["-O3", "-g0", *HARDENED]
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
    outdated = outdated_libraries()
    if outdated:
        sys.exit(
            f"estargz: too old to be compiled with: {', '.join(outdated)}; PKG_CONFIG_PATH tells where newer ones are"
        )
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


class BuildStages(build_ext):
    """Leaves out where the interpreter's own library lies: a stage does not need it, and would look there for all others."""

    def build_extensions(self) -> None:
        own = shlex.split(sysconfig.get_config_var("LDSHARED") or "")
        unwanted = {flag for flag in own if flag.startswith("-Wl,-rpath")}
        self.compiler.linker_so = [flag for flag in self.compiler.linker_so if flag not in unwanted]
        super().build_extensions()


def plain_mode(mode: int) -> int:
    """What git keeps of it, whatever the umask was."""
    return 0o755 if mode & 0o100 else 0o644


class ReproducibleWheel(bdist_wheel):
    """setuptools sees to names and times, but not to the modes."""

    def write_wheelfile(self, *arguments: Any, **options: Any) -> None:
        super().write_wheelfile(*arguments, **options)
        for path in Path(self.bdist_dir).rglob("*"):
            path.chmod(plain_mode(path.stat().st_mode))


class ReproducibleSdist(sdist):
    """A tar that shows neither who made it nor when, if SOURCE_DATE_EPOCH says so."""

    def make_archive(self, base_name: str, format: str, *_: Any, base_dir: str, **__: Any) -> str:
        made_at = int(os.environ.get("SOURCE_DATE_EPOCH") or time.time())

        def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
            return entry.replace(
                mtime=made_at, mode=plain_mode(entry.mode), uid=0, gid=0, uname="", gname="", deep=False
            )

        path = f"{base_name}.tar.gz"
        with (
            gzip.GzipFile(path, "wb", mtime=made_at) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            archive.add(base_dir, filter=plain)
        return path


setup(
    ext_modules=extensions(),
    options={"build_ext": {"parallel": THREADS}},
    cmdclass={"build_ext": BuildStages, "bdist_wheel": ReproducibleWheel, "sdist": ReproducibleSdist},
)
