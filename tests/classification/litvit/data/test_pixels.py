"""From the pixels of a file to those of the model."""

import io

import numpy as np
import pytest
from PIL import Image

from litvit.data.pixels import Decoder, is_16_bit
from litvit.errors import InputError


def stored(image, kind, **options):
    """An image as it is opened from a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(file)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_16_bits_are_scaled_to_8(kind, in_chans):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    image = stored(Image.fromarray(values), kind)
    assert is_16_bit(image)
    result = np.asarray(Decoder(in_chans)(image))
    expected = np.round(values / 257.0).astype(np.uint8)
    channels = result.reshape(256, 256, -1)
    for channel in range(min(in_chans, 3)):
        assert np.array_equal(channels[..., channel], expected)


def test_big_endian_16_bits_are_scaled_alike():
    values = np.array([[0, 257, 300, 65535]], dtype=">u2")
    image = Image.frombytes("I;16B", (4, 1), values.tobytes())
    assert np.asarray(Decoder(1)(image)).tolist() == [[0, 1, 1, 255]]


@pytest.mark.parametrize(("dtype", "kind"), [(np.int32, "32 bits"), (np.float32, "floating point")])
def test_pixels_of_unknown_range_are_refused(dtype, kind):
    image = stored(Image.fromarray(np.full((4, 4), 200, dtype)), "TIFF")
    with pytest.raises(ValueError, match=f"{kind}, of unknown range: save it with 8 or 16 bits"):
        Decoder()(image)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_8_bits_are_converted_as_pillow_does(mode, in_chans):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).convert(mode)
    image = stored(image, "TIFF" if mode in ("CMYK", "LA") else "PNG")
    decoder = Decoder(in_chans)
    expected = image.convert(decoder.mode)
    assert np.array_equal(Decoder(in_chans)(image), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_photographs_are_turned_upright_if_asked(orientation, kind):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 255  # white at the top left
    turns = {1: [], 2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}  # Pillow's inverse transpositions
    image = Image.fromarray(upright)
    for method in turns[orientation]:
        image = image.transpose(Image.Transpose(method))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"exif": exif, "quality": 95} if kind != "PNG" else {"exif": exif}
    opened = stored(image, kind, **options)
    decoder = Decoder(exif_transpose=True)
    assert decoder.size(opened) == (32, 16)
    turned = np.asarray(decoder(opened), int)
    assert np.abs(turned - upright).mean() < 6
    as_stored = Decoder()(stored(image, kind, **options))
    assert as_stored.size == image.size
    assert np.abs(np.asarray(as_stored, int) - np.asarray(image)).mean() < 6


def test_other_numbers_of_channels_are_refused():
    with pytest.raises(InputError, match="--in-chans 5: images are read with 1"):
        Decoder(5)
