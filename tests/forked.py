"""Scripts run in processes of their own that need not import torch again: each is a fork of one that has.

A test that runs a script saves the seconds that the script's libraries take to load. This file is also that process.
It reads requests, one JSON per line, and answers with the process id of the script and then with its exit status.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, NamedTuple

LIBRARIES = ["torch", "torchvision", "timm.data", "timm.task", "torch.utils.tensorboard", "mmengine.runner", "cv2"]
TIMEOUT = 300  # seconds


class Outcome(NamedTuple):
    """What a command line left behind."""

    status: int
    out: str
    err: str


@cache
def _forker() -> subprocess.Popen:
    # Read when torch is loaded; the scripts set it themselves.
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, __file__], env=environment, text=True, **pipes)


def end_loader_processes() -> None:
    """Kill the loader processes of this process."""
    for process in multiprocessing.active_children():
        with suppress(RuntimeError):  # of torch's handler of SIGCHLD
            process.kill()
            process.join()


def run_script(script: Path, *arguments: object, **environment: str) -> Outcome:
    """Run a Python or bash script with one thread per process.

    Args:
        script: Path of the script.
        *arguments: Arguments of the script.
        **environment: Environment variables to set.
    """
    command = [str(script), *map(str, arguments)]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    if script.suffix == ".sh":
        done = subprocess.run(
            ["bash", *command], capture_output=True, text=True, timeout=TIMEOUT, env=environment, errors="replace"
        )
        return Outcome(done.returncode, done.stdout, done.stderr)
    with (
        tempfile.NamedTemporaryFile("r+", errors="replace") as out,
        tempfile.NamedTemporaryFile("r+", errors="replace") as err,
    ):
        request = {
            "command": command,
            "environment": environment,
            "folder": os.getcwd(),
            "streams": [out.name, err.name],
        }
        forker = _forker()
        print(json.dumps(request), file=forker.stdin, flush=True)
        status = json.loads(forker.stdout.readline())
        return Outcome(status, out.read(), err.read())


def _serve(requests: IO[str]) -> None:
    """Fork for each request. In the fork, return when the process is as the request wants it."""
    for line in requests:
        request = json.loads(line)
        process = os.fork()
        if not process:
            _become(request)
            return
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    sys.exit()


def _become(request: Mapping) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, path in enumerate(request["streams"], 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = request["command"]
    sys.path[0] = os.path.dirname(sys.argv[0])
    for folder in reversed(os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        if folder and folder not in sys.path:
            sys.path.insert(1, folder)
    signal.alarm(TIMEOUT)


if __name__ == "__main__":
    for name in LIBRARIES:
        with contextlib.suppress(ModuleNotFoundError):  # detection's, in an environment without
            importlib.import_module(name)
    _serve(sys.stdin)
    runpy.run_path(sys.argv[0], run_name="__main__")
