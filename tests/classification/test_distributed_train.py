"""distributed_train.sh: two processes that save, leave, die and continue together."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import train

from litvit.processes import EXIT_INTERRUPTED
from litvit.runs.folder import CHECKPOINT

CLASSIFICATION = Path(train.__file__).parent


def rank_of(process):
    """RANK of a process that torchrun started, None for others and for those that are gone."""
    try:
        variables = (process / "environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((int(v.removeprefix(b"RANK=")) for v in variables if v.startswith(b"RANK=")), None)


def cmdline(process):
    """Command line of a process, empty for one that is gone."""
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def kill_rank(rank, folder):
    """Kill -9 the trainer process of that rank whose run is in the folder."""
    for process in Path("/proc").glob("[0-9]*"):
        if rank_of(process) == rank and str(folder).encode() in cmdline(process):
            os.kill(int(process.name), signal.SIGKILL)
            return
    pytest.fail(f"no process of rank {rank}")


def start_pair(*flags, **environment):
    """Start distributed_train.sh with two processes."""
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    command = ["bash", str(CLASSIFICATION / "distributed_train.sh"), "2", *flags, "-b", "10"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def launch(flags):
    """Start distributed_train.sh with two processes, and read its output to a line that holds a text."""

    def start(*more, until="step 3/", **environment):
        process = start_pair(*flags, *more, **environment)
        for line in process.stdout:
            if until in line:
                return process
        pytest.fail(process.stderr.read())

    return start


def test_a_killed_process_is_started_again_and_the_weights_are_the_same(
    launch, tmp_path, assert_same_weights, undisturbed_pair
):
    """Also where a cleaner of temporary files has been at work."""
    (tmp_path / "tmp").mkdir()
    process = launch("--checkpoint-every", "1", MAX_RESTARTS="1", TMPDIR=str(tmp_path / "tmp"))
    for path in (tmp_path / "tmp").iterdir():
        path.unlink() if path.is_file() else shutil.rmtree(path)
    kill_rank(1, tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "continuing at epoch" in out
    assert_same_weights(tmp_path / "run", undisturbed_pair)


def test_torchrun_and_the_console_command_give_the_same_weights(flags, tmp_path, assert_same_weights, undisturbed_pair):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(CLASSIFICATION), "OMP_NUM_THREADS": "1"}
    command = [*torchrun, "-m", "litvit", "train", *flags, "-b", "10"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert_same_weights(tmp_path / "run", undisturbed_pair)


def test_a_dead_process_ends_the_others_and_is_named(launch, tmp_path):
    process = launch("--epochs", "500", MAX_RESTARTS="0")
    kill_rank(1, tmp_path)
    killed = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - killed < 60
    assert process.returncode not in (0, EXIT_INTERRUPTED)
    assert re.search(r"rank\s*: 1 \(local_rank: 1\)\s*\n\s*exitcode\s*: -9", err), err


def test_sigterm_to_the_launcher_while_workers_start_up_is_not_lost(flags, tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(CLASSIFICATION / "distributed_train.sh"), "2", *flags, "-b", "10", "--epochs", "500"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    children = set()
    while 1 not in {rank_of(entry) for entry in children}:  # of this run: other tests have launchers, too
        assert process.poll() is None
        children = {entry for entry in Path("/proc").glob("[0-9]*") if str(tmp_path).encode() in cmdline(entry)}
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=180)
    assert process.returncode == EXIT_INTERRUPTED, err


@pytest.mark.parametrize("moment", ["start-up", "training"])
def test_killed_launcher_takes_its_workers_along(launch, flags, tmp_path, moment):
    if moment == "training":
        process = launch("--epochs", "500")
    else:
        command = ["bash", str(CLASSIFICATION / "distributed_train.sh"), "2", *flags, "-b", "10", "--epochs", "500"]
        environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, env=environment, **pipes)
        children = set()
        while 1 not in {rank_of(entry) for entry in children}:  # workers that have only just begun
            assert process.poll() is None
            children = {entry for entry in Path("/proc").glob("[0-9]*") if str(tmp_path).encode() in cmdline(entry)}
    torchrun = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    for pid in (process.pid, *map(int, torchrun)):
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=180)  # the pipes close when the last of them is gone
    assert not any(str(tmp_path).encode() in cmdline(entry) for entry in Path("/proc").glob("[0-9]*"))


def test_a_signal_to_the_launcher_alone_saves_and_exits_with_75(launch, tmp_path):
    """Also where its file of the exit status is gone."""
    (tmp_path / "tmp").mkdir()
    process = launch("--epochs", "500", TMPDIR=str(tmp_path / "tmp"))
    for path in (tmp_path / "tmp").glob("tmp.*"):
        path.unlink()
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=60)
    assert process.returncode == EXIT_INTERRUPTED, err
    assert (tmp_path / "run" / CHECKPOINT).is_file()


def test_a_process_whose_loader_hangs_leaves_with_the_others(
    launch, digits_copy, flags, tmp_path, assert_same_weights, undisturbed_pair
):
    """The images of the second epoch are files that nobody writes, some for one process and some for the other."""
    flags[0] = str(digits_copy)
    images = {path: path.read_bytes() for path in sorted((digits_copy / "train").rglob("*.png"))[:5]}
    process = launch("-j", "1", until="step 2/")
    for path in images:
        path.unlink()
        os.mkfifo(path)
    time.sleep(5)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == EXIT_INTERRUPTED, err
    assert "SIGTERM: saved at step" in out
    for path, content in images.items():
        path.unlink()
        path.write_bytes(content)
    process = launch("-j", "1", until="the run has ended")
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert_same_weights(tmp_path / "run", undisturbed_pair)


def test_both_processes_hold_out_the_same_images_and_end_together(digits, tmp_path, tiny_flags, run_script):
    own = ["--val-fraction", 0.25, "-b", 10, "--epochs", 9, "--patience", 1, "--lr", 0, "--min-lr", 0]
    flags = [digits / "train", *tiny_flags, *own, "--output", tmp_path, "--experiment", "run"]
    outcome = run_script("distributed_train.sh", 2, *flags)
    assert outcome.status == 0, outcome.err
    assert "60 + 20 images, total batch 20, 3 steps per epoch, 9 epochs" in outcome.out
    assert "no better top1 since epoch" in outcome.out
    assert len((tmp_path / "run/summary.csv").read_text().splitlines()) < 10
