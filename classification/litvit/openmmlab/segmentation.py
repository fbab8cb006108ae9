"""SegFormer's head as LVT was published with it, on mmseg and under the published names.

mmseg's own SegformerHead computes something else: it has a norm and a ReLU after the linear map of every level.

    custom_imports = dict(imports=["litvit.openmmlab.segmentation"])
    decode_head = dict(type="SegFormerHead", in_channels=[64, 64, 160, 256], in_index=[0, 1, 2, 3], channels=256, ...)
"""

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module()
class SegFormerHead(BaseDecodeHead):
    """SegFormer's all-MLP head (Xie et al., 2021, section 3.2).

    A linear map of every level to `channels`, all resized to the first level and concatenated, the last level first; a
    1 x 1 convolution with norm and ReLU; dropout; a 1 x 1 convolution to the classes.

    Args:
        kwargs: Arguments of mmseg's `BaseDecodeHead`: `in_channels` and `in_index` of the levels, the largest
            first, `channels`, `num_classes`, `norm_cfg` (None: no norm), `dropout_ratio`, `align_corners` and the loss.
            `conv_cfg` and `act_cfg` have no effect; `input_transform` and `init_cfg` are set here.
    """

    def __init__(self, **kwargs) -> None:
        super().__init__(input_transform="multiple_select", init_cfg=None, **kwargs)
        for i, in_channels in enumerate(self.in_channels, start=1):
            self.add_module(f"linear_c{i}", nn.ModuleDict({"proj": nn.Linear(in_channels, self.channels)}))
        levels = len(self.in_channels)
        self.linear_fuse = ConvModule(levels * self.channels, self.channels, 1, bias=False, norm_cfg=self.norm_cfg)
        self.linear_pred = self.conv_seg
        del self.conv_seg
        self._register_load_state_dict_pre_hook(self._drop_conv_seg)

    def forward(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Compute logits (B, classes, h, w) at the first level's size from the levels' maps (B, C, h, w)."""
        # Everything before the norm is linear, and a linear map of channels commutes with resizing. So the two maps of
        # each level are multiplied into one, which is applied at the level's own size.
        inputs = self._transform_inputs(inputs)
        fuse = self.linear_fuse.conv.weight.flatten(1).chunk(len(inputs), dim=1)
        levels = []
        for i, (x, part) in enumerate(zip(inputs, reversed(fuse), strict=True), start=1):
            proj = self.get_submodule(f"linear_c{i}.proj")
            x = x.contiguous(memory_format=torch.channels_last)  # resizing is faster in it
            levels.append(F.conv2d(x, (part @ proj.weight)[..., None, None], part @ proj.bias))
        fused, *others = levels
        for x in others:
            fused += F.interpolate(x, fused.shape[2:], mode="bilinear", align_corners=self.align_corners)
        if self.linear_fuse.with_norm:
            fused = self.linear_fuse.norm(fused)
        return self.cls_seg(self.linear_fuse.activate(fused))

    def cls_seg(self, feat: Tensor) -> Tensor:
        """Classify each location: (B, channels, h, w) -> (B, classes, h, w)."""
        return self.linear_pred(feat if self.dropout is None else self.dropout(feat))

    @staticmethod
    def _drop_conv_seg(state_dict: dict[str, Tensor], prefix: str, *_) -> None:
        """Drop the classifier of mmseg's base class, which published checkpoints hold and SegFormer does not use."""
        for name in ("weight", "bias"):
            state_dict.pop(f"{prefix}conv_seg.{name}", None)
