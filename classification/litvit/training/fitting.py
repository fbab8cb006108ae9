"""Settings that fit the number of training images: what a recipe with `fit_to_data: true` and the flags leave open."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from timm.utils.distributed import world_info_from_env


class Choice(NamedTuple):
    """Settings that are chosen together."""

    settings: dict[str, Any]
    reason: str


def choose_settings(
    num_images: int, has_weights: bool, given: Mapping[str, Any] = {}, world_size: int | None = None
) -> list[Choice]:
    """Choose batch, schedule, learning rates and augmentation.

    Args:
        num_images: Number of training images.
        has_weights: Whether the model starts from trained weights.
        given: Settings that are given, by name. The choices fit them, and do not take their place.
        world_size: Number of processes, None for that of the launcher.
    """
    world_size = world_size or world_info_from_env()[2]
    accum_steps = given.get("grad_accum_steps", 1)

    # A power of two: about 12 steps per epoch, so that few images make enough steps, and 128 images at most.
    total_batch = 2 ** min(max(int(math.log2(num_images / 12)), 3), 7) if num_images >= 96 else min(8, num_images)
    batch_size = max(total_batch // (world_size * accum_steps), 1)
    batch_size = given.get("batch_size", max(batch_size // 2 * 2, 1))  # mixup takes pairs
    total_batch = batch_size * world_size * accum_steps

    # Ten times the images are seen about three times as often: 100 images 100 times, 10,000 images 10 times.
    epochs = min(max(round(1000 / math.sqrt(num_images)), 10), 100)
    if not has_weights:
        epochs = max(epochs * 3 // 2, 100)
    epochs = given.get("epochs", epochs)
    schedule = {"epochs": epochs, "warmup_epochs": min(epochs // 10, 5), "patience": max(epochs // 3, 5)}

    # AdamW's learning rate grows with the square root of the batch. Early layers of trained weights change little.
    lr = float(f"{5e-4 * math.sqrt(total_batch / 32):.1e}")
    if given.get("lr_base") is not None:
        lr = given["lr_base"] * total_batch / given.get("lr_base_size", 512)
    if given.get("lr") is not None:
        lr = given["lr"]
    rates = {"lr": lr, "layer_decay": 0.75 if has_weights else None, "warmup_lr": lr / 100, "min_lr": lr / 100}

    few, many = num_images < 1000, num_images >= 10_000
    mixes = many and not given.get("token_label")
    augmentation = {
        "scale": [0.4 if few else 0.25 if not many else 0.08, 1.0],
        "aa": "rand-m5-mstd0.5-inc1" if few else "rand-m7-mstd0.5-inc1" if not many else "rand-m9-mstd0.5-inc1",
        "reprob": 0.25 if many else 0.1,
        "mixup": 0.8 if mixes else 0.0,
        "cutmix": 1.0 if mixes else 0.0,
    }
    steps = max(num_images // total_batch, 1)
    return [
        Choice({"batch_size": batch_size}, f"{steps} steps per epoch"),
        Choice(schedule, f"{steps * epochs} steps, and an end where validation gets no better"),
        Choice(rates, "smaller for early layers, which are trained" if has_weights else "the same for all layers"),
        Choice(augmentation, "few images are learned best nearly whole" if few else "many images take more of it"),
    ]


def describe_choices(
    choices: Sequence[Choice], given: Mapping[str, Any], num_images: int, has_weights: bool
) -> list[str]:
    """Return sentences on what was chosen and why, without what is given."""
    start = "trained weights" if has_weights else "random weights"
    lines = []
    for choice in choices:
        chosen = {name: value for name, value in choice.settings.items() if name not in given}
        if chosen:
            shown = ", ".join(f"{name} {value}" for name, value in chosen.items())
            lines.append(f"chosen for {num_images} images and {start}: {shown} ({choice.reason})")
    return lines
