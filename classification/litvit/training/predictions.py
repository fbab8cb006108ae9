"""What a classifier says of every image of a data set, and what follows from it: accuracy per class, confusions."""

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error, multiclass_confusion_matrix

from litvit.processes import Processes
from litvit.training.classifier import best_classes

BINS = 15  # of the calibration error


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
        confidence = self.probabilities[:, 0].contiguous()
        if not confidence.isfinite().all():
            return float("nan")
        return binary_calibration_error(confidence, self.correct.int(), n_bins=BINS).item()

    def confusion(self, num_classes: int) -> Tensor:
        """Count the images of each class (rows) by their best class (columns), (num_classes, num_classes)."""
        return multiclass_confusion_matrix(self.classes[:, 0], self.target, num_classes)

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
        batch = Predicted(target, classes, probabilities, own)
        self._batches.append(Predicted(*(values.cpu() for values in batch)))

    def gather(self, processes: Processes) -> Predicted:
        """Join the predictions of all processes, which took images in turns. All of them must call it."""
        mine = Predicted(*map(torch.cat, zip(*self._batches, strict=True))) if self._batches else None
        parts = [(rank, part) for rank, part in processes.gather([(processes.rank, mine)]) if part is not None]
        indices = [rank + processes.world_size * torch.arange(len(part.target)) for rank, part in parts]
        order = torch.cat(indices).argsort()
        return Predicted(*(torch.cat(values)[order] for values in zip(*(part for _, part in parts), strict=True)))
