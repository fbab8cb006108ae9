#!/usr/bin/env python3
"""Draw the segmentation over the picture: predict.py IMAGE... --config CONFIG --checkpoint FILE --out DIR.

A legend beside it names the classes that are there, the largest first. A drawing has its picture's name, in DIR.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from litvit import cli
from litvit.errors import InputError


def main(argv: Sequence[str] | None = None) -> None:
    """Predict and draw as the command line says."""
    from litvit.openmmlab.tools import prediction_parser, predictions  # a missing mmengine is one line, too

    parser = prediction_parser(__doc__.splitlines()[0])
    parser.add_argument("--opacity", type=float, default=0.5, help="of the classes' colours, 0 to 1 (default: 0.5)")
    args = parser.parse_args(argv)
    if not 0 <= args.opacity <= 1:
        raise InputError(f"--opacity is {args.opacity}, but must be from 0 to 1")
    for model, file, pixels, result in predictions("mmseg", args):
        labels = result.pred_sem_seg.data[0].long().cpu().numpy()
        meta = model.dataset_meta
        draw(pixels, labels, meta["classes"], meta["palette"], args.opacity).save(file, quality=95)
        print(file)


def draw(
    pixels: np.ndarray, labels: np.ndarray, classes: Sequence[str], palette: Sequence, opacity: float
) -> Image.Image:
    """Put the classes' colours over a picture, and a legend to the right of it.

    Args:
        pixels: (H, W, 3), uint8 RGB.
        labels: (H, W), the class at each pixel.
        classes: their names.
        palette: their colours, RGB from 0 to 255.
        opacity: of the colours.
    """
    colors = np.array(palette, dtype=np.uint8)
    picture = Image.blend(Image.fromarray(pixels), Image.fromarray(colors[labels]), opacity)
    found, counts = np.unique(labels, return_counts=True)
    found = found[np.argsort(-counts)]
    line = max(14, picture.height // 24)
    font = ImageFont.load_default(0.8 * line)
    rows = max(1, picture.height // line)
    column = round(2 * line + max(font.getlength(classes[label]) for label in found))
    width = picture.width + column * -(-len(found) // rows)
    drawing = Image.new("RGB", (width, max(picture.height, line)), "white")
    drawing.paste(picture)
    legend = ImageDraw.Draw(drawing)
    for i, label in enumerate(found):
        x, y = picture.width + column * (i // rows) + line // 4, line * (i % rows)
        legend.rectangle((x, y + 2, x + line, y + line - 2), fill=tuple(colors[label].tolist()))
        legend.text((x + 1.25 * line, y + line / 2), classes[label], fill="black", font=font, anchor="lm")
    return drawing


if __name__ == "__main__":
    cli.run(main)
