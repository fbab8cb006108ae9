"""Batches that do not depend on workers, processes or restarts."""

import io
import tarfile

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from litvit.errors import InputError
from litvit.training.data import open_train_and_val
from litvit.training.loaders import train_loader
from litvit.training.recipe import parse_settings


def settings_for(data, *flags):
    return parse_settings([str(data), "--model", "resnet18", "-j", "0", *map(str, flags)])


def batches_of(data, *flags, epoch=0, first_update=0, rank=0, world_size=1):
    settings = settings_for(data, "--img-size", 32, "--aa", "rand-m9-mstd0.5-inc1", "--reprob", 0.5, *flags)
    train, _, _ = open_train_and_val(settings)
    config = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    loader = train_loader(train, settings, config, torch.device("cpu"), rank, world_size)
    loader.set_epoch(epoch, first_update)
    return list(loader)


def test_samples_do_not_depend_on_workers_or_processes(digits):
    alone = batches_of(digits, "-b", 20)
    for other, batch in zip(batches_of(digits, "-b", 20, "-j", 2), alone, strict=True):
        assert torch.equal(other.images, batch.images)
        assert torch.equal(other.target, batch.target)
    halves = [batches_of(digits, "-b", 10, rank=rank, world_size=2)[0] for rank in range(2)]
    assert torch.equal(torch.stack([half.images for half in halves], 1).flatten(0, 1), alone[0].images)
    for other, batch in zip(batches_of(digits, "-b", 20, first_update=2), alone[2:], strict=True):
        assert torch.equal(other.images, batch.images)
    later = batches_of(digits, "-b", 20, epoch=1)
    assert not torch.equal(later[0].images, alone[0].images)


def test_erasing_is_timms_on_the_normalised_image(digits):
    plain = torch.cat([batch.images for batch in batches_of(digits, "-b", 20, "--reprob", 0)])
    erased = torch.cat([batch.images for batch in batches_of(digits, "-b", 20, "--reprob", 1)])
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
    before = batches_of(digits_copy, "-b", 20)
    (digits_copy / "train" / "3" / "00000.png").write_bytes(b"no image")
    alone, worker = batches_of(digits_copy, "-b", 20), batches_of(digits_copy, "-b", 20, "-j", 1)
    broken = [path for batch in alone for path in batch.unreadable]
    assert broken == [str(digits_copy / "train" / "3" / "00000.png")]
    different = 0
    for first, second, third in zip(before, alone, worker, strict=True):
        assert torch.equal(second.images, third.images)
        assert second.unreadable == third.unreadable
        different += (first.images != second.images).flatten(1).any(1).sum().item()
    assert different == 1


def test_a_large_photo_that_ends_early_is_replaced_too(digits_copy):
    picture = digits_copy / "train" / "3" / "00000.png"
    file = io.BytesIO()
    Image.fromarray(load_sample_image("china.jpg")).save(file, "JPEG")
    picture.unlink()
    broken = picture.with_suffix(".jpg")
    broken.write_bytes(file.getvalue()[:20000])
    batches = batches_of(digits_copy, "-b", 20)
    assert [path for batch in batches for path in batch.unreadable] == [str(broken)]
    broken.write_bytes(file.getvalue())
    assert not any(batch.unreadable for batch in batches_of(digits_copy, "-b", 20))


def test_webdataset_shards_are_a_reader_of_timm(digits, tmp_path):
    with tarfile.open(tmp_path / "digits-0000.tar", "w") as tar:
        for number, image in enumerate(sorted((digits / "train").rglob("*.png"))[:40]):
            for suffix, content in (("png", image.read_bytes()), ("cls", image.parent.name.encode())):
                info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    flags = [
        "--dataset",
        "wds/digits",
        "--train-split",
        "digits-{0000..0000}.tar",
        "--val-split",
        "digits-{0000..0000}.tar",
    ]
    lengths = ["--train-num-samples", 40, "--val-num-samples", 40, "--num-classes", 10, "-b", 20]
    settings = settings_for(tmp_path, *flags, *lengths)
    train, _, num_classes = open_train_and_val(settings)
    config = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    batches = list(train_loader(train, settings, config, torch.device("cpu")))
    assert num_classes == 10
    assert [tuple(batch.images.shape) for batch in batches] == [(20, 3, 32, 32)] * 2
    with pytest.raises(InputError, match="--num-classes"):
        open_train_and_val(settings_for(tmp_path, *flags, *lengths[:4]))
