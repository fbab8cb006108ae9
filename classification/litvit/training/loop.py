"""The training loop of a classifier."""

import argparse
import contextlib
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError
from timm.task import ClassificationTask
from timm.utils import distribute_bn, get_state_dict, unwrap_model
from timm.utils.distributed import init_distributed_device_so, world_info_from_env
from torch import nn
from torch.utils.data import IterableDataset

from litvit.checkpoints import load_weights
from litvit.errors import InputError
from litvit.memory import keep_freed_memory
from litvit.training.data import class_list, open_train_and_val
from litvit.training.evaluate import evaluate
from litvit.training.loaders import create_mixup, eval_loader, train_loader
from litvit.training.model import autocast_context, build_model, choose_device, data_settings
from litvit.training.optimizer import create_optimizer, create_scheduler, learning_rates
from litvit.training.recipe import interval
from litvit.training.report import Report, set_up_logging
from litvit.training.samples import Stream, seed_everything
from litvit.training.state import (
    BEST_WEIGHTS,
    CHECKPOINT,
    DIVERGED,
    MAY_CHANGE,
    NOT_OF_THE_RUN,
    SETTINGS,
    load_last_checkpoint,
    lock_folder,
    run_folder,
    save_checkpoint,
    save_settings,
    save_state,
    save_weights,
)
from litvit.training.stop import EXIT_DIVERGED, EXIT_INTERRUPTED, Agreement, Diverged, Interrupted, StopSignals
from litvit.training.token_labels import TokenLabels, TokenLabelTask, token_grid

logger = logging.getLogger("litvit")


