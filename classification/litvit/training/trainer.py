"""The training loop of a classifier."""

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from timm.layers import to_2tuple
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils import distribute_bn, get_state_dict, unwrap_model
from torch import Tensor, nn

from litvit.data.loader import Batch, DevicePrefetcher, StreamedBatches
from litvit.data.random_streams import Stream, seed_everything
from litvit.data.readers import check_class_numbers
from litvit.data.streams import ImageStream
from litvit.data.workers import NoBatch
from litvit.dtm import DeformableTokenMerging
from litvit.dtm.offsets import mean_lengths, predict_offsets
from litvit.errors import InputError, one_line
from litvit.memory import peak_memory_mib
from litvit.processes import EXIT_DIVERGED, EXIT_INTERRUPTED, Interrupted, Processes
from litvit.runs.best_weights import BestWeights, are_finite
from litvit.runs.environment import describe_start
from litvit.runs.folder import BEST_VALIDATION, FIRST_BATCH, LOCATION_SETTINGS, RunFolder, check_same_run
from litvit.runs.progress import Progress, Saver
from litvit.runs.report import Report, set_up_logging
from litvit.training.classifier import class_labels
from litvit.training.config import Config
from litvit.training.evaluate import SomeImages, evaluate
from litvit.training.model import keep_frozen, pretrained_source
from litvit.training.phases import PhaseClock
from litvit.training.predictions import Predicted, Predictions
from litvit.training.showing import describe_batch, describe_validation
from litvit.training.step_guard import Diverged, StepGuard, advice

logger = logging.getLogger("litvit")


