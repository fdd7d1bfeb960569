"""Hidden layers whose outputs are dealt out to servers: they give and learn what plain layers do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_sharded_link import AtOnce, sharded
from torch import nn
from torch.nn.functional import cross_entropy

from roundtable.common.model.layout import make_layout
from roundtable.common.model.sparse_rows import cut
from roundtable.common.protocol.messages.setup import Update
from roundtable.common.protocol.messages.sharded import LayerPush, LayerUse, ShardedForward
from roundtable.common.protocol.model_spec import ShardedLayerSpec
from roundtable.common.runtime.errors import UsageError, WireError
from roundtable.ps.sharded.column_parallel import Products
from roundtable.ps.sharded.contributions import replicated, tensors_of
from roundtable.ps.sharded.layers import LayerShards
from roundtable.worker.layers.sharded_linear import (
    ColumnParallelLinear,
    HiddenGradient,
    ShardedLayers,
    ShardedLinear,
    sharded_cross_entropy,
)
from roundtable.worker.models.hybrid import shard_fully_connected

pytestmark = pytest.mark.usefixtures("one_thread")

DIM, BATCH, CLASSES = 6, 8, 70
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.5, "weight_decay": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.2, "momentum": 0.9}),
    "Adam": (torch.optim.Adam, {"lr": 0.01, "eps": 1e-3}),
}


def network() -> nn.Sequential:
    """Outputs that no number of servers divides, and fewer than make a block for each."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(DIM, 300), nn.ReLU(inplace=True), nn.Linear(300, 130, bias=False), nn.Tanh(), nn.Linear(130, CLASSES)
    )


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(BATCH, DIM, generator=generator), torch.randint(CLASSES, (BATCH,), generator=generator)


def both(name: str, servers: int) -> tuple[nn.Sequential, Any, nn.Sequential, ShardedLinear, ShardedLayers, AtOnce]:
    """A plain network with its optimizer, and the same one on servers."""
    cls, hyper = OPTIMIZERS[name]
    plain, model = network(), network()
    head = shard_fully_connected(model, CLASSES)
    group = {k: v for k, v in cls([torch.zeros(1)], **hyper).param_groups[0].items() if k != "params"}
    shards, link = sharded(model, servers, Update(cls.__name__, [group]))
    return plain, cls(plain.parameters(), **hyper), model, head, shards, link


def rows(plain: nn.Sequential) -> list[torch.Tensor]:
    """Return the part that servers are to hold."""
    layers = [layer for layer in plain if isinstance(layer, nn.Linear)]
    return [torch.cat([n.weight, *([] if n.bias is None else [n.bias[:, None]])], 1).detach() for n in layers]


@pytest.mark.parametrize("servers", [1, 2, 3, 5])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_that_of_plain_layers(name: str, servers: int) -> None:
    plain, optimizer, model, head, shards, link = both(name, servers)
    for number in range(3):
        optimizer.zero_grad()
        for k in range(2):
            x, y = batch(10 * number + k)
            ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
            loss = sharded_cross_entropy(model(ours), y, head)
            expected = cross_entropy(plain(theirs), y)
            loss.backward()
            (expected / 2).backward()
            torch.testing.assert_close(loss, expected)
            assert ours.grad is not None and theirs.grad is not None
            torch.testing.assert_close(ours.grad, 2 * theirs.grad, rtol=1e-4, atol=1e-6)
            shards.push(LayerPush(link.round, k, k + 1, BATCH, []), shards.contribution(BATCH), {})
        optimizer.step()
        link.close(2 * BATCH)
    for number, expected in enumerate(rows(plain)):
        torch.testing.assert_close(link.rows(number), expected, rtol=1e-4, atol=1e-5)


def test_first_values_are_those_of_a_linear_layer() -> None:
    torch.manual_seed(0)
    layer = ColumnParallelLinear(400, 1000)
    _, link = sharded(layer, 2, Update("SGD", [{"lr": 0.1}]))
    drawn = link.rows()
    assert drawn.shape == (1000, 401) and 0.049 < drawn.abs().max() <= 0.05 and abs(float(drawn.std()) - 0.05 / 3**0.5) < 1e-3


