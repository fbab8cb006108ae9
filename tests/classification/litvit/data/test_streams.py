"""WebDataset shards, and streams of timm's readers: every image once, as many batches as announced, faults by name."""

import io
import json
import re
import tarfile
from dataclasses import replace

import pytest
import torch

from litvit.data.augment import AUGMENTATIONS, AugmentConfig
from litvit.data.loader import eval_loader, train_loader
from litvit.data.readers import DataConfig, open_for_evaluation, open_images, open_train_and_val
from litvit.errors import InputError
from litvit.processes import Processes
from litvit.training.evaluate import evaluate

DATA_CONFIG = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
EVAL_CONFIG = {**DATA_CONFIG, "interpolation": "bilinear", "crop_pct": 1.0}
PLAIN = AugmentConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0, color_jitter=0.0)


def write_shard(path, samples):
    """Write a shard of (key, {suffix: content}) samples."""
    with tarfile.open(path, "w") as tar:
        for key, files in samples:
            for suffix, content in files.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def shards(digits, tmp_path):
    """Three shards of 10, 16 and 22 training images, one of 12 validation images."""
    images = sorted((digits / "train").rglob("*.png"))[:60]
    samples = [(f"{n:04d}", {"png": image.read_bytes(), "cls": b"%d" % (n % 10)}) for n, image in enumerate(images)]
    for number, (start, end) in enumerate([(0, 10), (10, 26), (26, 48)]):
        write_shard(tmp_path / f"train-{number:04d}.tar", samples[start:end])
    write_shard(tmp_path / "val-0000.tar", samples[48:60])
    return tmp_path


def config_of(folder, **changes):
    config = DataConfig(
        str(folder),
        dataset="wds/digits",
        train_split="train-{0000..0002}.tar",
        val_split="val-{0000..0000}.tar",
        train_num_samples=48,
        val_num_samples=12,
        num_classes=10,
        batch_size=4,
    )
    return replace(config, **changes)


def batches_of(config, workers=0, rank=0, world_size=1, augment=PLAIN, epoch=0, first_step=0):
    train, _, _ = open_train_and_val(config, seed=1)
    processes = Processes(torch.device("cpu"), rank, world_size)
    loader = train_loader(train, augment, DATA_CONFIG, processes, batch_size=config.batch_size, workers=workers)
    loader.set_epoch(epoch, first_step)
    return list(loader), train


def content(batches):
    return [image.numpy().tobytes() for batch in batches for image in batch.images]


def test_an_epoch_of_one_process_is_every_image_once(shards):
    batches, _ = batches_of(config_of(shards))
    assert len(batches) == 12
    assert len(set(content(batches))) == 48
    assert batches[0].images.is_contiguous(memory_format=torch.channels_last)
    again, _ = batches_of(config_of(shards))
    assert content(again) == content(batches)
    later, _ = batches_of(config_of(shards), epoch=1)
    assert content(later) != content(batches)
    assert set(content(later)) == set(content(batches))


@pytest.mark.parametrize("workers", [1, 5])
def test_an_epoch_has_as_many_batches_as_announced(shards, workers):
    batches, train = batches_of(config_of(shards), workers)
    assert len(batches) == 12
    assert {len(batch.images) for batch in batches} == {4}
    assert len(set(content(batches))) >= 40  # the smallest shard is read twice, the largest not to its end
    assert train.notes == (["3 loader processes per process, not 5: there are no more shards"] if workers == 5 else [])


def test_processes_with_shards_of_other_lengths_have_as_many_batches(shards):
    halves = [batches_of(config_of(shards), rank=rank, world_size=2)[0] for rank in range(2)]
    assert [len(half) for half in halves] == [6, 6]
    assert not set(content(halves[0])) & set(content(halves[1]))
    with pytest.raises(InputError, match="fewer shards than there are processes .4."):
        batches_of(config_of(shards), world_size=4)


def test_an_epoch_continues_where_it_was_left(shards):
    batches, _ = batches_of(config_of(shards), augment=AugmentConfig(reprob=1.0))
    rest, _ = batches_of(config_of(shards), augment=AugmentConfig(reprob=1.0), first_step=5)
    assert content(rest) == content(batches[5:])


