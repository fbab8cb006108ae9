#!/usr/bin/env python3
"""Plot where token merging reads: visualize_offset.py --model lit_ti --resume FILE --vis_image FILE."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see train.py

from litvit.cli import command, run

main = command("litvit.commands.visualize_offset")

if __name__ == "__main__":
    run(main)
