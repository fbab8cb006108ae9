#!/usr/bin/env python3
"""Draw what a detector finds: predict.py IMAGE... --config CONFIG --checkpoint FILE --out DIR.

It draws boxes and masks, or segments for a panoptic detector. A drawing is saved in DIR under the name of its image.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from litvit import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Predict and draw the images of a command line."""
    # Not at the top: cli.run reports a missing mmengine.
    from litvit.openmmlab.tools import draw_predictions, prediction_parser

    parser = prediction_parser(__doc__.splitlines()[0])
    parser.add_argument("--score-thr", type=float, default=0.3, help="minimum score of what is drawn (default: 0.3)")
    args = parser.parse_args(argv)
    return draw_predictions("mmdet", args, lambda model: drawer(model, args.score_thr))


def drawer(model: nn.Module, score_thr: float) -> Callable[[np.ndarray, Any], Image.Image]:
    """Return a function that draws the model's results over pixels (H, W, 3), uint8 RGB.

    Args:
        model: Detector, with `cfg` and `dataset_meta`.
        score_thr: Minimum score of what is drawn.
    """
    from mmdet.registry import VISUALIZERS

    visualizer = VISUALIZERS.build({**model.cfg.visualizer, "vis_backends": None})
    visualizer.dataset_meta = model.dataset_meta

    def draw(pixels: np.ndarray, result: Any) -> Image.Image:
        visualizer.add_datasample("", pixels, result, draw_gt=False, pred_score_thr=score_thr)
        return Image.fromarray(visualizer.get_image())

    return draw


if __name__ == "__main__":
    cli.run(main)
