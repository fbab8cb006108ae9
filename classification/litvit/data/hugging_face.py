"""Data sets of Hugging Face, in memory and streamed: their columns, their classes, their rows."""

import inspect
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from timm.data.readers.reader import Reader

from litvit.data.dataset import Fault
from litvit.data.listing import natural_order, shorten
from litvit.data.streams import Encoded, Share, Source
from litvit.errors import InputError, printable

SHUFFLE_BUFFER = 4096  # images that a stream is mixed in


def find_columns(features: Mapping[str, Any], input_key: str | None, target_key: str | None) -> tuple[str, str]:
    """Choose the columns of images and classes.

    Args:
        features: Type of every column.
        input_key: Name of the column of images, None to find it.
        target_key: Name of the column of classes, None to find it.

    Returns:
        Names of the columns.

    Raises:
        InputError: no such column, or several that could be meant.
    """
    import datasets

    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    image = _choose("--input-key", input_key, features, images, ("image",), "images")
    labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    values = [name for name, kind in features.items() if _is_class(kind) and name != image]
    return image, _choose("--target-key", target_key, features, labels or values, ("label",), "classes")


def _is_class(kind: Any) -> bool:
    return getattr(kind, "dtype", "") == "string" or getattr(kind, "dtype", "").startswith(("int", "uint"))


def _choose(
    flag: str, wanted: str | None, features: Mapping, candidates: Sequence[str], usual: Sequence[str], what: str
) -> str:
    if wanted is None:
        wanted = next((name for name in usual if name in candidates), candidates[0] if len(candidates) == 1 else None)
    if wanted is None:
        found = f"any of {', '.join(candidates)}" if candidates else "none of its columns"
        raise InputError(f"the column of the {what} may be {found} ({', '.join(features)}): name it by {flag}")
    if wanted not in features:
        raise InputError(f"{flag} {wanted}: the data has no such column, but {', '.join(features)}")
    return wanted


def _cache(name: str, root: str) -> str | None:
    """Return the folder for the copies of `datasets`, None for its own: in a data set they would be read as data."""
    if not root or not os.path.isdir(name):
        return root or None
    data, cache = os.path.realpath(name), os.path.realpath(root)
    return None if os.path.commonpath((data, cache)) in (data, cache) else root


def _open_bytes(image: Any) -> BinaryIO:
    """Open an image that `datasets` has not decoded: its bytes, a path, or an address on the Hub or in an archive.

    Raises:
        OSError: no such file, or a row without an image.
    """
    from datasets.utils.file_utils import xopen

    if not image or not (image.get("bytes") or image.get("path")):
        raise OSError("the row holds no image")
    return io.BytesIO(image["bytes"]) if image.get("bytes") else xopen(image["path"], "rb")


def _names(kind: Any) -> list[str] | None:
    return list(kind.names) if getattr(kind, "names", None) else None


class HuggingFaceRows(Reader):
    """A split in memory: a reader of timm's interface.

    Classes have the names of the column's type, are numbered in natural order if they are strings, or are numbers.

    Args:
        name: Name on the Hub, or a folder.
        split: Name of the split.
        root: Folder of the cache; "" for the usual one.
        input_key: Column of the images, None to find it.
        target_key: Column of the classes, None to find it.

    Raises:
        ImportError: datasets is not installed.
        InputError: columns that are missing or ambiguous, or rows without a class.
    """

    def __init__(
        self, name: str, split: str, root: str, *, input_key: str | None = None, target_key: str | None = None
    ):
        import datasets

        super().__init__()
        self.split = split
        rows = datasets.load_dataset(name, split=split, cache_dir=_cache(name, root))
        self.image_key, self.target_key = find_columns(rows.features, input_key, target_key)
        self.rows = rows.cast_column(self.image_key, datasets.Image(decode=False))
        labels = rows.select_columns([self.target_key])[self.target_key][:]
        names = _names(rows.features[self.target_key])
        if any(isinstance(label, str) for label in labels):
            names = natural_order({str(label) for label in labels if label is not None})
            numbers = {label: number for number, label in enumerate(names)}
            labels = [numbers.get(label) for label in labels]
        bad = next((i for i, label in enumerate(labels) if type(label) is not int or label < 0), None)
        if bad is not None:
            raise InputError(f"row {bad} of {split} has the class {labels[bad]} in {self.target_key}: it is no label")
        if not labels:
            raise InputError(f"{split} of {name} holds no rows")
        names = names or [str(number) for number in range(max(labels) + 1)]
        self.targets, self.class_to_idx = labels, {label: number for number, label in enumerate(names)}
        used = set(labels)
        absent = [name for number, name in enumerate(names) if number not in used]
        self.notes = [f"no rows of {len(absent)} of the {len(names)} classes: {shorten(absent)}"] if absent else []

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        return _open_bytes(self.rows[index][self.image_key]), self.targets[index]

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = (self.rows[index][self.image_key] or {}).get("path")
        return f"row {index} of {self.split}" + (f" ({path})" if path else "")


