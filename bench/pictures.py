"""The results as pictures: PNG files that come out the same from the same report.

Import it after measuring, or in another process: what matplotlib takes counts as the peak of whatever is started next.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, pairwise
from math import ceil
from pathlib import Path
from statistics import median
from string import ascii_letters
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from numpy.typing import NDArray
from page import Contest, Limit, Measured, Report, limit_of, middle, number, one_and_two, ratios, tree_name, values

DPI = 110
WIDTH = 9.1
"""Inches."""

# The options of matplotlib's functions are looser than their types.
Look = dict[str, Any]

STYLE: Look = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.labelsize": 11,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "figure.dpi": DPI,
    "font.family": "DejaVu Sans",  # matplotlib brings it along
    "font.size": 10.5,
    "grid.color": "#e6e6e6",
    "legend.fontsize": 10.5,
    "legend.frameon": False,
    "savefig.dpi": DPI,
}

# Also those who do not see every colour tell these apart.
COLOURS = {"estargz": "#0072b2", "buildkit": "#d55e00", "go": "#009e73", "tar": "#707070", "python": "#b3579a"}
MARKERS = {"estargz": "o", "buildkit": "s", "go": "D", "tar": "^", "python": "v"}
OTHER_COLOUR, OTHER_MARKER = "#333333", "P"
STAGE_COLOURS = "#0072b2 #e69f00 #009e73 #cc79a7 #56b4e9 #d55e00 #f0e442 #8c6d31 #7b6bb0 #a6d854".split()
IDLE_COLOURS = {"wait": "#d9d9d9", "start and end": "#a8a8a8"}

MODEL_LOOK: Look = {"color": "#333333", "linestyle": "--", "linewidth": 1.4}
BEYOND_LOOK: Look = {"color": "#f3efe3", "zorder": 0}
SERIAL_LOOK: Look = {"color": "black", "linestyle": "", "marker": "|", "markersize": 24, "markeredgewidth": 2.5}
DOT_LOOK: Look = {"color": "#444444", "linestyle": "", "marker": "o", "markersize": 7, "markeredgewidth": 1.5}

# Where logarithmic axes have their ticks.
TENS = [10.0**power for power in range(-3, 15)]
ROUND = [factor * ten for ten in TENS for factor in (1, 2, 5)]
DENSE = [factor * ten for ten in TENS for factor in (1, 2, 3, 4, 6, 8)]
TWOS = [2.0**power for power in range(12)]


def draw(report: Report, folder: Path) -> list[Path]:
    """Writes every picture that there are figures for; the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, picture in PICTURES.items():
        with matplotlib.style.context(["default", STYLE]):
            figure = picture(report)
            if figure is not None:
                made.append(folder / f"{name}.png")
                figure.savefig(made[-1], metadata={"Software": None})  # a version, which would make files differ
    return made


def new_figure(height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def margins(figure: Figure, left: float, right: float, top: float, bottom: float) -> None:
    """Inches, which do not depend on how many panels there are."""
    wide, high = figure.get_size_inches()
    figure.subplots_adjust(left=left / wide, right=1 - right / wide, top=1 - top / high, bottom=bottom / high)


def plain_ticks(axis: Any, low: float, high: float, ticks: Sequence[float] = ROUND) -> None:
    """Numbers as people write them, on a logarithmic axis."""
    axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(short))


def short(value: float, _: int | None = None) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= max(size, 1e4):
            return f"{value / size:g}{unit}"
    return f"{value:g}"


# --------------------------------------------------------------------------------------------------- levels


@dataclass(frozen=True, slots=True)
class Spot:
    """A way in the plane: blob bytes as a percentage of the payload, payload MB/s in the middle, at worst, at best."""

    way: Measured
    x: float
    y: float
    worst: float
    best: float

    @property
    def level(self) -> int | None:
        return self.way.get("level")


