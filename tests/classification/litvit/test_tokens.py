"""Operations on channels-last tokens."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from litvit.models.backbone import ConvMlp
from litvit.tokens import PART, in_parts


@pytest.fixture
def sizes():
    """Numbers of images that a function was called with, and the function."""
    seen = []

    def double(x):
        seen.append(len(x))
        return 2 * x

    return seen, double


@torch.no_grad()
def test_images_are_taken_a_few_at_a_time_in_inference_alone(sizes):
    seen, double = sizes
    images = 2 * torch.get_num_threads()  # per part
    x = torch.randn(2 * images + 1, 32, PART // 64, 3)
    torch.testing.assert_close(in_parts(double, x), 2 * x)
    assert seen == [images, images, 1]
    seen.clear()
    in_parts(double, x[:images])
    in_parts(double, x[:0])
    in_parts(double, x[:, :0])
    in_parts(double, x.to("meta"))
    with torch.enable_grad():
        in_parts(double, x)
    assert seen == [images, 0, len(x), len(x), len(x)]


@pytest.mark.parametrize("kind", ["hook", "adapter", "norm", "training"])
@torch.no_grad()
def test_what_would_see_parts_sees_all_images(kind):
    mlp, seen = ConvMlp(8, 16).eval(), []

    def see(module, args, output):
        seen.append(len(output))

    if kind == "hook":
        mlp.fc1.register_forward_hook(see)
    elif kind == "adapter":
        mlp.fc1 = nn.Sequential(mlp.fc1)
        mlp.fc1[0].register_forward_hook(see)
    elif kind == "norm":
        mlp.conv = nn.Sequential(mlp.conv, nn.BatchNorm2d(16).train())
        mlp.conv[1].register_forward_hook(see)
    else:
        mlp.train()
        mlp._apply_to = lambda x, apply=mlp._apply_to: (see(None, None, x), apply(x))[1]
    mlp(torch.randn(5, 64, 64, 8))
    assert seen == [5]


@torch.no_grad()
def test_a_traced_graph_is_for_all_numbers_of_images():
    mlp = ConvMlp(8, 16).eval()
    graph = make_fx(mlp)(torch.randn(4, 64, 64, 8))
    assert not any("split" in str(node.target) for node in graph.graph.nodes)
