"""slurm_train.sh under a stand-in for Slurm: warned, requeued, preempted, on one node and on two."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import train

CLASSIFICATION = Path(train.__file__).parent
LAUNCHER = """#!/usr/bin/env bash
echo "$1 processes for $2 on node $NODE_RANK of $NNODES, $MASTER_ADDR:$MASTER_PORT, $(nproc) cores"
"""


def wait_for(condition, seconds=90):
    """Wait until a function returns something true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def submit(slurm, tmp_path):
    """A function that submits slurm_train.sh, and returns the process that waits for the job, and its output so far."""

    def start(*arguments, folder=CLASSIFICATION):
        log = tmp_path / "job.out"
        command = ["sbatch", "--wait", "--output", log, *arguments]
        process = subprocess.Popen(list(map(str, command)), cwd=folder, stderr=subprocess.PIPE, text=True)
        return process, lambda: log.read_text() if log.exists() else ""

    return start


@pytest.mark.parametrize("nodes", [1, 2])
def test_warned_before_the_time_limit_the_job_queues_again(
    submit, flags, tmp_path, nodes, request, assert_same_weights
):
    expected = request.getfixturevalue("undisturbed" if nodes == 1 else "undisturbed_pair")
    flags += ["-b", str(20 // nodes)]
    job, output = submit("--nodes", nodes, "--time", "60", CLASSIFICATION / "slurm_train.sh", *flags)
    wait_for(lambda: "step 2/" in output())
    subprocess.run(["scontrol", "update", "JobId=1", "TimeLimit=2"], check=True)  # the warning comes 2 minutes before
    wait_for(lambda: "SIGUSR1: saved at step" in output())
    subprocess.run(["scontrol", "update", "JobId=1", "TimeLimit=60"], check=True)
    assert job.wait(120) == 0, output()
    assert "the job queues itself again" in output()
    assert "continuing at epoch" in output()
    assert_same_weights(tmp_path / "run", expected)
