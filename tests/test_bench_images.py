"""The benchmark of images: what it says of steps and ratios, what it does not let pass, and a small run of all of it."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, missing
from registry import PROGRAM, registry

sys.path.insert(0, str(REPOSITORY / "bench"))

import buildkitd
import images
from measure import Failure
from reading import Way


def status(name: str, started: int, completed: int | None) -> dict[str, str]:
    """One of the daemon's, in seconds of the same minute."""
    times = {"started": started, "completed": completed}
    return {"id": name} | {key: f"2026-01-01T00:00:{at:02}.5Z" for key, at in times.items() if at is not None}


def told_of(*statuses: dict[str, str]) -> list[float]:
    steps = buildkitd.Steps(os.getpid(), images.EXPORTING, images.PUSHING)
    for one in statuses:
        steps.see({"statuses": [one]})
    return list(images.told_of(steps).values())


def moved(wall: float, **values: Any) -> images.Moved:
    zeros = dict.fromkeys(("cpu", "peak", "others", "read", "written", "disk_read", "space"), 0)
    return images.Moved(wall=wall, output="", **{**zeros, **values})


def way(name: str, *walls: float, **values: Any) -> Way:
    return Way(name, lambda: None, runs=[moved(wall, **values) for wall in walls])


# ------------------------------------------------------------------------------------------------- steps and ratios


def test_steps_are_told_apart() -> None:
    told = told_of(
        status("sha256:0123", 0, 9),
        status("exporting layers", 1, None),
        status("exporting layers", 1, 5),
        status("exporting manifest sha256:0123", 5, 6),
        status("pushing layers", 6, 8),
        status("pushing manifest for 127.0.0.1:1/image:new@sha256:0123", 8, 10),
    )
    assert told == [5, 4, 9, 0]


def test_steps_at_once_are_not_counted_twice() -> None:
    assert told_of(status("exporting layers", 1, 5), status("pushing layers", 3, 8)) == [4, 5, 7, 2]


def test_a_step_that_is_missing_is_no_zero() -> None:
    with pytest.raises(Failure, match="pushing"):
        told_of(status("exporting layers", 1, 5))


def test_ratios_are_those_of_rounds() -> None:
    table = images.Table("t", [way("ours", 1, 2, 4), way("theirs", 15, 20, 80, steps={"both": 8.0})], "theirs")
    lines = table.text().splitlines()
    assert next(line for line in lines if line.startswith("| ours")).split(" | ")[1:3] == [
        "2.00",
        "15.00 (10.00-20.00)",
    ]
    assert next(line for line in lines if line.startswith("| both")).split(" | ")[1:] == ["8.00", "4.00 (2.00-8.00) |"]


def test_a_way_that_fails_is_named_and_keeps_its_runs() -> None:
    failed = way("failed", 3)
    failed.skipped = "out of\nluck"
    text = images.Table("t", [way("ours", 1), failed, Way("never", lambda: None, "not here")], "ours").text()
    assert "failed ended after round 1: out of luck." in text
    assert "| never | not here |" in text


def test_a_busy_machine_is_told_of() -> None:
    text = images.Table("t", [way("quiet", 10, others=1), way("busy", 10, others=15)], "quiet").text()
    assert "Others took up to 1.5 CPUs beside busy" in text
    assert "beside quiet" not in text


# ------------------------------------------------------------------------------------------------- real ones


def test_what_is_not_there_has_not_been_pushed(tmp_path: Path) -> None:
    if shutil.which(PROGRAM) is None:
        missing(f"{PROGRAM} is not installed")
    blob = tmp_path / "blob"
    blob.write_bytes(b"no table of contents")
    (tmp_path / "registry").mkdir()
    with registry(tmp_path / "registry") as server:
        descriptor = {"mediaType": images.LAYER, "digest": images.registries.sha256_of_file(blob), "size": 20}
        lazy = {**descriptor, "annotations": {images.TOC_DIGEST: descriptor["digest"]}}
        plain = server.push_image("image", [(blob, descriptor, descriptor["digest"])])
        good = server.push_image("image", [(blob, lazy, descriptor["digest"])])
        assert images.weigh(server.host, [f"image:{good}"], 1) == 20
        with pytest.raises(Failure, match="not 2 eStargz layers"):
            images.weigh(server.host, [f"image:{good}"], 2)
        with pytest.raises(Failure, match="not 1 eStargz layers"):
            images.weigh(server.host, [f"image:{plain}"], 1)
        with pytest.raises(Failure, match="is not in the registry"):
            images.weigh(server.host, ["image:none"], 1)


def why_not() -> str | None:
    if not buildkitd.built():
        return "buildkitd is not built: scripts/buildkit does it, in some minutes"
    if why := buildkitd.missing():
        return f"buildkitd cannot be run: {why}"
    return None if shutil.which(PROGRAM) else f"{PROGRAM} is not installed"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The figures of a run with three tiny trees."""
    if why := why_not():
        missing(why)
    folder = tmp_path_factory.mktemp("images")
    trees = [folder / name for name in ("one", "two", "with, comma")]
    for number, tree in enumerate(trees):
        (tree / "sub").mkdir(parents=True)
        (tree / "sub" / "file").write_bytes(random.Random(number).randbytes(500_000))
    places = {name: folder / name for name in ("scratch", "registries")}
    for place in places.values():
        place.mkdir()
    options = [word for name, place in places.items() for word in (f"--{name}", place)]
    command = [sys.executable, REPOSITORY / "bench" / "images.py", "--rounds", "1", "--trees", *trees, *options]
    done = subprocess.run(
        [*command, "--output", folder / "images.json"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "images.md").read_text() == done.stdout
    assert all(not any(place.iterdir()) for place in places.values())
    report: dict[str, Any] = json.loads((folder / "images.json").read_text())
    return report


@pytest.mark.parametrize("part", images.PARTS)
def test_every_way_moves_the_image(found: dict[str, Any], part: str) -> None:
    for way in found[part]["ways"]:
        assert way["skipped"] is None, way["name"]
        (run,) = way["runs"]
        assert run["wall"] > 0, way["name"]
        assert run["cpu"] > 0, way["name"]
        assert run["size"] > 0, way["name"]


@pytest.mark.parametrize("part", ["build", "force"])
def test_steps_of_the_daemon_are_within_the_call(found: dict[str, Any], part: str) -> None:
    (run,) = found[part]["ways"][-1]["runs"]
    exporting, pushing, both, at_once, call = run["steps"].values()
    assert 0 < exporting < both < call
    assert 0 < pushing < both
    assert at_once < min(exporting, pushing)
    assert run["wall"] == (both if part == "build" else call)


def test_only_a_cache_keeps_blobs(found: dict[str, Any]) -> None:
    ours, _, kept, _ = (way["runs"][0] for way in found["build"]["ways"])
    assert kept["written"] >= kept["size"]
    assert ours["written"] < ours["size"]
