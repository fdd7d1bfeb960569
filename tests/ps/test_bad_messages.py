"""Messages that nobody honest would send, to coordinator, servers and workers in the middle of a run."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import msgspec
import pytest
import torch
import zmq
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from simulation import (
    Case,
    CoordinatorProcess,
    Pace,
    Process,
    ServerProcess,
    WorkerProcess,
    World,
    _stand_ins,
    same,
    sequential,
    simulate,
)

from roundtable.common.config.batch_plan import make_segment
from roundtable.common.config.settings import Settings
from roundtable.common.policies import load
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.commit import Committed, Report, ReportAck
from roundtable.common.protocol.messages.gradients import Pull
from roundtable.common.protocol.messages.session import Hello, Welcome
from roundtable.common.protocol.messages.setup import Plan, Setup, Update
from roundtable.common.protocol.model_spec import TableSpec, TensorSpec
from roundtable.common.protocol.tickets import seal
from roundtable.common.protocol.transport import Stamp
from roundtable.common.runtime.errors import ClusterError, PsError, WireError
from roundtable.ps.coordinator.state.ledger import Ledger
from roundtable.ps.server.restoring import make_host
from roundtable.ps.updates.sync_shard import SyncShard

PACES = (Pace(), Pace(0.15))
CASES = {
    "sync": Case(Settings(global_batch=12, micro_batch=3), PACES, rows=40),
    "backup": Case(Settings(global_batch=12, micro_batch=3, policy="backup", replicas=1), PACES, clip_norm=1.0),
    "async": Case(Settings(global_batch=12, micro_batch=3, policy="async", compress_gradients="topk"), PACES),
    "local": Case(Settings(global_batch=12, micro_batch=3, policy="local", local_steps=1), PACES),
}
#: What no field expects, or only few.
NASTY: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**53 + 1, 2**63, 2**64 - 1, -(2**63), 0.5, math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324,
    "", "x", "\0", "worker-0", "coordinator", "../../etc", "SGD", "LBFGS", "lr_scheduler", "__class__", b"", b"\xff" * 9,
    [], [[]], [0], [0, 0], [-1], [2**40], list(range(2000)), [None], {}, {"": 0}, {"lr": math.nan}, [{"lr": "x"}],
    [{"params": []}], [{"lr": 1e400, "nonsense": 1}, {}], {"type": "Nothing"}, {"type": "Push"},
    "local", "add", "tentative", "commit", 1 << 20,
]  # fmt: skip


#: What is of the right type and makes no sense, or little.
LIKELY: dict[type, list[Any]] = {
    bool: [True, False],
    int: [-1, 0, 1, 2, 3, 4, 5, 7, 8, 63, 1000, 2**31, 2**40, 2**53],
    float: [0.0, -0.0, 0.25, 0.3, 1.0, 2.0, 8.0, 1e30, 1e300, 5e-324, -1.0, math.nan, math.inf],
    str: ["", "x", "tentative", "commit", "complete", "waiting", "done", "SGD", "Adam", "LBFGS", "Optimizer", "lr_scheduler",
          "float32", "float16", "int64", "bool", "worker-0", "worker-1", "committed", "dropped", "complex64", "quint8", "set"],
    list: [[], [0], [1], [0, 0], [0, 1], [1, 0, 1], [0, 1, 2, 3], [7], [2**53], [-1], [{}], [{"lr": 0.5}], [{"lr": math.nan}],
           [{"lr": "x"}], [{"params": []}], [{"params": [], "lr": 1.0}, {}], [{"betas": [1, 2]}], [{"momentum": -3}],
           [[0, 0, 1.0]]],
    dict: [{}, {"loss": [1.0, 0.0]}, {"loss": [math.nan, 1.0]}, {"lr": -1.0}, {"nesterov": True}, {"loss": 1.0}],
}  # fmt: skip


class Recording(World):
    """Keeps every message, so that others can be made of them."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.messages: list[tuple[str, str, list[bytes]]] = []

    def post(self, sender: str, to: str, data: list[bytes]) -> None:
        self.messages.append((sender, to, data))
        super().post(sender, to, data)


