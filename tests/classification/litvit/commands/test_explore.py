"""litvit explore: the command line, and what it writes."""

import base64
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models import create_model
from torch import nn

from litvit.attention.maps import AttentionReader
from litvit.commands import explore
from litvit.dtm.offsets import predict_offsets, sampling_tree
from litvit.errors import InputError
from litvit.runs.folder import save_weights
from litvit.training.classifier import load

SMALL = {"dims": (8, 8, 16, 16), "depths": (1, 1, 2, 1), "num_heads": (0, 0, 2, 4)}


def save(path: Path, name: str, size: int, **kwargs) -> nn.Module:
    """Save weights of a small model that looks far."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=3, **kwargs)
    for key, parameter in model.named_parameters():
        if ".offset." in key or ".qkv." in key:
            nn.init.normal_(parameter, std=0.4)
    description = {"model": name, "img_size": size, "model_kwargs": kwargs, "num_classes": 3, "crop_pct": 1.0}
    save_weights(path, model.state_dict(), description)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with "lit.safetensors" and three pictures in images/."""
    folder = tmp_path_factory.mktemp("explore")
    save(folder / "lit.safetensors", "lit_ti", 64, **SMALL)
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / "images" / f"{i}.png")
    return folder


def run(folder: Path, output: Path, *argv: str, weights: str = "lit.safetensors") -> dict:
    """Run the command and return the data of its page."""
    flags = ["--checkpoint", str(folder / weights), "--device", "cpu", "--output", str(output)]
    run.status = explore.main([*argv, *flags])
    return data_of(output.read_text())


def data_of(page: str) -> dict:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    return json.loads(found)


def unpack(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))


def test_the_numbers_of_a_page_are_the_models(folder, tmp_path, capsys):
    data = run(folder, tmp_path / "page.html", str(folder / "images" / "0.png"))
    assert run.status == 0
    assert re.match(rf"1 image in {tmp_path}/page.html, 0\.\d MB: open it in a browser", capsys.readouterr().out)
    classifier = load(folder / "lit.safetensors", device="cpu")
    pixels = classifier.transform(Image.open(folder / "images" / "0.png")).unsqueeze(0)
    (seen,) = data["pictures"][0]["seen"]
    (model,) = data["models"]

    tree = sampling_tree(predict_offsets(classifier.model, pixels))
    values = np.frombuffer(unpack(seen["merging"]["data"]), "<i2") * seen["merging"]["step"]
    expected = torch.cat([level.flatten() for level in tree]).numpy()
    np.testing.assert_allclose(values, expected, atol=np.abs(expected).max() / 65000)

    rows = []
    reader = AttentionReader(classifier.model, (3, 64, 64))
    reader.read(pixels, lambda number, p: rows.append(reader.attentions[number].rows(p, 1)[0]))
    assert [(a["stage"], a["block"], a["heads"], a["grid"]) for a in model["attentions"]] == [
        (3, 0, 2, [4, 4]),
        (3, 1, 2, [4, 4]),
        (4, 0, 4, [2, 2]),
    ]
    assert [a["keysPerQuery"] for a in model["attentions"]] == [16, 16, 4 + 1]  # a class token in stage 4
    packed = unpack(seen["attention"])
    start = 4 * sum(row.shape[0] * row.shape[1] for row in rows)
    largest = np.split(np.frombuffer(packed[:start], "<f4"), np.cumsum([r.shape[0] * r.shape[1] for r in rows])[:-1])
    for row, most in zip(rows, largest, strict=True):
        shares = np.frombuffer(packed, np.uint8, row.numel(), start).reshape(row.shape)
        start += row.numel()
        np.testing.assert_allclose(most, row.amax(-1).flatten().numpy(), rtol=1e-6)
        np.testing.assert_allclose(
            shares / 255 * row.amax(-1, keepdim=True).numpy(), row.numpy(), atol=most.max() / 500
        )
    assert start == len(packed)


def test_images_are_spread_and_one_that_cannot_be_read_is_named(folder, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no image")
    data = run(folder, tmp_path / "page.html", str(folder / "images"), str(tmp_path / "broken.png"))
    assert run.status == 2
    assert [picture["name"] for picture in data["pictures"]] == [f"images/{i}.png" for i in range(3)]
    printed = capsys.readouterr()
    assert printed.out.startswith("3 images in ")
    assert printed.err.startswith(f"error: cannot read the image {tmp_path / 'broken.png'}")
    assert printed.err.count("\n") == 1
    data = run(folder, tmp_path / "page.html", str(folder / "images"), "-n", "2", "-k", "2")
    assert [picture["name"] for picture in data["pictures"]] == ["images/0.png", "images/1.png"]
    assert [len(picture["seen"][0]["classes"]) for picture in data["pictures"]] == [2, 2]
    before = (tmp_path / "page.html").read_bytes()
    with pytest.raises(InputError, match="cannot read the image"):
        run(folder, tmp_path / "page.html", str(tmp_path / "broken.png"))
    assert (tmp_path / "page.html").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"page.html", "broken.png"}


def test_checkpoints_of_other_models_and_sizes(folder, tmp_path):
    small = {"dims": (8, 8, 16, 16), "depths": (1,) * 4, "num_heads": (1, 1, 2, 2)}
    save(tmp_path / "lvt.safetensors", "lvt", 96, **small, class_heads=2)
    other = ["--checkpoint", str(tmp_path / "lvt.safetensors")]
    data = run(folder, tmp_path / "page.html", str(folder / "images" / "0.png"), *other)
    assert [model["label"] for model in data["models"]] == [other[1], str(folder / "lit.safetensors")]
    assert [(model["model"], model["size"], model["merges"]) for model in data["models"]] == [
        ("lvt", [96, 96], False),
        ("lit_ti", [64, 64], True),
    ]
    places = [(a["stage"], a["block"], a["pass"]) for a in data["models"][0]["attentions"]]
    assert places == [(stage, 0, number) for stage in (2, 3, 4) for number in (1, 2)]
    assert ["merging" in seen for seen in data["pictures"][0]["seen"]] == [False, True]


