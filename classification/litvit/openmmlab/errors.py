"""Exceptions of mmdet, mmseg and mmengine: which of them are wrong input, and which come from the user's own code."""

import os
import re
import sys
import traceback

from litvit.errors import InputError

_FRAMEWORKS = ("litvit", "mmengine", "mmcv", "mmdet", "mmseg")
_PYTHON = (os.path.dirname(os.__file__) + os.sep, "<")


class SampleError(InputError):
    """Wrong input in an image or its annotation, which only the process that reads it finds."""


def one_line(error: Exception) -> str:
    """Return an exception's type and message in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


def is_from_user_code(error: BaseException | None) -> bool:
    """Return whether an exception, or one that caused it, comes from a config or a module of the user.

    Such an exception is a bug that its traceback helps to find, not wrong input. The innermost frame decides that
    belongs either to the user's code or to litvit, mmengine, mmcv, mmdet or mmseg. Frames of Python and of other
    packages are skipped: an exception of torch is the user's if the user's constructor called torch, and the config's
    if mmdet did.
    """
    imported = [os.path.dirname(sys.modules[name].__file__) for name in _FRAMEWORKS if name in sys.modules]
    frameworks = tuple(folder + os.sep for folder in imported)
    while error is not None:
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
