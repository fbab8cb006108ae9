"""Images of a data set, read and augmented: the same sample for the same key, and unreadable files named."""

import os
import random
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from litvit.data.augment import TrainTransform
from litvit.data.pixels import Decoder
from litvit.data.random_streams import Stream, random_stream
from litvit.data.sampler import SampleKey
from litvit.data.workers import reading
from litvit.errors import InputError, is_from_user_code, one_line, printable

_PILLOW = os.path.dirname(Image.__file__) + os.sep


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
    """A data set whose training samples are reproducible and whose unreadable images are named.

    A `SampleKey` reads a training sample. It depends on (seed, epoch, position) alone: its augmentation, its erasing,
    and the image that replaces one that cannot be decoded. An integer reads an image for evaluation.

    Args:
        dataset: timm's ImageDataset, of which the reader is used.
        seed: Seed of the run.
        decoder: How files become images.

    Attributes:
        notes: Sentences on what the data set leaves out, for the user.
    """

    TRIES = 10

    def __init__(self, dataset: Dataset, seed: int = 0, decoder: Decoder | None = None):
        self.dataset = dataset
        self.seed = seed
        self.decoder = decoder or Decoder()
        self.notes: list[str] = list(getattr(dataset.reader, "notes", ()))
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
                    image, target = self._read(index)
                    break
                except InputError as error:
                    faults.append(Fault(self.name(index), str(error)))
                    if len(faults) == self.TRIES:
                        raise InputError(f"{self.TRIES} images in a row are unreadable; the last: {error}") from error
                index = random.randrange(len(self))
            labels = None
            if self.read_labels is not None:
                label_map, label_faults = self.read_labels(index)
                labels = Labels(label_map, torch.tensor(image.box), torch.tensor(image.flipped))
                faults += label_faults
            return Sample(image.pixels, target, image.erased, labels, faults)

    def open(self, index: int) -> tuple[Image.Image, Any]:
        """Open an image, without decoding it, and return it with its class.

        Raises:
            InputError: an unreadable image.
        """
        reading(self.name(index))
        with unreadable(lambda: self.name(index)):
            file, target, *_ = self.dataset.reader[index]
            return Image.open(file), target

    def _read(self, index: int) -> tuple[Any, int]:
        image, target = self.open(index)
        transformed = transform_image(image, self.transform, self.decoder, lambda: self.name(index))
        reading("")
        return transformed, target

    def name(self, index: int) -> str:
        """Return the path of an image for a message."""
        return printable(self.dataset.reader.filename(index, absolute=True))

    def filenames(self) -> list[str]:
        """Return the paths of the images."""
        return self.dataset.reader.filenames(absolute=True)


class EvaluationImages(Dataset):
    """Images as samples for evaluation: one that cannot be read is blank, and has a fault.

    Args:
        images: Images with a transform.
    """

    def __init__(self, images: Images):
        self.images, self.notes = images, images.notes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        try:
            pixels, target = self.images[index]
            return Sample(pixels, target, None, None, [])
        except InputError as error:
            fault = Fault(self.images.name(index), str(error))
            return blank_sample(self.images.transform, self.images.decoder, fault)


def blank_sample(transform: Callable, decoder: Decoder, fault: Fault) -> Sample:
    """Return a sample for evaluation in the place of an image that cannot be read."""
    return Sample(transform(Image.new(decoder.mode, (64, 64))), 0, None, None, [fault])


def transform_image(
    image: Image.Image, transform: Callable | TrainTransform, decoder: Decoder, name: Callable[[], str]
) -> Any:
    """Decode an opened file and transform the image. With a `TrainTransform`, a JPEG file may be decoded smaller.

    Args:
        image: Opened file, not decoded yet.
        transform: Function of the image.
        decoder: How the file becomes an image.
        name: Function that names the image in messages.

    Raises:
        InputError: an unreadable image.
    """
    arguments = ()
    if isinstance(transform, TrainTransform) and image.format == "JPEG" and image.mode == decoder.mode:
        with unreadable(name):
            size = decoder.size(image)
        arguments = (transform.crop.draft(image, transform.crop.draw(size)),)
    with unreadable(name):
        image = decoder(image)
    with unreadable(name, of_pillow=True):  # an image may be so long and thin that it cannot be resized
        return transform(image, *arguments)


@contextmanager
def unreadable(name: Callable[[], str], of_pillow: bool = False) -> Iterator[None]:
    """Raise InputError for any exception, which broken files make decoders raise, but not for those of the user's code.

    Args:
        name: Function that names the image in the message.
        of_pillow: Whether only exceptions that Pillow raises are meant.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if of_pillow and not isinstance(error, MemoryError):
            *_, (frame, _) = traceback.walk_tb(error.__traceback__)
            if not frame.f_code.co_filename.startswith(_PILLOW):
                raise
        file_is_missing = isinstance(error, OSError) and not of_pillow  # a reader of the user's may open it
        if is_from_user_code(error) and not file_is_missing:
            raise
        reason = "no format that Pillow knows" if isinstance(error, UnidentifiedImageError) else one_line(error)
        raise InputError(f"cannot read the image {name()} ({reason}): repair or replace it") from error
