"""The command lines of segmentation/, on a few drawn scenes and on a data set in ADE20K's layout."""

import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DefaultScope
from mmseg.datasets import BaseSegDataset
from mmseg.registry import MODELS
from PIL import Image
from server import serve

from litvit.demo_data import PALETTE, SceneSettings, build
from litvit.errors import InputError
from litvit.openmmlab import load_from_file
from litvit.openmmlab.checks import check_annotations, check_files
from litvit.openmmlab.errors import SampleError
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

# Another number of classes, and a learning rate of 0: weights stay as they were loaded.
FIFTEEN = """
_base_ = "{config}"
load_from = "{checkpoint}"
classes = dict(metainfo=dict(classes=list("abcdefghijklmno"), palette=[]))
train_dataloader = dict(dataset=classes)
val_dataloader = dict(dataset=classes)
test_dataloader = val_dataloader
model = dict(decode_head=dict(num_classes=15, loss_decode=dict(class_weight=None)))
optim_wrapper = dict(optimizer=dict(lr=0))
train_cfg = dict(max_iters=1, val_interval=2)
"""
PRETRAINED = "_base_.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='nowhere.pth')\n"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config on 4 training and 2 validation scenes of 96 x 128."""
    folder = tmp_path_factory.mktemp("segmentation")
    build(folder / "ade", SceneSettings("segmentation", train=4, val=2, image_size=96))
    file = folder / "tiny.py"
    file.write_text(CONFIG.format(segmentation=SEGMENTATION, root=folder / "ade"))
    return file


def run(script, *arguments, **environment):
    return forked.run_script(SEGMENTATION / "tools" / script, *arguments, **environment)


@pytest.fixture(scope="module")
def trained(config):
    """The folder of a run that two processes trained for two iterations on the CPU."""
    folder = config.parent / "run"
    done = run("dist_train.sh", config, 2, "--work-dir", folder)
    assert done.status == 0, done.err
    assert "Iter(train) [2/2]" in done.out
    return folder


def test_an_interrupted_training_resumes(config, trained, tmp_path):
    """Also one that began with a trained segmentor, needs no ImageNet weights any more, and was cut off saving."""
    folder, file = shutil.copytree(trained, tmp_path / "run"), tmp_path / "begun.py"
    cut = folder / "iter_2.pth"
    cut.write_bytes(cut.read_bytes()[:-1000])
    (folder / "last_checkpoint").write_text(str(cut))
    file.write_text(f"_base_ = '{config}'\nload_from = '{trained / 'iter_2.pth'}'\n{PRETRAINED}")
    done = run("train.py", file, "--work-dir", folder, "--resume")
    assert done.status == 0, done.err
    assert f"{cut} is damaged or missing: {folder / 'iter_1.pth'} is used instead" in done.err
    assert "resumed epoch: 0, iter: 1" in done.out
    assert "Iter(train) [1/2]" not in done.out
    assert "Iter(train) [2/2]" in done.out
    assert load_from_file(cut)["meta"]["iter"] == 2
    assert {file.name for file in folder.glob("*.pth*")} == {"iter_1.pth", "iter_2.pth", "iter_2.pth.damaged"}


def start(*arguments):
    """Start train.py, and return its process once it trains."""
    command = [sys.executable, SEGMENTATION / "tools/train.py", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=environment, **pipes)
    for line in process.stdout:
        if "Iter(train)" in line:
            break
    return process


def test_a_training_that_is_interrupted_or_loses_its_data_is_saved(config, tmp_path):
    ends = ["train_cfg.max_iters=4000", "train_cfg.val_interval=4000", "default_hooks.checkpoint.interval=4000"]
    data, work_dir = shutil.copytree(config.parent / "ade", tmp_path / "ade"), tmp_path / "run"
    (tmp_path / "config.py").write_text(
        f"_base_ = '{config}'\ntrain_dataloader = dict(num_workers=1, dataset=dict(data_root='{data}'))\n"
    )
    command = [tmp_path / "config.py", "--work-dir", work_dir, "--resume", "--cfg-options", *ends]
    first = start(*command)
    first.send_signal(signal.SIGTERM)
    output = first.communicate(timeout=60)[0].splitlines()
    iteration = load_from_file(work_dir / "last.pth")["meta"]["iter"]
    assert first.returncode == 75
    assert f"SIGTERM: saved at iteration {iteration}; the same command with --resume continues" in output[-1]
    second = start(*command)
    data.rename(tmp_path / "gone")
    output = second.communicate(timeout=60)[0].splitlines()
    assert second.returncode == 2
    assert re.match(r"error: \S*/ade/\S+ cannot be read: FileNotFoundError: ", output[-1])
    assert load_from_file(work_dir / "last.pth")["meta"]["iter"] > iteration
    assert (work_dir / "last_checkpoint").read_text() == str(work_dir / "last.pth")


def test_two_tasks_of_slurm_train_and_test(config, slurm, tmp_path, monkeypatch):
    """On the CPU, under a stand-in for Slurm."""
    monkeypatch.setenv("GPUS", "2")
    monkeypatch.setenv("CPUS_PER_TASK", "1")
    done = run("slurm_train.sh", "partition", "name", config, tmp_path / "run")
    assert done.status == 0, done.err
    assert "Iter(train) [2/2]" in done.out
    assert "Distributed training: True" in done.out
    assert "GPU number: 2" in done.out
    done = run("slurm_test.sh", "partition", "name", config, tmp_path / "run/iter_2.pth")
    assert done.status == 0, done.err
    assert done.out.count("mIoU:") == 1


def test_a_trained_segmentor_of_other_classes_to_start_from(config, trained, tmp_path):
    """With --resume, as in a job that may be interrupted, while there is nothing to resume yet."""
    (tmp_path / "fifteen.py").write_text(FIFTEEN.format(config=config, checkpoint=trained / "iter_2.pth") + PRETRAINED)
    done = run("train.py", tmp_path / "fifteen.py", "--work-dir", tmp_path / "run", "--resume")
    assert done.status == 0, done.err
    assert "Iter(train) [1/1]" in done.out
    start, end = (load_from_file(file)["state_dict"] for file in (trained / "iter_2.pth", tmp_path / "run/iter_1.pth"))
    assert end["decode_head.conv_seg.weight"].shape[0] == 15
    for name, parameter in start.items():
        if name.endswith("weight") and "conv_seg" not in name:
            assert torch.equal(end[name], parameter), name


def test_resume_of_the_config(config, trained, tmp_path, monkeypatch):
    folder = shutil.copytree(trained, tmp_path / "run")
    before = (folder / "iter_1.pth").read_bytes()
    (tmp_path / "resume.py").write_text(f"_base_ = '{config}'\nresume = True\ntrain_cfg = dict(max_iters=3)\n")
    monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path / "resume.py"), "--work-dir", str(folder)])
    run_tool("mmseg", "train")
    assert load_from_file(folder / "iter_3.pth")["meta"]["iter"] == 3
    assert (folder / "iter_1.pth").read_bytes() == before


def test_a_training_that_diverges_ends(config, tmp_path):
    """In both processes, with the checkpoint before the second step in a row was left out, and without validation."""
    options = ["optim_wrapper.optimizer.lr=1e30", "optim_wrapper.clip_grad=None", "param_scheduler=[]"]
    options += ["train_cfg.max_iters=30", "train_cfg.val_interval=3", "default_hooks.checkpoint.max_keep_ckpts=1"]
    done = run("dist_train.sh", config, 2, "--work-dir", tmp_path, "--cfg-options", *options)
    assert done.status == 3, done.err
    assert "iteration 11: 10 steps left out, the loss or a gradient is not finite" in done.out + done.err
    assert "Iter(val)" not in done.out
    error = done.err.splitlines()[-1]
    assert error.startswith("error: the loss or a gradient was not finite in the last 10 steps, up to iteration 11: ")
    assert error.endswith(f"the state is in {tmp_path / 'diverged.pth'}")
    assert "Traceback" not in done.err
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == ["diverged.pth", "iter_2.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == str(tmp_path / "iter_2.pth")


def test_evaluation_of_a_trained_segmentor(config, trained, tmp_path, monkeypatch):
    """By a link."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with serve(trained) as server:
        checkpoint = f"{server.address}/iter_2.pth"
        done = run("test.py", config, checkpoint, "--work-dir", tmp_path, "--out", tmp_path / "maps")
    assert done.status == 0, done.err
    (numbers,) = tmp_path.glob("*/*.json")
    assert json.loads(numbers.read_text()).keys() >= {"mIoU", "mAcc", "aAcc"}
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == [f"ADE_val_0000000{i}.png" for i in (1, 2)]


