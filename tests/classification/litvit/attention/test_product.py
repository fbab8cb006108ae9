"""Attention fused and written out, its dropout, and its derivatives of every kind, beside float64."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from litvit.attention import attend, relative_attention


def _tensors(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 2, 6, 8), (3, 2, 5, 8), (3, 2, 5, 8), (1, 2, 6, 5)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_the_definition(fused, with_bias):
    q, k, v, bias = _tensors()
    scores = q @ k.transpose(-2, -1) / 8**0.5 + (bias if with_bias else 0)
    expected = scores.softmax(-1) @ v
    torch.testing.assert_close(attend(q, k, v, bias if with_bias else None, None, fused), expected)


def test_dropout_sees_and_changes_the_weights():
    q, k, v, bias = _tensors()
    drop, seen = nn.Dropout(0.5), []
    drop.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    out = attend(q, k, v, bias, drop, fused=False)
    ((weights, dropped),) = seen
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, 6, dtype=torch.float64))
    assert 0.2 < (dropped == 0).double().mean() < 0.8
    torch.testing.assert_close(out, dropped @ v)
    ones = torch.ones_like(v)
    assert not torch.allclose(attend(q, k, ones, bias, drop, fused=True), ones[..., :1, :].expand_as(q))
    torch.testing.assert_close(attend(q, k, v, bias, drop.eval(), True), attend(q, k, v, bias, None, False))


def test_transforms_and_forward_mode():
    tensors = _tensors()

    def loss(q, k, v, bias):
        return attend(q[None], k[None], v[None], bias, None, fused=True).square().sum()

    in_dims = (0, 0, 0, None)
    gradients = torch.func.vmap(torch.func.grad(loss, (0, 1, 2, 3)), in_dims)(*tensors)
    for i in range(3):
        leaves = [*(tensor[i].clone().requires_grad_() for tensor in tensors[:3]), tensors[3].clone().requires_grad_()]
        expected = torch.autograd.grad(loss(*leaves), leaves)
        torch.testing.assert_close([gradient[i] for gradient in gradients], list(expected))
    q, k, v, bias = tensors
    biases = torch.stack([bias, 2 * bias])
    both = torch.func.vmap(attend, (None, None, None, 0, None, None))(q, k, v, biases, None, True)
    torch.testing.assert_close(both[1], attend(q, k, v, 2 * bias, None, False))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        tangent = forward_ad.unpack_dual(attend(dual, k, v, bias, None, fused=True)).tangent
    _, expected = torch.autograd.functional.jvp(lambda q: attend(q, k, v, bias, None, False), q, torch.ones_like(q))
    torch.testing.assert_close(tangent, expected)


def test_relative_attention_per_sample():
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(4, 6, 3, 2, 8, generator=generator, dtype=torch.float64)
    table = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)

    def loss(qkv, table):
        return relative_attention(qkv[None], table, (2, 3)).square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss, 1), (0, None))(qkv, table)
    for i in range(4):
        leaf = table.clone().requires_grad_()
        torch.testing.assert_close(gradients[i], torch.autograd.grad(loss(qkv[i], leaf), leaf)[0])
