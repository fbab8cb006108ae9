"""Panoptic quality as COCO counts it ("Panoptic Segmentation", CVPR 2019, section 4), from COCO's panoptic files."""

import json
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchmetrics import detection

from litvit.errors import InputError

# A category id that no data set has: pixels of it are void.
VOID = -1


class PanopticQuality(detection.PanopticQuality):
    """PQ, SQ and RQ in percent, for all categories, for things and for stuff.

    torchmetrics stores the counts. They are computed here, because torchmetrics has no crowds, and ignores what a
    prediction leaves void in the union and in the false negatives. COCO's rules:

    - Two segments of one category match if IoU > 0.5; pixels that are void in the ground truth are not in the union.
    - An unmatched segment of the ground truth is a false negative, except a crowd, which never matches.
    - An unmatched prediction is a false positive, unless more than half of it is void or crowd of its category.

    Args:
        things: Category ids of things.
        stuffs: Category ids of stuff.
        kwargs: Arguments of `torchmetrics.Metric`.
    """

    def __init__(self, things: set[int], stuffs: set[int], **kwargs) -> None:
        super().__init__(things, stuffs, True, return_sq_and_rq=True, return_per_class=True, **kwargs)

    def update(self, preds: Tensor, target: Tensor, crowd: Tensor | None = None) -> None:
        """Count the segments of images.

        Args:
            preds: Predictions (B, H, W, 2) int: each pixel's category id and the number of its segment, from 0. Pixels
                with an id that is neither of things nor of stuff are void.
            target: Ground truth (B, H, W, 2) int, in the same form.
            crowd: Mask (B, H, W) bool of the ground truth's crowd segments; None for no crowds.

        Raises:
            InputError: Predictions and ground truth differ in size.
        """
        if preds.shape != target.shape:
            sizes = " x ".join(map(str, preds.shape[1:3])), " x ".join(map(str, target.shape[1:3]))
            raise InputError(f"a prediction of {sizes[0]} pixels for a ground truth of {sizes[1]}: resize it first")
        crowd = torch.zeros(target.shape[:-1], dtype=torch.bool, device=target.device) if crowd is None else crowd
        for image in zip(preds, target, crowd, strict=True):
            self._count(*image)

    def _count(self, preds: Tensor, target: Tensor, crowd: Tensor) -> None:
        true_category, true_segment = self._segments(target)
        category, segment = self._segments(preds)
        G, P = len(true_category), len(category)
        overlap = torch.bincount(true_segment * P + segment, minlength=G * P).view(G, P)
        area, true_area = overlap.sum(0), overlap.sum(1)
        is_crowd = torch.zeros_like(true_category, dtype=torch.bool)
        is_crowd[true_segment[crowd.flatten()]] = True

        same = (true_category[:, None] == category) & (category >= 0)
        void = overlap[true_category < 0].sum(0)
        union = true_area[:, None] + area - overlap - void
        match = same & ~is_crowd[:, None] & (2 * overlap > union)
        missed = (true_category >= 0) & ~is_crowd & ~match.any(1)
        ignored = void + (overlap * (same & is_crowd[:, None])).sum(0)
        wrong = (category >= 0) & ~match.any(0) & (2 * ignored <= area)

        pairs, C = match.nonzero(as_tuple=True), len(self.iou_sum)
        matched = true_category[pairs[0]]
        self.iou_sum += torch.bincount(matched, overlap[pairs].double() / union[pairs], minlength=C)
        self.true_positives += torch.bincount(matched, minlength=C)
        self.false_positives += torch.bincount(category[wrong], minlength=C)
        self.false_negatives += torch.bincount(true_category[missed], minlength=C)

    def _segments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return each segment's category, an index into the counts or -1 for void, and each pixel's segment."""
        category, number = pixels.reshape(-1, 2).long().unbind(-1)
        base = number.max() + 1
        keys, segment = torch.unique(category * base + number, return_inverse=True)
        categories = [self.cat_id_to_continuous_id.get(key, -1) for key in (keys // base).tolist()]
        return torch.tensor(categories, device=pixels.device), segment

    def compute(self) -> dict[str, Tensor]:
        """Return PQ, SQ, RQ, with _th for things and _st for stuff, in percent.

        A mean is over the categories with at least one segment, predicted or true; without any it is NaN.
        """
        per_category = 100 * super().compute()
        seen = self.true_positives + self.false_positives + self.false_negatives > 0
        is_thing = torch.arange(len(seen), device=seen.device) < len(self.things)
        groups = {"": seen, "_th": seen & is_thing, "_st": seen & ~is_thing}
        return {
            f"{name}{group}": values[chosen].mean()
            for group, chosen in groups.items()
            for name, values in zip(("PQ", "SQ", "RQ"), per_category.unbind(-1), strict=True)
        }


class CocoPanoptic:
    """Ground truth in COCO's panoptic layout.

    `categories` maps names to category ids in the file's order; `things` and `stuffs` are sets of ids.

    Args:
        ann_file: JSON file, such as annotations/panoptic_val2017.json.
        folder: Folder of its PNG files, such as annotations/panoptic_val2017.

    Raises:
        InputError: The file cannot be read, or is not a COCO panoptic file.
    """

    def __init__(self, ann_file: str | os.PathLike, folder: str | os.PathLike) -> None:
        self.ann_file, self.folder = ann_file, Path(folder)
        try:
            content = json.loads(Path(ann_file).read_text())
            self.categories = {category["name"]: category["id"] for category in content["categories"]}
            self.things = {category["id"] for category in content["categories"] if category["isthing"]}
            self.stuffs = set(self.categories.values()) - self.things
            self._images = {
                image["image_id"]: (image["file_name"], {part["id"]: part for part in image["segments_info"]})
                for image in content.get("annotations", ())  # none for images to be predicted only
            }
        except OSError as error:
            raise InputError(f"cannot read '{ann_file}': {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"'{ann_file}' is no COCO panoptic file ({error}): name one like annotations/panoptic_val2017.json"
            ) from error

    def target(self, image_id: int) -> tuple[Tensor, Tensor]:
        """Read the segments of an image.

        Args:
            image_id: Id of the image in the JSON file.

        Returns:
            `target` (H, W, 2) and `crowd` (H, W) for `PanopticQuality.update`, without its batch dimension.

        Raises:
            InputError: The file has no such image, or its PNG file is missing, broken or has other segments.
        """
        if image_id not in self._images:
            raise InputError(f"'{self.ann_file}' has no image {image_id}: evaluate the images that it annotates")
        name, segments = self._images[image_id]
        try:
            with Image.open(self.folder / name) as png:
                ids = segment_ids(np.asarray(png.convert("RGB")))
        except OSError as error:
            raise InputError(f"cannot read '{self.folder / name}': {error.strerror or error}") from error
        ids_present, index = torch.unique(torch.from_numpy(ids), return_inverse=True)
        void = {0: {"category_id": VOID, "iscrowd": 0}}
        try:
            parts = [(void | segments)[number] for number in ids_present.tolist()]
        except KeyError as error:
            raise InputError(f"'{self.folder / name}' has a segment {error} that '{self.ann_file}' lacks") from error
        category = torch.tensor([part["category_id"] for part in parts])
        crowd = torch.tensor([bool(part["iscrowd"]) for part in parts])
        return torch.stack((category[index], index), dim=-1), crowd[index]


def segment_ids(image: np.ndarray) -> np.ndarray:
    """Return the (H, W) int32 segment ids, R + 256 G + 256^2 B, of COCO's (H, W, 3) colours; 0 is void."""
    return image.astype(np.int32) @ np.array([1, 256, 256**2], dtype=np.int32)