def test_images_are_drawn_with_a_legend(config, trained, tmp_path):
    original = Image.open(config.parent / "ade/images/validation/ADE_val_00000001.jpg")
    image = tmp_path / "image.png"
    original.save(image)
    # The pipeline of the test's data is what counts, as for test.py.
    (tmp_path / "other.py").write_text(f"_base_ = '{config}'\ntest_pipeline = [dict(type='Nothing')]")
    flags = ["--config", tmp_path / "other.py", "--checkpoint", trained / "iter_2.pth"]
    flags += ["--out", tmp_path / "new" / "folder"]
    done = run("predict.py", image, *flags, "--opacity", "1")
    assert done.status == 0, done.err
    drawn = Image.open(tmp_path / "new" / "folder" / image.name)
    assert drawn.height == original.height
    assert drawn.width > original.width
    colors = {color for _, color in drawn.crop((0, 0, *original.size)).getcolors()}
    assert colors <= set(PALETTE)
    legend = {color for _, color in drawn.crop((original.width, 0, *drawn.size)).getcolors(1000)}
    assert legend & set(PALETTE) == colors


def test_an_image_of_a_shape_that_the_model_does_not_take_is_named(config, trained, tmp_path):
    resize = "dict(type='Resize', scale=(512, 128), keep_ratio=True)"
    pipeline = f"[dict(type='LoadImageFromFile'), {resize}, dict(type='PackSegInputs')]"
    (tmp_path / "resize.py").write_text(
        f"_base_ = '{config}'\ntest_dataloader = dict(dataset=dict(pipeline={pipeline}))"
    )
    original = Image.open(config.parent / "ade/images/validation/ADE_val_00000001.jpg")
    original.resize((4000, 10)).save(tmp_path / "a strip.png")
    original.save(tmp_path / "image", format="png")
    images = [tmp_path / "a strip.png", tmp_path / "image"]
    flags = ["--config", tmp_path / "resize.py", "--checkpoint", trained / "iter_2.pth", "--out", tmp_path / "out"]
    done = run("predict.py", *images, *flags)
    assert done.status == 2
    assert f"error: {images[0]}, 4000 x 10 pixels, cannot be predicted: images must have 32" in done.err
    assert "Traceback" not in done.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["image.png"]


