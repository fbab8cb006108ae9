"""mmengine's Runner for the command lines: it finds wrong input first, and a CPU can do what a GPU can."""

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import product
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import torch
from mmengine import runner as mmengine_runner
from mmengine.config import Config
from mmengine.dist import broadcast_object_list, is_distributed, is_main_process, master_only
from mmengine.evaluator import Evaluator
from mmengine.hooks import CheckpointHook, EarlyStoppingHook, LoggerHook
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import OPTIMIZERS
from mmengine.runner import BaseLoop, ValLoop
from torch import nn
from torch.utils.data import DataLoader

from litvit.data.workers import WatchedLoader
from litvit.errors import InputError, is_from_user_code, one_line
from litvit.openmmlab import checks
from litvit.openmmlab.backbones import MMBackbone
from litvit.openmmlab.checkpoint_hook import NotSaved, save_before_deleting
from litvit.openmmlab.checkpoints import (
    latest_checkpoint,
    load_checkpoint_checked,
    local_rank,
    read_meta,
    unwrap,
)
from litvit.openmmlab.loops import ExactEpochs, ExactIterations, ExactValidation, make_exact
from litvit.openmmlab.mmcv_ops import provide_operators
from litvit.openmmlab.step_guard import GuardedSteps, guard_steps
from litvit.runs.folder import CHECKPOINT, DIVERGED, PREVIOUS, interval, replace_file
from litvit.training.step_guard import Diverged

# mmengine has every process write the results of a test into the same file, at the same time.
LoggerHook.after_test_epoch = master_only(LoggerHook.after_test_epoch)

CHECKPOINT_EVERY = "10m"


