"""Fixtures: the Go judge, a scratch directory that is removed at once, an empty home, and what only root may do."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
IS_ROOT = os.geteuid() == 0

# Who runs the tests in the background has these ignored, and every program that a test starts would ignore them too.
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

# How many times as long as usual everything may take: sanitizers make it slow.
PATIENCE = float(os.environ.get("ESTARGZ_TEST_PATIENCE", "1"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        mark = item.get_closest_marker("timeout")
        seconds = mark.args[0] if mark and mark.args else float(config.getini("timeout"))
        item.add_marker(pytest.mark.timeout(seconds * PATIENCE), append=False)


def missing(reason: str) -> None:
    """Skips with a reason; where everything must be present, fails instead."""
    if os.environ.get("CI"):
        pytest.fail(f"{reason}, and CI must not skip this", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def peer() -> Path:
    """The Go program that tests/peer holds: containerd's and BuildKit's own code."""
    if shutil.which("go") is None:
        missing("Go is not installed, so there is no peer to compare with")
    built = subprocess.run([REPOSITORY / "scripts" / "peer"], capture_output=True, text=True, check=False)
    if built.returncode:
        missing(f"the Go peer cannot be built: {built.stderr.strip()[-500:]}")
    return Path(built.stdout.strip())


@pytest.fixture
def scratch() -> Iterator[Path]:
    """An empty directory that other users may enter."""
    made = Path(tempfile.mkdtemp(prefix="estargz-test-"))
    made.chmod(0o755)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)  # trees deeper than the interpreter likes
    try:
        yield made
    finally:
        shutil.rmtree(made)
        sys.setrecursionlimit(limit)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, where nobody is logged in to a registry, and no proxy."""
    for name in list(os.environ):
        if (
            name.lower().endswith("_proxy")
            or name.startswith("XDG_")
            or name in ("DOCKER_CONFIG", "REGISTRY_AUTH_FILE")
        ):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def root() -> None:
    if not IS_ROOT:
        pytest.skip("needs root: devices, owners, capabilities")


@pytest.fixture(scope="session")
def overlay(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where overlays cannot be mounted."""
    if not IS_ROOT:
        pytest.skip("needs root: overlay mounts")
    if "overlay" not in Path("/proc/filesystems").read_text():
        missing("the kernel has no overlayfs")
    place = tmp_path_factory.mktemp("overlay")
    for name in ("lower", "upper", "work", "merged"):
        (place / name).mkdir()
    options = f"lowerdir={place}/lower,upperdir={place}/upper,workdir={place}/work"
    mount = ["mount", "-t", "overlay", "overlay", "-o", options, place / "merged"]
    tried = subprocess.run(mount, capture_output=True, text=True, check=False)
    if tried.returncode:
        missing(f"overlays cannot be mounted: {tried.stderr.strip()}")
    subprocess.run(["umount", place / "merged"], check=True)
