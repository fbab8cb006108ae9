"""`InputError`: wrong input, reported in one line. What comes from the user's own code is not wrong input."""

import importlib.util
import os
import re
import sys
import traceback

_FRAMEWORKS = ("litvit", "timm", "mmengine", "mmcv", "mmdet", "mmseg")
_PYTHON = (os.path.dirname(os.__file__) + os.sep, "<")


class InputError(ValueError):
    """Wrong input from outside: a path, a file, a flag, a recipe.

    The message is one line that names what is wrong and how to fix it. Command lines print it alone, without a
    traceback, and exit with status 2 (`litvit.cli.run`). Library callers get an ordinary `ValueError`.
    """

    def __init__(self, message: str = ""):
        # A DataLoader re-raises its process's error with that one's traceback as message. The last line is the error.
        if message.startswith("Caught ") and "Traceback" in message:
            message = message.strip().splitlines()[-1]
            message = message.removeprefix(f"{type(self).__module__}.{type(self).__name__}: ")
        super().__init__(printable(message))


class MissingPackageError(InputError, ImportError):
    """A package is not installed that comes with an extra of litvit."""


def require(extra: str, *packages: str) -> None:
    """Check that packages are installed. The `__init__.py` of what needs more than the models do calls this.

    Args:
        extra: Extra of litvit that installs them, or several, with commas.
        *packages: Names of packages, or of modules that older releases of them lack.

    Raises:
        MissingPackageError: one of them is not installed. The message says how to install it.
    """
    for package in packages:
        try:
            found = importlib.util.find_spec(package)
        except ModuleNotFoundError:  # a parent of it
            found = None
        if found is None:
            raise MissingPackageError(f'{package} is not installed: pip install "litvit[{extra}]"')


def printable(name: str | os.PathLike) -> str:
    r"""Return a name for a message: on one line, a line break as \n, a byte that is not text as \xff."""
    escaped = os.fspath(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in escaped)


def one_line(error: BaseException) -> str:
    """Return an exception's type and message in one line."""
    return printable(f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": "))


def is_from_user_code(error: BaseException | None) -> bool:
    """Return whether an exception, or one that caused it, comes from a config or a module of the user.

    Such an exception is a bug that its traceback helps to find, not wrong input. The innermost frame decides that
    belongs either to the user's code or to litvit, timm, mmengine, mmcv, mmdet or mmseg. Frames of Python and of other
    packages are skipped: an exception of torch is the user's if the user's constructor called torch, and wrong input
    if timm or mmdet did.
    """
    imported = [os.path.dirname(sys.modules[name].__file__) for name in _FRAMEWORKS if name in sys.modules]
    frameworks = tuple(folder + os.sep for folder in imported)
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, SyntaxError) and error.filename and os.path.isfile(error.filename):
            return True  # of a module; mmengine names no file for a config
        files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
        for file in reversed(files):
            if file.startswith(frameworks):
                break
            if not file.startswith(_PYTHON) and not re.search(r"[/\\](site|dist)-packages[/\\]", file):
                return True
        error = error.__cause__ or error.__context__
    return False
