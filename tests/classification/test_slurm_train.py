"""slurm_train.sh under a stand-in for Slurm: warned, preempted, cancelled, on one node and on two."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import train

from litvit.processes import EXIT_INTERRUPTED

CLASSIFICATION = Path(train.__file__).parent
# Images from a slow disk: a run of half a second takes a few.
SLOW_DISK = """
import time
from PIL import Image

open_image = Image.open


def slowly(*arguments, **settings):
    time.sleep(0.03)
    return open_image(*arguments, **settings)


Image.open = slowly
"""
# What slurm_train.sh starts on each node, in the tests that train nothing.
LAUNCHER = """
trap 'echo saved; exit 75' TERM USR1
echo "processes $1, data $2, node $NODE_RANK of $NNODES, $MASTER_ADDR, cores $(env -u OMP_NUM_THREADS nproc)"
while [[ $2 == endless && -z ${SLURM_RESTART_COUNT:-} ]]; do sleep 0.1; done
"""


def wait_for(condition, seconds=90):
    """Wait until a function returns something true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ask(*command):
    """Give a command of Slurm."""
    subprocess.run(command, check=True)


@pytest.fixture
def submit(slurm, tmp_path):
    """A function that submits slurm_train.sh, and returns the process that waits for the job, and its output so far."""

    def start(*arguments, options=(), folder=CLASSIFICATION):
        log = tmp_path / "job.out"
        command = ["sbatch", "--wait", "--output", log, *options, CLASSIFICATION / "slurm_train.sh", *arguments]
        process = subprocess.Popen(list(map(str, command)), cwd=folder)
        return process, lambda: log.read_text() if log.exists() else ""

    return start


@pytest.fixture
def slow_flags(flags, tmp_path, monkeypatch):
    """`flags` with images from a slow disk."""
    (tmp_path / "slow_disk.py").write_text(SLOW_DISK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    return [*flags, "--import", "slow_disk"]


@pytest.fixture
def launcher(tmp_path, monkeypatch):
    """LAUNCHER in place of distributed_train.sh."""
    shutil.copytree(CLASSIFICATION / "tools", tmp_path / "classification/tools")
    (tmp_path / "classification/distributed_train.sh").write_text(LAUNCHER)
    monkeypatch.setenv("LIT_HOME", str(tmp_path / "classification"))


def test_warned_and_preempted_the_job_queues_again(submit, slow_flags, tmp_path, undisturbed, assert_same_weights):
    """Warned before its time limit, and preempted, which signals the steps alone."""
    job, output = submit(*slow_flags, options=["--time", "60"])
    wait_for(lambda: "step 2/" in output())
    ask("scontrol", "update", "JobId=1", "TimeLimit=2")  # the warning comes 2 minutes before
    wait_for(lambda: ": saved at step" in output())
    ask("scontrol", "update", "JobId=1", "TimeLimit=60")
    wait_for(lambda: "step 5/" in output())
    ask("scancel", "--signal=TERM", "1")
    assert job.wait(120) == 0, output()
    assert output().count("interrupted: the job queues itself again") == 2
    assert output().count("continuing at epoch") == 2
    assert_same_weights(tmp_path / "run", undisturbed)


def test_two_nodes_save_and_continue(submit, slow_flags, tmp_path, undisturbed_pair, assert_same_weights, monkeypatch):
    """Also where a signal reaches all processes of a step."""
    monkeypatch.setenv("SIGNAL_CHILDREN", "yes")
    job, output = submit(*slow_flags, "-b", "10", options=["--nodes", "2"])
    wait_for(lambda: "step 2/" in output())
    ask("scancel", "--signal=TERM", "--batch", "1")
    assert job.wait(120) == 0, output()
    assert "interrupted: the job queues itself again" in output()
    assert_same_weights(tmp_path / "run", undisturbed_pair)


@pytest.mark.parametrize("number", ["TERM", "USR1"])
def test_a_signal_before_the_step_has_begun(submit, launcher, tmp_path, number):
    job, output = submit("endless")
    shell = tmp_path / "slurm/jobs/1/shell"
    wait_for(shell.exists)
    wait_for(
        lambda: (
            not subprocess.run(["pgrep", "-P", shell.read_text(), "-f", "srun"], stdout=subprocess.DEVNULL).returncode
        )
    )
    ask("scancel", f"--signal={number}", "--batch", "1")
    assert job.wait(60) == 0, output()
    assert "interrupted: the job queues itself again" in output()


@pytest.mark.parametrize("end", ["cancelled", "not to be queued again"])
def test_a_job_that_does_not_come_back(submit, launcher, end):
    job, output = submit("endless", options=["--no-requeue"] if end != "cancelled" else [])
    wait_for(lambda: "data endless" in output())
    ask("scancel", *(["--signal=USR1", "--batch"] if end != "cancelled" else []), "1")
    assert job.wait(60) == EXIT_INTERRUPTED
    assert "interrupted: the same command continues" in output()
    assert "queues itself" not in output()


def test_nodes_gpus_and_cores(submit, launcher):
    job, output = submit("with space", options=["--nodes", "2", "--gpus-per-node", "4", "--cpus-per-task", "2"])
    assert job.wait(60) == 0
    cores = min(2, len(os.sched_getaffinity(0)))
    assert sorted(output().splitlines()) == [
        f"processes 4, data with space, node {node} of 2, 127.0.0.1, cores {cores}" for node in (0, 1)
    ]


def test_submitted_from_another_folder(submit, tmp_path):
    job, output = submit("data", folder=tmp_path)
    assert job.wait(60) == 2
    message = f"error: no distributed_train.sh in {tmp_path}: submit from classification/, or set LIT_HOME to it"
    assert output().splitlines() == [message]


def test_not_submitted(run_script, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    done = run_script("slurm_train.sh", "data")
    assert done.status == 2
    assert done.err == "error: not in a Slurm job: submit this script with sbatch\n"