def test_wrong_input_of_predict_is_one_line(config, run_main, tmp_path):
    spec = importlib.util.spec_from_file_location("predict", SEGMENTATION / "tools/predict.py")
    predict = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(predict)
    image = config.parent / "ade/images/validation/ADE_val_00000001.jpg"
    copy = Path(shutil.copy(image, tmp_path))
    (tmp_path / "wrong.py").write_text(f"_base_ = '{config}'\nmodel = dict(neck=dict(type='FPM'))")
    flags = ["--config", config, "--checkpoint", tmp_path / "none.pth", "--out", tmp_path / "out"]
    for arguments, message in [
        ([tmp_path / "none.jpg", *flags], f"no image at {tmp_path / 'none.jpg'}"),
        ([image, *flags, "--opacity", "2"], "--opacity is 2.0, but must be"),
        ([image, *flags], f"no checkpoint at {tmp_path / 'none.pth'}"),
        ([image, *flags, "--device", "abacus"], "--device abacus: "),
        ([image, *flags, "--config", tmp_path / "wrong.py"], "the config does not fit: "),
        ([image, *flags, "--out", image.parent], f"the drawing of {image} would overwrite it: name another folder"),
        ([image, *flags, "--cfg-options", "test"], "--cfg-options takes key=value, not 'test'"),
        ([image, *flags, "--cfg-options", "model.neck.type=FPM"], "the config does not fit: "),
        ([image, copy, *flags], f"{image} and {copy} have the same name: draw them into two folders"),
        ([image, *flags, "--out", copy], f"--out {copy} is a file"),
    ]:
        done = run_main(predict, *arguments)
        assert done.status == 2
        assert done.err.splitlines()[-1].startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """150 classes of random rectangles in ADE20K's layout, in images of several odd sizes."""
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


