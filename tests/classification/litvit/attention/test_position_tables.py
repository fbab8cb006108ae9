"""Position tables at other sizes, beside torch's interpolation."""

import torch
import torch.nn.functional as F

from litvit.attention.position_tables import resize_position_table, resize_relative_table


def test_tables_that_fit_are_not_touched():
    table = torch.randn(1, 4, 6, 3)
    assert resize_position_table(table, (4, 6)) is table
    assert resize_position_table(table.bfloat16(), (8, 8)).dtype == torch.bfloat16
    table = torch.randn(2, 7, 11)
    assert resize_relative_table(table, (4, 6)) is table
    assert resize_relative_table(table, (3, 5)).shape == (2, 5, 9)


def test_relative_tables_are_resized_bicubically_with_their_gradient():
    table = torch.randn(2, 27, 13, requires_grad=True)
    for grid in ((25, 42), (4, 3)):
        ours = resize_relative_table(table, grid)
        reference = F.interpolate(table[None].double(), size=ours.shape[1:], mode="bicubic")[0]
        torch.testing.assert_close(ours.double(), reference, rtol=1e-4, atol=1e-4)
        gradient = torch.randn_like(ours)
        grads = [torch.autograd.grad(out, table, gradient.to(out))[0] for out in (ours, reference)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
