"""Make token labels: litvit make-token-labels DATA_DIR OUTPUT --model NAME --checkpoint FILE."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from timm.utils.distributed import world_info_from_env
from tqdm import tqdm

from litvit.cli import ArgumentParser
from litvit.data.loader import default_workers
from litvit.data.readers import DataConfig, class_list, open_images
from litvit.data.token_labels import label_files
from litvit.data.workers import WatchedLoader
from litvit.errors import InputError
from litvit.memory import keep_freed_memory
from litvit.processes import EXIT_INTERRUPTED, StopSignals, choose_device
from litvit.settings import add_flags, take
from litvit.training import teacher
from litvit.training.evaluate import MAX_NAMED
from litvit.training.flags import (
    CHECKPOINT_HELP,
    TRACEBACK_HELP,
    HelpFormatter,
    add_model_flags,
    add_precision_flags,
    parse_with_checkpoint,
)
from litvit.training.model import ModelConfig, PrecisionConfig, build_trained_model, data_settings

DESCRIPTION = """\
Make label files for training with token labels (train.py --token-label --token-label-data OUTPUT): the class scores of
a teacher, any model of ours or timm's, at every position of its last map, for every image of DATA_DIR/train.

OUTPUT/<class>/<image name>.pt is a tensor (2, 5, H, W): [0] scores of the 5 best classes, [1] the numbers of these
classes; H x W is the teacher's last map (7 x 7 at 224 pixels and stride 32). The teacher sees the whole image, squashed
to its size. A reader of a file takes the softmax of its scores, and of 0 for every other class: they are shifted so
that this gives the 5 classes the teacher's own probabilities. OUTPUT/teacher.json describes the teacher.

Files that exist and are whole are kept: the same command continues after an interruption (Ctrl-C, SIGTERM and SIGUSR1
end it in good order, with status 75).
"""
EPILOG = """\
examples:
  make_token_labels.py data/imagenet labels --model dm_nfnet_f6 --img-size 576 --pretrained --amp
  make_token_labels.py data/digits labels --checkpoint output/teacher/model_best.safetensors
  torchrun --nproc-per-node 8 make_token_labels.py DATA_DIR OUTPUT ...     (one GPU per process)
"""


class _Help(HelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The flags' wide help under a description whose lines are kept."""


def parse_settings(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line. What it leaves open comes from the checkpoint's own description, if it has one."""
    parser = ArgumentParser(
        usage="%(prog)s DATA_DIR OUTPUT --checkpoint WEIGHTS [flags]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=_Help,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("data_dir", metavar="DATA_DIR", help="folder with train/ or train.tar, as for train.py")
    add("output", metavar="OUTPUT", type=Path, help="folder of the label files")
    add("--checkpoint", metavar="WEIGHTS", help=f"the teacher's {CHECKPOINT_HELP}")
    add("--device", metavar="NAME", help="cuda, cpu ... (cuda if available)")
    add("--traceback", action="store_true", help=TRACEBACK_HELP)
    group = parser.add_argument_group("data")
    group.add_argument("--split", default="train", metavar="NAME", help="subfolder or .tar to label (train)")
    add_flags(group, DataConfig, only=("class_map", "num_classes", "batch_size", "workers"))
    add_model_flags(parser, training=False)
    add_precision_flags(parser, training=False)
    settings = parse_with_checkpoint(parser, argv, "which model is the teacher?", ignored="crop_pct")
    if settings.crop_pct is not None:
        raise InputError("leave out --crop-pct: the teacher sees the whole image, since its labels cover it")
    return settings


def main(argv: Sequence[str] | None = None) -> int:
    """Make label files as the command line says. Returns the exit status: 0, or 75 when a signal has ended it early."""
    settings = parse_settings(argv)
    local_rank, rank, world_size = world_info_from_env()
    device = choose_device(settings.device)
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    config, precision = (take(group, vars(settings)) for group in (ModelConfig, PrecisionConfig))
    data = take(DataConfig, vars(settings))
    images = open_images(data, settings.split, decoder=config.decoder)
    if rank == 0:
        for note in images.notes:
            print(f"{settings.split}: {note}", file=sys.stderr)
    files = label_files(images)
    num_classes = teacher.count_classes(images, settings)
    model = build_trained_model(config, num_classes, settings.checkpoint, settings.data_dir).eval()
    data_config = data_settings(config, model)
    images.transform = teacher.whole_image_transform(data_config)
    description = {
        "model": config.model,
        "model_kwargs": config.model_kwargs,
        **{name: data_config[name] for name in ("input_size", "interpolation", "mean", "std")},
        "classes": class_list(images),
        "weights": teacher.hash_weights(model),
        "precision": precision.amp_dtype if precision.amp else "float32",
        "checkpoint": settings.checkpoint or "pretrained",
        **({"exif_transpose": True} if config.exif_transpose else {}),
    }
    label = teacher.make_label_fn(model.to(device), data_config, precision, device)
    blank = teacher.label_blank_image(model, label, data_config["input_size"])
    teacher.write_manifest(settings.output, {"shape": blank.shape, **description})
    mine = range(rank, len(files), world_size)
    to_make = teacher.files_to_make(settings.output, files, mine, len(teacher.encode(blank)))
    if rank == 0 and teacher.is_class_token_classifier(model) and getattr(model, "aux_head", None) is None:
        print(
            f"warning: {config.model} classifies by its class token; its head was never trained on other tokens, and "
            "their scores may be poor",
            file=sys.stderr,
        )

    loader = WatchedLoader(
        teacher.IndexedImages(images, to_make),
        batch_size=settings.batch_size,
        num_workers=default_workers() if settings.workers is None else settings.workers,
        collate_fn=teacher.collate,
        pin_memory=device.type == "cuda",
    )
    start, kept = time.perf_counter(), len(mine) - len(to_make)
    hidden = rank > 0 or not sys.stderr.isatty()
    bar = tqdm(total=len(mine), initial=kept, desc="token labels", unit=" images", disable=hidden, leave=False)
    with bar, StopSignals() as signals:
        made, unreadable = teacher.make_labels(loader, label, [settings.output / file for file in files], signals, bar)
    share = f"process {rank} of {world_size}: " if world_size > 1 else ""
    rate = made / (time.perf_counter() - start)
    print(f"{share}made {made} label files, {kept} were there: {settings.output} ({rate:.1f} images/s)")
    left = len(to_make) - made - len(unreadable)
    if left:
        print(f"{signals.received.name}: {left} are still to make, and the same command makes them", file=sys.stderr)
        return EXIT_INTERRUPTED
    if unreadable:
        count = f"{len(unreadable)} images have no labels: " if len(unreadable) > 1 else ""
        more = f"; and {len(unreadable) - MAX_NAMED} more" if len(unreadable) > MAX_NAMED else ""
        raise InputError(f"{count}{'; '.join(unreadable[:MAX_NAMED])}{more}")
    return 0
