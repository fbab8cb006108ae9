"""Order of samples, random numbers, and images that cannot be read."""

import io
import random
import struct
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin, features
from sklearn.datasets import load_sample_image
from timm.data import create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation

from litvit.data.augment import AugmentConfig, JpegDraftCrop, TrainTransform
from litvit.data.dataset import EvaluationImages
from litvit.data.pixels import Decoder
from litvit.data.random_streams import Stream, random_stream
from litvit.data.readers import DataConfig, open_images
from litvit.data.sampler import EpochSampler, SampleKey
from litvit.errors import InputError


def updates(num_images, batch_size, world_size, accum_steps=1, epoch=0, **kwargs):
    """Per update, the samples of all processes."""
    ranks = []
    for rank in range(world_size):
        batches = EpochSampler(
            num_images, batch_size, rank=rank, world_size=world_size, accum_steps=accum_steps, **kwargs
        )
        batches.set_epoch(epoch)
        ranks.append(list(batches))
        assert len(ranks[-1]) == len(batches)
        assert all(len(batch) == batch_size for batch in ranks[-1])
    steps = range(0, len(ranks[0]), accum_steps)
    return [{draw for rank in ranks for batch in rank[step : step + accum_steps] for draw in batch} for step in steps]


@pytest.mark.parametrize("repeats", [1, 3])
def test_updates_depend_on_the_total_batch_alone(repeats):
    alone = updates(1000, 24, 1, repeats=repeats)
    assert updates(1000, 12, 2, repeats=repeats) == alone
    assert updates(1000, 4, 3, accum_steps=2, repeats=repeats) == alone
    assert updates(1000, 24, 1, repeats=repeats, epoch=1) != alone
    assert updates(1000, 24, 1, repeats=repeats, seed=1) != alone


def test_an_epoch_sees_every_image_once():
    places = [draw for update in updates(120, 8, 3) for draw in update]
    assert sorted(draw.index for draw in places) == list(range(120))


def test_repeated_augmentation_spreads_copies_over_processes():
    repeats, world_size = 3, 3
    ranks = [list(EpochSampler(1000, 16, rank=r, world_size=world_size, repeats=repeats)) for r in range(world_size)]
    for batches in zip(*ranks, strict=True):
        counts = Counter(draw.index for batch in batches for draw in batch)
        assert set(counts.values()) == {repeats}
        assert all(len({draw.index for draw in batch}) == len(batch) for batch in batches)
    assert len(ranks[0]) * 16 * world_size == 1000 // 256 * 256  # as many samples an epoch as the published sampler


def test_a_total_batch_larger_than_the_data_is_refused():
    with pytest.raises(InputError, match="do not fill one total batch of 200"):
        EpochSampler(100, 50, world_size=2, accum_steps=2)


def test_random_stream_leaves_the_generators_as_they_were():
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    with random_stream(Stream.SAMPLE, 1, 2):
        torch.rand(3)
        np.random.rand(3)
    assert (torch.rand(1), np.random.rand()) == expected


def seeded(seed, function, *args):
    random.seed(seed)
    return function(*args)


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_a_large_photo_is_decoded_smaller_for_the_same_crop(tmp_path, name):
    file = tmp_path / name
    Image.fromarray(load_sample_image(name)[:424]).save(file, quality=92)
    whole, size = Image.open(file).convert("RGB"), (48, 48)
    timms = RandomResizedCropAndInterpolation(size, interpolation="bicubic")
    ours = JpegDraftCrop(size, interpolation="bicubic")
    reductions, changed, bilinear = Counter(), 0.0, 0.0
    for seed in range(40):
        image = Image.open(file)
        top, left, height, width = ours.draft(image, seeded(seed, ours.draw, image.size))
        expected = seeded(seed, timms.get_params, whole, timms.scale, timms.ratio)
        reduction = whole.width // image.width
        reductions[reduction] += 1
        if reduction == 1:
            assert (top, left, height, width) == expected
            continue
        assert min(expected[2:]) / reduction >= 2 * 48
        assert np.abs(np.multiply((top, left, height, width), reduction) - expected).max() <= reduction
        box = left, top, left + width, top + height
        crop = image.resize(size, Image.Resampling.BICUBIC, box)
        box = [reduction * edge for edge in box]
        expected = np.asarray(whole.resize(size, Image.Resampling.BICUBIC, box), float)
        changed += np.abs(crop - expected).mean()
        bilinear += np.abs(whole.resize(size, Image.Resampling.BILINEAR, box) - expected).mean()
    assert reductions.keys() == {1, 2, 4}
    assert changed < 0.8 * bilinear


