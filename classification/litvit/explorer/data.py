"""What the explorer's page holds: models, pictures, and what each model does with each picture.

The page is one file, `page.html` with its data in place of a marker, as JSON. Large arrays are little-endian numbers,
compressed (zlib) and in base64:

- The positions of `sampling_tree`, int16, one tensor after the other. Times `step` they are pixels.
- Attention: the largest probability of each query, float32, (heads, queries) of one attention after the other. Then the
  probabilities, uint8, (heads, queries, keys) of one attention after the other. 255 stands for the query's largest.
"""

import base64
import io
import json
import zlib
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from litvit.attention.maps import AttentionReader
from litvit.data.dataset import transform_image
from litvit.dtm.offsets import PATCH_SIZE, merging_modules, predict_offsets, sampling_tree
from litvit.errors import InputError, printable
from litvit.training.classifier import Classifier, best_classes

MAX_TOKENS = 1024  # of a stage whose attention is shown: the probabilities grow with the square
MARKER = "{{data}}"


class Explorer:
    """What one model does with pictures.

    Args:
        classifier: Model with its transform and classes.
        label: Name of the weights for the reader.
        topk: Number of classes per picture.

    Raises:
        InputError: The model has neither token merging nor attention that can be read.
    """

    def __init__(self, classifier: Classifier, label: str, topk: int = 5):
        self.classifier, self.label, self.topk = classifier, label, topk
        model = classifier.model
        self.input_size = tuple(classifier.data_config["input_size"])
        problems = []
        self.merges, self._reader = False, None
        try:
            self.merges = bool(merging_modules(model))
        except InputError as error:
            problems.append(str(error))
        try:
            self._reader = AttentionReader(model, self.input_size)
        except InputError as error:
            problems.append(str(error))
        if len(problems) == 2:
            raise InputError(f"{label}: nothing to explore ({'; '.join(problems)}): take a LIT, LVT, PVT, Swin or ViT")
        found = self._reader.attentions if self._reader else []
        self.shown = [np.prod(attention.layout.grid) <= MAX_TOKENS for attention in found]
        self.attentions = [attention for attention, is_shown in zip(found, self.shown, strict=True) if is_shown]
        self.left_out = {
            attention.stage: int(np.prod(attention.layout.grid))
            for attention, is_shown in zip(found, self.shown, strict=True)
            if not is_shown
        }

    def describe(self) -> dict[str, Any]:
        """Return what the page says of the model, whatever the picture."""
        config = self.classifier.config
        return {
            "label": printable(self.label),
            "model": printable(config.model),
            "size": self.input_size[1:],
            "merges": self.merges,
            "attentions": [
                {
                    "stage": found.stage,
                    "block": found.block,
                    "pass": found.pass_number,
                    "heads": found.heads,
                    "grid": found.layout.grid,
                    "keyGrid": found.layout.key_grid,
                    "stride": found.layout.stride,
                    "keyStride": found.layout.stride * found.layout.reduction,
                    "keysPerQuery": found.layout.tokens(of_keys=True).shape[1] + found.layout.prefixes[1],
                }
                for found in self.attentions
            ],
            "leftOut": [{"stage": stage, "tokens": tokens} for stage, tokens in self.left_out.items()],
            "maxTokens": MAX_TOKENS,
        }

    def explore(self, image: Image.Image, name: str) -> dict[str, Any]:
        """Return what the page shows of a picture.

        Args:
            image: Opened file, which need not be decoded yet.
            name: Name of the picture for messages.

        Raises:
            InputError: The picture cannot be read, or the model's numbers are not finite.
        """
        classifier = self.classifier
        pixels = transform_image(image, classifier.transform, classifier.config.decoder, lambda: name)
        images = pixels.unsqueeze(0).to(classifier.device)
        rows: list[Tensor] = []

        def keep(number: int, p: Tensor) -> None:
            if self.shown[number]:
                rows.append(self._reader.attentions[number].rows(p, 1)[0].cpu())

        with torch.no_grad():
            logits = self._reader.read(images, keep) if self._reader else classifier.model(images)
        if not logits.isfinite().all():
            raise InputError(f"{self.label}: the scores of {name} are not finite: the weights are broken, load others")
        shares, numbers = (values[0].tolist() for values in best_classes(logits, self.topk))
        seen = {
            "image": _picture(pixels, classifier.data_config),
            "classes": [[classifier.classes[i], round(share, 5)] for i, share in zip(numbers, shares, strict=True)],
        }
        if self.merges:
            tree = sampling_tree(predict_offsets(classifier.model, images))
            seen["merging"] = _pack_tree([level[0].cpu() for level in tree])
        if rows:
            seen["attention"] = _pack_attention(rows)
        return seen


def explore(explorers: Sequence[Explorer], open_image: Callable[[], Image.Image], name: str) -> dict[str, Any]:
    """Return a picture of the page: its name, and what each model does with it.

    Args:
        explorers: Models.
        open_image: Function that opens the file, called once per model.
        name: Name of the picture.

    Raises:
        InputError: The picture cannot be read, or the model's numbers are not finite.
    """
    return {"name": printable(name), "seen": [explorer.explore(open_image(), name) for explorer in explorers]}


def make_page(explorers: Sequence[Explorer], pictures: Sequence[dict[str, Any]], max_bytes: int = 0) -> bytes:
    """Return the page.

    Args:
        explorers: Models.
        pictures: What `explore` returned for each picture.
        max_bytes: Largest file that the page may send to where it comes from, 0 for a page that sends none.
    """
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    models = [explorer.describe() for explorer in explorers]
    data = json.dumps({"models": models, "pictures": pictures, "maxBytes": max_bytes}, separators=(",", ":"))
    # Inside a script element only "<" can end it or begin a comment.
    return template.replace(MARKER, data.replace("<", "\\u003c")).encode()


def _picture(pixels: Tensor, data_config: dict[str, Any]) -> str:
    """Return normalised pixels (C, H, W) as a link that holds a PNG file."""
    mean, std = (torch.tensor(data_config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    values = ((pixels * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(values.squeeze(-1) if values.shape[-1] == 1 else values).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _pack_tree(tree: Sequence[Tensor]) -> dict[str, Any]:
    """Pack the levels of `sampling_tree` of one image, (h, w, n, 2)."""
    largest = max(level.abs().max().item() for level in tree)
    step = largest / np.iinfo(np.int16).max or 1.0
    packed = b"".join((level.double() / step).round().numpy().astype("<i2").tobytes() for level in tree)
    places = {"grid": tree[0].shape[:2], "stride": PATCH_SIZE * 2 ** len(tree), "patch": PATCH_SIZE}
    return {**places, "levels": len(tree), "step": step, "data": _compress(packed)}


def _pack_attention(rows: Sequence[Tensor]) -> str:
    """Pack probabilities, (heads, queries, keys) per attention."""
    largest = [p.float().amax(-1) for p in rows]
    tiny = torch.finfo(torch.float32).tiny
    shares = [
        (255 * p.float() / most.clamp(min=tiny).unsqueeze(-1)).round().byte()
        for p, most in zip(rows, largest, strict=True)
    ]
    return _compress(
        b"".join([*(most.numpy().astype("<f4").tobytes() for most in largest), *(p.numpy().tobytes() for p in shares)])
    )


def _compress(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content)).decode()
