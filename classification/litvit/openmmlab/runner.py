"""mmengine's Runner for the command lines: wrong input is found first, and a CPU can do what a GPU can."""

import os
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine import runner as mmengine_runner
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.dist import is_distributed, is_main_process
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.runner import CheckpointLoader
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from litvit.errors import InputError
from litvit.models import identify_model, translate_published
from litvit.openmmlab import Backbone, local_rank
from litvit.openmmlab.mmcv_ops import provide_operators

_CLASSES = "set the datasets' metainfo=dict(classes=...) and the heads' num_classes to those of the annotations"


class SampleError(InputError):
    """Wrong input in a picture or its annotation, which the one process that reads it finds."""


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
    entries = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(entries, dict) or not all(isinstance(name, str) for name in entries):
        raise InputError(f"{filename} is no checkpoint of a model: name one of train.py's, or a published one")
    entries = {name.removeprefix("module."): value for name, value in entries.items()}
    model = _bare(model)
    problems = []
    try:
        model.load_state_dict(entries)
    except RuntimeError as error:  # all that fits is loaded; unexpected entries are no problem
        missing = re.search(r"Missing key\(s\) in state_dict: (.*)", str(error))
        problems += [(name, "is missing") for name in re.findall(r'"([^"]+)"', missing[1] if missing else "")]
        sizes = re.findall(r"size mismatch for ([\w.]+): .*?\[([\d, ]*)\].*?\[([\d, ]*)\]", str(error))
        problems += [(name, f"has size ({held}), not ({wanted})") for name, held, wanted in sizes]
    problems = [
        f"{name} {problem}"
        for name, problem in problems
        if name.startswith(prefix) and not name.endswith("num_batches_tracked")
    ]
    if problems:
        bare = translate_published(entries.get("model", entries))
        if bare.keys() & model.backbone.state_dict().keys():
            raise InputError(
                f"{filename} holds a backbone alone, as ImageNet weights do: name it by --cfg-options "
                "model.backbone.init_cfg.checkpoint=FILE to begin a training with it"
            )
        start = "backbone."
        backbone = {name.removeprefix(start): value for name, value in entries.items() if name.startswith(start)}
        held = f"its backbone is {arch}" if (arch := identify_model(backbone)) else "it is of another model"
        if not any(problem.startswith(start) for problem in problems):
            held = "its backbone does, its heads do not (other classes?)"
        raise InputError(
            f"{filename} does not fit the config: {held}, and {problems[0]} (the first of {len(problems)} entries)"
        )
    return checkpoint


def one_line(error: Exception) -> str:
    """Return an exception's type and message in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


def _bare(model: nn.Module) -> nn.Module:
    while hasattr(model, "module"):  # DistributedDataParallel, test-time augmentation
        model = model.module
    return model


class _Runner(mmengine_runner.Runner):
    """mmengine's Runner, but wrong input is found first, and several processes work on a CPU too."""

    dataloaders = ()
    needed = ""  # entries of a checkpoint that must fit
    running = False  # all is built and loaded: what is raised now is no matter of the config

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

    def build_logger(self, *args, **kwargs) -> MMLogger:
        logger = super().build_logger(*args, **kwargs)
        logger.info(provide_operators())
        return logger

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        if self.distributed and not torch.cuda.is_available():
            model = revert_sync_batchnorm(model)  # which has no CPU version; mmengine does so for one process
            unused = self.cfg.get("find_unused_parameters", False)
            plain = {"type": "MMDistributedDataParallel", "broadcast_buffers": False, "find_unused_parameters": unused}
            model_wrapper_cfg = {**(model_wrapper_cfg or plain), "device_ids": None}
        return super().wrap_model(model_wrapper_cfg, model)

    def build_model(self, model: Any) -> nn.Module:
        built = super().build_model(model)
        backbone, neck = (getattr(_bare(built), name, None) for name in ("backbone", "neck"))
        wanted = getattr(neck, "in_channels", None)
        if isinstance(backbone, Backbone) and isinstance(wanted, list) and len(backbone.out_indices) != len(wanted):
            raise InputError(
                f"the backbone gives {len(backbone.out_indices)} levels, the neck takes {len(wanted)}: set "
                "model.backbone.out_indices and model.neck.in_channels to the same levels"
            )
        return built

    def load_or_resume(self) -> None:
        super().load_or_resume()
        type(self).running = True

    def build_dataloader(self, dataloader: Any, *args, **kwargs) -> DataLoader:
        try:
            built = mmengine_runner.Runner.build_dataloader(dataloader, *args, **kwargs)
        except JSONDecodeError as error:
            raise InputError(f"an annotation file is not JSON, or cut off: {error}") from error
        except ValueError as error:
            if "need at least one array" not in str(error):  # what mmengine makes of an empty data set
                raise
            if self.cfg.get("default_scope") == "mmseg":
                raise InputError(
                    "no picture's name ends in the data set's img_suffix: set img_suffix='.png' or what they end in "
                    "(seg_map_suffix for the annotations)"
                ) from error
            raise InputError(f"no picture has an object of the config's classes: {_CLASSES}") from error
        except (KeyError, TypeError, AttributeError, AssertionError) as error:
            file = dataloader.get("dataset", {}).get("ann_file", "") if isinstance(dataloader, dict) else ""
            problem = f"cannot read the data set {file}" if file else "the dataloader does not fit"
            raise InputError(f"{problem}: {one_line(error)}") from error
        for dataset in _parts(built.dataset):
            _check_classes(dataset, _bare(self.model))
            if hasattr(dataset, "reduce_zero_label"):
                check_annotations(dataset, _bare(self.model).num_classes)
            if hasattr(dataset, "pipeline"):
                check_files(dataset.pipeline)
        return built

    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        try:
            return super().build_optim_wrapper(optim_wrapper)
        except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
            held = optim_wrapper.get("optimizer", optim_wrapper)
            raise InputError(f"the optimizer {held} does not fit: {one_line(error)}") from error

    def build_evaluator(self, evaluator: Any) -> Evaluator:
        try:
            return super().build_evaluator(evaluator)
        except (JSONDecodeError, KeyError, TypeError, AttributeError, AssertionError) as error:
            file = evaluator.get("ann_file", "") if isinstance(evaluator, dict) else ""
            raise InputError(f"cannot build the evaluator {file}: {one_line(error)}") from error

    def load_checkpoint(self, filename: str, *args, **kwargs) -> dict:
        held = check_fit(self.model, filename, "" if self._resume else self.needed)
        if self._resume and not {"meta", "message_hub", "optimizer"} <= held.keys():
            raise InputError(f"{filename} holds weights only, not where a training was: leave --resume out")
        checkpoint = super().load_checkpoint(filename, *args, **kwargs)
        checkpoint.get("meta", {}).pop(
            "config", None
        )  # Python text, which mmengine would run to learn a number of GPUs
        return checkpoint


