"""The command lines of segmentation/, on a few drawn scenes and on a data set in ADE20K's layout."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

from litvit.demo_data import PALETTE, SceneSettings, build
from litvit.errors import InputError
from litvit.openmmlab.tools import run_tool

SEGMENTATION = Path(__file__).parents[2] / "segmentation"
LIT_TI = SEGMENTATION / "configs/lit/lit_ti_fpn_r50_512x512_80k_ade20k.py"
LVT = SEGMENTATION / "configs/lvt/segformer.lvt.512x512.ade.160k.py"

# The demo's Semantic FPN with a tiny backbone, on the scenes of `root`.
CONFIG = """
_base_ = "{segmentation}/configs/lit/lit_ti_fpn_demo.py"
data_root = "{root}/"
model = dict(
    backbone=dict(
        dims=(16, 32, 40, 64), depths=(1, 1, 1, 1), mlp_ratios=(2, 2, 2, 2), img_size=64, init_cfg=None
    ),
    neck=dict(in_channels=[16, 32, 40, 64]),
)
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root))
val_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
train_cfg = dict(max_iters=2, val_interval=2)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=1, max_keep_ckpts=9))
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config on 4 training and 2 validation scenes of 96 x 128."""
    folder = tmp_path_factory.mktemp("segmentation")
    build(folder / "ade", SceneSettings("segmentation", train=4, val=2, image_size=96))
    file = folder / "tiny.py"
    file.write_text(CONFIG.format(segmentation=SEGMENTATION, root=folder / "ade"))
    return file


def run(script, *arguments):
    program = "bash" if script.endswith(".sh") else sys.executable
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [program, SEGMENTATION / "tools" / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )


@pytest.fixture(scope="module")
def trained(config):
    """The folder of a run that two processes trained for two iterations on the CPU."""
    folder = config.parent / "run"
    done = run("dist_train.sh", config, 2, "--work-dir", folder)
    assert done.returncode == 0, done.stderr
    assert "Iter(train) [2/2]" in done.stdout
    return folder


def test_an_interrupted_training_resumes(config, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    (folder / "last_checkpoint").write_text(str(folder / "iter_1.pth"))
    (folder / "iter_2.pth").unlink()
    done = run("train.py", config, "--work-dir", folder, "--resume")
    assert done.returncode == 0, done.stderr
    assert "resumed epoch: 0, iter: 1" in done.stdout
    assert "Iter(train) [1/2]" not in done.stdout
    assert "Iter(train) [2/2]" in done.stdout
    assert (folder / "iter_2.pth").exists()


def test_evaluation_of_a_trained_segmentor(config, trained, tmp_path):
    done = run("test.py", config, trained / "iter_2.pth", "--work-dir", tmp_path, "--out", tmp_path / "maps")
    assert done.returncode == 0, done.stderr
    (numbers,) = tmp_path.glob("*/*.json")
    assert json.loads(numbers.read_text()).keys() >= {"mIoU", "mAcc", "aAcc"}
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == [f"ADE_val_0000000{i}.png" for i in (1, 2)]


def test_pictures_are_drawn_with_a_legend(config, trained, tmp_path):
    picture = Image.open(config.parent / "ade/images/validation/ADE_val_00000001.jpg")
    image = tmp_path / "picture.png"
    picture.save(image)
    flags = ["--config", config, "--checkpoint", trained / "iter_2.pth", "--out", tmp_path / "new" / "folder"]
    done = run("predict.py", image, *flags, "--opacity", "1")
    assert done.returncode == 0, done.stderr
    drawn = Image.open(tmp_path / "new" / "folder" / image.name)
    assert drawn.height == picture.height
    assert drawn.width > picture.width
    colors = {color for _, color in drawn.crop((0, 0, *picture.size)).getcolors()}
    assert colors <= set(PALETTE)
    legend = {color for _, color in drawn.crop((picture.width, 0, *drawn.size)).getcolors(1000)}
    assert legend & set(PALETTE) == colors


def test_wrong_input_of_predict_is_one_line(config, run_main, tmp_path):
    spec = importlib.util.spec_from_file_location("predict", SEGMENTATION / "tools/predict.py")
    predict = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(predict)
    image = config.parent / "ade/images/validation/ADE_val_00000001.jpg"
    flags = ["--config", config, "--checkpoint", tmp_path / "none.pth", "--out", tmp_path / "out"]
    assert run_main(predict, tmp_path / "none.jpg", *flags) == (
        2,
        "",
        f"error: no picture at {tmp_path / 'none.jpg'}\n",
    )
    assert "--opacity is 2.0, but must be" in run_main(predict, image, *flags, "--opacity", "2").err
    done = run_main(predict, image, *flags)
    assert (done.status, done.err.splitlines()[-1]) == (2, f"error: no checkpoint at {tmp_path / 'none.pth'}")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """150 classes of random rectangles in ADE20K's layout, in pictures of several odd sizes."""
    folder = tmp_path_factory.mktemp("shapes") / "ADEChallengeData2016"
    rng = np.random.default_rng(0)
    colors = rng.integers(256, size=(151, 3), dtype=np.uint8)
    for split, sizes in {"training": [(97, 131), (64, 203), (150, 75)], "validation": [(85, 113), (131, 70)]}.items():
        for kind in ("images", "annotations"):
            (folder / kind / split).mkdir(parents=True)
        for i, (height, width) in enumerate(sizes):
            labels = np.zeros((height, width), dtype=np.uint8)
            for label in rng.permutation(np.arange(1, 151)):
                top, left = rng.integers(height - 8), rng.integers(width - 8)
                labels[top : top + rng.integers(8, 40), left : left + rng.integers(8, 40)] = label
            Image.fromarray(colors[labels]).save(folder / "images" / split / f"{i}.jpg")
            Image.fromarray(labels).save(folder / "annotations" / split / f"{i}.png")
    return folder


