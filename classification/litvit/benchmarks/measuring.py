"""Interleaved timing, peak memory, and a description of the machine."""

import contextlib
import math
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torchvision
from tqdm import tqdm

Call = Callable[[], object]
SHORT_SECONDS = 0.02  # shorter calls are repeated back to back until this time has passed
SLEEP_CYCLES = 50_000_000
WARM_UP = 3  # torch.compile's CUDA graphs are recorded in the second call


def interleaved_medians(calls: dict[str, Call], repeats: int, device: torch.device) -> dict[str, float]:
    """Time calls in turn, see `interleaved_seconds`, and return median seconds per call."""
    return {name: statistics.median(values) for name, values in interleaved_seconds(calls, repeats, device).items()}


def interleaved_seconds(calls: dict[str, Call], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Time calls in turn, `repeats` rounds after a warm-up, so that a slowdown of the machine affects all equally.

    Args:
        calls: Calls by name. In each round a short one is repeated back to back, for 20 ms or 20 times, and its mean
            counts.
        repeats: Number of rounds.
        device: Device on which the calls run.

    Returns:
        Seconds per call in each round.
    """
    times = {}
    progress = {"leave": False, "disable": None}  # on a terminal only
    for name, call in tqdm(calls.items(), desc="warm-up", **progress):
        for _ in range(WARM_UP if device.type == "cuda" else 1):
            _seconds(call, 1, device)
        times[name] = min(20, math.ceil(SHORT_SECONDS / max(_seconds(call, 1, device), 1e-6)))
    seconds = {name: [] for name in calls}
    for _ in tqdm(range(repeats), desc="rounds", **progress):
        for name, call in calls.items():
            seconds[name].append(_seconds(call, times[name], device))
    return seconds


def _seconds(call: Call, times: int, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - start) / times
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The GPU sleeps while the CPU fills its queue with kernels, so that its own time is measured, not the CPU's.
        torch.cuda._sleep(SLEEP_CYCLES)
        start.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1000 / times


def peak_memory(call: Call, device: torch.device) -> int | None:
    """Measure the most bytes that tensors take up on a GPU while `call` runs, including those allocated before.

    Args:
        call: Function to measure. It runs twice, because what it leaves behind the first time (such as an optimizer's
            state) belongs to it.
        device: Device on which it runs.

    Returns:
        Number of bytes; None for other devices, whose allocators do not count.
    """
    if device.type != "cuda":
        return None
    call()
    torch._C._cuda_clearCublasWorkspaces()  # left behind by other calls
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device)


def machine(device: torch.device) -> str:
    """Return the processor, the versions and the commit that figures belong to, in one line."""
    if device.type == "cuda":
        processor = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    else:
        processor = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    commit = _commit()
    return (
        f"{processor}; torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}, "
        f"Python {platform.python_version()}{f', commit {commit}' if commit else ''}"
    )


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        processor = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
        known = dict(re.findall(r"^(\S.*?)\s*: *(.*)$", processor, re.MULTILINE))
        if "model name" in known:
            # Virtual machines give processors of all generations the same name.
            generation = f" (family {known['cpu family']}, model {known['model']})" if "cpu family" in known else ""
            return known["model name"] + generation
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Return the commit of this code, followed by -dirty if files differ from it; None outside a checkout."""
    classification, checkout = Path(__file__).parents[2:4]
    if classification.name != "classification" or not (checkout / ".git").exists():
        return None  # installed, perhaps in the checkout of something else
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", checkout, "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return None
