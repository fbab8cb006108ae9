"""A trained classifier in one line: model, transform and class names."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset
from torch import Tensor, nn
from torchvision.transforms import Compose

from litvit.checkpoints import identify_file
from litvit.data.dataset import unreadable
from litvit.errors import InputError, printable
from litvit.processes import choose_device
from litvit.training.model import ModelConfig, build_trained_model, data_settings, find_weights


@dataclass
class Classifier:
    """A trained classifier. `litvit.load` makes it.

    Attributes:
        model: Model in eval mode, from images (B, C, H, W) to logits (B, num_classes).
        transform: Function from a Pillow image, of any size and mode, to the model's input (C, H, W), on the CPU.
        classes: Names of the classes, in the order of the logits.
        config: Settings of the model and its images.
        data_config: timm's input_size, mean, std, interpolation and crop_pct.
        device: Device of the model.
    """

    model: nn.Module
    transform: Callable[[Image.Image], Tensor]
    classes: list[str]
    config: ModelConfig
    data_config: dict[str, Any]
    device: torch.device

    @torch.inference_mode()
    def predict(
        self, images: str | Path | Image.Image | Sequence[str | Path | Image.Image], k: int = 5
    ) -> list[list[tuple[str, float]]]:
        """Label images, all in one batch.

        Args:
            images: Files or Pillow images, or a single one.
            k: Number of classes per image.

        Returns:
            Per image the k best classes, best first, with their probabilities.

        Raises:
            InputError: an image that cannot be read.
        """
        if isinstance(images, str | Path | Image.Image):
            images = [images]
        if not images:
            return []
        inputs = torch.stack([self._input(image) for image in images]).to(self.device)
        probabilities, classes = best_classes(self.model(inputs), k)
        return [
            [(self.classes[number], probability) for number, probability in zip(*row, strict=True)]
            for row in zip(classes.tolist(), probabilities.tolist(), strict=True)
        ]

    def _input(self, image: str | Path | Image.Image) -> Tensor:
        if isinstance(image, Image.Image):
            return self.transform(image)
        with unreadable(lambda: printable(image)), Image.open(image) as opened:
            return self.transform(opened)


def load(source: str | Path, *, device: str | None = None, **settings: Any) -> Classifier:
    """Load a trained classifier.

        classifier = litvit.load("output/cells")
        [[(name, probability), *_]] = classifier.predict(["cell.jpg"])

    Args:
        source: Folder of a run, a file or a link, or the name of a model of ours or timm's with published weights, such
            as "lit_s.in1k".
        device: Name of the device, by default CUDA where it is available, else the CPU.
        **settings: Settings of `ModelConfig` that the weights do not know themselves, or that are to be others: model,
            img_size, ...

    Raises:
        InputError: there is no such thing, or a file that does not say what its model is.
    """
    file, description = find_weights(str(source))
    if file is None and settings.get("model", description["model"]) != description["model"]:
        raise InputError(f"the weights of {description['model']} are not those of {settings['model']}: leave out model")
    kwargs = {name: value for name, value in description.get("model_kwargs", {}).items() if name != "img_size"}
    known = {part.name: description[part.name] for part in fields(ModelConfig) if part.name in description}
    config = ModelConfig(**known | {"model_kwargs": kwargs} | settings)
    if config.model is None:
        if (name := identify_file(file)) is None:
            raise InputError(f"which model has the weights of {source}? model=NAME")
        config = ModelConfig(**known | {"model_kwargs": kwargs} | settings | {"model": name})
    return build_classifier(config, file, description, choose_device(device))


def build_classifier(
    config: ModelConfig, checkpoint: str | None, description: dict[str, Any], device: torch.device
) -> Classifier:
    """Make a classifier of weights that `find_weights` has found.

    Args:
        config: Model.
        checkpoint: File or link of the weights, None for the published ones.
        description: What is known of the model.
        device: Device of the model.

    Raises:
        InputError: weights that do not fit.
    """
    model = build_trained_model(config, description.get("num_classes"), checkpoint).eval().to(device)
    data_config = data_settings(config, model)
    names = ("input_size", "interpolation", "mean", "std", "crop_pct")
    transform = Compose([config.decoder, create_transform(**{name: data_config[name] for name in names})])
    classes = description.get("classes")
    if checkpoint is None:
        classes = model.pretrained_cfg.get("label_names")
    if not classes and "num_classes" not in description and (subset := infer_imagenet_subset(model)):
        classes = ImageNetInfo(subset).label_names()
    if classes and len(classes) != model.num_classes:
        raise InputError(f"{len(classes)} class names for a model of {model.num_classes} classes: give one per class")
    if not classes:
        classes = list(map(str, range(model.num_classes)))
    return Classifier(model, transform, readable_names(classes), config, data_config, device)


def best_classes(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the probabilities (B, k) and numbers (B, k) of the best classes, best first; fewer if there are fewer."""
    best = logits.float().softmax(-1).topk(min(k, logits.shape[-1]), dim=-1)
    return best.values, best.indices


def class_labels(num_classes: int, known: Sequence[str] | None, found: dict[str, int] | None = None) -> list[str]:
    """Return the names of all classes in the order of their numbers, for people to read.

    Args:
        num_classes: Number of classes of the model.
        known: Names that its weights know.
        found: Numbers by name of the data's classes. A class that has no name has its number.
    """
    names = {number: name for name, number in (found or {}).items()} | dict(enumerate(known or ()))
    return readable_names([str(names.get(number, number)) for number in range(num_classes)])


@lru_cache(maxsize=4)
def _in_words(classes: tuple[str, ...]) -> list[str]:
    info = ImageNetInfo("imagenet-22k")
    known = set(info.label_names())
    words = [info.label_name_to_description(name) if name in known else name for name in classes]
    times = Counter(words)  # "crane" is a bird and a machine
    return [f"{word} ({name})" if times[word] > 1 else word for word, name in zip(words, classes, strict=True)]


def readable_names(classes: Sequence[str]) -> list[str]:
    """Return class names with WordNet's numbers, such as ImageNet's folders n01440764, in words."""
    if not classes or not all(re.fullmatch(r"n\d{8}", name) for name in classes):
        return list(classes)
    return list(_in_words(tuple(classes)))
