"""The build command, run as a process: its contract with whoever scripts it."""

from __future__ import annotations

import gzip
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import zstandard
from conftest import missing
from reference.blobs import member
from tars import END, entry, everything, go_toc, judge, sha256
from trees import SECOND, WHOLE, Tree, entries, go_tar

import estargz
from estargz import Layer

pytestmark = pytest.mark.timeout(60)

PROGRAM = [sys.executable, "-c", "import sys; from estargz.cli import main; sys.exit(main())"]
TAR = everything() + END
LANDMARK = ".no.prefetch.landmark"


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    (tmp_path / "input.tar").write_bytes(TAR)
    return tmp_path / "input.tar"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    made = Tree(tmp_path / "tree")
    made.dir("d")
    made.file("d/file", b"x" * 9000, time=WHOLE)
    made.file("late", b"y", time=WHOLE + 10 * SECOND)
    made.dir("d", time=WHOLE - 10 * SECOND)
    return made.root


def build(*arguments: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
    command = [*PROGRAM, "build", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, timeout=60, check=False, **options)


def built(*arguments: object, **options: Any) -> dict[str, Any]:
    """The descriptor of a build that succeeds."""
    done = build(*arguments, **options)
    assert done.returncode == 0, done.stderr.decode()
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def refused(*arguments: object, status: int, **options: Any) -> str:
    """The message of a build that fails; nothing is printed and no trace is left."""
    done = build(*arguments, **options)
    message = done.stderr.decode()
    assert (done.returncode, done.stdout) == (status, b""), message
    assert "Traceback" not in message
    assert message.splitlines()[-1].startswith("estargz: error: ")
    return message


def environment(**more: str) -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "SOURCE_DATE_EPOCH"} | more


def layer_of(source: Any, **options: Any) -> Layer:
    return estargz.build(io.BytesIO(source) if isinstance(source, bytes) else source, io.BytesIO(), **options)


def tar_in(blob: Path) -> bytes:
    with estargz.open(blob) as opened:
        return opened.open_tar().read()


# --- output


def test_descriptor(tar: Path, tmp_path: Path) -> None:
    done = build(tar, "-o", tmp_path / "blob")
    assert done.returncode == 0
    assert json.loads(done.stdout) == layer_of(tar).descriptor()
    assert done.stdout.count(b"\n") > 5
    assert b" MB/s" in done.stderr
    assert (tmp_path / "blob").stat().st_size == layer_of(tar).size


def test_descriptor_on_one_line(tar: Path, tmp_path: Path) -> None:
    done = build(tar, "-o", tmp_path / "blob", "--json", "--quiet")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.count(b"\n") == 1
    assert json.loads(done.stdout) == layer_of(tar).descriptor()


def test_blob_on_standard_output(tar: Path, tmp_path: Path) -> None:
    done = build(tar, "-o", "-", "--json", "--quiet")
    assert done.returncode == 0
    described = json.loads(done.stderr)
    assert (described["digest"], described["size"]) == (sha256(done.stdout), len(done.stdout))
    with (tmp_path / "file").open("wb") as out:
        subprocess.run([*PROGRAM, "build", tar, "-o", "-"], stdout=out, stderr=subprocess.PIPE, check=True)
    assert (tmp_path / "file").read_bytes() == done.stdout


def test_standard_input(tar: Path, tmp_path: Path) -> None:
    wanted = layer_of(TAR).descriptor()
    assert built("-", "-o", tmp_path / "blob", input=TAR) == wanted
    assert built("-", "-o", tmp_path / "blob", input=member(TAR)) == wanted
    with tar.open("rb") as file:
        assert built("-", "-o", tmp_path / "blob", stdin=file) == wanted
    assert built("-", "-o", "/dev/null", input=(tmp_path / "blob").read_bytes()) == wanted


