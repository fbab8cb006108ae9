"""Batches that do not depend on workers, processes or restarts."""

import io
from dataclasses import replace

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from litvit.data.augment import AugmentConfig
from litvit.data.loader import train_loader
from litvit.data.readers import DataConfig, open_train_and_val
from litvit.processes import Processes

AUGMENT = AugmentConfig(aa="rand-m9-mstd0.5-inc1", reprob=0.5)
DATA_CONFIG = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}


def batches_of(data, batch_size=20, augment=AUGMENT, workers=0, epoch=0, first_step=0, rank=0, world_size=1):
    train, _, _ = open_train_and_val(DataConfig(str(data)), seed=42)
    processes = Processes(torch.device("cpu"), rank, world_size)
    loader = train_loader(train, augment, DATA_CONFIG, processes, batch_size=batch_size, workers=workers)
    loader.set_epoch(epoch, first_step)
    return list(loader)


def unreadable(batch):
    return [fault.path for fault in batch.faults]


def test_samples_do_not_depend_on_workers_or_processes(digits):
    alone = batches_of(digits)
    for other, batch in zip(batches_of(digits, workers=2), alone, strict=True):
        assert torch.equal(other.images, batch.images)
        assert torch.equal(other.target, batch.target)
    halves = [batches_of(digits, 10, rank=rank, world_size=2)[0] for rank in range(2)]
    assert torch.equal(torch.stack([half.images for half in halves], 1).flatten(0, 1), alone[0].images)
    for other, batch in zip(batches_of(digits, first_step=2), alone[2:], strict=True):
        assert torch.equal(other.images, batch.images)
    later = batches_of(digits, epoch=1)
    assert not torch.equal(later[0].images, alone[0].images)


def test_batches_are_channels_last(digits):
    assert all(batch.images.is_contiguous(memory_format=torch.channels_last) for batch in batches_of(digits, workers=1))


def test_erasing_is_timms_on_the_normalised_image(digits):
    plain = torch.cat([batch.images for batch in batches_of(digits, augment=replace(AUGMENT, reprob=0))])
    erased = torch.cat([batch.images for batch in batches_of(digits, augment=replace(AUGMENT, reprob=1))])
    changed = (plain != erased).any(1)
    for image in changed:  # a rectangle in every image, of 2% to 33% of its area
        rows, columns = image.any(1).nonzero().flatten(), image.any(0).nonzero().flatten()
        height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        assert image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert 0.01 * 32 * 32 < height * width < 0.4 * 32 * 32
    noise = erased.permute(1, 0, 2, 3)[:, changed]
    assert noise.mean().abs() < 0.05
    assert noise.std() == pytest.approx(1, abs=0.05)


def test_a_broken_image_is_replaced_by_one_that_the_seed_fixes(digits_copy):
    before = batches_of(digits_copy)
    (digits_copy / "train" / "3" / "00000.png").write_bytes(b"no image")
    alone, worker = batches_of(digits_copy), batches_of(digits_copy, workers=1)
    broken = [path for batch in alone for path in unreadable(batch)]
    assert broken == [str(digits_copy / "train" / "3" / "00000.png")]
    different = 0
    for first, second, third in zip(before, alone, worker, strict=True):
        assert torch.equal(second.images, third.images)
        assert second.faults == third.faults
        different += (first.images != second.images).flatten(1).any(1).sum().item()
    assert different == 1


def test_a_large_photo_that_ends_early_is_replaced_too(digits_copy):
    picture = digits_copy / "train" / "3" / "00000.png"
    file = io.BytesIO()
    Image.fromarray(load_sample_image("china.jpg")).save(file, "JPEG")
    picture.unlink()
    broken = picture.with_suffix(".jpg")
    broken.write_bytes(file.getvalue()[:20000])
    batches = batches_of(digits_copy)
    assert [path for batch in batches for path in unreadable(batch)] == [str(broken)]
    broken.write_bytes(file.getvalue())
    assert not any(batch.faults for batch in batches_of(digits_copy))
