"""The command lines of mmdet and mmseg, run from the installed packages, with wrong input reported in one line."""

import argparse
import copy
import difflib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from mmengine.config import Config, DictAction
from mmengine.config.utils import ConfigParsingError
from mmengine.runner import Runner
from torch import nn

from litvit import cli
from litvit.errors import InputError, is_from_user_code
from litvit.memory import keep_freed_memory
from litvit.openmmlab.checkpoints import load_checkpoint_checked, local_rank
from litvit.openmmlab.errors import SampleError, one_line
from litvit.processes import choose_device

# Flags of mmdet 2 and mmseg 0.x that the papers' commands use.
_OLD_FLAGS = {
    "--eval": "what is measured is the config's test_evaluator, so leave --eval and its values out",
    "--resume-from": "use --resume CHECKPOINT (mmdet), --resume --cfg-options load_from=CHECKPOINT (mmseg)",
    "--auto-resume": "use --resume",
    "--options": "use --cfg-options",
    "--format-only": "use --cfg-options test_evaluator.format_only=True, with test_evaluator.outfile_prefix=PREFIX "
    "(mmdet) or --out DIR (mmseg)",
    "--aug-test": "use --tta",
    "--load-from": "use --cfg-options load_from=CHECKPOINT",
    "--seed": "use --cfg-options randomness.seed=0",
    "--gpu-id": "use CUDA_VISIBLE_DEVICES=0 before the command",
    "--gpus": "use bash tools/dist_train.sh CONFIG GPUS",
}

# Settings of a config that mmengine's Runner does not take as arguments.
_MORE_SETTINGS = ("auto_scale_lr", "compile", "find_unused_parameters", "model_wrapper_cfg", "sync_bn")

# Exceptions that building by a config that does not fit raises.
_CONFIG_ERRORS = (ImportError, KeyError, IndexError, TypeError, ValueError, AssertionError, AttributeError)


def run_tool(package: str, name: str) -> None:
    """Run `tools/<name>.py` of mmdet or mmseg with the arguments of this process.

    Args:
        package: Name of the package, "mmdet" or "mmseg".
        name: Name of the script, "train" or "test".

    Raises:
        InputError: Wrong input. Of several processes on a machine the first one raises it, or the one that reads the
            wrong sample.
    """
    from litvit.openmmlab.runner import TestRunner, TrainingRunner  # slow to import, and not needed by other callers

    rank = local_rank()  # mmdet's and mmseg's scripts set it to 0 where only Slurm has set it
    loaded = Event()

    class Runner({"train": TrainingRunner, "test": TestRunner}[name]):
        def load_or_resume(self) -> None:
            super().load_or_resume()
            loaded.set()

    try:
        with _in_one_line(loaded):
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
        if rank == 0 or isinstance(error, SampleError):
            raise
        return  # the machine's first process reports it, and must not be ended by another one's exit status
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # gloo's threads may abort an interpreter that takes its time to end


