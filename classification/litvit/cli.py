"""What the command lines share: one-line errors, a parser, and models looked up by name."""

import argparse
import difflib
import importlib
import io
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Sequence

from timm.models import is_model, list_models

from litvit.errors import InputError
from litvit.processes import EXIT_CTRL_C, EXIT_INPUT_ERROR, follow_the_launcher, leave, tell_the_launcher

TRACEBACK = "LIT_TRACEBACK"


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose complaints are one line: the wrong input, and how to list the flags.

    A flag that takes several numbers, one or none, or several of a few words, ends where they end: `--img-size 224
    DATA_DIR` is one number and a folder, `--dry-run DATA_DIR` no number and a folder.
    The program's name is "train.py" of a script, "litvit train" of a command.
    """

    def __init__(self, prog: str | None = None, **options):
        super().__init__(prog=prog or os.path.basename(sys.argv[0]), **options)

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        left = list(sys.argv[1:] if args is None else args)
        numbers, words = {}, {}
        for action in self._actions:
            if action.nargs in ("+", "*", "?") and action.type in (int, float):
                numbers |= dict.fromkeys(action.option_strings, _is_number)
            elif action.nargs in ("+", "*") and action.choices:
                words |= dict.fromkeys(action.option_strings, action.choices.__contains__)
        lists = numbers | words
        others, moved = [], []  # flags of several values move to the end, where nothing follows them
        while left and left[0] != "--":
            argument = left.pop(0)
            (moved if argument in lists else others).append(argument)
            if argument in words and left and not left[0].startswith("-"):
                moved.append(left.pop(0))  # the first one is meant to be a word: argparse says which there are
            while argument in lists and left and lists[argument](left[0]):
                moved.append(left.pop(0))
        return super().parse_known_args(others + moved + left, namespace)

    def error(self, message: str) -> None:
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        near = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1, cutoff=0.75) if unknown else []
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"{message}{hint} ({self.prog} --help lists the flags)")


def positive(text: str) -> int:
    """Parse a whole number above 0, as argparse's `type`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def run(main: Callable[[Sequence[str] | None], int | None]) -> None:
    """Run a command's `main(argv)` and exit: with 0, what it returns, or 2 and one line for wrong input.

    `--traceback` on any command line, or LIT_TRACEBACK=1 in the environment, shows the traceback of wrong input too.

    Args:
        main: Function that takes the arguments (None for sys.argv's) and returns an exit status, None for success.
    """
    if "--traceback" in sys.argv[1:]:
        sys.argv.remove("--traceback")
        os.environ[TRACEBACK] = "1"
    _open_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be text
    follow_the_launcher()
    try:
        status = main(None)
    except InputError as error:
        report(error)
        status = EXIT_INPUT_ERROR
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():
            process.kill()  # a loader process that hangs in a read would be waited for
        print("interrupted", file=sys.stderr)
        status = EXIT_CTRL_C
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # a terminal that was closed: Python would exit with another status
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    leave(tell_the_launcher(status))


def command(module: str) -> Callable[[Sequence[str] | None], int | None]:
    """Return the `main` of a module, which is imported when that is called.

    Then `run` tells of a package that is not installed in one line too.
    """
    return lambda argv=None: importlib.import_module(module).main(argv)


def _open_standard_streams() -> None:
    """Open standard streams that are closed, else the next files that are opened would take their places."""
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, so this one
            setattr(sys, name, open(null, mode))  # noqa: SIM115 - it has to stay open


def report(error: InputError) -> None:
    """Print wrong input in one line, or with its traceback if `--traceback` or LIT_TRACEBACK asks for it."""
    if os.environ.get(TRACEBACK, "0") != "0":
        sys.excepthook(type(error), error, error.__traceback__)
    else:
        hint = f" ({TRACEBACK}=1 shows where)" if error.__cause__ else ""
        print(f"error: {error}{hint}", file=sys.stderr)


def import_modules(names: Sequence[str]) -> None:
    """Import modules of the user's own, which register models, augmentations or data sets.

    Args:
        names: Names of modules, found as `python -c "import NAME"` would find them in the current folder.

    Raises:
        InputError: there is no such module. What its code raises is raised unchanged.
    """
    if names and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            raise InputError(f"--import {name}: no such module here or on PYTHONPATH") from error


def model_name(name: str) -> str:
    """Return `name` if timm or litvit has such a model.

    Raises:
        InputError: an unknown name; the message has the nearest known ones.
    """
    if is_model(name):
        return name
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        raise InputError(
            f"'{name}' is a source of weights: give its model.safetensors as checkpoint, a file or a link such as "
            "https://huggingface.co/OWNER/NAME/resolve/main/model.safetensors"
        )
    near = difflib.get_close_matches(name, list_models(), n=3, cutoff=0.5)
    ours = ", ".join(list_models(["lit_*", "litv2_?"]))
    hint = f"did you mean {', '.join(near)}?" if near else f"LIT's models: {ours}"
    raise InputError(f"unknown model '{name}'; {hint} (a model of your own: --import the module that registers it)")
