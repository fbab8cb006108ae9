"""Measure LIT and its counterparts, and the parts that LIT is made of.

What is compared runs interleaved in one process, so that a slowdown of the machine affects all equally; figures are
medians. On a CPU no other process may use the same cores, or ratios are off by more than they show. On a CPU the C
library also keeps its own settings, while training and validation have it keep freed memory (see docs/models.md).
docs/benchmarks/README.md has the commands of the reports.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from litvit import cli
from litvit.benchmarks import report
from litvit.benchmarks.cases import DTYPES
from litvit.benchmarks.exported import file_kind
from litvit.benchmarks.paper import read_results
from litvit.benchmarks.published import COUNTERPARTS, TABLES
from litvit.errors import InputError

ON_A_GPU = torch.cuda.is_available()
_RAW = argparse.RawDescriptionHelpFormatter
PEER = "swin_tiny_patch4_window7_224"
TABLE1 = (*COUNTERPARTS, "lvt", *(name for name in TABLES[1].counterparts if name not in COUNTERPARTS))
DENSE = ("lit_ti", "lit_s", "lit_s:sdpa", "lit_m", "lit_b", "litv2_s", "lvt", "resnet50", PEER)

TABLE1_HELP = """\
The models of LIT's Table 1, LITv2 and LVT: parameters, multiply-adds, images/s, peak memory at 224 x 224.

Ratios are to the counterpart of the pair, LIT-Ti / PVT-S, LIT-S and LITv2-S / Swin-Ti, LIT-M and LITv2-M / Swin-S,
LIT-B and LITv2-B / Swin-B, in brackets the published ones (RTX 3090, batch 64). Training is forward, backward and
AdamW; no model has stochastic depth; convolutional networks run channels-last, as their users run them. Memory (GPU
only) is measured for one model at a time, with weights, gradients and optimizer.
"""
PAPER_HELP = """\
LIT's Tables 1 to 4: parameters, multiply-adds, images/s, peak memory and top-1 accuracy, each measured (published).

