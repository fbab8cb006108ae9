"""Images that are read in a row, not by their number: WebDataset shards, and what else is too large to list."""

import io
import itertools
import json
import logging
import operator
import os
import random
import re
import tarfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

from PIL import Image
from timm.data.readers.reader_factory import create_reader
from timm.data.readers.shared_count import SharedCount
from torch.utils.data import IterableDataset, get_worker_info

from litvit.data.augment import TrainTransform
from litvit.data.dataset import Fault, Sample, blank_sample, transform_image, unreadable
from litvit.data.listing import image_suffixes, shorten, tar_members
from litvit.data.pixels import Decoder
from litvit.data.random_streams import Stream, random_stream
from litvit.data.workers import reading
from litvit.errors import InputError, printable


class Share(NamedTuple):
    """The part of a stream that one loader process reads."""

    rank: int = 0
    world_size: int = 1
    worker: int = 0
    workers: int = 1

    @property
    def number(self) -> int:
        """Number of the loader process among those of all ranks."""
        return self.rank * self.workers + self.worker

    @property
    def count(self) -> int:
        """Number of loader processes of all ranks."""
        return self.world_size * self.workers


class Encoded(NamedTuple):
    """An image that is not decoded yet."""

    name: str  # for messages
    file: BinaryIO
    target: int

    def open(self) -> Image.Image:
        """Open the image without decoding it. Raises InputError for one that cannot be read."""
        with unreadable(lambda: self.name):
            return Image.open(self.file)


class Source(ABC):
    """What a stream is read from. Its constructor takes (name, split, root) and the keywords of `WebDatasetShards`.

    Attributes:
        num_samples: Number of images of an epoch, None if it is not known.
        class_to_idx: Class name to number, empty if classes have no names.
    """

    num_samples: int | None = None
    class_to_idx: Mapping[str, int] = {}

    def num_shards(self, rank: int, world_size: int) -> int | None:
        """Return the number of parts of a rank's share, None for any number. A loader process reads whole parts."""
        return None

    @abstractmethod
    def read(self, share: Share, seed: int | None) -> Iterator[Encoded | Fault]:
        """Read a share of the stream once.

        Args:
            share: Share to read.
            seed: Seed of the order, the same for all shares; None for the order as it is.
        """


