"""Whole runs over a bad network, by hypothesis: every policy keeps its promises, and none hangs.

Promises: every micro-batch counts once in every chunk (`backup`: or is dropped, b a round at most, the same on all servers and
in the ledger); weights computed from in a round hold every update before it and none later; `sync` gives the bits of a plain
loop; nobody leads by more than the policy admits; a worker that dies stops nobody; the ledger agrees with the plan.
"""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from simulation import HEAD, Case, Model, Network, Outcome, Pace, World, same, schedules, sequential, simulate

from roundtable.common.config.batch_plan import Task
from roundtable.common.config.settings import Settings
from roundtable.ps.shard.shard import Shard
from roundtable.ps.updates.sync_shard import SyncShard
from roundtable.worker.merge.greedy_soup import GreedySoup

pytestmark = pytest.mark.usefixtures("one_thread")  # the plain loops need the bits of the workers

few, some = schedules(2), schedules(5)


@st.composite
def networks(draw: st.DrawFn) -> Network:
    return Network(
        draw(st.sampled_from([0, 0.1, 0.3])), draw(st.sampled_from([0, 0.3])), draw(st.sampled_from([0.002, 0.05, 0.6]))
    )


@st.composite
def cases(
    draw: st.DrawFn,
    policy: str,
    codecs: dict[str, Any] | None = None,
    whole: bool = False,
    after: int = 0,
    merge: str | None = None,
    servers: tuple[int, int] = (1, 3),
    weighs: bool = False,
    **more: Any,
) -> Case:
    """A run of few rounds: K not always a power of two, a short last round, more workers than micro-batches, a late one.
    `whole`: all rounds and micro-batches are of one size. `after`: most rounds after which local steps begin. `servers`: the
    fewest and the most. `weighs`: the script gives weights to micro-batches."""
    workers = draw(st.integers(1, 4))
    micro_batch = draw(st.integers(1, 3))
    count = draw(st.integers(2, 6))
    global_batch = count * micro_batch - (0 if whole else draw(st.integers(0, micro_batch - 1)))
    per_epoch = draw(st.integers(1, 3))
    samples = per_epoch * global_batch - (0 if whole else draw(st.integers(0, global_batch - 1)))
    paces = [
        Pace(
            compute_s=draw(st.sampled_from([0.02, 0.1, 0.7])),
            pause_s=draw(st.sampled_from([0, 0.3])),
            starts_s=draw(st.sampled_from([0, 0, 0.5])),
        )
        for _ in range(workers)
    ]
    late = draw(st.booleans()) and policy not in ("local", "average")
    if late:
        paces.append(Pace(0.05, starts_s=draw(st.sampled_from([3.0, 6.0]))))
    return Case(
        Settings(
            workers=workers,
            servers=draw(st.integers(*servers)),
            policy=policy,  # type: ignore[arg-type]
            global_batch=global_batch,
            micro_batch=micro_batch,
            max_staleness=draw(st.integers(0, 2)),
            backup_micro_batches=draw(st.integers(1, count - 1)),
            local_steps=draw(st.integers(1, 3)),
            local_after=draw(st.integers(0, after)),
            average_weights_by=merge or draw(st.sampled_from(["samples", "uniform", "greedy"])),
            outer_lr=1.0,
            outer_momentum=0.0,
            **(codecs or {}),
        ),
        paces,
        segments=[(samples, draw(st.integers(1, 2))), (global_batch, draw(st.integers(1, 2)))][: draw(st.integers(1, 2))],
        network=draw(networks()),
        seed=draw(st.integers(0, 1 << 32)),
        memory=draw(st.sampled_from(["", "shared", "beside", "apart"])) if codecs is None else "",
        weight_buffers=draw(st.sampled_from([2, 4])),
        credit=draw(st.sampled_from([1, 3])),
        weights=draw(st.integers(0, 1 << 16)) if weighs else -1,
        **more,
    )


PLAIN = {"momentum": 0.0, "lr": 1.0}
#: More servers than the model has chunks, which then are three: one of parameters, and one of each kind of buffer.
SPARE: dict[str, Any] = {"servers": (4, 6), "chunk_bytes": 4000}


