"""Where the attention of a model looks: its probabilities, their averages, their mean distance and their entropy.

Shape letters: B images, G groups of tokens that attend to each other (windows; 1 without), n queries and m keys per
group, (h, w) map of tokens, (y, x) a position.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from litvit.attention.hilo import HiLo
from litvit.errors import InputError

# Queries of the published maps of PVT (LIT, figure 3), near the centre of the maps of an image of 224 x 224 pixels.
PUBLISHED_QUERIES = {(56, 56): 1260, (28, 28): 294, (14, 14): 92, (7, 7): 17}
CHUNK = 1 << 20  # probabilities that are measured at once: few enough for the cache of a core


@dataclass
class Layout:
    """Places of the queries and keys of one attention.

    Attributes:
        grid: Map of the queries, (h, w).
        key_grid: Map of the keys, (h, w), smaller where keys are reduced.
        stride: Pixels per query token.
        reduction: Tokens per key along each side.
        prefixes: Numbers of queries and of keys before those of the maps: class tokens and the like.
        windows: Token of each place, (G, n), -1 for padding. None if all tokens attend to all.
    """

    grid: tuple[int, int]
    key_grid: tuple[int, int]
    stride: int
    reduction: int = 1
    prefixes: tuple[int, int] = (0, 0)
    windows: Tensor | None = None

    def tokens(self, of_keys: bool = False) -> Tensor:
        """Return the tokens of all places of queries or keys, (G, n) or (G, m)."""
        if self.windows is not None:
            return self.windows
        return torch.arange(math.prod(self.key_grid if of_keys else self.grid)).unsqueeze(0)

    def positions(self, of_keys: bool = False) -> Tensor:
        """Return the centres of all queries or keys in pixels, (G, n, 2) or (G, m, 2)."""
        grid, side = (self.key_grid, self.stride * self.reduction) if of_keys else (self.grid, self.stride)
        tokens = self.tokens(of_keys)
        rows = tokens.div(grid[1], rounding_mode="floor")
        return side * (torch.stack((rows, tokens % grid[1]), dim=-1) + 0.5)


@dataclass
class Attention:
    """The attention of one block, or of one pass of a block that applies it several times.

    The passes of HiLo are Hi-Fi and Lo-Fi.

    Attributes:
        stage: Number of the stage, from 1.
        block: Number of the block in its stage, from 0.
        pass_number: Number of the pass, from 1.
        heads: Number of heads.
        layout: Places of the queries and keys.
    """

    stage: int
    block: int
    pass_number: int
    heads: int
    layout: Layout

    def rows(self, probabilities: Tensor, images: int) -> Tensor:
        """Return the probabilities of every token of the map of queries for that of keys.

        Args:
            probabilities: Probabilities of a batch, (B * G, heads, n, m).
            images: Number of images, B.

        Returns:
            Probabilities, (B, heads, queries, keys), row by row. Class tokens are left out, so a sum may be less than
            1. Outside of a window they are 0.
        """
        queries, keys = self.layout.prefixes
        p = probabilities.detach().unflatten(0, (images, -1))[..., queries:, keys:]
        if self.layout.windows is None:
            return p[:, 0]
        tokens = self.layout.windows.to(p.device)
        count = math.prod(self.layout.grid)
        rows = p.new_zeros(images, self.heads, count + 1, count + 1)  # the last ones are the padding's, -1
        rows[:, :, tokens[:, :, None], tokens[:, None, :]] = p.transpose(1, 2)
        return rows[..., :count, :count]


@dataclass
class AttentionMap(Attention):
    """Averages over images of one attention.

    Attributes:
        query: Index of the query token in its map, row by row.
        images: Number of images.
        uniform_distance: Distance of attention that is the same for all keys, in pixels. None for windows.
        uniform_entropy: Entropy of it. None for windows.
    """

    query: int
    images: int = 0
    uniform_distance: float | None = None
    uniform_entropy: float | None = None
    _sums: list[Tensor] = field(default_factory=list)

    @property
    def probabilities(self) -> Tensor:
        """Mean probabilities of the query for the map of keys, float64 (heads, h, w). Class tokens are left out."""
        return (self._sums[0] / self.images).unflatten(1, self.layout.key_grid)

    @property
    def distance(self) -> Tensor:
        """Mean attention distance of each head in pixels, float64 (heads,), over all queries."""
        return self._sums[1] / self.images

    @property
    def entropy(self) -> Tensor:
        """Mean entropy of each head in nats, float64 (heads,), over all queries."""
        return self._sums[2] / self.images

    def add(self, probabilities: Tensor, images: int) -> None:
        """Add the probabilities of a batch, (B * G, heads, n, m)."""
        queries, keys = self.layout.prefixes
        p = probabilities.detach().unflatten(0, (images, -1))[..., queries:, keys:]
        group, place = (self.layout.tokens() == self.query).nonzero()[0].tolist()
        seen = self.layout.tokens(of_keys=True)[group]
        row = torch.zeros(p.shape[2], math.prod(self.layout.key_grid), dtype=torch.float64)
        row[:, seen[seen >= 0]] = p[:, group, :, place].double().sum(0).cpu()[:, seen >= 0]
        sums = [row, *(total.sum(0).cpu() for total in measure(p, self.layout))]
        self._sums = [old + new for old, new in zip(self._sums, sums, strict=True)] if self._sums else sums
        self.images += images


def measure(probabilities: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Measure attention: the mean distance of a query to its keys, weighted by probability, and the entropy.

    Probabilities that do not sum to 1, because class tokens are left out, are divided by their sum. No tensor as large
    as the probabilities is made.

    Args:
        probabilities: Probabilities, (B, G, heads, n, m).
        layout: Places of the queries and keys.

    Returns:
        Distance in pixels and entropy in nats, the means over all queries, both float64 (B, heads).
    """
    B, G, heads, n, m = probabilities.shape
    device = probabilities.device
    at, to = (layout.positions(of_keys).float().to(device) for of_keys in (False, True))
    is_query, is_key = (layout.tokens(of_keys).to(device) >= 0 for of_keys in (False, True))
    distance, entropy = torch.zeros(2, B, heads, dtype=torch.float64, device=device)
    tiny = torch.finfo(torch.float32).tiny
    rows = max(1, CHUNK // (B * G * heads * m))
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        p = probabilities[..., part, :].float()
        if layout.windows is not None:
            p = p * is_key[:, None, None]
        away = torch.hypot(*(at[:, part, None] - to[:, None]).unbind(-1))  # (G, rows, m)
        total = p.sum(-1).clamp(min=tiny)
        counts = is_query[:, None, part]
        distance += (torch.linalg.vecdot(p, away.unsqueeze(1)) / total * counts).double().sum((1, 3))
        # The entropy of p / total. On a CPU torch.special.entr is twice as slow.
        information = torch.linalg.vecdot(p, p.clamp(min=tiny).log_())
        entropy += ((total.log() - information / total) * counts).double().sum((1, 3))
    return distance / is_query.sum(), entropy / is_query.sum()


class AttentionReader:
    """Reads the attention of a model for images.

    Attention is read where modules give its probabilities, (B, heads, queries, keys), to their `attn_drop`, as the
    models of this package and of timm do. Attention of a class token alone, and attention that is not between the
    tokens of a map, is left out.

    Args:
        model: Model in eval mode.
        input_size: Channels, height and width of the images.

    Attributes:
        attentions: What is read, in the order in which the model computes it.
        left_out: Names of the modules whose attention is left out.

    Raises:
        InputError: The model has no such attention.
    """

    def __init__(self, model: nn.Module, input_size: tuple[int, int, int]):
        self.model = model
        device = next(model.parameters()).device
        self._calls: list[Attention | None] = []
        passes: dict[tuple[int, int], int] = {}
        left_out: list[str] = []

        def look(name: str, p: Tensor) -> None:
            # Heads that are mixed after the softmax, as in CaiT, give numbers that are no probabilities.
            mixed = p.min() < 0 or (p.sum(-1) - 1).abs().max() > 1e-2
            layout = None if mixed else _find_layout(name, p.shape, model, input_size[1:])
            if layout is None:
                left_out.append(name)
                self._calls.append(None)
                return
            stage, block = _place(name)
            passes[stage, block] = passes.get((stage, block), 0) + 1
            self._calls.append(Attention(stage, block, passes[stage, block], p.shape[1], layout))

        self._run(torch.zeros(1, *input_size, device=device), look)
        self.attentions = [found for found in self._calls if found is not None]
        self.left_out = list(dict.fromkeys(left_out))
        if not self.attentions:
            raise InputError(
                f"{type(model).__name__} has no attention between tokens of a map that could be read: no module gives "
                "its probabilities to an attn_drop"
            )

    def read(self, images: Tensor, see: Callable[[int, Tensor], None]) -> Tensor:
        """Run the model on images.

        Args:
            images: Images, (B, C, H, W), normalised as in training.
            see: Function of an index into `attentions` and its probabilities, (B * G, heads, n, m), called for each of
                them in turn. None of them is kept.

        Returns:
            Output of the model.

        Raises:
            InputError: Probabilities are infinite or NaN.
        """
        calls = iter(self._calls)
        numbers = iter(range(len(self.attentions)))

        def look(name: str, p: Tensor) -> None:
            if next(calls) is None:
                return
            if not p.sum().isfinite():
                raise InputError(f"the attention of {name} is not finite: the weights are broken, load others")
            see(next(numbers), p)

        return self._run(images, look)

    @torch.no_grad()
    def _run(self, images: Tensor, see: Callable[[str, Tensor], None]) -> Tensor:
        hooks = [
            module.attn_drop.register_forward_pre_hook(lambda _, inputs, name=name: see(name, inputs[0]))
            for name, module in self.model.named_modules()
            if isinstance(getattr(module, "attn_drop", None), nn.Module)
        ]
        try:
            with _written_out(self.model):
                return self.model(images)
        finally:
            for hook in hooks:
                hook.remove()


class AttentionAverages:
    """Averages of a model's attention over images, of which none is kept.

    Args:
        model: Model in eval mode, whose attention `AttentionReader` can read.
        input_size: Channels, height and width of the images.
        queries: Index of the query token of each stage that has attention, row by row; class tokens do not count. None
            for tokens near the centre, the published ones where maps are as large as PVT's.

    Attributes:
        maps: Averages of each attention, in the order in which the model computes them.
        left_out: Names of the modules whose attention is left out.

    Raises:
        InputError: The model has no such attention, or the queries do not fit.
    """

    def __init__(self, model: nn.Module, input_size: tuple[int, int, int], queries: Sequence[int] | None = None):
        self._reader = AttentionReader(model, input_size)
        self.left_out = self._reader.left_out
        chosen = _choose_queries({found.stage: found.layout.grid for found in self._reader.attentions}, queries)
        self.maps: list[AttentionMap] = []
        for found in self._reader.attentions:
            averages = AttentionMap(**vars(found), query=chosen[found.stage])
            if found.layout.windows is None:
                shape = (1, 1, 1, math.prod(found.layout.grid), math.prod(found.layout.key_grid))
                uniform = measure(torch.ones(1, 1, 1, 1, 1).expand(shape), found.layout)
                averages.uniform_distance, averages.uniform_entropy = (value.item() for value in uniform)
            self.maps.append(averages)

    def add(self, images: Tensor) -> None:
        """Add images, (B, C, H, W), normalised as in training.

        Raises:
            InputError: Probabilities are infinite or NaN.
        """
        self._reader.read(images, lambda number, p: self.maps[number].add(p, len(images)))


@contextmanager
def _written_out(model: nn.Module) -> Iterator[None]:
    """Let attention be written out, and not fused into one operation that shows no probabilities."""
    fused = [module for module in model.modules() if getattr(module, "fused_attn", False)]
    try:
        for module in fused:
            module.fused_attn = False
        yield
    finally:
        for module in fused:
            module.fused_attn = True


def _place(name: str) -> tuple[int, int]:
    """Return the stage, from 1, and the block in it, from 0, of a module such as stages.2.blocks.5.attn or blocks.5."""
    numbers = [int(part) for part in name.split(".") if part.isdecimal()] or [0]
    return (numbers[0] + 1 if len(numbers) > 1 else 1), numbers[-1]


def _find_layout(name: str, shape: torch.Size, model: nn.Module, size: tuple[int, int]) -> Layout | None:
    """Find out which tokens attend to which by the probabilities' shape for one image; None if it is not known."""
    if len(shape) != 4:
        return None
    groups, _, n, m = shape
    # Strides that the model names, else all that an image may have.
    strides = [info["reduction"] for info in getattr(model, "feature_info", ()) if isinstance(info, dict)]
    grids = {_divide(size, stride): stride for stride in reversed(sorted(strides) or range(1, min(size) + 1))}
    attention, block = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    if isinstance(attention, HiLo) and n == m == (s := attention.window_size) ** 2 > 1:  # Hi-Fi
        # Several maps may have as many windows: the stage's own map comes first.
        own = strides[_place(name)[0] - 1 : _place(name)[0]]
        for grid, stride in sorted(grids.items(), key=lambda item: item[1] not in own):
            windows = _window_tokens(grid, (s, s), (0, 0))
            if len(windows) == groups:
                return Layout(grid, grid, stride, windows=windows)
    window, shift, grid = (getattr(block, part, None) for part in ("window_size", "shift_size", "input_resolution"))
    if window and shift and grid:  # a block of timm's Swins
        windows = _window_tokens(grid, window, shift)
        fits = tuple(grid) in grids and n == m and tuple(windows.shape) == (groups, n)
        return Layout(tuple(grid), tuple(grid), grids[tuple(grid)], windows=windows) if fits else None
    if groups != 1 or n == 1 < m:
        return None
    prefixes = sorted({0, getattr(model, "num_prefix_tokens", 0)})
    for (h, w), stride in grids.items():
        for queries in prefixes:
            if n != queries + h * w:
                continue
            for reduction in range(1, min(h, w) + 1):
                for key_grid in ((h // reduction, w // reduction), _divide((h, w), reduction)):  # cut or padded
                    if (keys := m - math.prod(key_grid)) in (0, queries):
                        return Layout((h, w), key_grid, stride, reduction, (queries, keys))
    return None


def _divide(size: tuple[int, int], stride: int) -> tuple[int, int]:
    return tuple(-(-side // stride) for side in size)


def _window_tokens(grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """Return the token of each place of shifted windows, (windows, places), -1 for padding: the map, rolled and cut."""
    tokens = torch.arange(math.prod(grid)).view(grid).roll((-shift[0], -shift[1]), (0, 1))
    h, w = (-(-side // length) for side, length in zip(grid, window, strict=True))
    padded = torch.full((h * window[0], w * window[1]), -1)
    padded[: grid[0], : grid[1]] = tokens
    return padded.view(h, window[0], w, window[1]).transpose(1, 2).flatten(2).flatten(0, 1)


def _choose_queries(grids: dict[int, tuple[int, int]], queries: Sequence[int] | None) -> dict[int, int]:
    """Return the query of each stage."""
    if queries is None:
        return {stage: PUBLISHED_QUERIES.get((h, w), h // 2 * w + w // 2) for stage, (h, w) in grids.items()}
    if len(queries) != len(grids):
        stages = ", ".join(map(str, grids))
        raise InputError(f"--query takes one token for each stage with attention, {stages}: got {len(queries)}")
    for (stage, (h, w)), query in zip(grids.items(), queries, strict=True):
        if not 0 <= query < h * w:
            raise InputError(f"--query {query}: stage {stage} has {h} x {w} tokens, 0 to {h * w - 1}")
    return dict(zip(grids, queries, strict=True))
