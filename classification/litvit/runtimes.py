"""Files of a model for other runtimes: how each format is written, loaded again, and compared with the model.

Shape letters: B images, C channels, (H, W) image size.
"""

import contextlib
import copy
import importlib.util
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from litvit.errors import InputError, require

Run = Callable[[Tensor], list[Tensor]]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.float32}
# Largest relative error that passes.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2, "int8": 0.2}
INPUT = "images"
METADATA = "litvit.json"  # in the archives of torch
# Operators of ONNX that run in 8 bits. The coordinates of token merging stay float32.
QUANTIZED_OPERATORS = ["Conv", "Gemm", "MatMul"]


class DenseMaps(nn.Module):
    """Maps of all stages of a timm model that has `forward_intermediates`: (B, C, H, W) -> tuple of (B, C', h, w)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not hasattr(model, "forward_intermediates"):
            raise InputError(f"{type(model).__name__} has no dense maps (forward_intermediates): leave out --dense")
        if hasattr(model, "prune_intermediate_layers"):
            model.prune_intermediate_layers(len(model.feature_info), prune_head=True)
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.forward_intermediates(x, intermediates_only=True))


class _WithType(nn.Module):
    """A copy of a model in another type. Its images and outputs stay float32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = copy.deepcopy(model).to(dtype), dtype

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(images.to(self.dtype))
        return tuple(output.float() for output in (outputs if isinstance(outputs, tuple) else (outputs,)))


@dataclass
class Export:
    """What is written to a file.

    Attributes:
        model: Model in eval mode, which returns a tensor or a tuple of tensors.
        images: Example, (B, C, H, W). A dynamic batch needs two images or more.
        precision: "float32", "float16", "bfloat16" or "int8".
        dynamic_batch: Whether the file takes any number of images.
        dynamic_size: Whether it takes images of any size above 32.
        outputs: Names of the outputs.
        metadata: What a user needs to know of the model.
        calibration: Images that are typical, (N, C, H, W), for int8.
    """

    model: nn.Module
    images: Tensor
    precision: str = "float32"
    dynamic_batch: bool = True
    dynamic_size: bool = False
    outputs: Sequence[str] = ("logits",)
    metadata: dict[str, Any] = field(default_factory=dict)
    calibration: Tensor | None = None

    def typed(self) -> nn.Module:
        """Return the model in the type of the precision."""
        return _WithType(self.model, DTYPES[self.precision]).eval()

    def program(self, model: nn.Module | None = None) -> torch.export.ExportedProgram:
        """Return the graph of a model (that of `typed`) by torch.export."""
        dims = {0: torch.export.Dim("batch")} if self.dynamic_batch else {}
        if self.dynamic_size:
            # Not by name: torch cannot prove that all sizes of a range will do.
            dims |= dict.fromkeys((2, 3), torch.export.Dim.DYNAMIC)
        return torch.export.export(model or self.typed(), (self.images,), dynamic_shapes=(dims,))

    def calibration_batches(self) -> Iterator[Tensor]:
        """Return the calibration images in batches of the example's size."""
        size = 8 if self.dynamic_batch else len(self.images)
        return (batch for batch in self.calibration.split(size) if self.dynamic_batch or len(batch) == size)


def _write_torch_export(export: Export, path: Path) -> None:
    torch.export.save(export.program(), path, extra_files={METADATA: json.dumps(export.metadata)})


def _load_torch_export(path: Path, threads: int) -> Run:
    return _run_module(torch.export.load(path).module())


def _run_module(module: Callable[[Tensor], tuple[Tensor, ...]]) -> Run:
    @torch.inference_mode()
    def run(images: Tensor) -> list[Tensor]:
        return list(module(images))

    return run


def _write_aoti(export: Export, path: Path) -> None:
    torch._inductor.aoti_compile_and_package(export.program(), package_path=str(path))


def _load_aoti(path: Path, threads: int) -> Run:
    return _run_module(torch._inductor.aoti_load_package(str(path)))


def _write_torchscript(export: Export, path: Path) -> None:
    trace = torch.jit.trace(export.typed(), export.images, check_trace=False)
    torch.jit.save(trace, path, _extra_files={METADATA: json.dumps(export.metadata)})


def _load_torchscript(path: Path, threads: int) -> Run:
    return _run_module(torch.jit.load(path))


def _as_text(metadata: dict[str, Any]) -> dict[str, str]:
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}


def _write_onnx(export: Export, path: Path) -> None:
    names = {"input_names": [INPUT], "output_names": list(export.outputs)}
    program = torch.onnx.export(export.program(), (), dynamo=True, verbose=False, **names)
    program.model.metadata_props.update(_as_text(export.metadata))
    if export.precision != "int8":
        program.save(path, external_data=False)
        return
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        floats = Path(folder) / path.name
        program.save(floats, external_data=False)
        _quantize_onnx(export, floats, path)


def _quantize_onnx(export: Export, floats: Path, path: Path) -> None:
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = export.calibration_batches()

        def get_next(self) -> dict | None:
            batch = next(self.batches, None)
            return None if batch is None else {INPUT: batch.numpy()}

    quant_pre_process(floats, floats, skip_symbolic_shape=True)
    quantization.quantize_static(
        floats,
        path,
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        op_types_to_quantize=QUANTIZED_OPERATORS,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )


def _load_onnx(path: Path, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(output) for output in session.run(None, {INPUT: images.numpy()})]


