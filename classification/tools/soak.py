#!/usr/bin/env python3
"""Break a run at random moments, many times, and show that it ends with the weights of an undisturbed run.

    python tools/soak.py [--kills 20] [--processes 2]        in classification/

Trains the demo digits with train.py (or distributed_train.sh): once in peace, and once with kill -9, SIGTERM, SIGUSR1
and Ctrl-C at random moments, during start-up, training, saving and validation, each time continued by the same command.
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
from litvit.training.state import CHECKPOINT, load_checkpoint

CLASSIFICATION = Path(__file__).resolve().parents[1]
FLAGS = shlex.split(
    "--model lit_ti --img-size 32 -b 20 -j 1 --mixup 0.8 --cutmix 1.0 --aug-repeats 3 --reprob 0.25 --drop-path 0.1 "
    "--model-ema --no-amp --warmup-epochs 0 --cooldown-epochs 0 --lr 1e-3 --log-interval 1 --checkpoint-every 3 "
    "--model-kwargs dims=(16,32,40,64) depths=(1,1,1,1) mlp_ratios=(2,2,2,2)"
)
UPDATES = 12  # an epoch: 256 of 260 images by 20
# kill -9 more often than what the run can answer
SIGNALS = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]


def command(args: argparse.Namespace, data: Path, output: Path, name: str) -> list[str]:
    """The command line that starts the run, and continues it."""
    flags = [str(data), *FLAGS, "--epochs", str(args.epochs), "--output", str(output), "--experiment", name]
    flags += ["--resume", "auto"]
    if args.processes == 1:
        return [sys.executable, str(CLASSIFICATION / "train.py"), *flags]
    batch = ["-b", str(20 // args.processes)]
    return ["bash", str(CLASSIFICATION / "distributed_train.sh"), str(args.processes), *flags, *batch]


def moment(output: str) -> str:
    """What the run was about when it was struck, by the last line before it answered."""
    lines = [line for line in output.splitlines() if line.startswith("epoch ")]
    if not lines:
        return "start-up"
    update = re.match(r"epoch (\d+): update (\d+)/", lines[-1])
    if update is None:
        return "training"  # the line that ends an epoch: the next one has begun
    epoch, number = map(int, update.groups())
    return "validation or its save" if number == epoch * UPDATES else "training or a save"


def strike(call: list[str], after: float, number: signal.Signals) -> tuple[int, str, bool]:
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
            struck = False
        except subprocess.TimeoutExpired:
            struck = True
            os.killpg(process.pid, number)
            process.wait(timeout=120)
        output.seek(0)
        return process.returncode, output.read(), struck


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Weights, their average, and the optimizer's state in a checkpoint."""
    state = load_checkpoint(path)
    found = {**state["state_dict"], **{f"ema.{name}": value for name, value in state["state_dict_ema"].items()}}
    for index, entry in state["optimizer"]["state"].items():
        found |= {f"optimizer.{index}.{name}": value for name, value in entry.items()}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the soak test. Returns 0 if the weights are the same."""
    parser = ArgumentParser(prog="soak.py", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="times the run is struck, at least (20)")
    parser.add_argument("--processes", type=int, default=1, choices=[1, 2], help="training processes (1)")
    parser.add_argument("--epochs", type=int, default=200, metavar="N", help="epochs of the run, 12 updates each (200)")
    parser.add_argument("--seed", type=int, default=None, metavar="N", help="of the moments (random)")
    args = parser.parse_args(argv)
    seed = args.seed if args.seed is not None else random.randrange(10**6)
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        data, output = Path(folder) / "data", Path(folder) / "output"
        demo_data.build(data, demo_data.Settings(train_per_class=26, val_per_class=10, image_size=32))
        start = time.monotonic()
        status, text, _ = strike(command(args, data, output, "undisturbed"), 3600, signal.SIGKILL)
        seconds = time.monotonic() - start
        if status:
            print(text)
            return 1
        print(f"undisturbed run: {seconds:.0f} s; seed of the moments {seed}")

        struck: Counter[str] = Counter()
        call = command(args, data, output, "struck")
        while True:
            # the last start is left alone: it carries the run to its end
            after = (
                3600
                if sum(struck.values()) >= args.kills
                else rng.uniform(2, 6 + 10 * (args.processes - 1) + seconds / args.kills / 2)
            )
            number = rng.choice(SIGNALS)
            status, text, hit = strike(call, after, number)
            if not hit:
                if status == 0:
                    break
                print(text)
                return 1
            struck[f"{number.name} during {moment(text)}"] += 1
        for what, times in sorted(struck.items()):
            print(f"{times:3d} x {what}")
        if sum(struck.values()) < args.kills:
            print(f"the run ended after {sum(struck.values())} strikes: raise --epochs")
            return 1
        damaged = list((output / "struck").glob("*.damaged"))
        first, second = (tensors(output / name / CHECKPOINT) for name in ("undisturbed", "struck"))
        different = [name for name, value in first.items() if not torch.equal(value, second[name])]
        print(
            f"struck {sum(struck.values())} times, {len(damaged)} damaged checkpoints; of {len(first)} tensors "
            f"{len(different)} differ: the weights are {'NOT ' * bool(different)}those of the undisturbed run"
        )
        return 1 if different else 0


if __name__ == "__main__":
    run(main)
