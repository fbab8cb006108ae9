"""Batches that know their place in the run, so that a sample is the same wherever the run was interrupted."""

from collections.abc import Iterator
from itertools import count
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from litvit.data.random_streams import Stream, random_stream
from litvit.data.workers import reading


class CountedBatches:
    """Batch sampler that numbers the batches of another one, and passes over those that are done.

    It yields (iteration, indices). What else the other one has, it has too.

    Args:
        batches: Batch sampler.
        seed: Seed of the run.

    Attributes:
        iteration: Iteration of the next batch.
        epoch: Number of times that the batches have been gone through.
        skip: Number of batches to pass over at the start of the next iterator. It counts down.
    """

    def __init__(self, batches: Any, seed: int) -> None:
        self.batches = batches
        self.seed = seed
        self.iteration = self.epoch = self.skip = 0

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        batches = iter(self.batches)
        for position in count():
            # Of those samplers that draw from the generators of the process.
            with random_stream(Stream.ORDER, self.seed, self.epoch, position):
                indices = next(batches, None)
            if indices is None:
                return
            if self.skip:
                self.skip -= 1
                continue
            self.iteration += 1
            yield self.iteration - 1, indices

    def __len__(self) -> int:
        return len(self.batches)

    def __getattr__(self, name: str) -> Any:
        if name == "batches":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.batches, name)


class _CountedSamples:
    """`__getitems__` of a data set whose batches are numbered."""

    def __init__(self, dataset: Any, seed: int, rank: int) -> None:
        self.dataset = dataset
        self.key = seed, rank

    def __call__(self, batch: tuple[int, list[int]]) -> list[Any]:
        iteration, indices = batch
        seed, rank = self.key
        samples = []
        for slot, index in enumerate(indices):
            with random_stream(Stream.SAMPLE, seed, iteration, rank, slot):
                samples.append(self.dataset[index])
        reading("")
        return samples


def count_batches(loader: DataLoader, seed: int, rank: int) -> CountedBatches | None:
    """Let the samples of a loader depend on their place in the run alone.

    Args:
        loader: Loader that has not been iterated. Its data set stays what it is, so that hooks may change its pipeline.
        seed: Seed of the run.
        rank: Rank of this process.

    Returns:
        The loader's batch sampler from now on; None for a loader without one, of a stream of samples.
    """
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        return None
    counted = CountedBatches(loader.batch_sampler, seed)
    vars(loader)["batch_sampler"] = counted  # a DataLoader refuses an assignment
    loader.dataset.__getitems__ = _CountedSamples(loader.dataset, seed, rank)
    return counted