def check_ledger(outcome: Outcome) -> None:
    """The ledger agrees with the plan and with the rows of the log; every micro-batch is in one committed row, or dropped."""
    case, totals = outcome.case, outcome.ledger.totals
    planned = case.micro_batches()
    assert totals.micro_batches_committed + totals.dropped == len(planned)
    assert totals.samples + totals.samples_dropped == sum(segment.total_samples for segment in case.plans())
    assert [row.round for row in outcome.log.rounds] == list(range(totals.rounds))
    assert totals.rounds == outcome.ledger.planned == outcome.ledger.committed
    rows = outcome.log.contributions
    assert totals.duplicates_ignored == sum(row.outcome == "duplicate" for row in rows)
    if case.settings.policy in ("local", "average"):
        return
    counted = Counter((row.round, k) for row in rows if row.outcome == "committed" for k in range(row.lo, row.hi))
    dropped = Counter((row.round, k) for row in rows if row.outcome == "dropped" for k in range(row.lo, row.hi))
    assert set(counted.values()) <= {1} and set(dropped.values()) <= {1}
    assert not set(counted) & set(dropped)
    assert len(counted) == totals.micro_batches_committed
    assert len(dropped) == totals.dropped
    # on every server too: what is left there is nothing but the end
    assert {shard.version for shard in outcome.shards if shard.model.chunks} == {totals.rounds}


def check_same_everywhere(outcome: Outcome) -> None:
    """All workers end with the weights that the servers hold."""
    first, *others = outcome.models.values()
    assert all(same(first, other) for other in others)
    for shard in outcome.shards:
        for chunk in shard.model.chunks.values():
            held = weights_of(shard, chunk.id)
            for piece in chunk.pieces:
                spec = shard.model.layout.tensors[piece.tensor]
                tensor = first[spec.name].reshape(-1)
                tensor = tensor.view(torch.uint8) if spec.is_bytes else tensor
                assert torch.equal(
                    tensor[piece.start : piece.start + piece.length], held[piece.offset : piece.offset + piece.length]
                )


def weights_of(shard: Shard, chunk: int) -> torch.Tensor:
    """A chunk's newest weights as workers get them."""
    if isinstance(shard, SyncShard):
        return shard.versions.of(shard.version, chunk)
    return shard.model.dense.publish(chunk)


def check_close_to_masters(outcome: Outcome, at_most: float) -> None:
    """The weights that workers have are those that the servers keep, but for rounding."""
    for shard in outcome.shards:
        for chunk in shard.model.chunks:
            torch.testing.assert_close(weights_of(shard, chunk), shard.model.dense.master(chunk), rtol=at_most, atol=at_most)


def check_counted_once(outcome: Outcome) -> None:
    """Every micro-batch counts once, in a parameter and in counters."""
    tasks = outcome.case.micro_batches()
    assert outcome.counted() == pytest.approx([1.0] * len(tasks), abs=1e-3)
    model = next(iter(outcome.models.values()))
    assert model["seen"].tolist() == [1] * len(tasks)
    assert model["most"].tolist() == [sum(task.k for task in tasks if task.k % 2 == side) for side in (0, 1)]


def check_exact(outcome: Outcome) -> None:
    """The weights of every round, and at the end, are the plain loop's."""
    expected = sequential(outcome.case)
    assert all(same(expected[t], found) for (_, t), found in outcome.world.weights.items())
    assert all(same(expected[-1], model) for model in outcome.models.values())


def check_rows(outcome: Outcome) -> None:
    """Rows count once, as chunks do; in sync they are the plain loop's."""
    case = outcome.case
    if case.settings.policy == "sync":
        assert torch.equal(outcome.table(), sequential(case)[-1]["table.weight"])
    else:
        account = outcome.table()[case.rows :, 0]
        assert outcome.counted(account) == pytest.approx(outcome.counted(), abs=1e-3)


def check_dropped_or_counted(outcome: Outcome) -> None:
    """A micro-batch counts once if the ledger says so, else not at all, and no round drops too many."""
    case = outcome.case
    committed = outcome.committed()
    for task, times in zip(case.micro_batches(), outcome.counted(), strict=True):
        assert times == pytest.approx(1.0 if task.k in committed[task.round] else 0.0, abs=1e-3)
    for row in outcome.log.rounds:
        plan = case.round(row.round)
        assert row.micro_batches + row.dropped == plan.micro_batches
        assert row.dropped <= min(case.settings.backup_micro_batches, plan.micro_batches - 1)


