"""Whole runs whose servers are killed, where each shard has a copy on another server: no round is lost, and bits are the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from simulation import HEAD, Case, Network, Outcome, Pace, ServerProcess, same, sequential, simulate
from test_rounds_simulated import (
    PLAIN,
    SPARE,
    cases,
    check_exact,
    check_head,
    check_ledger,
    check_rows,
    check_same_everywhere,
    few,
    some,
)

from roundtable.common.config.settings import Settings
from roundtable.common.protocol.effects import COORDINATOR
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.commit import AllNorms, CloseRound
from roundtable.common.protocol.messages.replication import StateHeader
from roundtable.common.protocol.messages.setup import Setup, Update
from roundtable.common.protocol.model_spec import TensorSpec
from roundtable.ps.coordinator.coordinator import Coordinator
from roundtable.ps.server.restoring import make_host
from roundtable.ps.updates.sync_shard import SyncShard

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@st.composite
def killed(draw: st.DrawFn, policy: str, codecs: dict[str, Any] | None = None, **more: Any) -> Case:
    """A run with two servers or more of which some are killed, one after the other."""
    fewest, most = more.pop("servers", (2, 4))
    case = draw(cases(policy, codecs, **more))
    servers = draw(st.integers(fewest, most))
    kills = [
        (draw(st.integers(0, servers - 1)), draw(st.floats(0.2, 6.0)), draw(st.sampled_from([0.1, 2.0, 20.0])))
        for _ in range(draw(st.integers(1, 3)))
    ]
    return replace(case, settings=msgspec.structs.replace(case.settings, servers=servers, replicas=1), replaced=kills)


def check(outcome: Outcome) -> None:
    check_ledger(outcome)
    check_same_everywhere(outcome)
    check_copies(outcome)
    assert not [event for event in outcome.log.events if event.kind in ("restarted", "rolled back")]


def check_copies(outcome: Outcome) -> None:
    """Every copy that is whole holds the bits of its shard."""
    for shard, host in zip(outcome.shards, [*outcome.hosts[1:], *outcome.hosts[:1]], strict=True):
        assert host._replication is not None
        copy = host._replication._backup
        if copy is None or not copy.whole:
            continue  # it was on its way to a backup in the place of another when the run ended
        assert not copy.busy and copy.version == shard.version
        for chunk in shard.model.chunks:
            assert torch.equal(copy._store.master(chunk), shard.model.dense.master(chunk))
        for mine, its in zip(copy._tables._tables, shard.model.tables._tables, strict=True):
            assert torch.equal(mine._values, its._values)
            assert all(torch.equal(mine._state[key], state) for key, state in its._state.items())
        shard.model.layers.finish_updates()
        copy._layers.finish_updates()
        for one, other in zip(copy._layers._layers, shard.model.layers._layers, strict=True):
            assert torch.equal(one.read(torch.arange(len(one._values))), other.read(torch.arange(len(one._values))))
            assert all(torch.equal(one._state[key], state) for key, state in other._state.items())


# I23
def test_a_server_that_is_killed_in_any_round_loses_none() -> None:
    paces = [Pace(0.1), Pace(0.1)]
    killed_servers = 0
    for seed, at in enumerate([2.3, 2.5, 2.7, 2.9]):
        made = Settings(workers=2, servers=3, replicas=1, global_batch=4, micro_batch=1)
        outcome = simulate(Case(made, paces, ((8, 3),), seed=seed, replaced=[(seed % 3, at, 2.0)]))
        check(outcome)
        check_exact(outcome)
        killed_servers += outcome.world.killed
    assert killed_servers == 4


def test_one_that_is_killed_once_all_workers_have_left_and_before_it_has_told_of_the_last_round_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drain, killed = Coordinator.drain, []

    def watched(self: Coordinator) -> None:
        drain(self)
        world = self._sock._process.world  # type: ignore[attr-defined]
        workers = self.context.membership.workers.values()
        if (
            not killed
            and workers
            and all(w.left for w in workers)
            and self.context.ledger.committed < self.context.ledger.planned
        ):
            server = next(p for p in world.processes.values() if isinstance(p, ServerProcess) and p.number == 1)
            server.kill(6.0)
            killed.append(server.key)

    monkeypatch.setattr(Coordinator, "drain", watched)
    made = Settings(workers=2, servers=3, replicas=1, global_batch=4, micro_batch=1)
    outcome = simulate(Case(made, [Pace(0.1), Pace(0.1)], ((8, 3),), seed=3))
    assert killed == ["server-1"]
    check(outcome)
    check_exact(outcome)


@pytest.mark.parametrize("decision", [AllNorms(0, [(0, 0, 1.0)]), CloseRound(0, [0])])
def test_what_was_decided_for_the_server_before_is_no_business_of_one_that_waits_for_its_shard(decision: Body) -> None:
    settings = Settings(servers=2, replicas=1)
    host = make_host(1, settings, returns=True)
    assert host.handle(COORDINATOR, decision, (), 0.0) == []
    host._make_again(StateHeader(1, 0, 1, Setup([TensorSpec("w", [4], "float32", 0)], Update("SGD", [{"lr": 0.1}])), []))
    assert isinstance(host.shard, SyncShard)
    assert host.handle(COORDINATOR, decision, (), 0.0) == []
    assert host.shard.round.norms is None and host.shard.round.decided is None


@some
@given(killed("sync"))
# I22, I23
def test_sync_keeps_its_bits(case: Case) -> None:
    outcome = simulate(case)
    check(outcome)
    check_exact(outcome)


@few
@given(killed("sync", **SPARE))
def test_servers_without_a_part_of_the_model(case: Case) -> None:
    outcome = simulate(case)
    check(outcome)
    check_exact(outcome)


@few
@given(killed("sync", clip_norm=0.7))
def test_with_clipping(case: Case) -> None:
    check(simulate(case))


@few
@given(st.sampled_from([{"rows": 9}, {"classes": 70}]).flatmap(lambda kind: killed("sync", weighs=True, **kind)))
def test_copies_divide_by_the_same_weights(case: Case) -> None:
    outcome, expected = simulate(case), sequential(case)[-1]
    check(outcome)
    check_exact(outcome)
    assert torch.equal(outcome.table(), expected["table.weight"]) if case.rows else torch.equal(outcome.head(), expected[HEAD])


@few
@given(killed("backup"))
def test_backup_leaves_out_the_same_everywhere(case: Case) -> None:
    outcome = simulate(case)
    check(outcome)
    counted = outcome.committed()
    assert all(same(model, sequential(case, counted)[-1]) for model in outcome.models.values())


@few
@given(killed("sync", {"compress_weights": "int8"}))
def test_weights_whose_changes_are_sent(case: Case) -> None:
    check(simulate(case))


@few
@given(killed("sync", {"compress_gradients": "onebit"}))
def test_what_a_codec_has_left_out_is_not_needed_for_the_ledger(case: Case) -> None:
    check_ledger(simulate(case))


@pytest.mark.parametrize("policy", ["sync", "backup"])
@few
@given(data=st.data())
def test_rows_of_tables(policy: str, data: st.DataObject) -> None:
    plain: dict[str, Any] = {} if policy == "sync" else PLAIN
    outcome = simulate(data.draw(killed(policy, rows=data.draw(st.sampled_from([10, 200])), **plain)))
    check(outcome)
    check_rows(outcome)
    if policy == "sync":
        check_exact(outcome)


@pytest.mark.parametrize("policy", ["sync", "backup"])
@few
@given(data=st.data())
def test_sharded_layers(policy: str, data: st.DataObject) -> None:
    outcome = simulate(data.draw(killed(policy, classes=data.draw(st.sampled_from([10, 1000])))))
    check_head(outcome)
    check(outcome)
    if policy == "sync":
        check_exact(outcome)


@pytest.mark.parametrize("seed", [15, 1602])
def test_what_comes_late_of_a_round_is_not_told_twice_as_dropped_though_its_server_is_another_one(seed: int) -> None:
    made = Settings(workers=4, servers=3, policy="backup", backup_micro_batches=1, global_batch=2, micro_batch=1, replicas=1)
    paces = [Pace(0.1, pause_s=0.3, starts_s=0.5), Pace(0.7, pause_s=0.3), Pace(0.02), Pace(0.1)]
    replaced = [(2, 1.7775121080300937, 0.1), (0, 6.0, 0.1)]
    network = Network(loss=0.3, delay_s=0.6)
    check(simulate(Case(made, paces, [(2, 1)], network, seed, credit=3, classes=10, memory="shared", replaced=replaced)))


@few
@given(killed("sync"), st.floats(0.5, 12.0), st.sampled_from([0.2, 2.0, 6.0]))
def test_the_coordinator_is_killed_too(case: Case, at: float, away: float) -> None:
    outcome = simulate(replace(case, killed=[("coordinator", at, away)]))
    check(outcome)
    check_exact(outcome)


def test_a_worker_that_joins_late_while_a_server_is_replaced_can_add_changes_to_what_it_has() -> None:
    paces = [Pace(0.7, 0.3), Pace(0.1), Pace(0.7), Pace(0.02, 0.3), Pace(0.05, starts_s=6.0)]
    made = Settings(workers=4, servers=4, replicas=1, global_batch=4, micro_batch=2, compress_weights="int8")
    case = Case(made, paces, ((10, 1),), Network(0.3, 0.3, 0.002), replaced=[(0, 1.95, 0.1)])
    outcome = simulate(case)
    check(outcome)
    assert outcome.world.killed == 1 and len(outcome.models) == len(paces)
