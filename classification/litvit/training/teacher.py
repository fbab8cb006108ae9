"""A teacher's class scores at every position of its last map, and the label files that keep the best few of them.

Shape letters: B images, (h, w) size of the last map, C channels, K classes, P tokens before the patch tokens.
"""

import argparse
import hashlib
import io
import json
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from litvit.data.dataset import Images
from litvit.data.readers import check_class_numbers, class_list, class_names
from litvit.data.token_labels import TEACHER
from litvit.data.workers import NoBatch
from litvit.errors import InputError, is_from_user_code
from litvit.processes import StopSignals
from litvit.training.model import PrecisionConfig

WRITERS = 4  # threads that write label files


def token_scores(model: nn.Module, images: Tensor) -> Tensor:
    """Compute class scores at every position of a classifier's last map.

    A model that was trained with token labels has an `aux_head` for them (LVT, VOLO). In any other, the head that
    classifies an image gets each position of the map as if it were the whole map. With mean pooling and a linear head,
    the mean of these scores over the positions is the score of the image.

    Args:
        model: Classifier of timm's interface in eval mode, with `forward_features` and `forward_head`.
        images: Normalised images (B, in_chans, H, W).

    Returns:
        Logits, (B, h, w, K) float32.

    Raises:
        InputError: the model's features are not a map, or its head does not take single positions of it.
    """
    features = model.forward_features(images)
    if not isinstance(features, Tensor) or features.dim() not in (3, 4):
        raise InputError(f"{type(model).__name__} has no single map of features: choose another teacher")
    aux_head = getattr(model, "aux_head", None)
    if features.dim() == 4:
        channels_first = getattr(model, "output_fmt", "NCHW") == "NCHW"
        features = features.permute(0, 2, 3, 1) if channels_first else features
        positions = features.reshape(-1, 1, 1, features.shape[-1])
        positions = positions.permute(0, 3, 1, 2) if channels_first else positions
    else:
        prefix = num_prefix_tokens(model)
        features = features[:, prefix:].unflatten(1, _grid(features.shape[1] - prefix, images.shape[-2:], model))
        # Any pooling, of the class token or of patch tokens, returns the position's own token.
        positions = features.reshape(-1, 1, features.shape[-1]).expand(-1, prefix + 1, -1)
    scores = aux_head(features) if aux_head is not None else model.forward_head(positions)
    return scores.float().reshape(*features.shape[:3], -1)


def num_prefix_tokens(model: nn.Module) -> int:
    """Return the number of class, distillation and register tokens before a model's patch tokens."""
    has_class_token = is_class_token_classifier(model) or getattr(model, "cls_token", None) is not None
    has_distillation_token = getattr(model, "head_dist", None) is not None
    return getattr(model, "num_prefix_tokens", int(has_class_token) + int(has_distillation_token))


def is_class_token_classifier(model: nn.Module) -> bool:
    """Whether a model classifies an image by a class token."""
    return getattr(model, "global_pool", None) == "token"


def _grid(tokens: int, size: tuple[int, int], model: nn.Module) -> tuple[int, int]:
    h = round(math.sqrt(tokens * size[0] / size[1]))
    if not h or tokens % h:
        raise InputError(f"{type(model).__name__}: its {tokens} last tokens are no map: choose another teacher")
    return h, tokens // h


def top_scores(scores: Tensor, k: int = 5) -> Tensor:
    """Keep the k best classes of every position, as token labelling's files do.

    A reader of such a file takes the softmax of its scores and of 0 for each class that is not in it. The scores are
    shifted so that this gives the k classes their probabilities under all K: by the logarithm of the mean of exp(score)
    over the classes left out, or by the mean score if none is left out.

    Args:
        scores: Logits (B, h, w, K).
        k: Largest number of classes to keep.

    Returns:
        (B, 2, min(k, K), h, w): [:, 0] the shifted scores, best first, and [:, 1] the classes' numbers; float16, or
        float32 where numbers above 2048, float16's last whole one, are possible.
    """
    K = scores.shape[-1]
    best, classes = scores.topk(min(k, K), dim=-1)
    if k < K:
        left_out = scores.scatter(-1, classes, -math.inf)
        best = best - (left_out.logsumexp(-1, keepdim=True) - math.log(K - k))
    else:
        best = best - best.mean(-1, keepdim=True)
    labels = torch.stack([best, classes.to(best.dtype)], dim=1).permute(0, 1, 4, 2, 3)
    return labels.to(torch.float16 if K <= 2049 else torch.float32)


