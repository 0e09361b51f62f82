"""The results as tables: one self-contained HTML page with the pictures in it, and the same tables as Markdown.

Nothing here needs matplotlib. Any part of a report may be missing; its section then says so.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from limit import beyond

# Parts of a report as they come from JSON.
Report = dict[str, Any]
Contest = dict[str, Any]
Measured = dict[str, Any]
"""Anything with "runs": a way of making a layer, or a point of a scale."""
Limit = dict[str, Any]

NOTHING = "-"
NOT_MEASURED = "Not measured."

FACT_COLUMNS = "fact|what".split("|")
WAY_COLUMNS = "way|level|seconds|MB/s|times as long|CPU s|peak MB".split("|")
WAY_COLUMNS += "blob bytes|of payload|times the bytes|note".split("|")
TWO_BLOB_COLUMNS = "way|seconds|times as long|CPU s|peak RSS MB|written MB|read MB".split("|")
TWO_BLOB_COLUMNS += "disk read MB|peak space MB|blob bytes|note".split("|")
SECOND_BLOB_COLUMNS = {
    "seconds": "wall",
    "CPU": "cpu",
    "peak RSS": "peak",
    "written": "written",
    "read": "read",
    "peak space": "space",
}
LIMIT_COLUMNS = "tree|level|threads|parts alone s|parallel bound s|serial bound s|whole run s".split("|")
LIMIT_COLUMNS += (
    "of parallel|of serial|the call alone s|of its bound|wait s|start and end s|most beyond its part".split("|")
)
STAGE_COLUMNS = "stage|alone s|MB/s alone|within the whole run, thread s|beyond its part, thread s".split("|")
THREAD_COLUMNS = "threads|seconds|MB/s|times as fast as the first|CPU s|peak MB|model s|model / measured".split("|")
SIZE_COLUMNS = "case|payload MB|seconds|MB/s|CPU s|peak MB".split("|")
ENTRY_COLUMNS = "case|entries|payload MB|seconds|entries/s|CPU s|peak MB".split("|")
TEXT_COLUMNS = {"fact", "what", "way", "note", "tree", "stage", "whose", "most beyond its part", "case"}

OVER = " over "

PEER_MODULES = ("moby/buildkit", "stargz-snapshotter/estargz", "containerd/v2", "containerd/continuity", "compress")

# Of the wall clock: from when on a footnote says so.
LOUD, SLOW_SYNC = 0.1, 0.05

ALTERNATIVES = {
    "levels": "Blob size against throughput for every way and level",
    "one-blob": "What one blob and two blobs cost",
    "scale": "Throughput and memory against threads, bytes and entries",
    "stages": "The stages alone and the whole run, as shares of the time",
}


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    columns: list[str]
    rows: list[list[str]]
    marked: int | None = None
    """The row that the others are compared with."""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    words: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    picture: str = ""
    """The stem of the picture's file."""
    points: list[str] = field(default_factory=list)


# --------------------------------------------------------------------------------------------------- figures


def values(measured: Measured, key: str) -> list[float]:
    return [run[key] for run in measured.get("runs") or [] if run.get(key) is not None]


def middle(measured: Measured, key: str) -> float | None:
    found = values(measured, key)
    return median(found) if found else None


def largest(measured: Measured, key: str) -> float | None:
    return max(values(measured, key), default=None)


def peak(measured: Measured) -> str:
    """Megabytes; a process that needs less than the one that started it cannot be told from it."""
    found, floor = largest(measured, "peak"), largest(measured, "floor")
    unknown = found is not None and floor is not None and found <= floor
    return f"≤ {megabytes(found)}" if unknown else megabytes(found)


def ratios(above: Measured, below: Measured, key: str = "wall") -> list[float]:
    """Run by run: runs of one round met the same machine."""
    pairs = zip(above.get("runs") or [], below.get("runs") or [], strict=False)
    return [one[key] / other[key] for one, other in pairs if one.get(key) is not None and other.get(key)]


def share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def default_way(contest: Contest) -> Measured | None:
    """The way that the others are compared with; None when it has no runs."""
    own = [way for way in contest.get("ways") or [] if way.get("family") == "estargz" and values(way, "wall")]
    named = [way for way in own if "default" in f"{way.get('name')} {way.get('note')}"]
    lazy = [way for way in own if way.get("lazy")]
    return next(iter(named or lazy or own), None)


