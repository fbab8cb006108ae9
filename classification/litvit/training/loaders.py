"""Samples to batches on the device."""

import argparse
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from timm.data import IterableImageDataset, Mixup, create_loader, create_transform
from timm.data.loader import PrefetchLoader
from timm.data.random_erasing import RandomErasing
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils.worker import WorkerInfo

from litvit.errors import InputError
from litvit.training.samples import DraftedCrop, EpochBatches, Labels, Sample
from litvit.training.stop import STOP_SIGNALS
from litvit.training.token_labels import LabelledTransform, TokenLabels, soft_targets


class Batch(NamedTuple):
    """Training samples on the device."""

    images: torch.Tensor  # (B, C, H, W), normalised
    target: torch.Tensor  # (B,): classes; with token labels `soft_targets`
    unreadable: list[str]
    broken_labels: list[str]


class RawBatch(NamedTuple):
    """Training samples on their way to the device: a quarter of the bytes of normalised images."""

    images: torch.Tensor  # uint8 (B, C, H, W)
    target: torch.Tensor
    erased_rows: torch.Tensor  # (n,): which images are erased
    erased: torch.Tensor  # (n, C, H, W), see Sample
    unreadable: list[str]
    labels: Labels | None
    broken_labels: list[str]


def collate(samples: list[Sample]) -> RawBatch:
    """Join samples to a batch."""
    rows = [row for row, sample in enumerate(samples) if sample.erased is not None]
    labelled = samples[0].labels is not None
    return RawBatch(
        torch.from_numpy(np.stack([sample.image for sample in samples])),
        torch.tensor([sample.target for sample in samples]),
        torch.tensor(rows, dtype=torch.long),
        torch.stack([samples[row].erased for row in rows]) if rows else torch.empty(0),
        [path for sample in samples for path in sample.unreadable],
        Labels(*map(torch.stack, zip(*(sample.labels for sample in samples), strict=True))) if labelled else None,
        [error for sample in samples for error in sample.broken_labels],
    )


class DeviceBatches:
    """Batches of a loader, moved to the device and normalised there, on a GPU while the batch before is computed on.

    Args:
        loader: of `RawBatch`es.
        mean, std: of the images, in units of their range, a number a channel.
        device: where batches go.
        token_labels: with them, targets are `soft_targets`.
    """

    def __init__(
        self,
        loader: DataLoader,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        token_labels: TokenLabels | None = None,
    ):
        self.loader, self.device, self.token_labels = loader, device, token_labels
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
        if raw.labels is None:
            target = raw.target.to(self.device, non_blocking=True)
        else:
            labels = Labels(*(tensor.to(self.device, non_blocking=True) for tensor in raw.labels))
            target = soft_targets(labels, self.token_labels.num_classes, self.token_labels.size)
        return Batch(images, target, raw.unreadable, raw.broken_labels)


def train_loader(
    dataset: Dataset,
    settings: argparse.Namespace,
    data_config: dict,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    token_labels: TokenLabels | None = None,
) -> "DeviceBatches | StreamedBatches":
    """Augmented, normalised training batches on the device.

    Args:
        dataset: from `open_images`.
        settings: flags of train.py.
        data_config: timm's (input_size, mean, std).
        device: where batches go.
        rank, world_size: this process, of how many.
        token_labels: soft labels of tokens to use as targets.

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
        transform = create_transform(
            input_size,
            is_training=True,
            use_prefetcher=True,
            separate=token_labels is not None,
            **augmentation,
            **normalisation,
        )
    except (AssertionError, KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"--aa {settings.aa}, --train-interpolation {settings.train_interpolation} cannot augment images: {error!r}"
        ) from None
    steps = (transform if token_labels is None else transform[0]).transforms
    steps[0] = DraftedCrop(input_size[-2:], settings.scale, settings.ratio, settings.train_interpolation)
    dataset.transform = transform if token_labels is None else LabelledTransform(*transform)
    dataset.read_labels = None if token_labels is None else token_labels.read_or_blank
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
    return DeviceBatches(loader, device=device, token_labels=token_labels, **normalisation)


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
                yield Batch(images, target, [], [])


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
