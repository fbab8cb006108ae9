"""Panoptic segmentation on mmdet without panopticapi, which is on no package index.

Configs name these classes instead of mmdet's CocoPanopticMetric and LoadPanopticAnnotations:

    custom_imports = dict(imports=["litvit.openmmlab.panoptic"])
    val_evaluator = dict(type="PanopticQualityMetric", ann_file=..., seg_prefix=...)
    train_pipeline = [dict(type="LoadImageFromFile"), dict(type="LoadCocoPanoptic"), ...]

Importing this module lets mmdet's DetInferencer save panoptic segments, and `save_best="auto"` find the better PQ. It
imports `litvit.openmmlab.coco`, so that mmdet's data sets check annotation files and match classes by name.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.apis import det_inferencer
from mmdet.datasets.transforms import LoadAnnotations, LoadPanopticAnnotations
from mmdet.structures import INSTANCE_OFFSET
from mmdet.structures.mask import BitmapMasks
from mmengine.evaluator import BaseMetric
from mmengine.fileio import get
from mmengine.hooks import CheckpointHook, EarlyStoppingHook
from mmengine.registry import METRICS, TRANSFORMS
from PIL import Image
from torch import Tensor

from litvit.errors import InputError, one_line
from litvit.openmmlab.annotations import class_ids, thing_names
from litvit.openmmlab.coco import VOID_LABEL
from litvit.openmmlab.errors import SampleError
from litvit.openmmlab.panoptic_quality import VOID, CocoPanoptic, PanopticQuality, segment_ids

for _hook in (CheckpointHook, EarlyStoppingHook):
    _hook._default_greater_keys = [*_hook._default_greater_keys, "PQ", "SQ", "RQ"]


@METRICS.register_module()
class PanopticQualityMetric(BaseMetric):
    """Panoptic quality of mmdet's panoptic detectors, counted as COCO does: PQ, SQ, RQ, with _th and _st, in percent.

    Classes are matched by name. Classes of the file that the data set does not name are void.

    Args:
        ann_file: JSON file of the ground truth, such as annotations/panoptic_val2017.json.
        seg_prefix: Folder of its PNG files.
        format_only: Whether to write the predictions without evaluating them. Only the categories of `ann_file` are
            read, so that it may be one of images without annotations.
        outfile_prefix: Prefix of the files of predictions in COCO's format: PREFIX.panoptic.json and the PNG files in
            PREFIX.panoptic/. None writes none. Several machines need one that they share.
        kwargs: Arguments of mmengine's `BaseMetric`.

    Raises:
        InputError: The ground truth cannot be read, or has other classes than the data set; the files of predictions
            cannot be written.
    """

    default_prefix = "coco_panoptic"

    def __init__(
        self,
        ann_file: str,
        seg_prefix: str,
        format_only: bool = False,
        outfile_prefix: str | None = None,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        if format_only and not outfile_prefix:
            raise InputError("format_only writes files: set outfile_prefix=PREFIX for their names too")
        self.format_only, self.outfile_prefix = format_only, outfile_prefix
        self.truth = CocoPanoptic(ann_file, seg_prefix)

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Write or count the segments of each image."""
        category_ids = self.check_classes()
        quality = None if self.format_only else self._quality
        for sample in data_samples:
            pixels = sample["pred_panoptic_seg"]["sem_seg"].cpu().long()
            preds = torch.stack((category_ids[pixels % INSTANCE_OFFSET], pixels // INSTANCE_OFFSET), dim=-1)
            written = self._write(preds[0], sample) if self.outfile_prefix else None
            if quality is None:
                self.results.append({"written": written})
                continue
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
            self.results.append({**quality.metric_state, "written": written})

    def compute_metrics(self, results: list[dict[str, Any]]) -> dict[str, float]:
        """Return the percentages over all images, and write the JSON file of predictions."""
        if self.outfile_prefix:
            self._write_json([counts["written"] for counts in results])
        if self.format_only:
            return {}
        quality = self._quality
        quality.reset()
        for name in quality.metric_state:
            setattr(quality, name, sum(counts[name] for counts in results))
        return {name: value.item() for name, value in quality.compute().items()}

    def _write(self, preds: Tensor, sample: dict) -> dict[str, Any]:
        """Write the PNG file of an image's segments (H, W, 2). Returns its entry in the JSON file."""
        segments, index, areas = preds.flatten(0, 1).unique(dim=0, return_inverse=True, return_counts=True)
        is_void = segments[:, 0] == VOID
        ids = torch.where(is_void, 0, (~is_void).cumsum(0))
        file = Path(f"{self.outfile_prefix}.panoptic", Path(sample["img_path"]).stem + ".png")
        with self._writing():
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(segment_colors(ids[index].view(preds.shape[:2]).numpy())).save(file)
        parts = zip(ids.tolist(), segments[:, 0].tolist(), areas.tolist(), strict=True)
        return {
            "image_id": sample["img_id"],
            "file_name": file.name,
            "segments_info": [{"id": i, "category_id": category, "area": area} for i, category, area in parts if i],
        }

    def _write_json(self, annotations: list[dict[str, Any]]) -> None:
        name, images = Counter(annotation["file_name"] for annotation in annotations).most_common(1)[0]
        if images > 1:
            raise InputError(
                f"{images} images would be written into {self.outfile_prefix}.panoptic/{name}: rename them"
            )
        with self._writing():
            Path(f"{self.outfile_prefix}.panoptic.json").write_text(json.dumps({"annotations": annotations}))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SampleError(f"cannot write {self.outfile_prefix}.panoptic: {one_line(error)}") from error

    def check_classes(self) -> torch.Tensor:
        """Return the category id of each of mmdet's labels: that of each class by its name, then void.

        Raises:
            InputError: The ground truth lacks a class of the data set.
        """
        ids = class_ids(self.truth.categories, str(self.truth.ann_file), self.dataset_meta["classes"])
        return torch.tensor(ids + [VOID] * (INSTANCE_OFFSET - len(ids)))

    @cached_property
    def _quality(self) -> PanopticQuality:
        """Counter for the classes of the data set."""
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


def segment_colors(ids: np.ndarray) -> np.ndarray:
    """Return COCO's colours (H, W, 3) uint8 of segment ids (H, W), the reverse of `segment_ids`."""
    return (ids[..., None] // np.array([1, 256, 256**2]) % 256).astype(np.uint8)


if det_inferencer.VOID is None:  # these two are all that it takes from panopticapi
    det_inferencer.VOID, det_inferencer.id2rgb = 0, segment_colors
