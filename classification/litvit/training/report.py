"""A report of an evaluation: tables and pictures of what a classifier gets wrong."""

import contextlib
import csv
import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from litvit.data.contact_sheet import BLACK, GREY, PER_SHEET, RED, contact_sheet, shrink
from litvit.errors import InputError
from litvit.runs.folder import replace_file
from litvit.training.predictions import COLUMNS, Predicted, Row, per_class

PREDICTIONS, PER_CLASS, CONFUSION, MISTAKES, RESULT = (
    *("predictions.csv", "per_class.csv", "confusion", "mistakes.png", "result.json"),
)
MAX_NAMED_IN_PLOT, MAX_NUMBERS_IN_PLOT = 60, 25  # classes


def format_table(rows: Sequence[Row], columns: Sequence[str], width: int = 40, digits: int = 1) -> str:
    """Return rows as a table of aligned columns.

    Args:
        rows: Rows, of which None is shown as nothing.
        columns: Columns to show.
        width: Length that long names are cut to.
        digits: Number of digits after the decimal point.
    """
    cells = [list(columns)] + [[_cell(row[column], width, digits) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [all(not isinstance(row[column], str) for row in rows) for column in columns]
    lines = [
        "  ".join(
            text.rjust(size) if is_number else text.ljust(size)
            for text, size, is_number in zip(line, widths, right, strict=True)
        )
        for line in cells
    ]
    return "\n".join(map(str.rstrip, lines))


def markdown_table(table: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, its head first."""
    head, *rows = ("| " + " | ".join(cells) + " |" for cells in table)
    return "\n".join([head, "|" + "---|" * len(table[0]), *rows])


def _cell(value: str | int | float | None, width: int, digits: int = 1) -> str:
    if isinstance(value, float):
        return f"{value:.{digits}f}"
    text = "" if value is None else str(value)
    return text if len(text) <= width else f"{text[: width - 3]}..."


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Make a folder, and name it if a block cannot write to it.

    Raises:
        InputError: The folder cannot be made, or the disk does not take what is written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise InputError(f"cannot write to '{folder}': {error.strerror or error}") from error


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Write rows as a CSV file. None is an empty cell."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    # Names of files need not be text.
    content = text.getvalue().encode("utf-8", "surrogateescape")
    replace_file(path, lambda temporary: temporary.write_bytes(content))


def image_rows(predicted: Predicted, names: Sequence[str], classes: Sequence[str]) -> list[Row]:
    """Return one row per image: its name, its class, its best classes with their probabilities, and its own class's."""
    return [
        {"image": name, "class": classes[target], "correct": int(best[0] == target), "probability": f"{own:.6f}"}
        | best_columns(best, values, classes)
        for name, target, best, values, own in zip(names, *map(Tensor.tolist, predicted), strict=True)
    ]


def best_columns(best: Sequence[int], probabilities: Sequence[float], classes: Sequence[str]) -> Row:
    """Return the columns class_1, probability_1, class_2, ... of an image's best classes."""
    return {
        column: value
        for i, (number, probability) in enumerate(zip(best, probabilities, strict=True), 1)
        for column, value in ((f"class_{i}", classes[number]), (f"probability_{i}", f"{probability:.6f}"))
    }


def plot_confusion(confusion: Tensor, classes: Sequence[str]) -> Figure:
    """Plot a confusion matrix (classes, predicted classes) of counts, coloured by their share of the row."""
    number = len(classes)
    shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    side = min(max(4.0, 0.32 * number), 20.0)
    figure = Figure(figsize=(side + 2, side + 1.5), dpi=100, layout="constrained")
    axes = figure.add_subplot(xlabel="predicted class", ylabel="class")
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the class's images", shrink=0.8)
    if number <= MAX_NAMED_IN_PLOT:
        names = [_cell(name, 24).replace("$", r"\$") for name in classes]  # dollars begin a formula
        axes.set_xticks(range(number), names, rotation=90)
        axes.set_yticks(range(number), names)
    if number <= MAX_NUMBERS_IN_PLOT:
        for row, column in confusion.nonzero().tolist():
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, int(confusion[row, column]), ha="center", va="center", color=colour, fontsize=8)
    return figure


def write_report(
    folder: Path,
    predicted: Predicted,
    classes: Sequence[str],
    names: Sequence[str] | None,
    open_image: Callable[[int], Image.Image],
) -> None:
    """Write what a report holds beside the result.

    Args:
        folder: Folder of the report, which exists.
        predicted: Predictions.
        classes: Names of the classes.
        names: Names of the images, None if they have none: then nothing is told of single images.
        open_image: Function from the index of an image to its pixels.

    Raises:
        OSError: the disk does not take it.
    """
    confusion = predicted.confusion(len(classes))
    write_csv(folder / PER_CLASS, COLUMNS, per_class(predicted, classes))
    numbered = [f"{i} {name}" for i, name in enumerate(classes)]  # columns of one name are two columns
    header = ("class", *numbered)
    counts = zip(numbered, confusion.tolist(), strict=True)
    rows = [dict(zip(header, (name, *row), strict=True)) for name, row in counts]
    write_csv(folder / f"{CONFUSION}.csv", header, rows)
    figure = plot_confusion(confusion, classes)
    replace_file(folder / f"{CONFUSION}.png", partial(figure.savefig, format="png"))
    for name in (PREDICTIONS, MISTAKES):  # an older report's
        (folder / name).unlink(missing_ok=True)
    if names is None:
        return
    rows = image_rows(predicted, names, classes)
    write_csv(folder / PREDICTIONS, list(rows[0]), rows)
    cells = []
    for index in predicted.mistakes(PER_SHEET):
        row = rows[index]
        said = f"said: {100 * predicted.probabilities[index, 0]:.0f}% {row['class_1']}"
        lines = [(Path(row["image"]).name, GREY), (f"is: {row['class']}", BLACK), (said, RED)]
        cells.append((shrink(open_image(index)), lines))
    if cells:
        sheet = contact_sheet(cells)
        replace_file(folder / MISTAKES, partial(sheet.save, format="PNG"))