class _Runner(mmengine_runner.Runner):
    """mmengine's Runner that finds wrong input first, and that runs several processes on a CPU too."""

    dataloaders = ()
    required_prefix = ""  # prefix of the entries of a checkpoint that must fit

    @classmethod
    def from_cfg(cls, cfg: Config) -> "_Runner":
        for name in cls.dataloaders:
            if cfg.get(name):
                checks.check_data_settings(cfg[name].dataset)
        wrapper = cfg.get("optim_wrapper") or {}
        if wrapper.get("type") == "AmpOptimWrapper" and not torch.cuda.is_available():
            print("no GPU: float32 instead of half precision", file=sys.stderr)
            cfg.optim_wrapper.type = "OptimWrapper"
            for setting in ("loss_scale", "dtype"):
                cfg.optim_wrapper.pop(setting, None)
        return super().from_cfg(cfg)

    def setup_env(self, env_cfg: dict) -> None:
        if self.distributed and not is_distributed() and not torch.cuda.is_available():
            torch.distributed.init_process_group("gloo")
        super().setup_env(env_cfg)

    def build_logger(self, *args, **kwargs) -> MMLogger:
        logger = super().build_logger(*args, **kwargs)
        logger.info(provide_operators())
        return logger

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        if self.distributed and not torch.cuda.is_available():
            model = revert_sync_batchnorm(model)  # it has no CPU version; mmengine reverts it for one process only
            unused = self.cfg.get("find_unused_parameters", False)
            plain = {"type": "MMDistributedDataParallel", "broadcast_buffers": False, "find_unused_parameters": unused}
            model_wrapper_cfg = {**(model_wrapper_cfg or plain), "device_ids": None}
        return super().wrap_model(model_wrapper_cfg, model)

    def build_model(self, model: Any) -> nn.Module:
        built = super().build_model(model)
        backbone, neck = (getattr(unwrap(built), name, None) for name in ("backbone", "neck"))
        wanted = getattr(neck, "in_channels", None)
        if isinstance(backbone, MMBackbone) and isinstance(wanted, list) and len(backbone.out_indices) != len(wanted):
            raise InputError(
                f"the backbone gives {len(backbone.out_indices)} levels, the neck takes {len(wanted)}: set "
                "model.backbone.out_indices and model.neck.in_channels to the same levels"
            )
        return built

    def build_dataloader(self, dataloader: Any, *args, **kwargs) -> DataLoader:
        try:
            built = mmengine_runner.Runner.build_dataloader(dataloader, *args, **kwargs)
        except JSONDecodeError as error:
            raise InputError(f"an annotation file is not JSON, or cut off: {error}") from error
        except ValueError as error:
            # mmengine raises this for an empty data set.
            if "need at least one array" not in str(error) or is_from_user_code(error):
                raise
            if self.cfg.get("default_scope") == "mmseg":
                raise InputError(
                    "no image's name ends in the data set's img_suffix: set img_suffix='.png' or what they end in "
                    "(seg_map_suffix for the annotations)"
                ) from error
            raise InputError(f"no image has an object of the config's classes: {checks.FIX_CLASSES}") from error
        except (KeyError, TypeError, AttributeError, AssertionError) as error:
            if is_from_user_code(error):
                raise
            file = dataloader.get("dataset", {}).get("ann_file", "") if isinstance(dataloader, dict) else ""
            is_data = file and "DataLoader" not in str(error)
            problem = f"cannot read the data set {file}" if is_data else "the dataloader does not fit"
            raise InputError(f"{problem}: {one_line(error)}") from error
        for dataset in checks.base_datasets(built.dataset):
            checks.check_classes(dataset, unwrap(self.model))
            if hasattr(dataset, "reduce_zero_label"):
                checks.check_annotations(dataset, unwrap(self.model).num_classes)
            if hasattr(dataset, "pipeline"):
                checks.check_files(dataset.pipeline, dataset.ann_file if hasattr(dataset, "cat_ids") else "")
        if all(hasattr(dataset, "reduce_zero_label") for dataset in checks.base_datasets(built.dataset)):
            checks.unify_void(built.dataset, unwrap(self.model))
        return WatchedLoader.of(built)

    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        optimizer = optim_wrapper.get("optimizer", {}) if isinstance(optim_wrapper, dict) else {}
        kind = optimizer.get("type") if isinstance(optimizer, dict) else None
        with OPTIMIZERS.switch_scope_and_registry(None) as registry:
            if isinstance(kind, str) and registry.get(kind) is None:
                near = difflib.get_close_matches(kind, {**OPTIMIZERS.module_dict, **registry.module_dict})
                hint = f", did you mean {', '.join(near)}?" if near else ""
                raise InputError(f"the optimizer {optimizer} does not fit: unknown type '{kind}'{hint}")
        try:
            return super().build_optim_wrapper(optim_wrapper)
        except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
            if is_from_user_code(error):
                raise
            optimizer = optim_wrapper.get("optimizer", optim_wrapper)
            raise InputError(f"the optimizer {optimizer} does not fit: {one_line(error)}") from error

    def build_evaluator(self, evaluator: Any) -> Evaluator:
        try:
            return super().build_evaluator(evaluator)
        except (JSONDecodeError, KeyError, TypeError, AttributeError, AssertionError) as error:
            if is_from_user_code(error):
                raise
            file = evaluator.get("ann_file", "") if isinstance(evaluator, dict) else ""
            raise InputError(f"cannot build the evaluator {file}: {one_line(error)}") from error

    def build_train_loop(self, loop: Any) -> BaseLoop:
        return self._check_loop(super().build_train_loop(loop), training=True)

    def build_val_loop(self, loop: Any) -> BaseLoop:
        return self._check_loop(super().build_val_loop(loop))

    def build_test_loop(self, loop: Any) -> BaseLoop:
        return self._check_loop(super().build_test_loop(loop))

    def _check_loop(self, loop: BaseLoop, training: bool = False) -> BaseLoop:
        """Check data sets and metrics of a loop against each other."""
        datasets = list(checks.base_datasets(loop.dataloader.dataset))
        labelled = [dataset for dataset in datasets if hasattr(dataset, "reduce_zero_label")]
        if labelled:
            checks.sample_labels(labelled, tell=training)
        evaluator = getattr(loop, "evaluator", None)
        parts = [loop.dataloader.dataset]
        metrics = [getattr(evaluator, "metrics", ())]
        # mmdet's MultiDatasetsEvaluator has a metric for each part of a ConcatDataset.
        if hasattr(evaluator, "dataset_prefixes") and hasattr(parts[0], "datasets"):
            parts, metrics = parts[0].datasets, [[metric] for metric in evaluator.metrics]
        for part, measures in zip(parts, metrics, strict=False):
            for metric, dataset in product(measures, checks.base_datasets(part)):
                checks.check_metric(metric, dataset)
        return loop

    def load_checkpoint(self, filename: str, *args, **kwargs) -> dict:
        checkpoint = load_checkpoint_checked(self.model, filename, "" if self._resume else self.required_prefix)
        if self._resume and not {"meta", "message_hub", "optimizer"} <= checkpoint.keys():
            raise InputError(f"{filename} holds weights only, not where a training was: leave --resume out")
        checkpoint = super().load_checkpoint(filename, *args, **kwargs)
        # mmengine would run this Python text to learn the number of GPUs.
        checkpoint.get("meta", {}).pop("config", None)
        return checkpoint


