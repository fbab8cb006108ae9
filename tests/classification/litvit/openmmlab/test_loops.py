"""Runs of mmengine that are interrupted, killed, short of disk or of data, and continued, with a small model."""

import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from mmdet.datasets.samplers import AspectRatioBatchSampler
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATA_SAMPLERS, DATASETS, HOOKS, LOOPS, METRICS, MODELS, DefaultScope
from mmengine.runner import EpochBasedTrainLoop
from torch import nn

from litvit.errors import InputError
from litvit.openmmlab import load_from_file
from litvit.openmmlab.errors import SampleError
from litvit.openmmlab.loops import Stopped
from litvit.openmmlab.runner import TrainingRunner

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


def train(folder, actions=(), resume=True, **changes):
    """Start or continue a run. Returns its exit status."""
    Call.actions = dict(actions)
    TrainingRunner.resume_latest = resume
    try:
        TrainingRunner.from_cfg(config(folder, **changes)).train()
    except Stopped as stopped:
        return stopped.status
    finally:
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


@pytest.fixture(autouse=True, scope="module")
def _scope():
    """Leave the registries of other tests as they are."""
    with DefaultScope.overwrite_default_scope("mmengine"):
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A function that returns what a run without disturbances comes to."""
    known = {}

    def run(**changes):
        key = repr(changes)
        if key not in known:
            folder = tmp_path_factory.mktemp("run")
            assert train(folder, **SEED | changes) == 0
            known[key] = content(folder)
        return known[key]

    return run


def send(number):
    return lambda runner: os.kill(os.getpid(), number)


@pytest.mark.parametrize("iteration", [0, 1, 5, 6, 9, 17])
@pytest.mark.parametrize("variant", ["epochs", "iterations"])
def test_a_signal_after_any_iteration(variant, iteration, undisturbed, tmp_path):
    changes = SEED | VARIANTS[variant]
    assert train(tmp_path, {("before_train_iter", iteration): send(signal.SIGTERM)}, **changes) == 75
    assert train(tmp_path, **changes) == 0
    assert_same(content(tmp_path), undisturbed(**VARIANTS[variant]))
    assert not list(tmp_path.glob("last.pth")) + list(tmp_path.glob("previous.pth"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_and_interrupted(variant, undisturbed, tmp_path):
    """A kill loses what came after the last checkpoint in time, which is computed again."""
    changes = SEED | {"checkpoint_every": 2} | VARIANTS[variant]
    with pytest.raises(Killed):
        train(tmp_path, {("after_train_iter", 7): kill}, **changes)
    assert load_from_file((tmp_path / "last_checkpoint").read_text())["meta"]["iter"] == 6
    assert train(tmp_path, {("before_train_iter", 10): send(signal.SIGUSR1)}, **changes) == 75
    assert train(tmp_path, **changes) == 0
    assert_same(content(tmp_path), undisturbed(**VARIANTS[variant]))


def kill(runner):
    raise Killed


@pytest.mark.parametrize("moment", ["before_val_iter", "after_val_epoch"])
@pytest.mark.parametrize("iteration", [6, 18])
@pytest.mark.parametrize("variant", ["epochs", "iterations"])
def test_killed_during_validation(variant, iteration, moment, undisturbed, tmp_path):
    changes = SEED | VARIANTS[variant]
    with pytest.raises(Killed):
        train(tmp_path, {(moment, iteration): kill}, **changes)
    assert train(tmp_path, **changes) == 0
    assert_same(content(tmp_path), undisturbed(**VARIANTS[variant]))


@pytest.mark.parametrize("iteration", [6, 18])
@pytest.mark.parametrize("variant", ["epochs", "iterations", "loader processes"])
def test_a_signal_during_validation(variant, iteration, undisturbed, tmp_path):
    """The validation is done again, with the weights of training and not with those of the EMA in their place."""
    changes = SEED | VARIANTS[variant]
    changes["default_hooks"] = {"checkpoint": {"type": "CheckpointHook", "by_epoch": False, "save_last": False}}
    assert train(tmp_path / "whole", **changes) == 0
    folder = tmp_path / "run"
    assert train(folder, {("before_val_iter", iteration): send(signal.SIGINT)}, **changes) == 75
    assert load_from_file((folder / "last_checkpoint").read_text())["meta"]["iter"] == iteration
    assert train(folder, **changes) == 0
    assert_same(content(folder), content(tmp_path / "whole"))


def test_a_run_without_seed_keeps_the_one_that_it_has_drawn(tmp_path):
    assert train(tmp_path, {("before_train_iter", 8): send(signal.SIGHUP)}) == 75
    seed = load_from_file(tmp_path / "last.pth")["meta"]["seed"]
    assert train(tmp_path) == 0
    assert train(tmp_path / "whole", randomness={"seed": seed}) == 0
    assert_same(content(tmp_path), content(tmp_path / "whole"))


def test_a_run_that_has_ended_says_so(tmp_path, caplog):
    assert train(tmp_path) == 0
    before = content(tmp_path)
    file = tmp_path / "epoch_3.pth"
    changed = file.stat().st_mtime_ns
    assert train(tmp_path, {("before_val_iter", 18): kill, ("before_train_iter", 18): kill}, log_level="INFO") == 0
    assert [path for path in tmp_path.rglob("*.log") if "has ended already" in path.read_text()]
    assert file.stat().st_mtime_ns == changed
    # A longer one goes on.
    assert train(tmp_path, train_cfg={"by_epoch": True, "max_epochs": 4}) == 0
    assert before["run.iter"] < content(tmp_path)["run.iter"]


def test_an_early_stop_stays_one(tmp_path):
    stopping = {"type": "EarlyStoppingHook", "monitor": "sum", "rule": "less", "patience": 2, "min_delta": 1e9}
    hooks = {"custom_hooks": [stopping, {"type": "Call", "priority": "VERY_HIGH"}]}
    changes = hooks | {"train_cfg": {"by_epoch": True, "max_epochs": 9}}
    assert train(tmp_path / "whole", **SEED, **changes) == 0
    assert train(tmp_path, {("before_train_iter", 13): send(signal.SIGTERM)}, **SEED, **changes) == 75
    assert train(tmp_path, **SEED, **changes) == 0
    whole, found = (load_from_file(folder / "epoch_3.pth")["meta"] for folder in (tmp_path / "whole", tmp_path))
    assert found["litvit"] == whole["litvit"]
    assert found["litvit"]["stopped"]
    assert train(tmp_path, {("before_train_iter", 18): kill}, **SEED, **changes) == 0


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut_off(file):
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [flip_a_bit, cut_off, lambda file: file.write_bytes(b"")])
def test_a_damaged_checkpoint(damage, undisturbed, tmp_path, capsys):
    changes = SEED | {"checkpoint_every": 2}
    with pytest.raises(Killed):
        train(tmp_path, {("after_train_iter", 11): kill}, **changes)
    damage(tmp_path / "last.pth")
    assert train(tmp_path, **changes) == 0
    warning = f"{tmp_path / 'last.pth'} is damaged or missing: {tmp_path / 'previous.pth'} is used instead"
    assert capsys.readouterr().err.count(warning) == 1
    assert (tmp_path / "last.pth.damaged").exists()
    assert_same(content(tmp_path), undisturbed())


def test_a_damaged_checkpoint_that_is_named(tmp_path):
    assert train(tmp_path) == 0
    flip_a_bit(tmp_path / "epoch_3.pth")
    with pytest.raises(InputError, match="epoch_3.pth is no checkpoint, or a truncated one"):
        train(tmp_path, resume=False, load_from=str(tmp_path / "epoch_3.pth"))


@pytest.fixture
def disk():
    """Functions of a runner after which files are at most a few bytes long, and of any length again."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    class Disk:
        @staticmethod
        def fill(runner):
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))

        @staticmethod
        def empty(runner):
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    yield Disk
    Disk.empty(None)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_deletes_nothing(disk, undisturbed, tmp_path):
    """Neither the oldest checkpoint nor the best one, and the run goes on."""
    files = []
    actions = {
        ("after_train_iter", 11): disk.fill,
        ("before_train_iter", 13): lambda runner: files.extend(path.name for path in tmp_path.iterdir()),
        ("before_train_iter", 14): disk.empty,
    }
    keep = {"interval": 1, "save_best": "sum", "rule": "greater", "max_keep_ckpts": 1}
    hooks = {"default_hooks": {"checkpoint": {"type": "CheckpointHook", **keep}}}
    assert train(tmp_path / "whole", **SEED, **hooks) == 0
    assert train(tmp_path, actions, **SEED, **hooks, checkpoint_every=2) == 0
    assert "epoch_1.pth" in files
    assert "best_sum_epoch_1.pth" in files
    assert not [name for name in files if name.endswith(".tmp") or "epoch_2" in name]
    assert_same(content(tmp_path), undisturbed())
    names = sorted(path.name for path in tmp_path.glob("*.pth"))
    assert names == sorted(path.name for path in (tmp_path / "whole").glob("*.pth"))


