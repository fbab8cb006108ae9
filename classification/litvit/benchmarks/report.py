"""The report of a benchmark: a line about the machine, tables in Markdown, the figures as JSON, and charts."""

import argparse
import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch

from litvit.benchmarks import cases
from litvit.benchmarks.cases import PASSES
from litvit.benchmarks.charts import CHARTS, draw_charts
from litvit.benchmarks.exported import benchmark_export
from litvit.benchmarks.input_pipeline import benchmark_data
from litvit.benchmarks.measuring import machine
from litvit.benchmarks.paper import ACCURACIES, benchmark_paper
from litvit.benchmarks.published import TABLES
from litvit.errors import InputError, printable
from litvit.runs.folder import replace_file, save_text
from litvit.training.report import markdown_table, writing_to

MIB = 2**20
SPEEDS = {  # titles, units, digits
    "inference_images_per_second": ("inference images/s", 1, 1),
    "training_images_per_second": ("training images/s", 1, 1),
    "training_memory": ("training MiB", MIB, 0),
    "test_memory": ("test MiB", MIB, 0),
}
BRACKETS = "In brackets: published. docs/models.md says why some parameters and multiply-adds differ in their digits."
ON_ANOTHER_GPU = (
    "Published images/s and memory are of an RTX 3090 at batch 64: compare the ratios to the counterpart, not the "
    "numbers themselves."
)


def run(args: argparse.Namespace, command: str) -> None:
    """Run one benchmark, print its tables, and write its figures.

    Args:
        args: Flags of benchmark.py; `subcommand` names the benchmark, `json` the file for the figures or None, `output`
            the folder for a report with charts or None.
        command: Command line, for the file.

    Raises:
        InputError: The file or the folder cannot be written, the memory is too small, or what the benchmark itself
            refuses.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True  # the fastest convolutions of every model
    torch.backends.cudnn.allow_tf32 = args.tf32  # convolutions by the rule of matrix products
    if args.tf32:
        torch.set_float32_matmul_precision("high")
    environment = _environment(args)
    measure, tabulate = _BENCHMARKS[args.subcommand]
    with _writable(args):
        print(environment, end="\n\n", flush=True)  # the rest may take minutes
        try:
            rows = measure(args)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            raise InputError("the memory is too small: choose smaller inputs, or fewer models") from error
    text = tabulate(rows)
    print(text)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    figures = json.dumps({"command": command, "date": date, "environment": environment, "rows": rows}, indent=2) + "\n"
    if args.json:
        args.json.write_text(figures)
    if args.output:
        _write_report(args.output, f"`{command}`, {date}\n\n{environment}\n\n{text}\n", figures, rows)


@contextlib.contextmanager
def _writable(args: argparse.Namespace) -> Iterator[None]:
    """Check that the file and the folder of a report can be written. What is new goes if the block fails."""
    new_file, new_folder = (path and not path.exists() and path for path in (args.json, args.output))
    if args.json:
        try:
            args.json.open("a").close()
        except OSError as error:
            raise InputError(f"--json: cannot write {args.json}: {error.strerror}") from error
    try:
        if args.output:
            with writing_to(args.output):
                tempfile.TemporaryFile(dir=args.output).close()
        yield
    except BaseException:
        if new_file:
            new_file.unlink()
        if new_folder:
            with contextlib.suppress(OSError):
                new_folder.rmdir()
        raise


def _write_report(folder: Path, text: str, figures: str, rows: list[dict]) -> None:
    """Write the report on the paper's tables: text, figures and charts. Charts of an older one go."""
    charts = draw_charts(rows)
    with writing_to(folder):
        for name in CHARTS:
            if name not in charts:
                (folder / name).unlink(missing_ok=True)
        for name, chart in charts.items():
            replace_file(folder / name, partial(chart.savefig, format="png"))
    pictures = "".join(f"\n![{CHARTS[name]}]({name})\n" for name in charts)
    save_text(folder / "paper.json", figures)
    save_text(folder / "paper.md", f"# LIT's tables, measured and published\n\n{text}{pictures}")


