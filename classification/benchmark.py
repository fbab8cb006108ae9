"""Measure LIT beside its peers, and the parts that it is made of.

What is compared runs interleaved in one process, so that a machine that slows down slows all; figures are medians. On
a CPU nothing else may want the same cores: beside a busy process ratios are off by more than what they tell. And there
the C library has its own settings, while train.py and validate.py have it keep freed memory: see docs/models.md.
"""

import argparse
import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import timm
import torch

import litvit  # noqa: F401 (registers the models)
from litvit import cli
from litvit.analysis import benchmarks
from litvit.analysis.benchmarks import COUNTERPARTS, DTYPES, PASSES, PUBLISHED
from litvit.analysis.input_pipeline import benchmark_data
from litvit.analysis.measuring import machine
from litvit.errors import InputError

ON_A_GPU = torch.cuda.is_available()
PEER = "swin_tiny_patch4_window7_224"
TABLE1 = ("lit_ti", "lit_s", "lit_m", "lit_b", "lvt", *(name for name in PUBLISHED if name not in COUNTERPARTS))
DENSE = ("lit_ti", "lit_s", "lit_s:sdpa", "lit_m", "lit_b", "lvt", "resnet50", PEER)
MIB = 2**20

HELP = f"""{__doc__}
On one GPU, `pytest -m gpu` in the project's folder (after ./setup_env.sh) shows whether the kernels compute right, and
these lines, whether the goals are met (the goal of each: benchmark.py DOOR --help; compiled pairs take minutes each):

  python benchmark.py table1 --amp-dtype bfloat16 --json table1.json
  for pair in "lit_ti pvt_v2_b2" "lit_s swin_tiny_patch4_window7_224" \\
              "lit_m swin_small_patch4_window7_224" "lit_b swin_base_patch4_window7_224"; do
      python benchmark.py table1 $pair --amp-dtype bfloat16 --compile --json table1-compiled-${{pair%% *}}.json; done
  for model in lit_s lit_b; do for batch in 64 256; do
      python benchmark.py dtm --model $model --dtype bfloat16 -b $batch --json dtm-$model-$batch.json; done; done
  python benchmark.py attention --dtype bfloat16 --json attention.json
  python benchmark.py dense --amp-dtype bfloat16 --json dense.json
  python benchmark.py data --json data.json
"""
TABLE1_HELP = """\
The models of LIT's Table 1, and LVT: parameters, multiply-adds, images/s, peak memory at 224 x 224.

Ratios are to the counterpart of the pair, LIT-Ti / PVT-S, LIT-S / Swin-Ti, LIT-M / Swin-S, LIT-B / Swin-B, in brackets
the published ones (RTX 3090, batch 64). The paper's PVT-S is not in timm; pvt_v2_b2 stands for it. Training is forward,
backward and AdamW; no model has stochastic depth; convolutional networks run channels-last, as their users run them.
Memory (GPU only) is that of each model alone, with weights, gradients and optimizer.

Goals on a GPU: in inference more than the published ratios; in training less memory than the counterpart (ratios below
1). On two CPU cores (float32 or autocast, batch 8): LIT-S 1.2 in inference (compiled 1.25) and 1.1 in training, LIT-M
and LIT-B 1.1 in inference.
"""
DTM_HELP = """\
Deformable token merging, the three shapes of a model, beside a linear merge (2 x 2, stride 2) and the operators of
torchvision and, where it is installed, mmcv. They lack bfloat16: there they get float16 on a GPU, and are left out on a
CPU.

Goals on a GPU (bfloat16, batch 64 to 256): at most 1.5 times the linear merge's time in the forward pass, 2 times in
forward and backward; torchvision and mmcv take 5 times ours or more.
"""
ATTENTION_HELP = """\
Attention with a relative position bias, the two late stages of a model: by the path that is chosen for it
("ours"), by scaled_dot_product_attention with the bias written out ("sdpa"), and by matrix products ("plain").

Goals on a GPU: at 224 no slower than sdpa; at 1333 x 800 faster than sdpa, at a quarter of its memory or less.
"""
DENSE_HELP = """\
Backbones with the maps of all stages, forward and backward, in training mode. Ratios are to the last model.
Images are padded to a multiple of 32, as detectors do. NAME:sdpa and NAME:plain force a path of attention that writes
the bias out.

Goals on a GPU (bfloat16): lit_s at 1333 x 800 takes at most a quarter of the memory of lit_s:sdpa, and less time.
"""
DATA_HELP = """\
A recipe's input pipeline on one core, from JPEG files to batches of uint8: milliseconds of processor time an
image, by step. The files are parts of two sample photographs; those of 500 x 375 pixels take about 100 kB.
"""


