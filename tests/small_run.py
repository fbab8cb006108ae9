"""Runs of mmengine that take less than a second, with all that is random, for tests that disturb them."""

import os
import random
from itertools import count
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from forked import end_loader_processes
from mmdet.datasets.samplers import AspectRatioBatchSampler
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATA_SAMPLERS, DATASETS, HOOKS, METRICS, MODELS
from torch import nn

from litvit.openmmlab import load_from_file
from litvit.openmmlab.errors import SampleError
from litvit.openmmlab.saver import Stopped
from litvit.openmmlab.training_runner import TrainingRunner

DATA_SAMPLERS.register_module(name="Aspect", module=AspectRatioBatchSampler)
numbers = count()


class Killed(BaseException):
    """Stands for kill -9: nothing handles it."""


@DATASETS.register_module()
class Numbers:
    """Samples of which all generators have a part. `broken` ones cannot be read."""

    broken = ()

    def __init__(self, length=22):
        self.length, self.metainfo = length, {}

    def __len__(self):
        return self.length

    def get_data_info(self, i):
        return {"width": 1 + i % 2, "height": 1.5}

    def __getitem__(self, i):
        if i in self.broken:
            raise SampleError(f"image {i} cannot be read")
        draws = [i / self.length, random.random(), np.random.rand(), torch.rand(()).item()]
        return {"inputs": torch.tensor(draws)}


@DATASETS.register_module()
class Files(Numbers):
    """Samples of a file, which is opened for each."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def __getitem__(self, i):
        Path(self.path).read_bytes()
        return super().__getitem__(i)


@MODELS.register_module()
class Small(BaseModel):
    """With BatchNorm, dropout, and a loss that is the mean of what comes out."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, inputs, mode="tensor"):
        x = self.layers(torch.stack(inputs))
        return {"loss": (x - torch.stack(inputs).sum(1, keepdim=True)).square().mean()} if mode == "loss" else list(x)


@METRICS.register_module()
class Sum(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results += [float(x) for x in data_samples]

    def compute_metrics(self, results):
        return {"sum": sum(results)}


@HOOKS.register_module()
class Call(Hook):
    """Calls functions of the runner, named by the hook's moment and the iteration."""

    actions: ClassVar = {}

    def _act(self, moment, runner, *args, **kwargs):
        action = self.actions.get((moment, runner.iter))
        if action:
            action(runner)


for moment in ("before_train_iter", "after_train_iter", "before_val_iter", "after_val_epoch"):
    setattr(Call, moment, lambda self, *args, moment=moment, **kwargs: self._act(moment, *args, **kwargs))


def config(folder, by_epoch=True, **changes):
    schedules = [
        {"type": "LinearLR", "start_factor": 0.1, "by_epoch": False, "end": 5},
        {"type": "ReduceOnPlateauLR", "monitor": "sum", "rule": "greater", "factor": 0.7, "patience": 0},
    ]
    values = {
        "work_dir": str(folder),
        "experiment_name": f"run {next(numbers)}",
        "default_scope": "mmengine",
        "model": {"type": "Small"},
        "train_dataloader": loader(by_epoch),
        "val_dataloader": loader(sampler={"type": "DefaultSampler", "shuffle": False}),
        "val_cfg": {},
        "val_evaluator": {"type": "Sum"},
        "train_cfg": {"by_epoch": True, "max_epochs": 3}
        if by_epoch
        else {"by_epoch": False, "max_iters": 18, "val_interval": 6},
        "optim_wrapper": {"type": "OptimWrapper", "optimizer": {"type": "AdamW", "lr": 0.01}},
        "param_scheduler": schedules,
        "default_hooks": {
            "checkpoint": {
                "type": "CheckpointHook",
                "by_epoch": by_epoch,
                "interval": 1 if by_epoch else 6,
                "save_best": "sum",
                "rule": "greater",
                "max_keep_ckpts": 2,
            },
        },
        "custom_hooks": [{"type": "EMAHook"}, {"type": "Call", "priority": "VERY_HIGH"}],
        "log_level": "WARNING",
    }
    return Config(values | changes)


def train(folder, actions=(), resume_latest=True, **changes):
    """Start or continue a run. Returns its exit status."""
    Call.actions = dict(actions)
    TrainingRunner.resume_latest = resume_latest
    try:
        TrainingRunner.from_cfg(config(folder, **changes)).train()
    except Stopped as stopped:
        return stopped.status
    finally:
        end_loader_processes()  # as the end of a trainer does
        TrainingRunner.resume_latest = False
        Call.actions = {}
    return 0


def flat(state, name):
    """Yield names and values of all that a checkpoint holds of the training."""
    if isinstance(state, dict | list | tuple):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from flat(value, f"{name}.{key}")
    else:
        yield name, state


def content(folder):
    checkpoint = load_from_file((folder / "last_checkpoint").read_text())
    parts = ("state_dict", "ema_state_dict", "optimizer", "param_schedulers")
    held = {name: value for part in parts for name, value in flat(checkpoint[part], part)}
    return held | dict(flat(checkpoint["meta"]["litvit"], "run"))


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        same = torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        assert same, name


SEED = {"randomness": {"seed": 3}}


def loader(by_epoch=True, **changes):
    name = "DefaultSampler" if by_epoch else "InfiniteSampler"
    sampler = {"type": name, "shuffle": True}
    return {"batch_size": 4, "num_workers": 0, "dataset": {"type": "Numbers"}, "sampler": sampler} | changes


ACCUMULATION = {"type": "OptimWrapper", "optimizer": {"type": "AdamW", "lr": 0.01}, "accumulative_counts": 2}
VARIANTS = {
    "epochs": {},
    "iterations": {"by_epoch": False},
    "finite sampler in iterations": {"by_epoch": False, "train_dataloader": loader()},
    "loader processes": {"train_dataloader": loader(num_workers=2, persistent_workers=True)},
    "new loader processes in iterations": {"by_epoch": False, "train_dataloader": loader(num_workers=1)},
    "aspect ratios": {"train_dataloader": loader(batch_sampler={"type": "Aspect"})},
    "aspect ratios without end": {
        "by_epoch": False,
        "train_dataloader": loader(False, batch_sampler={"type": "Aspect"}),
    },
    "batches per epoch": {"train_dataloader": loader(num_batch_per_epoch=4)},
    "accumulation": {"optim_wrapper": ACCUMULATION},
    "accumulation in iterations": {"by_epoch": False, "optim_wrapper": ACCUMULATION},
    "a seed per rank": {"randomness": {"seed": 3, "diff_rank_seed": True}},
    "checkpoints by iteration": {
        "default_hooks": {"checkpoint": {"type": "CheckpointHook", "by_epoch": False, "interval": 3}}
    },
}


def send(number):
    """Return a function of a runner that sends this process a signal."""
    return lambda runner: os.kill(os.getpid(), number)


def kill(runner):
    """End a run as kill -9 does."""
    raise Killed
