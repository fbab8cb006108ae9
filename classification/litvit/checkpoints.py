"""Checkpoints: reading them without running code, and loading them into a model, all of it or nothing."""

import logging
import pickle
import pickletools
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from timm.models import load_state_dict as timm_load_state_dict
from torch import Tensor, nn

from litvit.errors import InputError

_logger = logging.getLogger(__name__)

# Functions that name the model which weights belong to, None if they do not know it. `litvit.models` adds its own.
identifiers: list[Callable[[dict[str, Tensor]], str | None]] = []


def read_checkpoint(path: str | Path, read: Callable[[str], Any]) -> Any:
    """Read a checkpoint file by a function that runs no code in it.

    Args:
        path: Checkpoint file.
        read: Function of the path, such as torch.load with weights_only=True, or a reader of safetensors.

    Returns:
        The result of `read`.

    Raises:
        InputError: The file is missing, a folder, empty, truncated, no checkpoint, or contains code.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder: name the checkpoint in it")
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}")
    if not path.stat().st_size:
        raise InputError(f"{path} is empty: fetch or save the checkpoint again")
    try:
        return read(str(path))
    # A broken file can make the readers raise nearly anything.
    except Exception as error:
        refused = error if isinstance(error, pickle.UnpicklingError) else error.__cause__
        if _is_pickle(path) or (isinstance(refused, pickle.UnpicklingError) and "global" in str(refused).lower()):
            raise InputError(
                f"{path} is a plain pickle or holds code, which was not run: ask for weights alone (.safetensors)"
            ) from error
        raise InputError(f"{path} is no checkpoint, or a truncated one: fetch or save it again") from error


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of a checkpoint without running code in it.

    Args:
        path: File in the .safetensors format, or of torch.save with a state dict, bare or under the first of the keys
            state_dict_ema, model_ema, state_dict and model that is present.

    Returns:
        Tensors by name, on the CPU, without the prefixes of DistributedDataParallel and torch.compile.

    Raises:
        InputError: The file is missing, or no checkpoint that can be read safely.
    """
    entries = read_checkpoint(path, timm_load_state_dict)
    weights = {name: value for name, value in entries.items() if isinstance(value, Tensor)}
    if not weights:
        raise InputError(f"{path} holds no weights: is it the right file?")
    return weights


def _is_pickle(path: Path) -> bool:
    """Return whether the file is one complete pickle. Its instructions are read and not run."""
    try:
        with path.open("rb") as file:
            return any(opcode.name == "STOP" for opcode, _, _ in pickletools.genops(file))
    except Exception:
        return False


def load_weights(model: nn.Module, path: str | Path, *, new_classifier: bool = False) -> None:
    """Load a checkpoint into a model, all of it or nothing.

    Args:
        model: Model of litvit or timm.
        path: Checkpoint file, see `read_state_dict`.
        new_classifier: Whether to accept a checkpoint for another number of classes. The model then keeps its own
            classifier.

    Raises:
        InputError: The checkpoint cannot be read, or is of another model or for other classes. The model is unchanged.
    """
    entries = read_state_dict(path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cfg = getattr(model, "pretrained_cfg", {})
    classifiers = cfg.get("classifier") or "head"
    classes = keep_own_classifier(entries, before, (classifiers,) if isinstance(classifiers, str) else classifiers)
    try:
        model.load_state_dict(entries)
    except RuntimeError as error:
        model.load_state_dict(before)
        name = cfg.get("architecture", type(model).__name__)
        raise InputError(f"{path} does not fit {name}: {mismatch(entries, name, error)}") from error
    if classes and not new_classifier:
        model.load_state_dict(before)
        held, wanted = classes
        raise InputError(
            f"{path} holds {held} classes, the model has {wanted}: build the model with {held} classes, or start from "
            "the checkpoint with a new classifier"
        )
    if classes:
        _logger.warning("%s holds %d classes, the model has %d: its classifier is new", path, *classes)


def keep_own_classifier(
    entries: dict[str, Tensor], own: dict[str, Tensor], classifiers: Sequence[str]
) -> tuple[int, int] | None:
    """Replace classifiers that differ from the model's only in the number of classes by the model's own.

    Args:
        entries: State dict to load, changed in place.
        own: State dict of the model.
        classifiers: Names of the model's classifiers, linear layers.

    Returns:
        Numbers of classes in `entries` and of the model if classifiers were replaced, else None.
    """
    name = f"{classifiers[0]}.weight"
    if name not in entries or name not in own or entries[name].shape[1:] != own[name].shape[1:]:
        return None
    held, wanted = len(entries[name]), len(own[name])
    if held == wanted:
        return None
    for name in (f"{classifier}.{part}" for classifier in classifiers for part in ("weight", "bias")):
        if name in own:
            entries[name] = own[name]
    return held, wanted


def mismatch(entries: dict[str, Tensor], name: str, error: RuntimeError) -> str:
    """Say in a few words why load_state_dict has refused weights.

    Args:
        entries: State dict that was refused.
        name: Name of the model that refused it.
        error: Error of load_state_dict.
    """
    likely = next(filter(None, (identify(entries) for identify in identifiers)), None)
    if likely and likely != name:
        return f"these are the weights of {likely}"
    # torch's first line names only the class. Each further line is one kind of mismatch.
    lines = [line.strip() for line in str(error).splitlines()[1:]]
    return textwrap.shorten(lines[0], 160, placeholder=" ...") if lines else str(error)
