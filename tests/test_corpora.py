"""The synthetic trees of scripts/corpora, made smaller here: what is in them, and that it is always the same."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import json
import os
import stat
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "corpora"
PATH_MAX = 4096
SMALLER = {
    "BIG_SIZE": 1 << 20,
    "HUGE_SIZE": 6 << 20,
    "NOISE_SIZE": 3 << 20,
    "ZERO_FILES": ((1, 3 << 20), (3, 100_000)),
    "ZERO_BLOCK": 1 << 16,
    "CHAINS": 2,
    "CHAIN_LEVELS": 30,
    "BUSH_LEVELS": 2,
    "BUSH_WIDTH": 3,
}
FILES = 2500  # of "small": three directories
SYNTHETIC = ("small", "big", "zeros", "noise", "deep", "huge")


@pytest.fixture(scope="module", autouse=True)
def usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def load() -> ModuleType:
    """The script as a module, which leaves no bytecode beside it."""
    loader = importlib.machinery.SourceFileLoader("corpora", str(SCRIPT))
    spec = importlib.util.spec_from_loader("corpora", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "dont_write_bytecode", True)
        patch.setitem(sys.modules, "corpora", module)
        loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def corpora() -> ModuleType:
    return load()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Where trees of the same recipes, but smaller, are made once for all tests."""
    module = load()
    for name, value in SMALLER.items():
        assert hasattr(module, name)
        setattr(module, name, value)
    recipes = {**module.all_recipes(), "small": module.files_recipe(FILES)}
    return module.Store(tmp_path_factory.mktemp("corpora"), recipes)


def files_of(tree: Path) -> list[Path]:
    return sorted(path for path in tree.rglob("*") if path.is_file())


def payload(tree: Path) -> bytes:
    return b"".join(path.read_bytes() for path in files_of(tree))


def digest(tree: Path) -> str:
    """Of every name, mode, time and byte."""
    hashed = hashlib.sha256()
    for path in [tree, *sorted(tree.rglob("*"))]:
        status = path.lstat()
        size = status.st_size if stat.S_ISREG(status.st_mode) else 0
        hashed.update(f"{path.relative_to(tree)} {status.st_mode:o} {status.st_mtime_ns} {size}\n".encode())
        if size:
            hashed.update(path.read_bytes())
    return hashed.hexdigest()[:16]


# --- all of them


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("small", "a31a4b22e3c0ef32"),
        ("big", "20f339ac077fa28b"),
        ("zeros", "b9b7d6442c2bf612"),
        ("noise", "55e703de9a3b7358"),
        ("deep", "c640e2f154d6e57c"),
        ("huge", "28ddf6a4ed16a9bd"),
        ("small-changed", "3fd0ad01a1c75462"),
    ],
)
def test_the_same_everywhere(store: Any, name: str, expected: str) -> None:
    """Names, modes, times and bytes, on each machine and with each Python."""
    assert digest(store.ensure(name)) == expected


@pytest.mark.parametrize("name", SYNTHETIC)
def test_all_times_are_fixed(store: Any, corpora: ModuleType, name: str) -> None:
    tree = store.ensure(name)
    assert {path.stat().st_mtime_ns for path in [tree, *tree.rglob("*")]} == {corpora.FIXED_TIME * 10**9}


@pytest.mark.parametrize("name", [*SYNTHETIC, "small-changed"])
def test_made_once(store: Any, name: str) -> None:
    made = store.ensure(name).stat().st_ino
    assert store.ready(name)
    assert store.ensure(name).stat().st_ino == made


def test_pins_survive_the_stamp(corpora: ModuleType) -> None:
    """A tuple would come back from JSON as a list, and its tree be outdated at once."""
    for name, recipe in corpora.all_recipes().items():
        assert json.loads(json.dumps(recipe.pins)) == recipe.pins, name


# --- each


def test_zeros_are_written_or_holes_by_turns(store: Any) -> None:
    tree = store.ensure("zeros")
    sizes = {path.name: path.stat().st_size for path in files_of(tree)}
    assert sizes == {
        "zeros-000.bin": 3 << 20,
        "hole-001.bin": 100_000,
        "zeros-002.bin": 100_000,
        "hole-003.bin": 100_000,
    }
    assert not any(payload(tree))
    assert all(path.stat().st_blocks == 0 for path in tree.glob("hole-*"))


