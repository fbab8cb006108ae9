#!/usr/bin/env python3
"""Label images: predict.py IMAGE... --checkpoint output/RUN (--help lists the flags)."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see train.py

from litvit.cli import command, run

main = command("litvit.commands.predict")

if __name__ == "__main__":
    run(main)
