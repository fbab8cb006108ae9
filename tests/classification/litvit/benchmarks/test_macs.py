"""Multiply-adds, counted by this code and by fvcore."""

import pytest
import timm
import torch

import litvit  # noqa: F401 (registers the models)
from litvit.benchmarks.macs import count_macs, fvcore_handles


def test_handles_count_attention_and_bilinear_reads():
    def run(q, k, v, index, table, weight):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return out, torch.nn.functional.embedding_bag(index, table, per_sample_weights=weight, mode="sum")

    inputs = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 4)
    graph = torch.jit.trace(run, (*inputs, torch.randint(9, (6, 4)), torch.randn(9, 10), torch.randn(6, 4))).graph
    handles = fvcore_handles()
    counts = {n.kind(): handles[n.kind()]([*n.inputs()], [*n.outputs()]) for n in graph.nodes() if n.kind() in handles}
    assert counts == {
        "aten::scaled_dot_product_attention": 2 * 3 * 5 * 7 * (8 + 4),
        "aten::embedding_bag": 4 * 6 * 10,
    }


@pytest.mark.parametrize("name", ["lit_ti", "lit_s", "lvt"])
def test_fvcore_counts_what_we_do(name):
    fvcore = pytest.importorskip("fvcore.nn")
    model = timm.create_model(name).eval()
    counter = fvcore.FlopCountAnalysis(model, torch.randn(1, 3, 224, 224)).set_op_handle(**fvcore_handles())
    assert 1 <= counter.total() / count_macs(model) < 1.01  # it counts norms too
