"""What decides the bytes: the option whose blobs are the same on every CPU, and how it is told which encoder made them."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import platform
import random
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, missing
from tars import END, blob_of, entry, judge, unpacked

import estargz
from estargz import _codec
from estargz.cli import main
from estargz.errors import UsageError
from estargz.image.variants import VariantKey
from estargz.options import Options, encoder
from estargz.writing.pool import Pool

pytestmark = pytest.mark.timeout(120)

PORTABLE = [{"level": 1, "portable": True}, {"level": 3, "portable": True}, {"level": 4}, {"level": 9}, {"level": 12}]


def many_files(count: int = 4000) -> bytes:
    """Names long and random enough for a table of contents of several pieces."""
    chance = random.Random(6)
    files = [entry(chance.randbytes(40).hex().encode(), chance.randbytes(chance.randrange(40))) for _ in range(count)]
    text = b"".join(b"%d bottles\n" % chance.randrange(99) for _ in range(90_000))
    return b"".join([*files, entry(b"text", text), entry(b"zeros", bytes(300_000))]) + END


# --- the option


@pytest.mark.parametrize("options", PORTABLE, ids=str)
def test_blobs_without_isal_are_what_go_and_gzip_read(options: dict[str, Any], peer: Path, tmp_path: Path) -> None:
    tar, blob = many_files(), tmp_path / "blob"
    layer = estargz.build(io.BytesIO(tar), blob, chunk_size=100_000, **options)
    judge(peer, blob, layer)
    assert unpacked(peer, blob) == tar
    assert (
        subprocess.run(["gzip", "-dc"], input=blob.read_bytes(), capture_output=True, check=True).stdout[: len(tar)]
        == tar
    )
    estargz.verify(blob, toc_digest=layer.toc_digest, diff_id=layer.diff_id)


def test_threads_and_memory_leave_the_bytes_alone() -> None:
    tar = many_files()
    ways: list[dict[str, Any]] = [{"threads": 1}, {"threads": 8, "memory": 30 << 20}, {"pool": Pool(2)}]
    for options in (PORTABLE[0], PORTABLE[3]):
        assert len({blob_of(tar, chunk_size=100_000, **options, **way)[0].digest for way in ways}) == 1


def test_one_pool_makes_blobs_of_both_kinds() -> None:
    """A seat's compressor is not taken for one of the same level and another library."""
    tar, pool = many_files(50), Pool(1)
    made = [blob_of(tar, level=2, portable=portable, pool=pool)[0].digest for portable in (False, True, False)]
    assert made[0] == made[2] != made[1]
    assert made[1] == blob_of(tar, level=2, portable=True)[0].digest


@pytest.mark.parametrize("compression", ["estargz", "gzip"])
def test_portable_begins_at_level_1(compression: str) -> None:
    tar = many_files(50)
    assert blob_of(tar, compression=compression, portable=True) == blob_of(
        tar, compression=compression, portable=True, level=1
    )
    with pytest.raises(UsageError, match=f"the level of portable {compression} must be a whole number from 1 to 12"):
        Options(compression=compression, level=0, portable=True)


@pytest.mark.parametrize("options", [{"compression": "zstd"}, {"compression": "uncompressed"}, {"level": 4}], ids=str)
def test_what_is_portable_anyway_stays_as_it_is(options: dict[str, Any]) -> None:
    tar = many_files(200)
    assert blob_of(tar, **options) == blob_of(tar, portable=True, **options)
    key = VariantKey.of(f"sha256:{'0' * 64}", Options(**options))
    assert key == VariantKey.of(f"sha256:{'0' * 64}", Options(portable=True, **options))


