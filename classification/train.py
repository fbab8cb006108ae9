#!/usr/bin/env python3
"""Train an image classifier: train.py DATA_DIR --model lit_ti (--help lists the flags)."""

from collections.abc import Sequence

from litvit.cli import run
from litvit.training.loop import Training
from litvit.training.recipe import parse_settings


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    Training(parse_settings(argv)).run()


if __name__ == "__main__":
    run(main)