def _environment(args: argparse.Namespace) -> str:
    shown = {
        "batch": "batch_size",
        "dtype": "dtype",
        "autocast": "amp_dtype",
        "compiled": "compile",
        "TF32": "tf32",
        "model": "model",
        "pixels": "image_size",
        "files": "images",
    }
    settings = [f"{word} {getattr(args, name)}" for word, name in shown.items() if getattr(args, name, None)]
    changing = ("LIT_", "MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "OMP_")
    settings += [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(changing)]
    settings.append(f"medians of {args.repeats}")
    timed = getattr(args, "speed", True)
    return "; ".join((machine(args.device), *([", ".join(settings)] if timed else [])))


def _dtm_table(rows: list[dict]) -> str:
    names = list(rows[0]["forward"])
    operators = [name for name in names if name not in ("ours", "linear")]
    ratios = ["ours / linear", *(f"{name} / ours" for name in operators)]
    table = [["shape", "pass", *(f"{name} ms" for name in names), *ratios]]
    for row in rows:
        for label, title in PASSES.items():
            ms = row[label]
            ratios = [ms["ours"] / ms["linear"], *(ms[name] / ms["ours"] for name in operators)]
            cells = [*(f"{ms[name]:.3f}" for name in names), *(f"{ratio:.2f}" for ratio in ratios)]
            table.append([row["shape"], title, *cells])
    return markdown_table(table)


def _models_table(rows: list[dict]) -> str:
    table = [["model", "parameters M", "multiply-adds G", "inference images/s", "ratio", "training images/s", "ratio"]]
    for row in rows:
        cells = _size_cells(row)
        for key in ("inference_images_per_second", "training_images_per_second"):
            cells += [f"{row[key]:.1f}", f"{row[key] / rows[-1][key]:.2f}"]
        table.append(cells)
    return markdown_table(table)


def _size_cells(row: dict) -> list[str]:
    return [row["model"], f"{row['parameters'] / 1e6:.2f}", f"{row['macs'] / 1e9:.2f}"]


def _table1_table(rows: list[dict]) -> str:
    head = [cell for title, _, _ in SPEEDS.values() for cell in (title, "ratio (published)")]
    table = [["model", "parameters M", "multiply-adds G", *head]]
    for row in rows:
        table.append([*_size_cells(row), *(cell for key in SPEEDS for cell in _speed_cells(row, key))])
    return markdown_table(table)


def _speed_cells(row: dict, key: str) -> tuple[str, str]:
    """Return a figure of SPEEDS, and its ratio to the counterpart."""
    _, unit, digits = SPEEDS[key]
    ratio, published = (row.get(ratios, {}).get(key) for ratios in ("ratios", "published_ratios"))
    return _number(row[key] and row[key] / unit, digits), _beside(_number(ratio, 2), published, 2)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _beside(measured: str, published: float | None, digits: int) -> str:
    return measured if published is None else f"{measured} ({published:.{digits}f})"


def _paper_text(rows: list[dict]) -> str:
    parts = [BRACKETS]
    for number in dict.fromkeys(row["table"] for row in rows):
        own = [row for row in rows if row["table"] == number]
        parts += [f"## Table {number}: {TABLES[number].title}", _paper_table(own, number)]
        parts += [ON_ANOTHER_GPU] if number == 1 and _is_timed(own) else []
    sources = {
        (row["model"], title): row["accuracies"][key]
        for row in rows
        for key, title in ACCURACIES.items()
        if key in row["accuracies"]
    }
    if sources:
        table = [["model", "accuracy", "weights", "file", "data"]]
        for (name, title), found in sources.items():
            origin = (printable(found[key]).replace("|", "\\|") for key in ("weights", "file", "data"))
            table.append([name, title, *origin])
        parts += ["## Results of litvit validate", markdown_table(table)]
    return "\n\n".join(parts)


def _is_timed(rows: list[dict]) -> bool:
    return "inference_images_per_second" in rows[0]


def _paper_table(rows: list[dict], number: int) -> str:
    # The paper has speed, memory and the other test sets in Table 1 alone.
    others = set(ACCURACIES) if number == 1 else {key for row in rows for key in row["accuracies"]}
    accuracies = [key for key in ACCURACIES if key == "top1" or key in others]
    speeds = [key for key in SPEEDS if _is_timed(rows) and (number == 1 or rows[0][key] is not None)]
    head = [cell for key in speeds for cell in (SPEEDS[key][0], "ratio")]
    table = [["model", "name", "parameters M", "multiply-adds G"]]
    table[0] += [*(["counterpart"] if speeds else []), *head, *(f"{ACCURACIES[key]} top-1" for key in accuracies)]
    for row in rows:
        published = row["published"]
        name, *sizes = _size_cells(row)
        cells = [published["title"], name]
        cells += [_beside(sizes[0], published["parameters"], 0), _beside(sizes[1], published["macs"], 1)]
        if speeds:
            cells.append(row["counterpart"] or "-")
        for key in speeds:
            value, ratio = _speed_cells(row, key)
            cells += [_beside(value, published.get(key) if number == 1 else None, 0), ratio]
        for key in accuracies:
            found = row["accuracies"].get(key)
            cells.append(_beside(_number(found and found["percent"], 2), published[key], 1))
        table.append(cells)
    return markdown_table(table)


def _attention_table(rows: list[dict]) -> str:
    paths = list(rows[0]["milliseconds"])
    figures = {"milliseconds": ("ms", 1, 3), "memory": ("MiB", MIB, 0)}
    if rows[0]["memory"]["ours"] is None:
        del figures["memory"]
    table = [["images", "attention", "pass", "chosen"]]
    for title, _, _ in figures.values():
        table[0] += [*(f"{path} {title}" for path in paths), *(f"{path} / ours, {title}" for path in paths[1:])]
    for row in rows:
        cells = [row["input"], row["tokens"], row["pass"], row["chosen"]]
        for key, (_, unit, digits) in figures.items():
            values = row[key]
            cells += [f"{values[path] / unit:.{digits}f}" for path in paths]
            cells += [f"{values[path] / values['ours']:.2f}" for path in paths[1:]]
        table.append(cells)
    return markdown_table(table)


def _dense_table(rows: list[dict]) -> str:
    table = [["images", "model", "ms", "speed, ratio", "MiB", "ratio"]]
    last = {row["input"]: row for row in rows}
    for row in rows:
        reference, memory = last[row["input"]], row["memory"]
        speed = f"{reference['milliseconds'] / row['milliseconds']:.2f}"
        cells = ["-", "-"] if memory is None else [f"{memory / MIB:.0f}", f"{memory / reference['memory']:.2f}"]
        table.append([row["input"], row["model"], f"{row['milliseconds']:.1f}", speed, *cells])
    return markdown_table(table)


def _data_table(rows: list[dict]) -> str:
    whole = {row["pipeline"]: row["milliseconds"] for row in rows if row["step"] == "all"}
    table = [["pipeline", "step", "ms per image", "part", "images/s per core"]]
    for row in rows:
        ms = row["milliseconds"]
        speed = f"{1000 / ms:.0f}" if row["step"] == "all" else ""
        table.append([row["pipeline"], row["step"], f"{ms:.3f}", f"{ms / whole[row['pipeline']]:.0%}", speed])
    return markdown_table(table)


def _export_table(rows: list[dict]) -> str:
    table = [["batch", "model", "run", "ms", "speed / eager", f"speed / {rows[-1]['model']}"]]
    for row in rows:
        ratios = (f"{row[key]:.2f}" for key in ("eager_ratio", "peer_ratio"))
        table.append([str(row["batch"]), row["model"], row["run"], f"{row['milliseconds']:.1f}", *ratios])
    return markdown_table(table)


_BENCHMARKS = {
    "paper": (benchmark_paper, _paper_text),
    "table1": (cases.benchmark_table1, _table1_table),
    "models": (cases.benchmark_models, _models_table),
    "dtm": (cases.benchmark_dtm, _dtm_table),
    "attention": (cases.benchmark_attention, _attention_table),
    "dense": (cases.benchmark_dense, _dense_table),
    "data": (benchmark_data, _data_table),
    "export": (benchmark_export, _export_table),
}
