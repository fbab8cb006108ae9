"""validate.py: its numbers, its JSON, ImageNet-Real and V2 layouts, and what wrong input says."""

import csv
import itertools
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import timm
import torch
import train
import validate
from PIL import Image
from safetensors.torch import load_file, save_file
from server import serve
from torchvision.transforms.functional import normalize, pil_to_tensor

from litvit.downloads import kept_file
from litvit.runs.folder import read_description, save_weights

KWARGS = {"dims": (16, 32, 40, 64), "depths": (1, 1, 1, 1), "mlp_ratios": (2, 2, 2, 2)}
MODEL_FLAGS = [
    "--model",
    "lit_ti",
    "--img-size",
    32,
    "--crop-pct",
    1,
    "--model-kwargs",
    *(f"{k}={v}" for k, v in KWARGS.items()),
]


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return timm.create_model("lit_ti", num_classes=10, img_size=32, **KWARGS).eval()


@pytest.fixture(scope="module")
def weights(tiny, tmp_path_factory):
    """Weights with a description, as a run of train.py leaves them."""
    path = tmp_path_factory.mktemp("weights") / "model_best.safetensors"
    description = {"model": "lit_ti", "img_size": 32, "num_classes": 10, "crop_pct": 1.0, "model_kwargs": KWARGS}
    save_weights(path, tiny.state_dict(), description)
    return path


def expected(model, folder):
    """top-1 in percent and mean loss, by plain code."""
    cfg = model.pretrained_cfg
    images, target = [], []
    for path in sorted(folder.rglob("*.png")):
        images.append(normalize(pil_to_tensor(Image.open(path)) / 255, cfg["mean"], cfg["std"]))
        target.append(int(path.parent.name))
    with torch.inference_mode():
        logits = model(torch.stack(images))
    target = torch.tensor(target)
    loss = torch.nn.functional.cross_entropy(logits, target).item()
    return 100 * (logits.argmax(1) == target).double().mean().item(), loss


def test_numbers_are_those_of_plain_code(digits, tiny, weights, tmp_path, run_main):
    outcome = run_main(
        validate, digits, "--checkpoint", weights, "-b", 16, "-j", 0, "--results-file", tmp_path / "result.json"
    )
    assert outcome.status == 0, outcome.err
    result = json.loads((tmp_path / "result.json").read_text())
    assert json.loads(outcome.out) == result
    top1, loss = expected(tiny, digits / "val")
    assert result["top1"] == pytest.approx(top1, abs=1e-3)
    assert result["loss"] == pytest.approx(loss, abs=2e-4)
    assert result["images"] == 40
    assert result["images_per_second"] > 0
    assert (result["model"], result["img_size"], result["num_classes"]) == ("lit_ti", 32, 10)


def test_a_link_knows_its_model_too(digits, weights, tmp_path, monkeypatch, run_main):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with serve(weights.parent) as server:
        link = f"{server.address}/{weights.name}"
        outcomes = [run_main(validate, digits, "--checkpoint", source, "-j", 0) for source in (link, weights)]
    first, second = (json.loads(outcome.out) for outcome in outcomes)
    assert (first["checkpoint"], first["top1"]) == (link, second["top1"])
    assert len(server.asked) == 1


