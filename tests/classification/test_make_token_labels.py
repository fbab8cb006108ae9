"""make_token_labels.py: the files against plain code, resume, several processes, and what wrong input says."""

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import make_token_labels
import numpy as np
import pytest
import timm
import torch
import train
import validate
from PIL import Image
from torch import nn

from litvit.runs.folder import save_weights

LIT = {"dims": (16, 32, 48, 96), "depths": (1, 1, 1, 1)}
SWIN = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4), "window_size": 2}


def build(name, num_classes=10, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=num_classes, **kwargs).eval()
    for layer in filter(None, (model.get_classifier(), getattr(model, "aux_head", None))):
        nn.init.normal_(layer.weight, std=0.5)  # scores far enough from each other
    return model


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A small LIT-S, as a run of train.py leaves it: name, image size and classes are in its file."""
    path = tmp_path_factory.mktemp("teacher") / "model_best.safetensors"
    model = build("lit_s", img_size=64, **LIT)
    classes = [str(digit) for digit in range(10)]
    description = {"model": "lit_s", "img_size": 64, "num_classes": 10, "model_kwargs": LIT, "classes": classes}
    save_weights(path, model.state_dict(), description)
    return path


@pytest.fixture
def run(digits, tmp_path, teacher, run_main):
    """Label `digits` with `teacher`, or what further flags say."""

    def run_(*flags, data=digits, checkpoint=teacher):
        weights = ["--checkpoint", checkpoint] if checkpoint else []
        return run_main(make_token_labels, data, tmp_path / "labels", *weights, "-j", 0, *flags)

    return run_


def kwargs_flags(kwargs):
    return ["--model-kwargs", *(f"{name}={value}" for name, value in kwargs.items())]


def label_files(folder):
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*.pt"))}


def load(path):
    return torch.load(path, weights_only=True)


def classify_tokens(model, images):
    """Scores at every place of the last map, with a family's own layers, (B, h, w, K)."""
    x = model.forward_features(images)
    name = type(model).__name__
    if name == "ResNet":
        return model.fc(x.permute(0, 2, 3, 1))
    if name == "ConvNeXt":
        return model.head.fc(model.head.norm(x).permute(0, 2, 3, 1))
    if name == "SwinTransformer":
        return model.head.fc(x)
    if name == "VisionTransformer":
        return model.head(x[:, 1:]).unflatten(1, (2, -1))
    if name == "LVT":
        return model.aux_head(x[:, 1:]).unflatten(1, (2, -1))
    return model.head(x)


