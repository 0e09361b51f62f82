"""One test per hazard that no other file has a test of; docs/hazards.md lists all hazards with what proves each."""

from __future__ import annotations

import gzip
import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from reference.blobs import assemble, encode, payload_and_toc, tar_of
from reference.tar_headers import pax, plain_header
from tars import END, entry

import estargz
from estargz.errors import BlobError, ImageError, SourceError, TarError
from estargz.http import retry_after
from estargz.image import tree
from estargz.image.reference import Reference
from estargz.image.store import ImageSource, open_source
from estargz.registry.auth import parse_challenges

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "torture"))
import hostile  # noqa: E402  a program, and what makes its inputs
import hostile_inputs as inputs  # noqa: E402

HEADING = "| hazard | here | proof |"
MESSAGE_MOST = 4000  # characters: two names, and what happened


def image_at(reference: str) -> ImageSource:
    return open_source(Reference.parse(reference))


# --------------------------------------------------------------------------------------------------------------------
# images


def test_an_index_that_branches_is_no_exponent(tmp_path: Path) -> None:
    """The "billion laughs" of images: each of four indexes names the next one a hundred times."""
    inputs.branching_indexes(tmp_path / "layout", 100)
    with pytest.raises(ImageError, match="over 8194 documents"):
        tree.read_tree(image_at(f"oci:{tmp_path}/layout"))


def test_documents_are_bounded_in_all(tmp_path: Path) -> None:
    inputs.large_manifests(tmp_path / "layout", 17)
    with pytest.raises(ImageError, match="67108864 bytes"):
        tree.read_tree(image_at(f"oci:{tmp_path}/layout"))
    inputs.large_manifests(tmp_path / "less", 3)
    assert len(list(tree.manifests_of(tree.read_tree(image_at(f"oci:{tmp_path}/less"))))) == 3


