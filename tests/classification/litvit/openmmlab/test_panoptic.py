"""The demo data as mmdet and mmseg read it, and mmdet's panoptic evaluation on it."""

import json
import math
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing
from mmdet.datasets import CocoDataset, CocoPanopticDataset
from mmdet.registry import METRICS, TRANSFORMS
from mmdet.structures import INSTANCE_OFFSET
from mmseg.datasets import BaseSegDataset
from PIL import Image

from litvit.demo_data import BACKGROUNDS, CLASSES, PALETTE, SEGMENTATION_CLASSES, SceneSettings, build
from litvit.errors import InputError
from litvit.openmmlab.errors import SampleError
from litvit.openmmlab.panoptic import LoadCocoPanoptic, segment_colors
from litvit.openmmlab.panoptic_quality import segment_ids

DETECTION = SceneSettings("detection", train=4, val=3, image_size=96)
PANOPTIC = {"classes": CLASSES + BACKGROUNDS, "thing_classes": CLASSES, "stuff_classes": BACKGROUNDS}


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    build(folder, DETECTION)
    return folder


def test_mmdet_reads_boxes_and_masks(coco):
    dataset = CocoDataset(
        data_root=str(coco),
        ann_file="annotations/instances_train2017.json",
        data_prefix={"img": "train2017/"},
        metainfo={"classes": CLASSES},
        filter_cfg={"filter_empty_gt": True, "min_size": 32},
        pipeline=[
            {"type": "LoadImageFromFile"},
            {"type": "mmdet.LoadAnnotations", "with_bbox": True, "with_mask": True},
        ],
    )
    assert len(dataset) == 4
    for number in range(4):
        scene, sample = DETECTION.scene("train", number), dataset[number]
        assert sample["gt_bboxes_labels"].tolist() == [thing.label for thing in scene.objects]
        assert np.array_equal(sample["gt_bboxes"].numpy(), [thing.box for thing in scene.objects])
        assert np.array_equal(sample["gt_masks"].masks, [thing.mask for thing in scene.objects])
        assert not sample["gt_ignore_flags"].any()


def panoptic_dataset(coco, split):
    return CocoPanopticDataset(
        data_root=str(coco),
        ann_file=f"annotations/panoptic_{split}2017.json",
        data_prefix={"img": f"{split}2017/", "seg": f"annotations/panoptic_{split}2017/"},
        metainfo=PANOPTIC,
        pipeline=[{"type": "LoadImageFromFile"}, {"type": "LoadCocoPanoptic"}],
    )


def test_mmdet_reads_panoptic_segments(coco):
    assert TRANSFORMS.get("LoadCocoPanoptic") is LoadCocoPanoptic
    dataset = panoptic_dataset(coco, "train")
    assert len(dataset) == 4
    for number in range(4):
        scene, sample = DETECTION.scene("train", number), dataset[number]
        labels = scene.background + 10
        for thing in scene.objects:
            labels[thing.mask] = thing.label
        assert sample["gt_bboxes_labels"].tolist() == [thing.label for thing in scene.objects]
        assert np.array_equal(sample["gt_bboxes"].numpy(), [thing.box for thing in scene.objects])
        assert np.array_equal(sample["gt_masks"].masks, [thing.mask for thing in scene.objects])
        assert np.array_equal(sample["gt_seg_map"], labels)


def test_mmseg_reads_labels(tmp_path):
    settings = replace(DETECTION, task="segmentation")
    build(tmp_path, settings)
    dataset = BaseSegDataset(
        data_root=str(tmp_path),
        reduce_zero_label=True,
        data_prefix={"img_path": "images/training", "seg_map_path": "annotations/training"},
        metainfo={"classes": SEGMENTATION_CLASSES, "palette": PALETTE},
        pipeline=[{"type": "LoadImageFromFile"}, {"type": "mmseg.LoadAnnotations"}],
    )
    assert len(dataset) == 4
    for number in range(4):
        scene, sample = settings.scene("train", number), dataset[number]
        for thing in scene.objects:
            assert (sample["gt_seg_map"][thing.mask] == len(BACKGROUNDS) + thing.label).all()
        bare = (sample["gt_seg_map"] < len(BACKGROUNDS)) & ~np.any([thing.mask for thing in scene.objects], axis=0)
        assert np.array_equal(sample["gt_seg_map"][bare], scene.background[bare])
        assert 0 < (sample["gt_seg_map"] == 255).sum() < bare.sum()


