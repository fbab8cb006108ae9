"""Checkpoints: reading them without running code, and loading them into a model, all of it or nothing."""

import contextlib
import logging
import pickle
import pickletools
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from litvit.archives import begins_with, verify_archive
from litvit.downloads import fetch, forget
from litvit.errors import InputError

_logger = logging.getLogger(__name__)

# Where a file may hold weights, first choice first.
PLACES = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict", "net")


class _LeftOut:
    """Stand-in for what a file holds beside weights. It takes any arguments and keeps nothing."""

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# What others save beside weights, and torch.load(weights_only=True) refuses. Nothing of it is built: a NumPy array
# alone can be built of bytes that are taken for addresses. The names are those of all versions of NumPy and Python.
HARMLESS = tuple(
    (_LeftOut, name)
    for name in (
        *("argparse.Namespace", "types.SimpleNamespace", "builtins.frozenset", "torch.torch_version.TorchVersion"),
        *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
        *(
            f"{module}.{name}"
            for module in ("pathlib", "pathlib._local")
            for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
        ),
        *("numpy.ndarray", "numpy.dtype"),
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    )
)

# Functions that name the model which weights belong to, None if they do not know it. `litvit.models` adds its own.
identifiers: list[Callable[[dict[str, Tensor]], str | None]] = []


def read_checkpoint(path: str | Path, read: Callable[[str], Any]) -> Any:
    """Read a checkpoint file by a function that runs no code in it.

    Args:
        path: Checkpoint file, or a link to it.
        read: Function of the path, such as torch.load with weights_only=True, or a reader of safetensors.

    Returns:
        The result of `read`.

    Raises:
        InputError: The file is missing, a folder, empty, truncated, no checkpoint, or contains code.
    """
    path = fetch(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder: name the checkpoint in it")
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}")
    if not path.stat().st_size:
        raise InputError(f"{path} is empty: fetch or save the checkpoint again")
    try:
        if begins_with(path, b"PK\x03\x04"):
            verify_archive(path)
        return read(str(path))
    except InputError:
        raise
    # A broken file can make the readers raise nearly anything.
    except Exception as error:
        # torch says so of a class or function that is not on its list.
        text = str(error) if isinstance(error, pickle.UnpicklingError) else ""
        refused = re.search(r"GLOBAL (\S+)|global |reduce|allowlisted", text)
        if refused or _is_pickle(path):
            held = f" ({refused[1]})" if refused and refused[1] else ""
            raise InputError(
                f"{path} is a plain pickle or holds code{held}, which was not run: ask for weights alone (.safetensors)"
            ) from error
        forget(path)
        raise InputError(f"{path} is no checkpoint, or a truncated one: fetch or save it again") from error


def read_state_dict(path: str | Path, model: nn.Module | None = None) -> dict[str, Tensor]:
    """Read the weights of a checkpoint without running code in it.

    Args:
        path: File in the .safetensors format, or of torch.save with a state dict, bare or under a key: under the first
            of PLACES that holds weights, or with `model` under any.
        model: Model that the weights are for. The names in the file may begin with a prefix, as in a checkpoint of
            Lightning ("model.") or of a detector ("backbone."). It is the one which makes most of the names those of
            the model. Weights without it are left out, with a warning.

    Returns:
        Tensors by name, on the CPU, without the prefixes of DistributedDataParallel and torch.compile. With `model`
        under the model's names where these were published under others.

    Raises:
        InputError: The file is missing, no checkpoint that can be read safely, or holds weights of the model twice.
    """
    entries = read_checkpoint(path, _read_entries)
    places = (_tensors(entries[place]) for place in PLACES if isinstance(entries.get(place), dict))
    weights = next(filter(None, places), None) or _tensors(entries)
    if not weights:
        raise InputError(f"{path} holds no weights: is it the right file?")
    own_names = None if model is None else _without_prefix(weights, model, path)
    return own_names or {name.removeprefix("module."): value for name, value in weights.items()}


