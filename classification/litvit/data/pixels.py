"""From the pixels of a file to those of the model: 8 bits per channel, the model's channels, upright or not."""

from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, ImageOps

from litvit.errors import InputError

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's, by number of channels
_SWAPPED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width


def is_16_bit(image: Image.Image) -> bool:
    """Whether an image has one channel of 16 bits, whose values are 0 to 65535."""
    # Pillow holds a PGM file of 16 bits, and before version 11.3 a PNG file, in 32 bits.
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of a file as it is opened: 1 for upright, to 8.

    It is 1 for TIFF files, which Pillow turns itself, and for EXIF data that is damaged, whatever Pillow raises.
    """
    if image.format == "TIFF":
        return 1
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1
    return found if found in range(1, 9) else 1


@dataclass(frozen=True)
class Decoder:
    """How the pixels of a file become an image.

    Attributes:
        in_chans: Number of channels: 1 for grey, 3 for RGB, 4 for RGBA.
        exif_transpose: Whether photographs are turned upright by their EXIF orientation. Else they are as stored, but
            for TIFF files, which Pillow always turns.

    Raises:
        InputError: another number of channels.
    """

    in_chans: int = 3
    exif_transpose: bool = False

    def __post_init__(self) -> None:
        if self.in_chans not in MODES:
            raise InputError(f"--in-chans {self.in_chans}: images are read with 1 (grey), 3 (RGB) or 4 (RGBA) channels")

    @property
    def mode(self) -> str:
        """Pillow's name of the channels."""
        return MODES[self.in_chans]

    def size(self, image: Image.Image) -> tuple[int, int]:
        """Return the width and height that an opened file will have."""
        if self.exif_transpose and orientation(image) in _SWAPPED:
            return image.size[::-1]
        return image.size

    def __call__(self, image: Image.Image) -> Image.Image:
        """Decode an opened file.

        A value v of 16 bits becomes v / 257, rounded. Of an animation the first picture is taken. Transparency is
        dropped, unless there are four channels.

        Raises:
            ValueError: 32 bits or floating point, whose range is unknown.
            Exception: whatever Pillow raises for a broken file.
        """
        image.load()
        if self.exif_transpose and orientation(image) != 1:
            ImageOps.exif_transpose(image, in_place=True)
        if is_16_bit(image):
            values = np.asarray(image).astype(np.int32).clip(0, 65535)
            image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
        elif image.mode in ("I", "F"):
            kind = "32 bits" if image.mode == "I" else "floating point"
            raise ValueError(f"its pixels are {kind}, of unknown range: save it with 8 or 16 bits per channel")
        return image if image.mode == self.mode else image.convert(self.mode)