def predictions(samples):
    """The truth in the form of mmdet's panoptic heads, but for the first thing of each image, which is void."""
    for sample in samples:
        labels = torch.from_numpy(sample["gt_seg_map"])
        for number, mask in enumerate(sample["gt_masks"].masks, start=1):
            labels[torch.from_numpy(mask > 0)] += number * INSTANCE_OFFSET
        labels[labels // INSTANCE_OFFSET == 1] = len(CLASSES + BACKGROUNDS)
        yield {
            "img_id": sample["img_id"],
            "img_path": sample["img_path"],
            "pred_panoptic_seg": {"sem_seg": labels[None].int()},
        }


def panoptic_metric(coco, classes=PANOPTIC["classes"], **settings):
    metric = METRICS.build(
        {
            "type": "PanopticQualityMetric",
            "ann_file": str(coco / "annotations/panoptic_val2017.json"),
            "seg_prefix": str(coco / "annotations/panoptic_val2017"),
            **settings,
        }
    )
    metric.dataset_meta = {"classes": classes}
    return metric


def evaluate_a_share(rank, world_size, coco, out):
    """Evaluate every `world_size`-th image; the last process of several gets one again, as samplers do."""
    os.chdir(out)  # mmengine gathers results in files there
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{out}/meeting", rank=rank, world_size=world_size)
    dataset, metric = panoptic_dataset(coco, "val"), panoptic_metric(coco)
    numbers = range(rank, world_size * math.ceil(len(dataset) / world_size), world_size)
    metric.process({}, list(predictions(dataset[number % len(dataset)] for number in numbers)))
    torch.save(metric.evaluate(size=len(dataset)), out / f"{rank}.pth")


@pytest.mark.parametrize("world_size", [1, 2])
def test_panoptic_quality_of_detections(coco, tmp_path, world_size):
    torch.multiprocessing.start_processes(
        evaluate_a_share, (world_size, coco, tmp_path), nprocs=world_size, start_method="fork"
    )
    found, missed = Counter(), Counter()
    for number in range(3):
        first, *others = (thing.label for thing in DETECTION.scene("val", number).objects)
        found.update(others)
        missed[first] += 1
    things = [found[label] / (found[label] + 0.5 * missed[label]) for label in found | missed]
    stuff = len({kind for number in range(3) for kind in np.unique(DETECTION.scene("val", number).background)})
    for rank in range(world_size):
        scores = torch.load(tmp_path / f"{rank}.pth", weights_only=True)
        assert scores["coco_panoptic/PQ_th"] == pytest.approx(100 * np.mean(things), abs=1e-5)
        assert scores["coco_panoptic/PQ_st"] == scores["coco_panoptic/SQ_st"] == 100
        everything = 100 * (sum(things) + stuff) / (len(things) + stuff)
        assert scores["coco_panoptic/PQ"] == scores["coco_panoptic/RQ"] == pytest.approx(everything, abs=1e-5)
        assert len(scores) == 9


@pytest.mark.parametrize("annotated", [True, False])
def test_predictions_in_cocos_format(annotated, coco, tmp_path):
    """Also for images without annotations, such as those of a test server."""
    dataset = panoptic_dataset(coco, "val")
    shutil.copytree(coco / "annotations", tmp_path / "annotations")
    file = tmp_path / "annotations/panoptic_val2017.json"
    truth = json.loads(file.read_text())
    if not annotated:
        file.write_text(json.dumps({name: truth[name] for name in ("images", "categories")}))
    metric = panoptic_metric(tmp_path, format_only=True, outfile_prefix=str(tmp_path / "new/folder/ours"))
    metric.process({}, list(predictions(dataset)))
    assert metric.evaluate(size=len(dataset)) == {}
    written = json.loads((tmp_path / "new/folder/ours.panoptic.json").read_text())["annotations"]
    assert [image["image_id"] for image in written] == [image["image_id"] for image in truth["annotations"]]
    assert [image["file_name"] for image in written] == [image["file_name"] for image in truth["annotations"]]
    ids = {name: number for number, name in enumerate(PANOPTIC["classes"])}
    labels = {category["id"]: ids[category["name"]] for category in truth["categories"]}
    labels[0] = len(ids)
    for sample, image in zip(predictions(dataset), written, strict=True):
        with Image.open(tmp_path / "new/folder/ours.panoptic" / image["file_name"]) as png:
            r, g, b = np.asarray(png, dtype=int).transpose(2, 0, 1)
        segments = {part["id"]: part for part in image["segments_info"]} | {0: {"category_id": 0}}
        numbers = r + 256 * g + 256**2 * b
        assert {*np.unique(numbers)} | {0} == segments.keys()
        found = np.vectorize(lambda number: labels[segments[number]["category_id"]])(numbers)  # noqa: B023
        expected = sample["pred_panoptic_seg"]["sem_seg"][0].numpy()
        assert np.array_equal(found, expected % INSTANCE_OFFSET)
        pairs = {(number, value) for number, value in zip(numbers.flat, expected.flat, strict=True) if number}
        assert len(pairs) == len(segments) - 1 == len({value for _, value in pairs})
        for number, part in segments.items():
            assert part.get("area") == ((numbers == number).sum() if number else None)


def test_predictions_are_written_and_evaluated(coco, tmp_path):
    dataset = panoptic_dataset(coco, "val")
    scores = []
    for settings in ({}, {"outfile_prefix": str(tmp_path / "ours")}):
        metric = panoptic_metric(coco, **settings)
        metric.process({}, list(predictions(dataset)))
        scores.append(metric.evaluate(size=len(dataset)))
    assert scores[0] == scores[1]
    assert len(json.loads((tmp_path / "ours.panoptic.json").read_text())["annotations"]) == len(dataset)


def test_files_that_cannot_be_written_are_one_line(coco, tmp_path):
    with pytest.raises(InputError, match="set outfile_prefix=PREFIX"):
        panoptic_metric(coco, format_only=True)
    (tmp_path / "file").touch()
    metric = panoptic_metric(coco, format_only=True, outfile_prefix=str(tmp_path / "file/ours"))
    samples = list(predictions(panoptic_dataset(coco, "val")))
    with pytest.raises(SampleError, match="cannot write .*file/ours.panoptic: NotADirectoryError"):
        metric.process({}, samples)
    metric = panoptic_metric(coco, format_only=True, outfile_prefix=str(tmp_path / "ours"))
    metric.process({}, [samples[0] | {"img_path": f"{folder}/0.jpg"} for folder in "ab"])
    with pytest.raises(InputError, match="2 images would be written into .*ours.panoptic/0.png"):
        metric.evaluate(size=2)


def test_colours_of_segments():
    ids = np.array([[0, 255, 256], [65535, 65536, 256**3 - 1]], dtype=np.int32)
    assert segment_colors(ids).dtype == np.uint8
    assert np.array_equal(segment_ids(segment_colors(ids)), ids)


def test_classes_of_another_data_set(coco):
    metric = panoptic_metric(coco, classes=("0", "1", "cat", "dog"))
    with pytest.raises(InputError, match="panoptic_val2017.json has no class cat, dog: its classes are 0, 1, 2"):
        metric.process({}, [])


def test_a_broken_annotation_is_reported_by_the_process_that_reads_it(coco, tmp_path):
    truth = shutil.copytree(coco / "annotations", tmp_path / "annotations")
    sample = panoptic_dataset(coco, "val")[0]
    file = truth / "panoptic_val2017" / Path(sample["seg_map_path"]).name
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(SampleError, match=f"cannot read '{file}'"):
        panoptic_metric(tmp_path).process({}, list(predictions([sample])))


def test_an_annotation_file_of_another_kind(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/panoptic_val2017.json").write_text("[]")
    with pytest.raises(InputError, match="is no COCO annotation file"):
        panoptic_metric(tmp_path)
