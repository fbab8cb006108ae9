"""What LIT and LVT share."""

import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import litvit  # noqa: F401 (registers the models)

SHALLOW = {
    "lit_s": {"depths": (1, 1, 1, 1), "dims": (96, 32, 32, 32), "num_heads": (0, 0, 2, 2)},
    "lvt": {"depths": (1, 1, 1, 1), "dims": (64, 16, 16, 32), "num_heads": (2, 2, 2, 2), "class_heads": 4},
}
WHOLE = 56 * 56 * 4  # hidden numbers of the first stage, an image and channel


class LargestOutput(TorchDispatchMode):
    """Remembers the numbers in the largest tensor that an operator made."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if isinstance(out, torch.Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


@pytest.fixture(params=SHALLOW)
def case(request):
    torch.manual_seed(0)
    model = timm.create_model(request.param, num_classes=5, **SHALLOW[request.param]).eval()
    return model, torch.randn(8, 3, 224, 224), 8 * WHOLE * SHALLOW[request.param]["dims"][0]


def test_inference_on_a_cpu_takes_large_batches_in_parts(case):
    model, x, whole = case
    with LargestOutput() as with_gradients:
        expected = model(x)
    with torch.no_grad(), LargestOutput() as without:
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert with_gradients.numbers >= whole
    assert without.numbers <= whole / 2


def test_hooks_see_whole_batches(case):
    model, x, _ = case
    shapes = []
    block = model.stages[0].blocks[0]
    handle = block.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape)))
    with torch.no_grad():
        hooked = model(x)
    handle.remove()
    assert shapes == [(8, 56 * 56, 96)] or shapes == [(8, 56, 56, 64)]
    with torch.no_grad():
        torch.testing.assert_close(model(x), hooked, rtol=1e-4, atol=1e-5)


def test_parts_are_one_graph_when_compiled(case):
    model, x, _ = case
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=count, dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1
