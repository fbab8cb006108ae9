#!/usr/bin/env python3
"""Draw and measure where attention looks: visualize_attention.py --checkpoint WEIGHTS --data DIR."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see train.py

from litvit.cli import command, run

main = command("litvit.commands.visualize_attention")

if __name__ == "__main__":
    run(main)
