"""Tar headers: the emitter against Go's bytes, a reference and tarfile; the parser against tars of every making."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from reference.tar_headers import (
    FIELDS,
    GNU,
    NO_TIME,
    V7,
    header_blocks,
    meta,
    padded,
    pax,
    plain_header,
    record,
    seal,
)

from estargz._tar import Entry, emit, pack, parse
from estargz.errors import SourceError, TarError

END = bytes(1024)
MIB = 1 << 20
FRAGMENTS = {
    "checksum": "bad header checksum",
    "number": "bad number",
    "sparse": "sparse entry",
    "type": "cannot be part of a layer",
    "pax": "malformed PAX record",
    "meta_size": "extended header over 1 MiB",
    "truncated": "ends too early",
    "lone_zero": "single zero block",
    "dangling": "without an entry",
}


def refuses(data: bytes, cause: str) -> str:
    with pytest.raises(TarError, match=FRAGMENTS[cause]) as caught:
        parse(data)
    return str(caught.value)


def only(data: bytes) -> Entry:
    (entry,) = parse(data)
    return entry


# ------------------------------------------------------------------------------------------------------------ emitter


def golden() -> list[dict]:
    """Entries and the digests of what Go's archive/tar (1.26) wrote for them with Format: FormatPAX; strings in hex."""
    return json.loads((Path(__file__).parent / "reference" / "go_headers.json").read_text())


def decoded(entry: dict) -> dict:
    fields = dict(entry)
    for key in ("name", "link", "user_name", "group_name"):
        if key in fields:
            fields[key] = bytes.fromhex(fields[key])
    if "type" in fields:
        fields["type"] = fields["type"].encode()
    if "xattrs" in fields:
        fields["xattrs"] = {bytes.fromhex(key): bytes.fromhex(value) for key, value in fields["xattrs"].items()}
    return fields


@pytest.mark.parametrize("case", golden(), ids=lambda case: f"{case['sha256'][:8]}-{case['length']}")
def test_emits_the_bytes_that_go_writes(case):
    fields = decoded(case["entry"])
    assert header_blocks(**fields) == emit(**fields)
    assert (len(emit(**fields)), hashlib.sha256(emit(**fields)).hexdigest()) == (case["length"], case["sha256"])


segments = st.sampled_from(
    [
        b"",
        b".",
        b"..",
        b"a",
        b"bin",
        b"\xc3\xa9",
        b"\xff",
        b"\xe2\x82",
        b"PaxHeaders.0",
        b"w" * 50,
        b"x" * 99,
        b"y" * 100,
    ]
)
paths = st.one_of(
    st.lists(segments, min_size=1, max_size=6).map(b"/".join),
    st.binary(max_size=300).map(lambda text: text.replace(b"\0", b"/")),
    st.text(max_size=120).map(lambda text: text.encode("utf-8", "replace").replace(b"\0", b"/")),
    st.builds(lambda size, fill: fill * size, st.sampled_from([99, 100, 101, 155, 156, 157, 256, 257]), segments),
    st.builds(lambda a, b: b"p" * a + b"/" + b"n" * b, st.integers(90, 160), st.integers(90, 110)),
)
owner_names = st.binary(max_size=40).map(lambda text: text.replace(b"\0", b"r"))
ids = st.one_of(st.integers(0, 70000), st.sampled_from([2097151, 2097152, 2**32 - 1, -1, 2**63 - 1, -(2**63)]))
sizes = st.one_of(st.integers(0, 10**6), st.sampled_from([8589934591, 8589934592, 2**62]))
times = st.one_of(
    st.integers(0, 2**32), st.sampled_from([8589934591, 8589934592, -1, -5, 2**63 - 1, -(2**63), NO_TIME])
)
attributes = st.dictionaries(
    st.binary(max_size=20).map(lambda key: key.replace(b"\0", b"a").replace(b"=", b"b")),
    st.binary(max_size=120),
    max_size=3,
)
entries = st.fixed_dictionaries(
    {"name": paths, "type": st.sampled_from([b"0", b"0", b"1", b"2", b"3", b"4", b"5", b"6"])},
    optional={
        "link": paths,
        "mode": st.integers(0, 0o7777),
        "uid": ids,
        "gid": ids,
        "mtime_s": times,
        "mtime_ns": st.one_of(st.just(0), st.integers(0, 999999999)),
        "user_name": owner_names,
        "group_name": owner_names,
        "dev_major": st.integers(0, 2097151),
        "dev_minor": st.integers(0, 2097151),
        "xattrs": attributes,
    },
)


