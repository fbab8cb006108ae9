"""Train and compare models under one recipe with several seeds: litvit study DATA_DIR (--help lists the flags)."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from litvit.cli import ArgumentParser, positive
from litvit.errors import InputError, one_line
from litvit.processes import EXIT_DIVERGED, EXIT_INTERRUPTED, available_cores
from litvit.studies.cifar10 import download_cifar10
from litvit.studies.plan import Run, read_study, study_names
from litvit.studies.report import REPORT, write_report
from litvit.studies.running import last_epoch, read_epochs, train
from litvit.training.flags import TRACEBACK_HELP, HelpFormatter
from litvit.training.report import writing_to

DESCRIPTION = """Train every model of a study with every seed, by ordinary runs of litvit train, and report top-1, loss,
speed and memory: mean and spread over the seeds, differences between models, curves. The report is renewed after each
run. The same command continues a study that was stopped, on this machine or on another with its folder."""


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
    jobs = gpus or available_cores()
    add(
        "--jobs",
        type=positive,
        default=jobs,
        metavar="N",
        help=f"runs side by side, one per GPU or core ({jobs})",
    )
    add("--download", action="store_true", help="fetch CIFAR-10 (163 MiB) into DATA_DIR if that does not exist")
    add("--report", action="store_true", help="train nothing, report the runs that are there")
    add("--traceback", action="store_true", help=TRACEBACK_HELP)
    args = parser.parse_args(argv)
    study = read_study(args.study)
    output = args.output or Path("output") / study.name
    configs = study.configs(args.data_dir)
    study.check_runs(output)
    if args.download and not args.report and not os.path.exists(args.data_dir):
        download_cifar10(Path(args.data_dir))
    if not os.path.exists(args.data_dir) and not args.report:
        raise InputError(f"there is no {args.data_dir}; --download makes it the folder of CIFAR-10")
    runs = list(study.runs(output))
    left = [run for run in runs if len(read_epochs(run)) < last_epoch(configs[run.model])]
    diverged = [run for run in left if run.diverged]
    print(f"{study.name}: {len(runs)} runs in {output}, {len(runs) - len(left)} of them trained", flush=True)
    for run in diverged:
        print(f"{run}: diverged, see {run.log}; delete {run.path} to train it again")
    left = [run for run in left if not run.diverged]
    start, done = time.perf_counter(), 0

    def tell(run: Run, status: int | None) -> None:
        nonlocal done
        if status is None:
            print(f"{run}: started, log in {run.log}", flush=True)
            return
        epochs = read_epochs(run)
        said = f"{epochs[-1]['eval_top1']:.2f} top-1 after {len(epochs)} epochs" if epochs else "no epoch trained"
        if status == EXIT_INTERRUPTED:
            print(f"{run}: stopped and saved, {said}", flush=True)
            return
        done += 1
        minutes = (time.perf_counter() - start) / 60
        time_left = f"{minutes:.1f} min, about {minutes / done * (len(left) - done):.0f} left"
        problem = f", diverged, see {run.log}" if status == EXIT_DIVERGED else ""
        print(f"{run}: {said}{problem} ({done} of {len(left)}; {time_left})", flush=True)
        try:
            write_report(study, output, configs)
        except (OSError, InputError) as error:  # the runs are worth more
            print(f"warning: cannot renew {output / REPORT}: {one_line(error)}", file=sys.stderr, flush=True)

    status = EXIT_DIVERGED if diverged else 0
    if left and not args.report:
        with writing_to(output):
            study.write_recipes(output)
        status = max(status, train(study, left, args.data_dir, min(args.jobs, len(left)), tell))
    with writing_to(output):
        print(write_report(study, output, configs))
    print(f"report: {output / REPORT}")
    return 0 if args.report else status
