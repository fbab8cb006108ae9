"""Stand-ins for mmcv's compiled operators, backed by torchvision, on CPUs and GPUs.

`mmcv.ops` is Python around one compiled module, `mmcv._ext`. That module takes minutes to compile, fits one version of
torch, and has GPU operators only if a CUDA toolkit was installed. The detectors and segmentors of this project
use few of its operators, and torchvision's wheels have the means for them: NMS, Soft-NMS, RoIAlign and focal loss.

`provide_operators` replaces `mmcv._ext` by a module of stand-ins where mmcv lacks it. It has to run before
`mmcv.ops` is imported; importing `litvit.openmmlab` does that.
"""

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NoReturn

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from litvit.errors import InputError

_NAME = "mmcv._ext"
_AVERAGE = 1  # mmcv's number for average pooling


def provide_operators() -> str:
    """Make `mmcv.ops` importable, with mmcv's compiled operators if they run here, else with the stand-ins.

    Returns:
        Sentence for the log that says which operators are used, and why.

    Raises:
        InputError: Parts of mmdet or mmseg that need operators have been imported before, without finding any.
    """
    if importlib.util.find_spec("mmcv") is None:
        return "mmcv is not installed"
    compiled = None
    try:
        compiled = importlib.import_module(_NAME)
        if isinstance(compiled, _StandIns):
            return compiled.__doc__
        if not torch.cuda.is_available() or compiled.get_compiling_cuda_version() != "not available":
            return "mmcv's own compiled operators are used"
        reason = "mmcv was compiled without GPU operators"
    except ModuleNotFoundError:
        reason = "mmcv was installed without compiled operators"
    except ImportError as error:
        reason = f"mmcv's compiled operators do not fit this torch ({error})"
    late = "mmcv.ops" not in sys.modules
    for name in ("mmdet.models", "mmseg.models"):
        if late and name in sys.modules:
            raise InputError(f"{reason}: import litvit.openmmlab, which provides some, before {name}")
    sentence = f"{reason}: torchvision's are used"
    sys.modules[_NAME] = _StandIns(sentence, compiled)
    # mmdet.apis imports these before it reads a config, which names litvit.openmmlab.
    without = {"mmdet.structures.mask.structures": "roi_align", "mmdet.utils.large_image": "batched_nms"}
    for name, operator in without.items():
        if late and name in sys.modules:
            setattr(sys.modules[name], operator, getattr(importlib.import_module("mmcv.ops"), operator))
    return sentence


