"""BuildKit's --output line: its quoting and its values as Go reads them, and everything else that is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from reference.peer import run

from estargz.errors import UsageError
from estargz.image.model import Platform
from estargz.image.output import Annotation, Output


def parse(text: str, **environ: str) -> Output:
    return Output.parse(text, environ=environ)


def go(peer: Path, *lines: str) -> list[dict[str, Any]]:
    """What Go makes of each line."""
    return [json.loads(line) for line in run(peer, "output", *lines).splitlines()]


# ------------------------------------------------------------------------------------------------- what BuildKit reads


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("type=image", Output("image")),
        ("type=image\n", Output("image")),
        ("TYPE=image,NAME=app", Output("image", names=("docker.io/library/app:latest",))),
        (
            'type=image,"name=app,ghcr.io/a/b:v1",push=true',
            Output("image", names=("docker.io/library/app:latest", "ghcr.io/a/b:v1"), push=True, store=False),
        ),
        ("type=registry,name=h.io/a", Output("image", names=("h.io/a:latest",), push=True, store=False)),
        ("type=registry,name=h.io/a,push=false", Output("image", names=("h.io/a:latest",))),
        ("type=image,name=h.io/a,push=,store=", Output("image", names=("h.io/a:latest",), push=True, store=True)),
        (
            "type=image,name=h.io/a,push=1,push-by-digest=,registry.insecure=T",
            Output("image", names=("h.io/a",), push=True, push_by_digest=True, insecure=True, store=False),
        ),
        ("type=oci", Output("oci")),
        ("type=oci,dest=-", Output("oci")),
        ("type=oci,dest=a=b", Output("oci", dest="a=b")),
        ("type=docker,dest=f,name=app:v1", Output("docker", dest="f", names=("docker.io/library/app:v1",))),
        ("type=oci,tar=false,dest=d", Output("oci", dest="d", tar=False)),
        ("type=tar,dest=f", Output("tar", dest="f")),
        ("type=local,dest=d", Output("local", dest="d")),
        ("type=oci,compression=estargz", Output("oci", compression="estargz")),
        (
            "type=oci,compression=estargz,compression-level=12,force-compression=,chunk-size=1MiB,min-chunk-size=50000",
            Output(
                "oci",
                compression="estargz",
                compression_level=12,
                force_compression=True,
                chunk_size=1 << 20,
                min_chunk_size=50_000,
            ),
        ),
        ("type=oci,compression=zstd,compression-level=19", Output("oci", compression="zstd", compression_level=19)),
        ("type=oci,compression=zstd,compression-level=0", Output("oci", compression="zstd")),
        ("type=oci,compression-level=0", Output("oci", compression_level=0)),
        (
            "type=docker,compression=zstd,oci-mediatypes=false",
            Output("docker", compression="zstd", oci_mediatypes=False),
        ),
        ("type=oci,source-date-epoch=5", Output("oci", source_date_epoch=5)),
        (
            "type=oci,source-date-epoch=5,rewrite-timestamp=1",
            Output("oci", source_date_epoch=5, rewrite_timestamp=True),
        ),
        (
            'type=oci,annotation.a.B=1,"annotation-index.c=2,3",annotation-manifest[linux/arm64].d=,'
            '"annotation-manifest-descriptor.e=""x""",annotation-index-descriptor.f=a=b',
            Output(
                "oci",
                annotations=(
                    Annotation("manifest", "a.b", "1"),
                    Annotation("index", "c", "2,3"),
                    Annotation("manifest", "d", "", Platform("linux", "arm64")),
                    Annotation("manifest-descriptor", "e", '"x"'),
                    Annotation("index-descriptor", "f", "a=b"),
                ),
            ),
        ),
    ],
)
def test_lines(text: str, expected: Output) -> None:
    assert parse(text) == expected


