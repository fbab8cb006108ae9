"""Token labelling: a soft label for every token from stored label maps, and LVT's task of training with them.

A label file, `<folder>/<class>/<image name>.pt` for every training image, is a tensor (2, K, H, W): K scores ([0]) and
the classes that they belong to ([1]) at every position of a grid over the whole image. Other classes score 0.
"""

import argparse
import inspect
import json
import os
import random
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data.mixup import rand_bbox
from timm.loss import SoftTargetCrossEntropy
from timm.task import ClassificationTask
from torch import Tensor, nn
from torchvision.ops import roi_align
from torchvision.transforms import Compose
from torchvision.transforms import functional as TF

from litvit.checkpoints import read_checkpoint
from litvit.errors import InputError
from litvit.training.data import class_list, refuse_other_numbers
from litvit.training.samples import Images, Labels

STRIDE = 32  # pixels a token, a side
TEACHER = "teacher.json"  # beside the labels: who made them
AGAIN = "remove it, and make_token_labels.py makes it anew"


class TokenLabels:
    """The label files of a data set's training images.

    Args:
        folder: of the files.
        images: the training images.
        num_classes: of the model.
        size: tokens a side of the model's last map.

    Raises:
        InputError: no such folder, one of other classes, an image without a file of its own, or a first file that is no
            label map.
    """

    def __init__(self, folder: str, images: Images, num_classes: int, size: int):
        self.folder, self.num_classes, self.size = Path(folder), num_classes, size
        self.reader = images.dataset.reader
        self.shape: torch.Size | None = None
        if not self.folder.is_dir():
            raise InputError(f"--token-label-data {folder}: no such folder; make_token_labels.py makes one")
        self._refuse_other_classes(class_list(images))
        self._refuse_missing(label_files(images))
        self.shape = self.read(0).shape

    def _refuse_other_classes(self, found: list[str] | None) -> None:
        try:
            known = json.loads((self.folder / TEACHER).read_text())["classes"]
        except FileNotFoundError:  # published labels
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"cannot read {self.folder / TEACHER}: {error!r}") from None
        refuse_other_numbers(found, known, "the training images", f"those of {self.folder}")

    def _refuse_missing(self, files: list[str]) -> None:
        there = set()
        for folder in {os.path.dirname(file) for file in files}:
            path = self.folder / folder
            if path.is_dir():
                there.update(os.path.join(folder, name) for name in os.listdir(path))
        missing = [file for file in files if file not in there]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise InputError(
                f"no label file {self.folder / missing[0]}{more}: make_token_labels.py makes them, but of images that "
                "cannot be decoded; mend or remove these"
            )

    def read(self, index: int) -> Tensor:
        """Read the label map of an image.

        Args:
            index: of the image.

        Returns:
            (2, K, H, W), float32: scores, and the classes that they belong to.

        Raises:
            InputError: the file cannot be read, holds code, or is no label map of these classes and of the first
                file's shape.
        """
        file = self.folder / label_file(self.reader.filename(index))
        try:
            labels = read_checkpoint(file, partial(torch.load, map_location="cpu", weights_only=True))
        except InputError as error:
            reason = str(error).rsplit(": ", 1)[0]
            raise InputError(f"token labels: {reason}; {AGAIN}") from None
        held = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        plain = isinstance(labels, Tensor) and labels.layout == torch.strided and not labels.is_nested
        if not plain or labels.is_complex() or labels.dim() != 4 or len(labels) != 2 or not labels.numel():
            raise InputError(f"token labels: {file} holds {held}, not scores and classes, (2, K, H, W); {AGAIN}")
        if self.shape is not None and labels.shape != self.shape:
            first = self.folder / label_file(self.reader.filename(0))
            raise InputError(
                f"token labels: {file} is {held}, but {first} {tuple(self.shape)}: one of them is wrong; {AGAIN}"
            )
        labels = labels.detach().float()
        if not labels[0].isfinite().all():
            raise InputError(f"token labels: {file} has scores that are no finite numbers; {AGAIN}")
        classes = labels[1]
        if not ((classes >= 0) & (classes < self.num_classes) & (classes == classes.trunc())).all():
            raise InputError(
                f"token labels: {file} has classes outside of 0 to {self.num_classes - 1}: is it of another data set?"
            )
        return labels

    def read_or_blank(self, index: int) -> tuple[Tensor, list[str]]:
        """Read the label map of an image in mid-run, where processes can stop only together, between updates.

        Args:
            index: of the image.

        Returns:
            What `read` returns, or zeros; the error, if there is one.
        """
        try:
            return self.read(index), []
        except InputError as error:
            return torch.zeros(self.shape), [str(error)]


def label_file(image: str) -> str:
    """The label file of an image, relative to the folder of them all: its own path in its split, as .pt."""
    return os.path.normpath(os.path.splitext(image)[0] + ".pt")


def label_files(images: Images) -> list[str]:
    """The label file of every image.

    Raises:
        InputError: two images of one name, or a .tar that leads out of its folder.
    """
    reader, names = images.dataset.reader, {}
    for index in range(len(images)):
        name = reader.filename(index)
        file = label_file(name)
        if os.path.isabs(file) or file.startswith(os.path.join("..", "")):
            raise InputError(f"the image {name} of {reader.root} lies outside of it: pack the .tar anew")
        if file in names:
            raise InputError(f"{names[file]} and {name} would share the labels {file}: rename or remove one")
        names[file] = name
    return list(names)


