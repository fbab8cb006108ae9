#!/usr/bin/env python3
"""Evaluate a checkpoint: validate.py DATA_DIR --model lit_ti --checkpoint FILE (--help lists the flags)."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see train.py

from litvit.cli import command, run

main = command("litvit.commands.validate")

if __name__ == "__main__":
    run(main)
