"""Checkpoints: reading them safely, published names and layouts to ours, position tables to other sizes."""

import logging
import math
import pickle
import pickletools
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import create_model, list_models
from timm.models import load_state_dict as timm_load_state_dict
from torch import Tensor, nn

from litvit.errors import InputError

_logger = logging.getLogger(__name__)

# Published names of LIT-Ti, of LIT-S/M/B, of LVT. The number of a merging module, and of LIT-Ti's stages, starts at 1.
_PUBLISHED_NAMES = [
    (re.compile(r"^patch_embed1\.(.*)"), lambda m: f"patch_embed.{m[1]}"),
    (re.compile(r"^patch_embed([2-4])\.(.*)"), lambda m: f"stages.{int(m[1]) - 1}.downsample.{m[2]}"),
    (re.compile(r"^pos_embed([1-4])$"), lambda m: f"stages.{int(m[1]) - 1}.pos_embed"),
    (re.compile(r"^block([1-4])\.(.*)"), lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}"),
    (re.compile(r"^layers\.(\d+)\.downsample\.(.*)"), lambda m: f"stages.{int(m[1]) + 1}.downsample.{m[2]}"),
    (re.compile(r"^layers\.(\d+)\.(blocks\..*)"), lambda m: f"stages.{m[1]}.{m[2]}"),
    (re.compile(r"^norm([0-3])\.(.*)"), lambda m: f"out_norms.{m[1]}.{m[2]}"),
    (re.compile(r"^backbone\.(\d)\.0\.(.*)"), lambda m: f"stages.{m[1]}.patch_embed.{m[2]}"),
    (re.compile(r"^backbone\.(\d)\.1\.(.*)"), lambda m: f"stages.{m[1]}.blocks.{m[2]}"),
    (re.compile(r"^post_network\.(.*)"), lambda m: f"class_blocks.{m[1]}"),
]
_PUBLISHED_PARTS = [
    (".downsample.dconv.conv_offset.", ".downsample.offset."),
    (".downsample.dconv.", ".downsample.conv."),
    (".downsample.norm_layer.", ".downsample.norm."),
    (".attn.weight.weight", ".attn.v"),
    (".attn.ds.", ".attn.atrous."),
    (".attn.sr.", ".attn.reduce."),
    (".mlp.depconv.", ".mlp.conv."),
]


