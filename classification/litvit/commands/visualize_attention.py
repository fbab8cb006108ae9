"""Draw and measure where the attention of a model looks, on average over images.

litvit visualize-attention --checkpoint lit_ti.in1k --data /imagenet
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from litvit.attention.maps import AttentionAverages, AttentionMap
from litvit.cli import ArgumentParser
from litvit.data.contact_sheet import BLACK, GREY, contact_sheet, shrink
from litvit.data.loader import sample_batches
from litvit.data.readers import DataConfig, open_sample
from litvit.dtm.offsets import GREEN, PLOT_SIZE
from litvit.errors import InputError
from litvit.memory import keep_freed_memory
from litvit.processes import EXIT_INPUT_ERROR, choose_device
from litvit.settings import add_flags, take
from litvit.training.flags import (
    CHECKPOINT_HELP,
    TRACEBACK_HELP,
    HelpFormatter,
    add_model_flags,
    check_range,
    parse_with_checkpoint,
)
from litvit.training.model import ModelConfig, build_trained_model, data_settings
from litvit.training.report import Row, format_table, write_csv, writing_to

MAPS, TABLE, PLOT = "attention_map", "attention.csv", "attention.png"
EDGE = 3  # pixels of the line around the query
COLUMNS = (
    *("stage", "block", "pass", "head", "distance_px", "entropy_nats"),
    *("uniform_distance_px", "uniform_entropy_nats"),
)
SHOWN = (
    *("stage", "block", "pass", "heads", "distance_px", "lowest", "highest", "uniform_px"),
    *("entropy_nats", "uniform_nats"),
)


def parse_settings(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(
        usage="%(prog)s [IMAGE...] --checkpoint WEIGHTS [--data DIR] [flags]",
        description="Draw where attention looks: the probabilities of one query token for all keys, averaged over "
        "images, one heat map per stage, block and head. And measure it: how far from a query its keys lie, weighted "
        "by probability, and the entropy, the means over all queries and images.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("images", metavar="IMAGE", nargs="*", help="image files, folders, patterns such as 'a/**/*.jpg', - for stdin's")
    add("--data", metavar="DIR", help="data set, whose validation images are taken, a folder of images, or a .tar")
    add("--resume", "--checkpoint", dest="checkpoint", metavar="WEIGHTS", help=CHECKPOINT_HELP)
    add("-n", "--num-images", type=int, default=100, metavar="N", help="images to average over, evenly spread (100)")
    add(
        "--query",
        type=int,
        nargs="+",
        metavar="I",
        help="index of the query token, row by row, in each stage with attention (near the centre)",
    )
    add("--output", type=Path, default="visualization", metavar="DIR", help=f"DIR/{MAPS} for the maps (visualization)")
    add("-b", "--batch-size", type=int, default=1, metavar="N", help="images per batch (1)")
    add("--device", metavar="NAME", help="cuda, cpu ... (cuda if available)")
    add("--traceback", action="store_true", help=TRACEBACK_HELP)
    add_flags(parser, DataConfig, only=("workers",))
    add_model_flags(parser, training=False)
    settings = parse_with_checkpoint(parser, argv)
    if not settings.images and settings.data is None:
        raise InputError("which images? --data DIR, or image files and folders")
    check_range(settings, ("num_images",), 1, None)
    return settings


def main(argv: Sequence[str] | None = None) -> int:
    """Draw and measure attention as the command line says. Returns 0, or 2 if some images could not be read."""
    settings = parse_settings(argv)
    start = time.perf_counter()
    config = take(ModelConfig, vars(settings))
    sources = [*settings.images, *([settings.data] if settings.data is not None else [])]
    images, problems = open_sample(sources, settings.num_images, config.decoder)
    device = choose_device(settings.device)
    if device.type == "cpu":
        keep_freed_memory()
    model = build_trained_model(config, settings.description.get("num_classes"), settings.checkpoint).eval().to(device)
    data_config = data_settings(config, model)
    averages = AttentionAverages(model, data_config["input_size"], settings.query)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if averages.left_out:
        names = ", ".join(averages.left_out[:3]) + (", ..." if len(averages.left_out) > 3 else "")
        print(f"left out, not between tokens of a map: {names}", file=sys.stderr)

    folder = settings.output / MAPS
    sizes = {"batch_size": settings.batch_size, "workers": settings.workers}
    with writing_to(folder):  # before the work that it is for
        pass
    for batch in sample_batches(images, data_config, device, **sizes, title="attention"):
        averages.add(batch)
    print(format_table(summary(averages.maps), SHOWN, digits=2))
    with writing_to(folder):
        count = save_maps(averages.maps, data_config["input_size"][1:], folder)
        write_csv(folder / TABLE, COLUMNS, table(averages.maps))
        plot_measures(averages.maps).savefig(folder / PLOT)
    seen = averages.maps[0].images
    print(f"{count} maps of {seen} images, {TABLE} and {PLOT} in {folder} ({time.perf_counter() - start:.1f} s)")
    return EXIT_INPUT_ERROR if problems or seen < len(images) else 0


def table(maps: Sequence[AttentionMap]) -> list[Row]:
    """Return one row of COLUMNS per head."""
    return [
        {
            "stage": found.stage,
            "block": found.block,
            "pass": found.pass_number,
            "head": head,
            "distance_px": round(distance, 3),
            "entropy_nats": round(entropy, 5),
            "uniform_distance_px": found.uniform_distance and round(found.uniform_distance, 3),
            "uniform_entropy_nats": found.uniform_entropy and round(found.uniform_entropy, 5),
        }
        for found in maps
        for head, (distance, entropy) in enumerate(zip(found.distance.tolist(), found.entropy.tolist(), strict=True))
    ]


def summary(maps: Sequence[AttentionMap]) -> list[Row]:
    """Return one row of SHOWN per block: the mean, lowest and highest distance of its heads, their mean entropy."""
    return [
        {
            "stage": found.stage,
            "block": found.block,
            "pass": found.pass_number,
            "heads": len(found.distance),
            "distance_px": found.distance.mean().item(),
            "lowest": found.distance.min().item(),
            "highest": found.distance.max().item(),
            "uniform_px": found.uniform_distance,
            "entropy_nats": found.entropy.mean().item(),
            "uniform_nats": found.uniform_entropy,
        }
        for found in maps
    ]


def save_maps(maps: Sequence[AttentionMap], size: tuple[int, int], folder: Path) -> int:
    """Save a heat map per head, the averages of each block as .npy, and a sheet per stage. Earlier ones are removed.

    The names are those of the paper's maps, `stage-K/blockN/pixel-I-block-N-head-H.png`, with stages counted from 1,
    blocks and heads from 0. A block's second pass has a folder of its own, `blockN-pass2`. The averages of a block,
    `pixel-I-block-N.npy`, are (heads, h, w).

    Args:
        maps: Averages.
        size: Height and width of the images in pixels.
        folder: Folder of the maps, which exists.

    Returns:
        Number of heat maps.
    """
    for pattern in ("stage-*/block*/pixel-*-block-*.png", "stage-*/block*/pixel-*-block-*.npy", "stage-*.png"):
        for old in folder.glob(pattern):
            old.unlink()
    sheets: dict[int, list] = {}
    for found in maps:
        name = f"block{found.block}" + (f"-pass{found.pass_number}" if found.pass_number > 1 else "")
        inside = folder / f"stage-{found.stage}" / name
        inside.mkdir(parents=True, exist_ok=True)
        stem = f"pixel-{found.query}-block-{found.block}"
        values = found.probabilities.numpy()
        np.save(inside / f"{stem}.npy", values)
        for head, distance in enumerate(found.distance.tolist()):
            picture = heat_map(values[head], found, size)
            picture.save(inside / f"{stem}-head-{head}.png")
            lines = [(f"{name}, head {head}", BLACK), (f"distance {distance:.1f} px", GREY)]
            sheets.setdefault(found.stage, []).append((shrink(picture), lines))
    for stage, cells in sheets.items():
        first = next(found for found in maps if found.stage == stage)
        heads = [len(found.distance) for found in maps if (found.stage, found.block) == (stage, first.block)]
        contact_sheet(cells, columns=sum(heads)).save(folder / f"stage-{stage}.png")
    return sum(map(len, sheets.values()))


def heat_map(values: np.ndarray, found: AttentionMap, size: tuple[int, int]) -> Image.Image:
    """Draw probabilities (h, w) as colours from 0, black, to the largest, with a green square around the query."""
    zoom = math.ceil(PLOT_SIZE / min(size))
    colours = matplotlib.colormaps["magma"](values / max(values.max(), np.finfo(float).tiny), bytes=True)[..., :3]
    side = zoom * found.layout.stride * found.layout.reduction
    height, width = (side * tokens for tokens in values.shape)
    picture = Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST)
    row, column = (zoom * found.layout.stride * place for place in divmod(found.query, found.layout.grid[1]))
    end = zoom * found.layout.stride - 1 + EDGE
    square = (column - EDGE, row - EDGE, column + end, row + end)
    ImageDraw.Draw(picture).rectangle(square, outline=GREEN, width=EDGE)
    return picture


def plot_measures(maps: Sequence[AttentionMap]) -> Figure:
    """Plot distance and entropy of each head, a dot, over the depth of its block, beside those of uniform attention."""
    figure = Figure(figsize=(max(6.0, 2 + 0.4 * len(maps)), 7), dpi=100, layout="constrained")
    labels = ("mean attention distance (pixels)", "entropy (nats)")
    many = any(found.pass_number > 1 for found in maps)
    names = [f"{found.stage}.{found.block}" + (f" ({found.pass_number})" if many else "") for found in maps]
    for number, label in enumerate(labels):
        axes = figure.add_subplot(2, 1, number + 1, ylabel=label)
        for stage, number_of_pass in sorted({(found.stage, found.pass_number) for found in maps}):
            curve = f"stage {stage}" + (f" ({number_of_pass})" if many else "")
            here = (stage, number_of_pass)
            places = [place for place, found in enumerate(maps) if (found.stage, found.pass_number) == here]
            heads = [(maps[place].distance, maps[place].entropy)[number] for place in places]
            line = axes.plot(places, [values.mean() for values in heads], label=curve)[0]
            for place, values in zip(places, heads, strict=True):
                axes.plot([place] * len(values), values, ".", color=line.get_color(), alpha=0.6)
            uniform = [(maps[place].uniform_distance, maps[place].uniform_entropy)[number] for place in places]
            if None not in uniform:
                axes.plot(places, uniform, "_", color="grey", markersize=12)
        axes.plot([], [], "_", color="grey", markersize=12, label="uniform attention")
        axes.set_xticks(range(len(maps)), names, rotation=90)
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    axes.set_xlabel("stage.block" + (" (pass)" if many else ""))
    axes.legend()
    return figure