def test_an_augmentation_of_ones_own_and_wrong_settings(shards, monkeypatch):
    monkeypatch.setitem(AUGMENTATIONS, "black", lambda: lambda image: image.point(lambda _: 0))
    batches, _ = batches_of(config_of(shards), augment=replace(PLAIN, aa="black"))
    assert all((batch.images == -1).all() for batch in batches)
    for augment, says in (
        (replace(PLAIN, aa="no-such-policy"), "--aa no-such-policy is neither"),
        (replace(PLAIN, aug_repeats=3), "--aug-repeats 0 with a streamed"),
    ):
        with pytest.raises(InputError, match=says):
            batches_of(config_of(shards), augment=augment)
    with pytest.raises(InputError, match="--train-num-samples says how many"):
        batches_of(config_of(shards, train_num_samples=None))
    with pytest.raises(InputError, match="--num-classes"):
        open_train_and_val(config_of(shards, num_classes=None))


def test_samples_of_a_shard_that_is_damaged_in_the_middle_are_missed(shards):
    """`tarfile` takes a damaged header for the end of the archive."""
    path = shards / "train-0002.tar"
    content = bytearray(path.read_bytes())
    place = content.index(b"0037.png")
    content[place : place + 200] = b"x" * 200
    path.write_bytes(content)
    batches, _ = batches_of(config_of(shards))
    faults = {fault.path: fault for batch in batches for fault in batch.faults}
    assert f"(ReadError: it is damaged from byte {place}: fetch" in faults[str(path)].reason
    assert faults[str(path)].fatal


def test_wrong_settings_are_found_at_the_start(shards):
    for flags, says in (
        ({"target_key": "kind"}, "has no class in the field kind of .json; it has .png, .cls"),
        ({"input_key": "jpg"}, "has no image of the --input-key; it has .png, .cls"),
        ({"val_split": "val"}, "the split val is neither shards, as in"),
        ({"val_split": "val-*.tar"}, "1 of 1 shards are missing: .*write {0000..0123} for numbers, not"),
    ):
        with pytest.raises(InputError, match=says):
            open_train_and_val(config_of(shards, **flags))
    write_shard(shards / "val-0000.tar", [("README", {"md": b"words"})])
    with pytest.raises(InputError, match="there are no images in the stream"):
        open_train_and_val(config_of(shards))


def test_files_that_are_no_samples_are_passed_over(digits, shards):
    image = next((digits / "train").rglob("*.png")).read_bytes()
    samples = [("README", {"md": b"words"}), ("._a", {"png": b"mac"}), ("a", {"png": image, "cls": b"1"})]
    write_shard(shards / "val-0000.tar", samples)
    images = open_images(config_of(shards), "val-{0000..0000}.tar")
    images.transform = lambda image: image.size
    assert [(sample.target, sample.faults) for sample in images] == [(1, [])]


def test_missing_shards_are_named(shards):
    with pytest.raises(InputError, match=r"3 of 6 shards are missing: .*train-0003.tar, .*train-0004.tar"):
        open_train_and_val(config_of(shards, train_split="train-{0000..0005}.tar"))


def broken_samples(digits):
    image = next((digits / "train").rglob("*.png")).read_bytes()
    return {
        "bad-image": ({"jpg": b"no image", "cls": b"1"}, "cannot read the image bad-image of .*tar"),
        "no-image": ({"txt": b"words", "cls": b"1"}, "no-image of .*tar has no image, .*; it has .txt, .cls"),
        "two-images": (
            {"mask.png": image, "png": image, "cls": b"1"},
            "two-images of .*tar has 2 images",
        ),
        "no-class": ({"png": image}, "no-class of .*tar has no class in .cls; it has .png"),
        "bad-class": ({"png": image, "cls": b"owl"}, "bad-class of .*tar has the class 'owl' .*: --class-map numbers"),
        "big-class": ({"png": image, "cls": b"10"}, "big-class of .*tar has the class 10, but there are 10"),
        "no-label": ({"png": image, "cls": b"-1"}, "no-label of .*tar has the class '-1'"),
    }


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_training_samples_are_named_and_replaced(digits, shards, workers):
    broken = broken_samples(digits)
    good = [(f"good{n}", {"png": image.read_bytes(), "cls": b"2"}) for n, image in enumerate(digits.rglob("*.png"))]
    write_shard(shards / "train-0000.tar", [(key, files) for key, (files, _) in broken.items()] + good[:7])
    (shards / "train-0001.tar").write_bytes((shards / "train-0001.tar").read_bytes()[:5000])
    batches, _ = batches_of(config_of(shards, train_num_samples=40), workers)
    assert len(batches) == 10
    reasons = {fault.reason for batch in batches for fault in batch.faults}
    says = [*(line for _, line in broken.values()), "cannot read the shard .*train-0001.tar .*repair or replace it"]
    for line in says:
        assert any(re.search(line, reason) for reason in reasons), line


