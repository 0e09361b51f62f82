"""Reading blobs: those of Go's estargz as the judge of right ones, and hand-built ones for every hazard."""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest
from reference import blobs as made
from reference.blobs import assemble, digest, encode, estargz, link, member, payload_and_toc, tar_of
from reference.peer import report, run

from estargz.errors import BlobError, SourceError, UsageError, VerificationError
from estargz.reading import blob as blobs
from estargz.reading.toc import Limits, clean_name, go_text, modtime_seconds, owners, parse_toc

RNG = random.Random(2011)
FILES = {"a": b"first", "d/b": RNG.randbytes(10_000), "d/empty": b"", "d/c": b"text " * 3000}
TAR = tar_of(("d/", b""), *FILES.items(), link("h", "d/b"), link("s", "a", tarfile.SYMTYPE))


def entry_of(entries: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(entry for entry in entries if entry["name"] == name)


# --- right blobs


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunk_size": 1000},
        {"chunk_size": 5000},
        {"chunk_size": 700, "min_chunk": 3000},
        {"min_chunk": 1 << 20},
        {"make_footer": made.legacy_footer},
    ],
    ids=str,
)
def test_content_comes_back(options: dict[str, Any]) -> None:
    with blobs.open(estargz(TAR, **options)) as blob:
        for name, content in FILES.items():
            assert blob.read(name) == content
            assert b"".join(blob.stream("./" + name)) == content
        assert blob.read("h") == FILES["d/b"]
        assert blob.open_tar().read() == TAR
        assert blob.lookup("/d/../s").link_name == "a"
        assert blob.footer.format == ("legacy" if "make_footer" in options else "estargz")


@pytest.mark.parametrize("how", ["lossless", "build", "build-from-gzip"])
@pytest.mark.parametrize("options", [[], ["-chunk-size", "4000"], ["-chunk-size", "1000", "-min-chunk-size", "9000"]])
def test_blobs_made_by_go(tmp_path: Path, peer: Path, how: str, options: list[str]) -> None:
    tar, out = tmp_path / "in.tar", tmp_path / "blob"
    tar.write_bytes(member(TAR) if how == "build-from-gzip" else TAR)
    made_by_go = report(peer, "blob", "-how", how, *options, tar, out)
    with blobs.open(out, toc_digest=made_by_go["toc_digest"]) as blob:
        assert {name: blob.read(name) for name in FILES} == FILES
        assert blob.read("h") == FILES["d/b"]
        stored = json.loads(run(peer, "toc", out))["entries"]
        assert [entry.name for entry in blob.toc] == [entry["name"] for entry in stored]
        run(peer, "unpack", out, tmp_path / "back.tar")
        assert blob.open_tar().read() == (tmp_path / "back.tar").read_bytes()
        if how == "lossless":
            assert blob.open_tar().read() == TAR


@pytest.mark.parametrize(
    "tar", [b"", bytes(1024), tar_of(("d/", b""), ("empty", b""))], ids=["none", "zeros", "no payload"]
)
def test_layers_without_payload(tmp_path: Path, peer: Path, tar: bytes) -> None:
    (tmp_path / "tar").write_bytes(tar)
    run(peer, "blob", "-how", "lossless", tmp_path / "tar", tmp_path / "blob")
    for source in (tmp_path / "blob", estargz(tar)):
        with blobs.open(source) as blob:
            assert blob.open_tar().read() == tar
            assert len(blob.toc) == (2 if len(tar) > 1024 else 0)


def test_chunks_of_a_file() -> None:
    with blobs.open(estargz(TAR, chunk_size=4000)) as blob:
        parts = blob.chunks("h")
        assert [(part.chunk_offset, part.size) for part in parts] == [(0, 4000), (4000, 4000), (8000, 2000)]
        assert [part.end for part in parts[:2]] == [part.offset for part in parts[1:]]
        assert blob.chunks("d/empty") == []
        assert [len(part) for part in blob.stream("h")] == [4000, 4000, 2000]


def test_later_duplicate_counts() -> None:
    tar = tar_of(("a", b"old"), ("./x/../a", b"new"))
    with blobs.open(estargz(tar)) as blob:
        assert blob.read("a") == b"new"
        assert len(blob.toc) == 2


