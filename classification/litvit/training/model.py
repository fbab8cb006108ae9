"""A model, the images that it takes, and the precision that it runs in."""

import argparse
import ast
import contextlib
import difflib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.layers import to_2tuple
from timm.models import group_parameters
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import litvit  # noqa: F401 - registers the project's models with timm
from litvit.checkpoints import count_classes, load_weights
from litvit.data.pixels import Decoder
from litvit.downloads import is_link
from litvit.errors import InputError, is_from_user_code
from litvit.models.backbone import Backbone
from litvit.runs.folder import read_description, weights_file
from litvit.settings import setting

HUB_SOURCES = ("local-dir:", "hf-hub:")  # what timm's names of folders and of models on the Hub begin with
INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos", "box", "hamming")


def image_size(size: int | Sequence[int] | None) -> int | tuple[int, int] | None:
    """Return an image size as settings and files hold it.

    Args:
        size: Pixels per side, or height and width.

    Returns:
        One number for square images, else height and width; None for None.

    Raises:
        InputError: more than two numbers.
    """
    if size is None:
        return None
    sides = to_2tuple(size)
    if len(sides) not in (1, 2):
        raise InputError(f"--img-size takes one number or two, height and width, not {len(sides)}")
    return sides[0] if sides[0] == sides[-1] else sides


def key_value(text: str) -> tuple[str, Any]:
    """Parse `key=value`. The value is a Python literal (numbers, lists, True), else a string. Tuples become lists."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise argparse.ArgumentTypeError(f"'{text}' is not KEY=VALUE")
    try:
        literal = ast.literal_eval(value)
        return key, list(literal) if isinstance(literal, tuple) else literal  # as a YAML file would give it back
    except (ValueError, SyntaxError):
        return key, value


@dataclass(frozen=True)
class ModelConfig:
    """A model and its images."""

    model: str | None = setting(None, "NAME", "lit_ti, lit_s, lit_m, lit_b, litv2_s, lvt, pvt_small, or any of timm's")
    imports: Sequence[str] = setting(
        (), "MODULE", "modules of your own that register models and the like", "--import", nargs="+"
    )
    img_size: int | Sequence[int] | None = setting(
        None, "N", "pixels per side, or height and width (the model's own; ours: 224)", nargs="+"
    )
    in_chans: int = setting(3, "N", "image channels: 1 for grey, 3 for RGB, 4 for RGBA")
    exif_transpose: bool = setting(False, None, "turn photographs upright by their EXIF orientation (off: as stored)")
    model_kwargs: dict[str, Any] = setting({}, "K=V", "further arguments of the model", nargs="*", type=key_value)
    crop_pct: float | None = setting(None, "X", "crop / resize of validation (the model's own)")
    interpolation: str | None = setting(None, "NAME", "interpolation of validation (the model's own)")
    mean: Sequence[float] | None = setting(None, "X", "mean for normalisation (the model's own)", nargs="+")
    std: Sequence[float] | None = setting(None, "X", "standard deviation of it (the model's own)", nargs="+")
    drop: float = setting(0.0, "P", "dropout before the classifier", training=True)
    drop_path: float = setting(0.0, "P", "stochastic depth rate of the last block", training=True)
    pretrained: bool = setting(False, None, "the published weights of the model, of ours or of timm's")
    initial_checkpoint: str | None = setting(
        None, "FILE", "weights to start from, a run, a file or a link, for any classes or image channels", training=True
    )
    freeze: int | None = setting(
        None, "N", "patch embedding and first N stages (blocks of a model without) that are not trained", training=True
    )
    grad_checkpointing: bool = setting(False, None, "recompute blocks in the backward pass: less memory", training=True)
    sync_bn: bool = setting(False, None, "BatchNorm statistics over all GPUs", training=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "img_size", image_size(self.img_size))
        Decoder(self.in_chans)  # refuses other numbers of channels
        if self.pretrained and self.initial_checkpoint:
            raise InputError("--pretrained and --initial-checkpoint are both weights to start from: give one of them")
        if "pretrained" in self.model_kwargs:
            raise InputError("pretrained in --model-kwargs: use --pretrained")
        if "img_size" in self.model_kwargs:
            raise InputError(
                f"img_size={self.model_kwargs['img_size']} in --model-kwargs would be the model's size and not that of "
                "the images: --img-size N, or --img-size HEIGHT WIDTH, is both"
            )

    @property
    def decoder(self) -> Decoder:
        """How files become the model's images."""
        return Decoder(self.in_chans, self.exif_transpose)

    def as_flags(self) -> str:
        """Name the flags that a model is built with, for a message."""
        size = (self.img_size,) if isinstance(self.img_size, int) else self.img_size or ()
        flags = {
            "img-size": " ".join(map(str, size)),
            "in-chans": self.in_chans,
            "drop": self.drop,
            "drop-path": self.drop_path,
            "model-kwargs": " ".join(f"{name}={value}" for name, value in self.model_kwargs.items()),
        }
        return ", ".join(f"--{name} {value}" for name, value in flags.items() if value)


