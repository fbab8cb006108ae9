"""The report of a study: tables in Markdown, the figures as JSON, and curves."""

import itertools
import json
import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from litvit.benchmarks.macs import count_macs, count_parameters
from litvit.runs.folder import BEST_WEIGHTS, STARTS, read_description, replace_file
from litvit.studies.plan import Run, Study
from litvit.studies.running import last_epoch, read_epochs
from litvit.training.config import Config
from litvit.training.model import build_model
from litvit.training.report import markdown_table

REPORT, FIGURES, CURVES = "report.md", "report.json", "curves.png"
Row = dict[str, Any]


def write_report(study: Study, output: Path, configs: dict[str, Config]) -> str:
    """Write report.md, report.json and curves.png of the runs that have trained an epoch at least.

    Args:
        study: Study of the runs.
        output: Folder of the study.
        configs: Settings of each model.

    Returns:
        The tables, in Markdown.

    Raises:
        InputError: A file of a run cannot be read.
        OSError: The report cannot be written.
    """
    runs = list(study.runs(output))
    epochs = {run: rows for run in runs if (rows := read_epochs(run))}
    whole = {run: rows for run, rows in epochs.items() if len(rows) >= last_epoch(configs[run.model])}
    diverged = [run for run in runs if run.diverged and run not in whole]
    rows = [_model_row(model, configs[model], _of_model(whole, model)) for model in study.models]
    pairs = [_pair_row(pair, rows) for pair in study.pairs]
    text = "\n\n".join(_tables(rows, pairs, diverged))
    starts = [start for run in epochs for start in _starts(run)]
    parts = [f"# Study {study.name}", f"{len(whole)} of {len(runs)} runs are trained to their last epoch.", text]
    parts[2:2] = _places(starts)
    if epochs:
        parts.append(f"![Top-1 of all runs, top-1 by epoch, training loss by step]({CURVES})")
        figure = _plot(study, rows, whole or epochs)
        replace_file(output / CURVES, partial(figure.savefig, format="png"))
    figures = {"study": study.name, "runs": len(runs), "trained": len(whole), "diverged": list(map(str, diverged))}
    figures |= {"starts": starts, "models": rows, "pairs": pairs}
    content = json.dumps(figures, indent=2, default=str, allow_nan=False) + "\n"
    replace_file(output / FIGURES, lambda temporary: temporary.write_text(content))
    replace_file(output / REPORT, lambda temporary: temporary.write_text("\n\n".join(parts) + "\n"))
    return text


def _of_model(epochs: dict[Run, list[Row]], model: str) -> dict[Run, list[Row]]:
    return {run: rows for run, rows in epochs.items() if run.model == model}


