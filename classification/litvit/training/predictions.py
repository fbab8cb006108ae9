"""What a classifier says of every image of a data set, and what follows from it: accuracy per class, confusions."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from litvit.processes import Processes
from litvit.training.classifier import best_classes

BINS = 15  # of the calibration error
COLUMNS = ("class", "images", "top1", "top5", "precision", "mistaken_for", "times")
Row = dict[str, str | int | float | None]


class Predicted(NamedTuple):
    """Predictions for N images, in the order of the data set.

    The memory is that of k classes per image, whatever the number of classes.
    """

    target: Tensor  # (N,): classes of the images
    classes: Tensor  # (N, k): best classes, best first
    probabilities: Tensor  # (N, k): theirs
    own: Tensor  # (N,): probabilities of the images' own classes

    @property
    def correct(self) -> Tensor:
        """Whether the best class of each image is its own, (N,)."""
        return self.classes[:, 0] == self.target

    def calibration_error(self) -> float:
        """Return the expected calibration error (Guo et al., 2017), from 0 to 1.

        It is the mean distance of accuracy and confidence, the probability of the best class, over bins of confidence.
        """
        from torchmetrics.functional.classification import binary_calibration_error  # takes a second, in a training too

        confidence = self.probabilities[:, 0].contiguous()
        if not confidence.isfinite().all():
            return float("nan")
        return binary_calibration_error(confidence, self.correct.int(), n_bins=BINS).item()

    def confusion(self, num_classes: int) -> Tensor:
        """Count the images of each class (rows) by their best class (columns), (num_classes, num_classes)."""
        if len(self.target) and num_classes <= max(self.target.max(), self.classes[:, 0].max()):
            raise ValueError(f"there are predictions of more than {num_classes} classes")
        pairs = self.target * num_classes + self.classes[:, 0]
        return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)

    def mistakes(self, number: int) -> list[int]:
        """Return the indices of the images that are most confidently given another class, the most confident first."""
        confidence = torch.where(self.correct, -1.0, self.probabilities[:, 0].nan_to_num(0.0))
        order = confidence.argsort(descending=True, stable=True)[: int((~self.correct).sum())]
        return order[:number].tolist()


class Predictions:
    """Collects the predictions of one process, batch by batch.

    Args:
        k: Number of classes to keep per image.
    """

    def __init__(self, k: int = 5):
        self.k = k
        self._batches: list[Predicted] = []

    def add(self, logits: Tensor, target: Tensor) -> None:
        """Note a batch: logits (B, K), classes (B,)."""
        probabilities, classes = best_classes(logits, self.k)
        own = logits.float().softmax(-1).gather(1, target.unsqueeze(1)).squeeze(1)
        self._batches.append(Predicted(target, classes, probabilities, own))  # on the device: nothing waits for it

    def gather(self, processes: Processes) -> Predicted:
        """Join the predictions of all processes, which took images in turns. All of them must call it."""
        joined = map(torch.cat, zip(*self._batches, strict=True))
        mine = Predicted(*(values.cpu() for values in joined)) if self._batches else None
        parts = [(rank, part) for rank, part in processes.gather([(processes.rank, mine)]) if part is not None]
        indices = [rank + processes.world_size * torch.arange(len(part.target)) for rank, part in parts]
        order = torch.cat(indices).argsort()
        return Predicted(*(torch.cat(values)[order] for values in zip(*(part for _, part in parts), strict=True)))


def per_class(predicted: Predicted, classes: Sequence[str]) -> list[Row]:
    """Return one row per class, in the order of the classes.

    Args:
        predicted: Predictions.
        classes: Names of the classes.

    Returns:
        Rows of COLUMNS: number of its images, their top-1 and top-5 accuracy in percent, precision in percent (the
        share of its own among the images that are taken for it), the class that its images are most often mistaken for,
        and how often. None where there are no images to count.
    """
    confusion = predicted.confusion(len(classes))
    among_5 = (predicted.classes[:, :5] == predicted.target.unsqueeze(1)).any(1)
    top5 = torch.bincount(predicted.target[among_5], minlength=len(classes)).tolist()
    right, images, taken = confusion.diagonal().tolist(), confusion.sum(1).tolist(), confusion.sum(0).tolist()
    times, other = confusion.fill_diagonal_(0).max(1)
    return [
        {
            "class": name,
            "images": images[i],
            "top1": _percent(right[i], images[i]),
            "top5": _percent(top5[i], images[i]),
            "precision": _percent(right[i], taken[i]),
            "mistaken_for": classes[other[i]] if times[i] else None,
            "times": int(times[i]) or None,
        }
        for i, name in enumerate(classes)
    ]


def _percent(part: int, whole: int) -> float | None:
    return round(100 * part / whole, 2) if whole else None