@dataclass(frozen=True)
class PrecisionConfig:
    """Mixed precision, compilation, and the average of weights."""

    amp: bool = setting(
        False, None, "mixed precision (old names work)", "--amp", "--apex-amp", "--native-amp", action="store_true"
    )
    amp_dtype: str = setting("float16", None, "float16 (GPU only), bfloat16", choices=["float16", "bfloat16"])
    torchcompile: str | None = setting(None, "BACKEND", "compile the model (inductor)", nargs="?", const="inductor")
    model_ema: bool = setting(False, None, "average the weights; validation uses the average", training=True)
    model_ema_decay: float = setting(0.9998, "X", "decay of the average", training=True)
    model_ema_warmup: bool = setting(False, None, "let the decay rise at the start", training=True)

    def __post_init__(self) -> None:
        if self.torchcompile and self.torchcompile not in torch.compiler.list_backends(exclude_tags=()):
            raise InputError(
                f"--torchcompile {self.torchcompile}: torch's backends are {', '.join(torch.compiler.list_backends())}"
            )

    def autocast(self, device: torch.device) -> Callable[[], AbstractContextManager]:
        """Return a function that makes the context of a forward pass.

        float16 is for GPUs: on a CPU, a recipe that asks for it trains in float32.
        """
        if not self.amp or (self.amp_dtype == "float16" and device.type == "cpu"):
            return contextlib.nullcontext
        return partial(torch.autocast, device.type, getattr(torch, self.amp_dtype))

    def grad_scaler(self, device: torch.device) -> torch.amp.GradScaler | None:
        """Return the loss scaling of float16 on a GPU, None where it is not needed."""
        scaled = self.amp and self.amp_dtype == "float16" and device.type == "cuda"
        return torch.amp.GradScaler(device.type) if scaled else None

    def describe(self, device: torch.device) -> str:
        """Name the precision for a log line."""
        if self.amp and self.amp_dtype == "float16" and device.type == "cpu":
            return "float32 (float16 needs a GPU; --amp-dtype bfloat16 works on a CPU)"
        return self.amp_dtype if self.amp else "float32"


def build_model(config: ModelConfig, num_classes: int | None) -> nn.Module:
    """Create a model.

    Args:
        config: Model to create.
        num_classes: Number of classes, None for the model's own.

    Raises:
        InputError: arguments that the model does not take, or weights that cannot be fetched. An exception in a model
            of your own is raised unchanged.
    """
    kwargs = {
        "pretrained": config.pretrained,
        "img_size": config.img_size,
        "drop_rate": config.drop or None,
        "drop_path_rate": config.drop_path or None,
        **config.model_kwargs,
    }
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    if "features_only" in kwargs:
        raise InputError("features_only is not a classifier: leave it out of --model-kwargs")
    takes_any_size = False
    try:
        model = timm.create_model(config.model, num_classes=num_classes, in_chans=config.in_chans, **kwargs)
        if config.grad_checkpointing and not hasattr(model, "set_grad_checkpointing"):
            raise InputError(f"--grad-checkpointing: {config.model} has no set_grad_checkpointing")
        if config.grad_checkpointing:
            model.set_grad_checkpointing(True)
    except (TypeError, LookupError, ArithmeticError) as error:
        unexpected = "unexpected keyword argument" in str(error) and "'img_size'" in str(error)
        takes_any_size = bool(config.img_size) and unexpected
        if not takes_any_size and is_from_user_code(error):
            raise
        if not takes_any_size:
            raise InputError(f"{config.model}: {error}; is it in --model-kwargs?") from error
    except (ValueError, AssertionError, RuntimeError) as error:
        if is_from_user_code(error):
            raise
        reason = " ".join(str(error).split()) or f"it cannot be built with {config.as_flags()}"
        raise InputError(f"{config.model}: {reason}") from error
    except OSError as error:
        if not config.pretrained or is_from_user_code(error):
            raise
        reason = " ".join(str(error).split())
        raise InputError(f"cannot get the pretrained weights of {config.model}: {reason}") from error
    # Here, so that an error of the second try does not carry the first one's traceback.
    model = build_model(replace(config, img_size=None), num_classes) if takes_any_size else model
    stride = Backbone.total_stride
    if isinstance(model, Backbone) and (least := min(to_2tuple(config.img_size or stride))) < stride:
        raise InputError(f"images must have {stride} pixels or more per side, not --img-size {least}")
    return model


