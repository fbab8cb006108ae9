"""Deformable token merging in place of the downsampling of other models."""

import contextlib
import copy

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from litvit.dtm.merging import DeformableTokenMerging
from litvit.errors import InputError
from litvit.tokens import pad_tokens

try:
    from timm.data import resolve_input_data_config
except ImportError:  # an older timm, which knows only the size in the pretrained_cfg
    from timm.data import resolve_model_data_config as resolve_input_data_config

torch.fx.wrap("pad_tokens")  # a leaf of torch.fx's traces: its Python code depends on sizes


class MapMerging(DeformableTokenMerging):
    """Deformable token merging of maps in the layouts of another model.

    Args:
        in_dim: Number of channels of the maps to merge.
        out_dim: Number of channels of the merged maps.
        channels_first: Whether the channels come first, before and after merging.
        pads: Whether odd maps are padded right and below with zeros. Else an odd last row or column is dropped.
        **dd: Device and dtype of the parameters and buffers.
    """

    def __init__(self, in_dim: int, out_dim: int, channels_first: tuple[bool, bool], pads: bool, **dd) -> None:
        super().__init__(in_dim, out_dim, **dd)
        self.channels_first = channels_first
        self.pads = pads

    def forward(self, x: Tensor, return_offset: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Merge maps, (B, C, H, W) or (B, H, W, C), see `DeformableTokenMerging.forward`."""
        first, then_first = self.channels_first
        if first:
            x = x.permute(0, 2, 3, 1)
        merged, offset = super().forward(pad_tokens(x, 2) if self.pads else x, return_offset=True)
        if then_first:
            merged = merged.permute(0, 3, 1, 2).contiguous()
        return (merged, offset) if return_offset else merged


def replace_merging(model: nn.Module, img_size: int | tuple[int, int] | None = None) -> dict[str, nn.Module]:
    """Replace the 2 x 2 downsampling between the stages of a model by deformable token merging, in place.

    It works for models whose maps are (B, H, W, C) or (B, C, H, W) between the stages, such as timm's Swin, ConvNeXt,
    PVTv2 and MetaFormer. Such downsampling is a module that halves a map of stride 4 or more. It consists of one linear
    layer or convolution, and norms, and there is no way around it: a downsampling inside a residual block stays.

    All other weights stay. Those of the new modules are named after the modules that they replace, and are new.

    Args:
        model: Model, a classifier or a dense backbone.
        img_size: Image size that the model takes, an int or (H, W). None for what timm knows of it.

    Returns:
        Replaced modules by name.

    Raises:
        InputError: The model has no such downsampling, or does not take images of this size.
    """
    # It is found on a copy without numbers.
    shadow = copy.deepcopy(model).to("meta", torch.float32).eval().requires_grad_(False)
    channels = next((p.shape[1] for p in shadow.parameters() if p.dim() == 4), 3)
    size = resolve_input_data_config(model)["input_size"][1:] if img_size is None else to_2tuple(img_size)
    image = torch.empty(1, channels, *size, device="meta", requires_grad=True)
    try:
        shapes = _map_shapes(shadow, image)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        message = f"{type(model).__name__} does not run on images of {size[0]} x {size[1]} pixels: name its img_size"
        raise InputError(message) from error
    own = [name for name, module in shadow.named_modules() if isinstance(module, DeformableTokenMerging)]
    replaced = {}
    for name, module in shadow.named_modules():
        if name not in shapes or any(name.startswith(f"{outer}.") for outer in (*own, *replaced)):
            continue
        merging = _matching_merging(module, *shapes[name], size)
        if merging is None or not _is_on_every_way(shadow, module, image):
            continue
        old = replaced[name] = model.get_submodule(name)
        like = next(old.parameters())
        parent, _, own_name = name.rpartition(".")
        new = MapMerging(*merging, device=like.device, dtype=like.dtype).train(old.training)
        setattr(model.get_submodule(parent), own_name, new)
    if not replaced:
        raise InputError(f"{type(model).__name__} has no 2 x 2 downsampling between stages that merging can replace")
    return replaced


def _map_shapes(model: nn.Module, image: Tensor) -> dict[str, tuple[torch.Size, torch.Size]]:
    """Run a model and return the shapes of input and output of the modules that are called once, with one map."""
    calls: dict[str, list[tuple]] = {}

    def note(name: str, args: tuple, output: object) -> None:
        calls.setdefault(name, []).append((*args, output))

    hooks = [
        module.register_forward_hook(lambda _, args, output, name=name: note(name, args, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        name: tuple(tensor.shape for tensor in found[0])
        for name, found in calls.items()
        if len(found) == 1 and len(found[0]) == 2 and all(isinstance(x, Tensor) and x.dim() == 4 for x in found[0])
    }


def _matching_merging(
    module: nn.Module, before: torch.Size, after: torch.Size, img_size: tuple[int, int]
) -> tuple[int, int, tuple[bool, bool], bool] | None:
    """Return the first arguments of the `MapMerging` that can replace a module, None if there is none."""
    weights = [parameter for parameter in module.parameters() if parameter.dim() > 1]
    if len(weights) != 1 or weights[0].dim() not in (2, 4) or weights[0].shape[2:] == (1, 1):
        return None
    out_dim, in_dim = weights[0].shape[:2]
    if weights[0].dim() == 2:  # linear in the concatenated channels of 2 x 2 tokens
        in_dim, rest = divmod(in_dim, 4)
        if rest:
            return None
    for channels_first in ((False, False), (True, True), (True, False), (False, True)):
        (channels, *old), (out_channels, *new) = map(_channels_and_size, (before, after), channels_first)
        if (channels, out_channels) != (in_dim, out_dim):
            continue
        halved = all(small in (side // 2, (side + 1) // 2) for side, small in zip(old, new, strict=True))
        if halved and all(4 * (side - 1) < pixels for side, pixels in zip(old, img_size, strict=True)):
            return in_dim, out_dim, channels_first, _pads(module, in_dim, *channels_first)
    return None


def _channels_and_size(shape: torch.Size, channels_first: bool) -> tuple[int, int, int]:
    _, *rest = shape
    return tuple(rest) if channels_first else (rest[-1], *rest[:-1])


def _pads(module: nn.Module, in_dim: int, first: bool, then_first: bool) -> bool:
    """Return whether a module makes two rows of three. If it does not take three, that does not matter."""
    with contextlib.suppress(RuntimeError, AssertionError):
        map_ = torch.empty((1, in_dim, 3, 3) if first else (1, 3, 3, in_dim), device="meta")
        return _channels_and_size(module(map_).shape, then_first)[1] == 2
    return True


def _is_on_every_way(model: nn.Module, module: nn.Module, image: Tensor) -> bool:
    """Return whether all of a model's last output that depends on the image does so through a module."""
    hook = module.register_forward_hook(lambda _, args, output: output.detach())
    try:
        with torch.enable_grad():
            output = model(image)
    finally:
        hook.remove()
    while not isinstance(output, Tensor):
        output = list(output.values() if isinstance(output, dict) else output)[-1]
    return not output.requires_grad
