"""The sentences of a coordinator that gives a run up, or ends one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zmq

from roundtable.common.config.settings import Settings
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.session import Goodbye, Heartbeat, Hello, Stop
from roundtable.common.protocol.messages.setup import Setup, Update
from roundtable.common.protocol.model_spec import TensorSpec
from roundtable.common.protocol.transport import Stamp, dealer, receive, router, send
from roundtable.common.runtime.errors import ClusterError
from roundtable.ps.coordinator.coordinator import Coordinator
from roundtable.ps.coordinator.main import _meanwhile, run_to_recover
from roundtable.ps.coordinator.state.roster import Member
from roundtable.worker.client.io_thread import IoThread


# I26
def test_where_nothing_moves_it_is_told_who_is_waited_for_and_which_micro_batches_each_server_lacks(tmp_path: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        coordinator = Coordinator(context.socket(zmq.ROUTER), Settings(progress_timeout=5.0, heartbeat_timeout=1e6), tmp_path)
        membership, began = coordinator.context.membership, coordinator.context.progressed_at
        for number in range(2):
            membership.hello(Hello("server", number, address=f"tcp://server:{number}"), 1 + number, began)
            membership.hello(Hello("worker", number), 11 + number, began)
        coordinator.context.ledger.set_up(
            Setup([TensorSpec(n, [1 << 21], "float32", 0) for n in "wv"], Update("SGD", [{"lr": 0.1}]))
        )
        membership.heartbeat("server-0", Heartbeat("computing", 4, missing=[1, 3, 2, 0]), began)
        membership.heartbeat("server-1", Heartbeat("computing", 5, missing=[2]), began)
        membership.heartbeat("worker-0", Heartbeat("waiting", 5), began)
        membership.heartbeat("worker-1", Heartbeat("computing", 5), began)
        coordinator.deadline.tick(began + 5.0)
        with pytest.raises(ClusterError) as caught:
            coordinator.deadline.tick(began + 5.1)
        assert str(caught.value) == (
            "no progress for 5 s (--progress-timeout): round 0 waits for worker-1; server-0 is missing micro-batches 1, 3 and 2 "
            "more of round 4; server-1 is missing micro-batch 2 of round 5."
        )
    finally:
        context.destroy(linger=0)


@pytest.mark.parametrize(("stop", "told"), [(Stop(True), "0"), (Stop(False, "it failed."), "stopped because it failed.")])
def test_who_asks_to_join_while_the_run_ends_is_told_so(tmp_path: Path, stop: Stop, told: str) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with ThreadPoolExecutor() as threads:
        try:
            sock, address = router(context, "tcp://127.0.0.1:0")
            coordinator = Coordinator(sock, Settings(), tmp_path)
            link = IoThread(address, Hello("worker"))
            joined = threads.submit(link.joined)
            while not joined.done():
                coordinator.farewell.tell(stop)
            assert str(joined.exception()) == told
            link.close()
        finally:
            context.destroy(linger=0)


def test_who_asks_to_join_while_checkpoints_are_looked_at_is_told_to_wait(tmp_path: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        sock, address = router(context, "tcp://127.0.0.1:0")
        asker = dealer(context, address)
        send(asker, Stamp(sender="worker").encode(Hello("worker")))

        def look() -> str:
            assert asker.poll(30_000)
            frames = receive(asker)
            assert frames is not None and isinstance(Stamp().open(frames[0].buffer).read(), Heartbeat)
            return "found"

        assert _meanwhile(sock, look) == "found"
    finally:
        context.destroy(linger=0)


class Started:
    """A coordinator whose run has started with one server and two workers on other hosts."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], folder: Path, **settings: object) -> None:
        made = Settings(workers=2, servers=1, heartbeat_timeout=1e6, **settings)  # type: ignore[arg-type]
        self.coordinator = Coordinator(context.socket(zmq.ROUTER), made, folder)
        self.join(Hello("server", 0, address="tcp://server:1"), 1)
        for number in range(2):
            self.join(Hello("worker", number, host=f"host-{number}"), 11 + number)

    def join(self, hello: Hello, incarnation: int) -> Member:
        self.coordinator.joining.hello(b"route", hello, incarnation, self.coordinator.context.progressed_at)
        return self.coordinator.context.membership._roster.incarnations[incarnation]

    def tell(self, name: str, body: Body) -> None:
        """A message of a member."""
        member = self.coordinator.context.membership.members[name]
        header = Stamp(name, self.coordinator.context.mail.stamp.run, 0, member.incarnation).encode(body)
        envelope = self.coordinator.context.mail.stamp.open(header)
        self.coordinator.handle(b"route", envelope, ())


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield lambda **settings: Started(context, tmp_path, **settings)
    context.destroy(linger=0)


