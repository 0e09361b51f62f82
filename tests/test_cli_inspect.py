"""The commands that read blobs, run as processes."""

from __future__ import annotations

import gzip
import json
import os
import signal
import stat
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import zstandard
from reference.blobs import digest, estargz, link, member, tar_of
from reference.peer import report, run

FILES = {"a": b"first\n", "d/b": b"second " * 3000, "d/empty": b""}


def device(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.devmajor, info.devminor = tarfile.CHRTYPE, 0o620, 5, 1
    return info


TAR = tar_of(("d/", b""), *FILES.items(), device("tty"), link("h", "a"), link("s", "../a", tarfile.SYMTYPE))
BLOB = estargz(TAR, chunk_size=9000)


@pytest.fixture
def blob(tmp_path: Path) -> Path:
    (tmp_path / "blob").write_bytes(BLOB)
    return tmp_path / "blob"


def estargz_command(*arguments: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", "import sys; from estargz.cli import main; sys.exit(main())"]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, timeout=60, check=False, **options)


def output(*arguments: object, **options: Any) -> str:
    done = estargz_command(*arguments, **options)
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout.decode()


def failure(*arguments: object, status: int = 1, **options: Any) -> str:
    done = estargz_command(*arguments, **options)
    assert (done.returncode, done.stdout) == (status, b"")
    message = done.stderr.decode()
    assert "Traceback" not in message
    assert "estargz: error: " in message
    return message


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- the program


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help(option: str) -> None:
    shown = output(option)
    for command in ("build", "cat", "info", "ls", "unpack", "verify"):
        assert f"\n  {command} " in shown


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from estargz.cli import main; main(['--help']);"
        "print([name for name in ('numpy', 'tqdm', 'isal', 'msgspec', 'zstandard') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", ["cat", "info", "ls", "unpack", "verify"])
def test_help_of_commands(command: str) -> None:
    assert f"Usage: estargz {command} " in output(command, "--help")


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["ls"], ["cat", "x"], ["ls", "--nonsense", "x"], ["unpack", "x"], ["verify", "--threads", "0", "x"]],
)
def test_wrong_usage(arguments: list[str]) -> None:
    failure(*arguments, status=2)


@pytest.mark.parametrize("command", [["ls"], ["info"], ["cat"], ["verify"], ["unpack", "-o", "-"]])
def test_missing_and_malformed_blobs(command: list[str], tmp_path: Path) -> None:
    rest = ["path"] if command == ["cat"] else []
    assert "nowhere: No such file or directory" in failure(*command, tmp_path / "nowhere", *rest)
    assert "is no regular file" in failure(*command, tmp_path, *rest)
    (tmp_path / "text").write_bytes(b"some text, not compressed, longer than a footer is" * 2)
    if command[0] != "unpack":
        assert "text: is no compressed layer, it has no eStargz footer" in failure(*command, tmp_path / "text", *rest)


