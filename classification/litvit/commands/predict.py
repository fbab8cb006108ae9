"""Label images: litvit predict IMAGE... --checkpoint output/RUN (--help lists the flags)."""

import argparse
import csv
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import ImageDataset
from tqdm import tqdm

from litvit.cli import ArgumentParser
from litvit.data.contact_sheet import BLACK, GREY, PER_SHEET, Line, contact_sheet, thumbnail
from litvit.data.dataset import Images
from litvit.data.listing import NamedFiles, find_images
from litvit.data.loader import DevicePrefetcher, default_workers, eval_loader
from litvit.data.readers import DataConfig, read_class_map
from litvit.errors import InputError, one_line, printable
from litvit.memory import keep_freed_memory
from litvit.processes import EXIT_INPUT_ERROR, Processes, choose_device
from litvit.settings import add_flags, take
from litvit.training.classifier import Classifier, best_classes, build_classifier
from litvit.training.flags import (
    CHECKPOINT_HELP,
    TRACEBACK_HELP,
    HelpFormatter,
    add_model_flags,
    add_precision_flags,
    check_range,
    parse_with_checkpoint,
)
from litvit.training.model import ModelConfig, PrecisionConfig

EXIT_NOT_READ = 128 + signal.SIGPIPE


class _Printer:
    """Prints the best classes of images as they come.

    Args:
        kind: Format: table, csv or json.
        k: Number of classes per image.
        width: Length of the longest name of an image, for a table.
    """

    def __init__(self, kind: str, k: int, width: int):
        self.kind, self.width, self.printed = kind, width, 0
        columns = [f"{column}_{i}" for i in range(1, k + 1) for column in ("class", "probability")]
        if kind == "csv":
            self.csv = csv.writer(sys.stdout, lineterminator="\n")
            self.csv.writerow(["image", *columns])

    def add(self, name: str, labels: Sequence[tuple[str, float]]) -> None:
        """Print one image."""
        if self.kind == "csv":
            self.csv.writerow([name, *(value for label, share in labels for value in (label, f"{share:.6f}"))])
        elif self.kind == "json":
            found = [{"class": label, "probability": round(share, 6)} for label, share in labels]
            print("[" if not self.printed else ",", json.dumps({"image": name, "classes": found}), sep="\n")
        else:
            shown = "   ".join(f"{100 * share:5.1f}% {label}" for label, share in labels)
            print(f"{printable(name):{self.width}}   {shown}")
        self.printed += 1

    def close(self) -> None:
        """End the output."""
        if self.kind == "json":
            print("]" if self.printed else "[]")


class _Sheets:
    """Contact sheets, written one by one: FILE.png, FILE-2.png, ... or sheet.png, sheet-2.png, ... in a folder.

    Args:
        out: File, or a folder if it is one or has no suffix.

    Raises:
        InputError: a name that no picture can have.
    """

    def __init__(self, out: Path):
        is_folder = out.is_dir() or not out.suffix
        self.path = out / "sheet.png" if is_folder else out
        self.cells: list[tuple[Image.Image, list[Line]]] = []
        self.written: list[str] = []
        known = Image.registered_extensions()
        if known.get(self.path.suffix.lower()) not in Image.SAVE:
            raise InputError(f"--out {out}: name a folder, or a picture such as sheet.png")
        if not is_folder and not out.parent.is_dir():
            raise InputError(f"--out {out}: there is no folder {out.parent}")
        if is_folder:
            try:
                out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"--out {out}: {error.strerror}") from error

    def add(self, image: Image.Image, lines: list[Line]) -> None:
        """Add an image, and write the sheet if it is full."""
        self.cells.append((image, lines))
        if len(self.cells) == PER_SHEET:
            self.write()

    def write(self) -> None:
        """Write what is left.

        Raises:
            InputError: it cannot be written.
        """
        if not self.cells:
            return
        number = len(self.written) + 1
        path = self.path if number == 1 else self.path.with_stem(f"{self.path.stem}-{number}")
        try:
            contact_sheet(self.cells).save(path)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot write {path}: {one_line(error)}") from error
        self.cells = []
        self.written.append(str(path))


