"""Configs that need a folder of data alone: what is found in it, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

from litvit.errors import InputError
from litvit.openmmlab import own_data

ROOT = Path(__file__).parents[4]


def detector(root, **settings):
    cfg = Config.fromfile(ROOT / "detection/configs/finetune/mask_rcnn_lit_small.py")
    cfg.merge_from_dict({"data_root": str(root), **{f"own_data.{name}": value for name, value in settings.items()}})
    return cfg


def segmentor(root, **settings):
    cfg = Config.fromfile(ROOT / "segmentation/configs/finetune/fpn_lit_small.py")
    cfg.merge_from_dict({"data_root": str(root), **{f"own_data.{name}": value for name, value in settings.items()}})
    return cfg


def write_images(folder, names, size=(40, 30)):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", size).save(folder / name)


def write_coco(file, names, mask="triangle"):
    """Two classes with annotations and one without, on images of 40 x 30."""
    masks = {"triangle": [[5, 5, 15, 5, 15, 15]], "box": [[5, 5, 15, 5, 15, 15, 5, 15]], "none": None}
    annotation = {"bbox": [5, 5, 10, 10], "iscrowd": 0, "area": 100, "segmentation": masks[mask]}
    if mask == "none":
        del annotation["segmentation"]
    content = {
        "images": [{"id": i, "file_name": name, "width": 40, "height": 30} for i, name in enumerate(names)],
        "categories": [{"id": 4, "name": "b"}, {"id": 2, "name": "empty"}, {"id": 9, "name": "a"}],
        "annotations": [
            {**annotation, "id": i, "image_id": i, "category_id": (4, 9)[i % 2]} for i in range(len(names))
        ],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


LAYOUTS = {
    "json beside a folder": ("train.json", "val.json", "images", "images"),
    "COCO": ("annotations/instances_train2017.json", "annotations/instances_val2017.json", "train2017", "val2017"),
    "a folder per split": ("train/_annotations.coco.json", "valid/_annotations.coco.json", "train", "valid"),
    "train and test": ("a_train.json", "a_test.json", "pictures/train", "pictures/test"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_and_classes_of_coco_are_found(tmp_path, layout):
    train, val, train_images, val_images = LAYOUTS[layout]
    names = [f"{i}.png" for i in range(6)]
    for file, folder in ((train, train_images), (val, val_images)):
        write_coco(tmp_path / file, names)
        write_images(tmp_path / folder, names)
    cfg = detector(tmp_path)
    notes = own_data.complete(cfg)
    assert "own_data" not in cfg
    assert cfg.train_dataloader.dataset.ann_file == str(tmp_path / train)
    assert cfg.val_evaluator.ann_file == cfg.val_dataloader.dataset.ann_file == str(tmp_path / val)
    assert Path(cfg.train_dataloader.dataset.data_prefix.img) == tmp_path / train_images
    assert Path(cfg.test_dataloader.dataset.data_prefix.img) == tmp_path / val_images
    assert cfg.train_dataloader.dataset.metainfo.classes == ["b", "a"]
    assert cfg.model.roi_head.bbox_head.num_classes == cfg.model.roi_head.mask_head.num_classes == 2
    assert "left out: empty" in notes[0]
    assert cfg.train_cfg.max_iters == 300
    assert own_data.complete(cfg) == []


def test_given_classes_are_matched_by_name(tmp_path):
    write_images(tmp_path / "images", ["0.png", "1.png"])
    for split in ("train", "val"):
        write_coco(tmp_path / f"{split}.json", ["0.png", "1.png"])
    cfg = detector(tmp_path, classes=["a"], iterations=7)
    own_data.complete(cfg)
    assert cfg.val_dataloader.dataset.metainfo.classes == ["a"]
    assert cfg.model.roi_head.bbox_head.num_classes == 1
    assert cfg.train_cfg.max_iters == 7
    assert not cfg.default_hooks.logger.log_metric_by_epoch
    with pytest.raises(InputError, match="has no class c"):
        own_data.complete(detector(tmp_path, classes=["a", "c"]))


@pytest.mark.parametrize("mask", ["box", "none"])
def test_without_masks_boxes_alone_are_trained(tmp_path, mask):
    write_images(tmp_path / "images", ["0.png", "1.png"])
    for split in ("train", "val"):
        write_coco(tmp_path / f"{split}.json", ["0.png", "1.png"], mask)
    cfg = detector(tmp_path)
    own_data.complete(cfg)
    assert cfg.model.type == "FasterRCNN"
    assert cfg.model.roi_head.mask_head is None
    assert cfg.val_evaluator.metric == "bbox"
    steps = [*cfg.train_dataloader.dataset.pipeline, *cfg.test_dataloader.dataset.pipeline]
    assert not any(step.get("with_mask") for step in steps)


def test_data_of_coco_that_cannot_be_found_are_named(tmp_path):
    with pytest.raises(InputError, match="no data folder .*nowhere"):
        own_data.complete(detector(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"own_data\.train=FILE"):
        own_data.complete(detector(tmp_path))
    for name in ("train.json", "val.json"):
        write_coco(tmp_path / name, ["0.png"])
    with pytest.raises(InputError, match=r"no folder in .* has 0\.png"):
        own_data.complete(detector(tmp_path))
    write_images(tmp_path / "images", ["0.png"])
    write_coco(tmp_path / "train_old.json", ["0.png"])
    with pytest.raises(InputError, match="2 annotation files for train"):
        own_data.complete(detector(tmp_path))
    own_data.complete(detector(tmp_path, train="train.json"))


def test_few_images_are_seen_more_often():
    assert own_data.iterations(292, 2) == 12 * 292 / 2
    assert own_data.iterations(100, 2) == 20 * 100 / 2
    assert own_data.iterations(10_000, 16) == 12 * 10_000 / 16
    assert own_data.iterations(10, 8) == 300


def write_mask(file, labels, dtype=np.uint8):
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((30, 40), dtype)
    for i, label in enumerate(labels):
        pixels[:, i * 4 : (i + 1) * 4] = label  # the last label's part of the image is 4 of 40 columns
    Image.fromarray(pixels).save(file)


PAIRS = {
    "two folders": ("images/{}.jpg", "masks/{}.png"),
    "split above": ("{split}/images/{}.jpg", "{split}/labels/{}.png"),
    "split below": ("images/{split}/{}.png", "annotations/{split}/{}.png"),
    "one folder": ("{}.jpg", "{}.png"),
    "suffix of names": ("{}.png", "{}_mask.png"),
}


@pytest.mark.parametrize("layout", PAIRS)
def test_pairs_are_found(tmp_path, layout):
    image, mask = PAIRS[layout]
    for i in range(10):
        split = "val" if i >= 8 else "train"
        write_images((tmp_path / image.format(i, split=split)).parent, [Path(image.format(i, split=split)).name])
        write_mask(tmp_path / mask.format(i, split=split), [0, 1])
    pairs = own_data.find_pairs(tmp_path)
    assert {name: len(part) for name, part in pairs.items()} == {"train": 8, "val": 2}
    for one, other in (pair for part in pairs.values() for pair in part):
        assert (tmp_path / one).is_file()
        assert Path(other).stem.removesuffix("_mask") == Path(one).stem
        assert other != one
    if "split" in layout:
        assert [Path(one).stem for one, _ in pairs["val"]] == ["8", "9"]


def pairs(tmp_path, labels, number=5):
    write_images(tmp_path / "images", [f"{i}.png" for i in range(number)])
    for i in range(number):
        write_mask(tmp_path / "masks" / f"{i}.png", labels)


def classes_of(cfg):
    dataset = cfg.train_dataloader.dataset
    return dataset["labels"], dataset.metainfo.classes, dataset["void"]


def test_classes_weights_and_void_of_masks(tmp_path):
    pairs(tmp_path, [1, 2, 255])
    cfg = segmentor(tmp_path)
    own_data.complete(cfg)
    assert classes_of(cfg) == ([0, 1, 2], ["0", "1", "2"], [255])
    assert cfg.model.decode_head.num_classes == 3
    frequent, rare, _ = cfg.model.decode_head.loss_decode.class_weight
    assert frequent < rare == 1
    assert cfg.train_cfg.max_iters == 300
    (tmp_path / "classes.txt").write_text("ground\nroad\ntree\n")
    cfg = segmentor(tmp_path, classes=["tree", "ground"])
    own_data.complete(cfg)
    assert classes_of(cfg) == ([2, 0], ["tree", "ground"], [1, 255])


def test_masks_of_0_and_255_have_two_classes(tmp_path):
    pairs(tmp_path, [255])
    cfg = segmentor(tmp_path, classes=["ground", "cell"])
    own_data.complete(cfg)
    assert classes_of(cfg) == ([0, 255], ["ground", "cell"], [])


def test_masks_that_cannot_be_used_are_named(tmp_path):
    pairs(tmp_path, [0])
    with pytest.raises(InputError, match="have one class, 0"):
        own_data.complete(segmentor(tmp_path))
    write_mask(tmp_path / "masks/0.png", [300], np.uint16)
    with pytest.raises(InputError, match=r"masks/0\.png has colours or numbers above 255"):
        own_data.complete(segmentor(tmp_path))
    write_mask(tmp_path / "masks/0.png", [3])
    with pytest.raises(InputError, match="1 names, the masks of .* have labels 0, 3"):
        own_data.complete(segmentor(tmp_path, classes=["cell"]))
    (tmp_path / "masks/0.png").unlink()
    with pytest.raises(InputError, match=r"1 images have no mask, such as images/0\.png"):
        own_data.complete(segmentor(tmp_path))
