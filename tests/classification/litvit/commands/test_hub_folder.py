"""litvit hub-folder: a run's weights as timm and the Hub take them."""

import json
import shutil

import huggingface_hub
import pytest
import timm
import torch
import train
import validate
import yaml
from PIL import Image
from safetensors.torch import load_file
from server import serve

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
    assert [metric["name"] for metric in entry["results"][0]["metrics"]] == ["top-1", "top-5", "loss"]
    assert entry["results"][0]["dataset"]["name"] == "digits"
    # The commands take its weights, which know their model.
    outcome = run_main(validate, digits, "--checkpoint", folder / "model.safetensors", "-j", 0)
    assert json.loads(outcome.out)["top1"] == pytest.approx(100 * top1, abs=1e-3)
    assert "\nimport litvit " in card
    assert "| `epochs` | 1 |" in card
    assert "Pay Less Attention" in card


def test_a_model_of_ones_own(digits, tmp_path, tiny_flags, run_main, monkeypatch):
    """Its module is imported here and in the card. A recipe of the run's data is in the card, too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_small_model.py").write_text(
        "import timm\n\n\n@timm.models.register_model\ndef my_small_model(pretrained=False, **kwargs):\n"
        "    return timm.create_model('test_vit', **kwargs)\n"
    )
    flags = [*tiny_flags, "--epochs", 1, "--import", "my_small_model", "--model", "my_small_model", "--model-kwargs"]
    assert train.main([str(flag) for flag in (digits, *flags, "--output", tmp_path, "--experiment", "run")]) == 0
    (tmp_path / "run/summary.csv").unlink()
    outcome = run_main(hub_folder, tmp_path / "run", tmp_path / "hub")
    assert outcome.status == 0, outcome.err
    card = (tmp_path / "hub/README.md").read_text()
    assert "import my_small_model  # registers the model with timm\nimport timm\n" in card
    assert "import litvit" not in card
    assert "| top-1 |" in card
    assert "| top-5 |" not in card


def test_a_folder_of_the_hub(run_folder, tmp_path, run_main, monkeypatch):
    """timm loads it by `hf-hub:`. An upload that fails is one line, and leaves the folder for another try."""
    folder = tmp_path / "www/me/lit/resolve/main"
    assert run_main(hub_folder, run_folder, folder).status == 0
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with serve(tmp_path / "www") as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
        template = f"{server.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        model = timm.create_model("hf-hub:me/lit", pretrained=True)
    held = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, held[name]) for name, value in model.state_dict().items())
    outcome = run_main(hub_folder, run_folder, tmp_path / "hub", "--push", "me/lit")  # nobody serves it any more
    assert outcome.status == 2
    assert outcome.err.startswith(f"error: cannot upload {tmp_path}/hub to me/lit, `hf upload me/lit {tmp_path}/hub`")
    assert outcome.err.count("\n") == 1
    assert (tmp_path / "hub/README.md").exists()


def test_wrong_folders_are_one_line(run_folder, tmp_path, run_main):
    outcome = run_main(hub_folder, tmp_path, tmp_path / "hub")
    assert (outcome.status, outcome.err.count("\n")) == (2, 1)
    assert "holds no run with best weights" in outcome.err
    assert not (tmp_path / "hub").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    outcome = run_main(hub_folder, run_folder, tmp_path / "full")
    assert outcome.err == f"error: {tmp_path / 'full'} is there already: name a new folder\n"
    outcome = run_main(hub_folder, run_folder, tmp_path / "full/file/hub")
    assert outcome.err.startswith(f"error: cannot make {tmp_path}/full/file/hub: ")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model_best.safetensors", "is damaged or not of train.py: it does not say its model"),
        ("settings.yaml", "is not YAML"),
    ],
)
def test_damaged_runs_are_one_line(run_folder, tmp_path, run_main, name, reason):
    shutil.copytree(run_folder, tmp_path / "run")
    content = (tmp_path / "run" / name).read_bytes()
    (tmp_path / "run" / name).write_bytes(content[:-1000] if name.startswith("model") else b"[")
    outcome = run_main(hub_folder, tmp_path / "run", tmp_path / "hub")
    assert (outcome.status, outcome.err.count("\n")) == (2, 1)
    assert reason in outcome.err
    assert not (tmp_path / "hub").exists()
