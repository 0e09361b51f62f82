"""Times of a tar set to an epoch: against BuildKit's converter, Python's tarfile, GNU tar and the package's own parser."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import subprocess
import tarfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import missing
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.peer import run
from reference.tar_headers import GNU, V7, meta, padded, pax, plain_header, raw_header, record, seal
from tars import END, base256, blob_of, entry, everything

from estargz._tar import Entry, parse
from estargz.errors import SourceError, TarError, UsageError
from estargz.writing.timestamps import ClampedTar

EPOCH = 1_600_000_000
LATER = EPOCH + 100_000_000
MIB = 1 << 20
BASIC_RECORDS = {"mtime", "atime", "ctime", "path", "linkpath", "uname", "gname", "uid", "gid", "size"}


def clamped(data: bytes, epoch: int = EPOCH) -> bytes:
    return ClampedTar(io.BytesIO(data), epoch).read(-1)


def octal(value: int) -> bytes:
    return b"%011o\0" % value


def records_at(mtime: bytes, *records: tuple[bytes, bytes], type: bytes = b"x") -> bytes:
    """An extended header whose own time is given too."""
    payload = b"".join(record(*pair) for pair in records)
    return plain_header(b"meta", type=type, size=octal(len(payload)), mtime=mtime) + padded(payload)


def members(data: bytes) -> list[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8", errors="surrogateescape") as tar:
        return tar.getmembers()


# ------------------------------------------------------------------------------------------------------------- inputs

TIMES = [0, 5, EPOCH - 1, EPOCH - 0.5, EPOCH, EPOCH + 0.25, EPOCH + 1, LATER, LATER + 0.125, 1 << 33, (1 << 36) + 0.5]


def python_tar(format: int, times: list[float]) -> bytes:
    """Every type of entry at every time that the format can hold, with long names, owners and attributes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for number, time in enumerate(times):
            for name, kind, payload in (
                ("file", tarfile.REGTYPE, b"hello"),
                ("dir", tarfile.DIRTYPE, b""),
                ("p" * 90 + "/" + "n" * 80, tarfile.REGTYPE, b"x" * 513),
                ("empty", tarfile.REGTYPE, b""),
                ("symlink", tarfile.SYMTYPE, b""),
                ("hardlink", tarfile.LNKTYPE, b""),
                ("char", tarfile.CHRTYPE, b""),
                ("block", tarfile.BLKTYPE, b""),
                ("fifo", tarfile.FIFOTYPE, b""),
            ):
                info = tarfile.TarInfo(f"{number}/{name}")
                info.type, info.size, info.mtime, info.mode = kind, len(payload), time, 0o640
                info.uid, info.gid, info.uname, info.gname = 1000, 100, "user", "group"
                if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                    info.linkname = "t" * (99 if format == tarfile.USTAR_FORMAT else 150)
                if kind in (tarfile.CHRTYPE, tarfile.BLKTYPE):
                    info.devmajor, info.devminor = 8, 17
                if format == tarfile.PAX_FORMAT and number % 2:
                    info.pax_headers = {"atime": str(time + 3), "ctime": str(time - 3.5), "SCHILY.xattr.user.a": "1\n"}
                tar.addfile(info, io.BytesIO(payload))
    return out.getvalue()


def gnu_times(name: bytes, mtime: int, atime: int, ctime: int) -> bytes:
    fields = {"gnu_atime": octal(atime), "gnu_ctime": octal(ctime)} if atime else {}
    return plain_header(name, magic=GNU, mtime=octal(mtime), **fields)


