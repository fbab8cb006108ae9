"""Number of parameters and of multiply-adds of a model."""

import copy
import math
from collections.abc import Callable

import torch
from timm.layers import to_2tuple
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: nn.Module) -> int:
    """Count a model's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, img_size: int | tuple[int, int] = 224) -> int:
    """Count the multiply-adds of one image: convolutions, linear layers and both products of attention.

    Norms, activations, softmax and bilinear reading are left out, as is usual.

    Args:
        model: Classifier or backbone. It is neither run nor changed; a copy on the meta device is run.
        img_size: Image size in pixels, an int or (H, W).

    Returns:
        Number of multiply-adds, half of what is often called FLOPs.
    """
    shadow = copy.deepcopy(model).to("meta").eval()
    image = torch.empty(1, getattr(model, "in_chans", 3), *to_2tuple(img_size), device="meta")
    # Attention as matrix products is counted the same on every machine.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        shadow(image)
    return counter.get_total_flops() // 2


def fvcore_handles() -> dict[str, Callable[[list, list], int]]:
    """Return fvcore's handles of the operations that it does not know: attention, and the bilinear reads of merging.

    fvcore then counts all multiply-adds: `FlopCountAnalysis(model, images).set_op_handle(**fvcore_handles()).total()`.
    """
    return {"aten::scaled_dot_product_attention": _attention_macs, "aten::embedding_bag": _bilinear_macs}


def _attention_macs(inputs: list, outputs: list) -> int:
    # q (..., N, d), k (..., M, d), v (..., M, e): the products q k^T and weights times v.
    q, k, v = (value.type().sizes() for value in inputs[:3])
    return math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _bilinear_macs(inputs: list, outputs: list) -> int:
    return 4 * math.prod(outputs[0].type().sizes())  # each value is a weighted sum of four