class Ranges:
    """A blob behind range requests, some of which come back short."""

    def __init__(self, data: bytes) -> None:
        self.data, self.size = data, len(data)

    def read_at(self, offset: int, size: int) -> bytes:
        return self.data[offset : offset + min(size, 1000)]


def test_sources(tmp_path: Path) -> None:
    data = estargz(TAR, chunk_size=3000, min_chunk=5000)
    path = tmp_path / "blob"
    path.write_bytes(data)
    with path.open("rb") as file:
        file.seek(7)
        for source in (path, str(path), file, data, bytearray(data), memoryview(data), io.BytesIO(data), Ranges(data)):
            with blobs.open(source) as blob:
                assert blob.read("d/b") == FILES["d/b"]
                assert blob.open_tar().read() == TAR
        assert file.tell() == 7
    with pytest.raises(TypeError, match="a blob is a path"):
        blobs.open(42)  # type: ignore[arg-type]


def test_descriptors_are_given_back(tmp_path: Path) -> None:
    (tmp_path / "good").write_bytes(estargz(TAR))
    (tmp_path / "bad").write_bytes(b"no blob" * 20)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        blobs.open(tmp_path / "good").close()
        with pytest.raises(BlobError):
            blobs.open(tmp_path / "bad")
        with pytest.raises(BlobError, match="no regular file"):
            blobs.open(tmp_path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_fifo_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDWR)
    try:
        with os.fdopen(os.dup(reader), "rb", buffering=0) as file, pytest.raises(BlobError, match="no regular file"):
            blobs.open(file)
    finally:
        os.close(reader)


def test_paths_that_are_not_there() -> None:
    with blobs.open(estargz(TAR)) as blob:
        assert "a" in blob
        assert "b" not in blob
        for method in (blob.lookup, blob.read, blob.chunks):
            with pytest.raises(FileNotFoundError, match="no such entry"):
                method("b")
        with pytest.raises(IsADirectoryError):
            blob.read("d")
        assert blob.read("s") == b"first"


# --- the footer


@pytest.mark.parametrize("data", [b"", b"x", bytes(50), bytes(51), bytes(4096), member(b"x" * 100)])
def test_no_footer(data: bytes) -> None:
    with pytest.raises(BlobError, match="no eStargz footer"):
        blobs.open(data)


def test_cut_blobs() -> None:
    """A prefix of a blob is never taken for one."""
    data = estargz(tar_of(("a", b"x")))
    for cut in range(len(data)):
        with pytest.raises(BlobError):
            blobs.open(data[:cut])


@pytest.mark.parametrize(
    "digits",
    [
        b"000000000000000g",
        b"-000000000000001",
        b"+000000000000001",
        b"0x00000000000001",
        b" 000000000000001",
        b"0_00000000000001",
        b"\xd9\xa1" * 8,
        b"000000000000001\n",
        bytes(16),
    ],
)
def test_footer_digits(digits: bytes) -> None:
    data = estargz(TAR, make_footer=lambda offset: made.footer(offset, digits))
    with pytest.raises(BlobError, match="where 16 hexadecimal digits belong"):
        blobs.open(data)


def test_upper_case_digits_are_digits() -> None:
    tar = tar_of(("a", RNG.randbytes(0xABC)))
    with blobs.open(estargz(tar, make_footer=lambda offset: made.footer(offset, b"%016X" % offset))) as blob:
        assert blob.read("a")


