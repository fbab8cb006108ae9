"""train.py and distributed_train.sh: what a run leaves behind, how it resumes, and what wrong input says."""

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys

import make_token_labels
import pytest
import timm
import torch
import train
import validate
import visualize_offset
import yaml
from PIL import Image
from safetensors.torch import load_file

from litvit.downloads import kept_file
from litvit.runs.folder import read_description
from litvit.training.build import build_trainer
from litvit.training.recipe import parse_config


@pytest.fixture(scope="module")
def finished_run(digits, tmp_path_factory, tiny_flags):
    """Folder of a tiny run of two epochs, and its flags."""
    folder = tmp_path_factory.mktemp("run")
    flags = [str(digits), *tiny_flags, "--model-ema"]
    train.main([*flags, "--output", str(folder), "--experiment", "tiny"])
    return folder / "tiny", flags


def test_a_run_leaves_settings_checkpoint_best_weights_and_logs(finished_run):
    folder, _ = finished_run
    names = {path.name for path in folder.iterdir()}
    assert {"settings.yaml", "last.pth", "model_best.safetensors", "summary.csv", "train.log", "tensorboard"} <= names
    settings = yaml.safe_load((folder / "settings.yaml").read_text())
    assert settings["model"] == "lit_ti"
    assert settings["lr"] == 2e-3
    with open(folder / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])
    log = (folder / "train.log").read_text()
    assert re.search(r"epoch 2: step 8/8, loss [\d.]+, lr [\d.e-]+, [\d.]+ images/s, \d:\d\d:\d\d left", log)
    assert list((folder / "tensorboard").glob("events*"))


