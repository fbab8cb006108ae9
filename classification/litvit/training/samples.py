"""Reproducible samples: the order of an epoch, and the random numbers of a sample.

The order depends on seed, epoch and total batch alone; what a sample looks like on seed, epoch and its place in that
order alone. timm reads, decodes and augments.
"""

import contextlib
import random
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from torch.utils.data import Dataset, Sampler, get_worker_info

from litvit.errors import InputError


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


class Labels(NamedTuple):
    """Label maps, and what of them an image shows; of a batch: each stacked."""

    maps: torch.Tensor  # (2, K, H, W): scores and their classes, over the whole image
    boxes: torch.Tensor  # (4,): the crop, x1, y1, x2, y2 as fractions of the whole image
    flipped: torch.Tensor  # (): whether the crop is flipped, left to right


class Sample(NamedTuple):
    """One training sample as a loader process makes it."""

    image: np.ndarray  # uint8 (C, H, W)
    target: int
    erased: torch.Tensor | None  # (C, H, W): normalised values of erased pixels, NaN where the image stays
    unreadable: list[str]  # files that were tried before this image, and could not be decoded
    labels: Labels | None
    broken_labels: list[str]  # the errors that end the run


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
        # of an image: its label map, and errors
        self.read_labels: Callable[[int], tuple[torch.Tensor, list[str]]] | None = None

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
            labels, broken_labels = None, []
            if self.read_labels is None:
                image = self.transform(image)
            else:
                image, box, flipped = self.transform(image)
                label_map, broken_labels = self.read_labels(index)
                labels = Labels(label_map, torch.tensor(box), torch.tensor(flipped))
            return Sample(image, target, self._erase(image.shape), unreadable, labels, broken_labels)

    def _decode(self, index: int) -> tuple[Image.Image, int]:
        try:
            file, target, *_ = self.dataset.reader[index]
            return Image.open(file).convert(self.dataset.input_img_mode), target
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            path = self.filenames([index])[0]
            raise InputError(f"cannot read the image {path} ({error}): mend or replace it") from None

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
