"""predict.py and litvit.load: labels from a run's folder, a file, a link or a name, and what cannot be read."""

import csv
import io
import json
import shutil
import sys

import predict
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from server import serve
from timm.data import ImageNetInfo
from torchvision.transforms.functional import normalize, pil_to_tensor

import litvit
from litvit.downloads import kept_file
from litvit.errors import InputError
from litvit.runs.folder import read_description, save_weights

KWARGS = {"dims": (16, 32, 40, 64), "depths": (1, 1, 1, 1), "mlp_ratios": (2, 2, 2, 2)}
CLASSES = ["none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return timm.create_model("lit_ti", num_classes=10, img_size=32, **KWARGS).eval()


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """The folder of a run, as train.py leaves it."""
    folder = tmp_path_factory.mktemp("run")
    description = {"model": "lit_ti", "img_size": 32, "num_classes": 10, "classes": CLASSES, "crop_pct": 1.0}
    save_weights(folder / "model_best.safetensors", tiny.state_dict(), description | {"model_kwargs": KWARGS})
    return folder


def expected(model, path):
    """Names and probabilities of the best classes, by plain code."""
    cfg = model.pretrained_cfg
    image = normalize(pil_to_tensor(Image.open(path)) / 255, cfg["mean"], cfg["std"])
    with torch.inference_mode():
        probabilities = model(image.unsqueeze(0)).softmax(1)[0]
    order = probabilities.argsort(descending=True)
    return [(CLASSES[i], pytest.approx(probabilities[i].item(), abs=1e-4)) for i in order]


def test_labels_are_those_of_plain_code_in_all_formats(digits, tiny, run, run_main):
    folder = digits / "val" / "3"
    images = sorted(folder.glob("*.png"))
    flags = [folder, "--checkpoint", run, "-b", 3, "-j", 1]
    outcome = run_main(predict, *flags, "-k", 2, "--format", "csv")
    assert outcome.status == 0, outcome.err
    rows = list(csv.DictReader(io.StringIO(outcome.out)))
    assert [row["image"] for row in rows] == [str(path) for path in images]
    for path, row in zip(images, rows, strict=True):
        found = [(row[f"class_{i}"], float(row[f"probability_{i}"])) for i in (1, 2)]
        assert found == expected(tiny, path)[:2]
    outcome = run_main(predict, *flags, "-k", 20, "--format", "json")
    for path, entry in zip(images, json.loads(outcome.out), strict=True):
        assert entry["image"] == str(path)
        assert [(each["class"], each["probability"]) for each in entry["classes"]] == expected(tiny, path)
    outcome = run_main(predict, *flags, "-k", 1)
    first = expected(tiny, images[0])[0]
    assert outcome.out.splitlines()[0].split() == [str(images[0]), f"{100 * first[1].expected:.1f}%", first[0]]


def test_folders_patterns_and_stdin(digits, run, tmp_path, monkeypatch, run_main):
    (tmp_path / "a" / "b").mkdir(parents=True)
    source = next((digits / "val").rglob("*.png"))
    for name in ("a/10.png", "a/9.PNG", "a/b/[x].png", "a/.hidden.png", "a/notes.txt", "other.png"):
        shutil.copy(source, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a/10.png\n\n")))
    outcome = run_main(predict, "a", "o*.png", "a/b/[x].png", "-", "--checkpoint", run, "--format", "csv", "-j", 0)
    assert outcome.status == 0, outcome.err
    names = [row["image"] for row in csv.DictReader(io.StringIO(outcome.out))]
    assert names == ["a/9.PNG", "a/10.png", "a/b/[x].png", "other.png", "a/b/[x].png", "a/10.png"]
    (tmp_path / "a/notes.txt").unlink()
    outcome = run_main(predict, "a/**", "--checkpoint", run, "--format", "csv", "-j", 0)
    names = [row["image"] for row in csv.DictReader(io.StringIO(outcome.out))]
    assert sorted(names) == ["a/10.png", "a/9.PNG", "a/b/[x].png"]


def test_what_cannot_be_read_is_named_and_the_rest_goes_on(digits_copy, run, tmp_path, run_main):
    folder = digits_copy / "val" / "3"
    (folder / "00001.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    flags = [
        folder,
        tmp_path / "empty",
        tmp_path / "none.png",
        "--checkpoint",
        run,
        "--format",
        "csv",
        "-b",
        2,
        "-j",
        0,
    ]
    outcome = run_main(predict, *flags)
    assert outcome.status == 2
    assert len(outcome.out.splitlines()) == 4
    assert "00001.png" not in outcome.out
    lines = outcome.err.splitlines()
    assert lines[:2] == [f"error: {tmp_path}/empty holds no images", f"error: no image at {tmp_path}/none.png"]
    assert lines[2].startswith(f"error: cannot read the image {folder}/00001.png (no format that Pillow knows)")
    outcome = run_main(predict, tmp_path / "empty", "--checkpoint", run)
    assert (outcome.status, outcome.err) == (2, f"error: {tmp_path}/empty holds no images\n")


def test_scores_that_are_not_finite_label_nothing(digits, run, tmp_path, run_main):
    weights = load_file(run / "model_best.safetensors")
    weights["head.bias"][3] = float("nan")
    save_weights(tmp_path / "nan.safetensors", weights, read_description(run / "model_best.safetensors"))
    image = next((digits / "val" / "3").glob("*.png"))
    outcome = run_main(predict, image, "--checkpoint", tmp_path / "nan.safetensors", "--format", "json", "-j", 0)
    assert (outcome.status, json.loads(outcome.out)) == (2, [])
    assert outcome.err == f"error: {image}: the model's scores are not finite\n"


def test_contact_sheets(digits, run, tmp_path, run_main):
    flags = [digits / "train", "--checkpoint", run, "-j", 0, "--out"]
    outcome = run_main(predict, *flags, tmp_path / "sheets")
    assert outcome.status == 0, outcome.err
    assert sorted(path.name for path in (tmp_path / "sheets").iterdir()) == ["sheet-2.png", "sheet.png"]
    full, rest = (Image.open(tmp_path / "sheets" / name) for name in ("sheet.png", "sheet-2.png"))
    assert full.height > 2 * rest.height  # 64 and 16 of 80 images, 8 per row
    assert len(full.crop((8, 8, 168, 168)).getcolors()) > 2
    outcome = run_main(predict, *flags, tmp_path / "sheet.txt")
    assert outcome.status == 2
    assert outcome.out == ""
    assert outcome.err.startswith("error: --out")


def test_a_sheet_shows_very_long_pictures(run, tmp_path, run_main):
    Image.new("RGB", (4000, 8)).save(tmp_path / "long.png")
    flags = ["--checkpoint", run, "--out", tmp_path / "sheet.png", "-j", 0]
    outcome = run_main(predict, tmp_path / "long.png", *flags)
    assert outcome.status == 0, outcome.err
    assert Image.open(tmp_path / "sheet.png").width > 160


def test_a_link_a_name_and_a_file_that_says_nothing(digits, published, run, tmp_path, monkeypatch, run_main):
    """The model of published weights is known by the weights, and ImageNet's classes by their number."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    image = next((digits / "val" / "3").glob("*.png"))
    address = timm.get_pretrained_cfg("lit_ti").url
    torch.save({"model": published("lit_ti")}, tmp_path / "lit.pth")
    kept_file(address).parent.mkdir(parents=True)
    shutil.copy(tmp_path / "lit.pth", kept_file(address))
    model = timm.create_model("lit_ti").eval()
    model.load_state_dict(published("lit_ti"))
    words = ImageNetInfo().label_descriptions()
    found = []
    with serve(tmp_path) as server:
        for source in ("lit_ti.in1k", tmp_path / "lit.pth", f"{server.address}/lit.pth"):
            outcome = run_main(predict, image, "--checkpoint", source, "-k", 1, "--format", "json")
            assert outcome.status == 0, outcome.err
            found.append(json.loads(outcome.out))
    assert found[0] == found[1] == found[2]
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.inference_mode():
        best = model(transform(Image.open(image).convert("RGB")).unsqueeze(0)).argmax().item()
    assert found[0][0]["classes"][0]["class"].startswith(words[best])


def test_load_gives_model_transform_and_classes(digits, tiny, run, tmp_path):
    image = next((digits / "val" / "3").glob("*.png"))
    classifier = litvit.load(run)
    assert (classifier.classes, classifier.model.training) == (CLASSES, False)
    [labels, again] = classifier.predict([image, Image.open(image)], k=3)
    assert labels == again == expected(tiny, image)[:3]
    with torch.inference_mode():
        logits = classifier.model(classifier.transform(Image.open(image)).unsqueeze(0))
    assert classifier.classes[logits.argmax()] == labels[0][0]
    torch.save({"optimizer": {}, "state_dict": tiny.state_dict()}, tmp_path / "last.pth")
    other = litvit.load(tmp_path / "last.pth", model="lit_ti", img_size=32, crop_pct=1.0, model_kwargs=KWARGS)
    assert other.classes == [str(i) for i in range(10)]
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="cannot read the image .*bad.png"):
        classifier.predict([tmp_path / "bad.png"])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("lit_ss", "no checkpoint at lit_ss; did you mean lit_s"),
        ("lit_s.mine", "no checkpoint at lit_s.mine; did you mean lit_s"),
        ("{tmp}", "is a folder without the weights of a run"),
        ("{tmp}/none.pth", "no checkpoint at .*none.pth"),
        ("{tmp}/unknown.pth", "which model has the weights of .*unknown.pth"),
    ],
)
def test_sources_without_weights_are_one_line(tmp_path, source, message):
    torch.save({"layer.weight": torch.zeros(3, 3)}, tmp_path / "unknown.pth")
    with pytest.raises(InputError, match=message) as error:
        litvit.load(source.format(tmp=tmp_path))
    assert "\n" not in str(error.value)


def test_a_model_and_the_name_of_another(digits, run_main):
    outcome = run_main(predict, digits, "--checkpoint", "lit_s.in1k", "--model", "lit_ti")
    assert (outcome.status, outcome.err) == (
        2,
        "error: --model lit_ti and the weights of lit_s.in1k: leave out --model\n",
    )