INPUTS: dict[str, bytes] = {
    "ustar": python_tar(tarfile.USTAR_FORMAT, [int(time) for time in TIMES if time < 1 << 33]),
    "gnu": python_tar(tarfile.GNU_FORMAT, [-(1 << 33), -7, *map(int, TIMES)]),
    "pax": python_tar(tarfile.PAX_FORMAT, [-(1 << 33), -7.25, -0.5, *TIMES]),
    "attributes": everything() + END,
    "gnu times": b"".join(
        gnu_times(b"%d%d%d" % (a, b, c), *(EPOCH + n * 50 for n in (a, b, c)))
        for a in (-1, 0, 1)
        for b in (-1, 0, 1)
        for c in (-1, 0, 1)
    )
    + gnu_times(b"none", LATER, 0, 0)
    + plain_header(b"base256", magic=GNU, gnu_atime=base256(LATER, 12), gnu_ctime=base256(-5, 12), mtime=base256(9, 12))
    + END,
    "base-256 size": entry(b"file", b"x" * 700, magic=GNU, size=base256(700, 12), mtime=base256(1 << 40, 12)) + END,
    "records": b"".join(
        entry(b"file%d" % number, b"x" * 9, *records, mtime=octal(EPOCH - number))
        for number, records in enumerate(
            [
                [(b"mtime", b"%d.000000001" % EPOCH)],
                [(b"mtime", b"%d.999999999" % (EPOCH - 1)), (b"atime", b"%d" % LATER)],
                [(b"ctime", b"%d.75" % LATER), (b"comment", b"c" * 600), (b"VENDOR.mtime", b"%d" % LATER)],
                [(b"mtime", b"1"), (b"mtime", b"%d" % LATER)],
                [(b"mtime", b"%d" % LATER), (b"mtime", b"")],
                [(b"mtime", b"no time"), (b"mtime", b"+%d." % LATER)],
                [(b"mtime", b"-1.5"), (b"atime", b"-0.25"), (b"ctime", b"0000%d" % LATER)],
                [
                    (b"size", b"9"),
                    (b"path", b"n" * 300),
                    (b"mtime", b"%d.5" % LATER),
                    (b"SCHILY.xattr.user.b", b"\xff\n="),
                ],
            ]
        )
    )
    + END,
    "two extended headers": pax((b"mtime", b"bad"), (b"path", b"no"))
    + meta(b"long\0", b"L")
    + entry(b"file", b"abc", (b"mtime", b"%d" % LATER))
    + END,
    "directory of old": plain_header(b"dir/", type=b"\0", size=b"7", mtime=octal(LATER)) + entry(b"file", b"abc") + END,
    "no end": entry(b"file", b"abc", mtime=octal(LATER)),
    "empty": b"",
}


@pytest.fixture(params=INPUTS.values(), ids=INPUTS.keys())
def tar(request) -> bytes:
    return request.param


# ----------------------------------------------------------------------------------------------------------- BuildKit


def listed(peer: Path, tar: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run(peer, "tarlist", tar).splitlines()]


def compared(found: dict[str, Any], rounded: bool) -> dict[str, Any]:
    """An entry as Go reads it. What Go takes for malformed, BuildKit leaves without fractions and further times."""
    kept = {key: value for key, value in found.items() if key not in ("records", "format")}
    kept["records"] = {key: value for key, value in found.get("records", {}).items() if key not in BASIC_RECORDS}
    if rounded:
        kept["modtime"] += kept.pop("modtime_nanos", 0) >= 500_000_000
        kept.pop("accesstime", None), kept.pop("changetime", None)
    return kept


def converted(peer: Path, source: Path, epoch: int, out: Path) -> bool:
    """Whether BuildKit could convert it."""
    command = [peer, "clamp", "-epoch", str(epoch), source, out]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def agree_with_buildkit(peer: Path, folder: Path, data: bytes, epoch: int = EPOCH) -> None:
    source, ours, theirs = folder / "in.tar", folder / "ours.tar", folder / "theirs.tar"
    source.write_bytes(data)
    assert converted(peer, source, epoch, theirs)
    ours.write_bytes(clamped(data, epoch))
    unknown = [found["format"] == "<unknown>" for found in listed(peer, source)]
    assert [compared(*pair) for pair in zip(listed(peer, ours), unknown, strict=True)] == [
        compared(*pair) for pair in zip(listed(peer, theirs), unknown, strict=True)
    ]


@pytest.mark.parametrize("epoch", [0, 7, EPOCH, (1 << 33) - 1])
def test_the_times_of_buildkit(peer, scratch, tar, epoch):
    agree_with_buildkit(peer, scratch, tar, epoch)


def test_buildkit_changes_something(peer, scratch):
    """Which the tests above would not notice."""
    (scratch / "in.tar").write_bytes(INPUTS["pax"])
    assert converted(peer, scratch / "in.tar", EPOCH, scratch / "out.tar")
    before, after = (listed(peer, scratch / name) for name in ("in.tar", "out.tar"))
    assert max(found["modtime"] for found in before) > max(found["modtime"] for found in after) == EPOCH
    assert {found.get("accesstime", "") for found in after} > {f"{EPOCH}.000000000"}


# ------------------------------------------------------------------------------------------------------------ tarfile


