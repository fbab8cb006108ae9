"""Random numbers that depend on their purpose and position in the run alone: no generator state has to be saved."""

import contextlib
import random
from collections.abc import Iterator
from enum import IntEnum

import numpy as np
import torch
from torch.utils.data import get_worker_info


class Stream(IntEnum):
    """Purpose of a random stream, the first number of its seed."""

    WEIGHTS, ORDER, SAMPLE, MICRO_BATCH = range(1, 5)


def _seed_cpu(stream: Stream, *key: int) -> int:
    words = np.random.SeedSequence((stream, *key)).generate_state(3, np.uint32).tolist()
    random.seed(words[0])
    np.random.seed(words[1])
    torch.default_generator.manual_seed(words[2])
    return words[2]


def seed_everything(stream: Stream, *key: int) -> None:
    """Seed the generators of Python, NumPy and torch, those of all devices included.

    Args:
        stream: Purpose of the random numbers.
        *key: Position of their use, such as (seed, epoch, index): whole numbers from 0.
    """
    torch.manual_seed(_seed_cpu(stream, *key))


@contextlib.contextmanager
def random_stream(stream: Stream, *key: int) -> Iterator[None]:
    """Seed the CPU's generators as `seed_everything` does, for a block. The main process gets its states back."""
    # A loader process draws nothing outside of streams. Saving its states would take a tenth of a sample's time.
    states = None
    if get_worker_info() is None:
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    _seed_cpu(stream, *key)
    try:
        yield
    finally:
        if states is not None:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])
