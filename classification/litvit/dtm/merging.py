"""Deformable token merging, the downsampling of LIT: tokens of one object merge, wherever they lie."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litvit.dtm.deform_conv import deform_conv_tokens


class DeformableTokenMerging(nn.Module):
    """Merge 2 x 2 tokens with learned offsets: DTM(X) = GELU(BatchNorm(DeformConv(X))).

    Takes channels-last tokens, so it fits between the stages of any hierarchical transformer. The activation (GELU) and
    the factor (2) are fixed. `norm` may be replaced by another norm of (B, C, h, w) maps, and `conv` by one without
    bias. Offsets start at 0, where the module is an ordinary strided convolution followed by norm and activation.

    Train the offsets, the parameters of `self.offset`, at a lower learning rate than the rest, 0.01 times in LIT:

        offsets = offset_parameters(model)
        rest = [p for p in model.parameters() if all(p is not offset for offset in offsets)]
        torch.optim.AdamW([{"params": rest}, {"params": offsets, "lr": 0.01 * lr}], lr=lr)

    Args:
        in_dim: Number of channels of the tokens to merge.
        out_dim: Number of channels of the merged tokens.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.offset = nn.Conv2d(in_dim, 8, kernel_size=2, stride=2)
        self.conv = nn.Conv2d(in_dim, out_dim, kernel_size=2, stride=2)
        self.norm = nn.BatchNorm2d(out_dim)
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
        if x.dim() != 4 or x.shape[3] != self.conv.in_channels:
            raise ValueError(f"x must be tokens (B, H, W, {self.conv.in_channels}), got shape {tuple(x.shape)}")
        if x.shape[1] < 2 or x.shape[2] < 2:
            raise ValueError(f"the map must have 2 x 2 tokens or more, got {x.shape[1]} x {x.shape[2]}")
        # Seen as (B, C, H, W) in torch's channels_last memory format, tokens need no copy.
        offset = self.offset(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if self._norm_is_fixed():
            merged = deform_conv_tokens(x, offset, *self._normalised_conv())
        else:
            merged = deform_conv_tokens(x, offset, self.conv.weight, self.conv.bias)
            merged = self.norm(merged.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        merged = F.gelu(merged)
        return (merged, offset) if return_offset else merged

    def _norm_is_fixed(self) -> bool:
        """Return whether the norm is a BatchNorm that takes its running statistics, and not those of the batch."""
        norm = self.norm
        is_batch_norm = type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm)
        return is_batch_norm and not norm.training and norm.running_mean is not None

    def _normalised_conv(self) -> tuple[Tensor, Tensor]:
        """Fold the norm's running statistics, scale and shift into weight and bias of the convolution."""
        weight, bias, norm = self.conv.weight, self.conv.bias, self.norm
        wide = torch.promote_types(weight.dtype, torch.float32)
        scale = (norm.running_var.to(wide) + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = norm.weight.to(wide) * scale
        shift = -norm.running_mean if bias is None else bias - norm.running_mean
        shift = shift * scale
        if norm.bias is not None:
            shift = shift + norm.bias
        return (weight * scale.view(-1, 1, 1, 1)).to(weight.dtype), shift.to(weight.dtype)


def offset_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of the offset convolutions of all merging modules in a model, which learn more slowly."""
    merging = (module for module in model.modules() if isinstance(module, DeformableTokenMerging))
    return [parameter for module in merging for parameter in module.offset.parameters()]