@pytest.mark.parametrize("offset", [1 << 20, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
@pytest.mark.parametrize("make", [made.footer, made.legacy_footer])
def test_offset_outside(offset: int, make: Any) -> None:
    with pytest.raises(BlobError, match="outside the blob"):
        blobs.open(estargz(TAR, make_footer=lambda _: make(offset)))


@pytest.mark.parametrize("shift", [-1, 1, 5])
def test_offset_into_nowhere(shift: int) -> None:
    with pytest.raises(BlobError):
        blobs.open(estargz(TAR, make_footer=lambda offset: made.footer(offset + shift)))


def test_toc_offset_at_another_member() -> None:
    with pytest.raises(BlobError, match=r"leads to no stargz\.index\.json"):
        blobs.open(estargz(TAR, make_footer=lambda offset: made.footer(0)))


def test_external_toc_is_named() -> None:
    with pytest.raises(BlobError, match="TOC in another image"):
        blobs.open(member(TAR) + made.EXTERNAL_FOOTER)


# --- the TOC's member


@pytest.mark.parametrize("name", ["./stargz.index.json", "/stargz.index.json", "stargz.index.jsom", "x"])
def test_toc_name(name: str) -> None:
    with pytest.raises(BlobError, match=r"leads to no stargz\.index\.json"):
        blobs.open(estargz(TAR, name=name))


@pytest.mark.parametrize("split", [[512], [600], [1], [511]])
def test_toc_in_two_members(split: list[int]) -> None:
    with pytest.raises(BlobError, match=r"one member|leads to no"):
        blobs.open(estargz(TAR, split=split))


def test_toc_digest() -> None:
    data = estargz(TAR)
    with blobs.open(data) as blob:
        right = blob.toc_digest
    blobs.open(data, toc_digest=right).close()
    with pytest.raises(VerificationError, match=f"expected sha256:{'0' * 64}, found {right}"):
        blobs.open(data, toc_digest="sha256:" + "0" * 64)
    for wrong in ("", right[7:], right.upper(), "sha512:" + right[7:], right + "\n", right + "0", "sha256:../../x"):
        with pytest.raises(UsageError, match="64 lower-case"):
            blobs.open(data, toc_digest=wrong)


def test_toc_is_hashed_before_it_is_parsed() -> None:
    data = assemble(member(TAR), b"{ no JSON")
    with pytest.raises(VerificationError, match="TOC digest"):
        blobs.open(data, toc_digest="sha256:" + "0" * 64)
    with pytest.raises(BlobError, match="malformed JSON"):
        blobs.open(data, toc_digest=digest(b"{ no JSON"))


def test_toc_bomb(tmp_path: Path) -> None:
    """A header that claims more than the limit stops before it is inflated; one that claims less bounds what is."""
    data = assemble(member(TAR), b" " * (8 << 20) + b"{}")
    with pytest.raises(BlobError, match=r"TOC takes 8388610 bytes, over 1000000; raise the limit"):
        blobs.open(data, limits=Limits(toc_size=1_000_000))
    payload = member(TAR)
    small = made.toc_tar(b"{}")
    bomb = payload + member(small + bytes(64 << 20)) + made.footer(len(payload))
    with pytest.raises(BlobError, match="something follows the TOC"):
        blobs.open(bomb)
    with pytest.raises(BlobError, match="over 100"):
        blobs.open(estargz(TAR), limits=Limits(toc_size=100))


def test_claimed_size_of_the_toc(tmp_path: Path) -> None:
    """Eight gigabytes claimed, few there."""
    text = made.toc_tar(b"{}")
    header = bytearray(text[:512])
    header[124:136] = b"77777777777\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    blob = member(bytes(header) + text[512:]) + made.footer(0)
    with pytest.raises(BlobError, match="over 1073741824"):
        blobs.open(blob)
    with pytest.raises(BlobError, match="the first gzip member of the TOC ends after 1536 of 8589934591 bytes"):
        blobs.open(blob, limits=Limits(toc_size=1 << 34))


@pytest.mark.parametrize(
    ("at", "value"), [(124, b"9"), (124, b"\x80"), (124, b"-"), (148, b"0777777"), (156, b"5"), (156, b"x")]
)
def test_toc_header_is_checked(at: int, value: bytes) -> None:
    text = bytearray(made.toc_tar(b'{"version":1,"entries":null}'))
    text[at : at + len(value)] = value
    if at != 148:
        text[148:156] = b" " * 8
        text[148:156] = b"%06o\0 " % sum(text[:512])
    with pytest.raises(BlobError, match="tar header of"):
        blobs.open(member(bytes(text)) + made.footer(0))


def test_toc_checksum_is_checked() -> None:
    data = bytearray(estargz(TAR))
    data[-51 - 6] ^= 1
    with pytest.raises(BlobError, match="TOC: gzip checksum mismatch"):
        blobs.open(bytes(data))


# --- the JSON


def test_json_as_go_reads_it() -> None:
    """Keys in another case, null, unknown keys, broken UTF-8, lone surrogates; the last of several spellings counts."""
    text = (
        b'{"Version":1,"ENTRIES":[{"NAME":"\xff\xe2\x82x","type":"reg","Size":null,"xattrs":null,"NumLink":3,"uid":-1},'
        b'{"name":"a","NAME":"b\\ud800","type":"dir","\xe2\x84\xaaelvin":1,"linKName":"x","xattrs":{"Key":"","key":null}}]}'
    )
    toc = parse_toc(text)
    assert toc.version == 1
    first, second = toc.entries
    assert (first.name, first.uid, first.size) == ("\ufffd\ufffd\ufffdx", -1, 0)
    assert (second.name, second.link_name, second.xattrs) == ("b\ufffd", "x", {"Key": "", "key": ""})
    assert parse_toc(b'{"version":1,"entries":null}').entries == []
    assert parse_toc(b"{}").entries == []


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"[]",
        b"1",
        b'{"entries":[1]}',
        b'{"entries":{}}',
        b'{"entries":[null]}',
        b'{"entries":[{"name":1}]}',
        b'{"entries":[{"name":"a","size":1.0}]}',
        b'{"entries":[{"name":"a","size":1e2}]}',
        b'{"entries":[{"name":"a","size":true}]}',
        b'{"entries":[{"name":"a","size":"1"}]}',
        b'{"entries":[{"name":"a","size":9223372036854775808}]}',
        b'{"entries":[{"name":"a","mode":NaN}]}',
        b'{"entries":[{"name":"a","xattrs":[]}]}',
        b'{"entries":[{"name":"a","xattrs":{"k":1}}]}',
        b'{"entries":null} x',
        b'{"entries":null}{}',
        b'{"entries":[',
        b'\xef\xbb\xbf{"entries":null}',
        b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"entries":[{"name":"a\nb"}]}',
    ],
)
def test_json_that_is_refused(text: bytes) -> None:
    with pytest.raises(BlobError, match="malformed JSON"):
        parse_toc(text)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("", ""),
        (".", ""),
        ("/", ""),
        ("./a/", "a"),
        ("//a//b/.", "a/b"),
        ("../../a", "a"),
        ("a/../../b", "b"),
        ("a/..", ""),
    ],
)
def test_names_are_cleaned(raw: str, clean: str) -> None:
    assert clean_name(raw) == clean


