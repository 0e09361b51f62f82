"""What fuzzing has found stays mended: every input of the corpora is dealt with as its target wants it."""

from __future__ import annotations

from pathlib import Path

import pytest
from torture.fuzzing import compiled_targets
from torture.fuzzing.python_parsers import TARGETS
from torture.fuzzing.python_target import CORPUS

pytestmark = pytest.mark.timeout(60)

INPUTS = sorted(path for name in TARGETS for path in (CORPUS / name).iterdir())
COMPILED = sorted(path for name in compiled_targets.TARGETS for path in (CORPUS / name).iterdir())


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_python_parsers(path: Path, peer: Path) -> None:
    TARGETS[path.parent.name].check(path.read_bytes())


@pytest.mark.parametrize("path", COMPILED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_compiled_stages(path: Path, peer: Path) -> None:
    compiled_targets.TARGETS[path.parent.name].check(path.read_bytes())


def test_every_target_has_a_corpus() -> None:
    assert {path.parent.name for path in INPUTS} == set(TARGETS)
    assert {path.parent.name for path in COMPILED} == set(compiled_targets.TARGETS)
