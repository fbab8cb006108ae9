"""Find and open image data sets, and number their classes. timm's readers read them."""

import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from timm.data import ImageDataset, create_dataset
from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader import Reader
from timm.utils.misc import natural_key
from torch.utils.data import Dataset, IterableDataset

from litvit.data.dataset import Images
from litvit.errors import InputError
from litvit.settings import setting

READERS = ("hfds", "hfids", "wds", "tfds")
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
    dataset: str = setting("", "READER", "reader of timm, hfds/NAME, hfids/NAME, wds/ ... (folder or .tar)")
    val_split: str = setting("val", "NAME", "split to validate on (val, validation or test)", "--val-split", "--split")
    val_num_samples: int | None = setting(None, "N", "length of a streamed validation set")
    class_map: str | None = setting(None, "FILE", "class names in the order of their numbers, one per line")
    num_classes: int | None = setting(None, "N", "number of classes (counted from the data if possible)")
    batch_size: int = setting(128, "N", "images per process and micro-batch", "-b", "--batch-size")
    workers: int | None = setting(
        None, "N", "loader processes per process (8, or its cores if fewer)", "-j", "--workers"
    )
    train_split: str = setting("train", "NAME", "subfolder, .tar or split to train on", training=True)
    train_num_samples: int | None = setting(None, "N", "length of a streamed training set", training=True)
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
    for name in SPLIT_NAMES.get(split, (split,)):
        for candidate in (name, f"{name}.tar"):
            if candidate in entries:
                return folder / candidate
    has_other_splits = any(
        name in entries or f"{name}.tar" in entries for names in SPLIT_NAMES.values() for name in names
    )
    if or_itself and not has_other_splits and any(entries.values()):
        return folder
    raise InputError(f"{root} has neither {split}/ nor {split}.tar; it holds {', '.join(list(entries)[:5])}")


def open_images(
    root: str,
    split: str,
    *,
    dataset: str = "",
    class_map: str | dict[str, int] | None = None,
    num_samples: int | None = None,
    batch_size: int = 1,
    in_chans: int = 3,
    seed: int = 0,
    is_training: bool = False,
    or_itself: bool = False,
) -> Dataset:
    """Open one split of a data set.

    Args:
        root: Data folder; for Hugging Face and WebDataset, the root that timm takes.
        split: Name of the split.
        dataset: Reader: one of timm's with the data set's name, such as "hfds/NAME", or one of `register_reader`'s;
            empty for a folder or .tar.
        class_map: File with the class names in the order of their numbers, or class name to number.
        num_samples: Length of a stream.
        batch_size: Batch size, which some streaming readers ask for.
        in_chans: Number of image channels: 1 for grey, 3 for RGB, 4 for RGBA.
        seed: Seed of the run.
        is_training: Whether a stream is to be shuffled.
        or_itself: Whether `root` may be the split itself, see `find_split`.

    Returns:
        `Images`, or timm's IterableImageDataset for a stream.

    Raises:
        InputError: no images, or a reader that this environment cannot use.
    """
    kwargs = {}
    mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(in_chans, "RGB")
    if dataset in OWN_READERS:
        reader = OWN_READERS[dataset](root, split)
        if class_map:
            reader = _Renumbered(reader, class_map if isinstance(class_map, dict) else _read_class_map(class_map, root))
        return Images(ImageDataset(root, reader=reader, input_img_mode=mode), seed)
    if dataset:
        if dataset.partition("/")[0].lower() not in READERS:
            own = "".join(f", {name}" for name in OWN_READERS)
            raise InputError(f"--dataset {dataset}: timm's readers are {', '.join(f'{r}/NAME' for r in READERS)}{own}")
        location = root
    else:
        location = str(find_split(root, split, or_itself=or_itself))
        if location.endswith(".tar"):
            kwargs["cache_tarinfo"] = False  # timm would keep the index as a pickle next to a large tar, and trust it
    try:
        opened = create_dataset(
            dataset,
            root=location,
            split=split,
            search_split=False,
            class_map=class_map or "",
            is_training=is_training,
            batch_size=batch_size,
            num_samples=num_samples,
            seed=seed,
            input_img_mode=mode,
            **kwargs,
        )
    except ImportError as error:
        raise InputError(f"--dataset {dataset} needs a package: pip install {error.name}") from error
    except (OSError, RuntimeError, ValueError, AssertionError, KeyError, pickle.UnpicklingError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"cannot read the {split} images of {location}: {message}") from error
    return opened if isinstance(opened, IterableDataset) else Images(opened, seed)


