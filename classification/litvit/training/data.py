"""Images to batches: where a split lies, which samples make a batch, and what random numbers a sample gets.

timm reads, decodes, augments and collates. Ours are the order of the samples, which depends on seed, epoch and total
batch alone, and the random numbers of a sample, which depend on seed, epoch and its place in that order alone.
"""

import argparse
import contextlib
import os
import random
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import IterableImageDataset, Mixup, create_dataset, create_loader, create_transform
from timm.data.loader import PrefetchLoader, fast_collate
from timm.utils.misc import natural_key
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from litvit.errors import InputError

READERS = ("hfds", "hfids", "wds", "tfds")
SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "validation", "test", "eval")}


class Draw(NamedTuple):
    """One sample of an epoch: image `index`, drawn as the `place`-th of epoch `epoch`."""

    index: int
    epoch: int
    place: int


class Stream(IntEnum):
    """What random numbers are for: the first number of a stream's key."""

    WEIGHTS, ORDER, SAMPLE, PASS = range(1, 5)


def seed_everything(stream: Stream, *key: int) -> None:
    """Seed Python's, NumPy's and torch's generators, those of every device, from a key of numbers >= 0."""
    words = np.random.SeedSequence((stream, *key)).generate_state(3, np.uint32).tolist()
    random.seed(words[0])
    np.random.seed(words[1])
    torch.manual_seed(words[2])


