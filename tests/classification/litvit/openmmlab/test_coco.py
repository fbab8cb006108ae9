"""COCO's files as mmdet's data sets and metric read them through litvit: labels by name, on drawn scenes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pycocotools.coco
import pytest
import torch
from mmdet.datasets import CocoDataset, CocoPanopticDataset, Objects365V1Dataset, Objects365V2Dataset
from mmdet.datasets.api_wrappers import COCOPanoptic
from mmdet.evaluation import CocoMetric, OVCocoMetric
from PIL import Image

import litvit.openmmlab.panoptic  # noqa: F401
from litvit.demo_data import BACKGROUNDS, CLASSES, SceneSettings, build
from litvit.errors import InputError
from litvit.openmmlab.checks import check_files, check_metric
from litvit.openmmlab.coco import PanopticFile
from litvit.openmmlab.errors import SampleError

DETECTION = SceneSettings("detection", train=4, val=3, image_size=96)
REVERSED = CLASSES[::-1]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    build(folder, DETECTION)
    return folder


@pytest.fixture
def coco(scenes, tmp_path):
    """A copy of the scenes to be changed."""
    return Path(shutil.copytree(scenes, tmp_path / "coco"))


def edit(coco, kind, change):
    for split in ("train", "val"):
        file = coco / f"annotations/{kind}_{split}2017.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))


def instances(coco, classes=CLASSES, split="val", **settings):
    settings = {"pipeline": [], **settings}
    return CocoDataset(
        data_root=str(coco),
        ann_file=f"annotations/instances_{split}2017.json",
        data_prefix={"img": f"{split}2017/"},
        metainfo={"classes": classes},
        **settings,
    )


def panoptic(coco, things=CLASSES, stuff=BACKGROUNDS, meta=None):
    return CocoPanopticDataset(
        data_root=str(coco),
        ann_file="annotations/panoptic_val2017.json",
        data_prefix={"img": "val2017/", "seg": "annotations/panoptic_val2017/"},
        metainfo={"classes": (*things, *stuff), "thing_classes": things, "stuff_classes": stuff, **(meta or {})},
        pipeline=[{"type": "LoadImageFromFile"}, {"type": "LoadCocoPanoptic"}],
    )


def test_labels_follow_the_order_of_the_config(scenes):
    for classes in (REVERSED, CLASSES[3:6][::-1]):
        dataset = instances(scenes, classes)
        for number in range(3):
            names = [classes[one["bbox_label"]] for one in dataset.get_data_info(number)["instances"]]
            drawn = [str(thing.label) for thing in DETECTION.scene("val", number).objects]
            assert names == [name for name in drawn if name in classes]


def evaluate(coco, classes, found, kind=CocoMetric, meta=None, **settings):
    """Average precision of a detector that finds the objects of some classes, and those alone."""
    dataset = instances(coco, classes)
    metric = kind(str(coco / "annotations/instances_val2017.json"), classwise=True, **settings)
    metric.dataset_meta = dataset.metainfo | (meta or {})
    check_metric(metric, dataset)
    for number in range(len(dataset)):
        sample = dataset.get_data_info(number)
        objects = [one for one in sample["instances"] if classes[one["bbox_label"]] in found]
        prediction = {
            "bboxes": torch.tensor([one["bbox"] for one in objects], dtype=torch.float).reshape(-1, 4),
            "labels": torch.tensor([one["bbox_label"] for one in objects], dtype=torch.long),
            "scores": torch.ones(len(objects)),
        }
        shape = (sample["height"], sample["width"])
        metric.process({}, [{"pred_instances": prediction, "img_id": sample["img_id"], "ori_shape": shape}])
    return metric.evaluate(size=len(dataset))


@pytest.mark.parametrize("use_mp_eval", [False, True])
def test_the_metric_numbers_classes_like_the_data_set(use_mp_eval, scenes):
    present = {str(thing.label) for number in range(3) for thing in DETECTION.scene("val", number).objects}
    first, *rest = sorted(present)
    scores = evaluate(scenes, REVERSED, {first}, use_mp_eval=use_mp_eval)
    assert scores[f"coco/{first}_precision"] == 1
    assert [scores[f"coco/{name}_precision"] for name in rest] == [0] * len(rest)
    assert evaluate(scenes, REVERSED, present, use_mp_eval=use_mp_eval)["coco/bbox_mAP"] == 1


@pytest.mark.parametrize("use_mp_eval", [False, True])
def test_the_metric_of_base_and_novel_classes(use_mp_eval, scenes):
    present = {str(thing.label) for number in range(3) for thing in DETECTION.scene("val", number).objects}
    first, *rest = sorted(present)
    meta = {"base_classes": (first,), "novel_classes": tuple(rest)}
    scores = evaluate(scenes, REVERSED, {first}, OVCocoMetric, meta, use_mp_eval=use_mp_eval)
    assert (scores["coco/base_ap50"], scores["coco/novel_ap50"]) == (1, 0)


@pytest.mark.parametrize("kind", [Objects365V1Dataset, Objects365V2Dataset])
def test_data_sets_that_read_the_file_themselves(kind, scenes):
    settings = {"pipeline": [], "data_prefix": {"img": ""}, "metainfo": {"classes": REVERSED}}
    dataset = kind(ann_file=str(scenes / "annotations/instances_val2017.json"), **settings)
    for number in range(3):
        names = [REVERSED[one["bbox_label"]] for one in dataset.get_data_info(number)["instances"]]
        assert names == [str(thing.label) for thing in DETECTION.scene("val", number).objects]


def test_panoptic_files_that_mmdet_reads_itself(scenes):
    file = scenes / "annotations/panoptic_val2017.json"
    names = {category["id"]: category["name"] for category in json.loads(file.read_text())["categories"]}
    assert [names[number] for number in COCOPanoptic(str(file)).get_cat_ids(REVERSED)] == list(REVERSED)


def test_a_metric_with_another_packages_file(scenes):
    metric = CocoMetric()
    metric._coco_api = pycocotools.coco.COCO(str(scenes / "annotations/instances_val2017.json"))
    check_metric(metric, instances(scenes))


@pytest.mark.parametrize("numbers", [[0, 1, 2], [5, 5, 5]])
def test_ids_of_annotations_do_not_matter(coco, numbers):
    """An id of 0, with which COCO's own evaluation misses the object, and ids that are there twice."""

    def change(content):
        for annotation, number in zip(content["annotations"], numbers, strict=False):
            annotation["id"] = number
            del annotation["iscrowd"]

    edit(coco, "instances", change)
    assert evaluate(coco, CLASSES, CLASSES)["coco/bbox_mAP"] == 1


