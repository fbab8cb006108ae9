"""The page of a run, report.html, and the page that compares runs. Both are made of the files in the runs' folders."""

import contextlib
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import yaml

from litvit.errors import InputError, one_line, printable
from litvit.runs.folder import BEST_VALIDATION, FIRST_BATCH, SETTINGS, STARTS, SUMMARY, holds_run
from litvit.runs.panels import STYLES, Series, confusion_matrix, curves, legend, number, stacked_bars
from litvit.runs.summary import read_summary

# The loader in C is ten times as fast, and a run reads its settings after every epoch.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MAX_STARTS = 20
WRONG_CONTENT = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)  # of a file that was changed
PHASES = {  # columns of summary.csv, the first at the bottom of a bar
    "train_seconds_data": "waiting for data",
    "train_seconds_forward": "forward",
    "train_seconds_backward": "backward",
    "train_seconds_step": "optimizer step",
    "eval_seconds": "validation",
}
ALL_SECONDS = "seconds"  # their sum


class Panel(NamedTuple):
    """Curves that are shown together."""

    title: str
    unit: str
    columns: Mapping[str, str]  # of summary.csv, and their names
    help: str
    from_zero: bool = False


PANELS = (
    Panel(
        "Loss",
        "",
        {"train_loss": "training", "eval_loss": "validation"},
        "Lower is better. With mixup, smoothing or token labels the training loss stays the higher one. A validation "
        "loss that rises while the training loss falls is overfitting.",
    ),
    Panel(
        "Accuracy",
        "%",
        {"eval_top1": "top-1", "eval_top5": "top-5"},
        "Share of the validation images whose class is the model's first answer (top-1), or among its first five.",
    ),
    Panel("Learning rate", "", {"lr": "learning rate"}, "At the last step of each epoch."),
    Panel(
        "Gradient norm",
        "",
        {"train_grad_norm": "gradient norm"},
        "Mean over the steps of an epoch, before clipping. A jump upwards is a sign of an unstable training.",
    ),
    Panel(
        "Speed",
        "images/s",
        {"train_images_per_second": "training", "eval_images_per_second": "validation"},
        "Over all processes.",
        from_zero=True,
    ),
    Panel(
        "Peak memory",
        "MiB",
        {"train_memory_mib": "peak memory"},
        "Of the first process since its start. On a GPU, of its tensors.",
        from_zero=True,
    ),
    Panel(
        "How far token merging looks",
        "pixels",
        {f"eval_offset_px_{place}": f"merging {place}" for place in range(1, 7)},
        "Mean length of the learned offsets over some validation images. 0 is fixed 2 x 2 merging, as at the start.",
        from_zero=True,
    ),
)
TIMES = Panel(
    "Time per epoch", "s", {ALL_SECONDS: "all", "train_seconds_data": PHASES["train_seconds_data"]}, "", from_zero=True
)
ON_CPU = (
    "Seconds of the first process, named from the top of a bar. Checkpoints within an epoch count as waiting; saving "
    "after it is not counted."
)
ON_GPU = (
    "Seconds of the first GPU, named from the top of a bar, between marks in its queue: idle time in a phase counts "
    "for that phase. Validation is by the clock of the process. Checkpoints within an epoch count as waiting; saving "
    "after it is not counted."
)


class Curve(NamedTuple):
    """A curve of one run, and how `litvit.runs.panels.curves` draws it."""

    title: str
    unit: str
    values: dict[int, float]
    from_zero: bool = False
    axis: str = "epoch"
    every: bool = True