class TrainingRunner(_Runner):
    """For train.py: a checkpoint to start from may have other heads."""

    dataloaders = ("train_dataloader", "val_dataloader")
    needed = "backbone."

    @classmethod
    def from_cfg(cls, cfg: Config) -> "_Runner":
        begun = cfg.get("load_from")
        if cfg.get("resume") and "--resume" in sys.argv and not any(str(begun) in argument for argument in sys.argv):
            begun = None  # mmseg leaves the config's own, where the run began, and mmengine would resume from that
        if cfg.get("resume") and not begun and (latest := _latest(Path(cfg.work_dir))):
            cfg.load_from = latest
        elif not begun:
            cfg.resume = False
        init_cfg = cfg.model.get("backbone", {}).get("init_cfg")
        weights = init_cfg.get("checkpoint", "") if isinstance(init_cfg, dict) else ""
        if weights and cfg.get("load_from"):
            cfg.model.backbone.init_cfg = None  # a whole detector's weights come instead
        elif weights and "://" not in weights and not Path(weights).expanduser().is_file():
            raise InputError(
                f"no ImageNet weights at {weights}: put them there, name others by --cfg-options "
                "model.backbone.init_cfg.checkpoint=FILE, or start from scratch by --cfg-options "
                "model.backbone.init_cfg=None"
            )
        return super().from_cfg(cfg)

    def save_checkpoint(self, out_dir: str, filename: str, *args, **kwargs) -> None:
        part = filename if "://" in out_dir else f"{filename}.part"
        super().save_checkpoint(out_dir, part, *args, **kwargs)
        if part != filename and is_main_process():
            os.replace(os.path.join(out_dir, part), os.path.join(out_dir, filename))


def _latest(work_dir: Path) -> str | None:
    """Return the latest checkpoint of a run that is whole, None if it has none yet.

    Raises:
        InputError: all are broken.
    """
    saved = sorted([*work_dir.glob("iter_*.pth"), *work_dir.glob("epoch_*.pth")], key=os.path.getmtime)
    files = [str(file) for file in saved]
    last = work_dir / "last_checkpoint"
    if last.is_file():
        files.append(last.read_text().strip())
    for i, file in enumerate(reversed(files)):
        if "://" in file or zipfile.is_zipfile(file):  # a cut one lacks its end
            if i and local_rank() == 0:
                print(f"{files[-1]} is cut off or not there: {file} in its place", file=sys.stderr)
            return file
    if files:
        raise InputError(f"no checkpoint of {work_dir} is whole, nor {files[-1]}: empty the folder to start afresh")
    return None


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


def _parts(dataset: Any) -> Iterator[Any]:
    """Yield the data sets that repeating, joining and mixing ones are made of."""
    inner = [dataset.dataset] if hasattr(dataset, "dataset") else getattr(dataset, "datasets", [])
    for part in inner:
        yield from _parts(part)
    if not inner:
        yield dataset


def _check_classes(dataset: Any, model: nn.Module) -> None:
    """Raise an InputError if COCO annotations lack classes of the config, or a detector's heads have other ones."""
    classes = (getattr(dataset, "metainfo", None) or {}).get("classes", ())
    found = len(getattr(dataset, "cat_ids", classes))
    if found < len(classes):
        raise InputError(
            f"{dataset.ann_file} has {found} of the config's {len(classes)} classes "
            f"({', '.join(map(str, classes[:3]))} ...): {_CLASSES}"
        )
    if not hasattr(dataset, "cat_ids"):
        return
    things = len(dataset.metainfo.get("thing_classes", classes))
    for name, head in model.named_modules():
        wanted = getattr(head, "num_classes", things)
        if name.endswith(("bbox_head", "mask_head")) and wanted != things:
            raise InputError(f"{name} has {wanted} classes, the data set {things}: {_CLASSES}")