def parse_settings(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(
        usage="%(prog)s IMAGE... --checkpoint WEIGHTS [flags]",
        description="Label images with the classes of a trained classifier, the most probable first. A file that "
        "cannot be read is named, and the rest goes on; the exit status is 2 then.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("images", metavar="IMAGE", nargs="+", help="image files, folders, patterns such as 'a/**/*.jpg', - for stdin's")
    add("--checkpoint", metavar="WEIGHTS", help=CHECKPOINT_HELP)
    add("-k", "--topk", type=int, default=5, metavar="N", help="classes per image (5)")
    add("--format", choices=("table", "csv", "json"), default="table", help="table, csv or json (table)")
    add("--out", type=Path, metavar="FILE", help="contact sheets: a picture, or a folder for them")
    add("--device", metavar="NAME", help="cuda, cpu ... (cuda if available)")
    add("--traceback", action="store_true", help=TRACEBACK_HELP)
    group = parser.add_argument_group("data")
    add_flags(group, DataConfig, only=("class_map", "batch_size", "workers"))
    add_model_flags(parser, training=False)
    add_precision_flags(parser, training=False)
    settings = parse_with_checkpoint(parser, argv)
    check_range(settings, ("topk",), 1, None)
    return settings


def main(argv: Sequence[str] | None = None) -> int:
    """Label images as the command line says. Returns 0, or 2 if some could not be read."""
    settings = parse_settings(argv)
    names, problems = find_images(settings.images)
    if not names:
        raise InputError("; ".join(problems))
    sheets = _Sheets(settings.out) if settings.out else None
    device = choose_device(settings.device)
    if device.type == "cpu":
        keep_freed_memory()
    config, precision = (take(group, vars(settings)) for group in (ModelConfig, PrecisionConfig))
    classifier = build_classifier(config, settings.checkpoint, _description(settings), device)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)

    images = Images(ImageDataset("", reader=NamedFiles(names)), decoder=config.decoder)
    workers = settings.workers
    if workers is None:  # no more than there are batches for, and none for one batch
        workers = min(default_workers(), len(names) // settings.batch_size)
    sizes = {"batch_size": settings.batch_size, "workers": workers}
    loader = eval_loader(images, classifier.data_config, Processes(device), **sizes)
    if precision.torchcompile:
        classifier.model = torch.compile(classifier.model, backend=precision.torchcompile)
    k = min(settings.topk, len(classifier.classes))
    printer = _Printer(settings.format, k, max(map(len, map(printable, names))))
    try:
        for name, labels in _label(classifier, loader, names, precision.autocast(device), k):
            if labels is None:
                continue
            printer.add(name, labels)
            if sheets:
                shown = [(f"{100 * share:.0f}% {label}", BLACK) for label, share in labels[:3]]
                sheets.add(thumbnail(name, config.decoder), [(os.path.basename(name), GREY), *shown])
    except BrokenPipeError:  # `| head` has seen enough
        return EXIT_NOT_READ
    printer.close()
    if sheets:
        sheets.write()
        if sheets.written:
            print(f"contact sheets: {', '.join(sheets.written)}", file=sys.stderr)
    return EXIT_INPUT_ERROR if problems or printer.printed < len(names) else 0


def _description(settings: argparse.Namespace) -> dict[str, Any]:
    """Return what the checkpoint knows of its model, with the classes of `--class-map`."""
    if not settings.class_map:
        return settings.description
    numbers = read_class_map(settings.class_map)
    names = {number: name for name, number in numbers.items()}
    if names.keys() != set(range(len(names))):
        raise InputError(f"the class map {settings.class_map} leaves out a number: each class needs a name")
    return settings.description | {"classes": [names[number] for number in range(len(names))]}


@torch.inference_mode()
def _label(
    classifier: Classifier,
    loader: DevicePrefetcher,
    names: Sequence[str],
    autocast: Callable[[], AbstractContextManager],
    k: int,
) -> Iterator[tuple[str, list[tuple[str, float]] | None]]:
    """Yield each image's name and its k best classes with their probabilities, None for one that cannot be labelled.

    Why it cannot is printed at once.
    """
    done = 0
    with tqdm(total=len(names), desc="predict", unit=" images", disable=not sys.stderr.isatty(), leave=False) as bar:
        for images, _, faults in loader:
            broken = {fault.path for fault in faults}
            for reason in dict.fromkeys(fault.reason for fault in faults):
                bar.write(f"error: {reason}", file=sys.stderr)
            with autocast():
                logits = classifier.model(images)
            rows = zip(*(values.tolist() for values in best_classes(logits, k)), strict=True)
            for name, (probabilities, numbers) in zip(names[done : done + len(images)], rows, strict=True):
                labels = [(classifier.classes[i], share) for i, share in zip(numbers, probabilities, strict=True)]
                if printable(name) in broken:
                    labels = None
                elif not all(map(math.isfinite, probabilities)):
                    labels = None
                    bar.write(f"error: {printable(name)}: the model's scores are not finite", file=sys.stderr)
                yield name, labels
            done += len(images)
            bar.update(len(images))
