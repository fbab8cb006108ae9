"""Decode every image of a data folder before a run: python -m litvit.training.check_data DATA_DIR."""

from collections.abc import Sequence

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from litvit.cli import ArgumentParser, import_modules, run
from litvit.data.dataset import Images
from litvit.data.loader import default_workers
from litvit.data.readers import DataConfig, open_train_and_val
from litvit.errors import InputError
from litvit.settings import add_flags, take
from litvit.training.flags import HelpFormatter
from litvit.training.model import ModelConfig


class _Decoded(Dataset):
    """For every image of a data set, the reason why it cannot be decoded, or an empty string."""

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
        images: Images from `open_images`.
        workers: Number of processes.
        name: Label of the progress bar.

    Returns:
        One line per image that cannot be decoded.
    """
    images.transform = lambda _: None
    # One thread per process, and no tensors: lists of strings come back.
    loader = DataLoader(_Decoded(images), batch_size=64, num_workers=workers, collate_fn=list)
    torch.set_num_threads(1)
    found = []
    with tqdm(total=len(images), desc=name, unit="image") as bar:
        for reasons in loader:
            found += filter(None, reasons)
            bar.update(len(reasons))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Check train/ and val/. Returns 0 if every image can be decoded, else 1."""
    parser = ArgumentParser(
        prog="python -m litvit.training.check_data",
        usage="%(prog)s DATA_DIR [flags]",
        description="Decode every image of a data set, and list those that cannot be.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("data_dir", metavar="DATA_DIR", help="folder with train/ and val/, as for train.py")
    names = ("dataset", "val_split", "class_map", "num_classes", "workers", "train_split")
    add_flags(parser, DataConfig, only=names)
    add_flags(parser, ModelConfig, only=("imports",))
    settings = parser.parse_args(argv)
    import_modules(settings.imports)
    config = take(DataConfig, vars(settings))
    train, val, num_classes = open_train_and_val(config)
    workers = default_workers() if config.workers is None else config.workers
    bad = []
    for name, images in (("train", train), ("val", val)):
        if not isinstance(images, Images):
            raise InputError(f"--dataset {config.dataset} is a stream: only folders, .tar files and hfds/ are checked")
        bad += unreadable_images(images, workers, name)
    for line in bad:
        print(line)
    print(f"{len(train)} + {len(val)} images in {num_classes} classes: {len(bad)} cannot be decoded")
    return 1 if bad else 0


if __name__ == "__main__":
    run(main)
