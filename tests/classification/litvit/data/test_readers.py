"""Where data may lie, and how classes are numbered."""

import io
import itertools
import pickle
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from timm.data import create_transform
from timm.data.readers.reader import Reader

from litvit.data import readers
from litvit.data.readers import (
    DataConfig,
    class_counts,
    class_list,
    class_names,
    find_split,
    open_for_evaluation,
    open_sample,
    open_train_and_val,
    read_class_map,
    register_reader,
)
from litvit.errors import InputError


def test_classes_of_val_are_numbered_as_in_train(digits_copy):
    for image in (digits_copy / "val" / "4").iterdir():
        image.unlink()
    (digits_copy / "val" / "4").rmdir()
    train, val, num_classes = open_train_and_val(DataConfig(str(digits_copy)))
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
        open_train_and_val(DataConfig(str(digits_copy)))[:2],
        open_train_and_val(DataConfig(str(digits)))[:2],
        strict=True,
    ):
        assert len(packed) == len(plain)
        packed.transform = plain.transform = create_transform(32, use_prefetcher=True)
        for index in (0, len(plain) - 1):
            assert np.array_equal(packed[index][0], plain[index][0])
            assert packed[index][1] == plain[index][1]
    assert not list(digits_copy.glob("*.pickle*"))


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


class Names(Reader):
    """A reader of one's own: images by name, of the classes given."""

    def __init__(self, images, classes):
        super().__init__()
        self.images = images
        self.class_to_idx = {name: number for number, name in enumerate(classes)}

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index].open("rb"), self.class_to_idx[self.images[index].parent.name]

    def _filename(self, index, basename=False, absolute=False):
        return str(self.images[index])


@pytest.fixture
def own_reader(monkeypatch):
    monkeypatch.setattr(readers, "OWN_READERS", {})

    @register_reader
    def names(root, split):
        images = sorted(Path(root, split).rglob("*.png"))
        return Names(images, sorted({image.parent.name for image in images}))


@pytest.mark.usefixtures("own_reader")
def test_classes_of_a_reader_of_ones_own_are_numbered_as_in_train(digits_copy, tmp_path):
    shutil.rmtree(digits_copy / "val" / "7")
    config = DataConfig(str(digits_copy), dataset="names")
    train, val, num_classes = open_train_and_val(config)
    assert (len(train), len(val), num_classes) == (80, 36, 10)
    val.transform = lambda image: image
    numbers = {Path(val.name(index)).parent.name: val[index][1] for index in range(len(val))}
    assert numbers == {str(number): number for number in range(10) if number != 7}
    (tmp_path / "map.txt").write_text("\n".join(map(str, reversed(range(10)))))
    train, val, _ = open_train_and_val(replace(config, class_map=str(tmp_path / "map.txt")))
    assert class_names(val)["9"] == class_names(train)["9"] == 0
    (tmp_path / "map.txt").write_text("0\n1")
    with pytest.raises(InputError, match="8 classes that the class map lacks"):
        open_train_and_val(replace(config, class_map=str(tmp_path / "map.txt")))


@pytest.mark.usefixtures("own_reader")
def test_classes_to_evaluate_have_the_numbers_of_the_checkpoint(digits):
    config = DataConfig(str(digits), dataset="names")
    for known in ([str(number) for number in reversed(range(10))], [str(number) for number in range(10)]):
        images = open_for_evaluation(config, known)
        assert class_names(images) == {name: number for number, name in enumerate(known)}


@pytest.mark.usefixtures("own_reader")
def test_a_class_map_that_is_missing_is_one_line(digits):
    with pytest.raises(InputError, match="cannot read the class map nowhere.txt"):
        open_train_and_val(DataConfig(str(digits), dataset="names", class_map="nowhere.txt"))


