#!/usr/bin/env python3
"""Make token labels: make_token_labels.py DATA_DIR OUTPUT --model NAME --checkpoint FILE (--help lists the flags)."""

import argparse
import hashlib
import io
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see train.py

import torch
from PIL import Image
from timm.data import create_transform
from timm.utils.distributed import world_info_from_env
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from litvit.analysis.token_scores import is_class_token_classifier, token_scores, top_scores
from litvit.checkpoints import load_weights
from litvit.cli import ArgumentParser, model_name, run
from litvit.errors import InputError
from litvit.memory import keep_freed_memory
from litvit.training.data import class_list, class_names, open_images, refuse_other_numbers
from litvit.training.loaders import leave_signals_to_the_trainer, loader_workers
from litvit.training.model import autocast_context, build_model, choose_device, data_settings
from litvit.training.recipe import (
    NOT_NEGATIVE,
    POSITIVE,
    HelpFormatter,
    add_model_flags,
    add_precision_flags,
    check_range,
)
from litvit.training.samples import Images
from litvit.training.state import read_description
from litvit.training.stop import EXIT_INTERRUPTED, StopSignals
from litvit.training.token_labels import TEACHER, label_files

WRITERS = 4  # batches that are written side by side

DESCRIPTION = """\
Make label files for training with token labels (train.py --token-label --token-label-data OUTPUT): what a teacher, any
model of ours or timm's, sees at every place of its last map, for every image of DATA_DIR/train.

OUTPUT/<class>/<image name>.pt is a tensor (2, 5, H, W): [0] scores of the 5 best classes, [1] the numbers of these
classes; H x W is the teacher's last map (7 x 7 at 224 pixels and stride 32). The teacher sees the whole image, squashed
to its size. Who reads a file takes the softmax of its scores, and of 0 for every other class: they are shifted so that
this gives the 5 classes the teacher's own probabilities. OUTPUT/teacher.json says what made the files.

Files that are there and whole are left alone: the same command continues after an interruption (Ctrl-C, SIGTERM and
SIGUSR1 end it in good order, with status 75).
"""
EPILOG = """\
examples:
  make_token_labels.py data/imagenet labels --model dm_nfnet_f6 --img-size 576 --pretrained --amp
  make_token_labels.py data/digits labels --checkpoint output/teacher/model_best.safetensors
  torchrun --nproc-per-node 8 make_token_labels.py DATA_DIR OUTPUT ...     (a GPU a process, each its share of images)
"""


