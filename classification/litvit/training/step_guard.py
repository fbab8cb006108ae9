"""Optimizer steps that leave out what is not finite."""

import logging
from pathlib import Path
from typing import Any

import torch
from timm.task import TrainingTask
from torch import Tensor, nn

from litvit.runs.folder import CHECKPOINT, DIVERGED

logger = logging.getLogger("litvit")

MAX_BAD_IN_A_ROW = 10


class Diverged(Exception):  # noqa: N818 - not an error, as KeyboardInterrupt
    """The weights are not finite, or the loss or a gradient was not in too many steps in a row."""


def advice(problem: str, step: int, folder: Path) -> str:
    """Say what to do about a run that has diverged, in one line."""
    return (
        f"{problem}, up to step {step}: start again with a lower --lr or --clip-grad in a new --experiment "
        f"(--initial-checkpoint {folder / CHECKPOINT} for its weights); the state is in {folder / DIVERGED}"
    )


class StepGuard:
    """Clips gradients and steps the optimizer, or leaves the step out if the loss or a gradient is not finite.

    DDP has averaged the gradients, so that a number that is not finite in one process is so in all, and all leave the
    step out. Nothing waits for the device, except where the optimizer cannot be told on the device not to step.

    Args:
        task: Task with the model.
        optimizer: Optimizer of the model.
        scaler: Loss scaling, None for none.
        clip_grad: Largest norm of the gradients, None for any.
        device: Device of the model.

    Attributes:
        norm_sum: Sum of the norms of the gradients of this epoch's steps, before clipping, on the device.
    """

    def __init__(
        self,
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
        clip_grad: float | None,
        device: torch.device,
    ):
        self.task, self.optimizer, self.scaler, self.clip_grad = task, optimizer, scaler, clip_grad
        self.bad_in_a_row, self.bad_steps = torch.zeros((), device=device), torch.zeros((), device=device)
        self.norm_sum = torch.zeros((), device=device)
        self._buffers: list[Tensor] = []
        self._buffers_before: list[Tensor] = []

    def watch(self, model: nn.Module) -> None:
        """Take a model's buffers that steps change (BatchNorm's statistics): a step that is left out puts them back."""
        self._buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point() or not buffer.dim()]

    def begin(self) -> None:
        """Remember the buffers, before the first micro-batch of a step."""
        self._buffers_before = [buffer.clone() for buffer in self._buffers]

    def rewind(self) -> None:
        """Put the buffers back to what they were before a step that will not be whole."""
        for buffer, before in zip(self._buffers, self._buffers_before, strict=False):
            buffer.copy_(before)

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of a micro-batch."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def step(self, loss: Tensor) -> Tensor:
        """Step the optimizer, or leave the step out.

        Args:
            loss: Mean loss of the step's micro-batches, of this process.

        Returns:
            The loss, 0 if the step was left out.
        """
        parameters = [p for p in self.task.get_clip_parameters() if p.grad is not None]
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip_grad or torch.inf)
        bad = (~torch.isfinite(norm)).float()
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self.optimizer.defaults.get("fused"):
            self.optimizer.found_inf = bad  # GradScaler tells a fused optimizer in this way not to step
            self.optimizer.step()
        elif not bad.item():
            self.optimizer.step()
        self.optimizer.zero_grad()
        for buffer, before in zip(self._buffers, self._buffers_before, strict=True):
            torch.where(bad.bool(), before, buffer, out=buffer)
        self._buffers_before = []
        self.norm_sum += torch.where(bad.bool(), 0.0, norm)
        self.bad_steps += bad
        self.bad_in_a_row = (self.bad_in_a_row + bad) * bad
        return torch.where(bad.bool(), 0.0, loss)

    def diverged(self, step: int) -> bool:
        """Warn of steps that were left out. Returns whether they no longer end. Waits for the device."""
        in_a_row, total = int(self.bad_in_a_row.item()), int(self.bad_steps.item())
        if in_a_row:
            logger.warning("step %d: %d steps left out, the loss or a gradient is not finite", step, total)
        return in_a_row >= MAX_BAD_IN_A_ROW

    def state_dict(self) -> dict[str, Any]:
        """Return the counts of steps that were left out, the sum of norms, and the loss scaling."""
        state = {"bad": [self.bad_in_a_row.item(), self.bad_steps.item()], "norm_sum": self.norm_sum.item()}
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned, or from a checkpoint that holds it."""
        if self.scaler is not None and "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])
        for tensor, number in zip((self.bad_in_a_row, self.bad_steps), state["bad"], strict=True):
            tensor.fill_(number)
        self.norm_sum.fill_(state.get("norm_sum", torch.nan))  # nan: a run of before it was counted
