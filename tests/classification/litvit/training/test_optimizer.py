"""Parameter groups, learning rates and schedules against what was published."""

import math
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

import litvit  # noqa: F401
from litvit.dtm import DeformableTokenMerging
from litvit.training.optimizer import create_optimizer, create_scheduler, learning_rates, parameter_groups
from litvit.training.recipe import parse_config


def create(model):
    with torch.device("meta"):
        return timm.create_model(model)


def groups_by_name(model, **kwargs):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for group in parameter_groups(model, 0.05, lr=1.0, **kwargs):
        for parameter in group["params"]:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = group["weight_decay"], group["lr"]
    assert len(found) == len(names)
    return found


@pytest.mark.parametrize("name", ["lit_ti", "lit_s"])
def test_groups_decay_and_offset_factor(name):
    groups = groups_by_name(create(name))
    for parameter, (decay, factor) in groups.items():
        assert factor == (0.01 if ".offset." in parameter else 1.0), parameter
        exempt = parameter.endswith((".bias", "relative_position_bias_table")) or "norm" in parameter
        assert decay == (0 if exempt or parameter == "cls_token" else 0.05), parameter
    assert sum(".offset." in parameter for parameter in groups) == 6  # weight and bias of three modules
    if name == "lit_ti":
        assert groups["stages.0.pos_embed"][0] == groups["cls_pos_embed"][0] == 0.05


def test_layer_decay_and_offset_factor_multiply():
    plain = groups_by_name(create("lit_s"), layer_decay=0.5)
    assert plain["head.weight"][1] == 1.0
    offset, conv = (plain[f"stages.3.downsample.{part}.weight"][1] for part in ("offset", "conv"))
    assert offset == pytest.approx(0.01 * conv)
    assert conv < plain["stages.3.blocks.1.mlp.fc1.weight"][1] < 1.0


def test_other_models_have_no_offset_groups():
    assert all(group["lr"] == 0.5 for group in parameter_groups(nn.Linear(2, 2), 0.05, lr=0.5))


@pytest.mark.parametrize("model", ["lit_ti", "lit_s"])
def test_learning_rates_scale_as_published(model):
    config = parse_config(["data", "--model", model]).optim
    at_1024 = {"lr": 1e-3, "warmup_lr": 1e-6, "min_lr": 1e-5}
    assert learning_rates(config, 1024) == pytest.approx(at_1024)
    at_256 = {"lr": 2.5e-4} | ({"warmup_lr": 2.5e-7, "min_lr": 2.5e-6} if model == "lit_s" else {})
    assert learning_rates(config, 256) == pytest.approx(at_1024 | at_256)
    assert learning_rates(replace(config, lr=0.3), 256)["lr"] == 0.3


@pytest.mark.parametrize("scheduler", [None, "cosine"])
def test_offsets_learn_slowly_with_an_optimizer_of_torch(scheduler):
    merge = DeformableTokenMerging(8, 8)
    optimizer = torch.optim.SGD(parameter_groups(merge, 0.0, lr=0.1), lr=123.0)
    if scheduler:
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
        scheduler.step()
    before = [parameter.clone() for parameter in (merge.offset.weight, merge.conv.weight)]
    for parameter in merge.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    offset, conv = (
        (old - new).mean().item() for old, new in zip(before, (merge.offset.weight, merge.conv.weight), strict=True)
    )
    assert offset == pytest.approx(0.01 * conv, rel=1e-3)
    assert conv == pytest.approx(0.1 * (0.5 + 0.5 * math.cos(math.pi / 4) if scheduler else 1), rel=1e-3)


def schedule(model, steps_per_epoch):
    """Learning rate of the groups without factor by epoch and step, as the trainer steps the schedule."""
    config = parse_config(["data", "--model", model]).optim
    network = timm.create_model(model, dims=(8, 8, 24, 24), depths=(1, 1, 1, 1), num_heads=(0, 0, 1, 1))
    rates = learning_rates(config, 1024)
    optimizer = create_optimizer(network, config, rates["lr"])
    scheduler, epochs = create_scheduler(optimizer, config, rates, steps_per_epoch)

    def at(epoch, update):
        scheduler.step(epoch)
        scheduler.step_update(update)
        factors = {group["lr_scale"]: group["lr"] for group in optimizer.param_groups}
        assert factors[0.01] == pytest.approx(0.01 * factors[1.0])
        return factors[1.0]

    return at, epochs


def test_lit_ti_is_scheduled_by_epoch():
    at, epochs = schedule("lit_ti", 10)
    assert epochs == 310
    assert at(0, 0) == at(0, 9) == pytest.approx(1e-6)
    assert at(1, 10) == pytest.approx(1e-6 + (1e-3 - 1e-6) / 5)
    assert at(150, 1500) == pytest.approx(1e-5 + 0.5 * (1e-3 - 1e-5))
    assert at(299, 2999) == pytest.approx(1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * 299 / 300)))
    assert at(309, 3090) == pytest.approx(1e-5)


def test_lit_s_is_scheduled_by_update():
    at, epochs = schedule("lit_s", 10)
    assert epochs == 300
    assert at(0, 0) == pytest.approx(1e-6)
    assert at(0, 1) == pytest.approx(1e-6 + (1e-3 - 1e-6) / 200)
    assert at(20, 200) == pytest.approx(1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * 200 / 3000)))
    assert at(299, 2999) == pytest.approx(1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * 2999 / 3000)))