def freeze_stages(model: nn.Module, number: int) -> None:
    """Freeze the patch embedding and the first stages of a model; of one without stages, the first blocks.

    Args:
        model: Model with timm's `group_matcher`.
        number: Number of stages; 0 for the patch embedding alone.

    Raises:
        InputError: the model has not so many stages, or does not say what they are.
    """
    if not hasattr(model, "group_matcher"):
        raise InputError(f"--freeze {number}: {type(model).__name__} has no group_matcher that names its stages")
    stem, *stages, _ = group_parameters(model, model.group_matcher(coarse=True)).values()  # the last is the head
    if number > len(stages):
        raise InputError(f"--freeze {number}: the model has {len(stages)} stages")
    frozen = set(itertools.chain(stem, *stages[:number]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)


def keep_frozen(model: nn.Module) -> None:
    """Put the BatchNorms of frozen stages of a model in training mode back to evaluation: statistics stay."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not any(part.requires_grad for part in module.parameters()):
            module.eval()


def find_weights(source: str) -> tuple[str | None, dict[str, Any]]:
    """Find the weights that a command line or `litvit.load` names.

    Args:
        source: Folder of a run, or one that `litvit hub-folder` made; a file or a link; or the name of a model of ours
            or timm's with published weights, such as lit_s.in1k or hf-hub:OWNER/NAME.

    Returns:
        File or link of the weights, None for the published ones of a model. What is known of the model, see
        `read_description`: of published ones its name alone.

    Raises:
        InputError: there is no such thing, or its description is damaged.
    """
    path = Path(source).expanduser()
    if is_link(source) or path.exists():
        if (path / "config.json").is_file():
            weights = path / "model.safetensors"  # those of `litvit hub-folder` know more than config.json
            if weights.is_file() and (description := _described(str(weights))).get("model"):
                return str(weights), description
            return None, {"model": f"{HUB_SOURCES[0]}{path}"}
        file = weights_file(source)
        return file, _described(file)
    if source.startswith(HUB_SOURCES) or _is_published(source):
        return None, {"model": source}
    try:
        beside = sorted(entry.name for entry in path.parent.iterdir())
    except OSError:
        beside = []
    near = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.8)
    near = [str(path.parent / name) for name in near] or difflib.get_close_matches(
        source.partition(".")[0], timm.list_models(), n=1, cutoff=0.7
    )
    hint = f"; did you mean {near[0]}?" if near else " (a run's folder, a file, a link, or a name such as lit_s.in1k)"
    raise InputError(f"no checkpoint at {source}{hint}")


def _is_published(name: str) -> bool:
    """Return whether a name is that of a model, with one of its tags or none. A file such as lit_ti.pth is not."""
    try:
        return timm.is_model(name) and timm.get_pretrained_cfg(name) is not None
    except RuntimeError:  # an unknown tag
        return False


def initial_weights(source: str) -> tuple[str, dict[str, Any]]:
    """Find the weights of `--initial-checkpoint`, see `find_weights`.

    Raises:
        InputError: there are no such weights, or they are published ones.
    """
    file, description = find_weights(source)
    if file is None:
        raise InputError(f"--initial-checkpoint {source}: published weights are --model {source} --pretrained")
    return file, description


def _described(file: str) -> dict[str, Any]:
    """Return the description of weights. One that would have timm read other files than these is refused."""
    description = read_description(file)
    elsewhere = {"checkpoint_path", "cache_dir", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"}
    found = elsewhere & description.get("model_kwargs", {}).keys()
    name = str(description.get("model", ""))
    if found or ":" in name:
        raise InputError(f"{file} says that its model is read from elsewhere ({', '.join(sorted(found)) or name})")
    return description


@contextlib.contextmanager
def named_weights(checkpoint: str | None, model: str) -> Iterator[None]:
    """Say whose weights a checkpoint holds if a block, which loads them, refuses them for another model."""
    try:
        yield
    except InputError as error:
        known = read_description(checkpoint).get("model", model)
        if known == model:
            raise
        message = f"{checkpoint} holds the weights of {known}, and --model is {model}: leave that out"
        raise InputError(message) from error


def build_trained_model(
    config: ModelConfig, num_classes: int | None, checkpoint: str | None, data: str | Path = ""
) -> nn.Module:
    """Create a model with the weights of a checkpoint, or with its published ones.

    Args:
        config: Model to create.
        num_classes: Number of classes, None for that of the weights.
        checkpoint: File or link of weights, None for the published ones.
        data: Name of the data that has this number of classes, for messages.

    Raises:
        InputError: weights that are missing, do not fit, or are of other classes.
    """
    with named_weights(checkpoint, config.model):
        model = build_model(replace(config, pretrained=checkpoint is None), num_classes)
        if checkpoint is not None:
            held = count_classes(checkpoint, model) if num_classes is None else None
            if held and held != model.num_classes:
                model = build_model(replace(config, pretrained=False), held)
            load_weights(model, checkpoint)
            return model
    known = model.pretrained_cfg["num_classes"]
    if num_classes is not None and known != num_classes:  # timm has made a new classifier
        raise InputError(
            f"the pretrained {config.model} knows {known} classes, {data} has {num_classes}: --num-classes {known} and "
            "--class-map FILE say which is which, or give the --checkpoint of a model that was trained on this data"
        )
    return model


def pretrained_source(model: nn.Module) -> str:
    """Return where the pretrained weights of a model come from: a file, a repository of the Hub, or a link."""
    cfg = getattr(model, "pretrained_cfg", {})
    repository = cfg.get("hf_hub_id")
    sources = cfg.get("file"), f"hf-hub:{repository}" if repository else None, cfg.get("url"), cfg.get("origin_url")
    return next(filter(None, sources), "its own code")


def data_settings(config: ModelConfig, model: nn.Module) -> dict:
    """Return timm's data configuration: input_size, mean, std, interpolation and crop_pct.

    Args:
        config: Settings that have precedence over the model's own.
        model: Model whose settings fill the rest.

    Raises:
        InputError: a mean or std for other channels, or that no image can be normalised with.
    """
    size = (config.in_chans, *to_2tuple(config.img_size)) if config.img_size else None
    for name in ("mean", "std"):
        values = getattr(config, name)
        if values is not None and len(values) not in (1, config.in_chans):
            raise InputError(
                f"images of {config.in_chans} channels (--in-chans) need --mean and --std with 1 value"
                f"{f' or {config.in_chans}' if config.in_chans > 1 else ''}: --{name} has {len(values)}"
            )
        if values is not None and not all(map(math.isfinite, values)):
            raise InputError(f"--{name} must be finite, not {values}")
    if config.std is not None and min(config.std) <= 0:
        raise InputError(f"--std must be positive, not {config.std}")
    if config.crop_pct is not None and not 0 < config.crop_pct <= 1:
        raise InputError(f"--crop-pct must be above 0 and at most 1, not {config.crop_pct}")
    data_config = resolve_data_config({**asdict(config), "input_size": size}, model=model)
    data_config["input_size"] = (config.in_chans, *data_config["input_size"][-2:])
    for name in ("mean", "std"):
        if len(data_config[name]) != config.in_chans:
            raise InputError(
                f"--in-chans {config.in_chans} needs --mean and --std: the model's have {len(data_config[name])}"
            )
    if data_config["interpolation"] not in INTERPOLATIONS:
        raise InputError(f"--interpolation is one of {', '.join(INTERPOLATIONS)}, not {data_config['interpolation']}")
    return data_config
