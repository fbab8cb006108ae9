"""The command lines of mmdet and mmseg, run from the installed packages, with wrong input reported in one line."""

import argparse
import copy
import difflib
import importlib
import importlib.util
import inspect
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from mmengine.config import Config, DictAction
from mmengine.config.utils import ConfigParsingError
from mmengine.runner import Runner
from PIL import Image
from torch import nn

from litvit import cli
from litvit.errors import InputError, is_from_user_code, one_line
from litvit.memory import keep_freed_memory
from litvit.openmmlab.checkpoints import load_checkpoint_checked, local_rank
from litvit.openmmlab.errors import SampleError
from litvit.processes import EXIT_CTRL_C, EXIT_DIVERGED, EXIT_INPUT_ERROR, LAUNCHER, choose_device, tell_the_launcher
from litvit.training.flags import TRACEBACK_HELP

if TYPE_CHECKING:
    from litvit.openmmlab.training_runner import TrainingRunner

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
_MORE_SETTINGS = (
    "auto_scale_lr",
    "checkpoint_every",
    "compile",
    "find_unused_parameters",
    "model_wrapper_cfg",
    "sync_bn",
)

# Suffixes of images that keep their name for the drawing; others get .png behind it.
_DRAWING_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

# A function that draws a prediction, given the pixels (H, W, 3), uint8 RGB, and the result.
Draw = Callable[[np.ndarray, Any], Image.Image]

# Exceptions that building by a config that does not fit raises.
_CONFIG_ERRORS = (ImportError, KeyError, IndexError, TypeError, ValueError, AssertionError, AttributeError)


def run_tool(package: str, name: str) -> int:
    """Run `tools/<name>.py` of mmdet or mmseg with the arguments of this process.

    Args:
        package: Name of the package, "mmdet" or "mmseg".
        name: Name of the script, "train" or "test".

    Returns:
        Exit status: 0, EXIT_DIVERGED, EXIT_INTERRUPTED, EXIT_INPUT_ERROR for an input that a training could not read.

    Raises:
        InputError: Wrong input. Of several processes on a machine the first one raises it, or the one that reads the
            wrong sample.
    """
    # Slow to import, and not needed by other callers.
    from litvit.openmmlab.runner import TestRunner
    from litvit.openmmlab.saver import Stopped
    from litvit.openmmlab.training_runner import TrainingRunner
    from litvit.training.step_guard import Diverged

    if name == "test" and LAUNCHER in os.environ:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launch script has it ignored until a training answers it
    rank = local_rank()  # mmdet's and mmseg's scripts set it to 0 where only Slurm has set it
    loaded = Event()
    status = 0

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
            script.argparse = argparse.Namespace(ArgumentParser=_ScriptParser)
            script.Runner = Runner
            if name == "train":
                script.parse_args = partial(_resume_as_configured, script.parse_args, package, Runner)
            script.main()
    except InputError as error:
        if rank == 0 or isinstance(error, SampleError):
            raise
        return 0  # the machine's first process reports it, and must not be ended by another one's exit status
    except Diverged as error:
        status = EXIT_DIVERGED
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
    except Stopped as stopped:
        status = stopped.status
    except KeyboardInterrupt:
        if not torch.distributed.is_initialized():
            raise
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(tell_the_launcher(EXIT_CTRL_C) or 0)  # without waiting for the others, or for hanging loaders
    if torch.distributed.is_initialized():  # beside NCCL there is a group of gloo, in which processes agree
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        # gloo's threads may abort an interpreter that takes its time to end.
        os._exit(tell_the_launcher(status) or 0)
    return status