def test_windows_and_means_of_litv2(folder, tmp_path):
    small = {"dims": (8, 8, 16, 16), "depths": (1,) * 4, "num_heads": (0, 0, 4, 4), "alpha": 0.5, "img_size": 64}
    save(tmp_path / "litv2.safetensors", "litv2_s", 64, **small)
    image = str(folder / "images" / "0.png")
    (model,) = run(tmp_path, tmp_path / "page.html", image, weights="litv2.safetensors")["models"]
    found = [(a["stage"], a["pass"], a["heads"], a["keyGrid"], a["keysPerQuery"]) for a in model["attentions"]]
    assert found == [(3, 1, 2, [4, 4], 4), (3, 2, 2, [2, 2], 4), (4, 1, 4, [2, 2], 4)]


def test_maps_of_too_many_tokens_are_left_out(folder, tmp_path):
    small = {"dims": (8, 8, 16, 16), "depths": (1,) * 4, "num_heads": (1, 1, 2, 2), "mlp_ratios": (1,) * 4}
    save(tmp_path / "pvt.safetensors", "pvt_small", 160, **small)
    argv = [str(folder / "images" / "0.png"), "--img-size", "160"]
    data = run(tmp_path, tmp_path / "page.html", *argv, weights="pvt.safetensors")
    (model,) = data["models"]
    assert model["leftOut"] == [{"stage": 1, "tokens": 1600}]
    assert [a["stage"] for a in model["attentions"]] == [2, 3, 4]
    packed = unpack(data["pictures"][0]["seen"][0]["attention"])
    sizes = [(a["heads"], np.prod(a["grid"]), np.prod(a["keyGrid"])) for a in model["attentions"]]
    assert len(packed) == sum(4 * heads * queries + heads * queries * keys for heads, queries, keys in sizes)


def test_a_page_cannot_be_broken_out_of(folder, tmp_path):
    name = "<!--<script>" + "<b>" * 3
    picture = tmp_path / f"{name}.png"
    picture.write_bytes((folder / "images" / "0.png").read_bytes())
    run(folder, tmp_path / "page.html", str(picture))
    page = (tmp_path / "page.html").read_text()
    assert name not in page
    assert data_of(page)["pictures"][0]["name"].endswith(f"{name}.png")


def test_wrong_input(folder, tmp_path):
    weights = ["--checkpoint", str(folder / "lit.safetensors"), "--device", "cpu"]
    image = str(folder / "images" / "0.png")
    for argv, message in (
        ([*weights], "which images\\? image files and folders, or --serve"),
        ([image], "which weights\\?"),
        (["nowhere.png", *weights], "no image at nowhere.png"),
        ([image, *weights, "-k", "0"], "--topk must be at least 1"),
        ([image, *weights, "-n", "0"], "--num-images must be at least 1"),
        ([image, *weights, "--output", str(tmp_path)], f"--output {tmp_path} is a folder: name a file in it"),
        ([image, *weights, "--output", f"{image}/x.html"], "cannot write to"),
        ([image, *weights, "--serve", "--output", "x.html"], "--serve writes no page"),
        ([image, *weights, "--serve", "70000"], "--serve 70000"),
        ([image, "--model", "resnet18", *weights], "holds the weights of lit_ti"),
        ([image, *weights, "--checkpoint", "nothing.pth"], "no checkpoint at nothing.pth"),
    ):
        with pytest.raises(InputError, match=message):
            explore.main(argv)
    torch.manual_seed(0)
    state = create_model("resnet18", num_classes=3).state_dict()
    save_weights(tmp_path / "resnet.safetensors", state, {"model": "resnet18", "num_classes": 3})
    with pytest.raises(InputError, match=r"resnet.safetensors: nothing to explore .*take a LIT, LVT, PVT, Swin or ViT"):
        explore.main([image, "--checkpoint", str(tmp_path / "resnet.safetensors"), "--device", "cpu"])
    model = create_model("lit_ti", num_classes=3, img_size=64, **SMALL)
    broken = {name: value * torch.nan if name == "head.weight" else value for name, value in model.state_dict().items()}
    description = {"model": "lit_ti", "img_size": 64, "model_kwargs": SMALL, "num_classes": 3}
    save_weights(tmp_path / "nan.safetensors", broken, description)
    with pytest.raises(InputError, match="the scores of .*0.png are not finite"):
        explore.main([image, "--checkpoint", str(tmp_path / "nan.safetensors"), "--device", "cpu"])


def test_serve_prints_its_address_and_ends_with_ctrl_c(folder, tmp_path):
    argv = ["explore", "--serve", str(folder / "images" / "0.png"), "--device", "cpu"]
    command = [sys.executable, "-m", "litvit", *argv, "--checkpoint", str(folder / "lit.safetensors")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes) as process:
        try:
            line = process.stdout.readline()
            address = re.fullmatch(r"(http://127\.0\.0\.1:\d+/)  \(Ctrl-C ends it\)\n", line)[1]
            with urllib.request.urlopen(address, timeout=60) as answer:
                data = data_of(answer.read().decode())
            assert len(data["pictures"]) == 1
            assert data["maxBytes"] > 0
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
            assert process.stderr.read() == ""
        finally:
            process.kill()
    assert list(tmp_path.iterdir()) == []