@dataclass(frozen=True, slots=True)
class Series:
    """Ways that differ in nothing but the level."""

    name: str
    family: str
    lazy: bool
    spots: list[Spot] = field(default_factory=list)

    @property
    def joined(self) -> bool:
        return len(self.spots) > 1

    @property
    def first(self) -> str:
        """The name of the only way, where they are not joined."""
        return str(self.spots[0].way["name"])

    @property
    def colour(self) -> str:
        return COLOURS.get(self.family, OTHER_COLOUR)

    @property
    def look(self) -> Look:
        return {
            "color": self.colour,
            "linestyle": "-" if self.lazy else ":",
            "linewidth": 1.6,
            "marker": MARKERS.get(self.family, OTHER_MARKER),
            "markeredgewidth": 1.5,
            "markerfacecolor": self.colour if self.lazy else "white",
            "markersize": 7,
        }


def levels(report: Report) -> Figure | None:
    """Blob size against throughput, a panel for each tree."""
    each = [(tree_name(contest["tree"]), series_of(contest)) for contest in report.get("compare") or []]
    shown = [(name, found) for name, found in each if found]
    if not shown:
        return None
    everywhere = [series for _, found in shown for series in found]
    alone = dict.fromkeys(series.first for series in everywhere if not series.joined)
    letters = dict(zip(alone, cycle(ascii_letters), strict=False))
    handles = level_legend(everywhere, letters)
    rows, columns, legend = ceil(len(shown) / 2), min(2, len(shown)), 0.24 * ceil(len(handles) / 3)
    figure = new_figure(4.2 * rows + 0.75 + legend)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    margins(figure, left=0.75, right=0.2, top=0.4, bottom=0.8 + legend)
    figure.subplots_adjust(hspace=0.27, wspace=0.17)
    for place, (name, found) in enumerate(shown):
        level_panel(panels[place], name, found, letters)
        panels[place].set_ylabel("" if place % columns else "MB/s of payload (up is faster)")
    for axes in panels[len(shown) :]:
        axes.remove()
    figure.legend(handles=handles, loc="lower center", ncols=3, columnspacing=1.2)
    return figure


def series_of(contest: Contest) -> list[Series]:
    found: dict[str, Series] = {}
    for way in contest.get("ways") or []:
        spot = spot_of(way, contest["tree"].get("size", 0))
        if spot:
            name = without_level(way["name"])
            found.setdefault(name, Series(name, way.get("family", ""), way.get("lazy", False))).spots.append(spot)
    return list(found.values())


def spot_of(way: Measured, payload: int) -> Spot | None:
    wall = [seconds for seconds in values(way, "wall") if seconds]
    if not (wall and payload and way.get("size")):
        return None
    amount = payload / 1e6
    return Spot(way, way["size"] / payload * 100, amount / median(wall), amount / max(wall), amount / min(wall))


def without_level(name: str) -> str:
    """The same for "estargz, level 3" and "estargz, level 2 (default)", and for "tar | igzip -1" and "tar | igzip -3"."""
    return re.sub(r", level \d+( \(default\))?$| -\d+$", "", name)


def level_panel(axes: Axes, name: str, shown: Sequence[Series], letters: dict[str, str]) -> None:
    axes.set_title(name)
    axes.set_xlabel("blob, % of payload (left is smaller)")
    axes.set_yscale("log")
    spots = [spot for series in shown for spot in series.spots]
    far = far_right(spots)
    fit(axes, [spot for spot in spots if spot not in far])
    for series in shown:
        for spot in series.spots:
            axes.plot([spot.x, spot.x], [spot.worst, spot.best], color=series.colour, linewidth=1, alpha=0.5)
        known = sorted((spot for spot in series.spots if spot.level is not None), key=lambda spot: spot.level or 0)
        axes.plot([spot.x for spot in known], [spot.y for spot in known], **series.look)
        unknown = [spot for spot in series.spots if spot.level is None]
        axes.plot([spot.x for spot in unknown], [spot.y for spot in unknown], **series.look | {"linestyle": ""})
    said = [f"{spot.way['name']}: {spot.x:.0f} %, {spot.y:.0f} MB/s" for spot in far]
    if said:
        axes.text(
            0.98, 0.02, "\n".join(["off to the right:", *said]), transform=axes.transAxes, ha="right", fontsize=9.5
        )
    near = [replace(series, spots=[spot for spot in series.spots if spot not in far]) for series in shown]
    place_labels(axes, [series for series in near if series.spots], letters)