def _model_row(name: str, config: Config, epochs: dict[Run, list[Row]]) -> Row:
    """Return the figures of a model from its runs that are trained to their last epoch."""
    last = {run.seed: rows[-1] for run, rows in epochs.items()}
    speeds = [row.get("train_images_per_second", 0) for rows in epochs.values() for row in rows]
    speeds = [speed for speed in speeds if speed > 0]  # none where only the validation of an epoch was left
    memory = [row["train_memory_mib"] for row in last.values() if "train_memory_mib" in row]
    return {
        "model": name,
        **_size(config, list(epochs)),
        "top1": {seed: _finite(row["eval_top1"]) for seed, row in last.items()},
        "train_loss": {seed: _finite(row["train_loss"]) for seed, row in last.items()},
        "images_per_second": {"median": statistics.median(speeds), "lowest": min(speeds), "highest": max(speeds)}
        if speeds
        else None,
        "memory_mib": max(memory, default=None),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _size(config: Config, runs: Sequence[Run]) -> Row:
    """Return the number of parameters and multiply-adds of a model, nothing where its number of classes is unknown."""
    classes = next((read_description(run.path / BEST_WEIGHTS).get("num_classes") for run in runs), None)
    if classes is None:
        return {}
    plain = replace(config.model, pretrained=False, initial_checkpoint=None)
    with torch.device("meta"):
        model = build_model(plain, classes)
    size = plain.img_size
    return {"parameters": count_parameters(model), "macs": count_macs(model, size) if size else count_macs(model)}


def _pair_row(pair: tuple[str, str], rows: Sequence[Row]) -> Row:
    """Return the differences in top-1 of two models, for each seed that both have."""
    first, second = (next(row["top1"] for row in rows if row["model"] == name) for name in pair)
    both = {seed: (first[seed], second[seed]) for seed in first if seed in second}
    return {"pair": pair, "difference": {seed: a - b for seed, (a, b) in both.items() if None not in (a, b)}}


def _tables(rows: Sequence[Row], pairs: Sequence[Row], diverged: Sequence[Run]) -> list[str]:
    head = ["model", "parameters M", "multiply-adds M", "seeds", "top-1 %", "training loss", "images/s", "memory MiB"]
    models = [head]
    for row in rows:
        cells = [row["model"], _number(row.get("parameters"), 2, 1e6), _number(row.get("macs"), 1, 1e6)]
        cells += [str(len(row["top1"])), _spread(row["top1"].values()), _spread(row["train_loss"].values(), 3)]
        speed = row["images_per_second"]
        speed = f"{speed['median']:.0f} ({speed['lowest']:.0f} to {speed['highest']:.0f})" if speed else "-"
        models.append([*cells, speed, _number(row["memory_mib"], 0)])
    tables = [markdown_table(models)]
    if pairs:
        table = [["difference in top-1", "mean", "by seed"]]
        for row in pairs:
            values = row["difference"].values()
            each = ", ".join(f"{value:+.2f}" for value in values)
            table.append([" - ".join(row["pair"]), _spread(values, sign="+"), each or "-"])
        tables.append(markdown_table(table))
    if diverged:
        tables.append("Diverged, and in no number: " + "; ".join(f"{run} ({run.log})" for run in diverged) + ".")
    tables.append(
        "Top-1 is that of the last epoch, not of the best one. After ± stands the standard deviation over the seeds. "
        "Images/s are the median (and range) of the epochs of training, while other runs, and perhaps other programs, "
        "ran beside them: `litvit benchmark` compares speeds. Memory is the peak of a process, on a GPU that of its "
        "tensors."
    )
    return tables


def _number(value: float | None, digits: int, unit: float = 1) -> str:
    return "-" if value is None else f"{value / unit:.{digits}f}"


def _spread(values: Collection[float | None], digits: int = 2, sign: str = "") -> str:
    """Return the mean and the standard deviation; "-" if there are no values, or some are not finite."""
    if not values or None in values:
        return "-"
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _starts(run: Run) -> list[Row]:
    try:
        return yaml.safe_load((run.path / STARTS).read_text()) or []
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return []


def _places(starts: Sequence[Row]) -> list[str]:
    """Say on what the runs were trained, once per kind of machine and versions."""
    places = []
    for start in starts:
        hardware, versions = start.get("hardware") or {}, start.get("versions") or {}
        processor = hardware.get("gpu") or f"{hardware.get('cpu')}, {hardware.get('cores')} cores"
        commit = f", commit {str(start['commit'])[:7]}{'-dirty' if start.get('changed') else ''}"
        packages = ", ".join(f"{name} {value}" for name, value in versions.items() if value and name != "litvit")
        data = f", data {start['data_dir']}" if start.get("data_dir") else ""
        place = f"- {processor}; {packages}{commit if start.get('commit') else ''}{data}"
        if place not in places:
            places.append(place)
    return ["\n".join(places)] if places else []


def _plot(study: Study, rows: Sequence[Row], epochs: dict[Run, list[Row]]) -> Figure:
    """Plot top-1 of all runs, and means over the seeds: top-1 by epoch, training loss by step."""
    figure = Figure(figsize=(15, 5), dpi=100, layout="constrained")
    points, top1, loss = figure.subplots(1, 3)
    styles = _styles(study)
    for place, row in enumerate(rows):
        colour = styles[row["model"]]["color"]
        values = [value for value in row["top1"].values() if value is not None]
        points.plot([place] * len(values), values, "o", color=colour, alpha=0.7)
        if values:
            points.plot(place, statistics.mean(values), "_", color="black", markersize=22)
    points.set_xticks(range(len(rows)), [row["model"] for row in rows], rotation=45, ha="right")
    points.set(ylabel="top-1 %", title="last epoch: runs (dots) and their mean (lines)")
    for model in study.models:
        of_model = _of_model(epochs, model)
        curves = [{int(row["epoch"]): row["eval_top1"] for row in rows} for rows in of_model.values()]
        _plot_mean(top1, curves, label=model, **styles[model])
        _plot_mean(loss, [_losses(run) for run in of_model], label=model, **styles[model])
    top1.set(xlabel="epoch", ylabel="top-1 %", title="validation")
    top1.xaxis.get_major_locator().set_params(integer=True)
    loss.set(xlabel="step", ylabel="loss", title="training")
    for axes in (points, top1, loss):
        axes.grid(alpha=0.3)
    figure.legend(*top1.get_legend_handles_labels(), loc="outside lower center", ncols=8)
    return figure


def _styles(study: Study) -> dict[str, Row]:
    """Return the line of each model: a colour per pair, as they are listed, and dashes for its second model."""
    colours = iter(itertools.cycle(matplotlib.colormaps["tab10"].colors))
    styles: dict[str, Row] = {}
    for pair in (*study.pairs, *((model,) for model in study.models)):
        if not styles.keys() & set(pair):
            styles |= zip(pair, itertools.product([next(colours)], ("-", "--")), strict=False)
    return {model: {"color": colour, "linestyle": dash} for model, (colour, dash) in styles.items()}


def _plot_mean(axes: Axes, curves: Sequence[dict[int, float]], **style: Any) -> None:
    """Plot the mean of curves where all of them have a finite value, and the band of their standard deviation."""
    finite = [{place for place, value in curve.items() if math.isfinite(value)} for curve in curves]
    places = sorted(set.intersection(*finite)) if finite else []
    if not places:
        return
    values = [[curve[place] for curve in curves] for place in places]
    means = [statistics.mean(each) for each in values]
    spreads = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in values]
    (line,) = axes.plot(places, means, marker="." if len(places) < 20 else None, **style)
    low, high = ([mean + sign * spread for mean, spread in zip(means, spreads, strict=True)] for sign in (-1, 1))
    axes.fill_between(places, low, high, color=line.get_color(), alpha=0.12, linewidth=0)


def _losses(run: Run) -> dict[int, float]:
    """Return the training loss by step, from the TensorBoard files of a run; nothing if it has none."""
    events = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0})
    if not (run.path / "tensorboard").is_dir():
        return {}
    events.Reload()
    if "train/loss" not in events.Tags()["scalars"]:
        return {}
    return {event.step: event.value for event in events.Scalars("train/loss")}
