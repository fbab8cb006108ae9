"""Write a page that shows what token merging reads and where attention looks, to be explored in a browser.

litvit explore image.jpg --checkpoint output/RUN
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from litvit.cli import ArgumentParser
from litvit.data.readers import open_sample
from litvit.errors import InputError
from litvit.explorer.data import Explorer, explore, make_page
from litvit.explorer.server import Server, serve
from litvit.memory import keep_freed_memory
from litvit.processes import EXIT_INPUT_ERROR, choose_device
from litvit.runs.folder import save_text
from litvit.settings import take
from litvit.training.classifier import build_classifier
from litvit.training.flags import (
    CHECKPOINT_HELP,
    TRACEBACK_HELP,
    HelpFormatter,
    add_model_flags,
    check_range,
    parse_with_checkpoint,
)
from litvit.training.model import ModelConfig
from litvit.training.report import writing_to

PAGE = "explorer.html"


def parse_settings(argv: Sequence[str] | None) -> list[argparse.Namespace]:
    """Read the command line. Returns settings per checkpoint, which differ in what the checkpoint says."""
    parser = ArgumentParser(
        usage="%(prog)s IMAGE... --checkpoint WEIGHTS [--checkpoint WEIGHTS ...] [flags]",
        description="Write one page to explore pictures with in a browser: the 64 points that a token of LIT's last "
        "stage reads through token merging, the attention of a token in every block and head, and the most probable "
        "classes. Several checkpoints are shown side by side. The page needs no network and no server.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("images", metavar="IMAGE", nargs="*", help="image files, folders, patterns such as 'a/**/*.jpg', - for stdin's")
    add("--checkpoint", metavar="WEIGHTS", help=f"{CHECKPOINT_HELP}; several: to be compared")
    add("-n", "--num-images", type=int, default=8, metavar="N", help="images at most, evenly spread (8)")
    add("-k", "--topk", type=int, default=5, metavar="N", help="classes per image (5)")
    add("--output", type=Path, metavar="FILE", help=f"page to be written ({PAGE})")
    port = {"type": int, "nargs": "?", "const": 0, "metavar": "PORT"}
    add("--serve", **port, help="show the page on this machine, to drop pictures on, and write no file (a free port)")
    add("--device", metavar="NAME", help="cuda, cpu ... (cuda if available)")
    add("--traceback", action="store_true", help=TRACEBACK_HELP)
    add_model_flags(parser, training=False)

    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--checkpoint", action="append", default=[])
    found, rest = first.parse_known_args(argv)
    chosen = []
    for checkpoint in found.checkpoint or [None]:
        settings = parse_with_checkpoint(parser, [*(["--checkpoint", checkpoint] if checkpoint else []), *rest])
        settings.label = checkpoint or settings.model
        chosen.append(settings)
    check_range(settings, ("num_images", "topk"), 1, None)
    if settings.serve is None and not settings.images:
        raise InputError("which images? image files and folders, or --serve to drop them on the page")
    if settings.serve is not None and settings.output is not None:
        raise InputError("--serve writes no page: leave out --output, or --serve")
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    """Write or serve the page as the command line says. Returns 0, or 2 if some images could not be read."""
    every = parse_settings(argv)
    settings, start = every[0], time.perf_counter()
    images, problems = open_sample(settings.images, settings.num_images) if settings.images else ([], [])
    output = settings.output or Path(PAGE)
    if settings.serve is None:
        if output.is_dir():
            raise InputError(f"--output {output} is a folder: name a file in it, such as {output / PAGE}")
        with writing_to(output.parent):  # before the work that it is for
            pass
    device = choose_device(settings.device)
    if device.type == "cpu":
        keep_freed_memory()
    explorers = [
        Explorer(
            build_classifier(take(ModelConfig, vars(each)), each.checkpoint, each.description, device),
            each.label,
            settings.topk,
        )
        for each in every
    ]
    pictures = []
    for i in range(len(images)):
        try:
            picture = explore(explorers, lambda i=i: images.open(i)[0], images.name(i))
            pictures.append(picture | {"name": str(Path(*Path(picture["name"]).parts[-2:]))})
        except InputError as error:
            problems.append(str(error))
    if settings.serve is None and not pictures:
        raise InputError("; ".join(problems))
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if settings.serve is not None:
        server = Server(explorers, pictures, settings.serve)
        serve(server, lambda address: print(f"{address}  (Ctrl-C ends it)", flush=True))
        return EXIT_INPUT_ERROR if problems else 0
    content = make_page(explorers, pictures)
    with writing_to(output.parent):
        save_text(output, content.decode(), printed=False)
    took = time.perf_counter() - start
    shown = "1 image" if len(pictures) == 1 else f"{len(pictures)} images"
    print(f"{shown} in {output}, {len(content) / 1e6:.1f} MB: open it in a browser ({took:.1f} s)")
    return EXIT_INPUT_ERROR if problems else 0