class _StandIns(ModuleType):
    """The module `mmcv._ext`. Operators without a stand-in are the compiled module's, or raise when they are called."""

    def __init__(self, doc: str, compiled: ModuleType | None) -> None:
        super().__init__(_NAME, doc)
        self.__spec__ = ModuleSpec(_NAME, None)
        self._compiled = compiled
        for operator in (
            *(nms, softnms, roi_align_forward, roi_align_backward),
            *(sigmoid_focal_loss_forward, sigmoid_focal_loss_backward),
        ):
            setattr(self, operator.__name__, operator)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        if self._compiled is not None:
            return getattr(self._compiled, name)
        if name in ("get_compiler_version", "get_compiling_cuda_version"):
            return lambda: "not available"  # mmengine logs them with the environment

        def refuse(*args, **kwargs) -> NoReturn:
            raise InputError(
                f"mmcv's {name} is not among the operators that torchvision provides: install a compiled mmcv"
            )

        return refuse


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Non-maximum suppression, greedy by score; of equal scores the first box comes first.

    Args:
        boxes: Corners (N, 4), x1 y1 x2 y2.
        scores: Scores (N,).
        iou_threshold: IoU above which the lower-scored box is dropped.
        offset: Number of pixels (0 or 1) that a side is longer than the difference of its corners.

    Returns:
        Indices (K,) of the boxes that are kept, by descending score.
    """
    boxes = boxes.to(_at_least_float32(boxes.dtype))
    if offset:
        # x2 + 1 is exact in float64, so that no IoU near the threshold changes sides.
        boxes = boxes.double() + boxes.new_tensor([0, 0, offset, offset])
    # The threshold in the boxes' own precision: in float32 an IoU of 0.3 is more than 0.3 in float64.
    iou_threshold = torch.tensor(iou_threshold, dtype=boxes.dtype).item()
    return torchvision.ops.nms(boxes, scores.to(boxes.dtype), iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS (Bodla et al., 2017) on the CPU: overlapping boxes lose score instead of being dropped.

    Args:
        boxes: Corners (N, 4).
        scores: Scores (N,).
        dets: Output (N, 5), written in place: corners and decayed scores of the kept boxes in its first K rows.
        iou_threshold: IoU from which the methods 0 and 1 take effect.
        sigma: Width of the Gaussian of method 2.
        min_score: Score below which a box is dropped.
        method: 0 for a weight of 0, 1 for 1 - IoU, 2 for exp(-IoU^2 / sigma).
        offset: Number of pixels (0 or 1), as for `nms`.

    Returns:
        Indices (K,) of the kept boxes.
    """
    table = torch.cat([boxes, scores[:, None]], dim=1).to(_at_least_float32(boxes.dtype)).numpy()
    sides = table[:, 2:4] - table[:, :2] + offset
    areas = sides[:, 0] * sides[:, 1]
    iou_threshold, min_score = table.dtype.type(iou_threshold), table.dtype.type(min_score)
    order = np.arange(len(table))  # the rows of `table` that are left: the first `i` are done
    i = 0
    while i < len(order):
        best = i + table[order[i:], 4].argmax()
        order[[i, best]] = order[[best, i]]
        top, rest = order[i], order[i + 1 :]
        corners = np.maximum(table[top, :2], table[rest, :2]), np.minimum(table[top, 2:4], table[rest, 2:4])
        overlap = np.maximum(corners[1] - corners[0] + offset, 0).prod(axis=1)
        iou = overlap / (areas[top] + areas[rest] - overlap)
        if method == 2:
            table[rest, 4] *= np.exp(-(iou * iou) / table.dtype.type(sigma))
        else:
            table[rest, 4] *= np.where(iou >= iou_threshold, 1 - iou if method == 1 else 0, 1)
        # As in the compiled operator, the last remaining box fills the slot of a dropped one: this order decides
        # between boxes of equal scores.
        kept = ~(table[rest, 4] < min_score)
        left = kept.sum()
        head, tail = rest[:left].copy(), rest[left:]
        head[~kept[:left]] = tail[kept[left:]][::-1]
        i += 1
        order = np.concatenate([order[:i], head])
    dets[: len(order)] = torch.from_numpy(table[order])
    return torch.from_numpy(order)


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign (He et al., 2017) by average pooling.

    Args:
        input: Maps (B, C, H, W).
        rois: Regions (N, 5): index of the image and corners.
        output: Output (N, C, aligned_height, aligned_width), written in place.
        argmax_y: Output of maximum pooling, not used.
        argmax_x: Output of maximum pooling, not used.
        aligned_height: Number of bins along y.
        aligned_width: Number of bins along x.
        spatial_scale: Size of the maps over the size of the image.
        sampling_ratio: Number of samples per bin and axis; 0 for one per pixel of the map.
        pool_mode: 1, average pooling.
        aligned: Whether corners are shifted by half a pixel.

    Raises:
        InputError: Maximum pooling is asked for.
    """
    if pool_mode != _AVERAGE:
        raise InputError(
            "mmcv's roi_align with pool_mode='max' is not among the operators that torchvision provides: install a "
            "compiled mmcv, or set pool_mode='avg'"
        )
    dtype = _at_least_float32(input.dtype)
    size = (aligned_height, aligned_width)
    pooled = torchvision.ops.roi_align(input.to(dtype), rois.to(dtype), size, spatial_scale, sampling_ratio, aligned)
    output.copy_(pooled)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Write the gradient of `roi_align_forward`'s `input` into `grad_input` (B, C, H, W)."""
    dtype = _at_least_float32(grad_output.dtype)
    size = (aligned_height, aligned_width)
    grad_output, rois = grad_output.to(dtype), rois.to(dtype)
    if grad_output.is_cuda and torch.are_deterministic_algorithms_enabled():
        # torchvision's kernel refuses; its formulation in torch's operations, which it takes then, does not.
        with torch.enable_grad():
            zeros = torch.zeros_like(grad_input, dtype=dtype, requires_grad=True)
            pooled = torchvision.ops.roi_align(zeros, rois, size, spatial_scale, sampling_ratio, aligned)
        grad_input.copy_(torch.autograd.grad(pooled, zeros, grad_output)[0])
        return
    shape = grad_input.shape
    backward = torch.ops.torchvision._roi_align_backward
    grad_input.copy_(backward(grad_output, rois, spatial_scale, *size, *shape, sampling_ratio, aligned))


def _focal_terms(input: Tensor, target: Tensor, weight: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits with the sign of their target, that sign, and their weights; all (N, C), float32 or better."""
    logits = input.to(_at_least_float32(input.dtype))
    positive = (target[:, None] == torch.arange(input.shape[1], device=input.device)).to(logits.dtype)
    sign = 2 * positive - 1
    weights = positive * alpha + (1 - positive) * (1 - alpha)
    if weight.numel():
        # A weight per class, for all logits of a row; the background, which has no weight, keeps 1.
        weights = weights * F.pad(weight.to(logits.dtype), (0, 1), value=1.0)[target, None]
    return logits * sign, sign, weights


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Focal loss of sigmoids (Lin et al., 2017, equation 5), without reduction.

    Args:
        input: Logits (N, C).
        target: Classes (N,); C is the background.
        weight: Weight per class (C,), or an empty tensor.
        output: Output (N, C), written in place.
        gamma: Focusing parameter.
        alpha: Weight of the positive class; negatives get 1 - alpha.
    """
    logits, _, weights = _focal_terms(input, target, weight, alpha)
    output.copy_(-weights * torch.sigmoid(-logits) ** gamma * F.logsigmoid(logits))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the derivative of `sigmoid_focal_loss_forward` by its `input` into `grad_input` (N, C)."""
    logits, sign, weights = _focal_terms(input, target, weight, alpha)
    p, q = torch.sigmoid(logits), torch.sigmoid(-logits)
    grad_input.copy_(sign * weights * q**gamma * (gamma * p * F.logsigmoid(logits) - q))