def test_the_published_weights(digits, published, tmp_path, monkeypatch, run_main):
    """On data with some of their classes, which a class map numbers."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    address = timm.get_pretrained_cfg("lit_ti").url
    kept_file(address).parent.mkdir(parents=True)
    torch.save({"model": published("lit_ti")}, kept_file(address))
    flags = [digits, "--model", "lit_ti", "--pretrained", "--img-size", 32, "--crop-pct", 1, "-j", 0]
    outcome = run_main(validate, *flags)
    assert outcome.status == 2
    assert "the pretrained lit_ti knows 1000 classes, " in outcome.err
    numbers = {str(digit): 100 * digit for digit in range(10)}
    names = [f"{number // 100}" if number % 100 == 0 else f"other {number}" for number in range(1000)]
    (tmp_path / "classes.txt").write_text("\n".join(names))
    outcome = run_main(validate, *flags, "--num-classes", 1000, "--class-map", tmp_path / "classes.txt")
    assert outcome.status == 0, outcome.err
    model = timm.create_model("lit_ti", img_size=32).eval()
    model.load_state_dict(published("lit_ti"))
    result = json.loads(outcome.out)
    assert (result["checkpoint"], result["num_classes"]) == ("pretrained", 1000)
    images = [normalize(pil_to_tensor(Image.open(path)) / 255, *norm(model)) for path in digits.glob("val/*/*.png")]
    target = torch.tensor([numbers[path.parent.name] for path in digits.glob("val/*/*.png")])
    with torch.inference_mode():
        loss = torch.nn.functional.cross_entropy(model(torch.stack(images)), target).item()
    assert result["loss"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("layout", ["bare", "model", "module", "safetensors"])
def test_checkpoints_without_description(digits, tiny, weights, tmp_path, run_main, layout):
    state = tiny.state_dict()
    path = tmp_path / "weights.pth"
    if layout == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(state, path)
    elif layout == "module":
        torch.save({"model": {f"module.{name}": value for name, value in state.items()}, "epoch": 3}, path)
    else:
        torch.save({"model": state} if layout == "model" else state, path)
    outcome = run_main(validate, digits, "--checkpoint", path, "-j", 0, *MODEL_FLAGS)
    assert outcome.status == 0, outcome.err
    assert json.loads(outcome.out)["top1"] == pytest.approx(expected(tiny, digits / "val")[0], abs=1e-3)


def test_imagenet_v2_folder_is_numbered_by_name(digits, tiny, weights, tmp_path, run_main):
    # ImageNet-V2: the folder itself holds 0, 1, 2, ..., 10, 11: in the order of the numbers, not of the letters
    outcome = run_main(validate, digits / "val", "--checkpoint", weights, "-j", 0)
    assert outcome.status == 0, outcome.err
    assert json.loads(outcome.out)["top1"] == pytest.approx(expected(tiny, digits / "val")[0], abs=1e-3)


def test_classes_are_numbered_as_in_training(digits_copy, tiny, tmp_path, run_main):
    """A val/ that lacks a class keeps the numbers of the checkpoint's; one that has another is refused."""
    path = tmp_path / "named.safetensors"
    description = {"model": "lit_ti", "img_size": 32, "num_classes": 10, "crop_pct": 1.0, "model_kwargs": KWARGS}
    save_weights(path, tiny.state_dict(), description | {"classes": [str(digit) for digit in range(10)]})
    shutil.rmtree(digits_copy / "train")
    shutil.rmtree(digits_copy / "val" / "4")
    outcome = run_main(validate, digits_copy, "--checkpoint", path, "-j", 0)
    assert outcome.status == 0, outcome.err
    assert json.loads(outcome.out)["top1"] == pytest.approx(expected(tiny, digits_copy / "val")[0], abs=1e-3)
    (digits_copy / "val" / "3").rename(digits_copy / "val" / "cat")
    outcome = run_main(validate, digits_copy, "--checkpoint", path, "-j", 0)
    assert (outcome.status, outcome.err) == (2, "error: val has 1 classes that the checkpoint lacks: cat\n")


def test_a_full_checkpoint_knows_its_model(digits, tiny, tmp_path, run_main):
    description = {"model": "lit_ti", "img_size": 32, "num_classes": 10, "crop_pct": 1.0, "model_kwargs": KWARGS}
    torch.save({"state_dict": tiny.state_dict(), "optimizer": {}, "description": description}, tmp_path / "last.pth")
    outcome = run_main(validate, digits, "--checkpoint", tmp_path / "last.pth", "-j", 0)
    assert outcome.status == 0, outcome.err
    assert json.loads(outcome.out)["top1"] == pytest.approx(expected(tiny, digits / "val")[0], abs=1e-3)


def test_images_that_are_not_square(digits_copy, tmp_path, run_main):
    model = timm.create_model("lit_ti", num_classes=10, img_size=(32, 64), **KWARGS).eval()
    for path in (digits_copy / "val").rglob("*.png"):
        Image.open(path).resize((64, 32)).save(path)
    size = {"img_size": [32, 64], "num_classes": 10, "crop_pct": 1.0}
    save_weights(tmp_path / "wide.safetensors", model.state_dict(), {"model": "lit_ti", "model_kwargs": KWARGS, **size})
    outcome = run_main(validate, digits_copy, "--checkpoint", tmp_path / "wide.safetensors", "-j", 0)
    assert outcome.status == 0, outcome.err
    result = json.loads(outcome.out)
    top1, loss = expected(model, digits_copy / "val")
    assert (result["img_size"], result["top1"]) == ([32, 64], pytest.approx(top1, abs=1e-3))
    assert result["loss"] == pytest.approx(loss, abs=2e-4)
    # an older file, whose model arguments named the size once more
    both = {"model": "lit_ti", "model_kwargs": {**KWARGS, "img_size": [32, 64]}, **size}
    save_weights(tmp_path / "both.safetensors", model.state_dict(), both)
    outcome = run_main(validate, digits_copy, "--checkpoint", tmp_path / "both.safetensors", "-j", 0)
    assert json.loads(outcome.out)["loss"] == result["loss"]


