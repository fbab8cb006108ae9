"""Measure LIT beside its peers: `benchmark.py dtm` (token merging) and `benchmark.py models` (whole models).

What is compared runs interleaved in one process, so that a busy machine slows all alike; figures are medians.
"""

import argparse
import contextlib
import json
import platform
import runpy
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

import litvit  # noqa: F401 (registers the models)
from litvit import cli
from litvit.analysis.macs import count_macs
from litvit.dtm import deform_conv_tokens
from litvit.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
PEER = "swin_tiny_patch4_window7_224"
PUBLISHED_LVT = Path(__file__).parents[1] / "tests/classification/litvit/models/published_lvt.py"


def interleaved_medians(calls: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Time calls in turn, `repeats` rounds after a warm-up round.

    Returns:
        Median seconds a call.
    """
    seconds = {name: [] for name in calls}
    for round_ in range(repeats + 1):
        for name, call in calls.items():
            elapsed = _seconds(call, device)
            if round_:
                seconds[name].append(elapsed)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def _linear_merge(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    B, H, W, C = x.shape
    patches = x.view(B, H // 2, 2, W // 2, 2, C).transpose(2, 3).reshape(B, H // 2, W // 2, 4 * C)
    return F.linear(patches, weight.permute(0, 2, 3, 1).flatten(1), bias)


def _torchvision_merge(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    maps = x.permute(0, 3, 1, 2), offset.permute(0, 3, 1, 2)
    return torchvision.ops.deform_conv2d(*maps, weight, bias, stride=2).permute(0, 2, 3, 1)


def benchmark_dtm(args: argparse.Namespace) -> list[dict]:
    """Time the three merges of a model, forward and forward + backward, beside torchvision's op and a linear merge.

    Returns:
        A row a shape and one for their sum: milliseconds, and ratios of ours to the others.
    """
    device, dtype = args.device, DTYPES[args.dtype]
    merges = {"ours": deform_conv_tokens, "torchvision": _torchvision_merge, "linear": _linear_merge}
    if dtype == torch.bfloat16:
        del merges["torchvision"]  # its op has no bfloat16
    with torch.device("meta"):
        stages = timm.create_model(args.model).stages
    rows = []
    for i, stage in enumerate(stages[1:]):
        out_dim, in_dim = stage.downsample.conv.weight.shape[:2]
        side = 224 // (4 * 2**i)
        like = {"device": device, "dtype": dtype}
        tensors = (
            torch.randn(args.batch_size, side, side, in_dim, **like),
            torch.randn(args.batch_size, side // 2, side // 2, 8, **like),
            torch.randn(out_dim, in_dim, 2, 2, **like) / in_dim**0.5,
            torch.randn(out_dim, **like),
        )
        leaves = [tensor.requires_grad_() for tensor in tensors]
        gradient = torch.randn(args.batch_size, side // 2, side // 2, out_dim, **like)

        def forward(merge: Callable, tensors: Sequence[Tensor] = tensors) -> None:
            with torch.no_grad():
                merge(*tensors)

        def both(merge: Callable, leaves: list[Tensor] = leaves, gradient: Tensor = gradient) -> None:
            torch.autograd.grad(merge(*leaves), leaves, gradient, allow_unused=True)

        row = {"shape": f"{in_dim} x {side} x {side} -> {out_dim}"}
        for label, run in (("forward", forward), ("forward_backward", both)):
            calls = {name: (lambda run=run, merge=merge: run(merge)) for name, merge in merges.items()}
            medians = interleaved_medians(calls, args.repeats, device)
            row[label] = {name: 1000 * value for name, value in medians.items()}
        rows.append(row)
    total = {"shape": "sum"}
    for label in ("forward", "forward_backward"):
        total[label] = {name: sum(row[label][name] for row in rows) for name in merges}
    rows.append(total)
    return rows


def _dtm_table(rows: list[dict]) -> list[list[str]]:
    table = [["shape", "pass", "ours ms", "torchvision ms", "linear ms", "torchvision / ours", "ours / linear"]]
    for row in rows:
        for label, title in (("forward", "forward"), ("forward_backward", "forward + backward")):
            ms = row[label]
            has_torchvision = "torchvision" in ms
            table.append(
                [
                    row["shape"],
                    title,
                    f"{ms['ours']:.2f}",
                    f"{ms['torchvision']:.2f}" if has_torchvision else "-",
                    f"{ms['linear']:.2f}",
                    f"{ms['torchvision'] / ms['ours']:.2f}" if has_torchvision else "-",
                    f"{ms['ours'] / ms['linear']:.2f}",
                ]
            )
    return table


def benchmark_models(args: argparse.Namespace) -> list[dict]:
    """Measure images/s of models, in inference and in training steps (forward, backward, AdamW).

    Returns:
        A row a model: parameters, multiply-adds, images/s.
    """
    device, dtype = args.device, DTYPES[args.dtype]
    amp = contextlib.nullcontext
    if args.amp_dtype:
        amp = lambda: torch.autocast(device.type, DTYPES[args.amp_dtype])  # noqa: E731
    if PUBLISHED_LVT.stem in args.models:
        runpy.run_path(str(PUBLISHED_LVT), run_name=PUBLISHED_LVT.stem)
    models, rows = {}, []
    for name in map(cli.model_name, args.models):
        model = timm.create_model(name).to(device, dtype)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        rows.append({"model": name, "parameters": parameters, "macs": count_macs(model)})
        models[name] = model
    images = torch.randn(args.batch_size, 3, 224, 224, device=device, dtype=dtype)
    target = torch.randint(1000, (args.batch_size,), device=device)

    def infer(model: torch.nn.Module) -> None:
        with torch.inference_mode(), amp():
            model(images)

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        with amp():
            loss = F.cross_entropy(model(images).float(), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for model in models.values():
        model.eval()
    calls = {name: (lambda model=model: infer(model)) for name, model in models.items()}
    inference = interleaved_medians(calls, args.repeats, device)
    calls = {}
    for name, model in models.items():
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4)
        calls[name] = lambda model=model, optimizer=optimizer: train(model, optimizer)
    training = interleaved_medians(calls, args.repeats, device)
    for row in rows:
        row["inference_images_per_second"] = args.batch_size / inference[row["model"]]
        row["training_images_per_second"] = args.batch_size / training[row["model"]]
    return rows


def _models_table(rows: list[dict]) -> list[list[str]]:
    table = [["model", "parameters M", "multiply-adds G", "inference images/s", "ratio", "training images/s", "ratio"]]
    for row in rows:
        cells = [row["model"], f"{row['parameters'] / 1e6:.2f}", f"{row['macs'] / 1e9:.2f}"]
        for key in ("inference_images_per_second", "training_images_per_second"):
            cells += [f"{row[key]:.1f}", f"{row[key] / rows[-1][key]:.2f}"]
        table.append(cells)
    return table


def _environment(args: argparse.Namespace) -> str:
    processor = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else _cpu_name()
    threads = f", {torch.get_num_threads()} threads" if args.device.type == "cpu" else ""
    amp = f", autocast {args.amp_dtype}" if getattr(args, "amp_dtype", None) else ""
    return (
        f"{processor}{threads}; torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"timm {timm.__version__}, Python {platform.python_version()}; "
        f"batch {args.batch_size}, {args.dtype}{amp}, medians of {args.repeats}"
    )


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _print_markdown(table: list[list[str]]) -> None:
    print("| " + " | ".join(table[0]) + " |")
    print("|" + "---|" * len(table[0]))
    for cells in table[1:]:
        print("| " + " | ".join(cells) + " |")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no device: cpu, or cuda") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise argparse.ArgumentTypeError(f"there is no {text!r} here: try --device cpu")
    return device


def _parser() -> cli.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu")
    common.add_argument("-b", "--batch-size", type=_positive, default=8)
    common.add_argument("--dtype", choices=DTYPES, default="float32", help="of tensors and weights")
    common.add_argument("--threads", type=_positive, help="CPU threads (default: torch's choice)")
    common.add_argument("--repeats", type=_positive, default=15, help="rounds that the medians are taken of")
    common.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")

    parser = cli.ArgumentParser(prog="benchmark.py", description=__doc__.splitlines()[0])
    doors = parser.add_subparsers(dest="door", required=True, parser_class=cli.ArgumentParser)
    dtm = doors.add_parser("dtm", parents=[common], help="deformable token merging beside torchvision and linear")
    dtm.add_argument("--model", choices=timm.list_models("lit_*"), default="lit_s", help="whose three shapes")
    dtm.set_defaults(measure=benchmark_dtm, table=_dtm_table)
    models = doors.add_parser("models", parents=[common], help="images/s of models; ratios are to the last one")
    models.add_argument(
        "models",
        nargs="*",
        default=["lit_s", PEER],
        metavar="MODEL",
        help=f"published_lvt is LVT's published arithmetic, operation by operation (default: lit_s {PEER})",
    )
    models.add_argument("--amp-dtype", choices=["bfloat16", "float16"], help="autocast to this type")
    models.set_defaults(measure=benchmark_models, table=_models_table)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run one benchmark and print its table."""
    args = _parser().parse_args(argv)
    if args.json and not args.json.parent.is_dir():
        raise InputError(f"--json: no folder {args.json.parent}")
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = args.measure(args)
    environment = _environment(args)
    print(environment, end="\n\n")
    _print_markdown(args.table(rows))
    if args.json:
        args.json.write_text(json.dumps({"environment": environment, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
