"""Sets of scenes on disk, in the layouts of ImageNet, COCO and ADE20K."""

import colorsys
import functools
import json
import os
import tempfile
from abc import ABC, abstractmethod
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from litvit.demo_data.scenes import BACKGROUNDS, CLASSES, SPLITS, Scene, draw_scene, grow, source_digits
from litvit.errors import InputError

MARKER = "demo_data.json"

# ADE20K's labels count from 1; 0 is unlabelled, and black.
SEGMENTATION_CLASSES = BACKGROUNDS + CLASSES
_HUES = np.arange(len(SEGMENTATION_CLASSES)) / len(SEGMENTATION_CLASSES)
PALETTE = tuple(tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.8, 1 - hue / 2)) for hue in _HUES)

MIN_DIGITS, MAX_DIGITS = 2, 5
DIGIT_SCALE = (0.2, 0.45)
ID_STEP = 0x9E3779  # odd, so that its multiples modulo 2^24 are different numbers and, in a PNG, different colours


@dataclass(frozen=True)
class Settings:
    """Settings of a set for classification, which fix every pixel. `drawing` is the version of how scenes are drawn."""

    train_per_class: int = 500
    val_per_class: int = 100
    image_size: int = 64
    seed: int = 0
    task: str = "classification"
    drawing: int = 2

    @property
    def counts(self) -> dict[str, int]:
        """Number of images of each split."""
        return {"train": self.train_per_class * len(CLASSES), "val": self.val_per_class * len(CLASSES)}


@dataclass(frozen=True)
class SceneSettings:
    """Settings of a set for detection or segmentation, which fix every pixel: scenes with several digits.

    Args:
        task: "detection" or "segmentation"; both show the same scenes.
        train: Number of images to train on.
        val: Number of images to validate on.
        image_size: Height of the images in pixels; they are a third wider.
        seed: Seed of everything random.
        drawing: Version of how scenes are drawn.
    """

    task: str
    train: int = 800
    val: int = 200
    image_size: int = 192
    seed: int = 0
    drawing: int = 2

    @property
    def counts(self) -> dict[str, int]:
        """Number of images of each split."""
        return {"train": self.train, "val": self.val}

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.image_size, self.image_size * 4 // 3

    def scene(self, split: str, number: int) -> Scene:
        """Draw an image of the set."""
        rng = np.random.default_rng([self.seed, SPLITS.index(split), number])
        sources = source_digits(self.seed)[split]
        labels = rng.integers(len(CLASSES), size=rng.integers(MIN_DIGITS, MAX_DIGITS + 1))
        digits = [(int(label), rng.choice(sources[label])) for label in labels]
        return draw_scene(rng, digits, self.image_shape, DIGIT_SCALE)


class Layout(ABC):
    """The files of a set: its images, and what describes them."""

    settings_type: type = SceneSettings

    def __init__(self, settings: Settings | SceneSettings):
        self.settings = settings

    @abstractmethod
    def files(self, split: str, number: int) -> list[str]:
        """Return the names of an image and of the files that belong to it alone."""

    def indices(self, split: str) -> list[str]:
        """Return the names of the files that describe all images of a split."""
        return []

    @abstractmethod
    def write(self, root: Path, split: str, number: int) -> object:
        """Write an image's files, and return what the split's indices say of it."""

    def write_indices(self, root: Path, split: str, records: list) -> None:  # noqa: B027 - most layouts have none
        """Write the split's indices from what `write` returned."""

    def all_files(self) -> set[str]:
        """Return the names of every file of the set."""
        names = {name for image in self.images() for name in self.files(*image)}
        return names | {name for split in SPLITS for name in self.indices(split)}

    def images(self) -> list[tuple[str, int]]:
        """Return the split and number of every image."""
        return [(split, number) for split in SPLITS for number in range(self.settings.counts[split])]


