"""A model and its precision, as the flags of train.py and validate.py name them."""

import argparse
import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import timm
import torch
from torch import nn

import litvit  # noqa: F401 - registers the project's models with timm
from litvit.errors import InputError


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
    try:
        model = timm.create_model(settings.model, num_classes=num_classes, in_chans=settings.in_chans, **kwargs)
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


def choose_device(name: str | None) -> torch.device:
    """The device that `--device` names, by default CUDA where there is one.

    Raises:
        InputError: torch does not know it, or the machine does not have it.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
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