def test_a_bug_in_an_augmentation_of_ones_own_is_not_an_unreadable_image(digits):
    def overlay(image):
        return Image.open("no-such-overlay.png")

    train, _, _ = open_train_and_val(DataConfig(str(digits)))
    train.transform = overlay
    with pytest.raises(FileNotFoundError, match="no-such-overlay"):
        train[0]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xef\xbb\xbfcat\r\ndog\r\nowl\r\n", None),
        (b"cat\ndog\nowl\n\n\n", None),
        (b"cat\ndog\nowl\nyak\n", None),
        (b"cat\n\ndog\nowl\n", "line 2 is empty"),
        (b"cat\ndog\ncat\nowl\n", "cat comes twice"),
        (b"cat\ndog\nowI\n", "train has 1 classes that the class map lacks: owl"),
        (b"cat\ndog\n", "train has 1 classes that the class map lacks: owl"),
        ("cat\ndog\nöwl\n".encode("utf-16"), "cannot read the class map"),
        (b"", "it holds no class"),
    ],
)
def test_a_class_map_is_right_or_refused(tmp_path, content, says):
    for split, name in itertools.product(("train", "val"), ("cat", "dog", "owl")):
        (tmp_path / split / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / split / name / "1.png")
    (tmp_path / "map.txt").write_bytes(content)
    config = DataConfig(str(tmp_path), class_map=str(tmp_path / "map.txt"))
    if says:
        with pytest.raises(InputError, match=says):
            open_train_and_val(config)
        return
    train, val, num_classes = open_train_and_val(config)
    names = content.decode("utf-8-sig").split()
    assert class_list(train) == class_list(val) == names
    assert num_classes == len(names)
    absent = ["no images of 1 classes of the class map: yak"] if "yak" in names else []
    assert train.notes == val.notes == absent


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ({"a": 1, "b": 0}, None),
        ({"a": 1, "b": 1}, "two classes share a number"),
        ({"a": -1, "b": 0}, "a has -1, and not a whole number"),
        ({"a": "x", "b": 0}, "a has 'x', and not a whole number"),
        (["a", "b"], "cannot read the class map"),
    ],
)
def test_a_pickled_class_map_is_right_or_refused(tmp_path, numbers, says):
    (tmp_path / "map.pkl").write_bytes(pickle.dumps(numbers))
    if says is None:
        assert read_class_map("map.pkl", str(tmp_path)) == numbers
        return
    with pytest.raises(InputError, match=says):
        read_class_map("map.pkl", str(tmp_path))


def test_classes_of_one_split_alone_are_told_or_refused(digits_copy):
    shutil.rmtree(digits_copy / "val" / "4")
    (digits_copy / "val" / "7").rename(digits_copy / "elsewhere")
    (digits_copy / "val" / "7").mkdir()
    _, val, _ = open_train_and_val(DataConfig(str(digits_copy)))
    assert val.notes == [
        "left out 1 folders without images as classes: 7",
        "no images of 2 classes of train: 4, 7",
    ]
    shutil.rmtree(digits_copy / "train" / "5")
    with pytest.raises(InputError, match="val has 1 classes that train lacks: 5"):
        open_train_and_val(DataConfig(str(digits_copy)))


def test_a_class_that_is_all_there_is_in_val_is_not_looked_through(digits_copy):
    for name in map(str, range(1, 10)):
        shutil.rmtree(digits_copy / "val" / name)
    for part in ("a", "b"):
        (digits_copy / "val" / "0" / part).mkdir()
    for number, image in enumerate(sorted((digits_copy / "val" / "0").glob("*.png"))):
        image.rename(image.parent / "ab"[number % 2] / image.name)
    for images in (
        open_train_and_val(DataConfig(str(digits_copy)))[1],
        open_for_evaluation(DataConfig(str(digits_copy)), None),
    ):
        assert len(images) == 4
        assert class_list(images) == list(map(str, range(10)))


def test_class_counts(digits_copy, tmp_path):
    for image in sorted((digits_copy / "train/4").iterdir())[3:]:
        image.unlink()
    (tmp_path / "map.txt").write_text("\n".join("9876543210x"))
    config = DataConfig(str(digits_copy))
    assert class_counts(open_train_and_val(config)[0], 10) == [8, 8, 8, 8, 3, 8, 8, 8, 8, 8]
    numbered = open_train_and_val(replace(config, class_map=str(tmp_path / "map.txt")))[0]
    assert class_counts(numbered, 11) == [8, 8, 8, 8, 8, 3, 8, 8, 8, 8, 0]


def test_a_sample_is_spread_over_the_validation_images(digits, digits_copy):
    """Of a data set, of the split itself, and of a .tar."""
    tar_split(digits_copy, "val")
    for source in (digits, digits / "val", digits_copy, digits_copy / "val.tar"):
        images, problems = open_sample([str(source)], 10)
        assert problems == []
        assert [images.open(index)[0].size for index in range(len(images))] == [(32, 32)] * 10
        assert [Path(images.name(index)).parent.name for index in range(10)] == list("0123456789")
    assert len(open_sample([str(digits)], 1000)[0]) == 40


def test_a_sample_of_files_and_folders(digits):
    first = next((digits / "val" / "7").iterdir())
    images, problems = open_sample([str(first), str(digits / "val" / "3"), "nowhere"], 100)
    assert problems == ["no image at nowhere"]
    assert images.name(0) == str(first)
    assert len(images) == 5
    with pytest.raises(InputError, match="no image at nowhere"):
        open_sample(["nowhere"], 100)
