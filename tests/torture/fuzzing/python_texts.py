"""Targets: short texts that people, kernels and other programs write."""

from __future__ import annotations

import fnmatch
import io
import os
import re
from pathlib import Path
from typing import Any
from unittest import mock

from estargz import options
from estargz.cli.build import epoch_from_environment
from estargz.digest import parse_digest
from estargz.image.model import Platform, check_digest
from estargz.image.output import Output, _fields
from estargz.image.reference import Reference
from estargz.options import parse_size
from estargz.writing.access_log import PathPattern, escape, match, match_all, plain_line, read_access_log
from estargz.writing.priority import Priority

from .python_target import accepted, expect, peer, target


def _text(data: bytes) -> str:
    """As arguments of a command are."""
    return data.decode("utf-8", "surrogateescape")


# --------------------------------------------------------------------------------------------------------------------
# outputs, references, platforms, digests: what Go reads, too


@target(
    "output",
    *"type= image registry oci docker tar local name= push= dest= compression= estargz gzip zstd uncompressed".split(),
    *"compression-level= force-compression= chunk-size= min-chunk-size= oci-mediatypes= source-date-epoch=".split(),
    *'rewrite-timestamp= annotation. annotation-index. [linux/amd64]. true false , " "" = docker.io/a/b:c'.split(),
)
def output(data: bytes) -> None:
    text = _text(data)
    fields = accepted(_fields, text)
    mine = accepted(Output.parse, text, environ={})
    theirs = peer("output").ask(data)
    # A line is one: Go takes the first of several, and passes over those that are empty.
    if "\n" in text.removesuffix("\n") or "\r" in text:
        return
    # Levels go higher than BuildKit's here.
    if mine is not None and mine.compression_level is None:
        expect(theirs is not None, "BuildKit refuses it")
    # Go has small letters of its own for a few of the capitals beyond ASCII; no key that is known has any.
    if fields is not None and theirs is not None and text.isascii():
        expect(fields == theirs["attrs"], f"BuildKit reads {theirs['attrs']}, not {fields}")
    if mine is not None and theirs is not None and "compression" in (fields or {}):
        expect(mine.compression == theirs["compression"], f"BuildKit takes {theirs['compression']}")
        expect(mine.force_compression == theirs["force"], "BuildKit forces it, or does not")


@target("reference", *"docker:// oci: oci-archive: docker-archive: dir: localhost .io :5000 :latest @sha256:".split())
def reference(data: bytes) -> None:
    text = _text(data)
    for whole in (text, f"docker://{text}"):
        found = accepted(Reference.parse, whole)
        if found is not None:
            expect(Reference.parse(str(found)) == found, f"{found} is read as {Reference.parse(str(found))}")
    theirs = peer("reference").ask(data)
    if found is not None:
        mine = {key: getattr(found, key) for key in ("host", "repository", "tag", "digest") if getattr(found, key)}
        expect(mine == theirs, f"docker reads {theirs}, not {mine}")
    elif theirs is not None:
        expect(
            not theirs["host"] or _is_refused_by_choice(text), f"docker reads {theirs}"
        )  # in k_f.l/t it finds no host


def _is_refused_by_choice(text: str) -> bool:
    """What docker would take and nobody can mean: ports that there are not, digests of other algorithms, endless texts."""
    port = re.match(r"[^/@]*:([0-9]+)/", text)
    return len(text) > 4096 or "@sha384:" in text or (port is not None and (len(port[1]) > 5 or int(port[1]) > 65535))


@target("platform", *"linux windows darwin / amd64 arm64 arm v7 v8 aarch64 x86_64 armhf i386 386".split(), most=64)
def platform(data: bytes) -> None:
    text = _text(data)
    found = accepted(Platform.parse, text)
    if found is None:
        return
    expect(Platform.parse(str(found)) == found, f"{found} is read as {Platform.parse(str(found))}")
    theirs = peer("platform").ask(data)
    expect(theirs is not None, "containerd refuses it")


@target("digest", "sha256:", "sha512:", "0123456789abcdef" * 4, most=160)
def digest(data: bytes) -> None:
    text = _text(data)
    mine = accepted(check_digest, text)
    short = accepted(parse_digest, text)
    theirs = peer("digest").ask(data)
    expect((short is not None) == (mine is not None and mine.startswith("sha256:")), "two parsers of digests differ")
    expect((mine is not None) == (theirs is not None and not text.startswith("sha384:")), f"Go reads {theirs}")


# --------------------------------------------------------------------------------------------------------------------
# settings


