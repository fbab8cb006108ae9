"""The cases of benchmark.py on a CPU or a GPU: merging, attention, classifiers and dense backbones.

Every function takes the flags of its subcommand and returns rows of figures: milliseconds, images/s, bytes. Memory is
measured on a GPU, one model or call at a time, and is None on other devices.
"""

import argparse
import contextlib
import importlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial

import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import DropPath
from timm.models import model_entrypoint
from torch import Tensor, nn

from litvit import cli
from litvit.attention import PATHS, choose_path, relative_attention
from litvit.benchmarks.macs import count_macs, count_parameters
from litvit.benchmarks.measuring import interleaved_medians, peak_memory
from litvit.benchmarks.published import COUNTERPARTS, PUBLISHED
from litvit.dtm import deform_conv_tokens
from litvit.errors import InputError
from litvit.models.lit import Attention

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

PUBLISHED_ARITHMETIC = {"published_lvt", "published_litv2"}  # models and their modules
CLASSES = 1000
MEASURED = ("inference_images_per_second", "training_memory", "test_memory")  # what is published too

PASSES = {"forward": "forward", "forward_backward": "forward + backward"}


def _linear_merge(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    B, H, W, C = x.shape
    patches = x.view(B, H // 2, 2, W // 2, 2, C).transpose(2, 3).reshape(B, H // 2, W // 2, 4 * C)
    return F.linear(patches, weight.permute(0, 2, 3, 1).flatten(1), bias)


def _torchvision_merge(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    maps = x.permute(0, 3, 1, 2), offset.permute(0, 3, 1, 2)
    return torchvision.ops.deform_conv2d(*maps, weight, bias, stride=2).permute(0, 2, 3, 1)


def _mmcv_merge(op: Callable, x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    maps = x.permute(0, 3, 1, 2).contiguous(), offset.permute(0, 3, 1, 2).contiguous()
    return op(*maps, weight, 2).permute(0, 2, 3, 1) + bias


def _merges(device: torch.device, dtype: torch.dtype) -> dict[str, Callable]:
    merges = {"ours": deform_conv_tokens, "linear": _linear_merge}
    if device.type == "cpu" and dtype == torch.bfloat16:
        return merges
    merges["torchvision"] = _torchvision_merge
    with contextlib.suppress(ImportError):
        from mmcv import _ext
        from mmcv.ops import deform_conv2d, get_compiling_cuda_version

        # litvit.openmmlab makes mmcv.ops importable where this operator was not compiled.
        is_compiled = "deform_conv_forward" in dir(_ext)
        if is_compiled and (device.type == "cpu" or get_compiling_cuda_version() != "not available"):
            merges["mmcv"] = partial(_mmcv_merge, deform_conv2d)
    return merges


def benchmark_dtm(args: argparse.Namespace) -> list[dict]:
    """Time the three merges of a model, torchvision's operator, mmcv's where it is installed, and a linear merge.

    The operators of torchvision and mmcv lack bfloat16. Instead they get float16 on a GPU, and are left out on a CPU.

    Args:
        args: Flags model, batch_size, device, dtype, repeats.

    Returns:
        One row per shape, and one for their sum: milliseconds by pass and merge.
    """
    device, dtype = args.device, DTYPES[args.dtype]
    merges = _merges(device, dtype)
    rows = []
    for i, stage in enumerate(_stages(args.model)[1:]):
        out_dim, in_dim = stage.downsample.conv.weight.shape[:2]
        side = 224 // (4 * 2**i)
        like = {"device": device, "dtype": dtype}
        tensors = (
            torch.randn(args.batch_size, side, side, in_dim, **like),
            torch.randn(args.batch_size, side // 2, side // 2, 8, **like),
            torch.randn(out_dim, in_dim, 2, 2, **like) / in_dim**0.5,
            torch.randn(out_dim, **like),
        )
        gradient = torch.randn(args.batch_size, side // 2, side // 2, out_dim, **like)
        own = [tensor.requires_grad_() for tensor in tensors], gradient
        others = own
        if dtype == torch.bfloat16:
            others = [tensor.detach().half().requires_grad_() for tensor in tensors], gradient.half()
        inputs = {name: others if name in ("torchvision", "mmcv") else own for name in merges}

        def forward(name: str, inputs: dict = inputs) -> None:
            with torch.no_grad():
                merges[name](*inputs[name][0])

        def both(name: str, inputs: dict = inputs) -> None:
            leaves, gradient = inputs[name]
            torch.autograd.grad(merges[name](*leaves), leaves, gradient, allow_unused=True)

        row = {"shape": f"{in_dim} x {side} x {side} -> {out_dim}"}
        for label, run in (("forward", forward), ("forward_backward", both)):
            medians = interleaved_medians({name: partial(run, name) for name in merges}, args.repeats, device)
            row[label] = {name: 1000 * value for name, value in medians.items()}
        rows.append(row)
    total = {"shape": "sum"}
    for label in PASSES:
        total[label] = {name: sum(row[label][name] for row in rows) for name in merges}
    return [*rows, total]


def _stages(name: str) -> nn.ModuleList:
    with torch.device("meta"):
        return timm.create_model(name).stages


def benchmark_attention(args: argparse.Namespace) -> list[dict]:
    """Measure attention with a relative position bias, by the path that is chosen and by those that write the bias out.

    Args:
        args: Flags model, inputs, device, dtype, repeats.

    Returns:
        One row per input, stage and pass: the path that is chosen, and milliseconds and peak bytes by path. The bytes
        include queries, keys and values.
    """
    rows = []
    for batch, height, width in args.inputs:
        for i, stage in enumerate(_stages(args.model)):
            attention = stage.blocks[0].attn
            if attention is None:
                continue
            stride = 4 * 2**i
            grid = _padded(height) // stride, _padded(width) // stride
            shape = f"stage {i + 1}, {attention.num_heads} heads, {grid[0]} x {grid[1]}"
            for label, (chosen, calls) in _attention_calls(attention, batch, grid, args).items():
                memory = {path: peak_memory(call, args.device) for path, call in calls.items()}
                medians = interleaved_medians(calls, args.repeats, args.device)
                rows.append(
                    {
                        "input": f"{batch} x {height} x {width}",
                        "tokens": shape,
                        "pass": PASSES[label],
                        "chosen": chosen,
                        "milliseconds": {path: 1000 * value for path, value in medians.items()},
                        "memory": memory,
                    }
                )
    return rows


def _attention_calls(
    attention: nn.Module, batch: int, grid: tuple[int, int], args: argparse.Namespace
) -> dict[str, tuple[str, dict[str, Callable[[], None]]]]:
    """Return for each pass the path that is chosen, and the calls by path."""
    (h, w), heads = grid, attention.num_heads
    dim = attention.proj.in_features // heads
    like = {"device": args.device, "dtype": DTYPES[args.dtype]}
    qkv = torch.randn(batch, h * w, 3, heads, dim, **like, requires_grad=True)
    table = torch.randn(heads, 2 * h - 1, 2 * w - 1, device=args.device, requires_grad=True)
    gradient = torch.randn(batch, h * w, heads, dim, **like)

    def attend(path: str | None) -> Tensor:
        return relative_attention(qkv, table, grid, path)

    def forward(path: str | None) -> None:
        with torch.no_grad():
            attend(path)

    def both(path: str | None) -> None:
        torch.autograd.grad(attend(path), (qkv, table), gradient)

    paths = {"ours": None, "sdpa": "sdpa", "plain": "plain"}
    with torch.no_grad():
        chosen = [choose_path(qkv)]
    chosen.append(choose_path(qkv))
    return {
        label: (path, {name: partial(run, path) for name, path in paths.items()})
        for label, path, run in zip(PASSES, chosen, (forward, both), strict=True)
    }


def _padded(side: int) -> int:
    """Round up to a multiple of 32, to which detectors pad images."""
    return (side + 31) // 32 * 32


class Classifier:
    """A model of timm's registry as it is measured: without stochastic depth, a convolutional network channels-last.

    Args:
        name: Name of the model.
        args: Flags batch_size, device, dtype, amp_dtype, compile.

    Raises:
        InputError: The model does not classify images of 224 x 224.
    """

    def __init__(self, name: str, args: argparse.Namespace):
        self.device = args.device
        try:
            model = _without_stochastic_depth(timm.create_model(name, num_classes=CLASSES))
            self.macs = count_macs(model)
        except (RuntimeError, TypeError, AssertionError) as error:
            raise InputError(f"{name} is no classifier of images of 224 x 224: {error}") from error
        self.parameters = count_parameters(model)
        layout = torch.channels_last if is_convolutional(model) else torch.preserve_format
        self.model = model.to(dtype=DTYPES[args.dtype], memory_format=layout)
        self.run = compiled(self.model, args.compile)
        self.autocast = _autocast(args)
        images = torch.randn(args.batch_size, 3, 224, 224, dtype=DTYPES[args.dtype])
        self.images = images.to(memory_format=layout)
        self.target = torch.randint(CLASSES, (args.batch_size,))
        self.optimizer: torch.optim.Optimizer | None = None

    def start_inference(self) -> None:
        """Move to the device and switch to eval mode."""
        self._move(self.device)
        self.model.eval()

    def start_training(self) -> None:
        """Switch to training mode, with a new optimizer."""
        self.optimizer = torch.optim.AdamW(self.model.train().parameters(), lr=1e-4)

    def leave(self) -> None:
        """Free the device for other models."""
        self.optimizer = None
        self._move(torch.device("cpu"))

    def _move(self, device: torch.device) -> None:
        self.model.to(device)
        self.images, self.target = self.images.to(device), self.target.to(device)

    def infer(self) -> None:
        """Classify the images."""
        with torch.inference_mode(), self.autocast():
            self.run(self.images)

    def train(self) -> None:
        """Train one step: forward, backward, AdamW."""
        with self.autocast():
            loss = F.cross_entropy(self.run(self.images).float(), self.target)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def _without_stochastic_depth(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    return model


def is_convolutional(model: nn.Module) -> bool:
    """Return whether most of a model's parameters belong to convolutions: it is then fastest channels-last."""
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d))
    return 2 * weights > count_parameters(model)


def compiled(model: nn.Module, how: str | None) -> nn.Module:
    """Compile a model.

    Args:
        model: Model to compile.
        how: Name of a backend or of a mode of inductor; None returns the model as it is.

    Raises:
        InputError: Torch has no such backend, and inductor no such mode.
    """
    if how is None:
        return model
    is_mode = how in torch._inductor.list_mode_options()
    if not is_mode and how not in torch.compiler.list_backends(exclude_tags=()):
        raise InputError(f"--compile {how}: torch has no such backend, and inductor no such mode")
    # The variants of a model share code, and each is compiled for inference and for training.
    torch._dynamo.config.cache_size_limit = 64
    return torch.compile(model, dynamic=False, **{"mode" if is_mode else "backend": how})


def _autocast(args: argparse.Namespace) -> Callable[[], AbstractContextManager]:
    if not args.amp_dtype:
        return contextlib.nullcontext
    return partial(torch.autocast, args.device.type, DTYPES[args.amp_dtype])


def benchmark_models(args: argparse.Namespace) -> list[dict]:
    """Measure classifiers at 224 x 224, in inference and in training steps (forward, backward, AdamW).

    Args:
        args: Flags models, batch_size, device, dtype, amp_dtype, compile, repeats.

    Returns:
        One row per model: parameters, multiply-adds, images/s, and bytes including weights, gradients and optimizer.
    """
    for name in PUBLISHED_ARITHMETIC.intersection(args.models):
        importlib.import_module(f"litvit.benchmarks.{name}")  # registers it
    return list(measure(args.models, args).values())


def measure(names: Iterable[str], args: argparse.Namespace) -> dict[str, dict]:
    """Measure classifiers interleaved, and leave the device free.

    Args:
        names: Names of the models.
        args: Flags batch_size, device, dtype, amp_dtype, compile, repeats.

    Returns:
        Rows of `benchmark_models` by name.
    """
    device = args.device
    models = {name: Classifier(name, args) for name in map(cli.model_name, names)}
    rows = {name: {"model": name, "parameters": model.parameters, "macs": model.macs} for name, model in models.items()}
    for name, model in models.items():
        model.start_inference()
        rows[name]["test_memory"] = peak_memory(model.infer, device)
        model.start_training()
        rows[name]["training_memory"] = peak_memory(model.train, device)
        model.leave()
    for model in models.values():
        model.start_inference()
    inference = interleaved_medians({name: model.infer for name, model in models.items()}, args.repeats, device)
    for model in models.values():
        model.start_training()
    training = interleaved_medians({name: model.train for name, model in models.items()}, args.repeats, device)
    for name, row in rows.items():
        row["inference_images_per_second"] = args.batch_size / inference[name]
        row["training_images_per_second"] = args.batch_size / training[name]
        models[name].leave()
    return rows


def benchmark_table1(args: argparse.Namespace) -> list[dict]:
    """Measure the models of LIT's Table 1, LITv2 and LVT, with their measured and published ratios.

    Returns:
        Rows of `benchmark_models`, with what `compare` says of the counterpart where that is measured too.
    """
    rows = {row["model"]: row for row in benchmark_models(args)}
    return [row | compare(row, rows.get(COUNTERPARTS.get(name))) for name, row in rows.items()]


def compare(row: dict, other: dict | None) -> dict:
    """Return `counterpart`, `ratios` and `published_ratios` of a model to another one; nothing if there is none."""
    if other is None:
        return {}
    keys = [key for key in (*MEASURED, "training_images_per_second") if row.get(key) is not None]
    pairs = {key: tuple(getattr(PUBLISHED[each["model"]], key) for each in (row, other)) for key in MEASURED}
    return {
        "counterpart": other["model"],
        "ratios": {key: row[key] / other[key] for key in keys},
        "published_ratios": {key: own / theirs for key, (own, theirs) in pairs.items() if own and theirs},
    }


def benchmark_dense(args: argparse.Namespace) -> list[dict]:
    """Measure backbones with the maps of all stages, forward and backward in training mode.

    Args:
        args: Flags models (`NAME:PATH` forces a path of attention), inputs, device, dtype, amp_dtype, repeats.

    Returns:
        One row per input and model: milliseconds, and bytes including weights and gradients.
    """
    device, rows = args.device, []
    for batch, *size in args.inputs:
        size = tuple(map(_padded, size))
        images = torch.randn(batch, 3, *size, device=device, dtype=DTYPES[args.dtype])
        backbones = {spec: _backbone(spec, size, args) for spec in args.models}
        calls = {
            spec: partial(_forward_backward, model, spec.partition(":")[2], images, _autocast(args))
            for spec, model in backbones.items()
        }
        memory = {}
        for spec, model in backbones.items():
            model.to(device)
            memory[spec] = peak_memory(calls[spec], device)
            model.to("cpu")
        for model in backbones.values():
            model.to(device)
        medians = interleaved_medians(calls, args.repeats, device)
        rows += [
            {
                "input": " x ".join(map(str, (batch, *size))),
                "model": spec,
                "milliseconds": 1000 * medians[spec],
                "memory": memory[spec],
            }
            for spec in backbones
        ]
    return rows


def _backbone(spec: str, size: tuple[int, int], args: argparse.Namespace) -> nn.Module:
    name, _, path = spec.partition(":")
    if path and path not in PATHS:
        raise InputError(f"{spec}: the path of attention must be one of {', '.join(PATHS)}")
    ours = model_entrypoint(cli.model_name(name)).__module__.startswith("litvit")
    fixed = not ours and timm.get_pretrained_cfg(name).fixed_input_size
    try:
        model = timm.create_model(name, features_only=True, **({"img_size": size} if fixed else {}))
    except (RuntimeError, TypeError, AssertionError) as error:
        raise InputError(f"{name} is no backbone for images of {size[0]} x {size[1]}: {error}") from error
    if path and not any(
        isinstance(m, Attention) and m.relative_position_bias_table is not None for m in model.modules()
    ):
        raise InputError(f"{spec}: {name} has no path of attention to choose, lit_s, lit_m and lit_b do")
    layout = torch.channels_last if is_convolutional(model) else torch.preserve_format
    return _without_stochastic_depth(model).to(dtype=DTYPES[args.dtype], memory_format=layout).train()


def _forward_backward(
    model: nn.Module, path: str, images: Tensor, autocast: Callable[[], AbstractContextManager]
) -> None:
    with _attention_path(path), autocast():
        maps = model(images)
    sum(features.float().mean() for features in maps).backward()
    model.zero_grad()


@contextlib.contextmanager
def _attention_path(path: str) -> Iterator[None]:
    before = os.environ.pop("LIT_ATTENTION", None)
    os.environ.update({"LIT_ATTENTION": path} if path else {})
    try:
        yield
    finally:
        os.environ.pop("LIT_ATTENTION", None)
        os.environ.update({"LIT_ATTENTION": before} if before else {})