def far_right(spots: Sequence[Spot]) -> list[Spot]:
    """What does not compress would push all the others into a corner."""
    near = sorted(spots, key=lambda spot: spot.x)
    far = []
    while len(near) > 2 and near[-1].x - near[-2].x > max(20, near[-2].x - near[0].x):
        far.append(near.pop())
    return far


def fit(axes: Axes, spots: Sequence[Spot]) -> None:
    """Leaves room around the points for their labels."""
    left, right = min(spot.x for spot in spots), max(spot.x for spot in spots)
    low, high = min(spot.worst for spot in spots) / 1.5, max(spot.best for spot in spots) * 1.5
    room = max(right - left, 1) * 0.15
    axes.set_xlim(left - room, right + room)
    axes.set_ylim(low, high)
    plain_ticks(axes.yaxis, low, high)


def level_legend(found: Sequence[Series], letters: dict[str, str]) -> list[Line2D]:
    joined = {series.name: series for series in found if series.joined}
    alone = {series.first: series for series in found if not series.joined}
    lines = [Line2D([], [], label=f"{name}, by level", **series.look) for name, series in joined.items()]
    dots = [
        Line2D([], [], label=f"{letters[name]}: {name}", **series.look | {"linestyle": ""})
        for name, series in alone.items()
    ]
    lazy = Line2D([], [], label="filled: eStargz, pulled lazily", **DOT_LOOK)
    whole = Line2D([], [], label="hollow: only pulled whole", markerfacecolor="white", **DOT_LOOK)
    return [*lines, lazy, whole, *dots]


# --------------------------------------------------------------------------------------------------- labels of points

DIRECTIONS = np.array([(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)])
DISTANCES = np.array([6, 11, 18, 28, 40])
"""Points, typographic ones."""
HORIZONTAL = {-1: "right", 0: "center", 1: "left"}
VERTICAL = {-1: "top", 0: "center", 1: "bottom"}

Boxes = NDArray[np.float64]
"""Rows of left, bottom, right, top, in pixels."""


def place_labels(axes: Axes, shown: Sequence[Series], letters: dict[str, str]) -> None:
    """Puts each label where it covers least of what is there already."""
    taken = np.vstack([text.get_window_extent().extents for text in axes.texts] + [covered(axes, one) for one in shown])
    for series in shown:
        for spot in series.spots:
            text = level_label(spot) if series.joined else letters.get(series.first, level_label(spot))
            taken = np.vstack([taken, place_label(axes, text, spot, series.colour, taken)])


def level_label(spot: Spot) -> str:
    return f"{spot.level}{': default' if 'default' in spot.way['name'] else ''}"


def covered(axes: Axes, series: Series) -> Boxes:
    """The points, and the line that joins them."""
    points = axes.transData.transform([(spot.x, spot.y) for spot in series.spots])
    return np.vstack([around(points, 6), *(line(start, end) for start, end in pairwise(points))])


def line(start: Boxes, end: Boxes) -> Boxes:
    return around(start + (end - start) * np.linspace(0, 1, 20)[:, None], 3)


def around(centres: Boxes, half: float | Boxes) -> Boxes:
    return np.hstack([centres - half, centres + half])


def place_label(axes: Axes, text: str, spot: Spot, colour: str, taken: Boxes) -> Boxes:
    look: Look = {"color": colour, "textcoords": "offset points"}
    leader: Look = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
    label = axes.annotate(text, (spot.x, spot.y), (0, 0), arrowprops=leader, **look)
    size = np.array(Text.get_window_extent(label).size)  # without the line that leads to it
    distances, sides = np.repeat(DISTANCES, len(DIRECTIONS)), np.tile(DIRECTIONS, (len(DISTANCES), 1))
    point = axes.transData.transform((spot.x, spot.y))
    boxes = around(point + sides * (distances[:, None] * DPI / 72 + size / 2), size / 2)
    outside = size.prod() - overlaps(boxes, np.array([axes.bbox.extents])).sum(axis=1)
    best = int(np.argmin(overlaps(boxes, taken).sum(axis=1) + 10 * outside + 3 * distances))
    right, up = sides[best]
    label.set(position=sides[best] * distances[best], ha=HORIZONTAL[right], va=VERTICAL[up])
    return np.vstack([boxes[best], line(point, point + sides[best] * distances[best] * DPI / 72)])


