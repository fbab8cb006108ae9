"""A page that shows what token merging reads and where attention looks: its data, and a server for pictures."""

from litvit.errors import require

require("train", "torchvision", "numpy")