def one_and_two(contest: Contest) -> Iterator[tuple[str, Measured, Measured]]:
    """Whose, and the two ways of theirs: "Go", "Go: one blob", "Go: two blobs"."""
    ways = {way.get("name", ""): way for way in contest.get("ways") or []}
    for name, one in ways.items():
        whose, _, how = name.partition(": ")
        if how == "one blob":
            yield whose, one, ways.get(f"{whose}: two blobs", {})


def limit_of(limit: Limit) -> float | None:
    """No run can take fewer seconds."""
    return max((limit[key] for key in ("parallel_bound", "serial_bound") if limit.get(key)), default=None)


# --------------------------------------------------------------------------------------------------- figures as text


def number(value: float | None, scale: float = 1) -> str:
    """About three digits that count."""
    if value is None:
        return NOTHING
    value /= scale
    size = abs(value)
    return f"{value:,.{0 if size >= 100 else 1 if size >= 10 else 2 if size >= 0.1 or not size else 3}f}"


def whole(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.0f}"


def megabytes(value: float | None) -> str:
    return number(value, 1e6)


def percent(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1%}"


def spread(found: Sequence[float]) -> str:
    """The median, and from where to where."""
    if not found:
        return NOTHING
    return number(median(found)) + around(found)


def around(found: Sequence[float]) -> str:
    """From where to where, unless that shows nothing."""
    low, high = number(min(found, default=None)), number(max(found, default=None))
    return f" ({low}-{high})" if low != high else ""


def seconds(measured: Measured) -> str:
    return spread(values(measured, "wall"))


def described(tree: dict[str, Any]) -> str:
    counted = [f"{tree['entries']:,} entries"] if "entries" in tree else []
    if "size" in tree:
        counted.append(megabytes(tree["size"]) + " MB" + (f" in {tree['files']:,} files" if "files" in tree else ""))
    return f"{tree_name(tree)}: {', '.join(counted)}" if counted else tree_name(tree)


def tree_name(tree: dict[str, Any] | None) -> str:
    return str((tree or {}).get("name", "unnamed tree"))


def remark(way: Measured) -> str:
    said = [way["note"]] if way.get("note") else []
    if way.get("skipped"):
        said.append(f"{'then ' if values(way, 'wall') else ''}skipped: {way['skipped']}")
    elif not values(way, "wall"):
        said.append("skipped: nothing was run")
    return "; ".join(said)


def listed(facts: dict[str, Any] | None) -> str:
    """Names with their values; some values name themselves."""
    named = {name: str(value or "unknown") for name, value in (facts or {}).items()}
    return ", ".join(value if value.startswith(f"{name} ") else f"{name} {value}" for name, value in named.items())


# --------------------------------------------------------------------------------------------------- sections


def sections(report: Report) -> list[Section]:
    return [
        machine_section(report),
        compare_section(report),
        two_blob_section(report),
        other_section(report),
        limit_section(report),
        scale_section(report),
        skipped_section(report),
    ]


def machine_section(report: Report) -> Section:
    machine = report["machine"]
    on_path, settings = machine.get("on_path") or {}, machine.get("environment") or {}
    facts = {
        "CPU": f"{machine.get('cpu', 'unknown')}, {machine.get('cpus', 'unknown')} CPUs",
        "kernel": machine.get("kernel"),
        "commit": machine.get("commit"),
        "date": machine.get("date"),
        "Python": machine.get("python"),
        "package": listed(machine.get("package")),
        "libraries": listed(machine.get("libraries")),
        "tools": listed(machine.get("tools")),
        "on PATH for Go's packages": ", ".join(name for name, there in on_path.items() if there) or "none",
        "settings": ", ".join(f"{name}={value}" for name, value in settings.items() if value) or "none",
        "Go peer": peer(machine.get("peer")),
        "load average before": ", ".join(map(str, machine.get("load_average") or [])),
    }
    rows = [[fact, str(value or "unknown")] for fact, value in facts.items()]
    return Section("Machine and method", how_measured(report["settings"]), [Table("", FACT_COLUMNS, rows)])


