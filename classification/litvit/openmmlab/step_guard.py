"""Optimizer wrappers of mmengine that leave out steps that are not finite, as `litvit.training.step_guard` does."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.dist import all_reduce
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch import Tensor, nn

from litvit.training.step_guard import MAX_BAD_IN_A_ROW, Diverged


def guard_steps(optim_wrapper: OptimWrapper) -> "list[GuardedSteps]":
    """Let an optimizer wrapper, of any class, leave out steps that are not finite.

    Returns:
        The wrapper, or the wrappers of an `OptimWrapperDict`.
    """
    together = isinstance(optim_wrapper, OptimWrapperDict)
    wrappers = list(optim_wrapper.values()) if together else [optim_wrapper]
    for wrapper in wrappers:
        kind = type(wrapper)
        if not issubclass(kind, GuardedSteps):  # mmengine builds a wrapper again where it resumes
            wrapper.__class__ = type(kind.__name__, (GuardedSteps, kind), {})
    return wrappers


class GuardedSteps(OptimWrapper):
    """First base of an optimizer wrapper that leaves a step out if the loss or a gradient is not finite in any process.

    Weights, optimizer and buffers (BatchNorm's statistics) stay as they are. A step waits for its loss once.

    Attributes:
        bad_in_a_row: Number of steps left out since the last one that was not.
        bad_steps: Number of steps left out.
    """

    bad_in_a_row = bad_steps = 0
    _loss: Tensor | float = 0.0
    _buffers: list[tuple[Tensor, Tensor]] | None = None  # and what they were before the step

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Remember the buffers before the first forward pass of a step."""
        if self._buffers is None:
            self._buffers = [(x, x.clone()) for x in model.buffers() if x.is_floating_point()]
        with super().optim_context(model):
            yield

    def backward(self, loss: Tensor, **kwargs) -> None:
        """Compute the gradients of a loss."""
        self._loss = self._loss + loss.detach().float()
        super().backward(loss, **kwargs)

    def step(self, **kwargs) -> None:
        """Step the optimizer, or leave the step out.

        Raises:
            Diverged: MAX_BAD_IN_A_ROW steps in a row were left out. All processes raise it in the same step.
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        loss = torch.as_tensor(self._loss)
        # If the norm of finite gradients overflows, this makes them NaN, and a loss scaler that sees it scales the loss
        # less. `get_total_norm` would leave them finite, and the scale as it is.
        norm = torch.nn.utils.clip_grad_norm_(parameters, torch.inf).to(loss)
        bad = (~torch.isfinite(torch.stack([loss, norm]))).float()
        all_reduce(bad, "max")
        bad_loss, bad_norm = bad.tolist()
        if bad_loss or bad_norm:
            self._leave_out(bool(bad_loss))
        else:
            self.bad_in_a_row = 0
            super().step(**kwargs)
        self._loss, self._buffers = 0.0, None

    def _leave_out(self, bad_loss: bool) -> None:
        for buffer, before in self._buffers or []:
            buffer.copy_(before)
        scaler = getattr(self, "loss_scaler", None)
        if scaler is not None:
            scaling = self._scale_update_param is None and scaler.get_scale() > 1
            scaler.unscale_(self.optimizer)
            scaler.update(self._scale_update_param)
            if scaling and not bad_loss:
                return  # the loss was scaled too much: it is scaled less from now on
        self.bad_in_a_row += 1
        self.bad_steps += 1
        print_log(
            f"iteration {self.inner_count}: {self.bad_steps} steps left out, the loss or a gradient is not finite; "
            "from the second in a row on, nothing is validated or saved until a step is finite",
            logger="current",
            level=logging.WARNING,
        )
        if self.bad_in_a_row >= MAX_BAD_IN_A_ROW:
            raise Diverged