def reduced(published, shapes, factor, file):
    """Write a published config at a fraction of its sizes, on the shapes."""
    config = Config.fromfile(published)
    config.model.backbone.init_cfg = None
    config.model.data_preprocessor.size = crop_size = (512 // factor, 512 // factor)
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader |= {"num_workers": 0, "persistent_workers": False}
        loader.dataset.data_root = str(shapes)
    for pipeline in (
        config.train_dataloader.dataset.pipeline,
        config.test_dataloader.dataset.pipeline,
        config.test_pipeline,
        config.tta_pipeline[1].transforms[0],
    ):
        for step in pipeline:
            step |= {"scale": tuple(side // factor for side in step.scale)} if "scale" in step else {}
            step |= {"crop_size": crop_size} if step.type == "RandomCrop" else {}
    config.train_cfg |= {"max_iters": 1, "val_interval": 2}
    config.dump(file)
    return config


def test_published_config_on_another_data_set(shapes, tmp_path):
    """SegFormer's, at a quarter of its size."""
    file, checkpoint = tmp_path / "quarter.py", tmp_path / "iter_1.pth"
    reduced(LVT, shapes, 4, file)
    done = run("train.py", file, "--work-dir", tmp_path)
    assert done.status == 0, done.err
    slide = ["model.test_cfg.mode=slide", "model.test_cfg.crop_size=96,96", "model.test_cfg.stride=64,64"]
    done = run("test.py", file, checkpoint, "--work-dir", tmp_path / "test", "--cfg-options", *slide)
    assert done.status == 0, done.err
    (numbers,) = (tmp_path / "test").glob("*/*.json")
    assert "mIoU" in json.loads(numbers.read_text())
    images = sorted((shapes / "images" / "validation").iterdir())
    done = run("predict.py", *images, "--config", file, "--checkpoint", checkpoint, "--out", tmp_path / "out")
    assert done.status == 0, done.err
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == [image.name for image in images]


@pytest.mark.parametrize("published", [LIT_TI, LVT])
def test_test_time_augmentation(published, shapes, tmp_path, monkeypatch):
    file, checkpoint = tmp_path / "eighth.py", tmp_path / "segmentor.pth"
    config = reduced(published, shapes, 8, file)
    load, augment = config.tta_pipeline
    *changes, _, pack = augment.transforms
    torch.manual_seed(0)  # with some weights all views give the same labels
    with DefaultScope.overwrite_default_scope("mmseg"):
        model = MODELS.build(config.model).eval()
        views = [Compose([load, *steps, *pack]) for steps in itertools.product(*changes)]
    assert len(views) == 12
    torch.save({"state_dict": model.state_dict()}, checkpoint)
    flags = ["--work-dir", str(tmp_path), "--tta", "--out", str(tmp_path / "maps")]
    monkeypatch.setattr(sys, "argv", ["test.py", str(file), str(checkpoint), *flags])
    run_tool("mmseg", "test")
    (numbers,) = tmp_path.glob("*/*.json")
    assert json.loads(numbers.read_text()).keys() >= {"mIoU", "mAcc", "aAcc"}
    for image in (shapes / "images" / "validation").iterdir():
        probabilities = []
        for view in views:
            sample = view({"img_path": str(image)})
            (seen,) = model.test_step({name: [value] for name, value in sample.items()})
            probabilities.append(seen.seg_logits.data.softmax(0))
        labels = torch.from_numpy(np.array(Image.open(tmp_path / "maps" / f"{image.stem}.png"))).int() - 1
        expected = torch.stack(probabilities).mean(0).argmax(0)
        assert (labels == expected).float().mean() > 0.99
        assert all((x.argmax(0) == expected).float().mean() < 0.99 for x in probabilities)


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("test", ["{config}", "{checkpoint}", "--aug-test"], "use --tta"),
        ("test", ["{no_tta}", "{checkpoint}", "--tta"], "the config has no tta_pipeline"),
        (
            "train",
            [*("{config}", "--resume", "--cfg-options", "load_from={checkpoint}"), "model.decode_head.channels=32"],
            "its backbone does, its heads do not",
        ),
        (
            "train",
            ["{config}", "--cfg-options", "train_dataloader.dataset.pipeline.1.reduce_zero_label=False"],
            "the data set has reduce_zero_label=True, LoadAnnotations in its pipeline (pipeline.1) "
            "reduce_zero_label=False",
        ),
        (
            "train",
            ["{config}", "--cfg-options", "val_dataloader.dataset.metainfo.classes=water"],
            "metainfo.classes is the text 'water', not a tuple of names",
        ),
        (
            "train",
            ["{config}", "--cfg-options", "train_dataloader.dataset.metainfo.palette=255,0,0"],
            "metainfo.palette is [255, 0, 0], not a list of colours",
        ),
        (
            "train",
            ["{config}", "--cfg-options", "model.decode_head.ignore_index=3"],
            "decode_head.ignore_index is 3, but the data set's label of void pixels is 255",
        ),
        (
            "train",
            ["{config}", "--cfg-options", "val_evaluator.ignore_index=3"],
            "IoUMetric.ignore_index is 3, but the data set's label of void pixels is 255",
        ),
        (
            "train",
            ["{lit_ti}", "--cfg-options", "model.backbone.init_cfg=None"],
            "no data at data/ade/ADEChallengeData2016/images/training",
        ),
        (
            "train",
            ["{config}", "--cfg-options", "train_dataloader.dataset.img_suffix=.png"],
            "set img_suffix='.png' or what they end in",
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
        (
            "train",
            ["{config}", "--cfg-options", "optim_wrapper.optimizer.type=AdamX"],
            "the optimizer {{'type': 'AdamX', 'lr': 0.003, 'weight_decay': 0.05}} does not fit: unknown type 'AdamX', "
            "did you mean Adam",
        ),
        (
            "train",
            ["{config}", "--cfg-options", "optim_wrapper.optimizer.lr=abc"],
            " does not fit: TypeError: ",
        ),
        ("train", ["{config}", "--cfg-options", "train_dataloader.batch_size=0"], "batch_size should be a positive"),
        (
            "train",
            ["{config}", "--cfg-options", "train_dataloader.sampler.type=Samp"],
            "the dataloader does not fit: KeyError",
        ),
        (
            "train",
            ["{config}", "--cfg-options", "model.backbone.init_cfg.type=Pretrained"],
            "the config does not fit: ",
        ),
        ("train", ["{config}", "--cfg-options", "model.backbone.out_indices=0,1"], "gives 2 levels, the neck takes 4"),
        ("train", ["{config}", "--work-dir", "{config}"], "tiny.py cannot be used: "),
        ("train", ["{config}", "--cfg-options", "train_dataloder.batch_size=1"], "did you mean train_dataloader?"),
        ("train", ["{config}", "--cfg-options", "data.samples_per_gpu=1"], "data: the config has no such setting"),
        ("train", ["{config}", "--resume", "--cfg-options", "load_from={weights}"], "weights only, not where"),
        ("train", ["{config}", "--cfg-options", "load_from={bare}"], "bare.pth holds only a backbone"),
        ("test", ["{config}", "{published}"], "published.pth holds only a backbone"),
        ("train", ["{config}", "--work-dir", "{cut}", "--resume"], "no checkpoint of {cut} is whole, nor "),
    ],
)
def test_wrong_input_is_one_line(tool, arguments, message, config, trained, tmp_path, monkeypatch):
    names = {
        "config": config,
        "no_tta": tmp_path / "no_tta.py",
        "checkpoint": trained / "iter_2.pth",
        "lit_ti": LIT_TI,
        "root": f"test_dataloader.dataset.data_root={config.parent / 'ade'}",
        "fifteen": "test_dataloader.dataset.metainfo.classes=" + ",".join("abcdefghijklmno"),
        **{name: tmp_path / f"{name}.pth" for name in ("weights", "bare", "published")},
        "cut": tmp_path / "cut",
        "no_palette": "test_dataloader.dataset.metainfo.palette=[]",
    }
    weights = load_from_file(trained / "iter_2.pth")["state_dict"]
    torch.save({"state_dict": weights}, names["weights"])
    bare = {name[9:]: value for name, value in weights.items() if name.startswith("backbone.")}
    torch.save(bare, names["bare"])
    torch.save({"model": bare}, names["published"])
    names["cut"].mkdir()
    (names["cut"] / "iter_1.pth").write_bytes((trained / "iter_1.pth").read_bytes()[:-100])
    (names["cut"] / "last_checkpoint").write_text("nowhere/iter_2.pth")
    names["no_tta"].write_text(f"_base_ = '{config}'\n_base_.pop('tta_pipeline', None)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{tool}.py", *(argument.format(**names) for argument in arguments)])
    with pytest.raises(InputError, match=re.escape(message.format(**names))) as caught:
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
    assert done.status == 2
    assert "Traceback" not in done.err
    assert "ADE_val_00000001.png has label 14, but the classes are 0 to 13" in done.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((75, 100, 3), dtype=np.uint8), "0.png has 3 channels, but a pixel's label is one number"),
        (np.zeros((100, 75), dtype=np.uint8), "0.png is 100 x 75 pixels high x wide, its image {image} 75 x 100"),
        (np.full((75, 100), 4, dtype=np.uint8), "0.png has label 4, but the classes are 1 to 3"),
        (np.full((75, 100), 258, dtype=np.uint16), "0.png has label 258, but the classes are 1 to 3"),
        (None, "labels/0.png cannot be read: OSError: "),
        (b"", "labels/0.png cannot be read: UnidentifiedImageError: "),
    ],
)
def test_wrong_annotations(labels, message, tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    image = tmp_path / "images" / "0.jpg"
    Image.new("RGB", (100, 75)).save(image)
    file = tmp_path / "labels" / "0.png"
    noise = np.random.default_rng(0).integers(4, size=(75, 100), dtype=np.uint8)
    Image.fromarray(labels if isinstance(labels, np.ndarray) else noise).save(file)
    if labels is None:
        file.write_bytes(file.read_bytes()[:-500])
    elif isinstance(labels, bytes):
        file.write_bytes(labels)
    config = Config.fromfile(LVT)
    for pipeline in (config.train_pipeline, config.test_pipeline, config.tta_pipeline):
        with DefaultScope.overwrite_default_scope("mmseg"):
            dataset = BaseSegDataset(
                metainfo={"classes": ("a", "b", "c")},
                data_root=str(tmp_path),
                data_prefix={"img_path": "images", "seg_map_path": "labels"},
                reduce_zero_label=True,
                pipeline=pipeline,
            )
        check_annotations(dataset, num_classes=3)
        check_files(dataset.pipeline)
        with pytest.raises(SampleError, match=re.escape(message.format(image=image))) as caught:
            dataset[0]
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no image"])
def test_a_broken_image_is_named(content, tmp_path):
    (tmp_path / "0.jpg").write_bytes(content)
    pipeline = Compose([{"type": "LoadImageFromFile"}])
    check_files(pipeline)
    with pytest.raises(SampleError, match="0.jpg cannot be read: ") as caught:
        pipeline({"img_path": str(tmp_path / "0.jpg")})
    assert "\n" not in str(caught.value)


def test_annotations_are_listed_by_folder(tmp_path, monkeypatch):
    (tmp_path / "labels").mkdir()
    for i in range(100):
        (tmp_path / "labels" / f"{i}.png").touch()
    (tmp_path / "names.txt").write_text("\n".join(map(str, range(100))))
    dataset = BaseSegDataset(
        ann_file="names.txt",
        metainfo={"classes": ("a", "b")},
        data_root=str(tmp_path),
        data_prefix={"img_path": "images", "seg_map_path": "labels"},
    )
    asked, stat = [], os.stat
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda path, **flags: asked.append(path) or stat(path, **flags))
        patch.setattr(os.path, "isdir", lambda path: asked.append(path) or stat(path))
        patch.setattr(os.path, "exists", os.path.isdir)
        patch.setattr(os.path, "isfile", os.path.isdir)
        check_annotations(dataset, num_classes=2)
    assert 1 <= len(asked) < 10
    (tmp_path / "labels/17.png").unlink()
    with pytest.raises(InputError, match="17.jpg has no annotation at .*labels/17.png: put it there"):
        check_annotations(dataset, num_classes=2)