def overlaps(some: Boxes, others: Boxes) -> Boxes:
    """The common area of each of some and each of the others."""
    low = np.maximum(some[:, None, :2], others[None, :, :2])
    high = np.minimum(some[:, None, 2:], others[None, :, 2:])
    common: Boxes = np.clip(high - low, 0, None).prod(axis=2)
    return common


# --------------------------------------------------------------------------------------------------- one blob

# Titles and units.
TRAFFIC = {
    "wall": ("wall clock, s", 1),
    "cpu": ("CPU, s", 1),
    "written": ("written, MB", 1e6),
    "space": ("peak space, MB", 1e6),
    "read": ("read, MB", 1e6),
}


@dataclass(frozen=True, slots=True)
class Bar:
    """``one``: beside two blobs, the same program's way with one."""

    whose: str
    way: Measured
    one: Measured | None


def one_blob(report: Report) -> Figure | None:
    """A row of panels for each tree: what one blob and two blobs cost, program by program."""
    each = [(tree_name(contest["tree"]), bars_of(contest)) for contest in report.get("two_blobs") or []]
    shown = [(name, bars) for name, bars in each if bars]
    keys = [key for key in TRAFFIC if any(values(bar.way, key) for _, bars in shown for bar in bars)]
    if not keys:
        return None
    heights = [len(bars) + 0.5 for _, bars in shown]
    figure = new_figure(1.0 + 0.3 * sum(heights) + 0.35 * len(shown))
    grid = figure.subplots(len(shown), len(keys), squeeze=False, height_ratios=heights)
    margins(figure, left=1.6, right=0.1, top=0.55, bottom=0.4)
    figure.subplots_adjust(wspace=0.08, hspace=0.35)
    for row, (name, bars) in zip(grid, shown, strict=True):
        for axes, key in zip(row, keys, strict=True):
            traffic_panel(axes, key, bars)
        row[0].set_yticks(range(len(bars)), [bar.way["name"] for bar in bars])
        row[0].annotate(name, (0, 1), (-108, 3), "axes fraction", "offset points", fontsize=11, fontweight="bold")
    for axes, key in zip(grid[0], keys, strict=True):
        axes.set_title(TRAFFIC[key][0], fontsize=10.5, pad=9)
    figure.text(0.01, 0.01, "In brackets: two blobs as a multiple of one, run by run.", color="#555555", va="bottom")
    return figure


def bars_of(contest: Contest) -> list[Bar]:
    pairs = [(Bar(whose, one, None), Bar(whose, two, one)) for whose, one, two in one_and_two(contest)]
    return [bar for pair in pairs for bar in pair if values(bar.way, "wall")]


def traffic_panel(axes: Axes, key: str, bars: Sequence[Bar]) -> None:
    lengths = [(middle(bar.way, key) or 0) / TRAFFIC[key][1] for bar in bars]
    for place, (bar, length) in enumerate(zip(bars, lengths, strict=True)):
        colour = COLOURS.get(bar.whose.lower(), OTHER_COLOUR)
        axes.barh(place, length, height=0.72, color=colour, alpha=0.5 if bar.one else 1)
        beside(axes, length, place, bar_label(bar, key))
    axes.set_xlim(0, (max(lengths) or 1) * 2.9)  # the rest is for the figures
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xticks([])
    axes.set_yticks([])


def bar_label(bar: Bar, key: str) -> str:
    times = ratios(bar.way, bar.one or {}, key)
    return number(middle(bar.way, key), TRAFFIC[key][1]) + (f" ({median(times):.2f})" if times else "")


def beside(axes: Axes, x: float, y: float, text: str) -> None:
    axes.annotate(text, (x, y), (4, 0), textcoords="offset points", va="center", fontsize=9.5)


# --------------------------------------------------------------------------------------------------- scale

# A point's key and its axis; what its rate counts, in which unit, and the panel's title.
SCALES = {
    "threads": ("threads", "threads", "bytes", 1e6, "MB/s by threads"),
    "sizes": ("bytes", "payload, bytes", "bytes", 1e6, "MB/s by payload"),
    "entries": ("entries", "entries", "entries", 1, "entries/s by entries"),
}


