"""Find and open image data sets, and number their classes."""

import os
import pickle
import tarfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from timm.data import ImageDataset
from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader import Reader

from litvit.data.dataset import Images
from litvit.data.hugging_face import HuggingFaceRows, HuggingFaceStream
from litvit.data.listing import ImageFiles, NamedFiles, class_folders, find_images, shorten
from litvit.data.pixels import Decoder
from litvit.data.splits import Part, only_held_out, split_images
from litvit.data.streams import ImageStream, Source, WebDatasetShards
from litvit.errors import InputError, one_line, printable
from litvit.settings import setting

STREAMS: dict[str, type[Source]] = {"hfids": HuggingFaceStream, "wds": WebDatasetShards}
SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "validation", "test", "eval")}
# Readers of data sets by name, for --dataset: a function of (root, split) that returns a reader of timm's interface.
OWN_READERS: dict[str, Callable[[str, str], Reader]] = {}


def register_reader(function: Callable[[str, str], Reader]) -> Callable:
    """Register a reader of your own, which `--dataset` then takes by the function's name.

    Args:
        function: Function of the data folder and the name of a split. It returns a subclass of
            `timm.data.readers.reader.Reader` with `__len__`, `__getitem__` (index to an open image file and its
            class), `_filename` (index to a name for messages) and, if classes have names, `class_to_idx`.
    """
    OWN_READERS[function.__name__] = function
    return function


@dataclass(frozen=True)
class DataConfig:
    """Images of a run, and the size of their batches."""

    data_dir: str
    dataset: str = setting("", "READER", "hfds/NAME, hfids/NAME, wds/NAME, or one of --import (folder or .tar)")
    val_split: str = setting("val", "NAME", "split to validate on (val, validation or test)", "--val-split", "--split")
    val_num_samples: int | None = setting(None, "N", "length of a streamed validation set")
    val_fraction: float = setting(0.0, "X", "share of each class to validate on where there is no val folder")
    class_map: str | None = setting(None, "FILE", "class names in the order of their numbers, one per line")
    input_key: str | None = setting(None, "KEY", "column, or suffix in a shard, of the images (found if there is one)")
    target_key: str | None = setting(None, "KEY", "column, or field of a shard's .json, of the classes (likewise)")
    num_classes: int | None = setting(None, "N", "number of classes (counted from the data if possible)")
    batch_size: int = setting(128, "N", "images per process and micro-batch", "-b", "--batch-size")
    workers: int | None = setting(
        None, "N", "loader processes per process (8, or its cores if fewer)", "-j", "--workers"
    )
    train_split: str = setting("train", "NAME", "subfolder, .tar or split to train on", training=True)
    train_num_samples: int | None = setting(None, "N", "length of a streamed training set", training=True)
    split_seed: int = setting(0, "N", "seed of the choice of --val-fraction", training=True)
    val_batch_size: int | None = setting(None, "N", "batch size of validation (--batch-size)", training=True)

    @property
    def eval_batch_size(self) -> int:
        """Number of images per process and batch of validation."""
        return self.val_batch_size or self.batch_size


def find_split(root: str, split: str, *, or_itself: bool = False) -> Path:
    """Return the path of a split: `root/<split>`, `root/<split>.tar`, or one of its usual other names.

    Args:
        root: Data folder.
        split: Name of the split: "train", "val" or the name of a subfolder.
        or_itself: Whether `root` may be the split itself: a .tar, or a folder of classes without train/ or val/ in it.

    Raises:
        InputError: no such folder, an empty one, or one without that split.
    """
    folder = Path(root)
    if not folder.exists():
        raise InputError(f"no data folder {root}")
    if not folder.is_dir():
        if or_itself and folder.suffix == ".tar":
            return folder
        raise InputError(
            f"{root} is a file; the data is a folder with train/ and val/ (or train.tar and val.tar) in it"
        )
    entries = {entry.name: entry.is_dir() for entry in sorted(folder.iterdir())}
    if not entries:
        raise InputError(
            f"the data folder {root} is empty; it should hold train/ and val/, with one folder per class in each"
        )
    if path := _named_split(root, split):
        return path
    has_other_splits = any(
        name in entries or f"{name}.tar" in entries for names in SPLIT_NAMES.values() for name in names
    )
    if or_itself and not has_other_splits and any(entries.values()):
        return folder
    layout = "; classes are folders of images" if or_itself and not has_other_splits else ""
    raise InputError(f"{root} has neither {split}/ nor {split}.tar; it holds {', '.join(list(entries)[:5])}{layout}")


