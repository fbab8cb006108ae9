"""The order of an epoch: which images every process gets, in which batch, for any number of processes."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from litvit.data.random_streams import Stream
from litvit.errors import InputError


class SampleKey(NamedTuple):
    """One sample of an epoch: the image, and the sample's position in the epoch's order."""

    index: int
    epoch: int
    position: int


class EpochSampler(Sampler[list[SampleKey]]):
    """Batch sampler of one process, over an order of samples that all processes share.

    An epoch is a permutation of the images by (seed, epoch), each repeated `repeats` times in a row. With repeated
    augmentation (Hoffer et al., 2020) the copies go to different processes. Consecutive positions of that order form
    the total batch of a step, and are dealt out to the processes in turn. So a step sees the same images whatever the
    world size is. An epoch has as many samples as there are images; with repeats, that is rounded down to a multiple
    of 256 and covers a part of the images, as published. The last, incomplete total batch is dropped.

    Args:
        num_images: Number of images in the data set.
        batch_size: Number of images per process and micro-batch.
        accum_steps: Number of micro-batches per optimizer step.
        rank: Rank of this process.
        world_size: Number of processes.
        seed: Seed of the run.
        repeats: Number of copies of an image per epoch; 0 or 1 for no repeated augmentation.

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
        self.epoch = self.first_step = 0
        self.total_batch = batch_size * accum_steps * world_size
        samples = num_images // 256 * 256 if self.repeats > 1 and num_images >= 256 else num_images
        self.steps = samples // self.total_batch
        if self.steps == 0:
            raise InputError(
                f"{samples} training images do not fill one total batch of {self.total_batch} ({world_size} processes "
                f"x {batch_size} images x {accum_steps} micro-batches): choose a smaller --batch-size"
            )

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Choose the epoch of the next batches, and the step that they start at."""
        self.epoch, self.first_step = epoch, first_step

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.accum_steps

    def __iter__(self) -> Iterator[list[SampleKey]]:
        order = np.random.default_rng((Stream.ORDER, self.seed, self.epoch)).permutation(self.num_images)
        for step in range(self.first_step, self.steps):
            positions = range(step * self.total_batch + self.rank, (step + 1) * self.total_batch, self.world_size)
            for first in range(0, len(positions), self.batch_size):
                yield [
                    SampleKey(int(order[position // self.repeats]), self.epoch, position)
                    for position in positions[first : first + self.batch_size]
                ]
