"""Published checkpoints; a run of train.py with all its randomness, and what it comes to without any disturbance."""

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import train

from litvit.runs.folder import CHECKPOINT
from litvit.training.build import build_trainer
from litvit.training.recipe import parse_config

# everything random is on: repeated augmentation, RandAugment, erasing, mixup, cutmix, stochastic depth, dropout
RANDOM = "--mixup 0.8 --cutmix 1.0 --aug-repeats 3 --reprob 0.5 --drop-path 0.2 --drop 0.2 --model-ema --clip-grad 5"


DATA = Path(__file__).parents[1] / "data"


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
def random_flags(tiny_flags):
    """Flags of a run of 2 epochs of 4 updates, with all its randomness."""
    return [*tiny_flags, *RANDOM.split()]


@pytest.fixture
def flags(digits, tmp_path, random_flags):
    """The run of `random_flags` in tmp_path/run."""
    return [str(digits), *random_flags, "--output", str(tmp_path), "--experiment", "run"]


def weights(folder):
    """All that the checkpoint of a finished run holds of weights and optimizer."""
    state = torch.load(Path(folder) / CHECKPOINT, weights_only=True)
    tensors = {**state["state_dict"], **{f"ema.{k}": v for k, v in state["state_dict_ema"].items()}}
    for index, entry in state["optimizer"]["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in entry.items()}
    return tensors


@pytest.fixture
def assert_same_weights():
    """A function that compares two runs' last checkpoints, bit for bit."""

    def compare(first, second):
        first, second = weights(first), weights(second)
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert torch.equal(value, second[name]), name

    return compare


@pytest.fixture(scope="session")
def undisturbed(digits, tmp_path_factory, random_flags):
    """Folder of the run of `flags` without any disturbance."""
    output = tmp_path_factory.mktemp("undisturbed")
    flags = [str(digits), *random_flags, "--output", str(output)]
    trainer = build_trainer(parse_config(flags))
    assert trainer.run() == 0
    return trainer.folder.path


@pytest.fixture(scope="session")
def undisturbed_pair(digits, tmp_path_factory, random_flags):
    """Folder of the run of `flags` by two processes without any disturbance."""
    output = tmp_path_factory.mktemp("pair")
    script = Path(train.__file__).with_name("distributed_train.sh")
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", script, "2", digits, *random_flags, "-b", "10", "--output", output, "--experiment", "run"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return output / "run"
