"""A run that is never lost: kills, signals, broken checkpoints, bad numbers, bad images, full disks."""

import csv
import fcntl
import io
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import termios
import time
from functools import partial
from pathlib import Path
from threading import Timer

import numpy as np
import pytest
import safetensors.torch
import torch
import train
import yaml
from safetensors.torch import load_file, save_file

from litvit import cli
from litvit.errors import InputError
from litvit.processes import EXIT_DIVERGED, EXIT_INTERRUPTED, Interrupted, StopSignals
from litvit.runs.folder import BEST_WEIGHTS, CHECKPOINT, DIVERGED, PAGE, PREVIOUS, load_checkpoint, read_description
from litvit.training.build import build_trainer
from litvit.training.recipe import parse_config

CLASSIFICATION = Path(train.__file__).parent


def run(*flags):
    return build_trainer(parse_config([str(flag) for flag in flags])).run()


@pytest.mark.parametrize("update", [1, 3, 4, 5])
def test_interrupted_anywhere_the_run_ends_with_the_same_weights(
    flags, tmp_path, undisturbed, update, assert_same_weights
):
    trainer = build_trainer(parse_config(flags))
    step = trainer.guard.step

    def step_and_signal(loss):
        loss = step(loss)
        if trainer.progress.step + 1 == update:
            os.kill(os.getpid(), signal.SIGUSR1)
        return loss

    trainer.guard.step = step_and_signal
    assert trainer.run() == EXIT_INTERRUPTED
    state = torch.load(tmp_path / "run" / CHECKPOINT, weights_only=True)
    assert (state["update"], state["epoch"] * 4 + state["done"]) == (update, update)
    assert run(*flags, "--resume", "auto") == 0
    assert_same_weights(tmp_path / "run", undisturbed)
    measured = ("seconds", "images_per_second", "memory")
    for row, other in zip(rows(tmp_path / "run"), rows(undisturbed), strict=True):
        assert row.keys() == other.keys()
        for name in row:
            if not any(word in name for word in measured):
                rel = 1e-5 if name.startswith("train_") else 0
                assert float(row[name]) == pytest.approx(float(other[name]), rel=rel), name
    assert "2 of 2 epochs" in (tmp_path / "run" / PAGE).read_text()


def test_a_signal_during_validation_saves_and_validates_again(flags, tmp_path, undisturbed, assert_same_weights):
    trainer = build_trainer(parse_config(flags))
    validate = trainer.validate

    def signalled():
        os.kill(os.getpid(), signal.SIGTERM)
        return validate()

    trainer.validate = signalled
    assert trainer.run() == EXIT_INTERRUPTED
    state = torch.load(tmp_path / "run" / CHECKPOINT, weights_only=True)
    assert (state["epoch"], state["done"], state["update"]) == (0, 4, 4)
    assert run(*flags, "--resume", "auto") == 0
    assert_same_weights(tmp_path / "run", undisturbed)