def settled(info: tarfile.TarInfo, epoch: int | None) -> dict[str, Any]:
    """All that tarfile knows of an entry, times not later than the epoch."""
    kept = {name: getattr(info, name) for name in ("name", "mode", "uid", "gid", "size", "type", "linkname")}
    kept |= {name: getattr(info, name) for name in ("uname", "gname", "devmajor", "devminor")}
    times = {"mtime": info.mtime}
    records = dict(info.pax_headers)
    for key in ("mtime", "atime", "ctime"):
        if key in records:
            times["record of " + key] = float(records.pop(key))
    if epoch is not None:
        times = {key: min(time, epoch) for key, time in times.items()}
    return kept | times | {"records": records}


@pytest.mark.parametrize("epoch", [-(1 << 40), -1, 0, EPOCH, 1 << 33, 1 << 40, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("format", ["ustar", "gnu", "pax", "attributes", "base-256 size"])
def test_entries_of_tarfile(format, epoch):
    data = INPUTS[format]
    out = clamped(data, epoch)
    assert [settled(info, None) for info in members(out)] == [settled(info, epoch) for info in members(data)]
    with tarfile.open(fileobj=io.BytesIO(data)) as before, tarfile.open(fileobj=io.BytesIO(out)) as after:
        for old, new in zip(before, after, strict=True):
            if old.isreg():
                assert before.extractfile(old).read() == after.extractfile(new).read()


def test_global_records_apply_to_what_follows():
    records = meta(record(b"mtime", b"%d.5" % LATER) + record(b"comment", b"c"), b"g")
    data = records + entry(b"first", b"abc") + entry(b"second", b"", (b"mtime", b"3")) + END
    out = clamped(data)
    assert [info.mtime for info in members(data)] == [LATER + 0.5, 3]
    assert [info.mtime for info in members(out)] == [EPOCH, 3]
    assert members(out)[0].pax_headers == {"mtime": str(EPOCH), "comment": "c"}


def test_an_extended_header_outlasts_a_global_one():
    data = pax((b"size", b"600")) + meta(record(b"comment", b"c"), b"g") + plain_header(b"a") + bytes(1024)
    data += plain_header(b"b", mtime=octal(LATER)) + END
    assert [(info.name, info.size, info.mtime) for info in members(clamped(data))] == [
        ("a", 600, min(members(data)[0].mtime, EPOCH)),
        ("b", 0, EPOCH),
    ]


# ------------------------------------------------------------------------------------------------------------ GNU tar


@pytest.fixture(scope="module")
def gnu_tar() -> str:
    tar = shutil.which("tar")
    if tar is None or "GNU tar" not in subprocess.run([tar, "--version"], capture_output=True, text=True).stdout:
        missing("GNU tar is not installed")
    assert tar is not None
    return tar


@pytest.fixture
def tree(scratch: Path) -> Path:
    root = scratch / "tree"
    (root / ("d" * 60) / ("e" * 60)).mkdir(parents=True)
    (root / ("d" * 60) / ("e" * 60) / "deep").write_bytes(b"z" * 700)
    (root / "file").write_bytes(b"x" * 1000)
    (root / "é").write_bytes(b"")
    (root / "symlink").symlink_to("t" * 80)
    os.link(root / "file", root / "hardlink")
    os.mkfifo(root / "fifo")
    with contextlib.suppress(OSError):
        os.setxattr(root / "file", "user.key", b"value")
    os.utime(root / "file", ns=(EPOCH * 10**9 + 1, LATER * 10**9 + 123456789))
    os.utime(root / "é", ns=(LATER * 10**9 + 5, EPOCH * 10**9 - 1))
    return root


@pytest.fixture(params=["v7", "oldgnu", "gnu", "ustar", "posix", "incremental", "attributes"])
def tar_of_tree(request, gnu_tar, tree) -> bytes:
    """As GNU tar writes it. Only for an incremental dump does it fill the times of access and change in its own format."""
    out = tree.parent / "tree.tar"
    options = {"incremental": ["--format=gnu", f"--listed-incremental={out}.snar"], "attributes": ["--xattrs"]}
    done = subprocess.run(
        [
            gnu_tar,
            *options.get(request.param, [f"--format={request.param}"]),
            "--sort=name",
            "-cf",
            out,
            "-C",
            tree,
            ".",
        ],
        capture_output=True,
    )
    assert request.param == "v7" or done.returncode == 0, done.stderr  # which has no fifos
    return out.read_bytes()


def test_tars_of_gnu_tar(peer, scratch, gnu_tar, tar_of_tree):
    out = clamped(tar_of_tree)
    listings = [
        subprocess.run(
            [gnu_tar, "--full-time", "--utc", "-tvf", "-"], input=data, capture_output=True, check=True
        ).stdout
        for data in (tar_of_tree, out)
    ]
    before, after = ([line.split(maxsplit=5) for line in listing.decode().splitlines()] for listing in listings)
    epoch = ["2020-09-13", "12:26:40"]
    assert [[*row[:3], *min(row[3:5], epoch), *row[5:]] for row in before] == after
    assert epoch in [row[3:5] for row in after] != [row[3:5] for row in before]
    agree_with_buildkit(peer, scratch, tar_of_tree)


# ------------------------------------------------------------------------------------------------------ byte for byte


def blank(data: bytes) -> bytes:
    """A tar without PAX records, its times and checksums made alike."""
    blanked = bytearray(data)
    for info in members(data):
        for at in (info.offset, info.offset_data - 512):
            blanked[at + 136 : at + 156] = bytes(20)
            if data[at + 257 : at + 265] == GNU:
                blanked[at + 345 : at + 369] = bytes(24)
    return bytes(blanked)


@pytest.mark.parametrize("name", ["ustar", "gnu", "gnu times", "base-256 size", "no end", "directory of old"])
def test_nothing_else_changes(name):
    data, out = INPUTS[name], clamped(INPUTS[name])
    assert data != out
    assert blank(data) == blank(out)


def test_without_later_times_all_bytes_stay(tar):
    assert clamped(tar, 1 << 40) == tar


def test_a_second_time_changes_nothing(tar):
    once = clamped(tar)
    assert clamped(once) == once


PLAIN = plain_header(mtime=octal(1))
ODD = {
    "records with odd lengths": plain_header(b"m", type=b"x", size=octal(19), mtime=octal(1))
    + padded(b"+12 mtime=1\n007 a=\n")
    + PLAIN,
    "garbage behind records": records_at(octal(1), (b"mtime", b"2"))[:-9] + b"\0garbage\0" + PLAIN,
    "garbage behind a payload": plain_header(size=octal(3), mtime=octal(1)) + b"abcgarbage".ljust(512, b"!") + END,
    "garbage behind the end": PLAIN + END + b"garbage" * 200,
    "more zeros": PLAIN + bytes(10240),
    "one zero block": PLAIN + bytes(512),
    "only an end": END,
    "ends in padding": plain_header(size=octal(3), mtime=octal(1)) + b"abc",
    "signed checksum": raw_header(signed=True, name=b"\xff\xfe", mtime=octal(1), size=octal(0), type=b"0"),
    "only a global header": records_at(octal(1), (b"comment", b"c"), type=b"g") + END,
    "negative size of a directory": plain_header(b"d", type=b"5", size=base256(-512, 12), mtime=octal(1)) + PLAIN,
    "slash behind a file": plain_header(b"f/", size=octal(3), mtime=octal(1)) + padded(b"abc") + PLAIN,
    "spaces": plain_header(mtime=b"         17 ", size=b" 0 "),
    "types of others": plain_header(type=b"7", size=octal(3), mtime=octal(1)) + padded(b"abc") + PLAIN + END,
    "prefix over times": plain_header(b"n", magic=GNU, prefix=b"prefix/dir", mtime=octal(1)) + END,
}


@pytest.mark.parametrize("data", ODD.values(), ids=ODD.keys())
def test_odd_tars_pass(data):
    assert clamped(data) == data


def test_headers_of_extended_headers_too():
    def headers(time: int) -> bytes:
        kinds = [b"x", b"g", b"L", b"K", b"0"]
        return b"".join(plain_header(b"n", type=kind, mtime=octal(time), size=octal(0)) for kind in kinds)

    assert clamped(headers(LATER)) == headers(EPOCH)


@pytest.mark.parametrize("epoch", [0o17, 17])
def test_a_time_that_is_not_later_keeps_its_form(epoch):
    data = records_at(b"  17  ", (b"mtime", b"+15.0")) + plain_header(mtime=b" 00017")
    assert clamped(data, epoch) == data


def test_extended_headers_concern_one_entry():
    """Which entries have a payload depends on it: a directory of old is told by the end of its name."""
    file, old = plain_header(b"f", size=octal(600)) + bytes(1024), plain_header(b"f", type=b"\0", size=octal(3))
    data = pax((b"size", b"3")) + plain_header() + padded(b"abc") + file
    data += pax((b"path", b"d/")) + old + old + padded(b"abc")
    data += meta(b"d/\0", b"L") + old + old + padded(b"abc")
    data += meta(b"f\0", b"L") + pax((b"path", b"d/")) + old + padded(b"abc")
    data += pax((b"path", b"f")) + meta(b"d/\0", b"L") + old + plain_header(b"last") + END
    names = [b"file", b"f", b"d/", b"f", b"d/", b"f", b"f", b"d/", b"last"]
    assert [(found.name, found.mtime_s) for found in parse(clamped(data))] == [(name, EPOCH) for name in names]


def test_times_of_schilys_format():
    fields = {"prefix": b"p" * 131, "mtime": octal(5), "star_trailer": b"tar\0"}
    data = plain_header(b"n", star_atime=octal(LATER), star_ctime=octal(LATER), **fields)
    assert clamped(data) == plain_header(b"n", star_atime=octal(EPOCH), star_ctime=octal(EPOCH), **fields)
    assert clamped(data, 1) == plain_header(
        b"n", star_atime=octal(1), star_ctime=octal(1), **fields | {"mtime": octal(1)}
    )


@pytest.mark.parametrize(
    ("magic", "prefix"), [(V7, b"77777777777\0"), (GNU, b"77777777777/x"), (b"ustar\x0000", b"7" * 155)]
)
def test_no_times_where_a_prefix_is(magic, prefix):
    data = plain_header(magic=magic, prefix=prefix, mtime=octal(5))
    assert clamped(data) == data


@pytest.mark.parametrize(
    ("epoch", "field"),
    [
        (0, octal(0)),
        (8**11 - 1, b"77777777777\0"),
        (8**11, base256(8**11, 12)),
        (-1, b"\xff" * 12),
        (-(2**63), b"\xff" * 4 + b"\x80" + bytes(7)),
    ],
)
def test_how_the_epoch_is_written(epoch, field):
    later = base256(2**63 - 1, 12)
    assert clamped(plain_header(mtime=later), epoch) == plain_header(mtime=field)


# --------------------------------------------------------------------------------------------------------- PAX records


@pytest.mark.parametrize(
    ("time", "epoch", "after"),
    [
        (b"100", 100, b"100"),
        (b"100.", 100, b"100."),
        (b"100.000", 100, b"100.000"),
        (b"100.0000000000001", 100, b"100"),
        (b"99.9999999999999", 100, b"99.9999999999999"),
        (b"+101", 100, b"100"),
        (b"000000000000000000000000101.5", 100, b"100"),
        (b"-0", 0, b"-0"),
        (b"-0.5", 0, b"-0.5"),
        (b"-0.5", -1, b"-1"),
        (b"-1.5", -1, b"-1.5"),
        (b"-1.5", -2, b"-2"),
        (b"-2.0", -2, b"-2.0"),
        (b"9223372036854775807", 2**63 - 1, b"9223372036854775807"),
        (b"9223372036854775807.5", 2**63 - 1, b"9223372036854775807"),
        (b"5", -(2**63), b"-9223372036854775808"),
        (b"-9223372036854775808", -(2**63), b"-9223372036854775808"),
        (b"", 0, b""),
    ],
)
@pytest.mark.parametrize("key", [b"mtime", b"atime", b"ctime"])
def test_records(key, time, epoch, after):
    low = base256(-(2**63), 12)
    others = (b"comment", b"c"), (b"SCHILY.xattr.k", b"\0=\n")
    before, expected = (
        records_at(low, others[0], (key, text), others[1]) + plain_header(mtime=low) for text in (time, after)
    )
    assert clamped(before, epoch) == expected


def test_records_that_change_their_length():
    """Across the places where a length gets another digit, or the records another block."""
    low = base256(-(10**17), 12)

    def made(length: int, time: bytes) -> bytes:
        return records_at(low, (b"comment", b"c" * length), (b"mtime", time)) + plain_header(mtime=low) + END

    for length in (*range(60, 110), *range(470, 530), *range(960, 1060)):
        assert clamped(made(length, b"1700000000.123456789"), 1) == made(length, b"1")
        assert clamped(made(length, b"1"), -(10**17)) == made(length, b"-1" + b"0" * 17)


@settings(deadline=None)
@given(st.integers(1, 130), st.integers(-(10**18), 10**18))
def test_the_length_of_a_record(digits, epoch):
    low = base256(-(2**63), 12)
    long, short = b"%d.%s" % (10**18 + 1, b"5" * digits), b"%d" % epoch
    before, after = (records_at(low, (b"atime", time)) + plain_header(mtime=low) for time in (long, short))
    assert clamped(before, epoch) == after


# --------------------------------------------------------------------------------------------------------------- reads


class Dribble:
    """A source that gives less than it is asked for."""

    name = "dribble"

    def __init__(self, data: bytes, sizes: Iterator[int]) -> None:
        self._file = io.BytesIO(data)
        self._sizes = sizes

    def read(self, size: int) -> bytes:
        return self._file.read(min(size, next(self._sizes)))


@pytest.mark.parametrize("seed", range(5))
def test_reads_of_any_size(tar, seed):
    chance = random.Random(seed)
    sizes = iter(lambda: chance.choice([1, 7, 511, 512, 513, 3000, 1 << 20]), None)
    source = ClampedTar(Dribble(tar, sizes), EPOCH)
    parts = []
    while part := source.read(wanted := chance.choice([1, 100, 511, 512, 513, 10_000, 100_000])):
        parts.append(part)
        assert len(part) <= wanted
    assert all(len(part) >= 1 for part in parts)
    assert b"".join(parts) == clamped(tar)
    assert source.read(1) == source.read(-1) == b""


def test_reads_are_whole():
    source = ClampedTar(Dribble(INPUTS["pax"], iter(lambda: 100, None)), EPOCH)
    assert source.read(0) == b""
    assert len(source.read(5000)) == 5000
    assert source.name == "dribble" and ClampedTar(io.BytesIO(), 0).name == "input"


@pytest.mark.parametrize("name", ["ustar", "attributes", "records"])
def test_layers_are_built_of_it(name):
    source = ClampedTar(io.BytesIO(INPUTS[name]), EPOCH)
    assert blob_of(source, compression="uncompressed")[1] == clamped(INPUTS[name])


class Endless:
    """A header and zeros."""

    def __init__(self, header: bytes) -> None:
        self._header = header

    def read(self, size: int) -> bytes:
        given, self._header = self._header or bytes(size), b""
        return given


def test_memory_stays_flat():
    source = ClampedTar(Endless(plain_header(b"large", size=base256(1 << 40, 12), mtime=octal(LATER))), EPOCH)
    tracemalloc.start()
    try:
        for size in (100, 1 << 16, MIB) * 20:
            assert len(source.read(size)) == size
        assert tracemalloc.get_traced_memory()[1] < 8 * MIB
    finally:
        tracemalloc.stop()


# -------------------------------------------------------------------------------------------------------------- errors

FRAGMENTS = {
    "checksum": "bad header checksum",
    "number": "bad number",
    "sparse": "sparse entry",
    "pax": "malformed PAX record",
    "meta_size": "extended header over 1 MiB",
    "truncated": "ends too early",
    "lone_zero": "single zero block",
    "dangling": "without an entry",
}
GOOD = plain_header(b"good", size=octal(3)) + padded(b"abc")
MALFORMED = [
    ("checksum", b"culprit", 1024, plain_header(b"culprit", checksum=b"000001\0 ")),
    ("checksum", b"culprit", 1024, plain_header(b"culprit", checksum=b"no sum")),
    ("number", b"culprit", 1024, plain_header(b"culprit", mtime=b"12x")),
    ("number", b"culprit", 1024, plain_header(b"culprit", size=b"1 2")),
    ("number", b"culprit", 1024, plain_header(b"culprit", size=base256(-1, 12))),
    ("number", b"culprit", 1024, plain_header(b"culprit", size=base256((1 << 62) + 1, 12))),
    ("number", b"culprit", 1024, plain_header(b"culprit", mtime=b"\x80" + b"\1" * 11)),
    ("number", b"p/culprit", 1024, plain_header(b"culprit", prefix=b"p", star_atime=b"x", star_trailer=b"tar\0")),
    ("number", b"culprit", 2048, pax((b"size", b"-5")) + plain_header(b"culprit")),
    ("number", b"meta", 1024, plain_header(b"meta", type=b"x", size=base256(-512, 12))),
    ("sparse", b"culprit", 1024, plain_header(b"culprit", type=b"S", magic=GNU)),
    ("number", b"prefix/culprit", 1024, plain_header(b"culprit", magic=GNU, prefix=b"prefix", mtime=b"x")),
    ("number", b"culprit", 1024, plain_header(b"culprit", magic=GNU, prefix=b"pr\xc3\xa9fix", mtime=b"x")),
    ("pax", b"meta", 1536, meta(b"5 a=b\n")),
    ("pax", b"meta", 1536, meta(b"6 a=bX")),
    ("pax", b"meta", 1536, meta(record(b"a", b"b") + b"nospace")),
    ("pax", b"meta", 1536, meta(b"99999999999999999999 a=b\n")),
    ("pax", b"meta", 1536, meta(b"20 a=b\n13 mtime=5\n")),
    ("pax", b"meta", 1536, meta(b"6 ab\n\n", b"g")),
    ("pax", b"long", 2048, pax((b"mtime", b"1e5"), (b"path", b"long")) + plain_header()),
    ("pax", b"culprit", 2048, pax((b"atime", b"1.5x")) + plain_header(b"culprit")),
    ("pax", b"culprit", 2048, pax((b"ctime", b"9223372036854775808")) + plain_header(b"culprit")),
    ("pax", b"culprit", 6656, pax((b"mtime", b"1" * 5000)) + plain_header(b"culprit")),
    ("pax", b"culprit", 2048, pax((b"size", b"1_0")) + plain_header(b"culprit")),
    ("pax", b"culprit", 2048, pax((b"size", b"-")) + plain_header(b"culprit")),
    *(
        ("meta_size", b"m", 1024, plain_header(b"m", type=kind, size=octal(MIB + 1)))
        for kind in (b"x", b"g", b"L", b"K")
    ),
    ("truncated", b"good", 1024, b"x" * 511),
    ("truncated", b"culprit", 1538, plain_header(b"culprit", size=octal(3)) + b"ab"),
    ("truncated", b"culprit", 1536, plain_header(b"culprit", size=base256(1 << 62, 12))),
    ("truncated", b"m", 1546, plain_header(b"m", type=b"x", size=octal(11)) + b"12 mtime=5"),
    ("lone_zero", b"", 1536, bytes(512) + plain_header()),
    ("truncated", b"good", 1536, bytes(512) + b"x"),
    ("dangling", b"meta", 2048, pax((b"mtime", b"1"))),
    *(("dangling", b"meta", 2560, pax((b"mtime", b"1")) + end) for end in (bytes(512), END)),
    ("dangling", b"meta", 2048, meta(b"n", b"L")),
    ("dangling", b"meta", 3072, pax((b"mtime", b"1")) + meta(record(b"comment", b"c"), b"g")),
]


def refused(data: bytes) -> str:
    with pytest.raises(TarError) as caught:
        clamped(data)
    return str(caught.value)


@pytest.mark.parametrize(("cause", "name", "offset", "data"), MALFORMED)
def test_malformed_tars(cause, name, offset, data):
    message = refused(GOOD + data)
    assert FRAGMENTS[cause] in message and f"byte {offset}" in message and "; " in message
    assert message.startswith(f"{name.decode()}: " if name else "a single zero block")


@pytest.mark.parametrize(("cause", "name", "offset", "data"), MALFORMED)
def test_buildkit_takes_no_tar_that_is_refused(peer, scratch, cause, name, offset, data):
    """But for what no layer can hold, and an end that Go does not mind."""
    (scratch / "in.tar").write_bytes(GOOD + data)
    assert converted(peer, scratch / "in.tar", EPOCH, scratch / "out.tar") == (cause in ("dangling", "sparse"))


def test_extended_headers_up_to_one_mebibyte():
    def made(time: int, left: int) -> bytes:
        return records_at(octal(1), (b"mtime", b"%d" % time), (b"comment", b"c" * left)) + plain_header(mtime=octal(1))

    left = MIB - len(record(b"mtime", b"%d" % LATER)) - len(b"1048556 comment=\n")
    assert len(made(LATER, left)) == MIB + 1024
    assert clamped(made(LATER, left)) == made(EPOCH, left)
    names = [plain_header(b"m", type=kind, size=octal(MIB), mtime=octal(1)) + b"n" * MIB for kind in (b"L", b"K")]
    assert clamped(b"".join(names) + plain_header(mtime=octal(1))) == b"".join(names) + plain_header(mtime=octal(1))


def test_a_record_that_does_not_count_may_be_anything():
    for records in ([(b"mtime", b"bad"), (b"mtime", b"3")], [(b"size", b"bad"), (b"size", b"")]):
        data = records_at(octal(1), *records) + plain_header(mtime=octal(1)) + END
        assert clamped(data) == data


def test_unreadable_names_in_messages():
    assert refused(plain_header(b"\xff", mtime=b"x")).startswith("\\xff: ")
    assert refused(b"x").startswith("input: ")


def test_an_error_is_raised_again():
    source = ClampedTar(io.BytesIO(GOOD + bytes(512) + GOOD + END), EPOCH)
    assert source.read(1024) == clamped(GOOD)
    for _ in range(3):
        with pytest.raises(TarError, match="single zero block"):
            source.read(100_000)


class Broken:
    """A header, then an error."""

    def __init__(self) -> None:
        self._parts = [plain_header(size=octal(1000), mtime=octal(1))]

    def read(self, size: int) -> bytes:
        if not self._parts:
            raise ConnectionResetError("gone")
        return self._parts.pop()


def test_errors_of_the_source_pass():
    source = ClampedTar(Broken(), EPOCH)
    assert len(source.read(512)) == 512
    for _ in range(2):
        with pytest.raises(ConnectionResetError, match="gone"):
            source.read(1)


@pytest.mark.parametrize(("given", "error"), [(None, SourceError), ("text", UsageError)])
def test_sources_that_give_no_bytes(given, error):
    class Odd:
        def read(self, size: int) -> Any:
            return given

    with pytest.raises(error, match="read()"):
        ClampedTar(Odd(), EPOCH).read(1)


@pytest.mark.parametrize("epoch", [2**63, -(2**63) - 1])
def test_epochs_out_of_range(epoch):
    with pytest.raises(UsageError, match="is no time"):
        ClampedTar(io.BytesIO(), epoch)


# ------------------------------------------------------------------------------------------------------- damaged input

WHOLE = (
    pax((b"path", b"renamed"), (b"mtime", b"%d.5" % LATER))
    + plain_header(b"n", size=octal(512), mtime=octal(LATER))
    + bytes(512)
    + meta(b"name\0", b"L")
    + gnu_times(b"last", LATER, LATER, EPOCH)
)


def settled_entry(found: Entry, epoch: int) -> tuple[Any, ...]:
    """An entry as the parser tells it, without its places, which records of other lengths move."""
    time = min((found.mtime_s, found.mtime_ns), (epoch, 0))
    return (*found[:7], *time, *found[9:14])


def test_every_truncation():
    for cut in range(len(WHOLE) + 1):
        try:
            entries = parse(WHOLE[:cut])
        except TarError:
            with pytest.raises(TarError):
                clamped(WHOLE[:cut])
        else:
            found = [settled_entry(entry, 1 << 40) for entry in parse(clamped(WHOLE[:cut]))]
            assert found == [settled_entry(entry, EPOCH) for entry in entries]


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, mostly behind good checksums."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        block = chance.randrange(len(changed) // 512) * 512
        changed[
            block + chance.choice([*range(124, 157), *range(257, 265), *range(340, 370), chance.randrange(512)])
        ] = chance.choice([0, 32, 48, 55, 56, 128, 255, chance.randrange(256)])
        if chance.random() < 0.9:
            changed[block : block + 512] = seal(bytes(changed[block : block + 512]))
    return bytes(changed)


@settings(max_examples=600, deadline=None, print_blob=True)
@given(st.sampled_from(list(filter(None, INPUTS.values()))), st.randoms(use_true_random=False), st.integers(0, 2**36))
def test_what_can_be_built_can_be_clamped(whole, chance, epoch):
    data = damaged(whole, chance)
    try:
        entries = parse(data)
    except TarError:
        entries = None
    try:
        out = clamped(data, epoch)
    except TarError as error:
        assert entries is None and any(fragment in str(error) for fragment in FRAGMENTS.values())
        return
    assert clamped(out, epoch) == out
    if entries is not None:
        assert [settled_entry(found, 2**62) for found in parse(out)] == [
            settled_entry(found, epoch) for found in entries
        ]


def test_damaged_tars_of_buildkit(peer, scratch):
    """What BuildKit converts comes out alike."""
    chance = random.Random(1)
    judged = 0
    for _ in range(30):
        data = damaged(chance.choice([WHOLE, INPUTS["gnu times"], INPUTS["records"], INPUTS["attributes"]]), chance)
        (scratch / "in.tar").write_bytes(data)
        if converted(peer, scratch / "in.tar", EPOCH, scratch / "out.tar"):
            agree_with_buildkit(peer, scratch, data)
            judged += 1
    assert judged > 5
