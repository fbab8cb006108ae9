"""Deformable token merging beside nn.Conv2d and torchvision's op."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torchvision.ops import deform_conv2d

from litvit.dtm import DeformableTokenMerging, deform_conv_tokens, offset_parameters


def _tensors(k=2, height=8, width=8, offset_scale=1.0, dtype=torch.float64):
    torch.manual_seed(0)
    x = torch.randn(2, height, width, 5, dtype=dtype)
    offset = offset_scale * torch.randn(2, height // k, width // k, 2 * k * k, dtype=dtype)
    weight = torch.randn(7, 5, k, k, dtype=dtype)
    bias = torch.randn(7, dtype=dtype)
    return [tensor.requires_grad_() for tensor in (x, offset, weight, bias)]


def _torchvision(x, offset, weight, bias):
    k = weight.shape[-1]
    maps = x.permute(0, 3, 1, 2), offset.permute(0, 3, 1, 2)
    return deform_conv2d(*maps, weight, bias, stride=k).permute(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("k", "height", "width", "offset_scale"),
    [(1, 1, 1, 1), (1, 5, 1, 3), (1, 4, 6, 2), (2, 7, 9, 1), (2, 2, 2, 5), (2, 8, 8, 0), (3, 11, 9, 30)],
)
def test_equals_torchvision_with_gradients(k, height, width, offset_scale):
    tensors = _tensors(k, height, width, offset_scale)
    ours, theirs = deform_conv_tokens(*tensors), _torchvision(*tensors)
    assert (ours - theirs).abs().max() < 1e-10
    gradient = torch.randn_like(ours)
    for mine, other in zip(
        torch.autograd.grad(ours, tensors, gradient), torch.autograd.grad(theirs, tensors, gradient), strict=True
    ):
        assert (mine - other).abs().max() < 1e-10


def test_whole_offsets_equal_torchvision_with_gradients():
    x, offset, weight, bias = _tensors(2, 9, 6, 3)
    tensors = [x, offset.detach().round().requires_grad_(), weight, bias]
    ours, theirs = deform_conv_tokens(*tensors), _torchvision(*tensors)
    assert (ours - theirs).abs().max() < 1e-10
    mine, other = (torch.autograd.grad(y.square().sum(), tensors[1])[0] for y in (ours, theirs))
    assert (mine - other).abs().max() < 1e-10


def test_gradcheck():
    assert torch.autograd.gradcheck(deform_conv_tokens, _tensors(2, 5, 6, 1.5))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 9)])
def test_zero_offsets_equal_a_strided_convolution(height, width):
    x, offset, weight, bias = _tensors(2, height, width, 0)
    expected = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride=2).permute(0, 2, 3, 1)
    torch.testing.assert_close(deform_conv_tokens(x, offset, weight, bias), expected, rtol=0, atol=1e-13)


def test_non_contiguous_tokens_and_offsets():
    x, offset, weight, bias = (tensor.detach() for tensor in _tensors())
    expected = deform_conv_tokens(x, offset, weight, bias)
    as_maps = (tensor.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for tensor in (x, offset))
    torch.testing.assert_close(deform_conv_tokens(*as_maps, weight, bias), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_near_float64(dtype):
    tensors = [tensor.detach().to(dtype) for tensor in _tensors()]
    expected = deform_conv_tokens(*(tensor.double() for tensor in tensors))
    y = deform_conv_tokens(*tensors)
    assert y.dtype == dtype
    assert (y.double() - expected).norm() < 4 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_keeps_the_fraction_of_columns_above_256(autocast):
    # The tokens' only channel is 0 but at column 301; a read at 300.5 must see half of it.
    x = torch.zeros(1, 2, 320, 1, dtype=torch.float32 if autocast else torch.bfloat16)
    x[:, :, 301] = 8
    offset = torch.zeros(1, 1, 160, 8, dtype=torch.bfloat16)
    offset[..., 1] = 0.5
    weight = torch.zeros(1, 1, 2, 2, dtype=x.dtype)
    weight[..., 0, 0] = 1
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = deform_conv_tokens(x, offset, weight)
    assert y.dtype == torch.bfloat16
    assert y[0, 0, 150, 0] == 4
    assert y.float().sum() == 4


def test_huge_infinite_and_nan_offsets_are_safe():
    x, _, weight, _ = _tensors(2, 4, 4, dtype=torch.float32)
    offset = torch.zeros(2, 2, 2, 8)
    offset[0, 0, 0] = float("nan")
    offset[0, 0, 1] = 1e30
    offset[0, 1, 0] = float("inf")
    offset[0, 1, 1] = -float("inf")
    offset.requires_grad_()
    y = deform_conv_tokens(x, offset, weight)
    assert y[0, 0, 0].isnan().all()
    assert (y[0].flatten(0, 1)[1:] == 0).all()
    torch.testing.assert_close(y[1], deform_conv_tokens(x, torch.zeros(2, 2, 2, 8), weight)[1])
    (gradient,) = torch.autograd.grad(y.sum(), offset)
    assert (gradient[0].flatten(0, 1)[1:] == 0).all()


def test_offset_gradient_at_zero_offsets_lets_training_start():
    tensors = _tensors(offset_scale=0)
    (gradient,) = torch.autograd.grad(deform_conv_tokens(*tensors).sum(), tensors[1])
    assert (gradient[:, :-1, :-1] != 0).all()


def test_compiles_without_graph_breaks_at_any_size():
    compiled = torch.compile(deform_conv_tokens, fullgraph=True, dynamic=True, backend="aot_eager")
    for height, width in [(8, 6), (5, 12)]:
        tensors = _tensors(2, height, width)
        expected, y = deform_conv_tokens(*tensors), compiled(*tensors)
        torch.testing.assert_close(y, expected)
        for mine, other in zip(
            torch.autograd.grad(y.sum(), tensors), torch.autograd.grad(expected.sum(), tensors), strict=True
        ):
            torch.testing.assert_close(mine, other)


@pytest.mark.parametrize(
    ("changed", "shape", "message"),
    [
        (0, (2, 8, 8), "channels-last"),
        (0, (2, 8, 8, 4), "4 channels"),
        (0, (2, 1, 8, 5), "smaller than"),
        (1, (2, 4, 4, 4), "offset must be"),
        (1, (2, 8, 4, 4), "offset must be"),
        (2, (7, 5, 2, 3), "weight must be"),
        (3, (5,), "bias must be"),
    ],
)
def test_shapes_that_do_not_fit(changed, shape, message):
    tensors = _tensors()
    tensors[changed] = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        deform_conv_tokens(*tensors)


def test_module_starts_as_an_ordinary_merge():
    torch.manual_seed(0)
    merge = DeformableTokenMerging(6, 10).double()
    x = torch.randn(3, 7, 8, 6, dtype=torch.float64)
    tokens, offset = merge(x, return_offset=True)
    expected = F.gelu(merge.norm(merge.conv(x.permute(0, 3, 1, 2)))).permute(0, 2, 3, 1)
    assert offset.shape == (3, 3, 4, 8)
    assert (offset == 0).all()
    torch.testing.assert_close(tokens, expected)
    torch.testing.assert_close(merge(x), tokens)


def test_module_reads_where_its_offsets_say():
    torch.manual_seed(0)
    merge = DeformableTokenMerging(6, 10).double().eval()
    torch.nn.init.normal_(merge.offset.weight)
    x = torch.randn(2, 8, 8, 6, dtype=torch.float64)
    tokens, offset = merge(x, return_offset=True)
    expected = _torchvision(x, merge.offset(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), *merge.conv.parameters())
    expected = F.gelu(merge.norm(expected.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    assert offset.abs().max() > 1
    torch.testing.assert_close(tokens, expected)


def _trained_module(dtype):
    torch.manual_seed(0)
    merge = DeformableTokenMerging(6, 10)
    for tensor in (merge.offset.weight, merge.norm.weight, merge.norm.bias, merge.norm.running_mean):
        torch.nn.init.normal_(tensor)
    torch.nn.init.uniform_(merge.norm.running_var, 0.5, 2)
    return merge.to(dtype).eval()


def test_eval_normalises_with_running_statistics_and_has_their_gradients():
    merge = _trained_module(torch.float64)
    x = torch.randn(2, 8, 8, 6, dtype=torch.float64, requires_grad=True)
    leaves = [x, *merge.parameters()]
    offset = merge.offset(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    merged = deform_conv_tokens(x, offset, merge.conv.weight, merge.conv.bias).permute(0, 3, 1, 2)
    expected, tokens = F.gelu(merge.norm(merged)).permute(0, 2, 3, 1), merge(x)
    torch.testing.assert_close(tokens, expected)
    gradient = torch.randn_like(tokens)
    torch.testing.assert_close(
        torch.autograd.grad(tokens, leaves, gradient), torch.autograd.grad(expected, leaves, gradient)
    )


def test_eval_in_bfloat16_is_near_float64():
    merge, x = _trained_module(torch.bfloat16), torch.randn(2, 8, 8, 6).bfloat16()
    torch.nn.init.zeros_(merge.offset.weight)  # or roundings of offsets would be seen
    tokens = merge(x)
    expected = merge.double()(x.double())
    assert tokens.dtype == torch.bfloat16
    assert (tokens.double() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "norm",
    [
        torch.nn.BatchNorm2d(10),
        torch.nn.BatchNorm2d(10, affine=False),
        torch.nn.BatchNorm2d(10, track_running_stats=False),
        torch.nn.BatchNorm2d(10, affine=False, track_running_stats=False),
        torch.nn.SyncBatchNorm(10, affine=False),
        torch.nn.GroupNorm(2, 10),
        LayerNorm2d(10),
        torch.nn.Identity(),
    ],
    ids=lambda norm: str(norm).partition(", eps")[0],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
def test_eval_equals_the_composition_with_other_norms_and_without_bias(norm, bias, dtype, tolerance):
    merge = _trained_module(torch.float64)
    merge.norm, merge.conv = copy.deepcopy(norm).double().eval(), torch.nn.Conv2d(6, 10, 2, 2, bias=bias).double()
    if getattr(merge.norm, "running_mean", None) is not None:
        torch.nn.init.normal_(merge.norm.running_mean)
    x = torch.randn(2, 8, 8, 6, dtype=torch.float64)
    offset = merge.offset(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    merged = _torchvision(x, offset, merge.conv.weight, merge.conv.bias)
    expected = F.gelu(merge.norm(merged.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    tokens = merge.to(dtype)(x.to(dtype))
    assert tokens.dtype == dtype
    assert (tokens.double() - expected).norm() < tolerance * expected.norm()


def test_module_converts_to_synchronised_batch_norm():
    merge = torch.nn.SyncBatchNorm.convert_sync_batchnorm(DeformableTokenMerging(6, 10))
    assert isinstance(merge.norm, torch.nn.SyncBatchNorm)
    assert merge.eval()(torch.randn(2, 4, 4, 6)).shape == (2, 2, 2, 10)


def test_offset_parameters_of_any_model_learn_at_their_own_rate():
    model = torch.nn.Sequential(DeformableTokenMerging(4, 6), torch.nn.Sequential(DeformableTokenMerging(6, 8)))
    offsets = offset_parameters(model)
    assert [id(p) for p in offsets] == [id(p) for name, p in model.named_parameters() if ".offset." in name]
    assert offset_parameters(torch.nn.Linear(3, 3)) == []
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    rest = [p for p in model.parameters() if all(p is not offset for offset in offsets)]
    optimizer = torch.optim.SGD([{"params": rest}, {"params": offsets, "lr": 0.01}], lr=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        moved = torch.full_like(parameter, 0.01 if ".offset." in name else 1.0)
        torch.testing.assert_close(before[name] - parameter, moved)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-4), (torch.bfloat16, 3e-2), (torch.float16, 5e-3), (torch.float64, 1e-10)],
)
def test_a_gpu_gives_the_float64_result_and_gradients(dtype, tolerance):
    torch.manual_seed(0)
    tensors = [torch.randn(2, 15, 18, 24), 2 * torch.randn(2, 7, 9, 8), torch.randn(40, 24, 2, 2) / 10, torch.randn(40)]
    rounded = [tensor.to(dtype).double() for tensor in tensors]  # the same numbers on both sides

    def run(device, dtype):
        leaves = [tensor.to(device, dtype).requires_grad_() for tensor in rounded]
        out = deform_conv_tokens(*leaves)
        return [
            out,
            *torch.autograd.grad(out.float().square().sum() if dtype != torch.float64 else out.square().sum(), leaves),
        ]

    for ours, reference in zip(run("cuda", dtype), run("cpu", torch.float64), strict=True):
        error = (ours.double().cpu() - reference).norm() / reference.norm()
        assert error < tolerance


@pytest.mark.parametrize(
    ("size", "message"), [((1, 8, 6), "2 x 2 tokens or more, got 1 x 8"), ((8, 8, 5), r"tokens \(B, H, W, 6\)")]
)
def test_the_module_refuses_other_shapes(size, message):
    with pytest.raises(ValueError, match=message):
        DeformableTokenMerging(6, 10)(torch.zeros(2, *size))
