"""Statistics of batch normalisation, computed anew for merged weights."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils.data import TensorDataset

from roundtable import Stream
from roundtable.worker.merge.batchnorm import has_statistics, recompute


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2), nn.BatchNorm1d(2))


DATA = TensorDataset(torch.randn(40, 3, generator=torch.Generator().manual_seed(2)), torch.zeros(40))


def test_they_are_those_of_the_training_data_under_the_weights_as_they_are(one_thread: None) -> None:
    model = network()
    with torch.no_grad():
        model[1].running_mean.fill_(7.0)  # type: ignore[union-attr, operator]
    recompute(model, DATA, batch=40, seed=0)
    activations = model[0](DATA.tensors[0])
    torch.testing.assert_close(model[1].running_mean, activations.mean(0))
    torch.testing.assert_close(model[1].running_var, activations.var(0))


def test_all_get_the_same_bits_whatever_was_there_before_and_whatever_random_numbers_were_drawn(one_thread: None) -> None:
    one, other = network(), network()
    recompute(one, DATA, batch=16, seed=3)
    torch.rand(5)
    recompute(other, DATA, batch=7, seed=3)
    recompute(other, DATA, batch=16, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    recompute(other, DATA, batch=16, seed=4)
    assert not torch.equal(one[4].running_mean, other[4].running_mean)  # type: ignore[arg-type]


def test_samples_of_a_stream_come_in_its_order() -> None:
    model, expected = network(), network()
    stream = Stream(4, lambda shard, position: (DATA[10 * shard + n] for n in range(position, 10)), 10)
    recompute(model, stream, batch=40, seed=3)
    recompute(expected, DATA, batch=40, seed=3)
    torch.testing.assert_close(model[1].running_mean, expected[1].running_mean)


def test_weights_and_modes_stay_as_they_were() -> None:
    model = network()
    model[2].eval()
    modes = [module.training for module in model.modules()]
    weights = copy.deepcopy(list(model.parameters()))
    recompute(model, DATA, batch=100, seed=0)  # more than there are
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_a_model_without_them_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.LayerNorm(4))
    assert not has_statistics(model) and has_statistics(network())
    before = torch.get_rng_state()
    recompute(model, DATA, batch=8, seed=0)
    assert torch.equal(before, torch.get_rng_state())
