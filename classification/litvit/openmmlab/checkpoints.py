"""Checkpoints for mmengine: reading them without running code, loading them, finding a run's latest one.

A checkpoint is a pickle, and a pickle can call any function. `torch.load(weights_only=True)` refuses all functions and
classes except those on its list. mmengine saves more than weights: next to them lies the history of the logged values,
whose class, NumPy arrays and numbers are added to the list here. They hold data and do nothing when they are built. The
history also pickles four of its own methods, as calls of `getattr`. The real `getattr` would hand out any attribute of
anything; `_statistic` replaces it, hands out these four methods and refuses everything else.
"""

import os
import re
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from safetensors.torch import load_file
from torch import Tensor, nn

from litvit.archives import verify_archive
from litvit.checkpoints import mismatch, read_checkpoint
from litvit.downloads import fetch
from litvit.errors import InputError
from litvit.models import identify_model, translate_published
from litvit.processes import is_primary
from litvit.runs.folder import CHECKPOINT, PREVIOUS


def _statistic(cls: type, name: str) -> Callable:
    if cls is HistoryBuffer and name in ("min", "max", "mean", "current"):
        return getattr(cls, name)
    raise UnpicklingError(f"global {name} of {cls}")


class _Array(np.ndarray):
    """NumPy's array in a checkpoint: empty when it is built, and filled by its state.

    An array of objects could otherwise be built of bytes, which are taken for addresses. It is saved as NumPy's.
    """

    def __new__(cls, *args: Any) -> "_Array":
        return super().__new__(cls, 0)

    def __reduce_ex__(self, protocol: int) -> tuple:
        return self.view(np.ndarray).__reduce_ex__(protocol)


os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # for torch.load in mmengine's other readers
_statistic.__module__, _statistic.__qualname__ = "builtins", "getattr"  # the names in the pickle
_Array.__module__, _Array.__qualname__ = "numpy", "ndarray"
torch.serialization.add_safe_globals(
    [
        HistoryBuffer,
        _statistic,
        _Array,
        np.dtype,
        *(type(np.dtype(number)) for number in (np.float64, np.float32, np.int64)),
        *(value.__reduce__()[0] for value in (np.empty(0), np.float64())),
    ]
)


@CheckpointLoader.register_scheme(prefixes="", force=True)
def load_from_file(filename: str, map_location: Any = None) -> dict:
    """Read a checkpoint file for mmengine, without running code that it may hold.

    Args:
        filename: Path of a .safetensors file or of one that torch.save wrote: weights, or a run of mmengine with its
            optimizer.
        map_location: Device of the tensors, as for torch.load.

    Returns:
        Content of the file.

    Raises:
        InputError: The file does not exist, or is not a checkpoint that can be read safely.
    """
    path = Path(filename).expanduser()
    if path.suffix == ".safetensors":
        return read_checkpoint(path, load_file)
    return read_checkpoint(path, partial(torch.load, map_location=map_location, weights_only=True))


def read_meta(filename: str) -> dict[str, Any]:
    """Read what a checkpoint of mmengine says of its run, and not its tensors; {} where that is not possible."""
    try:
        verify_archive(filename, checksums=False)
        meta = torch.load(filename, map_location="cpu", mmap=True, weights_only=True)["meta"]
        return meta if isinstance(meta, dict) else {}
    except Exception:  # loading it will say why
        return {}


@CheckpointLoader.register_scheme(prefixes=("http://", "https://"), force=True)
def load_from_url(url: str, map_location: Any = None) -> dict:
    """Fetch a checkpoint once, then read it with `load_from_file`."""
    return load_from_file(str(fetch(url)), map_location)