Models that a table compares take turns; each model is measured once, as in table1. Ratios are to the counterpart.
Accuracies are those that litvit validate has found, "-" where there is none. A result of 50,000 images is ImageNet's,
with --real-labels also ImageNet-Real's, one of 10,000 images is ImageNet-V2's.
"""
DTM_HELP = """\
Deformable token merging in the three shapes of a model, compared with a linear merge (2 x 2, stride 2) and with the
operators of torchvision and, where it is installed, mmcv. These operators lack bfloat16: instead they get float16 on a
GPU, and are left out on a CPU.
"""
ATTENTION_HELP = """\
Attention with a relative position bias, the two late stages of a model: by the path that is chosen for it
("ours"), by scaled_dot_product_attention with the bias written out ("sdpa"), and by matrix products ("plain").
"""
DENSE_HELP = """\
Backbones with the maps of all stages, forward and backward, in training mode. Ratios are to the last model.
Images are padded to a multiple of 32, as detectors do. NAME:sdpa and NAME:plain force a path of attention that writes
the bias out.
"""
DATA_HELP = """\
A recipe's input pipeline on one core, from JPEG files to batches of uint8: milliseconds of processor time per
image, by step. The files are parts of two sample photographs; those of 500 x 375 pixels take about 100 kB.
"""
EXPORT_HELP = """\
Classifiers at 224 x 224 in torch, eager and compiled, and as files in their runtimes, with random weights, on a CPU.
Files are written first, which takes minutes. Ratios are to eager torch, and to the last model run in the same way.
"""


def _input(text: str) -> tuple[int, int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not IMAGESxHEIGHTxWIDTH, such as 2x800x1333")
    return tuple(map(int, match.groups()))


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, such as 500x375")
    return tuple(map(int, match.groups()))


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no device: name cpu or cuda") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not ON_A_GPU):
        raise argparse.ArgumentTypeError(f"there is no {text!r} here: try --device cpu")
    return device


def _flags(repeats: int = 15) -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(add_help=False)
    flags.set_defaults(output=None)
    flags.add_argument("--repeats", type=cli.positive, default=repeats, metavar="N", help=f"rounds to time ({repeats})")
    flags.add_argument("--json", type=Path, metavar="FILE", help="JSON file for the figures")
    return flags


def _parser() -> cli.ArgumentParser:
    common = _flags()
    common.add_argument("--device", type=_device, default="cuda" if ON_A_GPU else "cpu", help="cuda, cuda:1, cpu")
    common.add_argument("--dtype", choices=DTYPES, default="float32", help="type of tensors and weights (float32)")
    common.add_argument("--tf32", action="store_true", help="on a GPU, multiply float32 matrices in TF32")
    common.add_argument("--threads", type=cli.positive, metavar="N", help="CPU threads (torch's choice)")
    batch = argparse.ArgumentParser(add_help=False)
    default = 64 if ON_A_GPU else 8
    batch.add_argument(
        "-b", "--batch-size", type=cli.positive, default=default, metavar="N", help=f"images ({default})"
    )
    amp = argparse.ArgumentParser(add_help=False)
    amp.add_argument("--amp-dtype", choices=["bfloat16", "float16"], help="autocast to this type")
    compile_ = argparse.ArgumentParser(add_help=False)
    compile_.add_argument(
        "--compile",
        nargs="?",
        const="inductor",
        metavar="HOW",
        help="torch.compile: a backend, or a mode of inductor such as reduce-overhead (inductor)",
    )

    parser = cli.ArgumentParser(description=__doc__, formatter_class=_RAW)
    subcommands = parser.add_subparsers(dest="subcommand", required=True, parser_class=cli.ArgumentParser)

    def add(name: str, help_: str, description: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return subcommands.add_parser(name, help=help_, description=description, parents=parents, formatter_class=_RAW)

    paper = add("paper", "LIT's Tables 1 to 4, measured and published", PAPER_HELP, common, batch, amp, compile_)
    numbers = list(TABLES)
    paper.add_argument(
        "--tables", nargs="+", type=int, choices=numbers, default=numbers, metavar="N", help="tables (1 2 3 4)"
    )
    results_help = "results: files of litvit validate --results-file, or folders of its --report"
    paper.add_argument("--results", nargs="+", type=Path, default=[], metavar="FILE", help=results_help)
    paper.add_argument("--no-speed", dest="speed", action="store_false", help="leave out images/s and memory")
    paper.add_argument("--output", type=Path, metavar="DIR", help="folder for paper.md, paper.json and charts")
    table1 = add("table1", "classifiers and their counterparts", TABLE1_HELP, common, batch, amp, compile_)
    table1.add_argument("models", nargs="*", default=TABLE1, metavar="MODEL", help=f"({' '.join(TABLE1)})")
    models_help = "Figures of any of timm's models; ratios are to the last one."
    models = add("models", "the same figures of any of timm's models", models_help, common, batch, amp, compile_)
    models.add_argument(
        "models",
        nargs="*",
        default=["lit_s", PEER],
        metavar="MODEL",
        help=f"published_lvt and published_litv2 are the published arithmetic, operation by operation (lit_s {PEER})",
    )
    dtm = add("dtm", "deformable token merging and other operators", DTM_HELP, common, batch)
    dtm.add_argument(
        "--model", choices=["lit_ti", "lit_s", "lit_m", "lit_b"], default="lit_s", help="model with the shapes (lit_s)"
    )
    attention = add("attention", "attention and a bias that is written out", ATTENTION_HELP, common)
    stages_help = "model with the stages (lit_s)"
    attention.add_argument("--model", choices=["lit_s", "lit_m", "lit_b"], default="lit_s", help=stages_help)
    dense = add("dense", "backbones at the sizes of detection and segmentation", DENSE_HELP, common, amp)
    dense.add_argument("models", nargs="*", default=DENSE, metavar="MODEL", help=f"({' '.join(DENSE)})")
    for sub, on_a_gpu, on_a_cpu in (
        (attention, "64x224x224 2x800x1333", "8x224x224 1x320x512"),
        (dense, "2x800x1333 2x512x512", "1x320x512"),
    ):
        inputs = (on_a_gpu if ON_A_GPU else on_a_cpu).split()
        sub.add_argument(
            *("--inputs", "-i"),
            nargs="+",
            type=_input,
            default=list(map(_input, inputs)),
            metavar="BxHxW",
            help=f"images x height x width ({' '.join(inputs)})",
        )
    data = add("data", "images/s of the input pipeline, and where its time goes", DATA_HELP, _flags(5))
    data.set_defaults(device=torch.device("cpu"), threads=None, tf32=False)
    data.add_argument("--model", default="lit_s", metavar="NAME", help="model with the recipe (lit_s)")
    data.add_argument("--image-size", type=_size, default=(500, 375), metavar="WxH", help="size of the files (500x375)")
    data.add_argument("--images", type=cli.positive, default=128, metavar="N", help="number of files, even (128)")
    export = add("export", "exported classifiers, eager and compiled ones", EXPORT_HELP, _flags())
    export.set_defaults(device=torch.device("cpu"), tf32=False)
    export.add_argument("models", nargs="*", default=["lit_s", PEER], metavar="MODEL", help=f"(lit_s {PEER})")
    files = ["onnx", "onnx:int8", "openvino", "openvino:int8"]
    files_help = f"format, or format:precision, as litvit export names them ({' '.join(files)})"
    export.add_argument("--files", nargs="+", type=file_kind, default=files, metavar="FILE", help=files_help)
    batches = {"nargs": "+", "type": cli.positive, "default": [1, 8], "metavar": "N"}
    export.add_argument("-b", "--batch-sizes", **batches, help="images per batch (1 8)")
    export.add_argument("--threads", type=cli.positive, metavar="N", help="CPU threads (torch's choice)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark and print its table. Returns 0."""
    parser = _parser()
    args = parser.parse_args(argv)
    if getattr(args, "amp_dtype", None) and args.dtype != "float32":
        raise InputError(f"--amp-dtype {args.amp_dtype} is for --dtype float32, not {args.dtype}")
    if args.tf32 and args.device.type == "cpu":
        raise InputError("--tf32 is for GPUs, this is a CPU")
    if args.subcommand == "paper":
        args.tables, args.results = sorted(set(args.tables)), read_results(args.results)
        shown = {name for number in args.tables for name in TABLES[number].counterparts}
        if others := args.results.keys() - shown:
            print(f"not in --tables {shlex.join(map(str, args.tables))}: {', '.join(sorted(others))}", file=sys.stderr)
    report.run(args, f"{parser.prog} {shlex.join(sys.argv[1:] if argv is None else argv)}")
    return 0