def test_outputs_have_the_features_shape_and_dtype_and_want_no_gradient_where_none_is_wanted() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(5, 100)
    layer = ColumnParallelLinear.of(plain)
    shards, _ = sharded(layer, 3, Update("SGD", [{"lr": 0.1}]))
    x = torch.randn(2, 3, 5)
    torch.testing.assert_close(layer(x), plain(x))
    assert layer(x.double()).dtype == torch.float64 and layer(x[0, 0]).shape == (100,)
    with torch.no_grad():
        assert not layer(x).requires_grad
    layer(x)  # no backward comes by
    assert shards.contribution(6) == []


def test_a_layer_that_is_used_twice_contributes_both() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(6, 6)
    layer = ColumnParallelLinear.of(plain)
    shards, link = sharded(layer, 2, Update("SGD", [{"lr": 0.1}]))
    x, optimizer = torch.randn(4, 6), torch.optim.SGD(plain.parameters(), lr=0.1)
    layer(layer(x).tanh()).square().mean().backward()
    plain(plain(x).tanh()).square().mean().backward()
    optimizer.step()
    shards.push(LayerPush(0, 0, 1, 4, []), shards.contribution(4), {})
    link.close(4)
    torch.testing.assert_close(link.rows()[:, :6], plain.weight.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("before", ["forward", "backward"])
def test_a_round_that_is_over_on_the_way_gives_no_contribution_and_says_so(before: str) -> None:
    layer = ColumnParallelLinear.of(nn.Linear(6, 6))
    shards, link = sharded(layer, 2, Update("SGD", [{"lr": 0.1}]))
    x = torch.randn(4, 6, requires_grad=True)
    y = layer(x) if before == "backward" else None
    link.servers[1].close([], 4, [])
    link.servers[1].close([], 4, [])
    y = layer(x) if y is None else y
    y.sum().backward()
    assert shards.round_invalid and (x.grad is None or not x.grad.any()) and shards.contribution(4) == []


# ---- what servers take


def servers_of(hidden: bool = True, keeps_versions: bool = True) -> LayerShards:
    spec = ShardedLayerSpec("w", 8, 4, 0, 0.5, bias=True, hidden=hidden)
    return LayerShards(make_layout([], 1, [], [spec]), 0, Update("SGD", [{"lr": 0.1}]), 0, keeps_versions)


FEATURES, SLOPES = torch.ones(2, 3), torch.ones(2, 8)


def answered(one: LayerShards, ask: ShardedForward, *tensors: torch.Tensor) -> Any:
    answer = one.ask("worker-0", ask, [frame for tensor in tensors for frame in cut(tensor)])
    while answer is None:
        done = one.work()
        answer = done[1] if done is not None else None
    return answer


def there_and_back(one: LayerShards) -> None:
    answered(one, ShardedForward(1, 0, 0, 2, True), FEATURES)
    answered(one, ShardedForward(2, 0, 0, 2, True, back_through=1), SLOPES)


@pytest.mark.parametrize(
    "change",
    [{"count": 1}, {"keeps": False}, {"top": 1}, {"count": 0}],
)
def test_ways_back_that_do_not_fit_are_refused(change: dict[str, Any]) -> None:
    one = servers_of()
    answered(one, ShardedForward(1, 0, 0, 2, True), FEATURES)
    question = {"number": 2, "layer": 0, "version": 0, "count": 2, "keeps": True, "back_through": 1} | change
    if change == {"top": 1}:
        question = {"number": 2, "layer": 0, "version": 0, "count": 2, "top": 1}
    with pytest.raises(WireError):
        answered(one, ShardedForward(**question), SLOPES[: question["count"]])
        pytest.fail("it was answered")


def test_a_classifier_has_no_way_back_and_a_hidden_layer_no_classes() -> None:
    with pytest.raises(WireError, match="goes back through 'w'"):
        answered(servers_of(hidden=False), ShardedForward(2, 0, 0, 2, True, back_through=1), SLOPES)
    with pytest.raises(WireError):
        answered(servers_of(), ShardedForward(1, 0, 0, 2, True), FEATURES, torch.zeros(2, dtype=torch.int64))


def test_only_ways_back_can_be_contributed() -> None:
    one = servers_of()
    there_and_back(one)
    with pytest.raises(WireError, match="about question 1, which was not asked"):
        one.receive("worker-0", LayerPush(0, 0, 1, 2, [LayerUse(1, 2)]), [])
    (part,) = one.receive("worker-0", LayerPush(0, 0, 1, 2, [LayerUse(2, 2, scale=2.0)]), [])
    assert isinstance(part.terms, Products) and torch.equal(part.terms.slopes, 2 * SLOPES)
    assert torch.equal(part.terms.features, torch.ones(2, 4))  # with a bias's


def test_a_server_in_anothers_place_is_told_all_of_a_question() -> None:
    new = servers_of()
    known = answered(new, ShardedForward(2, 0, 0, 2, True, back_through=1), SLOPES)
    assert known[0].gone
    answer = answered(new, ShardedForward(3, 0, 0, 2, True, back_through=1, with_features=True), SLOPES, FEATURES)
    assert not answer[0].gone
    other = servers_of()
    asked = ShardedForward(3, 0, 0, 2, True, back_through=1, with_features=True)
    frames = [*cut(SLOPES), *cut(FEATURES)]
    parts = [
        one.receive(
            "worker-0", LayerPush(0, 0, 1, 2, [LayerUse(3, 2)], questions=[asked] if told else []), frames if told else []
        )
        for one, told in ((new, False), (other, True))
    ]
    for left, right in zip(*([part.terms.tensors for part in found] for found in parts), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_a_copy_is_told_what_counts_and_has_the_same_rows() -> None:
    shard, copy = servers_of(), servers_of()
    there_and_back(shard)
    parts = shard.receive("worker-0", LayerPush(0, 0, 1, 2, [LayerUse(2, 2)]), [])
    told, frames = replicated(0, parts, 2, [{"lr": 0.1}], None), [frame for t in tensors_of(parts) for frame in cut(t)]
    for one, counted in ((shard, parts), (copy, copy.received(told, frames, "a copy"))):
        one.close(counted, 2, [{"lr": 0.1}])
        one.finish_updates()
    values = [one._layers[0]._values for one in (shard, copy)]
    assert torch.equal(*values) and not torch.equal(values[0], servers_of()._layers[0].read(torch.arange(8)))
    with pytest.raises(WireError, match="a copy"):
        copy.received(told, frames[:1], "a copy")


def test_each_contribution_on_its_own_moves_rows_by_its_part_of_the_rate() -> None:
    one, whole = servers_of(keeps_versions=False), servers_of()
    for number in (1, 3):
        answered(one, ShardedForward(number, 0, 0, 2, True), FEATURES)
        answered(one, ShardedForward(number + 1, 0, 0, 2, True, back_through=number), SLOPES)
    for number in (2, 4):
        parts = one.receive("worker-0", LayerPush(0, 0, 1, 2, [LayerUse(number, 2)]), [])
        one.apply(parts, 0, 2, [{"lr": 0.1}], 0.5)
    there_and_back(whole)
    whole.close(whole.receive("worker-0", LayerPush(0, 0, 1, 2, [LayerUse(2, 2)]), []), 2, [{"lr": 0.1}])
    one.finish_updates()
    whole.finish_updates()
    torch.testing.assert_close(one._layers[0]._values, whole._layers[0]._values)


def test_gradients_that_are_not_finite_can_be_seen() -> None:
    use = HiddenGradient(1, torch.tensor([[float("nan")]]))
    assert use.tensors == [] and use.gradients[0].isnan().all() and use.times(3).use == LayerUse(1, 1, scale=3.0)


def test_layers_that_cannot_be_are_refused() -> None:
    with pytest.raises(UsageError, match="needs a feature and an output"):
        ColumnParallelLinear(0, 5)
    with pytest.raises(UsageError, match="a ColumnParallelLinear is on the servers"):
        ColumnParallelLinear(3, 5)(torch.ones(1, 3))
    layer = ColumnParallelLinear.of(nn.Linear(6, 6))
    sharded(layer, 1, Update("SGD", [{"lr": 0.1}]))
    with pytest.raises(UsageError, match=r"features are \(2, 5\), but a ColumnParallelLinear takes \(samples, 6\)"):
        layer(torch.ones(2, 5))
