"""Contact sheets: many images on one, each with lines of text below it."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from litvit.data.pixels import Decoder

SIDE, MARGIN, LINE = 160, 8, 16  # pixels: of an image, around it, of a line of text
COLUMNS, PER_SHEET = 8, 64
BLACK, GREY, GREEN, RED = (0, 0, 0), (110, 110, 110), (0, 120, 0), (200, 0, 0)
Line = tuple[str, tuple[int, int, int]]  # text and its colour


def thumbnail(path: str | Path, decoder: Decoder) -> Image.Image:
    """Read an image for a sheet, no larger than SIDE, or enlarged by a whole factor if it is tiny.

    Args:
        path: Image file.
        decoder: How it becomes an image.
    """
    with Image.open(path) as opened:
        return shrink(decoder(opened))


def shrink(image: Image.Image) -> Image.Image:
    """Return an image as a sheet shows it, see `thumbnail`."""
    image = image.convert("RGB")
    factor = SIDE // max(image.size)
    if factor > 1:
        return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
    width, height = (max(round(side * SIDE / max(image.size)), 1) for side in image.size)
    return image.resize((width, height))


def contact_sheet(cells: Sequence[tuple[Image.Image, Sequence[Line]]], columns: int = COLUMNS) -> Image.Image:
    """Draw a sheet.

    Args:
        cells: Images of `thumbnail`, each with its lines of text. A line that is too long is cut.
        columns: Number of images per row.
    """
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), 12)
    columns = min(columns, len(cells))
    width, height = SIDE + MARGIN, SIDE + LINE * max(len(lines) for _, lines in cells) + 2 * MARGIN
    sheet = Image.new("RGB", (MARGIN + columns * width, MARGIN + -(-len(cells) // columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (image, lines) in enumerate(cells):
        left, top = MARGIN + number % columns * width, MARGIN + number // columns * height
        sheet.paste(image, (left + (SIDE - image.width) // 2, top + (SIDE - image.height) // 2))
        for row, (text, colour) in enumerate(lines):
            draw.text((left, top + SIDE + 2 + LINE * row), _cut(text, font), fill=colour, font=font)
    return sheet


def _cut(text: str, font: ImageFont.FreeTypeFont) -> str:
    text = "".join(c if c.isprintable() else "?" for c in text)
    if font.getlength(text) <= SIDE:
        return text
    while text and font.getlength(f"{text}...") > SIDE:
        text = text[:-1]
    return f"{text}..."
