"""Who takes part: workers that fall silent are told of once, and the others share what is left."""

from __future__ import annotations

from common.messages import Beat, Hello, Tables, Welcome
from common.policies import load
from common.settings import Settings
from common.wire import GONE_S
from ps.membership import Membership


def started(workers: int) -> Membership:
    settings = Settings(workers=workers, servers=1)
    membership = Membership(settings, load(settings), "run", now=0.0)
    membership.hello(Hello("server", address="tcp://server:1"), 1, 0.0)
    for number in range(workers):
        _, answers = membership.hello(Hello("worker", number), 10 + number, 0.0)
    assert sorted(name for name, body in answers if isinstance(body, Welcome)) == sorted(membership.members)
    return membership


def test_a_worker_that_falls_silent_is_lost_once_and_has_no_share_from_then_on() -> None:
    membership = started(3)
    later = GONE_S + 1.0
    for name in ("server-0", "worker-0", "worker-2"):
        membership.beat(name, Beat("computing", 5), later)
    told = [(name, body) for name, body in membership.tick(later) if isinstance(body, Tables)]
    assert [name for name, _ in told] == ["worker-0", "worker-2"]
    assert membership.newly_lost == ["worker-1"]
    assert membership.tables[-1].workers == ["worker-0", "worker-2"] and membership.tables[-1].from_round > 5
    membership.newly_lost.clear()
    membership.tick(later + 1.0)
    assert membership.newly_lost == []