def peer(found: dict[str, Any] | None) -> str:
    if not found:
        return "none"
    modules = found.get("modules") or {}
    named = {path: version for path, version in modules.items() if path.endswith(PEER_MODULES)}
    return ", ".join(filter(None, [found.get("go"), listed(named)]))


def how_measured(settings: dict[str, Any]) -> list[str]:
    rounds, threads = settings.get("rounds", "unknown"), settings.get("threads", "unknown")
    hasty = "A quick look: too few rounds and too little data for figures to quote."
    return [
        *([hasty] if settings.get("quick") else []),
        f"Rounds: {rounds}; threads that estargz was given: {threads}. A round runs every way once, one after the other. "
        "Each tree is read once before, so everybody finds it in memory. The slowest ways run in the first round only, "
        "and have no range.",
        "Seconds are the wall clock around a whole process, its start included: the median of the rounds, and from where "
        "to where. Ratios are taken within a round, run by run; then their median is told, and from where to where. Compare "
        "ratios rather than seconds.",
        "MB are 10^6 bytes. MB/s count the payload: the files' bytes before compression. Peaks are the largest resident set "
        "of any one process.",
    ]


def compare_section(report: Report) -> Section:
    return contest_section("All ways and levels", report.get("compare") or [], "levels")


def other_section(report: Report) -> Section:
    return contest_section("Changesets and made-up trees", report.get("others") or [])


def contest_section(title: str, contests: Sequence[Contest], picture: str = "") -> Section:
    if not contests:
        return Section(title, [NOT_MEASURED])
    reference = next(filter(None, map(default_way, contests)), None)
    words = [f"'Times as long' and 'times the bytes' compare with {reference['name']}."] if reference else []
    tables = [way_table(contest) for contest in contests]
    if reference and len(contests) > 1:
        tables.insert(0, overview(contests))
    return Section(title, words, tables, picture)


def overview(contests: Sequence[Contest]) -> Table:
    """Every way's ratio over every tree."""
    names = dict.fromkeys(way["name"] for contest in contests for way in contest["ways"])
    rows = [[name, *(spread(compared(contest, name)) for contest in contests)] for name in names]
    rows = [row for row in rows if set(row[1:]) != {NOTHING}]
    return Table("Times as long, by tree", ["way", *(tree_name(contest["tree"]) for contest in contests)], rows)


def compared(contest: Contest, name: str) -> list[float]:
    reference = default_way(contest)
    found = [way for way in contest["ways"] if way["name"] == name]
    return ratios(found[0], reference) if found and reference else []


def way_table(contest: Contest) -> Table:
    reference, ways = default_way(contest), contest.get("ways") or []
    # A changeset holds only a part of its tree's files, so their size says nothing of it.
    payload = None if OVER in tree_name(contest["tree"]) else contest["tree"].get("size")
    rows = [way_row(way, reference, payload) for way in ways]
    notes = [*asides(ways), *provenance(contest)]
    return Table(described(contest["tree"]), WAY_COLUMNS, rows, position(reference, ways), notes)


def provenance(part: Contest) -> list[str]:
    """A report may hold parts of several runs."""
    made = part.get("made")
    if not made:
        return []
    return [f"{made.get('rounds')} rounds, {made.get('date')}, commit {str(made.get('commit'))[:12]}."]


def way_row(way: Measured, reference: Measured | None, payload: float | None) -> list[str]:
    size = way.get("size") or None
    return [
        way.get("name", ""),
        number_of(way.get("level")),
        seconds(way),
        megabytes(share(payload, middle(way, "wall"))),
        spread(ratios(way, reference or {})),
        number(middle(way, "cpu")),
        peak(way),
        whole(size),
        percent(share(size, payload)),
        number(share(size, (reference or {}).get("size"))),
        remark(way),
    ]


def number_of(level: int | None) -> str:
    return "" if level is None else str(level)


def position(reference: Measured | None, ways: Sequence[Measured]) -> int | None:
    return next((index for index, way in enumerate(ways) if way is reference), None)


def asides(ways: Sequence[Measured]) -> list[str]:
    """What makes seconds mean less than they seem to."""
    sync, others = noticeable(ways, "sync", SLOW_SYNC), noticeable(ways, "others", LOUD)
    notes = [f"Making the finished file durable took, after these seconds: {sync}."] if sync else []
    return notes + ([f"The machine was not quiet; others took CPU: {others}."] if others else [])


