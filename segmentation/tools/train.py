#!/usr/bin/env python3
"""Train a segmentor: train.py CONFIG [flags of mmseg's train.py, which --help lists]."""

import os
from collections.abc import Sequence

# Torch's threads must not spin while they wait: on a CPU they would starve the loader processes. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from litvit import cli


def main(argv: Sequence[str] | None = None) -> None:
    """Run mmseg's own script, which reads the command line."""
    from litvit.openmmlab.tools import run_tool  # a missing mmengine is one line, too

    run_tool("mmseg", "train")


if __name__ == "__main__":
    cli.run(main)
