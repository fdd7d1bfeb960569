"""The thread that owns a worker's sockets, and the interface that the training thread uses.

The training thread never touches a socket and never blocks in one. It hands over messages, and waits on one condition.
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
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import zmq

from roundtable.common.config.settings import START_S
from roundtable.common.protocol.effects import COORDINATOR, Send
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.gradients import Push
from roundtable.common.protocol.messages.session import Heartbeat, Hello, MembershipUpdate, Refused, Stop, Welcome
from roundtable.common.protocol.rejections import Rejections
from roundtable.common.protocol.session import Session
from roundtable.common.protocol.transport import ASK_AGAIN_S, GO_S, SEND_AGAIN_S, Frames, receive
from roundtable.common.runtime.errors import ClusterError, NoAnswer, PsError, RunStopped, Stopped, UsageError, WireError
from roundtable.common.runtime.failpoints import failpoint
from roundtable.common.runtime.restart import restart
from roundtable.worker.client.connections import Connections

log = logging.getLogger("roundtable.worker.link")

T = TypeVar("T")
_TICK_MS = 20


@dataclass
class _Request:
    """A message to `to` without a reply yet. The reply is the first message from `to` that `answer` accepts, or a refusal."""

    to: str
    answer: Callable[[Body], bool]
    reply: Body | None = None

    def takes(self, sender: str, body: Body) -> bool:
        """Take a message if it is the reply, and return whether it is."""
        is_reply = sender == self.to and (self.answer(body) or isinstance(body, Refused))
        if is_reply and self.reply is None:
            self.reply = body
        return is_reply


class IoThread:
    """Sockets to the coordinator and all servers, served by a thread of its own.

    `lock` guards everything that both threads touch, including the worker's state machines. The thread calls all callbacks with
    the lock held:

    - `on_message(sender, body, frames)` for each message,
    - `on_tick(now)`, which returns messages to send,
    - `heartbeat()`, which returns a Heartbeat,
    - `on_replaced(server)` when a new process has taken a server's place.
    """

    def __init__(self, coordinator: str, hello: Hello, start_s: float = START_S) -> None:
        """Connect to the coordinator, which has `start_s` seconds to answer."""
        self.lock = threading.Condition()
        self.on_message: Callable[[str, Body, Frames], None] = lambda sender, body, frames: None
        self.on_tick: Callable[[float], list[Send]] = lambda now: []
        self.heartbeat: Callable[[], Heartbeat] = lambda: Heartbeat("starting")
        self.on_replaced: Callable[[int], None] = lambda server: None
        self.connections = Connections(coordinator)
        #: Whether to copy frames. The interpreter's shutdown needs copies, because zero-copy buffers are no longer tracked then.
        self.copies = False
        self._address = coordinator
        self._attendance = Session(hello, coordinator, time.monotonic(), start_s)
        self._refusals = Rejections(log)
        #: Returns what the training thread waits for; None if it does not wait.
        self._waits_for: Callable[[], str] | None = None
        #: Number of messages with tensors that have come.
        self.answers = 0
        self._request: _Request | None = None
        self._outbox: deque[Send] = deque()
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._woken.setblocking(False)
        #: The error that ended the thread, if any.
        self._error: PsError | None = None
        self._closing = False
        #: The signal that has asked this worker to stop (0 if none has), and when it came (in monotonic seconds).
        self.stop_signal, self.stop_signal_at = 0, float("inf")
        self._is_interrupted = False
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)
        self._thread.start()

    # ---- for the training thread

    def send(self, *messages: Send) -> None:
        """Hand over messages. The thread sends them at once and in order."""
        if messages:
            with self.lock:
                self._outbox.extend(messages)
            self._notify()

    def wait(
        self, ready: Callable[[], T | None], timeout: float, what: Callable[[], str], every: float | None = None
    ) -> T | None:
        """Block until `ready()`, called with the lock held, is neither None nor False, and return that value.

        With `every`, return None after so many seconds. Raises the error that ended the thread. Raises NoAnswer after `timeout`
        seconds, with `what()` as the thing waited for.
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
                    raise NoAnswer(f"waited {timeout:.0f} s for {what()}{self.connections.unreached.text()}.")
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
        """Send a message every `again` seconds until a message that `answer` accepts comes back, and return that one.

        Raises UsageError with the reason if the other side refuses, and NoAnswer after `timeout` seconds.
        """
        again = again or (SEND_AGAIN_S if frames else ASK_AGAIN_S)
        request = _Request(to, answer)
        with self.lock:
            self._request = request
        name = f"{to} to answer {type(body).__name__}"
        deadline = time.monotonic() + timeout
        try:
            while request.reply is None:
                self.send(Send(to, body, frames))
                self.wait(lambda: request.reply is not None, timeout, lambda: name, every=again)
                if request.reply is None and time.monotonic() >= deadline:
                    raise NoAnswer(f"waited {timeout:.0f} s for {name}{self.connections.unreached.text()}.")
        finally:
            with self.lock:
                self._request = None
        if isinstance(request.reply, Refused):
            raise UsageError(request.reply.reason)
        return request.reply

    @property
    def waits_for(self) -> str:
        """The thing that the training thread waits for; '' if it does not wait."""
        what = self._waits_for
        return what() if what is not None else ""

    def check(self) -> None:
        """Raise the error that ended the thread or the run, if any."""
        if self._error is not None:
            raise self._error
        stop = self._attendance.stop
        if stop is not None and not stop.ok:
            if self.stop_signal:
                raise Stopped(self.stop_signal)
            raise (RunStopped if stop.on_request else ClusterError)(f"stopped because {stop.reason}")

    def joined(self) -> Welcome:
        """Block until the run starts, and return the Welcome. There is no limit while the coordinator answers.

        Raises SystemExit, with exit code 0, if the run has finished, and ClusterError if it has failed.
        """
        what = f"the run of {self._address} to start"
        self.wait(lambda: self._attendance.welcome or self.stopped, float("inf"), lambda: what)
        if self._attendance.welcome is None:
            self.check()
            log.info("the run of %s has finished: there is nothing left to do", self._address)
            raise SystemExit(0)
        return self._attendance.welcome

    @property
    def epoch(self) -> int:
        """The membership epoch that this worker reports to the coordinator, which answers an old one with the newest."""
        return self.connections.stamp.epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self.connections.stamp.epoch = epoch

    @property
    def stopped(self) -> bool:
        """Whether the coordinator has said that the run is over and saved."""
        return self._attendance.stop is not None

    @property
    def failed(self) -> bool:
        """Whether the coordinator has said that the run has failed."""
        return self._attendance.stop is not None and not self._attendance.stop.ok

    def heartbeat_soon(self) -> None:
        """Tell the coordinator what this worker is doing, unless it has done so a moment ago."""
        with self.lock:
            due = self._attendance.heartbeat_soon(time.monotonic())
        if due:
            self._notify()

    def interrupt(self) -> None:
        """Interrupt the script in the main thread, because this worker was asked to stop and need not wait any longer."""
        if not self._is_interrupted:
            self._is_interrupted = True
            signal.pthread_kill(threading.main_thread().ident or 0, self.stop_signal)

    def close(self) -> None:
        """Send what is left to send, and end the thread."""
        with self.lock:
            self._closing = True
        self._notify()
        self._thread.join(timeout=5.0)
        self._wake.close()

    def _notify(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):  # the thread is awake already, or gone
            self._wake.send(b"\0")

    # ---- the thread

    def _run(self) -> None:
        poller = self.connections.poller
        poller.register(self._woken.fileno(), zmq.POLLIN)
        try:
            while not self._closing:
                for ready, _ in poller.poll(_TICK_MS):
                    if ready == self._woken.fileno():
                        self._woken.recv(65536)
                    else:
                        self._receive(ready)
                self._send_all()
        except PsError as error:
            self._fail(error)
        except Exception as error:
            log.exception("the link failed")
            self._fail(ClusterError(f"the connection's thread failed: {type(error).__name__}: {error}."))
        finally:
            self.connections.close()
            self._woken.close()

    def _fail(self, error: PsError) -> None:
        with self.lock:
            self._error = error
            self.lock.notify_all()

    def _receive(self, sock: Any) -> None:
        name = self.connections.name_of(sock)
        if name is None:
            return  # from a server whose place a new process has taken
        with self.lock:
            while (frames := receive(sock)) is not None:
                try:
                    envelope = self.connections.stamp.open(frames[0].buffer)
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
                    if isinstance(body, Welcome) and not self.connections.servers:
                        self.connections.introduce(body)
                        self.connections.connect(body.servers)
                    elif isinstance(body, MembershipUpdate):
                        self._know(body)
                    if self._request is None or not self._request.takes(name, body):
                        self.on_message(name, body, frames[1:])
                except WireError as error:
                    self._refusals.note(error, time.monotonic(), name)
            self.lock.notify_all()

    def _know(self, update: MembershipUpdate) -> None:
        """Connect to servers that are new processes."""
        if self.connections.servers and update.servers and update.share_tables[-1].epoch > self.epoch:
            for number in self.connections.connect(update.servers):
                log.warning("server-%d was replaced; reconnected", number)
                self.on_replaced(number)

    def _heartbeat(self) -> Heartbeat:
        refused, unreached = self._refusals.counts, self.connections.unreached.numbers
        return msgspec.structs.replace(self.heartbeat(), refused=refused, unreached=unreached, leaves=self.stop_signal > 0)

    def _look_for_signal(self, now: float) -> None:
        """Ask the coordinator to release this worker if it was asked to stop. Interrupt the script if that takes too long."""
        welcome = self._attendance.welcome
        if self.stop_signal and welcome is not None:
            self._attendance.heartbeat_soon(now)
            if now > self.stop_signal_at + welcome.settings.stop_timeout + GO_S:
                self.interrupt()

    def _look_at_connections(self, now: float) -> None:
        """Find out which servers cannot be reached."""
        welcome = self._attendance.welcome
        if welcome is not None and self.connections.unreached.look(now, welcome.settings.progress_timeout / 2):
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
            self.connections.send(message, copy=self.copies)
            if isinstance(message.body, Push):
                failpoint("pushing", message.body.round)
        for message in messages:
            if isinstance(message.body, Push):
                failpoint("pushed", message.body.round)