@contextlib.contextmanager
def random_stream(stream: Stream, *key: int) -> Iterator[None]:
    """Seed the generators from `key` for the block, and put the processor's states back after it."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_everything(stream, *key)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class Images(Dataset):
    """A timm data set whose samples are reproducible and whose broken images are named.

    Args:
        dataset: timm's ImageDataset.
        seed: seed of the run; a `Draw` is augmented with random numbers of (seed, epoch, place).
    """

    def __init__(self, dataset: Dataset, seed: int = 0):
        self.dataset = dataset
        self.seed = seed
        self.transform = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | Draw) -> tuple[np.ndarray, int]:
        """Return the image as uint8 (C, H, W) and its class. Raises InputError for a file that is no image."""
        if isinstance(key, Draw):
            with random_stream(Stream.SAMPLE, self.seed, key.epoch, key.place):
                return self._load(key.index)
        return self._load(key)

    def _load(self, index: int) -> tuple[np.ndarray, int]:
        try:
            file, target, *_ = self.dataset.reader[index]
            image = Image.open(file).convert(self.dataset.input_img_mode)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            path = self.filenames([index])[0]
            raise InputError(f"cannot read the image {path} ({error}): mend it or remove it") from None
        return self.transform(image), target

    def filenames(self, indices: list[int] | None = None) -> list[str]:
        """Paths of the images, or of those at `indices`."""
        reader = self.dataset.reader
        if indices is None:
            return reader.filenames(absolute=True)
        return [reader.filename(index, absolute=True) for index in indices]


class EpochBatches(Sampler[list[Draw]]):
    """The batches of one process, from an order of samples that all processes share.

    An epoch is a permutation of the images by (seed, epoch), each repeated `repeats` times in a row (repeated
    augmentation: the copies fall to different processes). Consecutive places of that order form the total batch of an
    update, whose places are dealt out to the processes in turn: whatever their number, an update sees the same images.
    An epoch has as many samples as there are images; with repeats that is rounded down to a multiple of 256 and covers
    a part of the images (as published). The last, incomplete total batch is left out.

    Args:
        num_images: images of the data set.
        batch_size: images a process and forward pass.
        accum_steps: forward passes an update.
        rank, world_size: this process, of how many.
        seed: of the run.
        repeats: times that an image is repeated, 1 for no repeated augmentation.

    Raises:
        InputError: fewer images than one total batch.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        *,
        accum_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        repeats: int = 1,
    ):
        self.num_images, self.batch_size, self.accum_steps = num_images, batch_size, accum_steps
        self.rank, self.world_size, self.seed, self.repeats = rank, world_size, seed, max(repeats, 1)
        self.epoch = 0
        self.total_batch = batch_size * accum_steps * world_size
        samples = num_images // 256 * 256 if self.repeats > 1 and num_images >= 256 else num_images
        self.updates = samples // self.total_batch
        if self.updates == 0:
            raise InputError(
                f"{samples} training images do not fill one total batch of {self.total_batch} "
                f"({world_size} processes x {batch_size} images x {accum_steps} passes): choose a smaller --batch-size"
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches are to come."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.updates * self.accum_steps

    def __iter__(self) -> Iterator[list[Draw]]:
        order = np.random.default_rng((Stream.ORDER, self.seed, self.epoch)).permutation(self.num_images)
        for update in range(self.updates):
            places = range(update * self.total_batch + self.rank, (update + 1) * self.total_batch, self.world_size)
            for first in range(0, len(places), self.batch_size):
                yield [
                    Draw(int(order[place // self.repeats]), self.epoch, place)
                    for place in places[first : first + self.batch_size]
                ]


def find_split(root: str, split: str, *, or_itself: bool = False) -> Path:
    """Where a split of a data folder lies: `root/<split>` or `root/<split>.tar`, or one of its usual other names.

    Args:
        root: the data folder.
        split: "train", "val" or the name of a subfolder.
        or_itself: `root` may be the split itself: a .tar, or a folder of classes without train/ or val/ in it.

    Raises:
        InputError: no such folder, an empty one, or one without that split.
    """
    folder = Path(root)
    if not folder.exists():
        raise InputError(f"no data folder {root}")
    if not folder.is_dir():
        if or_itself and folder.suffix == ".tar":
            return folder
        raise InputError(
            f"{root} is a file; the data is a folder with train/ and val/ (or train.tar and val.tar) in it"
        )
    entries = {entry.name: entry.is_dir() for entry in sorted(folder.iterdir())}
    if not entries:
        raise InputError(f"the data folder {root} is empty; it should hold train/ and val/, a folder a class in each")
    for name in SPLIT_NAMES.get(split, (split,)):
        for candidate in (name, f"{name}.tar"):
            if candidate in entries:
                return folder / candidate
    has_other_splits = any(
        name in entries or f"{name}.tar" in entries for names in SPLIT_NAMES.values() for name in names
    )
    if or_itself and not has_other_splits and any(entries.values()):
        return folder
    raise InputError(f"{root} has neither {split}/ nor {split}.tar; it holds {', '.join(list(entries)[:5])}")


def open_images(
    root: str,
    split: str,
    settings: argparse.Namespace,
    *,
    is_training: bool = False,
    or_itself: bool = False,
    classes: dict[str, int] | None = None,
    num_samples: int | None = None,
) -> Dataset:
    """Open one split with the timm reader that `settings.dataset` names.

    Args:
        root: the data folder; for Hugging Face and WebDataset what timm takes as root.
        split: name of the split.
        settings: `dataset`, `class_map`, `batch_size`, `in_chans`, `seed`.
        is_training: whether a stream is to be shuffled.
        or_itself: `root` may be the split itself, see `find_split`.
        classes: class name to number, where another split has set it.
        num_samples: length of a stream.

    Returns:
        `Images`, or timm's IterableImageDataset for a stream.

    Raises:
        InputError: no images, or a reader that this environment cannot use.
    """
    kwargs = {}
    if settings.dataset:
        if settings.dataset.partition("/")[0].lower() not in READERS:
            raise InputError(
                f"--dataset {settings.dataset}: timm's readers are {', '.join(f'{r}/NAME' for r in READERS)}"
            )
        place = root
    else:
        place = str(find_split(root, split, or_itself=or_itself))
        if place.endswith(".tar"):
            kwargs["cache_tarinfo"] = False  # timm would keep the index as a pickle beside a large tar, and trust it
    try:
        dataset = create_dataset(
            settings.dataset,
            root=place,
            split=split,
            search_split=False,
            class_map=classes or settings.class_map or "",
            is_training=is_training,
            batch_size=settings.batch_size,
            num_samples=num_samples,
            seed=settings.seed,
            input_img_mode={1: "L", 3: "RGB", 4: "RGBA"}.get(settings.in_chans, "RGB"),
            **kwargs,
        )
    except ImportError as error:
        raise InputError(f"--dataset {settings.dataset} needs a package: pip install {error.name}") from None
    except (OSError, RuntimeError, ValueError, AssertionError, KeyError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"cannot read the {split} images of {place}: {message}") from None
    return dataset if isinstance(dataset, IterableDataset) else Images(dataset, settings.seed)


def class_names(dataset: Dataset) -> dict[str, int] | None:
    """Class name to number as the reader counted them, or None where a reader does not say."""
    reader = getattr(dataset, "dataset", dataset).reader
    names = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    return dict(names) if names else None


def train_classes(settings: argparse.Namespace) -> dict[str, int] | None:
    """The classes of a data folder's train/, so that a val/ which lacks one of them is numbered right.

    Returns:
        Class name to number; None where there is no train/ with folders in it, or `class_map` says it.
    """
    folder = Path(settings.data_dir) / "train"
    if settings.dataset or settings.class_map or not folder.is_dir():
        return None
    names = sorted((path.name for path in folder.glob("[!.]*") if path.is_dir()), key=natural_key)
    return {name: number for number, name in enumerate(names)} or None


def open_train_and_val(settings: argparse.Namespace) -> tuple[Dataset, Dataset, int]:
    """Open both splits, give their classes the same numbers, and count them.

    Args:
        settings: flags of train.py.

    Returns:
        Training images, validation images, number of classes.

    Raises:
        InputError: data that cannot be trained on; the line names the folder or class.
    """
    root = settings.data_dir
    if not settings.dataset:
        find_split(root, settings.val_split)  # before the long listing of train/
    train = open_images(root, settings.train_split, settings, is_training=True, num_samples=settings.train_num_samples)
    val = open_images(root, settings.val_split, settings, num_samples=settings.val_num_samples)
    classes, val_classes = class_names(train), class_names(val)
    if classes and val_classes and classes != val_classes:
        unknown = sorted(set(val_classes) - set(classes))
        if unknown:
            shown = ", ".join(map(str, unknown[:3])) + (", ..." if len(unknown) > 3 else "")
            raise InputError(
                f"{settings.val_split} has {len(unknown)} classes that {settings.train_split} lacks: {shown}"
            )
        val = open_images(root, settings.val_split, settings, classes=classes)
    counted = max(classes.values()) + 1 if classes else None
    if settings.num_classes is None and counted is None:
        raise InputError(f"--dataset {settings.dataset} does not say how many classes it has: give --num-classes")
    if counted and settings.num_classes and settings.num_classes < counted:
        raise InputError(f"--num-classes {settings.num_classes}, but the data has {counted} classes")
    return train, val, settings.num_classes or counted


def train_loader(
    dataset: Dataset,
    settings: argparse.Namespace,
    data_config: dict,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> PrefetchLoader:
    """Augmented, normalised training batches on the device.

    Args:
        dataset: from `open_images`.
        settings: flags of train.py.
        data_config: timm's (input_size, mean, std).
        device: where batches go.
        rank, world_size: this process, of how many.

    Returns:
        Loader of images (B, C, H, W) and classes (B,); `len` is the number of forward passes an epoch.
    """
    augmentation = {
        "scale": settings.scale,
        "ratio": settings.ratio,
        "hflip": settings.hflip,
        "color_jitter": settings.color_jitter,
        "auto_augment": settings.aa,
        "interpolation": settings.train_interpolation,
    }
    erasing = {"re_prob": settings.reprob, "re_mode": settings.remode, "re_count": settings.recount}
    normalisation = {"mean": data_config["mean"], "std": data_config["std"]}
    input_size = data_config["input_size"]
    if isinstance(dataset, IterableImageDataset):
        if settings.aug_repeats:
            raise InputError("repeated augmentation needs random access: --aug-repeats 0 with a streamed data set")
        return create_loader(
            dataset,
            input_size,
            settings.batch_size,
            is_training=True,
            num_workers=loader_workers(settings),
            pin_memory=device.type == "cuda",
            device=device,
            **augmentation,
            **erasing,
            **normalisation,
        )
    dataset.transform = create_transform(
        input_size, is_training=True, use_prefetcher=True, **augmentation, **normalisation
    )
    batches = EpochBatches(
        len(dataset),
        settings.batch_size,
        accum_steps=settings.grad_accum_steps,
        rank=rank,
        world_size=world_size,
        seed=settings.seed,
        repeats=settings.aug_repeats,
    )
    workers = loader_workers(settings)
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=fast_collate,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
    )
    return PrefetchLoader(loader, channels=input_size[0], device=device, **normalisation, **erasing)


def eval_loader(
    dataset: Dataset, settings: argparse.Namespace, data_config: dict, device: torch.device, distributed: bool = False
) -> PrefetchLoader:
    """Resized, cropped, normalised batches on the device, in the data set's order.

    Args:
        dataset: from `open_images`.
        settings: `val_batch_size` or `batch_size`, `workers`.
        data_config: timm's (input_size, interpolation, mean, std, crop_pct).
        device: where batches go.
        distributed: deal the images out to the processes.
    """
    return create_loader(
        dataset,
        data_config["input_size"],
        settings.val_batch_size or settings.batch_size,
        is_training=False,
        interpolation=data_config["interpolation"],
        mean=data_config["mean"],
        std=data_config["std"],
        crop_pct=data_config["crop_pct"],
        num_workers=loader_workers(settings),
        distributed=distributed,
        pin_memory=device.type == "cuda",
        device=device,
    )


def loader_workers(settings: argparse.Namespace) -> int:
    """Loader processes of this process: `workers`, or up to 8 of the cores that it has to itself."""
    if settings.workers is not None:
        return settings.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(8, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def create_mixup(settings: argparse.Namespace, num_classes: int) -> Mixup | None:
    """timm's mixup and cutmix over a batch, or None where both are off."""
    if settings.mixup <= 0 and settings.cutmix <= 0:
        return None
    return Mixup(
        mixup_alpha=settings.mixup,
        cutmix_alpha=settings.cutmix,
        prob=settings.mixup_prob,
        switch_prob=settings.mixup_switch_prob,
        label_smoothing=settings.smoothing,
        num_classes=num_classes,
    )
