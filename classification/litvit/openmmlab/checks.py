"""Checks of data sets, labels and files before and while they are read."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dataset import Compose
from mmengine.logging import print_log
from PIL import Image
from torch import nn

from litvit.data.workers import reading
from litvit.errors import InputError, is_from_user_code, one_line
from litvit.openmmlab.annotations import some
from litvit.openmmlab.errors import SampleError

FIX_CLASSES = "set the datasets' metainfo=dict(classes=...) and the heads' num_classes to those of the annotations"


# Label of pixels without a class, from the moment on that a label file is read.
VOID_LABEL = 255

# Attributes of heads, losses, preprocessors, pipeline steps and metrics that hold the label of void pixels.
_VOID_SETTINGS = ("ignore_index", "ignore_label", "seg_pad_val", "seg_pad_value")

# Losses that compare each class with all others. Their `ignore_index` may name a class that they leave out.
_LOSSES_PER_CLASS = ("DiceLoss", "HuasdorffDisstanceLoss", "TverskyLoss")

# Number of label files, or of images' headers, that are looked at before a training.
SAMPLED_FILES = 500


def check_data_settings(dataset: dict) -> None:
    """Check a data set's config: that its files and folders exist, and that lists of names are no single names.

    Raises:
        InputError: They are not.
    """
    for part in [dataset["dataset"]] if "dataset" in dataset else dataset.get("datasets", []):
        check_data_settings(part)
    _check_names(dataset.get("metainfo") or {})
    root = dataset.get("data_root") or ""
    if not is_local(root):
        return
    files = [dataset.get("ann_file"), *(dataset.get("data_prefix") or {}).values()]
    for file in filter(None, files):
        path = Path(root, file)
        if is_local(file) and not path.exists():
            where = f" (data_root is {root})" if root else ""
            raise InputError(
                f"no data at {path}{where}: put it there, or set the config's data_root, ann_file, data_prefix"
            )


def _check_names(metainfo: dict) -> None:
    for key in ("classes", "thing_classes", "stuff_classes"):
        names = metainfo.get(key)
        if isinstance(names, str):
            if os.path.isfile(names):  # mmengine reads a class per line from it
                continue
            raise InputError(
                f"metainfo.{key} is the text '{names}', not a tuple of names: a tuple of one name has a comma, "
                f"{key}=('{names}',)"
            )
        if wrong := [name for name in names or () if not isinstance(name, str)]:
            raise InputError(f"metainfo.{key} has {wrong[0]!r}, which is no name: write names as text")
        if twice := [name for i, name in enumerate(names or ()) if name in names[:i]]:
            raise InputError(f"metainfo.{key} has '{twice[0]}' twice: name each class once")
    palette = metainfo.get("palette") or ()
    if isinstance(palette, str) or all(isinstance(color, Sequence) and len(color) == 3 for color in palette):
        return
    raise InputError(
        f"metainfo.palette is {palette}, not a list of colours (red, green, blue): one colour is [(255, 0, 0)]"
    )


def is_local(path: str) -> bool:
    """Return whether a path is one of a file system, not of a remote store."""
    return "://" not in path


def first_missing(files: Iterable[str]) -> int | None:
    """Return the position of the first file that does not exist; None if all do, or are in a remote store."""
    listed = {}  # folders are listed: asking for every file takes long on a network's file system
    for i, file in enumerate(files):
        folder, name = os.path.split(file)
        if not file or not is_local(file):
            continue
        if folder not in listed:
            listed[folder] = set(os.listdir(folder or ".")) if os.path.isdir(folder or ".") else set()
        if name not in listed[folder]:
            return i
    return None


def steps(pipeline: Any) -> Iterator[Any]:
    """Yield the steps of a pipeline, and those inside of steps that choose or repeat others."""
    plain = isinstance(pipeline, list | tuple)  # of a wrapper that mixes images
    for parts in [pipeline] if plain else [getattr(pipeline, name, ()) for name in ("transforms", "subroutines")]:
        for step in parts if isinstance(parts, list | tuple) else [parts]:
            yield step
            yield from steps(step)


def base_datasets(dataset: Any) -> Iterator[Any]:
    """Yield the data sets inside of wrappers that repeat, concatenate or mix data sets."""
    inner = _wrapped(dataset)
    for part in inner:
        yield from base_datasets(part)
    if not inner:
        yield dataset


def _wrapped(dataset: Any) -> Sequence[Any]:
    return [dataset.dataset] if hasattr(dataset, "dataset") else getattr(dataset, "datasets", [])


def check_classes(dataset: Any, model: nn.Module) -> None:
    """Check the number of classes of a COCO data set against a detector's heads.

    Raises:
        InputError: A head has another number of classes.
    """
    if not hasattr(dataset, "cat_ids"):
        return
    meta = dataset.metainfo
    things = len(meta.get("thing_classes", meta.get("classes", ())))
    for name, head in model.named_modules():
        for key, expected in (
            ("num_classes", things if name.endswith(("bbox_head", "mask_head")) else None),
            ("num_things_classes", things),
            ("num_stuff_classes", len(meta.get("stuff_classes", ()))),
        ):
            found = getattr(head, key, expected) if name else expected
            if expected is not None and found != expected:
                kind = {"num_classes": "classes"}.get(key, key[4:].replace("_", " "))
                raise InputError(f"{name} has {found} {kind}, the data set {expected}: {FIX_CLASSES}")
        if "stuff_classes" in meta and name.startswith(("semantic_head", "data_preprocessor")):
            _unify_void(head, name, VOID_LABEL)


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
    samples = [dataset.get_data_info(i) for i in range(len(dataset))]
    files = [] if dataset.backend_args else [sample.get("seg_map_path", "") for sample in samples]
    i = first_missing(files)
    if i is not None:
        raise InputError(
            f"{samples[i]['img_path']} has no annotation at {samples[i]['seg_map_path']}: put it there, remove the "
            "image, or set the data set's seg_map_suffix"
        )
    _check_labels(dataset.pipeline, _LabelCheck(classes, dataset.ignore_index, dataset.reduce_zero_label))


def unify_void(dataset: Any, model: nn.Module) -> None:
    """Have a segmentor and the steps of pipelines take 255 for void, to which labels are mapped when they are read.

    Args:
        dataset: Data set, a `BaseSegDataset` or a wrapper of some, which may have a pipeline too. The `ignore_index` of
            a `BaseSegDataset` is the label of void pixels in its files, besides 255.
        model: Segmentor.

    Raises:
        InputError: A head, a loss, the preprocessor or a step is set to another label.
    """
    inner = _wrapped(dataset)
    for part in inner:
        unify_void(part, model)
    for base in base_datasets(dataset):
        for step in steps(getattr(dataset, "pipeline", ())):
            _unify_void(step, type(step).__name__, base.ignore_index)
    if not inner:
        for name, module in model.named_modules():
            if not type(module).__module__.startswith("torch."):
                _unify_void(module, name, dataset.ignore_index)


def _unify_void(owner: Any, name: str, ignored: int) -> None:
    padding = getattr(owner, "pad_val", None)  # of mmcv's Pad
    settings = {key: getattr(owner, key, None) for key in _VOID_SETTINGS}
    settings["pad_val.seg"] = padding.get("seg") if isinstance(padding, dict) else None
    for key, value in settings.items():
        if not isinstance(value, int | float):
            continue
        if type(owner).__name__ in _LOSSES_PER_CLASS and value != ignored:
            continue
        if value not in (VOID_LABEL, ignored):
            raise InputError(
                f"{name}.{key} is {value}, but the data set's label of void pixels is {ignored}: leave it out, or set "
                "it and the data set's ignore_index to one label (that it leaves out a class is not supported)"
            )
        if key == "pad_val.seg":
            padding["seg"] = VOID_LABEL
        else:
            setattr(owner, key, VOID_LABEL)


def check_metric(metric: Any, dataset: Any) -> None:
    """Check an evaluator's metric against the data set that it measures.

    Args:
        metric: Metric of mmdet or mmseg.
        dataset: Data set.

    Raises:
        InputError: They take different labels for void, or the metric's annotation file lacks classes, masks or images.
    """
    if hasattr(dataset, "reduce_zero_label"):
        _unify_void(metric, type(metric).__name__, dataset.ignore_index)
    if getattr(metric, "format_only", False) or not hasattr(dataset, "cat_ids"):
        return
    coco, truth = getattr(metric, "_coco_api", None), getattr(metric, "truth", None)
    if hasattr(coco, "mask_error"):  # read by litvit.openmmlab.coco, not by another package
        file, images = coco.name, coco.imgs
        coco.get_cat_ids(dataset.metainfo["classes"])
        if not coco.anns:
            raise InputError(f"{file} has no annotations to compare with: name another ann_file of the evaluator")
        if "segm" in metric.metrics and coco.mask_error:
            raise coco.mask_error
    elif truth is not None:
        file, images = truth.ann_file, truth.images
        metric.dataset_meta = dataset.metainfo
        metric.check_classes()
    else:
        return
    for i in range(len(dataset)):
        number = dataset.get_data_info(i)["img_id"]
        if number not in images:
            raise InputError(
                f"{file} has no image {number}, but {dataset.ann_file} has: name the data set's annotation file as the "
                "evaluator's ann_file"
            )


def sample_labels(datasets: Sequence[Any], tell: bool) -> None:
    """Look at label files of mmseg's data sets, as many as `SAMPLED_FILES`, and at no more once all classes are seen.

    Args:
        datasets: Data sets with the same classes, that `check_annotations` has checked.
        tell: Whether to log which classes no pixel has.

    Raises:
        InputError: A label is wrong, or no pixel of any file has a class.
    """
    total, looked_at = sum(map(len, datasets)), 0
    absent = set(range(len(datasets[0].metainfo["classes"])))
    samples = [(dataset, i) for dataset in datasets for i in range(len(dataset))]
    for position in np.linspace(0, total - 1, min(total, SAMPLED_FILES)).astype(int):
        dataset, i = samples[position]
        parts = dataset.pipeline.transforms
        at = next((k for k, step in enumerate(parts) if isinstance(step, _LabelCheck)), None)
        if at is None:
            return
        try:
            labels = parts[at](parts[at - 1](dataset.get_data_info(i)))["gt_seg_map"]
        except SampleError as error:  # every process looks at the same files
            raise InputError(str(error)) from error
        absent -= set(np.flatnonzero(np.bincount(labels.ravel())).tolist())
        looked_at += 1
        if not absent:
            return
    names = datasets[0].metainfo["classes"]
    where = f"no pixel of {looked_at} label files" + ("" if looked_at == total else f", a sample of {total},")
    if len(absent) == len(names) and looked_at == total:
        raise InputError(f"{where} is of a class: {FIX_CLASSES}, reduce_zero_label and ignore_index")
    if tell:
        what = f"{len(absent)} of the {len(names)} classes: {some(names[i] for i in sorted(absent))}"
        print_log(f"{where} is of {what}", "current", logging.WARNING)


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


def check_files(pipeline: Compose, ann_file: str = "") -> None:
    """Wrap a pipeline's steps that load a file, so that they name a file that cannot be read, or is of another size.

    Args:
        pipeline: Pipeline of a data set.
        ann_file: Annotation file with the sizes of images, for messages; "" if they are in a file per image.
    """
    # Not at the top: import_package reports a missing mmcv.
    from mmcv.transforms import LoadAnnotations, LoadImageFromFile

    for i, step in enumerate(pipeline.transforms):
        if isinstance(step, LoadImageFromFile | LoadAnnotations):
            pipeline.transforms[i] = _Loading(step, isinstance(step, LoadAnnotations), ann_file)
        for part in getattr(step, "subroutines", []):
            check_files(part, ann_file)


def wrong_size(file: str, found: Sequence[int], stated: Sequence[int], ann_file: str, image_id: Any) -> InputError:
    """Return the error for a file of `found` (height, width), of which its annotation file says `stated`."""
    sides = (" x ".join(map(str, shape)) for shape in (found, stated))
    where = f"{ann_file}: correct 'height' and 'width' of image {image_id} there" if ann_file else "its annotation"
    return InputError("{} is {} pixels high x wide, but {} in {}".format(file, *sides, where))


class _Loading:
    """Step of a pipeline that loads an image or its annotation."""

    def __init__(self, step: Callable[[dict], dict], annotation: bool, ann_file: str) -> None:
        self.step = step
        self.annotation = annotation
        self.ann_file = ann_file

    def __call__(self, results: dict) -> dict:
        stated = results.get("height"), results.get("width")
        reading(str(results.get("img_path", "")))
        try:
            results = self.step(results)
        except Exception as error:  # a broken file can raise nearly anything
            if is_from_user_code(error):
                raise
            file = results["img_path"]
            if self.annotation:
                file = results.get("seg_map_path") or f"the annotation of {file}"
            reason = str(error) if isinstance(error, InputError) else one_line(error)
            raise SampleError(f"{file} cannot be read: {reason}") from error
        if not self.annotation and None not in stated and stated != tuple(results["ori_shape"][:2]):
            found = tuple(results["ori_shape"][:2])
            error = wrong_size(results["img_path"], found, stated, self.ann_file, results.get("img_id"))
            raise SampleError(str(error))
        return results


class _LabelCheck:
    """Step of mmseg's pipelines that refuses labels in colours, of another size than the image, or above the classes.

    The label that the data set ignores becomes 255, which everything else takes for void. With wrong labels training
    would end in an assertion on the GPU or learn from shifted labels, and evaluation would leave them out.
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
        is_void = (labels == self.ignored) | (labels == VOID_LABEL)
        cut_off = []  # labels of more than 8 bits, to which mmseg has cut them
        # Reads the header. A file in a remote store is not checked, nor one too large for Pillow.
        with suppress(OSError, Image.DecompressionBombError), Image.open(file) as image:
            if image.mode[0] in "IF":
                pixels = np.asarray(image)
                wide = (pixels < 0) | (pixels > 255)
                is_void = np.where(wide, pixels == self.ignored, is_void)
                cut_off = pixels[wide & ~is_void]
        wrong = np.append(cut_off, labels[(labels >= self.classes) & ~is_void].astype(int) + first).astype(int)
        if wrong.size:
            raise SampleError(
                f"{file} has label {wrong[0]}, but the classes are {first} to {last}: "
                f"{FIX_CLASSES}, reduce_zero_label=True if label 0 is no class, ignore_index to a label that is void"
            )
        results["gt_seg_map"] = np.where(is_void, np.uint8(VOID_LABEL), labels)
        return results
