"""mmengine's loops, so that a run can be stopped after any iteration, and continues as if it had not been stopped.

Random numbers are counted, as in classification: those of a sample depend on (seed, iteration, rank, slot in the
batch), those of an iteration on (seed, iteration, rank), those of a sampler on (seed, epoch, batch). A checkpoint says
how many batches of its epoch are done, and they are passed over without being read.
"""

from abc import abstractmethod
from collections.abc import Iterator
from itertools import chain, count
from typing import Any

from mmengine.dist import broadcast
from mmengine.hooks import EMAHook
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, IterBasedTrainLoop, ValLoop
from torch import nn

from litvit.data.random_streams import Stream, seed_everything
from litvit.data.workers import NoBatch
from litvit.errors import InputError
from litvit.openmmlab.counted_batches import count_batches
from litvit.openmmlab.saver import Saver


class _ExactLoop(BaseLoop):
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
            runner.logger.warning(
                "the training data are a stream or have no batch sampler: a resumed run reads from their beginning"
            )

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

    @abstractmethod
    def has_ended(self) -> bool:
        """Return whether the training has reached its end."""

    @abstractmethod
    def is_validation_due(self) -> bool:
        """Return whether a validation is due now that has not been done."""

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
            ended = len(fetched) < number
            while fetched:
                yield fetched.pop(0)  # a batch that is used may be freed
            if ended:
                return

    @abstractmethod
    def position(self, epoch: int, iteration: int) -> dict[str, int]:
        """Return where the data of a checkpoint are that is saved now.

        Args:
            epoch: Epoch of the checkpoint, which is saved at the end of an epoch before the loop counts that.
            iteration: Iteration of the checkpoint, which may be saved before the loop counts that.
        """

    @abstractmethod
    def place(self, position: dict[str, int] | None) -> None:
        """Continue where a checkpoint was saved; None for a checkpoint of another program."""

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
        self.rounds = max(saver.processes.gather([len(self.dataloader)]))  # a process may have fewer batches
        loader, agreed = self.dataloader, self._agreed

        class Loader(type(loader)):
            def __iter__(self) -> Iterator[Any]:
                return agreed(super().__iter__())

        loader.__class__ = Loader

    def _agreed(self, batches: Iterator[Any]) -> Iterator[Any]:
        for _ in range(self.rounds):
            yield from self.saver.fetch(batches, 1)

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