def test_the_number_of_gpus_is_required(config):
    assert "dist_train.sh CONFIG GPUS" in run("dist_train.sh", config).err
    assert "CONFIG CHECKPOINT GPUS" in run("dist_test.sh", config, "x.pth").err


# The small config for data of one's own, with a tiny backbone.
OWN = """
_base_ = "{segmentation}/configs/finetune/fpn_lit_small.py"
model = dict(
    backbone=dict(dims=(16, 32, 40, 64), depths=(1, 1, 1, 1), mlp_ratios=(2, 2, 2, 2), img_size=64),
    neck=dict(in_channels=[16, 32, 40, 64]),
)
train_dataloader = dict(num_workers=0, persistent_workers=False)
val_dataloader = dict(num_workers=0, persistent_workers=False)
test_dataloader = val_dataloader
"""


def test_a_folder_of_images_and_masks_is_enough(tmp_path):
    """Bright discs on a dark ground are learned, and the run's own config evaluates and predicts without flags."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:64, :64]
    for folder in ("images", "masks"):
        (tmp_path / "cells" / folder).mkdir(parents=True)
    for i in range(10):
        row, column = random.integers(16, 48, 2)
        disc = (y - row) ** 2 + (x - column) ** 2 < 12**2
        pixels = random.integers(0, 60, (64, 64, 3)) + 150 * disc[..., None]
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"cells/images/{i}.jpg")
        Image.fromarray(disc.astype(np.uint8) * 255).save(tmp_path / f"cells/masks/{i}.png")
    (tmp_path / "own.py").write_text(OWN.format(segmentation=SEGMENTATION))
    options = [f"data_root={tmp_path / 'cells'}", "own_data.weights=", "own_data.iterations=60"]
    done = run("train.py", tmp_path / "own.py", "--work-dir", tmp_path / "run", "--cfg-options", *options)
    assert done.status == 0, done.err
    assert "8 + 2 pairs of images and masks" in done.err
    assert "labels and classes: 0 0 (weight" in done.err
    config, checkpoint = tmp_path / "run/own.py", (tmp_path / "run/last_checkpoint").read_text()
    done = run("test.py", config, checkpoint, "--work-dir", tmp_path / "test")
    assert done.status == 0, done.err
    assert float(re.search(r"mIoU: ([\d.]+)", done.out)[1]) > 80
    done = run(
        "predict.py", tmp_path / "cells/images/0.jpg", "--config", config, "--checkpoint", checkpoint,
        "--out", tmp_path / "drawn",
    )  # fmt: skip
    assert done.status == 0, done.err
    done = run(
        "predict.py", tmp_path / "cells/images/0.jpg", "--config", tmp_path / "own.py", "--checkpoint", checkpoint,
        "--out", tmp_path / "drawn",
    )  # fmt: skip
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert "own.py of the run's folder" in done.err