class _ScriptParser(cli.ArgumentParser):
    """Parser of mmdet's and mmseg's scripts, with the flag that all commands have."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.add_argument("--traceback", action="store_true", help=TRACEBACK_HELP)


def _resume_as_configured(
    parse_args: Callable[[], argparse.Namespace], package: str, runner: "type[TrainingRunner]"
) -> argparse.Namespace:
    """Parse the arguments of train.py so that its script keeps what the config says of `resume` and `load_from`.

    For `--resume` without a checkpoint, mmdet's script would forget `load_from`, and mmengine would resume from it.
    mmseg's script would forget the config's `resume`.
    """
    args = parse_args()
    options = args.cfg_options or {}
    names_checkpoint = package == "mmseg" and "load_from" in options
    if args.resume in (True, "auto") and not names_checkpoint:
        runner.resume_latest, args.resume = True, None
    elif package == "mmseg" and not args.resume:
        config = Config.fromfile(args.config)
        config.merge_from_dict(options)
        args.resume = config.get("resume", False)
    return args


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
        _resize_to_pixels()
        folder = Path(importlib.import_module(package).__file__).parent
        if package == "mmdet":
            importlib.import_module("litvit.openmmlab.coco")
        return folder
    except (ImportError, AssertionError) as error:  # mmdet asserts mmcv's version
        extra = "detection" if package == "mmdet" else "segmentation"
        raise InputError(f'{package} and mmcv are needed ({error}): pip install "litvit[{extra}]"') from error


@cache
def _resize_to_pixels() -> None:
    """Let mmcv, and mmdet after it, resize no side of a long, thin image to 0 pixels, which OpenCV refuses."""
    geometric = importlib.import_module("mmcv.image.geometric")
    scale_size = geometric._scale_size
    geometric._scale_size = lambda size, scale: tuple(max(1, side) for side in scale_size(size, scale))


def prediction_parser(description: str) -> cli.ArgumentParser:
    """Return a parser with the flags that predict.py has in both task folders."""
    parser = cli.ArgumentParser(description=description)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--config", required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the drawings")
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the config")
    parser.add_argument("--device", metavar="NAME", help="cuda, cpu, ... (cuda if there is a GPU)")
    parser.add_argument("--traceback", action="store_true", help=TRACEBACK_HELP)
    return parser


def draw_predictions(package: str, args: argparse.Namespace, make_draw: Callable[[nn.Module], Draw]) -> int:
    """Predict the images of a command line, save a drawing of each, and print its path.

    An image that cannot be read, predicted or drawn is named, and the next one follows.

    Args:
        package: Name of the package, "mmdet" or "mmseg".
        args: Arguments that a `prediction_parser` has parsed.
        make_draw: Function from the model, with `dataset_meta`, to the function that draws a prediction of it, given
            the pixels (H, W, 3), uint8 RGB, and the result, of mmdet's or mmseg's type.

    Returns:
        Exit status: 0, or EXIT_INPUT_ERROR if an image is not drawn.

    Raises:
        InputError: Wrong input other than a single image.
    """
    drawings, status = {}, 0
    for image in args.images:
        if not image.is_file():
            cli.report(InputError(f"no image at {image}"))
            status = EXIT_INPUT_ERROR
            continue
        drawing = args.out / (image.name if image.suffix.lower() in _DRAWING_SUFFIXES else f"{image.name}.png")
        if drawing.exists() and drawing.samefile(image):
            raise InputError(f"the drawing of {image} would overwrite it: name another folder than --out {args.out}")
        if drawing in drawings:
            raise InputError(f"{drawings[drawing]} and {image} have the same name: draw them into two folders")
        drawings[drawing] = image
    if not drawings:
        return status
    if args.out.exists() and not args.out.is_dir():
        raise InputError(f"--out {args.out} is a file: name a folder")
    device = choose_device(args.device)
    with _in_one_line(Event()):
        check_command([args.config, "--cfg-options", *args.cfg_options])
        if "own_data" in Config.fromfile(args.config):
            name = Path(args.config).name
            raise InputError(f"--config {args.config} does not know the classes: give {name} of the run's folder")
        options = argparse.Namespace()
        DictAction([], "settings")(None, options, args.cfg_options)
        import_package(package)
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
        draw = make_draw(model)
    sys.stdout.reconfigure(errors="backslashreplace")  # for file names that are not text
    for drawing, image in drawings.items():
        try:
            _draw_prediction(image, drawing, partial(getattr(apis, predict), model), draw)
        except InputError as error:
            cli.report(error)
            status = EXIT_INPUT_ERROR
        else:
            print(drawing)
    return status


def _draw_prediction(image: Path, drawing: Path, predict: Callable[[np.ndarray], Any], draw: Draw) -> None:
    """Predict an image and save a drawing of it.

    Raises:
        InputError: The image cannot be read, or not be predicted in this size, or the drawing cannot be saved.
    """
    import cv2
    import mmcv

    pixels = None
    with suppress(cv2.error):  # of an empty file; for other broken ones imfrombytes returns None
        pixels = mmcv.imfrombytes(image.read_bytes())
    if pixels is None:
        raise InputError(f"{image} cannot be read as an image")
    try:
        draw(pixels[..., ::-1], predict(pixels)).save(drawing, quality=95)
    # What a model raises for a size that it cannot compute, and the file system for the drawing.
    except (InputError, RuntimeError, ValueError, AssertionError, OSError, cv2.error) as error:
        if is_from_user_code(error):
            raise
        height, width = pixels.shape[:2]
        reason = error if isinstance(error, InputError) else one_line(error)
        raise InputError(f"{image}, {width} x {height} pixels, cannot be predicted: {reason}") from error
