"""Train and compare models under one recipe with several seeds: litvit study DATA_DIR (--help lists the flags)."""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from litvit.cli import ArgumentParser
from litvit.errors import InputError
from litvit.processes import EXIT_DIVERGED, EXIT_INTERRUPTED
from litvit.studies.cifar10 import download_cifar10
from litvit.studies.plan import Run, read_study, study_names
from litvit.studies.report import REPORT, write_report
from litvit.studies.running import last_epoch, read_epochs, train
from litvit.training.flags import TRACEBACK_HELP, HelpFormatter
from litvit.training.report import writing_to

DESCRIPTION = """Train every model of a study with every seed, by ordinary runs of litvit train, and report top-1, loss,
speed and memory: mean and spread over the seeds, differences between models, curves. The report is renewed after each
run. The same command continues a study that was stopped, on this machine or on another with its folder."""


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out a study as the command line says. Returns the exit status."""
    gpus = torch.cuda.device_count()
    parser = ArgumentParser(description=DESCRIPTION, formatter_class=HelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("data_dir", metavar="DATA_DIR", help="folder with train/ and val/, as litvit train takes it")
    default = "cifar10_gpu" if gpus else "cifar10_cpu"
    names = ", ".join(study_names())
    add("--study", default=default, metavar="NAME", help=f"study: {names}, or a YAML file ({default})")
    add("--output", type=Path, metavar="DIR", help="folder of the runs and of the report (output/<study>)")
    jobs = gpus or len(os.sched_getaffinity(0))
    add("--jobs", type=_positive, default=jobs, metavar="N", help=f"runs side by side, per GPU or core one ({jobs})")
    add("--download", action="store_true", help="fetch CIFAR-10 (163 MiB) into DATA_DIR if that does not exist")
    add("--report", action="store_true", help="train nothing, report the runs that are there")
    add("--traceback", action="store_true", help=TRACEBACK_HELP)
    args = parser.parse_args(argv)
    study = read_study(args.study)
    output = args.output or Path("output") / study.name
    if args.download and not os.path.exists(args.data_dir):
        download_cifar10(Path(args.data_dir))
    if not os.path.exists(args.data_dir) and not args.report:
        raise InputError(f"there is no {args.data_dir}; --download makes it the folder of CIFAR-10")
    with writing_to(output):
        configs = study.write_recipes(output, args.data_dir)
    runs = list(study.runs(output))
    trained = {run: len(read_epochs(run)) for run in runs}
    left = [run for run in runs if trained[run] < last_epoch(configs[run.model])]
    print(f"{study.name}: {len(runs)} runs in {output}, {len(runs) - len(left)} of them trained", flush=True)
    start, done, status = time.perf_counter(), 0, 0

    def ended(run: Run, status: int) -> None:
        nonlocal done
        done += 1
        took = time.perf_counter() - start
        epochs = read_epochs(run)
        said = f"{epochs[-1]['eval_top1']:.2f} top-1 after {len(epochs)} epochs" if epochs else "no epoch trained"
        problem = {0: "", EXIT_DIVERGED: ", diverged", EXIT_INTERRUPTED: ", stopped"}.get(status, ", failed")
        minutes = f"{took / 60:.1f} min, about {took / done * (len(left) - done) / 60:.0f} left"
        print(f"{run.model}, seed {run.seed}: {said}{problem} ({done} of {len(left)}; {minutes})", flush=True)
        write_report(study, output, configs)

    if not args.report:
        status = train(study, left, args.data_dir, min(args.jobs, len(left)), ended) if left else 0
    with writing_to(output):
        print(write_report(study, output, configs))
    print(f"report: {output / REPORT}")
    return status
