"""Order of samples, reproducible augmentation, and the places where data may lie."""

import io
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from timm.data import create_transform

from litvit.errors import InputError
from litvit.training.data import (
    EpochBatches,
    Stream,
    class_names,
    find_split,
    open_train_and_val,
    random_stream,
    train_loader,
)
from litvit.training.recipe import parse_settings


def settings_for(data, *flags):
    return parse_settings([str(data), "--model", "resnet18", "-j", "0", *map(str, flags)])


def updates(num_images, batch_size, world_size, accum_steps=1, epoch=0, **kwargs):
    """Per update, the samples of all processes."""
    ranks = []
    for rank in range(world_size):
        batches = EpochBatches(
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
    ranks = [list(EpochBatches(1000, 16, rank=r, world_size=world_size, repeats=repeats)) for r in range(world_size)]
    for batches in zip(*ranks, strict=True):
        counts = Counter(draw.index for batch in batches for draw in batch)
        assert set(counts.values()) == {repeats}
        assert all(len({draw.index for draw in batch}) == len(batch) for batch in batches)
    assert len(ranks[0]) * 16 * world_size == 1000 // 256 * 256  # as many samples an epoch as the published sampler


def test_a_total_batch_larger_than_the_data_is_refused():
    with pytest.raises(InputError, match="do not fill one total batch of 200"):
        EpochBatches(100, 50, world_size=2, accum_steps=2)


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


def test_classes_of_val_are_numbered_as_in_train(digits_copy):
    for image in (digits_copy / "val" / "4").iterdir():
        image.unlink()
    (digits_copy / "val" / "4").rmdir()
    train, val, num_classes = open_train_and_val(settings_for(digits_copy))
    assert num_classes == 10
    assert class_names(val)["5"] == class_names(train)["5"] == 5


def tar_split(folder, split):
    """Pack folder/split as folder/split.tar and remove the folder."""
    with tarfile.open(folder / f"{split}.tar", "w") as tar:
        for image in sorted((folder / split).rglob("*.png")):
            info = tarfile.TarInfo(str(image.relative_to(folder / split)))
            content = image.read_bytes()
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
            image.unlink()
    (folder / split).rename(folder.parent / f"{split}-was")


def test_tars_hold_the_same_images_as_folders(digits, digits_copy):
    for split in ("train", "val"):
        tar_split(digits_copy, split)
    for packed, plain in zip(
        open_train_and_val(settings_for(digits_copy))[:2], open_train_and_val(settings_for(digits))[:2], strict=True
    ):
        assert len(packed) == len(plain)
        packed.transform = plain.transform = create_transform(32, use_prefetcher=True)
        for index in (0, len(plain) - 1):
            assert np.array_equal(packed[index][0], plain[index][0])
            assert packed[index][1] == plain[index][1]
    assert not list(digits_copy.glob("*.pickle*"))


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


def test_hugging_face_data_sets_are_a_reader_of_timm(digits, tmp_path):
    settings = settings_for(tmp_path, "--dataset", f"hfds/{digits}", "--val-split", "validation")
    train, val, num_classes = open_train_and_val(settings)
    assert (len(train), len(val), num_classes) == (80, 40, 10)


def test_splits_have_usual_names(tmp_path):
    (tmp_path / "validation").mkdir()
    (tmp_path / "train.tar").touch()
    assert find_split(str(tmp_path), "val") == tmp_path / "validation"
    assert find_split(str(tmp_path), "train") == tmp_path / "train.tar"
    with pytest.raises(InputError, match="neither extra/ nor extra.tar"):
        find_split(str(tmp_path), "extra")


def test_a_folder_of_classes_may_be_the_split_itself(tmp_path, digits):
    assert find_split(str(digits / "val"), "val", or_itself=True) == digits / "val"
    with pytest.raises(InputError, match="neither val/"):
        find_split(str(digits / "val"), "val")
    (tmp_path / "train").mkdir()
    with pytest.raises(InputError, match="neither val/"):
        find_split(str(tmp_path), "val", or_itself=True)