def fitting(fields: dict, size: int) -> dict:
    """Drop what no header can say: a size that is not a file's, a slash after a file's name."""
    if fields["type"] == b"0":
        fields = fields | {"size": size}
    if fields["type"] in (b"0", b"3", b"4", b"6"):
        fields = fields | {"name": fields["name"].rstrip(b"/")}
    return fields


@settings(max_examples=1000, deadline=None, print_blob=True)
@given(entries, sizes)
@example({"name": b"n" * 100, "type": b"0"}, 0)
@example({"name": b"p" * 155 + b"/" + b"n" * 100, "type": b"0", "uid": 1 << 40}, 1)
def test_equals_the_reference_emitter(fields, size):
    fields = fitting(fields, size)
    assert emit(**fields) == header_blocks(**fields)


@settings(max_examples=500, deadline=None, print_blob=True)
@given(entries)
def test_reads_back_what_it_emits(fields):
    fields = fitting(fields, 0)
    assume(fields["name"])
    if fields.get("mtime_s") == NO_TIME and not fields.get("mtime_ns"):
        fields["mtime_s"] = 0
    entry = only(emit(**fields) + END)
    xattrs = sorted(fields.pop("xattrs", {}).items())
    assert entry.xattrs == xattrs
    assert {key: getattr(entry, key) for key in fields} == fields


def read_with_tarfile(headers: bytes) -> tarfile.TarInfo:
    with tarfile.open(fileobj=io.BytesIO(headers + END), encoding="utf-8", errors="surrogateescape") as tar:
        return tar.getmembers()[0]


@settings(max_examples=300, deadline=None, print_blob=True)
@given(entries)
def test_tarfile_reads_what_it_emits(fields):
    fields = fitting(fields, 0)
    name = fields["name"].rstrip(b"/")
    assume(name and abs(fields.get("mtime_s", 0)) < 2**40)
    info = read_with_tarfile(emit(**fields))
    assert os.fsencode(info.name).rstrip(b"/") == name
    assert (info.mode, info.uid, info.gid) == (fields.get("mode", 0), fields.get("uid", 0), fields.get("gid", 0))
    assert os.fsencode(info.linkname).rstrip(b"/") == fields.get("link", b"").rstrip(b"/")
    for key, value in fields.get("xattrs", {}).items():
        held = info.pax_headers["SCHILY.xattr." + key.decode("utf-8", "surrogateescape")]
        assert held.encode("utf-8", "surrogateescape") == value


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dev_major": 2097152, "type": b"3"}, "device number"),
        ({"dev_minor": 1 << 40, "type": b"4"}, "device number"),
        ({"dev_major": -1, "type": b"3"}, "device number"),
        ({"xattrs": {b"user.big": bytes(MIB)}}, "exceed 1 MiB"),
        ({"link": b"l" * MIB, "type": b"2"}, "exceed 1 MiB"),
        ({"capacity": 511}, "exceed 1 MiB"),
        ({"capacity": 0}, "exceed 1 MiB"),
        ({"uid": 1 << 40, "capacity": 1535}, "exceed 1 MiB"),
        ({"mode": 0o10000000}, "bad number"),
        ({"mode": -1}, "bad number"),
        ({"size": -1}, "bad number"),
        ({"link": b"a\0b", "type": b"2"}, "malformed PAX"),
        ({"user_name": b"\0"}, "malformed PAX"),
        ({"xattrs": {b"user.a=b": b""}}, "malformed PAX"),
        ({"xattrs": {b"user.a\0": b""}}, "malformed PAX"),
        ({"type": b"7"}, "cannot be part of a layer"),
        ({"type": b"x"}, "cannot be part of a layer"),
    ],
)
def test_emitter_refuses(fields, message):
    with pytest.raises(SourceError, match=message):
        emit(b"name", **fields)


