"""Where images lie and how their classes are numbered; timm's readers read them."""

import argparse
import pickle
from collections.abc import Iterable
from pathlib import Path

from timm.data import create_dataset
from timm.utils.misc import natural_key
from torch.utils.data import Dataset, IterableDataset

from litvit.errors import InputError
from litvit.training.samples import Images

READERS = ("hfds", "hfids", "wds", "tfds")
SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "validation", "test", "eval")}


def find_split(root: str, split: str, *, or_itself: bool = False) -> Path:
    """Where a split of a data folder lies: `root/<split>` or `root/<split>.tar`, or one of its usual other names.

    Args:
        root: the data folder.
        split: "train", "val" or the name of a subfolder.
        or_itself: `root` may be the split itself: a .tar, or a folder of classes without train/ or val/ in it.

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
        raise InputError(f"the data folder {root} is empty; it should hold train/ and val/, a folder a class in each")
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
    settings: argparse.Namespace,
    *,
    is_training: bool = False,
    or_itself: bool = False,
    classes: dict[str, int] | None = None,
    num_samples: int | None = None,
) -> Dataset:
    """Open one split with the timm reader that `settings.dataset` names.

    Args:
        root: the data folder; for Hugging Face and WebDataset what timm takes as root.
        split: name of the split.
        settings: `dataset`, `class_map`, `batch_size`, `in_chans`, `seed`.
        is_training: whether a stream is to be shuffled.
        or_itself: `root` may be the split itself, see `find_split`.
        classes: class name to number, where another split has set it.
        num_samples: length of a stream.

    Returns:
        `Images`, or timm's IterableImageDataset for a stream.

    Raises:
        InputError: no images, or a reader that this environment cannot use.
    """
    kwargs = {}
    if settings.dataset:
        if settings.dataset.partition("/")[0].lower() not in READERS:
            raise InputError(
                f"--dataset {settings.dataset}: timm's readers are {', '.join(f'{r}/NAME' for r in READERS)}"
            )
        place = root
    else:
        place = str(find_split(root, split, or_itself=or_itself))
        if place.endswith(".tar"):
            kwargs["cache_tarinfo"] = False  # timm would keep the index as a pickle beside a large tar, and trust it
    try:
        dataset = create_dataset(
            settings.dataset,
            root=place,
            split=split,
            search_split=False,
            class_map=classes or settings.class_map or "",
            is_training=is_training,
            batch_size=settings.batch_size,
            num_samples=num_samples,
            seed=settings.seed,
            input_img_mode={1: "L", 3: "RGB", 4: "RGBA"}.get(settings.in_chans, "RGB"),
            **kwargs,
        )
    except ImportError as error:
        raise InputError(f"--dataset {settings.dataset} needs a package: pip install {error.name}") from None
    except (OSError, RuntimeError, ValueError, AssertionError, KeyError, pickle.UnpicklingError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"cannot read the {split} images of {place}: {message}") from None
    return dataset if isinstance(dataset, IterableDataset) else Images(dataset, settings.seed)


def class_names(dataset: Dataset) -> dict[str, int] | None:
    """Class name to number as the reader counted them, or None where a reader does not say."""
    reader = getattr(dataset, "dataset", dataset).reader
    names = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    return dict(names) if names else None


def class_list(dataset: Dataset) -> list[str] | None:
    """Class names in the order of their numbers, or None where a reader does not say, or leaves numbers out."""
    names = {number: str(name) for name, number in (class_names(dataset) or {}).items()}
    return [names[number] for number in range(len(names))] if names.keys() == set(range(len(names))) else None


def train_classes(settings: argparse.Namespace) -> list[str] | None:
    """Names of the class folders of a data folder's train/; None where there are none, or `class_map` says it."""
    try:
        folder = find_split(settings.data_dir, "train")
    except InputError:
        return None
    if settings.dataset or settings.class_map or not folder.is_dir():
        return None
    paths = (path for path in folder.glob("[!.]*") if path.is_dir())
    return sorted((path.name for path in paths if next(path.iterdir(), None)), key=natural_key) or None


def refuse_unknown_classes(found: Iterable[str], known: Iterable[str], where: str, source: str) -> None:
    """Raise InputError if there are classes that the model does not know."""
    unknown = sorted({str(name) or "(no folder)" for name in set(found) - set(known)})
    if unknown:
        shown = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        raise InputError(f"{where} has {len(unknown)} classes that {source} lacks: {shown}")


def refuse_other_numbers(found: list[str] | None, known: list[str] | None, where: str, source: str) -> None:
    """Raise InputError if classes, in the order of their numbers, differ; None for not known."""
    if not found or not known or found == known:
        return
    place = next((i for i, pair in enumerate(zip(found, known, strict=False)) if pair[0] != pair[1]), None)
    differ = (
        f"{len(found)} and {len(known)}" if place is None else f"number {place} is {found[place]}, not {known[place]}"
    )
    raise InputError(f"the classes of {where} are not {source}: {differ}")


def open_for_evaluation(settings: argparse.Namespace, classes: list[str] | None) -> Dataset:
    """Open the images to evaluate on, with the model's class numbers.

    Args:
        settings: flags of validate.py.
        classes: the model's classes in the order of their numbers; None for those of train/ beside.

    Raises:
        InputError: no images, or classes that the model does not know.
    """

    def open_(numbers: dict[str, int] | None = None) -> Dataset:
        split, length = settings.val_split, settings.val_num_samples
        return open_images(settings.data_dir, split, settings, or_itself=True, classes=numbers, num_samples=length)

    images = open_()
    found = [str(name) for name in class_names(images) or ()]
    known = classes or train_classes(settings)
    if settings.class_map or not found or not known or found == known:
        return images
    if len(found) == len(known) and not set(found) & set(known):
        return images  # as many, all with other names: ImageNet-V2's folders are numbers
    refuse_unknown_classes(found, known, settings.val_split, "the checkpoint" if classes else "train/")
    return open_({name: number for number, name in enumerate(known)})


def open_train_and_val(settings: argparse.Namespace) -> tuple[Dataset, Dataset, int]:
    """Open both splits, give their classes the same numbers, and count them.

    Args:
        settings: flags of train.py.

    Returns:
        Training images, validation images, number of classes.

    Raises:
        InputError: data that cannot be trained on; the line names the folder or class.
    """
    root = settings.data_dir
    if not settings.dataset:
        find_split(root, settings.val_split)  # before the long listing of train/
    train = open_images(root, settings.train_split, settings, is_training=True, num_samples=settings.train_num_samples)
    val = open_images(root, settings.val_split, settings, num_samples=settings.val_num_samples)
    classes, val_classes = class_names(train), class_names(val)
    if classes and val_classes and classes != val_classes:
        refuse_unknown_classes(val_classes, classes, settings.val_split, settings.train_split)
        val = open_images(root, settings.val_split, settings, classes=classes)
    counted = max(classes.values()) + 1 if classes else None
    if settings.num_classes is None and counted is None:
        raise InputError(f"--dataset {settings.dataset} does not say how many classes it has: give --num-classes")
    if counted and settings.num_classes and settings.num_classes < counted:
        raise InputError(f"--num-classes {settings.num_classes}, but the data has {counted} classes")
    return train, val, settings.num_classes or counted
