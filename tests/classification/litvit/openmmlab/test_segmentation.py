"""SegFormer's head, the backbones in the segmentation settings, and published segmentors."""

import copy
from pathlib import Path

import mmseg.registry
import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import MODELS, DefaultScope
from torch import nn

import litvit.openmmlab.segmentation  # noqa: F401 (registers the head)

CONFIGS = Path(__file__).parents[4] / "segmentation" / "configs"
WIDTHS = {
    "lit_ti": (64, 128, 320, 512),
    "lit_s": (96, 192, 384, 768),
    "litv2_s": (96, 192, 384, 768),
    "lvt": (64, 64, 160, 256),
}


def head(**kwargs):
    torch.manual_seed(0)
    config = {"type": "SegFormerHead", "in_channels": [8, 8, 16, 24], "in_index": [0, 1, 2, 3], "channels": 32}
    config |= {"num_classes": 5, "norm_cfg": {"type": "BN"}, "dropout_ratio": 0.0, **kwargs}
    return mmseg.registry.MODELS.build(config)


def published_order(head, maps):
    """A linear map of each level, resizing, concatenation from the last level to the first, convolution."""
    size = maps[0].shape[2:]
    levels = []
    for i, x in reversed(list(enumerate(maps, start=1))):
        x = getattr(head, f"linear_c{i}").proj(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        levels.append(F.interpolate(x, size, mode="bilinear", align_corners=False))
    x = head.linear_fuse.bn(head.linear_fuse.conv(torch.cat(levels, dim=1))).relu()
    return head.linear_pred(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [(16, 16), (19, 27)])
def test_segformer_head_is_the_published_order_of_operations(training, size):
    ours = head().double().train(training)
    nn.init.normal_(ours.linear_fuse.bn.running_mean)
    nn.init.uniform_(ours.linear_fuse.bn.running_var, 0.5, 2)
    plain = copy.deepcopy(ours)
    maps = [
        torch.randn(2, channels, *(-(-side // 2**i) for side in size), dtype=torch.float64)
        for i, channels in enumerate(ours.in_channels)
    ]
    inputs, others = ([x.clone().requires_grad_() for x in maps] for _ in range(2))
    logits, expected = ours(inputs), published_order(plain, others)
    torch.testing.assert_close(logits, expected)
    weight = torch.randn_like(logits)
    for output in (logits, expected):
        (output * weight).sum().backward()
    for x, other in zip(inputs, others, strict=True):
        torch.testing.assert_close(x.grad, other.grad)
    for (name, parameter), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=name)
    torch.testing.assert_close(ours.linear_fuse.bn.running_mean, plain.linear_fuse.bn.running_mean)
    torch.testing.assert_close(ours.linear_fuse.bn.running_var, plain.linear_fuse.bn.running_var)


def test_segformer_head_drops_whole_channels():
    ours = head(dropout_ratio=0.5)
    nn.init.constant_(ours.linear_fuse.bn.bias, 9.0)  # ReLU lets everything pass
    maps = [torch.randn(1, channels, 8 // 2**i, 8 // 2**i) for i, channels in enumerate(ours.in_channels)]
    seen = []
    ours.linear_pred.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    ours.train()(maps)
    ours.eval()(maps)
    dropped, whole = ((x.flatten(2) == 0).all(2).sum() for x in seen)
    assert whole == 0 < dropped < 32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_segformer_head_in_half_precision(dtype):
    ours = head().eval()
    maps = [torch.randn(1, channels, 16 // 2**i, 16 // 2**i) for i, channels in enumerate(ours.in_channels)]
    with torch.no_grad():
        expected = ours(maps)
        with torch.autocast("cpu", dtype):
            logits = ours(maps)
    assert logits.dtype == dtype
    assert (logits - expected).norm() < 0.02 * expected.norm()


def test_segformer_head_without_norm():
    ours = head(norm_cfg=None).double()
    maps = [torch.randn(1, channels, 8 // 2**i, 8 // 2**i).double() for i, channels in enumerate(ours.in_channels)]
    ours.linear_fuse.add_module("bn", nn.Identity())
    torch.testing.assert_close(ours(maps), published_order(ours, maps))


def share_of_the_gradient(rank, folder):
    """Two steps of one of two processes, each with maps of its own."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    model = MMDistributedDataParallel(head().double(), broadcast_buffers=False)
    for maps in (maps_of(rank), maps_of(rank)):  # what one step has left unused, the next would complain of
        model.zero_grad()
        model(maps).square().mean().backward()
    torch.save({name: parameter.grad for name, parameter in model.module.named_parameters()}, folder / f"{rank}.pth")


def maps_of(rank):
    torch.manual_seed(rank)
    return [torch.randn(2, channels, 8 // 2**i, 8 // 2**i).double() for i, channels in enumerate((8, 8, 16, 24))]


def test_segformer_head_in_two_processes(tmp_path):
    torch.multiprocessing.start_processes(share_of_the_gradient, (tmp_path,), nprocs=2, start_method="fork")
    alone = [head().double() for _ in range(2)]
    for rank, model in enumerate(alone):
        model(maps_of(rank)).square().mean().backward()
    for rank in range(2):
        grads = torch.load(tmp_path / f"{rank}.pth", weights_only=True)
        for (name, one), other in zip(alone[0].named_parameters(), alone[1].parameters(), strict=True):
            torch.testing.assert_close(grads[name], (one.grad + other.grad) / 2, msg=name)


def segmentation_entries(arch, published):
    """The published backbone of a segmentor: LIT-S has norms on all maps, and tables of 512."""
    entries = published(f"{arch}_dense")
    if arch == "lit_s":
        entries |= {"norm0.weight": torch.full((96,), 1.1), "norm0.bias": torch.full((96,), 0.1)}
        for name, value in entries.items():
            if name.endswith("relative_position_bias_table"):
                entries[name] = value[: 63**2 if "layers.2" in name else 31**2]
    return entries


def settings(arch):
    """The backbone's part of the arch's config."""
    folder = arch.split("_")[0]
    file = "segformer.lvt.512x512.ade.160k.py" if arch == "lvt" else f"{arch}_fpn_r50_512x512_80k_ade20k.py"
    return Config.fromfile(CONFIGS / folder / file).model


class Attention(nn.Module):
    """LIT's attention in float64, term by term; the position table is resized in float32."""

    def __init__(self, attention):
        super().__init__()
        self.qkv, self.proj, self.heads = attention.qkv, attention.proj, attention.num_heads
        self.table = attention.relative_position_bias_table

    def forward(self, x, grid):
        h, w = grid
        B, N, C = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, C // self.heads)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        scores = q @ k.mT / (C // self.heads) ** 0.5
        if self.table is not None:
            table = self.table.float()[None]
            if table.shape[2:] != (2 * h - 1, 2 * w - 1):
                table = F.interpolate(table, (2 * h - 1, 2 * w - 1), mode="bicubic", align_corners=False)
            y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
            y, x = y.flatten(), x.flatten()
            scores += table[0, :, y[:, None] - y + h - 1, x[:, None] - x + w - 1]
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, N, C))


@pytest.mark.parametrize("size", [(512, 512), (512, 683)])
@pytest.mark.parametrize("arch", ["lit_ti", "lit_s", "lvt"])
def test_features_of_the_segmentation_settings(arch, size, published):
    backbone = MODELS.build(settings(arch).backbone | {"init_cfg": None}).eval()
    backbone.load_state_dict(segmentation_entries(arch, published))
    reference = copy.deepcopy(backbone).double()
    grids = [tuple(-(-side // 4 // 2**i) for side in size) for i in range(4)]
    for stage, grid in zip(reference.stages, grids, strict=True):
        for block in stage.blocks:
            if arch != "lvt" and block.attn is not None:
                block.attn = Attention(block.attn)
        if arch == "lit_ti":  # a table of the map's own size is not resized again
            table = stage.pos_embed.float().permute(0, 3, 1, 2)
            table = F.interpolate(table, grid, mode="bilinear", align_corners=False)
            stage.pos_embed = nn.Parameter(table.permute(0, 2, 3, 1).double())
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps, expected = backbone(image), reference(image.double())
    for out, other, width, grid in zip(maps, expected, WIDTHS[arch], grids, strict=True):
        assert out.shape == (1, width, *grid)
        assert (out - other).norm() < 1e-4 * other.norm()


def head_entries(arch):
    """Names and sizes of the published neck and head, as mmseg 0.x has them."""
    widths = WIDTHS[arch]
    if arch == "lvt":
        sizes = {"linear_fuse.conv.weight": (256, 1024, 1, 1), "linear_pred.weight": (150, 256, 1, 1)}
        sizes |= {"linear_pred.bias": (150,), "conv_seg.weight": (150, 256, 1, 1), "conv_seg.bias": (150,)}
        for i, width in enumerate(widths, start=1):
            sizes |= {f"linear_c{i}.proj.weight": (256, width), f"linear_c{i}.proj.bias": (256,)}
        norms, neck = {"linear_fuse.bn": 256}, {}
    else:
        # Resizing stands between the convolutions of a level.
        convs = {"0.0": 256, "1.0": 256, "2.0": 256, "2.2": 128, "3.0": 256, "3.2": 128, "3.4": 128}
        sizes = {f"scale_heads.{name}.conv.weight": (128, width, 3, 3) for name, width in convs.items()}
        sizes |= {"conv_seg.weight": (150, 128, 1, 1), "conv_seg.bias": (150,)}
        norms, neck = {f"scale_heads.{name}.bn": 128 for name in convs}, {}
        for i, width in enumerate(widths):
            neck |= {f"lateral_convs.{i}.conv.weight": (256, width, 1, 1), f"lateral_convs.{i}.conv.bias": (256,)}
            neck |= {f"fpn_convs.{i}.conv.weight": (256, 256, 3, 3), f"fpn_convs.{i}.conv.bias": (256,)}
    for norm, width in norms.items():
        sizes |= {f"{norm}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}
        sizes[f"{norm}.num_batches_tracked"] = ()
    return {f"decode_head.{name}": size for name, size in sizes.items()} | {
        f"neck.{name}": size for name, size in neck.items()
    }


@pytest.mark.parametrize("arch", WIDTHS)
def test_published_segmentors_load(arch, published):
    with DefaultScope.overwrite_default_scope("mmseg"):
        segmentor = mmseg.registry.MODELS.build(settings(arch))
    entries = {f"backbone.{name}": value for name, value in segmentation_entries(arch, published).items()}
    entries |= {name: torch.full(size, 7.0) for name, size in head_entries(arch).items()}
    assert segmentor.load_state_dict(entries) == ([], [])
    for name, parameter in segmentor.named_parameters():
        assert name.startswith("backbone.") or (parameter == 7).all(), name
