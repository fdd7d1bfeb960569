"""Who takes over what, where many ask at the same moment."""

from __future__ import annotations

from common.leases import Table
from common.messages import Beat, Hello, Lease
from ps.membership import Member
from ps.takeover import Takeover

TABLES = [Table(1, 0, ["worker-0", "worker-1", "worker-2"], [1, 4, 1])]


def workers(left: list[int], since: float) -> dict[str, Member]:
    """Workers 0 and 2 wait in round 0; worker 1 is at micro-batch 1 since then and has these left."""
    beats = {
        "worker-0": Beat("waiting", 0, seconds=1.0),
        "worker-1": Beat("computing", 0, 1, left, seconds=1.0),
        "worker-2": Beat("waiting", 0, seconds=1.0),
    }
    return {name: Member(name, Hello("worker"), number, 0.0, beat, since) for number, (name, beat) in enumerate(beats.items())}


def test_what_one_was_given_is_not_given_to_who_asks_at_the_same_moment() -> None:
    takeover, members = Takeover(), workers([2, 3, 4], since=0.0)
    given = [takeover.lease(f"worker-{n}", range(1), lambda _: 6, TABLES, members, now=0.5) for n in (0, 2, 0, 2)]
    assert given == [*(Lease(0, k, f"worker-{n}", "worker-1") for k, n in ((4, 0), (3, 2), (2, 0))), None]


def test_what_a_late_one_computes_is_given_to_one_other() -> None:
    takeover, members = Takeover(), workers([], since=0.0)
    assert takeover.lease("worker-0", range(1), lambda _: 6, TABLES, members, now=1.9) is None
    given = [takeover.lease(f"worker-{n}", range(1), lambda _: 6, TABLES, members, now=2.1) for n in (0, 2)]
    assert given == [Lease(0, 1, "worker-0", "worker-1"), None]


def test_what_is_missing_for_a_second_is_given_once_in_a_while() -> None:
    takeover, members = Takeover(), workers([2, 3, 4], since=0.0)

    def ask(now: float) -> Lease | None:
        return takeover.lease_missing("worker-2", 0, iter([0, 2]), 6, TABLES, members, now)

    assert [ask(now) for now in (0.0, 0.9)] == [None, None]
    assert [ask(now) for now in (1.1, 1.1, 2.0, 3.2)] == [Lease(0, 0, "worker-2", ""), None, None, Lease(0, 0, "worker-2", "")]
