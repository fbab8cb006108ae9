"""Where data may lie, and how classes are numbered."""

import io
import tarfile

import numpy as np
import pytest
from timm.data import create_transform

from litvit.errors import InputError
from litvit.training.data import class_names, find_split, open_train_and_val
from litvit.training.recipe import parse_settings


def settings_for(data, *flags):
    return parse_settings([str(data), "--model", "resnet18", "-j", "0", *map(str, flags)])


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