def check_kept(outcome: Outcome) -> None:
    """Check the promises of the policy for every micro-batch, and for rows if there is a table."""
    policy = outcome.case.settings.policy
    if outcome.case.rows:
        check_rows(outcome)
    if policy == "sync":
        check_exact(outcome)
    elif policy != "backup":
        check_counted_once(outcome)
    elif outcome.case.lr == 1.0 and not outcome.case.momentum:
        check_dropped_or_counted(outcome)


def check_promises(case: Case) -> None:
    """Run it; all that its policy promises."""
    outcome = simulate(case)
    check_ledger(outcome)
    check_same_everywhere(outcome)
    check_kept(outcome)


# ---- sync


@some
@given(cases("sync"))
# I1, I2, I5, I8, I14
def test_sync_gives_the_bits_of_a_plain_loop(case: Case) -> None:
    outcome = simulate(case)
    check_exact(outcome)
    check_ledger(outcome)
    check_same_everywhere(outcome)


@pytest.mark.slow
# I11
def test_a_worker_whose_weights_are_gone_before_they_are_all_there_gives_its_micro_batch_up() -> None:
    paces = [Pace(0.05), Pace(0.05), Pace(0.05, deaf_s=(1.0, 9.0))]
    settings = Settings(workers=3, servers=2, global_batch=8, micro_batch=2)
    case = Case(settings, paces, segments=[(560, 1)], seed=3, weight_buffers=2, credit=100)
    outcome = simulate(case)
    assert outcome.world.given_up > 0
    assert len(outcome.models) == 3
    check_exact(outcome)
    check_ledger(outcome)
    check_same_everywhere(outcome)


@few
@given(cases("sync", chunk_bytes=400, clip_norm=0.5))
def test_sync_clips_by_the_norm_over_all_servers(case: Case) -> None:
    outcome = simulate(case)
    check_exact(outcome)
    check_ledger(outcome)


def test_a_sum_that_overflows_is_no_gradient_that_is_not_finite_whoever_adds_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    compute = Model.compute

    def large(self: Model, task: Task) -> None:
        compute(self, task)
        if task.round in (1, 2):
            self.a.grad = torch.full((3,), 1.5e38 if task.round == 2 or task.k else float("nan"))

    monkeypatch.setattr(Model, "compute", large)
    ends = []
    for workers in (1, 4):
        settings = Settings(workers=workers, servers=2, global_batch=4, micro_batch=1, on_nonfinite="skip")
        outcome = simulate(Case(settings, [Pace(0.1)] * workers, ((8, 2),), seed=1, **PLAIN))  # type: ignore[arg-type]
        dropped = [row.round for row in outcome.log.rounds if row.dropped]
        ends.append((dropped, next(iter(outcome.models.values()))["a"].tolist()))
    assert ends[0] == ends[1] == ([1, 3], [float("-inf")] * 3)  # from round 3 on nothing is finite


# ---- backup


@some
@given(cases("backup", **PLAIN))
# I1, I7
def test_backup_counts_a_micro_batch_once_or_drops_it_everywhere(case: Case) -> None:
    outcome = simulate(case)
    check_ledger(outcome)
    check_same_everywhere(outcome)
    check_dropped_or_counted(outcome)


# ---- ssp and async


@some
@given(cases("ssp", **PLAIN))
# I1, I3
def test_ssp_counts_every_micro_batch_once_and_nobody_leads_too_far(case: Case) -> None:
    outcome = simulate(case)  # how far each leads is checked in `begins`
    check_ledger(outcome)
    check_counted_once(outcome)
    check_same_everywhere(outcome)
    assert all(
        row.staleness is not None and row.staleness >= 0 for row in outcome.log.contributions if row.outcome == "committed"
    )


@few
@given(cases("async", **PLAIN))
# I1
def test_async_counts_every_micro_batch_once(case: Case) -> None:
    outcome = simulate(case)
    check_ledger(outcome)
    check_counted_once(outcome)
    check_same_everywhere(outcome)


# ---- rows of tables


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["sync", "backup", "ssp", "async"])
@schedules(3)
@given(data=st.data())
def test_rows_of_tables_keep_all_those_promises(policy: str, data: st.DataObject) -> None:
    plain: dict[str, Any] = {} if policy == "sync" else PLAIN
    case = data.draw(cases(policy, rows=data.draw(st.sampled_from([10, 200])), **plain))
    check_promises(case)


