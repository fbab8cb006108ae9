"""Steps of mmengine's optimizer wrappers that are left out."""

import copy

import pytest
import torch
import torch.multiprocessing
from mmengine.optim import AmpOptimWrapper, OptimWrapper, OptimWrapperDict
from torch import nn

from litvit.openmmlab.step_guard import guard_steps
from litvit.training.step_guard import MAX_BAD_IN_A_ROW, Diverged

GOOD = [torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
BAD = torch.full((8, 4), torch.nan)


class Net(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.BatchNorm1d(4), nn.Linear(4, 1))


def train(batches, kind=OptimWrapper, device="cpu", loss_of=torch.mean, **settings):
    """Train on batches. Returns the wrapper and the state of model and optimizer after each batch."""
    net = Net().to(device)
    wrapper = kind(optimizer=torch.optim.AdamW(net.parameters(), lr=0.1), **copy.deepcopy(settings))
    assert guard_steps(wrapper) == guard_steps(wrapper) == [wrapper]
    wrapper.initialize_count_status(net, 0, len(batches))
    states = []
    for batch in batches:
        with wrapper.optim_context(net):
            loss = loss_of(net(batch.to(device)))
        wrapper.update_params(loss)
        moments = [value for entry in wrapper.optimizer.state.values() for value in entry.values()]
        states.append([value.detach().float().cpu().clone() for value in (*net.state_dict().values(), *moments)])
    return wrapper, states


def is_same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize(
    "settings", [{}, {"clip_grad": {"max_norm": 0.1}}, {"clip_grad": {"type": "value", "clip_value": 0.1}}]
)
def test_a_bad_batch_changes_nothing(settings):
    """Neither the weights, nor BatchNorm's statistics (their count of batches aside), nor the optimizer."""
    wrapper, states = train([*GOOD[:2], BAD, *GOOD[2:]], **settings)
    _, expected = train(GOOD, **settings)
    assert (wrapper.bad_steps, wrapper.bad_in_a_row) == (1, 0)
    count = 4  # num_batches_tracked
    for state in (*states, *expected):
        state.pop(count)
    assert is_same(states[2], states[1])
    assert is_same(states[4], expected[3])
    assert not is_same(states[3], states[2])


def test_an_infinite_loss_with_finite_gradients():
    wrapper, states = train([GOOD[0]], loss_of=lambda x: x.mean() + torch.inf)
    assert wrapper.bad_steps == 1
    assert not wrapper.optimizer.state
    assert torch.equal(states[0][5], Net()[1].weight.detach())


def test_micro_batches_of_a_step_are_left_out_together():
    wrapper, states = train([GOOD[0], BAD, *GOOD[1:3]], accumulative_counts=2)
    _, expected = train(GOOD[1:3], accumulative_counts=2)
    assert wrapper.bad_steps == 1
    for state in (states[3], expected[1]):
        state.pop(4)
    assert is_same(states[3], expected[1])


def test_many_in_a_row_end_the_training():
    train([*[BAD] * (MAX_BAD_IN_A_ROW - 1), GOOD[0], *[BAD] * (MAX_BAD_IN_A_ROW - 1)])
    with pytest.raises(Diverged):
        train([GOOD[0], *[BAD] * MAX_BAD_IN_A_ROW])


def test_several_optimizers_are_guarded_one_by_one():
    first, second = (OptimWrapper(torch.optim.SGD(Net().parameters(), lr=0.1)) for _ in range(2))
    assert guard_steps(OptimWrapperDict(first=first, second=second)) == [first, second]
    first.update_params(sum(p.sum() for p in first.optimizer.param_groups[0]["params"]) * torch.nan)
    assert (first.bad_in_a_row, second.bad_in_a_row) == (1, 0)


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    wrapper, states = train(GOOD[:2], loss_of=lambda x: x.mean() + (torch.inf if rank else 0))
    torch.save((wrapper.bad_steps, states), folder / f"{rank}.pth")


def test_all_processes_leave_out_a_step_that_is_bad_in_one(tmp_path):
    torch.multiprocessing.start_processes(one_of_two, (tmp_path,), nprocs=2, start_method="fork")
    for rank in range(2):
        bad_steps, (first, second) = torch.load(tmp_path / f"{rank}.pth", weights_only=True)
        assert bad_steps == 2
        assert torch.equal(first[5], second[5])
        assert torch.equal(first[5], Net()[1].weight.detach())


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"clip_grad": {"max_norm": 1.0}}, {"loss_scale": 128.0}])
def test_half_precision(settings):
    wrapper, states = train([GOOD[0], BAD, GOOD[1]], AmpOptimWrapper, "cuda", **settings)
    for state in states:
        state.pop(4)
    assert is_same(states[0], states[1])
    assert not is_same(states[1], states[2])
    assert (wrapper.bad_steps, wrapper.bad_in_a_row) == (1, 0)
    with pytest.raises(Diverged):
        train([BAD] * MAX_BAD_IN_A_ROW, AmpOptimWrapper, "cuda")


@pytest.mark.gpu
def test_a_search_for_the_loss_scale_is_no_divergence():
    scale = 2.0**40  # half precision holds gradients of 2 ** 16
    wrapper, _ = train(GOOD * 10, AmpOptimWrapper, "cuda", loss_scale={"init_scale": scale})
    assert wrapper.bad_steps == 0
    assert wrapper.optimizer.state
    assert wrapper.loss_scaler.get_scale() < scale
