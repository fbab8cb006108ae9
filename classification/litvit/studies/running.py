"""How the runs of a study are trained: one process per run, several side by side, each continued where it ended."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from litvit.errors import InputError
from litvit.processes import EXIT_DIVERGED, EXIT_INPUT_ERROR, EXIT_INTERRUPTED, LAUNCHER, STATUS_FILE, StopSignals
from litvit.runs.summary import read_summary
from litvit.studies.plan import Run, Study
from litvit.training.config import Config

POLL = 0.2  # seconds
LINES = 20  # of the output of a run that failed


def read_epochs(run: Run) -> list[dict[str, float]]:
    """Return the epochs that a run has trained, as its summary.csv has them; none for a run that has not begun."""
    try:
        return read_summary(run.summary)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {run.summary}: {error}") from error


def last_epoch(config: Config) -> int:
    """Return the number of epochs of a run."""
    return config.optim.epochs + config.optim.cooldown_epochs


@dataclass
class _Started:
    run: Run
    slot: int
    process: subprocess.Popen
    status: Path
    output: Path

    def exit_status(self) -> int:
        text = self.status.read_text() if self.status.exists() else ""
        return int(text) if text else self.process.returncode


def train(
    study: Study,
    runs: Sequence[Run],
    data_dir: str,
    jobs: int,
    report: Callable[[Run, int], None],
) -> int:
    """Train runs, `jobs` at a time.

    A signal that stops a run stops them all, and each saves its state. With several GPUs each run has one of its own.

    Args:
        study: Study of the runs.
        runs: Runs to start or to continue.
        data_dir: Data to train on.
        jobs: Number of processes.
        report: Function that is called when a run has ended, with the run and its exit status.

    Returns:
        Exit status: 0, that of a run that was stopped, or EXIT_DIVERGED if runs diverged. The others go on then.

    Raises:
        InputError: A run found wrong input. The message is its own.
        RuntimeError: A run failed. The message is the end of its output.
    """
    waiting, started, status = list(runs), [], 0
    with tempfile.TemporaryDirectory() as folder, StopSignals() as signals, contextlib.ExitStack() as stack:
        stack.callback(_stop, started)
        while started or (waiting and not signals.received):
            taken = {one.slot for one in started}
            while waiting and len(started) < jobs and not signals.received:
                slot = next(slot for slot in range(jobs) if slot not in taken)
                taken.add(slot)
                started.append(_start(study, waiting.pop(0), data_dir, jobs, slot, Path(folder)))
            if signals.received:
                for one in started:
                    one.process.terminate()  # it finishes its step and saves; a second signal changes nothing
            time.sleep(POLL)
            for one in [one for one in started if one.process.poll() is not None]:
                started.remove(one)
                ended = one.exit_status()
                report(one.run, ended)
                if ended in (EXIT_DIVERGED, EXIT_INTERRUPTED):
                    status = max(status, ended)
                elif ended:
                    raise _failure(one, ended)
        return EXIT_INTERRUPTED if signals.received else status


def _start(study: Study, run: Run, data_dir: str, jobs: int, slot: int, folder: Path) -> _Started:
    status, output = folder / f"{run.model}.{run.seed}.status", folder / f"{run.model}.{run.seed}.output"
    # A launcher's environment: the process ends with this one, and leaves its exit status in the file.
    environment = os.environ | {STATUS_FILE: str(status), LAUNCHER: str(os.getpid())}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // jobs)))
    if torch.cuda.device_count() > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        gpus = visible if visible != [""] else list(map(str, range(torch.cuda.device_count())))
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    command = [sys.executable, "-m", "litvit", "train", *study.flags(run, data_dir)]
    with open(output, "wb") as file:
        # Ctrl-C of the terminal reaches this process alone, which passes it on.
        streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
    return _Started(run, slot, process, status, output)


def _failure(one: _Started, status: int) -> Exception:
    lines = one.output.read_text(errors="backslashreplace").splitlines()
    name = f"{one.run.model}, seed {one.run.seed}"
    if status == EXIT_INPUT_ERROR and lines:
        return InputError(f"{name}: {lines[-1].removeprefix('error: ')}")
    return RuntimeError(f"{name} ended with status {status}:\n" + "\n".join(lines[-LINES:]))


def _stop(started: Sequence[_Started]) -> None:
    for one in started:
        one.process.terminate()
    for one in started:
        one.process.wait()
