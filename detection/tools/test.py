#!/usr/bin/env python3
"""Evaluate a detector: test.py CONFIG CHECKPOINT [flags of mmdet's test.py, which --help lists]."""

import os
from collections.abc import Sequence

# Torch's waiting threads must not spin, or they starve the loader processes on a CPU. torch reads this when it loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from litvit import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Run mmdet's own script, which parses the command line."""
    from litvit.openmmlab.tools import run_tool  # not at the top: cli.run reports a missing mmengine

    return run_tool("mmdet", "test")


if __name__ == "__main__":
    cli.run(main)
