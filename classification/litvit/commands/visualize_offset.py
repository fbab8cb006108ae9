"""Plot where LIT's deformable token merging looks: the 64 image locations that each token of the last stage reads.

litvit visualize-offset --model lit_ti --resume lit_ti.pth --vis_image visualization/demo.JPEG
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from timm.layers import to_2tuple
from timm.models import create_model
from torch import nn
from torchvision.transforms.functional import normalize, to_tensor

from litvit import cli
from litvit.checkpoints import load_weights
from litvit.data.dataset import unreadable
from litvit.data.pixels import Decoder
from litvit.dtm.offsets import merging_modules, predict_offsets, sampling_locations, save_plots
from litvit.errors import InputError, is_from_user_code, printable
from litvit.models import Backbone
from litvit.processes import choose_device
from litvit.settings import add_flags, take
from litvit.training.flags import CHECKPOINT_HELP, TRACEBACK_HELP, parse_with_checkpoint
from litvit.training.model import ModelConfig, data_settings, named_weights

FOLDER = Path("visualization")


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
            if img_size is not None and not any(side % model.total_stride for side in img_size):
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
        "green square of a regular grid, the 64 locations as red dots) and an overview of all tokens.",
    )
    add = parser.add_argument
    add("--resume", "--checkpoint", dest="checkpoint", metavar="WEIGHTS", help=CHECKPOINT_HELP)
    image = {"default": str(FOLDER / "demo.JPEG"), "metavar": "FILE", "help": "image (visualization/demo.JPEG)"}
    add("--vis_image", "--vis-image", **image)
    add("--output", type=Path, default=FOLDER, metavar="DIR", help="plots go to DIR/<image name> (visualization)")
    add("--device", metavar="NAME", help="device: cuda, cuda:1, cpu, ... (cuda if available)")
    add("--traceback", action="store_true", help=TRACEBACK_HELP)
    names = ("model", "pretrained", "imports", "img_size", "model_kwargs", "in_chans", "exif_transpose", "mean", "std")
    add_flags(parser, ModelConfig, only=names)
    args = parse_with_checkpoint(parser, argv)
    config = take(ModelConfig, vars(args))
    least = min(to_2tuple(config.img_size or Backbone.total_stride))
    if least < Backbone.total_stride:
        raise InputError(f"--img-size is {least}, but must be at least {Backbone.total_stride}")
    return args, config


def main(argv: Sequence[str] | None = None) -> int:
    """Plot offsets as the command line says. Returns 0."""
    args, config = _parse(argv)
    start = time.perf_counter()
    image = open_image(args.vis_image, config.decoder)
    size = to_2tuple(config.img_size) if config.img_size else None
    model = build_model(config.model, args.checkpoint, size, {"in_chans": config.in_chans, **config.model_kwargs})
    device = choose_device(args.device)
    model.to(device)
    height, width = size or model.img_size
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    data_config = data_settings(config, model)
    pixels = normalize(to_tensor(image), data_config["mean"], data_config["std"]).unsqueeze(0).to(device)
    locations = sampling_locations(predict_offsets(model, pixels))[0].cpu()

    folder = args.output / Path(args.vis_image).stem
    try:
        tokens = save_plots(image.convert("RGB"), locations, folder)
    except OSError as error:
        raise InputError(f"cannot write plots to '{folder}': {error.strerror or error}") from error
    print(f"{tokens} plots and overview.png in {folder} ({time.perf_counter() - start:.1f} s)")
    return 0