def token_grid(settings: argparse.Namespace, model: nn.Module, image_size: int) -> int:
    """How many tokens a side the model gives labels for.

    Args:
        settings: `model`, `token_label_size`, `mixup`, `cutmix`.
        model: the model.
        image_size: pixels a side.

    Raises:
        InputError: the model cannot be trained with token labels, nor with mixup beside, or its grid has another size.
    """
    if getattr(model, "aux_head", None) is None or "mix_mask" not in inspect.signature(model.forward).parameters:
        raise InputError(
            f"--token-label: {settings.model} cannot mix and score its tokens; lvt can (or --no-token-label)"
        )
    if not model.global_pool:
        raise InputError("--token-label needs a class score of the image: leave global_pool out of --model-kwargs")
    if settings.mixup > 0 or settings.cutmix > 0:
        raise InputError("token labels have a mixing of their own: --mixup 0 --cutmix 0, or --no-token-label")
    if image_size % STRIDE:
        raise InputError(f"--token-label needs an --img-size that is a multiple of {STRIDE}, not {image_size}")
    size = image_size // STRIDE
    if settings.token_label_size not in (None, size):
        raise InputError(
            f"--token-label-size {settings.token_label_size}: {settings.model} has {size} x {size} tokens at "
            f"{image_size} x {image_size} pixels"
        )
    return size


class LabelledTransform:
    """timm's training transform, number for random number, that also tells where it cropped and whether it flipped.

    Args:
        primary, secondary, final: from timm's create_transform(separate=True).
    """

    def __init__(self, primary: Compose, secondary: Compose, final: Compose):
        self.crop, *flips = primary.transforms
        self.hflip = flips[0].p if flips else None
        self.rest = Compose([secondary, final])

    def __call__(self, image: Image.Image) -> tuple[np.ndarray, tuple[float, float, float, float], bool]:
        """Transform an image.

        Returns:
            The image, uint8 (C, H, W); its crop box, x1, y1, x2, y2 as fractions of the whole image; whether flipped.
        """
        crop = self.crop
        top, left, height, width = crop.get_params(image, crop.scale, crop.ratio)
        interpolation = crop.interpolation
        if isinstance(interpolation, tuple):
            interpolation = random.choice(interpolation)
        x, y = image.size
        box = left / x, top / y, (left + width) / x, (top + height) / y
        image = TF.resized_crop(image, top, left, height, width, crop.size, interpolation)
        flipped = self.hflip is not None and bool(torch.rand(1) < self.hflip)
        return self.rest(TF.hflip(image) if flipped else image), box, flipped


def soft_targets(labels: Labels, num_classes: int, size: int) -> Tensor:
    """Soft labels of cropped and flipped images: RoIAlign of the label maps, then softmax over all classes.

    Args:
        labels: of a batch.
        num_classes: C.
        size: tokens a side.

    Returns:
        (B, 1 + size * size, C): of the image, and of every token, row by row.
    """
    scores, classes = labels.maps.unbind(1)
    B, _, H, W = scores.shape
    # a class may fill places for which there is no class, at score 0: add, so that it does not take its real score away
    dense = scores.new_zeros(B, num_classes, H, W).scatter_add_(1, classes.long(), scores)
    left, top, right, bottom = labels.boxes.unbind(1)
    images = torch.arange(B, device=left.device)
    boxes = torch.stack([images, left * W, top * H, right * W, bottom * H], 1)
    whole, tokens = (roi_align(dense, boxes, side, aligned=True) for side in (1, size))  # (B, C, side, side)
    tokens = torch.where(labels.flipped[:, None, None, None], tokens.flip(-1), tokens)
    return torch.cat([whole.flatten(2), tokens.flatten(2)], 2).transpose(1, 2).softmax(-1)


class TokenLabelTask(ClassificationTask):
    """Training with mix token: a random box is pasted from the batch in reverse order, image and tokens have labels.

    The loss is cls_weight * CE(class scores, lam * t + (1 - lam) * t reversed) + dense_weight * CE(token scores, their
    labels), where lam is the part of the tokens outside of the box. A Beta(1, 1) draw sizes the box, as in cutmix, in
    whole tokens.

    Args:
        model: `model(images, mixed)` gives class scores (B, C) and token scores (B, size * size, C), the latter put
            back to where their images came from; mixed, a bool tensor (size, size), is true in the box.
        size: tokens a side.
        cls_weight, dense_weight: of the two losses.
        mix_token: whether boxes are pasted; labels alone otherwise.
        kwargs: `device`, `dtype` and `verbose` of timm's TrainingTask.
    """

    def __init__(
        self,
        model: nn.Module,
        size: int,
        cls_weight: float = 1.0,
        dense_weight: float = 0.5,
        mix_token: bool = True,
        **kwargs,
    ):
        super().__init__(model, criterion=SoftTargetCrossEntropy(), **kwargs)
        self.size, self.cls_weight, self.dense_weight, self.mix_token = size, cls_weight, dense_weight, mix_token

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Compute the losses of a batch.

        Args:
            input: images (B, 3, H, W).
            target: from `soft_targets`, (B, 1 + size * size, C).

        Returns:
            loss, cls_loss, dense_loss, and output, the class scores.
        """
        uncovered = np.random.beta(1, 1) if self.mix_token else 1.0
        top, bottom, left, right = map(int, rand_bbox((self.size, self.size), uncovered))
        lam = 1 - (bottom - top) * (right - left) / self.size**2
        place = torch.arange(self.size, device=input.device)
        mixed = ((place >= top) & (place < bottom))[:, None] & (place >= left) & (place < right)
        class_logits, token_logits = self.trainable_module(input, mixed)
        whole = target[:, 0]
        cls_loss = self.criterion(class_logits.float(), lam * whole + (1 - lam) * whole.flip(0))
        dense_loss = self.criterion(token_logits.float(), target[:, 1:])
        return {
            "loss": self.cls_weight * cls_loss + self.dense_weight * dense_loss,
            "output": class_logits,
            "cls_loss": cls_loss,
            "dense_loss": dense_loss,
        }
