"""The benchmark's report: pictures, page and Markdown from figures that were made up."""

from __future__ import annotations

import copy
import struct
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import page

Report = dict[str, Any]

MACHINE = {
    "cpu": "Some <fast> CPU",
    "cpus": 4,
    "kernel": "6.1",
    "commit": None,
    "date": "2026-01-02T03:04:05+00:00",
    "python": "3.11.7",
    "libraries": {"libisal": "2.30.0", "libzstd": None},
    "package": {"estargz": "0.1.0"},
    "peer": {"go": "go1.26.8", "modules": {"github.com/moby/buildkit": "v0.34.2", "golang.org/x/sync": "v0.23.0"}},
    "tools": {"tar": "tar (GNU tar) 1.34"},
    "load_average": [0.1, 0.2, 0.3],
}
BARE = {"machine": MACHINE, "settings": {"quick": True, "rounds": 1, "threads": 2}}

# Name, entries, files, bytes.
TREES = (
    ("venv", 14_796, 13_466, 463_423_584),
    ("debian", 14_658, 12_025, 484_697_829),
    ("small", 100_100, 100_000, 102_400_000),
)
# Level: blob bytes per byte of payload, payload bytes per second.
OURS = {0: (0.402, 340e6), 1: (0.362, 325e6), 2: (0.357, 310e6), 3: (0.352, 280e6), 4: (0.325, 165e6)}
OURS |= {5: (0.318, 140e6), 6: (0.315, 118e6), 7: (0.314, 92e6), 8: (0.313, 55e6), 9: (0.312, 39e6), 12: (0.309, 9e6)}
BUILDKIT = {1: (0.36, 42e6), 6: (0.323, 20e6), 9: (0.321, 9.7e6)}
# Name, family, lazy, level, and the same two.
OTHERS = (
    ("estargz, two blobs", "estargz", True, 2, 0.357, 140e6),
    ("Go, two blobs", "go", True, 6, 0.324, 11e6),
    ("tar | estargz.Writer, level 6", "go", True, 6, 0.324, 22e6),
    ("tar, then estargz.Build, level 6", "go", True, 6, 0.324, 38e6),
    ("buildkitd, exporting layers", "buildkit", True, 6, 0.323, 17e6),
    ("tar | pigz -6", "tar", False, 6, 0.32, 58e6),
    ("tar | igzip -1", "tar", False, 1, 0.355, 270e6),
    ("Python tarfile + <gzip>, level 6", "python", False, 6, 0.321, 14e6),
    ("estargz, plain gzip, level 1", "estargz", False, 1, 0.354, 470e6),
    ("tar, uncompressed", "tar", False, None, 1.03, 900e6),
)
STAGES = {
    **{"start and end": 0.12, "walk, headers": 0.11, "read files": 0.2, "digests": 0.9},
    **{"compress": 1.4, "table of contents": 0.04, "write, sync": 0.15},
}


def runs(wall: float, turn: int = 0) -> list[dict[str, float]]:
    """Runs that differ by some per cent, in another order by another turn."""
    factors = [(1.0, 1.08, 0.95)[(number + turn) % 3] for number in range(3)]
    return [
        {
            **{"wall": wall * factor, "cpu": wall * factor * 1.7, "peak": 8e7 * factor, "written": 2e8, "read": 5e8},
            **{"disk_read": 0, "space": 1.7e8, "others": 0.01, "sync": 0.001},
        }
        for factor in factors
    ]


def way(name: str, family: str, level: int | None, size: float, wall: float, lazy: bool = True) -> dict[str, Any]:
    return {
        **{"name": name, "family": family, "lazy": lazy, "level": level, "skipped": None, "note": ""},
        **{"size": int(size), "runs": runs(wall, len(name))},
    }


def skipped(name: str, why: str) -> dict[str, Any]:
    return {**way(name, "tar", None, 0, 1), "skipped": why, "size": 0, "runs": []}


def tree(name: str, entries: int, files: int, size: int) -> dict[str, Any]:
    return {"name": name, "entries": entries, "files": files, "size": size}


def contest(*facts: Any) -> dict[str, Any]:
    size = facts[-1]
    named = {f"estargz, level {level}{' (default)' if level == 2 else ''}": level for level in OURS}
    ours = [way(name, "estargz", level, OURS[level][0] * size, size / OURS[level][1]) for name, level in named.items()]
    theirs = [
        way(f"BuildKit's compressor, level {level}", "buildkit", level, share * size, size / rate)
        for level, (share, rate) in BUILDKIT.items()
    ]
    others = [
        way(name, family, level, share * size, size / rate, lazy) for name, family, lazy, level, share, rate in OTHERS
    ]
    return {"tree": tree(*facts), "ways": [*theirs, *ours, *others, skipped("tar | zstd", "not installed: <zstd>")]}


