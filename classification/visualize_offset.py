#!/usr/bin/env python3
"""Plot where token merging reads: visualize_offset.py --model lit_ti --resume FILE --vis_image FILE."""

from litvit.cli import run
from litvit.commands.visualize_offset import main

if __name__ == "__main__":
    run(main)
