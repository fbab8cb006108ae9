"""A run from its settings: its parts are made in order, and each part of the project gets its settings once."""

from dataclasses import replace
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import nn

from litvit.checkpoints import load_weights
from litvit.data.loader import Batch, TrainingData
from litvit.data.random_streams import Stream, random_stream, seed_everything
from litvit.data.token_labels import TokenLabels
from litvit.errors import InputError
from litvit.processes import Processes, is_primary, start_processes
from litvit.runs.folder import RunFolder
from litvit.runs.loggers import check_loggers
from litvit.training.blank_images import blank_targets, check_scores, unchanged, wrong_settings
from litvit.training.config import Config
from litvit.training.model import (
    ModelConfig,
    build_model,
    data_settings,
    freeze_stages,
    image_size,
    initial_weights,
    named_weights,
)
from litvit.training.optimizer import check_optimizer, create_optim
from litvit.training.step_guard import StepGuard
from litvit.training.tasks import create_task, token_grid
from litvit.training.trainer import Trainer


def build_trainer(config: Config) -> Trainer:
    """Make the parts of a run in order, and find everything that is wrong with the input before a file is written.

    Args:
        config: Settings of the run, from `parse_config` or made in Python.

    Raises:
        InputError: wrong settings, data or checkpoint.
    """
    check_loggers(config.run.logger)
    folder = RunFolder(config.run, config.model.model, is_primary())
    resumed = folder.load_last() if config.run.resume else None
    processes = start_processes(config.run.device, config.run.dry_run)
    _check_same_checkpoint(processes, resumed, folder)
    data = TrainingData(config.data, config.augment, config.model.decoder, config.run.seed)

    seed_everything(Stream.WEIGHTS, config.run.seed)
    start = config.model if resumed is None else replace(config.model, pretrained=False)
    model = build_model(start, data.num_classes)
    if config.model.initial_checkpoint and resumed is None:
        weights, described = initial_weights(config.model.initial_checkpoint)
        with named_weights(weights, config.model.model):
            load_weights(model, weights, new_classifier=True)
        data.train.notes += _differences(config.model, described, data.classes)
    if config.model.freeze is not None:
        freeze_stages(model, config.model.freeze)
    model.to(processes.device)
    data_config = data_settings(config.model, model)

    labels, token_labels = config.token_labels, None
    if labels.token_label:
        size = token_grid(model, config.model.model, data_config["input_size"][1:], labels.token_label_size)
        token_labels = TokenLabels(labels.token_label_data, data.train, data.num_classes, size)
    accum_steps = config.optim.grad_accum_steps
    train_batches, val_batches = data.batches(data_config, processes, accum_steps, token_labels)
    total_batch = config.data.batch_size * accum_steps * processes.world_size
    steps_per_epoch = len(train_batches) // accum_steps
    optimizer, scheduler, epochs, rates = create_optim(model, config.optim, total_batch, steps_per_epoch)

    if config.model.sync_bn and processes.distributed and processes.device.type == "cuda":  # torch has none for CPUs
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    smoothing = None if data.mixup else config.augment.smoothing
    grid = token_labels and token_labels.size
    task = create_task(model, processes.device, labels, grid, smoothing, data.class_weights())
    precision = config.precision
    if precision.model_ema:
        task.setup_ema(decay=precision.model_ema_decay, use_warmup=precision.model_ema_warmup)
    scaler = precision.grad_scaler(processes.device)
    trainer = Trainer(
        config=config,
        folder=folder,
        processes=processes,
        train_batches=train_batches,
        val_batches=val_batches,
        mixup=data.mixup,
        task=task,
        optimizer=optimizer,
        scheduler=scheduler,
        guard=StepGuard(task, optimizer, scaler, config.optim.clip_grad, processes.device),
        description={**_describe(config.model, data_config, data.num_classes, data.classes), **_describe_split(data)},
        rates=rates,
        epochs=epochs,
        autocast=precision.autocast(processes.device),
    )
    if resumed is not None:
        trainer.load_state_dict(resumed)
    check_step(trainer)
    if precision.torchcompile:
        task.compile(backend=precision.torchcompile)
    if processes.distributed:
        task.prepare_distributed(device_ids=[processes.device] if processes.device.type == "cuda" else None)
    trainer.guard.watch(model)
    return trainer


def check_step(trainer: Trainer) -> None:
    """Classify and train on one or two blank images, as the first step would. The run stays as it is.

    Args:
        trainer: Trainer of the run, its model not compiled yet: it would be compiled for this batch size.

    Raises:
        InputError: settings that the model or the optimizer cannot take a step with.
    """
    config, device, number = trainer.config, trainer.processes.device, min(trainer.config.data.batch_size, 2)
    size = (config.model.in_chans, *to_2tuple(trainer.description["img_size"]))
    num_classes = trainer.description["num_classes"]
    model = trainer.task.get_trainable_module()

    def step(number: int) -> None:
        token_labels = getattr(trainer.train_batches, "token_labels", None)
        target = blank_targets(number, num_classes, token_labels, device)
        with unchanged(model), wrong_settings("train", config.model, config.precision):
            model.train()
            trainer.forward_backward(Batch(torch.zeros(number, *size, device=device), target, []), 0, True)

    devices = [device] if device.type == "cuda" else []
    with random_stream(Stream.MICRO_BATCH, config.run.seed), torch.random.fork_rng(devices):
        check_scores(model, config.model, config.precision, size, num_classes, device)
        check_optimizer(config.optim, device)
        try:
            step(number)
        except InputError as error:
            if number > 1:
                raise
            step(2)  # other faults than the batch size
            raise InputError(
                f"{config.model.model} cannot train on one image of {size[1]} x {size[2]} pixels at a time: "
                f"--batch-size 2 or more, or a larger --img-size ({' '.join(str(error.__cause__).split())})"
            ) from error


def _differences(config: ModelConfig, description: dict[str, Any], classes: list[str] | None) -> list[str]:
    """Return sentences on how the images differ from those that the initial checkpoint was trained on."""
    file, notes = config.initial_checkpoint, []
    known = description.get("classes")
    if known and classes and len(known) == len(classes) and known != classes:
        notes.append(f"the classifier of {file} starts with other classes: number 0 was {known[0]}, is {classes[0]}")
    if description and bool(description.get("exif_transpose")) != config.exif_transpose:
        flag = "--exif-transpose" if description.get("exif_transpose") else "--no-exif-transpose"
        notes.append(f"the weights of {file} were trained with {flag}")
    return notes


def _check_same_checkpoint(processes: Processes, resumed: dict[str, Any] | None, folder: RunFolder) -> None:
    found = -1 if resumed is None else resumed["update"]
    if processes.distributed and processes.sum(found)[0] != found * processes.world_size:
        raise InputError(f"processes find different checkpoints in {folder}: all nodes must share --output")


def _describe_split(data: TrainingData) -> dict[str, Any]:
    """Return which images are held out to validate on, so that they are told from those that were trained on."""
    return {} if data.held_out is None else {"val_fraction": data.config.val_fraction, "held_out": data.held_out}


def _describe(
    config: ModelConfig, data_config: dict[str, Any], num_classes: int, classes: list[str] | None
) -> dict[str, Any]:
    """Return what a file of weights says of its model, see `read_description`."""
    return {
        "model": config.model,
        "model_kwargs": config.model_kwargs,
        "num_classes": num_classes,
        "classes": classes,
        "in_chans": config.in_chans,
        "exif_transpose": config.exif_transpose,
        "img_size": image_size(data_config["input_size"][1:]),
        **{name: data_config[name] for name in ("mean", "std", "interpolation", "crop_pct")},
    }