@contextmanager
def running(case: Case, seconds: float) -> Iterator[Recording]:
    """A run that has been going on for so long."""
    world = Recording(case)
    threads = torch.get_num_threads()
    with _stand_ins(world), TemporaryDirectory() as folder:
        try:
            world.start(CoordinatorProcess(world, "coordinator", Path(folder)))
            for n in range(case.settings.servers):
                world.start(ServerProcess(world, f"server-{n}"))
            for n, pace in enumerate(case.paces):
                world.start(WorkerProcess(world, f"worker-{n}", pace))
            world.run(lambda: False, world.now + seconds)
            yield world
        finally:
            torch.set_num_threads(threads)


def deliver(world: World, sender: str, to: str, parts: list[bytes]) -> None:
    """Have a process handle a message at once, whatever it is."""
    world.processes[to].deliver(sender, [zmq.Frame(part) for part in parts])


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to everything in a decoded message."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items)[:50]:
        yield from places(item, (*at, key))


def replaced(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    if not at:
        return new
    out = value.copy()
    out[at[0]] = replaced(value[at[0]], at[1:], new)
    return out


def mutated(header: bytes, chance: random.Random) -> bytes:
    """A header with something in it that is something else."""
    if chance.random() < 0.15:  # at the level of bytes
        data = bytearray(header)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        return bytes(data[: chance.choice([len(data), chance.randrange(len(data) + 1)])])
    envelope = msgspec.msgpack.decode(header)
    for _ in range(chance.randint(1, 2)):
        body = envelope[5]
        if not isinstance(body, dict):
            break
        if chance.random() < 0.3:  # what was left out because it has its default
            fields = ["present", "coded", "hypers", "gradient_buffer", "scale", "stage", "have_chunks", "weight_buffer", "counts",
                      "not_started", "unacknowledged", "rate", "index", "metrics", "page", "count", "tables", "share_tables",
                      "seconds", "round", "samples"]  # fmt: skip
            envelope[5] = {**body, chance.choice(fields): chance.choice(chance.choice([NASTY, *LIKELY.values()]))}
        else:
            at = chance.choice([at for at in places(body) if at and at != ("type",)] or [()])
            now: Any = body
            for key in at:
                now = now[key]
            new = NASTY if chance.random() < 0.2 else LIKELY.get(type(now), NASTY)
            envelope[5] = replaced(body, at, chance.choice(new))
    return msgspec.msgpack.encode(envelope)


def of_somebody_else(header: bytes, chance: random.Random) -> bytes:
    """The same message from a process that is not the one it names, or of another run."""
    envelope = msgspec.msgpack.decode(header)
    kind = chance.randrange(4)
    if kind == 0:
        envelope[3] += 1
    elif kind == 1:
        envelope[1] = chance.choice(["", "ffffffff"])
    elif kind == 2:
        envelope[0] += 1
    else:
        names = ["coordinator", "server-0", "worker-00", "worker--1", "worker-9 ", "", "worker"]
        envelope[2] = chance.choice([name for name in names if name != envelope[2]])
    return msgspec.msgpack.encode(envelope)


def fingerprint(process: Process) -> Any:
    """All that a refused message could have changed on a server or the coordinator."""
    if isinstance(process, CoordinatorProcess):
        c = process.coordinator.context
        ledger = c.ledger
        members = {m.name: (m.incarnation, m.heartbeat, m.left, m.lost) for m in c.membership.members.values()}
        model = [vars(one) for one in (process.coordinator.model._file, process.coordinator.model.collecting) if one is not None]
        return str((members, c.membership.tables, vars(ledger), vars(c.decisions), model))
    assert isinstance(process, ServerProcess)
    shard, server = process.shard, process.server
    parts = shard.model.dense._parts.values()
    weights = [part.master.numpy().tobytes() for part in parts]
    states = [str(list(optimizer.state.values())) for part in parts for optimizer in part.optimizers.values()]
    early = {who: {key: sorted(e.values) for key, e in held.items()} for who, held in shard._tentative.kept.items()}
    rest = [str(vars(part)) for part in (shard._reports, shard._plans, shard.sender, shard._validator)]
    rest.append(str({name: vars(shard).get(name) for name in ("_slowest", "_applied", "_counted", "_metrics", "_left_out")}))
    if isinstance(shard, SyncShard):
        rest.append(str((vars(shard.round), shard.versions.newest)))
    copy = process.host._replication._backup if process.host._replication is not None else None
    kept = (copy.version, {n: (sorted(r.means), r.replicated) for n, r in copy._rounds.items()}) if copy is not None else None
    return weights, states, early, rest, kept, server._connections.routes, server._identities.tickets, str(vars(server._kv))


def refused(process: Process) -> int:
    if isinstance(process, CoordinatorProcess):
        return sum(process.coordinator._rejections.counts.values())
    assert isinstance(process, ServerProcess)
    return sum(process.server._rejections.counts.values())


def attack(world: Recording, seed: int, count: int) -> int:
    """Send so many bad messages made of good ones; how many were refused."""
    chance = random.Random(seed)
    recorded = [m for m in world.messages if m[1] != "coordinator" or b"Hello" not in m[2][0]]
    kinds: dict[Any, list[Any]] = {}
    for sender, to, data in recorded:
        kind = msgspec.msgpack.decode(data[0])[5]["type"]
        kinds.setdefault((kind, to.partition("-")[0], sender.partition("-")[0]), []).append((sender, to, data))
    before_all = 0
    for _ in range(count):
        sender, to, (header, *frames) = chance.choice(kinds[chance.choice(list(kinds))])
        target = world.processes[to]
        parts = [mutated(header, chance), *frames]
        if chance.random() < 0.2:
            parts = [parts[0], *(chance.choice([b"", f[:-1], f + b"x", f, bytes(len(f))]) for f in frames)][
                : chance.randint(0, 9)
            ]
        if not parts:
            continue
        if isinstance(target, WorkerProcess):
            deliver_to_worker(world, sender, to, parts)
            continue
        before, count_before = fingerprint(target), refused(target)
        try:
            deliver(world, sender, to, parts)
        except ClusterError:  # a worker may say that it has failed
            assert b"Goodbye" in parts[0]
        if refused(target) > count_before:
            before_all += 1
            assert fingerprint(target) == before, f"{parts[0]!r} was refused and had an effect"
    return before_all


def deliver_to_worker(world: World, sender: str, to: str, parts: list[bytes]) -> None:
    try:
        deliver(world, sender, to, parts)
    except PsError:  # it was told that it is refused, or that the run is over
        assert b"Refused" in parts[0] or b"Stop" in parts[0]


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck), phases=set(Phase) - {Phase.shrink})
@given(seed=st.integers(0, 2**32), seconds=st.sampled_from([0.4, 1.0, 2.0]))
# I27
def test_no_message_crashes_a_process_and_what_is_refused_has_no_effect(name: str, seed: int, seconds: float) -> None:
    with running(CASES[name], seconds) as world:
        attack(world, seed, 300)


