"""Data set of mmseg for pairs of images and masks, wherever they lie below a folder."""

import os
from collections.abc import Sequence
from pathlib import Path

from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

from litvit.openmmlab.checks import VOID_LABEL
from litvit.openmmlab.own_data import find_pairs


@DATASETS.register_module()
class PairsDataset(BaseSegDataset):
    """Images and masks that `find_pairs` finds.

    Args:
        data_root: Folder of the pairs.
        split: Pairs to read, "train" or "val".
        labels: Label of each class in the masks.
        void: Other labels in the masks.
        kwargs: Arguments of mmseg's `BaseSegDataset`.
    """

    def __init__(self, data_root: str, split: str, labels: Sequence[int], void: Sequence[int] = (), **kwargs) -> None:
        self.split = split
        self.numbers = dict.fromkeys(void, VOID_LABEL) | {label: number for number, label in enumerate(labels)}
        super().__init__(data_root=data_root, reduce_zero_label=False, **kwargs)

    def load_data_list(self) -> list[dict]:
        """Return the samples: paths of image and mask, and the class of each label."""
        return [
            {
                "img_path": os.path.join(self.data_root, image),
                "seg_map_path": os.path.join(self.data_root, mask),
                "label_map": self.numbers,
                "reduce_zero_label": False,
                "seg_fields": [],
            }
            for image, mask in find_pairs(Path(self.data_root))[self.split]
        ]
