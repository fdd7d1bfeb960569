"""The thread that owns a worker's sockets, and how the training thread talks to it.

The training thread never touches a socket and never blocks in one: it hands over messages, and waits on one condition.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
import zmq

from roundtable.common.config.settings import START_S
from roundtable.common.network.host_identity import is_own
from roundtable.common.protocol.effects import COORDINATOR, Send
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.gradients import Push
from roundtable.common.protocol.messages.session import Heartbeat, Hello, MembershipUpdate, Peer, Refused, Stop, Welcome
from roundtable.common.protocol.rejections import Rejections
from roundtable.common.protocol.session import Session
from roundtable.common.protocol.transport import (
    ASK_AGAIN_S,
    GO_S,
    SEND_AGAIN_S,
    Frames,
    Stamp,
    dealer,
    is_bulk,
    new_incarnation,
    receive,
    send,
)
from roundtable.common.runtime.errors import ClusterError, NoAnswer, PsError, RunStopped, Stopped, UsageError, WireError
from roundtable.common.runtime.failpoints import failpoint
from roundtable.common.runtime.restart import restart
from roundtable.worker.client.unreached import UnreachedServers

log = logging.getLogger("roundtable.worker.link")

T = TypeVar("T")
#: Ending of the name of a server's second socket, which tensors go by.
_BULK = "/bulk"
_TICK_MS = 20


class IoThread:
    """Sockets to the coordinator and all servers, served by a thread of its own.

    `lock` guards everything that both threads touch, the state machines of the worker included. Callbacks are called by the
    thread with the lock held: `on_message(sender, body, frames)`, `on_tick(now) -> messages`, `heartbeat() -> Heartbeat`, and
    `on_replaced(server)` when a server is another process from now on.
    """

    def __init__(self, coordinator: str, hello: Hello, start_s: float = START_S) -> None:
        """The coordinator has `start_s` seconds to answer."""
        self.lock = threading.Condition()
        self.on_message: Callable[[str, Body, Frames], None] = lambda sender, body, frames: None
        self.on_tick: Callable[[float], list[Send]] = lambda now: []
        self.heartbeat: Callable[[], Heartbeat] = lambda: Heartbeat("starting")
        self.on_replaced: Callable[[int], None] = lambda server: None
        #: Whether to copy frames: necessary once the interpreter shuts down, when zero-copy buffers are no longer tracked.
        self.copies = False
        self._address = coordinator
        self._context: zmq.Context[Any] = zmq.Context()
        self._sockets: dict[str, zmq.Socket[bytes]] = {COORDINATOR: dealer(self._context, coordinator)}
        self._names: dict[Any, str] = {}
        self._peers: list[Peer] = []
        self._stamp = Stamp(sender="worker", incarnation=new_incarnation())
        #: What servers know this worker by.
        self._ticket = 0
        #: When each socket was last told whose it is.
        self._greeted: dict[str, float] = {}
        self._attendance = Session(hello, coordinator, time.monotonic(), start_s)
        self._refusals = Rejections(log)
        self._unreached = UnreachedServers()
        #: Says whom the training thread waits for, if it does; and how many messages with tensors have come.
        self._waits_for: Callable[[], str] | None = None
        self.answers = 0
        self._outbox: deque[Send] = deque()
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._woken.setblocking(False)
        #: Why the thread ended, if it did.
        self._error: PsError | None = None
        self._closing = False
        #: The signal that has told this worker to stop, if any, and when.
        self.stop_signal, self.stop_signal_at = 0, float("inf")
        self._is_interrupted = False
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)
        self._thread.start()

    # ---- for the training thread

    def send(self, *messages: Send) -> None:
        """Hand over messages; they go out at once, in order."""
        if messages:
            with self.lock:
                self._outbox.extend(messages)
            self._notify()

    def wait(
        self, ready: Callable[[], T | None], timeout: float, what: Callable[[], str], every: float | None = None
    ) -> T | None:
        """Block until `ready()`, called with the lock held, is neither None nor False, and return that.

        With `every`, return None after so many seconds. Raises the error that ended the link, or NoAnswer after `timeout`
        seconds, saying `what()` was waited for.
        """
        start = time.monotonic()
        limit = timeout if every is None else min(every, timeout)
        with self.lock:
            while True:
                if (value := ready()) is not None and value is not False:
                    self._waits_for = None
                    return value
                self.check()
                self._waits_for = what
                rest = start + limit - time.monotonic()
                if rest <= 0:
                    if limit < timeout:
                        return None
                    raise NoAnswer(f"waited {timeout:.0f} s for {what()}{self._unreached.text()}.")
                self.lock.wait(min(rest, 1.0))

    def request(
        self,
        to: str,
        body: Body,
        answer: Callable[[Body], bool],
        timeout: float,
        frames: Frames = (),
        again: float | None = None,
    ) -> Body:
        """Send, every `again` seconds, until a message for which `answer` is true comes back, and return it.

        Raises UsageError with the reason where the other side refuses.
        """
        replies: list[Body] = []
        before = self.on_message

        def listen(sender: str, reply: Body, reply_frames: Frames) -> None:
            if sender == to and (answer(reply) or isinstance(reply, Refused)):
                replies.append(reply)
            else:
                before(sender, reply, reply_frames)

        again = again or (SEND_AGAIN_S if frames else ASK_AGAIN_S)
        with self.lock:
            self.on_message = listen
        name = f"{to} to answer {type(body).__name__}"
        deadline = time.monotonic() + timeout
        try:
            while not replies:
                self.send(Send(to, body, frames))
                self.wait(lambda: bool(replies), timeout, lambda: name, every=again)
                if not replies and time.monotonic() >= deadline:
                    raise NoAnswer(f"waited {timeout:.0f} s for {name}{self._unreached.text()}.")
        finally:
            with self.lock:
                self.on_message = before
        if isinstance(replies[0], Refused):
            raise UsageError(replies[0].reason)
        return replies[0]

    @property
    def waits_for(self) -> str:
        """Whom the training thread waits for; '' if it does not."""
        what = self._waits_for
        return what() if what is not None else ""

    def check(self) -> None:
        """Raise the error that ended the link, if any."""
        if self._error is not None:
            raise self._error
        stop = self._attendance.stop
        if stop is not None and not stop.ok:
            if self.stop_signal:
                raise Stopped(self.stop_signal)
            raise (RunStopped if stop.on_request else ClusterError)(f"stopped because {stop.reason}")

    def joined(self) -> Welcome:
        """Block until the run starts, for as long as the coordinator answers. Raises SystemExit, with exit code 0, if that says
        that the run has finished, and ClusterError if it has failed."""
        what = f"the run of {self._address} to start"
        self.wait(lambda: self._attendance.welcome or self.stopped, float("inf"), lambda: what)
        if self._attendance.welcome is None:
            self.check()
            log.info("the run of %s has finished: there is nothing left to do", self._address)
            raise SystemExit(0)
        return self._attendance.welcome

    @property
    def epoch(self) -> int:
        """The membership epoch that the coordinator is told to be known here; while it is not the newest, it sends that."""
        return self._stamp.epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._stamp.epoch = epoch

    @property
    def stopped(self) -> bool:
        """Whether the coordinator has said that the run is over and saved."""
        return self._attendance.stop is not None

    @property
    def failed(self) -> bool:
        """Whether it has said that the run has failed."""
        return self._attendance.stop is not None and not self._attendance.stop.ok

    def heartbeat_soon(self) -> None:
        """Tell the coordinator where this worker is, unless it was told just now."""
        with self.lock:
            due = self._attendance.heartbeat_soon(time.monotonic())
        if due:
            self._notify()

    def interrupt(self) -> None:
        """Have the main thread end the script where it is: this worker was told to stop, and need not wait any more."""
        if not self._is_interrupted:
            self._is_interrupted = True
            signal.pthread_kill(threading.main_thread().ident or 0, self.stop_signal)

    def close(self) -> None:
        """Send what is left to send and end the thread."""
        with self.lock:
            self._closing = True
        self._notify()
        self._thread.join(timeout=5.0)
        self._wake.close()

    def _notify(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):  # it is awake already, or gone
            self._wake.send(b"\0")

    # ---- the thread

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._woken.fileno(), zmq.POLLIN)
        poller.register(self._sockets[COORDINATOR], zmq.POLLIN)
        self._names[self._sockets[COORDINATOR]] = COORDINATOR
        try:
            while not self._closing:
                for ready, _ in poller.poll(_TICK_MS):
                    if ready == self._woken.fileno():
                        self._woken.recv(65536)
                    else:
                        self._receive(ready, poller)
                self._send_all()
        except PsError as error:
            self._fail(error)
        except Exception as error:
            log.exception("the link failed")
            self._fail(ClusterError(f"the connection's thread failed: {type(error).__name__}: {error}."))
        finally:
            self._context.destroy(linger=1000)
            self._woken.close()

    def _fail(self, error: PsError) -> None:
        with self.lock:
            self._error = error
            self.lock.notify_all()

    def _receive(self, sock: Any, poller: zmq.Poller) -> None:
        name = self._names.get(sock)
        if name is None:
            return  # of a server that is another process since
        with self.lock:
            while (frames := receive(sock)) is not None:
                try:
                    envelope = self._stamp.open(frames[0].buffer)
                    body: Body = envelope.read()
                    if name == COORDINATOR:
                        if not self._attendance.is_current(envelope.incarnation):
                            continue
                        self._attendance.handle(body, time.monotonic())
                        if isinstance(body, Stop) and body.restart:
                            if self.stop_signal:
                                self.interrupt()
                                return
                            log.warning("restarts: %s", body.reason)
                            restart()
                    self.answers += len(frames) > 1
                    if isinstance(body, Welcome) and not self._peers:
                        self._stamp.sender, self._stamp.run, self._ticket = body.process, body.run, body.ticket
                        self._connect(body.servers, poller)
                    elif (
                        isinstance(body, MembershipUpdate)
                        and self._peers
                        and body.servers
                        and body.share_tables[-1].epoch > self.epoch
                    ):
                        self._connect(body.servers, poller)
                    self.on_message(name, body, frames[1:])
                except WireError as error:
                    self._refusals.note(error, time.monotonic(), name)
            self.lock.notify_all()

    def is_near(self, server: int) -> bool:
        """Whether what is sent to a server stays on this host."""
        return is_own(self._peers[server].address)

    def _connect(self, servers: list[Peer], poller: zmq.Poller) -> None:
        """The servers are these: have connections to them, new ones to those that are other processes than before."""
        before, self._peers = self._peers, servers
        for number, peer in enumerate(servers):
            if before and before[number] == peer:
                continue
            for key in (f"server-{number}", f"server-{number}{_BULK}"):
                if (old := self._sockets.get(key)) is not None:
                    poller.unregister(old)
                    del self._names[old]
                    self._unreached.forget(key)
                    old.close(linger=0)
                watch = self._unreached.watcher(key, peer.address, time.monotonic()) if not key.endswith(_BULK) else None
                sock = self._sockets[key] = dealer(self._context, peer.address, watch)
                self._names[sock] = f"server-{number}"
                poller.register(sock, zmq.POLLIN)
                self._greeted.pop(key, None)
                self._greet(key)
            if before:
                log.warning("server-%d is another process from now on", number)
                self.on_replaced(number)

    def _greet(self, key: str) -> None:
        """Say whose connection it is, unless that was said a moment ago. It may be another one than it was, and nobody tells
        of that; and from a stranger's a server does not take as much as gradients are."""
        now = time.monotonic()
        if now >= self._greeted.get(key, float("-inf")) + ASK_AGAIN_S:
            self._greeted[key] = now
            send(self._sockets[key], self._stamp.encode(Heartbeat(), self._ticket))

    def _heartbeat(self) -> Heartbeat:
        refused, unreached = self._refusals.counts, self._unreached.numbers
        return msgspec.structs.replace(self.heartbeat(), refused=refused, unreached=unreached, leaves=self.stop_signal > 0)

    def _look_for_signal(self, now: float) -> None:
        """Ask the coordinator to be let go, if this worker was told to stop, and go if that takes too long."""
        welcome = self._attendance.welcome
        if self.stop_signal and welcome is not None:
            self._attendance.heartbeat_soon(now)
            if now > self.stop_signal_at + welcome.settings.stop_timeout + GO_S:
                self.interrupt()

    def _look_at_connections(self, now: float) -> None:
        """Find out which servers cannot be reached."""
        welcome = self._attendance.welcome
        if welcome is not None and self._unreached.look(now, welcome.settings.progress_timeout / 2):
            self._attendance.heartbeat_soon(now)

    def _send_all(self) -> None:
        now = time.monotonic()
        with self.lock:
            self._look_for_signal(now)
            messages = list(self._outbox)
            self._outbox.clear()
            messages += [Send(COORDINATOR, body) for body in self._attendance.tick(now, self._heartbeat)]
            messages += self.on_tick(now)
            self._look_at_connections(now)
        for message in messages:
            to_server = message.to != COORDINATOR
            bulk = to_server and is_bulk(message.body, message.frames)
            key = message.to + _BULK * bulk
            if to_server and message.frames:
                self._greet(key)
            header = self._stamp.encode(message.body, self._ticket if to_server else None)
            send(self._sockets[key], header, message.frames, copy=self.copies)
            if isinstance(message.body, Push):
                failpoint("pushing", message.body.round)
        for message in messages:
            if isinstance(message.body, Push):
                failpoint("pushed", message.body.round)
