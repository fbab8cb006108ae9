"""Some images of a data set: those that are held out to validate on, chosen by their names."""

import hashlib
from collections import defaultdict
from collections.abc import Collection, Sequence

from timm.data import ImageDataset
from timm.data.readers.reader import Reader

from litvit.data.dataset import Images
from litvit.data.streams import ImageStream
from litvit.errors import InputError, printable


class Part(Reader):
    """Some images of a reader, with its classes.

    Args:
        reader: Reader with `class_to_idx` and `targets`.
        indices: Indices of the images.
    """

    def __init__(self, reader: Reader, indices: Sequence[int]):
        super().__init__()
        self.reader, self.indices = reader, list(indices)
        self.class_to_idx, self.root = reader.class_to_idx, getattr(reader, "root", None)
        self.targets = [reader.targets[index] for index in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple:
        return self.reader[self.indices[index]]

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return self.reader._filename(self.indices[index], basename=basename, absolute=absolute)


def choose_names(names: Collection[str], fraction: float, seed: int) -> list[str]:
    """Choose a share of names by the seed and the names alone, not by their order.

    Args:
        names: Names to choose from.
        fraction: Share of them. It is rounded, to 1 name at least, and to all but 1 at most.
        seed: Seed of the choice.

    Raises:
        InputError: a single name.
    """
    if len(names) < 2:
        raise InputError(f"{printable(next(iter(names)))} is the only image of its class: validation needs another one")
    count = min(max(round(fraction * len(names)), 1), len(names) - 1)
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode(errors="surrogateescape")).digest())[
        :count
    ]


def split_images(images: Images, fraction: float, seed: int) -> tuple[Images, Images]:
    """Split images into those to train on and those to validate on, the same share of every class.

    The choice depends on the seed and the images' names alone, and not on the order in which they are listed. If images
    are added, most of the others stay where they are.

    Args:
        images: Images of a folder or .tar.
        fraction: Share of the images of each class to validate on. It is rounded, to 1 image at least.
        seed: Seed of the choice.

    Raises:
        InputError: a class with a single image.
    """
    reader = images.dataset.reader
    of_class = defaultdict(dict)
    for index, target in enumerate(reader.targets):
        of_class[target][reader.filename(index)] = index
    chosen = set()
    for indices in of_class.values():
        chosen.update(indices[name] for name in choose_names(indices, fraction, seed))
    left = [index for index in range(len(reader)) if index not in chosen]
    train, val = (
        Images(ImageDataset(str(reader.root), reader=Part(reader, part)), images.seed, images.decoder)
        for part in (left, sorted(chosen))
    )
    train.notes = images.notes
    val.notes = [
        f"{len(val)} of {len(reader)} images, {fraction:.0%} of each class (--val-fraction, --split-seed {seed})"
    ]
    return train, val


def held_out(val: Images | ImageStream) -> list[str] | None:
    """Return the names of the images that `split_images` has chosen to validate on, None for other images."""
    reader = None if isinstance(val, ImageStream) else val.dataset.reader
    return [reader.filename(index) for index in range(len(reader))] if isinstance(reader, Part) else None


def only_held_out(images: Images, names: Collection[str]) -> Images:
    """Return those of the images that a training held out by name; all of them if none is among them."""
    reader, names = images.dataset.reader, set(names)
    indices = [index for index in range(len(reader)) if reader.filename(index) in names]
    if not indices:
        images.notes.append(f"none of the {len(names)} images that the training held out are here: all are evaluated")
        return images
    part = Images(ImageDataset(str(reader.root), reader=Part(reader, indices)), images.seed, images.decoder)
    gone = f", {len(names) - len(indices)} of them are gone" if len(indices) < len(names) else ""
    part.notes = [
        *images.notes,
        f"{len(indices)} of {len(reader)} images, those that the training held out{gone} (--val-fraction 0: all)",
    ]
    return part
