"""The command line: litvit COMMAND [flags], or python -m litvit COMMAND [flags]. litvit --help lists the commands."""

import difflib
import os
import sys

from litvit import __version__

# Name: module with `main(argv)`, and what it does.
COMMANDS = {
    "train": ("litvit.commands.train", "train an image classifier"),
    "validate": ("litvit.commands.validate", "evaluate a checkpoint: accuracy, calibration, what it gets wrong"),
    "predict": ("litvit.commands.predict", "label images: the most probable classes, contact sheets"),
    "compare": ("litvit.commands.compare", "compare two reports of validate, image by image"),
    "report": ("litvit.commands.report", "make the page of a training run again, or compare runs in one page"),
    "export": ("litvit.commands.export", "write a model for ONNX, OpenVINO and others, and compare it"),
    "make-token-labels": ("litvit.commands.make_token_labels", "make the label files that LVT is trained with"),
    "explore": ("litvit.commands.explore", "write a page to explore what a model sees in pictures"),
    "visualize-offset": ("litvit.commands.visualize_offset", "plot where deformable token merging reads"),
    "visualize-attention": ("litvit.commands.visualize_attention", "draw and measure where attention looks"),
    "hub-folder": ("litvit.commands.hub_folder", "make a folder of a run's best weights for the Hugging Face Hub"),
    "check-data": ("litvit.commands.check_data", "read every image of a data set before a run"),
    "demo-data": ("litvit.demo_data.__main__", "build a small data set without any download"),
    "study": ("litvit.commands.study", "train models under one recipe with several seeds, and compare them"),
    "benchmark": ("litvit.commands.benchmark", "measure speed and memory of models and of their parts"),
}


USAGE = "usage: litvit COMMAND [flags]     (litvit COMMAND --help lists its flags; litvit --version)"


def main() -> None:
    """Run the command that the command line names, and exit with its status."""
    name, *arguments = sys.argv[1:] or [""]
    if name in ("-h", "--help"):
        width = max(map(len, COMMANDS)) + 2
        lines = [f"  {command:{width}}{text}" for command, (_, text) in COMMANDS.items()]
        print("\n".join([USAGE, "", "commands:", *lines]))
        return
    if name == "--version":
        print(f"litvit {__version__}")
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        problem = f"unknown command {name!r}{hint}" if name else "which command?"
        print(f"error: {problem} (litvit --help lists the commands)", file=sys.stderr)
        sys.exit(2)
    # Read when torch loads. Threads that spin while they wait would starve the loader processes on a CPU.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from litvit.cli import command, run

    sys.argv = [f"litvit {name}", *arguments]
    run(command(COMMANDS[name][0]))


if __name__ == "__main__":
    main()
