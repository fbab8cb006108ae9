"""The page of a run of mmengine, of detection or segmentation, made of the logs in its work dir."""

import base64
import contextlib
import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from litvit.errors import InputError, printable
from litvit.runs.mmengine_logs import CONFIG, PICTURES, SCALARS, Logs, Validation, holds_logs, pictures, read_logs
from litvit.runs.page import (
    Curve,
    Run,
    duration,
    html_figure,
    html_notes,
    html_page,
    html_panel,
    html_text,
)
from litvit.runs.panels import STYLES, Series, curves, number

POINTS = 500  # of a curve; of more training logs, each point is the mean of several
PICTURES_SHOWN, SIDE = 8, 640  # pixels
MAX_STARTS = 20
MAX_LOGS = 200  # rows of the table of all numbers
LOWEST = 20  # classes that are shown without a click
CLASSWISE = re.compile(r"(?:[^/]*/)?(?:(?P<class>.+)_precision|(?P<measure>IoU|Acc|Dice)\.(?P<name>.+))", re.DOTALL)
AVERAGE_PRECISION = re.compile(r"(?P<kind>bbox|segm|proposal)_(?P<item>.+)", re.DOTALL)
MAIN = ("bbox_mAP", "segm_mAP", "mAP", "PQ", "mIoU", "mDice")  # metrics to head the page with, the higher the better
# Columns of the training logs: title, unit, names by column, help.
PANELS = (
    ("Learning rate", "", {"lr": "learning rate"}, "", False),
    (
        "Gradient norm",
        "",
        {"grad_norm": "gradient norm"},
        "Before clipping. A jump upwards is a sign of an unstable training.",
        False,
    ),
    (
        "Time per iteration",
        "s",
        {"time": "all", "data_time": "waiting for data"},
        "If much of it is waiting for data, more loader processes (train_dataloader.num_workers), smaller image files "
        "or a faster disk would help.",
        True,
    ),
    ("Peak memory", "MiB", {"memory": "peak memory"}, "Of the GPU's tensors, since the start.", True),
)
NOT_SHOWN = {"iter", "step", "epoch", "base_lr"}


@dataclass
class MMEngineRun(Run):
    """A run of mmengine as its logs describe it. Its rows are the training logs.

    Attributes:
        logs: The logs.
    """

    logs: Logs = field(default_factory=Logs)

    def values(self, column: str) -> dict[int, float]:
        """Return the values of a column by iteration, as means of several where there are many."""
        found = [(int(row["iter"]), row[column]) for row in self.rows if column in row]
        size = math.ceil(len(found) / POINTS)
        groups = [found[place : place + size] for place in range(0, len(found), size or 1)]
        return {group[-1][0]: sum(value for _, value in group) / len(group) for group in groups}

    def metric(self, name: str) -> dict[int, float]:
        """Return the values of a metric by the places of the validations."""
        return {
            validation.place: value
            for validation in self.validations
            if (value := validation.metrics.get(name)) is not None and not _is_missing(name, value)
        }

    @property
    def validations(self) -> list[Validation]:
        """Validations that are counted as the last one is: by epoch or by iteration."""
        return [each for each in self.logs.validations if each.by_epoch == self.logs.validations[-1].by_epoch]

    @property
    def axis(self) -> str:
        """What the validations are counted by."""
        return "epoch" if self.validations and self.validations[-1].by_epoch else "iteration"

    def metric_names(self) -> list[str]:
        """Return the names of the metrics of all classes together."""
        names = dict.fromkeys(name for validation in self.validations for name in validation.metrics)
        return [name for name in names if not CLASSWISE.fullmatch(name)]

    def loss_names(self) -> list[str]:
        """Return the columns of the loss and of its parts, the sum first."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        parts = [name for name in names if "loss" in name and name != "loss"]
        return (["loss"] if "loss" in names else []) + parts

    def curves(self) -> Iterator[Curve]:
        for name in self.loss_names():
            yield Curve(f"Training: {name}", "", self.values(name), axis="iteration", every=False)
        for name in self.metric_names():
            yield Curve(f"Validation: {name}", "", self.metric(name), axis=self.axis, every=False)
        for title, unit, columns, _, from_zero in PANELS:
            for column, name in columns.items():
                full = title if len(columns) == 1 else f"{title}: {name}"
                yield Curve(full, unit, self.values(column), from_zero, "iteration", every=False)

    def progress(self) -> str:
        reached = [int(row["iter"]) for row in self.rows[-1:]] + [each.iteration for each in self.validations[-1:]]
        last, total = max(reached, default=0), self.settings.get("train_cfg.max_iters")
        epochs = self.settings.get("train_cfg.max_epochs")
        if epochs is not None:
            epoch = int(self.rows[-1].get("epoch", 0)) if self.rows else 0
            return f"iteration {last}, epoch {epoch} of {epochs}"
        return f"iteration {last}{'' if total is None else f' of {total}'}"

    def results(self) -> dict[str, str]:
        found = {}
        names = self.metric_names()
        for name in [each for each in names if each.rpartition("/")[2] in MAIN] or names[:3]:
            values = {place: value for place, value in self.metric(name).items() if math.isfinite(value)}
            if not values:
                continue
            if name.rpartition("/")[2] in MAIN:
                best = max(values, key=values.get)
                found[f"best {name}"] = f"{number(values[best])} ({self.axis} {best})"
            found[f"last {name}"] = number(list(values.values())[-1])
        if self.rows and "loss" in self.rows[-1]:
            found["training loss, last"] = f"{self.rows[-1]['loss']:.4f}"
        seconds = [row["time"] for row in self.rows if math.isfinite(row.get("time", math.nan))]
        if seconds:
            mean = sum(seconds) / len(seconds)
            found["seconds per iteration, mean"] = number(mean)
            found["time of all iterations, about"] = duration(mean * self.rows[-1]["iter"])
        memory = [row["memory"] for row in self.rows if math.isfinite(row.get("memory", math.nan))]
        if memory:
            found["peak memory MiB"] = number(max(memory))
        return found


def _is_missing(name: str, value: float) -> bool:
    """Whether it is COCO's average precision of objects that there are none of."""
    return value == -1 and AVERAGE_PRECISION.fullmatch(name.rpartition("/")[2]) is not None