def without_pushes(monkeypatch: pytest.MonkeyPatch, kind: bytes, **more: Any) -> Outcome:
    """A run in which server-1 gets no such messages of worker-1, which then dies."""
    post = World.post

    def lossy(self: World, sender: str, to: str, data: list[bytes]) -> None:
        if not (sender == "worker-1" and to == "server-1" and kind in data[0]):
            post(self, sender, to, data)

    monkeypatch.setattr(World, "post", lossy)
    paces = [Pace(0.1), Pace(0.1, dies_s=3.0)]
    return simulate(Case(Settings(workers=2, servers=2, global_batch=8, micro_batch=2), paces, segments=[(32, 1)], **more))


@pytest.mark.slow
def test_what_only_some_servers_have_got_is_computed_again_from_rows_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = without_pushes(monkeypatch, b"RowPush", rows=200)
    check_exact(outcome)
    check_rows(outcome)


# ---- sharded layers


def check_head(outcome: Outcome) -> None:
    """It has the bits of a run in which servers answer at once and nothing is lost."""
    assert torch.equal(outcome.head(), sequential(outcome.case, outcome.committed())[-1][HEAD])


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "clip_norm"), [("sync", None), ("backup", None), ("sync", 0.5), ("backup", 0.5)])
@few
@given(data=st.data())
def test_sharded_layers_keep_all_those_promises(policy: str, clip_norm: float | None, data: st.DataObject) -> None:
    case = cases(policy, classes=data.draw(st.sampled_from([10, 1000])), clip_norm=clip_norm, chunk_bytes=400)
    outcome = simulate(data.draw(case))
    check_ledger(outcome)
    check_same_everywhere(outcome)
    check_head(outcome)
    if policy == "sync":
        check_exact(outcome)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["ssp", "async"])
@few
@given(data=st.data())
def test_sharded_layers_count_every_micro_batch_once_where_each_is_applied_at_once(policy: str, data: st.DataObject) -> None:
    outcome = simulate(data.draw(cases(policy, classes=data.draw(st.sampled_from([10, 1000])), chunk_bytes=400, **PLAIN)))
    check_ledger(outcome)
    check_same_everywhere(outcome)
    check_counted_once(outcome)
    for tally in outcome.tallies():
        assert outcome.counted(tally) == pytest.approx([1.0] * len(tally), abs=0.02)


@pytest.mark.slow
def test_what_only_some_servers_have_got_is_computed_again_from_classes_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outcome = without_pushes(monkeypatch, b"ClassPush", classes=1000)
    check_exact(outcome)
    check_head(outcome)


# ---- local and average


def every_other_is_chosen() -> Any:
    """Have replicas agree at once on which of them make the merged model better."""
    return mock.patch.object(GreedySoup, "weight", lambda soup, values: 1 - soup._context.index % 2)


@pytest.mark.slow
@few
@given(st.sampled_from(["local", "average"]).flatmap(lambda policy: cases(policy, after=3)))
def test_merges_do_not_depend_on_the_network(case: Case) -> None:
    with every_other_is_chosen():
        outcome = simulate(case)
        check_ledger(outcome)
        check_same_everywhere(outcome)
        quiet = simulate(Case(**{**vars(case), "network": Network()}))
    first, second = next(iter(outcome.models.values())), next(iter(quiet.models.values()))
    assert same(first, second)


def check_local_counts(outcome: Outcome) -> None:
    """A step of a replica moves the element of a micro-batch of weight w by w / its own weight of the round; a merge weighs the
    replica by its weight since the last one, all since the start of the data under `average`."""
    case = outcome.case
    table = outcome.world.coordinator.context.membership.tables[0]
    expected = []
    for segment in case.plans():
        apart = case.settings.local_steps if case.settings.policy == "local" else segment.rounds
        for index in range(segment.first_round, segment.end):
            plan = segment.round(index)
            first = segment.first_round + (index - segment.first_round) // apart * apart
            merged = [segment.round(r) for r in range(first, min(first + apart, segment.end))]
            total = sum(case.weight_of(one.index, range(one.micro_batches)) for one in merged)
            for k in range(plan.micro_batches):
                owner = table.owner(k, plan.micro_batches)
                own = {
                    one.index: case.weight_of(one.index, run) for one in merged if (run := table.run(owner, one.micro_batches))
                }
                weight = case.weight(Task(index, k))
                expected.append(-weight / own[index] * sum(own.values()) / total if weight else 0.0)
    assert next(iter(outcome.models.values()))["account"].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