def test_kill_9_at_a_random_moment(flags, tmp_path, undisturbed, assert_same_weights):
    command = [sys.executable, str(CLASSIFICATION / "train.py"), *flags, "--resume", "auto", "--checkpoint-every", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    updates = np.random.default_rng().integers(1, 8)
    for line in process.stdout:
        if f"step {updates}/8" in line:
            break
    process.kill()
    process.wait()
    assert run(*flags, "--resume", "auto", "--checkpoint-every", "1") == 0, f"killed at step {updates}"
    assert_same_weights(tmp_path / "run", undisturbed)


def test_sigterm_and_ctrl_c_end_a_process_with_status_75(flags, tmp_path):
    command = [sys.executable, str(CLASSIFICATION / "train.py"), *flags, "--epochs", "200", "-j", "1"]
    for number, name in ((signal.SIGTERM, "one"), (signal.SIGINT, "two")):
        process = subprocess.Popen(
            [*command, "--experiment", name], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        for line in process.stdout:
            if "step 2/" in line:
                break
        os.killpg(process.pid, number)  # to the loader process too, as a scheduler or a terminal does
        out = process.stdout.read()
        assert process.wait(timeout=60) == EXIT_INTERRUPTED, out
        assert re.search(rf"{number.name}: saved at step \d of epoch \d+; --resume", out)
        assert (tmp_path / name / CHECKPOINT).is_file()


def test_a_second_ctrl_c_leaves_at_once(capsys):
    def main(_):
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.received == signal.SIGINT
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as exit_:
        cli.run(main)
    assert exit_.value.code == cli.EXIT_CTRL_C == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(signal.SIGINT) is handler


def losses(folder, name):
    log = (folder / name / "train.log").read_text()
    return {int(n): float(loss) for n, loss in re.findall(r"step (\d+)/\d+, loss ([\d.]+)", log)}


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_continued_on_another_number_of_processes(digits, tmp_path, tiny_flags, run_script, before, after):
    """The same batches, so the same losses to rounding, where nothing random is a process's own."""
    flags = [digits, *tiny_flags, "--reprob", 0.5, "--output", tmp_path, "--lr", 1e-4, "--checkpoint-every", 1]
    assert run(*flags, "--experiment", "whole") == 0

    def part(processes):
        flags_here = [*flags, "-b", 20 // processes, "--experiment", "moved"]
        if processes == 1:
            assert run(*flags_here, "--resume", "auto") == 0
            return
        outcome = run_script("distributed_train.sh", processes, *flags_here)
        assert outcome.status == 0, outcome.err

    part(before)
    # go back to the checkpoint before the last: in the middle of the second epoch
    state = torch.load(tmp_path / "moved" / PREVIOUS, weights_only=True)
    assert (state["epoch"], state["done"]) == (1, 3)
    shutil.copy(tmp_path / "moved" / PREVIOUS, tmp_path / "moved" / CHECKPOINT)
    first = losses(tmp_path, "moved")
    (tmp_path / "moved" / "train.log").unlink()
    part(after)
    assert "continuing at epoch 2, step 4" in (tmp_path / "moved" / "train.log").read_text()
    # BatchNorm's statistics are a process's own, so agreement is close, not exact
    assert first | losses(tmp_path, "moved") == pytest.approx(losses(tmp_path, "whole"), rel=0.02)


def test_an_ended_run_says_so(undisturbed, digits, tmp_path, flags, capsys):
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    before = (folder / CHECKPOINT).read_bytes()
    assert run(*flags, "--resume", "auto") == 0
    assert "this run has ended already" in capsys.readouterr().out
    assert (folder / CHECKPOINT).read_bytes() == before


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_fewer_epochs_than_trained_are_refused_and_change_nothing(flags, tmp_path, run_main, epochs):
    """Of four epochs two and a half are trained."""
    trainer = build_trainer(parse_config([*flags, "--epochs", "4"]))
    at_step(trainer, 10, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    assert trainer.run() == EXIT_INTERRUPTED
    before = files_of(tmp_path / "run")
    outcome = run_main(train, flags[0], "--resume", tmp_path / "run", "--epochs", epochs)
    if epochs < 3:
        assert outcome.status == 2
        assert f"{tmp_path / 'run'} has trained 2 epochs and 2 steps, more than --epochs {epochs}:" in outcome.err
        assert files_of(tmp_path / "run") == before
    else:
        assert outcome.status == 0
        assert "continuing at epoch 3, step 3" in outcome.out


def test_a_run_that_has_ended_keeps_its_settings(undisturbed, flags, tmp_path):
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    before = files_of(folder)
    assert run(*flags, "--resume", "auto", "--log-interval", 7) == 0
    assert files_of(folder) == before


def test_changed_settings_are_refused_by_name(undisturbed, tmp_path, flags, run_main):
    shutil.copytree(undisturbed, tmp_path / "run")
    outcome = run_main(train, *flags, "--resume", "auto", "--lr", 1, "--mixup", 0.1, "-b", 10)
    assert outcome.status == 2
    assert outcome.err.count("\n") == 1
    assert "lr was 0.002, is 1.0; mixup was 0.8, is 0.1; total_batch was 20, is 10" in outcome.err
    assert (
        run(*flags, "--resume", "auto", "--log-interval", 2, "--epochs", 3, "-j", 1, "-b", 10, "--grad-accum-steps", 2)
        == 0
    )


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(
    flags, tmp_path, undisturbed, damage, capsys, assert_same_weights
):
    trainer = build_trainer(parse_config([*flags, "--checkpoint-every", "1"]))
    save_or_stop = trainer.saver.save_or_stop

    def stop_at_step_6(*args, **kwargs):
        save_or_stop(*args, **kwargs)
        if trainer.progress.step == 6:
            raise Interrupted

    trainer.saver.save_or_stop = stop_at_step_6
    assert trainer.run() == EXIT_INTERRUPTED
    path = tmp_path / "run" / CHECKPOINT
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert run(*flags, "--checkpoint-every", "1", "--resume", "auto") == 0
    assert "trying the checkpoint before it" in capsys.readouterr().out
    assert (tmp_path / "run" / f"{CHECKPOINT}.damaged").exists()
    assert_same_weights(tmp_path / "run", undisturbed)


def test_a_bad_number_leaves_the_update_out(flags, tmp_path):
    trainer = build_trainer(parse_config(flags))
    task = trainer.task.forward
    before = []

    def forward(images, target):
        result = task(images, target)
        if trainer.progress.step == 3:
            before.append({name: value.clone() for name, value in trainer.task.trainable_module.state_dict().items()})
            result["loss"] = result["loss"] * torch.nan
        if trainer.progress.step == 4 and len(before) == 1:
            before.append(trainer.task.trainable_module.state_dict())
            for name, value in before[0].items():
                if "running" not in name and "num_batches" not in name:
                    assert torch.equal(value, before[1][name]), name
        return result

    trainer.task.forward = forward
    assert trainer.run() == 0
    assert len(before) == 2
    assert trainer.guard.bad_steps == 1
    assert trainer.guard.bad_in_a_row == 0
    state = torch.load(tmp_path / "run" / CHECKPOINT, weights_only=True)
    assert all(value.isfinite().all() for value in state["state_dict"].values())
    assert "1 steps left out" in (tmp_path / "run" / "train.log").read_text()


def test_bad_numbers_without_end_stop_the_run_and_leave_the_checkpoint(flags, tmp_path):
    trainer = build_trainer(parse_config([*flags, "--epochs", "4"]))
    task = trainer.task.forward

    def forward(images, target):
        result = task(images, target)
        if trainer.progress.step >= 5:
            result["loss"] = result["loss"] * torch.inf
        return result

    trainer.task.forward = forward
    assert trainer.run() == EXIT_DIVERGED
    last, diverged = (torch.load(tmp_path / "run" / name, weights_only=True) for name in (CHECKPOINT, DIVERGED))
    assert diverged["bad"] == [10, 10]
    assert diverged["update"] == 15
    assert last["update"] == 12  # of the last whole epoch: its weights are still those of step 5
    assert "a lower --lr" in (tmp_path / "run" / "train.log").read_text()
    for state in (last, diverged):
        assert all(value.isfinite().all() for value in state["state_dict"].values())


def best_of(folder):
    return read_description(folder / BEST_WEIGHTS)


def change_metrics(trainer, changes):
    """Put the values that a function returns in the place of what validation comes to."""
    validate = trainer.validate

    def changed():
        metrics, predicted = validate()
        return {**metrics, **changes()}, predicted

    trainer.validate = changed


@pytest.mark.parametrize("wrong", [{"loss": torch.nan}, {"loss": torch.inf}, {"top1": torch.nan}])
def test_a_validation_that_is_not_finite_is_not_the_best(flags, tmp_path, wrong):
    """Of three epochs the second has the highest top-1, and a loss or top-1 that is no number."""
    trainer = build_trainer(parse_config([*flags, "--epochs", "3"]))
    top1s, losses = iter([10.0, 99.0, 20.0]), iter([{}, wrong, {}])
    change_metrics(trainer, lambda: {"loss": 2.0, "top1": next(top1s), **next(losses)})
    assert trainer.run() == 0
    log = (tmp_path / "run" / "train.log").read_text()
    assert re.search(r"epoch 2: not a candidate for the best weights, .* not finite \(loss \S+, top1 \S+\)\n", log)
    assert re.findall(r"best top1 ([\w.]+)", log) == ["10.00", "10.00", "20.00", "20.00"]
    assert (best_of(tmp_path / "run")["epoch"], best_of(tmp_path / "run")["top1"]) == (3, 20)
    assert torch.load(tmp_path / "run" / CHECKPOINT)["best_top1"] == 20


def test_a_run_that_was_never_finite_has_no_best_weights(flags, tmp_path, capsys):
    trainer = build_trainer(parse_config(flags))
    change_metrics(trainer, lambda: {"loss": torch.nan})
    assert trainer.run() == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"epoch [12]: not a candidate for the best weights, .* not finite \(loss nan", out)) == 2
    assert len(re.findall(r"epoch [12]: train loss [\d.]+, val loss nan, .* best top1 none\n", out)) == 2
    assert f"the run has ended: no validation was finite, so {tmp_path / 'run'} has no best weights\n" in out
    assert not (tmp_path / "run" / BEST_WEIGHTS).exists()


def test_weights_that_are_not_finite_are_refused_before_a_run(flags, tmp_path, run_main):
    assert run(*flags, "--epochs", 1, "--experiment", "whole") == 0
    weights = load_file(tmp_path / "whole" / BEST_WEIGHTS)
    weights["stages.1.downsample.norm.running_mean"].fill_(torch.nan)
    save_file(weights, tmp_path / "broken.safetensors")
    outcome = run_main(train, *flags, "--initial-checkpoint", tmp_path / "broken.safetensors")
    assert outcome.status == 2
    assert "the scores of lit_ti are not finite for blank images: its weights are broken" in outcome.err


def test_an_unreadable_image_is_replaced_and_counted(digits_copy, tmp_path, tiny_flags, capsys):
    broken = digits_copy / "train" / "3" / "00000.png"
    broken.write_bytes(b"no image")
    flags = [digits_copy, *tiny_flags, "--output", tmp_path, "--max-unreadable", 0.05]
    assert run(*flags, "--experiment", "alone") == 0
    named = rf"cannot read the image {broken} .*another image takes its place"
    assert len(re.findall(named, capsys.readouterr().out)) == 2  # once an epoch
    assert run(*flags, "--experiment", "worker", "-j", 1) == 0
    alone, worker = (torch.load(tmp_path / name / CHECKPOINT, weights_only=True) for name in ("alone", "worker"))
    for name, value in alone["state_dict"].items():
        assert torch.equal(value, worker["state_dict"][name]), name


def test_a_run_with_too_many_unreadable_images_continues_when_they_are_repaired(
    digits_copy, tmp_path, tiny_flags, run_main
):
    broken = digits_copy / "train" / "3" / "00000.png"
    content = broken.read_bytes()
    broken.write_bytes(b"no image")
    flags = [digits_copy, *tiny_flags, "--output", tmp_path, "--experiment", "run", "--resume", "auto"]
    for _ in range(2):
        outcome = run_main(train, *flags)
        assert outcome.status == 2
        assert f"cannot read the images {broken} (1 of an epoch" in outcome.err
    broken.write_bytes(content)
    assert run(*flags) == 0


@pytest.mark.parametrize("processes", [1, 2])
def test_broken_validation_images_are_all_named_and_the_trained_epoch_is_saved(
    digits_copy, tmp_path, tiny_flags, run_main, run_script, processes
):
    broken = [digits_copy / "val" / name / "00002.png" for name in "258"]
    content = [path.read_bytes() for path in broken]
    for path in broken:
        path.write_bytes(b"no image")
    flags = [digits_copy, *tiny_flags, "--output", tmp_path, "--experiment", "run", "--resume", "auto", "-b", 10]
    flags += ["--epochs", 1]
    script = partial(run_main, train) if processes == 1 else partial(run_script, "distributed_train.sh", processes)
    outcome = script(*flags)
    assert outcome.status == 2, outcome.err
    assert "error: 3 images cannot be used: " in outcome.err
    assert all(str(path) in outcome.err for path in broken)
    saved = torch.load(tmp_path / "run" / CHECKPOINT, weights_only=True)
    assert (saved["epoch"], saved["done"]) == (0, 80 // (10 * processes))
    for path, whole in zip(broken, content, strict=True):
        path.write_bytes(whole)
    outcome = script(*flags)
    assert outcome.status == 0
    assert "epoch 1: step" not in outcome.out  # it continues with the validation of the epoch that was saved
    assert len((tmp_path / "run" / "summary.csv").read_text().splitlines()) == 2


def test_a_damaged_shard_ends_the_run_which_is_saved(digits, tmp_path, tiny_flags, run_main):
    images = sorted((digits / "train").rglob("*.png"))
    for shard in range(2):
        with tarfile.open(tmp_path / f"train-{shard}.tar", "w") as tar:
            for number, image in enumerate(images[shard::2]):
                for suffix, content in (("png", image.read_bytes()), ("cls", image.parent.name.encode())):
                    info = tarfile.TarInfo(f"{number:03d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    shard = tmp_path / "train-1.tar"
    whole = shard.read_bytes()
    splits = ["--train-split", "train-{0..1}.tar", "--val-split", "train-{0..0}.tar", "--train-num-samples", 80]
    flags = [tmp_path, *tiny_flags, "--dataset", "wds/", *splits, "--num-classes", 10, "-b", 10, "--epochs", 1]
    flags += ["--output", tmp_path, "--experiment", "run", "--resume", "auto"]
    shard.write_bytes(whole[: len(whole) // 2])
    outcome = run_main(train, *flags)
    assert outcome.status == 2
    assert f"cannot read the shard {shard} (ReadError: " in outcome.err
    assert (tmp_path / "run" / CHECKPOINT).exists()
    shard.write_bytes(whole)
    assert run_main(train, *flags).status == 0


def test_an_initial_checkpoint_of_other_images_is_told(digits_copy, tmp_path, tiny_flags, run_main):
    flags = [*tiny_flags, "--output", tmp_path, "--epochs", 1]
    assert run_main(train, digits_copy, *flags, "--experiment", "first", "--exif-transpose").status == 0
    for split in ("train", "val"):
        (digits_copy / split / "0").rename(digits_copy / split / "ant")
    weights = tmp_path / "first" / BEST_WEIGHTS
    start = [digits_copy, "--initial-checkpoint", weights, "--dry-run"]
    assert "were trained with" not in run_main(train, *flags, *start).out
    out = run_main(train, *flags, *start, "--no-exif-transpose").out
    assert f"train: the classifier of {weights} starts with other classes: number 0 was 0, is 1" in out
    assert f"train: the weights of {weights} were trained with --exif-transpose" in out


def test_a_run_does_not_continue_on_other_classes(digits_copy, tmp_path, tiny_flags, run_main):
    flags = [digits_copy, *tiny_flags, "--output", tmp_path, "--experiment", "run", "--resume", "auto"]
    assert run_main(train, *flags, "--epochs", 1).status == 0
    for split in ("train", "val"):
        (digits_copy / split / "3").rename(digits_copy / split / "wolf")
    outcome = run_main(train, *flags, "--epochs", 1)
    assert outcome.status == 2
    assert "number 3 is 4, not 3" in outcome.err


def test_a_broken_image_whose_name_is_no_text_is_told_of(digits_copy, tmp_path, tiny_flags, run_script):
    for name in (os.fsdecode(b"broken\xff.jpg"), "new\nline.jpg"):
        (digits_copy / "train" / "3" / name).write_bytes(b"no image")
    (digits_copy / "train" / "3" / "notes.txt").touch()
    flags = ["--output", tmp_path, "--experiment", "run", "--max-unreadable", 0.5, "--epochs", 1, "-b", 41]
    outcome = run_script("train.py", digits_copy, *tiny_flags, *flags, PYTHONIOENCODING="utf-8:strict")
    assert outcome.status == 0, outcome.err
    for text in (outcome.out, (tmp_path / "run" / "train.log").read_text()):
        assert r"train/3/broken\xff.jpg (no format that Pillow knows): repair or replace it; another image" in text
        assert r"train/3/new\nline.jpg (no format" in text
        assert "train: left out 1 files that are not images (.txt): 3/notes.txt" in text


@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_save_that_fails_is_reported_and_the_run_goes_on(flags, tmp_path, monkeypatch, fault, capsys):
    trainer = build_trainer(parse_config([*flags, "--checkpoint-every", "1"]))
    save, folder = torch.save, tmp_path / "run"
    good = []

    def torch_save(state, path):
        if state.get("update") in (2, 3):
            if not good:
                good.append((folder / CHECKPOINT).read_bytes())
            if fault == "full":
                Path(path).write_bytes(b"half")
            raise OSError(28 if fault == "full" else 30, "No space left on device" if fault == "full" else "Read-only")
        if state.get("update") == 4 and len(good) == 1:
            good.append((folder / CHECKPOINT).read_bytes())
        return save(state, path)

    monkeypatch.setattr(torch, "save", torch_save)
    assert trainer.run() == 0
    assert good[0] == good[1]  # untouched by the saves that failed
    assert not list(folder.glob(".*.tmp"))
    assert capsys.readouterr().out.count("the run goes on, the next save tries again") == 2
    assert torch.load(folder / CHECKPOINT, weights_only=True)["update"] == 8


def test_a_signal_whose_save_fails_does_not_claim_to_be_saved(flags, tmp_path, monkeypatch, capsys):
    trainer = build_trainer(parse_config(flags))
    step = trainer.guard.step

    def step_and_signal(loss):
        loss = step(loss)
        os.kill(os.getpid(), signal.SIGTERM)
        return loss

    def full(*args):
        raise OSError(28, "No space left on device")

    trainer.guard.step = step_and_signal
    monkeypatch.setattr(torch, "save", full)
    assert trainer.run() == EXIT_INTERRUPTED
    assert "SIGTERM: NOT saved" in capsys.readouterr().out
    monkeypatch.undo()
    assert run(*flags, "--resume", "auto") == 0


def test_a_run_whose_end_is_not_saved_says_so(flags, tmp_path, monkeypatch, undisturbed, capsys, assert_same_weights):
    save = torch.save

    def full_at_the_end(state, path):
        if state.get("update") == 8:
            raise OSError(28, "No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", full_at_the_end)
    assert run(*flags) == EXIT_INTERRUPTED
    assert "its end is NOT saved" in capsys.readouterr().out
    monkeypatch.undo()
    assert run(*flags, "--resume", "auto") == 0
    assert_same_weights(tmp_path / "run", undisturbed)


def test_two_processes_cannot_train_in_one_folder(flags, tmp_path, run_main):
    (tmp_path / "run").mkdir()
    code = "import fcntl, sys; lock = open(sys.argv[1], 'w'); fcntl.lockf(lock, fcntl.LOCK_EX)"
    command = [sys.executable, "-c", f"{code}; print('locked', flush=True); input()", str(tmp_path / "run" / ".lock")]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    outcome = run_main(train, *flags)
    other.communicate("\n")
    assert outcome.status == 2
    assert "another process trains in" in outcome.err
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock"}


def test_a_run_that_was_killed_before_its_first_checkpoint_continues(
    flags, tmp_path, undisturbed, run_main, assert_same_weights
):
    def killed(report):
        raise RuntimeError("killed")

    trainer = build_trainer(parse_config(flags))
    trainer.run_epoch = killed
    with pytest.raises(RuntimeError, match="killed"):
        trainer.run()
    assert run_main(train, *flags).status == 2  # its settings are not overwritten
    assert run(flags[0], "--resume", tmp_path / "run") == 0
    assert_same_weights(tmp_path / "run", undisturbed)


def test_logs_never_stop_a_run(flags, tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("litvit.runs.summary.replace_file", full)
    monkeypatch.setattr("litvit.runs.report.replace_file", full)
    monkeypatch.setattr("litvit.runs.loggers.SummaryWriter.add_scalar", full)
    assert run(*flags) == 0
    out = capsys.readouterr().out
    assert "cannot write logs: OSError: [Errno 28] No space left on device; the run goes on" in out
    assert out.count("--logger tensorboard fails: OSError: [Errno 28] No space left on device; the run goes on") == 1
    assert torch.load(tmp_path / "run" / CHECKPOINT, weights_only=True)["update"] == 8


def test_what_the_page_shows_never_stops_a_run(flags, tmp_path, monkeypatch, capsys, undisturbed, assert_same_weights):
    """Neither a picture nor a model of the user's that cannot do what the page asks of it."""

    def fail(*args):
        raise AttributeError("no such thing")

    monkeypatch.setattr("litvit.training.showing.picture", fail)
    monkeypatch.setattr("litvit.training.trainer.predict_offsets", fail)
    assert run(*flags) == 0
    out = capsys.readouterr().out
    assert "cannot write logs: AttributeError: no such thing; the run goes on" in out
    assert "the offsets of token merging cannot be measured: AttributeError: no such thing" in out
    assert_same_weights(tmp_path / "run", undisturbed)
    assert {"best_validation.json", "first_batch.json"} & {path.name for path in (tmp_path / "run").iterdir()} == set()
    assert "Gradient norm" in (tmp_path / "run" / PAGE).read_text()


def test_a_folder_in_the_place_of_the_page_is_left_alone(flags, tmp_path, capsys):
    (tmp_path / "run" / PAGE / "mine").mkdir(parents=True)
    assert run(*flags, "--epochs", 1) == 0
    assert "cannot write logs: IsADirectoryError" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "run" / PAGE).iterdir()] == ["mine"]
    assert rows(tmp_path / "run")


def rows(folder):
    return list(csv.DictReader((folder / "summary.csv").read_text().splitlines()))


@pytest.mark.parametrize("first", [0, 1])
def test_epochs_are_counted_from_1_also_where_an_older_run_began_with_0(flags, tmp_path, first):
    cut = build_trainer(parse_config([*flags, "--epochs", "3"]))
    cut.epochs = 2
    assert cut.run() == 0
    file = tmp_path / "run" / "summary.csv"
    assert [row["epoch"] for row in rows(tmp_path / "run")] == ["1", "2"]
    losses = [row["train_loss"] for row in rows(tmp_path / "run")]
    header, *lines = file.read_text().splitlines()
    lines.append(lines[1].replace("2,", "3,", 1))  # of an epoch that was killed before it was saved
    lines = [f"{number},{line.partition(',')[2]}" for number, line in enumerate(lines, first)]
    file.write_text("\n".join([header, *lines, ""]))
    assert run(flags[0], "--resume", tmp_path / "run") == 0
    assert [row["epoch"] for row in rows(tmp_path / "run")] == ["1", "2", "3"]
    assert [row["train_loss"] for row in rows(tmp_path / "run")][:2] == losses
    logged = re.findall(r"epoch (\d+): train loss ([\d.]+)", (tmp_path / "run" / "train.log").read_text())
    assert logged == [(row["epoch"], f"{float(row['train_loss']):.4f}") for row in rows(tmp_path / "run")]


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"epoch,loss\nfirst,2\n", b"epoch\n0\nx\n", b"\0"])
def test_a_damaged_summary_does_not_end_the_run(flags, tmp_path, damage):
    cut = build_trainer(parse_config(flags))
    cut.epochs = 1
    assert cut.run() == 0
    (tmp_path / "run" / "summary.csv").write_bytes(damage)
    assert run(flags[0], "--resume", tmp_path / "run") == 0
    assert [row["epoch"] for row in rows(tmp_path / "run")] == ["2"]
    assert (tmp_path / "run" / "summary.csv.damaged").read_bytes() == damage


def test_every_start_is_recorded(flags, tmp_path, capsys):
    """One that trains nothing is no start."""
    trainer = build_trainer(parse_config(flags))
    at_step(trainer, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert trainer.run() == EXIT_INTERRUPTED
    assert run(flags[0], "--resume", tmp_path / "run") == 0
    assert run(flags[0], "--resume", tmp_path / "run") == 0
    starts = yaml.safe_load((tmp_path / "run" / "starts.yaml").read_text())
    assert [start["step"] for start in starts] == [0, 6]
    assert all(start["versions"]["timm"] and start["hardware"]["cpu"] and start["command"] for start in starts)


@pytest.mark.parametrize("damage", [b"\xff", b"- [", b""])
def test_a_damaged_record_of_starts_does_not_end_the_run(flags, tmp_path, damage):
    assert run(*flags, "--epochs", 1) == 0
    (tmp_path / "run" / "starts.yaml").write_bytes(damage)
    assert run(flags[0], "--resume", tmp_path / "run", "--epochs", 2) == 0
    assert (tmp_path / "run" / "starts.yaml").read_bytes().startswith(damage)
    assert "2 of 2 epochs" in (tmp_path / "run" / PAGE).read_text()


def test_slow_steps_have_a_line_before_the_log_interval(flags, tmp_path, monkeypatch):
    """After 10, 20, 40 ... seconds, here a hundredth of them."""
    monkeypatch.setattr("litvit.runs.report.FIRST_LINE", 0.1)
    trainer = build_trainer(parse_config([*flags, "--log-interval", "50", "--epochs", "1", "-b", "4"]))
    forward_backward = trainer.forward_backward
    monkeypatch.setattr(trainer, "forward_backward", lambda *args: (time.sleep(0.11), forward_backward(*args))[1])
    assert trainer.run() == 0
    log = (tmp_path / "run" / "train.log").read_text()
    steps = [int(step) for step in re.findall(r"epoch 1: step (\d+)/20, loss [\d.]+", log)]
    assert steps[0] == 1
    assert steps[-1] == 20
    assert 3 <= len(steps) <= 7  # not all of them


def test_a_first_step_that_takes_long_has_a_line_too(flags, tmp_path, monkeypatch):
    monkeypatch.setattr("litvit.runs.report.NO_LINE", 0.2)
    trainer = build_trainer(parse_config([*flags, "--epochs", "1"]))
    at_step(trainer, 1, lambda: time.sleep(0.5))
    assert trainer.run() == 0
    log = (tmp_path / "run" / "train.log").read_text()
    assert log.count(" after 0 s\n") == 1
    assert "epoch 1: step 0/4 after 0 s\n" in log


def test_steps_that_are_fast_have_lines_as_asked_for(flags, tmp_path):
    assert run(*flags, "--epochs", 1, "--log-interval", 2) == 0
    log = (tmp_path / "run" / "train.log").read_text()
    assert re.findall(r"epoch 1: step (\d+)/4", log) == ["2", "4"]


def at_step(trainer, number, act):
    """Let a trainer call a function after an optimizer step."""
    step = trainer.guard.step

    def step_and_act(loss):
        loss = step(loss)
        if trainer.progress.step + 1 == number:
            act()
        return loss

    trainer.guard.step = step_and_act


@pytest.mark.parametrize("accum_steps", [1, 2])
def test_a_killed_loader_process_ends_the_run_which_is_saved(
    flags, tmp_path, undisturbed, assert_same_weights, capsys, accum_steps
):
    """Also in the midst of a step's micro-batches, whose part of BatchNorm's statistics is taken back."""
    flags = [*flags, "-j", "1", "-b", str(20 // accum_steps), "--grad-accum-steps", str(accum_steps)]
    trainer = build_trainer(parse_config(flags))
    loader, forward_backward = trainer.train_batches.loader, trainer.forward_backward
    before = {}

    def kill_the_loader(batch, index, last_of_step):
        if trainer.progress.step == 2 and index % accum_steps == 0:
            before.update(
                {name: value.clone() for name, value in trainer.task.get_trainable_module().state_dict().items()}
            )
            (process,) = loader._iterator._workers
            process.kill()
            process.join()
        return forward_backward(batch, index, last_of_step)

    trainer.forward_backward = kill_the_loader
    assert trainer.run() == EXIT_INTERRUPTED
    out = capsys.readouterr().out
    assert re.search(r"a loader process was killed.*: saved at step (\d) of epoch 1; --resume", out)
    saved = torch.load(tmp_path / "run" / CHECKPOINT, weights_only=True)
    if accum_steps == 2 and saved["update"] == 2:
        for name, value in saved["state_dict"].items():
            assert torch.equal(value, before[name]), name
    assert run(*flags, "--resume", "auto") == 0
    if accum_steps == 1:
        assert_same_weights(tmp_path / "run", undisturbed)
    else:
        assert run(*flags, "--experiment", "whole") == 0
        assert_same_weights(tmp_path / "run", tmp_path / "whole")


def test_a_read_that_hangs_does_not_keep_a_signal_waiting(
    digits_copy, tmp_path, flags, undisturbed, assert_same_weights, capsys
):
    flags = [str(digits_copy), *flags[1:], "-j", "1"]
    images = {path: path.read_bytes() for path in (digits_copy / "train").rglob("*.png")}
    trainer = build_trainer(parse_config(flags))

    def hang():
        for path in images:
            path.unlink()
            os.mkfifo(path)
        Timer(3, os.kill, (os.getpid(), signal.SIGHUP)).start()

    at_step(trainer, 2, hang)
    start = time.monotonic()
    assert trainer.run() == EXIT_INTERRUPTED
    assert time.monotonic() - start < 30
    assert re.search(r"SIGHUP: saved at step \d of epoch \d; --resume", capsys.readouterr().out)
    for path, content in images.items():
        path.unlink()
        path.write_bytes(content)
    assert run(*flags, "--resume", "auto") == 0
    assert_same_weights(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_folder_that_is_gone_ends_the_run_which_is_saved(
    digits_copy, tmp_path, flags, undisturbed, assert_same_weights, run_main, workers, monkeypatch
):
    flags = [digits_copy, *flags[1:], "-j", workers]
    trainer = build_trainer(parse_config([str(flag) for flag in flags]))
    at_step(trainer, 3, lambda: digits_copy.rename(tmp_path / "away"))
    with pytest.raises(InputError, match=f"{digits_copy}.*repair or replace"):
        trainer.run()
    assert torch.load(tmp_path / "run" / CHECKPOINT, weights_only=True)["update"] >= 3
    (tmp_path / "away").rename(digits_copy)
    assert run(*flags, "--resume", "auto") == 0
    assert_same_weights(tmp_path / "run", undisturbed)


def test_best_weights_that_are_not_saved_are_tried_again(flags, tmp_path, monkeypatch, capsys):
    """Those of the first epoch, although the second one is worse."""
    trainer = build_trainer(parse_config([*flags, "--epochs", "3"]))
    top1s = iter([30.0, 10.0, 20.0])
    change_metrics(trainer, lambda: {"top1": next(top1s)})
    write, failures = safetensors.torch.save_file, iter([True])

    def full_once(*args, **kwargs):
        if next(failures, False):
            raise OSError(28, "No space left on device")
        write(*args, **kwargs)

    monkeypatch.setattr("safetensors.torch.save_file", full_once)
    assert trainer.run() == 0
    assert best_of(tmp_path / "run")["epoch"] == 1
    log = (tmp_path / "run" / "train.log").read_text()
    assert re.findall(r"best top1 ([\w.]+)", log) == ["none", "30.00", "30.00", "30.00"]


def test_an_end_without_best_weights_does_not_claim_them(flags, tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    assert run(*flags) == EXIT_INTERRUPTED
    assert re.search(
        r"the run has ended, but its best weights, of epoch \d, top1 [\d.]+, are NOT saved", capsys.readouterr().out
    )
    monkeypatch.undo()
    assert run(*flags, "--resume", "auto", "--epochs", 3) == 0
    assert best_of(tmp_path / "run")["epoch"] == 3  # the best that there are
    (tmp_path / "run" / BEST_WEIGHTS).unlink()
    assert run(*flags, "--resume", "auto", "--epochs", 3) == 0
    assert "its best weights are gone" in capsys.readouterr().out


def test_weights_that_became_infinite_are_not_the_best(flags, tmp_path):
    """Their validation may be finite."""
    trainer = build_trainer(parse_config(flags))
    validate = trainer.validate

    def spoil():
        metrics, predicted = validate()
        if trainer.progress.epoch == 1:
            trainer.task.get_eval_model(ema=True).module.head.bias.data[0] = -torch.inf
        return {**metrics, "top1": 100.0 * trainer.progress.epoch}, predicted

    trainer.validate = spoil
    assert trainer.run() == EXIT_DIVERGED
    assert best_of(tmp_path / "run")["epoch"] == 1
    assert (
        "not a candidate for the best weights, its weights are not finite"
        in (tmp_path / "run" / "train.log").read_text()
    )


@pytest.mark.parametrize(("part", "value"), [("weights", torch.nan), ("average", torch.inf)])
@pytest.mark.parametrize("moment", ["end of an epoch", "checkpoint in time", "signal"])
def test_weights_that_are_not_finite_do_not_become_the_checkpoint(flags, tmp_path, part, value, moment):
    """After the first epoch, in step 6 of 8, they are spoilt: too late for the guard to notice by itself."""
    every = ["--checkpoint-every", "7"] if moment == "checkpoint in time" else []
    trainer = build_trainer(parse_config([*flags, *every]))

    def spoil():
        model = trainer.task.get_eval_model(ema=part == "average")
        getattr(model, "module", model).head.bias.data[0] = value
        if moment == "signal":
            os.kill(os.getpid(), signal.SIGTERM)

    at_step(trainer, 6, spoil)
    assert trainer.run() == EXIT_DIVERGED
    folder = tmp_path / "run"
    log = (folder / "train.log").read_text()
    assert "the weights are not finite, up to step" in log
    assert f"the state is in {folder / DIVERGED}" in log
    assert load_checkpoint(folder / DIVERGED)["update"] == {"signal": 6, "checkpoint in time": 7}.get(moment, 8)
    assert load_checkpoint(folder / CHECKPOINT)["update"] == 4
    assert best_of(folder)["epoch"] == 1
    assert run(*flags, "--resume", "auto") == 0  # from the last good weights


def test_an_output_folder_that_is_deleted_is_made_again(flags, tmp_path, undisturbed, assert_same_weights, capsys):
    folder = tmp_path / "run"
    trainer = build_trainer(parse_config(flags))
    at_step(trainer, 6, lambda: shutil.rmtree(folder))
    assert trainer.run() == 0
    assert f"{folder} was deleted: it is made again, without its old files" in capsys.readouterr().out
    assert_same_weights(folder, undisturbed)
    assert {"settings.yaml", "summary.csv", "train.log", "tensorboard", BEST_WEIGHTS} <= {
        p.name for p in folder.iterdir()
    }
    assert "the run has ended" in (folder / "train.log").read_text()
    assert run(*flags, "--resume", "auto", "--epochs", 3) == 0


def test_a_log_that_is_a_folder_is_refused(flags, tmp_path, run_main):
    (tmp_path / "run" / "train.log").mkdir(parents=True)
    outcome = run_main(train, *flags)
    assert outcome.status == 2
    assert f"{tmp_path / 'run' / 'train.log'} is a folder, and the run writes a file there: move it away" in outcome.err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["train.log"]


def test_closed_standard_streams(flags, tmp_path):
    """The files of the run must not take their places."""
    command = shlex.join([sys.executable, str(CLASSIFICATION / "train.py"), *flags])
    assert subprocess.run(["bash", "-c", f"exec {command} <&- >&- 2>&-"]).returncode == 0
    assert load_checkpoint(tmp_path / "run" / CHECKPOINT)["update"] == 8


def test_a_terminal_that_is_closed(flags, tmp_path):
    terminal, end = pty.openpty()
    command = [sys.executable, str(CLASSIFICATION / "train.py"), *flags, "--epochs", "500"]

    def take_terminal():
        os.setsid()
        fcntl.ioctl(end, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(command, stdin=end, stdout=end, stderr=end, preexec_fn=take_terminal)
    os.close(end)
    text = b""
    while b"epoch 2: train loss" not in text:
        text += os.read(terminal, 4096)
    os.close(terminal)
    assert process.wait(timeout=60) == EXIT_INTERRUPTED
    assert "SIGHUP: saved at step" in (tmp_path / "run" / "train.log").read_text()


def test_nohup_is_respected(flags, tmp_path):
    command = ["nohup", sys.executable, str(CLASSIFICATION / "train.py"), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in process.stdout:
        if "step 2/" in line:
            process.send_signal(signal.SIGHUP)
    assert process.wait() == 0


@pytest.fixture
def own_flags(digits, tmp_path, random_flags):
    """A run that splits its images, freezes a stage, weighs classes and stops early."""
    own = "--val-fraction 0.25 --freeze 1 --class-weights balanced --epochs 6 --patience 1 --seed 3 --exif-transpose"
    return [str(digits / "train"), *random_flags, *own.split(), "--aug-repeats", "0", "--output", str(tmp_path)]


def test_a_run_on_data_of_ones_own_resumes_exactly(own_flags, tmp_path, assert_same_weights, capsys):
    assert run(*own_flags, "--experiment", "whole") == 0
    assert "--patience 1 (a larger one continues it)" in capsys.readouterr().out
    whole = torch.load(tmp_path / "whole" / CHECKPOINT, weights_only=True)
    assert 1 < whole["epoch"] < 6
    trainer = build_trainer(parse_config([*own_flags, "--experiment", "cut"]))
    step = trainer.guard.step

    def step_and_signal(loss):
        loss = step(loss)
        if trainer.progress.step + 1 == 3 * whole["epoch"] - 1:  # after the epoch that patience counts from
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    trainer.guard.step = step_and_signal
    assert trainer.run() == EXIT_INTERRUPTED
    assert run(*own_flags, "--experiment", "cut", "--resume", "auto") == 0
    assert_same_weights(tmp_path / "cut", tmp_path / "whole")
    cut = torch.load(tmp_path / "cut" / CHECKPOINT, weights_only=True)
    for name in ("epoch", "best_top1", "best_epoch", "description"):
        assert cut[name] == whole[name]
    assert len(cut["description"]["held_out"]) == 20
    capsys.readouterr()
    assert run(*own_flags, "--experiment", "cut", "--resume", "auto") == 0
    assert "this run has ended already" in capsys.readouterr().out
    assert run(*own_flags, "--experiment", "cut", "--resume", "auto", "--patience", 6) == 0
    assert torch.load(tmp_path / "cut" / CHECKPOINT, weights_only=True)["epoch"] == 6


def test_frozen_stages_do_not_change(own_flags, tmp_path):
    trainer = build_trainer(parse_config([*own_flags, "--experiment", "run", "--epochs", "1"]))
    before = {name: value.clone() for name, value in trainer.task.trainable_module.state_dict().items()}
    assert trainer.run() == 0
    after = torch.load(tmp_path / "run" / CHECKPOINT, weights_only=True)["state_dict"]
    for name, value in before.items():
        if name.startswith(("patch_embed", "stages.0")):
            assert torch.equal(value, after[name]), name
    assert not torch.equal(before["stages.1.blocks.0.mlp.fc1.weight"], after["stages.1.blocks.0.mlp.fc1.weight"])


def test_a_run_whose_held_out_images_have_changed_is_not_continued(own_flags, digits_copy):
    flags = [str(digits_copy / "train"), *own_flags[1:], "--experiment", "run", "--epochs", "1"]
    assert run(*flags) == 0
    held = read_description(Path(flags[flags.index("--output") + 1]) / "run" / BEST_WEIGHTS)["held_out"][0]
    image = digits_copy / "train" / held
    image.rename(image.with_name("renamed.png"))
    with pytest.raises(InputError, match="validates on other images"):
        run(*flags, "--resume", "auto", "--epochs", "2")
