"""LITv2's published arithmetic, operation by operation: the reference for `litv2_s`, in values and in speed.

Importing it registers `published_litv2` with timm. Tokens are a sequence, (B, N, C), which becomes a map for windows
and convolutions, with the permutations that this takes; attention is written out. Its state dict has the published
names.
"""

import torch
import torch.nn.functional as F
from timm.models import register_model
from torch import nn
from torchvision.ops import deform_conv2d


class HiLo(nn.Module):
    def __init__(self, dim, heads, window, alpha):
        super().__init__()
        self.window, self.d = window, dim // heads
        self.low_heads = heads if window == 1 else int(heads * alpha)
        self.high_heads = heads - self.low_heads
        self.low, self.high = self.low_heads * self.d, self.high_heads * self.d
        if self.low_heads:
            self.l_q = nn.Linear(dim, self.low)
            self.l_kv = nn.Linear(dim, 2 * self.low)
            self.l_proj = nn.Linear(self.low, self.low)
        if self.high_heads:
            self.h_qkv = nn.Linear(dim, 3 * self.high)
            self.h_proj = nn.Linear(self.high, self.high)

    def high_frequencies(self, x):
        B, H, W, C = x.shape
        s, h, w = self.window, H // self.window, W // self.window
        x = x.reshape(B, h, s, w, s, C).transpose(2, 3)
        qkv = self.h_qkv(x).reshape(B, h * w, s * s, 3, self.high_heads, self.d)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)
        weights = (q @ k.transpose(-2, -1) * self.d**-0.5).softmax(-1)
        x = (weights @ v).transpose(2, 3).reshape(B, h, w, s, s, self.high)
        return self.h_proj(x.transpose(2, 3).reshape(B, H, W, self.high))

    def low_frequencies(self, x):
        B, H, W, C = x.shape
        q = self.l_q(x).reshape(B, H * W, self.low_heads, self.d).permute(0, 2, 1, 3)
        if self.window > 1:
            x = F.avg_pool2d(x.permute(0, 3, 1, 2), self.window, self.window).reshape(B, C, -1).permute(0, 2, 1)
        k, v = self.l_kv(x).reshape(B, -1, 2, self.low_heads, self.d).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * self.d**-0.5).softmax(-1)
        return self.l_proj((weights @ v).transpose(1, 2).reshape(B, H, W, self.low))

    def forward(self, x, size):
        B, _, C = x.shape
        H, W = size
        x = F.pad(x.reshape(B, H, W, C), (0, 0, 0, -W % self.window, 0, -H % self.window))
        parts = [self.high_frequencies(x)] if self.high_heads else []
        parts += [self.low_frequencies(x)] if self.low_heads else []
        return torch.cat(parts, dim=-1)[:, :H, :W].flatten(1, 2)


class DepthwiseConv(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x, size):
        B, _, C = x.shape
        H, W = size
        return self.dwconv(x.transpose(1, 2).reshape(B, C, H, W)).flatten(2).transpose(1, 2)


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = DepthwiseConv(hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x, size):
        return self.fc2(F.gelu(self.dwconv(self.fc1(x), size)))


class Block(nn.Module):
    def __init__(self, dim, heads, window, alpha):
        super().__init__()
        self.attn = None
        if heads:
            self.norm1 = nn.LayerNorm(dim)
            self.attn = HiLo(dim, heads, window, alpha)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x, size):
        if self.attn is not None:
            x = x + self.attn(self.norm1(x), size)
        return x + self.mlp(self.norm2(x), size)


class DeformConv(nn.Conv2d):
    def __init__(self, in_dim, dim):
        super().__init__(in_dim, dim, 2, 2)
        self.conv_offset = nn.Conv2d(in_dim, 8, 2, 2)

    def forward(self, x):
        return deform_conv2d(x, self.conv_offset(x), self.weight, self.bias, stride=2)


class TokenMerging(nn.Module):
    def __init__(self, in_dim, dim):
        super().__init__()
        self.dconv = DeformConv(in_dim, dim)
        self.norm_layer = nn.BatchNorm2d(dim)

    def forward(self, x, size):
        B, _, C = x.shape
        H, W = size
        x = F.pad(x.reshape(B, H, W, C).permute(0, 3, 1, 2), (0, W % 2, 0, H % 2))
        x = F.gelu(self.norm_layer(self.dconv(x.contiguous())))
        return x.flatten(2).transpose(1, 2), x.shape[2:]


class Layer(nn.Module):
    def __init__(self, dim, depth, heads, window, alpha, next_dim):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads, window, alpha) for _ in range(depth))
        self.downsample = TokenMerging(dim, next_dim) if next_dim else None


class PatchEmbed(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, 4, 4)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        H, W = x.shape[2:]
        x = self.proj(F.pad(x, (0, -W % 4, 0, -H % 4)))
        return self.norm(x.flatten(2).transpose(1, 2)), x.shape[2:]


class PublishedLITv2(nn.Module):
    def __init__(
        self,
        num_classes=1000,
        dims=(96, 192, 384, 768),
        depths=(2, 2, 6, 2),
        num_heads=(0, 0, 12, 24),
        window_sizes=(0, 0, 2, 1),
        alpha=0.9,
    ):
        super().__init__()
        self.patch_embed = PatchEmbed(dims[0])
        stages = zip(dims, depths, num_heads, window_sizes, strict=True)
        self.layers = nn.ModuleList(
            Layer(*stage, alpha, next_dim) for stage, next_dim in zip(stages, (*dims[1:], None), strict=True)
        )
        self.norm = nn.LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes)

    def forward(self, x):
        """(B, 3, H, W) -> (B, classes); `maps` has the tokens at the end of each stage, (B, H, W, C)."""
        x, size = self.patch_embed(x)
        self.maps = []
        for layer in self.layers:
            for block in layer.blocks:
                x = block(x, size)
            self.maps.append(x.unflatten(1, size))
            if layer.downsample is not None:
                x, size = layer.downsample(x, size)
        return self.head(self.norm(x).mean(1))


@register_model
def published_litv2(pretrained=False, **kwargs):
    """LITv2-S as published; without timm's further functions."""
    return PublishedLITv2(kwargs.get("num_classes") or 1000)