def test_go_text() -> None:
    assert go_text("ü\ufffd".encode()) == "ü\ufffd"
    assert go_text(b"a\xff\xfe") == "a\ufffd\ufffd"
    assert go_text(b"\xf0\x9f\x92x\xed\xa0\x80") == "\ufffd\ufffd\ufffdx\ufffd\ufffd\ufffd"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("", 0),
        ("1970-01-01T00:00:00Z", 0),
        ("1969-12-31T23:59:59Z", -1),
        ("2020-02-29T12:00:00Z", 1582977600),
        ("2020-02-29T14:00:00+02:00", 1582977600),
        ("0001-01-01T00:00:00Z", -62135596800),
        ("0000-03-01T00:00:00Z", -62162035200),
        ("9999-12-31T23:59:59Z", 253402300799),
        ("10000-01-01T00:00:00Z", 253402300800),
        ("2242-03-16T12:56:31Z", 8589934591 - 0),
    ],
)
def test_modtime(text: str, seconds: int) -> None:
    assert modtime_seconds(text) == seconds


@pytest.mark.parametrize(
    "text", ["x", "2020-02-30T00:00:00Z", "2020-01-01", "2020-01-01T00:00:00", "2020-01-01T00:00:00.5Z"]
)
def test_bad_modtime(text: str) -> None:
    with pytest.raises(ValueError):
        modtime_seconds(text)


def test_owner_names_are_inherited() -> None:
    entries = parse_toc(
        b'{"version":1,"entries":[{"name":"a","type":"dir"},{"name":"b","type":"dir","uid":1,"userName":"u"},'
        b'{"name":"c","type":"dir","uid":1},{"name":"d","type":"dir","uid":1,"gid":2,"userName":"v","groupName":"g"},'
        b'{"name":"e","type":"dir","uid":1,"gid":2},{"name":"f","type":"dir","gid":3}]}'
    ).entries
    assert list(owners(entries)) == [("", ""), ("u", ""), ("u", ""), ("v", "g"), ("v", "g"), ("", "")]


