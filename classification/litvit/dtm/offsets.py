"""Where the merging modules of a model look: their offsets, how long these are, what they add up to, and plots of that.

Shape letters: B images, (h, w) map of tokens, (y, x) a position, n positions per token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from litvit.dtm.merging import DeformableTokenMerging
from litvit.errors import InputError

PATCH_SIZE = 4
# Plots are enlarged images, with this many pixels or more on the shorter side, so that the dots of a token lie apart.
PLOT_SIZE, OVERVIEW_SIZE = 448, 896
GREEN, RED, ORANGE, WHITE = (0, 230, 0), (235, 20, 20), (255, 150, 0), (255, 255, 255)


def merging_modules(model: nn.Module) -> list[DeformableTokenMerging]:
    """Return a model's merging modules, first stage first.

    Raises:
        InputError: The model has none.
    """
    modules = [module for module in model.modules() if isinstance(module, DeformableTokenMerging)]
    if not modules:
        raise InputError(f"{type(model).__name__} has no deformable token merging modules, so no offsets to look at")
    return modules


@torch.no_grad()
def predict_offsets(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Return the offsets that the merging modules of a LIT predict for images in eval mode.

    Args:
        model: LIT, left in the mode that it is in.
        images: Images, (B, 3, H, W), normalised as in training, of any size from 32 up.

    Returns:
        Offsets of each merging module, first stage first, (B, h, w, 8) in pixels of the module's input map: (dy, dx)
        for the taps (0, 0), (0, 1), (1, 0), (1, 1).

    Raises:
        InputError: The model has no merging modules.
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


def mean_lengths(offsets: Sequence[Tensor]) -> list[float]:
    """Return the mean length of the offsets of each merging module in pixels, NaN if one is not finite.

    Args:
        offsets: Offsets of each merging module, first stage first, (B, h, w, 8), as `predict_offsets` returns them.
    """
    means = [offset.float().unflatten(-1, (4, 2)).norm(dim=-1).mean() for offset in offsets]
    return [PATCH_SIZE * 2**number * mean for number, mean in enumerate(torch.stack(means).tolist())]


def sampling_locations(offsets: Sequence[Tensor]) -> Tensor:
    """Follow the last stage's tokens down through all merging modules to the image.

    Let O_l(p) be the offsets of merging module l at position p of its output map, bilinear between tokens and constant
    beyond the outermost ones. A position p of that map reads, through tap k of {0, 1}^2, the position

        q = 2 p + k + O_l(p)[k]

    of the module's input map. Each token of the last stage, p = (i, j), reads four positions of the map before. Those
    are no longer at whole tokens, and each of them reads four positions of the next map. Position q of the first
    stage's map is, in pixels of the image, 4 q + 1.5: the centre of a 4 x 4 patch.

    Args:
        offsets: Offsets of each merging module, first stage first, (B, h, w, 8) as `predict_offsets` returns them. Each
            map is about half as high and wide as the one before.

    Returns:
        Locations (y, x) in pixels, (B, h, w, n, 2) with the last map's h and w and n = 4 ** len(offsets). The centre of
        the image's first pixel is (0, 0). Locations are in the order of the taps, with the last module's slowest.

    Raises:
        InputError: The offsets are infinite or NaN.
    """
    return sampling_tree(offsets)[-1]


def sampling_tree(offsets: Sequence[Tensor]) -> list[Tensor]:
    """Return all positions on the way of `sampling_locations` from the last stage's tokens to the image.

    A position q of a map with s pixels per token is, in pixels of the image, s q + (s - 1) / 2.

    Args:
        offsets: Offsets of each merging module, as for `sampling_locations`.

    Returns:
        Locations (y, x) in pixels, (B, h, w, n, 2), with n = 4, 16, ..., 4 ** len(offsets). Location i of one tensor
        reads the locations 4 i to 4 i + 3 of the next.

    Raises:
        InputError: The offsets are infinite or NaN.
    """
    _check_finite(offsets)
    last = offsets[-1]
    B, h, w, _ = last.shape
    dtype = torch.promote_types(last.dtype, torch.float32)
    rows = torch.arange(h, dtype=dtype, device=last.device)
    columns = torch.arange(w, dtype=dtype, device=last.device)
    positions = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).expand(B, h, w, 2).unsqueeze(3)
    taps = _taps(positions)
    tree = []
    for level, offset in reversed(list(enumerate(offsets))):
        tap_offsets = _read_bilinear(offset.to(dtype), positions).unflatten(-1, (4, 2))
        positions = (2 * positions.unsqueeze(4) + taps + tap_offsets).flatten(3, 4)
        side = PATCH_SIZE * 2**level
        tree.append(side * positions + (side - 1) / 2)
    return tree


def _check_finite(offsets: Sequence[Tensor]) -> None:
    if not all(offset.isfinite().all() for offset in offsets):
        raise InputError("the offsets are not finite: the weights are broken, load another checkpoint")


def _taps(like: Tensor) -> Tensor:
    """Return the places (y, x) of the taps, (4, 2)."""
    return torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=like.dtype, device=like.device)


def _read_bilinear(field: Tensor, positions: Tensor) -> Tensor:
    """Read (B, H, W, C) at positions (B, h, w, n, 2), clamped to its borders: (B, h, w, n, C)."""
    B, H, W, _ = field.shape
    y, x = positions[..., 0].clamp(0, H - 1), positions[..., 1].clamp(0, W - 1)
    top, left = y.long(), x.long()
    bottom, right = (top + 1).clamp(max=H - 1), (left + 1).clamp(max=W - 1)
    down, across = (y - top).unsqueeze(-1), (x - left).unsqueeze(-1)
    image = torch.arange(B, device=field.device).view(B, 1, 1, 1)
    upper = torch.lerp(field[image, top, left], field[image, top, right], across)
    lower = torch.lerp(field[image, bottom, left], field[image, bottom, right], across)
    return torch.lerp(upper, lower, down)


@dataclass
class OffsetLengths:
    """How far one merging module looks.

    Attributes:
        stride: Pixels per token of the module's input map.
        mean: Mean length of the offsets in pixels.
        p95: 95th percentile of the lengths in pixels, to 0.1%.
        outside: Share of the sampling points outside of the square of 2 x 2 tokens that merge, from 0 to 1.
        lengths: Lengths in pixels, ascending.
        shares: Share of the offsets that are no longer than each of `lengths`, from 0 to 1.
    """

    stride: int
    mean: float
    p95: float
    outside: float
    lengths: Tensor
    shares: Tensor


class OffsetStatistics:
    """Statistics of the offsets of a LIT over images, of which none is kept: lengths are counted in bins."""

    # Ends of bins in tokens, each 0.18% above the one before. Offsets of 0 are in a bin of their own.
    EDGES = torch.logspace(-4, 4, 10_001, dtype=torch.float64)

    def __init__(self) -> None:
        self.images = 0
        self._counts: list[Tensor] = []
        self._sums: list[Tensor] = []  # of lengths in tokens, and the number of points outside

    def add(self, offsets: Sequence[Tensor]) -> None:
        """Add the offsets of a batch, (B, h, w, 8) per merging module, as `predict_offsets` returns them.

        Raises:
            InputError: The offsets are infinite or NaN.
        """
        _check_finite(offsets)
        if not self._counts:
            self._counts = [torch.zeros(len(self.EDGES) + 1, dtype=torch.long) for _ in offsets]
            self._sums = [torch.zeros(2, dtype=torch.float64) for _ in offsets]
        self.images += len(offsets[0])
        for offset, counts, sums in zip(offsets, self._counts, self._sums, strict=True):
            moves = offset.detach().cpu().double().unflatten(-1, (4, 2))
            lengths = moves.square().sum(-1).sqrt().flatten()
            counts += torch.bucketize(lengths, self.EDGES).bincount(minlength=len(counts))
            # Token i covers the places from i - 0.5 to i + 0.5.
            outside = ((moves + _taps(moves) - 0.5).abs() > 1).any(-1)
            sums += torch.stack((lengths.sum(), outside.sum().double()))

    def results(self) -> list[OffsetLengths]:
        """Return the statistics of each merging module, first stage first."""
        found = []
        for number, (counts, (length, outside)) in enumerate(zip(self._counts, self._sums, strict=True)):
            stride, total = PATCH_SIZE * 2**number, counts.sum().item()
            shares = counts.cumsum(0).double() / total
            # The middle of each bin, in ratios.
            middles = torch.cat((torch.zeros(1), (self.EDGES[1:] * self.EDGES[:-1]).sqrt(), self.EDGES[-1:]))
            p95 = middles[torch.searchsorted(shares, 0.95)].item()
            found.append(
                OffsetLengths(
                    stride=stride,
                    mean=stride * length.item() / total,
                    p95=stride * p95,
                    outside=outside.item() / total,
                    lengths=stride * self.EDGES,
                    shares=shares[:-1],
                )
            )
        return found


def save_plots(image: Image.Image, locations: Tensor, folder: Path) -> int:
    """Save one plot per token, `row00_column00.png` and so on, and `overview.png`. Earlier plots are removed.

    Args:
        image: Image as the model saw it, (H, W) pixels.
        locations: Locations that each token reads, (h, w, n, 2), from `sampling_locations`.
        folder: Folder of the plots, created if it does not exist.

    Returns:
        Number of tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("row[0-9]*_column[0-9]*.png"):
        old.unlink()
    zoom, canvas = _enlarge(image, PLOT_SIZE)
    overview_zoom, overview = _enlarge(image, OVERVIEW_SIZE)
    rows, columns, n = locations.shape[:3]
    stride = PATCH_SIZE * math.isqrt(n)
    for row in range(rows):
        for column in range(columns):
            corner, points = (row * stride, column * stride), locations[row, column].tolist()
            plot = canvas.copy()
            _draw_token(plot, corner, stride, points, zoom, RED)
            plot.save(folder / f"row{row:02d}_column{column:02d}.png", compress_level=1)
            # Two alternating colours tell neighbours apart.
            _draw_token(overview, corner, stride, points, overview_zoom, (RED, ORANGE)[(row + column) % 2])
    overview.save(folder / "overview.png", compress_level=1)
    return rows * columns


