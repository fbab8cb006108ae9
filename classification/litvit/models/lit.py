"""LIT: "Less is More: Pay Less Attention in Vision Transformers" (Pan et al., AAAI 2022, arXiv:2105.14217).

Four stages at strides 4, 8, 16 and 32. The first two hold MLP blocks only, the last two hold transformer blocks with
attention over all tokens; between stages deformable token merging joins 2 x 2 tokens.

PVT ("Pyramid Vision Transformer", Wang et al., ICCV 2021, arXiv:2102.12122) and the models of the paper's ablations
are the same class with another attention and another merging.

Shape letters: B images, (H, W) image or map size, (h, w) map size after merging, C channels, N = h*w tokens (one more
with a class token). Tokens stay channels-last, (B, H, W, C), from the patch embedding on.
"""

import math
import re

import torch
from timm.layers import DropPath, Mlp, calculate_drop_path_rates, to_2tuple, trunc_normal_, use_fused_attn
from timm.models import generate_default_cfgs, register_model
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from litvit.attention import attend, relative_attention, relative_position_bias
from litvit.attention.position_tables import resize_position_table, resize_relative_table
from litvit.dtm import DeformableTokenMerging
from litvit.errors import InputError
from litvit.models.backbone import (
    Backbone,
    BackboneFeatures,
    check_min_size,
    create_backbone,
    default_cfg,
    init_linear,
    run_blocks,
)
from litvit.tokens import pad_tokens

# Leaves of torch.fx's traces: their Python code depends on sizes, types and devices.
torch.fx.wrap("_check_size")
torch.fx.wrap("check_min_size")
torch.fx.wrap("pad_tokens")
torch.fx.wrap("relative_attention")
torch.fx.wrap("relative_position_bias")
torch.fx.wrap("resize_position_table")
torch.fx.wrap("resize_relative_table")

