"""mmengine's Runner for the command lines: wrong input is found first, and a CPU can do what a GPU can."""

import re
import sys
from pathlib import Path
from typing import Any

import torch
from mmengine import runner as mmengine_runner
from mmengine.config import Config
from mmengine.dist import is_distributed
from mmengine.runner import CheckpointLoader
from torch import nn
from torch.utils.data import DataLoader

from litvit.checkpoints import recognise
from litvit.errors import InputError

_CLASSES = "set the datasets' metainfo=dict(classes=...) and the heads' num_classes to those of the annotations"


def check_fit(model: nn.Module, filename: str, prefix: str = "") -> dict:
    """Load a checkpoint into a detector or segmentor.

    Args:
        model: the model.
        filename: the checkpoint.
        prefix: entries that must be there and fit; others may be missing or of another size.

    Returns:
        The checkpoint.

    Raises:
        InputError: a checkpoint that cannot be read, or of another model.
    """
    checkpoint = CheckpointLoader.load_checkpoint(filename, map_location="cpu")
    entries = checkpoint.get("state_dict", checkpoint)
    entries = {name.removeprefix("module."): value for name, value in entries.items()}
    while hasattr(model, "module"):  # DistributedDataParallel, test-time augmentation
        model = model.module
    try:
        names = model.load_state_dict(entries, strict=False).missing_keys
    except RuntimeError as error:
        names = re.findall(r"size mismatch for ([\w.]+)", str(error))
    names = [name for name in names if name.startswith(prefix) and not name.endswith("num_batches_tracked")]
    if names:
        start = "backbone."
        backbone = {name.removeprefix(start): value for name, value in entries.items() if name.startswith(start)}
        held = f"its backbone is {arch}" if (arch := recognise(backbone)) else "it is of another model"
        raise InputError(
            f"{filename} does not fit the config: {held}, and {names[0]} (of {len(names)} entries) is missing or of "
            "another size"
        )
    return checkpoint


class _Runner(mmengine_runner.Runner):
    """mmengine's Runner, but wrong input is found first, and several processes work on a CPU too."""

    dataloaders = ()
    needed = ""  # entries of a checkpoint that must fit

    @classmethod
    def from_cfg(cls, cfg: Config) -> "_Runner":
        for name in cls.dataloaders:
            if cfg.get(name):
                _check_data(cfg[name].dataset)
        wrapper = cfg.get("optim_wrapper") or {}
        if wrapper.get("type") == "AmpOptimWrapper" and not torch.cuda.is_available():
            print("no GPU: float32 in the place of half precision", file=sys.stderr)
            cfg.optim_wrapper.type = "OptimWrapper"
            for setting in ("loss_scale", "dtype"):
                cfg.optim_wrapper.pop(setting, None)
        return super().from_cfg(cfg)

    def setup_env(self, env_cfg: dict) -> None:
        if self.distributed and not is_distributed() and not torch.cuda.is_available():
            torch.distributed.init_process_group("gloo")
        super().setup_env(env_cfg)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        if self.distributed and not torch.cuda.is_available():
            unused = self.cfg.get("find_unused_parameters", False)
            plain = {"type": "MMDistributedDataParallel", "broadcast_buffers": False, "find_unused_parameters": unused}
            model_wrapper_cfg = {**(model_wrapper_cfg or plain), "device_ids": None}
        return super().wrap_model(model_wrapper_cfg, model)

    @staticmethod
    def build_dataloader(dataloader: Any, *args, **kwargs) -> DataLoader:
        try:
            built = mmengine_runner.Runner.build_dataloader(dataloader, *args, **kwargs)
        except ValueError as error:
            if "need at least one array" not in str(error):  # what mmengine makes of an empty data set
                raise
            raise InputError(f"no picture has an object of the config's classes: {_CLASSES}") from error
        _check_classes(built.dataset)
        return built

    def load_checkpoint(self, filename: str, *args, **kwargs) -> dict:
        check_fit(self.model, filename, self.needed)
        return super().load_checkpoint(filename, *args, **kwargs)


class TrainingRunner(_Runner):
    """For train.py: a checkpoint to start from may have other heads."""

    dataloaders = ("train_dataloader", "val_dataloader")
    needed = "backbone."

    @classmethod
    def from_cfg(cls, cfg: Config) -> "_Runner":
        init_cfg = cfg.model.get("backbone", {}).get("init_cfg")
        weights = init_cfg.get("checkpoint", "") if isinstance(init_cfg, dict) else ""
        if weights and "://" not in weights and not Path(weights).expanduser().is_file():
            raise InputError(
                f"no ImageNet weights at {weights}: put them there, name others by --cfg-options "
                "model.backbone.init_cfg.checkpoint=FILE, or start from scratch by --cfg-options "
                "model.backbone.init_cfg=None"
            )
        return super().from_cfg(cfg)


class TestRunner(_Runner):
    """For test.py."""

    dataloaders = ("test_dataloader",)


def _check_data(dataset: dict) -> None:
    """Raise an InputError if annotations or images of a dataset's config are not there."""
    for part in [dataset["dataset"]] if "dataset" in dataset else dataset.get("datasets", []):
        _check_data(part)
    root = dataset.get("data_root") or ""
    if "://" in root:
        return
    files = [dataset.get("ann_file"), *(dataset.get("data_prefix") or {}).values()]
    for file in filter(None, files):
        path = Path(root, file)
        if "://" not in file and not path.exists():
            where = f" (data_root is {root})" if root else ""
            raise InputError(
                f"no data at {path}{where}: put it there, or set the config's data_root, ann_file, data_prefix"
            )


def _check_classes(dataset: Any) -> None:
    """Raise an InputError if COCO annotations lack classes of the config."""
    while hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    classes = (getattr(dataset, "metainfo", None) or {}).get("classes", ())
    found = len(getattr(dataset, "cat_ids", classes))
    if found < len(classes):
        raise InputError(
            f"{dataset.ann_file} has {found} of the config's {len(classes)} classes "
            f"({', '.join(map(str, classes[:3]))} ...): {_CLASSES}"
        )
