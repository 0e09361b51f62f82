"""What the package promises by name: its surface, its error table, its version."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import estargz
from estargz import errors

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "src" / "estargz"
MODULES = sorted(
    ".".join(path.relative_to(SOURCES).with_suffix("").parts)
    for path in SOURCES.rglob("*.py")
    if path.stem not in ("__init__", "__main__") and path.parent.name != "cli"
)
HANDLED_APART = {"EST_OK", "EST_NO_MEMORY", "EST_SINK"}  # success, MemoryError, the caller's own exception


@pytest.mark.parametrize("name", ["", *(f".{stem}" for stem in MODULES)])
def test_exported_names_are_there(name: str) -> None:
    module = import_module(f"estargz{name}")
    assert len(module.__all__) == len(set(module.__all__))
    for exported in module.__all__:
        assert getattr(module, exported, None) is not None, exported


def test_the_public_names_are_sorted() -> None:
    assert estargz.__all__ == sorted(estargz.__all__)


def test_every_public_name_is_a_class_or_a_function() -> None:
    # In a process of its own: here, a test may have imported the module of the same name.
    code = "import estargz; print(*(type(getattr(estargz, name)).__name__ for name in estargz.__all__))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(done.stdout.split()) == len(estargz.__all__)
    assert set(done.stdout.split()) == {"type", "function"}


def test_names_that_are_not_there() -> None:
    assert set(estargz.__all__) <= set(dir(estargz))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = estargz.no_such_name


def status_codes() -> dict[str, int]:
    header = (ROOT / "ext" / "estargz" / "status.h").read_text()
    return {name: int(value) for name, value in re.findall(r"^\s*(EST_\w+) = (-?\d+)", header, re.MULTILINE)}


def test_every_status_has_its_exception_and_no_row_is_left_over() -> None:
    codes = status_codes()
    wanted = {code for name, code in codes.items() if name not in HANDLED_APART}
    assert len(set(codes.values())) == len(codes) > 30
    assert set(errors._STATUS) == wanted


@pytest.mark.parametrize("code", sorted(errors._STATUS, reverse=True))
def test_a_status_becomes_its_exception_with_a_filled_in_message(code: int) -> None:
    error = errors.from_status(code, 13, "some/entry", 1536)
    kind, text, remedy = errors._STATUS[code]
    assert type(error) is kind
    assert isinstance(error, errors.EstargzError)
    assert "{" not in str(error)
    assert str(error).endswith(remedy)
    assert ("some/entry" in str(error)) == ("{name}" in text)
    assert ("1536" in str(error)) == ("{offset}" in text or "{at}" in text)


def test_statuses_without_a_row() -> None:
    assert isinstance(errors.from_status(status_codes()["EST_NO_MEMORY"]), MemoryError)
    assert "-999" in str(errors.from_status(-999))


def test_every_exception_has_an_exit_status_and_one_root() -> None:
    for name in errors.__all__:
        kind = getattr(errors, name)
        assert issubclass(kind, errors.EstargzError)
        assert kind.exit_code == (2 if issubclass(kind, ValueError) else 1)


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == project["version"] == estargz.__version__
