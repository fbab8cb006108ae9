"""Panoptic segmentation on mmdet without panopticapi, which is on no package index.

Configs name these classes instead of mmdet's CocoPanopticMetric and LoadPanopticAnnotations:

    custom_imports = dict(imports=["litvit.openmmlab.panoptic"])
    val_evaluator = dict(type="PanopticQualityMetric", ann_file=..., seg_prefix=...)
    train_pipeline = [dict(type="LoadImageFromFile"), dict(type="LoadCocoPanoptic"), ...]
"""

from collections.abc import Sequence
from io import BytesIO

import numpy as np
import torch
from mmdet.datasets.transforms import LoadAnnotations, LoadPanopticAnnotations
from mmdet.structures import INSTANCE_OFFSET
from mmdet.structures.mask import BitmapMasks
from mmengine.evaluator import BaseMetric
from mmengine.fileio import get
from mmengine.registry import METRICS, TRANSFORMS
from PIL import Image

from litvit.errors import InputError
from litvit.openmmlab.annotations import class_ids, thing_names
from litvit.openmmlab.coco import VOID_LABEL
from litvit.openmmlab.errors import SampleError
from litvit.openmmlab.panoptic_quality import VOID, CocoPanoptic, PanopticQuality, segment_ids


@METRICS.register_module()
class PanopticQualityMetric(BaseMetric):
    """Panoptic quality of mmdet's panoptic detectors, counted as COCO does: PQ, SQ, RQ, with _th and _st, in percent.

    Classes are matched by name. Classes of the file that the data set does not name are void.

    Args:
        ann_file: JSON file of the ground truth, such as annotations/panoptic_val2017.json.
        seg_prefix: Folder of its PNG files.
        kwargs: Arguments of mmengine's `BaseMetric`.

    Raises:
        InputError: The ground truth cannot be read, or has other classes than the data set.
    """

    default_prefix = "coco_panoptic"

    def __init__(self, ann_file: str, seg_prefix: str, **kwargs) -> None:
        super().__init__(**kwargs)
        self.truth = CocoPanoptic(ann_file, seg_prefix)

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Count the segments of each image."""
        category_ids, quality = self.check_classes(), self._quality()
        for sample in data_samples:
            pixels = sample["pred_panoptic_seg"]["sem_seg"].cpu().long()
            preds = torch.stack((category_ids[pixels % INSTANCE_OFFSET], pixels // INSTANCE_OFFSET), dim=-1)
            quality.reset()
            try:
                target, crowd = self.truth.target(sample["img_id"])
            except InputError as error:
                raise SampleError(str(error)) from error
            if target.shape != preds.shape[1:]:
                file = self.truth.folder / self.truth.images[sample["img_id"]]["file_name"]
                sides = (" x ".join(map(str, shape[:2])) for shape in (target.shape, preds.shape[1:]))
                raise SampleError("{} is {} pixels high x wide, its image {}".format(file, *sides))
            quality.update(preds, target[None], crowd[None])
            self.results.append(quality.metric_state)

    def compute_metrics(self, results: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Return the percentages over all images."""
        quality = self._quality()
        for name in quality.metric_state:
            setattr(quality, name, sum(counts[name] for counts in results))
        return {name: value.item() for name, value in quality.compute().items()}

    def check_classes(self) -> torch.Tensor:
        """Return the category id of each of mmdet's labels: that of each class by its name, then void.

        Raises:
            InputError: The ground truth lacks a class of the data set.
        """
        ids = class_ids(self.truth.categories, str(self.truth.ann_file), self.dataset_meta["classes"])
        return torch.tensor(ids + [VOID] * (INSTANCE_OFFSET - len(ids)))

    def _quality(self) -> PanopticQuality:
        """Return the counter for the classes of the data set."""
        classes, file = self.dataset_meta["classes"], str(self.truth.ann_file)
        things = thing_names(self.truth.categories, file, classes, self.dataset_meta.get("thing_classes"))
        ids = dict(zip(classes, class_ids(self.truth.categories, file, classes), strict=True))
        thing_ids = {number for name, number in ids.items() if name in things}
        # mmengine gathers the results, and only its main process computes.
        return PanopticQuality(thing_ids, set(ids.values()) - thing_ids, sync_on_compute=False)


@TRANSFORMS.register_module()
class LoadCocoPanoptic(LoadPanopticAnnotations):
    """mmdet's LoadPanopticAnnotations without panopticapi: it reads masks, labels and the semantic map.

    Args:
        kwargs: Arguments of mmdet's `LoadAnnotations`.

    Raises:
        InputError: The PNG file is of another size than the image, or has a segment that the JSON file lacks.
    """

    def __init__(self, **kwargs) -> None:
        LoadAnnotations.__init__(self, with_mask=True, with_seg=True, **kwargs)

    def _load_masks_and_semantic_segs(self, results: dict) -> None:
        file = results.get("seg_map_path")
        if file is None:
            return
        with Image.open(BytesIO(get(file, backend_args=self.backend_args))) as png:
            ids = segment_ids(np.asarray(png.convert("RGB")))
        height, width = results["ori_shape"]
        if ids.shape != (height, width):
            size = f"{ids.shape[0]} x {ids.shape[1]}"
            raise InputError(f"it is {size} pixels high x wide, its image {height} x {width}")
        masks, labels, unknown = [], np.full_like(ids, VOID_LABEL), ids != 0
        for segment in results["segments_info"]:
            mask = ids == segment["id"]
            labels[mask] = segment["category"]
            unknown &= ~mask
            if segment["is_thing"]:
                masks.append(mask.astype(np.uint8))
        if unknown.any():
            raise InputError(f"it has a segment {ids[unknown][0]} that 'segments_info' of the annotation file lacks")
        results["gt_masks"] = BitmapMasks(masks, height, width)
        results["gt_seg_map"] = labels