class ImageStream(IterableDataset):
    """Images of a stream, as `Sample`s.

    In training a loader process reads its share again and again, up to the batches that are its own, so that every
    process has as many as announced. An image that cannot be read is named, and the next takes its place. In evaluation
    it is read once.

    Args:
        source: What is read.
        seed: Seed of the run.
        decoder: How files become images.
        is_training: Whether it is shuffled and repeated.

    Attributes:
        notes: Sentences for the user.
        num_classes: Number of classes, None if it is not known. A sample of another class is a fault.
        epoch: Epoch to read, shared with the loader processes.
    """

    def __init__(self, source: Source, seed: int = 0, decoder: Decoder | None = None, is_training: bool = False):
        super().__init__()
        self.source, self.seed, self.decoder, self.is_training = source, seed, decoder or Decoder(), is_training
        self.notes: list[str] = []
        self.num_classes: int | None = None
        self.transform: Callable[[Image.Image], Any] | TrainTransform | None = None
        self.epoch = SharedCount()
        self.rank, self.world_size, self.batch_size, self.batches = 0, 1, 1, 0

    def __len__(self) -> int:
        return self.source.num_samples or 0

    def deal(self, rank: int, world_size: int, workers: int, batch_size: int, batches: int) -> int:
        """Deal the stream out to processes.

        Args:
            rank: Rank of this process.
            world_size: Number of processes.
            workers: Number of loader processes per process.
            batch_size: Number of images per batch.
            batches: Number of batches per process and epoch, in training.

        Returns:
            Number of loader processes that have something to read.

        Raises:
            InputError: a process would have nothing to train on.
        """
        self.rank, self.world_size, self.batch_size, self.batches = rank, world_size, batch_size, batches
        shards = self.source.num_shards(rank, world_size)
        if shards == 0 and self.is_training:
            raise InputError(f"the training images are in fewer shards than there are processes ({world_size})")
        if shards is not None and workers > max(shards, 1):
            self.notes.append(f"{max(shards, 1)} loader processes per process, not {workers}: there are no more shards")
            workers = max(shards, 1)
        return workers

    def share(self) -> Share:
        """Return the share of the stream that this process reads, a loader process or not."""
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        return Share(self.rank, self.world_size, number, workers)

    def read(self, seed: int | None = None) -> Iterator[Encoded | Fault]:
        """Read this process's share once, without decoding, in the order of `seed`."""
        for item in self.source.read(self.share(), seed):
            if isinstance(item, Encoded) and self.num_classes and item.target >= self.num_classes:
                reason = f"{item.name} has the class {item.target}, but there are {self.num_classes} (--num-classes)"
                yield Fault(item.name, reason)
            else:
                yield item

    def check(self) -> None:
        """Read until a sample is whole, so that wrong settings are found at the start.

        Raises:
            InputError: none of the first ten samples is whole, or there is none.
        """
        first = list(itertools.islice(self.read(), 10))
        if not first:
            raise InputError("there are no images in the stream")
        if all(isinstance(item, Fault) for item in first):
            raise InputError(first[0].reason)

    def __iter__(self) -> Iterator[Sample]:
        yield from self._read_training(self.share()) if self.is_training else self._read_once()

    def _read_training(self, share: Share) -> Iterator[Sample]:
        batches = len(range(share.worker, self.batches, share.workers))  # the loader takes turns
        wanted, done, faults = batches * self.batch_size, 0, []
        order = random.Random(f"{self.seed} {self.epoch.value}").getrandbits(31)
        while done < wanted:
            before = done
            for item in self.read(order):
                if isinstance(item, Fault):
                    faults.append(item)
                    continue
                try:
                    with random_stream(Stream.SAMPLE, self.seed, self.epoch.value, share.number, done):
                        image = self._decode(item)
                except InputError as error:
                    faults.append(Fault(item.name, str(error)))
                    continue
                yield Sample(image.pixels, item.target, image.erased, None, faults)
                done, faults = done + 1, []
                if done == wanted:
                    return
            if done == before:
                why = faults[0].reason if faults else "there is none"
                raise InputError(f"none of the training images that are this process's can be read: {why}")

    def _read_once(self) -> Iterator[Sample]:
        for item in self.read():
            if isinstance(item, Fault):
                yield blank_sample(self.transform, self.decoder, item)
                continue
            try:
                yield Sample(self._decode(item), item.target, None, None, [])
            except InputError as error:
                yield blank_sample(self.transform, self.decoder, Fault(item.name, str(error)))

    def _decode(self, item: Encoded) -> Any:
        return transform_image(item.open(), self.transform, self.decoder, lambda: item.name)


