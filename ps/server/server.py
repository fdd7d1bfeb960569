"""The server process: a loop that moves messages between its sockets and its state machines."""

from __future__ import annotations

import logging
import os
import platform
import signal
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec
import torch
import zmq

from roundtable.common.config.settings import START_S
from roundtable.common.network.addresses import advertised, await_route, to_advertise
from roundtable.common.network.host_identity import here
from roundtable.common.policies import load
from roundtable.common.protocol.effects import BACKUP, COORDINATOR, AboutCopies, Send, number_of
from roundtable.common.protocol.envelope import Envelope
from roundtable.common.protocol.flow_limits import Inflow, Outflow, Standing
from roundtable.common.protocol.liveness import Signs
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.embedding import RowPull
from roundtable.common.protocol.messages.gradients import Pull
from roundtable.common.protocol.messages.kv import KvPull, KvPush
from roundtable.common.protocol.messages.session import MOST_MICRO_BATCHES, Heartbeat, Hello, MembersLost, Peer, Refused
from roundtable.common.protocol.messages.setup import Plan
from roundtable.common.protocol.rejections import Rejections
from roundtable.common.protocol.session import Session
from roundtable.common.protocol.tickets import seal
from roundtable.common.protocol.transport import (
    GO_S,
    HEARTBEAT_S,
    Frames,
    Stamp,
    allow_files,
    dealer,
    is_bulk,
    is_worker,
    new_incarnation,
    receive,
    router,
    send,
)
from roundtable.common.runtime.allocator import keep_memory
from roundtable.common.runtime.errors import ClusterError, RunStopped, Stopped, WireError
from roundtable.common.runtime.failpoints import arm
from roundtable.common.runtime.restart import restart
from roundtable.common.runtime.signal_handlers import handled
from roundtable.common.runtime.skip_dynamo import no_compiler
from roundtable.common.runtime.watchdog import Watchdog
from roundtable.ps.coordinator.state.failure_detector import FAR_S
from roundtable.ps.replication.manager import FROM_NEIGHBOUR
from roundtable.ps.server.connections import Connections
from roundtable.ps.server.identities import Identities
from roundtable.ps.server.kv_store import KvStore
from roundtable.ps.server.shard_host import FROM_COORDINATOR, ShardHost
from roundtable.ps.shard.checkpoint_writer import CheckpointWriter, open_source
from roundtable.ps.shard.context import ShardContext

log = logging.getLogger("roundtable.ps.server")

_CPU = torch.device("cpu")
#: Milliseconds that the loop waits for a message before it looks at the clock.
_TICK_MS = 20


def serve(
    coordinator: str,
    bind: str,
    index: int | None,
    device: torch.device,
    start_s: float = START_S,
    advertise: str | None = None,
    trusts: Collection[str] = (),
) -> None:
    """Run a server of the cluster of `coordinator` until the run ends. The server listens at `bind`.

    Sharded layers are computed on `device`. The coordinator has `start_s` seconds to answer. If `advertise` (HOST, HOST:PORT or
    tcp://HOST:PORT) is not None, other processes connect to that address. `trusts` are modules whose optimizers may run here.

    Raises UsageError if the server cannot listen or is refused. Raises ClusterError if the run fails or the coordinator falls
    silent. Raises Stopped on SIGTERM and Ctrl-C: at the first signal, once the coordinator lets the server leave.
    """
    torch.set_num_threads(1)
    keep_memory()
    context: zmq.Context[Any] = zmq.Context()
    try:
        await_route(coordinator, start_s)
        with no_compiler():
            server = _Server(context, coordinator, bind, index, device, start_s, advertise, trusts)
            with handled((signal.SIGTERM, signal.SIGINT), server.stop):
                server.run()
    finally:
        context.destroy(linger=1000)