def test_an_end_that_cannot_be_saved(disk, undisturbed, tmp_path):
    assert train(tmp_path, {("before_train_iter", 17): disk.fill}, **SEED) == 75
    disk.empty(None)
    assert Path((tmp_path / "last_checkpoint").read_text()) == tmp_path / "epoch_2.pth"
    assert train(tmp_path, **SEED) == 0
    assert_same(content(tmp_path), undisturbed())


def test_a_best_checkpoint_that_cannot_be_saved_at_the_end(disk, undisturbed, tmp_path):
    assert train(tmp_path, {("before_val_iter", 18): disk.fill}, **SEED) == 75
    disk.empty(None)
    assert train(tmp_path, **SEED) == 0
    assert_same(content(tmp_path), undisturbed())


@pytest.mark.parametrize("variant", ["epochs", "loader processes", "accumulation"])
def test_a_sample_that_cannot_be_read(variant, undisturbed, tmp_path, capfd, monkeypatch):
    changes = SEED | VARIANTS[variant]
    order = torch.randperm(22, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(Numbers, "broken", (int(order[12]),))
    assert train(tmp_path, **changes) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error == f"error: image {int(order[12])} cannot be read"
    assert load_from_file(tmp_path / "last.pth")["meta"]["iter"] == (2 if variant == "accumulation" else 3)
    monkeypatch.setattr(Numbers, "broken", ())
    assert train(tmp_path, **changes) == 0
    assert_same(content(tmp_path), undisturbed(**VARIANTS[variant]))


def test_a_broken_sample_of_the_validation(undisturbed, tmp_path, monkeypatch):
    broken = {("after_train_iter", 11): lambda runner: monkeypatch.setattr(Numbers, "broken", (21,))}
    assert train(tmp_path, broken, **SEED) == 2
    monkeypatch.setattr(Numbers, "broken", ())
    assert load_from_file((tmp_path / "last_checkpoint").read_text())["meta"]["iter"] == 12
    assert train(tmp_path, **SEED) == 0
    assert_same(content(tmp_path), undisturbed())


def test_a_dead_loader_process(undisturbed, tmp_path, capfd):
    changes = SEED | VARIANTS["loader processes"]

    def kill_loaders(runner):
        for process in multiprocessing.active_children():
            process.kill()

    assert train(tmp_path, {("before_train_iter", 7): kill_loaders}, **changes) == 75
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: a loader process was killed by SIGKILL")
    assert load_from_file(tmp_path / "last.pth")["meta"]["iter"] >= 8
    assert train(tmp_path, **changes) == 0
    assert_same(content(tmp_path), undisturbed(**VARIANTS["loader processes"]))


def test_a_bug_in_a_data_set_is_saved_and_keeps_its_traceback(tmp_path, monkeypatch):
    def spoil(runner):
        monkeypatch.setattr(Numbers, "broken", None)

    with pytest.raises(TypeError, match="not iterable"):
        train(tmp_path, {("after_train_iter", 3): spoil}, **SEED)
    assert load_from_file(tmp_path / "last.pth")["meta"]["iter"] == 4


@pytest.mark.parametrize("variant", ["epochs", "iterations"])
def test_another_batch_size_continues_at_the_proportionate_place(variant, tmp_path):
    by_epoch = variant == "epochs"
    changes = SEED | VARIANTS[variant]
    assert train(tmp_path, {("before_train_iter", 7): send(signal.SIGTERM)}, **changes) == 75
    assert train(tmp_path, train_dataloader=loader(by_epoch, batch_size=2), **changes) == 0
    (log,) = (path.read_text() for path in tmp_path.rglob("*.log") if "has changed" in path.read_text())
    # 2 of the 6 batches of the second epoch are 3 of 11, and 8 batches of 4 are 16 of 2.
    assert f"at the proportionate place, after {3 if by_epoch else 16} batches" in log
    assert content(tmp_path)["run.iter"] == (33 if by_epoch else 18)


def test_wrong_intervals_are_one_line(tmp_path):
    with pytest.raises(InputError, match="checkpoint_every: 'soon' is neither a time"):
        train(tmp_path, checkpoint_every="soon")


def test_checkpoints_in_time(tmp_path):
    """By default every ten minutes. They are deleted at the end."""
    seen = set()
    look = lambda runner: seen.update(Path(runner.work_dir).glob("*.pth"))  # noqa: E731
    actions = {("before_train_iter", i): look for i in range(6)}
    assert train(tmp_path / "seldom", actions) == 0
    assert not seen
    assert train(tmp_path / "often", actions, checkpoint_every="0.000001s") == 0
    assert {path.name for path in seen} == {"last.pth", "previous.pth"}
    assert not {path.name for path in (tmp_path / "often").glob("*.pth")} & {"last.pth", "previous.pth"}


@pytest.mark.parametrize("variant", ["epochs", "iterations"])
def test_a_checkpoint_of_another_program(variant, undisturbed, tmp_path):
    """It does not say how far the data were used, nor whether it was validated."""
    changes = SEED | VARIANTS[variant] | {"param_scheduler": []}
    with pytest.raises(Killed):
        train(tmp_path, {("before_train_iter", 13): kill}, **changes)
    file = Path((tmp_path / "last_checkpoint").read_text())
    checkpoint = load_from_file(file)
    del checkpoint["meta"]["litvit"]
    torch.save(checkpoint, file)
    assert train(tmp_path, {("before_train_iter", 11): kill}, **changes) == 0
    assert_same(content(tmp_path), undisturbed(**VARIANTS[variant], param_scheduler=[]))


@LOOPS.register_module()
class Own(EpochBasedTrainLoop):
    pass


def test_a_loop_of_the_users_own_stays_as_it_is(tmp_path):
    assert train(tmp_path, train_cfg={"type": "Own", "max_epochs": 1}) == 0
    assert [path for path in tmp_path.rglob("*.log") if "train_cfg.type is Own: signals are not" in path.read_text()]
    assert train(tmp_path, train_cfg={"type": "Own", "max_epochs": 2}) == 0
    assert load_from_file(tmp_path / "epoch_2.pth")["meta"]["iter"] == 12


def test_a_pipeline_may_be_changed_by_a_hook(tmp_path):
    """As mmdet's YOLOXModeSwitchHook does: the data set keeps its type."""
    kinds = []
    actions = {("before_train_iter", 0): lambda runner: kinds.append(type(runner.train_dataloader.dataset))}
    assert train(tmp_path, actions) == 0
    assert kinds == [Numbers]


def one_of_two(rank, folder, port, ends):
    """Train in one of two processes: `ends` are the disturbance and the expected exit status of each start."""
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    for name, status, actions, changes in ends:
        Numbers.broken = ()
        actions = {key: action for key, (of_rank, action) in actions.items() if of_rank == rank}
        assert train(folder / name, actions, launcher="pytorch", **SEED, **changes) == status
    os._exit(0)  # gloo's threads may abort an interpreter that takes its time to end


def break_a_sample(runner):
    Numbers.broken = tuple(range(22))


def test_two_processes_stop_and_continue_together(tmp_path):
    """After a signal to one of them, also in a validation, and a sample that one of them cannot read."""
    iterations = {"by_epoch": False}
    ends = [
        ("whole", 0, {}, {}),
        ("run", 75, {("before_train_iter", 4): (1, send(signal.SIGTERM))}, {}),
        ("run", 75, {("before_val_iter", 6): (1, send(signal.SIGTERM))}, {}),
        ("run", 2, {("after_train_iter", 7): (1, break_a_sample)}, {}),
        ("run", 0, {}, {}),
        ("whole iterations", 0, {}, iterations),
        ("iterations", 75, {("before_train_iter", 8): (0, send(signal.SIGUSR1))}, iterations),
        ("iterations", 0, {}, iterations),
    ]
    torch.multiprocessing.start_processes(one_of_two, (tmp_path, 29511, ends), nprocs=2, start_method="fork")
    assert_same(content(tmp_path / "run"), content(tmp_path / "whole"))
    assert_same(content(tmp_path / "iterations"), content(tmp_path / "whole iterations"))


def test_a_second_run_in_the_folder_is_refused(tmp_path):
    code = "import fcntl, sys; lock = open(sys.argv[1], 'w'); fcntl.lockf(lock, fcntl.LOCK_EX)"
    command = [sys.executable, "-c", f"{code}; print('locked', flush=True); input()", str(tmp_path / ".lock")]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(
        InputError, match=f"another process trains in {tmp_path}: wait for it, or choose another folder"
    ):
        train(tmp_path)
    other.communicate("\n")
    assert train(tmp_path) == 0
