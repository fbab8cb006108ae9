"""LIT's Tables 1 to 4: measured, and with the accuracies that litvit validate has found."""

import argparse
import json
import os
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import timm
import torch

from litvit.benchmarks.cases import CLASSES, compare, measure
from litvit.benchmarks.macs import count_macs, count_parameters
from litvit.benchmarks.published import PUBLISHED, TABLES
from litvit.errors import InputError, one_line
from litvit.training.report import RESULT

SIZE = 224  # pixels per side
IMAGENET, IMAGENET_V2 = 50_000, 10_000  # validation images
ENTRIES = ("model", "data", "images", "num_classes", "img_size", "top1")  # of a result
IN_TABLES = {name for table in TABLES.values() for name in table.counterparts}
ACCURACIES = {"top1": "ImageNet", "real_top1": "ImageNet-Real", "v2_top1": "ImageNet-V2"}


class Accuracy(NamedTuple):
    """A top-1 accuracy in percent, and where it is from."""

    percent: float
    weights: str
    file: str
    data: str


def read_results(paths: Iterable[Path]) -> dict[str, dict[str, Accuracy]]:
    """Read what litvit validate has written.

    The number of images says whether a result is of ImageNet's validation set (50,000) or of ImageNet-V2 (10,000).
    Which of V2's sets it is, it does not say: the paper's is matched-frequency.

    Args:
        paths: Files of --results-file, or folders of --report.

    Returns:
        Accuracies by model and key of ACCURACIES.

    Raises:
        InputError: a file that is no such result, or two of the same model and data.
    """
    results: dict[str, dict[str, Accuracy]] = {}
    for path in paths:
        file = path / RESULT if os.path.isdir(path) else path
        name, percents, weights, data = _read_result(file)
        found = results.setdefault(name, {})
        for key, percent in percents.items():
            if key in found:
                raise InputError(
                    f"{found[key].file} and {file} are both {ACCURACIES[key]} results of {name}: leave one of them out"
                )
            found[key] = Accuracy(percent, weights, str(file), data)
    return results


def _read_result(file: Path) -> tuple[str, dict[str, float], str, str]:
    """Return the model of a result, its accuracies by key, its weights, and its data."""
    try:
        result = json.loads(file.read_text())
    except OSError as error:
        raise InputError(
            f"cannot read {file}: {error.strerror}; litvit validate --results-file FILE or --report DIR writes results"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON, as a result of litvit validate is: {one_line(error)}") from error
    lacking = [entry for entry in ENTRIES if not isinstance(result, dict) or entry not in result]
    if lacking:
        raise InputError(f"{file} is no result of litvit validate: it lacks {', '.join(lacking)}")
    percents = {key: result[key] for key in ("top1", "real_top1") if key in result}
    for key, percent in percents.items():
        if isinstance(percent, bool) or not isinstance(percent, int | float) or not 0 <= percent <= 100:
            raise InputError(f"{file}: {key} is {json.dumps(percent)}, not a percentage")
    model = str(result["model"])
    name = model.partition(".")[0]  # without the tag of its weights
    images, of_imagenet = result["images"], result["images"] == IMAGENET
    wrong = {
        f"of {model}, which is in none of LIT's tables": name not in IN_TABLES,
        f"for {result['num_classes']} classes, not {CLASSES}": result["num_classes"] != CLASSES,
        f"at {result['img_size']} pixels, not {SIZE}": result["img_size"] != SIZE,
        f"of another {name}, with other --model-kwargs": name in IN_TABLES and _is_altered(name, result),
        "with mirror images (--flip), which the paper has not": bool(result.get("flip")),
        f"on {images!r} images, not on ImageNet's {IMAGENET} or ImageNet-V2's {IMAGENET_V2}": (
            not of_imagenet and images != IMAGENET_V2
        ),
        f"on {images} images with labels of ImageNet-Real, a part of ImageNet": not of_imagenet and len(percents) > 1,
    }
    for reason, applies in wrong.items():
        if applies:
            raise InputError(f"{file} is a result {reason}: leave it out")
    weights = str(result.get("checkpoint", "?"))
    weights = model if weights == "pretrained" else weights
    return name, percents if of_imagenet else {"v2_top1": percents["top1"]}, weights, str(result["data"])


def _is_altered(name: str, result: dict) -> bool:
    """Return whether a result is of a model of another size. Results of older versions do not tell."""
    own = result["num_classes"] == CLASSES and "parameters" in result
    return own and result["parameters"] != _sizes(name)["parameters"]


def benchmark_paper(args: argparse.Namespace) -> list[dict]:
    """Measure the models of LIT's tables, each once, in turns with those that it is compared with.

    Args:
        args: Flags tables, results (see `read_results`), speed, and those of `measure`.

    Returns:
        One row per table and model: parameters, multiply-adds, counterpart, accuracies, published figures, and with
        speed what `measure` and `compare` return.
    """
    measured: dict[str, dict] = {}
    for group in _groups(args.tables):
        measured |= measure(group, args) if args.speed else {name: _sizes(name) for name in group}
    return [
        {
            "table": number,
            **measured[name],
            "counterpart": peer,
            **(compare(measured[name], measured.get(peer)) if args.speed else {}),
            "accuracies": {key: found._asdict() for key, found in args.results.get(name, {}).items()},
            "published": PUBLISHED[name]._asdict(),
        }
        for number in args.tables
        for name, peer in TABLES[number].counterparts.items()
    ]


def _groups(numbers: Sequence[int]) -> list[list[str]]:
    """Return the models of tables in groups that hold whatever is compared, in any of the tables."""
    groups: list[list[str]] = []
    for number in numbers:
        for name, peer in TABLES[number].counterparts.items():
            pair = [name] if peer is None else [peer, name]
            joined = [group for group in groups if not set(pair).isdisjoint(group)]
            groups = [group for group in groups if group not in joined]
            groups.append(list(dict.fromkeys(chain(*joined, pair))))
    return groups


def _sizes(name: str) -> dict:
    """Count parameters and multiply-adds without making the weights."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=CLASSES)
    return {"model": name, "parameters": count_parameters(model), "macs": count_macs(model)}
