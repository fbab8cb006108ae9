"""Deformable token merging beside nn.Conv2d and torchvision's op."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch.autograd import forward_ad
from torch.nn.utils import prune
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


def _every_derivative(x, offset, weight, bias):
    return deform_conv_tokens(x, offset, weight, bias).square().sum()


@pytest.mark.parametrize("offset_scale", [1.5, 0])
def test_gradients_per_sample_are_those_of_single_samples(offset_scale):
    torch.manual_seed(0)
    tensors = [
        torch.randn(3, 2, 6, 7, 4, dtype=torch.float64),
        offset_scale * torch.randn(3, 2, 3, 3, 8, dtype=torch.float64),
        torch.randn(5, 4, 2, 2, dtype=torch.float64),
        torch.randn(5, dtype=torch.float64),
    ]
    in_dims = (0, 0, None, None)
    merged = torch.func.vmap(deform_conv_tokens, in_dims)(*tensors)
    gradients = torch.func.vmap(torch.func.grad(_every_derivative, (0, 1, 2, 3)), in_dims)(*tensors)
    for i in range(3):
        leaves = [
            (t if dim is None else t[i]).clone().requires_grad_() for t, dim in zip(tensors, in_dims, strict=True)
        ]
        torch.testing.assert_close(merged[i], deform_conv_tokens(*leaves).detach())
        expected = torch.autograd.grad(_every_derivative(*leaves), leaves)
        torch.testing.assert_close([gradient[i] for gradient in gradients], list(expected))


def test_gradients_per_sample_compile():
    torch.manual_seed(0)
    x, offset, weight = torch.randn(3, 2, 4, 4, 4), torch.randn(3, 2, 2, 2, 8), torch.randn(5, 4, 2, 2)
    run = torch.func.vmap(torch.func.grad(_every_derivative, 1), (0, 0, None, None))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, offset, weight, None), run(x, offset, weight, None))


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0)])
def test_vmap_over_tokens_or_offsets_alone(in_dims):
    torch.manual_seed(0)
    x, offset, weight = torch.randn(3, 2, 6, 7, 4), 1.5 * torch.randn(3, 2, 3, 3, 8), torch.randn(5, 4, 2, 2)
    inputs = [tensor if dim == 0 else tensor[0] for tensor, dim in zip((x, offset), in_dims, strict=True)]
    merged = torch.func.vmap(lambda x, offset: deform_conv_tokens(x, offset, weight), in_dims)(*inputs)
    for i in range(3):
        single = [tensor[i] if dim == 0 else tensor for tensor, dim in zip(inputs, in_dims, strict=True)]
        torch.testing.assert_close(merged[i], deform_conv_tokens(*single, weight))


def test_forward_mode_and_second_derivatives():
    tensors = [tensor.detach() for tensor in _tensors(2, 4, 4)]
    tangents = [torch.randn_like(tensor) for tensor in tensors]
    gradients = torch.func.grad(_every_derivative, (0, 1, 2, 3))(*tensors)
    expected = sum((gradient * tangent).sum() for gradient, tangent in zip(gradients, tangents, strict=True))
    torch.testing.assert_close(torch.func.jvp(_every_derivative, tuple(tensors), tuple(tangents))[1], expected)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(tensor, tangent) for tensor, tangent in zip(tensors, tangents, strict=True)]
        torch.testing.assert_close(forward_ad.unpack_dual(_every_derivative(*duals)).tangent, expected)

    def gradient(offset):
        return torch.func.grad(_every_derivative, 1)(tensors[0], offset, *tensors[2:])

    hessian = torch.func.jacrev(gradient)(tensors[1])
    torch.testing.assert_close(torch.func.jacfwd(gradient)(tensors[1]), hessian)
    step = 1e-6 * tangents[1]
    along = (gradient(tensors[1] + step) - gradient(tensors[1] - step)) / 2e-6
    torch.testing.assert_close(torch.tensordot(hessian, tangents[1], dims=4), along, rtol=1e-5, atol=1e-5)


def test_transforms_leave_values_and_slopes_as_they_are():
    x, _, weight, _ = _tensors(2, 4, 4, dtype=torch.float32)
    offset = torch.zeros(2, 2, 2, 8)
    offset[0, 0, 0], offset[0, 0, 1], offset[0, 1, 0] = float("nan"), 1e30, float("inf")
    leaf = offset.clone().requires_grad_()
    expected = deform_conv_tokens(x, leaf, weight)
    merged, pull = torch.func.vjp(lambda offset: deform_conv_tokens(x, offset, weight), offset)
    torch.testing.assert_close(merged, expected.detach(), equal_nan=True)
    (gradient,) = pull(torch.ones_like(merged))
    (other,) = torch.autograd.grad(expected.sum(), leaf)
    torch.testing.assert_close(gradient.flatten(0, 2)[1:], other.flatten(0, 2)[1:])


def test_double_backward_says_that_it_is_not_there():
    tensors = _tensors()
    gradients = torch.autograd.grad(_every_derivative(*tensors), tensors, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice|not implemented"):
        gradients[1].sum().backward()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "watch",
    [
        lambda module, see: module.register_forward_hook(lambda *_: see()),
        lambda module, see: module.register_forward_pre_hook(lambda *_: see()),
        lambda module, see: module.register_full_backward_hook(lambda *_: see()),
        lambda module, see: setattr(module, "forward", lambda x, run=module.forward: (see(), run(x))[1]),
    ],
    ids=["forward hook", "pre-hook", "backward hook", "replaced forward"],
)
def test_convolution_and_norm_are_called_where_something_watches(watch, training):
    merge, x = _trained_module(torch.float64), torch.randn(2, 7, 9, 6, dtype=torch.float64)
    other, seen = copy.deepcopy(merge).train(training), []
    merge.train(training)
    for name in ("offset", "conv", "norm"):
        watch(getattr(other, name), lambda name=name: seen.append(name))
    results = []
    for module in (merge, other):
        leaf = x.clone().requires_grad_()
        tokens, offset = module(leaf, return_offset=True)
        results.append([tokens, offset, *torch.autograd.grad(tokens.square().sum(), [leaf, *module.parameters()])])
    torch.testing.assert_close(*results)
    assert sorted(seen) == ["conv", "norm", "offset"]


def test_hooks_of_all_modules_see_the_convolution_and_the_map_it_reads():
    merge, x, seen = _trained_module(torch.float64), torch.randn(2, 7, 9, 6, dtype=torch.float64), {}
    expected = merge(x)
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen.update({module: (args[0].shape, output.shape)})
    )
    try:
        torch.testing.assert_close(merge(x), expected)
    finally:
        hook.remove()
    assert seen[merge.conv] == ((2, 6, 6, 8), (2, 10, 3, 4))
    assert seen[merge.norm] == ((2, 10, 3, 4), (2, 10, 3, 4))


class LowRank(torch.nn.Module):
    """An adapter around a convolution: no `in_channels`, no `weight`."""

    def __init__(self, conv):
        super().__init__()
        self.base = conv
        self.down = torch.nn.Conv2d(6, 2, 2, 2, bias=False)
        self.up = torch.nn.Conv2d(2, 10, 1, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("training", [False, True])
def test_an_adapter_of_the_convolution_equals_its_merged_weight(training):
    merge, x = _trained_module(torch.float64).train(training), torch.randn(2, 8, 8, 6, dtype=torch.float64)
    adapted = copy.deepcopy(merge)
    adapted.conv = LowRank(adapted.conv).double()
    with torch.no_grad():
        merge.conv.weight += torch.einsum("or,rckl->ockl", adapted.conv.up.weight[..., 0, 0], adapted.conv.down.weight)
    tokens = adapted(x)
    torch.testing.assert_close(tokens, merge(x))
    tokens.sum().backward()
    assert all(parameter.grad.any() for parameter in adapted.conv.parameters())


def test_pruned_and_parametrized_weights_take_part_in_training():
    merge, x = _trained_module(torch.float64).train(), torch.randn(2, 8, 8, 6, dtype=torch.float64)
    spectral = torch.nn.utils.parametrizations.spectral_norm(copy.deepcopy(merge).conv)
    other = copy.deepcopy(merge)
    other.conv = spectral.eval()
    plain = copy.deepcopy(merge)
    with torch.no_grad():
        plain.conv.weight.copy_(spectral.weight)
    torch.testing.assert_close(other(x), plain(x))
    prune.l1_unstructured(merge.conv, "weight", 0.5)
    before = merge(x)
    with torch.no_grad():
        merge.conv.weight_orig *= 2
    assert not torch.allclose(merge(x), before)  # the weight is that of this step


def test_device_and_dtype_of_the_parameters():
    merge = DeformableTokenMerging(6, 10, device="meta", dtype=torch.bfloat16)
    assert all(tensor.is_meta for tensor in merge.state_dict().values())
    assert {parameter.dtype for parameter in merge.parameters()} == {torch.bfloat16}
    merge = merge.to_empty(device="cpu")
    merge.load_state_dict(DeformableTokenMerging(6, 10).state_dict())
    assert merge.eval()(torch.randn(1, 4, 4, 6).bfloat16()).dtype == torch.bfloat16


def test_script_says_what_to_use_instead():
    with pytest.raises(NotImplementedError, match=r"use torch\.jit\.trace or torch\.export"):
        torch.jit.script(torch.nn.Sequential(DeformableTokenMerging(6, 10)))
