"""What LIT and LVT share."""

import pytest
import timm
import torch
from timm.layers import DropPath
from torch.utils._python_dispatch import TorchDispatchMode

from litvit.models.lit import LIT

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


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # parts are as large as the threads' caches
    yield
    torch.set_num_threads(before)


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
    handle = block.register_forward_hook(lambda _, args, out: shapes.extend((args[0].shape, out.shape)))
    with torch.no_grad():
        hooked = model(x)
        handle.remove()
        torch.testing.assert_close(model(x), hooked, rtol=1e-4, atol=1e-5)
    whole = (8, 56 * 56, 96) if isinstance(model, LIT) else (8, 56, 56, 64)
    assert shapes == [whole, whole]


def test_stochastic_depth_alone_draws_for_images():
    torch.manual_seed(0)
    model = timm.create_model("lit_s", num_classes=5, **SHALLOW["lit_s"]).eval()
    block = model.stages[0].blocks[0]
    block.drop_path = DropPath(0.5).eval()
    x = torch.randn(8, 56, 56, 96)
    with torch.no_grad():
        sure = model.stages[0](x)
        block.drop_path.train()
        dropped = (model.stages[0](x) == x).all(-1).flatten(1).double().mean(1)
    assert (sure != x).any(-1).all()
    assert sorted(set(dropped.tolist())) == [0, 1]


def test_batches_of_any_number():
    torch.manual_seed(0)
    model = timm.create_model("lit_s", features_only=True, out_indices=(0, 1), **SHALLOW["lit_s"]).eval()
    x = torch.randn(7, 3, 224, 224)
    expected = model(x)
    with torch.no_grad():
        for ours, whole in zip(model(x), expected, strict=True):
            torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-5)
        assert [out.shape[0] for out in model(x[:0])] == [0, 0]


def count_splits(graphs):
    def backend(graph, inputs):
        graphs.append(sum("tensor_split" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    return backend


def test_graphs_of_one_size_have_parts(case):
    model, x, _ = case
    graphs = []
    compiled = torch.compile(model, fullgraph=True, backend=count_splits(graphs), dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert [splits > 0 for splits in graphs] == [True]


def test_graphs_of_many_sizes_have_none(case):
    model, x, _ = case
    graphs = []
    torch._dynamo.mark_dynamic(x, 0, min=8, max=15)
    compiled = torch.compile(model, fullgraph=True, backend=count_splits(graphs))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert graphs == [0]


def test_exported_graphs_have_none(case):
    model, x, _ = case
    with torch.no_grad():
        program = torch.export.export(model, (x,))
    assert not any("split" in str(node.target) for node in program.graph.nodes)
