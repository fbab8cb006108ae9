"""Checks of data sets, labels and files before and while they are read."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dataset import Compose
from PIL import Image
from torch import nn

from litvit.errors import InputError, is_from_user_code
from litvit.openmmlab.errors import SampleError, one_line

FIX_CLASSES = "set the datasets' metainfo=dict(classes=...) and the heads' num_classes to those of the annotations"


def check_data_files(dataset: dict) -> None:
    """Check that the files and folders exist that a data set's config names.

    Raises:
        InputError: One of them does not.
    """
    for part in [dataset["dataset"]] if "dataset" in dataset else dataset.get("datasets", []):
        check_data_files(part)
    root = dataset.get("data_root") or ""
    if "://" in root:
        return
    files = [dataset.get("ann_file"), *(dataset.get("data_prefix") or {}).values()]
    for file in filter(None, files):
        path = Path(root, file)
        if "://" not in file and not path.exists():
            where = f" (data_root is {root})" if root else ""
            raise InputError(
                f"no data at {path}{where}: put it there, or set the config's data_root, ann_file, data_prefix"
            )


def base_datasets(dataset: Any) -> Iterator[Any]:
    """Yield the data sets inside of wrappers that repeat, concatenate or mix data sets."""
    inner = [dataset.dataset] if hasattr(dataset, "dataset") else getattr(dataset, "datasets", [])
    for part in inner:
        yield from base_datasets(part)
    if not inner:
        yield dataset


def check_classes(dataset: Any, model: nn.Module) -> None:
    """Check the classes of a data set against its annotations and a detector's heads.

    Raises:
        InputError: COCO annotations lack classes of the config, or a head has another number of classes.
    """
    classes = (getattr(dataset, "metainfo", None) or {}).get("classes", ())
    found = len(getattr(dataset, "cat_ids", classes))
    if found < len(classes):
        raise InputError(
            f"{dataset.ann_file} has {found} of the config's {len(classes)} classes "
            f"({', '.join(map(str, classes[:3]))} ...): {FIX_CLASSES}"
        )
    if not hasattr(dataset, "cat_ids"):
        return
    things = len(dataset.metainfo.get("thing_classes", classes))
    for name, head in model.named_modules():
        wanted = getattr(head, "num_classes", things)
        if name.endswith(("bbox_head", "mask_head")) and wanted != things:
            raise InputError(f"{name} has {wanted} classes, the data set {things}: {FIX_CLASSES}")


def check_annotations(dataset: Any, num_classes: int) -> None:
    """Check the annotation files of mmseg's data set, and have its labels checked when they are read.

    Args:
        dataset: Data set, a `BaseSegDataset`.
        num_classes: Number of classes of the model.

    Raises:
        InputError: Another number of classes, contradicting settings, or missing annotations.
    """
    classes = len(dataset.metainfo.get("classes") or ())
    if classes != num_classes:
        raise InputError(f"the head has {num_classes} classes, the data set {classes}: {FIX_CLASSES}")
    listed = {}  # folders are listed: asking for every file takes long on a network's file system
    for i in range(len(dataset)):
        sample = dataset.get_data_info(i)
        file = sample.get("seg_map_path", "")
        folder, name = os.path.split(file)
        if not file or "://" in file:
            continue
        if folder not in listed:
            listed[folder] = set(os.listdir(folder or ".")) if os.path.isdir(folder or ".") else set()
        if name not in listed[folder]:
            raise InputError(
                f"{sample['img_path']} has no annotation at {file}: put it there, remove the image, or set the data "
                "set's seg_map_suffix"
            )
    _check_labels(dataset.pipeline, _LabelCheck(classes, dataset.ignore_index, dataset.reduce_zero_label))


def _check_labels(pipeline: Compose, check: "_LabelCheck") -> None:
    """Insert a check after each step that loads labels, including those of test-time augmentation."""
    for i, step in reversed(list(enumerate(pipeline.transforms))):
        if hasattr(step, "reduce_zero_label"):
            if step.reduce_zero_label not in (None, check.zero_label):
                raise InputError(
                    f"the data set has reduce_zero_label={check.zero_label}, {type(step).__name__} in its pipeline "
                    f"(pipeline.{i}) reduce_zero_label={step.reduce_zero_label}: leave it out there"
                )
            pipeline.transforms.insert(i + 1, check)
        for part in getattr(step, "subroutines", []):
            _check_labels(part, check)


def check_files(pipeline: Compose) -> None:
    """Wrap a pipeline's steps that load a file, so that they name a file that cannot be read."""
    # Not at the top: import_package reports a missing mmcv.
    from mmcv.transforms import LoadAnnotations, LoadImageFromFile

    for i, step in enumerate(pipeline.transforms):
        if isinstance(step, LoadImageFromFile | LoadAnnotations):
            pipeline.transforms[i] = _Loading(step, isinstance(step, LoadAnnotations))
        for part in getattr(step, "subroutines", []):
            check_files(part)


class _Loading:
    """Step of a pipeline that loads an image or its annotation."""

    def __init__(self, step: Callable[[dict], dict], annotation: bool) -> None:
        self.step = step
        self.annotation = annotation

    def __call__(self, results: dict) -> dict:
        try:
            return self.step(results)
        except Exception as error:  # a broken file can raise nearly anything
            if is_from_user_code(error):
                raise
            file = results["img_path"]
            if self.annotation:
                file = results.get("seg_map_path") or f"the annotation of {file}"
            raise SampleError(f"{file} cannot be read: {one_line(error)}") from error


class _LabelCheck:
    """Step of mmseg's pipelines that refuses labels in colours, of another size than the image, or above the classes.

    With such labels training would end in an assertion on the GPU or learn from shifted labels, and evaluation would
    leave them out.
    """

    def __init__(self, classes: int, ignored: int, zero_label: bool) -> None:
        self.classes = classes
        self.ignored = ignored
        self.zero_label = zero_label  # whether the file's label 0 is no class, and 1 is the first class

    def __call__(self, results: dict) -> dict:
        file, labels = results["seg_map_path"], results["gt_seg_map"]
        if labels.ndim > 2:
            raise SampleError(
                f"{file} has {labels.shape[2]} channels, but a pixel's label is one number: save one channel, or a "
                "palette's indices"
            )
        size = tuple(results.get("ori_shape", labels.shape)[:2])
        if labels.shape != size:
            sides = " x ".join(map(str, labels.shape)), " x ".join(map(str, size))
            raise SampleError(f"{file} is {sides[0]} pixels high x wide, its image {results['img_path']} {sides[1]}")
        first, last = int(self.zero_label), self.zero_label + self.classes - 1
        wrong = labels[(labels >= self.classes) & (labels != self.ignored)].astype(int) + first
        with suppress(OSError), Image.open(file) as image:  # reads the header; a file in a remote store is not checked
            if image.mode[0] in "IF":  # more than 8 bits, to which mmseg has cut the labels
                pixels = np.asarray(image)
                wrong = np.append(pixels[(pixels < 0) | (pixels > 255)], wrong)
        if wrong.size:
            raise SampleError(
                f"{file} has label {wrong[0]}, but the classes are {first} to {last}: "
                f"{FIX_CLASSES}, and reduce_zero_label=True if label 0 is no class"
            )
        return results