def read_mmengine_run(folder: Path) -> MMEngineRun:
    """Read the logs in a work dir of mmengine.

    Raises:
        InputError: The folder holds none.
    """
    if not holds_logs(folder):
        raise InputError(f"{folder} holds no logs of mmengine (TIME/{SCALARS}): name the folder of a run")
    logs = read_logs(folder)
    return MMEngineRun(
        printable(folder.resolve().name),
        folder,
        rows=logs.training,
        settings=logs.settings,
        starts=[{"time": start} for start in logs.starts],
        notes=logs.notes,
        logs=logs,
    )


def mmengine_page(folder: Path) -> str:
    """Return the page of a run of mmengine as HTML in ASCII.

    Raises:
        InputError: The folder holds none.
    """
    run = read_mmengine_run(folder)
    sections = [
        (SCALARS, _validation),
        (SCALARS, _training),
        (PICTURES, _pictures),
        (CONFIG, _settings),
        ("the list of starts", _starts),
        (SCALARS, _all_numbers),
    ]
    parts = []
    for name, render in sections:
        with run.part_of(name):
            parts.append(render(run))
    tiles = [f"<li><b>{html_text(value)}</b> {html_text(name)}</li>" for name, value in run.results().items()]
    about = f"{run.settings.get('model.type', 'run of mmengine')}, {run.progress()}"
    head = f"<h1>{html_text(run.name)}</h1><p>{html_text(about)}</p>{html_notes(run)}"
    tiles = f'<ul class="tiles">{"".join(tiles)}</ul>' if tiles else "<p>Nothing is logged yet.</p>"
    return html_page(f"{run.name}: {about}", f"<header>{head}{tiles}</header><main>{''.join(parts)}</main>")


def _panels(title: str, series: Sequence[Series], axis: str, help: str = "") -> list[str]:
    """Return panels of the curves, as many as there are styles in each."""
    groups = [series[place : place + STYLES] for place in range(0, len(series), STYLES)]
    return [
        html_panel(curves(title if place == 0 else f"{title} ({place + 1})", "", group, False, axis, every=False), help)
        for place, group in enumerate(groups)
    ]


def _training(run: MMEngineRun) -> str:
    if not run.rows:
        return ""
    losses = run.loss_names()
    panels = []
    if losses[:1] == ["loss"]:
        panels += _panels("Loss", [Series("loss", run.values("loss"))], "iteration", "The sum of all losses.")
    parts = [Series(name, run.values(name)) for name in losses if name != "loss"]
    if len(losses) != 2:  # the sum and a single part would be the same
        panels += _panels("Parts of the loss", parts, "iteration")
    for title, unit, columns, help, from_zero in PANELS:
        series = [Series(name, values) for column, name in columns.items() if (values := run.values(column))]
        panels.append(html_panel(curves(title, unit, series, from_zero, "iteration", every=False), help))
    known = {*losses, *NOT_SHOWN, *(column for _, _, columns, _, _ in PANELS for column in columns)}
    for name in dict.fromkeys(name for row in run.rows for name in row if name not in known):
        panels += _panels(name, [Series(name, run.values(name))], "iteration")
    many = f" Each point is the mean of several logs, {len(run.rows)} in all." if len(run.rows) > POINTS else ""
    hint = f'<p class="soft">Rest the pointer on a curve for its numbers.{many}</p>'
    return f'<h2>Training</h2>{hint}<div class="panels">{"".join(panels)}</div>'


def _validation(run: MMEngineRun) -> str:
    if not run.validations:
        return ""
    groups: dict[str, list[Series]] = {}
    for name in run.metric_names():
        prefix, _, short = name.rpartition("/")
        precision = AVERAGE_PRECISION.fullmatch(short)
        title = f"{prefix} {precision['kind']}".strip() if precision else prefix or "Metrics"
        groups.setdefault(title, []).append(Series(precision["item"] if precision else short, run.metric(name)))
    panels = [panel for title, series in groups.items() for panel in _panels(title, series, run.axis)]
    return f'<h2>Validation</h2><div class="panels">{"".join(panels)}</div>{_classes(run)}'


