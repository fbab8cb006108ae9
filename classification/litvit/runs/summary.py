"""summary.csv: the numbers of a run, one row per epoch, counted from 1."""

import csv
import logging
from collections.abc import Mapping
from pathlib import Path

from litvit.runs.folder import replace_file

logger = logging.getLogger("litvit")


def read_summary(path: Path) -> list[dict[str, float]]:
    """Return the rows of a summary.csv: numbers by column, without the cells that are empty.

    A run of an older version has fewer columns, and one that was continued by a newer one has empty cells.

    Raises:
        OSError: It cannot be read.
        ValueError: It holds something else.
    """
    return [{name: float(cell) for name, cell in row.items() if cell} for row in _read_cells(path)]


def add_row(path: Path, row: Mapping[str, float]) -> None:
    """Add the row of an epoch, in the place of rows from that epoch on. A file that holds something else is renamed.

    Args:
        path: summary.csv, which is replaced whole.
        row: Numbers by column, the epoch among them.

    Raises:
        OSError: It cannot be written.
    """
    try:
        cells = [old for old in _read_cells(path) if int(old["epoch"]) < row["epoch"]]
    except FileNotFoundError:
        cells = []
    except ValueError as error:
        damaged = path.with_name(f"{path.name}.damaged")
        logger.warning("%s: %s; it is now %s", path, error, damaged.name)
        path.replace(damaged)
        cells = []
    cells.append(dict(row))
    columns = dict.fromkeys(name for each in cells for name in each)

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(cells)

    replace_file(path, write)


def _read_cells(path: Path) -> list[dict[str, str]]:
    """Return the rows as text, their epochs counted from 1. Those of older runs began with 0."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, restkey="")
            rows = [row for row in reader if any(row.values())]
        if "epoch" not in (reader.fieldnames or ["epoch"]):
            raise ValueError("no column of epochs")
        for row in rows:
            if row.pop("", None) is not None:
                raise ValueError("a row has more cells than the header")
            for cell in filter(None, row.values()):
                float(cell)
        first = int(rows[0]["epoch"]) if rows else 1
        return [row | {"epoch": str(int(row["epoch"]) + (first == 0))} for row in rows]
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        raise ValueError(f"not a table of epochs ({type(error).__name__}: {error})") from error
