"""A run of train.py with all its randomness, and what it comes to without any disturbance."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train

from litvit.runs.folder import CHECKPOINT
from litvit.training.build import build_trainer
from litvit.training.recipe import parse_config

# everything random is on: repeated augmentation, RandAugment, erasing, mixup, cutmix, stochastic depth, dropout
RANDOM = "--mixup 0.8 --cutmix 1.0 --aug-repeats 3 --reprob 0.5 --drop-path 0.2 --drop 0.2 --model-ema --clip-grad 5"


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