@pytest.mark.parametrize("type", [b"0", b"3", b"4", b"6"])
def test_emitter_refuses_a_slash_after_a_file(type):
    with pytest.raises(TarError):
        emit(b"name/", type=type)


def test_emitter_refuses_nul_in_a_name():
    with pytest.raises(TarError, match="malformed PAX"):
        emit(b"na\0me")


def test_records_may_fill_one_mebibyte():
    overhead = len(record(b"SCHILY.xattr.k", bytes(MIB - 100))) - (MIB - 100)
    headers = emit(b"name", xattrs={b"k": bytes(MIB - overhead)})
    assert len(headers) == 512 + MIB + 512
    assert only(headers + END).xattrs == [(b"k", bytes(MIB - overhead))]
    with pytest.raises(SourceError, match="exceed 1 MiB"):
        emit(b"name", xattrs={b"k": bytes(MIB - overhead + 1)})


def test_exact_capacity_is_enough():
    assert len(emit(b"n", capacity=512)) == 512
    assert len(emit(b"n", uid=1 << 40, capacity=1536)) == 1536


def test_packed_attributes_are_sorted_by_key():
    assert pack({b"b": b"", b"a": b"xy"}) == b"\1\0\0\0\2\0\0\0axy" + b"\1\0\0\0\0\0\0\0b"


# ------------------------------------------------------------------------------------------- parser: tars of all kinds


