"""Accuracy of a classifier on a data set."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

import torch
from timm.task import ClassificationEvaluator, evaluation_sample_limit
from torch import Tensor, nn

from litvit.data.loader import Batch
from litvit.errors import InputError
from litvit.processes import Processes
from litvit.training.predictions import Predictions

logger = logging.getLogger("litvit")
MAX_NAMED = 20  # images that an error names


class SomeImages:
    """Keeps some of the images that pass, at equal distances: neighbours are of one class.

    Args:
        total: Number of images that will pass, 0 if it is not known.
    """

    NUMBER = 8

    def __init__(self, total: int):
        self.every = max(1, total // self.NUMBER)
        self._parts: list[Tensor] = []

    @property
    def images(self) -> Tensor:
        """The images, at most NUMBER, (B, C, H, W)."""
        return torch.cat(self._parts)[: self.NUMBER]

    def keep(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield batches."""
        passed = 0
        for batch in batches:
            if passed < self.NUMBER * self.every:
                self._parts.append(batch.images[-passed % self.every :: self.every].clone())
            passed += len(batch.images)
            yield batch


def evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
    processes: Processes,
    autocast: Callable[[], AbstractContextManager],
    *,
    predictions: Predictions | None = None,
    iterate: Callable[[Iterable[Batch]], Iterator[Batch]] = iter,
) -> dict[str, float]:
    """Evaluate a classifier in eval mode, and restore its mode.

    Args:
        model: Model from images (B, C, H, W) to logits (B, num_classes).
        loader: Batches from `eval_loader`.
        processes: The processes that share the batches, and this one's device. Counts are summed over them.
        autocast: Function that makes the context of mixed precision.
        predictions: Where to note what the model says of every image, padding left out.
        iterate: Function that returns an iterator of the batches.

    Returns:
        loss (mean cross-entropy), top1 and top5 in percent, images (how many), images_per_second (over all processes).

    Raises:
        InputError: images that cannot be read, in all processes, when all images have been tried.
    """
    was_training = model.training
    model.eval()
    evaluator = ClassificationEvaluator(processes.device, max_samples=evaluation_sample_limit(loader))
    faults = []
    start = time.perf_counter()
    with torch.inference_mode():
        for images, target, unreadable in iterate(loader):
            faults += unreadable
            with autocast():
                logits = model(images)
            before = evaluator.num_samples
            evaluator.update(logits, target)
            if predictions is not None:
                counted = evaluator.num_samples - before
                predictions.add(logits[:counted], target[:counted])
        metrics = dict(evaluator.compute(processes.distributed))  # reads the counts, so it waits for the device
    seconds = time.perf_counter() - start
    model.train(was_training)
    reasons = list(dict.fromkeys(processes.gather([fault.reason for fault in faults])))  # padding repeats images
    if reasons:
        more = f"; and {len(reasons) - MAX_NAMED} more" if len(reasons) > MAX_NAMED else ""
        count = f"{len(reasons)} images cannot be used: " if len(reasons) > 1 else ""
        raise InputError(f"{count}{'; '.join(reasons[:MAX_NAMED])}{more}")
    (metrics["images"],) = map(int, processes.sum(evaluator.num_samples))
    if not metrics["images"]:
        raise InputError("there are no images to evaluate")
    expected = len(getattr(loader, "dataset", ()))
    if expected and metrics["images"] != expected and processes.primary:
        logger.warning("%d images were evaluated, not the %d that were announced", metrics["images"], expected)
    metrics["images_per_second"] = metrics["images"] / seconds
    return metrics
