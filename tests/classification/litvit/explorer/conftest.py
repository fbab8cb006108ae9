"""A small LIT that looks far, pictures, and a browser."""

from collections.abc import Iterator
from pathlib import Path

import browser as browsers
import numpy as np
import pytest
import torch
from PIL import Image
from timm.models import create_model
from torch import nn

from litvit.explorer.data import Explorer
from litvit.runs.folder import save_weights
from litvit.training.classifier import load

EVIL = "<img src=x onerror=alert(1)>"
SMALL = {"dims": (8, 8, 16, 16), "depths": (1, 1, 2, 1), "num_heads": (0, 0, 2, 4)}
SIZE = (64, 96)


@pytest.fixture(scope="module")
def browser() -> Iterator[browsers.Browser]:
    """A browser for the tests of a file."""
    if browsers.CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with browsers.Browser() as browser:
        yield browser


@pytest.fixture(scope="package")
def folder(tmp_path_factory) -> Path:
    """A folder with "lit.safetensors" of a small LIT for images of 64 x 96 pixels, "other.safetensors", two pictures.

    One class and one picture are named like an element of HTML.
    """
    folder = tmp_path_factory.mktemp("explorer")
    for seed, name in enumerate(("lit", "other")):
        torch.manual_seed(seed)
        model = create_model("lit_ti", num_classes=3, img_size=SIZE, **SMALL)
        for key, parameter in model.named_parameters():
            if ".offset." in key or ".qkv." in key:
                nn.init.normal_(parameter, std=0.4)
        description = {
            "model": "lit_ti",
            "img_size": list(SIZE),
            "model_kwargs": SMALL,
            "num_classes": 3,
            "crop_pct": 1.0,
            "classes": [EVIL, "</script><b>", "cat"],
        }
        save_weights(folder / f"{name}.safetensors", model.state_dict(), description)
    rng = np.random.default_rng(0)
    for name in (EVIL, "plain"):
        Image.fromarray(rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="package")
def explorer(folder) -> Explorer:
    """The small LIT."""
    return Explorer(load(folder / "lit.safetensors", device="cpu"), "lit.safetensors")
