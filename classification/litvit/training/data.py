"""Images to batches: where a split lies, which samples make a batch, and what random numbers a sample gets.

timm reads, decodes, augments and collates. Ours are the order of the samples, which depends on seed, epoch and total
batch alone, and the random numbers of a sample, which depend on seed, epoch and its place in that order alone.
"""

import argparse
import contextlib
import os
import pickle
import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import IterableImageDataset, Mixup, create_dataset, create_loader, create_transform
from timm.data.loader import PrefetchLoader
from timm.data.random_erasing import RandomErasing
from timm.utils.misc import natural_key
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info
from torch.utils.data._utils.worker import WorkerInfo

from litvit.errors import InputError

# what ends a run in good order: a scheduler's notice (SIGTERM, SIGUSR1), Ctrl-C
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
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


def _seed_processor(stream: Stream, *key: int) -> int:
    words = np.random.SeedSequence((stream, *key)).generate_state(3, np.uint32).tolist()
    random.seed(words[0])
    np.random.seed(words[1])
    torch.default_generator.manual_seed(words[2])
    return words[2]


def seed_everything(stream: Stream, *key: int) -> None:
    """Seed Python's, NumPy's and torch's generators, those of every device, from a key of numbers >= 0."""
    torch.manual_seed(_seed_processor(stream, *key))


@contextlib.contextmanager
def random_stream(stream: Stream, *key: int) -> Iterator[None]:
    """Seed the processor's generators from `key` for the block; a training process gets its states back after it."""
    # A loader process draws nothing outside of streams: saving its states would only cost time, a sample's tenth.
    states = None
    if get_worker_info() is None:
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    _seed_processor(stream, *key)
    try:
        yield
    finally:
        if states is not None:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])


class Sample(NamedTuple):
    """One training sample as a loader process makes it."""

    image: np.ndarray  # uint8 (C, H, W)
    target: int
    erased: torch.Tensor | None  # (C, H, W): normalised values of erased pixels, NaN where the image stays
    unreadable: list[str]  # files that were tried before this image, and could not be decoded


class Batch(NamedTuple):
    """Training samples on the device."""

    images: torch.Tensor  # (B, C, H, W), normalised
    target: torch.Tensor  # (B,)
    unreadable: list[str]


class Images(Dataset):
    """A timm data set whose training samples are reproducible and whose broken images are named.

    What is read for a `Draw` depends on (seed, epoch, place) alone: the augmentation, the random erasing, and the image
    that takes the place of one that cannot be decoded. An integer reads an image for evaluation.

    Args:
        dataset: timm's ImageDataset.
        seed: seed of the run.
    """

    TRIES = 10

    def __init__(self, dataset: Dataset, seed: int = 0):
        self.dataset = dataset
        self.seed = seed
        self.transform: Callable | None = None
        self.erasing: RandomErasing | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | Draw) -> tuple[np.ndarray, int] | Sample:
        """Read an image as uint8 (C, H, W), and its class.

        Raises:
            InputError: a file that is no image; for a `Draw`, ten in a row.
        """
        if not isinstance(key, Draw):
            image, target = self._decode(key)
            return self.transform(image), target
        with random_stream(Stream.SAMPLE, self.seed, key.epoch, key.place):
            index, unreadable = key.index, []
            while True:
                try:
                    image, target = self._decode(index)
                    break
                except InputError:
                    unreadable.append(self.filenames([index])[0])
                    if len(unreadable) == self.TRIES:
                        raise
                index = random.randrange(len(self))
            image = self.transform(image)
            return Sample(image, target, self._erase(image.shape), unreadable)

    def _decode(self, index: int) -> tuple[Image.Image, int]:
        try:
            file, target, *_ = self.dataset.reader[index]
            return Image.open(file).convert(self.dataset.input_img_mode), target
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            path = self.filenames([index])[0]
            raise InputError(f"cannot read the image {path} ({error}): mend it or remove it") from None

    def _erase(self, shape: tuple[int, int, int]) -> torch.Tensor | None:
        if self.erasing is None:
            return None
        erased = self.erasing(torch.full(shape, torch.nan))
        return None if erased[0].isnan().all() else erased

    def filenames(self, indices: list[int] | None = None) -> list[str]:
        """Paths of the images, or of those at `indices`."""
        reader = self.dataset.reader
        if indices is None:
            return reader.filenames(absolute=True)
        return [reader.filename(index, absolute=True) for index in indices]


class RawBatch(NamedTuple):
    """Training samples on their way to the device: a quarter of the bytes of normalised images."""

    images: torch.Tensor  # uint8 (B, C, H, W)
    target: torch.Tensor
    erased_rows: torch.Tensor  # (n,): which images are erased
    erased: torch.Tensor  # (n, C, H, W), see Sample
    unreadable: list[str]


