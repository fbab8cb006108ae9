"""Attention as one fused operation of torch, or written out, with dropout of its weights.

Shape letters: B images, N queries, M keys, d channels per head.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from litvit.functorch_support import transforms_are_active


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, attn_drop: nn.Dropout | None, fused: bool) -> Tensor:
    """Compute softmax(q k^T / sqrt(d) + bias) v.

    Args:
        q: Queries, (B, heads, N, d).
        k: Keys, (B, heads, M, d).
        v: Values, (B, heads, M, d).
        bias: Bias of the scores, (1, heads, N, M), of the queries' type. None for no bias.
        attn_drop: Dropout of the weights, which it is called with, (B, heads, N, M), where attention is written out.
            None for no dropout.
        fused: Whether to run torch's scaled_dot_product_attention. Under torch.func and forward-mode derivatives,
            which it does not have, attention is written out all the same.

    Returns:
        Output, (B, heads, N, d).
    """
    transformed = transforms_are_active()
    if fused and not transformed:
        drop = attn_drop.p if attn_drop is not None and attn_drop.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=drop)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if bias is not None:
        # vmap cannot add one bias per sample in place to scores that all samples share.
        scores = scores + bias if transformed else scores.add_(bias)
    weights = scores.softmax(-1)
    return (weights if attn_drop is None else attn_drop(weights)) @ v