class ImageNetLayout(Layout):
    """One folder per class: `train/<class>/*.png`, `val/<class>/*.png`."""

    settings_type = Settings

    def files(self, split: str, number: int) -> list[str]:
        label, i = divmod(number, self.settings.counts[split] // len(CLASSES))
        return [f"{split}/{CLASSES[label]}/{i:05d}.png"]

    def write(self, root: Path, split: str, number: int) -> None:
        label, i = divmod(number, self.settings.counts[split] // len(CLASSES))
        digits = source_digits(self.settings.seed)[split][label]
        rng = np.random.default_rng([self.settings.seed, SPLITS.index(split), label, i])
        size = (self.settings.image_size, self.settings.image_size)
        scene = draw_scene(rng, [(label, digits[i % len(digits)])], size)
        (file,) = self.files(split, number)
        Image.fromarray(scene.image).save(root / file, compress_level=3)


class Ade20kLayout(Layout):
    """`images/{training,validation}/*.jpg` and palette PNGs in `annotations/{training,validation}`.

    Labels are those of `SEGMENTATION_CLASSES`, from 1. The soft edge around a digit is unlabelled, 0.
    """

    def files(self, split: str, number: int) -> list[str]:
        folder = {"train": "training", "val": "validation"}[split]
        name = f"ADE_{split}_{number + 1:08d}"
        return [f"images/{folder}/{name}.jpg", f"annotations/{folder}/{name}.png"]

    def write(self, root: Path, split: str, number: int) -> None:
        scene = self.settings.scene(split, number)
        labels = scene.background + 1
        labels[grow(np.any([thing.mask for thing in scene.objects], axis=0))] = 0
        for thing in scene.objects:
            labels[thing.mask] = len(BACKGROUNDS) + thing.label + 1
        annotation = Image.fromarray(labels)
        annotation.putpalette([0, 0, 0, *np.ravel(PALETTE).tolist()])
        image, segmentation = self.files(split, number)
        _save_jpeg(scene.image, root / image)
        annotation.save(root / segmentation)


class CocoLayout(Layout):
    """`{train,val}2017/*.jpg` with `annotations/{instances,panoptic}_{train,val}2017.json` and the panoptic PNGs.

    Digits are things, category ids 1 to 10; backgrounds are stuff, 11 to 14. Masks are uncompressed RLE, panoptic
    segments cover every pixel.
    """

    def files(self, split: str, number: int) -> list[str]:
        return [f"{split}2017/{number + 1:012d}.jpg", f"annotations/panoptic_{split}2017/{number + 1:012d}.png"]

    def indices(self, split: str) -> list[str]:
        return [f"annotations/{kind}_{split}2017.json" for kind in ("instances", "panoptic")]

    def write(self, root: Path, split: str, number: int) -> tuple[list[dict], list[dict]]:
        """Write an image and return its instances, without ids, and its panoptic segments."""
        scene = self.settings.scene(split, number)
        bare = ~np.any([thing.mask for thing in scene.objects], axis=0)
        masks = [(thing.label + 1, thing.mask) for thing in scene.objects]
        masks += [(len(CLASSES) + i + 1, bare & (scene.background == i)) for i in np.unique(scene.background[bare])]
        ids = np.zeros(bare.shape, dtype=np.int64)
        segments = []
        for i, (category, mask) in enumerate(masks, start=1):
            segment = i * ID_STEP % 256**3
            ids[mask] = segment
            segments.append(
                {"id": segment, "category_id": int(category), "bbox": _box(mask), "area": int(mask.sum()), "iscrowd": 0}
            )
        things = zip(segments, scene.objects, strict=False)
        instances = [{**segment, "segmentation": _run_lengths(thing.mask)} for segment, thing in things]
        image, panoptic = self.files(split, number)
        _save_jpeg(scene.image, root / image)
        red_green_blue = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=-1).astype(np.uint8)
        Image.fromarray(red_green_blue).save(root / panoptic)
        return instances, segments

    def write_indices(self, root: Path, split: str, records: list[tuple[list[dict], list[dict]]]) -> None:
        images, instances, panoptic = [], [], []
        for number, (things, segments) in enumerate(records):
            image, segmentation = (Path(file).name for file in self.files(split, number))
            height, width = self.settings.image_shape
            images.append({"id": number + 1, "file_name": image, "height": height, "width": width})
            panoptic.append({"image_id": number + 1, "file_name": segmentation, "segments_info": segments})
            for thing in things:
                instances.append({**thing, "id": len(instances) + 1, "image_id": number + 1})
        things = [{"id": i, "name": name, "supercategory": "digit", "isthing": 1} for i, name in enumerate(CLASSES, 1)]
        stuff = [
            {"id": i, "name": name, "supercategory": "background", "isthing": 0}
            for i, name in enumerate(BACKGROUNDS, len(CLASSES) + 1)
        ]
        about = {"info": {"description": "handwritten digits in drawn scenes"}, "licenses": [], "images": images}
        contents = (
            {**about, "categories": things, "annotations": instances},
            {**about, "categories": things + stuff, "annotations": panoptic},
        )
        for name, content in zip(self.indices(split), contents, strict=True):
            (root / name).write_text(json.dumps(content))


TASKS = {"classification": ImageNetLayout, "detection": CocoLayout, "segmentation": Ade20kLayout}


def _save_jpeg(image: np.ndarray, path: Path) -> None:
    Image.fromarray(image).save(path, quality=95)


def _box(mask: np.ndarray) -> list[int]:
    """Return a mask's (left, top, width, height)."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, top = int(columns[0]), int(rows[0])
    return [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]


def _run_lengths(mask: np.ndarray) -> dict:
    """Return a mask in COCO's uncompressed RLE: lengths of runs of 0 and 1 by turns, column by column."""
    pixels = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(pixels, prepend=False))
    return {"size": list(mask.shape), "counts": np.diff([0, *changes, pixels.size]).tolist()}