def python_tar(format: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, kind, payload in (
            ("file", tarfile.REGTYPE, b"hello"),
            ("dir", tarfile.DIRTYPE, b""),
            ("p" * 90 + "/" + "n" * 80, tarfile.REGTYPE, b"x" * 513),
            ("symlink", tarfile.SYMTYPE, b""),
            ("hardlink", tarfile.LNKTYPE, b""),
            ("char", tarfile.CHRTYPE, b""),
            ("block", tarfile.BLKTYPE, b""),
            ("fifo", tarfile.FIFOTYPE, b""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.size, info.mtime, info.mode = kind, len(payload), 1700000000, 0o640
            info.uid, info.gid, info.uname, info.gname = 1000, 100, "user", "group"
            if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                info.linkname = "t" * (99 if format == tarfile.USTAR_FORMAT else 150)
            if kind in (tarfile.CHRTYPE, tarfile.BLKTYPE):
                info.devmajor, info.devminor = 8, 17
            tar.addfile(info, io.BytesIO(payload))
    return out.getvalue()


def agree_with_tarfile(data: bytes) -> list[Entry]:
    """Parse, and hold names, types, numbers and payload places against Python's reader."""
    parsed = parse(data)
    with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8", errors="surrogateescape") as tar:
        members = tar.getmembers()
    assert len(parsed) == len(members)
    for entry, info in zip(parsed, members, strict=True):
        assert entry.name.rstrip(b"/") == os.fsencode(info.name).rstrip(b"/")
        assert entry.link == os.fsencode(info.linkname)
        assert (entry.mode, entry.uid, entry.gid) == (info.mode, info.uid, info.gid)
        assert (entry.user_name, entry.group_name) == (os.fsencode(info.uname), os.fsencode(info.gname))
        assert entry.type.replace(b"\0", b"0") == info.type.replace(b"\0", b"0")
        assert (entry.size, entry.payload_offset) == (info.size if info.isreg() else 0, info.offset_data)
        assert entry.header_offset == info.offset
        assert entry.mtime_s == int(info.mtime // 1)
        if info.ischr() or info.isblk():
            assert (entry.dev_major, entry.dev_minor) == (info.devmajor, info.devminor)
    return parsed


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_python(format):
    assert [entry.type for entry in agree_with_tarfile(python_tar(format))] == [
        b"%d" % i for i in (0, 5, 0, 2, 1, 3, 4, 6)
    ]


def test_base_256_numbers_of_python():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo("file")
        info.uid, info.gid, info.mtime = 1 << 40, 1 << 33, -5
        tar.addfile(info)
    entry = only(out.getvalue())
    assert (entry.uid, entry.gid, entry.mtime_s) == (1 << 40, 1 << 33, -5)


@pytest.fixture(scope="module")
def gnu_tar() -> str:
    tar = shutil.which("tar")
    if tar is None or "GNU tar" not in subprocess.run([tar, "--version"], capture_output=True, text=True).stdout:
        pytest.skip("needs GNU tar")
    return tar


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / ("d" * 60) / ("e" * 60)).mkdir(parents=True)
    (root / ("d" * 60) / ("e" * 60) / "deep").write_bytes(b"z" * 700)
    (root / "file").write_bytes(b"x" * 1000)
    (root / "é").write_bytes(b"")
    (root / "symlink").symlink_to("t" * 80)
    os.link(root / "file", root / "hardlink")
    os.mkfifo(root / "fifo")
    return root


@pytest.mark.parametrize("format", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_tars_of_gnu_tar(gnu_tar, tree, tmp_path, format):
    out = tmp_path / "out.tar"
    done = subprocess.run([gnu_tar, f"--format={format}", "-cf", out, "-C", tree, "."], capture_output=True)
    assert format == "v7" or done.returncode == 0, done.stderr
    parsed = agree_with_tarfile(out.read_bytes())
    assert b"./file" in {entry.name for entry in parsed}
    if format == "posix":
        assert {entry.mtime_ns for entry in parsed} != {0}


def test_attributes_of_gnu_tar(gnu_tar, tree, tmp_path):
    try:
        os.setxattr(tree / "file", "user.note", b"a\0=\n")
    except OSError:
        pytest.skip("the file system has no user attributes")
    out = tmp_path / "out.tar"
    subprocess.run([gnu_tar, "--format=posix", "--xattrs", "-cf", out, "-C", tree, "file"], check=True)
    assert (b"user.note", b"a\0=\n") in only(out.read_bytes()).xattrs


@pytest.mark.parametrize(
    "options",
    [
        ["--format=gnu"],
        ["--format=oldgnu"],
        *(["--format=posix", f"--sparse-version={v}"] for v in ("0.0", "0.1", "1.0")),
    ],
)
def test_sparse_tars_of_gnu_tar_are_refused(gnu_tar, tmp_path, options):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 20)
        file.seek(500000)
        file.write(b"data")
    out = tmp_path / "out.tar"
    subprocess.run([gnu_tar, *options, "--sparse", "-cf", out, "-C", tmp_path, "sparse"], check=True)
    assert "sparse" in refuses(out.read_bytes(), "sparse")


# ----------------------------------------------------------------------------------------------------- parser: headers


def test_plain_header():
    assert only(plain_header(b"dir/file")) == Entry(
        b"dir/file", b"0", b"", 0o644, 1, 2, 0, 1700000000, 0, b"", b"", 0, 0, [], 0, 512
    )


def test_checksum_of_signed_bytes():
    assert only(plain_header(b"\xff\xfe", signed=True)).name == b"\xff\xfe"


@pytest.mark.parametrize("checksum", [b"0000000\0", b"999999\0 ", b"\x80\0\0\0\0\0\0\1"])
def test_wrong_checksum(checksum):
    assert "byte 0" in refuses(plain_header(checksum=checksum), "checksum")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"0000755\0", 0o755),
        (b"0000755 ", 0o755),
        (b"00000755", 0o755),
        (b"   755 \0", 0o755),
        (b"755\0xyz1", 0o755),
        (b"\0\0 755\0\0", 0o755),
        (b"        ", 0),
        (b"", 0),
        (b"\x80\0\0\0\0\0\2\0", 512),
        (b"\xff" * 8, -1),
        (b"\xff\xff\xff\xff\xff\xff\xff\x00", -256),
        (b"\x80\xff\xff\xff\xff\xff\xff\xff", (1 << 56) - 1),
        (b"\xbf" + b"\xff" * 7, (1 << 62) - 1),
    ],
)
def test_numbers(text, value):
    assert only(plain_header(uid=text)).uid == value


@pytest.mark.parametrize("field", ["mode", "uid", "gid", "size", "mtime", "dev_major", "dev_minor"])
@pytest.mark.parametrize("text", [b"12x", b"9", b"1 2", b"-1", b"+1", b"0o7"])
def test_what_is_no_number(field, text):
    refuses(plain_header(**{field: text.ljust(FIELDS[field][1], b"\0")}), "number")


