#!/usr/bin/env python3
"""Make token labels: make_token_labels.py DATA_DIR OUTPUT --model NAME --checkpoint FILE (--help lists the flags)."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see train.py

from litvit.cli import command, run

main = command("litvit.commands.make_token_labels")

if __name__ == "__main__":
    run(main)
