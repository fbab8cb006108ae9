"""When a run has to stop: signals from outside, and an agreement of all processes on the update to stop at."""

import signal
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

# what ends a run in good order: a scheduler's notice (SIGTERM, SIGUSR1), Ctrl-C
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Exit statuses of train.py beside 0 (trained), 1 (a bug) and 2 (wrong input).
EXIT_DIVERGED = 3  # the loss was not finite many times in a row
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: saved on a signal; the same command continues


class Interrupted(Exception):  # noqa: N818 - as KeyboardInterrupt, it is no error
    """The run was asked to stop, and is saved."""


class Diverged(Exception):  # noqa: N818
    """Losses or gradients were not finite too many times in a row."""


class StopSignals:
    """Notes SIGTERM, SIGUSR1 and Ctrl-C while in context; a second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)


class Agreement:
    """Sums a few numbers over all processes, on the CPU: no process waits for its GPU.

    Args:
        distributed: whether there are other processes.
    """

    def __init__(self, distributed: bool):
        self.group = dist.new_group(backend="gloo") if distributed else None

    def join(self, names: list[str]) -> list[str]:
        """Join the lists of all processes; all must call it."""
        if self.group is None:
            return names
        lists: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(lists, names, group=self.group)
        return [name for part in lists for name in part]

    def sum(self, *numbers: float) -> list[float]:
        """Sum each number over all processes; all must call it."""
        if self.group is None:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total, group=self.group)
        return total.tolist()
