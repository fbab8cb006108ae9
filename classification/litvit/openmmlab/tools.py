"""The command lines of mmdet and mmseg, run from their installed packages, with wrong input told in one line."""

import argparse
import copy
import difflib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config, DictAction
from mmengine.config.utils import ConfigParsingError
from mmengine.runner import Runner
from torch import nn

from litvit import cli
from litvit.errors import InputError
from litvit.memory import keep_freed_memory
from litvit.openmmlab import local_rank
from litvit.training.model import choose_device

# Flags of mmdet 2 and mmseg 0.x that the papers' commands use.
_OLD_FLAGS = {
    "--eval": "what is measured is the config's test_evaluator, so leave --eval and its values out",
    "--resume-from": "say --resume CHECKPOINT (mmdet), --resume --cfg-options load_from=CHECKPOINT (mmseg)",
    "--auto-resume": "say --resume",
    "--options": "say --cfg-options",
    "--format-only": "say --cfg-options test_evaluator.format_only=True, with test_evaluator.outfile_prefix=PREFIX "
    "(mmdet) or --out DIR (mmseg)",
    "--aug-test": "say --tta",
    "--load-from": "say --cfg-options load_from=CHECKPOINT",
    "--seed": "say --cfg-options randomness.seed=0",
    "--gpu-id": "say CUDA_VISIBLE_DEVICES=0 before the command",
    "--gpus": "say bash tools/dist_train.sh CONFIG GPUS",
}

# Settings of a config that are no arguments of mmengine's Runner.
_MORE_SETTINGS = ("auto_scale_lr", "compile", "find_unused_parameters", "model_wrapper_cfg", "sync_bn")


def run_tool(package: str, name: str) -> None:
    """Run `tools/<name>.py` of mmdet or mmseg with this process' arguments.

    Args:
        package: "mmdet" or "mmseg".
        name: "train" or "test".

    Raises:
        InputError: wrong input, in the machine's first process, or in that which reads the wrong sample.
    """
    from litvit.openmmlab import runner  # slow to import, and check_command's callers may not need it

    rank = local_rank()  # mmdet's and mmseg's scripts set it to 0 where only Slurm has said it
    Runner = {"train": runner.TrainingRunner, "test": runner.TestRunner}[name]
    Runner.running = False
    try:
        with _in_one_line(lambda: Runner.running):
            check_command(sys.argv[1:])
            if not torch.cuda.is_available():
                keep_freed_memory()
            tools = import_package(package) / ".mim" / "tools"
            spec = importlib.util.spec_from_file_location(f"{package}_{name}", tools / f"{name}.py")
            script = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(script)
            script.Runner = Runner
            script.main()
    except InputError as error:
        if rank == 0 or isinstance(error, runner.SampleError):
            raise
        return  # the machine's first process says so, and is not ended before by another's status
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # gloo's threads may abort an interpreter that takes its time to end