@dataclass
class Run:
    """A run as its files describe it. What is missing is empty.

    Attributes:
        name: Name of its folder.
        path: Folder.
        rows: Rows of summary.csv.
        settings: Settings by name.
        starts: Records of its starts.
        first_batch: Pictures of the first batch.
        best: Validation of the best weights.
        notes: Sentences on files that cannot be read.
    """

    name: str
    path: Path
    rows: list[dict[str, float]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)
    first_batch: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def values(self, column: str) -> dict[int, float]:
        """Return the values of a column by epoch."""
        return {int(row["epoch"]): row[column] for row in self.rows if column in row}

    def curves(self) -> Iterator["Curve"]:
        """Yield the curves by which runs are compared."""
        for panel in (*PANELS, TIMES):
            for column, name in panel.columns.items():
                title = panel.title if len(panel.columns) == 1 else f"{panel.title}: {name}"
                yield Curve(title, panel.unit, self.values(column), panel.from_zero)

    def progress(self) -> str:
        """Return how far the run is."""
        trained = int(self.rows[-1]["epoch"]) if self.rows else 0
        with contextlib.suppress(TypeError, KeyError):
            return f"{trained} of {self.settings['epochs'] + self.settings.get('cooldown_epochs', 0)} epochs"
        return f"{trained} epochs"

    def results(self) -> dict[str, str]:
        """Return what came out: texts by what they are. What its files do not tell is left out."""
        found, rows = {}, self.rows
        top1 = {epoch: value for epoch, value in self.values("eval_top1").items() if math.isfinite(value)}
        if top1:
            best = max(top1, key=top1.get)
            found["best top-1 %"] = f"{top1[best]:.2f} (epoch {best})"
        last = rows[-1] if rows else {}
        for column, name, digits in (
            ("eval_top1", "last top-1 %", 2),
            ("eval_top5", "last top-5 %", 2),
            ("train_loss", "training loss, last", 4),
            ("eval_loss", "validation loss, last", 4),
        ):
            if column in last:
                found[name] = f"{last[column]:.{digits}f}"
        speeds = [speed for speed in self.values("train_images_per_second").values() if speed > 0]
        if speeds:
            found["training images/s, median"] = number(statistics.median(speeds))
        memory = self.values("train_memory_mib")
        if memory:
            found["peak memory MiB"] = number(max(memory.values()))
        seconds = self.values(ALL_SECONDS)
        if seconds:
            found["training and validation"] = duration(sum(seconds.values()))
        return found

    @contextlib.contextmanager
    def part_of(self, name: str) -> Iterator[None]:
        """Leave out what a damaged file would have given, and note it."""
        try:
            yield
        except FileNotFoundError:
            pass
        except (*WRONG_CONTENT, OSError, RecursionError, yaml.YAMLError) as error:
            self.notes.append(f"{name} cannot be read, and its part is left out ({one_line(error)}).")


def read_run(folder: Path) -> Run:
    """Read the files of a run.

    Raises:
        InputError: The folder holds no run.
    """
    if not holds_run(folder):
        raise InputError(f"{folder} holds no run of litvit train ({SETTINGS}): name the folder of one")
    run = Run(printable(folder.resolve().name), folder)
    with run.part_of(SUMMARY):
        run.rows = read_summary(folder / SUMMARY)
    for row in run.rows:
        seconds = [row[name] for name in PHASES if name in row]
        if seconds:
            row[ALL_SECONDS] = sum(seconds)
    with run.part_of(SETTINGS):
        run.settings = of_type(dict, yaml.load((folder / SETTINGS).read_bytes(), LOADER))
    with run.part_of(STARTS):
        starts = of_type(list, yaml.load((folder / STARTS).read_bytes(), LOADER))
        run.starts = [of_type(dict, start) for start in starts]
    for name, attribute in ((FIRST_BATCH, "first_batch"), (BEST_VALIDATION, "best")):
        with run.part_of(name):
            setattr(run, attribute, of_type(dict, json.loads((folder / name).read_bytes())))
    return run


def of_type(kind: type, content: Any) -> Any:
    if not isinstance(content, kind):
        raise ValueError(f"it holds {type(content).__name__}, not {kind.__name__}")
    return content


def run_page(folder: Path) -> str:
    """Return the page of a run as HTML in ASCII.

    Raises:
        InputError: The folder holds no run.
    """
    run = read_run(folder)
    sections = [
        (SUMMARY, _curves),
        (FIRST_BATCH, _first_batch),
        (BEST_VALIDATION, _best),
        (SETTINGS, _settings),
        (STARTS, _starts),
        (SUMMARY, _all_numbers),
    ]
    parts = []
    for name, render in sections:
        with run.part_of(name):
            parts.append(render(run))
    data = run.starts[0].get("data_dir") if run.starts else None
    model = f"{run.settings.get('model', 'unknown model')}{f' on {data}' if data else ''}, {run.progress()}"
    tiles = [f"<li><b>{html_text(value)}</b> {html_text(name)}</li>" for name, value in run.results().items()]
    head = f"<h1>{html_text(run.name)}</h1><p>{html_text(model)}</p>{html_notes(run)}"
    tiles = f'<ul class="tiles">{"".join(tiles)}</ul>' if run.rows else "<p>No epoch is trained yet.</p>"
    return html_page(f"{run.name}: {model}", f"<header>{head}{tiles}</header><main>{''.join(parts)}</main>")


