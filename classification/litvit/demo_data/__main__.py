"""Command line of the demo data: `litvit demo-data --help`, or `python -m litvit.demo_data --help`."""

import os
import sys
import time
from collections.abc import Sequence

from litvit import cli
from litvit.demo_data.layouts import TASKS, SceneSettings, Settings, build
from litvit.errors import InputError

MIN_IMAGE_SIZE = {"classification": 32, "detection": 96, "segmentation": 96}
COUNTS = {"classification": ("train_per_class", "val_per_class"), "detection": ("train", "val")}
COUNTS["segmentation"] = COUNTS["detection"]


def _parse(argv: Sequence[str] | None) -> tuple[str, Settings | SceneSettings, int]:
    plain, scenes = Settings(), SceneSettings("detection")
    parser = cli.ArgumentParser(
        description="Build a small image set, handwritten digits in drawn scenes, without any download.",
    )
    parser.add_argument("folder", metavar="DIR", help="folder of the set, new or empty, or with this very set")
    parser.add_argument(
        "--task",
        choices=TASKS,
        default="classification",
        help="classification (default): ImageNet's layout; detection: COCO's, instances and panoptic; "
        "segmentation: ADE20K's",
    )
    group = parser.add_argument_group("number of images")
    group.add_argument(
        "--train-per-class", type=int, metavar="N", help=f"for classification, default {plain.train_per_class}"
    )
    group.add_argument("--val-per-class", type=int, metavar="N", help=f"default {plain.val_per_class}")
    group.add_argument("--train", type=int, metavar="N", help=f"for detection, segmentation; default {scenes.train}")
    group.add_argument("--val", type=int, metavar="N", help=f"default {scenes.val}")
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help=f"side of an image, default {plain.image_size}; for detection and segmentation its height, "
        f"default {scenes.image_size}, and the width is 4/3 of it",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "-j", "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes that draw"
    )
    args = parser.parse_args(argv)
    counts = COUNTS[args.task]
    for name in {*COUNTS["classification"], *COUNTS["detection"]}.difference(counts):
        if getattr(args, name) is not None:
            instead = " and ".join(map(_flag, counts))
            raise InputError(f"{_flag(name)} is not for --task {args.task}, which has {instead}")
    least = {**dict.fromkeys(counts, 1), "image_size": MIN_IMAGE_SIZE[args.task], "seed": 0, "workers": 1}
    for name, minimum in least.items():
        if getattr(args, name) is not None and getattr(args, name) < minimum:
            raise InputError(f"{_flag(name)} is {getattr(args, name)}, but must be at least {minimum}")
    names = (*counts, "image_size", "seed")
    chosen = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return args.folder, TASKS[args.task].settings_type(task=args.task, **chosen), args.workers


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def main(argv: Sequence[str] | None = None) -> int:
    """Build the demo data as the command line says. Returns 0."""
    folder, settings, workers = _parse(argv)
    start = time.perf_counter()
    built = build(folder, settings, workers)
    took = f"built in {time.perf_counter() - start:.1f} s" if built else "already there"
    counts = settings.counts
    print(f"demo data: {counts['train']} training and {counts['val']} validation images in {folder} ({took})")
    return 0


if __name__ == "__main__":
    sys.argv[0] = "python -m litvit.demo_data"
    cli.run(main)
