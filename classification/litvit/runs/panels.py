"""Charts of a run's page: small panels of curves or bars as inline SVG, told apart by colour, dashes and markers."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 380, 200
LEFT, RIGHT, TOP, BOTTOM = 62, 10, 10, 30
STYLES = 6  # of lines: colours, dashes and markers in page.html
MARKED = 40  # points up to which each has a marker
HOVERED = 300  # columns with a text of their own


class Series(NamedTuple):
    """A curve: its name, and its values by epoch or by iteration."""

    name: str
    values: dict[int, float]


def number(value: float) -> str:
    """Return a number with four digits, or as it is if it has more before its point."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def curves(
    title: str, unit: str, series: Sequence[Series], from_zero: bool = False, axis: str = "epoch", every: bool = True
) -> str:
    """Draw curves over epochs or iterations.

    Args:
        title: Name of what is shown.
        unit: Unit of the values, empty for none.
        series: Curves. What is not finite is a gap.
        from_zero: Whether the axis of the values begins at 0.
        axis: What is counted, "epoch" or "iteration".
        every: Whether each of them has a value, so that one without is a gap.

    Returns:
        SVG with its legend, empty if there is nothing to draw.
    """
    shown = [(style % STYLES, name, _finite(values)) for style, (name, values) in enumerate(series)]
    points = [point for _, _, values in shown for point in values.items()]
    if not points:
        return ""
    x, first, last = _epochs([epoch for epoch, _ in points])
    low = min(value for _, value in points)
    y, rules = _value_axis(min(low, 0.0) if from_zero else low, max(value for _, value in points))
    drawn = [rules, _epoch_axis(x, first, last, axis)]
    for (style, _, values), (_, given) in zip(shown, series, strict=True):
        for part in _connected(given, every):
            path = " ".join(f"{x(epoch):.1f},{y(value):.1f}" for epoch, value in part)
            drawn.append(f'<polyline class="line s{style}" points="{path}"/>')
        if len(values) <= MARKED:
            drawn += [_marker(style, x(epoch), y(value)) for epoch, value in values.items()]
    texts = {}
    for epoch in sorted({epoch for epoch, _ in points}):
        lines = [f"{name}: {number(values[epoch])} {unit}".strip() for _, name, values in shown if epoch in values]
        texts[epoch] = "\n".join([f"{axis} {epoch}", *lines])
    drawn.append(_hover(texts, x))
    keys = [(_line_key(style), name) for style, name, _ in shown]
    return _figure(title, unit, drawn, _keys(keys) if len(series) > 1 else "", axis)


def stacked_bars(title: str, unit: str, series: Sequence[Series]) -> str:
    """Draw one bar per epoch, made up of the values of all series from below. Arguments as for `curves`."""
    shown = [(style % STYLES, name, _finite(values)) for style, (name, values) in enumerate(series)]
    epochs = sorted({epoch for _, _, values in shown for epoch in values})
    sums = {epoch: sum(values.get(epoch, 0.0) for _, _, values in shown) for epoch in epochs}
    if not epochs or not max(sums.values()) > 0:
        return ""
    x, first, last = _epochs(epochs, bars=True)
    y, axis = _value_axis(0.0, max(sums.values()))
    width = min(max(0.8 * (WIDTH - LEFT - RIGHT) / (last - first + 1), 0.5), 40)
    drawn, texts = [axis, _epoch_axis(x, first, last)], {}
    for epoch in epochs:
        below, lines = 0.0, [f"epoch {epoch}: {number(sums[epoch])} {unit}"]
        for style, name, values in shown:
            if value := values.get(epoch, 0.0):
                top, bottom = y(below + value), y(below)
                drawn.append(
                    f'<rect class="bar b{style}" x="{x(epoch) - width / 2:.1f}" y="{top:.1f}" width="{width:.1f}" '
                    f'height="{bottom - top:.1f}"/>'
                )
                lines.append(f"{name}: {number(value)} {unit}")
                below += value
        texts[epoch] = "\n".join([lines[0], *reversed(lines[1:])])
    drawn.append(_hover(texts, x, bars=True))
    keys = [(f'<rect class="bar b{style}" x="6" y="0" width="16" height="12"/>', name) for style, name, _ in shown]
    return _figure(title, unit, drawn, _keys(keys[::-1]))