@pytest.mark.parametrize(
    ("name", "size", "kwargs"),
    [
        ("resnet18", 64, {}),
        ("convnext_atto", 64, {}),
        ("swin_tiny_patch4_window7_224", 64, SWIN),
        ("deit_tiny_patch16_224", 32, {"depth": 1}),
        ("lit_s", 64, LIT),
        ("lit_s", (64, 96), LIT),
        ("lvt", 64, {}),
        ("lvt", (64, 96), {}),
    ],
)
@torch.no_grad()
def test_labels_are_those_of_plain_code(digits_copy, tmp_path, run, name, size, kwargs):
    sized = {} if name in ("resnet18", "convnext_atto", "lvt") else {"img_size": size}
    model = build(name, **kwargs, **sized)
    torch.save(model.state_dict(), tmp_path / "teacher.pth")
    for path in digits_copy.rglob("train/*/*.png"):
        Image.open(path).resize((50, 28)).save(path)
    height, width = size if isinstance(size, tuple) else (size, size)
    outcome = run(
        *("--model", name, "--img-size", height, width, "-b", 33, *kwargs_flags(kwargs)),
        data=digits_copy,
        checkpoint=tmp_path / "teacher.pth",
    )
    assert outcome.status == 0, outcome.err
    files = label_files(tmp_path / "labels")
    images = sorted((digits_copy / "train").rglob("*.png"))
    assert list(files) == [str(path.relative_to(digits_copy / "train").with_suffix(".pt")) for path in images]

    cfg = model.pretrained_cfg
    resample = getattr(Image.Resampling, cfg["interpolation"].upper())
    pictures = [Image.open(path).convert("RGB").resize((width, height), resample) for path in images]
    pixels = torch.tensor(np.stack(pictures), dtype=torch.float64) / 255
    pixels = (pixels - torch.tensor(cfg["mean"])) / torch.tensor(cfg["std"])
    scores = classify_tokens(model.double(), pixels.permute(0, 3, 1, 2))
    expected = scores.softmax(-1)

    labels = torch.stack([load(path) for path in files.values()])
    assert labels.shape == (80, 2, 5, 2, 2 * width // height)
    assert labels.dtype == torch.float16
    best, classes = labels.permute(0, 1, 3, 4, 2).unbind(1)
    dense = torch.zeros(80, 2, 2 * width // height, 10, dtype=torch.float64).scatter(-1, classes.long(), best.double())
    chosen = expected.gather(-1, classes.long())
    torch.testing.assert_close(dense.softmax(-1).gather(-1, classes.long()), chosen, rtol=0, atol=5e-3)
    torch.testing.assert_close(chosen, expected.topk(5).values, rtol=0, atol=1e-4)


def test_files_say_who_made_them_and_how_many_there_are(tmp_path, teacher, run):
    outcome = run()
    assert re.fullmatch(r"made 80 label files, 0 were there: .*labels \([\d.]+ images/s\)\n", outcome.out)
    assert outcome.err == ""
    made_by = json.loads((tmp_path / "labels" / "teacher.json").read_text())
    assert (made_by["model"], made_by["checkpoint"]) == ("lit_s", str(teacher))
    assert (made_by["input_size"], made_by["shape"]) == ([3, 64, 64], [2, 5, 2, 2])
    assert made_by["classes"] == [str(digit) for digit in range(10)]


def test_a_second_run_makes_what_is_missing_or_cut_off(tmp_path, run):
    assert run().status == 0
    files = label_files(tmp_path / "labels")
    before = {name: path.read_bytes() for name, path in files.items()}
    times = {name: path.stat().st_mtime_ns for name, path in files.items()}
    gone, cut_off, *others = files
    files[gone].unlink()
    files[cut_off].write_bytes(before[cut_off][:700])
    assert run().out.startswith("made 2 label files, 78 were there")
    assert {name: path.read_bytes() for name, path in label_files(tmp_path / "labels").items()} == before
    assert all(files[name].stat().st_mtime_ns == times[name] for name in others)
    assert run().out.startswith("made 0 label files, 80 were there")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_whole_files(digits, tmp_path, teacher, run, number):
    output = tmp_path / "labels"
    slow = ["--img-size", 256, "-b", 1]
    command = [sys.executable, make_token_labels.__file__, digits, output, "--checkpoint", teacher, "-j", 1, *slow]
    running = subprocess.Popen(
        list(map(str, command)), stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 120
    while not label_files(output) and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    running.send_signal(number)
    said = running.communicate(timeout=60)[1]
    files = label_files(output)
    assert 0 < len(files) < 80
    assert said == f"{number.name}: {80 - len(files)} are still to make, and the same command makes them\n"
    assert running.returncode == 75
    assert all(load(path).shape == (2, 5, 8, 8) for path in files.values())
    assert not list(output.rglob(".*"))
    assert run(*slow).out.startswith(f"made {80 - len(files)} label files, {len(files)} were there")


def test_two_processes_share_the_images(digits, tmp_path, teacher, run, run_script):
    assert run().status == 0
    output = tmp_path / "shared"
    for rank in range(2):
        outcome = run_script(
            "make_token_labels.py",
            *(digits, output, "--checkpoint", teacher, "-j", 0),
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE="2",
        )
        assert outcome.out.startswith(f"process {rank} of 2: made 40 label files, 0 were there"), outcome.err
    for name, path in label_files(tmp_path / "labels").items():
        torch.testing.assert_close(load(output / name), load(path), rtol=0, atol=0.02)


@pytest.mark.parametrize("root", [".", "train"])
def test_images_of_a_tar(digits, tmp_path, run, root):
    (tmp_path / "tar").mkdir()
    with tarfile.open(tmp_path / "tar" / "train.tar", "w") as tar:
        tar.add(digits / "train", arcname=root)
    assert run(data=tmp_path / "tar").status == 0
    tarred = label_files(tmp_path / "labels" / root)
    assert len(tarred) == 80
    assert run("-j", 2, data=tmp_path / "tar").out.startswith("made 0 label files, 80 were there")


def test_a_tar_that_leads_out_of_its_folder_is_refused(digits, tmp_path, run):
    (tmp_path / "tar").mkdir()
    with tarfile.open(tmp_path / "tar" / "train.tar", "w") as tar:
        tar.add(digits / "train" / "3", arcname="../3")
    outcome = run(data=tmp_path / "tar", checkpoint=None)
    assert outcome.status == 2
    outcome = run("--num-classes", 10, data=tmp_path / "tar")
    assert re.fullmatch(r"error: .*train\.tar has no images .*names that lead out of the \.tar.*\n", outcome.err)
    assert not (tmp_path / "labels").exists()


def test_another_teacher_is_refused(tmp_path, teacher, run):
    assert run().status == 0
    other = build("lit_s", img_size=64, **LIT)
    other.head.bias.data += 1
    torch.save(other.state_dict(), tmp_path / "other.pth")
    flags = ["--model", "lit_s", "--img-size", 64, *kwargs_flags(LIT)]
    outcome = run(*flags, checkpoint=tmp_path / "other.pth")
    assert outcome.status == 2
    assert re.fullmatch(r"error: .*labels holds labels of another teacher \(lit_s; its weights .*\n", outcome.err)
    assert "its input_size is not the same" not in outcome.err
    # the same weights from another file are the same teacher
    torch.save(build("lit_s", img_size=64, **LIT).state_dict(), tmp_path / "same.pth")
    assert run(*flags, checkpoint=tmp_path / "same.pth").out.startswith("made 0 label files, 80 were there")
    assert "its shape is not the same" in run("--img-size", 96).err


def test_pretrained_teacher_needs_the_classes_of_the_data(tmp_path, run):
    model = build("resnet18")
    torch.save(model.state_dict(), tmp_path / "ten.pth")
    overlay = {"file": str(tmp_path / "ten.pth"), "num_classes": 10}
    flags = ["--pretrained", "--model", "resnet18", "--img-size", 32]
    outcome = run(*flags, *kwargs_flags({"pretrained_cfg_overlay": overlay}), checkpoint=None)
    assert outcome.out.startswith("made 80 label files"), outcome.err
    torch.save(build("resnet18", 1000).state_dict(), tmp_path / "imagenet.pth")
    overlay = {"file": str(tmp_path / "imagenet.pth")}
    outcome = run(*flags, *kwargs_flags({"pretrained_cfg_overlay": overlay}), checkpoint=None)
    assert outcome.status == 2
    assert outcome.err.startswith("error: the pretrained resnet18 knows 1000 classes, ")


def test_a_class_token_is_warned_of(tmp_path, run):
    torch.save(build("deit_tiny_patch16_224", img_size=32, depth=1).state_dict(), tmp_path / "deit.pth")
    flags = ["--model", "deit_tiny_patch16_224", "--img-size", 32, "--model-kwargs", "depth=1"]
    outcome = run(*flags, checkpoint=tmp_path / "deit.pth")
    assert outcome.status == 0
    assert re.fullmatch(r"warning: deit_tiny_patch16_224 classifies by its class token; .*\n", outcome.err)


def test_images_that_cannot_be_decoded_are_named_and_the_others_labelled(digits_copy, tmp_path, run):
    for number in (0, 1):
        (digits_copy / "train" / "4" / f"0000{number}.png").write_bytes(b"no image")
    outcome = run("-b", 8, "-j", 1, data=digits_copy)
    assert outcome.status == 2
    assert re.fullmatch(
        r"error: 2 images have no labels: cannot read the image \S+/4/00000.png .*/4/00001.png .*\n", outcome.err
    ), outcome.err
    assert outcome.out.startswith("made 78 label files")
    assert len(label_files(tmp_path / "labels")) == 78


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], r"which weights\? --checkpoint RUN, a file, a link or a name such as lit_s.in1k"),
        (["--pretrained", "--checkpoint", "{teacher}"], r"--checkpoint and --pretrained are both weights: .*"),
        (["--checkpoint", "{tmp}/none.pth", "--model", "lit_s"], r"no checkpoint at .*none.pth .*"),
        (["--checkpoint", "{tmp}/plain.pth"], r"which model is the teacher\? --model NAME"),
        (["--checkpoint", "{teacher}", "--model", "lit_x"], r"unknown model 'lit_x'.*"),
        (["--checkpoint", "{teacher}", "--crop-pct", "0.9"], r"leave out --crop-pct: .*"),
        (["--checkpoint", "{teacher}", "-b", "0"], r"--batch-size must be at least 1, not 0"),
        (["--checkpoint", "{teacher}", "--split", "test"], r".* has neither test/ nor test.tar; it holds .*"),
        (["--checkpoint", "{teacher}", "--interpolation", "random"], r"--interpolation is one of .*, not random"),
        (["--checkpoint", "{teacher}", "--dataset", "wds/x"], r"unrecognized arguments: --dataset wds/x .*"),
        (["--checkpoint", "{teacher}", "--num-classes", "12"], r".* holds 10 classes, the model has 12.*"),
        (["--checkpoint", "{tmp}/plain.pth", "--model", "resnet18"], r".* holds 7 classes, the model has 10.*"),
        (["--checkpoint", "{tmp}/pit.pth", "--model", "pit_ti_224"], r".* its 0 last tokens are no map.*"),
        (["--checkpoint", "{tmp}/nan.pth", "--model", "resnet18", "--img-size", "32"], r"the teacher's scores.*"),
        (["--pretrained", "--model", "lvt"], r"lvt: the weights of lvt lie behind a page .*, save it as .*"),
    ],
)
def test_wrong_flags_are_one_line(tmp_path, teacher, run, flags, says):
    if "plain" in str(flags):
        torch.save(build("resnet18", 7).state_dict(), tmp_path / "plain.pth")
    if "pit" in str(flags):
        torch.save(build("pit_ti_224").state_dict(), tmp_path / "pit.pth")
    if "nan" in str(flags):
        broken = build("resnet18")
        broken.fc.weight.data[0, 0] = torch.nan
        torch.save(broken.state_dict(), tmp_path / "nan.pth")
    flags = [flag.replace("{tmp}", str(tmp_path)).replace("{teacher}", str(teacher)) for flag in flags]
    outcome = run(*flags, checkpoint=None)
    assert outcome.status == 2
    assert re.fullmatch(rf"error: {says}\n", outcome.err), outcome.err
    assert "nan" in str(flags) or not (tmp_path / "labels").exists()
    assert not label_files(tmp_path / "labels")


