#!/usr/bin/env python3
"""Draw and measure where attention looks: visualize_attention.py --checkpoint WEIGHTS --data DIR."""

from litvit.cli import command, run

main = command("litvit.commands.visualize_attention")

if __name__ == "__main__":
    run(main)
