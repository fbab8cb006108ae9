import csv
from pathlib import Path

import numpy as np
import pytest
import torch
import visualize_attention
from PIL import Image
from safetensors.torch import load_file
from timm.models import create_model

from litvit.attention.maps import AttentionAverages
from litvit.dtm.offsets import GREEN
from litvit.errors import InputError
from litvit.runs.folder import save_weights

SMALL = {"dims": (8, 8, 16, 16), "depths": (1, 1, 2, 1), "num_heads": (0, 0, 2, 4)}
FILES = {
    *(f"stage-3/block{block}/pixel-10-block-{block}-head-{head}.png" for block in range(2) for head in range(2)),
    *(f"stage-4/block0/pixel-3-block-0-head-{head}.png" for head in range(4)),
    *(
        "stage-3/block0/pixel-10-block-0.npy",
        "stage-3/block1/pixel-10-block-1.npy",
        "stage-4/block0/pixel-3-block-0.npy",
    ),
    *("stage-3.png", "stage-4.png", "attention.csv", "attention.png"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the weights of a small LIT, "lit.safetensors", and a data set of 10 images in val/, "data"."""
    folder = tmp_path_factory.mktemp("attention")
    torch.manual_seed(0)
    model = create_model("lit_ti", num_classes=3, img_size=64, **SMALL)
    description = {"model": "lit_ti", "img_size": 64, "model_kwargs": SMALL, "num_classes": 3, "crop_pct": 1.0}
    save_weights(folder / "lit.safetensors", model.state_dict(), description)
    rng = np.random.default_rng(0)
    for split, number in (("train", 2), ("val", 5)):
        for name in ("cat", "dog"):
            (folder / "data" / split / name).mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "data" / split / name / f"{i}.png")
    return folder


def run(folder: Path, output: Path, *argv: str) -> tuple[int, Path]:
    flags = ["--checkpoint", str(folder / "lit.safetensors"), "--device", "cpu", "-j", "0", "--output", str(output)]
    return visualize_attention.main([*argv, *flags]), output / "attention_map"


def files(maps: Path) -> set[str]:
    return {str(path.relative_to(maps)) for path in maps.rglob("*") if path.is_file()}


def test_files_and_averages(folder, tmp_path, capsys):
    status, maps = run(folder, tmp_path, "--data", str(folder / "data"))
    assert status == 0
    assert files(maps) == FILES
    printed = capsys.readouterr().out
    assert f"8 maps of 10 images, attention.csv and attention.png in {maps}" in printed

    model = create_model("lit_ti", num_classes=3, img_size=64, **SMALL).eval()
    model.load_state_dict(load_file(folder / "lit.safetensors"))
    averages = AttentionAverages(model, (3, 64, 64))
    paths = sorted((folder / "data" / "val").rglob("*.png"))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    pixels = (torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1) / 255 for path in paths)
    averages.add(torch.stack([(image - mean) / std for image in pixels]))
    for found, name in zip(averages.maps, ("stage-3/block0", "stage-3/block1", "stage-4/block0"), strict=True):
        [saved] = (maps / name).glob("*.npy")
        np.testing.assert_allclose(np.load(saved), found.probabilities.numpy(), rtol=1e-4)
    rows = list(csv.DictReader((maps / "attention.csv").open()))
    assert [(row["stage"], row["block"], row["pass"], row["head"]) for row in rows[-4:]] == [
        ("4", "0", "1", str(head)) for head in range(4)
    ]
    expected = torch.cat([found.distance for found in averages.maps])
    assert [float(row["distance_px"]) for row in rows] == pytest.approx(expected.tolist(), abs=1e-2)
    assert f"{averages.maps[0].distance.mean():.2f}" in printed


def test_the_query_is_in_a_green_square_and_the_largest_value_is_bright(folder, tmp_path):
    _, maps = run(folder, tmp_path, "--data", str(folder / "data"), "--query", "6", "0")
    path = maps / "stage-3" / "block0" / "pixel-6-block-0-head-1.png"
    pixels = np.asarray(Image.open(path)).astype(int)
    zoom = len(pixels) // 64
    ys, xs = np.nonzero(np.abs(pixels - GREEN).max(-1) == 0)
    token = 16 * zoom  # 4 x 4 tokens: 6 is in row 1, column 2
    assert (ys.min(), ys.max(), xs.min(), xs.max()) == (token - 3, 2 * token + 2, 2 * token - 3, 3 * token + 2)
    values = np.load(maps / "stage-3" / "block0" / "pixel-6-block-0.npy")[1]
    brightness = pixels[token // 2 :: token, token // 2 :: token].sum(-1)
    assert np.argmax(brightness) == np.argmax(values)


def test_images_are_spread_and_older_maps_go(folder, tmp_path, capsys):
    _, maps = run(folder, tmp_path, "--data", str(folder / "data"), "--query", "0", "0")
    (maps / "stage-3" / "notes.txt").write_text("mine")
    val = folder / "data" / "val"
    run(folder, tmp_path, str(val / "cat"), str(val / "dog" / "*.png"), "-n", "2")
    assert files(maps) == {*FILES, "stage-3/notes.txt"}
    averages = np.load(maps / "stage-3" / "block0" / "pixel-10-block-0.npy")
    run(folder, tmp_path, str(val / "cat" / "0.png"), str(val / "dog" / "0.png"))
    np.testing.assert_allclose(np.load(maps / "stage-3" / "block0" / "pixel-10-block-0.npy"), averages)
    assert capsys.readouterr().out.count("8 maps of 2 images") == 2


def test_a_batch_size_changes_nothing(folder, tmp_path):
    results = []
    for size in ("1", "4"):
        _, maps = run(folder, tmp_path / size, "--data", str(folder / "data"), "-b", size)
        results.append(np.load(maps / "stage-4" / "block0" / "pixel-3-block-0.npy"))
    np.testing.assert_allclose(*results, rtol=1e-5)


def test_images_that_cannot_be_read_are_named_and_left_out(folder, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no image")
    good = str(folder / "data" / "val" / "cat" / "0.png")
    status, maps = run(folder, tmp_path, good, str(tmp_path / "broken.png"), "-b", "2")
    assert status == 2
    printed = capsys.readouterr()
    assert "8 maps of 1 images" in printed.out
    assert f"error: cannot read the image {tmp_path / 'broken.png'}" in printed.err
    with_broken = np.load(maps / "stage-3" / "block0" / "pixel-10-block-0.npy")
    assert run(folder, tmp_path, good)[0] == 0
    np.testing.assert_allclose(np.load(maps / "stage-3" / "block0" / "pixel-10-block-0.npy"), with_broken)


def test_two_passes_have_folders_of_their_own(folder, tmp_path):
    small = {"dims": (8, 8, 16, 16), "depths": (1,) * 4, "num_heads": (1, 1, 2, 2), "class_heads": 2}
    description = {"model": "lvt", "img_size": 64, "model_kwargs": small, "num_classes": 3}
    model = create_model("lvt", num_classes=3, **small)
    save_weights(tmp_path / "lvt.safetensors", model.state_dict(), description)
    argv = ["--data", str(folder / "data"), "--resume", str(tmp_path / "lvt.safetensors"), "--device", "cpu", "-n", "1"]
    visualize_attention.main([*argv, "--output", str(tmp_path)])
    names = {path.parent.name for path in (tmp_path / "attention_map").rglob("pixel-*.npy")}
    assert names == {"block0", "block0-pass2"}


def test_hilo_has_a_folder_for_each_kind_of_heads_and_a_row_of_the_sheet_per_block(folder, tmp_path):
    small = {"dims": (8, 8, 16, 16), "depths": (1, 1, 2, 1), "num_heads": (0, 0, 4, 2)}
    description = {"model": "litv2_s", "img_size": 64, "model_kwargs": small, "num_classes": 3}
    model = create_model("litv2_s", num_classes=3, **small)
    save_weights(tmp_path / "weights.safetensors", model.state_dict(), description)
    argv = ["--data", str(folder / "data"), "--resume", str(tmp_path / "weights.safetensors"), "--device", "cpu"]
    visualize_attention.main([*argv, "-n", "1", "--output", str(tmp_path)])
    maps = tmp_path / "attention_map"
    shapes = {path.parent.name: np.load(path).shape for path in (maps / "stage-3").rglob("pixel-*.npy")}
    high, low = (1, 4, 4), (3, 2, 2)
    assert shapes == {"block0": high, "block0-pass2": low, "block1": high, "block1-pass2": low}
    (wide, _), (narrow, _) = (Image.open(maps / f"stage-{stage}.png").size for stage in (3, 4))
    assert wide == pytest.approx(2 * narrow, rel=0.1)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "which images\\? --data DIR"),
        (["--data", "nowhere"], "no image at nowhere"),
        (["--data", "DATA", "--query", "1"], "one token for each stage with attention, 3, 4: got 1"),
        (["--data", "DATA", "--query", "1", "4"], "--query 4: stage 4 has 2 x 2 tokens, 0 to 3"),
        (["--data", "DATA", "-n", "0"], "--num-images must be at least 1"),
        (["--data", "DATA", "-b", "0"], "--batch-size must be at least 1"),
        (["--data", "DATA", "--model-kwargs", f"dims={SMALL['dims']}", "num_heads=(0,0,0,0)"], "does not fit|has no"),
    ],
)
def test_wrong_input_is_one_line(folder, tmp_path, argv, message):
    argv = [str(folder / "data") if part == "DATA" else part.replace(" ", "") for part in argv]
    with pytest.raises(InputError, match=message) as error:
        run(folder, tmp_path, *argv)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_named_before_the_work(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(AttentionAverages, "add", lambda *_: pytest.fail("the work has begun"))
    with pytest.raises(InputError, match=f"cannot write to '{tmp_path / 'file' / 'attention_map'}': Not a directory"):
        run(folder, tmp_path / "file", "--data", str(folder / "data"))


def test_a_model_without_attention(folder, tmp_path):
    torch.save(create_model("resnet10t", num_classes=3).state_dict(), tmp_path / "resnet.pth")
    argv = ["--data", str(folder / "data"), "--model", "resnet10t", "--checkpoint", str(tmp_path / "resnet.pth")]
    with pytest.raises(InputError, match="ResNet has no attention between tokens of a map"):
        visualize_attention.main([*argv, "--device", "cpu", "--output", str(tmp_path / "maps")])
    assert not (tmp_path / "maps").exists()
