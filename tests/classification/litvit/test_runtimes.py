"""Files for other runtimes: the batches and sizes that they take, what they compute, the operators that they hold."""

import warnings
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

import litvit  # noqa: F401 (registers the models)
from litvit.dtm import DeformableTokenMerging
from litvit.errors import InputError
from litvit.runtimes import FORMATS, DenseMaps, Export, check_format, compare, write

# Two stages have all that the models are made of: merging, position tables, HiLo, both of LVT's attentions.
SMALL = {
    "lit_ti": {"img_size": 64, "dims": (8, 16), "depths": (1, 1), "num_heads": (0, 2), "mlp_ratios": (2, 2)},
    "lit_s": {"img_size": 64, "dims": (8, 16), "depths": (1, 1), "num_heads": (0, 2), "mlp_ratios": (2, 2)},
    "litv2_s": {"dims": (8, 16), "depths": (1, 1), "num_heads": (0, 2), "window_sizes": (0, 2), "mlp_ratios": (2, 2)},
    "lvt": {"dims": (8, 16), "depths": (1, 1), "num_heads": (2, 2), "mlp_ratios": (2, 2), "reductions": (2,)}
    | {"class_blocks": 1, "class_heads": 2},
}
# Those of TensorRT's parser (docs/operators.md of onnx-tensorrt 10) that the models need. Neither loops, branches and
# sequences, nor ScatterElements, GridSample and DeformConv.
OPERATORS = {
    *("Abs", "Add", "AveragePool", "Cast", "Clip", "Concat", "Conv", "Div"),
    *("Expand", "Floor", "Gather", "Gelu", "Gemm", "LayerNormalization", "MatMul", "Max"),
    *("Min", "Mul", "Pad", "Range", "ReduceMax", "ReduceMean", "ReduceSum", "Reshape"),
    *("Resize", "Shape", "Sigmoid", "Slice", "Softmax", "Squeeze", "Sub", "Transpose", "Unsqueeze"),
}


def small(name, **kwargs):
    """A model whose merging reads at distances of several tokens, beyond the map too."""
    torch.manual_seed(0)
    model = timm.create_model(name, **(SMALL[name] | kwargs)).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, DeformableTokenMerging):
            nn.init.normal_(module.offset.weight)
            nn.init.normal_(module.offset.bias, std=2)
    return model


def images(*size, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def written(export, kind, folder):
    """The export as its runtime runs it, and the path of its file."""
    path = folder / f"model{FORMATS[kind].suffix}"
    write(export, FORMATS[kind], path)
    return FORMATS[kind].load(path, 1), path


def operators(path):
    return {node.op_type for node in pytest.importorskip("onnx").load(path).graph.node}


def needs(kind):
    for package in FORMATS[kind].packages:
        pytest.importorskip(package)


@pytest.mark.parametrize("name", SMALL)
def test_onnx_takes_any_number_of_images(name, tmp_path):
    needs("onnx")
    model = small(name, num_classes=5)
    run, path = written(Export(model, images(64, 64)), "onnx", tmp_path)
    assert operators(path) <= OPERATORS
    result = compare(run, model, [images(64, 64, batch=batch) for batch in (1, 2, 7)])
    assert result.error < 1e-5
    assert (result.same_top1, result.images) == (10, 10)


@pytest.mark.parametrize(
    ("kind", "name"), [("onnx", "lit_s"), ("onnx", "litv2_s"), ("torch-export", "lvt"), ("openvino", "lit_s")]
)
def test_dense_files_take_any_size(kind, name, tmp_path):
    needs(kind)
    model = DenseMaps(small(name))
    export = Export(model, images(64, 64), dynamic_size=True, outputs=["stage1", "stage2"])
    run, path = written(export, kind, tmp_path)
    if kind == "onnx":
        assert operators(path) <= OPERATORS
    sizes = ((64, 64), (224, 96), (65, 101), (70, 33))
    assert compare(run, model, [images(*size, batch=1 + i) for i, size in enumerate(sizes)]).error < 1e-5


@pytest.mark.parametrize("kind", ["torch-export", "torchscript"])
def test_other_formats_take_any_number_of_images(kind, tmp_path):
    needs(kind)
    model = small("lit_s", num_classes=5)
    run, _ = written(Export(model, images(64, 64)), kind, tmp_path)
    assert compare(run, model, [images(64, 64, batch=batch) for batch in (1, 3)]).error < 1e-5


@pytest.mark.parametrize("name", SMALL)
def test_old_exporter_of_onnx(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = small(name, features_only=True, out_indices=(0, 1))
    axes = {"x": {0: "batch", 2: "height", 3: "width"}}
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (images(64, 64),), path, dynamo=False, input_names=["x"], dynamic_axes=axes)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(x):
        return [torch.from_numpy(output) for output in session.run(None, {"x": x.numpy()})]

    result = compare(run, lambda x: tuple(model(x)), [images(64, 64, batch=1), images(65, 101, batch=3)])
    assert result.error < 1e-5


@pytest.mark.parametrize(
    ("kind", "precision"),
    [("onnx", "float16"), ("torch-export", "bfloat16")],
)
def test_half_the_bits_take_half_the_space(kind, precision, tmp_path):
    needs(kind)
    model = small("lit_ti", num_classes=5, mlp_ratios=(2048, 2048))
    export = Export(model, images(64, 64), precision, dynamic_batch=False)
    run, path = written(export, kind, tmp_path)
    result = compare(run, model, [images(64, 64)])
    assert 1e-6 < result.error < 2e-2
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert path.stat().st_size < 3 * parameters + 500_000
    assert next(model.parameters()).dtype == torch.float32


def test_onnx_of_8_bits(tmp_path):
    needs("onnx")
    model = small("lit_s", num_classes=5)
    export = Export(model, images(64, 64), "int8", calibration=images(64, 64, batch=16))
    run, path = written(export, "onnx", tmp_path)
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators(path)
    assert 1e-4 < compare(run, model, [images(64, 64, batch=9)]).error < 0.2


def test_a_file_of_another_model_differs(tmp_path):
    model = small("lit_s", num_classes=5)
    run, _ = written(Export(model, images(64, 64)), "torchscript", tmp_path)
    other = small("lit_s", num_classes=5)
    nn.init.normal_(other.head.weight)
    result = compare(run, other, [images(64, 64, batch=8)])
    assert result.error > 0.5
    assert result.agreement < 1
    assert compare(lambda x: [run(x)[0] * float("nan")], model, [images(64, 64)]).error == float("inf")


def test_unknown_combinations_are_named():
    with pytest.raises(InputError, match="--format torchscript has no int8, it has float32, float16, bfloat16"):
        check_format("torchscript", "int8")
    with pytest.raises(InputError, match="one size: leave out --dynamic-size"):
        check_format("torchscript", "float32", dynamic_size=True)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(FORMATS, "onnx", replace(FORMATS["onnx"], packages=("no_such_package",)))
    with pytest.raises(InputError, match=r'no_such_package is not installed: pip install "litvit\[export\]"'):
        check_format("onnx", "float32")