def two_blobs(*facts: Any) -> dict[str, Any]:
    size = facts[-1]
    found = [
        way("estargz: one blob", "estargz", 2, 0.36 * size, size / 310e6),
        way("estargz: two blobs", "estargz", 2, 0.36 * size, size / 140e6),
        way("Go: one blob", "buildkit", 6, 0.32 * size, size / 20e6),
        way("Go: two blobs", "go", 6, 0.32 * size, size / 11e6),
    ]
    for two in found[1::2]:
        for run in two["runs"]:
            run |= {"written": 4.1e8, "read": 9e8, "space": 3.4e8}
    return {"tree": tree(*facts), "ways": found}


def limit(*facts: Any) -> dict[str, Any]:
    parts = [
        {"stage": name, "seconds": taken, "each": [taken, taken * 1.1], "bytes": 4e8} for name, taken in STAGES.items()
    ]
    spent = {name: taken * 1.05 for name, taken in STAGES.items()}
    spent |= {"digests": STAGES["digests"] + 0.35, "wait": 0.21, "start and end": 2 * STAGES["start and end"]}
    total = sum(STAGES.values())
    wall = sum(spent.values()) / 2
    return {
        **{"tree": tree(*facts), "level": 2, "threads": 2, "parts": parts, "sum": total, "spent": spent, "wall": wall},
        **{"parallel_bound": total / 2, "serial_bound": 0.47, "serial_stage": "blob digest, write, sync"},
        **{"parallel_fraction": total / 2 / wall, "serial_fraction": 0.47 / wall},
    }


def point(label: str, threads: int, size: float, entries: int, wall: float, peak: float = 8e7) -> dict[str, Any]:
    measured = [run | {"peak": peak * run["wall"] / wall} for run in runs(wall)]
    return {"label": label, "threads": threads, "bytes": int(size), "entries": entries, "runs": measured}


def scale() -> dict[str, Any]:
    return {
        "threads": [point(f"{n} threads", n, 4.6e8, 14_796, 3 / n + 0.05, 4e7 + n * 2e7) for n in (1, 2, 4, 8)],
        "model": [{"threads": n, "wall": max(2.9 / n, 0.47)} for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)],
        "sizes": [point(f"{size:.0e} bytes", 2, size, 1000, 0.08 + size / 3e8) for size in (1e6, 1e7, 1e8, 1e9, 1e10)],
        "entries": [
            point(f"{n:,} entries", 2, n * 1024, n, 0.08 + n / 62e3, 4.5e7 + 300 * n)
            for n in (1, 100, 10**3, 10**4, 10**5, 10**6)
        ],
    }


@pytest.fixture(scope="module")
def report() -> Report:
    return {
        **{"machine": MACHINE, "settings": {"quick": False, "rounds": 3, "threads": 2}, "scale": scale()},
        **{"compare": [contest(*facts) for facts in TREES], "two_blobs": [two_blobs(*facts) for facts in TREES]},
        "limit": [limit(*facts) for facts in TREES],
        "others": [contest("venv over venv-base", 312, 280, 9_000_000)],
    }


