"""litvit export: files that their runtimes run, what they say of the model, and what stops an export."""

import json

import export
import pytest
import timm
import torch
from PIL import Image
from torchvision.transforms.functional import normalize, pil_to_tensor

from litvit.runs.folder import save_weights
from litvit.runtimes import FORMATS

KWARGS = {"dims": [8, 16], "depths": [1, 1], "num_heads": [0, 2], "mlp_ratios": [2, 2], "class_token": False}
KWARGS |= {"global_pool": "avg"}
CLASSES = [str(digit) for digit in range(10)]


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return timm.create_model("lit_ti", num_classes=10, img_size=32, **KWARGS).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def weights(tiny, tmp_path_factory):
    """Weights with a description, as a run of train.py leaves them."""
    path = tmp_path_factory.mktemp("weights") / "model_best.safetensors"
    description = {"model": "lit_ti", "img_size": 32, "num_classes": 10, "crop_pct": 1.0, "model_kwargs": KWARGS}
    save_weights(path, tiny.state_dict(), description | {"classes": CLASSES, "mean": [0.5] * 3, "std": [0.25] * 3})
    return path


@pytest.fixture
def run(run_main, weights, tmp_path, monkeypatch):
    """Run the command on the weights, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *flags: run_main(export, "--checkpoint", weights, *flags)


def test_file_and_its_description(run, tiny, digits, tmp_path):
    outcome = run("--format", "torchscript", "--images", digits / "val")
    assert outcome.status == 0, outcome.err
    assert "compared with torch on 40 images" in outcome.out
    assert "same top-1 100.0%" in outcome.out
    assert "times torch's speed" in outcome.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lit_ti.pt", "lit_ti.pt.json"]
    description = json.loads((tmp_path / "lit_ti.pt.json").read_text())
    assert description["classes"] == CLASSES
    assert description["input_size"] == [3, 32, 32]
    assert (description["mean"], description["std"]) == ([0.5] * 3, [0.25] * 3)
    # What the description says of the input is enough to run the file.
    pixels = pil_to_tensor(Image.open(digits / "val" / "3" / "00000.png").convert("RGB")) / 255
    x = normalize(pixels, description["mean"], description["std"]).unsqueeze(0)
    torch.testing.assert_close(FORMATS["torchscript"].load(tmp_path / "lit_ti.pt", 1)(x)[0], tiny(x))


def test_a_folder_for_the_hub(run_main, tiny, tmp_path, monkeypatch):
    """It knows the model, its classes and its images. The file is named after it."""
    monkeypatch.chdir(tmp_path)
    timm.models.save_for_hf(tiny, tmp_path / "hub" / "digits", model_args={"img_size": 32, **KWARGS})
    outcome = run_main(export, "--checkpoint", "hub/digits", "--format", "torchscript")
    assert outcome.status == 0, outcome.err
    assert json.loads((tmp_path / "digits.pt.json").read_text())["num_classes"] == 10


def test_onnx_describes_itself(run, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    outcome = run("--output", "digits.onnx")
    assert outcome.status == 0, outcome.err
    held = {entry.key: entry.value for entry in onnx.load(tmp_path / "digits.onnx").metadata_props}
    assert json.loads(held["classes"]) == CLASSES
    assert json.loads(held["mean"]) == [0.5] * 3
    assert held["interpolation"] == "bicubic"


def test_openvino_is_two_files_and_dense_maps_have_names(run, tmp_path):
    openvino = pytest.importorskip("openvino")
    outcome = run("--format", "openvino", "--dense", "--precision", "float16")
    assert outcome.status == 0, outcome.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lit_ti.bin", "lit_ti.xml", "lit_ti.xml.json"]
    model = openvino.Core().read_model(tmp_path / "lit_ti.xml")
    assert [port.any_name for port in (*model.inputs, *model.outputs)] == ["images", "stage1", "stage2"]
    assert model.get_rt_info(["litvit", "model"]).astype(str) == "lit_ti"


def test_a_file_that_differs_is_not_written(run, tmp_path):
    (tmp_path / "lit_ti.pt").write_text("the last export")
    outcome = run("--format", "torchscript", "--precision", "bfloat16", "--tolerance", 1e-9)
    assert outcome.status == 1
    assert outcome.err.endswith("is above 1e-09 (--tolerance): nothing was written\n")
    assert [path.name for path in tmp_path.iterdir()] == ["lit_ti.pt"]
    assert (tmp_path / "lit_ti.pt").read_text() == "the last export"


def test_a_file_for_one_number_of_images(run):
    outcome = run("--format", "torchscript", "--no-dynamic-batch", "--batch-size", 5)
    assert outcome.status == 0, outcome.err
    assert "on 15 images" in outcome.out
    assert "batch 5, " in outcome.out


WRONG = {
    "--format torchscript --precision int8": "--format torchscript has no int8, it has float32, float16, bfloat16",
    "--format torchscript --images nowhere": "--images nowhere: no such folder",
    "--format torchscript --images .": "--images .: no images in it, nor in its folders",
    "--format torchscript --dynamic-size": "--format torchscript is for images of one size: leave out --dynamic-size",
    "--format torch-export --dynamic-size": "--dynamic-size is for --dense: a classifier takes images of --img-size",
    "--format torchscript --calibration x": "--calibration is for --precision int8, not float32",
    "--format torchscript --output no/x.pt": "--output no/x.pt: name a file *.pt in an existing folder",
    "--format torchscript --output x.onnx": "--output x.onnx: name a file *.pt in an existing folder",
    "--format torchscript --batch-size 2": "--batch-size is for --no-dynamic-batch: else the file takes any number",
    "--format torchscript --model lit_x": "unknown model 'lit_x'; did you mean",
    "--format torchscript --threads 0": "--threads must be at least 1, not 0",
    "--format torchscript --no-dynamic-batch --batch-size 99": "--batch-size 99 needs as many images: --images DIR",
}


@pytest.mark.parametrize("flags", WRONG)
def test_wrong_input_is_one_line(run, tmp_path, flags):
    outcome = run(*flags.split())
    assert outcome.status == 2
    assert outcome.err.startswith(f"error: {WRONG[flags]}")
    assert outcome.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [[], ["--calibration", "nowhere"], ["--calibration", "."]])
def test_int8_needs_images(run, flags):
    for package in FORMATS["onnx"].packages:
        pytest.importorskip(package)
    outcome = run("--precision", "int8", *flags)
    assert outcome.status == 2
    assert "--calibration" in outcome.err
    assert outcome.err.count("\n") == 1


def test_broken_images_are_named(run, tmp_path):
    (tmp_path / "broken.png").write_text("no image")
    outcome = run("--format", "torchscript", "--images", tmp_path)
    assert outcome.status == 2
    assert "broken.png" in outcome.err
