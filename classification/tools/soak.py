#!/usr/bin/env python3
"""Break a run at random moments, many times, and show that it ends with the weights of an undisturbed run.

    python tools/soak.py [--task detection] [--kills 20] [--processes 2]        in classification/

Trains on demo data twice: once undisturbed, and once with kill -9, SIGTERM, SIGUSR1, SIGHUP and Ctrl-C at random
moments, during start-up, training, saving and validation. The same command continues it. Classification trains digits
with train.py, detection a small Mask R-CNN, and segmentation a small Semantic FPN. Several processes train by
distributed_train.sh and dist_train.sh.
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
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from litvit import demo_data
from litvit.cli import ArgumentParser, run
from litvit.runs.folder import CHECKPOINT, load_checkpoint

ROOT = Path(__file__).resolve().parents[2]
# kill -9 more often than the signals that the run can answer
SIGNALS = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT]


class Task(ABC):
    """A training to be broken.

    Args:
        folder: Folder for data and runs.
        processes: Number of training processes.
        epochs: Number of epochs, None for a number that takes some minutes.
    """

    start_up = 6.0  # seconds until the training begins, roughly, for one process

    def __init__(self, folder: Path, processes: int, epochs: int | None):
        self.folder, self.processes, self.epochs = folder, processes, epochs

    @abstractmethod
    def command(self, name: str) -> list[str]:
        """Return the command line that starts a run, and continues it."""

    @abstractmethod
    def phase(self, output: str) -> str:
        """Return what a run was doing when the signal came, by its output."""

    @abstractmethod
    def state(self, name: str) -> dict[str, Any]:
        """Return the weights, their average and the optimizer's state at a run's end, as dicts of tensors."""


class Classification(Task):
    """A small LIT on digits, with all that is random: 12 steps per epoch, 256 of 260 images in batches of 20."""

    FLAGS = (
        "--model lit_ti --img-size 32 -j 1 --mixup 0.8 --cutmix 1.0 --aug-repeats 3 --reprob 0.25 --drop-path 0.1 "
        "--model-ema --no-amp --warmup-epochs 0 --cooldown-epochs 0 --lr 1e-3 --log-interval 1 --checkpoint-every 3 "
        "--resume auto --model-kwargs dims=(16,32,40,64) depths=(1,1,1,1) mlp_ratios=(2,2,2,2)"
    )
    STEPS = 12

    def __init__(self, folder: Path, processes: int, epochs: int | None):
        super().__init__(folder, processes, epochs or 200)
        settings = demo_data.Settings(train_per_class=26, val_per_class=10, image_size=32)
        demo_data.build(folder / "data", settings)

    def command(self, name: str) -> list[str]:
        flags = [str(self.folder / "data"), *shlex.split(self.FLAGS), "--epochs", str(self.epochs)]
        flags += ["--output", str(self.folder), "--experiment", name, "-b", str(20 // self.processes)]
        if self.processes == 1:
            return [sys.executable, str(ROOT / "classification/train.py"), *flags]
        return ["bash", str(ROOT / "classification/distributed_train.sh"), str(self.processes), *flags]

    def phase(self, output: str) -> str:
        lines = [line for line in output.splitlines() if line.startswith("epoch ")]
        if not lines:
            return "start-up"
        step = re.match(r"epoch (\d+): step (\d+)/", lines[-1])
        if step is None:
            return "training"  # the line that ends an epoch: the next one has begun
        epoch, number = map(int, step.groups())
        return "validation or its save" if number == epoch * self.STEPS else "training or a save"

    def state(self, name: str) -> dict[str, Any]:
        state = load_checkpoint(self.folder / name / CHECKPOINT)
        return {key: state[key] for key in ("state_dict", "state_dict_ema", "optimizer")}


class Dense(Task):
    """A demo config with a tiny backbone, dropout, stochastic depth and an average of the weights, on drawn scenes."""

    start_up = 12.0
    CONFIG = """
