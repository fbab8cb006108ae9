"""Parameter groups, learning rates and schedule of the published recipes, on timm's optimizers and schedulers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from litvit.dtm import offset_parameters
from litvit.errors import InputError
from litvit.settings import setting


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule."""

    epochs: int = setting(300, "N", "epochs of the schedule, including the warm-up")
    warmup_epochs: int = setting(5, "N", "epochs of linear warm-up from --warmup-lr")
    cooldown_epochs: int = setting(0, "N", "further epochs at --min-lr")
    opt: str = setting("adamw", "NAME", "optimizer of timm")
    opt_eps: float | None = setting(None, "X", "epsilon of the optimizer")
    opt_betas: Sequence[float] | None = setting(None, "X", "betas of the optimizer", nargs="+")
    momentum: float = setting(0.9, "X", "momentum of the optimizer, if it has one")
    weight_decay: float = setting(0.05, "X", "none on 1-D parameters and the model's exceptions")
    layer_decay: float | None = setting(None, "X", "learning rate factor per layer, from the last (fine-tuning)")
    offset_lr_scale: float = setting(0.01, "X", "learning rate factor of merging offsets")
    clip_grad: float | None = setting(None, "NORM", "largest norm of the gradients")
    grad_accum_steps: int = setting(1, "N", "micro-batches per optimizer step")
    lr: float | None = setting(None, "X", "learning rate (--lr-base x total batch / --lr-base-size)")
    lr_base: float = setting(5e-4, "X", "learning rate at --lr-base-size")
    lr_base_size: int = setting(512, "N", "total batch of --lr-base and --*-lr-base")
    min_lr: float = setting(1e-5, "X", "final learning rate")
    min_lr_base: float | None = setting(None, "X", "the same, scaled with the total batch")
    warmup_lr: float = setting(1e-6, "X", "first learning rate")
    warmup_lr_base: float | None = setting(None, "X", "the same, scaled with the total batch")
    sched: str = setting("cosine", "NAME", "scheduler of timm")
    sched_on_updates: bool = setting(False, None, "step the scheduler every step, not every epoch")


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    lr: float,
    offset_lr_scale: float = 0.01,
    layer_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Group parameters by weight decay and learning rate, for optimizers of torch.

    Schedulers of torch that multiply each group's rate keep the ratio. Those that set the same rate for all groups do
    not: OneCycleLR takes a list of `max_lr`, and a smallest rate such as `eta_min` is the same for all.

    No decay on 1-D parameters, biases and what `model.no_weight_decay()` names. The offset convolutions of the merging
    modules, weight and bias, learn at `offset_lr_scale` times the learning rate of the rest.

    Args:
        model: Any model of timm's interface.
        weight_decay: Weight decay of the decayed groups.
        lr: Learning rate of the parameters that have no factor of their own.
        offset_lr_scale: Learning rate factor of the offsets, 0.01 as published.
        layer_decay: Learning rate factor per layer, counted from the last; None for none.

    Returns:
        Groups with a learning rate each.
    """
    groups = _scaled_groups(model, weight_decay, offset_lr_scale, layer_decay)
    for group in groups:
        group["lr"] = lr * group.pop("lr_scale")
    return groups


def _scaled_groups(
    model: nn.Module, weight_decay: float, offset_lr_scale: float, layer_decay: float | None
) -> list[dict[str, Any]]:
    """Group parameters as `parameter_groups` does, with an `lr_scale` each, which timm's schedulers alone apply."""
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    if layer_decay is None:
        groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=exempt)
    else:
        groups = param_groups_layer_decay(model, weight_decay, no_weight_decay_list=exempt, layer_decay=layer_decay)
    offsets = set(map(id, offset_parameters(model)))
    split = []
    for group in groups:
        scale = group.get("lr_scale", 1.0)
        parts = {scale: [], scale * offset_lr_scale: []}
        for parameter in group["params"]:
            parts[scale * offset_lr_scale if id(parameter) in offsets else scale].append(parameter)
        shared = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        split += [{**shared, "params": params, "lr_scale": factor} for factor, params in parts.items() if params]
    return split


