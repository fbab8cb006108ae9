"""A model and its precision, as the flags of train.py and validate.py name them."""

import argparse
import contextlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import timm
import torch
from timm.data import resolve_data_config
from torch import nn

import litvit  # noqa: F401 - registers the project's models with timm
from litvit.errors import InputError
from litvit.models.backbone import Backbone

INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos", "box", "hamming", "random")


def build_model(settings: argparse.Namespace, num_classes: int) -> nn.Module:
    """Create the model that the settings name.

    Args:
        settings: `model`, `img_size`, `in_chans`, `model_kwargs`, and where there are `drop`, `drop_path`,
            `grad_checkpointing`.
        num_classes: of the classifier.

    Raises:
        InputError: the model does not take one of the settings.
    """
    kwargs = {
        "img_size": settings.img_size,
        "drop_rate": getattr(settings, "drop", None) or None,
        "drop_path_rate": getattr(settings, "drop_path", None) or None,
        **settings.model_kwargs,
    }
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    if "features_only" in kwargs:
        raise InputError("features_only is no classifier: leave it out of --model-kwargs")
    try:
        model = timm.create_model(settings.model, num_classes=num_classes, in_chans=settings.in_chans, **kwargs)
        if isinstance(model, Backbone) and settings.img_size and settings.img_size < 32:
            raise InputError(f"images must have 32 pixels or more, not --img-size {settings.img_size}")
        if getattr(settings, "grad_checkpointing", False):
            model.set_grad_checkpointing(True)
    except TypeError as error:
        if "img_size" in kwargs and "img_size" in str(error):  # a model that takes any size
            del kwargs["img_size"]
            return build_model(argparse.Namespace(**{**vars(settings), "img_size": None}), num_classes)
        raise InputError(f"{settings.model}: {error}") from None
    except (ValueError, AssertionError, RuntimeError) as error:
        raise InputError(f"{settings.model}: {' '.join(str(error).split())}") from None
    return model


def data_settings(settings: argparse.Namespace, model: nn.Module) -> dict:
    """timm's data configuration (input_size, mean, std, interpolation, crop_pct) from settings and model.

    Raises:
        InputError: mean or std for other channels, or that no image can be normalised with.
    """
    for name in ("mean", "std"):
        values = getattr(settings, name)
        if values is not None and len(values) not in (1, settings.in_chans):
            raise InputError(f"--{name} has {len(values)} values, the images {settings.in_chans} channels (--in-chans)")
    if settings.std is not None and min(settings.std) <= 0:
        raise InputError(f"--std must be positive, not {settings.std}")
    if settings.crop_pct is not None and settings.crop_pct <= 0:
        raise InputError(f"--crop-pct must be positive, not {settings.crop_pct}")
    config = resolve_data_config(vars(settings), model=model)
    for name in ("mean", "std"):
        if len(config[name]) != settings.in_chans:
            raise InputError(
                f"--in-chans {settings.in_chans} needs --mean and --std: the model's have {len(config[name])}"
            )
    if config["interpolation"] not in INTERPOLATIONS:
        raise InputError(f"--interpolation is one of {', '.join(INTERPOLATIONS)}, not {config['interpolation']}")
    return config


def choose_device(name: str | None) -> torch.device:
    """The device that `--device` names, by default CUDA where there is one.

    Raises:
        InputError: torch does not know it, or the machine does not have it.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "meta":
            raise RuntimeError("a model cannot compute there")
        if device.type != "cuda" or "LOCAL_RANK" not in os.environ:
            torch.empty(0, device=device)
        elif int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():  # each process gets a GPU of its own, later
            raise RuntimeError(f"this machine has {torch.cuda.device_count()} GPUs, fewer than there are processes")
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).strip().splitlines()[0]}") from None
    return device


def autocast_context(settings: argparse.Namespace, device: torch.device) -> Callable[[], AbstractContextManager]:
    """What to run a forward pass in: mixed precision as `amp` and `amp_dtype` say, or nothing.

    float16 is a GPU's: on a CPU, a recipe that asks for it trains in float32.
    """
    if not settings.amp or (settings.amp_dtype == "float16" and device.type == "cpu"):
        return contextlib.nullcontext
    return partial(torch.autocast, device.type, getattr(torch, settings.amp_dtype))