def _named_split(root: str, split: str) -> Path | None:
    """Return the folder or .tar of a split, under one of its usual names; None if there is none."""
    names = (candidate for name in SPLIT_NAMES.get(split, (split,)) for candidate in (name, f"{name}.tar"))
    return next((path for path in (Path(root, name) for name in names) if path.exists()), None)


def open_images(
    config: DataConfig,
    split: str,
    *,
    known_classes: Collection[str] = (),
    decoder: Decoder | None = None,
    seed: int = 0,
    is_training: bool = False,
    or_itself: bool = False,
) -> Images | ImageStream:
    """Open one split of a data set.

    Args:
        config: Data to open.
        split: Name of the split.
        known_classes: Class names of the model or of the training images, if they are known.
        decoder: How files become images; None for RGB as stored.
        seed: Seed of the run.
        is_training: Whether a stream is shuffled, and repeated to the length of an epoch.
        or_itself: Whether the data folder may be the split itself, see `find_split`.

    Raises:
        InputError: no images, a class map that does not fit, or a reader that this environment cannot use.
    """
    root, decoder = config.data_dir, decoder or Decoder()
    numbers = read_class_map(config.class_map, root) if config.class_map else None
    kind, _, name = config.dataset.partition("/")
    kind = kind.lower()
    if kind not in ("hfds", *STREAMS) and (config.input_key or config.target_key):
        raise InputError("--input-key and --target-key are for hfds/, hfids/ and wds/: leave them out")
    if config.dataset in OWN_READERS:
        reader = OWN_READERS[config.dataset](root, split)
    elif not config.dataset:
        reader = _open_files(find_split(root, split, or_itself=or_itself), known_classes or numbers or ())
    elif kind not in ("hfds", *STREAMS):
        known = ", ".join([*(f"{reader}/NAME" for reader in ("hfds", *STREAMS)), *OWN_READERS])
        raise InputError(f"--dataset {config.dataset}: the readers are {known}")
    else:
        keys = {"input_key": config.input_key, "target_key": config.target_key}
        if not name and kind != "wds":
            raise InputError(f"--dataset {config.dataset} names no data set: {kind}/NAME")
        try:
            if kind == "hfds":
                reader = HuggingFaceRows(name, split, root, **keys)
            else:
                num_samples = config.train_num_samples if is_training else config.val_num_samples
                source = STREAMS[kind](name, split, root, numbers=numbers, num_samples=num_samples, **keys)
                stream = ImageStream(source, seed, decoder, is_training)
                stream.check()
                return stream
        except ImportError as error:
            message = f'--dataset {config.dataset} needs packages: pip install "litvit[data]" ({error})'
            raise InputError(message) from error
        except InputError:
            raise
        except Exception as error:  # the libraries raise many kinds of errors for what is missing or broken
            raise InputError(f"cannot read {split} of --dataset {config.dataset}: {one_line(error)}") from error
    images = Images(ImageDataset(root, reader=reader), seed, decoder)
    if not config.dataset:
        names = (name for name in (split, *SPLIT_NAMES.get(split, ())) if name not in ("test", "eval"))
        others = [name for stem in dict.fromkeys(names) for name in (stem, f"{stem}.tar") if Path(root, name).exists()]
        if len(others) > 1 and not or_itself:
            images.notes.append(f"{others[0]} is read, and not {', '.join(others[1:])}")
    if numbers:
        number_classes(images, numbers, split, "the class map")
    return images


def _open_files(path: Path, known_classes: Collection[str]) -> ImageFiles:
    try:
        return ImageFiles(path, known_classes)
    except (OSError, tarfile.TarError) as error:
        hint = "; only a .tar that is not compressed is read" if "invalid header" in str(error) else ""
        raise InputError(f"cannot read {printable(path)}: {one_line(error)}{hint}") from error


