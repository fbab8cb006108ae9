"""Write a trained model for another runtime: litvit export --checkpoint FILE --format onnx (--help lists the flags)."""

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn

from litvit.benchmarks.measuring import interleaved_medians
from litvit.cli import ArgumentParser
from litvit.data.dataset import transform_image, unreadable
from litvit.data.listing import image_suffixes, natural_order
from litvit.data.pixels import Decoder
from litvit.errors import InputError, printable
from litvit.processes import choose_device
from litvit.runtimes import (
    DTYPES,
    FORMATS,
    TOLERANCES,
    Comparison,
    DenseMaps,
    Export,
    Run,
    check_format,
    compare,
    write,
)
from litvit.settings import take
from litvit.training.blank_images import check_scores
from litvit.training.classifier import Classifier, build_classifier
from litvit.training.flags import (
    CHECKPOINT_HELP,
    TRACEBACK_HELP,
    HelpFormatter,
    add_model_flags,
    check_range,
    parse_with_checkpoint,
)
from litvit.training.model import ModelConfig, PrecisionConfig

COMPARED, CALIBRATED, DRAWN = 256, 128, 16  # images
ROUNDS = 5
EXIT_DIFFERS = 1
LEAST_AGREEMENT = {"float32": 99.0}  # percent; others: 90


