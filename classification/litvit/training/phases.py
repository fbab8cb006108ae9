"""Where the time of an epoch goes: waiting for data, forward, backward, optimizer step."""

import itertools
import time

import torch

PHASES = ("data", "forward", "backward", "step")


class PhaseClock:
    """Adds up the seconds of each phase of training.

    On a GPU the marks are CUDA events, so that the seconds are those of the GPU, idle time in a phase included, and
    nothing waits for them. Elsewhere they are those of this process.

    Args:
        device: Device that trains.

    Attributes:
        seconds: Seconds of each of PHASES since `begin`, up to the last `read`.
    """

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []

    def begin(self) -> None:
        """Start to count from 0."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._marks = []
        self.mark("")

    def mark(self, phase: str) -> None:
        """Note that a phase has ended, and that the next one begins."""
        if self.on_gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._marks.append((phase, now))

    def read(self) -> None:
        """Add up what is marked. On a GPU, call it where its results have been waited for anyway."""
        for (_, before), (phase, now) in itertools.pairwise(self._marks):
            self.seconds[phase] += before.elapsed_time(now) / 1000 if self.on_gpu else now - before
        del self._marks[:-1]
