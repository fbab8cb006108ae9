"""Plot where LIT's deformable token merging looks: the 64 image locations behind every token of the last stage.

python visualize_offset.py --model lit_ti --resume lit_ti.pth --vis_image visualization/demo.JPEG
"""

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps
from timm.models import create_model
from torch import Tensor, nn
from torchvision.transforms.functional import normalize, to_tensor

from litvit import cli
from litvit.analysis.offsets import merging_modules, predict_offsets, sampling_locations
from litvit.checkpoints import load_weights
from litvit.errors import InputError
from litvit.training.model import choose_device
from litvit.training.recipe import key_value
from litvit.training.state import read_description

FOLDER = Path(__file__).parent / "visualization"
STRIDE = 32
# Images are enlarged, at least to this many pixels, so that the dots of a token lie apart.
PLOT_SIZE, OVERVIEW_SIZE = 448, 896
GREEN, RED, ORANGE = (0, 230, 0), (235, 20, 20), (255, 150, 0)


def build_model(name: str, checkpoint: str, img_size: Sequence[int] | None, model_kwargs: dict) -> nn.Module:
    """Build a LIT without a classifier and load a checkpoint.

    Args:
        name: of the model.
        checkpoint: whatever validate.py takes, with any number of classes.
        img_size: (height, width) of the image to plot, None for the model's own.
        model_kwargs: further arguments of the model.

    Raises:
        InputError: an unknown model, one without merging modules, or a checkpoint that does not fit.
    """
    kwargs = {**model_kwargs, "num_classes": 0}
    try:
        model = create_model(cli.model_name(name), **kwargs)
        merging_modules(model)
        # Position tables are best resized once, from the checkpoint's size to the image's, where a model can have it.
        if img_size is not None and not any(side % STRIDE for side in img_size):
            model = create_model(name, **kwargs, img_size=tuple(img_size))
    except TypeError as error:
        raise InputError(f"{name} cannot be built with {model_kwargs}: {error}") from None
    load_weights(model, checkpoint)
    return model


def open_image(path: str) -> Image.Image:
    """Open an image, upright and in RGB.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    if not Path(path).is_file():
        raise InputError(f"no image at '{path}'")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read the image '{path}': {error}") from None


def save_plots(image: Image.Image, locations: Tensor, folder: Path) -> int:
    """Save a plot a token, `row00_column00.png` and so on, and `overview.png`, in place of those of an earlier run.

    Args:
        image: as the model saw it, (H, W) pixels.
        locations: (h, w, 64, 2), of `sampling_locations`.
        folder: made if need be.

    Returns:
        The number of tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("row[0-9]*_column[0-9]*.png"):
        old.unlink()
    zoom, canvas = _enlarge(image, PLOT_SIZE)
    overview_zoom, overview = _enlarge(image, OVERVIEW_SIZE)
    rows, columns = locations.shape[:2]
    for row in range(rows):
        for column in range(columns):
            points = locations[row, column].tolist()
            plot = canvas.copy()
            _draw_token(plot, row, column, points, zoom, RED)
            plot.save(folder / f"row{row:02d}_column{column:02d}.png", compress_level=1)
            # Two colours in turn tell neighbours apart.
            _draw_token(overview, row, column, points, overview_zoom, (RED, ORANGE)[(row + column) % 2])
    overview.save(folder / "overview.png", compress_level=1)
    return rows * columns


def _enlarge(image: Image.Image, size: int) -> tuple[int, Image.Image]:
    zoom = max(2, math.ceil(size / min(image.size)))
    return zoom, image.resize((image.width * zoom, image.height * zoom), Image.Resampling.BICUBIC)


def _draw_token(
    canvas: Image.Image, row: int, column: int, points: list[list[float]], zoom: int, colour: tuple[int, int, int]
) -> None:
    """Draw a token's rectangle of the regular grid, and its locations as dots."""
    draw = ImageDraw.Draw(canvas)
    side = STRIDE * zoom
    left, top = column * side, row * side
    draw.rectangle((left, top, left + side - 1, top + side - 1), outline=GREEN, width=2)
    dot, radius = _dot(zoom)
    for y, x in points:
        # Pixel (0, 0) is centred at (zoom / 2, zoom / 2) of the canvas.
        centre_x, centre_y = (x + 0.5) * zoom, (y + 0.5) * zoom
        draw.bitmap((round(centre_x - radius), round(centre_y - radius)), dot, fill=colour)


def _dot(zoom: int) -> tuple[Image.Image, float]:
    """Return a smooth disc as a mask, and half its side."""
    side, finer = max(5, round(1.6 * zoom)), 8
    disc = Image.new("L", (side * finer, side * finer))
    ImageDraw.Draw(disc).ellipse((0, 0, side * finer - 1, side * finer - 1), fill=255)
    return disc.resize((side, side), Image.Resampling.BOX), side / 2


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.ArgumentParser(
        prog="visualize_offset.py",
        description="Plot the image locations behind every token of a LIT's last stage: an image a token (the green "
        "square of a regular grid, the 64 locations as red dots) and an overview of all tokens.",
    )
    add = parser.add_argument
    add("--model", metavar="NAME", help="lit_ti, lit_s, lit_m, lit_b (weights of train.py know theirs)")
    add("--resume", required=True, metavar="FILE", help="checkpoint, any that validate.py takes")
    add(
        "--vis_image",
        "--vis-image",
        default=str(FOLDER / "demo.JPEG"),
        metavar="FILE",
        help="image (the project's own)",
    )
    add(
        "--img-size", type=int, nargs="+", metavar="N", help="pixels a side, or height and width (the model's own: 224)"
    )
    add("--output", type=Path, default=FOLDER, metavar="DIR", help="plots go to DIR/<image name> (visualization)")
    add("--model-kwargs", nargs="*", type=key_value, default=[], metavar="K=V", help="further arguments of the model")
    add("--device", metavar="NAME", help="cuda, cuda:1, cpu ... (cuda where there is one)")
    add("--mean", type=float, nargs=3, metavar="X", help="normalisation (as trained)")
    add("--std", type=float, nargs=3, metavar="X", help="normalisation (as trained)")
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
        if min(args.img_size) < STRIDE:
            raise InputError(f"--img-size is {min(args.img_size)}, but must be at least {STRIDE}")
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
