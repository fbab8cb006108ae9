"""Multiply-adds, counted by this code and by fvcore."""

import pytest
import timm
import torch

import litvit  # noqa: F401 (registers the models)
from litvit.benchmarks.macs import count_macs, fvcore_handles
from litvit.benchmarks.published import PUBLISHED

# What is counted where the published digits are others, see docs/models.md.
DIFFERENT = {
    "pvt_small": (24.49, 3.82),
    "lit_m": (49.37, 8.59),
    "lit_b": (87.29, 15.03),
    "resnet101": (44.55, 7.80),
    "deit_base_patch16_224": (86.57, 17.56),
    "pvt_small_msa_no1": (20.14, 4.45),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_models_of_the_papers_tables(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    parameters, macs = sum(parameter.numel() for parameter in model.parameters()) / 1e6, count_macs(model) / 1e9
    published = PUBLISHED[name]
    counted = int(parameters), round(parameters)  # the paper rounds parameters, or rounds down
    agrees = published.parameters in counted and published.macs == round(macs, 1)
    assert agrees == (name not in DIFFERENT)
    if not agrees:
        assert (round(parameters, 2), round(macs, 2)) == DIFFERENT[name]


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


@pytest.mark.parametrize("name", ["lit_ti", "lit_s", "litv2_s", "lvt"])
def test_fvcore_counts_what_we_do(name):
    fvcore = pytest.importorskip("fvcore.nn")
    model = timm.create_model(name).eval()
    counter = fvcore.FlopCountAnalysis(model, torch.randn(1, 3, 224, 224)).set_op_handle(**fvcore_handles())
    assert 1 <= counter.total() / count_macs(model) < 1.01  # it counts norms too
