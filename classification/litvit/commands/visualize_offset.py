"""Plot where LIT's deformable token merging looks: the 64 image locations that each token of the last stage reads.

litvit visualize-offset --model lit_ti --resume lit_ti.pth --vis_image visualization/demo.JPEG
litvit visualize-offset --checkpoint lit_ti.in1k --statistics /imagenet
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from timm.layers import to_2tuple
from timm.models import create_model
from torch import nn
from torchvision.transforms.functional import normalize, to_tensor

from litvit import cli
from litvit.checkpoints import load_weights
from litvit.data.dataset import unreadable
from litvit.data.loader import sample_batches
from litvit.data.pixels import Decoder
from litvit.data.readers import open_sample
from litvit.dtm.offsets import (
    OffsetLengths,
    OffsetStatistics,
    merging_modules,
    predict_offsets,
    sampling_locations,
    save_plots,
)
from litvit.errors import InputError, is_from_user_code, printable
from litvit.models import Backbone
from litvit.processes import EXIT_INPUT_ERROR, choose_device
from litvit.settings import add_flags, take
from litvit.training.flags import CHECKPOINT_HELP, TRACEBACK_HELP, check_range, parse_with_checkpoint
from litvit.training.model import ModelConfig, data_settings, named_weights
from litvit.training.report import format_table, write_csv, writing_to

FOLDER = Path("visualization")
STATISTICS, TABLE, PLOT = "offsets", "offsets.csv", "offsets.png"


def build_model(name: str, checkpoint: str | None, img_size: tuple[int, int] | None, model_kwargs: dict) -> nn.Module:
    """Build a LIT without a classifier and load a checkpoint.

    Args:
        name: Name of the model.
        checkpoint: File or link of weights, with any number of classes. None for the published weights.
        img_size: Height and width of the image to plot, None for the model's own.
        model_kwargs: Further arguments of the model.

    Raises:
        InputError: The model is unknown or has no merging modules, or the checkpoint does not fit.
    """
    kwargs = {**model_kwargs, "num_classes": 0}
    with named_weights(checkpoint, name):
        try:
            model = create_model(name, **kwargs)
            merging_modules(model)
            # Resize position tables once, from the checkpoint's size to the image's, if the model can have that size.
            if img_size is not None and not any(side % Backbone.total_stride for side in img_size):
                kwargs["img_size"] = img_size
            model = create_model(name, pretrained=checkpoint is None, **kwargs)
        except TypeError as error:
            if is_from_user_code(error):
                raise
            raise InputError(f"{name} cannot be built with {model_kwargs}: {error}") from error
        if checkpoint is not None:
            load_weights(model, checkpoint)
    return model


def open_image(path: str, decoder: Decoder | None = None) -> Image.Image:
    """Open an image as training does.

    Args:
        path: Image file.
        decoder: How it becomes an image; None for RGB as stored.

    Raises:
        InputError: The file is missing, or cannot be read.
    """
    if not Path(path).is_file():
        raise InputError(f"no image at '{path}': --vis_image names one")
    with unreadable(lambda: f"'{printable(path)}'"):
        return (decoder or Decoder())(Image.open(path))


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, ModelConfig]:
    parser = cli.ArgumentParser(
        description="Plot the image locations that each token of a LIT's last stage reads: one image per token (the "
        "green square of a regular grid, the 64 locations as red dots) and an overview of all tokens. With "
        "--statistics, measure how far each merging module looks, over many images.",
    )
    add = parser.add_argument
    add("--resume", "--checkpoint", dest="checkpoint", metavar="WEIGHTS", help=CHECKPOINT_HELP)
    image = {"default": str(FOLDER / "demo.JPEG"), "metavar": "FILE", "help": "image (visualization/demo.JPEG)"}
    add("--vis_image", "--vis-image", **image)
    add(
        "--statistics",
        nargs="+",
        metavar="PATH",
        help="data set, whose validation images are taken, or images and folders: measure the lengths of the offsets "
        "over them, instead of plotting one image",
    )
    add("-n", "--num-images", type=int, default=100, metavar="N", help="images to measure, evenly spread (100)")
    output = {"type": Path, "default": FOLDER, "metavar": "DIR"}
    add("--output", **output, help=f"DIR/<image name> for plots, DIR/{STATISTICS} for statistics (visualization)")
    add("--device", metavar="NAME", help="device: cuda, cuda:1, cpu, ... (cuda if available)")
    add("--traceback", action="store_true", help=TRACEBACK_HELP)
    names = ("model", "pretrained", "imports", "img_size", "model_kwargs", "in_chans", "exif_transpose", "mean", "std")
    add_flags(parser, ModelConfig, only=(*names, "crop_pct", "interpolation"))
    args = parse_with_checkpoint(parser, argv)
    check_range(args, ("num_images",), 1, None)
    config = take(ModelConfig, vars(args))
    least = min(to_2tuple(config.img_size or Backbone.total_stride))
    if least < Backbone.total_stride:
        raise InputError(f"--img-size is {least}, but must be at least {Backbone.total_stride}")
    return args, config


def main(argv: Sequence[str] | None = None) -> int:
    """Plot or measure offsets as the command line says. Returns 0, or 2 if some images could not be read."""
    args, config = _parse(argv)
    return _measure(args, config) if args.statistics else _plot(args, config)


def _prepare(args: argparse.Namespace, config: ModelConfig) -> tuple[nn.Module, dict, torch.device]:
    """Return the model, the settings of its images, and its device."""
    size = to_2tuple(config.img_size) if config.img_size else None
    model = build_model(config.model, args.checkpoint, size, {"in_chans": config.in_chans, **config.model_kwargs})
    device = choose_device(args.device)
    return model.to(device), data_settings(config, model), device


def _plot(args: argparse.Namespace, config: ModelConfig) -> int:
    start = time.perf_counter()
    image = open_image(args.vis_image, config.decoder)
    model, data_config, device = _prepare(args, config)
    height, width = data_config["input_size"][1:]
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = normalize(to_tensor(image), data_config["mean"], data_config["std"]).unsqueeze(0).to(device)
    locations = sampling_locations(predict_offsets(model, pixels))[0].cpu()

    folder = args.output / Path(args.vis_image).stem
    with writing_to(folder):
        tokens = save_plots(image.convert("RGB"), locations, folder)
    print(f"{tokens} plots and overview.png in {folder} ({time.perf_counter() - start:.1f} s)")
    return 0


def _measure(args: argparse.Namespace, config: ModelConfig) -> int:
    start = time.perf_counter()
    images, problems = open_sample(args.statistics, args.num_images, config.decoder)
    model, data_config, device = _prepare(args, config)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    folder = args.output / STATISTICS
    with writing_to(folder):  # before the work that it is for
        pass
    statistics = OffsetStatistics()
    for batch in sample_batches(images, data_config, device, batch_size=8, workers=None, title="offsets"):
        statistics.add(predict_offsets(model, batch))
    results = statistics.results()
    rows = [
        {
            "merging": f"stage {number} to {number + 1}",
            "token_px": found.stride,
            "mean_px": round(found.mean, 3),
            "p95_px": round(found.p95, 3),
            "outside_percent": round(100 * found.outside, 3),
        }
        for number, found in enumerate(results, 1)
    ]
    print(format_table(rows, tuple(rows[0]), digits=3))
    with writing_to(folder):
        write_csv(folder / TABLE, tuple(rows[0]), rows)
        _plot_lengths(results, [row["merging"] for row in rows]).savefig(folder / PLOT)
    print(f"{statistics.images} images, {TABLE} and {PLOT} in {folder} ({time.perf_counter() - start:.1f} s)")
    return EXIT_INPUT_ERROR if problems or statistics.images < len(images) else 0


def _plot_lengths(results: Sequence[OffsetLengths], names: Sequence[str]) -> Figure:
    """Plot the share of offsets that are no longer than a length, a line per merging module."""
    figure = Figure(figsize=(7, 4.5), dpi=100, layout="constrained")
    axes = figure.add_subplot(xlabel="length of the offset (pixels of the image)", ylabel="offsets no longer (%)")
    for name, found in zip(names, results, strict=True):
        shown = (found.shares > 0.001) & (found.shares.roll(1) < 0.999)
        axes.plot(found.lengths[shown], 100 * found.shares[shown], label=name)
    axes.set_xscale("log")
    axes.legend()
    return figure
