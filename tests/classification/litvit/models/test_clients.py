"""What torch.fx, torch.func, hooks, and timm's extractors and utilities make of the models."""

import copy
import pickle
import zlib

import pytest
import timm
import torch
from timm.layers import set_fused_attn
from timm.utils import AttentionExtract
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import litvit  # noqa: F401 (registers the models)
from litvit.errors import InputError

SMALL = {
    "lit_ti": {"img_size": 64, "dims": (8, 16, 32, 64), "depths": (1, 1, 1, 1), "num_heads": (0, 0, 2, 4)},
    "lit_s": {"img_size": 64, "dims": (8, 16, 32, 64), "depths": (1, 1, 1, 1), "num_heads": (0, 0, 2, 4)},
    "pvt_small": {"img_size": 64, "dims": (8, 16, 32, 64), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 4)},
    "litv2_s": {"dims": (8, 16, 32, 64), "depths": (1, 1, 1, 1), "num_heads": (0, 0, 2, 4)},
    "lvt": {"dims": (8, 8, 16, 32), "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 4), "class_heads": 4},
}
every_model = pytest.mark.parametrize("name", SMALL)


def small(name, **kwargs):
    """A model whose weights depend on the names of the layers alone, under whichever extractor of timm."""
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL[name], **kwargs)
    for path, parameter in model.named_parameters():
        if parameter.dim() > 1:
            layer = path.removeprefix("model.").removeprefix("graph_module.").removeprefix("body.")
            seed = zlib.crc32(layer.replace("stages_", "stages.").encode())
            parameter.data.normal_(std=0.2, generator=torch.Generator().manual_seed(seed))
    return model.eval()


def images(*size, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def attention_written_out():
    set_fused_attn(False)
    yield
    set_fused_attn(True)


@every_model
@pytest.mark.parametrize("training", [False, True])
def test_symbolic_trace(name, training):
    model = small(name, num_classes=5).train(training)
    traced = torch.fx.symbolic_trace(model)
    gradients = []
    for run in (model, traced):
        logits = run(images(64, 64))
        gradients.append([logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    copies = copy.deepcopy(traced).eval(), pickle.loads(pickle.dumps(traced)).eval()
    if not training:
        for run in copies:
            torch.testing.assert_close(run(images(64, 64, batch=3)), model(images(64, 64, batch=3)))
    with pytest.raises(InputError, match="got 20 x 20: resize them|32 pixels or more"):
        traced(images(20, 20))


@every_model
def test_feature_extractor_of_torchvision(name):
    model = small(name, num_classes=5)
    nodes = {"stages.1": "map", "stages.2.blocks.0.mlp.fc1": "hidden", "head": "logits"}
    found = create_feature_extractor(model, nodes)(images(64, 64))
    (map_, *_), scores = model.forward_intermediates(images(64, 64), [1], output_fmt="NHWC")[1], found["logits"]
    torch.testing.assert_close(found["map"], map_)
    assert found["hidden"].shape[-1] in (4 * SMALL[name]["dims"][2], 8 * SMALL[name]["dims"][2])
    assert scores.shape == (2, 5)


@every_model
@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (1, 3)])
@pytest.mark.parametrize("feature_cls", ["list", "dict", "fx", "hook", "getter"])
def test_feature_classes_of_timm(name, feature_cls, indices):
    model = small(name, features_only=True, feature_cls=feature_cls, out_indices=indices)
    dense = small(name, features_only=True, out_indices=indices)
    assert model.feature_info.channels() == dense.feature_info.channels()
    for size in ((64, 64), (70, 101)):
        maps, expected = model(images(*size)), dense(images(*size))
        maps = list(maps.values()) if isinstance(maps, dict) else maps
        if feature_cls != "getter":
            assert model.output_fmt == "NHWC"
            maps = [x.permute(0, 3, 1, 2) for x in maps]
        torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-5)


@every_model
@pytest.mark.parametrize("method", ["fx", "hook"])
def test_attention_maps(name, method, attention_written_out):
    model = small(name, num_classes=5)
    found = AttentionExtract(model, method=method)(images(64, 64))
    attentions = [module for module in model.modules() if hasattr(module, "attn_drop")]
    assert len(found) == len(attentions) > 1
    for path, weights in found.items():
        csa = name == "lvt" and path.startswith("stages.0")
        axis = -2 if csa and method == "fx" else -1  # CSA's softmax goes over the middle axis
        torch.testing.assert_close(weights.sum(axis), torch.ones_like(weights.sum(axis)))


@every_model
def test_fused_attention_switch(name, attention_written_out):
    written_out, x = small(name, num_classes=5), images(64, 64)
    set_fused_attn(True)
    fused = small(name, num_classes=5)
    torch.testing.assert_close(written_out(x), fused(x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(written_out(x), fused(x), rtol=1e-4, atol=1e-5)
        for model, expected in ((written_out, False), (fused, True)):
            trace = str(torch.jit.trace(model, x).inlined_graph)
            assert ("scaled_dot_product_attention" in trace) == expected


@every_model
def test_every_module_with_parameters_is_called_where_hooks_watch(name):
    model, called = small(name, num_classes=5).double(), set()
    expected = model(images(64, 64).double())
    for path, module in model.named_modules():
        module.register_forward_hook(lambda *_, path=path: called.add(path))
    torch.testing.assert_close(model(images(64, 64).double()), expected)
    own = {path for path, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))}
    assert own <= called


@every_model
def test_gradients_per_sample_and_forward_mode(name):
    model = small(name, num_classes=5).double()
    parameters, x = dict(model.named_parameters()), images(64, 64).double()

    def loss(parameters, image):
        return torch.func.functional_call(model, parameters, (image[None],)).square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    expected = torch.autograd.grad(loss(parameters, x[1]), list(parameters.values()))
    torch.testing.assert_close([gradient[1] for gradient in gradients.values()], list(expected))
    tangents = {key: torch.randn_like(value) for key, value in parameters.items()}
    _, along = torch.func.jvp(lambda parameters: loss(parameters, x[1]), (parameters,), (tangents,))
    torch.testing.assert_close(along, sum((g * t).sum() for g, t in zip(expected, tangents.values(), strict=True)))


@every_model
def test_ensembles(name):
    models = [small(name, num_classes=5), small(name, num_classes=5)]
    nn.init.normal_(models[1].stages[0].blocks[0].mlp.fc1.weight)
    state = torch.func.stack_module_state(models)

    def run(parameters, buffers, x):
        return torch.func.functional_call(models[0], (parameters, buffers), (x,))

    logits = torch.func.vmap(run, (0, 0, None))(*state, images(64, 64))
    expected = torch.stack([model(images(64, 64)) for model in models])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@every_model
@pytest.mark.parametrize("kwargs", [{"num_classes": 5}, {"features_only": True}])
def test_script_says_what_to_use_instead(name, kwargs):
    with pytest.raises(NotImplementedError, match=r"use torch\.jit\.trace or torch\.export"):
        torch.jit.script(small(name, **kwargs))