def test_a_model_that_cannot_take_the_images_is_one_line(digits, tmp_path, run_main):
    model = timm.create_model("inception_v3", num_classes=10)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    flags = ["--model", "inception_v3", "--img-size", 32, "--checkpoint", tmp_path / "weights.safetensors", "-j", 0]
    outcome = run_main(validate, digits, *flags)
    assert outcome.status == 2
    assert re.fullmatch(r"error: inception_v3 cannot classify images with --img-size 32, .*\n", outcome.err)


def test_imagenet_real_labels(digits, tiny, weights, tmp_path, run_main):
    folder = tmp_path / "data" / "val"
    labels = []
    for number, path in enumerate(sorted((digits / "val").rglob("*.png"))):
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path.parent.name / f"ILSVRC2012_val_{number + 1:08d}.png")
        labels.append([] if number == 0 else [int(path.parent.name), (int(path.parent.name) + 1) % 10])
    (tmp_path / "real.json").write_text(json.dumps(labels))
    flags = ["--checkpoint", weights, "-j", 0, "--real-labels", tmp_path / "real.json"]
    outcome = run_main(validate, folder, *flags)
    assert outcome.status == 2  # the names end with .JPEG in ImageNet
    assert "real labels are of ImageNet's" in outcome.err
    for path in folder.rglob("*.png"):
        path.rename(path.with_suffix(".JPEG"))
    outcome = run_main(validate, folder, *flags)
    assert outcome.status == 0, outcome.err
    images = [normalize(pil_to_tensor(Image.open(path)) / 255, *norm(tiny)) for path in sorted(folder.rglob("*.JPEG"))]
    with torch.inference_mode():
        guesses = tiny(torch.stack(images)).argmax(1).tolist()
    right = [guess in real for guess, real in zip(guesses, labels, strict=True) if real]
    assert json.loads(outcome.out)["real_top1"] == pytest.approx(100 * sum(right) / 39, abs=1e-3)


def norm(model):
    return model.pretrained_cfg["mean"], model.pretrained_cfg["std"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--checkpoint", "{tmp}/none.pth"], "no checkpoint at"),
        ([], r"which weights\? --checkpoint RUN, a file, a link or a name such as lit_s.in1k"),
        (["--checkpoint", "{tmp}"], "is a folder"),
        (["--checkpoint", "{tmp}/empty.pth"], "is empty"),
        (["--checkpoint", "{tmp}/short.safetensors"], "truncated"),
        (["--checkpoint", "{tmp}/other.pth"], "these are the weights of lit_s"),
        (["--checkpoint", "{tmp}/classes.pth"], "holds 7 classes, the model has 10"),
        (["--checkpoint", "{weights}", "--model", "lit_x"], "unknown model 'lit_x'"),
        (["--checkpoint", "{weights}", "--img-size", "31"], "multiple of 32"),
        (["--checkpoint", "{weights}", "--num-classes", "12"], "holds 10 classes, the model has 12"),
        (["--checkpoint", "{weights}", "--real-labels", "{tmp}/none.json"], "--real-labels .*none.json"),
        (["--checkpoint", "{weights}", "--real-labels"], "real labels are of ImageNet's 50,000"),
        (["--checkpoint", "{weights}", "--results-file", "{tmp}/none/result.json"], "--results-file .*name a file"),
        (["--checkpoint", "{weights}", "-b", "0"], "--batch-size must be at least 1"),
        (["--checkpoint", "{weights}", "--class-map", "{tmp}/none.txt"], "cannot read the class map"),
    ],
)
def test_wrong_flags_are_one_line(digits, weights, tmp_path, run_main, flags, says):
    (tmp_path / "empty.pth").touch()
    (tmp_path / "short.safetensors").write_bytes(weights.read_bytes()[:5000])
    other = timm.create_model("lit_s", num_classes=10)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    classes = timm.create_model("lit_ti", num_classes=7, img_size=32, **KWARGS)
    torch.save(classes.state_dict(), tmp_path / "classes.pth")
    flags = [flag.replace("{tmp}", str(tmp_path)).replace("{weights}", str(weights)) for flag in flags]
    outcome = run_main(validate, digits, "-j", 0, *MODEL_FLAGS, *flags)
    assert outcome.status == 2
    assert re.fullmatch(rf"error: .*{says}.*\n", outcome.err), outcome.err