def test_wrong_folders_are_one_line(digits_copy, tmp_path, teacher, run, run_main):
    def error(outcome):
        assert outcome.status == 2
        return outcome.err

    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "n01440764").mkdir()
    assert re.fullmatch(r"error: .*labels holds n01440764, and no labels of this command: .*\n", error(run()))
    outcome = run_main(make_token_labels, digits_copy, teacher, "--checkpoint", teacher, "-j", 0)
    assert re.fullmatch(r"error: cannot write to .*: File exists.*\n", error(outcome))
    assert re.fullmatch(r"error: no data folder .*\n", error(run(data=tmp_path / "none")))
    (digits_copy / "train" / "5").rename(digits_copy / "train" / "five")
    message = r"error: the classes of .* are not those of .*: number 5 is 6, not 5\n"
    assert re.fullmatch(message, error(run(data=digits_copy)))


def test_two_images_of_one_name_are_refused(digits_copy, run):
    image = digits_copy / "train" / "5" / "00003.png"
    image.with_suffix(".jpg").write_bytes(image.read_bytes())
    outcome = run(data=digits_copy)
    assert outcome.status == 2
    assert outcome.err == (
        "error: 5/00003.jpg and 5/00003.png would share the labels 5/00003.pt: rename or remove one\n"
    )


