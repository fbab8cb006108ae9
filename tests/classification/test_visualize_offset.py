from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import visualize_offset
from PIL import Image
from timm.models import create_model
from torch import nn

from litvit.downloads import kept_file
from litvit.dtm.offsets import GREEN, RED
from litvit.errors import InputError
from litvit.runs.folder import save_weights

SMALL = {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "num_heads": (0, 0, 2, 2)}
SMALL_FLAGS = ["--model-kwargs", *(f"{key}={value}".replace(" ", "") for key, value in SMALL.items())]


def green_and_red(path: Path) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.asarray(Image.open(path)).astype(int)
    return tuple((np.abs(pixels - colour).max(-1) < 30) for colour in (GREEN, RED))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a small LIT-S checkpoint, "lit.pth", whose every location lies 8 pixels down, and a grey image."""
    folder = tmp_path_factory.mktemp("offsets")
    torch.manual_seed(0)
    model = create_model("lit_s", num_classes=7, img_size=64, **SMALL)
    nn.init.constant_(model.stages[2].downsample.offset.bias[::2], 1.0)
    torch.save({"model": model.state_dict(), "epoch": 3}, folder / "lit.pth")
    Image.new("RGB", (90, 60), (128, 128, 128)).save(folder / "grey.jpeg")
    return folder


def plot(folder: Path, output: Path, *flags: str) -> Path:
    image = str(folder / "grey.jpeg")
    argv = ["--model", "lit_s", "--resume", str(folder / "lit.pth"), "--vis_image", image, "--device", "cpu"]
    visualize_offset.main([*argv, "--output", str(output), *SMALL_FLAGS, *flags])
    return output / "grey"


def test_plots_show_rectangles_and_locations(folder, tmp_path, capsys):
    plots = plot(folder, tmp_path, "--img-size", "64", "96")
    names = {path.name for path in plots.iterdir()}
    assert names == {f"row{r:02d}_column{c:02d}.png" for r in range(2) for c in range(3)} | {"overview.png"}
    assert f"6 plots and overview.png in {plots}" in capsys.readouterr().out

    zoom = Image.open(plots / "row00_column01.png").height // 64
    green, red = green_and_red(plots / "row00_column01.png")
    assert green.shape == (64 * zoom, 96 * zoom)
    ys, xs = np.nonzero(green)
    assert (ys.min(), ys.max() + 1, xs.min(), xs.max() + 1) == (0, 32 * zoom, 32 * zoom, 64 * zoom)
    # 8 x 8 dots on the centres of the patches, 8 pixels below their own.
    for y in range(8):
        for x in range(8):
            assert red[int((4 * y + 2 + 8) * zoom), int((32 + 4 * x + 2) * zoom)]
    ys, xs = np.nonzero(red)
    assert abs((ys.mean() + 0.5) / zoom - 24) < 0.5
    assert abs((xs.mean() + 0.5) / zoom - 48) < 0.5


def test_default_size_is_the_models_and_old_plots_go(folder, tmp_path):
    plots = plot(folder, tmp_path)
    assert len(list(plots.iterdir())) == 50
    (plots / "notes.txt").write_text("mine")
    plot(folder, tmp_path, "--img-size", "33")
    assert len(list(plots.glob("row*.png"))) == 4
    assert (plots / "notes.txt").exists()


def test_the_published_weights(folder, tmp_path, published, monkeypatch):
    """By name, the plots are those of the file."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = kept_file(timm.get_pretrained_cfg("lit_ti").url)
    file.parent.mkdir(parents=True)
    torch.save({"model": published("lit_ti")}, file)
    flags = ["--model", "lit_ti", "--vis_image", str(folder / "grey.jpeg"), "--device", "cpu", "--img-size", "32"]
    for weights in (["--pretrained"], ["--resume", str(file)]):
        visualize_offset.main([*flags, *weights, "--output", str(tmp_path / weights[0])])
    first, second = (tmp_path / source / "grey/row00_column00.png" for source in ("--pretrained", "--resume"))
    assert first.read_bytes() == second.read_bytes()


def test_a_checkpoint_knows_that_its_images_are_not_square(folder, tmp_path):
    model = create_model("lit_s", num_classes=7, img_size=(64, 96), **SMALL)
    description = {"model": "lit_s", "img_size": [64, 96], "model_kwargs": SMALL}
    save_weights(tmp_path / "wide.safetensors", model.state_dict(), description)
    plots = plot(folder, tmp_path, "--resume", str(tmp_path / "wide.safetensors"))
    assert sorted(path.name[:14] for path in plots.glob("row*"))[-1] == "row01_column02"


@pytest.mark.parametrize("colour", [RED, (255, 255, 255)])
def test_dots_are_seen_on_a_picture_of_their_own_colour(folder, tmp_path, colour):
    Image.new("RGB", (64, 64), colour).save(tmp_path / "one.png")
    plot(folder, tmp_path, "--img-size", "64", "--vis_image", str(tmp_path / "one.png"))
    image = Image.open(tmp_path / "one" / "row00_column01.png")
    zoom = image.height // 64
    # The way from one dot of the first row to the next: 8 pixels below the centre of its patch.
    way = [image.getpixel((x, round(10 * zoom))) for x in range(round(34 * zoom), round(38 * zoom))]
    assert min(sum(map(abs, np.subtract(pixel, RED))) for pixel in way) < 30
    assert max(sum(map(abs, np.subtract(pixel, RED))) for pixel in way) > 200