def read_class_map(file: str, root: str = "") -> dict[str, int]:
    """Read the numbers of classes: a .txt with one name per line, from 0, or a .pkl with a dictionary.

    Args:
        file: Path of the file, of its own or in `root`.
        root: Data folder.

    Raises:
        InputError: no such file, a name that comes twice, an empty line between names, a number that is not one.
    """
    path = file if os.path.exists(file) else os.path.join(root, file)
    if not path.lower().endswith((".txt", ".pkl")):
        raise InputError(f"the class map {file} is neither a .txt with one name per line nor a .pkl")
    try:
        if not path.lower().endswith(".txt"):
            numbers = load_class_map(path)
        else:
            names = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").rstrip().splitlines()]
            numbers = {name: number for number, name in enumerate(names)}
            twice = next((name for number, name in enumerate(names) if numbers[name] != number), None)
            if "" in numbers or twice:
                where = f"line {names.index('') + 1} is empty" if "" in numbers else f"{printable(twice)} comes twice"
                raise InputError(f"the class map {file}: {where}, so that the classes below it have other numbers")
    except (OSError, AssertionError, UnicodeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read the class map {file}: {one_line(error)}") from error
    for name, number in numbers.items():
        if type(number) is not int or number < 0:
            raise InputError(f"the class map {file}: {name} has {number!r}, and not a whole number from 0")
    if len(set(numbers.values())) < len(numbers) or not numbers:
        what = "two classes share a number" if numbers else "it holds no class"
        raise InputError(f"the class map {file}: {what}; every class needs a number of its own")
    return {str(name): number for name, number in numbers.items()}


class _Renumbered(Reader):
    """A reader with other class numbers.

    Args:
        reader: Reader with `class_to_idx`.
        numbers: Number of each class.
    """

    def __init__(self, reader: Reader, numbers: Mapping[str, int]):
        super().__init__()
        self.reader, self.class_to_idx, self.root = reader, dict(numbers), getattr(reader, "root", None)
        self._numbers = {number: numbers[name] for name, number in reader.class_to_idx.items()}
        if hasattr(reader, "targets"):
            self.targets = [self._numbers[target] for target in reader.targets]

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple:
        file, target, *rest = self.reader[index]
        return file, self._numbers[target], *rest

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return self.reader._filename(index, basename=basename, absolute=absolute)


def open_sample(sources: Sequence[str], number: int, decoder: Decoder | None = None) -> tuple[Images, list[str]]:
    """Open some of the images that a command line names, evenly spread over them.

    Args:
        sources: What `find_images` takes, or one .tar with folders of classes. A folder with a validation split stands
            for that.
        number: Largest number of images.
        decoder: How files become images; None for RGB as stored.

    Returns:
        Images, and a line for each source without any.

    Raises:
        InputError: no images.
    """
    places = [str(_named_split(source, "val") or source) for source in sources]
    if len(places) == 1 and places[0].endswith(".tar") and os.path.isfile(places[0]):
        reader, problems = _open_files(Path(places[0]), ()), []
    else:
        names, problems = find_images(places)
        if not names:
            raise InputError("; ".join(problems))
        reader = NamedFiles(names)
    count = min(number, len(reader))
    reader = Part(reader, [i * len(reader) // count for i in range(count)])
    return Images(ImageDataset("", reader=reader), decoder=decoder), problems


def class_counts(images: Images | ImageStream, num_classes: int) -> list[int]:
    """Return the number of images of each class.

    Raises:
        InputError: a stream, or a reader that does not list its classes.
    """
    reader = None if isinstance(images, ImageStream) else images.dataset.reader
    if not hasattr(reader, "targets"):
        raise InputError("--class-weights needs the class of every image beforehand: not with a stream or this reader")
    return np.bincount(reader.targets, minlength=num_classes).tolist()


def number_classes(images: Images, numbers: Mapping[str, int], where: str, source: str) -> None:
    """Give the classes of images other numbers, and note which of these no image has.

    Args:
        images: Images, changed in place.
        numbers: Class name to number.
        where: Name of the images, for messages.
        source: Source of the numbers, for messages.

    Raises:
        InputError: a class has no number, or the reader's classes have no names.
    """
    names = class_names(images)
    if not names:
        reader = type(images.dataset.reader).__name__
        raise InputError(f"the classes of {reader} have no names (class_to_idx) to number them by")
    check_classes_known(names, numbers, where, source)
    absent = [name for name in numbers if name not in names]
    if absent:
        images.notes.append(f"no images of {len(absent)} classes of {source}: {shorten(absent)}")
    if names != numbers:
        images.dataset.reader = _Renumbered(images.dataset.reader, numbers)


def class_names(images: Images | ImageStream) -> dict[str, int] | None:
    """Return class name to number as the reader counted them, None if it does not say."""
    reader = images.source if isinstance(images, ImageStream) else images.dataset.reader
    return dict(getattr(reader, "class_to_idx", None) or {}) or None


def class_list(images: Images | ImageStream) -> list[str] | None:
    """Return the class names in the order of their numbers, None if the reader does not say or leaves numbers out."""
    names = {number: str(name) for name, number in (class_names(images) or {}).items()}
    return [names[number] for number in range(len(names))] if names.keys() == set(range(len(names))) else None


def train_classes(config: DataConfig) -> list[str] | None:
    """Return the names of the class folders of a data folder's train/, None if there are none or `class_map` is set."""
    try:
        folder = find_split(config.data_dir, "train")
        return None if config.dataset or config.class_map or not folder.is_dir() else class_folders(folder)
    except (InputError, OSError):
        return None


def check_classes_known(found: Iterable[str], known: Iterable[str], where: str, source: str) -> None:
    """Raise InputError if there are classes that the model does not know.

    Args:
        found: Class names of the images.
        known: Class names that the model knows.
        where: Location of the images, for the message.
        source: Source of the known classes, for the message.
    """
    unknown = sorted({str(name) or "(no folder)" for name in set(found) - set(known)})
    if unknown:
        shown = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        raise InputError(f"{where} has {len(unknown)} classes that {source} lacks: {shown}")


def check_class_numbers(found: list[str] | None, known: list[str] | None, where: str, source: str) -> None:
    """Raise InputError if classes, in the order of their numbers, differ. None stands for unknown classes."""
    if not found or not known or found == known:
        return
    index = next((i for i, pair in enumerate(zip(found, known, strict=False)) if pair[0] != pair[1]), None)
    differ = (
        f"{len(found)} and {len(known)}" if index is None else f"number {index} is {found[index]}, not {known[index]}"
    )
    raise InputError(f"the classes of {where} are not {source}: {differ}")


def open_for_evaluation(
    config: DataConfig,
    classes: list[str] | None,
    decoder: Decoder | None = None,
    chosen: Collection[str] | None = None,
) -> Images | ImageStream:
    """Open the images to evaluate on, with the model's class numbers.

    Args:
        config: Data to open the `val_split` of.
        classes: Model's classes in the order of their numbers; None for those of the train/ folder next to it.
        decoder: How files become images; None for RGB as stored.
        chosen: Names of the images that the training held out, see `held_out`; None if it had a `val_split`.

    Raises:
        InputError: no images, or classes that the model does not know.
    """
    known = classes or train_classes(config) or []
    if chosen and config.val_fraction and not config.dataset and not _named_split(config.data_dir, config.val_split):
        images = open_images(config, config.train_split, known_classes=known, decoder=decoder, or_itself=True)
        images = only_held_out(images, chosen)
    else:
        images = open_images(config, config.val_split, known_classes=known, decoder=decoder, or_itself=True)
    if isinstance(images, ImageStream):
        check_class_numbers(class_list(images), classes, config.val_split, "those of the checkpoint")
        return images
    found = class_names(images)
    if config.class_map and set(found or ()) & set(classes or ()):
        check_class_numbers(class_list(images), classes, "the class map", "those of the checkpoint")
    if config.class_map or not found or not known:
        return images
    if len(found) == len(known) and not found.keys() & set(known):
        return images  # as many classes, all with other names: ImageNet-V2's folders are numbers
    numbers = {name: number for number, name in enumerate(known)}
    number_classes(images, numbers, config.val_split, "the checkpoint" if classes else "train/")
    return images


def open_train_and_val(
    config: DataConfig, decoder: Decoder | None = None, seed: int = 0
) -> tuple[Images | ImageStream, Images | ImageStream, int]:
    """Open both splits, give their classes the same numbers, and count them.

    Args:
        config: Data to open.
        decoder: How files become images; None for RGB as stored.
        seed: Seed of the run.

    Returns:
        Training images, validation images, number of classes.

    Raises:
        InputError: data that cannot be trained on; the line names the folder or class.
    """
    is_split = bool(config.dataset or _named_split(config.data_dir, config.val_split))
    if not is_split and not config.val_fraction:  # before the long listing of train/
        try:
            find_split(config.data_dir, config.val_split)
        except InputError as error:
            if not os.path.isdir(config.data_dir):
                raise
            raise InputError(f"{error}; --val-fraction 0.2 validates on a fifth of train/") from error
    train = open_images(
        config, config.train_split, decoder=decoder, seed=seed, is_training=True, or_itself=not is_split
    )
    classes = class_names(train)
    if is_split:
        val = open_images(config, config.val_split, known_classes=classes or (), decoder=decoder, seed=seed)
    else:
        train, val = split_images(train, config.val_fraction, config.split_seed)
    if isinstance(val, ImageStream):
        check_class_numbers(class_list(val), class_list(train), config.val_split, f"those of {config.train_split}")
    elif classes and class_names(val):
        number_classes(val, classes, config.val_split, config.train_split)
    counted = max(classes.values()) + 1 if classes else None
    if config.num_classes is None and counted is None:
        raise InputError(f"--dataset {config.dataset} does not say how many classes it has: give --num-classes")
    if counted and config.num_classes and config.num_classes < counted:
        raise InputError(f"--num-classes {config.num_classes}, but the data has {counted} classes")
    for images in (train, val):
        if isinstance(images, ImageStream):
            images.num_classes = config.num_classes or counted
    return train, val, config.num_classes or counted