def _read_class_map(file: str, root: str) -> dict[str, int]:
    try:
        return load_class_map(file, root)
    except (OSError, AssertionError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise InputError(f"cannot read the class map {file}: {' '.join(str(error).split())}") from error


class _Renumbered(Reader):
    """A reader of one's own with other class numbers.

    Args:
        reader: Reader with `class_to_idx`.
        numbers: Number of each class.

    Raises:
        InputError: a class of the reader has no number, or the reader's classes have no names.
    """

    def __init__(self, reader: Reader, numbers: dict[str, int]):
        names = getattr(reader, "class_to_idx", None)
        if not names:
            raise InputError(f"the classes of {type(reader).__name__} have no names (class_to_idx) to number them by")
        check_classes_known(names, numbers, "the data", "the class map")
        self.reader, self.class_to_idx = reader, {name: numbers[name] for name in names}
        self._numbers = {number: numbers[name] for name, number in names.items()}

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple:
        file, target, *rest = self.reader[index]
        return file, self._numbers[target], *rest

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return self.reader._filename(index, basename=basename, absolute=absolute)


def class_names(dataset: Dataset) -> dict[str, int] | None:
    """Return class name to number as the reader counted them, None if it does not say."""
    reader = getattr(dataset, "dataset", dataset).reader
    names = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    return dict(names) if names else None


def class_list(dataset: Dataset) -> list[str] | None:
    """Return the class names in the order of their numbers, None if the reader does not say or leaves numbers out."""
    names = {number: str(name) for name, number in (class_names(dataset) or {}).items()}
    return [names[number] for number in range(len(names))] if names.keys() == set(range(len(names))) else None


def train_classes(config: DataConfig) -> list[str] | None:
    """Return the names of the class folders of a data folder's train/, None if there are none or `class_map` is set."""
    try:
        folder = find_split(config.data_dir, "train")
    except InputError:
        return None
    if config.dataset or config.class_map or not folder.is_dir():
        return None
    paths = (path for path in folder.glob("[!.]*") if path.is_dir())
    return sorted((path.name for path in paths if next(path.iterdir(), None)), key=natural_key) or None


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


def open_for_evaluation(config: DataConfig, classes: list[str] | None, in_chans: int = 3) -> Dataset:
    """Open the images to evaluate on, with the model's class numbers.

    Args:
        config: Data to open the `val_split` of.
        classes: Model's classes in the order of their numbers; None for those of the train/ folder next to it.
        in_chans: Number of image channels.

    Raises:
        InputError: no images, or classes that the model does not know.
    """

    def open_(class_map: str | dict[str, int] | None) -> Dataset:
        return open_images(
            config.data_dir,
            config.val_split,
            dataset=config.dataset,
            class_map=class_map,
            num_samples=config.val_num_samples,
            batch_size=config.batch_size,
            in_chans=in_chans,
            or_itself=True,
        )

    images = open_(config.class_map)
    numbers = class_names(images) or {}
    found = [str(name) for name in sorted(numbers, key=numbers.get)]
    known = classes or train_classes(config)
    if config.class_map or not found or not known or found == known:
        return images
    if len(found) == len(known) and not set(found) & set(known):
        return images  # as many classes, all with other names: ImageNet-V2's folders are numbers
    check_classes_known(found, known, config.val_split, "the checkpoint" if classes else "train/")
    return open_({name: number for number, name in enumerate(known)})


def open_train_and_val(config: DataConfig, in_chans: int = 3, seed: int = 0) -> tuple[Dataset, Dataset, int]:
    """Open both splits, give their classes the same numbers, and count them.

    Args:
        config: Data to open.
        in_chans: Number of image channels.
        seed: Seed of the run.

    Returns:
        Training images, validation images, number of classes.

    Raises:
        InputError: data that cannot be trained on; the line names the folder or class.
    """

    def open_(split: str, num_samples: int | None, class_map: str | dict[str, int] | None, training: bool) -> Dataset:
        return open_images(
            config.data_dir,
            split,
            dataset=config.dataset,
            class_map=class_map,
            num_samples=num_samples,
            batch_size=config.batch_size,
            in_chans=in_chans,
            seed=seed,
            is_training=training,
        )

    if not config.dataset:
        find_split(config.data_dir, config.val_split)  # before the long listing of train/
    train = open_(config.train_split, config.train_num_samples, config.class_map, True)
    val = open_(config.val_split, config.val_num_samples, config.class_map, False)
    classes, val_classes = class_names(train), class_names(val)
    if classes and val_classes and classes != val_classes:
        check_classes_known(val_classes, classes, config.val_split, config.train_split)
        val = open_(config.val_split, config.val_num_samples, classes, False)
    counted = max(classes.values()) + 1 if classes else None
    if config.num_classes is None and counted is None:
        raise InputError(f"--dataset {config.dataset} does not say how many classes it has: give --num-classes")
    if counted and config.num_classes and config.num_classes < counted:
        raise InputError(f"--num-classes {config.num_classes}, but the data has {counted} classes")
    return train, val, config.num_classes or counted
