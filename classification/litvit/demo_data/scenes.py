"""Drawn scenes with handwritten digits, and all that is true of them."""

import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

CLASSES = tuple("0123456789")
BACKGROUNDS = ("gradient", "stripes", "noise", "discs")
SPLITS = ("train", "val")

VAL_FRACTION = 0.2
MAX_ANGLE = 15.0
# Luma (0 black, 1 white) of a scene's backgrounds spans at most TONE_SPAN, which leaves 0.3 above or below for strokes.
TONE_SPAN = 0.4
MIN_CONTRAST = 0.25
LUMA = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class SceneObject:
    """One digit in a scene.

    Args:
        label: the digit, 0 to 9.
        box: (left, top, right, bottom) of the mask in pixels; right and bottom are exclusive.
        mask: (H, W) bool, the pixels that the digit's stroke covers.
    """

    label: int
    box: tuple[int, int, int, int]
    mask: np.ndarray


@dataclass(frozen=True)
class Scene:
    """A drawn image and its annotations.

    Args:
        image: (H, W, 3) uint8 RGB.
        objects: its digits; their masks are apart.
        background: (H, W) uint8, index into `BACKGROUNDS` of what lies at each pixel, behind the digits too.
    """

    image: np.ndarray
    objects: list[SceneObject]
    background: np.ndarray


@functools.cache
def source_digits(seed: int) -> dict[str, list[np.ndarray]]:
    """Return the handwritten digits of each split, stratified by class.

    Args:
        seed: shuffles the digits before they are split.

    Returns:
        For "train" and "val": a list, by class, of (n, 8, 8) arrays with values 0 (paper) to 1 (ink).
    """
    data = load_digits()
    splits: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    for label in range(len(CLASSES)):
        digits = data.images[data.target == label] / 16.0
        digits = digits[np.random.default_rng([seed, label]).permutation(len(digits))]
        val_count = round(len(digits) * VAL_FRACTION)
        splits["val"].append(digits[:val_count])
        splits["train"].append(digits[val_count:])
    return splits


def draw_scene(
    rng: np.random.Generator,
    digits: Sequence[tuple[int, np.ndarray]],
    size: tuple[int, int],
    scale: tuple[float, float] = (0.7, 1.0),
) -> Scene:
    """Draw digits on a background of one or two textures.

    Every digit lies whole inside the image, apart from the others, and differs by `MIN_CONTRAST` in luma from the
    background that it covers and touches.

    Args:
        rng: decides everything else: textures, colours, scales, angles, places.
        digits: (label, (8, 8) array with values 0 to 1) of each digit to place.
        size: (height, width) in pixels.
        scale: Smallest and largest side of a digit's 8 x 8 grid, as a fraction of the image's shorter side. A digit
            that finds no room is drawn smaller.

    Raises:
        ValueError: the digits do not fit.
    """
    canvas, background = _draw_background(rng, size)
    occupied = np.zeros(size, dtype=bool)
    objects = []
    for label, digit in digits:
        alpha = _place_digit(rng, digit, scale, occupied)
        mask = alpha > 0.5
        touched = grow(alpha > 0)
        colour = _stroke_colour(rng, canvas[touched] @ LUMA)
        canvas += alpha[..., None] * (colour - canvas)
        occupied |= touched
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        objects.append(SceneObject(label, box, mask))
    image = np.rint(canvas * 255).clip(0, 255).astype(np.uint8)
    return Scene(image, objects, background)