def test_an_unreadable_image_is_named(digits_copy, weights, run_main):
    (digits_copy / "val" / "3" / "00000.png").write_bytes(b"no image")
    outcome = run_main(validate, digits_copy, "--checkpoint", weights, "-j", 1)
    assert outcome.status == 2
    assert re.fullmatch(r"error: cannot read the image .*val/3/00000.png .*\n", outcome.err), outcome.err


def test_a_class_map_does_not_change_what_the_checkpoint_remembers(weights, digits, tmp_path, run_main):
    (tmp_path / "map.txt").write_text("\n".join(reversed([str(number) for number in range(10)])))
    description = read_description(weights) | {"classes": [str(number) for number in range(10)]}
    save_weights(tmp_path / "remembers.safetensors", load_file(weights), description)
    flags = [digits, "--checkpoint", tmp_path / "remembers.safetensors", "-j", 0]
    assert run_main(validate, *flags).status == 0
    outcome = run_main(validate, *flags, "--class-map", tmp_path / "map.txt")
    assert outcome.status == 2
    assert "the classes of the class map are not those of the checkpoint: number 0 is 9, not 0" in outcome.err


def test_a_run_folder_is_a_checkpoint(digits, weights, run_main):
    """Its best weights, or else its last ones. Whose weights they are is told if --model is another."""
    results = [run_main(validate, digits, "--checkpoint", path, "-j", 0) for path in (weights.parent, weights)]
    first, second = (json.loads(outcome.out) for outcome in results)
    assert first["top1"] == second["top1"]
    outcome = run_main(validate, digits, "--checkpoint", weights.parent, "--model", "lit_s", "-j", 0)
    assert outcome.status == 2
    assert outcome.err.startswith(f"error: {weights} holds the weights of lit_ti, and --model is lit_s: leave that out")


def test_a_report(digits, tiny, weights, tmp_path, run_main):
    outcome = run_main(validate, digits, "--checkpoint", weights, "-b", 16, "-j", 0, "--report", tmp_path / "report")
    assert outcome.status == 0, outcome.err
    result = json.loads(outcome.out)
    assert json.loads((tmp_path / "report" / "result.json").read_text()) == result
    files = sorted(path.name for path in (tmp_path / "report").iterdir())
    assert files == [
        "confusion.csv",
        "confusion.png",
        "mistakes.png",
        "per_class.csv",
        "predictions.csv",
        "result.json",
    ]
    rows, classes, confusion = (
        list(csv.DictReader((tmp_path / "report" / f"{name}.csv").open()))
        for name in ("predictions", "per_class", "confusion")
    )
    probabilities, target = scores(tiny, digits / "val")
    guesses = probabilities.argmax(1)
    for row, own, values in zip(rows, target, probabilities, strict=True):
        assert Path(row["image"]).parent.name == row["class"] == str(own.item())
        assert row["class_1"] == str(values.argmax().item())
        assert float(row["probability_1"]) == pytest.approx(values.max().item(), abs=1e-4)
        assert float(row["probability"]) == pytest.approx(values[own].item(), abs=1e-4)
    for digit, row in enumerate(classes):
        of_class = target == digit
        assert float(row["top1"]) == pytest.approx(100 * (guesses[of_class] == digit).double().mean().item(), abs=0.01)
        assert [int(confusion[digit][f"{other} {other}"]) for other in range(10)] == torch.bincount(
            guesses[of_class], minlength=10
        ).tolist()
    confidence, bins = probabilities.max(1).values, torch.linspace(0, 1, 16)
    error = 0.0
    for low, high in itertools.pairwise(bins):
        inside = (confidence >= low) & (confidence < high)
        if inside.any():
            gap = (guesses == target)[inside].double().mean() - confidence[inside].double().mean()
            error += inside.double().mean().item() * abs(gap.item())
    assert result["calibration_error"] == pytest.approx(error, abs=1e-3)
    assert "accuracy per class, lowest first" in outcome.err
    assert Image.open(tmp_path / "report" / "confusion.png").width > 200