def setup(width: int) -> Setup:
    return Setup([TensorSpec("w", [width], "float32", 0)], Update("SGD", [{"lr": 0.1}]))


def test_of_workers_that_begin_together_with_other_models_nobody_knows_who_is_right(started: Callable[..., Started]) -> None:
    run = started()
    run.tell("worker-1", setup(128))
    run.tell("worker-0", setup(256))
    with pytest.raises(ClusterError, match=r"^worker-0 on host-0 failed: other model$"):
        run.tell("worker-0", Goodbye("other model"))


def test_who_joins_later_with_another_model_is_refused_alone(started: Callable[..., Started]) -> None:
    run = started()
    for worker in ("worker-0", "worker-1"):
        run.tell(worker, setup(256))
    run.join(Hello("worker", host="host-2"), 20)
    run.tell("worker-2", setup(128))
    run.tell("worker-2", Goodbye("other model"))
    run.tell("worker-2", Goodbye("other model"))
    assert run.coordinator.departures.failed == ["worker-2 on host-2 failed: other model"]
    assert run.coordinator.context.membership.names("worker") == ["worker-0", "worker-1"]


def test_who_has_used_the_key_value_store_cannot_be_done_without(started: Callable[..., Started]) -> None:
    run = started(worker_failures=9)
    with pytest.raises(ClusterError, match=r"^worker-1 on host-1 failed: no$"):
        run.tell("worker-1", Goodbye("no", used_kv=True))


def test_a_failure_counts_once_also_for_a_coordinator_that_comes_after(started: Callable[..., Started], tmp_path: Path) -> None:
    run = started(worker_failures=1)
    run.coordinator.context.ledger.contributors = {"worker-0", "worker-1"}
    for _ in range(2):
        run.tell("worker-1", Goodbye("no"))
    assert run.coordinator.departures.admitted == 1
    run.coordinator.context.flush()
    run.coordinator.context.log.close()
    restored = run_to_recover(tmp_path)
    assert restored is not None and (restored.failed, restored.admitted) == (["worker-1 on host-1 failed: no"], 1)


def test_a_server_that_a_worker_cannot_reach_is_named_with_its_address_and_both_hosts(
    started: Callable[..., Started], caplog: pytest.LogCaptureFixture
) -> None:
    run = started(progress_timeout=5.0)
    text = "worker-1 on host-1 cannot reach server-0 at tcp://server:1: see its --listen and --advertise"
    for _ in range(3):
        run.tell("worker-1", Heartbeat("starting", unreached=[0, 7]))
    assert [record.getMessage() for record in caplog.records].count(text) == 1
    assert run.coordinator.status.whom_all_wait_for() == f"a connection ({text})"
    with pytest.raises(ClusterError, match=r"^no progress for 5 s \(--progress-timeout\): round 0 waits for a connection"):
        run.coordinator.deadline.tick(run.coordinator.context.progressed_at + 5.1)
    run.tell("worker-1", Heartbeat("starting"))
    assert run.coordinator.status.whom_all_wait_for() == "worker-0 and worker-1"
