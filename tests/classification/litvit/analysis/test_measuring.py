"""Times and memory."""

import time

import pytest
import torch

from litvit.analysis.measuring import interleaved_medians, peak_memory


def test_medians_are_of_calls_in_turn():
    order = []
    seconds = iter([0.03, 0.03, 0.03, 0.2, 0.03])  # two to warm up, then one slow call of a

    def a():
        order.append("a")
        time.sleep(next(seconds))

    def b():
        order.append("b")
        time.sleep(0.03)

    medians = interleaved_medians({"a": a, "b": b}, 3, torch.device("cpu"))
    assert "".join(order) == "aabb" + 3 * "ab"
    assert medians["a"] < 0.1


def test_short_calls_are_repeated_and_count_singly():
    calls = []

    def short():
        calls.append(1)
        time.sleep(0.004)

    medians = interleaved_medians({"short": short}, 3, torch.device("cpu"))
    assert len(calls) > 2 + 3
    assert 0.004 <= medians["short"] < 0.015


def test_memory_of_a_cpu_is_not_counted():
    assert peak_memory(lambda: torch.zeros(10), torch.device("cpu")) is None


@pytest.mark.gpu
def test_peak_memory_counts_what_was_there_and_what_came():
    device = torch.device("cuda")
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()  # blocks that are left may be larger than what is asked for
    before = torch.cuda.memory_allocated(device)
    there = torch.zeros(2**20, device=device)
    peak = peak_memory(lambda: torch.zeros(2**20, device=device) + there, device)
    assert peak - before == 3 * 4 * 2**20
