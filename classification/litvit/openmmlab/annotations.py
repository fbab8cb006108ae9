"""Checks of COCO's annotation files: of boxes and masks, and of panoptic segments.

An annotation file is checked as a whole when it is read. What can be read in one way only is mended in place. Anything
else is an `InputError` that names file, entry and key. The checks go over the entries once per key, so that COCO's
860,000 annotations take seconds.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import chain
from pathlib import PurePath
from typing import Any

import numpy as np

from litvit.errors import InputError

_ID = (int, str)
_NUMBER = (int, float)
_FLAG = (int, float, bool)


def check_instances(content: Any, file: str) -> list[str]:
    """Check an annotation file of boxes and masks, and mend it in place.

    A missing `iscrowd` is 0, a missing `area` that of the box. Annotations of images that the file lacks are left out.
    Ids of annotations are not looked at.

    Args:
        content: Content of the JSON file.
        file: Name of the file for messages.

    Returns:
        Sentences on what was left out, or what may be wrong.

    Raises:
        InputError: The file is no COCO file, or an entry lacks a key or has a wrong value.
    """
    images = _check_images(content, file)
    categories = _check_categories(content, file)
    content.setdefault("annotations", [])  # COCO's test sets have none
    part = "annotations"
    notices = _leave_out_strangers(content, file, {image["id"]: image for image in images})
    annotations = content[part]
    for annotation in annotations:
        annotation.setdefault("iscrowd", 0)
    boxes = _numbers(annotations, "bbox", file, part, 4, "[x, y, width, height]")
    _check(annotations, "bbox", file, part, (boxes[:, 2:] >= 0).all(axis=1), "has a negative width or height")
    known = {category["id"] for category in categories}
    _values(annotations, "category_id", file, part, _ID, known.__contains__, "is the id of no category")
    _values(annotations, "iscrowd", file, part, _FLAG, (0, 1).__contains__, "is neither 0 nor 1")
    for i, annotation in enumerate(annotations):
        area = annotation.get("area")
        if type(area) not in _NUMBER or not area > 0:
            annotation["area"] = float(boxes[i, 2] * boxes[i, 3])
    row = {image["id"]: i for i, image in enumerate(images)}
    sizes = np.array([(image["width"], image["height"]) for image in images], dtype=float).reshape(-1, 2)
    limits = sizes[np.array([row[annotation["image_id"]] for annotation in annotations], dtype=int)]
    start, end = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    empty = (boxes[:, 2:] < 1) | (start >= limits) | (end <= 0)
    for wrong, problem in (
        (empty.any(axis=1), "are smaller than a pixel or outside of their image, and training leaves them out"),
        ((end > limits + 1).any(axis=1), "reach out of their image: `bbox` is [x, y, width, height]"),
    ):
        if wrong.any():
            first = _entry(annotations, part, int(wrong.argmax()))
            notices.append(f"{file}: {wrong.sum()} of {len(boxes)} boxes {problem} (the first: {first})")
    return notices


def check_masks(content: dict, file: str) -> None:
    """Check the masks of a file that `check_instances` has checked, and drop parts of fewer than three points.

    Raises:
        InputError: An annotation has no mask, or one that fits no image.
    """
    part, annotations = "annotations", content["annotations"]
    masks = _values(annotations, "segmentation", file, part, (list, dict))
    polygons = [mask if type(mask) is list else [] for mask in masks]
    problem = "is no list of polygons [x1, y1, x2, y2, ...]"
    if not set(map(type, chain.from_iterable(polygons))) <= {list}:
        _check(annotations, "segmentation", file, part, [set(map(type, mask)) <= {list} for mask in polygons], problem)
    lengths = set(map(len, chain.from_iterable(polygons)))
    if any(length % 2 for length in lengths):
        _check(annotations, "segmentation", file, part, [not any(len(x) % 2 for x in y) for y in polygons], problem)
    if min(lengths, default=6) < 6:
        for i, mask in enumerate(polygons):
            if whole := [polygon for polygon in mask if len(polygon) >= 6]:
                polygons[i] = annotations[i]["segmentation"] = whole
    ok = [
        type(mask) is dict or max(map(len, polygon), default=0) >= 6
        for mask, polygon in zip(masks, polygons, strict=True)
    ]
    _check(annotations, "segmentation", file, part, ok, "has no polygon of at least three points")
    if not set(map(type, chain.from_iterable(chain.from_iterable(polygons)))) <= set(_NUMBER):
        ok = [set(map(type, chain.from_iterable(mask))) <= set(_NUMBER) for mask in polygons]
        _check(annotations, "segmentation", file, part, ok, "has a coordinate that is no number")
    sizes = {image["id"]: [image["height"], image["width"]] for image in content["images"]}
    for i, mask in enumerate(masks):
        if isinstance(mask, dict):
            size, counts = sizes[annotations[i]["image_id"]], mask.get("counts")
            ok = isinstance(counts, str) or (isinstance(counts, list) and sum(counts) == size[0] * size[1])
            if not ok or list(mask.get("size", ())) != size:
                problem = f"is no run-length encoding of its image's {size[0]} x {size[1]} pixels (height x width)"
                raise InputError(f"{file}: 'segmentation' of {_entry(annotations, part, i)} {problem}")


def check_panoptic(content: Any, file: str) -> list[str]:
    """Check a panoptic annotation file, and mend it in place.

    A missing `iscrowd` is 0. A missing `file_name` of an annotation is that of its image, with .png. Annotations of
    images that the file lacks are left out.

    Args:
        content: Content of the JSON file.
        file: Name of the file for messages.

    Returns:
        Sentences on what was left out.

    Raises:
        InputError: The file is no COCO panoptic file, or an entry lacks a key or has a wrong value.
    """
    categories = _check_categories(content, file)
    content.setdefault("annotations", [])  # COCO's test set has none
    _values(_entries(content, "annotations", file), "segments_info", file, "annotations", (list,))
    images = _check_images(content, file) if "images" in content else None
    known = {image["id"]: image for image in images} if images is not None else None
    notices = _leave_out_strangers(content, file, known)
    annotations = content["annotations"]
    twice = _repeated(annotation["image_id"] for annotation in annotations)
    ok = [annotation["image_id"] not in twice for annotation in annotations]
    _check(annotations, "image_id", file, "annotations", ok, "is the image of another annotation too")
    for annotation in annotations:
        if known is not None and "file_name" not in annotation:
            annotation["file_name"] = str(PurePath(known[annotation["image_id"]]["file_name"]).with_suffix(".png"))
    _values(annotations, "file_name", file, "annotations", (str,))
    ids = {category["id"] for category in categories}
    segments, part = _segments(annotations)
    if not set(map(type, segments)) <= {dict}:
        raise InputError(f"{file}: an entry of 'segments_info' is no object with keys")
    for segment in segments:
        segment.setdefault("iscrowd", 0)
    _values(segments, "id", file, part, (int,), lambda number: 0 < number < 256**3, "is no id from 1 to 16777215")
    _values(segments, "category_id", file, part, _ID, ids.__contains__, "is the id of no category")
    _values(segments, "iscrowd", file, part, _FLAG, (0, 1).__contains__, "is neither 0 nor 1")
    ok = [len({x["id"] for x in one["segments_info"]}) == len(one["segments_info"]) for one in annotations]
    _check(annotations, "segments_info", file, "annotations", ok, "has one id twice")
    return notices


def check_segment_boxes(content: dict, file: str) -> None:
    """Check the boxes and areas of the segments of a file that `check_panoptic` has checked.

    Raises:
        InputError: A segment lacks one.
    """
    segments, part = _segments(content["annotations"])
    _numbers(segments, "bbox", file, part, 4, "[x, y, width, height]")
    _values(segments, "area", file, part, _NUMBER)


def class_ids(categories: Iterable[dict], file: str, classes: Sequence[str]) -> list[Any]:
    """Return the category id of each class, in the order of the classes.

    Args:
        categories: Categories of an annotation file.
        file: Name of the file for messages.
        classes: Names of the classes.

    Raises:
        InputError: The file has no category of such a name, or two.
    """
    ids = {}
    for category in categories:
        ids.setdefault(category["name"], []).append(category["id"])
    if missing := [str(name) for name in classes if name not in ids]:
        raise InputError(
            f"{file} has no class {some(missing)}: its classes are {some(ids)}; set the data sets' "
            "metainfo=dict(classes=...) and the heads' num_classes to classes of the annotations"
        )
    for name in classes:
        if len(ids[name]) > 1:
            raise InputError(f"{file} has {len(ids[name])} categories with the name '{name}' (ids {some(ids[name])})")
    return [ids[name][0] for name in classes]


def thing_names(
    categories: Iterable[dict], file: str, classes: Collection[str], things: Collection[str] | None
) -> set[str]:
    """Return which classes of a panoptic file are things.

    Args:
        categories: Categories of the file, with `isthing`; without it, `things` is asked.
        file: Name of the file for messages.
        classes: Names of the classes that count.
        things: Names of the things in the config, if it has any.

    Raises:
        InputError: File and config differ, or neither knows.
    """
    found = set()
    for i, category in enumerate(categories):
        name, isthing = category["name"], category.get("isthing")
        if name not in classes:
            continue
        if isthing not in (None, 0, 1) or (isthing is None and things is None):
            raise InputError(f"{file}: categories[{i}] ({name}) needs an 'isthing' of 0 or 1")
        if isthing is not None and things is not None and bool(isthing) != (name in things):
            config = "names it" if name in things else "does not name it"
            raise InputError(
                f"{file}: 'isthing' of categories[{i}] ({name}) is {isthing}, but the config {config} in thing_classes"
            )
        if isthing or (isthing is None and name in things):
            found.add(name)
    return found


def absent_classes(annotations: Iterable[dict], ids: dict[Any, str]) -> list[str]:
    """Return the names of the classes that no annotation has, crowds apart.

    Args:
        annotations: Annotations with boxes, or segments.
        ids: Name of each category id.
    """
    found = {annotation["category_id"] for annotation in annotations if not annotation["iscrowd"]}
    return [name for number, name in ids.items() if number not in found]


def _check_images(content: Any, file: str) -> list[dict]:
    images = _entries(content, "images", file)
    twice = _repeated(_values(images, "id", file, "images", _ID))
    _check(images, "id", file, "images", [image["id"] not in twice for image in images], "is another image's too")
    _values(images, "file_name", file, "images", (str,))
    for side in ("width", "height"):
        _values(images, side, file, "images", _NUMBER, lambda x: x >= 1 and float(x).is_integer(), "is no size")
        for image in images:
            image[side] = int(image[side])
    return images


def _check_categories(content: Any, file: str) -> list[dict]:
    categories = _entries(content, "categories", file)
    twice = _repeated(_values(categories, "id", file, "categories", (int,)))  # pycocotools finds no other
    ok = [category["id"] not in twice for category in categories]
    _check(categories, "id", file, "categories", ok, "is another category's too")
    _values(categories, "name", file, "categories", (str,))
    return categories


def _leave_out_strangers(content: dict, file: str, images: dict | None) -> list[str]:
    """Leave out annotations of images that the file lacks, as files have that were cut down to some images."""
    annotations = _entries(content, "annotations", file)
    owners = _values(annotations, "image_id", file, "annotations", _ID)
    strangers = [i for i, owner in enumerate(owners) if images is not None and owner not in images]
    if not strangers:
        return []
    entry = f"'image_id' of {_entry(annotations, 'annotations', strangers[0])} is {owners[strangers[0]]!r}"
    if len(strangers) == len(annotations):
        raise InputError(f"{file}: {entry}, and no annotation has an id of 'images'")
    count = f"{len(strangers)} of {len(annotations)} annotations"
    content["annotations"] = [annotation for annotation in annotations if annotation["image_id"] in images]
    return [f"{file}: {count} are of images that the file lacks, and left out (the first: {entry})"]


def _entries(content: Any, key: str, file: str) -> list[dict]:
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list) or not set(map(type, entries)) <= {dict}:
        raise InputError(f"{file} is no COCO annotation file: it has no list '{key}' of objects with keys")
    return entries


def _segments(annotations: list[dict]) -> tuple[list[dict], Callable[[int], str]]:
    """Return all segments of a panoptic file, and a function that names one."""
    segments = list(chain.from_iterable(annotation["segments_info"] for annotation in annotations))

    def name(i: int) -> str:
        for number, annotation in enumerate(annotations):
            if i < len(annotation["segments_info"]):
                return f"annotations[{number}].segments_info[{i}] (image {annotation['image_id']})"
            i -= len(annotation["segments_info"])
        raise IndexError

    return segments, name


def _values(
    entries: list[dict],
    key: str,
    file: str,
    part: str | Callable[[int], str],
    types: tuple[type, ...],
    accept: Callable[[Any], bool] | None = None,
    problem: str = "",
) -> list[Any]:
    """Return the values of a key, of the given types, and of values that are accepted."""
    try:
        values = [entry[key] for entry in entries]
    except KeyError:
        i = next(i for i, entry in enumerate(entries) if key not in entry)
        raise InputError(f"{file}: {_entry(entries, part, i)} has no '{key}'") from None
    if not set(map(type, values)) <= set(types):
        wanted = " or ".join(kind.__name__ for kind in types)
        _check(entries, key, file, part, [type(value) in types for value in values], f"is no {wanted}")
    if accept is not None and not all(map(accept, set(values))):
        _check(entries, key, file, part, map(accept, values), problem)
    return values


def _numbers(
    entries: list[dict], key: str, file: str, part: str | Callable[[int], str], count: int, form: str
) -> np.ndarray:
    """Return the values of a key, lists of finite numbers, as an array (len(entries), count)."""
    values = _values(entries, key, file, part, (list,))
    problem = f"is not {form}, all finite numbers"
    _check(entries, key, file, part, [len(value) == count for value in values], problem)
    if not set(map(type, chain.from_iterable(values))) <= set(_NUMBER):
        _check(entries, key, file, part, [set(map(type, value)) <= set(_NUMBER) for value in values], problem)
    array = np.array(values, dtype=float).reshape(-1, count)
    _check(entries, key, file, part, np.isfinite(array).all(axis=1), problem)
    return array


def _check(
    entries: list[dict], key: str, file: str, part: str | Callable[[int], str], ok: Iterable[bool], problem: str
) -> None:
    """Name the first entry that is not right, if there is one."""
    i = next((i for i, right in enumerate(ok) if not right), None)
    if i is not None:
        value = str(entries[i][key])
        value = value if len(value) <= 60 else f"{value[:60]} ..."
        raise InputError(f"{file}: '{key}' of {_entry(entries, part, i)} is {value}, and {problem}")


def _entry(entries: list[dict], part: str | Callable[[int], str], i: int) -> str:
    if callable(part):
        return part(i)
    label = next((f" ({key} {entries[i][key]})" for key in ("id", "name", "image_id") if key in entries[i]), "")
    return f"{part}[{i}]{label}"


def _repeated(values: Iterable[Any]) -> set[Any]:
    return {value for value, count in Counter(values).items() if count > 1}


def some(values: Iterable[Any]) -> str:
    """Return names for a message, ten at most."""
    values = list(map(str, values))
    return ", ".join(values[:10]) + (f", ... ({len(values)} in all)" if len(values) > 10 else "")