@few
@given(st.sampled_from(["local", "average"]).flatmap(lambda policy: cases(policy, merge="samples", **PLAIN)))
def test_local_steps_count_every_micro_batch_by_its_samples(case: Case) -> None:
    check_local_counts(simulate(case))


# ---- weights of micro-batches


def check_weights(outcome: Outcome) -> None:
    """The ledger has the weight of what counts in each round, and means of that weight; samples are counted as ever."""
    committed = outcome.committed()
    for row in outcome.log.rounds:
        ks = committed[row.round]
        assert row.samples == sum(outcome.case.round(row.round).samples_in(k, k + 1) for k in ks)
        weight = outcome.case.weight_of(row.round, ks)
        assert row.total_weight == pytest.approx(weight)
        expected = sum(k * outcome.case.weight(Task(row.round, k)) for k in ks) / weight if weight else None
        assert row.metrics.get("loss") == (None if expected is None else pytest.approx(expected))


@pytest.mark.slow
@some
@given(
    st.tuples(
        st.sampled_from(["sync", "backup"]), st.sampled_from([{}, {"clip_norm": 0.5}, {"rows": 9}, {"classes": 70}, SPARE])
    ).flatmap(lambda drawn: cases(drawn[0], weighs=True, **drawn[1]))
)
def test_a_round_is_the_mean_by_the_weights_that_a_script_gives(case: Case) -> None:
    outcome = simulate(case)
    check_ledger(outcome)
    check_same_everywhere(outcome)
    check_weights(outcome)
    expected = sequential(case, outcome.committed())
    assert all(same(expected[-1], model) for model in outcome.models.values())
    if case.rows:
        assert torch.equal(outcome.table(), expected[-1]["table.weight"])
    if case.classes:
        assert torch.equal(outcome.head(), expected[-1][HEAD])


@given(cases("sync", weighs=True))
@schedules(3)
def test_sync_gives_the_bits_of_a_plain_loop_that_weighs(case: Case) -> None:
    outcome = simulate(case)
    check_exact(outcome)
    check_ledger(outcome)
    check_weights(outcome)


@pytest.mark.slow
@few
@given(st.sampled_from(["ssp", "async"]).flatmap(lambda policy: cases(policy, weighs=True, **PLAIN)))
def test_a_push_that_is_applied_at_once_moves_by_its_weight(case: Case) -> None:
    outcome = simulate(case)
    check_ledger(outcome)
    check_same_everywhere(outcome)
    check_weights(outcome)
    model, tasks = next(iter(outcome.models.values())), case.micro_batches()
    assert model["seen"].tolist() == [1] * len(tasks)
    assert [float(moved) < 0.0 for moved in model["account"]] == [case.weight(task) > 0.0 for task in tasks]


@pytest.mark.slow
@few
@given(st.sampled_from(["local", "average"]).flatmap(lambda policy: cases(policy, merge="samples", weighs=True, **PLAIN)))
def test_local_steps_and_merges_are_means_by_weight(case: Case) -> None:
    outcome = simulate(case)
    check_local_counts(outcome)
    assert outcome.ledger.totals.samples == sum(segment.total_samples for segment in case.plans())


# ---- codecs

WEIGHTS = ["none", "bf16", "fp16", "int8", "onebit"]


def coded(policy: str, push: str, weights: str = "none", **more: Any) -> st.SearchStrategy[Case]:
    ratio = {"topk_ratio": more.pop("ratio", 0.3)}
    return cases(policy, {"compress_gradients": push, "compress_weights": weights, **ratio}, **more)


@pytest.mark.slow
@few
@given(st.booleans().flatmap(lambda weighs: coded("sync", "topk", ratio=1.0, weighs=weighs)))
def test_codecs_that_send_all_there_is_change_no_bit(case: Case) -> None:
    outcome = simulate(case)
    check_exact(outcome)
    check_ledger(outcome)