def test_the_environment_gives_the_time() -> None:
    assert parse("type=tar", SOURCE_DATE_EPOCH="7").source_date_epoch == 7
    assert parse("type=oci,rewrite-timestamp=true", SOURCE_DATE_EPOCH="0").rewrite_timestamp
    assert parse("type=oci,source-date-epoch=8", SOURCE_DATE_EPOCH="7").source_date_epoch == 8
    assert parse("type=oci,source-date-epoch=", SOURCE_DATE_EPOCH="7").source_date_epoch is None
    assert parse("type=oci", SOURCE_DATE_EPOCH="").source_date_epoch is None
    with pytest.raises(UsageError, match="SOURCE_DATE_EPOCH=x"):
        parse("type=oci", SOURCE_DATE_EPOCH="x")


def test_go_quotes_and_splits_alike(peer: Path) -> None:
    """Lines of random quotes, commas and equal signs around two annotations."""
    chance = random.Random(20)
    lines = []
    for _ in range(3000):
        fields = []
        for number in range(2):
            value = "".join(chance.choices('a,="\té ', (8, 2, 2, 3, 1, 1, 1), k=chance.randrange(5)))
            quoted = '"' + f"annotation.k{number}={value}".replace('"', '""') + '"'
            fields.append(
                chance.choice((quoted, quoted, f"annotation.k{number}={value}", f'"annotation.k{number}={value}"'))
            )
        lines.append("type=oci," + ",".join(fields))
    kept, refused = 0, 0
    for line, theirs in zip(lines, go(peer, *lines), strict=True):
        if "error" in theirs:
            refused += 1
            with pytest.raises(UsageError):
                parse(line)
        elif set(theirs["attrs"]) == {"type", "annotation.k0", "annotation.k1"} and line.count("annotation.k0") == 1:
            kept += 1
            mine = {f"annotation.{one.key}": one.value for one in parse(line).annotations}
            assert mine | {"type": "oci"} == theirs["attrs"], line
    assert kept > 1000 and refused > 500


