#!/usr/bin/env python3
"""Draw the segmentation over the image: predict.py IMAGE... --config CONFIG --checkpoint FILE --out DIR.

A legend to the right names the classes that occur, the largest first. A drawing is saved in DIR under the name of its
image.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from litvit import cli
from litvit.errors import InputError


def main(argv: Sequence[str] | None = None) -> int:
    """Predict and draw the images of a command line."""
    # Not at the top: cli.run reports a missing mmengine.
    from litvit.openmmlab.tools import draw_predictions, prediction_parser

    parser = prediction_parser(__doc__.splitlines()[0])
    parser.add_argument("--opacity", type=float, default=0.5, help="opacity of the colours, 0 to 1 (default: 0.5)")
    args = parser.parse_args(argv)
    if not 0 <= args.opacity <= 1:
        raise InputError(f"--opacity is {args.opacity}, but must be from 0 to 1")

    def drawer(model: nn.Module) -> Callable[[np.ndarray, Any], Image.Image]:
        names, colors = model.dataset_meta["classes"], model.dataset_meta["palette"]
        return lambda pixels, result: draw(
            pixels, result.pred_sem_seg.data[0].long().cpu().numpy(), names, colors, args.opacity
        )

    return draw_predictions("mmseg", args, drawer)


def draw(
    pixels: np.ndarray, labels: np.ndarray, classes: Sequence[str], palette: Sequence, opacity: float
) -> Image.Image:
    """Draw the classes' colours over an image, and a legend to the right of it.

    Args:
        pixels: Image (H, W, 3), uint8 RGB.
        labels: Class of each pixel (H, W).
        classes: Names of the classes.
        palette: Colours of the classes, RGB from 0 to 255.
        opacity: Opacity of the colours, 0 to 1.

    Returns:
        Drawing, wider than the image by its legend.
    """
    colors = np.array(palette, dtype=np.uint8)
    image = Image.blend(Image.fromarray(pixels), Image.fromarray(colors[labels]), opacity)
    found, counts = np.unique(labels, return_counts=True)
    found = found[np.argsort(-counts)]
    line = max(14, image.height // 24)
    font = ImageFont.load_default(0.8 * line)
    rows = max(1, image.height // line)
    column = round(2 * line + max(font.getlength(classes[label]) for label in found))
    width = image.width + column * -(-len(found) // rows)
    drawing = Image.new("RGB", (width, max(image.height, line)), "white")
    drawing.paste(image)
    legend = ImageDraw.Draw(drawing)
    for i, label in enumerate(found):
        x, y = image.width + column * (i // rows) + line // 4, line * (i % rows)
        legend.rectangle((x, y + 2, x + line, y + line - 2), fill=tuple(colors[label].tolist()))
        legend.text((x + 1.25 * line, y + line / 2), classes[label], fill="black", font=font, anchor="lm")
    return drawing


if __name__ == "__main__":
    cli.run(main)
