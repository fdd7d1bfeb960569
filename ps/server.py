"""The server process: a loop that moves messages between sockets and its state machines."""

from __future__ import annotations

import logging
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
import zmq

from common.allocator import keep_memory
from common.attendance import Attendance
from common.errors import ClusterError, WireError
from common.messages import AllNorms, Arrived, Beat, Body, Close, Cut, Hello, KvPull, KvPush, Lost, Norms, Refused, ReportAck
from common.no_compiler import no_compiler
from common.policies import load
from common.restart import restart
from common.wire import (
    BEAT_S,
    Frames,
    Stamp,
    advertised,
    allow_files,
    dealer,
    is_bulk,
    new_incarnation,
    receive,
    router,
    send,
)
from ps.kv import KvStore
from ps.push_shard import PushShard
from ps.round_shard import RoundShard
from ps.saving import Writer, open_source
from ps.shard import COORDINATOR, Send, Shard

log = logging.getLogger("ps.server")

#: Milliseconds between two looks at the clock when no message comes.
_TICK_MS = 20


def serve(coordinator: str, bind: str, index: int | None) -> None:
    """Be a server of the cluster of `coordinator`, listening at `bind`, until the run ends.

    Raises UsageError if it cannot listen or is refused, ClusterError if the run fails or the coordinator falls silent.
    """
    torch.set_num_threads(1)
    keep_memory()
    context: zmq.Context[Any] = zmq.Context()
    try:
        with no_compiler():
            _Server(context, coordinator, bind, index).run()
    finally:
        context.destroy(linger=1000)


