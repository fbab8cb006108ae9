"""The demo data as mmdet and mmseg read it, and mmdet's panoptic evaluation on it."""

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

from litvit.demo_data import BACKGROUNDS, CLASSES, PALETTE, SEGMENTATION_CLASSES, SceneSettings, build
from litvit.errors import InputError
from litvit.openmmlab.errors import SampleError
from litvit.openmmlab.panoptic import LoadCocoPanoptic

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
        yield {"img_id": sample["img_id"], "pred_panoptic_seg": {"sem_seg": labels[None].int()}}


def panoptic_metric(coco, classes=PANOPTIC["classes"]):
    metric = METRICS.build(
        {
            "type": "PanopticQualityMetric",
            "ann_file": str(coco / "annotations/panoptic_val2017.json"),
            "seg_prefix": str(coco / "annotations/panoptic_val2017"),
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
