"""Number of multiply-adds of a model."""

import copy

import torch
from timm.layers import to_2tuple
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


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
