"""Interleaved timing and peak memory."""

import time

import pytest
import torch

from litvit.benchmarks.measuring import interleaved_medians, peak_memory


def test_medians_are_of_calls_in_turn(monkeypatch):
    order, now = [], 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    a_takes = iter([0.5, 0.5, 0.5, 8.0, 0.5])  # two to warm up, then one slow call of a

    def call(name, seconds):
        nonlocal now
        order.append(name)
        now += seconds

    calls = {"a": lambda: call("a", next(a_takes)), "b": lambda: call("b", 0.25), "short": lambda: call("s", 2**-8)}
    medians = interleaved_medians(calls, 3, torch.device("cpu"))
    # The short one takes 4 ms, so that six of it take 20.
    assert "".join(order) == "aabbss" + 3 * "abssssss"
    assert medians == {"a": 0.5, "b": 0.25, "short": 2**-8}


def test_memory_of_a_cpu_is_not_counted():
    assert peak_memory(lambda: torch.zeros(10), torch.device("cpu")) is None


@pytest.mark.gpu
def test_peak_memory_counts_what_was_allocated_before_too():
    device = torch.device("cuda")
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()  # blocks that are left may be larger than what is asked for
    before = torch.cuda.memory_allocated(device)
    there = torch.zeros(2**20, device=device)
    peak = peak_memory(lambda: torch.zeros(2**20, device=device) + there, device)
    assert peak - before == 3 * 4 * 2**20
