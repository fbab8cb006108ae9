#!/usr/bin/env python3
"""Draw what a detector finds: predict.py IMAGE... --config CONFIG --checkpoint FILE --out DIR.

It draws boxes and masks, or segments for a panoptic detector. A drawing is saved in DIR under the name of its image.
"""

from collections.abc import Sequence

from litvit import cli


def main(argv: Sequence[str] | None = None) -> None:
    """Predict and draw the images of a command line."""
    # Not at the top: cli.run reports a missing mmengine.
    from litvit.openmmlab.tools import prediction_parser, predictions

    parser = prediction_parser(__doc__.splitlines()[0])
    parser.add_argument("--score-thr", type=float, default=0.3, help="minimum score of what is drawn (default: 0.3)")
    args = parser.parse_args(argv)
    visualizer = None
    for model, file, pixels, result in predictions("mmdet", args):
        if visualizer is None:
            from mmdet.registry import VISUALIZERS

            visualizer = VISUALIZERS.build({**model.cfg.visualizer, "vis_backends": None})
            visualizer.dataset_meta = model.dataset_meta
        flags = {"draw_gt": False, "pred_score_thr": args.score_thr, "out_file": str(file)}
        visualizer.add_datasample(file.name, pixels, result, **flags)
        print(file)


if __name__ == "__main__":
    cli.run(main)
