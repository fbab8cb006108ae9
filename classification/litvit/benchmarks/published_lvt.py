"""LVT's published arithmetic, operation by operation: the reference for `lvt`, in values and in speed.

Importing it registers `published_lvt` with timm. Channels come first in convolutions and last elsewhere, with the
permutations that this takes; position 9 C projections are a grouped convolution; attention is written out. Its state
dict has the published names.
"""

import torch
import torch.nn.functional as F
from timm.models import register_model
from torch import nn


class ConvolutionalSelfAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.attn = nn.Linear(dim, 81 * heads)
        self.weight = nn.Conv2d(9 * dim, 9 * dim, 1, groups=9, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, H, W, C = x.shape
        heads = self.heads
        x = x.permute(0, 3, 1, 2)
        pooled = F.avg_pool2d(x, 2, 2, ceil_mode=True).permute(0, 2, 3, 1)
        h, w = pooled.shape[1:3]
        attn = self.attn(pooled).reshape(B, h * w, heads, 9, 9).permute(0, 2, 1, 3, 4)
        attn = (attn * self.scale).softmax(-1)
        patches = F.unfold(x, 3, padding=1, stride=2).reshape(B, C, 9, h * w)
        v = self.weight(patches.permute(0, 3, 2, 1).reshape(B * h * w, 9 * C, 1, 1))
        v = v.reshape(B, h * w, 9, heads, C // heads).permute(0, 3, 1, 2, 4)
        mixed = (attn @ v).permute(0, 1, 4, 3, 2).reshape(B, C * 9, h * w)
        out = F.fold(mixed, (H, W), 3, padding=1, stride=2)
        return self.proj(out.permute(0, 2, 3, 1))


class RecursiveAtrousSelfAttention(nn.Module):
    def __init__(self, dim, heads, reduction):
        super().__init__()
        self.heads, self.scale, self.reduction = heads, (dim // heads) ** -0.5, reduction
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(dim, 2 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        if reduction > 1:
            self.sr = nn.Conv2d(dim, dim, reduction, reduction)
            self.norm = nn.LayerNorm(dim)
        self.ds = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)

    def attend(self, x):
        B, H, W, C = x.shape
        q = self.q(x).permute(0, 3, 1, 2)
        q = sum(F.silu(F.conv2d(q, self.ds.weight, padding=rate, dilation=rate, groups=C)) for rate in (1, 3, 5))
        q = q.reshape(B, self.heads, C // self.heads, H * W).transpose(-2, -1)
        if self.reduction > 1:
            reduced = self.sr(x.permute(0, 3, 1, 2)).reshape(B, C, -1).permute(0, 2, 1)
            x = self.norm(reduced)
        k, v = self.kv(x).reshape(B, -1, 2, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        attn = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(B, H, W, C))

    def forward(self, x):
        y = F.silu(self.attend(x))
        return F.silu(self.attend(y + x))


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class ConvMlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.depconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x):
        x = x.permute(0, 3, 1, 2)
        return self.fc2(F.gelu(self.depconv(self.fc1(x)))).permute(0, 2, 3, 1)


class Block(nn.Module):
    def __init__(self, dim, attn, mlp):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), attn
        self.norm2, self.mlp = nn.LayerNorm(dim), mlp

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, in_dim, dim, kernel, stride):
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, kernel, stride, kernel // 2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class ClassAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.kv = nn.Linear(dim, 2 * dim, bias=False)
        self.q = nn.Linear(dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, C = x.shape
        k, v = self.kv(x).reshape(B, N, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        q = self.q(x[:, :1]).reshape(B, self.heads, 1, -1)
        attn = (q * self.scale @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(B, 1, C))


class ClassBlock(Block):
    def forward(self, x):
        cls = x[:, :1] + self.attn(self.norm1(x))
        return torch.cat((cls + self.mlp(self.norm2(cls)), x[:, 1:]), dim=1)


class PublishedLVT(nn.Module):
    def __init__(self, num_classes=1000):
        super().__init__()
        dims, heads, ratios, reductions = (64, 64, 160, 256), (2, 2, 5, 8), (4, 8, 4, 4), (None, 4, 2, 1)
        self.backbone = nn.ModuleList()
        for i, dim in enumerate(dims):
            blocks = nn.Sequential()
            for _ in range(2):
                if i == 0:
                    attn, mlp = ConvolutionalSelfAttention(dim, heads[i]), Mlp(dim, dim * ratios[i])
                else:
                    attn = RecursiveAtrousSelfAttention(dim, heads[i], reductions[i])
                    mlp = ConvMlp(dim, dim * ratios[i])
                blocks.append(Block(dim, attn, mlp))
            embed = PatchEmbed(dims[i - 1], dim, 3, 2) if i else PatchEmbed(3, dim, 7, 4)
            self.backbone.append(nn.ModuleList([embed, blocks]))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 256))
        self.post_network = nn.ModuleList(ClassBlock(256, ClassAttention(256, 8), Mlp(256, 1024)) for _ in range(2))
        self.norm = nn.LayerNorm(256)
        self.head, self.aux_head = nn.Linear(256, num_classes), nn.Linear(256, num_classes)

    def forward(self, x, box=None):
        """(B, 3, H, W) -> (B, classes); with a box (top, left, bottom, right) at stride 32, what training yields."""
        maps = []
        for i, (embed, blocks) in enumerate(self.backbone):
            x = embed(x)
            if i == 0 and box is not None:
                top, left, bottom, right = (8 * side for side in box)
                x = x.clone()
                x[:, top:bottom, left:right] = x.flip(0)[:, top:bottom, left:right]
            x = blocks(x)
            maps.append(x)
            x = x.permute(0, 3, 1, 2)
        self.maps = maps
        x = maps[-1]
        B, h, w, C = x.shape
        x = torch.cat((self.cls_token.expand(B, -1, -1), x.reshape(B, h * w, C)), dim=1)
        for block in self.post_network:
            x = block(x)
        x = self.norm(x)
        scores, aux = self.head(x[:, 0]), self.aux_head(x[:, 1:])
        if box is None:
            return scores + 0.5 * aux.max(1)[0]
        top, left, bottom, right = box
        aux = aux.reshape(B, h, w, -1).clone()
        aux[:, top:bottom, left:right] = aux.flip(0)[:, top:bottom, left:right]
        return scores, aux.reshape(B, h * w, -1)


@register_model
def published_lvt(pretrained=False, **kwargs):
    """LVT as published, 224 x 224; without timm's further functions."""
    return PublishedLVT(kwargs.get("num_classes") or 1000)
