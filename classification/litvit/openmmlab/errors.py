"""Wrong input that mmdet, mmseg and mmengine find, in one line."""

from litvit.errors import InputError


class SampleError(InputError):
    """Wrong input in an image or its annotation, which only the process that reads it finds."""
