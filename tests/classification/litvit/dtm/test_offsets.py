import pytest
import torch
from timm.models import create_model
from torch import nn

from litvit.dtm.offsets import OffsetStatistics, merging_modules, predict_offsets, sampling_locations, sampling_tree
from litvit.errors import InputError


def zero_offsets(height: int = 4, width: int = 3) -> list[torch.Tensor]:
    """Of a LIT that has `height` x `width` tokens in its last stage."""
    return [torch.zeros(2, height * s, width * s, 8, dtype=torch.float64) for s in (4, 2, 1)]


def regular_grid(height: int = 4, width: int = 3) -> torch.Tensor:
    """The centres of the 8 x 8 patches of 4 x 4 pixels under each token, sorted by row and column: (h, w, 64, 2)."""
    y, x = (32 * torch.arange(n)[:, None] + 4 * torch.arange(8) + 1.5 for n in (height, width))
    grid = torch.empty(height, width, 8, 8, 2, dtype=torch.float64)
    grid[..., 0] = y[:, None, :, None]
    grid[..., 1] = x[None, :, None, :]
    return grid.flatten(2, 3)


def by_row_and_column(locations: torch.Tensor) -> torch.Tensor:
    """Sort the 64 locations of each token as a regular grid has them: taps come as (y, x) of each module in turn."""
    taps = locations.unflatten(3, (2,) * 6)
    return taps.permute(0, 1, 2, 3, 5, 7, 4, 6, 8, 9).flatten(3, 8)


def lit(**kwargs) -> nn.Module:
    small = {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "num_heads": (0, 0, 2, 2), "num_classes": 3}
    torch.manual_seed(0)
    return create_model("lit_s", **small, **kwargs)


def test_zero_offsets_give_the_regular_grid():
    locations = sampling_locations(zero_offsets())
    assert locations.shape == (2, 4, 3, 64, 2)
    torch.testing.assert_close(by_row_and_column(locations), regular_grid().expand(2, -1, -1, -1, -1), rtol=0, atol=0)
    # Each inside its token's 32 x 32 rectangle.
    corners = torch.stack(torch.meshgrid(32 * torch.arange(4), 32 * torch.arange(3), indexing="ij"), dim=-1)
    inside = locations - corners[None, :, :, None]
    assert (inside.min(), inside.max()) == (1.5, 29.5)


def test_the_tree_of_zero_offsets_is_of_squares_in_squares():
    tree = sampling_tree(zero_offsets())
    assert [level.shape[3] for level in tree] == [4, 16, 64]
    y, x = torch.meshgrid(32 * torch.arange(4) + 15.5, 32 * torch.arange(3) + 15.5, indexing="ij")
    parents = torch.stack((y, x), dim=-1).double().unsqueeze(2).expand(2, -1, -1, -1, -1)
    for level, side in zip(tree, (16, 8, 4), strict=True):
        corners = (side / 2) * torch.tensor([[-1, -1], [-1, 1], [1, -1], [1, 1]])
        expected = (parents.unsqueeze(4) + corners).flatten(3, 4)
        torch.testing.assert_close(level, expected, rtol=0, atol=0)
        parents = level


def test_the_tree_follows_each_modules_offsets():
    torch.manual_seed(0)
    offsets = [torch.randn_like(offset) for offset in zero_offsets()]
    tree = sampling_tree(offsets)
    torch.testing.assert_close(tree[-1], sampling_locations(offsets), rtol=0, atol=0)
    torch.testing.assert_close(tree[0] - sampling_tree(zero_offsets())[0], 16 * offsets[2].unflatten(-1, (4, 2)))
    # The rest of the way does not change what is before it.
    for changed in (0, 1):
        others = [torch.zeros_like(offset) if i <= changed else offset for i, offset in enumerate(offsets)]
        for before, after in zip(tree[: 2 - changed], sampling_tree(others), strict=False):
            torch.testing.assert_close(before, after, rtol=0, atol=0)


