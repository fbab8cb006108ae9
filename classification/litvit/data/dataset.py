"""Images of a data set, read and augmented: the same sample for the same key, and unreadable files named."""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from litvit.data.augment import TrainTransform
from litvit.data.random_streams import Stream, random_stream
from litvit.data.sampler import SampleKey
from litvit.errors import InputError, is_from_user_code


class Fault(NamedTuple):
    """What was wrong with a file."""

    path: str
    reason: str  # one line for the user
    fatal: bool = False  # whether the run must stop before it learns from this sample


class Labels(NamedTuple):
    """Label maps, and the part of them that an image shows. In a batch each field is stacked."""

    maps: Tensor  # (2, K, H, W): scores and their classes, over the whole image
    boxes: Tensor  # (4,): the crop, x1, y1, x2, y2 as fractions of the whole image
    flipped: Tensor  # (): whether the crop is flipped, left to right


class Sample(NamedTuple):
    """One training sample as a loader process makes it."""

    pixels: Tensor  # uint8 (C, H, W)
    target: int
    erased: Tensor | None  # see Augmented
    labels: Labels | None
    faults: list[Fault]


class Images(Dataset):
    """A timm data set whose training samples are reproducible and whose unreadable images are named.

    A `SampleKey` reads a training sample. It depends on (seed, epoch, position) alone: its augmentation, its erasing,
    and the image that replaces one that cannot be decoded. An integer reads an image for evaluation.

    Args:
        dataset: timm's ImageDataset.
        seed: Seed of the run.
    """

    TRIES = 10

    def __init__(self, dataset: Dataset, seed: int = 0):
        self.dataset = dataset
        self.seed = seed
        self.transform: Callable[[Image.Image], Any] | TrainTransform | None = None
        self.read_labels: Callable[[int], tuple[Tensor, list[Fault]]] | None = None  # label map of an image

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | SampleKey) -> tuple[Tensor, int] | Sample:
        """Read an image as uint8 (C, H, W) and its class, or a training sample.

        Raises:
            InputError: an unreadable image; for a `SampleKey`, ten of them in a row.
        """
        if not isinstance(key, SampleKey):
            return self._read(key)
        with random_stream(Stream.SAMPLE, self.seed, key.epoch, key.position):
            index, faults = key.index, []
            while True:
                try:
                    image, target = self._read(index, draft=True)
                    break
                except InputError as error:
                    faults.append(Fault(self.filenames([index])[0], str(error)))
                    if len(faults) == self.TRIES:
                        raise
                index = random.randrange(len(self))
            labels = None
            if self.read_labels is not None:
                label_map, label_faults = self.read_labels(index)
                labels = Labels(label_map, torch.tensor(image.box), torch.tensor(image.flipped))
                faults += label_faults
            return Sample(image.pixels, target, image.erased, labels, faults)

    def _read(self, index: int, draft: bool = False) -> tuple[Any, int]:
        """Read and transform an image. With `draft` the transform may choose the size that a JPEG decodes to."""
        mode = self.dataset.input_img_mode
        try:
            file, target, *_ = self.dataset.reader[index]
            image = Image.open(file)
            if image.mode != mode:
                image = image.convert(mode)
            elif not draft or image.format != "JPEG":
                image.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            if is_from_user_code(error) and not isinstance(error, OSError):
                raise
            raise self._unreadable(index, error) from error
        try:
            return self.transform(image), target
        except OSError as error:  # of a JPEG file that is decoded only now
            if is_from_user_code(error):
                raise
            raise self._unreadable(index, error) from error

    def _unreadable(self, index: int, error: Exception) -> InputError:
        path = self.filenames([index])[0]
        return InputError(f"cannot read the image {path} ({error}): repair or replace it")

    def filenames(self, indices: list[int] | None = None) -> list[str]:
        """Return the paths of the images, or of those at `indices`."""
        reader = self.dataset.reader
        if indices is None:
            return reader.filenames(absolute=True)
        return [reader.filename(index, absolute=True) for index in indices]
