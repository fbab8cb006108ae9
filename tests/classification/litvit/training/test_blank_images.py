"""A step on blank images before a run: wrong settings in one line, before a folder is made, and nothing changed."""

import random
import re

import numpy as np
import pytest
import torch
import train

from litvit.runs.folder import CHECKPOINT
from litvit.training import build
from litvit.training.build import build_trainer, check_step
from litvit.training.recipe import parse_config

# An own model: a feature map of one value per channel, and what a test asks for.
MODULE = """
import timm, torch
from timm.models import register_model

class Net(torch.nn.Module):
    def __init__(self, num_classes=10, in_chans=3, fault=None):
        super().__init__()
        self.conv = torch.nn.Conv2d(in_chans, 8, 32, 32)
        self.register_buffer("seen", torch.zeros(()))
        self.head = torch.nn.Linear(8, num_classes)
        self.fault = fault

    def forward(self, x):
        self.seen = self.seen + len(x)  # replaced, not changed in place
        x = self.conv(x).mean((2, 3))
        if self.fault == "bug":
            return self.head(x.T)
        return x if self.fault == "no_head" else self.head(x)

@register_model
def own_net(pretrained=False, **kwargs):
    return timm.models.build_model_with_cfg(Net, "own_net", pretrained, **kwargs)
"""
RANDOM = "--mixup 0.8 --cutmix 1.0 --aug-repeats 3 --reprob 0.5 --drop-path 0.2 --drop 0.2 --model-ema --clip-grad 5"


@pytest.fixture
def flags(digits, tmp_path, tiny_flags):
    return [str(digits), *tiny_flags[:-4], "--output", str(tmp_path / "out"), "--experiment", "run", *tiny_flags[-4:]]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("-b 1", "cannot train on one image of 32 x 32 pixels at a time: --batch-size 2 or more, or a larger"),
        ("-b 1 --model resnet18 --model-kwargs", "resnet18 cannot train on one image of 32 x 32 pixels at a time: "),
        ("--model inception_v3 --model-kwargs", "inception_v3 cannot classify images with --img-size 32, --in-chans 3"),
        ("--model-kwargs drop_path_rate=1.5", "cannot train with --img-size 32, .*--model-kwargs drop_path_rate=1.5: "),
        ("--model-kwargs global_pool=", r"for 2 images and 10 classes its scores are \(2, 2, 10\), not \(2, 10\)"),
        ("--mixup 1 --model-kwargs global_pool=", r"its scores are \(2, 2, 10\), not \(2, 10\)"),
        ("--opt adahessian", "--opt adahessian cannot step: "),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_what_the_first_batch_would_find_is_one_line(flags, tmp_path, run_main, wrong, says, dry):
    outcome = run_main(train, *flags, *wrong.split(), *["--dry-run"] * dry)
    assert outcome.status == 2
    assert re.fullmatch(rf"error: .*{says}.*\n", outcome.err), outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "good",
    [
        "-b 1 --img-size 64",  # 2 x 2 tokens: enough for BatchNorm
        "-b 1 --model test_vit --model-kwargs",  # no BatchNorm
        "--model resnet18 --img-size 48 100 --model-kwargs",
        "--model vovnet39a --img-size 64 --model-kwargs",  # takes no img_size, and says so in other words
        "--in-chans 1 --mean 0.5 --std 0.5",
        "--in-chans 4 --mean 0.5 --std 0.5 --aa= --color-jitter 0.4",
        "--amp --amp-dtype bfloat16 --model-ema --grad-checkpointing",
        "--torchcompile eager",
        "--opt lookahead_sgd --layer-decay 0.8",
    ],
)
def test_settings_that_work_pass(flags, tmp_path, run_main, good):
    outcome = run_main(train, *flags, *good.split(), "--dry-run")
    assert outcome.status == 0, outcome.err
    assert not (tmp_path / "out").exists()


def test_a_resumed_run_is_checked_too(flags, tmp_path, run_main):
    assert run_main(train, *flags, "--epochs", 1, "-b", 2, "--grad-accum-steps", 10).status == 0
    before = (tmp_path / "out" / "run" / CHECKPOINT).read_bytes()
    outcome = run_main(train, *flags, "--resume", "auto", "-b", 1, "--grad-accum-steps", 20)
    assert (outcome.status, outcome.err.count("\n")) == (2, 1)
    assert "--batch-size 2 or more" in outcome.err
    assert (tmp_path / "out" / "run" / CHECKPOINT).read_bytes() == before


def random_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_nothing_changes(flags, run_main):
    trainer = build_trainer(parse_config([*flags[:-4], *RANDOM.split(), *flags[-4:]]))
    trainer.task.get_trainable_module().stages[0].eval()
    with torch.no_grad():  # as in the middle of a run
        trainer.task.get_trainable_module().stages[1].downsample.norm.running_mean.fill_(0.3)
    tensors = {name: value.clone() for name, value in trainer.task.state_dict().items()}
    modes = {name: module.training for name, module in trainer.task.named_modules()}
    states = random_states()
    check_step(trainer)
    assert states == random_states()
    assert all(torch.equal(value, tensors[name]) for name, value in trainer.task.state_dict().items())
    assert modes == {name: module.training for name, module in trainer.task.named_modules()}
    assert all(parameter.grad is None for parameter in trainer.task.parameters())
    assert not trainer.optimizer.state


def test_a_run_is_bit_for_bit_what_it_is_without_the_check(flags, tmp_path, monkeypatch):
    run = [*flags[:-4], *RANDOM.split()]
    assert build_trainer(parse_config([*run, "--experiment", "checked", *flags[-4:]])).run() == 0
    monkeypatch.setattr(build, "check_step", lambda trainer: None)
    assert build_trainer(parse_config([*run, "--experiment", "plain", *flags[-4:]])).run() == 0
    checked, plain = (torch.load(tmp_path / "out" / name / CHECKPOINT) for name in ("checked", "plain"))
    for weights in ("state_dict", "state_dict_ema"):
        assert checked[weights].keys() == plain[weights].keys()
        assert all(torch.equal(value, plain[weights][name]) for name, value in checked[weights].items())


def test_a_model_of_ones_own(digits, tmp_path, monkeypatch, run_main):
    (tmp_path / "own_net.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    flags = ["--model", "own_net", "--import", "own_net", "--img-size", 64, "-b", 20, "-j", 0, "--epochs", 1]
    flags = [digits, *flags, "--warmup-epochs", 0, "--output", tmp_path / "out", "--experiment", "run"]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # its bug, with its traceback
        run_main(train, *flags, "--model-kwargs", "fault=bug")
    outcome = run_main(train, *flags, "--model-kwargs", "fault=no_head")
    assert outcome.status == 2
    assert "for 2 images and 10 classes its scores are (2, 8), not (2, 10)" in outcome.err
    assert not (tmp_path / "out").exists()
    outcome = run_main(train, *flags)
    assert outcome.status == 0, outcome.err
    assert torch.load(tmp_path / "out" / "run" / CHECKPOINT)["state_dict"]["seen"] == 80 + 40  # no blank image


@pytest.mark.gpu
def test_the_random_numbers_of_a_gpu_stay_too(flags):
    trainer = build_trainer(parse_config([*flags[:-4], *RANDOM.split(), *flags[-4:]]))
    before = torch.cuda.get_rng_state()
    check_step(trainer)
    assert torch.equal(before, torch.cuda.get_rng_state())
