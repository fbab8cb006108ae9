"""The published checkpoints, rebuilt from their entries' names and shapes; code run in a process of its own."""

import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

DATA = Path(__file__).parents[2] / "data"
CLASSIFICATION = Path(__file__).parents[3] / "classification"


def _value(name, shape):
    """A number for every element that depends on the entry's name and shape alone; the goldens belong to these."""
    rng = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF)
    value = np.asarray(rng.standard_normal(shape), dtype=np.float32)
    fan_in = np.prod(shape[1:]) if len(shape) > 1 else 1
    if name.endswith("running_var"):
        return 0.5 + np.abs(value)
    if name.endswith("running_mean"):
        return 0.1 * value
    if "conv_offset.bias" in name:
        return 0.7 * value
    if "conv_offset.weight" in name:
        return value / np.sqrt(fan_in)
    if "pos_embed" in name or "cls_token" in name:
        return 0.2 * value
    if "relative_position_bias_table" in name:
        return 0.5 * value
    if len(shape) == 1 and name.endswith("weight"):
        return 1 + 0.1 * value
    if name.endswith("bias"):
        return 0.05 * value
    return value / np.sqrt(fan_in)


@pytest.fixture(scope="session")
def published():
    """A function of a model's name: its published state dict, with numbers or (numbers=False) on the meta device."""
    shapes = json.loads((DATA / "published.json").read_text())

    def state_dict(model, numbers=True):
        entries = {}
        for name, shape in shapes[model].items():
            dtype = torch.int64 if name.endswith(("num_batches_tracked", "relative_position_index")) else torch.float32
            if numbers and dtype == torch.float32:
                entries[name] = torch.from_numpy(np.asarray(_value(name, tuple(shape)), dtype=np.float32))
            else:
                entries[name] = torch.zeros(shape, dtype=dtype, device=None if numbers else "meta")
        return entries

    return state_dict


@pytest.fixture(scope="session")
def golden():
    """A function of a model's name: what its published code gives for the published numbers, by name."""

    def load(model):
        with np.load(DATA / "goldens" / f"{model}.npz") as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}

    return load


@pytest.fixture
def run_code() -> Callable[..., tuple[str, str]]:
    """A function that runs code in a process of its own and returns its output and warnings.

    Of the settings that the code looks at, the process's environment has only those given as keyword arguments.
    """

    def run(code, **environment):
        looked_at = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "LIT_", "CC")
        rest = {name: value for name, value in os.environ.items() if not name.startswith(looked_at)}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=rest | environment, cwd=CLASSIFICATION
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    return run