def scale(report: Report) -> Figure | None:
    """A column of panels each for threads, bytes and entries: the rate above, the peak below."""
    found = report.get("scale") or {}
    kinds = [kind for kind in SCALES if scale_points(found, kind)]
    if not kinds:
        return None
    figure = new_figure(6.4)
    grid = figure.subplots(2, len(kinds), squeeze=False, sharex="col")
    margins(figure, left=0.7, right=0.2, top=0.4, bottom=0.95)
    figure.subplots_adjust(wspace=0.27, hspace=0.1)
    for (upper, lower), kind in zip(grid.T, kinds, strict=True):
        scale_column(upper, lower, kind, scale_points(found, kind))
        if kind == "threads":
            thread_model(upper, found, report["machine"].get("cpus") or 0)
        finish_column(upper, lower, TWOS if kind == "threads" else TENS)
    grid[1][0].set_ylabel("peak RSS, MB")
    figure.legend(handles=scale_legend(found), loc="lower center", ncols=3)
    return figure


def scale_points(found: dict[str, Any], kind: str) -> list[Measured]:
    """Those that a logarithmic axis has a place for."""
    key, _, amount, _, _ = SCALES[kind]
    points = [point for point in found.get(kind) or [] if point.get(key) and point.get(amount)]
    return sorted((point for point in points if all(values(point, "wall") or [0])), key=lambda point: float(point[key]))


def scale_column(upper: Axes, lower: Axes, kind: str, points: Sequence[Measured]) -> None:
    key, axis, amount, unit, title = SCALES[kind]
    upper.set_xscale("log", base=2 if kind == "threads" else 10)
    across = [point[key] for point in points]
    ranges(upper, across, [[point[amount] / unit / wall for wall in values(point, "wall")] for point in points])
    ranges(lower, across, [[peak / 1e6 for peak in values(point, "peak")] for point in points])
    upper.set_title(title)
    lower.set_xlabel(axis)


def ranges(axes: Axes, across: Sequence[float], rows: Sequence[Sequence[float]]) -> None:
    """A line through the medians, and how far each of them ranges."""
    there = [(x, row) for x, row in zip(across, rows, strict=True) if row]
    for x, row in there:
        axes.plot([x, x], [min(row), max(row)], color=COLOURS["estargz"], linewidth=5, alpha=0.3)
    axes.plot([x for x, _ in there], [median(row) for _, row in there], "o-", color=COLOURS["estargz"], zorder=3)


def thread_model(axes: Axes, found: dict[str, Any], cpus: int) -> None:
    """The model's rates; beyond the machine's CPUs there is nothing but the model."""
    points = scale_points(found, "threads")
    walls = sorted((point["threads"], point["wall"]) for point in found.get("model") or [] if point.get("wall"))
    axes.plot([threads for threads, _ in walls], [points[0]["bytes"] / 1e6 / wall for _, wall in walls], **MODEL_LOOK)
    axes.set_yscale("log", base=2)
    furthest = max(threads for threads, _ in [*walls, (points[-1]["threads"], 0)]) * 1.15
    axes.set_xlim(0.87, furthest)
    if 0 < cpus < furthest:
        axes.axvspan(cpus, furthest, **BEYOND_LOOK)


def finish_column(upper: Axes, lower: Axes, ticks: Sequence[float]) -> None:
    for axes in (upper, lower):
        if axes.get_yscale() == "log":
            plain_ticks(axes.yaxis, *axes.get_ylim(), DENSE)
        else:
            axes.set_ylim(bottom=0, top=axes.get_ylim()[1] * 1.08)
            axes.yaxis.set_major_formatter(FuncFormatter(short))
    low, high = lower.get_xlim()
    plain_ticks(lower.xaxis, low, high, ticks[1::2] if high / low > 1e5 else ticks)


def scale_legend(found: dict[str, Any]) -> list[Line2D | Patch]:
    measured = Line2D([], [], color=COLOURS["estargz"], marker="o", label="measured")
    if not found.get("model"):
        return [measured]
    model = Line2D([], [], label="model from the stages alone", **MODEL_LOOK)
    return [measured, model, Patch(label="more threads than this machine has CPUs", **BEYOND_LOOK)]


