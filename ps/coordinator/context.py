"""The context that all parts of the coordinator share: the state of the run, its event log, and the mailbox."""

from __future__ import annotations

import platform
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

import zmq

from roundtable.common.config.settings import Settings
from roundtable.common.network.host_identity import here
from roundtable.common.policies import Policy, load
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.session import MembershipUpdate, MembersLost, Welcome
from roundtable.common.protocol.tickets import KEY_BYTES
from roundtable.common.protocol.transport import Frames, Stamp, new_incarnation, send
from roundtable.ps.coordinator.group_commit import GroupCommit
from roundtable.ps.coordinator.recovery import RestoredRun, RunHeader, new_run
from roundtable.ps.coordinator.state.decisions import RoundDecisions
from roundtable.ps.coordinator.state.ledger import Ledger
from roundtable.ps.coordinator.state.membership import Membership
from roundtable.ps.coordinator.state.roster import Member
from roundtable.ps.coordinator.state.scheduler import Scheduler

B = TypeVar("B", bound=Body)

#: A resumed run waits this many seconds for all workers to join. Then it starts with those that have.
_FEWER_S = 15.0


@dataclass(frozen=True)
class Received(Generic[B]):
    """A message of a member."""

    #: The route for an answer.
    route: bytes
    member: Member
    body: B
    frames: Frames
    #: The newest membership epoch that the sender knows.
    epoch: int
    #: When the message was read.
    now: float


class Mailbox:
    """Sends messages: to members by name, and to other processes by route."""

    def __init__(self, sock: zmq.Socket[bytes], stamp: Stamp, journal: GroupCommit) -> None:
        self._sock = sock
        self.stamp = stamp
        self._journal = journal
        #: By member: the route of its newest message.
        self.routes: dict[str, bytes] = {}

    def send(self, name: str, body: Body) -> None:
        """Send `body` to a member, if this coordinator has a route to it."""
        if name in self.routes:
            self.reply(self.routes[name], body)

    def reply(self, route: bytes, body: Body, run: str | None = None) -> None:
        """Send `body` on `route`. If `run` is given, the message names that run instead of this one."""
        stamp = self.stamp if run is None else replace(self.stamp, run=run)
        send(self._sock, stamp.encode(body), to=route)

    def to_servers(self, answers: Sequence[tuple[int, Body]]) -> None:
        """Send each body to the server of that number."""
        for server, body in answers:
            self.send(f"server-{server}", body)

    def tell_members(self, news: Sequence[tuple[str, Body]], asker: bytes | None = None) -> None:
        """Send `news` to members by name; '' stands for the route `asker`. Promises are sent once the event log has them."""
        for name, body in news:
            to = self.routes.get(name) if name else asker
            if to is not None and isinstance(body, Welcome | MembershipUpdate | MembersLost):
                self._journal.promise(to, body, urgent=isinstance(body, Welcome))
            elif to is not None:
                self.reply(to, body)


class RunContext:
    """The state of one run."""

    def __init__(
        self,
        settings: Settings,
        policy: Policy,
        run_dir: Path,
        head: RunHeader,
        membership: Membership,
        ledger: Ledger,
        journal: GroupCommit,
        mail: Mailbox,
        now: float,
    ) -> None:
        self.settings = settings
        self.policy = policy
        self.run_dir = run_dir
        self.head = head
        #: The run's name for people, without the part that changes at each restart.
        self.run = head.run.partition(".")[0]
        self.membership = membership
        self.ledger = ledger
        self.decisions = RoundDecisions(policy, ledger)
        self.scheduler = Scheduler(policy, ledger, membership)
        self.journal = journal
        self.log = journal.log
        self.mail = mail
        #: When something of the run last moved.
        self.progressed_at = now
        #: When the newest round was committed, or None before the first.
        self.committed_at: float | None = None

    @property
    def is_over(self) -> bool:
        """Return whether all known rounds are done."""
        return 0 < self.ledger.planned <= self.ledger.committed

    @property
    def may_go_on(self) -> bool:
        """Return whether more rounds may follow the known ones.

        They may if scripts have looped over batches several times and no script has ended by itself.
        """
        ended = any(worker.left and worker.ended_at >= 0 and not worker.failed for worker in self.membership.workers.values())
        return len(self.ledger.segments) > 1 and self.ledger.ends_after < 0 and not ended

    def has_done_all(self, round_: int) -> bool:
        """Return whether a worker with `round_` rounds in its model has all known rounds."""
        return bool(self.ledger.segments) and round_ >= self.ledger.end

    def enter_rows(self, now: float) -> None:
        """Hand the new rounds and contributions to the event log."""
        if self.journal.enter_rows():
            self.progressed_at = self.committed_at = now

    def enter(self, now: float) -> None:
        """Hand all new rows and state to the event log. Its next flush writes them to the disk."""
        self.enter_rows(now)
        self.journal.enter_state()

    def flush(self) -> None:
        """Write the event log to the disk, then send the promised messages."""
        now = time.monotonic()
        self.enter(now)
        for route, body in self.journal.flush(now):
            self.mail.reply(route, body)


def new_context(
    sock: zmq.Socket[bytes], settings: Settings, run_dir: Path, restored: RestoredRun | None, recovers: bool, now: float
) -> RunContext:
    """Return the context of a new run, or of the run `restored`. With `recovers` that run's coordinator has died."""
    head = RunHeader(
        run=new_run() if restored is None else restored.head.run,
        incarnation=new_incarnation() if restored is None else restored.head.incarnation + 1,
        host=platform.node(),
        settings=settings,
        resume=-1 if restored is None else restored.head.resume,
        key=restored.head.key if restored is not None and recovers else secrets.token_bytes(KEY_BYTES),
    )
    policy = load(settings)
    membership = Membership(settings, policy, head.run, now, str(run_dir.resolve()), head.resume, here(), head.key)
    ledger = Ledger(settings, policy)
    if restored is not None:
        ledger = restored.ledger
        if not policy.is_local:
            membership.fewer_after_s = _FEWER_S  # the user may have started fewer workers this time
        if not restored.tables:  # workers that join send the model and the plan again
            ledger.go_on(settings)
    journal = GroupCommit(run_dir, head, membership, ledger, now)
    mail = Mailbox(sock, Stamp(sender="coordinator", run=head.run, incarnation=head.incarnation), journal)
    return RunContext(settings, policy, run_dir, head, membership, ledger, journal, mail, now)