@contextmanager
def _in_one_line(running: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Turn what mmengine, mmdet and mmseg raise for wrong input into an InputError.

    Args:
        running: whether all is built by now, and an error is most likely not the config's.
    """
    from litvit.openmmlab.runner import SampleError, one_line

    try:
        yield
    except FileNotFoundError as error:  # also of a loader process, with its traceback as message
        raise SampleError(str(error)) from error
    except (SyntaxError, ConfigParsingError) as error:
        raise InputError(f"the config cannot be read: {' '.join(str(error).split())}") from error
    except InputError:
        raise
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        if running():
            raise
        raise InputError(f"{error.filename} cannot be used: {error.strerror}") from error
    except (ImportError, KeyError, IndexError, TypeError, ValueError, AssertionError, AttributeError) as error:
        message = " ".join(str(error).split())
        if missing := re.search(r"'ConfigDict' object has no attribute '(\w+)'", message):
            raise InputError(f"the config has no {missing[1]}") from error
        # What cannot be built is sometimes found late.
        if running() and not any(part in message for part in ("registry", "class `", "__init__()")):
            raise
        raise InputError(f"the config does not fit: {one_line(error)}") from error


def check_command(arguments: Sequence[str]) -> None:
    """Raise an InputError for wrong arguments that the scripts would take, or meet with a traceback.

    Flags of mmdet 2 and mmseg 0.x, a config that is not there, options without value or of nothing in the config.
    """
    last, config, names = "", None, []
    for argument in arguments:
        flag = argument.partition("=")[0]
        last = flag if flag.startswith("--") else last
        if last == "--cfg-options" and flag != last and "=" not in argument:
            raise InputError(f"--cfg-options takes key=value, not '{argument}'")
        if last == "--cfg-options" and flag != last:
            names.append(flag.partition(".")[0])
        if flag in _OLD_FLAGS:
            raise InputError(f"{flag} is of an older OpenMMLab: {_OLD_FLAGS[flag]}")
        if argument.endswith(".py") and "=" not in argument:
            config = config or argument
            if not Path(config).is_file():
                raise InputError(f"no config at {config}")
    if config and names:
        known = [*Config.fromfile(config), *inspect.signature(Runner).parameters, *_MORE_SETTINGS]
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f": did you mean {near[0]}?" if near else ""
                raise InputError(f"--cfg-options {name}: the config has no such setting{hint}")


def import_package(package: str) -> Path:
    """Import mmdet or mmseg and return its folder.

    Raises:
        InputError: it or mmcv is not installed.
    """
    try:
        importlib.import_module("mmcv.ops")
        return Path(importlib.import_module(package).__file__).parent
    except (ImportError, AssertionError) as error:  # mmdet asserts the version of mmcv
        raise InputError(f"{package} and mmcv are needed ({error}): run ./setup_env.sh") from error


def prediction_parser(description: str) -> cli.ArgumentParser:
    """Return the flags that predict.py has in both task folders."""
    parser = cli.ArgumentParser(description=description)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--config", required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the drawings")
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the config")
    parser.add_argument("--device", metavar="NAME", help="cuda, cpu ... (cuda where there is one)")
    return parser


def predictions(package: str, args: argparse.Namespace) -> Iterator[tuple[nn.Module, Path, np.ndarray, Any]]:
    """Predict the images of a command line.

    Args:
        package: "mmdet" or "mmseg".
        args: what `prediction_parser` has read.

    Yields:
        For each image: the model, with `dataset_meta`; the file for the drawing, in a folder that is there; the pixels
        (H, W, 3), uint8 RGB; the result, of mmdet's or mmseg's type.

    Raises:
        InputError: wrong input.
    """
    drawings = {}
    for image in args.images:
        if not image.is_file():
            raise InputError(f"no picture at {image}")
        drawing = args.out / image.name
        if drawing.exists() and drawing.samefile(image):
            raise InputError(f"the drawing of {image} would overwrite it: name another folder than --out {args.out}")
        if drawing in drawings:
            raise InputError(f"{drawings[drawing]} and {image} have the same name: draw them into two folders")
        drawings[drawing] = image
    if args.out.exists() and not args.out.is_dir():
        raise InputError(f"--out {args.out} is a file: name a folder")
    device = choose_device(args.device)
    with _in_one_line():
        check_command([args.config, "--cfg-options", *args.cfg_options])
        options = argparse.Namespace()
        DictAction([], "settings")(None, options, args.cfg_options)
        import_package(package)
        import cv2
        import mmcv
        from mmengine.registry import DATASETS

        from litvit.openmmlab.runner import check_fit

        apis = importlib.import_module(f"{package}.apis")
        init, predict = {"mmdet": ("init_detector", "inference_detector"), "mmseg": ("init_model", "inference_model")}[
            package
        ]
        model = getattr(apis, init)(args.config, device="cpu", cfg_options=options.settings)
        meta = check_fit(model, args.checkpoint).get("meta", {})
        settings = model.cfg.test_dataloader.dataset
        if "pipeline" in settings:  # which test.py uses, and mmdet; mmseg predicts with, and changes, another
            model.cfg.test_pipeline = copy.deepcopy(settings.pipeline)
        dataset = DATASETS.build({**settings, "lazy_init": True})
        model.dataset_meta = dataset.metainfo | meta.get("dataset_meta", {})
        model.to(device)
        args.out.mkdir(parents=True, exist_ok=True)
    for drawing, image in drawings.items():
        try:
            pixels = mmcv.imread(str(image))
        except cv2.error:  # of an empty file; other broken ones are None
            pixels = None
        if pixels is None:
            raise InputError(f"{image} is no picture that can be read")
        with _in_one_line(lambda: True):
            result = getattr(apis, predict)(model, pixels)
        yield model, drawing, pixels[..., ::-1], result
