"""Speed of exported classifiers beside eager and compiled torch, on a CPU."""

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from litvit import cli
from litvit.benchmarks.measuring import interleaved_seconds
from litvit.errors import InputError
from litvit.runtimes import Export, Run, check_format, write

SIZE = 224


def benchmark_export(args: argparse.Namespace) -> list[dict]:
    """Time classifiers at 224 x 224 in torch, eager and compiled, and as files in their runtimes. Weights are random.

    Args:
        args: Flags models, files, batch_sizes, threads, repeats.

    Returns:
        One row per batch size, model and way to run it: milliseconds (median), and how many times as fast it is as
        eager torch, and as the last model run in the same way (medians of the rounds' ratios).
    """
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in map(cli.model_name, args.models):
            for how, run in _runs(name, args.files, Path(folder), torch.get_num_threads()).items():
                runs[name, how] = run
    rows = []
    for batch in args.batch_sizes:
        images = torch.randn(batch, 3, SIZE, SIZE)
        calls = {key: partial(run, images) for key, run in runs.items()}
        seconds = interleaved_seconds(calls, args.repeats, torch.device("cpu"))
        for (name, how), values in seconds.items():
            others = {"eager_ratio": seconds[name, "eager"], "peer_ratio": seconds[args.models[-1], how]}
            ratios = {
                key: statistics.median(other / own for other, own in zip(reference, values, strict=True))
                for key, reference in others.items()
            }
            milliseconds = 1000 * statistics.median(values)
            rows.append({"batch": batch, "model": name, "run": how, "milliseconds": milliseconds, **ratios})
    return rows


def _runs(name: str, files: list[str], folder: Path, threads: int) -> dict[str, Run]:
    """Return the ways to run a model, by name."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval().requires_grad_(False)
    runs = {"eager": _inference(model), "compiled": _inference(torch.compile(model))}
    images = torch.randn(16, 3, SIZE, SIZE)
    for file in files:
        kind, _, precision = file.partition(":")
        export = Export(model, images[:2], precision or "float32", calibration=images)
        path = folder / f"{name}-{precision}{check_format(kind, export.precision).suffix}"
        write(export, check_format(kind, export.precision), path)
        runs[file] = check_format(kind, export.precision).load(path, threads)
    return runs


def _inference(model: nn.Module) -> Run:
    @torch.inference_mode()
    def run(images: Tensor) -> list[Tensor]:
        return [model(images)]

    return run


def file_kind(text: str) -> str:
    """Check the name of a file's format and precision, such as "onnx:int8".

    Raises:
        argparse.ArgumentTypeError: There is no such format or precision, or its packages are missing.
    """
    kind, _, precision = text.partition(":")
    try:
        check_format(kind, precision or "float32")
    except (InputError, KeyError) as error:
        reason = error if isinstance(error, InputError) else f"no format {kind}"
        raise argparse.ArgumentTypeError(f"{text!r}: {reason}") from error
    return text
