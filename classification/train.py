#!/usr/bin/env python3
"""Train an image classifier: train.py DATA_DIR --model lit_ti (--help lists the flags)."""

import os
from collections.abc import Sequence

# Torch's threads must not spin while they wait: on a CPU they would starve the loader processes. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from litvit.cli import run
from litvit.training.build import build_trainer
from litvit.training.recipe import parse_config


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says. Returns the exit status, see docs/reliability.md."""
    return build_trainer(parse_config(argv)).run()


if __name__ == "__main__":
    run(main)