def noticeable(ways: Sequence[Measured], key: str, part: float) -> str:
    """The ways of which a figure is more than this part of the wall clock."""
    taken = [(way["name"], middle(way, key) or 0, middle(way, "wall") or 0) for way in ways]
    return "; ".join(f"{name} {number(figure)} s" for name, figure, wall in taken if figure > part * wall)


def two_blob_section(report: Report) -> Section:
    contests = report.get("two_blobs") or []
    if not contests:
        return Section("One blob or two", [NOT_MEASURED])
    words = [
        "Two blobs: the layer is written as gzip first, and that blob is then converted. 'Written' was written to files, so "
        "that the disk has to take it sooner or later. 'Read' was asked of files and pipes, the tree included; 'disk read' "
        "is what came from the disk and not from memory, programs included. 'Peak space' is the most that the output's "
        "file system held beyond what it held before. Ours and 'Go: one blob' have synced their last blob to the disk when "
        "they end, 'Go: two blobs' has not."
    ]
    tables = [two_blob_table(contest) for contest in contests]
    return Section("One blob or two", words, [second_blob_table(contests), *tables], "one-blob")


def second_blob_table(contests: Sequence[Contest]) -> Table:
    """What two blobs cost as a multiple of one, with the same program."""
    rows = [
        [tree_name(contest["tree"]), whose, *(spread(ratios(two, one, key)) for key in SECOND_BLOB_COLUMNS.values())]
        for contest in contests
        for whose, one, two in one_and_two(contest)
    ]
    return Table("Two blobs as a multiple of one", ["tree", "whose", *SECOND_BLOB_COLUMNS], rows)


def two_blob_table(contest: Contest) -> Table:
    reference, ways = default_way(contest), contest.get("ways") or []
    rows = [two_blob_row(way, reference) for way in ways]
    return Table(described(contest["tree"]), TWO_BLOB_COLUMNS, rows, position(reference, ways), asides(ways))


def two_blob_row(way: Measured, reference: Measured | None) -> list[str]:
    traffic = [megabytes(middle(way, key)) for key in ("written", "read", "disk_read", "space")]
    return [
        way.get("name", ""),
        seconds(way),
        spread(ratios(way, reference or {})),
        number(middle(way, "cpu")),
        peak(way),
        *traffic,
        whole(way.get("size") or None),
        remark(way),
    ]


def limit_section(report: Report) -> Section:
    limits = report.get("limit") or []
    if not limits:
        return Section("How near the limit", [NOT_MEASURED])
    words = [
        "Each stage is measured by itself, on one thread. The parallel bound is the stages' sum over the threads, as if "
        "nothing ever waited; the serial bound is the longest of what only one thread at a time can do, with start and "
        "end and the table of contents. By these figures no run would take less than either. Fractions are those of the "
        "medians. 'The call alone' is the build within a process that is up, which is what a program that embeds the package "
        "sees: without the interpreter's start and end, when one thread works and the others are not there yet or any more. "
        "'Most beyond its part' names the stage whose seconds within the whole run, over all threads, exceed those by "
        "itself the most."
    ]
    digests = [digest_table(limits)] if all(limit.get("digests") for limit in limits) else []
    return Section("How near the limit", words, [limit_table(limits), *map(stage_table, limits), *digests], "stages")


def digest_table(limits: Sequence[Limit]) -> Table:
    """Why the digests' stage takes less than the digests one by one."""
    names = list(limits[0]["digests"])
    rows = [[tree_name(limit.get("tree")), *(number(limit["digests"].get(name)) for name in names)] for limit in limits]
    return Table("Digests alone, seconds", ["tree", *names], rows)


def limit_table(limits: Sequence[Limit]) -> Table:
    return Table("Bounds and whole runs", LIMIT_COLUMNS, [limit_row(limit) for limit in limits])


