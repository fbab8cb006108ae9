"""The augmentation of training images: the steps of `TrainTransform` in order, and mixup over a batch."""

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import functional as TF

from litvit.errors import InputError
from litvit.settings import setting

# Augmentations by name, for --aa: a function without arguments that makes a function from image to image.
AUGMENTATIONS: dict[str, Callable[[], Callable[[Image.Image], Image.Image]]] = {}


def register_augmentation(function: Callable[[], Callable[[Image.Image], Image.Image]]) -> Callable:
    """Register an augmentation of your own, which `--aa` then takes by the function's name.

    It takes the place of RandAugment and colour jitter. Draw its random numbers from `random`, `numpy.random` or
    `torch`: they are seeded for every sample.

    Args:
        function: Function without arguments that returns a function from image to image, of the same size and mode.

    Raises:
        ValueError: another function of that name is registered.
    """
    known = AUGMENTATIONS.setdefault(function.__name__, function)
    if (known.__module__, known.__qualname__) != (function.__module__, function.__qualname__):
        raise ValueError(
            f"two augmentations are called {function.__name__}: of {known.__module__}, {function.__module__}"
        )
    return function


_NUMBER = r"\d+(\.\d+)?"
# Policies of timm, and what may follow after dashes. timm passes over a part of a name that it does not know.
_POLICIES = {
    "rand": rf"m\d+|n\d+|p{_NUMBER}|mstd{_NUMBER}|mmax\d+|inc\d|t(weights|3aw?)",
    "augmix": rf"[mwdb]\d+|a{_NUMBER}|mstd{_NUMBER}",
    **dict.fromkeys(("original", "originalr", "v0", "v0r", "3a"), rf"mstd{_NUMBER}"),
}


def check_policy(name: str) -> None:
    """Raise InputError for a policy that is neither timm's nor of your own."""
    if name in AUGMENTATIONS:
        return
    policy, *parts = name.split("-")
    if policy not in _POLICIES:
        known = ", ".join((*_POLICIES, *AUGMENTATIONS))
        raise InputError(f"--aa {name} is neither a policy of timm nor registered by a module of --import: {known}")
    wrong = next((part for part in parts if not re.fullmatch(_POLICIES[policy], part)), None)
    if wrong is not None:
        raise InputError(f"--aa {name}: timm's {policy} has no setting '{wrong}'; an example: rand-m9-mstd0.5-inc1")


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of training images, and of their batches."""

    aug_repeats: int = setting(0, "N", "copies of an image per epoch, in a row of batches")
    scale: Sequence[float] = setting((0.08, 1.0), "X", "area of the random crop", nargs=2)
    ratio: Sequence[float] = setting((3 / 4, 4 / 3), "X", "aspect ratio of the random crop", nargs=2)
    hflip: float = setting(0.5, "P", "probability of a horizontal flip")
    aa: str | None = setting(None, "POLICY", "RandAugment, e.g. rand-m9-mstd0.5-inc1, or an augmentation of your own")
    color_jitter: float = setting(0.4, "X", "strength of colour jitter, without --aa")
    train_interpolation: str = setting("bicubic", "NAME", "bilinear, bicubic, random")
    reprob: float = setting(0.0, "P", "probability of random erasing")
    remode: str = setting("pixel", None, "fill of erased boxes: const, rand, pixel", choices=["const", "rand", "pixel"])
    recount: int = setting(1, "N", "number of erased boxes")
    mixup: float = setting(0.0, "ALPHA", "strength of mixup")
    cutmix: float = setting(0.0, "ALPHA", "strength of cutmix")
    mixup_prob: float = setting(1.0, "P", "probability of either")
    mixup_switch_prob: float = setting(0.5, "P", "probability of cutmix if both are on")
    mixup_off_epoch: int = setting(0, "N", "epoch from which there is no mixing (0: never)")
    smoothing: float = setting(0.1, "X", "label smoothing, not of token labels")
    class_weights: str | None = setting(
        None, None, "balanced: rare classes weigh as much in the loss as frequent ones", choices=["balanced"]
    )

    def timm_arguments(self) -> dict:
        """Return the arguments of timm's `create_transform` and `create_loader`, random erasing left out."""
        return {
            "scale": self.scale,
            "ratio": self.ratio,
            "hflip": self.hflip,
            "color_jitter": self.color_jitter,
            "auto_augment": self.aa,
            "interpolation": self.train_interpolation,
        }


class Augmented(NamedTuple):
    """An augmented image."""

    pixels: Tensor  # uint8 (C, H, W)
    erased: Tensor | None  # (C, H, W): normalised values of erased pixels, NaN where the image stays; None for none
    box: tuple[float, float, float, float]  # the crop: x1, y1, x2, y2 as fractions of the whole image
    flipped: bool


class Crop(NamedTuple):
    """A crop, in pixels of the whole image."""

    top: int
    left: int
    height: int
    width: int


class _Canvas(Image.Image):
    """An image without pixels, for functions that ask for a size alone."""

    def __init__(self, size: tuple[int, int]):
        super().__init__()
        self._canvas = size

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self._canvas

    def getbands(self) -> tuple[str, ...]:
        """Return the names of the channels."""
        return ("L",)