def comparison_page(runs: Sequence[Run]) -> str:
    """Return a page that compares runs, as HTML in ASCII."""
    panels = []
    each = [{(curve.title, curve.axis): curve for curve in run.curves()} for run in runs]
    for key in dict.fromkeys(key for found in each for key in found):
        kind = next(found[key] for found in each if key in found)
        series = [
            Series(name, found[key].values if key in found else {})
            for name, found in zip(labels(runs), each, strict=True)
        ]
        panels.append(html_panel(curves(kind.title, kind.unit, series, kind.from_zero, kind.axis, kind.every)))
    keys = legend(labels(runs))
    more = f" Line styles repeat after {STYLES} runs." if len(runs) > STYLES else ""
    found = results_table(runs)
    differing = differences(runs)
    parts = [
        f"<h2>What came out</h2>{html_table(runs, found)}",
        f"<h2>What differs in their settings</h2>{html_table(runs, differing)}"
        if differing
        else "<h2>What differs in their settings</h2><p>Nothing.</p>",
        f'<h2>Curves</h2><p class="soft">Rest the pointer on a curve for its numbers.{more}</p>{keys}'
        f'<div class="panels">{"".join(panels)}</div>',
    ]
    notes = "".join(map(html_notes, runs))
    title = f"Comparison of {len(runs)} runs"
    return html_page(title, f"<header><h1>{title}</h1>{notes}</header><main>{''.join(parts)}</main>")


