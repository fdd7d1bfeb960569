"""The event log on the disk: a ledger that is read back is the one that was kept, as of now or of an earlier round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roundtable.common.config.batch_plan import Segment, make_segment
from roundtable.common.config.settings import Settings
from roundtable.common.policies import load
from roundtable.common.protocol.messages.commit import Committed, Contribution, Mean, Report
from roundtable.common.protocol.messages.session import Hello
from roundtable.common.protocol.messages.setup import Setup, Update
from roundtable.common.protocol.model_spec import TensorSpec
from roundtable.common.runtime.errors import UsageError
from roundtable.common.storage.event_log import FILE_NAME, RunLog, RunLogReader
from roundtable.ps.coordinator.group_commit import GroupCommit
from roundtable.ps.coordinator.recovery import RestoredRun, RunHeader, restore
from roundtable.ps.coordinator.state.ledger import Ledger
from roundtable.ps.coordinator.state.membership import Membership
from roundtable.ps.coordinator.summary_metrics import Measured

SETTINGS = Settings(workers=2, servers=2, policy="backup", global_batch=8, micro_batch=2)
HEAD = RunHeader("run", 7, "here", SETTINGS)


class Kept:
    """A ledger and a membership, and what is put down of them in a file."""

    def __init__(self, folder: Path) -> None:
        policy = load(SETTINGS)
        self.membership = Membership(SETTINGS, policy, "run", 0.0)
        self.ledger = Ledger(SETTINGS, policy)
        self.journal = GroupCommit(folder, HEAD, self.membership, self.ledger, 0.0)
        self.log = self.journal.log
        tensors = [TensorSpec("a", [3000, 1000], "float32", 0), TensorSpec("b", [7], "float32", 0)]
        self.ledger.set_up(Setup(tensors, Update("SGD", [{"lr": 0.1}])))
        before: Segment | None = None
        for samples in (24, 14):
            before = make_segment(before=before, samples=samples, global_batch=8, micro_batch=2, epochs=2, round_limit=None)
            self.ledger.plan(before)
        for number in range(2):
            self.membership.hello(Hello("server", number, f"tcp://s:{number}"), 10 + number, 0.0)
            self.membership.hello(Hello("worker", number), 20 + number, 0.0)

    def flush(self) -> None:
        self.journal.enter_rows()
        self.journal.enter_state()
        self.journal.flush(0.0)


OUTCOMES = ("", "dropped", "dropped in part")
ROUNDS = st.lists(
    st.tuples(st.integers(0, 1), st.floats(0, 3), st.tuples(*[st.sampled_from(OUTCOMES)] * 2)), min_size=1, max_size=10
)


def left_out(round_: int, outcome: str) -> list[Contribution]:
    """A contribution to a round's first micro-batch that a server has left out."""
    return [Contribution(round_, 0, 1, "worker-1", 2, 1, outcome)] if outcome else []  # type: ignore[arg-type]


def report(kept: Kept, round_: int, dropped: int, loss: float, outcome: str = "") -> None:
    """Round `round_` is applied on server 0, without its last micro-batch or with it."""
    segment = kept.ledger.segment_of(round_)
    assert segment is not None
    plan = segment.round(round_)
    ks = plan.micro_batches - dropped
    rows = [Contribution(round_, k, k + 1, f"worker-{k % 2}", plan.samples_in(k, k + 1), 1, "committed") for k in range(ks)]
    rows.append(Contribution(round_, 0, 1, "worker-1", 2, 1, "duplicate"))
    row = Committed(round_, plan.samples_in(0, ks), ks, dropped, {"loss": loss})
    kept.ledger.report(0, Report(round_, round_ + 1, [row], rows, dropped=left_out(round_, outcome)))


def assert_same(restored: RestoredRun, ledger: Ledger) -> None:
    found = restored.ledger
    assert found.totals == ledger.totals
    assert (found.committed, found.planned, found.done) == (ledger.committed, ledger.planned, ledger.done)
    assert found.recent("loss") == ledger.recent("loss")
    assert (found.reported, found.pending, found.setup) == (ledger.reported, ledger.pending, ledger.setup)
    assert found.dropped == ledger.dropped
    assert found.layout == ledger.layout and found.segments == ledger.segments
    for epoch in range(sum(segment.epochs for segment in ledger.segments)):
        assert found.mean(Mean(epoch, "loss")) == ledger.mean(Mean(epoch, "loss"))


