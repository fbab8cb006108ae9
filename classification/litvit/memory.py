"""Memory of a process: its peak, and what the C library keeps of it on a CPU."""

import ctypes
import os
import platform
import re
import resource

import torch

MIB = 2**20


def keep_freed_memory() -> None:
    """Make the C library keep the memory of freed tensors for later ones, instead of returning it to the system.

    Otherwise each large tensor gets new pages, which the system clears first: up to 30% of a training step's time on a
    CPU. The process, and those that it forks, hold their peak memory until they end. Where image sizes change, the peak
    is about a tenth higher. Nothing changes if the environment has settings of its own (MALLOC_MMAP_MAX_,
    MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_, or the same in GLIBC_TUNABLES) or the C library is not glibc.
    """
    own = any(name.startswith(("MALLOC_MMAP", "MALLOC_TRIM")) for name in os.environ)
    own |= bool(re.search(r"malloc\.(mmap|trim)", os.environ.get("GLIBC_TUNABLES", "")))
    if own or platform.libc_ver()[0] != "glibc":
        return
    set_option = ctypes.CDLL(None).mallopt
    set_option(-8, 1)  # M_ARENA_MAX: all threads share one heap, because glibc returns the memory of further heaps
    set_option(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own
    set_option(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def peak_memory_mib(device: torch.device) -> float:
    """Return the most memory of this process up to now in MiB: on a GPU of its tensors, else of all of it."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / MIB, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)  # KiB on Linux