class Attacked(World):
    """Strangers send their own version of every message, before and after it comes."""

    def post(self, sender: str, to: str, data: list[bytes]) -> None:
        if not to.startswith("worker"):
            for _ in range(2):
                header = of_somebody_else(data[0], self.random)
                what = header if self.random.random() < 0.5 else mutated(header, self.random)
                if b"Hello" not in what:
                    parts = [what, *(bytes(len(frame)) for frame in data[1:])]
                    self.at(self.now + self.random.uniform(0.0, 0.02), lambda parts=parts: self._deliver("stranger", to, parts))  # type: ignore[misc]
        super().post(sender, to, data)


@pytest.mark.parametrize("name", ["sync", "backup"])
@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_strangers_change_nothing(name: str, seed: int) -> None:
    case = dataclasses.replace(CASES[name], seed=seed)
    with mock.patch("simulation.World", Attacked):
        attacked = simulate(case)
    expected = sequential(case)[-1] if name == "sync" else None
    for model in attacked.models.values():
        assert expected is None or same(model, expected)
    assert attacked.ledger.totals.rounds == len({task.round for task in case.micro_batches()})


@pytest.mark.parametrize("policy", ["sync", "async"])
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_a_model_that_cannot_be_is_refused_and_the_next_one_is_taken(policy: str, seed: int) -> None:
    """Shapes of terabytes, groups that are not there, classes that are no optimizers."""
    chance = random.Random(seed)
    set_up = Setup(
        [TensorSpec("w", [4, 2], "float32", 0), TensorSpec("b", [3], "bfloat16", 1), TensorSpec("m", [2], "int64", -1)],
        Update("Adam", [{"lr": 0.1, "betas": [0.9, 0.99]}, {"lr": 0.2}], 1.0),
        [TableSpec("t", 10, 3, 0, 0.1)],
    )
    values = Settings(policy=policy)  # type: ignore[arg-type]
    host = make_host(0, values)
    ledger = Ledger(values, load(values))
    stamp = Stamp("worker-0", "", 0, 1)
    for _ in range(3):
        header = msgspec.msgpack.decode(stamp.encode(set_up))
        at = chance.choice([at for at in places(header[5]) if at and at != ("type",)])
        now: Any = header[5]
        for key in at:
            now = now[key]
        header[5] = replaced(header[5], at, chance.choice([*LIKELY.get(type(now), NASTY), [2**40, 2**40], [2**50]]))
        try:
            body = stamp.open(msgspec.msgpack.encode(header)).read()
        except WireError:
            continue
        assert isinstance(body, Setup)
        with contextlib.suppress(WireError):
            host.handle("worker-0", body, (), 0.0)
        ledger.set_up(body)
    if host.shard is None:
        host.handle("worker-0", set_up, (), 0.0)
        assert host.shard is not None


