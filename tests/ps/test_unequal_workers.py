"""A worker that differs from the others is told of by name and host, with what differs and both values."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from roundtable.common.config.batch_plan import make_segment
from roundtable.common.config.settings import Settings
from roundtable.common.config.worker_facts import Fact
from roundtable.common.policies import load
from roundtable.common.protocol.messages.session import Hello, Refused
from roundtable.common.protocol.messages.setup import Plan, PlanReply, Setup, SetupReply, Update
from roundtable.common.protocol.model_spec import TensorSpec
from roundtable.common.storage.event_log import FILE_NAME, RunLogReader
from roundtable.ps.coordinator.coordinator import Coordinator
from roundtable.ps.coordinator.recovery import restore
from roundtable.ps.coordinator.state.ledger import Ledger

TENSORS = [TensorSpec("w", [3], "float32", 0), TensorSpec("queue", [2], "float32", -1)]
GROUPS = [{"lr": 0.1, "momentum": 0.9}]
SGD = Update("SGD", GROUPS)
SETUP = Setup(TENSORS, SGD)
FACTS = [Fact("shuffle", "True"), Fact("lr in round 2", "", [0.1, 0.2], 1e-6), Fact("sample 0", "(float32 [4])", [1.5], 1e-3)]


def plan(**more: int) -> Plan:
    given = {"samples": 64, "global_batch": 16, "micro_batch": 4, "epochs": 2} | more
    return Plan(make_segment(before=None, round_limit=None, **given), facts=FACTS)


@pytest.fixture
def ledger() -> Ledger:
    ledger = Ledger(Settings(), load(Settings()))
    assert ledger.set_up(SETUP, "worker-0 on a") == SetupReply()
    assert ledger.plan(plan().segment, FACTS, "worker-0 on a") == PlanReply(0)
    return ledger


AVERAGED = TensorSpec("queue", [2], "float32", -1, "mean")
WIDE = TensorSpec("w", [3], "float64", 0)


@pytest.mark.parametrize(
    ("setup", "said"),
    [
        (Setup([TENSORS[0]], SGD), "'s has 2: only worker-0 on a has 'queue' (float32 [2], merged by 'last'); every worker"),
        (Setup([TENSORS[0], AVERAGED], SGD), "worker-1 on b's model is not worker-0 on a's: it has 'queue' (float32 [2], "
         "merged by 'mean') where worker-0 on a has 'queue' (float32 [2], merged by 'last')"),
        (Setup([WIDE, TENSORS[1]], SGD), "it has 'w' (float64 [3], parameter group 0) where worker-0 on a has 'w' (float32"),
        (Setup(TENSORS, Update("SGD", [{"lr": 0.2, "momentum": 0.9}])), "worker-1 on b asks for another optimizer than worker-0 "
         "on a: lr 0.2 instead of 0.1; every"),
        (Setup(TENSORS, Update("Adam", GROUPS)), "Adam instead of SGD"),
        (Setup(TENSORS, Update("SGD", GROUPS, 0.5)), "clip_norm 0.5 instead of None"),
        (Setup(TENSORS, Update("SGD", [{"lr": 0.1}])), "momentum missing instead of 0.9"),
    ],
)  # fmt: skip
def test_another_model_or_optimizer_is_told_by_what_differs(setup: Setup, said: str, ledger: Ledger) -> None:
    refused = ledger.set_up(setup, "worker-1 on b")
    assert isinstance(refused, Refused) and said in refused.reason
    assert ledger.set_up(SETUP, "worker-2 on c") == SetupReply()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {"samples": 65},
            "batches with samples 65 where worker-0 on a has 64 and rounds 10 where worker-0 on a has 8; every worker",
        ),
        ({"micro_batch": 8}, "with micro_batch 8 where worker-0 on a has 4; every worker"),
        ({"epochs": 3}, "with epochs 3 where worker-0 on a has 2 and rounds 12 where worker-0 on a has 8; every worker"),
    ],
)
def test_other_batches_are_told_by_what_differs(more: dict[str, int], said: str, ledger: Ledger) -> None:
    refused = ledger.plan(plan(**more).segment, FACTS, "worker-1 on b")
    assert isinstance(refused, Refused) and said in refused.reason


@pytest.mark.parametrize(
    ("fact", "said"),
    [
        (Fact("shuffle", "False"), "worker-1 on b has shuffle False where worker-0 on a has True"),
        (Fact("lr in round 2", "", [0.1, 0.3], 1e-6), "has lr in round 2 0.1 and 0.3 where worker-0 on a has 0.1 and 0.2"),
        (Fact("sample 0", "(float32 [4])", [1.6], 1e-3), "has sample 0 (float32 [4]) with other values where"),
        (Fact("sample 0", "(float32 [4])", [1.5001], 1e-3), ""),
        (Fact("sample 7", "of a worker that had time for more"), ""),
    ],
)
def test_what_all_must_have_in_common_is_told_by_its_name_with_both_values(fact: Fact, said: str, ledger: Ledger) -> None:
    answer = ledger.plan(plan().segment, [fact], "worker-1 on b")
    assert (said in answer.reason) if isinstance(answer, Refused) else not said


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield Coordinator(context.socket(zmq.ROUTER), Settings(workers=2, servers=1), tmp_path)
    context.destroy(linger=0)


def joins(coordinator: Coordinator, number: int, cpu: str) -> None:
    hello = Hello("worker", number, host=f"host-{number}", arithmetic={"cpu": cpu, "torch": "2"})
    coordinator.joining.hello(b"r%d" % number, hello, 11 + number, 1.0)


def test_other_arithmetic_is_told_of_once_a_kind_also_of_who_joins_late(coordinator: Coordinator, tmp_path: Path) -> None:
    coordinator.joining.hello(b"s", Hello("server", 0, address="tcp://server:1"), 1, 1.0)
    joins(coordinator, 0, "AVX2")
    joins(coordinator, 1, "AVX2")
    for number, cpu in enumerate(("DEFAULT", "AVX2", "DEFAULT", "AVX512"), 2):
        joins(coordinator, number, cpu)
    coordinator.context.flush()
    warned = [event.data["text"] for _, _, event in RunLogReader(tmp_path / FILE_NAME).events() if event.kind == "warning"]
    assert warned == [
        f"worker-{number} on host-{number} has cpu {cpu} where worker-0 on host-0 has AVX2: training is correct but not "
        "bit-reproducible."
        for number, cpu in ((2, "DEFAULT"), (5, "AVX512"))
    ]


def test_a_coordinator_that_takes_over_compares_with_what_was_told_to_the_one_before(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    coordinator.context.ledger.set_up(SETUP, "worker-0 on a")
    coordinator.context.ledger.plan(plan().segment, FACTS, "worker-0 on a")
    coordinator.context.flush()
    restored = restore(tmp_path / FILE_NAME)
    assert restored is not None and restored.ledger.setup == SETUP
    refused = restored.ledger.plan(plan().segment, [Fact("shuffle", "False")], "worker-1 on b")
    assert isinstance(refused, Refused) and "shuffle False where worker-0 on a has True" in refused.reason