def test_published_config_on_another_data_set(shapes, tmp_path):
    """SegFormer's, at a quarter of its size."""
    config = Config.fromfile(LVT)
    config.model.backbone.init_cfg = None
    config.model.data_preprocessor.size = (128, 128)
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader |= {"num_workers": 0, "persistent_workers": False}
        loader.dataset.data_root = str(shapes)
    for pipeline in (
        config.train_dataloader.dataset.pipeline,
        config.test_dataloader.dataset.pipeline,
        config.test_pipeline,
    ):
        for step in pipeline:
            step |= {"scale": (512, 128)} if "Resize" in step.type and "scale" in step else {}
            step |= {"crop_size": (128, 128)} if step.type == "RandomCrop" else {}
    config.train_cfg |= {"max_iters": 1, "val_interval": 2}
    file, checkpoint = tmp_path / "quarter.py", tmp_path / "iter_1.pth"
    config.dump(file)
    done = run("train.py", file, "--work-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    slide = ["model.test_cfg.mode=slide", "model.test_cfg.crop_size=96,96", "model.test_cfg.stride=64,64"]
    done = run("test.py", file, checkpoint, "--work-dir", tmp_path / "test", "--cfg-options", *slide)
    assert done.returncode == 0, done.stderr
    (numbers,) = (tmp_path / "test").glob("*/*.json")
    assert "mIoU" in json.loads(numbers.read_text())
    images = sorted((shapes / "images" / "validation").iterdir())
    done = run("predict.py", *images, "--config", file, "--checkpoint", checkpoint, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == [image.name for image in images]


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("test", ["{config}", "{checkpoint}", "--aug-test"], "say --tta"),
        (
            "train",
            ["{lit_ti}", "--cfg-options", "model.backbone.init_cfg=None"],
            "no data at data/ade/ADEChallengeData2016/images/training",
        ),
        (
            "train",
            ["{config}", "--cfg-options", "train_dataloader.dataset.img_suffix=.png"],
            "a name that ends in img_suffix",
        ),
        (
            "train",
            ["{config}", "--cfg-options", "train_dataloader.dataset.seg_map_suffix=.tif"],
            "ADE_train_00000001.jpg has no annotation at",
        ),
        (
            "train",
            ["{config}", "--cfg-options", "model.decode_head.num_classes=150"],
            "the head has 150 classes, the data set 14",
        ),
        (
            "train",
            ["{config}", "--cfg-options", "train_dataloader.dataset.reduce_zero_label=False"],
            "but the classes are 0 to 13",
        ),
        (
            "test",
            ["{lit_ti}", "{checkpoint}", "--cfg-options", "{root}", "model.backbone.init_cfg=None"],
            "does not fit the config",
        ),
        (
            "test",
            [
                "{config}",
                "{checkpoint}",
                "--cfg-options",
                "{fifteen}",
                "{no_palette}",
                "model.decode_head.num_classes=15",
            ],
            "decode_head.conv_seg.weight has size (14, 64, 1, 1), not (15, 64, 1, 1)",
        ),
    ],
)
def test_wrong_input_is_one_line(tool, arguments, message, config, trained, tmp_path, monkeypatch):
    names = {
        "config": config,
        "checkpoint": trained / "iter_2.pth",
        "lit_ti": LIT_TI,
        "root": f"test_dataloader.dataset.data_root={config.parent / 'ade'}",
        "fifteen": "test_dataloader.dataset.metainfo.classes=" + ",".join("abcdefghijklmno"),
        "no_palette": "test_dataloader.dataset.metainfo.palette=[]",
    }
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{tool}.py", *(argument.format(**names) for argument in arguments)])
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        run_tool("mmseg", tool)
    assert "\n" not in str(caught.value)


def test_a_wrong_label_is_one_line_from_a_loader_process(config, trained):
    done = run(
        "test.py",
        config,
        trained / "iter_2.pth",
        "--cfg-options",
        "test_dataloader.num_workers=1",
        "test_dataloader.dataset.reduce_zero_label=False",
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "ADE_val_00000001.png has label 14, but the classes are 0 to 13" in done.stderr.splitlines()[-1]


def test_the_number_of_gpus_is_asked_for(config):
    assert "dist_train.sh CONFIG GPUS" in run("dist_train.sh", config).stderr
    assert "CONFIG CHECKPOINT GPUS" in run("dist_test.sh", config, "x.pth").stderr