def test_noise_does_not_compress(store: Any) -> None:
    content = payload(store.ensure("noise"))
    assert len(content) == SMALLER["NOISE_SIZE"]
    assert len(zlib.compress(content)) > len(content)


def test_huge_is_half_text(store: Any) -> None:
    files = [path.read_bytes() for path in files_of(store.ensure("huge"))]
    assert sum(map(len, files)) == SMALLER["HUGE_SIZE"]
    text = sum(len(content) for content in files for content in halves(content) if content.isascii())
    assert 0.4 < text / sum(map(len, files)) < 0.6
    assert {content.isascii() for content in files if len(content) < 10_000} == {True, False}


def halves(content: bytes) -> Iterator[bytes]:
    for start in range(0, len(content), 1 << 16):
        yield content[start : start + (1 << 16)]


def test_sizes_are_those_of_a_real_tree(corpora: ModuleType) -> None:
    sizes = sorted(corpora.Generator(corpora.SEED).sizes(corpora.HUGE_SIZE))
    assert sum(sizes) == corpora.HUGE_SIZE
    assert 1 << 10 < sizes[len(sizes) // 2] < 8 << 10
    assert 32 << 20 < sizes[-1] <= 64 << 20
    assert sum(size for size in sizes if size >= 1 << 20) > 0.8 * corpora.HUGE_SIZE


def test_deep_is_near_the_longest_path(corpora: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As deep as it really is, and made anew when it is outdated: the old one has to be removed too."""
    monkeypatch.setattr(corpora, "BUSH_WIDTH", 2)
    store = corpora.Store(tmp_path, corpora.all_recipes())
    tree = store.ensure("deep")
    names = [entry.path.removeprefix(f"{tree}/") for entry in corpora.walk(tree)]
    assert len(names) == 2 * (4 * 380 + 1 + 2 + 2**2 + 2**3)
    assert max(name.count("/") for name in names) == 380
    assert PATH_MAX - 300 < max(map(len, names)) < PATH_MAX - 250
    assert max(len(part) for name in names for part in name.split("/")) < 10

    outdated = json.loads(store.stamp_path("deep").read_text())
    outdated["recipe"]["seed"] = 1
    store.stamp_path("deep").write_text(json.dumps(outdated))
    assert not store.ready("deep")
    assert store.ensure("deep") == tree
    assert store.ready("deep")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "deep.json"]
    corpora.remove(tree)  # pytest would do it by a function that calls itself at each level


def test_changed_small(store: Any) -> None:
    upper, lower = store.ensure("small-changed"), store.path("small")
    before, after = ({path.relative_to(tree): path.read_bytes() for path in files_of(tree)} for tree in (lower, upper))
    assert len(before.keys() - after.keys()) == FILES // 500
    assert len(after.keys() - before.keys()) == FILES // 500
    assert sum(before[path] != after[path] for path in before.keys() & after.keys()) == FILES // 100


def test_quick_is_a_virtualenv_without_pip(
    corpora: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Only which commands are run: to install the packages takes a network."""
    commands: list[list[str]] = []

    def record(command: list[str], remedy: str) -> str:
        if not commands:  # the first makes the virtualenv
            (tmp_path / ".quick.partial" / "bin").mkdir()
            (tmp_path / ".quick.partial" / "pyvenv.cfg").write_text(f"command = venv {tmp_path}/.quick.partial\n")
        commands.append(command)
        return ""

    monkeypatch.setattr(corpora, "run", record)
    tree = corpora.Store(tmp_path, corpora.all_recipes()).ensure("quick")
    create, install, uninstall = commands
    assert "venv" in create
    assert install[-5:] == [f"{name}=={version}" for name, version in corpora.QUICK_PINS.items()]
    assert uninstall[-2:] == ["pip", "setuptools"]
    assert (tree / "pyvenv.cfg").read_text() == f"command = venv {tree}\n"