class TrainingRunner(_Runner):
    """Runner of train.py: a checkpoint to start from may have other heads, and steps that are not finite are left out.

    From the second such step in a row on, nothing is validated or saved until a step is finite again: the weights may
    be spoilt. One alone is a bad batch.

    A training loop of mmengine becomes one of `litvit.openmmlab.loops`, which saves in time and resumes exactly.

    Attributes:
        resume_latest: Whether to resume from the run's latest checkpoint if there is one, else start from `load_from`.
        validated_at: Iteration after which the last validation was done.
    """

    dataloaders = ("train_dataloader", "val_dataloader")
    required_prefix = "backbone."
    resume_latest = False
    validated_at: int | None = None
    _folder_seen = False
    _guarded: Sequence[GuardedSteps] = ()
    _resumed: dict | None = None  # what the checkpoint says of the run
    _latest: tuple[Path, dict, Callable[[], None]] | None = None  # path, state, and a function that saves it again
    _failed: tuple[int, Callable[[], None]] | None = None  # iteration, and the same

    @classmethod
    def from_cfg(cls, cfg: Config) -> "_Runner":
        try:
            interval(str(cfg.get("checkpoint_every", CHECKPOINT_EVERY)))
        except ValueError as error:
            raise InputError(f"checkpoint_every: {error}") from error
        start = cfg.get("load_from")
        cfg.resume = bool(cfg.get("resume") or cls.resume_latest)
        if cfg.resume and (cls.resume_latest or not start):
            latest = latest_checkpoint(Path(cfg.work_dir))
            cfg.load_from, cfg.resume = latest or start, latest is not None
        if cfg.resume:
            _take_seed(cfg)
        init_cfg = cfg.model.get("backbone", {}).get("init_cfg")
        weights = init_cfg.get("checkpoint", "") if isinstance(init_cfg, dict) else ""
        if weights and cfg.get("load_from"):
            cfg.model.backbone.init_cfg = None  # the weights of a whole detector are loaded instead
        elif weights and "://" not in weights and not Path(weights).expanduser().is_file():
            raise InputError(
                f"no ImageNet weights at {weights}: put them there, name others by --cfg-options "
                "model.backbone.init_cfg.checkpoint=FILE, or start from scratch by --cfg-options "
                "model.backbone.init_cfg=None"
            )
        return super().from_cfg(cfg)

    @property
    def base_seed(self) -> int:
        """Seed that all processes have in common."""
        return self.seed - self.rank if self._randomness_cfg.get("diff_rank_seed") else self.seed

    def build_dataloader(self, dataloader: Any, *args, **kwargs) -> DataLoader:
        # With a seed per process, mmengine would draw the seed of the order, anew when a run is resumed.
        return super().build_dataloader(dataloader, seed=self.base_seed, diff_rank_seed=False)

    def build_train_loop(self, loop: Any) -> BaseLoop:
        built = super().build_train_loop(loop)
        if make_exact(built):
            built.set_up(str(self.cfg.get("checkpoint_every", CHECKPOINT_EVERY)))
        elif not isinstance(built, ExactEpochs | ExactIterations):
            self.logger.warning(
                f"train_cfg.type is {type(built).__name__}: signals are not answered, nothing is saved in time, and a "
                "resumed run is as exact as that loop makes it"
            )
        return built

    def build_val_loop(self, loop: Any) -> BaseLoop:
        built = super().build_val_loop(loop)
        saver = getattr(self._train_loop, "saver", None)
        if type(built) is ValLoop and saver is not None:
            built.__class__ = ExactValidation
            built.set_up(saver)
        return built

    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        built = super().build_optim_wrapper(optim_wrapper)
        self._guarded = guard_steps(built)
        return built

    def register_hook(self, hook: Any, priority: Any = None) -> None:
        super().register_hook(hook, priority)
        for registered in self._hooks:
            save_before_deleting(registered)
        # What they save is to hold what all other hooks have done.
        self._hooks.sort(key=lambda hook: isinstance(hook, CheckpointHook))

    @property
    def bad_in_a_row(self) -> int:
        """Number of the last steps that were left out."""
        return max((wrapper.bad_in_a_row for wrapper in self._guarded), default=0)

    @property
    def may_be_spoilt(self) -> bool:
        """Whether several of the last steps were left out. A single one is that of a bad batch, and changes nothing."""
        return self.bad_in_a_row > 1

    @property
    def iterations_to_step(self) -> int:
        """Number of iterations up to the end of the next optimizer step, over which gradients are accumulated."""
        return max((w._accumulative_counts - w.inner_count % w._accumulative_counts for w in self._guarded), default=1)

    @property
    def is_between_steps(self) -> bool:
        """Whether no gradients are accumulated, which a checkpoint would not hold."""
        return all(w.should_update() for w in self._guarded)

    @property
    def has_val_loop(self) -> bool:
        """Whether the config asks for validation."""
        return self._val_loop is not None

    @property
    def val_loop(self) -> BaseLoop | None:
        """The loop that validates, None while the weights may be spoilt."""
        return None if self.may_be_spoilt else super().val_loop

    def call_hook(self, fn_name: str, **kwargs) -> None:
        hooks = self._hooks
        if fn_name in ("after_train_iter", "after_val_iter") and is_main_process():
            self._make_folders_again()
        if self.may_be_spoilt and fn_name in ("after_train_iter", "after_train_epoch"):
            # The hook would count a checkpoint that is not to be saved.
            self._hooks = [hook for hook in hooks if not isinstance(hook, CheckpointHook)]
        try:
            super().call_hook(fn_name, **kwargs)
        finally:
            self._hooks = hooks
        if fn_name == "after_val_epoch" and not any(isinstance(hook, CheckpointHook) for hook in hooks):
            self.validated_at = self.iter

    def _make_folders_again(self) -> None:
        """Make the folders of logs again if the run's folder was deleted: mmengine's loggers would end the run."""
        folder = Path(self.log_dir, "vis_data")
        if self._folder_seen and not folder.is_dir():
            self.logger.warning(f"{self.work_dir} was deleted: it is made again, without its old files")
            with suppress(OSError):
                folder.mkdir(parents=True)
        self._folder_seen = folder.is_dir()

    def train(self) -> nn.Module:
        """Train the model.

        Raises:
            Diverged: The last steps were left out: many, or two or more at the end.
            Stopped: The run was interrupted and is saved, or its end could not be saved.
        """
        try:
            model = super().train()
            if self.may_be_spoilt:
                raise Diverged
        except Diverged as error:
            where = os.path.join(self.work_dir, DIVERGED)
            try:
                self.save_checkpoint(self.work_dir, DIVERGED, by_epoch=False)
            except NotSaved as failure:
                where = f"not saved ({failure})"
            raise Diverged(
                f"the loss or a gradient was not finite in the last {self.bad_in_a_row} steps, up to iteration "
                f"{self._guarded[0].inner_count}: start again from the last good checkpoint or anew, in another "
                "--work-dir, with a lower optim_wrapper.optimizer.lr or optim_wrapper.clip_grad.max_norm; "
                f"the state is in {where}"
            ) from error
        return model

    def load_or_resume(self) -> None:
        chosen = [self._load_from, self._resume]
        broadcast_object_list(chosen)  # another process may see another file as the latest
        self._load_from, self._resume = chosen
        super().load_or_resume()

    def load_checkpoint(self, filename: str, *args, **kwargs) -> dict:
        checkpoint = super().load_checkpoint(filename, *args, **kwargs)
        self._resumed = checkpoint.get("meta", {}).get("litvit")
        return checkpoint

    def resume(self, filename: str, *args, **kwargs) -> None:
        super().resume(filename, *args, **kwargs)
        loop, state = self._train_loop, self._resumed or {"validated": True}
        self.validated_at = self.iter if state["validated"] else None
        if isinstance(loop, ExactEpochs | ExactIterations):
            loop.stop_training = state.get("stopped", False)
            loop.place(state.get("position"))
        for wrapper, counts in zip(self._guarded, state.get("bad_steps", ()), strict=False):
            wrapper.bad_in_a_row, wrapper.bad_steps = counts
        for hook, kept in zip(self._stopping_hooks(), state.get("early_stopping", ()), strict=False):
            hook.wait_count, hook.best_score = kept
        path = Path(filename)
        if path.absolute().parent == Path(self.work_dir).absolute():
            again = partial(self.save_checkpoint, self.work_dir, path.name, meta=self._meta(), by_epoch=False)
            self._latest = path, self._state(self._meta()), again

    def _stopping_hooks(self) -> list[EarlyStoppingHook]:
        return [hook for hook in self._hooks if isinstance(hook, EarlyStoppingHook)]

    def _meta(self) -> dict[str, int]:
        return {"epoch": self.epoch, "iter": self.iter}

    def _state(self, meta: dict[str, Any]) -> dict[str, Any]:
        """Return what the rest of the run depends on besides what mmengine saves."""
        loop = self._train_loop
        state = {
            "iter": meta["iter"],
            "validated": self.validated_at == meta["iter"],
            "bad_steps": [(wrapper.bad_in_a_row, wrapper.bad_steps) for wrapper in self._guarded],
            "early_stopping": [(hook.wait_count, float(hook.best_score)) for hook in self._stopping_hooks()],
        }
        if isinstance(loop, ExactEpochs | ExactIterations):
            state |= {"stopped": loop.stop_training, "position": loop.position(meta["epoch"], meta["iter"])}
        return state

    def save_checkpoint(
        self, out_dir: str, filename: str, *args, meta: dict | None = None, by_epoch: bool = True, **kwargs
    ) -> None:
        """Save a checkpoint as mmengine does, whole or not at all, with what the rest of the run depends on.

        Raises:
            NotSaved: The disk does not take it.
        """
        if not is_main_process():
            return
        meta = {"epoch": self.epoch + by_epoch, "iter": self.iter + (not by_epoch)} | (meta or {})
        again = partial(self.save_checkpoint, out_dir, filename, *args, meta=dict(meta), by_epoch=by_epoch, **kwargs)
        state = meta["litvit"] = self._state(meta)
        super_save, path = super().save_checkpoint, Path(out_dir, filename)

        def save(folder: str, name: str) -> None:
            super_save(folder, name, *args, meta=meta, by_epoch=by_epoch, **kwargs)

        resumable = kwargs.get("save_optimizer", True) and filename != DIVERGED
        try:
            if "://" in out_dir:
                save(out_dir, filename)
                path = f"{out_dir}/{filename}"
            else:
                keep = path.with_name(PREVIOUS) if filename == CHECKPOINT else None
                replace_file(path, lambda file: save(str(file.parent), file.name), keep)
            if resumable:
                replace_file(Path(self.work_dir, "last_checkpoint"), lambda file: file.write_text(str(path)))
        except (OSError, RuntimeError) as error:
            if is_from_user_code(error):
                raise
            if resumable and filename != CHECKPOINT:
                self._failed = meta["iter"], again
            raise NotSaved(f"cannot save {path} ({one_line(error)})") from error
        if resumable:
            self._latest = path, state, again
        self.call_hook("after_save_checkpoint", path=str(path))

    def is_saved(self) -> bool:
        """Return whether the latest checkpoint in the run's folder holds the run as it is."""
        return self._latest is not None and self._latest[1] == self._state(self._meta())

    def save_end(self) -> bool:
        """Have the end of the training saved in the first process.

        The last checkpoint of the config's is saved again if it does not know of the last validation.

        Returns:
            Whether the end is saved.
        """
        try:
            if self._failed is not None and self._failed[0] == self.iter:
                self._failed[1]()
            elif self._latest is None or self._latest[1]["iter"] != self.iter:
                self.save_checkpoint(self.work_dir, CHECKPOINT, by_epoch=False, meta=self._meta())
            elif not self.is_saved():
                self._latest[2]()
        except NotSaved as error:
            self.logger.warning(str(error))
            return False
        return True

    def delete_checkpoints_in_time(self) -> None:
        """Delete the checkpoints that were saved in time, unless one of them is the only one of the end."""
        if is_main_process() and self._latest is not None and Path(self._latest[0]).name != CHECKPOINT:
            for name in (CHECKPOINT, PREVIOUS):
                with suppress(OSError):
                    os.remove(os.path.join(self.work_dir, name))


