"""Files of a run that must never be half-written: the full checkpoint, the best weights, the settings."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import yaml

from litvit.checkpoints import read_checkpoint
from litvit.errors import InputError

CHECKPOINT = "last.pth"
BEST_WEIGHTS = "model_best.safetensors"
SETTINGS = "settings.yaml"


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file beside `path`, flush it to the disk, and rename it into place.

    Args:
        path: the file to make or replace; it holds the old content or the new, never a part.
        write: writes the file at the path it is given.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Save the full state of a run (tensors, numbers, strings, lists and dicts of them)."""
    replace_file(path, lambda temporary: torch.save(state, temporary))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load what `save_checkpoint` saved.

    Raises:
        InputError: not there, truncated, holds code, or another kind of file.
    """
    state = read_checkpoint(path, partial(torch.load, map_location="cpu", weights_only=True))
    if not isinstance(state, dict) or "optimizer" not in state:
        raise InputError(f"{path} is not a full checkpoint of a run: weights alone go to --initial-checkpoint")
    return state


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
    """What a run of ours wrote about the model into its weights' header: model, num_classes, img_size, mean, ...

    Args:
        path: any checkpoint; None for none.

    Returns:
        The description; empty for files of others, and for files that cannot be read (loading them will say why).
    """
    if path is None or not str(path).endswith(".safetensors"):
        return {}
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            return json.loads((file.metadata() or {}).get("litvit", "{}"))
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
    if not (folder / CHECKPOINT).is_file() or (path != folder and path.name != CHECKPOINT):
        raise InputError(f"--resume {resume}: no run there; name a run's folder, which holds {CHECKPOINT}")
    return folder