def test_through_pipes(tar: Path) -> None:
    """As a shell connects them; the second build gets a blob and gives the same one."""
    first = subprocess.Popen([*PROGRAM, "build", tar, "-o", "-"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert first.stdout is not None
    second = build("-", "-o", "-", "--json", "--quiet", stdin=first.stdout)
    first.stdout.close()
    assert first.wait(20) == 0
    assert json.loads(second.stderr) == layer_of(tar).descriptor()


# --- options


@pytest.mark.parametrize("compression", ["estargz", "gzip", "zstd", "uncompressed"])
def test_compressions(tar: Path, tmp_path: Path, compression: str) -> None:
    found = built(tar, "-o", tmp_path / "blob", "--compression", compression)
    assert found == layer_of(tar, compression=compression).descriptor()
    assert found["mediaType"].endswith({"uncompressed": "tar", "zstd": "tar+zstd"}.get(compression, "tar+gzip"))
    read = zstandard.open if compression == "zstd" else gzip.open if found["mediaType"].endswith("+gzip") else open
    with read(tmp_path / "blob", "rb") as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
        assert "dir/file" in archive.getnames()


@pytest.mark.parametrize("level", range(13))
def test_levels(tar: Path, level: int) -> None:
    assert built(tar, "-o", "/dev/null", "--level", level) == layer_of(tar, level=level).descriptor()


@pytest.mark.parametrize(
    ("text", "size"), [("700", 700), ("1k", 1024), ("1KiB", 1024), ("2MiB", 2 << 20), ("1 kb", 1024)]
)
def test_sizes(tar: Path, peer: Path, tmp_path: Path, text: str, size: int) -> None:
    for option, name in (("--chunk-size", "chunk_size"), ("--min-chunk-size", "min_chunk_size")):
        blob = tmp_path / "blob"
        layer = layer_of(tar, **{name: size})
        assert built(tar, "-o", blob, option, text) == layer.descriptor()
        judge(peer, blob, layer)
    assert json.loads(go_toc(peer, blob))["version"] == 1


def test_threads_and_memory_do_not_show(tar: Path) -> None:
    wanted = layer_of(tar).descriptor()
    for options in (["--threads", 1], ["--threads", 7], ["--memory", "100MiB"], ["--memory", "1g", "--threads", 2]):
        assert built(tar, "-o", "/dev/null", *options) == wanted


@pytest.mark.parametrize(
    "options",
    [
        ["--level", "13"],
        ["--level", "-1"],
        ["--level", "best"],
        ["--compression", "lzma"],
        ["--compression", "zstd", "--level", "20"],
        ["--compression", "zstd", "--memory", "16MiB"],
        ["--chunk-size", "0"],
        ["--chunk-size", "-1"],
        ["--chunk-size", "lots"],
        ["--chunk-size", "9" * 5000],
        ["--chunk-size", "2GiB"],
        ["--min-chunk-size", "2GiB"],
        ["--threads", "0"],
        ["--threads", "1025"],
        ["--memory", "1MiB"],
        ["--memory", "0"],
        ["--lower", "."],
        ["--overlay-lower", "."],
        ["--lower", ".", "--overlay-lower", "."],
        ["--colour"],
        ["another"],
    ],
)
def test_wrong_usage(tar: Path, tmp_path: Path, options: list[str]) -> None:
    refused(tar, "-o", tmp_path / "blob", *options, status=2)
    assert not (tmp_path / "blob").exists()


def test_missing_arguments(tar: Path) -> None:
    assert "output" in refused(tar, status=2)
    assert "SOURCE" in refused("-o", "x", status=2)


def test_errors(tar: Path, tmp_path: Path) -> None:
    assert f"{tmp_path}/gone: cannot be opened" in refused(tmp_path / "gone", "-o", tmp_path / "blob", status=1)
    assert "blob: cannot be written: No such file" in refused(tar, "-o", tmp_path / "gone" / "blob", status=1)
    assert "cannot be written: Is a directory" in refused(tar, "-o", tmp_path, status=1)
    assert "is empty, and a tar is not" in refused("-", "-o", tmp_path / "blob", status=1, input=b"")
    cut = entry(b"cut", b"x" * 700)[:1000]
    assert "cut: the tar stream ends too early, at byte 1000" in refused(
        "-", "-o", tmp_path / "blob", status=1, input=cut
    )
    assert "checksum at byte 0" in refused("-", "-o", tmp_path / "blob", status=1, input=b"x" * 512)
    bad = entry(b"stargz.index.json", b"x") + END
    assert "stargz.index.json: is a name reserved" in refused("-", "-o", tmp_path / "blob", status=1, input=bad)
    sparse = entry(b"holes", type=b"S") + END
    assert "holes: sparse entry at byte 0; make" in refused("-", "-o", tmp_path / "blob", status=1, input=sparse)
    assert [path.name for path in tmp_path.iterdir()] == ["input.tar"]


def test_error_names_are_printable(tmp_path: Path) -> None:
    bad = entry(b"caf\xe9 \xff", type=b"7") + END
    message = refused("-", "-o", tmp_path / "blob", status=1, input=bad, env=environment(LC_ALL="C"))
    assert r"caf\xe9 \xff: entry type" in message


def test_failed_build_keeps_the_old_blob(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"old")
    refused("-", "-o", tmp_path / "blob", status=1, input=TAR[:1500])
    assert (tmp_path / "blob").read_bytes() == b"old"


# --- directories


def test_landmark(tree: Path, tmp_path: Path, peer: Path) -> None:
    blob = tmp_path / "blob"
    env = environment()
    with_landmark = built(tree, "-o", blob, env=env)
    with estargz.open(blob) as opened:
        names = [item.name for item in opened.toc]
        assert opened.read(LANDMARK) == b"\x0f"
        first = opened.toc[0]
    assert names == [LANDMARK, "d/", "d/file", "late"]
    digest = "sha256:dc0e9c3658a1a3ed1ec94274d8b19925c93e1abb7ddba294923ad9bde30f8cb8"
    assert (first.digest, first.chunk_digest, first.mode, first.modtime) == (digest, digest, 0, "")
    judge(peer, blob, estargz.build(tree, io.BytesIO()))
    assert built(tree, "-o", blob, "--no-landmark", env=env) != with_landmark
    assert tar_in(blob) == go_tar(peer, tree)
    for compression in ("gzip", "zstd", "uncompressed"):
        assert built(tree, "-o", blob, "--compression", compression, env=env)["annotations"] == {
            "containerd.io/uncompressed": sha256(go_tar(peer, tree))
        }


def test_tars_get_no_landmark(tar: Path, tmp_path: Path) -> None:
    built(tar, "-o", tmp_path / "blob")
    assert tar_in(tmp_path / "blob") == TAR


def test_reserved_names_in_a_tree(tree: Path, tmp_path: Path) -> None:
    (tree / LANDMARK).write_bytes(b"x")
    message = refused(tree, "-o", tmp_path / "blob", status=1)
    assert f"{LANDMARK}: is a name reserved by the eStargz format; rename it" in message
    built(tree, "-o", tmp_path / "blob", "--no-landmark")
    (tree / "stargz.index.json").write_bytes(b"{}")
    assert "stargz.index.json: is a name" in refused(tree, "-o", tmp_path / "other", "--no-landmark", status=1)
    built(tree, "-o", tmp_path / "blob", "--compression", "gzip")


def test_lower(tree: Path, tmp_path: Path, peer: Path) -> None:
    lower = Tree(tmp_path / "lower")
    lower.file("late", b"before", time=WHOLE)
    lower.file("gone", b"z")
    built(tree, "-o", tmp_path / "blob", "--lower", lower.root, "--no-landmark", env=environment())
    assert tar_in(tmp_path / "blob") == go_tar(peer, tree, lower.root)
    assert ".wh.gone" in entries(tar_in(tmp_path / "blob"))
    assert "cannot be opened" in refused(tree, "-o", tmp_path / "other", "--lower", tmp_path / "none", status=1)


def test_overlay_lower(tree: Path, tmp_path: Path) -> None:
    lowers = [Tree(tmp_path / name) for name in ("upper-lower", "lowest")]
    lowers[1].file("late", b"y", time=WHOLE + 10 * SECOND)  # the same file again: no change
    (tree / "late").chmod(0o644)
    flags = [part for lower in lowers for part in ("--overlay-lower", lower.root)]
    built(tree, "-o", tmp_path / "blob", *flags, "--no-landmark", env=environment())
    wanted = estargz.build(tree, io.BytesIO(), overlay_lower=[lower.root for lower in lowers], landmark=False)
    with estargz.open(tmp_path / "blob") as opened:
        assert opened.toc_digest == wanted.toc_digest
        assert "d/file" in opened
        assert "late" not in opened


@pytest.mark.parametrize("seconds", [0, 5, WHOLE // SECOND + 3, -7])
def test_source_date_epoch(tree: Path, tmp_path: Path, peer: Path, seconds: int) -> None:
    env = environment(SOURCE_DATE_EPOCH=str(seconds))
    built(tree, "-o", tmp_path / "blob", "--no-landmark", env=env)
    with tarfile.open(fileobj=io.BytesIO(tar_in(tmp_path / "blob"))) as archive:
        times = [info.mtime for info in archive]
    whole = WHOLE // SECOND
    assert times == [min(seconds, time) for time in (whole - 10, whole, whole + 10)]
    if seconds >= 0:
        assert tar_in(tmp_path / "blob") == go_tar(peer, tree, epoch=seconds)


@pytest.mark.parametrize("text", ["tomorrow", "1.5", "1e9", "9" * 30, "0x10"])
def test_source_date_epoch_that_is_none(tree: Path, tmp_path: Path, text: str) -> None:
    refused(tree, "-o", tmp_path / "blob", status=2, env=environment(SOURCE_DATE_EPOCH=text))
    assert not (tmp_path / "blob").exists()


def test_source_date_epoch_leaves_tars_alone(tar: Path, tmp_path: Path) -> None:
    built(tar, "-o", tmp_path / "blob", env=environment(SOURCE_DATE_EPOCH="5"))
    assert tar_in(tmp_path / "blob") == TAR
    built(tar, "-o", tmp_path / "blob", env=environment(SOURCE_DATE_EPOCH=""))


# --- help


def test_help_lists_every_option() -> None:
    shown = build("--help").stdout.decode()
    options = (
        "output lower overlay-lower compression level chunk-size min-chunk-size threads memory no-landmark json quiet"
    )
    for option in options.split():
        assert f"--{option} " in shown
    assert "SOURCE_DATE_EPOCH" in shown


@pytest.mark.measured
def test_help_is_quick() -> None:
    """Somebody waits for it. Measured against an interpreter that does nothing, which a slow machine slows as well."""
    nothing, shown = [], []
    for _ in range(5):
        nothing.append(seconds_of([sys.executable, "-c", "pass"]))
        shown.append(seconds_of([*PROGRAM, "--help"]))
    bare = statistics.median(nothing)
    assert statistics.median(shown) < max(0.150, 0.130 + 2 * bare), (nothing, shown)


def seconds_of(command: list[str]) -> float:
    begun = time.perf_counter()
    subprocess.run(command, capture_output=True, check=True)
    return time.perf_counter() - begun


def test_terminal_is_refused(tar: Path) -> None:
    """A blob on a terminal helps nobody."""
    try:
        ours, theirs = os.openpty()
    except OSError as error:
        missing(f"no terminal can be made: {error}")
    try:
        command = [*PROGRAM, "build", str(tar), "-o", "-"]
        done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, timeout=20, check=False)
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 2
    assert b"not written to a terminal" in done.stderr
