"""What is installed: how the stages were compiled and linked, and that docs/supply-chain.md lists every licence."""

from __future__ import annotations

import re
import shutil
import sysconfig
import tomllib
from collections.abc import Iterator
from importlib.metadata import distribution, requires
from pathlib import Path

import pytest
from conftest import missing
from hardening import faults, imported, sanitized

import estargz

requirements = pytest.importorskip("packaging.requirements", reason="needs packaging, which pytest brings")

ROOT = Path(__file__).parent.parent
STAGES = sorted(Path(estargz.__file__).parent.glob(f"*{sysconfig.get_config_var('EXT_SUFFIX')}"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCUMENT = (ROOT / "docs" / "supply-chain.md").read_text()


def documented() -> dict[str, set[str]]:
    """Distribution -> SPDX identifiers, from the tables of the document."""
    rows: list[tuple[str, str]] = re.findall(r"^\| ([\w.-]+) +\|.*\| ([\w. +-]+) \|$", DOCUMENT, re.MULTILINE)
    return {name: set(licence.split()) - {"AND", "OR"} for name, licence in rows}


def needed(requirement: str, extra: str = "") -> Iterator[str]:
    """Names of all that an installation of it brings here."""
    wanted = requirements.Requirement(requirement)
    if wanted.marker and not wanted.marker.evaluate({"extra": extra}):
        return
    yield wanted.name.lower().replace("_", "-")
    for further in requires(wanted.name) or []:
        for part in sorted(wanted.extras) or [""]:
            yield from needed(further, part)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name.partition(".")[0])
def test_stages_are_hardened(stage: Path) -> None:
    if not all(shutil.which(tool) for tool in ("readelf", "nm", "objdump")):
        missing("binutils are not installed")
    if sanitized(stage):
        pytest.skip("the stages were built with sanitizers: set ESTARGZ_SANITIZE to nothing")
    assert faults(stage, [str(ROOT), sysconfig.get_config_var("prefix") + "/include"]) == []


def test_copies_are_checked_for_their_room() -> None:
    if shutil.which("nm") is None:
        missing("binutils are not installed")
    if sanitized(STAGES[0]):
        pytest.skip("the stages were built with sanitizers: set ESTARGZ_SANITIZE to nothing")
    assert len(STAGES) == len(list((ROOT / "ext" / "estargz").glob("*.pyx")))
    checked = [stage for stage in STAGES if any(name.endswith("_chk") for name in imported(stage))]
    assert len(checked) > len(STAGES) // 2  # with _FORTIFY_SOURCE=2 it is a quarter, without it none


def test_every_licence_is_listed() -> None:
    known = documented()
    extra = [each for several in PROJECT["optional-dependencies"].values() for each in several]
    for name in {name for each in PROJECT["dependencies"] + extra for name in needed(each)}:
        assert name in known, f"docs/supply-chain.md lacks {name}"
        metadata = distribution(name).metadata
        expression = metadata.get("License-Expression")
        if expression:
            assert set(re.findall(r"[\w.+-]+", expression)) - {"AND", "OR"} <= known[name], name
        else:  # what was written before there were expressions names the family at least
            stated = [metadata.get("License", ""), *metadata.get_all("Classifier", [])]
            families = {each.partition("-")[0] for each in known[name]}
            mozilla = {"MPL": "Mozilla"}
            assert any(each in text or mozilla.get(each, each) in text for text in stated for each in families), name


def test_every_dependency_has_its_reason_and_its_bound() -> None:
    for requirement in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["fsspec"]:
        name, _, oldest = requirement.partition(">=")
        row = rf"^\| {name.partition('[')[0]} +\| {re.escape(oldest)} +\| .{{20}}"
        assert re.search(row, DOCUMENT, re.MULTILINE), requirement


def test_scripts_fetch_only_through_package_managers() -> None:
    for script in [ROOT / "setup.py", ROOT / "pyproject.toml", ROOT / ".ci" / "run", *(ROOT / "scripts").iterdir()]:
        assert re.findall(r"https?://|\b(?:curl|wget) |\burl(?:open|retrieve)\b", script.read_text()) == [], script