@pytest.fixture(scope="module")
def pictures(report: Report, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return draw(report, tmp_path_factory.mktemp("pictures"))


def draw(report: Report, folder: Path) -> list[Path]:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed, so there are no pictures")
    import pictures

    return pictures.draw(report, folder)


def without(report: Report, *path: str | int) -> Report:
    """A copy of a report that lacks a part."""
    found = copy.deepcopy(report)
    inner: Any = found
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return found


class Document(HTMLParser):
    """What a page says, and that its elements are closed in turn."""

    EMPTY = ("meta", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.cells: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.EMPTY:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def read(report: Report, pictures: list[Path], folder: Path) -> Document:
    out = folder / "deeper" / "report.html"
    page.write(report, pictures, out)
    return Document(out.read_text(encoding="utf-8"))


# --------------------------------------------------------------------------------------------------- pictures


def test_each_picture_is_a_png_of_a_sane_size(pictures: list[Path]) -> None:
    assert [picture.name for picture in pictures] == ["levels.png", "one-blob.png", "scale.png", "stages.png"]
    for picture in pictures:
        data = picture.read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", data[16:24])
        assert 900 <= width <= 1100
        assert 300 <= height <= 3000
        assert 10_000 < len(data) < 1_000_000


def test_pictures_come_out_the_same_again(report: Report, pictures: list[Path], tmp_path: Path) -> None:
    again = draw(report, tmp_path)
    assert [picture.read_bytes() for picture in again] == [picture.read_bytes() for picture in pictures]


def test_without_figures_there_is_no_picture(tmp_path: Path) -> None:
    assert draw(BARE, tmp_path) == []
    assert draw({**BARE, "compare": [], "two_blobs": [], "limit": [], "scale": {}}, tmp_path) == []
    nobody = {"tree": tree(*TREES[0]), "ways": [skipped("tar", "not installed")]}
    assert draw({**BARE, "compare": [nobody], "two_blobs": [nobody]}, tmp_path) == []


@pytest.mark.parametrize(
    ("part", "missing"),
    [
        (("compare",), "levels"),
        (("two_blobs",), "one-blob"),
        (("limit",), "stages"),
        (("scale",), "scale"),
        (("scale", "threads"), None),
        (("scale", "model"), None),
        (("limit", 0, "spent"), None),
        (("limit", 0, "serial_bound"), None),
        (("two_blobs", 0, "ways", 2), None),
        (("two_blobs", 0, "ways", 3), None),
    ],
    ids=str,
)
def test_a_missing_part_costs_no_other_picture(report: Report, part: Any, missing: str | None, tmp_path: Path) -> None:
    names = ["levels", "one-blob", "scale", "stages"]
    small = {**report, "compare": report["compare"][:1]}
    assert [made.stem for made in draw(without(small, *part), tmp_path)] == [name for name in names if name != missing]


# --------------------------------------------------------------------------------------------------- the page


def test_the_page_needs_no_other_file(report: Report, pictures: list[Path], tmp_path: Path) -> None:
    document = read(report, pictures, tmp_path)
    sources = [value for name, value in document.attributes if name in ("src", "href")]
    assert len(sources) == len(pictures)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert {"script", "link", "iframe"}.isdisjoint(document.tags)


def test_pages_and_markdown_name_every_way_and_why_one_was_skipped(report: Report, tmp_path: Path) -> None:
    document, text = read(report, [], tmp_path), page.markdown(report)
    ways = [way for part in ("compare", "two_blobs", "others") for contest in report[part] for way in contest["ways"]]
    for name in {way["name"] for way in ways}:
        assert name in document.cells
        assert page.plain(name) in text
    assert "tar | zstd (venv, debian, small, venv over venv-base): not installed: <zstd>" in document.text
    assert r"- tar \| zstd (venv, debian, small, venv over venv-base): not installed: &lt;zstd>" in text
    for tree in TREES:
        assert f"{tree[0]}: {tree[1]:,} entries" in document.text


def test_what_is_special_is_escaped(report: Report, tmp_path: Path) -> None:
    changed = copy.deepcopy(report)
    changed["compare"][0]["tree"]["name"] = '<b onload="x">&amp;'
    changed["compare"][0]["ways"][0]["note"] = "a|b\n</table>"
    document = read(changed, [], tmp_path)
    assert "b" not in document.tags
    assert "onload" not in dict(document.attributes)
    assert '<b onload="x">&amp;: 14,796 entries' in document.text
    assert "a|b\n</table>" in document.cells
    assert r"a\|b &lt;/table>" in page.markdown(changed)


def test_every_row_of_markdown_has_as_many_cells_as_its_heading(report: Report) -> None:
    for block in page.markdown(report).split("\n\n"):
        rows = [row.replace(r"\|", "") for row in block.splitlines() if row.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1
        assert len({len(row) for row in block.splitlines() if row.startswith("|")}) <= 1


@pytest.mark.parametrize("missing", ["compare", "two_blobs", "others", "limit", "scale"])
def test_a_missing_section_says_so(report: Report, missing: str, tmp_path: Path) -> None:
    whole = page.markdown(report)
    for rest in (without(report, missing), {**report, missing: []}, {**report, missing: None}):
        assert whole.count("Not measured.") == 0
        assert page.markdown(rest).count("Not measured.") == 1
        assert read(rest, [], tmp_path).text.count("Not measured.") == 1


def test_a_report_of_nothing_is_a_page(tmp_path: Path) -> None:
    document = read(BARE, [], tmp_path)
    assert "A quick look" in document.text
    assert "Some <fast> CPU, 4 CPUs" in document.cells
    assert "Nothing was skipped." in document.text


def test_what_a_run_could_not_tell_is_left_out(report: Report, tmp_path: Path) -> None:
    changed = copy.deepcopy(report)
    for way in changed["two_blobs"][0]["ways"]:
        for run in way["runs"]:
            run["disk_read"] = None
            del run["space"]
    document = read(changed, draw(changed, tmp_path), tmp_path)
    assert document.tags.count("img") == 4


# --------------------------------------------------------------------------------------------------- the figures


def timed(name: str, family: str, *walls: float, size: int = 0) -> dict[str, Any]:
    found = way(name, family, None, size, 1)
    found["runs"] = [
        {"wall": wall, "cpu": 2 * wall, "peak": 5_000_000 * (1 + number)} for number, wall in enumerate(walls)
    ]
    return found


def by_way(report: Report) -> dict[str, dict[str, str]]:
    """The cells of the first tree's table, by the names of the way and of the column."""
    (table,) = page.compare_section(report).tables
    return {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}


def test_ratios_are_taken_run_by_run() -> None:
    ours = timed("estargz, level 2 (default)", "estargz", 1.0, 2.0, 4.0, size=250_000)
    slow = timed("slow", "go", 3.0, 4.0, 20.0, size=500_000)
    cut = timed("cut short", "tar", 5.0)
    cut["skipped"] = "it failed"
    contest = {"tree": tree("t", 3, 2, 1_000_000), "ways": [slow, ours, cut]}
    cells = by_way({**BARE, "compare": [contest]})

    # 3/1, 4/2 and 20/4: the median is 3, where that of the seconds would be 4/2.
    assert cells["slow"]["times as long"] == "3.00 (2.00-5.00)"
    assert cells["estargz, level 2 (default)"]["times as long"] == "1.00"
    assert cells["cut short"]["times as long"] == "5.00"
    assert cells["cut short"]["note"] == "then skipped: it failed"

    assert cells["slow"]["seconds"] == "4.00 (3.00-20.0)"
    assert cells["slow"]["MB/s"] == "0.25"
    assert cells["slow"]["CPU s"] == "8.00"
    assert cells["slow"]["peak MB"] == "15.0"
    assert cells["slow"]["blob bytes"] == "500,000"
    assert cells["slow"]["of payload"] == "50.0%"
    assert cells["slow"]["times the bytes"] == "2.00"


def test_without_the_default_there_are_no_ratios() -> None:
    contest = {"tree": tree("t", 3, 2, 1_000_000), "ways": [timed("slow", "go", 3.0), skipped("estargz", "not built")]}
    cells = by_way({**BARE, "compare": [contest]})
    assert cells["slow"]["times as long"] == "-"
    assert cells["estargz"]["note"] == "skipped: not built"


def test_two_blobs_are_a_multiple_of_one_of_the_same_program() -> None:
    ways = [
        *(timed("estargz: one blob", "estargz", 1.0, 2.0), timed("estargz: two blobs", "estargz", 3.0, 4.0)),
        *(timed("Go: one blob", "go", 10.0, 10.0), timed("Go: two blobs", "go", 15.0, 25.0)),
    ]
    table = page.second_blob_table([{"tree": tree("t", 3, 2, 1_000_000), "ways": ways}])
    assert [row[:3] for row in table.rows] == [["t", "estargz", "2.50 (2.00-3.00)"], ["t", "Go", "2.00 (1.50-2.50)"]]


def test_the_stage_that_costs_most_beyond_its_part_is_named() -> None:
    found = limit(*TREES[0])
    assert page.limit_row(found)[-1] == "digests +0.35 s"
    assert page.limit_of(found) == found["parallel_bound"]
    assert page.limit_of({**found, "serial_bound": 99.0}) == 99.0
    assert page.limit_row({**found, "spent": {"wait": 1.0, "digests": 1.2}})[-1] == "wait +1.00 s"
    assert page.limit_row({**found, "spent": {}})[-1] == "-"


def test_seconds_that_mean_less_have_a_footnote() -> None:
    quiet, loud = timed("quiet", "estargz", 1.0), timed("loud", "tar", 2.0)
    quiet["runs"][0] |= {"others": 0.05, "sync": 0.01}
    loud["runs"][0] |= {"others": 0.9, "sync": 0.4}
    assert page.asides([quiet, loud]) == [
        "Making the finished file durable took, after these seconds: loud 0.40 s.",
        "The machine was not quiet; others took CPU: loud 0.90 s.",
    ]