def _dtm_table(rows: list[dict]) -> list[list[str]]:
    names = list(rows[0]["forward"])
    operators = [name for name in names if name not in ("ours", "linear")]
    ratios = ["ours / linear", *(f"{name} / ours" for name in operators)]
    table = [["shape", "pass", *(f"{name} ms" for name in names), *ratios]]
    for row in rows:
        for label, title in PASSES.items():
            ms = row[label]
            ratios = [ms["ours"] / ms["linear"], *(ms[name] / ms["ours"] for name in operators)]
            cells = [*(f"{ms[name]:.3f}" for name in names), *(f"{ratio:.2f}" for ratio in ratios)]
            table.append([row["shape"], title, *cells])
    return table


def _models_table(rows: list[dict]) -> list[list[str]]:
    table = [["model", "parameters M", "multiply-adds G", "inference images/s", "ratio", "training images/s", "ratio"]]
    for row in rows:
        cells = _size_cells(row)
        for key in ("inference_images_per_second", "training_images_per_second"):
            cells += [f"{row[key]:.1f}", f"{row[key] / rows[-1][key]:.2f}"]
        table.append(cells)
    return table


def _size_cells(row: dict) -> list[str]:
    return [row["model"], f"{row['parameters'] / 1e6:.2f}", f"{row['macs'] / 1e9:.2f}"]


def _table1_table(rows: list[dict]) -> list[list[str]]:
    figures = {
        "inference_images_per_second": ("inference images/s", 1, 1),
        "training_images_per_second": ("training images/s", 1, 1),
        "training_memory": ("training MiB", MIB, 0),
        "test_memory": ("test MiB", MIB, 0),
    }
    head = [cell for title, _, _ in figures.values() for cell in (title, "ratio (published)")]
    table = [["model", "parameters M", "multiply-adds G", *head]]
    for row in rows:
        cells = _size_cells(row)
        for key, (_, unit, digits) in figures.items():
            cells.append("-" if row[key] is None else f"{row[key] / unit:.{digits}f}")
            measured, published = (row.get(ratios, {}).get(key) for ratios in ("ratios", "published_ratios"))
            ratio = f"{measured:.2f}" if measured else "-"
            cells.append(f"{ratio} ({published:.2f})" if published else ratio)
        table.append(cells)
    return table


def _attention_table(rows: list[dict]) -> list[list[str]]:
    paths = list(rows[0]["milliseconds"])
    figures = {"milliseconds": ("ms", 1, 3), "memory": ("MiB", MIB, 0)}
    if rows[0]["memory"]["ours"] is None:
        del figures["memory"]
    table = [["images", "attention", "pass", "chosen"]]
    for title, _, _ in figures.values():
        table[0] += [*(f"{path} {title}" for path in paths), *(f"{path} / ours, {title}" for path in paths[1:])]
    for row in rows:
        cells = [row["input"], row["tokens"], row["pass"], row["chosen"]]
        for key, (_, unit, digits) in figures.items():
            values = row[key]
            cells += [f"{values[path] / unit:.{digits}f}" for path in paths]
            cells += [f"{values[path] / values['ours']:.2f}" for path in paths[1:]]
        table.append(cells)
    return table


def _dense_table(rows: list[dict]) -> list[list[str]]:
    table = [["images", "model", "ms", "speed, ratio", "MiB", "ratio"]]
    last = {row["input"]: row for row in rows}
    for row in rows:
        reference, memory = last[row["input"]], row["memory"]
        speed = f"{reference['milliseconds'] / row['milliseconds']:.2f}"
        cells = ["-", "-"] if memory is None else [f"{memory / MIB:.0f}", f"{memory / reference['memory']:.2f}"]
        table.append([row["input"], row["model"], f"{row['milliseconds']:.1f}", speed, *cells])
    return table


def _data_table(rows: list[dict]) -> list[list[str]]:
    whole = {row["pipeline"]: row["milliseconds"] for row in rows if row["step"] == "all"}
    table = [["pipeline", "step", "ms an image", "part", "images/s a core"]]
    for row in rows:
        ms = row["milliseconds"]
        speed = f"{1000 / ms:.0f}" if row["step"] == "all" else ""
        table.append([row["pipeline"], row["step"], f"{ms:.3f}", f"{ms / whole[row['pipeline']]:.0%}", speed])
    return table


