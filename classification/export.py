#!/usr/bin/env python3
"""Write a trained model for another runtime: export.py --checkpoint FILE --format onnx (--help lists the flags)."""

from litvit.cli import run
from litvit.commands.export import main

if __name__ == "__main__":
    run(main)