def test_flip_averages_the_probabilities(digits, tiny, weights, run_main):
    outcome = run_main(validate, digits, "--checkpoint", weights, "-j", 0, "--flip")
    (plain, target), (flipped, _) = (scores(tiny, digits / "val", flip) for flip in (False, True))
    loss = -((plain + flipped) / 2).gather(1, target.unsqueeze(1)).log().mean().item()
    assert json.loads(outcome.out)["loss"] == pytest.approx(loss, abs=2e-4)


def scores(model, folder, flip=False):
    """Probabilities (N, K) and classes (N,), by plain code."""
    paths = sorted(folder.rglob("*.png"))
    images = torch.stack([normalize(pil_to_tensor(Image.open(path)) / 255, *norm(model)) for path in paths])
    with torch.inference_mode():
        logits = model(images.flip(-1) if flip else images)
    return logits.softmax(1), torch.tensor([int(path.parent.name) for path in paths])


def test_several_processes_count_each_image_once(digits_copy, weights, tmp_path, run_main):
    """39 images are uneven for two processes."""
    next((digits_copy / "val" / "3").glob("*.png")).unlink()
    flags = [digits_copy, "--checkpoint", weights, "-b", "4", "-j", "0"]
    alone = run_main(validate, *flags, "--report", tmp_path / "one")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        validate.__file__,
    ]
    command += [*map(str, flags), "--report", str(tmp_path / "two")]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = json.loads(alone.out), json.loads(done.stdout)
    assert (second["images"], second["processes"]) == (39, 2)
    for name in ("top1", "top5", "loss", "calibration_error"):
        assert second[name] == pytest.approx(first[name], abs=1e-3)
    one, two = (list(csv.reader((tmp_path / name / "predictions.csv").open())) for name in ("one", "two"))
    assert [row[:3] for row in one] == [row[:3] for row in two]


def test_the_result_is_json_and_replaces_nothing_but_a_plain_file(digits, tiny, weights, tmp_path, run_main):
    infinite = {name: value * 1e19 if name == "head.weight" else value for name, value in tiny.state_dict().items()}
    infinite["head.bias"] = torch.full((10,), 3e38)
    infinite["head.bias"][0] = -3e38
    save_weights(tmp_path / "wide.safetensors", infinite, read_description(weights))
    plain, link = tmp_path / "result.json", tmp_path / "link.json"
    plain.write_text("old")
    link.symlink_to("result.json")
    outcome = run_main(validate, digits, "--checkpoint", tmp_path / "wide.safetensors", "-j", 0, "--results-file", link)
    assert outcome.status == 0, outcome.err
    result = json.loads(outcome.out, parse_constant=pytest.fail)
    assert result["loss"] is None
    assert json.loads(plain.read_text()) == result
    assert link.is_symlink()

    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    outcome = run_main(validate, digits, "--checkpoint", weights, "-j", 0, "--results-file", tmp_path / "pipe")
    reader.join(10)
    assert read == [outcome.out]
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)


def test_a_result_that_cannot_be_written_is_printed(digits, weights, tmp_path, run_main):
    name = tmp_path / ("x" * 300)
    outcome = run_main(validate, digits, "--checkpoint", weights, "-j", 0, "--results-file", name)
    assert outcome.status == 2
    assert json.loads(outcome.out)["images"] == 40
    assert re.fullmatch(r"error: cannot write .*: File name too long.*\n", outcome.err), outcome.err


def test_standard_output_as_results_file_holds_the_result_once(digits, weights, tmp_path, run_script):
    outcome = run_script("validate.py", digits, "--checkpoint", weights, "-j", 0, "--results-file", "/dev/stdout")
    assert outcome.status == 0, outcome.err
    assert json.loads(outcome.out)["images"] == 40
    assert os.path.islink("/dev/stdout")


def test_the_images_that_a_training_held_out_are_evaluated(digits, tmp_path, tiny_flags, run_main):
    own = ["--val-fraction", 0.25, "--epochs", 1, "--output", tmp_path, "--experiment", "run"]
    assert run_main(train, digits / "train", *tiny_flags, *own).status == 0
    weights = tmp_path / "run/model_best.safetensors"
    outcome = run_main(validate, digits / "train", "--checkpoint", weights, "-j", 0)
    result = json.loads(outcome.out)
    assert result["images"] == 20
    assert result["top1"] == pytest.approx(read_description(weights)["top1"], abs=1e-3)
    assert "20 of 80 images, those that the training held out" in outcome.err
    everything = run_main(validate, digits / "train", "--checkpoint", weights, "-j", 0, "--val-fraction", 0)
    assert json.loads(everything.out)["images"] == 80