class HuggingFaceStream(Source):
    """A split that is streamed. Arguments as of `WebDatasetShards`, with `name` and `split` of `HuggingFaceRows`."""

    def __init__(
        self,
        name: str,
        split: str,
        root: str,
        *,
        numbers: Mapping[str, int] | None = None,
        num_samples: int | None = None,
        input_key: str | None = None,
        target_key: str | None = None,
    ):
        import datasets

        self.split = split
        rows = datasets.load_dataset(name, split=split, cache_dir=_cache(name, root), streaming=True)
        features = rows.features or {key: _Unknown(value) for key, value in next(iter(rows)).items()}
        self.image_key, self.target_key = find_columns(features, input_key, target_key)
        self.rows = rows.cast_column(self.image_key, datasets.Image(decode=False))
        names = _names(features[self.target_key])
        self.class_to_idx = numbers or {label: number for number, label in enumerate(names or [])}
        self._source_names = names
        splits = rows.info.splits or {}
        self.num_samples = num_samples or (splits[split].num_examples if split in splits else None)

    def num_shards(self, rank: int, world_size: int) -> int:
        """Return the number of files that a rank reads."""
        return self._part(rank, world_size, self.rows).num_shards

    @staticmethod
    def _part(rank: int, world_size: int, rows: Any) -> Any:
        from datasets.distributed import split_dataset_by_node

        return split_dataset_by_node(rows, rank=rank, world_size=world_size) if world_size > 1 else rows

    def read(self, share: Share, seed: int | None) -> Iterator[Encoded | Fault]:
        """Read a share. `datasets` gives every loader process files of its own."""
        rows = self.rows
        if seed is not None:
            options = {"seed": seed, "buffer_size": SHUFFLE_BUFFER}
            if "max_buffer_input_shards" in inspect.signature(rows.shuffle).parameters:
                options["max_buffer_input_shards"] = 1  # else files are merged, and some processes have none
            rows = rows.shuffle(**options)
        part = f" (part {share.number + 1} of {share.count})" if share.count > 1 else ""
        for number, row in enumerate(self._part(share.rank, share.world_size, rows)):
            # Its place is lost when a stream is shuffled. check_data tells it.
            name = f"row {number} of {self.split}{part}" if seed is None else f"a row of {self.split}"
            path = (row[self.image_key] or {}).get("path")
            name += f" ({printable(path)})" if path else ""
            value = label = row[self.target_key]
            if self._source_names and isinstance(label, int) and label >= 0:
                label = self.class_to_idx.get(self._source_names[label])
            elif isinstance(label, str):
                label = self.class_to_idx.get(label)
            if type(label) is not int or label < 0:
                hint = ", which the class map lacks" if self.class_to_idx else "; --class-map FILE numbers names"
                reason = f"{name} has the class {value!r} in {self.target_key}"
                yield Fault(name, f"{reason}{hint}" if isinstance(value, str) else f"{reason}: it is no label")
                continue
            try:
                yield Encoded(name, _open_bytes(row[self.image_key]), label)
            except OSError as error:
                yield Fault(name, f"cannot read the image {name} ({error}): repair or replace it")


class _Unknown:
    """Type of a column whose type `datasets` does not know before it reads."""

    def __init__(self, value: Any):
        self.dtype = "string" if isinstance(value, str) else "int64" if isinstance(value, int) else ""