@pytest.mark.slow
@some
@given(st.sampled_from(["ssp", "async", "sync"]).flatmap(lambda policy: coded(policy, "topk", whole=True, **PLAIN)))
def test_what_error_feedback_holds_back_is_sent_once_whatever_the_network_does(case: Case) -> None:
    """All values are whole numbers here, and these codecs send them as they are: what was counted and what workers still hold
    back is what was computed."""
    outcome = simulate(case)
    check_ledger(outcome)
    check_same_everywhere(outcome)
    if case.settings.policy == "sync" and any(event.kind == "reassigned" for event in outcome.log.events):
        return  # a sum that takes the place of its parts loses what these had sent beside their own gradients
    check_computed_is_counted_or_held(outcome)


def check_computed_is_counted_or_held(outcome: Outcome) -> None:
    """Of each micro-batch, with lr=1 and rounds of one size."""
    case, model = outcome.case, next(iter(outcome.models.values()))
    total = -model["account"].view(-1) * case.settings.global_batch + outcome.unsent.get("account", torch.zeros(1))
    assert total.tolist() == pytest.approx([case.settings.micro_batch] * len(total), abs=1e-3)


@pytest.mark.slow
@some
@given(
    st.tuples(
        st.sampled_from(["sync", "backup"]), st.sampled_from(["none", "bf16", "int8", "onebit"]), st.sampled_from(WEIGHTS)
    ).flatmap(lambda drawn: coded(*drawn))
)
def test_all_replicas_hold_the_weights_that_the_servers_hand_out(case: Case) -> None:
    outcome = simulate(case)
    check_ledger(outcome)
    check_same_everywhere(outcome)
    rounding = {"none": 0.0, "bf16": 1 / 256, "fp16": 1 / 2048, "int8": 0.1, "onebit": 10.0}
    check_close_to_masters(outcome, rounding[case.settings.compress_weights])


@pytest.mark.slow
@few
@given(
    st.tuples(
        st.sampled_from(["ssp", "async"]), st.sampled_from(["none", "int8", "onebit"]), st.sampled_from(["bf16", "fp16"])
    ).flatmap(lambda drawn: coded(*drawn))
)
def test_rounded_weights_are_the_same_on_all_workers_in_the_end(case: Case) -> None:
    outcome = simulate(case)
    check_ledger(outcome)
    check_same_everywhere(outcome)
    check_close_to_masters(outcome, 1 / 256)


# ---- workers that are slow, late, hang or die


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["sync", "backup", "ssp", "async"])
@schedules(2)
@given(data=st.data())
def test_a_worker_that_dies_or_hangs_stops_nobody(policy: str, data: st.DataObject) -> None:
    when = data.draw(st.sampled_from([1.5, 2.5, 4.0]))
    bad = data.draw(st.sampled_from([Pace(0.2, dies_s=when), Pace(0.2, hangs_s=when)]))
    paces = [Pace(0.1), bad, Pace(0.3)]
    case = Case(
        Settings(workers=3, servers=2, policy=policy, global_batch=10, micro_batch=2),  # type: ignore[arg-type]
        paces,
        segments=[(28, 2), (20, 1)],
        network=data.draw(networks()),
        seed=data.draw(st.integers(0, 1 << 32)),
        rows=data.draw(st.sampled_from([0, 100])),
        **({} if policy == "sync" else PLAIN),  # type: ignore[arg-type]
    )
    check_promises(case)


def test_a_slow_workers_micro_batches_are_taken_over_by_those_that_wait() -> None:
    case = Case(Settings(workers=2, servers=2, global_batch=16, micro_batch=2), [Pace(0.1), Pace(2.0)], segments=[(64, 1)])
    outcome = simulate(case)
    check_exact(outcome)
    done = Counter(worker for worker, _ in outcome.world.computed)
    assert done["worker-0"] > 0.75 * len(case.micro_batches())
    ends_s = 1.0  # until training begins, and until the model is written
    assert outcome.world.now - 100.0 < 4 * 8 / 2 * 2.0 / 2 + ends_s  # half of what the slow one's equal shares would take


def test_speeds_move_the_shares_and_the_bits_stay() -> None:
    case = Case(Settings(workers=2, servers=1, global_batch=16, micro_batch=2), [Pace(0.05), Pace(0.2)], segments=[(256, 1)])
    outcome = simulate(case)
    tables = outcome.world.processes["coordinator"].coordinator.context.membership.tables  # type: ignore[attr-defined]
    assert len(tables) > 1 and tables[-1].weights[0] > 2 * tables[-1].weights[1]
    check_exact(outcome)