_base_ = "{base}"
data_root = "{data}/"
model = dict(
    backbone=dict(
        dims=(16, 32, 40, 64), depths=(1, 1, 1, 1), mlp_ratios=(2, 2, 2, 2), drop_rate=0.1, drop_path_rate=0.2,
        img_size=64, init_cfg=None
    ),
    neck=dict(in_channels=[16, 32, 40, 64]),
)
data = dict(num_workers=1, persistent_workers=True, dataset=dict(data_root=data_root))
train_dataloader = dict(batch_size={batch_size}, **data)
val_dataloader = data
test_dataloader = data
{more}
default_hooks = dict(logger=dict(interval=1))
custom_hooks = [dict(type="EMAHook")]
checkpoint_every = "3"
"""

    def __init__(self, folder: Path, processes: int, epochs: int | None):
        super().__init__(folder, processes, epochs or 40)
        settings = demo_data.SceneSettings(self.task, train=16, val=4, image_size=96)
        demo_data.build(folder / "data", settings)
        base, more = (
            ROOT / self.task / "configs/lit" / self.base,
            self.more.format(epochs=self.epochs, data=folder / "data"),
        )
        text = self.CONFIG.format(base=base, data=folder / "data", batch_size=4 // processes, more=more)
        (folder / "config.py").write_text(text)

    def command(self, name: str) -> list[str]:
        tools = ROOT / self.task / "tools"
        flags = ["--work-dir", str(self.folder / name), "--resume"]
        if self.processes == 1:
            return [sys.executable, str(tools / "train.py"), str(self.folder / "config.py"), *flags]
        return ["bash", str(tools / "dist_train.sh"), str(self.folder / "config.py"), str(self.processes), *flags]

    def phase(self, output: str) -> str:
        lines = [line for line in output.splitlines() if re.search(r"(Epoch|Iter)\((train|val)\)|Saving", line)]
        if not lines:
            return "start-up"
        return "training or a save" if "(train)" in lines[-1] else "validation or a save"

    def state(self, name: str) -> dict[str, Any]:
        from litvit.openmmlab import load_from_file

        state = load_from_file((self.folder / name / "last_checkpoint").read_text())
        return {key: state[key] for key in ("state_dict", "ema_state_dict", "optimizer")}


class Detection(Dense):
    """Mask R-CNN, in epochs."""

    task, base = "detection", "mask_rcnn_lit_ti_fpn_demo.py"
    more = (
        "train_cfg = dict(max_epochs={epochs}, val_interval=2)\n"
        "val_evaluator = dict(ann_file=data_root + 'annotations/instances_val2017.json')\n"
        "test_evaluator = val_evaluator"
    )


class Segmentation(Dense):
    """Semantic FPN, in iterations, four to the epoch."""

    task, base = "segmentation", "lit_ti_fpn_demo.py"
    more = "train_cfg = dict(max_iters=4 * {epochs}, val_interval=8)\ndefault_hooks = dict(checkpoint=dict(interval=8))"


TASKS = {task.__name__.lower(): task for task in (Classification, Detection, Segmentation)}


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


def tensors(state: Any, name: str = "") -> dict[str, torch.Tensor]:
    """Return the tensors in dicts and lists, named by the keys that lead to them."""
    if isinstance(state, torch.Tensor):
        return {name: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    return {key: tensor for part, value in items for key, tensor in tensors(value, f"{name}.{part}").items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the soak test. Returns 0 if the weights are the same."""
    parser = ArgumentParser(prog="soak.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--task", choices=sorted(TASKS), default="classification", help="what is trained (classification)"
    )
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="smallest number of signals (20)")
    parser.add_argument("--processes", type=int, default=1, choices=[1, 2], help="training processes (1)")
    parser.add_argument("--epochs", type=int, default=None, metavar="N", help="epochs of the run (200; others 40)")
    parser.add_argument("--seed", type=int, default=None, metavar="N", help="seed of the moments (random)")
    args = parser.parse_args(argv)
    seed = args.seed if args.seed is not None else random.randrange(10**6)
    with tempfile.TemporaryDirectory() as folder:
        return soak(TASKS[args.task](Path(folder), args.processes, args.epochs), args, random.Random(seed), seed)


def soak(task: Task, args: argparse.Namespace, rng: random.Random, seed: int) -> int:
    """Train undisturbed, train disturbed, and compare. Returns 0 if the weights are the same."""
    start = time.monotonic()
    status, text, _ = send_signal(task.command("undisturbed"), 3600, signal.SIGKILL)
    seconds = time.monotonic() - start
    if status:
        print(text[-2000:])
        return 1
    print(f"undisturbed run: {seconds:.0f} s; seed of the moments {seed}", flush=True)

    hits: Counter[str] = Counter()
    longest = task.start_up + 10 * (args.processes - 1) + seconds / args.kills / 2
    while True:
        # the last start is left alone: it carries the run to its end
        after = 3600 if sum(hits.values()) >= args.kills else rng.uniform(2, longest)
        number = rng.choice(SIGNALS)
        status, text, hit = send_signal(task.command("disturbed"), after, number)
        if not hit:
            if status == 0:
                break
            print(text[-2000:])
            return 1
        hits[f"{number.name} during {task.phase(text)}"] += 1
    for what, times in sorted(hits.items()):
        print(f"{times:3d} x {what}")
    if sum(hits.values()) < args.kills:
        print(f"the run ended after {sum(hits.values())} signals, not {args.kills}: raise --epochs for more")
    damaged = list((task.folder / "disturbed").glob("*.damaged"))
    first, second = (tensors(task.state(name)) for name in ("undisturbed", "disturbed"))
    different = [name for name, value in first.items() if name not in second or not torch.equal(value, second[name])]
    print(
        f"hit {sum(hits.values())} times, {len(damaged)} damaged checkpoints; of {len(first)} tensors "
        f"{len(different)} differ: the weights are {'NOT ' * bool(different)}those of the undisturbed run"
    )
    return 1 if different else 0


if __name__ == "__main__":
    run(main)