def confusion_matrix(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> str:
    """Draw a confusion matrix, shaded by the share of each row's images.

    Args:
        counts: Numbers of images of each class (rows) by their predicted class (columns).
        classes: Names of the classes.
    """
    many = len(classes)
    cell = 30 if many <= 25 else 12 if many <= 60 else 7
    names = [name if len(name) <= 16 else f"{name[:14]}..." for name in classes] if many <= 60 else []
    size = 12 if many <= 25 else 10
    margin = max(24, 8 + max((0.6 * size * len(name) for name in names), default=0))
    side = margin + many * cell + 2
    drawn = [f'<rect class="frame" x="{margin:.1f}" y="{margin:.1f}" width="{many * cell}" height="{many * cell}"/>']
    for place, name in enumerate(names):
        middle = margin + (place + 0.5) * cell
        drawn.append(
            f'<text class="end" x="{margin - 5:.1f}" y="{middle + 4:.1f}" font-size="{size}">{escape(name)}</text>'
        )
        turned = f'transform="translate({middle + 4:.1f} {margin - 5:.1f}) rotate(-90)"'
        drawn.append(f'<text {turned} font-size="{size}">{escape(name)}</text>')
    for row, line in enumerate(counts):
        images = max(sum(line), 1)
        for column, count in enumerate(line):
            if not count:
                continue
            left, top, share = margin + column * cell, margin + row * cell, count / images
            verdict = "right" if row == column else f"predicted as {classes[column]}"
            text = escape(f"{classes[row]}: {count} of {sum(line)} images {verdict}")
            drawn.append(
                f'<rect class="cell" x="{left:.1f}" y="{top:.1f}" width="{cell}" height="{cell}" '
                f'fill-opacity="{0.08 + 0.92 * share:.2f}"><title>{text}</title></rect>'
            )
            if many <= 25:
                tone = "on" if share > 0.45 else "off"
                drawn.append(
                    f'<text class="count {tone}" x="{left + cell / 2:.1f}" y="{top + cell / 2 + 4:.1f}">{count}</text>'
                )
    label = f"Confusion matrix of {many} classes: rows are classes, columns are predicted classes"
    style = f"max-width:{side:.0f}px;min-width:{min(side, 300 + 3 * many):.0f}px"
    return (
        f'<div class="scroll"><svg class="matrix" viewBox="0 0 {side:.0f} {side:.0f}" role="img" '
        f'aria-label="{label}" style="{style}">{"".join(drawn)}</svg></div>'
    )


def _finite(values: dict[int, float]) -> dict[int, float]:
    return {epoch: value for epoch, value in sorted(values.items()) if math.isfinite(value)}


def _connected(values: dict[int, float], every: bool) -> list[list[tuple[int, float]]]:
    """Split a curve where values are not finite, and if `every` epoch is to have one, where epochs are left out."""
    parts: list[list[tuple[int, float]]] = [[]]
    for epoch, value in sorted(values.items()):
        if parts[-1] and (not math.isfinite(value) or (every and parts[-1][-1][0] != epoch - 1)):
            parts.append([])
        if math.isfinite(value):
            parts[-1].append((epoch, value))
    return [part for part in parts if part]


def _epochs(epochs: Sequence[int], bars: bool = False):
    """Return the function from an epoch to its place, and the first and the last epoch."""
    first, last = min(epochs), max(epochs)
    width = WIDTH - LEFT - RIGHT
    if bars:
        return (lambda epoch: LEFT + width * (epoch - first + 0.5) / (last - first + 1)), first, last
    return (lambda epoch: LEFT + width * ((epoch - first) / (last - first) if last > first else 0.5)), first, last


def _steps(low: float, high: float, most: int) -> list[float]:
    """Return round numbers from low to high, or a little beyond."""
    raw = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= raw * (1 - 1e-9))
    start = math.floor(low / step + 1e-9)
    return [step * place for place in range(start, math.ceil(high / step - 1e-9) + 1)]


