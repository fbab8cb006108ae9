"""Where LIT's merging modules look: their offsets, and the image locations that these add up to.

Shape letters: B images, (h, w) the tokens of a map, (y, x) a place, n places for each token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from litvit.dtm import DeformableTokenMerging
from litvit.errors import InputError

PATCH_SIZE = 4


def merging_modules(model: nn.Module) -> list[DeformableTokenMerging]:
    """Return a model's merging modules, first stage first.

    Raises:
        InputError: it has none.
    """
    modules = [module for module in model.modules() if isinstance(module, DeformableTokenMerging)]
    if not modules:
        raise InputError(f"{type(model).__name__} has no deformable token merging modules, so no offsets to look at")
    return modules


@torch.no_grad()
def predict_offsets(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Return what the merging modules of a LIT predict for images, in eval mode.

    Args:
        model: a LIT; it is left in the mode in which it came.
        images: (B, 3, H, W), normalised as in training, H and W any size from 32 up.

    Returns:
        For each merging module, first stage first, offsets (B, h, w, 8) in pixels of the map that it merges: (dy, dx)
        for the taps (0, 0), (0, 1), (1, 0), (1, 1).

    Raises:
        InputError: the model has no merging modules.
    """
    merges = merging_modules(model)
    offsets: list[Tensor] = []
    training = [module for module in model.modules() if module.training]
    hooks = [merge.offset.register_forward_hook(lambda _, __, output: offsets.append(output)) for merge in merges]
    try:
        model.eval()
        model.forward_intermediates(images, intermediates_only=True)
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    return [offset.permute(0, 2, 3, 1) for offset in offsets]


def sampling_locations(offsets: Sequence[Tensor]) -> Tensor:
    """Follow the last stage's tokens down through all merging modules to the image.

    Let O_l(p) be the offsets of merging module l at place p of its output map, bilinear between tokens and constant
    beyond the outermost ones. A place p of that map reads, through tap k of {0, 1}^2, the place

        q = 2 p + k + O_l(p)[k]

    of the map below. The tokens of the last stage, p = (i, j), read four places of the map below; those are no longer
    at whole tokens, and each of them reads four of the next. Place q of the first stage's map is, in pixels of the
    image, 4 q + 1.5: the centre of a 4 x 4 patch.

    Args:
        offsets: of each merging module, first stage first, (B, h, w, 8) as `predict_offsets` returns them; each map
            about half as high and wide as the one before.

    Returns:
        (B, h, w, n, 2) with the last map's h and w: for every token the n = 4 ** len(offsets) locations (y, x) in
        pixels; the centre of the image's first pixel is (0, 0). Locations are in the order of the taps, the last
        module's slowest.

    Raises:
        InputError: offsets that are infinite or NaN.
    """
    if not all(offset.isfinite().all() for offset in offsets):
        raise InputError("the offsets are not finite: the weights are broken, load another checkpoint")
    last = offsets[-1]
    B, h, w, _ = last.shape
    dtype = torch.promote_types(last.dtype, torch.float32)
    rows = torch.arange(h, dtype=dtype, device=last.device)
    columns = torch.arange(w, dtype=dtype, device=last.device)
    places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).expand(B, h, w, 2).unsqueeze(3)
    taps = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=dtype, device=last.device)
    for offset in reversed(offsets):
        moves = _read_bilinear(offset.to(dtype), places).unflatten(-1, (4, 2))
        places = (2 * places.unsqueeze(4) + taps + moves).flatten(3, 4)
    return PATCH_SIZE * places + (PATCH_SIZE - 1) / 2


def _read_bilinear(field: Tensor, places: Tensor) -> Tensor:
    """Read a field (B, H, W, C) at places (B, h, w, n, 2), clamped to its borders. Returns (B, h, w, n, C)."""
    B, H, W, _ = field.shape
    y, x = places[..., 0].clamp(0, H - 1), places[..., 1].clamp(0, W - 1)
    top, left = y.long(), x.long()
    bottom, right = (top + 1).clamp(max=H - 1), (left + 1).clamp(max=W - 1)
    down, across = (y - top).unsqueeze(-1), (x - left).unsqueeze(-1)
    image = torch.arange(B, device=field.device).view(B, 1, 1, 1)
    upper = torch.lerp(field[image, top, left], field[image, top, right], across)
    lower = torch.lerp(field[image, bottom, left], field[image, bottom, right], across)
    return torch.lerp(upper, lower, down)
