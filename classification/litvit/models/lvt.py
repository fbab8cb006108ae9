"""LVT: "Lite Vision Transformer with Enhanced Self-Attention" (Yang et al., CVPR 2022, arXiv:2112.10809).

Four stages at strides 4, 8, 16 and 32, each an overlapping patch embedding and two blocks. The first stage attends by
convolutional self-attention (CSA), the others by recursive atrous self-attention (RASA).

Shape letters: B images, (H, W) map size, (h, w) size of a reduced map, C channels, N tokens, M patches. Tokens stay
channels-last, (B, H, W, C), from the image to the last stage.
"""

import re

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, calculate_drop_path_rates, trunc_normal_, use_fused_attn
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from litvit.attention import attend
from litvit.errors import InputError
from litvit.graphs import are_static, is_exporting
from litvit.models.backbone import (
    Backbone,
    BackboneFeatures,
    ConvMlp,
    check_min_size,
    create_backbone,
    default_cfg,
    init_linear,
    run_blocks,
)
from litvit.tokens import conv_tokens, crop_tokens

# Leaves of torch.fx's traces: their Python code depends on sizes.
torch.fx.wrap("_unfold")
torch.fx.wrap("check_min_size")

_PUBLISHED_NAMES = [
    (r"^backbone\.(\d)\.0\.", r"stages.\1.patch_embed."),
    (r"^backbone\.(\d)\.1\.", r"stages.\1.blocks."),
    (r"^post_network\.", "class_blocks."),
    (r"^norm([0-3])\.", r"out_norms.\1."),
    (r"\.attn\.weight\.weight", ".attn.v"),
    (r"\.attn\.ds\.", ".attn.atrous."),
    (r"\.attn\.sr\.", ".attn.reduce."),
    (r"\.mlp\.depconv\.", ".mlp.conv."),
]


