"""Small real data sets for demos and tests: handwritten digits in drawn scenes, no download.

    python -m litvit.demo_data data/demo
    python -m litvit.demo_data data/coco-demo --task detection
    python -m litvit.demo_data data/ade-demo --task segmentation

The digits are scikit-learn's bundled 1797 handwritten ones (8 x 8 pixels), each enlarged, turned, coloured and placed
on a drawn background. `draw_scene` makes a `Scene`, which knows its objects' boxes and masks and what the background is
at every pixel; `build` writes scenes in the layout of ImageNet, COCO (instances and panoptic) or ADE20K. Images for
training and validation show different source digits.
"""

from litvit.errors import require

require("demo", "sklearn")

from litvit.demo_data.layouts import MARKER, PALETTE, SEGMENTATION_CLASSES, TASKS, SceneSettings, Settings, build
from litvit.demo_data.scenes import (
    BACKGROUNDS,
    CLASSES,
    LUMA,
    SPLITS,
    Scene,
    SceneObject,
    draw_scene,
    save_image,
    source_digits,
)

__all__ = [
    "BACKGROUNDS",
    "CLASSES",
    "LUMA",
    "MARKER",
    "PALETTE",
    "SEGMENTATION_CLASSES",
    "SPLITS",
    "TASKS",
    "Scene",
    "SceneObject",
    "SceneSettings",
    "Settings",
    "build",
    "draw_scene",
    "save_image",
    "source_digits",
]
