"""Parameter groups, learning rates and schedule of the published recipes, on timm's optimizers and schedulers."""

import argparse
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.optim._param_groups import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from litvit.dtm import DeformableTokenMerging
from litvit.errors import InputError


def parameter_groups(
    model: nn.Module, weight_decay: float, *, offset_lr_scale: float = 0.01, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Group parameters by weight decay and learning rate factor.

    No decay on 1-D parameters, biases and what `model.no_weight_decay()` names. The offset convolutions of the merging
    modules, weight and bias, learn at `offset_lr_scale` times the learning rate of the rest: schedulers of timm apply a
    group's `lr_scale` at every step.

    Args:
        model: any timm model.
        weight_decay: of the decayed groups.
        offset_lr_scale: 0.01 as published.
        layer_decay: learning rate factor a layer, counted from the last; None for none.

    Returns:
        Groups for an optimizer.
    """
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    if layer_decay is None:
        groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=exempt)
    else:
        groups = param_groups_layer_decay(model, weight_decay, no_weight_decay_list=exempt, layer_decay=layer_decay)
    merging = (module for module in model.modules() if isinstance(module, DeformableTokenMerging))
    offsets = {id(parameter) for module in merging for parameter in module.offset.parameters()}
    split = []
    for group in groups:
        scale = group.get("lr_scale", 1.0)
        parts = {scale: [], scale * offset_lr_scale: []}
        for parameter in group["params"]:
            parts[scale * offset_lr_scale if id(parameter) in offsets else scale].append(parameter)
        shared = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        split += [{**shared, "params": params, "lr_scale": factor} for factor, params in parts.items() if params]
    return split


def learning_rates(settings: argparse.Namespace, total_batch: int) -> dict[str, float]:
    """Learning rates of a run: peak, first and last.

    `lr` outright, or `lr_base` scaled linearly with the total batch; `warmup_lr` and `min_lr` outright, or their
    `*_base` scaled alike where the recipe has one.

    Args:
        settings: flags of train.py.
        total_batch: images an update, over all processes and passes.

    Returns:
        `lr`, `warmup_lr`, `min_lr`.
    """
    scale = total_batch / settings.lr_base_size

    def outright_or_scaled(value: float | None, base: float | None) -> float:
        return base * scale if base is not None else value

    return {
        "lr": settings.lr if settings.lr is not None else settings.lr_base * scale,
        "warmup_lr": outright_or_scaled(settings.warmup_lr, settings.warmup_lr_base),
        "min_lr": outright_or_scaled(settings.min_lr, settings.min_lr_base),
    }


def create_optimizer(model: nn.Module, settings: argparse.Namespace, lr: float) -> torch.optim.Optimizer:
    """The optimizer that the settings name, over `parameter_groups`.

    Raises:
        InputError: timm knows no such optimizer, or it does not take an option that was given.
    """
    groups = parameter_groups(
        model, settings.weight_decay, offset_lr_scale=settings.offset_lr_scale, layer_decay=settings.layer_decay
    )
    options = {"eps": settings.opt_eps, "betas": tuple(settings.opt_betas) if settings.opt_betas else None}
    if settings.opt.lower() in ("adam", "adamw"):
        options["fused"] = True  # torch's one-kernel step: a sixth of a small model's update on a CPU
    try:
        return create_optimizer_v2(
            groups,
            opt=settings.opt,
            lr=lr,
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
            **{name: value for name, value in options.items() if value is not None},
        )
    except (ValueError, TypeError, AssertionError, IndexError) as error:
        raise InputError(f"--opt {settings.opt}: {error}") from None


def create_scheduler(
    optimizer: torch.optim.Optimizer, settings: argparse.Namespace, rates: dict[str, float], updates_per_epoch: int
) -> tuple[Scheduler, int]:
    """The schedule that the settings name.

    Args:
        optimizer: at the peak learning rate.
        settings: flags of train.py.
        rates: from `learning_rates`.
        updates_per_epoch: optimizer updates an epoch.

    Returns:
        Scheduler, and the number of epochs with the cool-down.

    Raises:
        InputError: timm knows no such scheduler, or a warm-up as long as the schedule.
    """
    if settings.warmup_epochs >= settings.epochs and settings.sched != "none":
        raise InputError(
            f"--warmup-epochs {settings.warmup_epochs} leaves nothing of --epochs {settings.epochs}: make it shorter"
        )
    if settings.sched == "plateau":
        raise InputError("--sched plateau depends on what a resumed run has forgotten: choose another")
    try:
        scheduler, epochs = create_scheduler_v2(
            optimizer,
            sched=settings.sched,
            num_epochs=settings.epochs,
            warmup_epochs=settings.warmup_epochs,
            cooldown_epochs=settings.cooldown_epochs,
            warmup_lr=rates["warmup_lr"],
            min_lr=rates["min_lr"],
            step_on_epochs=not settings.sched_on_updates,
            updates_per_epoch=updates_per_epoch,
        )
    except ValueError as error:
        raise InputError(f"--sched {settings.sched}: {error}") from None
    if scheduler is None:
        raise InputError(f"--sched {settings.sched}: name one of timm's (cosine, step, poly, constant ...)")
    return scheduler, epochs
