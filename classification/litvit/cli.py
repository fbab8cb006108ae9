"""What the command lines share: one-line errors and models looked up by name."""

import argparse
import contextlib
import ctypes
import difflib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from timm.models import is_model, list_models

from litvit.errors import InputError

EXIT_INPUT_ERROR = 2
EXIT_CTRL_C = 130
# Under torchrun a worker that leaves with a status is a failed one, to be restarted. The launcher names a file in this
# variable, and a worker that leaves on purpose puts its status there.
STATUS_FILE = "LITVIT_STATUS_FILE"
LAUNCHER = "LITVIT_LAUNCHER"  # the process that starts the workers


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose complaints are one line: wrong input is named, the usage is left to --help."""

    def error(self, message: str) -> None:
        raise InputError(f"{message} ({self.prog} --help lists the flags)")


def run(main: Callable[[Sequence[str] | None], int | None]) -> None:
    """Run a command line's `main(argv)` and exit: 0, what it returns, or 2 with one line for wrong input.

    Args:
        main: takes the arguments (None: sys.argv) and returns an exit status, None for success.
    """
    if STATUS_FILE in os.environ:
        _end_with_the_launcher()
        if Path(os.environ[STATUS_FILE]).read_text():  # started again, but the run has been left on purpose
            sys.exit(0)
    try:
        status = main(None)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        status = EXIT_INPUT_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = EXIT_CTRL_C
    if status and STATUS_FILE in os.environ:
        Path(os.environ[STATUS_FILE]).write_text(str(status))
        status = 0
    sys.exit(status)


def _end_with_the_launcher() -> None:
    """Be killed when the parent is: a worker whose launcher is gone would train on in the run's folder."""
    set_parent_death_signal = 1
    with contextlib.suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.environ.get(LAUNCHER, str(os.getppid())) != str(os.getppid()):
        sys.exit("the launcher is gone")  # since before the line above


def model_name(name: str) -> str:
    """Return `name` if timm or litvit knows such a model.

    Raises:
        InputError: unknown; names the nearest known ones.
    """
    if is_model(name):
        return name
    near = difflib.get_close_matches(name, list_models(), n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"LIT's models: {', '.join(list_models('lit_*'))}"
    raise InputError(f"unknown model '{name}'; {hint}")
