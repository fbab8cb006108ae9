"""A run: its folder and files, how far it has come, and what it reports."""

from litvit.errors import require

require("train", "tensorboard", "tqdm")