def test_help_tells_the_format(run_main):
    outcome = run_main(make_token_labels, "--help")
    assert outcome.status == 0
    assert "a tensor (2, 5, H, W)" in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 120
    assert Path(make_token_labels.__file__).name in outcome.out


def test_an_lvt_trains_on_what_a_trained_teacher_says(digits, tmp_path, tiny_flags, run_main):
    """The chain of `make demo-lvt`: a teacher of train.py, its labels, an LVT trained with them, its evaluation."""
    mean_pooled = ["class_token=False", "global_pool=avg", "position=relative"]
    where = [digits, "--output", tmp_path, "--epochs", 1]
    assert run_main(train, *tiny_flags, *mean_pooled, *where[1:], "--experiment", "teacher", where[0]).status == 0
    teacher = tmp_path / "teacher" / "model_best.safetensors"
    made = run_main(make_token_labels, digits, tmp_path / "labels", "--checkpoint", teacher, "-j", 0)
    assert made.status == 0
    assert "made 80 label files" in made.out
    kwargs = ["dims=(8,8,16,16)", "depths=(1,1,1,1)", "num_heads=(1,1,2,2)", "class_heads=2"]
    flags = ["--model", "lvt", "--token-label-data", tmp_path / "labels", "--img-size", 64, "-b", 20, "-j", 0]
    schedule = ["--warmup-epochs", 0, "--cooldown-epochs", 0, "--lr", 2e-3, "--model-kwargs", *kwargs]
    assert run_main(train, *where, "--experiment", "student", *flags, *schedule).status == 0
    student = tmp_path / "student" / "model_best.safetensors"
    result = run_main(validate, digits, "--checkpoint", student, "-j", 0)
    assert result.status == 0
    assert json.loads(result.out)["model"] == "lvt"