def test_masks_are_checked_where_they_are_used(coco):
    edit(coco, "instances", lambda content: content["annotations"][0].update(segmentation=[[1, 1, 5, 5]]))
    assert len(instances(coco)) == 3
    load = {"type": "mmdet.LoadAnnotations", "with_mask": True}
    with pytest.raises(InputError, match=r"instances_val2017.json: 'segmentation' of annotations\[0\]"):
        instances(coco, pipeline=[load])
    with pytest.raises(InputError, match=r"instances_val2017.json: 'segmentation' of annotations\[0\]"):
        evaluate(coco, CLASSES, (), metric=["bbox", "segm"])


def test_an_evaluation_without_annotations(coco):
    edit(coco, "instances", lambda content: content.pop("annotations"))
    with pytest.raises(InputError, match="instances_val2017.json has no annotations to compare with"):
        evaluate(coco, CLASSES, ())


def test_missing_images(coco):
    (coco / "val2017/000000000002.jpg").unlink()
    with pytest.raises(InputError, match="no file at .*val2017/000000000002.jpg, which .* names in 'images'"):
        instances(coco)
    (coco / "annotations/panoptic_val2017/000000000003.png").unlink()
    shutil.copy(coco / "val2017/000000000001.jpg", coco / "val2017/000000000002.jpg")
    with pytest.raises(InputError, match=r"no file at .*000000000003.png, which .* names in 'annotations' \(image 3\)"):
        panoptic(coco)


def segments(dataset):
    """For each image the name of each pixel's class, "" for void, and the names of its things."""
    classes = [*dataset.metainfo["classes"], *[""] * 256]
    for sample in dataset:
        names = np.array(classes)[sample["gt_seg_map"]]
        yield names.tolist(), [classes[label] for label in sample["gt_bboxes_labels"]], len(sample["gt_masks"].masks)


def test_panoptic_files_of_other_shapes(scenes, coco):
    """Stuff before things, no `isthing` and `iscrowd`, PNG files with names of their own, pictures in .jpeg."""
    for split in ("train", "val"):
        for file in (coco / f"annotations/panoptic_{split}2017").iterdir():
            file.rename(file.with_name(f"seg-{file.name}"))
        for file in (coco / f"{split}2017").iterdir():
            file.rename(file.with_suffix(".jpeg"))

    def change(content):
        content["categories"] = [{"id": x["id"], "name": x["name"]} for x in reversed(content["categories"])]
        for image in content["images"]:
            image["file_name"] = image["file_name"].replace(".jpg", ".jpeg")
        for annotation in content["annotations"]:
            annotation["file_name"] = "seg-" + annotation["file_name"]
            for segment in annotation["segments_info"]:
                del segment["iscrowd"]

    edit(coco, "panoptic", change)
    expected = list(segments(panoptic(scenes)))
    assert list(segments(panoptic(coco))) == expected
    assert list(segments(panoptic(coco, REVERSED, BACKGROUNDS[::-1]))) == expected