def _write_openvino(export: Export, path: Path) -> None:
    import openvino

    # Weights of 16 bits are a matter of storage: what the file is computed in is a setting of the runtime.
    model = openvino.convert_model(export.program(_WithType(export.model, torch.float32).eval()))
    if export.precision == "int8":
        import nncf

        nncf.set_log_level(logging.ERROR)
        batches = [batch.numpy() for batch in export.calibration_batches()]
        transformer = nncf.ModelType.TRANSFORMER
        with contextlib.redirect_stdout(io.StringIO()):  # progress bars
            model = nncf.quantize(model, nncf.Dataset(batches), model_type=transformer, subset_size=len(batches))
    for port, name in zip((*model.inputs, *model.outputs), (INPUT, *export.outputs), strict=True):
        port.get_tensor().set_names({name})
    for name, value in _as_text(export.metadata).items():
        model.set_rt_info(value, ["litvit", name])
    openvino.save_model(model, path, compress_to_fp16=export.precision == "float16")


def _load_openvino(path: Path, threads: int) -> Run:
    import openvino

    # Else OpenVINO may compute in bfloat16 where the processor can.
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    core = openvino.Core()
    request = core.compile_model(core.read_model(path), "CPU", settings).create_infer_request()
    return lambda images: [
        torch.from_numpy(output.copy()) for output in request.infer([images.numpy()], share_inputs=True).values()
    ]


@dataclass(frozen=True)
class Format:
    """A format of files.

    Attributes:
        suffix: End of the files' names.
        packages: Packages that it needs.
        precisions: Precisions that it has.
        write: Function that writes an export to a path.
        load: Function of a path and a number of threads, which returns a function from images to outputs.
        takes_sizes: Whether a file can be for images of any size.
        traces: Whether the model is traced by torch.jit, and not by torch.export.
    """

    suffix: str
    packages: Sequence[str]
    precisions: Sequence[str]
    write: Callable[[Export, Path], None]
    load: Callable[[Path, int], Run]
    takes_sizes: bool = True
    traces: bool = False


_OF_TORCH = ("float32", "float16", "bfloat16")
FORMATS = {
    "onnx": Format(
        ".onnx", ("onnx", "onnxscript", "onnxruntime"), ("float32", "float16", "int8"), _write_onnx, _load_onnx
    ),
    "openvino": Format(".xml", ("openvino",), ("float32", "float16", "int8"), _write_openvino, _load_openvino),
    "torch-export": Format(".pt2", (), _OF_TORCH, _write_torch_export, _load_torch_export),
    "aoti": Format(".aoti.pt2", (), _OF_TORCH, _write_aoti, _load_aoti),
    "torchscript": Format(".pt", (), _OF_TORCH, _write_torchscript, _load_torchscript, takes_sizes=False, traces=True),
}


def check_format(name: str, precision: str, *, dynamic_size: bool = False) -> Format:
    """Return a format of FORMATS by name.

    Raises:
        InputError: The format does not have the precision, or open sizes, or its packages are not installed.
        KeyError: There is no such format.
    """
    kind = FORMATS[name]
    if precision not in kind.precisions:
        raise InputError(f"--format {name} has no {precision}, it has {', '.join(kind.precisions)}")
    if dynamic_size and not kind.takes_sizes:
        raise InputError(f"--format {name} is for images of one size: leave out --dynamic-size")
    require("export", *kind.packages)
    if name == "openvino" and precision == "int8" and importlib.util.find_spec("nncf") is None:
        raise InputError("--format openvino --precision int8 needs nncf, OpenVINO's quantization: pip install nncf")
    if not kind.traces and not hasattr(torch.compiler, "is_exporting"):
        raise InputError(f"--format {name} needs torch 2.7 or newer, this is {torch.__version__}")
    return kind


def write(export: Export, kind: Format, path: Path) -> None:
    """Write an export to a file, without the warnings of exporters."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            kind.write(export, path)
        finally:
            logging.disable(before)


@dataclass
class Comparison:
    """How far a file's outputs are from those of the model.

    Attributes:
        error: Largest relative error ||file - model|| / ||model|| of any output of any batch.
        same_top1: Number of images whose top-1 is the same. None for dense maps.
        images: Number of images that were compared.
    """

    error: float = 0.0
    same_top1: int | None = None
    images: int = 0

    @property
    def agreement(self) -> float | None:
        """Share of images with the same top-1, 0 to 1."""
        return None if self.same_top1 is None else self.same_top1 / self.images


@torch.inference_mode()
def compare(run: Run, model: nn.Module, batches: Iterable[Tensor]) -> Comparison:
    """Compare the outputs of a file with those of the model, in float32.

    Args:
        run: Function from images to outputs, of `Format.load`.
        model: Model in eval mode.
        batches: Batches of images, (B, C, H, W), of any sizes that the file takes.
    """
    result = Comparison()
    for images in batches:
        expected = model(images)
        dense = isinstance(expected, tuple)
        for got, wanted in zip(run(images), expected if dense else (expected,), strict=True):
            error = ((got - wanted).norm() / wanted.norm()).item() if got.shape == wanted.shape else float("inf")
            result.error = max(result.error, error if error == error else float("inf"))
            if not dense:
                same = (got.argmax(1) == wanted.argmax(1)).sum().item() if got.shape == wanted.shape else 0
                result.same_top1 = (result.same_top1 or 0) + same
        result.images += len(images)
    return result