@pytest.mark.parametrize("text", [b"\x80" + b"\1" * 11, b"\xff" * 12, b"\x80\0\0\0" + b"\x40" + b"\0" * 6 + b"\1"])
def test_sizes_out_of_range(text):
    refuses(plain_header(size=text), "number")


def test_largest_size_is_two_to_the_62():
    assert "ends too early" in refuses(plain_header(size=b"\x80\0\0\0\x40" + bytes(7)), "truncated")


@pytest.mark.parametrize(("name", "type"), [(b"a", b"0"), (b"a/", b"5"), (b"", b"0")])
def test_typeflag_nul(name, type):
    assert only(plain_header(name, type=b"\0")).type == type


def test_typeflag_0_stays_a_file_whatever_its_name():
    assert only(plain_header(b"a/", type=b"0")).type == b"0"


def test_long_name_decides_on_typeflag_nul():
    assert only(meta(b"long/\0", b"L") + plain_header(b"a", type=b"\0")).type == b"5"
    assert only(pax((b"path", b"p")) + plain_header(b"a/", type=b"\0")).type == b"0"


@pytest.mark.parametrize("type", [b"1", b"2", b"3", b"4", b"5", b"6"])
@pytest.mark.parametrize("size", [b"00000001000\0", b"\xff" * 12])
def test_header_only_types_have_no_payload(type, size):
    first, second = parse(plain_header(b"a", type=type, size=size) + plain_header(b"b") + END)
    assert (first.size, first.type, second.name) == (0, type, b"b")


@pytest.mark.parametrize("type", [b"7", b"8", b"g", b"V", b"D", b"M", b"N", b"X", b"I", b"A", b"\xff"])
def test_types_that_a_layer_cannot_hold(type):
    assert refuses(plain_header(b"culprit", type=type), "type").startswith("culprit")


def test_old_gnu_sparse_type():
    refuses(plain_header(type=b"S", magic=GNU), "sparse")


def test_prefixes_of_each_format():
    assert only(plain_header(b"n", prefix=b"p")).name == b"p/n"
    assert only(plain_header(b"", prefix=b"p" * 155)).name == b"p" * 155 + b"/"
    star = plain_header(b"n", prefix=b"p" * 131, star_atime=b"00000000001\0", star_ctime=b"2", star_trailer=b"tar\0")
    assert only(star).name == b"p" * 131 + b"/n"
    assert only(plain_header(b"n", magic=V7, prefix=b"p")).name == b"n"
    assert only(plain_header(b"n", magic=GNU, gnu_atime=b"00000000001\0")).name == b"n"


def test_no_owner_or_device_without_magic():
    entry = only(plain_header(magic=V7, user_name=b"u", group_name=b"g", dev_major=b"bad", dev_minor=b"7"))
    assert (entry.user_name, entry.group_name, entry.dev_major, entry.dev_minor) == (b"", b"", 0, 0)


def test_prefix_that_old_go_wrote_over_gnu_times():
    assert only(plain_header(b"n", magic=GNU, prefix=b"prefix/dir")).name == b"prefix/dir/n"
    assert only(plain_header(b"n", magic=GNU, prefix=b"pr\xc3\xa9fix/dir")).name == b"n"


def test_bad_times_of_schilys_format():
    refuses(plain_header(prefix=b"p", star_atime=b"bad", star_trailer=b"tar\0"), "number")


def test_fields_filled_to_the_last_byte():
    full = plain_header(
        b"n" * 100, prefix=b"p" * 155, link=b"l" * 100, user_name=b"u" * 32, group_name=b"g" * 32, type=b"1"
    )
    entry = only(full)
    assert (len(entry.name), len(entry.link), len(entry.user_name), len(entry.group_name)) == (256, 100, 32, 32)


# ------------------------------------------------------------------------------------------- parser: extended headers


def test_pax_overrides_every_field():
    records = {b"path": b"P", b"linkpath": b"L", b"uname": b"U", b"gname": b"G", b"uid": b"7", b"gid": b"-8"}
    records |= {b"mtime": b"-1.5", b"atime": b"1", b"ctime": b"2.5", b"comment": b"c", b"VENDOR.key": b""}
    entry = only(pax(*records.items()) + plain_header(b"n", link=b"l", user_name=b"u", group_name=b"g", type=b"1"))
    assert entry[:11] == (b"P", b"1", b"L", 0o644, 7, -8, 0, -2, 500000000, b"U", b"G")
    assert (entry.header_offset, entry.payload_offset) == (0, 1536)


