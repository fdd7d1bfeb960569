"""Sharded layers on servers: updates are torch's own, questions are answered from their round's version, state can be saved."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_sharded_link import AtOnce, rows_of, sharded
from torch import nn
from torch.nn.functional import cross_entropy

from roundtable.common.model.layout import make_layout
from roundtable.common.model.sparse_rows import cut, id_of, local_of, owner_of
from roundtable.common.protocol.messages.setup import Update
from roundtable.common.protocol.messages.sharded import LayerPush, LayerUse, ShardedForward, ShardedForwardReply
from roundtable.common.protocol.model_spec import ShardedLayerSpec
from roundtable.common.runtime.errors import WireError
from roundtable.common.storage import tensor_file
from roundtable.ps.sharded.contributions import LayerContribution
from roundtable.ps.sharded.layer import LayerShard
from roundtable.ps.sharded.layers import LayerShards
from roundtable.ps.sharded.softmax import OnlineSoftmax, Terms
from roundtable.worker.client.sharded_client import Sums
from roundtable.worker.layers.sharded_linear import ShardedLayers, ShardedLinear, sharded_cross_entropy
from roundtable.worker.layers.sharded_loss import combine

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES, DIM, BATCH = 700, 6, 8
#: Classes that no number of servers divides.
ODD = 701
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.5, "weight_decay": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.5, "momentum": 0.9, "dampening": 0.5, "nesterov": False}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.2}),
    "Adam": (torch.optim.Adam, {"lr": 0.01, "eps": 1e-3, "amsgrad": True}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "eps": 1e-3, "centered": True}),
}


def result(job: Any) -> Any:
    """The result of a job."""
    while True:
        try:
            next(job)
        except StopIteration as end:
            return end.value


def update_of(name: str) -> Update:
    cls, hyper = OPTIMIZERS[name]
    group = {k: v for k, v in cls([torch.zeros(1)], **hyper).param_groups[0].items() if k != "params"}
    return Update(cls.__name__, [group])


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(BATCH, DIM, generator=generator), torch.randint(CLASSES, (BATCH,), generator=generator)


def push_all(layer: ShardedLinear, shards: ShardedLayers, link: AtOnce, first: int, count: int = 2, **how: Any) -> None:
    """All of a round of `count` micro-batches."""
    for k in range(count):
        x, y = batch(first + k)
        sharded_cross_entropy(x, y, layer, **how).backward()
        shards.push(LayerPush(link.round, k, k + 1, BATCH, []), shards.contribution(BATCH), {})


def round_of(layer: ShardedLinear, shards: ShardedLayers, link: AtOnce, first: int, count: int = 2, **how: Any) -> None:
    push_all(layer, shards, link, first, count, **how)
    link.close(count * BATCH)


def both(name: str, servers: int) -> tuple[nn.Linear, torch.optim.Optimizer, ShardedLinear, ShardedLayers, AtOnce]:
    """A plain layer with its optimizer, and the same layer on servers."""
    torch.manual_seed(1)
    plain = nn.Linear(DIM, CLASSES, bias=True)
    layer = ShardedLinear.of(plain)
    shards, link = sharded(layer, servers, update_of(name))
    return plain, OPTIMIZERS[name][0](plain.parameters(), **OPTIMIZERS[name][1]), layer, shards, link


@pytest.mark.parametrize("servers", [1, 2, 3, 5])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_those_of_torchs_optimizers_on_a_plain_layer(name: str, servers: int) -> None:
    plain, optimizer, layer, shards, link = both(name, servers)
    for number in range(4):
        round_of(layer, shards, link, 10 * number)
        optimizer.zero_grad()
        x, y = (torch.cat(part) for part in zip(batch(10 * number), batch(10 * number + 1), strict=True))
        cross_entropy(plain(x), y).backward()
        optimizer.step()
    assert plain.bias is not None
    rtol, atol = (0.0, 1e-6) if name in ("SGD", "momentum") else (1e-4, 1e-5)  # others divide by the size of gradients
    torch.testing.assert_close(link.rows(), torch.cat([plain.weight, plain.bias[:, None]], 1), rtol=rtol, atol=atol)


@pytest.mark.parametrize("servers", [1, 2, 3])
@pytest.mark.parametrize("name", ["momentum", "Adagrad"])
def test_clipping_by_norm_is_that_of_torch_on_a_plain_layer(name: str, servers: int) -> None:
    plain, optimizer, layer, shards, link = both(name, servers)
    for number in range(4):
        push_all(layer, shards, link, 10 * number)
        before = torch.cat([server._layers[0].read(torch.arange(9)) for server in link.servers])
        norms = link.norms(2 * BATCH)
        assert [(tensor, server) for tensor, server, _ in norms] == [(0, server) for server in range(servers)]
        assert link.norms(2 * BATCH) == norms  # they are known, and nothing has moved
        assert torch.equal(torch.cat([server._layers[0].read(torch.arange(9)) for server in link.servers]), before)
        optimizer.zero_grad()
        x, y = (torch.cat(part) for part in zip(batch(10 * number), batch(10 * number + 1), strict=True))
        cross_entropy(plain(x), y).backward()
        total = nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        assert math.hypot(*(norm for _, _, norm in norms)) == pytest.approx(float(total), rel=1e-5)
        assert total > 0.2
        link.close(2 * BATCH, factor=torch.clamp(0.1 / (total + 1e-6), max=1.0))
        optimizer.step()
    assert plain.bias is not None
    torch.testing.assert_close(link.rows(), torch.cat([plain.weight, plain.bias[:, None]], 1), rtol=1e-4, atol=1e-5)


def train_in_float64(servers: int, tile_rows: int, one_shard: bool, clip: float | None, atol: float) -> None:
    """20 steps, the last of each epoch of 4 with fewer samples, with a layer before it, which the norm is over too, beside those
    of torch. At each, losses are the same to 1e-10 and gradients to 1e-8; weights are in the end to `atol`."""
    torch.manual_seed(2)
    body, head = nn.Linear(4, DIM).double(), nn.Linear(DIM, ODD, bias=False).double()
    ours, spec = nn.Linear(4, DIM).double(), ShardedLayerSpec("w", ODD, DIM, 0, None)
    ours.load_state_dict(body.state_dict())
    shards = [LayerShard(spec, server, servers, Update("SGD", [{"lr": 2.0}]), 0) for server in range(servers)]
    owners = owner_of(torch.arange(ODD), servers)
    labels = (owners == servers - 1).nonzero().flatten() if one_shard else torch.arange(ODD)
    for server, shard in enumerate(shards):
        shard._values = head.weight.detach()[owners == server].clone()
        shard._tile_rows = tile_rows
    optimizers = torch.optim.SGD([*body.parameters(), *head.parameters()], lr=2.0), torch.optim.SGD(ours.parameters(), lr=2.0)
    clipped = 0
    for step in range(20):
        generator, count = torch.Generator().manual_seed(step), 9 if step % 4 < 3 else 5
        inputs = torch.randn(count, 4, generator=generator).double()
        y = labels[torch.randint(len(labels), (count,), generator=generator)]
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses = cross_entropy(head(body(inputs)), y, reduction="none")
        losses.mean().backward()
        x = ours(inputs)
        samples, sums = [shard.samples(x.detach(), y) for shard in shards], []
        for shard, one in zip(shards, samples, strict=True):
            softmax = OnlineSoftmax(one, DIM)
            for start, tile in shard.tiles():
                softmax.add(tile, start)
            sums.append(Sums(softmax.largest, softmax.total, softmax.rows, torch.empty(0), shard.read(one.own[one.own >= 0])))
        found = combine(sums, x.detach(), y, servers, ODD, 0.0, None)
        torch.testing.assert_close(found.losses, losses.detach(), rtol=1e-10, atol=1e-10)
        x.backward(found.slope / count)
        for mine, its in zip(ours.parameters(), body.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, its.grad, rtol=1e-8, atol=1e-8)
        g = torch.ones(count).double()
        parts = [[LayerContribution(0, Terms(one, found.log_total, g, found.own_slope, 0 * g), False)] for one in samples]
        assert head.weight.grad is not None
        for server, (shard, part) in enumerate(zip(shards, parts, strict=True)):
            slope = torch.cat([slope for _, _, slope in shard._slopes(part, step, count)])
            torch.testing.assert_close(slope, head.weight.grad[owners == server], rtol=1e-8, atol=1e-8)
        factor = None
        if clip is not None:
            total = nn.utils.clip_grad_norm_([*body.parameters(), *head.parameters()], clip)
            norms = [result(shard.norm(part, step, count)) for shard, part in zip(shards, parts, strict=True)]
            dense = [float(torch.linalg.vector_norm(p.grad)) for p in ours.parameters() if p.grad is not None]
            norm = torch.tensor(math.hypot(*norms, *dense), dtype=torch.float64)
            torch.testing.assert_close(norm, total, rtol=1e-10, atol=0)
            factor = torch.clamp(clip / (norm + 1e-6), max=1.0)
            clipped += bool(factor < 1)
            for parameter in ours.parameters():
                assert parameter.grad is not None
                parameter.grad.mul_(factor)
        for shard, part in zip(shards, parts, strict=True):
            result(shard.update(part, step, count, {}, factor))
        for optimizer in optimizers:
            optimizer.step()
    assert clip is None or clipped == 20
    torch.testing.assert_close(rows_of(shards), head.weight.detach(), rtol=0, atol=atol)
    torch.testing.assert_close(ours.weight, body.weight, rtol=0, atol=atol)


@pytest.mark.parametrize("servers", [1, 2, 3, 5])
def test_clipped_training_in_float64_is_torchs(servers: int) -> None:
    train_in_float64(servers, 256, one_shard=False, clip=0.3, atol=1e-8)


@pytest.mark.parametrize(
    ("servers", "tile_rows", "one_shard"),
    [*itertools.product([1, 2, 3, 5], [7, ODD], [False, True]), (5, 1, False), (3, 1, True)],  # tiles of a row take long
)
def test_training_in_float64_is_torchs_however_rows_are_divided(servers: int, tile_rows: int, one_shard: bool) -> None:
    train_in_float64(servers, tile_rows, one_shard, clip=None, atol=1e-7)


def test_first_values_are_those_of_a_linear_layer_whoever_has_them_and_fill_no_memory_before() -> None:
    found = [sharded(ShardedLinear(DIM, CLASSES), servers, update_of("SGD"))[1].rows() for servers in (1, 3)]
    assert torch.equal(*found)
    bound = DIM**-0.5
    assert found[0].abs().max() <= bound and found[0].std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert len(found[0].unique()) > 4000
    other = sharded(ShardedLinear(DIM, CLASSES), 1, update_of("SGD"), seed=1)[1].rows()
    assert not torch.equal(found[0], other)


def test_ids_and_places_are_each_others_inverse() -> None:
    ids = torch.arange(CLASSES)
    for servers in (1, 3):
        for server in range(servers):
            mine = ids[owner_of(ids, servers) == server]
            assert torch.equal(id_of(local_of(mine, servers), server, servers), mine)


def test_sampling_moves_the_rounds_negative_classes_and_the_samples_own() -> None:
    layer = ShardedLinear(DIM, CLASSES, sample_rate=0.2)
    shards, link = sharded(layer, 2, update_of("momentum"))
    before = link.rows().clone()
    round_of(layer, shards, link, 0)
    moved = (link.rows() != before).any(1)
    own = torch.cat([batch(0)[1], batch(1)[1]])
    assert bool(moved[own].all())
    assert 0.1 * CLASSES < int(moved.sum()) < 0.35 * CLASSES
    round_of(layer, shards, link, 2)
    again = (link.rows() != before).any(1)
    assert int(again.sum()) > int(moved.sum())  # others in every round


def drawn(link: AtOnce, round_: int) -> torch.Tensor:
    """The negative classes of a round, over all servers."""
    found = []
    for one in (server._layers[0] for server in link.servers):
        places = one._negatives(round_)
        assert places is not None
        found.append(one.ids(places))
    return torch.cat(found).sort().values


def test_the_same_classes_are_drawn_whatever_the_number_of_servers_and_others_in_another_round_or_by_another_seed() -> None:
    def link(servers: int, seed: int = 0) -> AtOnce:
        return sharded(ShardedLinear(DIM, CLASSES, sample_rate=0.2), servers, update_of("SGD"), seed=seed)[1]

    links = [link(servers) for servers in (1, 2, 3, 5)]
    rounds = [[drawn(one, round_) for one in links] for round_ in (3, 4, 3)]
    for found in rounds:
        assert all(torch.equal(one, found[0]) for one in found)
    assert torch.equal(rounds[2][0], rounds[0][0])  # once more
    for other in (rounds[1][0], drawn(link(1, seed=1), 3)):
        common = int(torch.isin(other, rounds[0][0]).sum())
        assert 0 < common < 0.5 * len(other)  # by chance a fifth


@pytest.mark.parametrize("servers", [1, 2, 3])
@pytest.mark.parametrize("name", ["momentum", "Adam"])
def test_neither_values_nor_state_of_classes_that_were_not_drawn_move(name: str, servers: int) -> None:
    shards, link = sharded(layer := ShardedLinear(DIM, CLASSES, sample_rate=0.2), servers, update_of(name))

    def everything() -> dict[str, torch.Tensor]:
        found, owners = {"values": link.rows()}, owner_of(torch.arange(CLASSES), servers)
        shares = [server._layers[0] for server in link.servers]
        for key in shares[0]._state:
            found[key] = torch.empty(CLASSES, DIM)
            for server, share in enumerate(shares):
                found[key][owners == server] = share._state[key]
        return found

    before = everything()
    for round_ in range(3):
        round_of(layer, shards, link, 10 * round_)
        part = torch.zeros(CLASSES, dtype=torch.bool)
        part[torch.cat([drawn(link, round_), batch(10 * round_)[1], batch(10 * round_ + 1)[1]])] = True
        after = everything()
        assert len(after) == (2 if name == "momentum" else 4)
        for key, now in after.items():
            old = before.get(key, torch.zeros_like(now))
            assert torch.equal(now[~part], old[~part])
            moved = (now != old).any(1)
            assert bool(moved[part].all())
        before = after


def test_a_sampled_loss_is_that_over_the_sampled_classes() -> None:
    layer = ShardedLinear(DIM, CLASSES, sample_rate=0.3)
    _, link = sharded(layer, 1, update_of("SGD"))
    x, y = batch(0)
    weight, negatives = link.rows(), link.servers[0]._layers[0]._negatives(0)
    assert negatives is not None
    losses = sharded_cross_entropy(x.requires_grad_(), y, layer, reduction="none")
    losses.sum().backward()
    expected = []
    for one, label in zip(x.detach(), y, strict=True):
        classes = torch.cat([label[None], negatives[negatives != label]])
        expected.append(cross_entropy((one @ weight[classes].T)[None], torch.tensor([0])))
    torch.testing.assert_close(losses.detach(), torch.stack(expected))


# ---- versions


def sharded_layers(servers: int = 1, keeps_versions: bool = True) -> LayerShards:
    spec = ShardedLayerSpec("w", CLASSES, DIM, 0, 0.1)
    return LayerShards(make_layout([], servers, [], [spec]), 0, update_of("SGD"), 0, keeps_versions)


def ask(one: LayerShards, number: int, version: int, keeps: bool = True, sender: str = "worker-0") -> Any:
    x, y = batch(version)
    answer = one.ask(sender, ShardedForward(number, 0, version, BATCH, keeps), [*cut(x), *cut(y)])
    while answer is None and one.busy:
        done = one.work()
        answer = done[1] if done is not None else None
    return None if answer is None else (answer[0], [bytes(frame) for frame in answer[1]])


def contribute(one: LayerShards, number: int, round_: int) -> None:
    frames = [frame for value in (9.0, 1.0, -1.0) for frame in cut(torch.full((BATCH,), value))]
    parts = one.receive("worker-0", LayerPush(round_, 0, 1, BATCH, [LayerUse(number, BATCH)]), frames)
    one.close(parts, BATCH, [])


def test_a_closed_round_is_answered_as_before_until_somebody_asks_about_the_next_one() -> None:
    one = sharded_layers()
    first = ask(one, 1, 0)
    contribute(one, 1, 0)
    assert ask(one, 2, 0)[1] == first[1]
    assert ask(one, 3, 2) is None
    after = ask(one, 4, 1)
    assert after is not None and not after[0].gone
    assert ask(one, 5, 0) == (ShardedForwardReply(5, gone=True), [])
    evaluated = ask(one, 6, 0, keeps=False)  # from the present rows
    assert not evaluated[0].gone and evaluated[1] != first[1]


def test_rounds_in_which_nothing_was_asked_do_not_hold_the_update_back() -> None:
    one, other = sharded_layers(), sharded_layers()
    for each in (one, other):
        ask(each, 1, 0)
        contribute(each, 1, 0)
        each.close([], BATCH, [])
    other.finish_updates()
    assert ask(one, 2, 2) == ask(other, 2, 2)


def test_a_question_that_comes_twice_is_answered_once_more_from_memory() -> None:
    one = sharded_layers()
    first = ask(one, 1, 0)
    assert not one.busy
    assert ask(one, 1, 0) == first and not one.busy


def test_an_old_question_that_comes_once_more_does_not_take_the_place_of_the_newest_one() -> None:
    one = sharded_layers()
    ask(one, 1, 0)
    newest = ask(one, 2, 0)
    assert ask(one, 1, 0) is None and not one.busy
    assert ask(one, 2, 0) == newest


# ---- where each contribution is applied on its own


def applied(one: LayerShards, sender: str, number: int, round_: int, lr_scale: float = 1.0) -> None:
    """Have what `sender` asked contributed as a worker would have it, if these were all classes."""
    kept = one._questions.askers[sender].kept[number]
    x, y = batch(round_)
    own = (one._layers[0].read(y) * x).sum(1)
    assert kept.log_total is not None
    log_total = torch.logaddexp(kept.log_total, own)
    values = [log_total, torch.ones(BATCH), torch.exp(own - log_total) - 1.0]
    parts = one.receive(
        sender, LayerPush(round_, 0, 1, BATCH, [LayerUse(number, BATCH)]), [frame for value in values for frame in cut(value)]
    )
    one.apply(parts, round_, BATCH, [], lr_scale)


def test_a_contribution_alone_moves_rows_as_a_round_of_its_own_does_by_its_part_of_the_rate() -> None:
    one, whole = sharded_layers(keeps_versions=False), sharded_layers()
    for each in (one, whole):
        ask(each, 1, 0)
    before = one._layers[0].read(torch.arange(CLASSES))
    applied(one, "worker-0", 1, 0, lr_scale=0.25)
    one.finish_updates()
    kept = whole._questions.askers["worker-0"].kept[1]
    x, y = batch(0)
    own = (before[y] * x).sum(1)
    assert kept.log_total is not None
    log_total = torch.logaddexp(kept.log_total, own)
    terms = Terms(kept.samples, log_total, torch.ones(BATCH), torch.exp(own - log_total) - 1.0, torch.zeros(BATCH))
    whole.close([LayerContribution(0, terms, False)], BATCH, [])
    whole.finish_updates()
    after, expected = (each._layers[0].read(torch.arange(CLASSES)) for each in (one, whole))
    torch.testing.assert_close(4 * (after - before), expected - before, rtol=1e-3, atol=1e-6)


def test_answers_hold_whole_updates_and_all_that_were_accepted_before() -> None:
    one, other = sharded_layers(keeps_versions=False), sharded_layers(keeps_versions=False)
    for each in (one, other):
        ask(each, 1, 0)
        ask(each, 1, 1, sender="worker-1")
    for sender, round_ in (("worker-0", 0), ("worker-1", 1)):
        applied(one, sender, 1, round_)
        assert one.busy and one.version < one.accepted
    for sender, round_ in (("worker-0", 0), ("worker-1", 1)):  # done before the question comes
        applied(other, sender, 1, round_)
    other.finish_updates()
    assert ask(one, 2, 2) == ask(other, 2, 2)
    assert one.version == one.accepted == 2


def test_rows_that_have_moved_since_make_no_probability_above_one() -> None:
    one = sharded_layers(keeps_versions=False)
    ask(one, 1, 0)
    applied(one, "worker-0", 1, 0)
    parts = one._questions.askers["worker-0"].kept[1]
    same = LayerContribution(0, Terms(parts.samples, *(torch.zeros(BATCH),) * 4), False, parts)
    assert result(one._layers[0].present(same)) is same  # nothing has moved yet
    one._layers[0]._values.mul_(40.0)
    one._layers[0].updates += 1
    x, _ = batch(0)
    log_total = torch.randn(BATCH) * 0.01 + 6.6
    stale = LayerContribution(0, Terms(parts.samples, log_total, *(torch.ones(BATCH),) * 3), False, parts)
    fresh = result(one._layers[0].present(stale))
    z = x @ one._layers[0].read(torch.arange(CLASSES)).T
    z[torch.arange(BATCH), parts.samples.own] = -torch.inf
    assert bool(((z - log_total[:, None]).exp().sum(1) > 1.0).any())
    assert bool(((z - fresh.terms.log_total[:, None]).exp().sum(1) <= 1.0 + 1e-5).all())


def test_questions_about_rounds_that_are_over_and_of_the_lost_are_forgotten() -> None:
    one = sharded_layers(keeps_versions=False)
    for number, round_ in ((1, 0), (2, 5)):
        ask(one, number, round_)
    one.forget_before(1)
    assert list(one._questions.askers["worker-0"].kept) == [2]
    x, y = batch(3)
    one.ask("worker-0", ShardedForward(3, 0, 3, BATCH, True), [*cut(x), *cut(y)])
    one.forget("worker-0")
    while one.busy:
        one.work()
    assert not one._questions.askers


@pytest.mark.parametrize(
    "change",
    [{"layer": 1}, {"layer": -1}, {"count": BATCH + 1}, {"count": 0}, {"top": CLASSES + 1}, {"top": 1}],
)
def test_questions_that_cannot_be_meant_are_refused(change: dict[str, Any]) -> None:
    x, y = batch(0)
    question = {"number": 1, "layer": 0, "version": 0, "count": BATCH, "keeps": True, **change}
    with pytest.raises(WireError):
        sharded_layers().ask("worker-0", ShardedForward(**question), [*cut(x), *cut(y)])


def test_labels_that_there_are_no_classes_for_are_refused() -> None:
    x, y = batch(0)
    for wrong in (-1, CLASSES):
        y[3] = wrong
        with pytest.raises(WireError, match="no class"):
            sharded_layers().ask("worker-0", ShardedForward(1, 0, 0, BATCH, True), [*cut(x), *cut(y)])


def test_pushes_about_questions_that_were_not_asked_are_refused() -> None:
    one = sharded_layers()
    ask(one, 1, 0)
    frames = [frame for _ in range(3) for frame in cut(torch.ones(BATCH))]
    for push, some in [
        (LayerPush(0, 0, 1, BATCH, [LayerUse(2, BATCH)]), frames),
        (LayerPush(0, 0, 1, BATCH, [LayerUse(1, BATCH - 1)]), frames),
        (LayerPush(1, 0, 1, BATCH, [LayerUse(1, BATCH)]), frames),
        (LayerPush(0, 0, 1, BATCH, [LayerUse(1, BATCH)]), frames[:2]),
        (LayerPush(0, 0, 1, BATCH, [LayerUse(1, BATCH)]), frames * 2),
    ]:
        with pytest.raises(WireError):
            one.receive("worker-0", push, some)
    with pytest.raises(WireError):
        one.receive("worker-1", LayerPush(0, 0, 1, BATCH, [LayerUse(1, BATCH)]), frames)


@pytest.mark.parametrize(("name", "machines"), [("momentum", (2, 2)), ("Adam", (2, 3)), ("SGD", (3, 1))])
def test_training_goes_on_from_saved_state_on_any_number_of_servers(name: str, machines: tuple[int, int], tmp_path: Path) -> None:
    layer, other = ShardedLinear(DIM, CLASSES, sample_rate=0.5), ShardedLinear(DIM, CLASSES, sample_rate=0.5)
    shards, link = sharded(layer, machines[0], update_of(name))
    for number in range(2):
        round_of(layer, shards, link, number)
    for number, server in enumerate(link.servers):
        server.finish_updates()
        assert server.version == 2
        tensor_file.write(tmp_path / str(number), server.state(), {})
    others, resumed = sharded(other, machines[1], update_of(name))
    files = tensor_file.TensorFiles(tmp_path / str(number) for number in range(machines[0]))
    for server in resumed.servers:
        server.restore(files, machines[0], 2)
    resumed.round = 2
    round_of(layer, shards, link, 5)
    round_of(other, others, resumed, 5)
    if machines[0] == machines[1]:
        assert torch.equal(link.rows(), resumed.rows())
    torch.testing.assert_close(link.rows(), resumed.rows(), rtol=1e-4, atol=1e-5)