class _Server:
    def __init__(
        self,
        context: zmq.Context[Any],
        coordinator: str,
        bind: str,
        index: int | None,
        device: torch.device = _CPU,
        start_s: float = START_S,
        advertise: str | None = None,
        trusts: Collection[str] = (),
    ) -> None:
        self._workers, bound = router(context, bind)
        self._coordinator = dealer(context, coordinator)
        self._device, self._trusts = device, trusts
        address = to_advertise(advertise, bound) if advertise is not None else advertised(bound, coordinator)
        hello = Hello("server", index, address, platform.node(), os.getpid(), place=here())
        self._attendance = Session(hello, coordinator, time.monotonic(), start_s)
        #: The last regular heartbeat, and when `_show_life` last sent an extra one.
        self._last_heartbeat, self._shown_life_at = Heartbeat("starting"), float("-inf")
        self._signs = Signs()
        self._stamp = Stamp(sender="server", incarnation=new_incarnation())
        #: The signal that told this server to stop, or 0, and when it came.
        self.stop_signal, self._stop_signal_at = 0, float("inf")
        #: None before this server is welcomed.
        self._shard: ShardHost | None = None
        self._writer: CheckpointWriter | None = None
        self._kv: KvStore | None = None
        self._rejections = Rejections(log)
        #: Watches incoming connections, once the loop runs.
        self._inflow: Inflow | None = None
        outflow = Outflow(self._rejections)
        self._connections = Connections(context, self._coordinator, self._workers, self._stamp, outflow)
        self._watchdog: Watchdog | None = None
        #: None before this server is welcomed.
        self._identities: Identities | None = None
        #: The number of workers' messages, without pulls. The watchdog takes it as progress.
        self._handled = 0
        log.info("listening at %s%s", bound, "" if address == bound else f"; others are told {address}")

    def run(self) -> None:
        """Run the loop until the coordinator stops this server. Raises as `serve` says."""
        self._connections.poller.register(self._workers, zmq.POLLIN)
        self._connections.poller.register(self._coordinator, zmq.POLLIN)
        self._inflow = Inflow(self._workers, self._rejections)
        try:
            self._loop()
        finally:
            self._inflow.close()
            if self._watchdog is not None:
                self._watchdog.stop()
        stop = self._attendance.stop
        if stop is not None and (stop.restart or stop.on_request) and self.stop_signal:
            raise Stopped(self.stop_signal, "has left the run because it was told to stop.")
        if stop is not None and stop.restart:
            log.warning("restarts: %s", stop.reason)
            self._signs.pause()
            restart()
        if stop is not None and not stop.ok:
            raise (RunStopped if stop.on_request else ClusterError)(f"stopped because {stop.reason}")

    def stop(self, number: int) -> None:
        """Leave the run because of signal `number`, once the coordinator lets this server go. A signal handler may call this.

        Raises Stopped if called again, or if this server is in no run.
        """
        if self.stop_signal or self._shard is None:
            raise Stopped(number)
        self.stop_signal, self._stop_signal_at = number, time.monotonic()

    def _look_for_signal(self, now: float) -> None:
        """If a signal has come, ask the coordinator for leave in a heartbeat. Raises Stopped if that takes too long."""
        if self.stop_signal and self._shard is not None:
            self._attendance.heartbeat_soon(now)
            if now > self._stop_signal_at + self._shard.settings.stop_timeout + GO_S:
                raise Stopped(self.stop_signal, "was told to stop, got no leave in time, and leaves the run.")

    def _loop(self) -> None:
        assert self._inflow is not None
        while self._attendance.stop is None:
            busy = self._shard is not None and self._shard.busy
            ready = dict(self._connections.poller.poll(0 if busy else _TICK_MS))
            if self._coordinator in ready:
                self._drain(self._coordinator)
            if (backup := self._connections.backup) is not None and backup in ready:
                self._drain(backup)
            if self._workers in ready and self._shard is not None and not self._shard.restoring:
                self._drain(self._workers)
            now = time.monotonic()
            self._look_for_signal(now)
            self._inflow.look(now, listening=self._shard is None or not self._shard.restoring)
            for body in self._attendance.tick(now, self._tell):
                send(self._coordinator, self._stamp.encode(body))
            self._signs.give(self._silence_s())
            if self._shard is not None:
                self._do(self._shard.tick(now))
                self._do(self._shard.work(now))
                self._save()

    def _save(self) -> None:
        """Start to write a complete checkpoint, and report one that is written."""
        assert self._shard is not None and self._writer is not None
        if (data := self._shard.take_checkpoint()) is not None:
            self._writer.start(data)
        if (status := self._writer.poll()) is not None:
            self._do(self._shard.written(status))

    def _finish_saving(self) -> None:
        """Block until the checkpoint is written. Called before tables change, because a checkpoint's tables are not copies."""
        self._save()
        if self._writer is not None:
            self._writer.wait(self._show_life)

    def _progress(self) -> tuple[int, int] | None:
        """Return values that change while the shard is trained, or None before. The watchdog's thread calls this."""
        shard = self._shard
        return (shard.version, self._handled + shard.done) if shard is not None and shard.plans.segments else None

    def _waits_for(self) -> str:
        shard = self._shard
        return "the run to start" if shard is None else f"micro-batches {shard.missing()[:20]} of round {shard.version}"

    def _show_life(self) -> None:
        """Send the last heartbeat again if one is due. Called in long work: reading a checkpoint, or waiting for a write."""
        if self._shard is not None and (now := time.monotonic()) >= self._shown_life_at + HEARTBEAT_S:
            self._shown_life_at = now
            send(self._coordinator, self._stamp.encode(msgspec.structs.replace(self._last_heartbeat, progress=self._shard.done)))
            self._signs.give(self._silence_s())

    def _silence_s(self) -> float:
        """Return the seconds of silence after which the coordinator first counts this server as lost."""
        welcome = self._attendance.welcome
        return FAR_S if welcome is None or welcome.settings.heartbeat_timeout is None else welcome.settings.heartbeat_timeout

    def _tell(self) -> Heartbeat:
        self._last_heartbeat = self._heartbeat()
        return self._last_heartbeat

    def _heartbeat(self) -> Heartbeat:
        if self._shard is None:
            return Heartbeat("starting", refused=self._rejections.counts)
        shard, refused = self._shard, self._rejections.counts
        if shard.restoring:
            return Heartbeat("starting", refused=refused, leaves=bool(self.stop_signal))
        return Heartbeat(
            "waiting",
            shard.version,
            missing=shard.missing()[:MOST_MICRO_BATCHES],
            missing_later=shard.missing_later(),
            progress=shard.done,
            traffic=shard.traffic,
            replicas_held=shard.backed_up,
            refused=refused,
            leaves=bool(self.stop_signal),
        )

    def _drain(self, sock: zmq.Socket[bytes]) -> None:
        """Handle the messages that have come in at `sock`, for about HEARTBEAT_S at most."""
        until = time.monotonic() + HEARTBEAT_S
        while time.monotonic() < until:
            frames: list[zmq.Frame] | None = []
            standing = Standing.STRANGER
            try:
                frames = receive(sock)
                if frames is None:
                    return
                if sock is self._coordinator:
                    envelope = self._stamp.open(frames[0].buffer)
                    body = envelope.read()
                    if self._attendance.is_current(envelope.incarnation):
                        self._from_coordinator(body, frames[1:])
                elif sock is self._connections.backup:
                    envelope = self._stamp.open(frames[0].buffer)
                    if self._is_server(envelope, 1):
                        self._about_copies(BACKUP, envelope.read(), frames[1:])
                else:
                    if len(frames) < 2:
                        raise WireError("a message has no header", "malformed")
                    envelope = self._stamp.open(frames[1].buffer)
                    if self._identify(envelope):
                        standing = Standing.MEMBER
                        self._from_peer(frames[0].bytes, envelope, frames[2:])
            except WireError as error:
                self._rejections.note(error, time.monotonic())
            if self._inflow is not None and sock is self._workers and frames:
                self._inflow.took(frames[1:], standing)

    def _identify(self, envelope: Envelope) -> bool:
        """Return True if a message comes from the worker or server that it names. Raises WireError if its sender is no member.

        Return False if the sender may prove to be a member later. It sends the message again.
        """
        name = envelope.sender
        if not is_worker(name):
            return self._is_server(envelope, -1)
        if self._identities is None:
            raise WireError(f"'{name}' speaks before this server is in a run", "sender")
        self._identities.check_worker(envelope)
        if self._shard is not None and name in self._shard.lost:
            raise WireError(f"{name} is lost and no longer part of the run", "sender")
        return True

    def _is_server(self, envelope: Envelope, step: int) -> bool:
        if self._identities is None:
            raise WireError(f"'{envelope.sender}' is neither a worker nor a neighbour of this server", "sender")
        return self._identities.is_server(envelope, step)

    def _from_coordinator(self, body: Body, frames: Frames) -> None:
        now = time.monotonic()
        self._attendance.handle(body, now)
        welcome = self._attendance.welcome
        if self._shard is not None:
            if isinstance(body, MembersLost):
                self._lose(body, now)
            elif isinstance(body, FROM_COORDINATOR):
                self._do(self._shard.handle(COORDINATOR, body, frames, now))
        elif welcome is not None:
            self._stamp.sender = welcome.process
            self._stamp.run = welcome.run
            self._kv = KvStore(welcome.settings.kv_memory)
            allow_files(2 * welcome.settings.workers)  # each worker has a connection for tensors and one for other messages
            index, run_dir = number_of(welcome.process), Path(welcome.run_dir)
            arm(welcome.process, run_dir)
            source = open_source(run_dir, welcome.resume) if welcome.resume >= 0 else None
            self._writer = writer = CheckpointWriter(index, run_dir)
            context = ShardContext(
                index, welcome.settings, load(welcome.settings), self._device, lambda: self._attendance.coordinator,
                self._show_life, self._finish_saving, lambda: writer.busy, lambda: writer.bytes, self._trusts,
            )  # fmt: skip
            self._identities = Identities(index, welcome.key, welcome.servers)
            self._shard = ShardHost(context, source, welcome.replaces, welcome.ends_after)
            self._know(welcome.servers)
            self._watchdog = Watchdog(welcome.settings.stack_dump_after, self._progress, self._waits_for)
            log.info("this is %s of run %s", welcome.process, welcome.run)

    def _know(self, servers: list[Peer]) -> None:
        """Take a new list of servers. Connect to the backup if it is another process now."""
        assert self._shard is not None and self._identities is not None
        identities = self._identities
        before, identities.servers = identities.servers, servers
        if not self._shard.settings.replicas:
            return
        backup, primary = identities.neighbour(1), identities.neighbour(-1)
        if self._connections.backup is None or before[backup] != servers[backup]:
            self._connections.connect_backup(servers[backup].address)
        is_other = [a != b for a, b in zip(before, servers, strict=True)]
        self._do(self._shard.changed(is_other[backup], is_other[primary], time.monotonic()))

    def _about_copies(self, sender: str, body: Body, frames: Frames) -> None:
        """Handle a message of the backup (BACKUP), or of the server whose shard has a copy here."""
        assert self._shard is not None
        if not isinstance(body, AboutCopies):
            raise WireError(f"a server has no use for {type(body).__name__}")
        self._do(self._shard.about_copies(sender, body, frames, time.monotonic()))

    def _lose(self, body: MembersLost, now: float) -> None:
        assert self._shard is not None and self._kv is not None
        if body.epoch >= self._stamp.epoch and body.servers:
            self._know(body.servers)
        self._stamp.epoch = max(self._stamp.epoch, body.epoch)
        self._do(self._shard.handle(COORDINATOR, body, (), now))
        self._connections.forget(self._shard.lost)
        for worker in body.workers:
            self._kv.forget(worker)

    def _from_peer(self, route: bytes, envelope: Envelope, frames: Frames) -> None:
        assert self._shard is not None and self._kv is not None and self._identities is not None
        sender, body = envelope.sender, envelope.read()
        if not is_worker(sender):
            if isinstance(body, Heartbeat):
                return
            if not isinstance(body, FROM_NEIGHBOUR):
                raise WireError(f"a server has no use for {type(body).__name__} of {sender}")
            self._connections.routes[sender, False] = self._connections.routes[sender, True] = route
            self._about_copies(sender, body, frames)
            return
        if isinstance(body, Heartbeat):  # a connection's first message, which only names the worker
            return
        self._connections.routes[sender, is_bulk(body, frames)] = route
        self._handled += not isinstance(body, Pull | RowPull)  # a waiting worker repeats its pull
        try:
            if isinstance(body, KvPush | KvPull):
                replies = self._kv.handle(sender, envelope.incarnation, body, frames)
                self._do([Send(sender, *reply) for reply in replies])
            elif isinstance(body, Plan) and body.seal != seal(self._identities.key, body.segment):
                raise WireError(f"{sender} has a plan that the coordinator has not agreed to")
            else:
                self._do(self._shard.handle(sender, body, frames, time.monotonic()))
        except WireError as error:
            about = type(body).__name__ + (f":{body.id}" if isinstance(body, KvPush | KvPull) else "")
            self._do([Send(sender, Refused(about, f"{self._stamp.sender} refused: {error}."))])
            raise

    def _do(self, effects: list[Send]) -> None:
        self._connections.send(effects)
