"""HiLo attention (LITv2, "Fast Vision Transformers with HiLo Attention", Pan et al., NeurIPS 2022, arXiv:2205.13213).

Shape letters: B images, (H, W) map of tokens, (h, w) map of windows, s side of a window in tokens, C channels, d
channels per head.
"""

import torch
import torch.nn.functional as F
from timm.layers import use_fused_attn
from torch import Tensor, nn

from litvit.attention.product import attend
from litvit.errors import InputError
from litvit.tokens import check_tokens, crop_tokens, pad_tokens

# Leaves of torch.fx's traces: their Python code depends on sizes.
torch.fx.wrap("check_tokens")
torch.fx.wrap("crop_tokens")
torch.fx.wrap("pad_tokens")


class HiLo(nn.Module):
    """Self-attention whose heads see either fine detail near by or the whole map coarsely (section 3.2).

    Of the heads, int(num_heads * alpha) are for low frequencies, the rest for high ones:

    - Hi-Fi: attention among the s x s tokens of each window, softmax(q k^T / sqrt(d)) v.
    - Lo-Fi: attention from every token to the means of all windows.

    The output has the channels of Hi-Fi before those of Lo-Fi. With windows of one token all heads are Lo-Fi, which
    then is ordinary attention. A map that windows do not divide is padded right and below with zeros. The padding takes
    part: in the means, as keys of Hi-Fi.

    Takes channels-last tokens, so it can replace the attention of any transformer whose tokens make up a map.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        window_size: Side of a window in tokens.
        alpha: Share of the heads that are Lo-Fi, from 0 (Hi-Fi alone) to 1 (Lo-Fi alone).
        attn_drop: Dropout rate of the attention weights.
        proj_drop: Dropout rate of the output.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        InputError: num_heads, window_size or alpha does not fit.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int = 2,
        alpha: float = 0.9,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(num_heads, int) or num_heads < 1 or dim % num_heads:
            raise InputError(f"num_heads must be a whole number from 1 that divides dim, {dim}, got {num_heads}")
        if not isinstance(window_size, int) or window_size < 1:
            raise InputError(f"window_size must be a whole number from 1, got {window_size}")
        if not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
            raise InputError(f"alpha must be a number from 0 to 1, got {alpha}")
        dd = {"device": device, "dtype": dtype}
        self.dim = dim
        self.window_size = window_size
        self.head_dim = dim // num_heads
        self.low_heads = num_heads if self.window_size == 1 else int(num_heads * alpha)
        self.high_heads = num_heads - self.low_heads
        low, high = self.low_heads * self.head_dim, self.high_heads * self.head_dim
        self.fused_attn = use_fused_attn()
        if low:
            self.l_q = nn.Linear(dim, low, **dd)
            self.l_kv = nn.Linear(dim, 2 * low, **dd)
            self.l_proj = nn.Linear(low, low, **dd)
        if high:
            self.h_qkv = nn.Linear(dim, 3 * high, **dd)
            self.h_proj = nn.Linear(high, high, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Attend: (B, H, W, dim) -> (B, H, W, dim), for maps of any size.

        Raises:
            InputError: x has another shape.
        """
        check_tokens(x, self.dim)
        padded = x if self.window_size == 1 else pad_tokens(x, self.window_size)
        parts = []
        if self.high_heads:
            parts.append(self._attend_in_windows(padded, x.shape[1:3]))
        if self.low_heads:
            parts.append(self._attend_to_means(x, padded))
        return self.proj_drop(parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1))

    def _attend_in_windows(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Hi-Fi: a map that windows divide, (B, h * s, w * s, dim) -> (B, *size, high_heads * d)."""
        B, H, W, _ = x.shape
        s, heads, d = self.window_size, self.high_heads, self.head_dim
        h, w = H // s, W // s
        qkv = self.h_qkv(x).view(B, h, s, w, s, 3 * heads * d).transpose(2, 3)
        q, k, v = qkv.reshape(B * h * w, s * s, 3, heads, d).permute(2, 0, 3, 1, 4).unbind(0)
        # CUDA's fused kernels take batches of fewer than 2^16. Written out, the scores of a window are few. What
        # torch.fx passes is no tensor.
        fused = self.fused_attn and not (isinstance(x, Tensor) and x.is_cuda and B * h * w * heads >= 2**16)
        x = attend(q, k, v, None, self.attn_drop, fused).transpose(1, 2)
        x = x.reshape(B, h, w, s, s, heads * d).transpose(2, 3).reshape(B, H, W, heads * d)
        return crop_tokens(self.h_proj(x), size)

    def _attend_to_means(self, x: Tensor, padded: Tensor) -> Tensor:
        """Lo-Fi: queries from (B, H, W, dim), keys and values from the padded map -> (B, H, W, low_heads * d)."""
        B, H, W, _ = x.shape
        heads, d = self.low_heads, self.head_dim
        q = self.l_q(x).view(B, H * W, heads, d).transpose(1, 2)
        if self.window_size > 1:
            padded = F.avg_pool2d(padded.permute(0, 3, 1, 2), self.window_size).permute(0, 2, 3, 1)
        k, v = self.l_kv(padded).flatten(1, 2).unflatten(-1, (2, heads, d)).permute(2, 0, 3, 1, 4).unbind(0)
        x = attend(q, k, v, None, self.attn_drop, self.fused_attn)
        return self.l_proj(x.transpose(1, 2).reshape(B, H, W, heads * d))