def test_pax_size_replaces_the_headers():
    first, second = parse(pax((b"size", b"600")) + plain_header(b"a") + bytes(1024) + plain_header(b"b") + END)
    assert (first.size, second.name) == (600, b"b")


@pytest.mark.parametrize(
    ("text", "seconds", "nanoseconds"),
    [
        (b"0", 0, 0),
        (b"+3", 3, 0),
        (b"5.", 5, 0),
        (b"1.123456789", 1, 123456789),
        (b"1.1234567899", 1, 123456789),
        (b"-0.5", -1, 500000000),
        (b"-0", 0, 0),
        (b"-1.25", -2, 750000000),
        (b"-1.0000000001", -1, 0),
        (b"9223372036854775807", 2**63 - 1, 0),
        (b"-9223372036854775808", -(2**63), 0),
    ],
)
def test_pax_times(text, seconds, nanoseconds):
    entry = only(pax((b"mtime", text)) + plain_header())
    assert (entry.mtime_s, entry.mtime_ns) == (seconds, nanoseconds)


@pytest.mark.parametrize("key", [b"mtime", b"atime", b"ctime"])
@pytest.mark.parametrize(
    "text", [b"x", b".5", b"1.x", b"1.1234567890x", b"1.2.3", b" 1", b"1e5", b"9223372036854775808"]
)
def test_pax_times_that_are_none(key, text):
    refuses(pax((key, text)) + plain_header(), "pax")


@pytest.mark.parametrize("key", [b"uid", b"gid", b"size"])
@pytest.mark.parametrize("text", [b"x", b"-", b"1_0", b" 1", b"1 ", b"0x1", b"1.0", b"9223372036854775808"])
def test_pax_numbers_that_are_none(key, text):
    refuses(pax((key, text)) + plain_header(), "pax")


@pytest.mark.parametrize("size", [b"-1", b"4611686018427387905"])
def test_pax_sizes_out_of_range(size):
    refuses(pax((b"size", size)) + plain_header(), "number")
    assert only(pax((b"size", size)) + plain_header(b"d/", type=b"5")).size == 0


def test_last_record_of_a_key_counts():
    assert only(pax((b"path", b"a"), (b"path", b"b")) + plain_header()).name == b"b"
    assert only(pax((b"path", b"a"), (b"path", b"")) + plain_header(b"n")).name == b"n"
    assert only(pax((b"uid", b"bad"), (b"uid", b"5")) + plain_header()).uid == 5
    assert only(pax((b"uid", b"bad"), (b"uid", b"")) + plain_header()).uid == 1


def test_later_pax_header_replaces_the_earlier():
    entry = only(
        pax((b"path", b"a"), (b"uid", b"9"), (b"SCHILY.xattr.k", b"v")) + pax((b"gid", b"4")) + plain_header(b"n")
    )
    assert (entry.name, entry.uid, entry.gid, entry.xattrs) == (b"n", 1, 4, [])


def test_extended_headers_concern_one_entry():
    records = pax((b"path", b"a"), (b"uid", b"9"), (b"SCHILY.xattr.k", b"v")) + meta(b"t\0", b"K")
    first, second = parse(records + plain_header(type=b"1") + plain_header(b"n", type=b"1", link=b"l") + END)
    assert (first.name, first.link, first.uid, first.xattrs) == (b"a", b"t", 9, [(b"k", b"v")])
    assert (second.name, second.link, second.uid, second.xattrs) == (b"n", b"l", 1, [])


def test_long_names_beat_pax_whatever_the_order():
    records = pax((b"path", b"pax"), (b"linkpath", b"pax"))
    for headers in (
        records + meta(b"gnu\0x", b"L") + meta(b"lnk", b"K"),
        meta(b"lnk", b"K") + meta(b"gnu", b"L") + records,
    ):
        entry = only(headers + plain_header(type=b"1"))
        assert (entry.name, entry.link) == (b"gnu", b"lnk")


