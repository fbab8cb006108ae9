"""Decode every image of a data folder before a run: python -m litvit.training.check_data DATA_DIR."""

import argparse
from collections.abc import Sequence

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from litvit.cli import ArgumentParser, run
from litvit.errors import InputError
from litvit.training.data import open_train_and_val
from litvit.training.loaders import loader_workers
from litvit.training.recipe import HelpFormatter, add_data_flags
from litvit.training.samples import Images


class _Decoded(Dataset):
    """For every image of a data set, why it cannot be decoded, or an empty string."""

    def __init__(self, images: Images):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> str:
        try:
            self.images[index]
        except InputError as error:
            return str(error)
        return ""


def unreadable_images(images: Images, workers: int, name: str = "images") -> list[str]:
    """Decode all images, in parallel, with a progress bar.

    Args:
        images: from `open_images`.
        workers: processes.
        name: what the bar shows.

    Returns:
        A line for each image that cannot be decoded.
    """
    images.transform = lambda _: None
    # one thread a process, and no tensors: lists of strings come back
    loader = DataLoader(_Decoded(images), batch_size=64, num_workers=workers, collate_fn=list)
    torch.set_num_threads(1)
    found = []
    with tqdm(total=len(images), desc=name, unit="image") as bar:
        for reasons in loader:
            found += filter(None, reasons)
            bar.update(len(reasons))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Check train/ and val/. Returns 0 if every image decodes, else 1."""
    parser = ArgumentParser(
        prog="python -m litvit.training.check_data",
        usage="%(prog)s DATA_DIR [flags]",
        description="Decode every image of a data set, and list those that cannot be.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("data_dir", metavar="DATA_DIR", help="folder with train/ and val/, as for train.py")
    add = add_data_flags(parser)
    add("--train-split", default="train", metavar="NAME", help="subfolder, .tar or split to train on (train)")
    parser.set_defaults(in_chans=3, seed=0, train_num_samples=None)
    settings: argparse.Namespace = parser.parse_args(argv)
    train, val, num_classes = open_train_and_val(settings)
    bad = []
    for name, images in (("train", train), ("val", val)):
        if not isinstance(images, Images):
            raise InputError(
                f"--dataset {settings.dataset} is a stream: only folders, .tar files and hfds/ are checked"
            )
        bad += unreadable_images(images, loader_workers(settings), name)
    for line in bad:
        print(line)
    print(f"{len(train)} + {len(val)} images in {num_classes} classes: {len(bad)} cannot be decoded")
    return 1 if bad else 0


if __name__ == "__main__":
    run(main)