def _enlarge(image: Image.Image, size: int) -> tuple[int, Image.Image]:
    zoom = max(2, math.ceil(size / min(image.size)))
    return zoom, image.resize((image.width * zoom, image.height * zoom), Image.Resampling.BICUBIC)


def _draw_token(
    canvas: Image.Image,
    corner: tuple[int, int],
    side: int,
    points: list[list[float]],
    zoom: int,
    colour: tuple[int, int, int],
) -> None:
    """Draw a token's square of the regular grid, by its upper left corner and side in pixels, and its locations."""
    draw = ImageDraw.Draw(canvas)
    top, left = (zoom * start for start in corner)
    draw.rectangle((left, top, left + side * zoom - 1, top + side * zoom - 1), outline=GREEN, width=2)
    side = max(5, round(1.6 * zoom))
    # A white rim below the dots: they are seen on pictures of their own colour too.
    for dot, fill in ((_dot(side + 2 * max(1, side // 5)), WHITE), (_dot(side), colour)):
        for y, x in points:
            # The centre of pixel (0, 0) is (zoom / 2, zoom / 2) on the canvas.
            corner = (round((x + 0.5) * zoom - dot.width / 2), round((y + 0.5) * zoom - dot.height / 2))
            draw.bitmap(corner, dot, fill=fill)


def _dot(side: int) -> Image.Image:
    """Return a smooth disc as a mask."""
    finer = 8
    disc = Image.new("L", (side * finer, side * finer))
    ImageDraw.Draw(disc).ellipse((0, 0, side * finer - 1, side * finer - 1), fill=255)
    return disc.resize((side, side), Image.Resampling.BOX)