@pytest.mark.parametrize("payload", [b"", b"\0", b"\0x"])
def test_empty_long_name_is_none(payload):
    assert only(meta(b"first", b"L") + meta(payload, b"L") + plain_header(b"n")).name == b"n"


def test_attributes_are_sorted_and_the_last_of_a_key_stays():
    keys = [b"user.b", b"user.a", b"user", b"user.b", b"\xff", b"user.aa"]
    records = [(b"SCHILY.xattr." + key, b"%d" % i) for i, key in enumerate(keys)]
    assert only(pax(*records) + plain_header(b"d/", type=b"5")).xattrs == [
        (b"user", b"2"),
        (b"user.a", b"1"),
        (b"user.aa", b"5"),
        (b"user.b", b"3"),
        (b"\xff", b"4"),
    ]


def test_attribute_values_are_raw_and_may_be_empty():
    value = bytes(range(256))
    entry = only(pax((b"SCHILY.xattr.v", value), (b"SCHILY.xattr.e", b""), (b"SCHILY.xattr.", b"n")) + plain_header())
    assert entry.xattrs == [(b"", b"n"), (b"e", b""), (b"v", value)]


def test_many_attributes():
    rng = random.Random(7)
    expected = {b"user.%d" % rng.randrange(10**6): b"v%d" % i for i in range(20000)}
    records = [(b"SCHILY.xattr." + key, value) for key, value in expected.items()]
    assert only(pax(*records) + plain_header()).xattrs == sorted(expected.items())


@pytest.mark.parametrize(
    "payload",
    [
        b"nospace",
        b"x a=b\n",
        b"4 a=\n",
        b"6 ab\n\n",
        b"99 a=b\n",
        b"7 a=b\n",
        b"6 a=bX",
        b"-6 a=b\n",
        b" 6 a=b\n",
        b"5 =b\n",
        b"000005 a=b\n",
        b"6 a=b\n\0",
        b"99999999999999999999 a=b\n",
        record(b"a\0b", b"v"),
        record(b"path", b"a\0b"),
        record(b"linkpath", b"\0"),
        record(b"uname", b"\0"),
        record(b"gname", b"\0"),
    ],
)
def test_malformed_records(payload):
    refuses(meta(payload) + plain_header(), "pax")


@pytest.mark.parametrize("payload", [b"", b"6 a=b\n", b"+7 a=b\n", b"007 a=\n", record(b"comment", b"\0")])
def test_unusual_but_wellformed_records(payload):
    assert only(meta(payload) + plain_header(b"n")).name == b"n"


