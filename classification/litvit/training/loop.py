"""The training loop of a classifier."""

import argparse
import contextlib
import logging
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_data_config
from timm.task import ClassificationTask
from timm.utils import NativeScaler, dispatch_clip_grad, distribute_bn, get_state_dict, unwrap_model
from timm.utils.distributed import init_distributed_device_so, world_info_from_env
from torch import nn

from litvit.checkpoints import load_weights
from litvit.errors import InputError
from litvit.training.data import Stream, create_mixup, eval_loader, open_train_and_val, seed_everything, train_loader
from litvit.training.evaluate import evaluate
from litvit.training.model import autocast_context, build_model, choose_device
from litvit.training.optimizer import create_optimizer, create_scheduler, learning_rates
from litvit.training.report import Report, set_up_logging
from litvit.training.state import (
    BEST_WEIGHTS,
    CHECKPOINT,
    SETTINGS,
    load_checkpoint,
    resumed_folder,
    save_checkpoint,
    save_settings,
    save_weights,
)

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
        resumed = load_checkpoint(self.folder / CHECKPOINT) if settings.resume else None
        train_images, val_images, num_classes = open_train_and_val(settings)
        device = choose_device(settings.device)
        seed_everything(Stream.WEIGHTS, settings.seed)
        model = build_model(settings, num_classes)
        if settings.initial_checkpoint and resumed is None:
            load_weights(model, settings.initial_checkpoint, new_classifier=True)
        model.to(device)

        process = init_distributed_device_so(str(device))
        self.device = torch.device(process["device"])
        self.rank, self.world_size = process["global_rank"], process["world_size"]
        self.distributed = process["distributed"]
        model.to(self.device)

        data_config = resolve_data_config(vars(settings), model=model)
        self.train_batches = train_loader(train_images, settings, data_config, self.device, self.rank, self.world_size)
        self.val_batches = eval_loader(val_images, settings, data_config, self.device, self.distributed)
        self.mixup = create_mixup(settings, num_classes)
        self.updates_per_epoch = len(self.train_batches) // settings.grad_accum_steps
        self.total_batch = settings.batch_size * settings.grad_accum_steps * self.world_size
        self.description = {
            "model": settings.model,
            "model_kwargs": settings.model_kwargs,
            "num_classes": num_classes,
            "in_chans": settings.in_chans,
            "img_size": data_config["input_size"][-1],
            **{name: data_config[name] for name in ("mean", "std", "interpolation", "crop_pct")},
        }

        rates = learning_rates(settings, self.total_batch)
        self.optimizer = create_optimizer(model, settings, rates["lr"])
        self.scheduler, self.epochs = create_scheduler(self.optimizer, settings, rates, self.updates_per_epoch)
        self.autocast = autocast_context(settings, self.device)
        scaled = settings.amp and settings.amp_dtype == "float16" and self.device.type == "cuda"
        self.scaler = NativeScaler(device=self.device.type) if scaled else None

        if settings.sync_bn and self.distributed and self.device.type == "cuda":  # torch has no SyncBatchNorm for CPUs
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.task = ClassificationTask(
            model,
            criterion_kwargs={"smoothing": settings.smoothing, "soft_targets": self.mixup is not None},
            device=self.device,
            verbose=False,
        )
        if settings.model_ema:
            self.task.setup_ema(decay=settings.model_ema_decay, use_warmup=settings.model_ema_warmup)
        self.epoch, self.update, self.best_top1 = 0, 0, -1.0
        if resumed is not None:
            self.load_state_dict(resumed)
        if settings.torchcompile:
            self.task.compile(backend=settings.torchcompile)
        if self.distributed:
            self.task.prepare_distributed(device_ids=[self.device] if self.device.type == "cuda" else None)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.rates = rates

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on. Weights are under timm's names: timm loads the file too."""
        state = {
            "epoch": self.epoch,
            "update": self.update,
            "best_top1": self.best_top1,
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
        theirs, ours = state["description"], self.description
        for name in ("model", "num_classes", "in_chans", "img_size"):
            if theirs[name] != ours[name]:
                raise InputError(f"--resume: the run has {name} {theirs[name]}, these settings {ours[name]}")
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
        self.epoch, self.update, self.best_top1 = state["epoch"], state["update"], state["best_top1"]
        self._step_schedule()

    @property
    def lr(self) -> float:
        """Learning rate of the parameters that have no factor of their own."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def _step_schedule(self) -> None:
        """Set the learning rate of the next update; schedulers take no notice of the unit that is not theirs."""
        self.scheduler.step(self.epoch)
        self.scheduler.step_update(self.update)

    def run(self) -> dict[str, float]:
        """Train to the last epoch.

        Returns:
            The last validation's metrics and `best_top1`; nothing after a dry run.
        """
        if self.settings.dry_run:
            set_up_logging(None, self.primary)
            self._log_start()
            return {}
        if self.primary:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"cannot make the run's folder {self.folder}: {error.strerror}") from None
            kept = {name: value for name, value in vars(self.settings).items() if name not in NOT_OF_THE_RUN}
            save_settings(self.folder / SETTINGS, kept)
        set_up_logging(self.folder, self.primary)
        self._log_start()
        report = Report(self.folder, self.primary, self.epoch, self.epochs * self.updates_per_epoch)
        metrics = {}
        for epoch in range(self.epoch, self.epochs):
            train_metrics = self.train_epoch(report)
            lr = self.lr
            self.epoch = epoch + 1
            self._step_schedule()
            metrics = self.validate()
            best = metrics["top1"] > self.best_top1
            self.best_top1 = max(metrics["top1"], self.best_top1)
            if self.primary:
                if best:
                    self.save_best(metrics)
                save_checkpoint(self.folder / CHECKPOINT, self.state_dict())
            report.epoch(epoch, self.update, train_metrics, metrics, lr, self.best_top1)
        report.close()
        logger.info("best top1 %.2f; the run is in %s", self.best_top1, self.folder)
        if self.distributed:
            torch.distributed.destroy_process_group()
        return {**metrics, "best_top1": self.best_top1}

    def train_epoch(self, report: Report) -> dict[str, float]:
        """Train one epoch. Returns the mean loss over the epoch's updates, and the images a second."""
        settings, accum_steps = self.settings, self.settings.grad_accum_steps
        self.task.train()
        batches = getattr(self.train_batches, "batch_sampler", None)
        for shuffled in (batches, self.train_batches.dataset):  # an order of ours, or a stream's own
            if hasattr(shuffled, "set_epoch"):
                shuffled.set_epoch(self.epoch)
        if self.mixup is not None and settings.mixup_off_epoch:
            self.mixup.mixup_enabled = self.epoch < settings.mixup_off_epoch

        bar = report.bar(self.epoch, self.epochs, self.updates_per_epoch)
        epoch_loss = interval_loss = torch.zeros((), device=self.device)  # summed on the device: no wait in an update
        first_update = reported_update = self.update
        start = reported = time.perf_counter()
        for index, (images, target) in enumerate(self.train_batches):
            if index == self.updates_per_epoch * accum_steps:
                break  # a stream's last, incomplete update
            # the random numbers of a pass depend on its place in the run alone: nothing to save, nothing to restore
            seed_everything(Stream.PASS, settings.seed, self.epoch, index, self.rank)
            if self.mixup is not None:
                images, target = self.mixup(images, target)
            last_pass = (index + 1) % accum_steps == 0
            with contextlib.nullcontext() if last_pass else self.task.no_sync():
                with self.autocast():
                    loss = self.task(images, target)["loss"] / accum_steps
                self._backward(loss, last_pass)
            interval_loss = interval_loss + loss.detach()
            if not last_pass:
                continue
            self.update += 1
            self.task.update_ema(self.update)
            self.scheduler.step_update(self.update)
            bar.update()
            done = self.update - first_update
            if done % settings.log_interval == 0 or done == self.updates_per_epoch:
                updates = self.update - reported_update
                mean_loss = interval_loss / updates
                if self.distributed:
                    torch.distributed.all_reduce(mean_loss, torch.distributed.ReduceOp.SUM)
                    mean_loss = mean_loss / self.world_size
                now = time.perf_counter()
                images = updates * self.total_batch
                report.train(bar, self.epoch, self.update, mean_loss.item(), self.lr, images, now - reported)
                epoch_loss = epoch_loss + mean_loss * updates
                interval_loss, reported_update, reported = torch.zeros_like(interval_loss), self.update, now
        bar.close()
        done = max(self.update - first_update, 1)
        seconds = time.perf_counter() - start
        return {"loss": epoch_loss.item() / done, "images_per_second": done * self.total_batch / seconds}

    def _backward(self, loss: torch.Tensor, update: bool) -> None:
        """Backward pass and, at the last pass of an update, clipping and the optimizer's step."""
        clip = self.settings.clip_grad
        if self.scaler is not None:
            parameters = self.task.get_clip_parameters()
            self.scaler(loss, self.optimizer, clip_grad=clip, parameters=parameters, need_update=update)
        else:
            loss.backward()
            if update:
                if clip is not None:
                    dispatch_clip_grad(self.task.get_clip_parameters(), clip)
                self.optimizer.step()
        if update:
            self.optimizer.zero_grad()

    def validate(self) -> dict[str, float]:
        """Validate the model, or its average where there is one."""
        if self.distributed:  # every process has BatchNorm statistics of its own
            distribute_bn(self.task.get_trainable_module(), self.world_size, reduce=True)
            if self.task.has_ema():
                distribute_bn(self.task.get_trainable_module(ema=True), self.world_size, reduce=True)
        model = self.task.get_eval_model(ema=self.task.has_ema())
        if self.distributed:
            model = getattr(model, "module", model)  # no collectives of DDP: ranks may have batches of other sizes
        return evaluate(model, self.val_batches, self.device, self.autocast, distributed=self.distributed)

    def save_best(self, metrics: dict[str, float]) -> None:
        """Save the validated weights."""
        model = self.task.get_eval_model(ema=self.task.has_ema())
        description = {**self.description, "top1": metrics["top1"], "epoch": self.epoch}
        save_weights(self.folder / BEST_WEIGHTS, get_state_dict(model, unwrap_model), description)

    def _log_start(self) -> None:
        settings = self.settings
        logger.info("run %s, recipe %s", self.folder, settings.config or "none: the flags' defaults")
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
        if self.epoch:
            logger.info("continuing at epoch %d", self.epoch + 1)


# settings that say where and how a run is carried out, not what it computes
NOT_OF_THE_RUN = ("data_dir", "config", "resume", "dry_run", "device", "output", "experiment")


def run_folder(settings: argparse.Namespace, primary: bool) -> Path:
    """The run's folder: the resumed one, or `output`/`experiment`, which must not hold a run yet.

    Raises:
        InputError: the folder holds a run, or there is no run to resume.
    """
    if settings.resume:
        return resumed_folder(settings.resume)
    if settings.experiment is None:
        settings.experiment = f"{datetime.now():%Y%m%d-%H%M%S}-{settings.model}"
    folder = Path(settings.output) / settings.experiment
    if primary and (folder / CHECKPOINT).exists():
        raise InputError(f"{folder} holds a run: continue it with --resume {folder}, or choose another --experiment")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: choose another --output or --experiment")
    return folder
