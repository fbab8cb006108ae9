"""Runs of mmengine that are interrupted, killed, and continued to the same weights, with a small model."""

import os
import signal
from pathlib import Path

import pytest
import torch
from mmengine.registry import LOOPS
from mmengine.runner import EpochBasedTrainLoop
from small_run import SEED, VARIANTS, Killed, Numbers, assert_same, content, kill, loader, send, train

from litvit.errors import InputError
from litvit.openmmlab import load_from_file

pytestmark = pytest.mark.usefixtures("mmengine_scope")


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
        train(tmp_path, resume_latest=False, load_from=str(tmp_path / "epoch_3.pth"))


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