def limit_row(limit: Limit) -> list[str]:
    spent, over, serial = limit.get("spent") or {}, beyond(limit), limit.get("serial_stage")
    costly = max(over, key=lambda stage: over[stage], default=None)
    return [
        tree_name(limit.get("tree")),
        number_of(limit.get("level")),
        number_of(limit.get("threads")),
        number(limit.get("sum")),
        number(limit.get("parallel_bound")),
        number(limit.get("serial_bound")) + (f" ({serial})" if serial else ""),
        number(limit.get("wall")),
        percent(limit.get("parallel_fraction")),
        percent(limit.get("serial_fraction")),
        number(limit.get("call")),
        percent(limit.get("call_fraction")),
        number(spent.get("wait")),
        number(spent.get("start and end")),
        f"{costly} {over[costly]:+.2f} s" if costly is not None else NOTHING,
    ]


def stage_table(limit: Limit) -> Table:
    spent = dict(limit.get("spent") or {})
    rows = [
        [
            part["stage"],
            number(part["seconds"]) + around(part.get("each") or []),
            megabytes(share(part.get("bytes") or None, part["seconds"])),
            number(spent.get(part["stage"])),
            number(beyond(limit).get(part["stage"])),
        ]
        for part in limit.get("parts") or []
    ]
    measured_alone = {row[0] for row in rows}
    rows += [[stage, NOTHING, NOTHING, number(spent[stage]), NOTHING] for stage in spent if stage not in measured_alone]
    return Table(
        f"Stages of {tree_name(limit.get('tree'))}, level {limit.get('level', 'unknown')}", STAGE_COLUMNS, rows
    )


def scale_section(report: Report) -> Section:
    scale = report.get("scale") or {}
    tables = [
        thread_table(scale.get("threads") or [], scale.get("model") or [], scale.get("tree", "")),
        size_table(scale.get("sizes") or []),
        entry_table(scale.get("entries") or []),
    ]
    tables = [table for table in tables if table.rows]
    if not tables:
        return Section("Threads, bytes, entries", [NOT_MEASURED])
    words = ["'Model' is computed from the stages' seconds, not measured."] if scale.get("model") else []
    return Section("Threads, bytes, entries", words, tables, "scale")


def thread_table(points: Sequence[Measured], model: Sequence[dict[str, Any]], tree: str) -> Table:
    modelled = {point["threads"]: point["wall"] for point in model}
    measured = {point["threads"]: point for point in points}
    rows = []
    for threads in sorted(measured | modelled):
        point = measured.get(threads, {})
        faster = spread(ratios(points[0], point)) if points else NOTHING
        paper = modelled.get(threads)
        checked = number(share(paper, middle(point, "wall")))
        rows.append([str(threads), seconds(point), rate(point), faster, *cost(point), number(paper), checked])
    return Table(f"Threads, over {tree}" if tree else "Threads", THREAD_COLUMNS, rows)


def size_table(points: Sequence[Measured]) -> Table:
    rows = [[label(one), megabytes(one.get("bytes")), seconds(one), rate(one), *cost(one)] for one in points]
    return Table("Bytes", SIZE_COLUMNS, rows)


def entry_table(points: Sequence[Measured]) -> Table:
    rows = [
        [
            label(point),
            whole(point.get("entries")),
            megabytes(point.get("bytes")),
            seconds(point),
            whole(share(point.get("entries"), middle(point, "wall"))),
            *cost(point),
        ]
        for point in points
    ]
    return Table("Entries", ENTRY_COLUMNS, rows)


def label(point: Measured) -> str:
    return str(point.get("label", ""))


def rate(point: Measured) -> str:
    return megabytes(share(point.get("bytes"), middle(point, "wall")))


def cost(point: Measured) -> list[str]:
    return [number(middle(point, "cpu")), megabytes(largest(point, "peak"))]


def skipped_section(report: Report) -> Section:
    """A way that was skipped for the same reason over several trees is named once."""
    trees: dict[tuple[str, str], list[str]] = {}
    for contest in [contest for part in ("compare", "two_blobs", "others") for contest in report.get(part) or []]:
        for way in contest.get("ways") or []:
            if way.get("skipped"):
                trees.setdefault((way.get("name", ""), way["skipped"]), []).append(tree_name(contest["tree"]))
    points = [f"{name} ({', '.join(dict.fromkeys(where))}): {why}" for (name, why), where in trees.items()]
    points += [f"the tree {name}: {why}" for name, why in (report.get("missing") or {}).items()]
    return Section("Skipped", [] if points else ["Nothing was skipped."], points=points)


# --------------------------------------------------------------------------------------------------- Markdown