def test_reader_that_goes_away(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(estargz(tar_of(*((f"file{i}", b"") for i in range(20_000)))))
    code = (
        f"{sys.executable} -c 'import sys; from estargz.cli import main; sys.exit(main())' ls {tmp_path}/blob | head -1"
    )
    done = subprocess.run(["sh", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


@pytest.mark.timeout(60)
def test_interrupt(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(gzip.compress(bytes(1 << 20)) * 4000)
    command = [sys.executable, "-c", "import sys; from estargz.cli import main; sys.exit(main())"]
    arguments = ["unpack", str(tmp_path / "blob"), "-o", str(tmp_path / "out")]
    with subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not _writes_to(process.pid, tmp_path):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
    assert names_in(tmp_path) == ["blob"]


def _writes_to(pid: int, folder: Path) -> bool:
    """Whether the process has a file open for writing in the folder."""
    for handle in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if handle.readlink().is_relative_to(folder) and handle.lstat().st_mode & stat.S_IWUSR:
                return True
        except FileNotFoundError:
            continue
    return False


# --- ls


def test_ls(blob: Path) -> None:
    assert output("ls", blob).splitlines() == [
        "drwxr-xr-x seven/0             0 2020-09-13 12:26 d/",
        "-rw-r--r-- seven/0             6 2020-09-13 12:26 a",
        "-rw-r--r-- seven/0         21000 2020-09-13 12:26 d/b",
        "-rw-r--r-- seven/0             0 2020-09-13 12:26 d/empty",
        "crw--w---- 0/0               5,1 1970-01-01 00:00 tty",
        "hrw-r--r-- 0/0                 0 1970-01-01 00:00 h link to a",
        "lrw-r--r-- 0/0                 0 1970-01-01 00:00 s -> ../a",
    ]


def test_ls_escapes_what_terminals_obey(tmp_path: Path) -> None:
    names = [
        "line\nbreak",
        "\x1b[2Jclear",
        "right\u202eleft",
        "back\\slash",
        "bell\x07",
        "del\x7f",
        "\x9bcsi",
        "tab\t",
        "ü 名",
    ]
    (tmp_path / "blob").write_bytes(
        estargz(tar_of(*((name, b"") for name in names), link("s", "\x1b[31m", tarfile.SYMTYPE)))
    )
    lines = output("ls", tmp_path / "blob").splitlines()
    assert [line.split(" ", 5)[-1].split("12:26 ")[-1] for line in lines[:-1]] == [
        "line\\nbreak",
        "\\x1b[2Jclear",
        "right\\u202eleft",
        "back\\\\slash",
        "bell\\x07",
        "del\\x7f",
        "\\x9bcsi",
        "tab\\t",
        "ü 名",
    ]
    assert lines[-1].endswith("s -> \\x1b[31m")


def test_ls_where_the_encoding_is_poor(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(estargz(tar_of(("名", b""))))
    assert output("ls", tmp_path / "blob", env=os.environ | {"PYTHONIOENCODING": "latin-1"}).endswith(" \\u540d\n")


def test_ls_json_is_the_toc(blob: Path, peer: Path) -> None:
    """Every line holds what the TOC's entry holds, under the same keys."""
    lines = [json.loads(line) for line in output("ls", "--json", blob).splitlines()]
    assert lines == [
        {key: value for key, value in entry.items() if value != 0}
        for entry in json.loads(run(peer, "toc", blob))["entries"]
    ]


# --- info


def test_info(blob: Path) -> None:
    facts = json.loads(output("info", "--json", "--digest", blob))
    assert facts["format"] == "estargz"
    assert (facts["size"], facts["digest"]) == (len(BLOB), digest(BLOB))
    assert facts["entries"] == {"dir": 1, "reg": 3, "char": 1, "hardlink": 1, "symlink": 1}
    assert (facts["chunks"], facts["payload_size"]) == (4, 21006)
    assert facts["overhead"] == facts["size"] - facts["toc_offset"]
    assert facts["landmark"] is None
    shown = output("info", blob)
    assert f"toc digest:      {facts['toc_digest']}\n" in shown
    assert "entries:         1 char, 1 dir, 1 hardlink, 3 reg, 1 symlink\n" in shown


@pytest.mark.parametrize(
    ("name", "mark"), [(".prefetch.landmark", "prefetch"), ("./.no.prefetch.landmark", "no-prefetch")]
)
def test_landmarks(tmp_path: Path, name: str, mark: str) -> None:
    (tmp_path / "blob").write_bytes(estargz(tar_of((name, b"\x0f"), ("d/.prefetch.landmark", b""))))
    assert json.loads(output("info", "--json", tmp_path / "blob"))["landmark"] == mark


# --- cat


@pytest.mark.parametrize("path", ["a", "./a", "/a", "d/../a", "h"])
def test_cat(blob: Path, path: str) -> None:
    assert output("cat", blob, path) == "first\n"


def test_cat_of_chunks(blob: Path) -> None:
    assert output("cat", blob, "d/b").encode() == FILES["d/b"]
    assert output("cat", blob, "d/empty") == ""


def test_cat_failures(blob: Path) -> None:
    assert "nope: no such entry in the TOC" in failure("cat", blob, "nope")
    assert "is a directory" in failure("cat", blob, "d")
    assert "TOC digest: expected" in failure("cat", "--toc-digest", digest(b""), blob, "a")
    assert "64 lower-case hexadecimal digits" in failure("cat", "--toc-digest", "x", blob, "a", status=2)


def test_cat_prints_nothing_unverified(tmp_path: Path) -> None:
    def edit(entries: list[dict[str, Any]]) -> None:
        entries[0]["digest"] = entries[0]["chunkDigest"] = digest(b"other")

    (tmp_path / "blob").write_bytes(estargz(tar_of(("f", b"bytes")), edit=edit))
    assert "expected" in failure("cat", tmp_path / "blob", "f")


# --- verify


def test_verify(blob: Path, peer: Path) -> None:
    judged = report(peer, "verify", blob)
    shown = output("verify", blob, "--toc-digest", judged["toc_digest"], "--diff-id", judged["diff_id"], "--threads", 2)
    assert shown.count(", as given") == 2
    assert f"TOC         {judged['toc_digest']}" in shown
    assert "7 in the TOC, each equal to the tar's" in shown
    assert "21006 bytes, 3 files, 4 chunks: every digest right" in shown
    facts = json.loads(output("verify", "--json", blob))
    assert {key: facts[key] for key in ("diff_id", "toc_digest", "size", "chunks", "files", "uncompressed_size")} == {
        key: judged[key] for key in ("diff_id", "toc_digest", "size", "chunks", "files", "uncompressed_size")
    }
    assert output("verify", blob).count("none given to compare with") == 2


def test_verify_failures(blob: Path, tmp_path: Path) -> None:
    assert "TOC digest: expected" in failure("verify", blob, "--toc-digest", digest(b""))
    assert "DiffID: expected" in failure("verify", blob, "--diff-id", digest(TAR))
    failure("verify", blob, "--diff-id", "md5:0", status=2)
    failure("verify", blob, "--toc-digest", digest(b"")[7:], status=2)
    damaged = bytearray(BLOB)
    damaged[12] ^= 4  # in the first member's deflate stream
    blob.write_bytes(damaged)
    failure("verify", blob)


@pytest.mark.parametrize(("kind", "pack"), [("gzip", member), ("zstd", zstandard.compress), ("plain", bytes)])
def test_verify_ordinary_layers(tmp_path: Path, kind: str, pack: Any) -> None:
    (tmp_path / "layer").write_bytes(pack(TAR))
    shown = output("verify", tmp_path / "layer", "--diff-id", digest(TAR))
    assert shown.startswith(f"format      {kind}, no eStargz")
    assert "has no eStargz footer" in failure("verify", tmp_path / "layer")


# --- unpack


@pytest.mark.parametrize("pack", [estargz, member, zstandard.compress, bytes])
def test_unpack(tmp_path: Path, pack: Any) -> None:
    (tmp_path / "layer").write_bytes(pack(TAR))
    assert output("unpack", tmp_path / "layer", "-o", tmp_path / "out.tar") == ""
    assert (tmp_path / "out.tar").read_bytes() == TAR
    assert names_in(tmp_path) == ["layer", "out.tar"]
    assert estargz_command("unpack", tmp_path / "layer", "-o", "-").stdout == TAR


def test_unpack_as_go_does(tmp_path: Path, peer: Path) -> None:
    (tmp_path / "in.tar").write_bytes(TAR)
    run(peer, "blob", "-how", "build", tmp_path / "in.tar", tmp_path / "blob")
    run(peer, "unpack", tmp_path / "blob", tmp_path / "go.tar")
    output("unpack", tmp_path / "blob", "-o", tmp_path / "ours.tar")
    assert (tmp_path / "ours.tar").read_bytes() == (tmp_path / "go.tar").read_bytes()


def test_unpack_leaves_the_old_file_alone_when_it_fails(tmp_path: Path) -> None:
    (tmp_path / "layer").write_bytes(member(TAR * 100)[:-9])
    (tmp_path / "out.tar").write_bytes(b"old")
    assert "ends too early" in failure("unpack", tmp_path / "layer", "-o", tmp_path / "out.tar")
    assert (tmp_path / "out.tar").read_bytes() == b"old"
    assert names_in(tmp_path) == ["layer", "out.tar"]


def test_unpack_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "layer").write_bytes(member(TAR))
    assert "nowhere" in failure("unpack", tmp_path / "layer", "-o", tmp_path / "nowhere" / "out.tar")
    if Path("/dev/full").exists():
        assert "No space left" in failure("unpack", tmp_path / "layer", "-o", "/dev/full")