class JpegDraftCrop(RandomResizedCropAndInterpolation):
    """timm's random crop, number for number, for which a large JPEG file is not decoded in full."""

    def draw(self, size: tuple[int, int]) -> Crop:
        """Draw a crop of an image of `size` (width, height)."""
        return Crop(*self.get_params(_Canvas(size), self.scale, self.ratio))

    def draft(self, image: Image.Image, crop: Crop) -> Crop:
        """Let a JPEG file that is opened, and not decoded yet, be decoded no larger than a crop needs.

        libjpeg decodes to 1/2, 1/4 or 1/8 of the size for less (`Image.draft`). The file gets the smallest of these
        sizes at which the crop still has twice the pixels per side that it is resized to. That moves the crop's edges
        by a quarter of a resulting pixel at most, and changes pixels by less than bilinear in place of bicubic
        interpolation would.

        Args:
            image: Opened file, changed in place. It may be stored on its side.
            crop: Crop of the upright image.

        Returns:
            The crop in pixels of the size that the file will have.
        """
        excess = min(crop.height / self.size[0], crop.width / self.size[1]) / 2
        whole = image.width
        drafted = image.draft(None, tuple(math.ceil(side / excess) for side in image.size))
        if drafted is None:  # not a JPEG file, or decoded already
            return crop
        reduction = whole / drafted[1][2]
        edges = crop.top, crop.left, crop.top + crop.height, crop.left + crop.width
        top, left, bottom, right = (round(edge / reduction) for edge in edges)
        return Crop(top, left, bottom - top, right - left)


class TrainTransform:
    """Crop, flip, colours, erasing: the whole augmentation of one training image, as timm's recipes have it.

    Args:
        config: Augmentation to apply.
        input_size: Channels, height and width of the result.
        mean: Mean per channel, of images from 0 to 1. RandAugment fills the borders of moved images with it.
        std: Standard deviation per channel.

    Raises:
        InputError: an unknown policy or interpolation, or a policy of timm for images of 4 channels.
    """

    def __init__(
        self, config: AugmentConfig, input_size: tuple[int, int, int], mean: Sequence[float], std: Sequence[float]
    ):
        if config.aa:
            check_policy(config.aa)
        own_augmentation = AUGMENTATIONS.get(config.aa)
        arguments = config.timm_arguments()
        if config.aa and not own_augmentation and input_size[0] == 4:
            raise InputError(f"--aa {config.aa} takes grey and RGB images only: --aa '' for --in-chans 4")
        if own_augmentation:
            arguments |= {"auto_augment": None, "color_jitter": None}
        try:
            _, colours, _ = create_transform(
                input_size, is_training=True, use_prefetcher=True, separate=True, mean=mean, std=std, **arguments
            )
            self.crop = JpegDraftCrop(input_size[-2:], config.scale, config.ratio, config.train_interpolation)
        except (AssertionError, KeyError, ValueError, TypeError) as error:
            raise InputError(
                f"--aa {config.aa}, --train-interpolation {config.train_interpolation} cannot augment images: {error!r}"
            ) from error
        self.colours = [_OwnAugmentation(config.aa, own_augmentation)] if own_augmentation else colours.transforms
        self.hflip = config.hflip
        self.erasing = None
        if config.reprob > 0:
            self.erasing = RandomErasing(config.reprob, mode=config.remode, max_count=config.recount, device="cpu")

    def __call__(self, image: Image.Image, crop: Crop | None = None) -> Augmented:
        """Augment an image of any size.

        Args:
            image: Image.
            crop: Crop that was drawn already; None to draw it here.
        """
        crop = crop or self.crop.draw(image.size)
        x, y = image.size
        box = crop.left / x, crop.top / y, (crop.left + crop.width) / x, (crop.top + crop.height) / y
        image, flipped = self.flip(self.resize(image, crop))
        for colour in self.colours:
            image = colour(image)
        pixels = TF.pil_to_tensor(image)
        return Augmented(pixels, self.erase(pixels.shape), box, flipped)

    def resize(self, image: Image.Image, crop: Crop) -> Image.Image:
        """Cut out a crop, and resize it."""
        interpolation = self.crop.interpolation
        if isinstance(interpolation, tuple):
            interpolation = random.choice(interpolation)
        return TF.resized_crop(image, *crop, self.crop.size, interpolation)

    def flip(self, image: Image.Image) -> tuple[Image.Image, bool]:
        """Flip an image at random. Returns whether it is flipped, too."""
        flipped = self.hflip > 0 and bool(torch.rand(1) < self.hflip)
        return (TF.hflip(image) if flipped else image), flipped

    def erase(self, shape: tuple[int, int, int]) -> Tensor | None:
        """Return the values of erased pixels (C, H, W), NaN elsewhere; None if nothing is erased."""
        if self.erasing is None:
            return None
        erased = self.erasing(torch.full(shape, torch.nan))
        return None if erased[0].isnan().all() else erased


class _OwnAugmentation:
    """An augmentation of the user's. Raises TypeError for a result that is not an image of the same size and mode."""

    def __init__(self, name: str, make: Callable[[], Callable[[Image.Image], Image.Image]]):
        self.name, self.make = name, make
        self.augment = make()

    def __reduce__(self) -> tuple:
        return type(self), (self.name, self.make)  # what `make` returns is often a function that cannot be pickled

    def __call__(self, image: Image.Image) -> Image.Image:
        result = self.augment(image)
        shape = getattr(result, "size", None), getattr(result, "mode", None)
        if not isinstance(result, Image.Image) or shape != (image.size, image.mode):
            raise TypeError(
                f"the augmentation {self.name} has returned {type(result).__name__} of size and mode {shape}, "
                f"not an image of {(image.size, image.mode)}"
            )
        return result


def create_mixup(config: AugmentConfig, num_classes: int) -> Mixup | None:
    """Return timm's mixup and cutmix over a batch, None if both are off."""
    if config.mixup <= 0 and config.cutmix <= 0:
        return None
    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        prob=config.mixup_prob,
        switch_prob=config.mixup_switch_prob,
        label_smoothing=config.smoothing,
        num_classes=num_classes,
    )