def parse_settings(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line. What it leaves open comes from the checkpoint's own description, if it has one."""
    parser = ArgumentParser(
        usage="%(prog)s --checkpoint WEIGHTS --format FORMAT [flags]",
        description="Write a classifier, or its dense maps, for another runtime. The file is run by that runtime and "
        "compared with the model on images before it gets its name, and its speed is told beside torch's.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", metavar="WEIGHTS", help=CHECKPOINT_HELP)
    add("--format", choices=FORMATS, default="onnx", help="onnx, openvino, torch-export, aoti (compiled), torchscript")
    add("--precision", choices=DTYPES, default="float32", help="float32, float16, bfloat16, int8 (onnx, openvino)")
    add("--output", metavar="FILE", help="file to write (the model's name in this folder); FILE.json describes it")
    add("--dense", action="store_true", help="write the maps of all stages, not the classifier")
    add("--num-classes", type=int, metavar="N", help="classes of the checkpoint (its own)")
    add(
        "--dynamic-batch",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="take any number of images; --no-dynamic-batch: as many as --batch-size says",
    )
    add("--batch-size", type=int, default=1, metavar="N", help="images of a file for one batch size (1)")
    add("--dynamic-size", action="store_true", help="with --dense: take images of any size above 32")
    group = parser.add_argument_group("images and comparison")
    add = group.add_argument
    add("--images", metavar="DIR", help=f"images to compare on, at most {COMPARED} (drawn digits)")
    add("--calibration", metavar="DIR", help=f"typical images for int8, at most {CALIBRATED}: training images")
    add("--tolerance", type=float, metavar="X", help="largest relative error that passes (1e-4; 0.01, 0.05, int8 0.2)")
    add(
        "--min-agreement",
        type=float,
        metavar="X",
        help="least percentage of images with torch's top-1 (float32 99, others 90)",
    )
    add("--threads", type=int, metavar="N", help="threads of torch and of the runtime (torch's choice)")
    parser.add_argument("--traceback", action="store_true", help=TRACEBACK_HELP)
    add_model_flags(parser, training=False)
    settings = parse_with_checkpoint(parser, argv)
    _check(settings)
    return settings


def _check(settings: argparse.Namespace) -> None:
    check_range(settings, ("num_classes", "batch_size", "threads"), 1, None)
    check_range(settings, ("tolerance",), 0, None)
    check_range(settings, ("min_agreement",), 0, 100)
    kind = check_format(settings.format, settings.precision, dynamic_size=settings.dynamic_size)
    if settings.dynamic_size and not settings.dense:
        raise InputError("--dynamic-size is for --dense: a classifier takes images of --img-size")
    if settings.dynamic_batch and settings.batch_size != 1:
        raise InputError("--batch-size is for --no-dynamic-batch: else the file takes any number of images")
    if settings.precision == "int8" and not settings.calibration:
        raise InputError("--precision int8 needs --calibration DIR: a folder of typical images, such as train/")
    if settings.precision != "int8" and settings.calibration:
        raise InputError(f"--calibration is for --precision int8, not {settings.precision}")
    if settings.output is None:
        settings.output = re.split("[:/]", settings.model.rstrip("/"))[-1] + kind.suffix  # of hf-hub:OWNER/NAME: NAME
    output = Path(settings.output)
    if not output.parent.is_dir() or output.is_dir() or not output.name.endswith(kind.suffix):
        raise InputError(f"--output {output}: name a file *{kind.suffix} in an existing folder")
    settings.output = output


def main(argv: Sequence[str] | None = None) -> int:
    """Export as the command line says. Returns 0, or 1 if the file's outputs are not those of the model."""
    settings = parse_settings(argv)
    config, kind = take(ModelConfig, vars(settings)), FORMATS[settings.format]
    threads = settings.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    classifier = _build(settings, config)
    data_config = classifier.data_config
    model = DenseMaps(classifier.model).eval() if settings.dense else classifier.model
    images = read_images(settings.images, data_config, config.decoder, COMPARED, "--images")
    if not settings.dynamic_batch:
        images = images[: len(images) // settings.batch_size * settings.batch_size]
        if not len(images):
            raise InputError(f"--batch-size {settings.batch_size} needs as many images: --images DIR")
    calibration = None
    if settings.calibration:
        calibration = read_images(settings.calibration, data_config, config.decoder, CALIBRATED, "--calibration")
        if len(calibration) < settings.batch_size:
            raise InputError(f"--calibration {settings.calibration} has {len(calibration)} images, too few for a batch")
    example = images[: 2 if settings.dynamic_batch else settings.batch_size]
    metadata = _metadata(settings, classifier)
    outputs = [f"stage{i + 1}" for i in range(len(model(example)))] if settings.dense else ["logits"]
    export = Export(
        model,
        example.repeat(2, 1, 1, 1)[:2] if settings.dynamic_batch else example,
        settings.precision,
        settings.dynamic_batch,
        settings.dynamic_size,
        outputs,
        metadata | {"outputs": outputs},
        calibration,
    )
    output = settings.output
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-") as folder:
        path = Path(folder) / output.name
        print(f"{config.model}: writing {settings.format}, {settings.precision}", flush=True)
        write(export, kind, path)
        run = kind.load(path, threads)
        result = compare(run, model, _batches(images, settings))
        print(_describe(result, settings), flush=True)
        problem = _problem(result, settings)
        if problem:
            print(f"error: {problem}: nothing was written", file=sys.stderr)
            return EXIT_DIFFERS
        for line in _speed(run, model, images, settings, threads):
            print(line, flush=True)
        description = Path(folder) / f"{output.name}.json"
        description.write_text(json.dumps(export.metadata, indent=2) + "\n")
        size = sum(entry.stat().st_size for entry in Path(folder).iterdir()) / 2**20
        for name in sorted(os.listdir(folder), key=lambda name: name == output.name):  # the named file last
            os.replace(Path(folder) / name, output.parent / name)
    print(f"{output} ({size:.1f} MiB), described by {description.name}")
    return 0


def _build(settings: argparse.Namespace, config: ModelConfig) -> Classifier:
    """Return the classifier to export."""
    description = dict(settings.description)
    if settings.num_classes is not None:
        description["num_classes"] = settings.num_classes
    classifier = build_classifier(config, settings.checkpoint, description, choose_device("cpu"))
    model = classifier.model.requires_grad_(False)
    size = classifier.data_config["input_size"]
    check_scores(model, config, PrecisionConfig(), size, model.num_classes, classifier.device)
    return classifier


def read_images(folder: str | None, data_config: dict, decoder: Decoder, number: int, flag: str) -> Tensor:
    """Read images as validation does, or draw digits.

    Args:
        folder: Folder with images, in folders of their own or not. None to draw.
        data_config: timm's input_size, interpolation, mean, std and crop_pct.
        decoder: How files become images.
        number: Largest number of images. They are spread over the folder.
        flag: Flag that names the folder, for messages.

    Returns:
        Images, (N, C, H, W), normalised.

    Raises:
        InputError: The folder is missing, has no images, or one of them cannot be read.
    """
    names = ("input_size", "interpolation", "mean", "std", "crop_pct")
    transform = create_transform(**{name: data_config[name] for name in names})
    if folder is None:
        from litvit import demo_data  # needs scikit-learn

        rng, size = np.random.default_rng(0), data_config["input_size"][1:]
        digits = demo_data.source_digits(0)["val"]
        drawn = [(label, digits[label][i]) for i in range(-(-DRAWN // len(digits))) for label in range(len(digits))]
        scenes = [demo_data.draw_scene(rng, [digit], size).image for digit in drawn[:DRAWN]]
        return torch.stack([transform(Image.fromarray(scene).convert(decoder.mode)) for scene in scenes])
    root, suffixes = Path(folder), image_suffixes()
    if not root.is_dir():
        raise InputError(f"{flag} {root}: no such folder")
    paths = [path for path in root.rglob("*") if path.suffix.lower() in suffixes and not path.name.startswith(".")]
    if not paths:
        raise InputError(f"{flag} {root}: no images in it, nor in its folders")
    paths = natural_order(map(str, paths))
    chosen = [paths[i * len(paths) // min(number, len(paths))] for i in range(min(number, len(paths)))]

    def read(path: str) -> Tensor:
        name = partial(printable, path)
        with unreadable(name):
            image = Image.open(path)
        return transform_image(image, transform, decoder, name)

    return torch.stack([read(path) for path in chosen])


def _batches(images: Tensor, settings: argparse.Namespace) -> list[Tensor]:
    """Return batches of several numbers of images, and of several sizes, as far as the file takes them."""
    if not settings.dynamic_batch:
        return list(images.split(settings.batch_size))
    batches = [images[:1], images[1:3], *images[3:].split(8)]
    if settings.dynamic_size:
        height, width = images.shape[2:]
        sizes = ((height + 37, max(33, width - 31)), (max(33, height // 2 + 1), width * 3 // 2))
        batches = batches[:4] + [F.interpolate(images[:2], size=size, mode="bilinear") for size in sizes]
    return [batch for batch in batches if len(batch)]


def _describe(result: Comparison, settings: argparse.Namespace) -> str:
    agreement = "" if result.agreement is None else f", same top-1 {100 * result.agreement:.1f}%"
    source = settings.images or "drawn digits"
    return f"compared with torch on {result.images} images ({source}): relative error {result.error:.1e}{agreement}"


def _problem(result: Comparison, settings: argparse.Namespace) -> str | None:
    tolerance = TOLERANCES[settings.precision] if settings.tolerance is None else settings.tolerance
    if not result.error <= tolerance:
        return f"the relative error {result.error:.1e} is above {tolerance:g} (--tolerance)"
    least = settings.min_agreement
    if least is None:
        least = LEAST_AGREEMENT.get(settings.precision, 90.0)
    if result.agreement is not None and 100 * result.agreement < least:
        return f"{100 * result.agreement:.1f}% of the images keep their top-1, fewer than {least:g}% (--min-agreement)"
    return None


def _speed(run: Run, model: nn.Module, images: Tensor, settings: argparse.Namespace, threads: int) -> list[str]:
    lines = []
    for batch in (1, 8) if settings.dynamic_batch else (settings.batch_size,):
        x = images.repeat(-(-batch // len(images)), 1, 1, 1)[:batch]
        calls = {"torch": torch.inference_mode()(partial(model, x)), "file": partial(run, x)}
        seconds = interleaved_medians(calls, ROUNDS, torch.device("cpu"))
        milliseconds = ", ".join(f"{name} {1000 * value:.1f} ms" for name, value in seconds.items())
        ratio = seconds["torch"] / seconds["file"]
        lines.append(f"batch {batch}, {threads} threads: {milliseconds}, {ratio:.2f} times torch's speed")
    return lines


def _metadata(settings: argparse.Namespace, classifier: Classifier) -> dict:
    data_config = classifier.data_config
    metadata = {
        "model": settings.model,
        "format": settings.format,
        "precision": settings.precision,
        "input": f"images: {classifier.config.decoder.mode}, float32, (batch, channels, height, width), "
        "values (pixel / 255 - mean) / std",
        "exif_transpose": classifier.config.exif_transpose,
        "input_size": list(data_config["input_size"]),
        "mean": list(data_config["mean"]),
        "std": list(data_config["std"]),
        "interpolation": data_config["interpolation"],
        "crop_pct": data_config["crop_pct"],
        "dynamic_batch": settings.dynamic_batch,
        "dynamic_size": settings.dynamic_size,
    }
    if not settings.dense:
        metadata |= {"num_classes": classifier.model.num_classes, "classes": classifier.classes}
    return metadata