def check_annotations(dataset: Any, num_classes: int) -> None:
    """Have the labels of mmseg's data set looked at when they are read.

    Args:
        dataset: a `BaseSegDataset`.
        num_classes: of the model.

    Raises:
        InputError: other classes, contradicting settings, or annotations that are not there.
    """
    classes = len(dataset.metainfo.get("classes") or ())
    if classes != num_classes:
        raise InputError(f"the head has {num_classes} classes, the data set {classes}: {_CLASSES}")
    listed = {}  # asking for each file would take long, in a network's folders above all
    for i in range(len(dataset)):
        sample = dataset.get_data_info(i)
        file = sample.get("seg_map_path", "")
        folder, name = os.path.split(file)
        if not file or "://" in file:
            continue
        if folder not in listed:
            listed[folder] = set(os.listdir(folder or ".")) if os.path.isdir(folder or ".") else set()
        if name not in listed[folder]:
            raise InputError(
                f"{sample['img_path']} has no annotation at {file}: put it there, remove the picture, or set the data "
                "set's seg_map_suffix"
            )
    _check_labels(dataset.pipeline, _LabelCheck(classes, dataset.ignore_index, dataset.reduce_zero_label))


def _check_labels(pipeline: Compose, check: "_LabelCheck") -> None:
    """Put a check behind each step that loads labels, those of test-time augmentation too."""
    for i, step in reversed(list(enumerate(pipeline.transforms))):
        if hasattr(step, "reduce_zero_label"):
            if step.reduce_zero_label not in (None, check.zero_label):
                raise InputError(
                    f"the data set has reduce_zero_label={check.zero_label}, {type(step).__name__} in its pipeline "
                    f"(pipeline.{i}) reduce_zero_label={step.reduce_zero_label}: leave it out there"
                )
            pipeline.transforms.insert(i + 1, check)
        for part in getattr(step, "subroutines", []):
            _check_labels(part, check)


def check_files(pipeline: Compose) -> None:
    """Have a pipeline's steps that load a file name it where they cannot read it."""
    from mmcv.transforms import LoadAnnotations, LoadImageFromFile  # a missing mmcv is told before

    for i, step in enumerate(pipeline.transforms):
        if isinstance(step, LoadImageFromFile | LoadAnnotations):
            pipeline.transforms[i] = _Loading(step, isinstance(step, LoadAnnotations))
        for part in getattr(step, "subroutines", []):
            check_files(part)


class _Loading:
    """A step of a pipeline that loads a picture or its annotation."""

    def __init__(self, step: Callable[[dict], dict], annotation: bool) -> None:
        self.step = step
        self.annotation = annotation

    def __call__(self, results: dict) -> dict:
        try:
            return self.step(results)
        except Exception as error:  # a broken file can raise nearly anything
            file = results["img_path"]
            if self.annotation:
                file = results.get("seg_map_path") or f"the annotation of {file}"
            raise SampleError(f"{file} cannot be read: {one_line(error)}") from error


class _LabelCheck:
    """Step of mmseg's pipelines: labels in colours, of another size than the picture or beyond the classes are wrong.

    Training would end in an assertion on the GPU or learn from shifted labels, and the evaluation would leave them out.
    """

    def __init__(self, classes: int, ignored: int, zero_label: bool) -> None:
        self.classes = classes
        self.ignored = ignored
        self.zero_label = zero_label  # whether the file's label 0 is no class, and the first class 1

    def __call__(self, results: dict) -> dict:
        file, labels = results["seg_map_path"], results["gt_seg_map"]
        if labels.ndim > 2:
            raise SampleError(
                f"{file} has {labels.shape[2]} channels, but a pixel's label is one number: save one channel, or a "
                "palette's indices"
            )
        size = tuple(results.get("ori_shape", labels.shape)[:2])
        if labels.shape != size:
            sides = " x ".join(map(str, labels.shape)), " x ".join(map(str, size))
            raise SampleError(f"{file} is {sides[0]} pixels high x wide, its picture {results['img_path']} {sides[1]}")
        first, last = int(self.zero_label), self.zero_label + self.classes - 1
        strange = labels[(labels >= self.classes) & (labels != self.ignored)].astype(int) + first
        with suppress(OSError), Image.open(file) as image:  # its head; a file in a store is not looked at
            if image.mode[0] in "IF":  # more than 8 bits, to which mmseg has cut its labels
                pixels = np.asarray(image)
                strange = np.append(pixels[(pixels < 0) | (pixels > 255)], strange)
        if strange.size:
            raise SampleError(
                f"{file} has label {strange[0]}, but the classes are {first} to {last}: "
                f"{_CLASSES}, and reduce_zero_label=True if label 0 is no class"
            )
        return results
