"""LITv2: "Fast Vision Transformers with HiLo Attention" (Pan et al., NeurIPS 2022, arXiv:2205.13213).

LIT's four stages and deformable token merging. The transformer blocks of the last two stages attend by HiLo, every MLP
has a 3 x 3 depthwise convolution, and there is no position embedding.

Shape letters: B images, (H, W) image or map size, (h, w) map size after merging, C channels. Tokens stay channels-last,
(B, H, W, C), from the patch embedding on.
"""

import torch
from timm.layers import DropPath, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from litvit.attention import HiLo
from litvit.dtm import DeformableTokenMerging
from litvit.errors import InputError
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
from litvit.models.lit import LIT, PatchEmbed
from litvit.tokens import pad_tokens

# Leaves of torch.fx's traces: their Python code depends on sizes.
torch.fx.wrap("check_min_size")
torch.fx.wrap("pad_tokens")


class Block(nn.Module):
    """Pre-norm block of HiLo attention and an MLP with a convolution, on (B, H, W, dim).

    With `num_heads=0` the attention is left out. The only norm keeps the published name, `norm2`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        alpha: float,
        mlp_ratio: float,
        drop_path: float,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        **dd,
    ) -> None:
        super().__init__()
        self.attn = None
        if num_heads:
            self.norm1 = nn.LayerNorm(dim, **dd)
            self.attn = HiLo(dim, num_heads, window_size, alpha, attn_drop, proj_drop, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.attn is not None:
            x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """One stage, token merging (except in the first) and blocks: (B, H, W, in_dim) -> (B, h, w, dim)."""

    def __init__(self, downsample: DeformableTokenMerging | None, blocks: list[Block]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        if self.downsample is not None:
            x = self.downsample(pad_tokens(x, 2))
        return run_blocks(self.blocks, x, recompute=self.grad_checkpointing)


class LITv2(Backbone):
    """LIT with HiLo attention, as classifier or dense backbone, with the interface of timm's models.

    Takes images of any size from 32 up. Images and maps are padded right and below with zeros where a stride does not
    divide them, so the map at stride s has ceil(size / s) tokens per side.

    Args:
        in_chans: Number of image channels.
        num_classes: Number of classes, 0 for no classifier.
        global_pool: Pooling: "avg" or "max" (of the tokens after the last norm) or "" (none).
        dims: Number of channels of each stage.
        depths: Number of blocks of each stage.
        num_heads: Number of heads of each stage, 0 for a stage of MLP blocks.
        window_sizes: Side of HiLo's windows in each stage, in tokens. Stages of MLP blocks have none: their number does
            not matter.
        alpha: Share of the heads that attend to low frequencies, see `HiLo`.
        mlp_ratios: Ratio of the MLPs' hidden width to the channels in each stage.
        drop_rate: Dropout rate before the classifier.
        drop_path_rate: Stochastic depth rate of the last block. It rises linearly from 0 at the first block.
        out_norms: Indices of stages whose dense output gets a LayerNorm of its own. The next stage reads it without.
        img_size: Image size in pixels, an int or (H, W), that timm records. None for 224. The model is the same for
            all sizes, and takes them all.
        proj_drop_rate: Dropout rate of the outputs of attention and MLPs.
        attn_drop_rate: Dropout rate of the attention weights.
        device: Device of the parameters and buffers.
        dtype: Type of the parameters and buffers.

    Raises:
        InputError: global_pool, a number per stage, alpha, out_norms or img_size does not fit.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: tuple[int, ...] = (96, 192, 384, 768),
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (0, 0, 12, 24),
        window_sizes: tuple[int, ...] = (0, 0, 2, 1),
        alpha: float = 0.9,
        mlp_ratios: tuple[float, ...] = (4, 4, 4, 4),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norms: tuple[int, ...] = (),
        img_size: int | tuple[int, int] | None = None,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_chans, num_classes, dims, False, drop_rate)
        dd = {"device": device, "dtype": dtype}
        of_stages = {
            "depths": depths,
            "num_heads": num_heads,
            "window_sizes": window_sizes,
            "mlp_ratios": mlp_ratios,
        }
        for name, values in of_stages.items():
            if isinstance(values, int | float) or len(values) != len(dims):
                raise InputError(f"{name} must have one number for each of the {len(dims)} stages, got {values}")
        if img_size is not None:
            self.set_input_size(img_size)
        self._set_global_pool(global_pool)

        self.patch_embed = PatchEmbed(in_chans, dims[0], **dd)
        drop_paths = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(dims):
            config = (dim, num_heads[i], window_sizes[i], alpha, mlp_ratios[i])
            blocks = [Block(*config, rate, attn_drop_rate, proj_drop_rate, **dd) for rate in drop_paths[i]]
            stages.append(Stage(DeformableTokenMerging(dims[i - 1], dim, **dd) if i else None, blocks))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(dims[-1], **dd)
        self._set_out_norms(out_norms, dims, **dd)
        self.apply(init_linear)
        self.reset_classifier(num_classes)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return patterns that order the parameters by depth, for layer-wise learning rates."""
        if coarse:
            return {"stem": r"^patch_embed", "blocks": r"^stages\.(\d+)"}
        return {
            "stem": r"^patch_embed",
            "blocks": [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^(?:norm|out_norms)\.", (99999,)),
            ],
        }

    @staticmethod
    def from_published(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Translate a published state dict to our names, LIT's beside that of the MLPs' convolution."""
        own = LIT.from_published(state_dict)
        return {name.replace(".mlp.dwconv.dwconv.", ".mlp.conv."): value for name, value in own.items()}

    def _stem(self, x: Tensor) -> Tensor:
        check_min_size(x, self.total_stride)
        return self.patch_embed(x)


