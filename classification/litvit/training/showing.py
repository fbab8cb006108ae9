"""What a run's page shows beside numbers: its first batch, and what its best weights get wrong."""

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from litvit.errors import InputError
from litvit.training.predictions import Predicted, per_class

SIDE = 160  # pixels of a picture
LOSSLESS_SIDE = 64  # pixels up to which a picture is a PNG
BATCH, MISTAKES, WORST = 32, 24, 20  # images of the batch, mistakes, classes of the table
MIXED = 0.1  # share of a second class from which it is shown: less is smoothing
MAX_IN_MATRIX, MAX_CLASSES = 100, 2000  # classes for a confusion matrix, and for a table


def describe_batch(
    images: Tensor, target: Tensor, mean: Sequence[float], std: Sequence[float], classes: Sequence[str]
) -> dict[str, Any]:
    """Describe a training batch as the model gets it, of what JSON can hold.

    Args:
        images: Images (B, C, H, W), augmented, mixed and normalised.
        target: Classes (B,), soft labels (B, K), or `soft_targets` with token labels.
        mean: Mean per channel, of images from 0 to 1.
        std: Standard deviation per channel.
        classes: Names of the K classes.
    """
    images, target = images[:BATCH].float().cpu(), target[:BATCH].detach().cpu()
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    pixels = ((images * std + mean).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    if target.dim() == 1:
        labels = [[(number, 1.0)] for number in target.tolist()]
    else:
        best = (target if target.dim() == 2 else target[:, 0]).float()
        best = best.topk(min(2, best.shape[1]))
        pairs = (list(zip(*row, strict=True)) for row in zip(best.indices.tolist(), best.values.tolist(), strict=True))
        labels = [[pair for place, pair in enumerate(row) if place == 0 or pair[1] >= MIXED] for row in pairs]
    return {
        "size": list(images.shape[2:]),
        "images": [
            {
                "picture": picture(Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)),
                "labels": [[classes[number], round(share, 3)] for number, share in shares],
            }
            for image, shares in zip(pixels, labels, strict=True)
        ],
    }


def describe_validation(
    epoch: int,
    top1: float,
    predicted: Predicted,
    classes: Sequence[str],
    name: Callable[[int], str] | None,
    open_image: Callable[[int], Image.Image] | None,
) -> dict[str, Any]:
    """Describe a validation, of what JSON can hold: accuracy per class, confusions, most confident mistakes.

    Args:
        epoch: Epoch of the weights.
        top1: Top-1 accuracy in percent.
        predicted: Predictions.
        classes: Names of the classes.
        name: Function from the index of an image to its name, None for images without one: no image is shown then.
        open_image: Function from the index of an image to its pixels.
    """
    number = len(classes)
    description: dict[str, Any] = {"epoch": epoch, "top1": top1, "images": len(predicted.target), "num_classes": number}
    if number <= MAX_CLASSES:
        rows = [row for row in per_class(predicted, classes) if row["images"]]
        description["per_class"] = sorted(rows, key=lambda row: row["top1"])[:WORST]
    if number <= MAX_IN_MATRIX:
        description |= {"classes": classes, "confusion": predicted.confusion(number).tolist()}
    if name is None:
        return description
    mistakes = description["mistakes"] = []
    for index in predicted.mistakes(MISTAKES):
        try:
            shown = picture(open_image(index))
        except (InputError, OSError):  # it has been read a moment ago
            continue
        mistakes.append(
            {
                "picture": shown,
                "name": name(index),
                "class": classes[predicted.target[index]],
                "predicted": classes[predicted.classes[index, 0]],
                "probability": round(predicted.probabilities[index, 0].item(), 4),
            }
        )
    return description


def picture(image: Image.Image) -> str:
    """Return an image as a data URI, no larger than SIDE."""
    image = image.convert("RGB")
    image.thumbnail((SIDE, SIDE))
    kind = "PNG" if max(image.size) <= LOSSLESS_SIDE else "JPEG"
    content = io.BytesIO()
    image.save(content, kind, quality=85)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"
