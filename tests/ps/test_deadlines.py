"""What a coordinator says as it gives a run up, or ends one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zmq

from common.errors import ClusterError
from common.layout import TensorSpec
from common.messages import Beat, Hello, Setup, Stop, Update
from common.settings import Settings
from common.wire import Stamp, dealer, receive, router, send
from ps.coordinator import Coordinator
from ps.serving import _meanwhile
from worker.link import Link


def test_where_nothing_moves_it_is_told_who_is_waited_for_and_which_micro_batches_each_server_lacks(tmp_path: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        coordinator = Coordinator(context.socket(zmq.ROUTER), Settings(timeout=5.0, silence=1e6), tmp_path)
        membership, began = coordinator._membership, coordinator._progressed_at
        for number in range(2):
            membership.hello(Hello("server", number, address=f"tcp://server:{number}"), 1 + number, began)
            membership.hello(Hello("worker", number), 11 + number, began)
        coordinator._ledger.set_up(Setup([TensorSpec(n, [1 << 21], "float32", 0) for n in "wv"], Update("SGD", [{"lr": 0.1}])))
        membership.beat("server-0", Beat("computing", 4, left=[1, 3, 2, 0]), began)
        membership.beat("server-1", Beat("computing", 5, left=[2]), began)
        membership.beat("worker-0", Beat("waiting", 5), began)
        membership.beat("worker-1", Beat("computing", 5), began)
        coordinator._check_deadline(began + 5.0)
        with pytest.raises(ClusterError) as caught:
            coordinator._check_deadline(began + 5.1)
        assert str(caught.value) == (
            "nothing has moved for 5 s: round 0 waits for worker-1; server-0 lacks micro-batches 1, 3 and 2 more of round 4; "
            "server-1 lacks micro-batch 2 of round 5."
        )
    finally:
        context.destroy(linger=0)


def test_who_asks_to_join_while_the_run_ends_is_told_so(tmp_path: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with ThreadPoolExecutor() as threads:
        try:
            sock, address = router(context, "tcp://127.0.0.1:0")
            coordinator = Coordinator(sock, Settings(), tmp_path)
            link = Link(address, Hello("worker"))
            joined = threads.submit(link.joined)
            while not joined.done():
                coordinator._tell(Stop(True))
            assert str(joined.exception()) == f"the run of {address} has just ended."
            link.close()
        finally:
            context.destroy(linger=0)


def test_who_asks_to_join_while_snapshots_are_looked_at_is_told_to_wait(tmp_path: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        sock, address = router(context, "tcp://127.0.0.1:0")
        asker = dealer(context, address)
        send(asker, Stamp(sender="worker").encode(Hello("worker")))

        def look() -> str:
            assert asker.poll(30_000)
            frames = receive(asker)
            assert frames is not None and isinstance(Stamp().open(frames[0].buffer).read(), Beat)
            return "found"

        assert _meanwhile(sock, look) == "found"
    finally:
        context.destroy(linger=0)