def test_segment_ids_that_every_image_has(coco):
    """Of the annotations of an image, those of others with the same ids are no part."""
    expected = list(segments(panoptic(coco)))
    folder = coco / "annotations/panoptic_val2017"

    def change(content):
        for annotation in content["annotations"]:
            if not (folder / annotation["file_name"]).exists():
                continue
            png = np.asarray(Image.open(folder / annotation["file_name"]))
            old, new = png @ np.array([1, 256, 65536]), np.zeros_like(png)
            for number, segment in enumerate(annotation["segments_info"], start=1):
                new[old == segment["id"]] = (number, 0, 0)
                segment["id"] = number
            Image.fromarray(new).save(folder / annotation["file_name"])

    file = coco / "annotations/panoptic_val2017.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    assert list(segments(panoptic(coco))) == expected
    api = PanopticFile(str(file))
    number = content["images"][1]["id"]
    assert {segment["image_id"] for segment in api.load_anns(api.get_ann_ids(img_ids=[number]))} == {number}


def test_a_subset_of_panoptic_classes(scenes):
    chosen = (*CLASSES[5:], BACKGROUNDS[2])
    whole = list(segments(panoptic(scenes)))
    subset = list(segments(panoptic(scenes, CLASSES[5:], BACKGROUNDS[2:3])))
    for (names, things, _), (few_names, few_things, masks) in zip(whole, subset, strict=True):
        assert few_names == [[name if name in chosen else "" for name in row] for row in names]
        assert few_things == [name for name in things if name in chosen]
        assert masks == len(few_things)


def test_panoptic_classes_are_things_then_stuff(scenes):
    with pytest.raises(InputError, match=r"needs classes=\(\*thing_classes, \*stuff_classes\)"):
        panoptic(scenes, meta={"classes": (*BACKGROUNDS, *CLASSES)})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda png: png.resize((64, 48), 0), "it is 48 x 64 pixels high x wide, its image 96 x 128"),
        (lambda png: Image.new("RGB", png.size, (1, 2, 3)), "it has a segment 197121 that 'segments_info'"),
    ],
)
def test_png_files_that_do_not_fit(spoil, message, coco):
    file = coco / "annotations/panoptic_val2017/000000000001.png"
    dataset = panoptic(coco)
    spoil(Image.open(file)).save(file)
    with pytest.raises(InputError, match=message):
        dataset[0]
    if "48 x 64" in message:
        with pytest.raises(InputError, match="000000000001.png is 48 x 64 pixels high x wide, but 96 x 128 in"):
            panoptic(coco)


def test_an_image_of_another_size_than_the_file_says(coco, monkeypatch):
    """Found at the start by the header, if the image is one of those that are looked at, and else when it is read."""
    edit(coco, "instances", lambda content: content["images"][1].update(width=96, height=128))
    message = "000000000002.jpg is 96 x 128 pixels high x wide, but 128 x 96 in .*json: correct .* of image 2 there"
    with pytest.raises(InputError, match=message):
        instances(coco)
    monkeypatch.setattr("litvit.openmmlab.coco.SAMPLED_FILES", 1)
    dataset = instances(coco, pipeline=[{"type": "LoadImageFromFile"}])
    check_files(dataset.pipeline, dataset.ann_file)
    with pytest.raises(SampleError, match=message):
        dataset[1]
    assert dataset[0]["img"].shape == (96, 128, 3)


def test_an_image_too_large_for_pillow_is_left_to_the_pipeline(scenes, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    dataset = instances(scenes, pipeline=[{"type": "LoadImageFromFile"}])
    assert dataset[0]["img"].shape == (96, 128, 3)


def test_an_image_of_another_size_than_its_own_annotation_says(coco):
    """As in VOC's data sets, whose list of images has no sizes."""
    dataset = instances(coco, pipeline=[{"type": "LoadImageFromFile"}])
    check_files(dataset.pipeline)
    sample = {**dataset.get_data_info(0), "width": 5}
    with pytest.raises(SampleError, match="is 96 x 128 pixels high x wide, but 96 x 5 in its annotation$"):
        dataset.pipeline(sample)


def test_an_image_that_its_tag_turns(coco):
    file = coco / "val2017/000000000001.jpg"
    image = Image.open(file)
    tags = image.getexif()
    tags[0x112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(file, exif=tags)
    dataset = instances(coco, pipeline=[{"type": "LoadImageFromFile"}])
    check_files(dataset.pipeline, dataset.ann_file)
    assert dataset[0]["img"].shape == (96, 128, 3)