def test_indexes_in_an_archive_are_read_once(tmp_path: Path) -> None:
    """manifest.json leads to a configuration that none of the layout's manifests has, so all of them are looked at."""
    inputs.archive_of_indexes(tmp_path / "saved", 200)
    tree.read_tree(image_at(f"docker-archive:{tmp_path}/saved"))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["index.json", "oci-layout"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_documents_that_are_no_files(tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    """A FIFO would be waited for, /dev/zero has no end."""
    inputs.nested_indexes(tmp_path / "layout", 1)
    (tmp_path / "layout" / name).unlink()
    make(tmp_path / "layout" / name)
    with pytest.raises((ImageError, SourceError), match="no regular file|Is a directory"):
        tree.read_tree(image_at(f"oci:{tmp_path}/layout"))


def test_extended_headers_of_an_archive_are_bounded_in_all(tmp_path: Path) -> None:
    """A megabyte of gzip is a gibibyte of records, all of which have to be looked at."""
    records = gzip.compress(pax((b"comment", b"x" * 60_000)) * 300 + END)
    (tmp_path / "saved").write_bytes(records)
    with pytest.raises(ImageError, match="extended header"):
        image_at(f"docker-archive:{tmp_path}/saved")


def test_records_of_an_archive_are_found_behind_others(tmp_path: Path) -> None:
    path = b"manifest.json"
    tar = pax((b"comment", b"x" * 1000), (b"path", path), (b"mtime", b"1.5")) + entry(b"other", b"[]") + END
    (tmp_path / "saved").write_bytes(tar)
    with pytest.raises(ImageError, match="has no such image"):  # which only a manifest.json of no images says
        image_at(f"docker-archive:{tmp_path}/saved").resolve()


# --------------------------------------------------------------------------------------------------------------------
# messages


def long_name_of_a_table() -> bytes:
    payload, toc = payload_and_toc(tar_of(("a", b"x")))
    toc["entries"][0]["name"] = "\x1b" * 60_000
    toc["entries"][0]["size"] = -1
    return assemble(payload, encode(toc))


def long_time_of_a_table() -> bytes:
    payload, toc = payload_and_toc(tar_of(("a", b"x")))
    toc["entries"][0]["modtime"] = "9" * 1_000_000
    return assemble(payload, encode(toc))


def long_name_of_a_tar() -> bytes:
    return pax((b"path", b"n" * 1_000_000)) + plain_header(b"x", type=b"7") + END


@pytest.mark.parametrize(
    ("use", "source"),
    [
        (estargz.open, long_name_of_a_table()),
        (estargz.verify, long_time_of_a_table()),
        (lambda data: estargz.build(io.BytesIO(data), io.BytesIO()), long_name_of_a_tar()),
    ],
    ids=["name in a table", "time in a table", "name in a tar"],
)
def test_messages_stay_short(use: Callable[[Any], object], source: bytes) -> None:
    """A name has up to a mebibyte, and may be made to flood a log."""
    with pytest.raises((BlobError, TarError)) as caught:
        use(source)
    assert len(str(caught.value)) < MESSAGE_MOST
    assert "; " in str(caught.value)  # the remedy has not been cut off


# --------------------------------------------------------------------------------------------------------------------
# extraction


def test_components_that_amplify_are_bounded(tmp_path: Path) -> None:
    """Two bytes of a name are a directory: 50 bytes of gzip may ask for half a million (after GHSA-rp3h-jf77-q9p4)."""
    layer = b"".join(pax((b"path", b"%d/" % i + b"d/" * 500 + b"f")) + plain_header(b"f") for i in range(4)) + END
    with pytest.raises(SourceError, match="number of entries allowed"):
        estargz.extract(layer, tmp_path / "out", max_entries=1000)
    assert not (tmp_path / "out").exists()
    defaults = estargz.extract.__kwdefaults__
    assert defaults["max_entries"] == 10_000_000


# --------------------------------------------------------------------------------------------------------------------
# hash tables


def seconds_for_names(names: list[bytes]) -> float:
    """What it takes to build a layer of them and to find one in its table."""
    tar, sink = b"".join(map(inputs.head, names)) + END, io.BytesIO()
    begun = time.process_time()
    estargz.build(io.BytesIO(tar), sink, threads=1)
    with estargz.open(sink.getvalue()) as blob:
        blob.stat(names[-1].decode())
    return time.process_time() - begun


@pytest.mark.measured
def test_names_that_collide_elsewhere_cost_no_more() -> None:
    """Each of the two halves would be one chain, in tables whose hashes multiply by 31 or by 33, and add."""
    colliding = [head[:100].rstrip(b"\0") for head in inputs.colliding_names(60_000)]
    usual = [b"%040d" % number for number in range(len(colliding))]
    assert seconds_for_names(colliding) < 4 * seconds_for_names(usual) + 0.5


# --------------------------------------------------------------------------------------------------------------------
# tables of contents in the making


class Pieces:
    """A source that has them one by one."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._left = pieces, b""

    def read(self, size: int) -> bytes:
        piece = self._left or next(self._pieces, b"")
        self._left = piece[size:]
        return piece[:size]


def test_a_table_that_no_reader_takes_is_not_written(tmp_path: Path) -> None:
    """Bytes that are no UTF-8 are six times as long in JSON; 300 kB of gzip would become a table of over 1 GiB."""
    with pytest.raises(SourceError, match="table of contents would go beyond 1 GiB"):
        estargz.build(Pieces(inputs.names_of_no_text(180)), tmp_path / "blob")
    assert not os.listdir(tmp_path)


# --------------------------------------------------------------------------------------------------------------------
# what servers say


class Answer:
    """As much of an answer as is looked at."""

    status = 503

    def __init__(self, **headers: str) -> None:
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-1",
        "1e9",
        "9" * 5000,
        "Mon, 01 Jan 999999999999999999999 00:00:00 GMT",
        "\u0663",
        "Thu, 99 Foo",
        "," * 50_000,
    ],
)
def test_times_to_wait_that_are_none(text: str) -> None:
    found = retry_after(Answer(Retry_After=text))  # type: ignore[arg-type]
    assert found is None or found >= 0


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "header",
    [
        'Bearer a="\\' * 200_000,
        "Basic " + " " * 2_000_000 + "x",
        "a " * 300_000,
        '"' * 1_000_000,
        "B a=" + "b" * 1_000_000 + '"',
    ],
)
def test_challenges_cost_what_they_are(header: str) -> None:
    parse_challenges(header)


# --------------------------------------------------------------------------------------------------------------------
# the list


def stated_tests() -> Iterator[tuple[str, str]]:
    """(file, test) of each that docs/hazards.md names."""
    text = (ROOT / "docs" / "hazards.md").read_text()
    for file, names in re.findall(r"`(test_\w+\.py)`: ((?:`\w+`(?:, )?)+)", text):
        for name in re.findall(r"`(\w+)`", names):
            yield file, name


def test_the_list_of_hazards_names_tests_that_exist() -> None:
    stated = list(stated_tests())
    assert len(stated) > 150
    missing = [
        f"{file}: {name}"
        for file, name in stated
        if not re.search(rf"^(?:async )?def {name}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE)
    ]
    assert not missing


def test_each_hazard_of_the_list_is_proved() -> None:
    text = (ROOT / "docs" / "hazards.md").read_text().partition("## Limits")[0]
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and line != HEADING]
    assert len(rows) > 80
    assert [row[0] for row in rows if len(row) != 3 or not re.search(r"`test_\w+\.py`: `", row[2])] == []


def test_the_worst_inputs_that_the_list_names_are_measured() -> None:
    text = (ROOT / "docs" / "hazards.md").read_text()
    cases = "\n".join(case.name for case in hostile.CASES)
    named = [
        name for names in re.findall(r"\*hostile\*: ((?:\"[^\"]+\"(?:, )?)+)", text) for name in names.split('"')[1::2]
    ]
    assert len(named) > 30
    assert [name for name in named if name.strip(". ") not in cases] == []


def test_each_test_here_is_in_the_list() -> None:
    own = re.findall(r"^def (test_\w+)\(", Path(__file__).read_text(), re.MULTILINE)
    listed = {name for file, name in stated_tests() if file == "test_hostile.py"}
    assert {name for name in own if "list" not in name} == listed
