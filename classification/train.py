#!/usr/bin/env python3
"""Train an image classifier: train.py DATA_DIR --model lit_ti (--help lists the flags)."""

import os

# Torch's threads must not spin while they wait: on a CPU they would starve the loader processes. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from litvit.cli import command, run

main = command("litvit.commands.train")

if __name__ == "__main__":
    run(main)