def build(root: str | os.PathLike, settings: Settings | SceneSettings, workers: int = 1) -> bool:
    """Draw a data set into a folder, unless the folder holds it already.

    Args:
        root: Folder of the set, new or empty. It is there when the set is complete, and not before.
        settings: Settings of the set. The images depend on nothing else.
        workers: Number of processes that draw.

    Returns:
        Whether anything was drawn.

    Raises:
        InputError: the folder holds something else, or cannot be written.
    """
    root = Path(root).resolve()
    layout = TASKS[settings.task](settings)
    try:
        if root.exists() and not root.is_dir():
            raise InputError(f"'{root}' is a file: name a folder")
        if root.is_dir() and any(root.iterdir()):
            if _holds(root, layout):
                return False
            raise InputError(
                f"'{root}' holds other files, demo data of other settings or of an older version, or a part of it: "
                "remove it, or name another folder"
            )
        empty = root.is_dir()  # it may be a mount point, which cannot be replaced
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{root.name}.", dir=root if empty else root.parent) as temporary:
            made = Path(temporary, root.name)
            _draw(made, layout, workers)
            (made / MARKER).write_text(json.dumps({"settings": asdict(settings)}, indent=2) + "\n")
            if empty:
                for entry in sorted(made.iterdir(), key=lambda entry: entry.name == MARKER):  # the marker last
                    entry.replace(root / entry.name)
            else:
                made.replace(root)
    except OSError as error:
        if _holds(root, layout):  # another process has drawn it meanwhile
            return False
        raise InputError(f"cannot write the demo data to '{root}': {error.strerror or error}") from error
    return True


def _holds(root: Path, layout: Layout) -> bool:
    """Return whether a folder holds a whole set."""
    try:
        settings = json.loads((root / MARKER).read_text())["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return settings == asdict(layout.settings) and all((root / file).is_file() for file in layout.all_files())


def _draw(root: Path, layout: Layout, workers: int) -> None:
    images = layout.images()
    for folder in {(root / file).parent for file in layout.all_files()}:
        folder.mkdir(parents=True, exist_ok=True)
    write = functools.partial(layout.write, root)
    if workers > 1:
        with ProcessPoolExecutor(min(workers, len(images))) as pool:
            records = list(pool.map(write, *zip(*images, strict=True), chunksize=8))
    else:
        records = [write(*image) for image in images]
    for split in SPLITS:
        of_split = [record for (image_split, _), record in zip(images, records, strict=True) if image_split == split]
        layout.write_indices(root, split, of_split)
