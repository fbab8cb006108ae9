#!/usr/bin/env python3
"""Break a run at random moments, many times, and show that it ends with the weights of an undisturbed run.

    python tools/soak.py [--kills 20] [--processes 2]        in classification/

Trains the demo digits with train.py (or distributed_train.sh) twice: once undisturbed, and once with kill -9, SIGTERM,
SIGUSR1 and Ctrl-C at random moments, during start-up, training, saving and validation. The same command continues it.
"""

import argparse
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from litvit import demo_data
from litvit.cli import ArgumentParser, run
from litvit.runs.folder import CHECKPOINT, load_checkpoint

CLASSIFICATION = Path(__file__).resolve().parents[1]
FLAGS = shlex.split(
    "--model lit_ti --img-size 32 -b 20 -j 1 --mixup 0.8 --cutmix 1.0 --aug-repeats 3 --reprob 0.25 --drop-path 0.1 "
    "--model-ema --no-amp --warmup-epochs 0 --cooldown-epochs 0 --lr 1e-3 --log-interval 1 --checkpoint-every 3 "
    "--model-kwargs dims=(16,32,40,64) depths=(1,1,1,1) mlp_ratios=(2,2,2,2)"
)
STEPS = 12  # optimizer steps per epoch: 256 of 260 images, in batches of 20
# kill -9 more often than the signals that the run can answer
SIGNALS = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]


def command(args: argparse.Namespace, data: Path, output: Path, name: str) -> list[str]:
    """Return the command line that starts the run, and continues it."""
    flags = [str(data), *FLAGS, "--epochs", str(args.epochs), "--output", str(output), "--experiment", name]
    flags += ["--resume", "auto"]
    if args.processes == 1:
        return [sys.executable, str(CLASSIFICATION / "train.py"), *flags]
    batch = ["-b", str(20 // args.processes)]
    return ["bash", str(CLASSIFICATION / "distributed_train.sh"), str(args.processes), *flags, *batch]


def phase(output: str) -> str:
    """Return what the run was doing when the signal came, by its last line."""
    lines = [line for line in output.splitlines() if line.startswith("epoch ")]
    if not lines:
        return "start-up"
    step = re.match(r"epoch (\d+): step (\d+)/", lines[-1])
    if step is None:
        return "training"  # the line that ends an epoch: the next one has begun
    epoch, number = map(int, step.groups())
    return "validation or its save" if number == epoch * STEPS else "training or a save"


def send_signal(call: list[str], after: float, number: signal.Signals) -> tuple[int, str, bool]:
    """Start the run, send a signal to all its processes after a time, and wait for its end.

    Returns:
        Exit status, output, whether it was still running when the signal came.
    """
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            call, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
        try:
            process.wait(timeout=after)
            hit = False
        except subprocess.TimeoutExpired:
            hit = True
            os.killpg(process.pid, number)
            process.wait(timeout=120)
        output.seek(0)
        return process.returncode, output.read(), hit


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return weights, their average, and the optimizer's state of a checkpoint."""
    state = load_checkpoint(path)
    found = {**state["state_dict"], **{f"ema.{name}": value for name, value in state["state_dict_ema"].items()}}
    for index, entry in state["optimizer"]["state"].items():
        found |= {f"optimizer.{index}.{name}": value for name, value in entry.items()}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the soak test. Returns 0 if the weights are the same."""
    parser = ArgumentParser(prog="soak.py", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="smallest number of signals (20)")
    parser.add_argument("--processes", type=int, default=1, choices=[1, 2], help="training processes (1)")
    parser.add_argument(
        "--epochs", type=int, default=200, metavar="N", help="epochs of the run, of 12 steps each (200)"
    )
    parser.add_argument("--seed", type=int, default=None, metavar="N", help="seed of the moments (random)")
    args = parser.parse_args(argv)
    seed = args.seed if args.seed is not None else random.randrange(10**6)
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        data, output = Path(folder) / "data", Path(folder) / "output"
        demo_data.build(data, demo_data.Settings(train_per_class=26, val_per_class=10, image_size=32))
        start = time.monotonic()
        status, text, _ = send_signal(command(args, data, output, "undisturbed"), 3600, signal.SIGKILL)
        seconds = time.monotonic() - start
        if status:
            print(text)
            return 1
        print(f"undisturbed run: {seconds:.0f} s; seed of the moments {seed}")

        hits: Counter[str] = Counter()
        call = command(args, data, output, "disturbed")
        while True:
            # the last start is left alone: it carries the run to its end
            after = (
                3600
                if sum(hits.values()) >= args.kills
                else rng.uniform(2, 6 + 10 * (args.processes - 1) + seconds / args.kills / 2)
            )
            number = rng.choice(SIGNALS)
            status, text, hit = send_signal(call, after, number)
            if not hit:
                if status == 0:
                    break
                print(text)
                return 1
            hits[f"{number.name} during {phase(text)}"] += 1
        for what, times in sorted(hits.items()):
            print(f"{times:3d} x {what}")
        if sum(hits.values()) < args.kills:
            print(f"the run ended after {sum(hits.values())} signals: raise --epochs")
            return 1
        damaged = list((output / "disturbed").glob("*.damaged"))
        first, second = (tensors(output / name / CHECKPOINT) for name in ("undisturbed", "disturbed"))
        different = [name for name, value in first.items() if not torch.equal(value, second[name])]
        print(
            f"hit {sum(hits.values())} times, {len(damaged)} damaged checkpoints; of {len(first)} tensors "
            f"{len(different)} differ: the weights are {'NOT ' * bool(different)}those of the undisturbed run"
        )
        return 1 if different else 0


if __name__ == "__main__":
    run(main)