class PatchEmbed(nn.Module):
    """Embed overlapping patches: (B, H, W, in_dim) -> (B, ceil(H/stride), ceil(W/stride), dim).

    With `of_images` the input is images, (B, in_dim, H, W).
    """

    def __init__(self, in_dim: int, dim: int, kernel_size: int, stride: int, of_images: bool = False, **dd) -> None:
        super().__init__()
        self.of_images = of_images
        self.proj = nn.Conv2d(in_dim, dim, kernel_size, stride, padding=kernel_size // 2, **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        if self.of_images:
            x = x.permute(0, 2, 3, 1)
        return self.norm(conv_tokens(self.proj, x))


class ConvolutionalSelfAttention(nn.Module):
    """CSA (LVT, section 3.1): a convolution and self-attention in one, over 3 x 3 patches at stride 2.

    In each patch, every position has a projection of its own, as in a convolution, and a 9 x 9 attention, predicted
    from the mean of 2 x 2 tokens, mixes the projected values; overlapping patches add up.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        attn_drop: Dropout rate of the attention weights.
        proj_drop: Dropout rate of the output.
        **dd: Device and dtype of the parameters.
    """

    def __init__(self, dim: int, num_heads: int, attn_drop: float = 0.0, proj_drop: float = 0.0, **dd) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        # The output's layout is (head, source, target), and softmax goes over the sources, the middle axis. On a CPU a
        # softmax over a last axis of 9 is ten times as slow.
        self.attn = nn.Linear(dim, num_heads * 81, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.v = nn.Parameter(torch.empty(9, dim, dim, **dd))  # (position in the patch, out, in)
        trunc_normal_(self.v, std=0.02)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        pooled = _pool(x)
        h, w = pooled.shape[1:3]
        M, heads, c = B * h * w, self.num_heads, C // self.num_heads
        attn = (self.attn(pooled) * self.scale).view(M * heads, 9, 9).softmax(1).transpose(1, 2)
        # Flat in between, or torch.export would compare strides that depend on B, with a guard on it.
        v = _unfold(x, h, w).flatten().view(9, M, C) @ self.v.transpose(1, 2)
        mixed = self.attn_drop(attn) @ v.view(9, M * heads, c).transpose(0, 1)
        return self.proj_drop(self.proj(_fold(mixed.view(B, h, w, heads, 3, 3, c), (H, W))))


def _pool(x: Tensor) -> Tensor:
    """Average 2 x 2 tokens, and fewer where a side is odd: (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), C)."""
    H, W = x.shape[1:3]
    x = x.permute(0, 3, 1, 2)
    if not is_exporting() or are_static(H, W):
        return F.avg_pool2d(x, 2, ceil_mode=True).permute(0, 2, 3, 1)
    # With ceil_mode a graph would be for odd sides or for even ones.
    padding = (0, (W + 1) // 2 * 2 - W, 0, (H + 1) // 2 * 2 - H)
    counts = F.pad(x.new_ones(1, 1, H, W), padding)
    return (F.avg_pool2d(F.pad(x, padding), 2) / F.avg_pool2d(counts, 2)).permute(0, 2, 3, 1)


# Along each axis, patch i of 3 tokens at stride 2 starts at token 2i - 1. Its middle is an even token, which no other
# patch contains. Its end is an odd one, where patch i + 1 starts. In these terms folding is the backward pass of
# unfolding, and both only copy and add.


def _unfold(x: Tensor, h: int, w: int) -> Tensor:
    """Cut (B, H, W, C), padded with zeros, into h x w patches of 3 x 3: (3, 3, B, h, w, C)."""
    B, H, W, C = x.shape
    # In this form torch.compile need not prove that unknown sizes come out as h and w again.
    bottom, right = 2 * h - H, 2 * w - W
    if not are_static(bottom, right) or bottom or right:
        x = F.pad(x, (0, 0, 0, right, 0, bottom))
    middle, end = x.view(B, h, 2, 2 * w, C).unbind(2)
    x = torch.stack((F.pad(end[:, :-1], (0, 0, 0, 0, 1, 0)), middle, end))
    middle, end = x.view(3, B, h, w, 2, C).unbind(4)
    return torch.stack((F.pad(end[:, :, :, :-1], (0, 0, 1, 0)), middle, end), dim=1)


def _fold(patches: Tensor, size: tuple[int, int]) -> Tensor:
    """Add up overlapping patches: (B, h, w, heads, 3, 3, c) -> (B, *size, heads * c)."""
    B, h, w, heads, _, _, c = patches.shape
    start, middle, end = patches.unbind(5)
    x = torch.stack((middle, end + F.pad(start[:, :, 1:], (0, 0, 0, 0, 0, 0, 0, 1))), dim=3)
    start, middle, end = x.unbind(5)
    x = torch.stack((middle, end + F.pad(start[:, 1:], (0, 0, 0, 0, 0, 0, 0, 0, 0, 1))), dim=2)
    return crop_tokens(x.view(B, 2 * h, 2 * w, heads * c), size)


class AtrousConv(nn.Conv2d):
    """Depthwise 3 x 3 convolution whose dilation is an argument: (B, dim, H, W) -> (B, dim, H, W)."""

    def __init__(self, dim: int, **dd) -> None:
        super().__init__(dim, dim, 3, groups=dim, bias=False, **dd)

    def forward(self, x: Tensor, rate: int) -> Tensor:
        return F.conv2d(x, self.weight, padding=rate, dilation=rate, groups=self.groups)


class RecursiveAtrousSelfAttention(nn.Module):
    """RASA (LVT, section 3.2): attention A, with queries at several scales, applied recursively by the same weights.

    Atrous: the queries are the sum of SiLU(depthwise 3 x 3 convolution) at several dilations, all with the same kernel.
    Recursive: X_1 = x, X_2 = SiLU(A(x)), X_{t+1} = SiLU(A(X_t + X_{t-1})).

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        reduction: Factor by which the map of the keys and values is reduced.
        atrous_rates: Dilations of the queries' convolution.
        recursion_depth: Number of times that attention is applied.
        attn_drop: Dropout rate of the attention weights.
        proj_drop: Dropout rate of the output.
        **dd: Device and dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        reduction: int,
        atrous_rates: tuple[int, ...],
        recursion_depth: int,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        **dd,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.fused_attn = use_fused_attn()
        self.atrous_rates = tuple(atrous_rates)
        self.recursion_depth = recursion_depth
        self.q = nn.Linear(dim, dim, bias=False, **dd)
        self.atrous = AtrousConv(dim, **dd)
        self.reduce = self.norm = None
        if reduction > 1:
            self.reduce = nn.Conv2d(dim, dim, reduction, reduction, **dd)
            self.norm = nn.LayerNorm(dim, **dd)
        self.kv = nn.Linear(dim, 2 * dim, bias=False, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def _attention(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        q = self.q(x).permute(0, 3, 1, 2)
        scales = [F.silu(self.atrous(q, rate)) for rate in self.atrous_rates]
        heads, c = self.num_heads, C // self.num_heads
        q = sum(scales[1:], start=scales[0]).permute(0, 2, 3, 1).reshape(B, H * W, heads, c).transpose(1, 2)
        if self.reduce is not None:
            x = self.norm(conv_tokens(self.reduce, x))
        h, w = x.shape[1:3]
        k, v = self.kv(x).reshape(B, h * w, 2, heads, c).permute(2, 0, 3, 1, 4).unbind(0)
        x = attend(q, k, v, None, self.attn_drop, self.fused_attn)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, H, W, C)))

    def forward(self, x: Tensor) -> Tensor:
        previous, x = x, F.silu(self._attention(x))
        for _ in range(self.recursion_depth - 1):
            previous, x = x, F.silu(self._attention(x + previous))
        return x


class Block(nn.Module):
    """Pre-norm block of attention and MLP, on (B, H, W, dim)."""

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, drop_path: float, **dd) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """One stage, patch embedding and blocks: (B, H, W, in_dim) -> (B, h, w, dim).

    The input of the first stage is images, (B, in_chans, H, W).
    """

    def __init__(self, patch_embed: PatchEmbed, blocks: list[Block]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.patch_embed = patch_embed
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, mix_mask: Tensor | None = None) -> Tensor:
        x = self.patch_embed(x)
        if mix_mask is not None:  # of the first stage, at stride 4: 8 x 8 tokens per element of the mask
            h, w = x.shape[1:3]
            x = _mix(x, mix_mask.repeat_interleave(8, 0).repeat_interleave(8, 1)[:h, :w])
        return run_blocks(self.blocks, x, recompute=self.grad_checkpointing)


def _mix(x: Tensor, mask: Tensor) -> Tensor:
    """Replace tokens (B, H, W, C) by those of the batch in reverse order where the mask, bool (H, W), is true."""
    return torch.where(mask[..., None], x.flip(0), x)


class ClassAttention(nn.Module):
    """Attention of the class token, which comes first, to all tokens: (B, N, C) -> (B, 1, C)."""

    def __init__(self, dim: int, num_heads: int, attn_drop: float = 0.0, proj_drop: float = 0.0, **dd) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.fused_attn = use_fused_attn()
        self.q = nn.Linear(dim, dim, bias=False, **dd)
        self.kv = nn.Linear(dim, 2 * dim, bias=False, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        heads, c = self.num_heads, C // self.num_heads
        q = self.q(x[:, :1]).view(B, 1, heads, c).transpose(1, 2)
        k, v = self.kv(x).view(B, N, 2, heads, c).permute(2, 0, 3, 1, 4).unbind(0)
        x = attend(q, k, v, None, self.attn_drop, self.fused_attn)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, 1, C)))


class ClassBlock(nn.Module):
    """Pre-norm block that changes only the class token: tokens (B, N, dim), the class token first."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, attn_drop: float = 0.0, proj_drop: float = 0.0, **dd
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = ClassAttention(dim, num_heads, attn_drop, proj_drop, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)

    def forward(self, x: Tensor) -> Tensor:
        token = x[:, :1] + self.attn(self.norm1(x))
        token = token + self.mlp(self.norm2(token))
        return torch.cat((token, x[:, 1:]), dim=1)


class LVT(Backbone):
    """Lite vision transformer, as classifier or dense backbone, with the interface of timm's models.

    Takes images of any size from 32 up. The map at stride s has ceil(size / s) tokens per side. After the last stage a
    class token joins and attends to all tokens in class-attention blocks (as in VOLO). The scores are `head` of the
    class token plus half of the largest score that `aux_head` gives to one of the other tokens. Dense maps are taken
    before that, without a norm.

    Args:
        in_chans: Number of image channels.
        num_classes: Number of classes, 0 for no classifier.
        global_pool: Input of `head`: "token" (the class token), "avg" (mean of the other tokens) or "" (every token).
        dims: Number of channels of each stage.
        depths: Number of blocks of each stage.
        num_heads: Number of attention heads of each stage.
        mlp_ratios: Ratio of the MLPs' hidden width to the channels in each stage.
        reductions: Reduction factors of keys and values in stages 2 to 4.
        atrous_rates: Dilations of the queries' convolution in stages 2 to 4.
        recursion_depth: Number of times that each RASA applies its attention.
        class_blocks: Number of class-attention blocks.
        class_heads: Number of attention heads of the class-attention blocks.
        drop_rate: Dropout rate before the classifier.
        drop_path_rate: Stochastic depth rate of the last stage's last block. It rises linearly from 0 at the first
            block.
        img_size: Image size in pixels, an int or (H, W), that timm records. None for 224. The model is the same for
            all sizes, and takes them all.
        proj_drop_rate: Dropout rate of the outputs of attention and MLPs.
        attn_drop_rate: Dropout rate of the attention weights.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        InputError: global_pool, num_heads, recursion_depth, atrous_rates or img_size does not fit.
    """

    classifiers = ("head", "aux_head")

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        dims: tuple[int, ...] = (64, 64, 160, 256),
        depths: tuple[int, ...] = (2, 2, 2, 2),
        num_heads: tuple[int, ...] = (2, 2, 5, 8),
        mlp_ratios: tuple[float, ...] = (4, 8, 4, 4),
        reductions: tuple[int, ...] = (4, 2, 1),
        atrous_rates: tuple[int, ...] = (1, 3, 5),
        recursion_depth: int = 2,
        class_blocks: int = 2,
        class_heads: int = 8,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        img_size: int | tuple[int, int] | None = None,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_chans, num_classes, dims, True, drop_rate)
        dd = {"device": device, "dtype": dtype}
        drops = {"attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate}
        of_stages = {"depths": depths, "num_heads": num_heads, "mlp_ratios": mlp_ratios, "reductions": (0, *reductions)}
        for name, values in of_stages.items():
            if len(values) != len(dims):
                raise InputError(f"{name} must fit the {len(dims)} stages of dims (reductions: all but the first)")
        if any(dim % heads for dim, heads in zip((*dims, dims[-1]), (*num_heads, class_heads), strict=True)):
            heads = f"num_heads {tuple(num_heads)} and class_heads {class_heads}"
            raise InputError(f"{heads} must divide dims {tuple(dims)} and {dims[-1]}")
        if recursion_depth < 1 or not atrous_rates or min(atrous_rates) < 1:
            raise InputError(
                f"recursion_depth and atrous_rates must be 1 or more, got {recursion_depth} and {tuple(atrous_rates)}"
            )
        if img_size is not None:
            self.set_input_size(img_size)
        self._set_global_pool(global_pool)
        drop_paths = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(dims):
            blocks, hidden = [], int(dim * mlp_ratios[i])
            for drop_path in drop_paths[i]:
                if i == 0:
                    attn = ConvolutionalSelfAttention(dim, num_heads[i], **drops, **dd)
                    mlp = Mlp(dim, hidden, drop=proj_drop_rate, **dd)
                else:
                    attn = RecursiveAtrousSelfAttention(
                        dim, num_heads[i], reductions[i - 1], atrous_rates, recursion_depth, **drops, **dd
                    )
                    mlp = ConvMlp(dim, hidden, proj_drop_rate, **dd)
                blocks.append(Block(dim, attn, mlp, drop_path, **dd))
            embed = PatchEmbed(dims[i - 1], dim, 3, 2, **dd) if i else PatchEmbed(in_chans, dim, 7, 4, True, **dd)
            stages.append(Stage(embed, blocks))
        self.stages = nn.Sequential(*stages)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dims[-1], **dd))
        trunc_normal_(self.cls_token, std=0.02)
        class_blocks = (ClassBlock(dims[-1], class_heads, 4, **drops, **dd) for _ in range(class_blocks))
        self.class_blocks = nn.Sequential(*class_blocks)
        self.norm = nn.LayerNorm(dims[-1], **dd)
        self.apply(init_linear)
        self.reset_classifier(num_classes)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return names of further parameters without weight decay, besides biases and norms."""
        return {"cls_token"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return patterns that order the parameters by depth, for layer-wise learning rates."""
        last = len(self.stages)
        blocks = [(r"^stages\.(\d+)\.patch_embed", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        if coarse:
            blocks = [(r"^stages\.(\d+)", None)]
        blocks += [(r"^cls_token", (last,))]
        blocks += [(rf"^class_blocks\.{i}\.", (last, i)) for i in range(len(self.class_blocks))]
        blocks += [(r"^norm\.", (99999,))]
        return {"stem": r"^stages\.0\.patch_embed", "blocks": blocks}

    def _drop_class_token(self) -> None:
        self.cls_token = None
        self.class_blocks = nn.Sequential()

    @staticmethod
    def from_published(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Translate a published state dict to our names and layouts, see `Backbone.from_published`.

        1 x 1 convolutions become linear layers, and the two positions of the 9 x 9 attention change places. The norms
        that dense checkpoints hold and nothing uses are dropped.
        """
        if not any(name.startswith("backbone.0.0.") for name in state_dict):
            return dict(state_dict)
        own = {}
        for name, value in state_dict.items():
            if name.startswith("downstream_norms."):
                continue
            for pattern, replacement in _PUBLISHED_NAMES:
                name = re.sub(pattern, replacement, name)
            if name.endswith(".attn.v"):
                value = value.view(9, -1, value.shape[1])
            elif ".attn.attn." in name:
                value = value.unflatten(0, (-1, 9, 9)).transpose(1, 2).flatten(0, 2)
            elif name.endswith((".mlp.fc1.weight", ".mlp.fc2.weight")):
                value = value.flatten(1)
            own[name] = value
        return own

    def _stem(self, x: Tensor) -> Tensor:
        check_min_size(x, self.total_stride)
        return x

    def _join_class_token(self, last_output: Tensor, last_input: Tensor | None = None) -> Tensor:
        B, h, w, C = last_output.shape
        token = self.cls_token.expand(B, -1, -1).to(last_output.dtype)
        return self.class_blocks(torch.cat((token, last_output.reshape(B, h * w, C)), dim=1))

    def forward_features(self, x: Tensor, mix_mask: Tensor | None = None) -> Tensor:
        """Compute the tokens after class attention and the last norm.

        Args:
            x: Images, (B, in_chans, H, W).
            mix_mask: Mask of mix token, see `forward`.

        Returns:
            Tokens, (B, 1 + N, C) with N = ceil(H / 32) * ceil(W / 32), the class token first.
        """
        x = self.stages[0](self._stem(x), mix_mask)
        for stage in self.stages[1:]:
            x = stage(x)
        return self.norm(x if self.cls_token is None else self._join_class_token(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Classify the tokens of `forward_features`, (B, 1 + N, C) -> (B, num_classes).

        With `pre_logits` return the input of `head`, (B, C). Without pooling, return logits of each token.
        """
        pooled = self._pool(x)
        if pre_logits or not self.num_classes:
            return pooled
        scores = self.head(pooled)
        return scores + 0.5 * self.aux_head(x[:, 1:]).amax(1) if self.global_pool else scores

    def forward(self, x: Tensor, mix_mask: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Classify images: (B, in_chans, H, W) -> (B, num_classes).

        Args:
            x: Images.
            mix_mask: Mask of mix token, as token labelling (LV-ViT) trains: bool (ceil(H / 32), ceil(W / 32)), true
                inside a box. After the first patch embedding, the tokens in the box are replaced by those of the batch
                in reverse order.

        Returns:
            Class scores. With `mix_mask` a pair: scores of `head` for the mixed images, (B, num_classes), and scores of
            `aux_head` for each token, row by row, (B, N, num_classes). The latter are those of the images that the
            tokens came from: in the box the batch is reversed back.
        """
        if isinstance(mix_mask, torch.fx.Proxy):
            mix_mask = None  # a graph of torch.fx has outputs of one kind, those for images alone
        s = self.total_stride
        if mix_mask is not None and mix_mask.shape != (grid := tuple((side + s - 1) // s for side in x.shape[-2:])):
            got = f"for images of {tuple(x.shape[-2:])}, got {tuple(mix_mask.shape)}"
            raise InputError(f"mix_mask must be {grid} {got}")
        tokens = self.forward_features(x, mix_mask)
        if mix_mask is None:
            return self.forward_head(tokens)
        scores = self.head(self._pool(tokens))
        token_scores = self.aux_head(tokens[:, 1:])
        return scores, _mix(token_scores.unflatten(1, mix_mask.shape), mix_mask).flatten(1, 2)


def _cfg() -> dict:
    return default_cfg(
        origin_url="https://github.com/Chenglin-Yang/LVT",
        paper_name="Lite Vision Transformer with Enhanced Self-Attention",
        paper_ids="arXiv:2112.10809",
        crop_pct=0.96,
        first_conv="stages.0.patch_embed.proj",
        classifier=("head", "aux_head"),
        pool_size=None,
    )


default_cfgs = generate_default_cfgs({"lvt.in1k": _cfg(), "lvt_cls.in1k": _cfg()})


@register_model
def lvt(pretrained: bool = False, **kwargs) -> LVT | BackboneFeatures:
    """LVT: 3.4 M parameters as backbone, 5.5 M and 0.9 G multiply-adds at 224 as classifier."""
    return create_backbone(LVT, "lvt", pretrained, **kwargs)


@register_model
def lvt_cls(pretrained: bool = False, **kwargs) -> LVT | BackboneFeatures:
    """LVT under the name that the published commands use."""
    return create_backbone(LVT, "lvt_cls", pretrained, **kwargs)