def learning_rates(config: OptimConfig, total_batch: int) -> dict[str, float]:
    """Return the learning rates of a run: peak, first and last.

    The peak is `lr`, or `lr_base` scaled linearly with the total batch. The others are `warmup_lr` and `min_lr`, or
    `warmup_lr_base` and `min_lr_base` scaled in the same way if they are set.

    Args:
        config: Optimizer and schedule.
        total_batch: Number of images per optimizer step, over all processes and micro-batches.

    Returns:
        `lr`, `warmup_lr`, `min_lr`.
    """
    scale = total_batch / config.lr_base_size

    def fixed_or_scaled(value: float | None, base: float | None) -> float:
        return base * scale if base is not None else value

    return {
        "lr": config.lr if config.lr is not None else config.lr_base * scale,
        "warmup_lr": fixed_or_scaled(config.warmup_lr, config.warmup_lr_base),
        "min_lr": fixed_or_scaled(config.min_lr, config.min_lr_base),
    }


def create_optimizer(model: nn.Module, config: OptimConfig, lr: float) -> torch.optim.Optimizer:
    """Create an optimizer with the groups of `parameter_groups`, for a scheduler of `create_scheduler`.

    Args:
        model: Model to train.
        config: Optimizer and schedule.
        lr: Peak learning rate.

    Raises:
        InputError: timm knows no such optimizer, or it does not take an option that was given.
    """
    groups = _scaled_groups(model, config.weight_decay, config.offset_lr_scale, config.layer_decay)
    options = {"eps": config.opt_eps, "betas": tuple(config.opt_betas) if config.opt_betas else None}
    if config.opt.lower() in ("adam", "adamw"):
        options["fused"] = True  # one kernel per step: a sixth of a small model's step on a CPU
    try:
        return create_optimizer_v2(
            groups,
            opt=config.opt,
            lr=lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            **{name: value for name, value in options.items() if value is not None},
        )
    except (ValueError, TypeError, AssertionError, IndexError) as error:
        raise InputError(f"--opt {config.opt}: {error}") from error


def check_optimizer(config: OptimConfig, device: torch.device) -> None:
    """Step an optimizer of a small layer.

    Args:
        config: Optimizer to check.
        device: Device of the layer.

    Raises:
        InputError: an optimizer that needs more than gradients, such as adahessian, or another device.
    """
    layer = nn.Linear(2, 2, device=device)
    optimizer = create_optimizer(layer, replace(config, layer_decay=None), lr=1e-3)
    layer(torch.ones(2, 2, device=device)).sum().backward()
    try:
        optimizer.step()
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise InputError(f"--opt {config.opt} cannot step: {' '.join(str(error).split())}") from error


def create_optim(
    model: nn.Module, config: OptimConfig, total_batch: int, steps_per_epoch: int
) -> tuple[torch.optim.Optimizer, Scheduler, int, dict[str, float]]:
    """Create an optimizer and its schedule.

    Args:
        model: Model to train.
        config: Optimizer and schedule.
        total_batch: Number of images per optimizer step, over all processes and micro-batches.
        steps_per_epoch: Number of optimizer steps per epoch.

    Returns:
        Optimizer, scheduler, number of epochs including the cool-down, and the learning rates of `learning_rates`.
    """
    rates = learning_rates(config, total_batch)
    optimizer = create_optimizer(model, config, rates["lr"])
    return optimizer, *create_scheduler(optimizer, config, rates, steps_per_epoch), rates


def create_scheduler(
    optimizer: torch.optim.Optimizer, config: OptimConfig, rates: dict[str, float], steps_per_epoch: int
) -> tuple[Scheduler, int]:
    """Create a scheduler.

    Args:
        optimizer: Optimizer at the peak learning rate.
        config: Optimizer and schedule.
        rates: Learning rates from `learning_rates`.
        steps_per_epoch: Number of optimizer steps per epoch.

    Returns:
        Scheduler, and the number of epochs including the cool-down.

    Raises:
        InputError: timm knows no such scheduler, or a warm-up as long as the schedule.
    """
    if config.warmup_epochs >= config.epochs and config.sched != "none":
        raise InputError(
            f"--warmup-epochs {config.warmup_epochs} leaves nothing of --epochs {config.epochs}: make it shorter"
        )
    if config.sched == "plateau":
        raise InputError("--sched plateau depends on what a resumed run has forgotten: choose another")
    try:
        scheduler, epochs = create_scheduler_v2(
            optimizer,
            sched=config.sched,
            num_epochs=config.epochs,
            warmup_epochs=config.warmup_epochs,
            cooldown_epochs=config.cooldown_epochs,
            warmup_lr=rates["warmup_lr"],
            min_lr=rates["min_lr"],
            step_on_epochs=not config.sched_on_updates,
            updates_per_epoch=steps_per_epoch,
        )
    except ValueError as error:
        raise InputError(f"--sched {config.sched}: {error}") from error
    if scheduler is None:
        raise InputError(f"--sched {config.sched}: name one of timm's (cosine, step, poly, constant ...)")
    return scheduler, epochs