class _Server:
    def __init__(self, context: zmq.Context[Any], coordinator: str, bind: str, index: int | None) -> None:
        self._workers, bound = router(context, bind)
        self._coordinator = dealer(context, coordinator)
        address = advertised(bound, coordinator)
        hello = Hello("server", index, address, platform.node(), os.getpid())
        self._attendance = Attendance(hello, coordinator, time.monotonic())
        self._stamp = Stamp(sender="server", incarnation=new_incarnation())
        self._shard: Shard | None = None
        self._writer: Writer | None = None
        self._kv = KvStore()
        #: Where to send what is for a worker: the routing ids of its connections, for small messages (False) and tensors (True).
        self._routes: dict[tuple[str, bool], bytes] = {}
        self._complained_at = float("-inf")
        log.info("listening at %s", address)

    def run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._workers, zmq.POLLIN)
        poller.register(self._coordinator, zmq.POLLIN)
        while self._attendance.stop is None:
            ready = dict(poller.poll(_TICK_MS))
            if self._coordinator in ready:
                self._drain(self._coordinator)
            if self._workers in ready and self._shard is not None:
                self._drain(self._workers)
            now = time.monotonic()
            for body in self._attendance.tick(now, self._beat):
                send(self._coordinator, self._stamp.encode(body))
            if self._shard is not None:
                self._do(self._shard.tick(now))
                self._save()
        if self._attendance.stop.again:
            log.warning("begins anew: %s", self._attendance.stop.reason)
            restart()
        if not self._attendance.stop.ok:
            raise ClusterError(f"stopped because {self._attendance.stop.reason}")

    def _save(self) -> None:
        """Have a snapshot written that is due, and tell of one that is written."""
        assert self._shard is not None and self._writer is not None
        if self._shard.capture is not None:
            self._writer.start(self._shard.capture)
            self._shard.capture = None
        if (saved := self._writer.poll()) is not None:
            self._do(self._shard.saved(saved))

    def _finish_saving(self) -> None:
        """Called before tables change, for what a snapshot has of them is not a copy."""
        self._save()
        if self._writer is not None:
            self._writer.wait()

    def _beat(self) -> Beat:
        if self._shard is None:
            return Beat("starting")
        return Beat("waiting", self._shard.version, left=self._shard.missing(), traffic=self._shard.traffic)

    def _drain(self, sock: zmq.Socket[bytes]) -> None:
        """Handle what has come in at `sock`, for about as long as a beat at most."""
        until = time.monotonic() + BEAT_S
        while time.monotonic() < until:
            try:
                frames = receive(sock)
                if frames is None:
                    return
                route = frames.pop(0).bytes if sock is self._workers else None
                if not frames:
                    raise WireError("a message has no header")
                envelope = self._stamp.decode(frames[0].buffer)
            except WireError as error:
                self._complain(str(error))
                continue
            if route is None and not self._attendance.is_current(envelope.incarnation):
                continue
            if self._shard is not None and envelope.sender in self._shard.lost:
                self._complain(f"{envelope.sender} is lost and is no part of the run any more")
            elif route is None:
                self._from_coordinator(envelope.body, frames[1:])
            else:
                self._routes[envelope.sender, is_bulk(envelope.body, frames[1:])] = route
                self._from_worker(envelope.sender, envelope.incarnation, envelope.body, frames[1:])

    def _from_coordinator(self, body: Body, frames: Frames) -> None:
        now = time.monotonic()
        self._attendance.handle(body, now)
        welcome = self._attendance.welcome
        if self._shard is not None:
            self._shard.coordinator = self._attendance.coordinator
            if isinstance(body, Lost):
                self._lose(body, now)
            elif isinstance(body, ReportAck | Close | AllNorms | Arrived | Norms | Cut):
                self._do(self._shard.handle(COORDINATOR, body, frames, now))
        elif welcome is not None:
            self._stamp.sender = welcome.process
            self._stamp.run = welcome.run
            allow_files(2 * welcome.settings.workers)  # each has a connection for tensors, and one for all else
            policy = load(welcome.settings)
            kind = RoundShard if policy.applies == "round" else PushShard
            index, run_dir = int(welcome.process.rpartition("-")[2]), Path(welcome.run_dir)
            source = open_source(run_dir, welcome.resume) if welcome.resume >= 0 else None
            self._shard = kind(index, welcome.settings, policy, source)
            self._shard.coordinator = self._attendance.coordinator
            self._shard.before_tables_change = self._finish_saving
            self._writer = Writer(index, run_dir)
            log.info("this is %s of run %s", welcome.process, welcome.run)

    def _lose(self, body: Lost, now: float) -> None:
        assert self._shard is not None
        self._stamp.epoch = max(self._stamp.epoch, body.epoch)
        self._do(self._shard.handle(COORDINATOR, body, (), now))
        self._routes = {key: route for key, route in self._routes.items() if key[0] not in self._shard.lost}
        for worker in body.workers:
            self._kv.forget(worker)

    def _from_worker(self, sender: str, incarnation: int, body: Body, frames: Frames) -> None:
        assert self._shard is not None
        try:
            if isinstance(body, KvPush | KvPull):
                reply, out = self._kv.handle(sender, incarnation, body, frames)
                self._do([Send(sender, reply, out)])
            else:
                self._do(self._shard.handle(sender, body, frames, time.monotonic()))
        except WireError as error:
            self._complain(str(error))
            about = type(body).__name__ + (f":{body.id}" if isinstance(body, KvPush | KvPull) else "")
            self._do([Send(sender, Refused(about, f"{self._stamp.sender} refused: {error}."))])

    def _do(self, effects: list[Send]) -> None:
        for effect in effects:
            header = self._stamp.encode(effect.body)
            if effect.to == COORDINATOR:
                send(self._coordinator, header, effect.frames)
            else:
                bulk = is_bulk(effect.body, effect.frames)
                route = self._routes.get((effect.to, bulk)) or self._routes.get((effect.to, not bulk))
                if route is not None:
                    send(self._workers, header, effect.frames, to=route)

    def _complain(self, text: str) -> None:
        """Log what was refused, at most once a second."""
        now = time.monotonic()
        if now > self._complained_at + 1.0:
            self._complained_at = now
            log.warning("refused: %s", text)
