"""Frozen stages."""

import pytest
import timm
import torch

from litvit.errors import InputError
from litvit.runs.folder import save_weights
from litvit.training.model import find_weights, freeze_stages, keep_frozen


def tiny(name):
    sizes = {"depths": (1, 1, 1, 1)}
    if name == "lit_ti":
        return timm.create_model(name, num_classes=3, dims=(16, 32, 40, 64), mlp_ratios=(2, 2, 2, 2), **sizes)
    if name == "lvt":
        dims = {"dims": (16, 16, 32, 32), "num_heads": (1, 1, 2, 2), "class_heads": 2}
        return timm.create_model(name, num_classes=3, **dims, **sizes)
    return timm.create_model(name, num_classes=3)


def test_frozen_parts_of_each_family():
    cases = {
        "lit_ti": ("patch_embed", "stages.0", "stages.1"),
        "lvt": ("stages.0", "stages.1"),
        "resnet10t": ("conv1", "bn1", "layer1", "layer2"),
        "vit_tiny_patch16_224": ("patch_embed", "cls_token", "pos_embed", "blocks.0", "blocks.1"),
    }
    for name, parts in cases.items():
        model = tiny(name)
        freeze_stages(model, 2)
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        expected = {
            name for name, _ in model.named_parameters() if f"{name}.".startswith(tuple(f"{x}." for x in parts))
        }
        assert frozen == expected, name


def test_0_freezes_the_patch_embedding_and_more_than_all_is_refused():
    model = tiny("lit_ti")
    freeze_stages(model, 0)
    assert {name.split(".")[0] for name, x in model.named_parameters() if not x.requires_grad} == {"patch_embed"}
    freeze_stages(model, 4)
    assert {name.split(".")[0] for name, x in model.named_parameters() if x.requires_grad} <= {"norm", "head"}
    with pytest.raises(InputError, match="--freeze 5: the model has 4 stages"):
        freeze_stages(model, 5)


def test_frozen_batch_norms_keep_their_statistics():
    model = tiny("resnet10t")
    freeze_stages(model, 1)
    before = {name: value.clone() for name, value in model.named_buffers()}
    model.train()
    keep_frozen(model)
    model(torch.randn(4, 3, 64, 64))
    changed = {name.split(".")[0] for name, value in model.named_buffers() if not torch.equal(value, before[name])}
    assert changed == {"layer2", "layer3", "layer4"}


@pytest.mark.parametrize(
    "description",
    [{"model": "hf-hub:owner/name"}, {"model": "resnet18", "model_kwargs": {"checkpoint_path": "/etc/passwd"}}],
)
def test_weights_that_name_other_files_are_refused(tmp_path, description):
    """A stranger's file must not decide what else is read."""
    save_weights(tmp_path / "w.safetensors", {"w": torch.zeros(1)}, description)
    with pytest.raises(InputError, match="its model is read from elsewhere"):
        find_weights(str(tmp_path / "w.safetensors"))
