"""Read every image of a data set before a run: litvit check-data DATA_DIR."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from PIL import Image
from torch.utils.data import Dataset, IterableDataset
from tqdm import tqdm

from litvit.cli import ArgumentParser, import_modules
from litvit.data.dataset import Fault, Images, unreadable
from litvit.data.listing import shorten
from litvit.data.loader import default_workers
from litvit.data.pixels import Decoder, is_16_bit, orientation
from litvit.data.readers import DataConfig, open_train_and_val
from litvit.data.streams import ImageStream
from litvit.data.workers import WatchedLoader
from litvit.errors import InputError
from litvit.settings import add_flags, take
from litvit.training.flags import HelpFormatter
from litvit.training.model import ModelConfig

UNREADABLE = "cannot be decoded"
SCALED = "have 16 bits per pixel, which are scaled to 8"
TURNED = "are photographs that are not stored upright (--exif-transpose turns them)"
Findings = list[tuple[str, str]]  # what is to be said of an image: kind, and a line that names it


def _examine(open_image: Callable[[], Image.Image], name: Callable[[], str], decoder: Decoder) -> Findings:
    try:
        image = open_image()
        kinds = {SCALED: is_16_bit(image), TURNED: not decoder.exif_transpose and orientation(image) != 1}
        with unreadable(name):
            decoder(image)
    except InputError as error:
        return [(UNREADABLE, str(error))]
    return [(kind, name()) for kind, holds in kinds.items() if holds]


class _Examined(Dataset):
    """The findings of every image."""

    def __init__(self, images: Images):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Findings:
        return _examine(lambda: self.images.open(index)[0], lambda: self.images.name(index), self.images.decoder)


class _ExaminedStream(IterableDataset):
    """The findings of every image of a stream."""

    def __init__(self, images: ImageStream):
        self.images = images

    def __iter__(self) -> Iterator[Findings]:
        for item in self.images.read():
            if isinstance(item, Fault):
                yield [(UNREADABLE, item.reason)]
            else:
                yield _examine(item.open, lambda: item.name, self.images.decoder)  # noqa: B023 - called at once


def check_images(images: Images | ImageStream, workers: int, name: str = "images") -> tuple[int, dict[str, list[str]]]:
    """Decode all images, in parallel, with a progress bar.

    Args:
        images: Images from `open_images`.
        workers: Number of processes.
        name: Label of the progress bar.

    Returns:
        Number of images, and per kind of finding (`UNREADABLE`, `SCALED`, `TURNED`) one line per image.
    """
    if isinstance(images, ImageStream):
        workers = images.deal(0, 1, workers, batch_size=1, batches=0)
        examined = _ExaminedStream(images)
    else:
        examined = _Examined(images)
    loader = WatchedLoader(
        examined,
        batch_size=64,
        num_workers=workers,
        collate_fn=list,  # lists of strings, no tensors
    )
    count, found = 0, defaultdict(list)
    with tqdm(total=len(images) or None, desc=name, unit="image") as bar:
        for batch in loader:
            for kind, line in itertools.chain.from_iterable(batch):
                found[kind].append(line)
            count += len(batch)
            bar.update(len(batch))
    return count, found


def main(argv: Sequence[str] | None = None) -> int:
    """Check both splits. Returns 0 if every image can be read as it is, else 1."""
    parser = ArgumentParser(
        usage="%(prog)s DATA_DIR [flags]",
        description="Read every image of a data set. List those that cannot be decoded, and say what is left out and "
        "what is converted. The exit status is 1 if an image cannot be decoded, or loses bits.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("data_dir", metavar="DATA_DIR", help="folder with train/ and val/, as for train.py")
    add_flags(parser, DataConfig, leave_out=("batch_size", "val_batch_size"))
    add_flags(parser, ModelConfig, only=("imports", "in_chans", "exif_transpose"))
    settings = vars(parser.parse_args(argv))
    import_modules(settings["imports"])
    config = take(DataConfig, settings)
    train, val, num_classes = open_train_and_val(config, take(ModelConfig, settings).decoder)
    workers = default_workers() if config.workers is None else config.workers
    counts, found, notes = [], defaultdict(list), []
    for split, images in ((config.train_split, train), (config.val_split, val)):
        count, findings = check_images(images, workers, split)
        counts.append(count)
        if not count:
            raise InputError(f"{split} has no images")
        notes += [f"{split}: {note}" for note in images.notes]
        if len(images) not in (0, count):
            notes.append(f"{split}: there are {count} images, not the {len(images)} that are announced")
        for kind, lines in findings.items():
            found[kind] += lines
    for line in [*found[UNREADABLE], *notes]:
        print(line)
    for kind in (SCALED, TURNED):
        if found[kind]:
            print(f"{len(found[kind])} images {kind}: {shorten(found[kind])}")
    total = " + ".join(map(str, counts))
    print(f"{total} images in {num_classes} classes: {len(found[UNREADABLE])} {UNREADABLE}")
    return 1 if found[UNREADABLE] or found[SCALED] else 0
