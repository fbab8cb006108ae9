"""LIT, LITv2 and LVT: vision transformers with less attention. Importing this package registers them with timm."""

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from litvit.training.classifier import load

# In `litvit COMMAND` and `python -m litvit COMMAND` (the first word after Python's own is a path or a name that ends in
# "litvit") `litvit.commands` does this: help needs no torch, and what torch reads when it loads has to be set before.
if [os.path.basename(word) for word in sys.orig_argv[-len(sys.argv) :][:1]] != ["litvit"]:
    from litvit import models

__all__ = ["load", "models"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load":  # the models alone need less than it does
        from litvit.training.classifier import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
