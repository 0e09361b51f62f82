"""What users get wrong, and what must end when it is told to: each hazard once."""

from __future__ import annotations

import gzip
import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from reference.tar_headers import plain_header

import estargz
from estargz.cli import main
from estargz.errors import BlobError, EstargzError, SourceError, UsageError

COMMAND = [sys.executable, "-c", "import sys; from estargz.cli import main; sys.exit(main())"]


def tree_of(folder: Path, size: int) -> Path:
    folder.mkdir()
    (folder / "file").write_bytes(os.urandom(size))
    return folder


def test_writer_used_by_two_threads(tmp_path: Path) -> None:
    writer = estargz.Writer(tmp_path / "blob")
    writer.write(plain_header(b"big", size=b"%011o\0" % (200 << 20)))
    refused: list[BaseException] = []

    def feed() -> None:
        try:
            for _ in range(20):
                writer.write(bytes(3 << 20))
        except EstargzError as error:
            refused.append(error)

    threads = [threading.Thread(target=feed) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.abort()
    assert refused
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("chunk_size", [1, 16, 17, 100, 511, 4096])
@pytest.mark.parametrize("level", [0, 1, 2, 3, 6])
def test_smallest_chunks(tmp_path: Path, chunk_size: int, level: int) -> None:
    tree = tree_of(tmp_path / "tree", 20_000 if chunk_size == 1 else 300_000)
    layer = estargz.build(tree, tmp_path / "blob", chunk_size=chunk_size, level=level)
    assert (
        estargz.verify(tmp_path / "blob", diff_id=layer.diff_id).chunks
        >= tree.joinpath("file").stat().st_size // chunk_size
    )


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("output", ["fifo", "pipe"])
def test_reader_that_has_stopped(tmp_path: Path, threads: int, output: str) -> None:
    tree = tree_of(tmp_path / "tree", 30 << 20)
    os.mkfifo(tmp_path / "fifo")
    keep = os.open(tmp_path / "fifo", os.O_RDWR)
    dest = str(tmp_path / "fifo") if output == "fifo" else "-"
    try:
        build = subprocess.Popen(
            [*COMMAND, "build", str(tree), "-o", dest, "--threads", str(threads), "--quiet"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        time.sleep(1.5)
        assert build.poll() is None
        build.send_signal(signal.SIGTERM)
        assert build.wait(timeout=10) == 128 + signal.SIGTERM
        build.stdout.close()  # type: ignore[union-attr]
        build.stderr.close()  # type: ignore[union-attr]
    finally:
        os.close(keep)


def test_comparing_can_be_interrupted(tmp_path: Path) -> None:
    """Equal files of whole-second times are compared byte by byte: sparse ones as long as one likes."""
    for name in ("lower", "upper"):
        (tmp_path / name).mkdir()
        with open(tmp_path / name / "file", "wb") as file:
            file.truncate(60 << 30)
        os.utime(tmp_path / name / "file", (1, 1))
    build = subprocess.Popen(
        [*COMMAND, "build", str(tmp_path / "upper"), "--lower", str(tmp_path / "lower"), "-o", str(tmp_path / "blob")],
        stderr=subprocess.DEVNULL,
    )
    time.sleep(1.0)
    build.send_signal(signal.SIGTERM)
    assert build.wait(timeout=10) == 128 + signal.SIGTERM
    assert not (tmp_path / "blob").exists()


def test_ignored_hangup_stays_ignored(tmp_path: Path) -> None:
    tree = tree_of(tmp_path / "tree", 60 << 20)
    build = subprocess.Popen(
        [
            "sh",
            "-c",
            'trap "" HUP; exec "$@"',
            "sh",
            *COMMAND,
            "build",
            str(tree),
            "-o",
            str(tmp_path / "blob"),
            "--level",
            "6",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    time.sleep(0.3)
    build.send_signal(signal.SIGHUP)
    assert build.wait(timeout=60) == 0


@pytest.mark.parametrize("arguments", ["build {tree} -o - >&-", "build - -o {blob} <&-"])
def test_closed_standard_stream(tmp_path: Path, arguments: str) -> None:
    tree = tree_of(tmp_path / "tree", 10)
    line = '"$0" -c "import sys; from estargz.cli import main; sys.exit(main())" ' + arguments.format(
        tree=tree, blob=tmp_path / "blob"
    )
    ended = subprocess.run(["sh", "-c", line, sys.executable], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "is closed" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("content", [b"", os.urandom(3000)], ids=["empty", "noise"])
def test_unpack_of_what_is_no_layer(tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "blob").write_bytes(content)
    assert main(["unpack", str(tmp_path / "blob"), "-o", str(tmp_path / "tar")]) == 1
    assert "neither a compressed layer nor a tar" in capsys.readouterr().err
    assert not (tmp_path / "tar").exists()


def test_tar_that_ends_in_a_table(tmp_path: Path) -> None:
    """A blob made of an inflated blob: its input held a table as trailing data, and stopping there would lose the rest."""
    (tmp_path / "tar").write_bytes(plain_header(b"name") + bytes(1024))
    estargz.build(tmp_path / "tar", tmp_path / "blob")
    (tmp_path / "inflated").write_bytes(gzip.decompress((tmp_path / "blob").read_bytes()))
    estargz.build(tmp_path / "inflated", tmp_path / "nested")
    with pytest.raises(SourceError, match="estargz unpack"):
        estargz.build(tmp_path / "nested", tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("", {}),
        ("a\0b", {}),
        ("tree", {"lower": ""}),
        ("tree", {"overlay_lower": "tree"}),
        (io.StringIO("text"), {}),
    ],
)
def test_sources_that_are_none(tmp_path: Path, source: object, options: dict[str, object]) -> None:
    tree_of(tmp_path / "tree", 10)
    with pytest.raises(UsageError):
        estargz.build(str(tmp_path / "tree") if source == "tree" else source, io.BytesIO(), **options)  # type: ignore[arg-type]


def test_message_names_the_input(tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(os.urandom(2000))
    with pytest.raises(SourceError, match="noise"):
        estargz.build(tmp_path / "noise", io.BytesIO())
    with pytest.raises(BlobError, match="noise"):
        estargz.open(tmp_path / "noise")
