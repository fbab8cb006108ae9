"""Images that are held out to validate on."""

import shutil
import tarfile
from dataclasses import replace

import pytest

from litvit.data.readers import DataConfig, class_list, open_for_evaluation, open_train_and_val
from litvit.errors import InputError


def names(images):
    return [images.dataset.reader.filename(index) for index in range(len(images))]


def test_a_split_is_of_every_class_and_independent_of_the_order_of_files(digits, tmp_path):
    config = DataConfig(str(digits / "train"), val_fraction=0.25)
    train, val, num_classes = open_train_and_val(config)
    assert (len(train), len(val), num_classes) == (60, 20, 10)
    assert train.dataset.reader.targets == sorted([*range(10)] * 6)
    assert val.dataset.reader.targets == sorted([*range(10)] * 2)
    assert not set(names(train)) & set(names(val))
    # copied in the reverse order, and packed in it
    for image in sorted((digits / "train").rglob("*.png"), reverse=True):
        copy = tmp_path / "data/train" / image.relative_to(digits / "train")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, copy)
    config = replace(config, data_dir=str(tmp_path / "data"))
    assert names(open_train_and_val(config)[1]) == names(val)
    with tarfile.open(tmp_path / "data/train.tar", "w") as tar:
        for image in sorted((digits / "train").rglob("*.png"), reverse=True):
            tar.add(image, image.relative_to(digits / "train"))
    shutil.rmtree(tmp_path / "data/train")
    assert names(open_train_and_val(config)[1]) == names(val)
    assert names(open_train_and_val(replace(config, split_seed=1))[1]) != names(val)


def test_a_split_keeps_most_images_where_they_were_if_others_come(digits_copy):
    config = DataConfig(str(digits_copy / "train"), val_fraction=0.25)
    before = set(names(open_train_and_val(config)[1]))
    shutil.copy(digits_copy / "train/3/00000.png", digits_copy / "train/3/new.png")
    after = set(names(open_train_and_val(config)[1]))
    assert len(before ^ after) <= 2


def test_a_split_with_a_class_map_has_its_numbers(digits, tmp_path):
    (tmp_path / "map.txt").write_text("\n".join("9876543210"))
    config = DataConfig(str(digits / "train"), val_fraction=0.25, class_map=str(tmp_path / "map.txt"))
    train, val, _ = open_train_and_val(config)
    for images in (train, val):
        for index, name in enumerate(names(images)):
            assert images.open(index)[1] == images.dataset.reader.targets[index] == 9 - int(name[0])


def test_a_val_folder_comes_before_a_split(digits):
    train, val, _ = open_train_and_val(DataConfig(str(digits), val_fraction=0.25))
    assert (len(train), len(val)) == (80, 40)


def test_no_val_folder_and_no_split(digits, digits_copy):
    with pytest.raises(InputError, match=r"neither val/ nor val.tar; .*--val-fraction 0.2"):
        open_train_and_val(DataConfig(str(digits / "train")))
    for image in sorted((digits_copy / "train/4").iterdir())[1:]:
        image.unlink()
    with pytest.raises(InputError, match=r"4/00000.png is the only image of its class"):
        open_train_and_val(DataConfig(str(digits_copy / "train"), val_fraction=0.2))


def test_the_images_held_out_are_evaluated(digits, digits_copy):
    config = DataConfig(str(digits / "train"), val_fraction=0.25)
    _, val, _ = open_train_and_val(config)
    chosen, classes = names(val), class_list(val)
    assert names(open_for_evaluation(config, classes, chosen=chosen)) == chosen
    assert len(open_for_evaluation(replace(config, val_fraction=0.0), classes, chosen=chosen)) == 80
    assert len(open_for_evaluation(replace(config, data_dir=str(digits)), classes, chosen=chosen)) == 40
    shutil.copy(digits_copy / "train/3/00000.png", digits_copy / "train/3/new.png")
    (digits_copy / "train" / chosen[0]).unlink()
    images = open_for_evaluation(replace(config, data_dir=str(digits_copy / "train")), classes, chosen=chosen)
    assert names(images) == chosen[1:]
    assert "1 of them are gone" in images.notes[-1]
