"""Where a run is carried out: command line, commit, versions, hardware."""

import contextlib
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("litvit", "torch", "torchvision", "timm")
TIMEOUT = 10  # seconds that git may take, on a file system that is slow


def describe_start(device: torch.device, world_size: int) -> dict[str, Any]:
    """Describe this process for the record of a run. What cannot be found out is None, and nothing is raised.

    Args:
        device: Device of this process.
        world_size: Number of processes of the run.

    Returns:
        time, command, folder (the current one), commit of this code, changed (whether its files differ from it),
        versions and hardware, of what YAML can hold.
    """
    state = _known(source_state) or (None, None)
    return {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
        "folder": _known(os.getcwd),
        "commit": state[0],
        "changed": state[1],
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "hardware": {
            "host": platform.node(),
            "system": platform.platform(),
            "cpu": cpu_name(),
            "cores": _known(lambda: len(os.sched_getaffinity(0))) or os.cpu_count(),
            "memory_gib": _known(lambda: round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)),
            "device": str(device),
            **(_known(lambda: _gpu(device)) or {} if device.type == "cuda" else {}),
            "processes": world_size,
        },
    }


def _known(find: Callable[[], Any]) -> Any:
    """Return what a function finds, None if it raises: a record is no reason to end a run."""
    try:
        return find()
    except Exception:
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # a checkout that is not installed
        return None


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "gpus": torch.cuda.device_count(),
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def cpu_name() -> str:
    """Return the name of the processor."""
    with contextlib.suppress(OSError):
        processor = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
        known = dict(re.findall(r"^(\S.*?)\s*: *(.*)$", processor, re.MULTILINE))
        if "model name" in known:
            # Virtual machines give processors of all generations the same name.
            generation = f" (family {known['cpu family']}, model {known['model']})" if "cpu family" in known else ""
            return known["model name"] + generation
    return platform.processor() or platform.machine()


def source_state() -> tuple[str, bool] | None:
    """Return the commit of this code, and whether files of the checkout differ from it; None outside a checkout."""
    classification, checkout = Path(__file__).parents[2:4]
    if classification.name != "classification" or not (checkout / ".git").exists():
        return None  # installed, perhaps in the checkout of something else
    command = ["git", "-C", checkout, "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
    # Set in git's hooks, they would lead to another repository.
    environment = {name: value for name, value in os.environ.items() if name not in ("GIT_DIR", "GIT_WORK_TREE")}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, timeout=TIMEOUT)
        commit, _, dirty = run.stdout.strip().partition("-")
        return commit, bool(dirty)
    return None
