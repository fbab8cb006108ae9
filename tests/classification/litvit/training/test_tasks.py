"""Losses of a task."""

import pytest
import torch
from torch import nn

from litvit.training.tasks import TokenLabelConfig, create_task


@pytest.mark.parametrize("soft", [False, True])
def test_class_weights_move_no_image_to_another_class(soft):
    """The loss of an image is least at its smoothed label, however rare the other class is."""
    smoothed = torch.tensor([[0.95, 0.05]])
    logits = smoothed.log().requires_grad_()
    task = create_task(nn.Identity(), torch.device("cpu"), TokenLabelConfig(), None, None if soft else 0.1, [0.5, 12.0])
    loss = task.criterion(logits, smoothed if soft else torch.tensor([0]))
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, torch.zeros(1, 2), atol=1e-6, rtol=0)


def test_class_weights_weigh_images():
    """Hard labels without smoothing: the weight of an image's class times its cross-entropy, averaged over images."""
    torch.manual_seed(0)
    logits, target, weights = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0]), torch.tensor([0.5, 1.0, 4.0])
    task = create_task(nn.Identity(), torch.device("cpu"), TokenLabelConfig(), None, 0.0, weights.tolist())
    expected = (-logits.log_softmax(1)[range(6), target] * weights[target]).mean()
    torch.testing.assert_close(task.criterion(logits, target), expected)
