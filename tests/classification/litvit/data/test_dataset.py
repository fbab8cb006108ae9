"""Order of samples and random numbers."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data.transforms import RandomResizedCropAndInterpolation

from litvit.data.augment import JpegDraftCrop
from litvit.data.random_streams import Stream, random_stream
from litvit.data.sampler import EpochSampler
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
