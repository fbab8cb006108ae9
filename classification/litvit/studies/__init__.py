"""Studies: models that are trained under one recipe with several seeds, and compared."""

from litvit.errors import require

require("train", "tensorboard", "tqdm", "timm.task.evaluator", "torchmetrics", "matplotlib")