@pytest.mark.parametrize("size", [(2001, 1337), (1000, 4003), (64, 64), (517, 3001)])
def test_a_drafted_crop_lies_in_the_picture(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "picture.jpg")
    crop = JpegDraftCrop(64)
    for seed in range(50):
        random.seed(seed)
        file = Image.open(tmp_path / "picture.jpg")
        top, left, height, width = crop.draft(file, crop.draw(file.size))
        assert min(top, left) >= 0
        assert min(height, width) > 0
        assert top + height <= file.height
        assert left + width <= file.width


RAISED = [
    RuntimeError,
    NotImplementedError,
    MemoryError,
    struct.error,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OSError,
]


@pytest.mark.parametrize("when", ["open", "decode"])
@pytest.mark.parametrize("raised", RAISED)
def test_whatever_a_decoder_raises_is_an_unreadable_image(digits_copy, monkeypatch, raised, when):
    """Real decoders raise all of these; those of AVIF and JPEG 2000 in C, as `int.from_bytes` does here."""
    picture = digits_copy / "train" / "3" / "00000.png"
    images = open_images(DataConfig(str(digits_copy)), "train")
    images.transform = lambda image: image.size

    def fail(*args, **kwargs):
        raise raised("of the decoder")

    index = images.filenames().index(str(picture))
    fail.__code__ = fail.__code__.replace(co_filename=PngImagePlugin.__file__)  # as if Pillow had raised it
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "_open" if when == "open" else "load_prepare", fail)
    with pytest.raises(InputError, match=f"cannot read the image {picture} .*: repair or replace it"):
        images[index]


Image.init()
# Those that the installed Pillow can write: the others are libraries of its build.
WRITTEN = [name for name in ("WEBP", "AVIF", "TIFF", "GIF", "BMP", "PNG", "QOI") if name in Image.SAVE]
WRITTEN += ["JPEG2000"] if features.check("jpg_2000") else []


@pytest.mark.parametrize("format_", WRITTEN)
def test_broken_files_of_every_format_are_unreadable_images(digits_copy, format_):
    """Under the name .png, which is what a crawler calls them."""
    picture = digits_copy / "train" / "3" / "00000.png"
    file, rng = io.BytesIO(), np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(file, format_)
    images = open_images(DataConfig(str(digits_copy)), "train")
    images.transform = create_transform(32, use_prefetcher=True)
    index, whole, broken = images.filenames().index(str(picture)), file.getvalue(), 0
    for _ in range(40):
        content = bytearray(whole[: rng.integers(8, len(whole) + 1)])
        for place in rng.integers(4, len(content), 8):
            content[place] = rng.integers(256)
        picture.write_bytes(content)
        outcome = EvaluationImages(images)[index]
        assert outcome.pixels.shape == (3, 32, 32)
        broken += len(outcome.faults)
        assert all(fault.reason.startswith(f"cannot read the image {picture} (") for fault in outcome.faults)
    assert broken or format_ == "BMP"


def test_an_image_too_thin_to_be_resized_is_unreadable(digits_copy):
    picture = digits_copy / "train" / "3" / "00000.png"
    Image.new("L", (1, 60000)).save(picture)
    images = open_images(DataConfig(str(digits_copy)), "train")
    images.transform = create_transform(8192, use_prefetcher=True)
    with pytest.raises(InputError, match=f"cannot read the image {picture} "):
        images[images.filenames().index(str(picture))]


def test_photographs_are_cropped_upright_and_still_drafted(tmp_path):
    """A photograph and its turned copy give the same sample, whatever the orientation, also when it is drafted."""
    photo = Image.fromarray(load_sample_image("china.jpg")).resize((1280, 840))
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    inverse = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    photo.save(folder / "1.jpg", quality=95)
    for orientation, turn in inverse.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        photo.transpose(turn).save(folder / f"{orientation}.jpg", quality=95, exif=exif)
    images = open_images(DataConfig(str(tmp_path)), "train", decoder=Decoder(exif_transpose=True))
    images.transform = TrainTransform(AugmentConfig(color_jitter=0), (3, 64, 64), (0.5,) * 3, (0.5,) * 3)
    for position in range(12):
        upright, *turned = (images[SampleKey(index, 0, position)] for index in range(4))
        for sample in turned:
            difference = (sample.pixels.float() - upright.pixels.float()).abs().mean()
            assert difference < 4, (position, difference)
    as_stored = open_images(DataConfig(str(tmp_path)), "train")
    as_stored.transform = lambda image: image.size
    assert [as_stored[index][0] for index in range(4)] == [(1280, 840), (1280, 840), (840, 1280), (840, 1280)]
