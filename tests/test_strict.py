"""Strict verification: blobs that break one rule each, and what Go's own code says of them."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import re
import stat
import subprocess
import tarfile
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from reference.blobs import (
    assemble,
    digest,
    encode,
    estargz,
    legacy_footer,
    link,
    member,
    payload_and_toc,
    tar_of,
)
from reference.peer import report, run

import estargz as package
from estargz.cli import main
from estargz.errors import BlobError, UsageError, VerificationError
from estargz.reading import findings, strict
from estargz.reading.findings import BBOLT, CONTAINERS_STORAGE, FULL_PULL, MEMORY, RUNTIMES
from estargz.reading.toc_text import TOCText, read_text
from estargz.reading.verifying import verify

Entries = list[dict[str, Any]]
SNAPSHOTTER = (MEMORY, BBOLT)
LAZY = (MEMORY, BBOLT, CONTAINERS_STORAGE)


def special(name: str, kind: bytes = tarfile.REGTYPE, **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def spelled(edit: Callable[[str], str], tar: bytes) -> bytes:
    """A blob whose JSON was edited as text."""
    payload, toc = payload_and_toc(tar)
    return assemble(payload, edit(encode(toc).decode()).encode())


def named(*parts: bytes) -> bytes:
    """A tar of empty files whose names, of at most 100 bytes, are given as bytes."""
    tar = b""
    for part in parts:
        info = tarfile.TarInfo(part.decode("latin-1"))
        tar += info.tobuf(tarfile.USTAR_FORMAT, "latin-1")
    return tar + bytes(1024)


def with_extra_field(data: bytes, extra: bytes) -> bytes:
    """A gzip member whose header holds an extra field (RFC 1952, 2.3.1)."""
    plain = member(data)
    return plain[:3] + b"\x04" + plain[4:10] + len(extra).to_bytes(2, "little") + extra + plain[10:]


def with_name(data: bytes) -> bytes:
    out = io.BytesIO()
    with gzip.GzipFile("name", "wb", fileobj=out, mtime=0) as file:
        file.write(data)
    return out.getvalue()


def member_inside_a_header() -> bytes:
    """The TOC's member stands in another one's extra field, where whoever inflates from the front never comes."""
    tar = tar_of(("a", b"content"))
    head, rest = member(tar[:512]), tar[512:]
    payload = head + with_extra_field(rest, member(b"content") + member(b"")[:10])
    _, toc = payload_and_toc(tar)
    toc["entries"][0]["offset"] = len(head) + 12
    return assemble(payload, encode(toc))


def content_elsewhere() -> bytes:
    """A file of zeros whose offset leads to other zeros: those behind the end of the tar."""
    tar = tar_of(("a", bytes(700)))
    payload, toc = payload_and_toc(tar)
    toc["entries"][0]["offset"] = len(payload)
    return assemble(payload, encode(toc), before=member(bytes(1024)))


def landmark(name: str = ".no.prefetch.landmark", data: bytes = b"\x0f", **fields: Any) -> bytes:
    info = special(name, size=len(data), mode=0, **fields)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)


FILE = tar_of(("a", b"content"))
MODE = '"mode": 420'


@dataclass(frozen=True)
class Case:
    """A blob with one fault. ``go``: what Go's reader must do with it; None: it does not look there."""

    blob: bytes
    severity: str
    runtimes: tuple[str, ...] = ()
    entry: str | None = None
    go: bool | None = True


def case(tar: bytes, *rest: Any, go: bool | None = True, **options: Any) -> Case:
    return Case(estargz(tar, **options), *rest, go=go)


def drop(key: str) -> Callable[[Entries], object]:
    return lambda entries: [entry.pop(key, None) for entry in entries]