@pytest.mark.parametrize(("to", "kind"), [("server-0", b"Push"), ("server-1", b"Pull"), ("coordinator", b"Heartbeat")])
def test_messages_of_an_earlier_process_of_the_same_name_are_refused_and_counted(to: str, kind: bytes) -> None:
    with running(CASES["sync"], 3.0) as world:
        header, *frames = next(
            parts for sender, where, parts in world.messages if (sender, where) == ("worker-1", to) and kind in parts[0]
        )
        envelope = msgspec.msgpack.decode(header)
        envelope[3] -= 1
        process: Any = world.processes[to]
        owner = process.coordinator if to == "coordinator" else process.server
        before, counted = fingerprint(process), Counter(owner._rejections.counts)
        deliver(world, "worker-1", to, [msgspec.msgpack.encode(envelope), *frames])
        assert Counter(owner._rejections.counts) - counted == Counter(sender=1)
        assert fingerprint(process) == before
        counted = Counter(owner._rejections.counts)
        deliver(world, "worker-1", to, [header, *frames])
        assert Counter(owner._rejections.counts) == counted  # it is the incarnation alone


def forged(world: Recording, sender: str, to: str, body: Body, incarnation: int) -> list[bytes]:
    """A message of somebody who knows the id of the run and all that a worker is told."""
    run = world.coordinator.context.mail.stamp.run
    return [Stamp(sender, run, 0, incarnation).encode(body)]


def told_to(world: Recording, worker: str) -> list[Any]:
    """Everything that a worker has been told by anybody, decoded, as far down as it goes."""
    found: list[Any] = []

    def walk(value: Any) -> None:
        found.append(value)
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            walk(item)

    for _, to, parts in world.messages:
        if to == worker:
            walk(msgspec.msgpack.decode(parts[0]))
    return found