def _classes(run: MMEngineRun) -> str:
    """Return the table of the last validation's classes, if its metrics tell of them."""
    last = run.validations[-1]
    table: dict[str, dict[str, float]] = {}
    for name, value in last.metrics.items():
        if match := CLASSWISE.fullmatch(name):
            table.setdefault(match["class"] or match["name"], {})[match["measure"] or "AP"] = value
    if not table:
        return ""
    measures = list(dict.fromkeys(name for row in table.values() for name in row))
    top = {
        name: max((row[name] for row in table.values() if math.isfinite(row.get(name, math.nan))), default=0.0)
        for name in measures
    }

    def cell(row: dict[str, float], name: str) -> str:
        if name not in row or not math.isfinite(row[name]):
            return "<td></td><td></td>"
        full = 1.0 if top[name] <= 1 else 100.0
        width = 100 * min(max(row[name] / full, 0.0), 1.0)
        bar = (
            '<svg viewBox="0 0 100 10" width="100" height="10" aria-hidden="true">'
            f'<rect class="bar b0" x="0" y="0" width="{width:.1f}" height="10"/></svg>'
        )
        return f"<td>{number(row[name])}</td><td>{bar}</td>"

    def rank(item: tuple[str, dict[str, float]]) -> float:
        value = item[1].get(measures[0], math.nan)
        return value if math.isfinite(value) else math.inf

    head = "".join(f"<th>{html_text(name)}</th><th></th>" for name in measures)
    rows = [
        f"<tr><td>{html_text(name)}</td>{''.join(cell(row, measure) for measure in measures)}</tr>"
        for name, row in sorted(table.items(), key=rank)
    ]

    def shown(some: Sequence[str]) -> str:
        lines = "".join(some)
        return f'<div class="scroll"><table class="numbers"><tr><th>class</th>{head}</tr>{lines}</table></div>'

    others = rows[LOWEST:]
    more = f"<details><summary>The other {len(others)} classes</summary>{shown(others)}</details>" if others else ""
    return (
        f'<section class="panel below"><h3>Classes <small>lowest first, {run.axis} {last.place}</small></h3>'
        f"{shown(rows[:LOWEST])}{more}</section>"
    )


def _pictures(run: MMEngineRun) -> str:
    figures = []
    for file in pictures(run.path, PICTURES_SHOWN):
        with contextlib.suppress(OSError), Image.open(file) as image:  # mmengine may be writing it
            image = image.convert("RGB")
            image.thumbnail((SIDE, SIDE))
            content = io.BytesIO()
            image.save(content, "JPEG", quality=80)
            source = f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
            figures.append(html_figure(source, html_text(printable(file.stem))))
    if not figures:
        return ""
    return (
        '<h2>Predictions</h2><section class="panel"><p>Validation images that mmengine has drawn last, with their '
        f'annotations on the left and the predictions on the right.</p><div class="pictures large">{"".join(figures)}'
        "</div></section>"
    )


def _settings(run: MMEngineRun) -> str:
    if not run.settings:
        return ""
    rows = "".join(
        f"<tr><th>{html_text(name)}</th><td>{html_text(value)}</td></tr>" for name, value in run.settings.items()
    )
    return (
        f'<h2>Settings</h2><section class="panel"><details><summary>All {len(run.settings)} settings of the last start'
        f"</summary><table>{rows}</table></details></section>"
    )


def _starts(run: MMEngineRun) -> str:
    shown = run.logs.starts[: -MAX_STARTS - 1 : -1]
    more = f"<p class=soft>The last {MAX_STARTS} of {len(run.starts)}.</p>" if len(run.starts) > MAX_STARTS else ""
    items = "".join(f"<li>{html_text(printable(start))}</li>" for start in shown)
    return f'<h2>Starts</h2><section class="panel">{more}<ul>{items}</ul></section>'


def _all_numbers(run: MMEngineRun) -> str:
    validations = [{run.axis: each.place, **each.metrics} for each in run.validations]
    tables = []
    for title, rows in (("Validations", validations), ("Training logs", run.rows)):
        if rows:
            columns = list(dict.fromkeys(name for row in rows for name in row))
            head = "".join(f"<th>{html_text(name)}</th>" for name in columns)
            lines = (
                "".join(f"<td>{number(row[name]) if name in row else ''}</td>" for name in columns)
                for row in rows[: -MAX_LOGS - 1 : -1]
            )
            count = f", {MAX_LOGS} of {len(rows)}" if len(rows) > MAX_LOGS else ""
            tables.append(
                f"<details><summary>{title}, the last first{count}</summary>"
                f'<div class="scroll"><table class="numbers"><tr>{head}</tr><tr>{"</tr><tr>".join(lines)}</tr></table>'
                "</div></details>"
            )
    return f'<h2>All numbers</h2><section class="panel">{"".join(tables)}</section>' if tables else ""