@pytest.mark.parametrize("compression", ("", "uncompressed", "gzip", "estargz", "zstd", "GZIP", "lz4"))
@pytest.mark.parametrize(
    "rest",
    (
        *(
            f",force-compression={value}"
            for value in ("", "1", "t", "T", "TRUE", "true", "True", "yes", "tRue", " true")
        ),
        *(f",force-compression={value}" for value in ("0", "f", "F", "FALSE", "false", "False", "no", "2")),
        *(f",compression-level={value}" for value in ("5", "", "x", "1.5", "0x5", "5 ")),
    ),
)
def test_buildkit_reads_values_alike(peer: Path, compression: str, rest: str) -> None:
    line = f"type=oci{f',compression={compression}' if compression else ''}{rest}"
    (theirs,) = go(peer, line)
    if "error" in theirs:
        with pytest.raises(UsageError):
            parse(line)
    elif compression == "uncompressed" and "level" in theirs:
        with pytest.raises(UsageError, match="has no level"):  # BuildKit ignores it
            parse(line)
    else:
        mine = parse(line)
        found = (mine.compression, mine.force_compression, mine.compression_level)
        assert found == (theirs["compression"], theirs["force"], theirs.get("level"))


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no key=value"),
        ("image", "is no key=value"),
        ("dest=x", "lacks type="),
        ("type=", "lacks type="),
        ("type=cacheonly", "'cacheonly' is no type of output; choose type=image, type=registry"),
        ("type=image,", "is no key=value"),
        ("type=image,push", "'push' is no key=value"),
        ("type=image,name=a,b", "'b' is no key=value; a value with a comma is quoted"),
        ('type=image,name="a,b"', "wrong quote"),
        ('type=image,"name=a', "wrong quote"),
        ('type=image,"name=a"b', "wrong quote"),
        ("type=oci,type=oci", "type= twice"),
        ("type=image,name=a,NAME=b", 'name= twice; give it once (several names: "name=a,b")'),
        ("type=oci,annotation.a=1,annotation.a=2", "annotation.a= twice"),
        # keys
        ("type=oci,output=f", "no key 'output': is dest=f meant?"),
        ("type=oci,compresion=gzip", "is compression= meant?"),
        ("type=oci,compression_level=1", "is compression-level= meant?"),
        ("type=image,unpack=true", "it is BuildKit's"),
        ("type=oci,xyzzy=1", "no key 'xyzzy'"),
        ("type=oci,xyzzy=1", "there are name, dest, tar, compression,"),
        ("type=oci,push=true", "type=oci has no push=; it is of type=image, type=registry"),
        ("type=image,dest=f", "type=image has no dest=; it is of type=oci, type=docker, type=tar, type=local"),
        ("type=tar,compression=gzip", "type=tar has no compression="),
        ("type=local,dest=d,tar=true", "type=local has no tar="),
        ("type=tar,annotation.a=b", "type=tar is no image"),
        # values
        ("type=image,push=yes", "push=yes is neither true nor false"),
        ("type=oci,oci-mediatypes=", "oci-mediatypes= is neither"),
        ("type=oci,rewrite-timestamp=", "rewrite-timestamp= is neither"),
        ("type=oci,compression=lz4", "compression=lz4 is not known; choose uncompressed, gzip, estargz, zstd"),
        ("type=oci,compression-level=13", "over gzip's highest, 12"),
        ("type=oci,compression=estargz,compression-level=13", "over estargz's highest, 12"),
        ("type=oci,compression=zstd,compression-level=20", "over zstd's highest, 19"),
        ("type=oci,compression-level=-1", "no whole number"),
        ("type=oci,compression=uncompressed,compression-level=1", "has no level"),
        ("type=oci,source-date-epoch=x", "no number of seconds"),
        ("type=oci,source-date-epoch=-1", "no number of seconds"),
        ("type=oci,source-date-epoch=999999999999", "no number of seconds"),
        ("type=oci,compression=estargz,chunk-size=0", "a byte at least"),
        ("type=oci,compression=estargz,chunk-size=2GiB", "more than"),
        ("type=oci,compression=estargz,chunk-size=x", "is no size"),
        ("type=oci,chunk-size=1MiB", "compression=gzip has no chunks"),
        ("type=image,name=Bad", "name=Bad"),
        ("type=image,name=*", "name=*"),
        ("type=image,name=a@sha256:" + "0" * 64, "leave it out"),
        ("type=oci,dest=a\0", "is no path"),
        # annotations
        ("type=oci,annotation=x", "no key 'annotation'"),
        ("type=oci,annotation.=x", "is no annotation"),
        ("type=oci,annotation-layer.a=x", "is no annotation"),
        ("type=oci,annotation[linux].a=x", "no platform"),
        ("type=oci,annotation[linux/../x].a=x", "is no annotation"),
        ("type=oci,annotation-index[linux/arm64].a=x", "an index is for all platforms"),
        # contradictions
        ("type=image,push=true", "needs name="),
        ("type=registry", "needs name="),
        ("type=image,name=a,push-by-digest=true", "needs push=true"),
        ("type=image,name=a:v1,push=true,push-by-digest=true", "has no tag"),
        ("type=oci,compression=estargz,oci-mediatypes=false", "verified; leave oci-mediatypes=false out"),
        ("type=oci,annotation.a=b,oci-mediatypes=false", "no annotations"),
        ("type=oci,rewrite-timestamp=true", "set SOURCE_DATE_EPOCH"),
        ("type=local", "needs dest=DIRECTORY"),
        ("type=oci,tar=false", "needs dest=DIRECTORY"),
        ("type=local,dest=-", "needs dest=DIRECTORY"),
        ("type=tar,dest=/", "is a directory"),
    ],
)
def test_what_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert said in str(caught.value)
    assert caught.value.exit_code == 2
