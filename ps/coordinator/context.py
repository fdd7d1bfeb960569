"""What all parts of the coordinator share: the state of the run, its event log, and the way to send messages."""

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

#: Seconds for all workers to join a run that goes on. It starts without the workers that do not.
_FEWER_S = 15.0


@dataclass(frozen=True)
class Received(Generic[B]):
    """A message of a member. `route` is the way back, and `epoch` the newest membership epoch that the sender knows."""

    route: bytes
    member: Member
    body: B
    frames: Frames
    epoch: int
    now: float


class Mailbox:
    """Sends messages, to members by name, and to others by the route on which they asked."""

    def __init__(self, sock: zmq.Socket[bytes], stamp: Stamp, journal: GroupCommit) -> None:
        self._sock = sock
        self.stamp = stamp
        self._journal = journal
        #: By name of the member.
        self.routes: dict[str, bytes] = {}

    def send(self, name: str, body: Body) -> None:
        """Send `body` to a member, if it has been heard of here."""
        if name in self.routes:
            self.reply(self.routes[name], body)

    def reply(self, route: bytes, body: Body, run: str | None = None) -> None:
        """Send `body` to whoever is at the end of `route`, as a message of `run` if that is another run's name."""
        stamp = self.stamp if run is None else replace(self.stamp, run=run)
        send(self._sock, stamp.encode(body), to=route)

    def to_servers(self, answers: Sequence[tuple[int, Body]]) -> None:
        """Send each body to the server of that number."""
        for server, body in answers:
            self.send(f"server-{server}", body)

    def tell_members(self, news: Sequence[tuple[str, Body]], asker: bytes | None = None) -> None:
        """Send what the membership says, to members by name and '' to `asker`, once the event log has it."""
        for name, body in news:
            to = self.routes.get(name) if name else asker
            if to is not None and isinstance(body, Welcome | MembershipUpdate | MembersLost):
                self._journal.promise(to, body, urgent=isinstance(body, Welcome))
            elif to is not None:
                self.reply(to, body)


class RunContext:
    """The state of one run, and how far it is."""

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
        #: The run's name as people know it: without the part that tells it from itself before a restart.
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
        #: When the newest round was committed, once one was.
        self.committed_at: float | None = None

    @property
    def is_over(self) -> bool:
        """Return whether all known rounds are done."""
        return 0 < self.ledger.planned <= self.ledger.committed

    @property
    def may_go_on(self) -> bool:
        """Return whether more rounds may follow the known ones.

        Scripts may loop over batches several times. None of them may have ended by itself.
        """
        ended = any(worker.left and worker.ended_at >= 0 and not worker.failed for worker in self.membership.workers.values())
        return len(self.ledger.segments) > 1 and not ended

    def has_done_all(self, round_: int) -> bool:
        """Return whether a worker with `round_` rounds in its model has all known rounds."""
        return bool(self.ledger.segments) and round_ >= self.ledger.segments[-1].end

    def enter_rows(self, now: float) -> None:
        """Hand the event log the new rounds and contributions."""
        if self.journal.enter_rows():
            self.progressed_at = self.committed_at = now

    def enter(self, now: float) -> None:
        """Hand the event log all that is new. Its next flush writes it to the disk."""
        self.enter_rows(now)
        self.journal.enter_state()

    def flush(self) -> None:
        """Write the event log to the disk, and send the messages that were promised for then."""
        now = time.monotonic()
        self.enter(now)
        for route, body in self.journal.flush(now):
            self.mail.reply(route, body)


def new_context(
    sock: zmq.Socket[bytes], settings: Settings, run_dir: Path, restored: RestoredRun | None, recovers: bool, now: float
) -> RunContext:
    """Return the context of a new run, or of the run `restored`, whose coordinator has died if this one `recovers`."""
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
            membership.fewer_after_s = _FEWER_S  # by now there may be fewer workers on purpose
        if not restored.tables:  # the processes that join say what the model and the plan are
            ledger.go_on(settings)
    journal = GroupCommit(run_dir, head, membership, ledger, now)
    mail = Mailbox(sock, Stamp(sender="coordinator", run=head.run, incarnation=head.incarnation), journal)
    return RunContext(settings, policy, run_dir, head, membership, ledger, journal, mail, now)
