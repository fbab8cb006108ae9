#!/usr/bin/env python3
"""Measure LIT and its counterparts, and the parts that LIT is made of: benchmark.py --help lists what."""

from litvit.cli import run
from litvit.commands.benchmark import main

if __name__ == "__main__":
    run(main)
