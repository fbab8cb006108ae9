"""Label files of token labelling (Jiang et al., 2021), and the soft label of every token that they give.

A label file is `<folder>/<class>/<image name>.pt`, one per training image. It holds a tensor (2, K, H, W): K scores
([0]) and the classes that they belong to ([1]) at every position of a grid over the whole image. Other classes score 0.
"""

import json
import os
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torchvision.ops import roi_align

from litvit.checkpoints import read_checkpoint
from litvit.data.dataset import Fault, Images, Labels
from litvit.data.readers import check_class_numbers, class_list
from litvit.errors import InputError

TEACHER = "teacher.json"  # describes the teacher, in the folder of the labels
AGAIN = "remove it, and litvit make-token-labels makes it again"


class TokenLabels:
    """The label files of a data set's training images.

    Args:
        folder: Folder of the files.
        images: Training images.
        num_classes: Number of classes of the model.
        size: Height and width of the model's last map, in tokens.

    Raises:
        InputError: no such folder, labels of other classes, an image without a file of its own, or a first file that is
            not a label map.
    """

    def __init__(self, folder: str, images: Images, num_classes: int, size: tuple[int, int]):
        self.folder, self.num_classes, self.size = Path(folder), num_classes, size
        self.reader = images.dataset.reader
        self.shape: torch.Size | None = None
        if not self.folder.is_dir():
            raise InputError(f"--token-label-data {folder}: no such folder; litvit make-token-labels makes one")
        self._check_teacher(images)
        self._check_files(label_files(images))
        self.shape = self.read(0).shape

    def _check_teacher(self, images: Images) -> None:
        """Refuse labels of other classes, or of pictures that were turned otherwise."""
        try:
            teacher = json.loads((self.folder / TEACHER).read_text())
            known, turned = teacher["classes"], bool(teacher.get("exif_transpose"))
        except FileNotFoundError:  # published labels
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"cannot read {self.folder / TEACHER}: {error!r}") from error
        check_class_numbers(class_list(images), known, "the training images", f"those of {self.folder}")
        if turned != images.decoder.exif_transpose:
            state = "upright (--exif-transpose)" if turned else "as stored (--no-exif-transpose)"
            raise InputError(f"the labels of {self.folder} are of photographs {state}: train on the same")

    def _check_files(self, files: list[str]) -> None:
        there = set()
        for folder in {os.path.dirname(file) for file in files}:
            path = self.folder / folder
            if path.is_dir():
                there.update(os.path.join(folder, name) for name in os.listdir(path))
        missing = [file for file in files if file not in there]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise InputError(
                f"no label file {self.folder / missing[0]}{more}: litvit make-token-labels makes them, except for "
                "images that cannot be decoded; repair or remove these"
            )

    def read(self, index: int) -> Tensor:
        """Read the label map of an image.

        Args:
            index: Index of the image.

        Returns:
            (2, K, H, W), float32: scores, and the classes that they belong to.

        Raises:
            InputError: the file cannot be read, holds code, or is no label map of these classes and of the first
                file's shape.
        """
        file = self.folder / label_file(self.reader.filename(index))
        try:
            labels = read_checkpoint(file, partial(torch.load, map_location="cpu", weights_only=True))
        except InputError as error:
            reason = str(error).rsplit(": ", 1)[0]
            raise InputError(f"token labels: {reason}; {AGAIN}") from error
        held = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        plain = isinstance(labels, Tensor) and labels.layout == torch.strided and not labels.is_nested
        if not plain or labels.is_complex() or labels.dim() != 4 or len(labels) != 2 or not labels.numel():
            raise InputError(f"token labels: {file} holds {held}, not scores and classes, (2, K, H, W); {AGAIN}")
        if self.shape is not None and labels.shape != self.shape:
            first = self.folder / label_file(self.reader.filename(0))
            raise InputError(
                f"token labels: {file} is {held}, but {first} {tuple(self.shape)}: one of them is wrong; {AGAIN}"
            )
        labels = labels.detach().float()
        if not labels[0].isfinite().all():
            raise InputError(f"token labels: {file} has scores that are not finite; {AGAIN}")
        classes = labels[1]
        if not ((classes >= 0) & (classes < self.num_classes) & (classes == classes.trunc())).all():
            raise InputError(
                f"token labels: {file} has classes outside of 0 to {self.num_classes - 1}: is it of another data set?"
            )
        return labels

    def read_or_blank(self, index: int) -> tuple[Tensor, list[Fault]]:
        """Read the label map of an image in the middle of a run, where processes can stop only together.

        Args:
            index: Index of the image.

        Returns:
            The label map, zeros if it cannot be read; the fatal fault, if there is one.
        """
        try:
            return self.read(index), []
        except InputError as error:
            file = self.folder / label_file(self.reader.filename(index))
            return torch.zeros(self.shape), [Fault(str(file), str(error), fatal=True)]


def label_file(image: str) -> str:
    """Return the label file of an image: the image's path in its split, as .pt."""
    return os.path.normpath(os.path.splitext(image)[0] + ".pt")


def label_files(images: Images) -> list[str]:
    """Return the label file of every image.

    Raises:
        InputError: two images of one name, or a .tar that leads out of its folder.
    """
    reader, names = images.dataset.reader, {}
    for index in range(len(images)):
        name = reader.filename(index)
        file = label_file(name)
        if os.path.isabs(file) or file.startswith(os.path.join("..", "")):
            raise InputError(f"the image {name} of {reader.root} lies outside of it: pack the .tar again")
        if file in names:
            raise InputError(f"{names[file]} and {name} would share the labels {file}: rename or remove one")
        names[file] = name
    return list(names)


def soft_targets(labels: Labels, num_classes: int, size: tuple[int, int]) -> Tensor:
    """Soft labels of cropped and flipped images: RoIAlign of the label maps, then softmax over all classes.

    Args:
        labels: Labels of a batch.
        num_classes: Number of classes C.
        size: Height and width of the grid of tokens, (h, w).

    Returns:
        (B, 1 + h * w, C): soft labels of the image, and of every token, row by row.
    """
    scores, classes = labels.maps.unbind(1)
    B, _, H, W = scores.shape
    # A file may list a class again, at score 0, to fill its K entries: adding keeps the class's real score.
    dense = scores.new_zeros(B, num_classes, H, W).scatter_add_(1, classes.long(), scores)
    left, top, right, bottom = labels.boxes.unbind(1)
    images = torch.arange(B, device=left.device)
    boxes = torch.stack([images, left * W, top * H, right * W, bottom * H], 1)
    whole, tokens = (roi_align(dense, boxes, grid, aligned=True) for grid in (1, size))  # (B, C, *grid)
    tokens = torch.where(labels.flipped[:, None, None, None], tokens.flip(-1), tokens)
    return torch.cat([whole.flatten(2), tokens.flatten(2)], 2).transpose(1, 2).softmax(-1)
