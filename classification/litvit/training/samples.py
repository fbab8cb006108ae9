"""Reproducible samples: the order of an epoch, and the random numbers of a sample.

The order depends on seed, epoch and total batch alone; what a sample looks like on seed, epoch and its place in that
order alone. timm reads, decodes and augments.
"""

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
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

    image: torch.Tensor  # uint8 (C, H, W)
    target: int
    erased: torch.Tensor | None  # (C, H, W): normalised values of erased pixels, NaN where the image stays
    unreadable: list[str]  # files that were tried before this image, and could not be decoded
    labels: Labels | None
    broken_labels: list[str]  # the errors that end the run


class DraftedCrop(RandomResizedCropAndInterpolation):
    """timm's random crop, number for number, for which a large JPEG file is not decoded in full.

    libjpeg decodes to 1/2, 1/4 or 1/8 of the size for less. A file that is opened but not decoded yet gets the smallest
    of them at which the crop still has twice the pixels a side that it is resized to. That moves the crop's edges by a
    quarter of a resulting pixel at most, and changes pixels by less than bilinear interpolation for bicubic would.
    """

    def get_params(
        self, image: Image.Image, scale: tuple[float, float], ratio: tuple[float, float]
    ) -> tuple[int, int, int, int]:
        """Choose a crop, and the size to decode.

        Args:
            image: of which a JPEG file that is not decoded yet changes its size.
            scale: bounds of the crop's part of the area.
            ratio: bounds of its width over its height.

        Returns:
            Its top, left, height and width in pixels of the image as it is now.
        """
        top, left, height, width = super().get_params(image, scale, ratio)
        excess = min(height / self.size[0], width / self.size[1]) / 2
        whole = image.width
        drafted = image.draft(None, tuple(math.ceil(side / excess) for side in image.size))
        if drafted is None:  # no JPEG file, or decoded already
            return top, left, height, width
        reduction = whole / drafted[1][2]
        top, left, bottom, right = (round(edge / reduction) for edge in (top, left, top + height, left + width))
        return top, left, bottom - top, right - left


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

    def __getitem__(self, key: int | Draw) -> tuple[torch.Tensor, int] | Sample:
        """Read an image as uint8 (C, H, W), and its class.

        Raises:
            InputError: a file that is no image; for a `Draw`, ten in a row.
        """
        if not isinstance(key, Draw):
            return self._read(key)
        with random_stream(Stream.SAMPLE, self.seed, key.epoch, key.place):
            index, unreadable = key.index, []
            while True:
                try:
                    image, target = self._read(index, drafted=True)
                    break
                except InputError:
                    unreadable.append(self.filenames([index])[0])
                    if len(unreadable) == self.TRIES:
                        raise
                index = random.randrange(len(self))
            labels, broken_labels = None, []
            if self.read_labels is not None:
                image, box, flipped = image
                label_map, broken_labels = self.read_labels(index)
                labels = Labels(label_map, torch.tensor(box), torch.tensor(flipped))
            return Sample(image, target, self._erase(image.shape), unreadable, labels, broken_labels)

    def _read(self, index: int, drafted: bool = False) -> tuple[Any, int]:
        """Read and transform an image; `drafted`: the transform may say at which size a JPEG file is decoded."""
        mode = self.dataset.input_img_mode
        try:
            file, target, *_ = self.dataset.reader[index]
            image = Image.open(file)
            if image.mode != mode:
                image = image.convert(mode)
            elif not drafted or image.format != "JPEG":
                image.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise self._unreadable(index, error) from None
        try:
            return self.transform(image), target
        except OSError as error:
            raise self._unreadable(index, error) from None

    def _unreadable(self, index: int, error: Exception) -> InputError:
        path = self.filenames([index])[0]
        return InputError(f"cannot read the image {path} ({error}): mend or replace it")

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
