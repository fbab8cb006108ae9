"""The report of a benchmark: a line about the machine, a table in Markdown, and the figures as JSON."""

import argparse
import json
import os
from datetime import datetime, timezone

import torch

from litvit.benchmarks import cases
from litvit.benchmarks.cases import PASSES
from litvit.benchmarks.exported import benchmark_export
from litvit.benchmarks.input_pipeline import benchmark_data
from litvit.benchmarks.measuring import machine
from litvit.errors import InputError

MIB = 2**20


def run(args: argparse.Namespace, command: str) -> None:
    """Run one benchmark, print its table, and write its figures.

    Args:
        args: Flags of benchmark.py; `subcommand` names the benchmark, `json` the file for the figures or None.
        command: Command line, for the file.

    Raises:
        InputError: The file cannot be written, the memory is too small, or what the benchmark itself refuses.
    """
    is_new = args.json and not args.json.exists()
    if args.json:
        try:
            args.json.open("a").close()  # before anything is measured
        except OSError as error:
            raise InputError(f"--json: cannot write {args.json}: {error.strerror}") from error
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True  # the fastest convolutions of every model
    torch.backends.cudnn.allow_tf32 = args.tf32  # convolutions by the rule of matrix products
    if args.tf32:
        torch.set_float32_matmul_precision("high")
    environment = _environment(args)
    print(environment, end="\n\n", flush=True)  # the rest may take minutes
    measure, tabulate = _BENCHMARKS[args.subcommand]
    rows = None
    try:
        rows = measure(args)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise InputError("the memory is too small: choose smaller inputs, or fewer models") from error
    finally:
        if rows is None and is_new:
            args.json.unlink()
    _print_markdown(tabulate(rows))
    if args.json:
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        figures = {"command": command, "date": date, "environment": environment, "rows": rows}
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


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
    return f"{machine(args.device)}; {', '.join((*settings, f'medians of {args.repeats}'))}"


def _print_markdown(table: list[list[str]]) -> None:
    print("| " + " | ".join(table[0]) + " |")
    print("|" + "---|" * len(table[0]))
    for cells in table[1:]:
        print("| " + " | ".join(cells) + " |")


def _dtm_table(rows: list[dict]) -> list[list[str]]:
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
    return table


def _models_table(rows: list[dict]) -> list[list[str]]:
    table = [["model", "parameters M", "multiply-adds G", "inference images/s", "ratio", "training images/s", "ratio"]]
    for row in rows:
        cells = _size_cells(row)
        for key in ("inference_images_per_second", "training_images_per_second"):
            cells += [f"{row[key]:.1f}", f"{row[key] / rows[-1][key]:.2f}"]
        table.append(cells)
    return table


def _size_cells(row: dict) -> list[str]:
    return [row["model"], f"{row['parameters'] / 1e6:.2f}", f"{row['macs'] / 1e9:.2f}"]


def _table1_table(rows: list[dict]) -> list[list[str]]:
    figures = {
        "inference_images_per_second": ("inference images/s", 1, 1),
        "training_images_per_second": ("training images/s", 1, 1),
        "training_memory": ("training MiB", MIB, 0),
        "test_memory": ("test MiB", MIB, 0),
    }
    head = [cell for title, _, _ in figures.values() for cell in (title, "ratio (published)")]
    table = [["model", "parameters M", "multiply-adds G", *head]]
    for row in rows:
        cells = _size_cells(row)
        for key, (_, unit, digits) in figures.items():
            cells.append("-" if row[key] is None else f"{row[key] / unit:.{digits}f}")
            measured, published = (row.get(ratios, {}).get(key) for ratios in ("ratios", "published_ratios"))
            ratio = f"{measured:.2f}" if measured else "-"
            cells.append(f"{ratio} ({published:.2f})" if published else ratio)
        table.append(cells)
    return table


def _attention_table(rows: list[dict]) -> list[list[str]]:
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
    return table


def _dense_table(rows: list[dict]) -> list[list[str]]:
    table = [["images", "model", "ms", "speed, ratio", "MiB", "ratio"]]
    last = {row["input"]: row for row in rows}
    for row in rows:
        reference, memory = last[row["input"]], row["memory"]
        speed = f"{reference['milliseconds'] / row['milliseconds']:.2f}"
        cells = ["-", "-"] if memory is None else [f"{memory / MIB:.0f}", f"{memory / reference['memory']:.2f}"]
        table.append([row["input"], row["model"], f"{row['milliseconds']:.1f}", speed, *cells])
    return table


def _data_table(rows: list[dict]) -> list[list[str]]:
    whole = {row["pipeline"]: row["milliseconds"] for row in rows if row["step"] == "all"}
    table = [["pipeline", "step", "ms per image", "part", "images/s per core"]]
    for row in rows:
        ms = row["milliseconds"]
        speed = f"{1000 / ms:.0f}" if row["step"] == "all" else ""
        table.append([row["pipeline"], row["step"], f"{ms:.3f}", f"{ms / whole[row['pipeline']]:.0%}", speed])
    return table


def _export_table(rows: list[dict]) -> list[list[str]]:
    table = [["batch", "model", "run", "ms", "speed / eager", f"speed / {rows[-1]['model']}"]]
    for row in rows:
        ratios = (f"{row[key]:.2f}" for key in ("eager_ratio", "peer_ratio"))
        table.append([str(row["batch"]), row["model"], row["run"], f"{row['milliseconds']:.1f}", *ratios])
    return table


_BENCHMARKS = {
    "table1": (cases.benchmark_table1, _table1_table),
    "models": (cases.benchmark_models, _models_table),
    "dtm": (cases.benchmark_dtm, _dtm_table),
    "attention": (cases.benchmark_attention, _attention_table),
    "dense": (cases.benchmark_dense, _dense_table),
    "data": (benchmark_data, _data_table),
    "export": (benchmark_export, _export_table),
}