def test_a_share_without_a_readable_image_ends_with_a_line(shards):
    for number in range(3):
        write_shard(shards / f"train-{number:04d}.tar", [("a", {"jpg": b"no image", "cls": b"1"})])
    with pytest.raises(InputError, match="this process's can be read: cannot read the image a of .*train-"):
        batches_of(config_of(shards))


@pytest.mark.parametrize("workers", [0, 3])
def test_broken_validation_samples_are_all_named(digits, shards, workers):
    images = [image.read_bytes() for image in sorted((digits / "val").rglob("*.png"))]
    samples = [(f"{n:02d}", {"png": images[n], "cls": b"3"}) for n in range(9)]
    samples += [(key, files) for key, (files, _) in broken_samples(digits).items()]
    write_shard(shards / "val-0000.tar", samples)
    processes = Processes(torch.device("cpu"))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
    images = open_for_evaluation(config_of(shards), None)
    images.num_classes = 10
    loader = eval_loader(images, EVAL_CONFIG, processes, batch_size=4, workers=workers)
    with pytest.raises(InputError, match="7 images cannot be used: ") as raised:
        evaluate(model, loader, processes, torch.no_grad)
    assert all(key in str(raised.value) for key in broken_samples(digits))
    write_shard(shards / "val-0000.tar", samples[:9])
    loader = eval_loader(images, EVAL_CONFIG, processes, batch_size=4, workers=workers)
    metrics = evaluate(model, loader, processes, torch.no_grad)
    assert metrics["images"] == 9  # what was read, not the 12 that were announced


def test_keys_suffixes_and_names_of_classes(digits, tmp_path):
    image = next((digits / "train").rglob("*.png")).read_bytes()
    samples = [
        ("a", {"rgb.PNG": image, "json": json.dumps({"kind": "owl"}).encode()}),
        ("b", {"other.png": image, "json": json.dumps({"kind": 0}).encode()}),
    ]
    write_shard(tmp_path / "val-0000.tar", samples)
    (tmp_path / "classes.txt").write_text("cat\nowl\n")
    config = config_of(tmp_path, target_key="kind", class_map="classes.txt", val_num_samples=None)
    images = open_images(config, config.val_split)
    images.transform = lambda image: image.size
    assert [(sample.target, len(sample.faults)) for sample in images] == [(1, 0), (0, 0)]
    one = open_images(replace(config, input_key="rgb.png"), config.val_split)
    one.transform = lambda image: image.size
    assert [len(sample.faults) for sample in one] == [0, 1]
    first = open_images(replace(config, input_key="jpg;png"), config.val_split)
    first.transform = lambda image: image.size
    assert [len(sample.faults) for sample in first] == [0, 0]


@pytest.mark.parametrize("value", [0.93, True, None, [1], "owl", 1e400, {}])
def test_what_is_no_class_number_is_a_fault(digits, tmp_path, value):
    image = next((digits / "train").rglob("*.png")).read_bytes()
    write_shard(tmp_path / "val-0000.tar", [("a", {"png": image, "json": json.dumps({"score": value}).encode()})])
    with pytest.raises(InputError, match="the sample a of .* class .*in the field score of .json"):
        open_images(config_of(tmp_path, target_key="score"), "val-{0000..0000}.tar")