def local_rank() -> int:
    """Return the rank of this process on its machine, as torchrun or Slurm sets it; 0 if it is the only one."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))


def load_or_explain(model: nn.Module, entries: dict[str, Tensor], arch: str) -> str | None:
    """Load weights into a model of litvit, or say why they do not fit.

    The norms of its output maps may be missing, as in ImageNet weights; they keep their values.

    Args:
        model: Model that gets the weights.
        entries: Weights, under published names or ours.
        arch: Name of the model.

    Returns:
        Why the weights do not fit, in a few words; None if they are loaded.
    """
    norms = {name: value for name, value in model.state_dict().items() if name.startswith("out_norms.")}
    try:
        model.load_state_dict(norms | entries)
    except RuntimeError as error:
        return mismatch(entries, arch, error)
    return None


def load_checkpoint_checked(model: nn.Module, filename: str, prefix: str = "") -> dict:
    """Load a checkpoint into a detector or segmentor.

    Args:
        model: Detector or segmentor, bare or wrapped.
        filename: Path or link of the checkpoint.
        prefix: Prefix of the entries that must be present and fit; others may be missing or of another size.

    Returns:
        Content of the checkpoint.

    Raises:
        InputError: A checkpoint that cannot be read, or one of another model.
    """
    checkpoint = CheckpointLoader.load_checkpoint(filename, map_location="cpu")
    entries = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(entries, dict) or not all(isinstance(name, str) for name in entries):
        raise InputError(f"{filename} is no checkpoint of a model: name one of train.py's, or a published one")
    entries = {name.removeprefix("module."): value for name, value in entries.items()}
    model = unwrap(model)
    problems = [
        (name, problem)
        for name, problem in _load_what_fits(model, entries)
        if name.startswith(prefix) and not name.endswith("num_batches_tracked")
    ]
    if not problems:
        return checkpoint
    own_names = translate_published(entries.get("model", entries))
    if own_names.keys() & model.backbone.state_dict().keys():
        raise InputError(
            f"{filename} holds only a backbone, as ImageNet weights do: name it by --cfg-options "
            "model.backbone.init_cfg.checkpoint=FILE to start a training from it"
        )
    start = "backbone."
    backbone = {name.removeprefix(start): value for name, value in entries.items() if name.startswith(start)}
    held = f"its backbone is {arch}" if (arch := identify_model(backbone)) else "it is of another model"
    if not any(name.startswith(start) for name, _ in problems):
        held = "its backbone does, its heads do not (other classes?)"
    first = " ".join(problems[0])
    raise InputError(f"{filename} does not fit the config: {held}, and {first} (the first of {len(problems)} entries)")


def _load_what_fits(model: nn.Module, entries: dict[str, Tensor]) -> list[tuple[str, str]]:
    """Load the entries that fit; return the names of others that the model has, and what is wrong with each."""
    missing, sizes = [], []
    # load_state_dict returns the missing keys unless a size differs; its hook gets them in both cases.
    hook = model.register_load_state_dict_post_hook(lambda _, keys: missing.extend(keys.missing_keys))
    try:
        model.load_state_dict(entries, strict=False)
    except RuntimeError as error:  # torch reports sizes by this text only
        sizes = re.findall(r"size mismatch for ([\w.]+): .*?\[([\d, ]*)\].*?\[([\d, ]*)\]", str(error))
    finally:
        hook.remove()
    return [
        *((name, "is missing") for name in missing),
        *((name, f"has size ({held}), not ({wanted})") for name, held, wanted in sizes),
    ]


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside of DistributedDataParallel and test-time augmentation."""
    while hasattr(model, "module"):
        model = model.module
    return model


def latest_checkpoint(work_dir: Path) -> str | None:
    """Return the latest whole checkpoint of a run of mmengine, None if the run has none yet.

    A later one that is damaged is renamed, so that it is not tried again.

    Raises:
        InputError: All checkpoints are broken.
    """
    names = ("iter_*.pth", "epoch_*.pth", CHECKPOINT, PREVIOUS)
    saved = {}
    for path in (path for name in names for path in work_dir.glob(name)):
        with suppress(OSError):  # another process has renamed it
            saved[path] = path.stat().st_mtime_ns
    files = sorted(saved, key=saved.get, reverse=True)
    with suppress(OSError, ValueError):  # no file yet, or one that is damaged
        last = Path(work_dir, "last_checkpoint").read_text().strip()
        if "://" in last:
            return last
        here = work_dir / Path(last).name  # the folder may have been moved
        files.insert(0, here if here.is_file() else Path(last))
    damaged = []
    for file in dict.fromkeys(files):
        try:
            verify_archive(file)
        except (OSError, ValueError, zipfile.BadZipFile):  # ValueError: InputError, or a name that is none
            damaged.append(file)
            continue
        if damaged and is_primary():
            print(f"{damaged[0]} is damaged or missing: {file} is used instead", file=sys.stderr)
            for broken in damaged:
                with suppress(OSError, ValueError):
                    broken.rename(broken.with_name(f"{broken.name}.damaged"))
        return str(file)
    if damaged:
        raise InputError(f"no checkpoint of {work_dir} is whole, nor {damaged[0]}: empty the folder to start again")
    return None
