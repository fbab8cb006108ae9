"""Samples to batches on the device."""

import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from timm.data import create_transform
from timm.data.distributed_sampler import OrderedDistributedSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from litvit.data.augment import AugmentConfig, TrainTransform, create_mixup
from litvit.data.dataset import EvaluationImages, Fault, Images, Labels, Sample
from litvit.data.pixels import Decoder
from litvit.data.readers import DataConfig, class_counts, class_list, open_train_and_val
from litvit.data.sampler import EpochSampler
from litvit.data.splits import held_out
from litvit.data.streams import ImageStream
from litvit.data.token_labels import TokenLabels, soft_targets
from litvit.data.workers import WatchedLoader
from litvit.errors import InputError
from litvit.processes import Processes, available_cores


class Batch(NamedTuple):
    """Samples on the device."""

    images: Tensor  # (B, C, H, W), normalised
    target: Tensor  # (B,): classes; with token labels `soft_targets`
    faults: list[Fault]


class RawBatch(NamedTuple):
    """Samples on their way to the device: a quarter of the bytes of normalised images."""

    images: Tensor  # uint8 (B, C, H, W)
    target: Tensor  # (B,)
    erased_rows: Tensor  # (n,): indices of the images that are erased
    erased: Tensor  # (n, C, H, W), see Augmented
    labels: Labels | None
    faults: list[Fault]


def collate(samples: list[Sample]) -> RawBatch:
    """Join samples to a batch."""
    rows = [row for row, sample in enumerate(samples) if sample.erased is not None]
    labelled = samples[0].labels is not None
    return RawBatch(
        # NumPy keeps the order of PIL's bytes, channels last, which the first convolution is twice as fast on.
        torch.from_numpy(np.stack([sample.pixels for sample in samples])),
        torch.tensor([sample.target for sample in samples]),
        torch.tensor(rows, dtype=torch.long),
        torch.stack([samples[row].erased for row in rows]) if rows else torch.empty(0),
        Labels(*map(torch.stack, zip(*(sample.labels for sample in samples), strict=True))) if labelled else None,
        [fault for sample in samples for fault in sample.faults],
    )


class DevicePrefetcher:
    """Batches of a loader, moved to the device and normalised there, on a GPU while it computes on the previous batch.

    Args:
        loader: Loader of `RawBatch`es. To train it has an `EpochSampler`.
        mean: Mean per channel, of images from 0 to 1.
        std: Standard deviation per channel.
        device: Device of the batches.
        token_labels: Label files; with them, targets are `soft_targets`.
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
        """The data set of the batches."""
        return self.loader.dataset

    @property
    def sampler(self) -> Sampler:
        """The sampler of the batches, which timm asks for the number of images without padding."""
        return self.loader.sampler

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Choose the epoch of the next batches, and the step that they start at."""
        self.loader.batch_sampler.set_epoch(epoch, first_step)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        if self.stream is None:
            yield from map(self._move, self.loader)
            return
        ready = None
        for raw in self.loader:
            # Memory that the consumer has released is written to only when its work is done.
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
        return Batch(images, target, raw.faults)