class Training:
    """One run: model, optimizer, schedule, data, and how far it has come.

    Everything that can be wrong with the input is found out here, before a file is written.

    Args:
        settings: flags of train.py, from `parse_settings`.

    Raises:
        InputError: wrong settings, data or checkpoint.
    """

    def __init__(self, settings: argparse.Namespace):
        self.settings = settings
        self.primary = world_info_from_env()[1] == 0
        self.folder = run_folder(settings, self.primary)
        set_aside = self.primary and not settings.dry_run
        resumed = load_last_checkpoint(self.folder, set_aside) if settings.resume else None
        device = choose_device(settings.device)
        if device.type == "cpu":
            keep_freed_memory()
        # before the data is opened: timm's streaming readers ask for the number of processes
        process = init_distributed_device_so(device.type if device.index is None else str(device))
        train_images, val_images, num_classes = open_train_and_val(settings)
        seed_everything(Stream.WEIGHTS, settings.seed)
        model = build_model(settings, num_classes)
        if settings.initial_checkpoint and resumed is None:
            load_weights(model, settings.initial_checkpoint, new_classifier=True)

        self.device = torch.device(process["device"])
        self.rank, self.world_size = process["global_rank"], settings.dry_run or process["world_size"]
        self.distributed = process["distributed"]
        model.to(self.device)
        self.agreement = Agreement(self.distributed)
        found = -1 if resumed is None else resumed["update"]
        if self.distributed and self.agreement.sum(found)[0] != found * self.world_size:
            raise InputError(f"processes find different checkpoints in {self.folder}: all nodes must share --output")

        data_config = data_settings(settings, model)
        token_labels = None
        if settings.token_label:
            size = token_grid(settings, model, data_config["input_size"][-1])
            token_labels = TokenLabels(settings.token_label_data, train_images, num_classes, size)
        self.train_batches = train_loader(
            train_images, settings, data_config, self.device, self.rank, self.world_size, token_labels
        )
        self.val_batches = eval_loader(val_images, settings, data_config, self.device, self.distributed)
        self.mixup = create_mixup(settings, num_classes)
        self.updates_per_epoch = len(self.train_batches) // settings.grad_accum_steps
        self.total_batch = settings.batch_size * settings.grad_accum_steps * self.world_size
        self.description = {
            "model": settings.model,
            "model_kwargs": settings.model_kwargs,
            "num_classes": num_classes,
            "classes": class_list(train_images),
            "in_chans": settings.in_chans,
            "img_size": data_config["input_size"][-1],
            **{name: data_config[name] for name in ("mean", "std", "interpolation", "crop_pct")},
        }

        rates = learning_rates(settings, self.total_batch)
        self.optimizer = create_optimizer(model, settings, rates["lr"])
        self.scheduler, self.epochs = create_scheduler(self.optimizer, settings, rates, self.updates_per_epoch)
        self.autocast = autocast_context(settings, self.device)
        scaled = settings.amp and settings.amp_dtype == "float16" and self.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(self.device.type) if scaled else None

        if settings.sync_bn and self.distributed and self.device.type == "cuda":  # torch has no SyncBatchNorm for CPUs
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if token_labels is not None:
            weights = settings.cls_weight, settings.dense_weight
            self.task = TokenLabelTask(
                model, token_labels.size, *weights, settings.mix_token, device=self.device, verbose=False
            )
        else:
            self.task = ClassificationTask(
                model,
                criterion_kwargs={"smoothing": settings.smoothing, "soft_targets": self.mixup is not None},
                device=self.device,
                verbose=False,
            )
        if settings.model_ema:
            self.task.setup_ema(decay=settings.model_ema_decay, use_warmup=settings.model_ema_warmup)
        # how far the run has come: `update` counts all updates, `done` those of this epoch; `done` = all: not validated
        self.epoch, self.update, self.done, self.best_top1 = 0, 0, 0, -1.0
        self.loss_sum = torch.zeros((), device=self.device)  # over the epoch's updates; on the device: no wait
        self.bad_in_a_row = torch.zeros((), device=self.device)
        self.bad_updates = torch.zeros((), device=self.device)
        self.unreadable: list[str] = []  # of this epoch
        self.broken_labels: list[str] = []
        self.last_save, self.saved = time.monotonic(), True
        self.signals = StopSignals()
        if resumed is not None:
            self.load_state_dict(resumed)
        if settings.torchcompile:
            self.task.compile(backend=settings.torchcompile)
        if self.distributed:
            self.task.prepare_distributed(device_ids=[self.device] if self.device.type == "cuda" else None)
        self.buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.rates = rates

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on. Weights are under timm's names: timm loads the file too."""
        state = {
            "epoch": self.epoch,
            "update": self.update,
            "done": self.done,
            "best_top1": self.best_top1,
            "loss_sum": self._mean_over_processes(self.loss_sum).item(),
            "bad": [self.bad_in_a_row.item(), self.bad_updates.item()],
            "unreadable": self.agreement.join(self.unreadable),
            "total_batch": self.total_batch,
            "num_images": len(self.train_batches.dataset),
            "settings": self._settings_of_the_run(),
            "description": self.description,
            "optimizer": self.optimizer.state_dict(),
            **self.task.get_checkpoint_state(),
            **(self.task.get_checkpoint_state(ema=True) if self.task.has_ema() else {}),
        }
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        Raises:
            InputError: the state is of another model, other classes or another optimizer.
        """
        self._refuse_changes(state)
        try:
            self.task.load_checkpoint_state(state["state_dict"])
            if self.task.has_ema():
                self.task.load_checkpoint_state(state.get("state_dict_ema", state["state_dict"]), ema=True)
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"--resume: the checkpoint does not fit these settings: {reason}") from None
        if self.scaler is not None and "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.update, self.done = state["epoch"], state["update"], state["done"]
        self.best_top1 = state["best_top1"]
        self.unreadable = state["unreadable"] if self.primary else []  # the processes' lists are joined in a checkpoint
        self.loss_sum.fill_(state["loss_sum"])
        for tensor, number in zip((self.bad_in_a_row, self.bad_updates), state["bad"], strict=True):
            tensor.fill_(number)
        self._step_schedule()

    def _settings_of_the_run(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self.settings).items() if name not in NOT_OF_THE_RUN}

    def _refuse_changes(self, state: dict[str, Any]) -> None:
        """Refuse settings under which the rest of the run would not be the rest of that run."""
        theirs, ours = state["settings"], self._settings_of_the_run()
        theirs |= {"total_batch": state["total_batch"], "number of training images": state["num_images"]}
        ours |= {"total_batch": self.total_batch, "number of training images": len(self.train_batches.dataset)}
        changed = [
            f"{name} was {theirs[name]}, is {ours[name]}"
            for name in sorted((theirs.keys() & ours.keys()) - set(MAY_CHANGE))
            if theirs[name] != ours[name]
        ]
        if changed:
            raise InputError(
                f"{self.folder} holds a run with other settings ({'; '.join(changed)}): continue it with its own, or "
                "choose another --experiment"
            )

    @property
    def lr(self) -> float:
        """Learning rate of the parameters that have no factor of their own."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def _step_schedule(self) -> None:
        """Set the learning rate of the next update; schedulers take no notice of the unit that is not theirs."""
        self.scheduler.step(self.epoch)
        self.scheduler.step_update(self.update)

    def run(self) -> int:
        """Train to the last epoch, or until a signal.

        Returns:
            Exit status: 0 trained, EXIT_INTERRUPTED, EXIT_DIVERGED.

        Raises:
            InputError: the run's folder cannot be made, a label file is broken, or too many images cannot be decoded.
        """
        if self.settings.dry_run:
            set_up_logging(None, self.primary)
            self._log_start()
            return 0
        if self.primary:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                lock = lock_folder(self.folder)
                save_settings(self.folder / SETTINGS, self._settings_of_the_run())
            except OSError as error:
                raise InputError(f"cannot write to the run's folder {self.folder}: {error.strerror}") from None
        set_up_logging(self.folder, self.primary)
        self._log_start()
        report = Report(self.folder, self.primary, self.epoch, self.epochs * self.updates_per_epoch)
        status = 0
        try:
            with self.signals:
                while self.epoch < self.epochs:
                    self.run_epoch(report)
        except Interrupted:
            status = EXIT_INTERRUPTED
        except Diverged as error:
            status = EXIT_DIVERGED
            logger.error("%s", error)
        finally:
            report.close()
            if self.primary:
                lock.close()
        if status == 0 and self.primary and not self.saved:
            status = EXIT_INTERRUPTED
            logger.error("the run has ended, but its end is NOT saved: make room in %s and run it again", self.folder)
        elif status == 0:
            logger.info("the run has ended: best top1 %.2f; it is in %s", self.best_top1, self.folder)
        if self.distributed:
            torch.distributed.destroy_process_group()
        return status

    def run_epoch(self, report: Report) -> None:
        """Train what is left of an epoch, validate, save, report."""
        speed = self.train_epoch(report)
        lr = self.lr
        metrics = self.validate()
        loss = self._mean_over_processes(self.loss_sum).item() / self.updates_per_epoch
        self.epoch, self.done = self.epoch + 1, 0
        self.loss_sum.zero_()
        self.unreadable = []
        self._step_schedule()
        best = metrics["top1"] > self.best_top1
        self.best_top1 = max(metrics["top1"], self.best_top1)
        if best and self.primary:
            self._write(self.save_best, metrics)
        train_metrics = {"loss": loss, "images_per_second": speed}
        report.epoch(self.epoch - 1, self.update, train_metrics, metrics, lr, self.best_top1)
        self.saved = self.save()  # last: a run that is killed before it writes the row again

    def train_epoch(self, report: Report) -> float:
        """Train what is left of an epoch. Returns images a second, over all processes."""
        settings, accum_steps = self.settings, self.settings.grad_accum_steps
        self.task.train()
        self.train_batches.set_epoch(self.epoch, self.done)
        if self.mixup is not None and settings.mixup_off_epoch:
            self.mixup.mixup_enabled = self.epoch < settings.mixup_off_epoch

        bar = report.bar(self.epoch, self.epochs, self.updates_per_epoch, self.done)
        first = reported = self.done
        reported_loss = self.loss_sum.clone()
        start = reported_time = time.perf_counter()
        unreadable: list[str] = []
        batches = iter(self.train_batches) if self.done < self.updates_per_epoch else iter(())
        for index, batch in enumerate(batches, self.done * accum_steps):
            if self.done == self.updates_per_epoch:
                break  # a stream's last, incomplete update
            # the random numbers of a pass depend on its place in the run alone: nothing to save, nothing to restore
            seed_everything(Stream.PASS, settings.seed, self.epoch, index, self.rank)
            images, target = batch.images, batch.target
            unreadable += batch.unreadable
            self.broken_labels += batch.broken_labels
            if self.mixup is not None:
                images, target = self.mixup(images, target)
            last_pass = (index + 1) % accum_steps == 0
            first_pass = index % accum_steps == 0
            if first_pass:
                buffers = [buffer.clone() for buffer in self.buffers]
                loss_of_update = torch.zeros_like(self.loss_sum)
            with contextlib.nullcontext() if last_pass else self.task.no_sync():
                with self.autocast():
                    loss = self.task(images, target)["loss"] / accum_steps
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            loss_of_update += loss.detach()
            if not last_pass:
                continue
            self._stop_at_broken_labels()
            self._step(loss_of_update, buffers)
            self.done += 1
            self.update += 1
            self.task.update_ema(self.update)
            self.scheduler.step_update(self.update)
            bar.update()
            if self.done % settings.log_interval == 0 or self.done == self.updates_per_epoch:
                loss = self._mean_over_processes(self.loss_sum - reported_loss).item() / (self.done - reported)
                now = time.perf_counter()
                images_seen = (self.done - reported) * self.total_batch
                report.train(bar, self.epoch, self.update, loss, self.lr, images_seen, now - reported_time)
                self._stop_if_diverged()
                reported_loss, reported, reported_time = self.loss_sum.clone(), self.done, now
            self.check_in(unreadable)
            unreadable = []
        bar.close()
        return (self.done - first) * self.total_batch / (time.perf_counter() - start)

    def _step(self, loss: torch.Tensor, buffers: list[torch.Tensor]) -> None:
        """Clip and take the optimizer's step, or leave the update out where the loss or a gradient is not finite.

        DDP has averaged the gradients: one process's bad number is every process's, and all leave the update out.
        Nothing waits for the device, but where the optimizer cannot be told there.

        Args:
            loss: mean over the update's passes, of this process.
            buffers: what the model's (BatchNorm's statistics) were before the update.
        """
        parameters = [p for p in self.task.get_clip_parameters() if p.grad is not None]
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip_grad or torch.inf)
        bad = (~torch.isfinite(norm)).float()
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self.optimizer.defaults.get("fused"):
            self.optimizer.found_inf = bad  # what GradScaler tells a fused optimizer: not to step
            self.optimizer.step()
        elif not bad.item():
            self.optimizer.step()
        self.optimizer.zero_grad()
        for buffer, before in zip(self.buffers, buffers, strict=True):
            torch.where(bad.bool(), before, buffer, out=buffer)
        self.loss_sum += torch.where(bad.bool(), 0.0, loss)
        self.bad_updates += bad
        self.bad_in_a_row = (self.bad_in_a_row + bad) * bad

    def _stop_at_broken_labels(self) -> None:
        """Save, and raise InputError, before an update for which a process could not read a label file."""
        if not self.settings.token_label:
            return
        (broken,) = self.agreement.sum(len(self.broken_labels))
        if broken:
            self.save()  # nothing of this update is in the state yet
            raise InputError(self.agreement.join(self.broken_labels)[0])

    def _stop_if_diverged(self) -> None:
        """Warn of updates that were left out, and stop when they no longer end."""
        in_a_row, total = int(self.bad_in_a_row.item()), int(self.bad_updates.item())
        if in_a_row:
            logger.warning("update %d: %d updates left out, the loss or a gradient is not finite", self.update, total)
        if in_a_row >= BAD_IN_A_ROW:
            state = self.state_dict()
            if self.primary:
                self._write(save_state, self.folder / DIVERGED, state)
            raise Diverged(
                f"the loss or a gradient was not finite in {in_a_row} updates in a row, up to update {self.update}: "
                f"start again with a lower --lr or --clip-grad in a new --experiment (--initial-checkpoint "
                f"{self.folder / CHECKPOINT} for its weights); the state is in {self.folder / DIVERGED}"
            )

    def check_in(self, unreadable: list[str]) -> None:
        """Between updates and batches of validation: save when it is time, leave when a signal says so.

        All processes call it at the same places and decide alike.

        Args:
            unreadable: files that this process could not decode since the last call.

        Raises:
            Interrupted: after saving.
            InputError: more unreadable images than `max_unreadable` allows.
        """
        kind, every = interval(self.settings.checkpoint_every)
        due = self.update % every == 0 if kind == "updates" else time.monotonic() - self.last_save > every
        due = due and self.primary and self.done < self.updates_per_epoch
        if unreadable:
            for path in unreadable:
                logger.warning("cannot decode %s: another image takes its place", path)
            self.unreadable += unreadable
        stop, due, count = self.agreement.sum(self.signals.received is not None, due, len(self.unreadable))
        limit = self.settings.max_unreadable * self.updates_per_epoch * self.total_batch
        if count > limit:
            names = self.agreement.join(self.unreadable)
            self.unreadable = []  # those that are left will be counted anew
            self.save()
            raise InputError(
                f"cannot read the images {', '.join(names[:20])} ({count:.0f} of an epoch, "
                f"more than --max-unreadable {self.settings.max_unreadable} allows): mend or replace them, and continue"
            )
        saved = (stop or due) and self.save()
        if stop:
            if self.primary:
                name = self.signals.received.name if self.signals.received else "a signal in another process"
                place = f"saved at update {self.done} of epoch {self.epoch + 1}" if saved else "NOT saved"
                logger.warning("%s: %s; --resume %s continues from its last checkpoint", name, place, self.folder)
            raise Interrupted

    def save(self) -> bool:
        """Save the full state; a disk that does not take it is reported, and the run goes on.

        Returns:
            Whether it is saved, in the first process; the others do not know.
        """
        state = self.state_dict()
        saved = self.primary and self._write(save_checkpoint, self.folder, state)
        self.last_save = time.monotonic()
        return saved

    def _write(self, write: Callable[..., None], *args: Any) -> bool:
        try:
            write(*args)
            return True
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0]
            logger.warning("cannot save in %s (%s): the run goes on, the next save tries again", self.folder, reason)
            return False

    def _mean_over_processes(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self.distributed:
            return tensor
        mean = tensor.clone()
        torch.distributed.all_reduce(mean)
        return mean / self.world_size

    def validate(self) -> dict[str, float]:
        """Validate the model, or its average where there is one."""
        if self.distributed:
            # every process has BatchNorm statistics of its own; the first one's count, as in a checkpoint and in DDP
            distribute_bn(self.task.get_trainable_module(), self.world_size, reduce=False)
            if self.task.has_ema():
                distribute_bn(self.task.get_trainable_module(ema=True), self.world_size, reduce=False)
        model = self.task.get_eval_model(ema=self.task.has_ema())
        if self.distributed:
            model = getattr(model, "module", model)  # no collectives of DDP: ranks may have batches of other sizes
        streamed = self.distributed and isinstance(self.val_batches.dataset, IterableDataset)
        return evaluate(
            model,
            self.val_batches,
            self.device,
            self.autocast,
            distributed=self.distributed,
            after_batch=None if streamed else partial(self.check_in, []),  # streams may differ in length
        )

    def save_best(self, metrics: dict[str, float]) -> None:
        """Save the validated weights."""
        model = self.task.get_eval_model(ema=self.task.has_ema())
        description = {**self.description, "top1": metrics["top1"], "epoch": self.epoch}
        save_weights(self.folder / BEST_WEIGHTS, get_state_dict(model, unwrap_model), description)

    def _log_start(self) -> None:
        settings = self.settings
        logger.info(
            "run %s, data %s, recipe %s", self.folder, settings.data_dir, settings.config or "none: the flags' defaults"
        )
        precision = settings.amp_dtype if settings.amp else "float32"
        if settings.amp and settings.amp_dtype == "float16" and self.device.type == "cpu":
            precision = "float32 (float16 needs a GPU; --amp-dtype bfloat16 works on a CPU)"
        logger.info(
            "%s: %.2f M parameters, %d classes, %d x %d images; %s, %s",
            settings.model,
            self.parameters / 1e6,
            self.description["num_classes"],
            self.description["img_size"],
            self.description["img_size"],
            self.device if self.world_size == 1 else f"{self.world_size} processes",
            precision,
        )
        logger.info(
            "%d + %d images, total batch %d, %d updates an epoch, %d epochs, learning rate %.3e from %.1e to %.1e",
            len(self.train_batches.dataset),
            len(self.val_batches.dataset),
            self.total_batch,
            self.updates_per_epoch,
            self.epochs,
            self.rates["lr"],
            self.rates["warmup_lr"],
            self.rates["min_lr"],
        )
        if settings.cfg:
            logger.info("--cfg %s is not read: LVT's published settings are the model's defaults", settings.cfg)
        if self.epoch >= self.epochs:
            logger.info("this run has ended already")
        elif self.update:
            logger.info("continuing at epoch %d, update %d", self.epoch + 1, self.done + 1)


BAD_IN_A_ROW = 10