_RELEASES = "https://github.com/ziplab/LITv2/releases/download"
# The ablation of alpha: model and share of the heads that are Lo-Fi.
_ALPHAS = {
    "litv2_s_alpha00": 0,
    "litv2_s_alpha02": 0.2,
    "litv2_s_alpha04": 0.4,
    "litv2_s_alpha05": 0.5,
    "litv2_s_alpha07": 0.7,
    "litv2_s_alpha10": 1,
}


def _cfg(file: str, **kwargs) -> dict:
    return default_cfg(
        url=f"{_RELEASES}/{file}.pth",
        origin_url="https://github.com/ziplab/LITv2",
        paper_name="Fast Vision Transformers with HiLo Attention",
        paper_ids="arXiv:2205.13213",
        first_conv="patch_embed.proj",
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {f"litv2_{size}.in1k": _cfg(f"v1.0/litv2_{size}") for size in ("s", "m", "b")}
    | {
        "litv2_b.in1k_384": _cfg("v1.0/litv2_b_384", input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0),
        "litv2_s.alpha09_in1k": _cfg("v1.1/alpha_0.9"),
    }
    | {f"{name}.in1k": _cfg(f"v1.1/alpha_{alpha}") for name, alpha in _ALPHAS.items()}
)


@register_model
def litv2_s(pretrained: bool = False, **kwargs) -> LITv2 | BackboneFeatures:
    """LITv2-S: 27.8 M parameters, 3.7 G multiply-adds at 224."""
    return create_backbone(LITv2, "litv2_s", pretrained, **kwargs)


@register_model
def litv2_m(pretrained: bool = False, **kwargs) -> LITv2 | BackboneFeatures:
    """LITv2-M: LITv2-S with 18 blocks in stage 3; 48.8 M parameters, 7.5 G multiply-adds at 224."""
    return create_backbone(LITv2, "litv2_m", pretrained, **({"depths": (2, 2, 18, 2)} | kwargs))


@register_model
def litv2_b(pretrained: bool = False, **kwargs) -> LITv2 | BackboneFeatures:
    """LITv2-B: LITv2-M with wider stages; 86.5 M parameters, 13.2 G multiply-adds at 224, 39.6 G at 384."""
    config = {"dims": (128, 256, 512, 1024), "depths": (2, 2, 18, 2), "num_heads": (0, 0, 16, 32)}
    return create_backbone(LITv2, "litv2_b", pretrained, **(config | kwargs))


@register_model
def litv2_s_alpha00(pretrained: bool = False, **kwargs) -> LITv2 | BackboneFeatures:
    """LITv2-S with Hi-Fi alone in stage 3."""
    return _ablation("litv2_s_alpha00", pretrained, **kwargs)


@register_model
def litv2_s_alpha02(pretrained: bool = False, **kwargs) -> LITv2 | BackboneFeatures:
    """LITv2-S with alpha 0.2."""
    return _ablation("litv2_s_alpha02", pretrained, **kwargs)


@register_model
def litv2_s_alpha04(pretrained: bool = False, **kwargs) -> LITv2 | BackboneFeatures:
    """LITv2-S with alpha 0.4."""
    return _ablation("litv2_s_alpha04", pretrained, **kwargs)


@register_model
def litv2_s_alpha05(pretrained: bool = False, **kwargs) -> LITv2 | BackboneFeatures:
    """LITv2-S with alpha 0.5."""
    return _ablation("litv2_s_alpha05", pretrained, **kwargs)


@register_model
def litv2_s_alpha07(pretrained: bool = False, **kwargs) -> LITv2 | BackboneFeatures:
    """LITv2-S with alpha 0.7."""
    return _ablation("litv2_s_alpha07", pretrained, **kwargs)


@register_model
def litv2_s_alpha10(pretrained: bool = False, **kwargs) -> LITv2 | BackboneFeatures:
    """LITv2-S with Lo-Fi alone in stage 3."""
    return _ablation("litv2_s_alpha10", pretrained, **kwargs)


def _ablation(name: str, pretrained: bool, **kwargs) -> LITv2 | BackboneFeatures:
    return create_backbone(LITv2, name, pretrained, **({"alpha": _ALPHAS[name]} | kwargs))
