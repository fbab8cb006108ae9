"""COCO's annotation files for mmdet: checked when they are read, with classes matched by name.

Importing this module makes mmdet's `CocoDataset`, `CocoPanopticDataset` and `CocoMetric` read their files through it.
Data sets and metrics that read a file through mmdet's `COCO` themselves get its classes in the order of their names.
The command lines import it. A config for a script of your own names it:

    custom_imports = dict(imports=["litvit.openmmlab", "litvit.openmmlab.coco"])
"""

import gc
import logging
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from json import JSONDecodeError
from typing import Any

import numpy as np
from mmdet.datasets import CocoDataset, CocoPanopticDataset
from mmdet.datasets.api_wrappers import COCO, COCOeval, COCOevalMP, COCOPanoptic
from mmdet.evaluation.metrics import coco_metric, ov_coco_metric
from mmengine.logging import print_log
from PIL import ExifTags, Image

from litvit.errors import InputError
from litvit.openmmlab import annotations
from litvit.openmmlab.checks import SAMPLED_FILES, VOID_LABEL, first_missing, is_local, steps, wrong_size


class _File:
    """What mmdet's interfaces to COCO files of both kinds share."""

    def __init__(self, annotation_file: str | None = None, name: str | None = None) -> None:
        self.name = str(name or annotation_file)
        collects = gc.isenabled()
        gc.disable()  # a large file is read twice as fast without
        try:
            super().__init__(annotation_file)
        except (JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{self.name} is not JSON, or cut off: {error}") from error
        except AssertionError as error:
            raise InputError(f"{self.name} is no COCO annotation file: {error}") from error
        finally:
            if collects:
                gc.enable()


class InstancesFile(_File, COCO):
    """Interface to an annotation file of boxes and masks.

    Args:
        annotation_file: JSON file.
        name: Name of the file for messages, if it is not that one.

    Raises:
        InputError: The file has an entry that can be read in no way, or in several.
    """

    def createIndex(self) -> None:  # noqa: N802 (pycocotools calls it)
        self.notices = annotations.check_instances(self.dataset, self.name)
        self.mask_error = None  # not raised for detectors of boxes
        try:
            annotations.check_masks(self.dataset, self.name)
        except InputError as error:
            self.mask_error = error
        # Nothing else refers to these ids, and COCO's evaluation counts an object with id 0 as missed.
        for number, annotation in enumerate(self.dataset["annotations"], start=1):
            annotation["id"] = number
        super().createIndex()


class PanopticFile(_File, COCOPanoptic):
    """Interface to a panoptic annotation file, see `InstancesFile`."""

    def createIndex(self) -> None:  # noqa: N802
        self.dataset.setdefault("images", [])
        self.notices = annotations.check_panoptic(self.dataset, self.name)
        annotations.check_segment_boxes(self.dataset, self.name)
        super().createIndex()
        for annotation in self.dataset["annotations"]:
            self.imgs[annotation["image_id"]]["segm_file"] = annotation["file_name"]
        self.anns = {(part["image_id"], part["id"]): part for parts in self.imgToAnns.values() for part in parts}

    def get_ann_ids(self, img_ids: Sequence[Any] = (), *_, **__) -> list[tuple[Any, int]]:
        """Return keys of all segments of images. An id alone would stand for segments of every image that has it."""
        return [(number, part["id"]) for number in img_ids for part in self.imgToAnns[number]]

    def load_anns(self, ids: Sequence[tuple[Any, int]] = ()) -> list[dict]:
        """Return the segments of keys."""
        return [self.anns[key] for key in ids]


def read_instances(dataset: CocoDataset, file: str) -> InstancesFile:
    """Read the annotation file of a data set, and check it against the data set's settings and images.

    Args:
        dataset: Data set.
        file: Local copy of its annotation file.

    Raises:
        InputError: The file or its images do not fit.
    """
    coco = InstancesFile(file, dataset.ann_file)
    names = dict(zip(coco.get_cat_ids(dataset.metainfo["classes"]), dataset.metainfo["classes"], strict=True))
    if coco.mask_error and any(getattr(step, "with_mask", False) for step in steps(dataset.pipeline)):
        raise coco.mask_error
    _tell(coco, coco.dataset["annotations"], names)
    _check_images(dataset, coco, {entry["image_id"] for entry in coco.anns.values() if entry["category_id"] in names})
    return coco


def read_panoptic(dataset: CocoPanopticDataset, file: str) -> PanopticFile:
    """Read the panoptic annotation file of a data set, see `read_instances`."""
    meta = dataset.metainfo
    classes, things, stuff = (list(meta[key]) for key in ("classes", "thing_classes", "stuff_classes"))
    if classes != things + stuff:
        raise InputError(
            "the data set's metainfo needs classes=(*thing_classes, *stuff_classes), because mmdet's heads number "
            f"things first: it has {len(classes)} classes, {len(things)} thing_classes, {len(stuff)} stuff_classes"
        )
    coco = PanopticFile(file, dataset.ann_file)
    names = dict(zip(coco.get_cat_ids(classes), classes, strict=True))
    thing_names = annotations.thing_names(coco.dataset["categories"], coco.name, classes, things)
    for category in coco.dataset["categories"]:
        category["isthing"] = int(category["name"] in thing_names)
    segments = [part for annotation in coco.dataset["annotations"] for part in annotation["segments_info"]]
    _tell(coco, segments, names)
    used = {
        part["image_id"] for part in segments if part["category_id"] in names and names[part["category_id"]] in things
    }
    _check_images(dataset, coco, used)
    return coco


def parse_panoptic(dataset: CocoPanopticDataset, raw_data_info: dict) -> dict:
    """Parse the annotation of an image as mmdet does, with its PNG file by name, and other classes as void."""
    image, segments = raw_data_info["raw_img_info"], raw_data_info["raw_ann_info"]
    chosen = [part for part in segments if part["category_id"] in dataset.cat2label]
    info = _mmdet_parse_panoptic(dataset, {"raw_img_info": image, "raw_ann_info": chosen})
    if info["seg_map_path"]:
        info["seg_map_path"] = os.path.join(dataset.data_prefix["seg"], image["segm_file"])
    known = {part["id"] for part in info["segments_info"]}
    void = [{"id": part["id"], "category": VOID_LABEL, "is_thing": False} for part in segments]
    info["segments_info"] += [part for part in void if part["id"] not in known]
    return info


def class_ids(
    coco: COCO, cat_names: Sequence[str] = (), sup_names: Sequence[str] = (), cat_ids: Sequence[int] = ()
) -> list[int]:
    """Return category ids, those of names in the order of the names. mmdet numbers its labels so."""
    if not cat_names or sup_names or cat_ids:
        return _mmdet_class_ids(coco, cat_names, sup_names, cat_ids)
    names = [cat_names] if isinstance(cat_names, str) else cat_names
    return annotations.class_ids(coco.dataset["categories"], getattr(coco, "name", "the annotation file"), names)


class _Ordered:
    """COCO's evaluation, with the classes' numbers in the order in which its user asked for the classes."""

    def evaluate(self) -> None:
        self.asked = list(self.params.catIds)
        super().evaluate()

    def accumulate(self, p: object = None) -> None:
        super().accumulate(p)
        if self.params.useCats:  # evaluate has sorted the ids
            order = np.searchsorted(self.params.catIds, self.asked)
            for key in ("precision", "scores"):
                self.eval[key] = self.eval[key][:, :, order]
            self.eval["recall"] = self.eval["recall"][:, order]


class _OrderedEval(_Ordered, COCOeval):
    pass


class _OrderedEvalMP(_Ordered, COCOevalMP):
    pass


def _tell(coco: _File, entries: Iterable[dict], names: dict) -> None:
    """Log what was left out, and the classes that have no annotation."""
    for notice in coco.notices:
        print_log(notice, "current", logging.WARNING)
    absent = annotations.absent_classes(entries, names)
    if absent:
        what = f"no annotation of {len(absent)} of the {len(names)} classes: {annotations.some(absent)}"
        print_log(f"{coco.name} has {what}", "current", logging.WARNING)


def _check_images(dataset: CocoDataset, coco: _File, used: set) -> None:
    """Check that the images exist that a data set may read: those in `used` if it leaves out others, and their PNGs."""
    if dataset.backend_args or dataset._indices is not None or not is_local(dataset.ann_file):
        return
    leaves_out = not dataset.test_mode and (dataset.filter_cfg or {}).get("filter_empty_gt", False)
    images = [image for image in coco.dataset["images"] if image["id"] in used or not leaves_out]
    for prefix, key, entry in (("img", "file_name", "images"), ("seg", "segm_file", "annotations")):
        folder = dataset.data_prefix.get(prefix)
        if folder and (prefix == "img" or isinstance(coco, PanopticFile)):
            i = first_missing(os.path.join(folder, image[key]) for image in images)
            if i is not None:
                raise InputError(
                    f"no file at {os.path.join(folder, images[i][key])}, which {coco.name} names in '{entry}' (image "
                    f"{images[i]['id']}): put it there, or set the data set's data_root and data_prefix"
                )
            for i in np.linspace(0, len(images) - 1, min(len(images), SAMPLED_FILES)).astype(int):
                _check_size(os.path.join(folder, images[i][key]), images[i], coco.name)


def _check_size(file: str, image: dict, ann_file: str) -> None:
    """Check the size in a file's header. What the header leaves open is checked when the file is read."""
    with suppress(OSError, Image.DecompressionBombError), Image.open(file) as opened:
        sizes = {opened.size}
        if opened.getexif().get(ExifTags.Base.Orientation, 1) > 4:  # turned, unless the pipeline ignores it
            sizes.add(opened.size[::-1])
        if (image["width"], image["height"]) not in sizes:
            raise wrong_size(file, opened.size[::-1], (image["height"], image["width"]), ann_file, image["id"])


_mmdet_class_ids = COCO.get_cat_ids
_mmdet_parse_panoptic = CocoPanopticDataset.parse_data_info

# Set on mmdet's own classes, so that the user's subclasses of them read their files in the same way.
CocoDataset.COCOAPI = read_instances
CocoPanopticDataset.COCOAPI = read_panoptic
CocoPanopticDataset.parse_data_info = parse_panoptic
COCO.get_cat_ids = class_ids
coco_metric.COCO = InstancesFile
for _metric in (coco_metric, ov_coco_metric):
    _metric.COCOeval = _OrderedEval
    _metric.COCOevalMP = _OrderedEvalMP
