"""CIFAR-10 as a folder of images."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image
from torchvision.datasets import CIFAR10
from tqdm import tqdm

from litvit.errors import InputError, one_line


def download_cifar10(folder: Path) -> None:
    """Fetch CIFAR-10 by torchvision, which checks its hash, and write it as train/ and val/, a folder per class.

    Args:
        folder: Folder to make. It is whole, or not there.

    Raises:
        InputError: The data cannot be fetched, or the folder cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            splits = {"train": True, "val": False}
            sets = {split: CIFAR10(temporary, train, download=True) for split, train in splits.items()}
            images = Path(temporary) / "images"
            for split, images_of_split in sets.items():
                write_images(images / split, images_of_split, images_of_split.classes)
            images.rename(folder)
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot fetch CIFAR-10 into {folder}: {one_line(error)}") from error


def write_images(folder: Path, images: Iterable[tuple[Image.Image, int]], classes: list[str]) -> None:
    """Write images with their class numbers as PNG files, `<class>/00000.png` and so on."""
    for name in classes:
        (folder / name).mkdir(parents=True)
    for number, (image, label) in enumerate(tqdm(images, desc=folder.name, disable=None, leave=False)):
        image.save(folder / classes[label] / f"{number:05}.png")
