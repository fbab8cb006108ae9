"""The settings of a run, in groups that are defined next to the code that uses them."""

import argparse
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from litvit.data.augment import AugmentConfig
from litvit.data.readers import DataConfig
from litvit.errors import InputError
from litvit.runs.folder import RunConfig, interval
from litvit.settings import take
from litvit.training.flags import FRACTIONS, NOT_NEGATIVE, POSITIVE, check_range
from litvit.training.model import ModelConfig, PrecisionConfig
from litvit.training.optimizer import OptimConfig
from litvit.training.tasks import TokenLabelConfig


@dataclass(frozen=True)
class Config:
    """Settings of a run of train.py.

    Each setting has the name of its flag, so that a recipe, the flags and this class speak of the same things.

        Config(DataConfig("data/digits"), ModelConfig("lit_ti", img_size=64), optim=OptimConfig(epochs=20))

    Raises:
        InputError: values that no run can have. The message names the flag.
    """

    data: DataConfig
    model: ModelConfig
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    token_labels: TokenLabelConfig = field(default_factory=TokenLabelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        _check(argparse.Namespace(**self.flat()))

    @classmethod
    def from_flat(cls, settings: dict[str, Any]) -> "Config":
        """Make a config of settings by name, such as argparse's; others are left out."""
        return cls(**{group.name: take(group.type, settings) for group in fields(cls)})

    def flat(self) -> dict[str, Any]:
        """Return all settings by name, as a recipe holds them."""
        return {name: _plain(value) for group in asdict(self).values() for name, value in group.items()}


def _plain(value: Any) -> Any:
    """Return a value as a YAML file gives it back: lists in place of tuples."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(map(_plain, value)) if isinstance(value, list | tuple) else value


def _check(settings: argparse.Namespace) -> None:
    """Raise InputError for values that no run can have."""
    check_range(settings, POSITIVE, 1, None)
    check_range(settings, NOT_NEGATIVE, 0, None)
    check_range(settings, FRACTIONS, 0, 1)
    for name in ("scale", "ratio"):
        low, high = getattr(settings, name)
        if not 0 < low <= high < float("inf"):
            raise InputError(f"--{name} is a low and a high value above 0, and finite, not {low} {high}")
    if settings.smoothing == 1:
        raise InputError("--smoothing must be below 1: all classes would have the same probability")
    try:
        interval(settings.checkpoint_every)
    except ValueError as error:
        raise InputError(f"--checkpoint-every {error}") from error
    mixing = settings.mixup > 0 or settings.cutmix > 0
    if mixing and settings.batch_size % 2:
        raise InputError(
            f"mixup and cutmix pair the images of a batch: --batch-size must be even, not {settings.batch_size}"
        )
    if settings.token_label_data and not settings.token_label:
        raise InputError("--token-label-data is of no use without --token-label: leave it out, or add that")
    if settings.token_label:
        if settings.class_weights:
            raise InputError("--class-weights weighs the classes of images, not of tokens: leave it out")
        if mixing:
            raise InputError("token labels have a mixing of their own: --mixup 0 --cutmix 0, or --no-token-label")
        if settings.token_label_data is None:
            raise InputError(
                "--token-label needs --token-label-data DIR (litvit make-token-labels makes it), or --no-token-label"
            )
        if settings.dataset:
            raise InputError(f"token labels belong to a folder or .tar: not with --dataset {settings.dataset}")
