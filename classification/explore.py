#!/usr/bin/env python3
"""Write a page to explore a model with: explore.py IMAGE... --checkpoint WEIGHTS."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see train.py

from litvit.cli import command, run

main = command("litvit.commands.explore")

if __name__ == "__main__":
    run(main)