def collate(samples: list[Sample]) -> RawBatch:
    """Join samples to a batch."""
    rows = [row for row, sample in enumerate(samples) if sample.erased is not None]
    return RawBatch(
        torch.from_numpy(np.stack([sample.image for sample in samples])),
        torch.tensor([sample.target for sample in samples]),
        torch.tensor(rows, dtype=torch.long),
        torch.stack([samples[row].erased for row in rows]) if rows else torch.empty(0),
        [path for sample in samples for path in sample.unreadable],
    )


class DeviceBatches:
    """Batches of a loader, moved to the device and normalised there, on a GPU while the batch before is computed on.

    Args:
        loader: of `RawBatch`es.
        mean, std: of the images, in units of their range, a number a channel.
        device: where batches go.
    """

    def __init__(self, loader: DataLoader, mean: Sequence[float], std: Sequence[float], device: torch.device):
        self.loader, self.device = loader, device
        # of images from 0 to 255
        self.mean, self.std = (255 * torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (mean, std))
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def dataset(self) -> Dataset:
        """What the batches are made of."""
        return self.loader.dataset

    def set_epoch(self, epoch: int, first_update: int = 0) -> None:
        """Choose the epoch whose batches are to come, and the update to begin with."""
        self.loader.batch_sampler.set_epoch(epoch, first_update)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        if self.stream is None:
            yield from map(self._move, self.loader)
            return
        ready = None
        for raw in self.loader:
            # memory that the consumer has let go of is written to only when its work is done
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                coming = self._move(raw)
            if ready is not None:
                yield ready
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
            ready = coming
        if ready is not None:
            yield ready

    def _move(self, raw: RawBatch) -> Batch:
        images = raw.images.to(self.device, non_blocking=True).float().sub_(self.mean).div_(self.std)
        if len(raw.erased_rows):
            rows, erased = (tensor.to(self.device, non_blocking=True) for tensor in (raw.erased_rows, raw.erased))
            images[rows] = torch.where(erased.isnan(), images[rows], erased)
        return Batch(images, raw.target.to(self.device, non_blocking=True), raw.unreadable)


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
        self.epoch = self.first_update = 0
        self.total_batch = batch_size * accum_steps * world_size
        samples = num_images // 256 * 256 if self.repeats > 1 and num_images >= 256 else num_images
        self.updates = samples // self.total_batch
        if self.updates == 0:
            raise InputError(
                f"{samples} training images do not fill one total batch of {self.total_batch} "
                f"({world_size} processes x {batch_size} images x {accum_steps} passes): choose a smaller --batch-size"
            )

    def set_epoch(self, epoch: int, first_update: int = 0) -> None:
        """Choose the epoch whose batches are to come, and the update to begin with."""
        self.epoch, self.first_update = epoch, first_update

    def __len__(self) -> int:
        return (self.updates - self.first_update) * self.accum_steps

    def __iter__(self) -> Iterator[list[Draw]]:
        order = np.random.default_rng((Stream.ORDER, self.seed, self.epoch)).permutation(self.num_images)
        for update in range(self.first_update, self.updates):
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
    except (OSError, RuntimeError, ValueError, AssertionError, KeyError, pickle.UnpicklingError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"cannot read the {split} images of {place}: {message}") from None
    return dataset if isinstance(dataset, IterableDataset) else Images(dataset, settings.seed)


def class_names(dataset: Dataset) -> dict[str, int] | None:
    """Class name to number as the reader counted them, or None where a reader does not say."""
    reader = getattr(dataset, "dataset", dataset).reader
    names = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    return dict(names) if names else None


def class_list(dataset: Dataset) -> list[str] | None:
    """Class names in the order of their numbers, or None where a reader does not say, or leaves numbers out."""
    names = {number: str(name) for name, number in (class_names(dataset) or {}).items()}
    return [names[number] for number in range(len(names))] if names.keys() == set(range(len(names))) else None


def train_classes(settings: argparse.Namespace) -> list[str] | None:
    """Names of the class folders of a data folder's train/; None where there are none, or `class_map` says it."""
    try:
        folder = find_split(settings.data_dir, "train")
    except InputError:
        return None
    if settings.dataset or settings.class_map or not folder.is_dir():
        return None
    paths = (path for path in folder.glob("[!.]*") if path.is_dir())
    return sorted((path.name for path in paths if next(path.iterdir(), None)), key=natural_key) or None


def refuse_unknown_classes(found: Iterable[str], known: Iterable[str], where: str, source: str) -> None:
    """Raise InputError if there are classes that the model does not know."""
    unknown = sorted({str(name) or "(no folder)" for name in set(found) - set(known)})
    if unknown:
        shown = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        raise InputError(f"{where} has {len(unknown)} classes that {source} lacks: {shown}")


