"""Accuracy of a classifier on a data set."""

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from timm.data import RealLabelsImagenet
from timm.task import ClassificationEvaluator, evaluation_sample_limit
from torch import nn


def evaluate(
    model: nn.Module,
    loader: Iterable,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
    *,
    distributed: bool = False,
    real_labels: RealLabelsImagenet | None = None,
    after_batch: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Evaluate a classifier in eval mode, and restore its mode.

    Args:
        model: Model from images (B, C, H, W) to logits (B, num_classes).
        loader: Batches of images and classes, such as `eval_loader`'s.
        device: Device of the counts.
        autocast: Function that makes the context of mixed precision.
        distributed: Whether the counts are summed over all processes.
        real_labels: Labels of ImageNet-Real to count by too; not with `distributed`.
        after_batch: Function that is called after every batch.

    Returns:
        loss (mean cross-entropy), top1 and top5 in percent, images_per_second (over all processes), and real_top1 and
        real_top5 if `real_labels` is given.
    """
    was_training = model.training
    model.eval()
    evaluator = ClassificationEvaluator(device, max_samples=evaluation_sample_limit(loader))
    start = time.perf_counter()
    with torch.inference_mode():
        for images, target in loader:
            with autocast():
                logits = model(images)
            evaluator.update(logits, target)
            if real_labels is not None:
                real_labels.add_result(logits)
            if after_batch is not None:
                after_batch()
        metrics = dict(evaluator.compute(distributed))  # reads the counts, so it waits for the device
    seconds = time.perf_counter() - start
    model.train(was_training)
    processes = torch.distributed.get_world_size() if distributed else 1
    metrics["images_per_second"] = evaluator.num_samples * processes / seconds
    if real_labels is not None:
        accuracy = real_labels.get_accuracy()
        metrics["real_top1"], metrics["real_top5"] = accuracy[1], accuracy[5]
    return metrics