def _value_axis(low: float, high: float):
    """Return the function from a value to its place, and the axis."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value
        spread = abs(high) / 10 or 1.0
        low, high = low - spread if low else 0.0, high + spread
    ticks = _steps(low, high, 4)
    bottom, top = ticks[0], ticks[-1]

    def place(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (top - value) / (top - bottom)

    drawn = []
    for tick in ticks:
        y = place(tick)
        drawn.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        text = number(0.0 if abs(tick) < 1e-12 * (top - bottom) else tick)
        drawn.append(f'<text class="end" x="{LEFT - 6}" y="{y + 4:.1f}">{text}</text>')
    return place, "".join(drawn)


def _epoch_axis(x, first: int, last: int, axis: str = "epoch") -> str:
    every = max(1, math.ceil(_steps(0, last - first, 8)[1])) if last > first else 1
    ticks = list(range(-(-first // every) * every, last + 1, every)) or [first]
    texts = [f'<text class="middle" x="{x(epoch):.1f}" y="{HEIGHT - BOTTOM + 15}">{epoch}</text>' for epoch in ticks]
    middle = (LEFT + WIDTH - RIGHT) / 2
    return "".join(texts) + f'<text class="middle soft" x="{middle}" y="{HEIGHT - 2}">{axis}</text>'


def _hover(texts: dict[int, str], x, bars: bool = False) -> str:
    """Return invisible columns that show a text where the pointer rests."""
    together = math.ceil(len(texts) / HOVERED)
    places = list(texts)[together - 1 :: together]
    width = (WIDTH - LEFT - RIGHT) / max(len(texts) - 1 + bars, 1) * together
    return "".join(
        f'<rect class="hover" x="{x(epoch) - width / 2:.1f}" y="{TOP}" width="{width:.1f}" '
        f'height="{HEIGHT - TOP - BOTTOM}"><title>{escape(texts[epoch])}</title></rect>'
        for epoch in places
    )


def _marker(style: int, x: float, y: float) -> str:
    shapes = (
        f'<circle class="mark m0" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>',
        f'<rect class="mark m1" x="{x - 2.6:.1f}" y="{y - 2.6:.1f}" width="5.2" height="5.2"/>',
        f'<path class="mark m2" d="M{x:.1f} {y - 3.4:.1f}l3.2 5.6h-6.4z"/>',
        f'<path class="mark m3" d="M{x:.1f} {y - 3.8:.1f}l3.8 3.8l-3.8 3.8l-3.8 -3.8z"/>',
        f'<path class="mark open m4" d="M{x - 2.8:.1f} {y - 2.8:.1f}l5.6 5.6m-5.6 0l5.6 -5.6"/>',
        f'<circle class="mark open m5" cx="{x:.1f}" cy="{y:.1f}" r="2.8"/>',
    )
    return shapes[style]


def _figure(title: str, unit: str, drawn: Sequence[str], keys: str, axis: str = "epoch") -> str:
    named = escape(f"{title}, {unit}" if unit else title)
    shown_unit = f" <small>{escape(unit)}</small>" if unit else ""
    return (
        f'<h3>{escape(title)}{shown_unit}</h3><svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{named}, by {axis}">{"".join(drawn)}</svg>{keys}'
    )


def legend(names: Sequence[str]) -> str:
    """Return the names of the series of `curves`, with their lines."""
    return _keys([(_line_key(place % STYLES), name) for place, name in enumerate(names)])


def _line_key(style: int) -> str:
    return f'<polyline class="line s{style}" points="0,6 28,6"/>{_marker(style, 14, 6)}'


def _keys(keys: Sequence[tuple[str, str]]) -> str:
    shown = (
        f'<span class="key"><svg viewBox="0 0 28 12" width="28" height="12" aria-hidden="true">{mark}</svg>'
        f"{escape(name)}</span>"
        for mark, name in keys
    )
    return f'<div class="keys">{"".join(shown)}</div>'