@settings(max_examples=12, deadline=None)
@given(ROUNDS, st.integers(0, 3), st.sets(st.integers(0, 9)))
def test_what_is_read_back_is_what_was_kept(
    tmp_path_factory: pytest.TempPathFactory, rounds: list[Any], behind: int, flushed: set[int]
) -> None:
    folder = tmp_path_factory.mktemp("run")
    kept = Kept(folder)
    for number, (dropped, loss, outcomes) in enumerate(rounds):
        report(kept, number, dropped, loss, outcomes[0])
        if (round_ := number - behind) >= 0:
            kept.ledger.report(1, Report(number, round_ + 1, dropped=left_out(round_, rounds[round_][2][1])))
        if number in flushed:
            kept.flush()
    kept.flush()
    restored = restore(folder / FILE_NAME)
    assert restored is not None and restored.head == HEAD and restored.stop is None
    assert_same(restored, kept.ledger)
    assert restored.tables == kept.membership.tables
    assert {name: (m.hello, m.incarnation) for name, m in kept.membership.members.items()} == {
        name: (m.hello, m.incarnation) for name, m in restored.members.items()
    }


@settings(max_examples=12, deadline=None)
@given(ROUNDS, st.data())
def test_put_back_to_a_round_they_are_the_ledger_of_a_run_that_got_so_far(
    tmp_path_factory: pytest.TempPathFactory, rounds: list[Any], data: st.DataObject
) -> None:
    upto = data.draw(st.integers(0, len(rounds)))
    folders = [tmp_path_factory.mktemp("run") for _ in range(2)]
    whole, part = map(Kept, folders)
    for number, (dropped, loss, outcomes) in enumerate(rounds):
        for kept in (whole, part)[: 1 + (number < upto)]:
            report(kept, number, dropped, loss, outcomes[0])
            kept.ledger.report(1, Report(number, number + 1, dropped=left_out(number, outcomes[1])))
            kept.log.metric(number, "worker-0", "accuracy", number / 10, 20, number)
            kept.log.metric(number, "worker-0", "held_out", 50 + number, 20, number)
    for kept in (whole, part):
        kept.flush()
    redone = whole.ledger.totals.micro_batches_committed - part.ledger.totals.micro_batches_committed + len(rounds) - upto
    part.ledger.totals.micro_batches_recomputed += redone
    part.ledger.reported.clear()
    restored = restore(folders[0] / FILE_NAME, upto)
    assert restored is not None
    assert_same(restored, part.ledger)
    assert restored.metrics == {(20, number) for number in range(upto)}
    assert restored.accuracy == (Measured((upto - 1) / 10, upto - 1, 49 + upto) if upto else None)
    reader = RunLogReader(folders[0] / FILE_NAME)
    assert [row.round for row in reader.rounds()] == list(range(upto))
    assert reader.contributions() == RunLogReader(folders[1] / FILE_NAME).contributions()
    again = restore(folders[0] / FILE_NAME, upto)  # all restart once more, before anybody has told a plan
    assert again is not None and again.ledger.totals == restored.ledger.totals
    epochs = range(sum(segment.epochs for segment in part.ledger.segments))
    part.ledger.segments = []
    assert [again.ledger.mean(Mean(e, "loss")).value for e in epochs] == [part.ledger.mean(Mean(e, "loss")).value for e in epochs]
    with pytest.raises(UsageError, match=f"has {upto} rounds of the {upto + 1}"):
        restore(folders[0] / FILE_NAME, upto + 1)


@pytest.mark.parametrize("outcomes", [(a, b) for a in OUTCOMES for b in OUTCOMES])
def test_what_not_all_servers_have_dropped_whole_is_dropped_in_part(tmp_path: Path, outcomes: tuple[str, str]) -> None:
    kept = Kept(tmp_path)
    report(kept, 0, 0, 1.0, outcomes[0])
    for _ in range(2):  # it may come twice
        kept.ledger.report(1, Report(5, 1, dropped=left_out(0, outcomes[1])))
    agree = outcomes in (("", ""), ("dropped", "dropped"))
    assert kept.ledger.totals.dropped_in_part == (0 if agree else 1)
    rows = [(row.round, row.lo) for row in kept.ledger.new_contributions if row.outcome == "dropped in part"]
    assert rows == ([] if agree else [(0, 0)]) and not kept.ledger.dropped


def test_a_member_that_left_or_was_lost_is_known_as_such_and_all_others_again(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.membership.members["worker-0"].left = True
    kept.flush()
    kept.membership.members["worker-1"].lost = True
    kept.flush()
    restored = restore(tmp_path / FILE_NAME)
    assert restored is not None
    assert {name: (m.left, m.lost) for name, m in restored.members.items()} == {
        "server-0": (False, False), "server-1": (False, False), "worker-0": (True, False), "worker-1": (False, True),
    }  # fmt: skip


def test_a_file_that_holds_something_else_is_refused_in_a_sentence(tmp_path: Path) -> None:
    assert restore(tmp_path / FILE_NAME) is None
    RunLog(tmp_path / FILE_NAME).close()
    assert restore(tmp_path / FILE_NAME) is None
    (tmp_path / FILE_NAME).write_bytes(b"not a database, but long enough to look into" * 100)
    with pytest.raises(UsageError, match="cannot be read"):
        restore(tmp_path / FILE_NAME)
