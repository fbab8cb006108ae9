"""Wrong input that mmdet, mmseg and mmengine find, in one line."""

from litvit.errors import InputError


class SampleError(InputError):
    """Wrong input in an image or its annotation, which only the process that reads it finds."""


def one_line(error: Exception) -> str:
    """Return an exception's type and message in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