def _draw_background(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return an (H, W, 3) canvas with values 0 to 1 and the (H, W) map of its textures."""
    lowest = rng.uniform(0, 1 - TONE_SPAN)
    first, second = rng.choice(len(BACKGROUNDS), size=2, replace=False)
    canvas = _texture(rng, first, size, lowest)
    background = np.full(size, first, dtype=np.uint8)
    if rng.random() < 0.5:
        beyond = _ramp(rng, size) > rng.uniform(0.3, 0.7)
        canvas[beyond] = _texture(rng, second, size, lowest)[beyond]
        background[beyond] = second
    return canvas, background


def _texture(rng: np.random.Generator, kind: int, size: tuple[int, int], lowest: float) -> np.ndarray:
    """Return (H, W, 3): two colours, of luma `lowest` to `lowest` + TONE_SPAN, mixed in the pattern of `kind`.

    A pattern is as fine in a large image as in one of 64 pixels: a part of the image shows which it is.
    """
    name = BACKGROUNDS[kind]
    height, width = size[0] / 64, size[1] / 64
    if name == "gradient":
        mix = _ramp(rng, size)
    elif name == "stripes":
        mix = 0.5 + 0.5 * np.sin(2 * np.pi * rng.uniform(2, 7) * min(height, width) * _ramp(rng, size))
    elif name == "noise":
        rows, columns = round(rng.integers(4, 17) * height), round(rng.integers(4, 17) * width)
        cells = rng.random((rows, columns), dtype=np.float32)
        mix = np.asarray(Image.fromarray(cells).resize(size[::-1], Image.Resampling.BILINEAR), dtype=np.float64)
    else:
        mix = np.zeros(size)
        y, x = np.ogrid[: size[0], : size[1]]
        for _ in range(round(rng.integers(4, 10) * height * width)):
            centre_y, centre_x = rng.uniform(0, size[0]), rng.uniform(0, size[1])
            radius = 64 * rng.uniform(0.05, 0.25)
            mix[np.hypot(y - centre_y, x - centre_x) < radius] = rng.uniform(0.3, 1)
    lumas = lowest + TONE_SPAN * rng.permutation([rng.uniform(0, 0.25), rng.uniform(0.75, 1)])
    colours = [_colour(rng, luma) for luma in lumas]
    return colours[0] + mix[..., None] * (colours[1] - colours[0])


def _ramp(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Return (H, W) that rises from 0 to 1 across the image in a random direction."""
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.ogrid[: size[0], : size[1]]
    ramp = y * math.sin(angle) + x * math.cos(angle)
    return (ramp - ramp.min()) / (ramp.max() - ramp.min())


def _colour(rng: np.random.Generator, luma: float) -> np.ndarray:
    """Return a random RGB colour of exactly this luma: mixed with black or white until it has it."""
    colour = rng.uniform(0.05, 0.95, 3)
    own = colour @ LUMA
    return colour * (luma / own) if luma < own else colour + (1 - colour) * ((luma - own) / (1 - own))


def _stroke_colour(rng: np.random.Generator, behind: np.ndarray) -> np.ndarray:
    """Return a colour that stands out by MIN_CONTRAST from all of `behind`, the lumas of the background."""
    room_below = max(behind.min() - MIN_CONTRAST, 0.0)
    room_above = max(1 - behind.max() - MIN_CONTRAST, 0.0)
    luma = rng.random() * (room_below + room_above)
    return _colour(rng, luma if luma < room_below else 1 - (room_below + room_above - luma))


def _place_digit(
    rng: np.random.Generator, digit: np.ndarray, scale: tuple[float, float], occupied: np.ndarray
) -> np.ndarray:
    """Return (H, W) with values 0 to 1, how much ink covers each pixel, for a digit apart from what is `occupied`."""
    height, width = occupied.shape
    side = min(height, width) * rng.uniform(*scale)
    for _ in range(100):
        ink = _turn_and_enlarge(rng, digit, side)
        spare_y, spare_x = height - ink.shape[0], width - ink.shape[1]
        if spare_y >= 0 and spare_x >= 0:
            top, left = rng.integers(spare_y + 1), rng.integers(spare_x + 1)
            here = slice(top, top + ink.shape[0]), slice(left, left + ink.shape[1])
            if not (occupied[here] & (ink > 0)).any():
                alpha = np.zeros(occupied.shape)
                alpha[here] = ink
                return alpha
        side = max(side * 0.97, 0.5 * min(height, width) * scale[0])
    raise ValueError(f"no room for another digit of scale {scale} in a scene of {height} x {width} pixels")


def _turn_and_enlarge(rng: np.random.Generator, digit: np.ndarray, side: float) -> np.ndarray:
    """Return the ink of a digit whose 8 x 8 grid has become `side` pixels wide, cropped to where there is any."""
    pad = 2
    angle = math.radians(rng.uniform(-MAX_ANGLE, MAX_ANGLE))
    stretch = rng.uniform(0.85, 1.15)
    patch = math.ceil(1.6 * side)
    step_x = len(digit) / side * math.sqrt(stretch)
    step_y = len(digit) / side / math.sqrt(stretch)
    xx, xy = math.cos(angle) * step_x, math.sin(angle) * step_x
    yx, yy = -math.sin(angle) * step_y, math.cos(angle) * step_y
    centre = len(digit) / 2 + pad
    affine = (xx, xy, centre - (xx + xy) * patch / 2, yx, yy, centre - (yx + yy) * patch / 2)
    source = Image.fromarray(_sharpen(np.pad(digit, pad)).astype(np.float32))
    grey = np.asarray(source.transform((patch, patch), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC))
    # An edge rises over about one source pixel; this makes it rise over about two pixels of the image.
    threshold = rng.uniform(0.4, 0.6)
    ink = np.clip((grey - threshold) * side / len(digit) / 2 + 0.5, 0, 1)
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def grow(mask: np.ndarray) -> np.ndarray:
    """Return the mask with every pixel that touches it."""
    padded = np.pad(mask, 1)
    tall = padded[:-2] | padded[1:-1] | padded[2:]
    return tall[:, :-2] | tall[:, 1:-1] | tall[:, 2:]


def _sharpen(digit: np.ndarray) -> np.ndarray:
    """Deepen a digit's holes and thin places, which at 8 x 8 pixels are grey like the strokes' edges."""
    padded = np.pad(digit, 1)
    tall = padded[:-2] + padded[1:-1] + padded[2:]
    neighbourhood = (tall[:, :-2] + tall[:, 1:-1] + tall[:, 2:]) / 9
    return 2 * digit - neighbourhood


def save_image(path: str | os.PathLike, size: int = 448, seed: int = 10) -> None:
    """Draw a scene with several digits and save it, in the format that the file's suffix names.

    The repository's `classification/visualization/demo.JPEG` is one; in `classification/`:

        python -c "from litvit.demo_data import save_image; save_image('visualization/demo.JPEG')"

    Args:
        path: Path of the image.
        size: its height and width in pixels.
        seed: which scene.
    """
    rng = np.random.default_rng(seed)
    digits = source_digits(seed)["val"]
    labels = rng.choice(len(CLASSES), size=6, replace=False)
    scene = draw_scene(rng, [(int(label), rng.choice(digits[label])) for label in labels], (size, size), (0.2, 0.4))
    Image.fromarray(scene.image).save(path, quality=90)
