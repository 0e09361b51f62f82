"""Rounds: ratios stay those of one round, a way that fails is named and ends, nothing of a failed run stays behind."""

from __future__ import annotations

import sys
from pathlib import Path

from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "bench"))

import contest
from measure import Failure, Run, Tree, run_to_blob
from ways import BUILDKIT, DEFAULT, GO_TWO, OURS_TWO, Make, Way, shell_way


def costs(*walls: float, size: int = 10) -> Make:
    """Takes as many seconds as are given, one after the other; a negative number fails."""
    left = list(walls)

    def make(tree: Path, blob: Path) -> Run:
        wall = left.pop(0)
        if wall < 0:
            raise Failure("out of luck")
        return Run(wall=wall, cpu=wall, peak=1, others=0, read=1, written=1, disk_read=0, space=1, output="", size=size)

    return make


def held(tmp_path: Path, *ways: Way, rounds: int = 3) -> dict[str, dict[str, object]]:
    found = contest.hold(Tree("t", tmp_path, 1, 1, 100), ways, rounds, tmp_path / "blob")
    return {way["name"]: way for way in found["ways"]}


def test_a_way_that_fails_is_named_and_keeps_its_runs(tmp_path: Path) -> None:
    good = Way(DEFAULT, "estargz", True, 2, costs(1, 2, 3))
    bad = Way("bad", "tar", False, 1, costs(4, -1))
    none = Way("none", "tar", False, 1, costs(), skipped="not installed: none")
    ways = held(tmp_path, good, bad, none)
    assert [run["wall"] for run in ways[DEFAULT]["runs"]] == [1, 2, 3]  # type: ignore[attr-defined]
    assert [run["wall"] for run in ways["bad"]["runs"]] == [4]  # type: ignore[attr-defined]
    assert ways["bad"]["skipped"] == "out of luck"
    assert ways["none"]["skipped"] == "not installed: none"


def test_a_way_may_want_fewer_rounds(tmp_path: Path) -> None:
    once = Way("once", "estargz", True, 12, costs(5), rounds=1)
    ways = held(tmp_path, once, Way("thrice", "tar", False, 1, costs(1, 1, 1)))
    assert (len(ways["once"]["runs"]), len(ways["thrice"]["runs"])) == (1, 3)  # type: ignore[arg-type]


def test_our_level_that_is_as_small_is_marked(tmp_path: Path) -> None:
    ours = [
        Way(f"estargz, level {level}", "estargz", True, level, costs(1, size=size)) for level, size in ((3, 9), (5, 8))
    ]
    two = Way(OURS_TWO, "estargz", True, 2, costs(1, size=5))
    large = Way(DEFAULT, "estargz", True, 2, costs(1, size=11))
    ways = held(tmp_path, Way(BUILDKIT, "buildkit", True, 6, costs(1, size=9)), two, large, *ours, rounds=1)
    assert [name for name, way in ways.items() if way["note"]] == ["estargz, level 3"]


def test_one_blob_against_two(tmp_path: Path) -> None:
    ways = [Way(name, "go", True, 2, costs(1)) for name in (DEFAULT, OURS_TWO, BUILDKIT, GO_TWO, "other")]
    found = contest.one_and_two(contest.hold(Tree("t", tmp_path, 1, 1, 1), ways, 1, tmp_path / "blob"))
    assert sorted(way["name"] for way in found["ways"]) == sorted(contest.ONE_AND_TWO.values())


def test_a_pipe_that_breaks_leaves_nothing(tmp_path: Path) -> None:
    way = Way("pipe", "tar", False, 1, shell_way("head -c 1000 /dev/zero | tee {gzip} {tar} | false > {blob}"))
    ways = held(tmp_path, way)
    assert "failed with status" in str(ways["pipe"]["skipped"])
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_is_weighed_and_removed(tmp_path: Path) -> None:
    done = run_to_blob(["sh", "-c", f"printf 12345 > {tmp_path}/blob"], tmp_path / "blob")
    assert done.size == 5
    assert list(tmp_path.iterdir()) == []