def whole_image_transform(data_config: dict) -> Callable[[Image.Image], Tensor]:
    """Return a transform that squashes a whole image to the teacher's size: PIL image -> uint8 (C, H, W)."""
    return create_transform(**data_config | {"crop_pct": 1.0, "crop_mode": "squash"}, use_prefetcher=True)


def make_label_fn(
    model: nn.Module, data_config: dict, precision: PrecisionConfig, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """Return a function from images, uint8 (B, C, H, W), to labels of `top_scores`, (B, 2, min(5, K), h, w)."""
    autocast, backend = precision.autocast(device), precision.torchcompile
    scores = torch.compile(token_scores, backend=backend) if backend else token_scores
    mean, std = (255 * torch.tensor(data_config[name], device=device).view(1, -1, 1, 1) for name in ("mean", "std"))

    def label(pixels: Tensor) -> Tensor:
        with torch.inference_mode(), autocast():
            return top_scores(scores(model, pixels.to(device, non_blocking=True).float().sub_(mean).div_(std)))

    return label


def make_labels(
    loader: DataLoader, label: Callable[[Tensor], Tensor], paths: Sequence[Path], signals: StopSignals, bar: tqdm
) -> tuple[int, list[str]]:
    """Label batches until a signal comes. Threads write the files, so that the device need not wait for the disk.

    Args:
        loader: Loader of what `collate` returns.
        label: Function from `make_label_fn`.
        paths: Label file of every image.
        signals: Signals that end it.
        bar: Progress bar.

    Returns:
        Number of files that were made; for every image that cannot be decoded, the reason.
    """
    made, writing, unreadable = 0, deque(), []
    with ThreadPoolExecutor(WRITERS) as pool, suppress(NoBatch):
        for numbers, pixels, reasons in loader:
            unreadable += reasons
            bar.update(len(numbers) + len(reasons))
            if numbers:
                writing.append(pool.submit(write_labels, label(pixels), [paths[number] for number in numbers]))
            if len(writing) > WRITERS:
                made += writing.popleft().result()
            if signals.received:
                break
        made += sum(job.result() for job in writing)
    return made, unreadable


def count_classes(images: Images, settings: argparse.Namespace) -> int:
    """Return the number of classes of the teacher, which are numbered as train.py numbers those of the data.

    Args:
        images: Images to label.
        settings: Flags of litvit make-token-labels.

    Raises:
        InputError: the teacher knows other classes.
    """
    known = settings.description.get("classes")
    check_class_numbers(class_list(images), known, settings.data_dir, f"those of {settings.checkpoint}")
    counted = max(class_names(images).values()) + 1
    num_classes = settings.num_classes or counted
    if counted > num_classes or (counted < num_classes and not known and not settings.class_map):
        raise InputError(
            f"{settings.data_dir} has {counted} classes, the teacher {num_classes}: --class-map says which is which"
        )
    return num_classes


def hash_weights(model: nn.Module) -> str:
    """Return a hash of a model's weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def label_blank_image(model: nn.Module, label: Callable[[Tensor], Tensor], input_size: tuple[int, int, int]) -> Tensor:
    """Label a grey image, so that a teacher that cannot is found before anything is written. Returns its labels."""
    try:
        return label(torch.full((1, *input_size), 127, dtype=torch.uint8))[0].cpu()
    except (InputError, torch.cuda.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, AssertionError) as error:
        if is_from_user_code(error):
            raise
        reason = " ".join(str(error).split())
        raise InputError(
            f"the head of {type(model).__name__} takes no single tokens, choose another teacher ({reason})"
        ) from error


def write_manifest(folder: Path, teacher: dict) -> None:
    """Write the description of the teacher into the folder of its labels, unless it is there already.

    Raises:
        InputError: labels of another teacher, or a folder that holds other things or cannot be written to.
    """
    teacher = json.loads(json.dumps(teacher))
    path = folder / TEACHER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # in this order: another process of this command may be writing there already
        foreign = next((entry.name for entry in folder.iterdir() if not entry.name.startswith(".")), None)
        if path.exists():
            before = json.loads(path.read_text())
            differs = next((n for n in teacher if n != "checkpoint" and before.get(n) != teacher[n]), None)
            if differs:
                raise InputError(
                    f"{folder} holds labels of another teacher ({before.get('model')}; its {differs} is not the same): "
                    "choose another OUTPUT"
                )
        elif foreign:
            raise InputError(f"{folder} holds {foreign}, and no labels of this command: choose another OUTPUT")
        else:
            write_whole(path, (json.dumps(teacher, indent=2) + "\n").encode())
    except (json.JSONDecodeError, AttributeError) as error:
        raise InputError(f"{path} is damaged: choose another OUTPUT") from error
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from error


def files_to_make(folder: Path, files: Sequence[str], numbers: Sequence[int], size: int) -> list[int]:
    """Return the numbers whose label file is missing or has not `size` bytes, and create the folders of the files."""

    def is_whole(path: str) -> bool:
        try:
            return os.stat(path).st_size == size
        except FileNotFoundError:
            return False

    try:
        for parent in sorted({os.path.dirname(files[number]) for number in numbers}):
            (folder / parent).mkdir(parents=True, exist_ok=True)
        return [number for number in numbers if not is_whole(os.path.join(folder, files[number]))]
    except OSError as error:
        raise InputError(f"cannot write to {error.filename}: {error.strerror}") from error


class IndexedImages(Dataset):
    """Some images of a data set, each with its number there, or with the reason why it cannot be decoded."""

    def __init__(self, images: Images, numbers: Sequence[int]):
        self.images, self.numbers = images, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, position: int) -> tuple[int, Tensor | str]:
        number = self.numbers[position]
        try:
            return number, self.images[number][0]
        except InputError as error:
            return number, str(error)


def collate(samples: list[tuple[int, Tensor | str]]) -> tuple[list[int], Tensor | None, list[str]]:
    """Join images to a batch: their numbers, uint8 (B, C, H, W), and the reasons why others cannot be decoded."""
    decoded = {number: image for number, image in samples if isinstance(image, Tensor)}
    pixels = torch.stack(list(decoded.values())) if decoded else None
    return list(decoded), pixels, [reason for _, reason in samples if isinstance(reason, str)]


def write_labels(labels: Tensor, paths: Sequence[Path]) -> int:
    """Write labels (B, 2, K, H, W), one file per image, and return their number.

    Raises:
        InputError: the disk is full or gone, or scores are not finite.
    """
    labels = labels.cpu()
    if not labels.isfinite().all():
        raise InputError(
            f"the teacher's scores, of {paths[0]} or the next, are not finite: its weights are broken, or "
            "float16 is too narrow for it (--amp-dtype bfloat16)"
        )
    for path, label in zip(paths, labels, strict=True):
        try:
            write_whole(path, encode(label))
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from error
    return len(paths)


def encode(label: Tensor) -> bytes:
    """Return the content of a label file."""
    buffer = io.BytesIO()
    torch.save(label.clone(), buffer)  # without the rest of the batch
    return buffer.getvalue()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under another name, and rename it. It is not flushed: a truncated file is made again."""
    temporary = path.with_name(
        f".{os.getpid()}.{threading.get_ident()}.tmp"
    )  # short: the name may be as long as can be
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