@target("size", *"KiB MiB GiB TiB k M g t ib b".split(), most=64)
def size(data: bytes) -> None:
    text = _text(data)
    found = accepted(parse_size, text)
    if found is None:
        return
    expect(found >= 10**20 or parse_size(str(found)) == found, f"{found} is read otherwise")
    digits, unit = re.fullmatch(r"(\d+)(\D*)", re.sub(r"\s", "", text)).groups()  # type: ignore[union-attr]
    power = " kmgt".index(unit[:1].lower()) if unit and unit[0].lower() in "kmgt" else 0
    expect(found == int(digits) * 1024**power, f"{found} is not what {text!r} means")


@target("epoch", "0", "-1", "253402300799", "_", most=40)
def epoch(data: bytes) -> None:
    """SOURCE_DATE_EPOCH, as images and layers are given it."""
    text = _text(data).replace("\0", "")
    with mock.patch.dict(os.environ, SOURCE_DATE_EPOCH=text):
        layer = accepted(lambda: (epoch_from_environment(),))
    image = accepted(lambda: (Output.parse("type=oci", environ={"SOURCE_DATE_EPOCH": text}).source_date_epoch,))
    # An image states its times as RFC 3339, which has none before 1970 here and none behind 9999.
    if text.startswith("-") or (layer is not None and (layer[0] or 0) > 253402300799):
        layer = None
    expect(layer == image, f"a layer's bound is {layer}, an image's {image}")


@target("cgroup", *"0:: 1:cpu: cpu,cpuacct: / .. max 100000 -1".split(), runs=3_000)
def cgroup(data: bytes) -> None:
    """What /proc/self/cgroup says, and the two files that state how much of the CPUs there is."""
    contents = [*data.split(b"\xff"), b"", b"", b""]
    files = dict(zip(("cgroup", "cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us"), contents, strict=False))

    def opened(path: Path, mode: str = "r", *rest: Any, **more: Any) -> io.BytesIO | io.TextIOWrapper:
        content = io.BytesIO(files[path.name])
        return content if "b" in mode else io.TextIOWrapper(content)

    there = mock.patch.object(Path, "exists", lambda path: bool(files["cpu.max"]))
    with mock.patch.object(Path, "open", opened), there:
        count = options.usable_threads()
    expect(1 <= count <= len(os.sched_getaffinity(0)), f"{count} threads")


# --------------------------------------------------------------------------------------------------------------------
# access logs and patterns


@target(
    "access-log",
    *'{"path":" "layerIndex":0} open(" openat(AT_FDCWD<', *'execve(" chdir(" fchdir(3< clone( CLONE_FS ", O_RDONLY'.split(),
    ") = 3</a>", ") = 0", ") = -1", "[pid 1] ", "1 ", "<unfinished ...>", "<... openat resumed>", "+++ exited with 0 +++",
    "strace: Process 2 attached", "\\x2f", "\\177", "...", most=2048, runs=4_000,
)  # fmt: skip
def access_log(data: bytes) -> None:
    log = accepted(read_access_log, data, layer_index=0, cwd="/w")
    if log is None:
        return
    expect(len(set(log)) == len(log), "a pattern comes twice")
    for pattern in log[:20]:
        expect(PathPattern(pattern).text == pattern, f"{pattern!r} is not clean")
        path = PathPattern(pattern).literal
        if path is not None and not re.search(r"[\n\r]", path):
            line = plain_line(path).encode("utf-8", "surrogateescape")
            again = [PathPattern(pattern).literal for pattern in read_access_log(io.BytesIO(line))]
            expect(again == ([path] if path else []), f"{line!r} means {again}, not {path!r}")


@target(
    "pattern", "*", "**", "/**/", "?", "[a-z]", "[!a]", "[]]", "\\*", "\0", "usr/lib", ".wh.", "[[:alpha:]]", most=300
)
def pattern(data: bytes) -> None:
    """A pattern, and names that it is to choose from; all parted by NUL."""
    text, *names = _text(data).split("\0")
    names = [name for name in dict.fromkeys(PathPattern(escape(name)).text for name in names) if name]
    found = accepted(match, text, names)
    if found is None:
        return
    expect(match_all([text], names) == found, f"all at once, {match_all([text], names)} match, not {found}")
    if not re.search(r"[\\\[]|\*\*", text) and "/" not in text.strip("/") and text.strip("/") not in (".", ".."):
        simple = [name for name in names if "/" not in name and fnmatch.fnmatchcase(name, text.strip("/"))]
        expect(simple == found, f"{found} match, and {simple} by fnmatch")
    wanted = accepted(lambda: Priority([text]).resolve(lambda folder: _below(folder, names)))
    if wanted is not None and PathPattern(text).literal is None and PathPattern(text).text not in names:
        expect(wanted.split(b"\0")[:-1] == sorted(map(os.fsencode, found)), f"{wanted!r} comes first, not {found}")


def _below(folder: bytes, names: list[str]) -> bytes:
    inside = [os.fsencode(name) for name in names]
    return b"".join(name + b"\0" for name in inside if not folder or name.startswith(folder + b"/"))
