"""Training with token labels: which models can, and the task with mix token that LVT is trained with."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.mixup import rand_bbox
from timm.loss import SoftTargetCrossEntropy
from timm.task import ClassificationTask
from torch import Tensor, nn

from litvit.errors import InputError
from litvit.settings import setting

STRIDE = 32  # pixels per token and side


@dataclass(frozen=True)
class TokenLabelConfig:
    """Training with soft labels of tokens."""

    token_label: bool = setting(False, None, "train with soft labels of tokens (lvt)")
    token_label_data: str | None = setting(
        None, "DIR", "label files, <class>/<image name>.pt (litvit make-token-labels)"
    )
    token_label_size: int | None = setting(None, "N", "tokens per side: --img-size / 32, and nothing else")
    mix_token: bool = setting(True, None, "paste a box of tokens from another image of the batch (on)")
    dense_weight: float = setting(0.5, "X", "weight of the tokens' loss")
    cls_weight: float = setting(1.0, "X", "weight of the class loss")


def token_grid(model: nn.Module, name: str, image_size: tuple[int, int], wanted: int | None = None) -> tuple[int, int]:
    """Return the grid of tokens, height and width, that a model takes labels for.

    Args:
        model: Model to train.
        name: Name of the model, for messages.
        image_size: Height and width of the images in pixels.
        wanted: Number of tokens per side that was asked for, if any.

    Raises:
        InputError: a model that cannot be trained with token labels, or whose grid has another size.
    """
    if getattr(model, "aux_head", None) is None or "mix_mask" not in inspect.signature(model.forward).parameters:
        raise InputError(f"--token-label: {name} cannot mix and score its tokens; lvt can (or --no-token-label)")
    if not model.global_pool:
        raise InputError("--token-label needs a class score of the image: leave global_pool out of --model-kwargs")
    for side in image_size:
        if side % STRIDE:
            raise InputError(f"--token-label needs an --img-size that is a multiple of {STRIDE}, not {side}")
    (height, width), (h, w) = image_size, (side // STRIDE for side in image_size)
    if wanted is not None and (wanted, wanted) != (h, w):
        raise InputError(f"--token-label-size {wanted}: {name} has {h} x {w} tokens at {height} x {width} pixels")
    return h, w


class TokenLabelTask(ClassificationTask):
    """Token labelling with mix token (Jiang et al., 2021): image and tokens have labels, and images share a box.

    A box of every image is pasted from the batch in reverse order. Its size is drawn as in cutmix, from Beta(1, 1), and
    rounded to whole tokens. The loss is

        cls_weight * CE(class scores, lam * t + (1 - lam) * t reversed) + dense_weight * CE(token scores, token labels)

    where t is the image's soft label and lam the share of the tokens outside of the box.

    Args:
        model: Model whose `model(images, mix_mask)` gives class scores (B, C) and token scores (B, h * w, C), the
            latter put back to the images that they came from. mix_mask, bool (h, w), is true in the box.
        size: Height and width of the grid of tokens, (h, w).
        cls_weight: Weight of the loss of the class scores.
        dense_weight: Weight of the loss of the token scores.
        mix_token: Whether boxes are pasted.
        kwargs: `device`, `dtype` and `verbose` of timm's TrainingTask.
    """

    def __init__(
        self,
        model: nn.Module,
        size: tuple[int, int],
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
            input: Images (B, 3, H, W).
            target: Soft labels from `soft_targets`, (B, 1 + h * w, C).

        Returns:
            The entries loss, cls_loss, dense_loss, and output (the class scores).
        """
        uncovered = np.random.beta(1, 1) if self.mix_token else 1.0
        h, w = self.size
        top, bottom, left, right = map(int, rand_bbox(self.size, uncovered))
        lam = 1 - (bottom - top) * (right - left) / (h * w)
        row, column = torch.arange(h, device=input.device)[:, None], torch.arange(w, device=input.device)
        mix_mask = (row >= top) & (row < bottom) & (column >= left) & (column < right)
        class_logits, token_logits = self.trainable_module(input, mix_mask)
        whole = target[:, 0]
        cls_loss = self.criterion(class_logits.float(), lam * whole + (1 - lam) * whole.flip(0))
        dense_loss = self.criterion(token_logits.float(), target[:, 1:])
        return {
            "loss": self.cls_weight * cls_loss + self.dense_weight * dense_loss,
            "output": class_logits,
            "cls_loss": cls_loss,
            "dense_loss": dense_loss,
        }


class WeightedCrossEntropy(nn.Module):
    """Cross-entropy with a weight per image, that of its class, averaged over the batch's images.

    torch's weights would multiply the smoothed label of every class with its own weight, and rare classes would take
    the images of frequent ones.

    Args:
        weights: Weight of each class.
        smoothing: Label smoothing of targets that are classes.
    """

    def __init__(self, weights: Sequence[float], smoothing: float = 0.0):
        super().__init__()
        self.register_buffer("weight", torch.tensor(weights))
        self.smoothing = smoothing

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the loss of logits (B, C) and targets (B,), or soft targets (B, C)."""
        if target.dim() == 1:
            target = F.one_hot(target, logits.shape[1])
        target = target.to(logits.dtype)
        losses = F.cross_entropy(logits, target, label_smoothing=self.smoothing, reduction="none")
        return (losses * (target @ self.weight.to(target.dtype))).mean()


def create_task(
    model: nn.Module,
    device: torch.device,
    labels: TokenLabelConfig,
    size: tuple[int, int] | None,
    smoothing: float | None,
    class_weights: Sequence[float] | None = None,
) -> ClassificationTask:
    """Join a model with its loss.

    Args:
        model: Model to train.
        device: Device of the model.
        labels: Weights of the losses with token labels.
        size: Height and width of the grid of token labels, None to train with classes.
        smoothing: Label smoothing, None for targets that are soft already.
        class_weights: Weight of each class in the loss, None for 1 each.
    """
    if size is None and class_weights:
        criterion = WeightedCrossEntropy(class_weights, smoothing or 0.0)
        return ClassificationTask(model, criterion, device=device, verbose=False)
    if size is None:
        criterion = {"smoothing": smoothing or 0.0, "soft_targets": smoothing is None}
        return ClassificationTask(model, criterion_kwargs=criterion, device=device, verbose=False)
    weights = labels.cls_weight, labels.dense_weight
    return TokenLabelTask(model, size, *weights, labels.mix_token, device=device, verbose=False)