@pytest.mark.parametrize(("level", "stride"), [(0, 4), (1, 8), (2, 16)])
def test_constant_shift_moves_everything_by_the_stride_of_its_map(level, stride):
    offsets = zero_offsets()
    offsets[level] += torch.tensor([0.3, -1.7], dtype=torch.float64).repeat(4)
    moved = sampling_locations(offsets) - sampling_locations(zero_offsets())
    expected = stride * torch.tensor([0.3, -1.7], dtype=torch.float64)
    torch.testing.assert_close(moved, expected.expand_as(moved))


def test_taps_move_on_their_own():
    offsets = zero_offsets(1, 1)
    offsets[2][..., 4:6] = torch.tensor([1.0, 0.25])  # tap (1, 0) of the last module
    moved = sampling_locations(offsets) - sampling_locations(zero_offsets(1, 1))
    torch.testing.assert_close(moved[0, 0, 0, 32:48], torch.tensor([16.0, 4.0], dtype=torch.float64).expand(16, 2))
    assert not moved[0, 0, 0, :32].any()
    assert not moved[0, 0, 0, 48:].any()


def test_offsets_between_tokens_are_bilinear():
    # The middle module's offsets are an affine function of the place, so bilinear reading is exact, rounding is not.
    offsets = zero_offsets(4, 4)
    shift = torch.tensor([0.4, -0.3], dtype=torch.float64)
    offsets[2] += shift.repeat(4)
    y, x = torch.meshgrid(torch.arange(8.0, dtype=torch.float64), torch.arange(8.0, dtype=torch.float64), indexing="ij")
    field = torch.stack((0.1 * y + 0.02 * x - 0.3, 0.05 * x - 0.03 * y), dim=-1)
    offsets[1] += field.repeat(1, 1, 4)
    locations = sampling_locations(offsets)

    for i, j in ((1, 1), (1, 2), (2, 1)):  # whose places do not come near the border
        for a in range(4):
            p = torch.tensor([2 * i + a // 2, 2 * j + a % 2], dtype=torch.float64) + shift
            move = torch.stack((0.1 * p[0] + 0.02 * p[1] - 0.3, 0.05 * p[1] - 0.03 * p[0]))
            for b in range(4):
                q = 2 * p + torch.tensor([b // 2, b % 2]) + move
                for c in range(4):
                    expected = 4 * (2 * q + torch.tensor([c // 2, c % 2])) + 1.5
                    torch.testing.assert_close(locations[0, i, j, 16 * a + 4 * b + c], expected)


def test_beyond_the_border_the_outermost_offsets_hold():
    offsets = zero_offsets(2, 2)
    offsets[2] -= 100
    offsets[1][:, 0, 0] = 0.5
    locations = sampling_locations(offsets)
    moved = locations - sampling_locations([offsets[0], torch.zeros_like(offsets[1]), offsets[2]])
    torch.testing.assert_close(moved, torch.full_like(moved, 0.5 * 8))


def test_images_of_a_batch_do_not_mix():
    torch.manual_seed(0)
    offsets = [torch.randn(3, 4 * s, 5 * s, 8) for s in (4, 2, 1)]
    whole = sampling_locations(offsets)
    for n in range(3):
        torch.testing.assert_close(whole[n : n + 1], sampling_locations([o[n : n + 1] for o in offsets]))


def test_broken_offsets_are_named():
    offsets = zero_offsets()
    offsets[1][0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        sampling_locations(offsets)


def test_fresh_lit_looks_at_the_regular_grid():
    locations = sampling_locations(predict_offsets(lit(), torch.randn(1, 3, 64, 96)))
    torch.testing.assert_close(by_row_and_column(locations)[0], regular_grid(2, 3).float())


def test_offsets_are_those_of_the_merging_modules():
    model = lit(img_size=64)
    for name, parameter in model.named_parameters():
        if "offset" in name:
            nn.init.normal_(parameter, std=0.1)
    images = torch.randn(2, 3, 64, 64)
    offsets = predict_offsets(model, images)

    model.eval()
    tokens = model.patch_embed(images)
    for stage, offset in zip(model.stages[1:], offsets, strict=True):
        tokens = model.stages[0](tokens) if stage is model.stages[1] else tokens
        expected = stage.downsample(tokens, return_offset=True)[1]
        assert expected.abs().min() > 0
        torch.testing.assert_close(offset, expected)
        tokens = stage(tokens)


@pytest.mark.parametrize(("size", "tokens"), [((32, 32), (1, 1)), ((33, 70), (2, 3)), ((100, 224), (4, 7))])
def test_any_image_size(size, tokens):
    offsets = predict_offsets(lit(), torch.randn(1, 3, *size))
    assert [tuple(o.shape[1:3]) for o in offsets] == [tuple(-(-s // stride) for s in size) for stride in (8, 16, 32)]
    locations = sampling_locations(offsets)
    assert locations.shape == (1, *tokens, 64, 2)
    torch.testing.assert_close(by_row_and_column(locations)[0], regular_grid(*tokens).float())


def test_model_comes_back_as_it_was():
    model = lit().train()
    model.stages[0].eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    predict_offsets(model, torch.randn(1, 3, 64, 64))
    with pytest.raises(RuntimeError):
        predict_offsets(model, torch.randn(1, 5, 64, 64))
    assert modes == [module.training for module in model.modules()]
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_models_without_merging_modules_are_named():
    with pytest.raises(InputError, match="ResNet has no deformable token merging"):
        merging_modules(create_model("resnet18"))


def test_statistics_are_those_of_all_offsets_at_once():
    generator = torch.Generator().manual_seed(0)
    offsets = [
        scale * torch.randn(6, 4 * s, 3 * s, 8, generator=generator) for s, scale in ((4, 0.05), (2, 0.5), (1, 3.0))
    ]
    statistics = OffsetStatistics()
    for start in range(0, 6, 4):
        statistics.add([offset[start : start + 4] for offset in offsets])
    assert statistics.images == 6
    for found, offset, stride in zip(statistics.results(), offsets, (4, 8, 16), strict=True):
        moves = offset.double().unflatten(-1, (4, 2))
        lengths = stride * moves.norm(dim=-1).flatten()
        assert found.stride == stride
        assert found.mean == pytest.approx(lengths.mean().item(), rel=1e-9)
        assert found.p95 == pytest.approx(lengths.quantile(0.95, interpolation="higher").item(), rel=2e-3)
        places = moves + torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
        outside = ((places < -0.5) | (places > 1.5)).any(-1)
        assert found.outside == pytest.approx(outside.double().mean().item(), rel=1e-9)
        share = (lengths <= found.lengths[5000]).double().mean().item()
        assert found.shares[5000].item() == pytest.approx(share, abs=1e-9)


@pytest.mark.parametrize(
    ("move", "length", "outside"), [((0, 0), 0, 0), ((0.4, 0.3), 0.5, 0), ((0, -0.6), 0.6, 0.5), ((3, 4), 5, 1)]
)
def test_statistics_of_one_offset(move, length, outside):
    """In the lengths of the last map's tokens, of 16 pixels. To the left by 0.6 tokens, two of four taps leave."""
    offsets = zero_offsets()
    offsets[2] += torch.tensor(move, dtype=torch.float64).repeat(4)
    statistics = OffsetStatistics()
    statistics.add(offsets)
    found = statistics.results()
    assert (found[0].mean, found[0].p95, found[0].outside) == (0, 0, 0)
    assert (found[2].mean, found[2].outside) == (pytest.approx(16 * length), outside)
    assert found[2].p95 == pytest.approx(16 * length, rel=1e-3)


def test_statistics_of_broken_offsets():
    offsets = zero_offsets()
    offsets[1][0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        OffsetStatistics().add(offsets)