@contextmanager
def _in_one_line(loaded: Event) -> Iterator[None]:
    """Turn what mmengine, mmdet and mmseg raise for wrong input into an InputError; the user's own bugs pass through.

    Args:
        loaded: Event that is set once everything is built and the weights are loaded. Most exceptions after it have
            nothing to do with the config and pass through too.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if is_from_user_code(error):
            raise
        message = " ".join(str(error).split())
        if isinstance(error, FileNotFoundError):  # or a loader process's, with its traceback as message
            raise SampleError(str(error)) from error
        if isinstance(error, SyntaxError | ConfigParsingError):
            raise InputError(f"the config cannot be read: {message}") from error
        if isinstance(error, FileExistsError | NotADirectoryError | PermissionError) and not loaded.is_set():
            raise InputError(f"{error.filename} cannot be used: {error.strerror}") from error
        if not isinstance(error, _CONFIG_ERRORS):
            raise
        if missing := re.search(r"'ConfigDict' object has no attribute '(\w+)'", message):
            raise InputError(f"the config has no {missing[1]}") from error
        # What cannot be built is sometimes built after loading.
        if loaded.is_set() and not any(part in message for part in ("registry", "class `", "__init__()")):
            raise
        raise InputError(f"the config does not fit: {one_line(error)}") from error


def check_command(arguments: Sequence[str]) -> None:
    """Check arguments that the scripts would accept without effect, or answer with a traceback.

    Args:
        arguments: Arguments of train.py or test.py.

    Raises:
        InputError: A flag of mmdet 2 or mmseg 0.x, a missing config, an option without value or without a setting of
            that name in the config.
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
        InputError: The package or mmcv is not installed.
    """
    try:
        importlib.import_module("mmcv.ops")
        folder = Path(importlib.import_module(package).__file__).parent
        if package == "mmdet":
            importlib.import_module("litvit.openmmlab.coco")
        return folder
    except (ImportError, AssertionError) as error:  # mmdet asserts mmcv's version
        raise InputError(f"{package} and mmcv are needed ({error}): run ./setup_env.sh") from error


def prediction_parser(description: str) -> cli.ArgumentParser:
    """Return a parser with the flags that predict.py has in both task folders."""
    parser = cli.ArgumentParser(description=description)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--config", required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the drawings")
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the config")
    parser.add_argument("--device", metavar="NAME", help="cuda, cpu, ... (cuda if there is a GPU)")
    return parser


def predictions(package: str, args: argparse.Namespace) -> Iterator[tuple[nn.Module, Path, np.ndarray, Any]]:
    """Predict the images of a command line.

    Args:
        package: Name of the package, "mmdet" or "mmseg".
        args: Arguments that a `prediction_parser` has parsed.

    Yields:
        For each image: the model, with `dataset_meta`; the file for the drawing, in a folder that exists; the pixels
        (H, W, 3), uint8 RGB; the result, of mmdet's or mmseg's type.

    Raises:
        InputError: Wrong input.
    """
    drawings = {}
    for image in args.images:
        if not image.is_file():
            raise InputError(f"no image at {image}")
        drawing = args.out / image.name
        if drawing.exists() and drawing.samefile(image):
            raise InputError(f"the drawing of {image} would overwrite it: name another folder than --out {args.out}")
        if drawing in drawings:
            raise InputError(f"{drawings[drawing]} and {image} have the same name: draw them into two folders")
        drawings[drawing] = image
    if args.out.exists() and not args.out.is_dir():
        raise InputError(f"--out {args.out} is a file: name a folder")
    device = choose_device(args.device)
    loaded = Event()
    with _in_one_line(loaded):
        check_command([args.config, "--cfg-options", *args.cfg_options])
        options = argparse.Namespace()
        DictAction([], "settings")(None, options, args.cfg_options)
        import_package(package)
        import cv2
        import mmcv
        from mmengine.registry import DATASETS

        apis = importlib.import_module(f"{package}.apis")
        init, predict = {"mmdet": ("init_detector", "inference_detector"), "mmseg": ("init_model", "inference_model")}[
            package
        ]
        model = getattr(apis, init)(args.config, device="cpu", cfg_options=options.settings)
        meta = load_checkpoint_checked(model, args.checkpoint).get("meta", {})
        settings = model.cfg.test_dataloader.dataset
        if "pipeline" in settings:  # test.py and mmdet use this one; mmseg predicts with, and changes, another
            model.cfg.test_pipeline = copy.deepcopy(settings.pipeline)
        dataset = DATASETS.build({**settings, "lazy_init": True})
        model.dataset_meta = dataset.metainfo | meta.get("dataset_meta", {})
        model.to(device)
        args.out.mkdir(parents=True, exist_ok=True)
    loaded.set()
    for drawing, image in drawings.items():
        try:
            pixels = mmcv.imread(str(image))
        except cv2.error:  # an empty file; for other broken ones imread returns None
            pixels = None
        if pixels is None:
            raise InputError(f"{image} cannot be read as an image")
        with _in_one_line(loaded):
            result = getattr(apis, predict)(model, pixels)
        yield model, drawing, pixels[..., ::-1], result