def _read_entries(path: str) -> dict:
    if path.endswith(".safetensors"):
        return load_file(path)
    with _stand_ins():
        entries = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(entries, dict):
        raise TypeError(type(entries).__name__)
    return entries


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """Let torch read HARMLESS names in a block, in place of what the program may have allowed under them."""
    if not hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):  # before torch 2.6 names are the classes'
        yield
        return
    before = torch.serialization.get_safe_globals()
    names = {name for _, name in HARMLESS}
    others = [
        entry
        for entry in before
        if (entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}") not in names
    ]
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([*others, *HARMLESS])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _tensors(entries: Any) -> dict[str, Tensor]:
    """Return the tensors in a dict of dicts, named by the keys that lead to them, joined by dots."""
    tensors, seen, left = {}, set(), [("", entries)]
    while left:
        prefix, value = left.pop()
        if isinstance(value, Tensor):
            tensors[prefix.replace("_orig_mod.", "")] = value
        elif isinstance(value, dict) and id(value) not in seen:  # a dict may hold another many times, or itself
            seen.add(id(value))
            named = [
                (f"{prefix}.{key}" if prefix else key, item) for key, item in value.items() if isinstance(key, str)
            ]
            left += reversed(named)
    return tensors


def _without_prefix(weights: dict[str, Tensor], model: nn.Module, path: str | Path) -> dict[str, Tensor] | None:
    """Return weights under the names of a model, see `read_state_dict`. None if the model has none of the names."""
    own, translate = model.state_dict().keys(), getattr(model, "from_published", dict)
    held = Counter(prefix for name in weights for prefix in accumulate(re.findall(r"[^.]*\.", name), initial=""))
    candidates = {
        prefix: translate({name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)})
        for prefix, number in held.items()
        if 2 * number >= len(own)
    }
    fits = {prefix: len(own & candidate.keys()) for prefix, candidate in candidates.items()}
    prefix = max(fits, key=fits.get, default=None)
    if prefix is None or not fits[prefix]:
        return None
    copies = [other for other, number in fits.items() if number == fits[prefix]]
    if len(copies) > 1 and 2 * fits[prefix] >= len(own):
        names = " and ".join(f"'{other}'" for other in copies)
        raise InputError(f"{path} holds the model's weights under {names}: save those that you want alone")
    left_out = [name for name in weights if not name.startswith(prefix)]
    if left_out:
        _logger.warning(
            "%s: the model's names follow '%s', left out: %d without it (%s ...)",
            path,
            prefix,
            len(left_out),
            left_out[0],
        )
    return candidates[prefix]


def _is_pickle(path: Path) -> bool:
    """Return whether the file is one complete pickle. Its instructions are read and not run."""
    if begins_with(path, pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)):
        return False  # torch's format before version 1.6: several pickles, then the weights
    try:
        with path.open("rb") as file:
            return any(opcode.name == "STOP" for opcode, _, _ in pickletools.genops(file))
    except Exception:
        return False


def identify_file(path: str | Path) -> str | None:
    """Return the name of the model that a checkpoint file holds the weights of, None if no model here knows them.

    Raises:
        InputError: The checkpoint cannot be read.
    """
    return _identify(read_state_dict(path))


def _identify(entries: dict[str, Tensor]) -> str | None:
    return next(filter(None, (identify(entries) for identify in identifiers)), None)


