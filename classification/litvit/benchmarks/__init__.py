"""What the benchmark command measures: classifiers, merging, attention, dense backbones and the input pipeline."""

from litvit.errors import require

require("train", "tqdm", "matplotlib", "torchmetrics")
