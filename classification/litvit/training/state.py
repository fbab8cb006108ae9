"""Files of a run that must never be half-written: the full checkpoint, the best weights, the settings."""

import argparse
import contextlib
import fcntl
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import IO, Any

import safetensors
import safetensors.torch
import torch
import yaml

from litvit.checkpoints import read_checkpoint
from litvit.errors import InputError

logger = logging.getLogger("litvit")

CHECKPOINT = "last.pth"
PREVIOUS = "previous.pth"
DIVERGED = "diverged.pth"
BEST_WEIGHTS = "model_best.safetensors"
SETTINGS = "settings.yaml"
# settings that say where a run is carried out, not what it computes
NOT_OF_THE_RUN = ("data_dir", "config", "cfg", "resume", "dry_run", "device", "output", "experiment")
# settings that a continued run may change: how it is carried out, and how long it is. Batch size and passes may change
# together with the number of processes; the total batch may not
MAY_CHANGE = (
    "epochs",
    "batch_size",
    "grad_accum_steps",
    "val_batch_size",
    "workers",
    "log_interval",
    "checkpoint_every",
    "max_unreadable",
    "grad_checkpointing",
    "token_label_data",
    "token_label_size",  # the model's own, however it is given
)


def replace_file(path: Path, write: Callable[[Path], None], keep: Path | None = None) -> None:
    """Write a file beside `path`, flush it to the disk, and rename it into place.

    Args:
        path: the file to make or replace; it holds the old content or the new, never a part.
        write: writes the file at the path it is given.
        keep: the old content gets this name, if there is any; it is there under one of the two names at every instant.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        mask = os.umask(0)  # some writers make files that only their owner may read
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        _flush(temporary)
        if keep is not None and path.exists():
            link = path.with_name(f".{keep.name}.tmp")
            link.unlink(missing_ok=True)
            try:
                os.link(path, link)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, link)
            os.replace(link, keep)
        os.replace(temporary, path)
        _flush(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Save a state beside a run's own checkpoints."""
    replace_file(path, partial(torch.save, state))


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Save the full state of a run; the checkpoint before it is kept as `previous.pth`.

    At every instant at least one of the two is whole.

    Args:
        folder: of the run.
        state: tensors, numbers, strings, lists and dicts of them.

    Raises:
        OSError, RuntimeError: the disk is full, read-only or gone; both checkpoints are as they were.
    """
    replace_file(folder / CHECKPOINT, partial(torch.save, state), keep=folder / PREVIOUS)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load what `save_checkpoint` saved, after checking its checksums.

    Raises:
        InputError: not there, truncated or changed, holds code, or another kind of file.
    """
    state = read_checkpoint(path, _read_checked)
    if not isinstance(state, dict) or "optimizer" not in state:
        raise InputError(f"{path} is not a full checkpoint of a run: weights alone go to --initial-checkpoint")
    return state


def _read_checked(path: str) -> Any:
    with zipfile.ZipFile(path) as archive:  # torch.save writes a zip file, whose checksums torch.load does not check
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"checksum of {damaged}")
    return torch.load(path, map_location="cpu", weights_only=True)


def load_last_checkpoint(folder: Path, set_aside: bool) -> dict[str, Any] | None:
    """Load a run's last good checkpoint.

    Args:
        folder: of the run.
        set_aside: rename a damaged checkpoint, so that it is not taken for a good one again (one process does it).

    Returns:
        The state, or None if the folder holds no checkpoint.

    Raises:
        InputError: there are checkpoints, and none is good.
    """
    damaged, reasons = [], []
    for path in (folder / CHECKPOINT, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            state = load_checkpoint(path)
        except InputError as error:
            damaged.append(path)
            reasons.append(str(error))
            continue
        for path, reason in zip(damaged, reasons, strict=True):
            logger.warning("%s; trying the checkpoint before it", reason)
            if set_aside:
                with contextlib.suppress(OSError):
                    path.rename(path.with_name(f"{path.name}.damaged"))
        return state
    if reasons:
        raise InputError(f"{folder} holds no good checkpoint: {'; '.join(reasons)}")
    return None


def save_weights(path: Path, weights: dict[str, torch.Tensor], description: dict[str, Any]) -> None:
    """Save weights as .safetensors, with what is needed to rebuild the model beside them in the file's header.

    Args:
        path: the file.
        weights: a state dict.
        description: JSON-able; see `read_description`.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    header = {"format": "pt", "litvit": json.dumps(description)}
    replace_file(path, lambda temporary: safetensors.torch.save_file(tensors, temporary, metadata=header))


def read_description(path: str | Path | None) -> dict[str, Any]:
    """What a run of ours wrote about the model beside its weights: model, num_classes, classes, img_size, mean, ...

    Args:
        path: any checkpoint; None for none.

    Returns:
        The description; empty for files of others, and for files that cannot be read (loading them will say why).
    """
    if path is None:
        return {}
    if not str(path).endswith(".safetensors"):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return state["description"]
        except Exception:  # not a checkpoint of a run
            return {}
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            description = json.loads((file.metadata() or {}).get("litvit", "{}"))
            return description if isinstance(description, dict) else {}
    except (OSError, safetensors.SafetensorError, json.JSONDecodeError):
        return {}


def save_settings(path: Path, settings: dict[str, Any]) -> None:
    """Save a run's resolved settings, as a recipe that `--config` takes."""
    text = yaml.safe_dump(settings, sort_keys=False, default_flow_style=None)
    replace_file(path, lambda temporary: temporary.write_text(text))


def resumed_folder(resume: str) -> Path:
    """The folder of the run that `--resume` names by its folder or its checkpoint.

    Raises:
        InputError: no run there.
    """
    path = Path(resume)
    folder = path if path.is_dir() else path.parent
    if not holds_run(folder) or (path != folder and path.name != CHECKPOINT):
        raise InputError(f"--resume {resume}: no run there; name a run's folder, which holds {CHECKPOINT}")
    return folder


def holds_run(folder: Path) -> bool:
    """Whether a folder holds a run: its settings or a checkpoint."""
    return any((folder / name).is_file() for name in (SETTINGS, CHECKPOINT, PREVIOUS))


def lock_folder(folder: Path) -> IO:
    """Keep other processes from training in the same folder, until the file that is returned is closed or this ends.

    Raises:
        InputError: another process trains there.
    """
    lock = open(folder / ".lock", "w")  # noqa: SIM115 - it is to stay open
    try:
        # lockf, not flock: loader processes, which outlive a killed trainer by seconds, do not inherit it
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.close()
        raise InputError(f"another process trains in {folder}: wait for it, or choose another --experiment") from None
    except OSError:  # a file system without locks
        pass
    return lock


def run_folder(settings: argparse.Namespace, primary: bool) -> Path:
    """The run's folder: the resumed one, or `output`/`experiment`, which must not hold a run yet.

    Raises:
        InputError: the folder holds a run, or there is no run to resume.
    """
    if settings.resume and settings.resume != "auto":
        return resumed_folder(settings.resume)
    if settings.experiment is None:
        started = f"{datetime.now():%Y%m%d-%H%M%S}-{settings.model}"
        settings.experiment = settings.model if settings.resume else started
    folder = Path(settings.output) / settings.experiment
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: choose another --output or --experiment")
    if primary and not settings.resume and holds_run(folder):
        raise InputError(f"{folder} holds a run: continue it with --resume {folder}, or choose another --experiment")
    return folder