def test_a_server_takes_nothing_under_a_name_that_the_coordinator_did_not_give() -> None:
    with running(CASES["sync"], 1.0) as world:
        server: Any = world.processes["server-0"]
        known = dict(server.server._identities.tickets)
        assert set(known) == {"worker-0", "worker-1"}
        for sender in ("worker-0", "worker-1", "worker-2", "worker-9000000", "server-1", "coordinator"):
            for number in (0, 7, *known.values(), *(told for told in told_to(world, "worker-1") if isinstance(told, int))):
                if known.get(sender) == number:
                    continue
                before, counted = fingerprint(server), refused(server)
                deliver(world, "stranger", "server-0", forged(world, sender, "server-0", Pull(0, full_precision=True), number))
                assert refused(server) == counted + 1 and fingerprint(server) == before
        assert server.server._identities.tickets == known  # 100,000 names that were made up take no room


def test_what_workers_are_told_does_not_let_them_speak_for_a_server_or_for_each_other() -> None:
    with running(CASES["sync"], 1.0) as world:
        secrets = {member.incarnation for member in world.coordinator.context.membership.members.values()}
        tickets = {"worker-0": world.processes["server-0"].server._identities.tickets["worker-0"]}  # type: ignore[attr-defined]
        told = told_to(world, "worker-1")
        assert secrets and not secrets & {value for value in told if isinstance(value, int)}
        assert tickets["worker-0"] not in told and not any(isinstance(value, bytes) and len(value) >= 32 for value in told)
        coordinator = world.processes["coordinator"]
        before = fingerprint(coordinator)
        for number in {value for value in told if isinstance(value, int)}:
            report = Report(10**6, 3, [Committed(0, 12, 4, 0, {"loss": 0.0})])
            deliver(world, "stranger", "coordinator", forged(world, "server-0", "coordinator", report, number))
        assert fingerprint(coordinator) == before


def test_a_worker_cannot_have_a_servers_report_forgotten() -> None:
    with running(CASES["sync"], 1.0) as world:
        server: Any = world.processes["server-0"]
        server.host.reports._under_way = Report(5, 1)
        number = server.server._identities.tickets["worker-1"]
        deliver(world, "worker-1", "server-0", forged(world, "worker-1", "server-0", ReportAck(5), number))
        assert server.host.reports._under_way == Report(5, 1) and refused(server) == 1


def test_a_plan_of_one_who_has_done_nothing_is_no_plan_and_servers_take_none_that_was_not_agreed_to() -> None:
    with running(CASES["sync"], 1.0) as world:
        coordinator: Any = world.processes["coordinator"]
        ledger, membership = coordinator.ledger, coordinator.coordinator.context.membership
        (before,) = ledger.segments
        more = make_segment(before=before, samples=24, global_batch=12, micro_batch=3, epochs=5, round_limit=None)
        run = coordinator.coordinator.context.mail.stamp.run
        late, answers = membership.hello(Hello("worker"), 77, world.now)
        assert late is not None and isinstance(answers[0][1], Welcome)
        deliver(world, "late", "coordinator", [Stamp(late.name, run, 0, 77).encode(Plan(more))])
        assert ledger.segments == [before] and late.proven
        other = msgspec.structs.replace(before, samples=25)
        for name, incarnation in ((late.name, 77), ("worker-1", membership.members["worker-1"].incarnation)):
            deliver(world, "late", "coordinator", [Stamp(name, run, 0, incarnation).encode(Plan(other))])
        assert ledger.segments == [before]
        server: Any = world.processes["server-0"]
        counted, known = refused(server), answers[0][1].ticket
        for plan in (Plan(more), Plan(more, 1), Plan(more, known), Plan(more, seal(b"", more))):
            deliver(world, "late", "server-0", [Stamp(late.name, run, 0, known).encode(plan)])
        assert refused(server) == counted + 4 and server.host.plans.segments == [before]
        number = membership.members["worker-1"].incarnation
        deliver(world, "worker-1", "coordinator", [Stamp("worker-1", run, 0, number).encode(Plan(more))])
        assert ledger.segments == [before, more]  # one who was there from the start may