def _take_seed(cfg: Config) -> None:
    """Take the seed of the checkpoint to resume from. mmengine does so after it has made the order of the samples."""
    seed, randomness = read_meta(cfg.load_from).get("seed"), dict(cfg.get("randomness") or {})
    if seed is None:
        return
    if randomness.get("seed") not in (None, seed) and local_rank() == 0:
        print(f"the run keeps its seed {seed}, that of the config is {randomness['seed']}", file=sys.stderr)
    cfg.randomness = {**randomness, "seed": seed}


class TestRunner(_Runner):
    """Runner of test.py."""

    dataloaders = ("test_dataloader",)

    def build_model(self, model: Any) -> nn.Module:
        built = super().build_model(model)
        if type(built).__module__.startswith("mmdet.models.test_time_augs"):  # not a class of the user's
            built.merge_preds = partial(_merge_boxes, built.merge_preds)
        return built


def _merge_boxes(merge: Callable[[list], list], views: list[list[Any]]) -> list:
    """Merge the predictions for the views of each image, a list per image, if they are boxes only."""
    for sample in views[0]:
        if not {"pred_panoptic_seg", "pred_sem_seg"}.isdisjoint(sample.keys()) or "masks" in sample.pred_instances:
            raise InputError("--tta merges boxes, and this model predicts masks or segments too: leave --tta out")
    return merge(views)
