"""The best weights of a run: which they are, and that they are on the disk."""

import logging
import math
from typing import Any

from torch import Tensor

from litvit.runs.folder import RunFolder
from litvit.runs.progress import Progress

logger = logging.getLogger("litvit")


def are_finite(weights: dict[str, Any]) -> bool:
    """Whether all numbers of a state dict are finite."""
    return all(bool(value.isfinite().all()) for value in weights.values() if isinstance(value, Tensor))


class BestWeights:
    """Saves the weights of the best validation, in the first process.

    Weights that cannot be saved are kept in memory, and tried again after the next epoch.

    Args:
        folder: Folder of the run.
        progress: Progress of the run, whose `best_top1` is that of the weights on the disk.
    """

    def __init__(self, folder: RunFolder, progress: Progress):
        self.folder, self.progress = folder, progress
        self.unsaved: tuple[dict[str, Tensor], dict[str, Any]] | None = None  # weights and their description

    def offer(self, weights: dict[str, Tensor], metrics: dict[str, float], description: dict[str, Any]) -> None:
        """Save weights if they are the best, or else the best ones that could not be saved before.

        Args:
            weights: State dict of the model after an epoch.
            metrics: Its validation: loss and top1.
            description: Description of the model, see `read_description`.
        """
        progress, folder = self.progress, self.folder
        if progress.best_top1 >= 0 and not folder.has_best():
            logger.warning("%s has lost its best weights: the best from now on take their place", folder)
            progress.best_top1 = -1.0
        finite = all(math.isfinite(metrics[name]) for name in ("loss", "top1"))
        if not finite or not are_finite(weights):
            logger.warning(
                "epoch %d: not a candidate for the best weights, %s not finite (loss %.4f, top1 %.2f)",
                progress.epoch,
                "its weights are" if finite else "its validation is",
                metrics["loss"],
                metrics["top1"],
            )
        elif metrics["top1"] > (self.unsaved[1]["top1"] if self.unsaved else progress.best_top1):
            self.unsaved = weights, {**description, "top1": metrics["top1"], "epoch": progress.epoch}
            progress.best_epoch = progress.epoch
        if self.unsaved is None:
            return
        weights, description = self.unsaved
        if folder.save_best(weights, description):
            progress.best_top1, self.unsaved = description["top1"], None
        else:
            self.unsaved = {name: value.detach().cpu().clone() for name, value in weights.items()}, description

    def report(self, ended: bool) -> bool:
        """Log which weights are the best, when the run leaves.

        Args:
            ended: Whether the run has come to its end.

        Returns:
            Whether they are on the disk.
        """
        folder = self.folder
        if self.unsaved:
            epoch, top1 = (self.unsaved[1][name] for name in ("epoch", "top1"))
            end = "the run has ended, but its" if ended else "the"
            logger.error("%s best weights, of epoch %d, top1 %.2f, are NOT saved", end, epoch, top1)
        elif ended and self.progress.best_top1 < 0:
            logger.info("the run has ended: no validation was finite, so %s has no best weights", folder)
        elif ended and not folder.has_best():
            logger.info("the run has ended: its best weights are gone, and %s holds the last ones alone", folder)
        elif ended:
            logger.info("the run has ended: best top1 %.2f; it is in %s", self.progress.best_top1, folder)
        return self.unsaved is None