SPARSE_KEYS = {
    "0.0": [(b"GNU.sparse.offset", b"0"), (b"GNU.sparse.numbytes", b"5")],
    "0.1": [(b"GNU.sparse.map", b"0,5"), (b"GNU.sparse.numblocks", b"1")],
    "0.1 with version": [(b"GNU.sparse.major", b"0"), (b"GNU.sparse.minor", b"1")],
    "1.0": [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.name", b"n")],
}


@pytest.mark.parametrize("records", SPARSE_KEYS.values(), ids=SPARSE_KEYS.keys())
def test_sparse_files_in_pax_form(records):
    refuses(pax(*records) + plain_header(), "sparse")
    assert only(pax(*records) + pax() + plain_header(b"n")).name == b"n"


def test_sparse_keys_that_make_no_sparse_file():
    for records in (
        [(b"GNU.sparse.major", b"2"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.map", b"0,5")],
        [(b"GNU.sparse.size", b"5"), (b"GNU.sparse.numblocks", b"0"), (b"GNU.sparse.map", b"")],
    ):
        assert only(pax(*records) + plain_header(b"n")).name == b"n"


def test_sparse_map_out_of_order():
    refuses(pax((b"GNU.sparse.numbytes", b"5")) + plain_header(), "pax")
    refuses(pax((b"GNU.sparse.offset", b"0,1")) + plain_header(), "pax")


@pytest.mark.parametrize("type", [b"x", b"L", b"K"])
def test_extended_headers_up_to_one_mebibyte(type):
    payload = record(b"comment", b"c" * (MIB - 17)) if type == b"x" else b"n" * MIB
    assert len(payload) == MIB
    assert len(parse(meta(payload, type) + plain_header())) == 1
    refuses(plain_header(type=type, size=b"%011o\0" % (MIB + 1)), "meta_size")


# -------------------------------------------------------------------------------------- parser: the ends of an archive


@pytest.mark.parametrize("end", [b"", bytes(512), END, END + b"garbage", bytes(10240)])
def test_ends_that_are_accepted(end):
    assert len(parse(plain_header() + end)) == 1


def test_empty_input():
    assert parse(b"") == parse(END) == []


def test_one_zero_block_then_data():
    assert "byte 1024" in refuses(plain_header() + bytes(512) + plain_header(), "lone_zero")


@pytest.mark.parametrize("end", [b"", bytes(512), END])
@pytest.mark.parametrize("headers", [pax(), meta(b"n", b"L"), meta(b"n", b"K")])
def test_extended_header_without_an_entry(headers, end):
    refuses(headers + end, "dangling")


def test_every_truncation():
    whole = pax((b"path", b"renamed")) + plain_header(b"n", size=b"00000001000\0") + bytes(512) + plain_header(b"last")
    borders = {0: 0, 2048: 1, 2560: 2}
    for cut in range(len(whole) + 1):
        if cut in borders:
            assert len(parse(whole[:cut])) == borders[cut]
        else:
            with pytest.raises(TarError):
                parse(whole[:cut])


def test_end_within_the_last_padding():
    assert only(plain_header(size=b"00000000005\0") + b"hello").size == 5


def test_errors_name_the_entry_and_the_byte():
    assert refuses(plain_header(b"a") + plain_header(b"culprit", uid=b"bad"), "number").startswith(
        "culprit: bad number"
    )
    assert "byte 512" in refuses(plain_header(b"a") + plain_header(b"culprit", uid=b"bad"), "number")
    assert refuses(pax((b"path", b"renamed"), (b"uid", b"x")) + plain_header(b"n"), "pax").startswith("renamed: ")
    assert refuses(plain_header(b"\xff", type=b"7"), "type").startswith("\\xff: ")


# ------------------------------------------------------------------------------------------------ parser: damaged input

WELL_FORMED = [
    python_tar(tarfile.USTAR_FORMAT),
    python_tar(tarfile.GNU_FORMAT),
    python_tar(tarfile.PAX_FORMAT),
    pax((b"SCHILY.xattr.k", b"v"), (b"mtime", b"-1.5"), (b"size", b"3")) + plain_header() + padded(b"abc") + END,
    plain_header(b"n", prefix=b"p", star_trailer=b"tar\0") + plain_header(b"o", magic=GNU, gnu_atime=b"1") + END,
]
changes = st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 511), st.integers(0, 255), st.booleans())


@settings(max_examples=1500, deadline=None, print_blob=True)
@given(st.sampled_from(WELL_FORMED), st.lists(changes, min_size=1, max_size=8), st.integers(0, 12000))
def test_damaged_tars_give_entries_or_an_error(data, alterations, cut):
    damaged = bytearray(data)
    for where, offset, byte, sealed in alterations:
        block = int(where * (len(damaged) // 512)) * 512
        damaged[block + offset] = byte
        if sealed:
            damaged[block : block + 512] = seal(bytes(damaged[block : block + 512]))
    try:
        for entry in parse(bytes(damaged[:cut] if cut % 3 == 0 else damaged)):
            assert 0 <= entry.size <= 1 << 62 and 0 <= entry.mtime_ns < 10**9
            assert entry.header_offset < entry.payload_offset <= len(damaged)
    except TarError as error:
        assert any(fragment in str(error) for fragment in FRAGMENTS.values())


@settings(max_examples=300, deadline=None, print_blob=True)
@given(st.binary(max_size=200), st.sampled_from([b"x", b"L", b"K"]))
def test_random_extended_headers(payload, type):
    try:
        parse(meta(payload, type) + plain_header())
    except TarError:
        assert type == b"x"


@settings(max_examples=300, deadline=None, print_blob=True)
@given(st.binary(min_size=0, max_size=512))
def test_random_blocks_with_a_good_checksum(noise):
    with contextlib.suppress(TarError):
        parse(seal(noise.ljust(512, b"\0")))