class WebDatasetShards(Source):
    """Shards of WebDataset: .tar files of an image and its class (.cls, or a field of .json) per sample.

    Args:
        name: Not used: the split names the shards.
        split: Shards, such as "train-{0000..1023}.tar", with "|N" for the number of images; or a split of _info.json.
        root: Folder or address of the shards.
        numbers: Class name to number, for classes that are stored by name.
        num_samples: Number of images, if `split` and _info.json do not say.
        input_key: Suffixes of images, separated by ";", of which the first one that a sample has is taken. None for all
            that Pillow reads, of which a sample has one.
        target_key: Field of .json that holds the class, None for .cls.

    Raises:
        ImportError: webdataset is not installed.
        InputError: shards are missing.
    """

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
        import webdataset  # noqa: F401 - optional

        logging.getLogger("timm.data.readers.reader_wds").setLevel(logging.ERROR)  # it warns where _info.json is absent
        try:
            reader = create_reader(f"wds/{name}", root, split, num_samples=num_samples, target_key=target_key)
        except RuntimeError as error:
            shards = "as in 'train-{0000..1023}.tar'"
            raise InputError(f"the split {split} is neither shards, {shards}, nor one of {root}/_info.json") from error
        self.num_samples = reader.num_samples or None
        self.class_to_idx = numbers or {}
        self.shards = [os.path.join(root, file) for file in reader.split_info.filenames]
        self.names_input = input_key is not None
        self.input_keys = [key.lstrip(".") for key in (input_key.split(";") if input_key else sorted(image_suffixes()))]
        self.target_key = target_key or reader.split_info.alt_label
        missing = [shard for shard in self.shards if not re.match(r"\w+:", shard) and not os.path.exists(shard)]
        if missing:
            hint = " (write {0000..0123} for numbers, not *)" if "*" in split else ""
            raise InputError(f"{len(missing)} of {len(self.shards)} shards are missing: {shorten(missing)}{hint}")

    def num_shards(self, rank: int, world_size: int) -> int:
        """Return the number of shards that every rank has at least."""
        return len(self.shards) // world_size

    def read(self, share: Share, seed: int | None) -> Iterator[Encoded | Fault]:
        """Read the shards of a share, in training in random order and through a buffer that mixes their samples."""
        import webdataset
        from timm.data.readers.reader_wds import SAMPLE_INITIAL_SIZE, SAMPLE_SHUFFLE_SIZE

        shards = list(self.shards)
        if seed is not None:
            random.Random(seed).shuffle(shards)
        samples = itertools.chain.from_iterable(map(self._samples, shards[share.number :: share.count]))
        if seed is not None:
            rng = random.Random(f"{seed} {share.number}")
            samples = webdataset.shuffle(SAMPLE_SHUFFLE_SIZE, SAMPLE_INITIAL_SIZE, rng)(samples)
        return samples

    def _samples(self, shard: str) -> Iterator[Encoded | Fault]:
        from webdataset.tariterators import group_by_keys, tar_file_expander, url_opener

        errors: list[Exception] = []

        def note(error: Exception) -> bool:
            errors.append(error)
            return True

        if re.match(r"\w+:", shard):
            files = tar_file_expander(url_opener(iter([{"url": shard}]), note), note, select_files=_is_not_hidden)
        else:
            files = _files(shard, note)
        reading(printable(shard))
        for sample in group_by_keys(files, handler=note):
            item = self._encoded(f"{printable(sample['__key__'])} of {printable(shard)}", sample)
            if item is not None:
                reading("")
                yield item
                reading(printable(shard))
        for error in errors:
            reason = f"{type(error).__name__}: {' '.join(str(part) for part in error.args[:1])}"
            says = f"cannot read the shard {printable(shard)} ({reason}): repair or replace it"
            yield Fault(printable(shard), says, fatal=True)

    def _encoded(self, name: str, sample: dict[str, Any]) -> Encoded | Fault | None:
        """Return an image and its class, what is wrong with them, or None for a file that is neither."""
        held = [key for key in sample if not key.startswith("__")]
        shown = ", ".join(f".{printable(key)}" for key in held)
        # The key of "0001.rgb.png" is "0001", and its suffix "rgb.png".
        images = [key for wanted in self.input_keys for key in held if wanted in (key, key.rpartition(".")[2])]
        if not images and not {"cls", "json"} & set(held):
            return None
        if not images or (len(images) > 1 and not self.names_input):
            what = f"{len(images)} images" if images else "no image"
            named = " of the --input-key" if self.names_input else ", and --input-key names the suffix of one"
            return Fault(name, f"the sample {name} has {what}{named}; it has {shown}")
        wanted = f"the field {self.target_key} of .json" if self.target_key else ".cls"
        try:
            fields = json.loads(sample["json"]) if self.target_key else {}
            value = fields[self.target_key] if self.target_key else sample["cls"].decode().strip()
        except (KeyError, ValueError, TypeError, UnicodeError):
            hint = "" if self.target_key or "json" not in held else "; --target-key names a field of its .json"
            return Fault(name, f"the sample {name} has no class in {wanted}; it has {shown}{hint}")
        try:
            if isinstance(value, str):
                target = self.class_to_idx[value] if value in self.class_to_idx else int(value)
            elif isinstance(value, bool):
                raise TypeError(f"{value} is no number")
            else:
                target = operator.index(value)  # raises for 0.93, which int() makes class 0
        except (ValueError, TypeError):
            target = -1
        if target < 0:
            hint = "the class map lacks it" if self.class_to_idx else "--class-map numbers names"
            return Fault(name, f"the sample {name} has the class {value!r} in {wanted}, and no class number: {hint}")
        return Encoded(name, io.BytesIO(sample[images[0]]), target)


def _files(shard: str, note: Callable[[Exception], bool]) -> Iterator[dict[str, Any]]:
    """Yield the files of a shard on the disk, as `webdataset.tariterators` does, but tell of damage that it misses."""
    try:
        with tarfile.open(shard) as tar:
            for member in tar_members(tar):
                if member.isreg() and _is_not_hidden(member.name):
                    content = tar.extractfile(member).read()
                    yield {"fname": member.name, "data": content, "__url__": shard}
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        note(error)


def _is_not_hidden(path: str) -> bool:
    return not any(part.startswith(".") and part != "." for part in path.split("/"))
