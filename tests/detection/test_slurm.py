"""The slurm_*.sh scripts under a stand-in for Slurm: warned, interrupted, requeued.

tests/segmentation/test_tools.py trains and tests a real model with them.
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from litvit.processes import EXIT_CTRL_C, EXIT_INTERRUPTED

ROOT = Path(__file__).parents[2]
# In place of train.py: it saves when it is told to stop, the first process last.
TRAIN = """
import os
import signal
import sys
import time


def stop(number, frame):
    time.sleep(1 - int(os.environ["RANK"]))
    os.write(1, f"saved {os.environ['RANK']}\\n".encode())  # at once: two tasks write
    sys.exit(75)


signal.signal(signal.SIGUSR1, stop)
names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"
line = " ".join(["begun", *(os.environ[name] for name in names), *sys.argv[1:]])
os.write(1, f"{line}\\n".encode())
time.sleep(60 if "SLURM_RESTART_COUNT" not in os.environ else 0)
"""


@pytest.fixture
def tools(slurm, tmp_path, monkeypatch):
    """detection/tools with TRAIN as train.py, for two tasks."""
    shutil.copytree(ROOT / "classification/tools", tmp_path / "classification/tools")
    folder = shutil.copytree(ROOT / "detection/tools", tmp_path / "detection/tools")
    (folder / "train.py").write_text(TRAIN)
    monkeypatch.setenv("GPUS", "2")
    monkeypatch.setenv("CPUS_PER_TASK", "1")
    return folder


@pytest.fixture
def start(tools, tmp_path):
    """A function that starts slurm_train.sh as in a terminal, and returns the process when both tasks have begun."""

    def run(*flags):
        log = tmp_path / "out"
        command = ["bash", tools / "slurm_train.sh", "partition", "name", "config.py", "folder of run", *flags]
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
        wait_for(lambda: log.read_text().count("begun") == 2)
        return process, log.read_text

    return run


def wait_for(condition, seconds=60):
    """Wait until a function returns something true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
def test_signals_reach_the_tasks(start, number):
    """Ctrl-C as a terminal sends it, to srun too."""
    process, output = start()
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    assert process.wait(60) == EXIT_INTERRUPTED
    for rank in "01":
        arguments = "config.py --work-dir folder of run --launcher pytorch"
        assert f"begun {rank} {rank} 2 127.0.0.1 {arguments}" in output()
        assert f"saved {rank}" in output()
    assert "interrupted: the same command with --resume continues" in output()


def test_a_second_ctrl_c_does_not_wait(start):
    process, output = start()
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == EXIT_CTRL_C
    assert "saved 0" not in output()


def test_warned_before_the_time_limit(start, monkeypatch):
    monkeypatch.setenv("SRUN_ARGS", "--time 2:04")  # the warning comes 2 minutes before
    process, output = start()
    assert process.wait(60) == EXIT_INTERRUPTED
    assert "saved 0" in output()
    assert "saved 1" in output()


@pytest.mark.parametrize("warning", ["USR1@600", "B:USR1@600"])
def test_a_batch_job_queues_again_and_resumes(tools, tmp_path, warning):
    script = f"exec bash {tools}/slurm_train.sh partition name config.py run"
    options = ["--signal", warning, "--requeue", "--open-mode", "append", "--time", "60", "--output", tmp_path / "out"]
    job = subprocess.Popen(["sbatch", "--wait", *options, "--wrap", script])
    output = (tmp_path / "out").read_text
    wait_for(lambda: (tmp_path / "out").exists() and output().count("begun") == 2)
    subprocess.run(["scontrol", "update", "JobId=1", "TimeLimit=10"], check=True)
    wait_for(lambda: "saved 0" in output())
    subprocess.run(["scontrol", "update", "JobId=1", "TimeLimit=60"], check=True)
    assert job.wait(60) == 0
    assert "interrupted: the job queues itself again" in output()
    assert output().count("--resume --launcher pytorch") == 2


@pytest.mark.parametrize("script", ["slurm_train.sh", "slurm_test.sh"])
def test_submitted_by_itself(tools, tmp_path, script):
    """Slurm runs a copy, in a folder without the other scripts."""
    command = [
        "sbatch",
        "--wait",
        "--output",
        tmp_path / "out",
        tools / script,
        "partition",
        "name",
        "config.py",
        "file",
    ]
    assert subprocess.run(command).returncode == 2
    message = f'error: Slurm runs a copy of this script alone: sbatch ... --wrap "exec bash tools/{script} ..."\n'
    assert (tmp_path / "out").read_text() == message


@pytest.mark.parametrize(("gpus", "message"), [("2", "no srun here"), ("two", "GPUS=two and GPUS_PER_NODE=8")])
def test_wrong_input(tools, monkeypatch, gpus, message):
    if gpus == "2":
        (tools.parents[1] / "slurm/srun").unlink()
    monkeypatch.setenv("GPUS", gpus)
    command = ["bash", tools / "slurm_train.sh", "partition", "name", "config.py", "run"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
