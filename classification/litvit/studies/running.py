"""How the runs of a study are trained: one process per run, several side by side, each continued where it ended."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from litvit.errors import InputError
from litvit.processes import (
    EXIT_DIVERGED,
    EXIT_INPUT_ERROR,
    EXIT_INTERRUPTED,
    LAUNCHER,
    STATUS_FILE,
    StopSignals,
    available_cores,
)
from litvit.runs.summary import read_summary
from litvit.studies.plan import Run, Study
from litvit.training.config import Config

POLL = 0.2  # seconds
LINES = 20  # of the output of a run that failed
NEEDED = ("epoch", "train_loss", "eval_top1")


def read_epochs(run: Run) -> list[dict[str, float]]:
    """Return the epochs that a run has trained, as its summary.csv has them; none for a run that has not begun.

    Raises:
        InputError: The file is damaged.
    """
    try:
        rows = read_summary(run.summary)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {run.summary}: {error}; delete {run.path} to train the run again") from error
    for number, row in enumerate(rows, 1):
        for name in NEEDED:
            if name not in row:
                raise InputError(
                    f"{run.summary} has no {name} in row {number}; delete {run.path} to train the run again"
                )
    return rows


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
    stopped: bool = False

    def stop(self) -> None:
        """Ask the run to save and to end. It is asked once: at its end, a second signal would kill it."""
        if not self.stopped:
            self.stopped = True
            self.process.terminate()

    def exit_status(self) -> int:
        text = self.status.read_text() if self.status.exists() else ""
        status = int(text) if text else self.process.returncode
        # A signal ends a run that has not begun: there is nothing to save.
        return EXIT_INTERRUPTED if self.stopped and status == -signal.SIGTERM else status


def train(
    study: Study,
    runs: Sequence[Run],
    data_dir: str,
    jobs: int,
    report: Callable[[Run, int | None], None],
) -> int:
    """Train runs, `jobs` at a time.

    A signal that stops a run stops them all, and each saves its state. With several GPUs each run has one of its own.

    Args:
        study: Study of the runs.
        runs: Runs to start or to continue.
        data_dir: Data to train on.
        jobs: Number of processes.
        report: Function that is called when a run has started, with the run and None, and when it has ended, with its
            exit status.

    Returns:
        Exit status: 0, EXIT_INTERRUPTED if runs were stopped, or EXIT_DIVERGED if some diverged. The others go on then.

    Raises:
        InputError: A run found wrong input. The message is its own. The others are stopped, and saved.
        RuntimeError: A run failed. The message is the end of its output. The others are stopped, and saved.
    """
    waiting, started, statuses = list(runs), [], {0}
    with tempfile.TemporaryDirectory() as folder, StopSignals() as signals, contextlib.ExitStack() as stack:
        stack.callback(_stop, started)
        while started or (waiting and not signals.received):
            taken = {one.slot for one in started}
            while waiting and len(started) < jobs and not signals.received:
                slot = next(slot for slot in range(jobs) if slot not in taken)
                taken.add(slot)
                started.append(_start(study, waiting.pop(0), data_dir, jobs, slot, Path(folder)))
                report(started[-1].run, None)
            time.sleep(POLL)
            for one in started if signals.received else ():
                one.stop()
            for one in [one for one in started if one.process.poll() is not None]:
                started.remove(one)
                status = one.exit_status()
                if status not in (0, EXIT_DIVERGED, EXIT_INTERRUPTED):
                    raise _failure(one, status)
                statuses.add(status)
                report(one.run, status)
        return EXIT_INTERRUPTED if signals.received else max(statuses)


def environment(slot: int, jobs: int, gpus: int) -> dict[str, str]:
    """Return the environment variables of a run: its share of the cores, and with several GPUs one of them.

    Args:
        slot: Number of the run among those that are trained side by side.
        jobs: Number of runs that are.
        gpus: Number of GPUs.
    """
    changes = {}
    if "OMP_NUM_THREADS" not in os.environ:
        changes["OMP_NUM_THREADS"] = str(max(1, available_cores() // jobs))
    if gpus > 1:
        names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        changes["CUDA_VISIBLE_DEVICES"] = names.split(",")[slot % gpus].strip()
    return changes


def _start(study: Study, run: Run, data_dir: str, jobs: int, slot: int, folder: Path) -> _Started:
    status, output = (folder / f"{run.model}.{run.seed}.{kind}" for kind in ("status", "output"))
    # A launcher's variables: the process ends with this one, and leaves its exit status in the file.
    variables = {STATUS_FILE: str(status), LAUNCHER: str(os.getpid())}
    variables |= environment(slot, jobs, torch.cuda.device_count())
    command = [sys.executable, "-m", "litvit", "train", *study.flags(run, data_dir)]
    with open(output, "wb") as file:
        # In a session of its own, Ctrl-C of the terminal reaches this process alone, which passes it on.
        options = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
        process = subprocess.Popen(command, env=os.environ | variables, **options)
    return _Started(run, slot, process, status, output)


def _failure(one: _Started, status: int) -> Exception:
    lines = one.output.read_text(errors="backslashreplace").splitlines()
    if status == EXIT_INPUT_ERROR and lines:
        return InputError(f"{one.run}: {lines[-1].removeprefix('error: ')}")
    return RuntimeError(f"{one.run} ended with status {status}:\n" + "\n".join(lines[-LINES:]))


def _stop(started: Sequence[_Started]) -> None:
    for one in started:
        one.stop()
    for one in started:
        one.process.wait()
