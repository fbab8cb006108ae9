"""Plot where LIT's deformable token merging looks: the 64 image locations that each token of the last stage reads.

python visualize_offset.py --model lit_ti --resume lit_ti.pth --vis_image visualization/demo.JPEG
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps
from timm.models import create_model
from torch import nn
from torchvision.transforms.functional import normalize, to_tensor

from litvit import cli
from litvit.checkpoints import load_weights
from litvit.dtm.offsets import merging_modules, predict_offsets, sampling_locations, save_plots
from litvit.errors import InputError
from litvit.models import Backbone
from litvit.training.model import choose_device
from litvit.training.recipe import key_value
from litvit.training.state import read_description

FOLDER = Path(__file__).parent / "visualization"


def build_model(name: str, checkpoint: str, img_size: Sequence[int] | None, model_kwargs: dict) -> nn.Module:
    """Build a LIT without a classifier and load a checkpoint.

    Args:
        name: Name of the model.
        checkpoint: Checkpoint file, any that validate.py takes, with any number of classes.
        img_size: Height and width of the image to plot, None for the model's own.
        model_kwargs: Further arguments of the model.

    Raises:
        InputError: The model is unknown or has no merging modules, or the checkpoint does not fit.
    """
    kwargs = {**model_kwargs, "num_classes": 0}
    try:
        model = create_model(cli.model_name(name), **kwargs)
        merging_modules(model)
        # Resize position tables once, from the checkpoint's size to the image's, if the model can have that size.
        if img_size is not None and not any(side % model.total_stride for side in img_size):
            model = create_model(name, **kwargs, img_size=tuple(img_size))
    except TypeError as error:
        raise InputError(f"{name} cannot be built with {model_kwargs}: {error}") from None
    load_weights(model, checkpoint)
    return model


def open_image(path: str) -> Image.Image:
    """Open an image, upright and in RGB.

    Raises:
        InputError: The file is missing, or cannot be read.
    """
    if not Path(path).is_file():
        raise InputError(f"no image at '{path}'")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read the image '{path}': {error}") from None


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.ArgumentParser(
        prog="visualize_offset.py",
        description="Plot the image locations that each token of a LIT's last stage reads: one image per token (the "
        "green square of a regular grid, the 64 locations as red dots) and an overview of all tokens.",
    )
    add = parser.add_argument
    add("--model", metavar="NAME", help="lit_ti, lit_s, lit_m or lit_b (the model that the checkpoint names)")
    add("--resume", required=True, metavar="FILE", help="checkpoint, any that validate.py takes")
    add(
        "--vis_image",
        "--vis-image",
        default=str(FOLDER / "demo.JPEG"),
        metavar="FILE",
        help="image (demo.JPEG)",
    )
    add(
        "--img-size",
        type=int,
        nargs="+",
        metavar="N",
        help="pixels per side, or height and width (the model's own: 224)",
    )
    add(
        "--output",
        type=Path,
        default=FOLDER,
        metavar="DIR",
        help="folder of the plots, DIR/<image name> (visualization)",
    )
    add("--model-kwargs", nargs="*", type=key_value, default=[], metavar="K=V", help="further arguments of the model")
    add("--device", metavar="NAME", help="device: cuda, cuda:1, cpu, ... (cuda if there is one)")
    add("--mean", type=float, nargs=3, metavar="X", help="mean that pixels are normalised by (as trained)")
    add("--std", type=float, nargs=3, metavar="X", help="standard deviation that pixels are normalised by (as trained)")
    description = read_description(parser.parse_args(argv).resume)
    parser.set_defaults(
        model=description.get("model"),
        img_size=[description["img_size"]] if "img_size" in description else None,
        model_kwargs=list(description.get("model_kwargs", {}).items()),
        mean=description.get("mean"),
        std=description.get("std"),
    )
    args = parser.parse_args(argv)
    if args.model is None:
        raise InputError("which model? --model NAME")
    if args.img_size is not None:
        if len(args.img_size) > 2:
            raise InputError(f"--img-size takes one number or two, height and width, got {len(args.img_size)}")
        if min(args.img_size) < Backbone.total_stride:
            raise InputError(f"--img-size is {min(args.img_size)}, but must be at least {Backbone.total_stride}")
        args.img_size = (args.img_size[0], args.img_size[-1])
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Plot offsets (`python visualize_offset.py --help`)."""
    args = _parse(argv)
    start = time.perf_counter()
    image = open_image(args.vis_image)
    model = build_model(args.model, args.resume, args.img_size, dict(args.model_kwargs))
    device = choose_device(args.device)
    model.to(device)
    height, width = args.img_size or model.img_size
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    cfg = model.pretrained_cfg
    pixels = normalize(to_tensor(image), args.mean or cfg["mean"], args.std or cfg["std"]).unsqueeze(0).to(device)
    locations = sampling_locations(predict_offsets(model, pixels))[0].cpu()

    folder = args.output / Path(args.vis_image).stem
    try:
        tokens = save_plots(image, locations, folder)
    except OSError as error:
        raise InputError(f"cannot write plots to '{folder}': {error.strerror or error}") from None
    print(f"{tokens} plots and overview.png in {folder} ({time.perf_counter() - start:.1f} s)")


if __name__ == "__main__":
    cli.run(main)