def labels(runs: Sequence[Run]) -> list[str]:
    """Return a name for each run: that of its folder, or its path where several have the same."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else printable(run.path) for name, run in zip(names, runs, strict=True)]


def results_table(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return what came out of runs: names, and one text per run, empty where its files do not tell."""
    each = [{"trained": run.progress(), **run.results()} for run in runs]
    return [
        (name, [found.get(name, "") for found in each]) for name in dict.fromkeys(n for found in each for n in found)
    ]


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return the settings, versions and machines in which runs differ, as `results_table` does."""
    each = []
    for run in runs:
        first, start = (run.starts[0], run.starts[-1]) if run.starts else ({}, {})
        about = {"data": first["data_dir"]} if "data_dir" in first else {}
        about |= {"recipe": Path(str(first["recipe"])).stem} if first.get("recipe") else {}
        about |= {f"{name} version": value for name, value in _mapping(start.get("versions")).items()}
        about |= {name: value for name, value in _mapping(start.get("hardware")).items() if name != "host"}
        commit = start.get("commit")
        about |= {"commit": f"{str(commit)[:10]}{' (changed)' if start.get('changed') else ''}"} if commit else {}
        each.append({name: _value(value) for name, value in (run.settings | about).items()})
    rows = []
    for name in dict.fromkeys(name for about in each for name in about):
        values = [about.get(name, "") for about in each]
        if len(set(values)) > 1:
            rows.append((str(name), values))
    return rows


def html_page(title: str, body: str) -> str:
    now = f"{datetime.now():%Y-%m-%d %H:%M}"
    footer = f"<footer>Written on {now} by litvit. The run, or <code>litvit report</code>, renews it.</footer>"
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    page = template.substitute(title=html_text(title), body=body + footer)
    # Names need not be text, and a lone surrogate is no character.
    return page.encode("utf-8", "replace").decode().encode("ascii", "xmlcharrefreplace").decode()


def html_text(value: Any) -> str:
    return escape(str(value))


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={_value(each)}" for name, each in value.items()) or "{}"
    if isinstance(value, list):
        return " ".join(map(_value, value)) or "[]"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def html_notes(run: Run) -> str:
    return "".join(f'<p class="note">{html_text(run.name)}: {html_text(note)}</p>' for note in run.notes)


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return str(seconds)
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def html_panel(chart: str, help: str = "") -> str:
    return (
        f'<section class="panel">{chart}{f"<p class=help>{html_text(help)}</p>" if help else ""}</section>'
        if chart
        else ""
    )


def _curves(run: Run) -> str:
    if not run.rows:
        return ""
    panels = []
    for panel in PANELS:
        series = [Series(name, values) for column, name in panel.columns.items() if (values := run.values(column))]
        panels.append(html_panel(curves(panel.title, panel.unit, series, panel.from_zero), panel.help))
    series = [Series(name, values) for column, name in PHASES.items() if (values := run.values(column))]
    panels.append(html_panel(stacked_bars("Where the time goes", "s", series), _time_help(run)))
    hint = '<p class="soft">One point per epoch. Rest the pointer on an epoch for its numbers.</p>'
    return f'<h2>Curves</h2>{hint}<div class="panels">{"".join(panels)}</div>'


def _time_help(run: Run) -> str:
    last = run.rows[-1]
    train = sum(last.get(name, 0.0) for name in PHASES if name.startswith("train_"))
    waiting = last.get("train_seconds_data", 0.0)
    share = f"{100 * waiting / train:.0f}% of the last epoch's training was waiting for data" if train > 0 else ""
    if train > 0 and waiting > 0.2 * train:
        share += ": more --workers, smaller image files or a faster disk would help"
    on_gpu = any("gpu" in _mapping(start.get("hardware")) for start in run.starts)
    return f"{share}. {ON_GPU if on_gpu else ON_CPU}" if share else ""


def _first_batch(run: Run) -> str:
    if not run.first_batch:
        return ""
    figures = []
    for image in run.first_batch["images"]:
        first, *others = [(str(name), float(share)) for name, share in image["labels"]]
        caption = html_text(first[0])
        if others:
            caption = "<br>".join(f"{100 * share:.0f}% {html_text(name)}" for name, share in (first, *others))
        figures.append(html_figure(image["picture"], caption))
    height, width = run.first_batch["size"]
    return (
        '<h2>What the model gets</h2><section class="panel"><p>The first images of the first training batch, '
        f"{html_text(height)} x {html_text(width)} pixels, after cropping, augmentation, erasing and mixup, with their "
        "classes. Are they upright, large enough to be told apart, and rightly labelled?</p>"
        f'<div class="pictures">{"".join(figures)}</div></section>'
    )


def _best(run: Run) -> str:
    best = run.best
    if not best:
        return ""
    parts = []
    if best.get("confusion"):
        matrix = confusion_matrix(best["confusion"], list(map(str, best["classes"])))
        parts.append(
            "<section class=panel><h3>Confusion matrix</h3><p class=help>Rows are classes, columns are predicted "
            "classes. The stronger a field, the larger its share of the row. What is right lies on the diagonal.</p>"
            f"{matrix}</section>"
        )
    if best.get("per_class"):
        parts.append(f"<section class=panel>{_worst_classes(best)}</section>")
    columns = f'<div class="columns">{"".join(parts)}</div>' if parts else ""
    mistakes = ""
    if best.get("mistakes"):
        figures = [
            html_figure(
                each["picture"],
                f"is: {html_text(each['class'])}<br><span class=wrong>said: {100 * each['probability']:.0f}% "
                f"{html_text(each['predicted'])}</span><br><span class=soft>{html_text(each['name'])}</span>",
            )
            for each in best["mistakes"]
        ]
        mistakes = (
            '<section class="panel below"><h3>Most confident mistakes</h3><p class=help>The validation images that '
            "the model is most certain and wrong about. Some may have a wrong label.</p>"
            f'<div class="pictures">{"".join(figures)}</div></section>'
        )
    epoch, top1, images = int(best["epoch"]), float(best["top1"]), int(best["images"])
    about = f"Of epoch {epoch}: top-1 {top1:.2f}% of {images} validation images."
    return f'<h2>What the best weights get wrong</h2><p class="soft">{about}</p>{columns}{mistakes}'


def _worst_classes(best: Mapping[str, Any]) -> str:
    columns = ("class", "images", "top1", "precision", "mistaken_for", "times")
    names = ("class", "images", "top-1 %", "precision %", "mistaken for", "times")
    rows = []
    for row in best["per_class"]:
        cells = [
            "" if row[name] is None else f"{row[name]:.1f}" if isinstance(row[name], float) else row[name]
            for name in columns
        ]
        rows.append("".join(f"<td>{html_text(cell)}</td>" for cell in cells))
    head = "".join(f"<th>{name}</th>" for name in names)
    of = (
        f"the {len(rows)} lowest of {int(best['num_classes'])}"
        if len(rows) < int(best["num_classes"])
        else "lowest first"
    )
    return (
        f"<h3>Classes <small>{of}</small></h3><p class=help>Precision is the share of its own among the images that "
        "are taken for a class. Times: how often it is mistaken for the class beside.</p>"
        f'<div class="scroll"><table class="numbers"><tr>{head}</tr><tr>{"</tr><tr>".join(rows)}</tr></table></div>'
    )


def html_figure(picture: str, caption: str) -> str:
    if not picture.startswith("data:image/"):
        raise ValueError("a picture is no data URI")
    pixels = ' class="pixels"' if picture.startswith("data:image/png") else ""
    source = html_text(picture)
    return f'<figure><img{pixels} src="{source}" alt="" loading="lazy"><figcaption>{caption}</figcaption></figure>'


def _settings(run: Run) -> str:
    if not run.settings:
        return ""
    first = run.starts[0] if run.starts else {}
    lists = [start["changed_settings"] for start in run.starts if isinstance(start.get("changed_settings"), list)]
    changed = [name for names in lists for name in names] if lists else None
    about = Path(str(first["recipe"])).name if first.get("recipe") else None
    than = f"the recipe {about}" if about else "the flags' defaults: there is no recipe"
    own = [name for name in run.settings if name in changed] if isinstance(changed, list) else []
    others = [name for name in run.settings if name not in own]

    def table(names: Sequence[str]) -> str:
        rows = (
            f"<tr><th>{html_text(name)}</th><td>{html_text(_value(run.settings[name]))}</td></tr>" for name in names
        )
        return f"<table>{''.join(rows)}</table>"

    shown = ""
    if own:
        shown = f"<h3>Different from {html_text(than)}</h3>{table(own)}"
    elif isinstance(changed, list):
        shown = f"<h3>All as in {html_text(than)}</h3>"
    return (
        f'<h2>Settings</h2><section class="panel">{shown}<details{"" if shown else " open"}><summary>'
        f"{'The other ' if own else 'All '}{len(others)} settings</summary>{table(others)}</details></section>"
    )


def _starts(run: Run) -> str:
    if not run.starts:
        return ""
    shown = []
    for start in run.starts[: -MAX_STARTS - 1 : -1]:
        commit = f", commit {html_text(str(start['commit'])[:10])}" if start.get("commit") else ""
        commit += " with changed files" if commit and start.get("changed") else ""
        versions, hardware = (
            ", ".join(f"{name} {_value(value)}" for name, value in _mapping(start.get(part)).items())
            for part in ("versions", "hardware")
        )
        shown.append(
            f"<details{'' if shown else ' open'}><summary>{html_text(start.get('time', ''))}, from step "
            f"{html_text(start.get('step', '?'))}{commit}</summary><pre>{html_text(start.get('command', ''))}</pre>"
            f"<p><small>{html_text(versions)}</small></p><p><small>{html_text(hardware)}</small></p></details>"
        )
    more = f"<p class=soft>The last {MAX_STARTS} of {len(run.starts)}.</p>" if len(run.starts) > MAX_STARTS else ""
    return f'<h2>Starts</h2><section class="panel">{more}{"".join(shown)}</section>'


def _all_numbers(run: Run) -> str:
    if not run.rows:
        return ""
    columns = [name for name in dict.fromkeys(name for row in run.rows for name in row) if name != ALL_SECONDS]
    head = "".join(f"<th>{html_text(name)}</th>" for name in columns)
    rows = (
        "".join(f"<td>{number(row[name]) if name in row else ''}</td>" for name in columns)
        for row in reversed(run.rows)
    )
    return (
        f'<h2>All numbers</h2><section class="panel"><details><summary>summary.csv, the last epoch first</summary>'
        f'<div class="scroll"><table class="numbers"><tr>{head}</tr><tr>{"</tr><tr>".join(rows)}</tr></table></div>'
        "</details></section>"
    )


def html_table(runs: Sequence[Run], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    head = "".join(f"<th>{html_text(name)}</th>" for name in labels(runs))
    lines = (
        f"<tr><th>{html_text(name)}</th>{''.join(f'<td>{html_text(value)}</td>' for value in values)}</tr>"
        for name, values in rows
    )
    return (
        f'<section class="panel scroll"><table class="wide"><tr><th></th>{head}</tr>{"".join(lines)}</table></section>'
    )
