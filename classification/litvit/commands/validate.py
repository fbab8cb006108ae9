"""Evaluate a checkpoint: litvit validate DATA_DIR --model lit_ti --checkpoint FILE (--help lists the flags)."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from timm.data import RealLabelsImagenet

from litvit.cli import ArgumentParser
from litvit.data.loader import eval_loader
from litvit.data.readers import DataConfig, class_names, open_for_evaluation, train_classes
from litvit.data.streams import ImageStream
from litvit.errors import InputError
from litvit.memory import keep_freed_memory
from litvit.processes import Processes, choose_device
from litvit.runs.folder import replace_file
from litvit.settings import take
from litvit.training.blank_images import check_scores
from litvit.training.evaluate import evaluate
from litvit.training.flags import (
    TRACEBACK_HELP,
    HelpFormatter,
    add_data_flags,
    add_model_flags,
    add_precision_flags,
    parse_with_checkpoint,
)
from litvit.training.model import ModelConfig, PrecisionConfig, build_trained_model, data_settings, image_size


def parse_settings(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line. What it leaves open comes from the checkpoint's own description, if it has one."""
    parser = ArgumentParser(
        usage="%(prog)s DATA_DIR --model NAME (--checkpoint FILE | --pretrained) [flags]",
        description="Evaluate a checkpoint: top-1, top-5, loss, images/s. The weights of a training run "
        "(model_best.safetensors) know their model, image size and normalisation; flags override them.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("data_dir", metavar="DATA_DIR", help="folder with val/ (or a folder of classes itself, as ImageNet-V2's)")
    add("--checkpoint", metavar="FILE", help="weights, a file or a link: .safetensors, .pth, last.pth of a run")
    add("--results-file", metavar="FILE", help="file for the result, as JSON")
    add("--real-labels", nargs="?", const="", metavar="FILE", help="count by ImageNet-Real's labels too (timm's copy)")
    add("--device", metavar="NAME", help="cuda, cpu ... (cuda if available)")
    add("--traceback", action="store_true", help=TRACEBACK_HELP)
    add("--no-test-pool", action="store_true", help="accepted for old commands: there is no test-time pooling here")
    add_data_flags(parser, training=False)
    add_model_flags(parser, training=False)
    add_precision_flags(parser, training=False)
    settings = parse_with_checkpoint(parser, argv)
    results = Path(settings.results_file or "result.json")
    if not results.parent.is_dir() or results.is_dir():
        raise InputError(f"--results-file {results}: name a file in an existing folder")
    return settings


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the command line says. Returns 0."""
    settings = parse_settings(argv)
    data, config, precision = (take(group, vars(settings)) for group in (DataConfig, ModelConfig, PrecisionConfig))
    device = choose_device(settings.device)
    if device.type == "cpu":
        keep_freed_memory()
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
    if precision.torchcompile:
        model = torch.compile(model, backend=precision.torchcompile)
    processes = Processes(device)
    loader = eval_loader(images, data_config, processes, batch_size=data.batch_size, workers=data.workers)
    for note in images.notes:
        print(f"{data.val_split}: {note}", file=sys.stderr)
    real_labels = (
        real_imagenet_labels(images.filenames(), settings.real_labels) if settings.real_labels is not None else None
    )

    metrics = evaluate(model, loader, processes, precision.autocast(device), real_labels=real_labels)
    result = {
        "model": config.model,
        "checkpoint": settings.checkpoint or "pretrained",
        "data": str(data.data_dir),
        "images": metrics.pop("images"),
        "num_classes": num_classes,
        "img_size": image_size(data_config["input_size"][1:]),
        "crop_pct": data_config["crop_pct"],
        "interpolation": data_config["interpolation"],
        "precision": precision.amp_dtype if precision.amp else "float32",
        "device": str(device),
        **{name: round(value, 4) for name, value in metrics.items()},
    }
    text = json.dumps(result, indent=2)
    if settings.results_file:
        replace_file(Path(settings.results_file), lambda temporary: temporary.write_text(text + "\n"))
    print(text)
    return 0


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
