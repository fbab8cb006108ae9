"""How far a run has come, and when it is saved or stopped."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from litvit.data.dataset import Fault
from litvit.data.workers import DeadLoaderError, NoBatch
from litvit.errors import InputError
from litvit.processes import Interrupted, Processes, StopSignals
from litvit.runs.folder import RunFolder, interval

logger = logging.getLogger("litvit")


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        loss_sum: Sum of the losses of this epoch's steps, on the device, so that nothing waits for it.
        epoch: Epochs that are trained and validated.
        step: Optimizer steps since the start of the run.
        steps_in_epoch: Optimizer steps of this epoch. After the last one, only validation is left.
        best_top1: Validated top-1 accuracy of the best weights that are saved, in percent; -1 while there are none.
        best_epoch: Epoch with the best validated top-1, from 1; 0 while there is none.
        unreadable: Images of this epoch that could not be decoded, of this process.
    """

    loss_sum: Tensor
    epoch: int = 0
    step: int = 0
    steps_in_epoch: int = 0
    best_top1: float = -1.0
    best_epoch: int = 0
    unreadable: list[str] = field(default_factory=list)

    def state_dict(self, processes: Processes) -> dict[str, Any]:
        """Return the progress of all processes, under the names of the checkpoint's format."""
        return {
            "epoch": self.epoch,
            "update": self.step,
            "done": self.steps_in_epoch,
            "best_top1": self.best_top1,
            "best_epoch": self.best_epoch,
            "loss_sum": processes.mean(self.loss_sum).item(),
            "unreadable": processes.gather(self.unreadable),
        }

    def load_state_dict(self, state: dict[str, Any], processes: Processes) -> None:
        """Continue from what `state_dict` returned. The first process takes over the images of all."""
        self.epoch, self.step, self.steps_in_epoch = state["epoch"], state["update"], state["done"]
        self.best_top1 = state["best_top1"]
        self.best_epoch = state.get("best_epoch", state["epoch"])  # runs of before --patience
        self.unreadable = state["unreadable"] if processes.primary else []
        self.loss_sum.fill_(state["loss_sum"])

    def end_epoch(self) -> None:
        """Count an epoch that is trained and validated."""
        self.epoch, self.steps_in_epoch, self.unreadable = self.epoch + 1, 0, []
        self.loss_sum.zero_()


class Saver:
    """Saves a run when it is time or a signal says so, and counts its unreadable images.

    Args:
        folder: Folder of the run.
        processes: Processes of the run.
        progress: Progress of the run.
        steps_per_epoch: Number of optimizer steps per epoch.
        total_batch: Number of images per optimizer step.
        state_dict: Function that returns the full state of the run. All processes must call it.
    """

    def __init__(
        self,
        folder: RunFolder,
        processes: Processes,
        progress: Progress,
        steps_per_epoch: int,
        total_batch: int,
        state_dict: Callable[[], dict[str, Any]],
    ):
        self.folder, self.processes, self.progress, self.state_dict = folder, processes, progress, state_dict
        config = folder.config
        self.unit, self.every = interval(config.checkpoint_every)
        self.steps_per_epoch = steps_per_epoch
        self.max_unreadable, self.limit = config.max_unreadable, config.max_unreadable * steps_per_epoch * total_batch
        self.signals = StopSignals()
        self.last_save, self.last_step = time.monotonic(), 0

    def save(self) -> bool:
        """Save the full state.

        Returns:
            Whether it is saved, in the first process. The others do not know.
        """
        saved = self.folder.save_checkpoint(self.state_dict())
        self.last_save, self.last_step = time.monotonic(), self.progress.step
        return saved

    def save_or_stop(
        self, faults: list[Fault], problem: NoBatch | InputError | None = None, *, whole_steps: bool = True
    ) -> None:
        """Save when it is time, and stop when a signal or a problem says so, before a batch is used.

        All processes call it at the same points and decide alike. Nothing of the coming batch is in the state yet.

        Args:
            faults: Files of the coming batch that this process could not read.
            problem: Why this process has no batch, None if it has one.
            whole_steps: Whether the last step is whole, and not in the midst of its micro-batches.

        Raises:
            Interrupted: after a signal or the death of a loader process, when the run is saved.
            InputError: more unreadable images than `max_unreadable` allows, or something that no process can train on.
        """
        progress = self.progress
        by_steps = self.unit == "steps"
        due = progress.step % self.every == 0 if by_steps else time.monotonic() - self.last_save > self.every
        due = due and whole_steps and self.processes.primary and progress.step > self.last_step
        due = due and progress.steps_in_epoch < self.steps_per_epoch
        for fault in faults:
            # It may have been drawn again, in the place of another. What is fatal stops the run anyway.
            if not fault.fatal and fault.path not in progress.unreadable:
                logger.warning("%s; another image takes its place", fault.reason)
                progress.unreadable.append(fault.path)
        dead = [str(problem)] if isinstance(problem, DeadLoaderError) else []
        wrong = [str(problem)] if isinstance(problem, InputError) and not dead else []
        wrong += [fault.reason for fault in faults if fault.fatal]
        stop = self.signals.received is not None or isinstance(problem, NoBatch)
        stop, due, unreadable, num_dead, num_wrong = self.processes.sum(
            stop, due, len(progress.unreadable), len(dead), len(wrong)
        )
        if num_wrong:
            self.save()
            raise InputError(self.processes.gather(wrong)[0])
        if unreadable > self.limit:
            names = self.processes.gather(progress.unreadable)
            progress.unreadable = []  # those that are left will be counted again
            self.save()
            raise InputError(
                f"cannot read the images {', '.join(names[:20])} ({unreadable:.0f} of an epoch, more than "
                f"--max-unreadable {self.max_unreadable} allows): repair or replace them, and continue"
            )
        saved = (stop or num_dead or due) and self.save()
        if stop or num_dead:
            reasons = self.processes.gather(dead)
            if self.processes.primary:
                name = self.signals.received.name if self.signals.received else "a signal in another process"
                point = (
                    f"saved at step {progress.steps_in_epoch} of epoch {progress.epoch + 1}" if saved else "NOT saved"
                )
                why = reasons[0] if reasons else name
                logger.warning("%s: %s; --resume %s continues from its last checkpoint", why, point, self.folder)
            raise Interrupted
