"""mmengine's loops, so that a run can be stopped after any iteration, and continues as if it had not been stopped.

Random numbers are counted, as in classification: those of a sample depend on (seed, iteration, rank, slot in the
batch), those of an iteration on (seed, iteration, rank), those of a sampler on (seed, epoch, batch). A checkpoint says
how many batches of its epoch are done, and they are passed over without being read.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from mmengine.device import get_device
from mmengine.dist import broadcast, is_distributed
from mmengine.hooks import EMAHook
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, ValLoop
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from litvit import cli
from litvit.data.random_streams import Stream, random_stream, seed_everything
from litvit.data.workers import DeadLoaderError, NoBatch, reading
from litvit.errors import InputError, is_from_user_code
from litvit.openmmlab.checkpoint_hook import NotSaved
from litvit.openmmlab.errors import SampleError
from litvit.processes import EXIT_INPUT_ERROR, EXIT_INTERRUPTED, Interrupted, Processes, StopSignals
from litvit.runs.folder import CHECKPOINT, interval, lock_folder

if TYPE_CHECKING:
    from litvit.openmmlab.runner import TrainingRunner


class Stopped(Interrupted):
    """All processes leave the run, and the user has been told why.

    Attributes:
        status: Exit status.
    """

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class CountedBatches:
    """Batch sampler that numbers the batches of another one, and passes over those that are done.

    It yields (iteration, indices). What else the other one has, it has too.

    Args:
        batches: Batch sampler.
        seed: Seed of the run.

    Attributes:
        iteration: Iteration of the next batch.
        epoch: Number of times that the batches have been gone through.
        skip: Number of batches to pass over at the start of the next iterator. It counts down.
    """

    def __init__(self, batches: Any, seed: int) -> None:
        self.batches = batches
        self.seed = seed
        self.iteration = self.epoch = self.skip = 0

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        batches = iter(self.batches)
        for position in count():
            # Of those samplers that draw from the generators of the process.
            with random_stream(Stream.ORDER, self.seed, self.epoch, position):
                indices = next(batches, None)
            if indices is None:
                return
            if self.skip:
                self.skip -= 1
                continue
            self.iteration += 1
            yield self.iteration - 1, indices

    def __len__(self) -> int:
        return len(self.batches)

    def __getattr__(self, name: str) -> Any:
        if name == "batches":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.batches, name)


class _CountedSamples:
    """`__getitems__` of a data set whose batches are numbered."""

    def __init__(self, dataset: Any, seed: int, rank: int) -> None:
        self.dataset = dataset
        self.key = seed, rank

    def __call__(self, batch: tuple[int, list[int]]) -> list[Any]:
        iteration, indices = batch
        seed, rank = self.key
        samples = []
        for slot, index in enumerate(indices):
            with random_stream(Stream.SAMPLE, seed, iteration, rank, slot):
                samples.append(self.dataset[index])
        reading("")
        return samples


def count_batches(loader: DataLoader, seed: int, rank: int) -> CountedBatches | None:
    """Let the samples of a loader depend on their place in the run alone.

    Args:
        loader: Loader that has not been iterated. Its data set stays what it is, so that hooks may change its pipeline.
        seed: Seed of the run.
        rank: Rank of this process.

    Returns:
        The loader's batch sampler from now on; None for a loader without one, of a stream of samples.
    """
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        return None
    counted = CountedBatches(loader.batch_sampler, seed)
    vars(loader)["batch_sampler"] = counted  # a DataLoader refuses an assignment
    loader.dataset.__getitems__ = _CountedSamples(loader.dataset, seed, rank)
    return counted


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
        self.last_save, self.last_iteration = time.monotonic(), None
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
        if self.unit == "steps":
            due = self.loop.iter % self.every == 0 and self.loop.iter != self.last_iteration
        else:
            due = time.monotonic() - self.last_save > self.every
        return due and self.loop.iter > 0 and self.processes.primary and not self.runner.is_saved()

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
        # Also if it fails: the next attempt is as far away.
        self.last_save, self.last_iteration = time.monotonic(), loop.iter
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
        at = f"saved at iteration {self.loop.iter}; the same command with --resume continues"
        last = "NOT saved; the same command with --resume continues from the last checkpoint"
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


class _ExactLoop:
    """What both loops have in common.

    Attributes:
        batches: Number of batches of the loader's epoch that are used.
    """

    batches = 0

    def set_up(self, every: str) -> None:
        """Number the batches, and get ready to save.

        Args:
            every: Interval of checkpoints, see `litvit.runs.folder.interval`.
        """
        runner = self.runner
        self.counted = count_batches(self.dataloader, runner.base_seed, runner.rank)
        self.saver = Saver(runner, self, every)
        if self.counted is None:
            runner.logger.warning("the training data are a stream: a resumed run reads it from its beginning")

    def run(self) -> nn.Module:
        """Train to the end.

        Raises:
            Stopped: After a signal or for an input that cannot be read, when the run is saved. All processes raise it
                after the same iteration.
        """
        with self.saver.signals:
            try:
                if self.has_ended() and not self.is_validation_due():
                    self.runner.logger.info(f"this run has ended already, at iteration {self._iter}")
                    self.runner.delete_checkpoints_in_time()
                else:
                    self.train()
            except NoBatch:  # in a loop of the user's own, in which processes do not agree
                self.saver.stop_alone()
        return self.runner.model

    def has_ended(self) -> bool:
        raise NotImplementedError

    def is_validation_due(self) -> bool:
        """Return whether a validation is due now that has not been done."""
        raise NotImplementedError

    def validate(self) -> None:
        """Validate if it is due."""
        self._decide_current_val_interval()
        if self.runner.val_loop is not None and self.is_validation_due():
            self._seed()
            self._share_buffers()
            self.runner.val_loop.run()

    def _share_buffers(self) -> None:
        """Let all processes validate with the first one's BatchNorm statistics, which are those of a checkpoint."""
        models = [self.runner.model, *(hook.ema_model for hook in self.runner.hooks if isinstance(hook, EMAHook))]
        for buffer in chain.from_iterable(model.buffers() for model in models):
            broadcast(buffer)

    def _seed(self) -> None:
        seed_everything(Stream.MICRO_BATCH, self.runner.base_seed, self._iter, self.runner.rank)

    def _fetch(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield batches, after all processes have theirs: as many at once as gradients are accumulated over."""
        while True:
            number = min(self.runner.iterations_to_step, max(1, self._max_iters - self._iter))
            fetched = self.saver.fetch(batches, number)
            yield from fetched
            if len(fetched) < number:
                return

    def position(self, epoch: int, iteration: int) -> dict[str, int]:
        """Return where the data of a checkpoint are that is saved now.

        Args:
            epoch: Epoch of the checkpoint, which is saved at the end of an epoch before the loop counts that.
            iteration: Iteration of the checkpoint, which may be saved before the loop counts that.
        """
        raise NotImplementedError

    def place(self, position: dict[str, int] | None) -> None:
        """Continue where a checkpoint was saved; None for a checkpoint of another program."""
        raise NotImplementedError

    def _total_batch(self) -> int:
        size = getattr(self.dataloader.batch_sampler, "batch_size", None) or 1
        return (sum(size) if isinstance(size, list | tuple) else size) * self.runner.world_size

    def _warn_of_another_place(self) -> None:
        self.runner.logger.warning(
            "the batch size or the number of processes or images has changed: the run continues at the proportionate "
            f"place, after {self.batches} batches of the data; schedules by iteration keep their iterations"
        )


class ExactEpochs(_ExactLoop, EpochBasedTrainLoop):
    """mmengine's loop over epochs, which continues in the middle of an epoch."""

    def has_ended(self) -> bool:
        return self._epoch >= self._max_epochs or self.stop_training

    def is_validation_due(self) -> bool:
        due = self._epoch % self.val_interval == 0 or self._epoch == self._max_epochs
        between = self._epoch > 0 and self.batches == 0 and self.runner.validated_at != self._iter
        return between and due and self._epoch >= self.val_begin and self.runner.has_val_loop

    def train(self) -> None:
        self.runner.call_hook("before_train")
        self.validate()
        while not self.has_ended():
            self.run_epoch()
            self.validate()
        self.saver.end()
        self.runner.call_hook("after_train")

    def run_epoch(self) -> None:
        """Train the rest of an epoch."""
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        if self.counted is not None:
            self.counted.iteration, self.counted.epoch, self.counted.skip = self._iter, self._epoch, self.batches
        for batch in self._fetch(iter(self.dataloader)):
            self._seed()
            self.run_iter(self.batches, batch)
            self.batches += 1
        self.runner.call_hook("after_train_epoch")
        self._epoch, self.batches = self._epoch + 1, 0

    def position(self, epoch: int, iteration: int) -> dict[str, int]:
        batches = 0 if epoch > self._epoch else self.batches + iteration - self._iter
        return {"batches": batches, "batches_per_epoch": len(self.dataloader)}

    def place(self, position: dict[str, int] | None) -> None:
        length = len(self.dataloader)
        if position is None:
            position = {"batches": max(0, self._iter - self._epoch * length), "batches_per_epoch": length}
        self.batches = position["batches"]
        if position["batches_per_epoch"] != length:
            self.batches = self.batches * length // max(1, position["batches_per_epoch"])
            validated = self.runner.validated_at == self._iter
            self._iter = self._epoch * length + self.batches
            self.runner.validated_at = self._iter if validated else None
            self._warn_of_another_place()


class ExactIterations(_ExactLoop, IterBasedTrainLoop):
    """mmengine's loop over iterations, which continues at the batch that is next.

    Attributes:
        data_epoch: Number of times that the data have been gone through.
    """

    data_epoch = 0

    def has_ended(self) -> bool:
        return self._iter >= self._max_iters or self.stop_training

    def is_validation_due(self) -> bool:
        due = self._iter % self.val_interval == 0 or self._iter == self._max_iters
        new = self._iter > 0 and self.runner.validated_at != self._iter
        return new and due and self._iter >= self.val_begin and self.runner.has_val_loop

    def train(self) -> None:
        # To mmengine's hooks the whole training is one epoch.
        self.runner.call_hook("before_train")
        self.runner.call_hook("before_train_epoch")
        self.validate()
        batches = self._fetch(self._stream())
        while not self.has_ended():
            self.runner.model.train()
            batch, data_epoch, done = next(batches)
            self._seed()
            self._next_place = data_epoch, done
            self.run_iter(batch)
            self.data_epoch, self.batches = self._next_place
            self.validate()
        self.runner.call_hook("after_train_epoch")
        self.saver.end()
        self.runner.call_hook("after_train")

    def _stream(self) -> Iterator[tuple[Any, int, int]]:
        """Yield batches without end, each with the epoch of the data and the number of its batches that are then used.

        Raises:
            InputError: There are no batches.
        """
        done, iteration = self.batches, self._iter
        for epoch in count(self.data_epoch):
            if epoch > 0:
                for sampler in (self.dataloader.sampler, getattr(self.dataloader.batch_sampler, "sampler", None)):
                    if hasattr(sampler, "set_epoch"):
                        sampler.set_epoch(epoch)
            if self.counted is not None:
                self.counted.iteration, self.counted.epoch, self.counted.skip = iteration, epoch, done
            before = iteration, done
            for batch in self.dataloader:
                iteration, done = iteration + 1, done + 1
                yield batch, epoch, done
            left = self.counted.skip if self.counted is not None else 0
            if before == (iteration, left):
                raise InputError("the training data set has fewer images than a batch: set a smaller batch_size")
            done = left

    def position(self, epoch: int, iteration: int) -> dict[str, int]:
        data_epoch, batches = self._next_place if iteration > self._iter else (self.data_epoch, self.batches)
        return {"data_epoch": data_epoch, "batches": batches, "total_batch": self._total_batch()}

    def place(self, position: dict[str, int] | None) -> None:
        total = self._total_batch()
        if position is None:
            position = {"data_epoch": 0, "batches": self._iter, "total_batch": total}
        self.data_epoch, self.batches = position["data_epoch"], position["batches"]
        if position["total_batch"] != total:
            self.batches = self.batches * position["total_batch"] // total
            self._warn_of_another_place()


class ExactValidation(ValLoop):
    """mmengine's loop for validation, in which all processes agree before each batch whether to stop."""

    def set_up(self, saver: Saver) -> None:
        """Get ready to be stopped by what saves the training."""
        self.saver = saver
        lengths = saver.processes.gather([len(self.dataloader)])
        self.common = min(lengths)  # batches that every process has
        loader, agreed = self.dataloader, self._agreed

        class Loader(type(loader)):
            def __iter__(self) -> Iterator[Any]:
                return agreed(super().__iter__())

        loader.__class__ = Loader

    def _agreed(self, batches: Iterator[Any]) -> Iterator[Any]:
        for _ in range(self.common):
            fetched = self.saver.fetch(batches, 1)
            yield from fetched
            if not fetched:
                return
        yield from batches

    def run(self) -> dict:
        self.saver.validating = True
        try:
            return super().run()
        finally:
            self.saver.validating = False


def make_exact(loop: Any) -> bool:
    """Turn a training loop that is exactly one of mmengine's into one that continues exactly.

    Returns:
        Whether it is one.
    """
    kind = {EpochBasedTrainLoop: ExactEpochs, IterBasedTrainLoop: ExactIterations}.get(type(loop))
    if kind is not None:
        loop.__class__ = kind
    return kind is not None