CASES: dict[str, Case] = {
    "legacy-footer": case(FILE, "warning", (CONTAINERS_STORAGE,), make_footer=legacy_footer),
    "toc-version": Case(spelled(lambda text: text.replace('"version": 1', '"version": 2'), FILE), "error"),
    "null-entries": case(bytes(1024), "warning", (BBOLT,)),
    "array-before-entries": Case(
        spelled(lambda text: text.replace('"version"', '"more": [1, {"a": []}],\n\t"version"'), FILE),
        "warning",
        (BBOLT,),
    ),
    "text-after-toc": Case(spelled(lambda text: text + " " * 300_000, FILE), "warning", (MEMORY,), go=False),
    "key-twice": Case(spelled(lambda text: text.replace(MODE, f"{MODE}, {MODE}"), FILE), "error", (), "a"),
    "key-case": Case(spelled(lambda text: text.replace('"mode"', '"Mode"'), FILE), "warning", (), "a"),
    "key-unknown": Case(spelled(lambda text: text.replace(MODE, f'{MODE}, "NumLink": 1'), FILE), "note", (), "a"),
    "no-chunk-digest": case(FILE, "warning", (BBOLT,), "a", edit=drop("chunkDigest"), go=None),
    "inner-offset": case(tar_of(("a", b"1"), ("b", b"2")), "warning", (CONTAINERS_STORAGE,), "a", min_chunk=1 << 20),
    "no-member": Case(member_inside_a_header(), "error", (), "a"),
    "other-place": Case(content_elsewhere(), "error", (), "a"),
    "member-header": case(FILE, "warning", before=with_name(bytes(512))),
    "no-archive-end": case(tar_of(("a", b"content"), end=False), "note"),
    "half-archive-end": case(tar_of(("a", b"content"), end=False) + bytes(512), "error", (FULL_PULL,)),
    "hidden-data": case(FILE, "error", before=member(bytes(700) + b"hidden" + bytes(318))),
    "second-archive": case(FILE, "error", before=member(bytes(2048) + tar_of(("hidden", b"x")))),
    "name-not-utf8": case(named(b"caf\xe9"), "warning", LAZY, "caf\ufffd", go=None),
    "name-control": case(named(b"a\nb"), "warning", (), "a\nb"),
    "name-outside": case(named(b"a/../../b"), "error", (), "a/../../b"),
    "name-long": case(tar_of(("a" * 256, b"1")), "error", (CONTAINERS_STORAGE, FULL_PULL), "a" * 256),
    "name-unclean": case(named(b"/a"), "warning", (), "/a"),
    "name-again": case(tar_of(("a", b"1"), ("a", b"2")), "warning", (CONTAINERS_STORAGE,), "a"),
    "directory-again": case(tar_of(("a/", b""), ("a/", b"")), "note", (), "a/"),
    "directory-and-file": case(tar_of(("a", b""), ("a/b", b""), ("a/", b"")), "error", RUNTIMES, "a/", go=None),
    "no-parent": case(tar_of(("a/b/c", b"1")), "note", (), "a/"),
    "below-file": case(tar_of(("a", b"1"), ("a/b", b"1")), "error", RUNTIMES, "a", go=None),
    "below-symlink": case(
        tar_of(("b/", b""), link("a", "b", tarfile.SYMTYPE), ("a/c", b"1")), "warning", SNAPSHOTTER, "a", go=None
    ),
    "link-target-missing": case(tar_of(link("a", "gone")), "warning", LAZY, "a", go=False),
    "link-target-behind": case(tar_of(link("a", "b"), ("b", b"1")), "error", (BBOLT, FULL_PULL), "a"),
    "link-target-replaced": case(
        tar_of(("b", b"1"), link("a", "b"), ("b", b"2")), "warning", (MEMORY, CONTAINERS_STORAGE), "a", go=None
    ),
    "link-loop": case(tar_of(link("a", "a")), "error", RUNTIMES, "a", go=False),
    "link-to-directory": case(tar_of(("b/", b""), link("a", "b")), "error", RUNTIMES, "a", go=None),
    "link-to-device": case(
        tar_of(special("b", tarfile.FIFOTYPE), link("a", "b")), "warning", (CONTAINERS_STORAGE,), "a"
    ),
    "whiteout-behind": case(tar_of(("a", b"1"), (".wh.a", b"")), "error", RUNTIMES, ".wh.a", go=None),
    "whiteout-beside": case(tar_of((".wh.a", b""), ("a", b"1")), "warning", (CONTAINERS_STORAGE,), ".wh.a"),
    "whiteout-of-nothing": case(tar_of((".wh..", b"")), "error", (FULL_PULL,), ".wh.."),
    "reserved-name": case(tar_of(("./stargz.index.json", b"{}")), "error", (), "./stargz.index.json"),
    "several-landmarks": case(
        landmark() + landmark(".prefetch.landmark") + bytes(1024), "error", (), ".no.prefetch.landmark"
    ),
    "landmark-content": case(landmark(data=b"\x0e") + bytes(1024), "error", (), ".no.prefetch.landmark"),
    "landmark-metadata": case(landmark(uid=3) + bytes(1024), "warning", (), ".no.prefetch.landmark"),
    "landmark-spelling": case(landmark("./.prefetch.landmark") + bytes(1024), "warning", (), "./.prefetch.landmark"),
    "landmark-place": case(
        tar_of(("a", b"1"), end=False) + landmark() + bytes(1024), "warning", (), ".no.prefetch.landmark"
    ),
    "payload-at-zero": case(tar_of(("a", b""), ("b", b"2")), "warning", (MEMORY,), "b", min_chunk=1 << 20, go=None),
}
# What a case cannot do without: it is a fault of its own.
ALONGSIDE = {
    "no-parent": {"no-parent"},
    "link-target-replaced": {"name-again"},
    "inner-offset": {"inner-offset"},
    "payload-at-zero": {"inner-offset"},
    "array-before-entries": {"key-unknown"},
    "no-member": {"member-header"},
}
# codes without a case of their own above: they have tests below
ELSEWHERE = {"large-toc", "modtime-format"}


@pytest.mark.parametrize("code", CASES)
def test_one_fault(code: str) -> None:
    wanted = CASES[code]
    found = verify(wanted.blob, strict=True)
    assert set(found.finding_counts) == {code, *ALONGSIDE.get(code, set())}
    finding = next(finding for finding in found.findings if finding.code == code)
    assert (finding.severity, finding.entry, finding.runtimes) == (wanted.severity, wanted.entry, wanted.runtimes)
    refused = {runtime for finding in found.findings for runtime in finding.runtimes}
    assert found.accepted == {runtime: runtime not in refused for runtime in RUNTIMES}
    assert any(error.code == code for error in found.errors) == (wanted.severity == "error")
    assert verify(wanted.blob).findings == ()