def load_weights(model: nn.Module, path: str | Path, *, new_classifier: bool = False) -> None:
    """Load a checkpoint into a model, all of it or nothing.

    Args:
        model: Model of litvit or timm.
        path: Checkpoint file, see `read_state_dict`.
        new_classifier: Whether to start from a checkpoint for another number of classes or of image channels. The model
            then keeps its own classifier, and the weights of its first convolution are adapted as timm does.

    Raises:
        InputError: The checkpoint cannot be read, or is of another model, or for other classes or channels. The model
            is unchanged.
    """
    entries = read_state_dict(path, model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cfg = getattr(model, "pretrained_cfg", {})
    classes = keep_own_classifier(entries, before, _classifiers(model))
    channels = adapt_channels(entries, model)
    try:
        model.load_state_dict(entries)
    except RuntimeError as error:
        model.load_state_dict(before)
        name = cfg.get("architecture", type(model).__name__)
        raise InputError(f"{path} does not fit {name}: {mismatch(entries, name, error)}") from error
    for what, differ in (("classes", classes), ("image channels", channels)):
        if differ and not new_classifier:
            model.load_state_dict(before)
            held, wanted = differ
            raise InputError(
                f"{path} holds {held} {what}, the model has {wanted}: build the model with {held} {what}, or start a "
                "training from the checkpoint"
            )
    if classes:
        _logger.warning("%s holds %d classes, the model has %d: its classifier is new", path, *classes)
    if channels:
        _logger.warning(
            "%s is for %d image channels, the model for %d: its first convolution is adapted", path, *channels
        )


def count_classes(path: str | Path, model: nn.Module) -> int | None:
    """Return the number of classes of a checkpoint, None if it has no classifier of the model's name.

    Args:
        path: Checkpoint file, see `read_state_dict`.
        model: Model that the weights are for, with any number of classes.
    """
    weight = read_state_dict(path, model).get(f"{_classifiers(model)[0]}.weight")
    return None if weight is None else len(weight)


def _classifiers(model: nn.Module) -> Sequence[str]:
    """Return the names of a model's classifiers, linear layers."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or getattr(model, "classifiers", "head")
    return (names,) if isinstance(names, str) else names


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


def adapt_channels(entries: dict[str, Tensor], model: nn.Module) -> tuple[int, int] | None:
    """Adapt the weights of the convolutions that read the image to the model's image channels, as timm does.

    One channel gets the sum of those that the weights have. Other numbers get them in turn, scaled.

    Args:
        entries: State dict to load, changed in place.
        model: Model. Its pretrained_cfg names these convolutions. Without one it is the first.

    Returns:
        Numbers of image channels of `entries` and of the model if weights were adapted, else None.
    """
    convolutions = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    first = getattr(model, "pretrained_cfg", {}).get("first_conv", next(iter(convolutions), None)) or ()
    adapted = None
    for name in (first,) if isinstance(first, str) else first:
        weight, conv = entries.get(f"{name}.weight"), convolutions.get(name)
        if weight is None or conv is None or weight.dim() != 4 or weight.shape[1] == conv.weight.shape[1]:
            continue
        # A convolution may read several pixels of the image as channels.
        wanted = getattr(model, "in_chans", conv.in_channels)
        held, rest = divmod(weight.shape[1] * conv.groups * wanted, conv.in_channels)
        if rest or not held or weight.shape[1] % held or (wanted > 1 and weight.shape[1] > held):
            continue  # loading names it
        pixels = weight.detach().float().unflatten(1, (-1, held))  # (O, pixels, held, kh, kw)
        if wanted == 1:
            new = pixels.sum(2)
        else:
            new = pixels[:, 0].repeat(1, -(-wanted // held), 1, 1)[:, :wanted] * (held / wanted)
        entries[f"{name}.weight"] = new.to(weight.dtype)
        adapted = held, wanted
    return adapted


def mismatch(entries: dict[str, Tensor], name: str, error: RuntimeError) -> str:
    """Say in a few words why load_state_dict has refused weights.

    Args:
        entries: State dict that was refused.
        name: Name of the model that refused it.
        error: Error of load_state_dict.
    """
    likely = _identify(entries)
    if likely and likely != name:
        return f"these are the weights of {likely}"
    # torch's first line names only the class. Each further line is one kind of mismatch.
    lines = [line.strip() for line in str(error).splitlines()[1:]]
    return textwrap.shorten(lines[0], 160, placeholder=" ...") if lines else str(error)
