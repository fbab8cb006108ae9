#!/usr/bin/env python3
"""Train a segmentor: train.py CONFIG [flags of mmseg's train.py, which --help lists]."""

import os
from collections.abc import Sequence

# Torch's waiting threads must not spin, or they starve the loader processes on a CPU. torch reads this when it loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from litvit import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Run mmseg's own script, which parses the command line."""
    from litvit.openmmlab.tools import run_tool  # not at the top: cli.run reports a missing mmengine

    return run_tool("mmseg", "train")


if __name__ == "__main__":
    cli.run(main)
