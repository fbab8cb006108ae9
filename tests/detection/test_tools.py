"""The command lines of detection/, on a few drawn scenes."""

import importlib.util
import json
import os
import re
import shutil
import sys
from pathlib import Path

import forked
import pytest
import timm
import torch
from PIL import Image
from server import serve

from litvit.demo_data import SceneSettings, build
from litvit.downloads import kept_file
from litvit.errors import InputError
from litvit.openmmlab.tools import run_tool

DETECTION = Path(__file__).parents[2] / "detection"

# The demo's Mask R-CNN with a tiny backbone, on the scenes of `root`.
CONFIG = """
_base_ = "{detection}/configs/lit/mask_rcnn_lit_ti_fpn_demo.py"
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
val_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=1, val_interval=1)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(max_keep_ckpts=9))
"""


# The same of the demo's Panoptic FPN.
PANOPTIC = """
_base_ = "{detection}/configs/lvt/panoptic_fpn_lvt_fpn_demo.py"
data_root = "{root}/"
model = dict(
    backbone=dict(dims=(16, 16, 32, 32), num_heads=(1, 1, 2, 2), depths=(1, 1, 1, 1), class_heads=2, init_cfg=None),
    neck=dict(in_channels=[16, 16, 32, 32]),
)
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root))
val_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
val_evaluator = dict(
    ann_file=data_root + "annotations/panoptic_val2017.json", seg_prefix=data_root + "annotations/panoptic_val2017/"
)
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=1, val_interval=1)
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config on 4 training and 2 validation scenes of 96 x 128."""
    folder = tmp_path_factory.mktemp("detection")
    build(folder / "coco", SceneSettings("detection", train=4, val=2, image_size=96))
    file = folder / "tiny.py"
    file.write_text(CONFIG.format(detection=DETECTION, root=folder / "coco"))
    return file


def run(script, *arguments, **environment):
    return forked.run_script(DETECTION / "tools" / script, *arguments, **environment)


@pytest.fixture(scope="module")
def trained(config):
    """The folder of a run that two processes trained for an epoch on the CPU."""
    folder = config.parent / "run"
    done = run("dist_train.sh", config, 2, "--work-dir", folder)
    assert done.status == 0, done.err
    assert "Epoch(train) [1][1/1]" in done.out
    return folder