# --------------------------------------------------------------------------------------------------- stages


def stages(report: Report) -> Figure | None:
    """For each tree what the stages alone would take on all threads, and where the whole run's time went."""
    limits = [limit for limit in report.get("limit") or [] if limit.get("parts") and limit.get("wall")]
    if not limits:
        return None
    colours = stage_colours(limits)
    legend = 0.26 * ceil((len(colours) + 1) / 5)
    figure = new_figure(1.2 + 1.2 * len(limits) + legend)
    axes = figure.subplots()
    margins(figure, left=1.2, right=0.15, top=0.4, bottom=0.75 + legend)
    axes.set_xlim(0, max(limit["wall"] for limit in limits) * 1.4)  # the rest is for the figures
    for place, limit in enumerate(limits):
        limit_bars(axes, place, limit, colours)
    axes.set_title("Upper bars: the stages alone. Lower bars: the whole run.")
    axes.set_xlabel("seconds: all threads' together, divided by their number")
    axes.set_yticks(range(len(limits)), [limit_name(limit) for limit in limits])
    axes.set_ylim(len(limits) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    figure.legend(handles=stage_legend(colours), loc="lower center", ncols=5)
    return figure


def limit_name(limit: Limit) -> str:
    return f"{tree_name(limit.get('tree'))}\nlevel {limit.get('level')}\n{limit.get('threads')} threads"


def stage_colours(limits: Sequence[Limit]) -> dict[str, str]:
    names = dict.fromkeys(part["stage"] for limit in limits for part in limit["parts"])
    names |= dict.fromkeys(stage for limit in limits for stage in limit.get("spent") or {})
    busy = [name for name in names if name not in IDLE_COLOURS]
    idle = {name: colour for name, colour in IDLE_COLOURS.items() if name in names}
    return dict(zip(busy, cycle(STAGE_COLOURS), strict=False)) | idle


def stage_legend(colours: dict[str, str]) -> list[Line2D | Patch]:
    patches = [Patch(color=colour, label=stage) for stage, colour in colours.items()]
    return [*patches, Line2D([], [], label="serial bound", **SERIAL_LOOK | {"markersize": 13})]


def limit_bars(axes: Axes, place: int, limit: Limit, colours: dict[str, str]) -> None:
    threads, bound, wall = limit.get("threads") or 1, limit_of(limit), limit["wall"]
    alone = {part["stage"]: part["seconds"] / threads for part in limit["parts"]}
    spent = {stage: seconds / threads for stage, seconds in (limit.get("spent") or {}).items()} or {"": wall}
    upper, lower = place - 0.19, place + 0.19
    stacked(axes, upper, alone, colours)
    stacked(axes, lower, spent, colours)
    serial = limit.get("serial_bound") or 0
    if serial:
        axes.plot(serial, upper, **SERIAL_LOOK)
    beside(axes, max(sum(alone.values()), serial), upper, f"limit: {number(bound)} s" if bound else "")
    fraction = f", {bound / wall:.0%} of the limit" if bound else ""
    beside(axes, max(sum(spent.values()), wall), lower, f"{number(wall)} s{fraction}")


def stacked(axes: Axes, place: float, lengths: dict[str, float], colours: dict[str, str]) -> None:
    """One bar of pieces; each that has room for it says its seconds."""
    start = 0.0
    for stage, colour in {**colours, "": OTHER_COLOUR}.items():
        length = max(0, lengths.get(stage, 0))  # a part that is a difference of runs may come out below nothing
        axes.barh(place, length, left=start, height=0.34, color=colour, edgecolor="white", linewidth=0.6)
        if length > axes.get_xlim()[1] * 0.05:
            ink = "white" if is_dark(colour) else "black"
            axes.text(start + length / 2, place, number(length), ha="center", va="center", color=ink, fontsize=9.5)
        start += length


def is_dark(colour: str) -> bool:
    red, green, blue = to_rgb(colour)
    return 0.3 * red + 0.59 * green + 0.11 * blue < 0.5


PICTURES: dict[str, Callable[[Report], Figure | None]] = {
    "levels": levels,
    "one-blob": one_blob,
    "scale": scale,
    "stages": stages,
}