class StreamedBatches(DevicePrefetcher):
    """Training batches of an `ImageStream`, whose order is the stream's own.

    An epoch that was interrupted is continued by reading from its start, past what was seen.

    Args:
        loader: Loader of `RawBatch`es.
        accum_steps: Number of micro-batches per optimizer step.
        kwargs: Further arguments of `DevicePrefetcher`.
    """

    def __init__(self, loader: DataLoader, accum_steps: int, **kwargs):
        super().__init__(loader, **kwargs)
        self.accum_steps, self.first_batch = accum_steps, 0

    def __len__(self) -> int:
        return self.dataset.batches

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Choose the epoch of the next batches, and the step that they start at."""
        self.dataset.epoch.value = epoch
        self.first_batch = first_step * self.accum_steps

    def __iter__(self) -> Iterator[Batch]:
        return itertools.islice(super().__iter__(), self.first_batch, None)


def train_loader(
    dataset: Images | ImageStream,
    augment: AugmentConfig,
    data_config: dict,
    processes: Processes,
    *,
    batch_size: int,
    accum_steps: int = 1,
    workers: int | None = None,
    token_labels: TokenLabels | None = None,
) -> DevicePrefetcher | StreamedBatches:
    """Make a loader of augmented, normalised training batches on the device.

    Args:
        dataset: Training images, from `open_images`.
        augment: Augmentation of the images.
        data_config: timm's input_size, mean and std.
        processes: The processes that share the images, and this one's device.
        batch_size: Number of images per process and micro-batch.
        accum_steps: Number of micro-batches per optimizer step.
        workers: Number of loader processes, None for `default_workers`.
        token_labels: Soft labels of tokens to use as targets.

    Returns:
        Loader of `Batch`es. Its length is the number of micro-batches that the epoch still has, of a stream that of a
        whole epoch.

    Raises:
        InputError: augmentation that is not possible, fewer images than a total batch, or a stream that cannot be
            shared by the processes.
    """
    rank, world_size = processes.rank, processes.world_size
    normalisation = {"mean": data_config["mean"], "std": data_config["std"]}
    workers = default_workers() if workers is None else workers
    dataset.transform = TrainTransform(augment, data_config["input_size"], **normalisation)
    if isinstance(dataset, ImageStream):
        if augment.aug_repeats:
            raise InputError("repeated augmentation needs random access: --aug-repeats 0 with a streamed data set")
        total_batch = batch_size * accum_steps * world_size
        if len(dataset) < total_batch:
            count = len(dataset) or "an unknown number of"
            raise InputError(
                f"{count} training images do not fill one total batch of {total_batch}: --train-num-samples says how "
                "many the stream has"
            )
        batches = len(dataset) // total_batch * accum_steps
        workers = dataset.deal(rank, world_size, workers, batch_size, batches)
        loader = _loader(dataset, processes.device, workers, batch_size=batch_size)
        return StreamedBatches(loader, accum_steps, device=processes.device, **normalisation)
    dataset.read_labels = None if token_labels is None else token_labels.read_or_blank
    sampler = EpochSampler(
        len(dataset),
        batch_size,
        accum_steps=accum_steps,
        rank=rank,
        world_size=world_size,
        seed=dataset.seed,
        repeats=augment.aug_repeats,
    )
    loader = _loader(dataset, processes.device, workers, batch_sampler=sampler)
    return DevicePrefetcher(loader, device=processes.device, token_labels=token_labels, **normalisation)


def eval_loader(
    dataset: Images | ImageStream,
    data_config: dict,
    processes: Processes,
    *,
    batch_size: int,
    workers: int | None = None,
) -> DevicePrefetcher:
    """Make a loader of resized, cropped, normalised batches on the device, in the data set's order.

    Images that cannot be read are blank there, and have faults.

    Args:
        dataset: Images, from `open_images`.
        data_config: timm's input_size, interpolation, mean, std and crop_pct.
        processes: The processes that share the images, and this one's device.
        batch_size: Number of images per batch.
        workers: Number of loader processes, None for `default_workers`.

    Raises:
        InputError: a stream that cannot be shared by the processes.
    """
    rank, world_size = processes.rank, processes.world_size
    workers = default_workers() if workers is None else workers
    names = ("input_size", "interpolation", "mean", "std", "crop_pct")
    dataset.transform = create_transform(**{name: data_config[name] for name in names}, use_prefetcher=True)
    sampler = None
    if isinstance(dataset, ImageStream):
        workers = dataset.deal(rank, world_size, workers, batch_size, batches=0)
    else:
        dataset = EvaluationImages(dataset)
        sampler = OrderedDistributedSampler(dataset, world_size, rank) if world_size > 1 else None
    loader = _loader(dataset, processes.device, workers, batch_size=batch_size, sampler=sampler)
    return DevicePrefetcher(loader, data_config["mean"], data_config["std"], processes.device)


def sample_batches(
    images: Images, data_config: dict, device: torch.device, *, batch_size: int, workers: int | None, title: str
) -> Iterator[Tensor]:
    """Yield batches of images that can be read, (B, C, H, W), with a progress bar on a terminal.

    Args:
        images: Images, from `open_sample`.
        data_config: timm's input_size, interpolation, mean, std and crop_pct.
        device: Device of the batches.
        batch_size: Number of images per batch.
        workers: Number of loader processes, None for `default_workers` or fewer for few images.
        title: Title of the progress bar.

    Raises:
        InputError: no image can be read. If only some cannot, that is printed.
    """
    if workers is None:
        workers = min(default_workers(), len(images) // batch_size)
    loader = eval_loader(images, data_config, Processes(device), batch_size=batch_size, workers=workers)
    done = read = 0
    with tqdm(total=len(images), desc=title, unit=" images", disable=not sys.stderr.isatty(), leave=False) as bar:
        for batch in loader:
            for reason in dict.fromkeys(fault.reason for fault in batch.faults):
                bar.write(f"error: {reason}", file=sys.stderr)
            broken = {fault.path for fault in batch.faults}
            kept = [i for i in range(len(batch.images)) if images.name(done + i) not in broken]
            done, read = done + len(batch.images), read + len(kept)
            if kept:
                yield batch.images if len(kept) == len(batch.images) else batch.images[kept]
            bar.update(len(batch.images))
    if not read:
        raise InputError(f"none of the {len(images)} images can be read")


def _loader(dataset: Dataset, device: torch.device, workers: int, **kwargs) -> WatchedLoader:
    """Make a loader whose processes stay for the next epoch."""
    return WatchedLoader(
        dataset,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        **kwargs,
    )


class TrainingData:
    """The images of a run, and the batches that they become.

    Args:
        config: Data to open.
        augment: Augmentation of the training images, and of their batches.
        decoder: How files become images; None for RGB as stored.
        seed: Seed of the run.

    Raises:
        InputError: data that cannot be trained on.
    """

    def __init__(self, config: DataConfig, augment: AugmentConfig, decoder: Decoder | None = None, seed: int = 0):
        self.config, self.augment = config, augment
        self.train, self.val, self.num_classes = open_train_and_val(config, decoder, seed)
        self.classes = class_list(self.train)
        if self.num_classes < 2:
            raise InputError(
                f"{config.data_dir} has one class, {', '.join(self.classes or [])}: to train a classifier takes two, "
                f"with one folder each in {config.train_split}/"
            )
        self.held_out = held_out(self.val)
        self.mixup = create_mixup(augment, self.num_classes)

    def class_weights(self) -> list[float] | None:
        """Return the weight of each class in the loss: the mean number of images per class over its own.

        None without `--class-weights`. The mean over the images is 1.

        Raises:
            InputError: the class of every image is not known beforehand.
        """
        if not self.augment.class_weights:
            return None
        counts = class_counts(self.train, self.num_classes)
        mean = sum(counts) / sum(count > 0 for count in counts)
        return [mean / count if count else 0.0 for count in counts]

    def batches(
        self, data_config: dict, processes: Processes, accum_steps: int = 1, token_labels: TokenLabels | None = None
    ) -> tuple[DevicePrefetcher | StreamedBatches, DevicePrefetcher]:
        """Make the loaders of training and validation batches, see `train_loader` and `eval_loader`."""
        sizes = {"batch_size": self.config.batch_size, "workers": self.config.workers}
        train = train_loader(
            self.train,
            self.augment,
            data_config,
            processes,
            accum_steps=accum_steps,
            token_labels=token_labels,
            **sizes,
        )
        sizes["batch_size"] = self.config.eval_batch_size
        return train, eval_loader(self.val, data_config, processes, **sizes)


def default_workers() -> int:
    """Return the number of loader processes per process: the number of cores that it has to itself, at most 8."""
    return min(8, max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
