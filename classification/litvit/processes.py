"""The processes of a run: signals, exit statuses, sums over all ranks, and an orderly end.

user or scheduler -- SIGTERM, SIGUSR1, SIGHUP or Ctrl-C --> trainer: finishes its step, agrees with the other ranks,
                                                  saves, and leaves with EXIT_INTERRUPTED
launcher script   -- SIGTERM --> workers (the trainers): the same; each writes its exit status into the file that
                                 LITVIT_STATUS_FILE names and exits with 0, so that torchrun does not restart it;
                                 the script exits with the status in the file
worker dies       --> torchrun restarts all workers; one that finds a status in the file exits with 0 at once
launcher dies     --> PR_SET_PDEATHSIG kills the workers, and their loader processes end with them
loader process    --> ignores SIGUSR1, SIGHUP and Ctrl-C, obeys a SIGTERM of its trainer alone, and ends with it
"""

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import threading
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so, world_info_from_env
from torch import Tensor

from litvit.errors import InputError
from litvit.memory import keep_freed_memory

# Exit statuses, besides 0 (success) and 1 (a bug).
EXIT_INPUT_ERROR = 2
EXIT_DIVERGED = 3  # the loss or a gradient was not finite in many steps in a row
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: saved after a signal; the same command continues
EXIT_CTRL_C = 130
# SIGUSR1: a scheduler's notice before a time limit. SIGHUP: a terminal that was closed.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
STATUS_FILE = "LITVIT_STATUS_FILE"
LAUNCHER = "LITVIT_LAUNCHER"  # process id of the launcher


class Interrupted(Exception):  # noqa: N818 - not an error, as KeyboardInterrupt
    """The run was asked to stop, and is saved."""


class StopSignals:
    """Context that records SIGTERM, SIGUSR1, SIGHUP and Ctrl-C. A second Ctrl-C ends the process at once.

    A SIGHUP that nohup has the process ignore stays ignored.
    """

    active: "StopSignals | None" = None

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> "StopSignals":
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        self._before = {number: signal.signal(number, self._record) for number in STOP_SIGNALS if number not in ignored}
        StopSignals.active = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        StopSignals.active = None
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)


def stop_signal() -> signal.Signals | None:
    """Return the signal that has asked this process to stop, if a `StopSignals` context has recorded one."""
    return None if StopSignals.active is None else StopSignals.active.received


@dataclass
class Processes:
    """The processes of a run as this one sees them, and what they compute together.

    Sums and lists travel between CPUs, so that no process waits for its GPU.

    Args:
        device: Device of this process.
        rank: Rank of this process.
        world_size: Number of processes.
        distributed: Whether there is a process group.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    distributed: bool = False

    def __post_init__(self) -> None:
        # The others may wait for a process that waits for its data. One that has died ends their wait at once.
        self.cpu_group = dist.new_group(backend="gloo", timeout=timedelta(days=1)) if self.distributed else None

    @property
    def primary(self) -> bool:
        """Whether this process writes the files and log lines of the run."""
        return self.rank == 0

    def sum(self, *numbers: float) -> list[float]:
        """Sum each number over all processes. All of them must call it."""
        if not self.distributed:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total, group=self.cpu_group)
        return total.tolist()

    def gather(self, items: list[Any]) -> list[Any]:
        """Join the lists of all processes. All of them must call it."""
        if not self.distributed:
            return items
        lists: list[list[Any]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(lists, items, group=self.cpu_group)
        return [item for part in lists for item in part]

    def mean(self, tensor: Tensor) -> Tensor:
        """Average a tensor on the device over all processes. All of them must call it."""
        if not self.distributed:
            return tensor
        mean = tensor.clone()
        dist.all_reduce(mean)
        return mean / self.world_size


def is_primary() -> bool:
    """Whether this is the first process, by the launcher's environment variables."""
    return world_info_from_env()[1] == 0


def start_processes(device_name: str | None, dry_run: int | None = None) -> Processes:
    """Choose the device, and join the process group that the launcher's environment variables describe, if they do.

    Args:
        device_name: Name of the device, see `choose_device`. Each process gets a GPU of its own.
        dry_run: Number of processes to act as one of, where there is no process group.

    Raises:
        InputError: a device that torch does not know or the machine does not have.
    """
    device = choose_device(device_name)
    if device.type == "cpu":
        keep_freed_memory()
    info = init_distributed_device_so(device.type if device.index is None else str(device))
    world_size = info["world_size"] if info["distributed"] else dry_run or 1
    return Processes(torch.device(info["device"]), info["global_rank"], world_size, info["distributed"])


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_device(name: str | None) -> torch.device:
    """Return the device that `--device` names, by default CUDA where it is available, else the CPU.

    Raises:
        InputError: a device that torch does not know or the machine does not have.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "meta":
            raise RuntimeError("a model cannot compute on it")
        if device.type != "cuda" or "LOCAL_RANK" not in os.environ:
            torch.empty(0, device=device)
        elif int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():  # each process gets a GPU of its own, later
            raise RuntimeError(f"this machine has {torch.cuda.device_count()} GPUs, fewer than there are processes")
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).strip().splitlines()[0]}") from error
    return device


def leave_signals_to_the_trainer() -> None:
    """Let a loader process ignore the signals that end a run in good order: the trainer still needs its batches.

    A SIGTERM of the trainer itself ends it. Python stops in this way the processes that are left when it exits.
    """
    for number in set(STOP_SIGNALS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_trainer, daemon=True).start()


def _end_with_the_trainer() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def end_with_parent() -> None:
    """Be killed when the thread ends that has started this process. On Linux only."""
    set_parent_death_signal = 1
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def leave(status: int | None) -> NoReturn:
    """Exit. One of several processes does without the end of the interpreter, in which a thread of gloo may abort it.

    Args:
        status: Exit status, None for success.
    """
    if world_info_from_env()[2] > 1:
        atexit._run_exitfuncs()  # of multiprocessing, logging and the user's libraries
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(status or 0)
    sys.exit(status)


def follow_the_launcher() -> None:
    """Be killed when the launcher is, and leave at once if the run has been ended on purpose.

    A worker whose launcher is gone would train on in the run's folder.
    """
    if STATUS_FILE not in os.environ:
        return
    end_with_parent()
    if os.environ.get(LAUNCHER, str(os.getppid())) != str(os.getppid()):
        sys.exit("the launcher is gone")  # it ended before the line above
    status = Path(os.environ[STATUS_FILE])
    if status.exists() and status.read_text():  # torchrun has restarted a worker that had left deliberately
        sys.exit(0)


def tell_the_launcher(status: int | None) -> int | None:
    """Put an exit status into the launcher's file, if there is one.

    Returns:
        The status that this process is to exit with.
    """
    if status and STATUS_FILE in os.environ:
        Path(os.environ[STATUS_FILE]).write_text(str(status))
        return 0
    return status