def test_an_interrupted_training_resumes(config, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    (folder / "last_checkpoint").write_text(str(folder / "epoch_1.pth"))
    done = run("train.py", config, "--work-dir", folder, "--resume", "--cfg-options", "train_cfg.max_epochs=2")
    assert done.status == 0, done.err
    assert "resumed epoch: 1" in done.out
    assert "Epoch(train) [1]" not in done.out
    assert (folder / "epoch_2.pth").exists()


def test_resume_in_a_new_folder_starts_from_the_configs_checkpoint(config, trained, tmp_path):
    """As in a job that may be interrupted. Then the run's own checkpoint is the one to go on from."""
    (tmp_path / "begun.py").write_text(f"_base_ = '{config}'\nload_from = '{trained / 'epoch_1.pth'}'\n")
    command = ["train.py", tmp_path / "begun.py", "--work-dir", tmp_path / "run", "--resume"]
    done = run(*command)
    assert done.status == 0, done.err
    assert f"Load checkpoint from {trained / 'epoch_1.pth'}" in done.out
    assert "Epoch(train) [1][2/2]" in done.out
    done = run(*command, "--cfg-options", "train_cfg.max_epochs=2")
    assert done.status == 0, done.err
    assert f"Load checkpoint from {tmp_path / 'run/epoch_1.pth'}" in done.out
    assert "resumed epoch: 1" in done.out


def test_an_epoch_that_ends_with_steps_left_out_is_neither_saved_nor_validated(config, tmp_path):
    old = tmp_path / "epoch_1.pth"
    old.touch()
    options = ["optim_wrapper.optimizer.lr=1e30", "optim_wrapper.clip_grad=None", "param_scheduler=[]"]
    options += ["train_dataloader.batch_size=1", "train_cfg.max_epochs=2", "default_hooks.checkpoint.max_keep_ckpts=1"]
    done = run("train.py", config, "--work-dir", tmp_path, "--cfg-options", *options)
    assert done.status == 3, done.err
    assert "Epoch(train) [2][4/4]" in done.out
    assert "Epoch(val)" not in done.out
    assert "not finite in the last 7 steps, up to iteration 8: start again from" in done.err.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == ["diverged.pth", "epoch_1.pth"]
    assert not old.stat().st_size


BAD_LAST_BATCH = """
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class BadLastBatch(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == runner.max_iters - 1:
            weight = next(p for p in runner.model.parameters() if p.requires_grad)
            weight.register_hook(lambda grad: torch.full_like(grad, torch.nan))
"""


def test_a_bad_batch_at_the_end_is_no_divergence(config, tmp_path):
    (tmp_path / "bad_last_batch.py").write_text(BAD_LAST_BATCH)
    (tmp_path / "config.py").write_text(
        f"_base_ = '{config}'\ncustom_imports = dict(imports=['litvit.openmmlab', 'bad_last_batch'])\n"
        "custom_hooks = [dict(type='BadLastBatch')]\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = run("train.py", tmp_path / "config.py", "--work-dir", tmp_path / "run", PYTHONPATH=path)
    assert done.status == 0, done.err
    assert "iteration 2: 1 steps left out" in done.out + done.err
    assert "Epoch(val) [1]" in done.out
    assert [file.name for file in (tmp_path / "run").glob("*.pth")] == ["epoch_1.pth"]


TWO_PARTS = """
_base_ = "{config}"
settings = dict(
    type="CocoDataset",
    data_root="{root}/",
    metainfo=dict(classes=tuple("0123456789")),
    test_mode=True,
    pipeline={{{{_base_.test_pipeline}}}},
)
first, second = (
    dict(ann_file=f"annotations/instances_{{split}}2017.json", data_prefix=dict(img=f"{{split}}2017/"))
    for split in ("val", "train")
)
parts = [dict(settings, **first), dict(settings, **second)]
test_dataloader = dict(dataset=dict(_delete_=True, type="ConcatDataset", datasets=parts))
test_evaluator = dict(
    _delete_=True,
    type="MultiDatasetsEvaluator",
    metrics=[
        dict(type="CocoMetric", ann_file="{root}/" + first["ann_file"], metric="bbox"),
        dict(type="CocoMetric", ann_file="{root}/" + second["ann_file"], metric="bbox"),
    ],
    dataset_prefixes=["first", "second"],
)
"""


def test_a_metric_for_each_of_several_data_sets(config, trained, tmp_path):
    (tmp_path / "two.py").write_text(TWO_PARTS.format(config=config, root=config.parent / "coco"))
    done = run("test.py", tmp_path / "two.py", trained / "epoch_1.pth", "--work-dir", tmp_path / "run")
    assert done.status == 0, done.err
    (numbers,) = tmp_path.glob("run/*/*.json")
    assert {"first/coco/bbox_mAP", "second/coco/bbox_mAP"} <= json.loads(numbers.read_text()).keys()


def test_no_checkpoint_runs_code_when_it_is_resumed(config, trained, tmp_path):
    checkpoint = torch.load(trained / "epoch_1.pth", weights_only=False)
    checkpoint["meta"]["config"] = f"open({str(tmp_path / 'run-by-the-checkpoint')!r}, 'w')"
    torch.save(checkpoint, tmp_path / "bad.pth")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last_checkpoint").write_text("nowhere.pth")  # the one that is named comes first
    flags = ["--work-dir", tmp_path / "run", "--resume", tmp_path / "bad.pth"]
    done = run("train.py", config, *flags, "--cfg-options", "train_cfg.max_epochs=1")
    assert done.status == 0, done.err
    assert not (tmp_path / "run-by-the-checkpoint").exists()


def test_evaluation_of_a_trained_detector(config, trained, tmp_path, monkeypatch):
    """By a link, which one of the processes fetches."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with serve(trained) as server:
        done = run("dist_test.sh", config, f"{server.address}/epoch_1.pth", 2, "--work-dir", tmp_path)
    assert done.status == 0, done.err
    assert len(server.asked) == 1
    (numbers,) = tmp_path.glob("*/*.json")
    assert {"coco/bbox_mAP_50", "coco/segm_mAP_50"} <= json.loads(numbers.read_text()).keys()


def test_imagenet_weights_that_are_not_there_are_fetched(config, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    link = timm.get_pretrained_cfg("lit_s").url
    kept_file(link).parent.mkdir(parents=True)
    torch.save(timm.create_model("lit_s", num_classes=2).state_dict(), kept_file(link))
    settings = "_base_.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='pretrained/lit_s.pth')"
    (tmp_path / "begun.py").write_text(f"_base_ = '{config}'\n{settings}\n")
    done = run("train.py", tmp_path / "begun.py", "--work-dir", tmp_path / "run")
    assert done.status == 2
    assert f"pretrained/lit_s.pth is not there: the published weights are used, {link}\n" in done.err
    assert f"error: {link} does not fit lit_ti: these are the weights of lit_s" in done.err
    (tmp_path / "begun.py").write_text((tmp_path / "begun.py").read_text().replace("lit_s.pth", "lvt.pth"))
    done = run("train.py", tmp_path / "begun.py", "--work-dir", tmp_path / "run")
    assert done.status == 2
    assert "error: no ImageNet weights at pretrained/lvt.pth: the weights of lvt lie behind a page" in done.err


def test_time_augmentation_of_boxes(config, trained, tmp_path):
    options = ["--cfg-options", "model.roi_head.mask_head=None", "test_evaluator.metric=bbox"]
    done = run("test.py", config, trained / "epoch_1.pth", "--work-dir", tmp_path, "--tta", *options)
    assert done.status == 0, done.err
    (numbers,) = tmp_path.glob("*/*.json")
    assert "coco/bbox_mAP_50" in json.loads(numbers.read_text())


def test_a_panoptic_detector(config, tmp_path, monkeypatch):
    """The best checkpoint, files of predictions, and mmdet's own interface to them, which is imported first."""
    (tmp_path / "panoptic.py").write_text(PANOPTIC.format(detection=DETECTION, root=config.parent / "coco"))
    best = ["--cfg-options", "default_hooks.checkpoint.save_best=auto"]
    done = run("train.py", tmp_path / "panoptic.py", "--work-dir", tmp_path, *best)
    assert done.status == 0, done.err
    checkpoint = tmp_path / "best_coco_panoptic_PQ_epoch_1.pth"
    files = ["test_evaluator.format_only=True", f"test_evaluator.outfile_prefix={tmp_path / 'ours'}"]
    done = run("test.py", tmp_path / "panoptic.py", checkpoint, "--work-dir", tmp_path, "--cfg-options", *files)
    assert done.status == 0, done.err
    names = [image["file_name"] for image in json.loads((tmp_path / "ours.panoptic.json").read_text())["annotations"]]
    assert sorted(path.name for path in (tmp_path / "ours.panoptic").iterdir()) == names
    flags = ["--tta", "--work-dir", str(tmp_path / "tta")]
    monkeypatch.setattr(sys, "argv", ["test.py", str(tmp_path / "panoptic.py"), str(checkpoint), *flags])
    with pytest.raises(InputError, match="--tta merges boxes"):
        run_tool("mmdet", "test")
    program = tmp_path / "infer.py"
    program.write_text(f"""
from mmdet.apis import DetInferencer
inferencer = DetInferencer({str(tmp_path / "panoptic.py")!r}, {str(checkpoint)!r}, device="cpu")
image = {str(config.parent / "coco/val2017/000000000001.jpg")!r}
(found,) = inferencer(image, out_dir={str(tmp_path / "drawn")!r}, no_save_pred=False)["predictions"]
(again,) = inferencer(image)["predictions"]
print(again["panoptic_seg"].shape, found["panoptic_seg_path"])
""")
    done = forked.run_script(program)
    assert done.status == 0, done.err
    segments = tmp_path / "drawn/preds/000000000001_panoptic_seg.png"
    assert done.out.splitlines()[-1] == f"(96, 128, 3) {segments}"
    assert (tmp_path / "drawn/vis/000000000001.jpg").exists()


def test_images_are_drawn(config, trained, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    image = config.parent / "coco" / "val2017" / "000000000001.jpg"
    with serve(trained) as server:
        checkpoint = f"{server.address}/epoch_1.pth"
        flags = ["--config", config, "--checkpoint", checkpoint, "--out", tmp_path / "new" / "folder"]
        done = run("predict.py", image, *flags, "--score-thr", "0")
    assert done.status == 0, done.err
    drawn = Image.open(tmp_path / "new" / "folder" / image.name)
    assert drawn.size == Image.open(image).size
    assert drawn.tobytes() != Image.open(image).tobytes()


def test_images_of_all_names_and_shapes_are_drawn(config, trained, tmp_path):
    """One that cannot be read is named, and the others are drawn."""
    image, folder = Image.open(config.parent / "coco" / "val2017" / "000000000001.jpg"), tmp_path / "images"
    folder.mkdir()
    for name in ("no suffix", "v1.2", "upper.JPG", "web.webp", os.fsdecode(b"bytes \xff.png")):
        image.save(folder / name, format={".webp": "webp", ".JPG": "jpeg"}.get(Path(name).suffix, "png"))
    for sides in ((4000, 10), (10, 4000), (1, 1)):
        image.resize(sides).save(folder / f"{sides[0]}.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    images = sorted(folder.iterdir())
    assert images.index(folder / "broken.jpg") < len(images) - 1
    flags = ["--config", config, "--checkpoint", trained / "epoch_1.pth", "--out", tmp_path / "out"]
    done = run("predict.py", *images, folder / "none.png", *flags, "--score-thr", "0")
    assert done.status == 2
    assert [line for line in done.err.splitlines() if line.startswith("error: ")] == [
        f"error: no image at {folder / 'none.png'}",
        f"error: {folder / 'broken.jpg'} cannot be read as an image",
    ]
    drawn = {"no suffix.png", "v1.2.png", "upper.JPG", "web.webp", os.fsdecode(b"bytes \xff.png")}
    drawn |= {"4000.png", "10.png", "1.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == drawn
    assert Image.open(tmp_path / "out" / "4000.png").size == (4000, 10)
    assert len([line for line in done.out.splitlines() if line.startswith(str(tmp_path / "out"))]) == len(drawn)


def test_wrong_input_of_predict_is_one_line(config, trained, run_main, tmp_path):
    spec = importlib.util.spec_from_file_location("predict", DETECTION / "tools/predict.py")
    predict = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(predict)
    image = config.parent / "coco" / "val2017" / "000000000001.jpg"
    broken, empty = tmp_path / "broken.jpg", tmp_path / "empty.jpg"
    broken.write_bytes(b"no image")
    empty.touch()
    (tmp_path / "wrong.py").write_text(f"_base_ = '{config}'\nmodel = dict(neck=dict(type='FPM'))")
    flags = ["--config", config, "--checkpoint", trained / "epoch_1.pth", "--out", tmp_path / "out"]
    for arguments, message in [
        ([tmp_path / "none.jpg", *flags], f"no image at {tmp_path / 'none.jpg'}"),
        ([image, *flags, "--device", "abacus"], "--device abacus: "),
        ([image, *flags, "--config", tmp_path / "wrong.py"], "the config does not fit: "),
        ([broken, *flags], f"{broken} cannot be read as an image"),
        ([empty, *flags], f"{empty} cannot be read as an image"),
        ([image, *flags, "--out", image.parent], f"the drawing of {image} would overwrite it"),
    ]:
        done = run_main(predict, *arguments)
        assert done.status == 2
        assert done.err.splitlines()[-1].startswith(f"error: {message}")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("test", ["{config}", "{checkpoint}", "--eval", "bbox", "segm"], "--eval is of an older OpenMMLab"),
        ("train", ["{config}", "--resume-from", "x.pth"], "use --resume"),
        ("train", ["nowhere.py"], "no config at nowhere.py"),
        ("train", ["{config}", "--cfg-options", "foo"], "--cfg-options takes key=value, not 'foo'"),
        (
            "train",
            ["{config}", "--cfg-options", "train_dataloader.dataset.ann_file={list_of_nothing}"],
            "list.json is no COCO annotation file: annotation file format <class 'list'>",
        ),
        (
            "test",
            ["{config}", "{checkpoint}", "--cfg-options", "test_evaluator.ann_file={list_of_nothing}"],
            "list.json is no COCO annotation file: annotation file format <class 'list'>",
        ),
        ("test", ["{config}", "{checkpoint}", "--tta"], "--tta merges boxes, and this model predicts masks"),
        ("train", ["{config}", "--resum", "{list}", "--foo"], "unrecognized arguments: --foo"),
        ("test", ["{config}", "nowhere.pth"], "no checkpoint at nowhere.pth"),
        ("train", ["{config}", "--cfg-options", "model.backbone.arch=lit_x"], "unknown arch 'lit_x'"),
        (
            "train",
            ["{config}", "--cfg-options", "train_dataloader.dataset.data_root=nowhere"],
            "no data at nowhere/annotations/instances_train2017.json",
        ),
        (
            "train",
            ["{config}", "--cfg-options", "val_dataloader.dataset.metainfo.classes=('cat','dog')"],
            "instances_val2017.json has no class cat, dog: its classes are 0, 1, 2",
        ),
        (
            "train",
            ["{config}", "--cfg-options", "train_dataloader.dataset.metainfo.classes=('cat','dog')"],
            "instances_train2017.json has no class cat, dog: its classes are 0, 1, 2",
        ),
        (
            "train",
            ["{config}", "--cfg-options", "val_dataloader.dataset.metainfo.classes=cat"],
            "metainfo.classes is the text 'cat', not a tuple of names: a tuple of one name has a comma",
        ),
        (
            "train",
            ["{config}", "--cfg-options", "val_evaluator.ann_file={other_images}"],
            "other.json has no image 1, but ",
        ),
        (
            "train",
            ["{retinanet}", "--cfg-options", "model.backbone.init_cfg.checkpoint=none.pth"],
            "no ImageNet weights at none.pth",
        ),
        (
            "test",
            ["{config}", "{checkpoint}", "--cfg-options", "model.backbone.depths=(1,1,2,1)"],
            "epoch_1.pth does not fit the config",
        ),
        (
            "train",
            ["{config}", "--cfg-options", "load_from={checkpoint}", "model.backbone.depths=(1,1,2,1)"],
            "and backbone.stages.2.blocks.1.norm1.weight",
        ),
        (
            "train",
            [
                *("{config}", "--cfg-options", "load_from={checkpoint}", "model.backbone.depths=(1,1,2,1)"),
                "model.rpn_head.feat_channels=32",
            ],
            "and backbone.stages.2.blocks.1.norm1.weight",
        ),
        (
            "train",
            ["{config}", "--resume", "{checkpoint}", "--cfg-options", "model.rpn_head.feat_channels=32"],
            "its backbone does, its heads do not",
        ),
        (
            "train",
            ["{config}", "--cfg-options", "model.roi_head.bbox_head.num_classes=3"],
            "roi_head.bbox_head has 3 classes, the data set 10",
        ),
        ("train", ["{config}", "--cfg-options", "model.neck.type=FPM"], "the config does not fit: "),
        ("train", ["{config}", "--cfg-options", "model.bakbone=1"], "the config does not fit: "),
        ("test", ["{config}", "{list}"], "is no checkpoint of a model"),
        ("train", ["{syntax}"], "the config cannot be read: "),
    ],
)
def test_wrong_input_is_one_line(tool, arguments, message, config, trained, tmp_path, monkeypatch):
    names = {
        "config": config,
        "checkpoint": trained / "epoch_1.pth",
        "list": tmp_path / "list.pth",
        "list_of_nothing": tmp_path / "list.json",
        "other_images": tmp_path / "other.json",
        "syntax": tmp_path / "syntax.py",
        "retinanet": DETECTION / "configs/lit/retinanet_lit_ti_fpn_1x_coco.py",
    }
    torch.save([torch.zeros(1)], names["list"])
    names["syntax"].write_text("model = dict(")
    names["list_of_nothing"].write_text("[]")
    truth = json.loads((config.parent / "coco/annotations/instances_val2017.json").read_text())
    for entry in (*truth["images"], *truth["annotations"]):
        entry["id"] += 100
        if "image_id" in entry:
            entry["image_id"] += 100
    names["other_images"].write_text(json.dumps(truth))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{tool}.py", *(argument.format(**names) for argument in arguments)])
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        run_tool("mmdet", tool)
    assert "\n" not in str(caught.value)


# A user's backbone with a bug, and a data set with another one.
MODULE = """
import torch
from mmdet.datasets import CocoDataset
from mmengine.registry import DATASETS, MODELS

@MODELS.register_module()
class UsersBackbone(torch.nn.Module):
    def __init__(self):
        {constructor}

@DATASETS.register_module()
class UsersDataset(CocoDataset):
    def load_data_list(self):
        return super().load_data_list()["images"]
"""


@pytest.mark.parametrize(
    ("constructor", "setting", "error"),
    [
        ("len(5)", "model = dict(backbone=backbone)", "TypeError: object of type 'int' has no len()"),
        ("raise RuntimeError('bug')", "model = dict(backbone=backbone)", "RuntimeError: bug"),
        ("pass", "train_dataloader = dict(dataset=dict(type='UsersDataset'))", "TypeError: list indices must be"),
    ],
)
def test_a_bug_in_the_users_own_code_keeps_its_traceback(constructor, setting, error, config, tmp_path):
    (tmp_path / "users_module.py").write_text(MODULE.format(constructor=constructor))
    (tmp_path / "config.py").write_text(
        f"""
_base_ = "{config}"
custom_imports = dict(imports=["litvit.openmmlab", "users_module"])
backbone = dict(_delete_=True, type="UsersBackbone")
{setting}
"""
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = run("train.py", tmp_path / "config.py", "--work-dir", tmp_path / "run", PYTHONPATH=path)
    assert done.status == 1
    assert f'File "{tmp_path / "users_module.py"}"' in done.err
    assert done.err.splitlines()[-1].startswith(error)


def test_several_processes_report_it_once(config):
    done = run("dist_test.sh", config, "nowhere.pth", 2)
    assert done.status == 2
    assert [line for line in done.err.splitlines() if "nowhere" in line] == ["error: no checkpoint at nowhere.pth"]
    assert "Traceback" not in done.err


@pytest.mark.parametrize(("number", "status"), [("0", 2), ("3", 0)])
def test_one_process_of_slurm_reports_it(number, status, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("SLURM_LOCALID", number)
    done = run("train.py", "nowhere.py", "--launcher", "slurm")
    assert (done.status, done.err) == (status, "error: no config at nowhere.py\n" if status else "")


def test_no_process_waits_for_one_that_refused_a_checkpoint(config, trained):
    flags = ["--cfg-options", "model.backbone.depths=(1,1,2,1)"]
    done = run("dist_test.sh", config, trained / "epoch_1.pth", 2, *flags)
    assert done.status == 2
    assert "Traceback" not in done.err
    assert "does not fit the config" in done.err.splitlines()[-1]


@pytest.mark.parametrize("tool", ["train", "test"])
def test_help_lists_the_flags_of_all_commands(tool, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{tool}.py", "--help"])
    with pytest.raises(SystemExit):
        run_tool("mmdet", tool)
    assert "--traceback" in capsys.readouterr().out


def test_the_number_of_gpus_is_required(config):
    assert "dist_train.sh CONFIG GPUS" in run("dist_train.sh", config).err
    done = run("dist_train.sh", config, "many")
    assert done.status == 2
    assert "'many' is no number of GPUs" in done.err


# The small config for data of one's own, with a tiny backbone.
OWN = """
_base_ = "{detection}/configs/finetune/mask_rcnn_lit_small.py"
model = dict(
    backbone=dict(dims=(16, 32, 40, 64), depths=(1, 1, 1, 1), mlp_ratios=(2, 2, 2, 2), img_size=64),
    neck=dict(in_channels=[16, 32, 40, 64]),
)
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False)
val_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False)
test_dataloader = val_dataloader
"""


def test_a_folder_of_coco_files_is_enough(config, tmp_path):
    """With masks, and from the weights of a detector or of its backbone; the run's own config evaluates."""
    (tmp_path / "own.py").write_text(OWN.format(detection=DETECTION))
    for number, weights in enumerate(("", tmp_path / "0/iter_2.pth")):
        options = [f"data_root={config.parent / 'coco'}", f"own_data.weights={weights}", "own_data.iterations=2"]
        folder = tmp_path / str(number)
        done = run("train.py", tmp_path / "own.py", "--work-dir", folder, "--cfg-options", *options)
        assert done.status == 0, done.err
        assert "coco/segm_mAP" in done.out
        assert (f"Load checkpoint from {weights}" in done.out) == bool(weights)
    done = run("test.py", tmp_path / "0/own.py", tmp_path / "0/iter_2.pth", "--work-dir", tmp_path / "test")
    assert done.status == 0, done.err
    assert "coco/bbox_mAP" in done.out