@dataclass
class Trainer:
    """One run. `litvit.training.build.build_trainer` makes its parts, `run` trains it to its end.

    Attributes:
        config: Everything that was asked for.
        folder: Folder of the run.
        processes: Processes of the run.
        train_batches: Training batches of this process.
        val_batches: Validation batches of this process.
        mixup: Mixup and cutmix, None for none.
        task: Model, its loss, and the average of its weights.
        optimizer: Optimizer of the model.
        scheduler: Schedule of the learning rate.
        guard: Guard against steps that are not finite.
        description: What a file of weights says of the model.
        rates: Peak, first and last learning rate.
        epochs: Number of epochs, including the cool-down.
        autocast: Function that makes the context of a forward pass.
    """

    config: Config
    folder: RunFolder
    processes: Processes
    train_batches: DevicePrefetcher | StreamedBatches
    val_batches: DevicePrefetcher
    mixup: Mixup | None
    task: TrainingTask
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    guard: StepGuard
    description: dict[str, Any]
    rates: dict[str, float]
    epochs: int
    autocast: Callable[[], AbstractContextManager]

    def __post_init__(self) -> None:
        self.accum_steps = self.config.optim.grad_accum_steps
        self.steps_per_epoch = len(self.train_batches) // self.accum_steps
        self.total_batch = self.config.data.batch_size * self.accum_steps * self.processes.world_size
        self.progress = Progress(torch.zeros((), device=self.processes.device))
        sizes = self.steps_per_epoch, self.total_batch
        self.saver = Saver(self.folder, self.processes, self.progress, *sizes, self.sound_state)
        self.best = BestWeights(self.folder, self.progress)
        self.clock = PhaseClock(self.processes.device)
        self.on_first_batch: Callable[[Tensor, Tensor], None] | None = None
        self.saved = True

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the rest of the run depends on. Weights have timm's names: timm loads the file too."""
        self.guard.rewind()  # of a step that a signal has interrupted between its micro-batches
        return {
            **self.progress.state_dict(self.processes),
            **self.guard.state_dict(),
            "total_batch": self.total_batch,
            "num_images": len(self.train_batches.dataset),
            "settings": self._settings(),
            "description": self.description,
            "optimizer": self.optimizer.state_dict(),
            **self.task.get_checkpoint_state(),
            **(self.task.get_checkpoint_state(ema=True) if self.task.has_ema() else {}),
        }

    def sound_state(self) -> dict[str, Any]:
        """Return `state_dict`, for a checkpoint to continue from.

        Raises:
            Diverged: the weights or their average are not finite, in any process. The state is saved apart.
        """
        state = self.state_dict()
        finite = all(are_finite(state.get(name, {})) for name in ("state_dict", "state_dict_ema"))
        if any(self.processes.sum(not finite)):
            self.folder.save_diverged(state)
            raise Diverged(advice("the weights are not finite", self.progress.step, self.folder.path))
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        Raises:
            InputError: the state is of another model, other classes or another optimizer, or of a longer run.
        """
        counts = {"total_batch": self.total_batch, "number of training images": len(self.train_batches.dataset)}
        held = {"total_batch": state["total_batch"], "number of training images": state["num_images"]}
        check_same_run(self.folder, state["settings"] | held, self._settings() | counts)
        theirs, ours = (description.get("classes") for description in (state["description"], self.description))
        check_class_numbers(ours, theirs, self.config.data.data_dir, f"those of {self.folder}")
        theirs, ours = (set(held.get("held_out", ())) for held in (state["description"], self.description))
        if theirs != ours:
            raise InputError(
                f"{self.folder} validates on other images than --val-fraction would hold out now, which differ by "
                f"{len(theirs ^ ours)}, such as {min(theirs ^ ours)}: put its images back"
            )
        try:
            self.task.load_checkpoint_state(state["state_dict"])
            if self.task.has_ema():
                self.task.load_checkpoint_state(state.get("state_dict_ema", state["state_dict"]), ema=True)
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"--resume: the checkpoint does not fit these settings: {reason}") from error
        self.guard.load_state_dict(state)
        self.progress.load_state_dict(state, self.processes)
        epochs, steps = self.progress.epoch, self.progress.steps_in_epoch
        if (epochs, steps) > (self.epochs, 0):
            trained = f"{epochs} epochs{f' and {steps} steps' if steps else ''}"
            cooldown = self.epochs - self.config.optim.epochs
            wanted = f"--epochs {self.config.optim.epochs}{f' and {cooldown} of cool-down' if cooldown else ''}"
            raise InputError(
                f"{self.folder} has trained {trained}, more than {wanted}: continue it to a later epoch, or train a "
                "shorter run in a new --experiment"
            )
        self.saver.last_step = self.progress.step
        self._set_learning_rate()

    def _settings(self) -> dict[str, Any]:
        """Return the settings that say what the run computes."""
        return {name: value for name, value in self.config.flat().items() if name not in LOCATION_SETTINGS}

    @property
    def lr(self) -> float:
        """Learning rate of the parameters that have no factor of their own."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def _set_learning_rate(self) -> None:
        """Set the learning rate of the next step. timm's schedulers ignore the call that is not in their unit."""
        self.scheduler.step(self.progress.epoch)
        self.scheduler.step_update(self.progress.step)

    def run(self) -> int:
        """Train to the last epoch, or until a signal.

        Returns:
            Exit status: 0 for a trained model, EXIT_INTERRUPTED, EXIT_DIVERGED.

        Raises:
            InputError: the run's folder cannot be created, a label file is broken, or too many images are unreadable.
        """
        primary = self.processes.primary
        if self.config.run.dry_run:
            set_up_logging(None, primary)
            log_start(self)
            return 0
        status = 0
        if self.progress.epoch < self.epochs and not self.out_of_patience():
            self.folder.open(self._settings())
            set_up_logging(self.folder.path, primary)
            log_start(self)
            if primary:
                start = {"step": self.progress.step, **describe_start(self.processes.device, self.processes.world_size)}
                changed = [name for name in self._settings() if name in self.config.run.changed]
                start |= {"data_dir": self.config.data.data_dir, "recipe": self.config.run.config}
                start["changed_settings"] = changed
                self.folder.record_start(start)
            status = self._train()
        else:  # nothing is left to train, and nothing is written
            set_up_logging(None, primary)
            log_start(self)
        if status == 0 and primary and not self.saved:
            status = EXIT_INTERRUPTED
            logger.error("the run has ended, but its end is NOT saved: make room in %s and run it again", self.folder)
        elif primary and not self.best.report(ended=status == 0) and status == 0:
            status = EXIT_INTERRUPTED
        if self.processes.distributed:
            torch.distributed.destroy_process_group()
        return status

    def _train(self) -> int:
        """Train the epochs that are left. Returns the exit status."""
        report = Report(self.folder, self.progress, self.epochs * self.steps_per_epoch, self._settings())
        status = 1  # of an exception
        if self.processes.primary and self.progress.step == 0:
            self.on_first_batch = partial(self._show_batch, report)
        try:
            with self.saver.signals:
                while self.progress.epoch < self.epochs and not self.out_of_patience():
                    self.run_epoch(report)
            if self.progress.epoch < self.epochs:
                logger.info("%s", self.why_ended())
            status = 0
        except Interrupted:
            status = EXIT_INTERRUPTED
        except Diverged as error:
            status = EXIT_DIVERGED
            logger.error("%s", error)
        finally:
            report.close(status)
            self.folder.close()
        return status

    def run_epoch(self, report: Report) -> None:
        """Train the rest of an epoch, validate, save, report."""
        speed = self.train_epoch(report)
        lr, progress = self.lr, self.progress
        metrics, predicted = self.validate()
        loss = self.processes.mean(progress.loss_sum).item() / progress.steps_in_epoch
        grad_norm = self.guard.norm_sum.item() / progress.steps_in_epoch
        progress.end_epoch()
        self._set_learning_rate()
        if self.processes.primary:
            weights = get_state_dict(self.task.get_eval_model(ema=self.task.has_ema()), unwrap_model)
            self.best.offer(weights, metrics, self.description)
            if progress.best_epoch == progress.epoch:
                report.show(BEST_VALIDATION, self._describe_best, metrics["top1"], predicted)
        memory = peak_memory_mib(self.processes.device)
        train_metrics = {"loss": loss, "memory_mib": memory, "grad_norm": grad_norm}
        if speed:  # else this process has only validated
            train_metrics |= {"images_per_second": speed}
            train_metrics |= {f"seconds_{phase}": seconds for phase, seconds in self.clock.seconds.items()}
        report.epoch(train_metrics, metrics, lr)
        self.saved = self.saver.save()  # last: a run that is killed before it writes the row of summary.csv again

    def out_of_patience(self) -> bool:
        """Whether validation was not better for `--patience` epochs. All processes go by the first one's."""
        progress, patience = self.progress, self.config.run.patience
        if patience is None:
            return False
        waited = progress.epoch - progress.best_epoch if self.processes.primary else 0
        (waited,) = self.processes.sum(waited)
        return waited >= patience

    def why_ended(self) -> str:
        """Say why a run has come to its end, and what continues it."""
        if self.progress.epoch >= self.epochs:
            return f"{self.progress.epoch} epochs are trained (a larger --epochs continues it)"
        best, patience = self.progress.best_epoch, self.config.run.patience
        return f"no better top1 since epoch {best}, --patience {patience} (a larger one continues it)"

    def train_epoch(self, report: Report) -> float:
        """Train the rest of an epoch.

        Returns:
            Images per second, over all processes.
        """
        progress, log_interval = self.progress, self.config.run.log_interval
        self.task.train()
        if progress.steps_in_epoch == 0:
            self.guard.norm_sum.zero_()
        if self.config.model.freeze is not None:
            keep_frozen(self.task.get_trainable_module())
        self.train_batches.set_epoch(progress.epoch, progress.steps_in_epoch)
        if self.mixup is not None and self.config.augment.mixup_off_epoch:
            self.mixup.mixup_enabled = progress.epoch < self.config.augment.mixup_off_epoch

        bar = report.bar(self.epochs, self.steps_per_epoch)
        first = reported = progress.steps_in_epoch
        reported_loss = progress.loss_sum.clone()
        start = reported_time = time.perf_counter()
        step_loss = torch.zeros_like(progress.loss_sum)
        batches = self._agreed(self.train_batches) if first < self.steps_per_epoch else ()
        self.clock.begin()
        for index, batch in enumerate(batches, first * self.accum_steps):
            if progress.steps_in_epoch == self.steps_per_epoch:
                break  # the last, incomplete step of a stream
            self.clock.mark("data")
            done = progress.steps_in_epoch
            if done > reported and report.late():  # without the others: it waits for nothing, and resets nothing
                loss = (progress.loss_sum - reported_loss).item() / (done - reported)
                seconds = time.perf_counter() - reported_time
                report.train(bar, loss, self.lr, (done - reported) * self.total_batch, seconds, show=False)
            first_of_step, last_of_step = index % self.accum_steps == 0, (index + 1) % self.accum_steps == 0
            if first_of_step:
                self.guard.begin()
                step_loss = torch.zeros_like(progress.loss_sum)
            step_loss += self.forward_backward(batch, index, last_of_step)
            if not last_of_step:
                continue
            progress.loss_sum += self.guard.step(step_loss)
            progress.steps_in_epoch += 1
            progress.step += 1
            self.task.update_ema(progress.step)
            self.scheduler.step_update(progress.step)
            self.clock.mark("step")
            bar.update()
            done = progress.steps_in_epoch
            if done % log_interval == 0 or done == self.steps_per_epoch:
                loss = self.processes.mean(progress.loss_sum - reported_loss).item() / (done - reported)
                self.clock.read()  # the loss was waited for
                now = time.perf_counter()
                images_seen = (done - reported) * self.total_batch
                report.train(bar, loss, self.lr, images_seen, now - reported_time)
                if self.guard.diverged(progress.step):
                    self.folder.save_diverged(self.state_dict())
                    in_a_row = int(self.guard.bad_in_a_row.item())
                    problem = f"the loss or a gradient was not finite in {in_a_row} steps in a row"
                    raise Diverged(advice(problem, progress.step, self.folder.path))
                reported_loss, reported, reported_time = progress.loss_sum.clone(), done, now
        bar.close()
        return (progress.steps_in_epoch - first) * self.total_batch / (time.perf_counter() - start)

    def forward_backward(self, batch: Batch, index: int, last_of_step: bool) -> Tensor:
        """Compute the gradients of the epoch's micro-batch `index`. Returns its share of the step's loss."""
        # Random numbers depend on the position in the run alone: there is nothing to save, and nothing to restore.
        seed_everything(Stream.MICRO_BATCH, self.config.run.seed, self.progress.epoch, index, self.processes.rank)
        images, target = batch.images, batch.target
        if self.mixup is not None:
            images, target = self.mixup(images, target)
        if self.on_first_batch is not None:
            self.on_first_batch(images, target)
            self.on_first_batch = None
        with contextlib.nullcontext() if last_of_step else self.task.no_sync():
            with self.autocast():
                loss = self.task(images, target)["loss"] / self.accum_steps
            self.clock.mark("forward")
            self.guard.backward(loss)
            self.clock.mark("backward")
        return loss.detach()

    def _agreed(self, batches: Iterable[Batch], training: bool = True, alike: bool = True) -> Iterator[Batch]:
        """Yield batches. Before each one, and after the last one, all processes agree whether to save or to stop.

        A process that has no batch takes part: the others would wait for it in the step.

        Args:
            batches: Batches of this process.
            training: Whether unreadable images count, and whether `accum_steps` batches are a step.
            alike: Whether all processes have as many batches. If not, they agree after their last one alone.
        """
        batches = iter(batches)
        for index in itertools.count():
            batch = problem = None
            try:
                batch = next(batches, None)
            except (NoBatch, InputError) as error:
                problem = error
            faults = batch.faults if batch is not None and training else []
            if alike or batch is None:
                self.saver.save_or_stop(faults, problem, whole_steps=index % self.accum_steps == 0 or not training)
            if batch is None:
                return
            yield batch

    def validate(self) -> tuple[dict[str, float], Predicted]:
        """Validate the model, or the average of its weights if there is one.

        Returns:
            Metrics, and the predictions of all processes.

        Raises:
            InputError: images that cannot be read. The run is saved.
        """
        distributed, ema = self.processes.distributed, self.task.has_ema()
        if distributed:
            # Every process has BatchNorm statistics of its own. The first one's count, as in a checkpoint and in DDP.
            distribute_bn(self.task.get_trainable_module(), self.processes.world_size, reduce=False)
            if ema:
                distribute_bn(self.task.get_trainable_module(ema=True), self.processes.world_size, reduce=False)
        model = self.task.get_eval_model(ema=ema)
        if distributed:
            model = getattr(model, "module", model)  # no collectives of DDP: batches may differ in size between ranks
        # Streams may differ in length between processes.
        alike = not (distributed and isinstance(self.val_batches.dataset, ImageStream))
        agreed = partial(self._agreed, training=False, alike=alike)
        predictions, some = Predictions(), SomeImages(len(self.val_batches.dataset) // self.processes.world_size)
        try:
            metrics = evaluate(
                model,
                self.val_batches,
                self.processes,
                self.autocast,
                predictions=predictions,
                iterate=lambda batches: some.keep(agreed(batches)),
            )
        except InputError:
            if self.saver.last_step < self.progress.step:
                self.saver.save()  # the epoch is trained, and continues with its validation
            raise
        metrics["seconds"] = metrics.pop("images") / metrics["images_per_second"]  # as many images in every epoch
        if self.processes.primary:
            metrics |= self._offset_lengths(unwrap_model(model), some)
        return metrics, predictions.gather(self.processes)

    def _offset_lengths(self, model: nn.Module, some: SomeImages) -> dict[str, float]:
        """Return the mean length of the offsets of each merging module in pixels, nothing for a model without."""
        merges = any(isinstance(module, DeformableTokenMerging) for module in model.modules())
        if not merges or not hasattr(model, "forward_intermediates"):
            return {}
        try:
            with torch.inference_mode(), self.autocast():
                lengths = mean_lengths(predict_offsets(model, some.images))
        except Exception as error:  # of a model of the user's: a number of the log is no reason to end a run
            logger.warning("the offsets of token merging cannot be measured: %s", one_line(error))
            return {}
        return {f"offset_px_{number}": length for number, length in enumerate(lengths, 1)}

    def _show_batch(self, report: Report, images: Tensor, target: Tensor) -> None:
        """Save pictures of a training batch for the run's page."""
        about = self.description
        names = class_labels(about["num_classes"], about["classes"])
        report.show(FIRST_BATCH, describe_batch, images, target, about["mean"], about["std"], names)

    def _describe_best(self, top1: float, predicted: Predicted) -> dict[str, Any]:
        """Describe the validation of the epoch that was counted last for the run's page."""
        images = getattr(self.val_batches.dataset, "images", None)  # a stream cannot open one again
        return describe_validation(
            self.progress.epoch,
            top1,
            predicted,
            class_labels(self.description["num_classes"], self.description["classes"]),
            None if images is None else lambda index: str(Path(*Path(images.name(index)).parts[-2:])),
            None if images is None else lambda index: images.decoder(images.open(index)[0]),
        )


def log_start(trainer: Trainer) -> None:
    """Log what a run is, and where it starts or continues."""
    config, processes, progress = trainer.config, trainer.processes, trainer.progress
    recipe = config.run.config or "none: the flags' defaults"
    logger.info("run %s, data %s, recipe %s", trainer.folder, config.data.data_dir, recipe)
    model = unwrap_model(trainer.task.get_trainable_module())
    logger.info(
        "%s: %.2f M parameters, %d classes, %d x %d images; %s, %s",
        config.model.model,
        sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        trainer.description["num_classes"],
        *to_2tuple(trainer.description["img_size"]),
        processes.device if processes.world_size == 1 else f"{processes.world_size} processes",
        config.precision.describe(processes.device),
    )
    for split, dataset in (("train", trainer.train_batches.dataset), ("val", trainer.val_batches.dataset)):
        for note in dataset.notes:
            logger.info("%s: %s", split, note)
    logger.info(
        "%d + %s images, total batch %d, %d steps per epoch, %d epochs, learning rate %.3e from %.1e to %.1e",
        len(trainer.train_batches.dataset),
        len(trainer.val_batches.dataset) or "?",
        trainer.total_batch,
        trainer.steps_per_epoch,
        trainer.epochs,
        trainer.rates["lr"],
        trainer.rates["warmup_lr"],
        trainer.rates["min_lr"],
    )
    if config.model.freeze is not None:
        frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
        logger.info("--freeze %d: %.2f M parameters are not trained", config.model.freeze, frozen / 1e6)
    if config.augment.class_weights:
        weights = trainer.task.criterion.weight
        logger.info("class weights from %.2f to %.2f", weights.min(), weights.max())
    for note in config.run.chosen:
        logger.info("%s", note)
    if config.run.cfg:
        logger.info("--cfg %s is not read: LVT's published settings are the model's defaults", config.run.cfg)
    if progress.epoch >= trainer.epochs or trainer.out_of_patience():
        logger.info("this run has ended already: %s", trainer.why_ended())
    elif progress.step:
        logger.info("continuing at epoch %d, step %d", progress.epoch + 1, progress.steps_in_epoch + 1)
    elif config.model.pretrained or config.model.initial_checkpoint:
        logger.info("starting from the weights of %s", config.model.initial_checkpoint or pretrained_source(model))