def test_timm_loads_best_weights_and_full_checkpoint(finished_run):
    folder, _ = finished_run
    kwargs = {"num_classes": 10, "img_size": 32, "dims": (16, 32, 40, 64), "depths": (1,) * 4, "mlp_ratios": (2,) * 4}
    best = timm.create_model("lit_ti", checkpoint_path=folder / "model_best.safetensors", **kwargs)
    saved = load_file(folder / "model_best.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in best.state_dict().items())
    # The average was on: timm's loader prefers it, and so did the validation that chose the best weights.
    last = timm.create_model("lit_ti", checkpoint_path=str(folder / "last.pth"), **kwargs)
    state = torch.load(folder / "last.pth", weights_only=True)
    assert torch.equal(last.head.weight, state["state_dict_ema"]["head.weight"])
    assert not torch.equal(last.head.weight, state["state_dict"]["head.weight"])


def test_resume_continues_to_the_weights_of_an_unbroken_run(finished_run, digits, tmp_path, tiny_flags, run_main):
    folder, flags = finished_run
    here = ["--output", tmp_path, "--experiment", "broken"]
    # The schedule is that of two epochs; the run is cut after the first.
    cut = build_trainer(parse_config([*flags, *map(str, here)]))
    cut.epochs = 1
    cut.run()
    outcome = run_main(train, digits, "--resume", tmp_path / "broken")
    assert outcome.status == 0, outcome.err
    assert "continuing at epoch 2" in outcome.out
    whole, resumed = (torch.load(path / "last.pth", weights_only=True) for path in (folder, tmp_path / "broken"))
    assert resumed["epoch"] == whole["epoch"] == 2
    for key in ("state_dict", "state_dict_ema"):
        for name, value in whole[key].items():
            assert torch.equal(value, resumed[key][name]), name
    with open(tmp_path / "broken" / "summary.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]


def test_a_run_is_not_overwritten(finished_run, run_main):
    folder, flags = finished_run
    before = (folder / "last.pth").read_bytes()
    outcome = run_main(train, *flags, "--output", folder.parent, "--experiment", folder.name)
    assert outcome.status == 2
    assert outcome.err.count("\n") == 1
    assert "--resume" in outcome.err
    assert (folder / "last.pth").read_bytes() == before


def test_full_recipe_trains_with_all_its_augmentation(digits, tmp_path, run_main):
    # lit_ti's own recipe: repeated augmentation, RandAugment, erasing, mixup, cutmix, stochastic depth, fp16 asked for
    tiny = ["--model-kwargs", "dims=(16,32,40,64)", "depths=(1,1,1,1)", "mlp_ratios=(2,2,2,2)"]
    flags = ["--model", "lit_ti", "--img-size", 32, "-b", 10, "-j", 1, "--epochs", 1, "--warmup-epochs", 0]
    outcome = run_main(
        train,
        digits,
        *flags,
        "--cooldown-epochs",
        0,
        "--grad-accum-steps",
        2,
        "--clip-grad",
        1,
        "--output",
        tmp_path,
        *tiny,
    )
    assert outcome.status == 0, outcome.err
    assert "total batch 20, 4 steps per epoch" in outcome.out
    assert "float16 needs a GPU" in outcome.out


@pytest.mark.parametrize(
    "flags", [["--amp", "--amp-dtype", "bfloat16"], ["--grad-checkpointing"], ["--model", "lit_s"]]
)
def test_precision_checkpointing_and_other_lits(digits, tmp_path, tiny_flags, run_main, flags):
    if "lit_s" in flags:
        flags = [*flags, "--model-kwargs", "dims=(16,32,48,72)", "depths=(1,1,1,1)"]
    outcome = run_main(train, digits, *tiny_flags, "--epochs", 1, "--output", tmp_path, "--experiment", "run", *flags)
    assert outcome.status == 0, outcome.err
    assert (tmp_path / "run" / "model_best.safetensors").exists()


def test_initial_checkpoint_of_other_classes_gets_a_new_classifier(
    finished_run, digits_copy, tmp_path, tiny_flags, run_main
):
    folder, _ = finished_run
    for split in ("train", "val"):
        for image in (digits_copy / split / "9").iterdir():
            image.unlink()
        (digits_copy / split / "9").rmdir()
    weights = folder / "model_best.safetensors"
    flags = [*tiny_flags, "--initial-checkpoint", folder, "--output", tmp_path, "--experiment", "fine", "--lr", 0]
    outcome = run_main(train, digits_copy, *flags, "--epochs", 1, "--warmup-lr", 0, "--min-lr", 0)
    assert outcome.status == 0, outcome.err
    tuned, start = load_file(tmp_path / "fine" / "model_best.safetensors"), load_file(weights)
    assert tuned["head.weight"].shape[0] == 9
    assert torch.equal(tuned["stages.0.blocks.0.mlp.fc1.weight"], start["stages.0.blocks.0.mlp.fc1.weight"])


@pytest.mark.parametrize("link", [False, True])
def test_published_weights_of_other_classes(published, digits, tmp_path, monkeypatch, run_main, link):
    """By name, or by a link. A resumed run needs them no more."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    address = timm.get_pretrained_cfg("lit_ti").url
    kept_file(address).parent.mkdir(parents=True)
    torch.save({"model": published("lit_ti")}, kept_file(address))
    start = ["--initial-checkpoint", address] if link else ["--pretrained"]
    flags = ["--model", "lit_ti", "--img-size", 32, "-b", 40, "-j", 0, *start, "--lr", 0, "--warmup-lr", 0]
    flags = [
        *flags,
        "--min-lr",
        0,
        "--epochs",
        1,
        "--warmup-epochs",
        0,
        "--cooldown-epochs",
        0,
        "--resume",
        "auto",
        "--output",
        tmp_path,
        "--experiment",
        "run",
    ]
    assert f"starting from the weights of {address}\n" in run_main(train, digits, *flags, "--dry-run").out
    outcome = run_main(train, digits, *flags)
    assert outcome.status == 0, outcome.err
    tuned = load_file(tmp_path / "run" / "model_best.safetensors")
    assert torch.equal(tuned["stages.0.blocks.0.mlp.fc1.weight"], published("lit_ti")["block1.0.mlp.fc1.weight"])
    assert tuned["head.weight"].shape[0] == 10
    shutil.rmtree(tmp_path / "torch")
    assert "has ended" in run_main(train, digits, *flags).out


def test_two_processes_are_one_process(digits, tmp_path, tiny_flags, run_main, run_script):
    # a model without BatchNorm, whose statistics are a process's own: all else is the same to rounding
    flags = [*tiny_flags, "--model", "test_vit", "--opt", "sgd", "--lr", "0.05", "--output", tmp_path, "--model-kwargs"]
    alone = run_main(train, digits, *flags, "--experiment", "one")
    assert alone.status == 0, alone.err
    both = run_script("distributed_train.sh", 2, digits, *flags, "-b", 10, "--experiment", "two")
    assert both.status == 0, both.err
    assert "2 processes" in both.out
    one, two = (torch.load(tmp_path / name / "last.pth", weights_only=True)["state_dict"] for name in ("one", "two"))
    for name, value in one.items():
        assert torch.allclose(value, two[name], rtol=1e-4, atol=1e-6), name
    losses = []
    for name in ("one", "two"):
        with open(tmp_path / name / "summary.csv", newline="") as file:
            losses.append([float(row["train_loss"]) for row in csv.DictReader(file)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][1] < losses[0][0]


def unreadable_image(data):
    (data / "train" / "3" / "00000.png").write_bytes(b"no image")


def extra_class(data):
    (data / "val" / "cat").mkdir()
    Image.new("RGB", (32, 32)).save(data / "val" / "cat" / "a.png")


def no_val(data):
    (data / "val").rename(data.parent / "elsewhere")


def no_train(data):
    (data / "train").rename(data.parent / "elsewhere")


def no_images(data):
    for image in data.glob("train/*/*.png"):
        image.unlink()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (unreadable_image, r"cannot read the images .*train/3/00000.png .*repair or replace them"),
        (extra_class, r"val has 1 classes that train lacks: cat"),
        (no_val, r"has neither val/ nor val.tar; it holds .*train"),
        (no_train, r"has neither train/ nor train.tar; it holds .*val"),
        (no_images, r".*train has no images in folders of classes .*folders without images"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_wrong_data_is_one_line(digits_copy, tmp_path, tiny_flags, run_main, spoil, says, workers):
    if workers and spoil is not unreadable_image:
        workers = 0
    spoil(digits_copy)
    outcome = run_main(train, digits_copy, *tiny_flags, "-j", workers, "--output", tmp_path / "out")
    assert outcome.status == 2
    assert re.fullmatch(rf"error: .*{says}.*\n", outcome.err), outcome.err
    assert spoil is unreadable_image or not (tmp_path / "out").exists()


def test_images_that_are_not_square(digits, tmp_path, tiny_flags, run_main):
    """Trained, resumed and described at 32 x 64, which the folder of the run remembers."""
    flags = [digits, *tiny_flags[2:-1], "mlp_ratios=(2,2,2,2)", "--model", "lit_ti", "--img-size", 32, 64]
    outcome = run_main(train, *flags, "--mixup", 0.8, "--cutmix", 1, "--output", tmp_path, "--experiment", "run")
    assert outcome.status == 0, outcome.err
    assert "10 classes, 32 x 64 images; cpu" in outcome.out
    assert yaml.safe_load((tmp_path / "run" / "settings.yaml").read_text())["img_size"] == [32, 64]
    assert read_description(tmp_path / "run" / "model_best.safetensors")["img_size"] == [32, 64]
    assert load_file(tmp_path / "run" / "model_best.safetensors")["stages.0.pos_embed"].shape == (1, 8, 16, 16)
    resumed = run_main(train, digits, "--resume", tmp_path / "run")
    assert (resumed.status, "this run has ended already" in resumed.out) == (0, True), resumed.err
    other = run_main(train, digits, "--resume", tmp_path / "run", "--img-size", 64, 32)
    assert (other.status, "img_size was [32, 64], is [64, 32]" in other.err) == (2, True)


def write_code(path):
    class Code:
        def __reduce__(self):
            return (open, (str(path) + ".ran", "w"))

    torch.save({"model": Code()}, path)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model", "lit_tii"], r"unknown model 'lit_tii'; did you mean lit_ti"),
        (["--model", "hf-hub:me/lit"], r"'hf-hub:me/lit' is a source of weights: give its model\.safetensors"),
        (["--img-size", "100"], r"img_size must be a multiple of 32"),
        (["--lr", "abc"], r"argument --lr: invalid float value: 'abc'"),
        (["--epoch", "3"], r"unrecognized arguments: --epoch"),
        (["-b", "0"], r"--batch-size must be at least 1"),
        (["-b", "500"], r"80 training images do not fill one total batch of 500"),
        (["-b", "5", "--mixup", "0.8"], r"--batch-size must be even"),
        (["--opt", "adamww"], r"--opt adamww"),
        (["--opt-betas", "0.9"], r"--opt adamw"),
        (["--sched", "foo"], r"--sched foo"),
        (["--aa", "foo"], r"--aa foo"),
        (["--train-interpolation", "foo"], r"--train-interpolation foo"),
        (["--interpolation", "foo"], r"--interpolation is one of"),
        (["--ratio", "0", "0"], r"--ratio is a low and a high value"),
        (["--mean", "1", "2"], r"with 1 value or 3: --mean has 2"),
        (["--std", "0", "1", "1"], r"--std must be positive"),
        (["--std", "nan"], r"--std must be finite"),
        (["--in-chans", "1"], r"images of 1 channels .--in-chans. need --mean and --std with 1 value: --mean has 3"),
        (["--in-chans", "6", "--mean", ".5", "--std", ".5"], r"--in-chans 6: images are read with 1 \(grey\), 3"),
        (["--in-chans", "4", "--mean", ".5", "--std", ".5"], r"--aa rand-.* takes grey and RGB images only"),
        (["--crop-pct", "87.5"], r"--crop-pct must be above 0 and at most 1, not 87.5"),
        (["--interpolation", "random"], r"--interpolation is one of .*, not random"),
        (
            ["--img-size", "16", "64", "--model", "lvt", "--no-token-label"],
            r"must have 32 pixels or more per side, not",
        ),
        (["--img-size", "32", "64", "96"], r"--img-size takes one number or two, height and width, not 3"),
        (["--model-kwargs", "img_size=(32,64)"], r"--img-size HEIGHT WIDTH, is both"),
        (["--model-kwargs", "mlp_ratios=(2,2)"], r"list index out of range; is it in --model-kwargs"),
        (["--lr-base-size", "0"], r"--lr-base-size must be at least 1"),
        (["--clip-grad", "-1"], r"--clip-grad must be at least 0"),
        (["--mixup", "-1"], r"--mixup must be at least 0"),
        (["--max-unreadable", "2"], r"--max-unreadable must be between 0 and 1"),
        (["--checkpoint-every", "nanm"], r"--checkpoint-every 'nanm' is neither a time"),
        (["--device", "meta"], r"--device meta"),
        (["--model-kwargs", "num_heads=(0,0,7,8)"], r"num_heads \(0, 0, 7, 8\) must divide dims"),
        (["--model-kwargs", "position=foo"], r"position must be 'absolute' or 'relative'"),
        (["--model-kwargs", "features_only=True"], r"features_only is not a classifier"),
        (["--config", "{tmp}/null.yaml"], r"epochs needs a value"),
        (["--warmup-epochs", "2"], r"leaves nothing of --epochs 2"),
        (["--num-classes", "3"], r"the data has 10 classes"),
        (["--device", "cuda:77"], r"--device cuda:77"),
        (["--dataset", "nothing/here"], r"the readers are hfds/NAME"),
        (["--initial-checkpoint", "{tmp}/none.pth"], r"no checkpoint at"),
        (["--initial-checkpoint", "http://127.0.0.1:1/none.pth"], r"cannot fetch http\S+: .*refused"),
        (["--initial-checkpoint", "{tmp}/none.pth", "--pretrained"], r"give one of them"),
        (["--model-kwargs", "pretrained=True"], r"use --pretrained"),
        (["--initial-checkpoint", "{tmp}/short.pth"], r"truncated"),
        (["--initial-checkpoint", "{tmp}/code.pth"], r"code.*not run"),
        (["--resume", "{tmp}/none"], r"no run there"),
        (["--config", "{tmp}/none.yaml"], r"no such recipe .*lit_ti"),
        (["--config", "{tmp}/unknown.yaml"], r"unknown key 'lerning_rate'"),
        (["--config", "{tmp}/near.yaml"], r"unknown key 'weight-decay'; did you mean weight_decay"),
        (["--config", "{tmp}/type.yaml"], r"lr: 'abc' is not float"),
        (["--config", "{tmp}/broken.yaml"], r"is not YAML"),
    ],
)
def test_wrong_flags_are_one_line(digits, tmp_path, tiny_flags, run_main, flags, says):
    (tmp_path / "unknown.yaml").write_text("model: lit_ti\nlerning_rate: 1\n")
    (tmp_path / "near.yaml").write_text("weight-decay: 1\n")
    (tmp_path / "type.yaml").write_text("lr: abc\n")
    (tmp_path / "null.yaml").write_text("epochs: null\n")
    (tmp_path / "broken.yaml").write_text("lr: [1\n")
    torch.save({"head.weight": torch.ones(1000)}, tmp_path / "short.pth")
    (tmp_path / "short.pth").write_bytes((tmp_path / "short.pth").read_bytes()[:800])
    write_code(tmp_path / "code.pth")
    flags = [flag.replace("{tmp}", str(tmp_path)) for flag in flags]
    outcome = run_main(train, digits, *tiny_flags, "--output", tmp_path / "out", *flags)
    assert outcome.status == 2
    assert re.fullmatch(rf"error: .*{says}.*\n", outcome.err), outcome.err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "code.pth.ran").exists()


@pytest.mark.parametrize("data", ["none", "empty"])
def test_missing_and_empty_data_folders(tmp_path, run_main, data):
    (tmp_path / "empty").mkdir()
    outcome = run_main(train, tmp_path / data, "--model", "lit_ti")
    assert outcome.status == 2
    assert re.fullmatch(rf"error: .*data folder .*{data}.*\n", outcome.err), outcome.err


def test_command_lines_end_with_status_2_and_one_line(tmp_path, run_script):
    for script, arguments in (("train.py", []), ("distributed_train.sh", [2])):
        outcome = run_script(script, *arguments, tmp_path / "none", "--model", "lit_ti")
        assert (outcome.status, outcome.out) == (2, "")
        assert outcome.err == f"error: no data folder {tmp_path / 'none'}\n"
    assert run_script("distributed_train.sh", "two", tmp_path).status == 2


def test_help_fits_two_screens(run_script):
    outcome = run_script("train.py", "--help")
    assert outcome.status == 0
    assert len(outcome.out.splitlines()) <= 116


@pytest.mark.gpu
@pytest.mark.parametrize("flags", [["--amp-dtype", "float16"], ["--amp-dtype", "bfloat16"], ["--torchcompile"]])
def test_a_gpu_trains_the_recipe_and_resumes(digits, tmp_path, run_main, flags):
    tiny = ["--model-kwargs", "dims=(16,32,40,64)", "depths=(1,1,1,1)", "mlp_ratios=(2,2,2,2)"]
    command = [digits, "--model", "lit_ti", "--img-size", 32, "-b", 20, "-j", 1, "--warmup-epochs", 0, *flags, *tiny]
    command += ["--cooldown-epochs", 0, "--clip-grad", 1, "--model-ema", "--output", tmp_path, "--resume", "auto"]
    for epochs in (1, 2):
        outcome = run_main(train, *command, "--epochs", epochs)
        assert outcome.status == 0, outcome.err
    assert "continuing at epoch 2" in outcome.out
    state = torch.load(tmp_path / "lit_ti" / "last.pth", weights_only=True)
    assert all(value.isfinite().all() for value in state["state_dict"].values())


def test_the_weights_remember_that_photographs_are_turned(digits_copy, digits, tmp_path, tiny_flags, run_main):
    exif = Image.Exif()
    exif[0x0112] = 6
    for path in digits_copy.rglob("*.png"):
        Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    flags = [*tiny_flags, "--epochs", 1, "--output", tmp_path]
    states = []
    for data, more in ((digits, ["upright"]), (digits_copy, ["turned", "--exif-transpose"])):
        assert run_main(train, data, *flags, "--experiment", *more).status == 0
        states.append(torch.load(tmp_path / more[0] / "last.pth", weights_only=True))
    weights = tmp_path / "turned" / "model_best.safetensors"
    for name, value in states[0]["state_dict"].items():
        assert torch.equal(value, states[1]["state_dict"][name]), name
    assert (states[0]["best_top1"], states[0]["loss_sum"]) == (states[1]["best_top1"], states[1]["loss_sum"])

    flags = ["--checkpoint", weights, "-j", 0]
    results = [json.loads(run_main(validate, data, *flags).out) for data in (digits, digits_copy)]
    assert results[0]["loss"] == results[1]["loss"]
    as_stored = run_main(validate, digits_copy, *flags, "--no-exif-transpose")
    assert json.loads(as_stored.out)["loss"] != results[0]["loss"]

    for name, data in (("upright", digits), ("turned", digits_copy)):
        image = next(iter(sorted((data / "val" / "3").iterdir())))
        plots = ["--resume", weights, "--vis-image", image, "--output", tmp_path / f"plots-{name}"]
        assert run_main(visualize_offset, *plots).status == 0
        assert run_main(make_token_labels, data, tmp_path / f"labels-{name}", *flags).status == 0
    upright, turned = (tmp_path / f"plots-{name}" / image.stem / "overview.png" for name in ("upright", "turned"))
    assert upright.read_bytes() == turned.read_bytes()
    upright, turned = (sorted((tmp_path / f"labels-{name}").rglob("*.pt")) for name in ("upright", "turned"))
    assert len(upright) == len(turned) == 80
    for first, second in zip(upright, turned, strict=True):
        assert torch.equal(torch.load(first, weights_only=True), torch.load(second, weights_only=True))

    labels = ["--token-label", "--token-label-data", tmp_path / "labels-turned", "--model", "lvt", "--dry-run"]
    outcome = run_main(train, digits_copy, *labels, "--img-size", 32, "-b", 10, "-j", 0)
    assert outcome.status == 2
    assert "are of photographs upright (--exif-transpose): train on the same" in outcome.err


def test_a_small_shared_memory_ends_the_run_which_is_saved(digits, tmp_path, tiny_flags):
    """As in a container. Images of 224 x 224 pixels do not fit into its 1 MiB."""
    flags = [digits, *tiny_flags, "--img-size", 224, "-j", 2, "--output", tmp_path, "--experiment", "run"]
    command = shlex.join(map(str, [sys.executable, train.__file__, *flags]))
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f"mount -t tmpfs -o size=1m tmpfs /dev/shm || exit 99; exec {command}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode in (1, 99) and "Traceback" not in done.stderr:
        pytest.skip(f"no mount namespace here: {done.stderr}")
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: the shared memory /dev/shm, of 1 MiB, is full: make it ")
    assert (tmp_path / "run" / "last.pth").exists()