def test_whose_weights_these_are(folder, tmp_path):
    """Those of a run say it. Those of a published model are known by their layers."""
    model = create_model("lit_s", num_classes=7, img_size=64, **SMALL)
    description = {"model": "lit_s", "img_size": 64, "model_kwargs": SMALL}
    save_weights(tmp_path / "run.safetensors", model.state_dict(), description)
    torch.save(create_model("lit_s").state_dict(), tmp_path / "published.pth")
    grey = ["--vis_image", str(folder / "grey.jpeg"), "--model", "lit_ti", "--device", "cpu", "--resume"]
    with pytest.raises(InputError, match="holds the weights of lit_s, and --model is lit_ti: leave that out"):
        visualize_offset.main([*grey, str(tmp_path / "run.safetensors")])
    with pytest.raises(InputError, match="these are the weights of lit_s"):
        visualize_offset.main([*grey, str(tmp_path / "published.pth")])


@pytest.mark.parametrize(("grey", "rows_moved"), [(110, -4), (140, 4)])
def test_the_network_sees_a_normalised_image(folder, tmp_path, grey, rows_moved):
    # Offsets that are the sign of the first pixels' red, which is negative below ImageNet's mean of 124.
    model = create_model("lit_s", num_classes=0, img_size=32, **SMALL)
    with torch.no_grad():
        for parameter in (*model.patch_embed.proj.parameters(), *model.stages[0].blocks[0].mlp.fc2.parameters()):
            parameter.zero_()
        model.patch_embed.proj.weight[0, 0] = 1
        # Of 8 channels of which one is not 0, LayerNorm makes that one 7 ** 0.5.
        model.stages[1].downsample.offset.weight[::2, 0] = 7**-0.5 / 4
    torch.save(model.state_dict(), tmp_path / "sign.pth")
    Image.new("RGB", (32, 32), (grey,) * 3).save(tmp_path / "grey.png")
    flags = ["--resume", str(tmp_path / "sign.pth"), "--vis_image", str(tmp_path / "grey.png"), "--img-size", "32"]
    plots = plot(folder, tmp_path, *flags)
    _, red = green_and_red(plots / "row00_column00.png")
    zoom = len(red) // 32
    for y in range(1, 7):
        assert red[int((4 * y + 2 + rows_moved) * zoom), int(14 * zoom)]
    assert red[int(2 * zoom), int(14 * zoom)] == (rows_moved < 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vis_image", "nowhere.png"], "no image at 'nowhere.png'"),
        (["--vis_image", __file__], "cannot read the image"),
        (["--model", "lit_x"], "unknown model 'lit_x'"),
        (["--model", "resnet18", "--model-kwargs"], "no deformable token merging"),
        (["--model", "lit_ti"], "does not fit"),
        (["--model-kwargs", "widths=3"], "cannot be built"),
        (["--resume", "nowhere.pth"], "nowhere.pth"),
        (["--img-size", "31"], "--img-size is 31, but must be at least 32"),
        (["--img-size", "64", "64", "3"], "--img-size takes one number or two"),
        (["--img-size", "64", "0"], "--img-size must be at least 1"),
        (["--device", "toaster"], "--device toaster"),
    ],
)
def test_wrong_input_is_one_line(folder, tmp_path, flags, message):
    with pytest.raises(InputError) as error:
        plot(folder, tmp_path, *flags)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_statistics_over_images(folder, tmp_path, capsys):
    """Of offsets that are 8 pixels down in the second module, and 0 in the others."""
    for name in ("a", "b", "c"):
        Image.new("RGB", (70, 50), (90, 10, 200)).save(tmp_path / f"{name}.png")
    flags = ["--model", "lit_s", "--checkpoint", str(folder / "lit.pth"), "--device", "cpu", *SMALL_FLAGS]
    out = tmp_path / "out" / "offsets"
    assert visualize_offset.main([*flags, "--statistics", str(tmp_path), "-n", "2", "--output", str(out.parent)]) == 0
    assert {path.name for path in out.iterdir()} == {"offsets.csv", "offsets.png"}
    header, *rows = [line.split(",") for line in (out / "offsets.csv").read_text().splitlines()]
    assert header == ["merging", "token_px", "mean_px", "p95_px", "outside_percent"]
    assert [(row[0], *map(float, row[1:])) for row in rows] == [
        ("stage 1 to 2", 4, 0, 0, 0),
        ("stage 2 to 3", 8, 8, pytest.approx(8, rel=2e-3), 50),
        ("stage 3 to 4", 16, 0, 0, 0),
    ]
    printed = capsys.readouterr().out
    assert "stage 2 to 3         8    8.000" in printed
    assert f"2 images, offsets.csv and offsets.png in {out}" in printed


def test_statistics_without_what_cannot_be_read(folder, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"no image")
    Image.new("RGB", (70, 50)).save(tmp_path / "b.png")
    flags = ["--model", "lit_s", "--checkpoint", str(folder / "lit.pth"), "--device", "cpu", *SMALL_FLAGS]
    flags += ["--output", str(tmp_path / "out"), "--statistics"]
    assert visualize_offset.main([*flags, str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert "1 images" in printed.out
    assert "cannot read the image" in printed.err
    with pytest.raises(InputError, match="none of the 1 images can be read"):
        visualize_offset.main([*flags, str(tmp_path / "a.png")])
    with pytest.raises(InputError, match="no image at nowhere"):
        visualize_offset.main([*flags, "nowhere"])


def test_a_checkpoint_must_be_named():
    with pytest.raises(InputError, match="which weights"):
        visualize_offset.main(["--model", "lit_ti"])
