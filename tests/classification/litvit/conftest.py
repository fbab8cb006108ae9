"""What published code computes; code run in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

DATA = Path(__file__).parents[2] / "data"
CLASSIFICATION = Path(__file__).parents[3] / "classification"


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
