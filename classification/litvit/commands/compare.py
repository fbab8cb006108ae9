"""Compare two evaluations of the same images: litvit compare REPORT REPORT (--help lists the flags)."""

import csv
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from litvit.cli import ArgumentParser
from litvit.errors import InputError, one_line
from litvit.training.flags import TRACEBACK_HELP, HelpFormatter
from litvit.training.report import PREDICTIONS, RESULT, format_table

METRICS = ("top1", "top5", "loss", "calibration_error", "real_top1", "images_per_second")
SHOWN = 20  # classes


def main(argv: Sequence[str] | None = None) -> int:
    """Compare as the command line says. Returns 0."""
    parser = ArgumentParser(
        description="Compare two models on the same images, by the reports of litvit validate --report: their results, "
        "the images that only one of them gets right, and the classes that differ most.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("first", metavar="REPORT", type=Path, help="folder of a report")
    parser.add_argument("second", metavar="REPORT", type=Path, help="folder of another one")
    parser.add_argument("--traceback", action="store_true", help=TRACEBACK_HELP)
    args = parser.parse_args(argv)
    (first, rows), (second, others) = map(read_report, (args.first, args.second))
    if rows.keys() != others.keys():
        only = next(iter(sorted(rows.keys() ^ others.keys())))
        raise InputError(f"{args.first} and {args.second} are of different images; only one has {only}")
    if any(rows[image]["class"] != others[image]["class"] for image in rows):
        raise InputError(f"{args.first} and {args.second} give the same images other classes")
    print(f"first:  {args.first} ({first['model']}, {first['checkpoint']})")
    print(f"second: {args.second} ({second['model']}, {second['checkpoint']})\n")
    both = {name: (first.get(name), second.get(name)) for name in METRICS}
    metrics = [
        {"": name, "first": f"{before:g}", "second": f"{after:g}", "change": f"{after - before:+g}"}
        for name, (before, after) in both.items()
        if isinstance(before, float | int) and isinstance(after, float | int)
    ]
    print(format_table(metrics, ("", "first", "second", "change")))

    right = {image: (row["correct"] == "1", others[image]["correct"] == "1") for image, row in rows.items()}
    gained = sum(pair == (False, True) for pair in right.values())
    lost = sum(pair == (True, False) for pair in right.values())
    print(f"\nright in the first alone {lost}, in the second alone {gained}, of {len(rows)} images")
    chance = sign_test(lost, gained)
    verdict = "chance alone may well do that" if chance > 0.05 else "more than chance would do"
    print(f"McNemar's test: p = {chance:.3g}, {verdict}\n")
    table = _per_class(rows, right)
    print(format_table(table[:SHOWN], ("class", "images", "first", "second", "change")))
    if len(table) > SHOWN:
        print(f"({SHOWN} of {len(table)} classes, the largest changes first)")
    return 0


def read_report(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """Read the result of a report, and its rows by image.

    Raises:
        InputError: the folder holds no report of single images.
    """
    try:
        result = json.loads((folder / RESULT).read_text())
        with open(folder / PREDICTIONS, newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = list(csv.DictReader(file))
        if not rows or not {"image", "class", "correct"} <= rows[0].keys():
            raise ValueError(f"{PREDICTIONS} has no images")
        # The same data may have been named in another way.
        common = os.path.commonpath([os.path.dirname(row["image"]) for row in rows])
        return {"model": "?", "checkpoint": "?"} | result, {os.path.relpath(row["image"], common): row for row in rows}
    except FileNotFoundError as error:
        raise InputError(
            f"{folder} holds no report ({Path(error.filename).name}): "
            f"litvit validate DATA_DIR --checkpoint RUN --report {folder} makes one"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise InputError(f"cannot read the report {folder}: {one_line(error)}") from error


def sign_test(lost: int, gained: int) -> float:
    """Return the probability that coins would differ at least as much: McNemar's test, two-sided, exact up to 1000."""
    number, fewer = lost + gained, min(lost, gained)
    if number > 1000:
        return math.erfc(max(abs(lost - gained) - 1, 0) / math.sqrt(2 * number))
    return min(1.0, 2 * sum(math.comb(number, i) for i in range(fewer + 1)) / 2**number)


def _per_class(rows: dict[str, dict[str, str]], right: dict[str, tuple[bool, bool]]) -> list[dict[str, Any]]:
    """Return accuracy per class in percent, the largest changes first."""
    pairs: dict[str, list[tuple[bool, bool]]] = {}
    for image, row in rows.items():
        pairs.setdefault(row["class"], []).append(right[image])
    table = []
    for name, found in pairs.items():
        first, second = (100 * sum(each) / len(found) for each in zip(*found, strict=True))
        table.append({"class": name, "images": len(found), "first": first, "second": second, "change": second - first})
    return sorted(table, key=lambda row: (-abs(row["change"]), row["class"]))
