"""LVT: "Lite Vision Transformer with Enhanced Self-Attention" (Yang et al., CVPR 2022, arXiv:2112.10809).

Four stages at strides 4, 8, 16 and 32, each an overlapping patch embedding and two blocks. The first stage attends by
convolutional self-attention (CSA), the others by recursive atrous self-attention (RASA).

Shape letters: B images, (H, W) map size, (h, w) size of a reduced map, C channels, N tokens, M patches. Tokens stay
channels-last, (B, H, W, C), from the image to the last stage.
"""

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, calculate_drop_path_rates, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from litvit.errors import InputError
from litvit.models.backbone import Backbone, Features, build, default_cfg, init_linear, refuse_small, run_blocks


class PatchEmbed(nn.Module):
    """Overlapping patches: (B, H, W, in_dim) -> (B, ceil(H/stride), ceil(W/stride), dim)."""

    def __init__(self, in_dim: int, dim: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, kernel_size, stride, padding=kernel_size // 2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(_conv(self.proj, x))


class ConvolutionalSelfAttention(nn.Module):
    """CSA (LVT, section 3.1): a convolution and self-attention in one, over 3 x 3 patches at stride 2.

    In each patch, every position has a projection of its own, as in a convolution, and a 9 x 9 attention, predicted
    from the mean of 2 x 2 tokens, mixes the projected values; overlapping patches add up.

    Args:
        dim: channels.
        num_heads: heads.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        # (head, position mixed in, position that gets it): a CPU's softmax over a last axis of 9 is ten times as slow
        self.attn = nn.Linear(dim, num_heads * 81)
        self.v = nn.Parameter(torch.empty(9, dim, dim))  # position in the patch, out, in
        trunc_normal_(self.v, std=0.02)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        pooled = F.avg_pool2d(x.permute(0, 3, 1, 2), 2, ceil_mode=True).permute(0, 2, 3, 1)
        h, w = pooled.shape[1:3]
        M = B * h * w
        attn = (self.attn(pooled) * self.scale).view(M * self.num_heads, 9, 9).softmax(1).transpose(1, 2)
        v = _unfold(x, h, w).view(9, M, C) @ self.v.transpose(1, 2)
        mixed = attn @ v.view(9, M * self.num_heads, -1).transpose(0, 1)
        return self.proj(_fold(mixed.view(B, h, w, self.num_heads, 3, 3, -1), (H, W)))


# Along an axis, patch i of 3 at stride 2 starts at token 2i - 1: its middle is an even token, which no other patch has,
# its end an odd one, where patch i + 1 starts. So written, folding is the backward of unfolding, and both are copies.


def _unfold(x: Tensor, h: int, w: int) -> Tensor:
    """Cut (B, H, W, C) into h x w patches, zeros around: (3, 3, B, h, w, C)."""
    B, H, W, C = x.shape
    # So written, sizes that torch.compile does not know come out as h and w again, which it need not prove.
    bottom, right = 2 * h - H, 2 * w - W
    if torch.compiler.is_compiling() or bottom or right:
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
    return x.view(B, 2 * h, 2 * w, heads * c)[:, : size[0], : size[1]]


class RecursiveAtrousSelfAttention(nn.Module):
    """RASA (LVT, section 3.2): attention A, with queries at several scales, applied recursively by the same weights.

    Atrous: the queries are the sum of SiLU(depthwise 3 x 3 convolution) at several dilations, all with the same kernel.
    Recursive: X_1 = x, X_2 = SiLU(A(x)), X_{t+1} = SiLU(A(X_t + X_{t-1})).

    Args:
        dim: channels.
        num_heads: heads.
        reduction: keys and values come from a map shrunk by this factor.
        atrous_rates: dilations.
        recursion_depth: times that attention is applied.
    """

    def __init__(
        self, dim: int, num_heads: int, reduction: int, atrous_rates: tuple[int, ...], recursion_depth: int
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.atrous_rates = tuple(atrous_rates)
        self.recursion_depth = recursion_depth
        self.q = nn.Linear(dim, dim, bias=False)
        self.atrous = nn.Conv2d(dim, dim, 3, groups=dim, bias=False)
        self.reduce = self.norm = None
        if reduction > 1:
            self.reduce = nn.Conv2d(dim, dim, reduction, reduction)
            self.norm = nn.LayerNorm(dim)
        self.kv = nn.Linear(dim, 2 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def _attend(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        q = self.q(x).permute(0, 3, 1, 2)
        scales = [
            F.silu(F.conv2d(q, self.atrous.weight, padding=rate, dilation=rate, groups=C)) for rate in self.atrous_rates
        ]
        q = sum(scales[1:], start=scales[0]).permute(0, 2, 3, 1).reshape(B, H * W, self.num_heads, -1).transpose(1, 2)
        if self.reduce is not None:
            x = self.norm(_conv(self.reduce, x))
        k, v = self.kv(x).reshape(B, -1, 2, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, H, W, C))

    def forward(self, x: Tensor) -> Tensor:
        before, x = x, F.silu(self._attend(x))
        for _ in range(self.recursion_depth - 1):
            before, x = x, F.silu(self._attend(x + before))
        return x


class ConvMlp(nn.Module):
    """MLP with a 3 x 3 depthwise convolution before its activation: (B, H, W, dim) -> the same."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(_conv(self.conv, self.fc1(x))))


def _conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a convolution to a channels-last map, which torch sees as such: nothing is copied."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Block(nn.Module):
    """A pre-norm block of an attention and an MLP: (B, H, W, dim) -> the same."""

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """Patch embedding and blocks: (B, H, W, in_dim) -> (B, h, w, dim)."""

    def __init__(self, patch_embed: PatchEmbed, blocks: list[Block], hidden: int) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.patch_embed = patch_embed
        self.blocks = nn.ModuleList(blocks)
        self.hidden = hidden

    def forward(self, x: Tensor, mixed: Tensor | None = None) -> Tensor:
        x = self.patch_embed(x)
        if mixed is not None:
            h, w = x.shape[1:3]
            x = _paste(x, mixed.repeat_interleave(8, 0).repeat_interleave(8, 1)[:h, :w])
        return run_blocks(self.blocks, x, hidden=self.hidden, recompute=self.grad_checkpointing)


def _paste(x: Tensor, mixed: Tensor) -> Tensor:
    """Replace what lies in the box by the batch in reverse order: (B, H, W, C), bool (H, W)."""
    return torch.where(mixed[..., None], x.flip(0), x)


class ClassAttention(nn.Module):
    """Attention of the class token, the first, to all tokens: (B, N, C) -> (B, 1, C)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(dim, 2 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q = self.q(x[:, :1]).view(B, 1, self.num_heads, -1).transpose(1, 2)
        k, v = self.kv(x).view(B, N, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, 1, C))


class ClassBlock(nn.Module):
    """A pre-norm block that changes the class token alone: tokens (B, N, dim), the class token first."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = ClassAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        token = x[:, :1] + self.attn(self.norm1(x))
        token = token + self.mlp(self.norm2(token))
        return torch.cat((token, x[:, 1:]), dim=1)


class LVT(Backbone):
    """Lite vision transformer, as classifier or dense backbone, with the interface of timm's models.

    Takes images of any size from 32 up; the map at stride s is ceil(size / s). After the last stage a class token joins
    and attends to all tokens in class-attention blocks (as in VOLO); scores are `head` of the class token plus half of
    the largest that `aux_head` gives to one of the other tokens. Dense maps come before that, and have no norm.

    Args:
        in_chans: image channels.
        num_classes: classes, 0 for no classifier.
        global_pool: what `head` sees: "token" (the class token), "avg" (mean of the other tokens), "" (every token).
        dims: channels of the four stages.
        depths: blocks of the four stages.
        num_heads: heads of the four stages.
        mlp_ratios: hidden width of the MLPs over the channels, a stage each.
        reductions: of keys and values, in stages 2 to 4.
        atrous_rates: dilations of the queries' convolution, in stages 2 to 4.
        recursion_depth: times that a RASA is applied.
        class_blocks: class-attention blocks.
        class_heads: their heads.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last stage's last block, rising linearly from 0 at the first block.

    Raises:
        InputError: a global_pool, num_heads, recursion_depth or atrous_rates that does not fit.
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
    ) -> None:
        super().__init__(in_chans, num_classes, dims, True, drop_rate)
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
        self._set_global_pool(global_pool)
        drop_paths = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            blocks, hidden = [], int(dim * mlp_ratios[i])
            for drop_path in drop_paths[i]:
                if i == 0:
                    attn = ConvolutionalSelfAttention(dim, num_heads[i])
                    mlp = Mlp(dim, hidden)
                else:
                    attn = RecursiveAtrousSelfAttention(
                        dim, num_heads[i], reductions[i - 1], atrous_rates, recursion_depth
                    )
                    mlp = ConvMlp(dim, hidden)
                blocks.append(Block(dim, attn, mlp, drop_path))
            embed = PatchEmbed(dims[i - 1], dim, 3, 2) if i else PatchEmbed(in_chans, dim, 7, 4)
            self.stages.append(Stage(embed, blocks, hidden))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dims[-1]))
        trunc_normal_(self.cls_token, std=0.02)
        self.class_blocks = nn.Sequential(*(ClassBlock(dims[-1], class_heads, 4) for _ in range(class_blocks)))
        self.norm = nn.LayerNorm(dims[-1])
        self.apply(init_linear)
        self.reset_classifier(num_classes)
        self.to(memory_format=torch.channels_last)  # convolutions' weights and gradients have the maps' layout

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay leaves alone beside biases and norms."""
        return {"cls_token"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns that put the parameters in order of depth, for layer-wise learning rates."""
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

    def _embed(self, x: Tensor) -> Tensor:
        refuse_small(x)
        return x.permute(0, 2, 3, 1)

    def _last_tokens(self, x: Tensor, stage_input: Tensor | None = None) -> Tensor:
        B, h, w, C = x.shape
        if self.cls_token is None:
            return self.norm(x)
        token = self.cls_token.expand(B, -1, -1).to(x.dtype)
        return self.norm(self.class_blocks(torch.cat((token, x.reshape(B, h * w, C)), dim=1)))

    def forward_features(self, x: Tensor, mixed: Tensor | None = None) -> Tensor:
        """Tokens after class attention and the last norm.

        Args:
            x: images, (B, in_chans, H, W).
            mixed: see `forward`.

        Returns:
            (B, 1 + H/32 * W/32, C), the class token first.
        """
        x = self.stages[0](self._embed(x), mixed)
        for stage in self.stages[1:]:
            x = stage(x)
        return self._last_tokens(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Classify the tokens of `forward_features`, (B, 1 + N, C) -> (B, num_classes).

        With `pre_logits` return what `head` would get, (B, C). Without pooling, a prediction a token.
        """
        pooled = self._pool(x)
        if pre_logits or not self.num_classes:
            return pooled
        scores = self.head(pooled)
        return scores + 0.5 * self.aux_head(x[:, 1:]).amax(1) if self.global_pool else scores

    def forward(self, x: Tensor, mixed: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Classify images: (B, in_chans, H, W) -> (B, num_classes).

        Args:
            x: images.
            mixed: mix tokens, as token labelling (LV-ViT) trains: bool (ceil(H / 32), ceil(W / 32)), true inside a box.
                After the first patch embedding its content is replaced by that of the batch in reverse order.

        Returns:
            Class scores. With `mixed`: `head`'s (B, num_classes), of the mixture, and `aux_head`'s a token, row by row,
            (B, N, num_classes), those in the box given back to the images that it came from.
        """
        if mixed is not None and mixed.shape != (grid := tuple((side + 31) // 32 for side in x.shape[-2:])):
            raise InputError(f"mixed must be {grid} for images of {tuple(x.shape[-2:])}, got {tuple(mixed.shape)}")
        tokens = self.forward_features(x, mixed)
        if mixed is None:
            return self.forward_head(tokens)
        scores = self.head(self._pool(tokens))
        token_scores = self.aux_head(tokens[:, 1:])
        return scores, _paste(token_scores.unflatten(1, mixed.shape), mixed).flatten(1, 2)


default_cfgs = generate_default_cfgs(
    {
        "lvt": default_cfg(
            crop_pct=0.96, first_conv="stages.0.patch_embed.proj", classifier=("head", "aux_head"), pool_size=None
        )
    }
)


@register_model
def lvt(pretrained: bool = False, **kwargs) -> LVT | Features:
    """LVT: 3.4 M parameters as backbone, 5.5 M and 0.9 G multiply-adds at 224 as classifier."""
    return build(LVT, "lvt", pretrained, kwargs)


@register_model
def lvt_cls(pretrained: bool = False, **kwargs) -> LVT | Features:
    """LVT by the name that the published commands use."""
    return lvt(pretrained, **kwargs)