# --- the layout


def edited(name: str, /, **changes: Any) -> bytes:
    """The blob with 4000-byte chunks whose TOC says something else of one entry; name "chunk" is d/b's first chunk."""

    def edit(entries: list[dict[str, Any]]) -> None:
        found = next(e for e in entries if e["name"] == name or (name == "chunk" and e["type"] == "chunk"))
        found |= changes

    return estargz(TAR, edit=edit, chunk_size=4000)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("a", {"size": -1}, "negative"),
        ("a", {"offset": -1}, "negative"),
        ("a", {"innerOffset": -1}, "negative"),
        ("a", {"offset": 1 << 40}, "offset"),
        ("a", {"size": 1 << 62, "chunkSize": 1 << 61}, "chunks hold"),
        ("a", {"type": "socket"}, "unknown type 'socket'"),
        ("a", {"type": ""}, "unknown type ''"),
        ("a", {"chunkOffset": 1}, "does not fit"),
        ("a", {"chunkSize": 6}, "does not fit"),
        ("a", {"chunkSize": 4}, "chunks hold 4 of 5"),
        ("d/b", {"offset": 0}, "before the end of the payload in front"),
        ("d/c", {"offset": 1}, "before the end of the payload in front"),
        ("d/b", {"size": 1}, "does not fit"),
        ("d/b", {"type": "dir"}, "does not follow its file"),
        ("d/empty", {"chunkSize": 4}, "does not fit"),
        ("chunk", {"name": "other"}, "does not follow its file"),
        ("chunk", {"chunkOffset": 3999}, "does not fit"),
        ("chunk", {"chunkOffset": 4001}, "does not fit"),
        ("chunk", {"chunkSize": 1 << 62}, "does not fit"),
        ("chunk", {"type": "reg", "size": 4000, "chunkOffset": 0}, "chunks hold"),
    ],
)
def test_layout(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BlobError, match=message):
        blobs.open(edited(name, **changes))


def test_numbers_beyond_int64() -> None:
    for field in ("size", "offset", "innerOffset", "chunkOffset", "chunkSize"):
        for value in (1 << 63, 1 << 64, 1 << 200):
            with pytest.raises(BlobError, match=r"too large|out of range"):
                blobs.open(edited("a", **{field: value}))


def test_overlap_inside_a_member() -> None:
    """Two files in one member must not share bytes."""

    def edit(entries: list[dict[str, Any]]) -> None:
        entry_of(entries, "d/b")["innerOffset"] = entry_of(entries, "a")["innerOffset"] + 4

    with pytest.raises(BlobError, match="before the end of the payload in front"):
        blobs.open(estargz(TAR, edit=edit, min_chunk=1 << 20))


@pytest.mark.parametrize("size", [1 << 30, (1 << 30) + 1, 1 << 62])
def test_huge_single_chunk_is_never_trusted(size: int) -> None:
    with blobs.open(edited("a", size=size)) as blob, pytest.raises(BlobError, match=r"too early|over 1073741824"):
        blob.read("a")


def test_huge_last_chunk_is_never_trusted() -> None:
    with blobs.open(edited("d/b", size=1 << 62)) as blob, pytest.raises(BlobError, match="over 1073741824"):
        blob.read("d/b")


@pytest.mark.parametrize("inner", [6, 1 << 40, (1 << 63) - 6])
def test_inner_offset_beyond_the_member(inner: int) -> None:
    for data in (edited("a", innerOffset=inner),):
        for source in (data, Ranges(data)):
            with blobs.open(source) as blob, pytest.raises(BlobError):
                blob.read("a")


# --- links


def test_loops_of_links() -> None:
    tar = tar_of(("a", b"x"), link("one", "two"), link("two", "three"), link("three", "one"), link("self", "./self"))
    with blobs.open(estargz(tar)) as blob:
        for name in ("one", "two", "three", "self"):
            with pytest.raises(BlobError, match="leads back to itself"):
                blob.read(name)


def test_long_chain_of_links() -> None:
    tar = tar_of(("0", b"end"), *(link(str(i), str(i - 1)) for i in range(1, 3000)))
    with blobs.open(estargz(tar)) as blob:
        assert blob.read("2999") == b"end"


