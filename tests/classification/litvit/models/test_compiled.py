"""Whole models as GPUs take them: under torch.compile, CUDA graphs, without waiting, with little memory."""

import copy
import shutil

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode

import litvit  # noqa: F401 (registers the models)

SMALL = {
    "lit_ti": {"img_size": 64, "dims": (8, 16, 32, 64), "depths": (1, 1, 1, 1), "num_heads": (0, 0, 2, 4)},
    "lit_s": {"img_size": 64, "dims": (8, 16, 32, 64), "depths": (1, 1, 1, 1), "num_heads": (0, 0, 2, 4)},
    "pvt_small": {"img_size": 64, "dims": (8, 16, 32, 64), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 4)},
    "litv2_s": {"dims": (8, 16, 32, 64), "depths": (1, 1, 1, 1), "num_heads": (0, 0, 2, 4)},
    "lvt": {"dims": (8, 8, 16, 32), "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 4), "class_heads": 4},
}


def small(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **SMALL[name], **kwargs)


def images(*size, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", SMALL)
def test_one_graph_in_eval(name):
    model = small(name, num_classes=5).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images(64, 64)), model(images(64, 64)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_one_graph_in_training(name):
    model = small(name, num_classes=5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (model, compiled):
        run(images(64, 64)).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        model.zero_grad()
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(
    not shutil.which("g++") and not shutil.which("clang++"), reason="torch.compile needs a C++ compiler"
)
def test_compiled_code_of_a_cpu():
    model = small("lit_s", num_classes=5).eval()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images(64, 64)), model(images(64, 64)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_traced_and_exported(name):
    model, x = small(name, num_classes=5).eval(), images(64, 64)
    traced, exported = torch.jit.trace(model, x), torch.export.export(model, (x,)).module()
    other = x.flip(0, 2)
    for run in (traced, exported):
        torch.testing.assert_close(run(other), model(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kwargs", [{"num_classes": 5}, {"features_only": True}])
@pytest.mark.parametrize("name", SMALL)
def test_exported_for_any_number_of_images(name, kwargs):
    model = small(name, **kwargs).eval()
    dynamic = {"x": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(model, (images(64, 64),), dynamic_shapes=dynamic).module()
    for batch in (0, 1, 5):
        x = images(64, 64, batch=batch)
        torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lit_ti", "lit_s", "litv2_s", "pvt_small"])
def test_dense_lit_exported_at_the_size_of_its_tables_takes_others(name):
    model = small(name, features_only=True, out_indices=(0, 1, 2)).eval()
    dynamic = {"x": {0: torch.export.Dim("batch"), 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}}
    with torch.no_grad():
        exported = torch.export.export(model, (images(64, 64),), dynamic_shapes=dynamic).module()
        for size in ((64, 64), (70, 101), (160, 96)):
            x = images(*size, batch=3)
            torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)


def test_one_graph_with_mixed_tokens():
    model, mixed = small("lvt", num_classes=5).eval(), torch.tensor([[False, False], [False, True]])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images(64, 64), mixed), model(images(64, 64), mixed), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_one_graph_for_maps_of_all_sizes(name):
    model = small(name, features_only=True, out_indices=(0, 1, 2)).eval()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=count, dynamic=True)
    with torch.no_grad():
        for size in ((70, 101), (96, 160), (160, 128)):
            for out, expected in zip(compiled(images(*size)), model(images(*size)), strict=True):
                torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1


def on_a_fake_gpu(model):
    """Put a GPU's tensors without numbers in the place of parameters and buffers; torch needs no GPU for these."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                    tensors[name] = nn.Parameter(fake) if isinstance(tensor, nn.Parameter) else fake
    return model


@pytest.fixture
def told_of_a_gpu(monkeypatch):
    """What the choice of kernels asks of a GPU and its machine, for one that is not there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setenv("CC", "cc")


def test_a_gpus_kernels_are_in_one_graph_for_maps_of_all_sizes(told_of_a_gpu):
    model = small("lit_s", features_only=True)
    graphs = []

    def count(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    with FakeTensorMode():
        compiled = torch.compile(on_a_fake_gpu(model), fullgraph=True, backend=count, dynamic=True)
        for height, width in ((630, 670), (544, 800)):
            maps = compiled(torch.empty(2, 3, height, width, device="cuda"))
            assert maps[-1].shape == (2, 64, -(-height // 32), -(-width // 32))
            assert maps[-1].requires_grad
    (graph,) = graphs
    assert graph.count("litvit.deform_conv.default") == 3
    assert graph.count("litvit.relative_attention.default") == 2


def test_training_on_large_images_keeps_a_quarter_of_what_a_written_out_bias_does(told_of_a_gpu, monkeypatch):
    model = timm.create_model("lit_s", features_only=True).to(torch.bfloat16)
    kept = {}
    with FakeTensorMode():
        on_a_fake_gpu(model)
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        x = torch.empty(2, 3, 800, 1344, dtype=torch.bfloat16, device="cuda")
        for path in ("triton", "plain"):
            monkeypatch.setenv("LIT_ATTENTION", path)
            storages = {}

            def keep(tensor, storages=storages):
                storage = tensor.untyped_storage()
                storages[storage._cdata] = storage
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                maps = model(x)
            kept[path] = sum(storage.nbytes() for key, storage in storages.items() if key not in own)
            del maps
    assert kept["triton"] < kept["plain"] / 4
    assert kept["triton"] < 1.6 * 2**30


def train_step(model, optimizer, x, target):
    with torch.autocast("cuda", torch.bfloat16):
        loss = F.cross_entropy(model(x).float(), target)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


@pytest.mark.gpu
@pytest.mark.parametrize("name", SMALL)
def test_cuda_graphs(name):
    model = small(name, num_classes=5).cuda()
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    x, target = images(64, 64).cuda(), torch.tensor([1, 3], device="cuda")
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, fused=True) for m in (model, reference)]
    for _ in range(5):  # graphs are recorded in the second, replayed from the third on
        torch.compiler.cudagraph_mark_step_begin()
        loss = train_step(compiled, optimizers[0], x, target).clone()
        expected = train_step(reference, optimizers[1], x, target)
        torch.testing.assert_close(loss, expected, rtol=5e-2, atol=5e-2)
    model.eval()
    reference.load_state_dict(model.state_dict())
    reference.eval()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            scores = compiled(x).float().clone()
        torch.testing.assert_close(scores, reference(x).float(), rtol=5e-2, atol=5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SMALL)
def test_no_step_waits_for_the_gpu(name):
    model = small(name, num_classes=5).cuda()
    maps = small(name, features_only=True).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    x, target, odd = images(64, 64).cuda(), torch.tensor([1, 3], device="cuda"), images(70, 101).cuda()

    def run():
        train_step(model, optimizer, x, target)
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            model(x)
        sum(out.float().sum() for out in maps(odd)).backward()

    run()  # chooses kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
