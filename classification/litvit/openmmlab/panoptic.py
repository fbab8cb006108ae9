"""Panoptic segmentation on mmdet without panopticapi, which is on no package index.

Configs name these classes instead of mmdet's CocoPanopticMetric and LoadPanopticAnnotations:

    custom_imports = dict(imports=["litvit.openmmlab.panoptic"])
    val_evaluator = dict(type="PanopticQualityMetric", ann_file=..., seg_prefix=...)
    train_pipeline = [dict(type="LoadImageFromFile"), dict(type="LoadCocoPanoptic"), ...]
"""

from collections.abc import Sequence

import torch
from mmdet.datasets.transforms import LoadAnnotations, LoadPanopticAnnotations
from mmdet.structures import INSTANCE_OFFSET
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS, TRANSFORMS

from litvit.errors import InputError
from litvit.openmmlab.errors import SampleError
from litvit.openmmlab.panoptic_quality import VOID, CocoPanoptic, PanopticQuality, segment_ids


@METRICS.register_module()
class PanopticQualityMetric(BaseMetric):
    """Panoptic quality of mmdet's panoptic detectors, counted as COCO does: PQ, SQ, RQ, with _th and _st, in percent.

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
        # mmengine gathers the results, and only its main process computes.
        self.quality = PanopticQuality(self.truth.things, self.truth.stuffs, sync_on_compute=False)

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Count the segments of each image."""
        category_ids = self._category_ids()
        for sample in data_samples:
            pixels = sample["pred_panoptic_seg"]["sem_seg"].cpu().long()
            preds = torch.stack((category_ids[pixels % INSTANCE_OFFSET], pixels // INSTANCE_OFFSET), dim=-1)
            self.quality.reset()
            try:
                target, crowd = self.truth.target(sample["img_id"])
                self.quality.update(preds, target[None], crowd[None])
            except InputError as error:
                raise SampleError(str(error)) from error
            self.results.append(self.quality.metric_state)

    def compute_metrics(self, results: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Return the percentages over all images."""
        for name in self.quality.metric_state:
            setattr(self.quality, name, sum(counts[name] for counts in results))
        return {name: value.item() for name, value in self.quality.compute().items()}

    def _category_ids(self) -> torch.Tensor:
        """Return the category id of each of mmdet's labels: the classes in the file's order, then void."""
        classes = self.dataset_meta["classes"]
        ids = [number for name, number in self.truth.categories.items() if name in classes]
        if len(ids) != len(classes):
            unknown = [name for name in classes if name not in self.truth.categories]
            raise InputError(f"'{self.truth.ann_file}' has no class {', '.join(unknown)}: set metainfo to its classes")
        return torch.tensor(ids + [VOID] * (INSTANCE_OFFSET - len(ids)))


@TRANSFORMS.register_module()
class LoadCocoPanoptic(LoadPanopticAnnotations):
    """mmdet's LoadPanopticAnnotations without panopticapi: it reads masks, labels and the semantic map.

    Args:
        kwargs: Arguments of mmdet's `LoadAnnotations`.
    """

    def __init__(self, **kwargs) -> None:
        LoadAnnotations.__init__(self, with_mask=True, with_seg=True, **kwargs)
        self.rgb2id = segment_ids