class _Help(HelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The flags' wide help under a description whose lines stay as they are."""


def parse_settings(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; what it leaves open comes from the checkpoint's own description, if it has one."""
    parser = ArgumentParser(
        prog="make_token_labels.py",
        usage="%(prog)s DATA_DIR OUTPUT --model NAME (--checkpoint FILE | --pretrained) [flags]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=_Help,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("data_dir", metavar="DATA_DIR", help="folder with train/ (a folder a class) or train.tar, as for train.py")
    add("output", metavar="OUTPUT", type=Path, help="folder of the label files, made if need be")
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--checkpoint", metavar="FILE", help="the teacher's weights: .safetensors, .pth, last.pth")
    weights.add_argument("--pretrained", action="store_true", help="those that timm has for it")
    add("--device", metavar="NAME", help="cuda, cpu ... (cuda where there is one)")
    add = parser.add_argument_group("data").add_argument
    add("--split", default="train", metavar="NAME", help="subfolder or .tar to label (train)")
    add("--class-map", metavar="FILE", help="class names in the order of their numbers, a line each, as for train.py")
    add("--num-classes", type=int, metavar="N", help="counted from the data")
    add("-b", "--batch-size", type=int, default=128, metavar="N", help="images a process and forward pass (128)")
    add("-j", "--workers", type=int, metavar="N", help="loader processes a process (8, or the cores it has if fewer)")
    add_model_flags(parser)
    add_precision_flags(parser)
    description = read_description(parser.parse_args(argv).checkpoint)
    known = ("model", "img_size", "in_chans", "num_classes", "mean", "std", "interpolation")
    defaults = {name: description[name] for name in known if name in description}
    parser.set_defaults(**defaults, model_kwargs=list(description.get("model_kwargs", {}).items()))
    settings = parser.parse_args(argv)
    if settings.model is None:
        if settings.checkpoint and not Path(settings.checkpoint).is_file():
            raise InputError(f"no checkpoint at {settings.checkpoint}")
        raise InputError("which model is the teacher? --model NAME")
    model_name(settings.model)
    if settings.crop_pct is not None:
        raise InputError("leave out --crop-pct: the teacher sees the whole image, since its labels cover it")
    settings.model_kwargs = dict(settings.model_kwargs)
    settings.dataset, settings.seed, settings.classes = "", 0, description.get("classes")
    check_range(settings, POSITIVE, 1, None)
    check_range(settings, NOT_NEGATIVE, 0, None)
    return settings


def main(argv: Sequence[str] | None = None) -> int:
    """Make label files as the command line says. Returns the exit status: 0, or 75 when a signal has ended it early."""
    settings = parse_settings(argv)
    local_rank, rank, processes = world_info_from_env()
    device = choose_device(settings.device)
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    images = open_images(settings.data_dir, settings.split, settings)
    files = label_files(images)
    model = build_teacher(settings, count_classes(settings, images)).eval()
    data_config = data_settings(settings, model)
    images.transform = whole_image_transform(data_config)
    teacher = {
        "model": settings.model,
        "model_kwargs": settings.model_kwargs,
        **{name: data_config[name] for name in ("input_size", "interpolation", "mean", "std")},
        "classes": class_list(images),
        "weights": hash_weights(model),
        "precision": settings.amp_dtype if settings.amp else "float32",
        "checkpoint": settings.checkpoint or "pretrained",
    }
    label = labeller(model.to(device), data_config, settings, device)
    blank = try_on(model, label, data_config["input_size"])
    claim(settings.output, {"shape": blank.shape, **teacher})
    mine = range(rank, len(files), processes)
    to_make = missing(settings.output, files, mine, len(encode(blank)))
    if rank == 0 and is_class_token_classifier(model) and getattr(model, "aux_head", None) is None:
        print(
            f"warning: {settings.model} classifies by its class token; what its head says of other tokens was never "
            "trained, and may be poor",
            file=sys.stderr,
        )

    loader = DataLoader(
        Numbered(images, to_make),
        batch_size=settings.batch_size,
        num_workers=loader_workers(settings),
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals_to_the_trainer,
    )
    start, there = time.perf_counter(), len(mine) - len(to_make)
    hidden = rank > 0 or not sys.stderr.isatty()
    bar = tqdm(total=len(mine), initial=there, desc="token labels", unit=" images", disable=hidden, leave=False)
    with bar, StopSignals() as signals:
        made, unreadable = make_labels(loader, label, [settings.output / file for file in files], signals, bar)
    share = f"process {rank} of {processes}: " if processes > 1 else ""
    rate = made / (time.perf_counter() - start)
    print(f"{share}made {made} label files, {there} were there: {settings.output} ({rate:.1f} images/s)")
    left = len(to_make) - made - len(unreadable)
    if left:
        print(f"{signals.received.name}: {left} are still to make, and the same command makes them", file=sys.stderr)
        return EXIT_INTERRUPTED
    if unreadable:
        more = f" ({len(unreadable)} images have no labels)" if len(unreadable) > 1 else ""
        raise InputError(f"{unreadable[0]}{more}")
    return 0


def whole_image_transform(data_config: dict) -> Callable[[Image.Image], Tensor]:
    """Squash an image to the teacher's size: no part of it lies outside of the labels. Gives uint8 (C, H, W)."""
    try:
        return create_transform(**data_config | {"crop_pct": 1.0, "crop_mode": "squash"}, use_prefetcher=True)
    except KeyError:
        raise InputError(f"--interpolation {data_config['interpolation']} is for training: choose one") from None


def labeller(
    model: nn.Module, data_config: dict, settings: argparse.Namespace, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """A function from images, uint8 (B, C, H, W), to labels, (B, 2, min(5, K), h, w), of `top_scores`."""
    autocast = autocast_context(settings, device)
    scores = torch.compile(token_scores, backend=settings.torchcompile) if settings.torchcompile else token_scores
    mean, std = (255 * torch.tensor(data_config[name], device=device).view(1, -1, 1, 1) for name in ("mean", "std"))

    def label(pixels: Tensor) -> Tensor:
        with torch.inference_mode(), autocast():
            return top_scores(scores(model, pixels.to(device, non_blocking=True).float().sub_(mean).div_(std)))

    return label


def make_labels(
    loader: DataLoader, label: Callable[[Tensor], Tensor], paths: Sequence[Path], signals: StopSignals, bar: tqdm
) -> tuple[int, list[str]]:
    """Label batches, until a signal comes. Files are written beside that: the device need not wait for the disk.

    Args:
        loader: of what `collate` gives.
        label: of `labeller`.
        paths: the label file of every image.
        signals: in context.
        bar: told of every image.

    Returns:
        How many files it made; for every image that cannot be decoded, why.
    """
    made, writing, unreadable = 0, deque(), []
    with ThreadPoolExecutor(WRITERS) as pool:
        for numbers, pixels, reasons in loader:
            unreadable += reasons
            bar.update(len(numbers) + len(reasons))
            if numbers:
                writing.append(pool.submit(write_labels, label(pixels), [paths[number] for number in numbers]))
            if len(writing) > WRITERS:
                made += writing.popleft().result()
            if signals.received:
                break
        made += sum(job.result() for job in writing)
    return made, unreadable


def count_classes(settings: argparse.Namespace, images: Images) -> int:
    """The number of classes of the teacher, which are numbered as train.py numbers those of the data.

    Raises:
        InputError: the teacher knows other classes.
    """
    known = settings.classes
    refuse_other_numbers(class_list(images), known, settings.data_dir, f"those of {settings.checkpoint}")
    counted = max(class_names(images).values()) + 1
    num_classes = settings.num_classes or counted
    if counted > num_classes or (counted < num_classes and not known and not settings.class_map):
        raise InputError(
            f"{settings.data_dir} has {counted} classes, the teacher {num_classes}: --class-map says which is which"
        )
    return num_classes


def build_teacher(settings: argparse.Namespace, num_classes: int) -> nn.Module:
    """Build the teacher with its weights.

    Raises:
        InputError: weights that are not there, do not fit, or are of other classes.
    """
    if settings.checkpoint:
        model = build_model(settings, num_classes)
        load_weights(model, settings.checkpoint)
        return model
    pretrained = argparse.Namespace(**vars(settings))
    pretrained.model_kwargs = {**settings.model_kwargs, "pretrained": True}
    try:
        model = build_model(pretrained, num_classes)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"cannot get the pretrained weights of {settings.model}: {reason}") from None
    known = model.pretrained_cfg["num_classes"]
    if known != num_classes:  # timm has made a new classifier
        raise InputError(
            f"the pretrained {settings.model} knows {known} classes, {settings.data_dir} has {num_classes}: "
            "train a teacher on this data and give its --checkpoint"
        )
    return model


def hash_weights(model: nn.Module) -> str:
    """A fingerprint of a model's weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def try_on(model: nn.Module, label: Callable[[Tensor], Tensor], input_size: tuple[int, int, int]) -> Tensor:
    """Label a grey image, to learn of a teacher that cannot before anything is written. Returns its labels."""
    try:
        return label(torch.full((1, *input_size), 127, dtype=torch.uint8))[0].cpu()
    except (InputError, torch.cuda.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"the head of {type(model).__name__} takes no single tokens, choose another teacher ({reason})"
        ) from None


def claim(folder: Path, teacher: dict) -> None:
    """Write down in the folder who its labels are of, unless that is there already.

    Raises:
        InputError: they are another teacher's, or the folder holds other things, or cannot be written to.
    """
    teacher = json.loads(json.dumps(teacher))
    path = folder / TEACHER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # in this order: another process of ours may be writing there already
        foreign = next((entry.name for entry in folder.iterdir() if not entry.name.startswith(".")), None)
        if path.exists():
            before = json.loads(path.read_text())
            differs = next((n for n in teacher if n != "checkpoint" and before.get(n) != teacher[n]), None)
            if differs:
                raise InputError(
                    f"{folder} holds labels of another teacher ({before.get('model')}; its {differs} is not the same): "
                    "choose another OUTPUT"
                )
        elif foreign:
            raise InputError(f"{folder} holds {foreign}, and no labels of this command: choose another OUTPUT")
        else:
            write_whole(path, (json.dumps(teacher, indent=2) + "\n").encode())
    except (json.JSONDecodeError, AttributeError):
        raise InputError(f"{path} is damaged: choose another OUTPUT") from None
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from None


def missing(folder: Path, files: Sequence[str], numbers: Sequence[int], size: int) -> list[int]:
    """Those of the numbers whose label file is not there, or has not `size` bytes. Makes the folders of the files."""

    def is_whole(path: str) -> bool:
        try:
            return os.stat(path).st_size == size
        except FileNotFoundError:
            return False

    try:
        for parent in sorted({os.path.dirname(files[number]) for number in numbers}):
            (folder / parent).mkdir(parents=True, exist_ok=True)
        return [number for number in numbers if not is_whole(os.path.join(folder, files[number]))]
    except OSError as error:
        raise InputError(f"cannot write to {error.filename}: {error.strerror}") from None


class Numbered(Dataset):
    """Some images by their numbers in a data set, each with its number, or with the reason why it cannot be decoded."""

    def __init__(self, images: Images, numbers: Sequence[int]):
        self.images, self.numbers = images, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> tuple[int, Tensor | str]:
        number = self.numbers[place]
        try:
            return number, self.images[number][0]
        except InputError as error:
            return number, str(error)


def collate(samples: list[tuple[int, Tensor | str]]) -> tuple[list[int], Tensor | None, list[str]]:
    """Join images to a batch: their numbers, uint8 (B, C, H, W), and why others cannot be decoded."""
    decoded = {number: image for number, image in samples if isinstance(image, Tensor)}
    pixels = torch.stack(list(decoded.values())) if decoded else None
    return list(decoded), pixels, [reason for _, reason in samples if isinstance(reason, str)]


def write_labels(labels: Tensor, paths: Sequence[Path]) -> int:
    """Write labels (B, 2, K, H, W), a file an image, and return how many.

    Raises:
        InputError: the disk is full or gone, or the scores are no finite numbers.
    """
    labels = labels.cpu()
    if not labels.isfinite().all():
        raise InputError(
            f"the teacher's scores, of {paths[0]} or the next, are no finite numbers: its weights are broken, or "
            "float16 is too narrow for it (--amp-dtype bfloat16)"
        )
    for path, label in zip(paths, labels, strict=True):
        try:
            write_whole(path, encode(label))
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from None
    return len(paths)


def encode(label: Tensor) -> bytes:
    """The content of a label file."""
    buffer = io.BytesIO()
    torch.save(label.clone(), buffer)  # without the rest of the batch
    return buffer.getvalue()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under another name, and rename it. It is not flushed: a file that a crash cuts off is made again."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    run(main)
