"""Charts of LIT's tables, measured beside published."""

from itertools import groupby

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from litvit.benchmarks.paper import ACCURACIES
from litvit.benchmarks.published import COUNTERPARTS, PUBLISHED, TABLES

CHARTS = {  # files, and what they show
    "accuracy.png": "Table 1: top-1 accuracy against multiply-adds",
    "speed.png": "Table 1: images/s against multiply-adds, and ratios of LIT to its counterparts",
    "ablations.png": "Tables 2 to 4: multiply-adds, and top-1 accuracy",
}
RATIOS = {
    "inference_images_per_second": "inference images/s, LIT / counterpart",
    "training_images_per_second": "training images/s, LIT / counterpart",
    "training_memory": "training memory, LIT / counterpart",
    "test_memory": "test memory, LIT / counterpart",
}
COLOURS = {"measured": "tab:blue", "published": "grey"}


def draw_charts(rows: list[dict]) -> dict[str, Figure]:
    """Draw what there is to draw.

    Args:
        rows: Rows of `benchmark_paper`.

    Returns:
        Figures by file name, of CHARTS: accuracy for Table 1, speed if its speed was measured too, ablations for Tables
        2 to 4.
    """
    table1 = [row for row in rows if row["table"] == 1]
    charts = {}
    if table1:
        charts["accuracy.png"] = _accuracy(table1)
        if "ratios" in table1[-1]:
            charts["speed.png"] = _speed(table1)
    if len(table1) < len(rows):
        charts["ablations.png"] = _ablations(rows[len(table1) :])
    return charts


def _families(rows: list[dict]) -> list[tuple[str, list[dict]]]:
    return [(name, list(own)) for name, own in groupby(rows, lambda row: row["published"]["title"].partition("-")[0])]


def _accuracy(rows: list[dict]) -> Figure:
    figure = Figure(figsize=(15, 5), dpi=100, layout="constrained")
    for place, (key, title) in enumerate(ACCURACIES.items(), 1):
        axes = figure.add_subplot(1, 3, place, xlabel="multiply-adds (G)", ylabel=f"{title} top-1 (%)")
        for family, own in _families(rows):
            published = [(row["published"]["macs"], row["published"][key]) for row in own]
            (line,) = axes.plot(*zip(*published, strict=True), "o--", markerfacecolor="none", alpha=0.6, label=family)
            found = [(row["macs"] / 1e9, row["accuracies"][key]["percent"]) for row in own if key in row["accuracies"]]
            if found:
                axes.plot(*zip(*found, strict=True), "o", color=line.get_color())
    axes.plot([], [], "o", color="grey", label="measured")
    axes.plot([], [], "o--", color="grey", markerfacecolor="none", label="published")
    axes.legend()
    return figure


def _speed(rows: list[dict]) -> Figure:
    keys = [key for key in RATIOS if key in rows[-1]["ratios"]]
    figure = Figure(figsize=(4 * (1 + len(keys)), 4.5), dpi=100, layout="constrained")
    axes = figure.add_subplot(1, 1 + len(keys), 1, xlabel="multiply-adds (G)", ylabel="inference images/s (measured)")
    for family, own in _families(rows):
        points = [(row["macs"] / 1e9, row["inference_images_per_second"]) for row in own]
        axes.plot(*zip(*points, strict=True), "o-", label=family)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend()
    pairs = [row for row in rows if row["model"] in COUNTERPARTS]
    names = [f"{row['published']['title']} / {PUBLISHED[row['counterpart']].title}" for row in pairs]
    for place, key in enumerate(keys, 2):
        axes = figure.add_subplot(1, 1 + len(keys), place, xlabel=RATIOS[key])
        both = ([row[ratios].get(key) for row in pairs] for ratios in ("ratios", "published_ratios"))
        _pairs(axes, names if place == 2 else [""] * len(names), *both, digits=2)
        axes.axvline(1, color="black", linewidth=0.8)
    _legend(figure)
    return figure


def _ablations(rows: list[dict]) -> Figure:
    tables = [list(own) for _, own in groupby(rows, lambda row: row["table"])]
    timed = "ratios" in tables[0][1]
    figure = Figure(figsize=(12 + 4 * timed, 3 * len(tables)), dpi=100, layout="constrained")
    for line, own in enumerate(tables):
        found = [row["accuracies"].get("top1", {}).get("percent") for row in own]
        panels = [
            ("multiply-adds (G)", [row["macs"] / 1e9 for row in own], [row["published"]["macs"] for row in own]),
            ("ImageNet top-1 (%)", found, [row["published"]["top1"] for row in own]),
        ]
        if timed:
            speeds = [row.get("ratios", {}).get("inference_images_per_second", 1) for row in own]
            panels.append(("inference images/s, relative", speeds, [None] * len(own)))
        for column, (label, measured, published) in enumerate(panels, 1):
            axes = figure.add_subplot(len(tables), len(panels), line * len(panels) + column, xlabel=label)
            names = [row["published"]["title"] if column == 1 else "" for row in own]
            _pairs(axes, names, measured, published, 1 if column < 3 else 2, bars=column != 2)
            if column == 1:
                axes.set_title(f"Table {own[0]['table']}: {TABLES[own[0]['table']].title}", loc="left")
    _legend(figure)
    return figure


def _pairs(
    axes: Axes,
    names: list[str],
    measured: list[float | None],
    published: list[float | None],
    digits: int,
    bars: bool = True,
) -> None:
    """Draw what is measured above what is published, with numbers. Points, not bars, where the axis is not from 0."""
    for values, colour, offset in zip((measured, published), COLOURS.values(), (-0.2, 0.2), strict=True):
        shown = [(value, place + offset) for place, value in enumerate(values) if value is not None]
        lengths, places = zip(*shown, strict=True) if shown else ((), ())
        if bars:
            axes.barh(places, lengths, height=0.36, color=colour)
        else:
            axes.plot(lengths, places, "o", color=colour)
        for value, place in shown:
            beside = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
            axes.annotate(f"{value:.{digits}f}", (value, place), **beside)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.margins(x=0.15)


def _legend(figure: Figure) -> None:
    """Name the colours of `_pairs`, below the panels."""
    figure.legend(
        handles=[Patch(color=colour, label=label) for label, colour in COLOURS.items()],
        loc="outside lower center",
        ncols=2,
    )
