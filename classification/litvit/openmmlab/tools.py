"""The command lines of mmdet and mmseg, run from their installed packages, with wrong input told in one line."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from litvit import cli
from litvit.errors import InputError

# Flags of mmdet 2 and mmseg 0.x that the papers' commands use.
_OLD_FLAGS = {
    "--eval": "what is measured is the config's test_evaluator, so leave --eval and its values out",
    "--resume-from": "say --resume CHECKPOINT",
    "--auto-resume": "say --resume",
    "--options": "say --cfg-options",
    "--format-only": "say --cfg-options test_evaluator.format_only=True test_evaluator.outfile_prefix=PREFIX",
    "--gpu-id": "say CUDA_VISIBLE_DEVICES=0 before the command",
    "--gpus": "say bash tools/dist_train.sh CONFIG GPUS",
}


def run_tool(package: str, name: str) -> int | None:
    """Run `tools/<name>.py` of mmdet or mmseg with this process' arguments.

    Args:
        package: "mmdet" or "mmseg".
        name: "train" or "test".

    Returns:
        An exit status, None for success.

    Raises:
        InputError: wrong input, in the first process of the machine; the others return its status.
    """
    try:
        check_command(sys.argv[1:])
        tools = import_package(package) / ".mim" / "tools"
        spec = importlib.util.spec_from_file_location(f"{package}_{name}", tools / f"{name}.py")
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        runners = importlib.import_module("litvit.openmmlab.runner")
        script.Runner = {"train": runners.TrainingRunner, "test": runners.TestRunner}[name]
        script.main()
    except InputError:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            raise
        return cli.EXIT_INPUT_ERROR  # the first process of the machine says what is wrong
    return None


def check_command(arguments: Sequence[str]) -> None:
    """Raise an InputError for flags of mmdet 2 and mmseg 0.x, and for a config that is not there."""
    for argument in arguments:
        flag = argument.partition("=")[0]
        if flag in _OLD_FLAGS:
            raise InputError(f"{flag} is of an older OpenMMLab: {_OLD_FLAGS[flag]}")
        if argument.endswith(".py") and "=" not in argument and not Path(argument).is_file():
            raise InputError(f"no config at {argument}")


def import_package(package: str) -> Path:
    """Import mmdet or mmseg and return its folder.

    Raises:
        InputError: it is not installed, or mmcv lacks its compiled operators.
    """
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # for those of mmengine's readers that are not ours
    try:
        importlib.import_module("mmcv.ops")
        return Path(importlib.import_module(package).__file__).parent
    except (ImportError, AssertionError) as error:
        raise InputError(f"{package} and mmcv with its operators are needed ({error}): run ./setup_env.sh") from error