# Published names, those of LIT-Ti and PVT (patch_embed2, block1, ...) and of LIT-S, M and B (layers.0.downsample, ...).
_PUBLISHED_NAMES = [
    (r"^patch_embed1\.", "patch_embed."),
    (r"^patch_embed([2-4])\.", lambda m: f"stages.{int(m[1]) - 1}.downsample."),
    (r"^pos_embed([1-4])$", lambda m: f"stages.{int(m[1]) - 1}.pos_embed"),
    (r"^block([1-4])\.", lambda m: f"stages.{int(m[1]) - 1}.blocks."),
    (r"^layers\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    (r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    (r"^norm([0-3])\.", r"out_norms.\1."),
    (r"\.downsample\.dconv\.conv_offset\.", ".downsample.offset."),
    (r"\.downsample\.dconv\.", ".downsample.conv."),
    (r"\.downsample\.norm_layer\.", ".downsample.norm."),
]


class ConvMerging(nn.Module):
    """Merge size x size tokens by a convolution and a LayerNorm: (B, H, W, in_dim) -> (B, H/size, W/size, dim)."""

    def __init__(self, in_dim: int, dim: int, size: int = 2, **dd) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, kernel_size=size, stride=size, **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class PatchEmbed(ConvMerging):
    """Embed 4 x 4 patches: (B, in_chans, H, W) -> (B, ceil(H/4), ceil(W/4), dim)."""

    def __init__(self, in_chans: int, dim: int, **dd) -> None:
        super().__init__(in_chans, dim, size=4, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(pad_tokens(x.permute(0, 2, 3, 1), 4))


# Modules between stages, (B, H, W, in_dim) -> (B, H/2, W/2, dim): LIT's, PVT's, Swin's.
MERGING = {"dtm": DeformableTokenMerging, "conv": ConvMerging, "linear": PatchMerging}


class Attention(nn.Module):
    """Multi-head self-attention over all tokens, with a relative position bias if `table_size` is given.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        table_size: Size (h, w) of the map that the relative position table belongs to, None for no bias.
        attn_drop: Dropout rate of the attention weights.
        proj_drop: Dropout rate of the output.
        **dd: Device and dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        table_size: tuple[int, int] | None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        **dd,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.fused_attn = use_fused_attn()
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.relative_position_bias_table = None
        if table_size is not None:
            h, w = table_size
            self.relative_position_bias_table = nn.Parameter(torch.zeros(num_heads, 2 * h - 1, 2 * w - 1, **dd))
            trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, C // self.num_heads)
        table = self.relative_position_bias_table
        if table is not None:
            table = resize_relative_table(table, grid)
        drops = self.attn_drop.training and self.attn_drop.p > 0
        if table is not None and self.fused_attn and not drops:
            x = relative_attention(qkv, table, grid)
        else:
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            bias = None if table is None else relative_position_bias(table, grid).to(q.dtype)
            x = attend(q, k, v, bias, self.attn_drop, self.fused_attn).transpose(1, 2)
        return self.proj_drop(self.proj(x.reshape(B, N, C)))


class SpatialReductionAttention(nn.Module):
    """Multi-head attention from all tokens to a map that is smaller by `sr_ratio` per side (PVT, section 3.3).

    A convolution and a LayerNorm reduce the map. It is padded right and below with zeros where `sr_ratio` does not
    divide it. With `sr_ratio=1` nothing is reduced, and a class token may come before the map's tokens.

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        sr_ratio: Ratio of the map's height and width to those of the reduced map.
        attn_drop: Dropout rate of the attention weights.
        proj_drop: Dropout rate of the output.
        **dd: Device and dtype of the parameters.
    """

    def __init__(
        self, dim: int, num_heads: int, sr_ratio: int, attn_drop: float = 0.0, proj_drop: float = 0.0, **dd
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.sr_ratio = sr_ratio
        self.fused_attn = use_fused_attn()
        self.q = nn.Linear(dim, dim, **dd)
        self.sr = self.norm = None
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, kernel_size=sr_ratio, stride=sr_ratio, **dd)
            self.norm = nn.LayerNorm(dim, **dd)
        self.kv = nn.Linear(dim, 2 * dim, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        B, N, C = x.shape
        heads = self.num_heads, C // self.num_heads
        q = self.q(x).unflatten(-1, heads).transpose(1, 2)
        if self.sr is not None:
            x = pad_tokens(x.view(B, *grid, C), self.sr_ratio).permute(0, 3, 1, 2)
            x = self.norm(self.sr(x).flatten(2).transpose(1, 2))
        k, v = self.kv(x).unflatten(-1, (2, *heads)).permute(2, 0, 3, 1, 4).unbind(0)
        x = attend(q, k, v, None, self.attn_drop, self.fused_attn).transpose(1, 2)
        return self.proj_drop(self.proj(x.reshape(B, N, C)))


class Block(nn.Module):
    """Pre-norm transformer block on tokens (B, N, C) of a map of size `grid`.

    With `num_heads=0` the attention is left out, as in the MLP blocks of the first stages (LIT, "Block designs"). Their
    only norm keeps the published name, `norm2`. With `sr_ratio=0` attention is over all tokens, else reduced.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        table_size: tuple[int, int] | None,
        drop_path: float,
        norm_eps: float,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        sr_ratio: int = 0,
        **dd,
    ) -> None:
        super().__init__()
        self.attn = None
        if num_heads:
            self.norm1 = nn.LayerNorm(dim, eps=norm_eps, **dd)
            if sr_ratio:
                self.attn = SpatialReductionAttention(dim, num_heads, sr_ratio, attn_drop, proj_drop, **dd)
            else:
                self.attn = Attention(dim, num_heads, table_size, attn_drop, proj_drop, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.attn is not None:
            x = x + self.drop_path(self.attn(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """One stage: token merging (except in the first), optional absolute position embedding, blocks.

    Args:
        in_dim: Number of input channels, None for the first stage, which does not merge.
        dim: Number of channels.
        grid: Size (h, w) of the map at the image size that the model is built for.
        num_heads: Number of heads of the blocks, 0 for MLP blocks.
        mlp_ratio: Ratio of the MLPs' hidden width to `dim`.
        position: "absolute" or "relative".
        drop_paths: Stochastic depth rate of each block.
        norm_eps: Epsilon of the LayerNorms.
        attn_drop: Dropout rate of the attention weights.
        proj_drop: Dropout rate of the outputs of attention and MLPs.
        sr_ratio: Reduction of the attention's map per side, 0 for attention over all tokens.
        merging: Kind of merging, a key of MERGING.
        **dd: Device and dtype of the parameters and buffers.
    """

    def __init__(
        self,
        in_dim: int | None,
        dim: int,
        grid: tuple[int, int],
        num_heads: int,
        mlp_ratio: float,
        position: str,
        drop_paths: list[float],
        norm_eps: float,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        sr_ratio: int = 0,
        merging: str = "dtm",
        **dd,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = None if in_dim is None else MERGING[merging](in_dim, dim, **dd)
        self.pos_embed = None
        if position == "absolute":
            self.pos_embed = nn.Parameter(torch.zeros(1, *grid, dim, **dd))
            trunc_normal_(self.pos_embed, std=0.02)
        table_size = grid if position == "relative" else None
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, mlp_ratio, table_size, drop_path, norm_eps, attn_drop, proj_drop, sr_ratio, **dd)
            for drop_path in drop_paths
        )

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Resize the position tables, as new parameters, to those of a map of size (h, w)."""
        if self.pos_embed is not None:
            self.pos_embed = _like(self.pos_embed, resize_position_table(self.pos_embed.detach(), grid))
        for block in self.blocks:
            table = getattr(block.attn, "relative_position_bias_table", None)
            if table is not None:
                resized = _like(table, resize_relative_table(table.detach(), grid))
                block.attn.relative_position_bias_table = resized

    def forward(self, x: Tensor, class_token: Tensor | None = None) -> Tensor:
        """Run the stage: (B, H, W, in_dim) -> (B, h, w, dim).

        With a class token, (1, 1, dim), which comes first, the result is (B, 1 + h*w, dim).
        """
        if self.downsample is not None:
            x = self.downsample(pad_tokens(x, 2))
        B, h, w, C = x.shape
        if self.pos_embed is not None:
            x = x + resize_position_table(self.pos_embed, (h, w))
        x = x.reshape(B, h * w, C)
        if class_token is not None:
            x = torch.cat((class_token.expand(B, -1, -1).to(x.dtype), x), dim=1)
        x = run_blocks(self.blocks, x, (h, w), recompute=self.grad_checkpointing)
        return x if class_token is not None else x.view(B, h, w, C)


class LIT(Backbone):
    """Less attention vision transformer, as classifier or dense backbone, with the interface of timm's models.

    `num_heads`, `sr_ratios` and `merging` lead from LIT to PVT and to the models of the paper's ablations.

    Classification takes images of `img_size` only. Dense use (`forward_intermediates`, `features_only=True`) takes any
    size from 32 up. Images and maps are padded right and below with zeros where a stride does not divide them, so the
    map at stride s has ceil(size / s) tokens per side, and position tables are resized. Dense maps have no class token.

    Args:
        img_size: Image size in pixels, an int or (H, W), multiples of 32. Position tables belong to it.
        in_chans: Number of image channels.
        num_classes: Number of classes, 0 for no classifier.
        global_pool: Pooling: "token" (needs class_token), "avg" (mean of the tokens after the last norm) or "" (none).
        dims: Number of channels of each stage.
        depths: Number of blocks of each stage.
        num_heads: Number of heads of each stage, 0 for a stage of MLP blocks.
        mlp_ratios: Ratio of the MLPs' hidden width to the channels in each stage.
        position: "absolute" (a learned table added at the start of every stage) or "relative" (a learned bias per head
            in every attention block).
        class_token: Whether a class token joins before the last stage.
        norm_eps: Epsilon of the LayerNorms. (That of the patch embedding's is always 1e-5.)
        drop_rate: Dropout rate before the classifier.
        proj_drop_rate: Dropout rate of the outputs of attention and MLPs.
        attn_drop_rate: Dropout rate of the attention weights.
        sr_ratios: Spatial reduction of each stage's attention: 0 for attention over all tokens, as in LIT, else the
            ratio per side of the map to that of the keys and values, as in PVT, which has no relative position bias.
        merging: Token merging between stages: "dtm" (deformable, LIT's), "conv" (2 x 2 convolution and LayerNorm, PVT's
            patch embedding) or "linear" (Swin's patch merging).
        drop_path_rate: Stochastic depth rate of the last block. It rises linearly from 0 at the first block.
        out_norms: Indices of stages whose dense output gets a LayerNorm of its own. The next stage reads it without.
        device: Device of the parameters and buffers.
        dtype: Type of the parameters and buffers.

    Raises:
        InputError: img_size, global_pool, position, num_heads, sr_ratios, merging or out_norms does not fit.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: tuple[int, ...] = (96, 192, 384, 768),
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (0, 0, 12, 24),
        mlp_ratios: tuple[float, ...] = (4, 4, 4, 4),
        position: str = "relative",
        class_token: bool = False,
        norm_eps: float = 1e-5,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norms: tuple[int, ...] = (),
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        sr_ratios: tuple[int, ...] = (0, 0, 0, 0),
        merging: str = "dtm",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_chans, num_classes, dims, class_token, drop_rate)
        dd = {"device": device, "dtype": dtype}
        self.img_size = _as_img_size(img_size)
        if position not in ("absolute", "relative"):
            raise InputError(f"position must be 'absolute' or 'relative', got {position!r}")
        if any(heads and dim % heads for dim, heads in zip(dims, num_heads, strict=True)):
            raise InputError(f"num_heads {tuple(num_heads)} must divide dims {tuple(dims)}, 0 for stages of MLP blocks")
        if len(sr_ratios) < len(dims) or min(sr_ratios) < 0:
            raise InputError(f"sr_ratios must be a number from 0 for each stage, got {tuple(sr_ratios)}")
        if any(sr_ratios) and position == "relative":
            raise InputError(f"sr_ratios {tuple(sr_ratios)} need position='absolute'; for 'relative' leave them out")
        if class_token and sr_ratios[len(dims) - 1] > 1:
            raise InputError(f"sr_ratios must be 0 or 1 in the stage of the class token, got {tuple(sr_ratios)}")
        if merging not in MERGING:
            raise InputError(f"merging must be one of {', '.join(map(repr, MERGING))}, got {merging!r}")
        self._set_global_pool(global_pool)

        self.patch_embed = PatchEmbed(in_chans, dims[0], **dd)
        drop_paths = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = [
            Stage(
                in_dim=dims[i - 1] if i else None,
                dim=dims[i],
                grid=_grid(self.img_size, i),
                num_heads=num_heads[i],
                mlp_ratio=mlp_ratios[i],
                position=position,
                drop_paths=drop_paths[i],
                norm_eps=norm_eps,
                attn_drop=attn_drop_rate,
                proj_drop=proj_drop_rate,
                sr_ratio=sr_ratios[i],
                merging=merging,
                **dd,
            )
            for i in range(len(dims))
        ]
        self.stages = nn.Sequential(*stages)
        self.cls_pos_embed = None
        if class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dims[-1], **dd))
            self.cls_pos_embed = nn.Parameter(torch.zeros(1, 1, dims[-1], **dd))
            trunc_normal_(self.cls_token, std=0.02)
            trunc_normal_(self.cls_pos_embed, std=0.02)
        self.norm = nn.LayerNorm(dims[-1], eps=norm_eps, **dd)
        self._set_out_norms(out_norms, dims, eps=norm_eps, **dd)
        self.apply(init_linear)
        self.reset_classifier(num_classes)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return names of further parameters without weight decay, besides biases and norms, as published."""
        names = [name for name, _ in self.named_parameters()]
        return {name for name in names if name == "cls_token" or name.endswith("relative_position_bias_table")}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return patterns that order the parameters by depth, for layer-wise learning rates."""
        last = len(self.stages) - 1
        if coarse:
            return {"stem": r"^patch_embed", "blocks": [(r"^stages\.(\d+)", None), (r"^cls_", (last,))]}
        return {
            "stem": r"^patch_embed",
            "blocks": [
                (r"^stages\.(\d+)\.(?:downsample|pos_embed)", (0,)),
                (r"^cls_", (last, 0)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^(?:norm|out_norms)\.", (99999,)),
            ],
        }

    @staticmethod
    def from_published(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Translate a published state dict to our names and layouts, see `Backbone.from_published`.

        LIT-Ti's class position, the first row of its last position table, becomes an entry of its own. Index tables,
        which can be computed, are dropped.
        """
        if not any(name.startswith(("patch_embed1.", "layers.0.blocks.")) for name in state_dict):
            return dict(state_dict)
        own = {}
        for name, value in state_dict.items():
            if name.endswith("relative_position_index"):
                continue
            for pattern, replacement in _PUBLISHED_NAMES:
                name = re.sub(pattern, replacement, name)
            if name.endswith(".pos_embed") and value.dim() == 3:
                side = math.isqrt(value.shape[1])
                if value.shape[1] == side * side + 1:
                    own["cls_pos_embed"], value = value[:, :1], value[:, 1:]
                value = _as_square(value)
            elif name.endswith("relative_position_bias_table") and value.dim() == 2:
                value = _as_square(value.t())
            own[name] = value
        return own

    def _resize_entry(self, name: str, value: Tensor, shape: torch.Size) -> Tensor:
        if name.endswith(".pos_embed") and value.dim() == 4:
            return resize_position_table(value, tuple(shape[1:3]))
        if name.endswith("relative_position_bias_table") and value.dim() == 3:
            return resize_relative_table(value, tuple((side + 1) // 2 for side in shape[1:]))
        return value

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Take images of another size: resize the position tables, as new parameters.

        Args:
            img_size: Image size in pixels, an int or (H, W), multiples of 32.

        Raises:
            InputError: img_size does not fit.
        """
        self.img_size = _as_img_size(img_size)
        for i, stage in enumerate(self.stages):
            stage.set_grid(_grid(self.img_size, i))
        super().set_input_size(self.img_size)

    def _drop_class_token(self) -> None:
        self.cls_token = self.cls_pos_embed = None

    def _class_token(self) -> Tensor | None:
        return None if self.cls_token is None else self.cls_token + self.cls_pos_embed

    def _stem(self, x: Tensor) -> Tensor:
        check_min_size(x, self.total_stride)
        return self.patch_embed(x)

    def _join_class_token(self, last_output: Tensor, last_input: Tensor) -> Tensor:
        return self.stages[-1](last_input, self._class_token())  # it ran without, for the dense map

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the tokens after the last norm.

        Args:
            x: Images of `img_size`, (B, in_chans, H, W).

        Returns:
            Tokens, (B, H/32, W/32, C), or with a class token, which comes first, (B, 1 + N, C).

        Raises:
            InputError: The images have another size.
        """
        _check_size(x, self.img_size)
        x = self.patch_embed(x)
        for stage in self.stages[:-1]:
            x = stage(x)
        return self.norm(self.stages[-1](x, self._class_token()))


def _as_img_size(img_size: int | tuple[int, int]) -> tuple[int, int]:
    size, stride = to_2tuple(img_size), Backbone.total_stride
    if any(side <= 0 or side % stride for side in size):
        raise InputError(f"img_size must be a multiple of {stride} in both directions, got {size}")
    return size


def _grid(img_size: tuple[int, int], stage: int) -> tuple[int, int]:
    """Return the map size of a stage, counted from 0."""
    return tuple(side // (4 * 2**stage) for side in img_size)


def _like(parameter: nn.Parameter, value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=parameter.requires_grad)


def _check_size(x: Tensor, img_size: tuple[int, int]) -> None:
    height, width = x.shape[-2:]
    if (height, width) != img_size:
        raise InputError(
            f"the model was built for images of {img_size[0]} x {img_size[1]} pixels, got {height} x {width}: "
            f"resize them, or build it with img_size=({height}, {width})"
        )


def _as_square(table: Tensor) -> Tensor:
    """Split the second axis into the rows and columns of a square. Tables of other models may not be square."""
    side = math.isqrt(table.shape[1])
    return table.unflatten(1, (side, side)) if table.shape[1] == side * side else table


def _cfg(**kwargs) -> dict:
    return default_cfg(
        **{
            "paper_name": "Less is More: Pay Less Attention in Vision Transformers",
            "paper_ids": "arXiv:2105.14217",
            "fixed_input_size": True,
            "first_conv": "patch_embed.proj",
            **kwargs,
        }
    )


def _published(name: str) -> dict:
    return _cfg(
        url=f"https://github.com/ziplab/LIT/releases/download/v1.0/{name}.pth",
        origin_url="https://github.com/ziplab/LIT",
    )


_PVT_PAPER = {
    "paper_name": "Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions",
    "paper_ids": "arXiv:2102.12122",
}

default_cfgs = generate_default_cfgs(
    {f"{name}.in1k": _published(name) for name in ("lit_ti", "lit_s", "lit_m", "lit_b")}
    | {
        f"pvt_{size}.in1k": _cfg(**_PVT_PAPER, origin_url="https://arxiv.org/abs/2102.12122")
        for size in ("tiny", "small", "medium", "large")
    }
    | {"pvt_small_msa.in1k": _cfg(origin_url="https://github.com/ziplab/LIT")}
    | {
        name: _cfg()
        for name in (
            *("lit_ti_plain", "lit_s_plain", "pvt_small_dtm"),
            *(f"pvt_small_msa_no{stages}" for stages in ("1", "12", "123", "1234")),
        )
    }
)

_LIT_TI = {
    "dims": (64, 128, 320, 512),
    "depths": (3, 4, 6, 3),
    "num_heads": (0, 0, 5, 8),
    "mlp_ratios": (8, 8, 4, 4),
    "position": "absolute",
    "class_token": True,
    "global_pool": "token",
    "norm_eps": 1e-6,
}
_LIT_S = {"dims": (96, 192, 384, 768), "depths": (2, 2, 6, 2), "num_heads": (0, 0, 12, 24)}
_PVT_SMALL_MSA = _LIT_TI | {"num_heads": (1, 2, 5, 8), "merging": "conv"}
_PVT_SMALL = _PVT_SMALL_MSA | {"sr_ratios": (8, 4, 2, 1)}


@register_model
def lit_ti(pretrained: bool = False, **kwargs) -> LIT | BackboneFeatures:
    """LIT-Ti: class token, absolute position; 19.9 M parameters, 3.6 G multiply-adds at 224."""
    return create_backbone(LIT, "lit_ti", pretrained, **(_LIT_TI | kwargs))


@register_model
def lit_s(pretrained: bool = False, **kwargs) -> LIT | BackboneFeatures:
    """LIT-S: relative position, mean pooling; 28.0 M parameters, 4.1 G multiply-adds at 224."""
    return create_backbone(LIT, "lit_s", pretrained, **(_LIT_S | kwargs))


@register_model
def lit_m(pretrained: bool = False, **kwargs) -> LIT | BackboneFeatures:
    """LIT-M: LIT-S with 18 blocks in stage 3; 49.4 M parameters, 8.6 G multiply-adds at 224."""
    return create_backbone(LIT, "lit_m", pretrained, **(_LIT_S | {"depths": (2, 2, 18, 2)} | kwargs))


@register_model
def lit_b(pretrained: bool = False, **kwargs) -> LIT | BackboneFeatures:
    """LIT-B: LIT-M with wider stages; 87.3 M parameters, 15.0 G multiply-adds at 224."""
    config = {"dims": (128, 256, 512, 1024), "depths": (2, 2, 18, 2), "num_heads": (0, 0, 16, 32)}
    return create_backbone(LIT, "lit_b", pretrained, **(config | kwargs))


@register_model
def lit_ti_plain(pretrained: bool = False, **kwargs) -> LIT | BackboneFeatures:
    """LIT-Ti* of Table 2: LIT-Ti with PVT's convolutions in place of deformable merging."""
    return create_backbone(LIT, "lit_ti_plain", pretrained, **(_LIT_TI | {"merging": "conv"} | kwargs))


@register_model
def lit_s_plain(pretrained: bool = False, **kwargs) -> LIT | BackboneFeatures:
    """LIT-S* of Table 2: LIT-S with Swin's patch merging in place of deformable merging."""
    return create_backbone(LIT, "lit_s_plain", pretrained, **(_LIT_S | {"merging": "linear"} | kwargs))


@register_model
def pvt_tiny(pretrained: bool = False, **kwargs) -> LIT | BackboneFeatures:
    """PVT-Tiny: 13.2 M parameters, 1.9 G multiply-adds at 224."""
    return create_backbone(LIT, "pvt_tiny", pretrained, **(_PVT_SMALL | {"depths": (2, 2, 2, 2)} | kwargs))


@register_model
def pvt_small(pretrained: bool = False, **kwargs) -> LIT | BackboneFeatures:
    """PVT-Small: 24.5 M parameters, 3.8 G multiply-adds at 224."""
    return create_backbone(LIT, "pvt_small", pretrained, **(_PVT_SMALL | kwargs))


@register_model
def pvt_medium(pretrained: bool = False, **kwargs) -> LIT | BackboneFeatures:
    """PVT-Medium: 44.2 M parameters, 6.7 G multiply-adds at 224."""
    return create_backbone(LIT, "pvt_medium", pretrained, **(_PVT_SMALL | {"depths": (3, 4, 18, 3)} | kwargs))


@register_model
def pvt_large(pretrained: bool = False, **kwargs) -> LIT | BackboneFeatures:
    """PVT-Large: 61.4 M parameters, 9.8 G multiply-adds at 224."""
    return create_backbone(LIT, "pvt_large", pretrained, **(_PVT_SMALL | {"depths": (3, 8, 27, 3)} | kwargs))


@register_model
def pvt_small_dtm(pretrained: bool = False, **kwargs) -> LIT | BackboneFeatures:
    """PVT-Small with deformable token merging (Table 3)."""
    return create_backbone(LIT, "pvt_small_dtm", pretrained, **(_PVT_SMALL | {"merging": "dtm"} | kwargs))


@register_model
def pvt_small_msa(pretrained: bool = False, **kwargs) -> LIT | BackboneFeatures:
    """PVT-Small with attention over all tokens (Table 4); 20.2 M parameters, 8.4 G multiply-adds at 224."""
    return create_backbone(LIT, "pvt_small_msa", pretrained, **(_PVT_SMALL_MSA | kwargs))


@register_model
def pvt_small_msa_no1(pretrained: bool = False, **kwargs) -> LIT | BackboneFeatures:
    """The model `pvt_small_msa` without the attention of stage 1 (Table 4)."""
    return create_backbone(LIT, "pvt_small_msa_no1", pretrained, **(_without_attention(1) | kwargs))


@register_model
def pvt_small_msa_no12(pretrained: bool = False, **kwargs) -> LIT | BackboneFeatures:
    """The model `pvt_small_msa` without the attention of stages 1 and 2 (Table 4). It is `lit_ti_plain`."""
    return create_backbone(LIT, "pvt_small_msa_no12", pretrained, **(_without_attention(2) | kwargs))


@register_model
def pvt_small_msa_no123(pretrained: bool = False, **kwargs) -> LIT | BackboneFeatures:
    """The model `pvt_small_msa` without the attention of stages 1 to 3 (Table 4)."""
    return create_backbone(LIT, "pvt_small_msa_no123", pretrained, **(_without_attention(3) | kwargs))


@register_model
def pvt_small_msa_no1234(pretrained: bool = False, **kwargs) -> LIT | BackboneFeatures:
    """The model `pvt_small_msa` without attention (Table 4). No class token would see the image: the mean is pooled."""
    config = _without_attention(4) | {"class_token": False, "global_pool": "avg"}
    return create_backbone(LIT, "pvt_small_msa_no1234", pretrained, **(config | kwargs))


def _without_attention(stages: int) -> dict:
    """Return the configuration of `pvt_small_msa` without the attention of the first stages."""
    return _PVT_SMALL_MSA | {"num_heads": (0,) * stages + _PVT_SMALL_MSA["num_heads"][stages:]}
