"""Training and evaluation of image classifiers: recipe, data, optimizer, loop, run folder."""

from litvit.errors import require

require("train", "tensorboard", "tqdm", "timm.task.evaluator", "torchmetrics", "matplotlib")
