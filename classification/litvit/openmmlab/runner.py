"""mmengine's Runner for the command lines: it finds wrong input first, and a CPU can do what a GPU can."""

import difflib
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from json import JSONDecodeError
from typing import Any

import torch
from mmengine import runner as mmengine_runner
from mmengine.config import Config
from mmengine.dist import is_distributed, master_only
from mmengine.evaluator import Evaluator
from mmengine.hooks import LoggerHook
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import OPTIMIZERS
from mmengine.runner import BaseLoop
from torch import nn
from torch.utils.data import DataLoader

from litvit.data.workers import WatchedLoader
from litvit.errors import InputError, is_from_user_code, one_line
from litvit.openmmlab import checks, own_data
from litvit.openmmlab.backbones import MMBackbone
from litvit.openmmlab.checkpoints import (
    load_checkpoint_checked,
    unwrap,
)
from litvit.openmmlab.mmcv_ops import provide_operators
from litvit.processes import is_primary

# mmengine has every process write the results of a test into the same file, at the same time.
LoggerHook.after_test_epoch = master_only(LoggerHook.after_test_epoch)


def complete_own_data(cfg: Config) -> None:
    """Complete a config that has `own_data`, and print what was found."""
    for note in own_data.complete(cfg):
        if is_primary():
            print(note, file=sys.stderr)


class CheckedRunner(mmengine_runner.Runner):
    """mmengine's Runner that finds wrong input first, and that runs several processes on a CPU too."""

    dataloaders = ()
    required_prefix = ""  # prefix of the entries of a checkpoint that must fit

    @classmethod
    def from_cfg(cls, cfg: Config) -> "CheckedRunner":
        complete_own_data(cfg)
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


class TestRunner(CheckedRunner):
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
