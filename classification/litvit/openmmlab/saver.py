"""When a training of mmengine is saved or stopped: all processes decide alike, before each batch is used."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from mmengine.device import get_device
from mmengine.dist import is_distributed
from mmengine.hooks import EMAHook

from litvit import cli
from litvit.data.workers import DeadLoaderError, NoBatch
from litvit.errors import InputError, is_from_user_code
from litvit.openmmlab.checkpoint_hook import NotSaved
from litvit.openmmlab.errors import SampleError
from litvit.processes import EXIT_INPUT_ERROR, EXIT_INTERRUPTED, Interrupted, Processes, StopSignals
from litvit.runs.folder import CHECKPOINT, interval, lock_folder

if TYPE_CHECKING:
    from litvit.openmmlab.loops import ExactEpochs, ExactIterations
    from litvit.openmmlab.training_runner import TrainingRunner


class Stopped(Interrupted):
    """All processes leave the run, and the user has been told why.

    Attributes:
        status: Exit status.
    """

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Saver:
    """Saves a run when it is time or a signal says so. All processes decide alike, before each batch is used.

    Args:
        runner: Runner of the training.
        loop: Its training loop.
        every: Interval of checkpoints, see `litvit.runs.folder.interval`.
    """

    def __init__(self, runner: "TrainingRunner", loop: "ExactEpochs | ExactIterations", every: str) -> None:
        self.runner, self.loop = runner, loop
        self.processes = Processes(torch.device(get_device()), runner.rank, runner.world_size, is_distributed())
        self.unit, self.every = interval(every)
        self.signals = StopSignals()
        self.last_save: float | None = None  # time or iteration, in the unit of `every`; None before the first batch
        self.validating = False
        self._lock_folder()

    def _lock_folder(self) -> None:
        """Keep other runs from training in the folder. Raises InputError, in all processes, if one does."""
        taken = []
        if self.processes.primary:
            try:
                self.lock = lock_folder(Path(self.runner.work_dir))  # until this process ends
            except InputError as error:
                taken.append(str(error))
        taken = self.processes.gather(taken)
        if taken:
            raise InputError(taken[0])

    def fetch(self, batches: Iterator[Any], number: int) -> list[Any]:
        """Return the next batches of this process, fewer at their end. All processes must call it.

        Raises:
            Stopped: A process got a signal, or not its batches. The run is saved as it was before them.
        """
        fetched, error = [], None
        try:
            fetched.extend(islice(batches, number))
        except Exception as reason:
            error = reason
        lost = error is not None and not isinstance(error, NoBatch)
        stop = isinstance(error, NoBatch) or self.signals.received is not None
        stop, waits, lost, due = self.processes.sum(stop, isinstance(error, NoBatch), lost, self._is_due())
        if lost:
            self._stop_for(error)
        elif waits or (stop and self.runner.is_between_steps):
            self._stop()
        elif due and self.runner.is_between_steps:
            self.save()
        return fetched

    def _is_due(self) -> bool:
        if self.last_save is None:
            self._count_again()
        if not self.processes.primary or self._now() - self.last_save < self.every:
            return False
        if self.runner.is_saved():  # by the config's own interval
            self._count_again()
            return False
        return True

    def _now(self) -> float:
        return self.loop.iter if self.unit == "steps" else time.monotonic()

    def _count_again(self) -> None:
        self.last_save = self._now()

    def save(self) -> bool:
        """Save the run between two iterations, if that is possible. All processes must call it.

        Returns:
            Whether it is saved.
        """
        (saved,) = self.processes.sum(self.processes.primary and self._save())
        return bool(saved)

    def _save(self) -> bool:
        runner, loop = self.runner, self.loop
        if runner.is_saved():
            return True
        if runner.may_be_spoilt or not runner.is_between_steps:
            return False
        self._count_again()  # also if it fails: the next attempt is as far away
        meta = {"epoch": loop.epoch, "iter": loop.iter}
        try:
            with self._weights_of_training():
                runner.save_checkpoint(runner.work_dir, CHECKPOINT, by_epoch=False, meta=meta)
        except NotSaved as error:
            runner.logger.warning(f"{error}: the run goes on, the next save tries again")
            return False
        return True

    @contextmanager
    def _weights_of_training(self) -> Iterator[None]:
        """Take back for a block what an EMAHook does for a validation."""
        hooks = [hook for hook in self.runner.hooks if isinstance(hook, EMAHook)] if self.validating else []
        for hook in hooks:
            hook._swap_ema_parameters()
        try:
            yield
        finally:
            for hook in hooks:
                hook._swap_ema_parameters()

    def _stop(self) -> None:
        saved = self.save()
        if self.processes.primary:
            self._tell(self.signals.received.name if self.signals.received else "a signal in another process", saved)
        self.processes.sum(0)  # nobody leaves before the first process is done: a scheduler would end it
        raise Stopped(EXIT_INTERRUPTED)

    def stop_alone(self) -> None:
        """Save and leave after a signal, without the other processes."""
        if self.processes.primary:
            self._tell(self.signals.received.name, self._save())
        raise Stopped(EXIT_INTERRUPTED)

    def _stop_for(self, error: Exception | None) -> None:
        """Leave for an error of this process, or of another one if it is None."""
        if isinstance(error, FileNotFoundError) and not is_from_user_code(error):
            error = SampleError(str(error))
        bug = not isinstance(error, InputError | NoBatch | None)
        status = EXIT_INTERRUPTED if isinstance(error, DeadLoaderError) else 1 if bug else EXIT_INPUT_ERROR
        saved = self.save()
        told = [(status, str(error))] if error is not None and not isinstance(error, NoBatch) else []
        told = self.processes.gather(told)
        statuses = [status for status, _ in told]
        if self.processes.primary:
            self._tell("an error", saved)
            for message in dict.fromkeys(message for status, message in told if status != 1):
                cli.report(error if str(error) == message else InputError(message))
        self.processes.sum(0)
        if bug:
            raise error
        raise Stopped(1 if 1 in statuses else max(statuses))

    def _tell(self, reason: str, saved: bool) -> None:
        # A checkpoint that the command names would be resumed again.
        flag = "--resume" if not self.runner.resumes_named else "--resume and no file"
        at = f"saved at iteration {self.loop.iter}; the same command with {flag} continues"
        last = f"NOT saved; the same command with {flag} continues from the last checkpoint"
        self.runner.logger.warning(f"{reason}: {at if saved else last}")

    def end(self) -> None:
        """Save the end of the run, and delete the checkpoints in time. All processes must call it.

        Raises:
            Stopped: The end cannot be saved.
        """
        if self.runner.may_be_spoilt:
            return
        known = not self.loop.is_validation_due()  # else the best checkpoint could not be saved
        (saved,) = self.processes.sum(self.processes.primary and known and self.runner.save_end())
        if not saved:
            if self.processes.primary:
                self.runner.logger.error(
                    f"the run has ended, but its end is NOT saved: make room in {self.runner.work_dir} and give the "
                    "same command with --resume"
                )
            self.processes.sum(0)
            raise Stopped(EXIT_INTERRUPTED)
        self.runner.delete_checkpoints_in_time()
