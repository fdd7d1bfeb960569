"""Answers processes that want to join, and compares their arithmetic with that of the first worker."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from roundtable.common.network.host_identity import here
from roundtable.common.protocol.effects import number_of
from roundtable.common.protocol.messages.session import Hello, Refused
from roundtable.common.protocol.transport import is_address
from roundtable.common.runtime.errors import WireError, printable
from roundtable.common.storage.event_log import Event
from roundtable.ps.coordinator.context import RunContext
from roundtable.ps.coordinator.parts.model import ModelCollector
from roundtable.ps.coordinator.parts.status import TELL_S
from roundtable.ps.coordinator.state.roster import Member

log = logging.getLogger("roundtable.ps.coordinator")


class Joining:
    """Answers Hello messages, and knows which processes of this host have ended."""

    def __init__(self, context: RunContext, model: ModelCollector, seen: set[int]) -> None:
        """`seen` has the ids of processes that the coordinator before could see."""
        self._context = context
        self._model = model
        #: Ids of processes that this one has seen on its host. It does not see those of other containers.
        self._seen = seen
        #: When a refused process was last reported.
        self._refused_at = float("-inf")
        #: Kinds of arithmetic that were reported because they differ from the first worker's.
        self._arithmetic_reported: set[tuple[tuple[str, str], ...]] = set()

    def hello(self, route: bytes, hello: Hello, incarnation: int, now: float) -> None:
        """Welcome a process that asks to join, refuse it, or let it wait. Raises WireError if its address is invalid."""
        if hello.role == "server" and not is_address(hello.address):
            raise WireError(f"a server wants to join with '{hello.address[:100]}', which is not an address")
        membership = self._context.membership
        is_known, started = membership.knows(incarnation), membership.started
        member, answers = membership.hello(hello, incarnation, now, self.is_dead)
        if member is not None:
            self._context.mail.routes[member.name] = route
            if not is_known:
                self._joined(member, now)
        for _, body in answers:
            if isinstance(body, Refused) and now >= self._refused_at + TELL_S:
                self._refused_at = now
                log.warning("a %s on %s may not join: %s", hello.role, printable(hello.host), printable(body.reason))
        self._context.mail.tell_members(answers, route)
        if membership.started and not started:
            self._warn_of_unequal_arithmetic(membership.workers.values())
        elif started and not is_known and member is not None and hello.role == "worker":
            self._warn_of_unequal_arithmetic([member])

    def know_again(self, route: bytes, member: Member, now: float) -> None:
        """Greet a member that the coordinator before knew and that has found this one."""
        self._context.progressed_at = now
        membership = self._context.membership
        if member.hello.role == "worker" and membership.started:  # the last news of the coordinator before may be out of date
            self._context.mail.reply(route, membership.shares)

    def is_dead(self, hello: Hello) -> bool:
        """Return whether a process has certainly ended. Its id must mean the same here, and this process must have seen it."""
        return hello.place.sees(here()) and hello.pid in self._seen and not Path(f"/proc/{hello.pid}").exists()

    def _joined(self, member: Member, now: float) -> None:
        context, hello = self._context, member.hello
        if hello.place.sees(here()) and Path(f"/proc/{hello.pid}").exists():
            self._seen.add(hello.pid)
        if member.replaces:
            context.ledger.replaced(number_of(member.name))
            self._model.server_replaced(number_of(member.name))
        data = {"host": hello.host, "pid": hello.pid, "arithmetic": hello.arithmetic, "address": hello.address}
        context.log.event(Event("joined", member.name, {**data, "place": hello.place.pids}))
        if member.proven:
            context.progressed_at = now

    def _warn_of_unequal_arithmetic(self, workers: Iterable[Member]) -> None:
        """Warn once of each kind of arithmetic that differs from the first worker's. Equal bits need equal arithmetic."""
        membership = self._context.membership
        first = next((membership.members[name] for name in membership.names("worker")), None)
        if first is None:
            return
        for member in workers:
            a, b = first.hello.arithmetic, member.hello.arithmetic
            keys = [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
            kind = tuple(sorted(b.items()))
            if keys and kind not in self._arithmetic_reported:
                self._arithmetic_reported.add(kind)
                has = " and ".join(f"{key} {b.get(key, 'unknown')} where {first.who} has {a.get(key, 'unknown')}" for key in keys)
                text = f"{member.who} has {has}: training is correct but not bit-reproducible."
                self._context.journal.warn(text)