def test_link_out_of_the_layer() -> None:
    data = estargz(tar_of(link("h", "../../etc/passwd")))
    with blobs.open(data) as blob, pytest.raises(BlobError, match=r"links to '../../etc/passwd', which is not there"):
        blob.read("h")


# --- content


def test_content_that_was_exchanged() -> None:
    """A valid member with other bytes of the same length."""
    payload, toc = payload_and_toc(tar_of(("a", b"first"), ("b", b"other")))
    entries = toc["entries"]
    entries[0]["offset"], entries[0]["size"] = entries[1]["offset"], 5
    del entries[1]
    message = r"'a', chunk at 0 \(blob offset \d+\): expected sha256:"
    with blobs.open(assemble(payload, encode(toc))) as blob, pytest.raises(VerificationError, match=message):
        blob.read("a")


def test_entry_without_digest() -> None:
    def edit(entries: list[dict[str, Any]]) -> None:
        for key in ("digest", "chunkDigest"):
            entry_of(entries, "a").pop(key)

    with blobs.open(estargz(TAR, edit=edit)) as blob, pytest.raises(BlobError, match="no digest"):
        blob.read("a")


def test_chunks_without_digests_are_checked_as_a_whole() -> None:
    def edit(entries: list[dict[str, Any]]) -> None:
        for entry in entries:
            entry.pop("chunkDigest", None)

    data = estargz(TAR, edit=edit, chunk_size=3000, make_footer=made.legacy_footer)
    with blobs.open(data) as blob:
        assert list(blob.stream("d/b")) == [FILES["d/b"]]
    damaged = estargz(TAR, edit=lambda e: (edit(e), entry_of(e, "d/b").update(digest=digest(b""))), chunk_size=3000)
    with blobs.open(damaged) as blob, pytest.raises(VerificationError):
        next(blob.stream("d/b"))


def test_whole_digest_is_checked_after_the_chunks() -> None:
    data = estargz(TAR, edit=lambda e: entry_of(e, "d/b").update(digest=digest(b"")), chunk_size=3000)
    with blobs.open(data) as blob, pytest.raises(VerificationError, match="expected"):
        blob.read("d/b")


@pytest.mark.parametrize("options", [{}, {"chunk_size": 700}, {"chunk_size": 700, "min_chunk": 2000}], ids=str)
def test_flipped_bits_are_never_returned_as_data(options: dict[str, Any]) -> None:
    """Given the TOC's digest, no change of one bit anywhere yields other content."""
    files = {"a": b"first", "b": RNG.randbytes(1500), "c": b"text " * 300}
    data = estargz(tar_of(*files.items()), **options)
    with blobs.open(data) as blob:
        right = blob.toc_digest
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        try:
            with blobs.open(damaged, toc_digest=right) as blob:
                for name, content in files.items():
                    try:
                        assert blob.read(name) == content
                    except BlobError:
                        continue
        except BlobError:
            continue


def test_blob_cut_while_open(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    path.write_bytes(estargz(TAR))
    with blobs.open(path) as blob:
        os.truncate(path, 100)
        with pytest.raises(BlobError, match="ends too early"):
            blob.read("d/b")
        with pytest.raises(BlobError, match="ends too early"), blobs.blob_errors():
            blob.open_tar().read()


def test_range_reader_that_gives_too_much() -> None:
    class Much(Ranges):
        def read_at(self, offset: int, size: int) -> bytes:
            return bytes(size + 1)

    with pytest.raises(BlobError, match="its reader is faulty"):
        blobs.open(Much(estargz(TAR)))


# --- tars of any layer


@pytest.mark.parametrize(
    "pack", [bytes, member, lambda tar: member(tar) + bytes(512), estargz], ids=["tar", "gzip", "padded", "estargz"]
)
def test_open_tar_of_any_layer(pack: Any) -> None:
    with blobs.open_tar(pack(TAR)) as tar:
        assert tar.read() == TAR


def test_open_tar_reports_damage() -> None:
    with pytest.raises((BlobError, SourceError), match="ends too early"), blobs.open_tar(member(TAR)[:-1]) as tar:
        tar.read()
