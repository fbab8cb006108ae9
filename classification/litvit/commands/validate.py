"""Evaluate a checkpoint: litvit validate DATA_DIR --model lit_ti --checkpoint FILE (--help lists the flags)."""

import argparse
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from timm.data import RealLabelsImagenet
from torch import Tensor, nn
from tqdm import tqdm

from litvit.cli import ArgumentParser
from litvit.data.dataset import Images
from litvit.data.loader import Batch, eval_loader
from litvit.data.readers import DataConfig, class_names, open_for_evaluation, train_classes
from litvit.data.streams import ImageStream
from litvit.errors import InputError
from litvit.processes import start_processes
from litvit.runs.folder import save_text
from litvit.settings import take
from litvit.training.blank_images import check_scores
from litvit.training.classifier import class_labels
from litvit.training.evaluate import evaluate
from litvit.training.flags import (
    CHECKPOINT_HELP,
    TRACEBACK_HELP,
    HelpFormatter,
    add_data_flags,
    add_model_flags,
    add_precision_flags,
    parse_with_checkpoint,
)
from litvit.training.model import ModelConfig, PrecisionConfig, build_trained_model, data_settings, image_size
from litvit.training.predictions import COLUMNS, Predicted, Predictions, per_class
from litvit.training.report import RESULT, format_table, write_report

SHOWN = 20  # classes in the table on the terminal


