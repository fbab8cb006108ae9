"""Speed of the input pipeline: images per second that one core reads and augments, and the time of each step."""

import argparse
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import functional as TF

from litvit.data.augment import TrainTransform
from litvit.data.dataset import EvaluationImages, Images
from litvit.data.loader import eval_loader, train_loader
from litvit.data.random_streams import Stream, random_stream
from litvit.data.readers import open_train_and_val
from litvit.data.sampler import SampleKey
from litvit.errors import InputError, require
from litvit.processes import Processes
from litvit.training.model import build_model, data_settings
from litvit.training.recipe import parse_config


def write_photos(folder: Path, number: int, size: tuple[int, int], seed: int = 0) -> None:
    """Write JPEG files with the detail and the noise of photographs; 500 x 375 pixels take about 100 kB, as ImageNet's.

    They are random parts of scikit-learn's two sample photographs.

    Args:
        folder: Folder for the files.
        number: Number of files.
        size: Width and height in pixels.
        seed: Seed that chooses the parts.
    """
    require("demo", "sklearn")
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    rng = np.random.default_rng(seed)
    for i in range(number):
        photo = photos[i % len(photos)]
        scale = min(photo.width / size[0], photo.height / size[1], 1.0)
        part = round(size[0] * scale), round(size[1] * scale)
        left, top = (int(rng.integers(whole - side + 1)) for whole, side in zip(photo.size, part, strict=True))
        image = photo.crop((left, top, left + part[0], top + part[1])).resize(size, Image.Resampling.BICUBIC)
        noisy = np.asarray(image) + rng.normal(0, 6, (size[1], size[0], 1))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{i:05d}.jpg", quality=94)


def benchmark_data(args: argparse.Namespace) -> list[dict]:
    """Measure a recipe's input pipeline on one core: JPEG files to batches of uint8, which the device normalises.

    Args:
        args: Flags model (the one with the recipe), image_size, images, repeats.

    Returns:
        One row per pipeline (training, evaluation) and step: milliseconds of processor time per image, medians of
        `repeats` rounds. "all" is the loader as it is used, "rest" is its time without the other steps.

    Raises:
        InputError: An odd number of images, or a model without recipe.
    """
    if args.images % 2:
        raise InputError(f"--images must be even, as mixup pairs the images of a batch, not {args.images}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        for split in ("train", "val"):
            folder = Path(root, split, "photos")
            folder.mkdir(parents=True)
            write_photos(folder, args.images, args.image_size)
        flags = ["--model", args.model, "--no-token-label", "-j", "0", "-b", str(args.images)]
        config = parse_config([root, *flags])
        train, val, num_classes = open_train_and_val(config.data)
        with torch.device("meta"):
            data_config = data_settings(config.model, build_model(config.model, num_classes))
        cpu, sizes = torch.device("cpu"), {"batch_size": args.images, "workers": 0}
        loaders = {
            "training": train_loader(train, config.augment, data_config, Processes(cpu), **sizes),
            "evaluation": eval_loader(val, data_config, Processes(cpu), **sizes),
        }
        return [
            {"pipeline": name, "step": step, "milliseconds": 1000 * seconds}
            for name, loader in loaders.items()
            for step, seconds in _seconds_per_image(loader.loader, args.repeats).items()
        ]


def _seconds_per_image(loader: DataLoader, repeats: int) -> dict[str, float]:
    rounds, images = [], loader.dataset
    if isinstance(images, EvaluationImages):
        images = images.images
    for _ in range(repeats + 1):
        seconds = Counter()
        for key in next(iter(loader.batch_sampler)):
            _read(images, key, seconds)
        steps = seconds.total()
        _timed(seconds, "all", list, loader)
        seconds["rest"] = seconds["all"] - steps
        rounds.append(seconds)
    names = [*(name for name in rounds[0] if name not in ("all", "rest")), "rest", "all"]
    return {name: statistics.median(round_[name] for round_ in rounds[1:]) / len(loader.dataset) for name in names}


def _timed(seconds: Counter, name: str, step: Callable, *args: object) -> Any:
    start = time.thread_time()  # time of this thread only, without other work on the machine
    result = step(*args)
    seconds[name] += time.thread_time() - start
    return result


def _read(images: Images, key: int | SampleKey, seconds: Counter) -> None:
    """Read and transform an image as `Images` does, with the same random numbers."""
    if isinstance(key, SampleKey):
        with random_stream(Stream.SAMPLE, images.seed, key.epoch, key.position):
            _read(images, key.index, seconds)
        return
    transform = images.transform
    image, _ = _timed(seconds, "open", images.open, key)
    if not isinstance(transform, TrainTransform):
        _timed(seconds, "decode", image.load)
        for step in transform.transforms:
            image = _timed(seconds, type(step).__name__, step, image)
        return
    crop = transform.crop.draft(image, transform.crop.draw(image.size))  # decoded to a size that fits the crop
    _timed(seconds, "decode", image.load)
    image = _timed(seconds, "crop, resize", transform.resize, image, crop)
    image, _ = _timed(seconds, "flip", transform.flip, image)
    for colour in transform.colours:
        image = _timed(seconds, type(colour).__name__, colour, image)
    pixels = _timed(seconds, "to tensor", TF.pil_to_tensor, image)
    _timed(seconds, "erase", transform.erase, pixels.shape)
