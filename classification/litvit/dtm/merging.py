"""Deformable token merging, the downsampling of LIT: tokens of one object merge, wherever they lie."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from litvit.dtm.deform_conv import deform_conv_tokens, sample_map
from litvit.tokens import check_tokens

# Leaves of torch.fx's traces: their Python code depends on shapes, types and devices.
torch.fx.wrap("_check_tokens")
torch.fx.wrap("_fold_norm")
torch.fx.wrap("deform_conv_tokens")
torch.fx.wrap("sample_map")


class DeformableTokenMerging(nn.Module):
    """Merge 2 x 2 tokens with learned offsets: DTM(X) = GELU(BatchNorm(DeformConv(X))).

    Takes channels-last tokens, so it fits between the stages of any hierarchical transformer. The activation (GELU) and
    the factor (2) are fixed. `norm` may be replaced by another norm of (B, C, h, w) maps, and `conv` by one without
    bias. Offsets start at 0, where the module is an ordinary strided convolution followed by norm and activation.

    `conv`, and in evaluation `norm`, are not called: their weights are read. If one of them has hooks, or is not an
    nn.Conv2d or a BatchNorm (an adapter, a parametrization), it is called. The convolution's input is then the map that
    the taps of all kernels make up, (B, in_dim, H, W) for even H and W.

    Train the offsets, the parameters of `self.offset`, at a lower learning rate than the rest, 0.01 times in LIT:

        offsets = offset_parameters(model)
        rest = [p for p in model.parameters() if all(p is not offset for offset in offsets)]
        torch.optim.AdamW([{"params": rest}, {"params": offsets, "lr": 0.01 * lr}], lr=lr)

    Args:
        in_dim: Number of channels of the tokens to merge.
        out_dim: Number of channels of the merged tokens.
        device: Device of the parameters and buffers.
        dtype: Type of the parameters and buffers.
    """

    def __init__(
        self, in_dim: int, out_dim: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.in_dim = in_dim
        dd = {"device": device, "dtype": dtype}
        self.offset = nn.Conv2d(in_dim, 8, kernel_size=2, stride=2, **dd)
        self.conv = nn.Conv2d(in_dim, out_dim, kernel_size=2, stride=2, **dd)
        self.norm = nn.BatchNorm2d(out_dim, **dd)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    def forward(self, x: Tensor, return_offset: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Merge tokens.

        Args:
            x: Tokens, (B, H, W, in_dim). An odd last row or column is dropped. Pad before if it matters.
            return_offset: Whether to return the offsets too.

        Returns:
            Tokens, (B, H//2, W//2, out_dim). With `return_offset` also the offsets, (B, H//2, W//2, 8), in pixels of
            the input map: (dy, dx) for the taps (0, 0), (0, 1), (1, 0), (1, 1).

        Raises:
            ValueError: x has another shape, or is a map of fewer than 2 x 2 tokens.
        """
        _check_tokens(x, self.in_dim)
        # Seen as (B, C, H, W) in torch's channels_last memory format, tokens need no copy.
        offset = self.offset(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        folds = False
        if type(self.conv) is nn.Conv2d and need_not_be_called(self.conv):
            weight, bias, norm = self.conv.weight, self.conv.bias, self.norm
            folds = _is_fixed_batch_norm(norm) and need_not_be_called(norm)
            if folds:
                weight, bias = _fold_norm(
                    weight, bias, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps
                )
            merged = deform_conv_tokens(x, offset, weight, bias)
        else:
            merged = self.conv(sample_map(x, offset, 2).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if not folds:
            merged = self.norm(merged.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        merged = F.gelu(merged)
        return (merged, offset) if return_offset else merged

    def __prepare_scriptable__(self) -> None:
        raise NotImplementedError("torch.jit.script does not take token merging: use torch.jit.trace or torch.export")


def _check_tokens(x: Tensor, in_dim: int) -> None:
    check_tokens(x, in_dim)
    if x.shape[1] < 2 or x.shape[2] < 2:
        raise ValueError(f"the map must have 2 x 2 tokens or more, got {x.shape[1]} x {x.shape[2]}")


def need_not_be_called(module: nn.Module) -> bool:
    """Return whether nothing sees a module's call: no hooks, no replaced `forward`."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return not any(hooks) and "forward" not in module.__dict__ and not _has_any_global_hook()


def _is_fixed_batch_norm(norm: nn.Module) -> bool:
    """Return whether a norm is a BatchNorm that takes its running statistics, and not those of the batch."""
    is_batch_norm = type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm)
    return is_batch_norm and not norm.training and norm.running_mean is not None


def _fold_norm(
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    norm_scale: Tensor | None,
    norm_shift: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Fold a BatchNorm's running statistics, scale and shift into weight and bias of the convolution before it."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    scale = (running_var.to(wide) + eps).rsqrt()
    if norm_scale is not None:
        scale = norm_scale.to(wide) * scale
    shift = -running_mean if bias is None else bias - running_mean
    shift = shift * scale
    if norm_shift is not None:
        shift = shift + norm_shift
    return (weight * scale.view(-1, 1, 1, 1)).to(weight.dtype), shift.to(weight.dtype)


def offset_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of the offset convolutions of all merging modules in a model, which learn more slowly."""
    merging = (module for module in model.modules() if isinstance(module, DeformableTokenMerging))
    return [parameter for module in merging for parameter in module.offset.parameters()]