def parse_settings(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line. What it leaves open comes from the checkpoint's own description, if it has one."""
    parser = ArgumentParser(
        usage="%(prog)s DATA_DIR --checkpoint WEIGHTS [flags]",
        description="Evaluate a checkpoint: top-1, top-5, loss, calibration error, images/s. The weights of a training "
        "run know their model, image size and normalisation; flags override them. Under torchrun, several processes.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("data_dir", metavar="DATA_DIR", help="folder with val/ (or a folder of classes itself, as ImageNet-V2's)")
    add("--checkpoint", metavar="WEIGHTS", help=CHECKPOINT_HELP)
    add("--results-file", metavar="FILE", help="file for the result, as JSON")
    add(
        "--report",
        type=Path,
        metavar="DIR",
        help="folder for accuracy per class, confusion matrix, most confident mistakes, predictions per image",
    )
    add("--flip", action="store_true", help="average the probabilities of each image and its mirror image")
    add("--real-labels", nargs="?", const="", metavar="FILE", help="count by ImageNet-Real's labels too (timm's copy)")
    add("--device", metavar="NAME", help="cuda, cpu ... (cuda if available)")
    add("--traceback", action="store_true", help=TRACEBACK_HELP)
    add("--no-test-pool", action="store_true", help="accepted for old commands: there is no test-time pooling here")
    add_data_flags(parser, training=False)
    add_model_flags(parser, training=False)
    add_precision_flags(parser, training=False)
    settings = parse_with_checkpoint(parser, argv)
    results = Path(settings.results_file or "result.json")
    if not os.path.isdir(results.parent) or os.path.isdir(results):
        raise InputError(f"--results-file {results}: name a file in an existing folder")
    if settings.report:
        try:
            settings.report.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--report {settings.report}: {error.strerror}") from error
    return settings


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the command line says. Returns 0."""
    settings = parse_settings(argv)
    data, config, precision = (take(group, vars(settings)) for group in (DataConfig, ModelConfig, PrecisionConfig))
    processes = start_processes(settings.device)
    device = processes.device
    known_classes = settings.description.get("classes")
    images = open_for_evaluation(data, known_classes, config.decoder, settings.description.get("held_out"))
    classes = class_names(images)
    counted = max(classes.values()) + 1 if classes else None
    num_classes = data.num_classes or counted
    if isinstance(images, ImageStream):
        images.num_classes = num_classes
        if settings.real_labels is not None:
            raise InputError("--real-labels goes by the names of ImageNet's files: give the folder, not a stream")
    if num_classes is None:
        raise InputError(f"--dataset {data.dataset} does not say how many classes it has: give --num-classes")
    numbered = known_classes or data.class_map or train_classes(data)
    if counted and (counted > num_classes or (counted < num_classes and not numbered)):
        raise InputError(
            f"{data.data_dir} has {counted} classes, the model {num_classes}: --class-map FILE says which is which"
        )
    model = build_trained_model(config, num_classes, settings.checkpoint, data.data_dir)
    model.to(device)
    data_config = data_settings(config, model)
    check_scores(model, config, precision, data_config["input_size"], num_classes, device)
    if settings.flip:
        model = FlipAverage(model)
    if precision.torchcompile:
        model = torch.compile(model, backend=precision.torchcompile)
    loader = eval_loader(images, data_config, processes, batch_size=data.batch_size, workers=data.workers)
    if processes.primary:
        for note in images.notes:
            print(f"{data.val_split}: {note}", file=sys.stderr)
    names = None if isinstance(images, ImageStream) else images.filenames()
    real_labels = None
    if settings.real_labels is not None:
        real_labels = real_imagenet_labels(names, settings.real_labels)

    predictions = Predictions()
    progress = partial(_with_progress, hidden=not processes.primary or not sys.stderr.isatty())
    autocast = precision.autocast(device)
    metrics = evaluate(model, loader, processes, autocast, predictions=predictions, iterate=progress)
    predicted = predictions.gather(processes)
    if not processes.primary:
        return 0
    metrics["calibration_error"] = predicted.calibration_error()
    if real_labels is not None:
        metrics |= real_accuracy(predicted, names, real_labels)
    result = {
        "model": config.model,
        "checkpoint": settings.checkpoint or "pretrained",
        "data": str(data.data_dir),
        "images": metrics.pop("images"),
        "num_classes": num_classes,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "img_size": image_size(data_config["input_size"][1:]),
        "crop_pct": data_config["crop_pct"],
        "interpolation": data_config["interpolation"],
        "precision": precision.amp_dtype if precision.amp else "float32",
        "device": str(device),
        **({"flip": True} if settings.flip else {}),
        **({"processes": processes.world_size} if processes.world_size > 1 else {}),
        **{name: round(value, 4) if math.isfinite(value) else None for name, value in metrics.items()},
    }
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    print(text, end="", flush=True)
    if settings.report:
        labels = class_labels(num_classes, known_classes, classes)
        _write_report(settings.report, predicted, labels, images, names)
        save_text(settings.report / RESULT, text)
    if settings.results_file:
        save_text(Path(settings.results_file), text)
    return 0


class FlipAverage(nn.Module):
    """A classifier that averages the probabilities of an image and of its mirror image.

    Args:
        model: Model from images (B, C, H, W) to logits (B, K).
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Return logarithms of the mean probabilities, (B, K)."""
        both = [self.model(view).float().log_softmax(-1) for view in (images, images.flip(-1))]
        return torch.logaddexp(*both) - math.log(2)


def _with_progress(batches: Iterable[Batch], hidden: bool) -> Iterator[Batch]:
    """Yield batches, and show how many have come."""
    return iter(tqdm(batches, desc="validate", unit="batch", disable=hidden, leave=False))


def _write_report(
    folder: Path, predicted: Predicted, classes: list[str], images: Images | ImageStream, names: list[str] | None
) -> None:
    """Write a report but its result, and print the classes that fare worst."""

    def open_image(index: int) -> Image.Image:
        return images.decoder(images.open(index)[0])

    try:
        (folder / RESULT).unlink(missing_ok=True)  # an older report's: it is written last
        write_report(folder, predicted, classes, names, open_image)
    except OSError as error:
        raise InputError(f"cannot write the report to {folder}: {error.strerror or error}") from error
    rows = [row for row in per_class(predicted, classes) if row["images"]]
    rows.sort(key=lambda row: row["top1"])
    shown = rows[:SHOWN]
    more = f" (the {SHOWN} lowest of {len(rows)})" if len(rows) > SHOWN else ""
    print(f"\naccuracy per class, lowest first{more}:\n{format_table(shown, COLUMNS)}", file=sys.stderr)
    print(f"\nreport: {folder}", file=sys.stderr)


def real_accuracy(predicted: Predicted, names: list[str], labels: RealLabelsImagenet) -> dict[str, float]:
    """Return real_top1 and real_top5 in percent, over the images that have labels in ImageNet-Real."""
    real = [labels.real_labels[Path(name).name] for name in names]
    guesses = predicted.classes.tolist()
    labelled = [(set(true), best) for true, best in zip(real, guesses, strict=True) if true]
    return {
        f"real_top{k}": 100 * sum(not true.isdisjoint(best[:k]) for true, best in labelled) / max(len(labelled), 1)
        for k in (1, 5)
    }


def real_imagenet_labels(filenames: list[str], file: str) -> RealLabelsImagenet:
    """Read the reassessed labels of ImageNet's validation images (Beyer et al., 2020).

    Args:
        filenames: Names of the images, ILSVRC2012_val_<number>.JPEG.
        file: JSON list of the labels of every image, in order; empty for timm's copy.

    Raises:
        InputError: no such file, or labels of other images.
    """
    try:
        labels = RealLabelsImagenet(filenames, file or None)
        missing = next((name for name in filenames if Path(name).name not in labels.real_labels), None)
    except OSError as error:
        raise InputError(f"--real-labels {file}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise InputError(f"--real-labels {file} is not JSON") from error
    except AssertionError:
        missing = "as many images as the folder holds"
    if missing is not None:
        raise InputError(f"the real labels are of ImageNet's 50,000 validation images; they lack {missing}")
    return labels