def _environment(args: argparse.Namespace) -> str:
    shown = {
        "batch": "batch_size",
        "dtype": "dtype",
        "autocast": "amp_dtype",
        "compiled": "compile",
        "TF32": "tf32",
        "model": "model",
        "pixels": "image_size",
        "files": "images",
    }
    settings = [f"{word} {getattr(args, name)}" for word, name in shown.items() if getattr(args, name, None)]
    changing = ("LIT_", "MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "OMP_")
    settings += [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(changing)]
    return f"{machine(args.device)}; {', '.join((*settings, f'medians of {args.repeats}'))}"


def _print_markdown(table: list[list[str]]) -> None:
    print("| " + " | ".join(table[0]) + " |")
    print("|" + "---|" * len(table[0]))
    for cells in table[1:]:
        print("| " + " | ".join(cells) + " |")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


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
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no device: cpu, or cuda") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not ON_A_GPU):
        raise argparse.ArgumentTypeError(f"there is no {text!r} here: try --device cpu")
    return device


def _flags(repeats: int = 15) -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(add_help=False)
    flags.add_argument("--repeats", type=_positive, default=repeats, metavar="N", help=f"rounds to time ({repeats})")
    flags.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    return flags


def _parser() -> cli.ArgumentParser:
    common = _flags()
    common.add_argument("--device", type=_device, default="cuda" if ON_A_GPU else "cpu", help="cuda, cuda:1, cpu")
    common.add_argument("--dtype", choices=DTYPES, default="float32", help="of tensors and weights (float32)")
    common.add_argument("--tf32", action="store_true", help="a GPU's matrix products of float32 in TF32")
    common.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (torch's choice)")
    batch = argparse.ArgumentParser(add_help=False)
    default = 64 if ON_A_GPU else 8
    batch.add_argument("-b", "--batch-size", type=_positive, default=default, metavar="N", help=f"images ({default})")
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

    parser = cli.ArgumentParser(
        prog="benchmark.py", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    doors = parser.add_subparsers(dest="door", required=True, parser_class=cli.ArgumentParser)

    def door(name: str, text: str, help_: str, measure, table, *parents) -> argparse.ArgumentParser:
        flags = {"description": text, "formatter_class": argparse.RawDescriptionHelpFormatter}
        sub = doors.add_parser(name, help=help_, parents=parents, **flags)
        sub.set_defaults(measure=measure, table=table)
        return sub

    table1 = door(
        *("table1", TABLE1_HELP, "classifiers beside their peers"),
        *(benchmarks.benchmark_table1, _table1_table, common, batch, amp, compile_),
    )
    table1.add_argument("models", nargs="*", default=TABLE1, metavar="MODEL", help=f"({' '.join(TABLE1)})")
    models = door(
        *("models", "Figures of any of timm's models; ratios are to the last one.", "the same of any models"),
        *(benchmarks.benchmark_models, _models_table, common, batch, amp, compile_),
    )
    models.add_argument(
        "models",
        nargs="*",
        default=["lit_s", PEER],
        metavar="MODEL",
        help=f"published_lvt is LVT's published arithmetic, operation by operation (lit_s {PEER})",
    )
    dtm = door(
        *("dtm", DTM_HELP, "deformable token merging beside other operators"),
        *(benchmarks.benchmark_dtm, _dtm_table, common, batch),
    )
    dtm.add_argument("--model", choices=timm.list_models("lit_*"), default="lit_s", help="whose shapes (lit_s)")
    attention = door(
        *("attention", ATTENTION_HELP, "attention beside a bias that is written out"),
        *(benchmarks.benchmark_attention, _attention_table, common),
    )
    attention.add_argument("--model", choices=["lit_s", "lit_m", "lit_b"], default="lit_s", help="whose stages (lit_s)")
    dense = door(
        *("dense", DENSE_HELP, "backbones at the sizes of detection and segmentation"),
        *(benchmarks.benchmark_dense, _dense_table, common, amp),
    )
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
    data = door(
        *("data", DATA_HELP, "images/s of the input pipeline, and where its time goes"),
        *(benchmark_data, _data_table, _flags(5)),
    )
    data.set_defaults(device=torch.device("cpu"), threads=None, tf32=False)
    data.add_argument("--model", default="lit_s", metavar="NAME", help="whose recipe (lit_s)")
    data.add_argument("--image-size", type=_size, default=(500, 375), metavar="WxH", help="of the files (500x375)")
    data.add_argument("--images", type=_positive, default=128, metavar="N", help="files, an even number (128)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run one benchmark and print its table."""
    args = _parser().parse_args(argv)
    if getattr(args, "amp_dtype", None) and args.dtype != "float32":
        raise InputError(f"--amp-dtype {args.amp_dtype} is for --dtype float32, not {args.dtype}")
    is_new = args.json and not args.json.exists()
    if args.json:
        try:
            args.json.open("a").close()  # before anything is measured
        except OSError as error:
            raise InputError(f"--json: cannot write {args.json}: {error.strerror}") from None
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True  # the fastest convolutions of every model
    torch.backends.cudnn.allow_tf32 = args.tf32  # convolutions by the rule of matrix products
    if args.tf32 and args.device.type == "cpu":
        raise InputError("--tf32 is for GPUs, this is a CPU")
    if args.tf32:
        torch.set_float32_matmul_precision("high")
    environment = _environment(args)
    print(environment, end="\n\n", flush=True)  # the rest may take minutes
    rows = None
    try:
        rows = args.measure(args)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise InputError("the memory is too small: choose smaller inputs, or fewer models") from None
    finally:
        if rows is None and is_new:
            args.json.unlink()
    _print_markdown(args.table(rows))
    if args.json:
        command = shlex.join(["benchmark.py", *(sys.argv[1:] if argv is None else argv)])
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        figures = {"command": command, "date": date, "environment": environment, "rows": rows}
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
