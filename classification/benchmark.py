#!/usr/bin/env python3
"""Measure LIT and its counterparts, and the parts that LIT is made of: benchmark.py --help lists what."""

from litvit.cli import command, run

main = command("litvit.commands.benchmark")

if __name__ == "__main__":
    run(main)