def resize_position_table(table: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize an absolute position table bilinearly, in float32.

    Args:
        table: (1, h, w, C).
        size: (h, w) wanted.

    Returns:
        (1, *size, C); `table` itself where nothing changes.
    """
    if tuple(table.shape[1:3]) == tuple(size):
        return table
    with torch.autocast(table.device.type, enabled=False):
        resized = F.interpolate(table.permute(0, 3, 1, 2).float(), size=size, mode="bilinear").permute(0, 2, 3, 1)
    return resized.to(table.dtype)


def resize_relative_table(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize a relative position table bicubically, in float32.

    Args:
        table: (heads, 2h - 1, 2w - 1).
        grid: (h, w) of the map wanted.

    Returns:
        (heads, 2h - 1, 2w - 1) of that map; `table` itself where nothing changes.
    """
    size = tuple(2 * side - 1 for side in grid)
    if tuple(table.shape[1:]) == size:
        return table
    # Interpolation is linear, one axis after the other. As two matrix products its gradient needs no atomic additions,
    # which deterministic mode refuses; the matrices are what interpolation makes of the identity.
    with torch.autocast(table.device.type, enabled=False):
        rows, columns = (
            F.interpolate(torch.eye(old, device=table.device)[None, None], size=(new, old), mode="bicubic")[0, 0]
            for old, new in zip(table.shape[1:], size, strict=True)
        )
        return (rows @ table.float() @ columns.T).to(table.dtype)


def to_own_names(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a published model's entries to ours; a state dict with our names comes back as it is.

    LIT-Ti's class position, the first row of its last position table, becomes an entry of its own. Indices that can be
    computed are dropped, and so are the norms that LVT's dense checkpoints hold and nothing uses. LVT's 1 x 1
    convolutions become linear layers, and the two positions of its 9 x 9 attention change places.
    """
    if not any(name.startswith(("patch_embed1.", "layers.0.blocks.", "backbone.0.0.")) for name in state_dict):
        return dict(state_dict)
    own = {}
    for published, value in state_dict.items():
        if published.endswith("relative_position_index") or published.startswith("downstream_norms."):
            continue
        name = published
        for pattern, replacement in _PUBLISHED_NAMES:
            name = pattern.sub(replacement, name)
        for part, replacement in _PUBLISHED_PARTS:
            name = name.replace(part, replacement)
        if name.endswith(".pos_embed") and value.dim() == 3:
            side = math.isqrt(value.shape[1])
            if value.shape[1] == side * side + 1:
                own["cls_pos_embed"], value = value[:, :1], value[:, 1:]
            value = value.unflatten(1, (side, -1))
        elif name.endswith("relative_position_bias_table") and value.dim() == 2:
            value = value.t().unflatten(1, (math.isqrt(value.shape[0]), -1))
        elif name.endswith(".attn.v"):
            value = value.view(9, -1, value.shape[1])
        elif ".attn.attn." in name:
            value = value.unflatten(0, (-1, 9, 9)).transpose(1, 2).flatten(0, 2)
        elif name.endswith((".mlp.fc1.weight", ".mlp.fc2.weight")):
            value = value.flatten(1)
        own[name] = value
    return own


def adapt_state_dict(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    """load_state_dict pre-hook of LIT and LVT: published names to ours, position tables to the model's size.

    Entries of parts that the model was built without are dropped; a classifier for another number of classes gives way
    to the model's own, with a warning.

    Args:
        model: the model that loads.
        state_dict: changed in place (torch hands a copy of the caller's).
        prefix: where the model's entries lie in it.
    """
    entries = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    for name in entries:
        del state_dict[prefix + name]
    entries = {name: value for name, value in to_own_names(entries).items() if not _is_left_out(model, name)}
    own = model.state_dict()
    classes = _keep_own_classifier(entries, own, model.classifiers)
    if classes:
        _logger.warning("the checkpoint holds %d classes, the model has %d: its classifier starts afresh", *classes)
    for name, value in entries.items():
        if name in own and value.shape != own[name].shape:
            shape = own[name].shape
            if name.endswith(".pos_embed") and value.dim() == 4:
                value = resize_position_table(value, tuple(shape[1:3]))
            elif name.endswith("relative_position_bias_table") and value.dim() == 3:
                value = resize_relative_table(value, tuple((side + 1) // 2 for side in shape[1:]))
        state_dict[prefix + name] = value


def _is_left_out(model: nn.Module, name: str) -> bool:
    part, _, rest = name.partition(".")
    if part in ("norm", *model.classifiers):
        return isinstance(getattr(model, part), nn.Identity)
    if part in ("cls_token", "cls_pos_embed", "class_blocks"):
        return model.cls_token is None
    return part == "stages" and int(rest.partition(".")[0]) >= len(model.stages)


def _keep_own_classifier(
    entries: dict[str, Tensor], own: dict[str, Tensor], classifiers: Sequence[str]
) -> tuple[int, int] | None:
    """Put the model's own classifiers in `entries` if theirs differ in the number of classes alone.

    Returns:
        (classes in entries, classes of the model) if so.
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


def read_checkpoint(path: str | Path, read: Callable[[str], Any]) -> Any:
    """Read a checkpoint file with a reader that runs no code, or say in one line why it cannot be read.

    Args:
        path: the file.
        read: takes the path; torch.load with weights_only=True, or safetensors.

    Returns:
        What `read` returns.

    Raises:
        InputError: no such file, a folder, an empty or truncated file, no checkpoint, or one that holds code.
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
    """Read the weights of a checkpoint without running code that it may hold.

    Args:
        path: a .safetensors file, or one of torch.save with a state dict, bare or under state_dict_ema, model_ema,
            state_dict or model (the first there is).

    Returns:
        Name to tensor, on the CPU, without the prefixes of DistributedDataParallel and torch.compile.

    Raises:
        InputError: no such file, or no checkpoint that can be read safely.
    """
    entries = read_checkpoint(path, timm_load_state_dict)
    weights = {name: value for name, value in entries.items() if isinstance(value, Tensor)}
    if not weights:
        raise InputError(f"{path} holds no weights: is it the right file?")
    return weights


def _is_pickle(path: Path) -> bool:
    """Whether the file is one whole pickle, by its instructions, none of which is run."""
    try:
        with path.open("rb") as file:
            return any(opcode.name == "STOP" for opcode, _, _ in pickletools.genops(file))
    except Exception:
        return False


def load_weights(model: nn.Module, path: str | Path, *, new_classifier: bool = False) -> None:
    """Load a checkpoint into a model, all of it or nothing.

    Args:
        model: a model of litvit or timm.
        path: a checkpoint, see `read_state_dict`.
        new_classifier: accept a checkpoint for another number of classes; the model keeps its own classifier.

    Raises:
        InputError: a checkpoint that cannot be read, of another model, or for other classes. The model is as it was.
    """
    entries = read_state_dict(path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cfg = getattr(model, "pretrained_cfg", {})
    classifiers = cfg.get("classifier") or "head"
    classes = _keep_own_classifier(entries, before, (classifiers,) if isinstance(classifiers, str) else classifiers)
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
        _logger.warning("%s holds %d classes, the model has %d: its classifier starts afresh", path, *classes)


def mismatch(entries: dict[str, Tensor], name: str, error: RuntimeError) -> str:
    """Say in a few words why load_state_dict has refused `entries` for the model `name`."""
    likely = recognise(entries)
    if likely and likely != name:
        return f"these are the weights of {likely}"
    # torch's first line names the class alone; each further one a kind of mismatch.
    lines = [line.strip() for line in str(error).splitlines()[1:]]
    return textwrap.shorten(lines[0], 160, placeholder=" ...") if lines else str(error)


def recognise(entries: dict[str, Tensor]) -> str | None:
    """Return the name of the model of litvit that has the layers in `entries`, None if there is none."""
    layers = _layer_shapes(to_own_names(entries))
    for name in list_models(["lit_*", "lvt*"]):
        with torch.device("meta"):
            model = create_model(name)
        if layers == _layer_shapes(model.state_dict()):
            return name
    return None


def _layer_shapes(entries: dict[str, Tensor]) -> dict[str, torch.Size]:
    """Shapes of the linear layers and convolutions, which neither image size nor number of classes changes."""
    return {
        name: value.shape
        for name, value in entries.items()
        if name.endswith(".weight") and value.dim() > 1 and not name.startswith(("head.", "aux_head."))
    }