def test_the_commands_take_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tar").write_bytes(many_files(50))
    wanted = estargz.build(tmp_path / "tar", io.BytesIO(), portable=True).digest
    assert main(["build", str(tmp_path / "tar"), "-o", str(tmp_path / "blob"), "--portable", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["digest"] == wanted
    lines = [f"type=oci,tar=false,dest={tmp_path / kind},compression={kind}" for kind in ("estargz", "gzip")]
    for line in lines:
        assert main(["image", "build", "--layer", str(tmp_path / "tar"), "--portable", "--output", line]) == 0
    capsys.readouterr()
    names = [f"oci:{tmp_path / name}" for name in ("gzip", "there")]
    assert main(["convert", *names, "--compression", "estargz", "--portable", "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["images"][0]["layers"]
    assert [layer["digest"] for layer in layers] == [wanted]
    assert (tmp_path / "estargz" / "blobs" / "sha256" / wanted.removeprefix("sha256:")).exists()


# --- who made the bytes


def test_a_layer_names_its_encoder(tmp_path: Path) -> None:
    tar = many_files(50)
    asked: list[dict[str, Any]] = [{}, {"level": 3}, {"level": 9}, {"portable": True}, {"compression": "zstd"}]
    for options in asked:
        assert blob_of(tar, **options)[0].encoder == encoder(options.pop("compression", "estargz"), **options)
    with estargz.Writer(tmp_path / "blob", portable=True) as writer:
        writer.write(tar)
    assert writer.layer.encoder == encoder("estargz", portable=True) != encoder("estargz", 1)


def test_the_digits_are_of_what_is_made_of_the_sample() -> None:
    for level in range(13):
        for portable in (False, True) if level else (False,):
            member = _codec.gzip_member(_codec.sample(), level, portable)
            assert gzip.decompress(member) == _codec.sample()
            digits = hashlib.sha256(member).hexdigest()[:8]
            assert encoder("gzip", level, portable=portable).endswith(f"/{digits}")


def test_another_encoder_makes_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    tar = f"sha256:{'0' * 64}"
    assert VariantKey.of(tar, Options(level=2)) != VariantKey.of(tar, Options(level=2, portable=True))
    before = VariantKey.of(tar, Options())
    monkeypatch.setattr(_codec, "encoder", lambda *asked: "isal-2.30.0/00000000")  # of another CPU
    assert VariantKey.of(tar, Options()) != before


def test_info_shows_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["version"] == estargz.__version__
    assert [row["level"] for row in facts["levels"] if row["depends_on_cpu"]] == [0, 1, 2, 3]
    assert facts["levels"][3]["portable_encoder"] == encoder("gzip", 3, portable=True)
    loaded = Path("/proc/self/maps").read_text()
    assert len(facts["libraries"]) == 3
    for library in facts["libraries"].values():
        assert library["file"] in loaded
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert all(row["encoder"] in shown for row in facts["levels"])
    assert shown.count("depends on the CPU  libdeflate-") == 3  # whose bytes do, not the portable ones beside them
    assert f"of class {facts['cpu']}" in shown
    assert main(["info", "--digest"]) == 2
    assert "name one" in capsys.readouterr().err


# --- pieces of a member


# Deflates standard input, cut into pieces of argv[2] bytes, at level argv[1], and joins them.
PIECES = r"""
#include <libdeflate.h>
#include <stdio.h>
#include <stdlib.h>
#include "deflate_piece.h"

int main(int argc, char **argv) {
    size_t size = strtoul(argv[2], NULL, 10), room = 2 * size + 1024;
    uint8_t *in = malloc(size + 1), *out = malloc(room);
    est_bits *bits = malloc(sizeof(*bits));
    struct libdeflate_compressor *deflater = libdeflate_alloc_compressor(atoi(argv[1]));
    size_t got = fread(in, 1, size, stdin);
    for (int more = 1; more;) {
        int next = getchar();
        more = next != EOF;
        size_t made = libdeflate_deflate_compress(deflater, in, got, out, room);
        if (!made || est_open_end(bits, out, made - 1, room)) return 3;     /* cut short: no whole stream */
        if (more && !(made = est_open_end(bits, out, made, room))) return 4;
        if (more && est_open_end(bits, out, made, room)) return 5;          /* has no last block any more */
        fwrite(out, 1, made, stdout);
        if (more) in[0] = (uint8_t)next, got = 1 + fread(in + 1, 1, size - 1, stdin);
    }
    libdeflate_free_compressor(deflater);
    free(in), free(out), free(bits);
    return argc != 3;
}
"""


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("cc") is None or shutil.which("pkg-config") is None:
        missing("there is no C compiler or no pkg-config")
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "pieces.c").write_text(PIECES)
    found = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "libdeflate"], capture_output=True, text=True, check=True
    )
    flags = ["-O1", "-g", "-fsanitize=undefined", "-fno-sanitize-recover=all", "-I", REPOSITORY / "ext" / "estargz"]
    command = ["cc", *flags, folder / "pieces.c", "-o", folder / "pieces", *found.stdout.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "pieces"


def contents() -> dict[str, bytes]:
    chance = random.Random(11)
    letters = bytes(chance.choices(b"etaoin shrdlu", k=120_000))
    return {
        "letters": letters,
        "noise": chance.randbytes(70_000),
        "zeros": bytes(120_000),
        "table": json.dumps(
            [{"name": f"usr/lib/{i}", "digest": chance.randbytes(20).hex()} for i in range(2000)]
        ).encode(),
        "mixed": letters[:30_000] + chance.randbytes(30_000) + bytes(30_000),
        "a byte": b"a",
        "nothing": b"",
    }


@pytest.mark.parametrize("name", contents())
def test_pieces_join_to_one_stream(name: str, pieces: Path) -> None:
    """zlib is the judge. Pieces of few bytes end at each of a byte's bits, and have fixed codes."""
    data = contents()[name]
    for level in (0, 1, 2, 5, 9, 12):
        for size in (1, 3, 700, 25_000, 1 << 18):
            part = data[: size * 150]
            done = subprocess.run([pieces, str(level), str(size)], input=part, capture_output=True, check=False)
            assert done.returncode == 0, (level, size, done.returncode, done.stderr)
            stream = zlib.decompressobj(wbits=-15)
            assert stream.decompress(done.stdout) == part
            assert stream.eof
            assert stream.unused_data == b""


# --- other CPUs


def test_another_cpu_makes_the_same_of_what_is_portable(tmp_path: Path) -> None:
    """tests/torture/cpus.py has more of them. This one has no SSE 4.2, so ISA-L makes other bytes, and the encoder says so."""
    if platform.machine() != "x86_64":
        pytest.skip("this CPU is none of x86-64")
    emulator = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
    if emulator is None:
        missing("there is no qemu for programs of x86-64")
    (tmp_path / "tar").write_bytes(many_files(100))
    probe = [sys.executable, str(REPOSITORY / "tests" / "torture" / "cpu_probe.py"), str(tmp_path / "tar")]
    probe += ["estargz:2,4", "estargz:1:portable", "gzip:1,2:portable", "zstd:3"]
    other, here = (
        json.loads(subprocess.run([*emulated, *probe], capture_output=True, check=True, timeout=100).stdout)
        for emulated in ([emulator, "-cpu", "core2duo"], [])
    )
    assert all(made["right"] for made in (*here.values(), *other.values()))
    assert {name for name in here if here[name] != other[name]} == {"estargz 2"}
    assert here["estargz 2"]["encoder"] != other["estargz 2"]["encoder"]
