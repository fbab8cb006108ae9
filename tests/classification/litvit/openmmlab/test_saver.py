"""Runs of mmengine that are short of disk or of data: what is saved, deleted, told."""

import multiprocessing
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_run import SEED, VARIANTS, Killed, Numbers, assert_same, content, kill, loader, send, train

from litvit.errors import InputError
from litvit.openmmlab import load_from_file

pytestmark = pytest.mark.usefixtures("mmengine_scope")


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
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: a loader process was killed")
    assert load_from_file(tmp_path / "last.pth")["meta"]["iter"] >= 8
    assert train(tmp_path, **changes) == 0
    assert_same(content(tmp_path), undisturbed(**VARIANTS["loader processes"]))


def test_a_bug_in_a_data_set_is_saved_and_keeps_its_traceback(tmp_path, monkeypatch):
    def spoil(runner):
        monkeypatch.setattr(Numbers, "broken", None)

    with pytest.raises(TypeError, match="not iterable"):
        train(tmp_path, {("after_train_iter", 3): spoil}, **SEED)
    assert load_from_file(tmp_path / "last.pth")["meta"]["iter"] == 4


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


def test_steps_that_accumulate_are_saved_at_the_first_one_that_is_due(tmp_path):
    seen = []
    look = lambda runner: seen.extend(path.stat().st_mtime_ns for path in tmp_path.glob("last.pth"))  # noqa: E731
    actions = {("before_train_iter", i): look for i in range(18)}
    assert train(tmp_path, actions, checkpoint_every=3, **VARIANTS["accumulation in iterations"]) == 0
    assert len(set(seen)) == 3  # 4, 8 and 16; the config's own is at 12


def test_checkpoints_without_optimizer_are_not_the_ones_to_resume(undisturbed, tmp_path):
    hook = {"type": "CheckpointHook", "by_epoch": True, "interval": 1, "save_optimizer": False}
    changes = SEED | {"default_hooks": {"checkpoint": hook}}
    assert train(tmp_path, {("before_train_iter", 9): send(signal.SIGTERM)}, **changes) == 75
    with pytest.raises(Killed):
        train(tmp_path, {("after_train_iter", 13): kill}, **changes)
    assert (tmp_path / "epoch_2.pth").exists()
    assert (tmp_path / "last_checkpoint").read_text() == str(tmp_path / "last.pth")
    assert train(tmp_path, **changes) == 0


def test_the_message_where_a_checkpoint_is_named(tmp_path):
    """It would be resumed again."""
    assert train(tmp_path, {("before_train_iter", 7): send(signal.SIGTERM)}, **SEED) == 75
    named = {"resume": True, "load_from": str(tmp_path / "epoch_1.pth")}
    for more, flag in (({}, "--resume"), (named, "--resume and no file")):
        actions = {("before_train_iter", 9): send(signal.SIGTERM)}
        assert train(tmp_path, actions, resume_latest=not more, **SEED | more) == 75
        log = max(tmp_path.rglob("*.log"), key=lambda path: path.stat().st_mtime_ns)
        assert re.search(rf"SIGTERM: saved at iteration \d+; the same command with {flag} continues", log.read_text())


def test_a_run_whose_folder_is_deleted(undisturbed, tmp_path):
    folder = tmp_path / "run"
    actions = {("before_train_iter", 7): lambda runner: shutil.rmtree(folder)}
    assert train(folder, actions, **SEED) == 0
    assert_same(content(folder), undisturbed())


@pytest.mark.parametrize("pointer", [bytes(24), b"\xff\xfe\x80abc", 300 * b"x", 5000 * b"x", b""])
def test_a_damaged_pointer_to_the_last_checkpoint(pointer, undisturbed, tmp_path):
    assert train(tmp_path, {("before_train_iter", 7): send(signal.SIGTERM)}, **SEED) == 75
    (tmp_path / "last_checkpoint").write_bytes(pointer)
    assert train(tmp_path, **SEED) == 0
    assert_same(content(tmp_path), undisturbed())


def test_a_file_that_is_gone_ends_a_run_with_loader_processes(tmp_path, capfd):
    """The error comes from another process, whose frames are not in the traceback."""
    file = tmp_path / "image"
    file.touch()
    data = {"type": "Files", "path": str(file)}
    changes = {"train_dataloader": loader(dataset=data, num_workers=2, persistent_workers=True)}
    assert train(tmp_path / "run", {("after_train_iter", 3): lambda runner: file.unlink()}, **changes) == 2
    assert str(file) in capfd.readouterr().err.splitlines()[-1]