def markdown(report: Report) -> str:
    """The tables for a README, padded so that a terminal shows them as well."""
    return "\n\n".join(block for section in sections(report) for block in markdown_blocks(section)) + "\n"


def markdown_blocks(section: Section) -> Iterator[str]:
    yield f"## {section.title}"
    yield from map(plain, section.words)
    for table in section.tables:
        if table.title:
            yield f"### {plain(table.title)}"
        yield markdown_table(table)
        yield from map(plain, table.notes)
    if section.points:
        yield "\n".join(f"- {plain(point)}" for point in section.points)


def markdown_table(table: Table) -> str:
    rows = [[plain(cell) for cell in row] for row in [table.columns, *table.rows]]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    lefts = [column in TEXT_COLUMNS for column in table.columns]
    rules = ["-" * width if left else "-" * (width - 1) + ":" for width, left in zip(widths, lefts, strict=True)]
    shapes = list(zip(widths, lefts, strict=True))
    lines = [
        [cell.ljust(width) if left else cell.rjust(width) for cell, (width, left) in zip(row, shapes, strict=True)]
        for row in rows
    ]
    lines.insert(1, rules)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain(text: str) -> str:
    """Text of which Markdown makes nothing else, on one line."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    for special in "\\|`*[":
        text = text.replace(special, f"\\{special}")
    return text


# --------------------------------------------------------------------------------------------------- HTML

STYLE = """
body { margin: 2em auto; max-width: 1100px; padding: 0 1em; background: #fff; color: #222;
       font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7em; } h2 { margin-top: 2em; border-bottom: 1px solid #ccc; } h3 { font-size: 1em; margin: 1.6em 0 .4em; }
p { max-width: 52em; } .note { color: #666; font-size: .9em; margin: .3em 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .7em; border-bottom: 1px solid #e4e4e4; text-align: right; vertical-align: top; }
th { border-bottom: 2px solid #bbb; vertical-align: bottom; } td { white-space: nowrap; }
.text { text-align: left; white-space: normal; } td.text:first-child { white-space: nowrap; }
.marked { background: #e8f1fa; } tbody tr:hover { background: #f5f5f5; }
img { display: block; max-width: 100%; height: auto; margin: 1em 0; }
"""


def write(report: Report, pictures: list[Path], out: Path) -> None:
    """Makes one file that needs no other."""
    found = {picture.stem: picture for picture in pictures}
    body = [piece for section in sections(report) for piece in html_section(section, found)]
    title = "Benchmark results of estargz"
    lines = [
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        f"<style>{STYLE}</style></head><body>",
        f"<h1>{title}</h1>",
        *body,
        "</body></html>",
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def html_section(section: Section, pictures: dict[str, Path]) -> Iterator[str]:
    yield f"<h2>{escape(section.title)}</h2>"
    yield from (f"<p>{escape(words)}</p>" for words in section.words)
    if section.picture in pictures:
        yield embedded(pictures[section.picture])
    for table in section.tables:
        yield from html_table(table)
    if section.points:
        yield "<ul>" + "".join(f"<li>{escape(point)}</li>" for point in section.points) + "</ul>"


def embedded(picture: Path) -> str:
    data = base64.b64encode(picture.read_bytes()).decode("ascii")
    return f'<img alt="{escape(ALTERNATIVES.get(picture.stem, picture.stem))}" src="data:image/png;base64,{data}">'


def html_table(table: Table) -> Iterator[str]:
    if table.title:
        yield f"<h3>{escape(table.title)}</h3>"
    yield '<div class="wide"><table>'
    yield f"<thead><tr>{cells('th', table.columns, table.columns)}</tr></thead><tbody>"
    for index, row in enumerate(table.rows):
        marked = ' class="marked"' if index == table.marked else ""
        yield f"<tr{marked}>{cells('td', row, table.columns)}</tr>"
    yield "</tbody></table></div>"
    yield from (f'<p class="note">{escape(note)}</p>' for note in table.notes)


def cells(tag: str, row: Sequence[str], columns: Sequence[str]) -> str:
    openings = [f'<{tag} class="text">' if column in TEXT_COLUMNS else f"<{tag}>" for column in columns]
    return "".join(f"{opening}{escape(cell)}</{tag}>" for opening, cell in zip(openings, row, strict=True))
