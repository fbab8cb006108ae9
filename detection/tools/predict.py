#!/usr/bin/env python3
"""Draw what a detector finds: predict.py IMAGE... --config CONFIG --checkpoint FILE --out DIR.

Boxes and masks, or for a panoptic detector segments. A picture's drawing has its name and lies in DIR.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from litvit import cli
from litvit.errors import InputError


def main(argv: Sequence[str] | None = None) -> None:
    """Predict and draw as the command line says."""
    parser = cli.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--config", required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the drawings")
    parser.add_argument("--score-thr", type=float, default=0.3, help="leave out what scores less (default: 0.3)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    from litvit.openmmlab.tools import check_command, import_package

    check_command([args.config])
    for image in args.images:
        if not image.is_file():
            raise InputError(f"no picture at {image}")
    import_package("mmdet")
    import mmcv
    from mmdet.apis import inference_detector, init_detector
    from mmdet.registry import VISUALIZERS

    from litvit.openmmlab.runner import check_fit

    model = init_detector(args.config, device="cpu")
    meta = check_fit(model, args.checkpoint).get("meta", {})
    model.dataset_meta |= meta.get("dataset_meta", {})
    model.to(args.device)
    visualizer = VISUALIZERS.build({**model.cfg.visualizer, "vis_backends": None})
    visualizer.dataset_meta = model.dataset_meta
    args.out.mkdir(parents=True, exist_ok=True)
    for image in args.images:
        pixels = mmcv.imread(str(image), channel_order="rgb")
        if pixels is None:
            raise InputError(f"{image} is no picture that can be read")
        result = inference_detector(model, pixels[..., ::-1])
        file = args.out / image.name
        visualizer.add_datasample(
            image.name, pixels, result, draw_gt=False, pred_score_thr=args.score_thr, out_file=str(file)
        )
        print(file)


if __name__ == "__main__":
    cli.run(main)