def open_for_evaluation(settings: argparse.Namespace, classes: list[str] | None) -> Dataset:
    """Open the images to evaluate on, with the model's class numbers.

    Args:
        settings: flags of validate.py.
        classes: the model's classes in the order of their numbers; None for those of train/ beside.

    Raises:
        InputError: no images, or classes that the model does not know.
    """

    def open_(numbers: dict[str, int] | None = None) -> Dataset:
        split, length = settings.val_split, settings.val_num_samples
        return open_images(settings.data_dir, split, settings, or_itself=True, classes=numbers, num_samples=length)

    images = open_()
    found = [str(name) for name in class_names(images) or ()]
    known = classes or train_classes(settings)
    if settings.class_map or not found or not known or found == known:
        return images
    if len(found) == len(known) and not set(found) & set(known):
        return images  # as many, all with other names: ImageNet-V2's folders are numbers
    refuse_unknown_classes(found, known, settings.val_split, "the checkpoint" if classes else "train/")
    return open_({name: number for number, name in enumerate(known)})


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
        refuse_unknown_classes(val_classes, classes, settings.val_split, settings.train_split)
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
) -> "DeviceBatches | StreamedBatches":
    """Augmented, normalised training batches on the device.

    Args:
        dataset: from `open_images`.
        settings: flags of train.py.
        data_config: timm's (input_size, mean, std).
        device: where batches go.
        rank, world_size: this process, of how many.

    Returns:
        Loader of `Batch`es; `len` is the number of forward passes that an epoch still has.
    """
    augmentation = {
        "scale": settings.scale,
        "ratio": settings.ratio,
        "hflip": settings.hflip,
        "color_jitter": settings.color_jitter,
        "auto_augment": settings.aa,
        "interpolation": settings.train_interpolation,
    }
    normalisation = {"mean": data_config["mean"], "std": data_config["std"]}
    input_size, workers = data_config["input_size"], loader_workers(settings)
    if isinstance(dataset, IterableImageDataset):
        if settings.aug_repeats:
            raise InputError("repeated augmentation needs random access: --aug-repeats 0 with a streamed data set")
        loader = create_loader(
            dataset,
            input_size,
            settings.batch_size,
            is_training=True,
            re_prob=settings.reprob,
            re_mode=settings.remode,
            re_count=settings.recount,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            device=device,
            worker_seeding=seed_worker,
            **augmentation,
            **normalisation,
        )
        return StreamedBatches(loader, settings.grad_accum_steps)
    try:
        dataset.transform = create_transform(
            input_size, is_training=True, use_prefetcher=True, **augmentation, **normalisation
        )
    except (AssertionError, KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"--aa {settings.aa}, --train-interpolation {settings.train_interpolation} cannot augment images: {error!r}"
        ) from None
    if settings.reprob > 0:
        dataset.erasing = RandomErasing(settings.reprob, mode=settings.remode, max_count=settings.recount, device="cpu")
    batches = EpochBatches(
        len(dataset),
        settings.batch_size,
        accum_steps=settings.grad_accum_steps,
        rank=rank,
        world_size=world_size,
        seed=settings.seed,
        repeats=settings.aug_repeats,
    )
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=leave_signals_to_the_trainer,
    )
    return DeviceBatches(loader, device=device, **normalisation)


def leave_signals_to_the_trainer(worker: int) -> None:
    """Let a loader process live through the signals that end a run in good order: the trainer still needs its batches.

    A SIGTERM of the trainer itself ends it: so does Python stop the processes that are left when it exits.
    """
    for number in STOP_SIGNALS[1:]:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_trainer, daemon=True).start()


def seed_worker(info: WorkerInfo) -> int:
    """The seed of a loader process of timm's, which leaves signals to the trainer too."""
    leave_signals_to_the_trainer(info.id)
    return info.seed


def _end_with_the_trainer() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class StreamedBatches:
    """Batches of a streamed data set (WebDataset, Hugging Face), whose order is the reader's own.

    An epoch that was broken off is continued by reading on from its start past what was seen.
    """

    def __init__(self, loader: PrefetchLoader, accum_steps: int):
        self.loader, self.accum_steps = loader, accum_steps
        self.dataset = loader.dataset
        self.first_pass = 0

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int, first_update: int = 0) -> None:
        """Choose the epoch whose batches are to come, and the update to begin with."""
        self.dataset.set_epoch(epoch)
        self.first_pass = first_update * self.accum_steps

    def __iter__(self) -> Iterator[Batch]:
        for index, (images, target) in enumerate(self.loader):
            if index >= self.first_pass:
                yield Batch(images, target, [])


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
        worker_seeding=seed_worker,
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
