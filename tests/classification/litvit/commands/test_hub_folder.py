"""litvit hub-folder: a run's weights as timm and the Hub take them."""

import json

import pytest
import timm
import torch
import train
import yaml
from PIL import Image
from safetensors.torch import load_file

from litvit.commands import hub_folder


@pytest.fixture(scope="module")
def run_folder(digits, tmp_path_factory, tiny_flags):
    """Folder of a run of one epoch, with classes of the folder's names and a normalisation of its own."""
    folder = tmp_path_factory.mktemp("runs")
    flags = [*tiny_flags, "--epochs", 1, "--mean", 0.5, "--std", 0.25, "--output", folder, "--experiment", "run"]
    assert train.main([str(flag) for flag in (digits, *flags)]) == 0
    return folder / "run"


def test_a_run_as_hub_folder(run_folder, digits, tmp_path, run_main):
    folder = tmp_path / "hub"
    outcome = run_main(hub_folder, run_folder, folder, "--data", "digits")
    assert outcome.status == 0, outcome.err
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert all(
        torch.equal(value, model.state_dict()[name])
        for name, value in load_file(run_folder / "model_best.safetensors").items()
    )
    data = timm.data.resolve_model_data_config(model)
    assert (data["input_size"], data["mean"], data["std"]) == ((3, 32, 32), [0.5] * 3, [0.25] * 3)
    assert json.loads((folder / "config.json").read_text())["label_names"] == [str(digit) for digit in range(10)]
    transform = timm.data.create_transform(**data)
    images = [transform(Image.open(path).convert("RGB")) for path in sorted(digits.glob("val/*/*.png"))]
    with torch.inference_mode():
        guesses = model(torch.stack(images)).argmax(1)
    top1 = (guesses == torch.arange(10).repeat_interleave(4)).double().mean().item()
    _, header, card = (folder / "README.md").read_text().split("---\n", 2)
    (entry,) = yaml.safe_load(header)["model-index"]
    assert entry["results"][0]["metrics"][0]["value"] == pytest.approx(top1)
    assert entry["results"][0]["dataset"]["name"] == "digits"
    assert "\nimport litvit " in card
    assert "| `epochs` | 1 |" in card
    assert "Pay Less Attention" in card


def test_wrong_folders_are_one_line(run_folder, tmp_path, run_main):
    outcome = run_main(hub_folder, tmp_path, tmp_path / "hub")
    assert (outcome.status, outcome.err.count("\n")) == (2, 1)
    assert "holds no run with best weights" in outcome.err
    assert not (tmp_path / "hub").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    outcome = run_main(hub_folder, run_folder, tmp_path / "full")
    assert outcome.err == f"error: {tmp_path / 'full'} is there already: name a new folder\n"