def test_all_codes_have_a_case_and_are_documented() -> None:
    source = Path(strict.__file__).read_text()
    codes = set(re.findall(r'"(?:error|warning|note)",\s*"([a-z0-9-]+)"', source)) | {"second-archive", "hidden-data"}
    assert codes == set(CASES) | ELSEWHERE
    text = (Path(__file__).parent.parent / "docs" / "format.md").read_text()
    assert [code for code in sorted(codes) if f"`{code}`" not in text] == []


# --- by Go's own code


@pytest.mark.parametrize("code", CASES)
def test_go_reader_agrees(code: str, peer: Path, tmp_path: Path) -> None:
    """The snapshotter's memory store is this reader: what it refuses is not called accepted, and the other way round."""
    (tmp_path / "blob").write_bytes(CASES[code].blob)
    done = subprocess.run([peer, "verify", tmp_path / "blob"], capture_output=True, text=True, check=False, timeout=60)
    accepted = verify(CASES[code].blob, strict=True).accepted[MEMORY]
    if CASES[code].go is not None:
        assert (done.returncode == 0, accepted) == (CASES[code].go, CASES[code].go), done.stderr


@pytest.mark.parametrize("code", CASES)
def test_containerd_unpacks_what_a_full_pull_accepts(code: str, peer: Path, tmp_path: Path, root: None) -> None:
    (tmp_path / "blob").write_bytes(CASES[code].blob)
    (tmp_path / "tree").mkdir()
    if code == "link-target-missing":
        (tmp_path / "tree" / "gone").touch()  # from a lower layer
    command = [peer, "apply", "-no-same-owner", tmp_path / "blob", tmp_path / "tree"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    accepted = verify(CASES[code].blob, strict=True).accepted[FULL_PULL]
    if code == "whiteout-behind":  # it unpacks, and then the file that the TOC has is gone
        assert done.returncode == 0 and not accepted and not (tmp_path / "tree" / "a").exists()
    else:
        assert (done.returncode == 0) == accepted, done.stderr


@pytest.mark.parametrize("how", ["lossless", "build"])
@pytest.mark.parametrize("options", [[], ["-chunk-size", "4000"], ["-chunk-size", "1000", "-min-chunk-size", "9000"]])
def test_blobs_by_go_have_no_errors(how: str, options: list[str], peer: Path, tmp_path: Path) -> None:
    tar, blob = tmp_path / "in.tar", tmp_path / "blob"
    tar.write_bytes(tree_tar())
    report(peer, "blob", "-how", how, *options, tar, blob)
    found = verify(blob, strict=True)
    expected = {"no-archive-end": 1} if how == "build" else {}
    assert {code for code in found.finding_counts if code not in ("inner-offset", "payload-at-zero")} == set(expected)
    assert found.errors == ()
    assert found.accepted[BBOLT] and found.accepted[FULL_PULL]
    assert found.accepted[CONTAINERS_STORAGE] == (len(options) < 4)


def test_blobs_by_buildkit_and_by_this_package_have_no_findings(peer: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    with tarfile.open(fileobj=io.BytesIO(tree_tar())) as tar:
        tar.extractall(tree, filter="tar")
    report(peer, "blob", "-how", "buildkit", tree, tmp_path / "buildkit")
    package.build(tree, tmp_path / "tree.esgz", chunk_size=4096)
    package.build(tmp_path / "buildkit", tmp_path / "tar.esgz")
    for name in ("buildkit", "tree.esgz", "tar.esgz"):
        found = verify(tmp_path / name, strict=True, runtimes=["stargz-snapshotter", "containers-storage", "full-pull"])
        assert (found.findings, found.finding_counts) == ((), {})
        assert all(found.accepted.values())


def tree_tar() -> bytes:
    """A tree as layers have it: folders in front of what they hold, links behind what they lead to."""
    random_bytes = random.Random(1889).randbytes
    return tar_of(
        ("d/", b""),
        ("d/.wh.gone", b""),
        ("d/empty", b""),
        ("d/large", random_bytes(30_000)),
        ("d/small", b"small"),
        link("hard", "d/small"),
        link("hard again", "hard"),
        link("soft", "../outside", tarfile.SYMTYPE),
        link("hard to soft", "soft"),
        ("opaque/", b""),
        ("opaque/.wh..wh..opq", b""),
        ("opaque/é", b"not ASCII"),
    )


# --- one rule at a time


@pytest.mark.parametrize("name", [b"//a", b"a//b", b"a/./b", b"a/.", b"a/../b", b"/"])
def test_unclean_names(name: bytes) -> None:
    assert "name-unclean" in verify(estargz(named(name)), strict=True).finding_counts


@pytest.mark.parametrize("name", [b"./", b"./a", b"..a/b..", b"a/...", b".a", "é".encode()])
def test_clean_names(name: bytes) -> None:
    assert set(verify(estargz(named(name)), strict=True).finding_counts) <= {"no-parent"}


@pytest.mark.parametrize("name", [b"..", b"../a", b"a/../..", b"/.."])
def test_names_outside(name: bytes) -> None:
    assert [error.code for error in verify(estargz(named(name)), strict=True).errors] == ["name-outside"]


def test_link_target_that_is_no_text() -> None:
    info = link("soft", "caf\xe9", tarfile.SYMTYPE)
    blob = estargz(info.tobuf(tarfile.USTAR_FORMAT, "latin-1") + bytes(1024))
    assert verify(blob, strict=True).finding_counts == {"name-not-utf8": 1}


def test_time_beyond_year_9999(tmp_path: Path) -> None:
    package.build(io.BytesIO(tar_of(special("a", mtime=253_402_300_800))), tmp_path / "blob")
    (finding,) = verify(tmp_path / "blob", strict=True).findings
    assert (finding.code, finding.entry, finding.runtimes) == ("modtime-format", "a", LAZY)
    assert "10000-01-01T00:00:00Z" in finding.message


@pytest.mark.parametrize("size", ["compressed", "json"])
def test_table_beyond_the_limit(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    payload, toc = payload_and_toc(tar_of(*((f"{i:03}", b"") for i in range(100))))
    blob = assemble(payload, encode(toc))
    limit = len(blob) - len(payload) - 51 if size == "compressed" else len(encode(toc))
    assert len(encode(toc)) > len(blob) - len(payload)
    monkeypatch.setattr(strict, "_CS_TOC_MAX", limit)
    assert verify(blob, strict=True).finding_counts == ({} if size == "json" else {"large-toc": 1})
    monkeypatch.setattr(strict, "_CS_TOC_MAX", len(encode(toc)) - 1)
    (finding,) = verify(blob, strict=True).findings
    assert (finding.code, finding.severity, finding.runtimes) == ("large-toc", "warning", (CONTAINERS_STORAGE,))


def test_chunks_without_digests_of_their_own() -> None:
    blob = estargz(tar_of(("a", bytes(1000))), chunk_size=400, edit=drop("chunkDigest"))
    (finding,) = verify(blob, strict=True).findings
    assert (finding.code, finding.entry, finding.runtimes) == ("no-chunk-digest", "a", SNAPSHOTTER)


def test_chunk_border_in_another_place() -> None:
    """The first chunk's member holds more than the chunk, whose bytes are all alike."""
    tar = tar_of(("a", bytes(1000)))
    members = [member(tar[begin:end]) for begin, end in ((0, 512), (512, 1012), (1012, 1112), (1112, None))]
    _, toc = payload_and_toc(tar, chunk_size=400)
    for entry, offset in zip(toc["entries"], (1, 2, 3), strict=True):
        entry["offset"] = sum(map(len, members[:offset]))
    assert [entry.get("chunkOffset", 0) for entry in toc["entries"]] == [0, 400, 800]
    toc["entries"][1] |= {"chunkSize": 100, "chunkDigest": digest(bytes(100))}
    toc["entries"][2] |= {"chunkOffset": 500, "chunkDigest": digest(bytes(500))}
    found = verify(assemble(b"".join(members), encode(toc)), strict=True)
    assert found.finding_counts == {"other-place": 2}
    assert [finding.message for finding in found.errors] == [
        "its chunk at 400 leads to byte 1012 of the tar, where the tar has it at byte 912",
        "its chunk at 500 leads to byte 1112 of the tar, where the tar has it at byte 1012",
    ]


def test_several_members_in_front_of_a_payload(tmp_path: Path) -> None:
    """Members that the TOC does not name are no fault, wherever their borders are."""
    tar = tar_of(("a", b"1" * 5000), ("b", b"2" * 5000), ("c", b""))
    cuts = [0, 100, 512, 700, 701, 6000, 6144, 7000, len(tar)]
    members = [member(tar[begin:end]) for begin, end in pairwise(cuts)]
    _, toc = payload_and_toc(tar)
    for entry, cut in zip(toc["entries"], (512, 6144), strict=False):
        entry["offset"] = sum(map(len, members[: cuts.index(cut)]))
    found = verify(assemble(b"".join(members), encode(toc)), strict=True, threads=1)
    assert (found.findings, found.entries) == ((), 3)


def test_links_that_lead_in_a_circle(peer: Path, tmp_path: Path) -> None:
    links = [link(str(i), str((i + 1) % 7)) for i in range(7)] + [
        link("into", "3"),
        ("file", b""),
        link("good", "file"),
    ]
    (tmp_path / "blob").write_bytes(estargz(tar_of(*links)))
    found = verify(tmp_path / "blob", strict=True)
    assert [f.entry for f in found.findings if f.code == "link-loop"] == [*map(str, range(7)), "into"]
    assert found.finding_counts == {"link-loop": 8, "link-target-behind": 6}
    assert subprocess.run([peer, "verify", tmp_path / "blob"], capture_output=True, check=False).returncode


@pytest.mark.parametrize(
    ("entries", "code", "runtimes"),
    [
        (("d/.wh.x", "d/x/"), "whiteout-beside", LAZY),
        (("d/.wh.x", "d/x/below"), "whiteout-beside", LAZY),
        (("d/x/below", "d/.wh.x"), "whiteout-behind", RUNTIMES),
        (("d/x", ".wh.x", "e/.wh.x", "x.wh.d"), None, ()),
        (("d/.wh..wh..opq", "d/x"), None, ()),
    ],
)
def test_whiteouts(entries: tuple[str, ...], code: str | None, runtimes: tuple[str, ...]) -> None:
    found = verify(estargz(tar_of(*((name, b"") for name in entries))), strict=True)
    seen = [(finding.code, finding.runtimes) for finding in found.findings if finding.code != "no-parent"]
    assert seen == ([(code, runtimes)] if code else [])


def test_file_with_entries_below_that_only_comes_later() -> None:
    found = verify(estargz(tar_of(("a/b", b""), ("a/c", b""), ("a", b""), ("a/d", b""))), strict=True)
    assert [(finding.code, finding.entry) for finding in found.findings] == [("directory-and-file", "a")]


def test_prefetch_landmark_is_in_order(peer: Path, tmp_path: Path) -> None:
    tar, names = tmp_path / "in.tar", tmp_path / "names"
    tar.write_bytes(tree_tar())
    names.write_text("d/small\n")
    report(peer, "blob", "-how", "build", "-prioritized", names, tar, tmp_path / "blob")
    found = verify(tmp_path / "blob", strict=True)
    assert set(found.finding_counts) == {"no-archive-end"}


def test_directories_that_nothing_describes() -> None:
    """Of those inside each other the outermost."""
    names = ("a/b/c/d", "a/b/x/y", "e/", "e/f/g", "e/h/", "e/h/i")
    found = verify(estargz(tar_of(*((name, b"") for name in names))), strict=True)
    assert [(finding.code, finding.entry) for finding in found.findings] == [("no-parent", "a/"), ("no-parent", "e/f/")]


def test_many_little_members() -> None:
    """Nothing but their number makes the work: they are not read over and over again."""
    tar = tar_of(("a", b"1" * 3000))
    members = [member(tar[:512]), member(tar[512:]), *[member(b"")] * 30_000]
    _, toc = payload_and_toc(tar)
    toc["entries"][0]["offset"] = len(members[0])

    class Ranges:
        name = "blob"

        def __init__(self, blob: bytes) -> None:
            self.blob, self.size, self.read = blob, len(blob), 0

        def read_at(self, offset: int, size: int) -> bytes:
            part = self.blob[offset : offset + size]
            self.read += len(part)
            return part

    ranges = Ranges(assemble(b"".join(members), encode(toc)))
    assert verify(ranges, strict=True).findings == ()
    assert ranges.read < 30_000 * 5000


def soft(name: str, target: str) -> tarfile.TarInfo:
    return link(name, target, tarfile.SYMTYPE)


CHAIN = [soft(f"l{i}", f"l{i + 1}") for i in range(60)]


@pytest.mark.parametrize(
    ("entries", "codes"),
    [
        ([soft("a", "gone/../f"), ("f", b"")], {"a": "below-symlink"}),
        ([soft("a", "f/../d"), ("f", b""), ("d/", b"")], {"a": "below-file"}),
        ([soft("a", "../../d/./"), ("d/", b"")], {"a": "below-symlink"}),
        ([soft("a", "/d/up/d"), ("d/", b""), soft("d/up", "..")], {"a": "below-symlink"}),
        ([soft("a", "a/b")], {"a": "below-file"}),
        ([soft("a", "b"), soft("b", "c"), soft("c", "/b")], {"a": "below-file", "b": "below-file"}),
        ([soft("a", "gone"), soft("a/b", "f"), ("f", b"")], {"a": "below-symlink", "a/b": "below-symlink"}),
        ([("d/", b""), soft("a", "d"), soft("a/b", "f"), soft("d/b", "/f"), ("f", b"")],
         {"a": "below-symlink", "a/b": "below-file"}),
        ([*CHAIN, soft("a", "l21"), soft("b", "l20")], {"a": "below-symlink", "b": "below-file"}),
        ([*CHAIN, soft("b", "l20"), soft("a", "l21")], {"a": "below-symlink", "b": "below-file"}),
        ([soft("d", "."), soft("a", "d/" * 39 + "gone"), soft("b", "d/" * 40 + "gone")],
         {"a": "below-symlink", "b": "below-file"}),
    ],
)  # fmt: skip
def test_links_with_something_below(entries: list[Any], codes: dict[str, str]) -> None:
    found = verify(estargz(tar_of(*entries, *((f"{name}/x", b"") for name in codes))), strict=True)
    assert {f.entry: f.code for f in found.findings if f.code.startswith("below-")} == codes


def test_links_with_something_below_agree_with_linux(tmp_path: Path) -> None:
    """The kernel goes the same ways: what it calls a loop or no directory is blocked, and nothing else."""
    seen = dict.fromkeys(("below-symlink", "below-file"), 0)
    for seed in range(60):
        rng = random.Random(seed)
        tree = tmp_path / str(seed)
        tree.mkdir()
        names = [f"{folder}{name}" for folder in ("", "d/", "d/e/") for name in "abc"]
        parts = ("a", "b", "c", "d", "e", "f", "gone", "..", ".", "d/e")
        targets = {name: "/".join(rng.choices(parts, k=rng.randint(1, 4))) for name in names}
        (tree / "d" / "e").mkdir(parents=True)
        (tree / "f").touch()
        for name, target in targets.items():
            (tree / name).symlink_to(target)
        # Above the root there is the root: only here, so targets that leave it are left out.
        wanted = {}
        for name in names:
            try:
                inside = Path(os.path.realpath(tree / name)).is_relative_to(tree)
                if inside:
                    wanted[name] = "below-symlink" if stat.S_ISDIR((tree / name).stat().st_mode) else "below-file"
            except FileNotFoundError:
                wanted[name] = "below-symlink"
            except OSError:
                wanted[name] = "below-file"
        entries = [("d/", b""), ("d/e/", b""), ("f", b""), *(soft(*item) for item in targets.items())]
        found = verify(estargz(tar_of(*entries, *((f"{name}/x", b"") for name in wanted))), strict=True, threads=1)
        codes = {f.entry: f.code for f in found.findings if f.code.startswith("below-")}
        assert codes == wanted, (seed, targets)
        for code in codes.values():
            seen[code] += 1
    assert min(seen.values()) > 50


@pytest.mark.measured
def test_links_with_long_targets_cost_what_they_are() -> None:
    """Each of 40 targets is walked once, however many links lead through them."""
    deep = "d/" * 1000
    entries = [(deep + "x", b"")]
    entries += [soft(f"far{i}", deep + "../" * 1000 + f"far{i + 1}") for i in range(36)]  # type: ignore[misc]
    for i in range(300):
        entries += [soft(f"l{i}", "far0"), (f"l{i}/x", b"")]  # type: ignore[list-item]
    before = time.process_time()
    assert verify(estargz(tar_of(*entries)), strict=True, threads=1).finding_counts["below-symlink"] == 300
    assert time.process_time() - before < 5


# --- the spelling of the JSON


def test_text_is_read_alike_in_any_pieces() -> None:
    text = (
        b'\n{"Version" : 1.5, "more":{"a":[1,{"b":"}"}], "a" :2}, "more": "x", "entries": [{"name":"a\xff","type":"reg",'
        b'"xattrs":{"k":"\\u00e9","k":""}, "Mode":12345678901},\r\n\t{"type":"dir","name":"' + "é".encode() * 50 + b'",'
        b'"x":null,"u\xc4\xb1d":1,"type":"dir", "\xe2\x84\xaa":0, "u\xc5\xbferName":""}], "entries" : null}  \n '
    )
    found = [
        read_text(iter([text[i : i + size] for i in range(0, len(text), size)])) for size in (1, 2, 3, 64, len(text))
    ]
    assert found[1:] == found[:-1]
    (one, *_) = found
    second = "é" * 50
    assert (one.version, one.null_entries, one.array_in_front, one.trailing) == ("1.5", False, False, 4)
    assert one.twice == [(None, "more"), ("a\ufffd", "k"), (second, "type"), (None, "entries")]
    assert one.folded == [(None, "Version"), ("a\ufffd", "Mode"), (second, "u\u017ferName")]
    assert one.unknown == [(None, "more"), (None, "more"), (second, "x"), (second, "u\u0131d"), (second, "\u212a")]


def test_long_entries_are_read_like_short_ones() -> None:
    """What does not fit into memory's share of an entry is read key by key, with the same outcome."""

    def seen(filler: str) -> TOCText:
        entry = (
            f'{{"type":"reg","x":{filler},"x":1,"Mode":3,"name":"old","name":"a","xattrs":{{"k":"","l":"]","k":""}},'
            f'"y":{filler}}}'
        )
        text = f'{{"version":1,"z":{filler},"entries":[{entry},{{"name":"b","q":[]}}]}}'.encode()
        found = [read_text(iter([text[i : i + size] for i in range(0, len(text), size)])) for size in (70_001, 1 << 20)]
        assert found[0] == found[1]
        return found[0]

    short = seen("1")
    items = ['[[],{"a":"]}"}]', '"\\"[{\\\\"', "1.5e3", "null", '{"\\\\":[[[0]]]}']
    for filler in (
        "[" + ",".join(items * 40_000) + "]",
        '{"a":' * 300_000 + "1" + "}" * 300_000,
        '"' + '\\"]' * 600_000 + '"',
        "1" * 1_500_000,
    ):
        found = seen(filler)
        found.array_in_front = False
        assert found == short
    assert short.twice == [("a", key) for key in ("x", "name", "k")]
    assert short.unknown == [(None, "z"), ("a", "x"), ("a", "x"), ("a", "y"), ("b", "q")]


@pytest.mark.parametrize("where", ["table", "entry", "xattrs"])
def test_keys_of_one_object_are_bounded(where: str) -> None:
    def text(count: int) -> bytes:
        keys = ",".join(f'"{i}":""' for i in range(count))
        return {
            "table": f'{{"version":1,{keys},"entries":[]}}',
            "entry": f'{{"version":1,"entries":[{{"name":"a",{keys}}}]}}',
            "xattrs": f'{{"version":1,"entries":[{{"name":"a","xattrs":{{{keys}}}}}]}}',
        }[where].encode()

    assert read_text(iter([text(9_998)])).version == 1
    with pytest.raises(BlobError, match="blob: an object has more than 10000 keys"):
        read_text(iter([text(10_001)]), name="blob")


def test_texts_that_are_decoded_are_bounded() -> None:
    for size, fits in (((1 << 24) - 20, True), ((1 << 24) - 1, False)):
        text = b'{"version":1,"%s":1,"entries":[]}' % (b"a" * size)
        for piece in (1 << 20, len(text)):
            pieces = (text[i : i + piece] for i in range(0, len(text), piece))
            if fits:
                assert read_text(pieces).unknown == [(None, "a" * 256 + "...")]
            else:
                with pytest.raises(BlobError, match="more than 16777216 characters"):
                    read_text(pieces)


def test_values_of_unknown_keys_cost_no_memory() -> None:
    text = b'{"version":1,"x":[' + b"[]," * 2_000_000 + b'[]],"entries":[]}'
    tracemalloc.start()
    try:
        assert read_text(text[i : i + (1 << 20)] for i in range(0, len(text), 1 << 20)).array_in_front
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_spelling_by_writers_in_use(peer: Path, tmp_path: Path) -> None:
    """Of a TOC in many pieces nothing is lost: it is said to hold what Python's own decoder finds in it."""
    tar = tar_of(*((f"directory/{i}", b"") for i in range(6000)))
    package.build(io.BytesIO(tar), tmp_path / "blob")
    assert verify(tmp_path / "blob", strict=True).finding_counts == {"no-parent": 1}
    payload, toc = payload_and_toc(tar)
    toc["entries"][4321]["Name"] = toc["entries"][4321].pop("name")
    for indent in (None, "\t"):
        (finding, _) = verify(assemble(payload, json.dumps(toc, indent=indent).encode()), strict=True).findings
        assert (finding.code, finding.entry) == ("key-case", "directory/4321")


# --- what is made of it


def test_made_up_layers_that_are_accepted_look_alike(peer: Path, tmp_path: Path, root: None) -> None:
    """Entries that replace, remove, link and contain each other: what is accepted unpacks, and Go's reader serves the same."""
    seen = dict.fromkeys((True, False), 0)
    for seed in range(150):
        blob, tree = tmp_path / "blob", tmp_path / str(seed)
        blob.write_bytes(estargz(made_up(random.Random(seed)), chunk_size=400))
        tree.mkdir()
        found = verify(blob, strict=True, threads=1)
        accepted = found.accepted[MEMORY] and found.accepted[FULL_PULL]
        seen[accepted] += 1
        if accepted:
            run(peer, "apply", "-no-same-owner", blob, tree)
            assert served(run(peer, "read", blob)) == unpacked(tree), (seed, found)
    assert min(seen.values()) > 30


PATHS = ("a", "b", "c", "d", "a/b", "a/c", "b/a", "a/b/c", ".wh.a", "a/.wh.b", "c/.wh..wh..opq")


def made_up(rng: random.Random) -> bytes:
    entries: list[tuple[str, bytes] | tarfile.TarInfo] = []
    for _ in range(rng.randint(1, 5)):
        name, kind = rng.choice(PATHS), rng.choice("rrrddslf")
        if ".wh." in name:
            entries.append((name, b""))
        elif kind == "r":
            entries.append((name, rng.randbytes(rng.choice((0, 3, 900)))))
        elif kind == "d":
            entries.append((f"{name}/", b""))
        elif kind == "f":
            entries.append(special(name, tarfile.FIFOTYPE))
        else:
            entries.append(link(name, rng.choice(PATHS[:8]), tarfile.SYMTYPE if kind == "s" else tarfile.LNKTYPE))
    return tar_of(*entries)


def served(listing: bytes) -> dict[str, tuple[str, str]]:
    """What the reader serves, from the root down: path -> type, and content or target."""
    rows = {row["name"]: row for row in map(json.loads, listing.splitlines()) if not row.get("hidden")}
    found = {}
    paths = [name for name in rows.get("", {}).get("children", ())]
    for path in paths:
        row = rows[path]
        row = rows[row["target"]] if row["type"] == "hardlink" else row
        assert "error" not in row
        if not Path(path).name.startswith(".wh."):
            found[path] = (row["type"], row.get("digest") or row.get("link_name") or "")
        if rows[path]["type"] == "dir":
            paths += [f"{path}/{name}" for name in rows[path].get("children", ())]
    return found


def unpacked(tree: Path) -> dict[str, tuple[str, str]]:
    """The same of a directory."""
    found = {}
    for path in tree.rglob("*"):
        kind = stat.S_IFMT(path.lstat().st_mode)
        what = {
            stat.S_IFREG: lambda path=path: ("reg", digest(path.read_bytes())),
            stat.S_IFLNK: lambda path=path: ("symlink", os.readlink(path)),
            stat.S_IFDIR: lambda: ("dir", ""),
            stat.S_IFIFO: lambda: ("fifo", ""),
        }
        found[str(path.relative_to(tree))] = what[kind]()
    return found


def test_many_findings_are_counted_and_the_first_are_kept() -> None:
    tar = tar_of(*((name, b"") for i in range(150) for name in (f"{i:03}\n", f"/{i:03}")))
    found = verify(estargz(tar), strict=True)
    assert found.finding_counts == {"name-control": 150, "name-unclean": 150}
    assert [finding.entry for finding in found.findings if finding.code == "name-unclean"] == [
        f"/{i:03}" for i in range(findings.KEPT_MAX)
    ]
    assert len(found.findings) == 2 * findings.KEPT_MAX


def test_repeated_keys_beyond_what_is_kept() -> None:
    tar = tar_of(*((f"{i:03}", b"") for i in range(150)))
    blob = spelled(lambda text: text.replace(MODE, f"{MODE}, {MODE}"), tar)
    found = verify(blob, strict=True)
    assert (found.finding_counts, len(found.findings)) == ({"key-twice": 150}, 100)


@pytest.mark.parametrize("runtime", findings.FAMILIES)
def test_required_runtimes(runtime: str) -> None:
    blob = CASES["inner-offset"].blob
    found = verify(blob, runtimes=[runtime])
    assert bool(found.errors) == (runtime == "containers-storage")
    assert found.accepted == verify(blob, strict=True).accepted


def test_runtimes_that_do_not_exist() -> None:
    with pytest.raises(UsageError, match="no runtime is called 'docker'; there are stargz-snapshotter, "):
        verify(CASES["inner-offset"].blob, runtimes=["docker"])


def test_order_of_findings() -> None:
    blob = estargz(named(b"/a", b"../b", b"c/d\n"), make_footer=legacy_footer)
    found = verify(blob, strict=True)
    assert [finding.code for finding in found.findings] == [
        "name-outside", "legacy-footer", "name-unclean", "name-control", "no-parent",
    ]  # fmt: skip


def test_mismatches_are_raised_as_ever() -> None:
    with pytest.raises(VerificationError, match="mode: the tar has 420"):
        verify(estargz(FILE, edit=lambda entries: entries[0].update(mode=1)), strict=True)
    with pytest.raises(BlobError, match="no eStargz footer"):
        verify(gzip.compress(FILE), diff_id=digest(FILE), strict=True)
    blob = bytearray(estargz(FILE))
    blob[60] ^= 1
    with pytest.raises(BlobError):
        verify(bytes(blob), strict=True)


@pytest.mark.parametrize("options", [{}, {"chunk_size": 700, "min_chunk": 2000}], ids=str)
def test_damage_anywhere_is_reported_in_order(options: dict[str, Any]) -> None:
    """Whatever byte is changed, there is an error of this package or a report."""
    tar = tar_of(("d/", b""), ("d/a", b"text " * 300), (".wh.x", b""), link("l", "d/a"), ("x/y", b""))
    payload, toc = payload_and_toc(tar, **options)
    text = encode(toc)
    for position in range(len(text)):
        damaged = bytearray(text)
        damaged[position] ^= 1 << position % 7
        try:
            verify(assemble(payload, bytes(damaged)), strict=True, threads=1)
        except BlobError:
            continue
    blob = assemble(payload, text)
    for position in range(len(blob)):
        damaged = bytearray(blob)
        damaged[position] ^= 1 << position % 8
        try:
            verify(bytes(damaged), strict=True, threads=1)
        except BlobError:
            continue


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def verify_case(code: str, *options: str) -> tuple[int, str]:
        (tmp_path / "blob").write_bytes(CASES[code].blob)
        status = main(["verify", str(tmp_path / "blob"), *options])
        return status, capsys.readouterr().out

    assert verify_case("inner-offset")[0] == 0
    status, text = verify_case("inner-offset", "--strict")
    assert status == 0
    assert "\ncontainers-storage        not accepted: inner-offset\n" in text
    assert "\nfull-pull                 accepted\n" in text
    assert "\nwarning     inner-offset: 'a': begins 512 bytes inside the member at 0" in text
    status, text = verify_case("inner-offset", "--for", "full-pull", "--for", "containers-storage")
    assert status == 1 and "\nerror       inner-offset: 'a'" in text
    assert verify_case("inner-offset", "--for", "podman")[0] == 2
    status, text = verify_case("name-outside", "--strict", "--json")
    found = json.loads(text)
    assert status == 1
    assert found["findings"] == [
        {
            "severity": "error",
            "code": "name-outside",
            "entry": "a/../../b",
            "message": "its name leads out of the root",
            "runtimes": [],
        }
    ]
    assert found["accepted"] == dict.fromkeys(RUNTIMES, True) and found["finding_counts"] == {"name-outside": 1}
